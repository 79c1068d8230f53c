//! Carries a whole store to another place: a data directory to PostgreSQL and an object store, and back.
//!
//! The key decision: **the history goes on**. Rows keep their ids, tags their generations, the audit its chain, and
//! the events their epoch and numbers, so a reader of the stream resumes at the new place where it stopped at the old
//! one. That is right only when nothing is written at the old place any more, so the last pass wants it stopped, and
//! at its end the old place is marked: it opens no more, until [`reopen`] says so.
//!
//! A data directory has a lock that keeps others out while the last pass lasts. PostgreSQL has none: a replica that
//! somebody starts again, or that was cut off and comes back, would take writes that are in no snapshot. So a source
//! there is marked **before** the snapshot (`leaving`), held off against the transactions of users; with the mark it
//! opens as no store, and a replica that runs has every transaction refused, its collector's too, because each begins
//! with a look at the mark. A run that fails takes the mark off; after one that was killed the next run goes on with
//! it, or [`reopen`] gives the source back.
//!
//! Objects are most of the work and may be brought ahead while the source is in use, as often as wished
//! ([`Settings::ahead`]). What was brought is known by its row at the destination, so a run that was killed goes on.
//! The tables come in the last pass, out of one snapshot, and all anew when that was killed. Until the end the
//! destination has a journal (a row of `meta`) and opens as no store.
//!
//! Uploads that are open are not carried: their clients start them again. Where database and objects are in one place
//! at both sides, only the rows move.

mod end;
mod objects;
mod tables;

pub(crate) use end::fact;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value as Json, json};

use crate::error::Error;
use crate::failpoint::failpoint;
use crate::location::Location;
use crate::sql::{Body, Tx, WriteKind};

pub(crate) use tables::{JOURNAL, LEAVING, MOVED, REINDEX, empty};

use end::{Destination, Source};
use objects::Moving;
use tables::Carrying;

/// How a store is carried.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Bring objects alone; the source may be in use.
    pub ahead: bool,
    /// Count, write nothing.
    pub dry_run: bool,
    /// Blobs that are missing or damaged at the source, though their rows say that they are sound, are told of and let
    /// go. Without it nothing comes to its end while there are such.
    pub accept_damaged: bool,
    /// How much is looked at again at the end.
    pub verify: Verify,
    /// How many objects move at one time; 0 counts as 1.
    pub parallel: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ahead: false,
            dry_run: false,
            accept_damaged: false,
            verify: Verify::Size,
            parallel: 4,
        }
    }
}

/// What is looked at again at the end, beside the number of rows of each table and the chain of the audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// The size of every object.
    Size,
    /// Every row, and every byte of every object.
    Full,
}

/// What was carried.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Rows of each table at the destination; in a dry run those of the source.
    pub rows: BTreeMap<&'static str, u64>,
    /// Objects that this run brought.
    pub objects_moved: u64,
    /// Their bytes.
    pub bytes_moved: u64,
    /// Objects that were looked at again.
    pub objects_verified: u64,
    /// Blobs that are damaged at the source, and so at the destination.
    pub damaged: Vec<String>,
    /// Where both sides do not agree; then the source stays in use.
    pub problems: Vec<String>,
    /// The objects stay where they are.
    pub objects_stay: bool,
    /// The destination is the store now.
    pub finished: bool,
}

impl Report {
    /// The report as a document.
    pub fn to_json(&self) -> Json {
        json!({
            "rows": self.rows,
            "objectsMoved": self.objects_moved,
            "bytesMoved": self.bytes_moved,
            "objectsVerified": self.objects_verified,
            "objectsStay": self.objects_stay,
            "damaged": self.damaged,
            "problems": self.problems,
            "finished": self.finished,
        })
    }
}

/// Carries the store at `from` to `to`, which is empty or was begun to be filled from the same store.
///
/// # Errors
/// [`Error::InUse`] when the source is in use and this is the last pass; [`Error::Moving`] when the destination holds a
/// store, or one of another source; whatever stops either side. The same call again goes on.
pub async fn migrate(from: &Location, to: &Location, settings: Settings) -> Result<Report, Error> {
    let mut report = Report {
        objects_stay: end::same_objects(&from.objects, &to.objects),
        ..Report::default()
    };
    if from.database == to.database {
        return Err(Error::Moving(
            "source and destination have the same database, choose another one".to_owned(),
        ));
    }
    let last = !settings.ahead && !settings.dry_run;
    let source = Source::open(from, last).await?;
    let mark = end::leaving(to)?;
    let held = if last {
        source.leave(&mark).await
    } else {
        Ok(())
    };
    let outcome = match held {
        Ok(()) => fill(&source, (from, to), settings, &mark, &mut report).await,
        Err(error) => Err(error),
    };
    if last && !report.finished {
        source.stay(&mark).await;
    }
    let retired = outcome.as_ref().is_ok_and(|retires| *retires);
    // What a run that was killed left to do is done by the next one.
    let closed = if report.finished && retired {
        source.retire().await
    } else {
        source.close().await
    };
    outcome?;
    closed?;
    Ok(report)
}

