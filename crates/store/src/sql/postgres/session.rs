//! One connection, the statements prepared on it, and the one transaction that it may have open.
//!
//! A COMMIT that was sent and not answered has an outcome that only the database knows. So the last statement of
//! every transaction that wrote puts its number into the session's row of `commit_mark`, together with the COMMIT in
//! one round trip. Whoever has to know the outcome turns that row into a fence ([`fence`]): the number that was there
//! tells what was committed, and a COMMIT that is still under way can no longer succeed. A transaction id would not
//! do: ids that never reached the log are used again after a crash or by a promoted standby.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, SimpleQueryMessage};

use super::super::{Row, Statement, Value, WriteKind};
use super::fault::{Failure, Fault};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::mode;

/// A connection of the pool.
pub(crate) struct Session {
    pub(super) client: Client,
    prepared: HashMap<&'static str, tokio_postgres::Statement>,
    /// The key of its commit mark.
    pub(super) id: i64,
    /// The number of its last transaction that wrote.
    pub(super) commits: i64,
    /// Whether the server took writes when the session began.
    pub(super) writable: bool,
    pub(super) opened: Instant,
    pub(super) used: Instant,
    /// Set by a warning of the server, such as of a COMMIT that did not wait for its standby.
    pub(super) warned: Arc<AtomicBool>,
    transaction: Transaction,
    /// Present while somebody uses the session; an idle one is free for others.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// The state of the one transaction.
#[derive(Default)]
struct Transaction {
    /// BEGIN goes out with the first statement of a transaction of this kind.
    to_begin: Option<WriteKind>,
    wrote: bool,
    /// The first failure of a statement in it.
    fault: Option<Fault>,
}

/// How a transaction ended.
#[derive(Debug)]
pub(super) enum End {
    /// It is durable.
    Committed,
    /// It never happened.
    RolledBack(Failure),
    /// The connection died between COMMIT and its answer.
    Unknown,
}

impl Session {
    pub(super) fn new(client: Client, id: i64, writable: bool, warned: Arc<AtomicBool>) -> Self {
        let now = Instant::now();
        Self {
            client,
            prepared: HashMap::new(),
            id,
            commits: 0,
            writable,
            opened: now,
            used: now,
            warned,
            transaction: Transaction::default(),
            permit: None,
        }
    }

    /// Begins a transaction; the server learns of it with the first statement.
    pub(super) fn begin(&mut self, kind: WriteKind) {
        self.transaction = Transaction {
            to_begin: Some(kind),
            ..Transaction::default()
        };
    }

    /// Forgets how the last use went.
    pub(super) fn rest(&mut self) {
        self.transaction = Transaction::default();
        self.used = Instant::now();
    }

    /// The first failure of a statement in the transaction.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.transaction.fault
    }

    /// Notes that the transaction is to be rolled back and repeated.
    pub(in crate::sql) fn give_way(&mut self) {
        self.transaction.fault.get_or_insert(Fault::GaveWay);
    }

    /// Commits, with the mark when something was written.
    pub(super) async fn commit(&mut self, now: Timestamp) -> End {
        if self.transaction.to_begin.take().is_some() {
            return End::Committed;
        }
        if !self.transaction.wrote {
            return match limited(COMMIT_LIMIT, self.client.batch_execute(COMMIT)).await {
                Ok(()) => End::Committed,
                Err(failure) => End::RolledBack(failure),
            };
        }
        let mark = match self.prepare("commit_mark", MARK).await {
            Ok(mark) => mark,
            Err(failure) => return End::RolledBack(failure),
        };
        self.commits += 1;
        self.warned.store(false, Ordering::Relaxed);
        let values: [&(dyn ToSql + Sync); 3] = [&self.id, &self.commits, &now.0];
        // The server takes them in order. When the mark is refused the transaction is broken, and so is its COMMIT.
        let both = async {
            tokio::join!(
                self.client.execute(&mark, &values),
                self.client.batch_execute(COMMIT)
            )
        };
        let Ok((marked, committed)) = tokio::time::timeout(COMMIT_LIMIT, both).await else {
            return End::Unknown;
        };
        let failure = match (marked, committed) {
            (Ok(_), Ok(())) if self.warned.load(Ordering::Relaxed) => return End::Unknown,
            (Ok(_), Ok(())) => return End::Committed,
            (Err(error), _) | (Ok(_), Err(error)) => Failure::from(error),
        };
        if failure.ends_session() {
            End::Unknown
        } else {
            End::RolledBack(failure)
        }
    }

