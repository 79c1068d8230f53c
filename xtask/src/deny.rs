//! `cargo xtask deny`: the rules of `deny.toml` over `cargo metadata`.
//!
//! The file is `cargo deny`'s own, and who has that program can use it on it. This one checks the parts that need nothing but
//! the metadata (licences, bans, duplicates, sources), so that CI depends on no further program; advisories need a database
//! from the network and are left to `cargo deny check advisories`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use serde::Deserialize;

use crate::shell;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
    #[serde(default)]
    exceptions: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Banned>,
    #[serde(default)]
    skip: Vec<Banned>,
}

#[derive(Debug, Deserialize)]
struct Banned {
    /// `name` or `name@version`.
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Checks; `false` when something is not allowed.
pub(crate) fn run() -> anyhow::Result<bool> {
    let text = std::fs::read_to_string(shell::root().join("deny.toml"))
        .context("cannot read deny.toml")?;
    let rules: Rules = toml::from_str(&text).context("deny.toml")?;
    let mut cargo = shell::cargo();
    cargo.args(["metadata", "--format-version", "1", "--locked"]);
    let metadata: Metadata =
        serde_json::from_str(&shell::read(&mut cargo)?).context("cargo metadata")?;
    // The metadata names what some feature could bring; the tree is what is really built.
    let mut cargo = shell::cargo();
    cargo.args([
        "tree",
        "--workspace",
        "--locked",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]);
    for target in &rules.graph.targets {
        cargo.args(["--target", target]);
    }
    let tree = shell::read(&mut cargo)?;
    let used: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let packages: Vec<&Package> = metadata
        .packages
        .iter()
        .filter(|package| used.contains(&(package.name.as_str(), package.version.as_str())))
        .collect();
    let problems = check(&rules, &packages);
    for problem in &problems {
        println!("denied: {problem}");
    }
    println!(
        "{} dependencies checked, {} problems",
        packages.len(),
        problems.len()
    );
    Ok(problems.is_empty())
}

fn check(rules: &Rules, packages: &[&Package]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        versions
            .entry(&package.name)
            .or_default()
            .insert(&package.version);
        let Some(source) = &package.source else {
            // One of ours.
            continue;
        };
        let name = format!("{} {}", package.name, package.version);
        if !source.starts_with("registry+") && !source.starts_with("sparse+") {
            problems.push(format!(
                "{name}: comes from `{source}`, and only the registry is allowed"
            ));
        }
        let mut allowed: Vec<&str> = rules.licenses.allow.iter().map(String::as_str).collect();
        for exception in rules
            .licenses
            .exceptions
            .iter()
            .filter(|exception| exception.name == package.name)
        {
            allowed.extend(exception.allow.iter().map(String::as_str));
        }
        let license = package.license.as_deref().unwrap_or("none stated");
        if !satisfied(license, &allowed) {
            problems.push(format!("{name}: licence `{license}` is not in deny.toml"));
        }
        if let Some(ban) = rules.bans.deny.iter().find(|ban| ban.name == package.name) {
            problems.push(format!("{name}: banned, {}", ban.reason));
        }
    }
    for (name, found) in &versions {
        let skipped = |version: &str| {
            rules
                .bans
                .skip
                .iter()
                .any(|skip| skip.name == format!("{name}@{version}"))
        };
        let left: Vec<&str> = found
            .iter()
            .copied()
            .filter(|version| !skipped(version))
            .collect();
        if left.len() > 1 {
            problems.push(format!(
                "{name}: {} versions ({}) and no `skip`",
                left.len(),
                left.join(", ")
            ));
        }
    }
    for skip in &rules.bans.skip {
        let (name, version) = skip.name.split_once('@').unwrap_or((&skip.name, ""));
        if !versions
            .get(name)
            .is_some_and(|found| found.len() > 1 && found.contains(version))
        {
            problems.push(format!(
                "deny.toml: the skip of `{}` ({}) is not needed any more",
                skip.name, skip.reason
            ));
        }
    }
    problems
}

/// Whether the allowed licences satisfy an SPDX expression.
fn satisfied(expression: &str, allowed: &[&str]) -> bool {
    // `/` is how crates wrote OR before expressions were checked.
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let value = or(&words, &mut at, allowed);
    value && at == words.len()
}

fn or(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut value = and(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        let right = and(words, at, allowed);
        value = value || right;
    }
    value
}

fn and(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut value = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        let right = one(words, at, allowed);
        value = value && right;
    }
    value
}

fn one(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    // Counted even when there is none, so that an expression that stops short never satisfies.
    *at += 1;
    let Some(word) = words.get(*at - 1) else {
        return false;
    };
    if *word == "(" {
        let value = or(words, at, allowed);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return value && closed;
    }
    let mut name = (*word).to_owned();
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1).copied().unwrap_or("");
        name = format!("{word} WITH {exception}");
        *at += 2;
    }
    allowed.contains(&name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions() {
        let allowed = [
            "MIT",
            "Apache-2.0",
            "Apache-2.0 WITH LLVM-exception",
            "Unicode-3.0",
        ];
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
        ] {
            assert!(satisfied(good, &allowed), "{good}");
        }
        for bad in [
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "",
            "none stated",
            "MIT OR",
            "(MIT",
            "GPL-3.0 WITH LLVM-exception",
        ] {
            assert!(!satisfied(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn each_rule_bites() {
        let rules: Rules = toml::from_str(
            "[graph]\ntargets = []\n[licenses]\nallow = [\"MIT\"]\n[bans]\n\
             deny = [{ crate = \"ring\", reason = \"r\" }]\nskip = [{ crate = \"old@1.0.0\", reason = \"r\" }]\n",
        )
        .unwrap();
        let package = |name: &str, version: &str, license: &str, source: &str| Package {
            name: name.to_owned(),
            version: version.to_owned(),
            license: Some(license.to_owned()),
            source: Some(source.to_owned()),
        };
        let all = [
            package("ring", "1.0.0", "MIT", "registry+x"),
            package("a", "1.0.0", "GPL-3.0", "registry+x"),
            package("b", "1.0.0", "MIT", "git+x"),
            package("c", "1.0.0", "MIT", "registry+x"),
            package("c", "2.0.0", "MIT", "registry+x"),
        ];
        let problems = check(&rules, &all.iter().collect::<Vec<_>>());
        assert_eq!(problems.len(), 5, "{problems:#?}");
    }
}
