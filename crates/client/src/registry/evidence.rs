//! Everything that is attached to a digest, for `trust` to judge.

use std::collections::HashSet;

use futures_util::StreamExt as _;
use oci::evidence::{
    EvidenceSource, MAX_MANIFEST, MAX_PAYLOAD, MAX_REFERRERS, RawEvidence, RawLayer,
};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Manifest};

use super::{FetchedManifest, Repository};
use crate::Error;

impl Repository {
    /// All evidence of a subject: referrers and cosign's tags, bounded, digests checked. A single piece
    /// that is missing or too large is left out.
    ///
    /// What is small comes first when not everything fits the bounds, so that a stranger's huge
    /// attachment does not displace a signature.
    ///
    /// # Errors
    /// When the referrers cannot be listed, or nothing at all could be read because of a failure that
    /// may pass.
    pub async fn evidence(&self, subject: &Digest) -> Result<Vec<RawEvidence>, Error> {
        let mut referrers = self.referrers(subject, None).await?;
        referrers.retain(|referrer| referrer.size <= MAX_MANIFEST as u64);
        referrers.sort_by_key(|referrer| referrer.size);
        referrers.truncate(MAX_REFERRERS);
        let by_tag = TAGS.iter().filter_map(|suffix| {
            let tag = format!("{}-{}.{suffix}", subject.algorithm(), subject.hex());
            let source = EvidenceSource::Tag(tag.clone());
            Some((source, TagOrDigest::Tag(tag.parse().ok()?)))
        });
        let by_reference = referrers.into_iter().map(|referrer| {
            let source = EvidenceSource::Referrer(subject.clone());
            (source, TagOrDigest::Digest(referrer.digest))
        });
        let wanted: Vec<_> = by_tag.chain(by_reference).collect();

        let mut failure = None;
        let mut pieces = Vec::new();
        let mut seen = HashSet::new();
        let mut held = 0;
        let mut fetched = futures_util::stream::iter(wanted)
            .map(|(source, reference)| async move {
                let fetched = self.manifest_within(&reference, MAX_MANIFEST).await;
                (source, reference, fetched)
            })
            .buffered(PARALLEL);
        while let Some((source, reference, fetched)) = fetched.next().await {
            match fetched {
                Ok(Some(fetched)) => {
                    held += fetched.body.len();
                    if held > MAX_MANIFESTS_TOTAL {
                        tracing::warn!(%subject, "more evidence than is looked at");
                        break;
                    }
                    if let Some(piece) = piece(subject, source, &fetched)
                        && seen.insert((is_tag(&piece.0.source), fetched.descriptor.digest))
                    {
                        pieces.push(piece);
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%subject, %reference, %error, "evidence was left out");
                    failure = failure.or(error.is_transient().then_some(error));
                }
            }
        }
        drop(fetched);

        let mut layers: Vec<(usize, usize, Descriptor)> = pieces
            .iter()
            .enumerate()
            .flat_map(|(piece, (_, layers))| {
                layers
                    .iter()
                    .enumerate()
                    .map(move |(layer, descriptor)| (piece, layer, descriptor.clone()))
            })
            .filter(|(_, _, descriptor)| descriptor.size <= MAX_PAYLOAD as u64)
            .collect();
        layers.sort_by_key(|(_, _, descriptor)| descriptor.size);
        let mut total = 0;
        layers.retain(|(_, _, descriptor)| {
            total += descriptor.size;
            total <= MAX_PAYLOADS_TOTAL
        });
        let mut contents = futures_util::stream::iter(layers)
            .map(|(piece, layer, descriptor)| async move {
                let content = self.blob(&descriptor, MAX_PAYLOAD).await;
                (piece, layer, descriptor, content)
            })
            .buffer_unordered(PARALLEL);
        let mut read: Vec<Vec<(usize, RawLayer)>> = vec![Vec::new(); pieces.len()];
        while let Some((piece, layer, descriptor, content)) = contents.next().await {
            match content {
                Ok(content) => read[piece].push((
                    layer,
                    RawLayer {
                        descriptor,
                        content: content.to_vec(),
                    },
                )),
                Err(error) => {
                    let digest = &descriptor.digest;
                    tracing::warn!(%subject, %digest, %error, "a layer of evidence was left out");
                    failure = failure.or(error.is_transient().then_some(error));
                }
            }
        }
        drop(contents);
        let mut all: Vec<RawEvidence> = Vec::new();
        let mut any = false;
        for ((mut evidence, _), mut layers) in pieces.into_iter().zip(read) {
            layers.sort_by_key(|(order, _)| *order);
            any |= !layers.is_empty();
            evidence.layers = layers.into_iter().map(|(_, layer)| layer).collect();
            all.push(evidence);
        }
        match failure {
            // "There is none" would be a lie here; the caller tries again later.
            Some(error) if !any => Err(error),
            _ => Ok(all),
        }
    }
}

/// A manifest that is evidence for this subject, with the layers to be fetched.
fn piece(
    subject: &Digest,
    source: EvidenceSource,
    fetched: &FetchedManifest,
) -> Option<(RawEvidence, Vec<Descriptor>)> {
    let view = Manifest::parse(&fetched.body, &fetched.descriptor.media_type).ok()?;
    // A list may name anything; only the manifest itself says what it refers to.
    if !is_tag(&source) && view.subject.as_ref().map(|to| &to.digest) != Some(subject) {
        return None;
    }
    let mut descriptor = fetched.descriptor.clone();
    descriptor.artifact_type = view.listed_artifact_type().map(str::to_owned);
    descriptor.annotations.clone_from(&view.annotations);
    let layers = view.layers.unwrap_or_default();
    let evidence = RawEvidence {
        source,
        descriptor,
        manifest: fetched.body.to_vec(),
        layers: Vec::new(),
    };
    Some((evidence, layers.into_iter().take(MAX_LAYERS).collect()))
}

fn is_tag(source: &EvidenceSource) -> bool {
    matches!(source, EvidenceSource::Tag(_))
}

/// Cosign's tags beside the subject.
pub(super) const TAGS: [&str; 3] = ["sig", "att", "sbom"];
/// How many requests run at one time.
const PARALLEL: usize = 8;
/// A legacy signature manifest has one layer for each signature.
const MAX_LAYERS: usize = 1000;
const MAX_MANIFESTS_TOTAL: usize = 64 * 1024 * 1024;
const MAX_PAYLOADS_TOTAL: u64 = 256 * 1024 * 1024;
