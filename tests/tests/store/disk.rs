//! Disks that are full and disks that fail.

use std::path::Path;
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use e2e::http::{Connection, Response};
use e2e::server::{Options, signal};
use e2e::{Disk, Run, Scratch, Server, digest, image, tools};

use crate::{
    connect, finish, healthy, holds, noise, offset_of, open_upload, patch, refused, verify,
    wait_for,
};

const MIB: usize = 1 << 20;

/// An artifact that must stay readable whatever happens.
pub(crate) fn keepsake(server: &Server) -> impl Fn(&Server) + use<> {
    let layer = noise(5, 300_000);
    let layer_digest = digest(&layer);
    let manifest = image::push_artifact(
        server.url(),
        "kept/app",
        "v1",
        "application/vnd.example",
        &layer,
    );
    move |server| {
        holds(server, "kept/app", &layer_digest);
        let answer = server.get("/v2/kept/app/manifests/v1");
        assert_eq!(answer.status(), 200, "{}", answer.text());
        assert_eq!(digest(&answer.body), manifest);
    }
}

/// Wants a write to be refused for the disk: 507 of the one that met it, 503 of those that come while it lasts.
#[track_caller]
fn no_room(answer: &Response) {
    let status = answer.status();
    assert!(
        status == 507 || status == 503,
        "{status}: {}",
        answer.text()
    );
    refused(answer, status, "UNKNOWN", "free some space");
    assert!(answer.header("retry-after").is_some());
}

#[test]
fn a_full_disk_in_the_middle_of_an_upload_is_told_and_recovers() {
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "48m");
    let mut server = Server::with(&Options::new(tools::program()).data(disk.data()));
    let kept = keepsake(&server);
    let whole = noise(6, 16 * MIB);
    let wanted = digest(&whole);
    let upload = open_upload(&server, "full/app");
    assert_eq!(patch(&server, &upload, 0, &whole[..2 * MIB]).status(), 202);

    disk.fill(5 << 20);
    for chunk in [&whole[2 * MIB..], &whole[2 * MIB..12 * MIB]] {
        // The one that was refused before may still be giving back what it took.
        let answer = wait_for("the end of the refused chunk", || {
            let answer = patch(&server, &upload, 2 * MIB, chunk);
            (answer.status() != 416).then_some(answer)
        });
        no_room(&answer);
        assert!(answer.header("retry-after").is_some());
        kept(&server);
    }
    let single = server.request(
        "POST",
        &format!("/v2/full/app/blobs/uploads/?digest={wanted}"),
        &[],
        &whole,
    );
    no_room(&single);
    // What was recorded is still there.
    assert_eq!(offset_of(&server.get(&upload)), 2 * MIB as u64);
    kept(&server);
    healthy(&mut server);

    disk.free();
    let answer = wait_for("the end of the refused chunk", || {
        let answer = patch(&server, &upload, 2 * MIB, &whole[2 * MIB..]);
        (answer.status() != 416).then_some(answer)
    });
    assert_eq!(answer.status(), 202, "{}", answer.text());
    let done = finish(&server, &upload, &wanted, &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    holds(&server, "full/app", &wanted);
    kept(&server);
    server.restart();
    holds(&server, "full/app", &wanted);
    server.stop();
    verify(&disk.data());
    drop(server);
}

