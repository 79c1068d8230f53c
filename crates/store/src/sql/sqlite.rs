//! The SQLite engine: one writer thread with group commit, read-only connections used inline.
//!
//! The writer collects what waits, runs each body under a savepoint and commits them together: one fsync
//! for all. Answers leave after COMMIT. When a batch is rolled back, its members run again alone, so one
//! that cannot succeed fails by itself and none is acknowledged before it is durable. A failed write or
//! fsync of the database is never retried: the writer stops, and everything after it is
//! [`Error::Stopped`]. The one exception is a file system that turned read-only ([`suspend`]).

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{ErrorCode, OpenFlags, ToSql, ffi};
use tokio::sync::{Semaphore, oneshot, watch};

use super::migration::Migration;
use super::{Body, Connection, Context, Row, Statement, Tx, Value, WriteKind, run_body};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::mode;

mod suspend;

pub(crate) struct Sqlite {
    jobs: Mutex<Option<mpsc::Sender<Message>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    readers: Arc<Readers>,
    scans: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
    log: PathBuf,
}

impl Sqlite {
    /// Opens the database, or makes it when `make` is set, and brings it to the newest version.
    pub(super) fn open(
        path: &Path,
        make: bool,
        migrations: &'static [Migration],
        context: Context,
    ) -> Result<Self, Error> {
        let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        if make {
            flags |= OpenFlags::SQLITE_OPEN_CREATE;
        }
        let mut connection = rusqlite::Connection::open_with_flags(path, flags).map_err(map)?;
        prepare(&connection)?;
        super::migration::migrate_sqlite(&mut connection, path, make, migrations)?;
        let (jobs, queue) = mpsc::channel();
        let (stop, stopped) = watch::channel(false);
        let wal = {
            let mut name = path.as_os_str().to_owned();
            name.push("-wal");
            PathBuf::from(name)
        };
        let log = wal.clone();
        let writer = Writer {
            tx: Tx::new(Connection::Sqlite(Box::new(connection)), context),
            wal,
            checkpoint_at: CHECKPOINT_BYTES,
            kept: None,
            suspended: false,
            stop,
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|source| Error::io("start the writer thread of", path, source))?;
        Ok(Self {
            jobs: Mutex::new(Some(jobs)),
            thread: Mutex::new(Some(thread)),
            readers: Arc::new(Readers {
                path: path.to_owned(),
                idle: Mutex::default(),
            }),
            scans: Arc::new(Semaphore::new(SCANS)),
            stopped,
            log,
        })
    }

    pub(super) async fn write<B: Body>(&self, body: B) -> Result<B::Output, Error> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Pending {
            body,
            outcome: None,
            reply: Some(reply),
        });
        {
            let jobs = lock(&self.jobs);
            let jobs = jobs.as_ref().ok_or(Error::Stopped)?;
            jobs.send(Message::Run(job)).map_err(|_| Error::Stopped)?;
        }
        answer.await.unwrap_or(Err(Error::Stopped))
    }

    /// Answers inline: a point query takes less time than a change of threads.
    pub(super) fn read(
        &self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        if *self.stopped.borrow() {
            return Err(Error::Stopped);
        }
        self.readers.query(statement, values)
    }

    pub(super) async fn scan(
        &self,
        statement: &'static Statement,
        values: Vec<Value>,
    ) -> Result<Vec<Row>, Error> {
        if *self.stopped.borrow() {
            return Err(Error::Stopped);
        }
        let permit = Arc::clone(&self.scans).acquire_owned().await;
        let readers = Arc::clone(&self.readers);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            readers.query(statement, &values)
        })
        .await
        .unwrap_or(Err(Error::Stopped))
    }

    /// Runs `work` on the writer's thread between two transactions and waits for it. Blocks.
    pub(crate) fn between<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Pause<'_>) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = mpsc::channel();
        let work = Box::new(move |pause: &mut Pause<'_>| {
            // Whoever asked may have gone.
            let _ = reply.send(work(pause));
        });
        {
            let jobs = lock(&self.jobs);
            let jobs = jobs.as_ref().ok_or(Error::Stopped)?;
            jobs.send(Message::Between(work))
                .map_err(|_| Error::Stopped)?;
        }
        answer.recv().map_err(|_| Error::Stopped)
    }

    /// The path of the write-ahead log.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// The length of the write-ahead log's file, in bytes.
    pub(crate) fn log_length(&self) -> u64 {
        std::fs::metadata(&self.log).map_or(0, |file| file.len())
    }

    /// A read-only connection of its own.
    pub(crate) fn reader(&self) -> Result<rusqlite::Connection, Error> {
        reader(&self.readers.path)
    }

    /// Takes nothing more; what is queued is finished, and the writer ends.
    pub(super) fn stop(&self, reason: &str) {
        tracing::error!(reason, "the store stops");
        drop(lock(&self.jobs).take());
    }

    pub(super) async fn stopped(&self) {
        let mut stopped = self.stopped.clone();
        // An error means that the writer is gone, which is the same.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    }

    pub(super) async fn close(&self) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let sent = {
            let jobs = lock(&self.jobs).take();
            jobs.is_some_and(|jobs| jobs.send(Message::Close(reply)).is_ok())
        };
        let result = if sent {
            answer.await.unwrap_or(Err(Error::Stopped))
        } else {
            Ok(())
        };
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        lock(&self.readers.idle).clear();
        result
    }
}

