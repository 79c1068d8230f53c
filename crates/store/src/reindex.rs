//! A new database from objects and exports, when the old one is lost.
//!
//! Objects carry no names: each is read once, and its digest says what it is. Exports ([`crate::export`]) say which
//! manifests and tags there were and hold the small blobs. Everything is put in through the doors that a push uses, so
//! the edges, referrers, leases and usage of the new database are those of a store that was pushed to.
//!
//! What no export tells of cannot be found again: pins, quotas, the audit record, the history of tags before their last
//! move, uploads, and blobs that no manifest names (a repository no longer holds them; the collector takes them after a
//! lease). A new database has a new epoch, so readers of events look at everything again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest, Manifest, RepositoryName, Tag, media_type as types};
use tokio::task::JoinSet;

use crate::blob::StorageKey;
use crate::blob::file_system::{FileSystem, sync_directory};
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::clock::Timestamp;
use crate::collect::{self, Kind};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::export::record::{self, Record};
use crate::export::shelf::{Name, Shelf};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::model::{Actor, Options, PutManifest};
use crate::sql::{Body, Context, Db, Tx, WriteKind, statements};
use crate::{audit, lease, manifest, meta, referrer, repository};

statements! {
    ADD_BLOB = "INSERT INTO blob (id, digest, size, body, storage_key, state, created_at) \
                VALUES ($1, $2, $3, $4, $5, 'ok', $6) ON CONFLICT (digest) DO NOTHING RETURNING id";
    BLOB = "SELECT id, size FROM blob WHERE digest = $1";
    IDENTIFY = "SELECT id, media_type, body FROM manifest WHERE repository_id = $1 AND digest = $2";
    PUSHED_AT = "UPDATE manifest SET created_at = $3 WHERE repository_id = $1 AND digest = $2";
    ADD_TAG = "INSERT INTO tag (repository_id, name, manifest_id, generation, updated_at, updated_by) \
               VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (repository_id, name) DO NOTHING";
    ADD_HISTORY = "INSERT INTO tag_event (repository_id, name, generation, digest, actor, request, at) \
                   VALUES ($1, $2, $3, $4, $5, '', $6) ON CONFLICT (repository_id, name, generation) DO NOTHING";
    FORGET_EVENTS = "DELETE FROM event";
    PRUNED = "UPDATE counter SET value = (SELECT n.value FROM counter n WHERE n.name = 'event') \
              WHERE name = 'event_pruned'";
    FORGET_AUDIT = "DELETE FROM audit WHERE sequence IS NULL";
    ANY_REPOSITORY = "SELECT id FROM repository LIMIT 1";
}

/// What was found again.
#[derive(Clone, Debug, Default)]
pub struct Reindexed {
    /// Blobs with an object, and their bytes.
    pub objects: u64,
    /// Bytes that were hashed.
    pub bytes: u64,
    /// Blobs out of exports.
    pub small_blobs: u64,
    /// Repositories.
    pub repositories: u64,
    /// Manifests.
    pub manifests: u64,
    /// Tags.
    pub tags: u64,
    /// The newest moment that the exports tell of.
    pub newest: Option<Timestamp>,
    /// What could not be found again, one sentence each.
    pub problems: Vec<String>,
}

/// How far a reindex is.
#[derive(Clone, Copy, Debug)]
pub struct ReindexProgress {
    /// What is being done: `objects`, `blobs`, `manifests`, `tags`.
    pub step: &'static str,
    /// How many are done.
    pub done: u64,
    /// Of how many.
    pub of: u64,
}

/// Makes a new database for the data directory `data`, whose database is lost. It is visible when it is whole; when the
/// program is interrupted, the next one begins again.
///
/// # Errors
/// [`Error::Unusable`] when the directory has a database or no objects; [`Error::InUse`]; [`Error::Io`],
/// [`Error::Full`], [`Error::Database`]. What cannot be found again is in the report.
pub async fn reindex(
    data: &Path,
    options: &Options,
    progress: impl Fn(ReindexProgress) + Send + Sync + 'static,
) -> Result<Reindexed, Error> {
    reindex_at(&Location::embedded(data), options, progress).await
}

