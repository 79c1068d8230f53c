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

mod transition;

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
