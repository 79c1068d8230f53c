//! `GET /v2/_catalog` for the tools that expect it: repositories that the caller may read.

use http::header::LINK;
use http::{Response, StatusCode};
use serde_json::json;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::v2::header;
use crate::v2::query::encode;
use crate::v2::tag::page;

/// Lists repositories in bytewise order, `n` and `last` as with tags.
pub(crate) async fn list(call: &Call) -> Result<Response<Body>, Refusal> {
    call.require_registry("catalog")?;
    let query = call.query()?;
    let limit = page(call, &query)?;
    let auth = &call.context.auth;
    let mut names: Vec<String> = Vec::new();
    let mut last = query.get("last").map(str::to_owned);
    let mut more = limit > 0;
    // Who may read little of much is shown short pages with a link, not a scan without end.
    for _ in 0..BATCHES {
        if names.len() > limit || !more {
            break;
        }
        let batch = call
            .context
            .store
            .repositories(last.as_deref(), BATCH)
            .await?;
        more = batch.len() == BATCH;
        last = batch.last().map(ToString::to_string).or(last);
        names.extend(
            batch
                .into_iter()
                .filter(|name| auth.may_list(&call.caller, name))
                .map(|name| name.to_string()),
        );
    }
    if names.len() > limit {
        names.truncate(limit);
        last = names.last().cloned();
        more = limit > 0;
    }
    let mut response = json_response(StatusCode::OK, &json!({ "repositories": names }));
    if let (true, Some(last)) = (more, last) {
        let next = format!(
            "</v2/_catalog?n={limit}&last={}>; rel=\"next\"",
            encode(&last)
        );
        response.headers_mut().insert(LINK, header(&next)?);
    }
    Ok(response)
}

const BATCH: usize = 500;
const BATCHES: usize = 20;
