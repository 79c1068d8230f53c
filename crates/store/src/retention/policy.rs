//! What a policy says of a tag. Pure: values in, a verdict out.
//!
//! The first policy whose patterns match a repository decides alone. A policy keeps a tag when one of its rules does;
//! a rule keeps a tag when all of its conditions hold. So one more rule never removes a tag that was kept. A policy
//! without rules keeps every tag.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use oci::{Glob, RepositoryName, Tag};
use semver::{Version, VersionReq};

use crate::clock::Timestamp;

/// Which tags of which repositories are kept.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The repositories it is for.
    pub repositories: Vec<Glob>,
    /// A tag is kept when one of these keeps it. Without any, every tag is kept.
    pub keep: Vec<Keep>,
    /// How long a manifest without a tag is kept in these repositories, where that is longer than the lease.
    pub untagged: Option<Duration>,
}

/// One rule. All of its conditions must hold; `newest` and `newest_pulled` count among the tags for which the others do.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    /// The tag matches one of these.
    pub tags: Vec<Glob>,
    /// A part of the tag matches this regular expression; `^` and `$` make it the whole.
    pub regex: Option<Pattern>,
    /// The tag, without a leading `v`, is a semantic version in this range.
    pub semver: Option<VersionReq>,
    /// It is among so many that were moved last.
    pub newest: Option<u32>,
    /// It is among so many whose manifests were pulled last.
    pub newest_pulled: Option<u32>,
    /// It was moved within this time.
    pub pushed_within: Option<Duration>,
    /// Its manifest was pulled within this time.
    pub pulled_within: Option<Duration>,
    /// A signature is attached to its manifest. Whose it is and whether it is right is not judged.
    pub signed: bool,
}

/// A regular expression of a rule.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: regex_lite::Regex,
}

impl Pattern {
    /// Reads a regular expression.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.len() > MAX_PATTERN {
            return Err(format!("it is longer than {MAX_PATTERN} bytes"));
        }
        match regex_lite::Regex::new(text) {
            Ok(regex) => Ok(Self {
                text: text.to_owned(),
                regex,
            }),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

/// What a policy looks at.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) tag: Tag,
    /// When the tag was moved last.
    pub(crate) pushed: Timestamp,
    /// The beginning of the hour in which its manifest was pulled last, as far as statistics go back.
    pub(crate) pulled: Option<Timestamp>,
    pub(crate) pinned: bool,
    pub(crate) signed: bool,
}

/// What becomes of a tag, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It stays.
    pub keeps: bool,
    /// Which rule says so, or that none does.
    pub reason: String,
}

impl Policy {
    /// Tells whether it is for this repository.
    pub fn matches(&self, repository: &RepositoryName) -> bool {
        self.repositories
            .iter()
            .any(|glob| glob.matches(repository.as_str()))
    }

    /// The first of `policies` that is for a repository, with its number from 1.
    pub fn first<'a>(
        policies: &'a [Self],
        repository: &RepositoryName,
    ) -> Option<(usize, &'a Self)> {
        policies
            .iter()
            .zip(1..)
            .find(|(policy, _)| policy.matches(repository))
            .map(|(policy, number)| (number, policy))
    }

    pub(crate) fn asks_for_signatures(&self) -> bool {
        self.keep.iter().any(|keep| keep.signed)
    }

    /// Judges a tag. `ranking` has seen every tag of the repository.
    pub(crate) fn judge(
        &self,
        number: usize,
        ranking: &Ranking,
        facts: &Facts,
        now: Timestamp,
    ) -> Verdict {
        let keeps = |reason: String| Verdict {
            keeps: true,
            reason,
        };
        if facts.pinned {
            return keeps("it is pinned".to_owned());
        }
        if self.keep.is_empty() {
            return keeps(format!("policy {number} keeps every tag"));
        }
        for (index, rule) in self.keep.iter().enumerate() {
            if rule.selects(facts, now) && ranking.holds(index, rule, facts) {
                return keeps(format!("policy {number}, rule {}: {rule}", index + 1));
            }
        }
        Verdict {
            keeps: false,
            reason: format!("no rule of policy {number} keeps it"),
        }
    }
}