impl Drop for Sqlite {
    /// Waits for the writer, so that the files are closed before the directory lock goes. The writer itself is here
    /// when the last transaction held the last handle; then there is nobody to wait for.
    fn drop(&mut self) {
        lock(&self.jobs).take();
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// Idle read-only connections. Their number is bounded by who can read at once: the runtime's workers and
/// the scans.
struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<rusqlite::Connection>>,
}

impl Readers {
    fn query(&self, statement: &Statement, values: &[Value]) -> Result<Vec<Row>, Error> {
        let idle = lock(&self.idle).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => reader(&self.path)?,
        };
        let rows = query(&connection, statement, values);
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE_READERS {
            idle.push(connection);
        }
        rows
    }
}

/// Work that runs between two transactions.
type Work = Box<dyn FnOnce(&mut Pause<'_>) + Send>;

enum Message {
    Run(Box<dyn Job>),
    Between(Work),
    Close(oneshot::Sender<Result<(), Error>>),
}

/// One transaction that waits for the writer.
trait Job: Send {
    /// Runs the body; `false` when it failed and must be rolled back.
    fn run(&mut self, tx: &mut Tx) -> bool;
    /// Whether the body met a failure that the writer must not go on from.
    fn must_stop(&self) -> bool;
    /// Whether the body met a full disk.
    fn is_full(&self) -> bool;
    /// What the transaction is for.
    fn kind(&self) -> WriteKind;
    /// Refuses it without running it.
    fn refuse(&mut self, refusal: Error);
    /// Answers after the COMMIT, or with the failure of the whole transaction.
    fn finish(&mut self, failure: Option<Error>);
}

struct Pending<B: Body> {
    body: B,
    outcome: Option<Result<B::Output, Error>>,
    reply: Option<oneshot::Sender<Result<B::Output, Error>>>,
}

impl<B: Body> Job for Pending<B> {
    fn run(&mut self, tx: &mut Tx) -> bool {
        let outcome = catch_unwind(AssertUnwindSafe(|| poll_once(run_body(&self.body, tx))))
            .unwrap_or_else(|_| Err(Error::Database("a transaction panicked".to_owned())));
        let succeeded = outcome.is_ok();
        self.outcome = Some(outcome);
        succeeded
    }

    fn must_stop(&self) -> bool {
        matches!(self.outcome, Some(Err(Error::Stopped)))
    }

    fn is_full(&self) -> bool {
        matches!(self.outcome, Some(Err(Error::Full)))
    }

    fn kind(&self) -> WriteKind {
        B::KIND
    }

    fn refuse(&mut self, refusal: Error) {
        self.outcome = Some(Err(refusal));
    }

    fn finish(&mut self, failure: Option<Error>) {
        let own = self.outcome.take();
        let answer = match (failure, own) {
            (Some(Error::Stopped), _) | (None, None) => Err(Error::Stopped),
            (_, Some(Err(own))) => Err(own),
            (Some(failure), _) => Err(failure),
            (None, Some(Ok(output))) => Ok(output),
        };
        if let Some(reply) = self.reply.take() {
            // Whoever asked may have gone; the change stands all the same.
            let _ = reply.send(answer);
        }
    }
}

/// Polls a transaction body to its end. On SQLite it has nothing to wait for.
pub(crate) fn poll_once<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut future = pin!(future);
    let mut context = std::task::Context::from_waker(Waker::noop());
    match future.as_mut().poll(&mut context) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => Err(Error::Database(
            "a transaction awaited something other than the database".to_owned(),
        )),
    }
}

