//! Verification and signing as a whole: what real cosign versions wrote, the traps that others fell
//! into, and what must hold for any bytes.

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

// ---- Traps ----

#[test]
fn a_stranger_never_hides_a_trusted_signature() {
    let ours = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let theirs = sign(
        &key(2),
        &subject(),
        "host/app",
        Some(&ours.legacy.manifest),
        NOW,
    )
    .unwrap();
    let broken = RawEvidence {
        manifest: b"nonsense".to_vec(),
        ..referrer(&ours.bundle)
    };
    // cosign takes any bundle as a reason not to look at `.sig`.
    let evidence = [
        broken,
        cosign("attestation"),
        referrer(&theirs.bundle),
        tagged(&merge_blobs(&theirs.legacy, &ours.legacy)),
    ];
    let verdict = verify(&subject().digest, &evidence, &policy(&[&key(1)], 1));
    assert_eq!(verdict.outcome, Outcome::Verified, "{verdict:?}");
    assert_eq!(verdict.rejected.len(), 4, "{verdict:?}");
    // The strangers alone.
    let verdict = verify(&subject().digest, &evidence[..3], &policy(&[&key(1)], 1));
    assert_eq!(verdict.outcome, Outcome::WrongIdentity);
}

#[test]
fn a_threshold_counts_keys_not_signatures() {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let later = sign(
        &key(1),
        &subject(),
        "host/other",
        None,
        "2027-01-01T00:00:00Z",
    )
    .unwrap();
    let evidence = [
        referrer(&signed.bundle),
        referrer(&later.bundle),
        tagged(&signed.legacy),
        tagged(&later.legacy),
    ];
    let two = policy(&[&key(1), &key(2)], 2);
    let verdict = verify(&subject().digest, &evidence, &two);
    assert_eq!(verdict.outcome, Outcome::NoEvidence);
    assert!(
        verdict.message.contains("only 1 of 2"),
        "{}",
        verdict.message
    );
    assert_eq!(verdict.accepted.len(), 4);

    // One key under two labels is one key.
    let doubled = policy(&[&key(1), &key(1)], 2);
    assert!(doubled.check().is_err());
    assert!(!verify(&subject().digest, &evidence, &doubled).is_allowed());
}

#[test]
fn a_policy_that_asks_for_nothing_allows_nothing() {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let evidence = [referrer(&signed.bundle)];
    for policy in [
        policy(&[&key(1)], 0),
        policy(&[], 0),
        policy(&[], 1),
        policy(&[&key(1)], 2),
    ] {
        assert!(policy.check().is_err());
        let verdict = verify(&subject().digest, &evidence, &policy);
        assert_eq!(verdict.outcome, Outcome::NoEvidence);
    }
}

#[test]
fn nothing_and_things_that_are_no_signatures_are_no_evidence() {
    let policy = policy(&[&key(1)], 1);
    let verdict = verify(&subject().digest, &[], &policy);
    assert_eq!(verdict.outcome, Outcome::NoEvidence);
    assert!(verdict.message.contains("nothing is attached"));
    let sbom = evidence(
        EvidenceSource::Referrer(subject().digest),
        "application/vnd.cyclonedx+json",
        b"{}",
        &[],
    );
    let dsse = evidence(
        EvidenceSource::Tag("sha256-00.att".to_owned()),
        media_type::DSSE,
        b"{}",
        &[],
    );
    let verdict = verify(&subject().digest, &[sbom, dsse], &policy);
    assert_eq!(verdict.outcome, Outcome::NoEvidence);
    assert!(
        verdict.rejected[0]
            .reason
            .contains("application/vnd.cyclonedx+json")
    );
}

#[test]
fn a_tampered_bundle_of_a_trusted_key_is_bad() {
    for (field, value) in [
        (
            "payload",
            base64::encode(&statement::signing(&Digest::sha256(b"evil"))),
        ),
        ("payloadType", "text/plain".to_owned()),
    ] {
        let changed = change_bundle(&mut |bundle| bundle["dsseEnvelope"][field] = json!(value));
        let verdict = verify(&subject().digest, &[changed], &policy(&[&key(1)], 1));
        assert_eq!(
            verdict.outcome,
            Outcome::BadSignature,
            "{field}: {verdict:?}"
        );
    }
    let other = key(2).sign(b"something").unwrap();
    let changed = change_bundle(&mut |bundle| {
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = json!(base64::encode(&other));
    });
    let verdict = verify(&subject().digest, &[changed], &policy(&[&key(1)], 1));
    assert_eq!(verdict.outcome, Outcome::BadSignature);
}

