//! Where releases and their proof come from: registries, behind a trait so that the runner can be tested without one.

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;

use oci::evidence::RawEvidence;
use oci::reference::TagOrDigest;
use oci::{Digest, Reference};

use crate::engine::BoxFuture;
use crate::release::{self, FetchedRelease, ReleaseError};
use crate::reporter::wire::{ClientReports, Reports};
use crate::target::Target;

/// What a runner asks a registry for.
pub trait Source: Send + Sync {
    /// What a tag or digest of the target's repository points to now; asks with HEAD, downloads nothing.
    fn head<'a>(
        &'a self,
        target: &'a Target,
        reference: &'a TagOrDigest,
    ) -> BoxFuture<'a, Result<Digest, SourceError>>;
    /// Downloads a release, every blob whole and verified, into `staging`.
    fn fetch<'a>(
        &'a self,
        target: &'a Target,
        digest: &'a Digest,
        staging: &'a Path,
    ) -> BoxFuture<'a, Result<FetchedRelease, SourceError>>;
    /// Extracts it into `directory`, all or nothing.
    fn extract<'a>(
        &'a self,
        release: &'a FetchedRelease,
        directory: &'a Path,
    ) -> BoxFuture<'a, Result<(), SourceError>>;
    /// All evidence that is attached to a digest.
    fn evidence<'a>(
        &'a self,
        target: &'a Target,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<RawEvidence>, SourceError>>;
    /// Judges the evidence. Pure, and the same everywhere but in tests.
    fn verify(
        &self,
        digest: &Digest,
        evidence: &[RawEvidence],
        policy: &trust::Policy,
    ) -> trust::Verdict {
        trust::verify(digest, evidence, policy)
    }
}

/// Makes sources and event streams out of a configuration; made anew when that changes.
pub trait Sources: Send + Sync {
    /// A source for these settings.
    ///
    /// # Errors
    /// A sentence that says which setting cannot be used.
    fn source(&self, config: &client::Config) -> Result<Arc<dyn Source>, String>;
    /// Opens the event stream of one host.
    fn events<'a>(
        &'a self,
        config: &'a client::Config,
        host: &'a str,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Box<dyn Events>, StreamError>>;
    /// How registries are told what runs here; `None`: not at all.
    ///
    /// # Errors
    /// As [`Sources::source`].
    fn reports(&self, _config: &client::Config) -> Result<Option<Arc<dyn Reports>>, String> {
        Ok(None)
    }
}

/// An open event stream.
pub trait Events: Send {
    /// The next event; `None`: the server ended the stream. Not cancel-safe: after a dropped call the stream is closed and opened again.
    fn next(
        &mut self,
    ) -> BoxFuture<'_, Result<Option<client::longshore::StreamEvent>, StreamError>>;
}

/// Why there is no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The registry has none; polls do.
    #[error("the registry has no event stream")]
    Unsupported,
    /// It broke; opened again after a while.
    #[error("{0}")]
    Broken(String),
}

/// Why a source did not give what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The release is wrong and stays wrong.
    #[error("{0}")]
    Rejected(String),
    /// The registry, the network or this disk: tried again.
    #[error("{0}")]
    Unavailable(String),
}

/// The real thing: the client, and release artifacts.
#[derive(Clone, Copy, Debug, Default)]
pub struct ClientSources;

impl Sources for ClientSources {
    fn source(&self, config: &client::Config) -> Result<Arc<dyn Source>, String> {
        let client = client::Client::new(config.clone()).map_err(|error| chain(&error))?;
        Ok(Arc::new(ClientSource { client }))
    }

    fn events<'a>(
        &'a self,
        config: &'a client::Config,
        host: &'a str,
        after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Box<dyn Events>, StreamError>> {
        Box::pin(async move {
            let client = client::Client::new(config.clone()).map_err(stream_error)?;
            let stream = client::longshore::EventStream::open(&client, host, after)
                .await
                .map_err(stream_error)?;
            Ok(Box::new(ClientEvents { stream }) as Box<dyn Events>)
        })
    }

