//! What of a repository is brought, in which order.
//!
//! From the tags on, everything that is needed or attached: children of indexes, what refers to a manifest, and the
//! subject of what refers. A source either lists every manifest, then who refers to whom is read from those, or is
//! asked for the referrers of each.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use oci::{Descriptor, Digest, Manifest, RepositoryName, Tag, media_type};

use super::{Contents, Document, Entry, Failure, Source};

/// A repository's part of a run.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) tags: BTreeMap<Tag, Digest>,
    pub(super) nodes: BTreeMap<Digest, Node>,
    pub(super) problems: Vec<String>,
}

/// One manifest.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) descriptor: Descriptor,
    /// Held while there is room, else read again.
    pub(super) body: Option<Bytes>,
    pub(super) blobs: Vec<Descriptor>,
    children: Vec<Digest>,
    pub(super) subject: Option<Digest>,
    pub(super) tags: Vec<Tag>,
    /// It stands in the list of its repository by its own.
    listed: bool,
    /// What it needs and cannot have.
    pub(super) broken: Option<Digest>,
    level: u32,
}

/// Why a manifest is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Root,
    Child,
    Referrer,
    Subject,
}

impl Plan {
    pub(super) async fn make<S: Source>(
        source: &S,
        repository: &RepositoryName,
        contents: Contents,
        untagged: bool,
        parallel: usize,
    ) -> Result<Self, Failure> {
        let mut plan = Self {
            problems: contents.problems,
            ..Self::default()
        };
        let types: HashMap<Digest, String> = contents
            .listed
            .iter()
            .map(|listed| (listed.digest.clone(), listed.media_type.clone()))
            .collect();
        let mut held = 0;
        // What the source lists is read once: who refers to whom stands nowhere else.
        let mut found: HashMap<Digest, Option<Node>> = HashMap::new();
        let tagged: BTreeSet<Digest> = contents.tags.values().cloned().collect();
        let every: BTreeSet<Digest> = contents
            .listed
            .iter()
            .map(|listed| listed.digest.clone())
            .chain(tagged.iter().cloned())
            .collect();
        let mut reading = stream::iter(every)
            .map(|digest| async move {
                let read = source.manifest(repository, &digest).await;
                (digest, read)
            })
            .buffer_unordered(parallel);
        while let Some((digest, read)) = reading.next().await {
            let node = plan.node(&digest, read, types.get(&digest), &mut held)?;
            found.insert(digest, node);
        }
        drop(reading);
        let mut attached: HashMap<Digest, Vec<Digest>> = HashMap::new();
        for (digest, node) in &found {
            if let Some(subject) = node.as_ref().and_then(|node| node.subject.clone()) {
                attached.entry(subject).or_default().push(digest.clone());
            }
        }

        let mut wave: Vec<(Digest, Why)> = tagged.into_iter().map(|d| (d, Why::Root)).collect();
        wave.extend(
            contents
                .listed
                .iter()
                .filter(|listed| untagged || listed.wanted)
                .map(|listed| (listed.digest.clone(), Why::Root)),
        );
        let mut asked: HashSet<Digest> = HashSet::new();
        while !wave.is_empty() {
            wave.retain(|(digest, _)| asked.insert(digest.clone()));
            let mut fetched = stream::iter(std::mem::take(&mut wave))
                .map(|(digest, why)| {
                    let known = found.remove(&digest);
                    async move {
                        let read = match known {
                            Some(node) => Ok(node),
                            None => Err(source.manifest(repository, &digest).await),
                        };
                        let referrers = source.referrers(repository, &digest).await;
                        (digest, why, read, referrers)
                    }
                })
                .buffer_unordered(parallel);
            let mut next = Vec::new();
            while let Some((digest, why, read, referrers)) = fetched.next().await {
                let node = match (read, why) {
                    (Ok(known), _) => known,
                    // A subject may be missing.
                    (Err(Ok(None)), Why::Subject) => None,
                    (Err(read), _) => plan.node(&digest, read, types.get(&digest), &mut held)?,
                };
                match referrers {
                    Ok(referrers) => {
                        next.extend(referrers.into_iter().map(|d| (d, Why::Referrer)));
                    }
                    Err(Failure::Broken(problem)) => plan.problems.push(problem),
                    Err(fatal) => return Err(fatal),
                }
                let Some(mut node) = node else {
                    continue;
                };
                next.extend(
                    attached
                        .remove(&digest)
                        .into_iter()
                        .flatten()
                        .map(|d| (d, Why::Referrer)),
                );
                next.extend(node.children.iter().map(|d| (d.clone(), Why::Child)));
                next.extend(node.subject.iter().map(|d| (d.clone(), Why::Subject)));
                node.listed = why != Why::Child;
                plan.nodes.insert(digest, node);
            }
            wave = next;
        }
        for (tag, digest) in contents.tags {
            if let Some(node) = plan.nodes.get_mut(&digest) {
                node.tags.push(tag.clone());
            }
            plan.tags.insert(tag, digest);
        }
        plan.levels();
        Ok(plan)
    }

