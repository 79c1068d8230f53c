//! Where exports lie: small files that are written once, whole.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::blob::file_system::sync_directory;
use crate::blob::s3::S3;
use crate::blocking::blocking;
use crate::error::Error;

/// The name of a part: `<set>-<part>-<random>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name {
    pub(crate) set: u64,
    pub(crate) part: u64,
    pub(crate) end: String,
}

impl Name {
    pub(crate) fn text(&self) -> String {
        format!("{:010}-{:010}-{}", self.set, self.part, self.end)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-');
        Some(Self {
            set: parts.next()?.parse().ok()?,
            part: parts.next()?.parse().ok()?,
            end: parts.next().filter(|end| !end.contains('.'))?.to_owned(),
        })
    }
}

/// A place for exports.
#[derive(Clone, Debug)]
pub(crate) enum Shelf {
    /// Files in this directory.
    Directory(PathBuf),
    /// Objects of a bucket.
    S3(S3),
}

impl Shelf {
    /// `x/` of a data directory.
    pub(crate) fn of_directory(data: &Path) -> Self {
        Self::Directory(data.join(EXPORTS))
    }

    /// Writes a part durably.
    pub(crate) async fn put(&self, name: &Name, bytes: Vec<u8>) -> Result<(), Error> {
        let root = match self {
            Self::Directory(root) => root.clone(),
            Self::S3(s3) => return s3.put_file(&place(name), bytes.into()).await,
        };
        let name = name.text();
        blocking(move || {
            if !root.is_dir() {
                std::fs::create_dir(&root).map_err(|error| Error::io("create", &root, error))?;
                if let Some(parent) = root.parent() {
                    sync_directory(parent)?;
                }
            }
            let path = root.join(&name);
            let partial = root.join(format!("{name}.partial"));
            let write = || -> std::io::Result<()> {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(&partial)?;
                file.write_all(&bytes)?;
                file.sync_all()?;
                std::fs::rename(&partial, &path)
            };
            let written = write().map_err(|error| Error::io("write", &path, error));
            if written.is_err() {
                let _ = std::fs::remove_file(&partial);
            }
            written?;
            sync_directory(&root)
        })
        .await
    }

    /// The parts in order.
    pub(crate) async fn list(&self) -> Result<Vec<Name>, Error> {
        let root = match self {
            Self::Directory(root) => root.clone(),
            Self::S3(s3) => {
                let found = s3.list_files(EXPORTS).await?;
                let mut names: Vec<_> = found.iter().filter_map(|name| Name::parse(name)).collect();
                names.sort();
                return Ok(names);
            }
        };
        blocking(move || {
            let entries = match std::fs::read_dir(&root) {
                Ok(entries) => entries,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(Error::io("read", &root, error)),
            };
            let mut names = Vec::new();
            for entry in entries {
                let entry = entry.map_err(|error| Error::io("read", &root, error))?;
                names.extend(entry.file_name().to_str().and_then(Name::parse));
            }
            names.sort();
            Ok(names)
        })
        .await
    }

    pub(crate) async fn get(&self, name: &Name) -> Result<Vec<u8>, Error> {
        use std::io::Read;
        let path = match self {
            Self::Directory(root) => root.join(name.text()),
            Self::S3(s3) => return Ok(s3.read_file(&place(name)).await?.into()),
        };
        blocking(move || {
            let mut bytes = Vec::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut bytes))
                .map_err(|error| Error::io("read", &path, error))?;
            Ok(bytes)
        })
        .await
    }

    pub(crate) async fn remove(&self, name: &Name) -> Result<(), Error> {
        let path = match self {
            Self::Directory(root) => root.join(name.text()),
            Self::S3(s3) => return s3.remove_file(&place(name)).await,
        };
        blocking(move || match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io("remove", &path, error))
            }
            _ => Ok(()),
        })
        .await
    }
}

fn place(name: &Name) -> String {
    format!("{EXPORTS}/{}", name.text())
}

/// The directory of exports in a data directory.
pub(crate) const EXPORTS: &str = "x";
