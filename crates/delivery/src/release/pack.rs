//! Packs a directory: images pinned, files in one reproducible tar, same input → same digest.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::Path;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Hasher, Manifest, Platform, Reference, media_type};

use super::lint::{Analysis, ServiceImage, analyse};
use super::tree::{Kind, Tree, io};
use super::{
    Finding, ImagePin, PackOptions, PackedRelease, ReleaseConfig, ReleaseError, SCHEMA_VERSION,
    Severity, chain, finding,
};
use crate::engine::BoxFuture;

/// What an image reference stands for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    digest: Digest,
    media_type: String,
    platforms: Vec<Platform>,
}

/// Where images are looked up.
pub(super) trait ImageResolver: Sync {
    /// Resolves a reference; the error is for people, with what to do left out.
    fn resolve<'a>(&'a self, reference: &'a Reference) -> BoxFuture<'a, Result<Image, String>>;
}

impl ImageResolver for client::Client {
    fn resolve<'a>(&'a self, reference: &'a Reference) -> BoxFuture<'a, Result<Image, String>> {
        Box::pin(async move {
            let repository = self.repository(&reference.host, &reference.repository);
            let found = repository
                .manifest(&reference.tag_or_digest())
                .await
                .map_err(|error| chain(&error))?
                .ok_or_else(|| "it was not found".to_owned())?;
            let (mut image, config) = read_image(&found.body, &found.descriptor.media_type)?;
            if let Some(config) = config {
                let content = repository
                    .blob(&config, MAX_IMAGE_CONFIG)
                    .await
                    .map_err(|error| chain(&error))?;
                image.platforms = platform_of(&content).into_iter().collect();
            }
            Ok(image)
        })
    }
}

/// Reads an image's manifest or index. A single manifest says its platform in its configuration,
/// which is still to be fetched.
fn read_image(body: &[u8], content_type: &str) -> Result<(Image, Option<Descriptor>), String> {
    let manifest = Manifest::parse(body, content_type).map_err(|error| error.to_string())?;
    let mut platforms = Vec::new();
    for child in manifest.children() {
        if let Some(platform) = &child.platform
            && !platform.is_unknown()
            && !platforms.contains(platform)
        {
            platforms.push(platform.clone());
        }
    }
    let config = manifest.config.clone().filter(|config| {
        matches!(
            config.media_type.as_str(),
            media_type::OCI_CONFIG | DOCKER_CONFIG
        )
    });
    if !manifest.is_index() && config.is_none() {
        return Err("it is not a container image".to_owned());
    }
    let image = Image {
        // Engines pull by sha256, whatever digest a registry answered with.
        digest: Digest::sha256(body),
        media_type: manifest.media_type,
        platforms,
    };
    Ok((image, config))
}

fn platform_of(config: &[u8]) -> Option<Platform> {
    let platform: Platform = serde_json::from_slice(config).ok()?;
    (!platform.os.is_empty() && !platform.is_unknown()).then_some(platform)
}

/// Lints, resolves, packs.
pub(super) async fn pack(
    directory: &Path,
    options: &PackOptions,
    resolver: &dyn ImageResolver,
) -> Result<PackedRelease, ReleaseError> {
    let mut analysis = {
        let (directory, options) = (directory.to_owned(), options.clone());
        blocking(move || analyse(&directory, &options)).await?
    };
    let has_errors = |findings: &[Finding]| {
        findings
            .iter()
            .any(|finding| finding.severity == Severity::Error)
    };
    if has_errors(&analysis.findings) {
        return Err(ReleaseError::Lint(analysis.findings));
    }
    let images = resolve(&analysis.images, resolver, &mut analysis.findings).await;
    if has_errors(&analysis.findings) {
        return Err(ReleaseError::Lint(analysis.findings));
    }
    let options = options.clone();
    blocking(move || assemble(analysis, images, &options)).await
}

/// Resolves every reference once, a few at a time. The result does not depend on their order.
async fn resolve(
    wanted: &[ServiceImage],
    resolver: &dyn ImageResolver,
    findings: &mut Vec<Finding>,
) -> Vec<ImagePin> {
    let mut unique: BTreeMap<String, Reference> = BTreeMap::new();
    for image in wanted {
        unique.insert(image.reference.to_string(), image.reference.clone());
    }
    let lookups: Vec<_> = unique
        .into_iter()
        .map(|(text, reference)| look_up(resolver, text, reference))
        .collect();
    let resolved: HashMap<String, Result<Image, String>> = stream::iter(lookups)
        .buffer_unordered(PARALLEL)
        .collect()
        .await;
    let mut pins = Vec::new();
    for image in wanted {
        match resolved.get(&image.reference.to_string()) {
            Some(Ok(found)) => pins.push(ImagePin {
                service: image.service.clone(),
                reference: image.text.clone(),
                digest: found.digest.clone(),
                media_type: found.media_type.clone(),
                platforms: found.platforms.clone(),
            }),
            Some(Err(reason)) => findings.push(finding(
                Severity::Error,
                &image.file,
                image.line,
                &format!(
                    "the image `{}` of `{}` cannot be resolved: {reason}",
                    image.text, image.service
                ),
                "push the image first, mend its name, or log in with `longshore login`",
            )),
            // Every wanted reference was asked for.
            None => {}
        }
    }
    pins
}

