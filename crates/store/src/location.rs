//! Where a store keeps what it has. Database and objects are chosen each for itself; everything else is one
//! code path.

use std::path::PathBuf;

/// Where a store keeps what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The metadata.
    pub database: DatabaseLocation,
    /// The bytes of blobs.
    pub objects: ObjectLocation,
}

impl Location {
    /// The embedded store: everything in one data directory.
    pub fn embedded(directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        Self {
            database: DatabaseLocation::Sqlite(directory.clone()),
            objects: ObjectLocation::Directory(directory),
        }
    }
}

/// Where the metadata is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// `meta.db` in this data directory.
    Sqlite(PathBuf),
    /// A connection string (`postgres://user:password@host[,host2]/database?…`). It may hold a password, so it is
    /// never printed.
    Postgres(String),
}

impl std::fmt::Debug for DatabaseLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(directory) => f.debug_tuple("Sqlite").field(directory).finish(),
            Self::Postgres(_) => f.write_str("Postgres(…)"),
        }
    }
}

/// Where the bytes of blobs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectLocation {
    /// Files below `o/` of this data directory.
    Directory(PathBuf),
    /// Objects of an S3-compatible store.
    S3(S3Location),
}

/// A bucket of an S3-compatible store. Credentials come from the `AWS_*` variables, the shared credentials file, or
/// the identity of the instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Location {
    /// The bucket.
    pub bucket: String,
    /// Put before every key, without slashes at its ends; may be empty.
    pub prefix: String,
    /// The URL of the store; `None` is that of AWS for the region.
    pub endpoint: Option<String>,
    /// The region; `us-east-1` when nothing names one.
    pub region: Option<String>,
    /// Address the bucket in the path, not in the host name.
    pub path_style: bool,
}
