//! Sessions: made on the server that takes writes, used again, thrown away when in doubt.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::{AsyncMessage, Client, Config, SimpleQueryMessage};

use super::fault::{Failure, unavailable};
use super::session::{STATEMENT_TIMEOUT, Session, limited};
use super::settings::{Settings, chain};
use super::tls::Connector;
use crate::clock::Clock;
use crate::error::Error;

/// The sessions of a store.
pub(super) struct Pool {
    settings: Settings,
    connector: Connector,
    clock: Arc<Clock>,
    idle: Mutex<Vec<Session>>,
    permits: Arc<Semaphore>,
    size: usize,
    /// The host that last took writes.
    preferred: AtomicUsize,
    health: Mutex<Health>,
}

#[derive(Clone, Debug, Default)]
struct Health {
    outage: Option<Outage>,
}

/// Since when the database fails us, and how.
#[derive(Clone, Debug)]
struct Outage {
    since: Instant,
    last: Instant,
    problem: String,
    read_only: bool,
}

/// A connection with what the server says unasked.
pub(super) struct Raw {
    pub(super) client: Client,
    pub(super) writable: bool,
    pub(super) warned: Arc<AtomicBool>,
    /// Payloads of notifications; bounded, for it is only how far they reach that counts.
    pub(super) notifications: mpsc::Receiver<String>,
}

