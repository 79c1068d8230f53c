//! Files of a release under paths named by their content, so that only a service whose file changed
//! is recreated. The paths are persistent, because the engine starts containers again after a reboot.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use oci::Digest;
use sha2::{Digest as _, Sha256};

use crate::engine::EngineError;

/// A file or a directory with the hash of everything in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Content {
    hash: String,
    source: PathBuf,
}

impl Content {
    /// Hashes names, modes and bytes.
    pub(super) fn of(source: &Path) -> Result<Self, EngineError> {
        let mut hasher = Sha256::new();
        hash(source, &mut hasher).map_err(|error| failed("read", source, &error))?;
        Ok(Self {
            hash: hex::encode(hasher.finalize()),
            source: source.to_owned(),
        })
    }

    /// Where it lies in a target's state.
    pub(super) fn path(&self, state: &Path) -> PathBuf {
        state.join("engine/content").join(&self.hash)
    }

    /// Copies it there, whole or not at all.
    pub(super) fn materialise(&self, state: &Path) -> Result<(), EngineError> {
        let path = self.path(state);
        if path.exists() {
            return Ok(());
        }
        let parent = state.join("engine/content");
        make_directory(&parent)?;
        let partial = parent.join(format!(".{}.partial", self.hash));
        let copied = remove(&partial)
            .and_then(|()| copy(&self.source, &partial))
            .and_then(|()| fs::rename(&partial, &path))
            .and_then(|()| File::open(&parent)?.sync_all());
        copied.map_err(|error| {
            let _ = remove(&partial);
            failed("write", &path, &error)
        })
    }
}

/// Writes down what a release uses.
pub(super) fn remember(
    state: &Path,
    release: &Digest,
    contents: &BTreeSet<Content>,
) -> Result<(), EngineError> {
    let directory = state.join("engine/uses");
    make_directory(&directory)?;
    let path = directory.join(release.hex());
    let mut text = String::new();
    for content in contents {
        text.push_str(&content.hash);
        text.push('\n');
    }
    let partial = directory.join(format!(".{}.partial", release.hex()));
    let write = || -> io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, &path)?;
        File::open(&directory)?.sync_all()
    };
    write().map_err(|error| failed("write", &path, &error))
}

/// Removes content that no kept release uses.
pub(super) fn clean(state: &Path, kept: &[&Digest]) -> Result<(), EngineError> {
    let kept: BTreeSet<String> = kept.iter().map(|digest| digest.hex()).collect();
    let uses = state.join("engine/uses");
    let contents = state.join("engine/content");
    let work = || -> io::Result<()> {
        let mut needed = BTreeSet::new();
        for name in names(&uses)? {
            let path = uses.join(&name);
            if kept.contains(&name) {
                needed.extend(fs::read_to_string(&path)?.lines().map(str::to_owned));
            } else {
                fs::remove_file(&path)?;
            }
        }
        for name in names(&contents)? {
            if !needed.contains(&name) {
                remove(&contents.join(name))?;
            }
        }
        Ok(())
    };
    work().map_err(|error| failed("clean", &contents, &error))
}

/// Makes a directory with its parents.
pub(super) fn make_directory(path: &Path) -> Result<(), EngineError> {
    fs::create_dir_all(path).map_err(|error| failed("make", path, &error))
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn hash(path: &Path, hasher: &mut Sha256) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_dir() {
        let mut entries = names(path)?;
        entries.sort_unstable();
        hasher.update(b"directory\0");
        for name in entries {
            hasher.update((name.len() as u64).to_be_bytes());
            hasher.update(name.as_bytes());
            hash(&path.join(&name), hasher)?;
        }
        hasher.update(b"end\0");
        return Ok(());
    }
    hasher.update(if is_executable(&metadata) {
        b"program\0" as &[u8]
    } else {
        b"file\0"
    });
    hasher.update(metadata.len().to_be_bytes());
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        hasher.update(buffer.get(..count).unwrap_or_default());
    }
}

/// Copies with the modes of a release, whatever the umask, and syncs.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_dir() {
        fs::create_dir(to)?;
        for name in names(from)? {
            copy(&from.join(&name), &to.join(&name))?;
        }
        fs::set_permissions(to, Permissions::from_mode(0o755))?;
        return File::open(to)?.sync_all();
    }
    io::copy(&mut File::open(from)?, &mut File::create(to)?)?;
    let mode = if is_executable(&metadata) {
        0o755
    } else {
        0o644
    };
    fs::set_permissions(to, Permissions::from_mode(mode))?;
    File::open(to)?.sync_all()
}

fn is_executable(metadata: &fs::Metadata) -> bool {
    metadata.permissions().mode() & 0o100 != 0
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn failed(operation: &str, path: &Path, error: &io::Error) -> EngineError {
    EngineError::Unavailable(format!("cannot {operation} `{}`: {error}", path.display()))
}
