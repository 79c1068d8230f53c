//! The steps themselves. Each may be cut off at any point and be taken again from its beginning.

use std::collections::BTreeMap;

use oci::Digest;
use oci::reference::TagOrDigest;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::disk::Kept;
use super::source::{SourceError, disk_error};
use super::{LOOK, Message, Runner, RunnerError, durably, refusal, report, timestamp};
use crate::attempt::Record;
use crate::control::{HealthStatus, PlanReport, Refusal, RefusalKind};
use crate::engine::{BoxFuture, Deployment, Engine, EngineError, Plan, Sample, SampleState};
use crate::machine::{Failure, Phase, Step, Trigger};
use crate::observe::{Judgment, Watch, http, problem, with_http};
use crate::release::{FetchedRelease, ReleaseConfig};

/// What came of a step.
pub(super) struct Outcome {
    pub(super) result: Result<(), (Failure, String)>,
    pub(super) gained: Option<Gained>,
    pub(super) notes: Vec<String>,
}

/// What a step brought for the next ones and for the ledger.
pub(super) enum Gained {
    Release(Digest, Box<FetchedRelease>),
    Verdict(Option<Box<trust::Verdict>>),
    Plan(Digest, Plan),
}

type StepResult = Result<Outcome, (Failure, String)>;

impl Outcome {
    fn plain() -> Self {
        Self::with_notes(Vec::new())
    }

    fn with_notes(notes: Vec<String>) -> Self {
        Self {
            result: Ok(()),
            gained: None,
            notes,
        }
    }
}

impl Runner {
    /// Takes one step. Touches nothing of the runner itself, so that it can be dropped at any point.
    pub(super) async fn carry_out(&self, step: &Step) -> Outcome {
        // What a release is made of must not vanish while it is fetched and applied. A way back needs no registry.
        let going_back = matches!(self.state.phase, Phase::RollingBack { .. });
        if matches!(step, Step::Fetch(_) | Step::Apply(_)) && !going_back {
            self.setup.reporter.settle().await;
        }
        let result = match step {
            Step::Fetch(digest) => self.fetch(digest).await,
            Step::Verify(digest) => self.verify(digest).await,
            Step::Admit(digest) => self.admit(digest),
            Step::Extract(digest) => self.extract(digest).await,
            Step::Plan(digest) => self.plan(digest).await,
            Step::Pull(digest) => self.pull(digest).await,
            Step::Begin | Step::Observe(_) => Ok(Outcome::plain()),
            Step::Apply(digest) => self.apply(digest).await,
        };
        result.unwrap_or_else(|failure| Outcome {
            result: Err(failure),
            gained: None,
            notes: Vec::new(),
        })
    }

    async fn fetch(&self, digest: &Digest) -> StepResult {
        if self.paths.kept(digest).is_some() {
            return Ok(Outcome::with_notes(vec![
                "its files are on this host".to_owned(),
            ]));
        }
        if self.is_fetched(digest) {
            return Ok(Outcome::plain());
        }
        let release = self.download(digest).await.map_err(source_failure)?;
        Ok(Outcome {
            result: Ok(()),
            notes: vec![format!(
                "format {}, {} layer(s)",
                release.format,
                release.layers.len()
            )],
            gained: Some(Gained::Release(digest.clone(), Box::new(release))),
        })
    }

    fn is_fetched(&self, digest: &Digest) -> bool {
        self.fetched
            .as_ref()
            .is_some_and(|(fetched, _)| fetched == digest)
    }

    async fn download(&self, digest: &Digest) -> Result<FetchedRelease, SourceError> {
        let staging = self.paths.staging(digest);
        std::fs::create_dir_all(&staging)
            .map_err(|error| SourceError::Unavailable(disk_error("create", &staging, &error)))?;
        let fetched = self
            .setup
            .source
            .fetch(&self.setup.target, digest, &staging)
            .await;
        if fetched.is_err() {
            // A full disk gets its space back before the next try.
            self.paths.discard(digest);
        }
        fetched
    }

    async fn verify(&self, digest: &Digest) -> StepResult {
        let verdict = self.judge(digest).await.map_err(source_failure)?;
        let result = match &verdict {
            Some(verdict) if !verdict.is_allowed() => {
                Err((Failure::Evidence, verdict.message.clone()))
            }
            _ => Ok(()),
        };
        Ok(Outcome {
            result,
            notes: Vec::new(),
            gained: Some(Gained::Verdict(verdict.map(Box::new))),
        })
    }

