//! Helm with charts in a registry.

use super::{PASSWORD, Site, USER};

/// Makes and packs the chart that `helm create` makes.
fn chart(site: &Site) {
    site.run("helm").args(["create", "shop"]).ok();
    site.run("helm")
        .args(["package", "shop", "--version", "0.1.0"])
        .ok();
}

#[test]
fn push() {
    let site = Site::open();
    chart(&site);
    let charts = site.repository("charts");
    // As the client's own documentation has it.
    let pushed = site
        .run("helm")
        .args([
            "push",
            "shop-0.1.0.tgz",
            &format!("oci://{}", site.at(&charts)),
            "--plain-http",
        ])
        .ok();
    let repository = format!("{charts}/shop");
    let digest = site
        .resolve(&repository, "0.1.0")
        .expect("the version is a tag");
    pushed.says(&digest);
    let manifest = site.manifest(&repository, "0.1.0");
    assert_eq!(
        manifest["config"]["mediaType"],
        "application/vnd.cncf.helm.config.v1+json"
    );
}

#[test]
fn pull() {
    let site = Site::open();
    chart(&site);
    let charts = format!("oci://{}", site.at(&site.repository("charts")));
    site.run("helm")
        .args(["push", "shop-0.1.0.tgz", &charts, "--plain-http"])
        .ok();
    let out = site.home.dir("out");
    let name = format!("{charts}/shop");
    site.run("helm")
        .args([
            "pull",
            &name,
            "--version",
            "0.1.0",
            "--plain-http",
            "--destination",
        ])
        .arg(&out)
        .ok();
    let (pushed, pulled) = (site.home.join("shop-0.1.0.tgz"), out.join("shop-0.1.0.tgz"));
    assert!(std::fs::read(pushed).unwrap() == std::fs::read(pulled).unwrap());
    // Without a version the newest is found by listing the tags.
    site.run("helm")
        .args(["template", "web", &name, "--plain-http"])
        .ok()
        .says("kind: Deployment");
}

#[test]
fn discover() {
    let site = Site::open();
    chart(&site);
    let charts = format!("oci://{}", site.at(&site.repository("charts")));
    site.run("helm")
        .args(["push", "shop-0.1.0.tgz", &charts, "--plain-http"])
        .ok();
    let name = format!("{charts}/shop");
    site.run("helm")
        .args(["show", "chart", &name, "--plain-http"])
        .ok()
        .says("version: 0.1.0");
}

#[test]
fn login() {
    let site = Site::closed();
    chart(&site);
    let charts = format!("oci://{}", site.at("private"));
    site.run("helm")
        .args(["push", "shop-0.1.0.tgz", &charts, "--plain-http"])
        .fails();
    site.run("helm")
        .args([
            "registry",
            "login",
            site.host(),
            "--plain-http",
            "--username",
            USER,
            "--password-stdin",
        ])
        .stdin(PASSWORD)
        .ok();
    site.run("helm")
        .args(["push", "shop-0.1.0.tgz", &charts, "--plain-http"])
        .ok();
}
