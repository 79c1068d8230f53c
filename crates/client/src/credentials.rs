//! Credentials: docker's `config.json`, its helper programs, or given outright.
//!
//! What docker, podman's docker form, oras, cosign and helm wrote is read; what is written here, they
//! read. Fields of the file that are not known here are kept.

mod helper;

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::HeaderValue;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::transport::is_docker_hub;

/// Where credentials come from.
#[derive(Clone, Default)]
pub enum Source {
    /// None.
    Anonymous,
    /// `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, with helpers.
    #[default]
    Docker,
    /// This file.
    File(PathBuf),
    /// This user for this host.
    Basic {
        /// `host:port`.
        host: String,
        /// User.
        username: String,
        /// Password.
        password: String,
    },
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Docker => f.write_str("Docker"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Basic { host, username, .. } => f
                .debug_struct("Basic")
                .field("host", host)
                .field("username", username)
                .finish_non_exhaustive(),
        }
    }
}

/// Stores a login (`longshore login`) in the docker configuration (helper, else file with mode 0600).
///
/// # Errors
/// When the helper fails or the file cannot be written.
pub fn store(host: &str, username: &str, password: &str) -> Result<(), Error> {
    store_in(&default_file()?, host, username, password)
}

/// Removes a login; `false` when there was none.
///
/// # Errors
/// When the helper fails or the file cannot be written.
pub fn erase(host: &str) -> Result<bool, Error> {
    erase_in(&default_file()?, host)
}

/// As [`store`], in this file.
///
/// # Errors
/// As [`store`].
pub fn store_in(file: &Path, host: &str, username: &str, password: &str) -> Result<(), Error> {
    let mut config = read(file)?;
    let key = key_of(host);
    if let Some(helper) = config.helper(host) {
        helper::store(&helper, &key, username, password)?;
        // An older login in the file would stay readable for nothing.
        if config.remove(host) {
            config.write(file)?;
        }
        return Ok(());
    }
    config.remove(host);
    let auth = BASE64.encode(format!("{username}:{password}"));
    config.table("auths").insert(key, json!({ "auth": auth }));
    config.write(file)
}

/// As [`erase`], in this file.
///
/// # Errors
/// As [`erase`].
pub fn erase_in(file: &Path, host: &str) -> Result<bool, Error> {
    let mut config = read(file)?;
    let mut had = false;
    if let Some(helper) = config.helper(host) {
        had = helper::erase(&helper, &key_of(host))?;
    }
    if config.remove(host) {
        config.write(file)?;
        had = true;
    }
    Ok(had)
}

/// What is sent to prove who asks.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// Nothing.
    None,
    /// User and password.
    Password {
        /// User.
        username: String,
        /// Password, or a personal access token in its place.
        password: String,
    },
    /// An identity token, exchanged for bearer tokens at the token service.
    Identity(String),
    /// A bearer token for the registry itself.
    Token(String),
}

impl Credential {
    /// The header of Basic authentication; `None` when there is no password.
    pub(crate) fn basic(&self) -> Option<HeaderValue> {
        let Self::Password { username, password } = self else {
            return None;
        };
        let text = format!("Basic {}", BASE64.encode(format!("{username}:{password}")));
        let mut header = HeaderValue::from_str(&text).ok()?;
        header.set_sensitive(true);
        Some(header)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Password { .. } => "Password",
            Self::Identity(_) => "Identity",
            Self::Token(_) => "Token",
        })
    }
}

/// Looks up what to send to a host. Blocks: it reads a file and may start a helper.
pub(crate) fn find(source: &Source, host: &str) -> Result<Credential, Error> {
    let file = match source {
        Source::Anonymous => return Ok(Credential::None),
        Source::Basic {
            host: only,
            username,
            password,
        } => {
            return Ok(if same_host(only, host) {
                Credential::Password {
                    username: username.clone(),
                    password: password.clone(),
                }
            } else {
                Credential::None
            });
        }
        // Without a home there is no login, which is no error for someone who needs none.
        Source::Docker => match default_file() {
            Ok(file) => file,
            Err(_) => return Ok(Credential::None),
        },
        Source::File(file) => file.clone(),
    };
    let config = read(&file)?;
    if let Some(helper) = config.helper(host)
        && let Some(found) = helper::get(&helper, &key_of(host))?
    {
        return Ok(found);
    }
    config.find(host)
}

/// The user name and the password for a host, for whoever pulls on our behalf (a container engine).
/// Identity tokens and bearer tokens are none. Blocks, as [`store`] does.
///
/// # Errors
/// When the configuration cannot be read or a helper fails.
pub fn password(source: &Source, host: &str) -> Result<Option<(String, String)>, Error> {
    Ok(match find(source, host)? {
        Credential::Password { username, password } => Some((username, password)),
        _ => None,
    })
}

/// A docker configuration, all of it.
struct Config(Map<String, Value>);

fn read(file: &Path) -> Result<Config, Error> {
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Config(Map::new())),
        Err(error) => return Err(Error::file(file)(error)),
    };
    if text.iter().all(u8::is_ascii_whitespace) {
        return Ok(Config(Map::new()));
    }
    // The parser's own message could quote a secret, so only the place is told.
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(Config(map)),
        Ok(_) => Err(Error::Other(format!(
            "`{}` is not a JSON object; repair or remove it",
            file.display()
        ))),
        Err(error) => Err(Error::Other(format!(
            "`{}` is not valid JSON in line {}; repair or remove it",
            file.display(),
            error.line()
        ))),
    }
}