    fn reports(&self, config: &client::Config) -> Result<Option<Arc<dyn Reports>>, String> {
        let client = client::Client::new(config.clone()).map_err(|error| chain(&error))?;
        Ok(Some(Arc::new(ClientReports {
            client,
            config: config.clone(),
        })))
    }
}

struct ClientEvents {
    stream: client::longshore::EventStream,
}

impl Events for ClientEvents {
    fn next(
        &mut self,
    ) -> BoxFuture<'_, Result<Option<client::longshore::StreamEvent>, StreamError>> {
        Box::pin(async move { self.stream.next().await.map_err(stream_error) })
    }
}

struct ClientSource {
    client: client::Client,
}

impl ClientSource {
    fn repository(&self, reference: &Reference) -> client::Repository {
        self.client
            .repository(&reference.host, &reference.repository)
    }
}

impl Source for ClientSource {
    fn head<'a>(
        &'a self,
        target: &'a Target,
        reference: &'a TagOrDigest,
    ) -> BoxFuture<'a, Result<Digest, SourceError>> {
        Box::pin(async move {
            let found = self
                .repository(&target.reference)
                .head_manifest(reference)
                .await
                .map_err(source_error)?;
            match found {
                Some(descriptor) => Ok(descriptor.digest),
                None => Err(SourceError::Unavailable(format!(
                    "`{reference}` is not in `{}/{}` yet, or these credentials may not read it",
                    target.reference.host, target.reference.repository
                ))),
            }
        })
    }

    fn fetch<'a>(
        &'a self,
        target: &'a Target,
        digest: &'a Digest,
        staging: &'a Path,
    ) -> BoxFuture<'a, Result<FetchedRelease, SourceError>> {
        Box::pin(async move {
            let repository = self.repository(&target.reference);
            release::fetch_named(&repository, digest, staging, &target.release)
                .await
                .map_err(release_error)
        })
    }

    fn extract<'a>(
        &'a self,
        release: &'a FetchedRelease,
        directory: &'a Path,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        let release = release.clone();
        let directory = directory.to_owned();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || release::extract(&release, &directory))
                .await
                .map_err(|error| {
                    SourceError::Unavailable(format!("extraction was cut off: {error}"))
                })?
                .map_err(release_error)
        })
    }

    fn evidence<'a>(
        &'a self,
        target: &'a Target,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<RawEvidence>, SourceError>> {
        Box::pin(async move {
            self.repository(&target.reference)
                .evidence(digest)
                .await
                .map_err(source_error)
        })
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The same, with what to do about a full disk.
pub(crate) fn disk_error(operation: &str, path: &Path, error: &std::io::Error) -> String {
    let hint = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; make room on this file system, the agent tries again by itself"
        }
        std::io::ErrorKind::PermissionDenied => "; the agent's user must be able to write there",
        _ => "",
    };
    format!("cannot {operation} `{}`: {error}{hint}", path.display())
}

fn stream_error(error: client::Error) -> StreamError {
    match error {
        client::Error::Unsupported(_) | client::Error::NotFound(_) => StreamError::Unsupported,
        other => StreamError::Broken(chain(&other)),
    }
}

fn source_error(error: client::Error) -> SourceError {
    // Bytes that are not those of their digest are the registry's fault, or that of something on the way, and not the
    // release's: they are refused, and asked for again.
    SourceError::Unavailable(full_disk(&error).unwrap_or_else(|| chain(&error)))
}

fn release_error(error: ReleaseError) -> SourceError {
    match error {
        ReleaseError::Client(error) => source_error(error),
        ReleaseError::Io {
            operation,
            path,
            source,
        } => SourceError::Unavailable(disk_error(operation, &path, &source)),
        other => SourceError::Rejected(chain(&other)),
    }
}

/// A full disk deep in a chain deserves its own words.
fn full_disk(error: &client::Error) -> Option<String> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::StorageFull
        {
            return Some(format!(
                "{}: make room on this file system, the agent tries again by itself",
                chain(error)
            ));
        }
        cause = error.source();
    }
    None
}
