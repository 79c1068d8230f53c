//! Layouts that are written whole, many side by side in one tree: what an export does.
//!
//! `index.json` is written once, when everything that it names is there, so a layout that was broken off lists
//! nothing that it lacks. Blobs of several layouts may be one file with several names.

use std::io;
use std::path::Path;

use bytes::Bytes;
use oci::{Descriptor, Digest, Hasher, Tag};
use serde_json::json;

use super::{
    Durable, INDEX, Layout, MARKER, REF_NAME, VERSION, durable, empty_index, encode,
    make_directory, mismatch,
};
use crate::Error;

impl Layout {
    /// Opens a layout of a tree, or makes an empty one. Directories of other layouts may lie in it.
    ///
    /// # Errors
    /// When the directory cannot be made, or holds files that are no layout's.
    pub async fn create_in_tree(root: &Path) -> Result<Self, Error> {
        let there = |path: std::path::PathBuf| async move {
            tokio::fs::try_exists(&path)
                .await
                .map_err(Error::file(&path))
        };
        if there(root.join(MARKER)).await? {
            return Self::open(root).await;
        }
        make_directory(root).await?;
        let mut entries = tokio::fs::read_dir(root).await.map_err(Error::file(root))?;
        while let Some(entry) = entries.next_entry().await.map_err(Error::file(root))? {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let kind = entry.file_type().await.map_err(Error::file(root))?;
            // What an earlier, interrupted start left here is ours.
            let ours = kind.is_dir() || name == INDEX || name.starts_with(".oci-layout.");
            if !ours {
                return Err(Error::Other(format!(
                    "`{}` holds `{name}` and is no OCI layout; name an empty or new directory",
                    root.display()
                )));
            }
        }
        make_directory(&root.join("blobs")).await?;
        let index = root.join(INDEX);
        if !there(index.clone()).await? {
            Durable::write_all(&index, &encode(&empty_index())).await?;
        }
        let marker = json!({ "imageLayoutVersion": VERSION });
        Durable::write_all(&root.join(MARKER), &encode(&marker)).await?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Replaces the whole list of `index.json`. An unchanged list is not written again.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn set_entries(&self, entries: &[(Descriptor, Option<Tag>)]) -> Result<(), Error> {
        let manifests: Vec<serde_json::Value> = entries
            .iter()
            .map(|(descriptor, tag)| {
                let mut entry = descriptor.clone();
                entry.annotations.remove(REF_NAME);
                if let Some(tag) = tag {
                    entry
                        .annotations
                        .insert(REF_NAME.to_owned(), tag.as_str().to_owned());
                }
                // A descriptor always serialises.
                serde_json::to_value(entry).unwrap_or_default()
            })
            .collect();
        let mut index = empty_index();
        if let Some(map) = index.as_object_mut() {
            map.insert("manifests".to_owned(), manifests.into());
        }
        let content = encode(&index);
        let path = self.root.join(INDEX);
        match tokio::fs::read(&path).await {
            Ok(there) if there == content => Ok(()),
            _ => Durable::write_all(&path, &content).await,
        }
    }

    /// Makes a blob of another layout a blob of this one too: one file with two names. `false` when the other lacks
    /// it, or where the file system cannot; both must be trusted to hold what they say.
    ///
    /// # Errors
    /// When a directory cannot be made.
    pub async fn link_blob(&self, descriptor: &Descriptor, other: &Self) -> Result<bool, Error> {
        if !other.has_blob(descriptor).await? {
            return Ok(false);
        }
        let to = self.prepare(&descriptor.digest).await?;
        match tokio::fs::hard_link(other.blob_path(&descriptor.digest), &to).await {
            Ok(()) => {
                durable::sync_parent(&to).await?;
                Ok(true)
            }
            // A file of another length: it is written over.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => {
                tracing::debug!(%error, digest = %descriptor.digest, "a blob is not shared");
                Ok(false)
            }
        }
    }

    /// Starts to write a blob.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub async fn blob_writer(&self, digest: &Digest) -> Result<BlobWriter, Error> {
        let path = self.prepare(digest).await?;
        Ok(BlobWriter {
            hasher: Hasher::new(digest.algorithm()),
            file: Durable::create(&path).await?,
            path,
        })
    }
}

/// A blob on its way into a layout. It is in place after [`BlobWriter::commit`], else nothing of it stays.
#[derive(Debug)]
pub struct BlobWriter {
    path: std::path::PathBuf,
    hasher: Hasher,
    file: Durable,
}

impl BlobWriter {
    /// Takes in the next bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub async fn write(&mut self, chunk: &Bytes) -> Result<(), Error> {
        self.hasher.update(chunk);
        self.file.write(chunk).await
    }

    /// Verifies the digest of all bytes and puts the file in its place, durably.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`].
    pub async fn commit(self, digest: &Digest) -> Result<(), Error> {
        let actual = self.hasher.finish();
        if actual != *digest {
            return Err(mismatch(&self.path, digest, &actual));
        }
        self.file.commit().await
    }
}
