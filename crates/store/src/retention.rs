//! Retention: tags that no rule keeps are removed.
//!
//! A run walks the repositories that a policy is for. It first writes its plan, every tag with the reason, then removes
//! what the plan says through the one door for tags: only where the tag is still at the generation that was judged, and
//! not pinned since. A tag that moved stays. What was removed can be put back as long as its manifest is there, which is at
//! least the time for untagged manifests. Referrers have no say of their own: they live and die with their subject.
//!
//! Tags are read in pages, and of those that are counted no more is held than a rule asks for, so memory does not
//! grow with the repository.

mod plan;
mod policy;
mod remove;
pub(crate) mod undo;

use std::time::Duration;

use oci::{Digest, RepositoryName, Tag};

use crate::clock::Timestamp;
use crate::collect::Window;
use crate::error::Error;
use crate::model::Actor;
use crate::sql::{Body, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};
use crate::tag::Judged;
use crate::{audit, repository};

pub use policy::{Keep, Pattern, Policy, Verdict};
pub use undo::Undone;

use plan::Walk;
use remove::Remove;

statements! {
    REPOSITORIES = "SELECT id, name FROM repository WHERE name > $1 AND deleted_at IS NULL ORDER BY name LIMIT 100";
    TAGS = "SELECT t.name, m.digest, t.generation, t.updated_at, \
                (SELECT MAX(p.hour) FROM pull p WHERE p.repository_id = t.repository_id AND p.digest = m.digest) AS hour, \
                CAST(CASE WHEN EXISTS (SELECT 1 FROM pin n WHERE n.manifest_id = m.id \
                    AND (n.expires_at IS NULL OR n.expires_at > $3)) THEN 1 ELSE 0 END AS BIGINT) AS pinned \
            FROM tag t JOIN manifest m ON m.id = t.manifest_id \
            WHERE t.repository_id = $1 AND t.name > $2 ORDER BY t.name LIMIT 500";
    SIGNATURE = "SELECT f.id FROM referrer f WHERE f.repository_id = $1 AND f.subject = $2 AND ( \
                     f.artifact_type IN ('application/vnd.cncf.notary.signature', \
                         'application/vnd.dev.cosign.artifact.sig.v1+json') \
                     OR (f.artifact_type = 'application/vnd.dev.sigstore.bundle.v0.3+json' \
                         AND f.descriptor LIKE '%https://sigstore.dev/cosign/sign/v1%')) \
                 UNION ALL SELECT t.generation AS id FROM tag t WHERE t.repository_id = $1 AND t.name = $3 LIMIT 1";
    PINNED = "SELECT n.holder FROM pin n JOIN manifest m ON m.id = n.manifest_id \
              WHERE m.repository_id = $1 AND m.digest = $2 AND (n.expires_at IS NULL OR n.expires_at > $3) LIMIT 1";
    ADD_RUN = "INSERT INTO retention_run (id, started_at, policy, dry_run, actor, kept, removed) \
               VALUES ($1, $2, $3, $4, $5, 0, 0)";
    END_RUN = "UPDATE retention_run SET finished_at = $2, \
                   kept = (SELECT COUNT(*) FROM retention_decision d WHERE d.run_id = $1 AND d.action = 'keep'), \
                   removed = (SELECT COUNT(*) FROM retention_decision d WHERE d.run_id = $1 AND d.action = 'remove') \
               WHERE id = $1";
    RUN = "SELECT id, started_at, finished_at, policy, dry_run, actor, kept, removed FROM retention_run WHERE id = $1";
    RUNS = "SELECT id, started_at, finished_at, policy, dry_run, actor, kept, removed FROM retention_run \
            WHERE id < $1 ORDER BY id DESC LIMIT $2";
    ADD_DECISION = "INSERT INTO retention_decision (run_id, repository, tag, digest, generation, action, reason) \
                    VALUES ($1, $2, $3, $4, $5, $6, $7)";
    DECISIONS = "SELECT repository, tag, digest, generation, action, reason, undone_at FROM retention_decision \
                 WHERE run_id = $1 AND (repository, tag) > ($2, $3) AND ($4 = '' OR action = $4) \
                 ORDER BY repository, tag LIMIT $5";
    TO_REMOVE = "SELECT tag, digest, generation FROM retention_decision \
                 WHERE run_id = $1 AND repository = $2 AND tag > $3 AND action = 'remove' ORDER BY tag LIMIT 16";
    STAYED = "UPDATE retention_decision SET action = 'keep', reason = $4 \
              WHERE run_id = $1 AND repository = $2 AND tag = $3";
    OLD_RUNS = "SELECT id FROM retention_run WHERE started_at < $1 ORDER BY id LIMIT 10";
    FORGET_DECISIONS = "DELETE FROM retention_decision WHERE run_id = $1";
    FORGET_RUN = "DELETE FROM retention_run WHERE id = $1";
    KEPT_BEFORE = "SELECT run_id, repository, tag FROM retention_decision WHERE run_id < $1 AND action = 'keep' LIMIT 1000";
    FORGET_KEPT = "DELETE FROM retention_decision WHERE run_id = $1 AND repository = $2 AND tag = $3";
    FIRST = "INSERT INTO meta (key, value) VALUES ('retention.next', $1) ON CONFLICT (key) DO NOTHING";
    NEXT = "SELECT value FROM meta WHERE key = 'retention.next'";
    TAKE_NEXT = "SELECT value FROM meta WHERE key = 'retention.next' {for update}";
    SET_NEXT = "UPDATE meta SET value = $1 WHERE key = 'retention.next'";
}

