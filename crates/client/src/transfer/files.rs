//! Artifacts made of local files, in the form that oras writes and reads: one layer for each file, its
//! name in `org.opencontainers.image.title`.

use std::collections::{BTreeMap, HashSet};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use oci::{Algorithm, Descriptor, Digest, Hasher, Manifest, media_type};
use tokio::io::AsyncReadExt as _;

use super::side::Side;
use super::{CopyReport, Location, Progress};
use crate::error::printable;
use crate::{Client, Error, FetchedManifest};

/// An artifact to be made.
#[derive(Clone, Debug, Default)]
pub struct Artifact {
    /// What it is. Empty means `application/vnd.unknown.artifact.v1`, as with oras.
    pub artifact_type: String,
    /// Media type and content of its configuration; `None` is the empty one.
    pub config: Option<(String, Bytes)>,
    /// Its files, in the order of the layers.
    pub files: Vec<FileLayer>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// What it refers to.
    pub subject: Option<Descriptor>,
}

/// A file that becomes a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLayer {
    /// Where it lies.
    pub path: PathBuf,
    /// The name it gets when it is pulled: a relative path that stays within its directory.
    pub title: String,
    /// What it is.
    pub media_type: String,
}

impl FileLayer {
    /// Reads `FILE[:media/type]`, as it stands in a command. The name is the path as given, or the last
    /// part of one that is absolute or leads upwards.
    ///
    /// # Errors
    /// When it names no file.
    pub fn from_argument(argument: &str) -> Result<Self, Error> {
        let (path, media_type) = match argument.rsplit_once(':') {
            Some((path, kind)) if kind.contains('/') && !kind.starts_with('/') => (path, kind),
            _ => (argument, DEFAULT_LAYER),
        };
        let title = match within(path) {
            Some(relative) => relative.to_string_lossy().into_owned(),
            None => Path::new(path)
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .ok_or_else(|| Error::Other(format!("`{}` names no file", printable(argument))))?,
        };
        Ok(Self {
            path: PathBuf::from(path),
            title,
            media_type: media_type.to_owned(),
        })
    }
}

/// Makes an artifact of local files and pushes it: blobs, manifest, tag. The same files give the same
/// digest.
///
/// # Errors
/// When a file cannot be read, is a directory, or two have one name; nothing is sent then.
pub async fn push_files(
    client: &Client,
    to: &Location,
    artifact: &Artifact,
    parallel: usize,
    progress: &dyn Progress,
) -> Result<CopyReport, Error> {
    let mut titles = HashSet::new();
    let mut layers = Vec::new();
    for file in &artifact.files {
        if within(&file.title).is_none() || !titles.insert(&file.title) {
            return Err(Error::Other(format!(
                "`{}` cannot be the name of a file in an artifact, or is used twice; name files by different relative paths",
                printable(&file.title)
            )));
        }
        let (digest, size) = measure(&file.path).await?;
        let mut layer = Descriptor::new(&file.media_type, digest, size);
        layer
            .annotations
            .insert(TITLE.to_owned(), file.title.clone());
        layers.push(layer);
    }
    let (config, content) = match &artifact.config {
        Some((kind, content)) => (Descriptor::of(kind, content), content.clone()),
        None => (Descriptor::empty(), Bytes::from_static(b"{}")),
    };
    let artifact_type = match artifact.artifact_type.as_str() {
        "" => UNKNOWN_ARTIFACT,
        other => other,
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some(artifact_type.to_owned()),
        config: Some(config.clone()),
        layers: Some(if layers.is_empty() {
            // The specification wants one layer, and has the empty one for this.
            vec![Descriptor::empty()]
        } else {
            layers.clone()
        }),
        manifests: None,
        subject: artifact.subject.clone(),
        annotations: artifact.annotations.clone(),
    }
    .to_bytes();
    let manifest = FetchedManifest {
        descriptor: Descriptor::of(media_type::OCI_MANIFEST, &manifest),
        body: Bytes::from(manifest),
    };
    if let Some(wanted) = to.digest()
        && *wanted != manifest.descriptor.digest
    {
        return Err(Error::Other(format!(
            "the artifact has digest `{}`, not `{wanted}`; name a tag instead",
            manifest.descriptor.digest
        )));
    }

    let destination = Side::destination(client, to).await?;
    let mut report = CopyReport {
        digest: manifest.descriptor.digest.clone(),
        manifests: 0,
        blobs: 0,
        skipped: 0,
        bytes: 0,
    };
    let mut seen = HashSet::new();
    let work: Vec<(Descriptor, PathBuf)> = layers
        .iter()
        .zip(&artifact.files)
        .filter(|(layer, _)| seen.insert(&layer.digest))
        .map(|(layer, file)| (layer.clone(), file.path.clone()))
        .collect();
    let mut sent = futures_util::stream::iter(work)
        .map(|(layer, path)| {
            let destination = &destination;
            async move {
                progress.start(&layer.digest, layer.size);
                let moved = destination.put_file(&layer, &path, progress).await?;
                progress.finish(&layer.digest, !moved);
                Ok::<_, Error>((moved, layer.size))
            }
        })
        .buffer_unordered(parallel.max(1));
    while let Some((moved, size)) = sent.try_next().await? {
        if moved {
            report.blobs += 1;
            report.bytes += size;
        } else {
            report.skipped += 1;
        }
    }
    drop(sent);
    destination.put_bytes(&config, content).await?;
    if artifact.files.is_empty() && artifact.config.is_some() {
        destination
            .put_bytes(&Descriptor::empty(), Bytes::from_static(b"{}"))
            .await?;
    }
    let written = destination
        .put_manifest(&manifest, artifact.subject.is_some())
        .await?;
    report.manifests = u64::from(written);
    destination.publish(&manifest, to.tag()).await?;
    Ok(report)
}

