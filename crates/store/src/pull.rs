//! Pull statistics: who pulled what, and when last.
//!
//! A pull only adds one to a counter in memory (`I18`): pulls are merged per repository, manifest, principal and hour, and
//! written in batches once a minute and when the store is closed. What a crash loses is at most that minute. The memory is
//! bounded: beyond it, the entries that are there longest are dropped, and counted.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci::{Digest, RepositoryName};

use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::{Body, Tx, WriteKind, statements};
use crate::store::{Inner, Store};

statements! {
    ADD = "INSERT INTO pull (repository_id, digest, principal, hour, pulls) \
           SELECT r.id, $2, $3, $4, $5 FROM repository r WHERE r.name = $1 \
           ON CONFLICT (repository_id, digest, principal, hour) DO UPDATE SET pulls = pull.pulls + excluded.pulls";
    PRUNE = "DELETE FROM pull WHERE (repository_id, digest, principal, hour) IN ( \
                 SELECT p.repository_id, p.digest, p.principal, p.hour FROM pull p WHERE p.hour < $1 LIMIT 1000)";
    OLD = "SELECT hour FROM pull WHERE hour < $1 LIMIT 1";
    OF = "SELECT CAST(COALESCE(MAX(p.hour), -1) AS BIGINT) AS hour, CAST(COALESCE(SUM(p.pulls), 0) AS BIGINT) AS pulls \
          FROM repository r JOIN pull p ON p.repository_id = r.id WHERE r.name = $1 AND p.digest = $2";
    OF_REPOSITORY = "SELECT p.digest, MAX(p.hour) AS hour, CAST(SUM(p.pulls) AS BIGINT) AS pulls \
                     FROM repository r JOIN pull p ON p.repository_id = r.id \
                     WHERE r.name = $1 AND p.digest > $2 GROUP BY p.digest ORDER BY p.digest LIMIT $3";
}

/// What is known of the pulls of one manifest, within the time that statistics are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulls {
    /// The manifest.
    pub digest: Digest,
    /// The beginning of the hour in which it was pulled last.
    pub last: Timestamp,
    /// How often it was pulled.
    pub pulls: u64,
}

impl Store {
    /// Counts a pull of a manifest. Writes nothing now.
    pub fn note_pull(&self, repository: &RepositoryName, digest: &Digest, principal: &str) {
        let inner = &self.0;
        if inner.options.pull_retention.is_zero() {
            return;
        }
        let entry = Entry {
            repository: repository.clone(),
            digest: digest.clone(),
            principal: principal.to_owned(),
            hour: hour(inner.clock.now()),
        };
        inner.pulls.add(entry, 1);
    }

    /// Entries of pull statistics that were dropped since the start because they were more than the memory for them.
    pub fn dropped_pulls(&self) -> u64 {
        self.0.pulls.lock().dropped
    }

    /// The pulls of one manifest; `None` when none is known.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn pulls_of(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Pulls>, Error> {
        let rows = self
            .0
            .db
            .read(&OF, &[repository.as_str().into(), digest.into()])
            .await?;
        let (mut last, mut pulls) = match rows.first() {
            Some(row) => (row.i64(0)?, row.u64(1)?),
            None => (-1, 0),
        };
        for (entry, count) in self.0.pulls.of(repository) {
            if entry.digest == *digest {
                last = last.max(entry.hour);
                pulls += count;
            }
        }
        Ok((pulls > 0).then(|| Pulls {
            digest: digest.clone(),
            last: begin(last),
            pulls,
        }))
    }

    /// The pulls of a repository's manifests in the order of their digests after `last`, for policies that look at all of
    /// them. What was pulled in the last minute may be missing.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn pulls_of_repository(
        &self,
        repository: &RepositoryName,
        last: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Pulls>, Error> {
        let after = last.map_or_else(Vec::new, crate::sql::encode_digest);
        self.0
            .db
            .scan(
                &OF_REPOSITORY,
                vec![repository.as_str().into(), after.into(), limit.into()],
            )
            .await?
            .iter()
            .map(|row| {
                Ok(Pulls {
                    digest: row.digest(0)?,
                    last: begin(row.i64(1)?),
                    pulls: row.u64(2)?,
                })
            })
            .collect()
    }

    /// Writes what was counted, without waiting for the minute to end.
    ///
    /// # Errors
    /// As for every call that writes; what was not written is kept.
    pub async fn flush_pulls(&self) -> Result<(), Error> {
        flush(&self.0).await
    }
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    repository: RepositoryName,
    digest: Digest,
    principal: String,
    /// Hours since the epoch.
    hour: i64,
}

/// Pulls that are not written yet.
#[derive(Default)]
pub(crate) struct Buffer(Mutex<Counters>);

#[derive(Default)]
struct Counters {
    counts: HashMap<Arc<Entry>, u64>,
    /// In the order in which they came.
    order: VecDeque<Arc<Entry>>,
    dropped: u64,
}

