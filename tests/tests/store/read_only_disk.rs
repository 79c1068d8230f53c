//! Disks that turn read-only under a running server, and at its start.
//!
//! A file system with files that are open for writing cannot be remounted read-only, so one of two things makes it so:
//! ext4 itself, as after an error (`errors=remount-ro`), which lasts until it is repaired; or a tracer that refuses the
//! writes, as a file server does whose export is read-only for a while.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use e2e::http::Response;
use e2e::server::Options;
use e2e::{Disk, Run, Scratch, Server, digest, image, tools};

use crate::disk::{Tracer, keepsake};
use crate::{connect, healthy, holds, noise, open_upload, patch, refused, verify, wait_for};

/// An ext4 file system in a file that turns read-only at an error.
struct Ext4 {
    image: PathBuf,
    point: PathBuf,
}

impl Ext4 {
    fn new(scratch: &Scratch) -> Self {
        let image = scratch.join("disk.ext4");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(128 << 20)
            .unwrap();
        Run::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).ok();
        let disk = Self {
            image,
            point: scratch.dir("mount"),
        };
        disk.mount();
        disk
    }

    fn mount(&self) {
        Run::new("mount")
            .args(["-o", "loop,errors=remount-ro"])
            .arg(&self.image)
            .arg(&self.point)
            .ok();
    }

    fn data(&self) -> PathBuf {
        self.point.join("data")
    }

    /// Makes the file system meet an error.
    fn fail(&self) {
        let device = Run::new("findmnt")
            .args(["--noheadings", "--output", "SOURCE"])
            .arg(&self.point)
            .ok()
            .text();
        let device = device.trim_start_matches("/dev/");
        let switch = format!("/sys/fs/ext4/{device}/trigger_fs_error");
        std::fs::write(&switch, "test").unwrap_or_else(|error| panic!("{switch}: {error}"));
    }

    /// What an operator does: unmount, check, mount.
    fn repair(&self) {
        Run::new("umount").arg(&self.point).ok();
        wait_for("the end of the mount", || {
            let devices = Run::new("losetup").arg("-j").arg(&self.image).ok();
            devices.text().is_empty().then_some(())
        });
        // 1 says that it mended something.
        let check = Run::new("e2fsck").args(["-f", "-p"]).arg(&self.image).run();
        assert!(matches!(check.code, Some(0 | 1)), "{check}");
        self.mount();
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        Run::new("umount").arg("--lazy").arg(&self.point).run();
    }
}

/// Wants a write to be refused for the disk.
#[track_caller]
fn locked(answer: &Response) {
    refused(answer, 503, "UNKNOWN", "disk takes no writes");
    assert_eq!(answer.header("retry-after"), Some("30"));
}

/// Wants every way to write to be refused, and the server to tell why.
fn takes_no_writes(server: &Server) {
    let layer = noise(3, 200_000);
    let manifest = server.get("/v2/kept/app/manifests/v1").body;
    let kind = [("Content-Type", image::MANIFEST)];
    let single = format!("/v2/locked/app/blobs/uploads/?digest={}", digest(&layer));
    for answer in [
        server.request("POST", "/v2/locked/app/blobs/uploads/", &[], &[]),
        server.request("POST", &single, &[], &layer),
        server.request("PUT", "/v2/kept/app/manifests/v2", &kind, &manifest),
        server.request("DELETE", "/v2/kept/app/manifests/v1", &[], &[]),
    ] {
        locked(&answer);
    }
    let ready = server.get("/readyz");
    assert_eq!(ready.status(), 200);
    assert!(ready.text().contains("takes no writes"), "{}", ready.text());
    let metrics = server.get("/metrics").text();
    assert!(
        metrics.contains("longshore_read_only{cause=\"disk\"} 1"),
        "{metrics}"
    );
    let shown = Run::new(tools::program())
        .args(["--json", "mode"])
        .arg(server.host())
        .ok();
    assert_eq!(shown.json()["diskReadOnly"], true, "{shown}");
}

