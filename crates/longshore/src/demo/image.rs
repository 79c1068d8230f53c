//! An image that holds this executable and the shared libraries it runs with.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use oci::reference::TagOrDigest;
use oci::tar::Writer;
use oci::{Descriptor, Digest, Manifest, Platform, Reference, media_type};
use serde_json::json;

/// The layer that all versions share.
pub(super) struct Base {
    path: PathBuf,
    descriptor: Descriptor,
    libraries: usize,
    loader: Option<String>,
}

impl Base {
    /// Packs the executable and the libraries that this process has loaded into one plain tar.
    pub(super) fn build(directory: &Path) -> anyhow::Result<Self> {
        let libraries = loaded_libraries()?;
        let loader = libraries
            .keys()
            .find(|name| name.starts_with("ld-") || name.starts_with("ld."))
            .map(|name| format!("/lib/{name}"));
        let path = directory.join("base.tar");
        let mut writer = Writer::new(std::io::BufWriter::new(
            File::create(&path).context("cannot write the image's layer")?,
        ));
        let mut add = |name: &str, source: &Path| -> anyhow::Result<()> {
            let mut file = File::open(source)
                .with_context(|| format!("cannot read `{}`", source.display()))?;
            let size = file.metadata()?.len();
            Ok(writer.file(name, true, size, &mut file)?)
        };
        for (name, source) in &libraries {
            add(&format!("lib/{name}"), source)?;
        }
        // The file itself, even when its name was replaced since this process started.
        add("longshore", Path::new("/proc/self/exe"))?;
        writer.finish()?;
        let mut hasher = oci::Hasher::new(oci::Algorithm::Sha256);
        let mut file = File::open(&path)?;
        let size = file.metadata()?.len();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = std::io::Read::read(&mut file, &mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(buffer.get(..read).unwrap_or_default());
        }
        Ok(Self {
            path,
            descriptor: Descriptor::new(media_type::OCI_LAYER, hasher.finish(), size),
            libraries: libraries.len(),
            loader,
        })
    }

    pub(super) fn libraries(&self) -> usize {
        self.libraries
    }

    pub(super) fn size(&self) -> u64 {
        self.descriptor.size
    }

    /// A command line inside the image: through the loader, which is told where the libraries are.
    pub(super) fn command(&self, arguments: &[&str]) -> Vec<String> {
        let mut command: Vec<String> = match &self.loader {
            Some(loader) => vec![
                loader.clone(),
                "--library-path".into(),
                "/lib".into(),
                "/longshore".into(),
            ],
            None => vec!["/longshore".into()],
        };
        command.extend(arguments.iter().map(|text| (*text).to_owned()));
        command
    }

    /// Pushes one version of the image: the shared layer and a small one with what differs.
    pub(super) async fn push(
        &self,
        client: &client::Client,
        reference: &Reference,
        version: &str,
        health: &str,
    ) -> anyhow::Result<Descriptor> {
        let mut writer = Writer::new(Vec::new());
        for (name, text) in [("srv/health.txt", health), ("srv/version.txt", version)] {
            writer.file(name, false, text.len() as u64, &mut text.as_bytes())?;
        }
        let small = writer.finish()?;
        let small_descriptor = Descriptor::of(media_type::OCI_LAYER, &small);
        let platform = Platform::host();
        let config = serde_json::to_vec(&json!({
            "architecture": platform.architecture,
            "os": platform.os,
            "config": {
                "Entrypoint": self.command(&["demo-service"]),
                "ExposedPorts": {"8080/tcp": {}},
                "StopSignal": "SIGTERM",
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": [self.descriptor.digest, small_descriptor.digest],
            },
        }))?;
        let config_descriptor = Descriptor::of(media_type::OCI_CONFIG, &config);
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            config: Some(config_descriptor.clone()),
            layers: Some(vec![self.descriptor.clone(), small_descriptor.clone()]),
            ..Manifest::default()
        }
        .to_bytes();
        let repository = client.repository(&reference.host, &reference.repository);
        repository
            .put_blob_file(&self.descriptor, &self.path)
            .await?;
        repository.put_blob(&small_descriptor, small.into()).await?;
        repository
            .put_blob(&config_descriptor, config.into())
            .await?;
        let descriptor = Descriptor::new(
            media_type::OCI_MANIFEST,
            Digest::sha256(&manifest),
            manifest.len() as u64,
        );
        let tag = reference.tag.clone().context("the image has a tag")?;
        repository
            .put_manifest(
                &TagOrDigest::Tag(tag),
                media_type::OCI_MANIFEST,
                manifest.into(),
            )
            .await?;
        Ok(descriptor)
    }
}

/// The shared libraries of this process by file name, out of its memory map. Empty for a static
/// executable.
fn loaded_libraries() -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let maps = std::fs::read_to_string("/proc/self/maps").context("cannot read the memory map")?;
    let mut libraries = BTreeMap::new();
    for line in maps.lines() {
        let Some(start) = line.find('/') else {
            continue;
        };
        let path = PathBuf::from(line.get(start..).unwrap_or_default());
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        if path.extension().is_some_and(|ending| ending == "so") || name.contains(".so.") {
            libraries.insert(name, path);
        }
    }
    Ok(libraries)
}
