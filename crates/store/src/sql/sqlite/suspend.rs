//! A file system that turned read-only under the database.
//!
//! After any other failed write the writer stops and the process ends. Here a process that ends could not start again,
//! and pulls would end with it. So the writer refuses everything until the file system takes writes, and goes on when
//! the whole log is folded into the database and synced, which leaves nothing of what had failed.

use std::path::Path;
use std::sync::atomic::Ordering;

use super::{Job, Writer};
use crate::error::Error;
use crate::mode;

impl Writer {
    /// Tells whether a write of the database failed because its file system takes none.
    pub(super) fn met_read_only_disk(&self) -> bool {
        let directory = self.wal.parent().unwrap_or(Path::new("."));
        self.tx.context.gate.met_failed_write(directory)
    }

    /// Goes on after the file system took no writes. What is in the log was committed, synced and acknowledged before;
    /// what failed comes after it and is not in the index of the log. So when the log was copied into the database, synced and
    /// cut to nothing, no failed write or sync has left a trace.
    pub(super) fn resume(&mut self) -> Result<bool, ()> {
        if self.met_read_only_disk() {
            return Ok(false);
        }
        if let Some(lost) = &self.kept {
            lost.store(true, Ordering::Release);
        }
        match self.checkpoint() {
            Ok(()) => {}
            Err(Error::Stopped) if !self.met_read_only_disk() => {
                tracing::error!("the database could not be written; the store stops");
                self.stop.send_replace(true);
                return Err(());
            }
            Err(error) => {
                tracing::debug!(%error, "the log cannot be folded into the database yet");
                return Ok(false);
            }
        }
        // Whoever reads an old state keeps it for a while.
        let left = std::fs::metadata(&self.wal).map_or(0, |file| file.len());
        self.suspended = left > 0;
        if !self.suspended {
            tracing::info!("the database is written again");
        }
        Ok(!self.suspended)
    }

    /// Folds the log when the store closes. On a file system that takes no writes the next start does.
    pub(super) fn fold_at_end(&self) -> Result<(), Error> {
        match self.checkpoint() {
            Err(Error::Stopped) if self.met_read_only_disk() => Err(mode::disk_read_only()),
            other => other,
        }
    }
}

/// Answers everybody that the file system takes no writes.
pub(super) fn refuse_all(batch: Vec<Box<dyn Job>>) {
    for mut job in batch {
        job.refuse(mode::disk_read_only());
        job.finish(None);
    }
}
