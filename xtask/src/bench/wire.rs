//! The load generators' HTTP/1.1: one connection, and as little work per byte as the kernel allows.
//!
//! The generator shares the machine with what it measures. So a body that is pulled is dropped in the
//! kernel (`MSG_TRUNC`), and one that is pushed goes out by `sendfile` from memory ([`super::content`]).

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

use rustix::net::RecvFlags;

/// How long a read or write may stand still.
const TIMEOUT: Duration = Duration::from_mins(2);
/// The longest head.
const HEAD: usize = 64 * 1024;
/// One read of a body.
const PIECE: usize = 256 * 1024;

/// The address of a server: `http://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base(String);

impl Base {
    /// Reads a URL without a path.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        let authority = url
            .strip_prefix("http://")
            .ok_or_else(|| format!("`{url}` does not begin with `http://`"))?;
        let authority = authority.trim_end_matches('/');
        let port = authority.rsplit_once(':').map(|(_, port)| port);
        if authority.contains('/') || port.is_none_or(|port| port.parse::<u16>().is_err()) {
            return Err(format!("`{url}` is not `http://HOST:PORT`"));
        }
        Ok(Self(authority.to_owned()))
    }

    /// `HOST:PORT`.
    pub(crate) fn authority(&self) -> &str {
        &self.0
    }
}

/// What the generators read of an answer's head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) length: Option<u64>,
    pub(crate) chunked: bool,
    pub(crate) location: Option<String>,
}

/// One connection.
pub(crate) struct Wire {
    stream: TcpStream,
    authority: String,
    buffer: Vec<u8>,
    /// What of the buffer was received and not yet used.
    filled: Range<usize>,
}

impl Wire {
    /// Connects.
    pub(crate) fn open(base: &Base) -> io::Result<Self> {
        Self::of(TcpStream::connect(base.authority())?, base.authority())
    }

