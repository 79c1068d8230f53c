//! Leases: what a pusher was told to exist is kept long enough to be used (`I7`).
//!
//! A blob is held by a repository through a row of `repository_blob`, whose lease protects it until a
//! manifest names it. Every removal of an edge renews the lease of what the edge pointed to, so that a HEAD
//! that was answered because of that edge stays true. An explicit DELETE overrides.

use std::time::Duration;

use oci::{Digest, RepositoryName};

use crate::clock::Timestamp;
use crate::collect::{self, Kind};
use crate::error::Error;
use crate::manifest;
use crate::repository::{self, Place};
use crate::sql::{Body, Row, Tx, statements};
use crate::usage;

statements! {
    GRANT = "INSERT INTO repository_blob (repository_id, blob_id, id, lease_until, added_by, added_at) \
             VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (repository_id, blob_id) DO UPDATE SET lease_until = \
                 CASE WHEN repository_blob.lease_until < excluded.lease_until \
                      THEN excluded.lease_until ELSE repository_blob.lease_until END \
             RETURNING id";
    FIND_HELD = "SELECT b.id, b.size, b.state FROM repository_blob rb JOIN blob b ON b.id = rb.blob_id \
                 WHERE rb.repository_id = $1 AND b.digest = $2 {for key share of rb}";
    TAKE_HELD = "SELECT b.id, b.size, b.state FROM repository_blob rb JOIN blob b ON b.id = rb.blob_id \
                 WHERE rb.repository_id = $1 AND b.digest = $2 {for update of rb}";
    RENEW_BLOB = "UPDATE repository_blob SET lease_until = \
                      CASE WHEN lease_until < $3 THEN $3 ELSE lease_until END \
                  WHERE repository_id = $1 \
                    AND blob_id = (SELECT b.id FROM blob b WHERE b.digest = $2 AND b.state IN ('ok', $4)) \
                  RETURNING blob_id";
    RENEW_MANIFEST = "UPDATE manifest SET lease_until = \
                          CASE WHEN lease_until < $3 THEN $3 ELSE lease_until END \
                      WHERE repository_id = $1 AND digest = $2 RETURNING id";
    TRY_MANIFEST = "SELECT id FROM manifest WHERE repository_id = $1 AND digest = $2 {for no key update, skip locked}";
    TAKE_PAIR = "SELECT b.id, b.size, b.state, b.digest, rb.lease_until FROM repository_blob rb \
                 JOIN blob b ON b.id = rb.blob_id \
                 WHERE rb.repository_id = $1 AND rb.blob_id = $2 {for update of rb}";
    HELD = "SELECT repository_id FROM repository_blob WHERE blob_id = $1 LIMIT 1";
    RELEASE = "DELETE FROM repository_blob WHERE repository_id = $1 AND blob_id = $2";
    HOLDERS = "SELECT r.name FROM blob b JOIN repository_blob rb ON rb.blob_id = b.id \
               JOIN repository r ON r.id = rb.repository_id \
               WHERE b.digest = $1 AND b.state = 'ok' AND r.deleted_at IS NULL ORDER BY r.name LIMIT $2";
}

/// Gives a repository a hold on a blob for the time of a lease: the pair, its queue row, its usage and the
/// edges that waited for it (`I2`; the caller's transaction holds the blob's row).
pub(crate) async fn grant(
    tx: &mut Tx,
    place: Place,
    digest: &Digest,
    blob: i64,
    size: u64,
    lease: Duration,
    principal: &str,
) -> Result<(), Error> {
    let (now, id) = (tx.now(), tx.id());
    let until = now.plus(lease);
    let held = tx
        .query_opt(
            &GRANT,
            &[
                place.repository.into(),
                blob.into(),
                id.into(),
                until.into(),
                principal.into(),
                now.into(),
            ],
        )
        .await?
        .ok_or_else(|| Error::Database("a lease vanished".to_owned()))?
        .i64(0)?;
    if held == id {
        usage::add(tx, place, size as i64, 1).await?;
        manifest::fill_blob_edges(tx, place.repository, digest, blob).await?;
    }
    collect::enqueue(tx, Kind::RepositoryBlob, place.repository, blob, until);
    Ok(())
}

/// The blob that a repository holds under this digest, locked until the transaction ends so that no
/// collector takes it (`I4`).
pub(crate) async fn find_held(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
) -> Result<Option<Held>, Error> {
    tx.query_opt(&FIND_HELD, &[repository.into(), digest.into()])
        .await?
        .map(|row| held(&row))
        .transpose()
}

/// As [`find_held`], locked against everybody who wants to name it.
pub(crate) async fn take_held(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
) -> Result<Option<Held>, Error> {
    tx.query_opt(&TAKE_HELD, &[repository.into(), digest.into()])
        .await?
        .map(|row| held(&row))
        .transpose()
}

fn held(row: &Row) -> Result<Held, Error> {
    Ok(Held {
        blob: row.i64(0)?,
        size: row.u64(1)?,
        sound: row.text(2)? == "ok",
    })
}

/// A blob that a repository holds.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    pub(crate) blob: i64,
    pub(crate) size: u64,
    /// Its bytes are not known to be damaged.
    pub(crate) sound: bool,
}

/// Ends a repository's hold on a blob.
pub(crate) async fn release(tx: &mut Tx, place: Place, held: Held) -> Result<(), Error> {
    tx.execute(&RELEASE, &[place.repository.into(), held.blob.into()])
        .await?;
    usage::add(tx, place, -(held.size as i64), -1).await
}

