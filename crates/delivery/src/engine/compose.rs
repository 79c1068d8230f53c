//! The Docker Compose engine.
//!
//! The Compose plugin resolves the project and brings it up; everything between is ours, because the
//! plugin downloads what nobody verified, calls a crash loop a success, and takes a changed mounted
//! file for no change at all. So its resolved model is rewritten before it comes back to it
//! ([`model`]): images become digests, and files of the release become paths named by their content.
//! The plan, the pull and the observation go through the Engine API.
//!
//! The rewritten model may hold secrets. It is handed over on standard input and never written.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummary, HealthStatusEnum,
};
use bollard::query_parameters::{
    CreateImageOptions, ListContainersOptions, ListNetworksOptions, LogsOptions,
    RemoveContainerOptions, RemoveImageOptions, StopContainerOptions,
};
use futures_util::StreamExt as _;
use oci::Platform;

use self::model::{LABEL_HASH, LABEL_TARGET, Model};
use self::process::Process;
use super::{
    Action, Applied, BoxFuture, Change, Deployment, Engine, EngineError, EngineInfo, Plan, Sample,
    SampleState, ServiceSample,
};
use crate::target::Target;

mod content;
mod model;
mod process;

/// Finds the user name and the password for a registry host.
pub type Credentials = Arc<dyn Fn(&str) -> Option<(String, String)> + Send + Sync>;

/// How the engine is reached.
#[derive(Clone)]
pub struct ComposeOptions {
    /// `unix:///…` or `tcp://…`; the default socket when `None`.
    pub docker_host: Option<String>,
    /// The `docker` program, which must find its Compose plugin.
    pub docker: PathBuf,
    /// How long one `up` may take. Compose itself would wait for ever on `depends_on` conditions.
    pub apply_timeout: Duration,
    /// Credentials for pulls by the Docker Engine.
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

/// Applies releases with Docker Compose.
#[derive(Debug)]
pub struct ComposeEngine {
    options: ComposeOptions,
    /// One `up` at a time on a project, whichever target or trigger asks.
    projects: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Resolved models by target and digest, so that an observation starts no process.
    models: Mutex<HashMap<String, Arc<Model>>>,
}

impl ComposeEngine {
    /// An engine; nothing is asked yet.
    pub fn new(options: ComposeOptions) -> Self {
        Self {
            options,
            projects: Mutex::default(),
            models: Mutex::default(),
        }
    }

    /// The images of a project's running containers: service and image as it was named to the engine.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`].
    pub async fn running_images(
        &self,
        project: &str,
    ) -> Result<Vec<(String, String)>, EngineError> {
        let containers = self.containers(project, false).await?;
        Ok(containers
            .into_iter()
            .map(|container| (service_of(&container), container.image.unwrap_or_default()))
            .collect())
    }

    /// Removes what a target made: containers, the project's networks, and images pulled from `host`.
    /// Volumes stay.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`].
    pub async fn remove_project(
        &self,
        project: &str,
        target: &str,
        host: &str,
    ) -> Result<(), EngineError> {
        let docker = self.docker()?;
        for container in self.containers(project, true).await? {
            if label(&container, LABEL_TARGET) == Some(target) {
                self.remove_container(&docker, &container).await?;
            }
        }
        let filters = HashMap::from([("label".to_owned(), vec![format!("{PROJECT}={project}")])]);
        let networks = docker
            .list_networks(Some(ListNetworksOptions {
                filters: Some(filters),
            }))
            .await
            .map_err(unavailable)?;
        for network in networks {
            if let Some(id) = network.id {
                docker.remove_network(&id).await.map_err(unavailable)?;
            }
        }
        let images = docker
            .list_images(None::<bollard::query_parameters::ListImagesOptions>)
            .await
            .map_err(unavailable)?;
        for image in images {
            if image
                .repo_digests
                .iter()
                .any(|name| name.starts_with(&format!("{host}/")))
            {
                let options = RemoveImageOptions {
                    force: true,
                    ..RemoveImageOptions::default()
                };
                docker
                    .remove_image(&image.id, Some(options), None)
                    .await
                    .map_err(unavailable)?;
            }
        }
        Ok(())
    }

    fn docker(&self) -> Result<Docker, EngineError> {
        const TIMEOUT: u64 = 120;
        let host = self
            .options
            .docker_host
            .as_deref()
            .unwrap_or("unix:///var/run/docker.sock");
        let connected = if host.starts_with("unix://") {
            Docker::connect_with_unix(host, TIMEOUT, bollard::API_DEFAULT_VERSION)
        } else {
            Docker::connect_with_http(host, TIMEOUT, bollard::API_DEFAULT_VERSION)
        };
        connected.map_err(|error| {
            EngineError::Unavailable(format!(
                "no Docker Engine answers at `{host}` ({error}); start it, or set `DOCKER_HOST`"
            ))
        })
    }

