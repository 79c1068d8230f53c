//! What one reading alone found, until another one minutes later.
//!
//! An object store that answers wrongly does so for a while and about many objects, and a file system that is not
//! mounted has lost all of them. So nobody is believed at once that an object is missing, and nobody at all who says it
//! of several in a row. A process that ends forgets its doubts; whoever reads the blob next begins with a first reading.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::clock::Timestamp;

/// The blobs that one reading of this process found damaged or missing.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    waiting: BTreeMap<i64, Doubt>,
    /// Blobs that were found missing since an object was last found whole.
    missing: BTreeSet<i64>,
}

#[derive(Debug)]
struct Doubt {
    key: Option<String>,
    again: Timestamp,
}

/// What follows from a reading.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is read again at this moment.
    Again(Timestamp),
    /// It was the second reading: it holds.
    Judge,
    /// Nothing: too much is in doubt.
    Nothing,
}

impl Doubts {
    /// A reading found the object of a blob damaged, or not there.
    pub(super) fn note(
        &mut self,
        id: i64,
        key: Option<&str>,
        missing: bool,
        now: Timestamp,
    ) -> Next {
        if missing && !self.stands_still() {
            self.missing.insert(id);
        }
        match self.waiting.get(&id) {
            Some(doubt) if doubt.key.as_deref() == key && doubt.again > now => {
                Next::Again(doubt.again)
            }
            Some(doubt) if doubt.key.as_deref() == key => {
                if missing && self.stands_still() {
                    return Next::Nothing;
                }
                self.waiting.remove(&id);
                Next::Judge
            }
            None if self.waiting.len() >= MOST => Next::Nothing,
            _ => {
                let again = now.plus(BETWEEN);
                let key = key.map(str::to_owned);
                self.waiting.insert(id, Doubt { key, again });
                Next::Again(again)
            }
        }
    }

    /// An object was read to its end and is whole, so the place is there.
    pub(super) fn sound(&mut self, id: i64) {
        self.waiting.remove(&id);
        self.missing.clear();
    }

    /// The blob is gone, or has other bytes now.
    pub(super) fn forget(&mut self, id: i64) {
        self.waiting.remove(&id);
        self.missing.remove(&id);
    }

    /// The blobs whose second reading is due.
    pub(super) fn due(&self, now: Timestamp) -> Vec<i64> {
        let due = self.waiting.iter().filter(|(_, doubt)| doubt.again <= now);
        due.map(|(id, _)| *id).collect()
    }

    /// So many are missing in a row that nobody is believed, until one is found whole.
    pub(super) fn stands_still(&self) -> bool {
        self.missing.len() >= SEVERAL
    }
}

/// The time between two readings.
pub(super) const BETWEEN: Duration = Duration::from_mins(5);
/// Missing blobs in a row that are too many to be believed.
pub(super) const SEVERAL: usize = 5;
/// Doubts that are kept. What is beyond is read for the first time again.
const MOST: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_readings_minutes_apart_are_believed() {
        let (mut doubts, now) = (Doubts::default(), Timestamp(1));
        let later = now.plus(BETWEEN);
        assert_eq!(doubts.note(7, Some("a"), true, now), Next::Again(later));
        assert_eq!(doubts.note(7, Some("a"), true, now), Next::Again(later));
        assert!(doubts.due(now).is_empty());
        assert_eq!(doubts.due(later), [7]);
        // Other bytes are another doubt.
        let still = later.plus(BETWEEN);
        assert_eq!(doubts.note(7, Some("b"), false, later), Next::Again(still));
        assert_eq!(doubts.note(7, Some("b"), false, still), Next::Judge);
        assert!(doubts.due(still).is_empty());
    }

    #[test]
    fn nobody_is_believed_who_says_it_of_several_in_a_row() {
        let (mut doubts, now) = (Doubts::default(), Timestamp(1));
        let later = now.plus(BETWEEN);
        for id in 0..8 {
            doubts.note(id, None, true, now);
        }
        assert!(doubts.stands_still());
        assert_eq!(doubts.note(0, None, true, later), Next::Nothing);
        doubts.sound(5);
        assert!(!doubts.stands_still());
        for id in 0..4 {
            assert_eq!(doubts.note(id, None, true, later), Next::Judge);
        }
        assert_eq!(doubts.note(4, None, true, later), Next::Nothing);
        // Damage that was read is believed all the same.
        assert_eq!(doubts.note(6, None, false, later), Next::Judge);
    }
}
