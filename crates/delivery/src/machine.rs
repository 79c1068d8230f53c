//! The state machine of one target: state + event → state, and the state says which step comes next. Pure.
//!
//! `Resolved → Fetched → Verified → Admitted → Extracted → Planned → Pulled → Applying → Observing → Good`. Before
//! `Applying` nothing that runs was touched, so a failure there is `Rejected` and harmless. After it a failure goes back to
//! the last good release (`RollingBack → RolledBack`), or ends in `Broken`: hands off, for people to look at.
//!
//! Whoever drives it ([`crate::runner`]) writes the new state down before it takes the step that [`State::pending`] names.
//! A crash is therefore nothing but [`Event::Started`] on the last written state. What must hold:
//!
//! - `Good` is only ever said of a release that was observed healthy for its whole window since it was applied;
//! - a quarantined digest is never applied;
//! - a release that was applied and not yet judged is never forgotten: when the one that pushed it aside is refused, it is
//!   applied and observed again;
//! - missing evidence, registries, engines and disks are waited for, and never lead to quarantine.

use std::collections::BTreeSet;

use oci::Digest;
use serde::{Deserialize, Serialize};

use crate::target::Rollback;

/// The version of the state's form on the disk.
pub const VERSION: u32 = 1;
/// How many good releases are kept for going back.
pub const GENERATIONS: usize = 3;

/// Everything that is known of one target, as it is on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// How far the newest attempt is.
    pub phase: Phase,
    /// The newest attempt.
    pub attempt: Option<Attempt>,
    /// What was applied last: what runs, as far as the agent knows.
    pub running: Option<Running>,
    /// Releases that were good and whose files are kept, the last good first.
    pub good: Vec<Generation>,
    /// Digests that are not applied again before [`Event::Unquarantine`].
    pub quarantine: Vec<Quarantine>,
    /// The release that was refused last, so that it is not tried in vain.
    pub refused: Option<Refused>,
    /// What the reference pointed to when last asked.
    pub resolved: Option<Digest>,
    /// An operator deployed another digest while the reference pointed to this one: until it moves, it is not followed.
    pub hold: Option<Digest>,
}

/// How far an attempt is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Phase {
    /// There was no attempt yet.
    Idle,
    /// The digest is known.
    Resolved,
    /// Every blob is here, whole and verified.
    Fetched,
    /// The evidence satisfies the target's policy.
    Verified,
    /// The release is the expected one and all it needs is given.
    Admitted,
    /// Its files are on the disk.
    Extracted,
    /// The engine accepts it and says what would change.
    Planned,
    /// The engine has all it needs.
    Pulled,
    /// What runs is being changed.
    Applying {
        /// The engine or the disk cannot be used just now; tried again.
        waiting: Option<String>,
    },
    /// It was applied, and is watched.
    Observing,
    /// It was healthy for the whole window.
    Good,
    /// Refused before anything was touched.
    Rejected {
        /// Why.
        reason: String,
        /// Whether it is tried again.
        kind: Refusal,
    },
    /// The release failed; the last good one is being brought back.
    RollingBack {
        /// The release to go back to.
        to: Digest,
        /// Why.
        reason: String,
        /// It was applied, and is watched.
        applied: bool,
        /// The engine or the disk cannot be used just now; tried again.
        waiting: Option<String>,
    },
    /// The last good release runs again and was healthy for the whole window.
    RolledBack {
        /// The release that runs.
        to: Digest,
        /// Why.
        reason: String,
    },
    /// Hands off: what runs is left as it is, until a newer digest or an operator's order.
    Broken {
        /// Why.
        reason: String,
    },
}

/// Whether a refused release is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// Its evidence is missing: tried on every event for the digest and on polls.
    Evidence,
    /// A registry, the engine or the disk: the same.
    Unavailable,
    /// It stays wrong under this configuration.
    Final,
}

/// One try to bring the target to a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    /// Counts up from 1.
    pub number: u64,
    /// The release.
    pub digest: Digest,
    /// What caused it.
    pub trigger: Trigger,
    /// Fingerprint of the target's configuration.
    pub config: String,
    /// RFC 3339.
    pub started: String,
    /// What ran before.
    pub previous: Option<Digest>,
}

