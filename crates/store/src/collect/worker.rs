//! The worker: claims what is due, a batch at a time, and gives way to foreground work.
//!
//! Every replica has one; there is no leader and no state that another one needs (`I12`). The candidates of a
//! batch run a few at a time, which on SQLite commit together. Between these steps the worker rests ([`Pace`]).

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::candidate::{Look, Outcome, Rules};
use super::outbox;
use super::pace::Pace;
use super::queue::{self, Candidate, Claim, Kind, QueueLag, QueueLength};
use super::settings::Window;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Db, statements};
use crate::store::{Inner, Store};
use crate::upload;

statements! {
    DUE_UPLOADS = "SELECT q.repository_id, q.target_id, u.name FROM collection_queue q \
                   LEFT JOIN upload u ON u.id = q.target_id \
                   WHERE q.kind = 'upload' AND q.due_at <= $1 ORDER BY q.due_at LIMIT 50";
}

/// What this process has collected, and how to wake its worker.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    wake: Notify,
    /// Somebody asked for a run now, whatever the window says.
    asked: AtomicBool,
    last_run: AtomicI64,
    looked_at: AtomicU64,
    failed: AtomicU64,
    objects: AtomicU64,
    collected: Mutex<[Count; KINDS]>,
}

/// What was collected of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    number: u64,
    bytes: u64,
}

const KINDS: usize = Kind::ALL.len();

impl Collector {
    pub(super) fn objects_deleted(&self, number: usize) {
        self.objects.fetch_add(number as u64, Ordering::Relaxed);
    }

    fn count(&self, kind: Kind, outcome: &Outcome) {
        self.looked_at.fetch_add(1, Ordering::Relaxed);
        let Outcome::Collected(collected) = outcome else {
            return;
        };
        let mut counts = self
            .collected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = Kind::ALL.iter().position(|other| *other == kind) {
            counts[index].number += 1;
            counts[index].bytes += collected.bytes;
        }
    }
}

/// The state of the collector.
#[derive(Clone, Debug)]
pub struct CollectionStatus {
    /// The collector is switched on.
    pub enabled: bool,
    /// It may look at candidates now: it is on and the window is open.
    pub open: bool,
    /// The time of the day in which it looks; `None`: always.
    pub window: Option<Window>,
    /// Candidates in a second, at most.
    pub rate: u32,
    /// The queue, one entry for each kind.
    pub queue: Vec<QueueLength>,
    /// The outbox.
    pub outbox: outbox::OutboxLength,
    /// What this process did since it started.
    pub since_start: CollectionTotals,
}

/// What one process collected since it started.
#[derive(Clone, Debug, Default)]
pub struct CollectionTotals {
    /// When the last candidate was looked at.
    pub last_run: Option<Timestamp>,
    /// Candidates that were looked at.
    pub looked_at: u64,
    /// Candidates whose transaction failed; each is tried again.
    pub failed: u64,
    /// What was deleted: kind, number, bytes.
    pub collected: Vec<(Kind, u64, u64)>,
    /// Objects that were deleted.
    pub objects: u64,
}

impl Store {
    /// The state of the collector: the queue, the outbox, and what this process did.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn collection_status(&self) -> Result<CollectionStatus, Error> {
        let inner = &self.0;
        let now = inner.clock.now();
        Ok(CollectionStatus {
            enabled: inner.options.gc.enabled,
            open: inner.options.gc.is_open(now),
            window: inner.options.gc.window,
            rate: inner.options.gc.rate,
            queue: queue::lengths(&inner.db, now).await?,
            outbox: outbox::length(&inner.db, now).await?,
            since_start: self.collection_totals(),
        })
    }

    /// How far the collector is behind, for gauges.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn collection_lag(&self) -> Result<Vec<QueueLag>, Error> {
        let inner = &self.0;
        queue::lags(&inner.db, inner.clock.now()).await
    }

    /// What this process collected since it started. Costs nothing.
    pub fn collection_totals(&self) -> CollectionTotals {
        let collector = &self.0.collector;
        let last_run = collector.last_run.load(Ordering::Relaxed);
        let counts = *collector
            .collected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        CollectionTotals {
            last_run: (last_run > 0).then_some(Timestamp(last_run)),
            looked_at: collector.looked_at.load(Ordering::Relaxed),
            failed: collector.failed.load(Ordering::Relaxed),
            collected: Kind::ALL
                .iter()
                .zip(counts)
                .map(|(kind, count)| (*kind, count.number, count.bytes))
                .collect(),
            objects: collector.objects.load(Ordering::Relaxed),
        }
    }

    /// Wakes this process's worker because something is due now.
    pub(crate) fn wake_collector(&self) {
        self.0.collector.wake.notify_one();
    }

    /// Wakes this process's worker: it looks at all that is due, also outside the window and when the collector is
    /// switched off.
    pub fn collect_now(&self) {
        let collector = &self.0.collector;
        collector.asked.store(true, Ordering::Relaxed);
        collector.wake.notify_one();
    }
}

