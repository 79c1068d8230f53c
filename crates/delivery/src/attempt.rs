//! The attempts of a target, written down: an append-only ledger, one record a line, chained by hashes.
//!
//! The form and the chain are [`oci::record`]'s. A record is on the disk before the agent goes on; a torn last line (the
//! machine lost power while it was written) is cut off when the ledger is opened. A ledger whose chain is broken is moved
//! aside, never repaired: the next one begins by saying so.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use oci::Digest;
use oci::record::{Chain, LedgerError, MAX_REPORTED};
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
        let mut value = serde_json::to_value(record).map_err(io::Error::other)?;
        // What programs say may hold what a terminal obeys; the ledger is read on one, and by registries that refuse it.
        oci::text::escape_document(&mut value);
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

    /// Its whole records in bytes, all of them on the disk.
    pub fn length(&self) -> u64 {
        self.bytes
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A piece of a ledger, to be sent elsewhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Its lines.
    pub records: Vec<serde_json::Value>,
    /// The hash of the last one.
    pub hash: Option<String>,
    /// Where the last one begins, in bytes.
    pub begin: u64,
    /// Where the last one ends.
    pub end: Option<u64>,
    /// The hash of the record before the first of these, where records were left out.
    pub after: Option<String>,
}

/// Reads lines from a place where one begins, as many as are sent at once, and nothing beyond `length` bytes of the ledger.
/// A record that no registry takes is left out: what comes after it is told, with a gap. Then `records` may be empty.
///
/// # Errors
/// When the file cannot be read, or holds something else there.
pub fn read_batch(path: &Path, from: u64, length: u64) -> io::Result<Batch> {
    let mut batch = Batch::default();
    let mut bytes = 0;
    each_line(path, from, length, &mut |begin, line| {
        bytes += line.len();
        if !batch.records.is_empty() && bytes > BATCH_BYTES {
            return Ok(false);
        }
        let record: serde_json::Value = serde_json::from_slice(line).map_err(io::Error::other)?;
        let is_taken = line.len() <= MAX_REPORTED && oci::text::is_printable(&record);
        if !is_taken && !batch.records.is_empty() {
            return Ok(false);
        }
        let hash = hash_of(&record).ok_or_else(|| io::Error::other("a line has no hash"))?;
        batch.begin = begin;
        batch.end = Some(begin + line.len() as u64);
        batch.hash = Some(hash.clone());
        if is_taken {
            batch.records.push(record);
        } else {
            bytes = 0;
            batch.after = Some(hash);
        }
        Ok(batch.records.len() < BATCH_RECORDS)
    })?;
    Ok(batch)
}

/// Where the record with this hash begins and ends, in bytes.
///
/// # Errors
/// When the file cannot be read.
pub fn find(path: &Path, hash: &str, length: u64) -> io::Result<Option<(u64, u64)>> {
    let mut found = None;
    each_line(path, 0, length, &mut |begin, line| {
        // The hash as it stands in the line; only a line that holds it is parsed.
        let may_be = line
            .windows(hash.len().max(1))
            .any(|part| part == hash.as_bytes());
        if may_be
            && let Ok(record) = serde_json::from_slice(line)
            && hash_of(&record).as_deref() == Some(hash)
        {
            found = Some((begin, begin + line.len() as u64));
        }
        Ok(found.is_none())
    })?;
    Ok(found)
}

/// The hash of the record between two places, if there is one.
pub fn hash_at(path: &Path, begin: u64, end: u64) -> Option<String> {
    let mut hash = None;
    each_line(path, begin, end, &mut |_, line| {
        hash = serde_json::from_slice(line).ok().as_ref().and_then(hash_of);
        Ok(true)
    })
    .ok()?;
    hash
}

fn hash_of(record: &serde_json::Value) -> Option<String> {
    record.get("hash")?.as_str().map(str::to_owned)
}

/// Hands out lines with their newlines and where they begin, until `each` says `false`. A missing ledger is empty.
fn each_line(
    path: &Path,
    from: u64,
    length: u64,
    each: &mut dyn FnMut(u64, &[u8]) -> io::Result<bool>,
) -> io::Result<()> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    file.seek(io::SeekFrom::Start(from))?;
    let mut reader = BufReader::new(file.take(length.saturating_sub(from)));
    let (mut at, mut line) = (from, Vec::new());
    loop {
        line.clear();
        let read = (&mut reader)
            .take(oci::record::MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut line)?;
        if read == 0 || !line.ends_with(b"\n") || !each(at, &line)? {
            return Ok(());
        }
        at += read as u64;
    }
}

