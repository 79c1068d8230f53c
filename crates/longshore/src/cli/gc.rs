//! `longshore gc`: the garbage collector of a registry.

use clap::{Args, Subcommand};
use client::longshore::api;
use serde_json::{Value, json};

use super::{Global, operated};
use crate::output::{self, Exit};

/// Look at the garbage collector of a registry, which runs by itself, or have it collect at once.
///
/// Without a command it shows the state. Nothing needs to be run by hand: what no tag, pin, index, subject or lease keeps
/// any more goes by itself.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Gc {
    /// Show what would be deleted now, as `longshore gc dry-run` does.
    #[arg(long)]
    dry_run: bool,
    /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
    registry: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what waits and what was collected.
    Status(At),
    /// Show what would be deleted now, and why.
    DryRun(DryRun),
    /// Collect now what is due, also outside the window and where the collector is off.
    Run(At),
}

#[derive(Debug, Args)]
struct At {
    /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
    registry: Option<String>,
}

#[derive(Debug, Args)]
struct DryRun {
    /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
    registry: Option<String>,
    /// How many deletions are listed at most; all of the candidates looked at are counted.
    #[arg(long, value_name = "NUMBER", default_value_t = LISTED)]
    limit: usize,
}

impl Gc {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        match self.command {
            None if self.dry_run => dry_run(self.registry.as_deref(), LISTED, global).await,
            None => status(self.registry.as_deref(), global).await,
            Some(Command::Status(at)) => status(at.registry.as_deref(), global).await,
            Some(Command::DryRun(wanted)) => {
                dry_run(wanted.registry.as_deref(), wanted.limit, global).await
            }
            Some(Command::Run(at)) => run(at.registry.as_deref(), global).await,
        }
    }
}

async fn status(registry: Option<&str>, global: &Global) -> anyhow::Result<Exit> {
    let host = operated(registry)?;
    let answer = api::get(&global.client()?, &host, "collection").await?;
    if global.json {
        output::json(&answer)?;
        return Ok(Exit::OK);
    }
    output::line(sentence(&answer));
    let rows: Vec<_> = array(&answer["queue"])
        .map(|length| {
            let kind = length["kind"].as_str().unwrap_or_default();
            let done = array(&answer["sinceStart"]["collected"]).find(|c| c["kind"] == *kind);
            let done = done.cloned().unwrap_or_default();
            vec![
                kind.to_owned(),
                number(&length["waiting"]),
                number(&length["due"]),
                number(&length["failed"]),
                at(&length["oldest"]),
                number(&done["number"]),
                size(&done["bytes"]),
            ]
        })
        .collect();
    let head = [
        "KIND",
        "WAITING",
        "DUE",
        "FAILED",
        "NEXT",
        "COLLECTED",
        "BYTES",
    ];
    output::table(&head, &rows);
    let outbox = &answer["outbox"];
    output::line(format!(
        "outbox: {} objects ({}), {} due, {} failed; {} deleted since the start",
        number(&outbox["objects"]),
        size(&outbox["bytes"]),
        number(&outbox["due"]),
        number(&outbox["failed"]),
        number(&answer["sinceStart"]["objects"]),
    ));
    Ok(Exit::OK)
}

fn sentence(answer: &Value) -> String {
    let mut text = match (answer["enabled"] == true, answer["open"] == true) {
        (false, _) => "collection is off".to_owned(),
        (true, true) => "collection is on".to_owned(),
        (true, false) => "collection waits for its window".to_owned(),
    };
    if let Some(window) = answer["window"].as_str() {
        text = format!("{text}, from {window} UTC");
    }
    match answer["sinceStart"]["lastRun"].as_str() {
        Some(last) => format!("{text}; something was last looked at at {}", short(last)),
        None => format!("{text}; nothing was looked at since the start"),
    }
}

async fn dry_run(registry: Option<&str>, limit: usize, global: &Global) -> anyhow::Result<Exit> {
    let host = operated(registry)?;
    let client = global.client()?;
    let (mut items, mut looked_at, mut found, mut bytes) = (Vec::new(), 0, 0, 0);
    let mut cursor = String::new();
    let mut more = true;
    while more {
        let path = format!("collection/dry-run?limit=200{cursor}");
        let page = api::post(&client, &host, &path, &json!({})).await?;
        looked_at += page["lookedAt"].as_u64().unwrap_or(0);
        for item in array(&page["items"]) {
            found += 1;
            bytes += item["bytes"].as_u64().unwrap_or(0);
            if items.len() < limit {
                items.push(item.clone());
            }
        }
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={}", api::path_of(next)),
            None => more = false,
        }
        if looked_at >= MOST {
            break;
        }
    }
    if global.json {
        output::json(&json!({
            "items": items,
            "deletions": found,
            "bytes": bytes,
            "lookedAt": looked_at,
            "more": more,
        }))?;
        return Ok(Exit::OK);
    }
    let rows: Vec<_> = items
        .iter()
        .map(|item| {
            let text = |key: &str| item[key].as_str().unwrap_or_default().to_owned();
            vec![
                text("kind"),
                text("repository"),
                text("digest"),
                size(&item["bytes"]),
                text("reason"),
            ]
        })
        .collect();
    if !rows.is_empty() {
        output::table(&["KIND", "REPOSITORY", "DIGEST", "BYTES", "WHY"], &rows);
    }
    if found > items.len() {
        output::line(format!("… and {} more", found - items.len()));
    }
    output::line(format!(
        "{found} of {looked_at} candidates would be deleted now, {}{}",
        output::bytes(bytes),
        if more {
            "; there are more candidates"
        } else {
            ""
        }
    ));
    Ok(Exit::OK)
}

async fn run(registry: Option<&str>, global: &Global) -> anyhow::Result<Exit> {
    let host = operated(registry)?;
    let answer = api::post(&global.client()?, &host, "collection/run", &json!({})).await?;
    if global.json {
        output::json(&answer)?;
    } else {
        global.remark("started; `longshore gc status` shows how it goes");
    }
    Ok(Exit::OK)
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn number(value: &Value) -> String {
    value.as_u64().unwrap_or(0).to_string()
}

fn size(value: &Value) -> String {
    output::bytes(value.as_u64().unwrap_or(0))
}

fn at(value: &Value) -> String {
    value.as_str().map_or_else(|| "-".to_owned(), short)
}

/// A time without fractions of a second.
pub(super) fn short(time: &str) -> String {
    match time.split_once('.') {
        Some((whole, _)) => format!("{whole}Z"),
        None => time.to_owned(),
    }
}

/// Deletions that are listed.
const LISTED: usize = 50;
/// Candidates that one dry run looks at.
const MOST: u64 = 20_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences() {
        let status = |enabled: bool, open: bool, window: Option<&str>| {
            sentence(&json!({
                "enabled": enabled,
                "open": open,
                "window": window,
                "sinceStart": { "lastRun": null },
            }))
        };
        assert_eq!(
            status(true, true, None),
            "collection is on; nothing was looked at since the start"
        );
        assert_eq!(
            status(true, false, Some("22:00-06:00")),
            "collection waits for its window, from 22:00-06:00 UTC; nothing was looked at since the start"
        );
        assert!(status(false, false, None).starts_with("collection is off"));
        assert_eq!(short("2026-01-01T00:00:00.123456Z"), "2026-01-01T00:00:00Z");
        assert_eq!(short("2026-01-01T00:00:00Z"), "2026-01-01T00:00:00Z");
    }
}
