//! The agent's local socket: how people look at targets and give orders.
//!
//! One JSON line is a request, one JSON line its response; [`Request::Watch`] is answered with a line at every change until
//! the caller hangs up. The socket is a file of mode 0600 of the agent's user, so who may open it is the file system's
//! decision, and the agent listens on no port.

use std::path::{Path, PathBuf};

use oci::Digest;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::attempt::AttemptSummary;
use crate::engine::{Plan, ServiceSample};
use crate::release::EngineKind;

pub mod server;

/// What a caller asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of one target or of all. Answer: [`Response::Status`].
    Status {
        /// The target; all when absent.
        #[serde(default)]
        target: Option<String>,
    },
    /// The attempts of one target, newest first. Answer: [`Response::History`].
    History {
        /// The target.
        target: String,
        /// How many.
        limit: usize,
    },
    /// What a deployment would change. Fetches and verifies, changes nothing that runs. Answer: [`Response::Plan`].
    Plan {
        /// The target.
        target: String,
        /// A tag, a digest or a whole reference inside the target's repository; the target's own reference when absent.
        #[serde(default)]
        reference: Option<String>,
    },
    /// Deploys now, also what is good, rejected or broken already; a quarantined digest is refused. Answer: [`Response::Status`] of the target.
    Deploy {
        /// The target.
        target: String,
        /// As in [`Request::Plan`]. A digest other than the channel's stays until the channel moves.
        #[serde(default)]
        reference: Option<String>,
        /// Answer only when the attempt has ended.
        #[serde(default)]
        wait: bool,
    },
    /// Goes back to the good release before the one that runs, and quarantines the one that it leaves. Answer: [`Response::Status`] of the target.
    Rollback {
        /// The target.
        target: String,
        /// Answer only when the rollback has ended.
        #[serde(default)]
        wait: bool,
    },
    /// Why is this running. Answer: [`Response::Explain`].
    Explain {
        /// The target.
        target: String,
    },
    /// Lifts a quarantine; the target looks at its reference again. Answer: [`Response::Status`] of the target.
    Unquarantine {
        /// The target.
        target: String,
        /// The release's digest.
        digest: Digest,
    },
    /// Reads the configuration file again now. Answer: [`Response::Done`].
    Reload,
    /// Sends [`Response::Status`] of one target or all now and at every change, until the caller hangs up.
    Watch {
        /// The target; all when absent.
        #[serde(default)]
        target: Option<String>,
    },
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", content = "value", rename_all = "kebab-case")]
pub enum Response {
    /// Targets in the order of their names.
    Status(Vec<TargetStatus>),
    /// Attempts, newest first.
    History(Vec<AttemptSummary>),
    /// A plan.
    Plan(Box<PlanReport>),
    /// An explanation.
    Explain(Box<Explanation>),
    /// Done; a sentence for people.
    Done(String),
    /// Refused or failed; the message says what to do.
    Error(Refusal),
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people: what is wrong and what to do.
    pub message: String,
}

/// The kind of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// No such target.
    UnknownTarget,
    /// The request itself is wrong.
    Invalid,
    /// The digest is quarantined.
    Quarantined,
    /// The release or its proof was refused.
    Rejected,
    /// There is nothing to go back to, or the target is in a state in which this cannot be done.
    Impossible,
    /// The registry, the engine or the disk: try again later.
    Unavailable,
}

/// A target as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// Its name.
    pub target: String,
    /// What it follows.
    pub reference: String,
    /// The release name that it expects.
    pub release: String,
    /// The engine.
    pub engine: EngineKind,
    /// The state of the newest attempt: `idle`, `resolved`, `fetched`, `verified`, `admitted`, `extracted`, `planned`, `pulled`,
    /// `applying`, `observing`, `good`, `rejected`, `rolling-back`, `rolled-back`, `broken`.
    pub state: String,
    /// Why, where there is something to say: the rejection, the failure, what is waited for.
    pub reason: Option<String>,
    /// Nothing more will happen to this attempt by itself, except on a poll, an event or an order.
    pub settled: bool,
    /// The newest attempt's number; 0 before the first.
    pub attempt: u64,
    /// The newest attempt's release.
    pub digest: Option<Digest>,
    /// What the reference pointed to when last asked.
    pub resolved: Option<Digest>,
    /// What runs on this host.
    pub running: Option<RunningStatus>,
    /// The last look at what runs.
    pub health: Option<HealthStatus>,
    /// Good releases that are kept on the disk, the last good first.
    pub good: Vec<Digest>,
    /// Digests that are not deployed again before `unquarantine`.
    pub quarantine: Vec<QuarantineStatus>,
    /// Whether events arrive by a stream; else only polls do.
    pub stream: bool,
    /// Why the registry could not be asked, when the last attempt to do so failed.
    pub source_error: Option<String>,
}

