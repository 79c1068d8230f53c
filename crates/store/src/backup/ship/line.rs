//! Lines: the newest one goes on when the log proves that it can (B3), else a new one begins with a copy of everything.
//!
//! The line before goes on getting its points while the new one is made, so a long copy costs no moment to go back to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::moment::{Position, Set, open_log, read_log};
use super::{Fault, Shipper, lock};
use crate::backup::layout::{self, BASE, LISTED, Line, LineHead, Log, Part};
use crate::backup::wal::Cursor;
use crate::backup::{self, BEGUN};
use crate::blob::file_system::StorageKey;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Sqlite, sqlite_error};
use crate::store::Inner;

/// The line that is being written.
pub(super) struct Current {
    pub(super) line: Line,
    pub(super) position: Position,
    pub(super) number: u64,
    pub(super) previous: String,
    /// Bytes of its segments.
    pub(super) shipped: u64,
    pub(super) begun: Instant,
}

impl Shipper {
    /// Goes on with the newest line when the log still holds, byte for byte, what was shipped of it.
    pub(super) fn resume(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<bool, Fault> {
        let (mut lines, problems) = self.layout.lines()?;
        for lost in problems {
            tracing::error!(problem = lost.problem, "a line of the backup is damaged");
        }
        let Some(line) = lines.pop() else {
            return Ok(false);
        };
        let Log {
            segments, problem, ..
        } = line.log()?;
        if let Some(problem) = &problem {
            tracing::error!(problem, "a line of the backup is damaged");
        }
        let end = match segments.last() {
            Some(last) => last.head.parts.last().and_then(Part::end),
            None => line.start()?,
        };
        let (Some(end), None) = (end, problem) else {
            return Ok(false);
        };
        let wanted = end.clone();
        let same = sqlite.between(move |pause| -> std::io::Result<bool> {
            let Some(log) = open_log(pause)? else {
                return Ok(false);
            };
            match Cursor::start(&log)? {
                Some(start) if start.header == wanted.header => {
                    Ok(start.scan_to(&log, wanted.offset)? == wanted)
                }
                _ => Ok(false),
            }
        })?;
        if !same.map_err(read_log)? {
            return Ok(false);
        }
        self.walk(inner, sqlite, &mut |_| Ok(()))?;
        tracing::info!(line = %line.path.display(), "the backup goes on where it ended");
        self.line = Some(Current {
            position: Position {
                cursor: Some(end),
                folded: false,
            },
            number: segments.len() as u64,
            previous: segments
                .last()
                .map_or_else(|| line.head.sha256.clone(), |last| last.head.sha256.clone()),
            shipped: segments.iter().map(|segment| segment.length).sum(),
            begun: Instant::now(),
            line,
        });
        Ok(true)
    }

    /// Makes a new line: all objects, then a copy of the database at one moment. The line before goes on meanwhile.
    pub(super) fn begin(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        {
            let mut changed = lock(&self.changed);
            changed.next = Some(BTreeSet::new());
            if self.line.is_none() {
                changed.overflow = false;
            }
        }
        self.lost.store(false, Ordering::Release);
        let made = self.make(inner, sqlite);
        if made.is_err() {
            lock(&self.changed).next = None;
            self.layout.sweep_partial()?;
        }
        made
    }

    fn make(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        let draft = self.layout.draft(inner.clock.now())?;
        layout::write_json(&draft.path(BEGUN), &serde_json::json!({}))?;
        let listed = draft.path(LISTED);
        let failed = |error| Error::io("write", &listed, error);
        let mut list = BufWriter::new(File::create(&listed).map_err(failed)?);
        let mut objects = 0;
        self.walk(inner, sqlite, &mut |key| {
            objects += 1;
            writeln!(list, "{}", key.as_str()).map_err(failed)
        })?;
        let position = Position {
            cursor: None,
            folded: false,
        };
        let mark = self.mark_with_objects(inner, sqlite, &position, Set::Next, &mut |key| {
            objects += 1;
            writeln!(list, "{}", key.as_str()).map_err(failed)
        })?;
        list.into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        self.vault.sync()?;
        failpoint("backup.before_copy");
        let base = draft.path(BASE);
        let result = self.copy(inner, sqlite, &mark.reader, &base);
        let object_bytes = mark
            .reader
            .query_row(
                "SELECT CAST(COALESCE(SUM(size), 0) AS INTEGER) FROM blob WHERE storage_key IS NOT NULL",
                [],
                |row| row.get::<_, i64>(0),
            )
            .map_err(sqlite_error)?;
        drop(mark.reader);
        result?;
        failpoint("backup.after_copy");
        let (bytes, sha256) = backup::hash_file(&base)?;
        let head = LineHead {
            version: layout::VERSION,
            at: mark.at.0,
            epoch: inner.epoch().to_owned(),
            bytes,
            sha256,
            log: mark.from.as_ref().map(|start| hex::encode(start.header)),
            objects,
            object_bytes: object_bytes.unsigned_abs(),
        };
        let line = draft.publish(head)?;
        failpoint("backup.after_line");
        {
            let mut changed = lock(&self.changed);
            changed.line = changed.next.take().unwrap_or_default();
        }
        self.pending = None;
        self.note_point(mark.at);
        self.line = Some(Current {
            position: Position {
                // The generation is shipped from its beginning: SQLite replays whole ones.
                cursor: mark.from,
                folded: false,
            },
            number: 0,
            previous: line.head.sha256.clone(),
            shipped: 0,
            begun: Instant::now(),
            line,
        });
        Ok(())
    }

    /// Copies the database as the reader's transaction sees it.
    fn copy(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        reader: &Connection,
        target: &Path,
    ) -> Result<(), Fault> {
        let mut copy = backup::empty_database(target)?;
        {
            let backup = Backup::new(reader, &mut copy).map_err(sqlite_error)?;
            loop {
                match backup.step(PAGES).map_err(sqlite_error)? {
                    StepResult::Done => break,
                    StepResult::More => self.breathe(inner, sqlite)?,
                    _ => {
                        return Err(Error::Database(
                            "the database cannot be copied now".to_owned(),
                        )
                        .into());
                    }
                }
            }
        }
        copy.close().map_err(|(_, error)| sqlite_error(error))?;
        backup::sync_file(target)?;
        Ok(())
    }

    /// Looks at every blob and has its object in the backup.
    fn walk(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<(), Fault> {
        let reader = sqlite.reader()?;
        let mut last = i64::MIN;
        loop {
            let rows = backup::objects_after(&reader, last)?;
            for (row, key) in &rows {
                last = *row;
                // What the store has no more is deleted, or damaged; the point that is made later decides.
                if !self.vault.take(backup::files(inner)?, key)? {
                    lock(&self.changed).note(*row);
                }
                seen(key)?;
            }
            self.breathe(inner, sqlite)?;
            if rows.is_empty() {
                self.vault.sync()?;
                return Ok(());
            }
        }
    }
}

/// Pages that are copied before the worker looks up.
const PAGES: i32 = 1024;
