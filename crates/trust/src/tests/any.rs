//! What must hold for any bytes and any set of evidence.

use super::*;

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