#[test]
fn a_tampered_legacy_payload_does_not_count() {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let payload = String::from_utf8(signed.legacy.blobs[0].1.clone()).unwrap();
    let payload = payload.replace(&subject().digest.hex(), &Digest::sha256(b"evil").hex());
    let manifest: Value = serde_json::from_slice(&signed.legacy.manifest).unwrap();
    let signature = manifest["layers"][0]["annotations"][simple_signing::SIGNATURE].clone();
    let changed = legacy(payload.as_bytes(), signature.as_str().unwrap());
    let evil = Digest::sha256(b"evil");
    let verdict = verify(&evil, &[changed], &policy(&[&key(1)], 1));
    assert_eq!(verdict.outcome, Outcome::WrongIdentity);
}

#[test]
fn a_signature_copied_from_another_digest_is_bad() {
    let other = Descriptor::of(media_type::OCI_MANIFEST, b"other");
    let signed = sign(&key(1), &other, "host/app", None, NOW).unwrap();
    for evidence in [referrer(&signed.bundle), tagged(&signed.legacy)] {
        let verdict = verify(&subject().digest, &[evidence], &policy(&[&key(1)], 1));
        assert_eq!(verdict.outcome, Outcome::BadSignature);
        assert!(verdict.rejected[0].reason.contains("for another digest"));
    }
}

#[test]
fn the_kind_of_a_legacy_payload_is_checked() {
    let kind = |kind: &str| {
        json!({
            "critical": {
                "identity": {"docker-reference": "host/app"},
                "image": {"docker-manifest-digest": subject().digest},
                "type": kind,
            },
            "optional": null,
        })
        .to_string()
        .into_bytes()
    };
    for payload in [
        kind("atomic container signature"),
        kind(""),
        b"{}".to_vec(),
        b"nonsense".to_vec(),
        subject().digest.to_string().into_bytes(),
    ] {
        let signature = base64::encode(&key(1).sign(&payload).unwrap());
        let evidence = legacy(&payload, &signature);
        let verdict = verify(&subject().digest, &[evidence], &policy(&[&key(1)], 1));
        assert_eq!(verdict.outcome, Outcome::BadSignature, "{verdict:?}");
    }
    let right = kind("cosign container image signature");
    let signature = base64::encode(&key(1).sign(&right).unwrap());
    let verdict = verify(
        &subject().digest,
        &[legacy(&right, &signature)],
        &policy(&[&key(1)], 1),
    );
    assert!(verdict.is_allowed());
    for signature in ["", "?", "bm9uc2Vuc2U="] {
        let verdict = verify(
            &subject().digest,
            &[legacy(&right, signature)],
            &policy(&[&key(1)], 1),
        );
        assert!(!verdict.is_allowed(), "{signature}");
    }
}

#[test]
fn any_key_id_is_tolerated_and_none_is_trusted() {
    for keyid in ["", "SHA256:abc", &key(1).public().hint(), "nonsense"] {
        let changed = change_bundle(&mut |bundle| {
            bundle["dsseEnvelope"]["signatures"][0]["keyid"] = json!(keyid);
        });
        let verdict = verify(
            &subject().digest,
            std::slice::from_ref(&changed),
            &policy(&[&key(1)], 1),
        );
        assert!(verdict.is_allowed(), "{keyid}: {verdict:?}");
        let verdict = verify(&subject().digest, &[changed], &policy(&[&key(2)], 1));
        assert_eq!(verdict.outcome, Outcome::WrongIdentity);
    }
}

