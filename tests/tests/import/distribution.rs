//! The storage directory of the real distribution registry, filled by real clients.

use e2e::image::{self, Image};
use e2e::{Scratch, digest, http, server};
use rustix::process::Signal;

use crate::{
    ACCEPT, Distribution, Tags, complete, files, import, push_index, referrers, run, serve,
    tags_of, verify,
};

pub(crate) const REPOSITORIES: [&str; 4] =
    ["shop/app", "shop/docker", "deep/er/and/deeper", "notes"];

/// What was pushed.
pub(crate) struct Filled {
    pub(crate) tags: Tags,
    pub(crate) image: String,
    /// An artifact that oras attached to the image.
    pub(crate) attached: String,
    /// A manifest that lost its tag.
    untagged: String,
    multi: Vec<String>,
}

/// Fills a registry with what real clients push. It has no referrers API, so what is attached is in an index under a
/// tag.
pub(crate) fn fill(scratch: &Scratch, registry: &Distribution) -> Filled {
    let (url, host) = (&registry.url, registry.host());
    let untagged = Image::shell("echo first")
        .salt("first")
        .push(url, "shop/app", "v1");
    let image = Image::shell("echo second")
        .salt("second")
        .push(url, "shop/app", "v1");
    run(scratch, "crane")
        .args([
            "tag",
            "--insecure",
            &format!("{host}/shop/app:v1"),
            "latest",
        ])
        .ok();
    let (multi, _) = push_index(url, "shop/app", "multi");
    run(scratch, "skopeo")
        .args([
            "copy",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            "--format",
            "v2s2",
        ])
        .arg(format!("docker://{host}/shop/app:v1"))
        .arg(format!("docker://{host}/shop/docker:v2s2"))
        .ok();
    scratch.write("sbom.json", "{\"sbom\":true}");
    run(scratch, "oras")
        .args([
            "attach",
            "--plain-http",
            "--artifact-type",
            "application/vnd.example.sbom",
        ])
        .arg(format!("{host}/shop/app@{image}"))
        .arg("sbom.json:application/json")
        .ok();
    let schema = image.replace(':', "-");
    let index = http::request(
        "GET",
        &format!("{url}/v2/shop/app/manifests/{schema}"),
        &[("Accept", ACCEPT)],
        &[],
    )
    .json();
    let attached = index["manifests"][0]["digest"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    run(scratch, "cosign2").args(["generate-key-pair"]).ok();
    run(scratch, "cosign2")
        .args([
            "sign",
            "--key",
            "cosign.key",
            "--allow-http-registry=true",
            "--yes",
            "--tlog-upload=false",
        ])
        .arg(format!("{host}/shop/app@{image}"))
        .ok();
    image::push_artifact(
        url,
        "deep/er/and/deeper",
        "v0",
        "application/vnd.example",
        b"layer",
    );
    image::push_artifact(
        url,
        "notes",
        "large",
        "application/vnd.example",
        &noise(3 << 20),
    );
    // A repository that another one shares its large blob with.
    image::push_artifact(
        url,
        "deep/er/and/deeper",
        "v1",
        "application/vnd.example",
        &noise(3 << 20),
    );
    Filled {
        tags: tags_of(url, &REPOSITORIES),
        image,
        attached,
        untagged,
        multi,
    }
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
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

#[test]
fn everything_comes_with_equal_digests_and_the_source_stays() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let filled = fill(&scratch, &registry);
    let from = registry.stop();
    let before = files(&from);
    let source = format!("distribution:{}", from.display());
    let data = scratch.join("data");

    let dry = import(&scratch, &source, &scratch.join("dry"), &["--dry-run"])
        .ok()
        .json();
    let report = import(&scratch, &source, &data, &[]).ok().json();
    complete(&report);
    assert_eq!(dry["source"], report["source"]);
    assert_eq!(report["source"]["tags"], filled.tags.len());
    assert_eq!(report["source"]["repositories"], REPOSITORIES.len());
    assert_eq!(files(&from), before, "the source was changed");
    verify(&data);

    // A second run has nothing to do.
    let again = import(&scratch, &source, &data, &[]).ok().json();
    complete(&again);
    for what in [
        "manifests",
        "tags",
        "copied",
        "reflinked",
        "linked",
        "bytes",
    ] {
        assert_eq!(again["moved"][what], 0, "{again:#}");
    }

    let server = serve(&data);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), filled.tags);
    // The index of the tag schema became edges.
    let listed = referrers(server.url(), "shop/app", &filled.image);
    assert_eq!(listed, [filled.attached.as_str()]);
    run(&scratch, "cosign2")
        .args([
            "verify",
            "--key",
            "cosign.pub",
            "--allow-http-registry=true",
            "--insecure-ignore-tlog=true",
        ])
        .arg(format!("{}/shop/app:v1", server.host()))
        .ok();
    run(&scratch, "crane")
        .args(["validate", "--insecure", "--remote"])
        .arg(format!("{}/shop/app:multi", server.host()))
        .ok();
    for digest in &filled.multi {
        assert_eq!(manifest(server.url(), "shop/app", digest), 200);
    }
    assert_eq!(manifest(server.url(), "shop/app", &filled.untagged), 404);
}

fn manifest(url: &str, repository: &str, reference: &str) -> u16 {
    http::request(
        "GET",
        &format!("{url}/v2/{repository}/manifests/{reference}"),
        &[("Accept", ACCEPT)],
        &[],
    )
    .status()
}

