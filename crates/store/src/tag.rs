//! Tags: the one room that writes them.
//!
//! Every route that creates, moves or deletes a tag passes [`set`] or [`remove`] inside the transaction of
//! its change, with what may be there before (`I13`). Each move is kept as history, raises the generation
//! and is an event. Gates on moves belong here and nowhere else.

use std::collections::BTreeSet;
use std::time::Duration;

use oci::{Digest, Manifest, RepositoryName, Tag};

use crate::error::Error;
use crate::event::{self, NewEvent};
use crate::failpoint::failpoint;
use crate::model::{Actor, EventKind, Expected, TagMove, TagState, TagWrite};
use crate::repository::{self, Place};
use crate::sql::{Body, Db, Tx, WriteKind, statements};
use crate::{audit, lease, manifest, referrer};

statements! {
    TAKE = "SELECT manifest_id, generation FROM tag WHERE repository_id = $1 AND name = $2 {for update}";
    ADD = "INSERT INTO tag (repository_id, name, manifest_id, generation, updated_at, updated_by) \
           VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (repository_id, name) DO NOTHING RETURNING generation";
    MOVE = "UPDATE tag SET manifest_id = $3, generation = $4, updated_at = $5, updated_by = $6 \
            WHERE repository_id = $1 AND name = $2";
    REMOVE = "DELETE FROM tag WHERE repository_id = $1 AND name = $2";
    LAST_GENERATION = "SELECT COALESCE(MAX(generation), 0) AS generation FROM tag_event \
                       WHERE repository_id = $1 AND name = $2";
    ADD_HISTORY = "INSERT INTO tag_event (repository_id, name, generation, digest, actor, request, at) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7)";
    OF_MANIFEST = "SELECT name FROM tag WHERE manifest_id = $1 ORDER BY name";
    ALSO_OF = "SELECT name FROM tag WHERE repository_id = $1 AND manifest_id = $2 AND name IN ($3, $4, $5, $6) LIMIT 1";
    SOME_OF = "SELECT name FROM tag WHERE manifest_id = $1 LIMIT 100";
    TAKE_OF = "SELECT name, generation FROM tag WHERE manifest_id = $1 ORDER BY name {for update}";
    FIND = "SELECT m.digest, t.generation, t.updated_at FROM repository r \
            JOIN tag t ON t.repository_id = r.id JOIN manifest m ON m.id = t.manifest_id \
            WHERE r.name = $1 AND t.name = $2";
    LIST = "SELECT t.name FROM repository r JOIN tag t ON t.repository_id = r.id \
            WHERE r.name = $1 AND t.name > $2 ORDER BY t.name LIMIT $3";
    HISTORY = "SELECT e.generation, e.digest, e.actor, e.at FROM repository r \
               JOIN tag_event e ON e.repository_id = r.id \
               WHERE r.name = $1 AND e.name = $2 AND e.generation < $3 \
               ORDER BY e.generation DESC LIMIT $4";
    COUNT = "SELECT COUNT(*) FROM tag";
}

/// What a tag is set to.
pub(crate) struct Target<'a> {
    pub(crate) manifest: i64,
    pub(crate) digest: &'a Digest,
    pub(crate) size: u64,
    pub(crate) view: &'a Manifest,
}

/// Who changes which repository, and how long the lease of what is left behind lasts.
pub(crate) struct Change<'a> {
    pub(crate) place: Place,
    pub(crate) repository: &'a RepositoryName,
    pub(crate) actor: &'a Actor,
    pub(crate) lease: Duration,
}

/// The tags that a transaction is about to set, locked, each with where it points.
pub(crate) struct Taken<'a>(Vec<(&'a TagWrite, Option<Current>)>);

/// Locks tags that are to be set, in the order of their names. They come before every manifest in the order of locks
/// ([`crate::sql`]), so this is called before one is locked. A tag that is not there cannot be locked.
pub(crate) async fn take_all<'a>(
    tx: &mut Tx,
    repository: i64,
    writes: &'a [TagWrite],
) -> Result<Taken<'a>, Error> {
    let mut sorted: Vec<_> = writes.iter().collect();
    sorted.sort_by(|a, b| a.tag.cmp(&b.tag));
    sorted.dedup_by(|next, first| next.tag == first.tag);
    let mut taken = Vec::with_capacity(sorted.len());
    for write in sorted {
        taken.push((write, take(tx, repository, &write.tag).await?));
    }
    Ok(Taken(taken))
}

impl Taken<'_> {
    /// The manifests that lose a tag when all these are set to `target`. The caller renews their leases (`I7`).
    pub(crate) fn left(&self, target: &Digest) -> BTreeSet<Digest> {
        let digests = self.0.iter().filter_map(|(_, current)| current.as_ref());
        let digests = digests.map(|current| &current.digest);
        digests
            .filter(|digest| *digest != target)
            .cloned()
            .collect()
    }
}

