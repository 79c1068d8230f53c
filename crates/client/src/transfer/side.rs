//! One end of a transfer, whatever it is.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Tag};

use super::{Location, Progress};
use crate::layout::{Layout, copy_verified};
use crate::registry::{FileContent, Outcome, Payload};
use crate::{Client, Error, FetchedManifest, Repository};

/// A repository or a layout.
pub(super) enum Side {
    Registry(Repository),
    Layout {
        layout: Layout,
        /// As they stood when it was opened: a layout is read as a whole to find them.
        referrers: HashMap<Digest, Vec<Descriptor>>,
    },
}

impl Side {
    pub(super) async fn source(client: &Client, location: &Location) -> Result<Self, Error> {
        match location {
            Location::Registry(reference) => Ok(Self::Registry(
                client.repository(&reference.host, &reference.repository),
            )),
            Location::Layout { path, .. } => {
                let layout = Layout::open(path).await?;
                let referrers = layout.all_referrers().await?;
                Ok(Self::Layout { layout, referrers })
            }
        }
    }

    pub(super) async fn destination(client: &Client, location: &Location) -> Result<Self, Error> {
        match location {
            Location::Registry(_) => Self::source(client, location).await,
            Location::Layout { path, .. } => Ok(Self::Layout {
                layout: Layout::create(path).await?,
                referrers: HashMap::new(),
            }),
        }
    }

    /// The manifest that a location names.
    pub(super) async fn root(&self, location: &Location) -> Result<FetchedManifest, Error> {
        let named = match (self, location.named()) {
            (_, Some(named)) => named,
            (Self::Layout { layout, .. }, None) => TagOrDigest::Digest(layout.resolve(None).await?),
            (Self::Registry(_), None) => {
                return Err(Error::Other(format!(
                    "`{location}` names neither a tag nor a digest, add `:<tag>`"
                )));
            }
        };
        self.manifest(&named)
            .await?
            .ok_or_else(|| Error::NotFound(location.to_string()))
    }

    pub(super) async fn manifest(
        &self,
        reference: &TagOrDigest,
    ) -> Result<Option<FetchedManifest>, Error> {
        match (self, reference) {
            (Self::Registry(repository), _) => repository.manifest(reference).await,
            (Self::Layout { layout, .. }, TagOrDigest::Digest(digest)) => {
                layout.manifest(digest).await
            }
            (Self::Layout { layout, .. }, TagOrDigest::Tag(tag)) => {
                match layout.resolve(Some(tag)).await {
                    Ok(digest) => layout.manifest(&digest).await,
                    Err(Error::NotFound(_)) => Ok(None),
                    Err(error) => Err(error),
                }
            }
        }
    }

    pub(super) async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        match self {
            Self::Registry(repository) => repository.referrers(subject, None).await,
            Self::Layout { referrers, .. } => {
                Ok(referrers.get(subject).cloned().unwrap_or_default())
            }
        }
    }

    /// Writes a manifest by its digest; `false` when it was there.
    pub(super) async fn put_manifest(
        &self,
        manifest: &FetchedManifest,
        has_subject: bool,
    ) -> Result<bool, Error> {
        let reference = TagOrDigest::Digest(manifest.descriptor.digest.clone());
        match self {
            Self::Registry(repository) => {
                // One with a subject is written again, for its entry in the subject's index, which the
                // registry may not keep by itself.
                if !has_subject && repository.head_manifest(&reference).await?.is_some() {
                    return Ok(false);
                }
                repository
                    .put_manifest(
                        &reference,
                        &manifest.descriptor.media_type,
                        manifest.body.clone(),
                    )
                    .await?;
                Ok(true)
            }
            Self::Layout { layout, .. } => {
                if layout.has_blob(&manifest.descriptor).await? {
                    return Ok(false);
                }
                layout
                    .put(&manifest.descriptor.digest, &manifest.body)
                    .await?;
                Ok(true)
            }
        }
    }

    /// Makes a manifest that is there reachable by its own: under a tag, or in a layout's list.
    pub(super) async fn publish(
        &self,
        manifest: &FetchedManifest,
        tag: Option<&Tag>,
    ) -> Result<(), Error> {
        match (self, tag) {
            (Self::Registry(_), None) => Ok(()),
            (Self::Registry(repository), Some(tag)) => repository
                .put_manifest(
                    &TagOrDigest::Tag(tag.clone()),
                    &manifest.descriptor.media_type,
                    manifest.body.clone(),
                )
                .await
                .map(drop),
            (Self::Layout { layout, .. }, tag) => layout.list(&manifest.descriptor, tag).await,
        }
    }

    /// Writes small content under its digest.
    pub(super) async fn put_bytes(
        &self,
        descriptor: &Descriptor,
        content: Bytes,
    ) -> Result<(), Error> {
        match self {
            Self::Registry(repository) => repository.put_blob(descriptor, content).await,
            Self::Layout { layout, .. } => layout.put(&descriptor.digest, &content).await,
        }
    }

    /// Writes a file under its digest; `false` when it was there.
    pub(super) async fn put_file(
        &self,
        descriptor: &Descriptor,
        path: &std::path::Path,
        progress: &dyn Progress,
    ) -> Result<bool, Error> {
        let digest = &descriptor.digest;
        let report = |bytes| progress.advance(digest, bytes);
        match self {
            Self::Registry(repository) => {
                let content = FileContent::new(path, descriptor.size).await?;
                let payload = Payload::Source(Arc::new(content));
                let outcome = repository
                    .upload(descriptor, &payload, None, &report)
                    .await?;
                Ok(outcome == Outcome::Uploaded)
            }
            Self::Layout { layout, .. } => {
                if layout.has_blob(descriptor).await? {
                    return Ok(false);
                }
                let target = layout.prepare(digest).await?;
                copy_verified(descriptor, path, &target, &report).await?;
                Ok(true)
            }
        }
    }

    /// Writes a blob to a file, verified and durable.
    pub(super) async fn blob_to_file(
        &self,
        descriptor: &Descriptor,
        path: &std::path::Path,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        let report = |bytes| progress.advance(&descriptor.digest, bytes);
        match self {
            Self::Registry(repository) => repository.download(descriptor, path, &report).await,
            Self::Layout { layout, .. } => {
                copy_verified(
                    descriptor,
                    &layout.blob_path(&descriptor.digest),
                    path,
                    &report,
                )
                .await
            }
        }
    }

    /// Brings a blob from here to `to`; `false` when no byte had to move.
    pub(super) async fn copy_blob(
        &self,
        to: &Self,
        descriptor: &Descriptor,
        progress: &dyn Progress,
    ) -> Result<bool, Error> {
        let digest = &descriptor.digest;
        match (self, to) {
            (Self::Registry(from), Self::Registry(to)) => {
                let report = |bytes| progress.advance(digest, bytes);
                to.copy_blob_with(descriptor, from, &report).await
            }
            (Self::Registry(_), Self::Layout { layout, .. }) => {
                if layout.has_blob(descriptor).await? {
                    return Ok(false);
                }
                let target = layout.prepare(digest).await?;
                self.blob_to_file(descriptor, &target, progress).await?;
                Ok(true)
            }
            (Self::Layout { layout, .. }, _) => {
                to.put_file(descriptor, &layout.blob_path(digest), progress)
                    .await
            }
        }
    }
}
