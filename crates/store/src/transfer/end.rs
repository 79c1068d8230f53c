//! The two ends of a transfer: opened beneath the store, because neither is one while it lasts.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::tables::{self, JOURNAL, MOVED, journal};
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::sql::{self, Body, Context, Db, Statement, Tx};

/// Where a store comes from.
pub(super) struct Source {
    pub(super) db: Reading,
    pub(super) objects: Objects,
    pub(super) epoch: String,
    /// The lock of the directory, when nobody else has it.
    lock: Mutex<Option<Directory>>,
    root: Option<PathBuf>,
}

/// The database of a source. That of a data directory which is in use is read and never written.
pub(super) enum Reading {
    Open(Db),
    Beside(PathBuf),
}

impl Reading {
    pub(super) async fn write<B: Body>(&self, body: B) -> Result<B::Output, Error> {
        match self {
            Self::Open(db) => db.write(body).await,
            Self::Beside(path) => Err(Error::InUse(path.clone())),
        }
    }
}

impl Source {
    /// `last`: nobody else may use it.
    pub(super) async fn open(location: &Location, last: bool) -> Result<Self, Error> {
        let objects = open_objects(&location.objects).await?;
        let root = match (&location.database, &location.objects) {
            (DatabaseLocation::Sqlite(root), _)
            | (DatabaseLocation::Postgres(_), ObjectLocation::Directory(root)) => {
                Some(root.clone())
            }
            _ => None,
        };
        let (db, lock) = match &location.database {
            DatabaseLocation::Sqlite(root) => {
                let root = root.clone();
                tokio::task::spawn_blocking(move || open_sqlite(&root, last))
                    .await
                    .unwrap_or(Err(Error::Stopped))?
            }
            DatabaseLocation::Postgres(url) => {
                let db = Db::open_postgres(url, CONNECTIONS, context()).await?;
                let lock = match &root {
                    Some(root) if last => Some(lock(root, false).await?),
                    _ => None,
                };
                if last {
                    alone(&db).await?;
                }
                (Reading::Open(db), lock)
            }
        };
        let source = Self {
            db,
            objects,
            epoch: String::new(),
            lock: Mutex::new(lock),
            root,
        };
        let mut tx = source.snapshot().await?;
        let epoch = fact(&mut tx, "epoch")
            .await?
            .ok_or_else(|| Error::Moving("there is no store at the source".to_owned()))?;
        if fact(&mut tx, JOURNAL).await?.is_some() {
            return Err(Error::Moving(
                "the source is itself being filled by `longshore migrate`, run that to its end first".to_owned(),
            ));
        }
        drop(tx);
        Ok(Self { epoch, ..source })
    }

    /// One moment of the source.
    pub(super) async fn snapshot(&self) -> Result<Tx, Error> {
        match &self.db {
            Reading::Open(db) => match db.snapshot().await? {
                Some(tx) => Ok(tx),
                None => {
                    let root = self.root.clone().ok_or(Error::Stopped)?;
                    beside(&root).await
                }
            },
            Reading::Beside(root) => beside(root).await,
        }
    }

    /// Where it was carried to.
    pub(super) async fn moved(&self) -> Result<Option<String>, Error> {
        fact(&mut self.snapshot().await?, MOVED).await
    }

    pub(super) async fn close(self) -> Result<(), Error> {
        if let Reading::Open(db) = &self.db {
            db.close().await?;
        }
        Ok(())
    }

    /// Gives up the lock for the destination, when both are in one directory.
    fn take_lock(&self, root: &Path) -> Option<Directory> {
        let same = self.root.as_deref().is_some_and(|own| same_path(own, root));
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if same { lock.take() } else { None }
    }
}

/// Where a store goes.
pub(super) struct Destination {
    pub(super) db: Db,
    pub(super) objects: Objects,
    pub(super) is_postgres: bool,
    /// How messages name it, without secrets.
    pub(super) name: String,
    root: Option<PathBuf>,
    directory: Option<Directory>,
    /// A data directory that becomes whole at the end.
    embedded: bool,
}

