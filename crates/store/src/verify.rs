//! Checks a store against itself: each row against its object and digest, edges against manifest bodies, tags,
//! histories, leases, queues, totals, and objects that nobody knows.
//!
//! It changes nothing, and runs on a store that nobody uses or beside running servers. What rows say of one another is
//! read in one snapshot. Objects are read outside of it, page by page, so a long check keeps no old snapshot alive; a
//! blob whose object does not fit is a problem only when its row still names that object afterwards. Objects are listed
//! before the rows are asked about them: a row exists for each object from before its first byte until after its
//! deletion (`I6`), so one that no row knows and that is still there belongs to nothing.

mod objects;
mod rows;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::audit;
use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::blocking::blocking;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::identity::{self, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::model::VerifyReport;
use crate::sql::{self, Body, Context, Db, Row, Statement, Tx, Value, WriteKind, statements};
use crate::store::{Store, single};

use rows::{CheckRows, check_rows};

statements! {
    BLOBS = "SELECT id, digest, size, body, storage_key, state FROM blob WHERE id > $1 ORDER BY id LIMIT 256";
    COUNT_BLOBS = "SELECT COUNT(*) FROM blob";
    COUNT_MANIFESTS = "SELECT COUNT(*) FROM manifest";
    BLOB_KEY = "SELECT storage_key FROM blob WHERE id = $1";
    MANIFESTS = "SELECT m.id, m.digest, m.media_type, m.size, m.body, m.subject, r.name, m.repository_id \
                 FROM manifest m JOIN repository r ON r.id = m.repository_id \
                 WHERE m.id > $1 ORDER BY m.id LIMIT 16";
    EDGES = "SELECT e.digest, CAST(CASE WHEN e.blob_id IS NULL THEN 0 WHEN b.digest = e.digest THEN 1 ELSE 2 END \
                 AS BIGINT) AS target \
             FROM manifest_blob e LEFT JOIN blob b ON b.id = e.blob_id WHERE e.manifest_id = $1 \
             UNION ALL \
             SELECT e.digest, CAST(CASE WHEN e.child_id IS NULL THEN 0 WHEN c.digest = e.digest THEN 1 ELSE 2 END \
                 AS BIGINT) AS target \
             FROM manifest_child e LEFT JOIN manifest c ON c.id = e.child_id WHERE e.manifest_id = $1";
    UNFILLED = "SELECT r.name, e.digest FROM manifest_blob e JOIN repository r ON r.id = e.repository_id \
                JOIN blob b ON b.digest = e.digest \
                JOIN repository_blob rb ON rb.repository_id = e.repository_id AND rb.blob_id = b.id \
                WHERE e.blob_id IS NULL ORDER BY r.name LIMIT 100";
    REFERRED = "SELECT subject FROM referrer WHERE repository_id = $1 AND digest = $2";
    TAGS = "SELECT t.name, r.name AS repository, t.repository_id, t.generation, \
                m.digest, e.digest AS last, e.generation AS last_generation \
            FROM tag t JOIN repository r ON r.id = t.repository_id \
            LEFT JOIN manifest m ON m.id = t.manifest_id AND m.repository_id = t.repository_id \
            LEFT JOIN tag_event e ON e.repository_id = t.repository_id AND e.name = t.name \
                AND e.generation = (SELECT MAX(h.generation) FROM tag_event h \
                    WHERE h.repository_id = t.repository_id AND h.name = t.name) \
            WHERE (t.repository_id, t.name) > ($1, $2) ORDER BY t.repository_id, t.name LIMIT 256";
    UPLOADS = "SELECT id, size, storage_key, body, parts FROM upload WHERE id > $1 ORDER BY id LIMIT 64";
    KNOWN = "SELECT storage_key FROM blob WHERE storage_key = $1 \
             UNION ALL SELECT storage_key FROM upload WHERE storage_key = $1 \
             UNION ALL SELECT tail_key FROM upload WHERE tail_key = $1 \
             UNION ALL SELECT next_tail_key FROM upload WHERE next_tail_key = $1 \
             UNION ALL SELECT storage_key FROM deletion WHERE storage_key = $1";
    UNUSED_QUEUE = "SELECT rb.repository_id, rb.blob_id FROM repository_blob rb WHERE \
                    NOT EXISTS (SELECT 1 FROM collection_queue q WHERE q.kind = 'repository_blob' \
                        AND q.repository_id = rb.repository_id AND q.target_id = rb.blob_id) \
                    AND NOT EXISTS (SELECT 1 FROM blob b JOIN manifest_blob e ON e.digest = b.digest \
                        WHERE b.id = rb.blob_id AND e.repository_id = rb.repository_id) \
                    AND NOT EXISTS (SELECT 1 FROM repository r WHERE r.id = rb.repository_id \
                        AND r.deleted_at IS NOT NULL) LIMIT 100";
    UNHELD_BLOB = "SELECT b.digest FROM blob b \
                   WHERE NOT EXISTS (SELECT 1 FROM repository_blob rb WHERE rb.blob_id = b.id) \
                     AND NOT EXISTS (SELECT 1 FROM collection_queue q WHERE q.kind = 'blob' AND q.target_id = b.id \
                         AND q.repository_id = 0) LIMIT 100";
    UNHELD_MANIFEST = "SELECT r.name, m.digest FROM manifest m JOIN repository r ON r.id = m.repository_id \
                       WHERE r.deleted_at IS NULL \
                         AND NOT EXISTS (SELECT 1 FROM collection_queue q WHERE q.kind = 'manifest' \
                             AND q.repository_id = m.repository_id AND q.target_id = m.id) \
                         AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.manifest_id = m.id) \
                         AND NOT EXISTS (SELECT 1 FROM pin n WHERE n.manifest_id = m.id \
                             AND (n.expires_at IS NULL OR n.expires_at > $1)) \
                         AND NOT EXISTS (SELECT 1 FROM manifest_child c WHERE c.repository_id = m.repository_id \
                             AND c.digest = m.digest) \
                         AND NOT EXISTS (SELECT 1 FROM referrer f JOIN manifest s \
                             ON s.repository_id = f.repository_id AND s.digest = f.subject \
                             WHERE f.repository_id = m.repository_id AND f.digest = m.digest) LIMIT 100";
    UNQUEUED_UPLOAD = "SELECT u.name FROM upload u WHERE NOT EXISTS (SELECT 1 FROM collection_queue q \
                           WHERE q.kind = 'upload' AND q.repository_id = u.repository_id AND q.target_id = u.id) LIMIT 100";
    UNQUEUED_REPOSITORY = "SELECT r.deleted_name FROM repository r WHERE r.deleted_at IS NOT NULL \
                               AND NOT EXISTS (SELECT 1 FROM collection_queue q WHERE q.kind = 'repository' \
                                   AND q.target_id = r.id) LIMIT 100";
    WRONG_PIN = "SELECT n.holder, n.digest FROM pin n LEFT JOIN manifest m ON m.id = n.manifest_id \
                 WHERE m.id IS NULL OR m.digest <> n.digest OR m.repository_id <> n.repository_id LIMIT 100";
    LOST_TAG = "SELECT r.name, e.name AS tag FROM tag_event e JOIN repository r ON r.id = e.repository_id \
                WHERE e.digest IS NOT NULL AND r.deleted_at IS NULL \
                  AND NOT EXISTS (SELECT 1 FROM tag t WHERE t.repository_id = e.repository_id AND t.name = e.name) \
                  AND NOT EXISTS (SELECT 1 FROM tag_event l WHERE l.repository_id = e.repository_id \
                      AND l.name = e.name AND l.generation > e.generation) LIMIT 100";
    HISTORY_GAP = "SELECT r.name, e.name AS tag FROM tag_event e JOIN repository r ON r.id = e.repository_id \
                   GROUP BY r.name, e.repository_id, e.name \
                   HAVING COUNT(*) <> MAX(e.generation) - MIN(e.generation) + 1 LIMIT 100";
    DOOMED = "SELECT d.storage_key FROM deletion d \
              WHERE EXISTS (SELECT 1 FROM blob b WHERE b.storage_key = d.storage_key) \
                 OR EXISTS (SELECT 1 FROM upload u WHERE u.storage_key = d.storage_key) LIMIT 100";
    EVENT_GAP = "SELECT CAST((n.value - p.value) - (SELECT COUNT(*) FROM event e WHERE e.number > p.value) AS BIGINT) \
                     AS missing \
                 FROM counter p, counter n WHERE p.name = 'event_pruned' AND n.name = 'event'";
}

/// How a store is checked.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// Read every object and compare its digest. Without it only its presence and its length are looked at.
    pub hash: bool,
    /// Objects that are read at once.
    pub parallel: usize,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            hash: true,
            parallel: std::thread::available_parallelism()
                .map_or(2, usize::from)
                .max(2),
        }
    }
}

