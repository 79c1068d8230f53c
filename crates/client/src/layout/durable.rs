//! A file that is either whole and durable in its place, or not there.

use std::path::{Path, PathBuf};

use tokio::fs::File;
use tokio::io::{AsyncWriteExt as _, BufWriter};

use crate::Error;

/// A file being written beside its place. Dropped before [`Durable::commit`], it is removed.
#[derive(Debug)]
pub(crate) struct Durable {
    file: BufWriter<File>,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Durable {
    pub(crate) async fn create(target: &Path) -> Result<Self, Error> {
        let name = target
            .file_name()
            .ok_or_else(|| Error::Other(format!("`{}` does not name a file", target.display())))?;
        let random = getrandom::u64()
            .map_err(|error| Error::Other(format!("no random numbers: {error}")))?;
        // A long name stays within what a directory entry may hold.
        let name: String = name.to_string_lossy().chars().take(40).collect();
        let temporary = target.with_file_name(format!(".{name}.{random:016x}"));
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .await
            .map_err(Error::file(&temporary))?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER, file),
            temporary,
            target: target.to_owned(),
            committed: false,
        })
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .await
            .map_err(Error::file(&self.temporary))
    }

    /// File, then name, then directory: in this order a power cut leaves the old state or the new.
    pub(crate) async fn commit(mut self) -> Result<(), Error> {
        let failed = Error::file(&self.temporary);
        let synced = async {
            self.file.flush().await?;
            self.file.get_ref().sync_all().await
        };
        synced.await.map_err(failed)?;
        tokio::fs::rename(&self.temporary, &self.target)
            .await
            .map_err(Error::file(&self.target))?;
        self.committed = true;
        sync_parent(&self.target).await
    }

    pub(crate) async fn write_all(target: &Path, content: &[u8]) -> Result<(), Error> {
        let mut file = Self::create(target).await?;
        file.write(content).await?;
        file.commit().await
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: nothing reads a name like this one.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Makes the entry of `path` in its directory durable.
pub(super) async fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = async { File::open(parent).await?.sync_all().await };
    synced.await.map_err(Error::file(parent))
}

const BUFFER: usize = 1024 * 1024;
