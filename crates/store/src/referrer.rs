//! Referrers: what is attached to a digest.
//!
//! One row per (repository, subject, referrer), written by three sources: a manifest's own `subject`; an index
//! that somebody pushed under the referrers tag schema (`sha256-<hex>`); and an evidence tag of older clients
//! (`sha256-<hex>.sig`, `.att`, `.sbom`), whose rows are edges that keep the evidence with its subject and
//! are not listed. A row outlives the move of the tag that made it: evidence only grows. It ends with its referrer,
//! and that of an evidence tag when the tag is deleted.
//!
//! A row outlives its subject too, so that a subject that comes back finds its referrers. `subject_gone_at` tells a
//! subject that was deleted from one that never came: referrers wait for the second one only.

use oci::{Descriptor, Digest, Manifest, RepositoryName, Tag};

use crate::error::Error;
use crate::model::Referrer;
use crate::sql::{Db, Tx, statements};

statements! {
    ADD = "INSERT INTO referrer (repository_id, subject, digest, id, source, artifact_type, descriptor) \
           VALUES ($1, $2, $3, $4, $5, $6, $7) \
           ON CONFLICT (repository_id, subject, digest) DO UPDATE SET source = excluded.source, \
               artifact_type = excluded.artifact_type, descriptor = excluded.descriptor \
           WHERE excluded.source = 'subject' OR (excluded.source = 'index' AND referrer.source = 'tag')";
    LIST = "SELECT f.id, f.descriptor, s.near FROM \
              (SELECT repository_id, subject, digest, size, COUNT(*) OVER () AS near, \
                      CAST(SUM(size) OVER (ORDER BY id) AS BIGINT) AS total \
               FROM (SELECT f.id, f.repository_id, f.subject, f.digest, CAST(octet_length(f.descriptor) AS BIGINT) AS size \
                     FROM repository r JOIN referrer f ON f.repository_id = r.id \
                     WHERE r.name = $1 AND f.subject = $2 AND f.id > $3 AND f.source <> 'tag' \
                       AND ($4 = '' OR f.artifact_type = $4) \
                       AND EXISTS (SELECT 1 FROM manifest m \
                                   WHERE m.repository_id = f.repository_id AND m.digest = f.digest) \
                     ORDER BY f.id LIMIT $5) looked) s \
            JOIN referrer f ON f.repository_id = s.repository_id AND f.subject = s.subject AND f.digest = s.digest \
            WHERE s.total <= $6 OR s.total = s.size \
            ORDER BY f.id";
    OF_SUBJECT = "SELECT digest FROM referrer WHERE repository_id = $1 AND subject = $2 ORDER BY digest";
    // Statements that change several rows lock them in the order of their keys first.
    REMOVE = "DELETE FROM referrer WHERE repository_id = $1 AND digest = $2 AND subject IN ( \
                  SELECT f.subject FROM referrer f WHERE f.repository_id = $1 AND f.digest = $2 \
                  ORDER BY f.subject {for update})";
    SUBJECT_GONE = "UPDATE referrer SET subject_gone_at = $3 WHERE repository_id = $1 AND subject = $2 AND digest IN ( \
                        SELECT f.digest FROM referrer f WHERE f.repository_id = $1 AND f.subject = $2 \
                        AND f.subject_gone_at IS NULL ORDER BY f.digest {for update})";
    SUBJECT_BACK = "UPDATE referrer SET subject_gone_at = NULL WHERE repository_id = $1 AND subject = $2 AND digest IN ( \
                        SELECT f.digest FROM referrer f WHERE f.repository_id = $1 AND f.subject = $2 \
                        AND f.subject_gone_at IS NOT NULL ORDER BY f.digest {for update})";
    UNLINK_TAG = "DELETE FROM referrer WHERE repository_id = $1 AND subject = $2 AND digest = $3 AND source = 'tag'";
}

/// Links a manifest to the subject that it names.
pub(crate) async fn link_subject(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    size: u64,
    view: &Manifest,
) -> Result<Option<Digest>, Error> {
    let Some(subject) = &view.subject else {
        return Ok(None);
    };
    let mut descriptor = Descriptor::new(&view.media_type, digest.clone(), size);
    descriptor.artifact_type = view.listed_artifact_type().map(str::to_owned);
    descriptor.annotations.clone_from(&view.annotations);
    add(tx, repository, &subject.digest, "subject", &descriptor).await?;
    Ok(Some(subject.digest.clone()))
}

