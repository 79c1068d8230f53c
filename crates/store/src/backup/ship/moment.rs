//! One moment of the store between two transactions: how far the log goes, which blobs changed, and a reader that sees
//! exactly that.
//!
//! A moment counts only when every object that it names is in the backup, durably (B1). Objects may go while they are
//! copied; then a later moment is taken, which does not name them.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rusqlite::Connection;

use super::{Fault, Shipper, lock};
use crate::backup::files;
use crate::backup::wal::Cursor;
use crate::blob::file_system::StorageKey;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Pause, Sqlite, sqlite_error};
use crate::store::Inner;

/// Rows of table `blob` that were written: since the last point, and since a new line began.
#[derive(Debug, Default)]
pub(super) struct Changed {
    pub(super) line: BTreeSet<i64>,
    pub(super) next: Option<BTreeSet<i64>>,
    /// There were too many to remember.
    pub(super) overflow: bool,
}

impl Changed {
    pub(super) fn note(&mut self, row: i64) {
        for set in std::iter::once(&mut self.line).chain(&mut self.next) {
            set.insert(row);
        }
        let most = self
            .line
            .len()
            .max(self.next.as_ref().map_or(0, BTreeSet::len));
        if most > MAX_CHANGED {
            self.overflow = true;
            self.line.clear();
            if let Some(next) = &mut self.next {
                next.clear();
            }
        }
    }
}

/// Where a line is in the log.
#[derive(Clone, Debug)]
pub(super) struct Position {
    /// `None`: the copy holds everything, and whatever log appears is new.
    pub(super) cursor: Option<Cursor>,
    /// The generation was folded at this place, so that another may follow.
    pub(super) folded: bool,
}

impl Position {
    /// The place to go on from in the log as it is; `None` when there is nothing.
    pub(super) fn locate(&self, log: Option<&File>) -> Result<Option<Cursor>, Fault> {
        let start = match log {
            Some(log) => Cursor::start(log).map_err(read_log)?,
            None => None,
        };
        match (start, &self.cursor) {
            (start, None) => Ok(start),
            (Some(start), Some(here)) if start.header == here.header => Ok(Some(here.clone())),
            (start, Some(_)) if self.folded => Ok(start),
            _ => Err(Fault::Gap("the log was folded by somebody else")),
        }
    }
}

/// One moment of the store between two transactions.
pub(super) struct Mark {
    /// Everything acknowledged before is in it.
    pub(super) at: Timestamp,
    pub(super) log: Option<File>,
    pub(super) from: Option<Cursor>,
    pub(super) to: Option<Cursor>,
    pub(super) changed: BTreeSet<i64>,
    /// A read transaction that sees exactly this moment.
    pub(super) reader: Connection,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Set {
    Line,
    Next,
}

impl Shipper {
    /// Takes a moment, with a read transaction that sees it.
    fn mark(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        position: &Position,
        set: Set,
    ) -> Result<Mark, Fault> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Fault::Gap(
                "the log became too long while it could not be shipped",
            ));
        }
        let reader = sqlite.reader()?;
        let changed = Arc::clone(&self.changed);
        let position = position.clone();
        // Most of the log is read here, so that the writer waits for the rest alone.
        let early = match File::open(sqlite.log()) {
            Ok(log) => match position.locate(Some(&log)) {
                Ok(Some(from)) => Some(from.scan(&log).map_err(read_log)?),
                _ => None,
            },
            Err(_) => None,
        };
        let at = inner.clock.now();
        sqlite.between(move |pause| -> Result<Mark, Fault> {
            let log = open_log(pause).map_err(read_log)?;
            let from = position.locate(log.as_ref())?;
            let to = match (&from, &log) {
                (Some(from), Some(log)) => {
                    let near = early
                        .as_ref()
                        .filter(|early| early.header == from.header && early.offset >= from.offset);
                    Some(near.unwrap_or(from).scan(log).map_err(read_log)?)
                }
                _ => None,
            };
            // BEGIN alone takes no snapshot, the first read does.
            reader
                .execute_batch("BEGIN; SELECT 1 FROM meta LIMIT 1;")
                .map_err(sqlite_error)?;
            let mut changed = lock(&changed);
            if changed.overflow {
                return Err(Fault::Gap(
                    "too many blobs changed while they could not be copied",
                ));
            }
            let rows = match set {
                Set::Line => std::mem::take(&mut changed.line),
                Set::Next => changed
                    .next
                    .as_mut()
                    .map(std::mem::take)
                    .unwrap_or_default(),
            };
            Ok(Mark {
                at,
                log,
                from,
                to,
                changed: rows,
                reader,
            })
        })?
    }

    /// Takes a moment whose objects are all in the backup, durably.
    pub(super) fn mark_with_objects(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        position: &Position,
        set: Set,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<Mark, Fault> {
        for round in 1.. {
            let mark = self.mark(inner, sqlite, position, set)?;
            let taken = self.take_changed(inner, &mark, seen);
            match taken {
                Ok(missing) if missing.is_empty() => return Ok(mark),
                Ok(missing) if round == ROUNDS => {
                    tracing::warn!(
                        objects = missing.len(),
                        "the store has no object for some of its blobs, so the backup has none; run `verify-store`"
                    );
                    return Ok(mark);
                }
                // Deleted since: a later moment does not name them.
                Ok(_) => self.give_back(set, &mark.changed),
                Err(error) => {
                    self.give_back(set, &mark.changed);
                    return Err(error.into());
                }
            }
        }
        unreachable!("the last round returns")
    }

    /// Has the objects of changed rows in the backup; gives the rows whose object the store has no more.
    fn take_changed(
        &mut self,
        inner: &Arc<Inner>,
        mark: &Mark,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<Vec<i64>, Error> {
        let mut missing = Vec::new();
        let mut statement = mark
            .reader
            .prepare("SELECT storage_key FROM blob WHERE id = ?1 AND storage_key IS NOT NULL")
            .map_err(sqlite_error)?;
        for row in &mark.changed {
            let mut rows = statement.query([row]).map_err(sqlite_error)?;
            let Some(found) = rows.next().map_err(sqlite_error)? else {
                continue;
            };
            let key = StorageKey::parse(&found.get::<_, String>(0).map_err(sqlite_error)?)?;
            if self.vault.take(files(inner)?, &key)? {
                seen(&key)?;
            } else {
                missing.push(*row);
            }
        }
        self.vault.sync()?;
        failpoint("backup.after_objects");
        Ok(missing)
    }

    pub(super) fn give_back(&self, set: Set, rows: &BTreeSet<i64>) {
        let mut changed = lock(&self.changed);
        let target = match set {
            Set::Line => &mut changed.line,
            Set::Next => match &mut changed.next {
                Some(next) => next,
                None => return,
            },
        };
        target.extend(rows);
    }
}

pub(super) fn open_log(pause: &Pause<'_>) -> std::io::Result<Option<File>> {
    match File::open(pause.log()) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn read_log(error: std::io::Error) -> Fault {
    Fault::Failed(Error::Database(format!(
        "the write-ahead log cannot be read: {error}"
    )))
}

/// Changed blobs that are remembered.
const MAX_CHANGED: usize = 1_000_000;

/// How often a point is tried again when objects go away under it.
const ROUNDS: u32 = 4;