#[test]
fn a_disk_that_turns_read_only_serves_pulls_until_it_is_repaired() {
    let scratch = Scratch::new();
    let disk = Ext4::new(&scratch);
    let mut server = Server::with(&Options::new(tools::program()).data(disk.data()));
    let kept = keepsake(&server);
    let whole = noise(4, 3 << 20);
    let upload = open_upload(&server, "locked/app");
    assert_eq!(patch(&server, &upload, 0, &whole[..1 << 20]).status(), 202);

    let acknowledged = Mutex::new(Vec::new());
    let count = AtomicUsize::new(0);
    let before = thread::scope(|scope| {
        for pusher in 0..4u64 {
            let (server, acknowledged, count) = (&server, &acknowledged, &count);
            scope.spawn(move || {
                let mut connection = connect(server);
                for turn in 0.. {
                    // In rows and in files.
                    let length = if turn % 3 == 0 { 60_000 } else { 6_000 };
                    let bytes = noise(pusher * 1_000_000 + turn, length);
                    let wanted = digest(&bytes);
                    let target = format!("/v2/locked/load/blobs/uploads/?digest={wanted}");
                    let answer = connection.request("POST", &target, &[], &bytes).unwrap();
                    if answer.status() != 201 {
                        locked(&answer);
                        return;
                    }
                    acknowledged.lock().unwrap().push(wanted);
                    count.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        wait_for("some pushes", || {
            (count.load(Ordering::SeqCst) >= 40).then_some(())
        });
        // In the moment in which it gives its journal up, ext4 can call a sync done that is not: a plain program that
        // appends and syncs sees it too. So what counts after the repair is what was acknowledged before.
        let before = acknowledged.lock().unwrap().len();
        disk.fail();
        before
    });
    let acknowledged = acknowledged.into_inner().unwrap();
    let all_there = |server: &Server, acknowledged: &[String]| {
        kept(server);
        for wanted in acknowledged {
            holds(server, "locked/load", wanted);
        }
    };
    locked(&patch(&server, &upload, 1 << 20, &whole[1 << 20..]));
    takes_no_writes(&server);
    all_there(&server, &acknowledged);
    healthy(&mut server);
    let log = server.logged();
    assert_eq!(
        log.matches("the file system takes no writes").count(),
        1,
        "{log}"
    );

    let status = server.stop();
    assert_eq!(status.code(), Some(0), "{}", server.logged());
    let refusal = Options::new(tools::program())
        .data(disk.data())
        .start()
        .expect_err("no server starts on a read-only disk");
    assert!(
        refusal.contains("read-only, mount it writable"),
        "{refusal}"
    );

    disk.repair();
    server.restart();
    all_there(&server, &acknowledged[..before]);
    assert_eq!(server.get(&upload).status(), 204);
    assert_eq!(
        patch(&server, &upload, 1 << 20, &whole[1 << 20..]).status(),
        202
    );
    let done = e2e::wire::finish(&server, &upload, &digest(&whole), &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    healthy(&mut server);
    server.stop();
    verify(&disk.data());
    drop(server);
}

/// The disk refuses the calls of `rule` on the log of the database for a while; the server must go on by itself.
fn writes_are_refused_for_a_while(calls: &str) {
    let mut server = Server::start();
    let kept = keepsake(&server);
    let (log, probe) = (
        server.data().join("meta.db-wal"),
        server.data().join("probe"),
    );
    for round in 0..2 {
        let rule = format!("{calls},openat:error=EROFS");
        let tracer = Tracer::attach(&server, None, &rule, &[&log, &probe]);
        // The first that meets it, and all after it.
        let first = server.request("POST", "/v2/locked/app/blobs/uploads/", &[], &[]);
        locked(&first);
        takes_no_writes(&server);
        kept(&server);
        healthy(&mut server);
        drop(tracer);
        wait_for("the end of the read-only mode", || {
            (server.get("/readyz").text() == "ok\n").then_some(())
        });
        // What was refused did not happen.
        assert_eq!(server.get("/v2/kept/app/manifests/v2").status(), 404);
        let bytes = noise(round + 50, 300_000);
        let wanted = wait_for("a push", || {
            let wanted = digest(&bytes);
            let target = format!("/v2/locked/app/blobs/uploads/?digest={wanted}");
            let answer = server.request("POST", &target, &[], &bytes);
            (answer.status() == 201).then_some(wanted)
        });
        holds(&server, "locked/app", &wanted);
        kept(&server);
    }
    // A crash now finds the same.
    server.restart();
    kept(&server);
    assert_eq!(server.get("/v2/kept/app/manifests/v2").status(), 404);
    for round in 0..2 {
        holds(&server, "locked/app", &digest(&noise(round + 50, 300_000)));
    }
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn writes_that_a_disk_refuses_for_a_while_end_nothing() {
    writes_are_refused_for_a_while("pwrite64");
}

#[test]
fn syncs_that_a_disk_refuses_for_a_while_end_nothing() {
    writes_are_refused_for_a_while("fsync,fdatasync");
}

#[test]
fn a_server_does_not_start_on_a_read_only_disk_and_says_why() {
    let scratch = Scratch::new();
    let disk = Disk::new(&scratch, "32m");
    let options = Options::new(tools::program()).data(disk.data());
    let mut server = Server::with(&options);
    let kept = keepsake(&server);
    server.stop();
    let remount = |mode: &str| {
        Run::new("mount")
            .args(["-o", &format!("remount,{mode}")])
            .arg(disk.path())
            .ok();
    };
    remount("ro");
    let refusal = options.start().expect_err("no server starts");
    assert!(
        refusal.contains("is on a file system that is read-only, mount it writable"),
        "{refusal}"
    );
    remount("rw");
    server.restart();
    kept(&server);
    // A directory that is to be made there.
    server.stop();
    remount("ro");
    let refusal = Options::new(tools::program())
        .data(disk.path().join("new"))
        .start()
        .expect_err("no server starts");
    assert!(
        refusal.contains("read-only, mount it writable"),
        "{refusal}"
    );
}
