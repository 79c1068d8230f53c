//! Blobs: the map from digest to bytes.
//!
//! A blob's bytes are in its row when they are few, else in an object under a storage key: exactly one of the
//! two. A repository sees a blob only through its own hold on it ([`crate::lease`]), so bytes are shared and
//! rights are not.

pub(crate) mod file_system;
pub(crate) mod objects;
pub(crate) mod s3;

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use oci::{Digest, RepositoryName};

use crate::collect::{self, Kind};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::lease;
use crate::model::{Actor, Blob, BlobContent, BlobInfo};
use crate::repository::{self, Place};
use crate::sql::{Body, Db, Tx, WriteKind, statements};
use crate::store::Inner;
use crate::{audit, manifest};
pub(crate) use file_system::StorageKey;

statements! {
    STAT = "SELECT b.size, rb.lease_until, CAST(CASE WHEN EXISTS ( \
                SELECT 1 FROM manifest_blob e WHERE e.repository_id = r.id AND e.digest = b.digest) \
                THEN 1 ELSE 0 END AS BIGINT) AS named \
            FROM repository r JOIN blob b ON b.digest = $2 \
            JOIN repository_blob rb ON rb.repository_id = r.id AND rb.blob_id = b.id \
            WHERE r.name = $1 AND b.state = 'ok'";
    OPEN = "SELECT b.size, b.body, b.storage_key, b.state FROM repository r JOIN blob b ON b.digest = $2 \
            JOIN repository_blob rb ON rb.repository_id = r.id AND rb.blob_id = b.id WHERE r.name = $1";
    ADD = "INSERT INTO blob (id, digest, size, body, storage_key, state, created_at, checked_at) \
           VALUES ($1, $2, $3, $4, $5, 'ok', $6, $6) \
           ON CONFLICT (digest) DO UPDATE SET size = blob.size RETURNING id, storage_key, state";
    HEAL = "UPDATE blob SET body = $2, storage_key = $3, state = 'ok', checked_at = $4, checking_until = NULL \
            WHERE id = $1";
    SUSPECT = "UPDATE blob SET state = 'suspect' WHERE digest = $1";
    TAKE = "SELECT digest, size, storage_key FROM blob WHERE id = $1 {for update}";
    REMOVE = "DELETE FROM blob WHERE id = $1";
    TOTALS = "SELECT COUNT(*) AS blobs, CAST(COALESCE(SUM(size), 0) AS BIGINT) AS bytes FROM blob";
}

/// HEAD of a blob: one query, and with `renew` rarely a transaction (`I7`). The database answers each
/// time; nothing remembers that a blob exists (`I8`).
pub(crate) async fn stat(
    inner: &Inner,
    repository: &RepositoryName,
    digest: &Digest,
    renew: bool,
) -> Result<Option<BlobInfo>, Error> {
    let rows = inner
        .db
        .read(&STAT, &[repository.as_str().into(), digest.into()])
        .await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    let info = BlobInfo { size: row.u64(0)? };
    let lease = inner.options.lease;
    let near = row.time(1)? < inner.clock.now().plus(lease / 2);
    if renew && near && row.i64(2)? == 0 {
        let kept = inner
            .db
            .write(lease::Renew {
                repository: repository.clone(),
                digest: digest.clone(),
                lease,
                kind: lease::Renewed::Blob,
            })
            .await?;
        return Ok(kept.then_some(info));
    }
    Ok(Some(info))
}

/// Opens a blob: one query and one `open`; of an object store nothing is asked before its bytes are.
pub(crate) async fn open(
    inner: &Inner,
    repository: &RepositoryName,
    digest: &Digest,
) -> Result<Option<Blob>, Error> {
    let mut rows = inner
        .db
        .read(&OPEN, &[repository.as_str().into(), digest.into()])
        .await?;
    let Some(row) = rows.first_mut() else {
        return Ok(None);
    };
    let size = row.u64(0)?;
    if row.text(3)? != "ok" {
        return Err(Error::BlobDamaged(digest.clone()));
    }
    let content = match row.opt_text(2)? {
        Some(key) => inner.objects.read(&StorageKey::parse(&key)?, size)?,
        None => BlobContent::Inline(Bytes::from(row.take_bytes(1)?)),
    };
    Ok(Some(Blob { size, content }))
}

