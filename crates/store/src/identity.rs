//! Which objects belong to which database: an identity that stands in both, compared before either is used.
//!
//! Where database and objects are configured each for itself, a wrong prefix would make every blob look damaged, and two
//! databases over one place would collect each other's objects. So a database has a random identity (`store` in `meta`),
//! and its place of objects has a file `store` with the same one. A data directory that holds both by itself has no such
//! file and needs none.
//!
//! A running store looks at the file again, and before it deletes objects: when they were given to another store
//! (`reindex --take-over`, `restore --adopt`, `migrate --reopen`), it stops.
//!
//! Making one needs no conditional request: the database decides who makes it and where (`making <id> <place>`), the
//! file is written and read back, and only then the identity stands. A program that died between goes on there. A
//! database that has objects takes a place for its own only when the place has some of them.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::blob::StorageKey;
use crate::blob::file_system::sync_directory;
use crate::blob::objects::Objects;
use crate::blocking::blocking;
use crate::clock::random_name;
use crate::error::Error;
use crate::location::{DatabaseLocation, Location, ObjectLocation};
use crate::sql::{Body, Db, Tx, WriteKind, statements};
use crate::store::Inner;

statements! {
    GET = "SELECT value FROM meta WHERE key = 'store'";
    ADD = "INSERT INTO meta (key, value) VALUES ('store', $1) ON CONFLICT (key) DO NOTHING";
    SET = "INSERT INTO meta (key, value) VALUES ('store', $1) \
           ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    SAMPLE = "SELECT storage_key FROM blob WHERE storage_key IS NOT NULL AND state = 'ok' ORDER BY id LIMIT 16";
}

/// The file or object that holds the identity of a place of objects.
pub(crate) const FILE: &str = "store";
/// The row of `meta`.
pub(crate) const KEY: &str = "store";

/// A place of objects as its identity is looked at.
pub(crate) struct Place {
    objects: Objects,
    /// The directory, where objects are files.
    root: Option<PathBuf>,
    /// The database lies in the same directory: nobody can configure one without the other.
    whole: bool,
}

/// What may be done when database and place do not name the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// A server starts: only a place that has no identity, for a database that has none.
    Open,
    /// A new database is filled, and its objects come to a place of its own.
    Fill,
    /// The objects stay while their rows are carried to another database, which gets their identity.
    Stay,
    /// An operator says that both belong together. They get a new identity, so that a copy of the database is refused.
    Adopt,
    /// The place gets a new identity, so that whoever used it before is refused.
    TakeOver,
}

impl Place {
    pub(crate) fn new(location: &Location, objects: &Objects) -> Self {
        Self::of(&location.database, &location.objects, objects)
    }

    pub(crate) fn of(
        database: &DatabaseLocation,
        location: &ObjectLocation,
        objects: &Objects,
    ) -> Self {
        let root = match location {
            ObjectLocation::Directory(root) => Some(root.clone()),
            ObjectLocation::S3(_) => None,
        };
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let whole = matches!((database, &root),
            (DatabaseLocation::Sqlite(data), Some(root)) if real(data) == real(root));
        Self {
            objects: objects.clone(),
            root,
            whole,
        }
    }

    /// Database and objects lie in one data directory.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// The identity of a place that must have this one. That it is not there is asked for twice, because an answer that
    /// was wrong for a moment would keep a store shut.
    async fn read_known(&self, known: bool) -> Result<Option<String>, Error> {
        match self.read().await? {
            None if known && !self.whole => {
                tokio::time::sleep(PAUSE).await;
                self.read().await
            }
            found => Ok(found),
        }
    }

    /// The identity of the place, `None` when it has none.
    async fn read(&self) -> Result<Option<String>, Error> {
        let bytes = match (&self.objects, &self.root) {
            (Objects::S3(s3), _) => s3.find_file(FILE).await?.map(|bytes| bytes.to_vec()),
            (_, Some(root)) => {
                let path = root.join(FILE);
                blocking(move || match read_some(&path) {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(Error::io("read", &path, error)),
                })
                .await?
            }
            _ => None,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        let id = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| text.trim_end().strip_prefix(HEAD))
            .filter(|id| StorageKey::parse(id).is_ok());
        match id {
            Some(id) => Ok(Some(id.to_owned())),
            None => Err(Error::damaged(
                &self.file(),
                format!("it does not say `{HEAD}…`, copy it from a backup of the objects"),
            )),
        }
    }

    async fn write(&self, id: &str) -> Result<(), Error> {
        let text = format!("{HEAD}{id}\n").into_bytes();
        match (&self.objects, &self.root) {
            (Objects::S3(s3), _) => s3.put_file(FILE, text.into()).await,
            (_, Some(root)) => {
                let root = root.clone();
                blocking(move || write_whole(&root, &text)).await
            }
            _ => Ok(()),
        }
    }

    /// Where the identity is, for messages.
    fn file(&self) -> PathBuf {
        PathBuf::from(format!("{}/{FILE}", self.name()))
    }

