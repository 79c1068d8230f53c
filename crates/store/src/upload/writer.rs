//! The bytes of an upload on their way to the disk.
//!
//! Small bodies stay in memory and then in the row. A body that outgrows that goes to an object: chunks are
//! gathered, and each batch is hashed on one blocking thread while another writes it. Threads are held only while
//! they work, so slow uploads cost none. What may wait in memory is bounded for all uploads together.
//! Write-back is started early by syncing in the background; a sync that fails is never repeated: the upload it
//! belongs to is expired. Where objects are in an object store, [`remote`] sends them there.

mod remote;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use oci::{Algorithm, Digest, Hasher, RepositoryName};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};

use remote::Remote;

use super::claim::{Claim, RowClaim, Slot};
use super::{Commit, Expire, NameObject, Object as Named, Open, Record, Start};
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::{Content as BlobContent, StorageKey};
use crate::clock::random_name;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, UploadId};
use crate::store::Inner;

/// The one writer of an upload. Dropping it gives the claim back after syncing and recording what was written.
#[must_use]
pub struct UploadWriter {
    slot: Arc<Slot>,
    inner: Arc<Inner>,
}

impl UploadWriter {
    pub(crate) fn new(inner: &Arc<Inner>, slot: Arc<Slot>) -> Self {
        Self {
            slot,
            inner: Arc::clone(inner),
        }
    }

    /// Bytes recorded so far, which is where the next chunk must begin.
    pub fn offset(&self) -> u64 {
        self.slot.recorded()
    }

    /// Takes in bytes (hash and disk); back-pressure is in the await. Not yet recorded.
    ///
    /// Cancel safety: a chunk whose write was cancelled may have been taken in or not; the writer can then
    /// still be recorded, and the offset that this returns tells which.
    ///
    /// # Errors
    /// [`Error::UploadBusy`] when this writer was idle for too long and lost its claim; [`Error::Full`];
    /// [`Error::Io`].
    pub async fn write(&mut self, chunk: Bytes) -> Result<(), Error> {
        self.slot.touch();
        let mut session = self.slot.session.lock().await;
        let result = match session.as_mut() {
            Some(session) => session.write(chunk).await,
            None => Err(self.lost()),
        };
        self.slot.touch();
        self.note(result)
    }

    /// Makes what was written durable, records it and gives the claim back (end of a PATCH, also a broken one).
    /// Returns the new offset.
    ///
    /// # Errors
    /// As [`UploadWriter::write`]; [`Error::UploadUnknown`] when the upload is gone.
    pub async fn record(self) -> Result<u64, Error> {
        let session = self.slot.session.lock().await.take();
        let session = session.ok_or_else(|| self.lost())?;
        self.finish(session.record()).await
    }

    /// Verifies the digest, makes the blob durable and commits it (`I1`, `I2`). Returns its size.
    ///
    /// # Errors
    /// A wrong digest is [`Error::DigestMismatch`] and expires the upload. Otherwise as
    /// [`UploadWriter::record`]; after [`Error::Full`] the upload is still open at its recorded offset.
    pub async fn commit(self, digest: &Digest, actor: &Actor) -> Result<u64, Error> {
        let session = self.slot.session.lock().await.take();
        let session = session.ok_or_else(|| self.lost())?;
        self.finish(session.commit(digest.clone(), actor.clone()))
            .await
    }

    /// Runs the end of a session in a task of its own: when the caller goes away in the middle, the claim must
    /// not come free while bytes are still on their way.
    async fn finish(
        &self,
        end: impl Future<Output = Result<u64, Error>> + Send + 'static,
    ) -> Result<u64, Error> {
        let ended = self
            .inner
            .tasks
            .spawn_on(end, &self.inner.runtime)
            .await
            .unwrap_or(Err(Error::Stopped));
        self.note(ended)
    }

    /// A write that met a full disk, or one that takes no writes, may begin the read-only mode.
    fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        result.map_err(|failure| self.inner.gate.note_failure(failure))
    }

    fn lost(&self) -> Error {
        Error::UploadBusy {
            offset: self.slot.recorded(),
        }
    }
}

