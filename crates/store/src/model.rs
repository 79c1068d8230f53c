//! The values that go in and out of a store.

use std::time::Duration;

use bytes::Bytes;
use oci::{Descriptor, Digest, RepositoryName, Tag};

use crate::blob::s3::RemoteBlob;
use crate::clock::Timestamp;
use crate::collect::GcOptions;

/// Settings of a store.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an uploaded blob is kept without a manifest (24 h).
    pub lease: Duration,
    /// How long an upload without activity is kept (24 h).
    pub upload_expiry: Duration,
    /// How long a writer may send nothing before it loses its claim (30 s).
    pub claim_idle: Duration,
    /// How long a request waits for the end of an upload's writer on another replica (10 s).
    pub claim_wait: Duration,
    /// How long events are kept (7 days).
    pub event_retention: Duration,
    /// Blobs up to this many bytes live in their row (16 KiB).
    pub inline_limit: u64,
    /// Accept manifests and indexes whose references are missing (`storage.allow_sparse`).
    pub allow_sparse: bool,
    /// Write manifests, small blobs and tags beside the objects, so that a lost database can be made anew
    /// (`storage.exports`, on). Off: exports that are there are removed, because they would grow old.
    pub exports: bool,
    /// The collector.
    pub gc: GcOptions,
    /// Users cannot write while the data directory has fewer free bytes (the smaller of 128 MiB and 1 % of its
    /// file system).
    pub floor: Option<u64>,
    /// Bytes per second that the scrub reads (8 MiB); 0 turns it off.
    pub scrub_rate: u64,
    /// The scrub reads everything once in this time (30 days).
    pub scrub_period: Duration,
    /// Which tags are kept (all).
    pub retention: std::sync::Arc<crate::Retention>,
    /// Connections to PostgreSQL at once, at most (16). One more waits for events.
    pub database_connections: usize,
    /// Logical bytes that a namespace without a quota of its own may use (no limit).
    pub quota: Option<u64>,
    /// How long pull statistics are kept (90 days); zero keeps none.
    pub pull_retention: Duration,
    /// How long what agents reported is kept (400 days); `None` keeps it for ever.
    pub attempt_retention: Option<Duration>,
    /// What the reports of one user may come to.
    pub reports: ReportLimits,
}

/// What the pins and attempts of one user may come to: whoever may only pull must not be able to fill the store. A user's
/// are those whose holder begins with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportLimits {
    /// Holders of pins (1000).
    pub holders: u64,
    /// Pins of all of them (100 000).
    pub pins: u64,
    /// Targets that have records (1000).
    pub targets: u64,
    /// Bytes of records of all of them (1 GiB).
    pub bytes: u64,
    /// Bytes of records that are kept of one target, and at most one record more; the oldest go first (64 MiB).
    pub target_bytes: u64,
}

impl Default for ReportLimits {
    fn default() -> Self {
        Self {
            holders: 1000,
            pins: 100_000,
            targets: 1000,
            bytes: 1 << 30,
            target_bytes: 64 << 20,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            lease: Duration::from_hours(24),
            upload_expiry: Duration::from_hours(24),
            claim_idle: Duration::from_secs(30),
            claim_wait: Duration::from_secs(10),
            event_retention: Duration::from_hours(7 * 24),
            inline_limit: 16 * 1024,
            allow_sparse: false,
            exports: true,
            gc: GcOptions::default(),
            floor: None,
            scrub_rate: 8 << 20,
            scrub_period: Duration::from_hours(30 * 24),
            retention: std::sync::Arc::default(),
            database_connections: 16,
            quota: None,
            pull_retention: Duration::from_hours(90 * 24),
            attempt_retention: Some(Duration::from_hours(400 * 24)),
            reports: ReportLimits::default(),
        }
    }
}

/// Who does something and in which request; goes into tag history, events and audit rows.
#[derive(Clone, Debug)]
pub struct Actor {
    /// `user:alice`, `anonymous`, `agent:host1`.
    pub principal: String,
    /// The request id.
    pub request: String,
    /// The caller's address.
    pub address: String,
}

/// The id of an upload as it stands in `Location`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UploadId(pub String);

/// What HEAD of a blob tells.
#[derive(Clone, Debug)]
pub struct BlobInfo {
    /// Length in bytes.
    pub size: u64,
}

/// A blob open for reading: one database query was made, the bytes come from the row or one object.
#[derive(Debug)]
pub struct Blob {
    /// Length in bytes.
    pub size: u64,
    /// Where the bytes are.
    pub content: BlobContent,
}
/// Where a blob's bytes are.
#[derive(Debug)]
pub enum BlobContent {
    /// In the row.
    Inline(Bytes),
    /// In a file of exactly `size` bytes, open for reading, immutable.
    File(std::fs::File),
    /// In an object store, immutable.
    Remote(RemoteBlob),
}
/// A manifest as it was pushed.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// Its digest.
    pub digest: Digest,
    /// The media type to serve it with.
    pub media_type: String,
    /// The exact bytes.
    pub body: Bytes,
}

/// What a tag's state must be for a write to happen (compare-and-set).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Expected {
    /// Anything.
    #[default]
    Any,
    /// The tag must not exist (`If-None-Match: *`).
    Absent,
    /// The tag must point to one of these digests (`If-Match`).
    Digest(Vec<Digest>),
}