/// What was applied last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Running {
    /// The release.
    pub digest: Digest,
    /// What is known of it.
    pub standing: Standing,
    /// Fingerprint of the configuration it was applied with.
    pub config: String,
    /// When applying began (RFC 3339).
    pub since: String,
}

/// What is known of a release that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It may be half applied, or was not watched long enough.
    Unsettled,
    /// It was healthy for the whole window.
    Good,
    /// It failed.
    Bad,
}

/// A release that was good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// The release.
    pub digest: Digest,
    /// When it was found good (RFC 3339).
    pub since: String,
}

/// A digest that is not applied again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quarantine {
    /// The release.
    pub digest: Digest,
    /// Why.
    pub reason: String,
    /// Since when (RFC 3339).
    pub since: String,
}

/// A release that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// The release.
    pub digest: Digest,
    /// Fingerprint of the configuration under which it was refused.
    pub config: String,
    /// Whether it is tried again.
    pub kind: Refusal,
}

/// What caused an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// The agent started.
    Start,
    /// The reference was asked for, because it was time.
    Poll,
    /// The registry said that something changed.
    Event,
    /// The registry said that there is new evidence.
    Evidence,
    /// An operator's order.
    Deploy,
    /// An operator's order.
    Rollback,
    /// The configuration changed.
    Configuration,
    /// A release that was pushed aside before it was judged is taken up again.
    Resume,
}

impl Trigger {
    /// As it stands in the ledger.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Poll => "poll",
            Self::Event => "event",
            Self::Evidence => "evidence",
            Self::Deploy => "deploy",
            Self::Rollback => "rollback",
            Self::Configuration => "configuration",
            Self::Resume => "resume",
        }
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Download it.
    Fetch(Digest),
    /// Judge its evidence.
    Verify(Digest),
    /// Compare it with what the target expects.
    Admit(Digest),
    /// Extract it.
    Extract(Digest),
    /// Ask the engine what would change.
    Plan(Digest),
    /// Let the engine fetch what it needs.
    Pull(Digest),
    /// Nothing: the last moment at which to stop costs nothing.
    Begin,
    /// Plan again from the local files, and apply.
    Apply(Digest),
    /// Watch until the window is over.
    Observe(Digest),
}

impl Step {
    /// As it stands in the ledger.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fetch(_) => "fetch",
            Self::Verify(_) => "verify",
            Self::Admit(_) => "admit",
            Self::Extract(_) => "extract",
            Self::Plan(_) => "plan",
            Self::Pull(_) => "pull",
            Self::Begin => "begin",
            Self::Apply(_) => "apply",
            Self::Observe(_) => "observe",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent started on this state.
    Started,
    /// The reference points to this digest; or, with [`Trigger::Deploy`], an operator wants it.
    Resolved {
        /// The digest.
        digest: Digest,
        /// What caused the look.
        trigger: Trigger,
    },
    /// The pending step succeeded. For [`Step::Observe`]: it was healthy for the whole window.
    Done,
    /// The pending step failed.
    Failed {
        /// How.
        kind: Failure,
        /// Why.
        reason: String,
    },
    /// It is time to try again what waits for the engine or the disk.
    Retry,
    /// An operator wants the good release before the one that runs.
    RollBack,
    /// An operator lifts a quarantine.
    Unquarantine(Digest),
}

/// How a step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Evidence is missing.
    Evidence,
    /// A registry, the engine or the disk.
    Unavailable,
    /// The release cannot run here as it is.
    Rejected,
    /// The release was brought up and is not healthy.
    Unhealthy,
}

/// What the machine is told besides the event.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The target's rule.
    pub rollback: Rollback,
    /// Fingerprint of the target's configuration, as far as it changes what runs.
    pub config: &'a str,
    /// The time, RFC 3339.
    pub now: &'a str,
}

impl Default for State {
    fn default() -> Self {
        Self {
            version: VERSION,
            phase: Phase::Idle,
            attempt: None,
            running: None,
            good: Vec::new(),
            quarantine: Vec::new(),
            refused: None,
            resolved: None,
            hold: None,
        }
    }
}

