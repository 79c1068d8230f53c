//! From a backup to a data directory, and the checks of a backup.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci::{Digest, Hasher};
use rusqlite::{Connection, OpenFlags};

use super::layout::{Layout, Line, Log, SEGMENT_BYTES, Segment};
use super::wal::{Cursor, HEADER};
use crate::adopt;
use crate::blob::file_system::{FileSystem, StorageKey, sync_directory};
use crate::blocking::blocking;
use crate::clock::{Timestamp, random_name};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::Options;
use crate::sql::{Context, Db, decode_digest, refuse_newer_sqlite, sqlite_error};

/// What was restored.
#[derive(Clone, Debug)]
pub struct Restored {
    /// The moment: everything acknowledged before it is there.
    pub at: Timestamp,
    /// The new epoch of the events.
    pub epoch: String,
    /// Blobs with an object, and their bytes.
    pub objects: u64,
    /// Bytes of objects.
    pub bytes: u64,
    /// What could not be restored, one sentence each. Their blobs are marked as damaged: a push heals them.
    pub problems: Vec<String>,
}

/// Restores the newest point that is not after `at` into the directory `to`, which must be missing or empty. With
/// `None`, the newest point of all. Where the backup lost what came between that point and the moment, it refuses and
/// names the moment until which it is whole.
///
/// What it made is removed when it fails, and what an interrupted restore left is replaced.
///
/// The restored store has a new epoch of events, its uploads are over, and nothing that is unreferenced is collected
/// before another lease.
///
/// # Errors
/// [`Error::Damaged`] when the backup is damaged where it is needed; [`Error::Unusable`] when it holds no such point,
/// when `to` is not empty, and when one directory lies inside the other; [`Error::Newer`], [`Error::Full`], [`Error::Io`],
/// [`Error::Database`].
pub async fn restore(
    backup: &Path,
    to: &Path,
    at: Option<Timestamp>,
    options: &Options,
) -> Result<Restored, Error> {
    let (backup, target) = (backup.to_owned(), to.to_owned());
    let prepared = blocking(move || prepare(&backup, &target, at)).await?;
    let target = to.to_owned();
    match complete(prepared, options).await {
        Ok(restored) => Ok(restored),
        Err(error) => {
            // The error that came first counts, and the next try sweeps as well.
            let _ = blocking(move || sweep(&target)).await;
            Err(error)
        }
    }
}

async fn complete(prepared: Prepared, options: &Options) -> Result<Restored, Error> {
    let context = Context::new();
    let now = context.clock.now();
    let database = prepared.database.clone();
    let db = blocking(move || Db::open_sqlite(&database, false, context)).await?;
    let epoch = random_name()?;
    let target = format!("{} at {}", prepared.line.display(), prepared.at.0);
    let adopted = adopt::restored(&db, now, options.lease, epoch.clone(), target).await;
    db.close().await?;
    drop(db);
    adopted?;
    blocking(move || finish(prepared, epoch)).await
}

struct Prepared {
    backup: Layout,
    to: PathBuf,
    /// Its lock, held to the end.
    directory: Directory,
    database: PathBuf,
    line: PathBuf,
    at: Timestamp,
}

fn prepare(backup: &Path, to: &Path, at: Option<Timestamp>) -> Result<Prepared, Error> {
    directory::require_apart(to, backup)?;
    let backup = Layout::open(backup)?;
    let point = choose(&backup, at)?;
    if to.join(DATABASE).is_file() {
        // An interrupted restore left it, and nobody can have used it.
        drop(directory::take_lock(to)?);
        sweep(to)?;
    }
    require_empty(to)?;
    // Until the end the directory holds a name that no server accepts, so none starts on half of it.
    let directory = Directory::open(to)?;
    let database = to.join(DATABASE);
    if let Err(error) = replay(&point.line, &point.segments, &database) {
        let _ = sweep(to);
        return Err(error);
    }
    failpoint("restore.after_database");
    Ok(Prepared {
        line: point.line.path.clone(),
        at: point.at,
        backup,
        to: to.to_owned(),
        directory,
        database,
    })
}

