//! Stores to test, and small content to put into them.

use bytes::Bytes;
use oci::reference::TagOrDigest;
use oci::{Algorithm, Descriptor, Digest, Manifest, RepositoryName, Tag, media_type};
use store::{Actor, Error, Expected, Options, PutManifest, PutOutcome, Store, TagWrite};

use crate::postgres::Server;

/// A store with the directory and the server that it needs.
pub(crate) struct Engine {
    pub(crate) store: Store,
    pub(crate) directory: tempfile::TempDir,
    /// How to reach the database of this engine, where it is a server.
    pub(crate) url: String,
    _server: Option<Server>,
}

impl Engine {
    /// Changes the database behind the back of the store.
    pub(crate) async fn change(&self, sql: &str) {
        if self.url.is_empty() {
            let path = self.directory.path().join("data/meta.db");
            let connection = rusqlite::Connection::open(path).unwrap();
            connection
                .busy_timeout(std::time::Duration::from_secs(10))
                .unwrap();
            connection.execute_batch(sql).unwrap();
        } else {
            let (client, connection) = tokio_postgres::connect(&self.url, tokio_postgres::NoTls)
                .await
                .unwrap();
            let connection = tokio::spawn(connection);
            client.batch_execute(sql).await.unwrap();
            drop(client);
            connection.await.unwrap().unwrap();
        }
    }

    /// Bytes in the SQL of this engine.
    pub(crate) fn literal(&self, bytes: &[u8]) -> String {
        let hex = hex::encode(bytes);
        if self.url.is_empty() {
            format!("X'{hex}'")
        } else {
            format!("'\\x{hex}'::bytea")
        }
    }

    /// A digest as its column holds it.
    pub(crate) fn digest_literal(&self, digest: &Digest) -> String {
        let mut bytes = vec![1];
        bytes.extend_from_slice(digest.as_bytes());
        self.literal(&bytes)
    }
}

/// An embedded store.
pub(crate) async fn sqlite(options: Options) -> Engine {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("data"), options)
        .await
        .unwrap();
    Engine {
        store,
        directory,
        url: String::new(),
        _server: None,
    }
}

/// The same rooms over PostgreSQL.
pub(crate) async fn postgres(options: Options) -> Engine {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open_on_postgres(&directory.path().join("data"), &url, options)
        .await
        .unwrap();
    Engine {
        store,
        directory,
        url,
        _server: Some(server),
    }
}

pub(crate) fn actor() -> Actor {
    Actor {
        principal: "user:alice".to_owned(),
        request: "request-1".to_owned(),
        address: "127.0.0.1".to_owned(),
    }
}

pub(crate) fn name(text: &str) -> RepositoryName {
    text.parse().unwrap()
}

pub(crate) fn tag(text: &str) -> Tag {
    text.parse().unwrap()
}

/// Bytes that differ with the seed.
pub(crate) fn content(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect::<Vec<_>>()
        .into()
}

/// A single POST.
pub(crate) async fn push_blob(
    store: &Store,
    repository: &RepositoryName,
    bytes: &Bytes,
) -> Descriptor {
    let digest = Digest::sha256(bytes);
    let mut writer = store.put_blob(repository, &digest, &actor()).await.unwrap();
    writer.write(bytes.clone()).await.unwrap();
    writer.commit(&digest, &actor()).await.unwrap();
    Descriptor::new("application/octet-stream", digest, bytes.len() as u64)
}

/// POST, PATCH in pieces, PUT.
pub(crate) async fn push_in_pieces(
    store: &Store,
    repository: &RepositoryName,
    bytes: &Bytes,
    piece: usize,
) -> Descriptor {
    let digest = Digest::sha256(bytes);
    let id = store
        .start_upload(repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut at = 0;
    while at < bytes.len() {
        let end = (at + piece).min(bytes.len());
        let mut writer = store.claim_upload(repository, &id).await.unwrap();
        assert_eq!(writer.offset(), at as u64);
        writer.write(bytes.slice(at..end)).await.unwrap();
        assert_eq!(writer.record().await.unwrap(), end as u64);
        at = end;
    }
    let writer = store.claim_upload(repository, &id).await.unwrap();
    writer.commit(&digest, &actor()).await.unwrap();
    Descriptor::new("application/octet-stream", digest, bytes.len() as u64)
}

pub(crate) async fn read_blob(
    store: &Store,
    repository: &RepositoryName,
    digest: &Digest,
) -> Option<Bytes> {
    let blob = store.open_blob(repository, digest).await.unwrap()?;
    Some(blob.read(0..u64::MAX).await.unwrap())
}

pub(crate) fn image(config: &Descriptor, layers: &[Descriptor]) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: Some(config.clone()),
        layers: Some(layers.to_vec()),
        ..Manifest::default()
    }
}

pub(crate) fn index(children: &[Descriptor]) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.to_owned(),
        manifests: Some(children.to_vec()),
        ..Manifest::default()
    }
}

pub(crate) fn described(view: &Manifest) -> Descriptor {
    Descriptor::of(&view.media_type, &view.to_bytes())
}

pub(crate) fn put_of(repository: &RepositoryName, view: &Manifest, tags: &[&str]) -> PutManifest {
    let body = Bytes::from(view.to_bytes());
    PutManifest {
        repository: repository.clone(),
        digest: Digest::sha256(&body),
        body,
        view: view.clone(),
        tags: tags.iter().map(|text| write_of(text)).collect(),
        actor: actor(),
    }
}

pub(crate) fn write_of(text: &str) -> TagWrite {
    TagWrite {
        tag: tag(text),
        expected: Expected::Any,
        may_create: true,
        may_overwrite: true,
    }
}

pub(crate) async fn put(
    store: &Store,
    repository: &RepositoryName,
    view: &Manifest,
    tags: &[&str],
) -> Result<PutOutcome, Error> {
    store.put_manifest(put_of(repository, view, tags)).await
}

/// An image of one configuration and two layers, one in its row and one in an object.
pub(crate) async fn push_image(
    store: &Store,
    repository: &RepositoryName,
    seed: u64,
    tags: &[&str],
) -> Manifest {
    let config = push_blob(store, repository, &content(seed, 200)).await;
    let small = push_blob(store, repository, &content(seed + 1_000_000, 3000)).await;
    let large = push_blob(store, repository, &content(seed + 2_000_000, 40_000)).await;
    let view = image(&config, &[small, large]);
    put(store, repository, &view, tags).await.unwrap();
    view
}

pub(crate) fn by_digest(view: &Manifest) -> TagOrDigest {
    TagOrDigest::Digest(described(view).digest)
}

pub(crate) fn by_tag(text: &str) -> TagOrDigest {
    TagOrDigest::Tag(tag(text))
}

/// Fails with every problem that the checks find.
pub(crate) async fn assert_sound(store: &Store) {
    let report = store.verify_open().await.unwrap();
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
}
