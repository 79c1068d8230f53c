//! Proof: keys, signatures, their verification, policy and verdict.
//!
//! Evidence comes in as bytes ([`oci::evidence::RawEvidence`]) of which nothing is believed; a
//! [`Policy`] says which keys must have signed; [`verify()`] gives a [`Verdict`] that states what was
//! checked and why each other piece did not count. [`sign()`] makes what cosign of any version
//! verifies: a bundle v0.3 as a referrer, and a layer of the older `.sig` tag.
//!
//! The key decision: this is **our own code over ECDSA P-256 with SHA-256**, the one algorithm that
//! all clients agree on, and it is pure. Time, randomness and bytes come in as arguments; there is no
//! network, no file and no clock, so a verdict can be had offline and repeated later.
//!
//! The rules that hold in every room:
//!
//! - Trust comes from the policy alone. A key or certificate that an artifact brings is never used.
//! - Every error in a piece of evidence rejects that piece, with its reason, and no other piece: a
//!   stranger's signature never hides a trusted one.
//! - A signature is only what says so: an SBOM or a provenance that is signed by a trusted key does
//!   not sign the image.
//! - A threshold counts distinct keys, not signatures.
//!
//! What it does not do: it knows no certificates, no transparency log and no timestamps, and a
//! verdict says so.

mod base64;
mod bundle;
mod dsse;
pub mod key;
mod pem;
mod policy;
mod sign;
pub mod simple_signing;
mod statement;
mod verdict;
mod verify;

pub use policy::{Policy, TrustedKey};
pub use sign::{EvidenceToPush, SignedArtifact, Signer, sign};
pub use verdict::{AcceptedSignature, Outcome, RejectedEvidence, Verdict};
pub use verify::verify;

/// Why a key or a document was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The password does not open the key.
    #[error("the password does not open this key")]
    WrongPassword,
    /// Other.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }
}

#[cfg(test)]
mod tests;