/// How far a check is.
#[derive(Clone, Copy, Debug)]
pub struct VerifyProgress {
    /// What is looked at: `manifests`, `blobs` or `objects`.
    pub phase: &'static str,
    /// How many were.
    pub done: u64,
    /// How many there are; of objects it is not known.
    pub total: Option<u64>,
    /// Bytes that were read.
    pub bytes: u64,
}

/// Checks every row of a data directory against every object and every digest. Offline it takes the directory's lock;
/// beside a running server it only reads.
///
/// # Errors
/// When the directory or the database cannot be read at all. What is wrong with the content is in the report.
pub async fn verify_store(dir: &Path) -> Result<VerifyReport, Error> {
    verify_at(&Location::embedded(dir), VerifyOptions::default(), &|_| {}).await
}

/// Checks the store at `location`, wherever its rows and objects are.
///
/// # Errors
/// As [`verify_store`]; [`Error::Unavailable`] when PostgreSQL or the object store cannot be reached.
pub async fn verify_at(
    location: &Location,
    options: VerifyOptions,
    progress: &(dyn Fn(VerifyProgress) + Send + Sync),
) -> Result<VerifyReport, Error> {
    let objects = match &location.objects {
        ObjectLocation::Directory(dir) => {
            check_directory(dir)?;
            Objects::Directory(Arc::new(FileSystem::open(directory::objects(dir))))
        }
        ObjectLocation::S3(location) => Objects::S3(S3::connect(location).await?),
    };
    // Held to the end: nobody begins to write a directory that was found unused.
    let mut lock = None;
    let opened;
    let rows = match &location.database {
        DatabaseLocation::Sqlite(dir) => {
            check_directory(dir)?;
            lock = Directory::look(dir)?;
            check_present(dir)?;
            Rows::File {
                path: directory::database(dir),
                alone: lock.is_some(),
            }
        }
        DatabaseLocation::Postgres(url) => {
            opened = Db::look_postgres(url, Context::new()).await?;
            Rows::Db(&opened)
        }
    };
    let ours = match &rows {
        Rows::Db(db) => identity::read(db).await?,
        Rows::File { .. } => match rows.snapshot().await? {
            Some(mut tx) => crate::transfer::fact(&mut tx, identity::KEY).await?,
            None => None,
        },
    };
    identity::compare(ours.as_deref(), &Place::new(location, &objects)).await?;
    let report = Check {
        rows,
        objects,
        options,
        progress,
        report: VerifyReport::default(),
    }
    .run()
    .await;
    drop(lock);
    report
}

