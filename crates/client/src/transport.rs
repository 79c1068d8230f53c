//! Requests and answers: connections, TLS, authentication, redirects, retries.
//!
//! Rules that hold for every request made here: `Authorization` goes to the registry's own origin
//! and to nobody else; a redirect never leaves TLS for plain HTTP; a body is made anew for each try;
//! an error body is read up to a limit; there is no limit on the time of a whole transfer, only on the
//! time in which nothing moves.

mod answer;
mod body;
mod challenge;
mod retry;
mod tls;
mod token;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::Url;

pub(crate) use answer::Answer;
pub(crate) use body::{Body, Source, Stream};
pub(crate) use challenge::{Challenge, Scopes};
pub use retry::Retries;
pub(crate) use retry::random;

use crate::error::{is_transient_status, printable};
use crate::{Error, credentials};
use body::Meter;
use token::Tokens;

/// How to talk to registries. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Hosts (`host:port`) that may be spoken to in plain HTTP; loopback always may.
    pub plain_http: Vec<String>,
    /// All hosts may be spoken to in plain HTTP (`--plain-http`).
    pub plain_http_all: bool,
    /// More certificate authorities, PEM.
    pub ca_pem: Vec<Vec<u8>>,
    /// Do not verify certificates (`--insecure`).
    pub insecure: bool,
    /// Where credentials come from.
    pub credentials: Arc<credentials::Source>,
    /// `User-Agent`; empty means ours.
    pub user_agent: String,
}

/// A connected client. Cheap to clone; shares connections and tokens.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    config: Config,
    retries: Retries,
    /// For other machines, through a proxy where the environment names one.
    remote: reqwest::Client,
    /// For this machine, never through a proxy.
    local: reqwest::Client,
    hosts: Mutex<HashMap<String, Host>>,
    tokens: Tokens,
    /// One writer of referrers tag-schema indexes at a time: they are read, changed and written.
    pub(crate) index_writer: tokio::sync::Semaphore,
}

/// What was learned of one host.
#[derive(Default)]
struct Host {
    /// A loopback host that speaks TLS; unknown until its first answer.
    tls: Option<bool>,
    challenge: Option<Challenge>,
    /// Looked up once, again after it was refused.
    credential: Option<credentials::Credential>,
    lacks: HashSet<Lack>,
}

/// What a host was found not to do, so that it is not asked each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lack {
    /// Uploads by a single POST.
    SinglePost,
    /// Uploads in chunks.
    Chunks,
}

