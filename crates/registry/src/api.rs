//! The management API under `/api/v1/`, described by the OpenAPI document that it serves. Errors have
//! the form of the distribution API; lists page by `cursor`.

use http::{Method, Response, StatusCode};
use oci::reference::ReferenceError;
use oci::{RepositoryName, Tag};
use serde_json::json;

use crate::error::{Refusal, UNSUPPORTED};
use crate::events;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;
use crate::v2::path::decode;

mod openapi;

/// Answers a request below `/api/`.
pub(crate) async fn serve(call: &mut Call, path: &str) -> Result<Response<Body>, Refusal> {
    let route = Route::parse(path)?;
    if !matches!(*call.method(), Method::GET | Method::HEAD) {
        return Err(Refusal::method("GET, HEAD"));
    }
    match route {
        Route::OpenApi => Ok(json_response(StatusCode::OK, &openapi::document())),
        Route::Events => events::serve(call).await,
        Route::History(name, tag) => history(call, &name, &tag).await,
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    OpenApi,
    Events,
    History(RepositoryName, Tag),
}

impl Route {
    fn parse(path: &str) -> Result<Self, Refusal> {
        let rest = path
            .strip_prefix("/api/v1/")
            .ok_or_else(Refusal::no_such_path)?;
        let segments = rest
            .split('/')
            .map(decode)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(Refusal::no_such_path)?;
        let words: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
        match words.as_slice() {
            ["openapi.json"] => Ok(Self::OpenApi),
            ["events"] => Ok(Self::Events),
            ["repositories", name @ .., "tags", tag, "history"] if !name.is_empty() => {
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
    let limit = query.number("limit")?.map_or(PAGE, |n| {
        usize::try_from(n).unwrap_or(PAGE_MAX).clamp(1, PAGE_MAX)
    });
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

/// A time in RFC 3339, UTC.
pub(crate) fn time(at: store::Timestamp) -> String {
    jiff::Timestamp::from_microsecond(at.0)
        .unwrap_or_default()
        .to_string()
}

const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let history = Route::History("a/tags/b".parse().unwrap(), "v1".parse().unwrap());
        assert_eq!(
            Route::parse("/api/v1/repositories/a/tags/b/tags/v1/history").unwrap(),
            history
        );
        assert_eq!(Route::parse("/api/v1/events").unwrap(), Route::Events);
        for bad in [
            "/api/v1/",
            "/api/v2/events",
            "/api/v1/events/",
            "/api/v1/repositories/tags/v1/history",
            "/api/v1/repositories/A/tags/v1/history",
        ] {
            assert!(Route::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_readable() {
        assert_eq!(
            time(store::Timestamp(1_700_000_000_123_456)),
            "2023-11-14T22:13:20.123456Z"
        );
        assert_eq!(time(store::Timestamp(i64::MAX)), "1970-01-01T00:00:00Z");
    }
}
