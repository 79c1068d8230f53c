//! Backups of a server under load, through the built program: kills, restores to several moments, a lost database.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use e2e::server::Options;
use e2e::{Run, Scratch, Server, image, tools};
use serde_json::Value;

use crate::{connect, healthy, noise, verify, wait_for};

/// A server that makes a restorable point every second.
fn backed_up(backup: &Path) -> Options {
    Options::new(tools::program()).config(format!(
        "version: 1\nbackup: {{directory: {}, every: 1s}}\n",
        backup.display()
    ))
}

#[expect(
    clippy::disallowed_methods,
    reason = "what is restored is named by the time of the clock"
)]
fn micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

/// What the server acknowledged, and when.
#[derive(Default)]
struct Ledger(Mutex<BTreeMap<String, (String, i64)>>);

impl Ledger {
    /// Pushes small images with tags of their own until told to stop or until the server is gone.
    fn push(&self, server: &Server, writer: u64, stop: &AtomicBool, count: &AtomicU64) {
        let mut number = 0;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            let tag = format!("w{writer}-{number}");
            let Some(digest) = push(server, &tag, writer * 1_000_000 + number) else {
                return;
            };
            let now = micros();
            self.0.lock().unwrap().insert(tag, (digest, now));
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Everything acknowledged before `at` is in the store of this server, and reads back.
    fn check(&self, server: &Server, at: i64) -> usize {
        let mut connection = connect(server);
        let mut checked = 0;
        for (tag, (digest, acknowledged)) in self.0.lock().unwrap().iter() {
            if *acknowledged >= at {
                continue;
            }
            checked += 1;
            let answer = connection
                .request("GET", &format!("/v2/load/backup/manifests/{tag}"), &[], &[])
                .unwrap();
            assert_eq!(answer.status(), 200, "{tag}: {}", answer.text());
            assert_eq!(e2e::digest(&answer.body), *digest);
            for layer in answer.json()["layers"].as_array().unwrap() {
                let layer = layer["digest"].as_str().unwrap();
                let blob = connection
                    .request("GET", &format!("/v2/load/backup/blobs/{layer}"), &[], &[])
                    .unwrap();
                assert_eq!(e2e::digest(&blob.body), layer);
            }
        }
        checked
    }
}

/// Pushes an image of one small and one large layer; `None` when the server is gone.
fn push(server: &Server, tag: &str, seed: u64) -> Option<String> {
    let mut connection = e2e::http::Connection::open(server.url()).ok()?;
    let mut put = |path: &str, kind: &str, bytes: &[u8]| -> Option<()> {
        let headers = [("Content-Type", kind)];
        let method = if kind.contains("manifest") {
            "PUT"
        } else {
            "POST"
        };
        let answer = connection.request(method, path, &headers, bytes).ok()?;
        assert_eq!(answer.status(), 201, "{}", answer.text());
        Some(())
    };
    let mut layers = Vec::new();
    for (index, length) in [1000, 40_000].into_iter().enumerate() {
        let bytes = noise(seed * 2 + index as u64, length);
        let digest = e2e::digest(&bytes);
        put(
            &format!("/v2/load/backup/blobs/uploads/?digest={digest}"),
            "application/octet-stream",
            &bytes,
        )?;
        layers.push(image::descriptor(
            "application/octet-stream",
            &digest,
            length,
        ));
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": layers[0],
        "layers": layers,
    })
    .to_string();
    put(
        &format!("/v2/load/backup/manifests/{tag}"),
        "application/vnd.oci.image.manifest.v1+json",
        manifest.as_bytes(),
    )?;
    Some(e2e::digest(manifest.as_bytes()))
}

fn list(backup: &Path) -> Value {
    let report = Run::new(tools::program())
        .args(["--json", "backup", "ls"])
        .arg(backup)
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    report.json()
}

