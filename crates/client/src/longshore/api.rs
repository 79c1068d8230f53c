//! The management API of our own registry: plain JSON requests, and what an agent reports.
//!
//! Whether a host is ours is asked before anything is sent to it ([`takes_reports`]): what an agent knows is nothing that
//! another registry should be told.

use http::Method;
use http::StatusCode;
use http::header::{ACCEPT, CONTENT_TYPE};
use oci::{Digest, RepositoryName};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::transport::{Body, Call};
use crate::{Client, Error};

/// `GET` below `/api/v1/`; `path` begins after it and holds its query.
///
/// # Errors
/// [`Error::Unsupported`] where the host is not ours or too old for this path, [`Error::NotFound`], [`Error::Unauthorized`],
/// [`Error::Status`], [`Error::Unreachable`].
pub async fn get(client: &Client, host: &str, path: &str) -> Result<Value, Error> {
    send(client, host, Method::GET, path, None).await
}

/// `PUT` of a document, which is repeated after failures that may pass.
///
/// # Errors
/// As [`get`].
pub async fn put(client: &Client, host: &str, path: &str, body: &Value) -> Result<Value, Error> {
    send(client, host, Method::PUT, path, Some(body)).await
}

/// `POST` of a document, once.
///
/// # Errors
/// As [`get`].
pub async fn post(client: &Client, host: &str, path: &str, body: &Value) -> Result<Value, Error> {
    send(client, host, Method::POST, path, Some(body)).await
}

/// `DELETE`.
///
/// # Errors
/// As [`get`].
pub async fn delete(client: &Client, host: &str, path: &str) -> Result<(), Error> {
    send(client, host, Method::DELETE, path, None)
        .await
        .map(drop)
}

impl Client {
    /// Calls `path` (`/api/v1/…`, with its query) of a registry of ours.
    ///
    /// # Errors
    /// As [`get`].
    pub async fn api(
        &self,
        host: &str,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Error> {
        let path = path.strip_prefix("/api/v1/").unwrap_or(path);
        send(self, host, method, path, body).await
    }
}

async fn send(
    client: &Client,
    host: &str,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, Error> {
    let mut call = Call::new(
        host,
        method.clone(),
        format!("/api/v1/{path}"),
        format!("/api/v1/{}", path.split('?').next().unwrap_or_default()),
    )
    .header(ACCEPT, JSON);
    if let Some(body) = body {
        call = call
            .header(CONTENT_TYPE, JSON)
            .body(Body::Bytes(body.to_string().into()));
    }
    if method == Method::POST {
        call = call.once();
    }
    let answer = client.send(call).await?;
    let status = answer.status();
    let is_json = answer.media_type() == JSON;
    match status {
        StatusCode::NO_CONTENT => Ok(Value::Null),
        StatusCode::OK | StatusCode::CREATED | StatusCode::ACCEPTED if is_json => {
            let bytes = answer.bytes(LONGEST).await?;
            serde_json::from_slice(&bytes)
                .map_err(|error| Error::Other(format!("`{host}` answered no JSON: {error}")))
        }
        // Another registry may send its web page, or lead to its login, for any path.
        _ if status.is_success() || status.is_redirection() => {
            Err(Error::Unsupported(host.to_owned()))
        }
        StatusCode::NOT_FOUND => {
            let ours = is_json
                && answer
                    .bytes(LONGEST)
                    .await
                    .ok()
                    .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok())
                    .is_some_and(|body| {
                        body["errors"][0]["code"]
                            .as_str()
                            .is_some_and(|code| code != "UNSUPPORTED")
                    });
            if ours {
                Err(Error::NotFound(path.to_owned()))
            } else {
                Err(Error::Unsupported(host.to_owned()))
            }
        }
        StatusCode::NOT_ACCEPTABLE | StatusCode::NOT_IMPLEMENTED => {
            Err(Error::Unsupported(host.to_owned()))
        }
        _ => Err(answer.into_error().await),
    }
}

/// Tells whether a host is ours and takes pins and attempts. It is sent nothing but the question.
///
/// # Errors
/// [`Error::Unreachable`] and other failures that may pass.
pub async fn takes_reports(client: &Client, host: &str) -> Result<bool, Error> {
    match get(client, host, "openapi.json").await {
        Ok(document) => Ok(["/api/v1/pins/{holder}", "/api/v1/attempts"]
            .iter()
            .all(|path| document["paths"][*path].is_object())),
        Err(error) if error.is_transient() => Err(error),
        Err(_) => Ok(false),
    }
}

/// What a holder wants kept from deletion.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pin {
    /// Where the manifest is.
    pub repository: RepositoryName,
    /// The manifest.
    pub digest: Digest,
    /// Why, for people.
    pub reason: String,
}

/// What a registry answered to a set of pins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PinsAnswer {
    /// What holds now.
    pub held: Vec<Pinned>,
    /// What is not there.
    pub missing: Vec<Pinned>,
}

/// A manifest of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Pinned {
    /// Where.
    pub repository: String,
    /// Which.
    pub digest: String,
}

/// Replaces the whole set of a holder.
///
/// # Errors
/// As [`get`].
pub async fn set_pins(
    client: &Client,
    host: &str,
    holder: &str,
    pins: &[Pin],
) -> Result<PinsAnswer, Error> {
    let pins: Vec<Value> = pins
        .iter()
        .map(|pin| {
            json!({
                "repository": pin.repository.as_str(),
                "digest": pin.digest,
                "reason": pin.reason,
            })
        })
        .collect();
    let path = format!("pins/{}", path_of(holder));
    let answer = put(client, host, &path, &json!({ "pins": pins })).await?;
    serde_json::from_value(answer)
        .map_err(|error| Error::Other(format!("`{host}` answered something else: {error}")))
}

/// The last record of a ledger that a registry knows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Known {
    /// How many came.
    pub sequence: u64,
    /// Its hash, in hexadecimal.
    pub hash: String,
}

/// What a registry answered to records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AttemptsAnswer {
    /// Records that were new.
    pub added: u64,
    /// Records that were known.
    pub repeated: u64,
    /// The last one that is known now.
    pub known: Option<Known>,
}

/// Reports lines of a ledger, which follow the record with the hash `previous`. Without lines it only asks.
///
/// # Errors
/// As [`get`].
pub async fn add_attempts(
    client: &Client,
    host: &str,
    holder: &str,
    target: &str,
    previous: Option<&str>,
    records: &[Value],
) -> Result<AttemptsAnswer, Error> {
    let body = json!({
        "holder": holder,
        "target": target,
        "previous": previous,
        "records": records,
    });
    let answer = post(client, host, "attempts", &body).await?;
    serde_json::from_value(answer)
        .map_err(|error| Error::Other(format!("`{host}` answered something else: {error}")))
}

/// A name with slashes as it stands in a path.
pub fn path_of(name: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(name.len());
    for &byte in name.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

const JSON: &str = "application/json";
/// A page of anything.
const LONGEST: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_paths() {
        assert_eq!(path_of("host1/web"), "host1/web");
        assert_eq!(path_of("ä b?c#%"), "%C3%A4%20b%3Fc%23%25");
    }
}
