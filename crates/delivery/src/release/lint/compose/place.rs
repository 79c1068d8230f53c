//! Where a path of a definition leads.

use super::super::super::tree::normal;
use super::Environment;

/// Where a path leads.
pub(super) enum Target {
    /// Into the release; the empty path is its root.
    Tree(String),
    /// Below `${LONGSHORE_DATA}`.
    Data,
    /// To an absolute path of the host.
    Host(String),
    /// Out of the release, by `..`.
    Escapes,
    /// To somebody's home.
    Home,
    /// It depends on variables that the target fills.
    Open(String),
    /// Not a template, which was reported.
    Invalid,
}

pub(super) fn lookup(environment: &Environment, name: &str) -> Option<String> {
    if name == DATA {
        return Some(DATA_PLACE.to_owned());
    }
    environment.get(name).cloned()
}

pub(super) fn target(base: &str, text: &str, open: Option<&String>) -> Target {
    if let Some(rest) = text.strip_prefix(DATA_PLACE) {
        // `${LONGSHORE_DATA}/../x` is not below it.
        return match normal("", rest.trim_start_matches('/')) {
            Some(_) if rest.is_empty() || rest.starts_with('/') => Target::Data,
            _ => Target::Escapes,
        };
    }
    if let Some(variable) = open {
        return Target::Open(variable.clone());
    }
    if text.starts_with('/') {
        return Target::Host(text.to_owned());
    }
    if text.starts_with('~') {
        return Target::Home;
    }
    normal(base, text).map_or(Target::Escapes, Target::Tree)
}

/// What Compose would fetch from somewhere else.
pub(super) fn is_remote(text: &str) -> bool {
    text.contains("://")
        || text.starts_with("oci:")
        || text.starts_with("git@")
        || text.starts_with("github.com/")
        || text.contains(".git#")
        || text.strip_suffix(".git").is_some()
}

pub(super) fn is_engine_socket(path: &str) -> bool {
    ["docker.sock", "podman.sock", "containerd.sock", "crio.sock"]
        .iter()
        .any(|socket| path.trim_end_matches('/').ends_with(socket))
}

/// Persistent data of a target, known to every definition.
pub(super) const DATA: &str = "LONGSHORE_DATA";
/// Stands for its value. No path of a file begins so.
pub(super) const DATA_PLACE: &str = "\u{1}data";
/// Stands for a variable without a value.
pub(super) const OPEN: &str = "\u{2}";
