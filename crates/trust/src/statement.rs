//! in-toto statements
//! ([attestation § Statement](https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md)).

use std::collections::BTreeMap;

use oci::Digest;
use serde::Deserialize;
use serde_json::json;

/// The predicate type that makes a statement a signature of an image.
pub(crate) const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";

/// What of a statement matters here. The predicate itself is not looked at.
#[derive(Debug, Deserialize)]
pub(crate) struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    #[serde(rename = "predicateType")]
    pub(crate) predicate_type: String,
    subject: Vec<Subject>,
}

#[derive(Debug, Deserialize)]
struct Subject {
    #[serde(default)]
    digest: BTreeMap<String, String>,
}

impl Statement {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, &'static str> {
        let statement: Self = serde_json::from_slice(payload)
            .map_err(|_| "its payload is not an in-toto statement")?;
        if !matches!(statement.kind.as_str(), V1 | V0_1) {
            return Err("its statement is of an unknown version");
        }
        let too_many = |subject: &Subject| subject.digest.len() > MAX_DIGESTS;
        if statement.subject.len() > MAX_SUBJECTS || statement.subject.iter().any(too_many) {
            return Err("its statement has too many subjects");
        }
        Ok(statement)
    }

    /// Tells whether one of the subjects is this digest.
    pub(crate) fn names(&self, digest: &Digest) -> bool {
        let hash = digest.hex();
        self.subject
            .iter()
            .any(|subject| subject.digest.get(digest.algorithm().name()) == Some(&hash))
    }
}

/// The statement that signs a digest, in cosign's form.
pub(crate) fn signing(digest: &Digest) -> Vec<u8> {
    json!({
        "_type": V1,
        "subject": [{"digest": {digest.algorithm().name(): digest.hex()}}],
        "predicateType": SIGN,
        "predicate": {},
    })
    .to_string()
    .into_bytes()
}

const V1: &str = "https://in-toto.io/Statement/v1";
/// What `cosign attest` writes.
const V0_1: &str = "https://in-toto.io/Statement/v0.1";
const MAX_SUBJECTS: usize = 1024;
const MAX_DIGESTS: usize = 32;
