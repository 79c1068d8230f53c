//! The metadata database and the blob store: uploads, manifests, tags, leases, events, audit.
//!
//! The key decision: **the database is the only truth**. Blobs are opaque, immutable objects under random keys
//! that are never used twice, and the database maps digests to keys. An object has a row before its first byte
//! and until after its deletion (`I6`), so nothing is ever listed to find out what exists, a start costs the same
//! at any size (`I10`), and a collector and a repeated push can never meet on one name (`I5`).
//!
//! An answer leaves after the COMMIT that makes it true. Bytes are durable before the row that tells of them; a
//! failed sync is never repeated as if nothing had happened: the upload it belongs to is expired, and when it is the
//! database's own the store stops ([`Error::Stopped`], [`Store::stopped`]).
//!
//! One small SQL layer serves SQLite, which the embedded mode uses, and PostgreSQL: every statement is written once,
//! in the room that owns its table. Reads write nothing.
//!
//! What nothing keeps any more goes while everything else goes on ([`GcOptions`]). The store knows no HTTP, judges no rights, and parses no manifest: callers pass the
//! parsed view beside the exact bytes.

mod adopt;
mod attempt;
mod audit;
mod backup;
mod blob;
mod blocking;
mod clock;
mod collect;
mod directory;
mod error;
mod event;
mod export;
mod failpoint;
mod identity;
pub mod import;
mod lease;
mod location;
mod manifest;
mod meta;
mod mode;
mod model;
mod pin;
mod pull;
mod referrer;
mod reindex;
mod repository;
mod retention;
mod scrub;
mod sql;
mod store;
mod tag;
pub mod transfer;
mod upload;
mod usage;
mod verify;

pub use adopt::{AdoptOptions, Adopted, adopt};
pub use attempt::{AttemptFilter, AttemptRecord, AttemptsOutcome, KeptAttempt, LedgerHead};
pub use backup::once::{BackupMade, backup};
pub use backup::restore::{BackupReport, Restored, restore, verify_backup};
pub use backup::{BackupLine, BackupList, BackupOptions, BackupStatus, list_backups};
pub use blob::s3::{RemoteBlob, RemoteStream};
pub use clock::Timestamp;
pub use collect::{
    CollectionStatus, CollectionTotals, DryRun, DryRunItem, GcOptions, Kept, Kind, OutboxLength,
    QueueLag, QueueLength, Reason, Window, WindowError,
};
pub use directory::require_apart;
pub use error::Error;
pub use location::{
    DatabaseLocation, Location, ObjectLocation, S3Credentials, S3Location, is_postgres,
};
pub use mode::{Commanded, Mode};
pub use model::{
    Actor, AuditEntry, Blob, BlobContent, BlobInfo, Event, EventBounds, EventKind, Expected,
    Options, PutManifest, PutOutcome, Referrer, ReportLimits, Statistics, StoredManifest, TagMove,
    TagState, TagWrite, TokenKey, UploadId, VerifyReport,
};
pub use pin::{ExpectedPins, HeldPin, Pin, PinHolder, PinOutcome, PinSet};
pub use pull::Pulls;
pub use reindex::{ReindexProgress, Reindexed, reindex, reindex_at};
pub use retention::{
    Keep, Pattern, Policy, Retention, RetentionDecision, RetentionRun, Undone, Verdict,
};
pub use scrub::{DamagedManifest, ScrubCounters, ScrubStatus, Suspect};
pub use store::Store;
pub use upload::writer::UploadWriter;
pub use usage::{NamespaceUsage, RepositoryUsage, StoredUsage, UsageOrder};
pub use verify::{
    VerifyOptions, VerifyProgress, verify_at, verify_audit, verify_audit_at, verify_store,
};

/// The names of all failpoints, in the order in which a push passes them. They kill the process only in a build
/// with the feature `failpoints` (`LONGSHORE_FAILPOINT=name[:n]`).
pub fn failpoints() -> &'static [&'static str] {
    failpoint::NAMES
}

/// The names of the failpoints that are passed only where objects are in an object store.
pub fn object_store_failpoints() -> &'static [&'static str] {
    failpoint::OBJECT_STORE_NAMES
}

/// Every statement of the store with the engines it has run on in this process (SQLite, PostgreSQL), so that
/// the contract tests can show that none was left out.
#[doc(hidden)]
pub fn statement_coverage() -> Vec<(&'static str, bool, bool)> {
    sql::registry()
        .map(|statement| {
            let (sqlite, postgres) = statement.ran();
            (statement.name, sqlite, postgres)
        })
        .collect()
}
