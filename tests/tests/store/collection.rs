//! The collector in a running server: what is deleted goes, what is kept says why.
//!
//! A repository that is deleted waits for no lease; a deleted tag does, so that way is walked by a build with leases of
//! seconds.

use e2e::cluster::is_cluster;
use e2e::image::{MANIFEST, descriptor, push_artifact, push_blob, push_manifest};
use e2e::server::Options;
use e2e::{Run, Server, digest, tools};
use serde_json::{Value, json};

use crate::{noise, server, verify, wait_for};

/// A server of the build with test switches. Its leases, and the time that the objects of deleted blobs wait, last
/// so many seconds: long enough for one push on a busy machine.
fn hurried(seconds: u32) -> Server {
    hurried_with(seconds, "")
}

fn hurried_with(seconds: u32, config: &str) -> Server {
    Server::with(
        &Options::new(tools::switched())
            .config(format!("version: 1\n{config}"))
            .env("LONGSHORE_TEST_LEASE", &format!("{seconds}s")),
    )
}

/// How many objects of blobs there are.
fn objects(server: &Server) -> u64 {
    fn count(directory: &std::path::Path) -> u64 {
        std::fs::read_dir(directory).map_or(0, |entries| {
            entries
                .flatten()
                .map(|entry| {
                    if entry.path().is_dir() {
                        count(&entry.path())
                    } else {
                        1
                    }
                })
                .sum()
        })
    }
    match server.storage() {
        Some(storage) => storage.blobs().len() as u64,
        None => count(&server.data().join("o")),
    }
}

fn longshore(words: &[&str]) -> Run {
    Run::new(tools::program()).args(words.iter().copied())
}

/// The state of the collector, when nothing is left to do.
fn idle(server: &Server) -> Option<Value> {
    let status = server.get("/api/v1/collection").json();
    let waits = status["queue"]
        .as_array()
        .unwrap()
        .iter()
        .any(|kind| kind["waiting"] != 0);
    (!waits && status["outbox"]["objects"] == 0).then_some(status)
}

#[test]
fn a_deleted_repository_leaves_nothing() {
    // In a cluster objects wait an hour for reads that have begun.
    let mut server = if is_cluster() {
        hurried(10)
    } else {
        server("")
    };
    let layer = noise(1, 300_000);
    let pushed = push_artifact(
        server.url(),
        "team/app",
        "v1",
        "application/vnd.example",
        &layer,
    );
    for number in 0..300 {
        let tag = format!("t{number}");
        let body = server.get("/v2/team/app/manifests/v1").body;
        push_manifest(server.url(), "team/app", &tag, MANIFEST, &body);
    }
    let host = server.host().to_owned();
    let named = format!("{host}/team/app");
    assert!(objects(&server) > 0);

    let kept = longshore(&["--json", "explain", &format!("{named}:t7")]).run();
    assert_eq!(kept.code, Some(0), "{kept}");
    assert_eq!(kept.json()["digest"], *pushed);
    assert_eq!(kept.json()["kept"]["kept"], true);
    let text = longshore(&["explain", &format!("{named}@{pushed}")]).run();
    assert!(text.text().contains("tag `t0`, since"), "{text}");

    let status = longshore(&["gc", "status", &host]).run();
    assert_eq!(status.code, Some(0), "{status}");
    assert!(status.text().contains("collection is on"), "{status}");
    let dry = longshore(&["gc", "--dry-run", &host]).run();
    assert!(dry.text().contains("0 of 0 candidates"), "{dry}");

    let refused = longshore(&["rm", &named]).run();
    assert_eq!(refused.code, Some(64), "{refused}");
    let gone = longshore(&["rm", "--repository", &named]).run();
    assert_eq!(gone.code, Some(0), "{gone}");
    assert_eq!(server.get("/v2/team/app/tags/list").status(), 404);
    assert_eq!(
        server
            .get(&format!("/v2/team/app/manifests/{pushed}"))
            .status(),
        404
    );
    // The same name begins at once.
    let again = push_blob(server.url(), "team/app", &noise(2, 100_000));
    push_manifest(
        server.url(),
        "team/app",
        "v1",
        MANIFEST,
        &serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/octet-stream", &again, 100_000),
            "layers": [],
        }))
        .unwrap(),
    );
    // One object is left: that of the new repository.
    wait_for("the end of the deletion", || {
        (objects(&server) == 1).then_some(())
    });
    let status = wait_for("an empty outbox", || {
        let status = server.get("/api/v1/collection").json();
        (status["outbox"]["objects"] == 0).then_some(status)
    });
    let collected = |kind: &str| {
        let list = status["sinceStart"]["collected"]
            .as_array()
            .unwrap()
            .clone();
        list.iter().find(|c| c["kind"] == kind).unwrap()["number"].clone()
    };
    assert_eq!(collected("repository"), 1, "{status}");
    let metrics = server.get("/metrics").text();
    assert!(
        metrics.contains("longshore_collection_collected_total{kind=\"repository\"} 1"),
        "{metrics}"
    );
    crate::holds(&server, "team/app", &again);
    server.stop();
    verify(server.data());
}

