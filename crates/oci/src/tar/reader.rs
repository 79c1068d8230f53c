//! The guarded reader.

use std::io::{self, Read};

use super::decompress::{Compression, Decompressed, decompress};
use super::names::{self, Names, Seen};
use super::{BLOCK, Limits, Links, TarError};
use crate::digest::shorten;

/// Takes entries as they come, in the archive's order.
pub trait Sink {
    /// Takes one entry. What it leaves of `entry.content` unread is skipped.
    ///
    /// # Errors
    /// Ends the walk with [`TarError::Sink`]. An error of `entry.content` may be handed on as it is:
    /// the walk then ends with what really happened.
    fn entry(&mut self, entry: Entry<'_>) -> io::Result<()>;
}

/// One entry whose name and kind were checked.
pub struct Entry<'a> {
    /// The name: relative, `/` between components, no `.` or `..`, no `/` at the end.
    pub path: &'a str,
    /// What it is.
    pub kind: Kind,
    /// The length of the content in bytes; 0 for all but files.
    pub size: u64,
    /// The content.
    pub content: &'a mut dyn Read,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File {
        /// Whether its owner may execute it. No other bit of the mode is handed on.
        executable: bool,
    },
    /// A directory.
    Directory,
    /// A symbolic link, only with [`Links::InsideTree`].
    Symlink {
        /// The relative target.
        target: String,
    },
    /// A hard link, only with [`Links::InsideTree`].
    HardLink {
        /// The name of a file that came before.
        target: String,
    },
}

/// What an archive holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// How it is compressed.
    pub compression: Compression,
    /// Files.
    pub files: u64,
    /// Directories that have an entry, the root left out.
    pub directories: u64,
    /// Symbolic and hard links.
    pub links: u64,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Bytes of the uncompressed archive up to the end of the stream.
    pub archive_bytes: u64,
}

/// Walks the whole archive and keeps nothing. An archive that passes also passes [`read`] with the
/// same limits.
///
/// # Errors
/// As [`read`], without [`TarError::Sink`].
pub fn check<R: Read>(reader: R, limits: &Limits) -> Result<Summary, TarError> {
    struct Nothing;
    impl Sink for Nothing {
        fn entry(&mut self, _entry: Entry<'_>) -> io::Result<()> {
            Ok(())
        }
    }
    read(reader, limits, &mut Nothing)
}

/// Walks an archive in any [`Compression`] and hands its entries to `sink`.
///
/// The stream is read to its end, so that a digest that is computed underneath covers all of it.
///
/// # Errors
/// [`TarError::is_refusal`] tells a bad archive from a failing source or sink. Entries before the
/// fault have been handed on then; [`check`] first where that matters.
pub fn read<R: Read>(reader: R, limits: &Limits, sink: &mut dyn Sink) -> Result<Summary, TarError> {
    let stream = decompress(reader, limits)?;
    let mut walk = Walk {
        summary: Summary {
            compression: stream.compression(),
            files: 0,
            directories: 0,
            links: 0,
            file_bytes: 0,
            archive_bytes: 0,
        },
        stream: Stream {
            source: stream,
            offset: 0,
            fault: None,
        },
        limits,
        names: Names::default(),
        entries: 0,
    };
    walk.run(sink)?;
    walk.summary.archive_bytes = walk.stream.offset;
    Ok(walk.summary)
}

struct Walk<'a, R: Read> {
    stream: Stream<R>,
    limits: &'a Limits,
    names: Names,
    entries: u64,
    summary: Summary,
}

