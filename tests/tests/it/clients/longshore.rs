//! Our own command line, as a client of the registry.

use super::{PASSWORD, Site, USER};

#[test]
fn push() {
    let site = Site::open();
    let repository = site.repository("notes");
    site.home.write("artifact.txt", "hello world\n");
    let pushed = site
        .run("longshore")
        .args([
            "push",
            "--json",
            "artifact.txt:text/plain",
            &site.at(&format!("{repository}:v1")),
        ])
        .ok()
        .json();
    assert_eq!(
        pushed["digest"].as_str(),
        site.resolve(&repository, "v1").as_deref()
    );
    // Another client finds in it what it would have pushed itself.
    site.run("oras")
        .words("pull --plain-http --output out")
        .arg(site.at(&format!("{repository}:v1")))
        .ok();
    assert_eq!(
        std::fs::read(site.home.join("out/artifact.txt")).unwrap(),
        b"hello world\n"
    );
}

#[test]
fn push_layout() {
    let site = Site::open();
    let (repository, pushed) = (site.repository("app"), site.repository("pushed"));
    let digest = site.image(&repository, "v1");
    site.run("crane")
        .args([
            "pull",
            "--format",
            "oci",
            &site.at(&format!("{repository}:v1")),
            "layout",
        ])
        .ok();
    site.run("longshore")
        .args([
            "push",
            &format!("oci:layout@{digest}"),
            &site.at(&format!("{pushed}:v1")),
        ])
        .ok();
    assert_eq!(site.resolve(&pushed, "v1"), Some(digest));
}

#[test]
fn pull() {
    let site = Site::open();
    let repository = site.repository("notes");
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    site.home.write("big.bin", &big);
    let reference = site.at(&format!("{repository}:v1"));
    site.run("oras")
        .words("push --plain-http")
        .arg(&reference)
        .arg("big.bin")
        .ok();
    site.run("longshore")
        .args(["pull", "--output", "out", &reference])
        .ok();
    assert!(std::fs::read(site.home.join("out/big.bin")).unwrap() == big);
}

#[test]
fn pull_layout() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    site.run("longshore")
        .args([
            "pull",
            "--output",
            "oci:layout:v1",
            &site.at(&format!("{repository}:v1")),
        ])
        .ok();
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(site.home.join("layout/index.json")).unwrap())
            .unwrap();
    assert_eq!(index["manifests"][0]["digest"], digest);
    // Another client reads the layout.
    let to = site.repository("again");
    site.run("oras")
        .words("cp --from-oci-layout --to-plain-http layout:v1")
        .arg(site.at(&format!("{to}:v1")))
        .ok();
    assert_eq!(site.resolve(&to, "v1"), Some(digest));
}

#[test]
fn copy() {
    let site = Site::open();
    let (from, to) = (site.repository("from"), site.repository("to"));
    let digest = site.image(&from, "v1");
    site.home.write("sbom.json", "{}");
    site.run("oras")
        .words("attach --plain-http --artifact-type application/spdx+json")
        .args([
            &site.at(&format!("{from}:v1")),
            "sbom.json:application/spdx+json",
        ])
        .ok();
    site.run("longshore")
        .args([
            "copy",
            &site.at(&format!("{from}:v1")),
            &site.at(&format!("{to}:v1")),
        ])
        .ok();
    assert_eq!(site.resolve(&to, "v1").as_ref(), Some(&digest));
    assert_eq!(site.attached(&to, &digest), ["application/spdx+json"]);
    site.run("crane")
        .args(["validate", "--remote", &site.at(&format!("{to}:v1"))])
        .ok();
}

#[test]
fn copy_to_another_registry_and_back() {
    let (near, far) = (Site::open(), Site::open());
    let repository = near.repository("app");
    let digest = near.image(&repository, "v1");
    let (key, public) = near.own_keys("ours");
    let reference = near.at(&format!("{repository}:v1"));
    near.run("longshore")
        .arg("sign")
        .arg("--key")
        .arg(&key)
        .arg(&reference)
        .ok();
    near.run("longshore")
        .args(["copy", &reference, &far.at("mirror/app:v1")])
        .ok();
    assert_eq!(far.resolve("mirror/app", "v1"), Some(digest));
    near.run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(far.at("mirror/app:v1"))
        .ok();
}

#[test]
fn list() {
    let site = Site::open();
    let repository = site.repository("app");
    for tag in ["v1", "v2"] {
        site.image(&repository, tag);
    }
    let tags = site
        .run("longshore")
        .args(["ls", &site.at(&repository)])
        .ok()
        .text();
    assert_eq!(tags.split_whitespace().collect::<Vec<_>>(), ["v1", "v2"]);
    site.run("longshore")
        .args(["ls", site.host()])
        .ok()
        .says(&repository);
    site.run("longshore")
        .args(["tag", &site.at(&format!("{repository}:v1")), "stable"])
        .ok();
    assert_eq!(
        site.resolve(&repository, "stable"),
        site.resolve(&repository, "v1")
    );
}