    /// `None`: the target says `trust: none`.
    async fn judge(&self, digest: &Digest) -> Result<Option<trust::Verdict>, SourceError> {
        let Some(policy) = &self.setup.target.trust else {
            return Ok(None);
        };
        let evidence = self
            .setup
            .source
            .evidence(&self.setup.target, digest)
            .await?;
        Ok(Some(self.setup.source.verify(digest, &evidence, policy)))
    }

    fn admit(&self, digest: &Digest) -> StepResult {
        let config = self.config(digest)?;
        self.check_config(&config)
            .map_err(|reason| (Failure::Rejected, reason))?;
        Ok(Outcome::plain())
    }

    /// A validly signed release of something else does not run here.
    fn check_config(&self, config: &ReleaseConfig) -> Result<(), String> {
        let target = &self.setup.target;
        if config.name != target.release {
            return Err(format!(
                "it is a release of `{}`, this target expects `{}`: publish the right one, or change the target's `release`",
                config.name, target.release
            ));
        }
        if config.engine != target.engine {
            return Err(format!(
                "it is for engine {:?}, this target's is {:?}",
                config.engine, target.engine
            )
            .to_lowercase());
        }
        self.variables(config).map(|_| ())
    }

    /// Release defaults, the target's values, and the agent's own.
    fn variables(&self, config: &ReleaseConfig) -> Result<BTreeMap<String, String>, String> {
        let given = &self.setup.target.variables;
        let mut variables: BTreeMap<String, String> = config
            .variables
            .iter()
            .filter_map(|variable| {
                variable
                    .default
                    .clone()
                    .map(|default| (variable.name.clone(), default))
            })
            .collect();
        variables.extend(given.clone());
        variables.insert(
            DATA_VARIABLE.to_owned(),
            self.paths.data.to_string_lossy().into_owned(),
        );
        let missing: Vec<&str> = config
            .variables
            .iter()
            .filter(|variable| variable.required && !variables.contains_key(&variable.name))
            .map(|variable| variable.name.as_str())
            .collect();
        if missing.is_empty() {
            Ok(variables)
        } else {
            Err(format!(
                "it needs the variable(s) `{}`: give them under the target's `variables`",
                missing.join("`, `")
            ))
        }
    }

    fn config(&self, digest: &Digest) -> Result<ReleaseConfig, (Failure, String)> {
        if let Some((fetched, release)) = &self.fetched
            && fetched == digest
        {
            return Ok(release.config.clone());
        }
        self.paths
            .kept(digest)
            .map(|kept| kept.config)
            .ok_or_else(|| {
                (
                    Failure::Unavailable,
                    format!("the files of `{digest}` are not on this host"),
                )
            })
    }

    async fn extract(&self, digest: &Digest) -> StepResult {
        if self.paths.kept(digest).is_some() {
            return Ok(Outcome::plain());
        }
        let Some((_, release)) = self
            .fetched
            .as_ref()
            .filter(|(fetched, _)| fetched == digest)
        else {
            return Err((
                Failure::Unavailable,
                "the download is gone; it is fetched again".to_owned(),
            ));
        };
        self.unpack(digest, release).await.map_err(source_failure)?;
        Ok(Outcome::plain())
    }

    async fn unpack(&self, digest: &Digest, release: &FetchedRelease) -> Result<(), SourceError> {
        let directory = self.paths.release(digest);
        let kept = Kept::new(release.config.clone(), release.format.clone());
        self.paths.keep(digest, &kept).map_err(|error| {
            SourceError::Unavailable(match &error {
                RunnerError::Io {
                    operation,
                    path,
                    source,
                } => disk_error(operation, path, source),
                other => other.to_string(),
            })
        })?;
        if directory.exists() {
            return Ok(());
        }
        self.setup.source.extract(release, &directory).await
    }

