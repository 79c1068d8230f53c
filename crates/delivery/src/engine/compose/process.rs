//! Runs the Compose plugin: a clean environment, bounded output, our own timeout, and the whole process group goes when it must.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// The program that answers to `compose` commands.
#[derive(Clone, Debug)]
pub(super) struct Plugin {
    /// `docker`, or the plugin itself.
    pub(super) program: PathBuf,
    /// The engine, as `DOCKER_HOST` says it.
    pub(super) host: String,
}

/// One run of the plugin.
pub(super) struct Run<'a> {
    /// Arguments after `compose`.
    pub(super) arguments: Vec<OsString>,
    /// The deployment's variables. They are handed over here and nowhere else: an argument or a file can be read by others.
    pub(super) variables: &'a BTreeMap<String, String>,
    /// The working directory.
    pub(super) directory: &'a Path,
    /// What standard input holds.
    pub(super) input: Vec<u8>,
    /// Where standard output goes.
    pub(super) output: Output,
    /// How long it may take.
    pub(super) timeout: Duration,
}

/// Where standard output goes.
pub(super) enum Output {
    /// Into memory, bounded.
    Capture,
    /// Into a file that stays open as long as any process of the run lives.
    File(File),
}

/// A run that came to its end.
#[derive(Debug)]
pub(super) struct Finished {
    /// It exited with 0.
    pub(super) success: bool,
    /// How it ended, for people: `exit status: 1`.
    pub(super) status: String,
    /// The whole of standard output, empty where it went into a file.
    pub(super) stdout: Vec<u8>,
    /// The end of standard error. May hold secrets: redact before it goes anywhere.
    pub(super) stderr: String,
}

/// Why a run has no end of its own.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    /// The program does not start.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A pipe broke.
    #[error("cannot talk to `docker compose`: {0}")]
    Pipe(#[from] io::Error),
    /// It took too long and was ended.
    #[error("it did not end within {} s and was stopped", .timeout.as_secs())]
    TimedOut {
        /// The limit.
        timeout: Duration,
        /// The end of standard error.
        stderr: String,
    },
    /// It printed too much.
    #[error("it printed more than {} MiB", STDOUT_LIMIT / 1024 / 1024)]
    TooMuch,
}

impl Plugin {
    /// Runs the plugin to its end.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the process group is killed.
    pub(super) async fn run(&self, run: Run<'_>) -> Result<Finished, RunError> {
        let Run {
            arguments,
            variables,
            directory,
            input,
            output,
            timeout,
        } = run;
        let mut command = self.command(&arguments, variables);
        command
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        match output {
            Output::Capture => command.stdout(Stdio::piped()),
            Output::File(file) => command.stdout(file),
        };
        let child = command.spawn().map_err(|source| RunError::Start {
            program: self.program.clone(),
            source,
        })?;
        // The command holds the file behind standard output open, too.
        drop(command);
        let mut group = Group::new(child);
        let mut stdin = group.child.stdin.take();
        let stdout = group.child.stdout.take();
        let stderr = group.child.stderr.take();

        let mut tail = Tail::default();
        let outcome = {
            let talk = async {
                let write = async move {
                    if let Some(mut stdin) = stdin.take() {
                        match stdin.write_all(&input).await {
                            // A program that ends early says why on standard error.
                            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                                return Err(RunError::Pipe(error));
                            }
                            _ => {}
                        }
                    }
                    Ok(())
                };
                let (written, stdout, stderr) =
                    tokio::join!(write, capture(stdout), tail.follow(stderr));
                written?;
                stderr?;
                let stdout = stdout?;
                let status = group.child.wait().await?;
                Ok::<_, RunError>((status, stdout))
            };
            tokio::time::timeout(timeout, talk).await
        };
        match outcome {
            Ok(Ok((status, stdout))) => {
                group.ended();
                Ok(Finished {
                    success: status.success(),
                    status: status.to_string(),
                    stdout,
                    stderr: tail.into_text(),
                })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                group.stop().await;
                Err(RunError::TimedOut {
                    timeout,
                    stderr: tail.into_text(),
                })
            }
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an engine is where processes are started"
    )]
    fn command(&self, arguments: &[OsString], variables: &BTreeMap<String, String>) -> Command {
        let mut command = Command::new(&self.program);
        if !self.is_plugin() {
            command.arg("compose");
        }
        command
            .args(arguments)
            .env_clear()
            .process_group(0)
            .kill_on_drop(true);
        for (name, value) in std::env::vars_os() {
            let text = name.to_string_lossy();
            // A context would override the host; everything else named `DOCKER_*` is how the administrator set the client up.
            if text == "PATH"
                || text == "HOME"
                || text.starts_with("DOCKER_") && text != "DOCKER_CONTEXT"
            {
                command.env(&name, value);
            }
        }
        command.envs(variables);
        command.env("DOCKER_HOST", &self.host);
        // Nothing that was not verified is fetched.
        command
            .env("COMPOSE_EXPERIMENTAL_GIT_REMOTE", "false")
            .env("COMPOSE_EXPERIMENTAL_OCI_REMOTE", "false");
        command.env("COMPOSE_MENU", "false").env("NO_COLOR", "1");
        command
    }

    /// Whether the program is the plugin itself, which takes its commands directly.
    fn is_plugin(&self) -> bool {
        self.program
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("docker-compose"))
    }
}

