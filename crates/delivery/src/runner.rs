//! Carries out what the machine decides: the one place that does I/O for a deployment.
//!
//! Its rule is one line long: the state is on the disk before the step that it names is taken. State and ledger are written
//! without a point at which a stop could come between, and a step that was cut off is taken again from its beginning. Going
//! back needs nothing but this disk: the files and the configuration of the last good releases are kept, and so are their
//! images' digests.
//!
//! One runner owns a target, by a lock on its directory. What others want of it comes through its mailbox; what they may know
//! of it is published in a [`tokio::sync::watch`] channel.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci::Digest;
use oci::reference::TagOrDigest;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::attempt::{Ledger, Record};
use crate::control::{HealthStatus, PlanReport, Refusal, RefusalKind, StepReport, TargetStatus};
use crate::engine::{BoxFuture, Engine, Plan};
use crate::machine::{Context, Event, Failure, Phase, State, Step, Trigger};
use crate::release::FetchedRelease;
use crate::reporter;
use crate::target::Target;

pub mod clock;
pub mod disk;
mod notes;
pub mod report;
pub mod source;
mod steps;

use clock::{Clock, jittered};
use disk::Paths;
use source::{Source, SourceError};

/// What a runner works with; replaced as a whole when the configuration changes.
#[derive(Clone)]
pub struct Setup {
    /// What it keeps running.
    pub target: Arc<Target>,
    /// Where releases come from.
    pub source: Arc<dyn Source>,
    /// How they are applied; `None` when this agent lacks the engine.
    pub engine: Option<Arc<dyn Engine>>,
    /// How often the reference is looked at while no stream is up.
    pub poll: Duration,
    /// How often nevertheless while one is.
    pub safety_poll: Duration,
    /// Where it says what the registry is to be told.
    pub reporter: reporter::Handle,
}

/// What a runner is told.
pub enum Message {
    /// Something may have changed. Only a hint: the reference is resolved and its release judged here.
    Hint(Trigger),
    /// There may be new evidence for this digest.
    Evidence(Digest),
    /// An operator wants this (or the reference) deployed now. The answer is the attempt's number.
    Deploy(Option<TagOrDigest>, oneshot::Sender<Result<u64, Refusal>>),
    /// An operator wants to go back. The answer is the attempt's number.
    RollBack(oneshot::Sender<Result<u64, Refusal>>),
    /// An operator lifts a quarantine.
    Unquarantine(Digest, oneshot::Sender<Result<(), Refusal>>),
    /// What would a deployment of this (or the reference) change?
    Plan(
        Option<TagOrDigest>,
        oneshot::Sender<Result<PlanReport, Refusal>>,
    ),
    /// The configuration changed.
    Configure(Setup),
}

/// A target's mailbox and what is known of it.
#[derive(Clone)]
pub struct Handle {
    /// Takes messages; bounded.
    pub mailbox: mpsc::Sender<Message>,
    /// The target as it is.
    pub status: watch::Receiver<TargetStatus>,
    /// Its paths, for reading the ledger.
    pub paths: Paths,
}

/// An attempt that was refused and is tried again.
struct Retried {
    reason: Option<String>,
    /// What the retry did so far.
    records: Vec<Record>,
}

