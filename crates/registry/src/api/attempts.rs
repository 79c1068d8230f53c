//! `/api/v1/attempts`: what agents report of their deployments, in the canonical form of their ledgers.
//!
//! A batch is a piece of one ledger. Its chain is checked here, record by record, from the hash that it says it follows;
//! whether that is the last one that is known is the store's question, and no reason to refuse.

use http::{Method, Response, StatusCode};
use oci::record::{Chain, MAX_REPORTED, canonical};
use oci::{Digest, Reference, RepositoryName};
use serde::Deserialize;
use serde_json::{Value, json};
use store::{AttemptFilter, AttemptRecord, KeptAttempt};

use super::{allow, page, pins, time};
use crate::auth::{Auth, Decision, Principal};
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};

/// Answers a request; `words` is what follows `attempts`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    if !words.is_empty() {
        return Err(Refusal::no_such_path());
    }
    allow(call, "GET, HEAD, POST")?;
    if *call.method() == Method::POST {
        add(call).await
    } else {
        list(call).await
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    holder: String,
    target: String,
    #[serde(default)]
    previous: Option<String>,
    records: Vec<Value>,
}

async fn add(call: &mut Call) -> Result<Response<Body>, Refusal> {
    if call.caller.principal == Principal::Anonymous {
        // Before the body: whoever is nobody is told so, and not what is wrong with it.
        call.require_operator().await?;
    }
    let batch: Batch = call.json(LONGEST_BODY).await?;
    pins::require_holder(call, &batch.holder).await?;
    let bad = |message: String| Refusal::bad_request(UNSUPPORTED, message);
    if batch.target.is_empty()
        || batch.target.len() > LONGEST_TARGET
        || batch.target.chars().any(oci::text::is_unprintable)
    {
        return Err(bad(format!(
            "`target` must have 1 to {LONGEST_TARGET} bytes of plain text"
        )));
    }
    if batch.records.len() > MOST {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "SIZE_INVALID",
            format!("a batch may have {MOST} records, send the rest with another request"),
        ));
    }
    let mut chain = match &batch.previous {
        None => Chain::new(),
        Some(head) => Chain::resume(head).map_err(|error| bad(format!("`previous`: {error}")))?,
    };
    let mut records = Vec::with_capacity(batch.records.len());
    for (at, value) in batch.records.iter().enumerate() {
        let record = read(call, &mut chain, value)
            .map_err(|error| bad(format!("record {at} of the batch: {error}")))?;
        if record.body.len() > MAX_REPORTED {
            return Err(Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                format!(
                    "record {at} of the batch has {} bytes, the limit is {MAX_REPORTED}: leave it out and go on with \
                     the one after it",
                    record.body.len()
                ),
            ));
        }
        if !oci::text::is_printable(value) {
            return Err(bad(format!(
                "record {at} of the batch holds control characters or marks of direction: leave it out and go on with \
                 the one after it"
            )));
        }
        records.push(record);
    }
    let outcome = call
        .context
        .store
        .add_attempts(
            &batch.holder,
            &batch.target,
            records,
            &call.caller.principal.id(),
        )
        .await?;
    let known = outcome
        .head
        .map(|head| json!({ "sequence": head.sequence, "hash": hex::encode(head.hash) }));
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "added": outcome.added,
            "repeated": outcome.repeated,
            "seams": outcome.seams,
            "known": known,
        }),
    ))
}

