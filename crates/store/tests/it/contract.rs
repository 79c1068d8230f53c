//! What every engine must do. One test per engine runs all of it and then shows that no statement was left out.

mod tags;

use std::collections::BTreeSet;
use std::time::Duration;

use oci::{Algorithm, Descriptor, Digest};
use store::{AuditEntry, Error, EventKind, Expected, GcOptions, Options, Store, TagWrite};

use crate::collection;
use crate::engine::{
    Engine, actor, assert_sound, by_digest, by_tag, content, described, image, index, name,
    postgres, push_blob, push_image, push_in_pieces, put, put_of, read_blob, sqlite, tag, write_of,
};
use crate::object_store_faults::uploads_keep_the_contract;
use crate::postgres::Server;

use tags::{evidence_is_an_edge_of_its_subject, referrers_are_listed, tags_have_one_door};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_and_postgres_keep_the_contract_and_run_every_statement() {
    let options = || Options {
        allow_sparse: false,
        // What is collected when has its own part below.
        gc: GcOptions {
            enabled: false,
            ..GcOptions::default()
        },
        reports: crate::reports::limits(),
        ..Options::default()
    };
    for engine in [sqlite(options()).await, postgres(options()).await] {
        let store = &engine.store;
        blobs_come_and_go(store).await;
        blobs_are_mounted_with_leases(store).await;
        manifests_are_one_transaction(store).await;
        indexes_hold_their_children(store).await;
        tags_have_one_door(store).await;
        evidence_is_an_edge_of_its_subject(store).await;
        referrers_are_listed(store).await;
        events_are_numbered(store).await;
        usage_and_totals_add_up(store).await;
        sixteen_clients(store).await;
        crate::modes::read_only_by_command(store).await;
        crate::modes::no_write_comes_after_the_command(store).await;
        assert_sound(store).await;
        uploads_end(store).await;
        what_was_reported_is_kept(store).await;
        crate::reports::keep_the_contract(store).await;
        damage_is_healed(&engine).await;
        crate::scrub::damaged_objects_are_marked_and_healed(&engine).await;
        crate::scrub::what_cannot_be_read_is_not_judged(&engine).await;
        crate::scrub::damaged_rows_are_found(&engine).await;
        assert_sound(store).await;
        engine.store.clone().close().await.unwrap();
    }
    for engine in [
        sqlite(crate::retention::options()).await,
        postgres(crate::retention::options()).await,
    ] {
        let store = &engine.store;
        crate::retention::what_no_rule_keeps_is_removed_and_can_be_put_back(&engine).await;
        crate::retention::what_moved_after_the_plan_stays(&engine).await;
        crate::retention::many_tags_are_walked_in_pages(store).await;
        crate::retention::runs_come_by_the_clock(store).await;
        assert_sound(store).await;
        engine.store.clone().close().await.unwrap();
    }
    for engine in [
        sqlite(Options {
            allow_sparse: true,
            ..options()
        })
        .await,
        postgres(Options {
            allow_sparse: true,
            ..options()
        })
        .await,
    ] {
        sparse_edges_are_filled(&engine.store).await;
        assert_sound(&engine.store).await;
    }
    uploads_keep_the_contract(None).await;
    uploads_keep_the_contract(Some(&Server::start().await)).await;
    for engine in [
        sqlite(collection::options()).await,
        postgres(collection::options()).await,
    ] {
        collection::keeps_the_contract(&engine.store).await;
    }
    for engine in [sqlite(options()).await, postgres(options()).await] {
        crate::reindex::contract(&engine).await;
    }
    crate::identity::contract(None).await;
    crate::identity::contract(Some(&Server::start().await)).await;
    let left_out: Vec<_> = store::statement_coverage()
        .into_iter()
        .filter(|(_, sqlite, postgres)| !sqlite || !postgres)
        .collect();
    assert!(
        left_out.is_empty(),
        "not executed on both engines: {left_out:#?}"
    );
}

