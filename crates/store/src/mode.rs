//! Read-only mode: what may be written now, and why not.
//!
//! The store is read-only by command (a row of `meta`, so every replica follows with its next transaction), or by itself:
//! while the data directory is full, while its file system takes no writes, while PostgreSQL is in recovery, and while it
//! is being carried to another place ([`crate::transfer`]), when not even the store's own work goes on. The command is checked **inside** each
//! transaction: on SQLite by the one writer, on PostgreSQL under a shared advisory lock that the command takes alone,
//! so when the command is answered no write of a user is under way or comes after it.
//!
//! Each transaction says what it is for ([`crate::sql::WriteKind`]). The collector goes on in every mode; on a full disk it writes
//! its log into the room of a reserve file, which is given up then and made again when there is room.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::audit;
use crate::clock::Timestamp;
use crate::directory::{self, RESERVE};
use crate::error::Error;
use crate::model::Actor;
use crate::sql::{Body, Tx, WriteKind, statements};
use crate::store::Store;

statements! {
    MARKS = "SELECT key, value FROM meta WHERE key IN ('leaving', 'mode', 'moved') ORDER BY key";
    COMMAND = "INSERT INTO meta (key, value) VALUES ('mode', $1) \
               ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    NORMAL = "DELETE FROM meta WHERE key = 'mode'";
}

/// The statement that every transaction begins with: what the store is marked with, the key and its value.
pub(crate) static CHECK: &crate::sql::Statement = &MARKS;

/// What a store may write now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Read-only by command.
    pub commanded: Option<Commanded>,
    /// Read-only because the data directory is full: why.
    pub full: Option<String>,
    /// Read-only because the file system of the data directory is.
    pub disk_read_only: bool,
    /// Read-only because the database is in recovery (a standby that was not promoted).
    pub recovery: bool,
}

impl Mode {
    /// Tells whether users can write.
    pub fn is_normal(&self) -> bool {
        self.commanded.is_none() && self.full.is_none() && !self.disk_read_only && !self.recovery
    }

    /// Why users cannot write, in the words that they get to read.
    pub fn reason(&self) -> Option<String> {
        if let Some(commanded) = &self.commanded {
            return Some(commanded.reason());
        }
        if self.disk_read_only {
            return Some(DISK_READ_ONLY.to_owned());
        }
        if let Some(full) = &self.full {
            return Some(full.clone());
        }
        self.recovery.then(|| RECOVERY.to_owned())
    }
}

/// The read-only mode by command, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commanded {
    /// What the operator gave as the reason; may be empty.
    pub text: String,
    /// Who commanded it.
    pub by: String,
    /// When, in micro-seconds since the Unix epoch.
    pub at: i64,
}

impl Commanded {
    fn parse(text: &str) -> Self {
        // A newer program may have written more; the mode itself must hold all the same.
        serde_json::from_str(text).unwrap_or_else(|_| Self {
            text: String::new(),
            by: "unknown".to_owned(),
            at: 0,
        })
    }

    /// What a mark says: the command, or that the store is being carried away, which nobody can write to either.
    fn of_mark(key: &str, value: &str) -> Self {
        if key == MODE {
            return Self::parse(value);
        }
        Self {
            text: crate::transfer::GOING.to_owned(),
            by: "system:migrate".to_owned(),
            at: 0,
        }
    }

    fn reason(&self) -> String {
        if self.text.is_empty() {
            "an operator has stopped writes for now, try again later".to_owned()
        } else {
            format!(
                "an operator has stopped writes for now ({}), try again later",
                self.text
            )
        }
    }
}

/// Refuses a transaction of this kind where the store has this mark. A command leaves the store's own work alone, and lets
/// what is needed be kept from it; where the store is being carried away, that would be lost too, or take away what the new place has.
pub(crate) fn check_mark(kind: WriteKind, key: &str, value: &str) -> Result<(), Error> {
    match kind {
        WriteKind::Protect if key == MODE => Ok(()),
        WriteKind::User | WriteKind::Delete | WriteKind::Protect => Err(Error::ReadOnly {
            reason: Commanded::of_mark(key, value).reason(),
        }),
        WriteKind::Maintenance if key != MODE => {
            Err(Error::Moving(crate::transfer::GOING.to_owned()))
        }
        WriteKind::Maintenance | WriteKind::Place => Ok(()),
    }
}

/// What one process knows by itself: whether its data directory has room, and what it last saw of the rest.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    disk: Option<Disk>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    full: Option<String>,
    /// A directory that cannot be written, because its file system takes no writes.
    locked: Option<PathBuf>,
    recovery: bool,
    /// The commanded mode as it was last read, so that a body is not taken in only to be refused at its end.
    commanded: Option<Commanded>,
}

