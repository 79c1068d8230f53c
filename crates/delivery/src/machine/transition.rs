//! What each event makes of a state.
//!
//! A transition changes the whole state at once and asks nobody: whatever it must know stands in the state, the event or
//! the context, so each can be tested, and taken again after a crash.

use oci::Digest;

use super::{
    Attempt, Context, Event, Failure, GENERATIONS, Generation, Phase, Quarantine, Refusal, Refused,
    Running, Standing, State, Trigger,
};
use crate::target::Rollback;

impl State {
    pub(super) fn good_except(&self, digest: &Digest) -> Option<&Digest> {
        self.good
            .iter()
            .map(|generation| &generation.digest)
            .find(|good| *good != digest && !self.is_quarantined(good))
    }

    pub(super) fn take(&mut self, event: &Event, context: Context<'_>) {
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
