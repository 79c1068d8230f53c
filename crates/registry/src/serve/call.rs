//! One request on its way through: who calls, what with, and the questions that handlers ask.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{AsHeaderName, CONTENT_LENGTH, CONTENT_TYPE, HOST, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use oci::{Digest, RepositoryName, Tag};

use crate::auth::{Caller, Decision, Principal, log_in, token};
use crate::error::{DENIED, Refusal, UNAUTHORIZED, UNKNOWN, UNSUPPORTED};
use crate::serve::Shared;
use crate::serve::body::Body;
use crate::settings::Action;
use crate::v2::query::Query;

/// One request with its caller.
pub(crate) struct Call {
    pub(crate) context: Arc<Shared>,
    pub(crate) head: http::request::Parts,
    /// The body, until somebody reads it.
    pub(crate) body: Option<Incoming>,
    pub(crate) peer: SocketAddr,
    pub(crate) secure: bool,
    pub(crate) id: String,
    pub(crate) caller: Caller,
}

impl Call {
    pub(crate) fn method(&self) -> &Method {
        &self.head.method
    }

    pub(crate) fn path(&self) -> &str {
        self.head.uri.path()
    }

    pub(crate) fn query(&self) -> Result<Query, Refusal> {
        Query::parse(self.head.uri.query().unwrap_or_default())
    }

    /// A header as text; one that is not text counts as absent.
    pub(crate) fn header(&self, name: impl AsHeaderName) -> Option<&str> {
        self.head.headers.get(name)?.to_str().ok()
    }

    /// Who does it, for tag history, events and audit.
    pub(crate) fn actor(&self) -> store::Actor {
        store::Actor {
            principal: self.caller.principal.id(),
            request: self.id.clone(),
            address: self.peer.ip().to_string(),
        }
    }

    /// Tells whether the caller may do this; refuses nothing.
    pub(crate) fn may(
        &self,
        action: Action,
        repository: &RepositoryName,
        tag: Option<&Tag>,
    ) -> bool {
        self.context
            .auth
            .decide(&self.caller, action, repository, tag, None)
            == Decision::Allowed
    }

