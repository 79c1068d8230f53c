//! What listens before the store is open: a start may have to wait for its database or its bucket.
//!
//! The addresses are bound once and handed on, so nobody who asks meanwhile is refused the connection. Health is told, and
//! everything else is told to come again. Each connection is for one request: the next one is for the server.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT, RETRY_AFTER};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::error::{Error, Refusal, UNKNOWN};
use crate::serve::Server;
use crate::serve::body::Body;
use crate::serve::tls::Tls;
use crate::settings::{Access, Settings};

/// A server whose addresses are bound and whose store is not open yet.
pub struct Early {
    settings: Settings,
    tls: Option<Arc<Tls>>,
    listeners: Vec<Arc<TcpListener>>,
    addresses: Vec<SocketAddr>,
}

/// Why a server is not ready yet, as it is told to whoever asks.
#[derive(Clone, Debug, Default)]
pub struct Reason(Arc<Mutex<String>>);

impl Reason {
    /// Tells something else from now on. Everybody can read it: no address and no name of a file belongs into it.
    pub fn set(&self, text: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }

    fn get(&self) -> String {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Early {
    /// Checks the settings, reads certificates, and binds every listener.
    ///
    /// # Errors
    /// [`Error`], which names what to change. Open access on an address that is not loopback is refused.
    pub async fn bind(settings: Settings) -> Result<Self, Error> {
        if settings.listen.is_empty() {
            return Err(Error::NoAddress);
        }
        if let Some(url) = &settings.public_url {
            let fits = url.parse::<http::Uri>().is_ok_and(|uri| {
                matches!(uri.scheme_str(), Some("http" | "https"))
                    && uri.authority().is_some()
                    && uri.query().is_none()
                    && !url.contains('"')
            });
            if !fits {
                return Err(Error::PublicUrl(url.clone()));
            }
        }
        if let Access::Open = settings.access
            && let Some(address) = settings.listen.iter().find(|a| !a.ip().is_loopback())
        {
            return Err(Error::OpenNotLoopback(*address));
        }
        let tls = settings
            .tls
            .clone()
            .map(Tls::load)
            .transpose()?
            .map(Arc::new);
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for &address in &settings.listen {
            let failed = |source| Error::Bind { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            addresses.push(listener.local_addr().map_err(failed)?);
            listeners.push(Arc::new(listener));
        }
        Ok(Self {
            settings,
            tls,
            listeners,
            addresses,
        })
    }

    /// The addresses that are listened on, in the order of the settings.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Does some work, such as opening the store, and answers meanwhile: `/healthz` 200, `/readyz` 503 with the reason,
    /// everything else 503 with `Retry-After`.
    pub async fn answer_while<T>(&self, reason: &Reason, work: impl Future<Output = T>) -> T {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let mut accepting = JoinSet::new();
        for listener in &self.listeners {
            let (listener, connections) = (Arc::clone(listener), Arc::clone(&connections));
            let (tls, reason) = (self.tls.clone(), reason.clone());
            accepting.spawn(async move {
                while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
                    let Ok((stream, _)) = listener.accept().await else {
                        tokio::time::sleep(PAUSE).await;
                        continue;
                    };
                    let (tls, reason) = (tls.clone(), reason.clone());
                    // It ends by itself, also when the server has begun meanwhile.
                    tokio::spawn(async move {
                        let _held = permit;
                        let _ = tokio::time::timeout(LIMIT, connection(stream, tls, reason)).await;
                    });
                }
            });
        }
        let outcome = work.await;
        accepting.shutdown().await;
        outcome
    }

    /// Reads the users and becomes the server, with the listeners as they are.
    ///
    /// # Errors
    /// [`Error`], which names what to change.
    pub async fn serve(self, store: store::Store) -> Result<Server, Error> {
        Server::over(
            self.settings,
            store,
            self.tls,
            self.listeners,
            self.addresses,
        )
        .await
    }
}

impl std::fmt::Debug for Early {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Early")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

async fn connection(stream: TcpStream, tls: Option<Arc<Tls>>, reason: Reason) {
    match tls {
        None => serve(stream, reason).await,
        Some(tls) => {
            if let Ok(stream) = TlsAcceptor::from(tls.config()).accept(stream).await {
                serve(stream, reason).await;
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, reason: Reason) {
    let service = service_fn(move |request| {
        let reason = reason.get();
        async move { Ok::<_, Infallible>(answer(request, &reason).await) }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(request: Request<Incoming>, reason: &str) -> Response<Body> {
    let (head, mut body) = request.into_parts();
    let plain = |status: StatusCode, text: String| {
        let mut response = Response::new(Body::full(text));
        *response.status_mut() = status;
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        response
    };
    let mut response = match head.uri.path() {
        "/healthz" => plain(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => plain(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("starting: {reason}\n"),
        ),
        _ => Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            UNKNOWN,
            format!("the registry is starting: {reason}, try again"),
        )
        .into_response(),
    };
    if response.status() == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from_static("5"));
    }
    if let Some(length) = response.body().length() {
        response
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    // A connection that is closed with unread bytes is reset, and the answer may be lost with it.
    if !head.headers.contains_key(EXPECT) {
        let mut left = DRAIN;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                break;
            }
        }
    }
    if head.method == Method::HEAD {
        response = response.map(|_| Body::empty());
    }
    response
}

/// Connections at once. What comes beyond waits in the kernel's queue.
const CONNECTIONS: usize = 256;
/// How long one of them may take.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);
const DRAIN: usize = 1 << 20;
