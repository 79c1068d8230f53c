//! The data directory: reopening, refusals, damage.

use std::path::Path;

use oci::Algorithm;
use store::{Error, Options, Store, verify_audit, verify_store};

use crate::engine::{actor, by_tag, content, name, push_blob, push_image, read_blob};

async fn open(dir: &Path) -> Result<Store, Error> {
    Store::open(dir, Options::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_reopen() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let repository = name("a/b");
    let store = open(dir).await.unwrap();
    let epoch = store.epoch().to_owned();
    let view = push_image(&store, &repository, 1, &["v1"]).await;
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(9, 50_000)).await.unwrap();
    writer.record().await.unwrap();
    let newest = store.event_bounds().await.unwrap().newest;
    // Dropped without being closed, as a program that ends does.
    drop(store);

    let store = open(dir).await.unwrap();
    assert_eq!(store.epoch(), epoch);
    assert_eq!(*store.event_signal().borrow(), newest);
    let stored = store
        .manifest(&repository, &by_tag("v1"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stored.body, view.to_bytes());
    for blob in view.blobs() {
        assert!(read_blob(&store, &repository, &blob.digest).await.is_some());
    }
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    assert_eq!(writer.offset(), 50_000);
    writer.write(content(8, 50_000)).await.unwrap();
    let whole = [content(9, 50_000), content(8, 50_000)].concat();
    let digest = oci::Digest::sha256(&whole);
    writer.commit(&digest, &actor()).await.unwrap();
    store.close().await.unwrap();
    let report = verify_store(dir).await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert_eq!((report.blobs, report.manifests), (4, 1));
    assert_eq!(verify_audit(dir).await.unwrap(), 1);
}

#[tokio::test]
async fn a_directory_in_use_is_refused_and_can_be_checked_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).await.unwrap();
    assert!(matches!(open(directory.path()).await, Err(Error::InUse(_))));
    let repository = name("a/b");
    push_image(&store, &repository, 1, &["v1"]).await;
    let id = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(9, 50_000)).await.unwrap();
    // An upload is open and has an object.
    let report = verify_store(directory.path()).await.unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert_eq!(report.blobs, 3);
    store.close().await.unwrap();
    open(directory.path()).await.unwrap().close().await.unwrap();
}

#[tokio::test]
async fn newer_foreign_and_damaged_directories_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("data");
    open(&dir).await.unwrap().close().await.unwrap();

    let format = dir.join("format");
    let text = std::fs::read_to_string(&format).unwrap();
    std::fs::write(&format, "longshore store 2\n").unwrap();
    assert!(matches!(
        open(&dir).await,
        Err(Error::Newer {
            found: 2,
            known: 1,
            ..
        })
    ));
    assert!(matches!(verify_store(&dir).await, Err(Error::Newer { .. })));
    for garbage in [
        "",
        "longshore store",
        "longshore store x\n",
        "longshore store 1",
        "\u{0}\n",
    ] {
        std::fs::write(&format, garbage).unwrap();
        assert!(
            matches!(open(&dir).await, Err(Error::Damaged { .. })),
            "{garbage:?}"
        );
    }
    std::fs::write(&format, text).unwrap();

    let database = dir.join("meta.db");
    let whole = std::fs::read(&database).unwrap();
    std::fs::write(&database, b"").unwrap();
    assert!(matches!(open(&dir).await, Err(Error::Damaged { .. })));
    std::fs::write(&database, content(1, 10_000)).unwrap();
    assert!(matches!(open(&dir).await, Err(Error::Database(_))));
    std::fs::remove_file(&database).unwrap();
    assert!(matches!(open(&dir).await, Err(Error::Damaged { .. })));
    assert!(!database.exists(), "a lost database must not be made anew");
    std::fs::write(&database, &whole).unwrap();
    open(&dir).await.unwrap().close().await.unwrap();

    let foreign = directory.path().join("home");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("letter.txt"), b"dear").unwrap();
    match open(&foreign).await {
        Err(Error::NotADataDirectory { found, .. }) => assert_eq!(found, "letter.txt"),
        other => panic!("{other:?}"),
    }
    let half = directory.path().join("half");
    std::fs::create_dir_all(half.join("o/00")).unwrap();
    std::fs::write(half.join("lock"), b"").unwrap();
    open(&half).await.unwrap().close().await.unwrap();
}

#[tokio::test]
async fn damage_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    let store = open(dir).await.unwrap();
    let blobs: Vec<_> = {
        let mut blobs = Vec::new();
        for seed in 1..=3 {
            blobs.push(push_blob(&store, &name("a/b"), &content(seed, 50_000)).await);
        }
        blobs
    };
    store.close().await.unwrap();
    let mut files = Vec::new();
    collect(&dir.join("o"), &mut files);
    assert_eq!(files.len(), 3);
    // One bit, a lost end, a lost file, and one that nobody knows.
    let mut bytes = std::fs::read(&files[0]).unwrap();
    bytes[777] ^= 1;
    std::fs::write(&files[0], bytes).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&files[1])
        .unwrap()
        .set_len(10)
        .unwrap();
    std::fs::remove_file(&files[2]).unwrap();
    std::fs::write(dir.join("o/00/stray"), b"x").unwrap();
    let report = verify_store(dir).await.unwrap();
    assert_eq!(report.problems.len(), 4, "{:#?}", report.problems);
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.contains("stray"))
    );
    let store = open(dir).await.unwrap();
    let mut refused = 0;
    for blob in &blobs {
        refused += usize::from(store.open_blob(&name("a/b"), &blob.digest).await.is_err());
    }
    assert_eq!(refused, 2, "an object of another size is never served");
}

fn collect(root: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.push(path);
        }
    }
}