/// What runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningStatus {
    /// The release.
    pub digest: Digest,
    /// Its version, when it states one.
    pub version: Option<String>,
    /// It was seen healthy for the whole stability window since it was applied.
    pub good: bool,
    /// Since when (RFC 3339).
    pub since: String,
}

/// The last look at what runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    /// `healthy`, `pending`, `unhealthy`, `unknown`.
    pub state: String,
    /// Why, when it is not healthy.
    pub reason: Option<String>,
    /// One line per service.
    pub services: Vec<ServiceSample>,
    /// Since when it is so (RFC 3339).
    pub since: String,
}

/// A digest that is not deployed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineStatus {
    /// The release.
    pub digest: Digest,
    /// Why.
    pub reason: String,
    /// Since when (RFC 3339).
    pub since: String,
}

/// What a deployment would change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanReport {
    /// The target.
    pub target: String,
    /// The release that was planned.
    pub digest: Digest,
    /// Its version, when it states one.
    pub version: Option<String>,
    /// The verdict; `None` where the target says `trust: none`.
    pub verdict: Option<trust::Verdict>,
    /// The digest is quarantined: the plan is for information.
    pub quarantined: bool,
    /// The plan.
    pub plan: Plan,
}

/// Why is this running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The target as it is now.
    pub status: TargetStatus,
    /// The rule in words: which keys, how many of them, or that trust is switched off.
    pub rule: String,
    /// The attempt that made what runs good; `None` when nothing was deployed yet or its records are gone.
    pub attempt: Option<AttemptSummary>,
    /// The later attempt that failed, or was given up, and ended in bringing it back.
    #[serde(default)]
    pub rollback: Option<AttemptSummary>,
    /// The verdict of that attempt, with the signers that counted.
    pub verdict: Option<trust::Verdict>,
    /// The plan of that attempt.
    pub plan: Option<Plan>,
    /// Its steps in order, then those of the rollback that concern it.
    pub steps: Vec<StepReport>,
    /// Looks at its health, as far as they differed.
    pub samples: Vec<HealthStatus>,
    /// The ledger's chain holds from its first record to its last; else where it breaks.
    pub ledger: Result<u64, String>,
}

/// One step of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// `fetch`, `verify`, `admit`, `extract`, `plan`, `pull`, `apply`, `observe`, `roll-back`.
    pub step: String,
    /// RFC 3339.
    pub started: String,
    /// RFC 3339.
    pub finished: String,
    /// Empty when it succeeded.
    pub error: Option<String>,
    /// What there is to say: engine versions, differences from the plan, last log lines (redacted).
    pub notes: Vec<String>,
}

/// Sends one request to the agent behind `socket` and reads its response.
///
/// # Errors
/// [`ControlError::Connect`] when no agent answers; a [`Response::Error`] is not an error here.
pub async fn call(socket: &Path, request: &Request) -> Result<Response, ControlError> {
    let mut watch = watch(socket, request).await?;
    watch.next().await?.ok_or(ControlError::Closed)
}

/// Sends one request and reads responses as they come; for [`Request::Watch`].
///
/// # Errors
/// As [`call`].
pub async fn watch(socket: &Path, request: &Request) -> Result<Watch, ControlError> {
    let connect = |source| ControlError::Connect {
        socket: socket.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(socket).await.map_err(connect)?;
    let mut line = serde_json::to_vec(request).map_err(ControlError::Malformed)?;
    line.push(b'\n');
    stream
        .write_all(&line)
        .await
        .map_err(ControlError::Broken)?;
    Ok(Watch {
        stream: BufReader::new(stream),
    })
}

/// Responses as they come.
#[derive(Debug)]
pub struct Watch {
    stream: BufReader<UnixStream>,
}

impl Watch {
    /// The next response; `None` when the agent ended.
    ///
    /// # Errors
    /// When the connection breaks or the answer is not understood.
    pub async fn next(&mut self) -> Result<Option<Response>, ControlError> {
        let mut line = String::new();
        let read = self
            .stream
            .read_line(&mut line)
            .await
            .map_err(ControlError::Broken)?;
        if read == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line)
            .map(Some)
            .map_err(ControlError::Malformed)
    }
}

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Nobody answers.
    #[error("no agent answers at `{socket}`: is `longshore agent run` or `longshore up` running as this user?", socket = .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the connection to the agent broke")]
    Broken(#[source] std::io::Error),
    /// The agent ended before it answered.
    #[error("the agent ended before it answered; ask again when it runs")]
    Closed,
    /// The answer is not understood: another version of the program.
    #[error("the agent's answer is not understood; is it of the same version as this program?")]
    Malformed(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests;
