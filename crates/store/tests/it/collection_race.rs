//! Pushes, mounts, renewals, moves and deletions against collectors with leases of a fraction of a second, from two
//! stores over one database: what a HEAD promised is kept, what is tagged reads back, and in the end nothing is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use store::{Error, Expected, GcOptions, Options, Store};

use crate::engine::{
    Engine, actor, assert_sound, by_digest, content, described, image, name, postgres, push_blob,
    put, read_blob, sqlite, tag,
};

const LEASE: Duration = Duration::from_millis(600);
const WORKERS: u64 = 6;
const ROUNDS: u64 = 20;

fn options() -> Options {
    Options {
        lease: LEASE,
        gc: GcOptions {
            rate: 100_000,
            read_grace: Duration::ZERO,
            orphan_referrers: Duration::ZERO,
            ..GcOptions::default()
        },
        ..Options::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_collector_races_with_every_writer_on_sqlite() {
    let engine = sqlite(options()).await;
    race(&engine, vec![engine.store.clone()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_collectors_of_two_replicas_race_with_every_writer() {
    let engine = postgres(options()).await;
    let directory = engine.directory.path().join("data");
    let other = Store::open_on_postgres(&directory, &engine.url, options()).await;
    let stores = vec![engine.store.clone(), other.unwrap()];
    race(&engine, stores).await;
}

async fn race(engine: &Engine, stores: Vec<Store>) {
    let collectors: Vec<_> = stores
        .iter()
        .map(|store| {
            let store = store.clone();
            tokio::spawn(async move { store.maintain().await })
        })
        .collect();
    let judged = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let store = stores[worker as usize % stores.len()].clone();
            tokio::spawn(work(store, worker, Arc::clone(&judged)))
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    assert!(
        judged.load(Ordering::Relaxed) > 0,
        "nothing was in time to be judged"
    );
    let store = &engine.store;
    let begin = Instant::now();
    loop {
        let left = store.statistics().await.unwrap();
        if (left.blobs, left.manifests, left.pending_deletions) == (0, 0, 0) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "{left:?}");
        tokio::time::sleep(LEASE / 10).await;
    }
    for collector in collectors {
        collector.abort();
        let _ = collector.await;
    }
    assert_sound(store).await;
    for store in stores.into_iter().skip(1) {
        store.close().await.unwrap();
    }
}

/// Pushes the few images of a small world again and again, as clients do: HEAD, then send only what is missing.
async fn work(store: Store, worker: u64, judged: Arc<AtomicU64>) {
    let mut random = worker.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut dice = move |sides: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) % sides
    };
    for _ in 0..ROUNDS {
        let repository = name(["race/one", "race/two"][dice(2) as usize]);
        let other = name(["race/one", "race/two"][dice(2) as usize]);
        let seed = dice(4);
        let begin = Instant::now();
        let mut parts = Vec::new();
        for bytes in [content(seed, 300), content(seed + 100, 20_000)] {
            let digest = oci::Digest::sha256(&bytes);
            let there = store.stat_blob(&repository, &digest, true).await.unwrap();
            let held = there.is_some()
                || store
                    .mount_blob(&repository, &digest, std::slice::from_ref(&other), &actor())
                    .await
                    .unwrap();
            parts.push(if held {
                oci::Descriptor::new("application/octet-stream", digest, bytes.len() as u64)
            } else {
                push_blob(&store, &repository, &bytes).await
            });
        }
        let view = image(&parts[0], &parts[1..]);
        let mine = format!("w{worker}");
        match put(&store, &repository, &view, &[&mine, "shared"]).await {
            Ok(_) => {}
            Err(Error::MissingReferences(missing)) => {
                // A HEAD keeps for half a lease at least.
                assert!(
                    begin.elapsed() > LEASE / 2,
                    "{missing:?} was promised and is gone after {:?}",
                    begin.elapsed()
                );
                continue;
            }
            Err(error) => panic!("{error}"),
        }
        if begin.elapsed() < LEASE / 2 {
            judged.fetch_add(1, Ordering::Relaxed);
        }
        // Nobody else moves this tag, so all of it must be there, however long it takes.
        let stored = store
            .manifest(&repository, &by_digest(&view))
            .await
            .unwrap();
        assert!(stored.is_some());
        for part in &parts {
            let bytes = read_blob(&store, &repository, &part.digest).await;
            assert!(bytes.is_some_and(|bytes| part.digest.matches(&bytes)));
        }
        if dice(3) == 0 {
            tokio::time::sleep(LEASE / 4).await;
        }
        let digest = described(&view).digest;
        store.renew_manifest(&repository, &digest).await.unwrap();
        for text in [mine.as_str(), "shared"] {
            // Another worker may have deleted the shared one.
            match store
                .delete_tag(&repository, &tag(text), Expected::Any, &actor())
                .await
            {
                Ok(()) | Err(Error::ManifestUnknown(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}
