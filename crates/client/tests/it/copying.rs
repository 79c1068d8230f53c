use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;

use bytes::Bytes;
use client::layout::Layout;
use client::longshore::EventStream;
use client::transfer::{
    Artifact, CopyOptions, FileLayer, Location, Progress, Silent, TITLE, copy, pull_files,
    push_files,
};
use client::{Error, Repository};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Manifest, media_type};

use crate::fake::{Fake, cut};
use crate::support::{client, noise, repository};

const OPTIONS: CopyOptions = CopyOptions {
    referrers: true,
    parallel: 3,
};

/// An index of two images with a common layer, a foreign layer, a signature of the index, one of a
/// child, one of the signature, and cosign's tag.
struct Tree {
    index: Digest,
    manifests: usize,
    large: Vec<u8>,
    sig_tag: String,
}

async fn put(repository: &Repository, reference: TagOrDigest, manifest: Manifest) -> Descriptor {
    let body = Bytes::from(manifest.to_bytes());
    repository
        .put_manifest(&reference, &manifest.media_type, body.clone())
        .await
        .unwrap();
    Descriptor::of(&manifest.media_type, &body)
}

async fn image(
    fake: &Fake,
    repository: &Repository,
    layers: &[&[u8]],
    subject: Option<&Descriptor>,
) -> Descriptor {
    let name = repository.name().as_str();
    fake.blob(name, b"{}");
    let mut all: Vec<Descriptor> = layers
        .iter()
        .map(|layer| {
            fake.blob(name, layer);
            Descriptor::of("x/layer", layer)
        })
        .collect();
    if subject.is_none() {
        let mut foreign = Descriptor::of(
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            b"elsewhere",
        );
        foreign.urls.push("https://example.com/layer".to_owned());
        all.push(foreign);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: Some(Descriptor::empty()),
        layers: Some(all),
        subject: subject.cloned(),
        ..Manifest::default()
    };
    let digest = Digest::sha256(&manifest.to_bytes());
    put(repository, TagOrDigest::Digest(digest), manifest).await
}

async fn tree(fake: &Fake, repository: &Repository) -> Tree {
    let large = noise(3_000_000);
    let one = image(fake, repository, &[&large, b"one"], None).await;
    let two = image(fake, repository, &[&large, b"two"], None).await;
    let index = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.to_owned(),
        manifests: Some(vec![one.clone(), two]),
        ..Manifest::default()
    };
    let index = put(repository, TagOrDigest::Tag("v1".parse().unwrap()), index).await;
    let signature = image(fake, repository, &[b"signature"], Some(&index)).await;
    image(fake, repository, &[b"of the signature"], Some(&signature)).await;
    image(fake, repository, &[b"of a child"], Some(&one)).await;
    let sig_tag = format!("sha256-{}.sig", index.digest.hex());
    let by_tag = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: Some(Descriptor::empty()),
        layers: Some(vec![Descriptor::empty()]),
        ..Manifest::default()
    };
    put(
        repository,
        TagOrDigest::Tag(sig_tag.parse().unwrap()),
        by_tag,
    )
    .await;
    Tree {
        index: index.digest,
        manifests: 7,
        large,
        sig_tag,
    }
}

fn at(fake: &Fake, rest: &str) -> Location {
    format!("{}/{rest}", fake.host).parse().unwrap()
}

