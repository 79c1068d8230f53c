//! The outbox: objects whose blob is gone, and the only place from which objects are deleted (`I5`).
//!
//! The row of an object goes after the object has gone durably (`I6`), so a worker that dies leaves work, never a
//! stray. Deleting the same object twice does no harm: keys are never used again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::pace::Pace;
use crate::blob::StorageKey;
use crate::blob::objects::Removal;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::identity;
use crate::sql::{Body, Db, Tx, WriteKind, statements};
use crate::store::Inner;

statements! {
    DISCARD = "INSERT INTO deletion (storage_key, due_at, attempts, size) VALUES ($1, $2, 0, $3) \
               ON CONFLICT (storage_key) DO NOTHING";
    CLAIM = "WITH due AS (SELECT storage_key FROM deletion WHERE due_at <= $1 ORDER BY due_at LIMIT $2 {skip locked}) \
             UPDATE deletion SET due_at = $3, attempts = attempts + 1 \
             WHERE storage_key IN (SELECT storage_key FROM due) RETURNING storage_key, attempts, multipart";
    DISCARD_MULTIPART = "INSERT INTO deletion (storage_key, due_at, attempts, multipart) VALUES ($1, $2, 0, $3) \
                         ON CONFLICT (storage_key) DO NOTHING";
    DELETED = "DELETE FROM deletion WHERE storage_key = $1";
    POSTPONE = "UPDATE deletion SET due_at = $2 WHERE storage_key = $1";
    COUNT = "SELECT COUNT(*) FROM deletion";
    WAITING = "SELECT COUNT(*) AS objects, CAST(COALESCE(SUM(size), 0) AS BIGINT) AS bytes, \
                   CAST(COALESCE(SUM(CASE WHEN due_at <= $1 THEN 1 ELSE 0 END), 0) AS BIGINT) AS due, \
                   CAST(COALESCE(SUM(CASE WHEN attempts > 1 THEN 1 ELSE 0 END), 0) AS BIGINT) AS failed, \
                   MIN(due_at) AS oldest FROM deletion";
}

/// Puts an object into the outbox that nobody reads: what is left of an upload.
pub(crate) async fn discard(tx: &mut Tx, key: &str, due: Timestamp) -> Result<(), Error> {
    tx.execute(&DISCARD, &[key.into(), due.into(), None::<i64>.into()])
        .await
        .map(drop)
}

/// Puts the object of a multipart upload into the outbox. The upload is aborted before: the one of this id, or, where
/// it is empty, every one of this key.
pub(crate) async fn discard_multipart(
    tx: &mut Tx,
    key: &str,
    multipart: &str,
    due: Timestamp,
) -> Result<(), Error> {
    tx.execute(
        &DISCARD_MULTIPART,
        &[key.into(), due.into(), multipart.into()],
    )
    .await
    .map(drop)
}

/// Puts the object of a blob into the outbox. It waits until `due`, so that reads which have begun, and an older
/// copy of the database, still find it.
pub(crate) async fn discard_blob(
    tx: &mut Tx,
    key: &str,
    size: u64,
    due: Timestamp,
) -> Result<(), Error> {
    tx.execute(&DISCARD, &[key.into(), due.into(), size.into()])
        .await
        .map(drop)
}

