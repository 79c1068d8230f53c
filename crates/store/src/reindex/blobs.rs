//! The bytes: each object is read once and its digest says what it is; small blobs come out of the exports.
//!
//! A blob is put in with no holder and is a candidate of the collector from the start: what no manifest comes to name
//! goes after a lease. Two objects of one digest are one blob; the second goes to the outbox.
//!
//! An object that went away, or is not what it was, is told of and left out. One that cannot be read now, because the
//! store or the disk fails, ends the run without a database: a later one finds it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest};
use tokio::task::JoinSet;

use super::index::Index;
use super::{ADD_BLOB, BATCH, Progress, ReindexProgress, Reindexed};
use crate::blob::StorageKey;
use crate::blob::objects::Objects;
use crate::blob::s3::pause;
use crate::collect::{self, Kind};
use crate::error::Error;
use crate::export::record::Record;
use crate::export::shelf::Shelf;
use crate::sql::{Body, Db, Tx, WriteKind};

/// Reads every object once and makes its blob.
pub(super) async fn add_objects(
    db: &Db,
    objects: Objects,
    index: &Index,
    lease: Duration,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let listed = objects.list().await?;
    let of = listed.len() as u64;
    let (send, mut receive) = tokio::sync::mpsc::channel(64);
    let todo = Arc::new(Mutex::new(listed.into_iter()));
    let other = Arc::new(index.other.clone());
    let threads = std::thread::available_parallelism().map_or(2, NonZero::get);
    let mut readers = JoinSet::new();
    for _ in 0..threads {
        let (todo, send, other) = (Arc::clone(&todo), send.clone(), Arc::clone(&other));
        let objects = objects.clone();
        readers.spawn(async move {
            loop {
                let next = todo.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((path, key)) = next else { return };
                let found = identify(&objects, path, key, &other).await;
                if send.send(found).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(send);
    let mut done = 0;
    let mut batch = Vec::new();
    loop {
        let found = receive.recv().await;
        let last = found.is_none();
        match found {
            Some(Ok(Ok(object))) => batch.push(object),
            Some(Ok(Err(problem))) => report.problems.push(problem),
            // What cannot be read now is not lost: a database without it would say so for good.
            Some(Err(error)) => return Err(error),
            None => {}
        }
        if batch.len() >= BATCH || (last && !batch.is_empty()) {
            let objects = std::mem::take(&mut batch);
            report.bytes += objects.iter().map(|object| object.size).sum::<u64>();
            let objects = objects.into();
            report.objects += db.write(AddObjects { objects, lease }).await?;
        }
        if last {
            return Ok(());
        }
        done += 1;
        progress(ReindexProgress {
            step: "objects",
            done,
            of,
        });
    }
}

#[derive(Debug)]
struct Object {
    key: StorageKey,
    digest: Digest,
    size: u64,
}

/// An object, or the sentence that says why it is none. An error is a failure that may pass.
async fn identify(
    objects: &Objects,
    path: PathBuf,
    key: Option<StorageKey>,
    other: &HashSet<Digest>,
) -> Result<Result<Object, String>, Error> {
    let Some(key) = key else {
        return Ok(Err(format!("`{}` is no object", path.display())));
    };
    let mut attempt = 0;
    loop {
        let error = match name(objects, &path, &key, other).await {
            Ok((digest, size)) => return Ok(Ok(Object { key, digest, size })),
            Err(error) => error,
        };
        if pause(attempt).await {
            attempt += 1;
            continue;
        }
        return if error.is_missing() || matches!(error, Error::Damaged { .. }) {
            Ok(Err(format!(
                "object `{}` cannot be read: {}",
                path.display(),
                crate::backup::chain(&error)
            )))
        } else {
            Err(error)
        };
    }
}

/// The digest of an object: the one that manifests name it by, else the usual one.
async fn name(
    objects: &Objects,
    path: &Path,
    key: &StorageKey,
    other: &HashSet<Digest>,
) -> Result<(Digest, u64), Error> {
    let size = match objects {
        Objects::Directory(files) => std::fs::metadata(files.path(key))
            .map_err(|error| Error::io("look at", path, error))?
            .len(),
        Objects::S3(s3) => s3
            .size(key)
            .await?
            .ok_or_else(|| Error::damaged(path, "it went away"))?,
    };
    if !other.is_empty() {
        let long = objects.digest(key, size, Algorithm::Sha512).await?;
        if other.contains(&long) {
            return Ok((long, size));
        }
    }
    let digest = objects.digest(key, size, Algorithm::Sha256).await?;
    Ok((digest, size))
}

struct AddObjects {
    objects: Arc<[Object]>,
    lease: Duration,
}

impl Body for AddObjects {
    type Output = u64;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<u64, Error> {
        let now = tx.now();
        let until = now.plus(self.lease);
        let mut kept = 0;
        for object in self.objects.iter() {
            let id = tx.id();
            let body: Option<&[u8]> = None;
            let added = tx
                .query_opt(
                    &ADD_BLOB,
                    &[
                        id.into(),
                        (&object.digest).into(),
                        object.size.into(),
                        body.into(),
                        object.key.as_str().into(),
                        now.into(),
                    ],
                )
                .await?;
            if added.is_some() {
                // What nothing comes to hold is collected after a lease.
                collect::enqueue(tx, Kind::Blob, 0, id, until);
                kept += 1;
            } else {
                collect::discard(tx, object.key.as_str(), until).await?;
            }
        }
        Ok(kept)
    }
}

/// Adds the blobs whose bytes are in the exports.
pub(super) async fn add_small_blobs(
    db: &Db,
    shelf: &Shelf,
    index: &Index,
    lease: Duration,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let of = index.blobs.len() as u64;
    let mut by_part: BTreeMap<usize, HashMap<usize, &Digest>> = BTreeMap::new();
    for (digest, line) in &index.blobs {
        by_part
            .entry(line.part)
            .or_default()
            .insert(line.line, digest);
    }
    let mut done = 0;
    for (part, lines) in by_part {
        let mut batch = Vec::new();
        for (line, record) in index.records(shelf, part).await?.into_iter().enumerate() {
            let (Some(digest), Record::Blob { body, .. }) = (lines.get(&line), record) else {
                continue;
            };
            done += 1;
            match hex::decode(&body) {
                Ok(body) if digest.matches(&body) => {
                    batch.push(((*digest).clone(), Bytes::from(body)));
                }
                _ => report
                    .problems
                    .push(format!("the bytes of blob `{digest}` are damaged")),
            }
            if batch.len() >= BATCH {
                let blobs = std::mem::take(&mut batch).into();
                report.small_blobs += db.write(AddSmall { blobs, lease }).await?;
            }
        }
        let blobs = batch.into();
        report.small_blobs += db.write(AddSmall { blobs, lease }).await?;
        progress(ReindexProgress {
            step: "blobs",
            done,
            of,
        });
    }
    Ok(())
}

struct AddSmall {
    blobs: Arc<[(Digest, Bytes)]>,
    lease: Duration,
}

impl Body for AddSmall {
    type Output = u64;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<u64, Error> {
        let now = tx.now();
        let until = now.plus(self.lease);
        let mut added = 0;
        for (digest, body) in self.blobs.iter() {
            let id = tx.id();
            let key: Option<&str> = None;
            let fresh = tx
                .query_opt(
                    &ADD_BLOB,
                    &[
                        id.into(),
                        digest.into(),
                        body.len().into(),
                        Some(body.as_ref()).into(),
                        key.into(),
                        now.into(),
                    ],
                )
                .await?;
            if fresh.is_some() {
                collect::enqueue(tx, Kind::Blob, 0, id, until);
                added += 1;
            }
        }
        Ok(added)
    }
}
