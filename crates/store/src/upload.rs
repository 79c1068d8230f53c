//! Uploads: the rows behind them. [`writer`] moves the bytes, [`claim`] sees to it that one request does.
//!
//! An upload's row exists before the first byte of its object (`I6`): the storage key is recorded when the body
//! outgrows the row, before the file is made. The running hash state is stored with every recorded offset, so
//! an upload goes on without its bytes being read again.
//!
//! In an object store the row names up to three objects: the one that a multipart upload will become, the one that
//! holds the bytes after the last part (the tail), and the tail that is about to be written. Whatever of them does
//! not become the blob goes out through the outbox, together with the multipart upload.

pub(crate) mod claim;
pub(crate) mod writer;

use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest, Hasher, RepositoryName};

use crate::blob::{self, Content, StorageKey};
use crate::clock::Timestamp;
use crate::collect::{self, Kind};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, Options, UploadId};
use crate::repository;
use crate::sql::{Body, Db, Row, Tx, Value, WriteKind, statements};

statements! {
    ADD = "INSERT INTO upload (id, name, repository_id, algorithm, storage_key, body, size, hash_state, \
               state_version, version, created_by, created_at, expires_at, parts, next_tail_key) \
           VALUES ($1, $2, $3, $4, $5, $6, 0, $7, $8, 1, $9, $10, $11, $12, $13)";
    FIND = "SELECT u.id, u.algorithm, u.storage_key, u.body, u.size, u.hash_state, u.state_version, u.version, \
                u.created_by, u.expires_at, u.multipart, u.parts, u.tail_key \
            FROM upload u JOIN repository r ON r.id = u.repository_id WHERE u.name = $1 AND r.name = $2";
    CLAIM = "UPDATE upload SET claimed_by = $3, claimed_until = $4, version = version + 1 \
             WHERE name = $1 AND repository_id = (SELECT id FROM repository WHERE name = $2) \
                 AND expires_at > $5 AND (claimed_until IS NULL OR claimed_until <= $6 OR claimed_until = $7) \
             RETURNING id, algorithm, storage_key, body, size, hash_state, state_version, version, \
                 created_by, expires_at, multipart, parts, tail_key";
    CLAIMED = "SELECT u.claimed_until FROM upload u JOIN repository r ON r.id = u.repository_id \
               WHERE u.name = $1 AND r.name = $2 AND u.claimed_until IS NOT NULL";
    RENEW = "UPDATE upload SET claimed_until = $3 WHERE id = $1 AND claimed_by = $2";
    RELEASE = "UPDATE upload SET claimed_by = NULL, claimed_until = NULL WHERE id = $1 AND claimed_by = $2";
    OBJECTS = "SELECT storage_key, multipart, tail_key, next_tail_key FROM upload \
               WHERE id = $1 AND version = $2 {for update}";
    NAME_FILE = "UPDATE upload SET storage_key = $3, version = version + 1 WHERE id = $1 AND version = $2";
    NAME_MULTIPART = "UPDATE upload SET storage_key = $3, multipart = NULL, parts = COALESCE(parts, ''), \
                          version = version + 1 WHERE id = $1 AND version = $2";
    NAME_TAIL = "UPDATE upload SET next_tail_key = $3, version = version + 1 WHERE id = $1 AND version = $2";
    RECORD_MULTIPART = "UPDATE upload SET multipart = $3, version = version + 1 WHERE id = $1 AND version = $2";
    RECORD = "UPDATE upload SET size = $3, hash_state = $4, body = $5, expires_at = $6, version = version + 1 \
              WHERE id = $1 AND version = $2";
    RECORD_PARTS = "UPDATE upload SET parts = $2, tail_key = $3, next_tail_key = NULL WHERE id = $1";
    REMOVE_VERSION = "DELETE FROM upload WHERE id = $1 AND version = $2 \
                      RETURNING storage_key, multipart, tail_key, next_tail_key, parts, repository_id";
    REMOVE = "DELETE FROM upload WHERE id = $1 \
              RETURNING storage_key, multipart, tail_key, next_tail_key, parts, repository_id";
    TAKE = "SELECT expires_at, claimed_until, claimed_by FROM upload WHERE id = $1 {for update}";
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
    pub(crate) object: Option<Object>,
}

