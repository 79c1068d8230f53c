//! The management API under `/api/v1/`, described by the OpenAPI document that it serves. Errors have
//! the form of the distribution API; lists page by `cursor`.

use http::{Response, StatusCode};

use crate::error::{Refusal, UNSUPPORTED};
use crate::events;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::v2::path::decode;
use crate::v2::query::Query;

mod attempts;
mod collection;
mod mode;
mod openapi;
mod pins;
mod repositories;
mod retention;
mod scrub;
pub(crate) mod storage;

/// Answers a request below `/api/`: the first word below `/api/v1/` names the module that answers.
pub(crate) async fn serve(call: &mut Call, path: &str) -> Result<Response<Body>, Refusal> {
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
        ["openapi.json"] => {
            allow(call, "GET, HEAD")?;
            Ok(json_response(StatusCode::OK, &openapi::document()))
        }
        ["events"] => {
            allow(call, "GET, HEAD")?;
            events::serve(call).await
        }
        ["attempts", rest @ ..] => attempts::serve(call, rest).await,
        ["collection", rest @ ..] => collection::serve(call, rest).await,
        ["mode", rest @ ..] => mode::serve(call, rest).await,
        ["pins", rest @ ..] => pins::serve(call, rest).await,
        ["repositories", rest @ ..] => repositories::serve(call, rest).await,
        ["retention", rest @ ..] => retention::serve(call, rest).await,
        ["scrub", rest @ ..] => scrub::serve(call, rest).await,
        ["storage", rest @ ..] => storage::serve(call, rest).await,
        _ => Err(Refusal::no_such_path()),
    }
}

/// Refuses methods that a path does not have, with those that it has (`GET, HEAD`).
fn allow(call: &Call, methods: &'static str) -> Result<(), Refusal> {
    if methods.split(", ").any(|method| method == call.method()) {
        return Ok(());
    }
    Err(Refusal::method(methods))
}

/// A time in RFC 3339, UTC. What lies beyond the years that this form has is told as the last or first moment it has.
pub(crate) fn time(at: store::Timestamp) -> String {
    let (first, last) = (jiff::Timestamp::MIN, jiff::Timestamp::MAX);
    jiff::Timestamp::from_microsecond(at.0.clamp(first.as_microsecond(), last.as_microsecond()))
        .unwrap_or(last)
        .to_string()
}

/// Refuses text that would do something to the screen of whoever reads it.
fn printable(name: &str, text: &str) -> Result<(), Refusal> {
    if text.chars().any(oci::text::is_unprintable) {
        return Err(Refusal::bad_request(
            UNSUPPORTED,
            format!("`{name}` holds control characters or marks of direction, write plain text"),
        ));
    }
    Ok(())
}

/// Entries of a page when the caller names no number, and the most.
const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

/// How many entries the caller wants on a page.
fn page(query: &Query) -> Result<usize, Refusal> {
    match query.number("limit")? {
        None => Ok(PAGE),
        Some(0) => Err(Refusal::bad_request(
            "PAGINATION_NUMBER_INVALID",
            format!("`limit` must be 1 to {PAGE_MAX}"),
        )),
        Some(n) => Ok(usize::try_from(n).unwrap_or(PAGE_MAX).min(PAGE_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        assert_eq!(
            time(store::Timestamp(1_700_000_000_123_456)),
            "2023-11-14T22:13:20.123456Z"
        );
        // A lease of a million years.
        assert_eq!(
            time(store::Timestamp(i64::MAX)),
            "9999-12-30T22:00:00.999999999Z"
        );
    }
}
