//! Read-only by command, the scrub and retention, through the built program and its commands.

use std::path::{Path, PathBuf};

use e2e::server::Options;
use e2e::{Run, Server, digest, image, tools};
use serde_json::json;

use crate::{healthy, holds, noise, open_upload, refused, server, verify, wait_for};

fn run(server: &Server, words: &[&str]) -> Run {
    Run::new(tools::program())
        .args(words.iter().copied())
        .arg(server.host())
}

/// Every file below a directory.
fn files(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn an_operator_stops_writes_and_lets_them_go_on() {
    let mut server = Server::start();
    let layer = noise(31, 200_000);
    let wanted = digest(&layer);
    image::push_artifact(
        server.url(),
        "mode/app",
        "v1",
        "application/vnd.example",
        &layer,
    );
    let upload = open_upload(&server, "mode/app");
    let words = ["mode", "read-only", "--reason", "moving house"];
    let told = run(&server, &words).ok();
    assert!(told.both().contains("read-only since"), "{told}");
    assert!(told.both().contains("moving house"), "{told}");

    let tag = "/v2/mode/app/manifests/v1";
    let manifest = server.get(tag);
    let kind = [("Content-Type", image::MANIFEST)];
    let refusals = [
        server.request("POST", "/v2/mode/app/blobs/uploads/", &[], &[]),
        server.request("PATCH", &upload, &[], b"more"),
        server.request(
            "POST",
            &format!("/v2/mode/other/blobs/uploads/?mount={wanted}&from=mode/app"),
            &[],
            &[],
        ),
        server.request("PUT", "/v2/mode/app/manifests/v2", &kind, &manifest.body),
        server.request("DELETE", tag, &[], &[]),
    ];
    for answer in &refusals {
        refused(answer, 503, "UNKNOWN", "moving house");
        assert_eq!(answer.header("retry-after"), Some("30"));
    }
    holds(&server, "mode/app", &wanted);
    assert!(server.get("/readyz").text().contains("moving house"));
    assert_eq!(server.get("/readyz").status(), 200);
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("longshore_read_only{cause=\"command\"} 1")
    );
    // It outlives a restart.
    server.restart();
    let shown = run(&server, &["--json", "mode"]).ok();
    assert_eq!(shown.json()["mode"], "read-only", "{shown}");
    let normal = run(&server, &["mode", "normal"]).ok();
    assert_eq!(normal.text().trim(), "normal", "{normal}");
    let answer = server.request("DELETE", tag, &[], &[]);
    assert_eq!(answer.status(), 202, "{}", answer.text());
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn a_damaged_blob_is_found_told_and_healed_by_a_push() {
    let server = server("scrub: {rate: 1GiB}\n");
    let layer = noise(32, 200_000);
    let wanted = digest(&layer);
    let before = files(&server.data().join("o"));
    image::push_blob(server.url(), "scrub/app", &layer);
    let object = files(&server.data().join("o"))
        .into_iter()
        .find(|file| !before.contains(file))
        .unwrap();
    let mut wrong = layer.clone();
    wrong[100_000] ^= 1;
    std::fs::write(&object, &wrong).unwrap();
    run(&server, &["scrub", "run"]).run();
    let status = wait_for("the scrub", || {
        let status = run(&server, &["--json", "scrub", "status"]).run();
        (status.code == Some(3)).then_some(status)
    });
    let suspect = &status.json()["suspectBlobs"]["items"][0];
    assert_eq!(suspect["digest"], json!(wanted), "{status}");
    assert_eq!(suspect["repositories"], json!(["scrub/app"]));
    let blob = format!("/v2/scrub/app/blobs/{wanted}");
    assert_eq!(server.request("HEAD", &blob, &[], &[]).status(), 404);
    refused(&server.get(&blob), 500, "UNKNOWN", "push it again");
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("longshore_suspect_blobs 1")
    );
    let report = Run::new(tools::program())
        .arg("verify-store")
        .arg(server.data())
        .run();
    assert_eq!(report.code, Some(3), "{report}");

    image::push_blob(server.url(), "scrub/elsewhere", &layer);
    holds(&server, "scrub/app", &wanted);
    let healed = run(&server, &["scrub", "status"]).ok();
    assert!(healed.both().contains("0 damaged blobs"), "{healed}");
}