/// A repository's hold on a blob, locked against everybody who wants to name it.
pub(crate) async fn take_pair(
    tx: &mut Tx,
    repository: i64,
    blob: i64,
) -> Result<Option<(Held, Digest, Timestamp)>, Error> {
    tx.query_opt(&TAKE_PAIR, &[repository.into(), blob.into()])
        .await?
        .map(|row| Ok((held(&row)?, row.digest(3)?, row.time(4)?)))
        .transpose()
}

/// Tells whether any repository holds a blob.
pub(crate) async fn is_held(tx: &mut Tx, blob: i64) -> Result<bool, Error> {
    Ok(tx.query_opt(&HELD, &[blob.into()]).await?.is_some())
}

/// An edge to a blob is gone: what was told to exist because of it is kept for the time of a lease (`I7`).
pub(crate) async fn after_edge_to_blob(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    lease: Duration,
) -> Result<(), Error> {
    renew_blob(tx, repository, digest, renewal(lease), Damaged::Too)
        .await
        .map(drop)
}

/// As [`after_edge_to_blob`], for an edge to a manifest: a tag, an index, a subject.
pub(crate) async fn after_edge_to_manifest(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    lease: Duration,
) -> Result<(), Error> {
    renew_manifest(tx, repository, digest, renewal(lease))
        .await
        .map(drop)
}

/// As [`after_edge_to_manifest`], by a transaction that holds another manifest already and so waits for none: when
/// somebody has this one the transaction begins again.
pub(crate) async fn after_edge_below(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    lease: Duration,
) -> Result<(), Error> {
    let key = [repository.into(), digest.into()];
    if tx.query_opt(&TRY_MANIFEST, &key).await?.is_none()
        && manifest::id(tx, repository, digest).await?.is_some()
    {
        return Err(tx.again("what the manifest names"));
    }
    after_edge_to_manifest(tx, repository, digest, lease).await
}

/// How long the target of a removed edge is kept. `LONGSHORE_TEST_BUG=no-renewal` plants the bug that a test of `I7`
/// must find.
fn renewal(lease: Duration) -> Duration {
    #[cfg(feature = "failpoints")]
    if crate::failpoint::planted("no-renewal") {
        return Duration::ZERO;
    }
    lease
}

/// Whether a blob that was found damaged counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damaged {
    /// Nobody is told that it is there (`I20`).
    NotThere,
    /// It is collected, too.
    Too,
}

/// Renews the lease of a blob; `false` when the repository does not hold it.
pub(crate) async fn renew_blob(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    lease: Duration,
    damaged: Damaged,
) -> Result<bool, Error> {
    let until = tx.now().plus(lease);
    let renewed = tx
        .query_opt(
            &RENEW_BLOB,
            &[
                repository.into(),
                digest.into(),
                until.into(),
                match damaged {
                    Damaged::NotThere => "ok",
                    Damaged::Too => "suspect",
                }
                .into(),
            ],
        )
        .await?;
    let Some(row) = renewed else {
        return Ok(false);
    };
    collect::enqueue(tx, Kind::RepositoryBlob, repository, row.i64(0)?, until);
    Ok(true)
}

/// Renews the lease of a manifest; `false` when it is not there.
pub(crate) async fn renew_manifest(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    lease: Duration,
) -> Result<bool, Error> {
    let until = tx.now().plus(lease);
    extend_manifest(tx, repository, digest, until).await
}

/// A pin of a manifest is gone or its time is over, however late that was noticed: the lease begins where the pin ended.
pub(crate) async fn after_pin(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    ended: Timestamp,
    lease: Duration,
) -> Result<(), Error> {
    let until = ended.plus(renewal(lease));
    extend_manifest(tx, repository, digest, until)
        .await
        .map(drop)
}

async fn extend_manifest(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    until: Timestamp,
) -> Result<bool, Error> {
    let renewed = tx
        .query_opt(
            &RENEW_MANIFEST,
            &[repository.into(), digest.into(), until.into()],
        )
        .await?;
    let Some(row) = renewed else {
        return Ok(false);
    };
    collect::enqueue(tx, Kind::Manifest, repository, row.i64(0)?, until);
    Ok(true)
}

/// The transaction of a HEAD that must keep what it reports (`I7`): it commits before the answer, and a
/// renewal that finds nothing means that the content is gone.
pub(crate) struct Renew {
    pub(crate) repository: RepositoryName,
    pub(crate) digest: Digest,
    pub(crate) lease: Duration,
    pub(crate) kind: Renewed,
}

/// What a HEAD reported.
pub(crate) enum Renewed {
    Blob,
    Manifest,
}

impl Body for Renew {
    type Output = bool;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let Some(place) = repository::look_up(tx, &self.repository).await? else {
            return Ok(false);
        };
        match self.kind {
            Renewed::Blob => {
                renew_blob(
                    tx,
                    place.repository,
                    &self.digest,
                    self.lease,
                    Damaged::NotThere,
                )
                .await
            }
            Renewed::Manifest => {
                renew_manifest(tx, place.repository, &self.digest, self.lease).await
            }
        }
    }
}

/// Repositories that hold a blob.
pub(crate) async fn holders(
    db: &crate::sql::Db,
    digest: &Digest,
    limit: usize,
) -> Result<Vec<RepositoryName>, Error> {
    db.scan(&HOLDERS, vec![digest.into(), limit.into()])
        .await?
        .iter()
        .map(|row| row.parse(0))
        .collect()
}
