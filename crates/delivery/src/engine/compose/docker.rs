//! The Engine API: what answers, which containers a project has, images by digest.

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::errors::Error;
use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum, HealthStatusEnum, ImageInspect,
    RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateImageOptions, InspectContainerOptions, ListContainersOptions, ListImagesOptions,
    ListNetworksOptions, LogsOptions, RemoveContainerOptions, RemoveImageOptions,
    RenameContainerOptions, StopContainerOptions,
};
use futures_util::{StreamExt, TryStreamExt};
use oci::{Platform, Reference};

use super::planning::{Container, Health, Status};
use super::redact::last_lines;
use super::rewrite::{DEFINITION_LABEL, TARGET_LABEL};
use crate::engine::EngineError;

/// A connection to an engine.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    docker: Docker,
    host: String,
}

/// What answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// `28.5.2`.
    pub(super) version: String,
    /// What it runs.
    pub(super) platform: Platform,
}

impl Engine {
    /// Connects and agrees on a version of the API.
    pub(super) async fn connect(host: &str) -> Result<Self, EngineError> {
        let unreachable = |error: Error| {
            EngineError::Unavailable(format!(
                "no Docker Engine answers at `{host}` ({error}); start it, or give this user access to its socket, or set `DOCKER_HOST`"
            ))
        };
        let docker = Docker::connect_with_host(host).map_err(unreachable)?;
        let negotiated = tokio::time::timeout(SHORT, docker.negotiate_version()).await;
        let docker = negotiated
            .map_err(|_| unreachable(Error::RequestTimeoutError))?
            .map_err(unreachable)?;
        Ok(Self {
            docker,
            host: host.to_owned(),
        })
    }

    /// Asks for versions.
    pub(super) async fn answer(&self) -> Result<Answer, EngineError> {
        let version = self.within(async {
            self.docker.ping().await?;
            self.docker.version().await
        });
        let version = version
            .await
            .map_err(|error| self.unavailable("ask for its version", &error))?;
        let mut platform = Platform {
            architecture: version.arch.unwrap_or_default(),
            os: version.os.unwrap_or_default(),
            variant: None,
            os_version: None,
        };
        if platform.architecture == "arm" {
            let info = self
                .within(self.docker.info())
                .await
                .map_err(|error| self.unavailable("ask what it is", &error))?;
            platform.variant = info
                .architecture
                .as_deref()
                .and_then(arm_variant)
                .map(str::to_owned);
        }
        Ok(Answer {
            version: version.version.unwrap_or_default(),
            platform,
        })
    }

    /// All containers of a project, running or not, in a stable order.
    pub(super) async fn containers(&self, project: &str) -> Result<Vec<Container>, EngineError> {
        let filters = HashMap::from([(
            "label".to_owned(),
            vec![format!("{PROJECT_LABEL}={project}")],
        )]);
        let options = ListContainersOptions {
            all: true,
            filters: Some(filters),
            ..Default::default()
        };
        let list = self
            .within(self.docker.list_containers(Some(options)))
            .await
            .map_err(|error| self.unavailable("list containers", &error))?;
        let ids: Vec<String> = list.into_iter().filter_map(|summary| summary.id).collect();
        let inspected: Vec<Option<Container>> =
            futures_util::stream::iter(ids.into_iter().map(|id| async move {
                match self
                    .within(
                        self.docker
                            .inspect_container(&id, None::<InspectContainerOptions>),
                    )
                    .await
                {
                    Ok(response) => Ok(Some(container(response))),
                    // It went between the two questions.
                    Err(Error::DockerResponseServerError {
                        status_code: 404, ..
                    }) => Ok(None),
                    Err(error) => Err(self.unavailable("inspect a container", &error)),
                }
            }))
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        let mut containers: Vec<Container> = inspected.into_iter().flatten().collect();
        containers.sort_by(|a, b| (&a.service, &a.name, &a.id).cmp(&(&b.service, &b.name, &b.id)));
        Ok(containers)
    }

    /// The last log lines of a container, unredacted.
    pub(super) async fn log(&self, id: &str) -> String {
        let options = LogsOptions {
            stdout: true,
            stderr: true,
            tail: LOG_LINES.to_string(),
            ..Default::default()
        };
        let mut bytes: Vec<u8> = Vec::new();
        let read = async {
            let mut stream = std::pin::pin!(self.docker.logs(id, Some(options)));
            while let Some(Ok(chunk)) = stream.next().await {
                bytes.extend_from_slice(&chunk.into_bytes());
                if bytes.len() > 8 * LOG_BYTES {
                    bytes.drain(..bytes.len() - 4 * LOG_BYTES);
                }
            }
        };
        // A log driver that cannot be read is no reason to fail a look at the container.
        let _ = tokio::time::timeout(SHORT, read).await;
        last_lines(&String::from_utf8_lossy(&bytes), LOG_LINES, LOG_BYTES)
    }

