//! Usage per namespace and repository: append-only deltas with folded totals, so that no push waits for a shared row
//! (`I17`), and the quota that is checked against them.
//!
//! What counts is logical: the bytes of each repository's distinct blobs and of its manifests. The check reads what was
//! committed and takes no lock, so requests that are in flight together may pass a quota together; what they add is the
//! most by which it is exceeded.
//!
//! What is stored, distinct blobs and manifests over all repositories, is counted now and then ([`Figures`]), so that
//! nobody's change has to keep a total; so is what repositories share ([`Sharing`]).

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use oci::RepositoryName;
use tokio::time::Instant;

use crate::clock::Timestamp;
use crate::error::Error;
use crate::model::{Actor, Statistics};
use crate::repository::{self, Place};
use crate::sql::{Body, Db, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};
use crate::{attempt, audit, blob, collect, pin, pull, tag, upload};

mod sharing;

pub(crate) use sharing::STATEMENTS as SHARING_STATEMENTS;
pub(crate) use sharing::Sharing;
pub use sharing::StoredUsage;

statements! {
    ADD = "INSERT INTO usage_delta (id, namespace_id, repository_id, bytes, objects, at) \
           VALUES ($1, $2, $3, $4, $5, $6)";
    QUOTA = "SELECT quota, name FROM namespace WHERE id = $1";
    FIND_QUOTA = "SELECT quota, id FROM namespace WHERE name = $1";
    SET_QUOTA = "UPDATE namespace SET quota = $2 WHERE id = $1";
    USED = "SELECT CAST(COALESCE((SELECT t.bytes FROM usage_total t WHERE t.namespace_id = $1), 0) \
                + COALESCE((SELECT SUM(d.bytes) FROM usage_delta d WHERE d.namespace_id = $1), 0) AS BIGINT) AS bytes";
    TAKE = "DELETE FROM usage_delta WHERE id IN (SELECT id FROM usage_delta ORDER BY id LIMIT 1000) \
            RETURNING namespace_id, repository_id, bytes, objects";
    FOLD = "INSERT INTO usage_total (namespace_id, bytes, objects, folded_at) VALUES ($1, $2, $3, $4) \
            ON CONFLICT (namespace_id) DO UPDATE SET bytes = usage_total.bytes + excluded.bytes, \
                objects = usage_total.objects + excluded.objects, folded_at = excluded.folded_at";
    FOLD_REPOSITORY = "INSERT INTO repository_total (repository_id, namespace_id, bytes, objects, folded_at) \
                       VALUES ($1, $2, $3, $4, $5) \
                       ON CONFLICT (repository_id) DO UPDATE SET bytes = repository_total.bytes + excluded.bytes, \
                           objects = repository_total.objects + excluded.objects, folded_at = excluded.folded_at \
                       RETURNING objects";
    FORGET_EMPTY = "DELETE FROM repository_total WHERE repository_id = $1 AND bytes = 0 AND objects = 0";
    TOTAL = "SELECT CAST(COALESCE((SELECT t.bytes FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                 + COALESCE((SELECT SUM(d.bytes) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS bytes, \
                 CAST(COALESCE((SELECT t.objects FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                 + COALESCE((SELECT SUM(d.objects) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS objects \
             FROM namespace n WHERE n.name = $1";
    LOGICAL = "SELECT CAST(COALESCE(SUM(c.bytes), 0) AS BIGINT) AS bytes, \
                   CAST(COALESCE(SUM(c.objects), 0) AS BIGINT) AS objects FROM ( \
                   SELECT bytes, objects FROM usage_total UNION ALL SELECT bytes, objects FROM usage_delta) c";
    NAMESPACES = "SELECT n.name, n.quota, CAST(COALESCE(t.bytes, 0) + COALESCE(d.bytes, 0) AS BIGINT) AS bytes, \
                      CAST(COALESCE(t.objects, 0) + COALESCE(d.objects, 0) AS BIGINT) AS objects, n.id \
                  FROM namespace n LEFT JOIN usage_total t ON t.namespace_id = n.id \
                  LEFT JOIN (SELECT namespace_id, SUM(bytes) AS bytes, SUM(objects) AS objects \
                             FROM usage_delta GROUP BY namespace_id) d ON d.namespace_id = n.id \
                  WHERE n.name > $1 ORDER BY n.name LIMIT $2";
    LARGEST_NAMESPACES = "SELECT n.name, n.quota, t.bytes, t.objects, n.id FROM usage_total t \
                          JOIN namespace n ON n.id = t.namespace_id \
                          WHERE t.bytes < $1 OR (t.bytes = $1 AND n.name > $2) \
                          ORDER BY t.bytes DESC, n.name LIMIT $3";
    NAMESPACE = "SELECT n.name, n.quota, CAST(COALESCE((SELECT t.bytes FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                     + COALESCE((SELECT SUM(d.bytes) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS bytes, \
                     CAST(COALESCE((SELECT t.objects FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                     + COALESCE((SELECT SUM(d.objects) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS objects, n.id \
                 FROM namespace n WHERE n.name = $1";
    REPOSITORIES = "SELECT r.name, t.bytes, t.objects, t.folded_at, r.id FROM repository r \
                    JOIN repository_total t ON t.repository_id = r.id \
                    WHERE r.name > $1 AND r.deleted_at IS NULL ORDER BY r.name LIMIT $2";
    REPOSITORIES_OF = "SELECT r.name, t.bytes, t.objects, t.folded_at, r.id FROM repository r \
                       JOIN repository_total t ON t.repository_id = r.id JOIN namespace n ON n.id = r.namespace_id \
                       WHERE r.name > $1 AND r.name < $3 AND n.name = $4 AND r.deleted_at IS NULL \
                       ORDER BY r.name LIMIT $2";
    LARGEST = "SELECT r.name, t.bytes, t.objects, t.folded_at, r.id FROM repository_total t \
               JOIN repository r ON r.id = t.repository_id \
               WHERE (t.bytes, t.repository_id) < ($1, $2) AND r.deleted_at IS NULL \
               ORDER BY t.bytes DESC, t.repository_id DESC LIMIT $3";
    LARGEST_OF = "SELECT r.name, t.bytes, t.objects, t.folded_at, r.id FROM repository_total t \
                  JOIN repository r ON r.id = t.repository_id \
                  WHERE t.namespace_id = (SELECT n.id FROM namespace n WHERE n.name = $4) \
                      AND (t.bytes, t.repository_id) < ($1, $2) AND r.deleted_at IS NULL \
                  ORDER BY t.bytes DESC, t.repository_id DESC LIMIT $3";
    MARK_RECOUNT = "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    MARK_ALL = "INSERT INTO meta (key, value) SELECT 'usage.recount.' || n.id, '' FROM namespace n WHERE true \
                ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    MARKED = "SELECT key, value FROM meta WHERE key > 'usage.recount.' AND key < 'usage.recount/' ORDER BY key LIMIT 1";
    UNMARK = "DELETE FROM meta WHERE key = $1";
    NEXT_REPOSITORY = "SELECT id, name FROM repository WHERE namespace_id = $1 AND name > $2 ORDER BY name LIMIT 1";
    HOLD_TOTAL = "INSERT INTO repository_total (repository_id, namespace_id, bytes, objects, folded_at) \
                  VALUES ($1, $2, 0, 0, $3) ON CONFLICT (repository_id) DO UPDATE SET folded_at = excluded.folded_at";
    TRUTH = "SELECT CAST(COALESCE(SUM(c.bytes), 0) AS BIGINT) AS bytes, \
                 CAST(COALESCE(SUM(c.objects), 0) AS BIGINT) AS objects, \
                 CAST(COALESCE(SUM(c.waiting_bytes), 0) AS BIGINT) AS waiting_bytes, \
                 CAST(COALESCE(SUM(c.waiting_objects), 0) AS BIGINT) AS waiting_objects FROM ( \
                 SELECT SUM(m.size) AS bytes, COUNT(*) AS objects, 0 AS waiting_bytes, 0 AS waiting_objects \
                     FROM manifest m WHERE m.repository_id = $1 \
                 UNION ALL SELECT SUM(b.size), COUNT(*), 0, 0 FROM repository_blob rb \
                     JOIN blob b ON b.id = rb.blob_id WHERE rb.repository_id = $1 \
                 UNION ALL SELECT 0, 0, SUM(d.bytes), SUM(d.objects) FROM usage_delta d WHERE d.repository_id = $1) c";
    CORRECT = "UPDATE repository_total SET bytes = $2, objects = $3 WHERE repository_id = $1 \
               AND (bytes <> $2 OR objects <> $3)";
    CHECK_REPOSITORIES = "SELECT r.id, r.name, r.namespace_id, COALESCE(t.bytes, 0) AS bytes, \
                              COALESCE(t.objects, 0) AS objects \
                          FROM repository r LEFT JOIN repository_total t ON t.repository_id = r.id \
                          WHERE r.id > $1 ORDER BY r.id LIMIT 64";
    CHECK_NAMESPACES = "SELECT n.id, n.name FROM namespace n WHERE n.id > $1 ORDER BY n.id LIMIT 64";
    REPOSITORY_COUNT = "SELECT COUNT(*) FROM repository WHERE deleted_at IS NULL";
    MANIFESTS = "SELECT COUNT(*) AS manifests, CAST(COALESCE(SUM(size), 0) AS BIGINT) AS bytes FROM manifest";
    WAITING = "SELECT COUNT(*) AS blobs, CAST(COALESCE(SUM(b.size), 0) AS BIGINT) AS bytes \
               FROM collection_queue q JOIN blob b ON b.id = q.target_id WHERE q.kind = 'blob' \
                   AND NOT EXISTS (SELECT 1 FROM repository_blob rb WHERE rb.blob_id = b.id)";
}

