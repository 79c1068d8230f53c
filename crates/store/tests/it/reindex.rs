//! A lost database is made anew from objects and exports.

use std::path::Path;

use oci::reference::TagOrDigest;
use oci::{Descriptor, Manifest};
use store::{
    AdoptOptions, DatabaseLocation, Error, Expected, Location, ObjectLocation, Options, Store,
    adopt, reindex, reindex_at, verify_audit, verify_store,
};

use crate::engine::{
    Engine, actor, assert_sound, by_tag, content, described, image, index, name, push_blob,
    push_image, put, read_blob, tag,
};

/// What a store holds, as its users see it.
async fn seen(store: &Store) -> Vec<String> {
    let mut seen = Vec::new();
    for repository in store.repositories(None, 1000).await.unwrap() {
        let tags = store.tags(&repository, None, 1000).await.unwrap();
        for text in tags {
            let state = store.tag(&repository, &tag(&text)).await.unwrap().unwrap();
            let found = store.manifest(&repository, &by_tag(&text)).await.unwrap();
            let manifest = found.unwrap();
            assert_eq!(manifest.digest, state.digest);
            assert!(manifest.digest.matches(&manifest.body));
            seen.push(format!(
                "{repository}:{text} {} {} {:?} {}",
                state.digest, state.generation, state.updated_at, manifest.media_type
            ));
            let mut open = vec![manifest];
            while let Some(manifest) = open.pop() {
                let view = Manifest::parse(&manifest.body, &manifest.media_type).unwrap();
                for child in view.children() {
                    let digest = TagOrDigest::Digest(child.digest.clone());
                    open.extend(store.manifest(&repository, &digest).await.unwrap());
                }
                for blob in view.blobs() {
                    let bytes = read_blob(store, &repository, &blob.digest).await;
                    let sound = bytes.is_some_and(|bytes| blob.digest.matches(&bytes));
                    seen.push(format!("{repository} blob {} {sound}", blob.digest));
                }
                let referrers = store
                    .referrers(&repository, &manifest.digest, None, None, 100)
                    .await
                    .unwrap();
                for referrer in referrers {
                    let text = serde_json::to_string(&referrer.descriptor).unwrap();
                    seen.push(format!("{repository} referrer {text}"));
                }
            }
        }
    }
    seen.sort();
    seen
}

/// Tags that move and go, an index, evidence, a mount: some before the first export, some after.
async fn fill(store: &Store) {
    let (a, b) = (name("team/a"), name("team/b"));
    let first = push_image(store, &a, 1, &["v1", "latest"]).await;
    let second = push_image(store, &a, 2, &["v2", "latest"]).await;
    put(
        store,
        &a,
        &index(&[described(&first), described(&second)]),
        &["all"],
    )
    .await
    .unwrap();
    store.export().await.unwrap();

    push_image(store, &a, 3, &["v3", "latest"]).await;
    store
        .delete_tag(&a, &tag("v1"), Expected::Any, &actor())
        .await
        .unwrap();
    let config = push_blob(store, &b, &content(50, 100)).await;
    assert!(
        store
            .mount_blob(
                &b,
                &first.layers.as_ref().unwrap()[1].digest,
                std::slice::from_ref(&a),
                &actor()
            )
            .await
            .unwrap()
    );
    let mounted = image(&config, &[first.layers.as_ref().unwrap()[1].clone()]);
    put(store, &b, &mounted, &["mounted"]).await.unwrap();
    // A referrer by its subject, and one by the tag of older clients.
    let note = Manifest {
        subject: Some(described(&mounted)),
        artifact_type: Some("application/x-note".to_owned()),
        ..image(&config, &[])
    };
    put(store, &b, &note, &["note"]).await.unwrap();
    let old = format!("sha256-{}.sig", described(&mounted).digest.hex());
    let signature = push_blob(store, &b, &content(51, 333)).await;
    put(store, &b, &image(&config, &[signature]), &[&old])
        .await
        .unwrap();
    // Gone again, with what it held.
    let gone = push_image(store, &b, 9, &["gone"]).await;
    store
        .delete_manifest(&b, &described(&gone).digest, &actor())
        .await
        .unwrap();
    store.export().await.unwrap();
    // Nothing changed, nothing is written.
    store.export().await.unwrap();
}