/// Makes what an evidence tag points to an edge of its subject, and merges the entries of a referrers
/// tag-schema index into the listing.
pub(crate) async fn link_tag(
    tx: &mut Tx,
    repository: i64,
    tag: &Tag,
    digest: &Digest,
    size: u64,
    view: &Manifest,
) -> Result<(), Error> {
    let Some(subject) = tag.subject() else {
        return Ok(());
    };
    if !tag.as_str().contains('.') {
        let mut entries: Vec<_> = view.children().collect();
        entries.sort_by(|a, b| a.digest.cmp(&b.digest));
        for entry in entries {
            add(tx, repository, &subject, "index", entry).await?;
        }
    }
    let descriptor = Descriptor::new(&view.media_type, digest.clone(), size);
    add(tx, repository, &subject, "tag", &descriptor).await
}

async fn add(
    tx: &mut Tx,
    repository: i64,
    subject: &Digest,
    source: &str,
    descriptor: &Descriptor,
) -> Result<(), Error> {
    // A listing shows what a registry may say about a manifest, never its embedded content.
    let listed = Descriptor {
        data: None,
        urls: Vec::new(),
        platform: None,
        ..descriptor.clone()
    };
    let text = serde_json::to_string(&listed)
        .map_err(|error| Error::Database(format!("a descriptor cannot be written: {error}")))?;
    let id = tx.id();
    tx.execute(
        &ADD,
        &[
            repository.into(),
            subject.into(),
            (&descriptor.digest).into(),
            id.into(),
            source.into(),
            descriptor.artifact_type.as_ref().into(),
            text.into(),
        ],
    )
    .await
    .map(drop)
}

/// Ends the edge that an evidence tag made. No other tag of the same subject makes it as well.
pub(crate) async fn unlink_tag(
    tx: &mut Tx,
    repository: i64,
    tag: &Tag,
    digest: &Digest,
) -> Result<(), Error> {
    let Some(subject) = tag.subject() else {
        return Ok(());
    };
    tx.execute(
        &UNLINK_TAG,
        &[repository.into(), (&subject).into(), digest.into()],
    )
    .await
    .map(drop)
}

/// Notes that a subject is gone. What is attached to it later waits for a subject that never came.
pub(crate) async fn subject_gone(
    tx: &mut Tx,
    repository: i64,
    subject: &Digest,
) -> Result<(), Error> {
    let now = tx.now();
    tx.execute(
        &SUBJECT_GONE,
        &[repository.into(), subject.into(), now.into()],
    )
    .await
    .map(drop)
}

/// Notes that a subject is there.
pub(crate) async fn subject_here(
    tx: &mut Tx,
    repository: i64,
    subject: &Digest,
) -> Result<(), Error> {
    tx.execute(&SUBJECT_BACK, &[repository.into(), subject.into()])
        .await
        .map(drop)
}

/// The digests that are attached to a subject, from all sources.
pub(crate) async fn of_subject(
    tx: &mut Tx,
    repository: i64,
    subject: &Digest,
) -> Result<Vec<Digest>, Error> {
    tx.query(&OF_SUBJECT, &[repository.into(), subject.into()])
        .await?
        .iter()
        .map(|row| row.digest(0))
        .collect()
}

/// Removes the rows in which this manifest is the referrer.
pub(crate) async fn remove(tx: &mut Tx, repository: i64, digest: &Digest) -> Result<(), Error> {
    tx.execute(&REMOVE, &[repository.into(), digest.into()])
        .await
        .map(drop)
}

/// At most `limit` referrers, and of those no more than take `bytes` together, but one at least; and whether there are
/// more. Annotations can be as long as a manifest, so the database looks at lengths before it hands anything out.
pub(crate) async fn list(
    db: &Db,
    repository: &RepositoryName,
    subject: &Digest,
    artifact_type: Option<&str>,
    after: Option<i64>,
    limit: usize,
    bytes: usize,
) -> Result<(Vec<Referrer>, bool), Error> {
    let rows = db
        .scan(
            &LIST,
            vec![
                repository.as_str().into(),
                subject.into(),
                after.unwrap_or(0).into(),
                artifact_type.unwrap_or_default().into(),
                // One more tells whether there is more.
                limit.saturating_add(1).into(),
                bytes.into(),
            ],
        )
        .await?;
    let near = rows.first().map_or(Ok(0), |row| row.u64(2))?;
    let more = near > rows.len().min(limit) as u64;
    let found: Result<_, Error> = rows
        .into_iter()
        .take(limit)
        .map(|row| {
            Ok(Referrer {
                cursor: row.i64(0)?,
                descriptor: serde_json::from_str(&row.text(1)?)
                    .map_err(|error| Error::Database(format!("a stored descriptor: {error}")))?,
            })
        })
        .collect();
    Ok((found?, more))
}
