//! PostgreSQL restored to a moment by its own tools, over objects that were not restored.

use std::time::Duration;

use oci::Manifest;
use store::{
    AdoptOptions, DatabaseLocation, Error, GcOptions, Location, ObjectLocation, Options, Store,
    adopt,
};

use crate::engine::{actor, assert_sound, by_tag, described, name, push_image, read_blob};
use crate::postgres::Server;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_restored_to_a_moment_finds_its_objects() {
    let server = Server::start_with(|directory| {
        let archive = directory.join("archive");
        std::fs::create_dir(&archive).unwrap();
        crate::postgres::set_mode(&archive, 0o777);
        vec![
            "wal_level=replica".to_owned(),
            "archive_mode=on".to_owned(),
            format!("archive_command=cp %p {}/%f", archive.display()),
        ]
    })
    .await;
    let url = server.database("longshore").await;
    let objects = tempfile::tempdir().unwrap();
    let options = Options {
        // Physical deletions wait for as long as one may want to go back.
        gc: GcOptions {
            keep_deleted: Duration::from_hours(1000),
            ..GcOptions::default()
        },
        ..Options::default()
    };
    let location = Location {
        database: DatabaseLocation::Postgres(url.clone()),
        objects: ObjectLocation::Directory(objects.path().to_owned()),
    };
    let store = Store::open_at(&location, options.clone()).await.unwrap();
    let repository = name("a/b");
    let first = push_image(&store, &repository, 1, &["v1"]).await;
    server.base_backup();
    let second = push_image(&store, &repository, 2, &["v2"]).await;
    let upload = store
        .start_upload(&repository, oci::Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let moment: String = ask(&url, "SELECT clock_timestamp()::text").await;

    // After that moment: another image, and the first one is deleted and collected.
    push_image(&store, &repository, 3, &["v3"]).await;
    store
        .delete_manifest(&repository, &described(&first).digest, &actor())
        .await
        .unwrap();
    store.advance_clock(Duration::from_hours(100));
    store.maintain_once().await.unwrap();
    let layer = &first.layers.as_ref().unwrap()[1].digest;
    assert!(read_blob(&store, &repository, layer).await.is_none());
    let epoch = store.epoch().to_owned();
    store.close().await.unwrap();
    let _: String = ask(&url, "SELECT pg_switch_wal()::text").await;

    let archive = server.directory().join("archive");
    let server = server
        .recover(&[
            format!("restore_command=cp {}/%f %p", archive.display()),
            format!("recovery_target_time={moment}"),
            "recovery_target_action=promote".to_owned(),
        ])
        .await;
    let url = server.url("longshore");
    while ask::<bool>(&url, "SELECT pg_is_in_recovery()").await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // While a replica may be connected the database is left alone.
    let (_client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .unwrap();
    let connected = tokio::spawn(connection);
    let refused = adopt(&location, options.clone(), AdoptOptions::default()).await;
    assert!(
        matches!(refused, Err(Error::Unavailable { .. })),
        "{refused:?}"
    );
    let forced = AdoptOptions {
        force: true,
        discard_unknown: false,
    };
    let adopted = adopt(&location, options.clone(), forced).await.unwrap();
    assert_eq!((adopted.uploads, adopted.unknown), (1, 1));
    assert_ne!(adopted.epoch, epoch);
    connected.abort();
    // Twice does no harm.
    let again = AdoptOptions {
        force: true,
        discard_unknown: true,
    };
    let adopted = adopt(&location, options.clone(), again).await.unwrap();
    assert_eq!((adopted.uploads, adopted.unknown), (0, 1));

    let store = Store::open_at(&location, options).await.unwrap();
    assert_eq!(store.epoch(), adopted.epoch);
    for (tag, view) in [("v1", &first), ("v2", &second)] {
        let found = store.manifest(&repository, &by_tag(tag)).await.unwrap();
        let found = found.unwrap_or_else(|| panic!("`{tag}` was acknowledged before the moment"));
        assert_eq!(found.digest, described(view).digest);
        let view = Manifest::parse(&found.body, &found.media_type).unwrap();
        for blob in view.blobs() {
            let bytes = read_blob(&store, &repository, &blob.digest).await;
            assert!(blob.digest.matches(&bytes.unwrap()));
        }
    }
    assert_eq!(
        store.tags(&repository, None, 9).await.unwrap(),
        ["v1", "v2"]
    );
    assert!(matches!(
        store.upload_offset(&repository, &upload).await,
        Err(Error::UploadUnknown)
    ));
    assert_sound(&store).await;
    // What came after the moment can be pushed again, and what was left of it goes after a lease.
    push_image(&store, &repository, 3, &["v3"]).await;
    store.advance_clock(Duration::from_hours(30));
    store.maintain_once().await.unwrap();
    assert_sound(&store).await;
    store.close().await.unwrap();
}

/// However much waits, no statement of an adoption touches more rows than a database lets through in its time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_goes_in_steps() {
    let engine = crate::engine::postgres(Options::default()).await;
    let (store, repository) = (&engine.store, name("team/app"));
    for seed in 0..3 {
        push_image(store, &repository, seed, &[]).await;
    }
    store.clone().close().await.unwrap();
    engine
        .change(
            "INSERT INTO collection_queue (kind, repository_id, target_id, due_at, attempts) \
                 SELECT 'blob', 0, n, 1, 0 FROM generate_series(1, 1700) n; \
             INSERT INTO deletion (storage_key, due_at, attempts) \
                 SELECT 'key' || n, 1, 0 FROM generate_series(1, 1700) n; \
             UPDATE manifest SET lease_until = 1; UPDATE repository_blob SET lease_until = 1; \
             CREATE FUNCTION few() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 IF (SELECT COUNT(*) FROM touched) > 500 THEN RAISE 'too many rows'; END IF; \
                 RETURN NULL; END $$; \
             CREATE TRIGGER few AFTER UPDATE ON collection_queue REFERENCING NEW TABLE AS touched \
                 FOR EACH STATEMENT EXECUTE FUNCTION few(); \
             CREATE TRIGGER few AFTER UPDATE ON deletion REFERENCING NEW TABLE AS touched \
                 FOR EACH STATEMENT EXECUTE FUNCTION few()",
        )
        .await;
    let location = Location {
        database: DatabaseLocation::Postgres(engine.url.clone()),
        objects: ObjectLocation::Directory(engine.directory.path().join("data")),
    };
    let forced = AdoptOptions {
        force: true,
        discard_unknown: false,
    };
    let adopted = adopt(&location, Options::default(), forced).await.unwrap();
    // Three manifests, and of each a configuration and two layers.
    assert_eq!(adopted.leases, 12);
    for table in ["collection_queue", "deletion"] {
        let early = format!("SELECT COUNT(*) FROM {table} WHERE due_at = 1");
        assert_eq!(ask::<i64>(&engine.url, &early).await, 0, "{table}");
    }
}

/// One value of one query.
async fn ask<T: for<'a> tokio_postgres::types::FromSql<'a>>(url: &str, query: &str) -> T {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client.query_one(query, &[]).await.unwrap().get(0)
}