/// Fills the destination. `true`: the database of the source is to be put aside when all is done.
async fn fill(
    source: &Source,
    (from, to): (&Location, &Location),
    settings: Settings,
    mark: &str,
    report: &mut Report,
) -> Result<bool, Error> {
    if settings.dry_run {
        let mut tx = source.snapshot().await?;
        for table in tables::TABLES {
            let rows = tables::count(&mut tx, table.name, "").await?;
            report.rows.insert(table.name, rows);
        }
        return Ok(false);
    }
    if settings.ahead && report.objects_stay {
        return Err(Error::Moving(
            "the objects stay where they are, there is nothing to bring ahead".to_owned(),
        ));
    }
    let destination = Destination::open(to, source, report.objects_stay).await?;
    let outcome = if destination.complete {
        report.finished = true;
        Ok(())
    } else {
        carry(source, &destination, settings, mark, report).await
    };
    let shared = destination.is_postgres && end::is_root_of(from, &to.objects);
    let closed = destination.close().await;
    outcome.and(closed)?;
    Ok(shared)
}

async fn carry(
    source: &Source,
    destination: &Destination,
    settings: Settings,
    mark: &str,
    report: &mut Report,
) -> Result<(), Error> {
    let carrying = Carrying {
        to: &destination.db,
        objects_stay: report.objects_stay,
        to_postgres: destination.is_postgres,
    };
    let moving = Moving {
        from: &source.objects,
        to: &destination.objects,
        db: &destination.db,
        objects_stay: report.objects_stay,
        parallel: settings.parallel,
        accept_damaged: settings.accept_damaged,
    };
    // Rows of a last pass that was killed name blobs that may be gone.
    carrying.wipe().await?;
    let mut from = source.snapshot().await?;
    check_schema(&mut from, &mut destination.snapshot().await?).await?;
    moving.run(&mut from, report).await?;
    failpoint("carry.after_objects");
    if settings.ahead || !report.problems.is_empty() {
        return Ok(());
    }
    carrying.carry(&mut from, report).await?;
    let mut to = destination.snapshot().await?;
    let whole = settings.verify == Verify::Full;
    tables::compare(&mut from, &mut to, whole, report).await?;
    if let Err(problem) = crate::audit::verify(&mut to).await? {
        report.problems.push(problem);
    }
    objects::verify(
        &mut to,
        &destination.objects,
        &settings,
        report.objects_stay && settings.accept_damaged,
        report,
    )
    .await?;
    drop((from, to));
    if !report.problems.is_empty() {
        return Ok(());
    }
    destination.finish_directory()?;
    failpoint("carry.after_format");
    // From here on the old place opens no more; the new one opens when its journal is gone.
    source.leave_for_good(&destination.name, mark).await?;
    failpoint("carry.after_moved");
    destination.db.write(Whole).await?;
    report.finished = true;
    Ok(())
}

/// Takes the mark off a store that was carried away, or that a run which was killed began to carry away, so that it opens
/// again. What was written at the new place is not in it, and both then go on with the same event numbers: one of the two
/// must be thrown away. `false` when there is no mark.
///
/// # Errors
/// As for opening the store.
pub async fn reopen(location: &Location) -> Result<bool, Error> {
    let source = Source::open_any(location, true).await?;
    let was = source.reopen(location).await?;
    source.close().await?;
    Ok(was)
}

/// Refuses a store that is being filled, or that was carried away.
pub(crate) async fn check_open(db: &crate::sql::Db) -> Result<(), Error> {
    match end::mark(db, JOURNAL).await?.as_deref() {
        Some(REINDEX) => {
            return Err(Error::Moving(
                "this store is being filled by `longshore reindex`, run that again to its end"
                    .to_owned(),
            ));
        }
        Some(_) => {
            return Err(Error::Moving(
                "this store is being filled by `longshore migrate`, run that again to its end"
                    .to_owned(),
            ));
        }
        None => {}
    }
    if end::mark(db, LEAVING).await?.is_some() {
        return Err(Error::Moving(format!(
            "{GOING}; run `longshore migrate` again to its end, or give it up with `longshore migrate --reopen`"
        )));
    }
    if let Some(place) = end::mark(db, MOVED).await? {
        return Err(Error::Moving(format!(
            "this store was carried to {place}; to use it again in place of that one, run `longshore migrate --reopen`"
        )));
    }
    Ok(())
}

/// Both sides must know the same tables and columns, and this program all of them.
async fn check_schema(from: &mut Tx, to: &mut Tx) -> Result<(), Error> {
    for table in tables::names(from).await? {
        if !tables::TABLES.iter().any(|known| known.name == table) {
            return Err(Error::Moving(format!(
                "table `{table}` is not known to this program, use a newer one"
            )));
        }
        if tables::columns(from, &table).await? != tables::columns(to, &table).await? {
            return Err(Error::Moving(format!(
                "table `{table}` differs at both sides; start and stop the server of this version on the source once"
            )));
        }
    }
    Ok(())
}

/// Whether the store was carried away meanwhile, for a process that has it open.
pub(crate) async fn is_moved(db: &crate::sql::Db) -> Result<bool, Error> {
    Ok(end::mark(db, MOVED).await?.is_some())
}

/// What is said of a store that is being carried away, or was.
pub(crate) const GOING: &str = "this store is being carried to another place";

/// Removes the journal: the destination is a store from then on.
struct Whole;

impl Body for Whole {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        end::set(tx, JOURNAL, None).await
    }
}

/// The tables of the list and those of an open database, sorted, for the test that none is forgotten.
#[doc(hidden)]
pub async fn known_and_present(store: &crate::Store) -> Result<(Vec<String>, Vec<String>), Error> {
    let inner: &Arc<crate::store::Inner> = store.inner();
    let mut known: Vec<String> = tables::TABLES
        .iter()
        .map(|table| table.name.to_owned())
        .collect();
    known.sort();
    let present = inner.db.write(Names).await?;
    Ok((known, present))
}

struct Names;

impl Body for Names {
    type Output = Vec<String>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<String>, Error> {
        tables::names(tx).await
    }
}
