//! Blobs: asked for, read, downloaded, deleted.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use http::Method;
use oci::{Descriptor, Digest, Hasher};

use super::reader::BlobReader;
use super::{Progress, Repository};
use crate::Error;
use crate::layout::Durable;

impl Repository {
    /// HEAD of a blob; its size, `None` on 404.
    ///
    /// # Errors
    /// Any answer but 200 and 404, or one that does not tell the size.
    pub async fn head_blob(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        match self.blob_state(digest).await? {
            None => Ok(None),
            Some(Some(size)) => Ok(Some(size)),
            Some(None) => Err(Error::Other(format!(
                "`{}` does not tell the size of `{digest}`",
                self.host
            ))),
        }
    }

    /// Tells whether the registry has a blob.
    pub(crate) async fn has_blob(&self, digest: &Digest) -> Result<bool, Error> {
        Ok(self.blob_state(digest).await?.is_some())
    }

    async fn blob_state(&self, digest: &Digest) -> Result<Option<Option<u64>>, Error> {
        let call = self.call(Method::HEAD, &format!("blobs/{digest}"), "pull");
        let answer = self.client.send(call).await?;
        match answer.status().as_u16() {
            200 => Ok(Some(answer.content_length())),
            404 => Ok(None),
            _ => Err(answer.into_error().await),
        }
    }

    /// A whole small blob in memory, at most `limit` bytes, verified.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`], [`Error::DigestMismatch`], and a blob longer than `limit`, for which
    /// nothing is asked.
    pub async fn blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Bytes, Error> {
        if descriptor.size > limit as u64 {
            return Err(Error::Other(format!(
                "`{}@{}` has {} bytes, more than the {limit} that are read",
                self.name, descriptor.digest, descriptor.size
            )));
        }
        let mut reader = self.reader(descriptor);
        let mut whole = BytesMut::new();
        while let Some(chunk) = reader.next().await? {
            whole.extend_from_slice(&chunk);
        }
        let mut hasher = Hasher::new(descriptor.digest.algorithm());
        hasher.update(&whole);
        self.check(descriptor, hasher)?;
        Ok(whole.freeze())
    }

    /// Downloads a blob to a file: resumed by Range after a broken connection, size and digest verified
    /// over the whole body, made durable, then in place.
    ///
    /// Nothing stands at `path` before all of it was verified. What was there is replaced.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] (told as soon as the registry states another length),
    /// [`Error::DigestMismatch`], [`Error::File`].
    ///
    /// # Cancel safety
    /// When dropped, the temporary file beside `path` is removed.
    pub async fn blob_to_file(&self, descriptor: &Descriptor, path: &Path) -> Result<(), Error> {
        self.download(descriptor, path, &|_| ()).await
    }

    pub(crate) async fn download(
        &self,
        descriptor: &Descriptor,
        path: &Path,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let mut reader = self.reader(descriptor);
        let mut hasher = Hasher::new(descriptor.digest.algorithm());
        let mut file = Durable::create(path).await?;
        while let Some(chunk) = reader.next().await? {
            hasher.update(&chunk);
            file.write(&chunk).await?;
            progress(chunk.len() as u64);
        }
        self.check(descriptor, hasher)?;
        file.commit().await
    }

    /// Reads a blob piece by piece: resumed by Range after a broken connection, its length checked, its digest left
    /// to whoever sees all bytes.
    pub fn read_blob(&self, descriptor: &Descriptor) -> BlobReader {
        self.reader(descriptor)
    }

    /// DELETE of a blob.
    ///
    /// # Errors
    /// [`Error::NotFound`], and [`Error::Unsupported`] where the registry deletes no blobs.
    pub async fn delete_blob(&self, digest: &Digest) -> Result<(), Error> {
        let call = self.call(Method::DELETE, &format!("blobs/{digest}"), "delete");
        let answer = self.client.send(call).await?;
        match answer.status().as_u16() {
            200..=299 => Ok(()),
            405 | 501 => Err(Error::Unsupported(self.host.clone())),
            _ => Err(answer.into_error().await),
        }
    }

    fn reader(&self, descriptor: &Descriptor) -> BlobReader {
        BlobReader::new(self.clone(), descriptor.digest.clone(), descriptor.size, 0)
    }

    fn check(&self, descriptor: &Descriptor, hasher: Hasher) -> Result<(), Error> {
        let actual = hasher.finish();
        if actual == descriptor.digest {
            return Ok(());
        }
        Err(Error::DigestMismatch {
            what: format!("{}@{}", self.name, descriptor.digest),
            expected: descriptor.digest.clone(),
            actual: actual.to_string(),
        })
    }
}
