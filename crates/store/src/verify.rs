//! Checks a store against itself: each row against its object and digest, edges against manifest bodies, tags,
//! histories, leases, queues, totals, and objects that nobody knows.
//!
//! It changes nothing, and runs on a store that nobody uses or beside running servers. What rows say of one another is
//! read in one snapshot. Objects are read outside of it, page by page, so a long check keeps no old snapshot alive; a
//! blob whose object does not fit is a problem only when its row still names that object afterwards. Objects are listed
//! before the rows are asked about them: a row exists for each object from before its first byte until after its
//! deletion (`I6`), so one that no row knows and that is still there belongs to nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci::{Digest, Manifest};
use tokio::task::JoinSet;

use crate::audit;
use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::model::{Blob, VerifyReport};
use crate::scrub::{self, Verdict};
use crate::sql::{self, Body, Context, Db, Row, Statement, Tx, Value, WriteKind, statements};
use crate::store::{Store, single};
use crate::usage;

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
                         AND NOT EXISTS (SELECT 1 FROM pin n WHERE n.manifest_id = m.id) \
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

/// What a reading of an object found.
struct Reading {
    blob: i64,
    key: StorageKey,
    digest: Digest,
    size: u64,
    verdict: Verdict,
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

    /// Reads every blob, several at once.
    async fn check_blobs(&mut self) -> Result<(), Error> {
        let total = single(&self.rows.query(&COUNT_BLOBS, Vec::new()).await?)?;
        let mut readings = JoinSet::new();
        let mut last = i64::MIN;
        loop {
            let rows = self.rows.query(&BLOBS, vec![last.into()]).await?;
            if rows.is_empty() {
                break;
            }
            for row in &rows {
                last = row.i64(0)?;
                self.report.blobs += 1;
                let digest = row.digest(1)?;
                let size = row.u64(2)?;
                match (row.opt_bytes(3)?, row.opt_text(4)?) {
                    (Some(body), None) => {
                        self.report.bytes += body.len() as u64;
                        if body.len() as u64 != size || !digest.matches(&body) {
                            self.report.problem(format!(
                                "the bytes in the row of blob `{digest}` are damaged"
                            ));
                        }
                    }
                    (None, Some(key)) => match StorageKey::parse(&key) {
                        Err(error) => self.report.problem(format!("blob `{digest}`: {error}")),
                        Ok(key) => {
                            while readings.len() >= self.options.parallel.max(1) {
                                self.take_reading(&mut readings).await?;
                            }
                            let objects = self.objects.clone();
                            let (blob, hashes) = (last, self.options.hash);
                            readings.spawn(async move {
                                let verdict = examine(&objects, &key, &digest, size, hashes).await;
                                Reading {
                                    blob,
                                    key,
                                    digest,
                                    size,
                                    verdict,
                                }
                            });
                        }
                    },
                    _ => self.report.problem(format!(
                        "blob `{digest}` has its bytes in two places or in none"
                    )),
                }
            }
            (self.progress)(VerifyProgress {
                phase: "blobs",
                done: self.report.blobs,
                total: Some(total),
                bytes: self.report.bytes,
            });
        }
        while !readings.is_empty() {
            self.take_reading(&mut readings).await?;
        }
        Ok(())
    }

    async fn take_reading(&mut self, readings: &mut JoinSet<Reading>) -> Result<(), Error> {
        let Some(reading) = readings.join_next().await else {
            return Ok(());
        };
        let reading = reading.map_err(|_| Error::Stopped)?;
        let problem = match reading.verdict {
            Verdict::Sound => {
                if self.options.hash {
                    self.report.bytes += reading.size;
                }
                return Ok(());
            }
            Verdict::Damaged(problem) => problem,
            Verdict::Unknown(error) => format!("it cannot be read now: {error}"),
        };
        // It may be gone, or healed, since its row was read.
        let rows = self
            .rows
            .query(&BLOB_KEY, vec![reading.blob.into()])
            .await?;
        let key = match rows.first() {
            Some(row) => row.opt_text(0)?,
            None => None,
        };
        if key.as_deref() == Some(reading.key.as_str()) {
            self.report.problem(format!(
                "object `{}` of blob `{}`: {problem}",
                self.objects.describe(&reading.key).display(),
                reading.digest
            ));
        }
        Ok(())
    }