/// What is sent at once: a batch is answered before the next one.
const BATCH_RECORDS: usize = 200;
const BATCH_BYTES: usize = 2 << 20;

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

/// Why a release is as it is: the attempt that was about it, and what brought it back later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// The attempt that made it good; else the last that applied it; else the last that was about it.
    pub summary: AttemptSummary,
    /// The last verdict on it up to that attempt. An attempt that was resumed after a stop judges nothing anew.
    pub verdict: Option<trust::Verdict>,
    /// The last plan of that attempt.
    pub plan: Option<Plan>,
    /// That attempt's steps, then those with which a rollback brought the release back, in order, at most
    /// [`LONGEST_STORY`].
    pub steps: Vec<StepReport>,
    /// Looks at its health, as far as they differed, at most [`LONGEST_STORY`].
    pub samples: Vec<HealthStatus>,
    /// The later attempt to leave the release that ended in bringing it back.
    pub rollback: Option<AttemptSummary>,
}

/// How many steps and samples a story tells; the first ones are dropped.
pub const LONGEST_STORY: usize = 200;

/// The story of a release. The attempt that failed and was rolled back to it is no reason for it to run: its verdict and
/// its plan are about another release.
///
/// # Errors
/// As [`verify`].
pub fn story_of(path: &Path, digest: &Digest) -> Result<Option<Story>, LedgerError> {
    let Some(chosen) = choose(path, digest)? else {
        return Ok(None);
    };
    let mut about: Option<Digest> = None;
    let mut summaries = VecDeque::new();
    let mut rollbacks = VecDeque::new();
    let mut verdict = None;
    let mut plan = None;
    let mut steps = Vec::new();
    let mut samples = Vec::new();
    let mut is_back = false;
    read(path, &mut |record| {
        if let Record::Attempt { digest, .. } = &record {
            about = Some(digest.clone());
            is_back = false;
        }
        let Some(attempt) = record.attempt() else {
            return;
        };
        let is_chosen = attempt == chosen.attempt;
        let is_rollback = Some(attempt) == chosen.rollback;
        if is_chosen {
            fold(&mut summaries, &record);
        } else if is_rollback {
            fold(&mut rollbacks, &record);
        }
        match record {
            Record::Verdict { verdict: found, .. }
                if attempt <= chosen.attempt && about.as_ref() == Some(digest) =>
            {
                verdict = found;
            }
            Record::Plan { plan: found, .. } if is_chosen => plan = Some(found),
            Record::Step {
                step,
                digest: applied,
                ..
            } if (is_chosen || is_rollback) && applied == *digest => {
                is_back |= step.step == "apply";
                push_bounded(&mut steps, step);
            }
            Record::Sample { health, .. } if is_chosen || (is_rollback && is_back) => {
                push_bounded(&mut samples, health);
            }
            _ => {}
        }
    })?;
    Ok(summaries.pop_back().map(|summary| Story {
        summary,
        verdict,
        plan,
        steps,
        samples,
        rollback: rollbacks.pop_back(),
    }))
}

/// The attempts that tell why a release runs.
struct Chosen {
    attempt: u64,
    rollback: Option<u64>,
}

fn choose(path: &Path, digest: &Digest) -> Result<Option<Chosen>, LedgerError> {
    // One attempt goes on at a time.
    let mut about_it: Option<u64> = None;
    let mut applied: Option<u64> = None;
    let (mut last, mut last_applied, mut good) = (None, None, None);
    let mut rollback = None;
    read(path, &mut |record| match &record {
        Record::Attempt {
            attempt,
            digest: of,
            ..
        } => {
            about_it = (of == digest).then_some(*attempt);
            last = about_it.or(last);
        }
        Record::Step {
            attempt,
            digest: of,
            step,
        } if of == digest && step.step == "apply" => {
            applied = Some(*attempt);
            if about_it == Some(*attempt) {
                last_applied = Some(*attempt);
                rollback = None;
            } else {
                rollback = Some(*attempt);
            }
        }
        Record::Outcome {
            attempt, outcome, ..
        } if outcome == "good" && applied == Some(*attempt) && about_it == Some(*attempt) => {
            good = Some(*attempt);
        }
        _ => {}
    })?;
    Ok(good
        .or(last_applied)
        .or(last)
        .map(|attempt| Chosen { attempt, rollback }))
}

fn push_bounded<T>(list: &mut Vec<T>, item: T) {
    if list.len() == LONGEST_STORY {
        list.remove(0);
    }
    list.push(item);
}

#[cfg(test)]
mod tests;