#[tokio::test]
async fn everything_arrives_in_an_order_that_never_breaks() {
    let from = Fake::start().await;
    let source = repository(&from, "shop/web");
    let tree = tree(&from, &source).await;
    let to = Fake::start().await;
    let report = copy(
        &client(),
        &at(&from, "shop/web:v1"),
        &at(&to, "copy/web:v2"),
        OPTIONS,
        &Silent,
    )
    .await
    .unwrap();
    assert_eq!(report.digest, tree.index);
    assert_eq!(report.manifests, tree.manifests as u64);
    // `{}`, the large one, two small ones and three of signatures.
    assert_eq!((report.blobs, report.skipped), (7, 0));
    assert!(to.has_blob("copy/web", &tree.large));
    assert!(!to.has_blob("copy/web", b"elsewhere"));
    for reference in ["v2", &tree.sig_tag, &tree.index.to_string()] {
        assert!(to.manifest("copy/web", reference).is_some(), "{reference}");
    }
    assert_eq!(
        to.manifest("copy/web", "v2"),
        from.manifest("shop/web", "v1")
    );

    let writes: Vec<String> = to
        .state()
        .log
        .iter()
        .filter(|asked| matches!(asked.method.as_str(), "PUT" | "POST" | "PATCH"))
        .map(crate::fake::Asked::line)
        .collect();
    let first_manifest = writes
        .iter()
        .position(|line| line.contains("/manifests/"))
        .unwrap();
    assert!(
        writes[first_manifest..]
            .iter()
            .all(|line| line.contains("/manifests/")),
        "blobs first: {writes:?}"
    );
    let place = |reference: &str| {
        writes
            .iter()
            .position(|line| line.ends_with(reference))
            .unwrap()
    };
    let view = Manifest::parse(&to.manifest("copy/web", "v2").unwrap(), "").unwrap();
    for child in view.children() {
        assert!(
            place(&child.digest.to_string()) < place(&tree.index.to_string()),
            "children first"
        );
    }
    assert_eq!(place("/v2"), writes.len() - 1, "the tag last");

    // Again: nothing moves.
    to.state().log.clear();
    let report = copy(
        &client(),
        &at(&from, "shop/web:v1"),
        &at(&to, "copy/web:v2"),
        OPTIONS,
        &Silent,
    )
    .await
    .unwrap();
    assert_eq!((report.blobs, report.skipped, report.bytes), (0, 7, 0));
    assert!(to.asked("POST", "").is_empty());
}

#[tokio::test]
async fn through_a_layout_and_back() {
    let from = Fake::start().await;
    let tree = tree(&from, &repository(&from, "a")).await;
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("layout");
    let location: Location = format!("oci:{}:kept", root.display()).parse().unwrap();
    let report = copy(&client(), &at(&from, "a:v1"), &location, OPTIONS, &Silent)
        .await
        .unwrap();
    assert_eq!((report.manifests, report.blobs), (tree.manifests as u64, 7));
    let layout = Layout::open(&root).await.unwrap();
    let mut tags = layout.tags().await.unwrap();
    tags.sort();
    assert_eq!(tags, ["kept".to_owned(), tree.sig_tag.clone()]);
    assert_eq!(layout.referrers(&tree.index).await.unwrap().len(), 1);
    assert_eq!(layout.resolve(None).await.unwrap(), tree.index);

    let second: Location = format!("oci:{}", directory.path().join("second").display())
        .parse()
        .unwrap();
    copy(&client(), &location, &second, OPTIONS, &Silent)
        .await
        .unwrap();
    let to = Fake::start().await;
    to.state().referrers_api = false;
    let report = copy(&client(), &second, &at(&to, "b:v1"), OPTIONS, &Silent)
        .await
        .unwrap();
    assert_eq!(
        (report.digest, report.manifests, report.blobs),
        (tree.index.clone(), tree.manifests as u64, 7)
    );
    assert!(to.has_blob("b", &tree.large));
    assert!(to.manifest("b", &tree.sig_tag).is_some());
    let found = repository(&to, "b")
        .referrers(&tree.index, None)
        .await
        .unwrap();
    assert_eq!(found.len(), 1, "the index of the tag schema was written");
}

#[tokio::test]
async fn without_referrers_only_the_artifact() {
    let from = Fake::start().await;
    tree(&from, &repository(&from, "a")).await;
    let to = Fake::start().await;
    let options = CopyOptions {
        referrers: false,
        parallel: 0,
    };
    let report = copy(
        &client(),
        &at(&from, "a:v1"),
        &at(&to, "b"),
        options,
        &Silent,
    )
    .await
    .unwrap();
    assert_eq!((report.manifests, report.blobs), (3, 4));
    assert!(
        to.state().manifests["b"]
            .keys()
            .all(|key| key.contains(':')),
        "no tag was asked for"
    );
}

