//! The reproducible writer.

use std::io::{self, Read, Write};

use super::{BLOCK, TarError, names};
use crate::digest::shorten;

/// Writes one byte sequence for one set of files.
///
/// Headers are ustar; a name that does not fit one gets a PAX record with nothing in it but the name.
/// Time, owner and group are zero, modes are 0755 for directories and executables and 0644 else.
///
/// Names are compared as they stand in [`Writer::file`] and [`Writer::directory`], without a `/` at
/// the end. A directory need not be appended for its files to be there.
#[derive(Debug)]
#[must_use = "an archive without `finish` has no end"]
pub struct Writer<W> {
    output: W,
    previous: String,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(output: W) -> Self {
        Self {
            output,
            previous: String::new(),
        }
    }

    /// Appends a file whose content is exactly `size` bytes.
    ///
    /// # Errors
    /// [`TarError::Order`] when the name does not come after the one before, [`TarError::Name`] when
    /// it cannot be a name in a tree, [`TarError::Size`] when `content` is shorter or longer,
    /// [`TarError::Read`] and [`TarError::Write`].
    pub fn file(
        &mut self,
        name: &str,
        executable: bool,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<(), TarError> {
        self.accept(name)?;
        self.header(name, b'0', if executable { 0o755 } else { 0o644 }, size)?;
        let mut left = size;
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = match content.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TarError::Read(error)),
            };
            if count as u64 > left || (count == 0 && left > 0) {
                return Err(TarError::Size {
                    name: shorten(name),
                    expected: size,
                });
            }
            if count == 0 {
                break;
            }
            left -= count as u64;
            self.write(&buffer[..count])?;
        }
        self.pad(size)
    }

    /// Appends a directory.
    ///
    /// # Errors
    /// As [`Writer::file`].
    pub fn directory(&mut self, name: &str) -> Result<(), TarError> {
        self.accept(name)?;
        self.header(&format!("{name}/"), b'5', 0o755, 0)
    }

    /// Ends the archive with two zero blocks, flushes and gives the output back.
    ///
    /// # Errors
    /// [`TarError::Write`].
    pub fn finish(mut self) -> Result<W, TarError> {
        self.write(&[0; 2 * BLOCK])?;
        self.output.flush().map_err(TarError::Write)?;
        Ok(self.output)
    }

    fn accept(&mut self, name: &str) -> Result<(), TarError> {
        let normal = names::normal(name.as_bytes(), MAX_NAME)?;
        if normal.as_deref() != Some(name) {
            return Err(TarError::Name {
                name: shorten(name),
                reason: "it is not in its normal form",
            });
        }
        // A valid name is not empty, so the first one always ascends.
        if name <= self.previous.as_str() {
            return Err(TarError::Order {
                name: shorten(name),
                previous: shorten(&self.previous),
            });
        }
        name.clone_into(&mut self.previous);
        Ok(())
    }

    fn header(&mut self, name: &str, kind: u8, mode: u32, size: u64) -> Result<(), TarError> {
        let mut records = Vec::new();
        let (prefix, suffix) = split(name).unwrap_or_else(|| {
            records.extend(record("path", name));
            // What a reader without PAX sees; it only has to be stable.
            let end = name.floor_char_boundary(NAME);
            ("", &name[..end])
        });
        let mut shown = size;
        if size > MAX_OCTAL_SIZE {
            records.extend(record("size", &size.to_string()));
            shown = 0;
        }
        if !records.is_empty() {
            let length = records.len() as u64;
            self.write(&block("", "././@PaxHeader", b'x', 0o644, length))?;
            self.write(&records)?;
            self.pad(length)?;
        }
        self.write(&block(prefix, suffix, kind, mode, shown))
    }

    fn pad(&mut self, size: u64) -> Result<(), TarError> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or_default();
        if over > 0 {
            self.write(&[0; BLOCK][over..])?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        self.output.write_all(bytes).map_err(TarError::Write)
    }
}

/// Cuts a name into ustar's prefix and name, at the first `/` where both fit.
fn split(name: &str) -> Option<(&str, &str)> {
    if name.len() <= NAME {
        return Some(("", name));
    }
    name.match_indices('/')
        .map(|(at, _)| (&name[..at], &name[at + 1..]))
        .find(|(prefix, rest)| prefix.len() <= PREFIX && rest.len() <= NAME && !rest.is_empty())
}

/// A PAX record: its own length in decimal, a blank, `key=value`, a newline.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    loop {
        let whole = rest + length.to_string().len();
        if whole == length {
            return format!("{length} {key}={value}\n").into_bytes();
        }
        length = whole;
    }
}

fn block(prefix: &str, name: &str, kind: u8, mode: u32, size: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"00000000000");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    put(329, b"0000000");
    put(337, b"0000000");
    put(345, prefix.as_bytes());
    let sum: u32 = block.iter().copied().map(u32::from).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

const BUFFER: usize = 64 << 10;
/// Longer than any path that Linux takes.
const MAX_NAME: usize = 4096;
/// The largest size that eleven octal digits hold: 8 GiB less one byte.
const MAX_OCTAL_SIZE: u64 = 0o777_7777_7777;
const NAME: usize = 100;
const PREFIX: usize = 155;
