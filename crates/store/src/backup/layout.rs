//! The files of a backup directory.
//!
//! ```text
//! backup.json                    the version of the format, written first
//! lock                           held by whoever writes
//! o/<2 hex>/<2 hex>/<key>        objects, as in the data directory; each is here once
//! lines/<micro-seconds>/         one line: a copy of the database and the log that was written after it
//!   objects                      the keys that the database named when the line began
//!   base.db                      the copy
//!   line.json                    what the copy is; written last, then the directory gets its name
//!   00000001.log                 segments of the log, each a restorable point
//!   covered.json                 the last segment, and until when nothing was written after it
//! ```
//!
//! Every file is written beside its name, synced, renamed, and the directory is synced. So a file with its name is whole,
//! unless the disk damaged it, and hashes tell that. `covered.json` is written after the segment that it names, so a line
//! with fewer segments has lost some, and nothing is claimed of their time.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::wal::{Cursor, HEADER};
use crate::blob::file_system::{FileSystem, sync_directory};
use crate::clock::Timestamp;
use crate::error::Error;

/// A directory of backups.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: String,
    version: i64,
}

impl Layout {
    /// Opens an existing directory to read it.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let path = root.join(HEAD);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::unusable(
                    root,
                    format!("it holds no `{HEAD}`, so it is not a backup directory"),
                ));
            }
            Err(error) => return Err(Error::io("read", &path, error)),
        };
        let head: Head = parse(&path, &text)?;
        if head.format != FORMAT {
            return Err(Error::damaged(
                &path,
                "it is not of a backup of this program",
            ));
        }
        if head.version > VERSION {
            return Err(Error::Newer {
                dir: root.to_owned(),
                found: head.version,
                known: VERSION,
            });
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Opens a directory to write backups into, making it when it is missing or empty. The file is its lock.
    pub(crate) fn make(root: &Path) -> Result<(Self, File), Error> {
        use std::os::unix::fs::DirBuilderExt;
        if !root.is_dir() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(root)
                .map_err(|error| Error::io("create", root, error))?;
            if let Some(parent) = root.parent().filter(|path| !path.as_os_str().is_empty()) {
                sync_directory(parent)?;
            }
        }
        if !root.join(HEAD).exists() {
            let entries =
                std::fs::read_dir(root).map_err(|error| Error::io("read", root, error))?;
            for entry in entries {
                let entry = entry.map_err(|error| Error::io("read", root, error))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let partial = format!("{HEAD}.partial");
                if ![LOCK, OBJECTS, LINES, &partial, "lost+found"].contains(&name.as_str()) {
                    return Err(Error::unusable(
                        root,
                        format!("it holds `{name}` and no backup, choose an empty directory"),
                    ));
                }
            }
        }
        let lock = lock(root)?;
        let layout = Self {
            root: root.to_owned(),
        };
        if root.join(HEAD).exists() {
            Self::open(root)?;
        } else {
            FileSystem::make(&root.join(OBJECTS))?;
            let lines = root.join(LINES);
            std::fs::create_dir_all(&lines).map_err(|error| Error::io("create", &lines, error))?;
            sync_directory(root)?;
            let head = Head {
                format: FORMAT.to_owned(),
                version: VERSION,
            };
            write_json(&root.join(HEAD), &head)?;
        }
        Ok((layout, lock))
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the objects lie.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join(OBJECTS)
    }

    /// The lines, the oldest first, and what is wrong with those that cannot be read.
    pub(crate) fn lines(&self) -> Result<(Vec<Line>, Vec<Unreadable>), Error> {
        let (mut lines, mut problems) = (Vec::new(), Vec::new());
        for name in self.names()? {
            if name.bytes().all(|byte| byte.is_ascii_digit()) {
                let begun = Timestamp(name.parse().unwrap_or(i64::MAX));
                match Line::open(&self.root.join(LINES).join(&name)) {
                    Ok(line) if !line.base().is_file() => problems.push(Unreadable {
                        begun,
                        problem: format!("`{}` is missing", line.base().display()),
                    }),
                    Ok(line) => lines.push(line),
                    Err(error @ Error::Newer { .. }) => return Err(error),
                    Err(error) => problems.push(Unreadable {
                        begun,
                        problem: super::chain(&error),
                    }),
                }
            }
        }
        Ok((lines, problems))
    }

    /// Removes a line; a half removed one is never seen.
    pub(crate) fn remove(&self, line: &Line) -> Result<(), Error> {
        let mut gone = line.path.clone().into_os_string();
        gone.push(PARTIAL);
        let gone = PathBuf::from(gone);
        std::fs::rename(&line.path, &gone)
            .map_err(|error| Error::io("rename", &line.path, error))?;
        sync_directory(&self.root.join(LINES))?;
        crate::failpoint::failpoint("backup.after_unline");
        std::fs::remove_dir_all(&gone).map_err(|error| Error::io("remove", &gone, error))
    }

    /// Removes what an interrupted program left half made.
    pub(crate) fn sweep_partial(&self) -> Result<(), Error> {
        for name in self.names()? {
            if name.ends_with(PARTIAL) {
                let path = self.root.join(LINES).join(name);
                std::fs::remove_dir_all(&path)
                    .map_err(|error| Error::io("remove", &path, error))?;
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>, Error> {
        let lines = self.root.join(LINES);
        let failed = |error| Error::io("read", &lines, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&lines).map_err(failed)? {
            names.push(
                entry
                    .map_err(failed)?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        Ok(names)
    }

    /// Begins a line; it has no name until [`Draft::publish`].
    pub(crate) fn draft(&self, now: Timestamp) -> Result<Draft, Error> {
        // The names keep the order in which lines began, also when the clock went back.
        let last = self
            .names()?
            .iter()
            .filter_map(|name| name.get(..20)?.parse::<i64>().ok())
            .max();
        let at = now.0.max(last.map_or(0, |last| last + 1));
        let target = self.root.join(LINES).join(format!("{at:020}"));
        let mut partial = target.clone().into_os_string();
        partial.push(PARTIAL);
        let partial = PathBuf::from(partial);
        std::fs::create_dir(&partial).map_err(|error| Error::io("create", &partial, error))?;
        Ok(Draft { partial, target })
    }
}

/// A line that cannot be used.
#[derive(Clone, Debug)]
pub(crate) struct Unreadable {
    /// When it began, as its name says; no point of it is older.
    pub(crate) begun: Timestamp,
    pub(crate) problem: String,
}

/// A line that is being made.
#[derive(Debug)]
pub(crate) struct Draft {
    partial: PathBuf,
    target: PathBuf,
}

impl Draft {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Gives the line its name, durably. Its other files are synced when this is called.
    pub(crate) fn publish(self, head: LineHead) -> Result<Line, Error> {
        write_json(&self.partial.join(LINE), &head)?;
        std::fs::rename(&self.partial, &self.target)
            .map_err(|error| Error::io("rename", &self.partial, error))?;
        if let Some(parent) = self.target.parent() {
            sync_directory(parent)?;
        }
        Ok(Line {
            path: self.target,
            head,
        })
    }
}

/// A copy of the database, and the log that was written after it.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) path: PathBuf,
    pub(crate) head: LineHead,
}

/// `line.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LineHead {
    pub(crate) version: i64,
    /// Everything acknowledged before this moment is in the copy, in micro-seconds.
    pub(crate) at: i64,
    /// The epoch of the store's events.
    pub(crate) epoch: String,
    /// The length and the SHA-256 of `base.db`.
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
    /// The header of the log at that moment, when there was one; its generation is shipped from its beginning.
    pub(crate) log: Option<String>,
    /// What the copy names.
    pub(crate) objects: u64,
    pub(crate) object_bytes: u64,
}

impl Line {
    fn open(path: &Path) -> Result<Self, Error> {
        let file = path.join(LINE);
        let text = std::fs::read(&file).map_err(|error| Error::io("read", &file, error))?;
        let head: LineHead = parse(&file, &text)?;
        if head.version > VERSION {
            return Err(Error::Newer {
                dir: path.to_owned(),
                found: head.version,
                known: VERSION,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            head,
        })
    }

    pub(crate) fn at(&self) -> Timestamp {
        Timestamp(self.head.at)
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.path.join(BASE)
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.path.join(LISTED)
    }

    /// The log's place after the copy.
    pub(crate) fn start(&self) -> Result<Option<Cursor>, Error> {
        let Some(text) = &self.head.log else {
            return Ok(None);
        };
        header(text)
            .and_then(Cursor::of)
            .map(Some)
            .ok_or_else(|| Error::damaged(&self.path.join(LINE), "it names no log"))
    }

    /// The log of the line, as far as it is whole.
    pub(crate) fn log(&self) -> Result<Log, Error> {
        // Read before the segments: while a server writes here, what it names is there already.
        let covered = self.covered();
        let (segments, mut problem) = self.segments()?;
        let mut end = segments.last().map_or(self.at(), Segment::at);
        match covered {
            Ok(Some(covered)) => {
                let there = segments.len() as u64;
                let named = match covered.segment.checked_sub(1) {
                    None => Some(&self.head.sha256),
                    Some(before) => usize::try_from(before)
                        .ok()
                        .and_then(|before| segments.get(before))
                        .map(|segment| &segment.head.sha256),
                };
                if named.is_some_and(|sha256| *sha256 != covered.sha256) {
                    problem.get_or_insert_with(|| {
                        format!(
                            "segment {} is another than `{}` names",
                            covered.segment,
                            self.path.join(COVERED).display()
                        )
                    });
                } else if covered.segment > there {
                    problem.get_or_insert_with(|| {
                        format!(
                            "segments {} to {} are missing at the end of `{}`",
                            there + 1,
                            covered.segment,
                            self.path.display()
                        )
                    });
                } else if covered.segment == there && problem.is_none() {
                    end = end.max(Timestamp(covered.until));
                }
            }
            Ok(None) => {}
            Err(error) => {
                problem.get_or_insert_with(|| super::chain(&error));
            }
        }
        Ok(Log {
            segments,
            end,
            problem,
        })
    }

    fn segments(&self) -> Result<(Vec<Segment>, Option<String>), Error> {
        let failed = |error| Error::io("read", &self.path, error);
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_suffix(SEGMENT))
                .and_then(|number| number.parse::<u64>().ok());
            numbers.extend(number);
        }
        numbers.sort_unstable();
        let mut segments: Vec<Segment> = Vec::new();
        let mut previous = self.head.sha256.clone();
        for number in numbers {
            let expected = segments.len() as u64 + 1;
            if number != expected {
                return Ok((
                    segments,
                    Some(format!(
                        "segment {expected} is missing before {number} in `{}`",
                        self.path.display()
                    )),
                ));
            }
            let path = self.segment(number);
            match Segment::open(&path) {
                Ok(segment) if segment.head.previous != previous => {
                    return Ok((
                        segments,
                        Some(format!(
                            "`{}` does not follow the one before",
                            path.display()
                        )),
                    ));
                }
                Ok(segment) => {
                    previous.clone_from(&segment.head.sha256);
                    segments.push(segment);
                }
                Err(error @ Error::Newer { .. }) => return Err(error),
                Err(error) => return Ok((segments, Some(error.to_string()))),
            }
        }
        Ok((segments, None))
    }

    /// The path of a segment.
    pub(crate) fn segment(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number:08}{SEGMENT}"))
    }

    /// What is known of the end of the line.
    fn covered(&self) -> Result<Option<Covered>, Error> {
        let path = self.path.join(COVERED);
        match std::fs::read(&path) {
            Ok(text) => parse(&path, &text).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path, error)),
        }
    }

    /// Notes that segment `segment` (0: the copy), whose hash is `sha256`, is the last one, and that nothing was written
    /// after it until this moment.
    pub(crate) fn cover(&self, segment: u64, sha256: &str, until: Timestamp) -> Result<(), Error> {
        let covered = Covered {
            segment,
            sha256: sha256.to_owned(),
            until: until.0,
        };
        write_json(&self.path.join(COVERED), &covered)
    }

    /// Bytes of the copy and its segments.
    pub(crate) fn size(&self, segments: &[Segment]) -> u64 {
        self.head.bytes + segments.iter().map(|segment| segment.length).sum::<u64>()
    }
}