/// Notes a change of what a repository uses. What adds bytes must fit the quota of the namespace.
pub(crate) async fn add(tx: &mut Tx, place: Place, bytes: i64, objects: i64) -> Result<(), Error> {
    if bytes > 0 {
        admit(tx, place, bytes).await?;
    }
    let (id, now) = (tx.id(), tx.now());
    tx.execute(
        &ADD,
        &[
            id.into(),
            place.namespace.into(),
            place.repository.into(),
            bytes.into(),
            objects.into(),
            now.into(),
        ],
    )
    .await
    .map(drop)
}

/// Refuses bytes beyond the quota of the namespace. Where there is none, one row is read by its key.
async fn admit(tx: &mut Tx, place: Place, bytes: i64) -> Result<(), Error> {
    let default = tx.default_quota();
    let Some(row) = tx.query_opt(&QUOTA, &[place.namespace.into()]).await? else {
        return Ok(());
    };
    let Some(quota) = row.opt_i64(0)?.or(default) else {
        return Ok(());
    };
    let used = tx
        .query_opt(&USED, &[place.namespace.into()])
        .await?
        .map_or(Ok(0), |row| row.i64(0))?;
    if used.saturating_add(bytes) <= quota {
        return Ok(());
    }
    Err(exceeded(row.text(1)?, quota, used))
}

