//! One thin layer over two engines: SQLite in the process and PostgreSQL.
//!
//! Every statement is written once, as a [`Statement`] in the room that owns its table, in the dialect that
//! both engines share: parameters are `$1`, `$2` … by number, values are integers, text, bytes or NULL. Three
//! named fragments stand for row locks, which SQLite, whose single writer is the lock, does not need.
//!
//! # The order of locks
//!
//! On PostgreSQL every transaction locks rows in this order, so no two wait for each other in a circle:
//!
//! | | what | among themselves |
//! |---|---|---|
//! | 1 | advisory locks, rows of `meta` and `chain`, holders of pins | holders by name |
//! | 2 | namespaces and repositories | a source before a destination; only a deletion locks one against others |
//! | 3 | uploads | by row id |
//! | 4 | tags that are there | by name |
//! | 5 | manifests that are there | by repository, then digest |
//! | 6 | blobs | by digest; each replica's scrub and collector take them one at a time or skip |
//! | 7 | holds of repositories on blobs | by digest |
//! | 8 | new manifests, then new tags | tags by name |
//! | 9 | pins, edges and referrers | by the keys that come first in their table's own key |
//! | 10 | rows of the collector's queue | by kind, repository and target; [`Tx`] collects the changes and makes them last |
//!
//! Rows that nobody else knows yet, and those that are only ever inserted (history, events, audit, usage), have no place
//! in it. Who holds a row and finds that an earlier one is needed after all tries it without waiting, and begins again
//! when somebody has it ([`Tx::again`]): what a manifest names, when the manifest goes, and a tag that came to it since its
//! tags were locked.
//!
//! A transaction is a [`Body`]: a value with a function that can run again. It awaits only its [`Tx`], so
//! SQLite's writer thread can poll it once, and PostgreSQL can repeat it after a conflict.

mod migration;
mod postgres;
mod sqlite;
mod statement;
mod value;

use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::{Notify, watch};

use crate::clock::{Clock, Timestamp};
use crate::collect::{self, QueueChanges};
use crate::error::Error;
use crate::mode::Gate;

pub(crate) use migration::{MIGRATIONS, refuse_newer_sqlite};
pub(crate) use postgres::{Listener, check as check_postgres};
pub(crate) use sqlite::{
    CHECKPOINT_BYTES, Pause, Sqlite, check as check_sqlite, map as sqlite_error, poll_once,
    snapshot as sqlite_snapshot,
};
pub(crate) use statement::{Statement, registry, statements};
pub(crate) use value::{Row, Value, decode_digest, encode_digest};

/// The database of a store.
pub(crate) enum Db {
    Sqlite(Sqlite),
    Postgres(postgres::Postgres),
}

impl Db {
    /// Opens or makes the SQLite database at `path` and migrates it.
    pub(crate) fn open_sqlite(path: &Path, make: bool, context: Context) -> Result<Self, Error> {
        Sqlite::open(path, make, MIGRATIONS, context).map(Self::Sqlite)
    }

    /// Connects to PostgreSQL with at most so many connections, and migrates the schema.
    pub(crate) async fn open_postgres(
        url: &str,
        connections: usize,
        context: Context,
    ) -> Result<Self, Error> {
        postgres::Postgres::open(url, connections, MIGRATIONS, context)
            .await
            .map(Self::Postgres)
    }

    /// How many other connections use a PostgreSQL database.
    pub(crate) async fn others_on_postgres(url: &str) -> Result<u64, Error> {
        postgres::Postgres::others(url).await
    }

    /// The engine of the embedded mode, for what only it can do.
    pub(crate) fn embedded(&self) -> Option<&Sqlite> {
        match self {
            Self::Sqlite(sqlite) => Some(sqlite),
            Self::Postgres(_) => None,
        }
    }

    /// Connects to PostgreSQL to look at it. The schema is left as it is, and must be the one that this program knows.
    pub(crate) async fn look_postgres(url: &str, context: Context) -> Result<Self, Error> {
        postgres::Postgres::look(url, MIGRATIONS, context)
            .await
            .map(Self::Postgres)
    }

