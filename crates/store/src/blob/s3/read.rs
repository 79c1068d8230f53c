//! Reading an object: one GET, and when it breaks, another one from where it stopped.
//!
//! What is served is exactly as long as the database says, or the stream ends with an error: a short, a long or a
//! changed object is never taken for a whole one.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::{GetOptions, GetRange, ObjectStore};

use super::failure::{attempts, limited, pause};
use super::{CONTROL, Failure, S3};
use crate::blob::StorageKey;
use crate::error::{Error, MISSING};

/// An object in an object store, of a known size.
#[derive(Clone, Debug)]
pub struct RemoteBlob {
    s3: S3,
    key: StorageKey,
    size: u64,
}

impl RemoteBlob {
    pub(crate) fn new(s3: S3, key: StorageKey, size: u64) -> Self {
        Self { s3, key, size }
    }

    /// Starts to read a range, which must lie within the object. When this returns, the first answer is good.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Damaged`] when the object is not there or not of its size.
    pub async fn stream(&self, range: Range<u64>) -> Result<RemoteStream, Error> {
        let mut stream = RemoteStream {
            blob: self.clone(),
            at: range.start,
            end: range.end.min(self.size),
            etag: None,
            body: None,
            broken: 0,
            since: 0,
        };
        if stream.at < stream.end {
            stream.body = Some(stream.open().await?);
        }
        Ok(stream)
    }

    /// A URL with which anybody may read the whole object for `ttl`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when there are no credentials to sign with.
    pub async fn presign(&self, ttl: Duration) -> Result<String, Error> {
        self.s3.presign(&self.key, ttl).await
    }
}

/// The bytes of a range of an object. Nothing is read ahead: who does not ask, does not receive.
pub struct RemoteStream {
    blob: RemoteBlob,
    at: u64,
    end: u64,
    etag: Option<String>,
    body: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    /// Answers that broke off since bytes last came.
    broken: usize,
    /// Bytes since then.
    since: u64,
}

impl RemoteStream {
    /// How many bytes are still to come.
    pub fn remaining(&self) -> u64 {
        self.end - self.at
    }

    /// The next bytes, `None` at the end.
    ///
    /// Cancel safety: nothing is lost when the caller goes away.
    ///
    /// # Errors
    /// As [`RemoteBlob::stream`], after a bounded number of attempts. The stream is then of no more use.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.at == self.end {
                return Ok(None);
            }
            let Some(body) = &mut self.body else {
                self.body = Some(self.open().await?);
                continue;
            };
            let problem = match tokio::time::timeout(READ, body.next()).await {
                Ok(Some(Ok(bytes))) if bytes.is_empty() => continue,
                Ok(Some(Ok(bytes))) => {
                    if bytes.len() as u64 > self.end - self.at {
                        return Err(self.damaged("more bytes came than were asked for"));
                    }
                    self.at += bytes.len() as u64;
                    self.since += bytes.len() as u64;
                    if self.since > PROGRESS {
                        self.broken = 0;
                    }
                    return Ok(Some(bytes));
                }
                Ok(Some(Err(error))) => Failure::from(error).to_string(),
                Ok(None) => "the answer ended too early".to_owned(),
                Err(_) => format!("no bytes came for {} s", READ.as_secs()),
            };
            tracing::debug!(
                problem,
                at = self.at,
                "reading an object broke off, it goes on from there"
            );
            self.body = None;
            self.since = 0;
            if !pause(self.broken).await {
                return Err(Failure::Again(problem).into());
            }
            self.broken += 1;
        }
    }

    /// One GET of what is still to come.
    async fn open(&mut self) -> Result<BoxStream<'static, object_store::Result<Bytes>>, Error> {
        let whole = self.at == 0 && self.end == self.blob.size;
        let path = self.blob.s3.path(&self.blob.key);
        let store = &self.blob.s3.0.store;
        let got = attempts(|| {
            let options = GetOptions {
                range: (!whole).then_some(GetRange::Bounded(self.at..self.end)),
                ..GetOptions::default()
            };
            async {
                let got = limited(CONTROL, store.get_opts(&path, options)).await?;
                if got.meta.size != self.blob.size {
                    let found = got.meta.size;
                    return Err(Failure::Again(format!(
                        "it has {found} bytes, not {}",
                        self.blob.size
                    )));
                }
                Ok(got)
            }
        })
        .await;
        let got = match got {
            Ok(got) => got,
            Err(Failure::Missing(_)) => {
                return Err(self.damaged(MISSING));
            }
            Err(failure) => return Err(failure.into()),
        };
        let etag = got.meta.e_tag.clone();
        if self.etag.is_some() && self.etag != etag {
            return Err(self.damaged("it was changed while it was read"));
        }
        self.etag = etag;
        Ok(got.into_stream())
    }

    fn damaged(&self, problem: &str) -> Error {
        Error::damaged(&self.blob.s3.describe(&self.blob.key), problem)
    }
}

impl std::fmt::Debug for RemoteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteStream")
            .field("blob", &self.blob)
            .field("at", &self.at)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

/// How long no bytes may come.
const READ: Duration = Duration::from_secs(15);
/// After this many bytes an answer that broke off is forgotten.
const PROGRESS: u64 = 1 << 20;
