//! Engines: how a release is applied. Engines know nothing of registries, tags or trust. STUB of the contract.
//!
//! Life cycle of one deployment: `check` → `plan` → `pull` → `apply` → `observe` (many times). Everything up to `pull`
//! leaves what runs alone. Every method may be called again after a crash at any point.

pub mod compose;
pub mod files;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use oci::Digest;
use serde::{Deserialize, Serialize};

use crate::release::ReleaseConfig;
use crate::target::Target;

/// A boxed future, so that engines can be trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One release as it is to run on one target.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// The target.
    pub target: Target,
    /// The release's digest.
    pub digest: Digest,
    /// Its configuration.
    pub config: ReleaseConfig,
    /// Its extracted files: an immutable directory named by the digest.
    pub directory: PathBuf,
    /// The target's own directory of the agent's state (`<state>/targets/<name>`); an engine may keep `engine/` below it.
    pub state: PathBuf,
    /// Persistent data of the target, `${LONGSHORE_DATA}`.
    pub data: PathBuf,
    /// Variables, already filled: release defaults, target variables, `LONGSHORE_DATA`.
    pub variables: BTreeMap<String, String>,
}

/// How a release is applied.
pub trait Engine: Send + Sync {
    /// Tells whether the engine can be used at all, with versions for the ledger.
    fn check(&self) -> BoxFuture<'_, Result<EngineInfo, EngineError>>;
    /// What `apply` would do. Changes nothing. Resolves the definition, so a file that the engine rejects shows here.
    fn plan<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<Plan, EngineError>>;
    /// Fetches everything that `apply` needs (images by digest). Touches nothing that runs.
    fn pull<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<(), EngineError>>;
    /// Brings the deployment about, and returns what differed from the plan.
    fn apply<'a>(
        &'a self,
        deployment: &'a Deployment,
        plan: &'a Plan,
    ) -> BoxFuture<'a, Result<Applied, EngineError>>;
    /// One look at what runs.
    fn observe<'a>(
        &'a self,
        deployment: &'a Deployment,
    ) -> BoxFuture<'a, Result<Sample, EngineError>>;
    /// Removes what no kept deployment needs any more (images are left to the engine's own pruning; content paths are ours).
    fn clean<'a>(
        &'a self,
        target: &'a Target,
        kept: &'a [Deployment],
    ) -> BoxFuture<'a, Result<(), EngineError>>;
}
/// What answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineInfo {
    /// `Docker Engine 28.5.2, Compose 2.40.3`.
    pub description: String,
}
/// What `apply` would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// One line per service or file, in a stable order.
    pub changes: Vec<Change>,
    /// Things to know that are no change: strangers that are left alone, and so on.
    pub notes: Vec<String>,
}
impl Plan {
    /// Whether anything would change.
    pub fn has_changes(&self) -> bool {
        self.changes
            .iter()
            .any(|change| change.action != Action::Keep)
    }
}
/// One line of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The service, network, volume or path.
    pub subject: String,
    /// What happens to it.
    pub action: Action,
    /// Why, for people: `image sha256:ab… → sha256:cd…`.
    pub reason: String,
}
/// What happens to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is made.
    Create,
    /// It is replaced.
    Recreate,
    /// It is removed.
    Remove,
    /// It is left alone.
    Keep,
}
/// What `apply` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Differences from the plan, and last lines of output, redacted.
    pub notes: Vec<String>,
}
/// One look at what runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The whole of it.
    pub state: SampleState,
    /// Changes with every restart or replacement of anything observed (container ids, start times, restart counts): a different value restarts the stability window.
    pub fingerprint: String,
    /// One line per service.
    pub services: Vec<ServiceSample>,
}
/// The whole of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SampleState {
    /// All is as it should be.
    Healthy,
    /// Not yet: starting.
    Pending,
    /// Something failed for good (unhealthy, exited, crash loop, gone).
    Failed,
}
/// One service in a sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSample {
    /// The service.
    pub service: String,
    /// Its state.
    pub state: SampleState,
    /// `running, healthy`, `exited with 1`, … with last log lines (redacted) when failed.
    pub detail: String,
}
/// Why an engine refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The release cannot run here as it is (invalid definition, wrong platform, missing variable, image not pinned, project of someone else): `Rejected`, never retried for this digest and configuration.
    #[error("{0}")]
    Rejected(String),
    /// The engine, the disk or a registry: retried, never quarantined.
    #[error("{0}")]
    Unavailable(String),
    /// The engine accepted the release and failed to bring it up (for example a container that cannot start): counts like an unhealthy release.
    #[error("{0}")]
    Failed(String),
}
