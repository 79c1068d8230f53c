//! The Docker Compose engine.
//!
//! The plugin knows what a Compose file means and brings it about; everything that decides is ours. The plugin *resolves* the release's files
//! (`config`), we pin the result to digests and content (`rewrite`), plan by comparing definition hashes with the labels of the containers
//! that exist (`planning`), pull images by digest through the Engine API before anything is touched, hand the result to `up` on standard input,
//! and look at what runs through the Engine API.
//!
//! Three things follow from that. The truth is what runs: a kill at any point leaves nothing to repair but the difference that the next plan shows.
//! The resolved project may hold secrets and is never written anywhere. And a service is made anew only when its own definition, its image or content that it
//! mounts changed.
//!
//! What this engine does not do: build images, remove volumes or networks, or prune images.

mod content;
mod docker;
mod model;
mod planning;
mod platform;
mod process;
mod record;
mod redact;
mod resolve;
mod rewrite;
mod state;
mod upkeep;
mod version;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use oci::{Platform, Reference};
use tokio::sync::OnceCell;

use self::docker::{Answer, Engine};
use self::planning::{Container, Planned};
use self::platform::{platform_refusal, runs_on};
use self::process::{Output, Plugin, Run, RunError};
use self::record::Record;
use self::redact::last_lines;
use self::resolve::Key;
use self::rewrite::{Resolved, Wanted};
use self::state::{Paths, blocking, lock_file, prepare, read_record, sweep, unavailable};
use self::version::Version;
use super::{
    Action, Applied, BoxFuture, Deployment, EngineError, EngineInfo, Plan, Sample, SampleState,
};
use crate::target::Target;

/// Gives a user name and a password for a registry's host.
pub type Credentials = Arc<dyn Fn(&str) -> Option<(String, String)> + Send + Sync>;

/// How the engine is reached.
#[derive(Clone)]
pub struct ComposeOptions {
    /// The engine, in the words of `DOCKER_HOST` (`unix:///run/docker.sock`, `tcp://…`); default: `unix:///var/run/docker.sock`.
    pub docker_host: Option<String>,
    /// The `docker` program, or the Compose plugin itself when its name begins with `docker-compose`.
    pub docker: PathBuf,
    /// How long one `up` may take; Compose waits for `depends_on` conditions without an end of its own.
    pub apply_timeout: Duration,
    /// Logins for the registries that images are pulled from.
    pub credentials: Credentials,
}

impl Default for ComposeOptions {
    fn default() -> Self {
        Self {
            docker_host: None,
            docker: PathBuf::from("docker"),
            apply_timeout: Duration::from_mins(10),
            credentials: Arc::new(|_| None),
        }
    }
}

impl fmt::Debug for ComposeOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ComposeOptions")
            .field("docker_host", &self.docker_host)
            .field("docker", &self.docker)
            .field("apply_timeout", &self.apply_timeout)
            .finish_non_exhaustive()
    }
}

/// Resolved projects of one target.
type Known = VecDeque<(Key, Arc<Resolved>)>;

