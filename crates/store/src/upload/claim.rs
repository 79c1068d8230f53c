//! An upload has one writer.
//!
//! A claim is taken before the first byte is written and held until what was written is recorded, the blob is
//! committed, or the upload is gone. A writer that sends nothing for the idle time loses its claim to whoever
//! asks next: what it wrote is recorded first, and its handle then writes nowhere.
//!
//! Between replicas the claim is in the row. It lasts for a while and is renewed while bytes arrive; a request to the
//! object store is sent only when the claim outlasts it. Taking it over raises the row's version, so the writer that
//! lost it can record nothing more; what it wrote meanwhile lies under keys that only it used, or in parts whose
//! ETags are not the recorded ones.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::writer::Session;
use super::{ReleaseClaim, RenewClaim};
use crate::error::Error;
use crate::store::Inner;

/// The claims of this process.
#[derive(Clone)]
pub(crate) struct Claims {
    slots: Arc<Mutex<HashMap<String, Arc<Slot>>>>,
    /// Other processes write uploads, too, so a claim is in the row as well.
    shared: Arc<AtomicBool>,
}

impl Claims {
    pub(crate) fn new(shared: bool) -> Self {
        Self {
            slots: Arc::default(),
            shared: Arc::new(AtomicBool::new(shared)),
        }
    }

    pub(crate) fn shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    pub(crate) fn share(&self) {
        self.shared.store(true, Ordering::Relaxed);
    }

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
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A claim in the row of an upload.
pub(crate) struct RowClaim {
    inner: Arc<Inner>,
    slot: Arc<Slot>,
    id: i64,
    token: String,
    /// Until when it lasts, as far as this process knows.
    until: tokio::sync::Mutex<Instant>,
}

impl RowClaim {
    /// `asked` is when the claim was asked for: it lasts at least as long from then on.
    pub(crate) fn new(
        inner: &Arc<Inner>,
        slot: &Arc<Slot>,
        id: i64,
        token: String,
        asked: Instant,
    ) -> Arc<Self> {
        Arc::new(Self {
            slot: Arc::clone(slot),
            until: tokio::sync::Mutex::new(asked + inner.options.claim_idle),
            inner: Arc::clone(inner),
            id,
            token,
        })
    }

    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// Sees to it that the claim lasts for this long.
    ///
    /// # Errors
    /// [`Error::UploadBusy`] when it was lost.
    pub(crate) async fn ensure(&self, lasting: Duration) -> Result<(), Error> {
        let mut until = self.until.lock().await;
        let now = Instant::now();
        if *until >= now + lasting {
            return Ok(());
        }
        let span = self.inner.options.claim_idle.max(lasting + MARGIN);
        let renewed = self
            .inner
            .db
            .write(RenewClaim {
                id: self.id,
                token: self.token.clone(),
                span,
            })
            .await?;
        if !renewed {
            let offset = self.slot.recorded();
            return Err(Error::UploadBusy { offset });
        }
        *until = now + span;
        Ok(())
    }

    /// Gives it back, so that the next writer need not wait.
    pub(crate) async fn release(&self) {
        let released = self
            .inner
            .db
            .write(ReleaseClaim {
                id: self.id,
                token: self.token.clone(),
            })
            .await;
        if let Err(error) = released {
            tracing::debug!(%error, "a claim could not be given back, its time will end it");
        }
    }
}

/// A claim is asked for again before its time is quite over.
const MARGIN: Duration = Duration::from_secs(5);

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