fn points(backup: &Path) -> u64 {
    let list = list(backup);
    let lines = list["lines"].as_array().unwrap();
    lines
        .iter()
        .map(|line| line["points"].as_u64().unwrap())
        .sum()
}

/// Restores to this moment and gives back the moment that was restored.
fn restore(backup: &Path, to: &Path, at: Option<i64>) -> i64 {
    let mut run = Run::new(tools::program())
        .args(["--json", "restore"])
        .arg(backup)
        .arg("--to")
        .arg(to);
    if let Some(at) = at {
        run = run.args(["--at", &text(at)]);
    }
    let report = run.run();
    assert_eq!(report.code, Some(0), "{report}");
    verify(to);
    parse(report.json()["at"].as_str().unwrap())
}

/// RFC 3339 in UTC, with micro-seconds, from micro-seconds.
fn text(micros: i64) -> String {
    let report = Run::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S", "-d"])
        .arg(format!("@{}", micros / 1_000_000))
        .run();
    format!("{}.{:06}Z", report.text().trim(), micros % 1_000_000)
}

fn parse(text: &str) -> i64 {
    let (whole, rest) = text
        .trim_end_matches('Z')
        .split_once('.')
        .unwrap_or((text.trim_end_matches('Z'), "0"));
    let report = Run::new("date")
        .args(["-u", "+%s", "-d"])
        .arg(format!("{whole}Z"))
        .run();
    let seconds: i64 = report.text().trim().parse().unwrap();
    seconds * 1_000_000 + format!("{rest:0<6}").parse::<i64>().unwrap()
}

#[test]
fn a_server_under_load_that_is_killed_restores_to_every_moment() {
    let scratch = Scratch::new();
    let backup = scratch.join("backup");
    let mut server = backed_up(&backup).start().unwrap();
    let ledger = Ledger::default();
    let mut moments = Vec::new();
    for round in 0..3 {
        let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for writer in 0..3 {
                let (server, ledger, stop, count) = (&server, &ledger, &stop, &count);
                scope.spawn(move || ledger.push(server, round * 10 + writer, stop, count));
            }
            let before = points(&backup);
            wait_for("three more points under load", || {
                (points(&backup) >= before + 3 && count.load(Ordering::Relaxed) > 20).then_some(())
            });
            moments.push(micros());
            // In the middle of everything.
            server_kill(server.pid());
            stop.store(true, Ordering::Relaxed);
        });
        server.kill();
        server.restart();
        healthy(&mut server);
    }
    // After the restart there is a point that holds all of it.
    let last = micros();
    wait_for("a point after the last push", || {
        let list = list(&backup);
        let lines = list["lines"].as_array()?;
        let to = parse(lines.last()?["to"].as_str()?);
        (to > last).then_some(())
    });
    moments.push(micros());
    let value = |name: &str| -> i64 {
        let metrics = server.get("/metrics").text();
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no `{name}` in {metrics}"))
    };
    assert_eq!(value("longshore_backup_failures"), 0);
    // The round tells of its success after its point is there.
    wait_for("the success of a round", || {
        let success = value("longshore_backup_last_success_timestamp_seconds");
        (success > last / 1_000_000 - 60).then_some(())
    });
    ledger.check(&server, i64::MAX);
    server.stop();

    let report = Run::new(tools::program())
        .args(["--json", "backup", "verify"])
        .arg(&backup)
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    let mut before = 0;
    for (index, moment) in moments.iter().enumerate() {
        let data = scratch.join(&format!("at-{index}"));
        let at = restore(&backup, &data, Some(*moment));
        assert!(at <= *moment);
        let restored = Options::new(tools::program()).data(&data).start().unwrap();
        let checked = ledger.check(&restored, at);
        assert!(checked > before, "{checked} pushes at {at}");
        before = checked;
    }
    assert_eq!(before, ledger.0.lock().unwrap().len());
}

/// Kills without waiting, so that others can be in the middle of a request.
fn server_kill(pid: u32) {
    e2e::server::signal(pid, rustix::process::Signal::KILL);
}