/// Applies releases with Docker Compose.
#[derive(Debug)]
pub struct ComposeEngine {
    options: ComposeOptions,
    plugin: Plugin,
    /// The plugin's version, once it was found good.
    version: OnceCell<Version>,
    engine: OnceCell<Engine>,
    /// Resolved projects by target, the latest last: `observe` looks every second and must not start a process each time.
    resolved: Mutex<HashMap<String, Known>>,
    /// One `up` at a time for each project within this process; between processes it is a file lock.
    projects: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl ComposeEngine {
    /// An engine with these options. Nothing is started or reached before it is used.
    pub fn new(options: ComposeOptions) -> Self {
        let host = options
            .docker_host
            .clone()
            .unwrap_or_else(|| DEFAULT_HOST.to_owned());
        let plugin = Plugin {
            program: options.docker.clone(),
            host,
        };
        Self {
            options,
            plugin,
            version: OnceCell::new(),
            engine: OnceCell::new(),
            resolved: Mutex::default(),
            projects: Mutex::default(),
        }
    }

    async fn engine(&self) -> Result<&Engine, EngineError> {
        self.engine
            .get_or_try_init(|| Engine::connect(&self.plugin.host))
            .await
    }

    async fn plan_now(
        &self,
        deployment: &Deployment,
        resolved: &Resolved,
        record: &Record,
    ) -> Result<(Planned, Vec<Container>), EngineError> {
        let target = &deployment.target;
        let containers = self.engine().await?.containers(&target.project).await?;
        let planned = planning::plan(
            &target.name,
            target.adopt,
            &target.project,
            &resolved.services,
            &containers,
            record,
        )
        .map_err(EngineError::Rejected)?;
        Ok((planned, containers))
    }

    async fn check_platforms(&self, resolved: &Resolved) -> Result<(), EngineError> {
        let Answer { platform: host, .. } = self.engine().await?.answer().await?;
        resolved.services.iter().try_for_each(|(service, wanted)| {
            platform_refusal(service, wanted, &host)
                .map_or(Ok(()), |refusal| Err(EngineError::Rejected(refusal)))
        })
    }

    async fn pull_images(&self, resolved: &Resolved) -> Result<(), EngineError> {
        let engine = self.engine().await?;
        let images: BTreeMap<String, (&Reference, Option<&str>)> = resolved
            .services
            .values()
            .map(|wanted| {
                (
                    wanted.image_text(),
                    (&wanted.image, wanted.platform.as_deref()),
                )
            })
            .collect();
        futures_util::stream::iter(images.into_values().map(Ok))
            .try_for_each_concurrent(PARALLEL_PULLS, |(image, platform)| async move {
                if engine.image(image).await?.is_some() {
                    return Ok(());
                }
                engine
                    .pull(image, platform, (self.options.credentials)(&image.host))
                    .await?;
                match engine.image(image).await? {
                    Some(_) => Ok(()),
                    None => Err(EngineError::Unavailable(format!(
                        "the engine pulled `{image}` and does not have it"
                    ))),
                }
            })
            .await?;
        // A foreign format names no platforms: what was pulled tells.
        let Answer { platform: host, .. } = engine.answer().await?;
        for (service, wanted) in resolved
            .services
            .iter()
            .filter(|(_, wanted)| wanted.platforms.is_empty() && wanted.platform.is_none())
        {
            let Some(found) = engine.image(&wanted.image).await? else {
                continue;
            };
            let platform = Platform {
                architecture: found.architecture.unwrap_or_default(),
                os: found.os.unwrap_or_default(),
                variant: found.variant.filter(|variant| !variant.is_empty()),
                os_version: None,
            };
            if !platform.architecture.is_empty() && !runs_on(&platform, &host) {
                return Err(EngineError::Rejected(format!(
                    "the image of service `{service}` is for {platform}, and this host is {host}"
                )));
            }
        }
        Ok(())
    }

    async fn apply_locked(
        &self,
        deployment: &Deployment,
        plan: &Plan,
        lock: File,
    ) -> Result<Applied, EngineError> {
        let resolved = self.resolved(deployment).await?;
        let paths = Arc::new(Paths::below(&deployment.state));
        let mut record = read_record(&paths.record).await?;
        let (planned, before) = self.plan_now(deployment, &resolved, &record).await?;
        let mut applied = Applied::default();
        if planned.plan.changes != plan.changes {
            applied
                .notes
                .push("what runs changed after it was planned; the plan was made again".to_owned());
        }

        // Before the first container: content under its names, and the record of what may run from now on.
        {
            let (resolved, paths) = (Arc::clone(&resolved), Arc::clone(&paths));
            let used = deployment.digest.hex();
            record.retain(|definition| {
                before
                    .iter()
                    .any(|container| container.definition.as_deref() == Some(definition))
            });
            record.add(&resolved.services);
            let record = record.clone();
            blocking(move || {
                prepare(&resolved, &paths, &used, &record).map_err(|error| unavailable(&error))
            })
            .await?;
        }
        if !planned.needed {
            applied
                .notes
                .push("everything runs as it should; nothing was done".to_owned());
            return Ok(applied);
        }

        let mut attempts = 0;
        loop {
            applied.notes.extend(self.repair(deployment).await?);
            let held = lock.try_clone().map_err(|error| {
                EngineError::Unavailable(format!("cannot keep the lock: {error}"))
            })?;
            match self.up(deployment, &resolved, &planned, &paths, held).await {
                Ok(()) => break,
                // The engine still carries out what a killed run asked of it.
                Err(EngineError::Failed(message)) if attempts < RACES && races(&message) => {
                    attempts += 1;
                    tracing::debug!(target = %deployment.target.name, message, "compose met the rest of an earlier run");
                    tokio::time::sleep(RACE_PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
        let engine = self.engine().await?;
        if !planned.strangers.is_empty() {
            // `--remove-orphans` would take the strangers as well.
            for orphan in &planned.orphans {
                engine.remove(&orphan.id).await?;
            }
        }
        let after = engine.containers(&deployment.target.project).await?;
        applied
            .notes
            .extend(differences(&planned, &resolved.services, &before, &after));
        record.retain(|definition| {
            after
                .iter()
                .any(|container| container.definition.as_deref() == Some(definition))
        });
        let paths = Arc::clone(&paths);
        blocking(move || {
            record
                .write(&paths.record)
                .map_err(|error| unavailable(&error))
        })
        .await?;
        Ok(applied)
    }

    /// Finishes or removes what a killed run left under a temporary name.
    async fn repair(&self, deployment: &Deployment) -> Result<Vec<String>, EngineError> {
        let engine = self.engine().await?;
        let containers = engine.containers(&deployment.target.project).await?;
        let mut notes = Vec::new();
        for container in containers
            .iter()
            .filter(|container| container.target.as_deref() == Some(&*deployment.target.name))
        {
            let Some(name) = container.unfinished() else {
                continue;
            };
            // Where the replaced container is gone, its anonymous volumes live on in the new one alone: keep that.
            let taken = containers.iter().any(|other| other.name == name);
            if taken || !engine.rename(&container.id, name).await? {
                engine.remove(&container.id).await?;
            }
            notes.push(format!(
                "an interrupted replacement of container `{name}` was put right"
            ));
        }
        Ok(notes)
    }

    /// Lets Compose bring the project about.
    async fn up(
        &self,
        deployment: &Deployment,
        resolved: &Resolved,
        planned: &Planned,
        paths: &Paths,
        lock: File,
    ) -> Result<(), EngineError> {
        let mut arguments: Vec<OsString> = [
            "--ansi",
            "never",
            "-p",
            &deployment.target.project,
            "--project-directory",
        ]
        .into_iter()
        .map(Into::into)
        .collect();
        arguments.push(paths.project.clone().into());
        arguments.extend(["-f", "-", "up", "-d", "--no-build", "--pull", "never"].map(Into::into));
        if !planned.orphans.is_empty() && planned.strangers.is_empty() {
            arguments.push("--remove-orphans".into());
        }
        let run = Run {
            arguments,
            variables: &deployment.variables,
            directory: &paths.project,
            input: model::render(&resolved.model),
            // `up -d` prints nothing there. The lock's file is handed down so that the lock holds until the last process of this run has ended,
            // even when this process is killed.
            output: Output::File(lock),
            timeout: self.options.apply_timeout,
        };
        let (reason, stderr) = match self.plugin.run(run).await {
            Ok(finished) if finished.success => return Ok(()),
            Ok(finished) => (finished.status, finished.stderr),
            Err(RunError::TimedOut { timeout, stderr }) => (
                format!("not done within {} s, stopped", timeout.as_secs()),
                stderr,
            ),
            Err(error) => {
                return Err(EngineError::Unavailable(format!(
                    "`docker compose up`: {error}"
                )));
            }
        };
        let lines = last_lines(&resolved.redactor.redact(&stderr), ERROR_LINES, ERROR_BYTES);
        let lower = lines.to_ascii_lowercase();
        let message = format!("`docker compose up` failed ({reason}): {lines}");
        let outside = [
            "no space left on device",
            "cannot connect to the docker daemon",
            "is the docker daemon running",
            "no such image",
            "error during connect",
            "read-only file system",
        ];
        if outside.iter().any(|word| lower.contains(word))
            || self.engine().await?.answer().await.is_err()
        {
            return Err(EngineError::Unavailable(message));
        }
        Err(EngineError::Failed(message))
    }

    /// The lock of a project in this process.
    fn project_lock(&self, project: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut projects = self.projects.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(projects.entry(project.to_owned()).or_default())
    }
}

impl super::Engine for ComposeEngine {
    fn check(&self) -> BoxFuture<'_, Result<EngineInfo, EngineError>> {
        Box::pin(async move {
            let answer = self.engine().await?.answer().await?;
            let version = self.plugin_version().await?;
            Ok(EngineInfo {
                description: format!("Docker Engine {}, Compose {version}", answer.version),
            })
        })
    }

    fn plan<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<Plan, EngineError>> {
        Box::pin(async move {
            let resolved = self.resolve(deployment).await?;
            self.check_platforms(&resolved).await?;
            let record = read_record(&Paths::below(&deployment.state).record).await?;
            let (planned, _) = self.plan_now(deployment, &resolved, &record).await?;
            let mut plan = planned.plan;
            plan.notes.extend(resolved.notes.iter().cloned());
            Ok(plan)
        })
    }

    fn pull<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let resolved = self.resolved(deployment).await?;
            self.check_platforms(&resolved).await?;
            self.pull_images(&resolved).await
        })
    }

    fn apply<'a>(
        &'a self,
        deployment: &'a Deployment,
        plan: &'a Plan,
    ) -> BoxFuture<'a, Result<Applied, EngineError>> {
        Box::pin(async move {
            let project = self.project_lock(&deployment.target.project);
            let _one = project.lock().await;
            let paths = Paths::below(&deployment.state);
            let lock = lock_file(paths, self.options.apply_timeout).await?;
            self.apply_locked(deployment, plan, lock).await
        })
    }

    fn observe<'a>(
        &'a self,
        deployment: &'a Deployment,
    ) -> BoxFuture<'a, Result<Sample, EngineError>> {
        Box::pin(async move {
            let resolved = self.resolved(deployment).await?;
            let engine = self.engine().await?;
            let containers = engine.containers(&deployment.target.project).await?;
            let mut sample =
                planning::sample(&deployment.target.name, &resolved.services, &containers);
            for service in sample
                .services
                .iter_mut()
                .filter(|service| service.state == SampleState::Failed)
            {
                service.detail = resolved.redactor.redact(&service.detail);
                let failed = containers.iter().find(|container| {
                    !container.one_off
                        && container.service == service.service
                        && planning::container_state(container) == SampleState::Failed
                });
                if let Some(container) = failed {
                    let lines = engine.log(&container.id).await;
                    if !lines.is_empty() {
                        service.detail = format!(
                            "{}; last log lines of `{}`:\n{}",
                            service.detail,
                            container.name,
                            resolved.redactor.redact(&lines)
                        );
                    }
                }
            }
            Ok(sample)
        })
    }

    fn clean<'a>(
        &'a self,
        target: &'a Target,
        kept: &'a [Deployment],
    ) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            // Without a kept deployment nothing says where the state is, and nothing may be thought superfluous.
            let Some(state) = kept.first().map(|deployment| deployment.state.clone()) else {
                return Ok(());
            };
            let project = self.project_lock(&target.project);
            let _one = project.lock().await;
            let _lock = lock_file(Paths::below(&state), SHORT).await?;
            // The engine starts containers again after a reboot, so whatever a container mounts stays, even a stopped one's.
            let containers = self.engine().await?.containers(&target.project).await?;
            let mounted: Vec<String> = containers
                .into_iter()
                .flat_map(|container| container.mounts)
                .collect();
            let digests: BTreeSet<String> = kept
                .iter()
                .map(|deployment| deployment.digest.hex())
                .collect();
            blocking(move || {
                sweep(&Paths::below(&state), &digests, &mounted)
                    .map_err(|error| unavailable(&error))
            })
            .await
        })
    }
}

