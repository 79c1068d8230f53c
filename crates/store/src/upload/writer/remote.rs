//! The bytes of an upload on their way to an object store.
//!
//! Bytes are gathered until they fill a part, and parts are sent while more bytes come. What fills no part when a PATCH
//! ends goes to an object of its own, the tail, which the next PATCH reads back: so parts, tail, hash state and offset
//! are all in the row, and any replica goes on. An upload that never filled a part has its tail as its object.
//!
//! A name is used for one attempt: a tail that was written twice would be overwritten by a request that came late.
//! Parts can be overwritten so; they are recorded with their ETags, and an upload whose parts have other ones is never
//! completed. After an answer that was lost, the object is read back before it is believed.
//!
//! What waits in memory is bounded for all uploads together. An upload that finds no more memory writes what it has to
//! its tail and waits without holding anything, then takes enough for a whole part: so those who wait never wait for
//! one another.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use oci::{Algorithm, Digest, Hasher};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, spawn_blocking};

use super::{BATCH, Content, Held, MEMORY_FOR_PARTS, Session, stopped};
use crate::blob::StorageKey;
use crate::blob::s3::{Completed, Failure, RemoteBlob, S3, pause, transfer};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::upload::claim::RowClaim;
use crate::upload::{Object as Named, Record, RecordMultipart};

/// An upload whose bytes are in an object store, or will be.
pub(super) struct Remote {
    s3: S3,
    multipart: Option<Multipart>,
    /// The parts that are there, in their order.
    parts: Vec<Part>,
    /// The parts on their way, in their order.
    jobs: VecDeque<JoinHandle<Result<Part, Unsent>>>,
    /// The recorded bytes after the recorded parts. Not loaded, they precede the buffer.
    tail: Option<Tail>,
    loaded: bool,
    /// Bytes that no part holds yet.
    buffer: Vec<Bytes>,
    buffered: u64,
    permit: Option<OwnedSemaphorePermit>,
    /// Bytes that were not given to the hash yet.
    unhashed: Vec<Bytes>,
    unhashed_bytes: usize,
}

#[derive(Clone)]
struct Multipart {
    key: StorageKey,
    id: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    etag: String,
    size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tail {
    key: StorageKey,
    size: u64,
    digest: Digest,
}

/// Why a part was not sent.
enum Unsent {
    /// The multipart upload is gone: completed before, or aborted.
    Gone,
    Failed(Error),
}

/// Storage key, multipart id, parts and tail key, as they stand in the row.
pub(super) type RowOfObjects = (
    Option<String>,
    Option<String>,
    Option<String>,
    Option<String>,
);

impl Remote {
    /// A body that outgrew its row; it has been hashed.
    pub(super) fn new(s3: &S3, body: Vec<u8>) -> Self {
        let buffered = body.len() as u64;
        Self {
            s3: s3.clone(),
            multipart: None,
            parts: Vec::new(),
            jobs: VecDeque::new(),
            tail: None,
            loaded: true,
            buffer: if body.is_empty() {
                Vec::new()
            } else {
                vec![body.into()]
            },
            buffered,
            permit: None,
            unhashed: Vec::new(),
            unhashed_bytes: 0,
        }
    }

    /// What is recorded of an upload of `size` bytes.
    pub(super) fn resume(s3: &S3, row: RowOfObjects, size: u64) -> Result<Self, Error> {
        let (key, id, parts, tail) = row;
        let broken = || Error::Database("the row of an upload contradicts itself".to_owned());
        let (parts, tail) = match (parts, tail) {
            (Some(parts), tail) => parse(&parts, tail.as_deref()).ok_or_else(broken)?,
            (None, _) => return Err(broken()),
        };
        let multipart = match (key, id) {
            _ if parts.is_empty() => None,
            (Some(key), Some(id)) => Some(Multipart {
                key: StorageKey::parse(&key)?,
                id,
            }),
            _ => return Err(broken()),
        };
        let sum = parts.iter().map(|part| part.size).sum::<u64>();
        if sum + tail.as_ref().map_or(0, |tail| tail.size) != size {
            return Err(broken());
        }
        let mut remote = Self::new(s3, Vec::new());
        remote.loaded = tail.is_none();
        (remote.multipart, remote.parts, remote.tail) = (multipart, parts, tail);
        Ok(remote)
    }

