//! An object store that answers wrongly, late or not at all: nothing acknowledged is lost, nothing wrong is served,
//! and what cannot be done is said.

use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Digest};
use store::{DatabaseLocation, Error, Options, Store, UploadId};

use crate::engine::{actor, assert_sound, content, name, push_blob, push_in_pieces, read_blob};
use crate::postgres::Server;
use crate::stand_in::{Fault, Request, StandIn};

const PART: usize = 8 << 20;
/// More than anybody tries.
const FOR_GOOD: usize = 100;

struct World {
    objects: StandIn,
    store: Store,
    _directory: tempfile::TempDir,
}

async fn world() -> World {
    let (objects, directory) = (StandIn::start().await, tempfile::tempdir().unwrap());
    let database = DatabaseLocation::Sqlite(directory.path().join("data"));
    World {
        store: objects.open(database, Options::default()).await,
        objects,
        _directory: directory,
    }
}

/// For the contract: every statement of uploads into an object store, with claims in the rows.
pub(crate) async fn uploads_keep_the_contract(server: Option<&Server>) {
    let (objects, directory) = (StandIn::start().await, tempfile::tempdir().unwrap());
    let database = match server {
        None => DatabaseLocation::Sqlite(directory.path().join("data")),
        Some(server) => DatabaseLocation::Postgres(server.database("objects").await),
    };
    let store = objects.open(database, Options::default()).await;
    store.share_claims();
    let repository = name("a/b");
    for (seed, length) in [(1, 10), (2, 50_000), (3, PART + 50_000)] {
        let bytes = content(seed, length);
        push_blob(&store, &repository, &bytes).await;
        let pushed = push_in_pieces(&store, &repository, &bytes, length / 2 + 1).await;
        assert!(
            read_blob(&store, &repository, &pushed.digest)
                .await
                .unwrap()
                == bytes
        );
    }
    objects.fail(Request::Create, Fault::LostAnswer, 1);
    let id = start(&store).await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(4, PART + 50_000)).await.unwrap();
    let busy = store.claim_upload(&repository, &id).await;
    assert!(matches!(busy, Err(Error::UploadBusy { offset: 0 })));
    writer.record().await.unwrap();
    assert_eq!(objects.uploads(), 2, "one of them is known to nobody");
    store.cancel_upload(&repository, &id).await.unwrap();
    ends_clean(&objects, &store, 2).await;
    store.close().await.unwrap();
}

/// Everything that became no blob goes, and the blobs stay.
async fn ends_clean(objects: &StandIn, store: &Store, blobs: usize) {
    assert_eq!(objects.heal(), 0, "faults that nobody met");
    store.advance_clock(Duration::from_mins(10));
    store.maintain_once().await.unwrap();
    assert_sound(store).await;
    assert_eq!((objects.objects(), objects.uploads()), (blobs, 0));
}

async fn start(store: &Store) -> UploadId {
    store
        .start_upload(&name("a/b"), Algorithm::Sha256, &actor())
        .await
        .unwrap()
}

async fn push(store: &Store, bytes: &Bytes) -> Result<u64, Error> {
    let digest = Digest::sha256(bytes);
    let mut writer = store.put_blob(&name("a/b"), &digest, &actor()).await?;
    writer.write(bytes.clone()).await?;
    writer.commit(&digest, &actor()).await
}

#[tokio::test]
async fn what_goes_wrong_once_is_tried_again() {
    let world = world().await;
    let (store, objects) = (&world.store, &world.objects);
    let mut seed = 0;
    for (request, fault) in [
        (Request::Put, Fault::Status(500)),
        (Request::Put, Fault::Status(429)),
        (Request::Put, Fault::NotFound),
        (Request::Put, Fault::LostAnswer),
        (Request::Create, Fault::Status(503)),
        (Request::Create, Fault::LostAnswer),
        (Request::Create, Fault::NotFound),
        (Request::Part, Fault::NotFound),
        (Request::Part, Fault::NoSuch("NoSuchBucket")),
        (Request::Complete, Fault::NotFound),
        (Request::Head, Fault::NotFound),
        (Request::Part, Fault::Status(500)),
        (Request::Part, Fault::LostAnswer),
        (Request::Complete, Fault::Status(500)),
        (Request::Complete, Fault::ErrorWithin200),
        // The object is there, and the second time the upload is not.
        (Request::Complete, Fault::LostAnswer),
    ] {
        seed += 1;
        let length = if request == Request::Put {
            50_000
        } else {
            PART + 50_000
        };
        let bytes = content(seed, length);
        objects.fail(request, fault, 1);
        assert_eq!(
            push(store, &bytes).await.unwrap(),
            length as u64,
            "{request:?} {fault:?}"
        );
        assert_eq!(objects.heal(), 0, "{request:?} {fault:?}");
        let read = read_blob(store, &name("a/b"), &Digest::sha256(&bytes)).await;
        assert!(read.unwrap() == bytes, "{request:?} {fault:?}");
    }
    ends_clean(objects, store, usize::try_from(seed).unwrap()).await;
}