    /// Stops and removes a container.
    pub(super) async fn remove(&self, id: &str) -> Result<(), EngineError> {
        // 409: another removal of it is under way.
        let gone = |error: &Error| {
            matches!(
                error,
                Error::DockerResponseServerError {
                    status_code: 304 | 404 | 409,
                    ..
                }
            )
        };
        match self
            .docker
            .stop_container(id, None::<StopContainerOptions>)
            .await
        {
            Err(error) if !gone(&error) => return Err(self.unavailable("stop a container", &error)),
            _ => {}
        }
        match self
            .docker
            .remove_container(
                id,
                Some(RemoveContainerOptions {
                    force: true,
                    ..Default::default()
                }),
            )
            .await
        {
            Err(error) if !gone(&error) => Err(self.unavailable("remove a container", &error)),
            _ => Ok(()),
        }
    }

    /// Removes the networks of a project.
    pub(super) async fn remove_networks(&self, project: &str) -> Result<(), EngineError> {
        let filters = HashMap::from([(
            "label".to_owned(),
            vec![format!("{PROJECT_LABEL}={project}")],
        )]);
        let options = ListNetworksOptions {
            filters: Some(filters),
        };
        let networks = self
            .within(self.docker.list_networks(Some(options)))
            .await
            .map_err(|error| self.unavailable("list networks", &error))?;
        for id in networks.into_iter().filter_map(|network| network.id) {
            self.within(self.docker.remove_network(&id))
                .await
                .map_err(|error| self.unavailable("remove a network", &error))?;
        }
        Ok(())
    }

    /// Removes the images that were pulled from a registry.
    pub(super) async fn remove_images(&self, host: &str) -> Result<(), EngineError> {
        let images = self
            .within(self.docker.list_images(None::<ListImagesOptions>))
            .await
            .map_err(|error| self.unavailable("list images", &error))?;
        let of_host = format!("{host}/");
        for image in images {
            if image
                .repo_digests
                .iter()
                .any(|name| name.starts_with(&of_host))
            {
                let options = RemoveImageOptions {
                    force: true,
                    ..Default::default()
                };
                self.within(self.docker.remove_image(&image.id, Some(options), None))
                    .await
                    .map_err(|error| self.unavailable("remove an image", &error))?;
            }
        }
        Ok(())
    }

    /// Renames a container; `false` when it is gone or the name is taken.
    pub(super) async fn rename(&self, id: &str, name: &str) -> Result<bool, EngineError> {
        match self
            .within(self.docker.rename_container(
                id,
                RenameContainerOptions {
                    name: name.to_owned(),
                },
            ))
            .await
        {
            Ok(()) => Ok(true),
            Err(Error::DockerResponseServerError {
                status_code: 404 | 409,
                ..
            }) => Ok(false),
            Err(error) => Err(self.unavailable("rename a container", &error)),
        }
    }

    /// The image, when the engine has it under this very digest.
    pub(super) async fn image(
        &self,
        image: &Reference,
    ) -> Result<Option<ImageInspect>, EngineError> {
        match self
            .within(self.docker.inspect_image(&image.to_string()))
            .await
        {
            Ok(found) => Ok(holds(&found, image).then_some(found)),
            Err(Error::DockerResponseServerError {
                status_code: 404, ..
            }) => Ok(None),
            Err(error) => Err(self.unavailable("inspect an image", &error)),
        }
    }

    /// Pulls an image by digest.
    pub(super) async fn pull(
        &self,
        image: &Reference,
        platform: Option<&str>,
        credentials: Option<(String, String)>,
    ) -> Result<(), EngineError> {
        let options = CreateImageOptions {
            from_image: Some(format!("{}/{}", image.host, image.repository)),
            tag: image.digest.as_ref().map(ToString::to_string),
            platform: platform.unwrap_or_default().to_owned(),
            ..Default::default()
        };
        let credentials = credentials.map(|(username, password)| DockerCredentials {
            username: Some(username),
            password: Some(password),
            serveraddress: Some(image.host.clone()),
            ..Default::default()
        });
        let mut stream = std::pin::pin!(self.docker.create_image(Some(options), None, credentials));
        loop {
            match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(error))) => return Err(pull_error(image, &error)),
                Err(_) => {
                    return Err(EngineError::Unavailable(format!(
                        "pulling `{image}` made no progress for {} s",
                        SILENCE.as_secs()
                    )));
                }
            }
        }
    }

    async fn within<T>(&self, request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::time::timeout(SHORT, request)
            .await
            .unwrap_or(Err(Error::RequestTimeoutError))
    }

    fn unavailable(&self, what: &str, error: &Error) -> EngineError {
        EngineError::Unavailable(format!(
            "cannot {what} at the Docker Engine `{}`: {error}",
            self.host
        ))
    }
}

/// Whether an image is known by the digest that is asked for: the id differs between the engine's two kinds of image store.
fn holds(found: &ImageInspect, image: &Reference) -> bool {
    let digests = found.repo_digests.as_deref().unwrap_or_default();
    digests
        .iter()
        .filter_map(|text| Reference::parse_familiar(text).ok())
        .any(|known| {
            known.host == image.host
                && known.repository == image.repository
                && known.digest == image.digest
        })
}