/// The log of a line, as far as it is whole.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    /// The segments in order, up to the first that is missing or unreadable.
    pub(crate) segments: Vec<Segment>,
    /// The newest moment that these restore.
    pub(crate) end: Timestamp,
    /// What is wrong after them. The state of any later moment is not known then.
    pub(crate) problem: Option<String>,
}

/// `covered.json`.
#[derive(Serialize, Deserialize)]
struct Covered {
    segment: u64,
    sha256: String,
    until: i64,
}

/// One file of shipped log.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) path: PathBuf,
    pub(crate) head: SegmentHead,
    /// Bytes after the head.
    pub(crate) length: u64,
}

/// The head of a segment: JSON in the first [`HEAD_BYTES`] of its file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SegmentHead {
    pub(crate) version: i64,
    /// Everything acknowledged before this moment is in the database once this segment is applied.
    pub(crate) at: i64,
    /// The SHA-256 of what comes before: a segment, or the copy.
    pub(crate) previous: String,
    /// The SHA-256 of the bytes after the head.
    pub(crate) sha256: String,
    pub(crate) parts: Vec<Part>,
}

/// A stretch of one generation of the log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    /// The generation's header.
    pub(crate) header: String,
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// The running checksum at `to`.
    pub(crate) sum: (u32, u32),
}

