//! skopeo, of the release that the machine has.

use super::{PASSWORD, Site, USER};

/// The options that a registry without TLS needs.
const BOTH: &[&str] = &["copy", "--src-tls-verify=false", "--dest-tls-verify=false"];

fn docker(site: &Site, rest: &str) -> String {
    format!("docker://{}", site.at(rest))
}

/// Accepts what is unsigned: the machine need not have a policy of its own.
fn skopeo(site: &Site) -> e2e::Run {
    let policy = site.home.write(
        "policy.json",
        r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
    );
    site.run("skopeo").arg("--policy").arg(policy)
}

#[test]
fn push() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let layout = site.home.join("layout");
    let local = format!("oci:{}:v1", layout.display());
    skopeo(&site)
        .args(BOTH)
        .args([&docker(&site, &format!("{repository}:v1")), &local])
        .ok();
    let pushed = site.repository("pushed");
    skopeo(&site)
        .args(BOTH)
        .args([&local, &docker(&site, &format!("{pushed}:v1"))])
        .ok();
    assert_eq!(site.resolve(&pushed, "v1"), Some(digest));
}

#[test]
fn push_schema2() {
    let site = Site::open();
    let (repository, pushed) = (site.repository("app"), site.repository("docker"));
    site.image(&repository, "v1");
    skopeo(&site)
        .args(BOTH)
        .args(["--format", "v2s2"])
        .args([
            &docker(&site, &format!("{repository}:v1")),
            &docker(&site, &format!("{pushed}:v1")),
        ])
        .ok();
    assert_eq!(
        site.manifest(&pushed, "v1")["mediaType"],
        "application/vnd.docker.distribution.manifest.v2+json"
    );
}

#[test]
fn pull() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let dir = site.home.dir("pulled");
    skopeo(&site)
        .args(BOTH)
        .arg(docker(&site, &format!("{repository}@{digest}")))
        .arg(format!("dir:{}", dir.display()))
        .ok();
    let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
    assert_eq!(e2e::digest(&manifest), digest);
}

#[test]
fn copy() {
    let site = Site::open();
    let (from, to) = (site.repository("from"), site.repository("to"));
    let digest = site.image(&from, "v1");
    skopeo(&site)
        .args(BOTH)
        .args(["--all", "--preserve-digests"])
        .args([
            &docker(&site, &format!("{from}:v1")),
            &docker(&site, &format!("{to}:v2")),
        ])
        .ok();
    assert_eq!(site.resolve(&to, "v2"), Some(digest));
}

#[test]
fn copy_sync() {
    let site = Site::open();
    let (from, to) = (site.repository("app"), site.repository("mirror"));
    for tag in ["v1", "v2", "v3"] {
        site.image(&from, tag);
    }
    skopeo(&site)
        .words("sync --src docker --dest docker --src-tls-verify=false --dest-tls-verify=false")
        .args([&site.at(&from), &site.at(&to)])
        .ok();
    assert_eq!(
        site.resolve(&format!("{to}/app"), "v3"),
        site.resolve(&from, "v3")
    );
}

#[test]
fn list() {
    let site = Site::open();
    let repository = site.repository("app");
    for tag in ["v1", "v2", "latest"] {
        site.image(&repository, tag);
    }
    let listed = skopeo(&site)
        .words("list-tags --tls-verify=false")
        .arg(docker(&site, &repository))
        .ok()
        .json();
    let mut tags: Vec<_> = listed["Tags"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|tag| tag.as_str())
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, ["latest", "v1", "v2"]);
}

#[test]
fn delete() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    skopeo(&site)
        .words("delete --tls-verify=false")
        .arg(docker(&site, &format!("{repository}:v1")))
        .ok();
    assert_eq!(site.resolve(&repository, "v1"), None);
}

#[test]
fn discover() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let shown = skopeo(&site)
        .words("inspect --tls-verify=false")
        .arg(docker(&site, &format!("{repository}:v1")))
        .ok()
        .json();
    assert_eq!(shown["Digest"], digest);
    assert_eq!(shown["Os"], "linux");
}

#[test]
fn login() {
    let site = Site::closed();
    let target = docker(&site, "private/app:1");
    let open = Site::open();
    let repository = open.repository("app");
    open.image(&repository, "v1");
    let source = docker(&open, &format!("{repository}:v1"));
    skopeo(&site).args(BOTH).args([&source, &target]).fails();
    let login = |password: &str| {
        site.run("skopeo")
            .args([
                "login",
                "--tls-verify=false",
                "--username",
                USER,
                "--password-stdin",
                site.host(),
            ])
            .stdin(password)
    };
    login("wrong").fails();
    login(PASSWORD).ok();
    skopeo(&site).args(BOTH).args([&source, &target]).ok();
}
