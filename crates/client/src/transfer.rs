//! Copies of whole artifacts, between registries and OCI layout directories, and artifacts made of
//! local files.
//!
//! The order makes a broken copy harmless: blobs, then manifests from the leaves up, then what refers
//! to them, and the tag last. Whoever resolves the tag finds everything.

mod copy;
mod files;
mod side;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oci::reference::TagOrDigest;
use oci::{Digest, Reference, Tag};

pub use copy::copy;
pub use files::{Artifact, FileLayer, PulledFiles, TITLE, pull_files, push_files};

use crate::Error;

/// A source or destination: a registry, or an OCI layout directory (`oci:DIR[:tag|@digest]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A registry.
    Registry(Reference),
    /// A layout directory, with a tag or digest in it.
    Layout {
        /// The directory.
        path: PathBuf,
        /// The tag (`org.opencontainers.image.ref.name`).
        tag: Option<Tag>,
        /// The digest.
        digest: Option<Digest>,
    },
}

impl Location {
    /// The digest, else the tag, when either is named. A registry reference without both means
    /// nothing here: a program that guesses `latest` copies what nobody named.
    fn named(&self) -> Option<TagOrDigest> {
        let digest = self.digest().cloned().map(TagOrDigest::Digest);
        digest.or_else(|| self.tag().cloned().map(TagOrDigest::Tag))
    }

    /// The tag.
    pub fn tag(&self) -> Option<&Tag> {
        match self {
            Self::Registry(reference) => reference.tag.as_ref(),
            Self::Layout { tag, .. } => tag.as_ref(),
        }
    }

    /// The digest.
    pub fn digest(&self) -> Option<&Digest> {
        match self {
            Self::Registry(reference) => reference.digest.as_ref(),
            Self::Layout { digest, .. } => digest.as_ref(),
        }
    }
}

impl FromStr for Location {
    type Err = Error;

    /// What follows the last colon of `oci:DIR` is a tag when it can be one, so a directory whose name
    /// ends in such a part is written with a `/` at its end.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(rest) = text.strip_prefix("oci:") else {
            return text
                .parse()
                .map(Self::Registry)
                .map_err(|error| Error::Other(format!("{error}, or `oci:DIR[:tag]`")));
        };
        let (rest, digest) = match rest.rsplit_once('@') {
            Some((before, digest)) if digest.contains(':') => {
                let digest = digest
                    .parse()
                    .map_err(|error| Error::Other(format!("{error}")))?;
                (before, Some(digest))
            }
            _ => (rest, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => {
                let tag = tag
                    .parse()
                    .map_err(|error| Error::Other(format!("{error}")))?;
                (path, Some(tag))
            }
            _ => (rest, None),
        };
        if path.is_empty() {
            return Err(Error::Other(format!(
                "`{text}` names no directory, expected `oci:DIR[:tag|@digest]`"
            )));
        }
        Ok(Self::Layout {
            path: PathBuf::from(path),
            tag,
            digest,
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout { path, tag, digest } => {
                write!(f, "oci:{}", path.display())?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                if let Some(digest) = digest {
                    write!(f, "@{digest}")?;
                }
                Ok(())
            }
        }
    }
}

/// What to copy besides the artifact, and how. An index is always copied whole, never one platform of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// All referrers and cosign tags of every manifest copied.
    pub referrers: bool,
    /// How many requests and blobs move at one time; 0 counts as 1.
    pub parallel: usize,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            referrers: true,
            parallel: 4,
        }
    }
}

/// Receives progress; called from several tasks.
pub trait Progress: Send + Sync {
    /// A blob of `size` bytes starts.
    fn start(&self, digest: &Digest, size: u64);
    /// So many more bytes of it moved.
    fn advance(&self, digest: &Digest, bytes: u64);
    /// It is done; `skipped` when it was there already or mounted.
    fn finish(&self, digest: &Digest, skipped: bool);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _digest: &Digest, _size: u64) {}
    fn advance(&self, _digest: &Digest, _bytes: u64) {}
    fn finish(&self, _digest: &Digest, _skipped: bool) {}
}

/// What a copy did.
#[derive(Clone, Debug)]
pub struct CopyReport {
    /// The root manifest.
    pub digest: Digest,
    /// Manifests written.
    pub manifests: u64,
    /// Blobs moved.
    pub blobs: u64,
    /// Blobs that were there.
    pub skipped: u64,
    /// Bytes moved.
    pub bytes: u64,
}

#[cfg(test)]
mod tests;
