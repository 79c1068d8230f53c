//! A database that the program of schema 1 wrote: it is migrated, and everything in it is what it was.

use std::path::Path;

use oci::reference::TagOrDigest;
use oci::{Algorithm, Digest};
use store::{
    DatabaseLocation, Error, Location, ObjectLocation, Options, Store, UploadId, verify_audit,
    verify_audit_at, verify_store,
};

use crate::engine::{actor, by_tag, name, read_blob};

/// A data directory as the program of schema 1 left it.
pub(crate) async fn make(dir: &Path) {
    let fresh = Store::open(dir, Options::default()).await.unwrap();
    fresh.close().await.unwrap();
    for part in ["meta.db", "meta.db-wal", "meta.db-shm"] {
        let _ = std::fs::remove_file(dir.join(part));
    }
    rusqlite::Connection::open(dir.join("meta.db"))
        .unwrap()
        .execute_batch(include_str!("schema-1.sql"))
        .unwrap();
}

#[tokio::test]
async fn a_store_of_schema_1_is_migrated_with_all_that_it_holds() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("data");
    make(&dir).await;

    let store = Store::open(&dir, Options::default()).await.unwrap();
    assert!(dir.join("meta.db.before-2").is_file());
    let web = name("shop/web");
    assert_eq!(
        store.tags(&web, None, 10).await.unwrap(),
        ["all", "latest", "v1", "v2"]
    );
    for (tag, digest) in [("v1", FIRST), ("v2", SECOND), ("latest", SECOND)] {
        let found = store.manifest(&web, &by_tag(tag)).await.unwrap().unwrap();
        assert_eq!(found.digest.to_string(), digest, "{tag}");
        assert_eq!(Digest::sha256(&found.body), found.digest);
    }
    let subject: Digest = FIRST.parse().unwrap();
    let referrers = store
        .referrers(&web, &subject, None, None, 10)
        .await
        .unwrap();
    assert_eq!(referrers.len(), 1);
    assert_eq!(referrers[0].descriptor.digest.to_string(), SIGNATURE);
    let signature = TagOrDigest::Digest(SIGNATURE.parse().unwrap());
    assert!(store.manifest(&web, &signature).await.unwrap().is_some());
    let layer = Digest::sha256(b"shared layer");
    for repository in [&web, &name("team/tools")] {
        let bytes = read_blob(&store, repository, &layer).await.unwrap();
        assert_eq!(&bytes[..], b"shared layer");
    }
    let history = store
        .tag_history(&web, &"latest".parse().unwrap(), None, 10)
        .await
        .unwrap();
    assert_eq!(history.len(), 2);

    // The position of a client that followed the events holds on.
    assert_eq!(store.epoch(), EPOCH);
    let bounds = store.event_bounds().await.unwrap();
    let events = store.events_after(0, 100).await.unwrap();
    assert_eq!((bounds.pruned, bounds.newest), (0, events.len() as i64));

    // The upload goes on where it was, as far as its time has not run out.
    let upload = UploadId(UPLOAD.to_owned());
    let tools = name("team/tools");
    if let Ok(mut writer) = store.claim_upload(&tools, &upload).await {
        writer.write("and ended after".into()).await.unwrap();
        let whole = Digest::of(Algorithm::Sha256, b"begun before and ended after");
        writer.commit(&whole, &actor()).await.unwrap();
    }
    store.maintain_once().await.unwrap();
    store.close().await.unwrap();
    let report = verify_store(&dir).await.unwrap();
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    verify_audit(&dir).await.unwrap();
}

#[tokio::test]
async fn a_look_at_another_schema_tells_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("data");
    make(&dir).await;
    let looks = async || {
        let checked = verify_store(&dir).await.map(drop);
        [checked, verify_audit(&dir).await.map(drop)]
    };
    for look in looks().await {
        let problem = look.unwrap_err();
        assert!(matches!(problem, Error::Unusable { .. }), "{problem}");
        for part in ["schema 1", "reads schema 2", "`longshore serve`"] {
            assert!(problem.to_string().contains(part), "{problem}");
        }
    }
    // Nothing was changed, and a backup of it is whole.
    assert!(!dir.join("meta.db.before-2").exists());
    let (backup, to) = (
        directory.path().join("backup"),
        directory.path().join("restored"),
    );
    store::backup(&dir, &backup, false).await.unwrap();
    let restored = store::restore(&backup, &to, None, &Options::default()).await;
    assert_eq!(restored.unwrap().problems, Vec::<String>::new());

    for at in [&dir, &to] {
        let store = Store::open(at, Options::default()).await.unwrap();
        store.close().await.unwrap();
    }
    for look in looks().await {
        look.unwrap();
    }
    rusqlite::Connection::open(dir.join("meta.db"))
        .unwrap()
        .execute_batch("UPDATE meta SET value = '9' WHERE key IN ('schema', 'schema_expanded')")
        .unwrap();
    let [one, two] = looks().await;
    let backup = store::backup(&dir, &directory.path().join("other"), false).await;
    for look in [one, two, backup.map(drop)] {
        let problem = look.unwrap_err();
        assert!(
            matches!(&problem, Error::Newer { dir: place, found: 9, known: 2 } if *place == dir),
            "{problem}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_record_of_a_cluster_is_checked_beside_it() {
    let engine = crate::engine::postgres(Options::default()).await;
    let location = Location {
        database: DatabaseLocation::Postgres(engine.url.clone()),
        objects: ObjectLocation::Directory(engine.directory.path().join("data")),
    };
    crate::engine::push_image(&engine.store, &name("a/b"), 1, &["v1"]).await;
    engine.store.seal().await.unwrap();
    assert!(verify_audit_at(&location).await.unwrap() > 0);
    engine
        .change("UPDATE audit SET principal = 'user:mallory'")
        .await;
    let problem = verify_audit_at(&location).await.unwrap_err();
    assert!(matches!(problem, Error::Damaged { .. }), "{problem}");
    assert!(problem.to_string().contains("PostgreSQL"), "{problem}");
    // One that only looks leaves another schema as it is, and says so.
    for (version, part) in [(1, "`longshore serve`"), (9, "a newer program")] {
        engine
            .change(&format!(
                "UPDATE meta SET value = '{version}' WHERE key IN ('schema', 'schema_expanded')"
            ))
            .await;
        let problem = verify_audit_at(&location).await.unwrap_err().to_string();
        assert!(
            problem.contains(part) && problem.contains("PostgreSQL"),
            "{problem}"
        );
    }
}

const EPOCH: &str = "b14d202b2947e08104bcef6aab768a9e";
const UPLOAD: &str = "33d8a14898cb8b25f98f3af65c64059e";
const FIRST: &str = "sha256:47cdd0577aaf849b9d6a0a2662f1321e7c7663d504e1784f11886da305cdb73f";
const SECOND: &str = "sha256:fe49f580be5fd85d436530af39322ce6114f69219314b3a82d39c0b50be5a93b";
const SIGNATURE: &str = "sha256:eaf0f5ca0adfa99138abe6278d93d1c3561eaff70ec27cb8549ec3e88cf22ce4";
