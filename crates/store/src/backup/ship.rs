//! The worker that ships the log of a running store into a backup directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::layout::{self, BASE, LISTED, Layout, Line, LineHead, Part, SegmentDraft};
use super::vault::Vault;
use super::wal::Cursor;
use super::{BackupOptions, BackupStatus};
use crate::blob::file_system::StorageKey;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{CHECKPOINT_BYTES, Pause, Sqlite, sqlite_error};
use crate::store::Inner;

/// The handle of the worker. Dropping it ends the worker without a last point.
#[derive(Debug)]
pub(crate) struct Worker {
    orders: mpsc::Sender<Order>,
    status: Arc<Mutex<BackupStatus>>,
}

enum Order {
    /// Ship now and answer.
    Ship(mpsc::Sender<()>),
    /// Ship once more, answer, and end.
    Stop(mpsc::Sender<()>),
}

impl Worker {
    /// Starts the worker. It holds the store weakly, so that a store that is dropped goes.
    pub(crate) fn start(inner: &Arc<Inner>, options: BackupOptions) -> Result<Self, Error> {
        let (layout, lock) = Layout::make(&options.directory)?;
        layout.sweep_partial()?;
        let vault = Vault::open(layout.objects(), options.link)?;
        let (orders, queue) = mpsc::channel();
        let status = Arc::new(Mutex::new(BackupStatus::default()));
        let shipper = Shipper {
            layout,
            _lock: lock,
            vault,
            changed: Arc::default(),
            lost: Arc::default(),
            installed: false,
            line: None,
            pending: None,
            orders: queue,
            stop: None,
            waiting: Vec::new(),
            wait: Duration::ZERO,
            fold_at: CHECKPOINT_BYTES,
            shipped: None,
            status: Arc::clone(&status),
            options,
        };
        let weak = Arc::downgrade(inner);
        std::thread::Builder::new()
            .name("store-backup".to_owned())
            .spawn(move || shipper.run(&weak))
            .map_err(|error| {
                Error::io("start the backup of", std::path::Path::new("store"), error)
            })?;
        Ok(Self { orders, status })
    }

    pub(crate) fn status(&self) -> BackupStatus {
        lock(&self.status).clone()
    }

    /// Makes a point now. Blocks.
    pub(crate) fn ship(&self) {
        self.order(Order::Ship);
    }

    /// Makes a last point and ends the worker. Blocks.
    pub(crate) fn stop(&self) {
        self.order(Order::Stop);
    }

    fn order(&self, order: impl FnOnce(mpsc::Sender<()>) -> Order) {
        let (reply, answer) = mpsc::channel();
        if self.orders.send(order(reply)).is_ok() {
            let _ = answer.recv();
        }
    }
}

/// Rows of table `blob` that were written: since the last point, and since a new line began.
#[derive(Debug, Default)]
struct Changed {
    line: BTreeSet<i64>,
    next: Option<BTreeSet<i64>>,
    /// There were too many to remember.
    overflow: bool,
}

impl Changed {
    fn note(&mut self, row: i64) {
        for set in std::iter::once(&mut self.line).chain(&mut self.next) {
            set.insert(row);
        }
        let most = self
            .line
            .len()
            .max(self.next.as_ref().map_or(0, BTreeSet::len));
        if most > MAX_CHANGED {
            self.overflow = true;
            self.line.clear();
            if let Some(next) = &mut self.next {
                next.clear();
            }
        }
    }
}

