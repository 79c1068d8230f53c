//! Uploads: one POST, POST and PUT, or chunks
//! ([distribution-spec § Pushing blobs](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-blobs)).
//!
//! Receiving runs in a task of its own, so that a client that goes away cannot stop the bytes that
//! came from being recorded. The claim of the one writer lies with that task; it ends when the body
//! ends, breaks off or stalls.

use std::time::Duration;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use http::{HeaderName, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use oci::{Algorithm, Digest, RepositoryName};
use store::{UploadId, UploadWriter};

use crate::error::{DIGEST_INVALID, Refusal, UPLOAD_INVALID, chain, upload_range};
use crate::metrics::Metrics;
use crate::serve::body::Body;
use crate::serve::call::{Call, cut, stalled};
use crate::settings::Action;
use crate::v2::query::Query;
use crate::v2::range::{Chunk, chunk};
use crate::v2::{CONTENT_DIGEST, header};

/// `POST /v2/<name>/blobs/uploads/` (end-4a, end-4b, end-4c, end-11).
pub(crate) async fn start(
    call: &mut Call,
    name: &RepositoryName,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Push, name, None, None).await?;
    let query = call.query()?;
    if let Some(mount) = query.get("mount") {
        let digest: Digest = mount.parse()?;
        if mount_from(call, name, &digest, query.get("from")).await? {
            return created(name, &digest);
        }
        // Not found, not allowed or just collected: the client uploads it.
        return open(call, name, Algorithm::Sha256).await;
    }
    // Early: the commit would refuse it too, after all bytes were sent.
    call.context.store.admit(name).await?;
    if let Some(digest) = query.get("digest") {
        let digest: Digest = digest.parse()?;
        let writer = call
            .context
            .store
            .put_blob(name, &digest, &call.actor())
            .await?;
        return receive_and_commit(call, name, writer, digest, None).await;
    }
    let algorithm = query
        .get("digest-algorithm")
        .map_or(Ok(Algorithm::Sha256), str::parse::<Algorithm>)?;
    open(call, name, algorithm).await
}

/// `GET /v2/<name>/blobs/uploads/<id>` (end-13).
pub(crate) async fn status(
    call: &Call,
    name: &RepositoryName,
    id: &str,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Push, name, None, None).await?;
    let id = UploadId(id.to_owned());
    let offset = call.context.store.upload_offset(name, &id).await?;
    progress(StatusCode::NO_CONTENT, name, &id, offset)
}

/// `PATCH /v2/<name>/blobs/uploads/<id>` (end-5).
pub(crate) async fn patch(
    call: &mut Call,
    name: &RepositoryName,
    id: &str,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Push, name, None, None).await?;
    call.context.store.admit(name).await?;
    let id = UploadId(id.to_owned());
    let (writer, limit) = claim(call, name, &id).await?;
    let receive = Receive::of(call, limit);
    let result = spawn(call, async move {
        let (mut writer, mut receive) = (writer, receive);
        let result = match receive.run(&mut writer).await {
            Ended::Failed(error) => Err(error.into()),
            Ended::Whole => recorded(writer).await.map(|offset| (offset, None)),
            Ended::Early(refusal) => match recorded_early(writer).await {
                Ok(Some(offset)) => Ok((offset, Some(refusal))),
                Ok(None) => Err(refusal),
                Err(error) => Err(error),
            },
        };
        (result, receive.body)
    })
    .await?;
    match result {
        (offset, None) => progress(StatusCode::ACCEPTED, name, &id, offset),
        (offset, Some(refusal)) => {
            Err(placed(refusal, name, &id)?.with(RANGE, upload_range(offset)))
        }
    }
}

/// `PUT /v2/<name>/blobs/uploads/<id>?digest=<digest>` (end-6), with or without a last chunk.
pub(crate) async fn finish(
    call: &mut Call,
    name: &RepositoryName,
    id: &str,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Push, name, None, None).await?;
    let digest = digest_of(&call.query()?)?;
    let id = UploadId(id.to_owned());
    let (writer, limit) = claim(call, name, &id).await?;
    receive_and_commit(call, name, writer, digest, limit).await
}