impl Drop for UploadWriter {
    fn drop(&mut self) {
        let Ok(mut session) = self.slot.session.try_lock() else {
            return;
        };
        if let Some(session) = session.take() {
            self.inner.tasks.spawn_on(
                async move {
                    if let Err(error) = session.record().await {
                        tracing::debug!(%error, "an upload that broke off could not be recorded");
                    }
                },
                &self.inner.runtime,
            );
        }
    }
}

impl std::fmt::Debug for UploadWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UploadWriter")
            .field("offset", &self.offset())
            .finish_non_exhaustive()
    }
}

/// What one writer has in hand.
pub(crate) struct Session {
    inner: Arc<Inner>,
    slot: Arc<Slot>,
    repository: RepositoryName,
    principal: String,
    algorithm: Algorithm,
    /// Row and version; `None` for a single POST that is still in memory.
    row: Option<(i64, i64)>,
    /// Nobody knows the id of a single POST, so there is nothing to go on with after it broke off.
    resumable: bool,
    content: Content,
    /// Absent while a job has it.
    hasher: Option<Hasher>,
    hash_job: Option<JoinHandle<Hasher>>,
    recorded: u64,
    received: u64,
    /// Something failed or was cancelled half-way: nothing beyond `recorded` counts.
    broken: bool,
    /// A sync failed: the object cannot be trusted any more.
    lost: bool,
    /// The object may belong to a blob by now.
    untouchable: bool,
    /// The claim among replicas.
    row_claim: Option<Arc<RowClaim>>,
    /// Given back when the session ends.
    _claim: Option<Claim>,
}

enum Content {
    Memory(Vec<u8>),
    /// The file is being made.
    Making(JoinHandle<Result<File, Error>>, StorageKey),
    Object(Object),
    /// In an object store.
    Remote(Remote),
}

struct Object {
    files: Arc<FileSystem>,
    key: StorageKey,
    file: Arc<File>,
    /// Where the next batch goes.
    end: u64,
    synced: u64,
    pending: Vec<Bytes>,
    pending_bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
    write_job: Option<JoinHandle<Result<(), Error>>>,
    sync_job: Option<JoinHandle<Result<(), Error>>>,
    entry_durable: bool,
}

/// Chunks on their way to both threads; the memory is free again when both are done.
struct Batch {
    chunks: Vec<Bytes>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Session {
    /// A session for an upload that has a row.
    pub(crate) async fn resume(
        inner: &Arc<Inner>,
        slot: &Arc<Slot>,
        repository: &RepositoryName,
        open: Open,
        row_claim: Option<Arc<RowClaim>>,
        claim: Claim,
    ) -> Result<Self, Error> {
        let content = match (&inner.objects, open.key, open.body) {
            (Objects::S3(s3), key, None) => {
                let row = (key, open.multipart, open.parts, open.tail);
                Content::Remote(Remote::resume(s3, row, open.size)?)
            }
            (_, None, body) | (Objects::S3(_), _, body) => {
                Content::Memory(body.unwrap_or_default())
            }
            (Objects::Directory(files), Some(key), body) => {
                // With a body in the row nothing of the object was recorded, so what a crash left of it is
                // written over, and its entry may not be durable.
                let key = StorageKey::parse(&key)?;
                let entry_durable = body.is_none();
                let size = open.size;
                let (objects, name) = (Arc::clone(files), key.clone());
                let file = spawn_blocking(move || match body {
                    Some(body) => objects.create(&name, &body),
                    None => objects.resume(&name, size),
                })
                .await
                .unwrap_or_else(|error| Err(stopped(&error)))?;
                if row_claim.is_some() && !alone(&file) {
                    return Err(Error::UploadBusy { offset: size });
                }
                Content::Object(Object::new(files, key, file, size, entry_durable))
            }
        };
        slot.set_recorded(open.size);
        Ok(Self {
            inner: Arc::clone(inner),
            slot: Arc::clone(slot),
            repository: repository.clone(),
            principal: open.principal,
            algorithm: open.hasher.algorithm(),
            row: Some((open.id, open.version)),
            resumable: true,
            content,
            hasher: Some(open.hasher),
            hash_job: None,
            recorded: open.size,
            received: open.size,
            broken: false,
            lost: false,
            untouchable: false,
            row_claim,
            _claim: Some(claim),
        })
    }

    /// A session for a single POST: no row until the body outgrows the memory.
    pub(crate) fn single(
        inner: &Arc<Inner>,
        slot: &Arc<Slot>,
        repository: &RepositoryName,
        algorithm: Algorithm,
        actor: &Actor,
    ) -> Self {
        Self {
            inner: Arc::clone(inner),
            slot: Arc::clone(slot),
            repository: repository.clone(),
            principal: actor.principal.clone(),
            algorithm,
            row: None,
            resumable: false,
            content: Content::Memory(Vec::new()),
            hasher: Some(Hasher::new(algorithm)),
            hash_job: None,
            recorded: 0,
            received: 0,
            broken: false,
            lost: false,
            untouchable: false,
            row_claim: None,
            _claim: None,
        }
    }

    async fn write(&mut self, chunk: Bytes) -> Result<(), Error> {
        if self.broken {
            return Err(Error::UploadUnknown);
        }
        if let Content::Memory(body) = &mut self.content {
            let length = (body.len() + chunk.len()) as u64;
            if length <= self.inner.options.inline_limit {
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(&chunk);
                }
                body.extend_from_slice(&chunk);
                self.received = length;
                return Ok(());
            }
            self.spill().await?;
        }
        if let Some(claim) = &self.row_claim {
            claim.ensure().await?;
        }
        if matches!(self.content, Content::Remote(_)) {
            return self.write_remote(chunk).await;
        }
        let bytes = u32::try_from(chunk.len().min(MEMORY)).unwrap_or(u32::MAX);
        let memory = Arc::clone(&self.inner.memory);
        let permit = if let Ok(permit) = Arc::clone(&memory).try_acquire_many_owned(bytes) {
            permit
        } else {
            // What waits here must not wait for others that wait for us.
            self.dispatch().await?;
            memory
                .acquire_many_owned(bytes)
                .await
                .map_err(|_| Error::Stopped)?
        };
        let Content::Object(object) = &mut self.content else {
            return Err(Error::UploadUnknown);
        };
        match &mut object.permit {
            Some(held) => held.merge(permit),
            None => object.permit = Some(permit),
        }
        self.received += chunk.len() as u64;
        object.pending_bytes += chunk.len();
        object.pending.push(chunk);
        if object.pending_bytes >= BATCH {
            self.dispatch().await?;
        }
        Ok(())
    }

