//! From a release's files to a project that is ready to be planned with: the plugin resolves, we judge and rewrite.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use super::process::{self, Finished, Output, Run, RunError};
use super::redact::{Redactor, last_lines};
use super::rewrite::{self, Resolved};
use super::state::{Paths, blocking};
use super::version::{INSTALL, Version};
use super::{ComposeEngine, ERROR_BYTES, ERROR_LINES, SHORT, model};
use crate::engine::{Deployment, EngineError};

/// What a resolved project depends on besides the release's files, which never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    directory: PathBuf,
    state: PathBuf,
    data: PathBuf,
    project: String,
    profiles: Vec<String>,
    variables: BTreeMap<String, String>,
    config: crate::release::ReleaseConfig,
}

impl Key {
    fn of(deployment: &Deployment) -> Self {
        Self {
            directory: deployment.directory.clone(),
            state: deployment.state.clone(),
            data: deployment.data.clone(),
            project: deployment.target.project.clone(),
            profiles: deployment.target.profiles.clone(),
            variables: deployment.variables.clone(),
            config: deployment.config.clone(),
        }
    }
}

impl ComposeEngine {
    /// Finds the plugin and judges its version.
    pub(super) async fn plugin_version(&self) -> Result<&Version, EngineError> {
        self.version.get_or_try_init(|| self.ask_version()).await
    }

    async fn ask_version(&self) -> Result<Version, EngineError> {
        let ask = |arguments: &'static [&'static str]| async move {
            let variables = BTreeMap::new();
            let arguments = arguments.iter().map(Into::into).collect();
            let run = Run {
                arguments,
                variables: &variables,
                directory: Path::new("/"),
                input: Vec::new(),
                output: Output::Capture,
                timeout: SHORT,
            };
            self.plugin.run(run).await
        };
        let version = match ask(&["version", "--format", "json"])
            .await
            .map_err(|error| self.cannot_run(&error))?
        {
            Finished {
                success: true,
                stdout,
                ..
            } => Version::from_json(&stdout),
            // The Python program of old does not know the flag.
            _ => match ask(&["version", "--short"])
                .await
                .map_err(|error| self.cannot_run(&error))?
            {
                Finished {
                    success: true,
                    stdout,
                    ..
                } => Some(Version::parse(&String::from_utf8_lossy(&stdout))),
                _ => None,
            },
        };
        let Some(version) = version else {
            return Err(EngineError::Unavailable(format!(
                "`{} compose` does not answer: install Docker Compose 2.8 or later, not 2.30.0 ({INSTALL})",
                self.plugin.program.display()
            )));
        };
        match version.refusal() {
            Some(refusal) => Err(EngineError::Unavailable(refusal)),
            None => Ok(version),
        }
    }

    fn cannot_run(&self, error: &RunError) -> EngineError {
        match error {
            RunError::Start { .. } => EngineError::Unavailable(format!(
                "{error}; install Docker's client and Compose 2.8 or later ({INSTALL})"
            )),
            other => EngineError::Unavailable(format!(
                "`{} compose version`: {other}",
                self.plugin.program.display()
            )),
        }
    }

    /// Resolves and rewrites the release, always anew, and keeps the result for the other methods.
    pub(super) async fn resolve(
        &self,
        deployment: &Deployment,
    ) -> Result<Arc<Resolved>, EngineError> {
        if let Some(name) = deployment
            .variables
            .keys()
            .find(|name| process::reserved(name) || name.is_empty() || name.contains(['=', '\0']))
        {
            return Err(EngineError::Rejected(format!(
                "variable `{name}` would change how Docker itself runs; give it another name"
            )));
        }
        if let Some((name, _)) = deployment
            .variables
            .iter()
            .find(|(_, value)| value.contains('\0'))
        {
            return Err(EngineError::Rejected(format!(
                "variable `{name}` holds a NUL byte"
            )));
        }
        if let Some(missing) = deployment.config.variables.iter().find(|variable| {
            variable.required && !deployment.variables.contains_key(&variable.name)
        }) {
            return Err(EngineError::Rejected(format!(
                "variable `{0}` has no value; set `{0}` in the target's `variables`",
                missing.name
            )));
        }
        self.plugin_version().await?;

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
        arguments.push(deployment.directory.clone().into());
        for entry in entries(deployment)? {
            arguments.extend(["-f".into(), entry.into()]);
        }
        for profile in &deployment.target.profiles {
            arguments.extend(["--profile".into(), profile.into()]);
        }
        arguments.extend(["config", "--format", "json"].map(Into::into));
        let run = Run {
            arguments,
            variables: &deployment.variables,
            directory: &deployment.directory,
            input: Vec::new(),
            output: Output::Capture,
            timeout: SHORT,
        };
        let early = Redactor::new(deployment.variables.values().map(String::as_str));
        let finished = self.plugin.run(run).await.map_err(|error| {
            EngineError::Unavailable(format!(
                "cannot resolve the release with `docker compose config`: {error}"
            ))
        })?;
        if !finished.success {
            return Err(config_error(deployment, &early, &finished));
        }
        let unset = unset_variables(&finished.stderr);
        if let (Some(name), false) = (unset.first(), deployment.config.images.is_empty()) {
            return Err(EngineError::Rejected(format!(
                "variable `{name}` has no value and no default; set `{name}` in the target's `variables`"
            )));
        }
        let model = model::parse(&finished.stdout).map_err(|error| {
            EngineError::Unavailable(format!(
                "cannot read what `docker compose config` printed: {error}"
            ))
        })?;
        let mut resolved = {
            let deployment = deployment.clone();
            blocking(move || {
                rewrite::rewrite(model, &deployment, &Paths::below(&deployment.state).content)
            })
            .await?
        };
        resolved.notes.extend(
            unset.iter().map(|name| {
                format!("variable `{name}` has no value; Compose takes the empty text")
            }),
        );
        let resolved = Arc::new(resolved);
        let mut cache = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let list = cache.entry(deployment.target.name.clone()).or_default();
        let key = Key::of(deployment);
        list.retain(|(other, _)| *other != key);
        list.push_back((key, Arc::clone(&resolved)));
        while list.len() > CACHED {
            list.pop_front();
        }
        Ok(resolved)
    }

    /// What `resolve` found before, or finds now.
    pub(super) async fn resolved(
        &self,
        deployment: &Deployment,
    ) -> Result<Arc<Resolved>, EngineError> {
        let known = {
            let cache = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
            let key = Key::of(deployment);
            cache
                .get(&deployment.target.name)
                .and_then(|list| list.iter().find(|(other, _)| *other == key))
                .map(|(_, resolved)| Arc::clone(resolved))
        };
        match known {
            Some(resolved) => Ok(resolved),
            None => self.resolve(deployment).await,
        }
    }
}

