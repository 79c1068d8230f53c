//! Segments: the log since the last point, written to the line.
//!
//! The end of a generation exists nowhere else once the log is folded. It waits in a draft until the next segment begins
//! with it; a failure to write that makes a gap, and a gap makes a new line.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::moment::{Mark, Position, Set, read_log};
use super::{Fault, Shipper};
use crate::backup::chain;
use crate::backup::layout::{Part, SegmentDraft};
use crate::backup::wal::Cursor;
use crate::failpoint::failpoint;
use crate::sql::{CHECKPOINT_BYTES, Sqlite};
use crate::store::Inner;

/// The end of a folded generation, which is in the log no more: the beginning of the next segment.
pub(super) struct Pending {
    part: Part,
    draft: SegmentDraft,
}

impl Shipper {
    /// Ships what was committed since the last point and declares a new one.
    pub(super) fn ship(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        let Some(current) = &self.line else {
            return Ok(());
        };
        let position = current.position.clone();
        let mark = self.mark_with_objects(inner, sqlite, &position, Set::Line, &mut |_| Ok(()))?;
        let shipped = self.write(&mark);
        if shipped.is_err() {
            self.give_back(Set::Line, &mark.changed);
        }
        shipped?;
        self.note_point(mark.at);
        Ok(())
    }

    fn write(&mut self, mark: &Mark) -> Result<(), Fault> {
        let Some(current) = &mut self.line else {
            return Ok(());
        };
        let fresh = match (&mark.from, &mark.to) {
            (Some(from), Some(to)) if to.offset > from.offset => Some((from, to)),
            _ => None,
        };
        if fresh.is_none() && self.pending.is_none() {
            current
                .line
                .cover(current.number, &current.previous, mark.at)?;
            return Ok(());
        }
        let number = current.number + 1;
        let pending = self.pending.take();
        let irreplaceable = pending.is_some();
        let (mut draft, mut parts) = match pending {
            Some(pending) => (pending.draft, vec![pending.part]),
            None => (SegmentDraft::new(current.line.segment(number))?, Vec::new()),
        };
        let write = || {
            if let (Some((from, to)), Some(log)) = (fresh, &mark.log) {
                draft.copy(log, from.offset, to.offset)?;
                parts.push(Part::new(from, to));
            }
            draft.publish(mark.at, current.previous.clone(), parts)
        };
        let segment = match write() {
            Ok(segment) => segment,
            Err(error) if irreplaceable => {
                tracing::error!(error = %chain(&error), "a part of the log could not be written to the backup");
                return Err(Fault::Gap("a part of the log is lost"));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some((_, to)) = fresh {
            current.position = Position {
                cursor: Some(to.clone()),
                folded: false,
            };
        }
        current.number = number;
        current.shipped += segment.length;
        current.previous = segment.head.sha256;
        // Now the loss of this segment would be seen.
        current
            .line
            .cover(current.number, &current.previous, mark.at)?;
        Ok(())
    }

    /// Folds the log. Its end, which no segment has yet, becomes the beginning of the next one.
    pub(super) fn fold(&mut self, sqlite: &Sqlite) -> Result<(), Fault> {
        let Some(current) = &mut self.line else {
            return Ok(());
        };
        if self.pending.is_some() {
            return Ok(());
        }
        let Ok(log) = File::open(sqlite.log()) else {
            return Ok(());
        };
        let Some(from) = current.position.locate(Some(&log))? else {
            return Ok(());
        };
        let near = from.scan(&log).map_err(read_log)?;
        let mut draft = SegmentDraft::new(current.line.segment(current.number + 1))?;
        draft.copy(&log, from.offset, near.offset)?;
        let last = near.clone();
        let folded =
            sqlite.between(move |pause| -> Result<Option<(Cursor, Vec<u8>)>, Fault> {
                match Cursor::start(&log).map_err(read_log)? {
                    Some(start) if start.header == last.header => {}
                    _ => return Err(Fault::Gap("the log was folded by somebody else")),
                }
                let to = last.scan(&log).map_err(read_log)?;
                let length = to.offset - last.offset;
                if length > MAX_PENDING {
                    // Too much came meanwhile; the next round is nearer.
                    return Ok(None);
                }
                let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
                log.read_exact_at(&mut bytes, last.offset)
                    .map_err(read_log)?;
                pause.fold()?;
                Ok(Some((to, bytes)))
            })??;
        let Some((to, rest)) = folded else {
            return Ok(());
        };
        failpoint("backup.after_fold");
        if to.offset > from.offset {
            if let Err(error) = draft.write(&rest) {
                tracing::error!(error = %chain(&error), "a part of the log could not be written to the backup");
                return Err(Fault::Gap("a part of the log is lost"));
            }
            self.pending = Some(Pending {
                part: Part::new(&from, &to),
                draft,
            });
        }
        current.position = Position {
            cursor: Some(to),
            folded: true,
        };
        self.fold_at = sqlite.log_length() + CHECKPOINT_BYTES;
        Ok(())
    }
}

/// The end of a generation that may wait in memory, in bytes.
const MAX_PENDING: u64 = 4 << 20;
