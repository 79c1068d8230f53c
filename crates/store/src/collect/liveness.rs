//! What keeps a manifest.
//!
//! Roots are tags, pins and leases. A manifest lives when a root is reached from it by going up: from a child to the
//! indexes that name it, and from a referrer to its subject. Indexes alone can form no cycle, because a digest
//! cannot name itself, but subjects can close one (an index whose subject is one of its children; two evidence tags
//! that name each other), so the walk remembers where it was. Tags that have the form of evidence
//! (`sha256-….sig`) and of the referrers tag schema are no roots: they are edges of their subject.
//!
//! The walk reads rows above the candidate without locking them. That is enough: whoever takes a root or an edge away
//! puts what it led to into the queue in the same transaction, so a candidate that was kept for a reason that is gone
//! by now is looked at again.

use std::collections::BTreeSet;
use std::time::Duration;

use oci::{Digest, Tag};

use super::candidate::Rules;
use super::settings::GcOptions;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::{Row, Tx, statements};

statements! {
    // The prefix test finds a root without reading the other tags of the manifest.
    NODE = "SELECT m.digest, m.lease_until, m.created_at, \
                (SELECT t.name FROM tag t WHERE t.manifest_id = m.id \
                     AND SUBSTR(t.name, 1, 7) <> 'sha256-' AND SUBSTR(t.name, 1, 7) <> 'sha512-' LIMIT 1) AS tag, \
                (SELECT MAX(CASE WHEN p.expires_at IS NULL THEN 9223372036854775807 ELSE p.expires_at END) \
                     FROM pin p WHERE p.manifest_id = m.id AND (p.expires_at IS NULL OR p.expires_at > $2)) AS pinned, \
                (SELECT MAX(p.expires_at) FROM pin p WHERE p.manifest_id = m.id AND p.expires_at <= $2) AS ended \
            FROM manifest m WHERE m.id = $1";
    LIKE_EVIDENCE = "SELECT name FROM tag WHERE manifest_id = $1 AND name > $2 \
                     AND (SUBSTR(name, 1, 7) = 'sha256-' OR SUBSTR(name, 1, 7) = 'sha512-') \
                     ORDER BY name LIMIT $3";
    PARENTS = "SELECT manifest_id FROM manifest_child WHERE repository_id = $1 AND digest = $2 AND manifest_id > $3 \
               ORDER BY manifest_id LIMIT $4";
    SUBJECTS = "SELECT f.subject, m.id, f.subject_gone_at FROM referrer f \
                LEFT JOIN manifest m ON m.repository_id = f.repository_id AND m.digest = f.subject \
                WHERE f.repository_id = $1 AND f.digest = $2 AND f.subject > $3 ORDER BY f.subject LIMIT $4";
}

/// What becomes of a manifest that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Something keeps it; whoever takes that away puts it into the queue.
    Kept,
    /// Time keeps it: look again then.
    Until(Timestamp),
    /// Nothing keeps it, but an index that nothing keeps either still names it: that one goes first.
    Above,
    /// Nothing keeps it.
    Gone,
}

/// Decides over a manifest whose row is locked by this transaction, so that no new edge to it can come.
pub(super) async fn fate(
    tx: &mut Tx,
    rules: &Rules,
    repository: i64,
    manifest: i64,
) -> Result<Fate, Error> {
    let now = tx.now();
    let Some(node) = Node::read(tx, manifest, now, rules.lease).await? else {
        return Ok(Fate::Kept);
    };
    if let Some(until) = node.leased(&rules.gc, now) {
        return Ok(Fate::Until(until));
    }
    if node.tagged(tx).await? {
        return Ok(Fate::Kept);
    }
    if let Some(until) = node.pinned {
        // A pin may be taken away by whoever knows nothing of this queue, so it is looked at again each day.
        return Ok(Fate::Until(until.min(now.plus(AGAIN))));
    }
    let mut walk = Walk {
        rules,
        repository,
        now,
        seen: BTreeSet::from([manifest]),
    };
    match walk.rooted_above(tx, &node).await? {
        Above::Rooted => Ok(Fate::Kept),
        Above::TooFar => {
            tracing::warn!(
                digest = %node.digest,
                "too many manifests hang together to see whether one of them is kept; all stay"
            );
            Ok(Fate::Until(now.plus(AGAIN)))
        }
        Above::Waits(until) => Ok(Fate::Until(until)),
        Above::Nothing if has_parent(tx, repository, &node.digest).await? => Ok(Fate::Above),
        Above::Nothing => Ok(Fate::Gone),
    }
}

