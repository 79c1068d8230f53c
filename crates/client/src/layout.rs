//! OCI image layout directories
//! ([image-spec § Image layout](https://github.com/opencontainers/image-spec/blob/main/image-layout.md)).
//!
//! A layout is `oci-layout`, `index.json` and `blobs/<algorithm>/<hex>`. Tags are the annotation
//! `org.opencontainers.image.ref.name` of an entry of `index.json`. Every file is written beside its
//! place, made durable and then renamed, so a reader never sees half of one; changes of `index.json`
//! take turns by a lock on `oci-layout`.

mod durable;
mod whole;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oci::{Descriptor, Digest, Hasher, Manifest, Tag, media_type};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

pub(crate) use durable::Durable;
pub use whole::BlobWriter;

use crate::registry::{MAX_MANIFEST, fallback_tag, lenient_descriptors};
use crate::{Error, FetchedManifest};

/// A layout directory.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Opens a layout that is there.
    ///
    /// # Errors
    /// [`Error::File`] when it is not, [`Error::Other`] when it has another version.
    pub async fn open(root: &Path) -> Result<Self, Error> {
        let marker = root.join(MARKER);
        let text = read_bounded(&marker, MAX_MARKER).await?;
        let version = serde_json::from_slice::<Value>(&text)
            .ok()
            .and_then(|value| value.get("imageLayoutVersion")?.as_str().map(str::to_owned));
        match version.as_deref() {
            Some(VERSION) => Ok(Self {
                root: root.to_owned(),
            }),
            Some(other) => Err(Error::Other(format!(
                "`{}` is an OCI layout of version `{other}`, only `{VERSION}` is known",
                root.display()
            ))),
            None => Err(Error::Other(format!(
                "`{}` is not the `oci-layout` file of an OCI layout",
                marker.display()
            ))),
        }
    }

    /// Opens a layout, or makes an empty one in a directory that is new or empty.
    ///
    /// # Errors
    /// [`Error::Other`] when the directory holds something else.
    pub async fn create(root: &Path) -> Result<Self, Error> {
        if tokio::fs::try_exists(root.join(MARKER))
            .await
            .map_err(Error::file(root))?
        {
            return Self::open(root).await;
        }
        make_directory(root).await?;
        let mut entries = tokio::fs::read_dir(root).await.map_err(Error::file(root))?;
        let mut foreign = false;
        while let Some(entry) = entries.next_entry().await.map_err(Error::file(root))? {
            // What an earlier, interrupted start left here is ours.
            let name = entry.file_name();
            foreign |= !(name == "blobs"
                || name == INDEX
                || name.to_string_lossy().starts_with(".oci-layout."));
        }
        if foreign {
            return Err(Error::Other(format!(
                "`{}` holds other files and is no OCI layout; name an empty or new directory",
                root.display()
            )));
        }
        make_directory(&root.join("blobs")).await?;
        let index = root.join(INDEX);
        if !tokio::fs::try_exists(&index)
            .await
            .map_err(Error::file(&index))?
        {
            Durable::write_all(&index, &encode(&empty_index())).await?;
        }
        // The marker comes last: a directory that has it is complete.
        let marker = json!({ "imageLayoutVersion": VERSION });
        Durable::write_all(&root.join(MARKER), &encode(&marker)).await?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the content with this digest lies, or would lie.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("blobs")
            .join(digest.algorithm().name())
            .join(digest.hex())
    }

    /// The entries of `index.json`. One that cannot be read is passed over.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn entries(&self) -> Result<Vec<Descriptor>, Error> {
        Ok(lenient_descriptors(&self.index().await?))
    }

    /// The tags, in the order of `index.json`.
    ///
    /// # Errors
    /// As [`Layout::entries`].
    pub async fn tags(&self) -> Result<Vec<String>, Error> {
        Ok(self
            .entries()
            .await?
            .iter()
            .filter_map(|entry| entry.annotations.get(REF_NAME).cloned())
            .collect())
    }

    /// The digest that a tag stands for; without a tag that of the only entry.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown tag; without a tag, when there is not exactly one entry that
    /// it can mean.
    pub async fn resolve(&self, tag: Option<&Tag>) -> Result<Digest, Error> {
        let entries = self.entries().await?;
        if let Some(tag) = tag {
            return entries
                .iter()
                .find(|entry| {
                    entry.annotations.get(REF_NAME).map(String::as_str) == Some(tag.as_str())
                })
                .map(|entry| entry.digest.clone())
                .ok_or_else(|| Error::NotFound(format!("oci:{}:{tag}", self.root.display())));
        }
        // Evidence beside the artifact does not make it ambiguous.
        let mut meant: Vec<&Digest> = Vec::new();
        for entry in &entries {
            let evidence = entry
                .annotations
                .get(REF_NAME)
                .and_then(|name| name.parse::<Tag>().ok())
                .is_some_and(|tag| tag.subject().is_some());
            if !evidence
                && !meant.contains(&&entry.digest)
                && self.subject_of(entry).await.is_none()
            {
                meant.push(&entry.digest);
            }
        }
        match meant.as_slice() {
            [only] => Ok((*only).clone()),
            [] => Err(Error::NotFound(format!("oci:{}", self.root.display()))),
            _ => Err(Error::Other(format!(
                "`{}` holds {} artifacts, name one by `oci:{}:<tag>` or `@<digest>`; its tags are {}",
                self.root.display(),
                meant.len(),
                self.root.display(),
                tag_list(&entries)
            ))),
        }
    }

    /// A manifest with its exact bytes, verified; `None` when it is not there. The media type is what
    /// the document or `index.json` says.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`] when the file was changed.
    pub async fn manifest(&self, digest: &Digest) -> Result<Option<FetchedManifest>, Error> {
        let path = self.blob_path(digest);
        let body = match read_bounded(&path, MAX_MANIFEST).await {
            Ok(body) => body,
            Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let actual = Digest::of(digest.algorithm(), &body);
        if actual != *digest {
            return Err(mismatch(&path, digest, &actual));
        }
        let media_type = match Manifest::parse(&body, "") {
            Ok(view) => view.media_type,
            Err(_) => self
                .entries()
                .await?
                .into_iter()
                .find(|entry| entry.digest == *digest)
                .map(|entry| entry.media_type)
                .unwrap_or_default(),
        };
        let descriptor = Descriptor::new(&media_type, digest.clone(), body.len() as u64);
        Ok(Some(FetchedManifest {
            descriptor,
            body: Bytes::from(body),
        }))
    }

    /// Tells whether a blob is there with its full length.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        let path = self.blob_path(&descriptor.digest);
        match tokio::fs::metadata(&path).await {
            Ok(metadata) => Ok(metadata.is_file() && metadata.len() == descriptor.size),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::file(&path)(error)),
        }
    }

    /// Writes content under its digest, unless it is there.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`] when `content` does not have this digest.
    pub async fn put(&self, digest: &Digest, content: &[u8]) -> Result<(), Error> {
        let path = self.blob_path(digest);
        let actual = Digest::of(digest.algorithm(), content);
        if actual != *digest {
            return Err(mismatch(&path, digest, &actual));
        }
        let descriptor = Descriptor::new("", digest.clone(), content.len() as u64);
        if self.has_blob(&descriptor).await? {
            return Ok(());
        }
        self.prepare(digest).await?;
        Durable::write_all(&path, content).await
    }

    /// Makes the directory that the content with this digest lies in.
    pub(crate) async fn prepare(&self, digest: &Digest) -> Result<PathBuf, Error> {
        let path = self.blob_path(digest);
        if let Some(parent) = path.parent() {
            make_directory(parent).await?;
        }
        Ok(path)
    }

    /// Lists a manifest in `index.json`, under a tag if there is one. The tag then stands for no other
    /// manifest; what it stood for stays listed without it.
    ///
    /// # Errors
    /// When `index.json` cannot be read or written.
    pub async fn list(&self, descriptor: &Descriptor, tag: Option<&Tag>) -> Result<(), Error> {
        let descriptor = descriptor.clone();
        let tag = tag.cloned();
        self.change_index(move |entries| list(entries, &descriptor, tag.as_ref()))
            .await
    }

    /// Takes a tag out of `index.json`; `false` when it was not there. The content stays.
    ///
    /// # Errors
    /// As [`Layout::list`].
    pub async fn untag(&self, tag: &Tag) -> Result<bool, Error> {
        let had = self.tags().await?.iter().any(|known| known == tag.as_str());
        if had {
            let tag = tag.clone();
            self.change_index(move |entries| release(entries, &tag))
                .await?;
        }
        Ok(had)
    }

    /// What refers to a subject: entries of `index.json` whose manifest names it, and those that an
    /// index of the referrers tag schema lists.
    ///
    /// # Errors
    /// When `index.json` cannot be read.
    pub async fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        Ok(self
            .all_referrers()
            .await?
            .remove(subject)
            .unwrap_or_default())
    }

    /// All referrers by subject.
    pub(crate) async fn all_referrers(&self) -> Result<HashMap<Digest, Vec<Descriptor>>, Error> {
        let mut found: HashMap<Digest, Vec<Descriptor>> = HashMap::new();
        let mut add = |subject: Digest, referrer: Descriptor| {
            let all = found.entry(subject).or_default();
            if !all.iter().any(|known| known.digest == referrer.digest) {
                all.push(referrer);
            }
        };
        for entry in self.entries().await? {
            if let Some((subject, referrer)) = self.subject_of(&entry).await {
                add(subject, referrer);
            }
            let schema = entry
                .annotations
                .get(REF_NAME)
                .and_then(|name| name.parse::<Tag>().ok())
                .and_then(|tag| {
                    let subject = tag.subject()?;
                    (fallback_tag(&subject).ok()? == tag).then_some(subject)
                });
            if let Some(subject) = schema
                && let Ok(Some(index)) = self.manifest(&entry.digest).await
                && let Ok(index) = serde_json::from_slice::<Value>(&index.body)
            {
                for referrer in lenient_descriptors(&index) {
                    add(subject.clone(), referrer);
                }
            }
        }
        Ok(found)
    }

    /// The subject of an entry, with the descriptor that a list of referrers would show.
    async fn subject_of(&self, entry: &Descriptor) -> Option<(Digest, Descriptor)> {
        if !media_type::is_manifest(&entry.media_type) {
            return None;
        }
        // An entry that cannot be read refers to nothing.
        let fetched = self.manifest(&entry.digest).await.ok()??;
        let view = Manifest::parse(&fetched.body, "").ok()?;
        let mut referrer = fetched.descriptor;
        referrer.artifact_type = view.listed_artifact_type().map(str::to_owned);
        referrer.annotations.clone_from(&view.annotations);
        Some((view.subject?.digest, referrer))
    }

    async fn index(&self) -> Result<Value, Error> {
        let path = self.root.join(INDEX);
        let text = read_bounded(&path, MAX_MANIFEST).await?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::Other(format!("`{}` cannot be read: {error}", path.display())))
    }

    async fn change_index(
        &self,
        change: impl FnOnce(&mut Vec<Value>) + Send + 'static,
    ) -> Result<(), Error> {
        let marker = self.root.join(MARKER);
        let lock = tokio::task::spawn_blocking(move || {
            let file = fs::File::open(&marker).map_err(Error::file(&marker))?;
            file.lock().map_err(Error::file(&marker))?;
            Ok(file)
        })
        .await
        .map_err(|error| Error::Other(format!("the lock was not taken: {error}")))??;
        let mut index = self.index().await?;
        if !index.get("manifests").is_some_and(Value::is_array)
            && let Some(map) = index.as_object_mut()
        {
            map.insert("manifests".to_owned(), json!([]));
        }
        let Some(entries) = index.get_mut("manifests").and_then(Value::as_array_mut) else {
            return Err(Error::Other(format!(
                "`{}` is not a JSON object; repair or remove it",
                self.root.join(INDEX).display()
            )));
        };
        change(entries);
        let written = Durable::write_all(&self.root.join(INDEX), &encode(&index)).await;
        drop(lock);
        written
    }
}

