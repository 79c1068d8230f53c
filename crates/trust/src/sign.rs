//! Signing: both shapes at once, so that every version of cosign verifies.

use std::collections::BTreeMap;

use oci::{Descriptor, Manifest, media_type};

use crate::dsse::{self, Envelope};
use crate::key::PublicKey;
use crate::{Error, base64, bundle, simple_signing, statement};

/// Signs with one key: a file now, hardware later.
pub trait Signer {
    /// ECDSA P-256/SHA-256, ASN.1 DER.
    ///
    /// # Errors
    /// When the key cannot be used.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error>;
    /// The key that verifies it.
    fn public_key(&self) -> PublicKey;
}

/// A signature to push: both shapes, made together so that every cosign version verifies.
#[derive(Clone, Debug)]
pub struct SignedArtifact {
    /// The bundle v0.3 referrer. Pushed by digest.
    pub bundle: EvidenceToPush,
    /// The manifest for the legacy tag, merged with what was there.
    pub legacy: EvidenceToPush,
    /// The legacy tag, `sha256-<hex>.sig`. It only grows.
    pub legacy_tag: String,
}

/// A manifest and its blobs.
#[derive(Clone, Debug)]
pub struct EvidenceToPush {
    /// The manifest's exact bytes (media type: OCI manifest).
    pub manifest: Vec<u8>,
    /// Blobs with descriptors, to be pushed before it.
    pub blobs: Vec<(Descriptor, Vec<u8>)>,
}

/// Signs a subject. `reference` is the repository without tag (`host/name`); `existing_legacy` are
/// the bytes of the manifest that the legacy tag points to now; `created` is RFC 3339.
///
/// Signing again with the same key leaves the legacy manifest as it is, and gives another bundle
/// only when `created` is another.
///
/// # Errors
/// When the key cannot sign, or the legacy tag holds something that is not signatures.
pub fn sign(
    signer: &dyn Signer,
    subject: &Descriptor,
    reference: &str,
    existing_legacy: Option<&[u8]>,
    created: &str,
) -> Result<SignedArtifact, Error> {
    Ok(SignedArtifact {
        bundle: sign_bundle(signer, subject, created)?,
        legacy: sign_legacy(signer, subject, reference, existing_legacy)?,
        legacy_tag: simple_signing::tag(&subject.digest),
    })
}

fn sign_bundle(
    signer: &dyn Signer,
    subject: &Descriptor,
    created: &str,
) -> Result<EvidenceToPush, Error> {
    let payload = statement::signing(&subject.digest);
    let message = dsse::pre_authentication_encoding(media_type::IN_TOTO, &payload);
    let envelope = Envelope::new(media_type::IN_TOTO, &payload, &signer.sign(&message)?);
    let content = bundle::encode(signer.public_key().hint(), envelope)
        .map_err(|_| Error::invalid("the bundle cannot be encoded"))?;
    let layer = Descriptor::of(media_type::SIGSTORE_BUNDLE, &content);
    let config = Descriptor {
        // cosign writes it here too, and old lists of referrers take the type from nowhere else.
        artifact_type: Some(media_type::SIGSTORE_BUNDLE.to_owned()),
        ..Descriptor::empty()
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some(media_type::SIGSTORE_BUNDLE.to_owned()),
        config: Some(config),
        layers: Some(vec![layer.clone()]),
        manifests: None,
        subject: Some(Descriptor::new(
            &subject.media_type,
            subject.digest.clone(),
            subject.size,
        )),
        annotations: BTreeMap::from(
            [
                ("dev.sigstore.bundle.content", "dsse-envelope"),
                ("dev.sigstore.bundle.predicateType", statement::SIGN),
                ("org.opencontainers.image.created", created),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        ),
    };
    Ok(EvidenceToPush {
        manifest: manifest.to_bytes(),
        blobs: vec![(Descriptor::empty(), b"{}".to_vec()), (layer, content)],
    })
}

fn sign_legacy(
    signer: &dyn Signer,
    subject: &Descriptor,
    reference: &str,
    existing: Option<&[u8]>,
) -> Result<EvidenceToPush, Error> {
    let payload = simple_signing::payload(&subject.digest, reference);
    let mut layer = Descriptor::of(media_type::SIMPLE_SIGNING, &payload);
    let blob = layer.clone();
    // Another signer's signatures over the same bytes may differ each time (only ours are
    // deterministic), so one of this key that is there already is taken instead of a new one.
    let signature = match existing.and_then(|bytes| signature_in(bytes, &layer, &payload, signer)) {
        Some(signature) => signature,
        None => base64::encode(&signer.sign(&payload)?),
    };
    layer
        .annotations
        .insert(simple_signing::SIGNATURE.to_owned(), signature);
    let merged = simple_signing::merge(existing, &[layer])?;
    let mut blobs = vec![(blob, payload)];
    blobs.extend(merged.config);
    Ok(EvidenceToPush {
        manifest: merged.manifest,
        blobs,
    })
}

/// The signature of this key over this payload that the manifest holds already.
fn signature_in(
    manifest: &[u8],
    layer: &Descriptor,
    payload: &[u8],
    signer: &dyn Signer,
) -> Option<String> {
    let key = signer.public_key();
    let manifest = Manifest::parse(manifest, "").ok()?;
    manifest
        .layers?
        .into_iter()
        .filter(|other| other.digest == layer.digest)
        .filter_map(|mut other| other.annotations.remove(simple_signing::SIGNATURE))
        .find(|text| base64::decode(text).is_some_and(|der| key.verifies(payload, &der)))
}
