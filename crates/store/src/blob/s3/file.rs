//! Small files of the store beside the objects: exports.

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutOptions, PutPayload};

use super::failure::{attempts, limited};
use super::{CONTROL, Failure, S3, transfer};
use crate::error::Error;

impl S3 {
    /// Writes a small file whole.
    pub(crate) async fn put_file(&self, place: &str, bytes: Bytes) -> Result<(), Error> {
        let path = Path::from(self.prefixed(place));
        let limit = transfer(bytes.len() as u64);
        let payload = PutPayload::from(bytes);
        attempts(|| {
            limited(
                limit,
                self.0
                    .store
                    .put_opts(&path, payload.clone(), PutOptions::default()),
            )
        })
        .await?;
        Ok(())
    }

    /// Reads a small file.
    pub(crate) async fn read_file(&self, place: &str) -> Result<Bytes, Error> {
        let path = Path::from(self.prefixed(place));
        let read = || async {
            let answer = self.0.store.get(&path).await?;
            answer.bytes().await
        };
        Ok(attempts(|| limited(CONTROL, read())).await?)
    }

    /// Reads a small file, `None` when there is none.
    pub(crate) async fn find_file(&self, place: &str) -> Result<Option<Bytes>, Error> {
        let path = Path::from(self.prefixed(place));
        let read = || async {
            let answer = self.0.store.get(&path).await?;
            answer.bytes().await
        };
        match attempts(|| limited(CONTROL, read())).await {
            Ok(bytes) => Ok(Some(bytes)),
            // Without the right to list, what is not there is forbidden.
            Err(Failure::Missing(_) | Failure::Refused(_)) => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }

    /// The bucket and prefix, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    /// The names of the files right below a place.
    pub(crate) async fn list_files(&self, place: &str) -> Result<Vec<String>, Error> {
        let root = Path::from(self.prefixed(place));
        let mut files = self.0.store.list(Some(&root));
        let mut names = Vec::new();
        while let Some(file) = files.next().await {
            let location = file.map_err(Failure::from)?.location;
            names.extend(location.filename().map(str::to_owned));
        }
        Ok(names)
    }

    /// Removes a file. What is gone already is no error.
    pub(crate) async fn remove_file(&self, place: &str) -> Result<(), Error> {
        let path = Path::from(self.prefixed(place));
        match attempts(|| limited(CONTROL, self.0.single.delete(&path))).await {
            Ok(()) | Err(Failure::Missing(_)) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }
}
