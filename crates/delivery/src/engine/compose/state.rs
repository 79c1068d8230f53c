//! The engine's own directory below a target's state: content, what uses it, the record, the lock.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::content::{self, ContentError, Name};
use super::record::Record;
use super::rewrite::Resolved;
use crate::engine::EngineError;

/// The engine's own directory below a target's state.
pub(super) struct Paths {
    pub(super) content: PathBuf,
    pub(super) uses: PathBuf,
    pub(super) record: PathBuf,
    pub(super) lock: PathBuf,
    pub(super) project: PathBuf,
}

impl Paths {
    pub(super) fn below(state: &Path) -> Self {
        let engine = state.join("engine");
        Self {
            content: engine.join("content"),
            uses: engine.join("uses"),
            record: engine.join("applied.json"),
            lock: engine.join("lock"),
            project: engine.join("project"),
        }
    }

    pub(super) fn make(&self) -> Result<(), ContentError> {
        [&self.content, &self.uses, &self.project]
            .into_iter()
            .try_for_each(|path| content::make_directory(path))
    }
}

/// Content, data directories and the record, in the order that a kill between any two of them forgives.
pub(super) fn prepare(
    resolved: &Resolved,
    paths: &Paths,
    used: &str,
    record: &Record,
) -> Result<(), ContentError> {
    paths.make()?;
    record.write(&paths.record)?;
    // What a release uses is written down before it is placed, so that sweeping never meets content that nobody claims.
    let uses = paths.uses.join(used);
    let mut names = read_uses(&uses)?;
    names.extend(resolved.contents.iter().map(|content| content.name.clone()));
    let mut text = String::new();
    for name in &names {
        text.push_str(name.as_str());
        text.push('\n');
    }
    content::write_durably(&uses, text.as_bytes())?;
    for content in &resolved.contents {
        content::place(&paths.content, content)?;
    }
    for directory in resolved.data.iter().filter(|directory| !directory.exists()) {
        content::make_directory(directory)?;
    }
    Ok(())
}

/// Removes content, and lists of content, that neither a kept release nor a container uses.
pub(super) fn sweep(
    paths: &Paths,
    digests: &BTreeSet<String>,
    mounted: &[String],
) -> Result<(), ContentError> {
    let mut kept = BTreeSet::new();
    for digest in digests {
        kept.extend(read_uses(&paths.uses.join(digest))?);
    }
    kept.extend(
        mounted
            .iter()
            .filter_map(|path| {
                Path::new(path)
                    .strip_prefix(&paths.content)
                    .ok()?
                    .iter()
                    .next()?
                    .to_str()
            })
            .filter_map(Name::parse),
    );
    content::sweep(&paths.content, &kept)?;
    for entry in std::fs::read_dir(&paths.uses)
        .into_iter()
        .flatten()
        .flatten()
    {
        if !digests.contains(&*entry.file_name().to_string_lossy()) {
            let path = entry.path();
            std::fs::remove_file(&path).map_err(|source| ContentError::Io {
                operation: "remove",
                path,
                source,
            })?;
        }
    }
    Ok(())
}

fn read_uses(path: &Path) -> Result<BTreeSet<Name>, ContentError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(Name::parse).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(source) => Err(ContentError::Io {
            operation: "read",
            path: path.to_owned(),
            source,
        }),
    }
}

pub(super) async fn read_record(path: &Path) -> Result<Record, EngineError> {
    let path = path.to_owned();
    let record = blocking(move || Record::read(&path).map_err(EngineError::Unavailable)).await?;
    if let Some(record) = record {
        return Ok(record);
    }
    let mut salt = [0; 16];
    getrandom::fill(&mut salt)
        .map_err(|error| EngineError::Unavailable(format!("no randomness: {error}")))?;
    Ok(Record::new(&salt))
}

/// Takes the lock of a target's engine directory. A run of Compose that outlived its agent holds it until it ends.
pub(super) async fn lock_file(paths: Paths, patience: Duration) -> Result<File, EngineError> {
    let path = paths.lock.clone();
    let file = blocking(move || {
        paths.make().map_err(|error| unavailable(&error))?;
        let open = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&paths.lock);
        let file = open.map_err(|error| {
            EngineError::Unavailable(format!("cannot open `{}`: {error}", paths.lock.display()))
        })?;
        Ok(file)
    })
    .await?;
    let wait = async {
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK) => tokio::time::sleep(LOCK_INTERVAL).await,
                Err(error) => {
                    return Err(EngineError::Unavailable(format!(
                        "cannot lock `{}`: {error}",
                        path.display()
                    )));
                }
            }
        }
    };
    match tokio::time::timeout(patience, wait).await {
        Ok(locked) => locked?,
        Err(_) => {
            return Err(EngineError::Unavailable(format!(
                "another `docker compose up` of this target still runs (it holds `{}`)",
                path.display()
            )));
        }
    }
    // Nothing should have been printed there; what was is of no use.
    let _ = file.set_len(0);
    Ok(file)
}

pub(super) fn unavailable(error: &ContentError) -> EngineError {
    EngineError::Unavailable(error.to_string())
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(EngineError::Unavailable(format!(
                "a task of the engine failed: {error}"
            )))
        })
}

const LOCK_INTERVAL: Duration = Duration::from_millis(100);
