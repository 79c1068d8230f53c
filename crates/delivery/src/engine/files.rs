//! The files engine: a symbolic link that points to the release's directory, switched atomically.
//!
//! Whoever reads through the link sees the old release or the new one, whole; never a mixture. The directory that it points
//! to is the extracted release itself, named by its digest and never changed afterwards. An optional command is run after the
//! switch, such as a reload. It knows nothing of registries and touches nothing but its link.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci::Digest;
use tokio::io::AsyncReadExt;

use super::{
    Action, Applied, BoxFuture, Change, Deployment, Engine, EngineError, EngineInfo, Plan, Sample,
    SampleState, ServiceSample,
};
use crate::target::{FilesTarget, Target};

/// The engine. It has no state of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct FilesEngine;

impl FilesEngine {
    /// The engine.
    pub fn new() -> Self {
        Self
    }
}

impl Engine for FilesEngine {
    fn check(&self) -> BoxFuture<'_, Result<EngineInfo, EngineError>> {
        Box::pin(async {
            Ok(EngineInfo {
                description: "files".to_owned(),
            })
        })
    }

    fn plan<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<Plan, EngineError>> {
        let deployment = deployment.clone();
        Box::pin(blocking(move || {
            let files = files_of(&deployment.target)?;
            let link = Link::read(files, &deployment)?;
            let mut plan = Plan::default();
            let old = match &link {
                Link::Absent => None,
                Link::Ours(path) => Some(path.clone()),
                Link::Foreign(what) => {
                    if !deployment.target.adopt {
                        return Err(foreign(files, what));
                    }
                    plan.notes.push(format!(
                        "`{}` is {what} and is taken over",
                        files.path.display()
                    ));
                    None
                }
            };
            let before = match &old {
                Some(directory) => match list(directory) {
                    Ok(entries) => entries,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        plan.notes.push(format!(
                            "`{}` points to a directory that is gone",
                            files.path.display()
                        ));
                        BTreeMap::new()
                    }
                    Err(error) => return Err(unavailable("read", directory, &error)),
                },
                None => BTreeMap::new(),
            };
            let after = list(&deployment.directory)
                .map_err(|error| unavailable("read", &deployment.directory, &error))?;
            plan.changes = compare(&before, &after)?;
            if old.as_deref() != Some(&deployment.directory) {
                plan.changes.insert(
                    0,
                    Change {
                        subject: files.path.display().to_string(),
                        action: if matches!(link, Link::Absent) {
                            Action::Create
                        } else {
                            Action::Recreate
                        },
                        reason: format!("the link is switched to {}", deployment.digest),
                    },
                );
            }
            Ok(plan)
        }))
    }

    fn pull<'a>(&'a self, _deployment: &'a Deployment) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }

    fn apply<'a>(
        &'a self,
        deployment: &'a Deployment,
        _plan: &'a Plan,
    ) -> BoxFuture<'a, Result<Applied, EngineError>> {
        Box::pin(async move {
            let files = files_of(&deployment.target)?.clone();
            let switching = deployment.clone();
            blocking(move || switch(&switching)).await?;
            let mut applied = Applied::default();
            if !files.activate.is_empty() {
                let run = run(&files.activate, deployment, files.activate_timeout).await?;
                if !run.success {
                    let output = if run.output.is_empty() {
                        String::new()
                    } else {
                        format!(": {}", run.output)
                    };
                    return Err(EngineError::Failed(format!(
                        "the activate command `{}` {}{output}",
                        files.activate.join(" "),
                        run.outcome
                    )));
                }
                if !run.output.is_empty() {
                    applied.notes.push(run.output);
                }
            }
            Ok(applied)
        })
    }

    fn observe<'a>(
        &'a self,
        deployment: &'a Deployment,
    ) -> BoxFuture<'a, Result<Sample, EngineError>> {
        Box::pin(async move {
            let looking = deployment.clone();
            let (mut sample, in_place) = blocking(move || {
                let files = files_of(&looking.target)?;
                let link = Link::read(files, &looking)?;
                let fingerprint = match std::fs::symlink_metadata(&files.path) {
                    Ok(metadata) => {
                        format!("{}:{}:{}", metadata.dev(), metadata.ino(), looking.digest)
                    }
                    Err(_) => "absent".to_owned(),
                };
                let (state, detail) = match link {
                    Link::Ours(path) if path == looking.directory && path.is_dir() => {
                        (SampleState::Healthy, "the link is in place".to_owned())
                    }
                    Link::Ours(path) => (
                        SampleState::Failed,
                        format!("the link points to `{}`", path.display()),
                    ),
                    Link::Absent => (SampleState::Failed, "the link is gone".to_owned()),
                    Link::Foreign(what) => (SampleState::Failed, format!("the path is {what} now")),
                };
                let service = ServiceSample {
                    service: files.path.display().to_string(),
                    state,
                    detail,
                };
                Ok((
                    Sample {
                        state,
                        fingerprint,
                        services: vec![service],
                    },
                    state == SampleState::Healthy,
                ))
            })
            .await?;
            let command = &deployment.target.health.command;
            if in_place && !command.is_empty() {
                let run = run(command, deployment, COMMAND_TIMEOUT).await?;
                let state = if run.success {
                    SampleState::Healthy
                } else {
                    SampleState::Pending
                };
                sample.state = state;
                sample.services.push(ServiceSample {
                    service: command.join(" "),
                    state,
                    detail: if run.output.is_empty() {
                        run.outcome
                    } else {
                        format!("{}: {}", run.outcome, run.output)
                    },
                });
            }
            Ok(sample)
        })
    }

    fn clean<'a>(
        &'a self,
        _target: &'a Target,
        _kept: &'a [Deployment],
    ) -> BoxFuture<'a, Result<(), EngineError>> {
        // The directories are the agent's, which removes what no generation needs.
        Box::pin(async { Ok(()) })
    }
}

