//! What makes a restored database safe to serve from.
//!
//! A restored store has gone back in time. Readers of its events must notice (a new epoch), uploads that it
//! remembers have lost bytes (they are over), and what looks unreferenced may be what somebody is about to name (a new
//! lease for it). Physical deletions wait as well, so that the step can be repeated from the same backup. Doing it twice
//! does no harm.

use std::sync::Arc;
use std::time::Duration;

use crate::audit;
use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::clock::{Timestamp, random_name};
use crate::collect::{self, Kind};
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::identity::{self, Claim, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::model::{Actor, Options};
use crate::sql::{Body, Context, Db, Statement, Tx, WriteKind, statements};

statements! {
    SET_EPOCH = "INSERT INTO meta (key, value) VALUES ('epoch', $1) \
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    END_UPLOADS = "UPDATE upload SET expires_at = $1, claimed_by = NULL, claimed_until = NULL \
                   WHERE id IN (SELECT id FROM upload WHERE expires_at > $1 ORDER BY id LIMIT $2)";
    // Pages of the queue, which is walked in the order of its key.
    PAGE = "SELECT repository_id, target_id FROM collection_queue \
            WHERE kind = $1 AND (repository_id, target_id) > ($2, $3) ORDER BY repository_id, target_id LIMIT $4";
    UPLOADS_DUE = "UPDATE collection_queue SET due_at = $5 WHERE kind = 'upload' AND due_at > $5 \
                   AND (repository_id, target_id) > ($1, $2) AND (repository_id, target_id) <= ($3, $4)";
    LEASE_BLOBS = "UPDATE repository_blob SET lease_until = $5 WHERE lease_until < $5 AND (repository_id, blob_id) IN ( \
                       SELECT q.repository_id, q.target_id FROM collection_queue q WHERE q.kind = 'repository_blob' \
                       AND (q.repository_id, q.target_id) > ($1, $2) AND (q.repository_id, q.target_id) <= ($3, $4))";
    LEASE_MANIFESTS = "UPDATE manifest SET lease_until = $5 WHERE lease_until < $5 AND id IN ( \
                           SELECT q.target_id FROM collection_queue q WHERE q.kind = 'manifest' \
                           AND (q.repository_id, q.target_id) > ($1, $2) AND (q.repository_id, q.target_id) <= ($3, $4))";
    POSTPONE = "UPDATE collection_queue SET due_at = $5 WHERE kind = $6 AND due_at < $5 \
                AND (repository_id, target_id) > ($1, $2) AND (repository_id, target_id) <= ($3, $4)";
    KNOWN = "SELECT storage_key FROM blob WHERE storage_key = $1 \
             UNION ALL SELECT storage_key FROM upload WHERE $1 IN (storage_key, tail_key, next_tail_key) \
             UNION ALL SELECT storage_key FROM deletion WHERE storage_key = $1";
    POSTPONE_DELETIONS = "UPDATE deletion SET due_at = $1 WHERE storage_key IN ( \
                              SELECT storage_key FROM deletion WHERE due_at < $1 ORDER BY due_at LIMIT $2)";
}

/// Marks a restored database, of which `target` tells the audit record. Each step is a transaction of bounded length;
/// the new epoch comes with the last one.
pub(crate) async fn restored(
    db: &Db,
    now: Timestamp,
    lease: Duration,
    epoch: String,
    target: String,
) -> Result<Adopted, Error> {
    let until = now.plus(lease);
    let uploads = repeat(db, &END_UPLOADS, now).await?;
    let mut leases = 0;
    for kind in Kind::ALL {
        let to = if kind == Kind::Upload { now } else { until };
        let mut after = Some((i64::MIN, i64::MIN));
        while let Some(from) = after {
            let page = Page {
                kind,
                after: from,
                to,
            };
            let (changed, last) = db.write(page).await?;
            leases += changed;
            after = last;
        }
    }
    repeat(db, &POSTPONE_DELETIONS, until).await?;
    let actor = actor();
    db.write(Mark {
        epoch: epoch.clone(),
        actor,
        target,
    })
    .await?;
    Ok(Adopted {
        epoch,
        uploads,
        leases,
        unknown: 0,
    })
}

/// Runs a statement that changes some rows until there are none; how many it changed.
async fn repeat(db: &Db, statement: &'static Statement, time: Timestamp) -> Result<u64, Error> {
    let mut changed = 0;
    loop {
        match db.write(Few { statement, time }).await? {
            0 => return Ok(changed),
            some => changed += some,
        }
    }
}

struct Few {
    statement: &'static Statement,
    time: Timestamp,
}

impl Body for Few {
    type Output = u64;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<u64, Error> {
        tx.execute(self.statement, &[self.time.into(), BATCH.into()])
            .await
    }
}

/// Candidates of the queue after one of them: what they may take gets a lease, and they come later.
struct Page {
    kind: Kind,
    after: (i64, i64),
    to: Timestamp,
}

impl Body for Page {
    /// How many leases there were, and the last candidate, when more may follow.
    type Output = (u64, Option<(i64, i64)>);
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Self::Output, Error> {
        let (repository, target) = self.after;
        let kind = self.kind.name();
        let page = [kind.into(), repository.into(), target.into(), BATCH.into()];
        let rows = tx.query(&PAGE, &page).await?;
        let Some(last) = rows.last() else {
            return Ok((0, None));
        };
        let last = (last.i64(0)?, last.i64(1)?);
        let range = [
            repository.into(),
            target.into(),
            last.0.into(),
            last.1.into(),
            self.to.into(),
        ];
        let leases = match self.kind {
            Kind::Upload => {
                tx.execute(&UPLOADS_DUE, &range).await?;
                0
            }
            Kind::RepositoryBlob => tx.execute(&LEASE_BLOBS, &range).await?,
            Kind::Manifest => tx.execute(&LEASE_MANIFESTS, &range).await?,
            Kind::Repository | Kind::Blob => 0,
        };
        if self.kind != Kind::Upload {
            let range = [&range[..], &[kind.into()]].concat();
            tx.execute(&POSTPONE, &range).await?;
        }
        Ok((leases, (rows.len() == BATCH).then_some(last)))
    }
}

struct Mark {
    epoch: String,
    actor: Actor,
    target: String,
}

/// What an adoption changed.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// The new epoch of the events.
    pub epoch: String,
    /// Uploads that were ended.
    pub uploads: u64,
    /// Blobs and manifests that may be unreferenced and got a new lease.
    pub leases: u64,
    /// Objects that the database does not know: they came after the moment that was restored.
    pub unknown: u64,
}

