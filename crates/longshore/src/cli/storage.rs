//! `longshore storage`: what a registry stores, and for whom.

use clap::{Args, ValueEnum};
use client::longshore::api;
use serde_json::{Value, json};

use super::pin::text;
use super::{Global, operated};
use crate::output::{self, Exit};

/// Show what a registry stores, for namespaces or repositories.
#[derive(Debug, Args)]
pub(crate) struct Storage {
    /// The registry: `host[:port]` [default: $LONGSHORE_REGISTRY, else 127.0.0.1:5050].
    registry: Option<String>,
    /// List repositories, not namespaces.
    #[arg(long)]
    repositories: bool,
    /// List the repositories of this namespace.
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// The order of the list.
    #[arg(long, value_enum, default_value_t = Sort::Size)]
    sort: Sort,
    /// How many are listed.
    #[arg(long, default_value_t = 20)]
    limit: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sort {
    /// The largest first.
    Size,
    /// By name.
    Name,
}

impl Storage {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let client = global.client()?;
        let host = operated(self.registry.as_deref())?;
        let sort = match self.sort {
            Sort::Size => "size",
            Sort::Name => "name",
        };
        let by_repository = self.repositories || self.namespace.is_some();
        let mut path = format!(
            "storage/{}?sort={sort}&limit={}",
            if by_repository {
                "repositories"
            } else {
                "namespaces"
            },
            self.limit.clamp(1, 1000)
        );
        if let Some(namespace) = &self.namespace {
            path.push_str("&namespace=");
            path.push_str(&api::path_of(namespace));
        }
        // Who is no operator sees no totals, but the repositories that it may pull.
        let totals = match api::get(&client, &host, "storage").await {
            Ok(totals) => Some(totals),
            Err(client::Error::Unauthorized { .. }) if by_repository => None,
            Err(error) => return Err(error.into()),
        };
        let items = pages(&client, &host, &path, Some(self.limit)).await?;
        if global.json {
            output::json(&json!({ "totals": totals, "items": items }))?;
            return Ok(Exit::OK);
        }
        if let Some(totals) = &totals {
            output::line(summary(totals));
            output::line("");
        }
        if by_repository {
            let rows: Vec<_> = items
                .iter()
                .map(|item| {
                    vec![
                        text(&item["name"]),
                        size(&item["bytes"]),
                        size(&item["storedBytes"]),
                        size(&item["exclusiveBytes"]),
                        times(&item["deduplication"]),
                        text(&item["objects"]),
                    ]
                })
                .collect();
            output::table(
                &["REPOSITORY", "SIZE", "STORED", "ALONE", "RATIO", "OBJECTS"],
                &rows,
            );
        } else {
            output::table(&NAMESPACE_COLUMNS, &namespace_rows(&items));
        }
        Ok(Exit::OK)
    }
}

fn summary(totals: &Value) -> String {
    use std::fmt::Write as _;
    let mut line = format!(
        "{} stored in {} blobs and {} manifests for {} of content",
        size(&totals["storedBytes"]),
        text(&totals["blobs"]),
        text(&totals["manifests"]),
        size(&totals["logicalBytes"]),
    );
    if let Some(ratio) = totals["deduplication"].as_f64() {
        let _ = write!(line, " ({ratio:.2} to 1)");
    }
    let waiting = &totals["waiting"];
    if waiting["blobs"].as_u64() > Some(0) || waiting["objects"].as_u64() > Some(0) {
        let _ = write!(
            line,
            "; {} in {} blobs and {} objects wait for their deletion",
            size(&waiting["bytes"]),
            text(&waiting["blobs"]),
            text(&waiting["objects"]),
        );
    }
    line
}

/// Columns of [`namespace_rows`].
pub(super) const NAMESPACE_COLUMNS: [&str; 7] = [
    "NAMESPACE",
    "SIZE",
    "STORED",
    "ALONE",
    "RATIO",
    "OBJECTS",
    "QUOTA",
];

/// Namespaces as rows of a table.
pub(super) fn namespace_rows(items: &[Value]) -> Vec<Vec<String>> {
    items
        .iter()
        .map(|item| {
            let mut quota = size(&item["quota"]);
            if !quota.is_empty() && item["quotaIsDefault"] == true {
                quota.push_str(" (default)");
            }
            vec![
                text(&item["name"]),
                size(&item["bytes"]),
                size(&item["storedBytes"]),
                size(&item["exclusiveBytes"]),
                times(&item["deduplication"]),
                text(&item["objects"]),
                quota,
            ]
        })
        .collect()
}

/// Empty where it is not known.
fn times(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(String::new, |ratio| format!("{ratio:.2}"))
}

fn size(value: &Value) -> String {
    value.as_u64().map_or_else(String::new, output::bytes)
}

/// The entries of a list, page by page, up to `most`. `path` has a query already.
pub(super) async fn pages(
    client: &client::Client,
    host: &str,
    path: &str,
    most: Option<usize>,
) -> anyhow::Result<Vec<Value>> {
    let mut items = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api::get(client, host, &format!("{path}{cursor}")).await?;
        items.extend(page["items"].as_array().into_iter().flatten().cloned());
        if most.is_some_and(|most| items.len() >= most) {
            items.truncate(most.unwrap_or_default());
            return Ok(items);
        }
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={}", api::path_of(next)),
            None => return Ok(items),
        }
    }
}