#[test]
fn verify_store_looks_at_a_configuration_and_tells_what_is_not_there() {
    let mut server = Server::with(&Options::new(tools::program()).config("version: 1\n"));
    image::push_artifact(
        server.url(),
        "a/b",
        "v1",
        "application/x",
        &noise(33, 100_000),
    );
    let text = format!(
        "version: 1\nstorage: {{directory: \"{}\"}}\n",
        server.data().display()
    );
    let config = server.scratch().write("other.yaml", &text);
    for more in [&[][..], &["--no-hash"], &["--parallel", "3"]] {
        let report = Run::new(tools::program())
            .args(["--json", "verify-store", "--config"])
            .arg(&config)
            .args(more.iter().copied())
            .ok();
        assert_eq!(report.json()["problems"], json!([]), "{report}");
        assert!(report.json()["blobs"].as_u64() > Some(0), "{report}");
    }
    let chain = Run::new(tools::program())
        .args(["--json", "audit", "verify", "--config"])
        .arg(&config)
        .ok();
    assert!(chain.json()["sealed"].is_u64(), "{chain}");
    for command in [&["verify-store"][..], &["audit", "verify"]] {
        let missing = Run::new(tools::program())
            .args(command.iter().copied())
            .arg("/no/such/directory")
            .run();
        assert_eq!(missing.code, Some(4), "{missing}");
        assert!(missing.both().contains("no such directory"), "{missing}");
    }
    server.stop();
    // A stray and a missing object, on a store that nobody uses.
    let objects = server.data().join("o");
    std::fs::remove_file(&files(&objects)[0]).unwrap();
    std::fs::create_dir_all(objects.join("00/00")).unwrap();
    std::fs::write(objects.join("00/00").join("0".repeat(32)), b"x").unwrap();
    let report = Run::new(tools::program())
        .arg("verify-store")
        .arg(server.data())
        .run();
    assert_eq!(report.code, Some(3), "{report}");
    for part in ["belongs to nothing", "is missing", "2 problems"] {
        assert!(report.both().contains(part), "{report}");
    }
}

#[test]
fn retention_plans_removes_and_puts_back() {
    let server = server(
        "retention:\n  policies:\n  - repositories: [\"shop/**\"]\n    keep: [{tags: [\"release-*\"]}, {newest: 1}]\n",
    );
    for (seed, tag) in [(41, "release-1"), (42, "old"), (43, "new")] {
        image::push_artifact(
            server.url(),
            "shop/web",
            tag,
            "application/x",
            &noise(seed, 1000),
        );
        image::push_artifact(
            server.url(),
            "other/app",
            tag,
            "application/x",
            &noise(seed, 1000),
        );
    }
    let plan = run(&server, &["retention", "plan"]).ok();
    for line in [
        "remove shop/web:old no rule of policy 1 keeps it",
        "keep   shop/web:new policy 1, rule 2: newest 1",
        "keep   shop/web:release-1 policy 1, rule 1: tags `release-*`",
        "2 tags kept, 1 would be removed",
    ] {
        assert!(plan.both().contains(line), "{line}: {plan}");
    }
    assert_eq!(server.get("/v2/shop/web/manifests/old").status(), 200);
    let ran = run(&server, &["--json", "retention", "run"]).ok();
    let id = ran.json()["run"]["id"].as_str().unwrap().to_owned();
    assert_eq!(ran.json()["run"]["removed"], 1, "{ran}");
    assert_eq!(server.get("/v2/shop/web/manifests/old").status(), 404);
    assert_eq!(server.get("/v2/other/app/manifests/old").status(), 200);
    let listed = run(&server, &["retention", "ls"]).ok();
    for part in ["policy 1: shop/**", id.as_str(), "1 removed"] {
        assert!(listed.both().contains(part), "{part}: {listed}");
    }
    let shown = run(&server, &["retention", "show", &id]).ok();
    assert!(shown.both().contains("remove shop/web:old"), "{shown}");
    let words = ["retention", "undo", &id, "--tag", "shop/web:old"];
    let undone = Run::new(tools::program())
        .args(words)
        .arg(server.host())
        .ok();
    assert!(
        undone.both().contains("1 tags put back, 0 could not be"),
        "{undone}"
    );
    assert_eq!(server.get("/v2/shop/web/manifests/old").status(), 200);
    let again = run(&server, &["retention", "undo", &id]).ok();
    assert!(again.both().contains("0 tags put back"), "{again}");
    verify(server.data());
}
