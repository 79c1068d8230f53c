//! What is written and told of a deployment as it goes: ledger, log, status.

use tokio::time::Instant;

use super::{LOOK, Retried, Runner, durably, report, source, timestamp};
use crate::attempt::Record;
use crate::machine::{Event, Phase, State};
use crate::reporter::Releases;

impl Runner {
    /// Ledger, log and clean-up after a transition.
    pub(super) fn note_transition(&mut self, before: &State, event: &Event, now: &str) {
        let (phase, attempt) = (self.state.phase.clone(), self.state.attempt.clone());
        let number = attempt.as_ref().map_or(0, |attempt| attempt.number);
        let number_before = before.attempt.as_ref().map_or(0, |attempt| attempt.number);
        if number != number_before {
            if !before.is_settled() {
                let (outcome, reason) = match event {
                    Event::Failed { reason, .. } => ("rejected", Some(reason.clone())),
                    _ => ("superseded", None),
                };
                self.record(&Record::Outcome {
                    attempt: number_before,
                    at: now.to_owned(),
                    outcome: outcome.to_owned(),
                    reason,
                });
            }
            if let Some(attempt) = &attempt {
                self.record(&Record::Attempt {
                    attempt: attempt.number,
                    at: attempt.started.clone(),
                    trigger: attempt.trigger.as_str().to_owned(),
                    reference: self.setup.target.reference.to_string(),
                    digest: attempt.digest.clone(),
                    previous: attempt.previous.clone(),
                });
            }
            self.planned = None;
            self.retried = None;
            self.failed_step = None;
            self.failures = 0;
            self.next_retry = None;
            if self.fetched.as_ref().map(|(digest, _)| digest)
                != attempt.as_ref().map(|attempt| &attempt.digest)
            {
                self.fetched = None;
                self.paths.clear_staging(None);
            }
        }
        if phase == before.phase {
            return;
        }
        let digest = attempt.as_ref().map(|attempt| attempt.digest.to_string());
        let reason = phase.reason();
        let name = phase.name();
        let target_name = self.setup.target.name.as_str();
        match phase {
            Phase::Rejected { .. } | Phase::RollingBack { .. } | Phase::RolledBack { .. } => {
                tracing::warn!(target_name, digest, state = name, reason);
            }
            Phase::Broken { .. } => tracing::error!(target_name, digest, state = name, reason),
            _ => tracing::info!(target_name, digest, state = name, reason),
        }
        if self.state.is_settled() && number > 0 {
            self.record_outcome(number, name, reason, now);
            if !matches!(phase, Phase::Rejected { .. }) {
                self.failures = 0;
                self.next_retry = None;
                // The reference may have moved while nobody could follow it.
                self.next_poll = Instant::now();
                self.next_look = Instant::now() + LOOK;
                self.clean_due = true;
            }
        } else if matches!(phase, Phase::Applying { .. } | Phase::RollingBack { .. }) {
            if let Some(retried) = self.retried.take() {
                self.record_all(retried.records);
            }
            if !matches!(
                before.phase,
                Phase::Applying { .. } | Phase::RollingBack { .. }
            ) {
                self.health = None;
            }
        }
        if matches!(self.state.phase, Phase::Extracted) {
            // The files are in their place; the download is no longer needed.
            self.fetched = None;
            self.paths.clear_staging(None);
        }
    }

    /// A wait that goes on is not written down at every try: what a retry did is kept back until it differs.
    pub(super) fn record_outcome(
        &mut self,
        attempt: u64,
        outcome: &str,
        reason: Option<String>,
        now: &str,
    ) {
        if let Some(mut retried) = self.retried.take() {
            if outcome == "rejected" && retried.reason == reason {
                retried.records.clear();
                self.retried = Some(retried);
                return;
            }
            self.record_all(retried.records);
        }
        self.record(&Record::Outcome {
            attempt,
            at: now.to_owned(),
            outcome: outcome.to_owned(),
            reason: reason.clone(),
        });
        if outcome == "rejected" {
            self.retried = Some(Retried {
                reason,
                records: Vec::new(),
            });
        }
    }

    pub(super) fn record_all(&mut self, records: Vec<Record>) {
        for record in records {
            self.record(&record);
        }
    }

    /// What the last process was doing is written down as cut off.
    pub(super) fn record_interruption(&mut self) {
        if self.state.pending().is_some() {
            let text = format!(
                "the agent started and found the target {}",
                self.state.phase.name()
            );
            let at = timestamp(&*self.clock);
            self.record(&Record::Note { at, text });
        }
    }

    pub(super) fn record_for_attempt(&mut self, make: impl FnOnce(u64) -> Record) {
        let number = self
            .state
            .attempt
            .as_ref()
            .map_or(0, |attempt| attempt.number);
        let record = make(number);
        match &mut self.retried {
            Some(retried) => retried.records.push(record),
            None => self.record(&record),
        }
    }

    /// A ledger that cannot be written (a full disk) does not stop a rollback; the log says it.
    pub(super) fn record(&mut self, record: &Record) {
        if let Err(error) = durably(|| self.ledger.append(record)) {
            let error = source::disk_error("write", self.ledger.path(), &error);
            tracing::error!(
                target_name = self.setup.target.name,
                error,
                "a record of the ledger is lost"
            );
        }
        self.setup.reporter.wrote(self.ledger.length());
    }

    pub(super) fn publish(&mut self) {
        self.setup.reporter.need(Releases::of(&self.state));
        let running = self.state.running.as_ref().map(|running| &running.digest);
        if self.version.as_ref().map(|(digest, _)| digest) != running {
            self.version = running.map(|digest| {
                (
                    digest.clone(),
                    self.paths.kept(digest).and_then(|kept| kept.config.version),
                )
            });
        }
        let status = report::status(
            &self.setup.target,
            &self.state,
            report::Circumstances {
                version: self
                    .version
                    .as_ref()
                    .and_then(|(_, version)| version.clone()),
                health: self.health.clone(),
                source_error: self.source_error.clone(),
                disk_error: self.disk_error.clone(),
                stream: *self.stream.borrow(),
            },
        );
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }
}
