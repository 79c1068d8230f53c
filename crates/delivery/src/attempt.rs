//! The attempts of a target, written down: an append-only ledger, one record a line, chained by hashes.
//!
//! The form and the chain are [`oci::record`]'s. A record is on the disk before the agent goes on; a torn last line (the
//! machine lost power while it was written) is cut off when the ledger is opened. A ledger whose chain is broken is moved
//! aside, never repaired: the next one begins by saying so.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use oci::Digest;
use oci::record::{Chain, LedgerError};
use serde::{Deserialize, Serialize};

use crate::control::{HealthStatus, StepReport};
use crate::engine::Plan;

/// One attempt in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptSummary {
    /// Counts up from 1 on each target.
    pub attempt: u64,
    /// What caused it: `start`, `poll`, `event`, `evidence`, `deploy`, `rollback`, `configuration`, `resume`.
    pub trigger: String,
    /// The reference.
    pub reference: String,
    /// The release.
    pub digest: Digest,
    /// The release that ran before.
    pub previous: Option<Digest>,
    /// RFC 3339.
    pub started: String,
    /// RFC 3339; `None` while it goes on.
    pub finished: Option<String>,
    /// `good`, `rejected`, `rolled-back`, `broken`, `superseded`; `None` while it goes on.
    pub outcome: Option<String>,
    /// Why, unless it is good.
    pub reason: Option<String>,
}

/// One record of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// An attempt begins.
    Attempt {
        /// Its number.
        attempt: u64,
        /// RFC 3339.
        at: String,
        /// What caused it.
        trigger: String,
        /// What the target follows.
        reference: String,
        /// The release.
        digest: Digest,
        /// What ran before.
        previous: Option<Digest>,
    },
    /// The evidence was judged.
    Verdict {
        /// The attempt.
        attempt: u64,
        /// The verdict with the evidence that counted; `None`: the target says `trust: none`.
        verdict: Option<trust::Verdict>,
    },
    /// The engine said what would change.
    Plan {
        /// The attempt.
        attempt: u64,
        /// The plan.
        plan: Plan,
    },
    /// A step ended.
    Step {
        /// The attempt.
        attempt: u64,
        /// The release that the step was about: in a rollback, the one to go back to.
        digest: Digest,
        /// What and how.
        step: StepReport,
    },
    /// A look at its health differed from the one before.
    Sample {
        /// The attempt.
        attempt: u64,
        /// What was seen.
        health: HealthStatus,
    },
    /// An attempt ended.
    Outcome {
        /// The attempt.
        attempt: u64,
        /// RFC 3339.
        at: String,
        /// As in [`AttemptSummary::outcome`].
        outcome: String,
        /// Why.
        reason: Option<String>,
    },
    /// Anything else worth keeping, such as an operator lifting a quarantine.
    Note {
        /// RFC 3339.
        at: String,
        /// What.
        text: String,
    },
}

impl Record {
    /// The attempt that it belongs to.
    pub fn attempt(&self) -> Option<u64> {
        match self {
            Self::Attempt { attempt, .. }
            | Self::Verdict { attempt, .. }
            | Self::Plan { attempt, .. }
            | Self::Step { attempt, .. }
            | Self::Sample { attempt, .. }
            | Self::Outcome { attempt, .. } => Some(*attempt),
            Self::Note { .. } => None,
        }
    }
}

/// A ledger that is open for writing. There is one at a time: its owner holds the target's lock.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    chain: Chain,
    bytes: u64,
}

impl Ledger {
    /// Opens a ledger, makes it when there is none, and cuts off a torn last line.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn open(path: &Path, now: &str) -> io::Result<Self> {
        let open = || {
            OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path)
        };
        let file = open()?;
        match oci::record::verify(BufReader::new(&file), Chain::new(), &mut |_| {}) {
            Ok(verified) => {
                if verified.is_torn {
                    file.set_len(verified.bytes)?;
                    file.sync_all()?;
                }
                Ok(Self {
                    path: path.to_owned(),
                    file,
                    chain: verified.chain,
                    bytes: verified.bytes,
                })
            }
            Err(LedgerError::Read(error)) => Err(error),
            Err(error) => {
                let problem = crate::runner::source::chain(&error);
                let aside =
                    path.with_extension(format!("damaged-{}", now.replace([':', '.'], "-")));
                std::fs::rename(path, &aside)?;
                tracing::error!(ledger = %path.display(), aside = %aside.display(), problem, "the ledger's chain is broken; it was moved aside");
                let mut ledger = Self {
                    path: path.to_owned(),
                    file: open()?,
                    chain: Chain::new(),
                    bytes: 0,
                };
                ledger.append(&Record::Note {
                    at: now.to_owned(),
                    text: format!(
                        "the ledger before this one is broken ({problem}) and was moved to `{}`",
                        aside.display()
                    ),
                })?;
                Ok(ledger)
            }
        }
    }

    /// Writes one record durably. After an error nothing of it is in the ledger.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        let value = serde_json::to_value(record).map_err(io::Error::other)?;
        let mut chain = self.chain;
        let line = chain.append(&value).map_err(io::Error::other)?;
        let written = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // A line that is not whole would be cut off at the next start; the next record must not be glued to it.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.chain = chain;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Checks a ledger's chain from its first record to its last and gives their number. A torn last line is no error.
