//! One candidate, one transaction.
//!
//! 1. lock the candidate's own row;
//! 2. in a new statement, look for what keeps it;
//! 3. delete the row and its edges, or nothing;
//! 4. renew the lease of what it pointed to and put that into the queue (`I7`);
//! 5. take the candidate out of the queue: what is gone for good, what stays only when nobody put it in again.

use oci::Digest;

use super::liveness::{self, Fate};
use super::queue::{self, Candidate, Kind};
use super::settings::GcOptions;
use super::{outbox, repository as whole};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::Actor;
use crate::sql::{Body, Tx, WriteKind};
use crate::tag::{self, Change, TagsOf};
use crate::{audit, blob, lease, manifest, pin, repository};

/// What the collector needs to know to judge.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) gc: GcOptions,
    pub(super) lease: std::time::Duration,
}

/// What came of a candidate.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// Something keeps it, or it was gone already.
    Left,
    /// It is looked at again later.
    Later,
    /// It goes in steps, and one was made.
    Step,
    /// It was deleted.
    Collected(Collected),
}

/// What was deleted.
#[derive(Clone, Debug)]
pub(super) struct Collected {
    pub(super) repository: Option<String>,
    pub(super) digest: Option<Digest>,
    /// Bytes of content that go with it.
    pub(super) bytes: u64,
    pub(super) reason: &'static str,
}

/// The transaction of one candidate.
pub(super) struct Look {
    pub(super) rules: Rules,
    pub(super) candidate: Candidate,
}

impl Body for Look {
    type Output = Outcome;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Outcome, Error> {
        look(tx, &self.rules, &self.candidate).await
    }
}

/// Looks at a candidate and deletes it when nothing keeps it (`I4`).
pub(super) async fn look(
    tx: &mut Tx,
    rules: &Rules,
    candidate: &Candidate,
) -> Result<Outcome, Error> {
    match candidate.kind {
        Kind::Repository => whole::step(tx, candidate).await,
        Kind::Manifest => look_at_manifest(tx, rules, candidate).await,
        Kind::RepositoryBlob => look_at_pair(tx, candidate).await,
        Kind::Blob => look_at_blob(tx, rules, candidate).await,
        // An upload is claimed in the process that writes it: `super::worker::expire_uploads`.
        Kind::Upload => Ok(Outcome::Left),
    }
}

async fn look_at_manifest(
    tx: &mut Tx,
    rules: &Rules,
    candidate: &Candidate,
) -> Result<Outcome, Error> {
    failpoint("collect.before_lock");
    // Tags come first in the order of locks. One that is a root keeps it, so all the rest matters only without one.
    let some = tag::some_of(tx, candidate.target).await?;
    let tags = if some.iter().any(liveness::is_root) {
        TagsOf::default()
    } else {
        tag::take_of(tx, candidate.target).await?
    };
    let doomed = manifest::take(tx, candidate.target).await?;
    failpoint("collect.after_lock");
    let (Some(doomed), Some(known)) = (doomed, repository::by_id(tx, candidate.repository).await?)
    else {
        return Ok(gone_already(tx, candidate));
    };
    if known.deleted {
        // Its repository takes it along.
        return Ok(left(tx, candidate));
    }
    let place = known.place;
    let id = candidate.target;
    match liveness::fate(tx, rules, place.repository, id).await? {
        Fate::Kept => {
            manifest::fill_child_edges(tx, place.repository, &doomed.digest, id).await?;
            return Ok(left(tx, candidate));
        }
        Fate::Until(until) => return Ok(later(tx, candidate, until)),
        Fate::Above => return above_first(tx, candidate, &doomed.digest).await,
        Fate::Gone => {}
    }
    let actor = actor();
    let change = Change {
        place,
        repository: &known.name,
        actor: &actor,
        lease: rules.lease,
    };
    failpoint("collect.before_rows");
    // Pins that have ended still name the row.
    pin::refuse(tx, id, &doomed.digest).await?;
    manifest::remove(tx, &change, &doomed, tags).await?;
    failpoint("collect.after_rows");
    let name = known.name.as_str();
    audit::allowed(tx, &actor, "collect", format!("{name}@{}", doomed.digest)).await?;
    failpoint("collect.before_forget");
    Ok(Outcome::Collected(Collected {
        repository: Some(name.to_owned()),
        bytes: doomed.size,
        reason: if doomed.subject.is_some() {
            "its subject is gone, and no tag, pin, index or lease keeps it"
        } else {
            "no tag, pin, index, subject or lease keeps it"
        },
        digest: Some(doomed.digest),
    }))
}

