//! The accept loop: listeners, connection limit, TLS, timeouts and the drain at the end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Auth;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::serve::early::Early;
use crate::serve::stall::Stall;
use crate::serve::tls::Tls;
use crate::settings::Settings;

pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod early;
pub(crate) mod host;
pub(crate) mod log;
pub(crate) mod request;
pub(crate) mod stall;
pub(crate) mod stamp;
pub(crate) mod tls;

/// A server whose listeners are bound.
pub struct Server {
    listeners: Vec<Arc<TcpListener>>,
    addresses: Vec<SocketAddr>,
    tls: Option<Arc<Tls>>,
    shared: Arc<Shared>,
}

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) store: store::Store,
    pub(crate) auth: Auth,
    pub(crate) metrics: Metrics,
    /// Connections, and work that outlives the request that began it.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the drain begins.
    pub(crate) stopping: CancellationToken,
}

impl Server {
    /// Checks the settings, reads certificates and users, and binds every listener.
    ///
    /// # Errors
    /// [`Error`], which names what to change. Open access on an address that is not loopback is
    /// refused.
    pub async fn bind(settings: Settings, store: store::Store) -> Result<Self, Error> {
        Early::bind(settings).await?.serve(store).await
    }

    /// Over listeners that are bound.
    pub(crate) async fn over(
        settings: Settings,
        store: store::Store,
        tls: Option<Arc<Tls>>,
        listeners: Vec<Arc<TcpListener>>,
        addresses: Vec<SocketAddr>,
    ) -> Result<Self, Error> {
        let auth = Auth::new(&settings, &store).await?;
        Ok(Self {
            listeners,
            addresses,
            tls,
            shared: Arc::new(Shared {
                settings,
                store,
                auth,
                metrics: Metrics::new(),
                tasks: TaskTracker::new(),
                stopping: CancellationToken::new(),
            }),
        })
    }

    /// The addresses that are listened on, in the order of the settings.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Serves until `shutdown` ends, then takes no more connections, ends event streams and lets open
    /// requests finish for at most [`Settings::drain`].
    ///
    /// # Errors
    /// None after the listeners are bound, at present.
    ///
    /// # Cancel safety
    /// Dropping it closes the listeners and cuts every connection; uploads keep what was recorded.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let killed = CancellationToken::new();
        let _kill = killed.clone().drop_guard();
        let _stop = shared.stopping.clone().drop_guard();
        let connections = Arc::new(Semaphore::new(
            shared
                .settings
                .limits
                .connections
                .clamp(1, Semaphore::MAX_PERMITS),
        ));
        for listener in self.listeners {
            let acceptor = Acceptor {
                shared: Arc::clone(&shared),
                connections: Arc::clone(&connections),
                tls: self.tls.clone(),
                killed: killed.clone(),
            };
            shared.tasks.spawn(acceptor.run(listener));
        }
        // Streams that wait for events end soon after their user is removed, without an event.
        let watcher = Arc::clone(&shared);
        shared.tasks.spawn(async move {
            let mut ticks = tokio::time::interval(LOOK);
            while watcher
                .stopping
                .run_until_cancelled(ticks.tick())
                .await
                .is_some()
            {
                watcher.auth.refresh();
            }
        });
        shutdown.await;
        tracing::info!("draining");
        shared.stopping.cancel();
        shared.tasks.close();
        if tokio::time::timeout(shared.settings.drain, shared.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                tasks = shared.tasks.len(),
                "the drain took too long, connections are cut"
            );
            killed.cancel();
            // Recording what arrived of uploads takes no client.
            let _ = tokio::time::timeout(CUT, shared.tasks.wait()).await;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// Accepts the connections of one listener.
struct Acceptor {
    shared: Arc<Shared>,
    connections: Arc<Semaphore>,
    tls: Option<Arc<Tls>>,
    killed: CancellationToken,
}

impl Acceptor {
    async fn run(self, listener: Arc<TcpListener>) {
        let stopping = self.shared.stopping.clone();
        // The permit comes before the connection: beyond the limit clients wait in the kernel's
        // queue, not in our memory.
        while let Some(Ok(permit)) = stopping
            .run_until_cancelled(Arc::clone(&self.connections).acquire_owned())
            .await
        {
            let Some(accepted) = stopping.run_until_cancelled(listener.accept()).await else {
                break;
            };
            match accepted {
                Ok((stream, peer)) => self.connection(stream, peer, permit),
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    // Out of file descriptors or memory: give others time to close theirs.
                    tracing::warn!(%error, "cannot accept a connection");
                    let _ = stopping
                        .run_until_cancelled(tokio::time::sleep(PAUSE))
                        .await;
                }
            }
        }
    }

    fn connection(&self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let shared = Arc::clone(&self.shared);
        let killed = self.killed.clone();
        let tls = self.tls.clone();
        let counted = shared.metrics.connection();
        self.shared.tasks.spawn(async move {
            let _held = (permit, counted);
            // Answers are written whole; waiting for more only delays small ones.
            let _ = stream.set_nodelay(true);
            let limits = &shared.settings.limits;
            let served = async {
                match tls {
                    None => {
                        serve(
                            Arc::clone(&shared),
                            Stall::new(stream, limits.write_timeout),
                            peer,
                            false,
                        )
                        .await;
                    }
                    Some(tls) => {
                        let accept = TlsAcceptor::from(tls.config()).accept(stream);
                        match tokio::time::timeout(limits.header_timeout, accept).await {
                            Ok(Ok(stream)) => {
                                serve(
                                    Arc::clone(&shared),
                                    Stall::new(stream, limits.write_timeout),
                                    peer,
                                    true,
                                )
                                .await;
                            }
                            Ok(Err(error)) => {
                                tracing::debug!(%peer, %error, "the TLS handshake failed");
                            }
                            Err(_) => tracing::debug!(%peer, "the TLS handshake took too long"),
                        }
                    }
                }
            };
            let _ = killed.run_until_cancelled(served).await;
        });
    }
}

async fn serve<S>(shared: Arc<Shared>, stream: S, peer: SocketAddr, secure: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stopping = shared.stopping.clone();
    let header_timeout = shared.settings.limits.header_timeout;
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(request::answer(shared, request, peer, secure).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, error = crate::error::chain(&error), "a connection ended early");
    }
}

/// Errors of one connection that was gone before it was accepted.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

const PAUSE: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_secs(1);
const CUT: Duration = Duration::from_secs(5);
