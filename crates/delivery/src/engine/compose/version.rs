//! Which versions of the Compose plugin are used, and how they say their version.

use std::fmt;

use serde::Deserialize;

/// A version of the plugin. Major versions jump from 2 to 5, so nothing may ask for "major 2".
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// A numbered release, with what follows the numbers left out.
    Release {
        /// First number.
        major: u64,
        /// Second number.
        minor: u64,
        /// Third number.
        patch: u64,
    },
    /// Built without a number (`dev`), as from a source tree.
    Development(String),
}

impl Version {
    /// Reads the answer of `version --format json`.
    pub(super) fn from_json(output: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Answer {
            version: String,
        }
        let answer: Answer = serde_json::from_slice(output).ok()?;
        Some(Self::parse(&answer.version))
    }

    /// Reads a version as people write it: `2.26.1-4`, `v5.0.2`, `1.29.2`, `dev`.
    pub(super) fn parse(text: &str) -> Self {
        let text = text.trim();
        let numbers = text.strip_prefix('v').unwrap_or(text);
        let end = numbers
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(numbers.len());
        let mut parts = numbers[..end].split('.').map(str::parse::<u64>);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => {
                let patch = parts.next().and_then(Result::ok).unwrap_or(0);
                Self::Release {
                    major,
                    minor,
                    patch,
                }
            }
            _ => Self::Development(text.chars().take(64).collect()),
        }
    }

    /// Tells why this version cannot be used, if so.
    pub(super) fn refusal(&self) -> Option<String> {
        let Self::Release {
            major,
            minor,
            patch,
        } = *self
        else {
            return None;
        };
        if major < 2 {
            return Some(format!(
                "Docker Compose {self} is too old: it names and hashes containers in its own way; install the Compose plugin, 2.8 or later ({INSTALL})"
            ));
        }
        if (major, minor) < (2, 8) {
            return Some(format!(
                "Docker Compose {self} is too old: install 2.8 or later ({INSTALL})"
            ));
        }
        if (major, minor, patch) == (2, 30, 0) {
            return Some(format!(
                "Docker Compose {self} cannot read a definition from standard input: install 2.30.1 or later ({INSTALL})"
            ));
        }
        None
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Release {
                major,
                minor,
                patch,
            } => write!(f, "{major}.{minor}.{patch}"),
            Self::Development(text) => write!(f, "{text}"),
        }
    }
}

/// Where the plugin comes from.
pub(super) const INSTALL: &str =
    "package `docker-compose-plugin` of Docker, or `docker-compose` of Debian 13 and later";

#[cfg(test)]
mod tests;