impl State {
    /// The state after an event. An event that means nothing here changes nothing.
    #[must_use]
    pub fn after(&self, event: &Event, context: Context<'_>) -> Self {
        let mut next = self.clone();
        next.take(event, context);
        next
    }

    /// The step that this state waits for; `None`: for an event.
    pub fn pending(&self) -> Option<Step> {
        let digest = self.attempt.as_ref()?.digest.clone();
        match &self.phase {
            Phase::Resolved => Some(Step::Fetch(digest)),
            Phase::Fetched => Some(Step::Verify(digest)),
            Phase::Verified => Some(Step::Admit(digest)),
            Phase::Admitted => Some(Step::Extract(digest)),
            Phase::Extracted => Some(Step::Plan(digest)),
            Phase::Planned => Some(Step::Pull(digest)),
            Phase::Pulled => Some(Step::Begin),
            Phase::Applying { waiting: None } => Some(Step::Apply(digest)),
            Phase::Observing => Some(Step::Observe(digest)),
            Phase::RollingBack {
                to,
                applied: false,
                waiting: None,
                ..
            } => Some(Step::Apply(to.clone())),
            Phase::RollingBack {
                to, applied: true, ..
            } => Some(Step::Observe(to.clone())),
            Phase::Applying { waiting: Some(_) }
            | Phase::RollingBack { .. }
            | Phase::Idle
            | Phase::Good
            | Phase::Rejected { .. }
            | Phase::RolledBack { .. }
            | Phase::Broken { .. } => None,
        }
    }

    /// Whether the newest attempt has ended, as far as it depends on the agent alone.
    pub fn is_settled(&self) -> bool {
        matches!(
            self.phase,
            Phase::Idle
                | Phase::Good
                | Phase::Rejected { .. }
                | Phase::RolledBack { .. }
                | Phase::Broken { .. }
        )
    }

    /// Whether this digest is quarantined.
    pub fn is_quarantined(&self, digest: &Digest) -> bool {
        self.quarantine.iter().any(|entry| entry.digest == *digest)
    }

    /// The releases whose files must stay on the disk.
    pub fn kept(&self) -> BTreeSet<String> {
        let mut kept: BTreeSet<String> = self.good.iter().map(|g| g.digest.to_string()).collect();
        if let Some(running) = &self.running {
            kept.insert(running.digest.to_string());
        }
        if let Some(attempt) = &self.attempt {
            kept.insert(attempt.digest.to_string());
        }
        if let Phase::RollingBack { to, .. } = &self.phase {
            kept.insert(to.to_string());
        }
        kept
    }

    /// The release that [`Event::RollBack`] would bring back.
    pub fn way_back(&self) -> Option<&Digest> {
        if matches!(self.phase, Phase::RollingBack { .. }) {
            return None;
        }
        let leaving = &self.running.as_ref()?.digest;
        self.good_except(leaving)
    }

    fn good_except(&self, digest: &Digest) -> Option<&Digest> {
        self.good
            .iter()
            .map(|generation| &generation.digest)
            .find(|good| *good != digest && !self.is_quarantined(good))
    }

    fn take(&mut self, event: &Event, context: Context<'_>) {
        match event {
            Event::Started => self.started(context),
            Event::Resolved { digest, trigger } => self.resolve(digest, *trigger, context),
            Event::Done => self.done(context),
            Event::Failed { kind, reason } => self.failed(*kind, reason, context),
            Event::Retry => match &mut self.phase {
                Phase::Applying { waiting } | Phase::RollingBack { waiting, .. } => *waiting = None,
                _ => {}
            },
            Event::RollBack => self.roll_back(context),
            Event::Unquarantine(digest) => {
                self.quarantine.retain(|entry| entry.digest != *digest);
                if self
                    .refused
                    .as_ref()
                    .is_some_and(|refused| refused.digest == *digest)
                {
                    self.refused = None;
                }
            }
        }
    }

