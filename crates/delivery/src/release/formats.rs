//! Artifacts of other tools, mapped onto [`ReleaseConfig`]. Their images are not pinned.

use std::collections::BTreeMap;

use oci::Manifest;

use super::interpolate::Template;
use super::layers::{Item, Layers};
use super::lint::COMPOSE_FILES;
use super::tree::{join, normal};
use super::yaml::{self, Node};
use super::{EngineKind, ReleaseConfig, ReleaseError, SCHEMA_VERSION, Variable, dotenv, is_name};

/// Reads further files out of the artifact.
pub(super) type More<'a> =
    dyn FnMut(&[String]) -> Result<BTreeMap<String, Vec<u8>>, ReleaseError> + 'a;

/// Our own format.
pub(super) const LONGSHORE: &str = "longshore";
/// doco-cd's `doco.v1`.
pub(super) const DOCO: &str = "doco";
/// Flux.
pub(super) const FLUX: &str = "flux";
/// Compose's `oci://`.
pub(super) const COMPOSE_OCI: &str = "compose-oci";
/// Any other layers that are archives or files: ORAS, `docker build`.
pub(super) const TAR: &str = "tar";

/// Tells the format by media types. doco-cd has none of its own: it is a [`TAR`] with a certain file.
pub(super) fn detect(manifest: &Manifest) -> &'static str {
    let config = manifest
        .config
        .as_ref()
        .map_or("", |config| config.media_type.as_str());
    let artifact = manifest.artifact_type.as_deref().unwrap_or_default();
    let has_layer = |part: &str| {
        manifest
            .layers
            .iter()
            .flatten()
            .any(|layer| layer.media_type.starts_with(part))
    };
    if artifact == oci::media_type::RELEASE || config == oci::media_type::RELEASE_CONFIG {
        LONGSHORE
    } else if artifact == COMPOSE_PROJECT || config == COMPOSE_EMPTY || has_layer(COMPOSE_FILE) {
        COMPOSE_OCI
    } else if config.starts_with(FLUX_PREFIX) || has_layer(FLUX_PREFIX) {
        FLUX
    } else {
        TAR
    }
}

/// Whether a file says something about the release as a whole, so that it is read before extraction.
pub(super) fn is_telling(name: &str) -> bool {
    let base = name.rsplit('/').next().unwrap_or(name);
    DOCO_FILES.contains(&name) || COMPOSE_FILES.contains(&base)
}

/// The configuration of a foreign artifact and the format that it turned out to be. `more` reads
/// further files.
pub(super) fn configuration(
    format: &'static str,
    layers: &Layers,
    expected: Option<&str>,
    more: &mut More<'_>,
) -> Result<(ReleaseConfig, &'static str), ReleaseError> {
    if layers.items.is_empty() {
        return Err(ReleaseError::Rejected(
            "the artifact holds no files, so it is no release".to_owned(),
        ));
    }
    if format == TAR
        && let Some(file) = DOCO_FILES.iter().find(|file| is_file(layers, file))
    {
        return Ok((doco(file, layers, expected, more)?, DOCO));
    }
    let entry: Vec<String> = entry(layers).into_iter().collect();
    let name = entry
        .first()
        .and_then(|file| layers.captured.get(file))
        .and_then(|content| compose_name(content));
    let config = ReleaseConfig {
        schema_version: SCHEMA_VERSION,
        name: name.unwrap_or_default(),
        version: None,
        engine: if entry.is_empty() {
            EngineKind::Files
        } else {
            EngineKind::Compose
        },
        entry,
        variables: Vec::new(),
        images: Vec::new(),
    };
    Ok((config, format))
}

fn is_file(layers: &Layers, name: &str) -> bool {
    matches!(
        layers.items.get(name),
        Some(Item::Entry { .. } | Item::Blobs(_))
    )
}