/// Nothing keeps an index that names this manifest, which happens where a subject closes a cycle: it must go first,
/// and then puts this one in again.
async fn above_first(
    tx: &mut Tx,
    candidate: &Candidate,
    digest: &Digest,
) -> Result<Outcome, Error> {
    let now = tx.now();
    let repository = candidate.repository;
    let parents = liveness::parents(tx, repository, digest, i64::MIN, MAX_PARENTS).await?;
    for parent in &parents {
        queue::enqueue(tx, Kind::Manifest, repository, *parent, now);
    }
    if parents.len() == MAX_PARENTS {
        Ok(later(tx, candidate, now.plus(MORE_PARENTS)))
    } else {
        Ok(left(tx, candidate))
    }
}

async fn look_at_pair(tx: &mut Tx, candidate: &Candidate) -> Result<Outcome, Error> {
    let (repository, blob) = (candidate.repository, candidate.target);
    failpoint("collect.before_lock");
    let pair = lease::take_pair(tx, repository, blob).await?;
    failpoint("collect.after_lock");
    let (Some((held, digest, leased)), Some(known)) =
        (pair, repository::by_id(tx, repository).await?)
    else {
        return Ok(gone_already(tx, candidate));
    };
    if known.deleted {
        return Ok(left(tx, candidate));
    }
    let now = tx.now();
    if leased > now {
        return Ok(later(tx, candidate, leased));
    }
    // By digest: an edge that came before the blob has no row id.
    if manifest::names_blob(tx, repository, &digest).await? {
        manifest::fill_blob_edges(tx, repository, &digest, blob).await?;
        return Ok(left(tx, candidate));
    }
    failpoint("collect.before_rows");
    lease::release(tx, known.place, held).await?;
    failpoint("collect.after_rows");
    queue::enqueue(tx, Kind::Blob, 0, blob, now);
    failpoint("collect.after_edges");
    queue::forget(tx, Kind::RepositoryBlob, repository, blob);
    Ok(Outcome::Collected(Collected {
        repository: Some(known.name.as_str().to_owned()),
        digest: Some(digest),
        bytes: 0,
        reason: "no manifest of the repository names it, and its lease is over",
    }))
}

async fn look_at_blob(tx: &mut Tx, rules: &Rules, candidate: &Candidate) -> Result<Outcome, Error> {
    failpoint("collect.before_lock");
    let taken = blob::take(tx, candidate.target).await?;
    failpoint("collect.after_lock");
    let Some(taken) = taken else {
        return Ok(gone_already(tx, candidate));
    };
    if lease::is_held(tx, candidate.target).await? {
        return Ok(left(tx, candidate));
    }
    failpoint("collect.before_rows");
    blob::remove(tx, candidate.target).await?;
    if let Some(key) = &taken.key {
        let due = tx.now().plus(rules.gc.grace());
        outbox::discard_blob(tx, key, taken.size, due).await?;
    }
    failpoint("collect.after_rows");
    queue::forget(tx, Kind::Blob, 0, candidate.target);
    Ok(Outcome::Collected(Collected {
        repository: None,
        digest: Some(taken.digest),
        bytes: taken.size,
        reason: "no repository holds it",
    }))
}

/// The row is gone, so nobody needs the candidate.
pub(super) fn gone_already(tx: &mut Tx, candidate: &Candidate) -> Outcome {
    queue::let_go(tx, candidate);
    Outcome::Left
}

fn left(tx: &mut Tx, candidate: &Candidate) -> Outcome {
    failpoint("collect.before_forget");
    queue::let_go(tx, candidate);
    Outcome::Left
}

fn later(tx: &mut Tx, candidate: &Candidate, until: Timestamp) -> Outcome {
    queue::later(tx, candidate, until);
    Outcome::Later
}

/// Who the collector is in history, events and the audit record.
pub(super) fn actor() -> Actor {
    Actor {
        principal: COLLECTOR.to_owned(),
        request: String::new(),
        address: String::new(),
    }
}

const COLLECTOR: &str = "system:collector";
/// Indexes of one manifest that are put into the queue at once, and when the next ones follow.
const MAX_PARENTS: usize = 1000;
const MORE_PARENTS: std::time::Duration = std::time::Duration::from_mins(1);