/// Keeps one target on its release.
pub struct Runner {
    setup: Setup,
    fingerprint: String,
    secrets: Vec<String>,
    paths: Paths,
    clock: Arc<dyn Clock>,
    stream: watch::Receiver<bool>,
    mailbox: mpsc::Receiver<Message>,
    status: watch::Sender<TargetStatus>,
    ledger: Ledger,
    state: State,
    health: Option<HealthStatus>,
    source_error: Option<String>,
    disk_error: Option<String>,
    /// Until the next try: the state could not be written.
    blocked: bool,
    fetched: Option<(Digest, FetchedRelease)>,
    planned: Option<(Digest, Plan)>,
    version: Option<(Digest, Option<String>)>,
    retried: Option<Retried>,
    failed_step: Option<(&'static str, String)>,
    failures: u32,
    clean_due: bool,
    next_poll: Instant,
    next_retry: Option<Instant>,
    next_look: Instant,
    // Held for as long as the runner lives.
    _lock: std::fs::File,
}

impl Runner {
    /// Takes the target's lock, reads its state and its ledger. Nothing happens before [`Runner::run`].
    ///
    /// # Errors
    /// When another agent has the target, or its directory cannot be used.
    pub fn open(
        setup: Setup,
        paths: Paths,
        clock: Arc<dyn Clock>,
        stream: watch::Receiver<bool>,
    ) -> Result<(Self, Handle), RunnerError> {
        paths.create()?;
        let lock = paths.lock()?;
        let state = paths.load()?;
        let ledger_path = paths.ledger();
        let ledger =
            Ledger::open(&ledger_path, &timestamp(&*clock)).map_err(|source| RunnerError::Io {
                operation: "open",
                path: ledger_path,
                source,
            })?;
        paths.clear_staging(None);
        let (sender, mailbox) = mpsc::channel(MAILBOX);
        let status = report::status(&setup.target, &state, report::Circumstances::default());
        let (status, watched) = watch::channel(status);
        let retried = match &state.phase {
            Phase::Rejected { reason, .. } => Some(Retried {
                reason: Some(reason.clone()),
                records: Vec::new(),
            }),
            _ => None,
        };
        let now = Instant::now();
        let handle = Handle {
            mailbox: sender,
            status: watched,
            paths: paths.clone(),
        };
        let runner = Self {
            fingerprint: report::fingerprint(&setup.target),
            secrets: report::secrets(&setup.target),
            setup,
            paths,
            clock,
            stream,
            mailbox,
            status,
            ledger,
            state,
            health: None,
            source_error: None,
            disk_error: None,
            blocked: false,
            fetched: None,
            planned: None,
            version: None,
            retried,
            failed_step: None,
            failures: 0,
            clean_due: true,
            next_poll: now,
            next_retry: None,
            next_look: now,
            _lock: lock,
        };
        Ok((runner, handle))
    }

    /// Runs until `shutdown` is cancelled. What was going on then is resumed by the next runner.
    pub async fn run(mut self, shutdown: CancellationToken) {
        self.setup.reporter.wrote(self.ledger.length());
        self.record_interruption();
        self.transition(&Event::Started);
        let mut first_look = true;
        while !shutdown.is_cancelled() {
            self.publish();
            if self.blocked {
                // Nothing is done that cannot be written down first.
                self.idle(&shutdown).await;
                continue;
            }
            match self.state.pending() {
                Some(Step::Observe(digest)) => self.observe(&digest, &shutdown).await,
                Some(step) => self.take(step, &shutdown).await,
                None if self.clean_due => {
                    self.clean_due = false;
                    self.clean().await;
                }
                None if first_look => {
                    first_look = false;
                    self.look_at_reference(Trigger::Start, &shutdown).await;
                }
                None => self.idle(&shutdown).await,
            }
        }
        tracing::info!(
            target_name = self.setup.target.name,
            state = self.state.phase.name(),
            "stopped"
        );
    }

    /// Takes one step and turns its outcome into an event. A stop cuts it off, except that applying gets a moment to end.
    async fn take(&mut self, step: Step, shutdown: &CancellationToken) {
        let started = timestamp(&*self.clock);
        let outcome = {
            let work = self.carry_out(&step);
            tokio::pin!(work);
            tokio::select! {
                biased;
                outcome = &mut work => Some(outcome),
                () = shutdown.cancelled() => {
                    let grace = if matches!(step, Step::Apply(_)) { APPLY_GRACE } else { Duration::ZERO };
                    tokio::time::timeout(grace, work).await.ok()
                }
            }
        };
        let Some(outcome) = outcome else { return };
        self.finish(&step, started, outcome);
    }

    fn finish(&mut self, step: &Step, started: String, outcome: steps::Outcome) {
        let steps::Outcome {
            result,
            gained,
            notes,
        } = outcome;
        match gained {
            Some(steps::Gained::Release(digest, release)) => {
                self.fetched = Some((digest, *release));
            }
            Some(steps::Gained::Plan(digest, plan)) => {
                self.record_for_attempt(|attempt| Record::Plan {
                    attempt,
                    plan: plan.clone(),
                });
                self.planned = Some((digest, plan));
            }
            Some(steps::Gained::Verdict(verdict)) => {
                self.record_for_attempt(|attempt| Record::Verdict {
                    attempt,
                    verdict: verdict.map(|verdict| *verdict),
                });
            }
            None => {}
        }
        let result =
            result.map_err(|(kind, reason)| (kind, report::redact(&reason, &self.secrets)));
        let failed = result
            .as_ref()
            .err()
            .map(|(_, reason)| (step.name(), reason.clone()));
        let repeated = failed.is_some() && failed == self.failed_step;
        self.failed_step = failed;
        if let Some(digest) = step_digest(step).cloned()
            && !repeated
        {
            let report = StepReport {
                step: step.name().to_owned(),
                started,
                finished: timestamp(&*self.clock),
                error: result.as_ref().err().map(|(_, reason)| reason.clone()),
                notes: notes
                    .iter()
                    .map(|note| report::redact(note, &self.secrets))
                    .collect(),
            };
            self.record_for_attempt(|attempt| Record::Step {
                attempt,
                digest,
                step: report,
            });
        }
        if matches!(step, Step::Apply(_)) {
            // A plan is good for one apply: whatever that did, the next one looks again.
            self.planned = None;
        }
        match result {
            Ok(()) => {
                self.transition(&Event::Done);
            }
            Err((kind, reason)) => {
                if matches!(step, Step::Extract(_)) {
                    // Whatever was wrong with the download or the disk: it is fetched anew, and its space is free until then.
                    self.fetched = None;
                    self.paths.clear_staging(None);
                }
                self.fail(kind, reason);
            }
        }
    }

