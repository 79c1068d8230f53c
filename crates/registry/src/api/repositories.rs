//! `/api/v1/repositories/{name}/…`: what the distribution API has no place for.

use http::{Method, Response, StatusCode};
use oci::reference::ReferenceError;
use oci::{Digest, RepositoryName, Tag};
use serde_json::{Value, json};
use store::Reason;

use super::{allow, page, time};
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;

/// Answers a request; `words` is what follows `repositories`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    match Route::parse(call.method(), words)? {
        Route::Delete(name) => delete(call, &name).await,
        Route::History(name, tag) => {
            allow(call, "GET, HEAD")?;
            history(call, &name, &tag).await
        }
        Route::Kept(name, digest) => {
            allow(call, "GET, HEAD")?;
            kept(call, &name, &digest).await
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    Delete(RepositoryName),
    History(RepositoryName, Tag),
    Kept(RepositoryName, Digest),
}

impl Route {
    /// A repository's name may hold any of these words, so a path is read from its end.
    fn parse(method: &Method, words: &[&str]) -> Result<Self, Refusal> {
        if method == Method::DELETE {
            return Ok(Self::Delete(words.join("/").parse()?));
        }
        match words {
            [name @ .., "manifests", digest, "kept"] if !name.is_empty() => {
                let name = name.join("/").parse()?;
                let digest = digest.parse().map_err(|_| {
                    Refusal::bad_request(
                        "DIGEST_INVALID",
                        format!("`{digest}` is no digest, resolve the tag first"),
                    )
                })?;
                Ok(Self::Kept(name, digest))
            }
            [name @ .., "tags", tag, "history"] if !name.is_empty() => {
                let parsed: Result<_, ReferenceError> = name
                    .join("/")
                    .parse()
                    .and_then(|name| Ok(Self::History(name, tag.parse()?)));
                Ok(parsed?)
            }
            _ => Err(Refusal::no_such_path()),
        }
    }
}

/// Every move of a tag, the newest first.
async fn history(call: &Call, name: &RepositoryName, tag: &Tag) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, name, Some(tag), None).await?;
    let query = call.query()?;
    let limit = page(&query)?;
    let before = match query.get("cursor") {
        None => None,
        Some(text) => Some(text.parse::<i64>().map_err(|_| {
            Refusal::bad_request(
                UNSUPPORTED,
                "`cursor` must be the `next` of the page before",
            )
        })?),
    };
    let mut moves = call
        .context
        .store
        .tag_history(name, tag, before, limit + 1)
        .await?;
    if moves.is_empty() && before.is_none() {
        return Err(Refusal::manifest_unknown(tag));
    }
    let more = moves.len() > limit;
    moves.truncate(limit);
    let next = more
        .then(|| moves.last().map(|m| m.generation.to_string()))
        .flatten();
    let items: Vec<_> = moves
        .iter()
        .map(|m| {
            json!({
                "generation": m.generation,
                "digest": m.digest,
                "actor": m.actor,
                "at": time(m.at),
            })
        })
        .collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next }),
    ))
}

/// Deletes a repository with all that it holds. It is gone with the answer; its content follows.
async fn delete(call: &Call, name: &RepositoryName) -> Result<Response<Body>, Refusal> {
    call.require(Action::Delete, name, None, None).await?;
    let store = &call.context.store;
    store.delete_repository(name, &call.actor()).await?;
    Ok(json_response(
        StatusCode::ACCEPTED,
        &json!({ "deleted": name }),
    ))
}

/// Why a manifest is kept.
async fn kept(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, name, None, Some(digest)).await?;
    let kept = call.context.store.kept(name, digest).await?;
    let kept = kept.ok_or_else(|| Refusal::manifest_unknown(digest))?;
    let mut reasons: Vec<Value> = kept.reasons.iter().map(reason).collect();
    // What retention says of a tag needs a look at the whole repository, so only of the first few.
    let tags = kept.reasons.iter().enumerate();
    let tags = tags.filter_map(|(at, reason)| match reason {
        Reason::Tag { tag, .. } => Some((at, tag)),
        _ => None,
    });
    for (at, tag) in tags.take(RETENTION_OF) {
        if let Some(verdict) = call.context.store.retention_of(name, tag).await? {
            reasons[at]["retention"] = json!({ "keeps": verdict.keeps, "reason": verdict.reason });
        }
    }
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "repository": name,
            "digest": digest,
            "kept": !kept.reasons.is_empty(),
            "until": kept.until.map(time),
            "reasons": reasons,
            "more": kept.more,
        }),
    ))
}

/// Tags of which retention is asked.
const RETENTION_OF: usize = 5;