/// Compares what happened with what was planned.
fn differences(
    planned: &Planned,
    wanted: &BTreeMap<String, Wanted>,
    before: &[Container],
    after: &[Container],
) -> Vec<String> {
    let ids = |containers: &[Container], service: &str| -> BTreeSet<String> {
        containers
            .iter()
            .filter(|container| !container.one_off && container.service == service)
            .map(|container| container.id.clone())
            .collect()
    };
    let mut notes = Vec::new();
    for change in &planned.plan.changes {
        let service = change.subject.as_str();
        let (old, new) = (ids(before, service), ids(after, service));
        match change.action {
            Action::Keep if old != new => notes.push(format!(
                "service `{service}` was to be left alone and was replaced by Compose"
            )),
            Action::Recreate
                if wanted
                    .get(service)
                    .is_some_and(|wanted| stale(wanted, after, service)) =>
            {
                notes.push(format!(
                    "service `{service}` was to be made anew and was left as it was"
                ));
            }
            Action::Create if new.is_empty() => notes.push(format!(
                "service `{service}` was to be made and has no container"
            )),
            Action::Remove if !new.is_empty() => notes.push(format!(
                "service `{service}` was to be removed and is still there"
            )),
            _ => {}
        }
    }
    notes
}

/// Whether Compose failed over a container that another run had in hand.
fn races(message: &str) -> bool {
    let lower = message.to_ascii_lowercase();
    [
        "is already in progress",
        "conflict. the container name",
        "no such container",
        "is not running",
        "is marked for removal",
    ]
    .iter()
    .any(|word| lower.contains(word))
}

fn stale(wanted: &Wanted, containers: &[Container], service: &str) -> bool {
    containers.iter().any(|container| {
        !container.one_off
            && container.service == service
            && container.definition.as_deref() != Some(wanted.definition.as_str())
    })
}

const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";
const SHORT: Duration = Duration::from_mins(1);
/// How often `up` is tried again when it meets the rest of an earlier run.
const RACES: u32 = 3;
const RACE_PAUSE: Duration = Duration::from_secs(1);
const PARALLEL_PULLS: usize = 3;
const ERROR_LINES: usize = 12;
const ERROR_BYTES: usize = 3000;

#[cfg(test)]
mod tests;
