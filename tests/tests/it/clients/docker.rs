//! Docker's client and engine.

use e2e::image::Image;

use super::{PASSWORD, Site, USER};

/// Removes the names of this test's registry from the engine.
fn forget(site: &Site, names: &[&str]) {
    site.run("docker")
        .args(["rmi", "--force"])
        .args(names)
        .run();
}

#[test]
fn push() {
    let site = Site::open();
    let repository = site.repository("made-by-docker");
    let name = site.at(&format!("{repository}:1"));
    // A root file system that no registry gave, made into an image by the engine.
    let layer = site
        .home
        .write("rootfs.tar", &Image::shell("true").layers()[0]);
    site.run("docker")
        .args(["import", "--change", "CMD [\"/bin/busybox\",\"true\"]"])
        .arg(&layer)
        .arg(&name)
        .ok();
    let pushed = site.run("docker").args(["push", &name]).ok();
    let digest = site.resolve(&repository, "1").expect("the tag is there");
    pushed.says(&digest);
    // A second push moves nothing, and a second tag of the same image has the same digest.
    let second = site.at(&format!("{repository}:2"));
    site.run("docker").args(["tag", &name, &second]).ok();
    site.run("docker")
        .args(["push", &second])
        .ok()
        .says("Layer already exists");
    assert_eq!(site.resolve(&repository, "2"), Some(digest));
    forget(&site, &[&name, &second]);
}

#[test]
fn pull() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = Image::shell("echo it runs").push(&site.url, &repository, "v1");
    let name = site.at(&format!("{repository}@{digest}"));
    site.run("docker").args(["pull", &name]).ok().says(&digest);
    let said = site
        .run("docker")
        .args(["run", "--rm", "--network", "none", &name])
        .ok();
    assert_eq!(said.text(), "it runs");
    site.run("docker")
        .args(["pull", &site.at(&format!("{repository}:v1"))])
        .ok()
        .says(&digest);
    forget(&site, &[&name, &site.at(&format!("{repository}:v1"))]);
}

#[test]
fn copy() {
    let site = Site::open();
    let (from, to) = (site.repository("from"), site.repository("to"));
    site.image(&from, "v1");
    let (source, target) = (site.at(&format!("{from}:v1")), site.at(&format!("{to}:v1")));
    site.run("docker").args(["pull", &source]).ok();
    site.run("docker").args(["tag", &source, &target]).ok();
    site.run("docker").args(["push", &target]).ok();
    assert!(site.resolve(&to, "v1").is_some());
    forget(&site, &[&source, &target]);
}

#[test]
fn login() {
    let site = Site::closed();
    let name = site.at("private/app:1");
    let layer = site
        .home
        .write("rootfs.tar", &Image::shell("true").layers()[0]);
    site.run("docker").arg("import").arg(&layer).arg(&name).ok();
    site.run("docker").args(["push", &name]).fails();
    let login = |password: &str| {
        site.run("docker")
            .args(["login", "--username", USER, "--password-stdin", site.host()])
            .stdin(password)
    };
    login("wrong").fails();
    login(PASSWORD).ok();
    site.run("docker").args(["push", &name]).ok();
    site.run("docker").args(["pull", &name]).ok();
    site.run("docker").args(["logout", site.host()]).ok();
    site.run("docker").args(["pull", &name]).fails();
    forget(&site, &[&name]);
}