    /// Lets the request go on only when the caller may do this.
    ///
    /// # Errors
    /// Without credentials 401 with a challenge, whatever the repository. With a token that lacks the
    /// scope, 401 with that scope. With credentials but no right 403 where the caller may read the
    /// repository, else the answer of a repository that does not exist.
    pub(crate) async fn require(
        &self,
        action: Action,
        repository: &RepositoryName,
        tag: Option<&Tag>,
        digest: Option<&Digest>,
    ) -> Result<(), Refusal> {
        let auth = &self.context.auth;
        match auth.decide(&self.caller, action, repository, tag, digest) {
            Decision::Allowed => return Ok(()),
            Decision::Scope => return Err(self.wants_scope(&repository_scope(repository, action))),
            Decision::Denied => {}
        }
        if self.caller.principal == Principal::Anonymous {
            return Err(self.challenge(
                log_in(),
                Some(&repository_scope(repository, action)),
                None,
            ));
        }
        if action != Action::Pull {
            let target = tag.map_or_else(
                || repository.to_string(),
                |tag| format!("{repository}:{tag}"),
            );
            self.audit(action.name(), &target, "denied").await;
        }
        let reads = auth.decide(&self.caller, Action::Pull, repository, None, None);
        if action != Action::Pull && reads != Decision::Denied {
            let on = tag.map_or_else(String::new, |tag| format!(" tag `{tag}` of"));
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                DENIED,
                format!("you may not {action}{on} `{repository}`, ask its owner for the right"),
            ));
        }
        Err(Refusal::no_such_repository(repository))
    }

    /// Lets a HEAD go on for those who may pull, and for those who may only push: they ask what they
    /// need not send.
    pub(crate) async fn require_head(
        &self,
        repository: &RepositoryName,
        tag: Option<&Tag>,
    ) -> Result<(), Refusal> {
        if self.may(Action::Push, repository, None) {
            return Ok(());
        }
        self.require(Action::Pull, repository, tag, None).await
    }

    /// Lets a question about the whole registry go on.
    pub(crate) fn require_registry(&self, what: &str) -> Result<(), Refusal> {
        let scope = format!("registry:{what}:*");
        match self.context.auth.decide_registry(&self.caller, what) {
            Decision::Allowed => Ok(()),
            Decision::Scope => Err(self.wants_scope(&scope)),
            Decision::Denied => Err(self.challenge(log_in(), Some(&scope), None)),
        }
    }

    /// Lets a request go on that operates the registry as a whole: the caller needs `admin` for every repository.
    ///
    /// # Errors
    /// 401 with a challenge without credentials, else 403.
    pub(crate) async fn require_operator(&self) -> Result<(), Refusal> {
        match self.context.auth.decide_operator(&self.caller) {
            Decision::Allowed => Ok(()),
            Decision::Scope => Err(self.wants_scope("registry:admin:*")),
            Decision::Denied if self.caller.principal == Principal::Anonymous => {
                Err(self.challenge(log_in(), Some("registry:admin:*"), None))
            }
            Decision::Denied => {
                self.audit(Action::Admin.name(), self.path(), "denied")
                    .await;
                Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    DENIED,
                    "you may not operate this registry, it needs a rule with `admin` for all repositories",
                ))
            }
        }
    }

    /// Reads the body as JSON; 413 above `limit` bytes, 400 when it is not what is expected.
    pub(crate) async fn json<T: serde::de::DeserializeOwned>(
        &mut self,
        limit: usize,
    ) -> Result<T, Refusal> {
        let body = self.whole_body(limit).await?;
        if holds_nul(&body) {
            return Err(Refusal::bad_request(
                UNSUPPORTED,
                "the body holds a NUL character (`\\u0000`)",
            ));
        }
        serde_json::from_slice(&body).map_err(|error| {
            Refusal::bad_request(UNSUPPORTED, format!("the body is not as expected: {error}"))
        })
    }

    /// Those of the repositories that the caller may not do this in.
    ///
    /// # Errors
    /// 401 with every scope that a token lacks, so that a client asks for one token and not for one after the other.
    pub(crate) fn hidden<'a>(
        &self,
        action: Action,
        repositories: &[&'a RepositoryName],
    ) -> Result<Vec<&'a RepositoryName>, Refusal> {
        let auth = &self.context.auth;
        let mut hidden = Vec::new();
        let mut scopes = Vec::new();
        for repository in repositories {
            match auth.decide(&self.caller, action, repository, None, None) {
                Decision::Allowed => {}
                Decision::Denied => hidden.push(*repository),
                Decision::Scope => scopes.push(repository_scope(repository, action)),
            }
        }
        if scopes.is_empty() {
            Ok(hidden)
        } else {
            Err(self.wants_scope(&scopes.join(" ")))
        }
    }

    /// Asks for a token with both scopes where the caller may read `from` but its token does not say
    /// so: a client that mounts learns of the second scope here.
    pub(crate) fn require_scopes(
        &self,
        into: &RepositoryName,
        from: &RepositoryName,
    ) -> Result<(), Refusal> {
        let decision = self
            .context
            .auth
            .decide(&self.caller, Action::Pull, from, None, None);
        if decision != Decision::Scope {
            return Ok(());
        }
        let scopes = [
            repository_scope(into, Action::Push),
            repository_scope(from, Action::Pull),
        ];
        Err(self.wants_scope(&scopes.join(" ")))
    }

    fn wants_scope(&self, scope: &str) -> Refusal {
        let refusal = Refusal::new(
            StatusCode::UNAUTHORIZED,
            UNAUTHORIZED,
            "the token was not issued for this, get one with the scope of the challenge",
        );
        self.challenge(refusal, Some(scope), Some("insufficient_scope"))
    }

    /// Adds the challenge of the token service to a 401.
    pub(crate) fn challenge(
        &self,
        refusal: Refusal,
        scope: Option<&str>,
        error: Option<&str>,
    ) -> Refusal {
        use std::fmt::Write as _;
        let mut text = format!(
            "Bearer realm=\"{}/v2/token\",service=\"{}\"",
            self.base_url(),
            token::SERVICE
        );
        if let Some(scope) = scope {
            let _ = write!(text, ",scope=\"{scope}\"");
        }
        if let Some(error) = error {
            let _ = write!(text, ",error=\"{error}\"");
        }
        let bearer = HeaderValue::from_str(&text)
            .unwrap_or(HeaderValue::from_static("Bearer service=\"longshore\""));
        if self.path().starts_with("/v2") && self.path() != "/v2/token" {
            return refusal.with(WWW_AUTHENTICATE, bearer);
        }
        refusal
            .with(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"longshore\""),
            )
            .with(WWW_AUTHENTICATE, bearer)
    }

    /// The URL that this client reaches us by: the configured one, else what it asked for. The header
    /// is the caller's own and comes back to it alone.
    fn base_url(&self) -> String {
        if let Some(url) = &self.context.settings.public_url {
            return url.trim_end_matches('/').to_owned();
        }
        let scheme = if self.secure { "https" } else { "http" };
        let host = self
            .header(HOST)
            .filter(|host| {
                !host.is_empty()
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b))
            })
            .unwrap_or("localhost");
        format!("{scheme}://{host}")
    }

    /// Writes an audit row of its own. A failure to do so is logged; the refusal it tells of stands.
    pub(crate) async fn audit(&self, action: &str, target: &str, outcome: &str) {
        let entry = store::AuditEntry {
            actor: self.actor(),
            action: action.to_owned(),
            target: target.to_owned(),
            outcome: outcome.to_owned(),
        };
        if let Err(error) = self.context.store.audit(entry).await {
            tracing::warn!(request = self.id, %error, "an audit row could not be written");
        }
    }

    /// The announced length of the body.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH)?.parse().ok()
    }

    /// Reads the whole body into memory; 413 above `limit` bytes.
    pub(crate) async fn whole_body(&mut self, limit: usize) -> Result<Bytes, Refusal> {
        let too_long = || {
            Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                format!("the body is over the limit of {limit} bytes"),
            )
        };
        let announced = self.content_length().unwrap_or(0);
        if announced > limit as u64 {
            return Err(too_long());
        }
        let Some(mut body) = self.body.take() else {
            return Ok(Bytes::new());
        };
        let timeout = self.context.settings.limits.body_timeout;
        let mut whole =
            BytesMut::with_capacity(usize::try_from(announced).unwrap_or(0).min(64 * 1024));
        loop {
            match tokio::time::timeout(timeout, body.frame()).await {
                Err(_) => return Err(stalled()),
                Ok(None) => break,
                Ok(Some(Err(_))) => return Err(cut()),
                Ok(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else {
                        continue;
                    };
                    if whole.len() + data.len() > limit {
                        // What is left is read away, else the answer may be lost with the connection.
                        self.body = Some(body);
                        return Err(too_long());
                    }
                    whole.extend_from_slice(&data);
                }
            }
        }
        if whole.len() as u64 != announced && self.head.headers.contains_key(CONTENT_LENGTH) {
            return Err(cut());
        }
        Ok(whole.freeze())
    }

    /// Reads a little of a body that nobody wanted, so that the client gets to see the answer: a
    /// connection that is closed with unread bytes is reset.
    pub(crate) async fn drain(&mut self) {
        let Some(mut body) = self.body.take() else {
            return;
        };
        // A client that waits for 100 (Continue) has sent nothing yet and need not.
        if self.header(http::header::EXPECT).is_some() {
            return;
        }
        let read = async {
            let mut left = DRAIN;
            while let Some(Ok(frame)) = body.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(DRAIN_TIME, read).await;
    }
}