/// Sorts a failed pull: a platform that is missing stays missing, everything else may pass.
fn pull_error(image: &Reference, error: &Error) -> EngineError {
    let message = match error {
        Error::DockerResponseServerError { message, .. } => message.clone(),
        Error::DockerStreamError { error } => error.clone(),
        other => other.to_string(),
    };
    let lower = message.to_ascii_lowercase();
    if ["no space left", "i/o error", "read-only file system"]
        .iter()
        .any(|word| lower.contains(word))
    {
        return EngineError::Unavailable(format!("cannot pull `{image}`: {message}"));
    }
    // The engine says "denied" and "not found" in one breath for a repository that it may not see.
    if [
        "denied",
        "unauthorized",
        "authentication required",
        "no basic auth",
        "forbidden",
    ]
    .iter()
    .any(|word| lower.contains(word))
    {
        return EngineError::Unavailable(format!(
            "cannot pull `{image}`: {message}; give the agent a login for `{}`",
            image.host
        ));
    }
    if [
        "no matching manifest",
        "does not match the specified platform",
        "cannot be used on this platform",
    ]
    .iter()
    .any(|word| lower.contains(word))
    {
        return EngineError::Rejected(format!(
            "`{image}` does not exist for this platform: {message}"
        ));
    }
    let missing = [
        "manifest unknown",
        "name unknown",
        "manifest for",
        "not found",
    ]
    .iter()
    .any(|word| lower.contains(word));
    let lookup = ["no such host", "lookup ", "dial ", "connection refused"]
        .iter()
        .any(|word| lower.contains(word));
    if missing && !lookup {
        // The release is right: pushed (again), the image makes it run without another release.
        return EngineError::Unavailable(format!(
            "the registry does not have `{image}` ({message}); push the image, the agent tries again by itself"
        ));
    }
    EngineError::Unavailable(format!("cannot pull `{image}`: {message}"))
}

fn arm_variant(machine: &str) -> Option<&'static str> {
    match machine {
        "armv5l" | "armv5tel" => Some("v5"),
        "armv6l" => Some("v6"),
        "armv7l" | "armv8l" => Some("v7"),
        _ => None,
    }
}

fn container(response: ContainerInspectResponse) -> Container {
    let config = response.config.unwrap_or_default();
    let labels = config.labels.unwrap_or_default();
    let label = |name: &str| labels.get(name).cloned();
    let state = response.state.unwrap_or_default();
    let policy = response
        .host_config
        .and_then(|host| host.restart_policy)
        .and_then(|policy| policy.name);
    Container {
        id: response.id.unwrap_or_default(),
        name: response
            .name
            .unwrap_or_default()
            .trim_start_matches('/')
            .to_owned(),
        service: label(SERVICE_LABEL).unwrap_or_default(),
        one_off: label(ONE_OFF_LABEL).is_some_and(|value| value.eq_ignore_ascii_case("true")),
        target: label(TARGET_LABEL),
        definition: label(DEFINITION_LABEL),
        image: config.image.unwrap_or_default(),
        status: match state.status {
            Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING) => {
                Status::Running
            }
            Some(ContainerStateStatusEnum::PAUSED) => Status::Paused,
            Some(ContainerStateStatusEnum::RESTARTING) => Status::Restarting,
            Some(ContainerStateStatusEnum::REMOVING) => Status::Removing,
            Some(ContainerStateStatusEnum::EXITED) => Status::Exited,
            Some(ContainerStateStatusEnum::DEAD) => Status::Dead,
            Some(ContainerStateStatusEnum::CREATED | ContainerStateStatusEnum::EMPTY) | None => {
                Status::Created
            }
        },
        health: match state.health.and_then(|health| health.status) {
            Some(HealthStatusEnum::STARTING) => Health::Starting,
            Some(HealthStatusEnum::HEALTHY) => Health::Healthy,
            Some(HealthStatusEnum::UNHEALTHY) => Health::Unhealthy,
            Some(HealthStatusEnum::NONE | HealthStatusEnum::EMPTY) | None => Health::None,
        },
        exit_code: state.exit_code.unwrap_or_default(),
        out_of_memory: state.oom_killed.unwrap_or_default(),
        error: state.error.unwrap_or_default(),
        always_restarted: matches!(
            policy,
            Some(RestartPolicyNameEnum::ALWAYS | RestartPolicyNameEnum::UNLESS_STOPPED)
        ),
        restarts: response.restart_count.unwrap_or_default(),
        started_at: state.started_at.unwrap_or_default(),
        mounts: response
            .mounts
            .unwrap_or_default()
            .into_iter()
            .filter_map(|mount| mount.source)
            .collect(),
    }
}

const PROJECT_LABEL: &str = "com.docker.compose.project";
const SERVICE_LABEL: &str = "com.docker.compose.service";
const ONE_OFF_LABEL: &str = "com.docker.compose.oneoff";
/// A request that answers at once.
const SHORT: Duration = Duration::from_secs(30);
/// A pull reports progress many times a second, except while the engine unpacks a large layer.
const SILENCE: Duration = Duration::from_mins(5);
const PARALLEL: usize = 8;
const LOG_LINES: usize = 20;
const LOG_BYTES: usize = 4096;

#[cfg(test)]
mod tests;
