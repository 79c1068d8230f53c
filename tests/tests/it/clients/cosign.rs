//! cosign 2.5, which writes and reads the older form, and 3.x, which prefers bundles.

use std::path::Path;

use super::{PASSWORD, Site, USER};

const HTTP: &str = "--allow-http-registry=true";

/// Signs a reference with a key, without any service of the internet.
fn sign_with(site: &Site, tool: &str, key: &Path, reference: &str) {
    let run = site
        .run(tool)
        .arg("sign")
        .arg("--key")
        .arg(key)
        .args([HTTP, "--yes"]);
    if tool == "cosign2" {
        run.args(["--tlog-upload=false", reference]).ok();
    } else {
        // A configuration without services: nothing is asked, nothing is logged.
        let config = site.home.write(
            "signing-config.json",
            r#"{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json","rekorTlogConfig":{},"tsaConfig":{}}"#,
        );
        run.arg("--signing-config").arg(config).arg(reference).ok();
    }
}

fn verify_with(site: &Site, tool: &str, key: &Path, reference: &str) -> e2e::Run {
    site.run(tool).arg("verify").arg("--key").arg(key).args([
        HTTP,
        "--insecure-ignore-tlog=true",
        reference,
    ])
}

fn signed(tool: &str) -> (Site, String, String) {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let (key, _) = site.keys();
    let reference = site.at(&format!("{repository}@{digest}"));
    sign_with(&site, tool, &key, &reference);
    (site, repository, digest)
}

pub(super) fn sign(tool: &str) {
    let (site, repository, digest) = signed(tool);
    if tool == "cosign2" {
        let tag = format!("{}.sig", digest.replace(':', "-"));
        let layers = site.manifest(&repository, &tag);
        assert_eq!(
            layers["layers"][0]["mediaType"],
            "application/vnd.dev.cosign.simplesigning.v1+json"
        );
    } else {
        assert_eq!(
            site.attached(&repository, &digest),
            ["application/vnd.dev.sigstore.bundle.v0.3+json"]
        );
    }
}

pub(super) fn verify(tool: &str) {
    let (site, repository, digest) = signed(tool);
    let reference = site.at(&format!("{repository}:v1"));
    verify_with(&site, tool, &site.home.join("cosign.pub"), &reference)
        .ok()
        .says(&digest);
    let (_, stranger) = site.own_keys("stranger");
    verify_with(&site, tool, &stranger, &reference).fails();
    let unsigned = site.image(&repository, "unsigned-by-anyone");
    assert_eq!(
        unsigned, digest,
        "the same bytes are the same digest, whatever the tag"
    );
    let other = site.repository("other");
    let unsigned = site.image(&other, "v1");
    verify_with(
        &site,
        tool,
        &site.home.join("cosign.pub"),
        &site.at(&format!("{other}@{unsigned}")),
    )
    .fails();
}

/// What we sign, in both forms, verifies there.
pub(super) fn ours(tool: &str) {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let (key, public) = site.own_keys("ours");
    let reference = site.at(&format!("{repository}:v1"));
    site.run("longshore")
        .arg("sign")
        .arg("--key")
        .arg(&key)
        .arg(&reference)
        .ok();
    verify_with(&site, tool, &public, &reference)
        .ok()
        .says(&digest);
    let (_, stranger) = site.own_keys("stranger");
    verify_with(&site, tool, &stranger, &reference).fails();
}

/// A key that our program made signs there, and the reverse is in `longshore`.
pub(super) fn our_key(tool: &str) {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let (key, public) = site.own_keys("ours");
    let reference = site.at(&format!("{repository}@{digest}"));
    sign_with(&site, tool, &key, &reference);
    verify_with(&site, tool, &public, &reference).ok();
    site.run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(&reference)
        .ok();
}

pub(super) fn copy(tool: &str) {
    let (site, repository, digest) = signed(tool);
    let to = site.repository("promoted");
    site.run(tool)
        .args([
            "copy",
            HTTP,
            &site.at(&format!("{repository}@{digest}")),
            &site.at(&format!("{to}:v1")),
        ])
        .ok();
    assert_eq!(site.resolve(&to, "v1").as_ref(), Some(&digest));
    // Only the older form travels with this command; bundles do with `oras cp -r` and with ours.
    if tool == "cosign2" {
        let reference = site.at(&format!("{to}@{digest}"));
        verify_with(&site, tool, &site.home.join("cosign.pub"), &reference).ok();
    }
}

