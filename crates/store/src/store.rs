//! The open store: one method per thing that can be done with it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci::reference::TagOrDigest;
use oci::{Algorithm, Digest, RepositoryName, Tag};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use crate::blob::file_system::FileSystem;
use crate::clock::{Clock, random_name};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::export::shelf::Shelf;
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::mode::Gate;
use crate::model::{
    Actor, AuditEntry, Blob, BlobInfo, Event, EventBounds, Expected, Options, PutManifest,
    PutOutcome, Referrer, Statistics, StoredManifest, TagMove, TagState, TokenKey, UploadId,
};
use crate::sql::{Context, Db, Row, WriteKind};
use crate::upload::claim::{Claims, Slot};
use crate::upload::writer::{MEMORY, Session, UploadWriter};
use crate::{
    audit, blob, collect, event, export, manifest, meta, referrer, repository, tag, upload, usage,
};

/// An open store. Cloning is cheap and shares it.
#[derive(Clone)]
pub struct Store(pub(crate) Arc<Inner>);

/// What all clones and all writers share.
pub(crate) struct Inner {
    pub(crate) db: Db,
    pub(crate) objects: FileSystem,
    pub(crate) claims: Claims,
    pub(crate) options: Options,
    pub(crate) clock: Arc<Clock>,
    pub(crate) collector: collect::Collector,
    pub(crate) scrub: crate::scrub::Counters,
    /// Whether users may write now.
    pub(crate) gate: Arc<Gate>,
    /// Bytes that uploads may hold in memory.
    pub(crate) memory: Arc<Semaphore>,
    /// Ends of uploads that go on after their request has gone.
    pub(crate) tasks: TaskTracker,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) backup: crate::backup::Place,
    /// Where exports are written.
    pub(crate) exports: Shelf,
    signal: Arc<watch::Sender<i64>>,
    epoch: String,
    /// Dropped last: the lock goes after everything that it protects.
    directory: Mutex<Option<Directory>>,
}

impl Inner {
    pub(crate) fn epoch(&self) -> &str {
        &self.epoch
    }
}

impl Store {
    /// Opens the embedded store in `dir`, making it when the directory is empty or missing. Takes the directory lock.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Newer`], [`Error::NotADataDirectory`], [`Error::Damaged`], [`Error::Io`],
    /// [`Error::Database`], [`Error::Full`].
    pub async fn open(dir: &Path, options: Options) -> Result<Self, Error> {
        Self::open_at(&Location::embedded(dir), options).await
    }

    /// Opens the store at `location`, making it where there is none.
    ///
    /// # Errors
    /// As [`Store::open`], and [`Error::Unavailable`] when PostgreSQL or the object store cannot be reached.
    pub async fn open_at(location: &Location, options: Options) -> Result<Self, Error> {
        let ObjectLocation::Directory(dir) = &location.objects else {
            return Err(Error::Unavailable {
                what: "the object store",
                problem: "it is not supported yet".to_owned(),
            });
        };
        let url = match &location.database {
            DatabaseLocation::Sqlite(_) => None,
            DatabaseLocation::Postgres(url) => Some(url.clone()),
        };
        Self::start(dir, url, options).await
    }

    /// The same rooms over PostgreSQL with objects in `dir`, for the contract tests of the two engines.
    #[doc(hidden)]
    pub async fn open_on_postgres(dir: &Path, url: &str, options: Options) -> Result<Self, Error> {
        Self::start(dir, Some(url.to_owned()), options).await
    }

