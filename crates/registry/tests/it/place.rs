//! Where the store of a test is: a data directory, or PostgreSQL and S3.
//!
//! The suite knows nothing of run modes. [`POSTGRES`] and [`S3`] name servers that all tests of a run share; each test
//! has a database and a prefix of its own. The database goes with the test; the objects go with the S3 store, which
//! whoever started it removes.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use store::{
    DatabaseLocation, Location, ObjectLocation, Options, S3Credentials, S3Location, Store,
};

/// Names the PostgreSQL server, as `postgres://USER@HOST:PORT`. `psql` must be on the `PATH`.
const POSTGRES: &str = "LONGSHORE_TEST_POSTGRES";

/// Names the S3 store, as `http://KEY:SECRET@HOST:PORT/BUCKET`.
const S3: &str = "LONGSHORE_TEST_S3";

/// The place of one store. Its database goes with this value.
pub(crate) struct Place {
    location: Location,
    _database: Option<Database>,
}

impl Place {
    /// A place that nothing was ever stored in; in embedded mode it is below `directory`.
    pub(crate) fn new(directory: &Path) -> Self {
        let (postgres, s3) = (variable(POSTGRES), variable(S3));
        assert_eq!(
            postgres.is_some(),
            s3.is_some(),
            "set both {POSTGRES} and {S3}, or none"
        );
        let Some((postgres, s3)) = postgres.zip(s3) else {
            return Self {
                location: Location::embedded(directory.join("data")),
                _database: None,
            };
        };
        let database = Database::new(postgres);
        Self {
            location: Location {
                database: DatabaseLocation::postgres(&database.url()).unwrap(),
                objects: ObjectLocation::S3(bucket(&s3, &database.name)),
            },
            _database: Some(database),
        }
    }

    /// Where the metadata is.
    pub(crate) fn database(&self) -> DatabaseLocation {
        self.location.database.clone()
    }

    /// Opens the store of this place.
    pub(crate) async fn open(&self, options: Options) -> Store {
        Store::open_at(&self.location, options).await.unwrap()
    }
}

/// A database of a shared server.
struct Database {
    server: String,
    name: String,
}

impl Database {
    fn new(server: String) -> Self {
        static USED: AtomicU64 = AtomicU64::new(0);
        // A run on servers that outlive it begins beside what an earlier one left.
        let name = format!(
            "wire_{}_{}",
            std::process::id(),
            USED.fetch_add(1, Ordering::Relaxed)
        );
        let database = Self { server, name };
        database
            .sql(&format!("CREATE DATABASE \"{}\"", database.name))
            .unwrap();
        database
    }

    fn url(&self) -> String {
        format!("{}/{}", self.server, self.name)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "`tokio-postgres` belongs to the store, so the server's own program makes the database"
    )]
    fn sql(&self, statement: &str) -> Result<(), String> {
        let output = Command::new("psql")
            .args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1"])
            .args(["--dbname", &format!("{}/postgres", self.server)])
            .args(["--command", statement])
            .output()
            .map_err(|error| format!("cannot start `psql`: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(())
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Sessions of a store that was not closed are cut: no test looks at it any more.
        let dropped = self.sql(&format!("DROP DATABASE \"{}\" WITH (FORCE)", self.name));
        if !std::thread::panicking() {
            dropped.unwrap();
        }
    }
}

/// The bucket that the text names, with a prefix.
fn bucket(text: &str, prefix: &str) -> S3Location {
    let parts = || {
        let (keys, rest) = text.strip_prefix("http://")?.split_once('@')?;
        let (key_id, secret) = keys.split_once(':')?;
        let (host, bucket) = rest.split_once('/')?;
        Some((key_id.to_owned(), secret.to_owned(), host, bucket))
    };
    let (key_id, secret, host, bucket) =
        parts().unwrap_or_else(|| panic!("{S3} is not `http://KEY:SECRET@HOST:PORT/BUCKET`"));
    S3Location {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
        endpoint: Some(format!("http://{host}")),
        path_style: true,
        credentials: Some(S3Credentials { key_id, secret }),
        ..S3Location::default()
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}
