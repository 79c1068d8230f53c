//! Referrers of a digest ([distribution-spec § Listing referrers](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers)).

use http::header::{CONTENT_TYPE, LINK};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use oci::{Descriptor, Digest, RepositoryName, media_type};
use serde_json::json;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;
use crate::v2::header;
use crate::v2::query::encode;

/// `GET /v2/<name>/referrers/<digest>` (end-12a, end-12b): an index, empty when nothing refers, also
/// for a subject or repository that is not there.
pub(crate) async fn list(
    call: &Call,
    name: &RepositoryName,
    subject: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, name, None, Some(subject))
        .await?;
    let query = call.query()?;
    let artifact_type = query.get("artifactType").filter(|text| !text.is_empty());
    let limit = query
        .number("n")?
        .map_or(PAGE, |n| usize::try_from(n).unwrap_or(PAGE).clamp(1, PAGE));
    let after = query
        .number("after")?
        .map(|n| i64::try_from(n).unwrap_or(i64::MAX));
    // The page stays below what clients read of an index.
    let (found, more) = call
        .context
        .store
        .referrers_page(name, subject, artifact_type, after, limit, PAGE_BYTES)
        .await?;
    let cursor = found.last().map(|referrer| referrer.cursor);
    let manifests: Vec<Descriptor> = found
        .into_iter()
        .map(|referrer| referrer.descriptor)
        .collect();
    let mut response = json_response(
        StatusCode::OK,
        &json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": manifests }),
    );
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static(media_type::OCI_INDEX),
    );
    if artifact_type.is_some() {
        headers.insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    if let (true, Some(cursor)) = (more, cursor) {
        let filter = artifact_type.map_or_else(String::new, |text| {
            format!("&artifactType={}", encode(text))
        });
        let next = format!(
            "</v2/{name}/referrers/{subject}?n={limit}&after={cursor}{filter}>; rel=\"next\""
        );
        headers.insert(LINK, header(&next)?);
    }
    Ok(response)
}

const PAGE: usize = 500;
const PAGE_BYTES: usize = 3 * 1024 * 1024;
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
