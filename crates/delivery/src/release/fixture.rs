//! Archives for tests, also such as no honest writer makes.

use std::io::Write;
use std::path::{Path, PathBuf};

use oci::{Descriptor, Digest};

use super::{EngineKind, FetchedRelease, ReleaseConfig};

/// A tar that is put together header by header.
#[derive(Clone, Default)]
pub(super) struct Archive(Vec<u8>);

impl Archive {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn file(self, name: &str, content: &str) -> Self {
        self.entry(name, b'0', 0o644, "", content.as_bytes())
    }

    pub(super) fn executable(self, name: &str, content: &str) -> Self {
        self.entry(name, b'0', 0o4755, "", content.as_bytes())
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.entry(name, b'5', 0o777, "", b"")
    }

    /// Any kind of entry: `1` hard link, `2` symbolic link, `3` and `4` devices, `6` FIFO.
    pub(super) fn special(self, name: &str, kind: u8, target: &str) -> Self {
        self.entry(name, kind, 0o644, target, b"")
    }

    fn entry(mut self, name: &str, kind: u8, mode: u32, target: &str, content: &[u8]) -> Self {
        let mut header = [0_u8; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, format!("{mode:07o}").as_bytes());
        put(108, b"0001750");
        put(116, b"0001750");
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, b"14000000000");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }

    pub(super) fn gzip(self) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&self.end()).unwrap();
        encoder.finish().unwrap()
    }

    pub(super) fn zstd(self) -> Vec<u8> {
        zstd::encode_all(self.end().as_slice(), 1).unwrap()
    }
}

/// A fetched release with these layers staged in `staging`.
pub(super) fn fetched(
    staging: &Path,
    format: &str,
    layers: Vec<(Descriptor, Vec<u8>)>,
) -> FetchedRelease {
    let layers: Vec<(Descriptor, PathBuf)> = layers
        .into_iter()
        .enumerate()
        .map(|(index, (mut descriptor, content))| {
            let path = staging.join(format!("layer-{index}"));
            std::fs::write(&path, &content).unwrap();
            descriptor.digest = Digest::sha256(&content);
            descriptor.size = content.len() as u64;
            (descriptor, path)
        })
        .collect();
    FetchedRelease {
        descriptor: Descriptor::of(oci::media_type::OCI_MANIFEST, b"manifest"),
        config: ReleaseConfig {
            schema_version: 1,
            name: "shop".to_owned(),
            version: None,
            engine: EngineKind::Files,
            entry: Vec::new(),
            variables: Vec::new(),
            images: Vec::new(),
        },
        format: format.to_owned(),
        layers,
    }
}

/// A layer of this type with these annotations.
pub(super) fn layer(
    media_type: &str,
    annotations: &[(&str, &str)],
    content: Vec<u8>,
) -> (Descriptor, Vec<u8>) {
    let mut descriptor = Descriptor::of(media_type, &content);
    for (key, value) in annotations {
        descriptor
            .annotations
            .insert((*key).to_owned(), (*value).to_owned());
    }
    (descriptor, content)
}

/// Everything below a directory: `path mode content`, sorted.
pub(super) fn listing(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut lines = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(directory).unwrap().display().to_string();
            let mode = metadata.mode() & 0o7777;
            if metadata.is_dir() {
                lines.push(format!("{name}/ {mode:o}"));
                open.push(path);
            } else {
                let content = std::fs::read_to_string(&path).unwrap();
                lines.push(format!("{name} {mode:o} {content}"));
            }
        }
    }
    lines.sort();
    lines
}
