//! The distribution API: one function per call
//! ([distribution-spec § API](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#api)).

mod blob;
mod content;
mod evidence;
mod link;
mod manifest;
mod reader;
mod referrer;
mod tag;
mod upload;

use bytes::Bytes;
use http::Method;
use oci::{Descriptor, RepositoryName};

pub(crate) use content::{FileContent, OpenContent, RemoteContent};
pub use manifest::MAX_MANIFEST;
pub use reader::BlobReader;
pub(crate) use referrer::{fallback_tag, lenient_descriptors};
pub(crate) use upload::{Outcome, Payload, Progress};

use crate::transport::{Call, Scopes, is_docker_hub};
use crate::{Client, Error};

/// One repository of one registry: one function per API call.
#[derive(Clone, Debug)]
pub struct Repository {
    client: Client,
    host: String,
    name: RepositoryName,
}

/// A manifest with its exact bytes, verified against its digest.
#[derive(Clone, Debug)]
pub struct FetchedManifest {
    /// Type, digest, size.
    pub descriptor: Descriptor,
    /// The exact bytes.
    pub body: Bytes,
}

impl Client {
    /// The API of one repository.
    pub fn repository(&self, host: &str, name: &RepositoryName) -> Repository {
        // Docker Hub serves the repositories that people name without a namespace under `library/`.
        let library = (is_docker_hub(host) && !name.as_str().contains('/'))
            .then(|| format!("library/{name}").parse().ok())
            .flatten();
        Repository {
            client: self.clone(),
            host: host.to_owned(),
            name: library.unwrap_or_else(|| name.clone()),
        }
    }

    /// `GET /v2/`: checks that host and credentials work.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] when the login is refused, [`Error::Unsupported`] when the host is no
    /// registry.
    pub async fn ping(&self, host: &str) -> Result<(), Error> {
        let call = Call::new(
            host,
            Method::GET,
            "/v2/".to_owned(),
            "the registry".to_owned(),
        );
        let answer = self.send(call).await?;
        match answer.status().as_u16() {
            200..=299 => Ok(()),
            404 => Err(Error::Unsupported(host.to_owned())),
            _ => Err(answer.into_error().await),
        }
    }

    /// `GET /v2/_catalog`, all pages.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the registry has no such list.
    pub async fn catalog(&self, host: &str) -> Result<Vec<String>, Error> {
        tag::catalog(self, host).await
    }
}

impl Repository {
    /// The host as it was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The name as the registry knows it.
    pub fn name(&self) -> &RepositoryName {
        &self.name
    }

    /// The client that it uses.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A call beneath this repository, such as `manifests/latest`.
    fn call(&self, method: Method, rest: &str, actions: &str) -> Call<'_> {
        Call::new(
            &self.host,
            method,
            format!("/v2/{}/{rest}", self.name),
            self.what(rest),
        )
        .scopes(Scopes::repository(self.name.as_str(), actions))
    }

    /// How messages name a thing in this repository.
    fn what(&self, rest: &str) -> String {
        let rest = rest.split('?').next().unwrap_or(rest);
        match rest.split_once('/') {
            Some(("manifests", tag)) if !tag.contains(':') => format!("{}:{tag}", self.name),
            Some(("manifests" | "blobs" | "referrers", digest)) if digest.contains(':') => {
                format!("{}@{digest}", self.name)
            }
            _ => self.name.to_string(),
        }
    }
}
