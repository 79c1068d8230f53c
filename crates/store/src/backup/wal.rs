//! Reading the write-ahead log of SQLite: where its committed frames end, and their exact bytes.
//!
//! The format is <https://sqlite.org/fileformat2.html#the_write_ahead_log>. A header of 32 bytes holds two salts that
//! name the generation; each frame carries the salts and a checksum over everything before it, so a position with its
//! checksum proves what stands before it. Nothing here writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A place in one generation of the log: after its header, or after a frame that ends a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The header of the generation.
    pub(crate) header: [u8; HEADER],
    /// Bytes from the beginning of the file.
    pub(crate) offset: u64,
    /// The running checksum at this place.
    pub(crate) sum: (u32, u32),
}

impl Cursor {
    /// The place after the header of the log; `None` when the file holds no whole header.
    pub(crate) fn start(file: &File) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => Ok(Self::of(header)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The place after this header; `None` when it is none.
    pub(crate) fn of(header: [u8; HEADER]) -> Option<Self> {
        let magic = big(&header, 0);
        let page = big(&header, 8);
        if magic & !1 != MAGIC || !page.is_power_of_two() || !(512..=65_536).contains(&page) {
            return None;
        }
        let sum = add(magic & 1 == 1, (0, 0), &header[..24]);
        (sum == (big(&header, 24), big(&header, 28))).then_some(Self {
            header,
            offset: HEADER as u64,
            sum,
        })
    }

    /// The length of a frame of this generation, in bytes.
    pub(crate) fn frame(&self) -> u64 {
        u64::from(big(&self.header, 8)) + FRAME_HEADER as u64
    }

    /// The end of the last whole transaction after this place. Frames of a transaction that is not committed, of
    /// another generation, or left behind by a rolled back one are never taken for committed ones: their salts or
    /// their checksums differ, or no frame ends them.
    pub(crate) fn scan(&self, file: &File) -> io::Result<Self> {
        self.scan_to(file, u64::MAX)
    }

    /// The same, not beyond `limit`.
    pub(crate) fn scan_to(&self, file: &File, limit: u64) -> io::Result<Self> {
        let swap = big(&self.header, 0) & 1 == 1;
        let length = usize::try_from(self.frame()).unwrap_or(usize::MAX);
        let mut frame = vec![0; length];
        let mut here = self.clone();
        let mut end = self.clone();
        while here.offset + self.frame() <= limit {
            match file.read_exact_at(&mut frame, here.offset) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error),
            }
            if frame[8..16] != self.header[16..24] {
                break;
            }
            let sum = add(swap, here.sum, &frame[..8]);
            let sum = add(swap, sum, &frame[FRAME_HEADER..]);
            if sum != (big(&frame, 16), big(&frame, 20)) {
                break;
            }
            here.offset += self.frame();
            here.sum = sum;
            if big(&frame, 4) != 0 {
                end = here.clone();
            }
        }
        Ok(end)
    }
}

fn big(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(four)
}

/// Goes on with a checksum over pairs of 32-bit words, in the byte order that the header names.
fn add(big_endian: bool, (mut first, mut second): (u32, u32), bytes: &[u8]) -> (u32, u32) {
    for pair in bytes.chunks_exact(8) {
        let (a, b) = pair.split_at(4);
        let word = |half: &[u8]| {
            let mut four = [0; 4];
            four.copy_from_slice(half);
            if big_endian {
                u32::from_be_bytes(four)
            } else {
                u32::from_le_bytes(four)
            }
        };
        first = first.wrapping_add(word(a)).wrapping_add(second);
        second = second.wrapping_add(word(b)).wrapping_add(first);
    }
    (first, second)
}

/// The length of the log's header.
pub(crate) const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
const MAGIC: u32 = 0x377f_0682;

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> (tempfile::TempDir, rusqlite::Connection, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.db");
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection
            .query_row("PRAGMA journal_mode=WAL", [], |_| Ok(()))
            .unwrap();
        connection
            .query_row("PRAGMA wal_autocheckpoint=0", [], |_| Ok(()))
            .unwrap();
        connection
            .execute_batch("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
            .unwrap();
        let log = File::open(directory.path().join("a.db-wal")).unwrap();
        (directory, connection, log)
    }

    #[test]
    fn every_commit_moves_the_end() {
        let (_directory, connection, log) = database();
        let start = Cursor::start(&log).unwrap().unwrap();
        let mut last = start.scan(&log).unwrap();
        assert_eq!(last.offset, log.metadata().unwrap().len());
        for _ in 0..3 {
            connection
                .execute("INSERT INTO t (b) VALUES (zeroblob(9000))", [])
                .unwrap();
            let next = last.scan(&log).unwrap();
            assert!(next.offset > last.offset);
            assert_eq!(next, start.scan(&log).unwrap(), "the same from any place");
            last = next;
        }
        assert_eq!(start.scan_to(&log, last.offset).unwrap(), last);
        assert!(start.scan_to(&log, last.offset - 1).unwrap().offset < last.offset);
    }

    #[test]
    fn what_was_rolled_back_or_damaged_is_not_taken() {
        let (directory, connection, log) = database();
        let start = Cursor::start(&log).unwrap().unwrap();
        let before = start.scan(&log).unwrap();
        // Pages that do not fit the cache go to the log before the COMMIT.
        connection
            .execute_batch("PRAGMA cache_size=2; PRAGMA cache_spill=1; BEGIN;")
            .unwrap();
        for _ in 0..50 {
            connection
                .execute("INSERT INTO t (b) VALUES (randomblob(9000))", [])
                .unwrap();
        }
        assert!(log.metadata().unwrap().len() > before.offset);
        assert_eq!(start.scan(&log).unwrap(), before);
        connection.execute_batch("ROLLBACK").unwrap();
        connection
            .execute("INSERT INTO t (b) VALUES (zeroblob(10))", [])
            .unwrap();
        let after = start.scan(&log).unwrap();
        assert!(after.offset > before.offset);
        assert!(after.offset < log.metadata().unwrap().len());

        let mut bytes = std::fs::read(directory.path().join("a.db-wal")).unwrap();
        bytes[usize::try_from(before.offset).unwrap() + 100] ^= 1;
        let copy = directory.path().join("copy");
        std::fs::write(&copy, bytes).unwrap();
        let copy = File::open(copy).unwrap();
        assert_eq!(start.scan(&copy).unwrap(), before);
    }

    #[test]
    fn a_new_generation_has_another_header() {
        let (_directory, connection, log) = database();
        let old = Cursor::start(&log).unwrap().unwrap();
        connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .unwrap();
        assert_eq!(Cursor::start(&log).unwrap(), None);
        connection
            .execute("INSERT INTO t (b) VALUES (NULL)", [])
            .unwrap();
        let new = Cursor::start(&log).unwrap().unwrap();
        assert_ne!(old.header, new.header);
        assert_eq!(old.scan(&log).unwrap(), old);
    }

    #[test]
    fn other_bytes_are_no_header() {
        assert_eq!(Cursor::of([0; HEADER]), None);
        assert_eq!(Cursor::of([0x37; HEADER]), None);
    }
}
