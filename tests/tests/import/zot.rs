//! zot's root directory. The program itself cannot be had from the sources that these tests build from, so the
//! directory is made here by its documented layout and by what its source does: an OCI layout for each repository, also
//! below one another, `index.json` with an entry for each tag and for each manifest that was pushed by digest, blobs
//! shared by hard link (on a disk), by an empty file whose bytes lie in another repository (in a bucket), or only in
//! `_blobstore`, and the program's own files beside: its databases, `.uploads`, and layouts of a sync in `.sync`.

use std::path::Path;

use e2e::image::{self, descriptor};
use e2e::{Scratch, digest};
use serde_json::{Value, json};

use crate::{INDEX, complete, import, problems, referrers, serve, verify};

/// A layout written by hand.
pub(crate) struct Handmade<'a> {
    root: &'a Path,
    entries: Vec<Value>,
}

impl<'a> Handmade<'a> {
    pub(crate) fn new(root: &'a Path) -> Self {
        std::fs::create_dir_all(root.join("blobs/sha256")).expect("a directory can be made");
        std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("a file can be written");
        Self {
            root,
            entries: Vec::new(),
        }
    }

    /// Writes content under its digest.
    pub(crate) fn blob(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        std::fs::write(self.path(&digest), bytes).expect("a file can be written");
        digest
    }

    pub(crate) fn path(&self, digest: &str) -> std::path::PathBuf {
        self.root
            .join("blobs/sha256")
            .join(digest.replace("sha256:", ""))
    }

    /// Writes a manifest over one layer, with a subject when there is one; digest and length.
    pub(crate) fn manifest(&self, layer: &[u8], subject: Option<(&str, usize)>) -> (String, usize) {
        let config = self.blob(b"{}");
        let blob = self.blob(layer);
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": image::MANIFEST,
            "artifactType": "application/vnd.example",
            "config": descriptor("application/vnd.oci.empty.v1+json", &config, 2),
            "layers": [descriptor("application/octet-stream", &blob, layer.len())],
        });
        if let Some((subject, size)) = subject {
            manifest["subject"] = descriptor(image::MANIFEST, subject, size);
        }
        let text = manifest.to_string();
        (self.blob(text.as_bytes()), text.len())
    }

    pub(crate) fn index(&self, children: &[(String, usize)]) -> (String, usize) {
        let entries: Vec<Value> = children
            .iter()
            .map(|(digest, size)| descriptor(image::MANIFEST, digest, *size))
            .collect();
        let text =
            json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).to_string();
        (self.blob(text.as_bytes()), text.len())
    }

    /// Lists a manifest.
    pub(crate) fn list(&mut self, kind: &str, (digest, size): &(String, usize), tag: Option<&str>) {
        let mut entry = descriptor(kind, digest, *size);
        if let Some(tag) = tag {
            entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        }
        self.entries.push(entry);
    }

    pub(crate) fn finish(self) {
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        std::fs::write(self.root.join("index.json"), index.to_string())
            .expect("a file can be written");
    }
}

#[test]
fn every_form_of_a_shared_blob_is_found_by_its_digest() {
    let scratch = Scratch::new();
    let root = scratch.dir("zot");
    let large = vec![7_u8; 200_000];
    let stored = vec![8_u8; 200_000];

    let first = root.join("team/first");
    let mut layout = Handmade::new(&first);
    let image = layout.manifest(&large, None);
    layout.list(image::MANIFEST, &image, Some("v1"));
    let referrer = layout.manifest(b"signature", Some((&image.0, image.1)));
    layout.list(image::MANIFEST, &referrer, None);
    let forgotten = layout.manifest(b"forgotten", None);
    layout.list(image::MANIFEST, &forgotten, None);
    let children = [
        layout.manifest(b"amd64", None),
        layout.manifest(b"arm64", None),
    ];
    let index = layout.index(&children);
    layout.list(INDEX, &index, Some("multi"));
    layout.finish();

    // The same blob: a hard link, a file without bytes, and one that lies in the store of shared blobs alone.
    for (name, form) in [("linked", 0), ("empty", 1), ("absent", 2)] {
        let directory = root.join("other").join(name);
        let mut layout = Handmade::new(&directory);
        let image = layout.manifest(&large, None);
        layout.list(image::MANIFEST, &image, Some("v1"));
        let second = layout.manifest(&stored, None);
        layout.list(image::MANIFEST, &second, Some("v2"));
        let own = layout.path(&digest(&large));
        std::fs::remove_file(&own).expect("the blob is there");
        match form {
            0 => std::fs::hard_link(
                first
                    .join("blobs/sha256")
                    .join(digest(&large).replace("sha256:", "")),
                &own,
            )
            .expect("a link can be made"),
            1 => drop(std::fs::File::create(&own).expect("a file can be made")),
            _ => {}
        }
        if form > 0 {
            std::fs::remove_file(layout.path(&digest(&stored))).expect("the blob is there");
        }
        layout.finish();
    }
    let store = root.join("_blobstore/blobs/sha256");
    std::fs::create_dir_all(&store).expect("a directory can be made");
    std::fs::write(store.join(digest(&stored).replace("sha256:", "")), &stored)
        .expect("a file can be written");
    std::fs::write(root.join("cache.db"), b"bolt").expect("a file can be written");
    std::fs::write(root.join("meta.db"), b"bolt").expect("a file can be written");
    std::fs::write(root.join("_restore_complete"), b"0").expect("a file can be written");
    let uploads = root.join("team/first/.uploads");
    std::fs::create_dir_all(&uploads).expect("a directory can be made");
    std::fs::write(
        uploads.join("6f1f3d1e-8a52-4d3c-9a55-0d8f0f5f0e11"),
        b"begun",
    )
    .expect("a file can be written");
    // A sync that was broken off leaves a layout within the repository, and lists in it what it has not brought.
    let half = root.join("team/first/.sync/0b6a/team/first");
    let mut layout = Handmade::new(&half);
    let broken = layout.manifest(b"half", None);
    layout.list(image::MANIFEST, &broken, Some("half"));
    std::fs::remove_file(layout.path(&digest(b"half"))).expect("the blob is there");
    layout.finish();
    // A repository below a repository.
    let below = root.join("team/first/nested");
    let mut layout = Handmade::new(&below);
    let nested = layout.manifest(b"nested", None);
    layout.list(image::MANIFEST, &nested, Some("v1"));
    layout.finish();

    let data = scratch.join("data");
    let source = format!("zot:{}", root.display());
    let report = import(&scratch, &source, &data, &[]).ok().json();
    complete(&report);
    assert_eq!(report["source"]["repositories"], 5);
    assert_eq!(report["source"]["tags"], 9);
    assert_eq!(problems(&report).len(), 0);
    assert_eq!(report["source"]["referrers"], 1);
    verify(&data);
    let server = serve(&data);
    assert_eq!(
        referrers(server.url(), "team/first", &image.0),
        [referrer.0.as_str()]
    );
    for name in ["linked", "empty", "absent"] {
        for bytes in [&large, &stored] {
            let answer = server.get(&format!("/v2/other/{name}/blobs/{}", digest(bytes)));
            assert_eq!(digest(&answer.body), digest(bytes), "{name}");
        }
    }
    let gone = server.get(&format!("/v2/team/first/manifests/{}", forgotten.0));
    assert_eq!(gone.status(), 404);
    drop(server);
    let report = import(&scratch, &source, &data, &["--untagged"])
        .ok()
        .json();
    complete(&report);
    assert_eq!(report["moved"]["manifests"], 1);
    assert_eq!(problems(&report).len(), 0);
}
