//! Wiring of the registry: configuration → store and server → run until a signal.

use std::future::Future;
use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use registry::{Early, Reason, Server};
use store::{DatabaseLocation, Location, ObjectLocation, Store};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::{Config, Log, LogFormat};
use crate::output::{self, Exit, Refused};

/// Starts logging on standard error. A second start changes nothing.
pub(crate) fn logging(log: &Log) {
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(&log.level))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let _ = match log.format {
        LogFormat::Json => builder.json().try_init(),
        LogFormat::Text => builder.try_init(),
    };
}

/// A registry that listens and is not served yet.
pub(crate) struct Registry {
    server: Server,
    store: Store,
    scheme: &'static str,
}

impl Registry {
    /// Binds every address and opens the store. Whoever asks meanwhile is told so.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Self> {
        // A wrong configuration must not leave a data directory behind.
        let settings = settings(config)?;
        open_more_files();
        let early = Early::bind(settings).await?;
        let reason = Reason::default();
        reason.set("the store is being opened");
        let open = async {
            let store = open_store(config, &reason)
                .await
                .with_context(|| format!("cannot open {}", describe(&config.location)))?;
            if let Some(backup) = &config.backup {
                let started = store.start_backup(backup.clone()).await;
                started.with_context(|| {
                    format!(
                        "cannot back up into the directory `{}`",
                        backup.directory.display()
                    )
                })?;
            }
            anyhow::Ok(store)
        };
        let store = early.answer_while(&reason, Box::pin(open)).await?;
        let server = early.serve(store.clone()).await?;
        Ok(Self {
            server,
            store,
            scheme: if config.tls.is_some() {
                "https"
            } else {
                "http"
            },
        })
    }

    /// The addresses that were bound.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.server.local_addresses().to_vec()
    }

    /// The first address as a URL.
    pub(crate) fn url(&self) -> String {
        let address = self
            .addresses()
            .first()
            .map(ToString::to_string)
            .unwrap_or_default();
        format!("{}://{address}", self.scheme)
    }

    /// Serves until `shutdown`, drains, and closes the store.
    pub(crate) async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let store = self.store.clone();
        let outcome = {
            let serve = self.server.run(shutdown);
            tokio::pin!(serve);
            tokio::select! {
                outcome = &mut serve => outcome.map_err(anyhow::Error::new),
                () = store.maintain() => Err(anyhow::anyhow!("the store stopped, restart the server and look at its log")),
            }
        };
        let closed = self.store.close().await.context("closing the store");
        // Why it ended says more than how the end went.
        outcome?;
        closed
    }
}

/// Opens the store. A database or object store that is only just starting, or failing over, is waited for: after a
/// power cut everything starts at once.
async fn open_store(config: &Config, reason: &Reason) -> Result<Store, store::Error> {
    let deadline = tokio::time::Instant::now() + START_PATIENCE;
    let mut told = false;
    loop {
        match Store::open_at(&config.location, config.store.clone()).await {
            Err(error @ (store::Error::Unavailable { .. } | store::Error::ReadOnly { .. }))
                if tokio::time::Instant::now() < deadline =>
            {
                reason.set(match &error {
                    // Where it is stands in the log.
                    store::Error::Unavailable { what, .. } => {
                        format!("{what} is not available")
                    }
                    error => error.to_string(),
                });
                if !told {
                    output::note(format!("waiting for it to come back: {error}"));
                    told = true;
                }
                tokio::time::sleep(START_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}

/// Where a store is, in words, without a password.
fn describe(location: &Location) -> String {
    let objects = |objects: &ObjectLocation| match objects {
        ObjectLocation::Directory(path) => format!("the objects in `{}`", path.display()),
        ObjectLocation::S3(s3) => format!("the bucket `{}`", s3.bucket),
    };
    match location {
        Location {
            database: DatabaseLocation::Sqlite(database),
            objects: ObjectLocation::Directory(directory),
        } if database == directory => format!("the data directory `{}`", directory.display()),
        Location {
            database: DatabaseLocation::Sqlite(database),
            objects: other,
        } => format!(
            "the database in `{}` with {}",
            database.display(),
            objects(other)
        ),
        Location {
            database: DatabaseLocation::Postgres(_),
            objects: other,
        } => format!("the PostgreSQL database with {}", objects(other)),
    }
}

/// Raises the limit of open files as far as it goes. Systems start services with room for 1024, which is
/// fewer than the connections that are served at once.
fn open_more_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays low");
    }
}

/// Runs the registry in the foreground.
pub(crate) async fn run(config: Config, ready_file: Option<&Path>) -> anyhow::Result<()> {
    let registry = Registry::open(&config).await?;
    for address in registry.addresses() {
        output::note(format!("listening on {}://{address}", registry.scheme));
    }
    if config.htpasswd.is_none() {
        output::note("no users are configured: everyone on this machine may read and write");
    }
    let url = registry.url();
    if let Some(path) = ready_file {
        // The listeners are bound: a connection that comes now waits in their queue and is served.
        write_ready(path, &url)?;
    }
    registry.run(shutdown_signal()?).await
}

/// Writes the URL whole, so that a reader never sees half of it.
pub(crate) fn write_ready(path: &Path, url: &str) -> anyhow::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    std::fs::write(&temporary, format!("{url}\n"))
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// Ends at SIGTERM or SIGINT.
pub(crate) fn shutdown_signal() -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Turns the checked configuration into the server's settings.
fn settings(config: &Config) -> anyhow::Result<registry::Settings> {
    let mut settings = registry::Settings {
        listen: config.listen.clone(),
        public_url: config.public_url.clone(),
        redirect: config.redirect.clone(),
        ..registry::Settings::default()
    };
    settings.tls = config
        .tls
        .clone()
        .map(|(certificate, key)| registry::TlsFiles { certificate, key });
    if let Some(connections) = config.connections {
        settings.limits.connections = connections;
    }
    if let Some(timeout) = config.header_timeout {
        settings.limits.header_timeout = timeout;
    }
    if let Some(bytes) = config.manifest_bytes {
        settings.limits.manifest_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    if let Some(repositories) = config.metric_repositories {
        settings.metric_repositories = repositories;
    }
    if let Some(drain) = config.drain {
        settings.drain = drain;
    }
    if let Some(htpasswd) = &config.htpasswd {
        let mut rules = Vec::new();
        for (index, rule) in config.rules.iter().enumerate() {
            let rule: registry::Rule = serde_json::to_value(rule)
                .and_then(serde_json::from_value)
                .map_err(|error| {
                    Refused::new(
                        Exit::CONFIG,
                        format!("`access` rule {}: {error}", index + 1),
                    )
                })?;
            rules.push(rule);
        }
        settings.access = registry::Access::users(htpasswd, rules)
            .map_err(|error| Refused::new(Exit::CONFIG, error))?;
    }
    Ok(settings)
}

/// How long a start waits for a database or an object store that cannot be reached.
const START_PATIENCE: Duration = Duration::from_secs(30);
const START_PAUSE: Duration = Duration::from_millis(500);
