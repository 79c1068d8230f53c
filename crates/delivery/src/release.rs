//! Releases: what one deployment needs, as one immutable OCI artifact.
//!
//! A release is a manifest with a configuration ([`ReleaseConfig`]) and one layer of files, a plain
//! reproducible tar. Making one needs no engine: [`lint()`] follows the definition files itself, and
//! [`pack()`] asks registries alone for the digests behind image references. The same directory gives
//! the same digest anywhere.
//!
//! Using one has two steps that are never mixed: [`fetch`] downloads every blob whole and verifies it,
//! then [`extract()`] checks the whole archive and writes it. So nothing that was not verified ever
//! becomes a file. Artifacts of other tools are read as they are and mapped onto the same
//! configuration; their images are not pinned.
//!
//! Trust is decided elsewhere, by the manifest's digest; nothing here looks at signatures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci::{Descriptor, Digest, Platform, Reference};
use serde::{Deserialize, Serialize};

mod dotenv;
mod extract;
#[cfg(test)]
mod fixture;
mod formats;
mod interpolate;
mod layers;
mod lint;
mod pack;
mod read;
mod tree;
mod yaml;

/// The configuration blob of a release (`application/vnd.longshore.release.config.v1+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseConfig {
    /// Version of this document, 1.
    pub schema_version: u32,
    /// The release's name, such as `shop`.
    pub name: String,
    /// The release's version, such as `1.4.2`; free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The engine it is for.
    pub engine: EngineKind,
    /// The definition files to start from, relative paths (`compose.yaml`); empty for `files`.
    pub entry: Vec<String>,
    /// Variables that stay open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variables: Vec<Variable>,
    /// Images pinned at publish time, by service and reference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImagePin>,
}
/// How a release is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// Docker Compose.
    Compose,
    /// Plain files behind a symbolic link.
    Files,
}
/// A variable that the target fills.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its default in the definition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// There is no default: a target must give it.
    #[serde(default)]
    pub required: bool,
}
/// One image, pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePin {
    /// The service.
    pub service: String,
    /// The reference as the definition names it.
    pub reference: String,
    /// What it resolved to (index, list or single manifest).
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// The platforms that it holds (BuildKit's `unknown/unknown` left out).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<Platform>,
}

/// A release that was fetched and verified blob by blob, ready to be extracted; nothing of it is on disk as files yet.
#[derive(Clone, Debug)]
pub struct FetchedRelease {
    /// The manifest's descriptor.
    pub descriptor: Descriptor,
    /// The configuration: ours, or derived from a foreign format.
    pub config: ReleaseConfig,
    /// The format it was read as: `longshore`, `doco`, `flux`, `compose-oci`, `tar`.
    pub format: String,
    /// The downloaded layers (whole, verified), in order.
    pub layers: Vec<(Descriptor, PathBuf)>,
}

/// Fetches manifest, configuration and layers by digest into `staging`, every blob whole and verified,
/// before anything is extracted. Blobs that are there already from an earlier try are verified and kept.
///
/// An index is followed to the manifest for this host's platform. The name of a foreign artifact may
/// be empty, where its format has none; [`fetch_named`] fills it in.
///
/// # Errors
/// [`ReleaseError::Rejected`] when the artifact cannot be a release on this host,
/// [`ReleaseError::Client`] and [`ReleaseError::Io`] when another try may help.
///
/// # Cancel safety
/// Blobs that were begun are continued by the next call with the same `staging`.
pub async fn fetch(
    repository: &client::Repository,
    digest: &Digest,
    staging: &Path,
) -> Result<FetchedRelease, ReleaseError> {
    read::fetch(repository, digest, staging, None).await
}

/// As [`fetch`], for a target that expects a release of this name: another name is
/// [`ReleaseError::Rejected`], so that a validly signed release of something else does not replay
/// here. A foreign artifact without a name of its own gets the expected one; of a doco-cd artifact
/// with several deployments the one of this name is taken.
///
/// # Errors
/// As [`fetch`].
pub async fn fetch_named(
    repository: &client::Repository,
    digest: &Digest,
    staging: &Path,
    expected_name: &str,
) -> Result<FetchedRelease, ReleaseError> {
    read::fetch(repository, digest, staging, Some(expected_name)).await
}