impl Config {
    /// The helper for this host: its own, else the one for all.
    fn helper(&self, host: &str) -> Option<String> {
        let own = self
            .0
            .get("credHelpers")
            .and_then(Value::as_object)
            .and_then(|all| all.iter().find(|(name, _)| same_host(name, host)))
            .map(|(_, helper)| helper);
        own.or_else(|| self.0.get("credsStore"))
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
    }

    /// The login in the file itself.
    fn find(&self, host: &str) -> Result<Credential, Error> {
        let Some(entry) = self
            .0
            .get("auths")
            .and_then(Value::as_object)
            .and_then(|all| {
                all.get(host).or_else(|| {
                    all.iter()
                        .find(|(name, _)| same_host(name, host))
                        .map(|(_, e)| e)
                })
            })
        else {
            return Ok(Credential::None);
        };
        let text = |name: &str| {
            entry
                .get(name)
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty())
        };
        if let Some(token) = text("registrytoken") {
            return Ok(Credential::Token(token.to_owned()));
        }
        if let Some(token) = text("identitytoken") {
            return Ok(Credential::Identity(token.to_owned()));
        }
        if let Some(auth) = text("auth") {
            return decode(auth).ok_or_else(|| {
                Error::Other(format!(
                    "the stored login for `{host}` is not base64 of `user:password`; log in again"
                ))
            });
        }
        Ok(match (text("username"), text("password")) {
            (Some(username), Some(password)) => Credential::Password {
                username: username.to_owned(),
                password: password.to_owned(),
            },
            _ => Credential::None,
        })
    }

    /// Takes the login for a host out of the file, under whatever name it stands.
    fn remove(&mut self, host: &str) -> bool {
        let Some(all) = self.0.get_mut("auths").and_then(Value::as_object_mut) else {
            return false;
        };
        let before = all.len();
        all.retain(|name, _| !same_host(name, host));
        all.len() != before
    }

    fn table(&mut self, name: &str) -> &mut Map<String, Value> {
        let slot = self
            .0
            .entry(name)
            .or_insert_with(|| Value::Object(Map::new()));
        if !slot.is_object() {
            *slot = Value::Object(Map::new());
        }
        // Invariant: made an object just above.
        match slot {
            Value::Object(map) => map,
            _ => unreachable!("made an object just above"),
        }
    }

    /// Replaces the file as a whole: temporary file of mode 0600, fsync, rename, directory fsync.
    /// A file that is a link stays one.
    fn write(&self, file: &Path) -> Result<(), Error> {
        let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
        let directory = file
            .parent()
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
            .to_owned();
        fs::create_dir_all(&directory).map_err(Error::file(&directory))?;
        let mut text = serde_json::to_vec_pretty(&self.0)
            .map_err(|error| Error::Other(format!("the logins cannot be written: {error}")))?;
        text.push(b'\n');
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let random = getrandom::u64().unwrap_or_default();
        let temporary = directory.join(format!(".{name}.{random:016x}"));
        let written = (|| {
            let mut out = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&temporary)?;
            out.set_permissions(fs::Permissions::from_mode(0o600))?;
            out.write_all(&text)?;
            out.sync_all()?;
            fs::rename(&temporary, &file)?;
            fs::File::open(&directory)?.sync_all()
        })();
        written.map_err(|error| {
            // Best effort: what failed is told, not that its rest stayed.
            let _ = fs::remove_file(&temporary);
            Error::file(&file)(error)
        })
    }
}

fn decode(auth: &str) -> Option<Credential> {
    let text = String::from_utf8(BASE64.decode(auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    // Docker once padded with NUL.
    let password = password.trim_end_matches('\0');
    Some(Credential::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

fn default_file() -> Result<PathBuf, Error> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(directory) = set("DOCKER_CONFIG") {
        return Ok(PathBuf::from(directory).join("config.json"));
    }
    set("HOME")
        .map(|home| PathBuf::from(home).join(".docker/config.json"))
        .ok_or_else(|| {
            Error::Other(
                "neither `DOCKER_CONFIG` nor `HOME` is set, so there is no place for logins"
                    .to_owned(),
            )
        })
}

/// The name under which docker keeps the login for a host.
fn key_of(host: &str) -> String {
    if is_docker_hub(host) {
        "https://index.docker.io/v1/".to_owned()
    } else {
        host.to_owned()
    }
}

/// Tells whether two names, as they stand in files (`https://host/v2/`, `host`), mean one registry.
fn same_host(a: &str, b: &str) -> bool {
    fn bare(name: &str) -> &str {
        let name = name
            .strip_prefix("https://")
            .or_else(|| name.strip_prefix("http://"))
            .unwrap_or(name);
        // An entry with a longer path is for that path alone (podman's form) and is not ours.
        let name = ["/v1", "/v2"]
            .iter()
            .find_map(|api| name.trim_end_matches('/').strip_suffix(api))
            .unwrap_or(name);
        name.trim_end_matches('/')
    }
    let (a, b) = (bare(a), bare(b));
    a == b || (is_docker_hub(a) && is_docker_hub(b))
}

#[cfg(test)]
mod tests;
