//! A process is killed at every step of an import and of a migration; the same work again comes to its end, nothing is
//! doubled, and the store is sound.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use oci::{Descriptor, Digest, media_type};
use serde_json::json;
use store::import::{self, Layouts, Placement, Plans, Report, Shape, StoreSink};
use store::transfer::{self, Settings, Verify};
use store::{
    DatabaseLocation, Error, Location, ObjectLocation, Options, Store, VerifyOptions, verify_at,
    verify_audit, verify_audit_at, verify_store,
};

use crate::engine::{content, image, name, push_blob, put, read_blob, tag};
use crate::postgres::Server;
use crate::stand_in::StandIn;

const DIRECTORY: &str = "STORE_KILL_TRANSFER_DIRECTORY";

#[tokio::test]
async fn an_import_that_is_killed_at_any_step_goes_on() {
    for point in points("import.") {
        let directory = tempfile::tempdir().unwrap();
        let (source, dir) = (
            directory.path().join("source"),
            directory.path().join("data"),
        );
        make_layout(&source);
        Store::open(&dir, Options::default())
            .await
            .unwrap()
            .close()
            .await
            .unwrap();
        let killed = child(directory.path(), "child_that_imports", point);
        assert_eq!(
            killed.signal(),
            Some(9),
            "`{point}` was not passed: {killed}"
        );
        let report = verify_store(&dir).await.unwrap();
        assert!(
            report.problems.is_empty(),
            "`{point}`: {:?}",
            report.problems
        );
        let report = bring(directory.path()).await;
        assert!(report.is_complete(), "`{point}`: {report:?}");
        assert_eq!(report.source, report.destination, "`{point}`");
        // The upload that the killed run left ends by its time, and its object with it.
        let store = Store::open(&dir, Options::default()).await.unwrap();
        store.advance_clock(std::time::Duration::from_hours(48));
        for _ in 0..3 {
            store.maintain_once().await.unwrap();
        }
        let statistics = store.statistics().await.unwrap();
        assert_eq!(
            (statistics.uploads, statistics.manifests),
            (0, 3),
            "`{point}`"
        );
        store.close().await.unwrap();
        let report = verify_store(&dir).await.unwrap();
        assert!(
            report.problems.is_empty(),
            "`{point}`: {:?}",
            report.problems
        );
    }
}