#[test]
fn a_disk_without_a_byte_refuses_every_write_and_serves_every_read() {
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "32m");
    let mut server = Server::with(&Options::new(tools::program()).data(disk.data()));
    let kept = keepsake(&server);
    disk.fill(0);
    // Bodies of rows: the database itself has no room. It may have some pages to spare.
    let mut stored = Vec::new();
    let mut last = None;
    for seed in 0..2000 {
        let bytes = noise(seed + 100, 12_000);
        let wanted = digest(&bytes);
        let target = format!("/v2/full/rows/blobs/uploads/?digest={wanted}");
        let answer = server.request("POST", &target, &[], &bytes);
        if answer.status() == 201 {
            stored.push(wanted);
            continue;
        }
        last = Some(answer);
        break;
    }
    no_room(&last.expect("the disk gets full"));
    for _ in 0..3 {
        let answer = server.request("POST", "/v2/full/rows/blobs/uploads/", &[], &[]);
        no_room(&answer);
        kept(&server);
        for wanted in &stored {
            holds(&server, "full/rows", wanted);
        }
    }
    let answer = server.request(
        "PUT",
        "/v2/kept/app/manifests/v2",
        &[("Content-Type", image::MANIFEST)],
        &server.get("/v2/kept/app/manifests/v1").body,
    );
    no_room(&answer);
    assert_eq!(server.get("/v2/kept/app/manifests/v2").status(), 404);
    assert!(server.runs(), "{}", server.logged());

    disk.free();
    let bytes = noise(9, 400_000);
    let wanted = image::push_blob(server.url(), "full/rows", &bytes);
    holds(&server, "full/rows", &wanted);
    healthy(&mut server);
    server.restart();
    kept(&server);
    for wanted in stored.iter().chain([&wanted]) {
        holds(&server, "full/rows", wanted);
    }
    server.stop();
    verify(&disk.data());
    drop(server);
}

#[test]
fn a_full_disk_is_read_only_until_there_is_room_and_the_collector_makes_it() {
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "64m");
    let options = Options::new(tools::program())
        .data(disk.data())
        .config("version: 1\nstorage: {floor: 2MiB}\ngc: {keep_deleted: 1s}\n");
    let mut server = Server::with(&options);
    let kept = keepsake(&server);
    let reserve = disk.data().join("reserve");
    wait_for("the reserve", || reserve.exists().then_some(()));
    // Something whose deletion makes room.
    let large = noise(21, 12 * MIB);
    let wanted = image::push_blob(server.url(), "full/large", &large);
    disk.fill(0);
    let told = wait_for("the read-only mode", || {
        let body = server.get("/readyz");
        assert_eq!(body.status(), 200);
        body.text().contains("read-only").then(|| body.text())
    });
    assert!(told.contains("free some space"), "{told}");
    let answer = server.request("POST", "/v2/full/app/blobs/uploads/", &[], &[]);
    refused(&answer, 503, "UNKNOWN", "free some space");
    assert_eq!(answer.header("retry-after"), Some("30"));
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("longshore_read_only{cause=\"disk\"} 1")
    );
    kept(&server);
    holds(&server, "full/large", &wanted);
    // The reserve is there for the collector, so a deletion goes through, and so does the collection after it.
    wait_for("the deletion", || {
        let answer = server.request(
            "DELETE",
            &format!("/v2/full/large/blobs/{wanted}"),
            &[],
            &[],
        );
        (answer.status() == 202).then_some(())
    });
    let () = ();
    wait_for("the end of the read-only mode", || {
        (server.get("/readyz").text() == "ok\n").then_some(())
    });
    wait_for("the reserve", || reserve.exists().then_some(()));
    let bytes = noise(22, 300_000);
    image::push_blob(server.url(), "full/app", &bytes);
    kept(&server);
    let log = server.logged();
    assert_eq!(log.matches("the disk is full").count(), 1, "{log}");
    server.stop();
    verify(&disk.data());
}

#[test]
fn a_server_on_a_full_disk_ends_cleanly_and_starts_again() {
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "32m");
    let mut server = Server::with(&Options::new(tools::program()).data(disk.data()));
    let kept = keepsake(&server);
    disk.fill(0);
    wait_for("the read-only mode", || {
        server
            .get("/readyz")
            .text()
            .contains("read-only")
            .then_some(())
    });
    // Whatever the reserve gave is taken, too.
    let ballast = disk.path().join("more");
    let stat = rustix::fs::statvfs(disk.path()).unwrap();
    let free = usize::try_from(stat.f_bavail * stat.f_frsize).unwrap();
    drop(std::fs::write(&ballast, vec![1; free]));
    let status = server.stop();
    assert_eq!(status.code(), Some(0), "{}", server.logged());
    std::fs::remove_file(&ballast).unwrap();
    disk.free();
    server.restart();
    kept(&server);
    server.stop();
    verify(&disk.data());
}

