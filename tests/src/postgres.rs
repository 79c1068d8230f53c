//! PostgreSQL servers of our own, on free ports: one alone, or one with a standby that can be promoted.
//!
//! Processes are killed here, not power: so syncing is off unless a test says that it cuts the power.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::server::{free_port, signal};
use crate::{Run, Scratch};

/// How long a server may take to start, to stop or to be promoted.
const PATIENCE: Duration = Duration::from_mins(1);

/// The user that owns everything in it.
const USER: &str = "longshore";

/// The user and group `nobody` and `nogroup` of every Debian: the server refuses to run as root.
const NOBODY: u32 = 65534;

/// How a server is made.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Where its data directory is; `None` is a scratch directory. Its user must be able to go there.
    pub data: Option<PathBuf>,
    /// Where its log is (`pg_wal`); `None` is the data directory.
    pub wal: Option<PathBuf>,
    /// Whether every write is synced, as in production.
    pub syncs: bool,
    /// Settings, as `name=value`.
    pub settings: Vec<String>,
    /// Lines of `pg_hba.conf` before those that let everybody in from this machine.
    pub access: Vec<String>,
}

/// A PostgreSQL server. It is stopped when this value goes.
#[derive(Debug)]
pub struct Postgres {
    child: Option<Child>,
    port: u16,
    data: PathBuf,
    syncs: bool,
    settings: Vec<String>,
    scratch: Scratch,
}

impl Postgres {
    /// Makes a database cluster in a scratch directory and starts a server on it.
    ///
    /// # Panics
    /// When PostgreSQL is not there or does not start.
    pub fn start() -> Self {
        Self::with(Setup::default())
    }

    /// The same below `directory`, with every write synced as it is in production.
    ///
    /// # Panics
    /// When PostgreSQL is not there or does not start.
    pub fn start_in(directory: &Path) -> Self {
        Self::with(Setup {
            data: Some(directory.join("postgres")),
            syncs: true,
            ..Setup::default()
        })
    }

    /// Makes a database cluster and starts a server on it.
    ///
    /// # Panics
    /// When PostgreSQL is not there or does not start.
    pub fn with(setup: Setup) -> Self {
        let scratch = Scratch::new();
        open_to_all(scratch.path());
        let data = setup.data.unwrap_or_else(|| scratch.join("postgres"));
        own(&data);
        let mut initdb = as_nobody("initdb")
            .args(["--auth=trust", "--encoding=UTF8", "--locale=C"])
            .arg(format!("--username={USER}"))
            .arg("-D")
            .arg(&data);
        if let Some(wal) = &setup.wal {
            own(wal);
            initdb = initdb.arg("--waldir").arg(wal);
        }
        if !setup.syncs {
            initdb = initdb.arg("--no-sync");
        }
        initdb.ok();
        if !setup.access.is_empty() {
            let file = data.join("pg_hba.conf");
            let rest = std::fs::read_to_string(&file).expect("it was just made");
            let text = format!("{}\n{rest}", setup.access.join("\n"));
            std::fs::write(&file, text).expect("it can be written");
        }
        let mut server = Self {
            child: None,
            port: 0,
            data,
            syncs: setup.syncs,
            settings: setup.settings,
            scratch,
        };
        server.launch();
        server
    }

    /// Copies the data directory with the server's own tool, without its log.
    ///
    /// # Panics
    /// When the tool fails.
    pub fn base_copy(&self, to: &Path) {
        as_nobody("pg_basebackup")
            .args(["--wal-method=none", "--checkpoint=fast", "--no-sync", "-D"])
            .arg(to)
            .arg("-d")
            .arg(format!("host=127.0.0.1 port={} user={USER}", self.port))
            .ok();
    }

    /// Starts a server on a data directory that is there, such as a copy, and waits until it takes writes.
    ///
    /// # Panics
    /// When it does not.
    pub fn on_copy(data: PathBuf, settings: Vec<String>) -> Self {
        let scratch = Scratch::new();
        open_to_all(scratch.path());
        let mut server = Self {
            child: None,
            port: 0,
            data,
            syncs: false,
            settings,
            scratch,
        };
        server.launch();
        wait_for("the end of the recovery", || {
            server.sql("postgres", "SELECT pg_is_in_recovery()") == "f"
        });
        server
    }

    /// A streaming standby of this server. With it, a commit waits for the standby to have it.
    ///
    /// # Panics
    /// When it does not start.
    pub fn standby(&self) -> Self {
        let scratch = Scratch::new();
        open_to_all(scratch.path());
        let data = scratch.join("postgres");
        own(&data);
        as_nobody("pg_basebackup")
            .args(["--write-recovery-conf", "--wal-method=stream", "--no-sync"])
            .args(["--checkpoint=fast", "-D"])
            .arg(&data)
            .arg("-d")
            .arg(format!(
                "host=127.0.0.1 port={} user={USER} application_name=standby",
                self.port
            ))
            .ok();
        let mut standby = Self {
            child: None,
            port: 0,
            data,
            syncs: self.syncs,
            settings: self.settings.clone(),
            scratch,
        };
        standby.launch();
        self.sql(
            "postgres",
            "ALTER SYSTEM SET synchronous_standby_names = '*'",
        );
        self.sql("postgres", "SELECT pg_reload_conf()");
        wait_for("the standby", || {
            self.sql("postgres", "SELECT sync_state FROM pg_stat_replication") == "sync"
        });
        standby
    }

    /// Makes a standby take over.
    ///
    /// # Panics
    /// When it does not.
    pub fn promote(&self) {
        as_nobody("pg_ctl")
            .args(["promote", "-w", "-D"])
            .arg(&self.data)
            .ok();
        wait_for("the promotion", || {
            self.sql("postgres", "SELECT pg_is_in_recovery()") == "f"
        });
    }