    /// What was going on when the process died is done again or looked at again, never assumed.
    fn started(&mut self, context: Context<'_>) {
        match &mut self.phase {
            Phase::Resolved
            | Phase::Fetched
            | Phase::Verified
            | Phase::Admitted
            | Phase::Extracted
            | Phase::Planned
            | Phase::Pulled => {
                // Nothing was touched, and the reference may have moved since: it is asked first.
                self.phase = Phase::Rejected {
                    reason: "the agent was stopped before anything was changed".to_owned(),
                    kind: Refusal::Unavailable,
                };
                self.resume_unsettled(context);
            }
            Phase::Applying { .. } | Phase::Observing => {
                self.phase = Phase::Applying { waiting: None }
            }
            Phase::RollingBack {
                applied, waiting, ..
            } => {
                *applied = false;
                *waiting = None;
            }
            Phase::Idle
            | Phase::Good
            | Phase::Rejected { .. }
            | Phase::RolledBack { .. }
            | Phase::Broken { .. } => {}
        }
    }

    fn resolve(&mut self, digest: &Digest, trigger: Trigger, context: Context<'_>) {
        let ordered = trigger == Trigger::Deploy;
        let mut digest = digest.clone();
        if ordered {
            self.hold = self.resolved.clone().filter(|resolved| *resolved != digest);
        } else {
            self.resolved = Some(digest.clone());
            if self.hold.as_ref() == Some(&digest) {
                match (&self.phase, &self.attempt) {
                    // It was refused for now, or the configuration changed under it.
                    (Phase::Rejected { .. } | Phase::Good, Some(attempt)) => {
                        digest = attempt.digest.clone();
                    }
                    _ => return,
                }
            } else {
                self.hold = None;
            }
        }
        if self.is_quarantined(&digest) {
            return;
        }
        let refused = self
            .refused
            .as_ref()
            .filter(|refused| refused.digest == digest && refused.config == context.config)
            .map(|refused| refused.kind);
        if refused == Some(Refusal::Final) && !ordered {
            return;
        }
        let same_attempt = self
            .attempt
            .as_ref()
            .is_some_and(|attempt| attempt.digest == digest && attempt.config == context.config);
        match &self.phase {
            Phase::RollingBack { .. } | Phase::Applying { waiting: None } => return,
            Phase::Resolved
            | Phase::Fetched
            | Phase::Verified
            | Phase::Admitted
            | Phase::Extracted
            | Phase::Planned
            | Phase::Pulled
            | Phase::Observing
            | Phase::Applying { waiting: Some(_) } => {
                if same_attempt {
                    return;
                }
                // What was refused a moment ago does not end the wait on a newer look; news about it may.
                if refused.is_some() && !ordered && trigger != Trigger::Evidence {
                    return;
                }
            }
            Phase::Broken { .. } => {
                if same_attempt && !ordered {
                    return;
                }
            }
            Phase::Idle | Phase::Good | Phase::Rejected { .. } | Phase::RolledBack { .. } => {
                if !ordered && self.runs_well(&digest, context) {
                    if self.phase != Phase::Good {
                        // The reference came back to what runs, and that was observed.
                        self.begin(digest, trigger, context);
                        self.phase = Phase::Good;
                    }
                    return;
                }
                if same_attempt && !ordered && matches!(self.phase, Phase::Rejected { .. }) {
                    self.phase = Phase::Resolved;
                    return;
                }
            }
        }
        self.begin(digest, trigger, context);
    }

    fn runs_well(&self, digest: &Digest, context: Context<'_>) -> bool {
        self.running.as_ref().is_some_and(|running| {
            running.standing == Standing::Good
                && running.digest == *digest
                && running.config == context.config
        })
    }

    fn begin(&mut self, digest: Digest, trigger: Trigger, context: Context<'_>) {
        self.attempt = Some(Attempt {
            number: self.attempt.as_ref().map_or(0, |attempt| attempt.number) + 1,
            digest,
            trigger,
            config: context.config.to_owned(),
            started: context.now.to_owned(),
            previous: self.running.as_ref().map(|running| running.digest.clone()),
        });
        self.phase = Phase::Resolved;
    }

