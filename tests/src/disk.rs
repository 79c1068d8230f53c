//! File systems of a few MiB in memory, which tests fill up. Mounting takes root.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{Run, Scratch};

/// A file system of its own in memory, of a few MiB. Mounting takes root.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// Mounts one of `size`, as `48m`, in the scratch directory.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn new(scratch: &Scratch, size: &str) -> Self {
        Self::over(&scratch.dir("disk"), size)
    }

    /// Mounts one over a directory that is there.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn over(path: &Path, size: &str) -> Self {
        Run::new("mount")
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={size},mode=0755"))
            .arg("longshore-test")
            .arg(path)
            .ok();
        Self(path.to_owned())
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A data directory on it.
    pub fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    /// Takes all space but `left` bytes.
    ///
    /// # Panics
    /// When it cannot be taken.
    pub fn fill(&self, left: u64) {
        let stat = rustix::fs::statvfs(&self.0).expect("it is mounted");
        let free = stat.f_bavail * stat.f_frsize;
        let taken = usize::try_from(free.saturating_sub(left)).expect("it is small");
        // The server writes too, and may take some of it meanwhile.
        match std::fs::write(self.0.join("ballast"), vec![1; taken]) {
            Err(error) if error.kind() == ErrorKind::StorageFull => {}
            written => written.expect("it takes files"),
        }
    }

    /// Gives it back.
    ///
    /// # Panics
    /// When it was not taken.
    pub fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).expect("it was filled");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Run::new("umount").arg("--lazy").arg(&self.0).run();
    }
}
