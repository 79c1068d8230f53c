//! The data directory: its format, its lock, its parts.
//!
//! `format` names the version and is written last and durably when a directory is made, so a directory with
//! it is whole, and one without it is empty, half-made, or not ours.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::blob::file_system::{FileSystem, sync_directory};
use crate::error::Error;
use crate::export::shelf::EXPORTS;
use crate::identity;

/// The format of the directory that this program writes.
const FORMAT: i64 = 1;
const FORMAT_NAME: &str = "longshore store";
const MAX_FORMAT_FILE: u64 = 256;

/// A data directory whose lock is held.
#[derive(Debug)]
pub(crate) struct Directory {
    root: PathBuf,
    _lock: File,
    /// It has no format yet: the database is to be made.
    pub(crate) fresh: bool,
}

impl Directory {
    /// Takes the lock of `root`, making the directory when it is missing or empty.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        Self::open_beside(root, &[])
    }

    /// The same for a database that is carried to where its objects lie already.
    pub(crate) fn open_for_objects(root: &Path) -> Result<Self, Error> {
        Self::open_beside(root, &[EXPORTS, identity::FILE])
    }

    fn open_beside(root: &Path, also: &[&str]) -> Result<Self, Error> {
        make_directory(root)?;
        let fresh = read_format(root)?.is_none();
        if fresh {
            check_ours(root, also)?;
        }
        let lock = take_lock(root)?;
        // Whoever had the lock a moment ago may have made the directory whole.
        let fresh = fresh && read_format(root)?.is_none();
        if fresh {
            FileSystem::make(&root.join(OBJECTS))?;
            sync_directory(root)?;
        } else if !database(root).is_file() {
            return Err(Error::damaged(
                &database(root),
                "it is missing, restore the directory from a backup, or make it anew with `longshore reindex`",
            ));
        }
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
            fresh,
        })
    }

    /// Takes the lock of a directory that is whole.
    pub(crate) fn open_existing(root: &Path) -> Result<Self, Error> {
        if read_format(root)?.is_none() {
            return Err(Error::unusable(root, no_format(root)));
        }
        Self::open(root)
    }

    /// Takes the lock of a directory that has objects and has lost its database. Where the objects are elsewhere, the
    /// directory may be lost too.
    pub(crate) fn open_without_database(root: &Path, has_objects: bool) -> Result<Self, Error> {
        if !has_objects {
            make_directory(root)?;
            FileSystem::make(&objects(root))?;
        } else if !objects(root).is_dir() {
            return Err(Error::unusable(
                root,
                "it holds no objects, so it is not a data directory",
            ));
        }
        read_format(root)?;
        let lock = take_lock(root)?;
        let database = database(root);
        if database.exists() {
            return Err(Error::unusable(
                &database,
                "the database is there; when it cannot be used, move it away with its `-wal` and `-shm` files first",
            ));
        }
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
            fresh: false,
        })
    }

    /// Takes a part in the lock of a directory that holds objects alone. Keys are never used twice and claims are in
    /// the database, so replicas may share it; an embedded store may not.
    pub(crate) fn open_objects(root: &Path) -> Result<Self, Error> {
        make_directory(root)?;
        if read_format(root)?.is_some() || database(root).exists() {
            return Err(Error::NotADataDirectory {
                dir: root.to_owned(),
                found: "an embedded store".to_owned(),
            });
        }
        check_ours(root, &[EXPORTS, identity::FILE])?;
        let lock = share_lock(root)?;
        FileSystem::make(&objects(root))?;
        Ok(Self {
            root: root.to_owned(),
            _lock: lock,
            fresh: false,
        })
    }

    /// Whether this is the directory at `path`.
    pub(crate) fn is(&self, path: &Path) -> bool {
        self.root == path
    }

    /// Where it is.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Opens an existing directory to look at it. The lock is `None` when a running server has it.
    pub(crate) fn look(root: &Path) -> Result<Option<File>, Error> {
        if read_format(root)?.is_none() {
            return Err(Error::damaged(root, no_format(root)));
        }
        match take_lock(root) {
            Ok(lock) => Ok(Some(lock)),
            Err(Error::InUse(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Declares the directory whole, durably.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        let partial = self.root.join(FORMAT_PARTIAL);
        let path = self.root.join(FORMAT_FILE);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&partial)?;
            writeln!(file, "{FORMAT_NAME} {FORMAT}")?;
            file.sync_all()?;
            std::fs::rename(&partial, &path)
        };
        write().map_err(|error| Error::io("write", &path, error))?;
        sync_directory(&self.root)
    }
}

/// Puts the database of an embedded store aside, durably: it was carried elsewhere, and the objects stay here for the
/// store that it became. Doing it again changes nothing.
pub(crate) fn retire(root: &Path) -> Result<(), Error> {
    let format = root.join(FORMAT_FILE);
    if let Err(error) = std::fs::remove_file(&format)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(Error::io("remove", &format, error));
    }
    sync_directory(root)?;
    let path = database(root);
    if let Err(error) = std::fs::rename(&path, root.join(format!("{DATABASE}{CARRIED}")))
        && error.kind() != ErrorKind::NotFound
    {
        return Err(Error::io("rename", &path, error));
    }
    sync_directory(root)
}

/// The path of the database.
pub(crate) fn database(root: &Path) -> PathBuf {
    root.join(DATABASE)
}

