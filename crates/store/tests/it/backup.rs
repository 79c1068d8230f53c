//! Backups: every point restores to what was acknowledged before it, and to nothing half done.

use std::path::Path;
use std::time::Duration;

use store::{
    BackupOptions, Error, Expected, Options, Restored, Store, Timestamp, backup, list_backups,
    restore, verify_audit, verify_backup, verify_store,
};

use crate::engine::{
    actor, by_digest, by_tag, content, described, name, push_blob, push_image, read_blob, tag,
};

/// A store that is backed up when the test says so.
async fn backed_up(root: &Path) -> Store {
    let store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    store.start_backup(options(root)).await.unwrap();
    store.ship_backup().await;
    store
}

fn options(root: &Path) -> BackupOptions {
    BackupOptions {
        every: Duration::from_hours(1),
        ..BackupOptions::new(root.join("backup"))
    }
}

fn point(store: &Store) -> Timestamp {
    let status = store.backup_status().unwrap();
    assert_eq!(status.problem, None);
    status.point.unwrap()
}

/// Restores and wants a store without any problem.
async fn restored(root: &Path, at: Option<Timestamp>, to: &str) -> (Restored, Store) {
    let to = root.join(to);
    let report = restore(&root.join("backup"), &to, at, &Options::default())
        .await
        .unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let checked = verify_store(&to).await.unwrap();
    assert_eq!(checked.problems, Vec::<String>::new());
    verify_audit(&to).await.unwrap();
    let store = Store::open(&to, Options::default()).await.unwrap();
    assert_eq!(store.epoch(), report.epoch);
    (report, store)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_point_restores_to_its_moment() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let store = backed_up(root).await;
    let repository = name("a/b");
    let empty = point(&store);
    let mut points = Vec::new();
    for seed in 0..4 {
        push_image(&store, &repository, seed, &[&format!("v{seed}"), "latest"]).await;
        store.ship_backup().await;
        points.push(point(&store));
    }
    store
        .delete_tag(&repository, &tag("v0"), Expected::Any, &actor())
        .await
        .unwrap();
    store.ship_backup().await;
    points.push(point(&store));
    assert!(points.windows(2).all(|pair| pair[0] < pair[1]));
    let list = list_backups(&root.join("backup")).unwrap();
    assert_eq!(list.problems, Vec::<String>::new());
    assert_eq!(list.lines.len(), 1);
    assert_eq!(list.lines[0].to, *points.last().unwrap());
    let epoch = store.epoch().to_owned();
    store.close().await.unwrap();

    let (report, old) = restored(root, Some(empty), "empty").await;
    assert_eq!(report.objects, 0);
    assert_eq!(old.repositories(None, 10).await.unwrap(), vec![]);
    for (index, at) in points.iter().enumerate() {
        // Any moment before the next point is this one.
        let asked = Timestamp(at.0 + 1);
        let (report, old) = restored(root, Some(asked), &format!("at-{index}")).await;
        assert!(report.at >= *at && report.at <= asked);
        assert_ne!(old.epoch(), epoch);
        let tags = old.tags(&repository, None, 10).await.unwrap();
        let wanted: Vec<String> = match index {
            4 => ["latest", "v1", "v2", "v3"].map(str::to_owned).to_vec(),
            _ => std::iter::once("latest".to_owned())
                .chain((0..=index).map(|seed| format!("v{seed}")))
                .collect(),
        };
        assert_eq!(tags, wanted, "point {index}");
        assert_eq!(report.objects, index.min(3) as u64 + 1);
        // It is a store like any other.
        push_image(&old, &repository, 77, &["more"]).await;
        old.close().await.unwrap();
    }
    let (_, newest) = restored(root, None, "newest").await;
    assert_eq!(newest.tags(&repository, None, 10).await.unwrap().len(), 4);
    let report = verify_backup(&root.join("backup")).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert_eq!(report.objects, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_folded_many_times_and_nothing_is_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let store = backed_up(root).await;
    let repository = name("a/b");
    let log = root.join("data/meta.db-wal");
    let mut folds = 0;
    let mut before = 0;
    let mut seed = 0;
    let mut points = Vec::new();
    while folds < 3 {
        // Bytes in rows fill the log.
        for _ in 0..40 {
            seed += 1;
            push_blob(&store, &repository, &content(seed, 16_000)).await;
        }
        store.ship_backup().await;
        points.push((point(&store), seed));
        let length = std::fs::metadata(&log).unwrap().len();
        folds += i32::from(length < before);
        before = length;
    }
    push_image(&store, &repository, 1, &["end"]).await;
    store.close().await.unwrap();
    let list = list_backups(&root.join("backup")).unwrap();
    assert_eq!(list.lines.len(), 1, "no fold broke the line");
    assert_eq!(list.problems, Vec::<String>::new());
    let (_, newest) = restored(root, None, "newest").await;
    let image = newest
        .manifest(&repository, &by_tag("end"))
        .await
        .unwrap()
        .unwrap();
    assert!(!image.body.is_empty());
    for number in 1..=seed {
        let digest = oci::Digest::sha256(&content(number, 16_000));
        assert!(
            read_blob(&newest, &repository, &digest).await.is_some(),
            "{number}"
        );
    }
    for (at, last) in points.into_iter().step_by(9) {
        let (_, old) = restored(root, Some(at), &format!("at-{last}")).await;
        let digest = oci::Digest::sha256(&content(last, 16_000));
        assert!(read_blob(&old, &repository, &digest).await.is_some());
        let later = oci::Digest::sha256(&content(last + 1, 16_000));
        assert!(read_blob(&old, &repository, &later).await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_begins_a_line_and_earlier_points_stay() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let store = backed_up(root).await;
    push_image(&store, &repository, 1, &["v1"]).await;
    store.ship_backup().await;
    let first = point(&store);
    store.close().await.unwrap();

    // Without its backup for a while.
    let store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    push_image(&store, &repository, 2, &["v2"]).await;
    store.close().await.unwrap();

    let store = backed_up(root).await;
    let view = push_image(&store, &repository, 3, &["v3"]).await;
    store.close().await.unwrap();
    assert_eq!(list_backups(&root.join("backup")).unwrap().lines.len(), 2);
    let (_, old) = restored(root, Some(first), "first").await;
    assert_eq!(old.tags(&repository, None, 9).await.unwrap(), ["v1"]);
    let (_, new) = restored(root, None, "new").await;
    assert_eq!(
        new.tags(&repository, None, 9).await.unwrap(),
        ["v1", "v2", "v3"]
    );
    let found = new.manifest(&repository, &by_digest(&view)).await.unwrap();
    assert_eq!(found.unwrap().digest, described(&view).digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_found_and_earlier_points_stay() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let store = backed_up(root).await;
    push_image(&store, &repository, 0, &["v0"]).await;
    store.ship_backup().await;
    let first = point(&store);
    let kept = list_backups(&root.join("backup")).unwrap().lines[0].points - 1;
    for seed in 1..3 {
        push_image(&store, &repository, seed, &[&format!("v{seed}")]).await;
        store.ship_backup().await;
    }
    store.close().await.unwrap();
    let last = list_backups(&root.join("backup")).unwrap().lines[0].to;
    let line = std::fs::read_dir(root.join("backup/lines"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let second = line.join(format!("{:08}.log", kept + 1));
    let whole = std::fs::read(&second).unwrap();
    let backup = root.join("backup");

    let mut flipped = whole.clone();
    flipped[5000] ^= 1;
    std::fs::write(&second, &flipped).unwrap();
    assert_eq!(verify_backup(&backup).await.unwrap().problems.len(), 1);
    let refused = restore(&backup, &root.join("x"), None, &Options::default()).await;
    assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");
    // It leaves nothing behind, so the next try may go to the same place.
    let (_, old) = restored(root, Some(first), "x").await;
    assert_eq!(old.tags(&repository, None, 9).await.unwrap(), ["v0"]);

    for torn in [0, 100, 1024, whole.len() - 1] {
        std::fs::write(&second, &whole[..torn]).unwrap();
        let list = list_backups(&backup).unwrap();
        assert_eq!(list.problems.len(), 1);
        assert_eq!(list.lines[0].points, kept + 1, "the copy is one as well");
        refused_but_until(root, list.lines[0].to, &format!("torn-{torn}")).await;
        assert!(list.lines[0].to < last);
    }
    std::fs::remove_file(&second).unwrap();
    let list = list_backups(&backup).unwrap();
    assert_eq!(list.problems.len(), 1);
    refused_but_until(root, list.lines[0].to, "hole").await;
    // All segments from here on are gone: only `covered.json` knows of them.
    let later: Vec<_> = (kept + 2..kept + 9)
        .map(|number| line.join(format!("{number:08}.log")))
        .filter(|path| path.exists())
        .collect();
    assert!(!later.is_empty());
    for path in &later {
        std::fs::rename(path, path.with_extension("away")).unwrap();
    }
    let list = list_backups(&backup).unwrap();
    assert_eq!(list.problems.len(), 1, "{:?}", list.problems);
    assert_eq!(verify_backup(&backup).await.unwrap().problems.len(), 1);
    assert!(list.lines[0].to < last);
    refused_but_until(root, list.lines[0].to, "short").await;
    for path in &later {
        std::fs::rename(path.with_extension("away"), path).unwrap();
    }
    std::fs::write(&second, &whole).unwrap();
    assert_eq!(list_backups(&backup).unwrap().lines[0].to, last);
    assert_eq!(verify_backup(&backup).await.unwrap().problems.len(), 0);

    std::fs::write(
        backup.join("backup.json"),
        "{\"format\":\"longshore backup\",\"version\":2}",
    )
    .unwrap();
    assert!(matches!(list_backups(&backup), Err(Error::Newer { .. })));
}

/// The newest moment, and any after `until`, is refused with a word on what can be had; `until` is the state with `v0`.
async fn refused_but_until(root: &Path, until: Timestamp, to: &str) {
    for at in [None, Some(Timestamp(until.0 + 1))] {
        let target = root.join(to);
        let refused = restore(&root.join("backup"), &target, at, &Options::default()).await;
        let Err(error @ Error::Damaged { .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(error.to_string().contains(&format!("--at {until}")));
        assert!(!target.exists());
    }
    let (report, old) = restored(root, Some(until), to).await;
    assert_eq!(report.at, until);
    assert_eq!(old.tags(&name("a/b"), None, 9).await.unwrap(), ["v0"]);
    old.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_lost_is_not_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let store = backed_up(root).await;
    push_image(&store, &repository, 0, &["v0"]).await;
    store.close().await.unwrap();
    let until = list_backups(&root.join("backup")).unwrap().lines[0].to;
    let store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    push_image(&store, &repository, 1, &["v1"]).await;
    store.close().await.unwrap();
    backed_up(root).await.close().await.unwrap();
    let mut lines: Vec<_> = std::fs::read_dir(root.join("backup/lines"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    lines.sort();
    assert_eq!(lines.len(), 2);
    let begun: i64 = lines[1]
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    for file in ["base.db", "line.json"] {
        let away = root.join("away");
        std::fs::rename(lines[1].join(file), &away).unwrap();
        for at in [None, Some(Timestamp(begun))] {
            let refused = restore(
                &root.join("backup"),
                &root.join("x"),
                at,
                &Options::default(),
            )
            .await;
            assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");
        }
        assert!(
            !list_backups(&root.join("backup"))
                .unwrap()
                .problems
                .is_empty()
        );
        if file == "base.db" {
            std::fs::rename(&away, lines[1].join(file)).unwrap();
        }
    }
    // A restore that was killed before it began in earnest is no obstacle.
    std::fs::create_dir_all(root.join("old/o/aa")).unwrap();
    std::fs::write(root.join("old/lock"), b"").unwrap();
    let (_, old) = restored(root, Some(until), "old").await;
    assert_eq!(old.tags(&repository, None, 9).await.unwrap(), ["v0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_store_deletes_stays_as_long_as_a_point_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let store = backed_up(root).await;
    let blob = push_blob(&store, &repository, &content(1, 50_000)).await;
    store.ship_backup().await;
    let with = point(&store);
    let files = || count(&root.join("backup/o"));
    assert_eq!(files(), 1);
    // Damaged, then healed by a push: the first object goes through the outbox.
    store.mark_suspect(&blob.digest).await.unwrap();
    push_blob(&store, &repository, &content(1, 50_000)).await;
    assert_eq!(count(&root.join("data/o")), 2);
    store.advance_clock(Options::default().gc.read_grace);
    store.maintain_once().await.unwrap();
    assert_eq!(count(&root.join("data/o")), 1);
    store.ship_backup().await;
    assert_eq!(files(), 2);
    store.close().await.unwrap();

    // A week later the line before goes, and what only it named.
    let store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    store.advance_clock(Duration::from_hours(24));
    store.start_backup(options(root)).await.unwrap();
    store.ship_backup().await;
    assert_eq!(list_backups(&root.join("backup")).unwrap().lines.len(), 2);
    assert_eq!(files(), 2);
    store.advance_clock(Duration::from_hours(8 * 24));
    store.ship_backup().await;
    assert_eq!(list_backups(&root.join("backup")).unwrap().lines.len(), 1);
    assert_eq!(files(), 1);
    let gone = restore(
        &root.join("backup"),
        &root.join("gone"),
        Some(with),
        &Options::default(),
    )
    .await;
    assert!(matches!(gone, Err(Error::Unusable { .. })), "{gone:?}");
    store.close().await.unwrap();
    let (_, new) = restored(root, None, "new").await;
    assert!(read_blob(&new, &repository, &blob.digest).await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_backup_of_a_running_and_of_a_stopped_directory() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let data = root.join("data");
    let store = Store::open(&data, Options::default()).await.unwrap();
    push_image(&store, &repository, 1, &["v1"]).await;
    let id = store
        .start_upload(&repository, oci::Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &id).await.unwrap();
    writer.write(content(9, 50_000)).await.unwrap();
    writer.record().await.unwrap();
    let first = backup(&data, &root.join("backup"), false).await.unwrap();
    assert_eq!((first.objects, first.object_bytes), (1, 40_000));
    push_image(&store, &repository, 2, &["v2"]).await;
    store.close().await.unwrap();
    let second = backup(&data, &root.join("backup"), true).await.unwrap();
    assert_eq!(second.objects, 2);

    let (_, old) = restored(root, Some(first.at), "old").await;
    assert_eq!(old.tags(&repository, None, 9).await.unwrap(), ["v1"]);
    // The upload is over, and its end finds no object.
    assert!(matches!(
        old.upload_offset(&repository, &id).await,
        Err(Error::UploadUnknown)
    ));
    old.maintain_once().await.unwrap();
    assert_eq!(old.statistics().await.unwrap().uploads, 0);
    old.close().await.unwrap();
    assert!(
        verify_store(&root.join("old"))
            .await
            .unwrap()
            .problems
            .is_empty()
    );
    let (_, new) = restored(root, None, "new").await;
    assert_eq!(new.tags(&repository, None, 9).await.unwrap(), ["v1", "v2"]);

    // Into what is not empty, or in use, nothing is restored.
    for to in ["new", "data"] {
        let refused = restore(
            &root.join("backup"),
            &root.join(to),
            None,
            &Options::default(),
        )
        .await;
        assert!(
            matches!(refused, Err(Error::Unusable { .. })),
            "{refused:?}"
        );
    }
    // Directories inside one another, also through a link or where nothing is yet.
    std::os::unix::fs::symlink(&data, root.join("link")).unwrap();
    for inside in ["data", "data/inner/deep", "link/inner"] {
        let refused = backup(&data, &root.join(inside), false).await;
        assert!(
            matches!(refused, Err(Error::Unusable { .. })),
            "{refused:?}"
        );
        assert!(!data.join("inner").exists());
    }
    let to = root.join("backup/inside");
    let refused = restore(&root.join("backup"), &to, None, &Options::default()).await;
    assert!(
        matches!(refused, Err(Error::Unusable { .. })),
        "{refused:?}"
    );
    assert!(!to.exists());
    let store = Store::open(&data, Options::default()).await.unwrap();
    let refused = store
        .start_backup(BackupOptions::new(data.join("inner")))
        .await;
    assert!(
        matches!(refused, Err(Error::Unusable { .. })),
        "{refused:?}"
    );
    store.close().await.unwrap();
    let nothing = backup(&root.join("nothing"), &root.join("b2"), false).await;
    assert!(matches!(nothing, Err(Error::Damaged { .. })), "{nothing:?}");
    std::fs::create_dir(root.join("home")).unwrap();
    std::fs::write(root.join("home/letter.txt"), b"dear").unwrap();
    let foreign = backup(&data, &root.join("home"), false).await;
    assert!(
        matches!(foreign, Err(Error::Unusable { .. })),
        "{foreign:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_fails_stops_nothing_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let repository = name("a/b");
    let store = backed_up(root).await;
    let backup = root.join("backup");
    let away = root.join("away");
    std::fs::rename(&backup, &away).unwrap();
    push_image(&store, &repository, 1, &["v1"]).await;
    store.ship_backup().await;
    let status = store.backup_status().unwrap();
    assert_eq!(status.failures, 1);
    assert!(status.problem.is_some());
    store.ping().await.unwrap();
    push_image(&store, &repository, 2, &["v2"]).await;
    std::fs::rename(&away, &backup).unwrap();
    store.ship_backup().await;
    assert_eq!(store.backup_status().unwrap().problem, None);
    store.close().await.unwrap();
    assert_eq!(list_backups(&backup).unwrap().lines.len(), 1);
    let (_, new) = restored(root, None, "new").await;
    assert_eq!(new.tags(&repository, None, 9).await.unwrap(), ["v1", "v2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn points_under_load_hold_all_that_was_acknowledged_before() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let store = backed_up(root).await;
    let repository = name("a/b");
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = Vec::new();
    for writer in 0..4_u64 {
        let (store, repository, stopped) = (store.clone(), repository.clone(), stopped.clone());
        writers.push(tokio::spawn(async move {
            let mut done = Vec::new();
            let mut number = 0;
            while !*stopped.borrow() {
                number += 1;
                let label = format!("w{writer}-{number}");
                let view =
                    push_image(&store, &repository, writer * 100_000 + number, &[&label]).await;
                // A third goes again at once, with what it named.
                let deleted = number % 3 == 0;
                if deleted {
                    store
                        .delete_manifest(&repository, &described(&view).digest, &actor())
                        .await
                        .unwrap();
                    for blob in view.blobs() {
                        store
                            .delete_blob(&repository, &blob.digest, &actor())
                            .await
                            .unwrap();
                    }
                    store.maintain_once().await.unwrap();
                }
                done.push((label, deleted));
            }
            done
        }));
    }
    let mut points = Vec::new();
    for _ in 0..12 {
        let before = store.event_bounds().await.unwrap().newest;
        store.ship_backup().await;
        let after = store.event_bounds().await.unwrap().newest;
        points.push((point(&store), before, after));
    }
    stop.send(true).unwrap();
    let mut done = Vec::new();
    for writer in writers {
        done.extend(writer.await.unwrap());
    }
    store.close().await.unwrap();
    for (index, (at, before, after)) in points.into_iter().enumerate() {
        let (_, old) = restored(root, Some(at), &format!("at-{index}")).await;
        let newest = old.event_bounds().await.unwrap().newest;
        assert!(
            (before..=after).contains(&newest),
            "{before} <= {newest} <= {after}"
        );
    }
    let (_, new) = restored(root, None, "new").await;
    for (label, deleted) in done {
        let found = new.manifest(&repository, &by_tag(&label)).await.unwrap();
        assert_eq!(found.is_none(), deleted, "{label}");
    }
}

fn count(root: &Path) -> usize {
    let mut found = 0;
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found += 1;
            }
        }
    }
    found
}
