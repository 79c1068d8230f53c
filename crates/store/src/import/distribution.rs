//! The storage directory of the CNCF distribution registry (`registry:2`, `registry:3`, and what is built on it).
//!
//! Below `docker/registry/v2`, `blobs/<algorithm>/<2 hex>/<hex>/data` holds every content once, and
//! `repositories/<name>/_manifests` has `tags/<tag>/current/link` and `revisions/<algorithm>/<hex>/link`, small files
//! with a digest in them. It never writes to a `data` file again, so one may be linked.

use std::sync::Arc;

use oci::{Descriptor, Digest, RepositoryName, Tag};

use super::tree::{Kind, Tree};
use super::{
    Content, Contents, Document, Failure, Listed, MAX_MANIFEST, Repositories, Source, blocking,
    digest_of, verified,
};
use crate::error::Error;

/// A storage directory of distribution, opened for reading.
#[derive(Clone, Debug)]
pub struct Distribution {
    tree: Arc<Tree>,
    /// From the root to the directory that holds `blobs` and `repositories`.
    base: &'static str,
}

impl Distribution {
    /// Opens the directory that distribution is configured with (`rootdirectory`), or its `docker/registry/v2`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::NotADataDirectory`] when it is no such directory.
    pub fn open(root: &std::path::Path) -> Result<Self, Error> {
        let tree = Arc::new(Tree::open(root)?);
        for base in ["docker/registry/v2/", ""] {
            if matches!(tree.list(&format!("{base}repositories")), Ok(Some(_))) {
                return Ok(Self { tree, base });
            }
        }
        Err(Error::damaged(
            root,
            "it is no storage directory of distribution: there is no `docker/registry/v2/repositories` below it",
        ))
    }

    fn names(&self) -> Repositories {
        let mut found = Repositories::default();
        let mut open = vec![String::new()];
        while let Some(name) = open.pop() {
            let path = format!("{}repositories/{name}", self.base);
            let entries = match self.tree.list(&path) {
                Ok(entries) => entries.unwrap_or_default(),
                Err(problem) => {
                    found.problems.push(problem);
                    continue;
                }
            };
            for entry in entries {
                let below = if name.is_empty() {
                    entry.name.clone()
                } else {
                    format!("{name}/{}", entry.name)
                };
                match entry.kind {
                    Kind::Directory if entry.name == "_manifests" => match name.parse() {
                        Ok(name) => found.names.push(name),
                        Err(error) => found.problems.push(format!("`{name}`: {error}")),
                    },
                    // `_layers`, `_uploads`: no component of a name begins so.
                    Kind::Directory if entry.name.starts_with('_') => {}
                    Kind::Directory if below.len() <= MAX_NAME => open.push(below),
                    Kind::Other => found.problems.push(format!(
                        "`{}` is no directory",
                        self.tree.at(&format!("{path}/{}", entry.name))
                    )),
                    Kind::Directory | Kind::File => {}
                }
            }
        }
        found
    }

    fn contents_of(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let manifests = format!("{}repositories/{repository}/_manifests", self.base);
        let mut contents = Contents::default();
        let tags = self
            .tree
            .list(&format!("{manifests}/tags"))
            .map_err(Failure::Broken)?;
        for entry in tags.unwrap_or_default() {
            let name = entry.name;
            let Ok(tag) = name.parse::<Tag>() else {
                contents.problems.push(format!("`{name}` is no tag"));
                continue;
            };
            match self.link(&format!("{manifests}/tags/{name}/current/link")) {
                Ok(Some(digest)) => {
                    contents.tags.insert(tag, digest);
                }
                // A tag that was deleted leaves its directory behind.
                Ok(None) => {}
                Err(problem) => contents.problems.push(format!("tag `{name}`: {problem}")),
            }
        }
        let revisions = format!("{manifests}/revisions");
        let algorithms = self.tree.list(&revisions).map_err(Failure::Broken)?;
        for algorithm in algorithms.unwrap_or_default() {
            let algorithm = algorithm.name;
            let listed = self
                .tree
                .list(&format!("{revisions}/{algorithm}"))
                .map_err(Failure::Broken)?;
            for entry in listed.unwrap_or_default() {
                let Some(digest) = digest_of(&algorithm, &entry.name) else {
                    contents.problems.push(format!(
                        "revision `{algorithm}:{}` is no digest",
                        entry.name
                    ));
                    continue;
                };
                // The link of a manifest that was deleted is gone.
                match self.link(&format!("{revisions}/{algorithm}/{}/link", entry.name)) {
                    Ok(Some(link)) if link == digest => contents.listed.push(Listed {
                        digest,
                        media_type: String::new(),
                        wanted: false,
                    }),
                    Ok(Some(link)) => contents
                        .problems
                        .push(format!("the link of revision `{digest}` holds `{link}`")),
                    Ok(None) => {}
                    Err(problem) => contents
                        .problems
                        .push(format!("revision `{digest}`: {problem}")),
                }
            }
        }
        Ok(contents)
    }

    /// The digest in a link file; `None` when there is none.
    fn link(&self, path: &str) -> Result<Option<Digest>, String> {
        let Some(text) = self.tree.read(path, MAX_LINK)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&text);
        text.trim()
            .parse()
            .map(Some)
            .map_err(|_| format!("`{}` holds no digest", self.tree.at(path)))
    }

    fn data(&self, digest: &Digest) -> String {
        let hex = digest.hex();
        format!(
            "{}blobs/{}/{}/{hex}/data",
            self.base,
            digest.algorithm(),
            &hex[..2]
        )
    }
}

impl Source for Distribution {
    async fn repositories(&self) -> Result<Repositories, Failure> {
        let source = self.clone();
        blocking(move || Ok(source.names())).await
    }

    async fn contents(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let (source, repository) = (self.clone(), repository.clone());
        blocking(move || source.contents_of(&repository)).await
    }

    async fn manifest(
        &self,
        _repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Document>, Failure> {
        let (source, digest) = (self.clone(), digest.clone());
        blocking(move || {
            let path = source.data(&digest);
            let body = source
                .tree
                .read(&path, MAX_MANIFEST)
                .map_err(Failure::Broken)?;
            body.map(|body| {
                Ok(Document {
                    body: verified(&digest, body, &source.tree.at(&path))?,
                    media_type: String::new(),
                })
            })
            .transpose()
        })
        .await
    }

    async fn referrers(
        &self,
        _repository: &RepositoryName,
        _subject: &Digest,
    ) -> Result<Vec<Digest>, Failure> {
        // All revisions are listed.
        Ok(Vec::new())
    }

    async fn blob(
        &self,
        _repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<Option<Content>, Failure> {
        let (source, digest) = (self.clone(), descriptor.digest.clone());
        blocking(move || {
            let file = source
                .tree
                .file(&source.data(&digest))
                .map_err(Failure::Broken)?;
            Ok(file.map(|(file, size)| Content::File(file, size)))
        })
        .await
    }
}

/// A link holds one digest.
const MAX_LINK: usize = 1024;
/// The longest name of a repository.
const MAX_NAME: usize = 255;
