//! The settings of the collector do what they say: reads that have begun come to their end, and candidates are looked at in
//! the time and at the pace that was set.

use std::path::Path;
use std::time::{Duration, SystemTime};

use oci::Digest;
use store::{DatabaseLocation, GcOptions, Options, Store, Window};

use crate::engine::{actor, content, name, push_blob, sqlite};
use crate::stand_in::StandIn;

const GRACE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_read_that_has_begun_comes_to_its_end_in_a_directory() {
    let engine = sqlite(Options::default()).await;
    let objects = engine.directory.path().join("data/o");
    read_while_it_goes(&engine.store, || files(&objects), false).await;
    engine.store.close().await.unwrap();
}

#[tokio::test]
async fn a_read_that_has_begun_comes_to_its_end_in_an_object_store() {
    let directory = tempfile::tempdir().unwrap();
    let database = DatabaseLocation::Sqlite(directory.path().join("data"));
    let objects = StandIn::start().await;
    let store = objects.open(database, Options::default()).await;
    read_while_it_goes(&store, || objects.objects(), true).await;
    store.close().await.unwrap();
}

/// `late`: what has gone cannot be read any more, as nothing keeps it open.
async fn read_while_it_goes(store: &Store, objects: impl Fn() -> usize, late: bool) {
    assert_eq!(Options::default().gc.read_grace, GRACE);
    let (repository, bytes) = (name("team/app"), content(1, 3_000_000));
    let blob = push_blob(store, &repository, &bytes).await;
    let reader = store.open_blob(&repository, &blob.digest).await.unwrap();
    let reader = reader.unwrap();
    let mut read = reader.read(0..1_000_000).await.unwrap().to_vec();
    store
        .delete_blob(&repository, &blob.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    let again = store.open_blob(&repository, &blob.digest).await;
    assert!(again.unwrap().is_none(), "it is deleted for whoever asks");
    assert_eq!(store.statistics().await.unwrap().blobs, 0);
    assert_eq!(objects(), 1, "its object waits");
    read.extend(reader.read(1_000_000..2_000_000).await.unwrap());
    store.advance_clock(GRACE / 2);
    store.maintain_once().await.unwrap();
    read.extend(reader.read(2_000_000..u64::MAX).await.unwrap());
    assert_eq!(Digest::sha256(&read), blob.digest);
    assert_eq!(objects(), 1);
    // Somebody pushes it again meanwhile: that is another object, which stays.
    push_blob(store, &repository, &bytes).await;
    assert_eq!(objects(), 2);
    store.advance_clock(GRACE);
    store.maintain_once().await.unwrap();
    assert_eq!(objects(), 1);
    assert_eq!(reader.read(0..10).await.is_err(), late);
    let there = crate::engine::read_blob(store, &repository, &blob.digest).await;
    assert_eq!(there.unwrap(), bytes);
}

fn files(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap();
    entries
        .map(|entry| match entry.unwrap().path() {
            below if below.is_dir() => files(&below),
            _ => 1,
        })
        .sum()
}

#[tokio::test]
async fn candidates_wait_for_the_window() {
    let minute = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() / 60;
    let clock = |minute: u64| format!("{:02}:{:02}", minute / 60 % 24, minute % 60);
    let text = format!("{}-{}", clock(minute + 120), clock(minute + 180));
    let window: Window = text.parse().unwrap();
    let engine = sqlite(Options {
        gc: GcOptions {
            window: Some(window),
            ..GcOptions::default()
        },
        ..Options::default()
    })
    .await;
    let (store, repository) = (&engine.store, name("team/app"));
    let first = push_blob(store, &repository, &content(1, 100)).await;
    let held = async |digest: &Digest| {
        let found = store.stat_blob(&repository, digest, false).await;
        found.unwrap().is_some()
    };
    // An hour before it opens, the lease is over.
    store.advance_clock(Duration::from_hours(25));
    store.maintain_once().await.unwrap();
    assert!(!store.collection_status().await.unwrap().open);
    assert!(held(&first.digest).await);
    // Somebody who asks for a run gets one.
    store.collect_now();
    store.maintain_once().await.unwrap();
    assert!(!held(&first.digest).await);
    // And the next round waits again, until the window opens.
    let second = push_blob(store, &repository, &content(2, 100)).await;
    store.advance_clock(Duration::from_hours(24));
    store.maintain_once().await.unwrap();
    assert!(held(&second.digest).await);
    store.advance_clock(Duration::from_mins(70));
    store.maintain_once().await.unwrap();
    assert!(store.collection_status().await.unwrap().open);
    assert!(!held(&second.digest).await);
    // It closes again.
    let third = push_blob(store, &repository, &content(3, 100)).await;
    store.advance_clock(Duration::from_hours(25));
    store.maintain_once().await.unwrap();
    assert!(held(&third.digest).await);
    store.clone().close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_candidates_than_the_rate_are_looked_at() {
    const RATE: u32 = 60;
    // Of each blob its hold, and then the blob.
    const BLOBS: u64 = 50;
    // Candidates that are looked at together.
    const STEP: f64 = 8.0;
    let engine = sqlite(Options {
        gc: GcOptions {
            rate: RATE,
            ..GcOptions::default()
        },
        ..Options::default()
    })
    .await;
    let (store, repository) = (&engine.store, name("team/app"));
    for seed in 0..BLOBS {
        push_blob(store, &repository, &content(seed, 100)).await;
    }
    store.advance_clock(Duration::from_hours(25));
    let began = tokio::time::Instant::now();
    let worker = {
        let store = store.clone();
        tokio::spawn(async move { store.maintain().await })
    };
    loop {
        let looked_at = store.collection_totals().looked_at;
        // Asked for after the number, so it is never too early.
        let may = began.elapsed().as_secs_f64() * f64::from(RATE) + STEP;
        assert!(looked_at as f64 <= may, "{looked_at} of {may}");
        if looked_at >= 2 * BLOBS {
            break;
        }
        assert!(began.elapsed() < Duration::from_mins(2), "{looked_at}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    worker.abort();
    let _ = worker.await;
    assert_eq!(store.statistics().await.unwrap().blobs, 0);
    store.clone().close().await.unwrap();
}
