//! An upload has one writer.
//!
//! A claim is taken before the first byte is written and held until what was written is recorded, the blob is
//! committed, or the upload is gone. A writer that sends nothing for the idle time loses its claim to whoever
//! asks next: what it wrote is recorded first, and its handle then writes nowhere.
//!
//! Between replicas the claim is in the row. It lasts for seconds, and a process renews all that it has in one
//! transaction every second or two, for as long as their writers live; so the uploads of a replica that was killed are
//! free soon. A request to the object store goes on only while the claim is known to last. Whoever wants an upload that
//! another replica has waits for it, and takes it when the claim was not renewed for its whole time *while it was
//! watched*, which needs no clocks that agree. Taking it over raises the row's version, so the writer that lost it can
//! record nothing more; what it wrote meanwhile lies under keys that only it used, or in parts whose ETags are not the
//! recorded ones.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::writer::Session;
use super::{ReleaseClaim, RenewClaims};
use crate::error::Error;
use crate::store::Inner;

/// The claims of this process.
#[derive(Clone)]
pub(crate) struct Claims {
    slots: Arc<Mutex<HashMap<String, Arc<Slot>>>>,
    /// Other processes write uploads, too, so a claim is in the row as well.
    shared: Arc<AtomicBool>,
    kept: Arc<Kept>,
}

/// The claims in rows that this process renews.
#[derive(Default)]
struct Kept {
    rows: Mutex<KeptRows>,
    /// Told when one is given back.
    fewer: Notify,
}

#[derive(Default)]
struct KeptRows {
    claims: BTreeMap<i64, Weak<RowClaim>>,
    /// A task renews them.
    running: bool,
}

impl Claims {
    pub(crate) fn new(shared: bool) -> Self {
        Self {
            slots: Arc::default(),
            shared: Arc::new(AtomicBool::new(shared)),
            kept: Arc::default(),
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
    until: watch::Sender<Instant>,
    lost: AtomicBool,
}

impl RowClaim {
    /// Keeps a claim that was just taken. `asked` is when it was asked for: it lasts at least as long from then on.
    pub(crate) fn keep(
        inner: &Arc<Inner>,
        slot: &Arc<Slot>,
        id: i64,
        token: String,
        asked: Instant,
    ) -> Arc<Self> {
        let claim = Arc::new(Self {
            slot: Arc::clone(slot),
            until: watch::channel(asked + SPAN).0,
            lost: AtomicBool::new(false),
            inner: Arc::clone(inner),
            id,
            token,
        });
        let kept = &inner.claims.kept;
        let mut rows = kept.lock();
        rows.claims.insert(id, Arc::downgrade(&claim));
        if !rows.running {
            rows.running = true;
            let keeper = keep_all(Arc::clone(inner), Arc::clone(kept));
            inner.in_background(keeper);
        }
        claim
    }

    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// Sees to it that the claim lasts now.
    ///
    /// # Errors
    /// [`Error::UploadBusy`] when it was lost; as for every call that writes.
    pub(crate) async fn ensure(&self) -> Result<(), Error> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(self.busy());
        }
        if *self.until.borrow() > Instant::now() {
            return Ok(());
        }
        // The one that renews was held up, or the database was away. Nobody need have taken it meanwhile.
        renew(&self.inner, &[self]).await?;
        if self.lost.load(Ordering::Relaxed) {
            return Err(self.busy());
        }
        Ok(())
    }

    /// Does something while the claim lasts, and gives it up when the claim is lost.
    ///
    /// # Errors
    /// Those of the work, and those of [`RowClaim::ensure`].
    pub(crate) async fn hold<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::pin!(work);
        let mut until = self.until.subscribe();
        loop {
            self.ensure().await?;
            let end = *until.borrow_and_update();
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(end) => {}
                _ = until.changed() => {}
                result = &mut work => return result,
            }
        }
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

    fn busy(&self) -> Error {
        Error::UploadBusy {
            offset: self.slot.recorded(),
        }
    }
}

impl Drop for RowClaim {
    fn drop(&mut self) {
        let kept = &self.inner.claims.kept;
        let mut rows = kept.lock();
        // Another claim of the same upload may stand in its place by now.
        if rows
            .claims
            .get(&self.id)
            .is_some_and(|claim| claim.strong_count() == 0)
        {
            rows.claims.remove(&self.id);
        }
        drop(rows);
        kept.fewer.notify_one();
    }
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, KeptRows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claims that live; without one the task that renews them ends.
    fn live(&self) -> Option<Vec<Arc<RowClaim>>> {
        let mut rows = self.lock();
        let live: Vec<_> = rows.claims.values().filter_map(Weak::upgrade).collect();
        rows.running = !live.is_empty();
        rows.running.then_some(live)
    }
}

/// Renews the claims of this process until there are none.
async fn keep_all(inner: Arc<Inner>, kept: Arc<Kept>) {
    let mut next = Instant::now() + BEAT;
    loop {
        let due = tokio::select! {
            () = tokio::time::sleep_until(next) => true,
            () = kept.fewer.notified() => false,
        };
        let Some(live) = kept.live() else {
            return;
        };
        if !due {
            continue;
        }
        next = Instant::now() + BEAT;
        for some in live.chunks(AT_ONCE) {
            let claims: Vec<&RowClaim> = some.iter().map(|claim| &**claim).collect();
            if let Err(error) = renew(&inner, &claims).await {
                tracing::debug!(%error, "claims could not be renewed, it is tried again");
            }
        }
    }
}

/// Makes claims last longer, and notes which ones were lost.
async fn renew(inner: &Inner, claims: &[&RowClaim]) -> Result<(), Error> {
    let asked = Instant::now();
    let rows = claims.iter().map(|claim| (claim.id, claim.token.clone()));
    let renewed = inner
        .db
        .write(RenewClaims {
            claims: rows.collect(),
            span: SPAN,
        })
        .await?;
    for (claim, renewed) in claims.iter().zip(renewed) {
        if renewed {
            claim.until.send_replace(asked + SPAN);
        } else {
            claim.lost.store(true, Ordering::Relaxed);
            claim.until.send_replace(asked);
        }
    }
    Ok(())
}

/// How long a claim in a row lasts when it is not renewed.
pub(crate) const SPAN: Duration = Duration::from_secs(6);
/// The time between two renewals.
const BEAT: Duration = Duration::from_millis(1500);
/// Claims that one transaction renews.
const AT_ONCE: usize = 200;
/// How long ago a claim must have ended, by our own clock, to be taken without being watched.
pub(crate) const LONG_OVER: Duration = Duration::from_secs(30);
/// The time between two looks at the claim of another replica.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

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
