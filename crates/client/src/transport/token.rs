//! Bearer tokens: asked for, kept until they end
//! ([distribution token authentication](https://distribution.github.io/distribution/spec/auth/token/)).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Method};
use reqwest::Url;
use serde::Deserialize;
use tokio::time::Instant;

use super::{Answer, Body, Call, Client, Exchange, Scopes};
use crate::Error;
use crate::credentials::Credential;
use crate::error::{is_transient_status, printable};

/// The tokens that were given, by host. A host has one credential at a time; whoever forgets that one
/// forgets its tokens with it.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<String, Vec<Token>>>);

struct Token {
    realm: String,
    scopes: Scopes,
    header: HeaderValue,
    ends: Instant,
}

impl Tokens {
    /// A token of this realm that gives at least these rights and has not ended.
    pub(super) fn find(&self, host: &str, realm: &str, scopes: &Scopes) -> Option<HeaderValue> {
        let now = Instant::now();
        self.lock()
            .get(host)?
            .iter()
            .find(|token| token.ends > now && token.realm == realm && token.scopes.covers(scopes))
            .map(|token| token.header.clone())
    }

    fn keep(&self, host: &str, token: Token) {
        let now = Instant::now();
        let mut all = self.lock();
        let kept = all.entry(host.to_owned()).or_default();
        kept.retain(|old| old.ends > now && !token.scopes.covers(&old.scopes));
        if kept.len() >= MAX_TOKENS {
            kept.remove(0);
        }
        kept.push(token);
    }

    pub(super) fn forget(&self, host: &str) {
        self.lock().remove(host);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Token>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Asks the token service for these rights and keeps what it gives.
    pub(super) async fn token(
        &self,
        call: &Call<'_>,
        base: &Url,
        realm: &str,
        service: Option<&str>,
        scopes: Scopes,
    ) -> Result<HeaderValue, Error> {
        let url = base.join(realm).map_err(|_| {
            Error::Other(format!(
                "`{}` names the token service `{}`, which is not a URL",
                call.host,
                printable(realm)
            ))
        })?;
        self.permit(call.host, base, &url)?;
        let credential = self.credential(call.host).await?;
        if let Credential::Token(token) = &credential {
            return bearer(call.host, token);
        }
        let asked = Instant::now();
        let answer = self.ask(call, url, service, &scopes, &credential).await?;
        if !answer.status().is_success() {
            return Err(refused(call, answer).await);
        }
        let body = answer.bytes(MAX_TOKEN).await?;
        let given: Given = serde_json::from_slice(&body).map_err(|_| {
            Error::Other(format!(
                "the token service of `{}` answered something that holds no token",
                call.host
            ))
        })?;
        let header = bearer(
            call.host,
            given
                .token
                .as_deref()
                .filter(|token| !token.is_empty())
                .or(given.access_token.as_deref())
                .unwrap_or_default(),
        )?;
        let life = Duration::from_secs(given.expires_in.filter(|life| *life > 0).unwrap_or(60))
            .min(Duration::from_hours(24));
        self.0.tokens.keep(
            call.host,
            Token {
                realm: realm.to_owned(),
                scopes,
                header: header.clone(),
                // A token that ends on its way is refused, so it is not used to its very end.
                ends: asked + life - (life / 4).min(Duration::from_secs(10)),
            },
        );
        Ok(header)
    }

    async fn ask(
        &self,
        call: &Call<'_>,
        mut url: Url,
        service: Option<&str>,
        scopes: &Scopes,
        credential: &Credential,
    ) -> Result<Answer, Error> {
        let mut fields: Vec<(&str, String)> = Vec::new();
        fields.extend(service.map(|service| ("service", service.to_owned())));
        let exchange = if let Credential::Identity(refresh) = credential {
            if scopes.iter().next().is_some() {
                fields.push(("scope", scopes.to_string()));
            }
            fields.push(("client_id", "longshore".to_owned()));
            fields.push(("grant_type", "refresh_token".to_owned()));
            fields.push(("refresh_token", refresh.clone()));
            let mut form = url.clone();
            form.set_query(None);
            form.query_pairs_mut().extend_pairs(&fields);
            let form = form.query().unwrap_or_default().to_owned();
            let mut exchange = Exchange::new(call.host, Method::POST, url);
            exchange.headers.insert(
                CONTENT_TYPE,
                HeaderValue::from_static("application/x-www-form-urlencoded"),
            );
            exchange.body = Body::Bytes(form.into());
            exchange
        } else {
            fields.extend(scopes.iter().map(|scope| ("scope", scope)));
            fields.push(("client_id", "longshore".to_owned()));
            if let Credential::Password { username, .. } = credential {
                fields.push(("account", username.clone()));
            }
            url.query_pairs_mut().extend_pairs(&fields);
            let mut exchange = Exchange::new(call.host, Method::GET, url);
            if let Some(basic) = credential.basic() {
                exchange.headers.insert(AUTHORIZATION, basic);
            }
            exchange
        };
        let mut attempt = 0;
        loop {
            let mut again = Exchange::new(call.host, exchange.method.clone(), exchange.url.clone());
            again.headers.clone_from(&exchange.headers);
            again
                .headers
                .insert(ACCEPT, HeaderValue::from_static("application/json"));
            again.body = exchange.body.clone();
            let outcome = self.exchange(again).await;
            let wait = match &outcome {
                Ok(response) if is_transient_status(response.status().as_u16()) => {
                    self.0.retries.wait(attempt, Some(response.headers()))
                }
                Err(error) if error.is_transient() => self.0.retries.wait(attempt, None),
                _ => None,
            };
            let Some(wait) = wait else {
                return Ok(Answer::new(
                    outcome?,
                    call.host,
                    format!("the token request for `{}`", call.what),
                    call.what.clone(),
                ));
            };
            drop(outcome);
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }
}

/// What a token service said when it gave no token. It says 400 and 404 too when it means no.
async fn refused(call: &Call<'_>, answer: Answer) -> Error {
    let status = answer.status().as_u16();
    match answer.into_error().await {
        Error::Unauthorized { message, .. } => Error::Unauthorized {
            host: call.host.to_owned(),
            what: call.what.clone(),
            message: format!("its token service said: {message}; check the login"),
        },
        Error::NotFound(_) => Error::Status {
            host: call.host.to_owned(),
            operation: format!("the token request for `{}`", call.what),
            status,
            code: String::new(),
            message: "there is no token service at the address it names".to_owned(),
        },
        other => other,
    }
}

fn bearer(host: &str, token: &str) -> Result<HeaderValue, Error> {
    let mut header = (!token.is_empty())
        .then(|| HeaderValue::from_str(&format!("Bearer {token}")).ok())
        .flatten()
        .ok_or_else(|| {
            Error::Other(format!(
                "the token service of `{host}` answered without a usable token"
            ))
        })?;
    header.set_sensitive(true);
    Ok(header)
}

#[derive(Deserialize)]
struct Given {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

const MAX_TOKENS: usize = 64;
const MAX_TOKEN: usize = 1024 * 1024;
