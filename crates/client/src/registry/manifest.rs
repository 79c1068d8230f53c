//! Manifests: read with their digest checked, written with their referrers index kept
//! ([distribution-spec § Pulling manifests](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests),
//! [§ Pushing manifests](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-manifests)).

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderName, Method};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Manifest, Tag, media_type};

use super::{FetchedManifest, Repository};
use crate::Error;
use crate::error::printable;
use crate::transport::{Answer, Body};

impl Repository {
    /// HEAD of a manifest; `None` on 404.
    ///
    /// A registry that does not state the digest is asked for the manifest itself.
    ///
    /// # Errors
    /// Any answer but 200 and 404.
    pub async fn head_manifest(
        &self,
        reference: &TagOrDigest,
    ) -> Result<Option<Descriptor>, Error> {
        let call = self
            .call(Method::HEAD, &format!("manifests/{reference}"), "pull")
            .header(ACCEPT, &accepted());
        let answer = self.client.send(call).await?;
        match answer.status().as_u16() {
            200 => {}
            404 => return Ok(None),
            _ => return Err(answer.into_error().await),
        }
        let stated = stated_digest(&answer);
        let digest = match (reference, stated) {
            (TagOrDigest::Digest(asked), Some(stated)) if stated != *asked => {
                return Err(Error::DigestMismatch {
                    what: self.what(&format!("manifests/{reference}")),
                    expected: asked.clone(),
                    actual: stated.to_string(),
                });
            }
            (TagOrDigest::Digest(asked), _) => Some(asked.clone()),
            (TagOrDigest::Tag(_), stated) => stated,
        };
        match (digest, answer.content_length()) {
            (Some(digest), Some(size)) if !answer.media_type().is_empty() => {
                Ok(Some(Descriptor::new(answer.media_type(), digest, size)))
            }
            _ => Ok(self
                .manifest(reference)
                .await?
                .map(|fetched| fetched.descriptor)),
        }
    }

    /// GET of a manifest, verified against the digest asked for (or the one the server states); `None` on
    /// 404. Bounded to 32 MiB.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`] when the bytes are not what was asked for or stated.
    pub async fn manifest(
        &self,
        reference: &TagOrDigest,
    ) -> Result<Option<FetchedManifest>, Error> {
        self.manifest_within(reference, MAX_MANIFEST).await
    }

    /// As [`Repository::manifest`], bounded to `limit` bytes.
    pub(super) async fn manifest_within(
        &self,
        reference: &TagOrDigest,
        limit: usize,
    ) -> Result<Option<FetchedManifest>, Error> {
        let path = format!("manifests/{reference}");
        let call = self
            .call(Method::GET, &path, "pull")
            .header(ACCEPT, &accepted());
        let answer = self.client.send(call).await?;
        match answer.status().as_u16() {
            200 => {}
            404 => return Ok(None),
            _ => return Err(answer.into_error().await),
        }
        let stated = stated_digest(&answer);
        let content_type = answer.media_type().to_owned();
        let body = answer.bytes(limit).await?;
        let digest = match reference {
            TagOrDigest::Digest(asked) => Some(asked.clone()),
            TagOrDigest::Tag(_) => stated,
        };
        let digest = match digest {
            None => Digest::sha256(&body),
            Some(expected) => {
                let actual = Digest::of(expected.algorithm(), &body);
                if actual != expected {
                    return Err(Error::DigestMismatch {
                        what: self.what(&path),
                        expected,
                        actual: actual.to_string(),
                    });
                }
                expected
            }
        };
        Ok(Some(FetchedManifest {
            descriptor: Descriptor::new(
                &media_type_of(&body, &content_type),
                digest,
                body.len() as u64,
            ),
            body,
        }))
    }

