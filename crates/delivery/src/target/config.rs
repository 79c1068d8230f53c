//! The agent's configuration file, `agent.yaml`.
//!
//! Read in two steps: what was typed (`Raw…`, with the places in the file), then [`AgentConfig`], which cannot be wrong.
//! It is strict: an unknown key is an error that names the nearest known one, because a misspelt `rollback` that is
//! silently ignored shows only in the night when it is needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use crate::release::EngineKind;
use crate::target::{FilesTarget, Health, Rollback, Target, nearest};

/// Everything an agent is told.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The file it was read from, which is read again when it changes.
    pub path: Option<PathBuf>,
    /// How registries are reached.
    pub client: client::Config,
    /// The registry (`host:port`) whose event stream is read; others are polled. Default: the hosts of all targets are tried.
    pub registry: Option<String>,
    /// Tell registries of this program what runs here and how deployments went (yes).
    pub report: bool,
    /// The beginning of the names under which that is told; `None`: the user's name and this host's.
    pub holder: Option<String>,
    /// The agent's state: attempts, releases, persistent data.
    pub state: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// How often a target is looked at while no stream is up (60 s).
    pub poll: Duration,
    /// How often it is looked at nevertheless while a stream is up (10 min).
    pub safety_poll: Duration,
    /// What is kept running, by name.
    pub targets: Vec<Target>,
}

impl AgentConfig {
    /// Reads a file. Relative paths in it are relative to the directory it is in.
    ///
    /// # Errors
    /// When it, or a key or password file that it names, cannot be read or is wrong; with file and line where there is one.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read(path)?;
        let base = path.parent().unwrap_or(Path::new(""));
        let base = std::path::absolute(base).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut config = Self::parse(&text, &path.display().to_string(), &base)?;
        config.path = Some(path.to_owned());
        Ok(config)
    }

    /// Reads a document; `file` stands in messages, `base` is what relative paths are relative to.
    ///
    /// # Errors
    /// As [`AgentConfig::load`].
    pub fn parse(text: &str, file: &str, base: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig =
            serde_saphyr::from_str(text).map_err(|error| malformed(file, &error))?;
        Reader { file, base }.config(raw)
    }
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read `{path}`", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Something in it is wrong.
    #[error("{file}:{line}: {message}")]
    Invalid {
        /// The file.
        file: String,
        /// The line, from 1; 0 when it concerns the whole file.
        line: u64,
        /// What is wrong and what to do.
        message: String,
    },
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

fn malformed(file: &str, error: &serde_saphyr::Error) -> ConfigError {
    let error = error.without_snippet();
    let line = error.location().map_or(0, |location| location.line());
    let message = match error {
        serde_saphyr::Error::SerdeUnknownField {
            field, expected, ..
        } => unknown_key(field, expected),
        other => {
            // The first line only: the rest repeats the document, which may hold secrets.
            let text = other.to_string();
            text.lines().next().unwrap_or_default().to_owned()
        }
    };
    ConfigError::Invalid {
        file: file.to_owned(),
        line,
        message,
    }
}