    /// Runs one transaction. The answer comes after its COMMIT; an error of the body rolls it back.
    ///
    /// Cancel safety: when the caller goes away the transaction still runs to its end.
    pub(crate) async fn write<B: Body>(&self, body: B) -> Result<B::Output, Error> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(body).await,
            Self::Postgres(postgres) => postgres.write(body).await,
        }
    }

    /// Runs one statement that looks up a few rows by a key; SQLite answers it inline.
    pub(crate) async fn read(
        &self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(statement, values),
            Self::Postgres(postgres) => postgres.read(statement, values).await,
        }
    }

    /// Runs one reading statement that may walk many rows, away from the caller's thread.
    pub(crate) async fn scan(
        &self,
        statement: &'static Statement,
        values: Vec<Value>,
    ) -> Result<Vec<Row>, Error> {
        match self {
            Self::Sqlite(sqlite) => sqlite.scan(statement, values).await,
            Self::Postgres(postgres) => postgres.read(statement, &values).await,
        }
    }

    /// A transaction that reads one moment of PostgreSQL, for as long as it takes; `None` on SQLite, whose snapshots
    /// need no open store ([`sqlite_snapshot`]).
    pub(crate) async fn snapshot(&self) -> Result<Option<Tx>, Error> {
        match self {
            Self::Sqlite(_) => Ok(None),
            Self::Postgres(postgres) => postgres.snapshot().await.map(Some),
        }
    }

    /// Tells whether the database takes no writes because it follows another one.
    pub(crate) async fn in_recovery(&self) -> Result<bool, Error> {
        match self {
            Self::Sqlite(_) => Ok(false),
            Self::Postgres(postgres) => postgres.in_recovery().await,
        }
    }

    /// Hears what other replicas announce on a channel; `None` where there are no others.
    pub(crate) async fn listen(&self, channel: &str) -> Result<Option<Listener>, Error> {
        match self {
            Self::Sqlite(_) => Ok(None),
            Self::Postgres(postgres) => postgres.listen(channel).await.map(Some),
        }
    }

    /// Whether events get their numbers after the COMMIT, by the sealer.
    pub(crate) fn seals_events(&self) -> bool {
        matches!(self, Self::Postgres(_))
    }

    /// Stops a database that this process must not go on with.
    pub(crate) fn stop(&self, reason: &str) {
        match self {
            Self::Sqlite(sqlite) => sqlite.stop(reason),
            Self::Postgres(postgres) => postgres.stop(reason),
        }
    }

    /// Waits until the database has stopped after a failure of its own.
    pub(crate) async fn stopped(&self) {
        match self {
            Self::Sqlite(sqlite) => sqlite.stopped().await,
            Self::Postgres(postgres) => postgres.stopped().await,
        }
    }

    /// Finishes what is queued and closes the files. Later calls are refused.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        match self {
            Self::Sqlite(sqlite) => sqlite.close().await,
            Self::Postgres(postgres) => {
                postgres.close();
                Ok(())
            }
        }
    }
}

/// What every transaction needs beside the database: the time, ids, and whom a commit wakes.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) clock: Arc<Clock>,
    pub(crate) signal: Arc<watch::Sender<i64>>,
    /// Whether users may write now.
    pub(crate) gate: Arc<Gate>,
    /// Bytes that a namespace without a quota of its own may use.
    pub(crate) quota: Option<i64>,
    /// Told of each COMMIT that left events without a number.
    pub(crate) unsealed: Arc<Notify>,
}

impl Context {
    pub(crate) fn new() -> Self {
        Self {
            clock: Arc::default(),
            signal: Arc::new(watch::channel(0).0),
            unsealed: Arc::default(),
            gate: Arc::default(),
            quota: None,
        }
    }

    /// Called after a COMMIT that wrote the event of this number: the commit itself wakes the readers,
    /// whether or not whoever asked for it still waits.
    pub(crate) fn committed(&self, event: i64) {
        if event > 0 {
            self.signal.send_if_modified(|newest| {
                let higher = event > *newest;
                *newest = event.max(*newest);
                higher
            });
        }
    }
}

/// One transaction as a value. `run` may be called again on the same value, and it awaits only `tx`.
pub(crate) trait Body: Send + Sync + 'static {
    type Output: Send + 'static;

    /// Who writes, and so whether it may run in a read-only mode.
    const KIND: WriteKind = WriteKind::User;

    fn run(&self, tx: &mut Tx) -> impl Future<Output = Result<Self::Output, Error>> + Send;
}

/// Runs a body and then, as its last locks, what it changes in the collector's queue.
async fn run_body<B: Body>(body: &B, tx: &mut Tx) -> Result<B::Output, Error> {
    tx.queue = QueueChanges::default();
    let output = body.run(tx).await?;
    collect::change_queue(tx).await?;
    Ok(output)
}

/// Whose write a transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteKind {
    /// A caller's: refused in every read-only mode.
    User,
    /// A caller's that takes something away: goes on when the disk is full, because it makes room, and is refused when
    /// the mode was commanded.
    Delete,
    /// A caller's that keeps something from being taken away: goes on when the mode was commanded, because the collector
    /// does too, and is refused when the disk is full.
    Protect,
    /// The store's own, such as the collector's: goes on in the read-only mode, because it makes room, and is refused
    /// where the store is being carried away or was.
    Maintenance,
    /// That of a transfer, which says where the store is: never refused.
    Place,
}