    /// The place, for messages and for the mark of who makes the identity.
    fn name(&self) -> String {
        match (&self.objects, &self.root) {
            (Objects::S3(s3), _) => s3.name().to_owned(),
            (_, Some(root)) => root.display().to_string(),
            _ => String::new(),
        }
    }

    fn refuse(&self, problem: &str) -> Error {
        Error::unusable(Path::new(&self.name()), problem)
    }

    /// Refuses a place that has none of the objects that the database names; `surely`: also where it names none.
    async fn holds_ours(&self, db: &Db, surely: bool) -> Result<(), Error> {
        let mut asked = surely;
        for row in db.read(&SAMPLE, &[]).await? {
            let key = StorageKey::parse(&row.text(0)?)?;
            asked = true;
            if self.objects.is_there(&key).await? {
                return Ok(());
            }
        }
        if asked {
            return Err(self.refuse(
                "it has none of the objects that the database names; is `storage.objects` right?",
            ));
        }
        Ok(())
    }
}

/// Compares the identities, and makes or completes them as far as `how` allows. Returns that of the store; `None` when
/// a data directory needs none.
///
/// # Errors
/// [`Error::Unusable`] when the two are not of one store; [`Error::Unavailable`] while another replica makes it.
pub(crate) async fn claim(db: &Db, place: &Place, how: Claim) -> Result<Option<String>, Error> {
    let ours = find(db).await?;
    let theirs = place.read_known(ours.is_some()).await?;
    if how == Claim::Adopt {
        let same = matches!((&ours, &theirs), (Some(ours), Some(theirs)) if ours.id == *theirs);
        if !same && !place.whole {
            place.holds_ours(db, theirs.is_some()).await?;
        }
    }
    if matches!(how, Claim::TakeOver | Claim::Adopt) {
        if place.whole && theirs.is_none() {
            return Ok(ours.map(|ours| ours.id));
        }
        let id = random_name()?;
        return make(db, place, Known::making(id, place), true).await;
    }
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours.id == theirs => {
            ours.may_be_made_at(place)?;
            if ours.making.is_some() {
                db.write(Set(theirs.clone(), true)).await?;
            }
            Ok(Some(theirs))
        }
        (Some(_), Some(_)) => Err(place.refuse(OTHER)),
        (None, Some(theirs)) if how == Claim::Stay => {
            place.holds_ours(db, false).await?;
            db.write(Set(theirs.clone(), true)).await?;
            Ok(Some(theirs))
        }
        (None, Some(_)) => Err(place.refuse(TAKEN)),
        (ours, None) if place.whole => Ok(ours.map(|ours| ours.id)),
        (Some(ours), None) if ours.making.is_none() => {
            if how == Claim::Open {
                return Err(place.refuse(NONE));
            }
            place.holds_ours(db, false).await?;
            make(db, place, ours, false).await
        }
        (Some(ours), None) => {
            ours.may_be_made_at(place)?;
            place.holds_ours(db, false).await?;
            make(db, place, ours, false).await
        }
        (None, None) => {
            place.holds_ours(db, false).await?;
            // A new database over somebody's objects; unless another replica was first, and they are its own.
            if how == Claim::Open
                && db.read(&SAMPLE, &[]).await?.is_empty()
                && place.objects.are_some().await?
                && db.read(&SAMPLE, &[]).await?.is_empty()
            {
                return Err(place.refuse(NAMELESS));
            }
            make(db, place, Known::making(random_name()?, place), false).await
        }
    }
}

/// Compares the identities and changes nothing. A store that has none yet is of an older program, or new.
///
/// # Errors
/// [`Error::Unusable`] when the two are not of one store.
pub(crate) async fn compare(ours: Option<&str>, place: &Place) -> Result<(), Error> {
    let ours = ours.map(Known::parse);
    let theirs = place.read_known(ours.is_some()).await?;
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours.id == theirs => Ok(()),
        (Some(_), Some(_)) => Err(place.refuse(OTHER)),
        (None, Some(_)) if place.whole => Ok(()),
        (None, Some(_)) => Err(place.refuse(TAKEN)),
        (Some(ours), None) if ours.making.is_none() && !place.whole => Err(place.refuse(NONE)),
        _ => Ok(()),
    }
}

/// What a running store looks at again: whether its objects are still its own.
pub(crate) struct Watch {
    place: Place,
    id: Option<String>,
    looked: Mutex<Option<Instant>>,
}

impl Watch {
    /// `id` as [`claim`] told it.
    pub(crate) fn new(place: Place, id: Option<String>) -> Self {
        Self {
            place,
            id,
            looked: Mutex::new(None),
        }
    }

    /// Looks, unless the last look is not older than `age`, and stops the store when its objects were given to another.
    ///
    /// # Errors
    /// [`Error::Stopped`] then; [`Error::Unusable`] when the identity is gone; as for reading it.
    pub(crate) async fn look(&self, db: &Db, age: Duration) -> Result<(), Error> {
        let Some(id) = &self.id else { return Ok(()) };
        let looked = || self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked().is_some_and(|last| last.elapsed() < age) {
            return Ok(());
        }
        match self.place.read_known(true).await? {
            Some(found) if found == *id => {
                *looked() = Some(Instant::now());
                Ok(())
            }
            Some(_) => {
                db.stop("its objects were given to another store");
                Err(Error::Stopped)
            }
            None => Err(self.place.refuse(NONE)),
        }
    }
}