    /// Rolls back; `false` when the session must not be used again.
    pub(super) async fn roll_back(&mut self) -> bool {
        if self.transaction.to_begin.take().is_some() {
            return true;
        }
        self.transaction.fault != Some(Fault::Lost)
            && self.transaction.fault != Some(Fault::Stale)
            && limited(CONTROL_LIMIT, self.client.batch_execute("ROLLBACK"))
                .await
                .is_ok()
    }

    /// Whether the server answers.
    pub(super) async fn answers(&self) -> bool {
        limited(CONTROL_LIMIT, self.client.batch_execute(""))
            .await
            .is_ok()
    }

    pub(in crate::sql) async fn query(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        let rows = match self.try_query(statement, values).await {
            Ok(rows) => rows,
            Err(failure) => return Err(self.failed(statement, failure)),
        };
        statement.mark_postgres();
        rows.iter().map(|row| convert(statement, row)).collect()
    }

    pub(in crate::sql) async fn execute(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<u64, Error> {
        match self.try_execute(statement, values).await {
            Ok(changed) => {
                statement.mark_postgres();
                Ok(changed)
            }
            Err(failure) => Err(self.failed(statement, failure)),
        }
    }

    async fn try_query(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<tokio_postgres::Row>, Failure> {
        let prepared = self.ready(statement).await?;
        let parameters = parameters(values);
        if let Some(kind) = self.transaction.to_begin.take() {
            // Only a statement that writes nothing goes out before BEGIN was answered.
            let text = begin(kind);
            let (begun, rows) = limited(STATEMENT_LIMIT, async {
                Ok(tokio::join!(
                    self.client.simple_query(&text),
                    self.client.query(&prepared, &parameters)
                ))
            })
            .await?;
            check(kind, &begun?)?;
            return Ok(rows?);
        }
        limited(STATEMENT_LIMIT, self.client.query(&prepared, &parameters)).await
    }

    async fn try_execute(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<u64, Failure> {
        let prepared = self.ready(statement).await?;
        let parameters = parameters(values);
        limited(STATEMENT_LIMIT, self.client.execute(&prepared, &parameters)).await
    }

    /// The statement prepared, and the transaction begun unless it can begin together with the statement.
    async fn ready(
        &mut self,
        statement: &'static Statement,
    ) -> Result<tokio_postgres::Statement, Failure> {
        let text = statement.postgres();
        let writes = !text.starts_with("SELECT");
        self.transaction.wrote |= writes;
        let known = self.prepared.get(statement.name).cloned();
        if let (Some(prepared), false) = (&known, writes) {
            return Ok(prepared.clone());
        }
        let Some(kind) = self.transaction.to_begin.take() else {
            return self.prepare(statement.name, text).await;
        };
        let begin = begin(kind);
        let (begun, prepared) = limited(STATEMENT_LIMIT, async {
            let prepare = async {
                match known {
                    Some(prepared) => Ok(prepared),
                    None => self.client.prepare(text).await,
                }
            };
            Ok(tokio::join!(self.client.simple_query(&begin), prepare))
        })
        .await?;
        check(kind, &begun?)?;
        let prepared = prepared?;
        self.prepared.insert(statement.name, prepared.clone());
        Ok(prepared)
    }

    async fn prepare(
        &mut self,
        name: &'static str,
        text: &str,
    ) -> Result<tokio_postgres::Statement, Failure> {
        if let Some(prepared) = self.prepared.get(name) {
            return Ok(prepared.clone());
        }
        let prepared = limited(STATEMENT_LIMIT, self.client.prepare(text)).await?;
        self.prepared.insert(name, prepared.clone());
        Ok(prepared)
    }

    /// Waits until no transaction of a user is under way, and keeps new ones back until this one ends.
    pub(in crate::sql) async fn exclude_users(&mut self) -> Result<(), Error> {
        let begins = self.transaction.to_begin.take();
        // Who holds the others off may have set a mark meanwhile, so it is looked for after the wait.
        let text = match begins {
            Some(_) => format!(
                "{BEGIN}; SELECT pg_advisory_xact_lock({USERS}); {}",
                mode::CHECK.postgres()
            ),
            None => format!("SELECT pg_advisory_xact_lock({USERS})"),
        };
        let alone = limited(STATEMENT_LIMIT, self.client.simple_query(&text)).await;
        alone
            .and_then(|answers| begins.map_or(Ok(()), |kind| check(kind, &answers)))
            .map_err(|failure| {
                self.transaction.fault = Some(failure.fault());
                failure.error(None)
            })
    }

    fn failed(&mut self, statement: &Statement, failure: Failure) -> Error {
        let fault = failure.fault();
        if self.transaction.fault.is_none() || fault == Fault::Lost {
            self.transaction.fault = Some(fault);
        }
        failure.error(Some(statement.name))
    }
}

/// Begins a transaction and reads what the store is marked with: one round trip for both. One of a user also holds off
/// whoever sets such a mark.
fn begin(kind: WriteKind) -> String {
    match kind {
        WriteKind::Place => BEGIN.to_owned(),
        WriteKind::Maintenance => format!("{BEGIN}; {}", mode::CHECK.postgres()),
        WriteKind::User | WriteKind::Delete | WriteKind::Protect => format!(
            "{BEGIN}; SELECT pg_advisory_xact_lock_shared({USERS}); {}",
            mode::CHECK.postgres()
        ),
    }
}

/// Refuses the transaction when the answer to its begin tells of a mark that forbids it. The lock gives a row of its
/// own, which has no such columns.
fn check(kind: WriteKind, answers: &[SimpleQueryMessage]) -> Result<(), Failure> {
    for answer in answers {
        let SimpleQueryMessage::Row(row) = answer else {
            continue;
        };
        let text = |column: &str| row.try_get(column).ok().flatten();
        if let (Some(key), Some(value)) = (text("key"), text("value")) {
            mode::check_mark(kind, key, value).map_err(Failure::Refused)?;
        }
    }
    Ok(())
}

/// Puts a fence into the row of session `id` and tells the number of its last transaction that was committed. Waits
/// for one that is just being committed. The answer is as durable as any COMMIT.
pub(super) async fn fence(client: &Client, id: i64, now: Timestamp) -> Result<i64, Failure> {
    let mark = limited(STATEMENT_LIMIT, client.prepare(FENCE)).await?;
    limited(CONTROL_LIMIT, client.batch_execute(BEGIN)).await?;
    let values: [&(dyn ToSql + Sync); 2] = [&id, &now.0];
    let last: i64 = limited(STATEMENT_LIMIT, client.query_one(&mark, &values))
        .await?
        .try_get(0)?;
    limited(COMMIT_LIMIT, client.batch_execute(COMMIT)).await?;
    Ok(last)
}

/// Runs a request to the server, but not for ever: a server that is stuck or gone does not always say so.
pub(super) async fn limited<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, request).await {
        Ok(outcome) => outcome.map_err(Failure::from),
        Err(_) => Err(Failure::NoAnswer(limit)),
    }
}

fn parameters(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values
        .iter()
        .map(|value| value as &(dyn ToSql + Sync))
        .collect()
}

fn convert(statement: &Statement, row: &tokio_postgres::Row) -> Result<Row, Error> {
    let mut cells = Vec::with_capacity(row.len());
    for (index, column) in row.columns().iter().enumerate() {
        let cell = match *column.type_() {
            Type::INT8 => row.try_get::<_, Option<i64>>(index).map(Value::from),
            Type::TEXT => row.try_get::<_, Option<String>>(index).map(Value::from),
            Type::BYTEA => row.try_get::<_, Option<Vec<u8>>>(index).map(Value::from),
            ref other => {
                return Err(Error::Database(format!(
                    "`{}` gives column `{}` of type `{other}`",
                    statement.name,
                    column.name()
                )));
            }
        };
        cells.push(cell.map_err(|error| Failure::from(error).error(Some(statement.name)))?);
    }
    Ok(Row(cells))
}

/// The advisory lock that every transaction of a user shares, and that the command to be read-only takes alone.
const USERS: i64 = 0x6c6f_6e67_7368_6f72;
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
/// A COMMIT that waits for its standby is not cut short: what it would then report as done is not on the standby.
/// In a transaction that a failed statement broke, the first part is refused and COMMIT, which would roll back
/// without a word, is not run.
const COMMIT: &str = "SET LOCAL statement_timeout = 0; COMMIT";
/// Behind a fence the number becomes NULL, which the column refuses.
const MARK: &str = "INSERT INTO commit_mark (session, last, at) VALUES ($1, $2, $3) \
    ON CONFLICT (session) DO UPDATE SET at = excluded.at, \
        last = CASE WHEN commit_mark.last < 0 THEN NULL ELSE excluded.last END";
const FENCE: &str = "INSERT INTO commit_mark (session, last, at) VALUES ($1, -1, $2) \
    ON CONFLICT (session) DO UPDATE SET at = excluded.at, \
        last = CASE WHEN commit_mark.last < 0 THEN commit_mark.last ELSE -1 - commit_mark.last END \
    RETURNING -1 - last";

/// The server's own limit of a statement, in the form of its setting.
pub(super) const STATEMENT_TIMEOUT: &str = "30s";
/// Somewhat longer than the server's own.
const STATEMENT_LIMIT: Duration = Duration::from_secs(35);
const COMMIT_LIMIT: Duration = Duration::from_mins(1);
pub(super) const CONTROL_LIMIT: Duration = Duration::from_secs(3);
