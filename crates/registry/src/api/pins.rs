//! `/api/v1/pins/{holder}`: what holders keep from deletion (`I19`).
//!
//! A holder's name is that of the user who writes it, or lies below it: `host1`, `host1/web`. So two users never write the
//! same set, and nobody but an operator takes another one's pins away.

use http::header::{ETAG, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderValue, Method, Response, StatusCode};
use oci::{Digest, RepositoryName};
use serde::Deserialize;
use serde_json::{Value, json};
use store::{ExpectedPins, HeldPin, Pin, Timestamp};

use super::{allow, page, printable, time};
use crate::auth::{Decision, Principal};
use crate::error::{DENIED, Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;
use crate::v2::condition::entity_tags;

/// Answers a request; `words` is what follows `pins`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    if words.is_empty() {
        allow(call, "GET, HEAD")?;
        let query = call.query()?;
        return match (query.get("repository"), query.get("digest")) {
            (None, None) => holders(call).await,
            (Some(repository), Some(digest)) => {
                of_manifest(call, &repository.parse()?, &digest.parse()?).await
            }
            _ => Err(Refusal::bad_request(
                UNSUPPORTED,
                "name `repository` and `digest`, or neither",
            )),
        };
    }
    allow(call, "GET, HEAD, PUT, DELETE")?;
    let holder = words.join("/");
    require_holder(call, &holder).await?;
    match *call.method() {
        Method::PUT => replace(call, &holder).await,
        Method::DELETE => remove(call, &holder).await,
        _ => show(call, &holder).await,
    }
}

/// Lets a request go on that concerns a holder: the caller's own, or any for an operator.
pub(super) async fn require_holder(call: &Call, holder: &str) -> Result<(), Refusal> {
    check_name(holder)?;
    if is_own(call, holder) {
        return Ok(());
    }
    match &call.caller.principal {
        Principal::User(user)
            if call.context.auth.decide_operator(&call.caller) == Decision::Denied =>
        {
            Err(Refusal::new(
                StatusCode::FORBIDDEN,
                DENIED,
                format!(
                    "you may write as the holder `{user}` and names below it, such as `{user}/web`; \
                     others need a rule with `admin` for all repositories"
                ),
            ))
        }
        _ => call.require_operator().await,
    }
}

