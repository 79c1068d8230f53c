//! A new database from objects and exports, when the old one is lost.
//!
//! Objects carry no names: each is read once, and its digest says what it is. Exports ([`crate::export`]) say which
//! manifests and tags there were and hold the small blobs. Everything is put in through the doors that a push uses, so
//! the edges, referrers, leases and usage of the new database are those of a store that was pushed to.
//!
//! What no export tells of cannot be found again: pins, quotas, the audit record, the history of tags before their last
//! move, uploads, and blobs that no manifest names (a repository no longer holds them; the collector takes them after a
//! lease). A new database has a new epoch, so readers of events look at everything again.

mod blobs;
mod index;
mod names;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::audit;
use crate::blob::file_system::{FileSystem, sync_directory};
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::blocking::blocking;
use crate::clock::Timestamp;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::export::shelf::Shelf;
use crate::identity::{self, Claim, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::meta;
use crate::model::Options;
use crate::sql::{Body, Context, Db, Tx, WriteKind, statements};
use crate::transfer;

use index::Index;

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
    GET_JOURNAL = "SELECT value FROM meta WHERE key = 'migration'";
    BEGIN_JOURNAL = "INSERT INTO meta (key, value) VALUES ('migration', 'reindex')";
    END_JOURNAL = "DELETE FROM meta WHERE key = 'migration'";
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
    reindex_at(&Location::embedded(data), options, false, progress).await
}

/// The same for a store whose database is elsewhere: the database is empty, and no replica runs. Until the end the
/// database has a journal and opens as no store; the next run empties it and begins again. Objects that are in a place of
/// their own belong to the lost database; with `take_over` they belong to the new one, and whoever still has the old one
/// is refused from then on.
///
/// # Errors
/// As [`reindex`]; [`Error::Unusable`] when the place of the objects belongs to a store and `take_over` is not given;
/// [`Error::Database`] when the database holds repositories; [`Error::Unavailable`] when it or the object store cannot be
/// reached or answers wrongly; [`Error::Moving`] when `migrate` has begun to fill it.
pub async fn reindex_at(
    location: &Location,
    options: &Options,
    take_over: bool,
    progress: impl Fn(ReindexProgress) + Send + Sync + 'static,
) -> Result<Reindexed, Error> {
    let how = if take_over {
        Claim::TakeOver
    } else {
        Claim::Fill
    };
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
            let place = Place::new(location, &objects);
            // Of a directory that holds both, the lost database was the only one.
            let how = if place.is_whole() {
                Claim::TakeOver
            } else {
                how
            };
            return embedded(
                data,
                objects,
                (&place, how),
                &shelf,
                options,
                Arc::new(progress),
            )
            .await;
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
    let place = Place::new(location, &objects);
    let built = build(
        &db,
        objects,
        (&place, how),
        &shelf,
        options,
        Arc::new(progress),
    )
    .await;
    db.close().await?;
    built
}

/// Builds beside the name of the database, and gives it the name when it is whole.
async fn embedded(
    data: &Path,
    objects: Objects,
    place: (&Place, Claim),
    shelf: &Shelf,
    options: &Options,
    progress: Progress,
) -> Result<Reindexed, Error> {
    let data = data.to_owned();
    let scratch = data.join(SCRATCH);
    let (root, target) = (data.clone(), scratch.clone());
    let here = place.0.is_whole();
    let (directory, db) = blocking(move || {
        let directory = Directory::open_without_database(&root, here)?;
        remove_database(&target)?;
        let db = Db::open_sqlite(&target, true, Context::new())?;
        Ok((directory, db))
    })
    .await?;
    let built = build(&db, objects, place, shelf, options, progress).await;
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
    (place, how): (&Place, Claim),
    shelf: &Shelf,
    options: &Options,
    progress: Progress,
) -> Result<Reindexed, Error> {
    let mut report = Reindexed::default();
    if db.write(Begin).await? {
        transfer::empty(db).await?;
    }
    meta::epoch(db).await?;
    identity::claim(db, place, how).await?;
    let index = Index::read(shelf, &mut report).await?;
    blobs::add_objects(db, objects, &index, options.lease, &progress, &mut report).await?;
    blobs::add_small_blobs(db, shelf, &index, options.lease, &progress, &mut report).await?;
    names::add_manifests(db, shelf, &index, options.lease, &progress, &mut report).await?;
    names::add_tags(db, &index, &progress, &mut report).await?;
    db.write(Finish(format!(
        "{} manifests, {} tags, {} problems",
        report.manifests,
        report.tags,
        report.problems.len()
    )))
    .await?;
    Ok(report)
}

/// Tells how far the work is.
type Progress = Arc<dyn Fn(ReindexProgress) + Send + Sync>;

/// Writes the journal into an empty database; `true`: an earlier run did not fill it to its end, and it must be emptied.
struct Begin;

impl Body for Begin {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        if let Some(row) = tx.query_opt(&GET_JOURNAL, &[]).await? {
            if row.text(0)? != transfer::REINDEX {
                return Err(Error::Moving(
                    "the database is being filled by `longshore migrate`, choose an empty one"
                        .to_owned(),
                ));
            }
            return Ok(true);
        }
        if tx.query_opt(&ANY_REPOSITORY, &[]).await?.is_some() {
            return Err(Error::Database(
                "the database holds repositories, so it is not lost".to_owned(),
            ));
        }
        tx.execute(&BEGIN_JOURNAL, &[]).await?;
        Ok(false)
    }
}

/// Takes back what putting all this in told of: nobody pushed. From then on the database opens.
struct Finish(String);

impl Body for Finish {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&FORGET_EVENTS, &[]).await?;
        tx.execute(&PRUNED, &[]).await?;
        tx.execute(&FORGET_AUDIT, &[]).await?;
        tx.execute(&END_JOURNAL, &[]).await?;
        audit::allowed(tx, &crate::adopt::actor(), "reindex", self.0.clone()).await
    }
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
