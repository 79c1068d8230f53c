//! Tar archives as layers hold them: a writer whose output depends on its input alone, and a reader
//! that believes nothing.
//!
//! [`Writer`] makes one byte sequence for one set of files: names in bytewise order, no times, no
//! owners, two modes ([image-spec § Layer](https://github.com/opencontainers/image-spec/blob/main/layer.md)).
//! The archive is plain, because a compressor's output changes with its version.
//!
//! [`read`] walks an archive in one pass and hands each entry to a [`Sink`]. Everything in it that
//! two programs could understand in two ways is refused: names that leave the tree, names that occur
//! twice, links (unless allowed), devices, sparse files, contradictory sizes, and anything but zeros
//! after the end. [`check`] does the same walk without a sink, so a caller validates a whole archive
//! before it writes the first byte.
//!
//! Nothing here touches a file system. A backslash is an ordinary character in a name: archives are
//! extracted on hosts where it separates nothing.

use std::io;

mod decompress;
mod names;
mod reader;
mod writer;

pub use decompress::{Compression, Decompressed, decompress};
pub use reader::{Entry, Kind, Sink, Summary, check, read};
pub use writer::Writer;

/// How much an archive may ask for. What goes beyond is refused before it is handed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes of the whole uncompressed archive, headers and padding included.
    pub total_bytes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes of one name, directories included.
    pub name_length: usize,
    /// How many times larger than its compressed form the archive may be, counted after the first
    /// 16 MiB, so that small archives of zeros pass.
    pub ratio: u64,
    /// What happens to links.
    pub links: Links,
}

impl Default for Limits {
    /// For releases and other configuration: 100 000 entries, 4 GiB in all, 1 GiB a file, names of
    /// 1024 bytes, 200 times, no links.
    fn default() -> Self {
        Self {
            entries: 100_000,
            total_bytes: 4 << 30,
            file_bytes: 1 << 30,
            name_length: 1024,
            ratio: 200,
            links: Links::Refuse,
        }
    }
}

/// What the reader does with symbolic and hard links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// Every link is refused.
    Refuse,
    /// A link is passed on when it cannot lead out of the tree, whatever other links the archive
    /// holds: a symbolic link is relative, has `..` only in front and not more of them than
    /// directories above it; a hard link names a file that came before. No entry lies below a link.
    InsideTree,
}

/// Why an archive was refused or could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The compressed form is broken.
    #[error("the archive's compression is damaged")]
    Corrupt(#[source] io::Error),
    /// The same name twice, or a name that is a file and a directory.
    #[error("`{name}` occurs twice in the archive ({reason})")]
    Duplicate {
        /// The name.
        name: String,
        /// As what it occurs.
        reason: &'static str,
    },
    /// A header that is not one, or that can be read in two ways.
    #[error("the archive's header at byte {offset} is refused: {reason}")]
    Header {
        /// Where the header stands in the uncompressed archive.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A device, a FIFO, a sparse file or something unknown.
    #[error("`{name}` is {kind}, an archive may hold files and directories")]
    Kind {
        /// The name.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// More than a limit allows.
    #[error("the archive exceeds the limit of {limit} {what}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A link that is not allowed.
    #[error("`{name}` is a link to `{target}`: {reason}")]
    Link {
        /// The name.
        name: String,
        /// Where it leads.
        target: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A name that leaves the tree or that cannot be a file's.
    #[error("the name `{name}` is refused: {reason}")]
    Name {
        /// The name, shortened.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Entries were not appended in bytewise order.
    #[error("`{name}` was appended after `{previous}`, names must ascend bytewise")]
    Order {
        /// The name.
        name: String,
        /// The name before it.
        previous: String,
    },
    /// The source of the archive failed; the archive itself may be whole.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// The sink failed.
    #[error("cannot take `{name}` out of the archive")]
    Sink {
        /// The entry.
        name: String,
        /// What the sink said.
        #[source]
        source: io::Error,
    },
    /// A file had another length than announced.
    #[error("`{name}` does not have the {expected} bytes that were announced")]
    Size {
        /// The name.
        name: String,
        /// The announced length.
        expected: u64,
    },
    /// Something other than zeros after the end.
    #[error("the archive has other bytes than zeros after its end")]
    Trailing,
    /// The archive ends in the middle.
    #[error("the archive is cut off after {0} bytes")]
    Truncated(u64),
    /// The archive could not be written.
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
}

impl TarError {
    /// Tells whether the archive itself is at fault, so that reading it again cannot help. Otherwise
    /// it was the source or the sink.
    pub fn is_refusal(&self) -> bool {
        !matches!(
            self,
            Self::Read(_) | Self::Sink { .. } | Self::Write(_) | Self::Size { .. }
        )
    }
}

/// The unit of the format.
const BLOCK: usize = 512;

#[cfg(test)]
mod tests;