/// What is at the link's path.
enum Link {
    Absent,
    /// A link into this target's release directories.
    Ours(PathBuf),
    /// Anything else, in words.
    Foreign(String),
}

impl Link {
    fn read(files: &FilesTarget, deployment: &Deployment) -> Result<Self, EngineError> {
        let metadata = match std::fs::symlink_metadata(&files.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Absent),
            Err(error) => return Err(unavailable("look at", &files.path, &error)),
        };
        if metadata.is_dir() {
            return Ok(Self::Foreign("a directory".to_owned()));
        }
        if !metadata.is_symlink() {
            return Ok(Self::Foreign("a file".to_owned()));
        }
        let to = std::fs::read_link(&files.path)
            .map_err(|error| unavailable("read", &files.path, &error))?;
        // All releases of a target lie side by side, so their parent tells whose link it is.
        match (to.parent(), deployment.directory.parent()) {
            (Some(theirs), Some(ours)) if theirs == ours => Ok(Self::Ours(to)),
            _ => Ok(Self::Foreign(format!("a link to `{}`", to.display()))),
        }
    }
}

fn files_of(target: &Target) -> Result<&FilesTarget, EngineError> {
    target.files.as_ref().ok_or_else(|| {
        EngineError::Rejected(format!("target `{}` has no `files.path`", target.name))
    })
}

fn foreign(files: &FilesTarget, what: &str) -> EngineError {
    EngineError::Rejected(format!(
        "`{}` is {what} that this target did not make; move it away, or set `adopt: true` to take over a link or a file",
        files.path.display()
    ))
}