/// The Compose file at the root, else in the one directory that holds everything: `oras push REF DIR`
/// packs the directory itself.
fn entry(layers: &Layers) -> Option<String> {
    let find = |directory: &str| {
        COMPOSE_FILES
            .iter()
            .map(|name| join(directory, name))
            .find(|name| is_file(layers, name))
    };
    find("").or_else(|| {
        let mut tops = layers.items.keys().filter(|name| !name.contains('/'));
        match (tops.next(), tops.next()) {
            (Some(top), None) => find(top),
            _ => None,
        }
    })
}

/// The `name:` of a Compose file, where it is fixed.
fn compose_name(content: &[u8]) -> Option<String> {
    let documents = yaml::parse(std::str::from_utf8(content).ok()?).ok()?;
    documents
        .iter()
        .rev()
        .find_map(|document| document.get("name")?.text())
        .filter(|name| is_name(name))
        .map(str::to_owned)
}

/// Reads `.doco-cd.yaml`. Unknown keys are ignored there by its own tool; keys that would fetch
/// something unverified or remove something are refused here.
fn doco(
    file: &str,
    layers: &Layers,
    expected: Option<&str>,
    more: &mut More<'_>,
) -> Result<ReleaseConfig, ReleaseError> {
    let rejected = |message: String| ReleaseError::Rejected(format!("`{file}`: {message}"));
    let text = layers
        .captured
        .get(file)
        .and_then(|content| std::str::from_utf8(content).ok())
        .ok_or_else(|| rejected("it is not UTF-8 or larger than 1 MiB".to_owned()))?;
    let documents = yaml::parse(text)
        .map_err(|error| rejected(format!("line {}: {}", error.line, error.message)))?;
    let version = documents
        .iter()
        .find_map(|document| document.get("version")?.text())
        .filter(|version| !version.is_empty())
        .unwrap_or(DOCO_VERSION);
    if version != DOCO_VERSION {
        return Err(rejected(format!(
            "version `{version}` is not supported, only `{DOCO_VERSION}`"
        )));
    }
    let deployments: Vec<(&str, &Node)> = documents
        .iter()
        .filter_map(|document| Some((document.get("name")?.text()?, document)))
        .collect();
    let names = || {
        deployments
            .iter()
            .map(|(name, _)| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (name, node) = match expected {
        Some(expected) if deployments.len() > 1 => deployments
            .iter()
            .find(|(name, _)| *name == expected)
            .ok_or_else(|| {
                rejected(format!(
                    "there is no deployment `{expected}`, only {}; set the target's `release` to one of them",
                    names()
                ))
            })?,
        _ => deployments
            .first()
            .ok_or_else(|| rejected("`name` is missing".to_owned()))?,
    };
    if !is_name(name) {
        return Err(rejected(format!(
            "`{name}` is not a release name: use lower-case letters, digits, `_` and `-`"
        )));
    }
    for (key, why) in [
        (
            "repository_url",
            "it would fetch from somewhere that is not verified",
        ),
        (
            "external_secrets",
            "give the values as the target's `variables`",
        ),
    ] {
        if node
            .get(key)
            .is_some_and(|value| value.text().is_none_or(|text| !text.is_empty()))
        {
            return Err(rejected(format!("`{key}` is not supported: {why}")));
        }
    }
    for (key, why) in [
        (
            "auto_discovery",
            "name each deployment in a document of its own",
        ),
        (
            "destroy",
            "take the target out of the agent's configuration instead",
        ),
    ] {
        if let Some(value) = node.get(key)
            && value.get("enabled").unwrap_or(value).is_true()
        {
            return Err(rejected(format!("`{key}` is not supported: {why}")));
        }
    }
    let inside = |base: &str, path: &str, what: &str| {
        normal(base, path)
            .ok_or_else(|| rejected(format!("`{what}` names `{path}`, which leaves the release")))
    };
    let directory = node.get("working_dir").and_then(Node::text).unwrap_or(".");
    let directory = inside("", directory, "working_dir")?;

    let mut entry = Vec::new();
    match node.get("compose_files") {
        None => entry.extend(
            DOCO_COMPOSE_FILES
                .iter()
                .map(|name| join(&directory, name))
                .filter(|name| is_file(layers, name)),
        ),
        Some(list) => {
            for path in list.one_or_many().into_iter().filter_map(Node::text) {
                let name = inside(&directory, path, "compose_files")?;
                if is_file(layers, &name) {
                    entry.push(name);
                }
            }
        }
    }
    if entry.is_empty() {
        return Err(rejected(
            "none of its `compose_files` is in the artifact".to_owned(),
        ));
    }

    let mut env_files = Vec::new();
    match node.get("env_files") {
        None => env_files.extend(
            [join(&directory, ".env")]
                .into_iter()
                .filter(|name| is_file(layers, name)),
        ),
        Some(list) => {
            for path in list.one_or_many().into_iter().filter_map(Node::text) {
                if path.starts_with("remote:") {
                    return Err(rejected(format!(
                        "`env_files` names `{path}`: it would fetch from somewhere that is not verified"
                    )));
                }
                let name = inside(&directory, path, "env_files")?;
                if is_file(layers, &name) {
                    env_files.push(name);
                } else if path != ".env" {
                    return Err(rejected(format!(
                        "`env_files` names `{path}`, which is not in the artifact"
                    )));
                }
            }
        }
    }
    let mut values = BTreeMap::new();
    let contents = if env_files.is_empty() {
        BTreeMap::new()
    } else {
        more(&env_files)?
    };
    for name in &env_files {
        let content = contents
            .get(name)
            .and_then(|content| std::str::from_utf8(content).ok())
            .ok_or_else(|| rejected(format!("`{name}` is not UTF-8 or larger than 1 MiB")))?;
        let assignments = dotenv::parse(content).map_err(|(line, message)| {
            ReleaseError::Rejected(format!("`{name}`, line {line}: {message}"))
        })?;
        for assignment in assignments {
            let value = if assignment.interpolated {
                Template::parse(&assignment.value)
                    .map_err(|error| {
                        ReleaseError::Rejected(format!(
                            "`{name}`, line {}: {error}",
                            assignment.line
                        ))
                    })?
                    .expand(&|name| values.get(name).cloned(), "")
                    .text
            } else {
                assignment.value
            };
            values.insert(assignment.key, value);
        }
    }
    for variable in node.get("environment").map_or(&[][..], Node::entries) {
        let value = variable.value.text().unwrap_or_default();
        values.insert(variable.key.clone(), value.to_owned());
    }
    let profiles: Vec<&str> = node
        .get("profiles")
        .map(Node::one_or_many)
        .unwrap_or_default()
        .into_iter()
        .filter_map(Node::text)
        .collect();
    if !profiles.is_empty() {
        // Compose reads the profiles from this variable where none are given otherwise.
        values.insert("COMPOSE_PROFILES".to_owned(), profiles.join(","));
    }
    Ok(ReleaseConfig {
        schema_version: SCHEMA_VERSION,
        name: (*name).to_owned(),
        version: None,
        engine: EngineKind::Compose,
        entry,
        variables: values
            .into_iter()
            .map(|(name, value)| Variable {
                name,
                default: Some(value),
                required: false,
            })
            .collect(),
        images: Vec::new(),
    })
}

/// One file of a Compose project.
pub(super) const COMPOSE_FILE: &str = "application/vnd.docker.compose.file+yaml";
/// One environment file of it.
pub(super) const COMPOSE_ENV_FILE: &str = "application/vnd.docker.compose.envfile";
/// The artifact type of a Compose project.
pub(super) const COMPOSE_PROJECT: &str = "application/vnd.docker.compose.project";
const COMPOSE_EMPTY: &str = "application/vnd.docker.compose.config.empty.v1+json";
const DOCO_COMPOSE_FILES: [&str; 4] = [
    "compose.yaml",
    "compose.yml",
    "docker-compose.yml",
    "docker-compose.yaml",
];
const DOCO_FILES: [&str; 2] = [".doco-cd.yaml", ".doco-cd.yml"];
const DOCO_VERSION: &str = "doco.v1";
const FLUX_PREFIX: &str = "application/vnd.cncf.flux.";