    /// Moves the body from memory to an object. The row names the object before its file exists (`I6`).
    async fn spill(&mut self) -> Result<(), Error> {
        let files = match (&self.inner.objects, &mut self.content) {
            (Objects::Directory(files), _) => Arc::clone(files),
            (Objects::S3(s3), Content::Memory(body)) => {
                // Nothing is written before there is enough for a part, or the end.
                self.content = Content::Remote(Remote::new(s3, std::mem::take(body)));
                return Ok(());
            }
            (Objects::S3(_), _) => return Ok(()),
        };
        // Until this has come to its end, being cancelled leaves nothing to record.
        self.broken = true;
        let key = StorageKey::fresh()?;
        failpoint("upload.before_spill");
        self.name(Named::File(key.clone())).await?;
        failpoint("upload.after_spill_row");
        let body = match &mut self.content {
            Content::Memory(body) => std::mem::take(body),
            Content::Making(..) | Content::Object(_) | Content::Remote(_) => {
                return Err(Error::UploadUnknown);
            }
        };
        let size = body.len() as u64;
        let (objects, name) = (Arc::clone(&files), key.clone());
        let job = spawn_blocking(move || {
            let file = objects.create(&name, &body);
            failpoint("upload.after_create");
            file
        });
        self.content = Content::Making(job, key);
        let Content::Making(job, key) = &mut self.content else {
            return Err(Error::UploadUnknown);
        };
        let file = job.await.unwrap_or_else(|error| Err(stopped(&error)));
        let key = key.clone();
        // The finished job must not be awaited again.
        self.content = Content::Memory(Vec::new());
        let file = file?;
        if self.row_claim.is_some() && !alone(&file) {
            return Err(Error::UploadUnknown);
        }
        self.content = Content::Object(Object::new(&files, key, file, size, false));
        self.broken = false;
        Ok(())
    }