/// Tells whether a holder is the caller or below it.
pub(super) fn is_own(call: &Call, holder: &str) -> bool {
    match &call.caller.principal {
        Principal::Anonymous => false,
        Principal::User(user) => holder
            .strip_prefix(user.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
    }
}

fn check_name(holder: &str) -> Result<(), Refusal> {
    let fits = holder.len() <= LONGEST_NAME
        && !holder.chars().any(oci::text::is_unprintable)
        && holder
            .split('/')
            .all(|word| !word.is_empty() && word != "." && word != "..");
    if fits {
        return Ok(());
    }
    Err(Refusal::bad_request(
        UNSUPPORTED,
        format!(
            "a holder's name is words with slashes between them, such as `host1/web`, of at most {LONGEST_NAME} bytes"
        ),
    ))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    pins: Vec<WantedPin>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedPin {
    repository: String,
    digest: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    expires: Option<String>,
}

async fn replace(call: &mut Call, holder: &str) -> Result<Response<Body>, Refusal> {
    let expected = expected(call)?;
    let wanted: Wanted = call.json(LONGEST_BODY).await?;
    if wanted.pins.len() > MOST {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "SIZE_INVALID",
            format!(
                "a holder may have {MOST} pins, these are {}; use several holders",
                wanted.pins.len()
            ),
        ));
    }
    let mut pins = Vec::with_capacity(wanted.pins.len());
    for pin in wanted.pins {
        if pin.reason.len() > LONGEST_REASON {
            return Err(Refusal::bad_request(
                UNSUPPORTED,
                format!("a `reason` has at most {LONGEST_REASON} bytes"),
            ));
        }
        printable("reason", &pin.reason)?;
        let expires = pin.expires.map(|text| {
            let at: jiff::Timestamp = text.parse().map_err(|_| {
                Refusal::bad_request(
                    UNSUPPORTED,
                    "`expires` must be a time such as `2030-01-31T00:00:00Z`",
                )
            })?;
            Ok::<_, Refusal>(Timestamp(at.as_microsecond()))
        });
        pins.push(Pin {
            repository: pin.repository.parse()?,
            digest: pin.digest.parse()?,
            reason: pin.reason,
            expires: expires.transpose()?,
        });
    }
    // What the caller may not read is not there for it. A token that lacks the scope is told all of them at once.
    let mut names: Vec<&RepositoryName> = pins.iter().map(|pin| &pin.repository).collect();
    names.sort_unstable();
    names.dedup();
    let hidden: Vec<RepositoryName> = call
        .hidden(Action::Pull, &names)?
        .into_iter()
        .cloned()
        .collect();
    let (pins, unseen): (Vec<_>, Vec<_>) = pins
        .into_iter()
        .partition(|pin| !hidden.contains(&pin.repository));
    let mut outcome = call
        .context
        .store
        .set_pins(holder, pins, expected, &call.actor())
        .await?;
    outcome
        .missing
        .extend(unseen.into_iter().map(|pin| (pin.repository, pin.digest)));
    outcome.missing.sort_unstable();
    outcome.missing.dedup();
    let list = |names: &[(RepositoryName, Digest)]| -> Vec<Value> {
        names
            .iter()
            .map(|(repository, digest)| json!({ "repository": repository.as_str(), "digest": digest }))
            .collect()
    };
    let status = if outcome.created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let answer = json!({
        "holder": holder,
        "held": list(&outcome.held),
        "missing": list(&outcome.missing),
        "expired": list(&outcome.expired),
    });
    let mut response = json_response(status, &answer);
    response
        .headers_mut()
        .insert(ETAG, entity_tag(outcome.version)?);
    Ok(response)
}

