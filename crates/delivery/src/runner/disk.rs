//! What a target keeps on the disk: its state, its releases, its lock.
//!
//! ```text
//! <state>/targets/<name>/lock           held by the agent that runs the target
//!                        state.json     the machine's state, replaced whole
//!                        attempts.jsonl the ledger
//!                        reported.json  how far the registry was told of it
//!                        releases/      <algorithm>-<hex>/ (immutable) and <algorithm>-<hex>.json (its configuration)
//!                        staging/       downloads that are not whole yet
//!                        engine/        the engine's own
//! <state>/data/<name>/                   the target's persistent data, `LONGSHORE_DATA`
//! ```

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use oci::Digest;
use serde::{Deserialize, Serialize};

use super::RunnerError;
use crate::machine::{self, State};
use crate::release::ReleaseConfig;

/// Where a target's things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `<state>/targets/<name>`.
    pub root: PathBuf,
    /// `<state>/data/<name>`.
    pub data: PathBuf,
}

impl Paths {
    /// Those of one target below the agent's state directory.
    pub fn new(state: &Path, target: &str) -> Self {
        Self {
            root: state.join("targets").join(target),
            data: state.join("data").join(target),
        }
    }

    /// The ledger.
    pub fn ledger(&self) -> PathBuf {
        self.root.join("attempts.jsonl")
    }

    /// The files of a release.
    pub fn release(&self, digest: &Digest) -> PathBuf {
        self.releases().join(name(digest))
    }

    /// Where a release is downloaded to.
    pub fn staging(&self, digest: &Digest) -> PathBuf {
        self.root.join("staging").join(name(digest))
    }

    fn releases(&self) -> PathBuf {
        self.root.join("releases")
    }

    fn about(&self, digest: &Digest) -> PathBuf {
        self.releases().join(format!("{}.json", name(digest)))
    }

    fn state(&self) -> PathBuf {
        self.root.join("state.json")
    }

    /// Makes the directories. They can be entered by all, because what is served out of a release may be another user's work;
    /// the files with state in them are the agent's alone.
    ///
    /// # Errors
    /// With the path that cannot be made.
    pub fn create(&self) -> Result<(), RunnerError> {
        for directory in [
            &self.root,
            &self.releases(),
            &self.root.join("staging"),
            &self.root.join("engine"),
            &self.data,
        ] {
            let made = !directory.exists();
            std::fs::create_dir_all(directory)
                .and_then(|()| {
                    if made {
                        std::fs::set_permissions(directory, Permissions::from_mode(0o755))?;
                        sync_directory(directory.parent().unwrap_or(directory))?;
                    }
                    Ok(())
                })
                .map_err(io_error("create", directory))?;
        }
        Ok(())
    }

