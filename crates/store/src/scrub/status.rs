//! What the scrub tells of itself: how far all replicas are, from the rows, and what this process did, from counters.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oci::{Digest, RepositoryName};
use tokio::sync::Notify;

use super::{
    COUNT_DAMAGED, COUNT_SUSPECT, DAMAGED_LIST, Doubts, GET, HELD_BY, LEFT, NEEDED_BY, OLDEST,
    Pass, SUSPECTS, due_before,
};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::store::{Store, single};

/// How far the scrub is, and what it found.
#[derive(Clone, Debug, Default)]
pub struct ScrubStatus {
    /// Bytes per second that one replica reads; 0: the scrub is off.
    pub rate: u64,
    /// Everything is read once in this time.
    pub period: Duration,
    /// Everything that was read before this moment is to be read again (the end of the period, or `scrub run`).
    pub due_before: Timestamp,
    /// Blobs that are to be read.
    pub blobs_left: u64,
    /// Their bytes.
    pub bytes_left: u64,
    /// When the blob was read that was not read for the longest time.
    pub oldest: Option<Timestamp>,
    /// When the walk over the manifests began; `None` before the first.
    pub manifests_began: Option<Timestamp>,
    /// When it ended; `None` while it is under way.
    pub manifests_ended: Option<Timestamp>,
    /// How many blobs are damaged.
    pub suspect_count: u64,
    /// The first hundred of them.
    pub suspects: Vec<Suspect>,
    /// How many manifests are damaged in their rows.
    pub damaged_count: u64,
    /// The first hundred of them.
    pub damaged: Vec<DamagedManifest>,
}

/// A damaged blob.
#[derive(Clone, Debug)]
pub struct Suspect {
    /// Its digest.
    pub digest: Digest,
    /// The bytes that it should have.
    pub size: u64,
    /// When it was last read.
    pub checked_at: Option<Timestamp>,
    /// Repositories that hold it, at most 20: a push to any of them heals it everywhere.
    pub repositories: Vec<RepositoryName>,
    /// Manifests that need it, at most 20.
    pub manifests: Vec<(RepositoryName, Digest)>,
}

/// A manifest whose bytes are damaged in its row.
#[derive(Clone, Debug)]
pub struct DamagedManifest {
    /// Where.
    pub repository: RepositoryName,
    /// The digest that it should have.
    pub digest: Digest,
    /// When it was found.
    pub found_at: Timestamp,
}

/// What the scrub of this process did since it began.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(super) bytes: AtomicU64,
    pub(super) blobs: AtomicU64,
    pub(super) manifests: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) unreadable: AtomicU64,
    /// What one reading alone found.
    pub(super) doubts: Mutex<Doubts>,
    /// Wakes the worker.
    pub(super) wake: Notify,
}

/// What the scrub of this process did since it began, for `/metrics`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScrubCounters {
    /// Bytes read and hashed.
    pub bytes: u64,
    /// Blobs read to their end.
    pub blobs: u64,
    /// Manifests compared with their digest.
    pub manifests: u64,
    /// Blobs and manifests that were found damaged.
    pub damaged: u64,
    /// Blobs that could not be read, without a verdict.
    pub unreadable: u64,
}

impl Store {
    /// How far the scrub is, and what it found.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn scrub_status(&self) -> Result<ScrubStatus, Error> {
        let inner = &self.0;
        let (db, options) = (&inner.db, &inner.options);
        let due_before = due_before(inner).await?;
        let left = db.scan(&LEFT, vec![due_before.into()]).await?;
        let (blobs_left, bytes_left) = left
            .first()
            .map_or(Ok::<_, Error>((0, 0)), |row| Ok((row.u64(0)?, row.u64(1)?)))?;
        let pass = db.read(&GET, &["scrub.manifests".into()]).await?;
        let pass = match pass.first() {
            Some(row) => Pass::parse(&row.text(0)?),
            None => Pass::default(),
        };
        let mut suspects = Vec::new();
        for row in db.scan(&SUSPECTS, Vec::new()).await? {
            let id = row.i64(0)?;
            let held = db.scan(&HELD_BY, vec![id.into()]).await?;
            let needed = db.scan(&NEEDED_BY, vec![id.into()]).await?;
            suspects.push(Suspect {
                digest: row.digest(1)?,
                size: row.u64(2)?,
                checked_at: row.opt_i64(3)?.map(Timestamp),
                repositories: held
                    .iter()
                    .map(|row| row.parse(0))
                    .collect::<Result<_, _>>()?,
                manifests: needed
                    .iter()
                    .map(|row| Ok((row.parse(0)?, row.digest(1)?)))
                    .collect::<Result<_, Error>>()?,
            });
        }
        let damaged = db.scan(&DAMAGED_LIST, Vec::new()).await?;
        Ok(ScrubStatus {
            rate: options.scrub_rate,
            period: options.scrub_period,
            due_before,
            blobs_left,
            bytes_left,
            oldest: match db.read(&OLDEST, &[]).await?.first() {
                Some(row) => row.opt_i64(0)?.map(Timestamp),
                None => None,
            },
            manifests_began: pass.began.map(Timestamp),
            manifests_ended: pass.ended.map(Timestamp),
            suspect_count: single(&db.scan(&COUNT_SUSPECT, Vec::new()).await?)?,
            suspects,
            damaged_count: single(&db.scan(&COUNT_DAMAGED, Vec::new()).await?)?,
            damaged: damaged
                .iter()
                .map(|row| {
                    Ok(DamagedManifest {
                        repository: row.parse(0)?,
                        digest: row.digest(1)?,
                        found_at: row.time(2)?,
                    })
                })
                .collect::<Result<_, Error>>()?,
        })
    }

    /// How many blobs are marked as damaged.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn suspect_count(&self) -> Result<u64, Error> {
        single(&self.0.db.scan(&COUNT_SUSPECT, Vec::new()).await?)
    }

    /// What the scrub of this process did since it began.
    pub fn scrub_counters(&self) -> ScrubCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.0.scrub;
        ScrubCounters {
            bytes: of(&counters.bytes),
            blobs: of(&counters.blobs),
            manifests: of(&counters.manifests),
            damaged: of(&counters.damaged),
            unreadable: of(&counters.unreadable),
        }
    }
}