/// Removes what an unfinished restore made. The database goes last but for the lock: it is what tells of it.
fn sweep(to: &Path) -> Result<(), Error> {
    if !to.join(DATABASE).is_file() {
        return Ok(());
    }
    let objects = directory::objects(to);
    match std::fs::remove_dir_all(&objects) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(Error::io("remove", &objects, error));
        }
        _ => {}
    }
    let entries = std::fs::read_dir(to).map_err(|error| Error::io("read", to, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("read", to, error))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name
            .strip_prefix(DATABASE)
            .is_some_and(|rest| !rest.is_empty())
        {
            remove(&entry.path())?;
        }
    }
    remove(&to.join(DATABASE))?;
    remove(&directory::lock_file(to))
}

/// Copies the objects, gives the database its name, and declares the directory whole.
fn finish(prepared: Prepared, epoch: String) -> Result<Restored, Error> {
    let Prepared {
        backup,
        to,
        directory,
        database,
        at,
        ..
    } = prepared;
    let from = FileSystem::open(backup.objects());
    let objects = FileSystem::open(directory::objects(&to));
    let connection = open(&database)?;
    let mut report = Restored {
        at,
        epoch,
        objects: 0,
        bytes: 0,
        problems: Vec::new(),
    };
    let mut parents = BTreeSet::new();
    let mut last = i64::MIN;
    loop {
        let rows = blobs_after(&connection, last)?;
        for blob in &rows {
            last = blob.id;
            if let Err(problem) = copy_object(&from, &objects, blob, &mut parents)? {
                report.problems.push(problem);
                connection
                    .execute("UPDATE blob SET state = 'suspect' WHERE id = ?1", [blob.id])
                    .map_err(sqlite_error)?;
            } else {
                report.objects += 1;
                report.bytes += blob.size;
            }
        }
        if rows.is_empty() {
            break;
        }
    }
    for parent in parents {
        sync_directory(&parent)?;
    }
    failpoint("restore.after_objects");
    connection
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .map_err(sqlite_error)?;
    connection
        .close()
        .map_err(|(_, error)| sqlite_error(error))?;
    super::sync_file(&database)?;
    for end in ["-wal", "-shm"] {
        remove(&with(&database, end))?;
    }
    let entries = std::fs::read_dir(&to).map_err(|error| Error::io("read", &to, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("read", &to, error))?;
        // A migration of an older database leaves a copy of it.
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with(&format!("{DATABASE}.before-"))
        {
            remove(&entry.path())?;
        }
    }
    let name = directory::database(&to);
    std::fs::rename(&database, &name).map_err(|error| Error::io("rename", &database, error))?;
    sync_directory(&to)?;
    failpoint("restore.before_format");
    directory.finish()?;
    Ok(report)
}

/// A point with everything it needs.
struct Point {
    line: Line,
    segments: Vec<Segment>,
    at: Timestamp,
}

fn choose(backup: &Layout, at: Option<Timestamp>) -> Result<Point, Error> {
    let (lines, problems) = backup.lines()?;
    let wanted = |moment: Timestamp| at.is_none_or(|at| moment <= at);
    let line = lines.into_iter().rev().find(|line| wanted(line.at()));
    let lost = problems
        .iter()
        .filter(|lost| wanted(lost.begun))
        .max_by_key(|lost| lost.begun);
    let Some(line) = line else {
        return Err(Error::unusable(
            backup.root(),
            match lost.or(problems.first()) {
                Some(lost) => format!("it holds no point of that time: {}", lost.problem),
                None => "it holds no point of that time, see `longshore backup ls`".to_owned(),
            },
        ));
    };
    let log = line.log()?;
    // An older state under the name of the moment that was asked for would be a lie, so this one wants to be asked for.
    let refuse = |problem: &str| {
        let end = log.end;
        Error::damaged(
            backup.root(),
            format!(
                "{problem}; what comes before is whole until {end}: restore it with `--at {end}`"
            ),
        )
    };
    if let Some(lost) = lost.filter(|lost| lost.begun > line.at()) {
        return Err(refuse(&lost.problem));
    }
    if let Some(problem) = &log.problem
        && at.is_none_or(|at| at > log.end)
    {
        return Err(refuse(problem));
    }
    let mut segments = log.segments;
    let all = segments.len();
    if let Some(at) = at {
        segments.retain(|segment| segment.at() <= at);
    }
    let point = segments.last().map_or(line.at(), Segment::at);
    // After the last segment the line's end is the state for as long as it was covered.
    let reached = if segments.len() == all {
        at.map_or(log.end, |at| at.min(log.end))
    } else {
        point
    };
    Ok(Point {
        line,
        segments,
        at: reached.max(point),
    })
}