impl Client {
    /// Makes a client.
    ///
    /// # Errors
    /// When a certificate authority or the `User-Agent` cannot be used.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::with_retries(config, Retries::default())
    }

    /// Makes a client that is more or less patient with failing requests.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn with_retries(config: Config, retries: Retries) -> Result<Self, Error> {
        let tls = tls::config(&config.ca_pem, config.insecure)?;
        let agent = if config.user_agent.is_empty() {
            concat!("longshore/", env!("CARGO_PKG_VERSION")).to_owned()
        } else {
            config.user_agent.clone()
        };
        let builder = || {
            reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(agent.clone())
                .http1_only()
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .retry(reqwest::retry::never())
                .connect_timeout(CONNECT)
                .tcp_keepalive(Duration::from_secs(30))
                .pool_idle_timeout(Duration::from_secs(30))
        };
        let setup = |error: reqwest::Error| Error::Other(format!("no HTTP client: {error}"));
        Ok(Self(Arc::new(Inner {
            remote: builder().build().map_err(setup)?,
            local: builder().no_proxy().build().map_err(setup)?,
            config,
            retries,
            hosts: Mutex::default(),
            tokens: Tokens::default(),
            index_writer: tokio::sync::Semaphore::new(1),
        })))
    }

    /// Makes a request and repeats it where it may be repeated and the failure may pass.
    ///
    /// The answer may have any status but 401 and 403 from the registry itself.
    pub(crate) async fn send(&self, call: Call<'_>) -> Result<Answer, Error> {
        let mut attempt = 0;
        loop {
            let outcome = self.once(&call).await;
            let wait = match &outcome {
                _ if !call.repeat => None,
                Ok(answer) if is_transient_status(answer.status().as_u16()) => {
                    self.0.retries.wait(attempt, Some(answer.headers()))
                }
                Err(error) if error.is_transient() => self.0.retries.wait(attempt, None),
                _ => None,
            };
            let Some(wait) = wait else {
                return outcome;
            };
            match &outcome {
                Ok(answer) => tracing::debug!(
                    host = call.host,
                    status = answer.status().as_u16(),
                    ?wait,
                    "trying again"
                ),
                Err(error) => tracing::debug!(host = call.host, %error, ?wait, "trying again"),
            }
            drop(outcome);
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// How often and how patiently requests are repeated.
    pub(crate) fn retries(&self) -> Retries {
        self.0.retries
    }

    /// The turn to change a referrers tag-schema index.
    pub(crate) fn index_writer(&self) -> &tokio::sync::Semaphore {
        &self.0.index_writer
    }

    /// Remembers that a host does not do something.
    pub(crate) fn note_lack(&self, host: &str, lack: Lack) {
        self.hosts()
            .entry(host.to_owned())
            .or_default()
            .lacks
            .insert(lack);
    }

    /// Tells whether a host is known not to do something.
    pub(crate) fn lacks(&self, host: &str, lack: Lack) -> bool {
        self.hosts()
            .get(host)
            .is_some_and(|known| known.lacks.contains(&lack))
    }

    /// `scheme://host/` of a registry.
    pub(crate) fn base(&self, host: &str) -> Result<Url, Error> {
        let scheme = if self.is_plain(host) { "http" } else { "https" };
        Url::parse(&format!("{scheme}://{}/", api_host(host)))
            .map_err(|error| Error::Other(format!("`{}` is not a host: {error}", printable(host))))
    }

    fn is_plain(&self, host: &str) -> bool {
        self.may_be_plain(host)
            || (is_loopback(host)
                && self.hosts().get(host).and_then(|known| known.tls) != Some(true))
    }

    /// Asked for by the configuration.
    fn may_be_plain(&self, host: &str) -> bool {
        self.0.config.plain_http_all || self.0.config.plain_http.iter().any(|plain| plain == host)
    }

    fn hosts(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        self.0.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One try, with at most one answer to a challenge.
    async fn once(&self, call: &Call<'_>) -> Result<Answer, Error> {
        let mut answered = None;
        loop {
            let base = self.base(call.host)?;
            let authorization = match &answered {
                Some(header) => Some(HeaderValue::clone(header)),
                None => self.authorization(call, &base).await?,
            };
            let authorized = authorization.is_some();
            let outcome = self.follow(call, &base, authorization).await;
            if self.speaks_tls_after_all(call.host, &outcome).await {
                continue;
            }
            let answer = outcome?;
            if !same_origin(answer.url(), &base) {
                return Ok(answer);
            }
            match answer.status() {
                StatusCode::UNAUTHORIZED if answered.is_none() => {
                    let challenge = Challenge::choose(
                        answer
                            .headers()
                            .get_all(WWW_AUTHENTICATE)
                            .iter()
                            .filter_map(|value| value.to_str().ok()),
                    );
                    if authorized {
                        // What was sent is no longer good: a token ended, a password changed.
                        self.forget(call.host);
                    }
                    let Some(challenge) = challenge else {
                        return Err(answer.into_error().await);
                    };
                    answered = self.answer_challenge(call, &base, challenge).await?;
                    if answered.is_none() {
                        return Err(Error::Unauthorized {
                            host: call.host.to_owned(),
                            what: call.what.clone(),
                            message: "it wants a login and no credentials for it were found; log in first"
                                .to_owned(),
                        });
                    }
                    // The rest of the refusal is read, so that the connection can be used again.
                    drop(answer.text_of_error().await);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(answer.into_error().await);
                }
                _ => return Ok(answer),
            }
        }
    }

    /// A loopback host is first spoken to in plain HTTP. When that fails and it answers TLS, it is
    /// spoken to in TLS from then on. Nothing secret was sent by then: no challenge was seen.
    async fn speaks_tls_after_all(&self, host: &str, outcome: &Result<Answer, Error>) -> bool {
        if !is_loopback(host)
            || self.may_be_plain(host)
            || self
                .hosts()
                .get(host)
                .is_some_and(|known| known.tls.is_some())
        {
            return false;
        }
        let tls = match outcome {
            Ok(answer) if answer.status() != StatusCode::BAD_REQUEST => false,
            _ => {
                let Ok(url) = Url::parse(&format!("https://{host}/v2/")) else {
                    return false;
                };
                let probe = Exchange::new(host, Method::GET, url);
                match (self.exchange(probe).await, outcome) {
                    (Ok(_), _) => true,
                    // It speaks TLS, with a certificate that is not trusted; that is what to tell.
                    (Err(error), _) if !error.is_transient() => true,
                    (Err(_), Ok(_)) => false,
                    // Nobody answers at all: nothing was learned.
                    (Err(_), Err(_)) => return false,
                }
            }
        };
        self.hosts().entry(host.to_owned()).or_default().tls = Some(tls);
        tls
    }

    /// Sends a request where it leads, over redirects.
    async fn follow(
        &self,
        call: &Call<'_>,
        base: &Url,
        authorization: Option<HeaderValue>,
    ) -> Result<Answer, Error> {
        let mut url = match &call.target {
            Target::Path(path) => base.join(path).map_err(|error| {
                Error::Other(format!("`{}` is not a path: {error}", printable(path)))
            })?,
            Target::Url(url) => url.clone(),
        };
        for _ in 0..=MAX_REDIRECTS {
            let mut exchange = Exchange::new(call.host, call.method.clone(), url.clone());
            exchange.headers.clone_from(&call.headers);
            exchange.body = call.body.clone();
            exchange.progress = call.progress;
            if same_origin(&url, base)
                && let Some(authorization) = &authorization
            {
                exchange
                    .headers
                    .insert(AUTHORIZATION, authorization.clone());
            }
            let response = self.exchange(exchange).await?;
            let answer = Answer::new(response, call.host, call.operation(), call.what.clone());
            let redirects = match answer.status().as_u16() {
                301..=303 => matches!(call.method, Method::GET | Method::HEAD),
                307 | 308 => true,
                _ => false,
            };
            let Some(location) = answer.header(&LOCATION).filter(|_| redirects) else {
                return Ok(answer);
            };
            let next = url.join(location).map_err(|_| {
                Error::Other(format!(
                    "`{}` redirects to `{}`, which is not a URL",
                    call.host,
                    printable(location)
                ))
            })?;
            self.permit(call.host, &url, &next)?;
            url = next;
        }
        Err(Error::Other(format!(
            "`{}` redirects more than {MAX_REDIRECTS} times",
            call.host
        )))
    }

    /// Refuses to leave TLS for plain HTTP, unless that was asked for.
    pub(crate) fn permit(&self, host: &str, from: &Url, to: &Url) -> Result<(), Error> {
        let fits = match to.scheme() {
            "https" => true,
            "http" => from.scheme() == "http" || self.may_be_plain(&authority(to)),
            _ => false,
        };
        if fits {
            Ok(())
        } else {
            Err(Error::Other(format!(
                "`{host}` leads from TLS to `{}://{}`, which is refused; allow plain HTTP for that host if this is meant",
                to.scheme(),
                authority(to)
            )))
        }
    }

    /// One request and the head of its answer.
    async fn exchange(&self, exchange: Exchange<'_>) -> Result<reqwest::Response, Error> {
        let Exchange {
            host,
            method,
            url,
            mut headers,
            body,
            progress,
        } = exchange;
        let client = if url.host_str().is_some_and(is_loopback) {
            &self.0.local
        } else {
            &self.0.remote
        };
        let meter = Arc::new(Meter::default());
        let length = body
            .length()
            .or_else(|| matches!(method, Method::POST | Method::PUT | Method::PATCH).then_some(0));
        if let Some(length) = length {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        let mut request = client.request(method, url).headers(headers);
        if body.length().is_some_and(|length| length > 0) {
            let body = body
                .open(&meter)
                .await
                .map_err(|error| Error::unreachable(host, error))?;
            request = request.body(body);
        }
        let mut answer = pin!(request.send());
        let mut reported = 0;
        let mut report = || {
            let sent = meter.sent();
            if let Some(progress) = progress
                && sent > reported
            {
                progress(sent - reported);
            }
            reported = reported.max(sent);
        };
        loop {
            tokio::select! {
                answer = &mut answer => {
                    report();
                    return answer.map_err(|error| Error::unreachable(host, error.without_url()));
                }
                () = meter.moved() => report(),
                () = tokio::time::sleep(ANSWER) => {
                    return Err(Error::unreachable(host, Idle(ANSWER)));
                }
            }
        }
    }

    /// The header that is known to be wanted, `None` before the first challenge.
    async fn authorization(
        &self,
        call: &Call<'_>,
        base: &Url,
    ) -> Result<Option<HeaderValue>, Error> {
        let challenge = self
            .hosts()
            .get(call.host)
            .and_then(|known| known.challenge.clone());
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => Ok(self.credential(call.host).await?.basic()),
            Some(Challenge::Bearer { realm, service, .. }) => {
                if let Some(token) = self.0.tokens.find(call.host, &realm, &call.scopes) {
                    return Ok(Some(token));
                }
                let scopes = call.scopes.clone();
                self.token(call, base, &realm, service.as_deref(), scopes)
                    .await
                    .map(Some)
            }
        }
    }

    /// What answers a challenge; `None` when it takes credentials that we do not have.
    async fn answer_challenge(
        &self,
        call: &Call<'_>,
        base: &Url,
        challenge: Challenge,
    ) -> Result<Option<HeaderValue>, Error> {
        let header = match &challenge {
            Challenge::Basic => self.credential(call.host).await?.basic(),
            Challenge::Bearer {
                realm,
                service,
                scopes,
            } => {
                let scopes = call.scopes.clone().union(scopes);
                Some(
                    self.token(call, base, realm, service.as_deref(), scopes)
                        .await?,
                )
            }
        };
        self.hosts()
            .entry(call.host.to_owned())
            .or_default()
            .challenge = Some(challenge);
        Ok(header)
    }

    async fn credential(&self, host: &str) -> Result<credentials::Credential, Error> {
        let known = self
            .hosts()
            .get(host)
            .and_then(|known| known.credential.clone());
        if let Some(known) = known {
            return Ok(known);
        }
        let source = self.0.config.credentials.clone();
        let name = host.to_owned();
        let found = tokio::task::spawn_blocking(move || credentials::find(&source, &name))
            .await
            .map_err(|error| Error::Other(format!("credentials were not read: {error}")))??;
        self.hosts().entry(host.to_owned()).or_default().credential = Some(found.clone());
        Ok(found)
    }

    fn forget(&self, host: &str) {
        self.0.tokens.forget(host);
        if let Some(known) = self.hosts().get_mut(host) {
            known.credential = None;
            known.challenge = None;
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

/// A request to a registry.
pub(crate) struct Call<'a> {
    pub(crate) host: &'a str,
    pub(crate) method: Method,
    pub(crate) target: Target,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Body,
    /// The rights it needs, when tokens are used.
    pub(crate) scopes: Scopes,
    /// What it is about, for messages.
    pub(crate) what: String,
    /// Whether doing it twice is the same as doing it once.
    pub(crate) repeat: bool,
    /// Told how many more bytes of the body were sent.
    pub(crate) progress: Option<&'a (dyn Fn(u64) + Send + Sync)>,
}

/// Where a request goes.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A path and query of the registry, with its leading slash.
    Path(String),
    /// What the registry gave as a `Location`.
    Url(Url),
}

impl<'a> Call<'a> {
    /// A request that may be repeated, without body and rights.
    pub(crate) fn new(host: &'a str, method: Method, path: String, what: String) -> Self {
        Self {
            host,
            method,
            target: Target::Path(path),
            headers: HeaderMap::new(),
            body: Body::Empty,
            scopes: Scopes::default(),
            what,
            repeat: true,
            progress: None,
        }
    }

    pub(crate) fn scopes(mut self, scopes: Scopes) -> Self {
        self.scopes = scopes;
        self
    }

    /// Adds a header. A value that no header can hold is left out.
    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(crate) fn body(mut self, body: Body) -> Self {
        self.body = body;
        self
    }

    pub(crate) fn once(mut self) -> Self {
        self.repeat = false;
        self
    }

    fn operation(&self) -> String {
        format!("{} of `{}`", self.method, self.what)
    }
}

struct Exchange<'a> {
    host: &'a str,
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Body,
    progress: Option<&'a (dyn Fn(u64) + Send + Sync)>,
}

impl<'a> Exchange<'a> {
    fn new(host: &'a str, method: Method, url: Url) -> Self {
        Self {
            host,
            method,
            url,
            headers: HeaderMap::new(),
            body: Body::Empty,
            progress: None,
        }
    }
}

/// Nothing moved for too long.
#[derive(Debug, thiserror::Error)]
#[error("nothing came for {} seconds", .0.as_secs())]
struct Idle(Duration);

/// The host that serves the API of a registry that is known by another name.
pub(crate) fn api_host(host: &str) -> &str {
    if is_docker_hub(host) {
        "registry-1.docker.io"
    } else {
        host
    }
}

/// Tells whether these name Docker Hub, whose names, API and logins all differ.
pub(crate) fn is_docker_hub(host: &str) -> bool {
    matches!(
        host,
        "docker.io" | "index.docker.io" | "registry-1.docker.io"
    )
}

/// Tells whether a host, with or without port, is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = if let Some(rest) = host.strip_prefix('[') {
        rest.split(']').next().unwrap_or_default()
    } else {
        host.rsplit_once(':')
            .filter(|(name, _)| !name.contains(':'))
            .map_or(host, |(name, _)| name)
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        || name.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback())
}

pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(15);
/// How long an answer may take after the last byte of the request moved. A registry that puts a large
/// blob together on an object store takes minutes.
const ANSWER: Duration = Duration::from_mins(5);
const MAX_REDIRECTS: usize = 5;

#[cfg(test)]
mod tests;
