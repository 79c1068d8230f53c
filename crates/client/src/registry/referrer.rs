//! Referrers: by the API, else by the tag schema, read and written
//! ([distribution-spec § Listing referrers](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#listing-referrers),
//! [§ Referrers tag schema](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#referrers-tag-schema)).

use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderName, Method};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Tag, media_type};
use serde_json::{Value, json};

use super::Repository;
use super::link::next_page;
use crate::Error;
use crate::transport::{Body, Target};

impl Repository {
    /// Referrers by the API, else the tag schema (never filtered there).
    ///
    /// Older clients wrote another artifact type into the tag schema's index than the manifest has, so
    /// a filter there would hide evidence. An entry that is no descriptor is passed over.
    ///
    /// # Errors
    /// When neither way could be asked.
    pub async fn referrers(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, Error> {
        match self.referrers_by_api(subject, artifact_type).await? {
            Some(found) => Ok(found),
            None => Ok(match self.index(subject).await? {
                Some(index) => lenient_descriptors(&index),
                None => Vec::new(),
            }),
        }
    }

    /// `None`: the registry lacks the API.
    async fn referrers_by_api(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Option<Vec<Descriptor>>, Error> {
        let path = match artifact_type {
            None => format!("referrers/{subject}"),
            Some(kind) => format!("referrers/{subject}?artifactType={}", encode(kind)),
        };
        let mut found = Vec::new();
        let mut next = None;
        for page in 0..MAX_PAGES {
            let mut call = self
                .call(Method::GET, &path, "pull")
                .header(ACCEPT, media_type::OCI_INDEX);
            if let Some(url) = next.take() {
                call.target = Target::Url(url);
            }
            let answer = self.client.send(call).await?;
            let status = answer.status().as_u16();
            let is_index = answer.media_type() == media_type::OCI_INDEX;
            match status {
                200 if is_index => {}
                200 | 400 | 404 | 405 | 406 | 501 if page == 0 => return Ok(None),
                _ => return Err(answer.into_error().await),
            }
            let filtered = answer
                .header(&FILTERS_APPLIED)
                .is_some_and(|text| text.split(',').any(|name| name.trim() == "artifactType"));
            next = next_page(&answer)?;
            let body = answer.bytes(super::MAX_MANIFEST).await?;
            let index: Value = serde_json::from_slice(&body).map_err(|error| {
                Error::Other(format!(
                    "the referrers of `{}` cannot be read: {error}",
                    self.what(&path)
                ))
            })?;
            found.extend(lenient_descriptors(&index).into_iter().filter(|referrer| {
                filtered
                    || artifact_type
                        .is_none_or(|kind| referrer.artifact_type.as_deref() == Some(kind))
            }));
            if next.is_none() {
                return Ok(Some(found));
            }
        }
        Err(Error::Other(format!(
            "the registry answered with more than {MAX_PAGES} pages of referrers for `{subject}`"
        )))
    }

    /// The index that the tag schema keeps for a subject.
    async fn index(&self, subject: &Digest) -> Result<Option<Value>, Error> {
        let tag = TagOrDigest::Tag(fallback_tag(subject)?);
        let Some(fetched) = self.manifest(&tag).await? else {
            return Ok(None);
        };
        // Bytes that are no index are as good as none; a write replaces them.
        Ok(serde_json::from_slice::<Value>(&fetched.body)
            .ok()
            .filter(|index| index.get("manifests").is_some_and(Value::is_array)))
    }

    /// Puts a referrer into the index of its subject.
    ///
    /// The index is read, changed and written, and another writer may do so at the same time. There
    /// is no compare-and-set on such registries, so the result is read again until the referrer is in.
    pub(super) async fn add_to_index(
        &self,
        subject: &Digest,
        referrer: &Descriptor,
    ) -> Result<(), Error> {
        let entry = serde_json::to_value(referrer).unwrap_or_default();
        let held =
            |index: &Value| entries(index).any(|known| known.get("digest") == entry.get("digest"));
        self.change_index(subject, held, |entries| entries.push(entry.clone()))
            .await
    }

    /// Takes a referrer out of the index of its subject, where there is one.
    pub(super) async fn remove_from_index(
        &self,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<(), Error> {
        let is_it = |known: &Value| {
            known.get("digest").and_then(Value::as_str) == Some(&referrer.to_string())
        };
        let gone = |index: &Value| !entries(index).any(is_it);
        self.change_index(subject, gone, |entries| {
            entries.retain(|known| !is_it(known));
        })
        .await
    }

    async fn change_index(
        &self,
        subject: &Digest,
        settled: impl Fn(&Value) -> bool,
        change: impl Fn(&mut Vec<Value>),
    ) -> Result<(), Error> {
        let tag = fallback_tag(subject)?;
        // One writer at a time in this process, which spares most of the repetitions.
        let _turn = self.client.index_writer().acquire().await;
        for attempt in 0..INDEX_ATTEMPTS {
            let mut index = self.index(subject).await?.unwrap_or_else(|| {
                json!({
                    "schemaVersion": 2,
                    "mediaType": media_type::OCI_INDEX,
                    "manifests": [],
                })
            });
            if settled(&index) {
                return Ok(());
            }
            if attempt > 0 {
                let wait = self
                    .client
                    .retries()
                    .backoff(attempt, crate::transport::random());
                tokio::time::sleep(wait).await;
            }
            if let Some(entries) = index.get_mut("manifests").and_then(Value::as_array_mut) {
                change(entries);
            }
            let body = serde_json::to_vec(&index).unwrap_or_default();
            let call = self
                .call(Method::PUT, &format!("manifests/{tag}"), "pull,push")
                .header(CONTENT_TYPE, media_type::OCI_INDEX)
                .body(Body::Bytes(body.into()));
            let answer = self.client.send(call).await?;
            if !answer.status().is_success() {
                return Err(answer.into_error().await);
            }
        }
        if self
            .index(subject)
            .await?
            .is_some_and(|index| settled(&index))
        {
            return Ok(());
        }
        Err(Error::Other(format!(
            "others keep writing the referrers index `{}:{tag}` at the same time; try again",
            self.name
        )))
    }
}

fn entries(index: &Value) -> impl Iterator<Item = &Value> {
    index
        .get("manifests")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// The descriptors of an index, without those that cannot be read.
pub(crate) fn lenient_descriptors(index: &Value) -> Vec<Descriptor> {
    entries(index)
        .filter_map(|entry| serde_json::from_value(entry.clone()).ok())
        .collect()
}

/// The tag of the tag schema: algorithm and hash, cut to 32 and 64 characters.
pub(crate) fn fallback_tag(subject: &Digest) -> Result<Tag, Error> {
    let hex: String = subject.hex().chars().take(64).collect();
    format!("{}-{hex}", subject.algorithm())
        .parse()
        .map_err(|error| Error::Other(format!("{error}")))
}

/// Percent-encodes a query value.
fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a `String` cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
const MAX_PAGES: usize = 1000;
const INDEX_ATTEMPTS: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_the_schema() {
        let sha256 = Digest::sha256(b"x");
        assert_eq!(
            fallback_tag(&sha256).unwrap().as_str(),
            format!("sha256-{}", sha256.hex())
        );
        let sha512 = Digest::of(oci::Algorithm::Sha512, b"x");
        assert_eq!(
            fallback_tag(&sha512).unwrap().as_str().len(),
            "sha512-".len() + 64
        );
    }

    #[test]
    fn a_bad_entry_hides_no_good_one() {
        let good = Descriptor::of("a/b", b"x");
        let index = json!({ "manifests": [{"digest": "blake3:00"}, 7, good] });
        assert_eq!(lenient_descriptors(&index), [good]);
        assert!(lenient_descriptors(&json!({})).is_empty());
    }

    #[test]
    fn query_values() {
        assert_eq!(
            encode("application/x+json; v=1"),
            "application/x%2Bjson%3B%20v%3D1"
        );
    }
}
