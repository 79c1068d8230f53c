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
mod walk;

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use oci::{Descriptor, Digest, Manifest, RepositoryName, Tag};

use crate::error::Error;

pub use adopt::{Placed, Placement, StoreSink, StoreSource};
pub use distribution::Distribution;
pub use layouts::{Layouts, Shape};
pub use report::{Counts, Difference, Moved, Problem, Report};
pub use walk::{Plans, Told, run};

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

#[cfg(test)]
mod tests;
