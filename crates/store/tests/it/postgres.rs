//! A PostgreSQL server of its own in a temporary directory, reached over a unix socket only.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running server; dropping it stops it and removes its files.
pub(crate) struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    /// Starts a server, or fails with what to install.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| Vec::new()).await
    }

    /// The same with more settings, which may name files in the server's directory.
    pub(crate) async fn start_with(settings: impl Fn(&Path) -> Vec<String>) -> Self {
        let programs = programs();
        let directory = tempfile::Builder::new()
            .prefix("store-postgres-")
            .tempdir_in("/tmp")
            .unwrap();
        set_mode(directory.path(), 0o777);
        let data = directory.path().join("data");
        let made = run(&programs.join("initdb"))
            .args([
                "--auth=trust",
                "--username=postgres",
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(&data)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success(), "`initdb` failed");
        let settings = settings(directory.path());
        Self::launch(directory, &data, &settings).await
    }

    async fn launch(directory: tempfile::TempDir, data: &Path, settings: &[String]) -> Self {
        let child = run(&programs().join("postgres"))
            .arg("-D")
            .arg(data)
            .args(settings.iter().flat_map(|setting| ["-c", setting]))
            .args([
                "-c",
                "listen_addresses=",
                "-c",
                "fsync=off",
                "-c",
                "log_min_messages=fatal",
            ])
            .arg("-c")
            .arg(format!(
                "unix_socket_directories={}",
                directory.path().display()
            ))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self { child, directory };
        loop {
            let connected =
                tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls).await;
            if connected.is_ok() {
                return server;
            }
            assert!(
                server.child.try_wait().unwrap().is_none(),
                "`postgres` ended before it could be reached"
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// A new, empty database.
    pub(crate) async fn database(&self, name: &str) -> String {
        let (client, connection) =
            tokio_postgres::connect(&self.url("postgres"), tokio_postgres::NoTls)
                .await
                .unwrap();
        tokio::spawn(connection);
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
            .arg(self.directory.path())
            .arg("--pgdata")
            .arg(self.directory.path().join("base"))
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(done.success(), "`pg_basebackup` failed");
    }

    /// Stops this server, and starts the copy in `base` with these settings for its recovery.
    pub(crate) async fn recover(mut self, settings: &[String]) -> Self {
        self.stop();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        drop(self);
        let base = directory.path().join("base");
        std::fs::write(base.join("recovery.signal"), "").unwrap();
        Self::launch(directory, &base, settings).await
    }

    fn stop(&mut self) {
        // SIGINT is the fast shutdown; the children of a killed server would stay.
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.child.wait();
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!(
            "host={} user=postgres dbname={database}",
            self.directory.path().display()
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
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
