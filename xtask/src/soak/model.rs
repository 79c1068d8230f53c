//! What must be readable, as one worker knows it.
//!
//! A worker alone makes, moves and deletes its tags and manifests, so of these it knows exactly what must be there and
//! what must not. Layers are everybody's: whether one is there at this moment nobody knows, only that
//! it stays as long as a promise says.

use std::collections::{BTreeMap, BTreeSet};

/// A blob as a descriptor names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Blob {
    pub(super) digest: String,
    pub(super) size: usize,
}

/// A manifest that was acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) body: String,
    pub(super) media_type: &'static str,
    pub(super) blobs: Vec<Blob>,
    pub(super) children: Vec<String>,
    pub(super) subject: Option<String>,
}

impl Manifest {
    /// Whether it needs no other manifest.
    pub(super) fn stands_alone(&self) -> bool {
        self.children.is_empty() && self.subject.is_none()
    }
}

/// One repository as one worker knows it.
#[derive(Clone, Debug, Default)]
pub(super) struct Repository {
    /// Each own tag and what it stands for.
    pub(super) tags: BTreeMap<String, String>,
    /// The own manifests that must be there.
    pub(super) manifests: BTreeMap<String, Manifest>,
    /// Own manifests that a collector may take: nobody knows whether they are there.
    pub(super) released: Vec<(String, Manifest)>,
    /// What was deleted, or released for long, and can be pushed again.
    pub(super) buried: Vec<Manifest>,
    /// Own tags that were deleted and not made again.
    pub(super) gone: BTreeSet<String>,
    /// What an index ever named: such a manifest may be refused to be deleted.
    pub(super) named: BTreeSet<String>,
}

impl Repository {
    /// The blobs of what must be readable.
    pub(super) fn blobs(&self) -> BTreeSet<Blob> {
        self.manifests
            .values()
            .flat_map(|manifest| manifest.blobs.iter().cloned())
            .collect()
    }

    /// Notes that a manifest was acknowledged.
    pub(super) fn pushed(&mut self, digest: &str, manifest: Manifest, tag: Option<&str>) {
        self.released.retain(|(released, _)| released != digest);
        self.named.extend(manifest.children.iter().cloned());
        self.manifests.insert(digest.to_owned(), manifest);
        if let Some(tag) = tag {
            self.tags.insert(tag.to_owned(), digest.to_owned());
            self.gone.remove(tag);
        }
        self.settle();
    }

    /// Notes that a tag was deleted.
    pub(super) fn untagged(&mut self, tag: &str) {
        self.tags.remove(tag);
        self.gone.insert(tag.to_owned());
        self.settle();
    }

    /// Notes that a manifest was deleted, and its tags with it.
    pub(super) fn deleted(&mut self, digest: &str) {
        let pointing: Vec<_> = self
            .tags
            .iter()
            .filter(|(_, to)| *to == digest)
            .map(|(tag, _)| tag.clone())
            .collect();
        for tag in pointing {
            self.tags.remove(&tag);
            self.gone.insert(tag);
        }
        if let Some(manifest) = self.manifests.remove(digest) {
            self.bury(manifest);
        }
        self.settle();
    }

    /// Notes that a write of a tag or a manifest was sent and not acknowledged: of what it touches nothing is known any
    /// more, of everything else what was known.
    pub(super) fn doubted(&mut self, reference: &str) {
        self.tags
            .retain(|tag, to| tag != reference && to != reference);
        self.gone.remove(reference);
        self.manifests.remove(reference);
        self.settle();
    }

    /// Notes that a released manifest was not there any more.
    pub(super) fn collected(&mut self, digest: &str) {
        if let Some(at) = self.released.iter().position(|(known, _)| known == digest) {
            let (_, manifest) = self.released.remove(at);
            self.bury(manifest);
        }
    }