impl<R: Read> Walk<'_, R> {
    fn run(&mut self, sink: &mut dyn Sink) -> Result<(), TarError> {
        let mut extensions = Extensions::default();
        loop {
            let offset = self.stream.offset;
            let refuse = |reason| TarError::Header { offset, reason };
            let mut block = [0; BLOCK];
            self.stream.exact(&mut block)?;
            if block == [0; BLOCK] {
                if !extensions.is_empty() {
                    return Err(refuse("an extension header has no entry after it"));
                }
                return self.stream.only_zeros();
            }
            let header = Header::parse(&block).map_err(refuse)?;
            match header.kind {
                b'x' => extensions
                    .pax(&self.extension(&header, offset)?)
                    .map_err(refuse)?,
                b'L' => {
                    let name = self.extension(&header, offset)?;
                    set(&mut extensions.name, until_nul(&name).to_vec()).map_err(refuse)?;
                }
                b'K' => {
                    let name = self.extension(&header, offset)?;
                    set(&mut extensions.link, until_nul(&name).to_vec()).map_err(refuse)?;
                }
                b'g' => {
                    // `git archive` writes the commit here. A global name or size would change how
                    // every later entry is read, and hardly a program agrees on how.
                    self.count()?;
                    let mut global = Extensions::default();
                    global
                        .pax(&self.extension(&header, offset)?)
                        .map_err(refuse)?;
                    if !global.is_empty() {
                        return Err(refuse("a global header sets names or sizes"));
                    }
                }
                _ => {
                    self.count()?;
                    let extensions = std::mem::take(&mut extensions);
                    self.entry(&header, extensions, offset, sink)?;
                }
            }
        }
    }

    fn count(&mut self) -> Result<(), TarError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(TarError::Limit {
                what: "entries",
                limit: self.limits.entries,
            });
        }
        Ok(())
    }

    fn entry(
        &mut self,
        header: &Header,
        extensions: Extensions,
        offset: u64,
        sink: &mut dyn Sink,
    ) -> Result<(), TarError> {
        let refuse = |reason| TarError::Header { offset, reason };
        let size = match extensions.size {
            // PAX wins, and writers then leave the header's field zero. Two sizes would let two
            // readers see two archives.
            Some(size) if header.size != 0 && header.size != size => {
                return Err(refuse("the header and its PAX record state two sizes"));
            }
            Some(size) => size,
            None => header.size,
        };
        let raw = extensions.name.unwrap_or_else(|| header.name.clone());
        let link = extensions.link.unwrap_or_else(|| header.link.clone());
        let name = names::normal(&raw, self.limits.name_length)?;
        let shown = || shorten(&String::from_utf8_lossy(&raw));
        let is_directory = match header.kind {
            b'5' => true,
            // Before ustar, a `/` at the end made a directory.
            0 => raw.ends_with(b"/"),
            _ => false,
        };
        if is_directory || !matches!(header.kind, b'0' | b'7' | 0) {
            if size != 0 {
                return Err(refuse("only a file may have content"));
            }
        } else if raw.ends_with(b"/") {
            return Err(refuse("a file's name ends with `/`"));
        }
        let Some(name) = name else {
            // The root itself, as `tar -C DIR .` writes it.
            if is_directory {
                return Ok(());
            }
            return Err(TarError::Name {
                name: shown(),
                reason: "only a directory can be the root",
            });
        };
        let kind = match header.kind {
            _ if is_directory => Kind::Directory,
            b'0' | b'7' | 0 => Kind::File {
                executable: header.mode & 0o100 != 0,
            },
            b'1' | b'2' => self.link(&name, header.kind, &link)?,
            other => {
                return Err(TarError::Kind {
                    name: shown(),
                    kind: match other {
                        b'3' => "a character device",
                        b'4' => "a block device",
                        b'6' => "a FIFO",
                        b'S' => "a sparse file",
                        _ => "of an unknown type",
                    },
                });
            }
        };
        let (seen, count) = match &kind {
            Kind::File { .. } => (Seen::File, &mut self.summary.files),
            Kind::Directory => (Seen::Directory, &mut self.summary.directories),
            Kind::Symlink { .. } | Kind::HardLink { .. } => (Seen::Link, &mut self.summary.links),
        };
        *count += 1;
        self.names.insert(&name, seen)?;
        if size > self.limits.file_bytes {
            return Err(TarError::Limit {
                what: "bytes in a file",
                limit: self.limits.file_bytes,
            });
        }
        self.summary.file_bytes += size;

        let mut content = Content {
            stream: &mut self.stream,
            left: size,
        };
        let taken = sink.entry(Entry {
            path: &name,
            kind,
            size,
            content: &mut content,
        });
        let left = content.left;
        if let Some(fault) = self.stream.fault.take() {
            return Err(fault);
        }
        taken.map_err(|source| TarError::Sink {
            name: shorten(&name),
            source,
        })?;
        self.stream.skip(left)?;
        self.stream.padding(size)
    }

    fn link(&self, name: &str, kind: u8, target: &[u8]) -> Result<Kind, TarError> {
        let refuse = |reason| TarError::Link {
            name: shorten(name),
            target: shorten(&String::from_utf8_lossy(target)),
            reason,
        };
        if self.limits.links == Links::Refuse {
            return Err(refuse("links are not allowed here"));
        }
        if kind == b'2' {
            let depth = name.matches('/').count();
            if let Some(reason) = names::symlink_reason(target, depth, self.limits.name_length) {
                return Err(refuse(reason));
            }
            return Ok(Kind::Symlink {
                target: String::from_utf8_lossy(target).into_owned(),
            });
        }
        let target = names::normal(target, self.limits.name_length)
            .map_err(|_| refuse("its target is not a name in the tree"))?
            .filter(|target| self.names.get(target) == Some(Seen::File))
            .ok_or_else(|| refuse("its target is not a file that came before"))?;
        Ok(Kind::HardLink { target })
    }

    /// Reads the content of an extension header.
    fn extension(&mut self, header: &Header, offset: u64) -> Result<Vec<u8>, TarError> {
        let length = usize::try_from(header.size)
            .ok()
            .filter(|length| *length <= MAX_EXTENSION)
            .ok_or(TarError::Header {
                offset,
                reason: "its extension is longer than 1 MiB",
            })?;
        let mut content = Vec::with_capacity(length.min(64 << 10));
        Content {
            stream: &mut self.stream,
            left: header.size,
        }
        .read_to_end(&mut content)
        .map_err(TarError::Read)
        .map_err(|error| self.stream.fault.take().unwrap_or(error))?;
        self.stream.padding(header.size)?;
        Ok(content)
    }
}