#[tokio::test]
async fn a_copy_goes_on_after_the_source_breaks() {
    #[derive(Default)]
    struct Told(Mutex<BTreeMap<Digest, (u64, u64)>>);
    impl Progress for Told {
        fn start(&self, digest: &Digest, size: u64) {
            self.0.lock().unwrap().insert(digest.clone(), (size, 0));
        }
        fn advance(&self, digest: &Digest, bytes: u64) {
            self.0.lock().unwrap().get_mut(digest).unwrap().1 += bytes;
        }
        fn finish(&self, digest: &Digest, skipped: bool) {
            let all = self.0.lock().unwrap();
            let (size, moved) = all[digest];
            assert_eq!(moved, if skipped { 0 } else { size });
        }
    }
    let from = Fake::start().await;
    let source = repository(&from, "a");
    let large = noise(40_000_000);
    let root = image(&from, &source, &[&large], None).await;
    let mut breaks = 3;
    from.hook(move |asked, state| {
        let length = state.blobs["a"].values().map(Bytes::len).max().unwrap();
        if asked.method != "GET" || !asked.path.contains("/blobs/") || breaks == 0 {
            return None;
        }
        let digest = asked.path.rsplit('/').next().unwrap();
        let content = state.blobs["a"][digest].clone();
        if content.len() != length {
            return None;
        }
        breaks -= 1;
        let start: usize = asked.header("range").map_or(0, |range| {
            range["bytes=".len()..range.len() - 1].parse().unwrap()
        });
        let end = (start + 9_000_000).min(length);
        let range = format!("bytes {start}-{}/{length}", length - 1);
        let status = if start == 0 { 200 } else { 206 };
        Some(cut(
            status,
            &[("content-range", &range)],
            length - start,
            content.slice(start..end),
        ))
    });
    let to = Fake::start().await;
    let told = Told::default();
    let reference = at(&from, &format!("a@{}", root.digest));
    copy(&client(), &reference, &at(&to, "b:v1"), OPTIONS, &told)
        .await
        .unwrap();
    assert!(to.has_blob("b", &large));
    assert_eq!(to.asked("PATCH", "").len(), 3);
    assert_eq!(
        told.0.lock().unwrap()[&Digest::sha256(&large)].1,
        large.len() as u64
    );
}

#[tokio::test]
async fn a_tampered_source_is_refused_by_us() {
    for length in [7, 20_000_000] {
        let from = Fake::start().await;
        let source = repository(&from, "a");
        let content = noise(length);
        let root = image(&from, &source, &[&content], None).await;
        let wrong = Bytes::from(vec![0; length]);
        from.state()
            .blobs
            .get_mut("a")
            .unwrap()
            .insert(Digest::sha256(&content).to_string(), wrong);
        let to = Fake::start().await;
        let reference = at(&from, &format!("a@{}", root.digest));
        let error = copy(&client(), &reference, &at(&to, "b:v1"), OPTIONS, &Silent)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
        assert!(to.manifest("b", "v1").is_none());

        let directory = tempfile::tempdir().unwrap();
        let layout: Location = format!("oci:{}", directory.path().display())
            .parse()
            .unwrap();
        let error = copy(&client(), &reference, &layout, OPTIONS, &Silent)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    }
}

#[tokio::test]
async fn what_is_missing_or_not_named_is_told() {
    let fake = Fake::start().await;
    let tree = tree(&fake, &repository(&fake, "a")).await;
    let to = |rest: &str| at(&fake, rest);
    let error = copy(&client(), &to("a:none"), &to("b:v1"), OPTIONS, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
    let error = copy(&client(), &to("a"), &to("b:v1"), OPTIONS, &Silent)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("neither a tag nor a digest"),
        "{error}"
    );
    let other = Digest::sha256(b"other");
    let error = copy(
        &client(),
        &to("a:v1"),
        &to(&format!("b@{other}")),
        OPTIONS,
        &Silent,
    )
    .await
    .unwrap_err();
    assert!(error.to_string().contains(&other.to_string()), "{error}");
    let view = Manifest::parse(&fake.manifest("a", "v1").unwrap(), "").unwrap();
    let child = view.children().next().unwrap().digest.to_string();
    fake.state().manifests.get_mut("a").unwrap().remove(&child);
    let error = copy(&client(), &to("a:v1"), &to("b:v1"), OPTIONS, &Silent)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
    assert!(fake.manifest("b", &tree.index.to_string()).is_none());
}

