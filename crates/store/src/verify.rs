//! Checks a store against itself: each row against its object and digest, edges against manifest bodies, tags,
//! leases, and objects that nobody knows.
//!
//! It runs offline, or read-only beside a running server in one read transaction. Objects are listed *before* the
//! snapshot is taken: by then a row exists for each of them (`I6`), so what the snapshot does not know and
//! what is still there is a stray. A row whose object is missing is looked at again in a newer snapshot.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use oci::{Digest, Manifest};

use crate::audit;
use crate::blob::StorageKey;
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::model::VerifyReport;
use crate::sql::{self, Context, Row, Tx, statements};
use crate::upload::writer::digest_of_file;
use crate::usage;

statements! {
    BLOBS = "SELECT id, digest, size, body, storage_key, state FROM blob WHERE id > $1 ORDER BY id LIMIT 64";
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
                        WHERE b.id = rb.blob_id AND e.repository_id = rb.repository_id) LIMIT 100";
}

/// Checks every row against every object and every digest. Offline it takes the directory's lock; beside a
/// running server it only reads.
///
/// # Errors
/// When the directory or the database cannot be read at all. What is wrong with the content is in the report.
pub async fn verify_store(dir: &Path) -> Result<VerifyReport, Error> {
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        let lock = Directory::look(&dir)?;
        let objects = FileSystem::open(directory::objects(&dir));
        let listed = objects.list()?;
        let snapshot = || {
            check_present(&dir)?;
            sql::sqlite_snapshot(&directory::database(&dir), lock.is_some(), Context::new())
        };
        let mut tx = snapshot()?;
        let mut report = VerifyReport {
            problems: sql::check_sqlite(&mut tx)?,
            ..VerifyReport::default()
        };
        let mut doubts = Vec::new();
        sql::poll_once(check(
            &mut tx,
            Some(&objects),
            listed,
            &mut report,
            &mut doubts,
        ))?;
        drop(tx);
        if !doubts.is_empty() {
            let mut tx = snapshot()?;
            sql::poll_once(settle(&mut tx, doubts, &mut report))?;
        }
        Ok(report)
    })
    .await
    .unwrap_or(Err(Error::Stopped))
}

/// Checks the chain of the audit rows; returns how many are sealed.
///
/// # Errors
/// [`Error::Damaged`] names the first record that is missing or was changed.
pub async fn verify_audit(dir: &Path) -> Result<u64, Error> {
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || {
        let lock = Directory::look(&dir)?;
        check_present(&dir)?;
        let database = directory::database(&dir);
        let mut tx = sql::sqlite_snapshot(&database, lock.is_some(), Context::new())?;
        sql::poll_once(audit::verify(&mut tx))?
            .map_err(|problem| Error::damaged(&database, problem))
    })
    .await
    .unwrap_or(Err(Error::Stopped))
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

/// A blob whose object did not fit, or was not looked at yet, to be looked at once more.
pub(crate) struct Doubt {
    blob: i64,
    key: StorageKey,
    digest: Digest,
    size: u64,
    pub(crate) problem: String,
}

/// Reads the objects of doubts that are not files, outside of any transaction, and keeps those that do not fit.
pub(crate) async fn check_remote(
    objects: &Objects,
    doubts: Vec<Doubt>,
    report: &mut VerifyReport,
) -> Vec<Doubt> {
    let mut kept = Vec::new();
    for mut doubt in doubts {
        let (key, digest) = (&doubt.key, &doubt.digest);
        doubt.problem = match objects.digest(key, doubt.size, digest.algorithm()).await {
            Ok(actual) if actual == *digest => {
                report.bytes += doubt.size;
                continue;
            }
            Ok(actual) => format!(
                "object `{}` has digest `{actual}`, its blob is `{digest}`",
                objects.describe(key).display()
            ),
            Err(error) => format!("blob `{digest}`: {error}"),
        };
        kept.push(doubt);
    }
    kept
}

/// All checks in one snapshot. Without `objects`, which are files, every blob outside of its row is a doubt.
pub(crate) async fn check(
    tx: &mut Tx,
    objects: Option<&FileSystem>,
    listed: Vec<(PathBuf, Option<StorageKey>)>,
    report: &mut VerifyReport,
    doubts: &mut Vec<Doubt>,
) -> Result<(), Error> {
    check_blobs(tx, objects, report, doubts).await?;
    check_manifests(tx, report).await?;
    check_tags(tx, report).await?;
    check_uploads(tx, report).await?;
    usage::check(tx, &mut report.problems).await?;
    for row in tx.query(&UNFILLED, &[]).await? {
        report.problems.push(format!(
            "an edge of repository `{}` to blob `{}` is not filled although the blob is there",
            row.text(0)?,
            row.digest(1)?
        ));
    }
    for row in tx.query(&UNUSED_QUEUE, &[]).await? {
        report.problems.push(format!(
            "blob {} of repository {} is held by nothing and waits in no queue",
            row.i64(1)?,
            row.i64(0)?
        ));
    }
    for (path, key) in listed {
        let known = match &key {
            Some(key) => tx
                .query_opt(&KNOWN, &[key.as_str().into()])
                .await?
                .is_some(),
            None => false,
        };
        // What went between the listing and the snapshot went with its row.
        if !known && (objects.is_none() || path.exists()) {
            report
                .problems
                .push(format!("`{}` belongs to nothing", path.display()));
        }
    }
    Ok(())
}