/// The same for a store whose database is elsewhere: the database is empty, and no replica runs.
///
/// # Errors
/// As [`reindex`]; [`Error::Database`] when the database holds repositories; [`Error::Unavailable`] when it cannot be
/// reached.
pub async fn reindex_at(
    location: &Location,
    options: &Options,
    progress: impl Fn(ReindexProgress) + Send + Sync + 'static,
) -> Result<Reindexed, Error> {
    let url = match &location.database {
        DatabaseLocation::Sqlite(data) => {
            let (objects, shelf) = match &location.objects {
                ObjectLocation::Directory(root) => {
                    let files = FileSystem::open(directory::objects(root));
                    let objects = Objects::Directory(Arc::new(files));
                    (objects, Shelf::of_directory(root))
                }
                ObjectLocation::S3(bucket) => {
                    let s3 = S3::connect(bucket).await?;
                    (Objects::S3(s3.clone()), Shelf::S3(s3))
                }
            };
            return embedded(data, objects, &shelf, options, Arc::new(progress)).await;
        }
        DatabaseLocation::Postgres(url) => url,
    };
    let (objects, shelf, _lock) = match &location.objects {
        ObjectLocation::Directory(data) => {
            let root = data.clone();
            let lock = blocking(move || Directory::open_objects(&root)).await?;
            let files = FileSystem::open(directory::objects(data));
            let objects = Objects::Directory(Arc::new(files));
            (objects, Shelf::of_directory(data), Some(lock))
        }
        ObjectLocation::S3(bucket) => {
            let s3 = S3::connect(bucket).await?;
            (Objects::S3(s3.clone()), Shelf::S3(s3), None)
        }
    };
    let db = Db::open_postgres(url, options.database_connections, Context::new()).await?;
    let built = build(&db, objects, &shelf, options, Arc::new(progress)).await;
    db.close().await?;
    built
}

/// Builds beside the name of the database, and gives it the name when it is whole.
async fn embedded(
    data: &Path,
    objects: Objects,
    shelf: &Shelf,
    options: &Options,
    progress: Progress,
) -> Result<Reindexed, Error> {
    let data = data.to_owned();
    let scratch = data.join(SCRATCH);
    let (root, target) = (data.clone(), scratch.clone());
    let here = objects.files().is_some();
    let (directory, db) = blocking(move || {
        let directory = Directory::open_without_database(&root, here)?;
        remove_database(&target)?;
        let db = Db::open_sqlite(&target, true, Context::new())?;
        Ok((directory, db))
    })
    .await?;
    let built = build(&db, objects, shelf, options, progress).await;
    db.close().await?;
    drop(db);
    let report = built?;
    blocking(move || {
        // The log is folded by the close.
        for end in ["-wal", "-shm"] {
            remove(&with(&scratch, end))?;
        }
        std::fs::File::open(&scratch)
            .and_then(|file| file.sync_all())
            .map_err(|error| Error::io("sync", &scratch, error))?;
        let name = directory::database(&data);
        // A log of the lost database would be taken for that of the new one.
        for end in ["-wal", "-shm"] {
            remove(&with(&name, end))?;
        }
        sync_directory(&data)?;
        std::fs::rename(&scratch, &name).map_err(|error| Error::io("rename", &scratch, error))?;
        sync_directory(&data)?;
        directory.finish()
    })
    .await?;
    Ok(report)
}

/// Fills an empty database.
async fn build(
    db: &Db,
    objects: Objects,
    shelf: &Shelf,
    options: &Options,
    progress: Progress,
) -> Result<Reindexed, Error> {
    let mut report = Reindexed::default();
    meta::epoch(db).await?;
    if !db.scan(&ANY_REPOSITORY, Vec::new()).await?.is_empty() {
        return Err(Error::Database(
            "the database holds repositories, so it is not lost".to_owned(),
        ));
    }
    let index = Index::read(shelf, &mut report).await?;
    add_objects(db, objects, &index, options.lease, &progress, &mut report).await?;
    add_small_blobs(db, shelf, &index, options.lease, &progress, &mut report).await?;
    add_manifests(db, shelf, &index, options.lease, &progress, &mut report).await?;
    add_tags(db, &index, &progress, &mut report).await?;
    db.write(Finish(format!(
        "{} manifests, {} tags, {} problems",
        report.manifests,
        report.tags,
        report.problems.len()
    )))
    .await?;
    Ok(report)
}

