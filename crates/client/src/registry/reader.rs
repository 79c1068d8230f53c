//! Reads a blob over as many connections as it takes
//! ([distribution-spec § Pulling blobs](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-blobs)).

use bytes::{Buf as _, Bytes};
use http::Method;
use http::header::{CONTENT_RANGE, RANGE};
use oci::Digest;

use super::Repository;
use crate::Error;
use crate::transport::Answer;

/// The bytes of a blob from some place on, in order. After a broken connection it goes on by `Range`.
///
/// It checks the length, which a registry cannot make longer than the descriptor says; the digest is
/// checked by whoever sees all bytes.
#[derive(Debug)]
pub struct BlobReader {
    repository: Repository,
    digest: Digest,
    size: u64,
    position: u64,
    answer: Option<Answer>,
    /// Bytes of the answer that lie before `position`, because the registry ignored the range.
    skip: u64,
    /// The registry answered a range with another one.
    no_range: bool,
    failures: u32,
    position_at_failure: u64,
}

impl BlobReader {
    pub(crate) fn new(repository: Repository, digest: Digest, size: u64, position: u64) -> Self {
        Self {
            repository,
            digest,
            size,
            position,
            answer: None,
            skip: 0,
            no_range: false,
            failures: 0,
            position_at_failure: position,
        }
    }

    /// Where it reads.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Where the next byte stands.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// More bytes; `None` at the end. Not cancel safe in that a wait before a new try begins anew.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the blob has another length than its descriptor says; what the connection says
    /// when it breaks too often.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let Some(answer) = &mut self.answer else {
                if self.position == self.size {
                    return Ok(None);
                }
                // Opening was repeated as often as it may be; a range out of step is another matter.
                if !self.open().await? {
                    self.no_range = true;
                    let error = Error::unreachable(&self.repository.host, OutOfStep);
                    self.fail(error).await?;
                }
                continue;
            };
            match answer.chunk().await {
                Ok(Some(mut chunk)) => {
                    let skipped = self.skip.min(chunk.len() as u64);
                    self.skip -= skipped;
                    // No longer than the chunk, so it fits.
                    chunk.advance(usize::try_from(skipped).unwrap_or(chunk.len()));
                    if chunk.is_empty() {
                        continue;
                    }
                    let end = self.position + chunk.len() as u64;
                    if end > self.size {
                        return Err(self.wrong_size(end));
                    }
                    self.position = end;
                    return Ok(Some(chunk));
                }
                Ok(None) if self.position == self.size => {
                    self.answer = None;
                }
                Ok(None) => {
                    let error = Error::unreachable(&self.repository.host, Short);
                    self.fail(error).await?;
                }
                // What follows the last byte does not matter.
                Err(_) if self.position == self.size => self.answer = None,
                Err(error) => self.fail(error).await?,
            }
        }
    }

    /// Asks for the rest of the blob; `false` when the registry answered with another part of it.
    async fn open(&mut self) -> Result<bool, Error> {
        let ranged = self.position > 0 && !self.no_range;
        let mut call = self
            .repository
            .call(Method::GET, &format!("blobs/{}", self.digest), "pull");
        if ranged {
            call = call.header(RANGE, &format!("bytes={}-", self.position));
        }
        let answer = self.repository.client.send(call).await?;
        match answer.status().as_u16() {
            200 => {
                if let Some(length) = answer.content_length()
                    && length != self.size
                {
                    return Err(self.wrong_size(length));
                }
                self.skip = self.position;
            }
            206 if ranged => {
                let (start, total) = answer
                    .header(&CONTENT_RANGE)
                    .and_then(content_range)
                    .unwrap_or((u64::MAX, None));
                if let Some(total) = total
                    && total != self.size
                {
                    return Err(self.wrong_size(total));
                }
                if start != self.position {
                    return Ok(false);
                }
                self.skip = 0;
            }
            416 if ranged => return Ok(false),
            _ => return Err(answer.into_error().await),
        }
        self.answer = Some(answer);
        Ok(true)
    }

    /// Waits before the next try, or gives up when there were enough without getting on.
    async fn fail(&mut self, error: Error) -> Result<(), Error> {
        self.answer = None;
        if !error.is_transient() {
            return Err(error);
        }
        if self.position >= self.position_at_failure + PROGRESS {
            self.failures = 0;
        }
        self.position_at_failure = self.position;
        let Some(wait) = self.repository.client.retries().wait(self.failures, None) else {
            return Err(error);
        };
        self.failures += 1;
        tracing::debug!(digest = %self.digest, position = self.position, %error, "going on with the blob");
        tokio::time::sleep(wait).await;
        Ok(())
    }

    fn wrong_size(&self, actual: u64) -> Error {
        Error::SizeMismatch {
            what: format!("{}@{}", self.repository.name, self.digest),
            expected: self.size,
            actual,
        }
    }
}

/// Start and total of `bytes 5-9/10`; the total may be `*`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim().split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

#[derive(Debug, thiserror::Error)]
#[error("the blob ended before its last byte")]
struct Short;

#[derive(Debug, thiserror::Error)]
#[error("the registry answered with another range than was asked for")]
struct OutOfStep;

/// So much must have come for a failure to count as the first one again.
const PROGRESS: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(content_range("bytes */10"), None);
        assert_eq!(content_range("5-9/10"), None);
    }

    proptest! {
        #[test]
        fn content_ranges_never_panic(text in ".{0,40}") {
            content_range(&text);
        }
    }
}