fn lose(data: &Path) {
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(data.join(format!("meta.db{end}")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_was_exported_is_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    fill(&store).await;
    let before = seen(&store).await;
    assert!(before.len() > 15, "{before:#?}");
    let epoch = store.epoch().to_owned();
    store.close().await.unwrap();
    lose(&data);
    assert!(matches!(
        Store::open(&data, Options::default()).await,
        Err(Error::Damaged { .. })
    ));

    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!((report.repositories, report.tags), (2, 7));
    let checked = verify_store(&data).await.unwrap();
    assert_eq!(checked.problems, Vec::<String>::new());
    let store = Store::open(&data, Options::default()).await.unwrap();
    assert_ne!(store.epoch(), epoch);
    assert_eq!(seen(&store).await, before);
    let bounds = store.event_bounds().await.unwrap();
    assert_eq!(bounds.pruned, bounds.newest);
    // The generation of a deleted tag goes on.
    push_image(&store, &name("team/a"), 1, &["v1"]).await;
    let state = store.tag(&name("team/a"), &tag("v1")).await.unwrap();
    assert_eq!(state.unwrap().generation, 3);
    // The collector agrees that all of it is held.
    store.advance_clock(std::time::Duration::from_hours(100));
    store.maintain_once().await.unwrap();
    let after = seen(&store).await;
    assert!(before.iter().all(|line| after.contains(line)));
    assert_sound(&store).await;
    // And its own exports go on: lose it once more.
    store.export().await.unwrap();
    let before = seen(&store).await;
    store.close().await.unwrap();
    verify_audit(&data).await.unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let store = Store::open(&data, Options::default()).await.unwrap();
    assert_eq!(seen(&store).await, before);
    store.close().await.unwrap();
    // A database that is there is not replaced.
    let refused = reindex(&data, &Options::default(), |_| {}).await;
    assert!(
        matches!(refused, Err(Error::Unusable { .. })),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_that_are_switched_off_are_gone_and_come_back_whole() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let parts = || std::fs::read_dir(data.join("x")).map_or(0, Iterator::count);
    let off = Options {
        exports: false,
        ..Options::default()
    };
    let store = Store::open(&data, Options::default()).await.unwrap();
    fill(&store).await;
    let before = seen(&store).await;
    store.close().await.unwrap();
    assert!(parts() >= 2);

    let store = Store::open(&data, off.clone()).await.unwrap();
    store.export().await.unwrap();
    assert_eq!(parts(), 0);
    push_image(&store, &name("team/a"), 4, &["v4"]).await;
    store.export().await.unwrap();
    assert_eq!(parts(), 0);
    store.close().await.unwrap();

    // On again: a whole set, not what changed since.
    let store = Store::open(&data, Options::default()).await.unwrap();
    store.export().await.unwrap();
    let grown = seen(&store).await;
    assert!(grown.len() > before.len());
    store.close().await.unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let store = Store::open(&data, off.clone()).await.unwrap();
    assert_eq!(seen(&store).await, grown);

    // What is lost without them: all but the bytes of blobs.
    store.export().await.unwrap();
    store.close().await.unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert!(
        matches!(&report.problems[..], [problem] if problem.contains("no exports")),
        "{report:?}"
    );
    assert_eq!((report.repositories, report.tags), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_lost_is_told_and_the_rest_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    let repository = name("a/b");
    let whole = push_image(&store, &repository, 1, &["whole"]).await;
    store.export().await.unwrap();
    let short = push_image(&store, &repository, 2, &["short"]).await;
    store.export().await.unwrap();
    let lost = push_image(&store, &repository, 3, &["lost"]).await;
    store.export().await.unwrap();
    store.close().await.unwrap();
    lose(&data);
    // The object of one layer, and the part that tells of the third image.
    let layer = &short.layers.as_ref().unwrap()[1].digest;
    let mut open = vec![data.join("o")];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(
                std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if layer.matches(&std::fs::read(&path).unwrap()) {
            std::fs::remove_file(path).unwrap();
        }
    }
    let mut parts: Vec<_> = std::fs::read_dir(data.join("x"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    parts.sort();
    let part = parts.pop().unwrap();
    let mut bytes = std::fs::read(&part).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&part, bytes).unwrap();

    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems.len(), 2, "{:#?}", report.problems);
    assert!(report.problems.iter().any(|text| text.contains("hash")));
    assert!(
        report
            .problems
            .iter()
            .any(|text| text.contains(&layer.to_string()))
    );
    assert!(verify_store(&data).await.unwrap().problems.is_empty());
    let store = Store::open(&data, Options::default()).await.unwrap();
    assert_eq!(
        store.tags(&repository, None, 9).await.unwrap(),
        ["short", "whole"]
    );
    for blob in whole.blobs() {
        assert!(read_blob(&store, &repository, &blob.digest).await.is_some());
    }
    assert!(read_blob(&store, &repository, layer).await.is_none());
    // A push of what is missing fills the edge, and the lost image can be pushed as ever.
    push_blob(&store, &repository, &content(2 + 2_000_000, 40_000)).await;
    assert!(read_blob(&store, &repository, layer).await.is_some());
    push_image(&store, &repository, 3, &["lost"]).await;
    assert!(lost.layers.is_some());
    assert_sound(&store).await;
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_lines_of_a_torn_part_are_used() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    fill(&store).await;
    store.close().await.unwrap();
    let parts = || {
        let mut parts: Vec<_> = std::fs::read_dir(data.join("x"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        parts.sort();
        parts
    };
    // Only the hash at their ends is torn: nothing is lost, but it is told.
    let mut torn = 0;
    for part in parts() {
        let bytes = std::fs::read(&part).unwrap();
        std::fs::write(&part, &bytes[..bytes.len() - 5]).unwrap();
        torn += 1;
    }
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems.len(), torn, "{:#?}", report.problems);
    assert!(report.problems[0].contains("lines are used"));
    assert_eq!((report.repositories, report.tags), (2, 7));
    assert!(verify_store(&data).await.unwrap().problems.is_empty());

    // More of the last one is torn: what stands before the tear is found.
    let part = parts().pop().unwrap();
    let bytes = std::fs::read(&part).unwrap();
    std::fs::write(&part, &bytes[..bytes.len() / 2]).unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert!(report.tags > 0 && report.tags < 7, "{report:?}");
    assert!(verify_store(&data).await.unwrap().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_set_replaces_the_old_one_and_events_that_were_forgotten_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    let repository = name("a/b");
    push_image(&store, &repository, 1, &["v1"]).await;
    store.export().await.unwrap();
    push_image(&store, &repository, 2, &["v2"]).await;
    // The events that tell of the second image are pruned before they are read.
    store.advance_clock(std::time::Duration::from_hours(24 * 30));
    push_blob(&store, &repository, &content(7, 7)).await;
    put(
        &store,
        &repository,
        &image(&Descriptor::of("x", &content(7, 7)), &[]),
        &["v3"],
    )
    .await
    .unwrap();
    store.maintain_once().await.unwrap();
    store.export().await.unwrap();
    let sets: Vec<_> = std::fs::read_dir(data.join("x"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        sets.iter().all(|name| name.starts_with("0000000002-")),
        "{sets:?}"
    );
    let before = seen(&store).await;
    store.close().await.unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let store = Store::open(&data, Options::default()).await.unwrap();
    assert_eq!(seen(&store).await, before);
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_exports_the_bytes_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    let repository = name("a/b");
    let blob = push_blob(&store, &repository, &content(1, 50_000)).await;
    store.close().await.unwrap();
    lose(&data);
    let report = reindex(&data, &Options::default(), |_| {}).await.unwrap();
    assert_eq!((report.objects, report.problems.len()), (1, 1));
    assert!(verify_store(&data).await.unwrap().problems.is_empty());
    let store = Store::open(&data, Options::default()).await.unwrap();
    // Nobody holds it: a push must send it, and finds that it is there.
    assert!(
        store
            .stat_blob(&repository, &blob.digest, true)
            .await
            .unwrap()
            .is_none()
    );
    push_blob(&store, &repository, &content(1, 50_000)).await;
    assert_sound(&store).await;
    store.close().await.unwrap();
}

/// Exports, adopts and reindexes a store of either engine, for the contract. The store is closed.
pub(crate) async fn contract(engine: &Engine) {
    let store = &engine.store;
    store.export().await.unwrap();
    fill(store).await;
    let before = seen(store).await;
    // Events may get their numbers a moment after the push that they tell of.
    let mut newest = -1;
    while newest != store.event_bounds().await.unwrap().newest {
        newest = store.event_bounds().await.unwrap().newest;
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    store.export().await.unwrap();
    assert_sound(store).await;
    store.clone().close().await.unwrap();
    let data = engine.directory.path().join("data");
    let mut location = Location::embedded(&data);
    if !engine.url.is_empty() {
        location.database = DatabaseLocation::Postgres(engine.url.clone());
    }
    let how = AdoptOptions {
        force: true,
        discard_unknown: true,
    };
    // An object that no row knows.
    let stray = data.join("o/00/00").join("0".repeat(32));
    std::fs::create_dir_all(stray.parent().unwrap()).unwrap();
    std::fs::write(&stray, b"stray").unwrap();
    let adopted = adopt(&location, Options::default(), how).await.unwrap();
    assert!(adopted.leases > 0);
    assert_eq!(adopted.unknown, 1);
    std::fs::remove_file(stray).unwrap();
    let location = if engine.url.is_empty() {
        lose(&data);
        Location::embedded(&data)
    } else {
        let (client, connection) = tokio_postgres::connect(&engine.url, tokio_postgres::NoTls)
            .await
            .unwrap();
        tokio::spawn(connection);
        client.batch_execute("CREATE DATABASE anew").await.unwrap();
        Location {
            database: DatabaseLocation::Postgres(engine.url.replace("=longshore", "=anew")),
            objects: ObjectLocation::Directory(data.clone()),
        }
    };
    let report = reindex_at(&location, &Options::default(), true, |_| {})
        .await
        .unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let again = match &location.database {
        DatabaseLocation::Sqlite(_) => Store::open(&data, Options::default()).await,
        DatabaseLocation::Postgres(url) => {
            Store::open_on_postgres(&data, url, Options::default()).await
        }
    }
    .unwrap();
    let after = seen(&again).await;
    let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    assert!(lost.is_empty(), "{lost:#?}");
    assert_sound(&again).await;
    again.close().await.unwrap();
}

/// Exports lie in the bucket, and the objects are read from there.
pub(crate) async fn a_lost_database_over_a_bucket(location: &Location, data: &Path) {
    let store = Store::open_at(location, Options::default()).await.unwrap();
    fill(&store).await;
    let before = seen(&store).await;
    store.close().await.unwrap();
    // The disk of the database is gone as a whole.
    std::fs::remove_dir_all(data).unwrap();
    // The bucket belongs to the lost database until it is told otherwise.
    let refused = reindex_at(location, &Options::default(), false, |_| {}).await;
    assert!(
        matches!(refused, Err(Error::Unusable { .. })),
        "{refused:?}"
    );
    let report = reindex_at(location, &Options::default(), true, |_| {})
        .await
        .unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let store = Store::open_at(location, Options::default()).await.unwrap();
    assert_eq!(seen(&store).await, before);
    assert_sound(&store).await;
    store.close().await.unwrap();
}
