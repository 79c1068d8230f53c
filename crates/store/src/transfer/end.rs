//! The two ends of a transfer: opened beneath the store, because neither is one while it lasts.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::tables::{self, JOURNAL, LEAVING, MOVED, journal};
use crate::blob::file_system::FileSystem;
use crate::blob::objects::Objects;
use crate::blob::s3::S3;
use crate::blocking::blocking;
use crate::clock::random_name;
use crate::directory::{self, Directory};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::identity::{self, Claim, Place};
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::sql::{self, Body, Context, Db, Statement, Tx, WriteKind};

/// Where a store comes from.
pub(super) struct Source {
    pub(super) db: Reading,
    pub(super) objects: Objects,
    pub(super) epoch: String,
    /// The locks of its directories, where nobody else may use them.
    locks: Mutex<Vec<Directory>>,
    /// The data directory of its SQLite database.
    root: Option<PathBuf>,
    /// Its PostgreSQL database.
    url: Option<String>,
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
        let source = Self::open_any(location, last).await?;
        let identity = fact(&mut source.snapshot().await?, identity::KEY).await?;
        let place = Place::new(location, &source.objects);
        identity::compare(identity.as_deref(), &place).await?;
        Ok(source)
    }

    /// The same, whoever the objects belong to.
    pub(super) async fn open_any(location: &Location, last: bool) -> Result<Self, Error> {
        let (db, mut locks, root, url) = match &location.database {
            DatabaseLocation::Sqlite(root) => {
                let path = root.clone();
                let (db, lock) = blocking(move || open_sqlite(&path, last)).await?;
                (db, Vec::from_iter(lock), Some(root.clone()), None)
            }
            DatabaseLocation::Postgres(url) => {
                let db = Db::open_postgres(url, CONNECTIONS, Context::new()).await?;
                if last {
                    alone(&db).await?;
                }
                (Reading::Open(db), Vec::new(), None, Some(url.clone()))
            }
        };
        if let ObjectLocation::Directory(directory) = &location.objects
            && last
            && !locks.iter().any(|held| held.is(directory))
        {
            locks.push(lock(directory, false).await?);
        }
        let objects = open_objects(&location.objects).await?;
        let source = Self {
            db,
            objects,
            epoch: String::new(),
            locks: Mutex::new(locks),
            root,
            url,
        };
        let mut tx = source.snapshot().await?;
        let epoch = fact(&mut tx, "epoch")
            .await?
            .ok_or_else(|| Error::Moving("there is no store at the source".to_owned()))?;
        if fact(&mut tx, JOURNAL).await?.is_some() {
            return Err(Error::Moving(
                "the source is itself being filled by `longshore migrate` or `reindex`, run that to its end first".to_owned(),
            ));
        }
        drop(tx);
        Ok(Self { epoch, ..source })
    }

    /// One moment of the source.
    pub(super) async fn snapshot(&self) -> Result<Tx, Error> {
        match &self.db {
            Reading::Open(db) => {
                if let Some(tx) = db.snapshot().await? {
                    return Ok(tx);
                }
                beside(self.root.as_deref().ok_or(Error::Stopped)?).await
            }
            Reading::Beside(root) => beside(root).await,
        }
    }

    /// Where it was carried to.
    pub(super) async fn moved(&self) -> Result<Option<String>, Error> {
        fact(&mut self.snapshot().await?, MOVED).await
    }

    /// Marks a PostgreSQL source with this text, so that nothing is written there any more, and sees once more that
    /// nobody else uses it: who came before the mark is seen, who comes after it is refused.
    pub(super) async fn leave(&self, mark: &str) -> Result<(), Error> {
        match (&self.db, &self.url) {
            (Reading::Open(db), Some(_)) => {
                db.write(Leave(mark.to_owned())).await?;
                failpoint("carry.after_leaving");
                alone(db).await
            }
            _ => Ok(()),
        }
    }

    /// Takes that mark off again, after a run that came to no end.
    pub(super) async fn stay(&self, mark: &str) {
        let Some(url) = &self.url else {
            return;
        };
        let given_back = async {
            // The sessions of the run may be closed, or lost.
            let db = Db::open_postgres(url, 1, Context::new()).await?;
            let given_back = db.write(Stay(mark.to_owned())).await;
            db.close().await?;
            given_back
        };
        if let Err(error) = given_back.await {
            tracing::warn!(
                %error,
                "the source is still marked as being carried away; run this again, or `longshore migrate --reopen`"
            );
        }
    }

    /// Declares the source carried away, when nobody else uses it.
    pub(super) async fn leave_for_good(&self, place: &str, mark: &str) -> Result<(), Error> {
        let left = |mark: Option<&str>| Left {
            place: place.to_owned(),
            mark: mark.map(str::to_owned),
        };
        let (Reading::Open(own), Some(url)) = (&self.db, &self.url) else {
            return self.db.write(left(None)).await;
        };
        // The sessions of this run are no different from those of a replica, so they end before anybody is counted.
        own.close().await?;
        let db = Db::open_postgres(url, 1, Context::new()).await?;
        alone(&db).await?;
        db.write(left(Some(mark))).await?;
        db.close().await
    }

    /// Takes every mark off; whether there was one. Objects that stayed where they are come back first, and whoever has
    /// the new database is refused.
    pub(super) async fn reopen(&self, location: &Location) -> Result<bool, Error> {
        if let Reading::Open(db) = &self.db
            && (mark(db, MOVED).await?.is_some() || mark(db, LEAVING).await?.is_some())
        {
            let place = Place::new(location, &self.objects);
            identity::claim(db, &place, Claim::TakeOver).await?;
        }
        self.db.write(Reopen).await
    }

    pub(super) async fn close(self) -> Result<(), Error> {
        if let Reading::Open(db) = &self.db {
            db.close().await?;
        }
        Ok(())
    }

    /// Closes it and puts its database aside, where its directory is the destination's now.
    pub(super) async fn retire(self) -> Result<(), Error> {
        let root = self.root.clone();
        self.close().await?;
        let Some(root) = root else {
            return Ok(());
        };
        blocking(move || directory::retire(&root)).await
    }

    /// Gives the lock of a directory to the destination, when both use it.
    fn give_lock(&self, root: &Path) -> Option<Directory> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let at = locks
            .iter()
            .position(|held| held.is(root) || same_path(held.root(), root))?;
        Some(locks.swap_remove(at))
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
    locks: Vec<Directory>,
    /// It was filled to its end before.
    pub(super) complete: bool,
}

