//! Layers laid over each other: which file comes from which layer, known before anything is written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci::tar::{Entry, Kind, Limits, Sink, TarError};
use oci::{Descriptor, Hasher};

use super::formats::{self, COMPOSE_OCI, LONGSHORE};
use super::tree::io as io_error;
use super::{ReleaseError, chain};

/// The files of all layers, after each was read to its last byte.
#[derive(Debug, Default)]
pub(super) struct Layers {
    pub(super) items: BTreeMap<String, Item>,
    /// The contents of files that were asked for.
    pub(super) captured: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Directory {
        layer: usize,
    },
    /// An entry of a layer's archive.
    Entry {
        layer: usize,
        executable: bool,
    },
    /// Whole layers, one after another. Compose separates them as YAML documents.
    Blobs(Vec<usize>),
}

impl Item {
    fn layer(&self) -> usize {
        match self {
            Self::Directory { layer } | Self::Entry { layer, .. } => *layer,
            Self::Blobs(layers) => layers.last().copied().unwrap_or_default(),
        }
    }
}

impl Layers {
    /// Checks every layer against its digest and its archive against `limits`, and lays them over each
    /// other. Nothing is written. Files for which `capture` says so are kept, when they are small.
    pub(super) fn read(
        format: &str,
        layers: &[(Descriptor, PathBuf)],
        limits: &Limits,
        capture: &dyn Fn(&str) -> bool,
    ) -> Result<Self, ReleaseError> {
        let mut all = Self::default();
        let mut total = 0_u64;
        for (index, (descriptor, path)) in layers.iter().enumerate() {
            verify(descriptor, path)?;
            if let Some(name) = whole_file(format, index, descriptor, path)? {
                all.blob(&name, index, path, descriptor, capture)?;
            } else if format != COMPOSE_OCI {
                let mut collect = Collect {
                    layers: &mut all,
                    index,
                    whiteouts: format != LONGSHORE,
                    bytes: 0,
                    capture,
                };
                let file = File::open(path).map_err(io_error("open", path))?;
                let read = oci::tar::read(file, limits, &mut collect);
                total = total.saturating_add(collect.bytes);
                read.map_err(|error| tar_error(error, path))?;
            }
            if total > limits.total_bytes || all.items.len() as u64 > limits.entries {
                return Err(ReleaseError::Rejected(format!(
                    "the layers hold more than {} entries or {} bytes together",
                    limits.entries, limits.total_bytes
                )));
            }
        }
        Ok(all)
    }

    /// Puts an item in its place. What a lower layer has there gives way.
    fn put(&mut self, name: &str, item: Item) {
        let mut above = name;
        while let Some((directory, _)) = above.rsplit_once('/') {
            above = directory;
            if let Some(Item::Directory { .. }) = self.items.get(directory) {
                break;
            }
            self.captured.remove(directory);
            let layer = item.layer();
            self.items
                .insert(directory.to_owned(), Item::Directory { layer });
        }
        if !matches!(item, Item::Directory { .. }) {
            self.remove_below(name, usize::MAX);
        }
        self.captured.remove(name);
        self.items.insert(name.to_owned(), item);
    }

    /// Removes what layers below `layer` have under a directory.
    fn remove_below(&mut self, directory: &str, layer: usize) {
        let start = if directory.is_empty() {
            String::new()
        } else {
            format!("{directory}/")
        };
        let gone: Vec<String> = self
            .items
            .range(start.clone()..)
            .take_while(|(name, _)| name.starts_with(&start))
            .filter(|(_, item)| item.layer() < layer)
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.items.remove(&name);
            self.captured.remove(&name);
        }
    }

    /// An image layer's marker that something of the layers below is gone
    /// ([image-spec § Whiteouts](https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts)).
    fn whiteout(&mut self, directory: &str, marker: &str, layer: usize) {
        if marker == ".wh..opq" {
            self.remove_below(directory, layer);
            return;
        }
        let name = super::tree::join(directory, marker);
        self.remove_below(&name, layer);
        if self
            .items
            .get(&name)
            .is_some_and(|item| item.layer() < layer)
        {
            self.items.remove(&name);
            self.captured.remove(&name);
        }
    }

    fn blob(
        &mut self,
        name: &str,
        index: usize,
        path: &Path,
        descriptor: &Descriptor,
        capture: &dyn Fn(&str) -> bool,
    ) -> Result<(), ReleaseError> {
        let mut parts = match self.items.get(name) {
            Some(Item::Blobs(parts)) if descriptor.media_type == formats::COMPOSE_FILE => {
                parts.clone()
            }
            _ => Vec::new(),
        };
        let mut captured = if parts.is_empty() {
            Vec::new()
        } else {
            self.captured.get(name).cloned().unwrap_or_default()
        };
        let separate = !parts.is_empty();
        parts.push(index);
        self.put(name, Item::Blobs(parts));
        if capture(name) && descriptor.size <= MAX_CAPTURE {
            if separate {
                captured.extend_from_slice(SEPARATOR);
            }
            captured.extend(std::fs::read(path).map_err(io_error("read", path))?);
            self.captured.insert(name.to_owned(), captured);
        }
        Ok(())
    }
}

