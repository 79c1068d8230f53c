//! `longshore retention`: which tags a registry keeps.

use std::time::Duration;

use clap::Subcommand;
use client::{Client, Method};
use serde_json::{Value, json};

use super::{Global, operated};
use crate::output::{self, Exit, Refused};

/// Which tags a registry keeps, what its policies removed, and how it comes back.
#[derive(Debug, Subcommand)]
pub(crate) enum Retention {
    /// Show for every tag whether it would be kept, and by which rule. Removes nothing.
    Plan {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// This repository alone.
        #[arg(long, value_name = "NAME")]
        repository: Option<String>,
        /// Show only what would be removed.
        #[arg(long)]
        removed: bool,
    },
    /// Remove now what the policies do not keep.
    Run {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// This repository alone.
        #[arg(long, value_name = "NAME")]
        repository: Option<String>,
    },
    /// List the policies and the last runs.
    Ls {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
    },
    /// Show what a run decided.
    Show {
        /// The number of the run.
        run: String,
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// Show only what was removed.
        #[arg(long)]
        removed: bool,
    },
    /// Put back what a run removed, where its manifest is still there. Ends with 1 when something could not be.
    Undo {
        /// The number of the run.
        run: String,
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// Put back this tag alone; may be given more than once.
        #[arg(long, value_name = "REPOSITORY:TAG")]
        tag: Vec<String>,
    },
}

impl Retention {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let api = |registry: &Option<String>| -> anyhow::Result<Api> {
            Ok(Api {
                client: global.client()?,
                host: operated(registry.as_deref())?,
            })
        };
        match self {
            Self::Plan {
                registry,
                repository,
                removed,
            } => {
                let api = api(&registry)?;
                let run = api.start(true, repository.as_deref()).await?;
                api.show(&run, removed, "would be removed", global).await
            }
            Self::Run {
                registry,
                repository,
            } => {
                let api = api(&registry)?;
                let run = api.start(false, repository.as_deref()).await?;
                api.show(&run, true, "removed", global).await
            }
            Self::Ls { registry } => api(&registry)?.list(global).await,
            Self::Show {
                run,
                registry,
                removed,
            } => {
                let api = api(&registry)?;
                let run = api.get(&format!("/runs/{}", number(&run)?)).await?;
                let word = if run["dryRun"] == true {
                    "would be removed"
                } else {
                    "removed"
                };
                api.show(&run, removed, word, global).await
            }
            Self::Undo { run, registry, tag } => {
                api(&registry)?.undo(number(&run)?, &tag, global).await
            }
        }
    }
}

/// The number of a run; it becomes a part of a path.
fn number(text: &str) -> anyhow::Result<i64> {
    text.parse().map_err(|_| {
        Refused::new(Exit::USAGE, format!("`{text}` is not the number of a run"))
            .hint("`longshore retention ls` shows the numbers")
            .into()
    })
}

struct Api {
    client: Client,
    host: String,
}