#[test]
fn a_hint_is_optional_and_a_false_hint_changes_nothing() {
    for hint in [
        json!({}),
        json!({"hint": ""}),
        json!({"hint": key(2).public().hint()}),
    ] {
        let changed =
            change_bundle(&mut |bundle| bundle["verificationMaterial"]["publicKey"] = hint.clone());
        let verdict = verify(
            &subject().digest,
            &[changed],
            &policy(&[&key(1), &key(2)], 1),
        );
        assert!(verdict.is_allowed(), "{hint}: {verdict:?}");
        assert_eq!(verdict.accepted[0].label, "key 0");
    }
}

#[test]
fn what_is_not_a_keyed_bundle_of_version_0_3_does_not_count() {
    let no = |name: &str, outcome: Outcome, change: &mut dyn FnMut(&mut Value)| {
        let verdict = verify(
            &subject().digest,
            &[change_bundle(change)],
            &policy(&[&key(1)], 1),
        );
        assert_eq!(verdict.outcome, outcome, "{name}: {verdict:?}");
        assert_eq!(verdict.rejected.len(), 1, "{name}");
    };
    let bundle = "application/vnd.dev.sigstore.bundle";
    for version in [
        "+json;version=0.1",
        "+json;version=0.2",
        ".v0.2+json",
        ".v0.4+json",
        "",
    ] {
        no(version, Outcome::NoEvidence, &mut |b| {
            b["mediaType"] = json!(format!("{bundle}{version}"));
        });
    }
    no("certificate", Outcome::WrongIdentity, &mut |b| {
        b["verificationMaterial"] = json!({"certificate": {"rawBytes": "AA=="}});
    });
    no("chain", Outcome::WrongIdentity, &mut |b| {
        b["verificationMaterial"] = json!({"x509CertificateChain": {"certificates": []}});
    });
    // A key next to a certificate, and a raw key where a certificate belongs.
    no("both", Outcome::NoEvidence, &mut |b| {
        b["verificationMaterial"]["certificate"] =
            json!({"rawBytes": base64::encode(key(1).public().to_pem().as_bytes())});
    });
    no("no material", Outcome::NoEvidence, &mut |b| {
        b["verificationMaterial"] = json!({});
    });
    no("no signature", Outcome::NoEvidence, &mut |b| {
        b["dsseEnvelope"]["signatures"] = json!([]);
    });
    no("two signatures", Outcome::NoEvidence, &mut |b| {
        let one = b["dsseEnvelope"]["signatures"][0].clone();
        b["dsseEnvelope"]["signatures"] = json!([one, one]);
    });
    no("message signature", Outcome::NoEvidence, &mut |b| {
        let b = b.as_object_mut().unwrap();
        b.remove("dsseEnvelope");
        b.insert("messageSignature".to_owned(), json!({}));
    });
    no("both contents", Outcome::NoEvidence, &mut |b| {
        b["messageSignature"] = json!({});
    });
    no("no content", Outcome::NoEvidence, &mut |b| {
        b.as_object_mut().unwrap().remove("dsseEnvelope");
    });
    no("payload", Outcome::NoEvidence, &mut |b| {
        b["dsseEnvelope"]["payload"] = json!("?");
    });

    // The other spelling of the version is the same version.
    let spelled =
        change_bundle(&mut |b| b["mediaType"] = json!(format!("{bundle}+json;version=0.3")));
    assert!(verify(&subject().digest, &[spelled], &policy(&[&key(1)], 1)).is_allowed());
}

