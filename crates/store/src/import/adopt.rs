//! A store as one end of an import or export, and files that become objects in place.
//!
//! In place means without a copy of the bytes: as a reflink, which shares blocks until either side writes, or as a
//! hard link, a second name of the same file. Before either the object has its row (`I6`), that of an upload; then the
//! whole file is read and hashed, made durable with its entry, and committed as every other upload (`I1`, `I2`). A
//! run that is killed leaves an upload, which expires, and its object goes with it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, RepositoryName, Tag};
use rustix::fs::{AtFlags, CWD, ioctl_ficlone, linkat};
use rustix::io::Errno;

use super::{
    Arrival, CHUNK, Chunks, Content, Contents, Document, Entry, Failure, Repositories, Sink, Source,
};
use crate::blob::Content as NewContent;
use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::s3::RemoteStream;
use crate::blocking::blocking;
use crate::clock::random_name;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, Blob, BlobContent, Expected, PutManifest, TagWrite, UploadId};
use crate::store::{Inner, Store};
use crate::upload::writer::digest_of_file;
use crate::upload::{self, Commit, Expire, Object, Start};

/// How a file becomes an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Its bytes are written anew.
    Copy,
    /// Its blocks are shared where the file system can, else it is copied.
    #[default]
    Share,
    /// As [`Placement::Share`], and where blocks cannot be shared it becomes a hard link. Whoever writes into the
    /// file later changes the object, and both keep owner and mode of the file.
    Link,
}

/// How a blob came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Its bytes were written.
    Copied,
    /// It shares blocks with its source.
    Reflinked,
    /// It is its source under another name.
    Linked,
}

/// A store that takes content in.
#[derive(Debug)]
pub struct StoreSink {
    store: Store,
    actor: Actor,
    placement: Placement,
    /// The file systems can do neither: no blob is tried in place again.
    apart: AtomicBool,
}

impl StoreSink {
    /// Writes into `store`. Its history and audit name `import`, and one request for the whole run.
    ///
    /// # Errors
    /// When there is no randomness for the name of the run.
    pub fn new(store: &Store, placement: Placement) -> Result<Self, Error> {
        Ok(Self {
            store: store.clone(),
            actor: Actor {
                principal: "import".to_owned(),
                request: random_name()?,
                address: "local".to_owned(),
            },
            placement,
            apart: AtomicBool::new(false),
        })
    }

    /// Takes a file in without a copy of its bytes; `None` when that cannot be done here.
    async fn in_place(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        file: &Arc<File>,
        size: u64,
    ) -> Result<Option<Placed>, Error> {
        let inner = self.store.inner();
        let Some(files) = inner.objects.files() else {
            return Ok(None);
        };
        let key = StorageKey::fresh()?;
        failpoint("import.before_row");
        let id = inner
            .db
            .write(Start {
                repository: repository.clone(),
                name: UploadId(random_name()?),
                algorithm: digest.algorithm(),
                principal: self.actor.principal.clone(),
                expiry: inner.options.upload_expiry,
                object: Some(Object::File(key.clone())),
            })
            .await?;
        failpoint("import.after_row");
        let work = {
            let (files, key, file) = (Arc::clone(files), key.clone(), Arc::clone(file));
            let (digest, placement) = (digest.clone(), self.placement);
            move || place(&files, &key, &file, size, &digest, placement)
        };
        let placed = blocking(work).await;
        let placed = match placed {
            Ok(Some(placed)) => placed,
            other => {
                expire(inner, id).await;
                return other;
            }
        };
        failpoint("import.after_sync");
        let committed = inner
            .db
            .write(Commit {
                upload: Some((id, 1)),
                repository: repository.clone(),
                digest: digest.clone(),
                size,
                content: NewContent::Object(key),
                keep: upload::keep(&inner.options),
                actor: self.actor.clone(),
            })
            .await;
        if let Err(error) = committed {
            // It finds no row when the commit happened after all.
            expire(inner, id).await;
            return Err(error);
        }
        Ok(Some(placed))
    }

