//! The walk of one run: repositories beside one another, and in each blobs before manifests and children before what
//! names them.
//!
//! A blob that several repositories need moves once: who comes second waits for the first and then asks the destination.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::stream::{self, StreamExt as _};
use oci::{Descriptor, Digest, Manifest, RepositoryName};
use tokio::sync::Semaphore;

use super::plan::{Node, Plan};
use super::{Arrival, Difference, Failure, Placed, Problem, Report, Sink, Source};

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

/// How many repositories are worked on at one time.
const MAX_REPOSITORIES: usize = 8;
/// How many manifests are brought between two looks at their blobs: their leases must not end before they are used.
const PART: usize = 256;
