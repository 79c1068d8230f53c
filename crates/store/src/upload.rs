//! Uploads: the rows behind them. [`writer`] moves the bytes, [`claim`] sees to it that one request does.
//!
//! An upload's row exists before the first byte of its object (`I6`): the storage key is recorded when the body
//! outgrows the row, before the file is made. The running hash state is stored with every recorded offset, so
//! an upload goes on without its bytes being read again.

pub(crate) mod claim;
pub(crate) mod writer;

use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest, Hasher, RepositoryName};

use crate::blob::{self, Content};
use crate::clock::Timestamp;
use crate::collect::{self, Kind};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, UploadId};
use crate::repository;
use crate::sql::{Body, Db, Row, Tx, WriteKind, statements};

statements! {
    ADD = "INSERT INTO upload (id, name, repository_id, algorithm, storage_key, body, size, hash_state, \
               state_version, version, created_by, created_at, expires_at) \
           VALUES ($1, $2, $3, $4, $5, $6, 0, $7, $8, 1, $9, $10, $11)";
    FIND = "SELECT u.id, u.algorithm, u.storage_key, u.body, u.size, u.hash_state, u.state_version, u.version, \
                u.created_by, u.expires_at \
            FROM upload u JOIN repository r ON r.id = u.repository_id WHERE u.name = $1 AND r.name = $2";
    OFFSET = "SELECT u.size, u.expires_at FROM upload u JOIN repository r ON r.id = u.repository_id \
              WHERE u.name = $1 AND r.name = $2";
    SPILL = "UPDATE upload SET storage_key = $3, version = version + 1 WHERE id = $1 AND version = $2";
    RECORD = "UPDATE upload SET size = $3, hash_state = $4, body = $5, expires_at = $6, version = version + 1 \
              WHERE id = $1 AND version = $2";
    REMOVE_VERSION = "DELETE FROM upload WHERE id = $1 AND version = $2 RETURNING storage_key, repository_id";
    REMOVE = "DELETE FROM upload WHERE id = $1 RETURNING storage_key, repository_id";
    TAKE = "SELECT expires_at FROM upload WHERE id = $1 {for update}";
    COUNT = "SELECT COUNT(*) FROM upload";
}

/// The version of what an upload's row holds, with the form of the hash state.
const STATE_VERSION: i64 = 1;

/// Starts an upload.
pub(crate) struct Start {
    pub(crate) repository: RepositoryName,
    pub(crate) name: UploadId,
    pub(crate) algorithm: Algorithm,
    pub(crate) principal: String,
    pub(crate) expiry: Duration,
    /// The object that is about to be written, for a single POST that outgrew the row.
    pub(crate) key: Option<String>,
}

impl Body for Start {
    type Output = i64;

    async fn run(&self, tx: &mut Tx) -> Result<i64, Error> {
        failpoint("upload.before_row");
        let place = repository::ensure(tx, &self.repository).await?;
        let (id, now) = (tx.id(), tx.now());
        let expires = now.plus(self.expiry);
        let body: Option<&[u8]> = Some(&[]);
        tx.execute(
            &ADD,
            &[
                id.into(),
                (&self.name.0).into(),
                place.repository.into(),
                self.algorithm.name().into(),
                self.key.as_ref().into(),
                body.into(),
                Hasher::new(self.algorithm).state().into(),
                STATE_VERSION.into(),
                (&self.principal).into(),
                now.into(),
                expires.into(),
            ],
        )
        .await?;
        collect::enqueue(tx, Kind::Upload, place.repository, id, expires).await?;
        failpoint("upload.after_row");
        Ok(id)
    }
}

/// What is recorded of an open upload.
pub(crate) struct Open {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) key: Option<String>,
    /// The bytes, while they are in the row.
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) size: u64,
    pub(crate) hasher: Hasher,
    pub(crate) principal: String,
}

pub(crate) async fn find(
    db: &Db,
    repository: &RepositoryName,
    id: &UploadId,
    now: Timestamp,
) -> Result<Open, Error> {
    let rows = db
        .read(&FIND, &[(&id.0).into(), repository.as_str().into()])
        .await?;
    let row = rows.first().ok_or(Error::UploadUnknown)?;
    if row.time(9)? <= now {
        return Err(Error::UploadUnknown);
    }
    open(row)
}

fn open(row: &Row) -> Result<Open, Error> {
    let version = row.i64(6)?;
    if version != STATE_VERSION {
        tracing::warn!(
            version,
            "an upload was written by another version of this program"
        );
        return Err(Error::UploadUnknown);
    }
    let algorithm: Algorithm = row.parse(1)?;
    let hasher = Hasher::resume(algorithm, &row.bytes(5)?)
        .map_err(|error| Error::Database(format!("an upload's row: {error}")))?;
    Ok(Open {
        id: row.i64(0)?,
        version: row.i64(7)?,
        key: row.opt_text(2)?,
        body: row.opt_bytes(3)?,
        size: row.u64(4)?,
        hasher,
        principal: row.text(8)?,
    })
}