/// Why a point was not made.
#[derive(Debug)]
enum Fault {
    /// The log does not go on where the line ends: another line is needed.
    Gap(&'static str),
    Failed(Error),
    /// The worker shall end.
    Stop,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Where a line is in the log.
#[derive(Clone, Debug)]
struct Position {
    /// `None`: the copy holds everything, and whatever log appears is new.
    cursor: Option<Cursor>,
    /// The generation was folded at this place, so that another may follow.
    folded: bool,
}

impl Position {
    /// The place to go on from in the log as it is; `None` when there is nothing.
    fn locate(&self, log: Option<&File>) -> Result<Option<Cursor>, Fault> {
        let start = match log {
            Some(log) => Cursor::start(log).map_err(read_log)?,
            None => None,
        };
        match (start, &self.cursor) {
            (start, None) => Ok(start),
            (Some(start), Some(here)) if start.header == here.header => Ok(Some(here.clone())),
            (start, Some(_)) if self.folded => Ok(start),
            _ => Err(Fault::Gap("the log was folded by somebody else")),
        }
    }
}

/// The line that is being written.
struct Current {
    line: Line,
    position: Position,
    number: u64,
    previous: String,
    /// Bytes of its segments.
    shipped: u64,
    begun: Instant,
}

/// The end of a folded generation, which is in the log no more: the beginning of the next segment.
struct Pending {
    part: Part,
    draft: SegmentDraft,
}

/// One moment of the store between two transactions.
struct Mark {
    /// Everything acknowledged before is in it.
    at: Timestamp,
    log: Option<File>,
    from: Option<Cursor>,
    to: Option<Cursor>,
    changed: BTreeSet<i64>,
    /// A read transaction that sees exactly this moment.
    reader: Connection,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Set {
    Line,
    Next,
}

struct Shipper {
    layout: Layout,
    _lock: File,
    vault: Vault,
    changed: Arc<Mutex<Changed>>,
    lost: Arc<AtomicBool>,
    installed: bool,
    line: Option<Current>,
    pending: Option<Pending>,
    orders: mpsc::Receiver<Order>,
    stop: Option<mpsc::Sender<()>>,
    /// Who waits for a point.
    waiting: Vec<mpsc::Sender<()>>,
    wait: Duration,
    /// The length of the log at which it is folded.
    fold_at: u64,
    /// When the last point was made.
    shipped: Option<Instant>,
    status: Arc<Mutex<BackupStatus>>,
    options: BackupOptions,
}

impl Shipper {
    fn run(mut self, store: &Weak<Inner>) {
        loop {
            if self.waiting.is_empty() && self.stop.is_none() {
                match self.orders.recv_timeout(self.wait) {
                    Ok(order) => self.hear(order),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            while let Ok(order) = self.orders.try_recv() {
                self.hear(order);
            }
            let Some(inner) = store.upgrade() else {
                return;
            };
            // Who asks while this step runs is answered after the next one.
            let asked = std::mem::take(&mut self.waiting);
            let stopping = self.stop.is_some();
            self.step(&inner, !asked.is_empty() || stopping);
            drop(inner);
            for reply in asked {
                let _ = reply.send(());
            }
            if stopping {
                if let Some(reply) = self.stop.take() {
                    let _ = reply.send(());
                }
                return;
            }
            self.wait = self.options.every.min(POLL);
        }
    }

    fn hear(&mut self, order: Order) {
        match order {
            Order::Ship(reply) => self.waiting.push(reply),
            Order::Stop(reply) => self.stop = Some(reply),
        }
    }

    /// Makes a point when one is due, and notes how it went.
    fn step(&mut self, inner: &Arc<Inner>, now: bool) {
        let length = inner.db.embedded().map_or(0, Sqlite::log_length);
        self.fold_at = self.fold_at.min(length + CHECKPOINT_BYTES);
        let long = self.line.is_some() && length >= self.fold_at;
        if !now && !long && !self.due() {
            return;
        }
        self.shipped = Some(Instant::now());
        let mut outcome = self.round(inner);
        while let Err(Fault::Gap(reason)) = outcome {
            tracing::info!(reason, "the backup begins with a new copy of the database");
            self.line = None;
            self.pending = None;
            outcome = self.round(inner);
        }
        match outcome {
            Ok(()) | Err(Fault::Stop | Fault::Gap(_)) => {}
            Err(Fault::Failed(error)) => {
                tracing::error!(error = %super::chain(&error), "the backup failed, it is tried again; the registry goes on");
                let mut status = lock(&self.status);
                status.failures += 1;
                status.problem = Some(error.to_string());
            }
        }
    }

    fn due(&self) -> bool {
        self.shipped
            .is_none_or(|last| last.elapsed() >= self.options.every)
    }

    fn round(&mut self, inner: &Arc<Inner>) -> Result<(), Fault> {
        let Some(sqlite) = inner.db.embedded() else {
            return Err(Error::Unavailable {
                what: "the backup of the database",
                problem: "PostgreSQL is backed up with its own tools".to_owned(),
            }
            .into());
        };
        self.install(sqlite)?;
        if self.line.is_none() {
            if self.stop.is_some() {
                // A new copy is for the next start.
                return Err(Fault::Stop);
            }
            if !self.resume(inner, sqlite)? {
                self.begin(inner, sqlite)?;
            }
        }
        self.ship(inner, sqlite)?;
        if self.stop.is_none() && self.outgrown() {
            self.begin(inner, sqlite)?;
            self.ship(inner, sqlite)?;
        }
        if sqlite.log_length() >= self.fold_at {
            self.fold(sqlite)?;
            self.ship(inner, sqlite)?;
        }
        self.prune(inner.clock.now())?;
        let mut status = lock(&self.status);
        status.last_success = Some(inner.clock.now());
        status.problem = None;
        Ok(())
    }

    /// A line is as old, or its log as long, as is sensible to replay.
    fn outgrown(&self) -> bool {
        self.line.as_ref().is_some_and(|current| {
            current.begun.elapsed() >= LINE_AGE
                || current.shipped > current.line.head.bytes.max(LINE_BYTES)
        })
    }

    /// From here on the log is folded by this worker, and changed blobs are noted.
    fn install(&mut self, sqlite: &Sqlite) -> Result<(), Fault> {
        if self.installed {
            return Ok(());
        }
        let changed = Arc::clone(&self.changed);
        let lost = Arc::clone(&self.lost);
        sqlite.between(move |pause| {
            pause.keep_log(Some(lost));
            pause.watch_blobs(move |row| lock(&changed).note(row))
        })??;
        self.installed = true;
        Ok(())
    }

    /// Goes on with the newest line when the log still holds, byte for byte, what was shipped of it.
    fn resume(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<bool, Fault> {
        let (mut lines, problems) = self.layout.lines()?;
        for problem in problems {
            tracing::error!(problem, "a line of the backup is damaged");
        }
        let Some(line) = lines.pop() else {
            return Ok(false);
        };
        let (segments, problem) = line.segments()?;
        let end = match segments.last() {
            Some(last) => last.head.parts.last().and_then(Part::end),
            None => line.start()?,
        };
        let (Some(end), None) = (end, problem) else {
            return Ok(false);
        };
        let wanted = end.clone();
        let same = sqlite.between(move |pause| -> std::io::Result<bool> {
            let Some(log) = open_log(pause)? else {
                return Ok(false);
            };
            match Cursor::start(&log)? {
                Some(start) if start.header == wanted.header => {
                    Ok(start.scan_to(&log, wanted.offset)? == wanted)
                }
                _ => Ok(false),
            }
        })?;
        if !same.map_err(read_log)? {
            return Ok(false);
        }
        self.walk(inner, sqlite, &mut |_| Ok(()))?;
        tracing::info!(line = %line.path.display(), "the backup goes on where it ended");
        self.line = Some(Current {
            position: Position {
                cursor: Some(end),
                folded: false,
            },
            number: segments.len() as u64,
            previous: segments
                .last()
                .map_or_else(|| line.head.sha256.clone(), |last| last.head.sha256.clone()),
            shipped: segments.iter().map(|segment| segment.length).sum(),
            begun: Instant::now(),
            line,
        });
        Ok(true)
    }

    /// Makes a new line: all objects, then a copy of the database at one moment. The line before goes on meanwhile.
    fn begin(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        {
            let mut changed = lock(&self.changed);
            changed.next = Some(BTreeSet::new());
            if self.line.is_none() {
                changed.overflow = false;
            }
        }
        self.lost.store(false, Ordering::Release);
        let made = self.make(inner, sqlite);
        if made.is_err() {
            lock(&self.changed).next = None;
            self.layout.sweep_partial()?;
        }
        made
    }

    fn make(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        let draft = self.layout.draft(inner.clock.now())?;
        layout::write_json(&draft.path(super::BEGUN), &serde_json::json!({}))?;
        let listed = draft.path(LISTED);
        let failed = |error| Error::io("write", &listed, error);
        let mut list = BufWriter::new(File::create(&listed).map_err(failed)?);
        let mut objects = 0;
        self.walk(inner, sqlite, &mut |key| {
            objects += 1;
            writeln!(list, "{}", key.as_str()).map_err(failed)
        })?;
        let position = Position {
            cursor: None,
            folded: false,
        };
        let mark = self.mark_with_objects(inner, sqlite, &position, Set::Next, &mut |key| {
            objects += 1;
            writeln!(list, "{}", key.as_str()).map_err(failed)
        })?;
        list.into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        self.vault.sync()?;
        failpoint("backup.before_copy");
        let base = draft.path(BASE);
        let result = self.copy(inner, sqlite, &mark.reader, &base);
        let object_bytes = mark
            .reader
            .query_row(
                "SELECT CAST(COALESCE(SUM(size), 0) AS INTEGER) FROM blob WHERE storage_key IS NOT NULL",
                [],
                |row| row.get::<_, i64>(0),
            )
            .map_err(sqlite_error)?;
        drop(mark.reader);
        result?;
        failpoint("backup.after_copy");
        let (bytes, sha256) = super::hash_file(&base)?;
        let head = LineHead {
            version: layout::VERSION,
            at: mark.at.0,
            epoch: inner.epoch().to_owned(),
            bytes,
            sha256,
            log: mark.from.as_ref().map(|start| hex::encode(start.header)),
            objects,
            object_bytes: object_bytes.unsigned_abs(),
        };
        let line = draft.publish(head)?;
        failpoint("backup.after_line");
        {
            let mut changed = lock(&self.changed);
            changed.line = changed.next.take().unwrap_or_default();
        }
        self.pending = None;
        self.note_point(mark.at);
        self.line = Some(Current {
            position: Position {
                // The generation is shipped from its beginning: SQLite replays whole ones.
                cursor: mark.from,
                folded: false,
            },
            number: 0,
            previous: line.head.sha256.clone(),
            shipped: 0,
            begun: Instant::now(),
            line,
        });
        Ok(())
    }

    /// Copies the database as the reader's transaction sees it.
    fn copy(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        reader: &Connection,
        target: &std::path::Path,
    ) -> Result<(), Fault> {
        let mut copy = super::empty_database(target)?;
        {
            let backup = Backup::new(reader, &mut copy).map_err(sqlite_error)?;
            loop {
                match backup.step(PAGES).map_err(sqlite_error)? {
                    StepResult::Done => break,
                    StepResult::More => self.breathe(inner, sqlite)?,
                    _ => {
                        return Err(Error::Database(
                            "the database cannot be copied now".to_owned(),
                        )
                        .into());
                    }
                }
            }
        }
        copy.close().map_err(|(_, error)| sqlite_error(error))?;
        super::sync_file(target)?;
        Ok(())
    }

    /// Looks at every blob and has its object in the backup.
    fn walk(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<(), Fault> {
        let reader = sqlite.reader()?;
        let mut last = i64::MIN;
        loop {
            let rows = super::objects_after(&reader, last)?;
            for (row, key) in &rows {
                last = *row;
                // What the store has no more is deleted, or damaged; the point that is made later decides.
                if !self.vault.take(super::files(inner)?, key)? {
                    lock(&self.changed).note(*row);
                }
                seen(key)?;
            }
            self.breathe(inner, sqlite)?;
            if rows.is_empty() {
                self.vault.sync()?;
                return Ok(());
            }
        }
    }

    /// In the middle of long work: the line before gets its points, and an order to stop is heard.
    fn breathe(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        while let Ok(order) = self.orders.try_recv() {
            self.hear(order);
        }
        if self.stop.is_some() {
            return Err(Fault::Stop);
        }
        if self.line.is_some() && self.due() {
            self.shipped = Some(Instant::now());
            match self.ship(inner, sqlite) {
                Err(Fault::Gap(_)) => self.line = None,
                other => other?,
            }
        }
        Ok(())
    }

    /// Takes a moment, with a read transaction that sees it.
    fn mark(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        position: &Position,
        set: Set,
    ) -> Result<Mark, Fault> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Fault::Gap(
                "the log became too long while it could not be shipped",
            ));
        }
        let reader = sqlite.reader()?;
        let changed = Arc::clone(&self.changed);
        let position = position.clone();
        // Most of the log is read here, so that the writer waits for the rest alone.
        let early = match File::open(sqlite.log()) {
            Ok(log) => match position.locate(Some(&log)) {
                Ok(Some(from)) => Some(from.scan(&log).map_err(read_log)?),
                _ => None,
            },
            Err(_) => None,
        };
        let at = inner.clock.now();
        sqlite.between(move |pause| -> Result<Mark, Fault> {
            let log = open_log(pause).map_err(read_log)?;
            let from = position.locate(log.as_ref())?;
            let to = match (&from, &log) {
                (Some(from), Some(log)) => {
                    let near = early
                        .as_ref()
                        .filter(|early| early.header == from.header && early.offset >= from.offset);
                    Some(near.unwrap_or(from).scan(log).map_err(read_log)?)
                }
                _ => None,
            };
            // BEGIN alone takes no snapshot, the first read does.
            reader
                .execute_batch("BEGIN; SELECT 1 FROM meta LIMIT 1;")
                .map_err(sqlite_error)?;
            let mut changed = lock(&changed);
            if changed.overflow {
                return Err(Fault::Gap(
                    "too many blobs changed while they could not be copied",
                ));
            }
            let rows = match set {
                Set::Line => std::mem::take(&mut changed.line),
                Set::Next => changed
                    .next
                    .as_mut()
                    .map(std::mem::take)
                    .unwrap_or_default(),
            };
            Ok(Mark {
                at,
                log,
                from,
                to,
                changed: rows,
                reader,
            })
        })?
    }

    /// Takes a moment whose objects are all in the backup, durably.
    fn mark_with_objects(
        &mut self,
        inner: &Arc<Inner>,
        sqlite: &Sqlite,
        position: &Position,
        set: Set,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<Mark, Fault> {
        for round in 1.. {
            let mark = self.mark(inner, sqlite, position, set)?;
            let taken = self.take_changed(inner, &mark, seen);
            match taken {
                Ok(missing) if missing.is_empty() => return Ok(mark),
                Ok(missing) if round == ROUNDS => {
                    tracing::warn!(
                        objects = missing.len(),
                        "the store has no object for some of its blobs, so the backup has none; run `verify-store`"
                    );
                    return Ok(mark);
                }
                // Deleted since: a later moment does not name them.
                Ok(_) => self.give_back(set, &mark.changed),
                Err(error) => {
                    self.give_back(set, &mark.changed);
                    return Err(error.into());
                }
            }
        }
        unreachable!("the last round returns")
    }

    /// Has the objects of changed rows in the backup; gives the rows whose object the store has no more.
    fn take_changed(
        &mut self,
        inner: &Arc<Inner>,
        mark: &Mark,
        seen: &mut dyn FnMut(&StorageKey) -> Result<(), Error>,
    ) -> Result<Vec<i64>, Error> {
        let mut missing = Vec::new();
        let mut statement = mark
            .reader
            .prepare("SELECT storage_key FROM blob WHERE id = ?1 AND storage_key IS NOT NULL")
            .map_err(sqlite_error)?;
        for row in &mark.changed {
            let mut rows = statement.query([row]).map_err(sqlite_error)?;
            let Some(found) = rows.next().map_err(sqlite_error)? else {
                continue;
            };
            let key = StorageKey::parse(&found.get::<_, String>(0).map_err(sqlite_error)?)?;
            if self.vault.take(super::files(inner)?, &key)? {
                seen(&key)?;
            } else {
                missing.push(*row);
            }
        }
        self.vault.sync()?;
        failpoint("backup.after_objects");
        Ok(missing)
    }

    fn give_back(&self, set: Set, rows: &BTreeSet<i64>) {
        let mut changed = lock(&self.changed);
        let target = match set {
            Set::Line => &mut changed.line,
            Set::Next => match &mut changed.next {
                Some(next) => next,
                None => return,
            },
        };
        target.extend(rows);
    }

    /// Ships what was committed since the last point and declares a new one.
    fn ship(&mut self, inner: &Arc<Inner>, sqlite: &Sqlite) -> Result<(), Fault> {
        let Some(current) = &self.line else {
            return Ok(());
        };
        let position = current.position.clone();
        let mark = self.mark_with_objects(inner, sqlite, &position, Set::Line, &mut |_| Ok(()))?;
        let shipped = self.write(&mark);
        if shipped.is_err() {
            self.give_back(Set::Line, &mark.changed);
        }
        shipped?;
        self.note_point(mark.at);
        Ok(())
    }

    fn write(&mut self, mark: &Mark) -> Result<(), Fault> {
        let Some(current) = &mut self.line else {
            return Ok(());
        };
        let fresh = match (&mark.from, &mark.to) {
            (Some(from), Some(to)) if to.offset > from.offset => Some((from, to)),
            _ => None,
        };
        if fresh.is_none() && self.pending.is_none() {
            current.line.cover(mark.at)?;
            return Ok(());
        }
        let number = current.number + 1;
        let pending = self.pending.take();
        let irreplaceable = pending.is_some();
        let (mut draft, mut parts) = match pending {
            Some(pending) => (pending.draft, vec![pending.part]),
            None => (SegmentDraft::new(current.line.segment(number))?, Vec::new()),
        };
        let write = || {
            if let (Some((from, to)), Some(log)) = (fresh, &mark.log) {
                draft.copy(log, from.offset, to.offset)?;
                parts.push(Part::new(from, to));
            }
            draft.publish(mark.at, current.previous.clone(), parts)
        };
        let segment = match write() {
            Ok(segment) => segment,
            Err(error) if irreplaceable => {
                tracing::error!(error = %super::chain(&error), "a part of the log could not be written to the backup");
                return Err(Fault::Gap("a part of the log is lost"));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some((_, to)) = fresh {
            current.position = Position {
                cursor: Some(to.clone()),
                folded: false,
            };
        }
        current.number = number;
        current.shipped += segment.length;
        current.previous = segment.head.sha256;
        Ok(())
    }

    /// Folds the log. Its end, which no segment has yet, becomes the beginning of the next one.
    fn fold(&mut self, sqlite: &Sqlite) -> Result<(), Fault> {
        let Some(current) = &mut self.line else {
            return Ok(());
        };
        if self.pending.is_some() {
            return Ok(());
        }
        let Ok(log) = File::open(sqlite.log()) else {
            return Ok(());
        };
        let Some(from) = current.position.locate(Some(&log))? else {
            return Ok(());
        };
        let near = from.scan(&log).map_err(read_log)?;
        let mut draft = SegmentDraft::new(current.line.segment(current.number + 1))?;
        draft.copy(&log, from.offset, near.offset)?;
        let last = near.clone();
        let folded =
            sqlite.between(move |pause| -> Result<Option<(Cursor, Vec<u8>)>, Fault> {
                match Cursor::start(&log).map_err(read_log)? {
                    Some(start) if start.header == last.header => {}
                    _ => return Err(Fault::Gap("the log was folded by somebody else")),
                }
                let to = last.scan(&log).map_err(read_log)?;
                let length = to.offset - last.offset;
                if length > MAX_PENDING {
                    // Too much came meanwhile; the next round is nearer.
                    return Ok(None);
                }
                let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
                log.read_exact_at(&mut bytes, last.offset)
                    .map_err(read_log)?;
                pause.fold()?;
                Ok(Some((to, bytes)))
            })??;
        let Some((to, rest)) = folded else {
            return Ok(());
        };
        failpoint("backup.after_fold");
        if to.offset > from.offset {
            if let Err(error) = draft.write(&rest) {
                tracing::error!(error = %super::chain(&error), "a part of the log could not be written to the backup");
                return Err(Fault::Gap("a part of the log is lost"));
            }
            self.pending = Some(Pending {
                part: Part::new(&from, &to),
                draft,
            });
        }
        current.position = Position {
            cursor: Some(to),
            folded: true,
        };
        self.fold_at = sqlite.log_length() + CHECKPOINT_BYTES;
        Ok(())
    }

    /// Removes lines that no kept moment needs, and the objects that only they named.
    fn prune(&mut self, now: Timestamp) -> Result<(), Fault> {
        let removed = super::prune(&self.layout, &self.vault, now.minus(self.options.keep))?;
        if removed > 0 {
            tracing::info!(lines = removed, "old backups were removed");
        }
        Ok(())
    }

    fn note_point(&self, at: Timestamp) {
        let mut status = lock(&self.status);
        status.point = status.point.max(Some(at));
    }
}

fn open_log(pause: &Pause<'_>) -> std::io::Result<Option<File>> {
    match File::open(pause.log()) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_log(error: std::io::Error) -> Fault {
    Fault::Failed(Error::Database(format!(
        "the write-ahead log cannot be read: {error}"
    )))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often the worker looks whether something is to do.
const POLL: Duration = Duration::from_secs(1);
/// A line is replaced by a new copy after this time.
const LINE_AGE: Duration = Duration::from_hours(24);
/// Or when its log is longer than its copy and this, in bytes.
const LINE_BYTES: u64 = 256 << 20;
/// The end of a generation that may wait in memory, in bytes.
const MAX_PENDING: u64 = 4 << 20;
/// Changed blobs that are remembered.
const MAX_CHANGED: usize = 1_000_000;
/// Pages that are copied before the worker looks up.
const PAGES: i32 = 1024;
/// How often a point is tried again when objects go away under it.
const ROUNDS: u32 = 4;
