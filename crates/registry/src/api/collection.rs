//! `/api/v1/collection`: state, dry run and start of the garbage collector.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{allow, page, time};
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};

/// Answers a request; `words` is what follows `collection`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    let answer = match words {
        [] => {
            allow(call, "GET, HEAD")?;
            call.require_operator().await?;
            status(call).await?
        }
        ["dry-run"] => {
            allow(call, "POST")?;
            call.require_operator().await?;
            dry_run(call).await?
        }
        ["run"] => {
            allow(call, "POST")?;
            call.require_operator().await?;
            call.context.store.collect_now();
            call.audit("collection.run", "collection", "allowed").await;
            json!({ "started": true })
        }
        _ => return Err(Refusal::no_such_path()),
    };
    Ok(json_response(StatusCode::OK, &answer))
}

async fn status(call: &Call) -> Result<Value, Refusal> {
    let status = call.context.store.collection_status().await?;
    let queue: Vec<_> = status
        .queue
        .iter()
        .map(|length| {
            json!({
                "kind": length.kind.name(),
                "waiting": length.waiting,
                "due": length.due,
                "failed": length.failed,
                "oldest": length.oldest.map(time),
            })
        })
        .collect();
    let since = &status.since_start;
    let collected: Vec<_> = since
        .collected
        .iter()
        .map(|(kind, number, bytes)| {
            json!({ "kind": kind.name(), "number": number, "bytes": bytes })
        })
        .collect();
    let outbox = &status.outbox;
    Ok(json!({
        "enabled": status.enabled,
        "open": status.open,
        "window": status.window.map(|window| window.to_string()),
        "rate": status.rate,
        "queue": queue,
        "outbox": {
            "objects": outbox.objects,
            "bytes": outbox.bytes,
            "due": outbox.due,
            "failed": outbox.failed,
            "oldest": outbox.oldest.map(time),
        },
        "sinceStart": {
            "lastRun": since.last_run.map(time),
            "lookedAt": since.looked_at,
            "failed": since.failed,
            "collected": collected,
            "objects": since.objects,
        },
    }))
}

async fn dry_run(call: &Call) -> Result<Value, Refusal> {
    let query = call.query()?;
    let limit = page(&query)?;
    let cursor = query.get("cursor");
    if cursor.is_some_and(|cursor| !store::DryRun::is_cursor(cursor)) {
        return Err(Refusal::bad_request(
            UNSUPPORTED,
            "`cursor` must be the `next` of the page before",
        ));
    }
    let page = call.context.store.collection_dry_run(cursor, limit).await?;
    let items: Vec<_> = page
        .items
        .iter()
        .map(|item| {
            json!({
                "kind": item.kind.name(),
                "repository": item.repository,
                "digest": item.digest,
                "bytes": item.bytes,
                "reason": item.reason,
            })
        })
        .collect();
    Ok(json!({ "items": items, "lookedAt": page.looked_at, "next": page.next }))
}

/// The paths of this module in the OpenAPI document.
pub(super) fn paths() -> Value {
    let kind = json!({ "enum": ["repository", "manifest", "repository_blob", "blob", "upload"] });
    let number = json!({ "type": "integer", "minimum": 0 });
    let at = json!({ "type": ["string", "null"], "format": "date-time" });
    let refusals = |answer: Value| {
        json!({
            "200": { "description": "Done", "content": { "application/json": { "schema": answer } } },
            "401": { "$ref": "#/components/responses/Error" },
            "403": { "$ref": "#/components/responses/Error" }
        })
    };
    let status = json!({
        "type": "object",
        "required": ["enabled", "open", "window", "rate", "queue", "outbox", "sinceStart"],
        "properties": {
            "enabled": { "type": "boolean" },
            "open": { "type": "boolean", "description": "It is on and its window is open" },
            "window": { "type": ["string", "null"] },
            "rate": number,
            "queue": { "type": "array", "items": { "type": "object", "properties": {
                "kind": kind, "waiting": number, "due": number, "failed": number, "oldest": at
            } } },
            "outbox": { "type": "object", "properties": {
                "objects": number, "bytes": number, "due": number, "failed": number, "oldest": at
            } },
            "sinceStart": { "type": "object", "description": "What the replica that answers did", "properties": {
                "lastRun": at, "lookedAt": number, "failed": number, "objects": number,
                "collected": { "type": "array", "items": { "type": "object", "properties": {
                    "kind": kind, "number": number, "bytes": number
                } } }
            } }
        }
    });
    let page = json!({
        "type": "object",
        "required": ["items", "lookedAt", "next"],
        "properties": {
            "items": { "type": "array", "items": { "type": "object", "properties": {
                "kind": kind,
                "repository": { "type": ["string", "null"] },
                "digest": { "type": ["string", "null"] },
                "bytes": number,
                "reason": { "type": "string" }
            } } },
            "lookedAt": { "type": "integer", "description": "Candidates of this page, with those that stay" },
            "next": { "type": ["string", "null"], "description": "`cursor` of the next page" }
        }
    });
    json!({
        "/api/v1/collection": {
            "get": {
                "operationId": "collection",
                "summary": "The state of the garbage collector",
                "responses": refusals(status)
            }
        },
        "/api/v1/collection/dry-run": {
            "post": {
                "operationId": "collectionDryRun",
                "summary": "What the collector would delete now, a page at a time",
                "description": "Runs the collector's own transactions and rolls them back.",
                "parameters": [
                    { "name": "limit", "in": "query", "description": "Candidates to look at", "schema": { "type": "integer", "minimum": 1, "maximum": 200, "default": 100 } },
                    { "name": "cursor", "in": "query", "description": "`next` of the page before", "schema": { "type": "string" } }
                ],
                "responses": refusals(page)
            }
        },
        "/api/v1/collection/run": {
            "post": {
                "operationId": "collectionRun",
                "summary": "Collect now what is due, also outside the window",
                "responses": refusals(json!({ "type": "object", "properties": { "started": { "type": "boolean" } } }))
            }
        }
    })
}
