//! Uploads: mounted, in one request, or in chunks that go on where they broke off
//! ([distribution-spec § Pushing blobs](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-blobs)).
//!
//! After any failure the registry is asked what it has; what was sent but not confirmed counts for
//! nothing. A session that is lost is started anew a few times, one that is given up is cancelled.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::header::{CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, HeaderName, Method};
use oci::{Descriptor, Digest, RepositoryName};
use reqwest::Url;

use super::{FileContent, OpenContent, RemoteContent, Repository};
use crate::Error;
use crate::error::is_transient_status;
use crate::transport::{Answer, Body, Lack, Scopes, Source, Target};

impl Repository {
    /// Uploads bytes unless the registry has them.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] or [`Error::DigestMismatch`] when `content` is not what `descriptor`
    /// says; nothing is sent then.
    pub async fn put_blob(&self, descriptor: &Descriptor, content: Bytes) -> Result<(), Error> {
        check_bytes(descriptor, &content)?;
        self.upload(descriptor, &Payload::Bytes(content), None, &|_| ())
            .await
            .map(drop)
    }

    /// Uploads a file in resumable chunks unless the registry has it.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] when the file has another length. Another digest is found out by the
    /// registry, which refuses it.
    pub async fn put_blob_file(&self, descriptor: &Descriptor, path: &Path) -> Result<(), Error> {
        let content = FileContent::new(path, descriptor.size).await?;
        self.upload(
            descriptor,
            &Payload::Source(Arc::new(content)),
            None,
            &|_| (),
        )
        .await
        .map(drop)
    }

    /// As [`Repository::put_blob_file`], from a file that is open. Its position is neither used nor moved.
    ///
    /// # Errors
    /// As there.
    pub async fn put_blob_open(
        &self,
        descriptor: &Descriptor,
        file: std::fs::File,
    ) -> Result<(), Error> {
        let content = OpenContent::new(file, descriptor)?;
        let payload = Payload::Source(Arc::new(content));
        self.upload(descriptor, &payload, None, &|_| ())
            .await
            .map(drop)
    }

    /// Brings a blob out of another repository unless it is there: mounted where both are of one host, else read and
    /// sent piece by piece, its digest checked on the way. `false` when no byte had to move.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`] and [`Error::SizeMismatch`] of what `from` gives; what either registry answers.
    pub async fn copy_blob(&self, descriptor: &Descriptor, from: &Self) -> Result<bool, Error> {
        self.copy_blob_with(descriptor, from, &|_| ()).await
    }

    pub(crate) async fn copy_blob_with(
        &self,
        descriptor: &Descriptor,
        from: &Self,
        progress: Progress<'_>,
    ) -> Result<bool, Error> {
        let same_host = from.host == self.host;
        if same_host && from.name == self.name {
            return Ok(false);
        }
        let content = RemoteContent::new(from.clone(), descriptor.clone());
        let payload = Payload::Source(Arc::new(content));
        let mount = same_host.then_some(&from.name);
        let outcome = self.upload(descriptor, &payload, mount, progress).await?;
        Ok(outcome == Outcome::Uploaded)
    }

    /// Mounts a blob from another repository of this registry; `false` when the registry will not.
    ///
    /// # Errors
    /// No answer. A refusal is no error.
    pub async fn mount_blob(&self, digest: &Digest, from: &RepositoryName) -> Result<bool, Error> {
        match self.mount(digest, from).await? {
            Mount::Mounted => Ok(true),
            Mount::Session(session) => {
                self.cancel(&session).await;
                Ok(false)
            }
            Mount::Refused => Ok(false),
        }
    }

    /// Brings a blob into this repository: it is there, it is mounted from `from`, or it is sent.
    pub(crate) async fn upload(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        from: Option<&RepositoryName>,
        progress: Progress<'_>,
    ) -> Result<Outcome, Error> {
        if self.has_blob(&descriptor.digest).await? {
            return Ok(Outcome::Existed);
        }
        let mut session = None;
        if let Some(from) = from {
            match self.mount(&descriptor.digest, from).await? {
                Mount::Mounted => return Ok(Outcome::Mounted),
                Mount::Session(begun) => session = Some(begun),
                Mount::Refused => {}
            }
        }
        let sent = Watermark::new(progress);
        let mut round = 0;
        loop {
            let error = match self
                .transmit(descriptor, payload, session.take(), &sent)
                .await
            {
                Ok(()) => return Ok(Outcome::Uploaded),
                Err(Stop::Fatal(error)) => return Err(error),
                Err(Stop::Restart(error)) => error,
            };
            round += 1;
            if round == MAX_ROUNDS {
                return Err(error);
            }
            tracing::debug!(digest = %descriptor.digest, %error, "starting the upload anew");
            self.pause(round, None).await;
        }
    }