    fn next_part(&self) -> usize {
        self.parts.len() + self.jobs.len()
    }

    /// Bytes of memory that are held and not used.
    fn spare(&self) -> u64 {
        let held = self.permit.as_ref().map_or(0, |p| p.num_permits() as u64);
        held.saturating_sub(self.buffered)
    }

    /// Cuts the first `size` bytes out of the buffer, with their share of the memory.
    fn cut(&mut self, size: u64) -> (Vec<Bytes>, Option<OwnedSemaphorePermit>) {
        let (mut taken, mut left) = (Vec::new(), size);
        let mut rest = Vec::new();
        for mut chunk in self.buffer.drain(..) {
            let length = chunk.len() as u64;
            if left == 0 {
                rest.push(chunk);
            } else if length <= left {
                left -= length;
                taken.push(chunk);
            } else {
                taken.push(chunk.split_to(usize::try_from(left).unwrap_or(usize::MAX)));
                left = 0;
                rest.push(chunk);
            }
        }
        self.buffer = rest;
        self.buffered -= size - left;
        let permit = self.permit.as_mut().and_then(|held| {
            let share = usize::try_from(size).unwrap_or(usize::MAX);
            held.split(share.min(held.num_permits()))
        });
        (taken, permit)
    }

    /// Waits for the oldest part on its way.
    ///
    /// Cancel safety: the job stays where it is until it is done.
    async fn settle_one(&mut self) -> Result<bool, Unsent> {
        let Some(job) = self.jobs.front_mut() else {
            return Ok(false);
        };
        let sent = job.await;
        self.jobs.pop_front();
        self.parts
            .push(sent.unwrap_or_else(|error| Err(Unsent::Failed(stopped(&error))))?);
        Ok(true)
    }

