//! A server of the program under test, on a free port with a data directory of its own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::cluster::Storage;
use crate::{Run, Scratch, http, tools};

/// How long a start or a stop may take; a start that needs a second is a defect of its own, but
/// not this harness's to judge.
const PATIENCE: Duration = Duration::from_mins(1);

/// How a server is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program.
    pub program: PathBuf,
    /// The configuration file's text; `None` starts it without one.
    pub config: Option<String>,
    /// The data directory; `None` makes one in the scratch directory.
    pub data: Option<PathBuf>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// What stands before the program on the command line, such as `strace …`.
    pub wrapper: Vec<String>,
    /// A fixed port; 0 takes a free one.
    pub port: u16,
    /// Where a replica keeps what it has; `None` is the data directory, or what the suite's run mode says.
    pub storage: Option<Storage>,
}

impl Options {
    /// The options of `program` without any configuration.
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            config: None,
            data: None,
            env: Vec::new(),
            wrapper: Vec::new(),
            port: 0,
            storage: None,
        }
    }

    /// Sets the configuration file's text.
    #[must_use]
    pub fn config(mut self, text: impl Into<String>) -> Self {
        self.config = Some(text.into());
        self
    }

    /// Sets the data directory.
    #[must_use]
    pub fn data(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data = Some(dir.into());
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Makes it a replica of a cluster.
    #[must_use]
    pub fn storage(mut self, storage: &Storage) -> Self {
        self.storage = Some(storage.clone());
        self
    }

    /// Starts the server and waits until it serves.
    ///
    /// # Errors
    /// With its log when it ends or says nothing in time.
    pub fn start(&self) -> Result<Server, String> {
        let scratch = Scratch::new();
        let data = self.data.clone().unwrap_or_else(|| scratch.join("data"));
        let storage = self.place(&data);
        let (child, url) = self.launch(&scratch, &data, storage.as_ref())?;
        let log = scratch.join("server.log");
        Ok(Server {
            url,
            storage,
            child: Some(child),
            options: self.clone(),
            data,
            log,
            scratch,
        })
    }

    /// Where its server keeps what it has, when that is no data directory.
    fn place(&self, data: &Path) -> Option<Storage> {
        match &self.storage {
            Some(storage) => Some(storage.clone()),
            None => Storage::of_this_run(data),
        }
    }

    fn launch(
        &self,
        scratch: &Scratch,
        data: &Path,
        storage: Option<&Storage>,
    ) -> Result<(Child, String), String> {
        let ready = scratch.join("ready");
        drop(std::fs::remove_file(&ready));
        let mut words: Vec<String> = self.wrapper.clone();
        words.push(self.program.display().to_string());
        let mut run = Run::new(words.remove(0))
            .args(words)
            .args(["serve", "--listen"]);
        run = run
            .arg(format!("127.0.0.1:{}", self.port))
            .arg("--data")
            .arg(data)
            .arg("--ready-file")
            .arg(&ready);
        if let Some(text) = &self.config {
            run = run.arg("--config").arg(scratch.write("config.yaml", text));
        }
        for (key, value) in &self.env {
            run = run.env(key, value);
        }
        for (key, value) in storage.into_iter().flat_map(Storage::environment) {
            run = run.env(key, value);
        }
        let mut child = run.spawn(&scratch.join("server.log"));
        let start = Instant::now();
        loop {
            // The file appears whole, by a rename.
            if let Ok(url) = std::fs::read_to_string(&ready) {
                return Ok((child, url.trim().trim_end_matches('/').to_owned()));
            }
            let ended = child.try_wait().expect("a child can be waited for");
            if ended.is_some() || start.elapsed() > PATIENCE {
                drop(child.kill());
                drop(child.wait());
                let said = std::fs::read_to_string(scratch.join("server.log")).unwrap_or_default();
                return Err(format!("`{run}` did not start ({ended:?})\n{said}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A running server. It is killed when this value goes.
#[derive(Debug)]
pub struct Server {
    url: String,
    child: Option<Child>,
    options: Options,
    data: PathBuf,
    storage: Option<Storage>,
    log: PathBuf,
    scratch: Scratch,
}

impl Server {
    /// Starts the program under test with no configuration: everyone on this machine may read and write.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start() -> Self {
        Self::with(&Options::new(tools::program()))
    }

    /// Starts a server with options.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with(options: &Options) -> Self {
        options.start().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Its address, as `http://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its address as it stands in a reference, `127.0.0.1:PORT`.
    pub fn host(&self) -> &str {
        self.url.trim_start_matches("http://").trim_end_matches('/')
    }

    /// Its port.
    ///
    /// # Panics
    /// When the address has none.
    pub fn port(&self) -> u16 {
        let port = self
            .host()
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        port.unwrap_or_else(|| panic!("`{}` has no port", self.url))
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Where it keeps what it has, when that is not its data directory.
    pub fn storage(&self) -> Option<&Storage> {
        self.storage.as_ref()
    }

    /// A directory that goes with it.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it does not run any more.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends one request to `path`.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> http::Response {
        http::request(method, &format!("{}{path}", self.url), headers, body)
    }

    /// Gets `path`.
    pub fn get(&self, path: &str) -> http::Response {
        http::get(&format!("{}{path}", self.url))
    }

    /// Kills it at once (SIGKILL), as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself, which is as good.
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When it does not in a minute.
    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        let mut child = self.child.take().expect("the server runs");
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            if start.elapsed() > PATIENCE {
                drop(child.kill());
                panic!("the server did not end\n{}", self.logged());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Asks it to end (SIGTERM) and waits until it did.
    pub fn stop(&mut self) -> ExitStatus {
        signal(self.pid(), Signal::TERM);
        self.wait()
    }

    /// Starts it again on the same data directory and the same port, so that clients find it.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.kill();
        self.options.port = self.port();
        self.storage = self.options.place(&self.data);
        let (child, url) = self
            .options
            .launch(&self.scratch, &self.data, self.storage.as_ref())
            .unwrap_or_else(|error| panic!("{error}"));
        self.child = Some(child);
        self.url = url;
    }

    /// The options that the next [`restart`](Self::restart) starts with.
    pub fn options(&mut self) -> &mut Options {
        &mut self.options
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("the server said:\n{}", self.logged());
        }
    }
}

/// Sends a signal to a process that this test started.
///
/// # Panics
/// When the id is not one.
pub fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id is positive");
    // It may have ended already.
    let _ = rustix::process::kill_process(pid, signal);
}

/// A port of the loopback address that is free now.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener
        .local_addr()
        .expect("a listener has an address")
        .port()
}
