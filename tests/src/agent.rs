//! An agent of the program under test, and what its socket tells.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::server::signal;
use crate::{Run, tools};

/// How long something that an event tells of may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its configuration file.
    pub config: PathBuf,
    /// The socket that the file names.
    pub socket: PathBuf,
    /// The line of the Compose plugin.
    pub compose: String,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Makes every `fsync` take this long, so that no state is too short to be seen.
    pub slow_disk: Option<Duration>,
    /// Where it logs.
    pub log: PathBuf,
}

/// A running agent. It is killed when this value goes.
#[derive(Debug)]
pub struct Agent {
    child: Option<Child>,
    options: Options,
}

impl Agent {
    /// Starts an agent and waits until its socket answers.
    ///
    /// # Panics
    /// With its log when it ends or says nothing in time.
    pub fn start(options: &Options) -> Self {
        let mut words = Vec::new();
        if let Some(slow) = options.slow_disk {
            // `-D`: the tracer is a grandchild, so that the child's id is the agent's.
            words.push(tools::tool("strace").display().to_string());
            words.extend(
                "-D -f --seccomp-bpf -qq -o /dev/null -e signal=none -e trace=fsync,fdatasync -e"
                    .split(' ')
                    .map(str::to_owned),
            );
            words.push(format!(
                "inject=fsync,fdatasync:delay_enter={}",
                slow.as_micros()
            ));
        }
        words.push(tools::program().display().to_string());
        let mut run = Run::new(words.remove(0))
            .args(words)
            .words("agent run --config")
            .arg(&options.config)
            .env("DOCKER_CONFIG", tools::compose(&options.compose))
            .env("PATH", path());
        for (key, value) in &options.env {
            run = run.env(key, value);
        }
        let child = run.spawn(&options.log);
        let mut agent = Self {
            child: Some(child),
            options: options.clone(),
        };
        let start = Instant::now();
        while UnixStream::connect(&options.socket).is_err() {
            let ended = agent
                .child
                .as_mut()
                .and_then(|child| child.try_wait().expect("a child can be waited for"));
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "`{run}` did not start ({ended:?})\n{}",
                agent.logged()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it does not run any more.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.options.log).unwrap_or_default()
    }

    /// Kills it at once (SIGKILL), as a crash would. What it started goes on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Asks it to end (SIGTERM) and waits until it did.
    ///
    /// # Panics
    /// When it does not in time.
    pub fn stop(&mut self) -> ExitStatus {
        signal(self.pid(), Signal::TERM);
        let start = Instant::now();
        let mut child = self.child.take().expect("the agent runs");
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            if start.elapsed() > PATIENCE {
                drop(child.kill());
                panic!("the agent did not end\n{}", self.logged());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The status of its only target.
    pub fn status(&self) -> Value {
        self.wait("a status", |_| true)
    }

    /// Waits until the status of its only target is as `done` wants it; every change is looked at.
    ///
    /// # Panics
    /// With the status and the log when it is not in time.
    pub fn wait(&self, what: &str, mut done: impl FnMut(&Value) -> bool) -> Value {
        let start = Instant::now();
        let mut last = Value::Null;
        let socket = UnixStream::connect(&self.options.socket);
        let Ok(mut socket) = socket else {
            panic!("the agent does not answer\n{}", self.logged());
        };
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("a socket takes a timeout");
        writeln!(socket, "{}", json!({"request": "watch"})).expect("the agent listens");
        for line in BufReader::new(socket).lines() {
            let Ok(line) = line else { break };
            let answer: Value = serde_json::from_str(&line).expect("the agent answers in JSON");
            last = answer["value"][0].clone();
            if done(&last) {
                return last;
            }
            if start.elapsed() > PATIENCE {
                break;
            }
        }
        panic!(
            "no {what}; the last status: {last:#}\nthe agent's log:\n{}",
            self.logged()
        );
    }

    /// Prepares `longshore agent COMMAND` against this agent.
    pub fn command(&self, words: &str) -> Run {
        Run::new(tools::program())
            .args(["agent"])
            .words(words)
            .arg("--socket")
            .arg(&self.options.socket)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.logged());
        }
        self.kill();
    }
}

/// `PATH` with the directory of the tools first.
fn path() -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(tools::directory().join("bin")).chain(std::env::split_paths(&path));
    std::env::join_paths(all).unwrap_or(path.clone())
}

/// The ports on which a process listens for TCP.
///
/// # Panics
/// When the process is gone.
pub fn listening_ports(pid: u32) -> Vec<String> {
    let process = Path::new("/proc").join(pid.to_string());
    let sockets: Vec<String> = std::fs::read_dir(process.join("fd"))
        .expect("the process lives")
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter_map(|link| {
            let link = link.to_string_lossy().into_owned();
            Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    assert!(!sockets.is_empty(), "the process has no socket at all");
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(process.join("net").join(table)).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Local address, state (0A: listening) and inode.
            if let (Some(local), Some(&"0A"), Some(inode)) =
                (fields.get(1), fields.get(3), fields.get(9))
                && sockets.iter().any(|socket| socket == inode)
            {
                ports.push((*local).to_owned());
            }
        }
    }
    ports
}
