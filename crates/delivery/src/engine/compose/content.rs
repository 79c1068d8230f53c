//! Mounted content under names made from the content itself.
//!
//! A release's directory is named by the release's digest, so a bind straight out of it would recreate every service that mounts anything at each release.
//! So each mounted file or directory is copied to `content/<sha256>`: what did not change keeps its path, and Compose leaves the service alone.
//! These paths last as long as a kept release or a container uses them, because the engine starts containers again after a reboot without asking anyone.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use oci::{Algorithm, Digest, Hasher};

/// The name of some content: the hash over kind, names, modes and bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(String);

impl Name {
    /// Hexadecimal, 64 digits.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads a name, as from a file's name.
    pub(super) fn parse(text: &str) -> Option<Self> {
        (text.len() == 64
            && text
                .bytes()
                .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()))
        .then(|| Self(text.to_owned()))
    }
}

/// Something to mount, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Its name.
    pub(super) name: Name,
    /// A file or directory inside a release.
    pub(super) source: PathBuf,
}

/// Why content cannot be named or copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContentError {
    /// It is of a kind that is not mounted; this does not pass by itself.
    #[error("`{0}` is neither a file, a directory nor a link that stays inside")]
    Kind(PathBuf),
    /// The bytes are not those that were planned with.
    #[error("`{0}` changed since it was planned with")]
    Changed(PathBuf),
    /// The disk.
    #[error("cannot {operation} `{path}`: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Names a file or directory. Only the owner's execute bit of a mode counts, as in a release.
pub(super) fn name(source: &Path) -> Result<Name, ContentError> {
    let digest = entry(source, source, None)?;
    Ok(Name(digest.hex()))
}

/// Puts `content` beneath `root` under its name, whole and durable, whatever the umask. Content that is there and intact is left alone.
pub(super) fn place(root: &Path, content: &Content) -> Result<PathBuf, ContentError> {
    let path = root.join(content.name.as_str());
    match fs::symlink_metadata(&path) {
        Ok(_) if intact(&path, &content.name) => return Ok(path),
        Ok(_) => {
            // Someone wrote to it. A container that mounts it keeps the old inode; the path gets the right bytes.
            let aside = unique(root)?;
            let aside = aside.keep();
            fs::rename(&path, aside.join("damaged")).map_err(io("move aside", &path))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read", &path)(error)),
    }
    let directory = unique(root)?;
    let copy = directory.path().join("content");
    copy_entry(&content.source, &copy, &content.source)?;
    if name(&copy)? != content.name {
        return Err(ContentError::Changed(content.source.clone()));
    }
    fs::rename(&copy, &path).map_err(io("rename", &path))?;
    sync_directory(root)?;
    Ok(path)
}

/// Removes whatever beneath `root` is not `kept`, including what an interrupted copy left.
pub(super) fn sweep(root: &Path, kept: &BTreeSet<Name>) -> Result<usize, ContentError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(io("read", root)(error)),
    };
    let mut removed = 0;
    for found in entries {
        let found = found.map_err(io("read", root))?;
        let path = found.path();
        let file_name = found.file_name();
        let text = file_name.to_string_lossy();
        let ours = match Name::parse(&text) {
            Some(name) => !kept.contains(&name),
            None => text.starts_with(TEMPORARY),
        };
        if !ours {
            continue;
        }
        let directory = found.file_type().map_err(io("read", &path))?.is_dir();
        let result = if directory {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        result.map_err(io("remove", &path))?;
        removed += 1;
    }
    Ok(removed)
}

/// Writes a small file so that after a power cut it holds the old or the new bytes; readable for its owner alone.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), ContentError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempfile_in(directory)
        .map_err(io("write", path))?;
    file.write_all(bytes).map_err(io("write", path))?;
    file.as_file().sync_all().map_err(io("sync", path))?;
    file.persist(path)
        .map_err(|error| io("rename", path)(error.error))?;
    sync_directory(directory)
}

/// Makes a directory and its parents, durable.
pub(super) fn make_directory(path: &Path) -> Result<(), ContentError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(io("create", path))?;
    sync_directory(path.parent().unwrap_or(Path::new("/")))
}

fn sync_directory(path: &Path) -> Result<(), ContentError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(io("sync", path))
}

fn unique(root: &Path) -> Result<tempfile::TempDir, ContentError> {
    tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempdir_in(root)
        .map_err(io("create a directory in", root))
}

