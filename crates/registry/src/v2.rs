//! The distribution API ([distribution-spec](https://github.com/opencontainers/distribution-spec/blob/main/spec.md)),
//! one file per noun.

use http::{Method, Response, StatusCode};

use crate::auth::{self, Auth, Principal};
use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::v2::path::{PathError, Route};

pub(crate) mod blob;
pub(crate) mod catalog;
pub(crate) mod condition;
pub(crate) mod manifest;
pub(crate) mod path;
pub(crate) mod query;
pub(crate) mod range;
pub(crate) mod referrer;
pub(crate) mod tag;
pub(crate) mod upload;

/// Answers a request below `/v2`.
pub(crate) async fn serve(
    call: &mut Call,
    path: &str,
    label: &mut &'static str,
) -> Result<Response<Body>, Refusal> {
    let route = match Route::parse(path) {
        Ok(route) => route,
        Err(error) => {
            // Without credentials every name answers alike, also one that cannot be.
            require_login(call)?;
            return Err(match error {
                PathError::Unknown => Refusal::no_such_path(),
                PathError::Reference(error) => error.into(),
                PathError::Digest(error) => error.into(),
            });
        }
    };
    *label = route.label();
    let method = call.method().clone();
    match (route, method) {
        (Route::Base, Method::GET | Method::HEAD) => base(call),
        (Route::Token, _) => auth::token::serve(call).await,
        (Route::Catalog, Method::GET | Method::HEAD) => catalog::list(call).await,
        (Route::Tags(name), Method::GET | Method::HEAD) => tag::list(call, &name).await,
        (Route::Referrers(name, digest), Method::GET | Method::HEAD) => {
            referrer::list(call, &name, &digest).await
        }
        (Route::Base | Route::Catalog | Route::Tags(_) | Route::Referrers(..), _) => {
            Err(Refusal::method("GET, HEAD"))
        }
        (Route::Manifest(name, reference), Method::GET | Method::HEAD) => {
            manifest::get(call, &name, &reference).await
        }
        (Route::Manifest(name, reference), Method::PUT) => {
            manifest::put(call, &name, reference).await
        }
        (Route::Manifest(name, reference), Method::DELETE) => {
            manifest::delete(call, &name, &reference).await
        }
        (Route::Manifest(..), _) => Err(Refusal::method("GET, HEAD, PUT, DELETE")),
        (Route::Blob(name, digest), Method::GET) => blob::get(call, &name, &digest).await,
        (Route::Blob(name, digest), Method::HEAD) => blob::head(call, &name, &digest).await,
        (Route::Blob(name, digest), Method::DELETE) => blob::delete(call, &name, &digest).await,
        (Route::Blob(..), _) => Err(Refusal::method("GET, HEAD, DELETE")),
        (Route::Uploads(name), Method::POST) => upload::start(call, &name).await,
        (Route::Uploads(_), _) => Err(Refusal::method("POST")),
        (Route::Upload(name, id), Method::GET | Method::HEAD) => {
            upload::status(call, &name, &id).await
        }
        (Route::Upload(name, id), Method::PATCH) => upload::patch(call, &name, &id).await,
        (Route::Upload(name, id), Method::PUT) => upload::finish(call, &name, &id).await,
        (Route::Upload(name, id), Method::DELETE) => upload::cancel(call, &name, &id).await,
        (Route::Upload(..), _) => Err(Refusal::method("GET, HEAD, PATCH, PUT, DELETE")),
    }
}

/// `GET /v2/` (end-1). It challenges even where anonymous reading is on, else `docker login` would
/// accept any password.
fn base(call: &Call) -> Result<Response<Body>, Refusal> {
    require_login(call)?;
    Ok(json_response(StatusCode::OK, &serde_json::json!({})))
}

/// Lets a request go on that came with any credential, an anonymous token included.
fn require_login(call: &Call) -> Result<(), Refusal> {
    let without = matches!(call.caller.credential, auth::Credential::None)
        && call.caller.principal == Principal::Anonymous;
    match call.context.auth {
        Auth::Users(_) if without => Err(call.challenge(auth::log_in(), None, None)),
        _ => Ok(()),
    }
}

/// A header whose text is made of checked names and numbers.
pub(crate) fn header(text: &str) -> Result<http::HeaderValue, Refusal> {
    Ok(http::HeaderValue::from_str(text)?)
}

pub(crate) const CONTENT_DIGEST: http::HeaderName =
    http::HeaderName::from_static("docker-content-digest");