impl Blob {
    /// Reads a range whole, for small blobs and tests. What lies after the end is left out.
    ///
    /// # Errors
    /// [`Error::Database`] when the file cannot be read; [`Error::Unavailable`] of an object store.
    pub async fn read(&self, range: Range<u64>) -> Result<Bytes, Error> {
        let end = range.end.min(self.size);
        let start = range.start.min(end);
        match &self.content {
            BlobContent::Inline(bytes) => {
                let fits = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                Ok(bytes.slice(fits(start)..fits(end)))
            }
            BlobContent::File(file) => {
                let failed = |error: std::io::Error| {
                    Error::Database(format!("an object cannot be read: {error}"))
                };
                let file = file.try_clone().map_err(failed)?;
                let length = usize::try_from(end - start).unwrap_or(usize::MAX);
                tokio::task::spawn_blocking(move || {
                    let mut buffer = vec![0; length];
                    file.read_exact_at(&mut buffer, start)?;
                    Ok(Bytes::from(buffer))
                })
                .await
                .unwrap_or_else(|_| Err(std::io::Error::other("the reader stopped")))
                .map_err(failed)
            }
            BlobContent::Remote(blob) => {
                let mut stream = blob.stream(start..end).await?;
                let mut buffer = BytesMut::new();
                while let Some(bytes) = stream.next().await? {
                    buffer.extend_from_slice(&bytes);
                }
                Ok(buffer.freeze())
            }
        }
    }

    /// A URL with which anybody may read the whole blob for `ttl`, when its bytes are in an object store.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when there are no credentials to sign with.
    pub async fn presign(&self, ttl: Duration) -> Result<Option<String>, Error> {
        match &self.content {
            BlobContent::Inline(_) | BlobContent::File(_) => Ok(None),
            BlobContent::Remote(blob) => blob.presign(ttl).await.map(Some),
        }
    }
}

/// The verified and durable bytes of a new blob.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Inline(Bytes),
    Object(StorageKey),
}

/// How long a commit keeps what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keep {
    /// The blob, before a manifest names it.
    pub(crate) lease: Duration,
    /// The object that a healed blob had before.
    pub(crate) replaced: Duration,
    /// An object that is not needed, and may still be written.
    pub(crate) unused: Duration,
}

/// Makes a blob visible (`I1`): its bytes are durable and its digest is verified when this is called. Blob row,
/// lease and queue row are one transaction (`I2`). When the same content is there already, ours goes out
/// through the outbox; when that is known to be damaged, ours takes its place.
pub(crate) async fn commit(
    tx: &mut Tx,
    place: Place,
    digest: &Digest,
    size: u64,
    content: &Content,
    keep: Keep,
    actor: &Actor,
) -> Result<(), Error> {
    let (now, fresh) = (tx.now(), tx.id());
    let (body, key) = match content {
        Content::Inline(bytes) => (Some(bytes.as_ref()), None),
        Content::Object(key) => (None, Some(key.as_str())),
    };
    let row = tx
        .query_opt(
            &ADD,
            &[
                fresh.into(),
                digest.into(),
                size.into(),
                body.into(),
                key.into(),
                now.into(),
            ],
        )
        .await?
        .ok_or_else(|| Error::Database("a blob vanished".to_owned()))?;
    let id = row.i64(0)?;
    if id != fresh {
        if row.text(2)? != "ok" {
            tx.execute(&HEAL, &[id.into(), body.into(), key.into(), now.into()])
                .await?;
            if let Some(replaced) = row.opt_text(1)? {
                // The blob's own, and maybe sound: reads of it, and an older copy of the database, may want it.
                collect::discard_blob(tx, &replaced, size, now.plus(keep.replaced)).await?;
            }
        } else if let Some(unused) = key {
            collect::discard(tx, unused, now.plus(keep.unused)).await?;
        }
    }
    failpoint("commit.after_blob_row");
    lease::grant(tx, place, digest, id, size, keep.lease, &actor.principal).await?;
    failpoint("commit.after_lease");
    Ok(())
}

