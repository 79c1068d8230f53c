//! Cluster mode: replicas of the program under test over one PostgreSQL and one S3 store.
//!
//! Where storage is told by `LONGSHORE_STORAGE__…` variables, which lie over a configuration file: so a test
//! with a configuration of its own runs on both run modes unchanged.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::objects::{self, Kind};
use crate::postgres::{Postgres, create_database};
use crate::server::Options;
use crate::{ObjectStore, Server};

/// The bucket of every test.
pub const BUCKET: &str = "longshore";

/// Names a PostgreSQL port and an S3 endpoint, as `PORT ENDPOINT`; with it, servers that a test starts run in
/// cluster mode. `cargo xtask test` sets it for the second run of the suites that judge both modes.
pub const CLUSTER: &str = "LONGSHORE_E2E_CLUSTER";

/// Where the servers of a cluster keep what they have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The connection string.
    pub database: String,
    /// `s3://bucket/prefix`.
    pub objects: String,
    /// The address of the S3 store.
    pub endpoint: String,
}

impl Storage {
    /// What a server is told through its environment.
    pub fn environment(&self) -> Vec<(String, String)> {
        let keys = ObjectStore::keys();
        [
            ("LONGSHORE_STORAGE__DATABASE", self.database.as_str()),
            ("LONGSHORE_STORAGE__OBJECTS", &self.objects),
            ("LONGSHORE_STORAGE__S3__ENDPOINT", &self.endpoint),
            ("LONGSHORE_STORAGE__S3__REGION", "us-east-1"),
            ("LONGSHORE_STORAGE__S3__PATH_STYLE", "true"),
            ("AWS_ACCESS_KEY_ID", &keys.id),
            ("AWS_SECRET_ACCESS_KEY", &keys.secret),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// The same as the `storage` section of a configuration file.
    pub fn config(&self) -> String {
        format!(
            "storage:\n  database: {}\n  objects: {}\n  s3: {{endpoint: \"{}\", region: us-east-1, path_style: true}}\n",
            self.database, self.objects, self.endpoint
        )
    }

    /// The objects of blobs in it, with their sizes: all but the exports, which a lost database is made again from.
    ///
    /// # Panics
    /// When the object store refuses.
    pub fn blobs(&self) -> Vec<(String, u64)> {
        let mut objects = objects::list(&self.endpoint, BUCKET, &self.prefix());
        objects.retain(is_blob);
        objects
    }

    /// What the keys of all its objects begin with.
    fn prefix(&self) -> String {
        format!("{}/", self.objects.rsplit('/').next().unwrap_or_default())
    }

    /// The storage of the suites that run on both modes: what [`CLUSTER`] names, with a database and a prefix that
    /// belong to this data directory. `None` in embedded mode.
    ///
    /// # Panics
    /// When the variable is not `PORT ENDPOINT` or the database cannot be made.
    pub fn of_this_run(data: &Path) -> Option<Self> {
        let text = std::env::var(CLUSTER)
            .ok()
            .filter(|text| !text.is_empty())?;
        let (port, endpoint) = text
            .split_once(' ')
            .unwrap_or_else(|| panic!("{CLUSTER} is not `PORT ENDPOINT`: {text}"));
        let port = port
            .parse()
            .unwrap_or_else(|_| panic!("`{port}` is no port"));
        let name = crate::digest(data.as_os_str().as_encoded_bytes())
            .trim_start_matches("sha256:")
            .chars()
            .take(24)
            .collect::<String>();
        create_database(port, &name);
        Some(Self {
            database: format!("postgres://longshore@127.0.0.1:{port}/{name}"),
            objects: format!("s3://{BUCKET}/{name}"),
            endpoint: endpoint.to_owned(),
        })
    }
}

/// Whether the servers of this run are in cluster mode.
pub fn is_cluster() -> bool {
    std::env::var_os(CLUSTER).is_some_and(|value| !value.is_empty())
}

/// PostgreSQL and an S3 store with a bucket.
#[derive(Debug)]
pub struct Cluster {
    /// The database server.
    pub postgres: Postgres,
    /// The object store.
    pub objects: ObjectStore,
}

impl Cluster {
    /// Starts both.
    ///
    /// # Panics
    /// When one is not there or does not start.
    pub fn start(kind: Kind) -> Self {
        Self::of(Postgres::start(), ObjectStore::start(kind))
    }

    /// Makes a bucket in a store that has none.
    pub fn of(postgres: Postgres, objects: ObjectStore) -> Self {
        objects.create_bucket(BUCKET);
        Self { postgres, objects }
    }

    /// What [`CLUSTER`] is set to for a suite that runs on it.
    pub fn name(&self) -> String {
        format!("{} {}", self.postgres.port(), self.objects.endpoint())
    }

    /// A storage in it that nobody has used.
    pub fn storage(&self) -> Storage {
        static USED: AtomicU64 = AtomicU64::new(0);
        let name = format!("test{}", USED.fetch_add(1, Ordering::Relaxed));
        self.storage_named(&name)
    }

    /// A storage of this name, which is that of the database and of the prefix.
    pub fn storage_named(&self, name: &str) -> Storage {
        self.postgres.create_database(name);
        Storage {
            database: self.postgres.url(name),
            objects: format!("s3://{BUCKET}/{name}"),
            endpoint: self.objects.endpoint(),
        }
    }

    /// All objects of a storage, with their sizes.
    pub fn objects_of(&self, storage: &Storage) -> Vec<(String, u64)> {
        self.objects.list(BUCKET, &storage.prefix())
    }

    /// The objects of blobs: those of [`Self::objects_of`] without the exports.
    pub fn blobs_of(&self, storage: &Storage) -> Vec<(String, u64)> {
        let mut objects = self.objects_of(storage);
        objects.retain(is_blob);
        objects
    }
}

/// Whether an object has the key of a blob.
fn is_blob((key, _): &(String, u64)) -> bool {
    let name = key.rsplit('/').next().unwrap_or_default();
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Starts servers with the same options. The first makes the tables; the others start beside one another.
///
/// # Panics
/// When one does not start.
pub fn replicas(options: &Options, count: usize) -> Vec<Server> {
    let mut servers = vec![Server::with(options)];
    std::thread::scope(|scope| {
        let starting: Vec<_> = (1..count)
            .map(|_| scope.spawn(|| Server::with(options)))
            .collect();
        for server in starting {
            servers.push(server.join().expect("a replica starts"));
        }
    });
    servers
}
