//! The PostgreSQL engine: a bounded pool of sessions, transactions at READ COMMITTED that are repeated
//! after a conflict.
//!
//! READ COMMITTED is weaker than SQLite's one writer, so every read that a write depends on takes a row
//! lock or is backed by a constraint.

mod settings;

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::migration::Migration;
use super::{Body, Connection, Context, Row, Statement, Tx, Value, WriteKind};
use crate::error::Error;
use crate::mode;

pub(crate) struct Postgres {
    pool: Arc<Pool>,
    context: Context,
}

struct Pool {
    url: String,
    idle: Mutex<Vec<Session>>,
    permits: Arc<Semaphore>,
}

/// One connection with the statements prepared on it.
pub(crate) struct Session {
    client: Client,
    prepared: HashMap<&'static str, tokio_postgres::Statement>,
    /// Set by a statement that failed on a conflict with another transaction.
    conflict: bool,
    /// Present while somebody uses the session; an idle one is free for others.
    permit: Option<OwnedSemaphorePermit>,
}

impl Postgres {
    pub(super) async fn open(
        url: &str,
        migrations: &'static [Migration],
        context: Context,
    ) -> Result<Self, Error> {
        let pool = Arc::new(Pool {
            url: url.to_owned(),
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_SESSIONS)),
        });
        let session = pool.take().await?;
        super::migration::migrate_postgres(&session.client, migrations).await?;
        pool.give_back(session);
        Ok(Self { pool, context })
    }

    /// Runs a transaction in a task of its own, so that it ends even when its caller goes away.
    pub(super) async fn write<B: Body>(&self, body: B) -> Result<B::Output, Error> {
        let pool = Arc::clone(&self.pool);
        let context = self.context.clone();
        tokio::spawn(async move { transact(&pool, &context, &body).await })
            .await
            .unwrap_or_else(|_| Err(Error::Database("a transaction panicked".to_owned())))
    }

    pub(super) async fn read(
        &self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        let mut session = self.pool.take().await?;
        let rows = session.query(statement, values).await;
        if rows.is_ok() {
            self.pool.give_back(session);
        }
        rows
    }

    /// Tells whether the server follows another one and takes no writes.
    pub(super) async fn in_recovery(&self) -> Result<bool, Error> {
        let session = self.pool.take().await?;
        let answers = session
            .client
            .simple_query("SELECT pg_is_in_recovery()")
            .await
            .map_err(|error| map(&error))?;
        self.pool.give_back(session);
        Ok(answers.iter().any(
            |answer| matches!(answer, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")),
        ))
    }

    pub(super) fn close(&self) {
        self.pool.permits.close();
        lock(&self.pool.idle).clear();
    }
}

/// Checks a connection string without connecting; what is wrong with it never shows it.
pub(crate) fn check(text: &str) -> Result<(), String> {
    settings::Settings::parse(text).map(drop)
}

async fn transact<B: Body>(
    pool: &Arc<Pool>,
    context: &Context,
    body: &B,
) -> Result<B::Output, Error> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let session = pool.take().await?;
        context.gate.check(B::KIND)?;
        let commanded = session.begin(B::KIND).await?;
        if let Err(refusal) = mode::check_command(B::KIND, commanded.as_deref()) {
            let _ = session.client.batch_execute("ROLLBACK").await;
            pool.give_back(session);
            return Err(refusal);
        }
        let mut tx = Tx::new(Connection::Postgres(Box::new(session)), context.clone());
        let outcome = body.run(&mut tx).await;
        let event = tx.event;
        let Connection::Postgres(mut session) = tx.connection else {
            return Err(Error::Stopped);
        };
        let end = if outcome.is_ok() {
            "COMMIT"
        } else {
            "ROLLBACK"
        };
        // A session whose end is unknown is dropped with its connection, never used again.
        let ended = session.client.batch_execute(end).await;
        let mut conflict = std::mem::take(&mut session.conflict);
        let failure = match (outcome, ended) {
            (Ok(output), Ok(())) => {
                pool.give_back(*session);
                context.committed(event);
                return Ok(output);
            }
            (Ok(_), Err(error)) => {
                conflict = is_conflict(&error);
                map(&error)
            }
            (Err(failure), Ok(())) => {
                pool.give_back(*session);
                failure
            }
            (Err(failure), Err(_)) => failure,
        };
        if !conflict || attempt == MAX_ATTEMPTS {
            return Err(failure);
        }
        let mut random = [0; 1];
        let _ = getrandom::fill(&mut random);
        let wait = u64::from(random[0]) * attempt;
        tokio::time::sleep(Duration::from_micros(100 + wait * 20)).await;
    }
}