/// The fields of a header block that matter.
struct Header {
    name: Vec<u8>,
    link: Vec<u8>,
    mode: u64,
    size: u64,
    kind: u8,
}

impl Header {
    fn parse(block: &[u8; BLOCK]) -> Result<Self, &'static str> {
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, byte)| {
                u64::from(if (148..156).contains(&at) {
                    b' '
                } else {
                    *byte
                })
            })
            .sum();
        if number(&block[148..156]) != Some(sum) {
            return Err("its checksum is wrong, this is not a tar archive");
        }
        let short = until_nul(&block[0..100]);
        let name = match &block[257..265] {
            b"ustar\x0000" => match until_nul(&block[345..500]) {
                b"" => short.to_vec(),
                prefix => [prefix, b"/", short].concat(),
            },
            b"ustar  \0" | b"\0\0\0\0\0\0\0\0" => short.to_vec(),
            _ => return Err("its format is unknown"),
        };
        Ok(Self {
            name,
            link: until_nul(&block[157..257]).to_vec(),
            mode: number(&block[100..108]).ok_or("its mode is not a number")?,
            size: number(&block[124..136]).ok_or("its size is not a number")?,
            kind: block[156],
        })
    }
}

/// What extension headers say about the entry after them.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.name.is_none() && self.link.is_none() && self.size.is_none()
    }

    /// Takes in PAX records (POSIX.1-2017, pax § Extended Header).
    fn pax(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        while !records.is_empty() {
            let (key, value, rest) = pax_record(records).ok_or("its PAX records are malformed")?;
            match key {
                b"path" => set(&mut self.name, value.to_vec())?,
                b"linkpath" => set(&mut self.link, value.to_vec())?,
                b"size" => {
                    let size = std::str::from_utf8(value)
                        .ok()
                        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                        .and_then(|text| text.parse().ok())
                        .ok_or("its PAX size is not a number")?;
                    set(&mut self.size, size)?;
                }
                b"hdrcharset" if value != b"ISO-IR 10646 2000 UTF-8" => {
                    return Err("its names are not UTF-8");
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err("it describes a sparse file");
                }
                _ => {}
            }
            records = rest;
        }
        Ok(())
    }
}

