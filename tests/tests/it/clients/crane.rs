//! crane, of go-containerregistry. It takes loopback addresses for plain HTTP by itself.

use super::{PASSWORD, Site, USER};

#[test]
fn push() {
    let site = Site::open();
    let (repository, pushed) = (site.repository("app"), site.repository("pushed"));
    let digest = site.image(&repository, "v1");
    let tarball = site.home.join("app.tar");
    site.run("crane")
        .args(["pull", &site.at(&format!("{repository}:v1"))])
        .arg(&tarball)
        .ok();
    site.run("crane")
        .arg("push")
        .arg(&tarball)
        .arg(site.at(&format!("{pushed}:tarball")))
        .ok();
    assert!(site.resolve(&pushed, "tarball").is_some());
    // A layout keeps the manifest's bytes, so the digest stays.
    let layout = site.home.join("layout");
    site.run("crane")
        .args([
            "pull",
            "--format",
            "oci",
            &site.at(&format!("{repository}:v1")),
        ])
        .arg(&layout)
        .ok();
    site.run("crane")
        .arg("push")
        .arg(&layout)
        .arg(site.at(&format!("{pushed}:layout")))
        .ok();
    assert_eq!(site.resolve(&pushed, "layout"), Some(digest));
}

#[test]
fn push_append() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(2);
    header.set_mode(0o644);
    archive
        .append_data(&mut header, "added", &b"hi"[..])
        .unwrap();
    let layer = site.home.write("added.tar", archive.into_inner().unwrap());
    let target = site.at(&format!("{repository}:v2"));
    site.run("crane")
        .args([
            "append",
            "--base",
            &site.at(&format!("{repository}:v1")),
            "--new_layer",
        ])
        .arg(&layer)
        .args(["--new_tag", &target])
        .ok();
    site.run("crane")
        .args(["validate", "--remote", &target])
        .ok();
    assert_eq!(
        site.manifest(&repository, "v2")["layers"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
}

#[test]
fn pull() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let tarball = site.home.join("app.tar");
    site.run("crane")
        .args(["pull", &site.at(&format!("{repository}@{digest}"))])
        .arg(&tarball)
        .ok();
    assert!(tarball.metadata().unwrap().len() > 1 << 20);
    site.run("crane")
        .args([
            "validate",
            "--remote",
            &site.at(&format!("{repository}:v1")),
        ])
        .ok();
    let manifest = site
        .run("crane")
        .args(["manifest", &site.at(&format!("{repository}:v1"))])
        .ok();
    assert_eq!(e2e::digest(&manifest.stdout), digest);
}

#[test]
fn copy() {
    let site = Site::open();
    let (from, to) = (site.repository("from"), site.repository("to"));
    let digest = site.image(&from, "v1");
    site.run("crane")
        .args([
            "copy",
            &site.at(&format!("{from}:v1")),
            &site.at(&format!("{to}:v1")),
        ])
        .ok();
    assert_eq!(site.resolve(&to, "v1").as_ref(), Some(&digest));
    site.run("crane")
        .args(["tag", &site.at(&format!("{to}:v1")), "stable"])
        .ok();
    assert_eq!(site.resolve(&to, "stable"), Some(digest));
}

#[test]
fn list() {
    let site = Site::open();
    let repository = site.repository("app");
    for tag in ["v1", "v2"] {
        site.image(&repository, tag);
    }
    assert_eq!(
        site.run("crane")
            .args(["ls", &site.at(&repository)])
            .ok()
            .text(),
        "v1\nv2"
    );
    site.run("crane")
        .args(["catalog", site.host()])
        .ok()
        .says(&repository);
}

#[test]
fn delete() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    site.run("crane")
        .args(["delete", &site.at(&format!("{repository}@{digest}"))])
        .ok();
    assert_eq!(site.resolve(&repository, &digest), None);
    site.run("crane")
        .args(["digest", &site.at(&format!("{repository}:v1"))])
        .fails();
}

#[test]
fn discover() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    assert_eq!(
        site.run("crane")
            .args(["digest", &site.at(&format!("{repository}:v1"))])
            .ok()
            .text(),
        digest
    );
    let config = site
        .run("crane")
        .args(["config", &site.at(&format!("{repository}:v1"))])
        .ok()
        .json();
    assert_eq!(config["os"], "linux");
}

#[test]
fn login() {
    let site = Site::closed();
    let reference = site.at("private/app:v1");
    site.run("crane").args(["digest", &reference]).fails();
    site.run("crane")
        .args([
            "auth",
            "login",
            site.host(),
            "--username",
            USER,
            "--password-stdin",
        ])
        .stdin(PASSWORD)
        .ok();
    let open = Site::open();
    let repository = open.repository("app");
    let digest = open.image(&repository, "v1");
    site.run("crane")
        .args(["copy", &open.at(&format!("{repository}:v1")), &reference])
        .ok();
    assert_eq!(
        site.run("crane").args(["digest", &reference]).ok().text(),
        digest
    );
}
