//! Where the bytes of blobs are: files of a data directory, or objects of an S3-compatible store.

use std::path::PathBuf;
use std::sync::Arc;

use oci::{Algorithm, Digest, Hasher};
use tokio::task::spawn_blocking;

use super::StorageKey;
use super::file_system::FileSystem;
use super::s3::{RemoteBlob, S3};
use crate::blocking::blocking;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::BlobContent;
use crate::upload::writer::digest_of_file;

/// All objects of a store. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) enum Objects {
    Directory(Arc<FileSystem>),
    S3(S3),
}

/// An object to delete, as the outbox names it.
#[derive(Clone, Debug)]
pub(crate) struct Removal {
    pub(crate) key: StorageKey,
    /// A multipart upload to abort before: its id, or nothing when one may have been created whose id nobody knows.
    pub(crate) multipart: Option<String>,
}

impl Objects {
    /// Opens an object of this size for reading. In an object store nothing is asked yet.
    pub(crate) fn read(&self, key: &StorageKey, size: u64) -> Result<BlobContent, Error> {
        match self {
            Self::Directory(files) => files.read(key, size).map(BlobContent::File),
            Self::S3(s3) => Ok(BlobContent::Remote(RemoteBlob::new(
                s3.clone(),
                key.clone(),
                size,
            ))),
        }
    }

    /// Reads a whole object of this size and computes its digest, with bounded memory.
    pub(crate) async fn digest(
        &self,
        key: &StorageKey,
        size: u64,
        algorithm: Algorithm,
    ) -> Result<Digest, Error> {
        match self.read(key, size)? {
            BlobContent::File(file) => {
                let path = self.describe(key);
                spawn_blocking(move || digest_of_file(algorithm, file))
                    .await
                    .map_err(|_| Error::Stopped)?
                    .map_err(|error| Error::io("read", &path, error))
            }
            BlobContent::Inline(bytes) => Ok(Digest::of(algorithm, &bytes)),
            BlobContent::Remote(blob) => {
                let mut stream = blob.stream(0..size).await?;
                let mut hasher = Hasher::new(algorithm);
                loop {
                    let (mut batch, mut length) = (Vec::new(), 0);
                    while length < BATCH
                        && let Some(bytes) = stream.next().await?
                    {
                        length += bytes.len();
                        batch.push(bytes);
                    }
                    if batch.is_empty() {
                        return Ok(hasher.finish());
                    }
                    hasher = spawn_blocking(move || {
                        for bytes in &batch {
                            hasher.update(bytes);
                        }
                        hasher
                    })
                    .await
                    .map_err(|_| Error::Stopped)?;
                }
            }
        }
    }

    /// How many objects a step of the outbox takes: few files, which each cost this machine something, or what one
    /// request to an object store names.
    pub(crate) fn removed_at_once(&self) -> usize {
        match self {
            Self::Directory(_) => 16,
            Self::S3(_) => 100,
        }
    }

    /// Removes objects, durably, and aborts what was on its way to become one. What is gone already is no error.
    pub(crate) async fn remove(
        &self,
        removals: Vec<Removal>,
    ) -> Vec<(StorageKey, Result<(), Error>)> {
        match self {
            Self::Directory(files) => {
                let files = Arc::clone(files);
                spawn_blocking(move || {
                    let keys = removals.into_iter().map(|removal| removal.key);
                    files.remove(keys.collect())
                })
                .await
                .unwrap_or_default()
            }
            Self::S3(s3) => {
                let mut results = Vec::with_capacity(removals.len());
                let mut keys = Vec::with_capacity(removals.len());
                for removal in removals {
                    let aborted = match removal.multipart.as_deref() {
                        None => Ok(()),
                        Some("") => s3.abort_all(&removal.key).await,
                        Some(id) => s3.abort(&removal.key, id).await,
                    };
                    failpoint("outbox.after_abort");
                    match aborted {
                        Ok(()) => keys.push(removal.key),
                        Err(error) => results.push((removal.key, Err(error))),
                    }
                }
                let removed = s3.remove(&keys).await;
                failpoint("outbox.after_remove");
                results.extend(keys.into_iter().zip(removed));
                results
            }
        }
    }

    /// Every object, and whether its name is that of an object in its place. For checking only; the store itself
    /// never lists (`I10`).
    pub(crate) async fn list(&self) -> Result<Vec<(PathBuf, Option<StorageKey>)>, Error> {
        match self {
            Self::Directory(files) => {
                let files = Arc::clone(files);
                spawn_blocking(move || files.list())
                    .await
                    .unwrap_or(Err(Error::Stopped))
            }
            Self::S3(s3) => s3.list().await,
        }
    }

    /// Whether there is any object.
    pub(crate) async fn are_some(&self) -> Result<bool, Error> {
        match self {
            Self::Directory(files) => {
                let files = Arc::clone(files);
                blocking(move || files.are_some()).await
            }
            Self::S3(s3) => s3.are_some().await,
        }
    }

    /// Whether there is an object of this key.
    pub(crate) async fn is_there(&self, key: &StorageKey) -> Result<bool, Error> {
        match self {
            Self::Directory(files) => {
                let path = files.path(key);
                blocking(move || {
                    path.try_exists()
                        .map_err(|error| Error::io("read", &path, error))
                })
                .await
            }
            Self::S3(s3) => Ok(s3.size(key).await?.is_some()),
        }
    }

    /// Where an object is, for messages.
    pub(crate) fn describe(&self, key: &StorageKey) -> PathBuf {
        match self {
            Self::Directory(files) => files.path(key),
            Self::S3(s3) => s3.describe(key),
        }
    }

    /// The files, where objects are files.
    pub(crate) fn files(&self) -> Option<&Arc<FileSystem>> {
        match self {
            Self::Directory(files) => Some(files),
            Self::S3(_) => None,
        }
    }
}

/// Bytes that are hashed at once.
const BATCH: usize = 1 << 20;
