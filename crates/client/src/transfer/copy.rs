//! Copies by digest.

use std::collections::{HashMap, HashSet};

use futures_util::{StreamExt as _, TryStreamExt as _};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Manifest, Tag};

use super::side::Side;
use super::{CopyOptions, CopyReport, Location, Progress};
use crate::{Client, Error, FetchedManifest};

/// Copies by digest, children and blobs first, referrers after, the tag last.
///
/// Without a tag in `to`, a registry gets the manifest by digest alone, a layout an entry without a
/// name. A foreign layer keeps its descriptor and moves no bytes. Between repositories of one host blobs
/// are mounted.
///
/// # Errors
/// When a manifest or blob of the artifact is missing or damaged; a listed referrer that is missing is
/// passed over. What was written by then stays, without a tag.
pub async fn copy(
    client: &Client,
    from: &Location,
    to: &Location,
    options: CopyOptions,
    progress: &dyn Progress,
) -> Result<CopyReport, Error> {
    let parallel = options.parallel.max(1);
    let source = Side::source(client, from).await?;
    let root = source.root(from).await?;
    if let Some(wanted) = to.digest()
        && *wanted != root.descriptor.digest
    {
        return Err(Error::Other(format!(
            "`{from}` has digest `{}`, but the destination names `{wanted}`",
            root.descriptor.digest
        )));
    }
    let destination = Side::destination(client, to).await?;
    let plan = Plan::make(&source, root, options.referrers, parallel).await?;
    let mut report = CopyReport {
        digest: plan.nodes[0].manifest.descriptor.digest.clone(),
        manifests: 0,
        blobs: 0,
        skipped: 0,
        bytes: 0,
    };

    let mut blobs = futures_util::stream::iter(plan.blobs())
        .map(|blob| async {
            let blob = blob;
            progress.start(&blob.digest, blob.size);
            let moved = source.copy_blob(&destination, &blob, progress).await?;
            progress.finish(&blob.digest, !moved);
            Ok::<_, Error>((moved, blob.size))
        })
        .buffer_unordered(parallel);
    while let Some((moved, size)) = blobs.try_next().await? {
        if moved {
            report.blobs += 1;
            report.bytes += size;
        } else {
            report.skipped += 1;
        }
    }
    drop(blobs);

    for wave in plan.waves() {
        let mut written = futures_util::stream::iter(wave)
            .map(|at| {
                let node = &plan.nodes[at];
                destination.put_manifest(&node.manifest, node.subject.is_some())
            })
            .buffer_unordered(parallel);
        while let Some(written) = written.try_next().await? {
            report.manifests += u64::from(written);
        }
    }
    for node in plan.nodes.iter().filter(|node| node.listed) {
        destination.publish(&node.manifest, None).await?;
    }
    for (tag, at) in &plan.tags {
        destination
            .publish(&plan.nodes[*at].manifest, Some(tag))
            .await?;
    }
    destination
        .publish(&plan.nodes[0].manifest, to.tag())
        .await?;
    Ok(report)
}

/// Everything that is to be copied. The root is the first node.
struct Plan {
    nodes: Vec<Node>,
    known: HashMap<Digest, usize>,
    /// Cosign's tags, which are evidence of their own.
    tags: Vec<(Tag, usize)>,
    held: usize,
}

struct Node {
    manifest: FetchedManifest,
    blobs: Vec<Descriptor>,
    children: Vec<Digest>,
    subject: Option<Digest>,
    /// A referrer, which a layout must list to have it found.
    listed: bool,
    depth: usize,
}

/// Something to fetch, and how it was come by.
struct Wanted {
    digest: Digest,
    depth: usize,
    /// A child, without which the artifact is not whole; else a referrer.
    child: bool,
}

impl Plan {
    async fn make(
        source: &Side,
        root: FetchedManifest,
        referrers: bool,
        parallel: usize,
    ) -> Result<Self, Error> {
        let mut plan = Self {
            nodes: Vec::new(),
            known: HashMap::new(),
            tags: Vec::new(),
            held: 0,
        };
        plan.add(root, 0, false)?;
        let mut done = 0;
        while done < plan.nodes.len() {
            let level = done..plan.nodes.len();
            done = plan.nodes.len();
            let mut wanted: Vec<Wanted> = Vec::new();
            for node in &plan.nodes[level.clone()] {
                wanted.extend(node.children.iter().map(|digest| Wanted {
                    digest: digest.clone(),
                    depth: node.depth + 1,
                    child: true,
                }));
            }
            if referrers {
                plan.attached(source, level, parallel, &mut wanted).await?;
            }
            let mut asked = HashSet::new();
            wanted.retain(|item| {
                !plan.known.contains_key(&item.digest) && asked.insert(item.digest.clone())
            });
            let mut fetched = futures_util::stream::iter(wanted)
                .map(|item| async move {
                    let reference = TagOrDigest::Digest(item.digest.clone());
                    (source.manifest(&reference).await, item)
                })
                .buffered(parallel);
            while let Some((found, item)) = fetched.next().await {
                match found? {
                    Some(found) => {
                        plan.add(found, item.depth, !item.child)?;
                    }
                    None if item.child => return Err(Error::NotFound(item.digest.to_string())),
                    None => tracing::warn!(digest = %item.digest, "a listed referrer is missing"),
                }
            }
        }
        Ok(plan)
    }