    /// Names an object in the row, making the row when there is none (`I6`).
    async fn name(&mut self, object: Named) -> Result<(), Error> {
        if let Some((id, version)) = self.row {
            self.inner
                .db
                .write(NameObject {
                    id,
                    version,
                    object,
                })
                .await?;
            self.row = Some((id, version + 1));
        } else {
            let id = self
                .inner
                .db
                .write(Start {
                    repository: self.repository.clone(),
                    name: UploadId(random_name()?),
                    algorithm: self.algorithm,
                    principal: self.principal.clone(),
                    expiry: self.inner.options.upload_expiry,
                    object: Some(object),
                })
                .await?;
            self.row = Some((id, 1));
        }
        Ok(())
    }

    /// Sends what is pending to the two threads, after the batch before is through.
    async fn dispatch(&mut self) -> Result<(), Error> {
        self.settle().await?;
        let Content::Object(object) = &mut self.content else {
            return Ok(());
        };
        if object.pending.is_empty() {
            return Ok(());
        }
        if object.end - object.synced >= WRITE_BACK {
            if let Some(job) = &mut object.sync_job
                && job.is_finished()
            {
                let result = job.await.unwrap_or_else(|error| Err(stopped(&error)));
                object.sync_job = None;
                if let Err(error) = result {
                    (self.broken, self.lost) = (true, true);
                    return Err(error);
                }
            }
            if object.sync_job.is_none() {
                object.synced = object.end;
                object.sync_job = Some(object.sync());
            }
        }
        let batch = Arc::new(Batch {
            chunks: std::mem::take(&mut object.pending),
            _permit: object.permit.take(),
        });
        let start = object.end;
        object.end += object.pending_bytes as u64;
        object.pending_bytes = 0;
        let Some(mut hasher) = self.hasher.take() else {
            self.broken = true;
            return Err(Error::UploadUnknown);
        };
        let hashed = Arc::clone(&batch);
        self.hash_job = Some(spawn_blocking(move || {
            for chunk in &hashed.chunks {
                hasher.update(chunk);
            }
            hasher
        }));
        let (objects, file, key) = (
            Arc::clone(&object.files),
            Arc::clone(&object.file),
            object.key.clone(),
        );
        object.write_job = Some(spawn_blocking(move || {
            let mut at = start;
            for chunk in &batch.chunks {
                file.write_all_at(chunk, at)
                    .map_err(|error| Error::io("write", &objects.path(&key), error))?;
                at += chunk.len() as u64;
            }
            failpoint("upload.after_write");
            Ok(())
        }));
        Ok(())
    }

    /// Waits for the two threads. Cancel safe: a job stays where it is until it is done.
    async fn settle(&mut self) -> Result<(), Error> {
        if let Content::Making(job, _) = &mut self.content {
            let _ = job.await;
            self.content = Content::Memory(Vec::new());
            self.broken = true;
        }
        if let Some(job) = &mut self.hash_job {
            let hasher = job.await;
            self.hash_job = None;
            match hasher {
                Ok(hasher) => self.hasher = Some(hasher),
                Err(error) => {
                    self.broken = true;
                    return Err(stopped(&error));
                }
            }
        }
        if let Content::Object(object) = &mut self.content
            && let Some(job) = &mut object.write_job
        {
            let written = job.await.unwrap_or_else(|error| Err(stopped(&error)));
            object.write_job = None;
            if let Err(error) = written {
                self.broken = true;
                return Err(error);
            }
        }
        if self.broken {
            return Err(Error::UploadUnknown);
        }
        Ok(())
    }

    /// Makes every byte and the directory entry durable. A failure is final: the upload is lost.
    async fn make_durable(&mut self, points: [&str; 3]) -> Result<(), Error> {
        self.dispatch().await?;
        self.hash_all().await?;
        let Content::Object(object) = &mut self.content else {
            return Ok(());
        };
        failpoint(points[0]);
        let mut result = Ok(());
        if let Some(job) = object.sync_job.take() {
            result = job.await.unwrap_or_else(|error| Err(stopped(&error)));
        }
        if result.is_ok() {
            result = object
                .sync()
                .await
                .unwrap_or_else(|error| Err(stopped(&error)));
        }
        failpoint(points[1]);
        if result.is_ok() && !object.entry_durable {
            let (objects, key) = (Arc::clone(&object.files), object.key.clone());
            result = spawn_blocking(move || objects.sync_entry(&key))
                .await
                .unwrap_or_else(|error| Err(stopped(&error)));
            object.entry_durable = result.is_ok();
        }
        failpoint(points[2]);
        if result.is_err() {
            (self.broken, self.lost) = (true, true);
        }
        result
    }