impl Pool {
    pub(super) fn new(text: &str, size: usize, clock: Arc<Clock>) -> Result<Self, Error> {
        let settings = Settings::parse(text).map_err(|problem| {
            Error::Database(format!("the connection string is wrong: {problem}"))
        })?;
        Ok(Self {
            connector: Connector::new(&settings)?,
            settings,
            clock,
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(size)),
            size,
            preferred: AtomicUsize::new(0),
            health: Mutex::default(),
        })
    }

    /// A session for one use. One to a server that takes no writes comes only when there is no other.
    pub(super) async fn take(&self) -> Result<Session, Error> {
        let permit = Arc::clone(&self.permits).acquire_owned();
        let permit = match tokio::time::timeout(WAIT, permit).await {
            Ok(permit) => permit.map_err(|_| Error::Stopped)?,
            Err(_) => {
                return Err(unavailable(format!(
                    "all {} connections were busy for {WAIT:?}; `storage.database_connections` allows more",
                    self.size
                )));
            }
        };
        loop {
            let idle = lock(&self.idle).pop();
            let Some(mut session) = idle else {
                break;
            };
            let lives = if session.writable {
                LIFETIME
            } else {
                READ_ONLY_LIFETIME
            };
            if session.client.is_closed()
                || session.opened.elapsed() > lives
                || (session.used.elapsed() > DOUBTFUL && !session.answers().await)
            {
                continue;
            }
            session.permit = Some(permit);
            return Ok(session);
        }
        self.connect(permit).await
    }

    pub(super) fn give_back(&self, mut session: Session) {
        if session.client.is_closed() {
            return;
        }
        session.rest();
        if session.writable {
            let mut health = lock(&self.health);
            // A session that works says more than an attempt to connect that failed.
            if health
                .outage
                .as_ref()
                .is_some_and(|outage| !outage.read_only)
            {
                health.outage = None;
            }
        }
        let permit = session.permit.take();
        lock(&self.idle).push(session);
        drop(permit);
    }

    /// Throws idle sessions away: where one was lost, the others are likely to be lost with it.
    pub(super) fn forget_idle(&self) {
        lock(&self.idle).clear();
    }

    pub(super) fn close(&self) {
        self.permits.close();
        self.forget_idle();
    }

    /// Whether a failure now is worth another try: the outage is younger than clients are patient.
    pub(super) fn may_come_back(&self) -> bool {
        let health = lock(&self.health);
        health
            .outage
            .as_ref()
            .is_none_or(|outage| outage.since.elapsed() < PATIENCE)
    }

    /// Notes that a server said that it takes no writes, which a session made before does not know.
    pub(super) fn note_read_only(&self) {
        self.forget_idle();
        self.note(Some(("it takes no writes".to_owned(), true)));
    }

    async fn connect(&self, permit: OwnedSemaphorePermit) -> Result<Session, Error> {
        if let Some(outage) = &lock(&self.health).outage
            && !outage.read_only
            && outage.last.elapsed() < PROBE
        {
            return Err(unavailable(outage.problem.clone()));
        }
        let raw = self.open().await?;
        let mut session = Session::new(raw.client, self.clock.id(), raw.writable, raw.warned);
        session.permit = Some(permit);
        Ok(session)
    }

    /// Connects to the server that takes writes, or to one that takes none where that is allowed.
    pub(super) async fn open(&self) -> Result<Raw, Error> {
        let hosts = &self.settings.hosts;
        let first = self.preferred.load(Ordering::Relaxed);
        let (mut second_best, mut refused) = (None, None);
        let mut problems = Vec::new();
        for turn in 0..hosts.len() {
            let index = (first + turn) % hosts.len();
            let Some(host) = hosts.get(index) else {
                continue;
            };
            match self.open_host(host).await {
                Ok(raw) if raw.writable => {
                    self.preferred.store(index, Ordering::Relaxed);
                    self.note(None);
                    return Ok(raw);
                }
                Ok(raw) => {
                    problems.push(format!("{} takes no writes", name(host)));
                    second_best.get_or_insert(raw);
                }
                Err(Error::Unavailable { problem, .. }) => {
                    problems.push(format!("{}: {problem}", name(host)));
                }
                // A refusal that waiting does not mend; another server may still do.
                Err(other) => refused = Some(other),
            }
        }
        if let Some(refused) = refused
            && second_best.is_none()
        {
            return Err(refused);
        }
        let problem = problems.join("; ");
        let second_best = second_best.filter(|_| self.settings.read_only_too);
        self.note(Some((problem.clone(), second_best.is_some())));
        second_best.ok_or_else(|| unavailable(problem))
    }

    async fn open_host(&self, host: &Config) -> Result<Raw, Error> {
        let limit = host.get_connect_timeout().copied().unwrap_or(HANDSHAKE) + HANDSHAKE;
        let connect = async {
            let (client, mut connection) = host.connect(self.connector.clone()).await?;
            let warned = Arc::new(AtomicBool::new(false));
            let (sender, notifications) = mpsc::channel(NOTIFICATIONS);
            let flag = Arc::clone(&warned);
            tokio::spawn(async move {
                while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                    match message {
                        Ok(AsyncMessage::Notification(notification)) => {
                            let _ = sender.try_send(notification.payload().to_owned());
                        }
                        Ok(AsyncMessage::Notice(notice)) => {
                            if notice.parsed_severity() == Some(Severity::Warning) {
                                flag.store(true, Ordering::Relaxed);
                                tracing::warn!(warning = notice.message(), "the database warns");
                            }
                        }
                        Ok(_) => {}
                        Err(error) => {
                            tracing::debug!(
                                error = chain(&error),
                                "a connection to the database ended"
                            );
                            break;
                        }
                    }
                }
            });
            let rows = client.simple_query(&set_up()).await?;
            Ok((client, warned, notifications, rows))
        };
        let (client, warned, notifications, rows) = match limited(limit, connect).await {
            Ok(connected) => connected,
            Err(failure) => return Err(refusal(failure)),
        };
        let facts = Facts::of(&rows)?;
        facts.check()?;
        Ok(Raw {
            client,
            writable: facts.writable,
            warned,
            notifications,
        })
    }

    /// Notes how the last attempt went, and tells the log when that changes.
    fn note(&self, problem: Option<(String, bool)>) {
        let mut health = lock(&self.health);
        let now = Instant::now();
        match (problem, &mut health.outage) {
            (None, None) => {}
            (None, Some(outage)) => {
                tracing::info!(after = ?outage.since.elapsed(), "the database takes writes again");
                health.outage = None;
            }
            (Some((problem, read_only)), None) => {
                if read_only {
                    tracing::warn!(problem, "the database takes no writes; reads go on");
                } else {
                    tracing::warn!(problem, "the database cannot be reached");
                }
                health.outage = Some(Outage {
                    since: now,
                    last: now,
                    problem,
                    read_only,
                });
            }
            (Some((problem, read_only)), Some(outage)) => {
                outage.last = now;
                outage.problem = problem;
                outage.read_only = read_only;
            }
        }
    }
}

