//! A full disk under the database.

use e2e::objects::Kind;
use e2e::postgres::{Setup, open_to_all};
use e2e::wire::wait_for;
use e2e::{Cluster, Disk, ObjectStore, Postgres, Scratch};

use crate::{Pushers, Site, healthy, in_trouble, keepsake, verify};

/// Small segments of the log, so that a small disk is full when a test says so.
fn small() -> Vec<String> {
    ["min_wal_size=32MB", "max_wal_size=64MB"]
        .map(str::to_owned)
        .to_vec()
}

/// Replicas over a database that is set up so.
fn site(setup: Setup) -> Site {
    let cluster = Cluster::of(Postgres::with(setup), ObjectStore::start(Kind::Minio));
    let storage = cluster.storage();
    Site::over(cluster, storage, 2)
}

#[test]
fn a_database_without_room_for_rows_refuses_pushes_serves_pulls_and_recovers() {
    let scratch = Scratch::new();
    open_to_all(scratch.path());
    let disk = Disk::new(&scratch, "160m");
    let mut site = site(Setup {
        data: Some(disk.data()),
        // The log has room, so the server lives.
        wal: Some(scratch.join("wal")),
        settings: small(),
        ..Setup::default()
    });
    let kept = keepsake(&site.servers[0], "full");
    let pushers = Pushers::start(&site.servers, 4);
    for _ in 0..2 {
        pushers.wait_for_more(20);
        let before = pushers.refusals("507");
        disk.fill(0);
        wait_for("pushes that are refused for the disk", || {
            (pushers.refusals("507") >= before + 20).then_some(())
        });
        for server in &site.servers {
            kept.readable(server);
            assert_eq!(server.get("/readyz").status(), 200);
        }
        disk.free();
        pushers.wait_for_more(20);
    }
    let pushed = pushers.finish();
    healthy(&mut site.servers);
    pushed.refused_clearly();
    assert!(
        pushed
            .refused
            .iter()
            .filter(|text| text.starts_with("507"))
            .all(|text| text.contains("disk is full, free some space")),
        "{:?}",
        pushed.refused
    );
    pushed.all_there(&site.servers);
    for server in &site.servers {
        kept.readable(server);
    }
    verify(&site.storage);
}

#[test]
fn a_database_without_room_for_its_log_loses_nothing() {
    let scratch = Scratch::new();
    open_to_all(scratch.path());
    let disk = Disk::new(&scratch, "160m");
    let wal = scratch.dir("wal");
    let logs = Disk::over(&wal, "64m");
    let mut site = site(Setup {
        data: Some(disk.data()),
        wal: Some(wal.join("postgres")),
        syncs: true,
        // A new segment is made with each switch, and none is kept for later.
        settings: ["min_wal_size=32MB", "max_wal_size=32MB", "wal_recycle=off"]
            .map(str::to_owned)
            .to_vec(),
        ..Setup::default()
    });
    let name = site.storage.database.rsplit('/').next().unwrap().to_owned();
    let kept = keepsake(&site.servers[0], "log");
    let pushers = Pushers::start(&site.servers, 4);
    for _ in 0..2 {
        pushers.wait_for_more(20);
        let before = pushers.troubles();
        logs.fill(0);
        // The segment that is written now may last for long: end it. The server meets the end of its disk and panics.
        let _ = site
            .cluster
            .postgres
            .try_sql(&name, "SELECT pg_switch_wal()");
        wait_for("refused pushes", || {
            (pushers.troubles() >= before + 5).then_some(())
        });
        in_trouble(&site.servers[0].request("POST", "/v2/kept/log/blobs/uploads/", &[], &[]));
        assert!(
            site.cluster.postgres.logged().contains("No space left"),
            "{}",
            site.cluster.postgres.logged()
        );
        logs.free();
        // A server that could not even recover has ended; whoever looks after it starts it.
        if !site.cluster.postgres.runs() || !site.cluster.postgres.serves() {
            site.cluster.postgres.restart();
        }
        pushers.wait_for_more(20);
    }
    let pushed = pushers.finish();
    healthy(&mut site.servers);
    pushed.refused_clearly();
    pushed.all_there(&site.servers);
    for server in &site.servers {
        kept.readable(server);
    }
    verify(&site.storage);
}
