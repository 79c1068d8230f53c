//! What a failure of the database means: repeat, connect again, wait, or give up.

use std::time::Duration;

use tokio_postgres::error::{Severity, SqlState};

use super::settings::chain;
use crate::error::Error;
use crate::mode;

/// A statement that did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The driver or the server said so.
    Driver(tokio_postgres::Error),
    /// There was no answer in time. The session must not be used again.
    NoAnswer(Duration),
    /// The mode of the store forbids the transaction.
    Refused(Error),
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Another transaction was in the way: the same one may succeed.
    Conflict,
    /// The transaction itself gave way to another one, which was in its way outside the order of locks.
    GaveWay,
    /// A statement that was prepared no longer fits the schema: the same one may succeed on a new session.
    Stale,
    /// The session is gone, and with it a transaction that had not begun to commit.
    Lost,
    /// The server takes no writes.
    ReadOnly,
    /// Anything else.
    Other,
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Driver(error)
    }
}

impl Failure {
    pub(super) fn fault(&self) -> Fault {
        let error = match self {
            Self::Driver(error) => error,
            Self::NoAnswer(_) => return Fault::Lost,
            Self::Refused(_) => return Fault::Other,
        };
        let Some(database) = error.as_db_error() else {
            // Without a word of the server the connection broke, unless it was the driver that refused.
            let broke = error.is_closed()
                || std::error::Error::source(error)
                    .is_some_and(<dyn std::error::Error>::is::<std::io::Error>);
            return if broke { Fault::Lost } else { Fault::Other };
        };
        let code = database.code();
        if database.parsed_severity() == Some(Severity::Panic) {
            // Every session of the server ends, whatever the code says.
            Fault::Lost
        } else if CONFLICTS.contains(code) {
            Fault::Conflict
        } else if STALE.contains(code) {
            Fault::Stale
        } else if *code == SqlState::READ_ONLY_SQL_TRANSACTION {
            Fault::ReadOnly
        } else if LOST.contains(code) || code.code().starts_with("08") {
            Fault::Lost
        } else {
            Fault::Other
        }
    }

    /// Whether nobody can say what became of a COMMIT that was answered so: the session ended with it, as where the
    /// server could not write or sync its log.
    pub(super) fn ends_session(&self) -> bool {
        let ended = match self {
            Self::Driver(error) => error.as_db_error().is_some_and(|database| {
                matches!(
                    database.parsed_severity(),
                    Some(Severity::Fatal | Severity::Panic)
                )
            }),
            Self::NoAnswer(_) | Self::Refused(_) => false,
        };
        ended || self.fault() == Fault::Lost
    }

    /// As an error of the store; `statement` is the name of what ran.
    pub(super) fn error(self, statement: Option<&str>) -> Error {
        let fault = self.fault();
        let error = match self {
            Self::Driver(error) => error,
            Self::NoAnswer(limit) => {
                return unavailable(format!("it gave no answer within {limit:?}"));
            }
            Self::Refused(refusal) => return refusal,
        };
        let text = chain(&error);
        match (fault, error.code()) {
            (_, Some(&SqlState::DISK_FULL)) => Error::Full,
            (Fault::ReadOnly, _) => read_only(),
            (Fault::Lost, _) => unavailable(text),
            // Out of time, of memory, of locks: later it may do.
            (_, Some(code)) if BUSY.contains(code) || code.code().starts_with("53") => {
                unavailable(text)
            }
            _ => Error::Database(match statement {
                Some(statement) => format!("`{statement}`: {text}"),
                None => text,
            }),
        }
    }
}

pub(super) fn unavailable(problem: impl Into<String>) -> Error {
    Error::Unavailable {
        what: "the database",
        problem: problem.into(),
    }
}

pub(super) fn read_only() -> Error {
    Error::ReadOnly {
        reason: mode::RECOVERY.to_owned(),
    }
}

/// A unique or foreign key is a conflict: another transaction took or removed a row between our look and our write.
const CONFLICTS: &[SqlState] = &[
    SqlState::T_R_SERIALIZATION_FAILURE,
    SqlState::T_R_DEADLOCK_DETECTED,
    SqlState::UNIQUE_VIOLATION,
    SqlState::FOREIGN_KEY_VIOLATION,
];
const STALE: &[SqlState] = &[
    // "cached plan must not change result type", after a migration by another replica.
    SqlState::FEATURE_NOT_SUPPORTED,
    SqlState::INVALID_SQL_STATEMENT_NAME,
];
const LOST: &[SqlState] = &[
    SqlState::ADMIN_SHUTDOWN,
    SqlState::CRASH_SHUTDOWN,
    SqlState::CANNOT_CONNECT_NOW,
    SqlState::DATABASE_DROPPED,
    SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    SqlState::IDLE_SESSION_TIMEOUT,
];
const BUSY: &[SqlState] = &[SqlState::QUERY_CANCELED, SqlState::LOCK_NOT_AVAILABLE];
