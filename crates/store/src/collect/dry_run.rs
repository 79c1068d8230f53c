//! What the collector would take now.
//!
//! The very transactions of a run, rolled back: a dry run cannot tell another story than the run. A page is one
//! transaction, so it is bounded, and what one candidate of a page leaves is seen by the next.

use std::sync::{Arc, Mutex, PoisonError};

use oci::Digest;

use super::candidate::{Outcome, Rules, look};
use super::queue::{self, Candidate, Kind};
use super::worker::rules;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::{Body, Tx, WriteKind};
use crate::store::Store;

/// A page of what would be deleted.
#[derive(Clone, Debug, Default)]
pub struct DryRun {
    /// What would go, in the order of the run.
    pub items: Vec<DryRunItem>,
    /// Candidates of this page, with those that stay.
    pub looked_at: usize,
    /// Where the next page begins; `None`: this was the last.
    pub next: Option<String>,
}

impl DryRun {
    /// Tells whether a text can be a cursor.
    pub fn is_cursor(text: &str) -> bool {
        Position::parse(text).is_some()
    }
}

/// Something that would be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRunItem {
    /// What it is.
    pub kind: Kind,
    /// Where it is; a blob that no repository holds is nowhere.
    pub repository: Option<String>,
    /// Its digest; a repository has none.
    pub digest: Option<Digest>,
    /// The bytes that are freed with it.
    pub bytes: u64,
    /// Why it goes.
    pub reason: &'static str,
}

impl Store {
    /// Up to `limit` (at most 200) candidates that are due, and what would become of them. `cursor` is the `next` of the
    /// page before.
    ///
    /// # Errors
    /// [`Error::Database`] also for a cursor that is none.
    pub async fn collection_dry_run(
        &self,
        cursor: Option<&str>,
        limit: usize,
    ) -> Result<DryRun, Error> {
        let from = match cursor {
            None => Position::default(),
            Some(text) => Position::parse(text)
                .ok_or_else(|| Error::Database("the cursor is none of a dry run".to_owned()))?,
        };
        let inner = &self.0;
        let page = Arc::new(Mutex::new(None));
        let body = Page {
            rules: rules(inner),
            from,
            limit: limit.clamp(1, MAX_PAGE),
            page: Arc::clone(&page),
        };
        match inner.db.write(body).await {
            Ok(()) => {}
            Err(error) => {
                let page = page.lock().unwrap_or_else(PoisonError::into_inner).take();
                return page.ok_or(error);
            }
        }
        Err(Error::Database("a dry run was not rolled back".to_owned()))
    }
}

/// Behind the last candidate of a page.
#[derive(Clone, Copy, Debug)]
struct Position {
    kind: usize,
    after: (i64, i64, i64),
}

impl Default for Position {
    fn default() -> Self {
        Self {
            kind: 0,
            after: BEGIN,
        }
    }
}

impl Position {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let kind = Kind::parse(parts.next()?)?;
        let mut number = || parts.next()?.parse().ok();
        let after = (number()?, number()?, number()?);
        let kind = Kind::ALL.iter().position(|other| *other == kind)?;
        parts.next().is_none().then_some(Self { kind, after })
    }

    fn write(self) -> String {
        let (due, repository, target) = self.after;
        let kind = Kind::ALL.get(self.kind).map_or("", |kind| kind.name());
        format!("{kind}.{due}.{repository}.{target}")
    }
}

struct Page {
    rules: Rules,
    from: Position,
    limit: usize,
    page: Arc<Mutex<Option<DryRun>>>,
}

impl Body for Page {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let mut page = DryRun::default();
        let mut at = self.from;
        while let Some(kind) = Kind::ALL.get(at.kind).copied() {
            let left = self.limit - page.looked_at;
            if left == 0 {
                page.next = Some(at.write());
                break;
            }
            let candidates = queue::due_after(tx, kind, at.after, left).await?;
            let end = candidates.len() < left;
            for candidate in &candidates {
                page.looked_at += 1;
                at.after = (candidate.due.0, candidate.repository, candidate.target);
                if let Some(item) = try_one(tx, &self.rules, candidate).await? {
                    page.items.push(item);
                }
            }
            if end {
                at = Position {
                    kind: at.kind + 1,
                    after: BEGIN,
                };
            }
        }
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = Some(page);
        Err(Error::Database("rolled back, as meant".to_owned()))
    }
}

async fn try_one(
    tx: &mut Tx,
    rules: &Rules,
    candidate: &Candidate,
) -> Result<Option<DryRunItem>, Error> {
    let item = |bytes, repository, digest, reason| DryRunItem {
        kind: candidate.kind,
        repository,
        digest,
        bytes,
        reason,
    };
    let outcome = look(tx, rules, candidate).await?;
    // What the next page shows depends on it, as in a run.
    queue::change(tx).await?;
    match outcome {
        Outcome::Collected(mut collected) => {
            if candidate.kind == Kind::RepositoryBlob {
                // The run comes to the blob right after.
                let blob = Candidate {
                    kind: Kind::Blob,
                    repository: 0,
                    target: candidate.target,
                    due: Timestamp(0),
                    attempts: 0,
                };
                if let Outcome::Collected(blob) = look(tx, rules, &blob).await? {
                    collected.bytes = blob.bytes;
                }
            }
            Ok(Some(item(
                collected.bytes,
                collected.repository,
                collected.digest,
                collected.reason,
            )))
        }
        Outcome::Step => {
            let known = crate::repository::by_id(tx, candidate.target).await?;
            let name = known.map(|known| known.name.as_str().to_owned());
            Ok(Some(item(
                0,
                name,
                None,
                "it was deleted, and goes in steps",
            )))
        }
        Outcome::Left | Outcome::Later => Ok(None),
    }
}

const BEGIN: (i64, i64, i64) = (i64::MIN, i64::MIN, i64::MIN);
const MAX_PAGE: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_survive_their_text() {
        let position = Position {
            kind: 2,
            after: (5, -1, i64::MIN),
        };
        let text = position.write();
        assert_eq!(text, format!("repository_blob.5.-1.{}", i64::MIN));
        let read = Position::parse(&text).unwrap();
        assert_eq!((read.kind, read.after), (position.kind, position.after));
        for bad in [
            "",
            "manifest",
            "manifest.1.2",
            "manifest.1.2.3.4",
            "tag.1.2.3",
            "manifest.a.b.c",
        ] {
            assert!(Position::parse(bad).is_none(), "{bad}");
        }
    }
}