/// A tracer that makes system calls of a server fail.
pub(crate) struct Tracer(Child);

impl Tracer {
    /// Attaches to a thread (`thread` begins its name) or, with `None`, to the whole process.
    pub(crate) fn attach(
        server: &Server,
        thread: Option<&str>,
        rule: &str,
        only: &[&Path],
    ) -> Self {
        let id = thread.map_or_else(|| server.pid(), |name| thread_of(server.pid(), name));
        let log = server.scratch().join("strace.log");
        let call = rule.split(':').next().unwrap_or(rule);
        let mut run = Run::new("strace")
            .arg("--output")
            .arg(server.scratch().join("strace.calls"))
            .arg("--trace")
            .arg(call)
            .arg("--inject")
            .arg(rule);
        for path in only {
            run = run.arg("--trace-path").arg(path);
        }
        if thread.is_none() {
            run = run.arg("--follow-forks");
        }
        let child = run.arg("--attach").arg(id.to_string()).spawn(&log);
        // The kernel's word, and not the log's: the log of an earlier tracer says the same.
        let tracer = format!("TracerPid:\t{}\n", child.id());
        wait_for("the tracer", || {
            let threads = if thread.is_some() {
                vec![id]
            } else {
                threads_of(id)
            };
            let traced = |id: &u32| {
                // A thread that has ended since makes no calls.
                std::fs::read_to_string(format!("/proc/{id}/status"))
                    .map_or(true, |status| status.contains(&tracer))
            };
            threads.iter().all(traced).then_some(())
        });
        Self(child)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It lets go of the server at this signal.
        signal(self.0.id(), rustix::process::Signal::TERM);
        drop(self.0.wait());
    }
}

fn threads_of(pid: u32) -> Vec<u32> {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .collect()
}

fn thread_of(pid: u32, name: &str) -> u32 {
    threads_of(pid)
        .into_iter()
        .find(|thread| {
            std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"))
                .is_ok_and(|comm| comm.starts_with(name))
        })
        .unwrap_or_else(|| panic!("no thread `{name}`"))
}

#[test]
fn an_upload_whose_sync_fails_is_gone_and_never_acknowledged() {
    let mut server = Server::start();
    let kept = keepsake(&server);
    let whole = noise(11, 3 * MIB);
    let wanted = digest(&whole);
    for end in ["patch", "put", "post"] {
        let upload = open_upload(&server, "sync/app");
        // The later ones would succeed, and must not be asked: the kernel forgets what failed.
        let tracer = Tracer::attach(&server, None, "fdatasync:error=EIO:when=1", &[]);
        let answer = match end {
            "patch" => patch(&server, &upload, 0, &whole),
            "put" => finish(&server, &upload, &wanted, &whole),
            _ => server.request(
                "POST",
                &format!("/v2/sync/app/blobs/uploads/?digest={wanted}"),
                &[],
                &whole,
            ),
        };
        assert_eq!(answer.status(), 500, "{end}: {}", answer.text());
        assert!(!answer.text().contains("data/"), "{}", answer.text());
        drop(tracer);
        if end != "post" {
            assert_eq!(server.get(&upload).status(), 404, "{end}");
        }
        let blob = format!("/v2/sync/app/blobs/{wanted}");
        assert_eq!(server.get(&blob).status(), 404, "{end}");
        kept(&server);
    }
    image::push_blob(server.url(), "sync/app", &whole);
    holds(&server, "sync/app", &wanted);
    healthy(&mut server);
    server.restart();
    kept(&server);
    holds(&server, "sync/app", &wanted);
    server.stop();
    verify(server.data());
}

