//! The same uploads, reads and deletions over real object stores, with both databases.

use std::io::{BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ::object_store::aws::{AwsAuthorizer, AwsCredential};
use ::object_store::client::{HttpConnector, HttpRequestBody, ReqwestConnector};
use bytes::Bytes;
use oci::{Algorithm, Digest, RepositoryName};
use store::{
    DatabaseLocation, Error, Location, ObjectLocation, Options, S3Credentials, S3Location, Store,
    UploadId,
};

use crate::engine::{actor, assert_sound, content, name, push_blob, push_in_pieces, read_blob};
use crate::postgres::Server;

const MIB: usize = 1 << 20;
const BUCKET: &str = "longshore";
const KEYS: (&str, &str) = ("longshore-test", "longshore-test-secret");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn minio_keeps_the_contract() {
    keeps_the_contract(ObjectStore::minio().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versitygw_keeps_the_contract() {
    keeps_the_contract(ObjectStore::versitygw().await).await;
}

async fn keeps_the_contract(objects: ObjectStore) {
    let directory = tempfile::tempdir().unwrap();
    let sqlite = DatabaseLocation::Sqlite(directory.path().join("data"));
    let store = objects.open(sqlite, "sqlite", Options::default()).await;
    one_replica(&objects, &store).await;
    store.close().await.unwrap();
    let lost = DatabaseLocation::Sqlite(directory.path().join("lost"));
    let lost = objects.location(lost, "lost");
    crate::reindex::a_lost_database_over_a_bucket(&lost, &directory.path().join("lost")).await;

    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replica = |claim_wait| {
        let options = Options {
            claim_wait,
            ..Options::default()
        };
        let postgres = DatabaseLocation::Postgres(url.clone());
        objects.open(postgres, "postgres/below", options)
    };
    let soon = Duration::from_millis(100);
    let store = replica(soon).await;
    one_replica(&objects, &store).await;
    store.close().await.unwrap();
    // With clocks that nobody moved.
    let (one, two) = (replica(soon).await, replica(soon).await);
    let patient = replica(Duration::from_mins(5)).await;
    a_writer_that_ends_is_waited_for(&url, &one, &patient).await;
    patient.close().await.unwrap();
    two_replicas(&objects, &one, &two).await;
    one.close().await.unwrap();
    two.close().await.unwrap();
}

async fn one_replica(objects: &ObjectStore, store: &Store) {
    sizes(store).await;
    odd_pieces(store).await;
    ends_without_a_blob(store).await;
    another_algorithm(store).await;
    settled(objects, store).await;
}

async fn two_replicas(objects: &ObjectStore, one: &Store, two: &Store) {
    goes_on_elsewhere(one, two).await;
    one_writer_among_replicas(one, two).await;
    settled(objects, one).await;
}

/// Every size at which something changes, in each way of pushing.
async fn sizes(store: &Store) {
    let repository = name("sizes/all");
    let part = 8 * MIB;
    for (seed, size) in [
        0,
        1,
        16 * 1024,
        16 * 1024 + 1,
        part - 1,
        part,
        part + 1,
        2 * part + 5,
    ]
    .into_iter()
    .enumerate()
    {
        for way in 0..3_u64 {
            let bytes = large(seed as u64 * 10 + way, size);
            let pushed = match way {
                0 => push_blob(store, &repository, &bytes).await,
                1 => push_in_pieces(store, &repository, &bytes, size.max(1)).await,
                _ => push_in_pieces(store, &repository, &bytes, size / 3 + 7).await,
            };
            let blob = store
                .open_blob(&repository, &pushed.digest)
                .await
                .unwrap()
                .unwrap();
            assert_eq!(blob.size, size as u64);
            assert!(
                blob.read(0..u64::MAX).await.unwrap() == bytes,
                "{size} {way}"
            );
            let (from, to) = (size / 3, size - size / 5);
            let part = blob.read(from as u64..to as u64).await.unwrap();
            assert!(part == bytes[from..to], "{size} {way}");
        }
    }
}

/// Parts and tails in every relation, each PATCH by a writer of its own.
async fn odd_pieces(store: &Store) {
    let (repository, bytes) = (name("odd/pieces"), large(77, 100 * MIB));
    let digest = Digest::sha256(&bytes);
    let id = start(store, &repository).await;
    let mut at = 0;
    for length in [
        1,
        7,
        16_384,
        3 * MIB,
        8 * MIB - 1,
        8 * MIB,
        20 * MIB + 3,
        11,
        33 * MIB,
    ] {
        let mut writer = claim(store, &repository, &id).await;
        assert_eq!(writer.offset(), at as u64);
        for start in (at..at + length).step_by(300_000) {
            let end = (start + 300_000).min(at + length);
            writer.write(bytes.slice(start..end)).await.unwrap();
        }
        at += length;
        assert_eq!(writer.record().await.unwrap(), at as u64);
        let offset = store.upload_offset(&repository, &id).await.unwrap();
        assert_eq!(offset, at as u64);
    }
    // A writer that looks only changes nothing.
    let writer = claim(store, &repository, &id).await;
    assert_eq!(writer.record().await.unwrap(), at as u64);
    let mut writer = claim(store, &repository, &id).await;
    writer.write(bytes.slice(at..)).await.unwrap();
    assert_eq!(
        writer.commit(&digest, &actor()).await.unwrap(),
        bytes.len() as u64
    );
    assert!(read_blob(store, &repository, &digest).await.unwrap() == bytes);
    // Once more, into the same blob; this object goes.
    push_blob(store, &repository, &bytes).await;
}

/// Cancelled, expired, broken off, with a wrong digest: nothing of them stays.
async fn ends_without_a_blob(store: &Store) {
    let repository = name("ends/without");
    for size in [100, 100_000, 9 * MIB] {
        let bytes = large(size as u64, size);
        let wrong = Digest::sha256(b"other");

        let cancelled = start(store, &repository).await;
        let mut writer = claim(store, &repository, &cancelled).await;
        writer.write(bytes.clone()).await.unwrap();
        let busy = store.cancel_upload(&repository, &cancelled).await;
        assert!(
            matches!(busy, Err(Error::UploadBusy { offset: 0 })),
            "{busy:?}"
        );
        writer.record().await.unwrap();
        store.cancel_upload(&repository, &cancelled).await.unwrap();
        let gone = store.upload_offset(&repository, &cancelled).await;
        assert!(matches!(gone, Err(Error::UploadUnknown)));

        let mismatched = start(store, &repository).await;
        let mut writer = claim(store, &repository, &mismatched).await;
        writer.write(bytes.clone()).await.unwrap();
        let refused = writer.commit(&wrong, &actor()).await;
        assert!(
            matches!(refused, Err(Error::DigestMismatch { .. })),
            "{refused:?}"
        );
        let gone = store.upload_offset(&repository, &mismatched).await;
        assert!(matches!(gone, Err(Error::UploadUnknown)));

        // A single POST that breaks off cannot be gone on with.
        let digest = Digest::sha256(&bytes);
        let mut writer = store
            .put_blob(&repository, &digest, &actor())
            .await
            .unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.record().await.unwrap();
        assert!(read_blob(store, &repository, &digest).await.is_none());

        let expired = start(store, &repository).await;
        let mut writer = claim(store, &repository, &expired).await;
        writer.write(bytes.clone()).await.unwrap();
        writer.record().await.unwrap();
        store.advance_clock(Duration::from_hours(25));
        store.maintain_once().await.unwrap();
        let gone = store.upload_offset(&repository, &expired).await;
        assert!(matches!(gone, Err(Error::UploadUnknown)));
    }
}

/// A digest of another algorithm is computed from what the object store has.
async fn another_algorithm(store: &Store) {
    let repository = name("another/algorithm");
    for size in [100_000, 9 * MIB] {
        let bytes = large(size as u64 + 5, size);
        for right in [false, true] {
            let id = start(store, &repository).await;
            let mut writer = claim(store, &repository, &id).await;
            writer.write(bytes.clone()).await.unwrap();
            let other = Bytes::from_static(b"x");
            let digest = Digest::of(Algorithm::Sha512, if right { &bytes } else { &other });
            let committed = writer.commit(&digest, &actor()).await;
            if right {
                assert_eq!(committed.unwrap(), size as u64);
                assert!(read_blob(store, &repository, &digest).await.unwrap() == bytes);
            } else {
                assert!(matches!(committed, Err(Error::DigestMismatch { .. })));
            }
        }
    }
}

/// Each request of an upload reaches another replica.
async fn goes_on_elsewhere(one: &Store, two: &Store) {
    let (repository, bytes) = (name("goes/on"), large(5, 30 * MIB));
    let digest = Digest::sha256(&bytes);
    let id = start(one, &repository).await;
    let steps = [0, 10_000, 500_000, 9 * MIB, 26 * MIB + 1, 30 * MIB];
    for (turn, step) in steps.windows(2).enumerate() {
        let store = if turn % 2 == 0 { two } else { one };
        let mut writer = claim(store, &repository, &id).await;
        assert_eq!(writer.offset(), step[0] as u64);
        writer.write(bytes.slice(step[0]..step[1])).await.unwrap();
        assert_eq!(writer.record().await.unwrap(), step[1] as u64);
    }
    let writer = claim(one, &repository, &id).await;
    writer.commit(&digest, &actor()).await.unwrap();
    assert!(read_blob(two, &repository, &digest).await.unwrap() == bytes);
}

/// Who comes to another replica while the first writer ends gets the upload, with all that was written.
async fn a_writer_that_ends_is_waited_for(url: &str, one: &Store, patient: &Store) {
    let (repository, bytes) = (name("waits/for"), large(3, 100_000));
    let id = start(one, &repository).await;
    let mut first = claim(one, &repository, &id).await;
    first.write(bytes.slice(..60_000)).await.unwrap();
    let next = {
        let (patient, repository, id) = (patient.clone(), repository.clone(), id.clone());
        tokio::spawn(async move { claim(&patient, &repository, &id).await })
    };
    // A writer that lives keeps its claim for longer than a claim lasts that is not renewed.
    let client = crate::postgres::connect(url).await;
    let claimed = async || -> i64 {
        let claimed = "SELECT claimed_until FROM upload WHERE name = $1";
        client.query_one(claimed, &[&id.0]).await.unwrap().get(0)
    };
    let before = claimed().await;
    while claimed().await < before + 9_000_000 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!next.is_finished());
    assert_eq!(first.record().await.unwrap(), 60_000);
    let mut next = next.await.unwrap();
    assert_eq!(next.offset(), 60_000);
    next.write(bytes.slice(60_000..)).await.unwrap();
    let digest = Digest::sha256(&bytes);
    next.commit(&digest, &actor()).await.unwrap();
    assert!(read_blob(one, &repository, &digest).await.unwrap() == bytes);
}

/// The second writer is told the true offset, gets the upload when the first is silent for too long, and what the
/// first writes then counts for nothing.
async fn one_writer_among_replicas(one: &Store, two: &Store) {
    let repository = name("one/writer");
    for size in [50_000, 9 * MIB] {
        let (mine, other) = (large(1, size), large(2, size));
        let id = start(one, &repository).await;
        let mut first = claim(one, &repository, &id).await;
        first.write(mine.slice(..size / 2)).await.unwrap();
        let busy = two.claim_upload(&repository, &id).await;
        assert!(
            matches!(busy, Err(Error::UploadBusy { offset: 0 })),
            "{busy:?}"
        );
        let busy = two.cancel_upload(&repository, &id).await;
        assert!(
            matches!(busy, Err(Error::UploadBusy { offset: 0 })),
            "{busy:?}"
        );
        two.advance_clock(Duration::from_mins(2));
        let mut second = claim(two, &repository, &id).await;
        second.write(other.clone()).await.unwrap();
        // Its own clock has not moved, so it does not know yet.
        let _ = first.write(mine.slice(size / 2..)).await;
        let lost = first.record().await;
        assert!(matches!(lost, Err(Error::UploadBusy { .. })), "{lost:?}");
        let digest = Digest::sha256(&other);
        second.commit(&digest, &actor()).await.unwrap();
        assert!(read_blob(one, &repository, &digest).await.unwrap() == other);
        let gone = one.claim_upload(&repository, &id).await;
        assert!(matches!(gone, Err(Error::UploadUnknown)));
        one.advance_clock(Duration::from_mins(2));
    }
}

/// Afterwards nothing is there that no row names, and no multipart upload is open.
async fn settled(objects: &ObjectStore, store: &Store) {
    store.advance_clock(Duration::from_mins(10));
    store.maintain_once().await.unwrap();
    assert_eq!(store.statistics().await.unwrap().pending_deletions, 0);
    assert_sound(store).await;
    let open = objects.open_uploads().await;
    assert!(!open.contains("<UploadId>"), "{open}");
}

async fn start(store: &Store, repository: &RepositoryName) -> UploadId {
    store
        .start_upload(repository, Algorithm::Sha256, &actor())
        .await
        .unwrap()
}

async fn claim(store: &Store, repository: &RepositoryName, id: &UploadId) -> store::UploadWriter {
    store.claim_upload(repository, id).await.unwrap()
}

/// Many bytes, quickly made.
fn large(seed: u64, length: usize) -> Bytes {
    let block = content(seed, length.min(MIB));
    let mut bytes = Vec::with_capacity(length);
    let mut count = 0_u64;
    while bytes.len() < length {
        let left = (length - bytes.len()).min(block.len());
        let start = bytes.len();
        bytes.extend_from_slice(&block[..left]);
        if left >= 8 {
            bytes[start..start + 8].copy_from_slice(&(seed ^ (count << 32)).to_le_bytes());
        }
        count += 1;
    }
    bytes.into()
}

/// A running object store with one bucket; dropping it stops it and removes its files.
struct ObjectStore {
    child: Child,
    endpoint: String,
    _directory: tempfile::TempDir,
}

impl ObjectStore {
    async fn minio() -> Self {
        let program = program("LONGSHORE_TEST_S3_MINIO");
        Self::launch(|port, directory| {
            let mut command = command(&program);
            command
                .env("MINIO_ROOT_USER", KEYS.0)
                .env("MINIO_ROOT_PASSWORD", KEYS.1)
                .env("MINIO_UPDATE", "off")
                .args(["server", "--quiet", "--console-address", "127.0.0.1:0"])
                .args(["--address", &format!("127.0.0.1:{port}")])
                .arg(directory);
            command
        })
        .await
    }

    async fn versitygw() -> Self {
        let program = program("LONGSHORE_TEST_S3_VERSITYGW");
        Self::launch(|port, directory| {
            let mut command = command(&program);
            command
                .env("ROOT_ACCESS_KEY", KEYS.0)
                .env("ROOT_SECRET_KEY", KEYS.1)
                .args(["--quiet", "--port", &format!("127.0.0.1:{port}"), "posix"])
                .arg(directory);
            command
        })
        .await
    }

    async fn launch(command: impl Fn(u16, &PathBuf) -> Command) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        // Both take a directory for a bucket.
        std::fs::create_dir_all(data.join(BUCKET)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let child = command(port, &data)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut store = Self {
            child,
            endpoint: format!("http://127.0.0.1:{port}"),
            _directory: directory,
        };
        loop {
            if tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
                && store
                    .open_uploads()
                    .await
                    .contains("ListMultipartUploadsResult")
            {
                return store;
            }
            if store.child.try_wait().unwrap().is_some() {
                let mut said = String::new();
                if let Some(stderr) = store.child.stderr.take() {
                    let _ = BufReader::new(stderr)
                        .take(10_000)
                        .read_to_string(&mut said);
                }
                panic!("the object store ended before it could be reached: {said}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn open(&self, database: DatabaseLocation, prefix: &str, options: Options) -> Store {
        Store::open_at(&self.location(database, prefix), options)
            .await
            .unwrap()
    }

    fn location(&self, database: DatabaseLocation, prefix: &str) -> Location {
        let objects = ObjectLocation::S3(S3Location {
            bucket: BUCKET.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: Some(self.endpoint.clone()),
            path_style: true,
            credentials: Some(S3Credentials {
                key_id: KEYS.0.to_owned(),
                secret: KEYS.1.to_owned(),
            }),
            ..S3Location::default()
        });
        Location { database, objects }
    }

    /// The document that lists the open multipart uploads, or what was answered instead.
    async fn open_uploads(&self) -> String {
        let url = format!("{}/{BUCKET}?uploads=", self.endpoint);
        let mut request = http::Request::get(url)
            .body(HttpRequestBody::empty())
            .unwrap();
        let credential = AwsCredential {
            key_id: KEYS.0.to_owned(),
            secret_key: KEYS.1.to_owned(),
            token: None,
        };
        AwsAuthorizer::new(&credential, "s3", "us-east-1")
            .try_authorize(&mut request, None)
            .unwrap();
        let options = ::object_store::ClientOptions::new().with_allow_http(true);
        let client = ReqwestConnector::default().connect(&options).unwrap();
        match client.execute(request).await {
            Ok(response) => response
                .into_body()
                .bytes()
                .await
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default(),
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => panic!("these tests need an object store: `{variable}` must name its program"),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the tests start the object store that they test against"
)]
fn command(program: &PathBuf) -> Command {
    Command::new(program)
}