impl Destination {
    /// Opens or makes it; it must be empty, or have a journal of the same source.
    pub(super) async fn open(location: &Location, source: &Source) -> Result<Self, Error> {
        let root = match (&location.database, &location.objects) {
            (DatabaseLocation::Sqlite(root), _) | (_, ObjectLocation::Directory(root)) => {
                Some(root.clone())
            }
            _ => None,
        };
        let embedded = matches!(location.database, DatabaseLocation::Sqlite(_));
        let directory = match &root {
            None => None,
            // The same lock cannot be held twice.
            Some(root) => match source.take_lock(root).filter(|_| !embedded) {
                Some(lock) => Some(lock),
                None => Some(lock(root, embedded).await?),
            },
        };
        let db = match &location.database {
            DatabaseLocation::Sqlite(root) => {
                let path = directory::database(root);
                let fresh = directory.as_ref().is_some_and(|directory| directory.fresh);
                tokio::task::spawn_blocking(move || Db::open_sqlite(&path, fresh, context()))
                    .await
                    .unwrap_or(Err(Error::Stopped))?
            }
            DatabaseLocation::Postgres(url) => {
                Db::open_postgres(url, CONNECTIONS, context()).await?
            }
        };
        db.write(Begin {
            epoch: source.epoch.clone(),
            moved: source.moved().await?,
        })
        .await?;
        failpoint("migrate.after_journal");
        Ok(Self {
            db,
            objects: open_objects(&location.objects).await?,
            is_postgres: !embedded,
            name: describe(location),
            root,
            directory,
            embedded,
        })
    }

    /// One moment of what was written.
    pub(super) async fn snapshot(&self) -> Result<Tx, Error> {
        match self.db.snapshot().await? {
            Some(tx) => Ok(tx),
            None => beside(self.root.as_deref().ok_or(Error::Stopped)?).await,
        }
    }

    /// Declares a data directory whole.
    pub(super) fn finish_directory(&self) -> Result<(), Error> {
        match &self.directory {
            Some(directory) if self.embedded && directory.fresh => directory.finish(),
            _ => Ok(()),
        }
    }

    pub(super) async fn close(self) -> Result<(), Error> {
        self.db.close().await
    }
}

/// Whether two places keep the same objects.
pub(super) fn same_objects(a: &ObjectLocation, b: &ObjectLocation) -> bool {
    match (a, b) {
        (ObjectLocation::Directory(a), ObjectLocation::Directory(b)) => same_path(a, b),
        (ObjectLocation::S3(a), ObjectLocation::S3(b)) => {
            (&a.bucket, &a.prefix, &a.endpoint) == (&b.bucket, &b.prefix, &b.endpoint)
        }
        _ => false,
    }
}

fn same_path(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(a) == real(b)
}

fn open_sqlite(root: &Path, last: bool) -> Result<(Reading, Option<Directory>), Error> {
    // It looks whether there is a store; the lock is taken anew below.
    let free = Directory::look(root)?.is_some();
    match (free, last) {
        (true, _) => {
            let directory = Directory::open(root)?;
            let db = Db::open_sqlite(&directory::database(root), false, context())?;
            Ok((Reading::Open(db), Some(directory)))
        }
        (false, true) => Err(Error::InUse(root.to_owned())),
        (false, false) => Ok((Reading::Beside(root.to_owned()), None)),
    }
}

/// Takes the lock of a data directory, or of one that holds objects alone.
async fn lock(root: &Path, embedded: bool) -> Result<Directory, Error> {
    let root = root.to_owned();
    let take = move || {
        if embedded {
            Directory::open(&root)
        } else {
            Directory::open_objects(&root)
        }
    };
    tokio::task::spawn_blocking(take)
        .await
        .unwrap_or(Err(Error::Stopped))
}