/// Extracts the layers into `directory`, which is named by the digest and never changed afterwards.
///
/// All layers are checked to their last byte first: `..`, absolute names, links, devices and archives
/// beyond the limits are refused before a byte is written. Then files are written beneath one
/// directory descriptor under a temporary name beside `directory`, with the modes 0755 and 0644
/// whatever the umask is, synced and renamed. When `directory` is there already with the same content,
/// that is fine. A failure leaves nothing behind. One call at a time per `directory`.
///
/// This blocks on the disk.
///
/// # Errors
/// [`ReleaseError::Rejected`] when an archive is refused, [`ReleaseError::Io`] for the disk.
pub fn extract(release: &FetchedRelease, directory: &Path) -> Result<(), ReleaseError> {
    extract::extract(release, directory)
}

/// A finding of lint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `error` or `warning`.
    pub severity: Severity,
    /// The file, relative to the release directory.
    pub file: String,
    /// The line, from 1; 0 when it concerns the whole file.
    pub line: usize,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}
/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The release cannot be pushed.
    Error,
    /// It can.
    Warning,
}
/// What a person asked for when packing.
#[derive(Clone, Debug, Default)]
pub struct PackOptions {
    /// The name; default: the Compose file's `name:`, else the directory's name.
    pub name: Option<String>,
    /// The version.
    pub version: Option<String>,
    /// The engine; default: `compose` when there is a Compose file, else `files`.
    pub engine: Option<EngineKind>,
    /// Entry files; default: the Compose file names that Compose itself tries.
    pub entry: Vec<String>,
    /// Annotations of the manifest. They change its digest.
    pub annotations: BTreeMap<String, String>,
}
/// A packed release: reproducible bytes.
#[derive(Debug)]
pub struct PackedRelease {
    /// The configuration.
    pub config: ReleaseConfig,
    /// The configuration's bytes.
    pub config_bytes: Vec<u8>,
    /// The tar in a temporary file.
    pub files: tempfile::NamedTempFile,
    /// The tar's descriptor.
    pub files_descriptor: Descriptor,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// The manifest's descriptor.
    pub descriptor: Descriptor,
    /// Findings (only warnings).
    pub findings: Vec<Finding>,
}
/// Checks a directory without the network; image references are checked for form, not resolved.
///
/// This blocks on the disk.
///
/// # Errors
/// [`ReleaseError::Io`] when the directory cannot be read. Findings are no error here.
pub fn lint(directory: &Path, options: &PackOptions) -> Result<Vec<Finding>, ReleaseError> {
    Ok(lint::analyse(directory, options)?.findings)
}

/// Lints, resolves every image to its digest through `client`, and packs.
///
/// # Errors
/// [`ReleaseError::Lint`] with all findings when one of them is an error; an image that cannot be
/// resolved is one. [`ReleaseError::Io`] for the disk.
pub async fn pack(
    directory: &Path,
    options: &PackOptions,
    client: &client::Client,
) -> Result<PackedRelease, ReleaseError> {
    pack::pack(directory, options, client).await
}

/// Pushes blobs and manifest by digest (no tag): tagging comes last, after signing.
///
/// # Errors
/// [`ReleaseError::Client`].
///
/// # Cancel safety
/// Nothing is visible before the manifest, which is pushed last.
pub async fn push(
    release: &PackedRelease,
    client: &client::Client,
    reference: &Reference,
) -> Result<(), ReleaseError> {
    pack::push(release, client, reference).await
}

/// Why a release cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// Lint found errors.
    #[error("the release has {} error(s)", .0.iter().filter(|f| f.severity == Severity::Error).count())]
    Lint(Vec<Finding>),
    /// The artifact is wrong and stays wrong: never retried.
    #[error("{0}")]
    Rejected(String),
    /// The registry or the network: retried.
    #[error("the registry cannot be used")]
    Client(#[from] client::Error),
    /// The disk.
    #[error("cannot {operation} `{path}`")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn finding(severity: Severity, file: &str, line: usize, message: &str, hint: &str) -> Finding {
    Finding {
        severity,
        file: file.to_owned(),
        line,
        message: message.to_owned(),
        hint: hint.to_owned(),
    }
}

/// A release's name: `[a-z0-9][a-z0-9_-]*`, at most 128 characters, so that it can be a Compose project.
fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() <= 128
        && bytes.next().is_some_and(alphanumeric)
        && bytes.all(|b| alphanumeric(b) || b == b'_' || b == b'-')
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The version of [`ReleaseConfig`] that this program writes, and the newest that it reads.
const SCHEMA_VERSION: u32 = 1;
