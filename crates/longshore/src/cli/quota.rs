//! `longshore quota …`: how much a namespace may store.

use anyhow::Context as _;
use clap::Subcommand;
use client::longshore::api;
use serde_json::json;

use super::login::host;
use super::storage::{NAMESPACE_COLUMNS, namespace_rows, pages};
use super::{Global, operated};
use crate::config::parse_size;
use crate::output::{self, Exit, Refused};

/// How much the repositories of a namespace may hold together. For operators.
#[derive(Debug, Subcommand)]
pub(crate) enum Quota {
    /// Set the quota of a namespace.
    Set {
        /// `host[:port]` of the registry.
        registry: String,
        /// The namespace: the first component of repository names.
        namespace: String,
        /// Such as `20GiB`; `default` for what the registry's configuration says.
        size: String,
    },
    /// List namespaces with their quotas and what they use.
    Ls {
        /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
        registry: Option<String>,
    },
}

impl Quota {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let client = global.client()?;
        let items = match self {
            Self::Set {
                registry,
                namespace,
                size,
            } => {
                let quota = match size.as_str() {
                    "default" => None,
                    size => Some(parse_size(size).ok_or_else(|| {
                        Refused::new(
                            Exit::USAGE,
                            format!("`{size}` is no size, write for example `20GiB`, or `default`"),
                        )
                    })?),
                };
                if namespace.contains('/') {
                    return Err(Refused::new(
                        Exit::USAGE,
                        format!("`{namespace}` is no namespace: name the first component alone"),
                    )
                    .into());
                }
                let path = format!("storage/namespaces/{}", api::path_of(&namespace));
                let body = json!({ "quota": quota });
                let usage = api::put(&client, &host(&registry)?, &path, &body)
                    .await
                    .with_context(|| format!("cannot set the quota of `{namespace}`"))?;
                if global.json {
                    output::json(&usage)?;
                    return Ok(Exit::OK);
                }
                vec![usage]
            }
            Self::Ls { registry } => {
                let path = "storage/namespaces?limit=1000";
                let items = pages(&client, &operated(registry.as_deref())?, path, None).await?;
                if global.json {
                    output::json(&items)?;
                    return Ok(Exit::OK);
                }
                items
            }
        };
        output::table(&NAMESPACE_COLUMNS, &namespace_rows(&items));
        Ok(Exit::OK)
    }
}
