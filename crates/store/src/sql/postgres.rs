//! The PostgreSQL engine: a bounded pool of sessions, transactions at READ COMMITTED that are repeated
//! after a conflict or the loss of their session.
//!
//! READ COMMITTED is weaker than SQLite's one writer, so every read that a write depends on takes a row
//! lock or is backed by a constraint. A transaction is repeated only when it is known not to have happened; where
//! the connection died during COMMIT the database is asked first (see [`session`]).

mod fault;
mod pool;
mod session;
mod settings;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::migration::Migration;
use super::{Body, Connection, Context, Row, Statement, Tx, Value, run_body};
use crate::error::Error;
use crate::failpoint::failpoint;
use fault::{Failure, Fault, unavailable};
use pool::{Pool, Raw};
use session::{CONTROL_LIMIT, End, fence, limited};

pub(crate) use session::Session;

pub(crate) struct Postgres {
    pool: Arc<Pool>,
    context: Context,
    stopped: watch::Sender<bool>,
}

impl Postgres {
    pub(super) async fn open(
        url: &str,
        connections: usize,
        migrations: &'static [Migration],
        context: Context,
    ) -> Result<Self, Error> {
        let pool = Arc::new(Pool::new(url, connections, Arc::clone(&context.clock))?);
        let session = pool.take().await?;
        super::migration::migrate_postgres(&session.client, migrations).await?;
        pool.give_back(session);
        Ok(Self {
            pool,
            context,
            stopped: watch::channel(false).0,
        })
    }

    /// Connects without changing anything.
    pub(super) async fn look(
        url: &str,
        migrations: &'static [Migration],
        context: Context,
    ) -> Result<Self, Error> {
        let pool = Arc::new(Pool::new(url, LOOKERS, Arc::clone(&context.clock))?);
        let session = pool.take().await?;
        super::migration::check_postgres(&session.client, migrations).await?;
        pool.give_back(session);
        Ok(Self {
            pool,
            context,
            stopped: watch::channel(false).0,
        })
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
        let mut attempt = 0;
        loop {
            attempt += 1;
            let failure = match self.pool.take().await {
                Ok(mut session) => match session.query(statement, values).await {
                    Ok(rows) => {
                        self.pool.give_back(session);
                        return Ok(rows);
                    }
                    Err(failure) => match session.fault() {
                        Some(Fault::Lost) => {
                            self.pool.forget_idle();
                            failure
                        }
                        Some(Fault::Stale) => failure,
                        _ => return Err(failure),
                    },
                },
                Err(failure @ Error::Unavailable { .. }) => failure,
                Err(other) => return Err(other),
            };
            if attempt >= MAX_READS || !self.pool.may_come_back() {
                return Err(failure);
            }
            pause(attempt).await;
        }
    }

    /// A read-only transaction on a session of its own, which goes with it.
    pub(super) async fn snapshot(&self) -> Result<Tx, Error> {
        let session = self.pool.take().await?;
        limited(
            CONTROL_LIMIT,
            session.client.batch_execute(
                "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
                 BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1 FROM meta LIMIT 1",
            ),
        )
        .await
        .map_err(|failure| failure.error(None))?;
        Ok(Tx::new(
            Connection::Postgres(Box::new(session)),
            self.context.clone(),
        ))
    }

    /// Tells whether the server takes no writes.
    pub(super) async fn in_recovery(&self) -> Result<bool, Error> {
        let session = self.pool.take().await?;
        let writable = session.writable;
        self.pool.give_back(session);
        Ok(!writable)
    }

    /// A session that hears what is said on a channel. The name is ours and needs no quoting.
    pub(super) async fn listen(&self, channel: &str) -> Result<Listener, Error> {
        let raw = self.pool.open().await?;
        limited(
            CONTROL_LIMIT,
            raw.client.batch_execute(&format!("LISTEN {channel}")),
        )
        .await
        .map_err(|failure| failure.error(None))?;
        Ok(Listener(raw))
    }

    /// Acknowledges nothing any more.
    pub(super) fn stop(&self, reason: &str) {
        tracing::error!(reason, "the store stops");
        self.pool.close();
        self.stopped.send_replace(true);
    }

    pub(super) async fn stopped(&self) {
        // The sender lives as long as this, so there is no error.
        let _ = self.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }

    /// How many other connections use the database.
    pub(super) async fn others(url: &str) -> Result<u64, Error> {
        let pool = Pool::new(url, 1, Arc::default())?;
        let session = pool.take().await?;
        let counted = session.client.query_one(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() \
             AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
            &[],
        );
        let count: i64 = limited(CONTROL_LIMIT, counted)
            .await
            .map_err(|failure| failure.error(None))?
            .get(0);
        Ok(count.unsigned_abs())
    }

    pub(super) fn close(&self) {
        self.pool.close();
    }
}

/// Hears notifications until its connection ends.
pub(crate) struct Listener(Raw);