#[tokio::test]
async fn a_migration_that_is_killed_at_any_step_goes_on() {
    for point in points("carry.") {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let store = Store::open(&from, Options::default()).await.unwrap();
        let repository = name("a/b");
        let config = push_blob(&store, &repository, &content(1, 100)).await;
        let large = push_blob(&store, &repository, &content(2, 700_000)).await;
        put(
            &store,
            &repository,
            &image(&config, &[large]),
            &["v1", "v2"],
        )
        .await
        .unwrap();
        let epoch = store.epoch().to_owned();
        let newest = store.event_bounds().await.unwrap().newest;
        store.close().await.unwrap();
        let killed = child(directory.path(), "child_that_migrates", point);
        assert_eq!(
            killed.signal(),
            Some(9),
            "`{point}` was not passed: {killed}"
        );
        // A place that is half filled is no store.
        assert!(
            Store::open(&to, Options::default()).await.is_err(),
            "`{point}`"
        );
        let report = carry(directory.path()).await;
        assert!(report.finished, "`{point}`: {report:?}");
        let report = verify_store(&to).await.unwrap();
        assert!(
            report.problems.is_empty(),
            "`{point}`: {:?}",
            report.problems
        );
        verify_audit(&to).await.unwrap();
        let store = Store::open(&to, Options::default()).await.unwrap();
        assert_eq!(store.epoch(), epoch);
        assert_eq!(store.event_bounds().await.unwrap().newest, newest);
        assert!(store.tag(&repository, &tag("v2")).await.unwrap().is_some());
        store.close().await.unwrap();
        assert!(
            Store::open(&from, Options::default()).await.is_err(),
            "`{point}`"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_to_a_cluster_that_is_killed_at_any_step_goes_on() {
    let server = Server::start().await;
    for point in points("carry.") {
        between(&server, point, Way::ToCluster).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_from_a_cluster_that_is_killed_at_any_step_goes_on() {
    let server = Server::start().await;
    for point in points("carry.").into_iter().chain(["carry.after_leaving"]) {
        between(&server, point, Way::FromCluster).await;
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    ToCluster,
    FromCluster,
}

/// Where the source and the destination of a child are.
fn ends(directory: &Path) -> (Location, Location) {
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    let embedded = Location::embedded(directory.join("data"));
    let cluster = StandIn::at(&read("endpoint"), DatabaseLocation::Postgres(read("url")));
    match read("way").as_str() {
        "to" => (embedded, cluster),
        _ => (cluster, embedded),
    }
}

async fn carry_between(directory: &Path) -> transfer::Report {
    let settings = Settings {
        verify: Verify::Full,
        ..Settings::default()
    };
    let (from, to) = ends(directory);
    transfer::migrate(&from, &to, settings).await.unwrap()
}

/// One run that is killed at a point, and the next one, between a directory and PostgreSQL with an object store.
async fn between(server: &Server, point: &str, way: Way) {
    let directory = tempfile::tempdir().unwrap();
    let objects = StandIn::start().await;
    let place = point.replace('.', "_");
    let url = server.database(&place).await;
    let text = if way == Way::ToCluster { "to" } else { "from" };
    for (name, text) in [
        ("endpoint", &*objects.endpoint),
        ("url", &*url),
        ("way", text),
    ] {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    let (from, to) = ends(directory.path());
    let store = Store::open_at(&from, Options::default()).await.unwrap();
    let repository = name("a/b");
    let config = push_blob(&store, &repository, &content(1, 100)).await;
    let large = push_blob(&store, &repository, &content(2, 700_000)).await;
    let view = image(&config, std::slice::from_ref(&large));
    put(&store, &repository, &view, &["v1", "v2"])
        .await
        .unwrap();
    store.seal().await.unwrap();
    let epoch = store.epoch().to_owned();
    let newest = store.event_bounds().await.unwrap().newest;
    store.close().await.unwrap();
    if way == Way::ToCluster {
        let path = directory.path().join("data/meta.db");
        let connection = rusqlite::Connection::open(path).unwrap();
        let pulls = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 4500) \
                     INSERT INTO pull (repository_id, digest, principal, hour, pulls) \
                     SELECT r.id, x'01', 'user:alice', n, 1 FROM repository r, n";
        connection.execute_batch(pulls).unwrap();
    }
    let killed = child(directory.path(), "child_that_carries", point);
    assert_eq!(
        killed.signal(),
        Some(9),
        "`{point}` was not passed: {killed}"
    );
    // The source is marked before the destination is begun.
    if point != "carry.after_leaving" {
        let opened = Store::open_at(&to, Options::default()).await;
        assert!(opened.is_err(), "`{point}`");
    }
    if way == Way::FromCluster {
        let opened = Store::open_at(&from, Options::default()).await;
        assert!(
            matches!(opened, Err(Error::Moving(_))),
            "`{point}`: {opened:?}"
        );
    }
    if way == Way::ToCluster && point == "carry.after_tables" {
        // What was brought is taken out again, and no statement of that grows with a table.
        let trigger = "CREATE FUNCTION few() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                           IF (SELECT COUNT(*) FROM gone) > 2000 THEN RAISE 'too many rows'; END IF; \
                           RETURN NULL; END $$; \
                       CREATE TRIGGER few AFTER DELETE ON pull REFERENCING OLD TABLE AS gone \
                           FOR EACH STATEMENT EXECUTE FUNCTION few()";
        let client = crate::postgres::connect(&url).await;
        client.batch_execute(trigger).await.unwrap();
    }
    let report = carry_between(directory.path()).await;
    assert!(report.finished, "`{point}`: {report:?}");
    if way == Way::ToCluster && point == "carry.after_tables" {
        assert_eq!(report.rows["pull"], 4500);
    }
    let report = verify_at(&to, VerifyOptions::default(), &|_| {}).await;
    let problems = report.unwrap().problems;
    assert!(problems.is_empty(), "`{point}`: {problems:?}");
    verify_audit_at(&to).await.unwrap();
    let store = Store::open_at(&to, Options::default()).await.unwrap();
    assert_eq!(store.epoch(), epoch);
    assert_eq!(store.event_bounds().await.unwrap().newest, newest);
    assert!(store.tag(&repository, &tag("v2")).await.unwrap().is_some());
    let bytes = read_blob(&store, &repository, &large.digest).await;
    assert_eq!(bytes.unwrap(), content(2, 700_000), "`{point}`");
    store.close().await.unwrap();
    assert!(
        Store::open_at(&from, Options::default()).await.is_err(),
        "`{point}`"
    );
}

/// Carries between the places of the test above when it is its child, else nothing.
#[tokio::test]
async fn child_that_carries() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        carry_between(&directory).await;
    }
}

/// A source on PostgreSQL has no lock that dies with the process: the mark keeps replicas out until the next run came to
/// its end, or somebody gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_opens_a_store_that_a_killed_run_was_carrying_away() {
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let from = Location {
        database: DatabaseLocation::Postgres(server.database("leaving").await),
        objects: ObjectLocation::Directory(directory.path().join("from")),
    };
    std::fs::write(directory.path().join("url"), url(&from)).unwrap();
    let repository = name("a/b");
    let open = || async { Store::open_at(&from, Options::default()).await };
    let mut pushed = Vec::new();
    let points = [
        "carry.after_leaving",
        "carry.after_objects",
        "carry.after_tables",
        "carry.after_format",
    ];
    for (seed, point) in (0..).zip(points) {
        let store = open().await.unwrap();
        pushed.push(push_blob(&store, &repository, &content(seed, 50_000)).await);
        store.close().await.unwrap();
        let killed = child(directory.path(), "child_that_leaves", point);
        assert_eq!(killed.signal(), Some(9), "`{point}`: {killed}");
        let opened = open().await;
        assert!(
            matches!(&opened, Err(Error::Moving(text)) if text.contains("--reopen")),
            "`{point}`: {opened:?}"
        );
        assert!(transfer::reopen(&from).await.unwrap(), "`{point}`");
        assert!(!transfer::reopen(&from).await.unwrap(), "`{point}`");
    }
    // A run that fails gives the source back by itself.
    std::fs::write(directory.path().join("taken"), "x").unwrap();
    let nowhere = Location::embedded(directory.path().join("taken"));
    assert!(
        transfer::migrate(&from, &nowhere, Settings::default())
            .await
            .is_err()
    );
    open().await.unwrap().close().await.unwrap();
    // After one more that is killed, the next comes to the end.
    child(directory.path(), "child_that_leaves", points[1]);
    let to = Location::embedded(directory.path().join("to"));
    let report = transfer::migrate(&from, &to, Settings::default())
        .await
        .unwrap();
    assert!(report.finished, "{report:?}");
    let opened = open().await;
    assert!(matches!(opened, Err(Error::Moving(_))), "{opened:?}");
    let store = Store::open_at(&to, Options::default()).await.unwrap();
    for blob in &pushed {
        let held = store.stat_blob(&repository, &blob.digest, false).await;
        assert!(held.unwrap().is_some());
    }
    store.close().await.unwrap();
}

fn url(location: &Location) -> String {
    match &location.database {
        DatabaseLocation::Postgres(url) => url.clone(),
        DatabaseLocation::Sqlite(_) => String::new(),
    }
}

/// Carries from PostgreSQL when it is the child of the test above, else nothing.
#[tokio::test]
async fn child_that_leaves() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        let url = std::fs::read_to_string(directory.join("url")).unwrap();
        let from = Location {
            database: DatabaseLocation::Postgres(url),
            objects: ObjectLocation::Directory(directory.join("from")),
        };
        let to = Location::embedded(directory.join("to"));
        transfer::migrate(&from, &to, Settings::default())
            .await
            .unwrap();
    }
}

/// Imports when it is the child of the test above, else nothing.
#[tokio::test]
async fn child_that_imports() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        bring(&directory).await;
    }
}

