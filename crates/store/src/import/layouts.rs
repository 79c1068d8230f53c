//! OCI image layouts below a directory, one for each repository: zot's root directory, and any tree of layouts.
//!
//! A repository's name is the path of its layout. Tags are the annotation `org.opencontainers.image.ref.name` of the
//! entries of `index.json`. zot keeps the bytes of a blob that several repositories share in one of them, or in
//! `_blobstore`: elsewhere it is a hard link (on a disk), a file without bytes (copied out of a bucket), or nothing. Such
//! a blob is looked for by its digest in all directories, which are listed once, when the first such blob is met. Its
//! database of such blobs (`cache.db`) is not needed.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use oci::{Descriptor, Digest, Reference, RepositoryName, Tag};
use serde_json::Value;

use super::tree::{Kind, Tree};
use super::{
    Content, Contents, Document, Failure, Listed, MAX_MANIFEST, Repositories, Source, blocking,
    digest_of, verified,
};
use crate::error::Error;

/// Whose tree it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// zot's root directory: blobs may lie in another repository, untagged entries are kept by nothing.
    Zot,
    /// Layouts alone: each has its blobs, and every entry was listed on purpose.
    Plain,
}

/// A tree of layouts, opened for reading.
#[derive(Clone, Debug)]
pub struct Layouts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tree: Tree,
    shape: Shape,
    /// The name of the repository when the root itself is a layout.
    only: Option<String>,
    /// Where blobs with bytes lie, by digest.
    shared: OnceLock<HashMap<Digest, Arc<str>>>,
}

impl Layouts {
    /// Opens a directory with layouts somewhere below it, or one that is a layout itself.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read.
    pub fn open(root: &std::path::Path, shape: Shape) -> Result<Self, Error> {
        let tree = Tree::open(root)?;
        let only = matches!(tree.file(MARKER), Ok(Some(_))).then(|| {
            let name = root.canonicalize().unwrap_or_else(|_| root.to_owned());
            name.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_lowercase()
        });
        Ok(Self(Arc::new(Inner {
            tree,
            shape,
            only,
            shared: OnceLock::new(),
        })))
    }
}

impl Inner {
    fn names(&self) -> Repositories {
        let mut found = Repositories::default();
        for path in self.layouts(&mut found.problems) {
            let name = match &self.only {
                Some(only) if path.is_empty() => only.clone(),
                Some(only) => format!("{only}/{path}"),
                None => path.clone(),
            };
            match name.parse() {
                Ok(name) => found.names.push(name),
                // What begins so is zot's own and no repository.
                Err(_) if path.starts_with(['_', '.']) => {}
                Err(error) => found.problems.push(format!("`{path}`: {error}")),
            }
        }
        found
    }

