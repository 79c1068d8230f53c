//! Why a manifest is kept: the collector's own reasons, in words.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;

use oci::{Digest, RepositoryName, Tag};

use super::candidate::Rules;
use super::liveness::{self, Node};
use super::queue::{self, Kind};
use super::worker::rules;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::manifest;
use crate::repository;
use crate::sql::{Body, Tx, WriteKind, statements};
use crate::store::Store;

statements! {
    TAGS = "SELECT name, updated_at, updated_by FROM tag WHERE manifest_id = $1 AND name > $2 ORDER BY name LIMIT $3";
    PUSHED = "SELECT created_at FROM manifest WHERE id = $1";
    PINS = "SELECT holder, reason, created_at, expires_at FROM pin \
            WHERE manifest_id = $1 AND (expires_at IS NULL OR expires_at > $2) ORDER BY holder LIMIT $3";
}

/// Why a manifest is kept.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Every reason that was found; none: nothing keeps it.
    pub reasons: Vec<Reason>,
    /// There are more reasons than are listed.
    pub more: bool,
    /// When the collector may take it: after the last reason, where all of them end by themselves; `None` where one
    /// lasts until somebody takes it away.
    pub until: Option<Timestamp>,
}

/// One reason to keep a manifest. Rules that keep tags (retention) keep what the tag keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// A tag points to it.
    Tag {
        /// The tag.
        tag: Tag,
        /// Since when it points there.
        since: Timestamp,
        /// Who set it.
        by: String,
    },
    /// Somebody needs it (`I19`).
    Pin {
        /// Who.
        holder: String,
        /// For what.
        reason: String,
        /// Since when.
        since: Timestamp,
        /// Until when; `None`: until the holder lets it go.
        until: Option<Timestamp>,
    },
    /// It was pushed, asked for, or lost what kept it, not long ago.
    Lease {
        /// Since when: the last time that happened, reckoned back from its end with the lease that is set now.
        since: Timestamp,
        /// Until when.
        until: Timestamp,
    },
    /// An index names it.
    Index {
        /// The index.
        digest: Digest,
        /// Since when both are there.
        since: Timestamp,
        /// Why that is kept.
        because: Vec<Self>,
    },
    /// It is attached to a manifest.
    Subject {
        /// The manifest.
        digest: Digest,
        /// Since when both are there.
        since: Timestamp,
        /// Why that is kept.
        because: Vec<Self>,
    },
    /// It is attached to a manifest that was not pushed yet.
    Waits {
        /// The manifest that is waited for.
        subject: Digest,
        /// Since when: its push.
        since: Timestamp,
        /// Until when.
        until: Timestamp,
    },
}

impl Reason {
    /// When this reason ends by itself.
    fn end(&self) -> Option<Timestamp> {
        match self {
            Self::Tag { .. } => None,
            Self::Pin { until, .. } => *until,
            Self::Lease { until, .. } | Self::Waits { until, .. } => Some(*until),
            Self::Index { because, .. } | Self::Subject { because, .. } => last_end(because),
        }
    }
}

fn last_end(reasons: &[Reason]) -> Option<Timestamp> {
    let mut last = None;
    for reason in reasons {
        last = last.max(Some(reason.end()?));
    }
    last
}

impl Store {
    /// Every reason why a manifest is kept; `None` when it is not in the repository.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn kept(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Kept>, Error> {
        let inner = &self.0;
        inner
            .db
            .write(Explain {
                repository: repository.clone(),
                digest: digest.clone(),
                rules: rules(inner),
            })
            .await
    }
}

/// Reads in one transaction, and writes nothing: so the reasons fit together.
struct Explain {
    repository: RepositoryName,
    digest: Digest,
    rules: Rules,
}

impl Body for Explain {
    type Output = Option<Kept>;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Option<Kept>, Error> {
        let Some(place) = repository::look_up(tx, &self.repository).await? else {
            return Ok(None);
        };
        let Some(manifest) = manifest::id(tx, place.repository, &self.digest).await? else {
            return Ok(None);
        };
        let mut search = Search {
            rules: &self.rules,
            repository: place.repository,
            open: BTreeSet::new(),
            looked_at: 0,
            more: false,
        };
        let reasons = search.reasons(tx, manifest, 0).await?;
        let until = if reasons.is_empty() {
            let now = tx.now();
            let due = queue::due_of(tx, Kind::Manifest, place.repository, manifest).await?;
            Some(due.unwrap_or(now))
        } else {
            last_end(&reasons)
        };
        Ok(Some(Kept {
            reasons,
            more: search.more,
            until,
        }))
    }
}

struct Search<'a> {
    rules: &'a Rules,
    repository: i64,
    /// The manifests between the first one and the one that is looked at: a cycle keeps nothing.
    open: BTreeSet<i64>,
    looked_at: usize,
    more: bool,
}

