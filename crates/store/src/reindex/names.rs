//! The names: manifests through the door that a push uses, then tags to where they were last.
//!
//! A manifest whose blob or child is lost is put in all the same and told of, so that the push that brings the rest is
//! small. A tag whose manifest is lost is not set: one that points elsewhere is worse than none.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci::{Digest, Manifest, RepositoryName, Tag, media_type as types};

use super::index::{Index, Move, parse};
use super::{
    ADD_HISTORY, ADD_TAG, BATCH, BLOB, IDENTIFY, PUSHED_AT, Progress, ReindexProgress, Reindexed,
};
use crate::error::Error;
use crate::export::record::Record;
use crate::export::shelf::Shelf;
use crate::model::{Actor, PutManifest};
use crate::sql::{Body, Db, Tx, WriteKind};
use crate::{lease, manifest, referrer, repository};

/// A manifest out of an export.
struct Found {
    repository: RepositoryName,
    digest: Digest,
    view: Manifest,
    body: Bytes,
    by: String,
    at: i64,
}

/// Puts the manifests in, with holds on the blobs that they name.
pub(super) async fn add_manifests(
    db: &Db,
    shelf: &Shelf,
    index: &Index,
    lease: Duration,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let mut by_part: BTreeMap<usize, HashSet<usize>> = BTreeMap::new();
    let mut of = 0;
    for line in index.manifests.values().flat_map(HashMap::values) {
        by_part.entry(line.part).or_default().insert(line.line);
        of += 1;
    }
    for (part, lines) in by_part {
        let mut batch = Vec::new();
        for (line, record) in index.records(shelf, part).await?.into_iter().enumerate() {
            if !lines.contains(&line) {
                continue;
            }
            match found(record) {
                Ok(found) => {
                    note_missing_children(index, &found, report);
                    batch.push(found);
                }
                Err(problem) => report.problems.push(problem),
            }
            if batch.len() >= BATCH {
                let manifests = std::mem::take(&mut batch).into();
                put(db, AddManifests { manifests, lease }, report).await?;
            }
        }
        let manifests = batch.into();
        put(db, AddManifests { manifests, lease }, report).await?;
        progress(ReindexProgress {
            step: "manifests",
            done: report.manifests,
            of,
        });
    }
    report.repositories = index
        .manifests
        .values()
        .filter(|held| !held.is_empty())
        .count() as u64;
    Ok(())
}

async fn put(db: &Db, body: AddManifests, report: &mut Reindexed) -> Result<(), Error> {
    report.manifests += body.manifests.len() as u64;
    report.problems.extend(db.write(body).await?);
    Ok(())
}

fn found(record: Record) -> Result<Found, String> {
    let Record::Manifest {
        repository,
        digest,
        media_type,
        body,
        hex,
        by,
        at,
    } = record
    else {
        return Err("a record of the exports is another one than before".to_owned());
    };
    let name = format!("manifest `{repository}@{digest}`");
    let bytes = match (body, hex) {
        (Some(text), _) => text.into_bytes(),
        (None, hex) => hex::decode(hex.unwrap_or_default()).unwrap_or_default(),
    };
    let digest: Digest = parse(&digest).map_err(|error| format!("{name}: {error}"))?;
    if !digest.matches(&bytes) {
        return Err(format!("the bytes of {name} are damaged"));
    }
    let view = Manifest::parse(&bytes, &media_type)
        .map_err(|error| format!("{name} cannot be read: {error}"))?;
    Ok(Found {
        repository: parse(&repository).map_err(|error| format!("{name}: {error}"))?,
        digest,
        view,
        body: bytes.into(),
        by,
        at,
    })
}

fn note_missing_children(index: &Index, found: &Found, report: &mut Reindexed) {
    let held = index.manifests.get(&found.repository);
    for child in found.view.children() {
        if types::is_manifest(&child.media_type)
            && !held.is_some_and(|held| held.contains_key(&child.digest))
        {
            report.problems.push(format!(
                "index `{}@{}` names `{}`, which is lost",
                found.repository.as_str(),
                found.digest,
                child.digest
            ));
        }
    }
}

struct AddManifests {
    manifests: Arc<[Found]>,
    lease: Duration,
}