    async fn write(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        content: Content,
    ) -> Result<(), Failure> {
        let mut writer = self
            .store
            .put_blob(repository, digest, &self.actor)
            .await
            .map_err(fatal)?;
        let mut chunks = content.into_chunks();
        while let Some(chunk) = chunks.next().await? {
            writer.write(chunk).await.map_err(fatal)?;
        }
        writer
            .commit(digest, &self.actor)
            .await
            .map(drop)
            .map_err(content_failure)
    }
}

impl Sink for StoreSink {
    fn accepts_sparse(&self) -> bool {
        self.store.inner().options.allow_sparse
    }

    async fn tag(&self, repository: &RepositoryName, tag: &Tag) -> Result<Option<Digest>, Failure> {
        let state = self.store.tag(repository, tag).await.map_err(fatal)?;
        Ok(state.map(|state| state.digest))
    }

    async fn has_manifest(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<bool, Failure> {
        // What is skipped must stay until whatever names it is there (`I7`).
        self.store
            .renew_manifest(repository, &descriptor.digest)
            .await
            .map_err(fatal)
    }

    async fn has_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        take: bool,
    ) -> Result<bool, Failure> {
        let digest = &descriptor.digest;
        let there = self
            .store
            .stat_blob(repository, digest, take)
            .await
            .map_err(fatal)?;
        if there.is_some() || !take {
            return Ok(there.is_some());
        }
        let holders = self
            .store
            .repositories_with_blob(digest, 4)
            .await
            .map_err(fatal)?;
        if holders.is_empty() {
            return Ok(false);
        }
        self.store
            .mount_blob(repository, digest, &holders, &self.actor)
            .await
            .map_err(fatal)
    }

    async fn has_referrer(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, Failure> {
        let mut after = None;
        loop {
            let (page, more) = self
                .store
                .referrers_page(repository, subject, None, after, PAGE, PAGE_BYTES)
                .await
                .map_err(fatal)?;
            if page.iter().any(|row| row.descriptor.digest == *referrer) {
                return Ok(true);
            }
            match page.last() {
                Some(last) if more => after = Some(last.cursor),
                _ => return Ok(false),
            }
        }
    }

    async fn put_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        content: Content,
    ) -> Result<Placed, Failure> {
        let digest = &descriptor.digest;
        let content = match content {
            Content::File(file, size)
                if size > self.store.inner().options.inline_limit
                    && self.placement != Placement::Copy
                    && !self.apart.load(Ordering::Relaxed) =>
            {
                let file = Arc::new(file);
                let placed = self
                    .in_place(repository, digest, &file, size)
                    .await
                    .map_err(content_failure)?;
                if let Some(placed) = placed {
                    return Ok(placed);
                }
                self.apart.store(true, Ordering::Relaxed);
                let file = Arc::try_unwrap(file)
                    .or_else(|file| file.try_clone())
                    .map_err(|error| Failure::Broken(format!("blob `{digest}`: {error}")))?;
                Content::File(file, size)
            }
            other => other,
        };
        self.write(repository, digest, content).await?;
        Ok(Placed::Copied)
    }

    async fn put_manifest(
        &self,
        repository: &RepositoryName,
        arrival: Arrival,
    ) -> Result<(), Failure> {
        let tags = arrival
            .tags
            .into_iter()
            .map(|tag| TagWrite {
                tag,
                expected: Expected::Any,
                may_create: true,
                may_overwrite: true,
            })
            .collect();
        let put = PutManifest {
            repository: repository.clone(),
            digest: arrival.digest,
            body: arrival.body,
            view: arrival.view,
            tags,
            actor: self.actor.clone(),
        };
        match self.store.put_manifest(put).await {
            Ok(_) => Ok(()),
            Err(error @ Error::MissingReferences(_)) => Err(Failure::Broken(error.to_string())),
            Err(error) => Err(fatal(error)),
        }
    }