type Found<'a> = Pin<Box<dyn Future<Output = Result<Vec<Reason>, Error>> + Send + 'a>>;

impl Search<'_> {
    fn reasons<'a>(&'a mut self, tx: &'a mut Tx, manifest: i64, depth: usize) -> Found<'a> {
        Box::pin(async move {
            let now = tx.now();
            self.looked_at += 1;
            if depth > MAX_DEPTH || self.looked_at > MAX_NODES {
                self.more = true;
                return Ok(Vec::new());
            }
            let Some(node) = Node::read(tx, manifest, now, self.rules.lease).await? else {
                return Ok(Vec::new());
            };
            let mut reasons = self.own(tx, manifest, &node).await?;
            self.open.insert(manifest);
            let indexes =
                liveness::parents(tx, self.repository, &node.digest, i64::MIN, MAX_LISTED + 1)
                    .await?;
            self.more |= indexes.len() > MAX_LISTED;
            for index in indexes.into_iter().take(MAX_LISTED) {
                if self.open.contains(&index) {
                    continue;
                }
                let because = self.reasons(tx, index, depth + 1).await?;
                if !because.is_empty() {
                    reasons.push(Reason::Index {
                        digest: manifest::digest(tx, index).await?,
                        since: node.created_at.max(pushed(tx, index).await?),
                        because,
                    });
                }
            }
            let subjects =
                liveness::subjects(tx, self.repository, &node.digest, None, MAX_LISTED + 1).await?;
            self.more |= subjects.len() > MAX_LISTED;
            for subject in subjects.into_iter().take(MAX_LISTED) {
                match subject.manifest {
                    Some(above) if self.open.contains(&above) => {}
                    Some(above) => {
                        let because = self.reasons(tx, above, depth + 1).await?;
                        if !because.is_empty() {
                            reasons.push(Reason::Subject {
                                digest: subject.digest,
                                since: node.created_at.max(pushed(tx, above).await?),
                                because,
                            });
                        }
                    }
                    None if subject.gone_at.is_some() => {}
                    None => {
                        if let Some(until) = node.waits(&self.rules.gc, now) {
                            reasons.push(Reason::Waits {
                                subject: subject.digest,
                                since: node.created_at,
                                until,
                            });
                        }
                    }
                }
            }
            self.open.remove(&manifest);
            Ok(reasons)
        })
    }

    /// Tags, pins and the lease of the manifest itself.
    async fn own(&mut self, tx: &mut Tx, manifest: i64, node: &Node) -> Result<Vec<Reason>, Error> {
        let now = tx.now();
        let mut reasons = Vec::new();
        let mut last = String::new();
        'tags: loop {
            let page = tx
                .query(
                    &TAGS,
                    &[manifest.into(), (&last).into(), (MAX_LISTED + 1).into()],
                )
                .await?;
            for row in &page {
                let tag: Tag = row.parse(0)?;
                tag.as_str().clone_into(&mut last);
                if !liveness::is_root(&tag) {
                    continue;
                }
                if reasons.len() == MAX_LISTED {
                    self.more = true;
                    break 'tags;
                }
                reasons.push(Reason::Tag {
                    tag,
                    since: row.time(1)?,
                    by: row.text(2)?,
                });
            }
            if page.len() <= MAX_LISTED {
                break;
            }
        }
        let pins = tx
            .query(
                &PINS,
                &[manifest.into(), now.into(), (MAX_LISTED + 1).into()],
            )
            .await?;
        self.more |= pins.len() > MAX_LISTED;
        for row in pins.iter().take(MAX_LISTED) {
            reasons.push(Reason::Pin {
                holder: row.text(0)?,
                reason: row.text(1)?,
                since: row.time(2)?,
                until: row.opt_i64(3)?.map(Timestamp),
            });
        }
        if let Some(until) = node.leased(&self.rules.gc, now) {
            let began = node.lease_until.minus(self.rules.lease);
            reasons.push(Reason::Lease {
                since: began.max(node.created_at).min(now),
                until,
            });
        }
        Ok(reasons)
    }
}

/// When a manifest that is there was pushed first.
async fn pushed(tx: &mut Tx, manifest: i64) -> Result<Timestamp, Error> {
    tx.query_opt(&PUSHED, &[manifest.into()])
        .await?
        .ok_or_else(|| Error::Database("a manifest vanished".to_owned()))?
        .time(0)
}

/// Reasons of one kind that are listed.
const MAX_LISTED: usize = 20;
/// Manifests above one another.
const MAX_DEPTH: usize = 6;
/// Manifests that are looked at for one answer.
const MAX_NODES: usize = 200;