impl Body for AddManifests {
    type Output = Vec<String>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<String>, Error> {
        let mut problems = Vec::new();
        for found in self.manifests.iter() {
            let place = repository::ensure(tx, &found.repository).await?;
            let blobs = found.view.blobs().map(|blob| (blob, !blob.is_foreign()));
            // An index may name content that is no manifest; then it is a blob.
            let others = found
                .view
                .children()
                .filter(|child| !types::is_manifest(&child.media_type))
                .map(|child| (child, false));
            for (entry, needed) in blobs.chain(others) {
                match tx.query_opt(&BLOB, &[(&entry.digest).into()]).await? {
                    Some(row) => {
                        lease::grant(
                            tx,
                            place,
                            &entry.digest,
                            row.i64(0)?,
                            row.u64(1)?,
                            self.lease,
                            &found.by,
                        )
                        .await?;
                    }
                    None if needed => problems.push(format!(
                        "manifest `{}@{}` names blob `{}`, whose bytes are lost; push it again",
                        found.repository.as_str(),
                        found.digest,
                        entry.digest
                    )),
                    None => {}
                }
            }
            let put = manifest::Put {
                put: Arc::new(PutManifest {
                    repository: found.repository.clone(),
                    digest: found.digest.clone(),
                    body: found.body.clone(),
                    view: found.view.clone(),
                    tags: Vec::new(),
                    actor: Actor {
                        principal: found.by.clone(),
                        request: String::new(),
                        address: String::new(),
                    },
                }),
                lease: self.lease,
                allow_sparse: true,
            };
            put.run(tx).await?;
            tx.execute(
                &PUSHED_AT,
                &[
                    place.repository.into(),
                    (&found.digest).into(),
                    found.at.into(),
                ],
            )
            .await?;
        }
        Ok(problems)
    }
}

/// Sets the tags to where they were last.
pub(super) async fn add_tags(
    db: &Db,
    index: &Index,
    progress: &Progress,
    report: &mut Reindexed,
) -> Result<(), Error> {
    let of = index.tags.values().map(BTreeMap::len).sum::<usize>() as u64;
    let mut done = 0;
    for (repository, tags) in &index.tags {
        let tags: Vec<(Tag, Move)> = tags
            .iter()
            .filter_map(|(tag, moves)| {
                let last = moves.iter().max_by_key(|one| one.generation)?;
                Some((tag.clone(), last.clone()))
            })
            .collect();
        for chunk in tags.chunks(BATCH) {
            let (set, problems) = db
                .write(AddTags {
                    repository: repository.clone(),
                    tags: chunk.to_vec(),
                })
                .await?;
            done += chunk.len() as u64;
            report.tags += set;
            report.problems.extend(problems);
            progress(ReindexProgress {
                step: "tags",
                done,
                of,
            });
        }
    }
    Ok(())
}

struct AddTags {
    repository: RepositoryName,
    tags: Vec<(Tag, Move)>,
}

impl Body for AddTags {
    type Output = (u64, Vec<String>);
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(u64, Vec<String>), Error> {
        let place = repository::ensure(tx, &self.repository).await?;
        let id = place.repository;
        let (mut set, mut problems) = (0, Vec::new());
        for (tag, last) in &self.tags {
            let mut generation = last.generation;
            let mut digest = None;
            if let Some(wanted) = &last.digest {
                let row = tx.query_opt(&IDENTIFY, &[id.into(), wanted.into()]).await?;
                if let Some(row) = row {
                    let name = tag.as_str().into();
                    let manifest = row.i64(0)?;
                    tx.execute(
                        &ADD_TAG,
                        &[
                            id.into(),
                            name,
                            manifest.into(),
                            generation.into(),
                            last.at.into(),
                            (&last.by).into(),
                        ],
                    )
                    .await?;
                    if tag.subject().is_some() {
                        let body = row.bytes(2)?;
                        if let Ok(view) = Manifest::parse(&body, &row.text(1)?) {
                            let size = body.len() as u64;
                            referrer::link_tag(tx, id, tag, wanted, size, &view).await?;
                        }
                    }
                    set += 1;
                    digest = Some(wanted);
                } else {
                    // A tag that points elsewhere is worse than one that is not there.
                    problems.push(format!(
                        "tag `{}:{}` pointed to `{wanted}`, which is lost; set it again",
                        self.repository.as_str(),
                        tag.as_str()
                    ));
                    generation += 1;
                }
            }
            // Generations go on, also those of a tag that is not there.
            tx.execute(
                &ADD_HISTORY,
                &[
                    id.into(),
                    tag.as_str().into(),
                    generation.into(),
                    digest.into(),
                    (&last.by).into(),
                    last.at.into(),
                ],
            )
            .await?;
        }
        Ok((set, problems))
    }
}
