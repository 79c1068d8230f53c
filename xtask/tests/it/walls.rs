//! Who may depend on whom. The list is the design; a new line here is a decision, not a fix.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Each crate of the house with the crates of the house that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("oci", &[]),
    ("store", &["oci"]),
    ("trust", &["oci"]),
    ("client", &["oci"]),
    ("registry", &["client", "oci", "store", "trust"]),
    ("delivery", &["client", "oci", "trust"]),
    (
        "longshore",
        &["client", "delivery", "oci", "registry", "store", "trust"],
    ),
    // The tests see what a user sees, so they may link nothing of it.
    ("e2e", &[]),
    ("xtask", &["e2e"]),
];

/// Each heavy dependency with its one owner.
const OWNERS: &[(&str, &str)] = &[
    ("argon2", "registry"),
    ("axum", "registry"),
    ("bcrypt", "registry"),
    ("bollard", "delivery"),
    ("cel", "trust"),
    ("cryptoki", "longshore"),
    ("crypto_secretbox", "trust"),
    ("hickory-resolver", "client"),
    ("jsonwebtoken", "registry"),
    ("object_store", "store"),
    ("p256", "trust"),
    ("prometheus-client", "registry"),
    ("reqwest", "client"),
    ("rusqlite", "store"),
    ("scrypt", "trust"),
    ("tokio-postgres", "store"),
];

/// Crates that are pure: values and bytes only, no runtime and no clock of an edge.
const PURE: &[&str] = &["oci", "trust"];

/// What a pure crate may not use.
const IMPURE: &[&str] = &[
    "hyper",
    "reqwest",
    "rustix",
    "tokio",
    "tokio-util",
    "getrandom",
];

#[test]
fn dependencies_keep_to_the_walls() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--locked"])
        .current_dir(super::root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut graph = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap().to_owned();
        let uses: BTreeSet<String> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            // Tests of a crate are bound to what it may use, too: of any kind, then.
            .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
            .collect();
        graph.insert(name, uses);
    }
    let broken = broken(&graph);
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn a_broken_wall_is_seen() {
    let graph = |name: &str, uses: &[&str]| {
        let mut graph: BTreeMap<String, BTreeSet<String>> = MAY_USE
            .iter()
            .map(|(name, _)| ((*name).to_owned(), BTreeSet::new()))
            .collect();
        graph.insert(
            name.to_owned(),
            uses.iter().map(|name| (*name).to_owned()).collect(),
        );
        graph
    };
    assert!(broken(&graph("delivery", &["oci", "bollard"])).is_empty());
    for (name, uses) in [
        ("delivery", "store"),
        ("delivery", "registry"),
        ("oci", "store"),
        ("registry", "delivery"),
        ("store", "axum"),
        ("registry", "rusqlite"),
        ("trust", "tokio"),
        ("e2e", "client"),
        ("stranger", "serde"),
    ] {
        assert_eq!(
            broken(&graph(name, &[uses])).len(),
            1,
            "{name} using {uses}"
        );
    }
}

fn broken(graph: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut broken = Vec::new();
    for (name, uses) in graph {
        let Some((_, allowed)) = MAY_USE.iter().find(|(known, _)| known == name) else {
            broken.push(format!(
                "`{name}` is a crate that no wall knows: add it here and in ARCHITECTURE.md"
            ));
            continue;
        };
        for used in uses {
            if graph.contains_key(used) && !allowed.contains(&used.as_str()) {
                broken.push(format!("`{name}` must not use `{used}`"));
            }
            if let Some((_, owner)) = OWNERS.iter().find(|(heavy, _)| heavy == used)
                && owner != name
            {
                broken.push(format!(
                    "`{used}` belongs to `{owner}` alone, and `{name}` uses it"
                ));
            }
            if PURE.contains(&name.as_str()) && IMPURE.contains(&used.as_str()) {
                broken.push(format!("`{name}` is pure and must not use `{used}`"));
            }
        }
    }
    for (name, _) in MAY_USE {
        if !graph.contains_key(*name) {
            broken.push(format!(
                "`{name}` is gone from the workspace: take it out here, too"
            ));
        }
    }
    broken
}