    async fn mount(&self, digest: &Digest, from: &RepositoryName) -> Result<Mount, Error> {
        let mut call = self.call(
            Method::POST,
            &format!("blobs/uploads/?mount={digest}&from={from}"),
            "pull,push",
        );
        call.scopes = call
            .scopes
            .union(&Scopes::repository(from.as_str(), "pull"));
        let answer = match self.client.send(call).await {
            Ok(answer) => answer,
            // No right to the other repository: then it is sent.
            Err(Error::Unauthorized { .. }) => return Ok(Mount::Refused),
            Err(error) => return Err(error),
        };
        Ok(match answer.status().as_u16() {
            201 => Mount::Mounted,
            202 => self.session(&answer).map_or(Mount::Refused, Mount::Session),
            _ => Mount::Refused,
        })
    }

    async fn transmit(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        session: Option<Session>,
        sent: &Watermark<'_>,
    ) -> Result<(), Stop> {
        let mut session = session;
        if session.is_none()
            && descriptor.size <= SINGLE_POST
            && !self.client.lacks(&self.host, Lack::SinglePost)
        {
            match self.single_post(descriptor, payload, sent).await? {
                SinglePost::Done => return Ok(()),
                SinglePost::Session(begun) => session = Some(begun),
                SinglePost::Refused => {}
            }
        }
        let mut session = match session {
            Some(session) => session,
            None => self.begin().await.map_err(Stop::Fatal)?,
        };
        let chunk = CHUNK.max(session.min_chunk);
        let whole = descriptor.size <= chunk || self.client.lacks(&self.host, Lack::Chunks);
        let result = if whole {
            self.put_whole(descriptor, payload, &session, sent).await
        } else {
            self.put_chunks(descriptor, payload, &mut session, chunk, sent)
                .await
        };
        let result = match result {
            // The reason may lie with what the bytes come from.
            Err(stop) => match payload.verify() {
                Err(error) => Err(Stop::Fatal(error)),
                Ok(()) => Err(stop),
            },
            done => done,
        };
        if result.is_err() {
            self.cancel(&session).await;
        }
        result
    }

    /// Everything in one POST. A registry that does not know this form answers 202 and begins a
    /// session, or refuses.
    async fn single_post(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        sent: &Watermark<'_>,
    ) -> Result<SinglePost, Stop> {
        let report = |bytes| sent.report(0, bytes);
        let mut call = self
            .call(
                Method::POST,
                &format!("blobs/uploads/?digest={}", descriptor.digest),
                "pull,push",
            )
            .header(CONTENT_TYPE, OCTETS)
            .body(payload.part(0, descriptor.size));
        call.progress = Some(&report);
        let answer = match self.client.send(call).await {
            Ok(answer) => answer,
            Err(error) => {
                return Err(Stop::Fatal(match payload.verify() {
                    Err(own) => own,
                    Ok(()) => error,
                }));
            }
        };
        match answer.status().as_u16() {
            202 => {
                self.client.note_lack(&self.host, Lack::SinglePost);
                Ok(self
                    .session(&answer)
                    .map_or(SinglePost::Refused, SinglePost::Session))
            }
            200..=299 => Ok(SinglePost::Done),
            405 | 411 | 415 | 501 => {
                self.client.note_lack(&self.host, Lack::SinglePost);
                Ok(SinglePost::Refused)
            }
            400 | 404 | 413 => Ok(SinglePost::Refused),
            _ => Err(Stop::Fatal(answer.into_error().await)),
        }
    }

    async fn begin(&self) -> Result<Session, Error> {
        let answer = self
            .client
            .send(self.call(Method::POST, "blobs/uploads/", "pull,push"))
            .await?;
        if !answer.status().is_success() {
            return Err(answer.into_error().await);
        }
        self.session(&answer).ok_or_else(|| {
            Error::Other(format!(
                "`{}` began an upload without a usable `Location`",
                self.host
            ))
        })
    }

