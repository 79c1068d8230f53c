//! Running the `docker` program: a clean environment, a process group of its own, a time limit.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::model::Model;
use crate::engine::{Deployment, EngineError};

/// How the program is started.
pub(super) struct Process<'a> {
    pub(super) program: &'a Path,
    pub(super) docker_host: Option<&'a str>,
}

/// What a program did.
struct Output {
    is_success: bool,
    stdout: Vec<u8>,
    stderr: String,
}

impl Process<'_> {
    /// The version of the Compose plugin, checked.
    pub(super) async fn compose_version(&self) -> Result<String, EngineError> {
        let output = self
            .run(
                &["compose", "version", "--format", "json"],
                &[],
                None,
                SHORT,
            )
            .await?;
        if !output.is_success {
            return Err(EngineError::Unavailable(format!(
                "`{} compose` does not work ({}); install the Docker Compose plugin, 2.8 or later",
                self.program.display(),
                last_line(&output.stderr)
            )));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let version = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|value| {
                value
                    .get("version")
                    .and_then(|version| version.as_str())
                    .map(str::to_owned)
            })
            .unwrap_or_else(|| text.trim().to_owned());
        check_version(&version)?;
        Ok(version)
    }

    /// The project as the plugin resolves it, as JSON.
    pub(super) async fn config(
        &self,
        deployment: &Deployment,
    ) -> Result<serde_json::Value, EngineError> {
        let directory = &deployment.directory;
        let first = deployment.config.entry.first().map_or("", String::as_str);
        let project_directory = directory.join(first);
        let project_directory = project_directory.parent().unwrap_or(directory);
        let mut arguments = vec![
            "compose".to_owned(),
            "-p".to_owned(),
            deployment.target.project.clone(),
            "--project-directory".to_owned(),
            project_directory.display().to_string(),
        ];
        for entry in &deployment.config.entry {
            arguments.push("-f".to_owned());
            arguments.push(directory.join(entry).display().to_string());
        }
        for profile in &deployment.target.profiles {
            arguments.push("--profile".to_owned());
            arguments.push(profile.clone());
        }
        arguments.extend(["config", "--format", "json"].map(str::to_owned));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let variables: Vec<(&str, &str)> = deployment
            .variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let output = self.run(&arguments, &variables, None, SHORT).await?;
        if !output.is_success {
            let problem = redact(&tail(&output.stderr), deployment.variables.values());
            return Err(if problem.contains("annot connect to the Docker daemon") {
                EngineError::Unavailable(problem)
            } else {
                EngineError::Rejected(format!("Compose refuses the release: {problem}"))
            });
        }
        serde_json::from_slice(&output.stdout)
            .map_err(|error| EngineError::Unavailable(format!("Compose wrote no JSON: {error}")))
    }

    /// Brings the model up. The model goes through standard input alone.
    pub(super) async fn up(
        &self,
        deployment: &Deployment,
        model: &Model,
        limit: Duration,
    ) -> Result<Vec<String>, EngineError> {
        let directory = deployment.state.join("engine/project");
        super::content::make_directory(&directory)?;
        let directory = directory.display().to_string();
        let arguments = [
            "compose",
            "--ansi",
            "never",
            "-p",
            &deployment.target.project,
            "--project-directory",
            &directory,
            "-f",
            "-",
            "up",
            "-d",
            "--no-build",
            "--pull",
            "never",
        ];
        let document = serde_json::to_vec(&model.document)
            .map_err(|error| EngineError::Unavailable(error.to_string()))?;
        let output = self.run(&arguments, &[], Some(document), limit).await?;
        let said = model.redact(&tail(&output.stderr));
        if output.is_success {
            return Ok(Vec::new());
        }
        Err(if said.contains("annot connect to the Docker daemon") {
            EngineError::Unavailable(said)
        } else {
            EngineError::Failed(format!("Compose could not bring the release up: {said}"))
        })
    }

    async fn run(
        &self,
        arguments: &[&str],
        variables: &[(&str, &str)],
        input: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Output, EngineError> {
        #[expect(clippy::disallowed_methods, reason = "engines start processes")]
        let mut command = tokio::process::Command::new(self.program);
        command
            .args(arguments)
            .env_clear()
            .process_group(0)
            .kill_on_drop(true);
        // What the program itself needs to find its plugins and its engine; nothing else leaks in.
        for name in [
            "PATH",
            "HOME",
            "DOCKER_CONFIG",
            "DOCKER_CERT_PATH",
            "DOCKER_TLS_VERIFY",
            "XDG_RUNTIME_DIR",
        ] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(variables.iter().copied());
        if let Some(host) = self.docker_host {
            command.env("DOCKER_HOST", host);
        }
        // Nothing that was not verified is fetched.
        command.env("COMPOSE_EXPERIMENTAL_GIT_REMOTE", "false");
        command.env("COMPOSE_EXPERIMENTAL_OCI_REMOTE", "false");
        command.stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            EngineError::Unavailable(format!(
                "cannot start `{}` ({error}); install the Docker command line with its Compose plugin",
                self.program.display()
            ))
        })?;
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let guard = Group(group);
        let mut stdin = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let feed = async {
                if let (Some(stdin), Some(input)) = (&mut stdin, &input) {
                    // A program that ends without reading says why on its own.
                    let _ = stdin.write_all(input).await;
                }
                drop(stdin.take());
            };
            let ((), stdout, stderr) = tokio::join!(feed, read(stdout), read(stderr));
            (child.wait().await, stdout, stderr)
        };
        let Ok((status, stdout, stderr)) = tokio::time::timeout(limit, work).await else {
            drop(guard);
            return Err(EngineError::Failed(format!(
                "`docker {}` did not end within {}s and was stopped",
                arguments.first().copied().unwrap_or_default(),
                limit.as_secs()
            )));
        };
        guard.disarm();
        let status = status.map_err(|error| {
            EngineError::Unavailable(format!("cannot wait for `docker`: {error}"))
        })?;
        Ok(Output {
            is_success: status.success(),
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }
}

