//! Manifests: exact bytes in a row, and the edges to what they name.
//!
//! A PUT is one transaction (`I3`): every reference is looked up and locked, the manifest, its edges, its
//! subject, its tags, the history, the events and the audit row are written, or nothing is. Edges carry the
//! digest; their target id is NULL only where absence is legal (foreign layers, sparse content) and is filled
//! when the target arrives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::reference::TagOrDigest;
use oci::{Digest, RepositoryName, media_type as types};

use crate::collect::{self, Kind};
use crate::error::Error;
use crate::event::{self, NewEvent};
use crate::failpoint::failpoint;
use crate::model::{Actor, EventKind, PutManifest, PutOutcome, StoredManifest};
use crate::repository::{self, Place};
use crate::sql::{Body, Db, Row, Tx, WriteKind, statements};
use crate::tag::{self, Change, TagsOf, Target};
use crate::{audit, lease, pin, referrer, usage};

statements! {
    BY_TAG = "SELECT m.digest, m.media_type, m.body FROM repository r JOIN tag t ON t.repository_id = r.id \
              JOIN manifest m ON m.id = t.manifest_id WHERE r.name = $1 AND t.name = $2";
    BY_DIGEST = "SELECT m.digest, m.media_type, m.body FROM repository r \
                 JOIN manifest m ON m.repository_id = r.id WHERE r.name = $1 AND m.digest = $2";
    LEASE = "SELECT m.lease_until, CAST(CASE WHEN EXISTS (SELECT 1 FROM tag t WHERE t.manifest_id = m.id \
                     AND SUBSTR(t.name, 1, 7) <> 'sha256-' AND SUBSTR(t.name, 1, 7) <> 'sha512-') \
                 OR EXISTS (SELECT 1 FROM manifest_child c WHERE c.repository_id = m.repository_id \
                     AND c.digest = m.digest) THEN 1 ELSE 0 END AS BIGINT) AS referenced \
             FROM repository r JOIN manifest m ON m.repository_id = r.id WHERE r.name = $1 AND m.digest = $2";
    SHARE = "SELECT id FROM manifest WHERE repository_id = $1 AND digest = $2 {for key share}";
    HOLD = "SELECT id FROM manifest WHERE repository_id = $1 AND digest = $2 {for no key update}";
    TAKE = "SELECT id, media_type, artifact_type, subject, size FROM manifest \
            WHERE repository_id = $1 AND digest = $2 {for update}";
    TAKE_ROW = "SELECT id, media_type, artifact_type, subject, size, digest FROM manifest WHERE id = $1 {for update}";
    ADD = "INSERT INTO manifest (id, repository_id, digest, media_type, artifact_type, subject, size, body, \
               lease_until, pushed_by, created_at) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) \
           ON CONFLICT (repository_id, digest) DO UPDATE SET lease_until = \
               CASE WHEN manifest.lease_until < excluded.lease_until \
                    THEN excluded.lease_until ELSE manifest.lease_until END, \
               size = excluded.size, \
               body = CASE WHEN manifest.body = excluded.body THEN manifest.body ELSE excluded.body END \
           RETURNING id";
    ADD_BLOB = "INSERT INTO manifest_blob (manifest_id, repository_id, digest, blob_id) \
                VALUES ($1, $2, $3, $4) ON CONFLICT (manifest_id, digest) DO NOTHING";
    ADD_CHILD = "INSERT INTO manifest_child (manifest_id, repository_id, digest, child_id) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (manifest_id, digest) DO NOTHING";
    FILL_BLOB = "UPDATE manifest_blob SET blob_id = $3 \
                 WHERE repository_id = $1 AND digest = $2 AND blob_id IS NULL";
    FILL_CHILD = "UPDATE manifest_child SET child_id = $3 \
                  WHERE repository_id = $1 AND digest = $2 AND child_id IS NULL";
    BLOB_NAMED = "SELECT manifest_id FROM manifest_blob WHERE repository_id = $1 AND digest = $2 LIMIT 1";
    CHILD_NAMED = "SELECT manifest_id FROM manifest_child WHERE repository_id = $1 AND digest = $2 LIMIT 1";
    BLOB_EDGES = "SELECT digest FROM manifest_blob WHERE manifest_id = $1 ORDER BY digest";
    CHILD_EDGES = "SELECT digest FROM manifest_child WHERE manifest_id = $1 ORDER BY digest";
    REMOVE = "DELETE FROM manifest WHERE id = $1";
    MEDIA_TYPE = "SELECT media_type FROM manifest WHERE id = $1";
    DIGEST = "SELECT digest FROM manifest WHERE id = $1";
    BODY = "SELECT body FROM manifest WHERE id = $1";
    ID = "SELECT id FROM manifest WHERE repository_id = $1 AND digest = $2";
}