    fn session(&self, answer: &Answer) -> Option<Session> {
        Some(Session {
            location: self.location(answer)?,
            min_chunk: answer
                .header(&CHUNK_MIN_LENGTH)
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0),
        })
    }

    /// Where the upload goes on, as the registry says.
    fn location(&self, answer: &Answer) -> Option<Url> {
        let location = resolve(answer.url(), answer.header(&LOCATION)?)?;
        self.client
            .permit(&self.host, answer.url(), &location)
            .ok()?;
        Some(location)
    }

    /// One PUT with all bytes.
    async fn put_whole(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        session: &Session,
        sent: &Watermark<'_>,
    ) -> Result<(), Stop> {
        let report = |bytes| sent.report(0, bytes);
        let mut call = self
            .call(Method::PUT, "blobs/uploads/", "pull,push")
            .header(CONTENT_TYPE, OCTETS)
            .body(payload.part(0, descriptor.size))
            .once();
        call.target = Target::Url(with_digest(&session.location, &descriptor.digest));
        call.progress = Some(&report);
        let outcome = self.client.send(call).await;
        self.finished(descriptor, outcome).await
    }

    /// Judges the answer to the PUT that ends an upload.
    async fn finished(
        &self,
        descriptor: &Descriptor,
        outcome: Result<Answer, Error>,
    ) -> Result<(), Stop> {
        let error = match outcome {
            Ok(answer) => match answer.status().as_u16() {
                202 => Error::Other(format!(
                    "`{}` accepted the last byte of `{}` but did not finish the upload",
                    self.host, descriptor.digest
                )),
                200..=299 => return Ok(()),
                status if status == 404 || status == 416 || is_transient_status(status) => {
                    let error = answer.into_error().await;
                    if status == 429 {
                        // Asked to slow down: the next round waits.
                        return Err(Stop::Restart(error));
                    }
                    error
                }
                _ => return Err(Stop::Fatal(answer.into_error().await)),
            },
            Err(error) if error.is_transient() => error,
            Err(error) => return Err(Stop::Fatal(error)),
        };
        // The answer may be lost while the blob is there.
        match self.has_blob(&descriptor.digest).await {
            Ok(true) => Ok(()),
            _ => Err(Stop::Restart(error)),
        }
    }

    /// PATCH by PATCH, then an empty PUT.
    async fn put_chunks(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        session: &mut Session,
        chunk: u64,
        sent: &Watermark<'_>,
    ) -> Result<(), Stop> {
        let mut offset = 0;
        let mut failures = 0;
        loop {
            while offset < descriptor.size {
                let length = chunk.min(descriptor.size - offset);
                let next = self
                    .patch(descriptor, payload, session, offset, length, sent)
                    .await?;
                let (next, wait) = match next {
                    Patched::To(next) => (next, None),
                    Patched::Failed(error, headers) => {
                        let Some(next) = self.status(session).await.map_err(Stop::Fatal)? else {
                            return Err(Stop::Restart(error));
                        };
                        if next > descriptor.size {
                            return Err(Stop::Restart(error));
                        }
                        if failures >= self.client.retries().count {
                            return Err(Stop::Fatal(error));
                        }
                        tracing::debug!(%error, offset, next, "going on with the upload");
                        (next, Some(headers))
                    }
                };
                if next > offset {
                    failures = 0;
                } else {
                    failures += 1;
                    if failures > self.client.retries().count {
                        return Err(Stop::Restart(Error::Other(format!(
                            "`{}` does not take the upload further than byte {offset}",
                            self.host
                        ))));
                    }
                }
                if let Some(headers) = wait {
                    self.pause(failures, headers.as_ref()).await;
                }
                offset = next;
            }
            payload.verify().map_err(Stop::Fatal)?;
            let mut call = self
                .call(Method::PUT, "blobs/uploads/", "pull,push")
                .header(CONTENT_TYPE, OCTETS)
                .once();
            call.target = Target::Url(with_digest(&session.location, &descriptor.digest));
            let outcome = self.client.send(call).await;
            let stop = match self.finished(descriptor, outcome).await {
                Err(Stop::Restart(error)) => error,
                done => return done,
            };
            // Perhaps only the answer was lost, or the registry was busy: what does it have?
            failures += 1;
            match self.status(session).await {
                Ok(Some(next))
                    if next <= descriptor.size && failures <= self.client.retries().count =>
                {
                    self.pause(failures, None).await;
                    offset = next;
                }
                _ => return Err(Stop::Restart(stop)),
            }
        }
    }

    async fn patch(
        &self,
        descriptor: &Descriptor,
        payload: &Payload,
        session: &mut Session,
        offset: u64,
        length: u64,
        sent: &Watermark<'_>,
    ) -> Result<Patched, Stop> {
        let so_far = AtomicU64::new(0);
        let report = |bytes| {
            let before = so_far.fetch_add(bytes, Ordering::Relaxed);
            sent.report(offset + before, bytes);
        };
        let mut call = self
            .call(Method::PATCH, "blobs/uploads/", "pull,push")
            .header(CONTENT_TYPE, OCTETS)
            .header(CONTENT_RANGE, &format!("{offset}-{}", offset + length - 1))
            .body(payload.part(offset, length))
            .once();
        call.target = Target::Url(session.location.clone());
        call.progress = Some(&report);
        let answer = match self.client.send(call).await {
            Ok(answer) => answer,
            Err(error) => {
                return match payload.verify() {
                    Err(own) => Err(Stop::Fatal(own)),
                    Ok(()) if error.is_transient() => Ok(Patched::Failed(error, None)),
                    Ok(()) => Err(Stop::Fatal(error)),
                };
            }
        };
        let status = answer.status().as_u16();
        match status {
            200..=299 => {
                let end = offset + length;
                let next = match answer.header(&RANGE).map(next_offset) {
                    // No range, or one that says nothing: all of it was taken.
                    None | Some(None) => end,
                    Some(Some(next)) => next,
                };
                if let Some(location) = self.location(&answer) {
                    session.location = location;
                }
                if next > end || next > descriptor.size {
                    return Err(Stop::Restart(Error::Other(format!(
                        "`{}` says it has {next} bytes of an upload that sent {end}",
                        self.host
                    ))));
                }
                Ok(Patched::To(next))
            }
            404 => Err(Stop::Restart(answer.into_error().await)),
            400 | 405 | 411 | 415 | 501 if offset == 0 => {
                self.client.note_lack(&self.host, Lack::Chunks);
                Err(Stop::Restart(answer.into_error().await))
            }
            status if status == 416 || is_transient_status(status) => {
                let headers = answer.headers().clone();
                Ok(Patched::Failed(answer.into_error().await, Some(headers)))
            }
            _ => Err(Stop::Fatal(answer.into_error().await)),
        }
    }

    /// How many bytes the registry has; `None` when it does not know the upload.
    async fn status(&self, session: &mut Session) -> Result<Option<u64>, Error> {
        let mut call = self.call(Method::GET, "blobs/uploads/", "pull,push");
        call.target = Target::Url(session.location.clone());
        let answer = self.client.send(call).await?;
        if !answer.status().is_success() {
            return Ok(None);
        }
        if let Some(location) = self.location(&answer) {
            session.location = location;
        }
        Ok(Some(
            answer.header(&RANGE).and_then(next_offset).unwrap_or(0),
        ))
    }

    /// Tells the registry that nothing more comes. It would find out by itself.
    async fn cancel(&self, session: &Session) {
        let mut call = self
            .call(Method::DELETE, "blobs/uploads/", "pull,push")
            .once();
        call.target = Target::Url(session.location.clone());
        if let Err(error) = self.client.send(call).await {
            tracing::debug!(%error, "the upload was not cancelled");
        }
    }

    async fn pause(&self, attempt: u32, headers: Option<&HeaderMap>) {
        let retries = self.client.retries();
        let wait = retries
            .wait(
                attempt
                    .saturating_sub(1)
                    .min(retries.count.saturating_sub(1)),
                headers,
            )
            .unwrap_or(retries.longest);
        tokio::time::sleep(wait).await;
    }
}