/// What a new session sets and asks, in one round trip. A server that asks for more than `on` keeps it.
fn set_up() -> String {
    format!(
        "SET statement_timeout = '{STATEMENT_TIMEOUT}'; SET lock_timeout = '10s'; \
         SET idle_in_transaction_session_timeout = '30s'; SET client_min_messages = warning; \
         SELECT current_setting('server_version_num'), current_setting('server_encoding'), \
             current_setting('transaction_read_only'), current_setting('fsync'), \
             current_setting('synchronous_commit'), \
             CASE WHEN current_setting('synchronous_commit') = 'off' \
                 THEN set_config('synchronous_commit', 'on', false) ELSE '' END"
    )
}

struct Facts {
    version: i64,
    encoding: String,
    writable: bool,
    fsync: String,
    synchronous_commit: String,
}

impl Facts {
    fn of(messages: &[SimpleQueryMessage]) -> Result<Self, Error> {
        let row = messages
            .iter()
            .find_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row),
                _ => None,
            })
            .ok_or_else(|| unavailable("it does not tell its settings"))?;
        let text = |column| row.get(column).unwrap_or_default().to_owned();
        Ok(Self {
            version: text(0).parse().unwrap_or(0),
            encoding: text(1),
            writable: text(2) == "off",
            fsync: text(3),
            synchronous_commit: text(4),
        })
    }

    fn check(&self) -> Result<(), Error> {
        if self.version < OLDEST {
            return Err(Error::Database(format!(
                "the server is PostgreSQL {}, but {} or newer is needed",
                self.version / 10_000,
                OLDEST / 10_000
            )));
        }
        if self.encoding != "UTF8" {
            return Err(Error::Database(format!(
                "the database has the encoding {}, make one with `ENCODING 'UTF8'`",
                self.encoding
            )));
        }
        static WARNED: AtomicBool = AtomicBool::new(false);
        if (self.fsync == "off" || self.synchronous_commit == "local")
            && !WARNED.swap(true, Ordering::Relaxed)
        {
            if self.fsync == "off" {
                tracing::warn!(
                    "the database runs with `fsync=off`: a power cut loses what was acknowledged"
                );
            } else {
                tracing::warn!(
                    "the database runs with `synchronous_commit=local`: a fail-over loses what was acknowledged"
                );
            }
        }
        Ok(())
    }
}

/// A failure to connect. A refusal that waiting does not mend is named as one.
fn refusal(failure: Failure) -> Error {
    let error = match failure {
        Failure::Driver(error) => error,
        other => return other.error(None),
    };
    let text = chain(&error);
    match error.code() {
        Some(code)
            if code.code().starts_with("28")
                || *code == SqlState::INVALID_CATALOG_NAME
                || *code == SqlState::INSUFFICIENT_PRIVILEGE =>
        {
            Error::Database(text)
        }
        _ => unavailable(text),
    }
}

fn name(host: &Config) -> String {
    let port = host.get_ports().first().copied().unwrap_or(5432);
    match (host.get_hosts().first(), host.get_hostaddrs().first()) {
        (Some(tokio_postgres::config::Host::Tcp(name)), _) => format!("`{name}:{port}`"),
        (Some(tokio_postgres::config::Host::Unix(path)), _) => format!("`{}`", path.display()),
        (None, Some(address)) => format!("`{address}:{port}`"),
        (None, None) => "the server".to_owned(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// PostgreSQL 14.
const OLDEST: i64 = 140_000;
/// How long a request waits for a free connection.
const WAIT: Duration = Duration::from_secs(10);
/// How long the exchange before the first statement may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// After an outage of this length nobody waits for its end any more.
const PATIENCE: Duration = Duration::from_secs(8);
/// While the database cannot be reached, one attempt in this time finds out.
const PROBE: Duration = Duration::from_millis(200);
/// A session is made anew now and then, so that load finds new servers and the server's memory stays small.
const LIFETIME: Duration = Duration::from_mins(30);
/// How soon it is looked for a server that takes writes again.
const READ_ONLY_LIFETIME: Duration = Duration::from_secs(1);
/// A session that was idle for so long is asked before it is used.
const DOUBTFUL: Duration = Duration::from_secs(5);
const NOTIFICATIONS: usize = 256;
