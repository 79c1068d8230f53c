//! ORAS: artifacts that are no images.

use super::{PASSWORD, Site, USER};

fn oras(site: &Site, command: &str) -> e2e::Run {
    site.run("oras").words(command).arg("--plain-http")
}

#[test]
fn push() {
    let site = Site::open();
    let repository = site.repository("notes");
    site.home.write("artifact.txt", "hello world\n");
    // As the client's own quick start has it.
    let reference = site.at(&format!("{repository}:v1"));
    oras(&site, "push")
        .arg(&reference)
        .words("--artifact-type application/vnd.acme.rocket.config ./artifact.txt:text/plain")
        .ok();
    let manifest = site.manifest(&repository, "v1");
    assert_eq!(
        manifest["artifactType"],
        "application/vnd.acme.rocket.config"
    );
    assert_eq!(
        manifest["layers"][0]["annotations"]["org.opencontainers.image.title"],
        "artifact.txt"
    );
    assert_eq!(
        manifest["layers"][0]["digest"],
        e2e::digest(b"hello world\n")
    );
}

#[test]
fn push_terraform() {
    let site = Site::open();
    let repository = site.repository("vpc");
    // A module package as OpenTofu wants it: one zip. An empty archive is a valid one.
    site.home
        .write("target.zip", [b"PK\x05\x06".as_slice(), &[0; 18]].concat());
    oras(
        &site,
        "push --artifact-type=application/vnd.opentofu.modulepkg",
    )
    .arg(site.at(&format!("{repository}:1.0.0")))
    .arg("target.zip:archive/zip")
    .ok();
    let manifest = site.manifest(&repository, "1.0.0");
    assert_eq!(
        manifest["artifactType"],
        "application/vnd.opentofu.modulepkg"
    );
    assert_eq!(manifest["layers"][0]["mediaType"], "archive/zip");
}

#[test]
fn push_several() {
    let site = Site::open();
    let repository = site.repository("bundle");
    site.home.write("dir/a.txt", "a");
    site.home.write("dir/b.txt", vec![b'b'; 3 << 20]);
    site.home.write("config.json", r#"{"key":"value"}"#);
    let reference = site.at(&format!("{repository}:v1,v2,latest"));
    oras(
        &site,
        "push --config config.json:application/vnd.acme.config.v1+json --annotation k=v",
    )
    .arg(&reference)
    .arg("dir")
    .ok();
    let digest = site.resolve(&repository, "v1");
    assert!(digest.is_some());
    assert_eq!(site.resolve(&repository, "v2"), digest);
    assert_eq!(site.resolve(&repository, "latest"), digest);
    assert_eq!(site.manifest(&repository, "v1")["annotations"]["k"], "v");
}

#[test]
fn pull() {
    let site = Site::open();
    let repository = site.repository("notes");
    let big: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
    site.home.write("big.bin", &big);
    let reference = site.at(&format!("{repository}:v1"));
    oras(&site, "push").arg(&reference).arg("big.bin").ok();
    oras(&site, "pull --output out").arg(&reference).ok();
    assert!(std::fs::read(site.home.join("out/big.bin")).unwrap() == big);
}

#[test]
fn copy() {
    let site = Site::open();
    let (from, to) = (site.repository("from"), site.repository("to"));
    let digest = site.image(&from, "v1");
    site.home.write("sbom.json", "{}");
    oras(&site, "attach --artifact-type application/spdx+json")
        .arg(site.at(&format!("{from}:v1")))
        .arg("sbom.json:application/spdx+json")
        .ok();
    site.run("oras")
        .words("cp --recursive --from-plain-http --to-plain-http")
        .args([
            &site.at(&format!("{from}:v1")),
            &site.at(&format!("{to}:v1")),
        ])
        .ok();
    assert_eq!(site.resolve(&to, "v1").as_ref(), Some(&digest));
    assert_eq!(site.attached(&to, &digest), ["application/spdx+json"]);
}

#[test]
fn list() {
    let site = Site::open();
    let repository = site.repository("app");
    for tag in ["v1", "v2", "v3"] {
        site.image(&repository, tag);
    }
    assert_eq!(
        oras(&site, "repo tags")
            .arg(site.at(&repository))
            .ok()
            .text(),
        "v1\nv2\nv3"
    );
    oras(&site, "repo ls")
        .arg(site.host())
        .ok()
        .says(&repository);
}

#[test]
fn delete() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    oras(&site, "manifest delete --force")
        .arg(site.at(&format!("{repository}@{digest}")))
        .ok();
    assert_eq!(site.resolve(&repository, "v1"), None);
    // A blob that nothing needs any more can be deleted, too.
    let blob = e2e::image::push_blob(&site.url, &repository, b"unneeded");
    oras(&site, "blob delete --force")
        .arg(site.at(&format!("{repository}@{blob}")))
        .ok();
    oras(&site, "blob fetch --output -")
        .arg(site.at(&format!("{repository}@{blob}")))
        .fails();
}

#[test]
fn attach() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    site.home.write("hi.txt", "hi");
    oras(&site, "attach --artifact-type doc/example")
        .arg(site.at(&format!("{repository}:v1")))
        .arg("./hi.txt:text/plain")
        .ok();
    assert_eq!(site.attached(&repository, &digest), ["doc/example"]);
}

#[test]
fn discover() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    let reference = site.at(&format!("{repository}:v1"));
    for (name, kind) in [
        ("sbom.json", "application/spdx+json"),
        ("scan.sarif", "application/sarif+json"),
    ] {
        site.home.write(name, kind);
        oras(&site, "attach")
            .args(["--artifact-type", kind, &reference, name])
            .ok();
    }
    let found = oras(&site, "discover --format json").arg(&reference).ok();
    found
        .says("application/spdx+json")
        .says("application/sarif+json");
    let filtered = oras(
        &site,
        "discover --format json --artifact-type application/sarif+json",
    )
    .arg(&reference)
    .ok();
    assert!(
        !filtered.text().contains("application/spdx+json"),
        "{filtered}"
    );
    filtered.says("application/sarif+json");
}

#[test]
fn login() {
    let site = Site::closed();
    site.home.write("a.txt", "a");
    let reference = site.at("private/notes:v1");
    oras(&site, "push").arg(&reference).arg("a.txt").fails();
    let login = |password: &str| {
        oras(&site, "login --password-stdin")
            .args(["--username", USER, site.host()])
            .stdin(password)
    };
    login("wrong").fails();
    login(PASSWORD).ok();
    oras(&site, "push").arg(&reference).arg("a.txt").ok();
    oras(&site, "pull --output out").arg(&reference).ok();
}
