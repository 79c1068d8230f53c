//! The queue of what may be collected, and the outbox of objects to delete.
//!
//! Every change that could leave something without a reason to stay puts a candidate with a due time into the
//! queue. The worker serves expired uploads and the outbox; candidates of other kinds wait in the queue, so
//! content that was deleted keeps its space. Objects are deleted from the outbox alone, later and as
//! often as needed (`I5`), and their row goes after the object has gone durably (`I6`).

use std::sync::Arc;

use crate::blob::StorageKey;
use crate::blob::objects::Removal;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Body, Db, Tx, statements};
use crate::store::Inner;
use crate::upload;

statements! {
    ENQUEUE = "INSERT INTO collection_queue (kind, repository_id, target_id, due_at, attempts) \
               VALUES ($1, $2, $3, $4, 0) \
               ON CONFLICT (kind, repository_id, target_id) DO UPDATE SET due_at = \
                   CASE WHEN collection_queue.due_at < excluded.due_at \
                        THEN excluded.due_at ELSE collection_queue.due_at END";
    FORGET = "DELETE FROM collection_queue WHERE kind = $1 AND repository_id = $2 AND target_id = $3";
    DUE_UPLOADS = "SELECT q.repository_id, q.target_id, u.name FROM collection_queue q \
                   LEFT JOIN upload u ON u.id = q.target_id \
                   WHERE q.kind = 'upload' AND q.due_at <= $1 ORDER BY q.due_at LIMIT 50";
    DISCARD = "INSERT INTO deletion (storage_key, due_at, attempts) VALUES ($1, $2, 0) \
               ON CONFLICT (storage_key) DO NOTHING";
    DISCARD_MULTIPART = "INSERT INTO deletion (storage_key, due_at, attempts, multipart) VALUES ($1, $2, 0, $3) \
                         ON CONFLICT (storage_key) DO NOTHING";
    DUE_DELETIONS = "SELECT storage_key, multipart FROM deletion WHERE due_at <= $1 ORDER BY due_at LIMIT 100";
    DELETED = "DELETE FROM deletion WHERE storage_key = $1";
    POSTPONE = "UPDATE deletion SET due_at = $2, attempts = attempts + 1 WHERE storage_key = $1";
    COUNT_DELETIONS = "SELECT COUNT(*) FROM deletion";
}

/// What a candidate is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Blob,
    Manifest,
    RepositoryBlob,
    Upload,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Manifest => "manifest",
            Self::RepositoryBlob => "repository_blob",
            Self::Upload => "upload",
        }
    }
}

/// Puts a candidate into the queue, or makes it due later. Its own row is locked before this one.
pub(crate) async fn enqueue(
    tx: &mut Tx,
    kind: Kind,
    repository: i64,
    target: i64,
    due: Timestamp,
) -> Result<(), Error> {
    tx.execute(
        &ENQUEUE,
        &[
            kind.name().into(),
            repository.into(),
            target.into(),
            due.into(),
        ],
    )
    .await
    .map(drop)
}

/// Takes a candidate out of the queue.
pub(crate) async fn forget(
    tx: &mut Tx,
    kind: Kind,
    repository: i64,
    target: i64,
) -> Result<(), Error> {
    tx.execute(
        &FORGET,
        &[kind.name().into(), repository.into(), target.into()],
    )
    .await
    .map(drop)
}

/// Puts an object into the outbox.
pub(crate) async fn discard(tx: &mut Tx, key: &str, due: Timestamp) -> Result<(), Error> {
    tx.execute(&DISCARD, &[key.into(), due.into()])
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

/// Expires uploads that are due; how many were looked at.
pub(crate) async fn expire_uploads(inner: &Arc<Inner>) -> Result<usize, Error> {
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

/// Deletes the objects of the outbox that are due; how many went.
pub(crate) async fn serve_outbox(inner: &Arc<Inner>) -> Result<usize, Error> {
    let now = inner.clock.now();
    let due = inner.db.scan(&DUE_DELETIONS, vec![now.into()]).await?;
    if due.is_empty() {
        return Ok(0);
    }
    let mut removals = Vec::with_capacity(due.len());
    for row in &due {
        removals.push(Removal {
            key: StorageKey::parse(&row.text(0)?)?,
            multipart: row.opt_text(1)?,
        });
    }
    failpoint("outbox.before_remove");
    let results = inner.objects.remove(removals).await;
    failpoint("outbox.after_entry_sync");
    let mut gone = Vec::new();
    let mut stuck = Vec::new();
    for (key, result) in results {
        match result {
            Ok(()) => gone.push(key),
            Err(error) => {
                tracing::warn!(key = key.as_str(), %error, "an object cannot be deleted, it is tried again later");
                stuck.push(key);
            }
        }
    }
    let count = gone.len();
    inner.db.write(Deleted { gone, stuck }).await?;
    failpoint("outbox.after_rows");
    Ok(count)
}

struct Deleted {
    gone: Vec<StorageKey>,
    stuck: Vec<StorageKey>,
}

impl Body for Deleted {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for key in &self.gone {
            tx.execute(&DELETED, &[key.as_str().into()]).await?;
        }
        let later = tx.now().plus(RETRY);
        for key in &self.stuck {
            tx.execute(&POSTPONE, &[key.as_str().into(), later.into()])
                .await?;
        }
        Ok(())
    }
}

pub(crate) async fn count_deletions(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT_DELETIONS, Vec::new()).await?)
}

const RETRY: std::time::Duration = std::time::Duration::from_mins(1);