/// Makes the link under a temporary name and renames it over the old one: readers see either, and the directory is synced.
fn switch(deployment: &Deployment) -> Result<(), EngineError> {
    let files = files_of(&deployment.target)?;
    match Link::read(files, deployment)? {
        Link::Ours(path) if path == deployment.directory => return Ok(()),
        Link::Absent | Link::Ours(_) => {}
        Link::Foreign(what) if what == "a directory" => {
            return Err(EngineError::Rejected(format!(
                "`{}` is a directory: a link cannot take its place; move it away",
                files.path.display()
            )));
        }
        Link::Foreign(what) => {
            if !deployment.target.adopt {
                return Err(foreign(files, &what));
            }
        }
    }
    let Some(parent) = files.path.parent() else {
        return Err(EngineError::Rejected(format!(
            "`{}` has no directory",
            files.path.display()
        )));
    };
    std::fs::create_dir_all(parent).map_err(|error| unavailable("create", parent, &error))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(files.path.file_name().unwrap_or_default());
    name.push(format!(".{}.longshore", deployment.target.name));
    let temporary = parent.join(name);
    // A link of that name is left from a switch that was cut off.
    match std::fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unavailable("remove", &temporary, &error)),
    }
    std::os::unix::fs::symlink(&deployment.directory, &temporary)
        .map_err(|error| unavailable("create", &temporary, &error))?;
    std::fs::rename(&temporary, &files.path)
        .map_err(|error| unavailable("switch", &files.path, &error))?;
    std::fs::File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| unavailable("sync", parent, &error))
}

/// What one entry of a release is: enough to tell whether it changed.
type Entries = BTreeMap<PathBuf, Entry>;
struct Entry {
    absolute: PathBuf,
    size: u64,
    mode: u32,
}

/// All files below a directory, by their relative path. Directories show by what is in them.
fn list(directory: &Path) -> io::Result<Entries> {
    let mut entries = Entries::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next)? {
            let entry = entry?;
            let metadata = std::fs::symlink_metadata(entry.path())?;
            if metadata.is_dir() {
                open.push(entry.path());
                continue;
            }
            let absolute = entry.path();
            if let Ok(relative) = absolute.strip_prefix(directory) {
                entries.insert(
                    relative.to_owned(),
                    Entry {
                        size: metadata.len(),
                        mode: metadata.mode() & 0o777,
                        absolute,
                    },
                );
            }
        }
    }
    Ok(entries)
}

fn compare(before: &Entries, after: &Entries) -> Result<Vec<Change>, EngineError> {
    let mut names: Vec<&PathBuf> = before.keys().chain(after.keys()).collect();
    names.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    names.dedup();
    let mut changes = Vec::with_capacity(names.len());
    for name in names {
        let (action, reason) = match (before.get(name), after.get(name)) {
            (None, Some(_)) => (Action::Create, "new in this release".to_owned()),
            (Some(_), None) => (Action::Remove, "not in this release".to_owned()),
            (Some(old), Some(new)) if old.size != new.size => (
                Action::Recreate,
                format!("{} → {} bytes", old.size, new.size),
            ),
            (Some(old), Some(new)) if old.mode != new.mode => (
                Action::Recreate,
                format!("mode {:o} → {:o}", old.mode, new.mode),
            ),
            (Some(old), Some(new)) => {
                let (old_hash, new_hash) = (hash(&old.absolute)?, hash(&new.absolute)?);
                if old_hash == new_hash {
                    (Action::Keep, "unchanged".to_owned())
                } else {
                    (
                        Action::Recreate,
                        format!("content {} → {}", old_hash.short(), new_hash.short()),
                    )
                }
            }
            (None, None) => continue,
        };
        changes.push(Change {
            subject: name.display().to_string(),
            action,
            reason,
        });
    }
    Ok(changes)
}

fn hash(path: &Path) -> Result<Digest, EngineError> {
    let read = || -> io::Result<Digest> {
        let mut file = std::fs::File::open(path)?;
        let mut hasher = oci::Hasher::new(oci::Algorithm::Sha256);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = io::Read::read(&mut file, &mut buffer)?;
            if count == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&buffer[..count]);
        }
    };
    read().map_err(|error| unavailable("read", path, &error))
}

struct Run {
    success: bool,
    /// `exited with 1`, `took longer than 10 s`.
    outcome: String,
    /// The last lines of output.
    output: String,
}

