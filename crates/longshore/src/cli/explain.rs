//! `longshore explain`: what the registry knows about one reference, in sections.

use anyhow::Context as _;
use clap::Args;
use client::longshore::api;
use oci::Digest;
use serde_json::{Value, json};

use super::Global;
use super::artifact::reference;
use super::gc::short;
use crate::output::{self, Exit, Refused};

/// Explain a reference: why it is kept, since when and until when.
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// `host/repository:tag` or `host/repository@digest`.
    reference: String,
}

impl Explain {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        if reference.tag.is_none() && reference.digest.is_none() {
            return Err(Refused::new(
                Exit::USAGE,
                format!("`{}` names neither a tag nor a digest", self.reference),
            )
            .into());
        }
        let client = global.client()?;
        let digest: Digest = match &reference.digest {
            Some(digest) => digest.clone(),
            None => {
                client
                    .repository(&reference.host, &reference.repository)
                    .head_manifest(&reference.tag_or_digest())
                    .await
                    .with_context(|| format!("cannot resolve `{reference}`"))?
                    .ok_or_else(|| client::Error::NotFound(reference.to_string()))?
                    .digest
            }
        };
        let path = format!(
            "repositories/{}/manifests/{digest}/kept",
            api::path_of(reference.repository.as_str())
        );
        let kept = api::get(&client, &reference.host, &path)
            .await
            .with_context(|| format!("cannot explain `{reference}`"))?;
        if global.json {
            output::json(&json!({
                "reference": reference.to_string(),
                "digest": digest,
                "kept": kept,
            }))?;
            return Ok(Exit::OK);
        }
        output::line(format!(
            "{}/{}@{digest}",
            reference.host, reference.repository
        ));
        output::line("");
        for line in section(&kept) {
            output::line(oci::text::escaped(&line));
        }
        Ok(Exit::OK)
    }
}

/// The section `kept`.
fn section(kept: &Value) -> Vec<String> {
    let until = kept["until"].as_str().map(short);
    let mut lines = Vec::new();
    lines.push(match (kept["kept"] == true, until) {
        (true, None) => "kept, until somebody takes away what keeps it:".to_owned(),
        (true, Some(until)) => format!("kept until {until}:"),
        (false, Some(until)) => format!("nothing keeps it: it goes after {until}"),
        (false, None) => "nothing keeps it".to_owned(),
    });
    list(&kept["reasons"], 1, &mut lines);
    if kept["more"] == true {
        lines.push("  … and there are more reasons".to_owned());
    }
    lines
}

fn list(reasons: &Value, depth: usize, lines: &mut Vec<String>) {
    for reason in reasons.as_array().into_iter().flatten() {
        lines.push(format!("{}{}", "  ".repeat(depth), sentence(reason)));
        list(&reason["because"], depth + 1, lines);
    }
}

fn sentence(reason: &Value) -> String {
    let text = |key: &str| reason[key].as_str().unwrap_or_default();
    let time = |key: &str| short(text(key));
    match text("kind") {
        "tag" => {
            let line = format!(
                "tag `{}`, since {}, by {}",
                text("tag"),
                time("since"),
                text("by")
            );
            let said = &reason["retention"];
            match (said["keeps"].as_bool(), said["reason"].as_str()) {
                (Some(true), Some(why)) => format!("{line} (retention keeps it: {why})"),
                (Some(false), Some(why)) => format!("{line} (retention will remove it: {why})"),
                _ => line,
            }
        }
        "pin" => {
            let mut line = format!("pinned by {} since {}", text("holder"), time("since"));
            if reason["until"].is_string() {
                line = format!("{line}, until {}", time("until"));
            }
            if text("reason").is_empty() {
                line
            } else {
                format!("{line}: {}", text("reason"))
            }
        }
        "lease" => format!(
            "lease{} until {}: it was pushed, asked for, or lost what kept it not long ago",
            since(reason),
            time("until")
        ),
        "index" => format!(
            "part of index {}{}, which is kept by",
            text("digest"),
            since(reason)
        ),
        "subject" => format!(
            "attached to {}{}, which is kept by",
            text("digest"),
            since(reason)
        ),
        "waits" => format!(
            "waits{} until {} for its subject {}, which was not pushed yet",
            since(reason),
            time("until"),
            text("digest")
        ),
        other => format!("{other} (a newer registry knows this reason)"),
    }
}

/// Older registries do not say it of every reason.
fn since(reason: &Value) -> String {
    reason["since"]
        .as_str()
        .map_or_else(String::new, |since| format!(" since {}", short(since)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_kept() {
        let at = "2026-01-02T03:04:05.000001Z";
        let kept = json!({
            "kept": true,
            "until": null,
            "more": true,
            "reasons": [
                { "kind": "tag", "tag": "v1", "since": at, "by": "user:alice" },
                { "kind": "tag", "tag": "v2", "since": at, "by": "user:alice",
                  "retention": { "keeps": false, "reason": "no rule of policy 1 keeps it" } },
                { "kind": "pin", "holder": "agent:host1", "reason": "runs", "since": at, "until": null },
                { "kind": "pin", "holder": "legal", "reason": "", "since": at, "until": at },
                { "kind": "lease", "since": at, "until": at },
                { "kind": "lease", "until": at },
                { "kind": "waits", "digest": "sha256:b", "since": at, "until": at },
                { "kind": "index", "digest": "sha256:a", "since": at, "because": [
                    { "kind": "subject", "digest": "sha256:c", "since": at, "because": [{ "kind": "new" }] }
                ] }
            ]
        });
        assert_eq!(
            section(&kept).join("\n"),
            "\
kept, until somebody takes away what keeps it:
  tag `v1`, since 2026-01-02T03:04:05Z, by user:alice
  tag `v2`, since 2026-01-02T03:04:05Z, by user:alice (retention will remove it: no rule of policy 1 keeps it)
  pinned by agent:host1 since 2026-01-02T03:04:05Z: runs
  pinned by legal since 2026-01-02T03:04:05Z, until 2026-01-02T03:04:05Z
  lease since 2026-01-02T03:04:05Z until 2026-01-02T03:04:05Z: it was pushed, asked for, or lost what kept it not long ago
  lease until 2026-01-02T03:04:05Z: it was pushed, asked for, or lost what kept it not long ago
  waits since 2026-01-02T03:04:05Z until 2026-01-02T03:04:05Z for its subject sha256:b, which was not pushed yet
  part of index sha256:a since 2026-01-02T03:04:05Z, which is kept by
    attached to sha256:c since 2026-01-02T03:04:05Z, which is kept by
      new (a newer registry knows this reason)
  … and there are more reasons"
        );
        let ending = json!({ "kept": true, "until": at, "reasons": [], "more": false });
        assert_eq!(section(&ending), ["kept until 2026-01-02T03:04:05Z:"]);
        let gone = json!({ "kept": false, "until": at, "reasons": [], "more": false });
        assert_eq!(
            section(&gone),
            ["nothing keeps it: it goes after 2026-01-02T03:04:05Z"]
        );
    }
}