    /// The release as it is to run here, out of what is on this host alone.
    pub(super) fn deployment(&self, digest: &Digest) -> Result<Deployment, (Failure, String)> {
        let kept = self.paths.kept(digest).ok_or_else(|| {
            (
                Failure::Rejected,
                format!(
                    "the files of `{digest}` are gone from this host: `{}` was removed or damaged",
                    self.paths.release(digest).display()
                ),
            )
        })?;
        let variables = self
            .variables(&kept.config)
            .map_err(|reason| (Failure::Rejected, reason))?;
        Ok(Deployment {
            target: (*self.setup.target).clone(),
            digest: digest.clone(),
            config: kept.config,
            directory: self.paths.release(digest),
            state: self.paths.root.clone(),
            data: self.paths.data.clone(),
            variables,
        })
    }

    fn engine(&self) -> Result<&dyn Engine, (Failure, String)> {
        self.setup.engine.as_deref().ok_or_else(|| {
            (
                Failure::Unavailable,
                "this agent was started without the target's engine".to_owned(),
            )
        })
    }

    async fn plan(&self, digest: &Digest) -> StepResult {
        let engine = self.engine()?;
        let info = engine.check().await.map_err(engine_failure)?;
        let deployment = self.deployment(digest)?;
        let plan = self.redacted(engine.plan(&deployment).await.map_err(engine_failure)?);
        Ok(Outcome {
            result: Ok(()),
            notes: vec![info.description],
            gained: Some(Gained::Plan(digest.clone(), plan)),
        })
    }

    fn redacted(&self, mut plan: Plan) -> Plan {
        for change in &mut plan.changes {
            change.reason = report::redact(&change.reason, &self.secrets);
        }
        for note in &mut plan.notes {
            *note = report::redact(note, &self.secrets);
        }
        plan
    }

    async fn pull(&self, digest: &Digest) -> StepResult {
        let deployment = self.deployment(digest)?;
        self.engine()?
            .pull(&deployment)
            .await
            .map_err(engine_failure)?;
        Ok(Outcome::plain())
    }

    /// Applies. Unless this attempt planned it a moment ago (a rollback, a resumed attempt), it is planned again, and the engine
    /// gets a chance to fetch what was pruned meanwhile; that it cannot is no reason to stop, for all may be there.
    async fn apply(&self, digest: &Digest) -> StepResult {
        let engine = self.engine()?;
        let deployment = self.deployment(digest)?;
        let mut notes = Vec::new();
        let planned = self
            .planned
            .as_ref()
            .filter(|(planned, _)| planned == digest);
        let (plan, gained) = if let Some((_, plan)) = planned {
            (plan.clone(), None)
        } else {
            let plan = engine.plan(&deployment).await.map_err(engine_failure)?;
            if let Err(error) = engine.pull(&deployment).await {
                notes.push(format!("not everything could be fetched again: {error}"));
            }
            (
                plan.clone(),
                Some(Gained::Plan(digest.clone(), self.redacted(plan))),
            )
        };
        let applied = engine.apply(&deployment, &plan).await;
        let result = match applied {
            Ok(applied) => {
                notes.extend(applied.notes);
                Ok(())
            }
            Err(error) => Err(engine_failure(error)),
        };
        Ok(Outcome {
            result,
            gained,
            notes,
        })
    }

    /// Removes what no kept release needs any more. What cannot be removed now is tried again with the next release.
    pub(super) async fn clean(&mut self) {
        let kept = self.state.kept();
        durably(|| self.paths.clear_releases(&kept));
        let deployments: Vec<Deployment> = kept
            .iter()
            .filter_map(|digest| digest.parse().ok())
            .filter_map(|digest| self.deployment(&digest).ok())
            .collect();
        // A release whose variables are no longer all given is kept, and cannot be told to the engine; then nothing is removed.
        let complete = kept
            .iter()
            .filter_map(|digest| digest.parse().ok())
            .filter(|digest| self.paths.kept(digest).is_some())
            .count()
            == deployments.len();
        if let Some(engine) = self.setup.engine.as_ref().filter(|_| complete)
            && let Err(error) = engine.clean(&self.setup.target, &deployments).await
        {
            tracing::warn!(target_name = self.setup.target.name, %error, "the engine cannot remove what is no longer needed");
        }
    }