fn pax_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = records.iter().take(8).position(|byte| *byte == b' ')?;
    let digits = std::str::from_utf8(&records[..blank]).ok()?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let length: usize = digits.parse().ok()?;
    let record = records.get(blank + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &records[length..]))
}

/// Sets what may be set once.
fn set<T>(slot: &mut Option<T>, value: T) -> Result<(), &'static str> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err("two extensions state the same thing"),
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0);
    &field[..end.unwrap_or(field.len())]
}

/// A number field: octal digits between blanks, ended by blank or NUL; or GNU's base 256.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    if first == 0x80 {
        let (high, low) = rest.split_at(rest.len().saturating_sub(8));
        if high.iter().any(|byte| *byte != 0) {
            return None;
        }
        return Some(
            low.iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        );
    }
    let text = field.trim_ascii_start();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' '));
    let (digits, after) = text.split_at(end.unwrap_or(text.len()));
    if !after.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// The uncompressed archive with the position in it.
struct Stream<R: Read> {
    source: Decompressed<R>,
    offset: u64,
    /// What really went wrong while a sink was reading.
    fault: Option<TarError>,
}

impl<R: Read> Stream<R> {
    /// Reads some bytes; 0 at the end.
    fn some(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        loop {
            match self.source.read(buffer) {
                Ok(count) => {
                    self.offset += count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error.downcast::<TarError>().unwrap_or_else(TarError::Read));
                }
            }
        }
    }

    fn exact(&mut self, mut buffer: &mut [u8]) -> Result<(), TarError> {
        while !buffer.is_empty() {
            match self.some(buffer)? {
                0 => return Err(TarError::Truncated(self.offset)),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    fn skip(&mut self, mut left: u64) -> Result<(), TarError> {
        let mut buffer = [0; 8 * BLOCK];
        while left > 0 {
            let length = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            self.exact(&mut buffer[..length])?;
            left -= length as u64;
        }
        Ok(())
    }

    /// Skips what fills the last block of a content. Writers may leave anything there.
    fn padding(&mut self, size: u64) -> Result<(), TarError> {
        self.skip((BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64)
    }

    fn only_zeros(&mut self) -> Result<(), TarError> {
        let mut buffer = [0; 8 * BLOCK];
        loop {
            match self.some(&mut buffer)? {
                0 => return Ok(()),
                count if buffer[..count].iter().any(|byte| *byte != 0) => {
                    return Err(TarError::Trailing);
                }
                _ => {}
            }
        }
    }
}

/// The content of one entry.
struct Content<'a, R: Read> {
    stream: &'a mut Stream<R>,
    left: u64,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if length == 0 {
            return Ok(0);
        }
        let fault = match self.stream.some(&mut buffer[..length]) {
            Ok(0) => TarError::Truncated(self.stream.offset),
            Ok(count) => {
                self.left -= count as u64;
                return Ok(count);
            }
            Err(fault) => fault,
        };
        let error = io::Error::new(io::ErrorKind::InvalidData, fault.to_string());
        self.stream.fault = Some(fault);
        Err(error)
    }
}

const MAX_EXTENSION: usize = 1 << 20;
