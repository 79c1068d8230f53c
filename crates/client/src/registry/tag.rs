//! Lists of tags and repositories
//! ([distribution-spec § Listing tags](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-tags)).

use http::Method;
use serde::Deserialize;

use super::Repository;
use super::link::next_page;
use crate::transport::{Call, Scopes, Target};
use crate::{Client, Error};

impl Repository {
    /// All tags, all pages.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such repository.
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        #[derive(Deserialize)]
        struct Page {
            // Some registries write `null` for none.
            tags: Option<Vec<String>>,
        }
        pages(
            &self.client,
            || self.call(Method::GET, "tags/list?n=1000", "pull"),
            |body| serde_json::from_slice::<Page>(body).map(|page| page.tags.unwrap_or_default()),
        )
        .await
    }
}

pub(super) async fn catalog(client: &Client, host: &str) -> Result<Vec<String>, Error> {
    #[derive(Deserialize)]
    struct Page {
        repositories: Option<Vec<String>>,
    }
    let call = || {
        Call::new(
            host,
            Method::GET,
            "/v2/_catalog?n=1000".to_owned(),
            "the list of repositories".to_owned(),
        )
        .scopes(Scopes::parse("registry:catalog:*"))
    };
    let found = pages(client, call, |body| {
        serde_json::from_slice::<Page>(body).map(|page| page.repositories.unwrap_or_default())
    })
    .await;
    match found {
        Err(
            Error::NotFound(_)
            | Error::Status {
                status: 405 | 501, ..
            },
        ) => Err(Error::Unsupported(host.to_owned())),
        other => other,
    }
}

async fn pages<'a>(
    client: &Client,
    call: impl Fn() -> Call<'a>,
    parse: impl Fn(&[u8]) -> serde_json::Result<Vec<String>>,
) -> Result<Vec<String>, Error> {
    let mut all = Vec::new();
    let mut next = None;
    for _ in 0..MAX_PAGES {
        let mut call = call();
        if let Some(url) = next.take() {
            call.target = Target::Url(url);
        }
        let what = call.what.clone();
        let answer = client.send(call).await?;
        if !answer.status().is_success() {
            return Err(answer.into_error().await);
        }
        next = next_page(&answer)?;
        let body = answer.bytes(MAX_PAGE).await?;
        all.extend(parse(&body).map_err(|error| {
            Error::Other(format!("the list for `{what}` cannot be read: {error}"))
        })?);
        if next.is_none() {
            return Ok(all);
        }
    }
    Err(Error::Other(format!(
        "the registry answered with more than {MAX_PAGES} pages"
    )))
}

/// One page may hold very many names: some registries ignore `n`.
const MAX_PAGE: usize = 64 * 1024 * 1024;
const MAX_PAGES: usize = 10_000;
