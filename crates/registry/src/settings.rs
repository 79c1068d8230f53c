//! What the server is told: addresses, certificates, limits and who may do what.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci::Glob;
use serde::Deserialize;

use crate::redirect::Redirect;

/// Settings of a [`crate::Server`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// Addresses to listen on; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
    /// Certificate and key; `None` serves plain HTTP.
    pub tls: Option<TlsFiles>,
    /// The URL that clients reach this server by, such as `https://registry.example.com`. It sets the
    /// realm of the token service; without it the realm follows the `Host` of the request.
    pub public_url: Option<String>,
    /// Bounds on what one client may take.
    pub limits: Limits,
    /// Who may do what.
    pub access: Access,
    /// How long open requests may go on after the shutdown signal before they are cut.
    pub drain: Duration,
    /// Write one log line per request.
    pub access_log: bool,
    /// Pulls that are sent to the object store, where blobs are in one.
    pub redirect: Option<Redirect>,
    /// How many of the largest repositories `/metrics` names, at most 1000. Each is a time series of its own.
    pub metric_repositories: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 5050))],
            tls: None,
            public_url: None,
            limits: Limits::default(),
            access: Access::Open,
            drain: Duration::from_secs(30),
            access_log: true,
            redirect: None,
            metric_repositories: 0,
        }
    }
}

/// The files of a TLS listener. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate chain in PEM, the server's own first.
    pub certificate: PathBuf,
    /// The private key in PEM.
    pub key: PathBuf,
}

/// Bounds on what one client may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once, over all listeners. Further ones wait in the kernel's queue.
    pub connections: usize,
    /// How long a client may take for a TLS handshake or for the head of a request.
    pub header_timeout: Duration,
    /// How long a client may send nothing of a body it announced. What has arrived of an upload is
    /// then recorded.
    pub body_timeout: Duration,
    /// How long a client may read nothing of an answer before the connection is cut.
    pub write_timeout: Duration,
    /// The longest manifest in bytes; a longer one gets 413.
    pub manifest_bytes: usize,
    /// How many `tag` parameters one manifest may carry; more get 414.
    pub tag_parameters: usize,
    /// Entries of a page when the client names no number.
    pub page: usize,
    /// The most entries of a page that a client may ask for.
    pub page_max: usize,
    /// How long a verified login is remembered.
    pub login_cache: Duration,
    /// Password checks that run at once. Further ones wait, and beyond a bound get 429.
    pub logins: usize,
    /// Failed logins per minute, user and address before more are refused unchecked with 429.
    pub failed_logins: u32,
    /// How long a token lives, at least 60 s.
    pub token_lifetime: Duration,
    /// The time between two heartbeats of an event stream.
    pub heartbeat: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_mins(1),
            manifest_bytes: 4 * 1024 * 1024,
            tag_parameters: 32,
            page: 1000,
            page_max: 10_000,
            login_cache: Duration::from_mins(5),
            logins: 2,
            failed_logins: 20,
            token_lifetime: Duration::from_mins(5),
            heartbeat: Duration::from_secs(15),
        }
    }
}

/// Who may do what.
#[derive(Clone, Debug)]
pub enum Access {
    /// Everyone on this machine may read and write. Only loopback addresses may be listened on, and a
    /// request whose `Host` is not loopback is refused, so that no web page can reach the server by
    /// a name of its own (DNS rebinding).
    Open,
    /// Users of a htpasswd file, each with what the rules give. Nothing is allowed by default.
    /// Build it with [`Access::users`].
    Users {
        /// The htpasswd file (bcrypt or argon2), read again when it changes.
        htpasswd: PathBuf,
        /// What is allowed; rights add up over all rules.
        rules: Vec<Rule>,
    },
}

impl Access {
    /// Access for users, with rules that were checked.
    ///
    /// # Errors
    /// [`AccessError`] when a rule names nobody, nothing, an unusable principal, or gives
    /// `anonymous` more than `pull`.
    pub fn users(htpasswd: &Path, rules: Vec<Rule>) -> Result<Self, AccessError> {
        let access = Self::Users {
            htpasswd: htpasswd.to_owned(),
            rules,
        };
        access.check()?;
        Ok(access)
    }

    /// What [`Access::users`] checks, for values that were made otherwise.
    pub(crate) fn check(&self) -> Result<(), AccessError> {
        let Self::Users { rules, .. } = self else {
            return Ok(());
        };
        for (index, rule) in rules.iter().enumerate() {
            rule.check().map_err(|problem| AccessError {
                rule: index + 1,
                problem,
            })?;
        }
        Ok(())
    }
}

/// One grant: these principals may do these actions on these repositories.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// User names, `*` for every user that logged in, or `anonymous` for everybody, also without
    /// credentials (which may only `pull`).
    pub principals: Vec<String>,
    /// Repositories: `*` stands for any text within one path component, `**` for any text, `?` for
    /// one character.
    pub repositories: Vec<Glob>,
    /// Tags that `tag-create`, `tag-overwrite` and `delete` are given for. Left out, all of them.
    /// Deleting a whole manifest by digest needs a rule for all tags.
    #[serde(default)]
    pub tags: Vec<Glob>,
    /// What is allowed.
    pub actions: Vec<Action>,
}

impl Rule {
    fn check(&self) -> Result<(), String> {
        if self.principals.is_empty() {
            return Err("`principals` is empty, name a user, `*` or `anonymous`".to_owned());
        }
        if self.repositories.is_empty() {
            return Err("`repositories` is empty, name a pattern such as `**`".to_owned());
        }
        if self.actions.is_empty() {
            return Err(format!(
                "`actions` is empty, use some of {}",
                Action::NAMES.join(", ")
            ));
        }
        for principal in &self.principals {
            if principal.is_empty() || principal.contains(':') {
                return Err(format!(
                    "`{principal}` is not a principal, use a user name of the htpasswd file, `*` or \
                     `anonymous`"
                ));
            }
            if principal == ANONYMOUS && self.actions.iter().any(|a| *a != Action::Pull) {
                return Err("`anonymous` may only be given `pull`".to_owned());
            }
        }
        Ok(())
    }
}

/// A rule of [`Access::users`] that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("access rule {rule}: {problem}")]
pub struct AccessError {
    /// The number of the rule, counted from 1.
    pub rule: usize,
    /// What is wrong and what to write instead.
    pub problem: String,
}

/// Something that may be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Read blobs, manifests, tags, referrers, history and events.
    Pull,
    /// Upload blobs and manifests; no tag is set by it.
    Push,
    /// Set a tag that does not exist.
    TagCreate,
    /// Move a tag that exists. Who lacks it sees immutable tags.
    TagOverwrite,
    /// Delete tags, manifests and blobs.
    Delete,
    /// Operate the registry: collection, retention, quotas, pins of others, read-only mode.
    Admin,
}

impl Action {
    const NAMES: [&'static str; 6] = [
        "pull",
        "push",
        "tag-create",
        "tag-overwrite",
        "delete",
        "admin",
    ];

    /// The name in rules and messages.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The principal without credentials.
pub(crate) const ANONYMOUS: &str = "anonymous";

#[cfg(test)]
mod tests;