/// What [`pull_files`] wrote.
#[derive(Clone, Debug)]
pub struct PulledFiles {
    /// The manifest that was pulled.
    pub digest: Digest,
    /// What it says it is.
    pub artifact_type: Option<String>,
    /// The files, in the order of the layers, with the directory before them.
    pub files: Vec<PathBuf>,
    /// Layers without a name, which were left.
    pub unnamed: u64,
}

/// Writes the named layers of an artifact into a directory, each verified before it is in place. A file
/// of the same name is replaced. Archives are not extracted.
///
/// # Errors
/// A name that leaves the directory, over `..`, an absolute path or a link that lies there, or that is
/// used twice, is refused before anything is written; so is an artifact without named layers.
pub async fn pull_files(
    client: &Client,
    from: &Location,
    directory: &Path,
    parallel: usize,
    progress: &dyn Progress,
) -> Result<PulledFiles, Error> {
    let source = Side::source(client, from).await?;
    let root = source.root(from).await?;
    let view = Manifest::parse(&root.body, &root.descriptor.media_type)
        .map_err(|error| Error::Other(format!("`{from}` cannot be pulled: {error}")))?;
    if view.is_index() {
        return Err(Error::Other(format!(
            "`{from}` is an index; name one of its {} manifests by digest, or copy all to `oci:DIR`",
            view.children().count()
        )));
    }
    let artifact_type = view.listed_artifact_type().map(str::to_owned);
    let mut unnamed = 0;
    let mut work: Vec<(Descriptor, PathBuf)> = Vec::new();
    let mut seen = HashSet::new();
    for layer in view.layers.unwrap_or_default() {
        let Some(title) = layer.annotations.get(TITLE) else {
            unnamed += 1;
            continue;
        };
        let relative = within(title).ok_or_else(|| {
            Error::Other(format!(
                "`{from}` names a file `{}`, which leads out of the directory; nothing was written",
                printable(title)
            ))
        })?;
        if !seen.insert(relative.clone()) {
            return Err(Error::Other(format!(
                "`{from}` names the file `{}` twice; nothing was written",
                printable(title)
            )));
        }
        if layer.is_foreign() {
            return Err(Error::Other(format!(
                "`{from}` keeps the file `{}` elsewhere; nothing was written",
                printable(title)
            )));
        }
        work.push((layer, relative));
    }
    if work.is_empty() {
        return Err(Error::Other(format!(
            "`{from}` has no layer that is a named file; copy it to `oci:DIR` to have its content"
        )));
    }
    for (_, relative) in &work {
        no_links(directory, relative).await?;
    }
    let files: Vec<PathBuf> = work
        .iter()
        .map(|(_, relative)| directory.join(relative))
        .collect();
    for file in &files {
        if let Some(parent) = file.parent() {
            tokio::fs::create_dir_all(parent)
                .await
                .map_err(Error::file(parent))?;
        }
    }
    let mut written = futures_util::stream::iter(work.into_iter().zip(files.clone()))
        .map(|((layer, _), path)| {
            let source = &source;
            async move {
                progress.start(&layer.digest, layer.size);
                source.blob_to_file(&layer, &path, progress).await?;
                progress.finish(&layer.digest, false);
                Ok::<_, Error>(())
            }
        })
        .buffer_unordered(parallel.max(1));
    while written.try_next().await?.is_some() {}
    drop(written);
    Ok(PulledFiles {
        digest: root.descriptor.digest,
        artifact_type,
        files,
        unnamed,
    })
}

/// The path that a name stands for, when it stays where it begins.
pub(super) fn within(name: &str) -> Option<PathBuf> {
    if name.chars().any(char::is_control) || name.len() > 4096 || name.ends_with('/') {
        return None;
    }
    let mut path = PathBuf::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!path.as_os_str().is_empty()).then_some(path)
}

/// Refuses a path that leads over a link, or over something that is no directory.
async fn no_links(directory: &Path, relative: &Path) -> Result<(), Error> {
    let mut path = directory.to_owned();
    for part in relative.parent().into_iter().flat_map(Path::components) {
        path.push(part);
        match tokio::fs::symlink_metadata(&path).await {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(Error::Other(format!(
                    "`{}` is in the way: it is a link or no directory; nothing was written",
                    path.display()
                )));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::file(&path)(error)),
        }
    }
    Ok(())
}

/// Digest and length of a file.
async fn measure(path: &Path) -> Result<(Digest, u64), Error> {
    let metadata = tokio::fs::metadata(path).await.map_err(Error::file(path))?;
    if metadata.is_dir() {
        return Err(Error::Other(format!(
            "`{}` is a directory; pack it into one file first",
            path.display()
        )));
    }
    let mut file = tokio::fs::File::open(path)
        .await
        .map_err(Error::file(path))?;
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut buffer = vec![0; 1024 * 1024];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer).await.map_err(Error::file(path))?;
        if length == 0 {
            return Ok((hasher.finish(), size));
        }
        hasher.update(&buffer[..length]);
        size += length as u64;
    }
}

/// The annotation that holds a file's name.
pub const TITLE: &str = "org.opencontainers.image.title";
const DEFAULT_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const UNKNOWN_ARTIFACT: &str = "application/vnd.unknown.artifact.v1";