/// Creates or moves tags that [`take_all`] locked. Nothing happens to one, and no right is needed for it, when it is
/// there already.
///
/// An evidence tag needs no right beyond the push: it may be created, and moved to a manifest that names all
/// that the old one names. Only a caller who may overwrite tags can make it smaller.
pub(crate) async fn set(
    tx: &mut Tx,
    change: &Change<'_>,
    target: &Target<'_>,
    taken: Taken<'_>,
    events: &mut Vec<NewEvent>,
) -> Result<(), Error> {
    let mut moved = Vec::new();
    for (write, current) in taken.0 {
        failpoint("tag.before_set");
        if write_row(tx, change, target, write, current.as_ref()).await? {
            moved.push(&write.tag);
            events.push(NewEvent {
                kind: EventKind::TagUpdated,
                repository: change.repository.clone(),
                tag: Some(write.tag.clone()),
                digest: target.digest.clone(),
                previous: current.map(|current| current.digest),
                media_type: target.view.media_type.clone(),
                artifact_type: target.view.listed_artifact_type().map(str::to_owned),
                subject: target.view.subject.as_ref().map(|s| s.digest.clone()),
            });
        }
    }
    // The rows of referrers come after those of all tags.
    let repository = change.place.repository;
    for tag in moved {
        referrer::link_tag(tx, repository, tag, target.digest, target.size, target.view).await?;
    }
    Ok(())
}

/// Writes the row and the history of one tag; `false` when it is there already.
async fn write_row(
    tx: &mut Tx,
    change: &Change<'_>,
    target: &Target<'_>,
    write: &TagWrite,
    current: Option<&Current>,
) -> Result<bool, Error> {
    let tag = &write.tag;
    let repository = change.place.repository;
    let evidence = tag.subject().is_some();
    check(&write.expected, tag, current)?;
    let generation = match current {
        Some(current) if current.digest == *target.digest => return Ok(false),
        Some(current) => {
            let allowed = write.may_overwrite
                || (evidence && grows(tx, current.manifest, target.view).await?);
            if !allowed {
                return Err(Error::TagImmutable { tag: tag.clone() });
            }
            current.generation + 1
        }
        None => {
            if !write.may_create && !evidence {
                return Err(Error::TagCreateDenied { tag: tag.clone() });
            }
            last_generation(tx, repository, tag).await? + 1
        }
    };
    let now = tx.now();
    let values = [
        repository.into(),
        tag.as_str().into(),
        target.manifest.into(),
        generation.into(),
        now.into(),
        (&change.actor.principal).into(),
    ];
    if current.is_some() {
        tx.execute(&MOVE, &values).await?;
    } else if tx.query_opt(&ADD, &values).await?.is_none() {
        // Somebody else created it since it was looked for.
        return Err(tx.again("the tag"));
    }
    failpoint("tag.after_row");
    add_history(tx, change, tag, generation, Some(target.digest)).await?;
    failpoint("tag.after_history");
    Ok(true)
}

/// The tags of a manifest that is to be deleted, locked before the manifest is.
#[derive(Default)]
pub(crate) struct TagsOf(Vec<(Tag, i64)>);

/// Locks every tag of a manifest, in the order of their names.
pub(crate) async fn take_of(tx: &mut Tx, manifest: i64) -> Result<TagsOf, Error> {
    let rows = tx.query(&TAKE_OF, &[manifest.into()]).await?;
    let tags = rows.iter().map(|row| Ok((row.parse(0)?, row.i64(1)?)));
    tags.collect::<Result<_, Error>>().map(TagsOf)
}

/// Removes the tags of a manifest that is being deleted. Its row is locked by now, so no other tag can come to it; one
/// that came before makes the transaction begin again.
pub(crate) async fn remove_all(
    tx: &mut Tx,
    change: &Change<'_>,
    tags: TagsOf,
    manifest: (i64, &Digest, &str),
    events: &mut Vec<NewEvent>,
) -> Result<(), Error> {
    let (manifest, digest, media_type) = manifest;
    let locked: BTreeSet<_> = tags.0.iter().map(|(tag, _)| tag).collect();
    for tag in names_of(tx, manifest).await? {
        if !locked.contains(&tag) {
            return Err(tx.again("a tag of the manifest"));
        }
    }
    for (tag, generation) in &tags.0 {
        let current = Current {
            manifest,
            generation: *generation,
            digest: digest.clone(),
        };
        remove(tx, change, tag, &current, media_type, events).await?;
    }
    Ok(())
}