    /// A client that speaks the version of the engine it talks to.
    async fn negotiated(&self) -> Result<Docker, EngineError> {
        self.docker()?
            .negotiate_version()
            .await
            .map_err(unavailable)
    }

    async fn containers(
        &self,
        project: &str,
        all: bool,
    ) -> Result<Vec<ContainerSummary>, EngineError> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{PROJECT}={project}")])]);
        let options = ListContainersOptions {
            all,
            filters: Some(filters),
            ..ListContainersOptions::default()
        };
        let mut containers = self
            .negotiated()
            .await?
            .list_containers(Some(options))
            .await
            .map_err(unavailable)?;
        // Helpers of `compose run` are nobody's service.
        containers.retain(|container| label(container, ONE_OFF) != Some("True"));
        containers.sort_by_key(|container| (service_of(container), container.id.clone()));
        Ok(containers)
    }

    async fn remove_container(
        &self,
        docker: &Docker,
        container: &ContainerSummary,
    ) -> Result<(), EngineError> {
        let Some(id) = &container.id else {
            return Ok(());
        };
        // A container that ended meanwhile is as good as stopped.
        let _ = docker
            .stop_container(id, None::<StopContainerOptions>)
            .await;
        let options = RemoveContainerOptions {
            force: true,
            ..RemoveContainerOptions::default()
        };
        docker
            .remove_container(id, Some(options))
            .await
            .map_err(unavailable)
    }