    fn describe(&self) -> String {
        describe(&self.parts, self.tail.as_ref())
    }
}

impl Session {
    pub(super) async fn write_remote(&mut self, mut chunk: Bytes) -> Result<(), Error> {
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(PIECE));
            self.make_room(piece.len() as u64).await?;
            let Content::Remote(remote) = &mut self.content else {
                return Err(Error::UploadUnknown);
            };
            self.received += piece.len() as u64;
            remote.buffered += piece.len() as u64;
            remote.unhashed_bytes += piece.len();
            remote.unhashed.push(piece.clone());
            remote.buffer.push(piece);
            if remote.unhashed_bytes >= BATCH {
                self.hash().await?;
            }
            while self.remote()?.buffered >= part_size(self.remote()?.next_part()) {
                let size = part_size(self.remote()?.next_part());
                self.send_part(size).await?;
            }
        }
        Ok(())
    }

    /// Sees to it that this many more bytes may be held, and that what precedes them is held.
    async fn make_room(&mut self, more: u64) -> Result<(), Error> {
        let remote = self.remote()?;
        let before = match &remote.tail {
            Some(tail) if !remote.loaded => tail.size,
            _ => 0,
        };
        let needed = (more + before).saturating_sub(remote.spare());
        if needed > 0 {
            let bytes = permits(needed);
            let memory = Arc::clone(&self.inner.memory);
            let permit = if let Ok(permit) = Arc::clone(&memory).try_acquire_many_owned(bytes) {
                permit
            } else {
                if self.received > self.recorded {
                    self.park().await?;
                }
                let remote = self.remote()?;
                let tail = remote.tail.as_ref().map_or(0, |tail| tail.size);
                let part = part_size(remote.next_part()).max(tail + more);
                memory
                    .acquire_many_owned(permits(part))
                    .await
                    .map_err(|_| Error::Stopped)?
            };
            let remote = self.remote()?;
            match &mut remote.permit {
                Some(held) => held.merge(permit),
                None => remote.permit = Some(permit),
            }
        }
        self.load_tail().await
    }

    /// Records everything that came and holds nothing any more.
    async fn park(&mut self) -> Result<(), Error> {
        self.checkpoint(Held::Keep).await?;
        let remote = self.remote()?;
        remote.buffer.clear();
        (remote.buffered, remote.permit) = (0, None);
        remote.loaded = remote.tail.is_none();
        Ok(())
    }

    /// Reads the recorded bytes after the last part back.
    async fn load_tail(&mut self) -> Result<(), Error> {
        let remote = self.remote()?;
        let Some(tail) = remote.tail.clone().filter(|_| !remote.loaded) else {
            return Ok(());
        };
        let blob = RemoteBlob::new(remote.s3.clone(), tail.key.clone(), tail.size);
        let place = remote.s3.describe(&tail.key);
        let mut stream = blob.stream(0..tail.size).await?;
        let mut chunks = Vec::new();
        while let Some(bytes) = stream.next().await? {
            chunks.push(bytes);
        }
        let (digest, chunks) = digest_of(chunks).await?;
        if digest != tail.digest {
            self.broken = true;
            return Err(Error::damaged(
                &place,
                "it is not what an upload wrote there",
            ));
        }
        let remote = self.remote()?;
        chunks
            .into_iter()
            .chain(std::mem::take(&mut remote.buffer))
            .for_each(|chunk| {
                remote.buffer.push(chunk);
            });
        remote.buffered += tail.size;
        remote.loaded = true;
        Ok(())
    }

    /// Gives what came since to the hash, after what came before is through.
    async fn hash(&mut self) -> Result<(), Error> {
        self.settle().await?;
        let remote = self.remote()?;
        if remote.unhashed.is_empty() {
            return Ok(());
        }
        remote.unhashed_bytes = 0;
        let chunks = std::mem::take(&mut remote.unhashed);
        let Some(mut hasher) = self.hasher.take() else {
            self.broken = true;
            return Err(Error::UploadUnknown);
        };
        self.hash_job = Some(spawn_blocking(move || {
            for chunk in &chunks {
                hasher.update(chunk);
            }
            hasher
        }));
        Ok(())
    }

    /// Hashes everything that came.
    pub(super) async fn hash_all(&mut self) -> Result<(), Error> {
        if matches!(self.content, Content::Remote(_)) {
            self.hash().await?;
        }
        self.settle().await
    }

    /// Sends the first `size` bytes of the buffer as the next part, in the background.
    async fn send_part(&mut self, size: u64) -> Result<(), Error> {
        if self.remote()?.next_part() >= MAX_PARTS {
            self.broken = true;
            return Err(Error::Unavailable {
                what: "the object store",
                problem: format!("an object cannot have more than {MAX_PARTS} parts"),
            });
        }
        // Until this has come to its end, being cancelled leaves nothing to record.
        self.broken = true;
        let multipart = self.multipart().await?;
        while self.remote()?.jobs.len() >= IN_FLIGHT {
            let settled = self.remote()?.settle_one().await;
            self.sent(settled)?;
        }
        let claim = self.row_claim.clone();
        let (tasks, runtime) = (self.inner.tasks.clone(), self.inner.runtime.clone());
        let remote = self.remote()?;
        let index = remote.next_part();
        let (chunks, permit) = remote.cut(size);
        let s3 = remote.s3.clone();
        remote.jobs.push_back(tasks.spawn_on(
            async move {
                let _permit = permit;
                send(&s3, &multipart, index, &chunks, size, claim.as_deref()).await
            },
            &runtime,
        ));
        self.broken = false;
        Ok(())
    }

    /// The multipart upload, made when there is none: its key is in the row before it is created, its id before a part
    /// is sent (`I6`).
    async fn multipart(&mut self) -> Result<Multipart, Error> {
        if let Some(multipart) = &self.remote()?.multipart {
            return Ok(multipart.clone());
        }
        let mut attempt = 0;
        loop {
            let key = StorageKey::fresh()?;
            // An attempt of unknown outcome before this one is found through the key that it had.
            self.name(Named::Multipart(key.clone())).await?;
            failpoint("upload.after_name_row");
            if let Some(claim) = &self.row_claim {
                claim.ensure().await?;
            }
            let s3 = self.remote()?.s3.clone();
            match s3.create_multipart(&key).await {
                Ok(id) => {
                    failpoint("upload.after_create_multipart");
                    let (row, version) = self.row.ok_or(Error::UploadUnknown)?;
                    self.inner
                        .db
                        .write(RecordMultipart {
                            id: row,
                            version,
                            multipart: id.clone(),
                        })
                        .await
                        .map_err(|error| self.lost_to_another(error))?;
                    failpoint("upload.after_multipart_row");
                    self.row = Some((row, version + 1));
                    let multipart = Multipart { key, id };
                    self.remote()?.multipart = Some(multipart.clone());
                    return Ok(multipart);
                }
                Err(failure) => {
                    let again = matches!(failure, Failure::Again(_)) && pause(attempt).await;
                    if !again {
                        return Err(failure.into());
                    }
                    attempt += 1;
                }
            }
        }
    }

    /// What came of waiting for a part. A multipart upload that is gone cannot be gone on with.
    fn sent(&mut self, settled: Result<bool, Unsent>) -> Result<bool, Error> {
        match settled {
            Ok(more) => Ok(more),
            Err(unsent) => {
                self.broken = true;
                Err(match unsent {
                    Unsent::Failed(error) => error,
                    Unsent::Gone => {
                        self.lost = true;
                        Error::UploadUnknown
                    }
                })
            }
        }
    }

    async fn settle_parts(&mut self) -> Result<(), Error> {
        loop {
            let settled = self.remote()?.settle_one().await;
            if !self.sent(settled)? {
                return Ok(());
            }
        }
    }

    /// Waits until nothing is on its way any more, whatever came of it.
    pub(super) async fn stop_parts(&mut self) {
        if let Content::Remote(remote) = &mut self.content {
            while !matches!(remote.settle_one().await, Ok(false)) {}
        }
    }

    /// Writes what is in the buffer as an object of its own under a name that nothing had (`I5`, `I6`).
    async fn write_tail(&mut self) -> Result<Tail, Error> {
        let key = StorageKey::fresh()?;
        let remote = self.remote()?;
        let (s3, size) = (remote.s3.clone(), remote.buffered);
        let (digest, chunks) = digest_of(remote.buffer.clone()).await?;
        self.name(Named::Tail(key.clone()))
            .await
            .map_err(|error| self.lost_to_another(error))?;
        failpoint("upload.after_name_row");
        self.while_claimed(s3.put(&key, &chunks)).await?;
        failpoint("upload.after_tail");
        Ok(Tail { key, size, digest })
    }

    /// Makes what came durable and records it.
    pub(super) async fn checkpoint(&mut self, held: Held) -> Result<(), Error> {
        self.hash_all().await?;
        self.broken = true;
        self.settle_parts().await?;
        let remote = self.remote()?;
        if remote.loaded {
            remote.tail = None;
        }
        if self.remote()?.buffered > 0 {
            let tail = self.write_tail().await?;
            self.remote()?.tail = Some(tail);
        }
        let remote = self.remote()?;
        let tail = remote.tail.as_ref().map(|tail| tail.key.clone());
        let parts = Some((remote.describe(), tail));
        let (Some((id, version)), Some(hasher)) = (self.row, &self.hasher) else {
            return Err(Error::UploadUnknown);
        };
        failpoint("upload.before_record");
        self.inner
            .db
            .write(Record {
                id,
                version,
                size: self.received,
                state: hasher.state(),
                body: None,
                expiry: self.inner.options.upload_expiry,
                parts,
                release: self.token().filter(|_| held == Held::Release),
            })
            .await
            .map_err(|error| self.lost_to_another(error))?;
        failpoint("upload.after_record");
        self.row = Some((id, version + 1));
        self.recorded = self.received;
        self.slot.set_recorded(self.received);
        self.broken = false;
        Ok(())
    }

    /// Makes the object whole and returns its key. The digest of what came has been verified, but for another
    /// algorithm than the upload was started with.
    pub(super) async fn finish_remote(&mut self, digest: &Digest) -> Result<StorageKey, Error> {
        self.broken = true;
        let size = self.received;
        let mut doubt = digest.algorithm() != self.algorithm;
        let key = if self.remote()?.next_part() == 0 {
            let remote = self.remote()?;
            match &remote.tail {
                Some(tail) if !remote.loaded => tail.key.clone(),
                _ => self.write_tail().await?.key,
            }
        } else {
            let (key, completed) = self.complete().await?;
            match completed {
                Completed::Yes(found) if found == size => {}
                // It was completed by a request whose answer was lost, or by nobody.
                Completed::Yes(_) | Completed::NoUpload => doubt = true,
                Completed::OtherParts => {
                    self.lost = true;
                    return Err(Error::UploadUnknown);
                }
            }
            key
        };
        failpoint("commit.after_complete");
        if doubt {
            self.check(&key, digest).await?;
        }
        Ok(key)
    }

    async fn complete(&mut self) -> Result<(StorageKey, Completed), Error> {
        self.load_tail().await?;
        let left = self.remote()?.buffered;
        if left > 0 {
            self.send_part(left).await?;
            self.broken = true;
        }
        let multipart = self.multipart().await?;
        loop {
            match self.remote()?.settle_one().await {
                Ok(true) => {}
                Ok(false) => break,
                Err(Unsent::Gone) => {
                    self.stop_parts().await;
                    return Ok((multipart.key, Completed::NoUpload));
                }
                Err(Unsent::Failed(error)) => return Err(error),
            }
        }
        failpoint("commit.before_complete");
        let remote = self.remote()?;
        let s3 = remote.s3.clone();
        let etags: Vec<_> = remote.parts.iter().map(|part| part.etag.clone()).collect();
        let completing = s3.complete(&multipart.key, &multipart.id, &etags);
        let completed = self.while_claimed(completing).await?;
        Ok((multipart.key, completed))
    }

    /// Reads the object back and compares its digest.
    async fn check(&mut self, key: &StorageKey, expected: &Digest) -> Result<(), Error> {
        let s3 = self.remote()?.s3.clone();
        let found = self.while_claimed(s3.size(key)).await?;
        if found != Some(self.received) {
            self.lost = true;
            return Err(Error::UploadUnknown);
        }
        let (objects, size) = (self.inner.objects.clone(), self.received);
        let reading = objects.digest(key, size, expected.algorithm());
        let actual = self.while_claimed(reading).await?;
        if actual == *expected {
            return Ok(());
        }
        self.lost = true;
        Err(Error::DigestMismatch {
            expected: expected.clone(),
            actual,
        })
    }

    /// Does something that takes long while the claim lasts.
    async fn while_claimed<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let Some(claim) = &self.row_claim else {
            return work.await;
        };
        claim.hold(work).await
    }

    fn remote(&mut self) -> Result<&mut Remote, Error> {
        match &mut self.content {
            Content::Remote(remote) => Ok(remote),
            _ => Err(Error::UploadUnknown),
        }
    }
}

