//! A PostgreSQL server of its own in a temporary directory, reached over a unix socket only.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A server; dropping it stops it and removes its files.
pub(crate) struct Server {
    child: Option<Child>,
    directory: tempfile::TempDir,
    /// Where its data is in its directory.
    data: &'static str,
    settings: Vec<String>,
}

impl Server {
    /// Starts a server, or fails with what to install.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| Vec::new()).await
    }

    /// The same with more settings, which may name files in the server's directory.
    pub(crate) async fn start_with(settings: impl Fn(&Path) -> Vec<String>) -> Self {
        let mut server = Self::new();
        server.settings = settings(server.directory());
        let made = run(&programs().join("initdb"))
            .args([
                "--auth=trust",
                "--username=postgres",
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(server.data())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success(), "`initdb` failed");
        server.go().await;
        server
    }

    fn new() -> Self {
        Self {
            child: None,
            directory: directory(),
            data: "data",
            settings: Vec::new(),
        }
    }

    /// A standby that follows this server.
    pub(crate) async fn standby(&self) -> Self {
        let mut standby = Self::new();
        let made = run(&programs().join("pg_basebackup"))
            .args(["--write-recovery-conf", "--no-sync", "--username=postgres"])
            .args(["--checkpoint=fast", "--wal-method=stream", "-h"])
            .arg(self.directory.path())
            .arg("-D")
            .arg(standby.data())
            .status()
            .unwrap();
        assert!(made.success(), "`pg_basebackup` failed");
        standby.go().await;
        standby
    }

    /// Starts the server again.
    pub(crate) async fn go(&mut self) {
        let mut command = run(&programs().join("postgres"));
        command.arg("-D").arg(self.data()).args([
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
            "-c",
            "log_min_messages=fatal",
            "-c",
        ]);
        command.arg(format!(
            "unix_socket_directories={}",
            self.directory.path().display()
        ));
        command.args(self.settings.iter().flat_map(|setting| ["-c", setting]));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        loop {
            let connected =
                tokio_postgres::connect(&self.url("postgres"), tokio_postgres::NoTls).await;
            if connected.is_ok() {
                break;
            }
            assert!(
                child.try_wait().unwrap().is_none(),
                "`postgres` ended before it could be reached"
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        self.child = Some(child);
    }

    /// Stops the server: INT ends its sessions in good order, QUIT as a crash does.
    pub(crate) fn stop(&mut self, signal: rustix::process::Signal) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
        let _ = child.wait();
    }

    /// A new, empty database.
    pub(crate) async fn database(&self, name: &str) -> String {
        let client = connect(&self.url("postgres")).await;
        client
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .unwrap();
        self.url(name)
    }

    /// The directory of the server, which it may write to.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Copies the running server with its own tool into `base` of its directory.
    pub(crate) fn base_backup(&self) {
        let done = run(&programs().join("pg_basebackup"))
            .args([
                "--username=postgres",
                "--wal-method=none",
                "--checkpoint=fast",
            ])
            .arg("--host")
            .arg(self.directory())
            .arg("--pgdata")
            .arg(self.directory().join("base"))
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(done.success(), "`pg_basebackup` failed");
    }

    /// Stops this server, and starts the copy in `base` with these settings for its recovery.
    pub(crate) async fn recover(mut self, settings: &[String]) -> Self {
        self.stop(rustix::process::Signal::INT);
        self.data = "base";
        self.settings = settings.to_vec();
        std::fs::write(self.data().join("recovery.signal"), "").unwrap();
        self.go().await;
        self
    }

    /// How to reach a database of this server.
    pub(crate) fn url(&self, database: &str) -> String {
        Self::url_of(&[self], database)
    }

    /// How to reach a database of the one of these servers that takes writes.
    pub(crate) fn url_of(servers: &[&Self], database: &str) -> String {
        let hosts: Vec<_> = servers
            .iter()
            .map(|server| server.directory.path().display().to_string())
            .collect();
        format!("host={} user=postgres dbname={database}", hosts.join(","))
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join(self.data)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is the fast shutdown; the children of a killed server would stay.
        self.stop(rustix::process::Signal::INT);
    }
}

/// A connection beside the store's own.
pub(crate) async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new()
        .prefix("store-postgres-")
        .tempdir_in("/tmp")
        .unwrap();
    set_mode(directory.path(), 0o777);
    directory
}

/// The directory of the newest PostgreSQL of this machine.
fn programs() -> PathBuf {
    let mut found: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|bin| bin.join("initdb").is_file())
        .collect();
    found.sort();
    found
        .pop()
        .expect("these tests need PostgreSQL: install the package `postgresql`")
}

/// The server refuses to run as root, so root runs it as `nobody`.
#[expect(
    clippy::disallowed_methods,
    reason = "the tests start the database that they test against"
)]
fn run(program: &Path) -> Command {
    if rustix::process::getuid().is_root() {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(program)
            .current_dir("/");
        command
    } else {
        Command::new(program)
    }
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
