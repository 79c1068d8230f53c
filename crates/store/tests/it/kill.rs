//! A child process is killed at every failpoint; what it acknowledged is there afterwards and the store is sound.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use oci::{Algorithm, Digest};
use store::{
    DatabaseLocation, EventKind, Expected, ExpectedPins, Location, ObjectLocation, Options, Pin,
    Store, Timestamp, verify_audit, verify_audit_at, verify_store,
};

use crate::engine::{
    actor, by_tag, content, described, image, name, push_blob, push_image, push_in_pieces, put,
    read_blob, tag,
};
use crate::postgres::Server;

const DIRECTORY: &str = "STORE_KILL_DIRECTORY";

#[tokio::test]
async fn a_kill_at_any_point_loses_nothing_that_was_acknowledged() {
    // Imports, migrations to other places and backups have kills of their own; events are sealed on PostgreSQL alone.
    let others = [
        "import.", "carry.", "backup.", "export.", "restore.", "seal.",
    ];
    let pushes = |point: &&&str| !others.iter().any(|prefix| point.starts_with(prefix));
    for point in store::failpoints().iter().filter(pushes) {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("data");
        // Made by the parent, so that the points are passed by pushes and not by the first start.
        if point.starts_with("migrate.") {
            crate::schema::make(&dir).await;
        } else {
            let store = Store::open(&dir, Options::default()).await.unwrap();
            store.close().await.unwrap();
        }
        let output = run_child("child_of_the_kill_test", &dir, point);
        assert_eq!(
            output.signal(),
            Some(9),
            "`{point}` was not passed: {output}"
        );
        let acknowledged =
            std::fs::read_to_string(dir.with_extension("acknowledged")).unwrap_or_default();
        // What is still of the older version is checked after it was opened.
        if !point.starts_with("migrate.") {
            let report = verify_store(&dir).await.unwrap();
            assert!(
                report.problems.is_empty(),
                "`{point}`: {:?}",
                report.problems
            );
            verify_audit(&dir).await.unwrap();
        }
        let store = Store::open(&dir, crate::retention::options())
            .await
            .unwrap();
        let repository = name("a/b");
        for line in acknowledged.lines() {
            let (kind, value) = line.split_once(' ').unwrap();
            let there = match kind {
                "blob" => {
                    let digest: Digest = value.parse().unwrap();
                    let bytes = read_blob(&store, &repository, &digest).await.unwrap();
                    digest.matches(&bytes)
                }
                "tag" => store
                    .manifest(&repository, &by_tag(value))
                    .await
                    .unwrap()
                    .is_some(),
                "untag" => store
                    .manifest(&repository, &by_tag(value))
                    .await
                    .unwrap()
                    .is_none(),
                "deleted" => !store
                    .repositories(None, 100)
                    .await
                    .unwrap()
                    .contains(&name(value)),
                "pin" => {
                    let digest: Digest = value.parse().unwrap();
                    let pins = store.pins_of(&repository, &digest, None, 10);
                    pins.await.unwrap().iter().any(|pin| pin.holder == "keeps")
                }
                other => panic!("{other}"),
            };
            assert!(there, "`{point}`: {line}");
        }
        // The same work again comes to its end, and the outbox too.
        work(&store, |_| {}).await;
        store.maintain_once().await.unwrap();
        store.close().await.unwrap();
        let report = verify_store(&dir).await.unwrap();
        assert!(
            report.problems.is_empty(),
            "`{point}` afterwards: {:?}",
            report.problems
        );
    }
}

/// A retention run on PostgreSQL: another replica finds the store sound, what the policy keeps is there, and the next run
/// takes what the killed one left, each tag once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retention_run_on_postgres_that_is_killed_at_any_step_is_made_up_for() {
    let (server, by) = (Server::start().await, actor());
    let steps = ["retention.", "delete."];
    let ours = |point: &&&str| steps.iter().any(|step| point.starts_with(step));
    let points: Vec<_> = store::failpoints().iter().filter(ours).collect();
    assert!(points.len() >= 4, "{points:?}");
    for point in points {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().join("data");
        let url = server.database(&point.replace('.', "_")).await;
        std::fs::write(dir.with_extension("url"), &url).unwrap();
        let repository = name("keep/app");
        let store = Store::open_on_postgres(&dir, &url, crate::retention::options())
            .await
            .unwrap();
        let mut views = Vec::new();
        for seed in 0..4 {
            views.push(push_image(&store, &repository, seed, &[&format!("v{seed}")]).await);
        }
        store.close().await.unwrap();
        let killed = run_child("child_that_retains", &dir, point);
        assert_eq!(
            killed.signal(),
            Some(9),
            "`{point}` was not passed: {killed}"
        );
        let store = Store::open_on_postgres(&dir, &url, crate::retention::options())
            .await
            .unwrap();
        crate::engine::assert_sound(&store).await;
        let killed = store.retention_runs(None, 10).await.unwrap();
        assert!(killed.len() == 1 && killed[0].finished_at.is_none());
        let left = store.tags(&repository, None, 10).await.unwrap();
        // All of a page goes in one transaction, which is there or not.
        let whole = ["v0", "v1", "v2", "v3"];
        let after = *point == "retention.after_remove";
        assert_eq!(left, whole[if after { 2 } else { 0 }..], "`{point}`");
        let run = store.start_retention(false, Some(repository.clone()), &by);
        let run = crate::retention::ended(&store, run.await.unwrap()).await;
        assert_eq!(run.removed, if after { 0 } else { 2 }, "`{point}`");
        let left = store.tags(&repository, None, 10).await.unwrap();
        assert_eq!(left, ["v2", "v3"], "`{point}`");
        store.seal().await.unwrap();
        let events = store.events_after(0, 1000).await.unwrap();
        for (seed, view) in views.iter().enumerate() {
            let text = format!("v{seed}");
            let history = store.tag_history(&repository, &tag(&text), None, 10).await;
            let moves = if seed < 2 { 2 } else { 1 };
            assert_eq!(history.unwrap().len(), moves, "`{point}`: {text}");
            let told = events.iter().filter(|event| {
                event.kind == EventKind::TagDeleted && event.tag.as_ref() == Some(&tag(&text))
            });
            assert_eq!(told.count(), moves - 1, "`{point}`: {text}");
            // What lost its tag is kept for its time, and can be put back.
            let digest = crate::engine::by_digest(view);
            let found = store.manifest(&repository, &digest);
            assert!(found.await.unwrap().is_some(), "`{point}`: {text}");
        }
        store.maintain_once().await.unwrap();
        crate::engine::assert_sound(&store).await;
        store.close().await.unwrap();
        let location = Location {
            database: DatabaseLocation::Postgres(url),
            objects: ObjectLocation::Directory(dir),
        };
        verify_audit_at(&location).await.unwrap();
    }
}

