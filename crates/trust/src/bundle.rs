//! Sigstore bundles, version 0.3, whose verification material is a public key
//! ([protobuf-specs § Bundle](https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_bundle.proto)).

use oci::{Digest, media_type};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::dsse::Envelope;
use crate::policy::TrustedKey;
use crate::statement::{SIGN, Statement};
use crate::verdict::{Judgement, quote};

/// Tells whether a layer of this media type claims to be a bundle, of whatever version.
pub(crate) fn is_bundle(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.dev.sigstore.bundle")
}

/// Judges one bundle.
///
/// The order matters: what a trusted key verifies is judged by its payload. What none verifies is
/// someone else's, except that a hint which names a trusted key makes it a broken signature.
pub(crate) fn judge(content: &[u8], subject: &Digest, keys: &[TrustedKey]) -> Judgement {
    let bundle: Bundle = match serde_json::from_slice(content) {
        Ok(bundle) => bundle,
        Err(error) => return Judgement::Malformed(format!("it is not a Sigstore bundle: {error}")),
    };
    if !matches!(
        bundle.media_type.as_str(),
        media_type::SIGSTORE_BUNDLE | V0_3_PARAMETER
    ) {
        return Judgement::Malformed(format!(
            "it is a bundle of version {}, only 0.3 is supported",
            quote(&bundle.media_type)
        ));
    }
    let envelope = match (bundle.dsse_envelope, bundle.message_signature) {
        (Some(envelope), None) => envelope,
        (None, Some(_)) => {
            return Judgement::NotSignature("it signs a file, not an image".to_owned());
        }
        _ => {
            return Judgement::Malformed("its bundle does not have exactly one content".to_owned());
        }
    };
    let decoded = match envelope.decode() {
        Ok(decoded) => decoded,
        Err(reason) => return Judgement::Malformed(reason.to_owned()),
    };
    let material = bundle.verification_material;
    let hint = match (
        material.public_key,
        material.certificate,
        material.x509_certificate_chain,
    ) {
        (Some(key), None, None) => key.hint.unwrap_or_default(),
        // A statement about something else does not become a signature by its certificate.
        (None, Some(_), None) | (None, None, Some(_)) => {
            return match Statement::parse(&decoded.payload) {
                Ok(statement) if statement.predicate_type != SIGN => other(&statement),
                _ => Judgement::Stranger(
                    "it is signed with a certificate, the policy names keys".to_owned(),
                ),
            };
        }
        _ => {
            return Judgement::Malformed(
                "its bundle does not have exactly one verification material".to_owned(),
            );
        }
    };

    let statement = if decoded.payload_type == media_type::IN_TOTO {
        Statement::parse(&decoded.payload)
    } else {
        Err("its payload is not an in-toto statement")
    };
    let message = decoded.message();
    let signer = keys
        .iter()
        .position(|trusted| trusted.key.verifies(&message, &decoded.signature));
    match (signer, statement) {
        // Without the predicate that was asked for, an SBOM by the same key would pass as a
        // signature of the image.
        (_, Ok(statement)) if statement.predicate_type != SIGN => other(&statement),
        (Some(signer), Ok(statement)) if statement.names(subject) => Judgement::Accepted(signer),
        (Some(signer), Ok(_)) => Judgement::Broken(format!(
            "it is signed by `{}` but for another digest",
            keys[signer].label
        )),
        (Some(signer), Err(reason)) => Judgement::Broken(format!(
            "it is signed by `{}` but {reason}",
            keys[signer].label
        )),
        (None, statement) => match keys.iter().find(|trusted| trusted.key.hint() == hint) {
            Some(trusted) => Judgement::Broken(format!(
                "it claims to be signed by `{}` but the signature does not fit",
                trusted.label
            )),
            None => match statement {
                Ok(_) => Judgement::Stranger(format!(
                    "it is signed by a key that is not trusted (hint {})",
                    quote(&hint)
                )),
                Err(reason) => Judgement::Malformed(reason.to_owned()),
            },
        },
    }
}

/// Makes the bundle of an envelope that the key with this hint signed.
pub(crate) fn encode(hint: String, envelope: Envelope) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Bundle {
        media_type: media_type::SIGSTORE_BUNDLE.to_owned(),
        verification_material: Material {
            public_key: Some(PublicKeyHint { hint: Some(hint) }),
            certificate: None,
            x509_certificate_chain: None,
        },
        dsse_envelope: Some(envelope),
        message_signature: None,
    })
}

fn other(statement: &Statement) -> Judgement {
    Judgement::NotSignature(format!(
        "it is an attestation of type {}, not a signature",
        quote(&statement.predicate_type)
    ))
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dsse_envelope: Option<Envelope>,
    #[serde(default, skip_serializing)]
    message_signature: Option<IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public_key: Option<PublicKeyHint>,
    #[serde(default, skip_serializing)]
    certificate: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    x509_certificate_chain: Option<IgnoredAny>,
}

#[derive(Serialize, Deserialize)]
struct PublicKeyHint {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// The other way to write version 0.3.
const V0_3_PARAMETER: &str = "application/vnd.dev.sigstore.bundle+json;version=0.3";