/// Sends one part, as often as it makes sense, while the claim lasts.
async fn send(
    s3: &S3,
    multipart: &Multipart,
    index: usize,
    chunks: &[Bytes],
    size: u64,
    claim: Option<&RowClaim>,
) -> Result<Part, Unsent> {
    let limit = transfer(size);
    let mut attempt = 0;
    loop {
        let sending = s3.put_part(&multipart.key, &multipart.id, index, chunks, limit);
        let sent = match claim {
            Some(claim) => {
                let held = claim.hold(async { Ok(sending.await) }).await;
                held.map_err(Unsent::Failed)?
            }
            None => sending.await,
        };
        failpoint("upload.after_part");
        match sent {
            Ok(etag) => return Ok(Part { etag, size }),
            Err(Failure::Missing(_)) => return Err(Unsent::Gone),
            Err(failure) => {
                let again = matches!(failure, Failure::Again(_)) && pause(attempt).await;
                if !again {
                    return Err(Unsent::Failed(failure.into()));
                }
                attempt += 1;
            }
        }
    }
}

async fn digest_of(chunks: Vec<Bytes>) -> Result<(Digest, Vec<Bytes>), Error> {
    spawn_blocking(move || {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        for chunk in &chunks {
            hasher.update(chunk);
        }
        (hasher.finish(), chunks)
    })
    .await
    .map_err(|error| stopped(&error))
}

