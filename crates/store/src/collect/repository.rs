//! A repository that was deleted: its content goes in bounded steps.
//!
//! The deletion itself only takes the name away ([`crate::repository::Delete`]): from then on nothing of it is
//! found, and a repository of the same name can begin. Then one transaction after the other takes a part, so that
//! twenty thousand tags are no long transaction. No lease is renewed: an explicit deletion overrides. The rows that
//! name others go before those that are named, and the repository's own row goes last; its foreign keys show that
//! nothing was left behind.

use super::candidate::{Collected, Outcome, gone_already};
use super::queue::{self, Candidate, Kind};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::repository::{self, Known};
use crate::sql::{Statement, Tx, statements};
use crate::usage;

statements! {
    TAGS = "DELETE FROM tag WHERE (repository_id, name) IN \
                (SELECT repository_id, name FROM tag WHERE repository_id = $1 LIMIT $2)";
    PINS = "DELETE FROM pin WHERE (holder, repository_id, digest) IN \
                (SELECT holder, repository_id, digest FROM pin WHERE repository_id = $1 LIMIT $2)";
    CHILDREN = "DELETE FROM manifest_child WHERE (manifest_id, digest) IN \
                    (SELECT manifest_id, digest FROM manifest_child WHERE repository_id = $1 LIMIT $2)";
    BLOBS = "DELETE FROM manifest_blob WHERE (manifest_id, digest) IN \
                 (SELECT manifest_id, digest FROM manifest_blob WHERE repository_id = $1 LIMIT $2)";
    REFERRERS = "DELETE FROM referrer WHERE (repository_id, subject, digest) IN \
                     (SELECT repository_id, subject, digest FROM referrer WHERE repository_id = $1 LIMIT $2)";
    MANIFESTS = "DELETE FROM manifest WHERE id IN \
                     (SELECT id FROM manifest WHERE repository_id = $1 LIMIT $2) RETURNING id, size";
    PAIRS = "SELECT rb.blob_id, b.size FROM repository_blob rb JOIN blob b ON b.id = rb.blob_id \
             WHERE rb.repository_id = $1 ORDER BY rb.blob_id LIMIT $2";
    PAIR = "DELETE FROM repository_blob WHERE repository_id = $1 AND blob_id = $2";
    UPLOADS = "SELECT id FROM upload WHERE repository_id = $1 ORDER BY id LIMIT $2";
    END_UPLOAD = "UPDATE upload SET expires_at = $2 WHERE id = $1";
    HISTORY = "DELETE FROM tag_event WHERE (repository_id, name, generation) IN \
                   (SELECT repository_id, name, generation FROM tag_event WHERE repository_id = $1 LIMIT $2)";
    PULLS = "DELETE FROM pull WHERE (repository_id, digest, principal, hour) IN \
                 (SELECT repository_id, digest, principal, hour FROM pull WHERE repository_id = $1 LIMIT $2)";
}

/// Takes the next part of a deleted repository.
pub(super) async fn step(tx: &mut Tx, candidate: &Candidate) -> Result<Outcome, Error> {
    failpoint("collect.before_step");
    let outcome = take_part(tx, candidate).await;
    failpoint("collect.after_step");
    outcome
}

async fn take_part(tx: &mut Tx, candidate: &Candidate) -> Result<Outcome, Error> {
    let Some(known) = repository::by_id(tx, candidate.target).await? else {
        return Ok(gone_already(tx, candidate));
    };
    if !known.deleted {
        return Ok(gone_already(tx, candidate));
    }
    let id = candidate.target;
    let rows: [&'static Statement; 5] = [&TAGS, &PINS, &CHILDREN, &BLOBS, &REFERRERS];
    for statement in rows {
        if some(tx, statement, id).await? {
            return Ok(again(tx, candidate));
        }
    }
    let manifests = tx
        .query(&MANIFESTS, &[id.into(), MANIFESTS_AT_ONCE.into()])
        .await?;
    if !manifests.is_empty() {
        let mut bytes = 0;
        for row in &manifests {
            bytes += row.i64(1)?;
            queue::forget(tx, Kind::Manifest, id, row.i64(0)?);
        }
        usage::add(tx, known.place, -bytes, -(manifests.len() as i64)).await?;
        return Ok(again(tx, candidate));
    }
    if release(tx, &known).await? {
        return Ok(again(tx, candidate));
    }
    if end_uploads(tx, id).await? {
        let soon = tx.now().plus(UPLOADS_END);
        queue::later(tx, candidate, soon);
        return Ok(Outcome::Later);
    }
    for statement in [&HISTORY, &PULLS] {
        if some(tx, statement, id).await? {
            return Ok(again(tx, candidate));
        }
    }
    repository::remove(tx, id).await?;
    queue::forget(tx, Kind::Repository, candidate.repository, id);
    Ok(Outcome::Collected(Collected {
        repository: Some(known.name.as_str().to_owned()),
        digest: None,
        bytes: 0,
        reason: "it was deleted",
    }))
}

async fn some(tx: &mut Tx, statement: &'static Statement, id: i64) -> Result<bool, Error> {
    Ok(tx
        .execute(statement, &[id.into(), ROWS_AT_ONCE.into()])
        .await?
        > 0)
}

/// Ends the repository's hold on blobs; `false` when there was none left.
async fn release(tx: &mut Tx, known: &Known) -> Result<bool, Error> {
    let now = tx.now();
    let id = known.place.repository;
    let pairs = tx.query(&PAIRS, &[id.into(), PAIRS_AT_ONCE.into()]).await?;
    let mut bytes = 0;
    for row in &pairs {
        let blob = row.i64(0)?;
        bytes += row.i64(1)?;
        tx.execute(&PAIR, &[id.into(), blob.into()]).await?;
        queue::enqueue(tx, Kind::Blob, 0, blob, now);
        queue::forget(tx, Kind::RepositoryBlob, id, blob);
    }
    if !pairs.is_empty() {
        usage::add(tx, known.place, -bytes, -(pairs.len() as i64)).await?;
    }
    Ok(!pairs.is_empty())
}

/// Ends uploads through the queue, where an upload that somebody writes is waited for.
async fn end_uploads(tx: &mut Tx, id: i64) -> Result<bool, Error> {
    let now = tx.now();
    let uploads = tx
        .query(&UPLOADS, &[id.into(), PAIRS_AT_ONCE.into()])
        .await?;
    for row in &uploads {
        let upload = row.i64(0)?;
        tx.execute(&END_UPLOAD, &[upload.into(), now.into()])
            .await?;
        queue::forget(tx, Kind::Upload, id, upload);
        queue::enqueue(tx, Kind::Upload, id, upload, now);
    }
    Ok(!uploads.is_empty())
}

fn again(tx: &mut Tx, candidate: &Candidate) -> Outcome {
    let now = tx.now();
    queue::later(tx, candidate, now);
    Outcome::Step
}

/// Rows that one step takes; a step holds the writer for some milliseconds.
const ROWS_AT_ONCE: usize = 500;
/// Fewer, because their bodies are large.
const MANIFESTS_AT_ONCE: usize = 100;
const PAIRS_AT_ONCE: usize = 100;
/// When to see whether the uploads have ended.
const UPLOADS_END: std::time::Duration = std::time::Duration::from_secs(5);