impl Destination {
    /// Opens or makes it; it must be empty, or have a journal of the same source.
    pub(super) async fn open(
        location: &Location,
        source: &Source,
        objects_stay: bool,
    ) -> Result<Self, Error> {
        let mut locks = Vec::new();
        let (db, root) = match &location.database {
            DatabaseLocation::Sqlite(root) => {
                // The same lock cannot be held twice.
                drop(source.give_lock(root));
                let directory = lock(root, true).await?;
                let (path, fresh) = (directory::database(root), directory.fresh);
                locks.push(directory);
                let open = move || Db::open_sqlite(&path, fresh, Context::new());
                let db = blocking(open).await?;
                (db, Some(root.clone()))
            }
            DatabaseLocation::Postgres(url) => {
                let db = Db::open_postgres(url, CONNECTIONS, Context::new()).await?;
                (db, None)
            }
        };
        if let ObjectLocation::Directory(directory) = &location.objects
            && !locks.iter().any(|held| held.is(directory))
        {
            let held = match source.give_lock(directory) {
                Some(held) => held,
                None => lock(directory, false).await?,
            };
            locks.push(held);
        }
        let complete = db
            .write(Begin {
                epoch: source.epoch.clone(),
                moved: source.moved().await?,
            })
            .await?;
        failpoint("carry.after_journal");
        let objects = open_objects(&location.objects).await?;
        if !complete {
            // Objects that stay keep their identity, and others come to a place that is nobody's.
            let how = if objects_stay {
                Claim::Stay
            } else {
                Claim::Fill
            };
            identity::claim(&db, &Place::new(location, &objects), how).await?;
        }
        Ok(Self {
            db,
            objects,
            is_postgres: root.is_none(),
            name: describe(location),
            root,
            locks,
            complete,
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
        for directory in self.locks.iter().filter(|directory| directory.fresh) {
            directory.finish()?;
        }
        Ok(())
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

/// Whether the data directory of an embedded store is where these objects are.
pub(super) fn is_root_of(store: &Location, objects: &ObjectLocation) -> bool {
    matches!((&store.database, objects),
        (DatabaseLocation::Sqlite(root), ObjectLocation::Directory(directory)) if same_path(root, directory))
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
            let db = Db::open_sqlite(&directory::database(root), false, Context::new())?;
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
            Directory::open_for_objects(&root)
        } else {
            Directory::open_objects(&root)
        }
    };
    blocking(take).await
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
    blocking(move || sql::sqlite_snapshot(&path, false, Context::new())).await
}

/// Waits a moment until no other session uses a PostgreSQL source as its user.
async fn alone(db: &Db) -> Result<(), Error> {
    let others = Statement::made(
        "SELECT COUNT(*) AS others FROM pg_stat_activity WHERE datname = current_database() \
         AND application_name = current_setting('application_name') AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
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
        "the source's database is in use by another process of this program; stop every replica first, or bring objects \
         ahead with `--ahead`"
            .to_owned(),
    ))
}

/// A fact of a place.
pub(crate) async fn fact(tx: &mut Tx, key: &str) -> Result<Option<String>, Error> {
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

/// The mark of a source that is being carried to this place, unlike that of any other run.
pub(super) fn leaving(to: &Location) -> Result<String, Error> {
    let (place, run) = (describe(to), random_name()?);
    Ok(serde_json::json!({ "to": place, "run": run }).to_string())
}

/// Marks a source that is being carried away. From the COMMIT on, no transaction of a replica begins there.
struct Leave(String);

impl Body for Leave {
    type Output = ();
    const KIND: WriteKind = WriteKind::Place;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        // Waits for every transaction of a user that is under way.
        tx.exclude_users().await?;
        set(tx, LEAVING, Some(&self.0)).await
    }
}

/// Takes the mark of one run off.
struct Stay(String);

impl Body for Stay {
    type Output = ();
    const KIND: WriteKind = WriteKind::Place;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        match fact(tx, LEAVING).await? {
            Some(found) if found == self.0 => set(tx, LEAVING, None).await,
            _ => Ok(()),
        }
    }
}

