//! A whole store goes from a data directory to PostgreSQL and an S3-compatible store and back, also when it is killed
//! on the way, and an import goes straight into a cluster.

use e2e::cluster::{Cluster, Storage};
use e2e::image::{self, Image};
use e2e::objects::Kind;
use e2e::server::{self, Options};
use e2e::{Run, Scratch, Server, digest, tools};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{complete, push_index, referrers, run, serve, tags_of, verify};

const REPOSITORIES: [&str; 3] = ["shop/app", "shop/multi", "notes"];

/// Bytes that are the same for the same seed and compress badly.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Fills a registry; an image that something refers to.
fn fill(url: &str) -> String {
    let image = Image::shell("echo hello")
        .salt("x")
        .push(url, "shop/app", "v1");
    let signature = json!({
        "schemaVersion": 2,
        "mediaType": image::MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": image::descriptor("application/vnd.oci.empty.v1+json", &image::push_blob(url, "shop/app", b"{}"), 2),
        "layers": [image::descriptor("text/plain", &image::push_blob(url, "shop/app", b"signed"), 6)],
        "subject": image::descriptor(image::MANIFEST, &image, 500),
    })
    .to_string();
    image::push_manifest(
        url,
        "shop/app",
        &digest(signature.as_bytes()),
        image::MANIFEST,
        signature.as_bytes(),
    );
    push_index(url, "shop/multi", "v1");
    for seed in 0..6 {
        let tag = format!("t{seed}");
        image::push_artifact(
            url,
            "notes",
            &tag,
            "application/vnd.example",
            &noise(seed, 400_000),
        );
    }
    // More than one part of an object store.
    image::push_artifact(
        url,
        "notes",
        "huge",
        "application/vnd.example",
        &noise(99, 40 << 20),
    );
    // A tag that moves has a history.
    image::push_artifact(
        url,
        "notes",
        "t0",
        "application/vnd.example",
        &noise(7, 400_000),
    );
    image
}

/// A configuration of a cluster, as a file.
fn config(scratch: &Scratch, name: &str, storage: &Storage) -> std::path::PathBuf {
    scratch.write(name, format!("version: 1\n{}", storage.config()))
}

fn migrate(scratch: &Scratch, storage: &Storage, more: &[&std::ffi::OsStr]) -> Run {
    let mut command = run(scratch, "longshore")
        .args(["--json", "migrate"])
        .args(more);
    // Credentials alone: where the stores are stands in the files.
    for (key, value) in storage.environment() {
        if key.starts_with("AWS_") {
            command = command.env(key, value);
        }
    }
    command
}

fn history(server: &Server) -> Value {
    server
        .get("/api/v1/repositories/notes/tags/t0/history")
        .json()
}

/// Starts a server of a cluster.
fn serve_cluster(storage: &Storage) -> Server {
    let mut options = Options::new(tools::program());
    for (key, value) in storage.environment() {
        options = options.env(&key, &value);
    }
    Server::with(&options)
}

