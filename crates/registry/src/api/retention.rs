//! `/api/v1/retention`: plans, runs, undo.

use http::{Method, Response, StatusCode};
use oci::{RepositoryName, Tag};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{allow, page, time};
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};

/// Answers a request; `words` is what follows `retention`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    match words {
        [] => {
            allow(call, "GET, HEAD")?;
            call.require_operator().await?;
            policies(call).await
        }
        ["runs"] => {
            allow(call, "GET, HEAD, POST")?;
            call.require_operator().await?;
            if call.method() == Method::POST {
                start(call).await
            } else {
                runs(call).await
            }
        }
        ["runs", id] => {
            allow(call, "GET, HEAD")?;
            call.require_operator().await?;
            let run = find(call, id).await?;
            Ok(json_response(StatusCode::OK, &document(&run)))
        }
        ["runs", id, "decisions"] => {
            allow(call, "GET, HEAD")?;
            call.require_operator().await?;
            let run = find(call, id).await?;
            decisions(call, run.id).await
        }
        ["runs", id, "undo"] => {
            allow(call, "POST")?;
            call.require_operator().await?;
            let run = find(call, id).await?;
            undo(call, run.id).await
        }
        _ => Err(Refusal::no_such_path()),
    }
}

async fn policies(call: &Call) -> Result<Response<Body>, Refusal> {
    let store = &call.context.store;
    let retention = store.retention();
    let policies: Vec<_> = retention
        .policies
        .iter()
        .map(|policy| {
            let keep: Vec<_> = policy.keep.iter().map(ToString::to_string).collect();
            json!({
                "repositories": policy.repositories,
                "keep": keep,
                "untaggedSeconds": policy.untagged.map(|time| time.as_secs()),
            })
        })
        .collect();
    let next = store.next_retention().await?;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "policies": policies,
            "intervalSeconds": retention.interval.as_secs(),
            "window": retention.window.map(|window| window.to_string()),
            "nextRun": next.map(time),
        }),
    ))
}

/// What a POST asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Wanted {
    /// Only plan.
    dry_run: bool,
    /// This repository alone.
    #[serde(default)]
    repository: Option<String>,
}

async fn start(call: &mut Call) -> Result<Response<Body>, Refusal> {
    let wanted: Wanted = call.json(MAX_BODY).await?;
    let only = wanted
        .repository
        .map(|name| name.parse::<RepositoryName>())
        .transpose()?;
    let store = &call.context.store;
    if store.retention().policies.is_empty() {
        return Err(Refusal::bad_request(
            UNSUPPORTED,
            "no retention policy is configured, everything is kept",
        ));
    }
    let id = store
        .start_retention(wanted.dry_run, only, &call.actor())
        .await?;
    let run = find(call, &id.to_string()).await?;
    Ok(json_response(StatusCode::ACCEPTED, &document(&run)))
}

async fn runs(call: &Call) -> Result<Response<Body>, Refusal> {
    let query = call.query()?;
    let limit = page(&query)?;
    let before = match query.get("cursor") {
        None => None,
        Some(text) => Some(text.parse::<i64>().map_err(|_| bad_cursor())?),
    };
    let mut runs = call.context.store.retention_runs(before, limit + 1).await?;
    let more = runs.len() > limit;
    runs.truncate(limit);
    let next = more
        .then(|| runs.last().map(|run| run.id.to_string()))
        .flatten();
    let items: Vec<_> = runs.iter().map(document).collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

async fn find(call: &Call, id: &str) -> Result<store::RetentionRun, Refusal> {
    let unknown = || {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "RUN_UNKNOWN",
            "no such retention run, it may be too old",
        )
    };
    let id = id.parse::<i64>().map_err(|_| unknown())?;
    call.context
        .store
        .retention_run(id)
        .await?
        .ok_or_else(unknown)
}

async fn decisions(call: &Call, run: i64) -> Result<Response<Body>, Refusal> {
    let query = call.query()?;
    let limit = page(&query)?;
    let cursor = query.get("cursor").map(str::to_owned);
    let after = cursor.as_deref().map(position).transpose()?;
    let keeps = match query.get("action") {
        None => None,
        Some("keep") => Some(true),
        Some("remove") => Some(false),
        Some(_) => {
            return Err(Refusal::bad_request(
                UNSUPPORTED,
                "`action` is `keep` or `remove`",
            ));
        }
    };
    let mut found = call
        .context
        .store
        .retention_decisions(run, after, keeps, limit + 1)
        .await?;
    let more = found.len() > limit;
    found.truncate(limit);
    let next = more
        .then(|| {
            found
                .last()
                .map(|last| format!("{}:{}", last.repository, last.tag.as_str()))
        })
        .flatten();
    let items: Vec<_> = found
        .iter()
        .map(|decision| {
            json!({
                "repository": decision.repository,
                "tag": decision.tag,
                "digest": decision.digest,
                "generation": decision.generation,
                "action": if decision.keeps { "keep" } else { "remove" },
                "reason": decision.reason,
                "undoneAt": decision.undone_at.map(time),
            })
        })
        .collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

/// Which tags to put back; all that the run removed when none is named.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Which {
    #[serde(default)]
    tags: Vec<Named>,
    /// `next` of the answer before.
    #[serde(default)]
    cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    repository: String,
    tag: String,
}

