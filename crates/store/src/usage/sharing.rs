//! What repositories and namespaces have of the disk, when several of them hold the same blob.
//!
//! A blob that `n` repositories hold is stored once; each of them has an `n`th part of it. So the parts of all
//! repositories add up to what is stored. Manifests are stored by each repository for itself. What only one repository
//! (or namespace) holds is its own: that much goes with it.
//!
//! Only blobs that are shared make a difference to the logical bytes, so only those are kept in memory: two sums for each
//! repository and namespace that shares something. They are counted in the background, a page of an index at a time,
//! and for no more than a hundredth of the time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::{Counting, Turn};
use crate::error::Error;
use crate::sql::{Db, statements};
use crate::store::{Inner, Store};

statements! {
    // The limit is a literal, and the beginning is said of both tables, so that PostgreSQL plans for a page.
    HOLDERS = "SELECT rb.blob_id, rb.repository_id, r.namespace_id, b.size FROM repository_blob rb \
               JOIN blob b ON b.id = rb.blob_id JOIN repository r ON r.id = rb.repository_id \
               WHERE rb.blob_id >= $1 AND b.id >= $1 AND (rb.blob_id > $1 OR rb.repository_id > $2) \
               ORDER BY rb.blob_id, rb.repository_id LIMIT 2000";
}

/// What something has of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredUsage {
    /// Its part of the bytes on the disk: of a blob that `n` repositories hold, each has an `n`th.
    pub bytes: u64,
    /// Bytes on the disk that nobody else holds.
    pub exclusive: u64,
}

/// How much less than its logical bytes something has.
#[derive(Clone, Copy, Debug, Default)]
struct Less {
    stored: u64,
    exclusive: u64,
}

impl Less {
    fn of(self, logical: u64) -> StoredUsage {
        // Logical bytes are those of now, and these were counted a while ago.
        StoredUsage {
            bytes: logical.saturating_sub(self.stored),
            exclusive: logical.saturating_sub(self.exclusive),
        }
    }
}

/// What was counted.
#[derive(Default)]
struct Shared {
    repositories: BTreeMap<i64, Less>,
    namespaces: BTreeMap<i64, Less>,
}

/// What was counted last.
#[derive(Default)]
pub(crate) struct Sharing {
    known: Mutex<Option<Known>>,
    turn: Counting,
}

#[derive(Clone)]
struct Known {
    shared: Arc<Shared>,
    at: Instant,
    took: Duration,
}

/// The figures of one answer.
pub(super) struct Figures(Option<Arc<Shared>>);

impl Figures {
    pub(super) fn of_repository(&self, id: i64, logical: u64) -> Option<StoredUsage> {
        let less = self.0.as_ref()?.repositories.get(&id);
        Some(less.copied().unwrap_or_default().of(logical))
    }

    pub(super) fn of_namespace(&self, id: i64, logical: u64) -> Option<StoredUsage> {
        let less = self.0.as_ref()?.namespaces.get(&id);
        Some(less.copied().unwrap_or_default().of(logical))
    }
}

impl Sharing {
    fn known(&self) -> Option<Known> {
        self.lock().clone()
    }

