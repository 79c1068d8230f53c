//! What can go wrong, and the one mapping of it to a status, an OCI error code and a message
//! ([distribution-spec § Error codes](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes)).
//!
//! | status | when |
//! |---|---|
//! | 400 | the request is malformed: name, tag, digest, range, manifest, number |
//! | 401 | no credentials, wrong ones, or a token without the scope |
//! | 403 | the caller may read the repository, but not do this |
//! | 404 | unknown, or the caller may not know |
//! | 405 | the resource exists, the method does not; `Allow` lists those that do |
//! | 408 | a body stopped arriving |
//! | 409 | deleting what something else is made of |
//! | 412 | `If-Match` or `If-None-Match: *` did not hold |
//! | 413, 414 | a manifest over the limit, too many `tag` parameters |
//! | 416 | a range that cannot be served, a chunk that does not follow, an upload with another writer |
//! | 421 | open mode, reached by a name that is not this machine |
//! | 429 | too many logins |
//! | 500, 503, 507 | our fault, not now, disk full |

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use oci::digest::DigestError;
use oci::manifest::ManifestError;
use oci::reference::ReferenceError;
use serde_json::json;

use crate::serve::body::Body;

/// Why the server could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A rule that cannot be meant.
    #[error(transparent)]
    Access(#[from] crate::settings::AccessError),
    /// An address cannot be listened on.
    #[error("cannot listen on `{address}`")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The certificate or key cannot be used.
    #[error("cannot use the certificate of `{path}`: {problem}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The htpasswd file cannot be used.
    #[error("cannot use `{path}`: {problem}")]
    Htpasswd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// No address was given.
    #[error("no address to listen on, give one such as `127.0.0.1:5050`")]
    NoAddress,
    /// Without users only this machine may be served.
    #[error(
        "`{0}` is reachable from other machines but no users are configured, add a htpasswd file and rules, or listen on `127.0.0.1`"
    )]
    OpenNotLoopback(SocketAddr),
    /// The public URL is not one.
    #[error("`{0}` is not a usable public URL, write `https://host[:port]`")]
    PublicUrl(String),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] store::Error),
}

/// A refusal or failure of one request, ready to be answered.
#[derive(Debug)]
pub(crate) struct Refusal(Box<Answer>);

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    code: &'static str,
    message: String,
    detail: Option<serde_json::Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// For the log alone: the chain of causes of a failure of ours.
    internal: Option<String>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self(Box::new(Answer {
            status,
            code,
            message: message.into(),
            detail: None,
            headers: Vec::new(),
            internal: None,
        }))
    }

    pub(crate) fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(crate) fn internal(cause: impl Into<String>) -> Self {
        let mut refusal = Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            UNKNOWN,
            "the server failed, its log has the cause under this request's id",
        );
        refusal.0.internal = Some(cause.into());
        refusal
    }

    /// No such path at all.
    pub(crate) fn no_such_path() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            UNSUPPORTED,
            "no such path, see the distribution specification for `/v2/` and `/api/v1/openapi.json` for the rest",
        )
    }

    /// The resource exists, the method does not.
    pub(crate) fn method(allowed: &'static str) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            UNSUPPORTED,
            format!("this path takes {allowed} only"),
        )
        .with(ALLOW, HeaderValue::from_static(allowed))
    }

    /// The answer for a repository that is not there or that the caller may not know of.
    pub(crate) fn no_such_repository(name: &oci::RepositoryName) -> Self {
        store::Error::RepositoryUnknown(name.clone()).into()
    }

    pub(crate) fn blob_unknown(digest: &oci::Digest) -> Self {
        store::Error::BlobUnknown(digest.clone()).into()
    }

    pub(crate) fn manifest_unknown(reference: impl ToString) -> Self {
        store::Error::ManifestUnknown(reference.to_string()).into()
    }

    pub(crate) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    pub(crate) fn with_detail(mut self, detail: serde_json::Value) -> Self {
        self.0.detail = Some(detail);
        self
    }

    /// What the log says of a failure of ours.
    pub(crate) fn cause(&self) -> Option<&str> {
        self.0.internal.as_deref()
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let mut error = json!({ "code": self.0.code, "message": self.0.message });
        if let Some(detail) = self.0.detail {
            error["detail"] = detail;
        }
        let text = json!({ "errors": [error] }).to_string();
        let mut response = Response::new(Body::full(text.into_bytes()));
        *response.status_mut() = self.0.status;
        let length = response.body().length().unwrap_or(0);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        for (name, value) in self.0.headers {
            headers.append(name, value);
        }
        response
    }
}

