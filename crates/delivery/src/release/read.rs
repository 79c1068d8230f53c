//! Reads an artifact out of a registry, every blob whole and verified, before anything is extracted.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oci::reference::TagOrDigest;
use oci::tar::Limits;
use oci::{Algorithm, Descriptor, Digest, Manifest, Platform, media_type};
use serde::Deserialize;

use super::formats::{self, LONGSHORE};
use super::layers::{Layers, verify};
use super::pack::blocking;
use super::tree::normal;
use super::{EngineKind, FetchedRelease, ReleaseConfig, ReleaseError, SCHEMA_VERSION, is_name};
use crate::engine::BoxFuture;

/// Where an artifact is read from. Every answer is verified against its digest.
pub(super) trait Source: Sync {
    /// A manifest; `None` when there is none.
    fn manifest<'a>(
        &'a self,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Option<(Descriptor, Bytes)>, client::Error>>;
    /// A small blob.
    fn blob<'a>(
        &'a self,
        descriptor: &'a Descriptor,
    ) -> BoxFuture<'a, Result<Bytes, client::Error>>;
    /// A blob into a file.
    fn blob_to_file<'a>(
        &'a self,
        descriptor: &'a Descriptor,
        path: &'a Path,
    ) -> BoxFuture<'a, Result<(), client::Error>>;
}

impl Source for client::Repository {
    fn manifest<'a>(
        &'a self,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Option<(Descriptor, Bytes)>, client::Error>> {
        Box::pin(async move {
            let found = self.manifest(&TagOrDigest::Digest(digest.clone())).await?;
            Ok(found.map(|manifest| (manifest.descriptor, manifest.body)))
        })
    }

    fn blob<'a>(
        &'a self,
        descriptor: &'a Descriptor,
    ) -> BoxFuture<'a, Result<Bytes, client::Error>> {
        Box::pin(self.blob(descriptor, MAX_CONFIG))
    }

    fn blob_to_file<'a>(
        &'a self,
        descriptor: &'a Descriptor,
        path: &'a Path,
    ) -> BoxFuture<'a, Result<(), client::Error>> {
        Box::pin(self.blob_to_file(descriptor, path))
    }
}

/// Fetches. See [`super::fetch`] and [`super::fetch_named`].
pub(super) async fn fetch(
    source: &dyn Source,
    digest: &Digest,
    staging: &Path,
    expected: Option<&str>,
) -> Result<FetchedRelease, ReleaseError> {
    let (root, body) = manifest(source, digest).await?;
    let mut view = parse(&body, &root.media_type)?;
    if view.is_index() {
        let child = choose(&view, &Platform::host())?.clone();
        let (descriptor, body) = manifest(source, &child.digest).await?;
        view = parse(&body, &descriptor.media_type)?;
        if view.is_index() {
            return Err(rejected(
                "the index names another index, name the manifest itself",
            ));
        }
    }
    let format = formats::detect(&view);
    let layers = view.layers.as_deref().unwrap_or_default();
    check_layers(layers)?;
    let ours = if format == LONGSHORE {
        Some(configuration(source, &view).await?)
    } else {
        None
    };
    if let Some(config) = &ours {
        check_name(&config.name, expected)?;
    }

    let mut staged = Vec::new();
    let mut done = HashSet::new();
    for layer in layers {
        let path = staging.join(layer.digest.to_string().replace(':', "-"));
        if done.insert(layer.digest.clone()) {
            let known = {
                let (layer, path) = (layer.clone(), path.clone());
                blocking(move || Ok(path.exists() && verify(&layer, &path).is_ok())).await?
            };
            if !known {
                source.blob_to_file(layer, &path).await?;
            }
        }
        staged.push((layer.clone(), path));
    }

    let (config, format) = if let Some(config) = ours {
        (config, format)
    } else {
        let layers = staged.clone();
        let expected = expected.map(str::to_owned);
        blocking(move || foreign(format, &layers, expected.as_deref())).await?
    };
    Ok(FetchedRelease {
        descriptor: root,
        config,
        format: format.to_owned(),
        layers: staged,
    })
}

async fn manifest(
    source: &dyn Source,
    digest: &Digest,
) -> Result<(Descriptor, Bytes), ReleaseError> {
    source
        .manifest(digest)
        .await?
        .ok_or_else(|| client::Error::NotFound(digest.to_string()).into())
}

fn parse(body: &[u8], content_type: &str) -> Result<Manifest, ReleaseError> {
    Manifest::parse(body, content_type).map_err(|error| ReleaseError::Rejected(error.to_string()))
}

/// The manifest of an index that is for this host. Compose puts its project beside the images.
fn choose<'a>(index: &'a Manifest, host: &Platform) -> Result<&'a Descriptor, ReleaseError> {
    if let Some(project) = index
        .children()
        .find(|child| child.artifact_type.as_deref() == Some(formats::COMPOSE_PROJECT))
    {
        return Ok(project);
    }
    let runs = |child: &&Descriptor| {
        child
            .platform
            .as_ref()
            .is_some_and(|platform| !platform.is_unknown() && platform.runs_on(host))
    };
    if let Some(child) = index.children().find(runs) {
        return Ok(child);
    }
    // Without a platform it is for all of them.
    let mut plain = index.children().filter(|child| {
        child.platform.is_none()
            || child
                .platform
                .as_ref()
                .is_some_and(|platform| platform.os.is_empty())
    });
    if let (Some(child), None) = (plain.next(), plain.next()) {
        return Ok(child);
    }
    let existing: Vec<String> = index
        .children()
        .filter_map(|child| child.platform.as_ref())
        .filter(|platform| !platform.is_unknown())
        .map(|platform| format!("`{platform}`"))
        .collect();
    let existing = if existing.is_empty() {
        "none".to_owned()
    } else {
        existing.join(", ")
    };
    Err(ReleaseError::Rejected(format!(
        "the index has no manifest for `{host}`, it has {existing}"
    )))
}

