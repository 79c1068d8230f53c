//! `/api/v1/scrub`: the integrity scrub.

use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::{allow, time};
use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};

/// Answers a request; `words` is what follows `scrub`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    match words {
        [] => {
            allow(call, "GET, HEAD")?;
            call.require_operator().await?;
        }
        ["run"] => {
            allow(call, "POST")?;
            call.require_operator().await?;
            call.context.store.run_scrub(&call.actor()).await?;
        }
        _ => return Err(Refusal::no_such_path()),
    }
    let status = call.context.store.scrub_status().await?;
    Ok(json_response(StatusCode::OK, &document(&status)))
}

fn document(status: &store::ScrubStatus) -> Value {
    let suspects: Vec<_> = status
        .suspects
        .iter()
        .map(|suspect| {
            let manifests: Vec<_> = suspect
                .manifests
                .iter()
                .map(|(repository, digest)| json!({ "repository": repository, "digest": digest }))
                .collect();
            json!({
                "digest": suspect.digest,
                "size": suspect.size,
                "checkedAt": suspect.checked_at.map(time),
                "repositories": suspect.repositories,
                "manifests": manifests,
            })
        })
        .collect();
    let damaged: Vec<_> = status
        .damaged
        .iter()
        .map(|manifest| {
            json!({
                "repository": manifest.repository,
                "digest": manifest.digest,
                "foundAt": time(manifest.found_at),
            })
        })
        .collect();
    json!({
        "rate": status.rate,
        "periodSeconds": status.period.as_secs(),
        "dueBefore": time(status.due_before),
        "left": { "blobs": status.blobs_left, "bytes": status.bytes_left },
        "oldest": status.oldest.map(time),
        "manifests": {
            "began": status.manifests_began.map(time),
            "ended": status.manifests_ended.map(time),
        },
        "suspectBlobs": { "count": status.suspect_count, "items": suspects },
        "damagedManifests": { "count": status.damaged_count, "items": damaged },
    })
}

/// The paths of this module in the OpenAPI document.
pub(super) fn paths() -> Value {
    let moment = json!({ "type": ["string", "null"], "format": "date-time" });
    let answer = json!({
        "200": { "description": "How far it is, and what it found", "content": { "application/json": { "schema": {
            "type": "object",
            "properties": {
                "rate": { "type": "integer", "description": "Bytes per second of one replica; 0: off" },
                "periodSeconds": { "type": "integer" },
                "dueBefore": { "type": "string", "format": "date-time", "description": "What was read before is to be read again" },
                "left": { "type": "object", "properties": { "blobs": { "type": "integer" }, "bytes": { "type": "integer" } } },
                "oldest": moment,
                "manifests": { "type": "object", "properties": { "began": moment, "ended": moment } },
                "suspectBlobs": { "type": "object", "description": "At most 100 items; pushing the content again heals it", "properties": {
                    "count": { "type": "integer" },
                    "items": { "type": "array", "items": { "type": "object", "properties": {
                        "digest": { "type": "string" },
                        "size": { "type": "integer" },
                        "checkedAt": moment,
                        "repositories": { "type": "array", "items": { "type": "string" } },
                        "manifests": { "type": "array", "items": { "type": "object", "properties": { "repository": { "type": "string" }, "digest": { "type": "string" } } } }
                    } } }
                } },
                "damagedManifests": { "type": "object", "properties": {
                    "count": { "type": "integer" },
                    "items": { "type": "array", "items": { "type": "object", "properties": {
                        "repository": { "type": "string" }, "digest": { "type": "string" }, "foundAt": moment
                    } } }
                } }
            }
        } } } },
        "401": { "$ref": "#/components/responses/Error" },
        "403": { "$ref": "#/components/responses/Error" }
    });
    json!({
        "/api/v1/scrub": { "get": {
            "operationId": "scrub",
            "summary": "How far the scrub is, and what it found",
            "responses": answer
        } },
        "/api/v1/scrub/run": { "post": {
            "operationId": "runScrub",
            "summary": "Read everything again, beginning now, on all replicas",
            "responses": answer
        } }
    })
}
