//! A directory that another program wrote, read without ever leaving it.
//!
//! Names come from foreign files. Each path is walked component by component from the opened root, and a symbolic
//! link is followed nowhere, so neither `..` nor a link leads out of the tree. Every function here blocks and belongs
//! on a blocking thread.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use crate::error::Error;

/// An opened root.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    directory: OwnedFd,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) kind: Kind,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Directory,
    File,
    /// A symbolic link, a device, a socket: nothing that is read.
    Other,
}

impl Tree {
    /// Opens the root, which may itself be reached through links: the operator named it.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let directory = openat(
            CWD,
            root,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| Error::io("open", root, error.into()))?;
        Ok(Self {
            root: root.to_owned(),
            directory,
        })
    }

    /// The entries of a directory in bytewise order; `None` when it is not there. Names that are no text are left out.
    pub(super) fn list(&self, path: &str) -> Result<Option<Vec<Entry>>, String> {
        let Some(directory) = self.walk(path, OFlags::DIRECTORY)? else {
            return Ok(None);
        };
        let failed = |error: Errno| self.failed("read", path, error);
        let mut entries = Vec::new();
        for entry in Dir::read_from(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map(|stat| FileType::from_raw_mode(stat.st_mode)),
                known => Ok(known),
            };
            let kind = match kind.map_err(failed)? {
                FileType::Directory => Kind::Directory,
                FileType::RegularFile => Kind::File,
                _ => Kind::Other,
            };
            entries.push(Entry {
                name: name.to_owned(),
                kind,
            });
        }
        entries.sort();
        Ok(Some(entries))
    }

    /// Opens a regular file with its length; `None` when it is not there.
    pub(super) fn file(&self, path: &str) -> Result<Option<(File, u64)>, String> {
        // A named pipe must not hold us up.
        let Some(file) = self.walk(path, OFlags::NONBLOCK)? else {
            return Ok(None);
        };
        let file = File::from(file);
        let metadata = file
            .metadata()
            .map_err(|error| format!("`{}` cannot be looked at: {error}", self.at(path)))?;
        if !metadata.is_file() {
            return Err(format!("`{}` is no regular file", self.at(path)));
        }
        Ok(Some((file, metadata.len())))
    }

    /// Reads a whole small file; `None` when it is not there.
    pub(super) fn read(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, String> {
        let Some((file, _)) = self.file(path)? else {
            return Ok(None);
        };
        let mut content = Vec::new();
        file.take(limit as u64 + 1)
            .read_to_end(&mut content)
            .map_err(|error| format!("`{}` cannot be read: {error}", self.at(path)))?;
        if content.len() > limit {
            return Err(format!("`{}` has more than {limit} bytes", self.at(path)));
        }
        Ok(Some(content))
    }

    /// How messages name a path of the tree.
    pub(super) fn at(&self, path: &str) -> String {
        self.root.join(path).display().to_string()
    }

    /// Opens what `path` names, no link followed on the way nor at its end.
    fn walk(&self, path: &str, last: OFlags) -> Result<Option<OwnedFd>, String> {
        let always = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut components = path.split('/').filter(|part| !part.is_empty()).peekable();
        let mut here: Option<OwnedFd> = None;
        if components.peek().is_none() {
            return openat(&self.directory, ".", always | last, Mode::empty())
                .map(Some)
                .map_err(|error| self.failed("open", path, error));
        }
        while let Some(component) = components.next() {
            if component == "." || component == ".." || component.contains('\0') {
                return Err(format!(
                    "`{path}` is no path within `{}`",
                    self.root.display()
                ));
            }
            let flags = if components.peek().is_some() {
                always | OFlags::DIRECTORY
            } else {
                always | last
            };
            let parent = here
                .as_ref()
                .map_or(self.directory.as_fd(), |fd| fd.as_fd());
            match openat(parent, component, flags, Mode::empty()) {
                Ok(next) => here = Some(next),
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(self.is_link(path)),
                // With DIRECTORY a link is told as "not a directory".
                Err(Errno::NOTDIR) => {
                    let link =
                        statat(parent, component, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
                            FileType::from_raw_mode(stat.st_mode) == FileType::Symlink
                        });
                    return if link {
                        Err(self.is_link(path))
                    } else {
                        Ok(None)
                    };
                }
                Err(error) => return Err(self.failed("open", path, error)),
            }
        }
        Ok(here)
    }

    fn is_link(&self, path: &str) -> String {
        format!(
            "`{}` is or lies behind a symbolic link, which an import does not follow",
            self.at(path)
        )
    }

    fn failed(&self, operation: &str, path: &str, error: Errno) -> String {
        format!(
            "cannot {operation} `{}`: {}",
            self.at(path),
            std::io::Error::from(error)
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tree() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/b/file"), "inside").unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::os::unix::fs::symlink("../../../secret", root.join("a/b/link")).unwrap();
        std::os::unix::fs::symlink("../..", root.join("a/up")).unwrap();
        let tree = Tree::open(&root).unwrap();
        (dir, tree)
    }

    #[test]
    fn what_is_inside_is_read() {
        let (_dir, tree) = tree();
        assert_eq!(tree.read("a/b/file", 6).unwrap().unwrap(), b"inside");
        assert!(tree.read("a/b/file", 5).is_err());
        assert_eq!(tree.read("a/b/none", 5).unwrap(), None);
        assert_eq!(tree.read("a/b/file/deeper", 5).unwrap(), None);
        let names: Vec<_> = tree.list("a/b").unwrap().unwrap();
        assert_eq!(names[0].kind, Kind::File);
        assert_eq!(names[1].kind, Kind::Other);
        assert!(tree.list("").unwrap().is_some());
    }

    #[test]
    fn nothing_leads_out() {
        let (_dir, tree) = tree();
        for path in [
            "../secret",
            "a/../../secret",
            "a/b/link",
            "a/up/secret",
            "a/up",
            "a/./b/file",
        ] {
            assert!(tree.read(path, 100).is_err(), "{path}");
            assert!(tree.list(path).is_err(), "{path}");
        }
        // An absolute path starts at the root of the tree as every other one.
        assert_eq!(tree.read("/etc/passwd", 1 << 20).unwrap(), None);
    }

    proptest! {
        #[test]
        fn no_path_reads_what_is_outside(parts in prop::collection::vec(
            prop_oneof![
                Just("..".to_owned()), Just(".".to_owned()), Just(String::new()), Just("a".to_owned()),
                Just("b".to_owned()), Just("up".to_owned()), Just("link".to_owned()), Just("secret".to_owned()),
                Just("root".to_owned()), Just("file".to_owned()), "[ -~\0]{0,4}",
            ], 0..8)) {
            let (_dir, tree) = tree();
            let path = parts.join("/");
            if let Ok(Some(content)) = tree.read(&path, 100) {
                prop_assert_eq!(content, b"inside");
            }
            if let Ok(Some(entries)) = tree.list(&path) {
                prop_assert!(entries.iter().all(|entry| entry.name != "secret"));
            }
        }
    }
}