type Progress = Arc<dyn Fn(ReindexProgress) + Send + Sync>;

/// Where a record stands in the exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    part: usize,
    line: usize,
}

/// A move of a tag.
#[derive(Clone, Debug)]
struct Move {
    digest: Option<Digest>,
    generation: i64,
    by: String,
    at: i64,
}

/// What the exports tell of, without the bytes.
#[derive(Default)]
struct Index {
    parts: Vec<Name>,
    blobs: HashMap<Digest, Line>,
    manifests: BTreeMap<RepositoryName, HashMap<Digest, Line>>,
    tags: BTreeMap<RepositoryName, BTreeMap<Tag, Vec<Move>>>,
    /// Blobs that manifests name by another algorithm than the usual one.
    other: HashSet<Digest>,
}

impl Index {
    /// Reads the newest whole set, and what came after it.
    async fn read(shelf: &Shelf, report: &mut Reindexed) -> Result<Self, Error> {
        let names = shelf.list().await?;
        let mut sets: BTreeMap<u64, Vec<Name>> = BTreeMap::new();
        for name in names {
            sets.entry(name.set).or_default().push(name);
        }
        if sets.is_empty() {
            report.problems.push(
                "there are no exports, so only the bytes of blobs are found again".to_owned(),
            );
            return Ok(Self::default());
        }
        // From the newest set back to one that is whole. What is newer and not whole is later and true as well.
        let mut chosen = Vec::new();
        let mut whole = false;
        for (_, names) in sets.into_iter().rev() {
            whole = holds_whole(shelf, &names).await?;
            chosen.splice(0..0, names);
            if whole {
                break;
            }
        }
        if !whole {
            report.problems.push(
                "no set of exports is whole, so some manifests and tags may be missing".to_owned(),
            );
        }
        let mut index = Self::default();
        let mut before: Option<(u64, u64)> = None;
        for name in chosen {
            if let Some((set, part)) = before
                && set == name.set
                && name.part > part + 1
            {
                report.problems.push(format!(
                    "parts {} to {} of set {set} of the exports are missing",
                    part + 1,
                    name.part - 1
                ));
            }
            before = Some((name.set, name.part));
            let records = match record::read(&shelf.get(&name).await?) {
                Ok(records) => records,
                Err(problem) => {
                    report
                        .problems
                        .push(format!("part `{}` of the exports: {problem}", name.text()));
                    continue;
                }
            };
            let part = index.parts.len();
            for (line, record) in records.into_iter().enumerate() {
                if let Err(error) = index.take(&record, Line { part, line }, report) {
                    report
                        .problems
                        .push(format!("part `{}` of the exports: {error}", name.text()));
                }
            }
            index.parts.push(name);
        }
        Ok(index)
    }