/// Copies a file, its length and digest checked on the way.
pub(crate) async fn copy_verified(
    descriptor: &Descriptor,
    from: &Path,
    to: &Path,
    progress: crate::registry::Progress<'_>,
) -> Result<(), Error> {
    let mut source = tokio::fs::File::open(from)
        .await
        .map_err(Error::file(from))?;
    let mut hasher = Hasher::new(descriptor.digest.algorithm());
    let mut file = Durable::create(to).await?;
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    while total <= descriptor.size {
        let length = source.read(&mut buffer).await.map_err(Error::file(from))?;
        if length == 0 {
            break;
        }
        total += length as u64;
        hasher.update(&buffer[..length]);
        file.write(&buffer[..length]).await?;
        progress(length as u64);
    }
    if total != descriptor.size {
        return Err(Error::SizeMismatch {
            what: from.display().to_string(),
            expected: descriptor.size,
            actual: total,
        });
    }
    let actual = hasher.finish();
    if actual != descriptor.digest {
        return Err(mismatch(from, &descriptor.digest, &actual));
    }
    file.commit().await
}

/// Lists a manifest among entries whose unknown fields stay.
fn list(entries: &mut Vec<Value>, descriptor: &Descriptor, tag: Option<&Tag>) {
    let text = descriptor.digest.to_string();
    let has_digest = |entry: &Value| entry.get("digest").and_then(Value::as_str) == Some(&text);
    let name_of = |entry: &Value| {
        entry
            .get("annotations")?
            .get(REF_NAME)?
            .as_str()
            .map(str::to_owned)
    };
    let mut entry = descriptor.clone();
    entry.annotations.remove(REF_NAME);
    let Some(tag) = tag else {
        if !entries.iter().any(has_digest) {
            entries.push(serde_json::to_value(entry).unwrap_or_default());
        }
        return;
    };
    if entries
        .iter()
        .any(|known| has_digest(known) && name_of(known).as_deref() == Some(tag.as_str()))
    {
        return;
    }
    release(entries, tag);
    // An entry without a tag takes the tag; one with another tag gets a neighbor.
    entries.retain(|known| !(has_digest(known) && name_of(known).is_none()));
    entry
        .annotations
        .insert(REF_NAME.to_owned(), tag.as_str().to_owned());
    entries.push(serde_json::to_value(entry).unwrap_or_default());
}

