//! Verification and signing as a whole: what real cosign versions wrote, the traps that others fell
//! into, and what must hold for any bytes.

mod any;
mod traps;

use std::collections::BTreeMap;

use oci::evidence::{EvidenceSource, RawEvidence, RawLayer};
use oci::{Descriptor, Digest, Manifest, media_type};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::dsse::pre_authentication_encoding;
use crate::key::{PrivateKey, PublicKey};
use crate::*;

// ---- What cosign 2.5 and 3.1 wrote ----

#[test]
fn a_bundle_of_cosign_3_verifies() {
    let verdict = verify(&cosign_subject(), &[cosign("bundle")], &cosign_policy());
    assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
    assert_eq!(verdict.accepted[0].shape, "bundle");
    assert_eq!(verdict.accepted[0].label, "cosign.pub");
    assert!(
        verdict
            .message
            .contains("no certificate, transparency log or timestamp was")
    );
}

#[test]
fn a_legacy_signature_of_cosign_2_verifies() {
    let verdict = verify(&cosign_subject(), &[cosign("legacy")], &cosign_policy());
    assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
    assert_eq!(verdict.accepted[0].shape, "legacy");
}

#[test]
fn an_experimental_referrer_of_cosign_2_verifies() {
    let verdict = verify(
        &cosign_subject(),
        &[cosign("experimental")],
        &cosign_policy(),
    );
    assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
}

/// `cosign verify` itself accepts this one.
#[test]
fn an_attestation_by_a_trusted_key_is_not_a_signature() {
    let verdict = verify(
        &cosign_subject(),
        &[cosign("attestation")],
        &cosign_policy(),
    );
    assert_eq!(verdict.outcome, Outcome::NoEvidence);
    assert!(
        verdict.rejected[0]
            .reason
            .contains("https://cyclonedx.org/bom")
    );
}

#[test]
fn no_evidence_of_cosign_passes_for_another_digest_or_another_key() {
    let other = Digest::sha256(b"other");
    for shape in ["bundle", "legacy", "experimental"] {
        let verdict = verify(&other, &[cosign(shape)], &cosign_policy());
        assert_eq!(verdict.outcome, Outcome::BadSignature, "{shape}");
        let verdict = verify(&cosign_subject(), &[cosign(shape)], &policy(&[&key(1)], 1));
        assert_eq!(verdict.outcome, Outcome::WrongIdentity, "{shape}");
    }
}

// ---- What we write ----

#[test]
fn the_bundle_has_the_form_of_cosign() {
    let signed = sign(
        &key(1),
        &subject(),
        "host/app",
        None,
        "2026-11-21T06:15:06Z",
    )
    .unwrap();
    let ours: Value = serde_json::from_slice(&signed.bundle.manifest).unwrap();
    let theirs: Value = serde_json::from_slice(&cosign("bundle").manifest).unwrap();
    // The same keys everywhere, and the same values where they do not depend on subject and key.
    assert_eq!(paths(&ours), paths(&theirs));
    for pointer in [
        "/config",
        "/annotations",
        "/artifactType",
        "/mediaType",
        "/schemaVersion",
    ] {
        assert_eq!(ours.pointer(pointer), theirs.pointer(pointer), "{pointer}");
    }
    let our_bundle: Value = serde_json::from_slice(&signed.bundle.blobs[1].1).unwrap();
    let their_bundle: Value = serde_json::from_slice(&cosign("bundle").layers[0].content).unwrap();
    assert_eq!(paths(&our_bundle), paths(&their_bundle));
    let payload = our_bundle["dsseEnvelope"]["payload"].as_str().unwrap();
    assert_eq!(
        String::from_utf8(base64::decode(payload).unwrap()).unwrap(),
        format!(
            "{{\"_type\":\"https://in-toto.io/Statement/v1\",\"subject\":[{{\"digest\":{{\"sha256\":\"{}\"}}}}],\
             \"predicateType\":\"https://sigstore.dev/cosign/sign/v1\",\"predicate\":{{}}}}",
            subject().digest.hex()
        )
    );
    assert_eq!(signed.bundle.blobs[0].1, b"{}");
}