    /// Parts what must be readable from what was released by a change: it is what a tag stands for, the
    /// children of it, and what refers to it.
    fn settle(&mut self) {
        let mut kept = BTreeSet::new();
        let mut open: Vec<&String> = self.tags.values().collect();
        while let Some(digest) = open.pop() {
            if !kept.insert(digest.clone()) {
                continue;
            }
            if let Some(manifest) = self.manifests.get(digest) {
                open.extend(&manifest.children);
            }
            let referring = self
                .manifests
                .iter()
                .filter(|(_, manifest)| manifest.subject.as_ref() == Some(digest))
                .map(|(digest, _)| digest);
            open.extend(referring);
        }
        let all = std::mem::take(&mut self.manifests);
        for (digest, manifest) in all {
            if kept.contains(&digest) {
                self.manifests.insert(digest, manifest);
            } else {
                self.released.push((digest, manifest));
            }
        }
        while self.released.len() > REMEMBERED {
            let (_, manifest) = self.released.remove(0);
            self.bury(manifest);
        }
    }

    fn bury(&mut self, manifest: Manifest) {
        // Only what stands for itself can be pushed again by itself.
        if manifest.stands_alone() {
            self.buried.push(manifest);
            if self.buried.len() > REMEMBERED {
                self.buried.remove(0);
            }
        }
    }
}

/// How many manifests that are gone, or may be, are remembered.
const REMEMBERED: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(children: &[&str], subject: Option<&str>) -> Manifest {
        Manifest {
            body: String::new(),
            media_type: "",
            blobs: vec![Blob {
                digest: format!("b{}", children.len()),
                size: 1,
            }],
            children: children.iter().map(|child| (*child).to_owned()).collect(),
            subject: subject.map(str::to_owned),
        }
    }

    fn kept(repository: &Repository) -> Vec<&str> {
        repository.manifests.keys().map(String::as_str).collect()
    }

    #[test]
    fn what_is_kept_follows_children_and_subjects() {
        let mut repository = Repository::default();
        repository.pushed("a", manifest(&[], None), Some("u"));
        repository.pushed("i", manifest(&["a"], None), Some("t"));
        repository.untagged("u");
        repository.pushed("s", manifest(&[], Some("a")), None);
        repository.pushed("loose", manifest(&[], None), None);
        assert_eq!(kept(&repository), ["a", "i", "s"]);
        assert!(repository.named.contains("a"));
        repository.untagged("t");
        assert!(kept(&repository).is_empty() && repository.gone.contains("t"));
        assert_eq!(repository.released.len(), 4);
        // It comes back without what referred to it: of that nobody knows.
        repository.pushed("a", manifest(&[], None), Some("u"));
        assert_eq!(kept(&repository), ["a"]);
        repository.collected("loose");
        assert_eq!(repository.buried.len(), 1);
        repository.collected("i");
        assert_eq!(repository.buried.len(), 1);
    }

    #[test]
    fn a_doubt_is_about_what_a_write_touches_and_nothing_else() {
        let mut repository = Repository::default();
        repository.pushed("a", manifest(&[], None), Some("t"));
        repository.pushed("b", manifest(&[], None), Some("u"));
        repository.pushed("i", manifest(&["a"], None), Some("v"));
        repository.untagged("gone");
        // Another manifest may have the tag by now; an index keeps the one that had it.
        repository.doubted("t");
        assert_eq!(kept(&repository), ["a", "b", "i"]);
        assert!(!repository.tags.contains_key("t") && !repository.gone.contains("t"));
        // It may be deleted, and its tags with it.
        repository.doubted("i");
        assert_eq!(kept(&repository), ["b"]);
        assert!(!repository.gone.contains("v"));
        repository.doubted("gone");
        assert!(repository.gone.is_empty());
        repository.doubted("a new tag");
        assert_eq!(kept(&repository), ["b"]);
    }

    #[test]
    fn a_deleted_manifest_takes_its_tags() {
        let mut repository = Repository::default();
        repository.pushed("a", manifest(&[], None), Some("t"));
        repository.pushed("b", manifest(&[], None), Some("u"));
        repository.deleted("a");
        assert_eq!(kept(&repository), ["b"]);
        assert_eq!(repository.gone, ["t".to_owned()].into());
        assert_eq!(repository.blobs().len(), 1);
    }
}
