//! `longshore pin …`: what holders keep from deletion.

use clap::{Args, Subcommand};
use client::longshore::api;
use oci::Reference;
use serde_json::{Value, json};

use super::login::host;
use super::{Global, operated};
use crate::output::{self, Exit, Refused};

/// Keep manifests from deletion, on a registry of this program.
///
/// A holder is the name of the user who pins, or a name below it, such as `alice/demo`. An operator may write any.
#[derive(Debug, Subcommand)]
pub(crate) enum Pin {
    /// Replace the whole set of a holder.
    Set(Set),
    /// List holders, or the pins of one.
    Ls {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
        /// The holder.
        holder: Option<String>,
    },
    /// Remove a holder with all its pins.
    Rm {
        /// `host[:port]` of the registry.
        registry: String,
        /// The holder.
        holder: String,
    },
}

/// Replace the whole set of a holder.
#[derive(Debug, Args)]
pub(crate) struct Set {
    /// `host[:port]` of the registry.
    registry: String,
    /// The holder.
    holder: String,
    /// What to keep: `repository:tag` or `repository@digest` of that registry. A tag is pinned as what it points to now.
    /// None at all empties the set.
    what: Vec<String>,
    /// Why, for people.
    #[arg(long, default_value = "")]
    reason: String,
    /// When the pins end by themselves, such as `2030-01-31T00:00:00Z`.
    #[arg(long, value_name = "TIME")]
    expires: Option<jiff::Timestamp>,
}

impl Pin {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let client = global.client()?;
        match self {
            Self::Set(set) => set.run(&client, global).await,
            Self::Ls {
                registry,
                holder: None,
            } => {
                let items = super::storage::pages(
                    &client,
                    &operated(registry.as_deref())?,
                    "pins?limit=1000",
                    None,
                )
                .await?;
                if global.json {
                    output::json(&items)?;
                } else {
                    let rows: Vec<_> = items
                        .iter()
                        .map(|item| {
                            vec![
                                text(&item["holder"]),
                                text(&item["pins"]),
                                text(&item["updatedAt"]),
                                text(&item["updatedBy"]),
                            ]
                        })
                        .collect();
                    output::table(&["HOLDER", "PINS", "UPDATED", "BY"], &rows);
                }
                Ok(Exit::OK)
            }
            Self::Ls {
                registry,
                holder: Some(holder),
            } => {
                let path = format!("pins/{}", api::path_of(&holder));
                let set = api::get(&client, &operated(registry.as_deref())?, &path).await?;
                if global.json {
                    output::json(&set)?;
                } else {
                    let rows: Vec<_> = set["pins"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .map(|pin| {
                            vec![
                                format!("{}@{}", text(&pin["repository"]), text(&pin["digest"])),
                                text(&pin["reason"]),
                                text(&pin["expires"]),
                            ]
                        })
                        .collect();
                    output::table(&["MANIFEST", "REASON", "EXPIRES"], &rows);
                }
                Ok(Exit::OK)
            }
            Self::Rm { registry, holder } => {
                let path = format!("pins/{}", api::path_of(&holder));
                api::delete(&client, &host(&registry)?, &path).await?;
                global.remark(format!("`{holder}` holds nothing any more"));
                Ok(Exit::OK)
            }
        }
    }
}

impl Set {
    async fn run(self, client: &client::Client, global: &Global) -> anyhow::Result<Exit> {
        let host = host(&self.registry)?;
        if let Some(at) = self.expires.filter(|at| *at <= crate::clock::now()) {
            return Err(Refused::new(
                Exit::USAGE,
                format!("`--expires {at}` is over, so the pins would hold nothing"),
            )
            .into());
        }
        let mut pins = Vec::new();
        for what in &self.what {
            let reference: Reference = format!("{host}/{what}").parse()?;
            let digest = match &reference.digest {
                Some(digest) => digest.clone(),
                None => client
                    .repository(&reference.host, &reference.repository)
                    .head_manifest(&reference.tag_or_digest())
                    .await?
                    .map(|found| found.digest)
                    .ok_or_else(|| client::Error::NotFound(reference.to_string()))?,
            };
            pins.push(json!({
                "repository": reference.repository.as_str(),
                "digest": digest,
                "reason": self.reason,
                "expires": self.expires.map(|at| at.to_string()),
            }));
        }
        let path = format!("pins/{}", api::path_of(&self.holder));
        let answer = api::put(client, &host, &path, &json!({ "pins": pins })).await?;
        if global.json {
            output::json(&answer)?;
        } else {
            for (list, word) in [
                ("held", "held"),
                ("expired", "over"),
                ("missing", "missing"),
            ] {
                for name in answer[list].as_array().into_iter().flatten() {
                    let manifest =
                        format!("{}@{}", text(&name["repository"]), text(&name["digest"]));
                    output::line(oci::text::escaped(&format!("{word} {manifest}")));
                }
            }
        }
        match answer["missing"].as_array().map(Vec::len) {
            None | Some(0) => Ok(Exit::OK),
            Some(missing) => Err(Refused::new(
                Exit::NOT_FOUND,
                format!(
                    "{missing} of {} are not in `{host}`, the others are pinned",
                    pins.len()
                ),
            )
            .into()),
        }
    }
}

/// A value of an answer as it is shown: text without quotes, nothing for null.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