#[test]
fn the_legacy_layer_has_the_bytes_of_cosign() {
    let private =
        PrivateKey::from_encrypted_pem(include_str!("../testdata/cosign.key"), b"secret").unwrap();
    let manifest = include_bytes!("../testdata/subject.manifest.json");
    let subject = Descriptor::of(media_type::OCI_MANIFEST, manifest);
    let signed = sign(&private, &subject, "127.0.0.1:5977/app/web", None, NOW).unwrap();
    assert_eq!(signed.legacy.blobs[0].1, cosign("legacy").layers[0].content);
    assert_eq!(
        signed.legacy_tag,
        format!("sha256-{}.sig", subject.digest.hex())
    );
    let ours: Value = serde_json::from_slice(&signed.legacy.manifest).unwrap();
    let theirs: Value = serde_json::from_slice(&cosign("legacy").manifest).unwrap();
    assert_eq!(paths(&ours), paths(&theirs));
    assert_eq!(ours["config"]["mediaType"], theirs["config"]["mediaType"]);

    // cosign's own signature by the same key is there: nothing is added, not one byte changed.
    let again = sign(
        &private,
        &subject,
        "127.0.0.1:5977/app/web",
        Some(&cosign("legacy").manifest),
        NOW,
    );
    assert_eq!(again.unwrap().legacy.manifest, cosign("legacy").manifest);
}

#[test]
fn both_shapes_verify_alone_and_together() {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let policy = policy(&[&key(1)], 1);
    let (bundle, legacy) = (referrer(&signed.bundle), tagged(&signed.legacy));
    for evidence in [
        vec![bundle.clone()],
        vec![legacy.clone()],
        vec![bundle, legacy],
    ] {
        let verdict = verify(&subject().digest, &evidence, &policy);
        assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
        assert_eq!(verdict.accepted.len(), evidence.len());
        assert!(verdict.rejected.is_empty());
    }
}

#[test]
fn the_legacy_manifest_only_grows_and_signing_twice_adds_nothing() {
    let first = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let twice = sign(
        &key(1),
        &subject(),
        "host/app",
        Some(&first.legacy.manifest),
        NOW,
    )
    .unwrap();
    assert_eq!(twice.legacy.manifest, first.legacy.manifest);

    // A layer of someone else, with annotations that nobody knows, stays as it is.
    let mut foreign: Value = serde_json::from_slice(&first.legacy.manifest).unwrap();
    foreign["layers"][0]["annotations"]["unknown"] = json!("kept");
    foreign["layers"][0]["other"] = json!({"kept": true});
    let foreign = foreign.to_string().into_bytes();
    let both = sign(&key(2), &subject(), "host/app", Some(&foreign), NOW).unwrap();
    let manifest: Value = serde_json::from_slice(&both.legacy.manifest).unwrap();
    let before: Value = serde_json::from_slice(&foreign).unwrap();
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 2);
    assert_eq!(manifest["layers"][0], before["layers"][0]);

    // The payloads are the same bytes under one digest, the signatures are two.
    let evidence = [tagged(&both.legacy)];
    let verdict = verify(
        &subject().digest,
        &evidence,
        &policy(&[&key(1), &key(2)], 2),
    );
    assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
}

#[test]
fn a_signature_tag_with_other_content_is_not_overwritten() {
    for existing in [
        &b"nonsense"[..],
        b"{}",
        b"[]",
        b"{\"manifests\":[]}",
        b"{\"layers\":[1]}",
        b"{\"layers\":{}}",
    ] {
        let error = sign(&key(1), &subject(), "host/app", Some(existing), NOW).unwrap_err();
        assert!(error.to_string().contains("remove the tag"), "{error}");
    }
}

// ---- Helpers ----

const NOW: &str = "2026-11-21T06:00:00Z";

fn key(n: u8) -> PrivateKey {
    PrivateKey::generate(&mut |buffer| buffer.fill(n + 1))
}

fn policy(keys: &[&PrivateKey], threshold: usize) -> Policy {
    Policy {
        name: "test".to_owned(),
        keys: keys
            .iter()
            .enumerate()
            .map(|(n, key)| TrustedKey {
                label: format!("key {n}"),
                key: key.public(),
            })
            .collect(),
        threshold,
    }
}

fn subject() -> Descriptor {
    Descriptor::of(media_type::OCI_MANIFEST, b"a manifest")
}

fn referrer(pushed: &EvidenceToPush) -> RawEvidence {
    raw(EvidenceSource::Referrer(subject().digest), pushed)
}

fn tagged(pushed: &EvidenceToPush) -> RawEvidence {
    raw(
        EvidenceSource::Tag(simple_signing::tag(&subject().digest)),
        pushed,
    )
}