#[tokio::test]
async fn files_go_and_come_back() {
    let fake = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let large = noise(2_000_000);
    fs::create_dir(directory.path().join("d")).unwrap();
    fs::write(directory.path().join("d/large"), &large).unwrap();
    fs::write(directory.path().join("note.txt"), "hello").unwrap();
    let layer = |title: &str, kind: &str| FileLayer {
        path: directory.path().join(title),
        title: title.to_owned(),
        media_type: kind.to_owned(),
    };
    let artifact = Artifact {
        artifact_type: "application/vnd.test".to_owned(),
        files: vec![layer("d/large", "x/large"), layer("note.txt", "text/plain")],
        ..Artifact::default()
    };
    let reference = at(&fake, "files:v1");
    let report = push_files(&client(), &reference, &artifact, 2, &Silent)
        .await
        .unwrap();
    assert_eq!((report.blobs, report.manifests), (2, 1));
    let again = push_files(&client(), &reference, &artifact, 2, &Silent)
        .await
        .unwrap();
    assert_eq!((again.digest, again.skipped), (report.digest.clone(), 2));
    let view = Manifest::parse(&fake.manifest("files", "v1").unwrap(), "").unwrap();
    assert_eq!(view.artifact_type.as_deref(), Some("application/vnd.test"));
    assert_eq!(view.config, Some(Descriptor::empty()));

    let target = directory.path().join("out");
    let pulled = pull_files(&client(), &reference, &target, 2, &Silent)
        .await
        .unwrap();
    assert_eq!(pulled.digest, report.digest);
    assert_eq!(
        pulled.files,
        [target.join("d/large"), target.join("note.txt")]
    );
    assert!(fs::read(target.join("d/large")).unwrap() == large);
    assert_eq!(fs::read(target.join("note.txt")).unwrap(), b"hello");

    // The same through a layout.
    let layout: Location = format!("oci:{}:v1", directory.path().join("layout").display())
        .parse()
        .unwrap();
    let report = push_files(&client(), &layout, &artifact, 2, &Silent)
        .await
        .unwrap();
    assert_eq!(report.digest, pulled.digest);
    let target = directory.path().join("out2");
    pull_files(&client(), &layout, &target, 2, &Silent)
        .await
        .unwrap();
    assert_eq!(fs::read(target.join("note.txt")).unwrap(), b"hello");

    let folder = Artifact {
        files: vec![layer("d", "x/y")],
        ..Artifact::default()
    };
    let error = push_files(&client(), &at(&fake, "files:v2"), &folder, 2, &Silent)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is a directory"), "{error}");
    let twice = Artifact {
        files: vec![layer("note.txt", "x/y"), layer("note.txt", "x/y")],
        ..Artifact::default()
    };
    assert!(
        push_files(&client(), &at(&fake, "files:v2"), &twice, 2, &Silent)
            .await
            .is_err()
    );
    assert!(fake.manifest("files", "v2").is_none());
}

#[tokio::test]
async fn names_that_leave_the_directory_write_nothing() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "evil");
    fake.blob("evil", b"payload");
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    fs::create_dir(&target).unwrap();
    std::os::unix::fs::symlink(directory.path(), target.join("link")).unwrap();
    for title in [
        "../escaped",
        "/tmp/escaped",
        "a/../../escaped",
        "link/escaped",
        "twice",
        "..",
    ] {
        let titled = |title: &str| {
            let mut layer = Descriptor::of("x/y", b"payload");
            layer.annotations.insert(TITLE.to_owned(), title.to_owned());
            layer
        };
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            config: Some(Descriptor::empty()),
            layers: Some(vec![titled("twice"), titled(title)]),
            ..Manifest::default()
        };
        put(
            &repository,
            TagOrDigest::Tag("v1".parse().unwrap()),
            manifest,
        )
        .await;
        let error = pull_files(&client(), &at(&fake, "evil:v1"), &target, 2, &Silent)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("nothing was written"), "{error}");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1, "{title}");
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "{title}"
        );
    }
    assert!(fake.asked("GET", "/blobs/").is_empty());
}

/// Every call can run in a task of its own.
#[test]
fn futures_are_send() {
    fn check<T: Send>(_: impl FnOnce() -> T) {}
    let directory = std::path::Path::new("d");
    let location: Location = "oci:d".parse().unwrap();
    let client = client();
    let name = "a".parse().unwrap();
    let repository = client.repository("h", &name);
    let digest = Digest::sha256(b"");
    let descriptor = Descriptor::empty();
    check(|| copy(&client, &location, &location, OPTIONS, &Silent));
    let artifact = Artifact::default();
    check(|| push_files(&client, &location, &artifact, 1, &Silent));
    check(|| pull_files(&client, &location, directory, 1, &Silent));
    check(|| repository.evidence(&digest));
    check(|| repository.referrers(&digest, None));
    check(|| repository.blob_to_file(&descriptor, directory));
    check(|| repository.put_blob_file(&descriptor, directory));
    check(|| client.catalog("h"));
    check(|| EventStream::open(&client, "h", None));
}