/// Mounts a blob from the first source that holds it.
pub(crate) struct Mount {
    pub(crate) into: RepositoryName,
    pub(crate) digest: Digest,
    pub(crate) sources: Arc<[RepositoryName]>,
    pub(crate) actor: Actor,
    pub(crate) lease: Duration,
}

impl Body for Mount {
    type Output = bool;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        for source in self.sources.iter() {
            let Some(place) = repository::find(tx, source).await? else {
                continue;
            };
            let held = lease::find_held(tx, place.repository, &self.digest).await?;
            let Some(held) = held.filter(|held| held.sound) else {
                continue;
            };
            let into = repository::ensure(tx, &self.into).await?;
            let principal = &self.actor.principal;
            lease::grant(
                tx,
                into,
                &self.digest,
                held.blob,
                held.size,
                self.lease,
                principal,
            )
            .await?;
            return Ok(true);
        }
        Ok(false)
    }
}

/// Takes a blob out of a repository. The bytes stay until the collector finds that nobody holds them.
pub(crate) struct Delete {
    pub(crate) repository: RepositoryName,
    pub(crate) digest: Digest,
    pub(crate) actor: Actor,
}

impl Body for Delete {
    type Output = ();
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let unknown = || Error::BlobUnknown(self.digest.clone());
        let place = repository::find(tx, &self.repository)
            .await?
            .ok_or_else(unknown)?;
        let held = lease::take_held(tx, place.repository, &self.digest)
            .await?
            .ok_or_else(unknown)?;
        // A new statement after the lock: it sees every edge that was committed before it was granted.
        if manifest::names_blob(tx, place.repository, &self.digest).await? {
            return Err(Error::BlobInUse(self.digest.clone()));
        }
        failpoint("delete.before_rows");
        lease::release(tx, place, held).await?;
        let now = tx.now();
        collect::enqueue(tx, Kind::Blob, 0, held.blob, now);
        collect::forget(tx, Kind::RepositoryBlob, place.repository, held.blob);
        failpoint("delete.after_rows");
        let target = format!("{}@{}", self.repository.as_str(), self.digest);
        audit::allowed(tx, &self.actor, "blob.delete", target).await
    }
}

/// A blob whose row is locked against everybody who wants to hold it.
pub(crate) struct Taken {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) key: Option<String>,
}

pub(crate) async fn take(tx: &mut Tx, blob: i64) -> Result<Option<Taken>, Error> {
    tx.query_opt(&TAKE, &[blob.into()])
        .await?
        .map(|row| {
            Ok(Taken {
                digest: row.digest(0)?,
                size: row.u64(1)?,
                key: row.opt_text(2)?,
            })
        })
        .transpose()
}

/// Deletes the row of a blob that nobody holds. Its object is the outbox's.
pub(crate) async fn remove(tx: &mut Tx, blob: i64) -> Result<(), Error> {
    tx.execute(&REMOVE, &[blob.into()]).await.map(drop)
}

/// Marks a blob whose bytes were found damaged: it is absent until the same content is pushed again (`I20`).
pub(crate) struct Suspect(pub(crate) Digest);

impl Body for Suspect {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&SUSPECT, &[(&self.0).into()]).await.map(drop)
    }
}

/// How many blobs there are, and their bytes.
pub(crate) async fn totals(db: &Db) -> Result<(u64, u64), Error> {
    let rows = db.scan(&TOTALS, Vec::new()).await?;
    rows.first()
        .map_or(Ok((0, 0)), |row| Ok((row.u64(0)?, row.u64(1)?)))
}