fn exceeded(namespace: String, quota: i64, used: i64) -> Error {
    let count = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
    Error::QuotaExceeded {
        namespace,
        quota: count(quota),
        used: count(used),
    }
}

/// Bytes and objects of a namespace: what was folded and what was not yet.
pub(crate) async fn total(db: &Db, namespace: &str) -> Result<(i64, i64), Error> {
    let rows = db.read(&TOTAL, &[namespace.into()]).await?;
    rows.first()
        .map_or(Ok((0, 0)), |row| Ok((row.i64(0)?, row.i64(1)?)))
}

/// What a namespace uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceUsage {
    /// The first component of its repositories' names.
    pub name: String,
    /// Logical bytes.
    pub bytes: u64,
    /// Blobs and manifests, counted in each repository.
    pub objects: u64,
    /// Its own quota in bytes; `None`: the default of the configuration.
    pub quota: Option<u64>,
    /// What it has of the disk; `None` while [`Store::refresh_sharing`] has not counted it.
    pub stored: Option<StoredUsage>,
}

/// What a repository uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryUsage {
    /// The repository.
    pub name: RepositoryName,
    /// Logical bytes: its distinct blobs and its manifests.
    pub bytes: u64,
    /// Blobs and manifests.
    pub objects: u64,
    /// When this was so.
    pub at: Timestamp,
    /// Where the next page by size begins.
    pub position: i64,
    /// What it has of the disk; `None` while [`Store::refresh_sharing`] has not counted it.
    pub stored: Option<StoredUsage>,
}

/// How a list of usage is sorted, and after what it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageOrder {
    /// By name, after this one.
    Name(String),
    /// The largest first, after this size and position ([`RepositoryUsage::position`]; for namespaces the name).
    Size(Option<(u64, String)>),
}

