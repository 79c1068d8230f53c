//! What happens to every request: id, host check, authentication, dispatch, panic, log and metrics.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt as _;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, USER_AGENT};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use crate::auth::{Caller, Credential, Principal};
use crate::error::Refusal;
use crate::serve::Shared;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::serve::host;
use crate::serve::log::Record;
use crate::settings::Access;
use crate::{api, v2};

/// Answers one request. Nothing gets out of here but an answer.
pub(crate) async fn answer(
    context: Arc<Shared>,
    request: Request<Incoming>,
    peer: SocketAddr,
    secure: bool,
) -> Response<Body> {
    let begun = Instant::now();
    let (head, body) = request.into_parts();
    let id = request_id(&head);
    let mut record = Record {
        id: id.clone(),
        method: head.method.clone(),
        path: head.uri.path().chars().take(MAX_LOGGED).collect(),
        peer,
        principal: String::new(),
        user_agent: head
            .headers
            .get(USER_AGENT)
            .and_then(|value| value.to_str().ok())
            .map(|text| text.chars().take(MAX_LOGGED).collect())
            .unwrap_or_default(),
        route: "other",
        status: StatusCode::OK,
        begun,
        log: context.settings.access_log,
        metrics: context.metrics.clone(),
    };
    let mut call = Call {
        context: Arc::clone(&context),
        head,
        body: Some(body),
        peer,
        secure,
        id,
        caller: Caller {
            principal: Principal::Anonymous,
            credential: Credential::None,
        },
    };
    let result = AssertUnwindSafe(Box::pin(dispatch(&mut call, &mut record.route)))
        .catch_unwind()
        .await
        .unwrap_or_else(|_| {
            context.metrics.panicked();
            Err(Refusal::internal("the request panicked"))
        });
    let mut response = result.unwrap_or_else(|refusal| {
        if let Some(cause) = refusal.cause() {
            tracing::error!(
                request = call.id,
                path = record.path,
                cause,
                "a request failed"
            );
        }
        refusal.into_response()
    });
    call.drain().await;

    let head = call.method() == Method::HEAD;
    let length = response.body().length();
    let headers = response.headers_mut();
    if let Some(length) = length
        && !headers.contains_key(CONTENT_LENGTH)
        && length > 0
    {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if let Ok(id) = HeaderValue::from_str(&call.id) {
        headers.insert(REQUEST_ID, id);
    }
    if record.path.starts_with("/v2") {
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    }
    headers.insert(
        http::header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    record.principal = call.caller.principal.id();
    record.status = response.status();
    context
        .metrics
        .answered(&record.method, record.route, record.status, begun.elapsed());
    response.map(|body| {
        let body = if head { Body::empty() } else { body };
        body.recorded(record)
    })
}

async fn dispatch(call: &mut Call, route: &mut &'static str) -> Result<Response<Body>, Refusal> {
    let path = call.path().to_owned();
    let reads = matches!(*call.method(), Method::GET | Method::HEAD);
    match path.as_str() {
        "/healthz" | "/readyz" | "/metrics" if !reads => return Err(Refusal::method("GET, HEAD")),
        "/healthz" => {
            *route = "health";
            return Ok(plain(StatusCode::OK, "ok\n"));
        }
        "/readyz" => {
            *route = "health";
            return Ok(match call.context.store.ping().await {
                Ok(()) if call.context.stopping.is_cancelled() => {
                    plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
                }
                Ok(()) => plain(StatusCode::OK, readiness(&call.context.store).await),
                Err(error) => {
                    tracing::warn!(error = crate::error::chain(&error), "not ready");
                    plain(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "the store does not answer\n",
                    )
                }
            });
        }
        _ => {}
    }
    if let Access::Open = call.context.settings.access {
        host::check(&call.head.headers, &call.head.uri)?;
    }
    let is_v2 = path == "/v2" || path.starts_with("/v2/");
    let is_metrics = path == "/metrics";
    if !is_v2 && !is_metrics && !path.starts_with("/api/") {
        if path == "/" && reads {
            return Ok(json_response(
                StatusCode::OK,
                &serde_json::json!({ "name": "longshore", "registry": "/v2/", "api": "/api/v1/openapi.json" }),
            ));
        }
        return Err(Refusal::no_such_path());
    }
    let context = Arc::clone(&call.context);
    match context
        .auth
        .identify(&call.head.headers, call.peer.ip())
        .await
    {
        Ok(caller) => call.caller = caller,
        Err(rejected) => return Err(call.rejected(rejected).await),
    }
    if is_metrics {
        *route = "metrics";
        context.metrics.serve(call).await
    } else if is_v2 {
        v2::serve(call, &path, route).await
    } else {
        *route = "api";
        api::serve(call, &path).await
    }
}

/// The caller's own id where it is one that can stand in a log, else a new one.
fn request_id(head: &http::request::Parts) -> String {
    head.headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| {
            (8..=64).contains(&id.len())
                && id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        })
        .map_or_else(
            || {
                let mut bytes = [0; 8];
                // An id that is not random is still an id.
                let _ = getrandom::fill(&mut bytes);
                hex::encode(bytes)
            },
            str::to_owned,
        )
}

/// Reads go on in a read-only mode, so the server is ready; the body tells of the mode.
async fn readiness(store: &store::Store) -> String {
    match store.mode().await.ok().and_then(|mode| mode.reason()) {
        Some(reason) => format!("ok, read-only: {reason}\n"),
        None => "ok\n".to_owned(),
    }
}

fn plain(status: StatusCode, text: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const MAX_LOGGED: usize = 300;