    /// Ends a PATCH.
    pub(crate) async fn record(mut self: Box<Self>) -> Result<u64, Error> {
        if !self.resumable {
            self.abandon().await;
            return Ok(self.received);
        }
        let points = [
            "upload.before_sync",
            "upload.after_sync",
            "upload.after_entry_sync",
        ];
        let durable = self.make_durable(points).await;
        if let Err(error) = durable {
            let error = self.lost_to_another(error);
            self.abandon().await;
            return Err(error);
        }
        if self.received == self.recorded {
            self.release().await;
            return Ok(self.recorded);
        }
        if matches!(self.content, Content::Remote(_)) {
            let recorded = self.checkpoint(Held::Release).await;
            if let Err(error) = recorded {
                self.abandon().await;
                return Err(error);
            }
            return Ok(self.received);
        }
        let (Some((id, version)), Some(hasher)) = (self.row, &self.hasher) else {
            return Err(Error::UploadUnknown);
        };
        failpoint("upload.before_record");
        let body = match &self.content {
            Content::Memory(body) => Some(Bytes::copy_from_slice(body)),
            Content::Making(..) | Content::Object(_) | Content::Remote(_) => None,
        };
        self.inner
            .db
            .write(Record {
                id,
                version,
                size: self.received,
                state: hasher.state(),
                body,
                expiry: self.inner.options.upload_expiry,
                parts: None,
                release: self.token(),
            })
            .await
            .map_err(|error| self.lost_to_another(error))?;
        failpoint("upload.after_record");
        self.slot.set_recorded(self.received);
        Ok(self.received)
    }

    /// Ends a PUT: verify, make durable, one transaction, and only then the answer (`I1`).
    async fn commit(mut self: Box<Self>, digest: Digest, actor: Actor) -> Result<u64, Error> {
        let verified = self.verify(&digest).await;
        let durable = match verified {
            Ok(()) => {
                let points = [
                    "commit.before_sync",
                    "commit.after_sync",
                    "commit.after_entry_sync",
                ];
                self.make_durable(points).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = durable {
            self.abandon().await;
            return Err(error);
        }
        let content = match &mut self.content {
            Content::Memory(body) => BlobContent::Inline(Bytes::from(std::mem::take(body))),
            Content::Object(object) => BlobContent::Object(object.key.clone()),
            Content::Remote(_) => match self.finish_remote(&digest).await {
                Ok(key) => BlobContent::Object(key),
                Err(error) => {
                    self.abandon().await;
                    return Err(error);
                }
            },
            Content::Making(..) => return Err(Error::UploadUnknown),
        };
        let committed = self
            .inner
            .db
            .write(Commit {
                upload: self.row,
                repository: self.repository.clone(),
                digest,
                size: self.received,
                content,
                keep: crate::upload::keep(&self.inner.options),
                actor,
            })
            .await;
        if let Err(error) = committed {
            // Whether the commit happened may be unknown, so the object is not touched. Expiring is safe: it
            // finds no row when it did.
            self.untouchable = true;
            let error = self.lost_to_another(error);
            self.abandon().await;
            return Err(error);
        }
        failpoint("commit.after_transaction");
        Ok(self.received)
    }

    /// Compares the digest of all bytes. A digest of another algorithm than the upload was started with is
    /// computed from the content itself.
    async fn verify(&mut self, expected: &Digest) -> Result<(), Error> {
        self.dispatch().await?;
        self.hash_all().await?;
        let actual = if expected.algorithm() == self.algorithm {
            let hasher = self.hasher.clone().ok_or(Error::UploadUnknown)?;
            hasher.finish()
        } else {
            match &self.content {
                Content::Memory(body) => Digest::of(expected.algorithm(), body),
                // Checked when the object is there.
                Content::Remote(_) => return Ok(()),
                Content::Object(object) => {
                    let (objects, key) = (Arc::clone(&object.files), object.key.clone());
                    let (algorithm, size) = (expected.algorithm(), self.received);
                    spawn_blocking(move || {
                        let path = objects.path(&key);
                        let file = objects.read(&key, size)?;
                        digest_of_file(algorithm, file)
                            .map_err(|error| Error::io("read", &path, error))
                    })
                    .await
                    .unwrap_or_else(|error| Err(stopped(&error)))?
                }
                Content::Making(..) => return Err(Error::UploadUnknown),
            }
        };
        if actual == *expected {
            return Ok(());
        }
        (self.broken, self.lost) = (true, true);
        Err(Error::DigestMismatch {
            expected: expected.clone(),
            actual,
        })
    }

    /// Ends a session that cannot be recorded. Bytes after the recorded offset are given back to the file
    /// system; an upload that is lost, or that nobody can go on with, is expired.
    async fn abandon(&mut self) {
        self.broken = true;
        let _ = self.settle().await;
        self.stop_parts().await;
        if let Content::Object(object) = &mut self.content
            && let Some(job) = object.sync_job.take()
        {
            // Its result belongs to bytes that are about to go.
            let failed = !matches!(job.await, Ok(Ok(())));
            self.lost |= failed;
        }
        let expire = self.lost || !self.resumable;
        if let (true, Some((id, _))) = (expire, self.row) {
            let claim = self.token();
            match self.inner.db.write(Expire { id, claim }).await {
                Ok(()) | Err(Error::UploadUnknown) => {}
                Err(error) => {
                    tracing::warn!(%error, "a broken upload could not be expired, its time will end it");
                }
            }
        } else if let Content::Object(object) = &self.content {
            let (file, recorded) = (Arc::clone(&object.file), self.recorded);
            if !expire && !self.untouchable && object.entry_durable {
                let _ = spawn_blocking(move || file.set_len(recorded)).await;
            }
        }
        self.release().await;
    }

    /// Gives the claim among replicas back.
    async fn release(&mut self) {
        if let Some(claim) = self.row_claim.take() {
            claim.release().await;
        }
    }

    fn token(&self) -> Option<String> {
        self.row_claim
            .as_ref()
            .map(|claim| claim.token().to_owned())
    }

    /// A row of another version belongs to another writer by now, where there can be one.
    fn lost_to_another(&self, error: Error) -> Error {
        match error {
            Error::UploadUnknown if self.row_claim.is_some() && !self.lost => Error::UploadBusy {
                offset: self.slot.recorded(),
            },
            other => other,
        }
    }
}

/// Takes the file of an upload for this process, where replicas share a directory; `false` when another one has it. One
/// that stood still for longer than its claim lasts may have a write under way, which comes when it goes on. A file
/// system without locks is taken as it is.
fn alone(file: &File) -> bool {
    !matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock))
}