/// The file system of the data directory, and the file that keeps room on it.
#[derive(Debug)]
struct Disk {
    directory: PathBuf,
    reserve: PathBuf,
    floor: Option<u64>,
}

/// What a file system has.
#[derive(Clone, Copy, Debug)]
struct Room {
    free: u64,
    total: u64,
    files: Option<u64>,
}

impl Gate {
    /// Watches a data directory. `floor`: below so many free bytes users cannot write; `None` takes
    /// the smaller of 128 MiB and 1 % of the file system.
    pub(crate) fn of_directory(directory: &Path, floor: Option<u64>) -> Self {
        Self {
            disk: Some(Disk {
                directory: directory.to_owned(),
                reserve: directory.join(RESERVE),
                floor,
            }),
            state: Mutex::default(),
        }
    }

    /// Refuses a transaction of this kind while the disk is full or read-only. It looks at the disk anew, so what was
    /// freed counts at once.
    pub(crate) fn check(&self, kind: WriteKind) -> Result<(), Error> {
        if self.is_locked() {
            return Err(disk_read_only());
        }
        if !matches!(kind, WriteKind::User | WriteKind::Protect) || self.state().full.is_none() {
            return Ok(());
        }
        self.measure();
        match &self.state().full {
            Some(reason) => Err(Error::ReadOnly {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Refuses what a user is about to send by what was last seen. The transaction at its end decides.
    pub(crate) fn check_early(&self) -> Result<(), Error> {
        self.check(WriteKind::User)?;
        let state = self.state();
        let reason = match &state.commanded {
            Some(commanded) => commanded.reason(),
            None if state.recovery => RECOVERY.to_owned(),
            None => return Ok(()),
        };
        Err(Error::ReadOnly { reason })
    }

    /// A write below `directory` failed. Tells whether the reason is that its file system takes no writes, and begins the
    /// read-only mode then. What can tell is another write: a file system that stopped after an error of its own may
    /// still call itself writable. Blocks.
    pub(crate) fn met_failed_write(&self, directory: &Path) -> bool {
        let locked = directory::is_read_only(directory);
        let mut state = self.state();
        if locked && state.locked.is_none() {
            tracing::error!(
                directory = %directory.display(),
                "the file system takes no writes, users cannot write until it does; pulls go on"
            );
            state.locked = Some(directory.to_owned());
        }
        locked
    }

    /// Tells whether a file system takes no writes; ends that mode when it does again. Blocks while it lasts.
    fn is_locked(&self) -> bool {
        let Some(directory) = self.state().locked.clone() else {
            return false;
        };
        if directory::is_read_only(&directory) {
            return true;
        }
        if self.state().locked.take().is_some() {
            tracing::info!(directory = %directory.display(), "the file system takes writes again");
        }
        false
    }

    /// A write met a full disk. Gives the reserve up; `true` when that made room, so that what must go on can try again.
    pub(crate) fn met_full_disk(&self) -> bool {
        let Some(disk) = &self.disk else {
            return false;
        };
        // First the measure: what the reserve gives is not for users. It may say that there is room while a quota or a
        // large write says that there is none.
        let had = disk.reserve.exists();
        self.measure();
        disk.release();
        had
    }

    /// Measures the disk and enters or leaves the mode; makes the reserve when there is room for it. Blocks.
    pub(crate) fn look(&self) {
        if self.is_locked() {
            return;
        }
        if let (Some(room), Some(disk)) = (self.measure(), &self.disk) {
            disk.make(room);
        }
    }

    /// Looks at the disk now, because the write of a file failed so; what to answer. Blocks.
    pub(crate) fn note_failure(&self, failure: Error) -> Error {
        match (&failure, &self.disk) {
            (Error::Full, _) => drop(self.measure()),
            // A file system that stops fails what is under way in another way than what comes later.
            (Error::DiskReadOnly(_) | Error::Io { .. }, Some(disk))
                if self.met_failed_write(&disk.directory) =>
            {
                tracing::debug!(error = %failure, "a write failed on a file system that takes none");
                return disk_read_only();
            }
            _ => {}
        }
        failure
    }

    /// Measures the disk and enters or leaves the mode; what it has when that is enough.
    fn measure(&self) -> Option<Room> {
        let disk = self.disk.as_ref()?;
        let room = disk.room().ok()?;
        let mut state = self.state();
        let floor = disk.floor(room);
        let low = room.free < floor || room.files.is_some_and(|files| files < MIN_FILES);
        // What ends the mode is well above what begins it, so that it does not come and go with every file.
        let enough = room.free >= 2 * floor + Disk::size(room)
            && room.files.is_none_or(|files| files >= 2 * MIN_FILES);
        if state.full.is_none() && low {
            let reason = format!(
                "the disk is full, {} of {} bytes are free: free some space; pulls, deletions and collection go on",
                room.free, room.total
            );
            tracing::warn!(
                directory = %disk.directory.display(),
                free = room.free,
                floor,
                "the disk is full, users cannot write until there is room"
            );
            state.full = Some(reason);
        } else if state.full.is_some() && enough {
            tracing::info!(
                directory = %disk.directory.display(),
                free = room.free,
                "the disk has room again, users can write"
            );
            state.full = None;
        }
        if state.full.is_some() && room.free < Disk::size(room) {
            disk.release();
        }
        enough.then_some(room)
    }

    /// Notes whether the database is in recovery.
    pub(crate) fn note_recovery(&self, recovery: bool) {
        let mut state = self.state();
        if state.recovery != recovery {
            if recovery {
                tracing::warn!(
                    "the database is in recovery, users cannot write until it is promoted"
                );
            } else {
                tracing::info!("the database is out of recovery, users can write");
            }
            state.recovery = recovery;
        }
    }

    fn note_commanded(&self, commanded: Option<Commanded>) {
        self.state().commanded = commanded;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk {
    fn room(&self) -> Result<Room, Error> {
        let stat = rustix::fs::statvfs(&self.directory).map_err(|error| {
            Error::io("look at the file system of", &self.directory, error.into())
        })?;
        Ok(Room {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
            // Some file systems make files as they are needed and tell no number.
            files: (stat.f_files > 0).then_some(stat.f_favail),
        })
    }

    fn floor(&self, room: Room) -> u64 {
        self.floor
            .unwrap_or_else(|| MAX_FLOOR.min(room.total / 100))
    }

    /// Length of the reserve file.
    fn size(room: Room) -> u64 {
        MAX_RESERVE.min(room.total / 100)
    }

    /// Gives the reserve up; `true` when there was one.
    fn release(&self) -> bool {
        match std::fs::remove_file(&self.reserve) {
            Ok(()) => {
                tracing::debug!("the reserve file was given up");
                true
            }
            Err(_) => false,
        }
    }

    /// Makes the reserve when it is not there. It is no loss when that fails: the next look tries again.
    fn make(&self, room: Room) {
        let size = Self::size(room);
        if size == 0 || self.reserve.exists() {
            return;
        }
        let made = std::fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&self.reserve)
            .and_then(|file| {
                let allocated =
                    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size);
                match allocated {
                    Ok(()) => Ok(()),
                    Err(rustix::io::Errno::OPNOTSUPP) => fill(&file, size),
                    Err(error) => Err(error.into()),
                }
            });
        if let Err(error) = made {
            tracing::debug!(%error, "the reserve file could not be made");
            self.release();
        }
    }
}

/// Takes the room by writing bytes that no file system can make smaller.
fn fill(file: &std::fs::File, size: u64) -> std::io::Result<()> {
    let mut block = vec![0; 1 << 16];
    let mut at = 0;
    while at < size {
        getrandom::fill(&mut block).map_err(|error| std::io::Error::other(error.to_string()))?;
        let length = block
            .len()
            .min(usize::try_from(size - at).unwrap_or(block.len()));
        file.write_all_at(block.get(..length).unwrap_or(&block), at)?;
        at += length as u64;
    }
    Ok(())
}

impl Store {
    /// What the store may write now: by command, as every replica sees it, and by itself.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn mode(&self) -> Result<Mode, Error> {
        let inner = &self.0;
        let rows = inner.db.read(&MARKS, &[]).await?;
        let commanded = match rows.first() {
            Some(row) => Some(Commanded::of_mark(&row.text(0)?, &row.text(1)?)),
            None => None,
        };
        inner.gate.note_commanded(commanded);
        Ok(self.last_mode())
    }

    /// What this process knows of the mode without asking the database: the command as it was last seen.
    pub fn last_mode(&self) -> Mode {
        let state = self.0.gate.state();
        Mode {
            commanded: state.commanded.clone(),
            full: state.full.clone(),
            disk_read_only: state.locked.is_some(),
            recovery: state.recovery,
        }
    }

    /// Makes the store read-only by command on every replica. When this returns, no write of a user is under way.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn set_read_only(&self, reason: &str, actor: &Actor) -> Result<(), Error> {
        let text: String = reason.chars().filter(|c| !c.is_control()).collect();
        self.0
            .db
            .write(Set {
                reason: Some(text),
                actor: actor.clone(),
            })
            .await?;
        self.mode().await.map(drop)
    }

    /// Ends the read-only mode by command.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn set_normal(&self, actor: &Actor) -> Result<(), Error> {
        self.0
            .db
            .write(Set {
                reason: None,
                actor: actor.clone(),
            })
            .await?;
        self.mode().await.map(drop)
    }

    /// Looks at the disk and the database and enters or leaves the read-only mode. Part of the background work.
    pub(crate) async fn watch_mode(&self) -> Result<(), Error> {
        let inner = std::sync::Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || inner.gate.look())
            .await
            .map_err(|_| Error::Stopped)?;
        let recovery = self.0.db.in_recovery().await?;
        self.0.gate.note_recovery(recovery);
        self.mode().await.map(drop)
    }
}