/// `DELETE /v2/<name>/blobs/uploads/<id>` (end-14).
pub(crate) async fn cancel(
    call: &Call,
    name: &RepositoryName,
    id: &str,
) -> Result<Response<Body>, Refusal> {
    call.require(Action::Push, name, None, None).await?;
    let id = UploadId(id.to_owned());
    call.context.store.cancel_upload(name, &id).await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// Mounts from the named repository, or from one of a bounded number that hold the blob, where the
/// caller may read them.
async fn mount_from(
    call: &Call,
    name: &RepositoryName,
    digest: &Digest,
    from: Option<&str>,
) -> Result<bool, Refusal> {
    let candidates = match from {
        Some(from) => {
            let from: RepositoryName = from.parse()?;
            call.require_scopes(name, &from)?;
            vec![from]
        }
        None => {
            call.context
                .store
                .repositories_with_blob(digest, MOUNT_CANDIDATES)
                .await?
        }
    };
    let sources: Vec<RepositoryName> = candidates
        .into_iter()
        .filter(|source| call.may(Action::Pull, source, None))
        .take(MOUNT_SOURCES)
        .collect();
    if sources.is_empty() {
        return Ok(false);
    }
    Ok(call
        .context
        .store
        .mount_blob(name, digest, &sources, &call.actor())
        .await?)
}

async fn open(
    call: &Call,
    name: &RepositoryName,
    algorithm: Algorithm,
) -> Result<Response<Body>, Refusal> {
    let id = call
        .context
        .store
        .start_upload(name, algorithm, &call.actor())
        .await?;
    progress(StatusCode::ACCEPTED, name, &id, 0)
}

/// Becomes the one writer and checks that the chunk follows what is there. Returns how long the chunk
/// claims to be.
async fn claim(
    call: &Call,
    name: &RepositoryName,
    id: &UploadId,
) -> Result<(UploadWriter, Option<u64>), Refusal> {
    let range = match call.header(CONTENT_RANGE) {
        None if call.head.headers.contains_key(CONTENT_RANGE) => Some(Chunk::Malformed),
        None => None,
        Some(text) => Some(chunk(text)),
    };
    let writer = match call.context.store.claim_upload(name, id).await {
        Ok(writer) => writer,
        Err(busy @ store::Error::UploadBusy { .. }) => return Err(placed(busy.into(), name, id)?),
        Err(error) => return Err(error.into()),
    };
    let offset = writer.offset();
    let (status, message) = match range {
        None => return Ok((writer, None)),
        Some(Chunk::At { first, length }) if first == offset => {
            if call
                .content_length()
                .is_none_or(|announced| announced == length)
            {
                return Ok((writer, Some(length)));
            }
            (
                StatusCode::BAD_REQUEST,
                "`Content-Range` and `Content-Length` contradict each other",
            )
        }
        Some(Chunk::Malformed) => (
            StatusCode::BAD_REQUEST,
            "`Content-Range` of a chunk must be `<first>-<last>`",
        ),
        Some(Chunk::At { .. } | Chunk::Inverted) => (
            StatusCode::RANGE_NOT_SATISFIABLE,
            "the chunk does not begin where the upload ends, go on after the last byte of `Range`",
        ),
    };
    // The claim is given back before the answer, so that the chunk that does follow is not told of
    // another writer.
    writer.record().await?;
    let refusal = Refusal::new(status, UPLOAD_INVALID, message).with(RANGE, upload_range(offset));
    Err(placed(refusal, name, id)?)
}

async fn receive_and_commit(
    call: &mut Call,
    name: &RepositoryName,
    writer: UploadWriter,
    digest: Digest,
    limit: Option<u64>,
) -> Result<Response<Body>, Refusal> {
    let receive = Receive::of(call, limit);
    let actor = call.actor();
    let wanted = digest.clone();
    spawn(call, async move {
        let (mut writer, mut receive) = (writer, receive);
        let result = match receive.run(&mut writer).await {
            Ended::Failed(error) => Err(error.into()),
            Ended::Whole => writer.commit(&wanted, &actor).await.map_err(Refusal::from),
            Ended::Early(refusal) => match recorded_early(writer).await {
                Ok(Some(offset)) => Err(refusal.with(RANGE, upload_range(offset))),
                Ok(None) => Err(refusal),
                Err(error) => Err(error),
            },
        };
        (result, receive.body)
    })
    .await?;
    created(name, &digest)
}

async fn recorded(writer: UploadWriter) -> Result<u64, Refusal> {
    Ok(writer.record().await?)
}

/// Records what came of a body that ended early. `None`: the writer was idle for so long that somebody else
/// did it; what the client is told is why its body ended, not that.
async fn recorded_early(writer: UploadWriter) -> Result<Option<u64>, Refusal> {
    match writer.record().await {
        Ok(offset) => Ok(Some(offset)),
        Err(store::Error::UploadBusy { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Runs work that must go on when the client goes away. What it left of the body is the call's again: it
/// is read away before the answer, else a client that is still sending would see a broken connection
/// in place of the answer.
async fn spawn<T: Send + 'static>(
    call: &mut Call,
    work: impl Future<Output = (Result<T, Refusal>, Option<Incoming>)> + Send + 'static,
) -> Result<T, Refusal> {
    let (result, rest) = call
        .context
        .tasks
        .spawn(work)
        .await
        .map_err(|error| Refusal::internal(chain(&error)))?;
    call.body = rest;
    result
}

/// Receives one body into one writer.
struct Receive {
    body: Option<Incoming>,
    /// What the body must come to, when something said so.
    length: Option<u64>,
    timeout: Duration,
    metrics: Metrics,
}

/// How receiving ended.
enum Ended {
    /// All that was announced has come.
    Whole,
    /// It broke off, stalled or went on too long; what fitted is in the writer.
    Early(Refusal),
    /// The store failed. The writer gives its claim back when it is dropped.
    Failed(store::Error),
}

impl Receive {
    fn of(call: &mut Call, limit: Option<u64>) -> Self {
        Self {
            body: call.body.take(),
            length: limit.or_else(|| call.content_length()),
            timeout: call.context.settings.limits.body_timeout,
            metrics: call.context.metrics.clone(),
        }
    }

    /// Afterwards `body` is what more may come; nothing does of one that broke off or stalled.
    async fn run(&mut self, writer: &mut UploadWriter) -> Ended {
        let mut received = 0u64;
        if let Some(mut body) = self.body.take() {
            loop {
                let frame = match tokio::time::timeout(self.timeout, body.frame()).await {
                    Err(_) => return Ended::Early(stalled()),
                    Ok(None) => break,
                    Ok(Some(Err(_))) => return Ended::Early(cut()),
                    Ok(Some(Ok(frame))) => frame,
                };
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                received += data.len() as u64;
                if self.length.is_some_and(|length| received > length) {
                    self.body = Some(body);
                    return Ended::Early(Refusal::bad_request(
                        "SIZE_INVALID",
                        "the body is longer than its `Content-Range`",
                    ));
                }
                self.metrics.received(data.len() as u64);
                if let Err(error) = writer.write(data).await {
                    self.body = Some(body);
                    return Ended::Failed(error);
                }
            }
        }
        match self.length {
            Some(length) if length != received => Ended::Early(cut()),
            _ => Ended::Whole,
        }
    }
}

fn digest_of(query: &Query) -> Result<Digest, Refusal> {
    let text = query.get("digest").ok_or_else(|| {
        Refusal::bad_request(
            DIGEST_INVALID,
            "the query lacks `digest`, which ends an upload",
        )
    })?;
    Ok(text.parse::<Digest>()?)
}

/// The answer that shows how far an upload is.
fn progress(
    status: StatusCode,
    name: &RepositoryName,
    id: &UploadId,
    offset: u64,
) -> Result<Response<Body>, Refusal> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(&location(name, id))?);
    headers.insert(RANGE, upload_range(offset));
    headers.insert(UPLOAD_UUID, header(&id.0)?);
    if status != StatusCode::NO_CONTENT {
        headers.insert(CONTENT_LENGTH, http::HeaderValue::from(0));
    }
    Ok(response)
}

/// The answer for a blob that is now in the repository.
fn created(name: &RepositoryName, digest: &Digest) -> Result<Response<Body>, Refusal> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::CREATED;
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(&format!("/v2/{name}/blobs/{digest}"))?);
    headers.insert(CONTENT_DIGEST, header(&digest.to_string())?);
    Ok(response)
}

/// Adds where the upload is to a refusal.
fn placed(refusal: Refusal, name: &RepositoryName, id: &UploadId) -> Result<Refusal, Refusal> {
    Ok(refusal.with(LOCATION, header(&location(name, id))?))
}

/// Relative, so that it is right behind every proxy.
fn location(name: &RepositoryName, id: &UploadId) -> String {
    format!("/v2/{name}/blobs/uploads/{}", id.0)
}

const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");
/// How many repositories are looked at for a mount without `from`.
const MOUNT_CANDIDATES: usize = 64;
/// How many of those that the caller may read are tried.
const MOUNT_SOURCES: usize = 16;