struct Writer {
    tx: Tx,
    wal: PathBuf,
    checkpoint_at: u64,
    /// A backup folds the log itself, and is told here when the writer had to do it.
    kept: Option<Arc<AtomicBool>>,
    /// A write failed because the file system takes none.
    suspended: bool,
    stop: watch::Sender<bool>,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Message>) {
        while let Ok(first) = queue.recv() {
            let mut batch = Vec::new();
            let mut between = None;
            let mut close = None;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Run(job) => batch.push(job),
                    Message::Between(work) => {
                        between = Some(work);
                        break;
                    }
                    Message::Close(reply) => {
                        close = Some(reply);
                        break;
                    }
                }
                if batch.len() == MAX_BATCH {
                    break;
                }
                next = queue.try_recv().ok();
            }
            if !batch.is_empty() && self.group(batch).is_err() {
                break;
            }
            if let Some(work) = between {
                work(&mut Pause(&mut self));
            }
            if let Some(reply) = close {
                let _ = reply.send(self.fold_at_end());
                return;
            }
            if self.checkpoint_when_long().is_err() {
                break;
            }
        }
        // Reached when every handle is gone, or after a failure that must not be gone on from. In the second
        // case what is still queued is answered by its dropped reply.
        if !queue_is_closed(queue) {
            self.stop.send_replace(true);
        }
    }

    /// Commits these transactions together. `Err` means that the writer must stop.
    fn group(&mut self, mut batch: Vec<Box<dyn Job>>) -> Result<(), ()> {
        if self.suspended && !self.resume()? {
            suspend::refuse_all(batch);
            return Ok(());
        }
        let mut outcome = self.attempt(&mut batch);
        if let (Err(Error::Full), [job]) = (&outcome, batch.as_slice()) {
            let made_room = self.tx.context.gate.met_full_disk();
            // The collector goes on into the room of the reserve.
            if made_room && !matches!(job.kind(), WriteKind::User | WriteKind::Protect) {
                outcome = self.attempt(&mut batch);
            }
        }
        match outcome {
            Ok(event) => {
                failpoint("sql.after_commit");
                self.tx.context.committed(event);
                for job in &mut batch {
                    job.finish(None);
                }
                Ok(())
            }
            Err(Error::Stopped) if self.met_read_only_disk() => {
                self.suspended = true;
                suspend::refuse_all(batch);
                Ok(())
            }
            Err(Error::Stopped) => {
                tracing::error!("the database could not be written; the store stops");
                self.stop.send_replace(true);
                for job in &mut batch {
                    job.finish(Some(Error::Stopped));
                }
                Err(())
            }
            Err(failure) if batch.len() == 1 => {
                for job in &mut batch {
                    job.finish(Some(clone(&failure)));
                }
                Ok(())
            }
            Err(failure) => {
                tracing::warn!(%failure, members = batch.len(), "a group of transactions was rolled back; each runs again alone");
                let mut members = batch.into_iter();
                while let Some(job) = members.next() {
                    if self.group(vec![job]).is_err() {
                        for mut job in members {
                            job.finish(Some(Error::Stopped));
                        }
                        return Err(());
                    }
                }
                Ok(())
            }
        }
    }

    /// One transaction around all members; on failure nothing of it is left.
    fn attempt(&mut self, batch: &mut [Box<dyn Job>]) -> Result<i64, Error> {
        let done = self.attempt_open(batch);
        if done.is_err() && !self.connection().is_autocommit() {
            let _ = self.connection().execute_batch("ROLLBACK");
        }
        done
    }

    fn attempt_open(&mut self, batch: &mut [Box<dyn Job>]) -> Result<i64, Error> {
        let mut newest = 0;
        self.batch("BEGIN IMMEDIATE")?;
        for job in batch {
            self.batch("SAVEPOINT member")?;
            self.tx.now = self.tx.context.clock.now();
            self.tx.event = 0;
            let succeeded = match self.may_run(job.kind()) {
                Ok(()) => job.run(&mut self.tx),
                Err(refusal) => {
                    job.refuse(refusal);
                    false
                }
            };
            if job.must_stop() {
                // Pages of a large transaction are written before its COMMIT, so this is where they fail.
                return Err(Error::Stopped);
            }
            if self.connection().is_autocommit() {
                // SQLite ends the whole transaction by itself after a full disk or an I/O error.
                return Err(Error::Full);
            }
            if job.is_full() {
                return Err(Error::Full);
            }
            if succeeded {
                newest = newest.max(self.tx.event);
                self.batch("RELEASE member")?;
            } else {
                self.batch("ROLLBACK TO member")?;
                self.batch("RELEASE member")?;
            }
        }
        failpoint("sql.before_commit");
        self.batch("COMMIT")?;
        Ok(newest)
    }

    /// Asks inside the transaction whether one of this kind may run: what was commanded before is seen.
    fn may_run(&self, kind: WriteKind) -> Result<(), Error> {
        // The lock of the directory keeps a transfer and everybody else apart.
        if matches!(kind, WriteKind::Maintenance | WriteKind::Place) {
            return Ok(());
        }
        self.tx.context.gate.check(kind)?;
        let rows = query(self.connection(), mode::CHECK, &[])?;
        for row in &rows {
            mode::check_mark(kind, &row.text(0)?, &row.text(1)?)?;
        }
        Ok(())
    }

    fn batch(&self, text: &str) -> Result<(), Error> {
        let connection = self.connection();
        let mut statement = connection.prepare_cached(text).map_err(map)?;
        statement.execute([]).map_err(map)?;
        Ok(())
    }

    fn checkpoint_when_long(&mut self) -> Result<(), ()> {
        if self.suspended {
            return Ok(());
        }
        let length = std::fs::metadata(&self.wal).map_or(0, |file| file.len());
        if length < self.checkpoint_at {
            self.checkpoint_at = self.checkpoint_at.min(length + CHECKPOINT_BYTES);
            return Ok(());
        }
        if let Some(lost) = &self.kept {
            if length < MAX_KEPT_BYTES {
                return Ok(());
            }
            lost.store(true, Ordering::Release);
        }
        let result = self.checkpoint();
        // A reader that holds an old snapshot keeps the log; try again when it has grown once more.
        let left = std::fs::metadata(&self.wal).map_or(0, |file| file.len());
        self.checkpoint_at = left + CHECKPOINT_BYTES;
        match result {
            Err(Error::Stopped) if self.met_read_only_disk() => {
                self.suspended = true;
                Ok(())
            }
            Err(Error::Stopped) => Err(()),
            Err(error) => {
                tracing::warn!(%error, "the write-ahead log could not be folded into the database");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Folds the log as far as readers let it, without waiting for them: pushes would wait too.
    fn checkpoint(&self) -> Result<(), Error> {
        let connection = self.connection();
        connection.busy_timeout(Duration::ZERO).map_err(map)?;
        let folded = connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .map_err(map);
        connection.busy_timeout(BUSY).map_err(map)?;
        folded
    }

    fn connection(&self) -> &rusqlite::Connection {
        match &self.tx.connection {
            Connection::Sqlite(connection) => connection,
            Connection::Postgres(_) => unreachable!("the SQLite writer owns a SQLite connection"),
        }
    }
}

/// The writer between two transactions: everything acknowledged is committed, and nothing is half done.
pub(crate) struct Pause<'a>(&'a mut Writer);

impl Pause<'_> {
    /// The path of the write-ahead log.
    pub(crate) fn log(&self) -> &Path {
        &self.0.wal
    }

    /// Folds the log into the database as far as readers let it.
    pub(crate) fn fold(&mut self) -> Result<(), Error> {
        self.0.checkpoint()
    }

    /// From now on the log is folded by [`Pause::fold`] alone, unless it grows beyond all bounds: then `lost` is set.
    pub(crate) fn keep_log(&mut self, lost: Option<Arc<AtomicBool>>) {
        self.0.kept = lost;
    }

    /// Has `changed` called with the id of each row of table `blob` that is written from now on.
    pub(crate) fn watch_blobs(
        &mut self,
        changed: impl FnMut(i64) + Send + 'static,
    ) -> Result<(), Error> {
        use rusqlite::hooks::Action;
        let Connection::Sqlite(connection) = &mut self.0.tx.connection else {
            return Ok(());
        };
        let mut changed = changed;
        connection
            .update_hook(Some(
                move |action: Action, _: &str, table: &str, row: i64| {
                    if table == "blob" && action != Action::SQLITE_DELETE {
                        changed(row);
                    }
                },
            ))
            .map_err(map)
    }
}