fn unknown_key(field: &str, expected: &[&str]) -> String {
    match nearest(field, expected) {
        Some(known) => format!("unknown key `{field}`; did you mean `{known}`?"),
        None => format!(
            "unknown key `{field}`; known here are `{}`",
            expected.join("`, `")
        ),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    version: Spanned<u32>,
    #[serde(default)]
    registry: RawRegistry,
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
    poll: Option<Spanned<String>>,
    safety_poll: Option<Spanned<String>>,
    #[serde(default)]
    targets: RawTargets,
}

/// A host alone, or a host with how it is reached.
#[derive(Default)]
struct RawRegistry(RawRegistrySettings);

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRegistrySettings {
    host: Option<String>,
    plain_http: Option<bool>,
    ca_file: Option<PathBuf>,
    username: Option<Spanned<String>>,
    password_file: Option<PathBuf>,
    docker_config: Option<PathBuf>,
    anonymous: Option<bool>,
    report: Option<bool>,
    holder: Option<Spanned<String>>,
}

/// A list of targets with names, or a mapping from names to targets.
#[derive(Default)]
struct RawTargets(Vec<(Option<String>, RawTarget)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTarget {
    name: Option<Spanned<String>>,
    reference: Spanned<String>,
    release: Spanned<String>,
    #[serde(default)]
    engine: Option<EngineKind>,
    project: Option<Spanned<String>>,
    #[serde(default)]
    variables: BTreeMap<String, String>,
    #[serde(default)]
    profiles: Vec<String>,
    trust: Option<Spanned<RawTrust>>,
    #[serde(default)]
    health: RawHealth,
    #[serde(default)]
    rollback: RawRollback,
    #[serde(default)]
    adopt: bool,
    files: Option<Spanned<RawFiles>>,
}

/// `none`, or keys with a threshold.
enum RawTrust {
    None,
    Keys(RawKeys),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKeys {
    keys: Vec<Spanned<String>>,
    #[serde(default = "one")]
    threshold: Spanned<usize>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHealth {
    stability: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    interval: Option<Spanned<String>>,
    #[serde(default)]
    http: Vec<Spanned<String>>,
    #[serde(default)]
    command: Vec<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawRollback {
    #[default]
    Auto,
    Never,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFiles {
    path: Spanned<PathBuf>,
    #[serde(default)]
    activate: Vec<String>,
    activate_timeout: Option<Spanned<String>>,
}

fn one() -> Spanned<usize> {
    Spanned::new(1, Location::UNKNOWN, Location::UNKNOWN)
}

impl<'de> Deserialize<'de> for RawTrust {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RawTrust;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`none`, or `keys` and `threshold`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RawTrust, E> {
                if text == "none" {
                    Ok(RawTrust::None)
                } else {
                    Err(E::invalid_value(serde::de::Unexpected::Str(text), &self))
                }
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<RawTrust, A::Error> {
                RawKeys::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    .map(RawTrust::Keys)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for RawRegistry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RawRegistry;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a host, or `host` and how it is reached")
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<RawRegistry, E> {
                Ok(RawRegistry::default())
            }

            fn visit_str<E: serde::de::Error>(self, host: &str) -> Result<RawRegistry, E> {
                Ok(RawRegistry(RawRegistrySettings {
                    host: Some(host.to_owned()),
                    ..RawRegistrySettings::default()
                }))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                map: A,
            ) -> Result<RawRegistry, A::Error> {
                let map = serde::de::value::MapAccessDeserializer::new(map);
                RawRegistrySettings::deserialize(map).map(RawRegistry)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for RawTargets {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RawTargets;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of targets, or a mapping from their names")
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<RawTargets, E> {
                Ok(RawTargets::default())
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> Result<RawTargets, A::Error> {
                let mut targets = Vec::new();
                while let Some(target) = list.next_element()? {
                    targets.push((None, target));
                }
                Ok(RawTargets(targets))
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<RawTargets, A::Error> {
                let mut targets = Vec::new();
                while let Some((name, target)) = map.next_entry()? {
                    targets.push((Some(name), target));
                }
                Ok(RawTargets(targets))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Words with slashes between them, with room for a target's name.
fn is_holder(name: &str) -> bool {
    name.len() <= LONGEST_HOLDER
        && !name.chars().any(char::is_control)
        && name
            .split('/')
            .all(|word| !word.is_empty() && word != "." && word != "..")
}

const LONGEST_HOLDER: usize = 190;

struct Reader<'a> {
    file: &'a str,
    base: &'a Path,
}

impl Reader<'_> {
    fn config(&self, raw: RawConfig) -> Result<AgentConfig, ConfigError> {
        if raw.version.value != VERSION {
            let message = format!(
                "version {} is not known; this program reads version {VERSION}",
                raw.version.value
            );
            return Err(self.invalid(raw.version.referenced, message));
        }
        let report = raw.registry.0.report.unwrap_or(true);
        let holder = match &raw.registry.0.holder {
            Some(holder) if !is_holder(&holder.value) => {
                let message = format!(
                    "`holder`: `{}` is no name such as `host1` or `deploy/host1`, of at most {LONGEST_HOLDER} bytes",
                    holder.value
                );
                return Err(self.invalid(holder.referenced, message));
            }
            holder => holder.as_ref().map(|holder| holder.value.clone()),
        };
        let (client, registry) = self.registry(raw.registry.0)?;
        let state = raw
            .state
            .map_or_else(|| default_state(self.base), |path| self.base.join(path));
        let socket = raw
            .socket
            .map_or_else(default_socket, |path| self.base.join(path));
        let mut targets: Vec<Target> = Vec::new();
        for (key, raw) in raw.targets.0 {
            let at = raw.reference.referenced;
            let (name, at) = match (key, &raw.name) {
                (Some(key), None) => (key, at),
                (None, Some(name)) => (name.value.clone(), name.referenced),
                (Some(key), Some(name)) => {
                    let message =
                        format!("target `{key}` has a `name` of its own; remove one of the two");
                    return Err(self.invalid(name.referenced, message));
                }
                (None, None) => return Err(self.invalid(at, "a target has no `name`".to_owned())),
            };
            let target = self.target(name, raw, at)?;
            for other in &targets {
                if other.name == target.name {
                    return Err(
                        self.invalid(at, format!("there are two targets `{}`", target.name))
                    );
                }
                self.must_not_share(&target, other, at)?;
            }
            targets.push(target);
        }
        Ok(AgentConfig {
            path: None,
            client,
            registry,
            report,
            holder,
            state,
            socket,
            poll: self.duration(raw.poll, POLL)?.max(Duration::from_secs(1)),
            safety_poll: self
                .duration(raw.safety_poll, SAFETY_POLL)?
                .max(Duration::from_secs(1)),
            targets,
        })
    }

    fn registry(
        &self,
        raw: RawRegistrySettings,
    ) -> Result<(client::Config, Option<String>), ConfigError> {
        let mut config = client::Config::default();
        if raw.plain_http == Some(true) {
            match &raw.host {
                Some(host) => config.plain_http.push(host.clone()),
                None => config.plain_http_all = true,
            }
        }
        if let Some(path) = raw.ca_file {
            config
                .ca_pem
                .push(read(&self.base.join(path))?.into_bytes());
        }
        let source = match (raw.username, raw.password_file, raw.docker_config) {
            (Some(username), Some(password_file), None) => {
                let Some(host) = raw.host.clone() else {
                    let message =
                        "`username` needs `host`: a password is sent to no other".to_owned();
                    return Err(self.invalid(username.referenced, message));
                };
                let password = read(&self.base.join(password_file))?;
                client::credentials::Source::Basic {
                    host,
                    username: username.value,
                    password: password.trim_end_matches(['\r', '\n']).to_owned(),
                }
            }
            (None, None, Some(path)) => client::credentials::Source::File(self.base.join(path)),
            (None, None, None) if raw.anonymous == Some(true) => {
                client::credentials::Source::Anonymous
            }
            (None, None, None) => client::credentials::Source::Docker,
            (username, ..) => {
                let at = username.map_or(Location::UNKNOWN, |username| username.referenced);
                let message = "under `registry`, give `username` with `password_file`, or `docker_config` alone";
                return Err(self.invalid(at, message.to_owned()));
            }
        };
        config.credentials = Arc::new(source);
        Ok((config, raw.host))
    }

    fn target(&self, name: String, raw: RawTarget, at: Location) -> Result<Target, ConfigError> {
        if !is_name(&name) {
            let message = format!(
                "target name `{name}` is not of the form `[a-z0-9][a-z0-9_-]*`, at most 63 characters"
            );
            return Err(self.invalid(at, message));
        }
        let reference = raw.reference.value.parse().map_err(|error| {
            let message = format!("target `{name}`: {error}; write `HOST/REPOSITORY:TAG`");
            self.invalid(raw.reference.referenced, message)
        })?;
        if raw.release.value.trim().is_empty() {
            return Err(self.invalid(
                raw.release.referenced,
                format!(
                    "target `{name}`: `release` is empty; give the name that its releases have"
                ),
            ));
        }
        let engine = raw.engine.unwrap_or(EngineKind::Compose);
        let project = match raw.project {
            Some(project) if !is_name(&project.value) => {
                let message = format!(
                    "target `{name}`: project `{}` is not of the form `[a-z0-9][a-z0-9_-]*`",
                    project.value
                );
                return Err(self.invalid(project.referenced, message));
            }
            Some(project) => project.value,
            None => name.clone(),
        };
        let Some(trust) = raw.trust else {
            let message = format!(
                "target `{name}`: `trust` is missing; give `keys`, or `trust: none` to run what nobody signed"
            );
            return Err(self.invalid(at, message));
        };
        let trust = self.trust(&name, trust)?;
        let files = match (engine, raw.files) {
            (EngineKind::Files, Some(files)) => Some(self.files(&name, files)?),
            (EngineKind::Files, None) => {
                let message = format!(
                    "target `{name}`: engine `files` needs `files: {{path: …}}`, the symbolic link that is switched"
                );
                return Err(self.invalid(at, message));
            }
            (EngineKind::Compose, Some(files)) => {
                let message = format!(
                    "target `{name}`: `files` belongs to engine `files`, this target's is `compose`"
                );
                return Err(self.invalid(files.referenced, message));
            }
            (EngineKind::Compose, None) => None,
        };
        let health = self.health(&name, engine, raw.health, at)?;
        Ok(Target {
            reference,
            release: raw.release.value,
            engine,
            project,
            variables: raw.variables,
            profiles: raw.profiles,
            trust,
            health,
            rollback: match raw.rollback {
                RawRollback::Auto => Rollback::Auto,
                RawRollback::Never => Rollback::Never,
            },
            adopt: raw.adopt,
            files,
            name,
        })
    }

    fn trust(
        &self,
        target: &str,
        raw: Spanned<RawTrust>,
    ) -> Result<Option<trust::Policy>, ConfigError> {
        let keys = match raw.value {
            RawTrust::None => return Ok(None),
            RawTrust::Keys(keys) => keys,
        };
        if keys.keys.is_empty() {
            let message = format!(
                "target `{target}`: `trust.keys` is empty; name at least one public key file, or say `trust: none`"
            );
            return Err(self.invalid(raw.referenced, message));
        }
        let mut trusted: Vec<trust::TrustedKey> = Vec::new();
        for (index, entry) in keys.keys.into_iter().enumerate() {
            let (label, pem) = if entry.value.contains("-----BEGIN") {
                (format!("key {}", index + 1), entry.value)
            } else {
                let path = self.base.join(&entry.value);
                let pem = std::fs::read_to_string(&path).map_err(|error| {
                    let message = format!(
                        "target `{target}`: cannot read the key `{}`: {error}",
                        path.display()
                    );
                    self.invalid(entry.referenced, message)
                })?;
                (entry.value, pem)
            };
            let key = trust::key::PublicKey::from_pem(&pem).map_err(|error| {
                let message = format!(
                    "target `{target}`: `{label}` is no public key that can be used: {error}"
                );
                self.invalid(entry.referenced, message)
            })?;
            if let Some(other) = trusted.iter().find(|other| other.key == key) {
                // A key that counts twice would make n-of-m a lie.
                let message = format!(
                    "target `{target}`: `{label}` and `{}` are the same key",
                    other.label
                );
                return Err(self.invalid(entry.referenced, message));
            }
            trusted.push(trust::TrustedKey { label, key });
        }
        if keys.threshold.value == 0 || keys.threshold.value > trusted.len() {
            let message = format!(
                "target `{target}`: `threshold` is {}; with {} key(s) it must be between 1 and {}",
                keys.threshold.value,
                trusted.len(),
                trusted.len()
            );
            return Err(self.invalid(keys.threshold.referenced, message));
        }
        Ok(Some(trust::Policy {
            name: target.to_owned(),
            keys: trusted,
            threshold: keys.threshold.value,
        }))
    }

    fn files(&self, target: &str, raw: Spanned<RawFiles>) -> Result<FilesTarget, ConfigError> {
        let raw = raw.value;
        if !raw.path.value.is_absolute() || raw.path.value.file_name().is_none() {
            let message = format!(
                "target `{target}`: `files.path` must be an absolute path of a symbolic link, such as `/srv/www/current`"
            );
            return Err(self.invalid(raw.path.referenced, message));
        }
        Ok(FilesTarget {
            path: raw.path.value,
            activate: raw.activate,
            activate_timeout: self.duration(raw.activate_timeout, ACTIVATE_TIMEOUT)?,
        })
    }

    fn health(
        &self,
        target: &str,
        engine: EngineKind,
        raw: RawHealth,
        at: Location,
    ) -> Result<Health, ConfigError> {
        for url in &raw.http {
            if !url.value.starts_with("http://") {
                let message = format!(
                    "target `{target}`: health URL `{}` must begin with `http://`",
                    url.value
                );
                return Err(self.invalid(url.referenced, message));
            }
            if url
                .value
                .parse::<hyper::Uri>()
                .ok()
                .and_then(|uri| uri.host().map(str::to_owned))
                .is_none()
            {
                let message = format!("target `{target}`: health URL `{}` is no URL", url.value);
                return Err(self.invalid(url.referenced, message));
            }
        }
        if engine == EngineKind::Compose && !raw.command.is_empty() {
            let message = format!(
                "target `{target}`: `health.command` belongs to engine `files`; in Compose, write a `healthcheck` in the service"
            );
            return Err(self.invalid(at, message));
        }
        let timeout_at = raw
            .timeout
            .as_ref()
            .map_or(at, |timeout| timeout.referenced);
        let health = Health {
            stability: self.duration(raw.stability, STABILITY)?,
            timeout: self.duration(raw.timeout, TIMEOUT)?,
            interval: self
                .duration(raw.interval, INTERVAL)?
                .max(Duration::from_millis(50)),
            http: raw.http.into_iter().map(|url| url.value).collect(),
            command: raw.command,
        };
        if health.timeout <= health.stability {
            let message = format!(
                "target `{target}`: `health.timeout` must be longer than `health.stability`, or nothing ever becomes healthy"
            );
            return Err(self.invalid(timeout_at, message));
        }
        Ok(health)
    }

    fn must_not_share(
        &self,
        target: &Target,
        other: &Target,
        at: Location,
    ) -> Result<(), ConfigError> {
        let shared = match (&target.files, &other.files) {
            (Some(a), Some(b)) if a.path == b.path => format!("path `{}`", a.path.display()),
            (None, None) if target.project == other.project => {
                format!("project `{}`", target.project)
            }
            _ => return Ok(()),
        };
        let message = format!(
            "targets `{}` and `{}` share {shared}: they would undo each other's work",
            other.name, target.name
        );
        Err(self.invalid(at, message))
    }

    fn duration(
        &self,
        raw: Option<Spanned<String>>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        let Some(raw) = raw else { return Ok(default) };
        duration(&raw.value).ok_or_else(|| {
            let message = format!(
                "`{}` is no duration; write `500ms`, `10s`, `3m` or `1h`",
                raw.value
            );
            self.invalid(raw.referenced, message)
        })
    }

    fn invalid(&self, at: Location, message: String) -> ConfigError {
        ConfigError::Invalid {
            file: self.file.to_owned(),
            line: at.line(),
            message,
        }
    }
}

/// Where an agent keeps its state when its configuration does not say: `/var/lib/longshore/agent` as root, else `agent` beside
/// the configuration.
fn default_state(base: &Path) -> PathBuf {
    if rustix::process::geteuid().is_root() {
        PathBuf::from("/var/lib/longshore/agent")
    } else {
        base.join("agent")
    }
}

/// Where an agent listens when its configuration does not say, and where the command line looks for it:
/// `/run/longshore/agent.sock` as root, else `/run/user/UID/longshore/agent.sock`.
pub fn default_socket() -> PathBuf {
    let user = rustix::process::geteuid();
    if user.is_root() {
        PathBuf::from("/run/longshore/agent.sock")
    } else {
        PathBuf::from(format!("/run/user/{}/longshore/agent.sock", user.as_raw()))
    }
}

/// `500ms`, `10s`, `3m`, `1h`; never zero, at most a day.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit.trim() {
        "ms" => number,
        "s" => number.checked_mul(1000)?,
        "m" | "min" => number.checked_mul(60_000)?,
        "h" => number.checked_mul(3_600_000)?,
        _ => return None,
    };
    (1..=86_400_000)
        .contains(&milliseconds)
        .then(|| Duration::from_millis(milliseconds))
}

fn is_name(text: &str) -> bool {
    text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
}

const VERSION: u32 = 1;
const POLL: Duration = Duration::from_mins(1);
const SAFETY_POLL: Duration = Duration::from_mins(10);
const STABILITY: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_mins(3);
const INTERVAL: Duration = Duration::from_secs(1);
const ACTIVATE_TIMEOUT: Duration = Duration::from_mins(1);

#[cfg(test)]
mod tests;