/// Sets or ends the mode by command.
struct Set {
    reason: Option<String>,
    actor: Actor,
}

impl Body for Set {
    type Output = ();
    // It must be possible to end the mode while it lasts.
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        // Waits for every transaction of a user that is under way, and keeps new ones back.
        tx.exclude_users().await?;
        let (action, target) = if let Some(reason) = &self.reason {
            let Timestamp(at) = tx.now();
            let commanded = Commanded {
                text: reason.clone(),
                by: self.actor.principal.clone(),
                at,
            };
            let text = serde_json::to_string(&commanded)
                .map_err(|error| Error::Database(format!("the mode cannot be written: {error}")))?;
            tx.execute(&COMMAND, &[text.into()]).await?;
            ("mode.read-only", reason.clone())
        } else {
            tx.execute(&NORMAL, &[]).await?;
            ("mode.normal", String::new())
        };
        audit::allowed(tx, &self.actor, action, target).await
    }
}

/// The mark of the command; the others are those of a transfer.
const MODE: &str = "mode";

/// The refusal while a file system takes no writes.
pub(crate) fn disk_read_only() -> Error {
    Error::ReadOnly {
        reason: DISK_READ_ONLY.to_owned(),
    }
}

const DISK_READ_ONLY: &str =
    "its disk takes no writes (a read-only file system), an operator must look at it: pulls go on";