fn queue_is_closed(queue: &mpsc::Receiver<Message>) -> bool {
    matches!(queue.try_recv(), Err(mpsc::TryRecvError::Disconnected))
}

/// Sets what every writing connection needs.
fn prepare(connection: &rusqlite::Connection) -> Result<(), Error> {
    connection
        .busy_timeout(BUSY)
        .and_then(|()| {
            connection.query_row("PRAGMA journal_mode=WAL", [], |row| row.get::<_, String>(0))
        })
        .and_then(|_| {
            connection.execute_batch(
                "PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON; PRAGMA trusted_schema=OFF;",
            )
        })
        .and_then(|()| {
            // The writer folds the log itself, after answers have left.
            connection.query_row("PRAGMA wal_autocheckpoint=0", [], |_| Ok(()))
        })
        .map_err(map)?;
    connection.set_prepared_statement_cache_capacity(256);
    Ok(())
}

fn reader(path: &Path) -> Result<rusqlite::Connection, Error> {
    let connection = rusqlite::Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(map)?;
    connection.busy_timeout(BUSY).map_err(map)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// A read transaction of its own, for programs that look at a store beside the running server.
///
/// `alone`: nobody else has the directory, so a log that a crash left behind may be recovered.
pub(crate) fn snapshot(path: &Path, alone: bool, context: Context) -> Result<Tx, Error> {
    let connection = if alone {
        let connection = rusqlite::Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(map)?;
        connection
            .execute_batch("PRAGMA query_only=ON")
            .map_err(map)?;
        connection
    } else {
        reader(path)?
    };
    // BEGIN alone takes no snapshot, the first read does.
    connection.execute_batch("BEGIN").map_err(map)?;
    super::migration::check_sqlite(&connection, path, super::MIGRATIONS)?;
    Ok(Tx::new(Connection::Sqlite(Box::new(connection)), context))
}

/// SQLite's own check of its file and of every foreign key. One sentence for each problem.
pub(crate) fn check(tx: &mut Tx) -> Result<Vec<String>, Error> {
    let Connection::Sqlite(connection) = &tx.connection else {
        return Ok(Vec::new());
    };
    let mut problems = Vec::new();
    let mut statement = connection
        .prepare("PRAGMA integrity_check(100)")
        .map_err(map)?;
    let lines = statement
        .query_map([], |row| row.get::<_, String>(0))
        .map_err(map)?;
    for line in lines {
        let line = line.map_err(map)?;
        if line != "ok" {
            problems.push(format!("the database file is damaged: {line}"));
        }
    }
    let mut statement = connection
        .prepare("PRAGMA foreign_key_check")
        .map_err(map)?;
    let lines = statement
        .query_map([], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(2)?))
        })
        .map_err(map)?;
    for line in lines {
        let (table, parent) = line.map_err(map)?;
        problems.push(format!(
            "a row of table `{table}` points to a row of `{parent}` that does not exist"
        ));
    }
    Ok(problems)
}

