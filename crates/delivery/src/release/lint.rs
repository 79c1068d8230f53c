//! Checks a directory before it becomes a release, without the network and without Docker.
//!
//! `include`, `extends`, `.env`, `env_file` and the files of configs and secrets are followed as
//! Compose follows them. Every finding names file and line and says what to do. What comes out
//! besides findings is all that packing needs: the tree, the name, open variables and images.

use std::path::Path;

use oci::Reference;

use super::tree::{Kind, Tree};
use super::{EngineKind, Finding, PackOptions, ReleaseError, Severity, Variable, finding};

mod compose;
mod credential;

/// What is known of a directory after lint.
#[derive(Debug)]
pub(super) struct Analysis {
    pub(super) tree: Tree,
    /// Sorted by file and line.
    pub(super) findings: Vec<Finding>,
    pub(super) name: String,
    pub(super) engine: EngineKind,
    pub(super) entry: Vec<String>,
    pub(super) variables: Vec<Variable>,
    pub(super) images: Vec<ServiceImage>,
}

/// An image that a service names.
#[derive(Clone, Debug)]
pub(super) struct ServiceImage {
    pub(super) service: String,
    /// As the definition names it, variables filled in.
    pub(super) text: String,
    pub(super) reference: Reference,
    pub(super) file: String,
    pub(super) line: usize,
}

/// Reads and checks a directory.
pub(super) fn analyse(directory: &Path, options: &PackOptions) -> Result<Analysis, ReleaseError> {
    let mut findings = Vec::new();
    let tree = Tree::walk(directory, &mut findings)?;
    let mut entry = entry_files(&tree, options, &mut findings);
    let engine = options.engine.unwrap_or(if entry.is_empty() {
        EngineKind::Files
    } else {
        EngineKind::Compose
    });
    if engine == EngineKind::Files {
        if let (Some(_), Some(first)) = (options.engine, options.entry.first()) {
            findings.push(finding(
                Severity::Error,
                first,
                0,
                "the engine `files` has no entry files",
                "leave out `--entry`, or choose the engine `compose`",
            ));
        }
        entry.clear();
    } else if entry.is_empty() {
        findings.push(finding(
            Severity::Error,
            ".",
            0,
            "there is no Compose file",
            "add `compose.yaml`, name one with `--entry`, or choose the engine `files`",
        ));
    }
    let is_file = |kind: &Kind| matches!(kind, Kind::File { .. });
    if !tree.entries.values().any(is_file) {
        findings.push(finding(
            Severity::Error,
            ".",
            0,
            "there is nothing to release, the directory has no files",
            "name the directory that holds the definition files",
        ));
    }
    credentials(&tree, &mut findings)?;
    let project = if entry.is_empty() {
        compose::Project::default()
    } else {
        compose::load(&tree, &entry, &mut findings)?
    };
    let name = name(directory, options, project.name, &mut findings);
    findings.sort_by(|a, b| {
        (&a.file, a.line, a.severity as u8, &a.message).cmp(&(
            &b.file,
            b.line,
            b.severity as u8,
            &b.message,
        ))
    });
    findings.dedup();
    Ok(Analysis {
        tree,
        findings,
        name,
        engine,
        entry,
        variables: project.variables,
        images: project.images,
    })
}

/// The files to start from: those that were asked for, else those that Compose itself tries.
fn entry_files(tree: &Tree, options: &PackOptions, findings: &mut Vec<Finding>) -> Vec<String> {
    if !options.entry.is_empty() {
        let mut entry = Vec::new();
        for given in &options.entry {
            match super::tree::normal("", given).filter(|name| !name.is_empty()) {
                None => findings.push(finding(
                    Severity::Error,
                    given,
                    0,
                    "the entry file lies outside the release",
                    "name it relative to the release directory, without `..`",
                )),
                Some(name) if tree.is_file(&name) => entry.push(name),
                Some(name) => {
                    let what = if tree.has(&name) {
                        "the entry file is a directory"
                    } else {
                        "the entry file is missing"
                    };
                    findings.push(finding(
                        Severity::Error,
                        &name,
                        0,
                        what,
                        "create it, or name another one with `--entry`; `.longshoreignore` may hide it",
                    ));
                }
            }
        }
        return entry;
    }
    let Some(first) = COMPOSE_FILES.iter().find(|name| tree.is_file(name)) else {
        return Vec::new();
    };
    let mut entry = vec![(*first).to_owned()];
    if let Some(second) = COMPOSE_OVERRIDES.iter().find(|name| tree.is_file(name)) {
        findings.push(finding(
            Severity::Warning,
            second,
            0,
            "it is merged into the release, as Compose does",
            &format!("if it is meant for development only, leave it out with `--entry {first}`"),
        ));
        entry.push((*second).to_owned());
    }
    entry
}

fn credentials(tree: &Tree, findings: &mut Vec<Finding>) -> Result<(), ReleaseError> {
    for (name, kind) in &tree.entries {
        let Kind::File { size, .. } = kind else {
            continue;
        };
        if *size > MAX_SCAN {
            findings.push(finding(
                Severity::Warning,
                name,
                0,
                "it is larger than 16 MiB and was not searched for credentials",
                "put large data into an image or a volume",
            ));
            continue;
        }
        for (line, what) in credential::scan(&tree.read(name, MAX_SCAN)?) {
            findings.push(finding(
                Severity::Error,
                name,
                line,
                &format!("it holds {what}"),
                "take it out and revoke it where it was published; secrets are given by the target, as \
                 variables or files below `${LONGSHORE_DATA}`",
            ));
        }
    }
    Ok(())
}

/// `--name`, else Compose's `name:`, else the directory's name.
fn name(
    directory: &Path,
    options: &PackOptions,
    compose: Option<String>,
    findings: &mut Vec<Finding>,
) -> String {
    let name = options.name.clone().or(compose).unwrap_or_else(|| {
        directory
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_default()
    });
    if !super::is_name(&name) {
        findings.push(finding(
            Severity::Error,
            ".",
            0,
            &format!("`{name}` is not a release name"),
            "name it with `--name`: lower-case letters, digits, `_` and `-`, beginning with a letter or \
             digit, at most 128",
        ));
    }
    name
}

/// The files that Compose itself tries, in its order.
pub(super) const COMPOSE_FILES: [&str; 4] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yml",
    "docker-compose.yaml",
];
const COMPOSE_OVERRIDES: [&str; 4] = [
    "compose.override.yml",
    "compose.override.yaml",
    "docker-compose.override.yml",
    "docker-compose.override.yaml",
];
const MAX_SCAN: u64 = 16 << 20;

#[cfg(test)]
mod tests;