    /// Watches until the window is over. Messages are heard meanwhile: a newer release or an order ends the wait.
    pub(super) async fn observe(&mut self, digest: &Digest, shutdown: &CancellationToken) {
        let started = timestamp(&*self.clock);
        let step = Step::Observe(digest.clone());
        // What was planned is applied now; a later apply plans anew.
        self.planned = None;
        let deployment = match self.deployment(digest) {
            Ok(deployment) => deployment,
            Err((kind, reason)) => return self.fail(kind, reason),
        };
        let mut watch = Watch::new(&self.setup.target.health);
        // A registry that does not answer must not keep the watch from looking: it is asked beside it.
        let mut asked = None;
        loop {
            let look = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                look = self.look(&deployment) => look,
            };
            let now = Instant::now();
            let judgment = watch.look(now, look.as_ref());
            self.note_health(look.as_ref());
            let result = match judgment {
                Judgment::Waiting => None,
                Judgment::Healthy => Some(Ok(())),
                Judgment::Unhealthy(reason) => Some(Err((Failure::Unhealthy, reason))),
            };
            if let Some(result) = result {
                let outcome = Outcome {
                    result,
                    gained: None,
                    notes: Vec::new(),
                };
                return self.finish(&step, started, outcome);
            }
            let next_look = now + self.setup.target.health.interval;
            // Everything that is heard until the next look.
            loop {
                let poll = self.next_poll;
                tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep_until(next_look) => break,
                    message = self.mailbox.recv() => match message {
                        // An answer that was asked for before the hint may be older than it.
                        Some(Message::Hint(trigger)) => asked = Some((trigger, self.ask())),
                        Some(message) => self.receive(message, shutdown).await,
                        None => return shutdown.cancelled().await,
                    },
                    (trigger, found) = answer(&mut asked) => self.answered(trigger, found),
                    () = tokio::time::sleep_until(poll), if asked.is_none() => {
                        asked = Some((Trigger::Poll, self.ask()));
                    }
                }
                if self.state.pending() != Some(step.clone()) || self.blocked {
                    return;
                }
            }
        }
    }

    /// One look: the engine's, and the target's health URLs.
    async fn look(&self, deployment: &Deployment) -> Result<Sample, EngineError> {
        let Some(engine) = &self.setup.engine else {
            return Err(EngineError::Unavailable(
                "this agent was started without the target's engine".to_owned(),
            ));
        };
        let sample = engine.observe(deployment).await?;
        let urls = &self.setup.target.health.http;
        if urls.is_empty() || sample.state != SampleState::Healthy {
            return Ok(sample);
        }
        Ok(with_http(sample, &http::check(urls).await))
    }

    /// What runs is looked at for as long as it runs: a container that fails later is reported, not repaired.
    pub(super) async fn look_at_running(&mut self) {
        self.next_look = Instant::now() + LOOK;
        let Some(running) = self.state.running.clone() else {
            return;
        };
        let look = match self.deployment(&running.digest) {
            Ok(deployment) => self.look(&deployment).await,
            Err((_, reason)) => Err(EngineError::Rejected(reason)),
        };
        self.note_health(look.as_ref());
        self.publish();
    }

    /// Keeps the last look; a look that differs from the one before goes into the ledger.
    fn note_health(&mut self, look: Result<&Sample, &EngineError>) {
        let (state, reason, mut services) = match look {
            Ok(sample) => {
                let (state, reason) = match sample.state {
                    SampleState::Healthy => ("healthy", None),
                    SampleState::Pending => ("pending", Some(problem(sample))),
                    SampleState::Failed => ("unhealthy", Some(problem(sample))),
                };
                (state, reason, sample.services.clone())
            }
            Err(EngineError::Unavailable(reason)) => ("unknown", Some(reason.clone()), Vec::new()),
            Err(error) => ("unhealthy", Some(error.to_string()), Vec::new()),
        };
        let reason = reason.map(|reason| report::redact(&reason, &self.secrets));
        for service in &mut services {
            service.detail = report::redact(&service.detail, &self.secrets);
        }
        let before = self.health.as_ref();
        let same_state = before.is_some_and(|before| before.state == state);
        let since = match before {
            Some(before) if same_state => before.since.clone(),
            _ => timestamp(&*self.clock),
        };
        let health = HealthStatus {
            state: state.to_owned(),
            reason,
            services,
            since,
        };
        if same_state && before.is_some_and(|before| before.reason == health.reason) {
            self.health = Some(health);
            return;
        }
        let settled = self.state.is_settled();
        if settled && !same_state {
            let target_name = self.setup.target.name.as_str();
            match state {
                "unhealthy" => tracing::warn!(
                    target_name,
                    reason = health.reason,
                    "what runs is not healthy"
                ),
                "healthy" => tracing::info!(target_name, "what runs is healthy"),
                _ => tracing::debug!(target_name, state, reason = health.reason),
            }
        }
        // While it is watched every difference counts; afterwards only a change of state, or a flapping detail fills the disk.
        if !settled || !same_state {
            let sample = health.clone();
            self.record_for_attempt(|attempt| Record::Sample {
                attempt,
                health: sample,
            });
        }
        self.health = Some(health);
        self.publish();
    }

    /// Fetches, verifies and plans without a deployment. What it extracts is named by the digest and removed with the next
    /// clean-up.
    pub(super) async fn plan_only(
        &self,
        reference: Option<TagOrDigest>,
    ) -> Result<PlanReport, Refusal> {
        let wanted = reference.unwrap_or_else(|| self.setup.target.reference.tag_or_digest());
        let digest = self.head(&wanted).await.map_err(source_refusal)?;
        let verdict = self.judge(&digest).await.map_err(source_refusal)?;
        if let Some(verdict) = verdict.as_ref().filter(|verdict| !verdict.is_allowed()) {
            // Nothing unsigned is extracted, not even to look at it.
            return Err(refusal(RefusalKind::Rejected, verdict.message.clone()));
        }
        if self.paths.kept(&digest).is_none() {
            let downloaded;
            let fetched = self
                .fetched
                .as_ref()
                .filter(|(fetched, _)| *fetched == digest);
            let release = if let Some((_, release)) = fetched {
                release
            } else {
                downloaded = self.download(&digest).await.map_err(source_refusal)?;
                &downloaded
            };
            self.check_config(&release.config)
                .map_err(|reason| refusal(RefusalKind::Rejected, reason))?;
            self.unpack(&digest, release)
                .await
                .map_err(source_refusal)?;
            if !self.is_fetched(&digest) {
                self.paths
                    .clear_staging(self.fetched.as_ref().map(|(digest, _)| digest));
            }
        }
        let planned = async {
            let deployment = self.deployment(&digest)?;
            self.check_config(&deployment.config)
                .map_err(|reason| (Failure::Rejected, reason))?;
            let engine = self.engine()?;
            engine.check().await.map_err(engine_failure)?;
            let plan = engine.plan(&deployment).await.map_err(engine_failure)?;
            Ok((deployment.config.version, self.redacted(plan)))
        };
        let (version, plan) = planned.await.map_err(|(kind, reason): (Failure, String)| {
            let kind = match kind {
                Failure::Unavailable | Failure::Evidence => RefusalKind::Unavailable,
                Failure::Rejected | Failure::Unhealthy => RefusalKind::Rejected,
            };
            refusal(kind, report::redact(&reason, &self.secrets))
        })?;
        Ok(PlanReport {
            target: self.setup.target.name.clone(),
            quarantined: self.state.is_quarantined(&digest),
            digest,
            version,
            verdict,
            plan,
        })
    }
}