    fn take(&mut self, record: &Record, at: Line, report: &mut Reindexed) -> Result<(), Error> {
        match record {
            Record::Blob { digest, .. } => {
                self.blobs.insert(parse(digest)?, at);
            }
            Record::Manifest {
                repository,
                digest,
                at: time,
                body,
                media_type,
                ..
            } => {
                if let Some(body) = body.as_ref().filter(|body| body.contains("sha512:"))
                    && let Ok(view) = Manifest::parse(body.as_bytes(), media_type)
                {
                    let named = view.blobs().chain(view.children());
                    let digests = named.map(|entry| entry.digest.clone());
                    self.other
                        .extend(digests.filter(|digest| digest.algorithm() != Algorithm::Sha256));
                }
                self.manifests
                    .entry(parse(repository)?)
                    .or_default()
                    .insert(parse(digest)?, at);
                report.newest = report.newest.max(Some(Timestamp(*time)));
            }
            Record::Tag {
                repository,
                tag,
                digest,
                generation,
                by,
                at: time,
            } => {
                let digest = digest.as_deref().map(parse).transpose()?;
                self.tags
                    .entry(parse(repository)?)
                    .or_default()
                    .entry(parse(tag)?)
                    .or_default()
                    .push(Move {
                        digest,
                        generation: *generation,
                        by: by.clone(),
                        at: *time,
                    });
                report.newest = report.newest.max(Some(Timestamp(*time)));
            }
            Record::Gone { repository, digest } => {
                if let Some(held) = self.manifests.get_mut(&parse(repository)?) {
                    held.remove(&parse(digest)?);
                }
            }
            Record::Dropped { repository } => {
                let repository = parse(repository)?;
                self.manifests.remove(&repository);
                self.tags.remove(&repository);
            }
            Record::Set { .. } | Record::Whole { .. } | Record::End { .. } => {}
        }
        Ok(())
    }
}