///
/// # Errors
/// When the file cannot be read, or with the line at which the chain breaks.
pub fn verify(path: &Path) -> Result<u64, LedgerError> {
    read(path, &mut |_| {})
}

/// Reads a ledger record by record, checking the chain, and gives their number. A missing ledger is empty.
///
/// # Errors
/// As [`verify`]; `each` has then seen the records before.
pub fn read(path: &Path, each: &mut dyn FnMut(Record)) -> Result<u64, LedgerError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(LedgerError::Read(error)),
    };
    let verified = oci::record::verify(BufReader::new(file), Chain::new(), &mut |value| {
        // A kind that this version does not know is part of the chain and of no report.
        if let Ok(record) = serde_json::from_value(value) {
            each(record);
        }
    })?;
    Ok(verified.records)
}

/// The newest attempts, newest first.
///
/// # Errors
/// As [`verify`].
pub fn history(path: &Path, limit: usize) -> Result<Vec<AttemptSummary>, LedgerError> {
    let mut attempts: VecDeque<AttemptSummary> = VecDeque::new();
    read(path, &mut |record| {
        fold(&mut attempts, &record);
        if attempts.len() > limit {
            attempts.pop_front();
        }
    })?;
    Ok(attempts.into_iter().rev().collect())
}

fn fold(attempts: &mut VecDeque<AttemptSummary>, record: &Record) {
    match record {
        Record::Attempt {
            attempt,
            at,
            trigger,
            reference,
            digest,
            previous,
        } => attempts.push_back(AttemptSummary {
            attempt: *attempt,
            trigger: trigger.clone(),
            reference: reference.clone(),
            digest: digest.clone(),
            previous: previous.clone(),
            started: at.clone(),
            finished: None,
            outcome: None,
            reason: None,
        }),
        Record::Outcome {
            attempt,
            at,
            outcome,
            reason,
        } => {
            if let Some(summary) = attempts
                .iter_mut()
                .rev()
                .find(|summary| summary.attempt == *attempt)
            {
                summary.finished = Some(at.clone());
                summary.outcome = Some(outcome.clone());
                summary.reason.clone_from(reason);
            }
        }
        _ => {}
    }
}

/// Everything that is written of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// In short.
    pub summary: AttemptSummary,
    /// The last verdict.
    pub verdict: Option<trust::Verdict>,
    /// The last plan.
    pub plan: Option<Plan>,
    /// Its steps in order, at most [`LONGEST_STORY`].
    pub steps: Vec<StepReport>,
    /// Looks at its health, as far as they differed, at most [`LONGEST_STORY`].
    pub samples: Vec<HealthStatus>,
}

/// How many steps and samples a story tells; the first ones are dropped.
pub const LONGEST_STORY: usize = 200;

/// The story of the last attempt that applied `digest`, whatever came of it later; else of the last that was about it.
///
/// # Errors
/// As [`verify`].
pub fn story_of(path: &Path, digest: &Digest) -> Result<Option<Story>, LedgerError> {
    let mut chosen: Option<u64> = None;
    let mut chosen_applied = false;
    read(path, &mut |record| match &record {
        Record::Attempt {
            attempt,
            digest: about,
            ..
        } if about == digest && !chosen_applied => chosen = Some(*attempt),
        Record::Step {
            attempt,
            digest: about,
            step,
        } if about == digest && step.step == "apply" => {
            chosen = Some(*attempt);
            chosen_applied = true;
        }
        _ => {}
    })?;
    let Some(chosen) = chosen else {
        return Ok(None);
    };
    let mut summaries = VecDeque::new();
    let mut verdict = None;
    let mut plan = None;
    let mut steps = Vec::new();
    let mut samples = Vec::new();
    read(path, &mut |record| {
        if record.attempt() != Some(chosen) {
            return;
        }
        fold(&mut summaries, &record);
        match record {
            Record::Verdict { verdict: found, .. } => verdict = found,
            Record::Plan { plan: found, .. } => plan = Some(found),
            Record::Step { step, .. } => push_bounded(&mut steps, step),
            Record::Sample { health, .. } => push_bounded(&mut samples, health),
            _ => {}
        }
    })?;
    Ok(summaries.pop_back().map(|summary| Story {
        summary,
        verdict,
        plan,
        steps,
        samples,
    }))
}

fn push_bounded<T>(list: &mut Vec<T>, item: T) {
    if list.len() == LONGEST_STORY {
        list.remove(0);
    }
    list.push(item);
}

#[cfg(test)]
mod tests;