/// An object that a row names before its first byte is written (`I6`).
#[derive(Clone, Debug)]
pub(crate) enum Object {
    /// A file.
    File(StorageKey),
    /// What a multipart upload will become.
    Multipart(StorageKey),
    /// The bytes after the last part.
    Tail(StorageKey),
}

impl Body for Start {
    type Output = i64;

    async fn run(&self, tx: &mut Tx) -> Result<i64, Error> {
        failpoint("upload.before_row");
        let place = repository::ensure(tx, &self.repository).await?;
        let (id, now) = (tx.id(), tx.now());
        let expires = now.plus(self.expiry);
        let body: Option<&[u8]> = Some(&[]);
        let (mut key, mut parts, mut tail) = (None, None, None);
        match &self.object {
            None => {}
            Some(Object::File(file)) => key = Some(file.as_str()),
            Some(Object::Multipart(object)) => (key, parts) = (Some(object.as_str()), Some("")),
            Some(Object::Tail(object)) => tail = Some(object.as_str()),
        }
        tx.execute(
            &ADD,
            &[
                id.into(),
                (&self.name.0).into(),
                place.repository.into(),
                self.algorithm.name().into(),
                key.into(),
                body.into(),
                Hasher::new(self.algorithm).state().into(),
                STATE_VERSION.into(),
                (&self.principal).into(),
                now.into(),
                expires.into(),
                parts.into(),
                tail.into(),
            ],
        )
        .await?;
        collect::enqueue(tx, Kind::Upload, place.repository, id, expires);
        failpoint("upload.after_row");
        Ok(id)
    }
}

/// What is recorded of an open upload.
pub(crate) struct Open {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) key: Option<String>,
    /// The multipart upload that will become the object, its parts, and the object with the bytes after them.
    pub(crate) multipart: Option<String>,
    pub(crate) parts: Option<String>,
    pub(crate) tail: Option<String>,
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
        multipart: row.opt_text(10)?,
        parts: row.opt_text(11)?.filter(|parts| !parts.is_empty()),
        tail: row.opt_text(12)?,
        body: row.opt_bytes(3)?,
        size: row.u64(4)?,
        hasher,
        principal: row.text(8)?,
    })
}

/// Until when a writer says that it has an upload, where one does.
pub(crate) async fn claimed(
    db: &Db,
    repository: &RepositoryName,
    id: &UploadId,
) -> Result<Option<Timestamp>, Error> {
    let rows = db
        .read(&CLAIMED, &[(&id.0).into(), repository.as_str().into()])
        .await?;
    rows.first().map(|row| row.time(0)).transpose()
}

/// Claims an upload among replicas and tells what is recorded of it. `None`: another writer has it, or it is gone.
/// The row's version rises, so whoever had it before can record nothing any more.
pub(crate) struct ClaimRow {
    pub(crate) repository: RepositoryName,
    pub(crate) name: UploadId,
    pub(crate) token: String,
    pub(crate) span: Duration,
    /// The claim of another writer that was not renewed while it was watched.
    pub(crate) over: Option<Timestamp>,
}

impl Body for ClaimRow {
    type Output = Option<Open>;

    async fn run(&self, tx: &mut Tx) -> Result<Option<Open>, Error> {
        let now = tx.now();
        let row = tx
            .query_opt(
                &CLAIM,
                &[
                    (&self.name.0).into(),
                    self.repository.as_str().into(),
                    (&self.token).into(),
                    now.plus(self.span).into(),
                    now.into(),
                    now.minus(claim::LONG_OVER).into(),
                    self.over.map(|over| over.0).into(),
                ],
            )
            .await?;
        row.as_ref().map(open).transpose()
    }
}

/// The same for whoever is about to end the upload: that makes room, and goes on in a read-only mode.
pub(crate) struct ClaimToEnd(pub(crate) ClaimRow);

impl Body for ClaimToEnd {
    type Output = Option<Open>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Option<Open>, Error> {
        self.0.run(tx).await
    }
}