    fn process(&self) -> Process<'_> {
        Process {
            program: &self.options.docker,
            docker_host: self.options.docker_host.as_deref(),
        }
    }

    /// The rewritten model of a deployment; resolved once and kept.
    async fn model(&self, deployment: &Deployment) -> Result<Arc<Model>, EngineError> {
        let key = format!("{}@{}", deployment.target.name, deployment.digest);
        let fingerprint = model::inputs(deployment);
        let known = self
            .models
            .lock()
            .ok()
            .and_then(|models| models.get(&key).cloned());
        if let Some(known) = known.filter(|known| known.inputs == fingerprint) {
            return Ok(known);
        }
        let model = Arc::new(model::resolve(&self.process(), deployment).await?);
        if let Ok(mut models) = self.models.lock() {
            models.insert(key, Arc::clone(&model));
        }
        Ok(model)
    }

    async fn check_now(&self) -> Result<EngineInfo, EngineError> {
        let version = self
            .negotiated()
            .await?
            .version()
            .await
            .map_err(unavailable)?;
        let plugin = self.process().compose_version().await?;
        Ok(EngineInfo {
            description: format!(
                "Docker Engine {}, Compose {plugin}",
                version.version.unwrap_or_default()
            ),
        })
    }

    async fn plan_now(&self, deployment: &Deployment) -> Result<Plan, EngineError> {
        let model = self.model(deployment).await?;
        self.check_platforms(deployment).await?;
        let target = &deployment.target;
        let (ours, strangers): (Vec<_>, Vec<_>) = self
            .containers(&target.project, true)
            .await?
            .into_iter()
            .partition(|container| label(container, LABEL_TARGET) == Some(&target.name));
        let mut plan = Plan::default();
        for stranger in &strangers {
            let name = name_of(stranger);
            let collides = model.services.contains_key(&service_of(stranger));
            if (ours.is_empty() || collides) && !target.adopt {
                return Err(EngineError::Rejected(format!(
                    "Compose project `{}` has container `{name}`, which this target did not make; give the target \
                     another `project`, remove the container, or take the project over with `adopt: true`",
                    target.project
                )));
            }
            plan.notes.push(if collides {
                format!("container `{name}` was made by someone else and is taken over")
            } else {
                format!("container `{name}` was made by someone else and is left alone")
            });
        }
        for (service, wanted) in &model.services {
            let present: Vec<&ContainerSummary> = ours
                .iter()
                .chain(strangers.iter().filter(|_| target.adopt))
                .filter(|container| service_of(container) == *service)
                .collect();
            let (action, reason) = if present.is_empty() {
                (Action::Create, format!("image {}", wanted.image))
            } else if present
                .iter()
                .any(|container| label(container, LABEL_HASH) != Some(&wanted.hash))
            {
                (
                    Action::Recreate,
                    wanted.difference(present.first().and_then(|c| c.labels.as_ref())),
                )
            } else if present
                .iter()
                .any(|container| !self.stands(container, wanted))
            {
                (Action::Recreate, "it does not run".to_owned())
            } else {
                (Action::Keep, "unchanged".to_owned())
            };
            plan.changes.push(Change {
                subject: service.clone(),
                action,
                reason,
            });
        }
        for orphan in ours
            .iter()
            .filter(|container| !model.services.contains_key(&service_of(container)))
        {
            plan.changes.push(Change {
                subject: service_of(orphan),
                action: Action::Remove,
                reason: "the release does not have it any more".to_owned(),
            });
        }
        model.keep(deployment)?;
        Ok(plan)
    }

    /// Whether a container is as it should be without help: running, or a one-shot that ended well.
    #[expect(
        clippy::unused_self,
        reason = "stands beside the other questions about containers"
    )]
    fn stands(&self, container: &ContainerSummary, wanted: &model::Service) -> bool {
        let state = container
            .state
            .map(|state| state.to_string())
            .unwrap_or_default();
        let ended_well = state == "exited"
            && !wanted.restarts
            && container
                .status
                .as_deref()
                .is_some_and(|status| status.starts_with("Exited (0)"));
        state == "running" || ended_well
    }

    async fn check_platforms(&self, deployment: &Deployment) -> Result<(), EngineError> {
        let version = self
            .negotiated()
            .await?
            .version()
            .await
            .map_err(unavailable)?;
        let host = Platform {
            architecture: version.arch.unwrap_or_default(),
            os: version.os.unwrap_or_default(),
            ..Platform::default()
        };
        for pin in &deployment.config.images {
            if !pin.platforms.is_empty()
                && !pin.platforms.iter().any(|platform| platform.runs_on(&host))
            {
                let exist: Vec<String> = pin.platforms.iter().map(ToString::to_string).collect();
                return Err(EngineError::Rejected(format!(
                    "image `{}` of service `{}` does not run on {host}; it exists for {}",
                    pin.reference,
                    pin.service,
                    exist.join(", ")
                )));
            }
        }
        Ok(())
    }

    async fn pull_now(&self, deployment: &Deployment) -> Result<(), EngineError> {
        let docker = self.negotiated().await?;
        let images: Vec<String> = if deployment.config.images.is_empty() {
            let model = self.model(deployment).await?;
            model
                .services
                .values()
                .map(|service| service.image.clone())
                .collect()
        } else {
            deployment
                .config
                .images
                .iter()
                .map(model::pinned)
                .collect::<Result<_, _>>()?
        };
        for image in images {
            let present = docker.inspect_image(&image).await.is_ok_and(|found| {
                found
                    .repo_digests
                    .unwrap_or_default()
                    .iter()
                    .any(|digest| same_image(digest, &image))
            });
            if present {
                continue;
            }
            let host = image.split('/').next().unwrap_or_default();
            let credentials =
                (self.options.credentials)(host).map(|(username, password)| DockerCredentials {
                    username: Some(username),
                    password: Some(password),
                    serveraddress: Some(host.to_owned()),
                    ..DockerCredentials::default()
                });
            let options = CreateImageOptions {
                from_image: Some(image.clone()),
                ..CreateImageOptions::default()
            };
            let mut progress = Box::pin(docker.create_image(Some(options), None, credentials));
            while let Some(step) = progress.next().await {
                let problem = match step {
                    Ok(info) => info.error_detail.and_then(|detail| detail.message),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(problem) = problem {
                    return Err(EngineError::Unavailable(format!(
                        "the Docker Engine cannot pull `{image}`: {problem}; nothing that runs was touched"
                    )));
                }
            }
        }
        Ok(())
    }

    async fn apply_now(
        &self,
        deployment: &Deployment,
        plan: &Plan,
    ) -> Result<Applied, EngineError> {
        let target = &deployment.target;
        let lock = match self.projects.lock() {
            Ok(mut projects) => Arc::clone(projects.entry(target.project.clone()).or_default()),
            Err(_) => {
                return Err(EngineError::Unavailable(
                    "the engine's locks are gone, restart the agent".to_owned(),
                ));
            }
        };
        let _turn = lock.lock().await;
        let model = self.model(deployment).await?;
        // What the model names must be there, also after somebody cleaned up.
        model.materialise(deployment)?;
        let docker = self.negotiated().await?;
        let before = self.containers(&target.project, true).await?;
        let output = self
            .process()
            .up(deployment, &model, self.options.apply_timeout)
            .await?;
        // Orphans go one by one: Compose's own switch would take strangers with them.
        for orphan in &before {
            if label(orphan, LABEL_TARGET) == Some(&target.name)
                && !model.services.contains_key(&service_of(orphan))
            {
                self.remove_container(&docker, orphan).await?;
            }
        }
        let after = self.containers(&target.project, true).await?;
        let mut notes = compare(plan, &before, &after);
        notes.extend(output);
        Ok(Applied { notes })
    }

    async fn observe_now(&self, deployment: &Deployment) -> Result<Sample, EngineError> {
        let model = self.model(deployment).await?;
        let target = &deployment.target;
        let docker = self.negotiated().await?;
        let containers = self.containers(&target.project, true).await?;
        let mut services = Vec::new();
        let mut fingerprint = Vec::new();
        for (service, wanted) in &model.services {
            if wanted.replicas == 0 {
                continue;
            }
            let mut looked_at = Vec::new();
            for container in containers.iter().filter(|container| {
                service_of(container) == *service
                    && label(container, LABEL_TARGET) == Some(&target.name)
            }) {
                let Some(id) = &container.id else {
                    continue;
                };
                // Gone between the list and the look: the next look tells.
                let Ok(state) = docker.inspect_container(id, None).await else {
                    fingerprint.push(format!("{id} gone"));
                    continue;
                };
                fingerprint.push(format!(
                    "{id} {} {}",
                    state.restart_count.unwrap_or_default(),
                    state
                        .state
                        .as_ref()
                        .and_then(|state| state.started_at.clone())
                        .unwrap_or_default()
                ));
                let is_wanted = label(container, LABEL_HASH) == Some(&wanted.hash);
                let (mut verdict, mut detail) = if is_wanted {
                    judge(&state, wanted)
                } else {
                    (SampleState::Failed, "it is not of this release".to_owned())
                };
                if verdict == SampleState::Failed {
                    let lines = last_lines(&docker, id, &model).await;
                    if !lines.is_empty() {
                        detail = format!("{detail}; last lines: {lines}");
                    }
                    verdict = SampleState::Failed;
                }
                looked_at.push((verdict, detail));
            }
            services.push(
                match looked_at
                    .into_iter()
                    .max_by_key(|(state, _)| severity(*state))
                {
                    Some((state, detail)) => ServiceSample {
                        service: service.clone(),
                        state,
                        detail,
                    },
                    None => ServiceSample {
                        service: service.clone(),
                        state: SampleState::Failed,
                        detail: "it has no container".to_owned(),
                    },
                },
            );
        }
        let state = services
            .iter()
            .map(|service| service.state)
            .max_by_key(|state| severity(*state))
            .unwrap_or(SampleState::Healthy);
        Ok(Sample {
            state,
            fingerprint: fingerprint.join("\n"),
            services,
        })
    }
}

