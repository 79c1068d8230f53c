//! PostgreSQL restored to a moment with its own tools, as `docs/how-to/backup.md` says it, over a bucket that is not
//! restored.

use std::path::Path;

use e2e::cluster::{Storage, replicas};
use e2e::http::Connection;
use e2e::objects::Kind;
use e2e::postgres::{Setup, open_to_all, own};
use e2e::server::Options;
use e2e::wire::{holds, noise, open_upload, patch, wait_for};
use e2e::{Cluster, ObjectStore, Postgres, Run, Scratch, Server, digest, image, tools};

use crate::{Pushers, Site, healthy, keepsake, verify};

/// As `backup.md` has it: deletions wait for as long as one may want to go back.
fn options(storage: &Storage) -> Options {
    Options::new(tools::program())
        .config("version: 1\ngc: {keep_deleted: 7d}\n")
        .storage(storage)
}

/// What an operator runs on the restored database.
fn adopt(storage: &Storage, words: &[&str]) -> Run {
    let mut run = Run::new(tools::program()).args(["--json", "restore", "--adopt"]);
    for (key, value) in storage.environment() {
        run = run.env(key, value);
    }
    run.args(words.iter().copied())
}

/// The position of the newest event.
fn position(server: &Server) -> String {
    let mut connection = Connection::open(server.url()).unwrap();
    connection
        .send_head("GET", "/api/v1/events", &[], None)
        .unwrap();
    assert_eq!(connection.receive_head("GET").unwrap().status, 200);
    loop {
        let line = connection.line().unwrap();
        if let Some(id) = line.strip_prefix("id: ") {
            return id.to_owned();
        }
    }
}

/// The kind of the first event that a reader gets who was at `position`.
fn first_event(server: &Server, position: &str) -> String {
    let mut connection = Connection::open(server.url()).unwrap();
    let resume = [("Last-Event-ID", position)];
    connection
        .send_head("GET", "/api/v1/events", &resume, None)
        .unwrap();
    assert_eq!(connection.receive_head("GET").unwrap().status, 200);
    loop {
        let line = connection.line().unwrap();
        if let Some(kind) = line.strip_prefix("event: ") {
            return kind.to_owned();
        }
    }
}

/// Restores a copy of the data directory to a moment.
fn restore(base: &Path, archive: &Path, moment: &str) -> Postgres {
    let signal = base.join("recovery.signal");
    std::fs::write(&signal, "").unwrap();
    e2e::postgres::own_file(&signal);
    Postgres::on_copy(
        base.to_owned(),
        vec![
            format!("restore_command=cp {}/%f %p", archive.display()),
            format!("recovery_target_time={moment}"),
            "recovery_target_action=promote".to_owned(),
        ],
    )
}