    /// Takes the target's lock, or says that another agent has it.
    ///
    /// # Errors
    /// [`RunnerError::Locked`], or when the file cannot be made.
    pub fn lock(&self) -> Result<File, RunnerError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RunnerError::Locked(path)),
            Err(error) => Err(io_error("lock", &path)(error.into())),
        }
    }

    /// Reads the state; a target without one is new.
    ///
    /// # Errors
    /// [`RunnerError::Newer`] for a state of a newer program, [`RunnerError::Damaged`] for one that is not understood.
    pub fn load(&self) -> Result<State, RunnerError> {
        let path = self.state();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let damaged = |source| RunnerError::Damaged {
            path: path.clone(),
            source,
        };
        let versioned: Versioned = serde_json::from_slice(&bytes).map_err(damaged)?;
        if versioned.version > machine::VERSION {
            return Err(RunnerError::Newer {
                path,
                version: versioned.version,
            });
        }
        serde_json::from_slice(&bytes).map_err(damaged)
    }

    /// Replaces the state durably: it is the old one or the new one, whole, whatever happens in between.
    ///
    /// # Errors
    /// When the disk is full or fails; the old state is then still there.
    pub fn save(&self, state: &State) -> Result<(), RunnerError> {
        let bytes = serde_json::to_vec(state)
            .map_err(|error| io_error("write", &self.state())(error.into()))?;
        replace(&self.state(), &bytes)
    }

    /// How far the ledger was sent; what cannot be read counts as nothing, the registry knows it too.
    pub fn load_shipped(&self) -> Option<Shipped> {
        let bytes = std::fs::read(self.shipped()).ok()?;
        serde_json::from_slice(&bytes)
            .ok()
            .filter(|shipped: &Shipped| shipped.version == Shipped::VERSION)
    }

    /// Writes down how far the ledger was sent.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn save_shipped(&self, shipped: &Shipped) -> Result<(), RunnerError> {
        let path = self.shipped();
        let bytes =
            serde_json::to_vec(shipped).map_err(|error| io_error("write", &path)(error.into()))?;
        replace(&path, &bytes)
    }

    fn shipped(&self) -> PathBuf {
        self.root.join("reported.json")
    }

    /// Removes what is there of one download.
    pub fn discard(&self, digest: &Digest) {
        remove(&self.staging(digest));
    }

    /// Removes what is left of downloads, except that of `kept`.
    pub fn clear_staging(&self, kept: Option<&Digest>) {
        let kept = kept.map(name);
        let Ok(entries) = std::fs::read_dir(self.root.join("staging")) else {
            return;
        };
        for entry in entries.flatten() {
            if kept.as_deref().is_none_or(|kept| entry.file_name() != kept) {
                remove(&entry.path());
            }
        }
    }

    /// Removes the files of every release that is not in `kept` (digests as text).
    pub fn clear_releases(&self, kept: &BTreeSet<String>) {
        let kept: BTreeSet<String> = kept
            .iter()
            .map(|digest| digest.replacen(':', "-", 1))
            .collect();
        let Ok(entries) = std::fs::read_dir(self.releases()) else {
            return;
        };
        for entry in entries.flatten() {
            let file_name = entry.file_name();
            let file_name = file_name.to_string_lossy();
            if !kept.contains(file_name.strip_suffix(".json").unwrap_or(&file_name)) {
                remove(&entry.path());
            }
        }
    }

    /// The configuration of a release whose files are here, whole.
    pub fn kept(&self, digest: &Digest) -> Option<Kept> {
        if !self.release(digest).is_dir() {
            return None;
        }
        let bytes = std::fs::read(self.about(digest)).ok()?;
        serde_json::from_slice(&bytes)
            .ok()
            .filter(|kept: &Kept| kept.version == KEPT_VERSION)
    }

    /// Writes down a release's configuration, before its files are extracted: files without it do not count.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn keep(&self, digest: &Digest, kept: &Kept) -> Result<(), RunnerError> {
        let path = self.about(digest);
        let bytes =
            serde_json::to_vec(kept).map_err(|error| io_error("write", &path)(error.into()))?;
        replace(&path, &bytes)
    }
}

/// How far a ledger was sent to a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shipped {
    /// Version of this form.
    pub version: u32,
    /// The registry.
    pub host: String,
    /// As whom.
    pub holder: String,
    /// The hash of the last record that was sent; empty before the first.
    pub hash: String,
    /// Where that record begins, in bytes.
    pub begin: u64,
    /// Where it ends.
    pub end: u64,
}

impl Shipped {
    /// The present version.
    pub const VERSION: u32 = 1;
}

/// What is kept of a release beside its files, so that going back to it needs no registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Version of this form.
    pub version: u32,
    /// The release's configuration.
    pub config: ReleaseConfig,
    /// The format it was read as.
    pub format: String,
}

impl Kept {
    /// With the present version.
    pub fn new(config: ReleaseConfig, format: String) -> Self {
        Self {
            version: KEPT_VERSION,
            config,
            format,
        }
    }
}

fn name(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm(), digest.hex())
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), RunnerError> {
    let temporary = path.with_extension("tmp");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        sync_directory(path.parent().unwrap_or(path))
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        io_error("write", path)(error)
    })
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn remove(path: &Path) {
    let removed = if path.is_dir() && !path.is_symlink() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "cannot remove what is no longer needed");
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> RunnerError {
    let path = path.to_owned();
    move |source| RunnerError::Io {
        operation,
        path: path.clone(),
        source,
    }
}

const KEPT_VERSION: u32 = 1;
