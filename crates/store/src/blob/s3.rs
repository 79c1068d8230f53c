//! Objects in an S3-compatible store: `<prefix>/o/<2 hex>/<2 hex>/<key>`.
//!
//! Keys are random, made for one attempt and never used twice (`I5`), so no request here needs a condition: a store
//! that ignores `If-None-Match` is as good as any. A request that may have been carried out twice writes the same
//! bytes twice. Every request has a time limit of its own and a few attempts; creating a multipart upload has one,
//! because a second would leave an upload that nobody knows.

pub(crate) mod credentials;
mod failure;
mod file;
mod read;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::aws::{
    AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsAuthorizer, AwsCredential,
};
use object_store::client::{HttpClient, HttpConnector, HttpRequestBody, ReqwestConnector};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    ClientOptions, GetOptions, GetRange, HeaderValue, ObjectStore, ObjectStoreExt, PutOptions,
    PutPayload, RetryConfig, StaticCredentialProvider,
};

use crate::blob::StorageKey;
use crate::error::Error;
use crate::location::S3Location;

pub(crate) use failure::{Failure, pause};
use failure::{attempts, limited};
pub use read::{RemoteBlob, RemoteStream};

/// A bucket and a prefix in it. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct S3(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    store: AmazonS3,
    /// The same, deleting one object per request, for stores without `DeleteObjects`.
    single: AmazonS3,
    /// For the one request that the library lacks: listing the multipart uploads of a key.
    http: HttpClient,
    bucket_url: String,
    region: String,
    prefix: String,
    /// `s3://<bucket>/<prefix>`, for messages.
    name: String,
}

/// What became of completing a multipart upload.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Completed {
    /// It is the object now, and has this size.
    Yes(u64),
    /// There is no such upload: it was completed or aborted before.
    NoUpload,
    /// A part is not the one that was recorded, so it can never be completed.
    OtherParts,
}

impl S3 {
    /// Connects to the bucket and sees that it is there. Makes nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with what to do.
    pub(crate) async fn connect(location: &S3Location) -> Result<Self, Error> {
        let s3 = Self::new(location)?;
        s3.check().await?;
        Ok(s3)
    }