async fn look_up(
    resolver: &dyn ImageResolver,
    text: String,
    reference: Reference,
) -> (String, Result<Image, String>) {
    let result = resolver.resolve(&reference).await;
    (text, result)
}

fn assemble(
    analysis: Analysis,
    images: Vec<ImagePin>,
    options: &PackOptions,
) -> Result<PackedRelease, ReleaseError> {
    let config = ReleaseConfig {
        schema_version: SCHEMA_VERSION,
        name: analysis.name,
        version: options.version.clone(),
        engine: analysis.engine,
        entry: analysis.entry,
        variables: analysis.variables,
        images,
    };
    let config_bytes = serde_json::to_vec(&config).map_err(|error| {
        ReleaseError::Rejected(format!("the configuration cannot be written: {error}"))
    })?;
    let (files, files_descriptor) = archive(&analysis.tree)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some(media_type::RELEASE.to_owned()),
        config: Some(Descriptor::of(media_type::RELEASE_CONFIG, &config_bytes)),
        layers: Some(vec![files_descriptor.clone()]),
        manifests: None,
        subject: None,
        annotations: options.annotations.clone(),
    }
    .to_bytes();
    let mut descriptor = Descriptor::of(media_type::OCI_MANIFEST, &manifest);
    descriptor.artifact_type = Some(media_type::RELEASE.to_owned());
    Ok(PackedRelease {
        config,
        config_bytes,
        files,
        files_descriptor,
        manifest,
        descriptor,
        findings: analysis.findings,
    })
}

/// Writes the tar, names ascending bytewise. No time, no owner, no more of a mode than whether the
/// owner may execute.
fn archive(tree: &Tree) -> Result<(tempfile::NamedTempFile, Descriptor), ReleaseError> {
    let directory = std::env::temp_dir();
    let mut output =
        tempfile::NamedTempFile::new().map_err(io("make a temporary file in", &directory))?;
    let mut writer = oci::tar::Writer::new(BufWriter::new(output.as_file_mut()));
    for (name, kind) in &tree.entries {
        let result = match kind {
            Kind::Directory => writer.directory(name),
            Kind::File { size, executable } => {
                let mut content = tree.open(name)?;
                writer.file(name, *executable, *size, &mut content)
            }
        };
        result.map_err(|error| tar_error(error, &tree.path(name)))?;
    }
    writer
        .finish()
        .map_err(|error| tar_error(error, &directory))?
        .flush()
        .map_err(io("write", &directory))?;
    let path = output.path().to_owned();
    output.rewind().map_err(io("read", &path))?;
    let (digest, size) = hash(output.as_file_mut()).map_err(io("read", &path))?;
    Ok((
        output,
        Descriptor::new(media_type::RELEASE_FILES, digest, size),
    ))
}

fn hash(file: &mut fs::File) -> std::io::Result<(Digest, u64)> {
    let mut hasher = Hasher::new(oci::Algorithm::Sha256);
    let mut size = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => return Ok((hasher.finish(), size)),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
}

fn tar_error(error: oci::tar::TarError, path: &Path) -> ReleaseError {
    match error {
        oci::tar::TarError::Read(source) => io("read", path)(source),
        oci::tar::TarError::Write(source) => io("write the archive with", path)(source),
        oci::tar::TarError::Size { .. } => io("pack", path)(std::io::Error::other(
            "it changed while it was packed, try again",
        )),
        other => ReleaseError::Rejected(chain(&other)),
    }
}

/// Pushes blobs first, the manifest last.
pub(super) async fn push(
    release: &PackedRelease,
    client: &client::Client,
    reference: &Reference,
) -> Result<(), ReleaseError> {
    let repository = client.repository(&reference.host, &reference.repository);
    repository
        .put_blob_file(&release.files_descriptor, release.files.path())
        .await?;
    let config = Descriptor::of(media_type::RELEASE_CONFIG, &release.config_bytes);
    repository
        .put_blob(&config, Bytes::copy_from_slice(&release.config_bytes))
        .await?;
    repository
        .put_manifest(
            &TagOrDigest::Digest(release.descriptor.digest.clone()),
            &release.descriptor.media_type,
            Bytes::copy_from_slice(&release.manifest),
        )
        .await?;
    Ok(())
}

/// Runs what blocks on the disk where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReleaseError> + Send + 'static,
) -> Result<T, ReleaseError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_) => Err(ReleaseError::Io {
                operation: "go on with",
                path: std::path::PathBuf::from("."),
                source: std::io::ErrorKind::Interrupted.into(),
            }),
        },
    }
}

/// Docker's type of an image configuration.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const MAX_IMAGE_CONFIG: usize = 8 << 20;
const PARALLEL: usize = 4;

#[cfg(test)]
mod tests;