/// Makes the database of a point: the copy, then each generation of the log, replayed by SQLite.
fn replay(line: &Line, segments: &[Segment], target: &Path) -> Result<(), Error> {
    let base = line.base();
    let failed = |error| Error::io("copy", &base, error);
    {
        let mut from = File::open(&base).map_err(failed)?;
        let mut to = create(target)?;
        std::io::copy(&mut from, &mut to).map_err(failed)?;
    }
    let (bytes, sha256) = super::hash_file(target)?;
    if bytes != line.head.bytes || sha256 != line.head.sha256 {
        return Err(Error::damaged(
            &base,
            "its bytes have another hash, restore from another line",
        ));
    }
    let mut generation: Option<(Cursor, File)> = None;
    for segment in segments {
        segment.check()?;
        let damaged = || Error::damaged(&segment.path, "it does not follow the segment before");
        let mut file =
            File::open(&segment.path).map_err(|error| Error::io("read", &segment.path, error))?;
        file.seek(SeekFrom::Start(SEGMENT_BYTES))
            .map_err(|error| Error::io("read", &segment.path, error))?;
        for part in &segment.head.parts {
            let to = part.end().ok_or_else(damaged)?;
            let same = generation
                .as_ref()
                .is_some_and(|(here, _)| here.header == to.header);
            if !same {
                if let Some((end, log)) = generation.take() {
                    apply(target, &end, log)?;
                }
                let start = Cursor::of(to.header).ok_or_else(damaged)?;
                let mut log = create(&with(target, "-wal"))?;
                log.write_all(&start.header)
                    .map_err(|error| Error::io("write", target, error))?;
                generation = Some((start, log));
            }
            let Some((here, log)) = &mut generation else {
                return Err(damaged());
            };
            if part.from != here.offset {
                return Err(damaged());
            }
            let copied = std::io::copy(&mut (&mut file).take(part.length()), log)
                .map_err(|error| Error::io("copy", &segment.path, error))?;
            if copied != part.length() {
                return Err(damaged());
            }
            *here = to;
        }
    }
    if let Some((end, log)) = generation {
        apply(target, &end, log)?;
    }
    Ok(())
}

/// Has SQLite fold a log into the database, and wants it to take every frame.
fn apply(target: &Path, end: &Cursor, log: File) -> Result<(), Error> {
    drop(log);
    let frames = (end.offset - HEADER as u64) / end.frame();
    let connection = Connection::open_with_flags(
        target,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(sqlite_error)?;
    connection
        .execute_batch("PRAGMA synchronous=OFF; SELECT COUNT(*) FROM sqlite_schema;")
        .map_err(sqlite_error)?;
    let (found, folded): (i64, i64) = connection
        .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
            Ok((row.get(1)?, row.get(2)?))
        })
        .map_err(sqlite_error)?;
    let whole = found == folded && u64::try_from(found) == Ok(frames);
    if frames > 0 && !whole {
        return Err(Error::damaged(
            target,
            format!("SQLite took {folded} of {frames} frames of a log"),
        ));
    }
    connection
        .close()
        .map_err(|(_, error)| sqlite_error(error))?;
    for end in ["-wal", "-shm"] {
        remove(&with(target, end))?;
    }
    Ok(())
}