/// Tells whether the file system of a directory takes no writes, by trying one.
pub(crate) fn is_read_only(directory: &Path) -> bool {
    let probe = directory.join(PROBE);
    match OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(&probe)
    {
        Ok(_) => {
            // It is ours, and one that stays is used by the next look.
            let _ = std::fs::remove_file(&probe);
            false
        }
        Err(error) => error.kind() == ErrorKind::ReadOnlyFilesystem,
    }
}

/// The path of the lock.
pub(crate) fn lock_file(root: &Path) -> PathBuf {
    root.join(LOCK)
}

/// The path of the objects.
pub(crate) fn objects(root: &Path) -> PathBuf {
    root.join(OBJECTS)
}

/// Refuses two directories that are one, or lie one inside the other: each of them is for one thing alone.
///
/// # Errors
/// [`Error::Unusable`], which names both; [`Error::Io`].
pub fn require_apart(directory: &Path, other: &Path) -> Result<(), Error> {
    let (one, two) = (resolve(directory)?, resolve(other)?);
    if one.starts_with(&two) || two.starts_with(&one) {
        return Err(Error::unusable(
            directory,
            format!(
                "it and `{}` are one directory or lie one inside the other, choose another one",
                other.display()
            ),
        ));
    }
    Ok(())
}

/// The path without links, of which only the first components need to be there.
fn resolve(path: &Path) -> Result<PathBuf, Error> {
    let path = std::path::absolute(path).map_err(|error| Error::io("find", path, error))?;
    for above in path.ancestors() {
        match above.canonicalize() {
            Ok(found) => {
                let rest = path.strip_prefix(above).unwrap_or(Path::new(""));
                return Ok(if rest.as_os_str().is_empty() {
                    found
                } else {
                    found.join(rest)
                });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("find", above, error)),
        }
    }
    Ok(path)
}

/// What a directory without its format is told.
fn no_format(root: &Path) -> String {
    let below = root.join(UP);
    let mut text = "it holds no `format` file, so it is not a data directory".to_owned();
    if below.join(FORMAT_FILE).is_file() {
        use std::fmt::Write as _;
        let _ = write!(text, "; `{}` is one", below.display());
    }
    text
}

fn make_directory(root: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    if root.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(|error| Error::io("create", root, error))?;
    match root
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        Some(parent) => sync_directory(parent),
        None => Ok(()),
    }
}

fn read_format(root: &Path) -> Result<Option<i64>, Error> {
    use std::io::Read;
    let path = root.join(FORMAT_FILE);
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(MAX_FORMAT_FILE).read_to_string(&mut text));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == ErrorKind::InvalidData => text.clear(),
        Err(error) => return Err(Error::io("read", &path, error)),
    }
    let version = text
        .strip_suffix('\n')
        .and_then(|line| line.strip_prefix(FORMAT_NAME))
        .and_then(|version| version.trim_start().parse::<i64>().ok())
        .filter(|version| *version > 0)
        .ok_or_else(|| {
            Error::damaged(
                &path,
                format!("it does not say `{FORMAT_NAME} {FORMAT}`, restore it from a backup"),
            )
        })?;
    if version > FORMAT {
        return Err(Error::Newer {
            dir: root.to_owned(),
            found: version,
            known: FORMAT,
        });
    }
    Ok(Some(version))
}

/// Refuses a directory without a format that holds anything but what a first start leaves behind.
fn check_ours(root: &Path, also: &[&str]) -> Result<(), Error> {
    let entries = std::fs::read_dir(root).map_err(|error| Error::io("read", root, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("read", root, error))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // `lost+found` is the file system's own, when the directory is its root.
        let known = also.contains(&name.as_ref())
            || [LOCK, OBJECTS, FORMAT_PARTIAL, RESERVE, PROBE, "lost+found"]
                .contains(&name.as_ref())
            || name
                .strip_prefix(DATABASE)
                .is_some_and(|rest| ["", "-wal", "-shm", "-journal", CARRIED].contains(&rest))
            // What is left of an identity that was being written.
            || name.ends_with(".partial") && name.starts_with(identity::FILE);
        if !known {
            return Err(Error::NotADataDirectory {
                dir: root.to_owned(),
                found: name.into_owned(),
            });
        }
    }
    Ok(())
}

pub(crate) fn take_lock(root: &Path) -> Result<File, Error> {
    lock(root, File::try_lock)
}

fn share_lock(root: &Path) -> Result<File, Error> {
    lock(root, File::try_lock_shared)
}

fn lock(root: &Path, take: fn(&File) -> Result<(), TryLockError>) -> Result<File, Error> {
    let path = root.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| Error::io("open", &path, error))?;
    match take(&file) {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse(root.to_owned())),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path, error)),
    }
}

const FORMAT_FILE: &str = "format";
const FORMAT_PARTIAL: &str = "format.partial";
/// What is removed first when the disk is full.
pub(crate) const RESERVE: &str = "reserve";
/// Made and removed to find out whether the file system takes writes.
const PROBE: &str = "probe";
/// After the name of a database that was carried elsewhere.
const CARRIED: &str = ".carried";
const LOCK: &str = "lock";
const DATABASE: &str = "meta.db";
/// Where `longshore up` keeps the store below the directory that it is given.
const UP: &str = "registry";
const OBJECTS: &str = "o";