/// Which tags are kept, and when that is looked at.
#[derive(Clone, Debug)]
pub struct Retention {
    /// The policies in their order; the first one for a repository decides. Repositories of none keep everything.
    pub policies: Vec<Policy>,
    /// The time between two runs (1 day).
    pub interval: Duration,
    /// Runs begin only at these times of the day.
    pub window: Option<Window>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            policies: Vec::new(),
            interval: Duration::from_hours(24),
            window: None,
        }
    }
}

/// A run as it is stored.
#[derive(Clone, Debug)]
pub struct RetentionRun {
    /// Its number.
    pub id: i64,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended; `None` while it is under way, and when the server ended before it.
    pub finished_at: Option<Timestamp>,
    /// The policies that it went by, in words.
    pub policy: String,
    /// It only planned.
    pub dry_run: bool,
    /// Who started it.
    pub actor: String,
    /// Tags that were kept.
    pub kept: u64,
    /// Tags that were removed, or would be.
    pub removed: u64,
}

/// What a run decided on one tag.
#[derive(Clone, Debug)]
pub struct RetentionDecision {
    /// Where.
    pub repository: RepositoryName,
    /// The tag.
    pub tag: Tag,
    /// Where it pointed.
    pub digest: Digest,
    /// Its generation then.
    pub generation: i64,
    /// It stays.
    pub keeps: bool,
    /// Why.
    pub reason: String,
    /// When its removal was undone.
    pub undone_at: Option<Timestamp>,
}

impl Store {
    /// The policies that this process goes by.
    pub fn retention(&self) -> &Retention {
        &self.0.options.retention
    }

    /// Runs retention when it is due, until the future is dropped. It ends by itself only when the store has stopped.
    pub async fn retain(&self) {
        let retention = self.retention();
        if retention.policies.is_empty() {
            return std::future::pending().await;
        }
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = String::new();
        loop {
            tick.tick().await;
            match self.retain_when_due().await {
                Ok(_) => told.clear(),
                Err(Error::Stopped) => return,
                Err(error) => {
                    let text = error.to_string();
                    if told != text {
                        tracing::warn!(%error, "retention stands still, it is tried again");
                        told = text;
                    }
                }
            }
        }
    }