/// The recorded offset of an open upload.
pub(crate) async fn offset(
    db: &Db,
    repository: &RepositoryName,
    id: &UploadId,
    now: Timestamp,
) -> Result<u64, Error> {
    let rows = db
        .read(&OFFSET, &[(&id.0).into(), repository.as_str().into()])
        .await?;
    let row = rows.first().ok_or(Error::UploadUnknown)?;
    if row.time(1)? <= now {
        return Err(Error::UploadUnknown);
    }
    row.u64(0)
}

/// Records the storage key of an upload that outgrew its row, before the file is made (`I6`).
pub(crate) struct Spill {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) key: String,
}

impl Body for Spill {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let changed = tx
            .execute(
                &SPILL,
                &[self.id.into(), self.version.into(), (&self.key).into()],
            )
            .await?;
        if changed == 0 {
            return Err(Error::UploadUnknown);
        }
        Ok(())
    }
}

/// Records an offset whose bytes are durable.
pub(crate) struct Record {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) size: u64,
    pub(crate) state: Vec<u8>,
    pub(crate) body: Option<Bytes>,
    pub(crate) expiry: Duration,
}

impl Body for Record {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let expires = tx.now().plus(self.expiry);
        let changed = tx
            .execute(
                &RECORD,
                &[
                    self.id.into(),
                    self.version.into(),
                    self.size.into(),
                    self.state.clone().into(),
                    self.body.as_deref().into(),
                    expires.into(),
                ],
            )
            .await?;
        failpoint("upload.in_record");
        if changed == 0 {
            return Err(Error::UploadUnknown);
        }
        Ok(())
    }
}

/// The commit of a blob (`I1`, `I2`): the upload's row goes and the blob's comes in one transaction.
pub(crate) struct Commit {
    /// Row and version of the upload; `None` when a single POST stayed in memory.
    pub(crate) upload: Option<(i64, i64)>,
    pub(crate) repository: RepositoryName,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) content: Content,
    pub(crate) lease: Duration,
    pub(crate) actor: Actor,
}

impl Body for Commit {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        failpoint("commit.before_transaction");
        let place = repository::ensure(tx, &self.repository).await?;
        if let Some((id, version)) = self.upload {
            let gone = tx
                .query_opt(&REMOVE_VERSION, &[id.into(), version.into()])
                .await?
                .ok_or(Error::UploadUnknown)?;
            collect::forget(tx, Kind::Upload, gone.i64(1)?, id).await?;
            let now = tx.now();
            // A key whose object did not become the blob: the body fits the row after all.
            if let (Some(key), Content::Inline(_)) = (gone.opt_text(0)?, &self.content) {
                collect::discard(tx, &key, now).await?;
            }
        }
        failpoint("commit.after_upload_row");
        blob::commit(
            tx,
            place,
            &self.digest,
            self.size,
            &self.content,
            self.lease,
            &self.actor,
        )
        .await
    }
}

/// Ends an upload without a blob: cancelled, wrong digest, failed sync. Its object goes out through the outbox.
pub(crate) struct Expire {
    pub(crate) id: i64,
}

impl Body for Expire {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        if remove(tx, self.id).await? {
            Ok(())
        } else {
            Err(Error::UploadUnknown)
        }
    }
}

/// Ends an upload whose time is over; one that was written to meanwhile is only looked at later.
pub(crate) struct Collect {
    pub(crate) repository: i64,
    pub(crate) id: i64,
}

impl Body for Collect {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let row = tx.query_opt(&TAKE, &[self.id.into()]).await?;
        match row {
            None => collect::forget(tx, Kind::Upload, self.repository, self.id).await,
            Some(row) if row.time(0)? > tx.now() => {
                let due = row.time(0)?;
                collect::enqueue(tx, Kind::Upload, self.repository, self.id, due).await
            }
            Some(_) => remove(tx, self.id).await.map(drop),
        }
    }
}

async fn remove(tx: &mut Tx, id: i64) -> Result<bool, Error> {
    let Some(gone) = tx.query_opt(&REMOVE, &[id.into()]).await? else {
        return Ok(false);
    };
    let now = tx.now();
    if let Some(key) = gone.opt_text(0)? {
        collect::discard(tx, &key, now).await?;
    }
    collect::forget(tx, Kind::Upload, gone.i64(1)?, id).await?;
    Ok(true)
}

pub(crate) async fn count(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT, Vec::new()).await?)
}