/// Runs retention when it is the child of the test above, else nothing.
#[tokio::test]
async fn child_that_retains() {
    let Some(dir) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let url = std::fs::read_to_string(dir.with_extension("url")).unwrap();
    let store = Store::open_on_postgres(&dir, &url, crate::retention::options())
        .await
        .unwrap();
    let by = actor();
    let run = store.start_retention(false, Some(name("keep/app")), &by);
    crate::retention::ended(&store, run.await.unwrap()).await;
    store.close().await.unwrap();
}

/// Does the work when it is the child of the test above, else nothing.
#[tokio::test]
async fn child_of_the_kill_test() {
    let Some(dir) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let store = Store::open(&dir, crate::retention::options())
        .await
        .unwrap();
    let mut file = std::fs::File::create(dir.with_extension("acknowledged")).unwrap();
    work(&store, |line| writeln!(file, "{line}").unwrap()).await;
    store.close().await.unwrap();
}

async fn work(store: &Store, mut acknowledge: impl FnMut(String)) {
    let repository = name("a/b");
    let mut kept = Digest::sha256(b"");
    for seed in 0..3 {
        let small = push_blob(store, &repository, &content(seed, 900)).await;
        acknowledge(format!("blob {}", small.digest));
        let large =
            push_in_pieces(store, &repository, &content(seed + 100, 1_500_000), 600_000).await;
        acknowledge(format!("blob {}", large.digest));
        let again = push_blob(store, &repository, &content(seed + 100, 1_500_000)).await;
        acknowledge(format!("blob {}", again.digest));
        let view = image(&small, &[large]);
        put(store, &repository, &view, &[&format!("v{seed}"), "latest"])
            .await
            .unwrap();
        kept = described(&view).digest;
        acknowledge(format!("tag v{seed}"));
        store.maintain_once().await.unwrap();
    }
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    store.cancel_upload(&repository, &id).await.unwrap();
    put(
        store,
        &repository,
        &image(&push_blob(store, &repository, &content(7, 7)).await, &[]),
        &["gone"],
    )
    .await
    .unwrap();
    store
        .delete_tag(&repository, &tag("gone"), Expected::Any, &actor())
        .await
        .unwrap();
    acknowledge("untag gone".to_owned());
    // Of one holder that keeps its pin, and one whose pin comes, changes, goes, and ends.
    let pin = |reason: &str, expires| Pin {
        repository: repository.clone(),
        digest: kept.clone(),
        reason: reason.to_owned(),
        expires,
    };
    let hour = SystemTime::UNIX_EPOCH.elapsed().unwrap() + Duration::from_hours(1);
    let hour = Timestamp(hour.as_micros().try_into().unwrap());
    for (holder, pins) in [
        ("keeps", vec![pin("", None)]),
        ("other", vec![pin("one", None)]),
        ("other", vec![pin("two", None)]),
        ("other", vec![]),
        ("other", vec![pin("three", Some(hour))]),
    ] {
        let outcome = store
            .set_pins(holder, pins, ExpectedPins::Any, &actor())
            .await;
        assert_eq!(outcome.unwrap().missing, []);
        if holder == "keeps" {
            acknowledge(format!("pin {kept}"));
        }
    }
    // What nothing keeps any more is collected, and a whole repository in steps.
    let doomed = name("a/doomed");
    let stray = push_blob(store, &doomed, &content(8, 90_000)).await;
    put(store, &doomed, &image(&stray, &[]), &["v1"])
        .await
        .unwrap();
    for _ in 0..3 {
        store.advance_clock(Duration::from_hours(25));
        store.maintain_once().await.unwrap();
    }
    store.delete_repository(&doomed, &actor()).await.unwrap();
    acknowledge("deleted a/doomed".to_owned());
    store.maintain_once().await.unwrap();
    // Two of these are removed by the policy.
    let kept = name("keep/app");
    for seed in 0..4 {
        push_image(store, &kept, 50 + seed, &[&format!("v{seed}")]).await;
        store.advance_clock(Duration::from_secs(1));
    }
    let run = store.start_retention(false, Some(kept), &actor()).await;
    crate::retention::ended(store, run.unwrap()).await;
}

#[expect(
    clippy::disallowed_methods,
    reason = "the test starts itself as the process that is killed"
)]
fn run_child(test: &str, dir: &std::path::Path, point: &str) -> std::process::ExitStatus {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("kill::{test}")])
        .env(DIRECTORY, dir)
        .env("LONGSHORE_FAILPOINT", format!("{point}:1"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}