/// How a database is adopted.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdoptOptions {
    /// Although other programs are connected to it.
    pub force: bool,
    /// Objects that the database does not know are deleted after a lease. Without it they are only counted.
    pub discard_unknown: bool,
}

impl Body for Mark {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&SET_EPOCH, &[(&self.epoch).into()]).await?;
        audit::allowed(tx, &self.actor, "restore", self.target.clone()).await
    }
}

/// Marks a database that was restored with PostgreSQL's own tools, while no replica runs on it. May be repeated.
///
/// # Errors
/// [`Error::Unavailable`] when programs are connected to the database, unless forced; as [`crate::Store::open_at`].
pub async fn adopt(
    location: &Location,
    options: Options,
    how: AdoptOptions,
) -> Result<Adopted, Error> {
    if let DatabaseLocation::Postgres(url) = &location.database
        && !how.force
    {
        let others = Db::others_on_postgres(url).await?;
        if others > 0 {
            return Err(Error::Unavailable {
                what: "the restored database",
                problem: format!(
                    "{others} other connections use it; stop all replicas first, or use `--force` when \
                     the connections are not those of replicas"
                ),
            });
        }
    }
    let (objects, _objects_lock) = match &location.objects {
        ObjectLocation::Directory(root) => {
            let files = FileSystem::open(directory::objects(root));
            let objects = Objects::Directory(Arc::new(files));
            let embedded =
                matches!(&location.database, DatabaseLocation::Sqlite(data) if data == root);
            let lock = if embedded {
                None
            } else {
                Some(Directory::open_objects(root)?)
            };
            (objects, lock)
        }
        ObjectLocation::S3(bucket) => (Objects::S3(S3::connect(bucket).await?), None),
    };
    let context = Context::new();
    let now = context.clock.now();
    // Not the whole store: one that runs ends itself when it sees another epoch.
    let (db, _lock) = match &location.database {
        DatabaseLocation::Sqlite(data) => {
            let lock = Directory::open_existing(data)?;
            let path = directory::database(data);
            (Db::open_sqlite(&path, false, context)?, Some(lock))
        }
        DatabaseLocation::Postgres(url) => {
            let connections = options.database_connections;
            (Db::open_postgres(url, connections, context).await?, None)
        }
    };
    let place = Place::new(location, &objects);
    let adopted = match identity::claim(&db, &place, Claim::Adopt).await {
        Ok(_) => mark(&db, &objects, now, options.lease, how.discard_unknown).await,
        Err(refused) => Err(refused),
    };
    db.close().await?;
    adopted
}

async fn mark(
    db: &Db,
    objects: &Objects,
    now: Timestamp,
    lease: Duration,
    discard: bool,
) -> Result<Adopted, Error> {
    let target = "database".to_owned();
    let mut adopted = restored(db, now, lease, random_name()?, target).await?;
    let listed = objects.list().await?;
    let keys: Vec<StorageKey> = listed.into_iter().filter_map(|(_, key)| key).collect();
    for keys in keys.chunks(BATCH) {
        let keys = keys.into();
        adopted.unknown += db
            .write(Unknown {
                keys,
                discard,
                lease,
            })
            .await?;
    }
    Ok(adopted)
}

/// Looks which of these objects are in no row, and puts them into the outbox when they shall go.
struct Unknown {
    keys: Arc<[StorageKey]>,
    discard: bool,
    lease: Duration,
}

impl Body for Unknown {
    type Output = u64;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<u64, Error> {
        let until = tx.now().plus(self.lease);
        let mut unknown = 0;
        for key in self.keys.iter() {
            if tx
                .query_opt(&KNOWN, &[key.as_str().into()])
                .await?
                .is_none()
            {
                unknown += 1;
                if self.discard {
                    collect::discard(tx, key.as_str(), until).await?;
                }
            }
        }
        Ok(unknown)
    }
}

/// Whoever runs the command line on the server's machine.
pub(crate) fn actor() -> Actor {
    Actor {
        principal: "operator".to_owned(),
        request: String::new(),
        address: String::new(),
    }
}

/// Rows that one transaction changes, and objects that it looks for.
const BATCH: usize = 500;
