//! A child process is killed at every point of backup, export and restore. Every point that was declared restores whole,
//! and what was exported is found again.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use store::{
    BackupOptions, Options, Store, Timestamp, list_backups, reindex, restore, verify_backup,
    verify_store,
};

use crate::engine::{by_tag, content, name, push_blob, push_image};

const DIRECTORY: &str = "STORE_BACKUP_KILL_DIRECTORY";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_point_leaves_every_declared_point_whole() {
    let ours = |point: &&&str| {
        ["backup.", "export.", "restore."]
            .iter()
            .any(|prefix| point.starts_with(prefix))
    };
    for point in store::failpoints().iter().filter(ours) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let output = child(root, point);
        assert_eq!(
            output.signal(),
            Some(9),
            "`{point}` was not passed: {output}"
        );
        let told = std::fs::read_to_string(root.join("told")).unwrap_or_default();
        check_points(root, point, &told).await;
        if matches!(*point, "restore.after_database" | "restore.after_objects") {
            // What the interrupted restore left is replaced.
            let to = root.join("restored");
            let restored = restore(&root.join("backup"), &to, None, &Options::default()).await;
            assert_eq!(restored.unwrap().problems, Vec::<String>::new());
            assert!(verify_store(&to).await.unwrap().problems.is_empty());
        }
        // The store itself never noticed, and its backup goes on.
        let checked = verify_store(&root.join("data")).await.unwrap();
        assert_eq!(checked.problems, Vec::<String>::new(), "`{point}`");
        let store = backed_up(root).await;
        push_image(&store, &name("a/b"), 999, &["after"]).await;
        store.ship_backup().await;
        assert_eq!(store.backup_status().unwrap().problem, None, "`{point}`");
        store.close().await.unwrap();
        check_points(
            root,
            point,
            &format!("{told}tag after\npoint {}\n", i64::MAX),
        )
        .await;
        // What was exported is found again.
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(root.join(format!("data/meta.db{end}")));
        }
        reindex(&root.join("data"), &Options::default(), |_| {})
            .await
            .unwrap();
        check_tags(&root.join("data"), point, &told, "exported").await;
    }
}

/// Restores the newest point that was told of and wants everything that was told before it.
async fn check_points(root: &Path, point: &str, told: &str) {
    let backup = root.join("backup");
    if !backup.join("backup.json").exists() {
        assert!(!told.contains("point"), "`{point}`");
        return;
    }
    let report = verify_backup(&backup).await.unwrap();
    assert_eq!(report.problems, Vec::<String>::new(), "`{point}`");
    let last = told
        .lines()
        .filter_map(|line| line.strip_prefix("point "))
        .next_back();
    let Some(last) = last else { return };
    assert!(!list_backups(&backup).unwrap().lines.is_empty());
    let to = tempfile::tempdir_in(root).unwrap();
    let at = Timestamp(last.parse().unwrap());
    let restored = restore(&backup, to.path(), Some(at), &Options::default())
        .await
        .unwrap();
    assert_eq!(restored.problems, Vec::<String>::new(), "`{point}`");
    let checked = verify_store(to.path()).await.unwrap();
    assert_eq!(checked.problems, Vec::<String>::new(), "`{point}`");
    check_tags(to.path(), point, told, "point").await;
}

/// Wants each tag that was told before the last line of this kind.
async fn check_tags(data: &Path, point: &str, told: &str, kind: &str) {
    let store = Store::open(data, Options::default()).await.unwrap();
    let lines: Vec<_> = told.lines().collect();
    let end = lines
        .iter()
        .rposition(|line| line.starts_with(kind))
        .unwrap_or_default();
    for line in &lines[..end] {
        if let Some(tag) = line.strip_prefix("tag ") {
            let found = store.manifest(&name("a/b"), &by_tag(tag)).await.unwrap();
            assert!(found.is_some(), "`{point}`: {line}");
        }
    }
    store.close().await.unwrap();
}

async fn backed_up(root: &Path) -> Store {
    let store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    let options = BackupOptions {
        every: Duration::from_hours(1),
        ..BackupOptions::new(root.join("backup"))
    };
    store.start_backup(options).await.unwrap();
    store
}

/// Does the work when it is the child of the test above, else nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_of_the_backup_kill_test() {
    let Some(root) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let mut file = std::fs::File::create(root.join("told")).unwrap();
    let mut tell = |line: String| writeln!(file, "{line}").unwrap();
    let repository = name("a/b");
    let mut store = Store::open(&root.join("data"), Options::default())
        .await
        .unwrap();
    let mut seed = 0;
    for _ in 0..2 {
        seed += 1;
        push_image(&store, &repository, seed, &[&format!("v{seed}")]).await;
        tell(format!("tag v{seed}"));
        store.export().await.unwrap();
        tell("exported".to_owned());
    }
    for round in 0..2_u64 {
        store.close().await.unwrap();
        store = backed_up(&root).await;
        for _ in 0..3 {
            seed += 1;
            push_image(&store, &repository, seed, &[&format!("v{seed}")]).await;
            tell(format!("tag v{seed}"));
            // Enough for the log to be folded.
            for blob in 0..180 {
                let bytes = content(round * 1000 + seed * 1_000_000 + blob, 16_000);
                push_blob(&store, &repository, &bytes).await;
            }
            store.ship_backup().await;
            let status = store.backup_status().unwrap();
            tell(format!("point {}", status.point.unwrap().0));
        }
    }
    // A week later the first line goes.
    store.advance_clock(Duration::from_hours(8 * 24));
    store.ship_backup().await;
    store.close().await.unwrap();
    let to = root.join("restored");
    let restored = restore(&root.join("backup"), &to, None, &Options::default()).await;
    restored.unwrap();
}

#[expect(
    clippy::disallowed_methods,
    reason = "the test starts itself as the process that is killed"
)]
fn child(root: &Path, point: &str) -> std::process::ExitStatus {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "backup_kill::child_of_the_backup_kill_test"])
        .env(DIRECTORY, root)
        .env("LONGSHORE_FAILPOINT", format!("{point}:1"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}
