//! Media types that this program names. Every other one is accepted, stored and served as it is.

/// OCI image manifest ([image-spec § Image manifest](https://github.com/opencontainers/image-spec/blob/main/manifest.md)).
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index ([image-spec § Image index](https://github.com/opencontainers/image-spec/blob/main/image-index.md)).
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, plain tar.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// The empty descriptor's `{}` ([image-spec § Guidance for an empty descriptor](https://github.com/opencontainers/image-spec/blob/main/manifest.md)).
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Docker image manifest, version 2, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// A Longshore release (artifact type).
pub const RELEASE: &str = "application/vnd.longshore.release.v1+json";
/// The configuration of a Longshore release.
pub const RELEASE_CONFIG: &str = "application/vnd.longshore.release.config.v1+json";
/// The files of a Longshore release: one plain, reproducible tar.
pub const RELEASE_FILES: &str = "application/vnd.longshore.release.files.v1.tar";
/// Sigstore bundle, version 0.3.
pub const SIGSTORE_BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// cosign's simple signing payload (legacy `.sig` tags).
pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// A bare DSSE envelope.
pub const DSSE: &str = "application/vnd.dsse.envelope.v1+json";
/// The payload type of in-toto statements inside DSSE envelopes.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";

/// The media types sent as `Accept` when a manifest of any kind is wanted.
pub const MANIFESTS: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// Tells whether content of this type is a manifest or an index.
pub fn is_manifest(media_type: &str) -> bool {
    MANIFESTS.contains(&media_type)
}

/// Tells whether content of this type is an index or a manifest list.
pub fn is_index(media_type: &str) -> bool {
    media_type == OCI_INDEX || media_type == DOCKER_LIST
}

/// Cuts parameters (`; charset=…`) and blanks off a `Content-Type` value.
pub fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}