/// Reads a manifest with one query.
pub(crate) async fn read(
    db: &Db,
    repository: &RepositoryName,
    reference: &TagOrDigest,
) -> Result<Option<StoredManifest>, Error> {
    let mut rows = match reference {
        TagOrDigest::Tag(tag) => {
            db.read(&BY_TAG, &[repository.as_str().into(), tag.as_str().into()])
                .await?
        }
        TagOrDigest::Digest(digest) => {
            db.read(&BY_DIGEST, &[repository.as_str().into(), digest.into()])
                .await?
        }
    };
    rows.first_mut().map(stored).transpose()
}

fn stored(row: &mut Row) -> Result<StoredManifest, Error> {
    Ok(StoredManifest {
        digest: row.digest(0)?,
        media_type: row.text(1)?,
        body: Bytes::from(row.take_bytes(2)?),
    })
}

/// Keeps a manifest that a pusher was told to exist (`I7`); `false` when it is gone.
pub(crate) async fn renew(
    db: &Db,
    clock: &crate::clock::Clock,
    repository: &RepositoryName,
    digest: &Digest,
    lease: Duration,
) -> Result<bool, Error> {
    let rows = db
        .read(&LEASE, &[repository.as_str().into(), digest.into()])
        .await?;
    let Some(row) = rows.first() else {
        return Ok(false);
    };
    if row.i64(1)? == 1 || row.time(0)? >= clock.now().plus(lease / 2) {
        return Ok(true);
    }
    db.write(lease::Renew {
        repository: repository.clone(),
        digest: digest.clone(),
        lease,
        kind: lease::Renewed::Manifest,
    })
    .await
}

/// The transaction of a PUT.
pub(crate) struct Put {
    pub(crate) put: Arc<PutManifest>,
    pub(crate) lease: Duration,
    pub(crate) allow_sparse: bool,
}

/// Where an edge of a manifest points.
enum Edge {
    Blob(Option<i64>),
    Child(Option<i64>),
}

impl Body for Put {
    type Output = PutOutcome;

