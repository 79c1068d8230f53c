//! Wiring of the agent: configuration and engines → run until a signal.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use delivery::agent::{Agent, AgentConfig, ConfigError, Engines};
use delivery::engine::compose::{ComposeEngine, ComposeOptions, Credentials};
use delivery::engine::files::FilesEngine;
use delivery::release::EngineKind;
use tokio_util::sync::CancellationToken;

use crate::output::{Exit, Refused};

/// Reads an agent's configuration.
///
/// # Errors
/// Exit code 78 with file, line and what to do.
pub(crate) fn load(path: &Path) -> anyhow::Result<AgentConfig> {
    // Paths in it are relative to its directory, which a bare file name does not have.
    let path = std::path::absolute(path).map_err(|error| {
        Refused::new(
            Exit::CONFIG,
            format!("cannot find `{}`: {error}", path.display()),
        )
    })?;
    AgentConfig::load(&path).map_err(|error| match error {
        ConfigError::Read { path, source } => Refused::new(
            Exit::CONFIG,
            format!("cannot read `{}`: {source}", path.display()),
        )
        .into(),
        other => Refused::new(Exit::CONFIG, other).into(),
    })
}

/// The engines of this build.
pub(crate) fn engines(config: &AgentConfig) -> Engines {
    let source = Arc::clone(&config.client.credentials);
    let credentials: Credentials = Arc::new(move |host| {
        // The engine pulls with the agent's own login; a helper that fails shows at the pull.
        tokio::task::block_in_place(|| client::credentials::password(&source, host)).unwrap_or_else(
            |error| {
                tracing::warn!(host, %error, "cannot look up the credentials for a pull");
                None
            },
        )
    });
    let compose = ComposeEngine::new(ComposeOptions {
        credentials,
        ..compose_options()
    });
    Engines::new()
        .with(EngineKind::Compose, Arc::new(compose))
        .with(EngineKind::Files, Arc::new(FilesEngine::new()))
}

/// The Compose engine as the environment names it (`DOCKER_HOST`).
pub(crate) fn compose() -> ComposeEngine {
    ComposeEngine::new(compose_options())
}

fn compose_options() -> ComposeOptions {
    ComposeOptions {
        docker_host: std::env::var("DOCKER_HOST")
            .ok()
            .filter(|host| !host.is_empty()),
        docker: PathBuf::from("docker"),
        apply_timeout: Duration::from_mins(10),
        ..ComposeOptions::default()
    }
}

/// Runs the agent in the foreground.
pub(crate) async fn run(path: &Path) -> anyhow::Result<()> {
    let config = load(path)?;
    let engines = engines(&config);
    let shutdown = CancellationToken::new();
    let signal = crate::serve::shutdown_signal()?;
    let agent = Agent::new(config, engines).run(shutdown.clone());
    tokio::pin!(agent);
    tokio::select! {
        outcome = &mut agent => return Ok(outcome?),
        () = signal => shutdown.cancel(),
    }
    Ok(agent.await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_file_name_is_enough() {
        // Tests run in the directory of the crate, where there is no such file.
        let error = load(Path::new("no-such-agent.yaml")).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("no-such-agent.yaml"), "{message}");
        assert!(message.contains("/no-such-agent.yaml"), "{message}");
    }
}
