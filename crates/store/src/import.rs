//! Brings content from one place to another, whole repositories at a time: other registries' storage directories, OCI
//! layouts and live registries into a store or into a registry that runs, and a store out into layouts.
//!
//! The key decision: **one walk for every pair**. A [`Source`] says what it holds and gives content by digest, a
//! [`Sink`] takes content by digest and tells what it has; [`run`] plans a repository (tags, children, referrers,
//! subjects), moves blobs before manifests, children before their index, and compares both sides at the end. A run
//! remembers nothing: what the sink has is skipped, so a run that was killed is simply started again.
//!
//! A source is foreign and may be broken. What cannot be read, is missing or has another digest is listed and skipped,
//! with what needs it, and the rest goes on. This room is the only one that reads directories of other programs
//! (`tree` keeps it inside them), and it writes nothing there.

mod adopt;
mod distribution;
mod layouts;
mod plan;
mod report;
mod tree;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use oci::{Descriptor, Digest, Manifest, RepositoryName, Tag};
use tokio::sync::Semaphore;

use crate::error::Error;

pub use adopt::{Placed, Placement, StoreSink, StoreSource};
pub use distribution::Distribution;
pub use layouts::{Layouts, Shape};
pub use report::{Counts, Difference, Moved, Problem, Report};

use plan::{Node, Plan};

/// Why a step of an import failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// This piece of content is broken or missing; it is listed and skipped.
    #[error("{0}")]
    Broken(String),
    /// Nothing more can be done: the store failed, the registry is not reached.
    #[error(transparent)]
    Fatal(Box<dyn std::error::Error + Send + Sync>),
}

impl Failure {
    /// Wraps an error after which a run must end.
    pub fn fatal(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Fatal(error.into())
    }
}

/// A manifest as a source has it, its digest verified by the source.
#[derive(Clone, Debug)]
pub struct Document {
    /// The exact bytes.
    pub body: Bytes,
    /// Its media type where the source keeps one beside the bytes, else empty.
    pub media_type: String,
}

/// The bytes of a blob, not verified yet.
pub enum Content {
    /// A file, open for reading from its start, of so many bytes.
    File(File, u64),
    /// In memory.
    Bytes(Bytes),
    /// Chunk by chunk.
    Stream(Box<dyn Chunks>),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(_, size) => write!(f, "File({size})"),
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

impl Content {
    /// The same bytes chunk by chunk.
    pub fn into_chunks(self) -> Box<dyn Chunks> {
        match self {
            Self::File(file, size) => Box::new(FileChunks {
                file: Arc::new(file),
                at: 0,
                size,
            }),
            Self::Bytes(bytes) => Box::new(Once(Some(bytes))),
            Self::Stream(chunks) => chunks,
        }
    }
}

/// A blob that comes in chunks.
pub trait Chunks: Send {
    /// The next chunk; `None` at the end.
    fn next(&mut self)
    -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>>;

    /// What the chunks are read from, for a sink that knows a shorter way from there.
    fn origin(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        None
    }
}

/// What a repository of a source holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Tags with what they point to.
    pub tags: BTreeMap<Tag, Digest>,
    /// Manifests that the source lists beside the tags.
    pub listed: Vec<Listed>,
    /// What of the list could not be read.
    pub problems: Vec<String>,
}

/// A manifest that a source lists.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its digest.
    pub digest: Digest,
    /// The media type in the list; may be empty.
    pub media_type: String,
    /// It was put into the list on purpose, so it is wanted without a tag too.
    pub wanted: bool,
}

/// Names of repositories, and what of them could not be read.
#[derive(Clone, Debug, Default)]
pub struct Repositories {
    /// The names.
    pub names: Vec<RepositoryName>,
    /// One sentence each.
    pub problems: Vec<String>,
}

/// Where content comes from.
pub trait Source: Send + Sync + 'static {
    /// All repositories.
    fn repositories(&self) -> impl Future<Output = Result<Repositories, Failure>> + Send;

    /// What a repository holds.
    fn contents(
        &self,
        repository: &RepositoryName,
    ) -> impl Future<Output = Result<Contents, Failure>> + Send;

    /// A manifest by digest, verified; `None` when it is not there.
    fn manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> impl Future<Output = Result<Option<Document>, Failure>> + Send;

    /// What refers to a manifest, as far as [`Source::contents`] does not list it.
    fn referrers(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
    ) -> impl Future<Output = Result<Vec<Digest>, Failure>> + Send;

    /// A blob, not verified; `None` when it is not there.
    fn blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> impl Future<Output = Result<Option<Content>, Failure>> + Send;
}