/// The newest event number once every event has one.
async fn newest(store: &Store) -> i64 {
    store.seal().await.unwrap();
    store.event_bounds().await.unwrap().newest
}

async fn blobs_come_and_go(store: &Store) {
    let repository = name("team/blobs");
    for (seed, length) in [
        (1, 0),
        (2, 1),
        (3, 16 * 1024),
        (4, 16 * 1024 + 1),
        (5, 3 << 20),
    ] {
        let bytes = content(seed, length);
        let single = push_blob(store, &repository, &bytes).await;
        let pieces = push_in_pieces(store, &repository, &bytes, 700_000).await;
        assert_eq!(single.digest, pieces.digest);
        let info = store
            .stat_blob(&repository, &single.digest, false)
            .await
            .unwrap();
        assert_eq!(info.unwrap().size, length as u64);
        assert_eq!(
            read_blob(store, &repository, &single.digest).await.unwrap(),
            bytes
        );
    }
    let digest = Digest::sha256(&content(5, 3 << 20));
    let other = name("team/other");
    assert!(store.open_blob(&other, &digest).await.unwrap().is_none());
    store
        .delete_blob(&repository, &digest, &actor())
        .await
        .unwrap();
    assert!(
        store
            .stat_blob(&repository, &digest, true)
            .await
            .unwrap()
            .is_none()
    );
    let again = store.delete_blob(&repository, &digest, &actor()).await;
    assert!(matches!(again, Err(Error::BlobUnknown(_))));
}

async fn blobs_are_mounted_with_leases(store: &Store) {
    let (from, into) = (name("team/from"), name("away/into"));
    let blob = push_blob(store, &from, &content(20, 100)).await;
    let mounted = store
        .mount_blob(&into, &blob.digest, &[name("no/such")], &actor())
        .await;
    assert!(!mounted.unwrap());
    let sources = [name("no/such"), from.clone()];
    assert!(
        store
            .mount_blob(&into, &blob.digest, &sources, &actor())
            .await
            .unwrap()
    );
    assert_eq!(
        read_blob(store, &into, &blob.digest).await.unwrap(),
        content(20, 100)
    );
    let holders = store
        .repositories_with_blob(&blob.digest, 10)
        .await
        .unwrap();
    assert_eq!(holders, [into, from]);
}

