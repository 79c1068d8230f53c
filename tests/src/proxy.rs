//! A small HTTP/1.1 proxy between a client and a server, which counts, holds, and lies.
//!
//! Each request goes to the server on a connection of its own, and both connections end with the answer; so a rule sees every
//! request, and an answer that never ends (an event stream) is passed on as it comes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// One request that came through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// Bytes of the answer's body so far.
    pub body: u64,
}

/// What happens to a request.
#[derive(Clone, Debug)]
enum Rule {
    /// It waits until [`Proxy::release`].
    Hold(String),
    /// It is answered with these bytes, as a success.
    Replace(String, Vec<u8>),
}

#[derive(Debug, Default)]
struct Shared {
    seen: Vec<Seen>,
    rules: Vec<Rule>,
    held: usize,
    closed: bool,
}

/// A proxy that runs until it is dropped.
#[derive(Clone, Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Proxy {
    /// Starts a proxy before `upstream` (`127.0.0.1:PORT`).
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let proxy = Self {
            address: listener.local_addr().expect("a listener has an address"),
            shared: Arc::default(),
        };
        let (accepting, upstream) = (proxy.clone(), upstream.to_owned());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.lock().closed {
                    return;
                }
                let (proxy, upstream) = (accepting.clone(), upstream.clone());
                // A connection that broke is its client's business.
                thread::spawn(move || drop(proxy.serve(&stream, &upstream)));
            }
        });
        proxy
    }

    /// Its address as it stands in a reference.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.lock().seen.clone()
    }

    /// Waits until `done` says so of the requests so far.
    ///
    /// # Panics
    /// When it does not within a minute.
    pub fn wait(&self, what: &str, mut done: impl FnMut(&[Seen]) -> bool) {
        let (_, changed) = &*self.shared;
        let (shared, late) = changed
            .wait_timeout_while(self.lock(), crate::agent::PATIENCE, |shared| {
                !done(&shared.seen)
            })
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!late.timed_out(), "no {what}: {:#?}", shared.seen);
    }

    /// From now on, requests whose method, blank and path contain `part` wait.
    pub fn hold(&self, part: &str) {
        self.lock().rules.push(Rule::Hold(part.to_owned()));
    }

    /// Waits until a request is being held.
    ///
    /// # Panics
    /// When none is within a minute.
    pub fn wait_held(&self) {
        let (_, changed) = &*self.shared;
        let (shared, late) = changed
            .wait_timeout_while(self.lock(), crate::agent::PATIENCE, |shared| {
                shared.held == 0
            })
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!late.timed_out(), "nothing is held: {:#?}", shared.seen);
    }

    /// From now on, requests whose method, blank and path contain `part` are answered with `bytes`.
    pub fn replace(&self, part: &str, bytes: impl Into<Vec<u8>>) {
        self.lock()
            .rules
            .push(Rule::Replace(part.to_owned(), bytes.into()));
    }

    /// Forgets all rules; what was held goes on.
    pub fn release(&self) {
        self.lock().rules.clear();
        self.shared.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, client: &TcpStream, upstream: &str) -> std::io::Result<()> {
        let mut reader = BufReader::new(client);
        let mut head = String::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let lower = line.to_ascii_lowercase();
            if line == "\r\n" {
                break;
            }
            if !lower.starts_with("connection:") {
                head.push_str(&line);
            }
        }
        let length: u64 = head
            .lines()
            .find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse().ok())?
            })
            .unwrap_or(0);
        let mut words = head.split_whitespace();
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().to_owned();
        let (index, rule) = self.note(&method, &path);
        let mut client_out = client;
        if let Some(bytes) = rule {
            self.count(index, bytes.len() as u64);
            write!(
                client_out,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nContent-Type: application/octet-stream\r\nConnection: close\r\n\r\n",
                bytes.len()
            )?;
            if method != "HEAD" {
                client_out.write_all(&bytes)?;
            }
            return client.shutdown(Shutdown::Write);
        }
        let server = TcpStream::connect(upstream)?;
        let mut server_out = &server;
        server_out.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())?;
        std::io::copy(&mut reader.by_ref().take(length), &mut server_out)?;
        // A client that hangs up on an endless answer ends it at the server as well.
        let (gone, watched) = (server.try_clone()?, client.try_clone()?);
        thread::spawn(move || {
            let mut byte = [0];
            let _ = (&watched).read(&mut byte);
            let _ = gone.shutdown(Shutdown::Both);
        });
        let mut answer = BufReader::new(&server);
        loop {
            let mut line = Vec::new();
            if answer.read_until(b'\n', &mut line)? == 0 {
                return client.shutdown(Shutdown::Both);
            }
            client_out.write_all(&line)?;
            if line == b"\r\n" {
                break;
            }
        }
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let got = answer.read(&mut buffer)?;
            if got == 0 {
                return client.shutdown(Shutdown::Both);
            }
            self.count(index, got as u64);
            client_out.write_all(&buffer[..got])?;
        }
    }

    /// Writes a request down, waits while it is to be held, and tells what it is to be answered with.
    fn note(&self, method: &str, path: &str) -> (usize, Option<Vec<u8>>) {
        let line = format!("{method} {path}");
        let (_, changed) = &*self.shared;
        let mut shared = self.lock();
        shared.seen.push(Seen {
            method: method.to_owned(),
            path: path.to_owned(),
            body: 0,
        });
        let index = shared.seen.len() - 1;
        changed.notify_all();
        let mut held = false;
        loop {
            let waits = !shared.closed
                && shared
                    .rules
                    .iter()
                    .any(|rule| matches!(rule, Rule::Hold(part) if line.contains(part.as_str())));
            if waits && !held {
                held = true;
                shared.held += 1;
                changed.notify_all();
            }
            if !waits {
                break;
            }
            shared = changed.wait(shared).unwrap_or_else(PoisonError::into_inner);
        }
        if held {
            shared.held -= 1;
        }
        let replaced = shared.rules.iter().find_map(|rule| match rule {
            Rule::Replace(part, bytes) if line.contains(part.as_str()) => Some(bytes.clone()),
            _ => None,
        });
        (index, replaced)
    }

    fn count(&self, index: usize, bytes: u64) {
        let mut shared = self.lock();
        shared.seen[index].body += bytes;
        self.shared.1.notify_all();
    }
}
