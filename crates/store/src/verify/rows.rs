//! The rows: what they say of one another, all of one moment.

use std::collections::BTreeSet;

use oci::{Digest, Manifest};

use super::{
    DOOMED, EDGES, EVENT_GAP, HISTORY_GAP, LOST_TAG, MANIFESTS, REFERRED, TAGS, UNFILLED,
    UNHELD_BLOB, UNHELD_MANIFEST, UNQUEUED_REPOSITORY, UNQUEUED_UPLOAD, UNUSED_QUEUE, UPLOADS,
    WRONG_PIN,
};
use crate::error::Error;
use crate::model::VerifyReport;
use crate::sql::{self, Body, Row, Tx, WriteKind};
use crate::usage;

/// The checks of rows on a SQLite database that is open here: its one writer is the snapshot.
pub(super) struct CheckRows;

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
pub(super) async fn check_rows(
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
    let now = tx.now();
    for row in tx.query(&UNHELD_MANIFEST, &[now.into()]).await? {
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
