//! Uploads: one writer, exact offsets, what breaks off, what goes wrong.

use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest};
use store::{Error, Options, Store};

use crate::engine::{actor, assert_sound, content, name, push_blob, read_blob, sqlite};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_one_wins_and_the_bytes_are_its_own() {
    let engine = sqlite(Options::default()).await;
    let repository = name("a/b");
    for round in 0..150_u64 {
        let id = engine
            .store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .unwrap();
        let attempt = |seed: u64| {
            let (store, repository, id) = (engine.store.clone(), repository.clone(), id.clone());
            tokio::spawn(async move {
                let bytes = content(seed, 40_000);
                let mut writer = match store.claim_upload(&repository, &id).await {
                    Ok(writer) => writer,
                    Err(Error::UploadBusy { offset }) => return Err(offset),
                    Err(other) => panic!("{other}"),
                };
                if writer.offset() != 0 {
                    return Err(writer.offset());
                }
                for start in (0..bytes.len()).step_by(10_000) {
                    writer
                        .write(bytes.slice(start..start + 10_000))
                        .await
                        .unwrap();
                    tokio::task::yield_now().await;
                }
                writer.record().await.unwrap();
                Ok(bytes)
            })
        };
        let (one, two) = (attempt(round * 2), attempt(round * 2 + 1));
        let results = [one.await.unwrap(), two.await.unwrap()];
        let winners: Vec<&Bytes> = results
            .iter()
            .filter_map(|result| result.as_ref().ok())
            .collect();
        assert_eq!(winners.len(), 1, "round {round}");
        let digest = Digest::sha256(winners[0]);
        let writer = loop {
            // The loser that looked at the offset gives its claim back in the background.
            match engine.store.claim_upload(&repository, &id).await {
                Ok(writer) => break writer,
                Err(Error::UploadBusy { .. }) => tokio::task::yield_now().await,
                Err(other) => panic!("{other}"),
            }
        };
        writer.commit(&digest, &actor()).await.unwrap();
        assert_eq!(
            read_blob(&engine.store, &repository, &digest)
                .await
                .unwrap(),
            *winners[0]
        );
    }
    assert_sound(&engine.store).await;
}

#[tokio::test]
async fn a_patch_that_breaks_off_is_recorded_to_its_last_byte() {
    let engine = sqlite(Options::default()).await;
    let (store, repository) = (&engine.store, name("a/b"));
    let bytes = content(1, 2_000_000);
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(bytes.slice(..1_234_567)).await.unwrap();
    drop(writer);
    let mut writer = claim(store, &id).await;
    assert_eq!(writer.offset(), 1_234_567);
    writer.write(bytes.slice(1_234_567..)).await.unwrap();
    let digest = Digest::sha256(&bytes);
    assert_eq!(writer.commit(&digest, &actor()).await.unwrap(), 2_000_000);
    assert_eq!(read_blob(store, &repository, &digest).await.unwrap(), bytes);
}

async fn claim(store: &Store, id: &store::UploadId) -> store::UploadWriter {
    loop {
        match store.claim_upload(&name("a/b"), id).await {
            Ok(writer) => return writer,
            Err(Error::UploadBusy { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn an_idle_writer_loses_its_claim_and_nothing_it_wrote() {
    let options = Options {
        claim_idle: Duration::ZERO,
        ..Options::default()
    };
    let engine = sqlite(options).await;
    let (store, repository) = (&engine.store, name("a/b"));
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut idle = store.claim_upload(&repository, &id).await.unwrap();
    idle.write(content(1, 50_000)).await.unwrap();
    let mut next = store.claim_upload(&repository, &id).await.unwrap();
    assert_eq!(next.offset(), 50_000);
    let refused = idle.write(content(2, 50_000)).await;
    assert!(matches!(refused, Err(Error::UploadBusy { offset: 50_000 })));
    drop(idle);
    next.write(content(3, 10)).await.unwrap();
    let whole: Bytes = [content(1, 50_000), content(3, 10)].concat().into();
    next.commit(&Digest::sha256(&whole), &actor())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_wrong_digest_expires_the_upload_and_leaves_no_object() {
    let engine = sqlite(Options::default()).await;
    let (store, repository) = (&engine.store, name("a/b"));
    for length in [10, 100_000] {
        let id = store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .unwrap();
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(content(1, length)).await.unwrap();
        let wrong = Digest::sha256(b"other");
        let refused = writer.commit(&wrong, &actor()).await;
        assert!(
            matches!(refused, Err(Error::DigestMismatch { actual, .. }) if actual == Digest::sha256(&content(1, length)))
        );
        assert!(matches!(
            store.upload_offset(&repository, &id).await,
            Err(Error::UploadUnknown)
        ));
        assert!(
            store
                .stat_blob(&repository, &wrong, false)
                .await
                .unwrap()
                .is_none()
        );

        let mut single = store.put_blob(&repository, &wrong, &actor()).await.unwrap();
        single.write(content(1, length)).await.unwrap();
        assert!(matches!(
            single.commit(&wrong, &actor()).await,
            Err(Error::DigestMismatch { .. })
        ));
    }
    store.maintain_once().await.unwrap();
    let statistics = store.statistics().await.unwrap();
    assert_eq!(
        (
            statistics.uploads,
            statistics.pending_deletions,
            statistics.blobs
        ),
        (0, 0, 0)
    );
    assert_eq!(objects(&engine.directory.path().join("data/o")), 0);
    assert_sound(store).await;
}

#[tokio::test]
async fn a_sha512_digest_at_the_end_of_a_sha256_upload_is_computed_from_the_bytes() {
    let engine = sqlite(Options::default()).await;
    let (store, repository) = (&engine.store, name("a/b"));
    for length in [100, 700_000] {
        let bytes = content(9, length);
        let id = store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .unwrap();
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.record().await.unwrap();
        let writer = store.claim_upload(&repository, &id).await.unwrap();
        let digest = Digest::of(Algorithm::Sha512, &bytes);
        writer.commit(&digest, &actor()).await.unwrap();
        assert_eq!(read_blob(store, &repository, &digest).await.unwrap(), bytes);
    }
    assert_sound(store).await;
}

#[tokio::test]
async fn the_same_content_twice_is_one_object() {
    let engine = sqlite(Options::default()).await;
    let store = &engine.store;
    let bytes = content(5, 100_000);
    push_blob(store, &name("a/b"), &bytes).await;
    push_blob(store, &name("c/d"), &bytes).await;
    assert_eq!(store.statistics().await.unwrap().pending_deletions, 1);
    store.maintain_once().await.unwrap();
    assert_eq!(objects(&engine.directory.path().join("data/o")), 1);
    assert_eq!(
        read_blob(store, &name("c/d"), &Digest::sha256(&bytes))
            .await
            .unwrap(),
        bytes
    );
    assert_sound(store).await;
}

#[tokio::test]
async fn a_single_post_that_breaks_off_leaves_nothing() {
    let engine = sqlite(Options::default()).await;
    let store = &engine.store;
    let mut writer = store
        .put_blob(&name("a/b"), &Digest::sha256(b""), &actor())
        .await
        .unwrap();
    writer.write(content(5, 100_000)).await.unwrap();
    writer.record().await.unwrap();
    store.maintain_once().await.unwrap();
    assert_eq!(store.statistics().await.unwrap().uploads, 0);
    assert_eq!(objects(&engine.directory.path().join("data/o")), 0);
}

/// Files under a directory.
fn objects(root: &std::path::Path) -> usize {
    std::fs::read_dir(root)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                objects(&entry.path())
            } else {
                1
            }
        })
        .sum()
}
