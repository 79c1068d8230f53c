//! A registry that runs, written over the wire: the destination of `import --to`.
//!
//! It is any registry, ours or another, so nothing is asked of it but the distribution API. Blobs go up in chunks that
//! are resumed, or are mounted where an earlier repository of the run holds them; a blob of another registry is passed
//! on as it is read. Nothing is remembered between runs: what the registry has is skipped.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use client::{Client, Repository};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, RepositoryName, Tag};
use store::import::{Arrival, Content, Entry, Failure, Placed, Sink};

use super::live::failure;

/// The repositories of a host.
pub(crate) struct Target {
    client: Client,
    host: String,
    /// A repository of the host that holds a blob, as far as this run brought or met it.
    holders: Mutex<HashMap<Digest, RepositoryName>>,
    /// The referrers of the subjects that were asked for last.
    listed: Mutex<HashMap<Subject, Arc<HashSet<Digest>>>>,
    /// A registry without the referrers API keeps them in one index per subject, which has one writer at a time.
    writers: Vec<tokio::sync::Mutex<()>>,
}

type Subject = (RepositoryName, Digest);

impl Target {
    pub(crate) fn new(client: Client, host: &str) -> Self {
        Self {
            client,
            host: host.to_owned(),
            holders: Mutex::default(),
            listed: Mutex::default(),
            writers: (0..WRITERS).map(|_| tokio::sync::Mutex::new(())).collect(),
        }
    }

    fn repository(&self, name: &RepositoryName) -> Repository {
        self.client.repository(&self.host, name)
    }

    fn note(&self, repository: &RepositoryName, digest: &Digest) {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders
            .entry(digest.clone())
            .or_insert_with(|| repository.clone());
    }

    fn holder(&self, digest: &Digest) -> Option<RepositoryName> {
        let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.get(digest).cloned()
    }

    /// Waits for the turn of whoever writes or lists the referrers of a subject.
    async fn writer(&self, subject: &Digest) -> tokio::sync::MutexGuard<'_, ()> {
        let sum: usize = subject.to_string().bytes().map(usize::from).sum();
        self.writers[sum % WRITERS].lock().await
    }

    fn forget(&self, subject: &Subject) {
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.remove(subject);
    }
}

impl Sink for Target {
    fn accepts_sparse(&self) -> bool {
        // It may or may not: an index that lacks a child is told as broken.
        false
    }

    async fn tag(&self, repository: &RepositoryName, tag: &Tag) -> Result<Option<Digest>, Failure> {
        let found = self
            .repository(repository)
            .head_manifest(&TagOrDigest::Tag(tag.clone()))
            .await
            .map_err(failure)?;
        Ok(found.map(|found| found.digest))
    }

    async fn has_manifest(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<bool, Failure> {
        let found = self
            .repository(repository)
            .head_manifest(&TagOrDigest::Digest(descriptor.digest.clone()))
            .await
            .map_err(failure)?;
        Ok(found.is_some())
    }

    async fn has_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        take: bool,
    ) -> Result<bool, Failure> {
        let remote = self.repository(repository);
        let digest = &descriptor.digest;
        if let Some(size) = remote.head_blob(digest).await.map_err(failure)? {
            if size != descriptor.size {
                return Err(Failure::Broken(format!(
                    "blob `{digest}` has {size} bytes at the destination, not {}",
                    descriptor.size
                )));
            }
            self.note(repository, digest);
            return Ok(true);
        }
        match self.holder(digest).filter(|_| take) {
            Some(holder) if holder != *repository => {
                remote.mount_blob(digest, &holder).await.map_err(failure)
            }
            _ => Ok(false),
        }
    }

    fn lists_referrers(&self) -> bool {
        false
    }

    async fn has_referrer(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, Failure> {
        let key = (repository.clone(), subject.clone());
        // What is written meanwhile would be missing from the list that is kept.
        let _writer = self.writer(subject).await;
        let known = {
            let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
            listed.get(&key).map(Arc::clone)
        };
        if let Some(known) = known {
            return Ok(known.contains(referrer));
        }
        let found = self
            .repository(repository)
            .referrers(subject, None)
            .await
            .map_err(failure)?;
        let found: HashSet<Digest> = found.into_iter().map(|found| found.digest).collect();
        let there = found.contains(referrer);
        let mut listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if listed.len() >= KNOWN {
            listed.clear();
        }
        listed.insert(key, Arc::new(found));
        Ok(there)
    }

    async fn put_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        content: Content,
    ) -> Result<Placed, Failure> {
        let remote = self.repository(repository);
        match content {
            Content::File(file, _) => remote.put_blob_open(descriptor, file).await,
            Content::Bytes(bytes) => remote.put_blob(descriptor, bytes).await,
            Content::Stream(mut chunks) => {
                let from = chunks
                    .origin()
                    .and_then(|origin| origin.downcast_ref::<Repository>())
                    .cloned();
                if let Some(from) = from {
                    remote.copy_blob(descriptor, &from).await.map(drop)
                } else {
                    let bytes = collect(descriptor, chunks.as_mut()).await?;
                    remote.put_blob(descriptor, bytes).await
                }
            }
        }
        .map_err(failure)?;
        self.note(repository, &descriptor.digest);
        Ok(Placed::Copied)
    }

    async fn put_manifest(
        &self,
        repository: &RepositoryName,
        arrival: Arrival,
    ) -> Result<(), Failure> {
        let remote = self.repository(repository);
        let _writer = match &arrival.view.subject {
            None => None,
            Some(subject) => {
                let writer = self.writer(&subject.digest).await;
                self.forget(&(repository.clone(), subject.digest.clone()));
                Some(writer)
            }
        };
        let mut references: Vec<_> = arrival.tags.into_iter().map(TagOrDigest::Tag).collect();
        if references.is_empty() {
            references.push(TagOrDigest::Digest(arrival.digest.clone()));
        }
        for reference in &references {
            let put = remote
                .put_manifest(reference, &arrival.view.media_type, arrival.body.clone())
                .await
                .map_err(|error| match error {
                    // A rule of the destination, such as that tags do not move, is about this one.
                    client::Error::Unauthorized { .. } => Failure::Broken(error.to_string()),
                    other => failure(other),
                })?;
            if put != arrival.digest {
                return Err(Failure::Broken(format!(
                    "`{}` took it as `{put}`",
                    self.host
                )));
            }
        }
        Ok(())
    }

    async fn finish(
        &self,
        _repository: &RepositoryName,
        _entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        Ok(())
    }
}

/// A blob of a source that is no registry and gives no file.
async fn collect(
    descriptor: &Descriptor,
    chunks: &mut dyn store::import::Chunks,
) -> Result<Bytes, Failure> {
    let mut whole = Vec::new();
    while let Some(chunk) = chunks.next().await? {
        if whole.len() + chunk.len() > MAX_HELD {
            return Err(Failure::Broken(format!(
                "blob `{}` is longer than the {MAX_HELD} bytes that can be sent out of a stream",
                descriptor.digest
            )));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.into())
}

/// How many subjects get referrers at one time.
const WRITERS: usize = 64;
/// Of how many subjects the referrers are held.
const KNOWN: usize = 64;
/// The longest blob that is held, in bytes.
const MAX_HELD: usize = 64 * 1024 * 1024;