const MAX_RESERVE: u64 = 16 << 20;
const MAX_FLOOR: u64 = 128 << 20;
/// Files that the file system must be able to make.
const MIN_FILES: u64 = 64;
pub(crate) const RECOVERY: &str =
    "the database is in recovery, try again when it has been promoted";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_made_given_up_and_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::of_directory(dir.path(), Some(1));
        gate.look();
        assert!(dir.path().join(RESERVE).exists());
        assert!(gate.met_full_disk());
        assert!(!dir.path().join(RESERVE).exists());
        assert!(!gate.met_full_disk());
        gate.look();
        assert!(dir.path().join(RESERVE).exists());
    }

    #[test]
    fn a_floor_above_what_is_free_refuses_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::of_directory(dir.path(), Some(1 << 60));
        assert!(gate.check(WriteKind::User).is_ok());
        gate.look();
        let refused = gate.check(WriteKind::User);
        assert!(
            matches!(&refused, Err(Error::ReadOnly { reason }) if reason.contains("free some space"))
        );
        assert!(gate.check(WriteKind::Protect).is_err());
        assert!(gate.check(WriteKind::Delete).is_ok());
        assert!(gate.check(WriteKind::Maintenance).is_ok());
        assert!(!dir.path().join(RESERVE).exists());
    }

    #[test]
    fn a_command_refuses_users_and_deletions() {
        let row = r#"{"text":"moving house","by":"user:root","at":1}"#;
        for kind in [WriteKind::User, WriteKind::Delete] {
            let refused = check_mark(kind, MODE, row);
            assert!(
                matches!(&refused, Err(Error::ReadOnly { reason }) if reason.contains("moving house"))
            );
        }
        assert!(check_mark(WriteKind::Maintenance, MODE, row).is_ok());
        // The collector goes on, so what must stay can be said.
        assert!(check_mark(WriteKind::Protect, MODE, row).is_ok());
        // What cannot be read still holds.
        assert!(check_mark(WriteKind::User, MODE, "?").is_err());
    }

    #[test]
    fn a_store_that_is_carried_away_takes_nothing_from_anybody() {
        for key in [crate::transfer::LEAVING, crate::transfer::MOVED] {
            for kind in [WriteKind::User, WriteKind::Delete, WriteKind::Protect] {
                let refused = check_mark(kind, key, "x");
                assert!(
                    matches!(&refused, Err(Error::ReadOnly { reason }) if reason.contains("another place"))
                );
            }
            let refused = check_mark(WriteKind::Maintenance, key, "x");
            assert!(matches!(refused, Err(Error::Moving(_))));
            assert!(check_mark(WriteKind::Place, key, "x").is_ok());
        }
    }
}