/// Whether a text of this JSON holds a NUL, which PostgreSQL cannot keep. A raw one is no JSON, so it is an escape, and
/// backslashes stand in texts alone.
fn holds_nul(json: &[u8]) -> bool {
    let mut rest = json;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\\') {
        let (_, escape) = rest.split_at(at);
        if escape.starts_with(b"\\u0000") {
            return true;
        }
        rest = escape.get(2..).unwrap_or_default();
    }
    false
}

/// A body that stopped arriving.
pub(crate) fn stalled() -> Refusal {
    Refusal::new(
        StatusCode::REQUEST_TIMEOUT,
        UNKNOWN,
        "the body stopped arriving, what came of an upload is kept and can be resumed",
    )
}

/// A body that broke off.
pub(crate) fn cut() -> Refusal {
    Refusal::bad_request(
        "SIZE_INVALID",
        "the body is shorter than announced, what came of an upload is kept and can be resumed",
    )
}

/// A JSON answer.
pub(crate) fn json_response(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    let mut response = Response::new(Body::full(value.to_string()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The scope that a client should ask a token for. A push always comes with reading.
fn repository_scope(repository: &RepositoryName, action: Action) -> String {
    let words = match action {
        Action::Pull => "pull",
        Action::Push | Action::TagCreate | Action::TagOverwrite => "pull,push",
        Action::Delete => "pull,delete",
        Action::Admin => "*",
    };
    format!("repository:{repository}:{words}")
}

const DRAIN: usize = 16 * 1024 * 1024;
const DRAIN_TIME: std::time::Duration = std::time::Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nul_is_an_escape_and_not_the_words_for_it() {
        for (json, holds) in [
            (r#"{"a":"x\u0000"}"#, true),
            (r#"{"a":"\\\u0000"}"#, true),
            (r#"{"a":"\\u0000"}"#, false),
            (r#"{"a":"\u0001u0000"}"#, false),
            (r#"["\"#, false),
            ("", false),
        ] {
            assert_eq!(holds_nul(json.as_bytes()), holds, "{json}");
        }
    }
}
