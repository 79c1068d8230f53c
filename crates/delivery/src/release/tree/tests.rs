use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

#[track_caller]
fn check(patterns: &str, ignored: &[&str], kept: &[&str]) {
    let ignore = Ignore::parse(patterns);
    let matches = |name: &str| match name.strip_suffix('/') {
        Some(name) => ignore.matches(name, true),
        None => ignore.matches(name, false),
    };
    for name in ignored {
        assert!(matches(name), "`{name}` is kept by {patterns:?}");
    }
    for name in kept {
        assert!(!matches(name), "`{name}` is ignored by {patterns:?}");
    }
}

#[test]
fn litter_is_left_out() {
    check(
        "",
        &[
            ".git/",
            ".git",
            "sub/.git/",
            "a~",
            "d/.x.swp",
            "#a#",
            ".#a",
            ".longshoreignore",
            ".DS_Store",
        ],
        &[
            "compose.yaml",
            ".env",
            ".gitignore",
            ".github/",
            "swp",
            "#a",
        ],
    );
}

#[test]
fn patterns_are_those_of_gitignore() {
    check(
        "*.log\n!keep.log\n",
        &["a.log", "d/b.log"],
        &["keep.log", "a.logs"],
    );
    check("/only\n", &["only"], &["d/only"]);
    check("d/x\n", &["d/x"], &["e/d/x"]);
    check("tmp/\n", &["tmp/", "d/tmp/"], &["tmp"]);
    check("d/**/x\n", &["d/x", "d/a/x", "d/a/b/x"], &["d/ax", "x"]);
    check("**/x\n", &["x", "a/x", "a/b/x"], &["ax"]);
    check("d/**\n", &["d/a", "d/a/b"], &["d", "e/a"]);
    check("d/*\n", &["d/a"], &["d/a/b"]);
    check(
        "[a-c]?.t[!x]t\n",
        &["az.tyt", "d/bb.tat"],
        &["dz.tyt", "az.txt"],
    );
    check("# comment\n\\#x\n", &["#x"], &["# comment", "comment"]);
    check(".git\n!.git\n", &[], &[".git/"]);
}

#[test]
fn paths_stay_in_the_tree() {
    assert_eq!(normal("", "./a//b/").as_deref(), Some("a/b"));
    assert_eq!(normal("d", "../a").as_deref(), Some("a"));
    assert_eq!(normal("d", "..").as_deref(), Some(""));
    assert_eq!(normal("d", "../../a"), None);
    assert_eq!(normal("", "/a"), None);
}

#[test]
fn what_is_no_file_is_a_finding() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::write(root.join("a"), "x").unwrap();
    fs::write(root.join("hidden"), "x").unwrap();
    fs::set_permissions(root.join("hidden"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(root.join("closed")).unwrap();
    fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    symlink("a", root.join("link")).unwrap();
    fs::create_dir(root.join(".git")).unwrap();
    symlink("nowhere", root.join(".git/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("pipe"),
        rustix::fs::FileType::Fifo,
        0o644.into(),
        0,
    )
    .unwrap();
    let mut findings = Vec::new();
    let tree = Tree::walk(root, &mut findings).unwrap();
    let mut files: Vec<_> = findings.iter().map(|found| found.file.as_str()).collect();
    files.sort_unstable();
    assert_eq!(files, ["closed", "hidden", "link", "pipe"]);
    assert_eq!(
        tree.entries.keys().collect::<Vec<_>>(),
        ["a", "closed", "hidden"]
    );
}

proptest::proptest! {
    #[test]
    fn any_pattern_ends(pattern in "[a*?\\[\\]!/\\\\-]{0,30}", name in "[a/b]{0,30}") {
        Ignore::parse(&pattern).matches(&name, false);
    }
}