    /// Takes a connection that exists, of either side.
    pub(crate) fn of(stream: TcpStream, authority: &str) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream,
            authority: authority.to_owned(),
            buffer: vec![0; PIECE],
            filled: 0..0,
        })
    }

    /// The connection itself, for bodies that go out by other ways.
    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The bytes of a request's head, to be sent many times.
    pub(crate) fn request_head(
        &self,
        method: &str,
        target: &str,
        headers: &str,
        length: Option<u64>,
    ) -> Vec<u8> {
        let length = length.map_or_else(String::new, |n| format!("Content-Length: {n}\r\n"));
        let host = &self.authority;
        format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n{headers}{length}\r\n").into_bytes()
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a request with a small body in one piece, and reads the whole answer.
    pub(crate) fn call(
        &mut self,
        method: &str,
        target: &str,
        headers: &str,
        body: &[u8],
    ) -> io::Result<(Head, Vec<u8>)> {
        let length = matches!(method, "POST" | "PUT" | "PATCH").then_some(body.len() as u64);
        let mut bytes = self.request_head(method, target, headers, length);
        bytes.extend_from_slice(body);
        self.send(&bytes)?;
        self.answer(method)
    }

    /// Reads an answer with a small body.
    pub(crate) fn answer(&mut self, method: &str) -> io::Result<(Head, Vec<u8>)> {
        let head = self.head()?;
        let mut body = Vec::new();
        if method != "HEAD" && head.status != 204 {
            if head.chunked {
                while let Some(length) = self.chunk()? {
                    self.take(length, |piece| body.extend_from_slice(piece))?;
                    self.line()?;
                }
            } else {
                let length = head.length.ok_or_else(|| invalid("no length"))?;
                self.take(length, |piece| body.extend_from_slice(piece))?;
            }
        }
        Ok((head, body))
    }

    /// Reads the head of an answer; answers in between (1xx) are skipped.
    pub(crate) fn head(&mut self) -> io::Result<Head> {
        loop {
            let bytes = self.head_bytes()?;
            let head = parse_answer(&self.buffer[bytes])?;
            if head.status >= 200 {
                return Ok(head);
            }
        }
    }

    /// Reads the head of a request: its first line and the length of its body; `None` at the end.
    pub(crate) fn request(&mut self) -> io::Result<Option<(String, u64)>> {
        if self.filled.is_empty() && self.fill()? == 0 {
            return Ok(None);
        }
        let bytes = self.head_bytes()?;
        let text = std::str::from_utf8(&self.buffer[bytes]).map_err(|_| invalid("not text"))?;
        let (line, fields) = text.split_once("\r\n").unwrap_or((text, ""));
        let mut length = 0;
        for (name, value) in fields.lines().filter_map(|line| line.split_once(':')) {
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().map_err(|_| invalid("not a length"))?;
            }
        }
        Ok(Some((line.to_owned(), length)))
    }

    /// Reads the size line of a chunk; `None` after the last.
    pub(crate) fn chunk(&mut self) -> io::Result<Option<u64>> {
        let line = self.line()?;
        let digits = line.split(';').next().unwrap_or("").trim();
        let size = u64::from_str_radix(digits, 16).map_err(|_| invalid("not a chunk size"))?;
        if size > 0 {
            return Ok(Some(size));
        }
        while !self.line()?.is_empty() {}
        Ok(None)
    }

    /// Reads one line, without its end.
    pub(crate) fn line(&mut self) -> io::Result<String> {
        let mut seen = 0;
        loop {
            let bytes = &self.buffer[self.filled.clone()];
            if let Some(at) = bytes[seen..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&bytes[..seen + at]);
                let line = line.trim_end_matches('\r').to_owned();
                self.filled.start += seen + at + 1;
                return Ok(line);
            }
            seen = bytes.len();
            if seen > HEAD {
                return Err(invalid("the line is too long"));
            }
            self.more()?;
        }
    }

    /// Reads exactly `length` bytes and hands them out piece by piece.
    pub(crate) fn take(&mut self, length: u64, mut piece: impl FnMut(&[u8])) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            if self.filled.is_empty() {
                self.more()?;
            }
            let count = self.held(left);
            let start = self.filled.start;
            piece(&self.buffer[start..start + count]);
            self.filled.start += count;
            left -= count as u64;
        }
        Ok(())
    }

    /// Receives exactly `length` bytes and lets the kernel drop them without a copy.
    pub(crate) fn discard(&mut self, length: u64) -> io::Result<()> {
        let held = self.held(length);
        self.filled.start += held;
        let mut left = length - held as u64;
        while left > 0 {
            let most = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            let buffer = &mut self.buffer[..most];
            let (_, count) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.stream, &mut *buffer, RecvFlags::TRUNC)
            })?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= count as u64;
        }
        Ok(())
    }

    /// How many of `wanted` bytes are in the buffer.
    fn held(&self, wanted: u64) -> usize {
        usize::try_from(wanted).map_or(self.filled.len(), |n| n.min(self.filled.len()))
    }

    /// Receives until a whole head is there, and gives back where it is, without the empty line.
    fn head_bytes(&mut self) -> io::Result<Range<usize>> {
        loop {
            let bytes = &self.buffer[self.filled.clone()];
            if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = self.filled.start..self.filled.start + at;
                self.filled.start = head.end + 4;
                return Ok(head);
            }
            if bytes.len() > HEAD {
                return Err(invalid("the head is too long"));
            }
            self.more()?;
        }
    }

    fn more(&mut self) -> io::Result<()> {
        match self.fill()? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Receives once, behind what is there; 0 is the end.
    fn fill(&mut self) -> io::Result<usize> {
        if self.filled.is_empty() {
            self.filled = 0..0;
        } else if self.filled.end == self.buffer.len() {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        // A machine that was halted for a moment interrupts what waits with a time limit.
        let count = loop {
            match self.stream.read(&mut self.buffer[self.filled.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.filled.end += count;
        Ok(count)
    }
}

fn parse_answer(bytes: &[u8]) -> io::Result<Head> {
    let text = std::str::from_utf8(bytes).map_err(|_| invalid("not text"))?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 "))
        .and_then(|rest| rest.get(..3))
        .and_then(|code| code.parse().ok())
        .ok_or_else(|| invalid("not a status line"))?;
    let mut head = Head {
        status,
        ..Head::default()
    };
    for line in lines {
        let (name, value) = line
            .split_once(':')
            .ok_or_else(|| invalid("not a header field"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            head.length = Some(value.parse().map_err(|_| invalid("not a length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.chunked = value.eq_ignore_ascii_case("chunked");
        } else if name.eq_ignore_ascii_case("location") {
            head.location = Some(value.to_owned());
        }
    }
    Ok(head)
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let base = Base::parse("http://127.0.0.1:5000/").unwrap();
        assert_eq!(base.authority(), "127.0.0.1:5000");
        for wrong in [
            "https://a:1",
            "a:1",
            "http://a",
            "http://a:b",
            "http://a:1/v2",
        ] {
            assert!(Base::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn heads() {
        let head = parse_answer(b"HTTP/1.1 202 Accepted\r\nLocation: /a?b=c\r\ncontent-length: 0")
            .unwrap();
        assert_eq!(
            head,
            Head {
                status: 202,
                length: Some(0),
                chunked: false,
                location: Some("/a?b=c".to_owned())
            }
        );
        for wrong in [
            &b"HTTP/1.0 200 OK"[..],
            b"HTTP/1.1 2",
            b"HTTP/1.1 200 OK\r\nx",
            b"HTTP/1.1 200 OK\r\nContent-Length: x",
            b"\xff",
        ] {
            assert!(parse_answer(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn bodies_end_where_the_next_answer_begins() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let long = vec![b'x'; 3 * PIECE + 7];
        let sent = long.clone();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for _ in 0..2 {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", sent.len());
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(&sent).unwrap();
            }
            let chunked = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x\r\nd\r\n0\r\n\r\n";
            stream.write_all(chunked.as_bytes()).unwrap();
        });
        let mut wire = Wire::open(&Base(address.to_string())).unwrap();
        let head = wire.head().unwrap();
        assert_eq!(head.length, Some(long.len() as u64));
        wire.discard(long.len() as u64).unwrap();
        let (_, body) = wire.answer("GET").unwrap();
        assert_eq!(body, long);
        assert_eq!(wire.answer("GET").unwrap().1, b"abcd");
        server.join().unwrap();
        assert_eq!(
            wire.head().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
