//! Tag lists ([distribution-spec § Listing tags](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-tags)).

use http::header::LINK;
use http::{Response, StatusCode};
use oci::RepositoryName;
use serde_json::json;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;
use crate::v2::header;
use crate::v2::query::{Query, encode};

/// `GET /v2/<name>/tags/list` (end-8a, end-8b): bytewise order, `last` need not exist.
pub(crate) async fn list(call: &Call, name: &RepositoryName) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, name, None, None).await?;
    let query = call.query()?;
    let limit = page(call, &query)?;
    // One more than asked for tells whether there is a next page; at `n=0` it tells whether the
    // repository exists.
    let mut tags = call
        .context
        .store
        .tags(name, query.get("last"), limit + 1)
        .await?;
    let more = tags.len() > limit;
    tags.truncate(limit);
    let mut response = json_response(StatusCode::OK, &json!({ "name": name, "tags": tags }));
    if let (true, Some(last)) = (more, tags.last()) {
        let next = format!(
            "</v2/{name}/tags/list?n={limit}&last={}>; rel=\"next\"",
            encode(last)
        );
        response.headers_mut().insert(LINK, header(&next)?);
    }
    Ok(response)
}

/// How many entries the client wants, within what it may have.
pub(crate) fn page(call: &Call, query: &Query) -> Result<usize, Refusal> {
    let limits = &call.context.settings.limits;
    Ok(query.number("n")?.map_or(limits.page, |n| {
        usize::try_from(n)
            .unwrap_or(usize::MAX)
            .min(limits.page_max)
    }))
}
