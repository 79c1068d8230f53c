//! What a registry answered.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, StatusCode};
use reqwest::Url;
use serde::Deserialize;

use super::Idle;
use crate::Error;
use crate::error::printable;

/// The answer to a request, its body not yet read.
#[derive(Debug)]
pub(crate) struct Answer {
    response: reqwest::Response,
    host: String,
    operation: String,
    what: String,
}

impl Answer {
    pub(super) fn new(
        response: reqwest::Response,
        host: &str,
        operation: String,
        what: String,
    ) -> Self {
        Self {
            response,
            host: host.to_owned(),
            operation,
            what,
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    pub(crate) fn url(&self) -> &Url {
        self.response.url()
    }

    /// The text of a header.
    pub(crate) fn header(&self, name: &HeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// `Content-Length` as it was stated, also in the answer to a HEAD.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header(&CONTENT_LENGTH)?.parse().ok()
    }

    /// `Content-Type` without parameters, empty when there was none.
    pub(crate) fn media_type(&self) -> &str {
        oci::media_type::essence(self.header(&CONTENT_TYPE).unwrap_or_default())
    }

    /// More of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        self.chunk_within(IDLE).await
    }

    /// More of the body, which may stay silent this long. Cancel safe.
    pub(crate) async fn chunk_within(&mut self, idle: Duration) -> Result<Option<Bytes>, Error> {
        match tokio::time::timeout(idle, self.response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(Error::unreachable(&self.host, error.without_url())),
            Err(_) => Err(Error::unreachable(&self.host, Idle(idle))),
        }
    }

    /// The whole body, refused when longer than `limit` bytes.
    pub(crate) async fn bytes(mut self, limit: usize) -> Result<Bytes, Error> {
        let too_long = |answer: &Self| {
            Error::Other(format!(
                "`{}` answered {} with more than {limit} bytes",
                answer.host, answer.operation
            ))
        };
        if self
            .content_length()
            .is_some_and(|length| length > limit as u64)
        {
            return Err(too_long(&self));
        }
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if whole.len() + chunk.len() > limit {
                return Err(too_long(&self));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    /// Makes an error of an answer that was not hoped for.
    pub(crate) async fn into_error(self) -> Error {
        let status = self.status();
        let (host, operation, what) =
            (self.host.clone(), self.operation.clone(), self.what.clone());
        if status == StatusCode::NOT_FOUND {
            return Error::NotFound(what);
        }
        let body = self.text_of_error().await;
        let (code, message) = parse_error(&body);
        let message = message.unwrap_or_else(|| {
            status
                .canonical_reason()
                .unwrap_or("no reason given")
                .to_lowercase()
        });
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Unauthorized {
                host,
                what,
                message,
            },
            _ => Error::Status {
                host,
                operation,
                status: status.as_u16(),
                code,
                message,
            },
        }
    }

    /// The beginning of an error body. A body that breaks off or is long is as good as its beginning.
    pub(super) async fn text_of_error(mut self) -> Vec<u8> {
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = self.chunk_within(Duration::from_secs(5)).await {
            let left = MAX_ERROR_BODY - body.len();
            body.extend_from_slice(&chunk[..chunk.len().min(left)]);
            if body.len() == MAX_ERROR_BODY {
                break;
            }
        }
        body
    }
}

/// Code and message of an error body in the specification's form
/// ([distribution-spec § Error Codes](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes)),
/// or of the forms that token services use.
fn parse_error(body: &[u8]) -> (String, Option<String>) {
    #[derive(Deserialize)]
    struct Document {
        #[serde(default)]
        errors: Vec<Entry>,
        #[serde(default, alias = "details", alias = "error_description")]
        message: Option<String>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(document) = serde_json::from_slice::<Document>(body) else {
        // A page for people says nothing here; a line of text does.
        let text = std::str::from_utf8(body).unwrap_or_default().trim();
        let said = !text.is_empty() && !text.starts_with(['<', '{', '[']) && text.len() < 500;
        return (String::new(), said.then(|| printable(text)));
    };
    let code = document
        .errors
        .first()
        .map(|entry| printable(&entry.code))
        .unwrap_or_default();
    let messages: Vec<String> = document
        .errors
        .iter()
        .take(5)
        .map(|entry| {
            printable(if entry.message.is_empty() {
                &entry.code
            } else {
                &entry.message
            })
        })
        .filter(|text| !text.is_empty())
        .collect();
    let message = if messages.is_empty() {
        document.message.map(|text| printable(&text))
    } else {
        Some(messages.join("; "))
    };
    (code, message.filter(|text| !text.is_empty()))
}

/// How long a body may stand still.
const IDLE: Duration = Duration::from_mins(1);
const MAX_ERROR_BODY: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bodies() {
        let (code, message) = parse_error(
            br#"{"errors":[{"code":"DENIED","message":"no\nway."},{"code":"UNKNOWN","detail":{}}]}"#,
        );
        assert_eq!(code, "DENIED");
        assert_eq!(message.as_deref(), Some("no way; UNKNOWN"));
        assert_eq!(parse_error(b"<html>").1, None);
        assert_eq!(parse_error(b"busy").1.as_deref(), Some("busy"));
        assert_eq!(
            parse_error(br#"{"details":"incorrect username or password"}"#)
                .1
                .as_deref(),
            Some("incorrect username or password")
        );
        assert_eq!(parse_error(b"\xff\xfe").1, None);
        assert_eq!(parse_error(b"").1, None);
    }
}