async fn undo(call: &mut Call, run: i64) -> Result<Response<Body>, Refusal> {
    let which: Which = call.json(MAX_UNDO_BODY).await?;
    let store = call.context.store.clone();
    let actor = call.actor();
    let (mut tags, mut next) = (Vec::new(), None);
    if which.tags.is_empty() {
        let after = which.cursor.as_deref().map(position).transpose()?;
        tags = store.retention_removed(run, after, UNDO_PAGE).await?;
        if tags.len() == UNDO_PAGE {
            next = tags
                .last()
                .map(|(repository, tag)| format!("{repository}:{}", tag.as_str()));
        }
    } else {
        for named in &which.tags {
            tags.push((named.repository.parse()?, named.tag.parse::<Tag>()?));
        }
    }
    let mut items = Vec::with_capacity(tags.len());
    for (repository, tag) in &tags {
        let undone = store.undo_retention(run, repository, tag, &actor).await?;
        items.push(json!({
            "repository": undone.repository,
            "tag": undone.tag,
            "restored": undone.restored,
            "problem": undone.problem,
        }));
    }
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

/// Repository and tag of a cursor. Neither holds a colon.
fn position(cursor: &str) -> Result<(&str, &str), Refusal> {
    cursor.split_once(':').ok_or_else(bad_cursor)
}

fn bad_cursor() -> Refusal {
    Refusal::bad_request(
        UNSUPPORTED,
        "`cursor` must be the `next` of the page before",
    )
}

fn document(run: &store::RetentionRun) -> Value {
    json!({
        "id": run.id.to_string(),
        "startedAt": time(run.started_at),
        "finishedAt": run.finished_at.map(time),
        "policy": run.policy,
        "dryRun": run.dry_run,
        "actor": run.actor,
        "kept": run.kept,
        "removed": run.removed,
    })
}

/// The paths of this module in the OpenAPI document.
pub(super) fn paths() -> Value {
    let error = json!({ "$ref": "#/components/responses/Error" });
    let run = json!({ "type": "object", "properties": {
        "id": { "type": "string" },
        "startedAt": { "type": "string", "format": "date-time" },
        "finishedAt": { "type": ["string", "null"], "format": "date-time" },
        "policy": { "type": "string" },
        "dryRun": { "type": "boolean" },
        "actor": { "type": "string" },
        "kept": { "type": "integer" },
        "removed": { "type": "integer" }
    } });
    let answer = |schema: Value| {
        json!({
            "200": { "description": "Done", "content": { "application/json": { "schema": schema } } },
            "400": error, "401": error, "403": error, "404": error
        })
    };
    let list = |item: Value| {
        json!({ "type": "object", "required": ["items", "next"], "properties": {
            "items": { "type": "array", "items": item },
            "next": { "type": ["string", "null"], "description": "`cursor` of the next page" }
        } })
    };
    let id =
        json!({ "name": "id", "in": "path", "required": true, "schema": { "type": "string" } });
    let cursor = json!({ "name": "cursor", "in": "query", "schema": { "type": "string" } });
    let limit = json!({ "name": "limit", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 } });
    let body = |schema: Value| json!({ "required": true, "content": { "application/json": { "schema": schema } } });
    json!({
        "/api/v1/retention": { "get": {
            "operationId": "retention",
            "summary": "The policies, and when the next run is due",
            "responses": answer(json!({ "type": "object" }))
        } },
        "/api/v1/retention/runs": {
            "get": {
                "operationId": "retentionRuns",
                "summary": "Runs, the newest first",
                "parameters": [limit, cursor],
                "responses": answer(list(run.clone()))
            },
            "post": {
                "operationId": "startRetention",
                "summary": "Start a run, or only plan one; it goes on in the background",
                "requestBody": body(json!({ "type": "object", "required": ["dryRun"], "properties": {
                    "dryRun": { "type": "boolean" },
                    "repository": { "type": ["string", "null"], "description": "This repository alone" }
                } })),
                "responses": {
                    "202": { "description": "Started", "content": { "application/json": { "schema": run } } },
                    "400": error, "401": error, "403": error, "503": error
                }
            }
        },
        "/api/v1/retention/runs/{id}": { "get": {
            "operationId": "retentionRun",
            "summary": "One run",
            "parameters": [id],
            "responses": answer(run)
        } },
        "/api/v1/retention/runs/{id}/decisions": { "get": {
            "operationId": "retentionDecisions",
            "summary": "What a run decided on each tag, and why",
            "parameters": [id, limit, cursor, { "name": "action", "in": "query", "schema": { "enum": ["keep", "remove"] } }],
            "responses": answer(list(json!({ "type": "object", "properties": {
                "repository": { "type": "string" },
                "tag": { "type": "string" },
                "digest": { "type": "string" },
                "generation": { "type": "integer" },
                "action": { "enum": ["keep", "remove"] },
                "reason": { "type": "string" },
                "undoneAt": { "type": ["string", "null"], "format": "date-time" }
            } })))
        } },
        "/api/v1/retention/runs/{id}/undo": { "post": {
            "operationId": "undoRetention",
            "summary": "Put back tags that a run removed",
            "description": "Without `tags` all of them, a page at a time. A tag comes back when no tag of its name is there and its manifest still is.",
            "parameters": [id],
            "requestBody": body(json!({ "type": "object", "properties": {
                "tags": { "type": "array", "items": { "type": "object", "required": ["repository", "tag"], "properties": {
                    "repository": { "type": "string" }, "tag": { "type": "string" }
                } } },
                "cursor": { "type": ["string", "null"] }
            } })),
            "responses": answer(list(json!({ "type": "object", "properties": {
                "repository": { "type": "string" },
                "tag": { "type": "string" },
                "restored": { "type": ["string", "null"], "description": "The digest that it points to again" },
                "problem": { "type": ["string", "null"] }
            } })))
        } }
    })
}

const MAX_BODY: usize = 16 * 1024;
const MAX_UNDO_BODY: usize = 1024 * 1024;
/// Tags that one request puts back.
const UNDO_PAGE: usize = 200;