async fn remove(call: &Call, holder: &str) -> Result<Response<Body>, Refusal> {
    let expected = expected(call)?;
    let removed = call
        .context
        .store
        .remove_pins(holder, expected, &call.actor())
        .await?;
    if !removed {
        return Err(no_such_holder(holder));
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

async fn show(call: &Call, holder: &str) -> Result<Response<Body>, Refusal> {
    let set = call
        .context
        .store
        .pins(holder)
        .await?
        .ok_or_else(|| no_such_holder(holder))?;
    let answer = json!({
        "holder": holder,
        "updatedAt": time(set.updated_at),
        "updatedBy": set.updated_by,
        "pins": set.pins.iter().map(|held| pin(held, false)).collect::<Vec<_>>(),
    });
    let mut response = json_response(StatusCode::OK, &answer);
    response
        .headers_mut()
        .insert(ETAG, entity_tag(set.version)?);
    Ok(response)
}

/// Holders, by name. Who is no operator sees its own.
async fn holders(call: &Call) -> Result<Response<Body>, Refusal> {
    let query = call.query()?;
    let limit = page(&query)?;
    let cursor = query.get("cursor");
    let store = &call.context.store;
    let own = match &call.caller.principal {
        Principal::User(user)
            if call.context.auth.decide_operator(&call.caller) == Decision::Denied =>
        {
            Some(user)
        }
        _ => {
            call.require_operator().await?;
            None
        }
    };
    let mut found = Vec::new();
    if let Some(user) = own {
        let below = format!("{user}/");
        // Between a name and the names below it others may stand: `a`, `a-b`, `a/b`.
        if cursor.is_none_or(|cursor| cursor < user.as_str()) {
            found.extend(store.find_pin_holder(user).await?);
        }
        let after = cursor.filter(|cursor| *cursor > below.as_str());
        let rest = store
            .pin_holders(Some(after.unwrap_or(&below)), limit + 1)
            .await?;
        found.extend(
            rest.into_iter()
                .take_while(|held| held.holder.starts_with(&below)),
        );
    } else {
        found = store.pin_holders(cursor, limit + 1).await?;
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let next = more
        .then(|| found.last().map(|held| held.holder.clone()))
        .flatten();
    let items: Vec<_> = found
        .iter()
        .map(|held| {
            json!({
                "holder": held.holder,
                "pins": held.pins,
                "updatedAt": time(held.updated_at),
                "updatedBy": held.updated_by,
            })
        })
        .collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

/// Who pins a manifest, for everybody who may read it.
async fn of_manifest(
    call: &Call,
    repository: &RepositoryName,
    digest: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, repository, None, Some(digest))
        .await?;
    let query = call.query()?;
    let limit = page(&query)?;
    let mut pins = call
        .context
        .store
        .pins_of(repository, digest, query.get("cursor"), limit + 1)
        .await?;
    let more = pins.len() > limit;
    pins.truncate(limit);
    let next = more
        .then(|| pins.last().map(|held| held.holder.clone()))
        .flatten();
    let items: Vec<_> = pins.iter().map(|held| pin(held, true)).collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

fn pin(held: &HeldPin, with_holder: bool) -> Value {
    let mut value = json!({
        "repository": held.pin.repository.as_str(),
        "digest": held.pin.digest,
        "reason": held.pin.reason,
        "expires": held.pin.expires.map(time),
        "createdAt": time(held.created_at),
        "createdBy": held.created_by,
    });
    if with_holder {
        value["holder"] = json!(held.holder);
    }
    value
}

/// `If-Match` and `If-None-Match: *`, as for tags.
fn expected(call: &Call) -> Result<ExpectedPins, Refusal> {
    let headers = &call.head.headers;
    let none_match = entity_tags(headers, &IF_NONE_MATCH);
    let matches = entity_tags(headers, &IF_MATCH);
    if !none_match.is_empty() {
        if none_match != ["*"] || !matches.is_empty() {
            return Err(Refusal::bad_request(
                UNSUPPORTED,
                "pins take `If-None-Match: *` or `If-Match: \"<version>\"`, one of them",
            ));
        }
        return Ok(ExpectedPins::Absent);
    }
    if !headers.contains_key(IF_MATCH) {
        return Ok(ExpectedPins::Any);
    }
    if matches == ["*"] {
        return Ok(ExpectedPins::Present);
    }
    // A weak or foreign entity tag matches nothing; then no state at all is right.
    Ok(ExpectedPins::Version(
        matches
            .iter()
            .filter_map(|tag| tag.strip_prefix('"')?.strip_suffix('"')?.parse().ok())
            .collect(),
    ))
}

fn entity_tag(version: i64) -> Result<HeaderValue, Refusal> {
    Ok(HeaderValue::from_str(&format!("\"{version}\""))?)
}

fn no_such_holder(holder: &str) -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "HOLDER_UNKNOWN",
        format!("`{holder}` holds no pins"),
    )
}

/// The paths of this module for the OpenAPI document.
pub(super) fn paths() -> Value {
    let error = || json!({ "$ref": "#/components/responses/Error" });
    let name = json!({
        "repository": { "type": "string" },
        "digest": { "type": "string" }
    });
    let names = json!({ "type": "array", "items": { "type": "object", "required": ["repository", "digest"], "properties": name } });
    let holder = json!({ "name": "holder", "in": "path", "required": true, "description": "The name of the user, or a name below it; it may contain slashes", "schema": { "type": "string", "maxLength": LONGEST_NAME } });
    let held = json!({
        "type": "object",
        "required": ["repository", "digest", "reason", "expires", "createdAt", "createdBy"],
        "properties": {
            "repository": { "type": "string" },
            "digest": { "type": "string" },
            "reason": { "type": "string" },
            "expires": { "type": ["string", "null"], "format": "date-time" },
            "createdAt": { "type": "string", "format": "date-time" },
            "createdBy": { "type": "string" },
            "holder": { "type": "string", "description": "Where pins of several holders are listed" }
        }
    });
    json!({
        "/api/v1/pins": {
            "get": {
                "operationId": "pins",
                "summary": "Holders of pins, or who pins a manifest",
                "description": "Operators see every holder, others their own. With `repository` and `digest`: the pins of that manifest, for everybody who may pull it.",
                "parameters": [
                    { "name": "repository", "in": "query", "schema": { "type": "string" } },
                    { "name": "digest", "in": "query", "schema": { "type": "string" } },
                    { "name": "limit", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 } },
                    { "name": "cursor", "in": "query", "description": "`next` of the page before", "schema": { "type": "string" } }
                ],
                "responses": {
                    "200": { "description": "One page", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["items", "next"],
                        "properties": {
                            "items": { "type": "array", "items": { "anyOf": [
                                { "type": "object", "required": ["holder", "pins", "updatedAt", "updatedBy"], "properties": {
                                    "holder": { "type": "string" },
                                    "pins": { "type": "integer" },
                                    "updatedAt": { "type": "string", "format": "date-time" },
                                    "updatedBy": { "type": "string" }
                                } },
                                held
                            ] } },
                            "next": { "type": ["string", "null"] }
                        }
                    } } } },
                    "401": error(), "403": error()
                }
            }
        },
        "/api/v1/pins/{holder}": {
            "parameters": [holder],
            "get": {
                "operationId": "pinsOf",
                "summary": "The pins of a holder",
                "responses": {
                    "200": { "description": "Its pins; `ETag` is their version", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["holder", "updatedAt", "updatedBy", "pins"],
                        "properties": {
                            "holder": { "type": "string" },
                            "updatedAt": { "type": "string", "format": "date-time" },
                            "updatedBy": { "type": "string" },
                            "pins": { "type": "array", "items": held }
                        }
                    } } } },
                    "401": error(), "403": error(), "404": error()
                }
            },
            "put": {
                "operationId": "setPins",
                "summary": "Replace the whole set of a holder",
                "description": "Idempotent, and let through in the read-only mode by command. Takes `If-Match` with the `ETag` of the set, or `If-None-Match: *`. A digest that is not here, or that the caller may not pull, is told as missing and is no error.",
                "requestBody": { "required": true, "content": { "application/json": { "schema": {
                    "type": "object",
                    "required": ["pins"],
                    "additionalProperties": false,
                    "properties": { "pins": { "type": "array", "maxItems": MOST, "items": {
                        "type": "object",
                        "required": ["repository", "digest"],
                        "additionalProperties": false,
                        "properties": {
                            "repository": { "type": "string" },
                            "digest": { "type": "string" },
                            "reason": { "type": "string", "maxLength": LONGEST_REASON },
                            "expires": { "type": ["string", "null"], "format": "date-time" }
                        }
                    } } }
                } } } },
                "responses": {
                    "200": { "description": "What holds now", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["holder", "held", "missing", "expired"],
                        "properties": { "holder": { "type": "string" }, "held": names, "missing": names, "expired": names }
                    } } } },
                    "201": { "description": "The same, for a holder that had no set" },
                    "400": error(), "401": error(), "403": error(), "412": error(), "413": error()
                }
            },
            "delete": {
                "operationId": "removePins",
                "summary": "Remove a holder with its pins",
                "responses": { "204": { "description": "Gone" }, "401": error(), "403": error(), "404": error(), "412": error() }
            }
        }
    })
}

const LONGEST_NAME: usize = 255;
const LONGEST_REASON: usize = 256;
/// Pins of one holder.
const MOST: usize = 2000;
const LONGEST_BODY: usize = 2 << 20;