/// Collects until the future is dropped or the store stops.
pub(crate) async fn work(inner: &Arc<Inner>) {
    let one_writer = matches!(&*inner.db, Db::Sqlite(_));
    let mut pace = Pace::giving(inner.options.gc.rate, one_writer);
    // A collector that gives way to a load would hide from it what the bug takes away too soon.
    #[cfg(feature = "failpoints")]
    if crate::failpoint::planted("no-renewal") {
        pace = Pace::full();
    }
    loop {
        match round(inner, &mut pace).await {
            // What was left by one round may be due at once.
            Ok(found) if found > 0 => continue,
            Ok(_) => {}
            Err(Error::Stopped) => return,
            Err(error) => tracing::warn!(%error, "collection failed, it is tried again"),
        }
        let _ = tokio::time::timeout(IDLE, inner.collector.wake.notified()).await;
    }
}

/// Collects everything that is due now, to its end.
pub(crate) async fn drain(inner: &Arc<Inner>) -> Result<(), Error> {
    let mut pace = Pace::full();
    while round(inner, &mut pace).await? > 0 {}
    Ok(())
}

/// One batch of each kind, then the outbox; how many were looked at.
async fn round(inner: &Arc<Inner>, pace: &mut Pace) -> Result<usize, Error> {
    let mut found = expire_uploads(inner).await?;
    let asked = inner.collector.asked.load(Ordering::Relaxed);
    if asked || inner.options.gc.is_open(inner.clock.now()) {
        let mut candidates = 0;
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Upload) {
            candidates += look_at_batch(inner, kind, pace).await?;
        }
        if candidates == 0 {
            inner.collector.asked.store(false, Ordering::Relaxed);
        }
        found += candidates;
    }
    // As many objects as candidates, or the outbox would grow while there are candidates.
    for _ in 0..OUTBOX_STEPS {
        let served = outbox::serve(inner, pace).await?;
        found += served;
        if served < inner.objects.removed_at_once() {
            break;
        }
    }
    Ok(found)
}

async fn look_at_batch(inner: &Arc<Inner>, kind: Kind, pace: &mut Pace) -> Result<usize, Error> {
    let gc = &inner.options.gc;
    let limit = BATCH.min(usize::try_from(gc.rate.max(1)).unwrap_or(BATCH));
    // A transaction is only worth its commit when there is something to claim.
    if !queue::any_due(&inner.db, kind, inner.clock.now()).await? {
        return Ok(0);
    }
    let began = Instant::now();
    let batch = inner.db.write(Claim { kind, limit }).await?;
    pace.after_step(began, 0).await;
    for step in batch.chunks(AT_ONCE) {
        let began = Instant::now();
        look_at_step(inner, step).await?;
        let now = inner.clock.now();
        inner.collector.last_run.store(now.0, Ordering::Relaxed);
        pace.after_step(began, step.len()).await;
    }
    Ok(batch.len())
}

/// Looks at a few candidates at once.
async fn look_at_step(inner: &Arc<Inner>, step: &[Candidate]) -> Result<(), Error> {
    let mut running = JoinSet::new();
    for &candidate in step {
        let inner = Arc::clone(inner);
        running.spawn(async move { (candidate, look_at(&inner, candidate).await) });
    }
    let mut stopped = false;
    while let Some(done) = running.join_next().await {
        match done {
            Ok((candidate, Ok(outcome))) => inner.collector.count(candidate.kind, &outcome),
            Ok((_, Err(Error::Stopped))) => stopped = true,
            Ok((candidate, Err(error))) => {
                inner.collector.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    kind = candidate.kind.name(),
                    target = candidate.target,
                    attempts = candidate.attempts,
                    %error,
                    "a candidate could not be looked at, it is tried again"
                );
            }
            Err(_) => {
                inner.collector.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    if stopped { Err(Error::Stopped) } else { Ok(()) }
}

async fn look_at(inner: &Arc<Inner>, candidate: Candidate) -> Result<Outcome, Error> {
    let outcome = inner
        .db
        .write(Look {
            rules: rules(inner),
            candidate,
        })
        .await;
    failpoint("collect.after_transaction");
    outcome
}

pub(super) fn rules(inner: &Inner) -> Rules {
    Rules {
        gc: inner.options.gc.clone(),
        lease: inner.options.lease,
    }
}

/// Expires uploads that are due; how many were looked at.
async fn expire_uploads(inner: &Arc<Inner>) -> Result<usize, Error> {
    let now = inner.clock.now();
    let due = inner.db.scan(&DUE_UPLOADS, vec![now.into()]).await?;
    let mut looked_at = 0;
    for row in &due {
        // An upload that somebody writes is not touched, and nobody can begin to write it meanwhile.
        let claim = match row.opt_text(2)? {
            Some(name) => match inner.claims.try_claim(&name) {
                Some(claim) => Some(claim),
                None => continue,
            },
            None => None,
        };
        inner
            .db
            .write(upload::Collect {
                repository: row.i64(0)?,
                id: row.i64(1)?,
            })
            .await?;
        drop(claim);
        looked_at += 1;
    }
    Ok(looked_at)
}

/// Candidates that are claimed at once.
const BATCH: usize = 64;
/// Candidates whose transactions run at once: one step.
const AT_ONCE: usize = 8;
/// Steps of the outbox after the batches of candidates.
const OUTBOX_STEPS: usize = 8;
/// How long a worker that found nothing waits.
const IDLE: Duration = Duration::from_secs(1);