async fn open_objects(objects: &ObjectLocation) -> Result<Objects, Error> {
    Ok(match objects {
        ObjectLocation::Directory(root) => {
            Objects::Directory(Arc::new(FileSystem::open(directory::objects(root))))
        }
        ObjectLocation::S3(s3) => Objects::S3(S3::connect(s3).await?),
    })
}

async fn beside(root: &Path) -> Result<Tx, Error> {
    let path = directory::database(root);
    tokio::task::spawn_blocking(move || sql::sqlite_snapshot(&path, false, context()))
        .await
        .unwrap_or(Err(Error::Stopped))
}

/// Waits a moment until no other session uses a PostgreSQL source as its user.
async fn alone(db: &Db) -> Result<(), Error> {
    let others = Statement::made(
        "SELECT COUNT(*) AS others FROM pg_stat_activity WHERE datname = current_database() \
         AND usename = current_user AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            .to_owned(),
    );
    for _ in 0..SESSION_LOOKS {
        // A session that ended a moment ago is still listed.
        if crate::store::single(&db.read(others, &[]).await?)? == 0 {
            return Ok(());
        }
        tokio::time::sleep(SESSION_PAUSE).await;
    }
    Err(Error::Moving(
        "the source's database is in use by another session of this user; stop every replica first, or bring objects \
         ahead with `--ahead`"
            .to_owned(),
    ))
}

/// A fact of a place.
pub(super) async fn fact(tx: &mut Tx, key: &str) -> Result<Option<String>, Error> {
    let statement = Statement::made("SELECT value FROM meta WHERE key = $1".to_owned());
    tx.query_opt(statement, &[key.into()])
        .await?
        .map(|row| row.text(0))
        .transpose()
}

/// The same outside of a transaction.
pub(super) async fn mark(db: &Db, key: &str) -> Result<Option<String>, Error> {
    let statement = Statement::made("SELECT value FROM meta WHERE key = $1".to_owned());
    db.read(statement, &[key.into()])
        .await?
        .first()
        .map(|row| row.text(0))
        .transpose()
}

/// Writes the journal into an empty destination, or finds that of the same source.
struct Begin {
    epoch: String,
    /// Where the source was carried to already.
    moved: Option<String>,
}

impl Body for Begin {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let own = journal(&self.epoch);
        match fact(tx, JOURNAL).await? {
            Some(found) if found == own => return Ok(()),
            Some(_) => {
                return Err(Error::Moving(
                    "the destination is being filled from another store, choose an empty one"
                        .to_owned(),
                ));
            }
            None => {}
        }
        if let Some(place) = &self.moved {
            return Err(Error::Moving(format!(
                "the source was carried to {place} already"
            )));
        }
        let holds_store = fact(tx, "epoch").await?.is_some();
        if holds_store || tables::count(tx, "repository", "").await? > 0 {
            return Err(Error::Moving(
                "the destination holds a store already, choose an empty one".to_owned(),
            ));
        }
        let add = Statement::made("INSERT INTO meta (key, value) VALUES ($1, $2)".to_owned());
        tx.execute(add, &[JOURNAL.into(), own.into()])
            .await
            .map(drop)
    }
}

/// A place for messages: never a password.
fn describe(location: &Location) -> String {
    let database = match &location.database {
        DatabaseLocation::Sqlite(root) => format!("`{}`", root.display()),
        DatabaseLocation::Postgres(_) => "a PostgreSQL database".to_owned(),
    };
    match &location.objects {
        ObjectLocation::S3(s3) => format!("{database} and `s3://{}/{}`", s3.bucket, s3.prefix),
        ObjectLocation::Directory(root) => match &location.database {
            DatabaseLocation::Sqlite(own) if own == root => database,
            _ => format!("{database} and `{}`", root.display()),
        },
    }
}

fn context() -> Context {
    Context::new()
}

const SESSION_LOOKS: usize = 25;
const SESSION_PAUSE: Duration = Duration::from_millis(200);

/// Connections to PostgreSQL at once, at most.
const CONNECTIONS: usize = 16;