/// Ends the whole process group when it is dropped before the program ended.
struct Group(Option<Pid>);

impl Group {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Reads to the end and keeps a bounded part.
async fn read(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else {
        return kept;
    };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return kept,
            Ok(count) => {
                let room = MAX_OUTPUT.saturating_sub(kept.len()).min(count);
                kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
            }
        }
    }
}

/// Refuses what is known not to work. The major version jumps from 2 to 5.
pub(super) fn check_version(version: &str) -> Result<(), EngineError> {
    let numbers: Vec<u64> = version
        .trim_start_matches('v')
        .split(['.', '-', '+'])
        .map_while(|part| part.parse().ok())
        .collect();
    let refuse = |why: &str| {
        Err(EngineError::Unavailable(format!(
            "Docker Compose {version} {why}; install 2.8 or later (not 2.30.0)"
        )))
    };
    match numbers.as_slice() {
        // A build of a developer's own, such as `dev`.
        [] => Ok(()),
        [2, 30, 0, ..] => refuse("cannot read a project from standard input"),
        [major, minor, ..] if (*major, *minor) < (2, 8) => refuse("is too old"),
        [major] if *major < 2 => refuse("is too old"),
        _ => Ok(()),
    }
}

/// Replaces values that may be secret.
pub(super) fn redact<'a>(text: &str, secrets: impl Iterator<Item = &'a String>) -> String {
    let mut text = text.to_owned();
    let mut secrets: Vec<&String> = secrets.filter(|secret| secret.len() >= 4).collect();
    // Longer ones first, else a part of one would leave the rest readable.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    for secret in secrets {
        text = text.replace(secret.as_str(), "***");
    }
    text
}

/// The last lines of what a program said.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let start = lines.len().saturating_sub(6);
    lines
        .get(start..)
        .unwrap_or_default()
        .join(" | ")
        .chars()
        .take(2000)
        .collect()
}

fn last_line(text: &str) -> &str {
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message")
        .trim()
}

const MAX_OUTPUT: usize = 16 * 1024 * 1024;
const SHORT: Duration = Duration::from_mins(1);
