//! `/api/v1/repositories/{name}/…`: what the distribution API has no place for.

use http::{Response, StatusCode};
use oci::reference::ReferenceError;
use oci::{RepositoryName, Tag};
use serde_json::json;

use super::{allow, page, time};
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;

/// Answers a request; `words` is what follows `repositories`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    match Route::parse(words)? {
        Route::History(name, tag) => {
            allow(call, "GET, HEAD")?;
            history(call, &name, &tag).await
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    History(RepositoryName, Tag),
}

impl Route {
    /// A repository's name may hold any of these words, so a path is read from its end.
    fn parse(words: &[&str]) -> Result<Self, Refusal> {
        match words {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let parse = |path: &str| Route::parse(&path.split('/').collect::<Vec<_>>());
        let history = Route::History("a/tags/b".parse().unwrap(), "v1".parse().unwrap());
        assert_eq!(parse("a/tags/b/tags/v1/history").unwrap(), history);
        for bad in ["", "tags/v1/history", "A/tags/v1/history"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
