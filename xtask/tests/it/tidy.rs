//! What no compiler checks: the habits of the house, over all sources.

use std::fs;
use std::path::{Path, PathBuf};

/// The longest file. What does not fit is two rooms.
const LINES: usize = 1000;

#[test]
fn sources_are_tidy() {
    let mut problems = Vec::new();
    for path in files(super::root(), "rs") {
        let text = fs::read_to_string(&path).unwrap();
        let name = path
            .strip_prefix(super::root())
            .unwrap()
            .display()
            .to_string();
        problems.extend(source(&name, &text));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn manifests_are_tidy() {
    let mut problems = Vec::new();
    for path in files(super::root(), "toml") {
        if path.file_name().is_none_or(|name| name != "Cargo.toml") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let name = path
            .strip_prefix(super::root())
            .unwrap()
            .display()
            .to_string();
        problems.extend(manifest(&name, &text));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn cargo_run_without_a_name_means_the_program() {
    // The README's first command is `cargo run --release -- demo`.
    let readme = fs::read_to_string(super::root().join("README.md")).unwrap();
    assert!(readme.contains("cargo run --release -- demo"));
    let output = std::process::Command::new(env!("CARGO"))
        .current_dir(super::root())
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let default = metadata["workspace_default_members"].as_array().unwrap();
    assert_eq!(default.len(), 1, "{default:?}");
    assert!(
        default[0].as_str().unwrap().contains("longshore"),
        "{default:?}"
    );
}

#[test]
fn the_documents_are_there() {
    for name in [
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "deny.toml",
    ] {
        assert!(super::root().join(name).is_file(), "{name} is missing");
    }
    let license = fs::read_to_string(super::root().join("LICENSE")).unwrap();
    assert!(license.contains("Apache License") && license.contains("END OF TERMS AND CONDITIONS"));
}

#[test]
fn untidiness_is_seen() {
    assert!(source("crates/a/src/b.rs", "//! Docs.\n").is_empty());
    let ignore = concat!("#[ign", "ore]\n");
    let allow = concat!("#[all", "ow(dead_code)]\n");
    let stub = concat!("fn a() { to", "do!() }\n");
    for (name, text) in [
        ("crates/a/src/lib.rs", "mod b;\n"),
        ("crates/a/src/b/mod.rs", "//! Docs.\n"),
        ("crates/a/src/b.rs", ignore),
        ("crates/a/src/b.rs", allow),
        ("crates/a/src/b.rs", stub),
        ("crates/a/src/b.rs", "let a = 1; \n"),
    ] {
        assert_eq!(source(name, text).len(), 1, "{name}: {text}");
    }
    assert!(
        manifest(
            "x/Cargo.toml",
            "[dependencies]\na.workspace = true\nb.workspace = true\n"
        )
        .is_empty()
    );
    for text in [
        "[dependencies]\nb.workspace = true\na.workspace = true\n",
        "[dependencies]\na = \"1\"\n",
    ] {
        assert_eq!(manifest("x/Cargo.toml", text).len(), 1, "{text}");
    }
}

fn source(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if name.ends_with("/mod.rs") {
        problems.push(format!(
            "{name}: rooms are `foo.rs` beside `foo/`, never `mod.rs`"
        ));
    }
    let root = ["src/lib.rs", "src/main.rs", "tests/it/main.rs"]
        .iter()
        .any(|end| name.ends_with(end));
    if root && !text.starts_with("//!") {
        problems.push(format!("{name}: a crate begins with what it is (`//!`)"));
    }
    let lines = text.lines().count();
    if lines > LINES {
        problems.push(format!("{name}: {lines} lines; split it"));
    }
    // Put together here, so that this file does not accuse itself.
    let ignored = concat!("#[ign", "ore");
    let allowed = concat!("[all", "ow(");
    let stubs = [concat!("to", "do!("), concat!("unimple", "mented!(")];
    for (index, line) in text.lines().enumerate() {
        let at = format!("{name}:{}", index + 1);
        let code = line.split("//").next().unwrap_or("");
        if line.contains(ignored) {
            problems.push(format!("{at}: a test that is not run is not a test"));
        }
        if code.contains(allowed) {
            problems.push(format!("{at}: `#[expect(lint, reason = …)]` instead"));
        }
        if stubs.iter().any(|stub| code.contains(stub)) {
            problems.push(format!("{at}: an unfinished place"));
        }
        if line.ends_with([' ', '\t']) {
            problems.push(format!("{at}: white space at the end"));
        }
    }
    problems
}

fn manifest(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut section = "";
    let mut last = "";
    for line in text.lines() {
        if line.starts_with('[') {
            section = line;
            last = "";
            continue;
        }
        let key = line.split(['.', '=', ' ']).next().unwrap_or("");
        if !section.contains("dependencies")
            || key.is_empty()
            || key.starts_with('#')
            || line.starts_with(' ')
        {
            continue;
        }
        // Cargo takes both signs for one, so the order does as well.
        if key.replace('_', "-") < last.replace('_', "-") {
            problems.push(format!("{name}: {section}: `{key}` stands after `{last}`"));
        }
        last = key;
        if section != "[workspace.dependencies]" && !line.contains("workspace") {
            problems.push(format!(
                "{name}: the version of `{key}` belongs into [workspace.dependencies]"
            ));
        }
    }
    problems
}

fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("the repository can be read") {
        let path = entry.expect("the repository can be read").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(files(&path, ending));
            }
        } else if path.extension().is_some_and(|found| found == ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}