/// From here on the old place opens no more; the new one opens when its journal is gone.
struct Left {
    place: String,
    /// The mark that the source must have had all the time, where it has one.
    mark: Option<String>,
}

impl Body for Left {
    type Output = ();
    const KIND: WriteKind = WriteKind::Place;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.exclude_users().await?;
        if self.mark.is_some() && fact(tx, LEAVING).await? != self.mark {
            return Err(Error::Moving(
                "the source was opened again meanwhile, run this once more".to_owned(),
            ));
        }
        set(tx, LEAVING, None).await?;
        set(tx, MOVED, Some(&self.place)).await
    }
}

/// Gives a place back.
struct Reopen;

impl Body for Reopen {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Place;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let mut was = false;
        for key in [LEAVING, MOVED] {
            was |= fact(tx, key).await?.is_some();
            set(tx, key, None).await?;
        }
        Ok(was)
    }
}

/// Sets or removes a fact of a place.
pub(super) async fn set(tx: &mut Tx, key: &str, value: Option<&str>) -> Result<(), Error> {
    let remove = Statement::made("DELETE FROM meta WHERE key = $1".to_owned());
    tx.execute(remove, &[key.into()]).await?;
    if let Some(value) = value {
        let add = Statement::made("INSERT INTO meta (key, value) VALUES ($1, $2)".to_owned());
        tx.execute(add, &[key.into(), value.into()]).await?;
    }
    Ok(())
}

/// Writes the journal into an empty destination, or finds that of the same source.
struct Begin {
    epoch: String,
    /// Where the source was carried to already.
    moved: Option<String>,
}

impl Body for Begin {
    /// Whether nothing is left to carry.
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let own = journal(&self.epoch);
        match fact(tx, JOURNAL).await? {
            Some(found) if found == own => return Ok(false),
            Some(_) => {
                return Err(Error::Moving(
                    "the destination is being filled from another store, choose an empty one"
                        .to_owned(),
                ));
            }
            None => {}
        }
        let epoch = fact(tx, "epoch").await?;
        if let Some(place) = &self.moved {
            if epoch.as_deref() == Some(self.epoch.as_str()) {
                return Ok(true);
            }
            return Err(Error::Moving(format!(
                "the source was carried to {place} already"
            )));
        }
        if epoch.is_some() || tables::count(tx, "repository", "").await? > 0 {
            return Err(Error::Moving(
                "the destination holds a store already, choose an empty one".to_owned(),
            ));
        }
        let add = Statement::made("INSERT INTO meta (key, value) VALUES ($1, $2)".to_owned());
        tx.execute(add, &[JOURNAL.into(), own.into()]).await?;
        Ok(false)
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

/// One for the snapshot, and some for what is written beside.
const CONNECTIONS: usize = 8;
const SESSION_LOOKS: usize = 25;
const SESSION_PAUSE: Duration = Duration::from_millis(200);