/// Deletes some of the objects of the outbox that are due; how many were tried.
pub(super) async fn serve(inner: &Arc<Inner>, pace: &mut Pace) -> Result<usize, Error> {
    let began = Instant::now();
    let limit = inner.objects.removed_at_once();
    let due = inner.db.write(Claim { limit }).await?;
    if due.is_empty() {
        return Ok(0);
    }
    // What was given to another store is not ours to delete.
    inner.identity.look(&inner.db, identity::AGE).await?;
    failpoint("outbox.before_remove");
    let tried = due.len();
    let mut gone = Vec::new();
    let mut stuck = Vec::new();
    let mut attempts = HashMap::with_capacity(tried);
    let mut removals = Vec::with_capacity(tried);
    for doomed in due {
        attempts.insert(doomed.removal.key.clone(), doomed.attempts);
        removals.push(doomed.removal);
    }
    // The one place where objects are deleted. An object that is not there is deleted.
    for (key, result) in inner.objects.remove(removals).await {
        match result {
            Ok(()) => gone.push(key),
            Err(error) => {
                tracing::warn!(key = key.as_str(), %error, "an object cannot be deleted, it is tried again later");
                let attempts = attempts.get(&key).copied().unwrap_or(1);
                stuck.push((key, attempts));
            }
        }
    }
    failpoint("outbox.after_entry_sync");
    inner.collector.objects_deleted(gone.len());
    inner.db.write(Deleted { gone, stuck }).await?;
    failpoint("outbox.after_rows");
    pace.after_removal(began).await;
    Ok(tried)
}

/// An object to delete.
struct Doomed {
    removal: Removal,
    attempts: i64,
}

struct Claim {
    limit: usize,
}

impl Body for Claim {
    type Output = Vec<Doomed>;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<Doomed>, Error> {
        let now = tx.now();
        let until = now.plus(CLAIM_TIME);
        tx.query(&CLAIM, &[now.into(), self.limit.into(), until.into()])
            .await?
            .iter()
            .map(|row| {
                Ok(Doomed {
                    removal: Removal {
                        key: StorageKey::parse(&row.text(0)?)?,
                        multipart: row.opt_text(2)?,
                    },
                    attempts: row.i64(1)?,
                })
            })
            .collect()
    }
}

struct Deleted {
    gone: Vec<StorageKey>,
    /// Each with how often it was tried.
    stuck: Vec<(StorageKey, i64)>,
}

impl Body for Deleted {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for key in &self.gone {
            tx.execute(&DELETED, &[key.as_str().into()]).await?;
        }
        let now = tx.now();
        for (key, attempts) in &self.stuck {
            let later = now.plus(backoff(*attempts));
            tx.execute(&POSTPONE, &[key.as_str().into(), later.into()])
                .await?;
        }
        Ok(())
    }
}

/// How long an object waits after so many failures: a minute, doubled each time, at most an hour.
fn backoff(attempts: i64) -> Duration {
    let doublings = u32::try_from(attempts - 1).unwrap_or(0).min(6);
    (Duration::from_mins(1) * (1 << doublings)).min(Duration::from_hours(1))
}

pub(crate) async fn count(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT, Vec::new()).await?)
}

/// What waits in the outbox.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutboxLength {
    /// Objects that wait for their deletion, due or not.
    pub objects: u64,
    /// Their bytes, as far as they are known (what an upload left behind is not counted).
    pub bytes: u64,
    /// Objects that are due.
    pub due: u64,
    /// Objects that could not be deleted at the first try.
    pub failed: u64,
    /// When the one that waits longest is or was due.
    pub oldest: Option<Timestamp>,
}

pub(super) async fn length(db: &Db, now: Timestamp) -> Result<OutboxLength, Error> {
    let rows = db.scan(&WAITING, vec![now.into()]).await?;
    let Some(row) = rows.first() else {
        return Ok(OutboxLength::default());
    };
    Ok(OutboxLength {
        objects: row.u64(0)?,
        bytes: row.u64(1)?,
        due: row.u64(2)?,
        failed: row.u64(3)?,
        oldest: row.opt_i64(4)?.map(Timestamp),
    })
}

/// Longer than the deletion of a batch takes.
const CLAIM_TIME: Duration = Duration::from_mins(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_tried_again_ever_later() {
        let minutes = [1, 2, 3, 6, 7, 100].map(|n| backoff(n).as_secs() / 60);
        assert_eq!(minutes, [1, 2, 4, 32, 60, 60]);
        assert_eq!(backoff(0), Duration::from_mins(1));
    }
}
