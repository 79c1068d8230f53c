use std::path::PathBuf;
use std::task::Poll;

use super::migration::Migration;
use super::sqlite::Sqlite;
use super::*;

statements! {
    ADD = "INSERT INTO item (name, bytes) VALUES ($1, $2)";
    COUNT = "SELECT COUNT(*) FROM item";
    SWAPPED = "SELECT $2 AS second, $1 AS first";
}

#[test]
fn statements_have_names_of_their_own() {
    let names: std::collections::BTreeSet<_> = registry()
        .chain(STATEMENTS.iter().copied())
        .map(|s| s.name)
        .collect();
    assert_eq!(names.len(), registry().count() + STATEMENTS.len());
}

static FIRST: &[Migration] = &[Migration {
    version: 1,
    oldest: 1,
    sqlite: "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT); CREATE TABLE item (name TEXT PRIMARY KEY, bytes BLOB)",
    postgres: "",
}];

static SECOND: &[Migration] = &[
    Migration {
        version: 1,
        oldest: 1,
        sqlite: FIRST[0].sqlite,
        postgres: "",
    },
    Migration {
        version: 2,
        oldest: 2,
        sqlite: "ALTER TABLE item ADD COLUMN note TEXT",
        postgres: "",
    },
];

fn context() -> Context {
    Context::new()
}

fn open(path: &Path, make: bool, migrations: &'static [Migration]) -> Result<Sqlite, Error> {
    Sqlite::open(path, make, migrations, context())
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("meta.db");
    (directory, path)
}

struct Add {
    name: String,
    size: usize,
    then_fail: bool,
}

impl Body for Add {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&ADD, &[(&self.name).into(), vec![7; self.size].into()])
            .await?;
        if self.then_fail {
            return Err(Error::UploadUnknown);
        }
        Ok(())
    }
}

fn add(name: impl ToString, size: usize, then_fail: bool) -> Add {
    Add {
        name: name.to_string(),
        size,
        then_fail,
    }
}

fn count(db: &Sqlite) -> i64 {
    db.read(&COUNT, &[]).unwrap()[0].i64(0).unwrap()
}

/// A transaction that holds the database itself, and tells whether that was dropped without a panic.
struct Holds {
    _db: Arc<Sqlite>,
    _told: Told,
    go_on: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

struct Told(std::sync::mpsc::Sender<bool>);

impl Drop for Told {
    fn drop(&mut self) {
        let _ = self.0.send(std::thread::panicking());
    }
}

impl Body for Holds {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let _ = self.go_on.lock().unwrap().recv();
        add("last", 1, false).run(tx).await
    }
}

#[tokio::test]
async fn the_writer_itself_may_drop_the_last_handle() {
    let (_directory, path) = scratch();
    let db = Arc::new(open(&path, true, FIRST).unwrap());
    let (go_on, wait) = std::sync::mpsc::channel();
    let (told, panicked) = std::sync::mpsc::channel();
    let body = Holds {
        _db: Arc::clone(&db),
        _told: Told(told),
        go_on: std::sync::Mutex::new(wait),
    };
    {
        let mut asked = std::pin::pin!(db.write(body));
        // Sent, and not waited for.
        assert!(
            std::future::poll_fn(|context| Poll::Ready(asked.as_mut().poll(context).is_pending()))
                .await
        );
    }
    drop(db);
    go_on.send(()).unwrap();
    assert!(!panicked.recv().unwrap());
    let db = open(&path, false, FIRST).unwrap();
    assert_eq!(count(&db), 1);
    // Nor does it matter that the last one goes in a task.
    tokio::spawn(async move { drop(db) }).await.unwrap();
}

#[tokio::test]
async fn parameters_are_bound_by_number_whatever_their_order() {
    let (_directory, path) = scratch();
    let db = open(&path, true, FIRST).unwrap();
    let rows = db.read(&SWAPPED, &["one".into(), "two".into()]).unwrap();
    assert_eq!(rows[0].text(0).unwrap(), "two");
    assert_eq!(rows[0].text(1).unwrap(), "one");
}

#[tokio::test]
async fn a_failing_member_of_a_group_takes_nobody_with_it() {
    let (_directory, path) = scratch();
    let db = Arc::new(open(&path, true, FIRST).unwrap());
    let members: Vec<_> = (0..400)
        .map(|number| {
            let db = Arc::clone(&db);
            tokio::spawn(async move { db.write(add(number, 10, number % 3 == 0)).await })
        })
        .collect();
    let mut kept = 0;
    for (number, member) in members.into_iter().enumerate() {
        let result = member.await.unwrap();
        assert_eq!(result.is_err(), number % 3 == 0);
        kept += i64::from(result.is_ok());
    }
    assert_eq!(count(&db), kept);
}

struct Panic;

impl Body for Panic {
    type Output = ();

    async fn run(&self, _tx: &mut Tx) -> Result<(), Error> {
        panic!("a defect");
    }
}

struct Wait;

impl Body for Wait {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&ADD, &["wait".into(), vec![1].into()]).await?;
        tokio::task::yield_now().await;
        Ok(())
    }
}

#[tokio::test]
async fn a_body_that_panics_or_waits_is_rolled_back_and_the_writer_goes_on() {
    let (_directory, path) = scratch();
    let db = open(&path, true, FIRST).unwrap();
    assert!(matches!(db.write(Panic).await, Err(Error::Database(_))));
    assert!(matches!(db.write(Wait).await, Err(Error::Database(_))));
    assert_eq!(count(&db), 0);
    db.write(add("a", 1, false)).await.unwrap();
    assert_eq!(count(&db), 1);
}

/// Limits the size of the database file, which SQLite reports as a full disk.
struct Limit(u32);

