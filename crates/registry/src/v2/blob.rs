//! Blobs: reading, asking, deleting
//! ([distribution-spec § Pulling blobs](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-blobs)).

use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE,
    LOCATION, RANGE,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use oci::{Digest, RepositoryName};
use store::{Blob, BlobContent};

use crate::error::{Refusal, etag};
use crate::serve::body::Body;
use crate::serve::call::Call;
use crate::settings::Action;
use crate::v2::range::{Asked, asked};
use crate::v2::{CONTENT_DIGEST, condition, header};

/// `GET /v2/<name>/blobs/<digest>` (end-2).
pub(crate) async fn get(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Pull, name, None, Some(digest)).await?;
    let blob = call
        .context
        .store
        .open_blob(name, digest)
        .await?
        .ok_or_else(|| Refusal::blob_unknown(digest))?;
    let mut response = Response::new(Body::empty());
    describe(call, response.headers_mut(), digest)?;
    if condition::has(&call.head.headers, digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    let wanted = match call.header(RANGE) {
        Some(range) if still_fits(call, digest) => asked(range, blob.size),
        _ => Asked::Whole,
    };
    let range = match wanted {
        Asked::Whole => 0..blob.size,
        Asked::Part(range) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let text = format!("bytes {}-{}/{}", range.start, range.end - 1, blob.size);
            response.headers_mut().insert(CONTENT_RANGE, header(&text)?);
            range
        }
        Asked::Unsatisfiable => {
            return Err(Refusal::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "SIZE_INVALID",
                format!(
                    "the range is not within the {} bytes of the blob",
                    blob.size
                ),
            )
            .with(CONTENT_RANGE, header(&format!("bytes */{}", blob.size))?));
        }
    };
    if let Some(elsewhere) = delegate(call, name, digest, &blob, range.end - range.start).await? {
        return Ok(elsewhere);
    }
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
    *response.body_mut() = match blob.content {
        BlobContent::Inline(bytes) => {
            let start = usize::try_from(range.start)
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            let end = usize::try_from(range.end)
                .unwrap_or(usize::MAX)
                .min(bytes.len());
            Body::full(bytes.slice(start..end))
        }
        BlobContent::File(file) => Body::file(file, range),
        // The first answer of the object store comes before ours, so that it can still be a failure.
        BlobContent::Remote(remote) => Body::remote(remote.stream(range).await?),
    };
    Ok(response)
}

/// Sends a client of certain networks to the object store (307), where the blob is in one. What it is told there is
/// good for a while, so nobody may keep this answer.
async fn delegate(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
    blob: &Blob,
    bytes: u64,
) -> Result<Option<Response<Body>>, Refusal> {
    let Some(redirect) = &call.context.settings.redirect else {
        return Ok(None);
    };
    if !redirect.applies(call.peer.ip(), name) {
        return Ok(None);
    }
    let url = match blob.presign(redirect.ttl).await {
        Ok(Some(url)) => url,
        Ok(None) => return Ok(None),
        Err(error) => {
            tracing::warn!(%error, "a pull cannot be sent to the object store, it is served from here");
            return Ok(None);
        }
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(&url)?);
    headers.insert(CONTENT_DIGEST, header(&digest.to_string())?);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
    call.context.metrics.delegated(bytes);
    Ok(Some(response))
}

/// `HEAD /v2/<name>/blobs/<digest>` (end-2). Told to a principal with push right, "exists" keeps the
/// blob for at least 12 hours (`I7`).
pub(crate) async fn head(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require_head(name, None).await?;
    let renew = call.may(Action::Push, name, None);
    let info = call
        .context
        .store
        .stat_blob(name, digest, renew)
        .await?
        .ok_or_else(|| Refusal::blob_unknown(digest))?;
    let mut response = Response::new(Body::empty());
    describe(call, response.headers_mut(), digest)?;
    if condition::has(&call.head.headers, digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, HeaderValue::from(info.size));
    Ok(response)
}

/// `DELETE /v2/<name>/blobs/<digest>` (end-10).
pub(crate) async fn delete(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Delete, name, None, Some(digest))
        .await?;
    call.context
        .store
        .delete_blob(name, digest, &call.actor())
        .await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

fn describe(call: &Call, headers: &mut HeaderMap, digest: &Digest) -> Result<(), Refusal> {
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CONTENT_DIGEST, header(&digest.to_string())?);
    headers.insert(ETAG, etag(digest)?);
    headers.insert(CACHE_CONTROL, immutable(call));
    Ok(())
}

/// How long content named by its digest may be cached: for ever. A shared cache may keep it only
/// where nobody had to log in for it.
pub(crate) fn immutable(call: &Call) -> HeaderValue {
    if call.head.headers.contains_key(http::header::AUTHORIZATION) {
        HeaderValue::from_static("private, max-age=31536000, immutable")
    } else {
        HeaderValue::from_static("public, max-age=31536000, immutable")
    }
}

/// `If-Range`: the range counts only while the content is the same.
fn still_fits(call: &Call, digest: &Digest) -> bool {
    call.header(IF_RANGE)
        .is_none_or(|tag| tag.trim() == format!("\"{digest}\""))
}