/// Takes a tag off its entry. The entry stays, unless its manifest is listed otherwise.
fn release(entries: &mut Vec<Value>, tag: &Tag) {
    for at in (0..entries.len()).rev() {
        let named = entries[at]
            .get("annotations")
            .and_then(|all| all.get(REF_NAME))
            .and_then(Value::as_str)
            == Some(tag.as_str());
        if !named {
            continue;
        }
        let digest = entries[at].get("digest").cloned();
        let elsewhere = entries
            .iter()
            .enumerate()
            .any(|(other, entry)| other != at && entry.get("digest").cloned() == digest);
        if elsewhere {
            entries.remove(at);
        } else if let Some(entry) = entries[at].as_object_mut()
            && let Some(annotations) = entry.get_mut("annotations").and_then(Value::as_object_mut)
        {
            annotations.remove(REF_NAME);
            if annotations.is_empty() {
                entry.remove("annotations");
            }
        }
    }
}

fn empty_index() -> Value {
    json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [] })
}

fn encode(value: &Value) -> Vec<u8> {
    // Invariant: a JSON value always serialises.
    serde_json::to_vec(value).unwrap_or_default()
}

fn tag_list(entries: &[Descriptor]) -> String {
    let tags: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.annotations.get(REF_NAME))
        .take(20)
        .map(|tag| format!("`{tag}`"))
        .collect();
    if tags.is_empty() {
        "none".to_owned()
    } else {
        tags.join(", ")
    }
}

