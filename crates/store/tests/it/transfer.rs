//! A store is carried from one engine to the other and back, and everything is as it was.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Descriptor, Manifest};
use store::transfer::{self, Settings, Verify};
use store::{
    AuditEntry, DatabaseLocation, Error, Expected, Location, ObjectLocation, Options, Store,
};

use crate::engine::{
    actor, assert_sound, by_tag, content, described, image, index, name, push_blob, put, read_blob,
    tag,
};
use crate::postgres::Server;

/// What a store shows of itself.
#[derive(Debug, PartialEq)]
struct Seen {
    epoch: String,
    newest: i64,
    events: Vec<String>,
    tags: Vec<(String, i64, String)>,
    history: Vec<(i64, bool)>,
    referrers: Vec<String>,
    keys: Vec<String>,
    usage: (i64, i64),
    blobs: Vec<(String, usize)>,
}

async fn fill(store: &Store) {
    let repository = name("team/app");
    let config = push_blob(store, &repository, &content(1, 60)).await;
    let large = push_blob(store, &repository, &content(2, 3 << 20)).await;
    let view = image(&config, std::slice::from_ref(&large));
    put(store, &repository, &view, &["v1", "latest"])
        .await
        .unwrap();
    let other = push_blob(store, &repository, &content(3, 90_000)).await;
    let second = image(&config, &[other]);
    put(store, &repository, &second, &["latest"]).await.unwrap();
    put(
        store,
        &repository,
        &index(&[described(&view), described(&second)]),
        &["multi"],
    )
    .await
    .unwrap();
    let signature = push_blob(store, &repository, &content(4, 20)).await;
    let referrer = Manifest {
        subject: Some(described(&view)),
        ..image(&config, &[signature])
    };
    put(store, &repository, &referrer, &[]).await.unwrap();
    for seed in 0..40 {
        let blob = push_blob(store, &name("away/many"), &content(100 + seed, 20_000)).await;
        let view = image(&blob, &[]);
        put(store, &name("away/many"), &view, &[&format!("t{seed}")])
            .await
            .unwrap();
    }
    store
        .delete_tag(&repository, &tag("v1"), Expected::Any, &actor())
        .await
        .unwrap();
    let entry = AuditEntry {
        actor: actor(),
        action: "login".to_owned(),
        target: "x".to_owned(),
        outcome: "failed".to_owned(),
    };
    store.audit(entry).await.unwrap();
    store.token_keys().await.unwrap();
    // An upload that is open is not carried, and its object goes.
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(9, 100_000)).await.unwrap();
    writer.record().await.unwrap();
    store.maintain_once().await.unwrap();
}

async fn see(store: &Store) -> Seen {
    let mut events = Vec::new();
    for event in store.events_after(0, 1000).await.unwrap() {
        events.push(format!("{event:?}"));
    }
    let mut tags = Vec::new();
    let mut blobs = Vec::new();
    for repository in store.repositories(None, 100).await.unwrap() {
        for text in store.tags(&repository, None, 1000).await.unwrap() {
            let state = store.tag(&repository, &tag(&text)).await.unwrap().unwrap();
            tags.push((
                format!("{repository}:{text}"),
                state.generation,
                state.digest.to_string(),
            ));
            let stored = store
                .manifest(&repository, &by_tag(&text))
                .await
                .unwrap()
                .unwrap();
            let view = Manifest::parse(&stored.body, &stored.media_type).unwrap();
            for blob in view.blobs() {
                let bytes: Bytes = read_blob(store, &repository, &blob.digest).await.unwrap();
                assert!(blob.digest.matches(&bytes));
                blobs.push((blob.digest.to_string(), bytes.len()));
            }
        }
    }
    let app = name("team/app");
    let history = store.tag_history(&app, &tag("v1"), None, 10).await.unwrap();
    let subject: Descriptor = {
        let config = Descriptor::of("application/octet-stream", &content(1, 60));
        let large = Descriptor::of("application/octet-stream", &content(2, 3 << 20));
        described(&image(&config, &[large]))
    };
    let referrers = store
        .referrers(&app, &subject.digest, None, None, 10)
        .await
        .unwrap();
    assert_eq!(referrers.len(), 1);
    Seen {
        epoch: store.epoch().to_owned(),
        newest: store.event_bounds().await.unwrap().newest,
        events,
        tags,
        history: history
            .iter()
            .map(|step| (step.generation, step.digest.is_some()))
            .collect(),
        referrers: referrers.iter().map(|row| format!("{row:?}")).collect(),
        keys: store
            .token_keys()
            .await
            .unwrap()
            .into_iter()
            .map(|key| key.id)
            .collect(),
        usage: store.namespace_usage("team").await.unwrap(),
        blobs,
    }
}

/// PostgreSQL with objects in a directory.
fn clustered(url: &str, directory: &Path) -> Location {
    Location {
        database: DatabaseLocation::Postgres(url.to_owned()),
        objects: ObjectLocation::Directory(directory.to_owned()),
    }
}