impl Pool {
    async fn take(&self) -> Result<Session, Error> {
        let permit = Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .map_err(|_| Error::Stopped)?;
        loop {
            let idle = lock(&self.idle).pop();
            match idle {
                Some(mut session) if !session.client.is_closed() => {
                    session.permit = Some(permit);
                    return Ok(session);
                }
                Some(_) => {}
                None => break,
            }
        }
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls)
            .await
            .map_err(|error| map(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::warn!(%error, "a connection to the database ended");
            }
        });
        client
            .batch_execute(
                "SET synchronous_commit = on; SET statement_timeout = '30s'; \
                 SET idle_in_transaction_session_timeout = '30s'",
            )
            .await
            .map_err(|error| map(&error))?;
        Ok(Session {
            client,
            prepared: HashMap::new(),
            conflict: false,
            permit: Some(permit),
        })
    }

    fn give_back(&self, mut session: Session) {
        if session.client.is_closed() {
            return;
        }
        let permit = session.permit.take();
        lock(&self.idle).push(session);
        drop(permit);
    }
}

impl Session {
    /// Begins a transaction. One of a user holds off the command that makes the store read-only, and reads what was
    /// commanded before: one round trip for all.
    async fn begin(&self, kind: WriteKind) -> Result<Option<String>, Error> {
        let text = match kind {
            WriteKind::Maintenance => "BEGIN ISOLATION LEVEL READ COMMITTED".to_owned(),
            WriteKind::User | WriteKind::Delete => format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock_shared({USERS}); {}",
                mode::CHECK.postgres()
            ),
        };
        let answers = self
            .client
            .simple_query(&text)
            .await
            .map_err(|error| map(&error))?;
        // The lock gives a row of its own, which has no such column.
        Ok(answers.iter().find_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => row.try_get("value").ok().flatten().map(str::to_owned),
            _ => None,
        }))
    }

    pub(super) async fn exclude_users(&mut self) -> Result<(), Error> {
        self.client
            .batch_execute(&format!("SELECT pg_advisory_xact_lock({USERS})"))
            .await
            .map_err(|error| map(&error))
    }

    pub(super) async fn query(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<Vec<Row>, Error> {
        let prepared = self.prepare(statement).await?;
        let parameters = parameters(values);
        let rows = match self.client.query(&prepared, &parameters).await {
            Ok(rows) => rows,
            Err(error) => return Err(self.failed(statement, &error)),
        };
        statement.mark_postgres();
        rows.iter().map(|row| convert(statement, row)).collect()
    }

    pub(super) async fn execute(
        &mut self,
        statement: &'static Statement,
        values: &[Value],
    ) -> Result<u64, Error> {
        let prepared = self.prepare(statement).await?;
        let parameters = parameters(values);
        match self.client.execute(&prepared, &parameters).await {
            Ok(changed) => {
                statement.mark_postgres();
                Ok(changed)
            }
            Err(error) => Err(self.failed(statement, &error)),
        }
    }

    async fn prepare(
        &mut self,
        statement: &'static Statement,
    ) -> Result<tokio_postgres::Statement, Error> {
        if let Some(prepared) = self.prepared.get(statement.name) {
            return Ok(prepared.clone());
        }
        match self.client.prepare(statement.postgres()).await {
            Ok(prepared) => {
                self.prepared.insert(statement.name, prepared.clone());
                Ok(prepared)
            }
            Err(error) => Err(self.failed(statement, &error)),
        }
    }

    fn failed(&mut self, statement: &Statement, error: &tokio_postgres::Error) -> Error {
        self.conflict |= is_conflict(error);
        match map(error) {
            Error::Database(text) => Error::Database(format!("`{}`: {text}", statement.name)),
            other => other,
        }
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
        cells.push(cell.map_err(|error| map(&error))?);
    }
    Ok(Row(cells))
}

impl ToSql for Value {
    fn to_sql(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match (self, kind) {
            (Self::Null, _) => Ok(IsNull::Yes),
            (Self::I64(value), &Type::INT8) => value.to_sql(kind, out),
            (Self::Text(value), &Type::TEXT) => value.to_sql(kind, out),
            (Self::Blob(value), &Type::BYTEA) => value.to_sql(kind, out),
            (value, kind) => Err(format!("a parameter of type {kind} was given {value:?}").into()),
        }
    }

    fn accepts(kind: &Type) -> bool {
        matches!(*kind, Type::INT8 | Type::TEXT | Type::BYTEA)
    }

    to_sql_checked!();
}

/// Failures after which the same transaction may succeed: serialisation, dead lock, and a key that another
/// one took between our look and our insert.
fn is_conflict(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| {
        [
            SqlState::T_R_SERIALIZATION_FAILURE,
            SqlState::T_R_DEADLOCK_DETECTED,
            SqlState::UNIQUE_VIOLATION,
            SqlState::FOREIGN_KEY_VIOLATION,
        ]
        .contains(code)
    })
}

pub(super) fn map(error: &tokio_postgres::Error) -> Error {
    if error.code() == Some(&SqlState::DISK_FULL) {
        return Error::Full;
    }
    if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
        return Error::ReadOnly {
            reason: mode::RECOVERY.to_owned(),
        };
    }
    // The driver's own text leaves out what the server said.
    let mut text = error.to_string();
    if let Some(source) = error.source() {
        text = format!("{text}: {source}");
    }
    Error::Database(text)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The advisory lock that every transaction of a user shares, and that the command to be read-only takes alone.
const USERS: i64 = 0x6c6f_6e67_7368_6f72;
const MAX_SESSIONS: usize = 16;
const MAX_ATTEMPTS: u64 = 10;