fn reason(reason: &Reason) -> Value {
    let because = |list: &[Reason]| list.iter().map(self::reason).collect::<Vec<_>>();
    match reason {
        Reason::Tag { tag, since, by } => {
            json!({ "kind": "tag", "tag": tag, "since": time(*since), "by": by })
        }
        Reason::Pin {
            holder,
            reason,
            since,
            until,
        } => json!({
            "kind": "pin",
            "holder": holder,
            "reason": reason,
            "since": time(*since),
            "until": until.map(time),
        }),
        Reason::Lease { since, until } => {
            json!({ "kind": "lease", "since": time(*since), "until": time(*until) })
        }
        Reason::Index {
            digest,
            since,
            because: of,
        } => json!({
            "kind": "index",
            "digest": digest,
            "since": time(*since),
            "because": because(of),
        }),
        Reason::Subject {
            digest,
            since,
            because: of,
        } => json!({
            "kind": "subject",
            "digest": digest,
            "since": time(*since),
            "because": because(of),
        }),
        Reason::Waits {
            subject,
            since,
            until,
        } => json!({
            "kind": "waits",
            "digest": subject,
            "since": time(*since),
            "until": time(*until),
        }),
        _ => json!({ "kind": "other" }),
    }
}

/// The paths of this module in the OpenAPI document, beside the tag history.
pub(super) fn paths() -> Value {
    let name = json!({
        "name": "name", "in": "path", "required": true,
        "description": "The repository; it may contain slashes", "schema": { "type": "string" }
    });
    let time = json!({ "type": ["string", "null"], "format": "date-time" });
    let since = json!({
        "type": "string", "format": "date-time",
        "description": "tag: it points there; pin: it was set; lease: it was last renewed, reckoned with the lease that is set now; index and subject: both are there; waits: the push"
    });
    let reason = json!({
        "type": "object",
        "required": ["kind"],
        "properties": {
            "kind": { "enum": ["tag", "pin", "lease", "index", "subject", "waits"] },
            "tag": { "type": "string" },
            "retention": {
                "type": "object",
                "description": "What the policies say of this tag now; of the first few tags",
                "properties": { "keeps": { "type": "boolean" }, "reason": { "type": "string" } }
            },
            "by": { "type": "string" },
            "holder": { "type": "string" },
            "reason": { "type": "string" },
            "digest": { "type": "string", "description": "The index, the subject, or the subject that is waited for" },
            "since": since,
            "until": time,
            "because": { "type": "array", "description": "Why the index or subject is kept: reasons again", "items": { "type": "object" } }
        }
    });
    json!({
        "/api/v1/repositories/{name}": {
            "delete": {
                "operationId": "deleteRepository",
                "summary": "Delete a repository with all that it holds",
                "description": "Needs the right to delete every tag. With the answer the repository is gone and one of the same name can begin; the content goes in the background. Refused with 409 while something in it is pinned.",
                "parameters": [name],
                "responses": {
                    "202": { "description": "Deleted", "content": { "application/json": { "schema": {
                        "type": "object", "required": ["deleted"], "properties": { "deleted": { "type": "string" } }
                    } } } },
                    "401": { "$ref": "#/components/responses/Error" },
                    "403": { "$ref": "#/components/responses/Error" },
                    "404": { "$ref": "#/components/responses/Error" },
                    "409": { "$ref": "#/components/responses/Error" }
                }
            }
        },
        "/api/v1/repositories/{name}/manifests/{digest}/kept": {
            "get": {
                "operationId": "kept",
                "summary": "Why a manifest is kept",
                "parameters": [
                    name,
                    { "name": "digest", "in": "path", "required": true, "schema": { "type": "string" } }
                ],
                "responses": {
                    "200": { "description": "Every reason", "content": { "application/json": { "schema": {
                        "type": "object",
                        "required": ["repository", "digest", "kept", "until", "reasons", "more"],
                        "properties": {
                            "repository": { "type": "string" },
                            "digest": { "type": "string" },
                            "kept": { "type": "boolean" },
                            "until": { "type": ["string", "null"], "format": "date-time", "description": "After this time it is collected; null: something keeps it until somebody takes that away" },
                            "more": { "type": "boolean", "description": "There are more reasons than these" },
                            "reasons": { "type": "array", "items": reason }
                        }
                    } } } },
                    "401": { "$ref": "#/components/responses/Error" },
                    "404": { "$ref": "#/components/responses/Error" }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let get = Method::GET;
        let parse = |path: &str| Route::parse(&get, &path.split('/').collect::<Vec<_>>());
        let history = Route::History("a/tags/b".parse().unwrap(), "v1".parse().unwrap());
        assert_eq!(parse("a/tags/b/tags/v1/history").unwrap(), history);
        for bad in ["", "tags/v1/history", "A/tags/v1/history"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let digest = Digest::sha256(b"x");
        let kept = Route::Kept("a/manifests/b".parse().unwrap(), digest.clone());
        let path = format!("a/manifests/b/manifests/{digest}/kept");
        assert_eq!(parse(&path).unwrap(), kept);
        assert!(parse("a/manifests/v1/kept").is_err());
        let delete = Route::parse(&Method::DELETE, &["a", "tags", "b"]).unwrap();
        assert_eq!(delete, Route::Delete("a/tags/b".parse().unwrap()));
        assert!(Route::parse(&Method::DELETE, &["A"]).is_err());
        assert!(Route::parse(&Method::DELETE, &[]).is_err());
    }
}