    fn fail(&mut self, kind: Failure, reason: String) {
        self.transition(&Event::Failed { kind, reason });
        if self.waits() {
            let delay = match self.state.phase {
                Phase::Rejected {
                    kind: crate::machine::Refusal::Evidence,
                    ..
                } => self.setup.poll,
                _ => self.back_off(),
            };
            self.next_retry = Some(Instant::now() + jittered(delay, &*self.clock));
        }
    }

    /// Whether the state waits for something that may come by itself.
    fn waits(&self) -> bool {
        matches!(
            &self.state.phase,
            Phase::Applying { waiting: Some(_) }
                | Phase::RollingBack {
                    waiting: Some(_),
                    ..
                }
                | Phase::Rejected {
                    kind: crate::machine::Refusal::Evidence | crate::machine::Refusal::Unavailable,
                    ..
                }
        )
    }

    fn back_off(&mut self) -> Duration {
        let delay = FIRST_RETRY.saturating_mul(1 << self.failures.min(10));
        self.failures += 1;
        delay.min(self.setup.poll.max(FIRST_RETRY))
    }

    /// Waits for a message, a poll, a retry or the next look at what runs.
    async fn idle(&mut self, shutdown: &CancellationToken) {
        let look = self.state.running.is_some() && self.state.is_settled();
        let retry = self.next_retry;
        let (poll, next_look) = (self.next_poll, self.next_look);
        let retry_due = sleep_until(retry);
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            message = self.mailbox.recv() => match message {
                Some(message) => self.receive(message, shutdown).await,
                // Nobody can say anything any more; polls go on.
                None => shutdown.cancelled().await,
            },
            () = retry_due => self.retry(shutdown).await,
            () = changed(&mut self.stream) => self.pace(),
            () = tokio::time::sleep_until(poll) => self.look_at_reference(Trigger::Poll, shutdown).await,
            () = tokio::time::sleep_until(next_look), if look => self.look_at_running().await,
        }
    }

    /// Without a stream the reference is looked at more often, from now on.
    fn pace(&mut self) {
        if !*self.stream.borrow() {
            let soon = Instant::now() + jittered(self.setup.poll, &*self.clock);
            self.next_poll = self.next_poll.min(soon);
        }
        self.publish();
    }

    async fn retry(&mut self, shutdown: &CancellationToken) {
        self.next_retry = None;
        self.blocked = false;
        if matches!(
            self.state.phase,
            Phase::Applying { .. } | Phase::RollingBack { .. }
        ) {
            self.transition(&Event::Retry);
        } else {
            self.look_at_reference(Trigger::Poll, shutdown).await;
        }
    }

    async fn receive(&mut self, message: Message, shutdown: &CancellationToken) {
        match message {
            Message::Hint(trigger) => self.look_at_reference(trigger, shutdown).await,
            Message::Evidence(digest) => {
                let about = |known: Option<&Digest>| known == Some(&digest);
                let waits = matches!(self.state.phase, Phase::Rejected { .. })
                    && about(self.state.attempt.as_ref().map(|attempt| &attempt.digest));
                let refused = about(self.state.refused.as_ref().map(|refused| &refused.digest));
                if waits || refused {
                    self.look_at_reference(Trigger::Evidence, shutdown).await;
                }
            }
            Message::Deploy(reference, reply) => {
                let answer = self.deploy(reference).await;
                let _ = reply.send(answer);
            }
            Message::RollBack(reply) => {
                let answer = self.roll_back();
                let _ = reply.send(answer);
            }
            Message::Unquarantine(digest, reply) => {
                let answer = self.unquarantine(digest, shutdown).await;
                let _ = reply.send(answer);
            }
            Message::Plan(reference, reply) => {
                let answer = self.plan_only(reference).await;
                let _ = reply.send(answer);
            }
            Message::Configure(setup) => {
                self.fingerprint = report::fingerprint(&setup.target);
                self.secrets = report::secrets(&setup.target);
                self.setup = setup;
                self.planned = None;
                self.look_at_reference(Trigger::Configuration, shutdown)
                    .await;
            }
        }
        self.publish();
    }