    async fn start(dir: &Path, url: Option<String>, options: Options) -> Result<Self, Error> {
        let context = Context {
            clock: Arc::default(),
            signal: Arc::new(watch::channel(0).0),
            gate: Arc::new(Gate::of_directory(dir, options.floor)),
        };
        let root = dir.to_owned();
        let embedded = url.is_none();
        let (directory, sqlite) = {
            let context = context.clone();
            tokio::task::spawn_blocking(move || {
                let directory = if embedded {
                    Directory::open(&root)?
                } else {
                    Directory::open_objects(&root)?
                };
                // A disk that is full must not keep the database from being opened.
                context.gate.look();
                let sqlite = if embedded {
                    Some(Db::open_sqlite(
                        &directory::database(&root),
                        directory.fresh,
                        context,
                    )?)
                } else {
                    None
                };
                Ok::<_, Error>((directory, sqlite))
            })
            .await
            .unwrap_or(Err(Error::Stopped))?
        };
        let db = match (sqlite, url) {
            (Some(db), _) => db,
            (None, Some(url)) => Db::open_postgres(&url, context.clone()).await?,
            (None, None) => return Err(Error::Stopped),
        };
        let epoch = meta::epoch(&db).await?;
        context
            .signal
            .send_replace(event::bounds(&db).await?.newest);
        if directory.fresh {
            directory.finish()?;
        }
        Ok(Self(Arc::new(Inner {
            db,
            objects: FileSystem::open(directory::objects(dir)),
            claims: Claims::default(),
            options,
            clock: context.clock,
            collector: collect::Collector::default(),
            scrub: crate::scrub::Counters::default(),
            gate: context.gate,
            memory: Arc::new(Semaphore::new(MEMORY)),
            tasks: TaskTracker::new(),
            runtime: tokio::runtime::Handle::current(),
            backup: crate::backup::Place::default(),
            exports: Shelf::of_directory(dir),
            signal: context.signal,
            epoch,
            directory: Mutex::new(Some(directory)),
        })))
    }

    /// Finishes what is queued, checkpoints and releases the directory lock. Other clones are refused from then on.
    ///
    /// # Errors
    /// When the database could not be written to its end; nothing acknowledged is lost.
    pub async fn close(self) -> Result<(), Error> {
        let inner = &self.0;
        inner.tasks.close();
        inner.tasks.wait().await;
        let sealed = seal(inner).await;
        inner.backup.close().await;
        let closed = inner.db.close().await;
        // On a full disk the log is folded into the database at the next start; nothing of it is lost.
        let (sealed, closed) = (unless_full(sealed), unless_full(closed));
        inner
            .directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        sealed.and(closed)
    }

    /// A cheap statement that tells whether the store answers (for `/readyz`).
    ///
    /// # Errors
    /// [`Error::Stopped`] after a failure that the store must not go on from; [`Error::Database`].
    pub async fn ping(&self) -> Result<(), Error> {
        meta::ping(&self.0.db).await
    }

    /// Waits until the store has stopped after a failure of its own (a failed sync of the database). The process
    /// should then exit: it acknowledges nothing any more.
    pub async fn stopped(&self) {
        self.0.db.stopped().await;
    }

    /// What all clones share, for the rooms that add methods to a store.
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// Runs background work (collection, outbox of deletions, expiry of events, audit sealing) until the future is dropped.
    pub async fn maintain(&self) {
        // Apart: a slow object store must not delay the rest.
        tokio::join!(self.upkeep(), collect::work(&self.0), export::work(&self.0));
    }

