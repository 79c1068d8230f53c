//! A database and its objects are one store, and neither is used with those of another.

use std::path::Path;
use std::time::Duration;

use oci::Algorithm;
use store::{
    AdoptOptions, DatabaseLocation, Error, Location, ObjectLocation, Options, Store, VerifyOptions,
    adopt, reindex_at, verify_at,
};

use crate::engine::{actor, assert_sound, content, image, name, push_blob, put, read_blob};
use crate::postgres::Server;

#[tokio::test]
async fn objects_of_another_store_are_refused() {
    contract(None).await;
}

/// On PostgreSQL where a server is given, else with SQLite in a directory of its own.
pub(crate) async fn contract(server: Option<&Server>) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let database = |name: &str| match server {
        Some(server) if name == "first" => DatabaseLocation::Postgres(server.url("postgres")),
        _ => DatabaseLocation::Sqlite(root.join(name)),
    };
    let at = |name: &str, objects: &str| Location {
        database: database(name),
        objects: ObjectLocation::Directory(root.join(objects)),
    };
    let ours = at("first", "objects");
    let store = open(&ours).await.unwrap();
    let repository = name("team/app");
    let blob = push_blob(&store, &repository, &content(1, 40_000)).await;
    // An adoption gives all of these a new time.
    put(&store, &repository, &image(&blob, &[]), &[])
        .await
        .unwrap();
    store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    store.close().await.unwrap();
    open(&ours).await.unwrap().close().await.unwrap();

    // Another place, and one of another store.
    let wrong = at("first", "other");
    refused(&wrong).await;
    let other = at("second", "third");
    open(&other).await.unwrap().close().await.unwrap();
    refused(&at("first", "third")).await;
    refused(&at("second", "objects")).await;
    refused(&at("fresh", "objects")).await;
    assert!(!root.join("other/store").exists());

    // An identity that got lost, or was not copied along, comes back when an operator says so.
    let file = root.join("objects/store");
    let identity = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    refused(&ours).await;
    let elsewhere = adopt(&wrong, Options::default(), force()).await;
    assert!(
        matches!(elsewhere, Err(Error::Unusable { .. })),
        "{elsewhere:?}"
    );
    let adopted = adopt(&ours, Options::default(), force()).await.unwrap();
    assert_eq!((adopted.uploads, adopted.leases), (1, 2));
    // A new one, so that whoever has a copy of the database is refused.
    let anew = std::fs::read(&file).unwrap();
    assert_ne!(anew, identity);
    let identity = anew;
    // A database that was never restored names nothing, and nothing is its own.
    let empty = at("empty", "fourth");
    open(&empty).await.unwrap().close().await.unwrap();
    let empty = at("empty", "objects");
    let taken = adopt(&empty, Options::default(), force()).await;
    assert!(matches!(taken, Err(Error::Unusable { .. })), "{taken:?}");
    assert_eq!(std::fs::read(&file).unwrap(), identity);
    // Nor does a new one get objects that say nothing of whose they are.
    std::fs::remove_file(&file).unwrap();
    refused_at_open(&at("later", "objects")).await;
    assert!(!file.exists());
    std::fs::write(&file, &identity).unwrap();

    // A program that died while it made the identity: the next one goes on, at the same place alone.
    let text = String::from_utf8(identity.clone()).unwrap();
    let id = text.trim_end().rsplit(' ').next().unwrap();
    let making = format!("making {id} {}", root.join("objects").display());
    change(
        &ours,
        &format!("UPDATE meta SET value = '{making}' WHERE key = 'store'"),
    )
    .await;
    std::fs::remove_file(&file).unwrap();
    let elsewhere = open(&wrong).await.map(drop);
    assert!(
        matches!(elsewhere, Err(Error::Unavailable { .. })),
        "{elsewhere:?}"
    );
    open(&ours).await.unwrap().close().await.unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), identity);

    // A store of a program that knew no identities finds its own objects, and no empty place instead.
    change(&ours, "DELETE FROM meta WHERE key = 'store'").await;
    refused_at_open(&ours).await;
    std::fs::remove_file(&file).unwrap();
    refused_at_open(&wrong).await;
    let store = open(&ours).await.unwrap();
    let found = read_blob(&store, &name("team/app"), &blob.digest).await;
    assert_eq!(found.unwrap(), content(1, 40_000));
    assert_sound(&store).await;
    store.close().await.unwrap();

    // A new database takes the place over when it is told to, and the old one is refused, also while it runs.
    let old = open(&ours).await.unwrap();
    let unused = push_blob(&old, &name("team/app"), &content(9, 40_000)).await;
    old.delete_blob(&name("team/app"), &unused.digest, &actor())
        .await
        .unwrap();
    let anew = at("anew", "objects");
    let without = reindex_at(&anew, &Options::default(), false, |_| {}).await;
    assert!(
        matches!(without, Err(Error::Unusable { .. })),
        "{without:?}"
    );
    let _ = std::fs::remove_dir_all(root.join("anew"));
    reindex_at(&anew, &Options::default(), true, |_| {})
        .await
        .unwrap();
    let mut ended = Ok(());
    for _ in 0..3 {
        old.advance_clock(Duration::from_hours(72));
        ended = ended.and(old.maintain_once().await);
    }
    assert!(matches!(ended, Err(Error::Stopped)), "{ended:?}");
    tokio::time::timeout(Duration::from_mins(1), old.stopped())
        .await
        .expect("the old store goes on");
    drop(old);
    refused(&ours).await;
    open(&anew).await.unwrap().close().await.unwrap();
}

async fn open(location: &Location) -> Result<Store, Error> {
    Store::open_at(location, Options::default()).await
}

async fn refused_at_open(location: &Location) {
    let opened = open(location).await.map(drop);
    assert!(matches!(opened, Err(Error::Unusable { .. })), "{opened:?}");
}

async fn refused(location: &Location) {
    refused_at_open(location).await;
    if is_there(location) {
        let looked = verify_at(location, VerifyOptions::default(), &|_| {}).await;
        assert!(matches!(looked, Err(Error::Unusable { .. })), "{looked:?}");
    }
}

/// A database that was refused at its first start holds no store that could be looked at.
fn is_there(location: &Location) -> bool {
    match &location.database {
        DatabaseLocation::Sqlite(root) => root.join("format").exists(),
        DatabaseLocation::Postgres(_) => true,
    }
}

fn force() -> AdoptOptions {
    AdoptOptions {
        force: true,
        discard_unknown: false,
    }
}

async fn change(location: &Location, sql: &str) {
    match &location.database {
        DatabaseLocation::Sqlite(root) => change_file(&root.join("meta.db"), sql),
        DatabaseLocation::Postgres(url) => {
            let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
                .await
                .unwrap();
            let connection = tokio::spawn(connection);
            client.batch_execute(sql).await.unwrap();
            drop(client);
            connection.await.unwrap().unwrap();
        }
    }
}

fn change_file(path: &Path, sql: &str) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.execute_batch(sql).unwrap();
}