    fn done(&mut self, context: Context<'_>) {
        let Some(attempt) = self.attempt.clone() else {
            return;
        };
        match &mut self.phase {
            Phase::Resolved => self.phase = Phase::Fetched,
            Phase::Fetched => self.phase = Phase::Verified,
            Phase::Verified => self.phase = Phase::Admitted,
            Phase::Admitted => self.phase = Phase::Extracted,
            Phase::Extracted => self.phase = Phase::Planned,
            Phase::Planned => self.phase = Phase::Pulled,
            Phase::Pulled => {
                self.set_running(&attempt.digest, &attempt.config, context);
                self.phase = Phase::Applying { waiting: None };
            }
            Phase::Applying { waiting: None } => self.phase = Phase::Observing,
            Phase::Observing => {
                self.settle_good(&attempt.digest, context);
                self.refused = self
                    .refused
                    .take()
                    .filter(|refused| refused.digest != attempt.digest);
                self.phase = Phase::Good;
            }
            Phase::RollingBack {
                applied: applied @ false,
                waiting: None,
                ..
            } => *applied = true,
            Phase::RollingBack {
                to,
                reason,
                applied: true,
                ..
            } => {
                let (to, reason) = (to.clone(), reason.clone());
                self.settle_good(&to, context);
                self.phase = Phase::RolledBack { to, reason };
            }
            Phase::Applying { .. }
            | Phase::RollingBack { .. }
            | Phase::Idle
            | Phase::Good
            | Phase::Rejected { .. }
            | Phase::RolledBack { .. }
            | Phase::Broken { .. } => {}
        }
    }

    fn failed(&mut self, kind: Failure, reason: &str, context: Context<'_>) {
        let Some(attempt) = self.attempt.clone() else {
            return;
        };
        match &mut self.phase {
            Phase::Resolved
            | Phase::Fetched
            | Phase::Verified
            | Phase::Admitted
            | Phase::Extracted
            | Phase::Planned
            | Phase::Pulled => {
                let kind = match kind {
                    Failure::Evidence => Refusal::Evidence,
                    Failure::Unavailable => Refusal::Unavailable,
                    Failure::Rejected | Failure::Unhealthy => Refusal::Final,
                };
                if kind == Refusal::Final {
                    self.hold = None;
                }
                self.refused = Some(Refused {
                    digest: attempt.digest,
                    config: attempt.config,
                    kind,
                });
                self.phase = Phase::Rejected {
                    reason: reason.to_owned(),
                    kind,
                };
                self.resume_unsettled(context);
            }
            Phase::Applying { waiting } => match kind {
                Failure::Unavailable | Failure::Evidence => *waiting = Some(reason.to_owned()),
                Failure::Rejected => self.fail(reason, Failure::Rejected, context),
                Failure::Unhealthy => self.fail(reason, Failure::Unhealthy, context),
            },
            Phase::Observing => match kind {
                Failure::Unavailable | Failure::Evidence => {
                    self.phase = Phase::Applying {
                        waiting: Some(reason.to_owned()),
                    };
                }
                Failure::Rejected | Failure::Unhealthy => self.fail(reason, kind, context),
            },
            Phase::RollingBack {
                to,
                reason: why,
                applied,
                waiting,
            } => match kind {
                Failure::Unavailable | Failure::Evidence => {
                    *applied = false;
                    *waiting = Some(reason.to_owned());
                }
                Failure::Rejected | Failure::Unhealthy => {
                    let reason = format!("{why}; going back to `{to}` failed too: {reason}");
                    self.set_bad();
                    self.phase = Phase::Broken { reason };
                }
            },
            Phase::Idle
            | Phase::Good
            | Phase::Rejected { .. }
            | Phase::RolledBack { .. }
            | Phase::Broken { .. } => {}
        }
    }

    /// The release was applied and failed.
    fn fail(&mut self, reason: &str, kind: Failure, context: Context<'_>) {
        let Some(attempt) = self.attempt.clone() else {
            return;
        };
        self.set_bad();
        self.hold = None;
        // A release that was the last good one and fails now (with another configuration, or deployed once more) has no
        // way back: an older one would not be what anybody asked for.
        let was_last_good = self
            .good
            .first()
            .is_some_and(|good| good.digest == attempt.digest);
        let to = self.good_except(&attempt.digest).cloned();
        match to {
            Some(to) if context.rollback == Rollback::Auto && !was_last_good => {
                if kind == Failure::Unhealthy {
                    self.put_in_quarantine(&attempt.digest, reason, context);
                } else {
                    self.refused = Some(Refused {
                        digest: attempt.digest,
                        config: attempt.config,
                        kind: Refusal::Final,
                    });
                }
                self.go_back(to, reason, context);
            }
            _ => {
                self.phase = Phase::Broken {
                    reason: reason.to_owned(),
                };
            }
        }
    }

