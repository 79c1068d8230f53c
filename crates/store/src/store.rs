//! The open store: one method per thing that can be done with it.

use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci::reference::TagOrDigest;
use oci::{Algorithm, Digest, RepositoryName, Tag};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::clock::{Clock, Timestamp, random_name};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::export::shelf::Shelf;
use crate::identity::{self, Claim, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::mode::Gate;
use crate::model::{
    Actor, AuditEntry, Blob, BlobInfo, Event, EventBounds, Expected, Options, PutManifest,
    PutOutcome, Referrer, Statistics, StoredManifest, TagMove, TagState, TokenKey, UploadId,
};
use crate::sql::{Context, Db, Row};
use crate::upload::claim::{self, Claims, RowClaim, Slot};
use crate::upload::writer::{MEMORY, MEMORY_FOR_PARTS, Session, UploadWriter};
use crate::{
    audit, blob, collect, event, export, manifest, meta, pull, referrer, repository, tag, upload,
    usage,
};

/// An open store. Cloning is cheap and shares it.
#[derive(Clone)]
pub struct Store(pub(crate) Arc<Inner>);

/// What all clones and all writers share.
pub(crate) struct Inner {
    pub(crate) db: Arc<Db>,
    pub(crate) objects: Objects,
    pub(crate) claims: Claims,
    /// Pulls that are not written yet.
    pub(crate) pulls: pull::Buffer,
    /// What was counted last.
    pub(crate) figures: usage::Figures,
    pub(crate) sharing: usage::Sharing,
    /// When pulls are written, totals counted again and old attempts removed.
    pub(crate) flushing: pull::Schedule,
    pub(crate) recounting: pull::Schedule,
    pub(crate) pruning: pull::Schedule,
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
    /// Whether the objects are still this store's.
    pub(crate) identity: identity::Watch,
    signal: Arc<watch::Sender<i64>>,
    epoch: String,
    upkeep: Rarely,
    /// Ended with the store.
    background: Mutex<JoinSet<()>>,
    /// Dropped last: the locks go after everything that they protect.
    locks: Mutex<Vec<Directory>>,
}

impl Inner {
    pub(crate) fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Runs something until it or the store ends.
    pub(crate) fn in_background(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut background = self
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while background.try_join_next().is_some() {}
        background.spawn_on(work, &self.runtime);
    }
}

impl Store {
    /// What all clones share, for the other rooms of this crate.
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

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
        let location = location.clone();
        Self::start(location.database, location.objects, options).await
    }

    /// The same rooms over PostgreSQL with objects in `dir`, for the contract tests of the two engines.
    #[doc(hidden)]
    pub async fn open_on_postgres(dir: &Path, url: &str, options: Options) -> Result<Self, Error> {
        let objects = ObjectLocation::Directory(dir.to_owned());
        Self::start(DatabaseLocation::Postgres(url.to_owned()), objects, options).await
    }

    async fn start(
        database: DatabaseLocation,
        objects: ObjectLocation,
        options: Options,
    ) -> Result<Self, Error> {
        // The disk that matters is that of the objects, or of the database where that is all there is.
        let gate = match (&objects, &database) {
            (ObjectLocation::Directory(directory), _)
            | (_, DatabaseLocation::Sqlite(directory)) => {
                Gate::of_directory(directory, options.floor)
            }
            _ => Gate::default(),
        };
        let context = Context {
            gate: Arc::new(gate),
            quota: options.quota.and_then(|quota| i64::try_from(quota).ok()),
            ..Context::new()
        };
        let shared = matches!(database, DatabaseLocation::Postgres(_));
        let place = (database.clone(), objects.clone());
        let (db, mut locks) = open_database(database, &options, context.clone()).await?;
        let db = Arc::new(db);
        let (objects, exports, memory) = match objects {
            ObjectLocation::Directory(root) => {
                let exports = Shelf::of_directory(&root);
                let files = FileSystem::open(directory::objects(&root));
                if !locks.iter().any(|held| held.is(&root)) {
                    locks.push(blocking(move || Directory::open_objects(&root)).await?);
                }
                (Objects::Directory(Arc::new(files)), exports, MEMORY)
            }
            ObjectLocation::S3(location) => {
                let s3 = S3::connect(&location).await?;
                let exports = Shelf::S3(s3.clone());
                (Objects::S3(s3), exports, MEMORY_FOR_PARTS)
            }
        };
        crate::transfer::check_open(&db).await?;
        let place = Place::of(&place.0, &place.1, &objects);
        let id = identity::claim(&db, &place, Claim::Open).await?;
        let epoch = meta::epoch(&db).await?;
        context
            .signal
            .send_replace(event::bounds(&db).await?.newest);
        for directory in locks.iter().filter(|directory| directory.fresh) {
            directory.finish()?;
        }
        let mut background = JoinSet::new();
        if db.seals_events() {
            let (sealed, followed) = (Arc::clone(&db), Arc::clone(&db));
            background.spawn(event::keep_sealed(sealed, context.clone(), epoch.clone()));
            background.spawn(event::follow(followed, context.clone(), epoch.clone()));
        }
        Ok(Self(Arc::new(Inner {
            db,
            objects,
            claims: Claims::new(shared),
            pulls: pull::Buffer::default(),
            figures: usage::Figures::default(),
            sharing: usage::Sharing::default(),
            flushing: pull::Schedule::default(),
            recounting: pull::Schedule::default(),
            pruning: pull::Schedule::default(),
            options,
            clock: context.clock,
            collector: collect::Collector::default(),
            scrub: crate::scrub::Counters::default(),
            gate: context.gate,
            memory: Arc::new(Semaphore::new(memory)),
            tasks: TaskTracker::new(),
            runtime: tokio::runtime::Handle::current(),
            backup: crate::backup::Place::default(),
            exports,
            identity: identity::Watch::new(place, id),
            signal: context.signal,
            epoch,
            upkeep: Rarely::default(),
            background: Mutex::new(background),
            locks: Mutex::new(locks),
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
        let flushed = pull::flush(inner).await;
        let sealed = seal(inner).await;
        inner.backup.close().await;
        inner
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
        let closed = inner.db.close().await;
        // On a disk that takes no writes the log is folded into the database at the next start; nothing of it is lost.
        let (flushed, sealed, closed) = (
            unless_disk(flushed),
            unless_disk(sealed),
            unless_disk(closed),
        );
        inner
            .locks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        flushed.and(sealed).and(closed)
    }

    /// A cheap statement that tells whether the store answers (for `/readyz`).
    ///
    /// # Errors
    /// [`Error::Stopped`] after a failure that the store must not go on from; [`Error::Unavailable`];
    /// [`Error::Database`].
    pub async fn ping(&self) -> Result<(), Error> {
        meta::ping(&self.0.db).await
    }

    /// Waits until the store has stopped after a failure of its own (a failed sync of the database). The process
    /// should then exit: it acknowledges nothing any more.
    pub async fn stopped(&self) {
        self.0.db.stopped().await;
    }

    /// Runs background work (collection, outbox of deletions, expiry of events, sealing) until the future is dropped.
    /// Every replica does: there is no leader, and each piece of work is claimed in the database.
    pub async fn maintain(&self) {
        // Apart: a slow object store must not delay the rest. The upkeep ends with the store, and all with it.
        let rest = Box::pin(async {
            tokio::join!(
                collect::work(&self.0),
                export::work(&self.0),
                identity::work(&self.0),
                Box::pin(self.scrub()),
                Box::pin(self.retain()),
            );
            std::future::pending::<()>().await;
        });
        tokio::select! {
            () = Box::pin(self.upkeep()) => {}
            () = rest => {}
        }
    }

    async fn upkeep(&self) {
        // A failure that lasts is told once.
        let mut told = String::new();
        loop {
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
            tokio::time::sleep(between_rounds()).await;
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
        usage::maintain(inner).await?;
        let now = inner.clock.now();
        event::prune(&inner.db, now.minus(inner.options.event_retention)).await?;
        if inner.upkeep.due(now) {
            inner.db.write(meta::ForgetMarks).await?;
        }
        Ok(())
    }

    /// Numbers every event that is committed and seals every audit record, as the background work does.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn seal(&self) -> Result<(), Error> {
        seal(&self.0).await
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
                object: None,
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
        let (open, row_claim) = claim_row(inner, &slot, repository, id, Purpose::Write).await?;
        let resumed =
            Session::resume(inner, &slot, repository, open, row_claim.clone(), claim).await;
        let session = match (resumed, row_claim) {
            (Err(error), Some(row_claim)) => {
                row_claim.release().await;
                return Err(error);
            }
            (resumed, _) => resumed?,
        };
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
        let slot = Arc::<Slot>::default();
        let (open, row_claim) = claim_row(&self.0, &slot, repository, id, Purpose::End).await?;
        let claim = row_claim.map(|claim| claim.token().to_owned());
        self.0.db.write(upload::Expire { id: open.id, claim }).await
    }

    /// Holds memory of uploads until the guard is dropped, so that a test sees what becomes of them without it.
    #[doc(hidden)]
    pub async fn hold_memory(&self, bytes: u32) -> impl Drop + use<> {
        struct Held(Option<tokio::sync::OwnedSemaphorePermit>);
        impl Drop for Held {
            fn drop(&mut self) {
                drop(self.0.take());
            }
        }
        let memory = Arc::clone(&self.0.memory);
        Held(memory.acquire_many_owned(bytes).await.ok())
    }

    /// Takes claims in the rows of uploads as replicas do, for the contract tests.
    #[doc(hidden)]
    pub fn share_claims(&self) {
        self.0.claims.share();
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
                lease: self.0.untagged(&put.repository),
                put: Arc::new(put),
                allow_sparse: self.0.options.allow_sparse,
            })
            .await;
        crate::failpoint::failpoint("manifest.after_transaction");
        outcome
    }

    /// Deletes a manifest by digest with its tags (end-9).
    ///
    /// # Errors
    /// [`Error::ManifestUnknown`]; [`Error::ManifestInUse`] when an index of the repository names it; [`Error::Pinned`].
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
                lease: self.0.untagged(repository),
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
                lease: self.0.untagged(repository),
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

    /// Referrers of a digest in a stable order (end-12), at most `limit`, and no more than take `bytes` together (but one
    /// at least); and whether there are more. `after` is the `cursor` of the last one of the page before.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn referrers_page(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        artifact_type: Option<&str>,
        after: Option<i64>,
        limit: usize,
        bytes: usize,
    ) -> Result<(Vec<Referrer>, bool), Error> {
        let db = &self.0.db;
        referrer::list(db, repository, subject, artifact_type, after, limit, bytes).await
    }

    /// The first `limit` referrers after `after`, however long they are.
    ///
    /// # Errors
    /// As [`Store::referrers_page`].
    pub async fn referrers(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        artifact_type: Option<&str>,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Referrer>, Error> {
        self.referrers_page(
            repository,
            subject,
            artifact_type,
            after,
            limit,
            usize::MAX >> 1,
        )
        .await
        .map(|(found, _)| found)
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

    /// As [`Store::events_after`], for whoever must miss none: `None` when some after this position were forgotten, also
    /// while the caller was on its way.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn every_event_after(
        &self,
        after: i64,
        limit: usize,
    ) -> Result<Option<Vec<Event>>, Error> {
        event::every_after(&self.0.db, after, limit).await
    }

    /// Forgets every event, and so many that nobody saw, as a long time does; for the tests of slow readers.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn forget_events(&self, unseen: usize) -> Result<(), Error> {
        self.0.db.write(event::Forget { unseen }).await
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

    /// Totals, counted now: their cost grows with the content. Whoever asks often takes [`Store::recent_statistics`].
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn statistics(&self) -> Result<Statistics, Error> {
        usage::count(&self.0).await
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
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("epoch", &self.0.epoch)
            .finish_non_exhaustive()
    }
}

/// Opens the database with the lock of its directory, where it has one.
async fn open_database(
    location: DatabaseLocation,
    options: &Options,
    context: Context,
) -> Result<(Db, Vec<Directory>), Error> {
    match location {
        DatabaseLocation::Sqlite(root) => {
            blocking(move || {
                let directory = Directory::open(&root)?;
                // A disk that is full must not keep the database from being opened.
                context.gate.look();
                let path = directory::database(&root);
                let db = Db::open_sqlite(&path, directory.fresh, context)?;
                Ok((db, vec![directory]))
            })
            .await
        }
        DatabaseLocation::Postgres(url) => {
            let db = Db::open_postgres(&url, options.database_connections, context).await?;
            Ok((db, Vec::new()))
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Stopped))
}

/// Records what an idle writer wrote and gives its claim back.
async fn end_idle(inner: &Inner, session: Box<Session>) {
    let ended = inner.tasks.spawn_on(session.record(), &inner.runtime).await;
    if let Ok(Err(error)) = ended {
        tracing::debug!(%error, "an idle upload could not be recorded");
    }
}

fn unless_disk(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(error @ (Error::Full | Error::ReadOnly { .. })) => {
            tracing::info!(%error, "what is left of the end is done at the next start");
            Ok(())
        }
        other => other,
    }
}

/// Finds an upload and, where other replicas may write it, claims it in its row. A writer on another replica is waited
/// for, for a while: it is about to end, or its replica is dead.
/// What an upload is claimed for.
#[derive(Clone, Copy)]
enum Purpose {
    Write,
    /// To be cancelled, also in a read-only mode.
    End,
}

async fn claim_row(
    inner: &Arc<Inner>,
    slot: &Arc<Slot>,
    repository: &RepositoryName,
    id: &UploadId,
    purpose: Purpose,
) -> Result<(upload::Open, Option<Arc<RowClaim>>), Error> {
    if !inner.claims.shared() {
        let open = upload::find(&inner.db, repository, id, inner.clock.now()).await?;
        return Ok((open, None));
    }
    let token = random_name()?;
    let met = tokio::time::Instant::now();
    // The claim of another replica, and since when it has been the same.
    let mut watched: Option<(Timestamp, tokio::time::Instant)> = None;
    loop {
        let asked = tokio::time::Instant::now();
        let over = watched.filter(|(_, since)| *since + claim::SPAN <= asked);
        let row = upload::ClaimRow {
            repository: repository.clone(),
            name: id.clone(),
            token: token.clone(),
            span: claim::SPAN,
            over: over.map(|(until, _)| until),
        };
        let claimed = match purpose {
            Purpose::Write => inner.db.write(row).await?,
            Purpose::End => inner.db.write(upload::ClaimToEnd(row)).await?,
        };
        if let Some(open) = claimed {
            let claim = RowClaim::keep(inner, slot, open.id, token, asked);
            return Ok((open, Some(claim)));
        }
        let offset = upload::offset(&inner.db, repository, id, inner.clock.now()).await?;
        // Nothing is written until the claim is free or has been the same for its whole time.
        loop {
            let Some(until) = upload::claimed(&inner.db, repository, id).await? else {
                break;
            };
            let now = tokio::time::Instant::now();
            let since = match watched {
                Some((same, since)) if same == until => since,
                _ => now,
            };
            watched = Some((until, since));
            if since + claim::SPAN <= now {
                break;
            }
            if met + inner.options.claim_wait <= now {
                return Err(Error::UploadBusy { offset });
            }
            tokio::time::sleep(claim::LOOK).await;
        }
    }
}

async fn seal(inner: &Inner) -> Result<(), Error> {
    event::seal(&inner.db, &inner.epoch).await?;
    audit::seal(&inner.db).await
}

/// About a second; replicas that were started together drift apart.
fn between_rounds() -> Duration {
    let mut random = [0; 1];
    let _ = getrandom::fill(&mut random);
    MAINTENANCE + Duration::from_millis(u64::from(random[0]))
}

/// Says now and then that rare work is due.
#[derive(Default)]
struct Rarely(AtomicI64);

impl Rarely {
    fn due(&self, now: Timestamp) -> bool {
        let last = Timestamp(self.0.load(Ordering::Relaxed));
        let due = now >= last.plus(RARELY);
        if due {
            self.0.store(now.0, Ordering::Relaxed);
        }
        due
    }
}

/// The one number of a counting statement.
pub(crate) fn single(rows: &[Row]) -> Result<u64, Error> {
    rows.first().map_or(Ok(0), |row| row.u64(0))
}

const MAINTENANCE: Duration = Duration::from_millis(900);
const RARELY: Duration = Duration::from_hours(1);