    /// The paths of all layouts.
    fn layouts(&self, problems: &mut Vec<String>) -> Vec<String> {
        let mut found = Vec::new();
        let mut open = vec![String::new()];
        while let Some(path) = open.pop() {
            let entries = match self.tree.list(&path) {
                Ok(entries) => entries.unwrap_or_default(),
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            for entry in entries {
                // What a push or a sync left half done, layouts among it. (`blobs` is looked into: a repository below
                // another one may have that name.)
                if self.shape == Shape::Zot && TEMPORARY.contains(&entry.name.as_str()) {
                    continue;
                }
                let below = if path.is_empty() {
                    entry.name.clone()
                } else {
                    format!("{path}/{}", entry.name)
                };
                match entry.kind {
                    Kind::File if entry.name == MARKER => found.push(path.clone()),
                    Kind::Directory if below.len() <= MAX_PATH => open.push(below),
                    Kind::Other => {
                        problems.push(format!("`{}` is no directory", self.tree.at(&below)));
                    }
                    Kind::Directory | Kind::File => {}
                }
            }
        }
        found.sort();
        found
    }

    /// The path of a repository's layout.
    fn path(&self, repository: &RepositoryName) -> String {
        match &self.only {
            None => repository.as_str().to_owned(),
            Some(only) => repository
                .as_str()
                .strip_prefix(only.as_str())
                .unwrap_or_default()
                .trim_start_matches('/')
                .to_owned(),
        }
    }

    fn contents(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let path = format!("{}/index.json", self.path(repository));
        let broken = |what: &str| Failure::Broken(format!("`{}` {what}", self.tree.at(&path)));
        let text = self
            .tree
            .read(&path, MAX_INDEX)
            .map_err(Failure::Broken)?
            .ok_or_else(|| broken("is missing"))?;
        let index: Value = serde_json::from_slice(&text)
            .map_err(|error| broken(&format!("cannot be read: {error}")))?;
        let entries = index
            .get("manifests")
            .and_then(Value::as_array)
            .ok_or_else(|| broken("lists no manifests"))?;
        let mut contents = Contents::default();
        for entry in entries {
            let descriptor: Descriptor = match serde_json::from_value(entry.clone()) {
                Ok(descriptor) => descriptor,
                Err(error) => {
                    contents
                        .problems
                        .push(format!("an entry of `index.json` cannot be read: {error}"));
                    continue;
                }
            };
            let mut listed = Listed {
                digest: descriptor.digest.clone(),
                media_type: descriptor.media_type,
                wanted: self.shape == Shape::Plain,
            };
            if let Some(name) = descriptor.annotations.get(REF_NAME) {
                match tag_of(name) {
                    None => {
                        listed.wanted = true;
                        contents.problems.push(format!(
                            "`{name}` is no tag, its manifest comes without one"
                        ));
                    }
                    Some(tag) => {
                        let other = contents.tags.insert(tag.clone(), listed.digest.clone());
                        if let Some(other) = other.filter(|other| *other != listed.digest) {
                            contents.problems.push(format!(
                                "tag `{tag}` stands for `{other}` and for `{}`, the last one counts",
                                listed.digest
                            ));
                        }
                    }
                }
            }
            contents.listed.push(listed);
        }
        Ok(contents)
    }

    fn file(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<(std::fs::File, u64, String)>, String> {
        let own = blob(&self.path(repository), digest);
        if let Some((file, size)) = self.tree.file(&own)?
            && (size > 0 || self.shape == Shape::Plain || digest.matches(b""))
        {
            return Ok(Some((file, size, own)));
        }
        if self.shape == Shape::Plain {
            return Ok(None);
        }
        let shared = self.shared.get_or_init(|| self.find_shared());
        let Some(layout) = shared.get(digest) else {
            return Ok(None);
        };
        let path = blob(layout, digest);
        Ok(self
            .tree
            .file(&path)?
            .map(|(file, size)| (file, size, path)))
    }

    /// Looks where the bytes of every blob lie. What cannot be read has none.
    fn find_shared(&self) -> HashMap<Digest, Arc<str>> {
        let mut shared = HashMap::new();
        let mut layouts = self.layouts(&mut Vec::new());
        // The store of shared blobs need not be a layout.
        if !layouts.iter().any(|path| path == BLOB_STORE) {
            layouts.push(BLOB_STORE.to_owned());
        }
        for path in layouts {
            let layout: Arc<str> = Arc::from(path.as_str());
            let algorithms = self.tree.list(&format!("{path}/blobs")).ok().flatten();
            for algorithm in algorithms.unwrap_or_default() {
                let directory = format!("{path}/blobs/{}", algorithm.name);
                let blobs = self.tree.list(&directory).ok().flatten();
                for entry in blobs.unwrap_or_default() {
                    let Some(digest) = digest_of(&algorithm.name, &entry.name) else {
                        continue;
                    };
                    if shared.contains_key(&digest) {
                        continue;
                    }
                    let file = self.tree.file(&format!("{directory}/{}", entry.name));
                    if matches!(file, Ok(Some((_, size))) if size > 0) {
                        shared.insert(digest, Arc::clone(&layout));
                    }
                }
            }
        }
        shared
    }
}

impl Source for Layouts {
    async fn repositories(&self) -> Result<Repositories, Failure> {
        let inner = Arc::clone(&self.0);
        blocking(move || Ok(inner.names())).await
    }

    async fn contents(&self, repository: &RepositoryName) -> Result<Contents, Failure> {
        let (inner, repository) = (Arc::clone(&self.0), repository.clone());
        blocking(move || inner.contents(&repository)).await
    }

    async fn manifest(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<Document>, Failure> {
        let (inner, repository, digest) = (Arc::clone(&self.0), repository.clone(), digest.clone());
        blocking(move || {
            let found = inner.file(&repository, &digest).map_err(Failure::Broken)?;
            let Some((_, _, path)) = found else {
                return Ok(None);
            };
            let body = inner
                .tree
                .read(&path, MAX_MANIFEST)
                .map_err(Failure::Broken)?
                .unwrap_or_default();
            Ok(Some(Document {
                body: verified(&digest, body, &inner.tree.at(&path))?,
                media_type: String::new(),
            }))
        })
        .await
    }

    async fn referrers(
        &self,
        _repository: &RepositoryName,
        _subject: &Digest,
    ) -> Result<Vec<Digest>, Failure> {
        // `index.json` lists them.
        Ok(Vec::new())
    }

    async fn blob(
        &self,
        repository: &RepositoryName,
        descriptor: &Descriptor,
    ) -> Result<Option<Content>, Failure> {
        let (inner, repository, digest) = (
            Arc::clone(&self.0),
            repository.clone(),
            descriptor.digest.clone(),
        );
        blocking(move || {
            let found = inner.file(&repository, &digest).map_err(Failure::Broken)?;
            Ok(found.map(|(file, size, _)| Content::File(file, size)))
        })
        .await
    }
}

fn blob(layout: &str, digest: &Digest) -> String {
    format!("{layout}/blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// The tag in a `ref.name`: the name itself, or the tag of the whole reference that some programs write there.
fn tag_of(name: &str) -> Option<Tag> {
    name.parse::<Tag>().ok().or_else(|| {
        let reference: Reference = name.parse().ok()?;
        reference.tag
    })
}

const MARKER: &str = "oci-layout";
/// Where zot keeps what is under way, in each repository.
const TEMPORARY: [&str; 2] = [".uploads", ".sync"];
/// Where versions of zot keep the bytes of shared blobs.
const BLOB_STORE: &str = "_blobstore";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The longest `index.json`, in bytes: one of zot's lists every manifest of its repository.
const MAX_INDEX: usize = 256 * 1024 * 1024;
/// The longest path below the root: a name and what a layout has below it.
const MAX_PATH: usize = 400;
