//! Backups of an embedded store while it runs, to any moment that was shipped.
//!
//! The key decision: **the database is shipped by its own log**. A *line* is a copy of the database and, in
//! *segments*, every byte that SQLite committed to its write-ahead log afterwards; SQLite itself replays them. The
//! objects are immutable and their keys are never used again, so each is copied once.
//!
//! What holds at every moment, also when the process is killed or the power goes:
//!
//! - B1: a point (a copy, or a segment) is visible only when it is durable and whole, and when every object that the
//!   database names at that moment is in the backup, durably.
//! - B2: what was acknowledged before the time of a point is in it. The time is read before the log is.
//! - B3: a segment begins exactly where the one before it ends. The place is proven by the checksum that SQLite carries
//!   through a generation of its log, and between generations by being the only one who folds the log. When that cannot
//!   be proven, a new line begins; the points before stay.
//! - B4: the end of a segment is read between two transactions of the writer, so it is durable in the store: the store
//!   never comes back with less than its backup has.
//! - B5: an object goes from the backup only when no kept point names it.
//! - B6: a failure of the backup never stops or delays the store beyond the length of its log. The log is folded without
//!   the backup when it is longer than a gigabyte; then a new line begins.
//!
//! Which objects a segment names is known from SQLite's own notice of each written row of table `blob`, read in a
//! transaction that sees exactly the segment's end. A restart looks at every row once, in the background.

pub(crate) mod layout;
pub(crate) mod once;
pub(crate) mod restore;
pub(crate) mod ship;
mod vault;
pub(crate) mod wal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::blob::file_system::{FileSystem, StorageKey};
use crate::blocking::blocking;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::sqlite_error;
use crate::store::{Inner, Store};
use layout::Layout;
use ship::Worker;

/// How a running store is backed up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupOptions {
    /// Where to; best on another disk.
    pub directory: PathBuf,
    /// How far apart restorable points are, at most, while something is written (1 min).
    pub every: Duration,
    /// How long points are kept (7 days).
    pub keep: Duration,
    /// Make hard links of objects in place of copies. Fast, but no protection against a dying disk.
    pub link: bool,
}

impl BackupOptions {
    /// The defaults for a directory.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            every: Duration::from_mins(1),
            keep: Duration::from_hours(7 * 24),
            link: false,
        }
    }
}

/// How the backup of a running store goes.
#[derive(Clone, Debug, Default)]
pub struct BackupStatus {
    /// When a round succeeded last.
    pub last_success: Option<Timestamp>,
    /// The newest restorable moment.
    pub point: Option<Timestamp>,
    /// Rounds that failed since the start.
    pub failures: u64,
    /// Why the last round failed; `None` when it did not.
    pub problem: Option<String>,
    /// How long ago the newest restorable moment is; `None` before the first.
    pub lag: Option<Duration>,
}

impl Store {
    /// Starts the backup of this store into a directory. It goes on until the store is closed.
    ///
    /// # Errors
    /// [`Error::Unusable`] when the directory and the data directory lie one inside the other; [`Error::InUse`] when
    /// another process writes there, [`Error::Newer`], [`Error::Damaged`], [`Error::Io`];
    /// [`Error::Unavailable`] when the database is not SQLite.
    pub async fn start_backup(&self, options: BackupOptions) -> Result<(), Error> {
        if self.inner().db.embedded().is_none() {
            return Err(Error::Unavailable {
                what: "the backup of the database",
                problem: "PostgreSQL is backed up with its own tools, see `docs/how-to/backup.md`"
                    .to_owned(),
            });
        }
        let objects = files(self.inner())?.root();
        crate::directory::require_apart(&options.directory, objects.parent().unwrap_or(objects))?;
        let inner = Arc::clone(self.inner());
        blocking(move || {
            let worker = Worker::start(&inner, options)?;
            inner.backup.set(worker);
            Ok(())
        })
        .await
    }

    /// How the backup goes; `None` when there is none.
    pub fn backup_status(&self) -> Option<BackupStatus> {
        let mut status = self.inner().backup.get()?.status();
        let now = self.inner().clock.now();
        status.lag = status.point.map(|point| {
            Duration::from_micros(now.0.saturating_sub(point.0).try_into().unwrap_or_default())
        });
        Some(status)
    }

    /// Makes a restorable point now, when there is a backup.
    #[doc(hidden)]
    pub async fn ship_backup(&self) {
        if let Some(worker) = self.inner().backup.get() {
            let _ = tokio::task::spawn_blocking(move || worker.ship()).await;
        }
    }
}

/// The place of the worker in a store.
#[derive(Debug, Default)]
pub(crate) struct Place(std::sync::Mutex<Option<Arc<Worker>>>);