impl Listener {
    /// The next payload; `None` after a while without one, when the server still answers.
    ///
    /// # Errors
    /// The connection has ended, or the server takes no writes and so sends none.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, Error> {
        match tokio::time::timeout(SILENCE, self.0.notifications.recv()).await {
            Ok(Some(payload)) => Ok(Some(payload)),
            Ok(None) => Err(unavailable("the connection that hears of events ended")),
            Err(_) if !self.0.writable => Err(unavailable("the server takes no writes")),
            Err(_) => limited(CONTROL_LIMIT, self.0.client.batch_execute(""))
                .await
                .map(|()| None)
                .map_err(|failure| failure.error(None)),
        }
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
        context.gate.check(B::KIND)?;
        let (failure, fault) = match pool.take().await {
            Ok(session) => match once(pool, context, body, session).await {
                Ok(output) => return Ok(output),
                Err(failed) => failed,
            },
            Err(failure @ Error::Unavailable { .. }) => (failure, Fault::Lost),
            Err(other) => return Err(other),
        };
        let again = match fault {
            Fault::Conflict | Fault::Stale => attempt < MAX_ATTEMPTS,
            Fault::GaveWay => attempt < MAX_TURNS,
            Fault::Lost | Fault::ReadOnly => pool.may_come_back() && attempt < MAX_WAITS,
            Fault::Other => false,
        };
        if !again {
            return Err(failure);
        }
        match fault {
            Fault::Conflict | Fault::GaveWay | Fault::Stale => {
                pause_briefly(attempt.min(MAX_ATTEMPTS)).await;
            }
            _ => pause(attempt).await,
        }
    }
}

/// Runs the body once, to an end that is known.
async fn once<B: Body>(
    pool: &Arc<Pool>,
    context: &Context,
    body: &B,
    mut session: Session,
) -> Result<B::Output, (Error, Fault)> {
    session.begin(B::KIND);
    let mut tx = Tx::new(Connection::Postgres(Box::new(session)), context.clone());
    let outcome = run_body(body, &mut tx).await;
    let (event, unsealed, now) = (tx.event, tx.unsealed, tx.now);
    let Connection::Postgres(session) = tx.connection else {
        return Err((Error::Stopped, Fault::Other));
    };
    let mut session = *session;
    let output = match outcome {
        Ok(output) => output,
        Err(failure) => {
            let fault = session.fault().unwrap_or(Fault::Other);
            // A session that cannot be rolled back is dropped with its connection, never used again.
            match fault {
                Fault::Lost => pool.forget_idle(),
                Fault::ReadOnly if session.writable => {
                    pool.note_read_only();
                    context.gate.note_recovery(true);
                }
                _ if session.roll_back().await => pool.give_back(session),
                _ => {}
            }
            return Err((failure, fault));
        }
    };
    failpoint("sql.before_commit");
    match session.commit(now).await {
        End::Committed => pool.give_back(session),
        End::RolledBack(failure) => {
            // The server may still hold the transaction open; it ends with the connection.
            let fault = failure.fault();
            return Err((failure.error(None), fault));
        }
        End::Unknown => {
            let committed = resolve(pool, context, session).await;
            if !committed.map_err(|failure| (failure, Fault::Other))? {
                return Err((
                    unavailable("the connection was lost before the change was committed"),
                    Fault::Lost,
                ));
            }
        }
    }
    failpoint("sql.after_commit");
    context.committed(event);
    if unsealed {
        context.unsealed.notify_one();
    }
    Ok(output)
}

/// Finds out whether the last transaction of a session that was lost is committed.
async fn resolve(pool: &Arc<Pool>, context: &Context, mut session: Session) -> Result<bool, Error> {
    let (id, number) = (session.id, session.commits);
    // Held to the end, so that the bound of sessions holds.
    let _permit = session.permit.take();
    drop(session);
    pool.forget_idle();
    let deadline = Instant::now() + RESOLVE;
    let mut attempt = 0;
    while Instant::now() < deadline {
        attempt += 1;
        match pool.open().await {
            Ok(raw) if raw.writable => match fence(&raw.client, id, context.clock.now()).await {
                Ok(last) => {
                    let committed = last == number;
                    tracing::info!(
                        committed,
                        "a connection was lost during a COMMIT, and its outcome was found out"
                    );
                    return Ok(committed);
                }
                Err(failure) => {
                    tracing::debug!(?failure, "the outcome of a COMMIT is not known yet");
                }
            },
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the outcome of a COMMIT is not known yet"),
        }
        pause(attempt).await;
    }
    Err(unavailable(
        "the connection was lost while a change was committed; whether it stands can be seen when the database is back",
    ))
}

/// After a conflict: the other one is nearly done.
async fn pause_briefly(attempt: u64) {
    let wait = u64::from(random()) * attempt;
    tokio::time::sleep(Duration::from_micros(100 + wait * 20)).await;
}

/// After a loss: a fail-over takes seconds, and everybody waits for it.
async fn pause(attempt: u64) {
    let most = 50 << attempt.min(4);
    let wait = most / 2 + most * u64::from(random()) / 512;
    tokio::time::sleep(Duration::from_millis(wait)).await;
}

fn random() -> u8 {
    let mut random = [0; 1];
    let _ = getrandom::fill(&mut random);
    random[0]
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

pub(super) fn map(error: tokio_postgres::Error) -> Error {
    Failure::from(error).error(None)
}

/// Connections of a program that only looks.
const LOOKERS: usize = 4;
const MAX_ATTEMPTS: u64 = 10;
/// Attempts of a transaction that gives way. Nobody waits for it, so it may need more of them.
const MAX_TURNS: u64 = 50;
/// Attempts to read while connections are lost.
const MAX_READS: u64 = 6;
/// Attempts to write while the database cannot be reached; the pool's patience ends them sooner.
const MAX_WAITS: u64 = 20;
/// How long the outcome of a COMMIT is asked for.
const RESOLVE: Duration = Duration::from_secs(30);
/// After so long without a notification the listener asks whether the server is still there.
const SILENCE: Duration = Duration::from_secs(10);