    fn new(location: &S3Location) -> Result<Self, Error> {
        let mut builder = AmazonS3Builder::from_env();
        let endpoint = location
            .endpoint
            .clone()
            .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::S3Endpoint))
            .or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
        let plain = endpoint
            .as_deref()
            .is_some_and(|endpoint| endpoint.starts_with("http://"));
        let options = ClientOptions::new()
            .with_allow_http(plain)
            .with_connect_timeout(CONNECT)
            .with_timeout_disabled()
            .with_pool_idle_timeout(IDLE)
            .with_user_agent(HeaderValue::from_static("longshore"));
        let retry = RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        };
        builder = builder
            .with_bucket_name(&location.bucket)
            .with_client_options(options.clone())
            .with_retry(retry)
            // Over TLS the transport keeps the bytes whole; without it, their signature does.
            .with_unsigned_payload(!plain)
            .with_virtual_hosted_style_request(!location.path_style)
            .with_disable_tagging(true);
        if let Some(region) = &location.region {
            builder = builder.with_region(region);
        }
        if let Some(keys) = &location.credentials {
            let keys = AwsCredential {
                key_id: keys.key_id.clone(),
                secret_key: keys.secret.clone(),
                token: None,
            };
            builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(keys)));
        } else if let Some((provider, region)) =
            credentials::from_file(&builder).map_err(unusable)?
        {
            if builder
                .get_config_value(&AmazonS3ConfigKey::Region)
                .is_none()
                && let Some(region) = region
            {
                builder = builder.with_region(region);
            }
            builder = builder.with_credentials(provider);
        }
        let region = builder
            .get_config_value(&AmazonS3ConfigKey::Region)
            .unwrap_or_else(|| "us-east-1".to_owned());
        builder = builder.with_region(&region);
        let bucket_url = bucket_url(location, endpoint.as_deref(), &region).map_err(unusable)?;
        // The library takes an endpoint with or without the bucket, depending on the style.
        let endpoint = if location.path_style {
            bucket_url
                .strip_suffix(&format!("/{}", location.bucket))
                .unwrap_or(&bucket_url)
                .to_owned()
        } else {
            bucket_url.clone()
        };
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
        let failed = |error: object_store::Error| unusable(error.to_string());
        let store = builder.clone().build().map_err(failed)?;
        let single = builder
            .with_credentials(Arc::clone(store.credentials()))
            .with_disable_bulk_delete(true)
            .build()
            .map_err(failed)?;
        let http = ReqwestConnector::default()
            .connect(&options)
            .map_err(failed)?;
        let prefix = location.prefix.trim_matches('/').to_owned();
        let mut name = format!("s3://{}", location.bucket);
        if !prefix.is_empty() {
            name = format!("{name}/{prefix}");
        }
        Ok(Self(Arc::new(Shared {
            store,
            single,
            http,
            bucket_url,
            region,
            prefix,
            name,
        })))
    }

    /// Asks for an object that is not there: the answer tells whether the bucket is, and whether we may.
    async fn check(&self) -> Result<(), Error> {
        let credentials = limited(CONTROL, self.0.store.credentials().get_credential());
        if let Err(failure) = credentials.await {
            return Err(unusable(format!(
                "there are no credentials for `{}`, set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`: {failure}",
                self.0.name
            )));
        }
        let key = StorageKey::parse(&"0".repeat(32))?;
        let path = self.path(&key);
        let asked = attempts(|| async {
            let asked = limited(CONTROL, self.0.store.get_range(&path, 0..1)).await;
            // Whoever starts a server wants to hear of a wrong name at once.
            asked.map_err(|failure| {
                if failure.code("NoSuchBucket") {
                    failure.at_last()
                } else {
                    failure
                }
            })
        })
        .await;
        match asked {
            Err(failure) if failure.code("NoSuchBucket") => Err(unusable(format!(
                "there is no such bucket: `{}`",
                self.0.name
            ))),
            Err(failure)
                if ["InvalidAccessKeyId", "SignatureDoesNotMatch"]
                    .iter()
                    .any(|code| failure.code(code)) =>
            {
                Err(unusable(format!(
                    "`{}` refuses the credentials: {failure}",
                    self.0.name
                )))
            }
            Ok(_) | Err(Failure::Missing(_)) => Ok(()),
            // Without the right to list, what is not there is forbidden.
            Err(Failure::Refused(problem)) => {
                tracing::warn!(
                    problem,
                    "the object store refuses to say whether an object exists, allow `s3:ListBucket`"
                );
                Ok(())
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// Where an object is, for messages.
    pub(crate) fn describe(&self, key: &StorageKey) -> PathBuf {
        PathBuf::from(format!("{}/{}", self.0.name, key.place()))
    }

    /// Writes a whole object. Doing it again writes the same bytes.
    pub(crate) async fn put(&self, key: &StorageKey, chunks: &[Bytes]) -> Result<(), Error> {
        let path = self.path(key);
        let payload: PutPayload = chunks.iter().cloned().collect();
        let limit = transfer(payload.content_length() as u64);
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

    /// Creates a multipart upload, once: after a failure nobody knows whether there is one.
    pub(crate) async fn create_multipart(&self, key: &StorageKey) -> Result<String, Failure> {
        let id = limited(CONTROL, self.0.store.create_multipart(&self.path(key))).await?;
        if id.is_empty() {
            return Err(Failure::Again(
                "a multipart upload without an id".to_owned(),
            ));
        }
        Ok(id)
    }

    /// Sends one part once, within `limit`, and returns its ETag.
    pub(crate) async fn put_part(
        &self,
        key: &StorageKey,
        multipart: &str,
        index: usize,
        chunks: &[Bytes],
        limit: Duration,
    ) -> Result<String, Failure> {
        let payload: PutPayload = chunks.iter().cloned().collect();
        let (path, id) = (self.path(key), multipart.to_owned());
        let part = limited(limit, self.0.store.put_part(&path, &id, index, payload)).await?;
        Ok(part.content_id)
    }

    /// Makes the parts the object. An answer that does not say so clearly is asked for again; after one that was
    /// lost, the upload is gone and [`Completed::NoUpload`] sends the caller to look at the object.
    pub(crate) async fn complete(
        &self,
        key: &StorageKey,
        multipart: &str,
        etags: &[String],
    ) -> Result<Completed, Error> {
        let (path, id) = (self.path(key), multipart.to_owned());
        let done = attempts(|| {
            let parts = etags
                .iter()
                .map(|etag| PartId {
                    content_id: etag.clone(),
                })
                .collect();
            limited(COMPLETE, self.0.store.complete_multipart(&path, &id, parts))
        })
        .await;
        match done {
            // The size is what was asked for; an answer alone proves little where answers may be wrong.
            Ok(_) => match self.size(key).await? {
                Some(size) => Ok(Completed::Yes(size)),
                None => Err(Failure::Again("a completed object is not there".to_owned()).into()),
            },
            Err(Failure::Missing(_)) => Ok(Completed::NoUpload),
            Err(failure) if OTHER_PARTS.iter().any(|code| failure.code(code)) => {
                Ok(Completed::OtherParts)
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// The size of an object, `None` when the store says that there is none.
    pub(crate) async fn size(&self, key: &StorageKey) -> Result<Option<u64>, Error> {
        let path = self.path(key);
        let size = attempts(|| async {
            match limited(CONTROL, self.0.store.head(&path)).await {
                // Why, the answer to a HEAD cannot say.
                Err(failure) if failure.is_404() => {
                    let first = GetOptions {
                        range: Some(GetRange::Bounded(0..1)),
                        ..GetOptions::default()
                    };
                    limited(CONTROL, self.0.store.get_opts(&path, first))
                        .await
                        .map(|got| got.meta.size)
                }
                answer => answer.map(|found| found.size),
            }
        });
        match size.await {
            Ok(size) => Ok(Some(size)),
            Err(Failure::Missing(_)) => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Aborts one multipart upload. One that the store says is gone is no error.
    pub(crate) async fn abort(&self, key: &StorageKey, multipart: &str) -> Result<(), Error> {
        let (path, id) = (self.path(key), multipart.to_owned());
        match attempts(|| limited(CONTROL, self.0.store.abort_multipart(&path, &id))).await {
            Ok(()) | Err(Failure::Missing(_)) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Finds every multipart upload of one key and aborts it.
    pub(crate) async fn abort_all(&self, key: &StorageKey) -> Result<(), Error> {
        for _ in 0..ROUNDS {
            let open = self.multiparts(key).await?;
            if open.is_empty() {
                return Ok(());
            }
            for id in open {
                self.abort(key, &id).await?;
            }
        }
        Err(Error::Unavailable {
            what: WHAT,
            problem: "multipart uploads that were aborted are still listed".to_owned(),
        })
    }

    /// The ids of the multipart uploads of one key.
    async fn multiparts(&self, key: &StorageKey) -> Result<Vec<String>, Error> {
        let path = self.path(key);
        let url = format!(
            "{}?prefix={}&uploads=",
            self.0.bucket_url,
            encode(path.as_ref())
        );
        let body = attempts(|| limited(CONTROL, self.get(&url))).await?;
        let text = String::from_utf8_lossy(&body);
        if !text.contains("ListMultipartUploadsResult") {
            return Err(Failure::Again("no list of multipart uploads came".to_owned()).into());
        }
        Ok(elements(&text, "Upload")
            .filter(|upload| elements(upload, "Key").any(|key| unescape(key) == path.as_ref()))
            .filter_map(|upload| elements(upload, "UploadId").next().map(unescape))
            .collect())
    }

    /// One signed GET of a small document.
    async fn get(&self, url: &str) -> Result<Bytes, object_store::Error> {
        let generic =
            |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
                store: "S3",
                source,
            };
        let mut request = http::Request::get(url)
            .body(HttpRequestBody::empty())
            .map_err(|error| generic(error.into()))?;
        let credential = self.0.store.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", &self.0.region).try_authorize(&mut request, None)?;
        let response = self
            .0
            .http
            .execute(request)
            .await
            .map_err(|error| generic(error.into()))?;
        let status = response.status();
        let mut body = response.into_body().bytes_stream();
        let mut text = Vec::new();
        while let Some(chunk) = body.next().await {
            text.extend_from_slice(&chunk.map_err(|error| generic(error.into()))?);
            if text.len() > MAX_DOCUMENT {
                return Err(generic("the answer is too long".into()));
            }
        }
        if status.is_success() {
            return Ok(text.into());
        }
        let text = String::from_utf8_lossy(&text);
        Err(generic(format!("status code: {status}: {text}").into()))
    }

    /// Removes objects, a thousand with one request. What the store says is gone already is no error.
    pub(crate) async fn remove(&self, keys: &[StorageKey]) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(keys.len());
        for batch in keys.chunks(DELETED_AT_ONCE) {
            // The answer speaks of all of them at once, or of none: it cannot say that one is gone.
            let mut answers: Vec<_> = self
                .delete(&self.0.store, batch)
                .await
                .into_iter()
                .map(|answer| answer.map_err(Failure::never_missing))
                .collect();
            if answers.iter().any(
                |answer| matches!(answer, Err(failure) if failure.is_404() || matches!(failure, Failure::Refused(_))),
            ) {
                // A store may lack the request for many.
                answers = self.delete(&self.0.single, batch).await;
            }
            results.extend(answers.into_iter().map(|answer| match answer {
                Ok(()) | Err(Failure::Missing(_)) => Ok(()),
                Err(failure) => Err(failure.into()),
            }));
        }
        results
    }

    async fn delete(&self, store: &AmazonS3, keys: &[StorageKey]) -> Vec<Result<(), Failure>> {
        let paths: Vec<_> = keys.iter().map(|key| Ok(self.path(key))).collect();
        let deleting = store
            .delete_stream(futures_util::stream::iter(paths).boxed())
            .map(|answer| answer.map(drop).map_err(Failure::from))
            .collect::<Vec<_>>();
        let answers = tokio::time::timeout(DELETE, deleting)
            .await
            .unwrap_or_default();
        if answers.len() == keys.len() {
            return answers;
        }
        // One answer for all of them, or none.
        let failure = answers
            .into_iter()
            .find_map(Result::err)
            .unwrap_or_else(|| Failure::Again("it did not answer in time".to_owned()));
        keys.iter().map(|_| Err(failure.clone())).collect()
    }

    /// Every object below the prefix with its key, where its name is one. For checking only; the store itself
    /// never lists (`I10`).
    pub(crate) async fn list(&self) -> Result<Vec<(PathBuf, Option<StorageKey>)>, Error> {
        let root = Path::from(self.prefixed("o"));
        let mut objects = self.0.store.list(Some(&root));
        let mut found = Vec::new();
        while let Some(object) = objects.next().await {
            let location = object.map_err(Failure::from)?.location;
            let key = location
                .filename()
                .and_then(|name| StorageKey::parse(name).ok())
                .filter(|key| self.path(key) == location);
            let below = location
                .as_ref()
                .strip_prefix(&self.0.prefix)
                .unwrap_or(location.as_ref());
            found.push((
                PathBuf::from(format!("{}/{}", self.0.name, below.trim_matches('/'))),
                key,
            ));
        }
        found.sort();
        Ok(found)
    }

    /// Whether there is any object of a blob.
    pub(crate) async fn are_some(&self) -> Result<bool, Error> {
        let root = Path::from(self.prefixed("o"));
        let first = self.0.store.list(Some(&root)).next().await;
        Ok(first.transpose().map_err(Failure::from)?.is_some())
    }

    /// A URL with which anybody may read this object for `ttl`.
    pub(crate) async fn presign(&self, key: &StorageKey, ttl: Duration) -> Result<String, Error> {
        self.0
            .store
            .signed_url(http::Method::GET, &self.path(key), ttl)
            .await
            .map(|url| url.to_string())
            .map_err(|error| Failure::from(error).into())
    }

    fn path(&self, key: &StorageKey) -> Path {
        Path::from(self.prefixed(&key.place()))
    }

    fn prefixed(&self, place: &str) -> String {
        if self.0.prefix.is_empty() {
            place.to_owned()
        } else {
            format!("{}/{place}", self.0.prefix)
        }
    }
}

/// How long a request that carries these bytes may take: it allows one MiB a second.
pub(crate) fn transfer(bytes: u64) -> Duration {
    BASE + Duration::from_secs(bytes >> 20)
}

/// The URL of the bucket, without a slash at its end.
fn bucket_url(
    location: &S3Location,
    endpoint: Option<&str>,
    region: &str,
) -> Result<String, String> {
    let endpoint = match endpoint {
        Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
        None => format!("https://s3.{region}.amazonaws.com"),
    };
    if location.path_style {
        return Ok(format!("{endpoint}/{}", location.bucket));
    }
    match endpoint.split_once("://") {
        Some((scheme, host)) => Ok(format!("{scheme}://{}.{host}", location.bucket)),
        None => Err(format!(
            "`{endpoint}` is no URL, write it with `https://` or `http://`"
        )),
    }
}

fn unusable(problem: impl Into<String>) -> Error {
    Error::Unavailable {
        what: WHAT,
        problem: problem.into(),
    }
}

/// The contents of the elements of this name.
fn elements<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(&open)?;
        let (content, after) = after.split_once(&close)?;
        rest = after;
        Some(content)
    })
}

fn unescape(text: &str) -> String {
    text.replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#34;", "\"")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

/// Encodes a value of a query.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// As [`Error::Unavailable`] calls it.
const WHAT: &str = "the object store";
const CONNECT: Duration = Duration::from_secs(5);
/// Idle connections are closed by us before the other side does it.
const IDLE: Duration = Duration::from_secs(20);
/// A request without a body to speak of.
const CONTROL: Duration = Duration::from_secs(10);
/// Some stores put the parts together while the request waits.
const COMPLETE: Duration = Duration::from_mins(2);
const DELETE: Duration = Duration::from_secs(30);
/// What a request that carries bytes may take beside them.
const BASE: Duration = Duration::from_secs(15);
/// The most that one `DeleteObjects` takes.
const DELETED_AT_ONCE: usize = 1000;
const MAX_DOCUMENT: usize = 4 << 20;
const ROUNDS: usize = 5;
const OTHER_PARTS: [&str; 3] = ["InvalidPart", "InvalidPartOrder", "EntityTooSmall"];