pub(super) fn attach(tool: &str) {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    site.home
        .write("sbom.spdx.json", r#"{"spdxVersion":"SPDX-2.3"}"#);
    let reference = site.at(&format!("{repository}@{digest}"));
    site.run(tool)
        .args([
            "attach",
            "sbom",
            HTTP,
            "--type",
            "spdx",
            "--input-format",
            "json",
            "--sbom",
            "sbom.spdx.json",
            &reference,
        ])
        .ok();
    let tag = format!("{}.sbom", digest.replace(':', "-"));
    assert!(site.resolve(&repository, &tag).is_some());
}

/// An attestation, written and verified.
pub(super) fn attest(tool: &str) {
    let site = Site::open();
    let repository = site.repository("app");
    let digest = site.image(&repository, "v1");
    let (key, public) = site.keys();
    site.home.write("predicate.json", r#"{"built":"here"}"#);
    let reference = site.at(&format!("{repository}@{digest}"));
    let run = site
        .run(tool)
        .arg("attest")
        .arg("--key")
        .arg(&key)
        .args([HTTP, "--yes", "--type", "custom"]);
    let run = run.args(["--predicate", "predicate.json"]);
    if tool == "cosign2" {
        run.args(["--tlog-upload=false", &reference]).ok();
    } else {
        let config = site.home.write(
            "signing-config.json",
            r#"{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json","rekorTlogConfig":{},"tsaConfig":{}}"#,
        );
        run.arg("--signing-config").arg(config).arg(&reference).ok();
    }
    site.run(tool)
        .arg("verify-attestation")
        .arg("--key")
        .arg(&public)
        .args([
            HTTP,
            "--type",
            "custom",
            "--insecure-ignore-tlog=true",
            &reference,
        ])
        .ok();
    // An attestation is not a signature of a release: ours must not take it for one.
    site.run("longshore")
        .arg("verify")
        .arg("--key")
        .arg(&public)
        .arg(&reference)
        .fails();
}

pub(super) fn discover(tool: &str) {
    let (site, repository, digest) = signed(tool);
    let shown = site
        .run(tool)
        .args(["tree", HTTP, &site.at(&format!("{repository}:v1"))])
        .ok();
    shown.says(if tool == "cosign2" { ".sig" } else { "sha256:" });
    shown.says(&repository);
    assert!(!digest.is_empty());
}

pub(super) fn delete(tool: &str) {
    let (site, repository, digest) = signed("cosign2");
    site.run(tool)
        .args([
            "clean",
            "--force",
            HTTP,
            &site.at(&format!("{repository}@{digest}")),
        ])
        .ok();
    let tag = format!("{}.sig", digest.replace(':', "-"));
    assert_eq!(site.resolve(&repository, &tag), None);
    verify_with(
        &site,
        tool,
        &site.home.join("cosign.pub"),
        &site.at(&format!("{repository}@{digest}")),
    )
    .fails();
}

pub(super) fn push(tool: &str) {
    let site = Site::open();
    let repository = site.repository("blob");
    site.home.write("artifact.txt", "a blob of one's own");
    let reference = site.at(&format!("{repository}:v1"));
    site.run(tool)
        .args([
            "upload",
            "blob",
            HTTP,
            "--files",
            "artifact.txt",
            &reference,
        ])
        .ok();
    let manifest = site.manifest(&repository, "v1");
    assert_eq!(
        manifest["layers"][0]["digest"],
        e2e::digest(b"a blob of one's own")
    );
}

pub(super) fn pull(tool: &str) {
    let (site, repository, digest) = signed("cosign2");
    let pulled = site
        .run(tool)
        .args([
            "download",
            "signature",
            HTTP,
            &site.at(&format!("{repository}@{digest}")),
        ])
        .ok();
    pulled.says("Base64Signature");
}

pub(super) fn login(tool: &str) {
    let site = Site::closed();
    site.run(tool)
        .args(["login", site.host(), "--username", USER, "--password-stdin"])
        .stdin(PASSWORD)
        .ok();
    site.home.write("artifact.txt", "mine");
    site.run(tool)
        .args([
            "upload",
            "blob",
            HTTP,
            "--files",
            "artifact.txt",
            &site.at("private/blob:v1"),
        ])
        .ok();
}

/// The cells of one version.
macro_rules! cells {
    ($tool:literal) => {
        #[test]
        fn attach() {
            super::cosign::attach($tool);
        }
        #[test]
        fn copy() {
            super::cosign::copy($tool);
        }
        #[test]
        fn delete() {
            super::cosign::delete($tool);
        }
        #[test]
        fn discover() {
            super::cosign::discover($tool);
        }
        #[test]
        fn login() {
            super::cosign::login($tool);
        }
        #[test]
        fn pull() {
            super::cosign::pull($tool);
        }
        #[test]
        fn push() {
            super::cosign::push($tool);
        }
        #[test]
        fn sign() {
            super::cosign::sign($tool);
        }
        #[test]
        fn sign_attestation() {
            super::cosign::attest($tool);
        }
        #[test]
        fn sign_with_our_key() {
            super::cosign::our_key($tool);
        }
        #[test]
        fn verify() {
            super::cosign::verify($tool);
        }
        #[test]
        fn verify_ours() {
            super::cosign::ours($tool);
        }
    };
}
pub(super) use cells;