/// A variable of this name would change how the plugin itself runs, not what it resolves.
pub(super) fn reserved(name: &str) -> bool {
    name == "PATH"
        || name == "HOME"
        || ["DOCKER_", "COMPOSE_", "LD_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        || ["GODEBUG", "GOTRACEBACK", "GOMAXPROCS"].contains(&name)
}

/// A child with its process group, killed when it is dropped.
struct Group {
    child: Child,
    id: Option<Pid>,
}

impl Group {
    fn new(child: Child) -> Self {
        let id = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        Self { child, id }
    }

    /// The leader was waited for: its number may belong to someone else from now on.
    fn ended(&mut self) {
        self.id = None;
    }

    /// Asks the group to end, and makes it after a while.
    async fn stop(&mut self) {
        if let Some(id) = self.id {
            let _ = kill_process_group(id, Signal::TERM);
            if tokio::time::timeout(GRACE, self.child.wait()).await.is_ok() {
                // The leader is gone. What is left of the group is killed; while any member lives, the group's number is not used again.
                let _ = kill_process_group(id, Signal::KILL);
                self.id = None;
            } else {
                let _ = kill_process_group(id, Signal::KILL);
                let _ = self.child.wait().await;
                self.id = None;
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let _ = kill_process_group(id, Signal::KILL);
        }
    }
}

async fn capture(stream: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, RunError> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream
            .take(STDOUT_LIMIT + 1)
            .read_to_end(&mut bytes)
            .await?;
        if bytes.len() as u64 > STDOUT_LIMIT {
            return Err(RunError::TooMuch);
        }
    }
    Ok(bytes)
}

/// The end of a stream.
#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    async fn follow(&mut self, stream: Option<impl AsyncRead + Unpin>) -> Result<(), RunError> {
        let Some(mut stream) = stream else {
            return Ok(());
        };
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let count = stream.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            self.bytes.extend_from_slice(&buffer[..count]);
            if self.bytes.len() > 2 * STDERR_LIMIT {
                self.bytes.drain(..self.bytes.len() - STDERR_LIMIT);
            }
        }
    }

    fn into_text(self) -> String {
        let from = self.bytes.len().saturating_sub(STDERR_LIMIT);
        String::from_utf8_lossy(&self.bytes[from..]).into_owned()
    }
}

/// A resolved project is a few KiB.
const STDOUT_LIMIT: u64 = 32 * 1024 * 1024;
const STDERR_LIMIT: usize = 64 * 1024;
/// Compose stops what it has begun when it is asked to.
const GRACE: Duration = Duration::from_secs(10);

#[cfg(test)]
pub(super) mod tests;