    fn roll_back(&mut self, context: Context<'_>) {
        let (Some(to), Some(running)) = (self.way_back().cloned(), self.running.clone()) else {
            return;
        };
        let reason = "an operator rolled back";
        self.begin(running.digest.clone(), Trigger::Rollback, context);
        self.put_in_quarantine(&running.digest, reason, context);
        self.go_back(to, reason, context);
    }

    fn go_back(&mut self, to: Digest, reason: &str, context: Context<'_>) {
        self.set_running(&to, context.config, context);
        self.phase = Phase::RollingBack {
            to,
            reason: reason.to_owned(),
            applied: false,
            waiting: None,
        };
    }

    /// A release that was applied and pushed aside before it was judged is taken up again.
    fn resume_unsettled(&mut self, context: Context<'_>) {
        let Some(running) = &self.running else { return };
        let Some(attempt) = &mut self.attempt else {
            return;
        };
        if running.standing != Standing::Unsettled
            || self
                .quarantine
                .iter()
                .any(|entry| entry.digest == running.digest)
        {
            return;
        }
        attempt.number += 1;
        attempt.previous = Some(running.digest.clone());
        attempt.digest = running.digest.clone();
        attempt.config.clone_from(&running.config);
        attempt.trigger = Trigger::Resume;
        context.now.clone_into(&mut attempt.started);
        self.phase = Phase::Applying { waiting: None };
    }

    fn set_running(&mut self, digest: &Digest, config: &str, context: Context<'_>) {
        self.running = Some(Running {
            digest: digest.clone(),
            standing: Standing::Unsettled,
            config: config.to_owned(),
            since: context.now.to_owned(),
        });
    }

    fn set_bad(&mut self) {
        if let Some(running) = &mut self.running {
            running.standing = Standing::Bad;
        }
    }

    fn settle_good(&mut self, digest: &Digest, context: Context<'_>) {
        if let Some(running) = &mut self.running {
            running.standing = Standing::Good;
        }
        self.good.retain(|generation| generation.digest != *digest);
        let generation = Generation {
            digest: digest.clone(),
            since: context.now.to_owned(),
        };
        self.good.insert(0, generation);
        self.good.truncate(GENERATIONS);
    }

    fn put_in_quarantine(&mut self, digest: &Digest, reason: &str, context: Context<'_>) {
        self.good.retain(|generation| generation.digest != *digest);
        if !self.is_quarantined(digest) {
            self.quarantine.push(Quarantine {
                digest: digest.clone(),
                reason: reason.to_owned(),
                since: context.now.to_owned(),
            });
        }
    }
}

impl Phase {
    /// As it stands in status and ledger.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Resolved => "resolved",
            Self::Fetched => "fetched",
            Self::Verified => "verified",
            Self::Admitted => "admitted",
            Self::Extracted => "extracted",
            Self::Planned => "planned",
            Self::Pulled => "pulled",
            Self::Applying { .. } => "applying",
            Self::Observing => "observing",
            Self::Good => "good",
            Self::Rejected { .. } => "rejected",
            Self::RollingBack { .. } => "rolling-back",
            Self::RolledBack { .. } => "rolled-back",
            Self::Broken { .. } => "broken",
        }
    }

    /// Why, or what is waited for.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Applying { waiting } => waiting.clone(),
            Self::Rejected { reason, .. }
            | Self::RolledBack { reason, .. }
            | Self::Broken { reason } => Some(reason.clone()),
            Self::RollingBack {
                reason, waiting, ..
            } => Some(match waiting {
                Some(waiting) => format!("{reason}; waiting: {waiting}"),
                None => reason.clone(),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
