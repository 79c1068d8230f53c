//! The walk, between a source and a sink in memory that is as strict as a store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Repositories in memory.
#[derive(Default)]
struct Memory {
    tags: BTreeMap<(RepositoryName, Tag), Digest>,
    manifests: BTreeMap<Digest, Bytes>,
    blobs: BTreeMap<Digest, Bytes>,
    /// Manifests that the source lists beside the tags.
    listed: Vec<Digest>,
}

impl Memory {
    fn blob(&mut self, text: &str) -> Descriptor {
        let bytes = Bytes::from(text.to_owned());
        let descriptor = Descriptor::of("text/plain", &bytes);
        self.blobs.insert(descriptor.digest.clone(), bytes);
        descriptor
    }

    fn manifest(&mut self, value: &serde_json::Value) -> Descriptor {
        let bytes = Bytes::from(value.to_string());
        let view = Manifest::parse(&bytes, "").unwrap();
        let descriptor = Descriptor::of(&view.media_type, &bytes);
        self.manifests.insert(descriptor.digest.clone(), bytes);
        descriptor
    }

    fn image(&mut self, text: &str, subject: Option<&Descriptor>) -> Descriptor {
        let config = self.blob(text);
        let mut value = json!({"schemaVersion": 2, "config": config, "layers": []});
        if let Some(subject) = subject {
            value["subject"] = serde_json::to_value(subject).unwrap();
        }
        self.manifest(&value)
    }

    fn index(&mut self, children: &[Descriptor]) -> Descriptor {
        self.manifest(&json!({"schemaVersion": 2, "manifests": children}))
    }

    fn tag(&mut self, name: &str, manifest: &Descriptor) {
        self.tags.insert(
            (repository(), name.parse().unwrap()),
            manifest.digest.clone(),
        );
    }
}

fn repository() -> RepositoryName {
    "team/app".parse().unwrap()
}

impl Source for Memory {
    async fn repositories(&self) -> Result<Repositories, Failure> {
        Ok(Repositories {
            names: vec![repository()],
            problems: Vec::new(),
        })
    }

    async fn contents(&self, _repository: &RepositoryName) -> Result<Contents, Failure> {
        Ok(Contents {
            tags: self
                .tags
                .iter()
                .map(|((_, tag), digest)| (tag.clone(), digest.clone()))
                .collect(),
            listed: self
                .listed
                .iter()
                .map(|digest| Listed {
                    digest: digest.clone(),
                    media_type: String::new(),
                    wanted: false,
                })
                .collect(),
            problems: Vec::new(),
        })
    }