impl Store {
    /// Refuses early what could not be committed: the namespace of `repository` is at its quota.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`].
    pub async fn admit(&self, repository: &RepositoryName) -> Result<(), Error> {
        let inner = &self.0;
        let namespace = repository.namespace();
        let rows = inner.db.read(&FIND_QUOTA, &[namespace.into()]).await?;
        let Some(row) = rows.first() else {
            return Ok(());
        };
        let default = inner.options.quota.map(signed);
        let Some(quota) = row.opt_i64(0)?.or(default) else {
            return Ok(());
        };
        let rows = inner.db.read(&USED, &[row.i64(1)?.into()]).await?;
        let used = rows.first().map_or(Ok(0), |row| row.i64(0))?;
        if used < quota {
            Ok(())
        } else {
            Err(exceeded(namespace.to_owned(), quota, used))
        }
    }

    /// Bytes that a namespace without a quota of its own may use; `None`: no limit.
    pub fn default_quota(&self) -> Option<u64> {
        self.0.options.quota
    }

    /// Sets the quota of a namespace in bytes, which need not have content yet; `None` gives it the default. Content that is
    /// there stays.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn set_quota(
        &self,
        namespace: &str,
        quota: Option<u64>,
        actor: &Actor,
    ) -> Result<(), Error> {
        self.0
            .db
            .write(SetQuota {
                namespace: namespace.to_owned(),
                quota,
                actor: actor.clone(),
            })
            .await
    }

    /// What one namespace uses; `None` when nobody pushed to it.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn usage_of_namespace(
        &self,
        namespace: &str,
    ) -> Result<Option<NamespaceUsage>, Error> {
        let rows = self.0.db.read(&NAMESPACE, &[namespace.into()]).await?;
        let sharing = self.0.sharing.figures();
        rows.first()
            .map(|row| namespace_usage(row, &sharing))
            .transpose()
    }

    /// What namespaces use. By size it is told as of the last fold, a moment ago, and leaves out those without content.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn usage_of_namespaces(
        &self,
        order: &UsageOrder,
        limit: usize,
    ) -> Result<Vec<NamespaceUsage>, Error> {
        let db = &self.0.db;
        let rows = match order {
            UsageOrder::Name(last) => {
                db.scan(&NAMESPACES, vec![last.into(), limit.into()])
                    .await?
            }
            UsageOrder::Size(last) => {
                let (bytes, name) = last.clone().unwrap_or((u64::MAX, String::new()));
                let values = vec![bytes.into(), name.into(), limit.into()];
                db.scan(&LARGEST_NAMESPACES, values).await?
            }
        };
        let sharing = self.0.sharing.figures();
        rows.iter()
            .map(|row| namespace_usage(row, &sharing))
            .collect()
    }

    /// What repositories use, of one namespace or of all, as of the last fold, a moment ago. Empty ones are left out.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn usage_of_repositories(
        &self,
        namespace: Option<&str>,
        order: &UsageOrder,
        limit: usize,
    ) -> Result<Vec<RepositoryUsage>, Error> {
        let db = &self.0.db;
        let rows = match (order, namespace) {
            (UsageOrder::Name(last), None) => {
                db.scan(&REPOSITORIES, vec![last.into(), limit.into()])
                    .await?
            }
            (UsageOrder::Name(last), Some(namespace)) => {
                // The names of a namespace lie between its own and the first byte after the slash.
                let values = vec![
                    last.into(),
                    limit.into(),
                    format!("{namespace}0").into(),
                    namespace.into(),
                ];
                db.scan(&REPOSITORIES_OF, values).await?
            }
            (UsageOrder::Size(last), namespace) => {
                let (bytes, position) = last
                    .as_ref()
                    .map_or((i64::MAX, i64::MAX), |(bytes, position)| {
                        (signed(*bytes), position.parse().unwrap_or(i64::MAX))
                    });
                let mut values = vec![bytes.into(), position.into(), limit.into()];
                match namespace {
                    None => db.scan(&LARGEST, values).await?,
                    Some(namespace) => {
                        values.push(namespace.into());
                        db.scan(&LARGEST_OF, values).await?
                    }
                }
            }
        };
        let sharing = self.0.sharing.figures();
        rows.iter()
            .map(|row| {
                let (bytes, id) = (row.u64(1)?, row.i64(4)?);
                Ok(RepositoryUsage {
                    name: row.parse(0)?,
                    bytes,
                    objects: row.u64(2)?,
                    at: row.time(3)?,
                    position: id,
                    stored: sharing.of_repository(id, bytes),
                })
            })
            .collect()
    }

    /// [`Store::statistics`] as they were counted a while ago, for those who ask often: counting them may take no more
    /// than a hundredth of the time. They tell how old they are.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn recent_statistics(&self) -> Result<Statistics, Error> {
        let inner = &self.0;
        if let Some((known, quick)) = inner.figures.known() {
            if known.age < inner.figures.lifetime() {
                return Ok(known);
            }
            if !quick {
                let store = self.clone();
                if let Some(turn) = inner.figures.turn.take() {
                    inner.tasks.spawn_on(
                        async move {
                            let _turn = turn;
                            if let Err(error) = count(&store.0).await {
                                tracing::warn!(%error, "what is stored could not be counted");
                            }
                        },
                        &inner.runtime,
                    );
                }
                return Ok(known);
            }
        }
        count(inner).await
    }

    /// What [`Store::recent_statistics`] last said, without asking the database; `None` before it said something.
    pub fn last_statistics(&self) -> Option<Statistics> {
        self.0.figures.known().map(|(known, _)| known)
    }

    /// Counts every repository's rows anew and sets its total, for tests.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn recount_usage(&self) -> Result<(), Error> {
        let inner = &self.0;
        inner.db.write(MarkAll).await?;
        while inner.db.write(Recount).await? {}
        Ok(())
    }

    /// Adds to a repository's folded total what is not there, so that tests see it found and corrected.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn falsify_usage(&self, repository: &RepositoryName) -> Result<(), Error> {
        self.0.db.write(Falsify(repository.clone())).await
    }
}