impl Buffer {
    fn add(&self, entry: Entry, count: u64) {
        let mut counters = self.lock();
        if let Some(known) = counters.counts.get_mut(&entry) {
            *known += count;
            return;
        }
        while counters.order.len() >= MOST {
            if let Some(oldest) = counters.order.pop_front() {
                counters.counts.remove(&oldest);
                counters.dropped += 1;
            }
        }
        let entry = Arc::new(entry);
        counters.order.push_back(Arc::clone(&entry));
        counters.counts.insert(entry, count);
    }

    /// Takes the oldest entries out.
    fn take(&self, most: usize) -> Vec<(Arc<Entry>, u64)> {
        let mut counters = self.lock();
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some(entry) = counters.order.pop_front()
        {
            if let Some(count) = counters.counts.remove(&entry) {
                taken.push((entry, count));
            }
        }
        taken
    }

    fn of(&self, repository: &RepositoryName) -> Vec<(Arc<Entry>, u64)> {
        self.lock()
            .counts
            .iter()
            .filter(|(entry, _)| entry.repository == *repository)
            .map(|(entry, count)| (Arc::clone(entry), *count))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what was counted when a minute is over. Where that cannot be now (a full disk, read-only mode), it is kept as far
/// as the memory for it goes; other work does not wait for it.
pub(crate) async fn flush_when_due(inner: &Inner) -> Result<(), Error> {
    let now = inner.clock.now();
    if !inner.flushing.is_due(now) {
        return Ok(());
    }
    match flush(inner).await {
        Ok(()) => {}
        Err(Error::Stopped) => return Err(Error::Stopped),
        Err(error) => tracing::debug!(%error, "pull statistics are written later"),
    }
    let kept = hour(now.minus(inner.options.pull_retention));
    while !inner.db.read(&OLD, &[kept.into()]).await?.is_empty() {
        inner.db.write(Prune { before: kept }).await?;
    }
    inner.flushing.done(now, EVERY);
    Ok(())
}

/// Writes what was counted, batch by batch. What could not be written is put back.
pub(crate) async fn flush(inner: &Inner) -> Result<(), Error> {
    loop {
        let mut batch = inner.pulls.take(BATCH);
        if batch.is_empty() {
            return Ok(());
        }
        // In one order, so that replicas that write at once never wait for each other in a circle.
        batch.sort_unstable();
        let batch = Arc::new(batch);
        if let Err(error) = inner.db.write(Write(Arc::clone(&batch))).await {
            for (entry, count) in batch.iter() {
                inner.pulls.add(Entry::clone(entry), *count);
            }
            return Err(error);
        }
    }
}

struct Write(Arc<Vec<(Arc<Entry>, u64)>>);

impl Body for Write {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for (entry, count) in self.0.iter() {
            tx.execute(
                &ADD,
                &[
                    entry.repository.as_str().into(),
                    (&entry.digest).into(),
                    (&entry.principal).into(),
                    entry.hour.into(),
                    (*count).into(),
                ],
            )
            .await?;
        }
        Ok(())
    }
}

struct Prune {
    before: i64,
}

impl Body for Prune {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&PRUNE, &[self.before.into()]).await.map(drop)
    }
}

/// Something that is done every now and then.
#[derive(Debug, Default)]
pub(crate) struct Schedule(Mutex<Option<Timestamp>>);

impl Schedule {
    /// At first at once.
    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        self.lock().is_none_or(|next| next <= now)
    }

    /// It was done; it is due again after `pause`.
    pub(crate) fn done(&self, now: Timestamp, pause: Duration) {
        *self.lock() = Some(now.plus(pause));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Timestamp>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hour(at: Timestamp) -> i64 {
    at.0.div_euclid(HOUR)
}

fn begin(hour: i64) -> Timestamp {
    Timestamp(hour.saturating_mul(HOUR))
}

/// Micro-seconds.
const HOUR: i64 = 3_600_000_000;
/// Entries that are kept in memory at most.
const MOST: usize = 65_536;
const BATCH: usize = 500;
const EVERY: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(principal: usize) -> Entry {
        Entry {
            repository: "a/b".parse().unwrap(),
            digest: Digest::sha256(b"x"),
            principal: format!("user:{principal}"),
            hour: 7,
        }
    }

    #[test]
    fn the_oldest_go_first_and_are_counted() {
        let buffer = Buffer::default();
        for principal in 0..MOST + 3 {
            buffer.add(entry(principal), 1);
        }
        buffer.add(entry(MOST), 4);
        assert_eq!(buffer.lock().dropped, 3);
        assert_eq!(buffer.lock().counts.len(), MOST);
        let first = buffer.take(1);
        assert_eq!(first[0].0.principal, "user:3");
        let rest = buffer.take(usize::MAX);
        assert_eq!(rest.len(), MOST - 1);
        assert_eq!(
            rest.iter().map(|(_, count)| count).sum::<u64>(),
            MOST as u64 + 3
        );
        assert!(buffer.take(1).is_empty() && buffer.lock().counts.is_empty());
    }

    #[test]
    fn hours_begin_where_they_do() {
        assert_eq!(hour(Timestamp(HOUR * 5 - 1)), 4);
        assert_eq!(begin(hour(Timestamp(HOUR * 5 + 1))), Timestamp(HOUR * 5));
    }
}
