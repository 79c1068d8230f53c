//! Verification: evidence and a policy in, a verdict out.

use oci::evidence::{MAX_MANIFEST, MAX_PAYLOAD, RawEvidence};
use oci::{Digest, Manifest, media_type};

use crate::policy::Policy;
use crate::verdict::{AcceptedSignature, Judgement, Outcome, RejectedEvidence, Verdict, quote};
use crate::{bundle, simple_signing};

/// Verifies a subject against a policy. Pure: the same arguments always give the same verdict.
///
/// Every piece of evidence is judged by itself, in both shapes, whatever the others are. An invalid
/// policy ([`Policy::check`]) allows nothing.
pub fn verify(subject: &Digest, evidence: &[RawEvidence], policy: &Policy) -> Verdict {
    let mut tally = Tally::default();
    for piece in evidence {
        examine(piece, subject, policy, &mut tally);
    }
    let (outcome, message) = match policy.check() {
        Ok(()) => tally.conclude(subject, policy),
        Err(error) => (Outcome::NoEvidence, error.to_string()),
    };
    Verdict {
        digest: subject.clone(),
        policy: policy.name.clone(),
        outcome,
        message,
        accepted: tally.accepted,
        rejected: tally.rejected,
    }
}

fn examine(piece: &RawEvidence, subject: &Digest, policy: &Policy, tally: &mut Tally) {
    let evidence = &piece.descriptor.digest;
    let malformed = |reason: &str| Judgement::Malformed(reason.to_owned());
    if piece.manifest.len() > MAX_MANIFEST {
        return tally.add(evidence, policy, "", malformed("its manifest is too large"));
    }
    // The caller has checked this. A verdict names evidence by digest, so it is checked where it is
    // named.
    if !evidence.matches(&piece.manifest) {
        return tally.add(
            evidence,
            policy,
            "",
            malformed("its manifest has another digest"),
        );
    }
    let manifest = match Manifest::parse(&piece.manifest, "") {
        Ok(manifest) => manifest,
        Err(error) => {
            let reason = format!("its manifest cannot be read: {error}");
            return tally.add(evidence, policy, "", Judgement::Malformed(reason));
        }
    };
    let layers = manifest.layers.unwrap_or_default();
    let mut is_signature = false;
    for layer in &layers {
        let (shape, is_bundle) = if bundle::is_bundle(&layer.media_type) {
            ("bundle", true)
        } else if layer.media_type == media_type::SIMPLE_SIGNING {
            ("legacy", false)
        } else {
            continue;
        };
        is_signature = true;
        // The manifest says what a layer is and what its annotations are; from the caller comes
        // nothing but the content, and only under the right digest.
        let content = piece
            .layers
            .iter()
            .map(|raw| raw.content.as_slice())
            .find(|content| content.len() as u64 == layer.size && layer.digest.matches(content));
        let judgement = match content {
            None => malformed("its payload was not found or is too large"),
            Some(content) if content.len() > MAX_PAYLOAD => malformed("its payload is too large"),
            Some(_) if is_bundle && layers.len() != 1 => {
                malformed("a manifest with a bundle must have exactly one layer")
            }
            Some(content) if is_bundle => bundle::judge(content, subject, &policy.keys),
            Some(content) => {
                simple_signing::judge(content, &layer.annotations, subject, &policy.keys)
            }
        };
        tally.add(evidence, policy, shape, judgement);
    }
    if !is_signature {
        let kind = match layers.first() {
            Some(layer) => format!("it holds {}, not a signature", quote(&layer.media_type)),
            None => "it holds nothing".to_owned(),
        };
        tally.add(evidence, policy, "", Judgement::NotSignature(kind));
    }
}

#[derive(Default)]
struct Tally {
    accepted: Vec<AcceptedSignature>,
    rejected: Vec<RejectedEvidence>,
    is_broken: bool,
    is_strange: bool,
}

impl Tally {
    fn add(&mut self, evidence: &Digest, policy: &Policy, shape: &str, judgement: Judgement) {
        let reason = match judgement {
            Judgement::Accepted(signer) => {
                let trusted = &policy.keys[signer];
                let accepted = AcceptedSignature {
                    label: trusted.label.clone(),
                    key: trusted.key.id(),
                    evidence: evidence.clone(),
                    shape: shape.to_owned(),
                };
                if !self.accepted.contains(&accepted) {
                    self.accepted.push(accepted);
                }
                return;
            }
            Judgement::NotSignature(reason) | Judgement::Malformed(reason) => reason,
            Judgement::Stranger(reason) => {
                self.is_strange = true;
                reason
            }
            Judgement::Broken(reason) => {
                self.is_broken = true;
                reason
            }
        };
        let rejected = RejectedEvidence {
            evidence: evidence.clone(),
            reason,
        };
        // Many layers are often refused for one reason.
        if !self.rejected.contains(&rejected) {
            self.rejected.push(rejected);
        }
    }

    fn conclude(&self, subject: &Digest, policy: &Policy) -> (Outcome, String) {
        let mut signers: Vec<&str> = self.accepted.iter().map(|one| one.key.as_str()).collect();
        signers.sort_unstable();
        signers.dedup();
        let signed = signers.len();
        let needed = policy.threshold;
        let name = &policy.name;
        if signed >= needed {
            let mut labels: Vec<&str> =
                self.accepted.iter().map(|one| one.label.as_str()).collect();
            labels.sort_unstable();
            labels.dedup();
            return (
                Outcome::Verified,
                format!(
                    "{signed} of {needed} needed key(s) of policy `{name}` signed `{subject}` \
                     (`{}`): signature, digest and kind were checked; no certificate, transparency \
                     log or timestamp was",
                    labels.join("`, `")
                ),
            );
        }
        if self.is_broken {
            return (
                Outcome::BadSignature,
                format!(
                    "a signature that involves a trusted key of policy `{name}` is broken or names \
                     another digest than `{subject}`; {signed} of {needed} needed key(s) signed it"
                ),
            );
        }
        if signed > 0 {
            return (
                Outcome::NoEvidence,
                format!(
                    "only {signed} of {needed} needed keys of policy `{name}` signed `{subject}`, \
                     sign it with another one"
                ),
            );
        }
        if self.is_strange {
            return (
                Outcome::WrongIdentity,
                format!(
                    "`{subject}` is signed, but by no key of policy `{name}`, sign it with a trusted \
                     key or trust the one that signed it"
                ),
            );
        }
        let found = match self.rejected.len() {
            0 => "nothing is attached to it".to_owned(),
            n => format!("{n} other piece(s) of evidence do not count"),
        };
        (
            Outcome::NoEvidence,
            format!("`{subject}` has no signature for policy `{name}`: {found}"),
        )
    }
}