/// A tag that is to be removed, as it was judged.
#[derive(Clone, Debug)]
pub(crate) struct Judged {
    pub(crate) tag: Tag,
    pub(crate) generation: i64,
    pub(crate) digest: Digest,
}

/// Removes tags that are still the ones that were judged; those that moved or are gone are told, and stay.
pub(crate) async fn remove_unmoved<'a>(
    tx: &mut Tx,
    change: &Change<'_>,
    judged: &[&'a Judged],
    events: &mut Vec<NewEvent>,
) -> Result<Vec<&'a Judged>, Error> {
    let repository = change.place.repository;
    let mut sorted = judged.to_vec();
    sorted.sort_by(|a, b| a.tag.cmp(&b.tag));
    let (mut doomed, mut moved) = (Vec::new(), Vec::new());
    for judged in sorted {
        let current = take(tx, repository, &judged.tag).await?;
        match current {
            Some(current)
                if current.generation == judged.generation && current.digest == judged.digest =>
            {
                doomed.push((judged, current));
            }
            _ => moved.push(judged),
        }
    }
    let manifests: BTreeSet<_> = doomed.iter().map(|(judged, _)| &judged.digest).collect();
    for digest in manifests {
        // I7: the tag was an edge of the manifest.
        lease::after_edge_to_manifest(tx, repository, digest, change.lease).await?;
    }
    for (judged, current) in &doomed {
        let media_type = manifest::media_type(tx, current.manifest).await?;
        remove(tx, change, &judged.tag, current, &media_type, events).await?;
    }
    Ok(moved)
}

/// The tags that point to a manifest.
async fn names_of(tx: &mut Tx, manifest: i64) -> Result<Vec<Tag>, Error> {
    tx.query(&OF_MANIFEST, &[manifest.into()])
        .await?
        .iter()
        .map(|row| row.parse(0))
        .collect()
}

/// Some of the tags that point to a manifest.
pub(crate) async fn some_of(tx: &mut Tx, manifest: i64) -> Result<Vec<Tag>, Error> {
    tx.query(&SOME_OF, &[manifest.into()])
        .await?
        .iter()
        .map(|row| row.parse(0))
        .collect()
}

/// Removes the row of a tag that is locked, and so is its manifest, whose lease the caller renewed.
async fn remove(
    tx: &mut Tx,
    change: &Change<'_>,
    tag: &Tag,
    current: &Current,
    media_type: &str,
    events: &mut Vec<NewEvent>,
) -> Result<(), Error> {
    failpoint("delete.before_rows");
    let repository = change.place.repository;
    tx.execute(&REMOVE, &[repository.into(), tag.as_str().into()])
        .await?;
    add_history(tx, change, tag, current.generation + 1, None).await?;
    if tag.subject().is_some() {
        // The other tags that make the same edge are known by name: a manifest may have any number of others.
        let stem = tag.as_str().split('.').next().unwrap_or_default();
        let mut also = vec![repository.into(), current.manifest.into()];
        also.extend(["", ".sig", ".att", ".sbom"].map(|end| format!("{stem}{end}").into()));
        if tx.query_opt(&ALSO_OF, &also).await?.is_none() {
            referrer::unlink_tag(tx, repository, tag, &current.digest).await?;
        }
    }
    failpoint("delete.after_rows");
    events.push(NewEvent {
        kind: EventKind::TagDeleted,
        repository: change.repository.clone(),
        tag: Some(tag.clone()),
        digest: current.digest.clone(),
        previous: None,
        media_type: media_type.to_owned(),
        artifact_type: None,
        subject: None,
    });
    Ok(())
}

/// Deletes one tag by name.
pub(crate) struct Delete {
    pub(crate) repository: RepositoryName,
    pub(crate) tag: Tag,
    pub(crate) expected: Expected,
    pub(crate) actor: Actor,
    pub(crate) lease: Duration,
}

impl Body for Delete {
    type Output = ();
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let unknown = || Error::ManifestUnknown(self.tag.as_str().to_owned());
        let Some(place) = repository::find(tx, &self.repository).await? else {
            check(&self.expected, &self.tag, None)?;
            return Err(unknown());
        };
        let current = take(tx, place.repository, &self.tag).await?;
        check(&self.expected, &self.tag, current.as_ref())?;
        let current = current.ok_or_else(unknown)?;
        let change = Change {
            place,
            repository: &self.repository,
            actor: &self.actor,
            lease: self.lease,
        };
        // I7: the tag was an edge of the manifest.
        lease::after_edge_to_manifest(tx, place.repository, &current.digest, self.lease).await?;
        let media_type = manifest::media_type(tx, current.manifest).await?;
        let mut events = Vec::new();
        remove(tx, &change, &self.tag, &current, &media_type, &mut events).await?;
        event::write(tx, &events, &self.actor).await?;
        let target = format!("{}:{}", self.repository.as_str(), self.tag.as_str());
        audit::allowed(tx, &self.actor, "tag.delete", target).await
    }
}