/// Looks now and then, until the store has stopped.
pub(crate) async fn work(inner: &Inner) {
    loop {
        tokio::time::sleep(EVERY).await;
        match inner.identity.look(&inner.db, AGE).await {
            Err(Error::Stopped) => return,
            Err(error) => tracing::warn!(%error, "it cannot be told whose the objects are"),
            Ok(()) => {}
        }
    }
}

/// Writes the identity into the database as one that is being made, into the place, and then for good.
async fn make(db: &Db, place: &Place, known: Known, over: bool) -> Result<Option<String>, Error> {
    let stands = match known.making {
        Some(_) => Known::parse(&db.write(Set(known.text(), over)).await?),
        None => known,
    };
    // Another replica may have been first, and then it is that one's identity.
    stands.may_be_made_at(place)?;
    place.write(&stands.id).await?;
    if place.read().await?.as_deref() != Some(stands.id.as_str()) {
        return Err(place.refuse(OTHER));
    }
    db.write(Set(stands.id.clone(), true)).await?;
    Ok(Some(stands.id))
}

/// The identity as it stands in the database, for [`compare`].
pub(crate) async fn read(db: &Db) -> Result<Option<String>, Error> {
    let rows = db.read(&GET, &[]).await?;
    rows.first().map(|row| row.text(0)).transpose()
}

async fn find(db: &Db) -> Result<Option<Known>, Error> {
    Ok(read(db).await?.as_deref().map(Known::parse))
}

/// The identity as the database has it.
struct Known {
    id: String,
    /// The place where it is being made.
    making: Option<String>,
}

impl Known {
    fn making(id: String, place: &Place) -> Self {
        Self {
            id,
            making: Some(place.name()),
        }
    }

    fn parse(text: &str) -> Self {
        let making = text
            .strip_prefix(MAKING)
            .and_then(|rest| rest.split_once(' '));
        match making {
            Some((id, place)) => Self {
                id: id.to_owned(),
                making: Some(place.to_owned()),
            },
            None => Self {
                id: text.to_owned(),
                making: None,
            },
        }
    }

    fn text(&self) -> String {
        match &self.making {
            Some(place) => format!("{MAKING}{} {place}", self.id),
            None => self.id.clone(),
        }
    }

    fn may_be_made_at(&self, place: &Place) -> Result<(), Error> {
        match &self.making {
            Some(making) if *making != place.name() => Err(Error::Unavailable {
                what: "the store",
                problem: format!(
                    "it is being made at `{making}`, and this program is configured for `{}`; give all replicas the \
                     same `storage.objects`, and start one with that of the store first",
                    place.name()
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// Writes the identity unless there is one, or over it, and returns the one that stands.
struct Set(String, bool);

impl Body for Set {
    type Output = String;
    const KIND: WriteKind = WriteKind::Place;

    async fn run(&self, tx: &mut Tx) -> Result<String, Error> {
        let statement = if self.1 { &SET } else { &ADD };
        tx.execute(statement, &[(&self.0).into()]).await?;
        tx.query_opt(&GET, &[])
            .await?
            .ok_or_else(|| Error::Database("the store's identity is missing".to_owned()))?
            .text(0)
    }
}

fn read_some(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(LONGEST)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn write_whole(root: &Path, text: &[u8]) -> Result<(), Error> {
    use std::io::Write;
    let path = root.join(FILE);
    // Replicas that make it together write the same bytes, each beside.
    let partial = root.join(format!("{FILE}.{}.partial", random_name()?));
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create_new(&partial)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    if let Err(error) = write() {
        let _ = std::fs::remove_file(&partial);
        return Err(Error::io("write", &path, error));
    }
    sync_directory(root)
}

/// How old a look may be before objects are deleted.
pub(crate) const AGE: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_secs(5);
const HEAD: &str = "longshore store ";
const MAKING: &str = "making ";
const LONGEST: u64 = 256;
const PAUSE: Duration = Duration::from_millis(200);
const OTHER: &str = "it holds the objects of another store than the database does; is `storage.objects` or \
    `storage.database` wrong? When they were given to another database by mistake, `longshore restore --adopt` compares \
    them and takes them back";
const NAMELESS: &str = "it holds objects, and this database is empty; is `storage.objects` or `storage.database` wrong? \
    `longshore reindex` makes a new database over old objects";
const TAKEN: &str = "it belongs to a store, and this database knows nothing of it; is `storage.objects` or \
    `storage.database` wrong? A database that was restored takes its objects with `longshore restore --adopt`, a new \
    one with `longshore reindex --take-over`";
const NONE: &str = "it has no file `store`, so it is not where this database keeps its objects; is `storage.objects` \
    right? When the objects were copied here, run `longshore restore --adopt`";