/// Makes claims last longer, in the order of the rows; `false` for each that was lost.
pub(crate) struct RenewClaims {
    /// Row and token, by row.
    pub(crate) claims: Vec<(i64, String)>,
    pub(crate) span: Duration,
}

impl Body for RenewClaims {
    type Output = Vec<bool>;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<bool>, Error> {
        let until = tx.now().plus(self.span);
        let mut renewed = Vec::with_capacity(self.claims.len());
        for (id, token) in &self.claims {
            let changed = tx
                .execute(&RENEW, &[(*id).into(), token.into(), until.into()])
                .await?;
            renewed.push(changed > 0);
        }
        Ok(renewed)
    }
}

/// Gives a claim back.
pub(crate) struct ReleaseClaim {
    pub(crate) id: i64,
    pub(crate) token: String,
}

impl Body for ReleaseClaim {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        release(tx, self.id, &self.token).await
    }
}

async fn release(tx: &mut Tx, id: i64, token: &str) -> Result<(), Error> {
    tx.execute(&RELEASE, &[id.into(), token.into()])
        .await
        .map(drop)
}

/// The recorded offset of an open upload.
pub(crate) async fn offset(
    db: &Db,
    repository: &RepositoryName,
    id: &UploadId,
    now: Timestamp,
) -> Result<u64, Error> {
    let rows = db
        .read(&FIND, &[(&id.0).into(), repository.as_str().into()])
        .await?;
    let row = rows.first().ok_or(Error::UploadUnknown)?;
    if row.time(9)? <= now {
        return Err(Error::UploadUnknown);
    }
    row.u64(4)
}

/// Names an object that is about to be written (`I6`). What the row named in its place before is not used any more
/// and goes out through the outbox.
pub(crate) struct NameObject {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) object: Object,
}

impl Body for NameObject {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let row: [Value; 2] = [self.id.into(), self.version.into()];
        let (statement, key) = match &self.object {
            Object::File(key) => (&NAME_FILE, key),
            Object::Multipart(key) => (&NAME_MULTIPART, key),
            Object::Tail(key) => (&NAME_TAIL, key),
        };
        if !matches!(self.object, Object::File(_)) {
            let before = tx
                .query_opt(&OBJECTS, &row)
                .await?
                .ok_or(Error::UploadUnknown)?;
            let due = tx.now().plus(late_writes());
            if matches!(self.object, Object::Multipart(_)) {
                if let Some(key) = before.opt_text(0)? {
                    let multipart = before.opt_text(1)?.unwrap_or_default();
                    collect::discard_multipart(tx, &key, &multipart, due).await?;
                }
            } else if let Some(key) = before.opt_text(3)? {
                collect::discard(tx, &key, due).await?;
            }
        }
        let [id, version] = row;
        let changed = tx
            .execute(statement, &[id, version, key.as_str().into()])
            .await?;
        if changed == 0 {
            return Err(Error::UploadUnknown);
        }
        Ok(())
    }
}

/// Records the id of the multipart upload, before its first part is sent.
pub(crate) struct RecordMultipart {
    pub(crate) id: i64,
    pub(crate) version: i64,
    pub(crate) multipart: String,
}

