//! A registry that runs, read over the wire.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use client::{BlobReader, Client, Repository};
use futures_util::stream::{self, StreamExt as _};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, RepositoryName, Tag};
use store::import::{Chunks, Content, Contents, Document, Failure, Repositories, Source};
use tokio::sync::Mutex;
use tokio::time::{Interval, MissedTickBehavior};

/// The repositories of a host, or those below a prefix of it.
#[derive(Clone)]
pub(crate) struct Live {
    client: Client,
    host: String,
    /// With a slash at its end, or empty.
    prefix: String,
    parallel: usize,
    /// One tick for each request.
    pace: Option<Arc<Mutex<Interval>>>,
}

impl Live {
    /// `name` is `HOST[/PREFIX]`.
    pub(crate) fn new(
        client: Client,
        name: &str,
        parallel: usize,
        rate: Option<u32>,
    ) -> anyhow::Result<Self> {
        let (host, prefix) = match name.split_once('/') {
            None => (name, String::new()),
            Some((host, prefix)) => {
                let prefix: RepositoryName = prefix.parse()?;
                (host, format!("{prefix}/"))
            }
        };
        let pace = rate.filter(|rate| *rate > 0).map(|rate| {
            let mut interval = tokio::time::interval(Duration::from_secs(1) / rate);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Arc::new(Mutex::new(interval))
        });
        Ok(Self {
            client,
            host: host.to_owned(),
            prefix,
            parallel: parallel.max(1),
            pace,
        })
    }

    fn repository(&self, name: &RepositoryName) -> Repository {
        self.client.repository(&self.host, name)
    }

    /// Waits for the turn of the next request.
    async fn turn(&self) {
        if let Some(pace) = &self.pace {
            pace.lock().await.tick().await;
        }
    }
}

impl Source for Live {
    async fn repositories(&self) -> Result<Repositories, Failure> {
        self.turn().await;
        let mut found = Repositories::default();
        let names = match self.client.catalog(&self.host).await {
            Ok(names) => names,
            // A registry without a list still has the repository that was named.
            Err(client::Error::Unsupported(_) | client::Error::Unauthorized { .. })
                if !self.prefix.is_empty() =>
            {
                vec![self.prefix.trim_end_matches('/').to_owned()]
            }
            Err(error) => return Err(Failure::fatal(error)),
        };
        let only = self.prefix.trim_end_matches('/');
        for name in names {
            if !name.starts_with(&self.prefix) && name != only {
                continue;
            }
            match name.parse() {
                Ok(name) => found.names.push(name),
                Err(error) => found.problems.push(format!("`{name}`: {error}")),
            }
        }
        Ok(found)
    }

    async fn contents(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let remote = self.repository(repository);
        self.turn().await;
        let names = match remote.tags().await {
            Ok(names) => names,
            // Some registries list repositories that have no tags.
            Err(client::Error::NotFound(_)) => Vec::new(),
            Err(error) => return Err(failure(error)),
        };
        let mut contents = Contents::default();
        let mut looked_up = stream::iter(names)
            .map(|name| {
                let remote = &remote;
                async move {
                    let Ok(tag) = name.parse::<Tag>() else {
                        return (name, None, Ok(None));
                    };
                    self.turn().await;
                    let found = remote.head_manifest(&TagOrDigest::Tag(tag.clone())).await;
                    (name, Some(tag), found)
                }
            })
            .buffer_unordered(self.parallel);
        while let Some((name, tag, found)) = looked_up.next().await {
            match (tag, found) {
                (None, _) => contents.problems.push(format!("`{name}` is no tag")),
                (Some(tag), Ok(Some(found))) => {
                    contents.tags.insert(tag, found.digest);
                }
                (Some(tag), Ok(None)) => contents
                    .problems
                    .push(format!("tag `{tag}` is listed and has no manifest")),
                (Some(tag), Err(error)) => match failure(error) {
                    Failure::Broken(problem) => {
                        contents.problems.push(format!("tag `{tag}`: {problem}"));
                    }
                    fatal @ Failure::Fatal(_) => return Err(fatal),
                },
            }
        }
        Ok(contents)
    }

    async fn manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Document>, Failure> {
        self.turn().await;
        let found = self
            .repository(repository)
            .manifest(&TagOrDigest::Digest(digest.clone()))
            .await
            .map_err(failure)?;
        Ok(found.map(|found| Document {
            body: found.body,
            media_type: found.descriptor.media_type,
        }))
    }

    async fn referrers(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
    ) -> Result<Vec<Digest>, Failure> {
        self.turn().await;
        let found = self
            .repository(repository)
            .referrers(subject, None)
            .await
            .map_err(failure)?;
        Ok(found.into_iter().map(|referrer| referrer.digest).collect())
    }

    async fn blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<Option<Content>, Failure> {
        self.turn().await;
        let reader = self.repository(repository).read_blob(descriptor);
        Ok(Some(Content::Stream(Box::new(Pieces(reader)))))
    }
}

struct Pieces(BlobReader);

impl Chunks for Pieces {
    fn next(
        &mut self,
    ) -> Pin<Box<dyn Future<Output = Result<Option<Bytes>, Failure>> + Send + '_>> {
        Box::pin(async move { self.0.next().await.map_err(failure) })
    }

    fn origin(&self) -> Option<&(dyn Any + Send + Sync)> {
        Some(self.0.repository())
    }
}

/// What may be better a little later, or after a login, ends the run, which is then started again; everything else
/// concerns one piece of content.
pub(super) fn failure(error: client::Error) -> Failure {
    if error.is_transient() || matches!(error, client::Error::Unauthorized { .. }) {
        Failure::fatal(error)
    } else {
        Failure::Broken(error.to_string())
    }
}