struct BlobRow {
    id: i64,
    digest: Digest,
    size: u64,
    key: StorageKey,
}

fn blobs_after(connection: &Connection, last: i64) -> Result<Vec<BlobRow>, Error> {
    let mut statement = connection
        .prepare_cached(
            "SELECT id, digest, size, storage_key FROM blob \
             WHERE id > ?1 AND storage_key IS NOT NULL ORDER BY id LIMIT 256",
        )
        .map_err(sqlite_error)?;
    let rows = statement
        .query_map([last], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, Vec<u8>>(1)?,
                row.get::<_, i64>(2)?,
                row.get::<_, String>(3)?,
            ))
        })
        .map_err(sqlite_error)?;
    rows.map(|row| {
        let (id, digest, size, key) = row.map_err(sqlite_error)?;
        Ok(BlobRow {
            id,
            digest: decode_digest(&digest)
                .ok_or_else(|| Error::Database(format!("blob {id} has no digest")))?,
            size: size.unsigned_abs(),
            key: StorageKey::parse(&key)?,
        })
    })
    .collect()
}

/// Copies an object durably and compares its digest; the inner error says what is wrong with it in the backup.
fn copy_object(
    from: &FileSystem,
    to: &FileSystem,
    blob: &BlobRow,
    parents: &mut BTreeSet<PathBuf>,
) -> Result<Result<(), String>, Error> {
    let source = from.path(&blob.key);
    let mut reader = match File::open(&source) {
        Ok(file) => file,
        Err(error) => {
            return Ok(Err(format!(
                "object `{}` of blob `{}` cannot be read: {error}",
                source.display(),
                blob.digest
            )));
        }
    };
    // The file appears under its own name: nobody reads a directory that is not whole.
    let mut writer = to.create(&blob.key, &[])?;
    let target = to.path(&blob.key);
    if let Some(parent) = target.parent() {
        parents.insert(parent.to_owned());
    }
    let mut hasher = Hasher::new(blob.digest.algorithm());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = reader
            .read(&mut buffer)
            .map_err(|error| Error::io("read", &source, error))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        writer
            .write_all(&buffer[..count])
            .map_err(|error| Error::io("write", &target, error))?;
    }
    writer
        .sync_all()
        .map_err(|error| Error::io("sync", &target, error))?;
    let actual = hasher.finish();
    if actual == blob.digest {
        Ok(Ok(()))
    } else {
        Ok(Err(format!(
            "object `{}` has digest `{actual}`, its blob is `{}`",
            source.display(),
            blob.digest
        )))
    }
}

