//! Watching a release that was applied, until it is healthy for a whole window or has failed.
//!
//! The window is what `docker compose up --wait` lacks: a container that crashes four seconds after its start is running
//! at its first look. Healthy counts only when it lasts, with the same fingerprint (container ids, start times, restart
//! counts), for `health.stability`; a restart in between starts the window anew, so a crash loop runs into the timeout.
//! An engine that cannot be asked says nothing about the release: its silence neither fails it nor runs its clock.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::{EngineError, Sample, SampleState, ServiceSample};
use crate::target::Health;

pub mod http;

/// Judges one look after the other. Pure: times are passed in.
#[derive(Clone, Debug)]
pub struct Watch {
    stability: Duration,
    timeout: Duration,
    deadline: Option<Instant>,
    healthy_since: Option<Instant>,
    fingerprint: Option<String>,
    failed_in_a_row: u32,
    blind_since: Option<Instant>,
    last_problem: Option<String>,
}

/// What is known after a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgment {
    /// Look again.
    Waiting,
    /// Healthy for the whole window.
    Healthy,
    /// Failed, or not healthy in time.
    Unhealthy(String),
}

impl Watch {
    /// A watch that begins with its first look.
    pub fn new(health: &Health) -> Self {
        Self {
            stability: health.stability,
            timeout: health.timeout,
            deadline: None,
            healthy_since: None,
            fingerprint: None,
            failed_in_a_row: 0,
            blind_since: None,
            last_problem: None,
        }
    }

    /// Takes in one look.
    pub fn look(&mut self, now: Instant, look: Result<&Sample, &EngineError>) -> Judgment {
        let deadline = *self.deadline.get_or_insert(now + self.timeout);
        let sample = match look {
            Ok(sample) => sample,
            Err(EngineError::Unavailable(_)) => {
                self.blind_since.get_or_insert(now);
                self.healthy_since = None;
                return Judgment::Waiting;
            }
            Err(error) => return Judgment::Unhealthy(error.to_string()),
        };
        let deadline = match self.blind_since.take() {
            Some(since) => *self.deadline.insert(deadline + (now - since)),
            None => deadline,
        };
        if self.fingerprint.as_ref() != Some(&sample.fingerprint) {
            if self.fingerprint.is_some() && self.healthy_since.is_some() {
                self.last_problem = Some("it was restarted while it was being watched".to_owned());
            }
            self.fingerprint = Some(sample.fingerprint.clone());
            self.healthy_since = None;
        }
        match sample.state {
            SampleState::Healthy => {
                self.failed_in_a_row = 0;
                let since = *self.healthy_since.get_or_insert(now);
                if now - since >= self.stability {
                    return Judgment::Healthy;
                }
            }
            SampleState::Pending => {
                self.failed_in_a_row = 0;
                self.healthy_since = None;
                self.last_problem = Some(problem(sample));
            }
            SampleState::Failed => {
                self.failed_in_a_row += 1;
                self.healthy_since = None;
                self.last_problem = Some(problem(sample));
                if self.failed_in_a_row >= CONFIRMATIONS {
                    return Judgment::Unhealthy(problem(sample));
                }
            }
        }
        if now >= deadline {
            let timeout = self.timeout.as_secs();
            let reason = self
                .last_problem
                .clone()
                .unwrap_or_else(|| "it was never healthy for long enough".to_owned());
            return Judgment::Unhealthy(format!("not healthy within {timeout} s: {reason}"));
        }
        Judgment::Waiting
    }
}

/// What is wrong in a sample, in one sentence.
pub fn problem(sample: &Sample) -> String {
    let ill: Vec<String> = sample
        .services
        .iter()
        .filter(|service| service.state != SampleState::Healthy)
        .map(|service| format!("`{}`: {}", service.service, service.detail))
        .collect();
    match (ill.is_empty(), sample.state) {
        (false, _) => ill.join("; "),
        (true, SampleState::Healthy) => "healthy".to_owned(),
        (true, SampleState::Pending) => "still starting".to_owned(),
        (true, SampleState::Failed) => "failed".to_owned(),
    }
}

/// Joins what HTTP checks found to what the engine saw. A URL that does not answer is not ready yet, never failed for good.
pub fn with_http(mut sample: Sample, checks: &[(String, Result<(), String>)]) -> Sample {
    for (url, result) in checks {
        let (state, detail) = match result {
            Ok(()) => (SampleState::Healthy, "answers".to_owned()),
            Err(problem) => (SampleState::Pending, problem.clone()),
        };
        if state == SampleState::Pending && sample.state == SampleState::Healthy {
            sample.state = SampleState::Pending;
        }
        sample.services.push(ServiceSample {
            service: url.clone(),
            state,
            detail,
        });
    }
    sample
}

/// One bad look may be the moment of a restart.
const CONFIRMATIONS: u32 = 2;

#[cfg(test)]
mod tests;