impl From<store::Error> for Refusal {
    fn from(error: store::Error) -> Self {
        use store::Error as E;
        let message = error.to_string();
        let plain = |status, code| Self::new(status, code, message.clone());
        match &error {
            E::BlobUnknown(_) => plain(StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            E::BlobDamaged(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, UNKNOWN),
            E::BlobInUse(_) | E::ManifestInUse(_) | E::Pinned { .. } => {
                plain(StatusCode::CONFLICT, DENIED)
            }
            E::DigestMismatch { .. } => plain(StatusCode::BAD_REQUEST, DIGEST_INVALID),
            E::ManifestUnknown(_) => plain(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN"),
            E::MissingReferences(missing) => {
                // Enough to go on with; a manifest can name tens of thousands.
                let missing: Vec<String> =
                    missing.iter().take(100).map(ToString::to_string).collect();
                Self::new(
                    StatusCode::NOT_FOUND,
                    "MANIFEST_BLOB_UNKNOWN",
                    format!("{message}, push it first"),
                )
                .with_detail(json!({ "digests": missing }))
            }
            E::Precondition { actual, .. } => {
                let refusal = plain(StatusCode::PRECONDITION_FAILED, "PRECONDITION_FAILED");
                match actual.as_ref().and_then(|d| etag(d).ok()) {
                    Some(tag) => refusal.with(http::header::ETAG, tag),
                    None => refusal,
                }
            }
            E::TagImmutable { .. } | E::TagCreateDenied { .. } => {
                plain(StatusCode::FORBIDDEN, DENIED)
            }
            E::RepositoryUnknown(_) => plain(StatusCode::NOT_FOUND, "NAME_UNKNOWN"),
            E::UploadUnknown => plain(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            E::UploadBusy { offset } => {
                plain(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID")
                    .with(http::header::RANGE, upload_range(*offset))
                    .with(RETRY_AFTER, HeaderValue::from_static("1"))
            }
            E::Full => plain(StatusCode::INSUFFICIENT_STORAGE, UNKNOWN)
                .with(RETRY_AFTER, HeaderValue::from_static("60")),
            E::ReadOnly { .. } => plain(StatusCode::SERVICE_UNAVAILABLE, UNKNOWN)
                .with(RETRY_AFTER, HeaderValue::from_static("30")),
            E::DiskReadOnly(_) => {
                let mut refusal = Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    UNKNOWN,
                    "the registry is read-only: its disk takes no writes, try again later",
                )
                .with(RETRY_AFTER, HeaderValue::from_static("30"));
                refusal.0.internal = Some(message);
                refusal
            }
            E::QuotaExceeded { .. } | E::ReportLimit { .. } => plain(StatusCode::FORBIDDEN, DENIED),
            E::PinsChanged { version, .. } => {
                let refusal = plain(StatusCode::PRECONDITION_FAILED, "PRECONDITION_FAILED");
                match version.map(|v| HeaderValue::from_str(&format!("\"{v}\""))) {
                    Some(Ok(tag)) => refusal.with(http::header::ETAG, tag),
                    _ => refusal,
                }
            }
            E::Unavailable { what, .. } => {
                let mut refusal = Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    UNKNOWN,
                    format!("{what} is not available, try again"),
                )
                .with(RETRY_AFTER, HeaderValue::from_static("5"));
                refusal.0.internal = Some(message);
                refusal
            }
            E::Stopped => {
                let mut refusal = Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    UNKNOWN,
                    "the server is restarting after a failure, try again",
                )
                .with(RETRY_AFTER, HeaderValue::from_static("10"));
                refusal.0.internal = Some(message);
                refusal
            }
            _ => Self::internal(chain(&error)),
        }
    }
}

impl From<DigestError> for Refusal {
    fn from(error: DigestError) -> Self {
        Self::bad_request(DIGEST_INVALID, error.to_string())
    }
}

impl From<ReferenceError> for Refusal {
    fn from(error: ReferenceError) -> Self {
        let code = match &error {
            ReferenceError::Digest(_) => DIGEST_INVALID,
            ReferenceError::Tag(_) => "TAG_INVALID",
            _ => "NAME_INVALID",
        };
        Self::bad_request(code, error.to_string())
    }
}

impl From<ManifestError> for Refusal {
    fn from(error: ManifestError) -> Self {
        Self::bad_request("MANIFEST_INVALID", error.to_string())
    }
}

impl From<http::header::InvalidHeaderValue> for Refusal {
    fn from(error: http::header::InvalidHeaderValue) -> Self {
        Self::internal(chain(&error))
    }
}

/// The whole chain of an error in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// The strong entity tag of a digest.
pub(crate) fn etag(digest: &oci::Digest) -> Result<HeaderValue, http::header::InvalidHeaderValue> {
    HeaderValue::from_str(&format!("\"{digest}\""))
}

/// The `Range` of an upload that holds `offset` bytes: the last one's position is inclusive. An empty
/// upload has no inclusive form; `0-0` is what clients of every registry know for it.
pub(crate) fn upload_range(offset: u64) -> HeaderValue {
    let text = format!("0-{}", offset.saturating_sub(1));
    // Invariant: digits and a dash are a header value.
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("0-0"))
}

