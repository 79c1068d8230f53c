//! Answers of an object store that say wrongly that something is gone: nobody forgets what is there because of them, and
//! what is really gone is told all the same.

use std::time::Duration;

use bytes::Bytes;
use oci::Digest;
use store::transfer::{self, Settings, Verify};
use store::{DatabaseLocation, Error, Location, Options, Store, reindex_at};

use crate::engine::{
    actor, assert_sound, by_tag, content, image, name, push_blob, put, read_blob, tag,
};
use crate::postgres::Server;
use crate::stand_in::{Fault, Request, StandIn};

/// More than anybody tries.
const FOR_GOOD: usize = 1000;
/// More than lies between two readings of the scrub.
const MINUTES: Duration = Duration::from_mins(6);

/// A store over a stand-in whose objects have these bytes.
async fn world(directory: &tempfile::TempDir, blobs: u64) -> (StandIn, Location, Vec<Bytes>) {
    let objects = StandIn::start().await;
    let location = objects.location(DatabaseLocation::Sqlite(directory.path().join("data")));
    let store = Store::open_at(&location, Options::default()).await.unwrap();
    let repository = name("a/b");
    let (mut contents, mut layers) = (Vec::new(), Vec::new());
    for seed in 0..blobs {
        let bytes = content(seed, 50_000);
        layers.push(push_blob(&store, &repository, &bytes).await);
        contents.push(bytes);
    }
    let config = push_blob(&store, &repository, &content(1000, 100)).await;
    let view = image(&config, &layers);
    put(&store, &repository, &view, &["v1"]).await.unwrap();
    store.export().await.unwrap();
    store.close().await.unwrap();
    (objects, location, contents)
}

async fn all_there(store: &Store, contents: &[Bytes]) {
    for bytes in contents {
        let read = read_blob(store, &name("a/b"), &Digest::sha256(bytes)).await;
        assert!(read.as_ref() == Some(bytes));
    }
    assert!(
        store
            .manifest(&name("a/b"), &by_tag("v1"))
            .await
            .unwrap()
            .is_some()
    );
}

async fn scrub(store: &Store) -> Result<u64, Error> {
    store.advance_clock(Duration::from_secs(1));
    store.run_scrub(&actor()).await.unwrap();
    store.scrub_once().await
}

#[tokio::test]
async fn a_scrub_believes_nobody_who_says_that_all_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let (objects, location, contents) = world(&directory, 8).await;
    let store = Store::open_at(&location, Options::default()).await.unwrap();
    for _ in 0..2 {
        objects.fail(Request::Get, Fault::NoSuch("NoSuchKey"), FOR_GOOD);
        let failed = scrub(&store).await;
        assert!(
            matches!(&failed, Err(Error::Unavailable { problem, .. }) if problem.contains("in a row")),
            "{failed:?}"
        );
        // Minutes later it is no other.
        store.advance_clock(MINUTES);
        assert!(store.scrub_once().await.is_err());
        assert_eq!(store.suspect_count().await.unwrap(), 0);
        assert!(objects.heal() > 0);
        store.advance_clock(Duration::from_hours(1));
        scrub(&store).await.unwrap();
        assert_eq!(store.suspect_count().await.unwrap(), 0);
        assert_eq!(store.scrub_status().await.unwrap().blobs_left, 0);
    }
    all_there(&store, &contents).await;
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_scrub_marks_what_is_missing_minutes_later_too() {
    let directory = tempfile::tempdir().unwrap();
    let (objects, location, contents) = world(&directory, 3).await;
    let store = Store::open_at(&location, Options::default()).await.unwrap();
    // For a moment one is missing, and one is read wrongly.
    objects.fail(Request::Get, Fault::NoSuch("NoSuchKey"), 1);
    objects.fail(Request::Get, Fault::Flipped, 1);
    scrub(&store).await.unwrap();
    assert_eq!(objects.heal(), 0);
    assert_eq!(store.suspect_count().await.unwrap(), 0);
    store.advance_clock(MINUTES);
    assert_eq!(store.scrub_once().await.unwrap(), 2);
    assert_eq!(store.suspect_count().await.unwrap(), 0);

    objects.lose(&contents[1]);
    scrub(&store).await.unwrap();
    assert_eq!(store.suspect_count().await.unwrap(), 0);
    // At once it is not read again.
    assert_eq!(store.scrub_once().await.unwrap(), 0);
    store.advance_clock(MINUTES);
    assert_eq!(store.scrub_once().await.unwrap(), 1);
    let status = store.scrub_status().await.unwrap();
    assert_eq!(status.suspect_count, 1);
    assert_eq!(status.suspects[0].digest, Digest::sha256(&contents[1]));
    // A push heals it.
    push_blob(&store, &name("a/b"), &contents[1]).await;
    scrub(&store).await.unwrap();
    assert_eq!(store.suspect_count().await.unwrap(), 0);
    all_there(&store, &contents).await;
    store.close().await.unwrap();
}