impl Part {
    pub(crate) fn new(from: &Cursor, to: &Cursor) -> Self {
        Self {
            header: hex::encode(to.header),
            from: from.offset,
            to: to.offset,
            sum: to.sum,
        }
    }

    pub(crate) fn length(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }

    /// The place after this part.
    pub(crate) fn end(&self) -> Option<Cursor> {
        Some(Cursor {
            header: header(&self.header)?,
            offset: self.to,
            sum: self.sum,
        })
    }
}

impl Segment {
    fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::io("read", path, error);
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut block = vec![0; HEAD_BYTES];
        if file.read_exact_at(&mut block, 0).is_err() {
            return Err(Error::damaged(path, "it is shorter than its head"));
        }
        let head: SegmentHead = parse(path, &block)?;
        if head.version > VERSION {
            return Err(Error::Newer {
                dir: path.to_owned(),
                found: head.version,
                known: VERSION,
            });
        }
        let wanted: u64 = head.parts.iter().map(Part::length).sum();
        if length != wanted + HEAD_BYTES as u64 {
            return Err(Error::damaged(
                path,
                format!("it has {length} bytes, but its head tells of {wanted} more than itself"),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            head,
            length: wanted,
        })
    }

    pub(crate) fn at(&self) -> Timestamp {
        Timestamp(self.head.at)
    }