#[tokio::test]
async fn a_failure_that_stays_is_said_and_the_upload_goes_on_later() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    for (seed, request, fault) in [
        (1, Request::Part, Fault::Status(500)),
        (2, Request::Part, Fault::LostAnswer),
        (3, Request::Put, Fault::Status(503)),
        (4, Request::Complete, Fault::Status(500)),
        (5, Request::Complete, Fault::ErrorWithin200),
        (6, Request::Create, Fault::Status(500)),
        (7, Request::Part, Fault::NotFound),
        (8, Request::Complete, Fault::NoSuch("NoSuchBucket")),
    ] {
        let bytes = content(seed, PART + 100_000);
        let id = start(store).await;
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(bytes.slice(..60_000)).await.unwrap();
        assert_eq!(writer.record().await.unwrap(), 60_000);

        objects.fail(request, fault, FOR_GOOD);
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        let mut failed = writer.write(bytes.slice(60_000..)).await;
        if failed.is_ok() {
            failed = match request {
                Request::Complete => {
                    let digest = Digest::sha256(&bytes);
                    writer.commit(&digest, &actor()).await.map(drop)
                }
                _ => writer.record().await.map(drop),
            };
        } else {
            let _ = writer.record().await;
        }
        assert!(
            matches!(failed, Err(Error::Unavailable { .. })),
            "{request:?} {fault:?}: {failed:?}"
        );
        objects.heal();

        let offset = store.upload_offset(&repository, &id).await.unwrap();
        assert_eq!(offset, 60_000, "{request:?} {fault:?}");
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(bytes.slice(60_000..)).await.unwrap();
        let digest = Digest::sha256(&bytes);
        writer.commit(&digest, &actor()).await.unwrap();
        assert!(read_blob(store, &repository, &digest).await.unwrap() == bytes);
    }
    ends_clean(objects, store, 8).await;
}

/// Complete was carried out, but every answer was lost and the client was told 503: its retry finds the object.
#[tokio::test]
async fn a_commit_of_unknown_outcome_is_found_by_the_retry() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    let bytes = content(1, PART + 100_000);
    let digest = Digest::sha256(&bytes);
    let id = start(store).await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(bytes.clone()).await.unwrap();
    assert_eq!(writer.record().await.unwrap(), bytes.len() as u64);
    objects.fail(Request::Complete, Fault::LostAnswer, 1);
    objects.fail(Request::Complete, Fault::Status(500), FOR_GOOD);
    let writer = store.claim_upload(&repository, &id).await.unwrap();
    let failed = writer.commit(&digest, &actor()).await;
    assert!(
        matches!(failed, Err(Error::Unavailable { .. })),
        "{failed:?}"
    );
    objects.heal();
    let writer = store.claim_upload(&repository, &id).await.unwrap();
    assert_eq!(writer.offset(), bytes.len() as u64);
    writer.commit(&digest, &actor()).await.unwrap();
    assert!(read_blob(store, &repository, &digest).await.unwrap() == bytes);
    ends_clean(objects, store, 1).await;
}

#[tokio::test]
async fn a_part_that_somebody_wrote_over_never_becomes_a_blob() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    let bytes = content(1, PART + 100_000);
    let id = start(store).await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(bytes.clone()).await.unwrap();
    writer.record().await.unwrap();
    objects.overwrite_part(1, content(2, PART));
    let digest = Digest::sha256(&bytes);
    let writer = store.claim_upload(&repository, &id).await.unwrap();
    let refused = writer.commit(&digest, &actor()).await;
    assert!(matches!(refused, Err(Error::UploadUnknown)), "{refused:?}");
    assert!(read_blob(store, &repository, &digest).await.is_none());
    ends_clean(objects, store, 0).await;
}