    /// The connection string of a database.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/{database}", self.port)
    }

    /// The connection string of a database that is on whichever of these servers takes writes.
    pub fn url_of_any(servers: &[&Self], database: &str) -> String {
        let hosts: Vec<_> = servers
            .iter()
            .map(|server| format!("127.0.0.1:{}", server.port))
            .collect();
        format!(
            "postgres://{USER}@{}/{database}?target_session_attrs=read-write",
            hosts.join(",")
        )
    }

    /// The id of its first process, whose children are all others.
    ///
    /// # Panics
    /// When it does not run any more.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Makes a database, unless it is there.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn create_database(&self, name: &str) {
        create_database(self.port, name);
    }

    /// Runs a statement and gives back what it printed: rows on lines, columns apart by `|`.
    ///
    /// # Panics
    /// With what the server said when it refuses.
    pub fn sql(&self, database: &str, statement: &str) -> String {
        psql(self.port, database, statement).ok().text()
    }

    /// Runs a statement that may fail.
    pub fn try_sql(&self, database: &str, statement: &str) -> Option<String> {
        let output = psql(self.port, database, statement).run();
        (output.code == Some(0)).then(|| output.text())
    }

    /// Whether it answers.
    pub fn serves(&self) -> bool {
        self.try_sql("postgres", "SELECT 1").is_some()
    }

    /// Stops it at once, as a crash would; what was committed is there at the next start.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The immediate shutdown; the children of a killed server would stay.
            signal(child.id(), Signal::QUIT);
            drop(child.wait());
        }
    }

    /// Stops it in order: sessions are cut, then everything is written.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(child.id(), Signal::INT);
            drop(child.wait());
        }
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Whether its process still runs.
    pub fn runs(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Starts it again where it was.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(self.scratch.join("postgres.log")).unwrap_or_default()
    }

    fn launch(&mut self) {
        let fixed = self.port;
        for attempt in 0.. {
            if fixed == 0 {
                self.port = free_port();
            }
            let mut run = as_nobody("postgres").arg("-D").arg(&self.data);
            for setting in [
                format!("port={}", self.port),
                "listen_addresses=127.0.0.1".to_owned(),
                "unix_socket_directories=".to_owned(),
                "max_connections=300".to_owned(),
                "wal_level=replica".to_owned(),
                "hot_standby=on".to_owned(),
                "shared_buffers=64MB".to_owned(),
                format!("fsync={}", if self.syncs { "on" } else { "off" }),
            ] {
                run = run.args(["-c", &setting]);
            }
            for setting in &self.settings {
                run = run.args(["-c", setting]);
            }
            let mut child = run.spawn(&self.scratch.join("postgres.log"));
            let start = Instant::now();
            loop {
                if self.answers() {
                    self.child = Some(child);
                    return;
                }
                let ended = matches!(child.try_wait(), Ok(Some(_)));
                // Somebody may have taken the port meanwhile.
                if ended && fixed == 0 && attempt < 3 {
                    break;
                }
                assert!(
                    !ended && start.elapsed() < PATIENCE,
                    "PostgreSQL did not start:\n{}",
                    self.logged()
                );
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn answers(&self) -> bool {
        TcpStream::connect(("127.0.0.1", self.port)).is_ok()
            && psql(self.port, "postgres", "SELECT 1").run().code == Some(0)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes a database on the server at `port`, unless it is there.
pub(crate) fn create_database(port: u16, name: &str) {
    let output = psql(port, "postgres", &format!("CREATE DATABASE \"{name}\"")).run();
    assert!(
        output.code == Some(0) || output.both().contains("already exists"),
        "{output}"
    );
}

/// A statement for the server at `port`.
pub(crate) fn psql(port: u16, database: &str, statement: &str) -> Run {
    Run::new(programs().join("psql"))
        .args(["--no-psqlrc", "--tuples-only", "--no-align", "--quiet"])
        .args(["--set", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", USER])
        .args(["-p", &port.to_string(), "-d", database, "-c", statement])
        .dir("/")
}

/// The directory of the programs of the newest PostgreSQL of this machine.
///
/// # Panics
/// When there is none.
pub fn programs() -> PathBuf {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|bin| bin.join("initdb").is_file())
        .collect();
    found.sort();
    found
        .pop()
        .expect("this needs PostgreSQL: install the package `postgresql`")
}

/// One of its programs, not as root.
fn as_nobody(program: &str) -> Run {
    let program = programs().join(program);
    if rustix::process::getuid().is_root() {
        Run::new("setpriv")
            .args([
                &format!("--reuid={NOBODY}"),
                &format!("--regid={NOBODY}"),
                "--clear-groups",
                "--",
            ])
            .arg(program)
            .dir("/")
    } else {
        Run::new(program)
    }
}

/// Makes a directory that the server's user owns.
///
/// # Panics
/// When it cannot be made or given away.
pub fn own(data: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(data).expect("a directory can be made");
    std::fs::set_permissions(data, std::fs::Permissions::from_mode(0o700))
        .expect("its rights can be set");
    if rustix::process::getuid().is_root() {
        std::os::unix::fs::chown(data, Some(NOBODY), Some(NOBODY)).expect("root gives it away");
    }
}

/// Gives a file to the server's user, who alone may read it.
///
/// # Panics
/// When its rights cannot be set.
pub fn own_file(path: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .expect("its rights can be set");
    if rustix::process::getuid().is_root() {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("root gives it away");
    }
}

/// Lets every user go through a scratch directory.
///
/// # Panics
/// When its rights cannot be set.
pub fn open_to_all(directory: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
        .expect("its rights can be set");
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}
