//! `longshore scrub`: the integrity scrub of a registry.

use clap::Subcommand;
use client::Method;
use serde_json::Value;

use super::{Global, operated};
use crate::output::{self, Exit};

/// The integrity scrub, which reads everything again and compares it with its digest.
#[derive(Debug, Subcommand)]
pub(crate) enum Scrub {
    /// Show how far the scrub is and what it found. Ends with 3 when something is damaged.
    Status {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
    },
    /// Read everything again, beginning now, at the configured rate.
    Run {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
    },
}

impl Scrub {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let (registry, method, path) = match self {
            Self::Status { registry } => (registry, Method::GET, "/api/v1/scrub"),
            Self::Run { registry } => (registry, Method::POST, "/api/v1/scrub/run"),
        };
        let host = operated(registry.as_deref())?;
        let status = global.client()?.api(&host, method, path, None).await?;
        if global.json {
            output::json(&status)?;
        } else {
            for line in lines(&status) {
                output::line(line);
            }
        }
        let number = |value: &Value| value["count"].as_u64().unwrap_or_default();
        let damaged = number(&status["suspectBlobs"]) + number(&status["damagedManifests"]);
        Ok(if damaged == 0 {
            Exit::OK
        } else {
            Exit::REFUSED
        })
    }
}

fn lines(status: &Value) -> Vec<String> {
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or("never").to_owned();
    let mut lines = Vec::new();
    let rate = number(&status["rate"]);
    if rate == 0 {
        lines.push("the scrub is off (`scrub.rate` is 0)".to_owned());
    } else {
        lines.push(format!(
            "reads {} per second, everything once in {} days",
            output::bytes(rate),
            number(&status["periodSeconds"]) / 86_400
        ));
    }
    lines.push(format!(
        "{} blobs ({}) are to be read; the oldest reading is of {}",
        number(&status["left"]["blobs"]),
        output::bytes(number(&status["left"]["bytes"])),
        text(&status["oldest"])
    ));
    let manifests = &status["manifests"];
    lines.push(match manifests["ended"].as_str() {
        Some(ended) => format!("manifests were last read to the end at {ended}"),
        None if manifests["began"].is_string() => {
            format!(
                "manifests are being read since {}",
                text(&manifests["began"])
            )
        }
        None => "manifests were not read yet".to_owned(),
    });
    let suspects = &status["suspectBlobs"];
    lines.push(format!(
        "{} damaged blobs, {} damaged manifests",
        number(&suspects["count"]),
        number(&status["damagedManifests"]["count"])
    ));
    let items = |value: &Value| value["items"].as_array().cloned().unwrap_or_default();
    for suspect in items(suspects) {
        let names = |key: &str| -> Vec<String> {
            suspect[key]
                .as_array()
                .into_iter()
                .flatten()
                .map(|item| match item.as_str() {
                    Some(name) => name.to_owned(),
                    None => format!("{}@{}", text(&item["repository"]), text(&item["digest"])),
                })
                .collect()
        };
        lines.push(format!(
            "damaged: blob {} ({}), push it again to one of: {}",
            text(&suspect["digest"]),
            output::bytes(number(&suspect["size"])),
            names("repositories").join(", ")
        ));
        for manifest in names("manifests") {
            lines.push(format!("  needed by {manifest}"));
        }
    }
    for manifest in items(&status["damagedManifests"]) {
        lines.push(format!(
            "damaged: manifest {}@{}, push it again",
            text(&manifest["repository"]),
            text(&manifest["digest"])
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn damage_is_told_with_what_to_do() {
        let lines = lines(&json!({
            "rate": 8_388_608, "periodSeconds": 2_592_000, "left": {"blobs": 1, "bytes": 5},
            "oldest": null, "manifests": {"began": null, "ended": null},
            "suspectBlobs": {"count": 1, "items": [{
                "digest": "sha256:aa", "size": 5, "repositories": ["a/b"],
                "manifests": [{"repository": "a/b", "digest": "sha256:bb"}],
            }]},
            "damagedManifests": {"count": 0, "items": []},
        }));
        let text = lines.join("\n");
        for part in [
            "push it again to one of: a/b",
            "needed by a/b@sha256:bb",
            "1 damaged blobs",
            "30 days",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