impl Body for RecordMultipart {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let changed = tx
            .execute(
                &RECORD_MULTIPART,
                &[
                    self.id.into(),
                    self.version.into(),
                    (&self.multipart).into(),
                ],
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
    /// The parts, and the object that was named for the bytes after them, where they are in an object store.
    pub(crate) parts: Option<(String, Option<StorageKey>)>,
    /// The claim to give back.
    pub(crate) release: Option<String>,
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
        if let Some((parts, tail)) = &self.parts {
            let before = tx
                .query_opt(&OBJECTS, &[self.id.into(), (self.version + 1).into()])
                .await?
                .ok_or(Error::UploadUnknown)?;
            let due = tx.now().plus(late_writes());
            let tail = tail.as_ref().map(StorageKey::as_str);
            for key in [before.opt_text(2)?, before.opt_text(3)?] {
                if let Some(key) = key.filter(|key| Some(key.as_str()) != tail) {
                    collect::discard(tx, &key, due).await?;
                }
            }
            tx.execute(&RECORD_PARTS, &[self.id.into(), parts.into(), tail.into()])
                .await?;
        }
        if let Some(token) = &self.release {
            release(tx, self.id, token).await?;
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
    pub(crate) keep: blob::Keep,
    pub(crate) actor: Actor,
}

/// How long the commits of this store keep what.
pub(crate) fn keep(options: &Options) -> blob::Keep {
    blob::Keep {
        lease: options.lease,
        replaced: options.gc.grace(),
        unused: Duration::ZERO,
    }
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
            collect::forget(tx, Kind::Upload, gone.i64(5)?, id);
            let kept = match &self.content {
                Content::Inline(_) => None,
                Content::Object(key) => Some(key),
            };
            discard_objects(tx, &gone, kept).await?;
        }
        failpoint("commit.after_upload_row");
        blob::commit(
            tx,
            place,
            &self.digest,
            self.size,
            &self.content,
            self.keep,
            &self.actor,
        )
        .await
    }
}

/// Ends an upload without a blob: cancelled, wrong digest, failed sync. Its objects go out through the outbox.
pub(crate) struct Expire {
    pub(crate) id: i64,
    /// The claim of whoever ends it, where claims are in the row.
    pub(crate) claim: Option<String>,
}

impl Body for Expire {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        if self.claim.is_some() {
            let row = tx
                .query_opt(&TAKE, &[self.id.into()])
                .await?
                .ok_or(Error::UploadUnknown)?;
            if row.opt_text(2)? != self.claim {
                return Err(Error::UploadUnknown);
            }
        }
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
        let Some(row) = tx.query_opt(&TAKE, &[self.id.into()]).await? else {
            collect::forget(tx, Kind::Upload, self.repository, self.id);
            return Ok(());
        };
        // A writer on another replica keeps it, however old it is.
        let due = row.i64(0)?.max(row.opt_i64(1)?.unwrap_or(i64::MIN));
        if due > tx.now().0 {
            let due = Timestamp(due);
            collect::enqueue(tx, Kind::Upload, self.repository, self.id, due);
            return Ok(());
        }
        remove(tx, self.id).await.map(drop)
    }
}

async fn remove(tx: &mut Tx, id: i64) -> Result<bool, Error> {
    let Some(gone) = tx.query_opt(&REMOVE, &[id.into()]).await? else {
        return Ok(false);
    };
    discard_objects(tx, &gone, None).await?;
    collect::forget(tx, Kind::Upload, gone.i64(5)?, id);
    Ok(true)
}

/// Sends every object that a removed row named to the outbox, but the one that became a blob.
async fn discard_objects(tx: &mut Tx, gone: &Row, kept: Option<&StorageKey>) -> Result<(), Error> {
    let now = tx.now();
    let late = now.plus(late_writes());
    let unused = |key: &String| kept.is_none_or(|kept| kept.as_str() != key);
    if let Some(key) = gone.opt_text(0)?.filter(unused) {
        match gone.opt_text(4)? {
            Some(_) => {
                let multipart = gone.opt_text(1)?.unwrap_or_default();
                collect::discard_multipart(tx, &key, &multipart, late).await?;
            }
            None => collect::discard(tx, &key, now).await?,
        }
    }
    for column in [2, 3] {
        if let Some(key) = gone.opt_text(column)?.filter(unused) {
            collect::discard(tx, &key, late).await?;
        }
    }
    Ok(())
}

pub(crate) async fn count(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT, Vec::new()).await?)
}

/// How long the deletion of an object waits that a request may still be writing. A test with leases of seconds
/// (`LONGSHORE_TEST_LEASE`) waits to see what is stored become what is referenced.
fn late_writes() -> Duration {
    #[cfg(feature = "failpoints")]
    if crate::failpoint::short_leases() {
        return Duration::from_secs(2);
    }
    LATE_WRITES
}

/// A request to an object store that was given up may still be carried out. Deleting waits until it has been.
const LATE_WRITES: Duration = Duration::from_mins(5);