/// Indexes of the repository that name a digest, after a row id, at most `limit`.
pub(super) async fn parents(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    after: i64,
    limit: usize,
) -> Result<Vec<i64>, Error> {
    tx.query(
        &PARENTS,
        &[repository.into(), digest.into(), after.into(), limit.into()],
    )
    .await?
    .iter()
    .map(|row| row.i64(0))
    .collect()
}

async fn has_parent(tx: &mut Tx, repository: i64, digest: &Digest) -> Result<bool, Error> {
    Ok(!parents(tx, repository, digest, i64::MIN, 1)
        .await?
        .is_empty())
}

/// What a manifest is attached to.
pub(super) struct Subject {
    pub(super) digest: Digest,
    /// Its row, when it is there.
    pub(super) manifest: Option<i64>,
    /// Since when it is gone, when it was there.
    pub(super) gone_at: Option<Timestamp>,
}

/// The subjects of a manifest from all sources, after a digest, at most `limit`.
pub(super) async fn subjects(
    tx: &mut Tx,
    repository: i64,
    digest: &Digest,
    after: Option<&Digest>,
    limit: usize,
) -> Result<Vec<Subject>, Error> {
    let after = after.map_or_else(Vec::new, crate::sql::encode_digest);
    tx.query(
        &SUBJECTS,
        &[repository.into(), digest.into(), after.into(), limit.into()],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(Subject {
            digest: row.digest(0)?,
            manifest: row.opt_i64(1)?,
            gone_at: row.opt_i64(2)?.map(Timestamp),
        })
    })
    .collect()
}

/// A manifest with its own roots.
pub(super) struct Node {
    id: i64,
    pub(super) digest: Digest,
    pub(super) lease_until: Timestamp,
    pub(super) created_at: Timestamp,
    tag: Option<String>,
    /// When the last of its pins ends.
    pub(super) pinned: Option<Timestamp>,
}

impl Node {
    pub(super) async fn read(
        tx: &mut Tx,
        manifest: i64,
        now: Timestamp,
        lease: Duration,
    ) -> Result<Option<Self>, Error> {
        let row = tx.query_opt(&NODE, &[manifest.into(), now.into()]).await?;
        row.map(|row: Row| {
            // A pin whose time is over is no root. Its lease begins at its end, whether or not it was swept yet.
            let ended = row.opt_i64(5)?.map(|ended| Timestamp(ended).plus(lease));
            Ok(Self {
                id: manifest,
                digest: row.digest(0)?,
                lease_until: ended.max(Some(row.time(1)?)).unwrap_or_default(),
                created_at: row.time(2)?,
                tag: row.opt_text(3)?,
                pinned: row.opt_i64(4)?.map(Timestamp),
            })
        })
        .transpose()
    }

    /// Until when its lease, and the time that an untagged manifest is given, keep it.
    pub(super) fn leased(&self, gc: &GcOptions, now: Timestamp) -> Option<Timestamp> {
        let until = self.lease_until.plus(gc.beyond_lease);
        (until > now).then_some(until)
    }

    /// Until when it may wait for a subject that never came.
    pub(super) fn waits(&self, gc: &GcOptions, now: Timestamp) -> Option<Timestamp> {
        let until = self.created_at.plus(gc.orphan_referrers);
        (until > now).then_some(until)
    }