/// How a blob came into a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was there.
    Existed,
    /// It was taken from another repository of the registry.
    Mounted,
    /// Its bytes were sent.
    Uploaded,
}

/// Told how many more bytes moved.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// What is uploaded.
#[derive(Clone, Debug)]
pub(crate) enum Payload {
    Bytes(Bytes),
    Source(Arc<dyn Source>),
}

impl Payload {
    fn part(&self, offset: u64, length: u64) -> Body {
        match self {
            Self::Bytes(bytes) => {
                let index =
                    |at: u64| usize::try_from(at).map_or(bytes.len(), |at| at.min(bytes.len()));
                Body::Bytes(bytes.slice(index(offset)..index(offset + length)))
            }
            Self::Source(source) => Body::Part {
                source: source.clone(),
                offset,
                length: length.min(source.length().saturating_sub(offset)),
            },
        }
    }

    fn verify(&self) -> Result<(), Error> {
        match self {
            Self::Bytes(_) => Ok(()),
            Self::Source(source) => source.verify(),
        }
    }
}

/// Tells each byte once, also when a part is sent again.
struct Watermark<'a> {
    progress: Progress<'a>,
    highest: AtomicU64,
}

impl<'a> Watermark<'a> {
    fn new(progress: Progress<'a>) -> Self {
        Self {
            progress,
            highest: AtomicU64::new(0),
        }
    }

