use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::{Content, ContentError, Name, name, place, sweep, write_durably};

fn write(path: &Path, text: &str, mode: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_name_depends_on_bytes_names_and_the_execute_bit_alone() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path();
    write(&base.join("a"), "x", 0o644);
    write(&base.join("b"), "x", 0o600);
    write(&base.join("c"), "x", 0o755);
    write(&base.join("d"), "y", 0o644);
    let of = |path: &str| name(&base.join(path)).unwrap();
    assert_eq!(of("a"), of("b"));
    assert_ne!(of("a"), of("c"));
    assert_ne!(of("a"), of("d"));

    write(&base.join("t1/sub/f"), "x", 0o644);
    write(&base.join("t2/sub/f"), "x", 0o640);
    write(&base.join("t3/sub/g"), "x", 0o644);
    write(&base.join("t4/f"), "x", 0o644);
    assert_eq!(of("t1"), of("t2"));
    assert_ne!(of("t1"), of("t3"));
    assert_ne!(of("t1"), of("t4"));
    fs::create_dir(base.join("t2/empty")).unwrap();
    assert_ne!(of("t1"), of("t2"), "an empty directory counts");
}

#[test]
fn content_is_placed_with_its_modes_and_healed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("content");
    fs::create_dir(&root).unwrap();
    let source = dir.path().join("release/conf");
    write(&source.join("run.sh"), "#!", 0o700);
    write(&source.join("sub/a.txt"), "hello", 0o600);
    symlink("sub/a.txt", source.join("link")).unwrap();
    let content = Content {
        name: name(&source).unwrap(),
        source,
    };

    let placed = place(&root, &content).unwrap();
    assert_eq!(placed, root.join(content.name.as_str()));
    let mode = |path: &str| {
        fs::metadata(placed.join(path))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(
        (mode(""), mode("run.sh"), mode("sub"), mode("sub/a.txt")),
        (0o755, 0o755, 0o755, 0o644)
    );
    assert_eq!(fs::read_to_string(placed.join("link")).unwrap(), "hello");

    let before = fs::metadata(placed.join("sub/a.txt")).unwrap();
    place(&root, &content).unwrap();
    let after = fs::metadata(placed.join("sub/a.txt")).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::ino(&before),
        std::os::unix::fs::MetadataExt::ino(&after),
        "intact content is left alone"
    );

    fs::write(placed.join("sub/a.txt"), "tampered").unwrap();
    place(&root, &content).unwrap();
    assert_eq!(
        fs::read_to_string(placed.join("sub/a.txt")).unwrap(),
        "hello"
    );

    fs::set_permissions(placed.join("sub"), Permissions::from_mode(0o700)).unwrap();
    place(&root, &content).unwrap();
    assert_eq!(mode("sub"), 0o755);
}

#[test]
fn content_that_changed_since_the_plan_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("content");
    fs::create_dir(&root).unwrap();
    let source = dir.path().join("f");
    write(&source, "one", 0o644);
    let content = Content {
        name: name(&source).unwrap(),
        source: source.clone(),
    };
    write(&source, "two", 0o644);
    assert!(matches!(
        place(&root, &content),
        Err(ContentError::Changed(_))
    ));
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

#[test]
fn links_that_leave_and_devices_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    for (index, target) in ["/etc/passwd", "../outside", "sub/../../outside", ".."]
        .iter()
        .enumerate()
    {
        let tree = tree.join(index.to_string());
        fs::create_dir_all(&tree).unwrap();
        symlink(target, tree.join("l")).unwrap();
        assert!(
            matches!(name(&tree), Err(ContentError::Kind(_))),
            "{target}"
        );
    }
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(matches!(name(&socket), Err(ContentError::Kind(_))));
}

#[test]
fn only_what_nobody_keeps_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let (kept, gone) = ("a".repeat(64), "b".repeat(64));
    write(&root.join(&kept), "", 0o644);
    write(&root.join(&gone).join("f"), "", 0o644);
    write(&root.join(".new-123/content"), "", 0o644);
    write(&root.join("stranger"), "", 0o644);
    let keep = BTreeSet::from([Name::parse(&kept).unwrap()]);
    assert_eq!(sweep(root, &keep).unwrap(), 2);
    assert!(root.join(&kept).exists() && root.join("stranger").exists());
    assert!(!root.join(&gone).exists());
    assert_eq!(sweep(&root.join("missing"), &keep).unwrap(), 0);
}

#[test]
fn small_files_are_for_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    write_durably(&path, b"one").unwrap();
    write_durably(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