/// Pushes small blobs over several connections until each has been refused or cut off, and gives back
/// the digests that were acknowledged. Nothing is acknowledged on a connection after a refusal.
fn push_until_it_ends(server: &Server, repository: &str, length: usize) -> Vec<String> {
    let acknowledged = Mutex::new(Vec::new());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for pusher in 0..6u64 {
            let (acknowledged, over) = (&acknowledged, &over);
            scope.spawn(move || {
                let mut connection: Option<Connection> = Some(connect(server));
                for turn in 0..4000 {
                    let bytes = noise(pusher * 100_000 + turn, length);
                    let wanted = digest(&bytes);
                    let target = format!("/v2/{repository}/blobs/uploads/?digest={wanted}");
                    let Some(open) = &mut connection else { return };
                    let refused_before = over.load(Ordering::SeqCst);
                    match open.request("POST", &target, &[], &bytes) {
                        Ok(answer) if answer.status() == 201 => {
                            assert!(!refused_before, "acknowledged after the failure");
                            acknowledged.lock().unwrap().push(wanted);
                        }
                        Ok(answer) => {
                            refused(&answer, 503, "UNKNOWN", "restarting");
                            assert!(answer.header("retry-after").is_some());
                            over.store(true, Ordering::SeqCst);
                        }
                        // The process is gone.
                        Err(_) => connection = None,
                    }
                }
                panic!("pusher {pusher} was never stopped");
            });
        }
    });
    acknowledged.into_inner().unwrap()
}

/// The database fails as `rule` says; the server must end, and what it acknowledged must be there.
fn the_database_fails(rule: &str, file: &str) {
    let mut server = Server::start();
    let kept = keepsake(&server);
    let path = server.data().join(file);
    let tracer = Tracer::attach(&server, Some("store-writer"), rule, &[&path]);
    let acknowledged = push_until_it_ends(&server, "fail/app", 12_000);
    let status = server.wait();
    drop(tracer);
    assert!(status.code().is_some_and(|code| code != 0), "{status:?}");
    let log = server.logged();
    assert!(log.contains("could not be written or synced"), "{log}");
    assert!(log.contains("restart the server"), "{log}");
    assert!(!acknowledged.is_empty());
    eprintln!("{rule}: {} acknowledged before", acknowledged.len());
    verify(server.data());
    server.restart();
    kept(&server);
    for wanted in &acknowledged {
        holds(&server, "fail/app", wanted);
    }
    let bytes = noise(12, 50_000);
    image::push_blob(server.url(), "fail/app", &bytes);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn a_failed_sync_of_the_log_ends_the_server() {
    the_database_fails("fsync:error=EIO:when=9", "meta.db-wal");
}

#[test]
fn a_failed_sync_of_the_database_ends_the_server() {
    the_database_fails("fsync:error=EIO:when=1", "meta.db");
}

#[test]
fn a_failed_write_of_the_log_ends_the_server() {
    the_database_fails("pwrite64:error=EIO:when=400", "meta.db-wal");
}

#[test]
fn a_failed_write_in_the_middle_of_a_transaction_ends_the_server() {
    let mut server = Server::start();
    let kept = keepsake(&server);
    let config = image::push_blob(server.url(), "spill/app", b"{}");
    // More than the database keeps in memory, so that pages are written before the commit; many more than
    // the background work writes meanwhile.
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": image::MANIFEST,
        "config": image::descriptor("application/vnd.example", &config, 2),
        "layers": [],
        "annotations": {"long": "x".repeat(4_000_000)},
    })
    .to_string();
    let tracer = Tracer::attach(
        &server,
        Some("store-writer"),
        "pwrite64:error=EIO:when=60",
        &[],
    );
    let answer = server.request(
        "PUT",
        "/v2/spill/app/manifests/v1",
        &[("Content-Type", image::MANIFEST)],
        manifest.as_bytes(),
    );
    refused(&answer, 503, "UNKNOWN", "restarting");
    let status = server.wait();
    drop(tracer);
    assert!(status.code().is_some_and(|code| code != 0), "{status:?}");
    verify(server.data());
    server.restart();
    kept(&server);
    assert_eq!(server.get("/v2/spill/app/manifests/v1").status(), 404);
    image::push_manifest(
        server.url(),
        "spill/app",
        "v1",
        image::MANIFEST,
        manifest.as_bytes(),
    );
    healthy(&mut server);
    server.stop();
    verify(server.data());
}