#[tokio::test]
async fn a_tail_that_came_back_changed_is_not_gone_on_with() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    let id = start(store).await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(1, 100_000)).await.unwrap();
    writer.record().await.unwrap();
    objects.fail(Request::Get, Fault::Flipped, 1);
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    let failed = writer.write(content(2, 10)).await;
    assert!(matches!(failed, Err(Error::Damaged { .. })), "{failed:?}");
    let _ = writer.record().await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(2, 10)).await.unwrap();
    let whole: Bytes = [content(1, 100_000), content(2, 10)].concat().into();
    let digest = Digest::sha256(&whole);
    writer.commit(&digest, &actor()).await.unwrap();
    assert_eq!(read_blob(store, &repository, &digest).await.unwrap(), whole);
    ends_clean(objects, store, 1).await;
}

#[tokio::test]
async fn a_read_that_breaks_off_goes_on_and_a_short_object_is_never_whole() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    let bytes = content(1, 3_000_000);
    push(store, &bytes).await.unwrap();
    let digest = Digest::sha256(&bytes);
    let blob = store
        .open_blob(&repository, &digest)
        .await
        .unwrap()
        .unwrap();

    objects.fail(Request::Get, Fault::Short(1_000_000), 1);
    objects.fail(Request::Get, Fault::Short(0), 1);
    objects.fail(Request::Get, Fault::Status(500), 1);
    assert!(blob.read(0..u64::MAX).await.unwrap() == bytes);
    assert_eq!(objects.heal(), 0);
    let before = objects.count(Request::Get);
    assert!(blob.read(1_000..2_000_000).await.unwrap() == bytes[1_000..2_000_000]);
    assert_eq!(
        objects.count(Request::Get),
        before + 1,
        "one GET for one range"
    );

    for fault in [
        Fault::WrongLength,
        Fault::Short(10),
        Fault::Status(500),
        Fault::LostAnswer,
        Fault::NotFound,
        Fault::NoSuch("NoSuchBucket"),
    ] {
        objects.fail(Request::Get, fault, FOR_GOOD);
        let failed = blob.read(0..u64::MAX).await;
        assert!(
            matches!(failed, Err(Error::Unavailable { .. })),
            "{fault:?}: {failed:?}"
        );
        objects.heal();
    }
    objects.fail(Request::Get, Fault::NoSuch("NoSuchKey"), 1);
    let missing = blob.read(0..u64::MAX).await;
    assert!(matches!(missing, Err(Error::Damaged { .. })), "{missing:?}");
    assert!(blob.read(0..u64::MAX).await.unwrap() == bytes);
    ends_clean(objects, store, 1).await;
}