async fn holds_whole(shelf: &Shelf, names: &[Name]) -> Result<bool, Error> {
    for name in names {
        if let Ok(records) = record::read(&shelf.get(name).await?)
            && records
                .iter()
                .any(|record| matches!(record, Record::Whole { .. }))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, Error> {
    text.parse()
        .map_err(|_| Error::Database(format!("`{text}` is no name or digest")))
}

/// Reads every object once and makes its blob.
async fn add_objects(
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
            Some(Ok(object)) => batch.push(object),
            Some(Err(problem)) => report.problems.push(problem),
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

/// The digest of an object: the one that manifests name it by, else the usual one.
async fn identify(
    objects: &Objects,
    path: PathBuf,
    key: Option<StorageKey>,
    other: &HashSet<Digest>,
) -> Result<Object, String> {
    let Some(key) = key else {
        return Err(format!("`{}` is no object", path.display()));
    };
    let named = async {
        let size = match objects {
            Objects::Directory(files) => std::fs::metadata(files.path(&key))
                .map_err(|error| Error::io("look at", &path, error))?
                .len(),
            Objects::S3(s3) => s3
                .size(&key)
                .await?
                .ok_or_else(|| Error::damaged(&path, "it went away"))?,
        };
        if !other.is_empty() {
            let long = objects.digest(&key, size, Algorithm::Sha512).await?;
            if other.contains(&long) {
                return Ok((long, size));
            }
        }
        let digest = objects.digest(&key, size, Algorithm::Sha256).await?;
        Ok((digest, size))
    };
    match named.await {
        Ok((digest, size)) => Ok(Object { key, digest, size }),
        Err(error) => {
            let error: Error = error;
            Err(format!(
                "object `{}` cannot be read: {}",
                path.display(),
                crate::backup::chain(&error)
            ))
        }
    }
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
async fn add_small_blobs(
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

impl Index {
    async fn records(&self, shelf: &Shelf, part: usize) -> Result<Vec<Record>, Error> {
        let Some(name) = self.parts.get(part) else {
            return Ok(Vec::new());
        };
        record::read(&shelf.get(name).await?)
            .map_err(|problem| Error::Database(format!("part `{}`: {problem}", name.text())))
    }
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

/// A manifest out of an export.
struct Found {
    repository: RepositoryName,
    digest: Digest,
    view: Manifest,
    body: Bytes,
    by: String,
    at: i64,
}

/// Puts the manifests in, with holds on the blobs that they name.
async fn add_manifests(
    db: &Db,
    shelf: &Shelf,
    index: &Index,
    lease: Duration,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let mut by_part: BTreeMap<usize, HashSet<usize>> = BTreeMap::new();
    let mut of = 0;
    for line in index.manifests.values().flat_map(HashMap::values) {
        by_part.entry(line.part).or_default().insert(line.line);
        of += 1;
    }
    for (part, lines) in by_part {
        let mut batch = Vec::new();
        for (line, record) in index.records(shelf, part).await?.into_iter().enumerate() {
            if !lines.contains(&line) {
                continue;
            }
            match found(record) {
                Ok(found) => {
                    note_missing_children(index, &found, report);
                    batch.push(found);
                }
                Err(problem) => report.problems.push(problem),
            }
            if batch.len() >= BATCH {
                let manifests = std::mem::take(&mut batch).into();
                put(db, AddManifests { manifests, lease }, report).await?;
            }
        }
        let manifests = batch.into();
        put(db, AddManifests { manifests, lease }, report).await?;
        progress(ReindexProgress {
            step: "manifests",
            done: report.manifests,
            of,
        });
    }
    report.repositories = index
        .manifests
        .values()
        .filter(|held| !held.is_empty())
        .count() as u64;
    Ok(())
}

async fn put(db: &Db, body: AddManifests, report: &mut Reindexed) -> Result<(), Error> {
    report.manifests += body.manifests.len() as u64;
    report.problems.extend(db.write(body).await?);
    Ok(())
}

fn found(record: Record) -> Result<Found, String> {
    let Record::Manifest {
        repository,
        digest,
        media_type,
        body,
        hex,
        by,
        at,
    } = record
    else {
        return Err("a record of the exports is another one than before".to_owned());
    };
    let name = format!("manifest `{repository}@{digest}`");
    let bytes = match (body, hex) {
        (Some(text), _) => text.into_bytes(),
        (None, hex) => hex::decode(hex.unwrap_or_default()).unwrap_or_default(),
    };
    let digest: Digest = parse(&digest).map_err(|error| format!("{name}: {error}"))?;
    if !digest.matches(&bytes) {
        return Err(format!("the bytes of {name} are damaged"));
    }
    let view = Manifest::parse(&bytes, &media_type)
        .map_err(|error| format!("{name} cannot be read: {error}"))?;
    Ok(Found {
        repository: parse(&repository).map_err(|error| format!("{name}: {error}"))?,
        digest,
        view,
        body: bytes.into(),
        by,
        at,
    })
}

fn note_missing_children(index: &Index, found: &Found, report: &mut Reindexed) {
    let held = index.manifests.get(&found.repository);
    for child in found.view.children() {
        if types::is_manifest(&child.media_type)
            && !held.is_some_and(|held| held.contains_key(&child.digest))
        {
            report.problems.push(format!(
                "index `{}@{}` names `{}`, which is lost",
                found.repository.as_str(),
                found.digest,
                child.digest
            ));
        }
    }
}

struct AddManifests {
    manifests: Arc<[Found]>,
    lease: Duration,
}

impl Body for AddManifests {
    type Output = Vec<String>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<String>, Error> {
        let mut problems = Vec::new();
        for found in self.manifests.iter() {
            let place = repository::ensure(tx, &found.repository).await?;
            let blobs = found.view.blobs().map(|blob| (blob, !blob.is_foreign()));
            // An index may name content that is no manifest; then it is a blob.
            let others = found
                .view
                .children()
                .filter(|child| !types::is_manifest(&child.media_type))
                .map(|child| (child, false));
            for (entry, needed) in blobs.chain(others) {
                match tx.query_opt(&BLOB, &[(&entry.digest).into()]).await? {
                    Some(row) => {
                        lease::grant(
                            tx,
                            place,
                            &entry.digest,
                            row.i64(0)?,
                            row.u64(1)?,
                            self.lease,
                            &found.by,
                        )
                        .await?;
                    }
                    None if needed => problems.push(format!(
                        "manifest `{}@{}` names blob `{}`, whose bytes are lost; push it again",
                        found.repository.as_str(),
                        found.digest,
                        entry.digest
                    )),
                    None => {}
                }
            }
            let put = manifest::Put {
                put: Arc::new(PutManifest {
                    repository: found.repository.clone(),
                    digest: found.digest.clone(),
                    body: found.body.clone(),
                    view: found.view.clone(),
                    tags: Vec::new(),
                    actor: Actor {
                        principal: found.by.clone(),
                        request: String::new(),
                        address: String::new(),
                    },
                }),
                lease: self.lease,
                allow_sparse: true,
            };
            put.run(tx).await?;
            tx.execute(
                &PUSHED_AT,
                &[
                    place.repository.into(),
                    (&found.digest).into(),
                    found.at.into(),
                ],
            )
            .await?;
        }
        Ok(problems)
    }
}

/// Sets the tags to where they were last.
async fn add_tags(
    db: &Db,
    index: &Index,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let of = index.tags.values().map(BTreeMap::len).sum::<usize>() as u64;
    let mut done = 0;
    for (repository, tags) in &index.tags {
        let tags: Vec<(Tag, Move)> = tags
            .iter()
            .filter_map(|(tag, moves)| {
                let last = moves.iter().max_by_key(|one| one.generation)?;
                Some((tag.clone(), last.clone()))
            })
            .collect();
        for chunk in tags.chunks(BATCH) {
            let (set, problems) = db
                .write(AddTags {
                    repository: repository.clone(),
                    tags: chunk.to_vec(),
                })
                .await?;
            done += chunk.len() as u64;
            report.tags += set;
            report.problems.extend(problems);
            progress(ReindexProgress {
                step: "tags",
                done,
                of,
            });
        }
    }
    Ok(())
}

struct AddTags {
    repository: RepositoryName,
    tags: Vec<(Tag, Move)>,
}

impl Body for AddTags {
    type Output = (u64, Vec<String>);
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(u64, Vec<String>), Error> {
        let place = repository::ensure(tx, &self.repository).await?;
        let id = place.repository;
        let (mut set, mut problems) = (0, Vec::new());
        for (tag, last) in &self.tags {
            let mut generation = last.generation;
            let mut digest = None;
            if let Some(wanted) = &last.digest {
                let row = tx.query_opt(&IDENTIFY, &[id.into(), wanted.into()]).await?;
                if let Some(row) = row {
                    let name = tag.as_str().into();
                    let manifest = row.i64(0)?;
                    tx.execute(
                        &ADD_TAG,
                        &[
                            id.into(),
                            name,
                            manifest.into(),
                            generation.into(),
                            last.at.into(),
                            (&last.by).into(),
                        ],
                    )
                    .await?;
                    if tag.subject().is_some() {
                        let body = row.bytes(2)?;
                        if let Ok(view) = Manifest::parse(&body, &row.text(1)?) {
                            let size = body.len() as u64;
                            referrer::link_tag(tx, id, tag, wanted, size, &view).await?;
                        }
                    }
                    set += 1;
                    digest = Some(wanted);
                } else {
                    // A tag that points elsewhere is worse than one that is not there.
                    problems.push(format!(
                        "tag `{}:{}` pointed to `{wanted}`, which is lost; set it again",
                        self.repository.as_str(),
                        tag.as_str()
                    ));
                    generation += 1;
                }
            }
            // Generations go on, also those of a tag that is not there.
            tx.execute(
                &ADD_HISTORY,
                &[
                    id.into(),
                    tag.as_str().into(),
                    generation.into(),
                    digest.into(),
                    (&last.by).into(),
                    last.at.into(),
                ],
            )
            .await?;
        }
        Ok((set, problems))
    }
}

/// Takes back what putting all this in told of: nobody pushed.
struct Finish(String);

impl Body for Finish {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&FORGET_EVENTS, &[]).await?;
        tx.execute(&PRUNED, &[]).await?;
        tx.execute(&FORGET_AUDIT, &[]).await?;
        audit::allowed(tx, &crate::adopt::actor(), "reindex", self.0.clone()).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Stopped))
}

fn remove_database(path: &Path) -> Result<(), Error> {
    for end in ["", "-wal", "-shm", "-journal"] {
        remove(&with(path, end))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path, error))
        }
        _ => Ok(()),
    }
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    PathBuf::from(name)
}

/// The database until it is whole.
const SCRATCH: &str = "reindex.db";
/// Rows of one transaction.
const BATCH: usize = 200;