#[test]
fn a_store_goes_to_a_cluster_and_back_killed_on_the_way() {
    let scratch = Scratch::new();
    let cluster = Cluster::start(Kind::Minio);
    let storage = cluster.storage();
    let file = config(&scratch, "cluster.yaml", &storage);
    let data = scratch.join("data");
    let mut server = serve(&data);
    let image = fill(server.url());
    let (tags, moves) = (tags_of(server.url(), &REPOSITORIES), history(&server));
    let attached = referrers(server.url(), "shop/app", &image);
    assert_eq!(attached.len(), 1);

    let words = |from: &std::path::Path, to: &std::path::Path| -> Vec<std::ffi::OsString> {
        vec!["--from".into(), from.into(), "--to".into(), to.into()]
    };
    let there = words(&data, &file);
    let call = |words: &[std::ffi::OsString], more: &[&str]| {
        let all: Vec<&std::ffi::OsStr> = words
            .iter()
            .map(std::ffi::OsString::as_os_str)
            .chain(more.iter().map(std::ffi::OsStr::new))
            .collect();
        migrate(&scratch, &storage, &all)
    };
    // The server runs: only objects may come.
    call(&there, &[]).fails().says("--ahead");
    let ahead = call(&there, &["--ahead"]).ok().json();
    assert_eq!(ahead["finished"], false);
    assert!(ahead["objectsMoved"].as_u64() >= Some(8), "{ahead:#}");
    // A push after the first pass is brought by the last one.
    image::push_artifact(
        server.url(),
        "notes",
        "late",
        "application/vnd.example",
        &noise(50, 300_000),
    );
    let mut tags_now = tags.clone();
    tags_now.extend(tags_of(server.url(), &["notes"]));
    server.stop();

    killed(&scratch, || call(&there, &[]), 1);
    let done = call(&there, &["--verify", "full"]).run();
    // The last of the killed runs may have come to its end.
    let report = done.json();
    assert_eq!(report["problems"], json!([]), "{done}");
    assert_eq!(report["finished"], true, "{done}");
    Run::new(tools::program())
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(&data)
        .fails()
        .says("was carried to");

    let mut server = serve_cluster(&storage);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), tags_now);
    assert_eq!(referrers(server.url(), "shop/app", &image), attached);
    assert_eq!(history(&server), moves);
    let huge = server.get(&format!("/v2/notes/blobs/{}", digest(&noise(99, 40 << 20))));
    assert_eq!(digest(&huge.body), digest(&noise(99, 40 << 20)));
    image::push_artifact(
        server.url(),
        "notes",
        "in-cluster",
        "application/vnd.example",
        &noise(60, 500_000),
    );
    let tags = tags_of(server.url(), &REPOSITORIES);
    server.stop();
    assert_eq!(
        cluster.objects.open_uploads("longshore"),
        Vec::<String>::new()
    );

    let back = scratch.join("back");
    let home = words(&file, &back);
    call(&home, &["--ahead"]).ok();
    killed(&scratch, || call(&home, &[]), 2);
    let done = call(&home, &["--verify", "full"]).run();
    assert_eq!(done.json()["finished"], true, "{done}");
    verify(&back);
    let server = serve(&back);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), tags);
    assert_eq!(referrers(server.url(), "shop/app", &image), attached);
    assert_eq!(history(&server), moves);
}

/// Starts a command again and again and kills it somewhere on its way, until it comes to its end or often enough.
fn killed(scratch: &Scratch, command: impl Fn() -> Run, seed: u64) {
    let mut state = seed;
    for _ in 0..12 {
        let mut child = command().spawn(&scratch.join("migrate.log"));
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // Anywhere in its life: the point is chance, nothing is asserted about how long a step takes.
        std::thread::sleep(std::time::Duration::from_micros(
            20_000 + (state >> 33) % 500_000,
        ));
        server::signal(child.id(), Signal::KILL);
        if child.wait().expect("a child can be waited for").success() {
            return;
        }
    }
}

#[test]
fn an_import_and_an_export_of_a_cluster() {
    let scratch = Scratch::new();
    let cluster = Cluster::start(Kind::Versitygw);
    let storage = cluster.storage();
    let mut server = Server::start();
    let image = fill(server.url());
    let tags = tags_of(server.url(), &REPOSITORIES);
    let data = server.data().to_owned();
    let attached = referrers(server.url(), "shop/app", &image);
    server.stop();
    let out = scratch.join("out");
    let export = |place: &[&std::ffi::OsStr], to: &std::path::Path| {
        let mut command = run(&scratch, "longshore")
            .args(["--json", "export"])
            .args(place);
        for (key, value) in storage.environment() {
            if key.starts_with("AWS_") {
                command = command.env(key, value);
            }
        }
        command.arg("--to").arg(to).ok().json()
    };
    complete(&export(&["--data".as_ref(), data.as_os_str()], &out));
    let file = config(&scratch, "cluster.yaml", &storage);
    let mut import = run(&scratch, "longshore").args(["--json", "import", "--from"]);
    for (key, value) in storage.environment() {
        if key.starts_with("AWS_") {
            import = import.env(key, value);
        }
    }
    let import = import
        .arg(format!("layout:{}", out.display()))
        .arg("--config")
        .arg(&file);
    complete(&import.ok().json());
    complete(&import.ok().json());
    let server = serve_cluster(&storage);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), tags);
    assert_eq!(referrers(server.url(), "shop/app", &image), attached);
    let second = scratch.join("second");
    complete(&export(&["--config".as_ref(), file.as_os_str()], &second));
    let digests = |root: &std::path::Path| {
        let mut all: Vec<String> = crate::files(root).into_values().collect();
        all.sort();
        all
    };
    assert_eq!(digests(&second), digests(&out));
}