/// What a client would fetch of what was pushed.
fn raw(source: EvidenceSource, pushed: &EvidenceToPush) -> RawEvidence {
    let manifest = Manifest::parse(&pushed.manifest, media_type::OCI_MANIFEST).unwrap();
    let layers = manifest
        .layers
        .unwrap()
        .into_iter()
        .map(|descriptor| {
            let blob = pushed
                .blobs
                .iter()
                .find(|blob| blob.0.digest == descriptor.digest);
            RawLayer {
                content: blob.unwrap().1.clone(),
                descriptor,
            }
        })
        .collect();
    RawEvidence {
        source,
        descriptor: Descriptor::of(media_type::OCI_MANIFEST, &pushed.manifest),
        manifest: pushed.manifest.clone(),
        layers,
    }
}

fn merge_blobs(to: &EvidenceToPush, from: &EvidenceToPush) -> EvidenceToPush {
    let mut merged = to.clone();
    merged.blobs.extend(from.blobs.iter().cloned());
    merged
}

fn evidence(
    source: EvidenceSource,
    kind: &str,
    content: &[u8],
    annotations: &[(&str, &str)],
) -> RawEvidence {
    let layer = Descriptor {
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect::<BTreeMap<_, _>>(),
        ..Descriptor::of(kind, content)
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: Some(Descriptor::empty()),
        layers: Some(vec![layer.clone()]),
        ..Manifest::default()
    }
    .to_bytes();
    RawEvidence {
        source,
        descriptor: Descriptor::of(media_type::OCI_MANIFEST, &manifest),
        manifest,
        layers: vec![RawLayer {
            descriptor: layer,
            content: content.to_vec(),
        }],
    }
}

fn legacy(payload: &[u8], signature: &str) -> RawEvidence {
    evidence(
        EvidenceSource::Tag(simple_signing::tag(&subject().digest)),
        media_type::SIMPLE_SIGNING,
        payload,
        &[(simple_signing::SIGNATURE, signature)],
    )
}

/// Our own good bundle by key 1 with something changed in it.
fn change_bundle(change: &mut dyn FnMut(&mut Value)) -> RawEvidence {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let mut bundle: Value = serde_json::from_slice(&signed.bundle.blobs[1].1).unwrap();
    change(&mut bundle);
    evidence(
        EvidenceSource::Referrer(subject().digest),
        media_type::SIGSTORE_BUNDLE,
        bundle.to_string().as_bytes(),
        &[],
    )
}

/// A bundle in which key 1 signs any payload.
fn bundle_of(payload: &[u8], payload_type: &str) -> RawEvidence {
    let signature = key(1)
        .sign(&pre_authentication_encoding(payload_type, payload))
        .unwrap();
    change_bundle(&mut |bundle| {
        bundle["dsseEnvelope"] = json!({
            "payload": base64::encode(payload),
            "payloadType": payload_type,
            "signatures": [{"sig": base64::encode(&signature)}],
        });
    })
}

/// Every path to a value in a document, without the values.
fn paths(value: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, out: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, &format!("{at}/{key}"), out);
                }
            }
            Value::Array(items) => {
                for value in items {
                    walk(value, &format!("{at}[]"), out);
                }
            }
            _ => out.push(at.to_owned()),
        }
    }
    let mut out = Vec::new();
    walk(value, "", &mut out);
    out.sort();
    out
}

fn cosign_subject() -> Digest {
    Digest::sha256(include_bytes!("../testdata/subject.manifest.json"))
}

fn cosign_policy() -> Policy {
    Policy {
        name: "cosign".to_owned(),
        keys: vec![TrustedKey {
            label: "cosign.pub".to_owned(),
            key: PublicKey::from_pem(include_str!("../testdata/cosign.pub")).unwrap(),
        }],
        threshold: 1,
    }
}

fn cosign(shape: &str) -> RawEvidence {
    macro_rules! file {
        ($name:literal) => {
            (
                &include_bytes!(concat!("../testdata/", $name, ".manifest.json"))[..],
                &include_bytes!(concat!("../testdata/", $name, ".layer.json"))[..],
            )
        };
    }
    let (manifest, layer) = match shape {
        "attestation" => file!("attestation"),
        "bundle" => file!("bundle"),
        "experimental" => file!("experimental"),
        _ => file!("legacy"),
    };
    let view = Manifest::parse(manifest, "").unwrap();
    let source = if view.subject.is_some() {
        EvidenceSource::Referrer(cosign_subject())
    } else {
        EvidenceSource::Tag(simple_signing::tag(&cosign_subject()))
    };
    RawEvidence {
        source,
        descriptor: Descriptor::of(media_type::OCI_MANIFEST, manifest),
        manifest: manifest.to_vec(),
        layers: vec![RawLayer {
            descriptor: view.layers.unwrap()[0].clone(),
            content: layer.to_vec(),
        }],
    }
}