/// Runs a command in the release's directory, with nothing of the agent's environment but a plain `PATH`.
async fn run(
    argv: &[String],
    deployment: &Deployment,
    timeout: Duration,
) -> Result<Run, EngineError> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err(EngineError::Rejected("the command is empty".to_owned()));
    };
    // `./activate` is the release's own: relative to its directory, not to the agent's.
    let path = if program.starts_with("./") || program.contains('/') && !program.starts_with('/') {
        deployment.directory.join(program)
    } else {
        PathBuf::from(program)
    };
    #[expect(clippy::disallowed_methods, reason = "engines start processes")]
    let mut command = tokio::process::Command::new(&path);
    command
        .args(arguments)
        .current_dir(&deployment.directory)
        .env_clear()
        .env("PATH", PATH)
        .envs(&deployment.variables)
        .env("LONGSHORE_TARGET", &deployment.target.name)
        .env("LONGSHORE_RELEASE", &deployment.config.name)
        .env(
            "LONGSHORE_VERSION",
            deployment.config.version.as_deref().unwrap_or_default(),
        )
        .env("LONGSHORE_DIGEST", deployment.digest.to_string())
        .env("LONGSHORE_DIRECTORY", &deployment.directory)
        .env("LONGSHORE_DATA", &deployment.data)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(Run {
                success: false,
                outcome: format!("cannot be started: {error}"),
                output: String::new(),
            });
        }
        Err(error) => return Err(unavailable("start", &path, &error)),
    };
    let group = Group(child.id());
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let ended = tokio::time::timeout(timeout, async {
        // Whoever holds the pipes open after the command ended (a daemon that it left) is not waited for.
        let mut out = Tail::default();
        let mut err = Tail::default();
        let status = {
            let reading = async { tokio::join!(out.read(stdout), err.read(stderr)) };
            tokio::pin!(reading);
            tokio::select! {
                status = child.wait() => {
                    let _ = tokio::time::timeout(DRAIN, &mut reading).await;
                    status
                }
                _ = &mut reading => child.wait().await,
            }
        };
        out.bytes.extend_from_slice(&err.bytes);
        (status, out.text())
    })
    .await;
    match ended {
        Ok((Ok(status), output)) => {
            group.keep();
            Ok(Run {
                success: status.success(),
                outcome: match status.code() {
                    Some(code) => format!("exited with {code}"),
                    None => "was killed by a signal".to_owned(),
                },
                output,
            })
        }
        Ok((Err(error), _)) => Err(unavailable("wait for", &path, &error)),
        Err(_) => {
            drop(group);
            let _ = child.wait().await;
            Ok(Run {
                success: false,
                outcome: format!("took longer than {} s and was ended", timeout.as_secs()),
                output: String::new(),
            })
        }
    }
}

/// Kills a command's whole process group when dropped, so that no part of it outlives its timeout or the agent's stop.
struct Group(Option<u32>);

impl Group {
    /// The command ended by itself; what it left running is meant to run.
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = id.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

/// The end of a stream: it may be endless.
#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    async fn read(&mut self, stream: Option<impl tokio::io::AsyncRead + Unpin>) {
        let Some(mut stream) = stream else { return };
        let mut buffer = [0; 4096];
        while let Ok(count) = stream.read(&mut buffer).await {
            if count == 0 {
                return;
            }
            self.bytes.extend_from_slice(&buffer[..count]);
            let excess = self.bytes.len().saturating_sub(OUTPUT);
            self.bytes.drain(..excess);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim().to_owned()
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| EngineError::Unavailable(format!("the work was cut off: {error}")))?
}

fn unavailable(operation: &str, path: &Path, error: &io::Error) -> EngineError {
    EngineError::Unavailable(crate::runner::source::disk_error(operation, path, error))
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
const DRAIN: Duration = Duration::from_millis(200);
const OUTPUT: usize = 4096;

#[cfg(test)]
mod tests;