/// Whether what stands at `path` has the name's content and exactly the modes we set.
fn intact(path: &Path, expected: &Name) -> bool {
    entry(path, path, Some(())).is_ok_and(|digest| digest.hex() == expected.0)
}

/// The hash of one entry. With `exact`, a mode other than the one we set is a difference.
fn entry(path: &Path, root: &Path, exact: Option<()>) -> Result<Digest, ContentError> {
    let metadata = fs::symlink_metadata(path).map_err(io("read", path))?;
    let kind = metadata.file_type();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    if kind.is_symlink() {
        let target = fs::read_link(path).map_err(io("read", path))?;
        if !stays_inside(path, &target, root) {
            return Err(ContentError::Kind(path.to_owned()));
        }
        hasher.update(b"longshore content 1 link\n");
        hasher.update(std::os::unix::ffi::OsStrExt::as_bytes(target.as_os_str()));
    } else if kind.is_dir() {
        if exact.is_some() && metadata.permissions().mode() & 0o7777 != DIRECTORY_MODE {
            return Err(ContentError::Changed(path.to_owned()));
        }
        hasher.update(b"longshore content 1 directory\n");
        for name in sorted_names(path)? {
            let digest = entry(&path.join(&name), root, exact)?;
            let name = std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str());
            // Names hold no NUL, so this cannot be read in two ways.
            hasher.update(name);
            hasher.update(b"\0");
            hasher.update(digest.as_bytes());
        }
    } else if kind.is_file() {
        let mode = file_mode(metadata.permissions().mode());
        if exact.is_some() && metadata.permissions().mode() & 0o7777 != mode {
            return Err(ContentError::Changed(path.to_owned()));
        }
        hasher.update(format!("longshore content 1 file {mode:o}\n").as_bytes());
        let mut file = File::open(path).map_err(io("read", path))?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = file.read(&mut buffer).map_err(io("read", path))?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
        }
    } else {
        return Err(ContentError::Kind(path.to_owned()));
    }
    Ok(hasher.finish())
}

fn copy_entry(from: &Path, to: &Path, root: &Path) -> Result<(), ContentError> {
    let metadata = fs::symlink_metadata(from).map_err(io("read", from))?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(from).map_err(io("read", from))?;
        if !stays_inside(from, &target, root) {
            return Err(ContentError::Kind(from.to_owned()));
        }
        std::os::unix::fs::symlink(target, to).map_err(io("link", to))
    } else if kind.is_dir() {
        fs::create_dir(to).map_err(io("create", to))?;
        for name in sorted_names(from)? {
            copy_entry(&from.join(&name), &to.join(&name), root)?;
        }
        fs::set_permissions(to, Permissions::from_mode(DIRECTORY_MODE))
            .map_err(io("set the mode of", to))?;
        sync_directory(to)
    } else if kind.is_file() {
        let mut source = File::open(from).map_err(io("read", from))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(to)
            .map_err(io("create", to))?;
        io::copy(&mut source, &mut file).map_err(io("write", to))?;
        file.set_permissions(Permissions::from_mode(file_mode(
            metadata.permissions().mode(),
        )))
        .map_err(io("set the mode of", to))?;
        file.sync_all().map_err(io("sync", to))
    } else {
        Err(ContentError::Kind(from.to_owned()))
    }
}

fn sorted_names(directory: &Path) -> Result<Vec<std::ffi::OsString>, ContentError> {
    let mut names = fs::read_dir(directory)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<Vec<_>>>()
        })
        .map_err(io("read", directory))?;
    names.sort();
    Ok(names)
}

/// Whether a link at `path` with `target` stays inside `root`, judged by names alone.
fn stays_inside(path: &Path, target: &Path, root: &Path) -> bool {
    let Ok(relative) = path.strip_prefix(root) else {
        return false;
    };
    let mut depth = relative.components().count();
    if depth == 0 {
        return false;
    }
    depth -= 1;
    for component in target.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => return false,
        }
    }
    true
}

const fn file_mode(mode: u32) -> u32 {
    if mode & 0o100 == 0 { 0o644 } else { 0o755 }
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ContentError {
    let path = path.to_owned();
    move |source| ContentError::Io {
        operation,
        path,
        source,
    }
}

const DIRECTORY_MODE: u32 = 0o755;
const TEMPORARY: &str = ".new-";

#[cfg(test)]
mod tests;
