//! Compression told by the first bytes, not by a media type.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use super::{Limits, TarError};

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, RFC 1952, one or more members.
    Gzip,
    /// Zstandard, RFC 8878, one or more frames.
    Zstd,
}

/// Looks at the first bytes of `reader` and gives the uncompressed stream.
///
/// The stream ends with an error that holds a [`TarError`] when it grows beyond `limits.total_bytes`
/// or `limits.ratio`, when the compression is damaged, and when `reader` fails.
///
/// # Errors
/// When the first bytes cannot be read.
pub fn decompress<R: Read>(mut reader: R, limits: &Limits) -> Result<Decompressed<R>, TarError> {
    let mut magic = Vec::with_capacity(4);
    Read::by_ref(&mut reader)
        .take(4)
        .read_to_end(&mut magic)
        .map_err(TarError::Read)?;
    let compression = match magic.as_slice() {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
        _ => Compression::None,
    };
    let source = BufReader::with_capacity(
        BUFFER,
        Counted {
            reader: Cursor::new(magic).chain(reader),
            bytes: 0,
            failed: false,
        },
    );
    let decoder = match compression {
        Compression::None => Decoder::Plain(source),
        Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(source))),
        Compression::Zstd => Decoder::Zstd(Box::new(
            zstd::Decoder::with_buffer(source).map_err(TarError::Corrupt)?,
        )),
    };
    Ok(Decompressed {
        decoder,
        compression,
        bytes: 0,
        total_bytes: limits.total_bytes,
        ratio: limits.ratio,
    })
}

/// An uncompressed stream that knows its limits. See [`decompress`].
pub struct Decompressed<R: Read> {
    decoder: Decoder<R>,
    compression: Compression,
    bytes: u64,
    total_bytes: u64,
    ratio: u64,
}

impl<R: Read> Decompressed<R> {
    /// How the stream was compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    fn source(&self) -> &Counted<Chain<Cursor<Vec<u8>>, R>> {
        match &self.decoder {
            Decoder::Plain(source) => source.get_ref(),
            Decoder::Gzip(decoder) => decoder.get_ref().get_ref(),
            Decoder::Zstd(decoder) => decoder.get_ref().get_ref(),
        }
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.decoder {
            Decoder::Plain(source) => source.read(buffer),
            Decoder::Gzip(decoder) => decoder.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
        };
        let count = read.map_err(|error| {
            if error.kind() == io::ErrorKind::Interrupted {
                error
            } else if self.source().failed {
                io::Error::other(TarError::Read(error))
            } else {
                io::Error::other(TarError::Corrupt(error))
            }
        })?;
        self.bytes += count as u64;
        if self.bytes > self.total_bytes {
            return Err(io::Error::other(TarError::Limit {
                what: "bytes in all",
                limit: self.total_bytes,
            }));
        }
        let allowed = self.source().bytes.saturating_mul(self.ratio);
        if self.compression != Compression::None && self.bytes > RATIO_FREE && self.bytes > allowed
        {
            return Err(io::Error::other(TarError::Limit {
                what: "times its compressed size",
                limit: self.ratio,
            }));
        }
        Ok(count)
    }
}

enum Decoder<R: Read> {
    Plain(Source<R>),
    Gzip(Box<MultiGzDecoder<Source<R>>>),
    Zstd(Box<zstd::Decoder<'static, Source<R>>>),
}

type Source<R> = BufReader<Counted<Chain<Cursor<Vec<u8>>, R>>>;

/// Counts what is read and remembers a failure, which decoders may hand on in another form.
struct Counted<R> {
    reader: R,
    bytes: u64,
    failed: bool,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.reader.read(buffer) {
            Ok(count) => {
                self.bytes += count as u64;
                Ok(count)
            }
            Err(error) => {
                self.failed |= error.kind() != io::ErrorKind::Interrupted;
                Err(error)
            }
        }
    }
}

const BUFFER: usize = 64 << 10;
const RATIO_FREE: u64 = 16 << 20;