    async fn deploy(&mut self, reference: Option<TagOrDigest>) -> Result<u64, Refusal> {
        let wanted = reference.unwrap_or_else(|| self.setup.target.reference.tag_or_digest());
        if matches!(self.state.phase, Phase::RollingBack { .. }) {
            return Err(refusal(
                RefusalKind::Impossible,
                "a rollback is going on; wait until it has ended".to_owned(),
            ));
        }
        let digest = self
            .head(&wanted)
            .await
            .map_err(|error| refusal(RefusalKind::Unavailable, error.to_string()))?;
        if self.state.is_quarantined(&digest) {
            return Err(self.quarantined(&digest));
        }
        if wanted == self.setup.target.reference.tag_or_digest() {
            // The order is for what the channel points to now: it is known, and not held against a later move.
            self.state.resolved = Some(digest.clone());
        }
        let before = self
            .state
            .attempt
            .as_ref()
            .map_or(0, |attempt| attempt.number);
        if !self.transition(&Event::Resolved {
            digest,
            trigger: Trigger::Deploy,
        }) {
            return Err(self.cannot_write());
        }
        match &self.state.attempt {
            Some(attempt) if attempt.number > before => Ok(attempt.number),
            _ => Err(refusal(
                RefusalKind::Impossible,
                format!(
                    "the target is {} and cannot be deployed now; wait until that has ended",
                    self.state.phase.name()
                ),
            )),
        }
    }

    fn roll_back(&mut self) -> Result<u64, Refusal> {
        if self.state.way_back().is_none() {
            return Err(refusal(
                RefusalKind::Impossible,
                "there is no other good release on this host to go back to".to_owned(),
            ));
        }
        if !self.transition(&Event::RollBack) {
            return Err(self.cannot_write());
        }
        Ok(self
            .state
            .attempt
            .as_ref()
            .map_or(0, |attempt| attempt.number))
    }

    async fn unquarantine(
        &mut self,
        digest: Digest,
        shutdown: &CancellationToken,
    ) -> Result<(), Refusal> {
        if !self.state.is_quarantined(&digest) {
            return Err(refusal(
                RefusalKind::Invalid,
                format!("`{digest}` is not quarantined"),
            ));
        }
        if !self.transition(&Event::Unquarantine(digest.clone())) {
            return Err(self.cannot_write());
        }
        let at = timestamp(&*self.clock);
        self.record(&Record::Note {
            at,
            text: format!("an operator lifted the quarantine of `{digest}`"),
        });
        self.look_at_reference(Trigger::Poll, shutdown).await;
        Ok(())
    }

    fn quarantined(&self, digest: &Digest) -> Refusal {
        let reason = self
            .state
            .quarantine
            .iter()
            .find(|entry| entry.digest == *digest)
            .map(|entry| entry.reason.clone())
            .unwrap_or_default();
        refusal(
            RefusalKind::Quarantined,
            format!(
                "`{digest}` is quarantined on this target ({reason}); to try it again: `longshore agent unquarantine {} {digest}`",
                self.setup.target.name
            ),
        )
    }

    fn cannot_write(&self) -> Refusal {
        refusal(
            RefusalKind::Unavailable,
            self.disk_error
                .clone()
                .unwrap_or_else(|| "the state cannot be written".to_owned()),
        )
    }