    /// PUT of a manifest by digest or tag; maintains the referrers tag-schema index when the registry
    /// lacks the API (no `OCI-Subject`).
    ///
    /// # Errors
    /// [`Error::DigestMismatch`] when `reference` is a digest that `body` does not have, or when the
    /// registry states another one.
    pub async fn put_manifest(
        &self,
        reference: &TagOrDigest,
        media_type: &str,
        body: Bytes,
    ) -> Result<Digest, Error> {
        let path = format!("manifests/{reference}");
        let digest = match reference {
            TagOrDigest::Digest(digest) => {
                let actual = Digest::of(digest.algorithm(), &body);
                if actual != *digest {
                    return Err(Error::DigestMismatch {
                        what: self.what(&path),
                        expected: digest.clone(),
                        actual: actual.to_string(),
                    });
                }
                digest.clone()
            }
            TagOrDigest::Tag(_) => Digest::sha256(&body),
        };
        let call = self
            .call(Method::PUT, &path, "pull,push")
            .header(CONTENT_TYPE, media_type)
            .body(Body::Bytes(body.clone()));
        let answer = self.client.send(call).await?;
        if !answer.status().is_success() {
            return Err(answer.into_error().await);
        }
        if let Some(stated) = stated_digest(&answer)
            && !stated.matches(&body)
        {
            return Err(Error::DigestMismatch {
                what: self.what(&path),
                expected: digest,
                actual: stated.to_string(),
            });
        }
        let confirmed = answer.header(&OCI_SUBJECT).map(str::to_owned);
        let view = Manifest::parse(&body, media_type).ok();
        if let Some(view) = &view
            && let Some(subject) = &view.subject
            && confirmed.as_deref() != Some(&subject.digest.to_string())
        {
            let mut referrer = Descriptor::new(&view.media_type, digest.clone(), body.len() as u64);
            referrer.artifact_type = view.listed_artifact_type().map(str::to_owned);
            referrer.annotations.clone_from(&view.annotations);
            self.add_to_index(&subject.digest, &referrer).await?;
        }
        Ok(digest)
    }

    /// Gives the manifest that `reference` names another tag: the same bytes under another name.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such manifest.
    pub async fn tag(&self, reference: &TagOrDigest, tag: &Tag) -> Result<Descriptor, Error> {
        let fetched = self
            .manifest(reference)
            .await?
            .ok_or_else(|| Error::NotFound(self.what(&format!("manifests/{reference}"))))?;
        self.put_manifest(
            &TagOrDigest::Tag(tag.clone()),
            &fetched.descriptor.media_type,
            fetched.body,
        )
        .await?;
        Ok(fetched.descriptor)
    }

    /// DELETE of a manifest or tag.
    ///
    /// A manifest with a subject is also taken out of the subject's referrers tag-schema index, where
    /// the registry keeps none itself.
    ///
    /// # Errors
    /// [`Error::NotFound`], and [`Error::Unsupported`] where the registry deletes nothing.
    pub async fn delete_manifest(&self, reference: &TagOrDigest) -> Result<(), Error> {
        let subject = match reference {
            TagOrDigest::Digest(digest) => self.subject_of(digest).await?,
            TagOrDigest::Tag(_) => None,
        };
        let call = self.call(Method::DELETE, &format!("manifests/{reference}"), "delete");
        let answer = self.client.send(call).await?;
        match answer.status().as_u16() {
            200..=299 => {}
            405 | 501 => {
                return Err(Error::Unsupported(self.host.clone()));
            }
            _ => return Err(answer.into_error().await),
        }
        if let (Some(subject), TagOrDigest::Digest(digest)) = (subject, reference) {
            self.remove_from_index(&subject, digest).await?;
        }
        Ok(())
    }

    async fn subject_of(&self, digest: &Digest) -> Result<Option<Digest>, Error> {
        let fetched = match self.manifest(&TagOrDigest::Digest(digest.clone())).await {
            Ok(fetched) => fetched,
            // What cannot be read can still be deleted.
            Err(error) if !error.is_transient() => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(fetched.and_then(|fetched| {
            let view = Manifest::parse(&fetched.body, &fetched.descriptor.media_type).ok()?;
            Some(view.subject?.digest)
        }))
    }
}

/// What is asked for: every kind that is known, then whatever else lies there.
fn accepted() -> String {
    format!("{}, */*", media_type::MANIFESTS.join(", "))
}

/// The media type of a manifest: what was sent, unless that says nothing.
fn media_type_of(body: &[u8], content_type: &str) -> String {
    let says_nothing = matches!(
        content_type,
        "" | "application/json" | "application/octet-stream" | "text/plain" | "binary/octet-stream"
    );
    if !says_nothing {
        return printable(content_type);
    }
    Manifest::parse(body, "").map_or_else(|_| content_type.to_owned(), |view| view.media_type)
}

fn stated_digest(answer: &Answer) -> Option<Digest> {
    answer.header(&DOCKER_CONTENT_DIGEST)?.trim().parse().ok()
}

/// The longest manifest that is read, in bytes.
pub const MAX_MANIFEST: usize = 32 * 1024 * 1024;
const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