    /// Runs retention when it is due; whether it was.
    ///
    /// # Errors
    /// The first failure. What was removed before stays removed and stands in the plan.
    #[doc(hidden)]
    pub async fn retain_when_due(&self) -> Result<bool, Error> {
        let inner = &self.0;
        let retention = self.retention();
        let now = inner.clock.now();
        if retention.policies.is_empty()
            || retention.window.is_some_and(|window| !window.contains(now))
        {
            return Ok(false);
        }
        let start = Start {
            policy: words(retention),
            dry_run: false,
            actor: system(),
            due: Some(retention.interval),
        };
        let Some(run) = inner.db.write(start).await? else {
            return Ok(false);
        };
        self.carry_out(run, false, None).await?;
        Ok(true)
    }

    /// Starts a run and returns its number at once; it goes on in the background. `dry_run` only plans. With a
    /// repository, no other one is looked at.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn start_retention(
        &self,
        dry_run: bool,
        only: Option<RepositoryName>,
        actor: &Actor,
    ) -> Result<i64, Error> {
        let inner = &self.0;
        let start = Start {
            policy: words(self.retention()),
            dry_run,
            actor: actor.clone(),
            due: None,
        };
        let run = inner.db.write(start).await?.ok_or(Error::Stopped)?;
        let store = self.clone();
        inner.tasks.spawn_on(
            async move {
                if let Err(error) = store.carry_out(run, dry_run, only.as_ref()).await {
                    tracing::warn!(run, %error, "a retention run broke off");
                }
            },
            &inner.runtime,
        );
        Ok(run)
    }

    /// Runs, the newest first, before `before`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn retention_runs(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<RetentionRun>, Error> {
        let values = vec![before.unwrap_or(i64::MAX).into(), limit.into()];
        self.0
            .db
            .scan(&RUNS, values)
            .await?
            .iter()
            .map(run)
            .collect()
    }

    /// One run.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn retention_run(&self, id: i64) -> Result<Option<RetentionRun>, Error> {
        let rows = self.0.db.read(&RUN, &[id.into()]).await?;
        rows.first().map(run).transpose()
    }

    /// What a run decided, by repository and tag, after `after`. `keeps`: only what stays, or only what goes.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn retention_decisions(
        &self,
        id: i64,
        after: Option<(&str, &str)>,
        keeps: Option<bool>,
        limit: usize,
    ) -> Result<Vec<RetentionDecision>, Error> {
        let (repository, tag) = after.unwrap_or_default();
        let action = match keeps {
            None => "",
            Some(true) => "keep",
            Some(false) => "remove",
        };
        let values = vec![
            id.into(),
            repository.into(),
            tag.into(),
            action.into(),
            limit.into(),
        ];
        self.0
            .db
            .scan(&DECISIONS, values)
            .await?
            .iter()
            .map(|row| {
                Ok(RetentionDecision {
                    repository: row.parse(0)?,
                    tag: row.parse(1)?,
                    digest: row.digest(2)?,
                    generation: row.i64(3)?,
                    keeps: row.text(4)? == "keep",
                    reason: row.text(5)?,
                    undone_at: row.opt_i64(6)?.map(Timestamp),
                })
            })
            .collect()
    }

    /// When the next run is due; `None` without policies, and before the first server with policies ran.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn next_retention(&self) -> Result<Option<Timestamp>, Error> {
        if self.retention().policies.is_empty() {
            return Ok(None);
        }
        let rows = self.0.db.read(&NEXT, &[]).await?;
        rows.first()
            .map(|row| row.text(0))
            .transpose()
            .map(|text| text.and_then(|text| text.parse().ok()).map(Timestamp))
    }

    /// What retention says of a tag now: `None` when there is no such tag, or no policy for its repository.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn retention_of(
        &self,
        repository: &RepositoryName,
        tag: &Tag,
    ) -> Result<Option<Verdict>, Error> {
        let inner = &self.0;
        let Some((number, policy)) = Policy::first(&self.retention().policies, repository) else {
            return Ok(None);
        };
        if tag.subject().is_some() {
            return Ok(Some(Verdict {
                keeps: true,
                reason: "evidence lives and dies with its subject".to_owned(),
            }));
        }
        let Some(id) = repository::id(&inner.db, repository).await? else {
            return Ok(None);
        };
        let walk = Walk {
            inner,
            repository: id,
            policy,
            now: inner.clock.now(),
        };
        let ranking = walk.ranking().await?;
        // The page that begins with the tag: what comes before it in the order of bytes ends with the shorter name.
        let mut after = tag.as_str().to_owned();
        after.pop();
        loop {
            let page = walk.page(&after).await?;
            let Some(last) = page.last() else {
                return Ok(None);
            };
            if let Some(found) = page.iter().find(|found| found.facts.tag == *tag) {
                return Ok(Some(policy.judge(number, &ranking, &found.facts, walk.now)));
            }
            if last.facts.tag > *tag {
                return Ok(None);
            }
            last.facts.tag.as_str().clone_into(&mut after);
        }
    }

    /// Plans and, unless it is a dry run, removes, one repository after the other.
    async fn carry_out(
        &self,
        run: i64,
        dry_run: bool,
        only: Option<&RepositoryName>,
    ) -> Result<(), Error> {
        let inner = &self.0;
        let policies = &self.retention().policies;
        let mut last = String::new();
        'all: loop {
            let rows = inner.db.scan(&REPOSITORIES, vec![(&last).into()]).await?;
            if rows.is_empty() {
                break;
            }
            for row in &rows {
                last = row.text(1)?;
                let name: RepositoryName = row.parse(1)?;
                if only.is_some_and(|only| *only != name) {
                    continue;
                }
                if inner.tasks.is_closed() {
                    // The store is being closed; the run stays without an end.
                    break 'all;
                }
                if let Some((number, policy)) = Policy::first(policies, &name) {
                    let walk = Walk {
                        inner,
                        repository: row.i64(0)?,
                        policy,
                        now: inner.clock.now(),
                    };
                    walk.plan(run, number, &name).await?;
                    if !dry_run {
                        self.remove_planned(run, &name).await?;
                    }
                }
            }
        }
        if inner.tasks.is_closed() {
            return Ok(());
        }
        inner.db.write(End(run)).await?;
        let ended = self.retention_run(run).await?;
        if let Some(ended) = ended {
            tracing::info!(
                run,
                dry_run,
                kept = ended.kept,
                removed = ended.removed,
                "a retention run has ended"
            );
        }
        while inner.db.write(ForgetOld { newest: run }).await? {}
        Ok(())
    }

    /// Removes what the plan says of one repository, as long as it is as the plan saw it.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn remove_planned(&self, run: i64, name: &RepositoryName) -> Result<(), Error> {
        let inner = &self.0;
        let mut last = String::new();
        loop {
            let values = vec![run.into(), name.as_str().into(), (&last).into()];
            let rows = inner.db.scan(&TO_REMOVE, values).await?;
            let mut tags = Vec::with_capacity(rows.len());
            for row in &rows {
                tags.push(Judged {
                    tag: row.parse(0)?,
                    digest: row.digest(1)?,
                    generation: row.i64(2)?,
                });
            }
            let Some(end) = tags.last() else {
                return Ok(());
            };
            end.tag.as_str().clone_into(&mut last);
            crate::failpoint::failpoint("retention.before_remove");
            inner
                .db
                .write(Remove {
                    run,
                    repository: name.clone(),
                    tags,
                    lease: inner.untagged(name),
                })
                .await?;
            crate::failpoint::failpoint("retention.after_remove");
        }
    }
}

