//! Objects as files: `o/<2 hex>/<2 hex>/<key>`.
//!
//! Keys are random and never used twice, and a file keeps its name from its first byte on: there is no
//! rename and nothing is written over (`I5`). The first level of directories is made when the data directory
//! is; a directory of the second level is made durable before the first object in it. Every function here
//! blocks and belongs on a blocking thread.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::clock::random_name;
use crate::error::Error;
use crate::failpoint::failpoint;

/// The name of an object: 32 hexadecimal characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct StorageKey(String);

impl StorageKey {
    /// A key that nothing has had.
    pub(crate) fn fresh() -> Result<Self, Error> {
        random_name().map(Self)
    }

    /// A key out of the database or a file name. Anything else is no key, so it can never lead out of the
    /// directory.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let valid = text.len() == 32
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::Database(format!("`{text}` is no storage key")))
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// `o/<2 hex>/<2 hex>/<key>`.
    pub(crate) fn place(&self) -> String {
        format!("o/{}/{}/{}", &self.0[..2], &self.0[2..4], self.0)
    }
}

/// The objects of a data directory.
#[derive(Debug)]
pub(crate) struct FileSystem {
    root: PathBuf,
    /// Second-level directories that this process knows to be durable.
    durable: Mutex<BTreeSet<String>>,
}

impl FileSystem {
    /// Makes the root and its first level of directories, durably.
    pub(crate) fn make(root: &Path) -> Result<(), Error> {
        make_directory(root)?;
        for byte in 0..=u8::MAX {
            make_directory(&root.join(format!("{byte:02x}")))?;
        }
        sync_directory(root)
    }

    /// The directory of the objects.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn open(root: PathBuf) -> Self {
        Self {
            root,
            durable: Mutex::default(),
        }
    }

    /// Opens the file of an upload and makes it hold exactly `start`. `start` is what the database has of
    /// it while nothing of the object is recorded; what a crash left there is written over.
    pub(crate) fn create(&self, key: &StorageKey, start: &[u8]) -> Result<File, Error> {
        let path = self.path(key);
        self.make_parent(key)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| Error::io("create", &path, error))?;
        file.write_all_at(start, 0)
            .map_err(|error| Error::io("write", &path, error))?;
        Ok(file)
    }

    /// Opens the file of an upload to go on at `size`. Bytes after it were never recorded and are cut off.
    pub(crate) fn resume(&self, key: &StorageKey, size: u64) -> Result<File, Error> {
        let path = self.path(key);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| Error::io("open", &path, error))?;
        let found = file
            .metadata()
            .map_err(|error| Error::io("look at", &path, error))?
            .len();
        if found < size {
            return Err(Error::damaged(
                &path,
                format!("it has {found} bytes, but {size} were recorded"),
            ));
        }
        if found > size {
            file.set_len(size)
                .map_err(|error| Error::io("truncate", &path, error))?;
        }
        Ok(file)
    }

    /// Opens an object for reading; it must have exactly this size.
    pub(crate) fn read(&self, key: &StorageKey, size: u64) -> Result<File, Error> {
        let path = self.path(key);
        let file = File::open(&path).map_err(|error| Error::io("open", &path, error))?;
        let found = file
            .metadata()
            .map_err(|error| Error::io("look at", &path, error))?
            .len();
        if found == size {
            Ok(file)
        } else {
            Err(Error::damaged(
                &path,
                format!("it has {found} bytes, not {size}; run `verify-store`"),
            ))
        }
    }

    /// Makes the directory entry of an object durable.
    pub(crate) fn sync_entry(&self, key: &StorageKey) -> Result<(), Error> {
        sync_directory(&self.parent(key))
    }

    /// Removes objects, durably. What is gone already is no error, but whoever removed it may have been cut
    /// off before that was durable, so the directory is synced then, too.
    ///
    /// All entries go before the first sync: a journal then commits them together.
    pub(crate) fn remove(&self, keys: Vec<StorageKey>) -> Vec<(StorageKey, Result<(), Error>)> {
        let removed: Vec<_> = keys
            .into_iter()
            .map(|key| {
                let path = self.path(&key);
                let result = match std::fs::remove_file(&path) {
                    Ok(()) => Ok(true),
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                    Err(error) => Err(Error::io("remove", &path, error)),
                };
                failpoint("outbox.after_remove");
                (key, result)
            })
            .collect();
        removed
            .into_iter()
            .map(|(key, result)| {
                let result = result.and_then(|was_there| match self.sync_entry(&key) {
                    // Nothing was ever below it.
                    Err(Error::Io { source, .. })
                        if !was_there && source.kind() == ErrorKind::NotFound =>
                    {
                        Ok(())
                    }
                    other => other,
                });
                (key, result)
            })
            .collect()
    }

    /// The directories and files right under the root, to be listed one after the other with [`Self::list_part`].
    pub(crate) fn parts(&self) -> Result<Vec<PathBuf>, Error> {
        let failed = |error| Error::io("read", &self.root, error);
        let mut parts = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(failed)? {
            parts.push(entry.map_err(failed)?.path());
        }
        parts.sort();
        Ok(parts)
    }

    /// What [`Self::list`] gives of one part.
    pub(crate) fn list_part(
        &self,
        part: &Path,
    ) -> Result<Vec<(PathBuf, Option<StorageKey>)>, Error> {
        if part.is_dir() {
            self.list_below(part.to_owned())
        } else if part.exists() {
            Ok(vec![(part.to_owned(), None)])
        } else {
            Ok(Vec::new())
        }
    }

    /// Every file under the root, and whether its name is that of an object in its place. For checking
    /// only; the store itself never lists (`I10`).
    pub(crate) fn list(&self) -> Result<Vec<(PathBuf, Option<StorageKey>)>, Error> {
        self.list_below(self.root.clone())
    }

    /// Whether there is any file under the root.
    pub(crate) fn are_some(&self) -> Result<bool, Error> {
        let mut open = vec![self.root.clone()];
        while let Some(directory) = open.pop() {
            let failed = |error| Error::io("read", &directory, error);
            for entry in std::fs::read_dir(&directory).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if !entry.file_type().map_err(failed)?.is_dir() {
                    return Ok(true);
                }
                open.push(entry.path());
            }
        }
        Ok(false)
    }

    fn list_below(&self, directory: PathBuf) -> Result<Vec<(PathBuf, Option<StorageKey>)>, Error> {
        let mut found = Vec::new();
        let mut open = vec![directory];
        while let Some(directory) = open.pop() {
            let failed = |error| Error::io("read", &directory, error);
            for entry in std::fs::read_dir(&directory).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let path = entry.path();
                if entry.file_type().map_err(failed)?.is_dir() {
                    open.push(path);
                    continue;
                }
                let key = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| StorageKey::parse(name).ok())
                    .filter(|key| self.path(key) == path);
                found.push((path, key));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Where an object lies.
    pub(crate) fn path(&self, key: &StorageKey) -> PathBuf {
        self.parent(key).join(&key.0)
    }

    fn parent(&self, key: &StorageKey) -> PathBuf {
        self.root.join(&key.0[..2]).join(&key.0[2..4])
    }

    /// Makes the directory of a key, durably, once in the life of this process.
    pub(crate) fn make_parent(&self, key: &StorageKey) -> Result<(), Error> {
        let name = &key.0[..4];
        if self.durable().contains(name) {
            return Ok(());
        }
        let parent = self.parent(key);
        make_directory(&parent)?;
        sync_directory(&self.root.join(&key.0[..2]))?;
        self.durable().insert(name.to_owned());
        Ok(())
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io("sync", path, error))
}