#[test]
fn only_the_signing_predicate_of_a_fitting_statement_counts() {
    let digest = subject().digest.hex();
    let statement = |kind: &str, predicate: &str, subjects: Value| json!({"_type": kind, "subject": subjects, "predicateType": predicate, "predicate": {}});
    let own = json!([{"digest": {"sha256": digest}}]);
    let sign = statement::SIGN;
    let v1 = "https://in-toto.io/Statement/v1";
    let check = |statement: Value, payload_type: &str, outcome: Outcome| {
        let evidence = bundle_of(statement.to_string().as_bytes(), payload_type);
        let verdict = verify(&subject().digest, &[evidence], &policy(&[&key(1)], 1));
        assert_eq!(verdict.outcome, outcome, "{statement}: {verdict:?}");
    };
    let in_toto = media_type::IN_TOTO;
    check(statement(v1, sign, own.clone()), in_toto, Outcome::Verified);
    let v0_1 = "https://in-toto.io/Statement/v0.1";
    check(
        statement(v0_1, sign, own.clone()),
        in_toto,
        Outcome::Verified,
    );
    let several =
        json!([{"name": "x"}, {"digest": {"sha512": "0"}}, {"digest": {"sha256": digest}}]);
    check(statement(v1, sign, several), in_toto, Outcome::Verified);

    for predicate in [
        "https://cyclonedx.org/bom",
        "https://slsa.dev/provenance/v1",
        "",
        "https://sigstore.dev/cosign/sign/v2",
        "https://sigstore.dev/cosign/sign/v1/",
    ] {
        check(
            statement(v1, predicate, own.clone()),
            in_toto,
            Outcome::NoEvidence,
        );
    }
    check(
        statement("https://in-toto.io/Statement/v2", sign, own.clone()),
        in_toto,
        Outcome::BadSignature,
    );
    check(
        statement(v1, sign, own.clone()),
        "application/json",
        Outcome::BadSignature,
    );
    check(json!({"subject": own}), in_toto, Outcome::BadSignature);
    for subjects in [
        json!([]),
        json!([{}]),
        json!([{"digest": {"sha256": "00"}}]),
        json!([{"digest": {"sha512": digest}}]),
        json!([{"digest": {"sha256": digest.to_uppercase()}}]),
        json!([{"name": digest}]),
        Value::Array(vec![json!({"digest": {"sha256": digest}}); 1025]),
    ] {
        check(
            statement(v1, sign, subjects),
            in_toto,
            Outcome::BadSignature,
        );
    }
}

#[test]
fn an_sha512_subject_is_signed_by_its_own_digest() {
    let digest = Digest::of(oci::Algorithm::Sha512, b"manifest");
    let subject = Descriptor::new(media_type::OCI_MANIFEST, digest.clone(), 8);
    let signed = sign(&key(1), &subject, "host/app", None, NOW).unwrap();
    assert!(signed.legacy_tag.starts_with("sha512-"));
    for evidence in [referrer(&signed.bundle), tagged(&signed.legacy)] {
        assert!(verify(&digest, &[evidence], &policy(&[&key(1)], 1)).is_allowed());
    }
}

#[test]
fn content_counts_only_under_the_digest_that_the_manifest_names() {
    let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
    let good = referrer(&signed.bundle);
    let deny = |evidence: RawEvidence, reason: &str| {
        let verdict = verify(&subject().digest, &[evidence], &policy(&[&key(1)], 1));
        assert_eq!(verdict.outcome, Outcome::NoEvidence);
        assert!(verdict.rejected[0].reason.contains(reason), "{verdict:?}");
    };
    let mut swapped = good.clone();
    swapped.layers[0].content = b"{}".to_vec();
    deny(swapped, "was not found");
    let mut missing = good.clone();
    missing.layers.clear();
    deny(missing, "was not found");
    let mut renamed = good.clone();
    renamed.descriptor.digest = Digest::sha256(b"x");
    deny(renamed, "another digest");

    // The layer's annotations are the manifest's, not the caller's.
    let mut annotated = tagged(&signed.legacy);
    let mut manifest: Value = serde_json::from_slice(&annotated.manifest).unwrap();
    manifest["layers"][0]
        .as_object_mut()
        .unwrap()
        .remove("annotations");
    annotated.manifest = manifest.to_string().into_bytes();
    annotated.descriptor = Descriptor::of(media_type::OCI_MANIFEST, &annotated.manifest);
    deny(annotated, "holds no signature");

    // Two layers: which one is the bundle?
    let mut doubled = good;
    let mut manifest: Value = serde_json::from_slice(&doubled.manifest).unwrap();
    let layer = manifest["layers"][0].clone();
    manifest["layers"].as_array_mut().unwrap().push(layer);
    doubled.manifest = manifest.to_string().into_bytes();
    doubled.descriptor = Descriptor::of(media_type::OCI_MANIFEST, &doubled.manifest);
    deny(doubled, "exactly one layer");
}