#[test]
fn delete() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    site.image(&repository, "v2");
    site.run("longshore")
        .args(["rm", &site.at(&format!("{repository}:v1"))])
        .ok();
    assert_eq!(site.resolve(&repository, "v1"), None);
    assert_eq!(
        site.resolve(&repository, "v2").as_ref(),
        Some(&digest),
        "another tag is not touched"
    );
    site.run("longshore")
        .args(["rm", &site.at(&format!("{repository}@{digest}"))])
        .ok();
    assert_eq!(site.resolve(&repository, "v2"), None);
    let gone = site
        .run("longshore")
        .args(["inspect", &site.at(&format!("{repository}:v2"))])
        .fails();
    assert_eq!(gone.code, Some(4), "{gone}");
}

#[test]
fn discover() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    site.home.write("sbom.json", "{}");
    let reference = site.at(&format!("{repository}:v1"));
    site.run("oras")
        .words("attach --plain-http --artifact-type application/spdx+json")
        .args([&reference, "sbom.json:application/spdx+json"])
        .ok();
    site.run("longshore")
        .args(["inspect", &reference])
        .ok()
        .says("application/spdx+json");
}

#[test]
fn sign() {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let (key, _) = site.own_keys("ours");
    site.run("longshore")
        .arg("sign")
        .arg("--key")
        .arg(&key)
        .arg(site.at(&format!("{repository}:v1")))
        .ok();
    // Both forms are written.
    assert_eq!(
        site.attached(&repository, &digest),
        ["application/vnd.dev.sigstore.bundle.v0.3+json"]
    );
    assert!(
        site.resolve(&repository, &format!("{}.sig", digest.replace(':', "-")))
            .is_some()
    );
}

#[test]
fn sign_with_a_key_of_cosign() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    let (key, public) = site.keys();
    let reference = site.at(&format!("{repository}:v1"));
    site.run("longshore")
        .arg("sign")
        .arg("--key")
        .arg(&key)
        .arg(&reference)
        .ok();
    site.run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(&reference)
        .ok();
}

#[test]
fn verify() {
    let site = Site::open();
    let repository = site.repository("app");
    site.image(&repository, "v1");
    let (key, public) = site.own_keys("ours");
    let (_, stranger) = site.own_keys("stranger");
    let reference = site.at(&format!("{repository}:v1"));
    let refused = site
        .run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(&reference)
        .fails();
    assert_eq!(refused.code, Some(3), "{refused}");
    site.run("longshore")
        .arg("sign")
        .arg("--key")
        .arg(&key)
        .arg(&reference)
        .ok();
    site.run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(&reference)
        .ok();
    let refused = site
        .run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&stranger)
        .arg(&reference)
        .fails();
    assert_eq!(refused.code, Some(3), "{refused}");
    let both = |threshold: &str| {
        site.run("longshore")
            .args(["verify", "--threshold", threshold, "--key"])
            .arg(&public)
            .arg("--key")
            .arg(&stranger)
            .arg(&reference)
    };
    both("1").ok();
    both("2").fails();
}

/// What cosign signs with a key verifies here, in the older form and as a bundle.
#[test]
fn verify_what_cosign_signed() {
    let site = Site::open();
    let (_, public) = site.keys();
    for (tool, options) in [
        ("cosign2", "--tlog-upload=false"),
        ("cosign3", "--signing-config=signing-config.json"),
        (
            "cosign3",
            "--use-signing-config=false --new-bundle-format=false --tlog-upload=false",
        ),
    ] {
        site.home.write(
            "signing-config.json",
            r#"{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json","rekorTlogConfig":{},"tsaConfig":{}}"#,
        );
        let repository = site.repository(&format!("app-{tool}-{}", options.len()));
        let digest = site.image(&repository, "v1");
        let reference = site.at(&format!("{repository}@{digest}"));
        site.run("longshore")
            .arg("verify")
            .arg("--key")
            .arg(&public)
            .arg(&reference)
            .fails();
        site.run(tool)
            .words("sign --key cosign.key --allow-http-registry=true --yes")
            .words(options)
            .arg(&reference)
            .ok();
        site.run("longshore")
            .arg("verify")
            .arg("--key")
            .arg(&public)
            .arg(&reference)
            .ok();
    }
}

#[test]
fn login() {
    let site = Site::closed();
    site.home.write("a.txt", "a");
    let reference = site.at("private/notes:v1");
    let refused = site
        .run("longshore")
        .args(["push", "a.txt", &reference])
        .fails();
    assert_eq!(refused.code, Some(5), "{refused}");
    let login = |password: &str| {
        site.run("longshore")
            .args(["login", "--username", USER, "--password-stdin", site.host()])
            .stdin(password)
    };
    login("wrong").fails();
    login(PASSWORD).ok();
    site.run("longshore")
        .args(["push", "a.txt", &reference])
        .ok();
    // The login is docker's own, so another client has it as well.
    site.run("oras")
        .words("pull --plain-http --output out")
        .arg(&reference)
        .ok();
    site.run("longshore").args(["logout", site.host()]).ok();
    site.run("longshore")
        .args(["pull", "--output", "out2", &reference])
        .fails();
}