    /// Looks for objects that no row knows.
    async fn check_strays(&mut self) -> Result<(), Error> {
        let parts = match self.objects.files() {
            Some(files) => {
                let files = Arc::clone(files);
                blocking(move || files.parts())
                    .await?
                    .into_iter()
                    .map(Some)
                    .collect()
            }
            None => vec![None],
        };
        let mut seen = 0;
        for part in parts {
            let listed = match (part, self.objects.files()) {
                (Some(part), Some(files)) => {
                    let files = Arc::clone(files);
                    blocking(move || files.list_part(&part)).await?
                }
                _ => self.objects.list().await?,
            };
            for page in listed.chunks(KEYS) {
                let keys: Vec<_> = page.iter().filter_map(|(_, key)| key.clone()).collect();
                let known = self.rows.known(&keys).await?;
                for (path, key) in page {
                    let stray = match key {
                        None => true,
                        Some(key) => {
                            !known.contains(key.as_str()) && self.is_there(path, key).await?
                        }
                    };
                    if stray {
                        self.report
                            .problem(format!("`{}` belongs to nothing", path.display()));
                    }
                }
                seen += page.len() as u64;
                (self.progress)(VerifyProgress {
                    phase: "objects",
                    done: seen,
                    total: None,
                    bytes: self.report.bytes,
                });
            }
        }
        Ok(())
    }

    /// What went since it was listed went with its row.
    async fn is_there(&self, path: &Path, key: &StorageKey) -> Result<bool, Error> {
        match &self.objects {
            Objects::Directory(_) => Ok(path.exists()),
            Objects::S3(s3) => Ok(s3.size(key).await?.is_some()),
        }
    }
}

/// Reads one object, or looks at its length.
async fn examine(
    objects: &Objects,
    key: &StorageKey,
    digest: &Digest,
    size: u64,
    hashes: bool,
) -> Verdict {
    if let (false, Objects::S3(s3)) = (hashes, objects) {
        return match s3.size(key).await {
            Ok(Some(found)) if found == size => Verdict::Sound,
            Ok(Some(found)) => Verdict::Damaged(format!("it has {found} bytes, not {size}")),
            Ok(None) => Verdict::Damaged("it is missing".to_owned()),
            Err(error) => Verdict::of_failure(error),
        };
    }
    match objects.read(key, size) {
        Ok(_) if !hashes => Verdict::Sound,
        Ok(content) => {
            let blob = Blob { size, content };
            scrub::hash(&blob, digest, |_| std::future::ready(())).await
        }
        Err(error) => Verdict::of_failure(error),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Stopped))
}

/// The checks of rows on a SQLite database that is open here: its one writer is the snapshot.
struct CheckRows;

impl Body for CheckRows {
    type Output = VerifyReport;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<VerifyReport, Error> {
        let mut report = VerifyReport {
            problems: sql::check_sqlite(tx)?,
            ..VerifyReport::default()
        };
        check_rows(tx, &mut report, &|_| {}).await?;
        Ok(report)
    }
}

/// What rows say of one another.
async fn check_rows(
    tx: &mut Tx,
    report: &mut VerifyReport,
    progress: &(dyn Fn(&VerifyReport) + Send + Sync),
) -> Result<(), Error> {
    check_manifests(tx, report, progress).await?;
    check_tags(tx, report).await?;
    check_uploads(tx, report).await?;
    usage::check(tx, &mut report.problems).await?;
    for row in tx.query(&UNFILLED, &[]).await? {
        report.problem(format!(
            "an edge of repository `{}` to blob `{}` is not filled although the blob is there",
            row.text(0)?,
            row.digest(1)?
        ));
    }
    check_queue(tx, report).await?;
    for row in tx.query(&WRONG_PIN, &[]).await? {
        report.problem(format!(
            "the pin of `{}` on `{}` points to another manifest or to none",
            row.text(0)?,
            row.digest(1)?
        ));
    }
    for row in tx.query(&LOST_TAG, &[]).await? {
        report.problem(format!(
            "tag `{}:{}` is not there although its history says so",
            row.text(0)?,
            row.text(1)?
        ));
    }
    for row in tx.query(&HISTORY_GAP, &[]).await? {
        report.problem(format!(
            "the history of tag `{}:{}` has a gap",
            row.text(0)?,
            row.text(1)?
        ));
    }
    for row in tx.query(&DOOMED, &[]).await? {
        report.problem(format!(
            "object `{}` is used and is to be deleted",
            row.text(0)?
        ));
    }
    for row in tx.query(&EVENT_GAP, &[]).await? {
        let missing = row.i64(0)?;
        if missing != 0 {
            report.problem(format!(
                "the numbers of the events have a gap: {missing} are missing"
            ));
        }
    }
    Ok(())
}