impl Store {
    /// The same checks as [`verify_store`] inside this store, on either engine, and the audit chain.
    ///
    /// # Errors
    /// As [`verify_at`].
    #[doc(hidden)]
    pub async fn verify_open(&self) -> Result<VerifyReport, Error> {
        let mut report = Check {
            rows: Rows::Db(&self.0.db),
            objects: self.0.objects.clone(),
            options: VerifyOptions::default(),
            progress: &|_| {},
            report: VerifyReport::default(),
        }
        .run()
        .await?;
        if let Err(problem) = self.0.db.write(VerifyChain).await? {
            report.problem(problem);
        }
        Ok(report)
    }
}

struct VerifyChain;

impl Body for VerifyChain {
    type Output = Result<u64, String>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Self::Output, Error> {
        audit::verify(tx).await
    }
}

/// Checks the chain of the audit rows of a data directory; returns how many are sealed.
///
/// # Errors
/// [`Error::Damaged`] names the first record that is missing or was changed; as [`verify_store`].
pub async fn verify_audit(dir: &Path) -> Result<u64, Error> {
    verify_audit_at(&Location::embedded(dir)).await
}

/// Checks the chain of the audit rows of the store at `location`, in one moment of its database; returns how many are
/// sealed. The objects are not looked at.
///
/// # Errors
/// As [`verify_audit`]; [`Error::Unavailable`] when PostgreSQL cannot be reached.
pub async fn verify_audit_at(location: &Location) -> Result<u64, Error> {
    match &location.database {
        DatabaseLocation::Sqlite(dir) => {
            let dir = dir.clone();
            blocking(move || {
                check_directory(&dir)?;
                let lock = Directory::look(&dir)?;
                check_present(&dir)?;
                let database = directory::database(&dir);
                let mut tx = sql::sqlite_snapshot(&database, lock.is_some(), Context::new())?;
                sql::poll_once(audit::verify(&mut tx))?
                    .map_err(|problem| Error::damaged(&database, problem))
            })
            .await
        }
        DatabaseLocation::Postgres(url) => {
            let db = Db::look_postgres(url, Context::new()).await?;
            let place = Path::new("the PostgreSQL database");
            let Some(mut tx) = db.snapshot().await? else {
                return Err(Error::Stopped);
            };
            let checked = audit::verify(&mut tx).await?;
            drop(tx);
            db.close().await?;
            checked.map_err(|problem| Error::damaged(place, problem))
        }
    }
}