fn namespace_usage(row: &Row, sharing: &sharing::Figures) -> Result<NamespaceUsage, Error> {
    // A total that is off for a moment is shown as nothing, not as an error.
    let bytes = u64::try_from(row.i64(2)?).unwrap_or(0);
    Ok(NamespaceUsage {
        name: row.text(0)?,
        quota: row
            .opt_i64(1)?
            .map(|quota| u64::try_from(quota).unwrap_or(0)),
        bytes,
        objects: u64::try_from(row.i64(3)?).unwrap_or(0),
        stored: sharing.of_namespace(row.i64(4)?, bytes),
    })
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

struct SetQuota {
    namespace: String,
    quota: Option<u64>,
    actor: Actor,
}

impl Body for SetQuota {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let namespace = repository::ensure_namespace(tx, &self.namespace).await?;
        tx.execute(&SET_QUOTA, &[namespace.into(), self.quota.into()])
            .await?;
        let target = match self.quota {
            Some(quota) => format!("{} {quota}", self.namespace),
            None => format!("{} default", self.namespace),
        };
        audit::allowed(tx, &self.actor, "quota.set", target).await
    }
}

/// The work of this room and of those that report, once a second.
pub(crate) async fn maintain(inner: &Inner) -> Result<(), Error> {
    while inner.db.write(Fold).await? {}
    let now = inner.clock.now();
    if inner.recounting.is_due(now) && !inner.db.read(&MARKED, &[]).await?.is_empty() {
        while inner.db.write(Recount).await? {}
        // Old programs may mark namespaces for as long as they run beside us.
        inner.recounting.done(now, RECOUNT_EVERY);
    }
    pin::expire(inner).await?;
    pull::flush_when_due(inner).await?;
    attempt::prune(inner).await
}

/// Folds deltas into totals; `true` when there was something to fold.
pub(crate) struct Fold;

impl Body for Fold {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        // In one order, so that replicas that fold at once never wait for each other in a circle.
        let mut namespaces = std::collections::BTreeMap::<i64, (i64, i64)>::new();
        let mut repositories = std::collections::BTreeMap::<i64, (i64, i64, i64)>::new();
        let mut unknown = std::collections::BTreeSet::new();
        for row in tx.query(&TAKE, &[]).await? {
            let (namespace, bytes, objects) = (row.i64(0)?, row.i64(2)?, row.i64(3)?);
            let sum = namespaces.entry(namespace).or_default();
            sum.0 += bytes;
            sum.1 += objects;
            if let Some(repository) = row.opt_i64(1)? {
                let sum = repositories.entry(repository).or_insert((namespace, 0, 0));
                sum.1 += bytes;
                sum.2 += objects;
            } else {
                unknown.insert(namespace);
            }
        }
        let now = tx.now();
        for (namespace, (bytes, objects)) in &namespaces {
            let values = [
                (*namespace).into(),
                (*bytes).into(),
                (*objects).into(),
                now.into(),
            ];
            tx.execute(&FOLD, &values).await?;
        }
        for (repository, (namespace, bytes, objects)) in &repositories {
            let values = [
                (*repository).into(),
                (*namespace).into(),
                (*bytes).into(),
                (*objects).into(),
                now.into(),
            ];
            let left = tx.query_opt(&FOLD_REPOSITORY, &values).await?;
            if left.map_or(Ok(0), |row| row.i64(0))? == 0 {
                tx.execute(&FORGET_EMPTY, &[(*repository).into()]).await?;
            }
        }
        // A program of before schema 2 wrote these beside us: which repository they are of is found by counting.
        for namespace in &unknown {
            mark(tx, *namespace, "").await?;
        }
        Ok(!namespaces.is_empty())
    }
}

