//! A small blocking HTTP/1.1 client on one connection.
//!
//! It sends what it is told, byte for byte, and counts what comes back; it follows nothing, retries
//! nothing and knows no TLS. The load generators of `xtask` run on it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long a read or write may stand still.
const TIMEOUT: Duration = Duration::from_mins(2);

/// The head of an answer.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// The header fields in their order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Whether the request was a HEAD, which has no body whatever its length says.
    bodiless: bool,
}

impl Head {
    /// The first field called `name`, which is given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The length of the body, when the head tells it.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")
            .and_then(|value| value.parse().ok())
    }
}

/// An answer with its whole body.
#[derive(Clone, Debug)]
pub struct Response {
    /// The head.
    pub head: Head,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The status code.
    pub fn status(&self) -> u16 {
        self.head.status
    }

    /// The first field called `name`, which is given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON: {error}\n{}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One connection to one server.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    authority: String,
}

impl Connection {
    /// Connects to `base`, such as `http://127.0.0.1:5050`; a path after it is ignored.
    ///
    /// # Errors
    /// When nothing listens there or `base` is not plain HTTP.
    pub fn open(base: &str) -> io::Result<Self> {
        let rest = base.strip_prefix("http://").ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("`{base}` is not http://"),
            )
        })?;
        let authority = rest.split('/').next().unwrap_or(rest).to_owned();
        let stream = TcpStream::connect(&authority)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream: BufReader::with_capacity(64 * 1024, stream),
            authority,
        })
    }

    /// Writes a request's head. `length` is the body's, when there is to be one.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn send_head(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        length: Option<u64>,
    ) -> io::Result<()> {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n", self.authority);
        for (name, value) in headers {
            head.push_str(name);
            head.push_str(": ");
            head.push_str(value);
            head.push_str("\r\n");
        }
        if let Some(length) = length {
            use std::fmt::Write as _;
            // Writing to a string does not fail.
            let _ = write!(head, "Content-Length: {length}\r\n");
        }
        head.push_str("\r\n");
        self.stream.get_mut().write_all(head.as_bytes())
    }

    /// Writes a part of a request's body.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn send_body(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Reads an answer's head; answers in between (1xx) are skipped.
    ///
    /// # Errors
    /// When the connection breaks or what comes is not HTTP/1.1.
    pub fn receive_head(&mut self, method: &str) -> io::Result<Head> {
        loop {
            let line = self.line()?;
            let status = line
                .strip_prefix("HTTP/1.1 ")
                .and_then(|rest| rest.get(..3))
                .and_then(|code| code.parse().ok())
                .ok_or_else(|| invalid(format!("not a status line: `{line}`")))?;
            let mut headers = Vec::new();
            loop {
                let line = self.line()?;
                if line.is_empty() {
                    break;
                }
                let (name, value) = line
                    .split_once(':')
                    .ok_or_else(|| invalid(format!("not a header field: `{line}`")))?;
                headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
            if status >= 200 {
                return Ok(Head {
                    status,
                    headers,
                    bodiless: method == "HEAD",
                });
            }
        }
    }

    /// Reads an answer's body and hands it out piece by piece; gives back its length.
    ///
    /// # Errors
    /// When the connection breaks before the body's end.
    pub fn receive_body(&mut self, head: &Head, mut piece: impl FnMut(&[u8])) -> io::Result<u64> {
        if head.bodiless || head.status == 204 || head.status == 304 {
            return Ok(0);
        }
        if head.header("transfer-encoding") == Some("chunked") {
            let mut total = 0;
            loop {
                let line = self.line()?;
                let digits = line.split(';').next().unwrap_or("").trim();
                let size = u64::from_str_radix(digits, 16)
                    .map_err(|_| invalid(format!("not a chunk size: `{line}`")))?;
                if size == 0 {
                    while !self.line()?.is_empty() {}
                    return Ok(total);
                }
                total += self.exactly(size, &mut piece)?;
                self.line()?;
            }
        }
        let length = head
            .length()
            .ok_or_else(|| invalid("the answer tells no length".to_owned()))?;
        self.exactly(length, &mut piece)
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn request(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        let length = matches!(method, "POST" | "PUT" | "PATCH").then_some(body.len() as u64);
        self.send_head(method, target, headers, length)?;
        self.send_body(body)?;
        let head = self.receive_head(method)?;
        let mut bytes = Vec::new();
        self.receive_body(&head, |piece| bytes.extend_from_slice(piece))?;
        Ok(Response { head, body: bytes })
    }

    /// The connection itself, for a test that breaks it.
    pub fn stream(&mut self) -> &mut TcpStream {
        self.stream.get_mut()
    }

    /// Reads one line of an event stream or of a head, without its end.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection",
            ));
        }
        line.truncate(line.trim_end_matches(['\r', '\n']).len());
        Ok(line)
    }

    fn exactly(&mut self, length: u64, piece: &mut impl FnMut(&[u8])) -> io::Result<u64> {
        let mut left = length;
        let mut buffer = [0; 16 * 1024];
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let got = self.stream.read(&mut buffer[..most])?;
            if got == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("{left} bytes are missing"),
                ));
            }
            piece(&buffer[..got]);
            left -= got as u64;
        }
        Ok(length)
    }
}

/// Sends one request on a connection of its own; `url` is absolute.
///
/// # Panics
/// When the server cannot be reached or breaks off.
pub fn request(method: &str, url: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
    let path = url
        .strip_prefix("http://")
        .and_then(|rest| rest.find('/').map(|at| &rest[at..]))
        .unwrap_or("/");
    Connection::open(url)
        .and_then(|mut connection| connection.request(method, path, headers, body))
        .unwrap_or_else(|error| panic!("{method} {url}: {error}"))
}

/// Gets `url` on a connection of its own.
///
/// # Panics
/// When the server cannot be reached or breaks off.
pub fn get(url: &str) -> Response {
    request("GET", url, &[("Accept", "*/*")], &[])
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