    async fn run(&self, tx: &mut Tx) -> Result<PutOutcome, Error> {
        let put = &*self.put;
        failpoint("manifest.before_transaction");
        let place = repository::ensure(tx, &put.repository).await?;
        let tags = tag::take_all(tx, place.repository, &put.tags).await?;
        let left = tags.left(&put.digest);
        let (edges, known) = self.references(tx, place, &left).await?;
        failpoint("manifest.after_references");

        let (now, fresh) = (tx.now(), tx.id());
        let until = now.plus(self.lease);
        let size = put.body.len() as u64;
        let artifact_type = put.view.listed_artifact_type();
        let id = tx
            .query_opt(
                &ADD,
                &[
                    fresh.into(),
                    place.repository.into(),
                    (&put.digest).into(),
                    (&put.view.media_type).into(),
                    artifact_type.into(),
                    put.view.subject.as_ref().map(|s| &s.digest).into(),
                    size.into(),
                    put.body.as_ref().into(),
                    until.into(),
                    (&put.actor.principal).into(),
                    now.into(),
                ],
            )
            .await?
            .ok_or_else(|| Error::Database("a manifest vanished".to_owned()))?
            .i64(0)?;
        let created = id == fresh;
        if !created && known != Some(id) {
            // Somebody else put it in since it was looked for.
            return Err(tx.again("the manifest"));
        }
        failpoint("manifest.after_row");

        let change = Change {
            place,
            repository: &put.repository,
            actor: &put.actor,
            lease: self.lease,
        };
        let target = Target {
            manifest: id,
            digest: &put.digest,
            size,
            view: &put.view,
        };
        let mut tag_events = Vec::new();
        tag::set(tx, &change, &target, tags, &mut tag_events).await?;
        failpoint("manifest.after_tags");

        let mut events = Vec::new();
        if created {
            for (digest, edge) in &edges {
                let (statement, target) = match edge {
                    Edge::Blob(target) => (&ADD_BLOB, *target),
                    Edge::Child(target) => (&ADD_CHILD, *target),
                };
                tx.execute(
                    statement,
                    &[
                        id.into(),
                        place.repository.into(),
                        digest.into(),
                        target.into(),
                    ],
                )
                .await?;
            }
            fill_child_edges(tx, place.repository, &put.digest, id).await?;
            referrer::subject_here(tx, place.repository, &put.digest).await?;
            usage::add(tx, place, size as i64, 1).await?;
            events.push(NewEvent {
                kind: EventKind::ManifestPushed,
                repository: put.repository.clone(),
                tag: None,
                digest: put.digest.clone(),
                previous: None,
                media_type: put.view.media_type.clone(),
                artifact_type: artifact_type.map(str::to_owned),
                subject: put.view.subject.as_ref().map(|s| s.digest.clone()),
            });
        }
        let subject =
            referrer::link_subject(tx, place.repository, &put.digest, size, &put.view).await?;
        collect::enqueue(tx, Kind::Manifest, place.repository, id, until);
        failpoint("manifest.after_edges");
        events.append(&mut tag_events);
        let event = event::write(tx, &events, &put.actor).await?;
        failpoint("manifest.after_event");
        let mut target = format!("{}@{}", put.repository.as_str(), put.digest);
        for write in &put.tags {
            target.push(' ');
            target.push_str(write.tag.as_str());
        }
        audit::allowed(tx, &put.actor, "push", target).await?;
        failpoint("manifest.after_audit");
        Ok(PutOutcome {
            subject,
            created,
            event,
        })
    }
}

impl Put {
    /// Looks up and locks all that the manifest names (`I3`, `I4`), the manifests that lose a tag to it, whose leases
    /// are renewed (`I7`), and the manifest itself, whose row id is told when it is there: manifests in the order of
    /// the digests, then blobs.
    async fn references(
        &self,
        tx: &mut Tx,
        place: Place,
        left: &BTreeSet<Digest>,
    ) -> Result<(BTreeMap<Digest, Edge>, Option<i64>), Error> {
        let view = &self.put.view;
        // What is named: as a blob or as a child, and whether its absence is legal. A digest that is named
        // twice must be there when one of its names demands it.
        let mut named = BTreeMap::<&Digest, (bool, bool)>::new();
        for blob in view.blobs() {
            let entry = named.entry(&blob.digest).or_insert((false, true));
            entry.1 &= blob.is_foreign();
        }
        for child in view.children() {
            let entry = named.entry(&child.digest).or_insert((true, true));
            entry.1 = false;
        }
        let unsure: BTreeSet<_> = view
            .children()
            .filter(|child| !types::is_manifest(&child.media_type))
            .map(|child| &child.digest)
            .collect();
        let own = &self.put.digest;
        let children = named.iter().filter(|(_, (is_child, _))| *is_child);
        let mut manifests: BTreeSet<&Digest> = children.map(|(digest, _)| *digest).collect();
        manifests.extend(left);
        manifests.insert(own);
        let mut found = BTreeMap::new();
        for digest in manifests {
            if left.contains(digest) {
                lease::after_edge_to_manifest(tx, place.repository, digest, self.lease).await?;
            }
            let statement = if digest == own { &HOLD } else { &SHARE };
            let key = [place.repository.into(), digest.into()];
            if (digest == own || named.contains_key(digest))
                && let Some(row) = tx.query_opt(statement, &key).await?
            {
                found.insert(digest, row.i64(0)?);
            }
        }
        let mut edges = BTreeMap::new();
        let mut missing = Vec::new();
        for (digest, (is_child, may_miss)) in named {
            let edge = match found.get(digest) {
                Some(child) if is_child => Edge::Child(Some(*child)),
                // An index may name content that is no manifest; then it is a blob.
                None if is_child && unsure.contains(digest) => {
                    match held_blob(tx, place, digest).await? {
                        Some(blob) => Edge::Blob(Some(blob)),
                        None => Edge::Child(None),
                    }
                }
                None if is_child => Edge::Child(None),
                _ => Edge::Blob(held_blob(tx, place, digest).await?),
            };
            if matches!(edge, Edge::Blob(None) | Edge::Child(None))
                && !may_miss
                && !self.allow_sparse
            {
                missing.push(digest.clone());
            }
            edges.insert(digest.clone(), edge);
        }
        if missing.is_empty() {
            Ok((edges, found.get(own).copied()))
        } else {
            Err(Error::MissingReferences(missing))
        }
    }
}