fn mismatch(path: &Path, expected: &Digest, actual: &Digest) -> Error {
    Error::DigestMismatch {
        what: path.display().to_string(),
        expected: expected.clone(),
        actual: actual.to_string(),
    }
}

async fn read_bounded(path: &Path, limit: usize) -> Result<Vec<u8>, Error> {
    let file = tokio::fs::File::open(path)
        .await
        .map_err(Error::file(path))?;
    let mut content = Vec::new();
    file.take(limit as u64 + 1)
        .read_to_end(&mut content)
        .await
        .map_err(Error::file(path))?;
    if content.len() > limit {
        return Err(Error::Other(format!(
            "`{}` has more than {limit} bytes",
            path.display()
        )));
    }
    Ok(content)
}

/// Makes a directory, durable in the one above.
async fn make_directory(path: &Path) -> Result<(), Error> {
    if tokio::fs::try_exists(path)
        .await
        .map_err(Error::file(path))?
    {
        return Ok(());
    }
    tokio::fs::create_dir_all(path)
        .await
        .map_err(Error::file(path))?;
    durable::sync_parent(path).await
}

/// The annotation that holds a tag.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
const MARKER: &str = "oci-layout";
const INDEX: &str = "index.json";
const VERSION: &str = "1.0.0";
const MAX_MARKER: usize = 64 * 1024;

#[cfg(test)]
mod tests;