    /// Finds what refers to the nodes of a level, and cosign's tags for them.
    async fn attached(
        &mut self,
        source: &Side,
        level: std::ops::Range<usize>,
        parallel: usize,
        wanted: &mut Vec<Wanted>,
    ) -> Result<(), Error> {
        let subjects: Vec<Digest> = self.nodes[level]
            .iter()
            .map(|node| node.manifest.descriptor.digest.clone())
            .collect();
        let mut found = futures_util::stream::iter(subjects)
            .map(|subject| async move {
                let referrers = source.referrers(&subject).await?;
                let mut tagged = Vec::new();
                for suffix in COSIGN {
                    let tag = format!("{}-{}.{suffix}", subject.algorithm(), subject.hex());
                    // The tag of a long digest is none.
                    let Ok(tag) = tag.parse::<Tag>() else {
                        continue;
                    };
                    if let Some(found) = source.manifest(&TagOrDigest::Tag(tag.clone())).await? {
                        tagged.push((tag, found));
                    }
                }
                Ok::<_, Error>((referrers, tagged))
            })
            .buffered(parallel);
        while let Some((referrers, tagged)) = found.try_next().await? {
            wanted.extend(referrers.into_iter().map(|referrer| Wanted {
                digest: referrer.digest,
                depth: 0,
                child: false,
            }));
            for (tag, manifest) in tagged {
                let at = self.add(manifest, 0, false)?;
                self.tags.push((tag, at));
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        manifest: FetchedManifest,
        depth: usize,
        listed: bool,
    ) -> Result<usize, Error> {
        let digest = manifest.descriptor.digest.clone();
        if let Some(at) = self.known.get(&digest) {
            return Ok(*at);
        }
        self.held += manifest.body.len();
        if depth > MAX_DEPTH || self.nodes.len() >= MAX_NODES || self.held > MAX_HELD {
            return Err(Error::Other(format!(
                "the artifact holds more manifests than can be copied at once (at `{digest}`); copy its parts one by one"
            )));
        }
        let view = Manifest::parse(&manifest.body, &manifest.descriptor.media_type)
            .map_err(|error| Error::Other(format!("`{digest}` cannot be copied: {error}")))?;
        let node = Node {
            blobs: view
                .blobs()
                .filter(|blob| !blob.is_foreign())
                .cloned()
                .collect(),
            children: view.children().map(|child| child.digest.clone()).collect(),
            subject: view.subject.map(|subject| subject.digest),
            manifest,
            listed,
            depth,
        };
        let at = self.nodes.len();
        self.nodes.push(node);
        self.known.insert(digest, at);
        Ok(at)
    }

    /// Each blob once.
    fn blobs(&self) -> Vec<Descriptor> {
        let mut seen = HashSet::new();
        self.nodes
            .iter()
            .flat_map(|node| &node.blobs)
            .filter(|blob| seen.insert(&blob.digest))
            .cloned()
            .collect()
    }

    /// The nodes in groups: each follows its children and its subject.
    fn waves(&self) -> Vec<Vec<usize>> {
        let mut left: Vec<usize> = (0..self.nodes.len()).collect();
        let mut done = vec![false; self.nodes.len()];
        let mut waves = Vec::new();
        while !left.is_empty() {
            let ready = |at: &usize| {
                let node = &self.nodes[*at];
                node.children
                    .iter()
                    .chain(&node.subject)
                    .filter_map(|digest| self.known.get(digest))
                    .all(|needed| done[*needed])
            };
            let (mut wave, rest): (Vec<usize>, Vec<usize>) = left.iter().partition(|at| ready(at));
            left = rest;
            if wave.is_empty() {
                // A cycle by digest cannot be made; if it could, any order would do.
                wave = std::mem::take(&mut left);
            }
            for at in &wave {
                done[*at] = true;
            }
            waves.push(wave);
        }
        waves
    }
}

const COSIGN: [&str; 3] = ["sig", "att", "sbom"];
/// An index in an index in an index: deeper ones are made to harm.
const MAX_DEPTH: usize = 16;
const MAX_NODES: usize = 20_000;
/// How many bytes of manifests are held.
const MAX_HELD: usize = 256 * 1024 * 1024;