pub(super) fn query(
    connection: &rusqlite::Connection,
    statement: &Statement,
    values: &[Value],
) -> Result<Vec<Row>, Error> {
    let named = |error| named(statement, error);
    let mut prepared = connection
        .prepare_cached(statement.sqlite())
        .map_err(named)?;
    statement.mark_sqlite();
    let columns = prepared.column_count();
    let mut rows = prepared
        .query(rusqlite::params_from_iter(values))
        .map_err(named)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(named)? {
        let mut cells = Vec::with_capacity(columns);
        for column in 0..columns {
            cells.push(match row.get_ref(column).map_err(named)? {
                ValueRef::Null => Value::Null,
                ValueRef::Integer(value) => Value::I64(value),
                ValueRef::Text(value) => Value::Text(
                    std::str::from_utf8(value)
                        .map_err(|_| Error::Database("text that is not UTF-8".to_owned()))?
                        .to_owned(),
                ),
                ValueRef::Blob(value) => Value::Blob(value.to_vec()),
                ValueRef::Real(_) => {
                    return Err(Error::Database(format!(
                        "`{}` gave a fraction",
                        statement.name
                    )));
                }
            });
        }
        found.push(Row(cells));
    }
    Ok(found)
}

pub(super) fn execute(
    connection: &rusqlite::Connection,
    statement: &Statement,
    values: &[Value],
) -> Result<u64, Error> {
    let named = |error| named(statement, error);
    let mut prepared = connection
        .prepare_cached(statement.sqlite())
        .map_err(named)?;
    statement.mark_sqlite();
    let changed = prepared
        .execute(rusqlite::params_from_iter(values))
        .map_err(named)?;
    Ok(changed as u64)
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::I64(value) => ValueRef::Integer(*value),
            Self::Text(value) => ValueRef::Text(value.as_bytes()),
            Self::Blob(value) => ValueRef::Blob(value),
        }))
    }
}