pub(crate) const DENIED: &str = "DENIED";
pub(crate) const DIGEST_INVALID: &str = "DIGEST_INVALID";
pub(crate) const UNAUTHORIZED: &str = "UNAUTHORIZED";
pub(crate) const UNSUPPORTED: &str = "UNSUPPORTED";
pub(crate) const UNKNOWN: &str = "UNKNOWN";
pub(crate) const UPLOAD_INVALID: &str = "BLOB_UPLOAD_INVALID";

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use store::Error as E;

    use super::*;

    async fn check(error: E, status: u16, code: &str, header: Option<(HeaderName, &str)>) {
        let text = error.to_string();
        let response = Refusal::from(error).into_response();
        assert_eq!(response.status().as_u16(), status, "{text}");
        if let Some((name, value)) = header {
            assert_eq!(response.headers()[name], value, "{text}");
        }
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(json["errors"][0]["code"], code, "{text}");
    }

    #[tokio::test]
    async fn the_mapping() {
        let digest = || oci::Digest::sha256(b"");
        let tag = || "v1".parse::<oci::Tag>().unwrap();
        let etag = format!("\"{}\"", digest());
        check(E::BlobUnknown(digest()), 404, "BLOB_UNKNOWN", None).await;
        check(E::BlobInUse(digest()), 409, "DENIED", None).await;
        let mismatch = E::DigestMismatch {
            expected: digest(),
            actual: oci::Digest::sha256(b"x"),
        };
        check(mismatch, 400, "DIGEST_INVALID", None).await;
        check(
            E::ManifestUnknown("v1".to_owned()),
            404,
            "MANIFEST_UNKNOWN",
            None,
        )
        .await;
        check(E::ManifestInUse(digest()), 409, "DENIED", None).await;
        check(
            E::MissingReferences(vec![digest()]),
            404,
            "MANIFEST_BLOB_UNKNOWN",
            None,
        )
        .await;
        let moved = E::Precondition {
            tag: tag(),
            actual: Some(digest()),
        };
        check(
            moved,
            412,
            "PRECONDITION_FAILED",
            Some((http::header::ETAG, &etag)),
        )
        .await;
        check(E::TagImmutable { tag: tag() }, 403, "DENIED", None).await;
        check(E::TagCreateDenied { tag: tag() }, 403, "DENIED", None).await;
        let name = "a".parse().unwrap();
        check(E::RepositoryUnknown(name), 404, "NAME_UNKNOWN", None).await;
        check(E::UploadUnknown, 404, "BLOB_UPLOAD_UNKNOWN", None).await;
        let busy = || E::UploadBusy { offset: 38 };
        check(
            busy(),
            416,
            "BLOB_UPLOAD_INVALID",
            Some((http::header::RANGE, "0-37")),
        )
        .await;
        check(busy(), 416, "BLOB_UPLOAD_INVALID", Some((RETRY_AFTER, "1"))).await;
        check(E::Full, 507, "UNKNOWN", Some((RETRY_AFTER, "60"))).await;
        check(E::Stopped, 503, "UNKNOWN", Some((RETRY_AFTER, "10"))).await;
        let locked = E::DiskReadOnly("/data".into());
        check(locked, 503, "UNKNOWN", Some((RETRY_AFTER, "30"))).await;
        check(
            E::Database("secret detail".to_owned()),
            500,
            "UNKNOWN",
            None,
        )
        .await;
    }

    #[tokio::test]
    async fn causes_of_failures_stay_in_the_log() {
        let refusal = Refusal::from(E::Io {
            operation: "open",
            path: "/secret/path".into(),
            source: std::io::ErrorKind::PermissionDenied.into(),
        });
        let cause = refusal.cause().unwrap().to_owned();
        assert!(
            cause.contains("/secret/path") && cause.contains("permission denied"),
            "{cause}"
        );
        let body = refusal
            .into_response()
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes();
        assert!(!String::from_utf8_lossy(&body).contains("secret"));
    }

    #[test]
    fn the_range_of_an_upload() {
        assert_eq!(upload_range(0), "0-0");
        assert_eq!(upload_range(1), "0-0");
        assert_eq!(upload_range(37), "0-36");
    }
}
