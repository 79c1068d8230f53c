//! Who is measured: our server, the limits beside it, and peers that someone else started.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use e2e::Server;
use e2e::server::Options;

use super::content::Large;
use super::wire::Base;
use crate::shell;

/// How long a start may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a contestant is, which says what it is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Our server.
    Ours,
    /// Serves the same bytes as files: the limit of what is read.
    Files,
    /// Hashes what it gets and keeps nothing: the limit of what is written.
    Sink,
    /// Another registry.
    Peer,
}

/// A server that is measured.
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) base: Base,
    pub(crate) pid: u32,
    _process: Process,
}

/// What ends with the contestant.
enum Process {
    Server { _server: Box<Server> },
    Child(Child),
    Foreign,
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Self::Child(child) = self {
            // It may have ended by itself, which is as good.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// A peer as it is given on the command line, `NAME=URL,PID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    name: String,
    base: Base,
    pid: u32,
}

impl Peer {
    /// Reads `NAME=URL,PID`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("a peer is given as NAME=URL,PID")?;
        let (url, pid) = rest
            .rsplit_once(',')
            .ok_or("the process id is missing: NAME=URL,PID")?;
        if name.is_empty() || name.len() > 20 {
            return Err("the name has 1 to 20 characters".to_owned());
        }
        Ok(Self {
            name: name.to_owned(),
            base: Base::parse(url)?,
            pid: pid
                .parse()
                .map_err(|_| format!("`{pid}` is not a process id"))?,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its name and where it is.
    pub(crate) fn place(&self) -> (&str, &Base) {
        (&self.name, &self.base)
    }
}

impl Contestant {
    /// Starts our server with its data in `dir`.
    pub(crate) fn ours(program: PathBuf, dir: &Path) -> anyhow::Result<Self> {
        let server = Options::new(program)
            .data(dir)
            .start()
            .map_err(|error| anyhow::anyhow!(error))?;
        let base = Base::parse(server.url()).map_err(anyhow::Error::msg)?;
        Ok(Self {
            name: OURS.to_owned(),
            role: Role::Ours,
            base,
            pid: server.pid(),
            _process: Process::Server {
                _server: Box::new(server),
            },
        })
    }

    /// Takes a peer that runs.
    pub(crate) fn peer(peer: &Peer) -> anyhow::Result<Self> {
        TcpStream::connect(peer.base.authority())
            .with_context(|| format!("the peer `{}` cannot be reached", peer.name))?;
        Ok(Self {
            name: peer.name.clone(),
            role: Role::Peer,
            base: peer.base.clone(),
            pid: peer.pid,
            _process: Process::Foreign,
        })
    }

    /// Starts the sink.
    pub(crate) fn sink(dir: &Path) -> anyhow::Result<Self> {
        let ready = dir.join("sink-url");
        let child = shell::command(std::env::current_exe()?)
            .args(["bench", "--sink"])
            .arg(&ready)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start the sink")?;
        let pid = child.id();
        let mut process = Process::Child(child);
        let url = wait(&mut process, || fs::read_to_string(&ready).ok())
            .context("the sink did not start")?;
        Ok(Self {
            name: "sink".to_owned(),
            role: Role::Sink,
            base: Base::parse(&url).map_err(anyhow::Error::msg)?,
            pid,
            _process: process,
        })
    }

    /// Starts nginx, one process, with the blob and the manifest as files where a registry has them.
    pub(crate) fn files(
        dir: &Path,
        blob: Option<&Large<'_>>,
        manifest: &[u8],
    ) -> anyhow::Result<Self> {
        let nginx = shell::find("nginx").context("nginx is not installed")?;
        let root = dir.join("root");
        let manifests = root.join("v2/bench/images/manifests");
        fs::create_dir_all(&manifests)?;
        fs::write(manifests.join("latest"), manifest)?;
        if let Some(blob) = blob {
            let blobs = root.join("v2/bench/large/blobs");
            fs::create_dir_all(&blobs)?;
            let mut file = fs::File::create(blobs.join(&blob.digest))?;
            blob.write(&mut file)?;
            file.flush()?;
            file.sync_all()?;
        }
        let built = shell::command(&nginx).arg("-V").output()?;
        let port = e2e::server::free_port();
        let configuration = dir.join("nginx.conf");
        fs::write(
            &configuration,
            configure(dir, port, &String::from_utf8_lossy(&built.stderr)),
        )?;
        let log = dir.join("nginx.log");
        let child = shell::command(&nginx)
            .arg("-p")
            .arg(dir)
            .arg("-c")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .context("cannot start nginx")?;
        let pid = child.id();
        let mut process = Process::Child(child);
        let address = format!("127.0.0.1:{port}");
        wait(&mut process, || TcpStream::connect(&address).ok()).with_context(|| {
            let said = fs::read_to_string(&log).unwrap_or_default();
            format!("nginx did not start: {}", said.trim())
        })?;
        Ok(Self {
            name: NGINX.to_owned(),
            role: Role::Files,
            base: Base::parse(&format!("http://{address}")).map_err(anyhow::Error::msg)?,
            pid,
            _process: process,
        })
    }
}

/// The name of our server in the table.
pub(crate) const OURS: &str = "longshore";
/// The name of the limit of what is read.
pub(crate) const NGINX: &str = "nginx";

/// One process, so that its figures are found under one id; `sendfile`, and open files kept.
fn configure(dir: &Path, port: u16, built: &str) -> String {
    let dir = dir.display();
    let mut text = format!(
        "daemon off;\nmaster_process off;\npid {dir}/nginx.pid;\nerror_log {dir}/nginx-error.log;\n\
         worker_rlimit_nofile 4096;\nevents {{ worker_connections 1024; }}\nhttp {{\n\
         access_log off;\nsendfile on;\ntcp_nopush on;\ntcp_nodelay on;\nkeepalive_timeout 600s;\n\
         keepalive_requests 1000000000;\nopen_file_cache max=100 inactive=600s;\n\
         default_type application/octet-stream;\nclient_body_temp_path {dir}/temp-body;\n"
    );
    // Without these a build for the system's service wants directories of that service.
    for module in ["proxy", "fastcgi", "uwsgi", "scgi"] {
        if !built.contains(&format!("--without-http_{module}_module")) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{module}_temp_path {dir}/temp-{module};");
        }
    }
    let _ = writeln!(
        text,
        "server {{ listen 127.0.0.1:{port}; root {dir}/root; }}\n}}"
    );
    text
}

/// Asks until there is an answer, the process ends, or patience does.
fn wait<T>(process: &mut Process, mut ask: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if let Process::Child(child) = process
            && let Some(status) = child.try_wait()?
        {
            bail!("it ended: {status}");
        }
        if start.elapsed() > PATIENCE {
            bail!("it does not answer");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers() {
        let peer = Peer::parse("distribution=http://127.0.0.1:5001,77").unwrap();
        assert_eq!((peer.name(), peer.pid), ("distribution", 77));
        for wrong in [
            "http://a:1,7",
            "a=http://b:1",
            "a=http://b:1,x",
            "=http://b:1,7",
            "a=b:1,7",
        ] {
            assert!(Peer::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn paths_of_modules_that_are_not_built_in_are_not_set() {
        let text = configure(
            Path::new("/d"),
            8080,
            "arguments: --without-http_scgi_module",
        );
        assert!(text.contains("proxy_temp_path /d/temp-proxy;"));
        assert!(!text.contains("scgi_temp"));
        assert!(text.contains("listen 127.0.0.1:8080; root /d/root;"));
    }
}