fn check_layers(layers: &[Descriptor]) -> Result<(), ReleaseError> {
    if layers.is_empty() {
        return Err(rejected("the artifact has no layers, so it is no release"));
    }
    if layers.len() > MAX_LAYERS {
        return Err(rejected("the artifact has more than 128 layers"));
    }
    let limit = Limits::default().total_bytes;
    let total = layers
        .iter()
        .fold(0_u64, |total, layer| total.saturating_add(layer.size));
    if total > limit {
        return Err(ReleaseError::Rejected(format!(
            "the layers have {total} bytes, more than the limit of {limit}"
        )));
    }
    if layers.iter().any(Descriptor::is_foreign) {
        return Err(rejected(
            "a layer lies outside the registry, push it with its content",
        ));
    }
    Ok(())
}

/// The configuration of a release of ours.
async fn configuration(
    source: &dyn Source,
    view: &Manifest,
) -> Result<ReleaseConfig, ReleaseError> {
    let config = view
        .config
        .as_ref()
        .filter(|config| config.media_type == media_type::RELEASE_CONFIG)
        .ok_or_else(|| {
            ReleaseError::Rejected(format!(
                "the release has no configuration of type `{}`",
                media_type::RELEASE_CONFIG
            ))
        })?;
    match view.layers.as_deref() {
        Some([files]) if files.media_type == media_type::RELEASE_FILES => {}
        _ => {
            return Err(ReleaseError::Rejected(format!(
                "the release must have exactly one layer, of type `{}`",
                media_type::RELEASE_FILES
            )));
        }
    }
    if config.size > MAX_CONFIG as u64 {
        return Err(rejected("the release's configuration is larger than 4 MiB"));
    }
    read_configuration(&source.blob(config).await?)
}

fn read_configuration(content: &[u8]) -> Result<ReleaseConfig, ReleaseError> {
    /// Read first: a newer version may differ in everything else.
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        schema_version: u32,
    }
    let malformed = |error: serde_json::Error| {
        ReleaseError::Rejected(format!(
            "the release's configuration cannot be read: {error}"
        ))
    };
    let Version { schema_version } = serde_json::from_slice(content).map_err(malformed)?;
    if schema_version != SCHEMA_VERSION {
        return Err(ReleaseError::Rejected(format!(
            "the release has schema version {schema_version}, this program reads {SCHEMA_VERSION}: update \
             the agent"
        )));
    }
    let config: ReleaseConfig = serde_json::from_slice(content).map_err(malformed)?;
    if !is_name(&config.name) {
        return Err(rejected("the release's name is not `[a-z0-9][a-z0-9_-]*`"));
    }
    for entry in &config.entry {
        if entry.is_empty() || normal("", entry).as_deref() != Some(entry) {
            return Err(ReleaseError::Rejected(format!(
                "the entry file `{}` is not a path in the release",
                entry.escape_debug()
            )));
        }
    }
    if config.engine == EngineKind::Compose && config.entry.is_empty() {
        return Err(rejected("the release names no entry file"));
    }
    if let Some(pin) = config
        .images
        .iter()
        .find(|pin| pin.digest.algorithm() != Algorithm::Sha256)
    {
        return Err(ReleaseError::Rejected(format!(
            "the image of `{}` is pinned by `{}`, only sha256 is supported",
            pin.service, pin.digest
        )));
    }
    Ok(config)
}

fn foreign(
    format: &'static str,
    layers: &[(Descriptor, PathBuf)],
    expected: Option<&str>,
) -> Result<(ReleaseConfig, &'static str), ReleaseError> {
    let limits = Limits::default();
    let read = Layers::read(format, layers, &limits, &formats::is_telling)?;
    let mut more = |names: &[String]| -> Result<BTreeMap<String, Vec<u8>>, ReleaseError> {
        let wanted = |name: &str| names.iter().any(|wanted| wanted == name);
        Ok(Layers::read(format, layers, &limits, &wanted)?.captured)
    };
    let (mut config, format) = formats::configuration(format, &read, expected, &mut more)?;
    if config.name.is_empty() {
        expected.unwrap_or_default().clone_into(&mut config.name);
    }
    check_name(&config.name, expected)?;
    Ok((config, format))
}

fn check_name(name: &str, expected: Option<&str>) -> Result<(), ReleaseError> {
    match expected {
        Some(expected) if expected != name => Err(ReleaseError::Rejected(format!(
            "the release is `{name}`, this target expects `{expected}`; if that is meant, set the target's \
             `release` to `{name}`"
        ))),
        _ => Ok(()),
    }
}

fn rejected(message: &str) -> ReleaseError {
    ReleaseError::Rejected(message.to_owned())
}

const MAX_CONFIG: usize = 4 << 20;
const MAX_LAYERS: usize = 128;

#[cfg(test)]
mod tests;