    /// Reads the bytes once and compares their hash.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let failed = |error| Error::io("read", &self.path, error);
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(SEGMENT_BYTES)).map_err(failed)?;
        if hash(&mut file).map_err(failed)?.1 == self.head.sha256 {
            Ok(())
        } else {
            Err(Error::damaged(
                &self.path,
                "its bytes have another hash, restore to a moment before it",
            ))
        }
    }
}

/// A segment that is being written.
#[derive(Debug)]
pub(crate) struct SegmentDraft {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    hash: Sha256,
    length: u64,
}

impl SegmentDraft {
    pub(crate) fn new(target: PathBuf) -> Result<Self, Error> {
        let partial = partial(&target);
        let file = File::create(&partial).map_err(|error| Error::io("create", &partial, error))?;
        Ok(Self {
            file,
            partial,
            target,
            hash: Sha256::new(),
            length: 0,
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all_at(bytes, HEAD_BYTES as u64 + self.length)
            .map_err(|error| Error::io("write", &self.partial, error))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Copies a stretch of the log.
    pub(crate) fn copy(&mut self, log: &File, from: u64, to: u64) -> Result<(), Error> {
        let mut buffer = vec![0; COPY];
        let mut at = from;
        while at < to {
            let length = usize::try_from(to - at).map_or(COPY, |left| left.min(COPY));
            log.read_exact_at(&mut buffer[..length], at)
                .map_err(|error| Error::io("read the log for", &self.target, error))?;
            self.write(&buffer[..length])?;
            at += length as u64;
        }
        Ok(())
    }

    /// Makes the segment visible, durably.
    pub(crate) fn publish(
        self,
        at: Timestamp,
        previous: String,
        parts: Vec<Part>,
    ) -> Result<Segment, Error> {
        let head = SegmentHead {
            version: VERSION,
            at: at.0,
            previous,
            sha256: hex::encode(self.hash.finalize()),
            parts,
        };
        let mut block = serde_json::to_vec(&head)
            .map_err(|error| Error::damaged(&self.partial, error.to_string()))?;
        if block.len() >= HEAD_BYTES {
            return Err(Error::damaged(
                &self.partial,
                "its head is longer than its place",
            ));
        }
        block.resize(HEAD_BYTES - 1, b' ');
        block.push(b'\n');
        self.file
            .write_all_at(&block, 0)
            .and_then(|()| self.file.sync_all())
            .map_err(|error| Error::io("write", &self.partial, error))?;
        crate::failpoint::failpoint("backup.before_segment");
        std::fs::rename(&self.partial, &self.target)
            .map_err(|error| Error::io("rename", &self.partial, error))?;
        if let Some(parent) = self.target.parent() {
            sync_directory(parent)?;
        }
        crate::failpoint::failpoint("backup.after_segment");
        Ok(Segment {
            path: self.target,
            head,
            length: self.length,
        })
    }
}

/// Length and SHA-256 of what is left to read.
pub(crate) fn hash(reader: &mut impl Read) -> std::io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; COPY];
    let mut length = 0;
    loop {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            return Ok((length, hex::encode(hash.finalize())));
        }
        hash.update(&buffer[..count]);
        length += count as u64;
    }
}