fn check_present(dir: &Path) -> Result<(), Error> {
    let database = directory::database(dir);
    if database.is_file() {
        Ok(())
    } else {
        Err(Error::damaged(
            &database,
            "it is missing, restore the directory from a backup",
        ))
    }
}

fn check_directory(dir: &Path) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    Err(Error::NoDirectory(dir.to_owned()))
}

impl VerifyReport {
    /// Adds a problem. The list has an end; what comes after it is counted.
    pub(crate) fn problem(&mut self, text: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text);
        } else {
            self.more_problems += 1;
        }
    }
}

/// Where the rows are read.
enum Rows<'a> {
    /// A SQLite file that another process may be writing.
    File { path: PathBuf, alone: bool },
    /// A database that is open here.
    Db(&'a Db),
}

impl Rows<'_> {
    /// One moment of the database; `None` for a SQLite database that is open here.
    async fn snapshot(&self) -> Result<Option<Tx>, Error> {
        match self {
            Self::File { path, alone } => {
                let (path, alone) = (path.clone(), *alone);
                blocking(move || sql::sqlite_snapshot(&path, alone, Context::new()))
                    .await
                    .map(Some)
            }
            Self::Db(db) => db.snapshot().await,
        }
    }

    /// Runs one statement, each in a moment of its own.
    async fn query(
        &self,
        statement: &'static Statement,
        values: Vec<Value>,
    ) -> Result<Vec<Row>, Error> {
        match self {
            Self::File { .. } => match self.snapshot().await? {
                Some(mut tx) => tx.query(statement, &values).await,
                None => Ok(Vec::new()),
            },
            Self::Db(db) => db.scan(statement, values).await,
        }
    }

    /// Which of these keys a row knows.
    async fn known(&self, keys: &[StorageKey]) -> Result<BTreeSet<String>, Error> {
        let mut known = BTreeSet::new();
        let mut snapshot = self.snapshot().await?;
        for key in keys {
            let values = [key.as_str().into()];
            let rows = match &mut snapshot {
                Some(tx) => tx.query(&KNOWN, &values).await?,
                None => self.query(&KNOWN, values.to_vec()).await?,
            };
            if !rows.is_empty() {
                known.insert(key.as_str().to_owned());
            }
        }
        Ok(known)
    }
}

/// One check of a whole store.
struct Check<'a> {
    rows: Rows<'a>,
    objects: Objects,
    options: VerifyOptions,
    progress: &'a (dyn Fn(VerifyProgress) + Send + Sync),
    report: VerifyReport,
}

impl Check<'_> {
    async fn run(mut self) -> Result<VerifyReport, Error> {
        let manifests = single(&self.rows.query(&COUNT_MANIFESTS, Vec::new()).await?)?;
        match self.rows.snapshot().await? {
            Some(mut tx) => {
                for problem in sql::check_sqlite(&mut tx)? {
                    self.report.problem(problem);
                }
                check_rows(&mut tx, &mut self.report, &|report| {
                    (self.progress)(VerifyProgress {
                        phase: "manifests",
                        done: report.manifests,
                        total: Some(manifests),
                        bytes: report.bytes,
                    });
                })
                .await?;
            }
            None => {
                if let Rows::Db(db) = &self.rows {
                    self.report = db.write(CheckRows).await?;
                }
            }
        }
        self.check_blobs().await?;
        self.check_strays().await?;
        Ok(self.report)
    }
}

/// Problems that are told; more are counted.
const MAX_PROBLEMS: usize = 10_000;