async fn held_blob(tx: &mut Tx, place: Place, digest: &Digest) -> Result<Option<i64>, Error> {
    let held = lease::find_held(tx, place.repository, digest).await?;
    Ok(held.filter(|held| held.sound).map(|held| held.blob))
}

/// Deletes a manifest with its tags.
pub(crate) struct Delete {
    pub(crate) repository: RepositoryName,
    pub(crate) digest: Digest,
    pub(crate) actor: Actor,
    pub(crate) lease: Duration,
}

impl Body for Delete {
    type Output = ();
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let unknown = || Error::ManifestUnknown(self.digest.to_string());
        let place = repository::find(tx, &self.repository)
            .await?
            .ok_or_else(unknown)?;
        let key = [place.repository.into(), (&self.digest).into()];
        let id = id(tx, place.repository, &self.digest).await?;
        let tags = tag::take_of(tx, id.ok_or_else(unknown)?).await?;
        let row = tx.query_opt(&TAKE, &key).await?.ok_or_else(unknown)?;
        // A new statement after the lock: it sees every edge that was committed before it was granted.
        if tx.query_opt(&CHILD_NAMED, &key).await?.is_some() {
            return Err(Error::ManifestInUse(self.digest.clone()));
        }
        let doomed = Doomed::read(&row, self.digest.clone())?;
        // I19: what somebody pins stays.
        pin::refuse(tx, doomed.id, &self.digest).await?;
        let change = Change {
            place,
            repository: &self.repository,
            actor: &self.actor,
            lease: self.lease,
        };
        remove(tx, &change, &doomed, tags).await?;
        let target = format!("{}@{}", self.repository.as_str(), self.digest);
        audit::allowed(tx, &self.actor, "manifest.delete", target).await
    }
}

