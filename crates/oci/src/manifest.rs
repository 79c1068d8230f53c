//! A view of a manifest or index beside its exact bytes
//! ([image-spec § Image manifest](https://github.com/opencontainers/image-spec/blob/main/manifest.md),
//! [§ Image index](https://github.com/opencontainers/image-spec/blob/main/image-index.md)).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::descriptor::Descriptor;
use crate::media_type;

/// What a registry and a client need to know of a manifest or an index.
///
/// The bytes it was parsed from stay the truth: it is never used to write a foreign manifest again.
/// For a manifest that this program makes, build this and call [`Manifest::to_bytes`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// The media type that the document claims, empty when it claims none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The type of the artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration of an image manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Descriptor>,
    /// The layers of an image manifest. `None` and empty differ: an artifact without layers has an
    /// empty list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<Descriptor>>,
    /// The children of an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifests: Option<Vec<Descriptor>>,
    /// The manifest that this one refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads the view out of `bytes`, which arrived with this `Content-Type` (may be empty).
    ///
    /// The returned view always has its `media_type` set: what the document claims, else the
    /// content type, else what its fields show.
    ///
    /// # Errors
    /// When the bytes are not such a JSON document, when document and content type contradict each
    /// other, when it is both manifest and index or neither.
    pub fn parse(bytes: &[u8], content_type: &str) -> Result<Self, ManifestError> {
        let mut view: Self = serde_json::from_slice(bytes)
            .map_err(|error| ManifestError::Json(error.to_string()))?;
        if view.schema_version != 2 {
            return Err(ManifestError::SchemaVersion(view.schema_version));
        }
        let sent = media_type::essence(content_type);
        if view.media_type.is_empty() {
            view.media_type = if sent.is_empty() {
                if view.manifests.is_some() {
                    media_type::OCI_INDEX.to_owned()
                } else {
                    media_type::OCI_MANIFEST.to_owned()
                }
            } else {
                sent.to_owned()
            };
        } else if !sent.is_empty() && view.media_type != sent {
            return Err(ManifestError::ContentType {
                document: view.media_type,
                header: sent.to_owned(),
            });
        }
        match (&view.config, &view.manifests) {
            (Some(_), Some(_)) => Err(ManifestError::Both),
            (None, None) => Err(ManifestError::Neither),
            (None, Some(_)) if view.layers.is_some() => Err(ManifestError::Both),
            (Some(_), None) if media_type::is_index(&view.media_type) => Err(ManifestError::Kind {
                media_type: view.media_type,
                holds: "config",
            }),
            (None, Some(_))
                if matches!(
                    view.media_type.as_str(),
                    media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST
                ) =>
            {
                Err(ManifestError::Kind {
                    media_type: view.media_type,
                    holds: "manifests",
                })
            }
            _ => Ok(view),
        }
    }

    /// Tells whether this is an index or a manifest list.
    pub fn is_index(&self) -> bool {
        self.manifests.is_some()
    }

    /// What a referrers listing shows as `artifactType`: the manifest's own, else the media type of
    /// its configuration, else nothing
    /// ([distribution-spec § Listing referrers](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers)).
    pub fn listed_artifact_type(&self) -> Option<&str> {
        self.artifact_type
            .as_deref()
            .filter(|text| !text.is_empty())
            .or_else(|| {
                self.config
                    .as_ref()
                    .map(|config| config.media_type.as_str())
            })
            .filter(|text| !text.is_empty())
    }

    /// The blobs that the manifest names: its configuration, then its layers in order.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(self.layers.iter().flatten())
    }

    /// The children of an index, in order.
    pub fn children(&self) -> impl Iterator<Item = &Descriptor> {
        self.manifests.iter().flatten()
    }

    /// The bytes of a manifest that this program makes: compact JSON, fields in a fixed order, so the
    /// same values always give the same digest.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Invariant: every field is plain data with text keys, which always serialises.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Why bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// A manifest with `config` or `layers` and `manifests`.
    #[error("the manifest has both `config` or `layers` and `manifests`")]
    Both,
    /// Header and document disagree.
    #[error("`Content-Type` is `{header}` but the manifest says `{document}`")]
    ContentType {
        /// What the document claims.
        document: String,
        /// What was sent.
        header: String,
    },
    /// Not the JSON of a manifest.
    #[error("the manifest is not valid JSON of the image specification: {0}")]
    Json(String),
    /// Media type and content disagree.
    #[error("media type `{media_type}` does not fit a document with `{holds}`")]
    Kind {
        /// The media type.
        media_type: String,
        /// The field that does not fit.
        holds: &'static str,
    },
    /// Neither an image manifest nor an index.
    #[error("the manifest has neither `config` nor `manifests`")]
    Neither,
    /// Another schema version.
    #[error("`schemaVersion` is {0}, only 2 is supported")]
    SchemaVersion(u32),
}
