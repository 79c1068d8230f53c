//! The agent's side of the socket.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use oci::Reference;
use oci::reference::TagOrDigest;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Refusal, RefusalKind, Request, Response, TargetStatus};
use crate::attempt;
use crate::runner::source::chain;
use crate::runner::{Handle, Message, refusal, report};
use crate::target::Target;

/// The targets that run, by name, as the socket sees them.
#[derive(Clone)]
pub struct Directory {
    targets: Arc<RwLock<BTreeMap<String, Entry>>>,
    /// Counts changes of the set itself.
    generation: Arc<watch::Sender<u64>>,
    reload: mpsc::Sender<oneshot::Sender<Result<String, Refusal>>>,
}

/// A target that runs.
#[derive(Clone)]
pub struct Entry {
    /// What it is.
    pub target: Arc<Target>,
    /// How it is reached.
    pub handle: Handle,
}

impl Directory {
    /// An empty one; `reload` takes wishes to read the configuration again.
    pub fn new(reload: mpsc::Sender<oneshot::Sender<Result<String, Refusal>>>) -> Self {
        Self {
            targets: Arc::default(),
            generation: Arc::new(watch::channel(0).0),
            reload,
        }
    }

    /// Replaces the whole set.
    pub fn replace(&self, targets: BTreeMap<String, Entry>) {
        *self.targets.write().unwrap_or_else(PoisonError::into_inner) = targets;
        self.generation.send_modify(|generation| *generation += 1);
    }

    fn find(&self, name: &str) -> Result<Entry, Refusal> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets.get(name).cloned().ok_or_else(|| {
            let known: Vec<&str> = targets.keys().map(String::as_str).collect();
            let message = match crate::target::nearest(name, &known) {
                Some(near) => format!("there is no target `{name}`; did you mean `{near}`?"),
                None if known.is_empty() => format!("there is no target `{name}`: this agent has none yet; add it to its configuration"),
                None => format!("there is no target `{name}`; this agent has `{}`", known.join("`, `")),
            };
            refusal(RefusalKind::UnknownTarget, message)
        })
    }

    fn select(&self, name: Option<&str>) -> Result<Vec<Entry>, Refusal> {
        match name {
            Some(name) => Ok(vec![self.find(name)?]),
            None => Ok(self
                .targets
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .cloned()
                .collect()),
        }
    }

    fn statuses(&self, name: Option<&str>) -> Result<Vec<TargetStatus>, Refusal> {
        Ok(self
            .select(name)?
            .iter()
            .map(|entry| entry.handle.status.borrow().clone())
            .collect())
    }
}

/// Makes the socket, of mode 0600 from its first moment. A socket that nobody answers at any more is replaced.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when another agent answers there; else what the file system says.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => {
            use std::os::unix::fs::FileTypeExt as _;
            if !metadata.file_type().is_socket() {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "something that is no socket is there; move it away",
                ));
            }
            if UnixStream::connect(path).await.is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Made under another name and renamed, so that there is no moment at which others may connect.
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Answers until `shutdown` is cancelled, then until every answer that was begun has ended.
pub async fn serve(listener: UnixListener, directory: Directory, shutdown: CancellationToken) {
    let tasks = TaskTracker::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let directory = directory.clone();
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                result = converse(stream, &directory) => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "a control connection broke");
                    }
                }
            }
            drop(place);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn converse(stream: UnixStream, directory: &Directory) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut read)
            .take(LONGEST_REQUEST)
            .read_until(b'\n', &mut line)
            .await?
            == 0
        {
            return Ok(());
        }
        let request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!(
                    "the request is not understood ({error}); is the caller of the same version as the agent?"
                );
                return send(
                    &mut write,
                    &Response::Error(refusal(RefusalKind::Invalid, message)),
                )
                .await;
            }
        };
        if let Request::Watch { target } = request {
            let mut hang_up = [0];
            return tokio::select! {
                watched = watch_targets(&mut write, directory, target.as_deref()) => watched,
                _ = read.read(&mut hang_up) => Ok(()),
            };
        }
        // An order goes on when its caller hangs up; only the answer is lost.
        let response = answer(directory, request)
            .await
            .unwrap_or_else(Response::Error);
        send(&mut write, &response).await?;
    }
}

async fn send(write: &mut OwnedWriteHalf, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response).map_err(io::Error::other)?;
    line.push(b'\n');
    write.write_all(&line).await
}