/// What a check of a backup found.
#[derive(Clone, Debug, Default)]
pub struct BackupReport {
    /// Lines whose copy and segments were re-hashed and replayed.
    pub lines: u64,
    /// Objects that were re-hashed.
    pub objects: u64,
    /// Bytes that were re-hashed.
    pub bytes: u64,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// Re-hashes a whole backup: every copy, every segment, and every object that the first or the last point of a line
/// names. Each line is replayed in a temporary directory, which needs the space of one database.
///
/// # Errors
/// When the directory cannot be read at all. What is wrong with its content is in the report.
pub async fn verify_backup(directory: &Path) -> Result<BackupReport, Error> {
    let directory = directory.to_owned();
    blocking(move || verify(&directory)).await
}

fn verify(directory: &Path) -> Result<BackupReport, Error> {
    let layout = Layout::open(directory)?;
    let objects = FileSystem::open(layout.objects());
    let (lines, problems) = layout.lines()?;
    let mut report = BackupReport {
        problems: problems.into_iter().map(|lost| lost.problem).collect(),
        ..BackupReport::default()
    };
    let scratch = std::env::temp_dir().join(format!("longshore-verify-{}", random_name()?));
    std::fs::create_dir(&scratch).map_err(|error| Error::io("create", &scratch, error))?;
    let mut seen = BTreeSet::new();
    let mut result = Ok(());
    for line in &lines {
        result = verify_line(line, &objects, &scratch, &mut seen, &mut report);
        if result.is_err() {
            break;
        }
    }
    std::fs::remove_dir_all(&scratch).map_err(|error| Error::io("remove", &scratch, error))?;
    result.map(|()| report)
}

fn verify_line(
    line: &Line,
    objects: &FileSystem,
    scratch: &Path,
    seen: &mut BTreeSet<StorageKey>,
    report: &mut BackupReport,
) -> Result<(), Error> {
    let Log {
        mut segments,
        problem,
        ..
    } = line.log()?;
    report.problems.extend(problem);
    if let Some(bad) = segments.iter().position(|segment| match segment.check() {
        Ok(()) => false,
        Err(error) => {
            report.problems.push(super::chain(&error));
            true
        }
    }) {
        segments.truncate(bad);
    }
    report.lines += 1;
    report.bytes += line.size(&segments);
    let database = scratch.join("meta.db");
    let points: &[&[Segment]] = if segments.is_empty() {
        &[&[]]
    } else {
        &[&[], &segments]
    };
    for segments in points {
        let replayed = replay(line, segments, &database);
        let checked = replayed.and_then(|()| {
            let connection = open(&database)?;
            verify_objects(&connection, objects, seen, report)
        });
        for end in ["", "-wal", "-shm"] {
            remove(&with(&database, end))?;
        }
        match checked {
            Ok(()) => {}
            Err(error @ (Error::Full | Error::Stopped)) => return Err(error),
            Err(error) => {
                report.problems.push(super::chain(&error));
                return Ok(());
            }
        }
    }
    Ok(())
}

fn verify_objects(
    connection: &Connection,
    objects: &FileSystem,
    seen: &mut BTreeSet<StorageKey>,
    report: &mut BackupReport,
) -> Result<(), Error> {
    let check: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(sqlite_error)?;
    if check != "ok" {
        report
            .problems
            .push(format!("a database is damaged: {check}"));
    }
    let mut last = i64::MIN;
    loop {
        let rows = blobs_after(connection, last)?;
        for blob in &rows {
            last = blob.id;
            if !seen.insert(blob.key.clone()) {
                continue;
            }
            report.objects += 1;
            let path = objects.path(&blob.key);
            let digest = File::open(&path).and_then(|file| {
                crate::upload::writer::digest_of_file(blob.digest.algorithm(), file)
            });
            match digest {
                Ok(digest) if digest == blob.digest => report.bytes += blob.size,
                Ok(digest) => report.problems.push(format!(
                    "object `{}` has digest `{digest}`, its blob is `{}`",
                    path.display(),
                    blob.digest
                )),
                Err(error) => report.problems.push(format!(
                    "object `{}` of blob `{}` cannot be read: {error}",
                    path.display(),
                    blob.digest
                )),
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

fn open(database: &Path) -> Result<Connection, Error> {
    let connection = Connection::open_with_flags(
        database,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(sqlite_error)?;
    refuse_newer_sqlite(&connection, database)?;
    Ok(connection)
}

/// Refuses a directory that holds anything but what a restore leaves that was ended at its begin: a lock, and directories
/// for objects.
pub(crate) fn require_empty(to: &Path) -> Result<(), Error> {
    let entries = match std::fs::read_dir(to) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", to, error)),
    };
    for entry in entries {
        let name = entry
            .map_err(|error| Error::io("read", to, error))?
            .file_name()
            .to_string_lossy()
            .into_owned();
        let path = to.join(&name);
        let begun = path == directory::lock_file(to)
            || path == directory::objects(to) && !FileSystem::open(path.clone()).are_some()?;
        if name != "lost+found" && !begun {
            return Err(Error::unusable(
                to,
                format!("it holds `{name}`, restore into an empty directory"),
            ));
        }
    }
    Ok(())
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io("create", path, error))
}

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, error)),
        _ => Ok(()),
    }
}

fn with(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    PathBuf::from(name)
}

/// The database until the directory is whole.
const DATABASE: &str = "restore.db";