    async fn finish(
        &self,
        _repository: &RepositoryName,
        _entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        // Rows are the list.
        Ok(())
    }
}

/// A store that gives content out.
#[derive(Clone, Debug)]
pub struct StoreSource(Store);

impl StoreSource {
    /// Reads `store`.
    pub fn new(store: &Store) -> Self {
        Self(store.clone())
    }
}

impl Source for StoreSource {
    async fn repositories(&self) -> Result<Repositories, Failure> {
        let mut found = Repositories::default();
        loop {
            let last = found.names.last().map(|name| name.as_str().to_owned());
            let page = self
                .0
                .repositories(last.as_deref(), PAGE)
                .await
                .map_err(fatal)?;
            let whole = page.len() == PAGE;
            found.names.extend(page);
            if !whole {
                return Ok(found);
            }
        }
    }

    async fn contents(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let mut contents = Contents::default();
        let mut last: Option<String> = None;
        loop {
            let page = match self.0.tags(repository, last.as_deref(), PAGE).await {
                Ok(page) => page,
                Err(Error::RepositoryUnknown(_)) => return Ok(contents),
                Err(error) => return Err(fatal(error)),
            };
            for name in &page {
                let Ok(tag) = name.parse::<Tag>() else {
                    contents.problems.push(format!("`{name}` is no tag"));
                    continue;
                };
                // One that went meanwhile is no part of the export.
                if let Some(state) = self.0.tag(repository, &tag).await.map_err(fatal)? {
                    contents.tags.insert(tag, state.digest);
                }
            }
            if page.len() < PAGE {
                return Ok(contents);
            }
            last = page.into_iter().next_back();
        }
    }

    async fn manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Document>, Failure> {
        let stored = self
            .0
            .manifest(repository, &TagOrDigest::Digest(digest.clone()))
            .await
            .map_err(fatal)?;
        let Some(stored) = stored else {
            return Ok(None);
        };
        let place = format!("{repository}@{digest}");
        Ok(Some(Document {
            body: super::verified(digest, stored.body.into(), &place)?,
            media_type: stored.media_type,
        }))
    }

    async fn referrers(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
    ) -> Result<Vec<Digest>, Failure> {
        let mut found = Vec::new();
        let mut after = None;
        loop {
            let (page, more) = self
                .0
                .referrers_page(repository, subject, None, after, PAGE, PAGE_BYTES)
                .await
                .map_err(fatal)?;
            after = page.last().map(|row| row.cursor);
            found.extend(page.into_iter().map(|row| row.descriptor.digest));
            if !more || after.is_none() {
                return Ok(found);
            }
        }
    }

    async fn blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<Option<Content>, Failure> {
        let blob = match self.0.open_blob(repository, &descriptor.digest).await {
            Ok(blob) => blob,
            Err(error @ (Error::Stopped | Error::Unavailable { .. })) => return Err(fatal(error)),
            Err(error) => {
                return Err(Failure::Broken(format!(
                    "blob `{}`: {error}",
                    descriptor.digest
                )));
            }
        };
        let Some(blob) = blob else {
            return Ok(None);
        };
        if let BlobContent::Remote(remote) = &blob.content {
            let stream = remote.stream(0..blob.size).await.map_err(fatal)?;
            return Ok(Some(Content::Stream(Box::new(Remote(stream)))));
        }
        Ok(Some(Content::Stream(Box::new(Pieces { blob, at: 0 }))))
    }
}

/// A blob out of an object store, as it comes.
struct Remote(RemoteStream);