impl Engine for ComposeEngine {
    fn check(&self) -> BoxFuture<'_, Result<EngineInfo, EngineError>> {
        Box::pin(self.check_now())
    }

    fn plan<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<Plan, EngineError>> {
        Box::pin(self.plan_now(deployment))
    }

    fn pull<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(self.pull_now(deployment))
    }

    fn apply<'a>(
        &'a self,
        deployment: &'a Deployment,
        plan: &'a Plan,
    ) -> BoxFuture<'a, Result<Applied, EngineError>> {
        Box::pin(self.apply_now(deployment, plan))
    }

    fn observe<'a>(
        &'a self,
        deployment: &'a Deployment,
    ) -> BoxFuture<'a, Result<Sample, EngineError>> {
        Box::pin(self.observe_now(deployment))
    }

    fn clean<'a>(
        &'a self,
        target: &'a Target,
        kept: &'a [Deployment],
    ) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            if let Ok(mut models) = self.models.lock() {
                let kept: Vec<String> = kept
                    .iter()
                    .map(|one| format!("{}@{}", target.name, one.digest))
                    .collect();
                let prefix = format!("{}@", target.name);
                models.retain(|key, _| !key.starts_with(&prefix) || kept.contains(key));
            }
            let Some(first) = kept.first() else {
                return Ok(());
            };
            let digests: Vec<_> = kept.iter().map(|deployment| &deployment.digest).collect();
            content::clean(&first.state, &digests)
        })
    }
}