fn a_moment_is_restored(kind: Kind) {
    let scratch = Scratch::new();
    open_to_all(scratch.path());
    let (archive, base) = (scratch.join("archive"), scratch.join("base"));
    own(&archive);
    own(&base);
    let at = archive.display();
    let postgres = Postgres::with(Setup {
        settings: vec![
            "archive_mode=on".to_owned(),
            format!("archive_command=test ! -f {at}/%f && cp %p {at}/%f"),
        ],
        ..Setup::default()
    });
    let cluster = Cluster::of(postgres, ObjectStore::start(kind));
    let storage = cluster.storage();
    let name = storage.database.rsplit('/').next().unwrap().to_owned();
    let mut site = Site {
        servers: replicas(&options(&storage), 2),
        storage,
        cluster,
    };
    let kept = keepsake(&site.servers[0], "moment");
    let layer = noise(77, 400_000);
    let gone = digest(&layer);
    let manifest = image::push_artifact(
        site.servers[0].url(),
        "gone/app",
        "v1",
        "application/vnd.example",
        &layer,
    );
    site.cluster.postgres.base_copy(&base);

    // Before the moment.
    let pushers = Pushers::start(&site.servers, 3);
    pushers.wait_for_more(30);
    let before = pushers.finish();
    assert_eq!(before.refused, [""; 0]);
    let upload = open_upload(&site.servers[0], "open/app");
    assert_eq!(patch(&site.servers[0], &upload, 0, &layer).status(), 202);
    let moment = site.cluster.postgres.sql(&name, "SELECT clock_timestamp()");

    // After it: pushes, and a deletion with its collection.
    let late = [noise(91, 350_000), noise(92, 9 << 20)];
    for (layer, tag) in late.iter().zip(["a", "b"]) {
        let server = &site.servers[1];
        image::push_artifact(
            server.url(),
            "late/app",
            tag,
            "application/vnd.example",
            layer,
        );
    }
    // A repository that is deleted waits for no lease, so its rows go now and its object is to go.
    Run::new(tools::program())
        .args(["rm", "--repository"])
        .arg(format!("{}/gone/app", site.servers[0].host()))
        .ok();
    wait_for("the collection", || {
        let status = site.servers[1].get("/api/v1/collection").json();
        (status["outbox"]["objects"] == 1).then_some(())
    });
    let blob = format!("/v2/gone/app/blobs/{gone}");
    assert_eq!(site.servers[0].get(&blob).status(), 404);
    let epoch = position(&site.servers[0]);
    let objects = site.cluster.blobs_of(&site.storage);
    for server in &mut site.servers {
        server.stop();
    }
    let postgres = &mut site.cluster.postgres;
    postgres.sql(&name, "SELECT pg_switch_wal()");
    postgres.stop();

    // The database of that moment, and the bucket of today.
    let restored = restore(&base, &archive, &moment);
    site.storage.database = restored.url(&name);
    assert_eq!(site.cluster.blobs_of(&site.storage), objects);
    let adopted = adopt(&site.storage, &[]).ok().json();
    assert_eq!(adopted["uploads"], 1, "{adopted}");
    let unknown = adopted["unknownObjects"].as_u64().unwrap();
    assert!(unknown >= 2, "{adopted}");
    let again = adopt(&site.storage, &[]).ok().json();
    assert_eq!(again["uploads"], 0, "{again}");
    assert_eq!(again["unknownObjects"], unknown, "{again}");
    let told = adopt(&site.storage, &["--discard-unknown"]).ok().json();
    assert_eq!(told["unknownObjects"], unknown, "{told}");
    assert_ne!(told["epoch"], adopted["epoch"], "{told}");

    site.servers = replicas(&options(&site.storage), 2);
    // No replica may be under a restored database.
    adopt(&site.storage, &[])
        .fails()
        .says("stop all replicas first");
    before.all_there(&site.servers);
    for server in &site.servers {
        kept.readable(server);
        let answer = server.get("/v2/gone/app/manifests/v1");
        assert_eq!(answer.status(), 200, "{}", answer.text());
        assert_eq!(digest(&answer.body), manifest);
        holds(server, "gone/app", &gone);
        assert_eq!(server.get("/v2/late/app/manifests/a").status(), 404);
        assert_eq!(server.get(&upload).status(), 404);
        assert_eq!(first_event(server, &epoch), "reset");
    }
    verify(&site.storage);

    // Clients push again what is not there any more, and the collector goes on.
    for (layer, tag) in late.iter().zip(["a", "b"]) {
        let server = &site.servers[0];
        image::push_artifact(
            server.url(),
            "late/app",
            tag,
            "application/vnd.example",
            layer,
        );
        holds(&site.servers[1], "late/app", &digest(layer));
    }
    let pushers = Pushers::start(&site.servers, 3);
    pushers.wait_for_more(20);
    let pushed = pushers.finish();
    assert_eq!(pushed.refused, [""; 0]);
    pushed.all_there(&site.servers);
    before.all_there(&site.servers);
    for server in &site.servers {
        kept.readable(server);
        holds(server, "gone/app", &gone);
    }
    healthy(&mut site.servers);
    verify(&site.storage);
}

#[test]
fn a_database_of_a_moment_fits_to_the_bucket_of_minio() {
    a_moment_is_restored(Kind::Minio);
}

#[test]
fn a_database_of_a_moment_fits_to_the_bucket_of_versitygw() {
    a_moment_is_restored(Kind::Versitygw);
}