impl Chunks for Remote {
    fn next(
        &mut self,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>> {
        Box::pin(async move { self.0.next().await.map_err(fatal) })
    }
}

/// A blob of a store, piece by piece.
struct Pieces {
    blob: Blob,
    at: u64,
}

impl Chunks for Pieces {
    fn next(
        &mut self,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>> {
        Box::pin(async move {
            if self.at == self.blob.size {
                return Ok(None);
            }
            let end = self.blob.size.min(self.at + CHUNK);
            let piece = self
                .blob
                .read(self.at..end)
                .await
                .map_err(|error| Failure::Broken(error.to_string()))?;
            if piece.is_empty() {
                return Err(Failure::Broken(
                    "an object is shorter than its row says".to_owned(),
                ));
            }
            self.at += piece.len() as u64;
            Ok(Some(piece))
        })
    }
}

/// Makes `file` the object of `key`, durable and verified; `None` when the file systems cannot.
fn place(
    objects: &FileSystem,
    key: &StorageKey,
    file: &File,
    size: u64,
    digest: &Digest,
    placement: Placement,
) -> Result<Option<Placed>, Error> {
    objects.make_parent(key)?;
    let path = objects.path(key);
    let placed = if reflink(&path, file)? {
        Placed::Reflinked
    } else if placement == Placement::Link && link(&path, file)? {
        Placed::Linked
    } else {
        return Ok(None);
    };
    failpoint("import.after_place");
    // What is hashed is the object, not what it was made of.
    let object = objects.read(key, size)?;
    let actual = object
        .try_clone()
        .and_then(|file| digest_of_file(digest.algorithm(), file))
        .map_err(|error| Error::io("read", &path, error))?;
    if actual != *digest {
        return Err(Error::DigestMismatch {
            expected: digest.clone(),
            actual,
        });
    }
    // The other program may never have made it durable.
    object
        .sync_data()
        .map_err(|error| Error::io("sync", &path, error))?;
    objects.sync_entry(key)?;
    Ok(Some(placed))
}

/// Makes a file that shares the blocks of another; `false` where that is not possible.
fn reflink(path: &Path, from: &File) -> Result<bool, Error> {
    let file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io("create", path, error))?;
    let Err(error) = ioctl_ficlone(&file, from) else {
        return Ok(true);
    };
    std::fs::remove_file(path).map_err(|error| Error::io("remove", path, error))?;
    match error {
        Errno::XDEV
        | Errno::OPNOTSUPP
        | Errno::INVAL
        | Errno::NOTTY
        | Errno::NOSYS
        | Errno::PERM
        | Errno::ACCESS => Ok(false),
        error => Err(Error::io("share blocks into", path, error.into())),
    }
}

/// Gives an open file a second name; `false` where that is not possible.
fn link(path: &Path, from: &File) -> Result<bool, Error> {
    // The name of the descriptor stands for exactly the file that was opened.
    let own = format!("/proc/self/fd/{}", from.as_fd().as_raw_fd());
    match linkat(CWD, own.as_str(), CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(true),
        Err(
            Errno::XDEV
            | Errno::PERM
            | Errno::ACCESS
            | Errno::MLINK
            | Errno::OPNOTSUPP
            | Errno::NOENT
            | Errno::NOSYS,
        ) => Ok(false),
        Err(error) => Err(Error::io("link", path, error.into())),
    }
}

/// Ends an upload that did not become a blob.
async fn expire(inner: &Inner, id: i64) {
    match inner.db.write(Expire { id, claim: None }).await {
        Ok(()) | Err(Error::UploadUnknown) => {}
        Err(error) => {
            tracing::warn!(%error, "an import's upload could not be ended, its time will end it");
        }
    }
}

fn fatal(error: Error) -> Failure {
    Failure::fatal(error)
}

/// A wrong digest is the source's, everything else is ours.
fn content_failure(error: Error) -> Failure {
    match error {
        Error::DigestMismatch { .. } => Failure::Broken(error.to_string()),
        other => fatal(other),
    }
}

/// Rows of a page.
const PAGE: usize = 1000;
/// Bytes of referrers that are read at once.
const PAGE_BYTES: usize = 4 << 20;