/// Time passes by itself here: what is never answered is given up, tried again and at last said.
#[tokio::test]
async fn silence_is_a_failure() {
    let world = world().await;
    let (store, objects) = (&world.store, &world.objects);
    let bytes = content(1, 50_000);
    let before = objects.count(Request::Put);
    objects.fail(Request::Put, Fault::Silence, 1);
    let pushing = push(store, &bytes);
    tokio::pin!(pushing);
    // Until the request is on its way.
    while objects.count(Request::Put) == before {
        tokio::select! {
            result = &mut pushing => panic!("{result:?}"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(20)).await;
    tokio::time::resume();
    assert_eq!(pushing.await.unwrap(), 50_000);
    assert_eq!(objects.count(Request::Put) - before, 2);
    ends_clean(objects, store, 1).await;
}

#[tokio::test]
async fn the_outbox_keeps_what_could_not_be_deleted() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    for request in [Request::Delete, Request::Abort] {
        let id = start(store).await;
        let mut writer = store.claim_upload(&repository, &id).await.unwrap();
        writer.write(content(1, PART + 10)).await.unwrap();
        writer.record().await.unwrap();
        store.cancel_upload(&repository, &id).await.unwrap();
        objects.fail(request, Fault::Status(500), FOR_GOOD);
        store.advance_clock(Duration::from_mins(10));
        store.maintain_once().await.unwrap();
        assert!(store.statistics().await.unwrap().pending_deletions > 0);
        objects.heal();
        ends_clean(objects, store, 0).await;
        assert_eq!(store.statistics().await.unwrap().pending_deletions, 0);
    }
}

/// Neither a wrong bucket nor somebody else's page says that objects or uploads are gone.
#[tokio::test]
async fn the_outbox_believes_no_404_but_that_of_the_object() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    for fault in [
        Fault::NotFound,
        Fault::NoSuch("NoSuchBucket"),
        Fault::NoSuch("NoSuchKey"),
    ] {
        for length in [50_000, PART + 10] {
            let id = start(store).await;
            let mut writer = store.claim_upload(&repository, &id).await.unwrap();
            writer.write(content(1, length)).await.unwrap();
            writer.record().await.unwrap();
            store.cancel_upload(&repository, &id).await.unwrap();
        }
        objects.fail(Request::Delete, fault, FOR_GOOD);
        if matches!(fault, Fault::NoSuch("NoSuchKey")) {
            objects.fail(Request::DeleteOne, Fault::Status(500), FOR_GOOD);
        } else {
            objects.fail(Request::Abort, fault, FOR_GOOD);
            objects.fail(Request::DeleteOne, fault, FOR_GOOD);
        }
        let before = objects.objects();
        assert!(before > 0);
        store.advance_clock(Duration::from_mins(10));
        store.maintain_once().await.unwrap();
        assert_eq!(objects.objects(), before, "{fault:?}");
        let waiting = store.statistics().await.unwrap().pending_deletions;
        assert!(waiting >= before as u64, "{fault:?}: {waiting}");
        objects.heal();
        store.advance_clock(Duration::from_hours(1));
        ends_clean(objects, store, 0).await;
        assert_eq!(store.statistics().await.unwrap().pending_deletions, 0);
    }
}

/// A store that lacks the request for many may say so with 404.
#[tokio::test]
async fn what_cannot_be_deleted_together_is_deleted_one_by_one() {
    let world = world().await;
    let (store, objects, repository) = (&world.store, &world.objects, name("a/b"));
    let id = start(store).await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(1, 50_000)).await.unwrap();
    writer.record().await.unwrap();
    store.cancel_upload(&repository, &id).await.unwrap();
    objects.fail(Request::Delete, Fault::NotFound, 1);
    objects.fail(Request::DeleteOne, Fault::NoSuch("NoSuchKey"), 1);
    store.advance_clock(Duration::from_mins(10));
    store.maintain_once().await.unwrap();
    assert_eq!(store.statistics().await.unwrap().pending_deletions, 0);
}

#[tokio::test]
async fn damage_is_found() {
    let world = world().await;
    let (store, objects) = (&world.store, &world.objects);
    push(store, &content(1, 50_000)).await.unwrap();
    assert_sound(store).await;
    objects.damage();
    let report = store.verify_open().await.unwrap();
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
}

/// Many uploads and memory for hardly one of them: all come to their end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_that_find_no_memory_wait_without_holding_any() {
    let world = world().await;
    let (store, objects) = (&world.store, &world.objects);
    let held = store
        .hold_memory((256 << 20) - (u32::try_from(PART).unwrap() + (2 << 20)))
        .await;
    let pushes: Vec<_> = (0..6)
        .map(|seed| {
            let store = store.clone();
            tokio::spawn(async move {
                let (bytes, repository) = (content(seed, PART + 300_000), name("a/b"));
                let digest = Digest::sha256(&bytes);
                let mut writer = if seed % 2 == 0 {
                    store
                        .put_blob(&repository, &digest, &actor())
                        .await
                        .unwrap()
                } else {
                    let id = start(&store).await;
                    store.claim_upload(&repository, &id).await.unwrap()
                };
                for start in (0..bytes.len()).step_by(700_000) {
                    let end = (start + 700_000).min(bytes.len());
                    writer.write(bytes.slice(start..end)).await.unwrap();
                    tokio::task::yield_now().await;
                }
                writer.commit(&digest, &actor()).await.unwrap();
                assert!(read_blob(&store, &repository, &digest).await.unwrap() == bytes);
            })
        })
        .collect();
    for push in pushes {
        push.await.unwrap();
    }
    drop(held);
    assert!(objects.count(Request::Put) > 0, "nobody had to wait");
    ends_clean(objects, store, 6).await;
}