impl Inner {
    /// How long a manifest of this repository is kept when it loses its last tag: the lease, or longer by its policy.
    pub(crate) fn untagged(&self, repository: &RepositoryName) -> Duration {
        let policy = Policy::first(&self.options.retention.policies, repository);
        let longer = policy.and_then(|(_, policy)| policy.untagged);
        longer.unwrap_or_default().max(self.options.lease)
    }
}

/// Begins a run; `None` when it was to begin by the clock and is not due.
struct Start {
    policy: String,
    dry_run: bool,
    actor: Actor,
    due: Option<Duration>,
}

impl Body for Start {
    type Output = Option<i64>;
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<Option<i64>, Error> {
        let (now, id) = (tx.now(), tx.id());
        if let Some(interval) = self.due {
            let Timestamp(next) = now.plus(interval);
            // The first run leaves time to look at a plan.
            tx.execute(&FIRST, &[next.to_string().into()]).await?;
            let due = match tx.query_opt(&TAKE_NEXT, &[]).await? {
                Some(row) => row.text(0)?.parse().unwrap_or(next),
                None => next,
            };
            // An interval that was made shorter counts at once.
            if due > now.0 && due <= next {
                return Ok(None);
            }
            tx.execute(&SET_NEXT, &[next.to_string().into()]).await?;
            if due > next {
                return Ok(None);
            }
        }
        tx.execute(
            &ADD_RUN,
            &[
                id.into(),
                now.into(),
                (&self.policy).into(),
                i64::from(self.dry_run).into(),
                (&self.actor.principal).into(),
            ],
        )
        .await?;
        if !self.dry_run {
            audit::allowed(tx, &self.actor, "retention.run", id.to_string()).await?;
        }
        Ok(Some(id))
    }
}

