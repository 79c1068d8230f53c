//! `longshore mode`: the read-only mode of a registry.

use clap::{Args, Subcommand};
use client::Method;
use serde_json::{Value, json};

use super::{Global, operated};
use crate::output::{self, Exit};

/// Show whether a registry takes writes, stop them, or let them go on.
///
/// In the read-only mode pulls go on and the collector goes on deleting. Pushes, tag moves, deletions and quotas of users get 503
/// with the reason; pins are taken, so that agents keep what they run. All replicas follow at once. A registry whose disk is full goes into this mode and out of it by itself.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Mode {
    /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
    registry: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stop the writes of users. Ends only by `longshore mode normal`.
    ReadOnly {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// Told to everybody whose write is refused.
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
    },
    /// Let users write again.
    Normal {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
    },
}

impl Mode {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let (registry, wanted) = match self.command {
            None => (self.registry, None),
            Some(Command::ReadOnly { registry, reason }) => (
                registry,
                Some(json!({ "mode": "read-only", "reason": reason })),
            ),
            Some(Command::Normal { registry }) => (registry, Some(json!({ "mode": "normal" }))),
        };
        let host = operated(registry.as_deref())?;
        let method = if wanted.is_some() {
            Method::PUT
        } else {
            Method::GET
        };
        let answer = global
            .client()?
            .api(&host, method, "/api/v1/mode", wanted.as_ref())
            .await?;
        if global.json {
            output::json(&answer)?;
        } else {
            output::line(sentence(&answer));
        }
        Ok(Exit::OK)
    }
}

fn sentence(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mode = text(&answer["mode"]);
    match answer["reason"].as_str() {
        None => mode,
        Some(reason) => {
            let commanded = &answer["commanded"];
            if commanded.is_object() {
                format!(
                    "{mode} since {} by {}: {reason}",
                    text(&commanded["at"]),
                    text(&commanded["by"])
                )
            } else {
                format!("{mode}: {reason}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences() {
        assert_eq!(
            sentence(&json!({"mode": "normal", "reason": null})),
            "normal"
        );
        assert_eq!(
            sentence(&json!({"mode": "read-only", "reason": "full", "commanded": null})),
            "read-only: full"
        );
        assert_eq!(
            sentence(&json!({
                "mode": "read-only",
                "reason": "moving",
                "commanded": {"by": "user:a", "at": "2026-01-01T00:00:00Z"},
            })),
            "read-only since 2026-01-01T00:00:00Z by user:a: moving"
        );
    }
}