#[test]
fn foreign_text_in_messages_is_short_and_plain() {
    let evil = format!("evil\n\u{1b}[31m`{}", "x".repeat(10_000));
    let piece = evidence(EvidenceSource::Referrer(subject().digest), &evil, b"", &[]);
    let verdict = verify(&subject().digest, &[piece], &policy(&[&key(1)], 1));
    let reason = &verdict.rejected[0].reason;
    assert!(
        reason.len() < 600 && !reason.chars().any(char::is_control),
        "{reason}"
    );
}

#[test]
fn a_verdict_serialises() {
    let verdict = verify(&cosign_subject(), &[cosign("bundle")], &cosign_policy());
    let json = serde_json::to_value(&verdict).unwrap();
    assert_eq!(json["outcome"], "verified");
    assert_eq!(serde_json::from_value::<Verdict>(json).unwrap(), verdict);
}

// ---- What holds for anything ----

proptest! {
    // Elliptic curves are slow without optimisation.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn foreign_bytes_never_panic_nor_pass(manifest: Vec<u8>, content: Vec<u8>, bundle: bool) {
        let kind = if bundle { media_type::SIGSTORE_BUNDLE } else { media_type::SIMPLE_SIGNING };
        let raw = RawEvidence {
            source: EvidenceSource::Referrer(subject().digest),
            descriptor: Descriptor::of("", &manifest),
            manifest,
            layers: Vec::new(),
        };
        let piece = evidence(
            EvidenceSource::Referrer(subject().digest),
            kind,
            &content,
            &[(simple_signing::SIGNATURE, "MEQCIA==")],
        );
        let verdict = verify(&subject().digest, &[raw, piece], &policy(&[&key(1)], 1));
        prop_assert!(!verdict.is_allowed());
        let _ = simple_signing::merge(Some(&content), &[subject()]);
    }

    /// Whatever byte of a bundle changes: it is refused, or still says the same of the same digest
    /// (a changed hint, say), and never says anything of another digest.
    #[test]
    fn a_changed_bundle_never_signs_another_digest(at: prop::sample::Index, to: u8) {
        let signed = sign(&key(1), &subject(), "host/app", None, NOW).unwrap();
        let mut content = signed.bundle.blobs[1].1.clone();
        let at = at.index(content.len());
        content[at] = to;
        let piece = evidence(
            EvidenceSource::Referrer(subject().digest),
            media_type::SIGSTORE_BUNDLE,
            &content,
            &[],
        );
        let other = Digest::sha256(b"other");
        let evidence = [piece];
        prop_assert!(!verify(&other, &evidence, &policy(&[&key(1)], 1)).is_allowed());
        prop_assert!(!verify(&subject().digest, &evidence, &policy(&[&key(2)], 1)).is_allowed());
    }

    #[test]
    fn the_threshold_counts_distinct_trusted_signers(
        signers in proptest::collection::vec((0_u8..5, any::<bool>()), 0..6),
        trusted in proptest::collection::vec(0_u8..5, 1..5),
        threshold in 0_usize..5,
    ) {
        let evidence: Vec<RawEvidence> = signers
            .iter()
            .map(|(signer, bundle)| {
                let signed = sign(&key(*signer), &subject(), "host/app", None, NOW).unwrap();
                if *bundle { referrer(&signed.bundle) } else { tagged(&signed.legacy) }
            })
            .collect();
        let keys: Vec<PrivateKey> = trusted.iter().map(|n| key(*n)).collect();
        let policy = policy(&keys.iter().collect::<Vec<_>>(), threshold);
        let mut good: Vec<u8> =
            signers.iter().map(|one| one.0).filter(|n| trusted.contains(n)).collect();
        good.sort_unstable();
        good.dedup();
        let expected = threshold > 0 && good.len() >= threshold;
        let verdict = verify(&subject().digest, &evidence, &policy);
        prop_assert_eq!(verdict.is_allowed(), expected, "{:?}", verdict);
        // The order of evidence does not matter.
        let reversed: Vec<_> = evidence.into_iter().rev().collect();
        prop_assert_eq!(verify(&subject().digest, &reversed, &policy).outcome, verdict.outcome);
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