async fn mark(tx: &mut Tx, namespace: i64, last: &str) -> Result<(), Error> {
    let key = format!("{RECOUNT}{namespace}");
    tx.execute(&MARK_RECOUNT, &[key.into(), last.into()])
        .await
        .map(drop)
}

struct MarkAll;

impl Body for MarkAll {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&MARK_ALL, &[]).await.map(drop)
    }
}

struct Falsify(RepositoryName);

impl Body for Falsify {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let Some(place) = repository::look_up(tx, &self.0).await? else {
            return Ok(());
        };
        let now = tx.now();
        let values = [
            place.repository.into(),
            place.namespace.into(),
            1000_i64.into(),
            1_i64.into(),
            now.into(),
        ];
        tx.query_opt(&FOLD_REPOSITORY, &values).await.map(drop)
    }
}

/// Counts the rows of the next repository of a namespace that was marked; `true` when there is more to do.
///
/// The row of the total is locked before the rows are counted. A fold that took deltas and has not ended is then either
/// waited for or not seen: its deltas are still there, are left out here, and are added when it goes on.
struct Recount;

impl Body for Recount {
    type Output = bool;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let Some(row) = tx.query_opt(&MARKED, &[]).await? else {
            return Ok(false);
        };
        let (key, last) = (row.text(0)?, row.text(1)?);
        let Some(namespace) = key
            .strip_prefix(RECOUNT)
            .and_then(|id| id.parse::<i64>().ok())
        else {
            tx.execute(&UNMARK, &[key.into()]).await?;
            return Ok(true);
        };
        let next = tx
            .query_opt(&NEXT_REPOSITORY, &[namespace.into(), last.into()])
            .await?;
        let Some(next) = next else {
            tx.execute(&UNMARK, &[key.into()]).await?;
            return Ok(true);
        };
        let (repository, name, now) = (next.i64(0)?, next.text(1)?, tx.now());
        tx.execute(
            &HOLD_TOTAL,
            &[repository.into(), namespace.into(), now.into()],
        )
        .await?;
        let (bytes, objects, waiting) = truth(tx, repository).await?;
        let corrected = tx
            .execute(
                &CORRECT,
                &[
                    repository.into(),
                    (bytes - waiting.0).into(),
                    (objects - waiting.1).into(),
                ],
            )
            .await?;
        if corrected > 0 {
            tracing::info!(
                repository = name,
                bytes,
                objects,
                "the total of a repository was corrected"
            );
        }
        tx.execute(&FORGET_EMPTY, &[repository.into()]).await?;
        mark(tx, namespace, &name).await?;
        Ok(true)
    }
}

/// Bytes and objects of a repository by its rows, and what of them is not folded yet.
async fn truth(tx: &mut Tx, repository: i64) -> Result<(i64, i64, (i64, i64)), Error> {
    let row = tx
        .query_opt(&TRUTH, &[repository.into()])
        .await?
        .ok_or_else(|| Error::Database("a sum vanished".to_owned()))?;
    Ok((row.i64(0)?, row.i64(1)?, (row.i64(2)?, row.i64(3)?)))
}