/// How long part `index` is: 8 MiB, later more, so that 10 000 parts are more than a TiB.
fn part_size(index: usize) -> u64 {
    match index {
        0..1000 => 8 << 20,
        1000..2000 => 32 << 20,
        _ => 128 << 20,
    }
}

/// The memory for so many bytes, never more than there is.
fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.min(MEMORY_FOR_PARTS as u64)).unwrap_or(u32::MAX)
}

/// Parts and tail as JSON: `{"parts":[["<etag>",<size>],…],"tail":["<digest>",<size>]}`.
fn describe(parts: &[Part], tail: Option<&Tail>) -> String {
    let parts: Vec<_> = parts.iter().map(|part| (&part.etag, part.size)).collect();
    let tail = tail.map(|tail| (tail.digest.to_string(), tail.size));
    serde_json::json!({ "parts": parts, "tail": tail }).to_string()
}

fn parse(text: &str, tail_key: Option<&str>) -> Option<(Vec<Part>, Option<Tail>)> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let mut parts = Vec::new();
    for part in value.get("parts")?.as_array()? {
        parts.push(Part {
            etag: part.get(0)?.as_str()?.to_owned(),
            size: part.get(1)?.as_u64()?,
        });
    }
    let tail = match (value.get("tail")?, tail_key) {
        (serde_json::Value::Null, None) => None,
        (tail, Some(key)) => Some(Tail {
            key: StorageKey::parse(key).ok()?,
            size: tail.get(1)?.as_u64()?,
            digest: tail.get(0)?.as_str()?.parse().ok()?,
        }),
        _ => return None,
    };
    Some((parts, tail))
}