/// Migrates when it is the child of the test above, else nothing.
#[tokio::test]
async fn child_that_migrates() {
    if let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) {
        carry(&directory).await;
    }
}

async fn bring(directory: &Path) -> Report {
    let store = Store::open(&directory.join("data"), Options::default())
        .await
        .unwrap();
    let source = Layouts::open(&directory.join("source"), Shape::Plain).unwrap();
    let sink = StoreSink::new(&store, Placement::Link).unwrap();
    let report = import::run(&source, &sink, &Plans::default())
        .await
        .unwrap();
    store.close().await.unwrap();
    report
}

async fn carry(directory: &Path) -> transfer::Report {
    let settings = Settings {
        verify: Verify::Full,
        ..Settings::default()
    };
    let (from, to) = (directory.join("from"), directory.join("to"));
    transfer::migrate(&Location::embedded(from), &Location::embedded(to), settings)
        .await
        .unwrap()
}

/// A layout with an index over two images, each with a layer that does not fit into a row.
fn make_layout(root: &Path) {
    let layout = root.join("team/app");
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let write = |bytes: &[u8]| {
        let digest = Digest::sha256(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        Descriptor::new("application/octet-stream", digest, bytes.len() as u64)
    };
    let config = write(b"{}");
    let children: Vec<Descriptor> = (0..2)
        .map(|seed| {
            let layer = write(&content(seed, 300_000));
            let bytes = image(&config, &[layer]).to_bytes();
            write(&bytes);
            Descriptor::of(media_type::OCI_MANIFEST, &bytes)
        })
        .collect();
    let bytes = crate::engine::index(&children).to_bytes();
    write(&bytes);
    let mut entry = Descriptor::of(media_type::OCI_INDEX, &bytes);
    entry.annotations.insert(
        "org.opencontainers.image.ref.name".to_owned(),
        "v1".to_owned(),
    );
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
}

fn points(prefix: &str) -> Vec<&'static str> {
    let points: Vec<_> = store::failpoints()
        .iter()
        .copied()
        .filter(|point| point.starts_with(prefix))
        .collect();
    assert!(points.len() > 3);
    points
}

#[expect(
    clippy::disallowed_methods,
    reason = "the test starts itself as the process that is killed"
)]
fn child(directory: &Path, test: &str, point: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("kill_transfer::{test}")])
        .env(DIRECTORY, directory)
        .env("LONGSHORE_FAILPOINT", format!("{point}:1"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}