struct Current {
    manifest: i64,
    generation: i64,
    digest: Digest,
}

/// Reads and locks a tag. Where it points is read in a new statement after the lock: a statement that had to
/// wait sees the moved row, but not yet the manifest that came with the move.
async fn take(tx: &mut Tx, repository: i64, tag: &Tag) -> Result<Option<Current>, Error> {
    let row = tx
        .query_opt(&TAKE, &[repository.into(), tag.as_str().into()])
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let manifest = row.i64(0)?;
    Ok(Some(Current {
        manifest,
        generation: row.i64(1)?,
        digest: manifest::digest(tx, manifest).await?,
    }))
}

fn check(expected: &Expected, tag: &Tag, current: Option<&Current>) -> Result<(), Error> {
    let met = match (expected, current) {
        (Expected::Any, _) | (Expected::Absent, None) => true,
        (Expected::Digest(digests), Some(current)) => digests.contains(&current.digest),
        (Expected::Absent, Some(_)) | (Expected::Digest(_), None) => false,
    };
    if met {
        return Ok(());
    }
    Err(Error::Precondition {
        tag: tag.clone(),
        actual: current.map(|current| current.digest.clone()),
    })
}

/// Tells whether the new manifest names every layer and child of the old one.
async fn grows(tx: &mut Tx, old: i64, new: &Manifest) -> Result<bool, Error> {
    let body = manifest::body(tx, old).await?;
    let Ok(old) = Manifest::parse(&body, "") else {
        return Ok(false);
    };
    let new = entries(new);
    Ok(entries(&old).iter().all(|digest| new.contains(digest)))
}

fn entries(view: &Manifest) -> BTreeSet<Digest> {
    view.layers
        .iter()
        .flatten()
        .chain(view.children())
        .map(|entry| entry.digest.clone())
        .collect()
}

/// Generations go on after a deletion, so a name and a generation mean one move for ever.
async fn last_generation(tx: &mut Tx, repository: i64, tag: &Tag) -> Result<i64, Error> {
    tx.query_opt(&LAST_GENERATION, &[repository.into(), tag.as_str().into()])
        .await?
        .map_or(Ok(0), |row| row.i64(0))
}

async fn add_history(
    tx: &mut Tx,
    change: &Change<'_>,
    tag: &Tag,
    generation: i64,
    digest: Option<&Digest>,
) -> Result<(), Error> {
    let now = tx.now();
    tx.execute(
        &ADD_HISTORY,
        &[
            change.place.repository.into(),
            tag.as_str().into(),
            generation.into(),
            digest.into(),
            (&change.actor.principal).into(),
            (&change.actor.request).into(),
            now.into(),
        ],
    )
    .await
    .map(drop)
}

pub(crate) async fn find(
    db: &Db,
    repository: &RepositoryName,
    tag: &Tag,
) -> Result<Option<TagState>, Error> {
    let rows = db
        .read(&FIND, &[repository.as_str().into(), tag.as_str().into()])
        .await?;
    rows.first()
        .map(|row| {
            Ok(TagState {
                digest: row.digest(0)?,
                generation: row.i64(1)?,
                updated_at: row.time(2)?,
            })
        })
        .transpose()
}

/// One query for a page; a second one only tells an unknown repository from an empty page.
pub(crate) async fn list(
    db: &Db,
    name: &RepositoryName,
    last: Option<&str>,
    limit: usize,
) -> Result<Vec<String>, Error> {
    let rows = db
        .scan(
            &LIST,
            vec![
                name.as_str().into(),
                last.unwrap_or_default().into(),
                limit.into(),
            ],
        )
        .await?;
    if rows.is_empty() && !repository::has_content(db, name).await? {
        return Err(Error::RepositoryUnknown(name.clone()));
    }
    rows.iter().map(|row| row.text(0)).collect()
}

pub(crate) async fn history(
    db: &Db,
    repository: &RepositoryName,
    tag: &Tag,
    before: Option<i64>,
    limit: usize,
) -> Result<Vec<TagMove>, Error> {
    db.scan(
        &HISTORY,
        vec![
            repository.as_str().into(),
            tag.as_str().into(),
            before.unwrap_or(i64::MAX).into(),
            limit.into(),
        ],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(TagMove {
            generation: row.i64(0)?,
            digest: row.opt_digest(1)?,
            actor: row.text(2)?,
            at: row.time(3)?,
        })
    })
    .collect()
}

pub(crate) async fn count(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT, Vec::new()).await?)
}