#[test]
fn untagged_manifests_patterns_and_a_prefix() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let filled = fill(&scratch, &registry);
    let from = registry.stop();
    // The directory below, which is what some configurations name.
    let source = format!("distribution:{}", from.join("docker/registry/v2").display());
    let data = scratch.join("data");
    let more = [
        "--untagged",
        "--repository",
        "shop/*",
        "--as",
        "old/registry",
    ];
    let report = import(&scratch, &source, &data, &more).ok().json();
    complete(&report);
    assert_eq!(report["source"]["repositories"], 2);
    let server = serve(&data);
    assert_eq!(
        manifest(server.url(), "old/registry/shop/app", &filled.untagged),
        200
    );
    assert_eq!(
        manifest(server.url(), "old/registry/shop/docker", "v2s2"),
        200
    );
    let listed = http::get(&format!("{}/v2/_catalog", server.url())).json();
    assert_eq!(
        listed["repositories"],
        serde_json::json!(["old/registry/shop/app", "old/registry/shop/docker"])
    );
}

#[test]
fn files_are_shared_where_it_is_asked_for() {
    use std::os::unix::fs::MetadataExt as _;
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let url = registry.url.clone();
    image::push_artifact(
        &url,
        "a/b",
        "v1",
        "application/vnd.example",
        &noise(1 << 20),
    );
    let from = registry.stop();
    let source = format!("distribution:{}", from.display());
    let data = scratch.join("data");
    let report = import(&scratch, &source, &data, &["--link"]).ok().json();
    complete(&report);
    let shared = report["moved"]["linked"].as_u64().unwrap_or_default()
        + report["moved"]["reflinked"].as_u64().unwrap_or_default();
    assert_eq!(shared, 1, "{report:#}");
    let hex = digest(&noise(1 << 20)).replace("sha256:", "");
    let file = from.join(format!(
        "docker/registry/v2/blobs/sha256/{}/{hex}/data",
        &hex[..2]
    ));
    let links = std::fs::metadata(&file)
        .expect("the source has the file")
        .nlink();
    assert_eq!(
        links,
        1 + report["moved"]["linked"].as_u64().unwrap_or_default()
    );
    verify(&data);
    // Ours goes away alone.
    std::fs::remove_dir_all(&data).expect("a data directory can be removed");
    assert_eq!(
        digest(&std::fs::read(&file).expect("the file stays")),
        format!("sha256:{hex}")
    );

    let report = import(&scratch, &source, &data, &["--copy"]).ok().json();
    assert_eq!(report["moved"]["linked"], 0);
    assert_eq!(report["moved"]["reflinked"], 0);
    complete(&report);
}

#[test]
fn a_data_directory_in_use_is_refused_with_what_to_do() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    image::push_artifact(&registry.url, "a/b", "v1", "application/vnd.example", b"x");
    let source = format!("distribution:{}", registry.stop().display());
    let data = scratch.join("data");
    let _server = serve(&data);
    import(&scratch, &source, &data, &[])
        .fails()
        .says("in use by another process")
        .says("stop the server");
}

#[test]
fn a_registry_that_runs_is_read_over_the_wire() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let filled = fill(&scratch, &registry);
    let data = scratch.join("data");
    let source = format!("registry:{}", registry.host());
    let report = import(&scratch, &source, &data, &["--parallel", "3"])
        .ok()
        .json();
    complete(&report);
    assert_eq!(report["source"]["tags"], filled.tags.len());
    verify(&data);
    // Ours as the source, with its referrers API, into yet another one; a prefix narrows it.
    let server = serve(&data);
    assert_eq!(tags_of(server.url(), &REPOSITORIES), filled.tags);
    let second = scratch.join("second");
    let source = format!("registry:{}/shop", server.host());
    let report = import(&scratch, &source, &second, &["--rate", "500"])
        .ok()
        .json();
    complete(&report);
    assert_eq!(report["source"]["repositories"], 2);
    verify(&second);
    let server = serve(&second);
    let listed = referrers(server.url(), "shop/app", &filled.image);
    assert_eq!(listed, [filled.attached.as_str()]);
}

#[test]
fn a_killed_import_goes_on_and_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    for round in 0..6_u8 {
        let mut layer = noise(600_000);
        layer[0] = round;
        for tag in ["v1", "v2"] {
            let name = format!("team{}/app", round % 3);
            image::push_artifact(
                &registry.url,
                &name,
                &format!("{tag}-{round}"),
                "application/vnd.example",
                &layer,
            );
        }
    }
    let source = format!("distribution:{}", registry.stop().display());
    for (placement, seed) in [
        ("--copy", 1_u64),
        ("--link", 2),
        ("--link", 3),
        ("--copy", 4),
    ] {
        let data = scratch.join(&format!("data{seed}"));
        let mut state = seed;
        let mut killed = 0;
        for _ in 0..40 {
            let mut child = import(&scratch, &source, &data, &[placement, "--parallel", "2"])
                .spawn(&scratch.join("import.log"));
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Anywhere in its life: the point is chance, nothing is asserted about how long a step takes.
            std::thread::sleep(std::time::Duration::from_micros(
                2_000 + (state >> 33) % 60_000,
            ));
            server::signal(child.id(), Signal::KILL);
            let status = child.wait().expect("a child can be waited for");
            if status.success() {
                break;
            }
            killed += 1;
            if data.join("format").exists() {
                verify(&data);
            }
        }
        let report = import(&scratch, &source, &data, &[placement]).ok().json();
        complete(&report);
        verify(&data);
        assert_eq!(
            report["destination"]["tags"], 12,
            "after {killed} kills: {report:#}"
        );
    }
}
