//! The read-only mode, on every engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest};
use store::{Error, ExpectedPins, Options, Pin, Store};

use crate::engine::{
    actor, content, described, name, push_blob, push_image, put_of, read_blob, sqlite, tag,
};

/// Every write of a user is refused, reads and the store's own work go on.
pub(crate) async fn read_only_by_command(store: &Store) {
    let repository = name("mode/app");
    let view = push_image(store, &repository, 900, &["v1"]).await;
    let bytes = content(901, 30_000);
    let blob = push_blob(store, &repository, &bytes).await;
    let open = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();

    assert!(store.mode().await.unwrap().is_normal());
    store
        .set_read_only("moving\nhouse", &actor())
        .await
        .unwrap();
    let mode = store.mode().await.unwrap();
    let commanded = mode.commanded.clone().unwrap();
    assert_eq!(
        (commanded.text.as_str(), commanded.by.as_str()),
        ("movinghouse", "user:alice")
    );
    assert!(mode.reason().unwrap().contains("movinghouse"));

    let refused = |outcome: Result<(), Error>| match outcome {
        Err(Error::ReadOnly { reason }) => assert!(reason.contains("movinghouse"), "{reason}"),
        other => panic!("{other:?}"),
    };
    refused(
        store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .map(drop),
    );
    refused(store.claim_upload(&repository, &open).await.map(drop));
    refused(
        store
            .put_blob(&repository, &blob.digest, &actor())
            .await
            .map(drop),
    );
    refused(
        store
            .mount_blob(
                &name("mode/other"),
                &blob.digest,
                std::slice::from_ref(&repository),
                &actor(),
            )
            .await
            .map(drop),
    );
    refused(
        store
            .put_manifest(put_of(&repository, &view, &["v2"]))
            .await
            .map(drop),
    );
    refused(
        store
            .delete_tag(&repository, &tag("v1"), store::Expected::Any, &actor())
            .await,
    );
    refused(
        store
            .delete_manifest(&repository, &described(&view).digest, &actor())
            .await,
    );
    refused(store.delete_blob(&repository, &blob.digest, &actor()).await);

    // The collector goes on, so a pin must be let through; to take one away waits.
    let pins = vec![Pin {
        repository: repository.clone(),
        digest: described(&view).digest,
        reason: String::new(),
        expires: None,
    }];
    let pinned = store
        .set_pins("mode", pins, ExpectedPins::Any, &actor())
        .await
        .unwrap();
    assert_eq!(pinned.held.len(), 1);
    refused(
        store
            .remove_pins("mode", ExpectedPins::Any, &actor())
            .await
            .map(drop),
    );

    // A HEAD with a fresh lease promises nothing new; one that must renew it may not promise (I7).
    assert!(
        store
            .stat_blob(&repository, &blob.digest, true)
            .await
            .unwrap()
            .is_some()
    );
    let digest = described(&view).digest;
    assert!(store.renew_manifest(&repository, &digest).await.unwrap());
    store.advance_clock(Duration::from_hours(13));
    refused(
        store
            .stat_blob(&repository, &blob.digest, true)
            .await
            .map(drop),
    );
    assert!(
        store
            .stat_blob(&repository, &blob.digest, false)
            .await
            .unwrap()
            .is_some()
    );
    assert_eq!(
        read_blob(store, &repository, &blob.digest).await.unwrap(),
        bytes
    );
    store.maintain_once().await.unwrap();
    assert!(store.mode().await.unwrap().commanded.is_some());

    store.set_normal(&actor()).await.unwrap();
    store
        .remove_pins("mode", ExpectedPins::Any, &actor())
        .await
        .unwrap();
    assert!(store.mode().await.unwrap().is_normal());
    push_image(store, &repository, 902, &["v2"]).await;
}

/// When the command is answered, what was under way has ended and nothing comes after it.
pub(crate) async fn no_write_comes_after_the_command(store: &Store) {
    let repository = name("mode/race");
    for round in 0..5 {
        let commanded = Arc::new(AtomicBool::new(false));
        let mut pushers = Vec::new();
        for pusher in 0..8_u64 {
            let (store, commanded, repository) =
                (store.clone(), Arc::clone(&commanded), repository.clone());
            pushers.push(tokio::spawn(async move {
                for turn in 0.. {
                    let bytes = Bytes::from(format!("{round} {pusher} {turn}"));
                    let digest = Digest::sha256(&bytes);
                    let before = commanded.load(Ordering::SeqCst);
                    let outcome = async {
                        let mut writer = store.put_blob(&repository, &digest, &actor()).await?;
                        writer.write(bytes).await?;
                        writer.commit(&digest, &actor()).await
                    }
                    .await;
                    match outcome {
                        Ok(_) => assert!(!before, "a write was taken after the command"),
                        Err(Error::ReadOnly { .. }) => return,
                        Err(error) => panic!("{error}"),
                    }
                }
            }));
        }
        tokio::task::yield_now().await;
        store.set_read_only("", &actor()).await.unwrap();
        commanded.store(true, Ordering::SeqCst);
        let before = store.statistics().await.unwrap().blobs;
        for pusher in pushers {
            pusher.await.unwrap();
        }
        assert_eq!(store.statistics().await.unwrap().blobs, before);
        store.set_normal(&actor()).await.unwrap();
    }
}

#[tokio::test]
async fn below_the_floor_users_cannot_write_and_may_delete() {
    let engine = sqlite(Options::default()).await;
    let repository = name("mode/full");
    push_image(&engine.store, &repository, 910, &["v1"]).await;
    engine.store.clone().close().await.unwrap();
    let store = Store::open(
        &engine.directory.path().join("data"),
        Options {
            floor: Some(1 << 60),
            ..Options::default()
        },
    )
    .await
    .unwrap();
    let refused = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await;
    assert!(
        matches!(&refused, Err(Error::ReadOnly { reason }) if reason.contains("free some space")),
        "{refused:?}"
    );
    store.maintain_once().await.unwrap();
    assert!(store.mode().await.unwrap().full.is_some());
    store
        .delete_tag(&repository, &tag("v1"), store::Expected::Any, &actor())
        .await
        .unwrap();
    store.close().await.unwrap();
}

/// As `operate.md` says: cancelling makes room, wherever the claim of an upload is.
#[tokio::test]
async fn an_upload_is_cancelled_in_the_read_only_mode() {
    for shared in [false, true] {
        let engine = sqlite(Options::default()).await;
        let (store, repository) = (&engine.store, name("mode/cancel"));
        if shared {
            store.share_claims();
        }
        let id = store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .unwrap();
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(content(1, 100_000)).await.unwrap();
        writer.record().await.unwrap();
        store.set_read_only("moving", &actor()).await.unwrap();
        let refused = store.claim_upload(&repository, &id).await.map(drop);
        assert!(
            matches!(refused, Err(Error::ReadOnly { .. })),
            "{refused:?}"
        );
        store.cancel_upload(&repository, &id).await.unwrap();
        assert_eq!(store.statistics().await.unwrap().uploads, 0);
        store.maintain_once().await.unwrap();
        crate::engine::assert_sound(store).await;
        store.clone().close().await.unwrap();
    }
}
