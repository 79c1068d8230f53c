//! DSSE envelopes ([dsse § Protocol](https://github.com/secure-systems-lab/dsse/blob/master/protocol.md)).

use serde::{Deserialize, Serialize};

use crate::base64;

/// An envelope as it stands in a bundle.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

/// One signature.
///
/// `keyid` is not read. It may be empty or `SHA256:` and an SSH fingerprint, and the bundle
/// specification wants the hint there, which cosign then refuses; so it is not written either.
#[derive(Debug, Serialize, Deserialize)]
struct Signature {
    sig: String,
}

/// An envelope, decoded. Nothing of it is verified.
pub(crate) struct Decoded {
    pub(crate) payload_type: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) signature: Vec<u8>,
}

impl Decoded {
    /// The bytes that were signed.
    pub(crate) fn message(&self) -> Vec<u8> {
        pre_authentication_encoding(&self.payload_type, &self.payload)
    }
}

impl Envelope {
    pub(crate) fn new(payload_type: &str, payload: &[u8], signature: &[u8]) -> Self {
        Self {
            payload: base64::encode(payload),
            payload_type: payload_type.to_owned(),
            signatures: vec![Signature {
                sig: base64::encode(signature),
            }],
        }
    }

    /// Decodes an envelope, which must have exactly one signature as in every bundle.
    pub(crate) fn decode(self) -> Result<Decoded, &'static str> {
        let [signature] = self.signatures.as_slice() else {
            return Err("its envelope does not have exactly one signature");
        };
        Ok(Decoded {
            payload: base64::decode(&self.payload).ok_or("its payload is not base64")?,
            signature: base64::decode(&signature.sig)
                .filter(|signature| !signature.is_empty())
                .ok_or("its signature is not base64")?,
            payload_type: self.payload_type,
        })
    }
}

/// What is signed: `DSSEv1`, then type and payload, each after its length.
pub(crate) fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    );
    [head.as_bytes(), payload].concat()
}