/// A manifest that is being deleted. Its row is locked.
pub(crate) struct Doomed {
    id: i64,
    media_type: String,
    artifact_type: Option<String>,
    pub(crate) subject: Option<Digest>,
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

impl Doomed {
    fn read(row: &Row, digest: Digest) -> Result<Self, Error> {
        Ok(Self {
            id: row.i64(0)?,
            media_type: row.text(1)?,
            artifact_type: row.opt_text(2)?,
            subject: row.opt_digest(3)?,
            size: row.u64(4)?,
            digest,
        })
    }
}

/// Locks a manifest against everybody who wants to name it.
pub(crate) async fn take(tx: &mut Tx, manifest: i64) -> Result<Option<Doomed>, Error> {
    tx.query_opt(&TAKE_ROW, &[manifest.into()])
        .await?
        .map(|row| Doomed::read(&row, row.digest(5)?))
        .transpose()
}

/// Deletes a manifest with its tags, which are locked as it is, and its edges. What these led to is kept for the time of a
/// lease (`I7`) and then looked at. The holds are locked before the edges go.
pub(crate) async fn remove(
    tx: &mut Tx,
    change: &Change<'_>,
    doomed: &Doomed,
    tags: TagsOf,
) -> Result<(), Error> {
    let repository = change.place.repository;
    let Doomed { id, digest, .. } = doomed;
    let mut events = Vec::new();
    let blobs = digests(&tx.query(&BLOB_EDGES, &[(*id).into()]).await?)?;
    let mut manifests = digests(&tx.query(&CHILD_EDGES, &[(*id).into()]).await?)?;
    manifests.extend(referrer::of_subject(tx, repository, digest).await?);
    manifests.sort();
    manifests.dedup();
    for digest in &manifests {
        lease::after_edge_below(tx, repository, digest, change.lease).await?;
    }
    for digest in &blobs {
        lease::after_edge_to_blob(tx, repository, digest, change.lease).await?;
    }
    let manifest = (*id, digest, doomed.media_type.as_str());
    tag::remove_all(tx, change, tags, manifest, &mut events).await?;
    referrer::subject_gone(tx, repository, digest).await?;
    referrer::remove(tx, repository, digest).await?;
    failpoint("delete.before_rows");
    tx.execute(&REMOVE, &[(*id).into()]).await?;
    failpoint("delete.after_rows");
    usage::add(tx, change.place, -(doomed.size as i64), -1).await?;
    events.push(NewEvent {
        kind: EventKind::ManifestDeleted,
        repository: change.repository.clone(),
        tag: None,
        digest: digest.clone(),
        previous: None,
        media_type: doomed.media_type.clone(),
        artifact_type: doomed.artifact_type.clone(),
        subject: doomed.subject.clone(),
    });
    event::write(tx, &events, change.actor).await?;
    collect::forget(tx, Kind::Manifest, repository, *id);
    Ok(())
}

fn digests(rows: &[Row]) -> Result<Vec<Digest>, Error> {
    rows.iter().map(|row| row.digest(0)).collect()
}

/// The row of a manifest, locked so that nobody removes it before the transaction ends.
pub(crate) async fn share(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
) -> Result<Option<i64>, Error> {
    tx.query_opt(&SHARE, &[repository.into(), digest.into()])
        .await?
        .map(|row| row.i64(0))
        .transpose()
}

/// Fills the edges that named a blob before it was there.
pub(crate) async fn fill_blob_edges(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    blob: i64,
) -> Result<(), Error> {
    tx.execute(&FILL_BLOB, &[repository.into(), digest.into(), blob.into()])
        .await
        .map(drop)
}

/// Fills the edges that named a manifest before it was there.
pub(crate) async fn fill_child_edges(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    manifest: i64,
) -> Result<(), Error> {
    tx.execute(
        &FILL_CHILD,
        &[repository.into(), digest.into(), manifest.into()],
    )
    .await
    .map(drop)
}

/// Tells whether a manifest of the repository names this blob.
pub(crate) async fn names_blob(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
) -> Result<bool, Error> {
    Ok(tx
        .query_opt(&BLOB_NAMED, &[repository.into(), digest.into()])
        .await?
        .is_some())
}

pub(crate) async fn media_type(tx: &mut Tx, manifest: i64) -> Result<String, Error> {
    tx.query_opt(&MEDIA_TYPE, &[manifest.into()])
        .await?
        .map_or_else(|| Ok(String::new()), |row| row.text(0))
}

pub(crate) async fn digest(tx: &mut Tx, manifest: i64) -> Result<Digest, Error> {
    tx.query_opt(&DIGEST, &[manifest.into()])
        .await?
        .ok_or_else(|| Error::Database("a tag points to no manifest".to_owned()))?
        .digest(0)
}

pub(crate) async fn id(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
) -> Result<Option<i64>, Error> {
    tx.query_opt(&ID, &[repository.into(), digest.into()])
        .await?
        .map(|row| row.i64(0))
        .transpose()
}

pub(crate) async fn body(tx: &mut Tx, manifest: i64) -> Result<Vec<u8>, Error> {
    tx.query_opt(&BODY, &[manifest.into()])
        .await?
        .map_or_else(|| Ok(Vec::new()), |row| row.bytes(0))
}