/// The answer to what was asked, which is then asked no more; never, when nothing was asked. Cancel-safe.
async fn answer(asked: &mut Option<Asked>) -> (Trigger, Result<Digest, SourceError>) {
    let Some((trigger, asking)) = asked else {
        return std::future::pending().await;
    };
    let (trigger, found) = (*trigger, asking.await);
    *asked = None;
    (trigger, found)
}

type Asked = (Trigger, BoxFuture<'static, Result<Digest, SourceError>>);

fn source_failure(error: SourceError) -> (Failure, String) {
    match error {
        SourceError::Rejected(reason) => (Failure::Rejected, reason),
        SourceError::Unavailable(reason) => (Failure::Unavailable, reason),
    }
}

fn source_refusal(error: SourceError) -> Refusal {
    match error {
        SourceError::Rejected(reason) => refusal(RefusalKind::Rejected, reason),
        SourceError::Unavailable(reason) => refusal(RefusalKind::Unavailable, reason),
    }
}

fn engine_failure(error: EngineError) -> (Failure, String) {
    match error {
        EngineError::Rejected(reason) => (Failure::Rejected, reason),
        EngineError::Unavailable(reason) => (Failure::Unavailable, reason),
        EngineError::Failed(reason) => (Failure::Unhealthy, reason),
    }
}

const DATA_VARIABLE: &str = "LONGSHORE_DATA";