/// Checks one record and takes apart what it can be found by.
fn read(
    call: &Call,
    chain: &mut Chain,
    value: &Value,
) -> Result<AttemptRecord, oci::record::RecordError> {
    let line = canonical(value)?;
    let previous = chain.previous;
    let record = chain.verify_line(&line)?;
    let text = |key: &str| {
        record
            .get(key)
            .and_then(Value::as_str)
            .map(|text| text.chars().take(LONGEST_WORD).collect::<String>())
    };
    let repository = text("reference")
        .and_then(|reference| reference.parse::<Reference>().ok())
        .map(|reference| reference.repository)
        // A record is shown to those who may pull this; nobody gets it filed under what it may not read.
        .filter(|repository| call.context.auth.may_list(&call.caller, repository));
    Ok(AttemptRecord {
        previous,
        hash: chain.previous,
        kind: text("kind").unwrap_or_default(),
        attempt: record.get("attempt").and_then(Value::as_u64),
        repository,
        digest: text("digest").and_then(|digest| digest.parse().ok()),
        outcome: text("outcome"),
        // Canonical bytes of JSON are text.
        body: String::from_utf8_lossy(&line).into_owned(),
    })
}

/// Records, the newest first: all for an operator and for the holder itself, else those about repositories that the caller
/// may pull.
async fn list(call: &Call) -> Result<Response<Body>, Refusal> {
    let query = call.query()?;
    let limit = page(&query)?;
    let part = |key: &str| query.get(key).map(str::to_owned);
    let filter = AttemptFilter {
        holder: part("holder"),
        target: part("target"),
        kind: part("kind"),
        digest: query.get("digest").map(str::parse::<Digest>).transpose()?,
    };
    if filter.target.is_some() && filter.holder.is_none() && filter.digest.is_none() {
        return Err(Refusal::bad_request(
            UNSUPPORTED,
            "`target` needs `holder`: names of targets are those of one agent",
        ));
    }
    let sees_all = sees_all(call, filter.holder.as_deref()).await?;
    let mut cursor = match query.get("cursor") {
        None => None,
        Some(text) => Some(text.parse::<i64>().map_err(|_| {
            Refusal::bad_request(
                UNSUPPORTED,
                "`cursor` must be the `next` of the page before",
            )
        })?),
    };
    // Records can be long: a page ends early rather than taking much memory, and so does a search in vain.
    let (mut items, mut bytes, mut looked_at) = (Vec::new(), 0, 0);
    let more = loop {
        let found = call.context.store.attempts(&filter, cursor, STEP).await?;
        let last = found.len() < STEP;
        let mut full = false;
        for kept in found {
            if items.len() == limit || bytes > LONGEST_PAGE {
                full = true;
                break;
            }
            looked_at += 1;
            cursor = Some(kept.cursor);
            if sees_all || sees(call, kept.repository.as_ref()) {
                bytes += kept.body.len();
                items.push(shown(&kept)?);
            }
        }
        if full || (!last && looked_at >= MOST_LOOKED_AT) {
            break true;
        }
        if last {
            break false;
        }
    };
    let next = cursor.filter(|_| more).map(|cursor| cursor.to_string());
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

/// Tells whether the caller sees records whatever they are about. A log of deployments is not for callers without a name.
async fn sees_all(call: &Call, holder: Option<&str>) -> Result<bool, Refusal> {
    let Auth::Users(_) = call.context.auth else {
        return Ok(true);
    };
    if call.caller.principal == Principal::Anonymous {
        call.require_operator().await?;
    }
    Ok(
        call.context.auth.decide_operator(&call.caller) == Decision::Allowed
            || holder.is_some_and(|holder| pins::is_own(call, holder)),
    )
}

fn sees(call: &Call, repository: Option<&RepositoryName>) -> bool {
    repository.is_some_and(|repository| call.context.auth.may_list(&call.caller, repository))
}

fn shown(kept: &KeptAttempt) -> Result<Value, Refusal> {
    let record: Value = serde_json::from_str(&kept.body)
        .map_err(|error| Refusal::internal(format!("a record that was kept: {error}")))?;
    Ok(json!({
        "holder": kept.holder,
        "target": kept.target,
        "sequence": kept.sequence,
        "hash": hex::encode(kept.hash),
        "link": kept.link,
        "repository": kept.repository.as_ref().map(RepositoryName::as_str),
        "receivedAt": time(kept.received_at),
        "receivedBy": kept.received_by,
        "record": record,
    }))
}

/// The paths of this module for the OpenAPI document.
pub(super) fn paths() -> Value {
    let error = || json!({ "$ref": "#/components/responses/Error" });
    let query = |name: &str, description: &str| json!({ "name": name, "in": "query", "description": description, "schema": { "type": "string" } });
    json!({
        "/api/v1/attempts": {
            "get": {
                "operationId": "attempts",
                "summary": "What agents reported, the newest first",
                "description": "Operators see every record and holders their own; others see records about repositories that they may pull. A page may have fewer entries than asked for and still have a `next`.",
                "parameters": [
                    query("holder", "Only those of this holder"),
                    query("target", "Only those of this target of the holder"),
                    query("digest", "Only those about this release"),
                    query("kind", "Only those of this kind, such as `outcome`"),
                    { "name": "limit", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 } },
                    query("cursor", "`next` of the page before")
                ],
                "responses": {
                    "200": { "description": "One page", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["items", "next"],
                        "properties": {
                            "items": { "type": "array", "items": {
                                "type": "object",
                                "required": ["holder", "target", "sequence", "hash", "link", "repository", "receivedAt", "receivedBy", "record"],
                                "properties": {
                                    "holder": { "type": "string" },
                                    "target": { "type": "string" },
                                    "sequence": { "type": "integer", "description": "Its place among the records of the target, from 1" },
                                    "hash": { "type": "string" },
                                    "link": { "enum": ["start", "next", "gap", "fork"], "description": "How it follows the record before it here; `gap`: records between are not known, `fork`: it follows an older one" },
                                    "repository": { "type": ["string", "null"] },
                                    "receivedAt": { "type": "string", "format": "date-time" },
                                    "receivedBy": { "type": "string" },
                                    "record": { "type": "object" }
                                }
                            } },
                            "next": { "type": ["string", "null"] }
                        }
                    } } } },
                    "401": error()
                }
            },
            "post": {
                "operationId": "addAttempts",
                "summary": "Report records of an attempt ledger",
                "description": "Idempotent: a record that is known is passed over. A record has at most 256 KiB and no control characters but line feeds and tabs. What one user may have is limited, see the reference of this API. Without records the answer only tells the last one that is known, from which to go on.",
                "requestBody": { "required": true, "content": { "application/json": { "schema": {
                    "type": "object",
                    "required": ["holder", "target", "records"],
                    "additionalProperties": false,
                    "properties": {
                        "holder": { "type": "string", "description": "The name of the user, or a name below it" },
                        "target": { "type": "string", "maxLength": LONGEST_TARGET },
                        "previous": { "type": ["string", "null"], "description": "The hash of the record before the first of these; left out at the beginning of a ledger" },
                        "records": { "type": "array", "maxItems": MOST, "items": { "type": "object", "description": "A line of the ledger" } }
                    }
                } } } },
                "responses": {
                    "200": { "description": "What came of it", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["added", "repeated", "seams", "known"],
                        "properties": {
                            "added": { "type": "integer" },
                            "repeated": { "type": "integer" },
                            "seams": { "type": "integer", "description": "New records that do not follow the last one that was known" },
                            "known": { "type": ["object", "null"], "required": ["sequence", "hash"], "properties": { "sequence": { "type": "integer" }, "hash": { "type": "string" } } }
                        }
                    } } } },
                    "400": error(), "401": error(), "403": error(), "413": error()
                }
            }
        }
    })
}

/// Two of the longest lines of a ledger.
const LONGEST_BODY: usize = 2 * oci::record::MAX_LINE;
const LONGEST_TARGET: usize = 255;
const LONGEST_WORD: usize = 1024;
/// Records of one batch.
const MOST: usize = 1000;
/// Records that are read at once.
const STEP: usize = 16;
const LONGEST_PAGE: usize = 4 << 20;
const MOST_LOOKED_AT: usize = 4000;