impl Place {
    fn set(&self, worker: Worker) {
        *self.lock() = Some(Arc::new(worker));
    }

    fn get(&self) -> Option<Arc<Worker>> {
        self.lock().clone()
    }

    /// Makes a last point and ends the worker.
    pub(crate) async fn close(&self) {
        let worker = self.lock().take();
        if let Some(worker) = worker {
            let _ = tokio::task::spawn_blocking(move || worker.stop()).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Worker>>> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What can be restored from a backup directory.
#[derive(Clone, Debug, Default)]
pub struct BackupList {
    /// The lines, the oldest first.
    pub lines: Vec<BackupLine>,
    /// Bytes of all copies and segments.
    pub database_bytes: u64,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// A stretch of time in which every point can be restored.
#[derive(Clone, Debug)]
pub struct BackupLine {
    /// The first point.
    pub from: Timestamp,
    /// The newest moment that can be restored.
    pub to: Timestamp,
    /// How many points.
    pub points: u64,
    /// Bytes of the copy and its segments.
    pub bytes: u64,
    /// Objects that the database named at the first point.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
}

/// Lists what can be restored.
///
/// # Errors
/// [`Error::Unusable`] when it is no backup directory, [`Error::Newer`], [`Error::Io`].
pub fn list_backups(directory: &Path) -> Result<BackupList, Error> {
    let layout = Layout::open(directory)?;
    let (lines, problems) = layout.lines()?;
    let mut list = BackupList {
        problems: problems.into_iter().map(|lost| lost.problem).collect(),
        ..BackupList::default()
    };
    for line in lines {
        let log = line.log()?;
        list.problems.extend(log.problem);
        let bytes = line.size(&log.segments);
        list.database_bytes += bytes;
        list.lines.push(BackupLine {
            from: line.at(),
            to: log.end,
            points: log.segments.len() as u64 + 1,
            bytes,
            objects: line.head.objects,
            object_bytes: line.head.object_bytes,
        });
    }
    Ok(list)
}

/// The objects as files; a backup of this kind needs them.
fn files(inner: &Inner) -> Result<&FileSystem, Error> {
    inner.objects.files().map(Arc::as_ref).ok_or_else(|| {
        Error::Database(
            "this backup copies files, and the objects are in an object store: see the guide to backups".to_owned(),
        )
    })
}

/// Rows of table `blob` with an object, after `last`, in the order of their ids.
fn objects_after(reader: &Connection, last: i64) -> Result<Vec<(i64, StorageKey)>, Error> {
    let mut statement = reader
        .prepare_cached(
            "SELECT id, storage_key FROM blob WHERE id > ?1 AND storage_key IS NOT NULL ORDER BY id LIMIT 256",
        )
        .map_err(sqlite_error)?;
    let rows = statement
        .query_map([last], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?))
        })
        .map_err(sqlite_error)?;
    rows.map(|row| {
        let (id, key) = row.map_err(sqlite_error)?;
        Ok((id, StorageKey::parse(&key)?))
    })
    .collect()
}

/// Removes the lines that no moment after `cutoff` needs, then the objects that only they named. How many lines went.
fn prune(layout: &Layout, vault: &vault::Vault, cutoff: Timestamp) -> Result<u64, Error> {
    let (lines, _) = layout.lines()?;
    let mut removed = 0;
    for pair in lines.windows(2) {
        let [old, next] = pair else { continue };
        if next.at() > cutoff {
            break;
        }
        layout.remove(old)?;
        removed += 1;
    }
    if removed > 0
        && let (lines, problems) = layout.lines()?
        && problems.is_empty()
        && let Some(oldest) = lines.first()
    {
        vault.sweep(&oldest.objects(), &oldest.path.join(BEGUN))?;
    }
    Ok(removed)
}

/// A database file to copy another one into. Its durability is that of the sync at the end.
fn empty_database(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(sqlite_error)?;
    connection
        .query_row("PRAGMA journal_mode=OFF", [], |_| Ok(()))
        .and_then(|()| connection.execute_batch("PRAGMA synchronous=OFF"))
        .map_err(sqlite_error)?;
    Ok(connection)
}

fn sync_file(path: &Path) -> Result<(), Error> {
    std::fs::File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| Error::io("sync", path, error))
}

fn hash_file(path: &Path) -> Result<(u64, String), Error> {
    std::fs::File::open(path)
        .and_then(|mut file| layout::hash(&mut file))
        .map_err(|error| Error::io("read", path, error))
}

/// An error with its causes in one line.
pub(crate) fn chain(error: &Error) -> String {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A file of a line that is never touched after the line began.
const BEGUN: &str = "begun";
