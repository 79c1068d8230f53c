//! The plan of a run: what the policy says of each tag of a repository, with the reason, before anything is removed.

use oci::{Digest, RepositoryName, Tag};

use super::policy::{Facts, Policy, Ranking, Verdict};
use super::{ADD_DECISION, HOUR, SIGNATURE, TAGS};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::{Body, Tx, WriteKind};
use crate::store::Inner;

/// One walk over the tags of a repository.
pub(super) struct Walk<'a> {
    pub(super) inner: &'a Inner,
    pub(super) repository: i64,
    pub(super) policy: &'a Policy,
    pub(super) now: Timestamp,
}

/// A tag with what is judged of it.
pub(super) struct Found {
    pub(super) facts: Facts,
    digest: Digest,
    generation: i64,
}

impl Walk<'_> {
    /// Shows every tag to the rules that count.
    pub(super) async fn ranking(&self) -> Result<Ranking, Error> {
        let mut ranking = Ranking::new(self.policy);
        if !Ranking::is_needed(self.policy) {
            return Ok(ranking);
        }
        let mut last = String::new();
        loop {
            let page = self.page(&last).await?;
            let Some(end) = page.last() else {
                return Ok(ranking);
            };
            end.facts.tag.as_str().clone_into(&mut last);
            for found in page.iter().filter(|found| found.counts()) {
                ranking.add(self.policy, &found.facts, self.now);
            }
        }
    }

    /// Writes the plan of this repository.
    pub(super) async fn plan(
        &self,
        run: i64,
        number: usize,
        name: &RepositoryName,
    ) -> Result<(), Error> {
        let ranking = self.ranking().await?;
        let mut last = String::new();
        loop {
            let page = self.page(&last).await?;
            let Some(end) = page.last() else {
                return Ok(());
            };
            end.facts.tag.as_str().clone_into(&mut last);
            let mut decisions = Vec::with_capacity(page.len());
            for found in page.into_iter().filter(Found::counts) {
                // What moved since the tags were counted was not counted as what it is now.
                let verdict = if found.facts.pushed >= self.now {
                    Verdict {
                        keeps: true,
                        reason: "it moved during the run".to_owned(),
                    }
                } else {
                    self.policy.judge(number, &ranking, &found.facts, self.now)
                };
                decisions.push((found, verdict));
            }
            if !decisions.is_empty() {
                self.inner
                    .db
                    .write(Decide {
                        run,
                        repository: name.clone(),
                        decisions,
                    })
                    .await?;
            }
        }
    }

    pub(super) async fn page(&self, after: &str) -> Result<Vec<Found>, Error> {
        let db = &self.inner.db;
        let values = vec![self.repository.into(), after.into(), self.now.into()];
        let rows = db.scan(&TAGS, values).await?;
        let mut page = Vec::with_capacity(rows.len());
        for row in &rows {
            let tag: Tag = row.parse(0)?;
            let digest = row.digest(1)?;
            let signed = self.policy.asks_for_signatures()
                && tag.subject().is_none()
                && self.is_signed(&digest).await?;
            page.push(Found {
                facts: Facts {
                    tag,
                    pushed: row.time(3)?,
                    pulled: row
                        .opt_i64(4)?
                        .map(|hour| Timestamp(hour.saturating_mul(HOUR))),
                    pinned: row.i64(5)? == 1,
                    signed,
                },
                digest,
                generation: row.i64(2)?,
            });
        }
        Ok(page)
    }

    async fn is_signed(&self, digest: &Digest) -> Result<bool, Error> {
        let evidence = format!("{}.sig", digest.to_string().replacen(':', "-", 1));
        let values = [self.repository.into(), digest.into(), evidence.into()];
        Ok(!self.inner.db.read(&SIGNATURE, &values).await?.is_empty())
    }
}

impl Found {
    /// Evidence tags are edges of their subject; no policy is about them.
    fn counts(&self) -> bool {
        self.facts.tag.subject().is_none()
    }
}

struct Decide {
    run: i64,
    repository: RepositoryName,
    decisions: Vec<(Found, Verdict)>,
}

impl Body for Decide {
    type Output = ();
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for (found, verdict) in &self.decisions {
            tx.execute(
                &ADD_DECISION,
                &[
                    self.run.into(),
                    self.repository.as_str().into(),
                    found.facts.tag.as_str().into(),
                    (&found.digest).into(),
                    found.generation.into(),
                    if verdict.keeps { "keep" } else { "remove" }.into(),
                    (&verdict.reason).into(),
                ],
            )
            .await?;
        }
        Ok(())
    }
}