/// Everything that nothing holds waits in the queue, else it would never be collected.
async fn check_queue(tx: &mut Tx, report: &mut VerifyReport) -> Result<(), Error> {
    for row in tx.query(&UNUSED_QUEUE, &[]).await? {
        report.problem(format!(
            "blob {} of repository {} is held by nothing and waits in no queue",
            row.i64(1)?,
            row.i64(0)?
        ));
    }
    for row in tx.query(&UNHELD_BLOB, &[]).await? {
        report.problem(format!(
            "blob `{}` is in no repository and waits in no queue",
            row.digest(0)?
        ));
    }
    for row in tx.query(&UNHELD_MANIFEST, &[]).await? {
        report.problem(format!(
            "manifest `{}@{}` is held by nothing and waits in no queue",
            row.text(0)?,
            row.digest(1)?
        ));
    }
    for row in tx.query(&UNQUEUED_UPLOAD, &[]).await? {
        report.problem(format!("upload `{}` waits in no queue", row.text(0)?));
    }
    for row in tx.query(&UNQUEUED_REPOSITORY, &[]).await? {
        report.problem(format!(
            "repository `{}` was deleted and waits in no queue",
            row.opt_text(0)?.unwrap_or_default()
        ));
    }
    Ok(())
}

async fn check_manifests(
    tx: &mut Tx,
    report: &mut VerifyReport,
    progress: &(dyn Fn(&VerifyReport) + Send + Sync),
) -> Result<(), Error> {
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&MANIFESTS, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            report.manifests += 1;
            check_manifest(tx, row, report).await?;
        }
        progress(report);
        if rows.is_empty() {
            return Ok(());
        }
    }
}

async fn check_manifest(tx: &mut Tx, row: &Row, report: &mut VerifyReport) -> Result<(), Error> {
    let digest = row.digest(1)?;
    let name = format!("manifest `{}@{digest}`", row.text(6)?);
    let body = row.bytes(4)?;
    report.bytes += body.len() as u64;
    if body.len() as u64 != row.u64(3)? || !digest.matches(&body) {
        report.problem(format!("the bytes of {name} are damaged"));
        return Ok(());
    }
    let view = match Manifest::parse(&body, &row.text(2)?) {
        Ok(view) => view,
        Err(error) => {
            report.problem(format!("{name} cannot be read: {error}"));
            return Ok(());
        }
    };
    // The content of a deleted repository goes in steps, edges before manifests. Its name is none that a repository can have.
    if row.text(6)?.starts_with('/') {
        return Ok(());
    }
    let named: BTreeSet<Digest> = view
        .blobs()
        .chain(view.children())
        .map(|entry| entry.digest.clone())
        .collect();
    let mut edges = BTreeSet::new();
    for edge in tx.query(&EDGES, &[row.i64(0)?.into()]).await? {
        let target = edge.digest(0)?;
        if edge.i64(1)? == 2 {
            report.problem(format!("the edge of {name} to `{target}` points elsewhere"));
        }
        edges.insert(target);
    }
    for missing in named.difference(&edges) {
        report.problem(format!("{name} names `{missing}` but has no edge to it"));
    }
    for surplus in edges.difference(&named) {
        report.problem(format!(
            "{name} has an edge to `{surplus}`, which it does not name"
        ));
    }
    let subject = view.subject.map(|subject| subject.digest);
    if subject != row.opt_digest(5)? {
        report.problem(format!("the subject in the row of {name} is another one"));
    }
    if let Some(subject) = subject {
        let key = [row.i64(7)?.into(), (&digest).into()];
        let mut linked = false;
        for link in tx.query(&REFERRED, &key).await? {
            linked |= link.digest(0)? == subject;
        }
        if !linked {
            report.problem(format!(
                "{name} is not listed as a referrer of its subject `{subject}`"
            ));
        }
    }
    Ok(())
}

async fn check_tags(tx: &mut Tx, report: &mut VerifyReport) -> Result<(), Error> {
    let (mut repository, mut last) = (i64::MIN, String::new());
    loop {
        let rows = tx
            .query(&TAGS, &[repository.into(), (&last).into()])
            .await?;
        for row in &rows {
            last = row.text(0)?;
            repository = row.i64(2)?;
            let name = format!("tag `{}:{last}`", row.text(1)?);
            let points_to = row.opt_digest(4)?;
            if points_to.is_none() {
                report.problem(format!("{name} points to no manifest of its repository"));
            } else if points_to != row.opt_digest(5)? || row.opt_i64(6)? != Some(row.i64(3)?) {
                report.problem(format!("{name} is not where its history says"));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

async fn check_uploads(tx: &mut Tx, report: &mut VerifyReport) -> Result<(), Error> {
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&UPLOADS, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            let size = row.u64(1)?;
            // The object of an open upload is still being written; only the row can be checked.
            let sound = match (row.opt_text(2)?, row.opt_bytes(3)?) {
                (_, Some(body)) => body.len() as u64 == size,
                (key, None) => key.is_some() || row.opt_text(4)?.is_some(),
            };
            if !sound {
                report.problem(format!("the row of upload {last} contradicts itself"));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

/// Problems that are told; more are counted.
const MAX_PROBLEMS: usize = 10_000;
/// Objects whose rows are looked up in one moment.
const KEYS: usize = 1000;