/// A transaction that is running.
pub(crate) struct Tx {
    connection: Connection,
    context: Context,
    now: Timestamp,
    event: i64,
    unsealed: bool,
    /// Changes of the collector's queue, which are made last.
    pub(crate) queue: QueueChanges,
}

enum Connection {
    Sqlite(Box<rusqlite::Connection>),
    Postgres(Box<postgres::Session>),
}

impl Tx {
    fn new(connection: Connection, context: Context) -> Self {
        let now = context.clock.now();
        Self {
            connection,
            context,
            now,
            event: 0,
            unsealed: false,
            queue: QueueChanges::default(),
        }
    }

    /// Another transaction took what this one would have to wait for outside the order of locks, or changed what this
    /// one had found: it is repeated from its beginning. On SQLite that never happens.
    pub(crate) fn again(&mut self, what: &str) -> Error {
        if let Connection::Postgres(session) = &mut self.connection {
            session.give_way();
        }
        Error::Unavailable {
            what: "the database",
            problem: format!("{what} changes too often, try again"),
        }
    }

    /// Whether it runs on PostgreSQL.
    pub(crate) fn is_postgres(&self) -> bool {
        matches!(self.connection, Connection::Postgres(_))
    }

    /// The time of this transaction.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    /// A new row id.
    pub(crate) fn id(&self) -> i64 {
        self.context.clock.id()
    }

    /// Waits until no transaction of a user is under way, and keeps new ones back until this one ends. On SQLite the one
    /// writer does both.
    pub(crate) async fn exclude_users(&mut self) -> Result<(), Error> {
        match &mut self.connection {
            Connection::Sqlite(_) => Ok(()),
            Connection::Postgres(session) => session.exclude_users().await,
        }
    }

    /// The quota of namespaces that have none of their own, in bytes.
    pub(crate) fn default_quota(&self) -> Option<i64> {
        self.context.quota
    }

    /// Notes that this transaction wrote the event of this number, to be announced after its COMMIT.
    pub(crate) fn note_event(&mut self, number: i64) {
        self.event = self.event.max(number);
    }

    /// Whether events get their numbers after the COMMIT, by the sealer.
    pub(crate) fn seals_events(&self) -> bool {
        matches!(self.connection, Connection::Postgres(_))
    }

    /// Notes that this transaction wrote events without a number.
    pub(crate) fn note_unsealed(&mut self) {
        self.unsealed = true;
    }

    /// Waits until no other replica is at the work of this lock; it ends with the transaction. SQLite's one writer is
    /// alone anyway.
    pub(crate) async fn lock(&mut self, lock: Lock) -> Result<(), Error> {
        if let Connection::Postgres(_) = self.connection {
            self.query(&TAKE_LOCK, &[lock.key().into()]).await?;
        }
        Ok(())
    }

    /// Takes the lock unless another replica is at its work; `false` then.
    pub(crate) async fn try_lock(&mut self, lock: Lock) -> Result<bool, Error> {
        match self.connection {
            Connection::Sqlite(_) => Ok(true),
            Connection::Postgres(_) => {
                let rows = self.query(&TRY_LOCK, &[lock.key().into()]).await?;
                rows.first().map_or(Ok(false), |row| Ok(row.i64(0)? != 0))
            }
        }
    }

    /// Runs a statement and returns its rows.
    pub(crate) async fn query(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        match &mut self.connection {
            Connection::Sqlite(connection) => sqlite::query(connection, statement, values),
            Connection::Postgres(session) => session.query(statement, values).await,
        }
    }

    /// Runs a statement that gives at most one row.
    pub(crate) async fn query_opt(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Option<Row>, Error> {
        Ok(self.query(statement, values).await?.into_iter().next())
    }

    /// Runs a statement that gives no rows and returns how many it changed.
    pub(crate) async fn execute(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<u64, Error> {
        match &mut self.connection {
            Connection::Sqlite(connection) => sqlite::execute(connection, statement, values),
            Connection::Postgres(session) => session.execute(statement, values).await,
        }
    }
}

/// Work that one replica does at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lock {
    /// Numbering events.
    Events,
    /// Sealing audit records.
    Audit,
    /// Folding and pruning.
    Upkeep,
}

impl Lock {
    /// Random numbers, so that other programs in the same database are not met.
    fn key(self) -> i64 {
        match self {
            Self::Events => 6_129_484_611_666_145_821,
            Self::Audit => 4_037_200_794_235_010_051,
            Self::Upkeep => 1_976_235_410_884_491_574,
        }
    }
}

statements! {
    TAKE_LOCK = "{postgres}SELECT CAST(pg_advisory_xact_lock($1) AS TEXT) AS done";
    TRY_LOCK = "{postgres}SELECT CASE WHEN pg_try_advisory_xact_lock($1) THEN CAST(1 AS BIGINT) ELSE 0 END AS taken";
}

#[cfg(test)]
mod tests;