    async fn upkeep(&self) {
        let mut tick = tokio::time::interval(MAINTENANCE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // A failure that lasts is told once.
        let mut told = String::new();
        loop {
            tick.tick().await;
            match self.upkeep_once().await {
                Ok(()) => told.clear(),
                Err(Error::Stopped) => return,
                Err(error) => {
                    let text = error.to_string();
                    if told != text {
                        tracing::warn!(%error, "background work failed, it is tried again");
                        told = text;
                    }
                }
            }
        }
    }

    /// All background work that is due, to its end.
    ///
    /// # Errors
    /// The first failure; what was done before stays done.
    #[doc(hidden)]
    pub async fn maintain_once(&self) -> Result<(), Error> {
        self.upkeep_once().await?;
        collect::drain(&self.0).await?;
        self.upkeep_once().await
    }

    async fn upkeep_once(&self) -> Result<(), Error> {
        let inner = &self.0;
        self.watch_mode().await?;
        for slot in inner.claims.idle(inner.options.claim_idle) {
            if let Some(session) = slot.take_idle(inner.options.claim_idle) {
                end_idle(inner, session).await;
            }
        }
        seal(inner).await?;
        while inner.db.write(usage::Fold).await? {}
        let retention = inner.options.event_retention;
        inner.db.write(event::Prune { retention }).await
    }

    /// Starts an upload (end-4a, end-4c). `algorithm` is what `digest-algorithm` asked for.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Stopped`], [`Error::Database`], as for every call that writes.
    pub async fn start_upload(
        &self,
        repository: &RepositoryName,
        algorithm: Algorithm,
        actor: &Actor,
    ) -> Result<UploadId, Error> {
        let name = UploadId(random_name()?);
        self.0
            .db
            .write(upload::Start {
                repository: repository.clone(),
                name: name.clone(),
                algorithm,
                principal: actor.principal.clone(),
                expiry: self.0.options.upload_expiry,
                key: None,
            })
            .await?;
        Ok(name)
    }

    /// The number of bytes recorded for an open upload (end-13).
    ///
    /// # Errors
    /// [`Error::UploadUnknown`].
    pub async fn upload_offset(
        &self,
        repository: &RepositoryName,
        id: &UploadId,
    ) -> Result<u64, Error> {
        upload::offset(&self.0.db, repository, id, self.0.clock.now()).await
    }

    /// Claims the upload for one writer.
    ///
    /// # Errors
    /// [`Error::UploadBusy`] with the recorded offset when another one has it; [`Error::UploadUnknown`].
    pub async fn claim_upload(
        &self,
        repository: &RepositoryName,
        id: &UploadId,
    ) -> Result<UploadWriter, Error> {
        let inner = &self.0;
        inner.gate.check_early()?;
        let slot = Arc::<Slot>::default();
        let claim = loop {
            match inner.claims.claim(&id.0, &slot) {
                Ok(claim) => break claim,
                Err(other) => {
                    if let Some(session) = other.take_idle(inner.options.claim_idle) {
                        end_idle(inner, session).await;
                    } else {
                        let offset = self.upload_offset(repository, id).await?;
                        return Err(Error::UploadBusy { offset });
                    }
                }
            }
        };
        let open = upload::find(&inner.db, repository, id, inner.clock.now()).await?;
        let session = Session::resume(inner, &slot, repository, open, claim).await?;
        *slot.session.lock().await = Some(Box::new(session));
        slot.touch();
        Ok(UploadWriter::new(inner, slot))
    }

    /// Cancels an upload (end-14).
    ///
    /// # Errors
    /// [`Error::UploadUnknown`]; [`Error::UploadBusy`] while a writer has it.
    pub async fn cancel_upload(
        &self,
        repository: &RepositoryName,
        id: &UploadId,
    ) -> Result<(), Error> {
        let Some(_claim) = self.0.claims.try_claim(&id.0) else {
            let offset = self.upload_offset(repository, id).await?;
            return Err(Error::UploadBusy { offset });
        };
        let open = upload::find(&self.0.db, repository, id, self.0.clock.now()).await?;
        self.0.db.write(upload::Expire { id: open.id }).await
    }

    /// Starts a writer for a single POST (end-4b): small bodies never touch the disk before the one commit.
    ///
    /// # Errors
    /// [`Error::ReadOnly`].
    pub async fn put_blob(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        actor: &Actor,
    ) -> Result<UploadWriter, Error> {
        self.0.gate.check_early()?;
        let slot = Arc::<Slot>::default();
        let session = Session::single(&self.0, &slot, repository, digest.algorithm(), actor);
        *slot.session.lock().await = Some(Box::new(session));
        Ok(UploadWriter::new(&self.0, slot))
    }

    /// HEAD of a blob. With `renew`, the caller has push right and the answer keeps the blob for 12 h (`I7`).
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn stat_blob(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        renew: bool,
    ) -> Result<Option<BlobInfo>, Error> {
        blob::stat(&self.0, repository, digest, renew).await
    }

    /// Opens a blob of a repository for reading.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Io`] when its object is not what was stored.
    pub async fn open_blob(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Blob>, Error> {
        blob::open(&self.0, repository, digest).await
    }

    /// Mounts a blob from the first of `sources` that holds it (end-11). `false`: none does, start an upload instead.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn mount_blob(
        &self,
        into: &RepositoryName,
        digest: &Digest,
        sources: &[RepositoryName],
        actor: &Actor,
    ) -> Result<bool, Error> {
        self.0
            .db
            .write(blob::Mount {
                into: into.clone(),
                digest: digest.clone(),
                sources: sources.into(),
                actor: actor.clone(),
                lease: self.0.options.lease,
            })
            .await
    }

    /// Repositories that hold this blob, at most `limit`: candidates of a mount without `from`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn repositories_with_blob(
        &self,
        digest: &Digest,
        limit: usize,
    ) -> Result<Vec<RepositoryName>, Error> {
        crate::lease::holders(&self.0.db, digest, limit).await
    }

