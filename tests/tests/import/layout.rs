//! Export to a tree of OCI layouts and back.

use e2e::image::{self, Image};
use e2e::{Scratch, Server, digest};
use serde_json::json;

use crate::zot::Handmade;
use crate::{
    ACCEPT, complete, files, import, problems, push_index, referrers, run, serve, tags_of, verify,
};

const REPOSITORIES: [&str; 4] = ["team", "team/app", "team/blobs", "other/app"];

/// Names that lie in each other's way as directories do, an index, a referrer of a referrer, a shared layer.
fn fill(server: &Server) -> (String, String, String) {
    let url = server.url();
    let image = Image::shell("echo x").salt("x").push(url, "team/app", "v1");
    let body = server.request(
        "GET",
        &format!("/v2/team/app/manifests/{image}"),
        &[("Accept", ACCEPT)],
        &[],
    );
    let attach = |subject: &str, size: usize, text: &[u8]| {
        let config = image::push_blob(url, "team/app", b"{}");
        let layer = image::push_blob(url, "team/app", text);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": image::MANIFEST,
            "artifactType": "application/vnd.example.signature",
            "config": image::descriptor("application/vnd.oci.empty.v1+json", &config, 2),
            "layers": [image::descriptor("text/plain", &layer, text.len())],
            "subject": image::descriptor(image::MANIFEST, subject, size),
        })
        .to_string();
        let digest = image::push_manifest(
            url,
            "team/app",
            &digest(manifest.as_bytes()),
            image::MANIFEST,
            manifest.as_bytes(),
        );
        (digest, manifest.len())
    };
    let (signature, size) = attach(&image, body.body.len(), b"signature");
    let (counter, _) = attach(&signature, size, b"countersignature");
    push_index(url, "team", "multi");
    let large = vec![3_u8; 300_000];
    image::push_artifact(url, "team/blobs", "v1", "application/vnd.example", &large);
    image::push_artifact(url, "other/app", "v1", "application/vnd.example", &large);
    image::push_artifact(url, "other/app", "v2", "application/vnd.example", &large);
    (image, signature, counter)
}

#[test]
fn what_goes_out_comes_back_with_equal_digests() {
    use std::os::unix::fs::MetadataExt as _;
    let scratch = Scratch::new();
    let mut server = Server::start();
    let (image, signature, counter) = fill(&server);
    let tags = tags_of(server.url(), &REPOSITORIES);
    let data = server.data().to_owned();
    server.stop();

    let out = scratch.join("out");
    let export = |data: &std::path::Path| {
        run(&scratch, "longshore")
            .args(["--json", "export", "--data"])
            .arg(data)
            .arg("--to")
            .arg(&out)
    };
    let report = export(&data).ok().json();
    complete(&report);
    let written = files(&out);
    let again = export(&data).ok().json();
    complete(&again);
    assert_eq!(again["moved"]["copied"], 0);
    assert_eq!(again["moved"]["manifests"], 0);
    assert_eq!(files(&out), written);
    // One file for the layer that two repositories share.
    let hex = digest(&vec![3_u8; 300_000]).replace("sha256:", "");
    let shared = out.join("other/app/blobs/sha256").join(hex);
    assert_eq!(
        std::fs::metadata(shared)
            .expect("the layer is there")
            .nlink(),
        2
    );
    // Another program reads it.
    run(&scratch, "skopeo")
        .args(["inspect", "--raw"])
        .arg(format!("oci:{}:v1", out.join("team/app").display()))
        .ok();

    let back = scratch.join("back");
    let source = format!("layout:{}", out.display());
    let report = import(&scratch, &source, &back, &[]).ok().json();
    complete(&report);
    verify(&back);
    let server = serve(&back);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), tags);
    assert_eq!(
        referrers(server.url(), "team/app", &image),
        [signature.as_str()]
    );
    assert_eq!(
        referrers(server.url(), "team/app", &signature),
        [counter.as_str()]
    );

    // Over the wire it is the same tree.
    let wire = scratch.join("wire");
    let report = run(&scratch, "longshore")
        .args(["--json", "export", "--from", server.host(), "--to"])
        .arg(&wire)
        .ok()
        .json();
    complete(&report);
    let strip = |root: &std::path::Path| {
        files(root)
            .into_iter()
            .map(|(path, content)| {
                (
                    path.strip_prefix(root).map(std::path::Path::to_owned).ok(),
                    content,
                )
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(strip(&wire), strip(&out));
}

#[test]
fn a_damaged_file_of_an_export_is_written_again() {
    let scratch = Scratch::new();
    let mut server = Server::start();
    let digest = image::push_artifact(
        server.url(),
        "a/b",
        "v1",
        "application/vnd.example",
        b"layer",
    );
    let data = server.data().to_owned();
    server.stop();
    let out = scratch.join("out");
    let export = || {
        run(&scratch, "longshore")
            .args(["--json", "export", "--data"])
            .arg(&data)
            .arg("--to")
            .arg(&out)
            .ok()
            .json()
    };
    complete(&export());
    let file = out
        .join("a/b/blobs/sha256")
        .join(digest.replace("sha256:", ""));
    let whole = std::fs::read(&file).expect("the manifest is there");
    std::fs::write(&file, b"{}").expect("a file can be written");
    complete(&export());
    assert_eq!(std::fs::read(&file).expect("the manifest is there"), whole);
}

#[test]
fn a_layout_alone_and_the_names_that_programs_write() {
    let scratch = Scratch::new();
    let root = scratch.dir("alpine");
    let mut layout = Handmade::new(&root);
    let image = layout.manifest(b"one", None);
    layout.list(
        image::MANIFEST,
        &image,
        Some("docker.io/library/alpine:3.20"),
    );
    let second = layout.manifest(b"two", None);
    layout.list(image::MANIFEST, &second, None);
    let third = layout.manifest(b"three", None);
    layout.list(image::MANIFEST, &third, Some("no tag at all"));
    layout.finish();
    let data = scratch.join("data");
    let source = format!("layout:{}", root.display());
    let report = import(&scratch, &source, &data, &[]).fails().json();
    assert_eq!(
        problems(&report),
        ["`no tag at all` is no tag, its manifest comes without one"]
    );
    assert_eq!(report["differences"], json!([]));
    assert_eq!(report["destination"]["manifests"], 3);
    let server = serve(&data);
    assert_eq!(tags_of(server.url(), &["alpine"])["alpine:3.20"], image.0);
}