/// A manifest on its way into a sink.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its digest.
    pub digest: Digest,
    /// The exact bytes.
    pub body: Bytes,
    /// The parsed view.
    pub view: Manifest,
    /// Tags to set.
    pub tags: Vec<Tag>,
}

/// A manifest that a repository lists of its own: with a tag, or a referrer, or one that nothing else names.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Type, digest and size.
    pub descriptor: Descriptor,
    /// The tag.
    pub tag: Option<Tag>,
}

/// Where content goes.
pub trait Sink: Send + Sync + 'static {
    /// Whether an index may come without its children.
    fn accepts_sparse(&self) -> bool;

    /// Where a tag points.
    fn tag(
        &self,
        repository: &RepositoryName,
        tag: &Tag,
    ) -> impl Future<Output = Result<Option<Digest>, Failure>> + Send;

    /// Whether a manifest is there.
    fn has_manifest(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Whether a blob is there. With `take`, one that lies beside the repository is put into it.
    fn has_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        take: bool,
    ) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Whether a manifest that is there is listed for its subject too. Where these are two steps, a run that was broken
    /// off between them has one without the other.
    fn lists_referrers(&self) -> bool {
        true
    }

    /// Whether a referrer is listed for its subject.
    fn has_referrer(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        referrer: &Digest,
    ) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Takes a blob in, every byte hashed. A wrong digest is [`Failure::Broken`], and nothing of it stays.
    fn put_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        content: Content,
    ) -> impl Future<Output = Result<Placed, Failure>> + Send;

    /// Takes a manifest in and sets its tags.
    fn put_manifest(
        &self,
        repository: &RepositoryName,
        arrival: Arrival,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Ends a repository. `entries` is the whole list of what stands in it by its own.
    fn finish(
        &self,
        repository: &RepositoryName,
        entries: Vec<Entry>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Is told of a repository and of how many are left.
pub type Told = Box<dyn Fn(&RepositoryName, usize) + Send + Sync>;

/// What to bring, and how.
pub struct Plans {
    /// Which repositories of the source.
    pub filter: Box<dyn Fn(&RepositoryName) -> bool + Send + Sync>,
    /// Put before every name, without a slash at its end.
    pub prefix: Option<RepositoryName>,
    /// Manifests without a tag that nothing refers to as well.
    pub untagged: bool,
    /// Count and check only, write nothing.
    pub dry_run: bool,
    /// How many blobs or manifests move at one time; 0 counts as 1.
    pub parallel: usize,
    /// Told of each repository that is done: its name and how many are left.
    pub progress: Told,
}

impl Default for Plans {
    fn default() -> Self {
        Self {
            filter: Box::new(|_| true),
            prefix: None,
            untagged: false,
            dry_run: false,
            parallel: 4,
            progress: Box::new(|_, _| ()),
        }
    }
}

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plans")
            .field("prefix", &self.prefix)
            .field("untagged", &self.untagged)
            .field("dry_run", &self.dry_run)
            .field("parallel", &self.parallel)
            .finish_non_exhaustive()
    }
}

/// Brings what `plans` asks for from `source` to `sink` and compares both.
///
/// # Errors
/// [`Failure::Fatal`] when nothing more could be done. What was brought by then stays, and the same run again goes on
/// from there. What is wrong with the source is in the report, not here.
pub async fn run<S: Source, D: Sink>(
    source: &S,
    sink: &D,
    plans: &Plans,
) -> Result<Report, Failure> {
    let mut found = source.repositories().await?;
    let state = Mutex::new(State {
        report: Report {
            dry_run: plans.dry_run,
            ..Report::default()
        },
        ..State::default()
    });
    for problem in found.problems {
        change(&state, |state| state.problem(None, problem));
    }
    found.names.retain(|name| (plans.filter)(name));
    found.names.sort();
    found.names.dedup();
    let parallel = plans.parallel.max(1);
    let job = Job {
        source,
        sink,
        plans,
        parallel,
        turns: Semaphore::new(parallel),
        state: &state,
    };
    let mut left = found.names.len();
    let mut done = stream::iter(found.names)
        .map(|name| {
            let job = &job;
            async move {
                let outcome = job.repository(&name).await;
                (name, outcome)
            }
        })
        .buffer_unordered(parallel.min(MAX_REPOSITORIES));
    while let Some((name, outcome)) = done.next().await {
        left -= 1;
        match outcome {
            Ok(()) => (plans.progress)(&name, left),
            Err(Failure::Broken(problem)) => {
                change(&state, |state| state.problem(Some(&name), problem));
            }
            Err(fatal) => return Err(fatal),
        }
    }
    drop(done);
    let mut report = state
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .report;
    report
        .problems
        .sort_by(|a, b| (&a.repository, &a.message).cmp(&(&b.repository, &b.message)));
    report
        .differences
        .sort_by(|a, b| (&a.repository, &a.what).cmp(&(&b.repository, &b.what)));
    Ok(report)
}