impl Api {
    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        let path = format!("/api/v1/retention{path}");
        Ok(self
            .client
            .api(&self.host, Method::GET, &path, None)
            .await?)
    }

    async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let path = format!("/api/v1/retention{path}");
        Ok(self
            .client
            .api(&self.host, Method::POST, &path, Some(body))
            .await?)
    }

    /// Starts a run and waits for its end.
    async fn start(&self, dry_run: bool, repository: Option<&str>) -> anyhow::Result<Value> {
        let wanted = json!({ "dryRun": dry_run, "repository": repository });
        let mut run = self.post("/runs", &wanted).await?;
        let path = format!("/runs/{}", number(run["id"].as_str().unwrap_or_default())?);
        while run["finishedAt"].is_null() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            run = self.get(&path).await?;
        }
        Ok(run)
    }

    /// Prints what a run decided, page by page.
    async fn show(
        &self,
        run: &Value,
        removed: bool,
        word: &str,
        global: &Global,
    ) -> anyhow::Result<Exit> {
        let id = number(run["id"].as_str().unwrap_or_default())?;
        let filter = if removed { "&action=remove" } else { "" };
        let (mut cursor, mut items) = (None::<String>, Vec::new());
        loop {
            let after = cursor.as_ref().map_or_else(String::new, |cursor| {
                format!("&cursor={}", cursor.replace('/', "%2F"))
            });
            let page = self
                .get(&format!("/runs/{id}/decisions?limit=1000{filter}{after}"))
                .await?;
            for item in page["items"].as_array().into_iter().flatten() {
                if global.json {
                    items.push(item.clone());
                } else {
                    output::line(decision(item));
                }
            }
            cursor = page["next"].as_str().map(str::to_owned);
            if cursor.is_none() {
                break;
            }
        }
        if global.json {
            output::json(&json!({ "run": run, "decisions": items }))?;
        } else {
            output::line(format!(
                "run {id}: {} tags kept, {} {word}",
                run["kept"], run["removed"]
            ));
        }
        Ok(Exit::OK)
    }

    async fn list(&self, global: &Global) -> anyhow::Result<Exit> {
        let policies = self.get("").await?;
        let runs = self.get("/runs?limit=20").await?;
        if global.json {
            output::json(&json!({ "retention": policies, "runs": runs["items"] }))?;
            return Ok(Exit::OK);
        }
        let list = policies["policies"].as_array().cloned().unwrap_or_default();
        if list.is_empty() {
            output::line("no policy is configured, everything is kept");
        }
        for (policy, number) in list.iter().zip(1..) {
            let words = |key: &str| -> Vec<&str> {
                policy[key]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect()
            };
            let keep = words("keep");
            let keep = if keep.is_empty() {
                "every tag".to_owned()
            } else {
                keep.join(" | ")
            };
            output::line(format!(
                "policy {number}: {}: keep {keep}",
                words("repositories").join(", ")
            ));
        }
        if let Some(next) = policies["nextRun"].as_str() {
            output::line(format!("the next run is due at {next}"));
        }
        for run in runs["items"].as_array().into_iter().flatten() {
            let text = |key: &str| run[key].as_str().unwrap_or_default();
            output::line(format!(
                "run {} of {} by {}: {} kept, {} {}{}",
                text("id"),
                text("startedAt"),
                text("actor"),
                run["kept"],
                run["removed"],
                if run["dryRun"] == true {
                    "would be removed"
                } else {
                    "removed"
                },
                if run["finishedAt"].is_null() {
                    ", without an end"
                } else {
                    ""
                },
            ));
        }
        Ok(Exit::OK)
    }

    async fn undo(&self, run: i64, tags: &[String], global: &Global) -> anyhow::Result<Exit> {
        let mut named = Vec::new();
        for text in tags {
            let (repository, tag) = text.split_once(':').ok_or_else(|| {
                Refused::new(Exit::USAGE, format!("`--tag {text}`: write REPOSITORY:TAG"))
            })?;
            named.push(json!({ "repository": repository, "tag": tag }));
        }
        let (mut cursor, mut items) = (Value::Null, Vec::new());
        loop {
            let wanted = json!({ "tags": named, "cursor": cursor });
            let page = self.post(&format!("/runs/{run}/undo"), &wanted).await?;
            items.extend(page["items"].as_array().cloned().unwrap_or_default());
            cursor = page["next"].clone();
            if cursor.is_null() {
                break;
            }
        }
        let failed = items
            .iter()
            .filter(|item| item["problem"].is_string())
            .count();
        if global.json {
            output::json(&json!({ "items": items }))?;
        } else {
            for item in &items {
                output::line(undone(item));
            }
            output::line(format!(
                "{} tags put back, {failed} could not be",
                items.len() - failed
            ));
        }
        Ok(if failed == 0 { Exit::OK } else { Exit::FAILED })
    }
}

fn decision(item: &Value) -> String {
    let text = |key: &str| item[key].as_str().unwrap_or_default();
    let undone = match item["undoneAt"].as_str() {
        Some(at) => format!(" (put back at {at})"),
        None => String::new(),
    };
    format!(
        "{:<6} {}:{} {}{undone}",
        text("action"),
        text("repository"),
        text("tag"),
        text("reason")
    )
}

fn undone(item: &Value) -> String {
    let text = |key: &str| item[key].as_str().unwrap_or_default();
    match item["problem"].as_str() {
        Some(problem) => format!(
            "not put back: {}:{}: {problem}",
            text("repository"),
            text("tag")
        ),
        None => format!(
            "put back: {}:{} → {}",
            text("repository"),
            text("tag"),
            text("restored")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_the_tag_and_the_rule() {
        assert_eq!(
            decision(
                &json!({"action": "keep", "repository": "a/b", "tag": "v1", "reason": "it is pinned", "undoneAt": null})
            ),
            "keep   a/b:v1 it is pinned"
        );
        assert_eq!(
            undone(&json!({"repository": "a", "tag": "b", "problem": "gone", "restored": null})),
            "not put back: a:b: gone"
        );
        assert!(number("x/../y").is_err());
    }
}