/// The files that the plugin starts from.
fn entries(deployment: &Deployment) -> Result<Vec<PathBuf>, EngineError> {
    let directory = &deployment.directory;
    if !deployment.config.entry.is_empty() {
        return Ok(deployment
            .config
            .entry
            .iter()
            .map(|entry| directory.join(entry))
            .collect());
    }
    let Some(first) = DEFAULT_ENTRIES
        .into_iter()
        .find(|name| directory.join(name).is_file())
    else {
        return Err(EngineError::Rejected(format!(
            "the release has no Compose file ({})",
            DEFAULT_ENTRIES.join(", ")
        )));
    };
    let mut entries = vec![directory.join(first)];
    entries.extend(
        DEFAULT_OVERRIDES
            .into_iter()
            .map(|name| directory.join(name))
            .find(|path| path.is_file()),
    );
    Ok(entries)
}

/// The plugin does not accept the release.
pub(super) fn config_error(
    deployment: &Deployment,
    redactor: &Redactor,
    finished: &Finished,
) -> EngineError {
    let lines = last_lines(&redactor.redact(&finished.stderr), ERROR_LINES, ERROR_BYTES);
    // Paths are shown as the author knows them.
    let lines = lines.replace(&format!("{}/", deployment.directory.display()), "");
    let lower = lines.to_ascii_lowercase();
    if [
        "no space left",
        "cannot allocate memory",
        "too many open files",
        "permission denied",
    ]
    .iter()
    .any(|word| lower.contains(word))
        || finished.status.contains("signal")
    {
        return EngineError::Unavailable(format!(
            "`docker compose config` failed ({}): {lines}",
            finished.status
        ));
    }
    if lower.contains("required variable") || lower.contains("missing a value") {
        return EngineError::Rejected(format!(
            "a variable has no value ({lines}); set it in the target's `variables`"
        ));
    }
    EngineError::Rejected(format!(
        "Docker Compose does not accept the release: {lines}"
    ))
}

/// The variables that Compose warned of.
pub(super) fn unset_variables(stderr: &str) -> Vec<String> {
    let mut names: Vec<String> = stderr
        .lines()
        .filter(|line| line.contains("variable is not set"))
        .filter_map(|line| {
            let line = line.replace('\\', "");
            let end = line.find("\" variable is not set")?;
            let start = line[..end].rfind('"')? + 1;
            Some(line[start..end].to_owned())
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

/// The names that Compose tries itself, in its order.
const DEFAULT_ENTRIES: [&str; 4] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yml",
    "docker-compose.yaml",
];

const DEFAULT_OVERRIDES: [&str; 4] = [
    "compose.override.yml",
    "compose.override.yaml",
    "docker-compose.override.yml",
    "docker-compose.override.yaml",
];

const CACHED: usize = 4;
