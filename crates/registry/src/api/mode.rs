//! `/api/v1/mode`: the read-only mode.

use http::{Method, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{allow, printable, time};
use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};

/// What a PUT asks for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    mode: Kind,
    /// Told to everybody whose write is refused.
    #[serde(default)]
    reason: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Normal,
    ReadOnly,
}

/// Answers a request; `words` is what follows `mode`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    if !words.is_empty() {
        return Err(Refusal::no_such_path());
    }
    allow(call, "GET, HEAD, PUT")?;
    call.require_operator().await?;
    if call.method() == Method::PUT {
        let wanted: Wanted = call.json(MAX_BODY).await?;
        let (store, actor) = (call.context.store.clone(), call.actor());
        match wanted.mode {
            Kind::Normal => store.set_normal(&actor).await?,
            Kind::ReadOnly => {
                printable("reason", &wanted.reason)?;
                let reason: String = wanted.reason.chars().take(MAX_REASON).collect();
                store.set_read_only(reason.trim(), &actor).await?;
            }
        }
    }
    let mode = call.context.store.mode().await?;
    Ok(json_response(StatusCode::OK, &document(&mode)))
}

fn document(mode: &store::Mode) -> Value {
    json!({
        "mode": if mode.is_normal() { "normal" } else { "read-only" },
        "reason": mode.reason(),
        "commanded": mode.commanded.as_ref().map(|commanded| json!({
            "reason": commanded.text,
            "by": commanded.by,
            "at": time(store::Timestamp(commanded.at)),
        })),
        "diskFull": mode.full.is_some(),
        "diskReadOnly": mode.disk_read_only,
        "databaseInRecovery": mode.recovery,
    })
}

/// The paths of this module in the OpenAPI document.
pub(super) fn paths() -> Value {
    let answer = json!({
        "200": { "description": "The mode", "content": { "application/json": { "schema": {
            "type": "object",
            "required": ["mode", "reason", "commanded", "diskFull", "diskReadOnly", "databaseInRecovery"],
            "properties": {
                "mode": { "enum": ["normal", "read-only"] },
                "reason": { "type": ["string", "null"], "description": "What refused writers are told" },
                "commanded": { "type": ["object", "null"], "properties": {
                    "reason": { "type": "string" },
                    "by": { "type": "string" },
                    "at": { "type": "string", "format": "date-time" }
                } },
                "diskFull": { "type": "boolean", "description": "On the replica that answers" },
                "diskReadOnly": { "type": "boolean", "description": "On the replica that answers" },
                "databaseInRecovery": { "type": "boolean" }
            }
        } } } },
        "401": { "$ref": "#/components/responses/Error" },
        "403": { "$ref": "#/components/responses/Error" }
    });
    json!({
        "/api/v1/mode": {
            "get": {
                "operationId": "mode",
                "summary": "Whether users can write, and why not",
                "responses": answer
            },
            "put": {
                "operationId": "setMode",
                "summary": "Stop the writes of users on every replica, or let them go on",
                "description": "In the read-only mode pulls go on and the collector goes on deleting; pushes, tag moves and deletions of users get 503 with `Retry-After`. When the answer comes, no write is under way any more.",
                "requestBody": { "required": true, "content": { "application/json": { "schema": {
                    "type": "object",
                    "required": ["mode"],
                    "properties": {
                        "mode": { "enum": ["normal", "read-only"] },
                        "reason": { "type": "string", "maxLength": MAX_REASON }
                    }
                } } } },
                "responses": answer
            }
        }
    })
}

const MAX_BODY: usize = 16 * 1024;
/// Characters of a reason that are kept.
const MAX_REASON: usize = 500;