/// Writes a file beside its name, syncs it, renames it, and syncs the directory.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let partial = partial(path);
    let mut text =
        serde_json::to_vec(value).map_err(|error| Error::damaged(path, error.to_string()))?;
    text.push(b'\n');
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|error| Error::io("write", path, error))?;
    path.parent().map_or(Ok(()), sync_directory)
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL);
    PathBuf::from(name)
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text)
        .map_err(|error| Error::damaged(path, format!("it cannot be read: {error}")))
}

fn header(text: &str) -> Option<[u8; HEADER]> {
    hex::decode(text).ok()?.try_into().ok()
}

fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| Error::io("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse(root.to_owned())),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &path, error)),
    }
}

/// The copy of the database in a line.
pub(crate) const BASE: &str = "base.db";
/// The keys that the copy names, one a line.
pub(crate) const LISTED: &str = "objects";
/// The version of the format that this program writes.
pub(crate) const VERSION: i64 = 1;
const FORMAT: &str = "longshore backup";
const HEAD: &str = "backup.json";
const LOCK: &str = "lock";
const OBJECTS: &str = "o";
const LINES: &str = "lines";
const LINE: &str = "line.json";
const COVERED: &str = "covered.json";
const SEGMENT: &str = ".log";
const PARTIAL: &str = ".partial";
const HEAD_BYTES: usize = 1024;
const COPY: usize = 1 << 20;

/// Where the bytes of a segment begin.
pub(crate) const SEGMENT_BYTES: u64 = HEAD_BYTES as u64;
