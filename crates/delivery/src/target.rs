//! Targets: what an agent keeps running, and the agent's configuration file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use oci::Reference;

use crate::release::EngineKind;

pub mod config;

/// What an agent keeps running.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Its name, unique on this agent: `[a-z0-9][a-z0-9_-]*`.
    pub name: String,
    /// The channel (tag) or digest to follow.
    pub reference: Reference,
    /// The release name that is expected; a release of another name is rejected.
    pub release: String,
    /// The engine.
    pub engine: EngineKind,
    /// The Compose project; default: the target's name.
    pub project: String,
    /// Values for the release's open variables.
    pub variables: BTreeMap<String, String>,
    /// Compose profiles.
    pub profiles: Vec<String>,
    /// Who must have signed; `None` only where the configuration says `trust: none` in so many words.
    pub trust: Option<trust::Policy>,
    /// When it counts as healthy.
    pub health: Health,
    /// What happens when it does not.
    pub rollback: Rollback,
    /// Take over a Compose project that someone else made.
    pub adopt: bool,
    /// For `files`: where the symbolic link is, and the optional activate command and health checks.
    pub files: Option<FilesTarget>,
}
/// When a release counts as healthy.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Everything must be up and stay so for this long (10 s).
    pub stability: Duration,
    /// It must get there within this time (3 min).
    pub timeout: Duration,
    /// How often it is looked at (1 s).
    pub interval: Duration,
    /// HTTP URLs that must answer 2xx or 3xx.
    pub http: Vec<String>,
    /// A command that must exit 0 (files engine).
    pub command: Vec<String>,
}
/// What happens when a release is not healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rollback {
    /// Back to the last good release.
    Auto,
    /// Stop and report (`Broken`).
    Never,
}
/// The files engine's part of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesTarget {
    /// The symbolic link that is switched.
    pub path: PathBuf,
    /// Runs after the switch (argv), in the release directory.
    pub activate: Vec<String>,
    /// How long it may take.
    pub activate_timeout: Duration,
}

/// The known word nearest to what was typed, when it is near enough to be meant (at most a third of it is wrong).
pub fn nearest<'a>(typed: &str, known: &[&'a str]) -> Option<&'a str> {
    let typed = typed.to_lowercase().replace('-', "_");
    known
        .iter()
        .map(|word| {
            (
                distance(&typed, &word.to_lowercase().replace('-', "_")),
                *word,
            )
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, word)| *distance <= word.chars().count().max(3) / 3)
        .map(|(_, word)| word)
}

/// Edits (insertions, deletions, replacements, swaps of neighbors) between two words.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(LONGEST_WORD).collect();
    let b: Vec<char> = b.chars().take(LONGEST_WORD).collect();
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in table.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in table[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = table[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(table[i - 2][j - 2] + 1);
            }
            table[i][j] = best;
        }
    }
    table[a.len()][b.len()]
}

const LONGEST_WORD: usize = 64;
