//! A program run to its end, with its output kept and a limit on its time.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a program may take when nothing else is said.
const TIMEOUT: Duration = Duration::from_mins(3);

/// A program about to be run.
#[derive(Clone, Debug)]
pub struct Run {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    removed: Vec<OsString>,
    dir: Option<PathBuf>,
    stdin: Vec<u8>,
    timeout: Duration,
}

impl Run {
    /// Prepares `program`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            removed: Vec::new(),
            dir: None,
            stdin: Vec::new(),
            timeout: TIMEOUT,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds the words of `line`, split at blanks: a command as a tutorial prints it.
    #[must_use]
    pub fn words(self, line: &str) -> Self {
        self.args(line.split_whitespace())
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Removes an environment variable.
    #[must_use]
    pub fn without_env(mut self, key: impl AsRef<OsStr>) -> Self {
        self.removed.push(key.as_ref().to_owned());
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = Some(dir.as_ref().to_owned());
        self
    }

    /// Sets what it reads on standard input; else that is empty.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets how long it may take before it is killed, which fails the test.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        for key in &self.removed {
            command.env_remove(key);
        }
        for (key, value) in &self.env {
            command.env(key, value);
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// Starts it with its output going to `log`, and does not wait for it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(&self, log: &Path) -> Child {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", log.display()));
        let second = file.try_clone().expect("a descriptor can be cloned");
        self.command()
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(second)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()))
    }

    /// Runs it to its end, whatever its exit code.
    ///
    /// # Panics
    /// When it cannot be started or takes too long.
    pub fn run(&self) -> Output {
        let mut child = self
            .command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()));
        let stdout = reader(child.stdout.take());
        let stderr = reader(child.stderr.take());
        if let Some(mut input) = child.stdin.take() {
            let bytes = self.stdin.clone();
            // A program that does not read its input closes it; that is its right.
            thread::spawn(move || drop(input.write_all(&bytes)));
        }
        let start = Instant::now();
        let mut late = false;
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if !late && start.elapsed() > self.timeout {
                late = true;
                // Killed by its own handle; the next turn collects it.
                drop(child.kill());
            }
            thread::sleep(Duration::from_millis(5));
        };
        let output = Output {
            line: self.to_string(),
            code: status.code(),
            stdout: stdout.join().expect("the reader does not panic"),
            stderr: stderr.join().expect("the reader does not panic"),
        };
        assert!(
            !late,
            "took longer than {:?} and was killed\n{output}",
            self.timeout
        );
        output
    }

    /// Runs it and wants exit code 0.
    ///
    /// # Panics
    /// With all it said when the code is another.
    pub fn ok(&self) -> Output {
        let output = self.run();
        assert!(output.code == Some(0), "failed\n{output}");
        output
    }

    /// Runs it and wants it to refuse: any exit code but 0, and not a crash.
    ///
    /// # Panics
    /// With all it said when it succeeded, was killed by a signal or panicked.
    pub fn fails(&self) -> Output {
        let output = self.run();
        assert!(
            output.code.is_some_and(|code| code != 0 && code != 101),
            "expected a refusal\n{output}"
        );
        output
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.display())?;
        for arg in &self.args {
            write!(f, " {}", arg.to_string_lossy())?;
        }
        Ok(())
    }
}

/// What a program that ended left.
#[derive(Clone, Debug)]
pub struct Output {
    line: String,
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote on standard output.
    pub stdout: Vec<u8>,
    /// What it wrote on standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, without the white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Both outputs as one text.
    pub fn both(&self) -> String {
        format!(
            "{}\n{}",
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        )
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON: {error}\n{self}"))
    }

    /// Wants `needle` in one of the outputs.
    ///
    /// # Panics
    /// With all it said when it is not there.
    pub fn says(&self, needle: &str) -> &Self {
        assert!(
            self.both().contains(needle),
            "expected it to say `{needle}`\n{self}"
        );
        self
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "$ {}\nexit code: {:?}\nstdout:\n{}\nstderr:\n{}",
            self.line,
            self.code,
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        )
    }
}

fn reader(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // What came before an error is still worth showing.
            drop(source.read_to_end(&mut bytes));
        }
        bytes
    })
}