impl Keep {
    /// A rule without a condition would keep every tag by accident.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
            && self.regex.is_none()
            && self.semver.is_none()
            && self.newest.is_none()
            && self.newest_pulled.is_none()
            && self.pushed_within.is_none()
            && self.pulled_within.is_none()
            && !self.signed
    }

    /// Every condition but the two that count.
    fn selects(&self, facts: &Facts, now: Timestamp) -> bool {
        let tag = facts.tag.as_str();
        let within =
            |at: Timestamp, time: &Option<Duration>| time.is_none_or(|time| at >= now.minus(time));
        (self.tags.is_empty() || self.tags.iter().any(|glob| glob.matches(tag)))
            && self
                .regex
                .as_ref()
                .is_none_or(|pattern| pattern.regex.is_match(tag))
            && self
                .semver
                .as_ref()
                .is_none_or(|range| version(tag).is_some_and(|version| range.matches(&version)))
            && within(facts.pushed, &self.pushed_within)
            && (self.pulled_within.is_none()
                || facts
                    .pulled
                    .is_some_and(|at| within(at, &self.pulled_within)))
            && (!self.signed || facts.signed)
    }
}

/// The version that a tag is named after.
fn version(tag: &str) -> Option<Version> {
    Version::parse(tag.strip_prefix('v').unwrap_or(tag)).ok()
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.tags.is_empty() {
            let globs: Vec<_> = self.tags.iter().map(|glob| format!("`{glob}`")).collect();
            parts.push(format!("tags {}", globs.join(" or ")));
        }
        if let Some(pattern) = &self.regex {
            parts.push(format!("regex `{}`", pattern.text));
        }
        if let Some(range) = &self.semver {
            parts.push(format!("semver `{range}`"));
        }
        if let Some(count) = self.newest {
            parts.push(format!("newest {count}"));
        }
        if let Some(count) = self.newest_pulled {
            parts.push(format!("newest pulled {count}"));
        }
        if let Some(time) = self.pushed_within {
            parts.push(format!("pushed within {}", period(time)));
        }
        if let Some(time) = self.pulled_within {
            parts.push(format!("pulled within {}", period(time)));
        }
        if self.signed {
            parts.push("signed".to_owned());
        }
        f.write_str(&parts.join(", "))
    }
}

fn period(time: Duration) -> String {
    let seconds = time.as_secs();
    for (unit, length) in [("d", 86_400), ("h", 3600), ("m", 60)] {
        if seconds >= length && seconds.is_multiple_of(length) {
            return format!("{}{unit}", seconds / length);
        }
    }
    format!("{seconds}s")
}

/// Which tags are the newest, for each rule that counts. It holds no more than the rules ask for, however many tags
/// it is shown.
///
/// A tag that was pushed or pulled after the ranking was made is not in it. It is judged by whether it *would* be: it
/// ranks with what it is now against the last one that counted.
#[derive(Debug)]
pub(crate) struct Ranking(Vec<Ranks>);

#[derive(Debug, Default)]
struct Ranks {
    pushed: BTreeSet<(Timestamp, String)>,
    pulled: BTreeSet<(Timestamp, String)>,
}

impl Ranking {
    pub(crate) fn new(policy: &Policy) -> Self {
        Self(policy.keep.iter().map(|_| Ranks::default()).collect())
    }

    /// Whether the tags must be shown to it before they are judged.
    pub(crate) fn is_needed(policy: &Policy) -> bool {
        policy
            .keep
            .iter()
            .any(|rule| rule.newest.is_some() || rule.newest_pulled.is_some())
    }

    pub(crate) fn add(&mut self, policy: &Policy, facts: &Facts, now: Timestamp) {
        for (rule, ranks) in policy.keep.iter().zip(&mut self.0) {
            if !rule.selects(facts, now) {
                continue;
            }
            if let Some(count) = rule.newest {
                insert(&mut ranks.pushed, facts.pushed, &facts.tag, count);
            }
            if let (Some(count), Some(pulled)) = (rule.newest_pulled, facts.pulled) {
                insert(&mut ranks.pulled, pulled, &facts.tag, count);
            }
        }
    }

    fn holds(&self, index: usize, rule: &Keep, facts: &Facts) -> bool {
        let Some(ranks) = self.0.get(index) else {
            return false;
        };
        let is_among = |ranks: &BTreeSet<(Timestamp, String)>, count: u32, at: Timestamp| {
            let least = ranks.first().filter(|_| ranks.len() >= count as usize);
            least.is_none_or(|least| (at, facts.tag.as_str()) >= (least.0, least.1.as_str()))
        };
        rule.newest
            .is_none_or(|count| is_among(&ranks.pushed, count, facts.pushed))
            && rule.newest_pulled.is_none_or(|count| {
                facts
                    .pulled
                    .is_some_and(|pulled| is_among(&ranks.pulled, count, pulled))
            })
    }
}

/// Keeps the `count` highest.
fn insert(set: &mut BTreeSet<(Timestamp, String)>, at: Timestamp, tag: &Tag, count: u32) {
    set.insert((at, tag.as_str().to_owned()));
    if set.len() > count as usize {
        set.pop_first();
    }
}

const MAX_PATTERN: usize = 256;

#[cfg(test)]
mod tests;
