//! Artifacts made and pushed by hand: images, releases' services, anything with a manifest.

use std::path::Path;

use serde_json::{Value, json};

use crate::{digest, http, tools};

/// The media type of an image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Pushes a blob in one request after the POST and gives back its digest.
///
/// # Panics
/// When the registry refuses it.
pub fn push_blob(registry: &str, repository: &str, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    let opened = http::request(
        "POST",
        &format!("{registry}/v2/{repository}/blobs/uploads/"),
        &[],
        &[],
    );
    assert_eq!(opened.status(), 202, "POST of an upload: {}", opened.text());
    let location = opened
        .header("location")
        .expect("an upload has a location")
        .to_owned();
    let location = if location.starts_with('/') {
        format!("{registry}{location}")
    } else {
        location
    };
    let separator = if location.contains('?') { '&' } else { '?' };
    let done = http::request(
        "PUT",
        &format!("{location}{separator}digest={digest}"),
        &[("Content-Type", "application/octet-stream")],
        bytes,
    );
    assert_eq!(done.status(), 201, "PUT of a blob: {}", done.text());
    digest
}

/// Pushes a manifest under a tag or digest and gives back its digest.
///
/// # Panics
/// When the registry refuses it.
pub fn push_manifest(
    registry: &str,
    repository: &str,
    reference: &str,
    media_type: &str,
    bytes: &[u8],
) -> String {
    let done = http::request(
        "PUT",
        &format!("{registry}/v2/{repository}/manifests/{reference}"),
        &[("Content-Type", media_type)],
        bytes,
    );
    assert_eq!(done.status(), 201, "PUT of a manifest: {}", done.text());
    digest(bytes)
}

/// A descriptor.
pub fn descriptor(media_type: &str, digest: &str, size: usize) -> Value {
    json!({"mediaType": media_type, "digest": digest, "size": size})
}

/// Pushes an artifact with one layer and gives back its digest. Its manifest is an OCI image manifest.
pub fn push_artifact(
    registry: &str,
    repository: &str,
    tag: &str,
    artifact_type: &str,
    layer: &[u8],
) -> String {
    let config = push_blob(registry, repository, b"{}");
    let blob = push_blob(registry, repository, layer);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": descriptor("application/vnd.oci.empty.v1+json", &config, 2),
        "layers": [descriptor("application/octet-stream", &blob, layer.len())],
    });
    push_manifest(
        registry,
        repository,
        tag,
        MANIFEST,
        manifest.to_string().as_bytes(),
    )
}

/// An image that runs busybox.
#[derive(Clone, Debug)]
pub struct Image {
    command: Vec<String>,
    environment: Vec<String>,
    health: Option<Vec<String>>,
    architecture: String,
    salt: Vec<u8>,
}

impl Image {
    /// An image whose container runs `script` in busybox's shell.
    pub fn shell(script: &str) -> Self {
        Self {
            command: ["/bin/busybox", "sh", "-c", script]
                .map(str::to_owned)
                .to_vec(),
            environment: vec!["PATH=/bin".to_owned()],
            health: None,
            architecture: if cfg!(target_arch = "aarch64") {
                "arm64"
            } else {
                "amd64"
            }
            .to_owned(),
            salt: Vec::new(),
        }
    }

    /// A service that answers `GET /` with `text` on port 8080 until it is asked to end.
    pub fn web(text: &str) -> Self {
        Self::shell(&format!(
            "mkdir -p /www && echo '{text}' > /www/index.html && exec /bin/busybox httpd -f -p 8080 -h /www"
        ))
    }

    /// Sets the health check: a command in busybox's shell.
    #[must_use]
    pub fn health(mut self, script: &str) -> Self {
        self.health = Some(
            ["CMD", "/bin/busybox", "sh", "-c", script]
                .map(str::to_owned)
                .to_vec(),
        );
        self
    }

    /// Claims another architecture.
    #[must_use]
    pub fn architecture(mut self, name: &str) -> Self {
        name.clone_into(&mut self.architecture);
        self
    }

    /// Adds bytes to a second layer, so that its digest is one that nobody has.
    #[must_use]
    pub fn salt(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.salt = bytes.into();
        self
    }

    /// The layers as plain tar archives.
    ///
    /// # Panics
    /// When busybox is not there.
    pub fn layers(&self) -> Vec<Vec<u8>> {
        let mut layers = vec![busybox_layer(&tools::tool("busybox"))];
        if !self.salt.is_empty() {
            let mut archive = tar::Builder::new(Vec::new());
            append(&mut archive, "salt", &self.salt, 0o644);
            layers.push(
                archive
                    .into_inner()
                    .expect("an archive in memory can be ended"),
            );
        }
        layers
    }

    /// Pushes the image and gives back its digest.
    ///
    /// # Panics
    /// When the registry refuses it or busybox is not there.
    pub fn push(&self, registry: &str, repository: &str, tag: &str) -> String {
        let layers = self.layers();
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
        let mut config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Cmd": self.command, "Env": self.environment, "StopSignal": "SIGKILL"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({"created_by": "e2e"})).collect::<Vec<_>>(),
        });
        if let Some(test) = &self.health {
            config["config"]["Healthcheck"] = json!({
                "Test": test, "Interval": 1_000_000_000_u64, "Timeout": 3_000_000_000_u64, "Retries": 2,
            });
        }
        let config = config.to_string();
        let config_digest = push_blob(registry, repository, config.as_bytes());
        let mut descriptors = Vec::new();
        for layer in &layers {
            let packed = gzip(layer);
            let blob = push_blob(registry, repository, &packed);
            descriptors.push(descriptor(
                "application/vnd.oci.image.layer.v1.tar+gzip",
                &blob,
                packed.len(),
            ));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config.len()),
            "layers": descriptors,
        });
        push_manifest(
            registry,
            repository,
            tag,
            MANIFEST,
            manifest.to_string().as_bytes(),
        )
    }
}

fn busybox_layer(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let mut archive = tar::Builder::new(Vec::new());
    for dir in ["bin/", "etc/", "tmp/"] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(if dir == "tmp/" { 0o1777 } else { 0o755 });
        header.set_size(0);
        archive
            .append_data(&mut header, dir, std::io::empty())
            .expect("an archive in memory takes entries");
    }
    append(&mut archive, "bin/busybox", &bytes, 0o755);
    for applet in [
        "cat", "echo", "httpd", "ls", "mkdir", "sh", "sleep", "test", "true", "wget",
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        archive
            .append_link(&mut header, format!("bin/{applet}"), "busybox")
            .expect("an archive in memory takes links");
    }
    append(
        &mut archive,
        "etc/passwd",
        b"root:x:0:0:root:/:/bin/sh\n",
        0o644,
    );
    archive
        .into_inner()
        .expect("an archive in memory can be ended")
}

fn append(archive: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8], mode: u32) {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    archive
        .append_data(&mut header, name, bytes)
        .expect("an archive in memory takes entries");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder
        .write_all(bytes)
        .and_then(|()| encoder.finish())
        .expect("compression in memory does not fail")
}
