//! The objects of a backup: each is copied once, before a point that names it is declared.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::blob::file_system::{FileSystem, StorageKey, sync_directory};
use crate::error::Error;

/// Copies objects from a store into a backup.
#[derive(Debug)]
pub(crate) struct Vault {
    root: PathBuf,
    objects: FileSystem,
    link: bool,
    /// Directories whose entries are not durable yet.
    unsynced: BTreeSet<PathBuf>,
}

impl Vault {
    /// `link`: make hard links in place of copies, which is fast and no protection against a dying disk.
    pub(crate) fn open(root: PathBuf, link: bool) -> Result<Self, Error> {
        // What another process copied and did not come to sync is made durable once, here.
        let place = File::open(&root).map_err(|error| Error::io("open", &root, error))?;
        rustix::fs::syncfs(&place).map_err(|error| Error::io("sync", &root, error.into()))?;
        Ok(Self {
            objects: FileSystem::open(root.clone()),
            root,
            link,
            unsynced: BTreeSet::new(),
        })
    }

    /// Has this object in the backup; `false` when the store has it no more.
    pub(crate) fn take(&mut self, from: &FileSystem, key: &StorageKey) -> Result<bool, Error> {
        let target = self.objects.path(key);
        if target.exists() {
            return Ok(true);
        }
        let source = from.path(key);
        let partial = self.parent(key)?.join(format!("{}.partial", key.as_str()));
        match std::fs::remove_file(&partial) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io("remove", &partial, error));
            }
            _ => {}
        }
        let done = if self.link {
            std::fs::hard_link(&source, &partial)
        } else {
            copy(&source, &partial)
        };
        match done {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound && !source.exists() => {
                return Ok(false);
            }
            Err(error) => return Err(Error::io("back up", &source, error)),
        }
        crate::failpoint::failpoint("backup.after_object");
        std::fs::rename(&partial, &target).map_err(|error| Error::io("rename", &partial, error))?;
        Ok(true)
    }

    /// Makes everything that was taken durable.
    pub(crate) fn sync(&mut self) -> Result<(), Error> {
        while let Some(directory) = self.unsynced.first().cloned() {
            sync_directory(&directory)?;
            self.unsynced.remove(&directory);
        }
        Ok(())
    }

    /// Removes the objects that came before the oldest line and that it does not name.
    ///
    /// A key is never used twice, so an object that was there before the line and that the line's copy does not name is
    /// named by no later point. What came after `mark`, a file of the line that is never touched, is kept: its point
    /// may be any of the line's. The time is that of the file system for both.
    pub(crate) fn sweep(&self, listed: &Path, mark: &Path) -> Result<u64, Error> {
        let failed = |error| Error::io("look at", mark, error);
        let mark = std::fs::metadata(mark).map_err(failed)?;
        let begun = (mark.ctime(), mark.ctime_nsec());
        let mut removed = 0;
        // A sixteenth of the keys at once bounds the memory.
        for digit in 0..16_u8 {
            let named = keys(listed, digit)?;
            for low in 0..16_u8 {
                let directory = self.root.join(format!("{digit:x}{low:x}"));
                removed += sweep_below(&directory, &named, begun)?;
            }
        }
        Ok(removed)
    }

    fn parent(&mut self, key: &StorageKey) -> Result<PathBuf, Error> {
        let target = self.objects.path(key);
        let parent = target.parent().unwrap_or(&self.root).to_owned();
        match std::fs::create_dir(&parent) {
            Ok(()) => {
                if let Some(above) = parent.parent() {
                    self.unsynced.insert(above.to_owned());
                }
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create", &parent, error)),
        }
        self.unsynced.insert(parent.clone());
        Ok(parent)
    }
}

/// The kernel shares the blocks where the file system can (reflink), else it copies them.
fn copy(source: &Path, target: &Path) -> std::io::Result<()> {
    let mut from = File::open(source)?;
    let mut to = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)?;
    std::io::copy(&mut from, &mut to)?;
    to.sync_all()
}

/// The keys of a list that begin with this digit.
fn keys(listed: &Path, digit: u8) -> Result<BTreeSet<[u8; 16]>, Error> {
    use std::io::BufRead;
    let failed = |error| Error::io("read", listed, error);
    let file = std::io::BufReader::new(File::open(listed).map_err(failed)?);
    let wanted = format!("{digit:x}");
    let mut found = BTreeSet::new();
    for line in file.lines() {
        let line = line.map_err(failed)?;
        if line.starts_with(&wanted) {
            let mut key = [0; 16];
            hex::decode_to_slice(&line, &mut key)
                .map_err(|_| Error::damaged(listed, "it holds something that is no key"))?;
            found.insert(key);
        }
    }
    Ok(found)
}

fn sweep_below(
    directory: &Path,
    named: &BTreeSet<[u8; 16]>,
    begun: (i64, i64),
) -> Result<u64, Error> {
    let mut removed = 0;
    let list = |path: &Path| -> Result<Vec<PathBuf>, Error> {
        let failed = |error| Error::io("read", path, error);
        std::fs::read_dir(path)
            .map_err(failed)?
            .map(|entry| entry.map(|entry| entry.path()).map_err(failed))
            .collect()
    };
    for below in list(directory)? {
        for path in list(&below)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mut key = [0; 16];
            let is_key = hex::decode_to_slice(name.as_bytes(), &mut key).is_ok();
            if is_key && named.contains(&key) {
                continue;
            }
            let found = match std::fs::metadata(&path) {
                Ok(found) => found,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("look at", &path, error)),
            };
            if (found.ctime(), found.ctime_nsec()) < begun {
                std::fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error))?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}