#[test]
fn a_deleted_tag_takes_its_image_along_when_its_leases_are_over() {
    let mut server = hurried(4);
    let layer = noise(3, 200_000);
    let kept = push_artifact(
        server.url(),
        "a/kept",
        "v1",
        "application/vnd.example",
        &layer,
    );
    let pushed = push_artifact(
        server.url(),
        "a/gone",
        "v1",
        "application/vnd.example",
        &noise(4, 50_000),
    );
    let deleted = server.request("DELETE", "/v2/a/gone/manifests/v1", &[], &[]);
    assert_eq!(deleted.status(), 202);
    wait_for("the collection", || idle(&server));
    assert_eq!(
        server
            .get(&format!("/v2/a/gone/manifests/{pushed}"))
            .status(),
        404
    );
    assert_eq!(
        server.get(&format!("/v2/a/kept/manifests/{kept}")).status(),
        200
    );
    crate::holds(&server, "a/kept", &digest(&layer));
    assert_eq!(objects(&server), 1);
    let catalog = server.get("/v2/_catalog").json();
    assert_eq!(catalog["repositories"], json!(["a/kept"]));
    server.stop();
    verify(server.data());
}

/// The collector waits to be told.
const OFF: &str = "gc: {enabled: false}\n";

#[test]
fn the_collector_goes_on_deleting_while_users_cannot_write() {
    let mut server = if is_cluster() {
        hurried_with(10, OFF)
    } else {
        server(OFF)
    };
    for (seed, repository) in [(7, "calm/gone"), (8, "calm/kept")] {
        push_artifact(
            server.url(),
            repository,
            "v1",
            "application/vnd.example",
            &noise(seed, 200_000),
        );
    }
    let host = server.host().to_owned();
    longshore(&["rm", "--repository", &format!("{host}/calm/gone")]).ok();
    longshore(&["mode", "read-only", "--reason", "moving house", &host]).ok();
    assert_eq!(objects(&server), 2, "nothing is collected before");
    let layer = noise(9, 1000);
    let push = format!("/v2/calm/kept/blobs/uploads/?digest={}", digest(&layer));
    let refused = |server: &Server| {
        let answer = server.request("POST", &push, &[], &layer);
        assert_eq!(answer.status(), 503, "{}", answer.text());
        assert!(answer.header("retry-after").is_some());
    };
    refused(&server);
    longshore(&["gc", "run", &host]).ok();
    wait_for("the collection", || (objects(&server) == 1).then_some(()));
    // The objects go before the rows of the outbox do.
    let status = wait_for("an empty outbox", || {
        let status = server.get("/api/v1/collection").json();
        (status["outbox"]["objects"] == 0).then_some(status)
    });
    let collected = status["sinceStart"]["collected"].as_array().unwrap();
    assert!(
        collected
            .iter()
            .any(|one| one["kind"] == "repository" && one["number"] == 1),
        "{status}"
    );
    refused(&server);
    crate::holds(&server, "calm/kept", &digest(&noise(8, 200_000)));
    let shown = longshore(&["--json", "mode", &host]).ok();
    assert_eq!(shown.json()["mode"], "read-only", "{shown}");
    longshore(&["mode", "normal", &host]).ok();
    assert_eq!(
        server.request("POST", &push, &[], &layer).status(),
        201,
        "users write again"
    );
    server.stop();
    verify(server.data());
}