fn settings(accept_damaged: bool) -> Settings {
    Settings {
        verify: Verify::Full,
        accept_damaged,
        ..Settings::default()
    }
}

#[tokio::test]
async fn a_transfer_takes_no_wrong_answer_for_a_loss() {
    let directory = tempfile::tempdir().unwrap();
    let (objects, from, contents) = world(&directory, 3).await;
    let to = Location::embedded(directory.path().join("to"));
    // What the store does not say of the object may pass, and ends the run.
    for fault in [Fault::NotFound, Fault::NoSuch("NoSuchBucket")] {
        objects.fail(Request::Get, fault, FOR_GOOD);
        let failed = transfer::migrate(&from, &to, settings(true)).await;
        assert!(
            matches!(failed, Err(Error::Unavailable { .. })),
            "{failed:?}"
        );
        objects.heal();
    }
    // One that is wrong for a moment is asked again.
    objects.fail(Request::Get, Fault::NoSuch("NoSuchKey"), 1);
    let report = transfer::migrate(&from, &to, settings(false))
        .await
        .unwrap();
    assert!(report.finished, "{report:?}");
    assert!(report.damaged.is_empty() && report.problems.is_empty());
    let store = Store::open_at(&to, Options::default()).await.unwrap();
    all_there(&store, &contents).await;
    assert_sound(&store).await;
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_transfer_lets_go_only_what_it_is_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let (objects, from, contents) = world(&directory, 3).await;
    let to = Location::embedded(directory.path().join("to"));
    objects.lose(&contents[0]);
    let lost = Digest::sha256(&contents[0]);
    for ahead in [true, false] {
        let settings = Settings {
            ahead,
            ..settings(false)
        };
        let report = transfer::migrate(&from, &to, settings).await.unwrap();
        assert!(!report.finished && report.damaged.is_empty(), "{report:?}");
        assert_eq!(report.problems.len(), 1, "{report:?}");
        assert!(report.problems[0].contains(&lost.to_string()));
        assert!(report.problems[0].contains("--accept-damaged"));
    }
    // The source is still the store.
    let store = Store::open_at(&from, Options::default()).await.unwrap();
    store.close().await.unwrap();
    let report = transfer::migrate(&from, &to, settings(true)).await.unwrap();
    assert!(report.finished, "{report:?}");
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    let store = Store::open_at(&to, Options::default()).await.unwrap();
    let gone = store.stat_blob(&name("a/b"), &lost, false).await.unwrap();
    assert!(gone.is_none());
    push_blob(&store, &name("a/b"), &contents[0]).await;
    all_there(&store, &contents).await;
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reindex_makes_no_database_of_what_it_could_not_read() {
    let server = Server::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (objects, embedded, contents) = world(&directory, 6).await;
    std::fs::remove_dir_all(directory.path().join("data")).unwrap();
    let cluster = objects.location(DatabaseLocation::Postgres(server.database("anew").await));
    for (location, fault) in [(&cluster, Fault::NotFound), (&embedded, Fault::Status(503))] {
        // Some are read before.
        let read = objects.count(Request::Get);
        let failing = objects.clone();
        let fails = move |progress: store::ReindexProgress| {
            if progress.step == "objects" && progress.done == 1 {
                failing.fail(Request::Get, fault, FOR_GOOD);
            }
        };
        let failed = reindex_at(location, &Options::default(), true, fails).await;
        assert!(
            matches!(failed, Err(Error::Unavailable { .. })),
            "{failed:?}"
        );
        assert!(objects.count(Request::Get) > read && objects.heal() > 0);
        let opened = Store::open_at(location, Options::default()).await;
        assert!(opened.is_err(), "there is a store: {opened:?}");
        let report = reindex_at(location, &Options::default(), true, |_| {})
            .await
            .unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!((report.objects, report.tags), (6, 1));
        let store = Store::open_at(location, Options::default()).await.unwrap();
        all_there(&store, &contents).await;
        assert!(store.tag(&name("a/b"), &tag("v1")).await.unwrap().is_some());
        assert_sound(&store).await;
        // Nothing of the run that failed is in the outbox.
        store.advance_clock(Duration::from_hours(48));
        store.maintain_once().await.unwrap();
        all_there(&store, &contents).await;
        store.close().await.unwrap();
    }
}
