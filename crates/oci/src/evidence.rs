//! Evidence as it lies in a registry, before anything of it is believed.

use crate::descriptor::Descriptor;
use crate::digest::Digest;

/// One manifest that was found attached to a subject, with the layers that hold its payloads.
///
/// Whoever collects it bounds it ([`MAX_MANIFEST`], [`MAX_PAYLOAD`], [`MAX_REFERRERS`]) and checks
/// that every byte has the digest it was asked for by; nothing else about it is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawEvidence {
    /// How it was found.
    pub source: EvidenceSource,
    /// The descriptor of the evidence manifest.
    pub descriptor: Descriptor,
    /// The bytes of the evidence manifest.
    pub manifest: Vec<u8>,
    /// The layers that were fetched, in the manifest's order. A layer over the limit is left out.
    pub layers: Vec<RawLayer>,
}

/// One layer of an evidence manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawLayer {
    /// The descriptor that the manifest holds, with its annotations.
    pub descriptor: Descriptor,
    /// The content, whose digest was checked.
    pub content: Vec<u8>,
}

/// How a piece of evidence was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvidenceSource {
    /// By the referrers API or the referrers tag schema of this subject.
    Referrer(Digest),
    /// By a cosign evidence tag such as `sha256-<hex>.sig`.
    Tag(String),
}

/// The longest evidence manifest that is read, in bytes.
pub const MAX_MANIFEST: usize = 4 * 1024 * 1024;
/// The longest evidence payload that is read, in bytes.
pub const MAX_PAYLOAD: usize = 32 * 1024 * 1024;
/// How many referrers of one subject are looked at.
pub const MAX_REFERRERS: usize = 1000;