fn named(statement: &Statement, error: rusqlite::Error) -> Error {
    match map(error) {
        Error::Database(text) => Error::Database(format!("`{}`: {text}", statement.name)),
        other => other,
    }
}

/// Tells a full disk (try again later) and a failed write or sync (stop) from everything else.
pub(crate) fn map(error: rusqlite::Error) -> Error {
    if let rusqlite::Error::SqliteFailure(failure, _) = &error {
        match (failure.code, failure.extended_code) {
            (ErrorCode::DiskFull, _)
            | (
                ErrorCode::SystemIoFailure,
                ffi::SQLITE_IOERR_SHMSIZE | ffi::SQLITE_IOERR_SHMMAP | ffi::SQLITE_IOERR_SHMOPEN,
            ) => return Error::Full,
            (
                ErrorCode::SystemIoFailure,
                ffi::SQLITE_IOERR_READ | ffi::SQLITE_IOERR_SHORT_READ | ffi::SQLITE_IOERR_ACCESS,
            ) => {}
            (ErrorCode::SystemIoFailure, _) => {
                tracing::error!(%error, "the database file could not be written or synced");
                return Error::Stopped;
            }
            _ => {}
        }
    }
    Error::Database(error.to_string())
}

fn clone(error: &Error) -> Error {
    match error {
        Error::Full => Error::Full,
        Error::Stopped => Error::Stopped,
        other => Error::Database(other.to_string()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The write-ahead log is folded into the database when it is longer than this, in bytes.
pub(crate) const CHECKPOINT_BYTES: u64 = 8 << 20;
/// A log that a backup keeps is folded all the same when it is longer than this, in bytes.
const MAX_KEPT_BYTES: u64 = 1 << 30;
/// How long a statement waits for another process's lock.
const BUSY: Duration = Duration::from_secs(5);
/// Transactions that are committed together, at most.
const MAX_BATCH: usize = 256;
const MAX_IDLE_READERS: usize = 32;
/// Scans that run at once.
const SCANS: usize = 4;
