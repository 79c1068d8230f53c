//! The sections `retention` and `scrub`.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use store::{Keep, Pattern, Policy, Retention as Checked};

use super::{Size, bytes, period};

/// `scrub` as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Scrub {
    rate: Option<Size>,
    period: Option<String>,
}

impl Scrub {
    pub(super) fn apply(self, options: &mut store::Options) -> anyhow::Result<()> {
        if let Some(rate) = &self.rate {
            options.scrub_rate = bytes("scrub.rate", rate)?;
        }
        if let Some(text) = &self.period {
            options.scrub_period = period("scrub.period", text)?;
            if options.scrub_period < Duration::from_hours(1) {
                anyhow::bail!(
                    "`scrub.period` must be 1h or more; to switch the scrub off write `scrub: {{rate: 0}}`"
                );
            }
        }
        Ok(())
    }
}

/// `retention` as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Retention {
    interval: Option<String>,
    window: Option<String>,
    policies: Vec<RawPolicy>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPolicy {
    repositories: Vec<oci::Glob>,
    keep: Vec<RawKeep>,
    untagged: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawKeep {
    tags: Vec<oci::Glob>,
    regex: Option<String>,
    semver: Option<String>,
    newest: Option<u32>,
    newest_pulled: Option<u32>,
    pushed_within: Option<String>,
    pulled_within: Option<String>,
    signed: bool,
}

impl Retention {
    /// Lays these settings over those of the store. `options.lease` is known by now.
    pub(super) fn apply(self, options: &mut store::Options) -> anyhow::Result<()> {
        let mut checked = Checked::default();
        if let Some(text) = &self.interval {
            checked.interval = period("retention.interval", text)?;
            if checked.interval < Duration::from_mins(1) {
                anyhow::bail!("`retention.interval` must be 1m or more");
            }
        }
        checked.window = match self.window.as_deref().map(str::trim) {
            None | Some("always" | "") => None,
            Some(text) => Some(text.parse().map_err(|error: store::WindowError| {
                anyhow::anyhow!("`retention.window`: {error}, or `always`")
            })?),
        };
        for (raw, number) in self.policies.into_iter().zip(1..) {
            let policy = raw.check(options).map_err(|problem| {
                anyhow::anyhow!("`retention.policies`, policy {number}: {problem}")
            })?;
            checked.policies.push(policy);
        }
        options.retention = Arc::new(checked);
        Ok(())
    }
}

impl RawPolicy {
    fn check(self, options: &store::Options) -> anyhow::Result<Policy> {
        if self.repositories.is_empty() {
            anyhow::bail!("`repositories` is empty, name a pattern such as `**`");
        }
        let untagged = self
            .untagged
            .map(|text| period("untagged", &text))
            .transpose()?;
        if untagged.is_some_and(|time| time < options.lease) {
            anyhow::bail!(
                "`untagged` must not be shorter than the lease, which is {} hours",
                options.lease.as_secs() / 3600
            );
        }
        let mut keep = Vec::with_capacity(self.keep.len());
        for (raw, number) in self.keep.into_iter().zip(1..) {
            keep.push(
                raw.check()
                    .map_err(|problem| anyhow::anyhow!("rule {number}: {problem}"))?,
            );
        }
        Ok(Policy {
            repositories: self.repositories,
            keep,
            untagged,
        })
    }
}

impl RawKeep {
    fn check(self) -> anyhow::Result<Keep> {
        for (key, count) in [
            ("newest", self.newest),
            ("newest_pulled", self.newest_pulled),
        ] {
            if count.is_some_and(|count| !(1..=MAX_COUNT).contains(&count)) {
                anyhow::bail!("`{key}` must be between 1 and {MAX_COUNT}");
            }
        }
        let within =
            |key: &str, text: Option<String>| text.map(|text| period(key, &text)).transpose();
        let keep = Keep {
            tags: self.tags,
            regex: self
                .regex
                .map(|text| {
                    Pattern::new(&text).map_err(|problem| {
                        anyhow::anyhow!("`regex`: `{text}` is no regular expression: {problem}")
                    })
                })
                .transpose()?,
            semver: self
                .semver
                .map(|text| {
                    text.parse().map_err(|error| {
                        anyhow::anyhow!(
                            "`semver`: `{text}` is no range, write for example `>=1.2, <3`: {error}"
                        )
                    })
                })
                .transpose()?,
            newest: self.newest,
            newest_pulled: self.newest_pulled,
            pushed_within: within("pushed_within", self.pushed_within)?,
            pulled_within: within("pulled_within", self.pulled_within)?,
            signed: self.signed,
        };
        if keep.is_empty() {
            anyhow::bail!("it has no condition; to keep every tag leave `keep` out");
        }
        Ok(keep)
    }
}

/// Tags that a rule may count: so many names are held in memory.
const MAX_COUNT: u32 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(text: &str) -> anyhow::Result<store::Options> {
        let raw: Retention = serde_saphyr::from_str(text)?;
        let mut options = store::Options::default();
        raw.apply(&mut options)?;
        Ok(options)
    }

    #[test]
    fn a_whole_example() {
        let options = apply(
            "interval: 12h\nwindow: 02:00-05:00\npolicies:\n\
             - repositories: [\"shop/**\"]\n  untagged: 7d\n  keep:\n\
             \x20 - {tags: [\"release-*\"]}\n  - {semver: \">=1.0, <3\", newest: 10}\n\
             \x20 - {regex: \"^pr-[0-9]+$\", pushed_within: 14d}\n  - {pulled_within: 90d}\n  - {signed: true}\n",
        )
        .unwrap();
        let retention = &options.retention;
        assert_eq!(retention.interval, Duration::from_hours(12));
        assert_eq!(retention.window.unwrap().to_string(), "02:00-05:00");
        let rules: Vec<_> = retention.policies[0]
            .keep
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            rules,
            [
                "tags `release-*`",
                "semver `>=1.0, <3`, newest 10",
                "regex `^pr-[0-9]+$`, pushed within 14d",
                "pulled within 90d",
                "signed",
            ]
        );
        assert_eq!(
            retention.policies[0].untagged,
            Some(Duration::from_hours(168))
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (policy, hint) in [
            ("{keep: [{newest: 1}]}", "`repositories` is empty"),
            ("{repositories: [a], keep: [{}]}", "no condition"),
            ("{repositories: [a], keep: [{newest: 0}]}", "between 1 and"),
            (
                "{repositories: [a], keep: [{signed: true}, {regex: \"(\"}]}",
                "policy 1: rule 2: `regex`",
            ),
            (
                "{repositories: [a], keep: [{semver: \"=>1\"}]}",
                "is no range",
            ),
            (
                "{repositories: [a], untagged: 1h}",
                "not be shorter than the lease",
            ),
            ("{repositories: [a], keep: [{newes: 1}]}", "newes"),
        ] {
            let error = apply(&format!("policies: [{policy}]")).unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains(hint), "{policy}: {text}");
        }
        assert!(apply("window: noon").is_err());
        assert!(apply("interval: 1s").is_err());
    }
}
