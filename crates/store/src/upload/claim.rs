//! An upload has one writer.
//!
//! A claim is taken before the first byte is written and held until what was written is recorded, the blob is
//! committed, or the upload is gone. A writer that sends nothing for the idle time loses its claim to whoever
//! asks next: what it wrote is recorded first, and its handle then writes nowhere.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::writer::Session;

/// The claims of this process.
#[derive(Clone, Default)]
pub(crate) struct Claims(Arc<Mutex<HashMap<String, Arc<Slot>>>>);

impl Claims {
    /// Claims an upload. `Err` holds the slot of whoever has it.
    pub(crate) fn claim(&self, name: &str, slot: &Arc<Slot>) -> Result<Claim, Arc<Slot>> {
        match self.map().entry(name.to_owned()) {
            Entry::Occupied(entry) => Err(Arc::clone(entry.get())),
            Entry::Vacant(entry) => {
                entry.insert(Arc::clone(slot));
                Ok(Claim {
                    claims: self.clone(),
                    name: name.to_owned(),
                })
            }
        }
    }

    /// Claims an upload to change its row, not to write to it.
    pub(crate) fn try_claim(&self, name: &str) -> Option<Claim> {
        self.claim(name, &Arc::default()).ok()
    }

    /// Slots whose writer has sent nothing for this time.
    pub(crate) fn idle(&self, limit: Duration) -> Vec<Arc<Slot>> {
        self.map()
            .values()
            .filter(|slot| slot.is_idle(limit))
            .cloned()
            .collect()
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A claim on an upload; dropping it gives it back.
#[must_use]
pub(crate) struct Claim {
    claims: Claims,
    name: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.map().remove(&self.name);
    }
}

/// Where a writer's session lies while the writer has it, so that an idle one can be ended.
pub(crate) struct Slot {
    pub(crate) session: tokio::sync::Mutex<Option<Box<Session>>>,
    recorded: AtomicU64,
    last: Mutex<Instant>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            session: tokio::sync::Mutex::default(),
            recorded: AtomicU64::new(0),
            last: Mutex::new(Instant::now()),
        }
    }
}

impl Slot {
    pub(crate) fn recorded(&self) -> u64 {
        self.recorded.load(Ordering::Relaxed)
    }

    pub(crate) fn set_recorded(&self, size: u64) {
        self.recorded.store(size, Ordering::Relaxed);
    }

    /// Notes that the writer sent something.
    pub(crate) fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(crate) fn is_idle(&self, limit: Duration) -> bool {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.elapsed() >= limit
    }

    /// Takes the session of an idle writer. A session in the middle of a write is not idle, and one that is
    /// being recorded is not here.
    pub(crate) fn take_idle(&self, limit: Duration) -> Option<Box<Session>> {
        let mut session = self.session.try_lock().ok()?;
        if self.is_idle(limit) {
            session.take()
        } else {
            None
        }
    }
}
