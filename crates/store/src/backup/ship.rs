//! The worker that ships the log of a running store into a backup directory.
//!
//! One thread does everything, one round after the other; only SQLite's notices of changed rows and the status are
//! shared. A round takes a moment of the store ([`moment`]), puts the log up to it into a segment ([`segment`]),
//! and begins a new line ([`mod@line`]) when the one that it has cannot go on or is outgrown.

mod line;
mod moment;
mod segment;

use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::layout::Layout;
use super::vault::Vault;
use super::{BackupOptions, BackupStatus};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::sql::{CHECKPOINT_BYTES, Sqlite};
use crate::store::Inner;

use line::Current;
use moment::Changed;
use segment::Pending;

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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often the worker looks whether something is to do.
const POLL: Duration = Duration::from_secs(1);
/// A line is replaced by a new copy after this time.
const LINE_AGE: Duration = Duration::from_hours(24);
/// Or when its log is longer than its copy and this, in bytes.
const LINE_BYTES: u64 = 256 << 20;