async fn check_blobs(
    tx: &mut Tx,
    objects: Option<&FileSystem>,
    report: &mut VerifyReport,
    doubts: &mut Vec<Doubt>,
) -> Result<(), Error> {
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&BLOBS, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            report.blobs += 1;
            let digest = row.digest(1)?;
            let size = row.u64(2)?;
            match (row.opt_bytes(3)?, row.opt_text(4)?) {
                (Some(body), None) => {
                    report.bytes += body.len() as u64;
                    if body.len() as u64 != size || !digest.matches(&body) {
                        report.problems.push(format!(
                            "the bytes in the row of blob `{digest}` are damaged"
                        ));
                    }
                }
                (None, Some(key)) => {
                    let key = match StorageKey::parse(&key) {
                        Ok(key) => key,
                        Err(error) => {
                            report.problems.push(format!("blob `{digest}`: {error}"));
                            continue;
                        }
                    };
                    let checked = objects.map_or(Err(String::new()), |files| {
                        check_object(files, &key, &digest, size)
                    });
                    match checked {
                        Ok(()) => report.bytes += size,
                        Err(problem) => doubts.push(Doubt {
                            blob: last,
                            key,
                            digest,
                            size,
                            problem,
                        }),
                    }
                }
                _ => report.problems.push(format!(
                    "blob `{digest}` has its bytes in two places or in none"
                )),
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}

fn check_object(
    objects: &FileSystem,
    key: &StorageKey,
    digest: &Digest,
    size: u64,
) -> Result<(), String> {
    let path = objects.path(key);
    let file = objects.read(key, size).map_err(|error| match error {
        Error::Io { source, .. } => {
            format!("object `{}` of blob `{digest}`: {source}", path.display())
        }
        other => format!("blob `{digest}`: {other}"),
    })?;
    let actual = digest_of_file(digest.algorithm(), file)
        .map_err(|error| format!("object `{}` cannot be read: {error}", path.display()))?;
    if actual == *digest {
        Ok(())
    } else {
        Err(format!(
            "object `{}` has digest `{actual}`, its blob is `{digest}`",
            path.display()
        ))
    }
}

/// Keeps the doubts whose row still names the same object.
pub(crate) async fn settle(
    tx: &mut Tx,
    doubts: Vec<Doubt>,
    report: &mut VerifyReport,
) -> Result<(), Error> {
    for doubt in doubts {
        let key = tx
            .query_opt(&BLOB_KEY, &[doubt.blob.into()])
            .await?
            .map(|row| row.opt_text(0))
            .transpose()?
            .flatten();
        if key.as_deref() == Some(doubt.key.as_str()) {
            report.problems.push(doubt.problem);
        }
    }
    Ok(())
}

async fn check_manifests(tx: &mut Tx, report: &mut VerifyReport) -> Result<(), Error> {
    let mut last = i64::MIN;
    loop {
        let rows = tx.query(&MANIFESTS, &[last.into()]).await?;
        for row in &rows {
            last = row.i64(0)?;
            report.manifests += 1;
            check_manifest(tx, row, report).await?;
        }
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
        report
            .problems
            .push(format!("the bytes of {name} are damaged"));
        return Ok(());
    }
    let view = match Manifest::parse(&body, &row.text(2)?) {
        Ok(view) => view,
        Err(error) => {
            report
                .problems
                .push(format!("{name} cannot be read: {error}"));
            return Ok(());
        }
    };
    let named: BTreeSet<Digest> = view
        .blobs()
        .chain(view.children())
        .map(|entry| entry.digest.clone())
        .collect();
    let mut edges = BTreeSet::new();
    for edge in tx.query(&EDGES, &[row.i64(0)?.into()]).await? {
        let target = edge.digest(0)?;
        if edge.i64(1)? == 2 {
            report
                .problems
                .push(format!("the edge of {name} to `{target}` points elsewhere"));
        }
        edges.insert(target);
    }
    for missing in named.difference(&edges) {
        report
            .problems
            .push(format!("{name} names `{missing}` but has no edge to it"));
    }
    for surplus in edges.difference(&named) {
        report.problems.push(format!(
            "{name} has an edge to `{surplus}`, which it does not name"
        ));
    }
    let subject = view.subject.map(|subject| subject.digest);
    if subject != row.opt_digest(5)? {
        report
            .problems
            .push(format!("the subject in the row of {name} is another one"));
    }
    if let Some(subject) = subject {
        let key = [row.i64(7)?.into(), (&digest).into()];
        let mut linked = false;
        for link in tx.query(&REFERRED, &key).await? {
            linked |= link.digest(0)? == subject;
        }
        if !linked {
            report.problems.push(format!(
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
                report
                    .problems
                    .push(format!("{name} points to no manifest of its repository"));
            } else if points_to != row.opt_digest(5)? || row.opt_i64(6)? != Some(row.i64(3)?) {
                report
                    .problems
                    .push(format!("{name} is not where its history says"));
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
                report
                    .problems
                    .push(format!("the row of upload {last} contradicts itself"));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
    }
}