/// What becomes of the claim when an offset is recorded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Keep,
    Release,
}

impl Object {
    fn new(
        files: &Arc<FileSystem>,
        key: StorageKey,
        file: File,
        size: u64,
        entry_durable: bool,
    ) -> Self {
        Self {
            files: Arc::clone(files),
            key,
            file: Arc::new(file),
            end: size,
            synced: size,
            pending: Vec::new(),
            pending_bytes: 0,
            permit: None,
            write_job: None,
            sync_job: None,
            entry_durable,
        }
    }

    /// Makes the bytes of the object durable on a blocking thread.
    fn sync(&self) -> JoinHandle<Result<(), Error>> {
        let (files, file) = (Arc::clone(&self.files), Arc::clone(&self.file));
        let key = self.key.clone();
        spawn_blocking(move || {
            file.sync_data()
                .map_err(|error| Error::io("sync", &files.path(&key), error))
        })
    }
}

/// Hashes a whole file.
pub(crate) fn digest_of_file(algorithm: Algorithm, mut file: File) -> std::io::Result<Digest> {
    let mut hasher = Hasher::new(algorithm);
    let mut buffer = vec![0; BATCH];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..length]);
    }
}

fn stopped(error: &JoinError) -> Error {
    tracing::error!(%error, "a blocking thread of an upload stopped");
    Error::Stopped
}

/// Bytes of all uploads that may wait in memory on their way to files.
pub(crate) const MEMORY: usize = 64 << 20;
/// Bytes of all uploads that may wait in memory on their way to an object store, which takes them in parts.
pub(crate) const MEMORY_FOR_PARTS: usize = 256 << 20;
/// Bytes that go to the threads at once.
const BATCH: usize = 512 << 10;
/// Bytes after which a sync is started in the background.
const WRITE_BACK: u64 = 8 << 20;