#[test]
fn a_reader_of_events_is_told_to_begin_again_after_a_restore() {
    let scratch = Scratch::new();
    let backup = scratch.join("backup");
    let server = Server::start();
    push(&server, "one", 1).unwrap();
    let report = Run::new(tools::program())
        .args(["--json", "backup"])
        .arg(&backup)
        .arg("--data")
        .arg(server.data())
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    assert_eq!(report.json()["objects"], 1);
    push(&server, "two", 2).unwrap();
    let position = stream(&server, None).1;

    let data = scratch.join("restored");
    restore(&backup, &data, None);
    let mut restored = Options::new(tools::program()).data(&data).start().unwrap();
    let (event, fresh) = stream(&restored, Some(&position));
    assert_eq!(event, "reset");
    assert_ne!(fresh.split('.').next(), position.split('.').next());
    assert_eq!(restored.get("/v2/load/backup/manifests/one").status(), 200);
    assert_eq!(restored.get("/v2/load/backup/manifests/two").status(), 404);
    // The position that it was given is one to go on from.
    assert_ne!(stream(&restored, Some(&fresh)).0, "reset");
    // And it is a registry like any other.
    push(&restored, "three", 3).unwrap();
    healthy(&mut restored);

    // Neither into a directory in use, nor into one that holds anything.
    for to in [server.data(), &data] {
        let refused = Run::new(tools::program())
            .arg("restore")
            .arg(&backup)
            .arg("--to")
            .arg(to)
            .run();
        assert_eq!(refused.code, Some(1), "{refused}");
        refused.says("empty directory");
    }
}

/// The kind and the position of the first frame of the event stream.
fn stream(server: &Server, after: Option<&str>) -> (String, String) {
    let mut connection = connect(server);
    let headers: Vec<_> = after
        .map(|position| ("Last-Event-ID", position))
        .into_iter()
        .collect();
    connection
        .send_head("GET", "/api/v1/events", &headers, None)
        .unwrap();
    let head = connection.receive_head("GET").unwrap();
    assert_eq!(head.status, 200);
    let (mut event, mut position) = (String::new(), String::new());
    loop {
        let line = connection.line().unwrap();
        if let Some(text) = line.strip_prefix("event: ").or(line.strip_prefix("event:")) {
            event = text.trim().to_owned();
        } else if let Some(text) = line.strip_prefix("id: ").or(line.strip_prefix("id:")) {
            text.trim().clone_into(&mut position);
        }
        if line.trim().is_empty() && !position.is_empty() {
            return (event, position);
        }
    }
}

#[test]
fn a_lost_database_is_made_anew() {
    let mut server = Server::start();
    let digests: Vec<_> = (1..=5)
        .map(|seed| push(&server, &format!("v{seed}"), seed).unwrap())
        .collect();
    // The server exports when it starts, and every minute.
    server.stop();
    server.restart();
    let exports = server.data().join("x");
    wait_for("the exports", || {
        let mut parts = std::fs::read_dir(&exports).ok()?;
        parts
            .any(|part| {
                let text = std::fs::read_to_string(part.unwrap().path()).unwrap_or_default();
                text.contains("\"v5\"")
            })
            .then_some(())
    });
    server.stop();
    for end in ["", "-wal", "-shm"] {
        drop(std::fs::remove_file(
            server.data().join(format!("meta.db{end}")),
        ));
    }
    let report = Run::new(tools::program())
        .args(["--json", "reindex", "--data"])
        .arg(server.data())
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    assert_eq!(report.json()["tags"], 5, "{report}");
    verify(server.data());
    server.restart();
    for (index, digest) in digests.iter().enumerate() {
        let answer = server.get(&format!("/v2/load/backup/manifests/v{}", index + 1));
        assert_eq!(e2e::digest(&answer.body), *digest);
    }
    healthy(&mut server);
}