/// What one container's state means for its service.
fn judge(container: &ContainerInspectResponse, wanted: &model::Service) -> (SampleState, String) {
    let Some(state) = &container.state else {
        return (SampleState::Pending, "no state".to_owned());
    };
    let exit = state.exit_code.unwrap_or_default();
    let restarts = container.restart_count.unwrap_or_default();
    match state.status {
        Some(ContainerStateStatusEnum::RUNNING) => {
            match state.health.as_ref().and_then(|health| health.status) {
                Some(HealthStatusEnum::HEALTHY) => {
                    (SampleState::Healthy, "running, healthy".to_owned())
                }
                Some(HealthStatusEnum::STARTING) => (
                    SampleState::Pending,
                    "running, health check starting".to_owned(),
                ),
                Some(HealthStatusEnum::UNHEALTHY) => {
                    (SampleState::Failed, "running, unhealthy".to_owned())
                }
                _ => (
                    SampleState::Healthy,
                    format!("running, {restarts} restarts"),
                ),
            }
        }
        Some(ContainerStateStatusEnum::RESTARTING) => (
            SampleState::Failed,
            format!("restarting after exit code {exit}, {restarts} restarts"),
        ),
        Some(ContainerStateStatusEnum::EXITED) if exit == 0 && !wanted.restarts => {
            (SampleState::Healthy, "finished with exit code 0".to_owned())
        }
        Some(ContainerStateStatusEnum::EXITED) => {
            (SampleState::Failed, format!("ended with exit code {exit}"))
        }
        Some(ContainerStateStatusEnum::DEAD) => (SampleState::Failed, "dead".to_owned()),
        Some(other) => (SampleState::Pending, other.to_string()),
        None => (SampleState::Pending, "no state".to_owned()),
    }
}

fn severity(state: SampleState) -> u8 {
    match state {
        SampleState::Healthy => 0,
        SampleState::Pending => 1,
        SampleState::Failed => 2,
    }
}

/// The last lines that a container wrote, without secrets.
async fn last_lines(docker: &Docker, id: &str, model: &Model) -> String {
    let options = LogsOptions {
        stdout: true,
        stderr: true,
        tail: "5".to_owned(),
        ..LogsOptions::default()
    };
    let mut lines = Vec::new();
    let mut logs = Box::pin(docker.logs(id, Some(options)));
    while let Some(Ok(line)) = logs.next().await {
        lines.push(
            line.to_string()
                .trim()
                .chars()
                .take(300)
                .collect::<String>(),
        );
    }
    model.redact(&lines.join(" | "))
}

/// Where what happened differs from what was planned. Compose hashes services in its own way, which
/// changes between versions, so a difference is written down and not an error.
fn compare(plan: &Plan, before: &[ContainerSummary], after: &[ContainerSummary]) -> Vec<String> {
    let ids = |containers: &[ContainerSummary], service: &str| -> Vec<String> {
        containers
            .iter()
            .filter(|container| service_of(container) == service)
            .filter_map(|container| container.id.clone())
            .collect()
    };
    let mut notes = Vec::new();
    for change in &plan.changes {
        let same = ids(before, &change.subject) == ids(after, &change.subject);
        match change.action {
            Action::Keep if !same => {
                notes.push(format!(
                    "`{}` was to be left alone, but Compose replaced it",
                    change.subject
                ));
            }
            Action::Recreate if same && change.reason != "it does not run" => {
                notes.push(format!(
                    "`{}` was to be replaced, but Compose left it alone",
                    change.subject
                ));
            }
            _ => {}
        }
    }
    notes
}

/// Compares an image with a repository digest. The engine leaves `docker.io/library/` out.
fn same_image(known: &str, wanted: &str) -> bool {
    let full = |text: &str| {
        oci::Reference::parse_familiar(text)
            .map_or_else(|_| text.to_owned(), |reference| reference.to_string())
    };
    full(known) == full(wanted)
}

fn label<'a>(container: &'a ContainerSummary, name: &str) -> Option<&'a str> {
    container
        .labels
        .as_ref()
        .and_then(|labels| labels.get(name))
        .map(String::as_str)
}

fn service_of(container: &ContainerSummary) -> String {
    label(container, "com.docker.compose.service")
        .unwrap_or_default()
        .to_owned()
}

fn name_of(container: &ContainerSummary) -> String {
    container
        .names
        .iter()
        .flatten()
        .next()
        .map(|name| name.trim_start_matches('/').to_owned())
        .or_else(|| container.id.clone())
        .unwrap_or_default()
}

fn unavailable(error: bollard::errors::Error) -> EngineError {
    EngineError::Unavailable(format!(
        "the Docker Engine cannot be used ({error}); is it running, and may this user reach it?"
    ))
}

const ONE_OFF: &str = "com.docker.compose.oneoff";
const PROJECT: &str = "com.docker.compose.project";

/// Names and hashes, by service: used by plans to say what changed.
type Parts = BTreeMap<String, String>;

#[cfg(test)]
mod tests;
