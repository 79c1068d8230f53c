//! cosign's older signatures: simple signing payloads as layers of the tag `sha256-<hex>.sig`
//! ([cosign § Signature specification](https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md)).
//!
//! One manifest, many layers, each one signature. Signing adds a layer and never takes one away.

use std::collections::BTreeMap;

use oci::{Descriptor, Digest, media_type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::policy::TrustedKey;
use crate::verdict::{Judgement, quote};
use crate::{Error, base64};

/// The annotation that holds a layer's signature in base64.
pub const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// The tag under which the signatures of a subject lie.
pub fn tag(subject: &Digest) -> String {
    format!("{}-{}.sig", subject.algorithm(), subject.hex())
}

/// A manifest of signatures with its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// The configuration's descriptor and bytes. `None` when the manifest is the existing one, whose
    /// configuration is in the registry already.
    pub config: Option<(Descriptor, Vec<u8>)>,
}

/// Adds signature layers to the manifest that the tag points to now (`existing`), or makes the first
/// one. Layers that are there stay, in place and as they are, with all their annotations; a layer with
/// the same content and the same signature is not added again.
///
/// Whoever pushes the result must make sure that the tag did not move meanwhile (`If-Match`), else
/// merge again: a signature must never be lost to another one.
///
/// # Errors
/// [`Error::Invalid`] when `existing` is not an image manifest.
pub fn merge(existing: Option<&[u8]>, layers: &[Descriptor]) -> Result<Merged, Error> {
    let foreign = || {
        Error::invalid(
            "the signature tag points to something that is not a list of signatures, remove the \
             tag and sign again",
        )
    };
    let mut manifest: Map<String, Value> = match existing {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|_| foreign())?,
        None => Map::new(),
    };
    let mut all: Vec<Value> = match manifest.get("layers") {
        Some(Value::Array(layers)) => layers.clone(),
        _ if existing.is_some() => return Err(foreign()),
        _ => Vec::new(),
    };
    let digests = |layers: &[Value]| -> Option<Vec<String>> {
        layers
            .iter()
            .map(|layer| layer.get("digest")?.as_str().map(str::to_owned))
            .collect()
    };
    digests(&all).ok_or_else(foreign)?;
    let before = all.len();
    for layer in layers {
        let same = |other: &Value| {
            other["digest"] == json!(layer.digest)
                && other["annotations"][SIGNATURE].as_str()
                    == layer.annotations.get(SIGNATURE).map(String::as_str)
        };
        if !all.iter().any(same) {
            let layer = serde_json::to_value(layer)
                .map_err(|_| Error::invalid("the signature cannot be encoded"))?;
            all.push(layer);
        }
    }
    if let Some(bytes) = existing
        && all.len() == before
    {
        return Ok(Merged {
            manifest: bytes.to_vec(),
            config: None,
        });
    }

    // cosign reads the manifest as an image, so it gets an image's configuration: one uncompressed
    // layer for each signature.
    let diff_ids = digests(&all).ok_or_else(foreign)?;
    let history = vec![json!({"created": NEVER}); all.len()];
    let config = json!({
        "architecture": "",
        "created": NEVER,
        "history": history,
        "os": "",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {},
    })
    .to_string()
    .into_bytes();
    let config_descriptor = Descriptor::of(media_type::OCI_CONFIG, &config);
    manifest.insert("schemaVersion".to_owned(), json!(2));
    manifest
        .entry("mediaType")
        .or_insert_with(|| json!(media_type::OCI_MANIFEST));
    manifest.insert("config".to_owned(), json!(config_descriptor));
    manifest.insert("layers".to_owned(), Value::Array(all));
    Ok(Merged {
        manifest: Value::Object(manifest).to_string().into_bytes(),
        config: Some((config_descriptor, config)),
    })
}

/// Judges one layer: its payload and the annotations that the manifest gives it.
pub(crate) fn judge(
    payload: &[u8],
    annotations: &BTreeMap<String, String>,
    subject: &Digest,
    keys: &[TrustedKey],
) -> Judgement {
    let signature = annotations
        .get(SIGNATURE)
        .and_then(|text| base64::decode(text))
        .filter(|signature| !signature.is_empty());
    let Some(signature) = signature else {
        return Judgement::Malformed(format!("its annotation `{SIGNATURE}` holds no signature"));
    };
    // The key, the certificate and the log entry that annotations may hold are never looked at.
    let signer = keys
        .iter()
        .position(|trusted| trusted.key.verifies(payload, &signature));
    let Some(signer) = signer else {
        return match parse(payload) {
            Ok(_) => Judgement::Stranger("no trusted key made this signature".to_owned()),
            Err(reason) => Judgement::Malformed(reason),
        };
    };
    let label = &keys[signer].label;
    match parse(payload) {
        Ok(named) if named == subject.to_string() => Judgement::Accepted(signer),
        Ok(named) => Judgement::Broken(format!(
            "it is signed by `{label}` but for another digest, {}",
            quote(&named)
        )),
        Err(reason) => Judgement::Broken(format!("it is signed by `{label}` but {reason}")),
    }
}

/// The payload that signs `subject` in the repository `reference` (`host/name`), in cosign's form.
pub(crate) fn payload(subject: &Digest, reference: &str) -> Vec<u8> {
    json!({
        "critical": {
            "identity": {"docker-reference": reference},
            "image": {"docker-manifest-digest": subject},
            "type": TYPE,
        },
        "optional": null,
    })
    .to_string()
    .into_bytes()
}

/// The digest that a payload signs. The reference in it is not compared: a signature stays good when
/// its image is copied to another repository.
fn parse(payload: &[u8]) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        image: Image,
        #[serde(rename = "type")]
        kind: String,
    }
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "docker-manifest-digest")]
        digest: String,
    }
    let payload: Payload = serde_json::from_slice(payload)
        .map_err(|_| "its payload is not a simple signing document".to_owned())?;
    if payload.critical.kind != TYPE {
        return Err(format!(
            "its payload is of type {}, not `{TYPE}`",
            quote(&payload.critical.kind)
        ));
    }
    Ok(payload.critical.image.digest)
}

const TYPE: &str = "cosign container image signature";
const NEVER: &str = "0001-01-01T00:00:00Z";