/// What all repositories of a run share.
struct Job<'a, S, D> {
    source: &'a S,
    sink: &'a D,
    plans: &'a Plans,
    parallel: usize,
    /// Blobs and manifests under way, over all repositories.
    turns: Semaphore,
    state: &'a Mutex<State>,
}

#[derive(Default)]
struct State {
    report: Report,
    /// Blobs that were counted, at the source and at the destination.
    counted: HashSet<Digest>,
    /// Blobs that are on their way.
    flights: HashMap<Digest, Arc<tokio::sync::Mutex<()>>>,
    arrived: HashSet<Digest>,
}

impl State {
    fn problem(&mut self, repository: Option<&RepositoryName>, message: String) {
        self.report.problems.push(Problem {
            repository: repository.cloned(),
            message,
        });
    }
}

fn change<T>(state: &Mutex<State>, action: impl FnOnce(&mut State) -> T) -> T {
    action(&mut state.lock().unwrap_or_else(PoisonError::into_inner))
}

impl<S: Source, D: Sink> Job<'_, S, D> {
    /// One repository, from its list to the comparison.
    async fn repository(&self, from: &RepositoryName) -> Result<(), Failure> {
        let into = match &self.plans.prefix {
            None => from.clone(),
            Some(prefix) => format!("{prefix}/{from}").parse().map_err(|error| {
                Failure::Broken(format!("it cannot be named `{prefix}/{from}`: {error}"))
            })?,
        };
        let contents = self.source.contents(from).await?;
        let mut plan = Plan::make(
            self.source,
            from,
            contents,
            self.plans.untagged,
            self.parallel,
        )
        .await?;
        for problem in std::mem::take(&mut plan.problems) {
            change(self.state, |state| state.problem(Some(from), problem));
        }
        if plan.is_empty() {
            return Ok(());
        }
        self.count(from, &plan);
        if self.plans.dry_run {
            return Ok(());
        }
        let order = plan.order();
        let mut known = HashMap::new();
        for group in order.chunk_by(|a, b| a.0 == b.0) {
            for part in group.chunks(PART) {
                self.blobs(from, &into, &mut plan, part, &mut known).await?;
                self.manifests(from, &into, &mut plan, part).await?;
            }
        }
        self.sink.finish(&into, plan.entries()).await?;
        self.compare(from, &into, &plan).await
    }

    /// Counts what the source holds.
    fn count(&self, from: &RepositoryName, plan: &Plan) {
        change(self.state, |state| {
            let counts = &mut state.report.source;
            counts.repositories += 1;
            counts.tags += plan.tags.len() as u64;
            counts.referrers += plan.referrers().count() as u64;
            for node in plan.nodes.values() {
                counts.manifests += 1;
                counts.bytes += node.descriptor.size;
                for blob in &node.blobs {
                    if state.counted.insert(blob.digest.clone()) {
                        counts.blobs += 1;
                        counts.bytes += blob.size;
                    }
                }
            }
            state
                .report
                .tags
                .insert(from.clone(), plan.tags.len() as u64);
        });
    }

    /// Brings the blobs that a part of the manifests names. `known` tells of each blob whether it is there.
    async fn blobs(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        plan: &mut Plan,
        part: &[(u32, Digest)],
        known: &mut HashMap<Digest, bool>,
    ) -> Result<(), Failure> {
        let mut wanted = Vec::new();
        let mut asked = HashSet::new();
        for (_, digest) in part {
            let Some(node) = plan.nodes.get(digest) else {
                continue;
            };
            for blob in &node.blobs {
                if !known.contains_key(&blob.digest) && asked.insert(blob.digest.clone()) {
                    wanted.push(blob.clone());
                }
            }
        }
        let mut moved = stream::iter(wanted)
            .map(|blob| async move {
                let outcome = self.blob(from, into, &blob).await;
                (blob, outcome)
            })
            .buffer_unordered(self.parallel);
        while let Some((blob, outcome)) = moved.next().await {
            let there = match outcome {
                Ok(()) => true,
                Err(Failure::Broken(problem)) => {
                    change(self.state, |state| state.problem(Some(from), problem));
                    false
                }
                Err(fatal) => return Err(fatal),
            };
            known.insert(blob.digest, there);
        }
        drop(moved);
        for (_, digest) in part {
            if let Some(node) = plan.nodes.get_mut(digest) {
                let lost = node
                    .blobs
                    .iter()
                    .find(|blob| known.get(&blob.digest) == Some(&false));
                if let Some(lost) = lost {
                    node.broken = Some(lost.digest.clone());
                }
            }
        }
        Ok(())
    }

    async fn blob(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        blob: &Descriptor,
    ) -> Result<(), Failure> {
        // Repositories that come at one time share blobs: the second one finds what the first one brought.
        let flight = change(self.state, |state| {
            Arc::clone(state.flights.entry(blob.digest.clone()).or_default())
        });
        let _flight = flight.lock().await;
        let outcome = self.blob_alone(from, into, blob).await;
        change(self.state, |state| state.flights.remove(&blob.digest));
        outcome
    }

    async fn blob_alone(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        blob: &Descriptor,
    ) -> Result<(), Failure> {
        // The semaphore is never closed.
        let _turn = self.turns.acquire().await.map_err(Failure::fatal)?;
        if self.sink.has_blob(into, blob, true).await? {
            change(self.state, |state| state.report.moved.skipped += 1);
            return Ok(());
        }
        let content = self.source.blob(from, blob).await?.ok_or_else(|| {
            Failure::Broken(format!("blob `{}` is missing at the source", blob.digest))
        })?;
        let placed = self.sink.put_blob(into, blob, content).await?;
        change(self.state, |state| {
            let moved = &mut state.report.moved;
            moved.bytes += blob.size;
            match placed {
                Placed::Copied => moved.copied += 1,
                Placed::Linked => moved.linked += 1,
                Placed::Reflinked => moved.reflinked += 1,
            }
        });
        Ok(())
    }

    /// Brings manifests whose children are there.
    async fn manifests(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        plan: &mut Plan,
        part: &[(u32, Digest)],
    ) -> Result<(), Failure> {
        let mut broken = Vec::new();
        for (_, digest) in part {
            let lost = plan.lost(digest, self.sink.accepts_sparse());
            if let Some(lost) = lost {
                change(self.state, |state| {
                    state.problem(
                        Some(from),
                        format!("manifest `{digest}` is skipped, it needs `{lost}`"),
                    );
                });
                broken.push((digest.clone(), lost));
            }
        }
        for (digest, lost) in broken {
            if let Some(node) = plan.nodes.get_mut(&digest) {
                node.broken = Some(lost);
            }
        }
        let nodes: Vec<&Node> = part
            .iter()
            .filter_map(|(_, digest)| plan.nodes.get(digest))
            .filter(|node| node.broken.is_none())
            .collect();
        let mut written = stream::iter(nodes)
            .map(|node| async move {
                let outcome = self.manifest(from, into, node).await;
                (node.descriptor.digest.clone(), outcome)
            })
            .buffer_unordered(self.parallel);
        let mut refused = Vec::new();
        while let Some((digest, outcome)) = written.next().await {
            match outcome {
                Ok(()) => {}
                Err(Failure::Broken(problem)) => {
                    change(self.state, |state| {
                        state.problem(Some(from), format!("manifest `{digest}`: {problem}"));
                    });
                    refused.push(digest);
                }
                Err(fatal) => return Err(fatal),
            }
        }
        drop(written);
        for digest in refused {
            if let Some(node) = plan.nodes.get_mut(&digest) {
                node.broken = Some(digest);
            }
        }
        Ok(())
    }

    async fn manifest(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        node: &Node,
    ) -> Result<(), Failure> {
        // The semaphore is never closed.
        let _turn = self.turns.acquire().await.map_err(Failure::fatal)?;
        let digest = &node.descriptor.digest;
        let mut there = self.sink.has_manifest(into, &node.descriptor).await?;
        if let Some(subject) = &node.subject
            && there
            && !self.sink.lists_referrers()
        {
            there = self.sink.has_referrer(into, subject, digest).await?;
        }
        let mut tags = Vec::new();
        for tag in &node.tags {
            if !there || self.sink.tag(into, tag).await?.as_ref() != Some(digest) {
                tags.push(tag.clone());
            }
        }
        if there && tags.is_empty() {
            return Ok(());
        }
        let body = match &node.body {
            Some(body) => body.clone(),
            None => {
                self.source
                    .manifest(from, digest)
                    .await?
                    .ok_or_else(|| Failure::Broken("it went away at the source".to_owned()))?
                    .body
            }
        };
        let view = Manifest::parse(&body, &node.descriptor.media_type)
            .map_err(|error| Failure::Broken(error.to_string()))?;
        let set = tags.len() as u64;
        self.sink
            .put_manifest(
                into,
                Arrival {
                    digest: digest.clone(),
                    body,
                    view,
                    tags,
                },
            )
            .await?;
        change(self.state, |state| {
            state.report.moved.manifests += u64::from(!there);
            state.report.moved.tags += set;
        });
        Ok(())
    }

    /// Asks the destination for everything that was planned.
    async fn compare(
        &self,
        from: &RepositoryName,
        into: &RepositoryName,
        plan: &Plan,
    ) -> Result<(), Failure> {
        let differs = |what: String, source: Option<&Digest>, destination: Option<Digest>| {
            change(self.state, |state| {
                state.report.differences.push(Difference {
                    repository: from.clone(),
                    what,
                    source: source.cloned(),
                    destination,
                });
            });
        };
        change(self.state, |state| {
            state.report.destination.repositories += 1;
        });
        for (tag, digest) in &plan.tags {
            let there = self.sink.tag(into, tag).await?;
            if there.as_ref() == Some(digest) {
                change(self.state, |state| state.report.destination.tags += 1);
            } else {
                differs(format!("tag {tag}"), Some(digest), there);
            }
        }
        for node in plan.nodes.values() {
            let digest = &node.descriptor.digest;
            if !self.sink.has_manifest(into, &node.descriptor).await? {
                differs(format!("manifest {digest}"), Some(digest), None);
                continue;
            }
            change(self.state, |state| {
                state.report.destination.manifests += 1;
                state.report.destination.bytes += node.descriptor.size;
            });
            for blob in &node.blobs {
                if change(self.state, |state| state.arrived.contains(&blob.digest)) {
                    continue;
                }
                if self.sink.has_blob(into, blob, false).await? {
                    change(self.state, |state| {
                        if state.arrived.insert(blob.digest.clone()) {
                            state.report.destination.blobs += 1;
                            state.report.destination.bytes += blob.size;
                        }
                    });
                } else {
                    differs(format!("blob {}", blob.digest), Some(&blob.digest), None);
                }
            }
        }
        for (subject, referrer) in plan.referrers() {
            if self.sink.has_referrer(into, subject, referrer).await? {
                change(self.state, |state| state.report.destination.referrers += 1);
            } else {
                differs(
                    format!("referrer {referrer} of {subject}"),
                    Some(referrer),
                    None,
                );
            }
        }
        Ok(())
    }
}