/// A manifest PUT.
#[derive(Clone, Debug)]
pub struct PutManifest {
    /// Where to.
    pub repository: RepositoryName,
    /// The digest of `body`, already verified.
    pub digest: Digest,
    /// The exact bytes.
    pub body: Bytes,
    /// The parsed view of `body`.
    pub view: oci::Manifest,
    /// Tags to set, each with what may be there and whether an existing one may be overwritten.
    pub tags: Vec<TagWrite>,
    /// Who.
    pub actor: Actor,
}
/// One tag of a PUT.
#[derive(Clone, Debug)]
pub struct TagWrite {
    /// The tag.
    pub tag: Tag,
    /// What must be there before.
    pub expected: Expected,
    /// The caller may create this tag.
    pub may_create: bool,
    /// The caller may move this tag when it points elsewhere. Setting it to the same digest needs neither right.
    pub may_overwrite: bool,
}
/// What a PUT did.
#[derive(Clone, Debug)]
pub struct PutOutcome {
    /// The subject's digest, when the manifest has one.
    pub subject: Option<Digest>,
    /// The manifest was not there before.
    pub created: bool,
    /// The event number of the commit: 0 when nothing changed, and on PostgreSQL, where the sealer gives it later.
    pub event: i64,
}
/// A tag's state.
#[derive(Clone, Debug)]
pub struct TagState {
    /// Where it points.
    pub digest: Digest,
    /// Rises with each move.
    pub generation: i64,
    /// When it moved last.
    pub updated_at: Timestamp,
}
/// One move in a tag's history.
#[derive(Clone, Debug)]
pub struct TagMove {
    /// The generation that this move made.
    pub generation: i64,
    /// The new digest; `None`: deleted.
    pub digest: Option<Digest>,
    /// Who.
    pub actor: String,
    /// When.
    pub at: Timestamp,
}
/// One referrer.
#[derive(Clone, Debug)]
pub struct Referrer {
    /// Position for paging.
    pub cursor: i64,
    /// Its descriptor with `artifactType` and annotations.
    pub descriptor: Descriptor,
}
/// What positions of the event stream exist.
#[derive(Clone, Copy, Debug)]
pub struct EventBounds {
    /// Numbers above this one are kept; resuming from a smaller one is a reset.
    pub pruned: i64,
    /// The newest number.
    pub newest: i64,
}
/// One event of the outbox.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its public number.
    pub number: i64,
    /// What happened.
    pub kind: EventKind,
    /// Where.
    pub repository: RepositoryName,
    /// The tag, for tag events.
    pub tag: Option<Tag>,
    /// The digest (of a deleted tag: what it pointed to).
    pub digest: Digest,
    /// The digest before, for a tag that moved.
    pub previous: Option<Digest>,
    /// The media type of the manifest.
    pub media_type: String,
    /// The artifact type.
    pub artifact_type: Option<String>,
    /// The subject, for a referrer.
    pub subject: Option<Digest>,
    /// Who.
    pub actor: String,
    /// When.
    pub at: Timestamp,
}
/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A manifest was pushed (its digest was new in the repository).
    ManifestPushed,
    /// A manifest was deleted.
    ManifestDeleted,
    /// A tag was created or moved.
    TagUpdated,
    /// A tag was deleted.
    TagDeleted,
    /// A repository was deleted with all that it held. The event names no manifest: its digest is that of nothing.
    RepositoryDeleted,
}
/// An audit row.
#[derive(Clone, Debug)]
pub struct AuditEntry {
    /// Who.
    pub actor: Actor,
    /// What, such as `login` or `push`.
    pub action: String,
    /// On what.
    pub target: String,
    /// `allowed`, `denied`, `failed`.
    pub outcome: String,
}
/// A key that signs tokens.
#[derive(Clone)]
pub struct TokenKey {
    /// The key id (`kid`).
    pub id: String,
    /// The secret.
    pub secret: Vec<u8>,
}

impl std::fmt::Debug for TokenKey {
    /// Never shows the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
/// Totals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Repositories.
    pub repositories: u64,
    /// Distinct blobs.
    pub blobs: u64,
    /// Their bytes.
    pub blob_bytes: u64,
    /// Manifests.
    pub manifests: u64,
    /// Their bytes.
    pub manifest_bytes: u64,
    /// Tags.
    pub tags: u64,
    /// Open uploads.
    pub uploads: u64,
    /// Objects waiting for their physical deletion.
    pub pending_deletions: u64,
    /// The distinct blobs and the manifests of each repository, in bytes: what there would be without deduplication.
    pub logical_bytes: u64,
    /// How many they are.
    pub logical_objects: u64,
    /// Blobs that no repository holds any more.
    pub waiting_blobs: u64,
    /// Their bytes, which are still stored.
    pub waiting_bytes: u64,
    /// How old these figures are.
    pub age: Duration,
}

impl Statistics {
    /// Bytes of distinct blobs and of manifests.
    pub fn stored_bytes(&self) -> u64 {
        self.blob_bytes.saturating_add(self.manifest_bytes)
    }
}

/// What `verify-store` found. Offline, or read-only beside a running server.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    /// Rows and objects looked at.
    pub blobs: u64,
    /// Bytes re-hashed.
    pub bytes: u64,
    /// Manifests whose bytes, edges and tags were checked.
    pub manifests: u64,
    /// What is wrong, one sentence each; the first ten thousand.
    pub problems: Vec<String>,
    /// How many more there are.
    pub more_problems: u64,
}
