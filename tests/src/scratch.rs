//! Temporary directories that stay when the test failed.

use std::path::{Path, PathBuf};

/// A temporary directory, removed at the end of a test that passed and kept, with its path
/// printed, at the end of one that failed.
#[derive(Debug)]
pub struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    /// Makes an empty directory.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("longshore-e2e-")
            .tempdir()
            .expect("a temporary directory can be made");
        Self(Some(dir))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        // Invariant: the option is emptied by `drop` alone.
        self.0
            .as_ref()
            .expect("the directory lives as long as this value")
            .path()
    }

    /// The path of `name` in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file, making its parents, and gives back its path.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).expect("a scratch directory can be made");
        }
        std::fs::write(&path, bytes).expect("a scratch file can be written");
        path
    }

    /// Makes a directory in it and gives back its path.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        std::fs::create_dir_all(&path).expect("a scratch directory can be made");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(dir) = self.0.take()
        {
            eprintln!("kept for inspection: {}", dir.keep().display());
        }
    }
}