    pub(super) fn figures(&self) -> Figures {
        Figures(self.known().map(|known| known.shared))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Counts what repositories share, when the figures of [`Store::usage_of_repositories`] and
    /// [`Store::usage_of_namespaces`] are old, and tells how old they are; `None`: it was never done to the end. Counting
    /// that takes long goes on in the background.
    pub async fn refresh_sharing(&self) -> Option<Duration> {
        let sharing = &self.0.sharing;
        let old = sharing
            .known()
            .is_none_or(|known| known.at.elapsed() >= known.took * 100);
        if old && let Some(turn) = sharing.turn.take() {
            let (done, mut wait) = watch::channel(());
            let store = self.clone();
            self.0.tasks.spawn_on(
                async move {
                    let counted = count(&store.0, turn).await;
                    if let Err(error) = counted {
                        tracing::warn!(%error, "what repositories share could not be counted");
                    }
                    drop(done);
                },
                &self.0.runtime,
            );
            drop(tokio::time::timeout(PATIENCE, wait.changed()).await);
        }
        sharing.known().map(|known| known.at.elapsed())
    }

    /// Counts now what repositories share, for tests.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    #[doc(hidden)]
    pub async fn count_sharing(&self) -> Result<(), Error> {
        match self.0.sharing.turn.take() {
            Some(turn) => count(&self.0, turn).await,
            None => Ok(()),
        }
    }
}

async fn count(inner: &Inner, _turn: Turn) -> Result<(), Error> {
    let begun = Instant::now();
    let shared = walk(&inner.db).await?;
    *inner.sharing.lock() = Some(Known {
        shared: Arc::new(shared),
        at: Instant::now(),
        took: begun.elapsed(),
    });
    Ok(())
}

async fn walk(db: &Db) -> Result<Shared, Error> {
    let mut shared = Shared::default();
    let mut blob = (i64::MIN, 0);
    // Repositories that hold it, with their namespaces.
    let mut holders = Vec::<(i64, i64)>::new();
    loop {
        let after = holders
            .last()
            .map_or(i64::MIN, |(repository, _)| *repository);
        let rows = db.scan(&HOLDERS, vec![blob.0.into(), after.into()]).await?;
        for row in &rows {
            let id = row.i64(0)?;
            if id != blob.0 {
                shared.add(blob.1, &holders);
                holders.clear();
                blob = (id, row.u64(3)?);
            }
            holders.push((row.i64(1)?, row.i64(2)?));
        }
        if rows.len() < PAGE {
            shared.add(blob.1, &holders);
            return Ok(shared);
        }
    }
}

impl Shared {
    /// Adds a blob that these hold.
    fn add(&mut self, size: u64, holders: &[(i64, i64)]) {
        let number = holders.len() as u64;
        if number < 2 {
            return;
        }
        let first = holders.first().map(|(_, namespace)| *namespace);
        let one_namespace = holders.iter().all(|(_, of)| Some(*of) == first);
        for (at, (repository, namespace)) in (0_u64..).zip(holders) {
            // The bytes that are left over go to the first, so that the parts add up.
            let part = size / number + u64::from(at < size % number);
            let of_repository = self.repositories.entry(*repository).or_default();
            of_repository.stored += size - part;
            of_repository.exclusive += size;
            let of_namespace = self.namespaces.entry(*namespace).or_default();
            of_namespace.stored += size - part;
            // A namespace that holds it alone holds it once.
            if !(one_namespace && at == 0) {
                of_namespace.exclusive += size;
            }
        }
    }
}

/// Rows that are read at once, as the statement says.
const PAGE: usize = 2000;
/// How long somebody who asks waits for the figures.
const PATIENCE: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_and_what_is_alone_is_exclusive() {
        let mut shared = Shared::default();
        // Repositories 1 and 2 of namespace 10, 3 of namespace 20.
        shared.add(5, &[(1, 10)]);
        shared.add(100, &[(1, 10), (2, 10)]);
        shared.add(1001, &[(1, 10), (2, 10), (3, 20)]);
        let figures = Figures(Some(Arc::new(shared)));
        let usage = |bytes, exclusive| Some(StoredUsage { bytes, exclusive });
        assert_eq!(figures.of_repository(1, 1106), usage(5 + 50 + 334, 5));
        assert_eq!(figures.of_repository(2, 1101), usage(50 + 334, 0));
        assert_eq!(figures.of_repository(3, 1001), usage(333, 0));
        assert_eq!(figures.of_repository(4, 7), usage(7, 7));
        assert_eq!(figures.of_namespace(10, 2207), usage(105 + 668, 105));
        assert_eq!(figures.of_namespace(20, 1001), usage(333, 0));
        // Content that has gone since.
        assert_eq!(figures.of_repository(3, 10), usage(0, 0));
        assert_eq!(Figures(None).of_repository(1, 1), None);
    }
}