    /// `bytes` bytes from `offset` were sent.
    fn report(&self, offset: u64, bytes: u64) {
        let end = offset + bytes;
        let before = self.highest.fetch_max(end, Ordering::Relaxed);
        if end > before {
            (self.progress)(end - before);
        }
    }
}

struct Session {
    location: Url,
    min_chunk: u64,
}

enum Mount {
    Mounted,
    Session(Session),
    Refused,
}

enum SinglePost {
    Done,
    Session(Session),
    Refused,
}

enum Patched {
    To(u64),
    Failed(Error, Option<HeaderMap>),
}

/// Why an upload stopped.
enum Stop {
    /// The session is of no more use, a new one may be.
    Restart(Error),
    /// Trying again here is of no use.
    Fatal(Error),
}

fn check_bytes(descriptor: &Descriptor, content: &[u8]) -> Result<(), Error> {
    if descriptor.size != content.len() as u64 {
        return Err(Error::SizeMismatch {
            what: descriptor.digest.to_string(),
            expected: descriptor.size,
            actual: content.len() as u64,
        });
    }
    let actual = Digest::of(descriptor.digest.algorithm(), content);
    if actual != descriptor.digest {
        return Err(Error::DigestMismatch {
            what: descriptor.digest.to_string(),
            expected: descriptor.digest.clone(),
            actual: actual.to_string(),
        });
    }
    Ok(())
}

/// Reads a `Location`, relative or absolute.
///
/// A registry behind a proxy that ends TLS often names itself `http://`; the same host is meant.
fn resolve(asked: &Url, location: &str) -> Option<Url> {
    let mut url = asked.join(location.trim()).ok()?;
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    if asked.scheme() == "https" && url.scheme() == "http" && url.host_str() == asked.host_str() {
        url.set_scheme("https").ok()?;
        url.set_port(asked.port()).ok()?;
    }
    Some(url)
}

/// Adds the digest to what the registry put into the query.
fn with_digest(location: &Url, digest: &Digest) -> Url {
    let mut url = location.clone();
    url.query_pairs_mut()
        .append_pair("digest", &digest.to_string());
    url
}

/// The byte after the range `0-<end>`. An empty upload is `0-0` at most registries, which is read as
/// such: a registry that means one byte refuses the next chunk and is asked again.
fn next_offset(range: &str) -> Option<u64> {
    let range = range.trim();
    let range = range.strip_prefix("bytes").unwrap_or(range);
    let (start, end) = range.trim_start_matches(['=', ' ']).split_once('-')?;
    if start.trim().parse::<u64>().ok()? != 0 {
        return None;
    }
    match end.trim() {
        // `0--1` is how an older distribution writes nothing.
        "0" | "-1" => Some(0),
        end => end.parse::<u64>().ok()?.checked_add(1),
    }
    .filter(|next| *next < u64::MAX)
}

const OCTETS: &str = "application/octet-stream";
/// The longest blob that is sent in one POST.
const SINGLE_POST: u64 = 1024 * 1024;
/// How much one PATCH carries.
const CHUNK: u64 = 16 * 1024 * 1024;
/// How often an upload is begun.
const MAX_ROUNDS: u32 = 4;
const CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");

#[cfg(test)]
mod tests;