    /// Tells whether a tag that is a root points to it.
    pub(super) async fn tagged(&self, tx: &mut Tx) -> Result<bool, Error> {
        if self.tag.is_some() {
            return Ok(true);
        }
        // To the end: whoever may push can make any number of tags that are none.
        let mut last = String::new();
        loop {
            let page = tx
                .query(
                    &LIKE_EVIDENCE,
                    &[self.id.into(), (&last).into(), TAGS_AT_ONCE.into()],
                )
                .await?;
            for row in &page {
                let tag: Tag = row.parse(0)?;
                if is_root(&tag) {
                    return Ok(true);
                }
                tag.as_str().clone_into(&mut last);
            }
            if page.len() < TAGS_AT_ONCE {
                return Ok(false);
            }
        }
    }
}

/// Tells whether a tag keeps what it points to. One that has the form of evidence is an edge of its subject.
pub(super) fn is_root(tag: &Tag) -> bool {
    tag.subject().is_none()
}

/// What the walk found above a manifest.
enum Above {
    Rooted,
    /// Nothing but the time that a referrer waits for a subject that never came.
    Waits(Timestamp),
    Nothing,
    TooFar,
}

/// Where to go on from a manifest: its edges are read a page at a time, because one image may be in thousands of
/// indexes and the first of them is usually tagged.
struct Step {
    digest: Digest,
    /// How long it may wait for a subject that never came.
    waits: Option<Timestamp>,
    origin: bool,
    next: Next,
}

enum Next {
    /// Indexes after this row.
    Parents(i64),
    /// Subjects after this digest.
    Subjects(Option<Digest>),
    Nothing,
}

struct Walk<'a> {
    rules: &'a Rules,
    repository: i64,
    now: Timestamp,
    seen: BTreeSet<i64>,
}

impl Walk<'_> {
    fn step(&self, node: &Node, origin: bool) -> Step {
        Step {
            digest: node.digest.clone(),
            waits: node.waits(&self.rules.gc, self.now),
            origin,
            next: Next::Parents(i64::MIN),
        }
    }

    async fn rooted_above(&mut self, tx: &mut Tx, origin: &Node) -> Result<Above, Error> {
        let mut open = vec![self.step(origin, true)];
        let mut answer = Above::Nothing;
        while let Some(mut step) = open.pop() {
            let mut above = Vec::new();
            match &step.next {
                Next::Parents(after) => {
                    above = parents(tx, self.repository, &step.digest, *after, PAGE).await?;
                    step.next = match above.last() {
                        Some(last) if above.len() == PAGE => Next::Parents(*last),
                        _ => Next::Subjects(None),
                    };
                }
                Next::Subjects(after) => {
                    let page =
                        subjects(tx, self.repository, &step.digest, after.as_ref(), PAGE).await?;
                    step.next = match page.last() {
                        Some(last) if page.len() == PAGE => {
                            Next::Subjects(Some(last.digest.clone()))
                        }
                        _ => Next::Nothing,
                    };
                    let orphan = page
                        .iter()
                        .any(|subject| subject.manifest.is_none() && subject.gone_at.is_none());
                    match step.waits.filter(|_| orphan) {
                        Some(until) if step.origin => answer = Above::Waits(until),
                        Some(_) => return Ok(Above::Rooted),
                        None => {}
                    }
                    above.extend(page.iter().filter_map(|subject| subject.manifest));
                }
                Next::Nothing => continue,
            }
            open.push(step);
            for manifest in above {
                if !self.seen.insert(manifest) {
                    continue;
                }
                if self.seen.len() > MAX_WALK {
                    return Ok(Above::TooFar);
                }
                let Some(node) = Node::read(tx, manifest, self.now, self.rules.lease).await? else {
                    continue;
                };
                let rooted = node.leased(&self.rules.gc, self.now).is_some()
                    || node.pinned.is_some()
                    || node.tagged(tx).await?;
                if rooted {
                    return Ok(Above::Rooted);
                }
                open.push(self.step(&node, false));
            }
        }
        Ok(answer)
    }
}

/// Tags that are read at once.
const TAGS_AT_ONCE: usize = 200;
/// Edges that are read at once.
const PAGE: usize = 32;
/// Manifests that one walk visits at most.
const MAX_WALK: usize = 10_000;
/// When to look again at what is kept for a reason that may end without notice.
const AGAIN: Duration = Duration::from_hours(24);