fn make_directory(path: &Path) -> Result<(), Error> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("create", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_system() -> (tempfile::TempDir, FileSystem) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("o");
        FileSystem::make(&root).unwrap();
        (dir, FileSystem::open(root))
    }

    #[test]
    fn a_key_never_leads_out_of_the_directory() {
        for text in [
            "",
            "..",
            "../../../../../etc/passwd",
            &"A".repeat(32),
            &"a".repeat(33),
        ] {
            assert!(StorageKey::parse(text).is_err(), "{text}");
        }
        assert!(StorageKey::parse(&"0a".repeat(16)).is_ok());
    }

    #[test]
    fn what_was_not_recorded_is_cut_off() {
        let (_dir, objects) = file_system();
        let key = StorageKey::fresh().unwrap();
        let file = objects.create(&key, b"recorded").unwrap();
        file.write_all_at(b" and more", 8).unwrap();
        let file = objects.resume(&key, 8).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 8);
        assert!(matches!(
            objects.resume(&key, 9),
            Err(Error::Damaged { .. })
        ));
    }

    #[test]
    fn an_object_of_another_size_is_not_read() {
        let (_dir, objects) = file_system();
        let key = StorageKey::fresh().unwrap();
        objects.create(&key, b"12345").unwrap();
        assert!(objects.read(&key, 5).is_ok());
        assert!(matches!(objects.read(&key, 6), Err(Error::Damaged { .. })));
    }

    #[test]
    fn removing_twice_is_no_error_and_strangers_are_listed() {
        let (dir, objects) = file_system();
        let key = StorageKey::fresh().unwrap();
        objects.create(&key, b"x").unwrap();
        std::fs::write(dir.path().join("o/00/readme"), b"x").unwrap();
        let listed = objects.list().unwrap();
        assert_eq!(listed.len(), 2);
        assert_eq!(listed.iter().filter(|(_, key)| key.is_none()).count(), 1);
        // A second time does no harm, nor does a key that nothing was ever below.
        let never = StorageKey::parse(&"f".repeat(32)).unwrap();
        for _ in 0..2 {
            let removed = objects.remove(vec![key.clone(), never.clone()]);
            assert_eq!(removed.len(), 2);
            assert!(removed.iter().all(|(_, result)| result.is_ok()));
        }
        assert_eq!(objects.list().unwrap().len(), 1);
    }
}