    /// Turns what was read into a node, or into a problem.
    fn node(
        &mut self,
        digest: &Digest,
        read: Result<Option<Document>, Failure>,
        listed: Option<&String>,
        held: &mut usize,
    ) -> Result<Option<Node>, Failure> {
        let document = match read {
            Ok(Some(document)) => document,
            Ok(None) => {
                self.problems
                    .push(format!("manifest `{digest}` is missing at the source"));
                return Ok(None);
            }
            Err(Failure::Broken(problem)) => {
                self.problems.push(problem);
                return Ok(None);
            }
            Err(fatal) => return Err(fatal),
        };
        let hint = if document.media_type.is_empty() {
            listed.map(String::as_str).unwrap_or_default()
        } else {
            &document.media_type
        };
        // What a document says of itself goes before what a list says of it.
        let parsed = Manifest::parse(&document.body, "").and_then(|view| {
            if hint.is_empty() || says_its_type(&document.body) {
                Ok(view)
            } else {
                Manifest::parse(&document.body, hint)
            }
        });
        let view = match parsed {
            Ok(view) => view,
            Err(error) => {
                self.problems
                    .push(format!("manifest `{digest}` cannot be brought: {error}"));
                return Ok(None);
            }
        };
        let size = document.body.len();
        *held += size;
        let mut blobs: Vec<Descriptor> = Vec::new();
        let mut seen = HashSet::new();
        let mut add = |blob: &Descriptor| {
            if !blob.is_foreign() && seen.insert(blob.digest.clone()) {
                blobs.push(Descriptor::new(
                    &blob.media_type,
                    blob.digest.clone(),
                    blob.size,
                ));
            }
        };
        view.blobs().for_each(&mut add);
        let mut children = Vec::new();
        for child in view.children() {
            if child.media_type.is_empty() || media_type::is_manifest(&child.media_type) {
                children.push(child.digest.clone());
            } else {
                // An index may name content that is no manifest.
                add(child);
            }
        }
        Ok(Some(Node {
            descriptor: Descriptor::new(&view.media_type, digest.clone(), size as u64),
            body: (*held <= MAX_HELD).then_some(document.body),
            blobs,
            children,
            subject: view.subject.map(|subject| subject.digest),
            tags: Vec::new(),
            listed: false,
            broken: None,
            level: 0,
        }))
    }

    /// Gives each node a level above those of its children.
    fn levels(&mut self) {
        let mut level = 0;
        let mut left: Vec<Digest> = self.nodes.keys().cloned().collect();
        while !left.is_empty() {
            let waiting: HashSet<Digest> = left.iter().cloned().collect();
            let (ready, rest): (Vec<Digest>, Vec<Digest>) = left.into_iter().partition(|digest| {
                self.nodes[digest]
                    .children
                    .iter()
                    .all(|child| !waiting.contains(child))
            });
            // No digest can be part of itself; if it could, any order would do.
            let (ready, rest) = if ready.is_empty() {
                (rest, Vec::new())
            } else {
                (ready, rest)
            };
            for digest in &ready {
                if let Some(node) = self.nodes.get_mut(digest) {
                    node.level = level;
                }
            }
            left = rest;
            level += 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.tags.is_empty()
    }

    /// Every node with its level, the leaves first.
    pub(super) fn order(&self) -> Vec<(u32, Digest)> {
        let mut order: Vec<_> = self
            .nodes
            .iter()
            .map(|(digest, node)| (node.level, digest.clone()))
            .collect();
        order.sort();
        order
    }

    /// What a manifest needs and cannot have.
    pub(super) fn lost(&self, digest: &Digest, sparse: bool) -> Option<Digest> {
        let node = self.nodes.get(digest)?;
        if let Some(lost) = &node.broken {
            return Some(lost.clone());
        }
        if sparse {
            return None;
        }
        node.children
            .iter()
            .find(|child| {
                self.nodes
                    .get(*child)
                    .is_none_or(|child| child.broken.is_some())
            })
            .cloned()
    }

    /// Each subject with each manifest of the plan that names it.
    pub(super) fn referrers(&self) -> impl Iterator<Item = (&Digest, &Digest)> {
        self.nodes
            .iter()
            .filter_map(|(digest, node)| Some((node.subject.as_ref()?, digest)))
    }

    /// What stands in the list of the repository, tags in order.
    pub(super) fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (tag, digest) in &self.tags {
            if let Some(node) = self.nodes.get(digest)
                && node.broken.is_none()
            {
                entries.push(Entry {
                    descriptor: node.descriptor.clone(),
                    tag: Some(tag.clone()),
                });
            }
        }
        for node in self.nodes.values() {
            if node.listed && node.tags.is_empty() && node.broken.is_none() {
                entries.push(Entry {
                    descriptor: node.descriptor.clone(),
                    tag: None,
                });
            }
        }
        entries
    }
}

/// Whether a document has a media type in it.
fn says_its_type(body: &[u8]) -> bool {
    serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|document| Some(!document.get("mediaType")?.as_str()?.is_empty()))
        .unwrap_or(false)
}

/// How many bytes of manifests are held for one repository.
const MAX_HELD: usize = 64 * 1024 * 1024;
