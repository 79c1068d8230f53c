//! The one error type of this crate.

use std::path::{Path, PathBuf};

use oci::reference::Tag;
use oci::{Digest, RepositoryName};

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The blob is not in this repository.
    #[error("blob `{0}` is not in this repository")]
    BlobUnknown(Digest),
    /// The bytes of the blob were found damaged.
    #[error("blob `{0}` is damaged in this registry, push it again to heal it")]
    BlobDamaged(Digest),
    /// A manifest names the blob.
    #[error("blob `{0}` is part of a manifest of this repository, delete the manifest first")]
    BlobInUse(Digest),
    /// Something in the data directory is not what the store wrote there.
    #[error("`{path}` is damaged: {problem}")]
    Damaged {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A place given to a command is not what the command needs. Nothing was changed there.
    #[error("`{path}` cannot be used: {problem}")]
    Unusable {
        /// The file or directory.
        path: PathBuf,
        /// Why, and what to do.
        problem: String,
    },
    /// The content has another digest.
    #[error("the content has digest `{actual}`, not `{expected}`")]
    DigestMismatch {
        /// What was asked for.
        expected: Digest,
        /// What the bytes are.
        actual: Digest,
    },
    /// No such manifest or tag.
    #[error("no such manifest: `{0}`")]
    ManifestUnknown(String),
    /// An index names the manifest.
    #[error("manifest `{0}` is part of an index of this repository, delete the index first")]
    ManifestInUse(Digest),
    /// References of a manifest are not in the repository.
    #[error("the manifest names content that is not in this repository: {}", some(.0))]
    MissingReferences(Vec<Digest>),
    /// There is no such directory.
    #[error("no such directory: `{0}`")]
    NoDirectory(PathBuf),
    /// The directory holds other things than a store.
    #[error(
        "`{dir}` is not a data directory of this program (it holds `{found}`), choose an empty directory"
    )]
    NotADataDirectory {
        /// The directory.
        dir: PathBuf,
        /// What was found there.
        found: String,
    },
    /// A compare-and-set found another state (412).
    #[error("tag `{tag}` is not in the expected state, it points to {}", .actual.as_ref().map_or_else(|| "nothing".to_owned(), |d| format!("`{d}`")))]
    Precondition {
        /// The tag.
        tag: Tag,
        /// Where it points.
        actual: Option<Digest>,
    },
    /// The caller may not overwrite this tag.
    #[error("tag `{tag}` exists and may not be overwritten by this user")]
    TagImmutable {
        /// The tag.
        tag: Tag,
    },
    /// The caller may not create this tag.
    #[error("tag `{tag}` may not be created by this user")]
    TagCreateDenied {
        /// The tag.
        tag: Tag,
    },
    /// The repository has no content.
    #[error("no such repository: `{0}`")]
    RepositoryUnknown(RepositoryName),
    /// No such upload (never started, finished, cancelled or expired).
    #[error("no such upload, start it again with a POST")]
    UploadUnknown,
    /// Another writer has it.
    #[error("another request is writing this upload, which is at {offset}")]
    UploadBusy {
        /// Bytes recorded.
        offset: u64,
    },
    /// The disk is full. Nothing acknowledged is lost.
    #[error("the disk is full, free some space and try again")]
    Full,
    /// The file system takes no writes. Nothing acknowledged is lost, and reads go on.
    #[error("`{0}` is on a file system that is read-only, mount it writable and try again")]
    DiskReadOnly(PathBuf),
    /// The data directory, or the directory of a backup, is used by another process.
    #[error("directory `{0}` is in use by another process, stop it or choose another directory")]
    InUse(PathBuf),
    /// The data directory is of a newer version.
    #[error(
        "data directory `{dir}` has format {found}, this program knows up to {known}, use a newer program"
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The database failed.
    #[error("the database failed: {0}")]
    Database(String),
    /// The file system failed.
    #[error("cannot {operation} `{path}`")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The store takes no writes for now (read-only mode, a full disk, a database in recovery). Reads go on.
    #[error("the registry is read-only: {reason}")]
    ReadOnly {
        /// Why, and what ends it.
        reason: String,
    },
    /// The namespace may not grow further.
    #[error(
        "the quota of `{namespace}` is {quota} bytes and {used} are used, delete something or ask for more"
    )]
    QuotaExceeded {
        /// The first component of the repository's name.
        namespace: String,
        /// Bytes allowed.
        quota: u64,
        /// Bytes used.
        used: u64,
    },
    /// The reports of a user may not grow further.
    #[error("`{user}` has {what}, which is as much as one user may have; {advice}")]
    ReportLimit {
        /// The user that the holder's name begins with.
        user: String,
        /// How much of what.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// A compare-and-set of pins found another set (412).
    #[error("the pins of `{holder}` are not in the expected state, read them again")]
    PinsChanged {
        /// The holder.
        holder: String,
        /// The version of its set; `None`: it has none.
        version: Option<i64>,
    },
    /// A pin keeps the manifest (`I19`).
    #[error("manifest `{digest}` is pinned by {}, take the pin away first", holders.join(", "))]
    Pinned {
        /// The manifest.
        digest: Digest,
        /// Who holds the pins.
        holders: Vec<String>,
    },
    /// The database or the object store cannot be reached or does not answer rightly. Nothing acknowledged is lost.
    #[error("{what} is not available, try again: {problem}")]
    Unavailable {
        /// `the database` or `the object store`.
        what: &'static str,
        /// What it said.
        problem: String,
    },
    /// A store that is being carried from one place to another, or cannot be.
    #[error("{0}")]
    Moving(String),
    /// The store has stopped after a failure that it must not go on from.
    #[error("the store has stopped after a failure, restart the server and look at its log")]
    Stopped,
}

/// The first few of these; a manifest can name tens of thousands.
fn some(digests: &[Digest]) -> String {
    let mut text: Vec<_> = digests
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect();
    if digests.len() > SHOWN {
        text.push(format!("and {} more", digests.len() - SHOWN));
    }
    text.join(", ")
}

const SHOWN: usize = 10;
/// The problem of an object that an object store does not have.
pub(crate) const MISSING: &str = "it is missing; run `verify-store`";

impl Error {
    /// Maps a failure of the file system; a full disk or an exhausted quota is [`Error::Full`], a file system that
    /// takes no writes is [`Error::DiskReadOnly`].
    pub(crate) fn io(operation: &'static str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        if matches!(source.kind(), StorageFull | QuotaExceeded) {
            tracing::debug!(operation, path = %path.display(), "the disk is full");
            return Self::Full;
        }
        if source.kind() == ReadOnlyFilesystem {
            return Self::DiskReadOnly(path.to_owned());
        }
        Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether it says that an object is not there at all, which for a moment can be said of all of them.
    pub(crate) fn is_missing(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Damaged { problem, .. } => problem == MISSING,
            _ => false,
        }
    }

    pub(crate) fn unusable(path: &Path, problem: impl Into<String>) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}