impl Body for Limit {
    type Output = ();

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let Connection::Sqlite(connection) = &tx.connection else {
            return Err(Error::Stopped);
        };
        connection
            .query_row(&format!("PRAGMA max_page_count={}", self.0), [], |_| Ok(()))
            .map_err(sqlite::map)
    }
}

#[tokio::test]
async fn a_full_disk_refuses_who_does_not_fit_and_keeps_what_was_acknowledged() {
    let (_directory, path) = scratch();
    let db = Arc::new(open(&path, true, FIRST).unwrap());
    db.write(Limit(64)).await.unwrap();
    let members: Vec<_> = (0..100)
        .map(|number| {
            let db = Arc::clone(&db);
            tokio::spawn(async move { db.write(add(number, 20_000, false)).await })
        })
        .collect();
    let mut kept = 0;
    for member in members {
        match member.await.unwrap() {
            Ok(()) => kept += 1,
            Err(Error::Full) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert!((1..20).contains(&kept), "{kept}");
    assert_eq!(count(&db), kept);
    db.write(Limit(10_000)).await.unwrap();
    db.write(add("later", 20_000, false)).await.unwrap();
    db.close().await.unwrap();
    drop(db);
    let db = open(&path, false, FIRST).unwrap();
    assert_eq!(count(&db), kept + 1);
}

#[tokio::test]
async fn a_long_log_is_folded_into_the_database() {
    let (directory, path) = scratch();
    let db = open(&path, true, FIRST).unwrap();
    for number in 0..60 {
        db.write(add(number, 300_000, false)).await.unwrap();
    }
    db.close().await.unwrap();
    let log = directory.path().join("meta.db-wal");
    assert!(std::fs::metadata(&log).map_or(0, |file| file.len()) == 0);
    assert!(std::fs::metadata(&path).unwrap().len() > 60 * 300_000);
    assert!(matches!(
        db.write(add("x", 1, false)).await,
        Err(Error::Stopped)
    ));
}

#[tokio::test]
async fn a_migration_first_copies_the_file_and_an_older_program_refuses_it() {
    let (directory, path) = scratch();
    let db = open(&path, true, FIRST).unwrap();
    db.write(add("kept", 5, false)).await.unwrap();
    drop(db);
    let db = open(&path, false, SECOND).unwrap();
    assert_eq!(count(&db), 1);
    drop(db);
    let copy = directory.path().join("meta.db.before-2");
    let old = open(&copy, false, FIRST).unwrap();
    assert_eq!(count(&old), 1);
    drop(old);
    let refused = open(&path, false, FIRST);
    assert!(matches!(
        refused.err(),
        Some(Error::Newer {
            found: 2,
            known: 1,
            ..
        })
    ));
}

static EXPANDED: &[Migration] = &[
    Migration {
        version: 1,
        oldest: 1,
        sqlite: FIRST[0].sqlite,
        postgres: "",
    },
    Migration {
        version: 2,
        oldest: 1,
        sqlite: SECOND[1].sqlite,
        postgres: "",
    },
];

static THIRD: &[Migration] = &[
    Migration {
        version: 1,
        oldest: 1,
        sqlite: FIRST[0].sqlite,
        postgres: "",
    },
    Migration {
        version: 2,
        oldest: 1,
        sqlite: SECOND[1].sqlite,
        postgres: "",
    },
    Migration {
        version: 3,
        oldest: 2,
        sqlite: "ALTER TABLE item ADD COLUMN mark TEXT",
        postgres: "",
    },
];

#[tokio::test]
async fn an_older_program_goes_on_after_a_step_that_only_adds() {
    let (directory, path) = scratch();
    let old = open(&path, true, FIRST).unwrap();
    old.write(add("old", 5, false)).await.unwrap();
    drop(old);
    drop(open(&path, false, EXPANDED).unwrap());
    let old = open(&path, false, FIRST).unwrap();
    old.write(add("older", 5, false)).await.unwrap();
    drop(old);
    // Its start did not forget what was applied: the step is not applied twice.
    std::fs::remove_file(directory.path().join("meta.db.before-2")).unwrap();
    let new = open(&path, false, EXPANDED).unwrap();
    assert_eq!(count(&new), 2);
    assert!(!directory.path().join("meta.db.before-2").exists());
    drop(new);
    // The third step takes the first program's ground away; the second one's stays.
    drop(open(&path, false, THIRD).unwrap());
    assert_eq!(count(&open(&path, false, EXPANDED).unwrap()), 2);
    let refused = open(&path, false, FIRST);
    assert!(matches!(
        refused.err(),
        Some(Error::Newer {
            found: 2,
            known: 1,
            ..
        })
    ));
}

#[tokio::test]
async fn a_new_database_says_at_once_what_it_asks_for() {
    let (_directory, path) = scratch();
    drop(open(&path, true, THIRD).unwrap());
    assert!(open(&path, false, EXPANDED).is_ok());
    assert!(open(&path, false, FIRST).is_err());
}

#[tokio::test]
async fn a_commit_announces_its_event_even_when_nobody_waits() {
    let (_directory, path) = scratch();
    let context = context();
    let mut signal = context.signal.subscribe();
    let db = Arc::new(Sqlite::open(&path, true, FIRST, context).unwrap());
    struct Announce;
    impl Body for Announce {
        type Output = ();
        async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
            tx.note_event(5);
            Ok(())
        }
    }
    {
        let mut forgotten = Box::pin(db.write(Announce));
        // Polled once, then dropped, as when a connection closes.
        let _ = Future::poll(
            forgotten.as_mut(),
            &mut std::task::Context::from_waker(std::task::Waker::noop()),
        );
    }
    signal.changed().await.unwrap();
    assert_eq!(*signal.borrow(), 5);
}