/// What an object store takes.
const MAX_PARTS: usize = 10_000;
/// Parts of one upload that are sent at once.
const IN_FLIGHT: usize = 3;
/// Bytes that are taken in at once.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_parts_are_more_than_a_tebibyte() {
        let total: u64 = (0..MAX_PARTS).map(part_size).sum();
        assert!(total >= 1 << 40, "{total}");
        assert!((0..MAX_PARTS).all(|index| part_size(index) <= MEMORY_FOR_PARTS as u64 / 2));
    }

    #[test]
    fn parts_and_tail_come_back_as_they_were() {
        let parts = vec![
            Part {
                etag: "\"a&b\"".to_owned(),
                size: 8 << 20,
            },
            Part {
                etag: "c".to_owned(),
                size: 1,
            },
        ];
        let tail = Tail {
            key: StorageKey::fresh().unwrap(),
            size: 77,
            digest: Digest::sha256(b"x"),
        };
        let text = describe(&parts, Some(&tail));
        let key = tail.key.as_str().to_owned();
        assert_eq!(parse(&text, Some(&key)), Some((parts.clone(), Some(tail))));
        assert_eq!(parse(&text, None), None);
        let text = describe(&parts, None);
        assert_eq!(parse(&text, None), Some((parts, None)));
        for broken in ["", "{}", "[]", "{\"parts\":[[1,2]],\"tail\":null}"] {
            assert_eq!(parse(broken, None), None, "{broken}");
        }
    }
}