fn whole() -> Settings {
    Settings {
        verify: Verify::Full,
        ..Settings::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_goes_to_postgres_and_back_and_its_history_goes_on() {
    let server = Server::start().await;
    let scratch = tempfile::tempdir().unwrap();
    let first = Location::embedded(scratch.path().join("first"));
    let second = clustered(
        &server.database("second").await,
        &scratch.path().join("second"),
    );
    let third = Location::embedded(scratch.path().join("third"));

    let store = Store::open_at(&first, Options::default()).await.unwrap();
    fill(&store).await;
    let seen = see(&store).await;

    // While the store is in use only objects come.
    let refused = transfer::migrate(&first, &second, whole()).await;
    assert!(matches!(refused, Err(Error::InUse(_))), "{refused:?}");
    let ahead = Settings {
        ahead: true,
        ..Settings::default()
    };
    let report = transfer::migrate(&first, &second, ahead).await.unwrap();
    assert!(report.objects_moved > 40 && !report.finished, "{report:?}");
    let opened = Store::open_at(&second, Options::default()).await;
    assert!(matches!(opened, Err(Error::Moving(_))), "{opened:?}");
    // What goes at the source meanwhile goes at the destination too.
    let extra = push_blob(&store, &name("team/app"), &content(50, 200_000)).await;
    let again = transfer::migrate(&first, &second, ahead).await.unwrap();
    assert_eq!(again.objects_moved, 1);
    store
        .delete_blob(&name("team/app"), &extra.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    let seen_usage = store.namespace_usage("team").await.unwrap();
    store.close().await.unwrap();

    let report = transfer::migrate(&first, &second, whole()).await.unwrap();
    assert!(report.finished, "{report:?}");
    assert!(report.damaged.is_empty());
    let store = Store::open_at(&second, Options::default()).await.unwrap();
    let at_second = see(&store).await;
    assert_eq!(
        at_second,
        Seen {
            usage: seen_usage,
            ..seen
        }
    );
    assert_sound(&store).await;
    // The source opens no more.
    let opened = Store::open_at(&first, Options::default()).await;
    assert!(matches!(opened, Err(Error::Moving(_))), "{opened:?}");
    let again = transfer::migrate(&first, &third, whole()).await;
    assert!(matches!(again, Err(Error::Moving(_))), "{again:?}");

    // The history goes on, there and back at the third place.
    let config = push_blob(&store, &name("team/app"), &content(1, 60)).await;
    put(&store, &name("team/app"), &image(&config, &[]), &["latest"])
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    let seen = see(&store).await;
    assert!(seen.newest > at_second.newest);
    assert_eq!(seen.events.len(), at_second.events.len() + 2);
    store.close().await.unwrap();
    let report = transfer::migrate(&second, &third, whole()).await.unwrap();
    assert!(report.finished, "{report:?}");
    let store = Store::open_at(&third, Options::default()).await.unwrap();
    assert_eq!(see(&store).await, seen);
    assert_sound(&store).await;
    store.close().await.unwrap();
    let report = store::verify_store(&scratch.path().join("third"))
        .await
        .unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
    store::verify_audit(&scratch.path().join("third"))
        .await
        .unwrap();
    // The mark can be taken off.
    assert!(transfer::reopen(&first).await.unwrap());
    Store::open_at(&first, Options::default())
        .await
        .unwrap()
        .close()
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_stay_when_the_database_alone_changes() {
    let server = Server::start().await;
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("data");
    let embedded = Location::embedded(&directory);
    let cluster = clustered(&server.database("same").await, &directory);
    let store = Store::open_at(&embedded, Options::default()).await.unwrap();
    fill(&store).await;
    let seen = see(&store).await;
    store.close().await.unwrap();
    let report = transfer::migrate(&embedded, &cluster, whole())
        .await
        .unwrap();
    assert!(report.finished && report.objects_stay, "{report:?}");
    assert_eq!(report.objects_moved, 0);
    let store = Store::open_at(&cluster, Options::default()).await.unwrap();
    assert_eq!(see(&store).await, seen);
    assert_sound(&store).await;
    // What the upload that was open wrote goes through the outbox.
    store.advance_clock(Duration::from_hours(1));
    store.maintain_once().await.unwrap();
    assert_sound(&store).await;
    let opened = Store::open_at(&embedded, Options::default()).await;
    assert!(opened.is_err());
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_holds_something_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let places: Vec<_> = ["a", "b", "c"]
        .map(|name| Location::embedded(scratch.path().join(name)))
        .into();
    for place in &places[..2] {
        let store = Store::open_at(place, Options::default()).await.unwrap();
        push_blob(&store, &name("x/y"), &content(1, 50_000)).await;
        store.close().await.unwrap();
    }
    for (from, to) in [(&places[0], &places[1]), (&places[0], &places[0])] {
        let refused = transfer::migrate(from, to, whole()).await;
        assert!(matches!(refused, Err(Error::Moving(_))), "{refused:?}");
    }
    let ahead = Settings {
        ahead: true,
        ..Settings::default()
    };
    transfer::migrate(&places[0], &places[2], ahead)
        .await
        .unwrap();
    let refused = transfer::migrate(&places[1], &places[2], whole()).await;
    assert!(matches!(refused, Err(Error::Moving(_))), "{refused:?}");
    let none = Location::embedded(scratch.path().join("none"));
    assert!(transfer::migrate(&none, &places[2], whole()).await.is_err());
    assert!(!scratch.path().join("none").exists());
    assert!(
        transfer::migrate(&places[0], &places[2], whole())
            .await
            .unwrap()
            .finished
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_at_the_source_is_told_and_stays_damage_for_who_accepts_it() {
    let scratch = tempfile::tempdir().unwrap();
    let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
    let store = Store::open(&from, Options::default()).await.unwrap();
    let repository = name("x/y");
    let (first, second) = (
        push_blob(&store, &repository, &content(1, 50_000)).await,
        push_blob(&store, &repository, &content(2, 50_000)).await,
    );
    store.close().await.unwrap();
    let object = largest(&from, &content(1, 50_000));
    std::fs::write(object, content(3, 50_000)).unwrap();
    let (source, destination) = (Location::embedded(&from), Location::embedded(&to));
    let report = transfer::migrate(&source, &destination, whole())
        .await
        .unwrap();
    assert!(!report.finished && report.damaged.is_empty(), "{report:?}");
    assert_eq!(report.problems.len(), 1, "{report:?}");
    let accepting = Settings {
        accept_damaged: true,
        ..whole()
    };
    let report = transfer::migrate(&source, &destination, accepting)
        .await
        .unwrap();
    assert!(report.finished, "{report:?}");
    assert_eq!(report.damaged.len(), 1);
    let store = Store::open(&to, Options::default()).await.unwrap();
    assert!(
        store
            .stat_blob(&repository, &first.digest, false)
            .await
            .unwrap()
            .is_none()
    );
    assert!(
        store
            .stat_blob(&repository, &second.digest, false)
            .await
            .unwrap()
            .is_some()
    );
    push_blob(&store, &repository, &content(1, 50_000)).await;
    assert!(
        store
            .stat_blob(&repository, &first.digest, false)
            .await
            .unwrap()
            .is_some()
    );
    store.close().await.unwrap();
}

/// A replica that was cut off while its store was carried away, and comes back: it takes nothing, deletes nothing, and
/// ends when it hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_a_store_that_is_carried_away_writes_nothing() {
    let engine = crate::engine::postgres(Options::default()).await;
    let (store, repository) = (&engine.store, name("a/b"));
    let unused = push_blob(store, &repository, &content(1, 50_000)).await;
    store
        .delete_blob(&repository, &unused.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    engine
        .change("INSERT INTO meta (key, value) VALUES ('leaving', '{}')")
        .await;
    let object = largest(&engine.directory.path().join("data"), &content(1, 50_000));
    store.advance_clock(Duration::from_hours(48));
    for key in ["leaving", "moved"] {
        let digest = oci::Digest::sha256(&content(2, 100));
        let refused = match store.put_blob(&repository, &digest, &actor()).await {
            Ok(mut writer) => {
                writer.write(content(2, 100)).await.unwrap();
                writer.commit(&digest, &actor()).await.map(drop)
            }
            Err(error) => Err(error),
        };
        assert!(
            matches!(&refused, Err(Error::ReadOnly { reason }) if reason.contains("another place")),
            "{key}: {refused:?}"
        );
        let refused = store.maintain_once().await;
        assert!(
            matches!(refused, Err(Error::Moving(_))),
            "{key}: {refused:?}"
        );
        let refused = store.set_normal(&actor()).await;
        assert!(matches!(refused, Err(Error::Moving(_))), "{refused:?}");
        assert!(object.exists(), "the collector has deleted an object");
        if key == "leaving" {
            // Given up, it goes on as before.
            engine
                .change("DELETE FROM meta WHERE key = 'leaving'")
                .await;
            // What a replica refuses before it takes a body is what it last saw.
            store.mode().await.unwrap();
            push_blob(store, &repository, &content(3, 100)).await;
            engine
                .change("INSERT INTO meta (key, value) VALUES ('moved', 'elsewhere')")
                .await;
        }
    }
    tokio::time::timeout(Duration::from_mins(1), store.stopped())
        .await
        .expect("the replica goes on");
}

/// The object that holds these bytes.
fn largest(root: &Path, bytes: &Bytes) -> std::path::PathBuf {
    let mut open = vec![root.join("o")];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if std::fs::read(&path).unwrap() == *bytes {
                return path;
            }
        }
    }
    panic!("no object has these bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_table_is_forgotten() {
    for engine in [
        crate::engine::sqlite(Options::default()).await,
        crate::engine::postgres(Options::default()).await,
    ] {
        let (known, present) = transfer::known_and_present(&engine.store).await.unwrap();
        assert_eq!(known, present);
    }
}