async fn watch_targets(
    write: &mut OwnedWriteHalf,
    directory: &Directory,
    target: Option<&str>,
) -> io::Result<()> {
    let mut generation = directory.generation.subscribe();
    loop {
        generation.borrow_and_update();
        let entries = match directory.select(target) {
            Ok(entries) => entries,
            Err(refusal) => return send(write, &Response::Error(refusal)).await,
        };
        let mut receivers: Vec<_> = entries
            .into_iter()
            .map(|entry| entry.handle.status)
            .collect();
        loop {
            let statuses = receivers
                .iter_mut()
                .map(|status| status.borrow_and_update().clone())
                .collect();
            send(write, &Response::Status(statuses)).await?;
            let changed = async {
                if receivers.is_empty() {
                    return std::future::pending().await;
                }
                let waits = receivers
                    .iter_mut()
                    .map(|status| Box::pin(status.changed()));
                futures_util::future::select_all(waits).await.0
            };
            tokio::select! {
                result = changed => if result.is_err() {
                    // The target was removed; the set changes in a moment.
                    let _ = generation.changed().await;
                    break;
                },
                result = generation.changed() => {
                    if result.is_err() { return Ok(()); }
                    break;
                }
            }
        }
    }
}

async fn answer(directory: &Directory, request: Request) -> Result<Response, Refusal> {
    match request {
        Request::Status { target } => Ok(Response::Status(directory.statuses(target.as_deref())?)),
        Request::History { target, limit } => {
            let ledger = directory.find(&target)?.handle.paths.ledger();
            let history = blocking(move || attempt::history(&ledger, limit)).await?;
            history
                .map(Response::History)
                .map_err(|error| refusal(RefusalKind::Unavailable, chain(&error)))
        }
        Request::Plan { target, reference } => {
            let entry = directory.find(&target)?;
            let reference = inside(&entry.target, reference.as_deref())?;
            let report = ask(&entry, |reply| Message::Plan(reference, reply)).await??;
            Ok(Response::Plan(Box::new(report)))
        }
        Request::Deploy {
            target,
            reference,
            wait,
        } => {
            let entry = directory.find(&target)?;
            let reference = inside(&entry.target, reference.as_deref())?;
            let attempt = ask(&entry, |reply| Message::Deploy(reference, reply)).await??;
            settled(entry, attempt, wait).await
        }
        Request::Rollback { target, wait } => {
            let entry = directory.find(&target)?;
            let attempt = ask(&entry, Message::RollBack).await??;
            settled(entry, attempt, wait).await
        }
        Request::Explain { target } => {
            let entry = directory.find(&target)?;
            let status = entry.handle.status.borrow().clone();
            let explanation =
                blocking(move || report::explain(&entry.target, status, &entry.handle.paths))
                    .await?;
            Ok(Response::Explain(Box::new(explanation)))
        }
        Request::Unquarantine { target, digest } => {
            let entry = directory.find(&target)?;
            ask(&entry, |reply| Message::Unquarantine(digest, reply)).await??;
            Ok(Response::Status(vec![entry.handle.status.borrow().clone()]))
        }
        Request::Reload => {
            let (reply, answer) = oneshot::channel();
            directory.reload.send(reply).await.map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?.map(Response::Done)
        }
        Request::Watch { .. } => Err(refusal(
            RefusalKind::Invalid,
            "a watch has its own connection".to_owned(),
        )),
    }
}

fn ask<T>(
    entry: &Entry,
    message: impl FnOnce(oneshot::Sender<T>) -> Message,
) -> impl Future<Output = Result<T, Refusal>> {
    let (reply, answer) = oneshot::channel();
    let message = message(reply);
    async move {
        entry
            .handle
            .mailbox
            .send(message)
            .await
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }
}

async fn settled(entry: Entry, attempt: u64, wait: bool) -> Result<Response, Refusal> {
    let mut status = entry.handle.status;
    if wait {
        let done = |status: &TargetStatus| {
            status.attempt > attempt || status.attempt == attempt && status.settled
        };
        status.wait_for(done).await.map_err(|_| stopping())?;
    }
    let status = status.borrow().clone();
    Ok(Response::Status(vec![status]))
}

/// What a person names is a tag or a digest of the target's own repository, never another one.
fn inside(target: &Target, reference: Option<&str>) -> Result<Option<TagOrDigest>, Refusal> {
    let Some(text) = reference else {
        return Ok(None);
    };
    let invalid = |message: String| refusal(RefusalKind::Invalid, message);
    if !text.contains('/') {
        return text
            .parse()
            .map(Some)
            .map_err(|error| invalid(format!("`{text}` is no tag, digest or reference: {error}")));
    }
    let reference: Reference = text
        .parse()
        .map_err(|error| invalid(format!("`{text}` is no reference: {error}")))?;
    if reference.host != target.reference.host
        || reference.repository != target.reference.repository
    {
        return Err(invalid(format!(
            "target `{}` takes releases of `{}/{}` alone; to follow another repository, change its configuration",
            target.name, target.reference.host, target.reference.repository
        )));
    }
    Ok(Some(reference.tag_or_digest()))
}

fn stopping() -> Refusal {
    refusal(
        RefusalKind::Unavailable,
        "the agent is stopping, or the target was removed".to_owned(),
    )
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| stopping())
}

const CONNECTIONS: usize = 64;
const LONGEST_REQUEST: u64 = 64 * 1024;
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
