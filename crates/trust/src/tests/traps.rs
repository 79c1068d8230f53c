//! The traps that others fell into: each is evidence that looks right and must not count, or must not hide what counts.

use super::*;

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