/// Compares every total with the rows that it stands for; one sentence for each that is off.
pub(crate) async fn check(tx: &mut Tx, problems: &mut Vec<String>) -> Result<(), Error> {
    let mut sums = std::collections::BTreeMap::<i64, (i64, i64)>::new();
    // Repositories that are counted again by themselves may be off until then.
    let recounting = !tx.query(&MARKED, &[]).await?.is_empty();
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&CHECK_REPOSITORIES, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            let (bytes, objects, waiting) = truth(tx, last).await?;
            let sum = sums.entry(row.i64(2)?).or_default();
            sum.0 += bytes;
            sum.1 += objects;
            let told = (row.i64(3)? + waiting.0, row.i64(4)? + waiting.1);
            if told != (bytes, objects) && !recounting {
                problems.push(off("repository", &row.text(1)?, told, (bytes, objects)));
            }
        }
        if rows.is_empty() {
            break;
        }
    }
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&CHECK_NAMESPACES, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            let name = row.text(1)?;
            let told = tx
                .query_opt(&TOTAL, &[(&name).into()])
                .await?
                .map_or(Ok((0, 0)), |row| Ok::<_, Error>((row.i64(0)?, row.i64(1)?)))?;
            let found = sums.get(&last).copied().unwrap_or_default();
            if told != found {
                problems.push(off("namespace", &name, told, found));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

fn off(what: &str, name: &str, told: (i64, i64), found: (i64, i64)) -> String {
    format!(
        "the total of {what} `{name}` is {} bytes in {} objects, its rows hold {} bytes in {} objects",
        told.0, told.1, found.0, found.1
    )
}

/// What was counted last.
#[derive(Default)]
pub(crate) struct Figures {
    known: Mutex<Option<Counted>>,
    turn: Counting,
}

#[derive(Clone, Copy)]
struct Counted {
    statistics: Statistics,
    at: Instant,
    took: Duration,
}

/// Whether somebody counts.
#[derive(Default)]
struct Counting(std::sync::Arc<Mutex<bool>>);

impl Counting {
    /// The turn to count, when nobody else does.
    fn take(&self) -> Option<Turn> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *taken {
            return None;
        }
        *taken = true;
        Some(Turn(std::sync::Arc::clone(&self.0)))
    }
}

/// The turn to count; given back when it is dropped.
struct Turn(std::sync::Arc<Mutex<bool>>);

impl Drop for Turn {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

impl Figures {
    /// The last figures with their age, and whether counting is so quick that a caller may wait for it.
    fn known(&self) -> Option<(Statistics, bool)> {
        let counted = (*self.lock())?;
        let mut statistics = counted.statistics;
        statistics.age = counted.at.elapsed();
        Some((statistics, counted.took < QUICK))
    }

    /// How long figures are good for.
    fn lifetime(&self) -> Duration {
        (*self.lock()).map_or(Duration::ZERO, |counted| counted.took * 100)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Counted>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts, and remembers it.
pub(crate) async fn count(inner: &Inner) -> Result<Statistics, Error> {
    let db = &inner.db;
    let begun = Instant::now();
    let (blobs, blob_bytes) = blob::totals(db).await?;
    let (manifests, manifest_bytes) = pair(&db.scan(&MANIFESTS, Vec::new()).await?)?;
    let (logical_bytes, logical_objects) = pair(&db.scan(&LOGICAL, Vec::new()).await?)?;
    let (waiting_blobs, waiting_bytes) = pair(&db.scan(&WAITING, Vec::new()).await?)?;
    let statistics = Statistics {
        repositories: crate::store::single(&db.scan(&REPOSITORY_COUNT, Vec::new()).await?)?,
        blobs,
        blob_bytes,
        manifests,
        manifest_bytes,
        tags: tag::count(db).await?,
        uploads: upload::count(db).await?,
        pending_deletions: collect::count_deletions(db).await?,
        logical_bytes,
        logical_objects,
        waiting_blobs,
        waiting_bytes,
        age: Duration::ZERO,
    };
    *inner.figures.lock() = Some(Counted {
        statistics,
        at: Instant::now(),
        took: begun.elapsed(),
    });
    Ok(statistics)
}

fn pair(rows: &[Row]) -> Result<(u64, u64), Error> {
    let count = |row: &Row, column| row.i64(column).map(|n| u64::try_from(n).unwrap_or(0));
    rows.first()
        .map_or(Ok((0, 0)), |row| Ok((count(row, 0)?, count(row, 1)?)))
}

/// The mark of a namespace to count again, in `meta`; its value is the last repository that was counted.
const RECOUNT: &str = "usage.recount.";
const RECOUNT_EVERY: Duration = Duration::from_mins(10);
/// Counting that takes less is done while the caller waits.
const QUICK: Duration = Duration::from_millis(20);
