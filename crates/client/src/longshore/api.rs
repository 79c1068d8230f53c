//! One call of our management API: JSON in, JSON out.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderName, Method};
use serde_json::Value;

use crate::transport::{Body, Call};
use crate::{Client, Error};

impl Client {
    /// Calls `path` (`/api/v1/…`, with its query) of a registry of ours. A GET is repeated when the failure may pass,
    /// everything else is sent once.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the host is not ours or too old; [`Error::NotFound`] when the server knows the path
    /// and not the thing; otherwise as for every request, with the server's own message.
    pub async fn api(
        &self,
        host: &str,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Error> {
        let repeat = method == Method::GET;
        let mut call = Call::new(host, method, path.to_owned(), format!("`{path}`"));
        if !repeat {
            call = call.once();
        }
        if let Some(body) = body {
            call = call
                .header(HeaderName::from(CONTENT_TYPE), "application/json")
                .body(Body::Bytes(Bytes::from(body.to_string())));
        }
        let answer = self.send(call).await?;
        let ours = answer.media_type() == "application/json";
        match answer.status().as_u16() {
            200..=299 if ours => {
                let bytes = answer.bytes(MAX_ANSWER).await?;
                serde_json::from_slice(&bytes)
                    .map_err(|error| Error::Other(format!("the answer of `{host}`: {error}")))
            }
            200..=399 | 405 | 406 | 501 => Err(Error::Unsupported(host.to_owned())),
            404 if !ours => Err(Error::Unsupported(host.to_owned())),
            _ => Err(answer.into_error().await),
        }
    }
}

/// The longest answer that is read.
const MAX_ANSWER: usize = 16 << 20;
