//! `longshore export`: repositories out into a tree of OCI layouts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clap::Args;
use client::layout::{Layout, REF_NAME};
use oci::{Descriptor, Digest, Manifest, RepositoryName, Tag};
use store::import::{self, Arrival, Content, Entry, Failure, Placed, Plans, Sink, StoreSource};

use tokio::sync::OnceCell;

use super::Global;
use super::import::{Live, beside_maintenance, plans, show};
use crate::output::Exit;
use crate::place::Place;

/// Write repositories into a directory of OCI layouts.
///
/// Each repository becomes the layout `DIR/NAME`, with its tags, everything attached, and the subjects of what is
/// attached. A blob of several repositories is one file with several names. What is there already is skipped, and at
/// the end both sides are compared. `longshore import --from layout:DIR` brings it back with equal digests.
#[derive(Debug, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    place: Place,
    /// Read a registry that runs in place of a store: `HOST[/PREFIX]`.
    #[arg(long, value_name = "HOST", conflicts_with_all = ["data", "config"])]
    from: Option<String>,
    /// The directory to write into.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Only repositories whose name fits: `*` within one component, `**` over several. Several may be named.
    #[arg(long, value_name = "GLOB", num_args = 1..)]
    repository: Vec<String>,
    /// Read and count, write nothing.
    #[arg(long)]
    dry_run: bool,
    /// How many blobs or manifests move at one time.
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = super::import::parallel())]
    parallel: u16,
    /// Send a registry no more than this many requests a second.
    #[arg(long, value_name = "REQUESTS", requires = "from", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
}

impl Export {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let plans = Plans {
            dry_run: self.dry_run,
            ..plans(&self.repository, usize::from(self.parallel), global)?
        };
        let report = if let Some(from) = &self.from {
            let source = Live::new(
                global.client()?,
                from,
                usize::from(self.parallel),
                self.rate,
            )?;
            let sink = Directories::new(&self.to);
            Box::pin(import::run(&source, &sink, &plans)).await?
        } else {
            let (location, _) = self.place.location()?;
            if let store::ObjectLocation::Directory(data) = &location.objects {
                store::require_apart(&self.to, data)?;
            }
            if let store::DatabaseLocation::Sqlite(data) = &location.database {
                store::require_apart(&self.to, data)?;
            }
            let store = self.place.open("export").await?;
            let sink = Directories::new(&self.to);
            let source = StoreSource::new(&store);
            let outcome =
                beside_maintenance(&store, Box::pin(import::run(&source, &sink, &plans))).await;
            store.close().await?;
            outcome?
        };
        show(&report, global)
    }
}

/// A tree of layouts that takes content in.
struct Directories {
    root: PathBuf,
    /// Opened or made once each: many blobs of a repository come at one time.
    layouts: Mutex<HashMap<RepositoryName, Arc<OnceCell<Layout>>>>,
    /// Repositories that are done or begun in this run, by blob: where a file can be shared from.
    written: Mutex<HashMap<Digest, RepositoryName>>,
    /// The tags of layouts that were read a moment ago.
    tags: Mutex<HashMap<RepositoryName, HashMap<String, Digest>>>,
}

impl Directories {
    fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            layouts: Mutex::default(),
            written: Mutex::default(),
            tags: Mutex::default(),
        }
    }

    async fn layout(&self, repository: &RepositoryName) -> Result<Layout, Failure> {
        let cell = match self.layouts.lock() {
            Ok(mut layouts) => Arc::clone(layouts.entry(repository.clone()).or_default()),
            Err(_) => Arc::default(),
        };
        let path = self.root.join(repository.as_str());
        cell.get_or_try_init(|| Layout::create_in_tree(&path))
            .await
            .cloned()
            .map_err(Failure::fatal)
    }

    fn note(&self, repository: &RepositoryName, digest: &Digest) {
        if let Ok(mut written) = self.written.lock() {
            written
                .entry(digest.clone())
                .or_insert_with(|| repository.clone());
        }
    }

    fn holder(&self, digest: &Digest) -> Option<RepositoryName> {
        self.written.lock().ok()?.get(digest).cloned()
    }
}