    /// Deletes a blob from a repository (end-10).
    ///
    /// # Errors
    /// [`Error::BlobUnknown`]; [`Error::BlobInUse`] when a manifest of the repository names it.
    pub async fn delete_blob(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        actor: &Actor,
    ) -> Result<(), Error> {
        self.0
            .db
            .write(blob::Delete {
                repository: repository.clone(),
                digest: digest.clone(),
                actor: actor.clone(),
            })
            .await
    }

    /// Reads a manifest: one query.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn manifest(
        &self,
        repository: &RepositoryName,
        reference: &TagOrDigest,
    ) -> Result<Option<StoredManifest>, Error> {
        manifest::read(&self.0.db, repository, reference).await
    }

    /// HEAD of a manifest by digest for a caller with push right renews its lease (`I7`); `false`: it is gone.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn renew_manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<bool, Error> {
        let inner = &self.0;
        manifest::renew(
            &inner.db,
            &inner.clock,
            repository,
            digest,
            inner.options.lease,
        )
        .await
    }

    /// Stores a manifest in one transaction (`I3`).
    ///
    /// # Errors
    /// [`Error::MissingReferences`], [`Error::Precondition`], [`Error::TagImmutable`], [`Error::TagCreateDenied`];
    /// then nothing of it is stored.
    pub async fn put_manifest(&self, put: PutManifest) -> Result<PutOutcome, Error> {
        let outcome = self
            .0
            .db
            .write(manifest::Put {
                put: Arc::new(put),
                lease: self.0.options.lease,
                allow_sparse: self.0.options.allow_sparse,
            })
            .await;
        crate::failpoint::failpoint("manifest.after_transaction");
        outcome
    }

    /// Deletes a manifest by digest with its tags (end-9).
    ///
    /// # Errors
    /// [`Error::ManifestUnknown`]; [`Error::ManifestInUse`] when an index of the repository names it.
    pub async fn delete_manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        actor: &Actor,
    ) -> Result<(), Error> {
        self.0
            .db
            .write(manifest::Delete {
                repository: repository.clone(),
                digest: digest.clone(),
                actor: actor.clone(),
                lease: self.0.options.lease,
            })
            .await
    }

    /// Deletes a tag (end-9).
    ///
    /// # Errors
    /// [`Error::ManifestUnknown`], [`Error::Precondition`].
    pub async fn delete_tag(
        &self,
        repository: &RepositoryName,
        tag: &Tag,
        expected: Expected,
        actor: &Actor,
    ) -> Result<(), Error> {
        self.0
            .db
            .write(tag::Delete {
                repository: repository.clone(),
                tag: tag.clone(),
                expected,
                actor: actor.clone(),
                lease: self.0.options.lease,
            })
            .await
    }

    /// What a tag points to, with its generation.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn tag(
        &self,
        repository: &RepositoryName,
        tag: &Tag,
    ) -> Result<Option<TagState>, Error> {
        tag::find(&self.0.db, repository, tag).await
    }

    /// Tags in bytewise order after `last` (need not exist).
    ///
    /// # Errors
    /// [`Error::RepositoryUnknown`].
    pub async fn tags(
        &self,
        repository: &RepositoryName,
        last: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, Error> {
        tag::list(&self.0.db, repository, last, limit).await
    }

    /// Every move of a tag, newest first, before `before` (an exclusive generation), for the tag history API.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn tag_history(
        &self,
        repository: &RepositoryName,
        tag: &Tag,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<TagMove>, Error> {
        tag::history(&self.0.db, repository, tag, before, limit).await
    }

    /// Referrers of a digest in a stable order (end-12). `after` is the `cursor` of the last one of the page before.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn referrers(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        artifact_type: Option<&str>,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Referrer>, Error> {
        referrer::list(&self.0.db, repository, subject, artifact_type, after, limit).await
    }

    /// Repositories with content in bytewise order after `last`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn repositories(
        &self,
        last: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RepositoryName>, Error> {
        repository::list(&self.0.db, last, limit).await
    }

    /// The epoch of the event numbers (new at init and after a restore).
    pub fn epoch(&self) -> &str {
        &self.0.epoch
    }

    /// The oldest position that can be resumed from and the newest number.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn event_bounds(&self) -> Result<EventBounds, Error> {
        event::bounds(&self.0.db).await
    }

    /// Events with a number above `after`, in order.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn events_after(&self, after: i64, limit: usize) -> Result<Vec<Event>, Error> {
        event::after(&self.0.db, after, limit).await
    }

    /// Changes with the newest event number, woken by the commit itself.
    pub fn event_signal(&self) -> watch::Receiver<i64> {
        self.0.signal.subscribe()
    }

    /// Writes an audit row of its own (a failed login, a refused push).
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn audit(&self, entry: AuditEntry) -> Result<(), Error> {
        self.0.db.write(audit::Add(entry)).await
    }

    /// The keys that sign tokens, the newest first; makes one when there is none.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn token_keys(&self) -> Result<Vec<TokenKey>, Error> {
        meta::token_keys(&self.0.db).await
    }

    /// Totals for `/metrics`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn statistics(&self) -> Result<Statistics, Error> {
        let db = &self.0.db;
        let (blobs, blob_bytes) = blob::totals(db).await?;
        Ok(Statistics {
            repositories: repository::count(db).await?,
            blobs,
            blob_bytes,
            manifests: manifest::count(db).await?,
            tags: tag::count(db).await?,
            uploads: upload::count(db).await?,
            pending_deletions: collect::count_deletions(db).await?,
        })
    }

    /// Bytes and objects that a namespace (the first path component) uses.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn namespace_usage(&self, namespace: &str) -> Result<(i64, i64), Error> {
        usage::total(&self.0.db, namespace).await
    }

    /// Marks a blob as damaged: HEAD says that it is absent and GET fails, until a push of the same content
    /// heals it in every repository that holds it.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn mark_suspect(&self, digest: &Digest) -> Result<(), Error> {
        self.0.db.write(blob::Suspect(digest.clone())).await
    }

    /// Moves this store's clock forward, so that tests see leases, uploads and events end.
    #[doc(hidden)]
    pub fn advance_clock(&self, by: Duration) {
        self.0.clock.advance(by);
    }

    /// The same checks as [`crate::verify_store`] inside this store, on either engine, and the audit chain.
    #[doc(hidden)]
    pub async fn verify_open(&self) -> Result<crate::VerifyReport, Error> {
        self.0.db.write(VerifyOpen(Arc::clone(&self.0))).await
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("epoch", &self.0.epoch)
            .finish_non_exhaustive()
    }
}

