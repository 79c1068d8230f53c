//! What makes a restored database safe to serve from.
//!
//! A restored store has gone back in time. Readers of its events must notice (a new epoch), uploads that it
//! remembers have lost bytes (they are over), and what looks unreferenced may be what somebody is about to name (a new
//! lease for it). Physical deletions wait as well, so that the step can be repeated from the same backup. Doing it twice
//! does no harm.

use std::sync::Arc;
use std::time::Duration;

use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::clock::random_name;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::identity::{self, Claim, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::model::{Actor, Options};
use crate::sql::{Body, Context, Db, Tx, WriteKind, statements};
use crate::{audit, collect};

statements! {
    SET_EPOCH = "INSERT INTO meta (key, value) VALUES ('epoch', $1) \
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    END_UPLOADS = "UPDATE upload SET expires_at = $1, claimed_by = NULL, claimed_until = NULL \
                   WHERE expires_at > $1";
    UPLOADS_DUE = "UPDATE collection_queue SET due_at = $1 WHERE kind = 'upload' AND due_at > $1";
    LEASE_BLOBS = "UPDATE repository_blob SET lease_until = $1 WHERE lease_until < $1 AND EXISTS ( \
                       SELECT 1 FROM collection_queue q WHERE q.kind = 'repository_blob' \
                       AND q.repository_id = repository_blob.repository_id \
                       AND q.target_id = repository_blob.blob_id)";
    LEASE_MANIFESTS = "UPDATE manifest SET lease_until = $1 WHERE lease_until < $1 AND EXISTS ( \
                           SELECT 1 FROM collection_queue q WHERE q.kind = 'manifest' \
                           AND q.repository_id = manifest.repository_id AND q.target_id = manifest.id)";
    POSTPONE = "UPDATE collection_queue SET due_at = $1 WHERE kind <> 'upload' AND due_at < $1";
    KNOWN = "SELECT storage_key FROM blob WHERE storage_key = $1 \
             UNION ALL SELECT storage_key FROM upload WHERE $1 IN (storage_key, tail_key, next_tail_key) \
             UNION ALL SELECT storage_key FROM deletion WHERE storage_key = $1";
    POSTPONE_DELETIONS = "UPDATE deletion SET due_at = $1 WHERE due_at < $1";
}

/// Marks a restored database.
pub(crate) struct Adopt {
    pub(crate) epoch: String,
    pub(crate) lease: Duration,
    pub(crate) actor: Actor,
    /// What was restored, for the audit record.
    pub(crate) target: String,
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

impl Body for Adopt {
    type Output = Adopted;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Adopted, Error> {
        let now = tx.now();
        let until = now.plus(self.lease);
        tx.execute(&SET_EPOCH, &[(&self.epoch).into()]).await?;
        let uploads = tx.execute(&END_UPLOADS, &[now.into()]).await?;
        tx.execute(&UPLOADS_DUE, &[now.into()]).await?;
        let blobs = tx.execute(&LEASE_BLOBS, &[until.into()]).await?;
        let manifests = tx.execute(&LEASE_MANIFESTS, &[until.into()]).await?;
        tx.execute(&POSTPONE, &[until.into()]).await?;
        tx.execute(&POSTPONE_DELETIONS, &[until.into()]).await?;
        audit::allowed(tx, &self.actor, "restore", self.target.clone()).await?;
        Ok(Adopted {
            epoch: self.epoch.clone(),
            uploads,
            leases: blobs + manifests,
            unknown: 0,
        })
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
    // Not the whole store: one that runs ends itself when it sees another epoch.
    let (db, _lock) = match &location.database {
        DatabaseLocation::Sqlite(data) => {
            let lock = Directory::open_existing(data)?;
            let path = directory::database(data);
            (Db::open_sqlite(&path, false, Context::new())?, Some(lock))
        }
        DatabaseLocation::Postgres(url) => {
            let connections = options.database_connections;
            (
                Db::open_postgres(url, connections, Context::new()).await?,
                None,
            )
        }
    };
    let place = Place::new(location, &objects);
    let adopted = match identity::claim(&db, &place, Claim::Adopt).await {
        Ok(_) => mark(&db, &objects, options.lease, how.discard_unknown).await,
        Err(refused) => Err(refused),
    };
    db.close().await?;
    adopted
}

async fn mark(
    db: &Db,
    objects: &Objects,
    lease: Duration,
    discard: bool,
) -> Result<Adopted, Error> {
    let mut adopted = db
        .write(Adopt {
            epoch: random_name()?,
            lease,
            actor: actor(),
            target: "database".to_owned(),
        })
        .await?;
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

/// Objects that one transaction looks for.
const BATCH: usize = 500;