    /// Asks what the reference points to. HEAD only: an unchanged digest downloads and writes nothing.
    async fn look_at_reference(&mut self, trigger: Trigger, shutdown: &CancellationToken) {
        let asked = self.ask();
        let found = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            found = asked => found,
        };
        self.answered(trigger, found);
    }

    /// Asks what the reference points to; whoever cannot wait for the answer polls it beside other work.
    fn ask(&mut self) -> BoxFuture<'static, Result<Digest, SourceError>> {
        let up = *self.stream.borrow();
        let pause = if up {
            self.setup.safety_poll
        } else {
            self.setup.poll
        };
        self.next_poll = Instant::now() + jittered(pause, &*self.clock);
        let setup = self.setup.clone();
        Box::pin(async move { head(&setup, &setup.target.reference.tag_or_digest()).await })
    }

    fn answered(&mut self, trigger: Trigger, found: Result<Digest, SourceError>) {
        match found {
            Ok(digest) => {
                if self.source_error.take().is_some() {
                    tracing::info!(
                        target_name = self.setup.target.name,
                        "the registry answers again"
                    );
                    self.failures = 0;
                }
                if trigger == Trigger::Poll
                    && let Some(health) = self
                        .health
                        .as_ref()
                        .filter(|health| health.state == "unhealthy")
                {
                    tracing::warn!(
                        target_name = self.setup.target.name,
                        reason = health.reason,
                        "what runs is not healthy"
                    );
                }
                self.transition(&Event::Resolved { digest, trigger });
            }
            Err(error) => {
                let error = report::redact(&error.to_string(), &self.secrets);
                if self.source_error.as_ref() != Some(&error) {
                    tracing::warn!(
                        target_name = self.setup.target.name,
                        error,
                        "the registry cannot be asked"
                    );
                }
                self.source_error = Some(error);
                let delay = self.back_off();
                self.next_retry = Some(Instant::now() + jittered(delay, &*self.clock));
            }
        }
        self.publish();
    }

    async fn head(&self, reference: &TagOrDigest) -> Result<Digest, SourceError> {
        head(&self.setup, reference).await
    }

    /// Gives the machine an event, and writes down what came of it before anything else happens. Tells whether it could be
    /// written; if not, the state is as before and the step is taken again later.
    fn transition(&mut self, event: &Event) -> bool {
        let now = timestamp(&*self.clock);
        let context = Context {
            rollback: self.setup.target.rollback,
            config: &self.fingerprint,
            now: &now,
        };
        let next = self.state.after(event, context);
        if next == self.state {
            return true;
        }
        if let Err(error) = durably(|| self.paths.save(&next)) {
            let RunnerError::Io {
                operation,
                path,
                source,
            } = &error
            else {
                return false;
            };
            let text = source::disk_error(operation, path, source);
            if self.disk_error.as_ref() != Some(&text) {
                tracing::error!(
                    target_name = self.setup.target.name,
                    error = text,
                    "nothing is done that cannot be written down first"
                );
            }
            self.disk_error = Some(text);
            self.blocked = true;
            let delay = self.back_off();
            self.next_retry = Some(Instant::now() + jittered(delay, &*self.clock));
            return false;
        }
        self.disk_error = None;
        self.blocked = false;
        let before = std::mem::replace(&mut self.state, next);
        self.note_transition(&before, event, &now);
        self.publish();
        true
    }
}

async fn head(setup: &Setup, reference: &TagOrDigest) -> Result<Digest, SourceError> {
    let asked = setup.source.head(&setup.target, reference);
    match tokio::time::timeout(HEAD_TIMEOUT, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(SourceError::Unavailable(format!(
            "`{}` did not answer within {} s",
            setup.target.reference.host,
            HEAD_TIMEOUT.as_secs()
        ))),
    }
}

/// Comes back when a stream came up or went down. Cancel-safe.
async fn changed(stream: &mut watch::Receiver<bool>) {
    if stream.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Writes that must be over before anything else happens; on a runtime with several threads the others go on meanwhile.
fn durably<T>(write: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(write),
        _ => write(),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn step_digest(step: &Step) -> Option<&Digest> {
    match step {
        Step::Fetch(digest)
        | Step::Verify(digest)
        | Step::Admit(digest)
        | Step::Extract(digest)
        | Step::Plan(digest)
        | Step::Pull(digest)
        | Step::Apply(digest)
        | Step::Observe(digest) => Some(digest),
        Step::Begin => None,
    }
}

pub(crate) fn refusal(kind: RefusalKind, message: String) -> Refusal {
    Refusal { kind, message }
}

/// The time as it stands in records: RFC 3339, milliseconds.
pub(crate) fn timestamp(clock: &dyn Clock) -> String {
    let now = clock.now();
    now.round(jiff::Unit::Millisecond)
        .unwrap_or(now)
        .to_string()
}

/// Why a target cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// Another agent has it.
    #[error("another agent holds `{path}`: stop it first", path = .0.display())]
    Locked(PathBuf),
    /// Its state is of a newer program.
    #[error("`{path}` has version {version}, this program knows {known}: run the newer `longshore` that wrote it", path = .path.display(), known = crate::machine::VERSION)]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Its state is not understood.
    #[error("`{path}` is damaged; restore it, or move it away to begin anew with nothing to go back to", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// The disk.
    #[error("cannot {operation} `{path}`", path = .path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

const MAILBOX: usize = 64;
const APPLY_GRACE: Duration = Duration::from_secs(8);
const FIRST_RETRY: Duration = Duration::from_secs(5);
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