struct Collect<'a> {
    layers: &'a mut Layers,
    index: usize,
    whiteouts: bool,
    bytes: u64,
    capture: &'a dyn Fn(&str) -> bool,
}

impl Sink for Collect<'_> {
    fn entry(&mut self, entry: Entry<'_>) -> io::Result<()> {
        let (directory, base) = entry.path.rsplit_once('/').unwrap_or(("", entry.path));
        if self.whiteouts
            && let Some(marker) = base.strip_prefix(".wh.")
        {
            self.layers.whiteout(directory, marker, self.index);
            return Ok(());
        }
        let item = match entry.kind {
            Kind::Directory => {
                if matches!(
                    self.layers.items.get(entry.path),
                    Some(Item::Directory { .. })
                ) {
                    return Ok(());
                }
                Item::Directory { layer: self.index }
            }
            Kind::File { executable } => {
                self.bytes = self.bytes.saturating_add(entry.size);
                Item::Entry {
                    layer: self.index,
                    executable,
                }
            }
            // `Links::Refuse` hands on none.
            Kind::Symlink { .. } | Kind::HardLink { .. } => return Ok(()),
        };
        self.layers.put(entry.path, item);
        if entry.size <= MAX_CAPTURE && (self.capture)(entry.path) {
            let mut content = Vec::new();
            entry.content.take(MAX_CAPTURE).read_to_end(&mut content)?;
            self.layers.captured.insert(entry.path.to_owned(), content);
        }
        Ok(())
    }
}

/// The name of the file that a layer is as a whole, when it is no archive.
fn whole_file(
    format: &str,
    index: usize,
    descriptor: &Descriptor,
    path: &Path,
) -> Result<Option<String>, ReleaseError> {
    let annotation = |key: &str| descriptor.annotations.get(key).map(String::as_str);
    let name = if format == COMPOSE_OCI {
        match descriptor.media_type.as_str() {
            formats::COMPOSE_FILE if annotation("com.docker.compose.extends").is_some() => {
                annotation("com.docker.compose.file").unwrap_or_default()
            }
            formats::COMPOSE_FILE => return Ok(Some("compose.yaml".to_owned())),
            formats::COMPOSE_ENV_FILE => {
                annotation("com.docker.compose.envfile").unwrap_or_default()
            }
            // Compose takes no notice of other layers.
            _ => return Ok(None),
        }
    } else if format == LONGSHORE || annotation("io.deis.oras.content.unpack") == Some("true") {
        return Ok(None);
    } else {
        match annotation("org.opencontainers.image.title") {
            Some(title) if !is_tar(path)? => title,
            _ => return Ok(None),
        }
    };
    let name = name.strip_prefix("./").unwrap_or(name);
    let is_normal = super::tree::normal("", name).as_deref() == Some(name);
    if name.is_empty() || name.len() > 1024 || !is_normal || name.chars().any(char::is_control) {
        return Err(ReleaseError::Rejected(format!(
            "layer {index} names the file `{}`, which is empty or leaves the tree",
            name.escape_default()
                .to_string()
                .chars()
                .take(160)
                .collect::<String>()
        )));
    }
    Ok(Some(name.to_owned()))
}

/// Looks for a tar header at the start, compressed or not.
fn is_tar(path: &Path) -> Result<bool, ReleaseError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let mut header = Vec::with_capacity(512);
    let start = oci::tar::decompress(file, &Limits::default())
        .map_err(|error| tar_error(error, path))?
        .take(512)
        .read_to_end(&mut header);
    if start.is_err() || header.len() < 512 {
        return Ok(false);
    }
    let stated = std::str::from_utf8(&header[148..156])
        .ok()
        .and_then(|text| u32::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok());
    let sum: u32 = header
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (148..156).contains(&at) {
                32
            } else {
                u32::from(*byte)
            }
        })
        .sum();
    Ok(stated == Some(sum) || header.iter().all(|byte| *byte == 0))
}

/// Hashes a staged blob. It was verified when it came; this finds what happened to the disk since.
pub(super) fn verify(descriptor: &Descriptor, path: &Path) -> Result<(), ReleaseError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let mut hasher = Hasher::new(descriptor.digest.algorithm());
    let mut buffer = vec![0; 64 << 10];
    let mut size = 0;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(io_error("read", path)(error)),
        };
        hasher.update(&buffer[..count]);
        size += count as u64;
    }
    if hasher.finish() != descriptor.digest || size != descriptor.size {
        return Err(io_error("use", path)(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it is not the blob `{}` any more", descriptor.digest),
        )));
    }
    Ok(())
}

pub(super) fn tar_error(error: TarError, path: &Path) -> ReleaseError {
    if error.is_refusal() {
        return ReleaseError::Rejected(format!("the layer is refused: {}", chain(&error)));
    }
    match error {
        TarError::Sink { source, .. } => io_error("write what is in", path)(source),
        TarError::Read(source) => io_error("read", path)(source),
        other => io_error("read", path)(io::Error::other(other)),
    }
}

/// What Compose writes between the files of an artifact.
pub(super) const SEPARATOR: &[u8] = b"\n---\n";
const MAX_CAPTURE: u64 = 1 << 20;

#[cfg(test)]
mod tests;