struct VerifyOpen(Arc<Inner>);

impl crate::sql::Body for VerifyOpen {
    type Output = crate::VerifyReport;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut crate::sql::Tx) -> Result<crate::VerifyReport, Error> {
        let objects = &self.0.objects;
        let mut report = crate::VerifyReport::default();
        let mut doubts = Vec::new();
        let listed = objects.list()?;
        crate::verify::check(tx, objects, listed, &mut report, &mut doubts).await?;
        crate::verify::settle(tx, doubts, &mut report).await?;
        if let Err(problem) = audit::verify(tx).await? {
            report.problems.push(problem);
        }
        Ok(report)
    }
}

/// Records what an idle writer wrote and gives its claim back.
async fn end_idle(inner: &Inner, session: Box<Session>) {
    let ended = inner.tasks.spawn_on(session.record(), &inner.runtime).await;
    if let Ok(Err(error)) = ended {
        tracing::debug!(%error, "an idle upload could not be recorded");
    }
}

fn unless_full(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(Error::Full) => {
            tracing::info!("the disk is full, what is left of the end is done at the next start");
            Ok(())
        }
        other => other,
    }
}

async fn seal(inner: &Inner) -> Result<(), Error> {
    while inner.db.write(audit::Seal).await? {}
    Ok(())
}

/// The one number of a counting statement.
pub(crate) fn single(rows: &[Row]) -> Result<u64, Error> {
    rows.first().map_or(Ok(0), |row| row.u64(0))
}

const MAINTENANCE: Duration = Duration::from_secs(1);