async fn manifests_are_one_transaction(store: &Store) {
    let repository = name("team/app");
    let config = push_blob(store, &repository, &content(30, 50)).await;
    let missing = Descriptor::of("application/octet-stream", b"nobody pushed this");
    let before = newest(store).await;
    let view = image(&config, std::slice::from_ref(&missing));
    match put(store, &repository, &view, &["v1"]).await {
        Err(Error::MissingReferences(digests)) => {
            assert_eq!(digests, std::slice::from_ref(&missing.digest));
        }
        other => panic!("{other:?}"),
    }
    assert!(store.tag(&repository, &tag("v1")).await.unwrap().is_none());
    assert!(
        store
            .manifest(&repository, &by_digest(&view))
            .await
            .unwrap()
            .is_none()
    );
    assert_eq!(newest(store).await, before);

    let foreign = Descriptor {
        urls: vec!["https://example.com/l".to_owned()],
        ..missing
    };
    let view = image(&config, &[foreign]);
    let outcome = put(store, &repository, &view, &["v1", "latest"])
        .await
        .unwrap();
    assert!(outcome.created);
    assert_eq!(newest(store).await, before + 3);
    let stored = store
        .manifest(&repository, &by_tag("v1"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stored.body, view.to_bytes());
    assert_eq!(stored.media_type, view.media_type);
    assert_eq!(
        store
            .manifest(&repository, &by_digest(&view))
            .await
            .unwrap()
            .unwrap()
            .body,
        stored.body
    );
    let again = put(store, &repository, &view, &["v1", "latest"])
        .await
        .unwrap();
    assert!(!again.created && again.event == 0);

    let in_use = store
        .delete_blob(&repository, &config.digest, &actor())
        .await;
    assert!(matches!(in_use, Err(Error::BlobInUse(_))));
    assert_eq!(
        store.tags(&repository, None, 10).await.unwrap(),
        ["latest", "v1"]
    );
    assert_eq!(
        store.tags(&repository, Some("latest"), 10).await.unwrap(),
        ["v1"]
    );
    let unknown = store.tags(&name("no/such"), None, 10).await;
    assert!(matches!(unknown, Err(Error::RepositoryUnknown(_))));

    let digest = described(&view).digest;
    store
        .delete_manifest(&repository, &digest, &actor())
        .await
        .unwrap();
    assert!(
        store
            .manifest(&repository, &by_tag("v1"))
            .await
            .unwrap()
            .is_none()
    );
    assert!(store.tags(&repository, None, 10).await.unwrap().is_empty());
    let gone = store.delete_manifest(&repository, &digest, &actor()).await;
    assert!(matches!(gone, Err(Error::ManifestUnknown(_))));
    store
        .delete_blob(&repository, &config.digest, &actor())
        .await
        .unwrap();
}

async fn indexes_hold_their_children(store: &Store) {
    let repository = name("team/index");
    let child = push_image(store, &repository, 40, &[]).await;
    let parent = index(&[described(&child)]);
    put(store, &repository, &parent, &["multi"]).await.unwrap();
    let child_digest = described(&child).digest;
    let in_use = store
        .delete_manifest(&repository, &child_digest, &actor())
        .await;
    assert!(matches!(in_use, Err(Error::ManifestInUse(_))));
    store
        .delete_manifest(&repository, &described(&parent).digest, &actor())
        .await
        .unwrap();
    store
        .delete_manifest(&repository, &child_digest, &actor())
        .await
        .unwrap();
    let missing = put(store, &repository, &parent, &[]).await;
    assert!(matches!(missing, Err(Error::MissingReferences(_))));

    // An index may name content that is no manifest.
    let blob = push_blob(store, &repository, &content(41, 64)).await;
    let mixed = index(std::slice::from_ref(&blob));
    put(store, &repository, &mixed, &["mixed"]).await.unwrap();
    let in_use = store.delete_blob(&repository, &blob.digest, &actor()).await;
    assert!(matches!(in_use, Err(Error::BlobInUse(_))));
}

async fn events_are_numbered(store: &Store) {
    let repository = name("team/events");
    let mut signal = store.event_signal();
    let before = newest(store).await;
    assert_eq!(*signal.borrow_and_update(), before);
    let view = push_image(store, &repository, 80, &["a"]).await;
    signal.changed().await.unwrap();
    assert_eq!(*signal.borrow_and_update(), before + 2);
    store
        .delete_tag(&repository, &tag("a"), Expected::Any, &actor())
        .await
        .unwrap();
    let digest = described(&view).digest;
    store
        .delete_manifest(&repository, &digest, &actor())
        .await
        .unwrap();
    store.seal().await.unwrap();
    let events = store.events_after(before, 100).await.unwrap();
    let kinds: Vec<_> = events
        .iter()
        .map(|event| (event.number - before, event.kind))
        .collect();
    assert_eq!(
        kinds,
        [
            (1, EventKind::ManifestPushed),
            (2, EventKind::TagUpdated),
            (3, EventKind::TagDeleted),
            (4, EventKind::ManifestDeleted)
        ]
    );
    assert!(
        events
            .iter()
            .all(|event| event.digest == digest && event.actor == "user:alice")
    );
    assert_eq!(events[1].tag, Some(tag("a")));
    assert_eq!(store.events_after(before, 1).await.unwrap().len(), 1);
    store.ping().await.unwrap();
    let keys = store.token_keys().await.unwrap();
    assert_eq!(keys.len(), 1);
    assert_eq!(store.token_keys().await.unwrap()[0].secret, keys[0].secret);
    let entry = AuditEntry {
        actor: actor(),
        action: "login".to_owned(),
        target: "\"quoted\" \u{1} text".to_owned(),
        outcome: "denied".to_owned(),
    };
    store.audit(entry).await.unwrap();
}

async fn usage_and_totals_add_up(store: &Store) {
    let repository = name("quota/one");
    let bytes = content(90, 1000);
    let blob = push_blob(store, &repository, &bytes).await;
    push_blob(store, &repository, &bytes).await;
    assert_eq!(store.namespace_usage("quota").await.unwrap(), (1000, 1));
    store.maintain_once().await.unwrap();
    assert_eq!(store.namespace_usage("quota").await.unwrap(), (1000, 1));
    push_blob(store, &name("quota/two"), &bytes).await;
    assert_eq!(store.namespace_usage("quota").await.unwrap(), (2000, 2));
    store
        .delete_blob(&repository, &blob.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    assert_eq!(store.namespace_usage("quota").await.unwrap(), (1000, 1));
    assert_eq!(store.namespace_usage("nobody").await.unwrap(), (0, 0));

    let statistics = store.statistics().await.unwrap();
    assert!(statistics.blobs > 5 && statistics.blob_bytes > 1000);
    assert!(statistics.manifests > 3 && statistics.tags > 2 && statistics.repositories > 5);
    let repositories = store.repositories(Some("quota"), 100).await.unwrap();
    assert!(
        !repositories.contains(&repository),
        "it holds nothing any more"
    );
    assert!(repositories.contains(&name("quota/two")));
    assert!(repositories.is_sorted());
}

/// Sixteen clients push distinct tags of one repository, the same blobs, and race for one tag.
async fn sixteen_clients(store: &Store) {
    const CLIENTS: u64 = 16;
    const ROUNDS: u64 = 6;
    let repository = name("team/busy");
    let base = newest(store).await;
    let start = push_image(store, &repository, 100, &["start"]).await;
    let start_digest = described(&start).digest;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (store, repository) = (store.clone(), repository.clone());
            let start_digest = start_digest.clone();
            tokio::spawn(async move {
                let mut won = 0;
                for round in 0..ROUNDS {
                    let own =
                        push_blob(&store, &repository, &content(client << 32 | round, 500)).await;
                    let shared =
                        push_blob(&store, &repository, &content(7_000_000 + round, 30_000)).await;
                    let view = image(&own, &[shared]);
                    let text = format!("client-{client}-{round}");
                    put(&store, &repository, &view, &[&text, "moving"])
                        .await
                        .unwrap();
                    store
                        .delete_tag(&repository, &tag(&text), Expected::Any, &actor())
                        .await
                        .unwrap();
                    put(&store, &repository, &view, &[&text]).await.unwrap();
                }
                let view = image(
                    &push_blob(&store, &repository, &content(client, 77)).await,
                    &[],
                );
                let mut race = put_of(&repository, &view, &[]);
                race.tags = vec![TagWrite {
                    expected: Expected::Digest(vec![start_digest]),
                    ..write_of("start")
                }];
                match store.put_manifest(race).await {
                    Ok(_) => won += 1,
                    Err(Error::Precondition { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
                won
            })
        })
        .collect();
    let mut winners = 0;
    for client in clients {
        winners += client.await.unwrap();
    }
    assert_eq!(winners, 1);
    let tags = store.tags(&repository, None, 1000).await.unwrap();
    assert_eq!(tags.len() as u64, CLIENTS * ROUNDS + 2);
    let moves = store
        .tag_history(&repository, &tag("moving"), None, 1000)
        .await
        .unwrap();
    let generations: Vec<_> = moves.iter().map(|m| m.generation).rev().collect();
    assert_eq!(
        generations,
        (1..=generations.len() as i64).collect::<Vec<_>>()
    );
    // Every number exactly once, in order.
    let newest = newest(store).await;
    let events = store.events_after(base, 10_000).await.unwrap();
    let numbers: Vec<_> = events.iter().map(|event| event.number).collect();
    assert_eq!(numbers, (base + 1..=newest).collect::<Vec<_>>());
}

async fn uploads_end(store: &Store) {
    let repository = name("team/uploads");
    let start = || async {
        store
            .start_upload(&repository, Algorithm::Sha256, &actor())
            .await
            .unwrap()
    };
    // Cancelled, with an object.
    let id = start().await;
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(110, 100_000)).await.unwrap();
    let busy = store.cancel_upload(&repository, &id).await;
    assert!(matches!(busy, Err(Error::UploadBusy { offset: 0 })));
    writer.record().await.unwrap();
    assert_eq!(
        store.upload_offset(&repository, &id).await.unwrap(),
        100_000
    );
    let elsewhere = store.upload_offset(&name("team/other"), &id).await;
    assert!(matches!(elsewhere, Err(Error::UploadUnknown)));
    store.cancel_upload(&repository, &id).await.unwrap();
    let gone = store.upload_offset(&repository, &id).await;
    assert!(matches!(gone, Err(Error::UploadUnknown)));
    // Expired, and one that was written to meanwhile.
    let (old, fresh) = (start().await, start().await);
    store.advance_clock(Duration::from_hours(20));
    let mut writer = store.claim_upload(&repository, &fresh).await.unwrap();
    writer.write(content(111, 10)).await.unwrap();
    writer.record().await.unwrap();
    store.advance_clock(Duration::from_hours(5));
    store.maintain_once().await.unwrap();
    assert!(matches!(
        store.upload_offset(&repository, &old).await,
        Err(Error::UploadUnknown)
    ));
    assert_eq!(store.upload_offset(&repository, &fresh).await.unwrap(), 10);
    let statistics = store.statistics().await.unwrap();
    assert_eq!((statistics.uploads, statistics.pending_deletions), (1, 0));
    store.cancel_upload(&repository, &fresh).await.unwrap();
    // Events that are too old are forgotten, and the bounds say so.
    let newest = newest(store).await;
    store.advance_clock(Duration::from_hours(24 * 8));
    store.maintain_once().await.unwrap();
    let bounds = store.event_bounds().await.unwrap();
    assert_eq!((bounds.pruned, bounds.newest), (newest, newest));
    // Whoever was on the way is told, and nobody else.
    assert!(store.every_event_after(newest, 10).await.unwrap().is_some());
    assert!(
        store
            .every_event_after(newest - 1, 10)
            .await
            .unwrap()
            .is_none()
    );
    store.forget_events(3).await.unwrap();
    assert!(store.every_event_after(newest, 10).await.unwrap().is_none());
    let told = store.every_event_after(newest + 3, 10).await.unwrap();
    assert!(told.unwrap().is_empty());
    assert!(store.events_after(0, 10).await.unwrap().is_empty());
}

async fn what_was_reported_is_kept(store: &Store) {
    let repository = name("team/leases");
    let blob = push_blob(store, &repository, &content(120, 10)).await;
    let view = push_image(store, &repository, 121, &[]).await;
    store.advance_clock(Duration::from_hours(13));
    assert!(
        store
            .stat_blob(&repository, &blob.digest, true)
            .await
            .unwrap()
            .is_some()
    );
    let digest = described(&view).digest;
    assert!(store.renew_manifest(&repository, &digest).await.unwrap());
    assert!(
        !store
            .renew_manifest(&repository, &Digest::sha256(b"x"))
            .await
            .unwrap()
    );
    assert!(
        !store
            .renew_manifest(&name("no/such"), &digest)
            .await
            .unwrap()
    );
}

async fn sparse_edges_are_filled(store: &Store) {
    let repository = name("team/sparse");
    let bytes = content(130, 400);
    let layer = Descriptor::of("application/octet-stream", &bytes);
    let child = image(&layer, &[]);
    let parent = index(&[described(&child)]);
    put(store, &repository, &parent, &["sparse"]).await.unwrap();
    put(store, &repository, &child, &[]).await.unwrap();
    let in_use = store
        .delete_manifest(&repository, &described(&child).digest, &actor())
        .await;
    assert!(matches!(in_use, Err(Error::ManifestInUse(_))));
    // The check would name an edge that the arrival of the blob did not fill.
    push_blob(store, &repository, &bytes).await;
    assert_sound(store).await;
    let in_use = store
        .delete_blob(&repository, &layer.digest, &actor())
        .await;
    assert!(matches!(in_use, Err(Error::BlobInUse(_))));
}

async fn damage_is_healed(engine: &Engine) {
    let store = &engine.store;
    let repository = name("team/healed");
    let root = engine.directory.path().join("data/o");
    let before = files(&root);
    let bytes = content(140, 50_000);
    let blob = push_blob(store, &repository, &bytes).await;
    let object = files(&root).difference(&before).next().unwrap().clone();
    std::fs::write(&object, b"cut").unwrap();
    let report = store.verify_open().await.unwrap();
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    assert!(store.open_blob(&repository, &blob.digest).await.is_err());

    store.mark_suspect(&blob.digest).await.unwrap();
    assert!(
        store
            .stat_blob(&repository, &blob.digest, true)
            .await
            .unwrap()
            .is_none()
    );
    assert!(
        !store
            .mount_blob(
                &name("x/y"),
                &blob.digest,
                std::slice::from_ref(&repository),
                &actor()
            )
            .await
            .unwrap()
    );
    assert!(store.open_blob(&repository, &blob.digest).await.is_err());
    let missing = put(store, &repository, &image(&blob, &[]), &[]).await;
    assert!(matches!(missing, Err(Error::MissingReferences(_))));
    push_blob(store, &repository, &bytes).await;
    assert_eq!(
        read_blob(store, &repository, &blob.digest).await.unwrap(),
        bytes
    );

    // What cannot be deleted now stays in the outbox and is tried again.
    std::fs::remove_file(&object).unwrap();
    std::fs::create_dir(&object).unwrap();
    store.maintain_once().await.unwrap();
    assert_eq!(store.statistics().await.unwrap().pending_deletions, 1);
    std::fs::remove_dir(&object).unwrap();
    store.advance_clock(Duration::from_mins(2));
    store.maintain_once().await.unwrap();
    assert_eq!(store.statistics().await.unwrap().pending_deletions, 0);
    assert_sound(store).await;
}

fn files(root: &std::path::Path) -> BTreeSet<std::path::PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    found
}

#[tokio::test]
async fn both_schemas_have_the_same_columns() {
    let sqlite = sqlite(Options::default()).await;
    let database = sqlite.directory.path().join("data/meta.db");
    let connection = rusqlite::Connection::open(database).unwrap();
    let mut statement = connection
        .prepare(
            "SELECT t.name, c.name, c.type, c.\"notnull\" FROM sqlite_schema t, pragma_table_info(t.name) c \
             WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%'",
        )
        .unwrap();
    let ours: BTreeSet<(String, String, String, bool)> = statement
        .query_map([], |row| {
            let kind: String = row.get(2)?;
            let kind = match kind.as_str() {
                "BIGINT" | "INTEGER" => "bigint",
                "BLOB" => "bytea",
                "TEXT" => "text",
                other => panic!("{other}"),
            };
            Ok((row.get(0)?, row.get(1)?, kind.to_owned(), row.get(3)?))
        })
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();

    let postgres = postgres(Options::default()).await;
    let (client, task) = tokio_postgres::connect(&postgres.url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(task);
    let theirs: BTreeSet<(String, String, String, bool)> = client
        .query(
            "SELECT table_name::text, column_name::text, data_type::text, is_nullable = 'NO' \
             FROM information_schema.columns WHERE table_schema = 'public'",
            &[],
        )
        .await
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3)))
        .collect();
    assert!(ours.len() > 80);
    // The sealer numbers events after they were written, in the order of `ordinal`; SQLite numbers them at once.
    let differ: Vec<_> = ours
        .symmetric_difference(&theirs)
        .map(|(table, column, _, required)| (table.as_str(), column.as_str(), *required))
        .collect();
    assert_eq!(
        differ,
        [
            ("event", "number", false),
            ("event", "number", true),
            ("event", "ordinal", false),
            ("event", "ordinal", true)
        ]
    );
}