impl Sink for Directories {
    fn accepts_sparse(&self) -> bool {
        true
    }

    async fn tag(&self, repository: &RepositoryName, tag: &Tag) -> Result<Option<Digest>, Failure> {
        if let Ok(known) = self.tags.lock()
            && let Some(tags) = known.get(repository)
        {
            return Ok(tags.get(tag.as_str()).cloned());
        }
        let layout = self.layout(repository).await?;
        let tags: HashMap<String, Digest> = layout
            .entries()
            .await
            .map_err(Failure::fatal)?
            .into_iter()
            .filter_map(|entry| Some((entry.annotations.get(REF_NAME)?.clone(), entry.digest)))
            .collect();
        let found = tags.get(tag.as_str()).cloned();
        if let Ok(mut known) = self.tags.lock() {
            // Few repositories are under way at one time.
            if known.len() >= KNOWN {
                known.clear();
            }
            known.insert(repository.clone(), tags);
        }
        Ok(found)
    }

    async fn has_manifest(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<bool, Failure> {
        let layout = self.layout(repository).await?;
        match layout.manifest(&descriptor.digest).await {
            Ok(found) => Ok(found.is_some()),
            // A damaged file is written again.
            Err(client::Error::DigestMismatch { .. }) => Ok(false),
            Err(error) => Err(Failure::fatal(error)),
        }
    }

    async fn has_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        take: bool,
    ) -> Result<bool, Failure> {
        let layout = self.layout(repository).await?;
        let digest = &descriptor.digest;
        if layout.has_blob(descriptor).await.map_err(Failure::fatal)? {
            self.note(repository, digest);
            return Ok(true);
        }
        let Some(holder) = self.holder(digest).filter(|_| take) else {
            return Ok(false);
        };
        let other = self.layout(&holder).await?;
        layout
            .link_blob(descriptor, &other)
            .await
            .map_err(Failure::fatal)
    }

    async fn has_referrer(
        &self,
        repository: &RepositoryName,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<bool, Failure> {
        // A referrer is found by reading it: its subject stands in its own bytes.
        let layout = self.layout(repository).await?;
        let found = layout.manifest(referrer).await.map_err(Failure::fatal)?;
        Ok(found
            .and_then(|found| Manifest::parse(&found.body, "").ok())
            .and_then(|view| view.subject)
            .is_some_and(|found| found.digest == *subject))
    }

    async fn put_blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
        content: Content,
    ) -> Result<Placed, Failure> {
        let layout = self.layout(repository).await?;
        let digest = &descriptor.digest;
        let mut writer = layout.blob_writer(digest).await.map_err(Failure::fatal)?;
        let mut chunks = content.into_chunks();
        while let Some(chunk) = chunks.next().await? {
            writer.write(&chunk).await.map_err(Failure::fatal)?;
        }
        match writer.commit(digest).await {
            Ok(()) => {}
            Err(error @ client::Error::DigestMismatch { .. }) => {
                return Err(Failure::Broken(error.to_string()));
            }
            Err(error) => return Err(Failure::fatal(error)),
        }
        self.note(repository, digest);
        Ok(Placed::Copied)
    }

    async fn put_manifest(
        &self,
        repository: &RepositoryName,
        arrival: Arrival,
    ) -> Result<(), Failure> {
        let layout = self.layout(repository).await?;
        let mut writer = layout
            .blob_writer(&arrival.digest)
            .await
            .map_err(Failure::fatal)?;
        writer.write(&arrival.body).await.map_err(Failure::fatal)?;
        writer.commit(&arrival.digest).await.map_err(Failure::fatal)
    }

    async fn finish(
        &self,
        repository: &RepositoryName,
        entries: Vec<Entry>,
    ) -> Result<(), Failure> {
        let layout = self.layout(repository).await?;
        let entries: Vec<_> = entries
            .into_iter()
            .map(|entry| (entry.descriptor, entry.tag))
            .collect();
        if let Ok(mut known) = self.tags.lock() {
            known.remove(repository);
        }
        layout.set_entries(&entries).await.map_err(Failure::fatal)
    }
}

/// Of how many layouts the tags are held.
const KNOWN: usize = 16;
