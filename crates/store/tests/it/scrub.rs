//! The scrub, on every engine: what it finds, what it leaves alone, and how it is healed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use store::{Error, Store};

use crate::engine::{
    Engine, actor, by_digest, content, described, name, push_blob, push_image, put, read_blob,
};

/// Damage of objects is found and marked, and a push heals it.
pub(crate) async fn damaged_objects_are_marked_and_healed(engine: &Engine) {
    let store = &engine.store;
    let root = engine.directory.path().join("data/o");
    let repository = name("scrub/app");
    store.run_scrub(&actor()).await.unwrap();
    store.scrub_once().await.unwrap();
    let none = store.scrub_status().await.unwrap();
    assert_eq!(
        (none.suspect_count, none.damaged_count, none.blobs_left),
        (0, 0, 0)
    );
    assert_eq!(store.scrub_once().await.unwrap(), 0);

    let before = files(&root);
    let view = push_image(store, &repository, 950, &["v1"]).await;
    let large = view.layers.as_ref().unwrap()[1].clone();
    let object = files(&root).difference(&before).next().unwrap().clone();
    let whole = std::fs::read(&object).unwrap();
    // What was just pushed was verified just now.
    assert_eq!(store.scrub_once().await.unwrap(), 0);

    let mut flipped = whole.clone();
    flipped[20_000] ^= 1;
    for broken in [Some(flipped.as_slice()), Some(&whole[..100]), None] {
        match broken {
            Some(bytes) => std::fs::write(&object, bytes).unwrap(),
            None => std::fs::remove_file(&object).unwrap(),
        }
        let found = store.scrub_counters().damaged;
        assert!(scrub_all(store).await > 0);
        if broken.is_none() {
            // What is missing is looked for once more, minutes later.
            assert_eq!(store.suspect_count().await.unwrap(), 0);
            store.advance_clock(Duration::from_mins(6));
            assert_eq!(store.scrub_once().await.unwrap(), 1);
        }
        assert_eq!(store.scrub_counters().damaged, found + 1);
        let status = store.scrub_status().await.unwrap();
        assert_eq!(status.suspect_count, 1);
        let suspect = &status.suspects[0];
        assert_eq!(suspect.digest, large.digest);
        assert_eq!(
            suspect.repositories.as_slice(),
            std::slice::from_ref(&repository)
        );
        assert_eq!(
            suspect.manifests,
            [(repository.clone(), described(&view).digest)]
        );
        assert!(
            store
                .stat_blob(&repository, &large.digest, true)
                .await
                .unwrap()
                .is_none()
        );
        let opened = store.open_blob(&repository, &large.digest).await;
        assert!(
            matches!(&opened, Err(Error::BlobDamaged(digest)) if *digest == large.digest),
            "{opened:?}"
        );
        // It is read again within the hour, and what was put back by hand is taken back.
        std::fs::write(&object, &whole).unwrap();
        store.advance_clock(Duration::from_mins(61));
        store.scrub_once().await.unwrap();
        assert_eq!(store.scrub_status().await.unwrap().suspect_count, 0);
        assert_eq!(
            read_blob(store, &repository, &large.digest).await.unwrap(),
            whole
        );
    }

    // A push of the same content heals it, under a new key.
    std::fs::write(&object, &flipped).unwrap();
    scrub_all(store).await;
    assert_eq!(store.suspect_count().await.unwrap(), 1);
    push_blob(store, &name("scrub/elsewhere"), &whole.clone().into()).await;
    assert_eq!(store.suspect_count().await.unwrap(), 0);
    assert_eq!(
        read_blob(store, &repository, &large.digest).await.unwrap(),
        whole
    );
    scrub_all(store).await;
    assert_eq!(store.suspect_count().await.unwrap(), 0);
}

/// An object that cannot be read gives no verdict.
pub(crate) async fn what_cannot_be_read_is_not_judged(engine: &Engine) {
    let store = &engine.store;
    let root = engine.directory.path().join("data/o");
    let repository = name("scrub/unreadable");
    let before = files(&root);
    let bytes = content(960, 50_000);
    let blob = push_blob(store, &repository, &bytes).await;
    let object = files(&root).difference(&before).next().unwrap().clone();
    // A link to itself can be opened by nobody, and is not missing.
    std::fs::remove_file(&object).unwrap();
    std::os::unix::fs::symlink(&object, &object).unwrap();
    let unreadable = store.scrub_counters().unreadable;
    scrub_all(store).await;
    assert_eq!(store.scrub_counters().unreadable, unreadable + 1);
    assert_eq!(store.suspect_count().await.unwrap(), 0);
    // Nobody takes it again at once.
    assert_eq!(store.scrub_once().await.unwrap(), 0);
    std::fs::remove_file(&object).unwrap();
    std::fs::write(&object, &bytes).unwrap();
    store.advance_clock(Duration::from_mins(30));
    assert_eq!(store.scrub_once().await.unwrap(), 1);
    assert_eq!(
        read_blob(store, &repository, &blob.digest).await.unwrap(),
        bytes
    );
}

/// Damage in rows is found: inline bodies and manifests.
pub(crate) async fn damaged_rows_are_found(engine: &Engine) {
    let store = &engine.store;
    let repository = name("scrub/rows");
    let view = push_image(store, &repository, 970, &["v1"]).await;
    let config = view.config.clone().unwrap();
    let digest = described(&view).digest;
    let wrong = view.to_bytes().iter().map(|b| b ^ 1).collect::<Vec<_>>();
    engine
        .change(&format!(
            "UPDATE blob SET body = {} WHERE size = {} AND digest = {}",
            engine.literal(&vec![7; usize::try_from(config.size).unwrap()]),
            config.size,
            engine.digest_literal(&config.digest),
        ))
        .await;
    engine
        .change(&format!(
            "UPDATE manifest SET body = {} WHERE digest = {}",
            engine.literal(&wrong),
            engine.digest_literal(&digest),
        ))
        .await;
    scrub_all(store).await;
    let status = store.scrub_status().await.unwrap();
    assert_eq!(status.suspect_count, 1);
    assert_eq!(status.suspects[0].digest, config.digest);
    assert_eq!(status.damaged_count, 1);
    assert_eq!(status.damaged[0].digest, digest);
    assert_eq!(status.damaged[0].repository, repository);

    push_blob(store, &repository, &content(970, 200)).await;
    put(store, &repository, &view, &[]).await.unwrap();
    scrub_all(store).await;
    let status = store.scrub_status().await.unwrap();
    assert_eq!((status.suspect_count, status.damaged_count), (0, 0));
    let stored = store
        .manifest(&repository, &by_digest(&view))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stored.body, view.to_bytes());
}

/// Makes everything due and reads it.
async fn scrub_all(store: &Store) -> u64 {
    store.advance_clock(Duration::from_secs(1));
    store.run_scrub(&actor()).await.unwrap();
    store.scrub_once().await.unwrap()
}

fn files(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.insert(entry.path());
            }
        }
    }
    found
}