/// A file in chunks.
struct FileChunks {
    file: Arc<File>,
    at: u64,
    size: u64,
}

impl Chunks for FileChunks {
    fn next(
        &mut self,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>> {
        Box::pin(async move {
            if self.at == self.size {
                return Ok(None);
            }
            let (file, at) = (Arc::clone(&self.file), self.at);
            let length = usize::try_from((self.size - at).min(CHUNK)).unwrap_or_default();
            let chunk = blocking(move || {
                let mut buffer = vec![0; length];
                let read = file
                    .read_at(&mut buffer, at)
                    .map_err(|error| Failure::Broken(format!("a file cannot be read: {error}")))?;
                buffer.truncate(read);
                Ok(Bytes::from(buffer))
            })
            .await?;
            if chunk.is_empty() {
                return Err(Failure::Broken(
                    "a file became shorter while it was read".to_owned(),
                ));
            }
            self.at += chunk.len() as u64;
            Ok(Some(chunk))
        })
    }
}

/// Bytes in one chunk.
struct Once(Option<Bytes>);

impl Chunks for Once {
    fn next(
        &mut self,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>> {
        Box::pin(async move { Ok(self.0.take()) })
    }
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Failure::fatal(Error::Stopped)))
}

/// Parses a digest that a foreign file or directory name holds.
fn digest_of(algorithm: &str, hex: &str) -> Option<Digest> {
    format!("{algorithm}:{hex}").parse().ok()
}

/// The content of a manifest file, its digest verified.
fn verified(digest: &Digest, body: Vec<u8>, place: &str) -> Result<Bytes, Failure> {
    let actual = Digest::of(digest.algorithm(), &body);
    if actual == *digest {
        Ok(Bytes::from(body))
    } else {
        Err(Failure::Broken(format!(
            "`{place}` has digest `{actual}`, not `{digest}`"
        )))
    }
}

/// The longest manifest that is read, in bytes.
const MAX_MANIFEST: usize = 32 * 1024 * 1024;
/// Bytes of a blob that move at once.
const CHUNK: u64 = 1 << 20;
/// How many repositories are worked on at one time.
const MAX_REPOSITORIES: usize = 8;
/// How many manifests are brought between two looks at their blobs: their leases must not end before they are used.
const PART: usize = 256;

#[cfg(test)]
mod tests;