    async fn manifest(
        &self,
        _repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Document>, Failure> {
        Ok(self.manifests.get(digest).map(|body| Document {
            body: body.clone(),
            media_type: String::new(),
        }))
    }

    async fn referrers(
        &self,
        _repository: &RepositoryName,
        _subject: &Digest,
    ) -> Result<Vec<Digest>, Failure> {
        Ok(Vec::new())
    }

    async fn blob(
        &self,
        _repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<Option<Content>, Failure> {
        Ok(self
            .blobs
            .get(&descriptor.digest)
            .cloned()
            .map(Content::Bytes))
    }
}

/// Takes what a store would take, and refuses what it would refuse.
#[derive(Default)]
struct Strict {
    held: Mutex<Memory>,
    writes: AtomicUsize,
}

impl Sink for Strict {
    fn accepts_sparse(&self) -> bool {
        false
    }

    async fn tag(&self, repository: &RepositoryName, tag: &Tag) -> Result<Option<Digest>, Failure> {
        let held = self.held.lock().unwrap();
        Ok(held.tags.get(&(repository.clone(), tag.clone())).cloned())
    }

    async fn has_manifest(
        &self,
        _repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<bool, Failure> {
        Ok(self
            .held
            .lock()
            .unwrap()
            .manifests
            .contains_key(&descriptor.digest))
    }

    async fn has_blob(
        &self,
        _repository: &RepositoryName,
        descriptor: &Descriptor,
        _take: bool,
    ) -> Result<bool, Failure> {
        Ok(self
            .held
            .lock()
            .unwrap()
            .blobs
            .contains_key(&descriptor.digest))
    }

    async fn has_referrer(
        &self,
        _repository: &RepositoryName,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, Failure> {
        let held = self.held.lock().unwrap();
        Ok(held.manifests.get(referrer).is_some_and(|body| {
            Manifest::parse(body, "")
                .unwrap()
                .subject
                .is_some_and(|found| found.digest == *subject)
        }))
    }

    async fn put_blob(
        &self,
        _repository: &RepositoryName,
        descriptor: &Descriptor,
        content: Content,
    ) -> Result<Placed, Failure> {
        let mut chunks = content.into_chunks();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        if !descriptor.digest.matches(&bytes) {
            return Err(Failure::Broken("wrong digest".to_owned()));
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock().unwrap();
        held.blobs.insert(descriptor.digest.clone(), bytes.into());
        Ok(Placed::Copied)
    }

    async fn put_manifest(
        &self,
        repository: &RepositoryName,
        arrival: Arrival,
    ) -> Result<(), Failure> {
        let mut held = self.held.lock().unwrap();
        for blob in arrival.view.blobs() {
            assert!(
                held.blobs.contains_key(&blob.digest),
                "a blob comes after its manifest"
            );
        }
        for child in arrival.view.children() {
            assert!(
                held.manifests.contains_key(&child.digest),
                "a child comes after its index"
            );
        }
        self.writes.fetch_add(1, Ordering::Relaxed);
        held.manifests.insert(arrival.digest.clone(), arrival.body);
        for tag in arrival.tags {
            held.tags
                .insert((repository.clone(), tag), arrival.digest.clone());
        }
        Ok(())
    }

    async fn finish(
        &self,
        _repository: &RepositoryName,
        _entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        Ok(())
    }
}

fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

fn bring(source: &Memory, sink: &Strict, plans: &Plans) -> Report {
    block(run(source, sink, plans)).unwrap()
}

#[test]
fn referrers_of_referrers_and_subjects_come_and_the_rest_stays() {
    let mut source = Memory::default();
    let image = source.image("image", None);
    let signature = source.image("signature", Some(&image));
    let counter = source.image("counter", Some(&signature));
    let subject = source.image("a subject without a tag", None);
    let tagged = source.image("what is tagged refers", Some(&subject));
    let forgotten = source.image("forgotten", None);
    let about_forgotten = source.image("about forgotten", Some(&forgotten));
    let missing = Descriptor::of("text/plain", b"a subject may be missing");
    let lonely = source.image("lonely", Some(&missing));
    source.tag("v1", &image);
    source.tag("sbom", &tagged);
    source.tag("lonely", &lonely);
    source.listed = source.manifests.keys().cloned().collect();
    let sink = Strict::default();
    let report = bring(&source, &sink, &Plans::default());
    assert_eq!(report.problems, []);
    // The missing subject is no difference either: the referrer names it all the same.
    assert!(report.is_complete(), "{report:?}");
    let there: BTreeSet<Digest> = sink
        .held
        .lock()
        .unwrap()
        .manifests
        .keys()
        .cloned()
        .collect();
    let wanted = [&image, &signature, &counter, &subject, &tagged, &lonely];
    assert_eq!(there, wanted.map(|one| one.digest.clone()).into());
    let all = Plans {
        untagged: true,
        ..Plans::default()
    };
    bring(&source, &sink, &all);
    let held = sink.held.lock().unwrap();
    assert!(held.manifests.contains_key(&forgotten.digest));
    assert!(held.manifests.contains_key(&about_forgotten.digest));
}

#[test]
fn what_lacks_something_is_skipped_with_all_that_needs_it() {
    let mut source = Memory::default();
    let good = source.image("good", None);
    let lacking = source.image("lacking", None);
    let index = source.index(&[good.clone(), lacking.clone()]);
    let outer = source.index(std::slice::from_ref(&index));
    source.tag("good", &good);
    source.tag("outer", &outer);
    source
        .blobs
        .remove(&Descriptor::of("text/plain", b"lacking").digest);
    let sink = Strict::default();
    let report = bring(&source, &sink, &Plans::default());
    assert_eq!(report.problems.len(), 4, "{:?}", report.problems);
    let tags: Vec<_> = report
        .differences
        .iter()
        .map(|one| one.what.as_str())
        .collect();
    assert!(tags.contains(&"tag outer"), "{tags:?}");
    assert!(!tags.contains(&"tag good"));
    assert_eq!(sink.held.lock().unwrap().manifests.len(), 1);
}

#[test]
fn a_prefix_is_put_before_names_and_a_dry_run_writes_nothing() {
    let mut source = Memory::default();
    let image = source.image("image", None);
    source.tag("v1", &image);
    let sink = Strict::default();
    let dry = Plans {
        dry_run: true,
        ..Plans::default()
    };
    let report = bring(&source, &sink, &dry);
    assert_eq!(
        (
            report.source.tags,
            report.source.manifests,
            report.source.blobs
        ),
        (1, 1, 1)
    );
    assert_eq!(sink.writes.load(Ordering::Relaxed), 0);
    let moved = Plans {
        prefix: Some("old/place".parse().unwrap()),
        ..Plans::default()
    };
    assert!(bring(&source, &sink, &moved).is_complete());
    let tag = ("old/place/team/app".parse().unwrap(), "v1".parse().unwrap());
    assert_eq!(
        sink.held.lock().unwrap().tags.get(&tag),
        Some(&image.digest)
    );
}

proptest! {
    /// Any graph arrives whole, in an order that a strict sink takes, and a second run writes nothing.
    #[test]
    fn any_graph_arrives(steps in prop::collection::vec((0..3_u8, any::<u8>(), any::<u8>()), 1..40)) {
        let mut source = Memory::default();
        let mut made: Vec<Descriptor> = Vec::new();
        for (at, (kind, a, b)) in steps.into_iter().enumerate() {
            let pick = |n: u8, made: &[Descriptor]| (!made.is_empty()).then(|| made[usize::from(n) % made.len()].clone());
            let descriptor = match kind {
                0 => source.image(&format!("image {at}"), None),
                1 => {
                    let subject = pick(a, &made);
                    source.image(&format!("referrer {at}"), subject.as_ref())
                }
                _ => {
                    let children: Vec<_> = pick(a, &made).into_iter().chain(pick(b, &made)).collect();
                    source.index(&children)
                }
            };
            if a % 3 == 0 {
                source.tag(&format!("t{at}"), &descriptor);
            }
            made.push(descriptor);
        }
        source.listed = source.manifests.keys().cloned().collect();
        let sink = Strict::default();
        let plans = Plans { untagged: true, parallel: 3, ..Plans::default() };
        let report = bring(&source, &sink, &plans);
        prop_assert!(report.is_complete(), "{:?}", report);
        prop_assert_eq!(&report.source, &report.destination);
        prop_assert_eq!(&sink.held.lock().unwrap().manifests, &source.manifests);
        let writes = sink.writes.load(Ordering::Relaxed);
        bring(&source, &sink, &plans);
        prop_assert_eq!(sink.writes.load(Ordering::Relaxed), writes);
    }
}