struct End(i64);

impl Body for End {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let now = tx.now();
        tx.execute(&END_RUN, &[self.0.into(), now.into()])
            .await
            .map(drop)
    }
}

/// Forgets old runs, and of all but the newest run what was kept; `true` when there may be more.
struct ForgetOld {
    newest: i64,
}

impl Body for ForgetOld {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let before = tx.now().minus(KEPT);
        let old = tx.query(&OLD_RUNS, &[before.into()]).await?;
        for row in &old {
            tx.execute(&FORGET_DECISIONS, &[row.i64(0)?.into()]).await?;
            tx.execute(&FORGET_RUN, &[row.i64(0)?.into()]).await?;
        }
        let kept = tx.query(&KEPT_BEFORE, &[self.newest.into()]).await?;
        for row in &kept {
            tx.execute(
                &FORGET_KEPT,
                &[row.i64(0)?.into(), row.text(1)?.into(), row.text(2)?.into()],
            )
            .await?;
        }
        Ok(!old.is_empty() || !kept.is_empty())
    }
}

fn run(row: &Row) -> Result<RetentionRun, Error> {
    Ok(RetentionRun {
        id: row.i64(0)?,
        started_at: row.time(1)?,
        finished_at: row.opt_i64(2)?.map(Timestamp),
        policy: row.text(3)?,
        dry_run: row.i64(4)? == 1,
        actor: row.text(5)?,
        kept: row.u64(6)?,
        removed: row.u64(7)?,
    })
}

/// The policies in words, as a run keeps them.
fn words(retention: &Retention) -> String {
    let mut text = String::new();
    for (policy, number) in retention.policies.iter().zip(1..) {
        use std::fmt::Write as _;
        let globs: Vec<_> = policy
            .repositories
            .iter()
            .map(ToString::to_string)
            .collect();
        let rules: Vec<_> = policy.keep.iter().map(|rule| format!("({rule})")).collect();
        let rules = if rules.is_empty() {
            "every tag".to_owned()
        } else {
            rules.join(" or ")
        };
        let _ = writeln!(text, "{number}. {}: keep {rules}", globs.join(", "));
    }
    text
}

fn system() -> Actor {
    Actor {
        principal: "system:retention".to_owned(),
        request: String::new(),
        address: String::new(),
    }
}

/// The time between two looks whether a run is due.
const LOOK: Duration = Duration::from_secs(30);
/// How long runs are kept.
const KEPT: Duration = Duration::from_hours(90 * 24);
/// Micro-seconds of an hour.
const HOUR: i64 = 3_600_000_000;
