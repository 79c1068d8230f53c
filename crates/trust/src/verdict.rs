//! The outcome of a policy for a digest.

use oci::Digest;
use serde::{Deserialize, Serialize};

/// The outcome of one policy for one digest; serialises for `explain`, attempts and `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The subject.
    pub digest: Digest,
    /// The policy's name.
    pub policy: String,
    /// The typed outcome.
    pub outcome: Outcome,
    /// One sentence that states exactly what was checked or missing.
    pub message: String,
    /// Signatures that counted.
    pub accepted: Vec<AcceptedSignature>,
    /// Evidence that was looked at and did not count, with the reason.
    pub rejected: Vec<RejectedEvidence>,
}

impl Verdict {
    /// Whether the digest may go on.
    pub fn is_allowed(&self) -> bool {
        self.outcome == Outcome::Verified
    }
}

/// A typed outcome. None of them but `Verified` lets a digest go on, and all of them may change when
/// more evidence arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Enough trusted keys signed this digest.
    Verified,
    /// Nothing that claims to be a signature of it was found, or fewer than the threshold (retry: it
    /// may arrive later).
    NoEvidence,
    /// A signature by a trusted key is broken or names another digest.
    BadSignature,
    /// Only signatures of keys that are not trusted.
    WrongIdentity,
}

/// A signature that counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedSignature {
    /// The key's label.
    pub label: String,
    /// The key's id.
    pub key: String,
    /// The digest of the evidence manifest.
    pub evidence: Digest,
    /// `bundle` or `legacy`.
    pub shape: String,
}

/// Evidence that did not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedEvidence {
    /// The digest of the evidence manifest.
    pub evidence: Digest,
    /// Why.
    pub reason: String,
}

/// What one piece of evidence is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Judgement {
    /// The key with this index signed the subject.
    Accepted(usize),
    /// It does not claim to be a signature of an image.
    NotSignature(String),
    /// It cannot be read.
    Malformed(String),
    /// A signature, not by a trusted key.
    Stranger(String),
    /// It involves a trusted key and is wrong.
    Broken(String),
}

/// Foreign text for a message: short, without control characters, in back ticks.
pub(crate) fn quote(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(MAX_QUOTE)
        .map(|c| {
            if c.is_control() || c == '`' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect();
    if text.chars().nth(MAX_QUOTE).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

const MAX_QUOTE: usize = 160;
