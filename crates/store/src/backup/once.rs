//! One full backup of a data directory, stopped or beside its running server.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags};

use super::layout::{self, BASE, LISTED, Layout, LineHead};
use super::vault::Vault;
use crate::blob::file_system::FileSystem;
use crate::blocking::blocking;
use crate::clock::{Clock, Timestamp};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::sql::{refuse_newer_sqlite, sqlite_error};

/// What a backup holds.
#[derive(Clone, Debug)]
pub struct BackupMade {
    /// Everything acknowledged before this moment is in it.
    pub at: Timestamp,
    /// Bytes of the copied database.
    pub database_bytes: u64,
    /// Objects that the database names.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
}

/// Makes one full backup of the data directory `data` in `directory`, which may hold earlier ones: objects that it
/// has already are not copied again. The server of the data directory may run.
///
/// `link`: make hard links of objects in place of copies.
///
/// # Errors
/// [`Error::Damaged`] or [`Error::Unusable`] when `data` is no data directory, or one directory lies inside the other; [`Error::InUse`] when another backup writes to `directory`;
/// [`Error::Full`], [`Error::Io`], [`Error::Database`].
pub async fn backup(data: &Path, directory: &Path, link: bool) -> Result<BackupMade, Error> {
    let (data, directory) = (data.to_owned(), directory.to_owned());
    blocking(move || run(&data, &directory, link)).await
}

fn run(data: &Path, target: &Path, link: bool) -> Result<BackupMade, Error> {
    let alone = Directory::look(data)?;
    let database = directory::database(data);
    if !database.is_file() {
        return Err(Error::unusable(
            &database,
            "it is missing, so there is nothing to back up",
        ));
    }
    directory::require_apart(target, data)?;
    let (layout, _lock) = Layout::make(target)?;
    layout.sweep_partial()?;
    let mut vault = Vault::open(layout.objects(), link)?;
    let objects = FileSystem::open(directory::objects(data));
    let clock = Clock::default();
    let reader = open(&database, alone.is_some())?;
    let draft = layout.draft(clock.now())?;
    layout::write_json(&draft.path(super::BEGUN), &serde_json::json!({}))?;
    // Most objects are copied before the moment of the backup, so that few can go away after it.
    walk(&reader, |key| vault.take(&objects, key).map(drop))?;

    let listed = draft.path(LISTED);
    let failed = |error| Error::io("write", &listed, error);
    let (mut at, mut count);
    let mut missing;
    let mut round = 0;
    loop {
        round += 1;
        at = clock.now();
        // BEGIN alone takes no snapshot, the first read does.
        reader
            .execute_batch("BEGIN; SELECT 1 FROM meta LIMIT 1;")
            .map_err(sqlite_error)?;
        let mut list = BufWriter::new(File::create(&listed).map_err(failed)?);
        (count, missing) = (0_u64, 0_u64);
        walk(&reader, |key| {
            count += 1;
            if !vault.take(&objects, key)? {
                missing += 1;
            }
            writeln!(list, "{}", key.as_str()).map_err(failed)
        })?;
        list.into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        if missing == 0 || round == ROUNDS {
            break;
        }
        // Deleted since: a later moment does not name them.
        reader.execute_batch("COMMIT").map_err(sqlite_error)?;
    }
    if missing > 0 {
        tracing::warn!(
            objects = missing,
            "the store has no object for some of its blobs, so the backup has none; run `verify-store`"
        );
    }
    vault.sync()?;
    let epoch = text(&reader, "SELECT value FROM meta WHERE key = 'epoch'")?;
    let object_bytes = reader
        .query_row(
            "SELECT CAST(COALESCE(SUM(size), 0) AS INTEGER) FROM blob WHERE storage_key IS NOT NULL",
            [],
            |row| row.get::<_, i64>(0),
        )
        .map_err(sqlite_error)?
        .unsigned_abs();
    let base = draft.path(BASE);
    copy(&reader, &base)?;
    drop(reader);
    let (bytes, sha256) = super::hash_file(&base)?;
    draft.publish(LineHead {
        version: layout::VERSION,
        at: at.0,
        epoch,
        bytes,
        sha256,
        log: None,
        objects: count,
        object_bytes,
    })?;
    Ok(BackupMade {
        at,
        database_bytes: bytes,
        objects: count,
        object_bytes,
    })
}

fn walk(
    reader: &Connection,
    mut seen: impl FnMut(&crate::blob::file_system::StorageKey) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut last = i64::MIN;
    loop {
        let rows = super::objects_after(reader, last)?;
        for (row, key) in &rows {
            last = *row;
            seen(key)?;
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

fn copy(reader: &Connection, target: &Path) -> Result<(), Error> {
    let mut copy = super::empty_database(target)?;
    {
        let backup = Backup::new(reader, &mut copy).map_err(sqlite_error)?;
        match backup.step(-1).map_err(sqlite_error)? {
            StepResult::Done => {}
            _ => {
                return Err(Error::Database(
                    "the database cannot be copied now, try again".to_owned(),
                ));
            }
        }
    }
    copy.close().map_err(|(_, error)| sqlite_error(error))?;
    super::sync_file(target)
}

/// Opens a database to read it. A log that a crash left behind may be recovered by whoever is alone.
fn open(database: &PathBuf, alone: bool) -> Result<Connection, Error> {
    let access = if alone {
        OpenFlags::SQLITE_OPEN_READ_WRITE
    } else {
        OpenFlags::SQLITE_OPEN_READ_ONLY
    };
    let connection =
        Connection::open_with_flags(database, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            .map_err(sqlite_error)?;
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .and_then(|()| connection.execute_batch("PRAGMA query_only=ON"))
        .map_err(sqlite_error)?;
    refuse_newer_sqlite(&connection, database)?;
    Ok(connection)
}

fn text(reader: &Connection, statement: &str) -> Result<String, Error> {
    reader
        .query_row(statement, [], |row| row.get(0))
        .map_err(sqlite_error)
}

const ROUNDS: u32 = 5;
