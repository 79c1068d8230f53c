//! Proxies that break things between a server and what it stands on.
//!
//! [`Faults`] sits before an S3 store and speaks enough HTTP/1.1 to lie about one request: refuse it, delay it, answer an
//! error, cut or change the body, or leave out what a store may ignore. [`Wire`] sits before anything and
//! only knows bytes: it can be cut and it can stand still.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::ObjectStore;
use crate::sigv4;

/// What happens to a request to an object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends without an answer, before the request reaches the store.
    Refuse,
    /// The store does it, and the connection ends without an answer.
    Lose,
    /// The store never sees it; this is answered.
    Answer(u16),
    /// 200 is answered over an error document, as S3 does where an error came after it had begun to answer. `done`:
    /// the store did it all the same, and else it never sees it.
    OkWithError {
        /// Whether the store did what was asked.
        done: bool,
    },
    /// The ETag of the answer is another.
    WrongEtag,
    /// It waits so long before it goes on.
    Delay(Duration),
    /// Nothing is ever answered, until the fault is lifted.
    Hang,
    /// The answer's body ends after so many bytes.
    Truncate(u64),
    /// One bit of the answer's body at this offset is another.
    Flip(u64),
    /// The store gets so many bytes of the request's body, then the connection ends.
    CutRequest(u64),
    /// One bit of the request's body at this offset is another; the sums that its head tells stay as they are.
    FlipRequest(u64),
    /// The conditions of the request (`If-Match`, `If-None-Match`) are taken out and it is signed anew, as
    /// by a store that does not know them.
    IgnoreConditions,
}

#[derive(Clone, Debug)]
struct Rule {
    part: String,
    fault: Fault,
    /// How many requests it is for; `None` is all.
    left: Option<u32>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    /// Requests that came, as `METHOD PATH`.
    seen: Vec<String>,
    /// How many requests met a fault.
    met: u64,
    closed: bool,
}

/// A proxy before an object store.
#[derive(Clone, Debug)]
pub struct Faults {
    address: SocketAddr,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Faults {
    /// Starts a proxy before `upstream` (`127.0.0.1:PORT`); without rules it changes nothing.
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let faults = Self {
            address: listener.local_addr().expect("a listener has an address"),
            state: Arc::default(),
        };
        let (accepting, upstream) = (faults.clone(), upstream.to_owned());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.lock().closed {
                    return;
                }
                let (faults, upstream) = (accepting.clone(), upstream.clone());
                thread::spawn(move || {
                    // A connection that broke is its client's business.
                    drop(faults.serve(&stream, &upstream));
                    drop(stream.shutdown(Shutdown::Both));
                });
            }
        });
        faults
    }

    /// Its address, as `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, requests whose method, blank and path contain `part` meet a fault.
    pub fn always(&self, part: &str, fault: Fault) {
        self.add(part, fault, None);
    }

    /// The next `count` such requests meet a fault.
    pub fn next(&self, count: u32, part: &str, fault: Fault) {
        self.add(part, fault, Some(count));
    }

    /// Lifts all faults.
    pub fn heal(&self) {
        self.lock().rules.clear();
        self.state.1.notify_all();
    }

    /// The requests so far, as `METHOD PATH`.
    pub fn seen(&self) -> Vec<String> {
        self.lock().seen.clone()
    }

    /// How many requests met a fault so far. A test that breaks nothing proves nothing.
    pub fn met(&self) -> u64 {
        self.lock().met
    }

    /// Waits until a further request meets a fault.
    ///
    /// # Panics
    /// When none does within a minute.
    pub fn wait_met(&self, before: u64) {
        let (_, changed) = &*self.state;
        let (state, late) = changed
            .wait_timeout_while(self.lock(), crate::agent::PATIENCE, |state| {
                state.met <= before
            })
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            !late.timed_out(),
            "no request met a fault: {:#?}",
            state.seen
        );
    }

    fn add(&self, part: &str, fault: Fault, left: Option<u32>) {
        self.lock().rules.push(Rule {
            part: part.to_owned(),
            fault,
            left,
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request and takes the faults that are for it.
    fn note(&self, line: &str) -> Vec<Fault> {
        let mut state = self.lock();
        state.seen.push(line.to_owned());
        let mut faults = Vec::new();
        for rule in &mut state.rules {
            if line.contains(&rule.part) && rule.left != Some(0) {
                rule.left = rule.left.map(|left| left - 1);
                faults.push(rule.fault.clone());
            }
        }
        if !faults.is_empty() {
            state.met += 1;
            self.state.1.notify_all();
        }
        faults
    }

    /// Waits until the faults of now are lifted.
    fn hang(&self) {
        let (_, changed) = &*self.state;
        drop(changed.wait_while(self.lock(), |state| {
            !state.closed && !state.rules.is_empty()
        }));
    }

    /// Serves the requests of a connection, each on a connection of its own to the store.
    fn serve(&self, client: &TcpStream, upstream: &str) -> std::io::Result<()> {
        client.set_nodelay(true)?;
        let mut reader = BufReader::new(client);
        while let Some(mut request) = Head::read(&mut reader)? {
            let faults = self.note(&request.line());
            let mut length = request.length();
            let (mut after, mut flip) = (None, None);
            for fault in faults {
                match fault {
                    Fault::Refuse => return Ok(()),
                    Fault::Hang => {
                        self.hang();
                        return Ok(());
                    }
                    Fault::Delay(time) => thread::sleep(time),
                    Fault::Answer(status) => {
                        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
                        return refuse(client, status);
                    }
                    Fault::OkWithError { done: false } => {
                        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
                        return refuse(client, 200);
                    }
                    Fault::IgnoreConditions => request.without_conditions(),
                    Fault::FlipRequest(at) => flip = Some(at),
                    Fault::CutRequest(bytes) => {
                        length = length.min(bytes);
                        after = Some(Fault::CutRequest(bytes));
                    }
                    other => after = Some(other),
                }
            }
            request.set("connection", "close");
            let server = TcpStream::connect(upstream)?;
            server.set_nodelay(true)?;
            let mut out = &server;
            out.write_all(request.text().as_bytes())?;
            if let Some(at) = flip.filter(|at| *at < length) {
                std::io::copy(&mut reader.by_ref().take(at), &mut out)?;
                let mut byte = [0];
                reader.read_exact(&mut byte)?;
                out.write_all(&[byte[0] ^ 1])?;
                length -= at + 1;
            }
            std::io::copy(&mut reader.by_ref().take(length), &mut out)?;
            if matches!(after, Some(Fault::CutRequest(_))) {
                return server.shutdown(Shutdown::Both);
            }
            if !answer(client, &server, &request.line(), after.as_ref())? {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        // The listener and each connection have a clone; the last but one is the test's.
        if Arc::strong_count(&self.state) == 2 {
            self.lock().closed = true;
            self.state.1.notify_all();
            drop(TcpStream::connect(self.address));
        }
    }
}

/// Passes an answer on; whether the connection can be used again.
fn answer(
    mut client: &TcpStream,
    server: &TcpStream,
    line: &str,
    fault: Option<&Fault>,
) -> std::io::Result<bool> {
    let mut reader = BufReader::new(server);
    let Some(mut head) = Head::read(&mut reader)? else {
        return Ok(false);
    };
    if fault == Some(&Fault::Lose) {
        // All of it, so that the store is done with it.
        std::io::copy(&mut reader, &mut std::io::sink())?;
        return Ok(false);
    }
    if fault == Some(&Fault::OkWithError { done: true }) {
        std::io::copy(&mut reader, &mut std::io::sink())?;
        refuse(client, 200)?;
        return Ok(false);
    }
    if fault == Some(&Fault::WrongEtag) && head.get("etag").is_some() {
        head.set("etag", "\"0123456789abcdef0123456789abcdef\"");
    }
    let bodiless = line.starts_with("HEAD ") || [204, 304].contains(&head.status());
    let counted = bodiless || head.get("content-length").is_some();
    head.set("connection", if counted { "keep-alive" } else { "close" });
    client.write_all(head.text().as_bytes())?;
    if bodiless {
        return Ok(true);
    }
    let mut at = 0;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let got = reader.read(&mut buffer)?;
        if got == 0 {
            return Ok(counted);
        }
        let Some(bytes) = buffer.get_mut(..got) else {
            return Ok(false);
        };
        let end = at + got as u64;
        match fault {
            Some(Fault::Truncate(most)) if end > *most => {
                let left = usize::try_from(most.saturating_sub(at)).unwrap_or(0);
                client.write_all(bytes.get(..left).unwrap_or_default())?;
                return Ok(false);
            }
            Some(Fault::Flip(place)) if (at..end).contains(place) => {
                let place = usize::try_from(place - at).unwrap_or(0);
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 1;
                }
            }
            _ => {}
        }
        client.write_all(bytes)?;
        at = end;
    }
}

/// Answers an error as S3 stores do.
fn refuse(mut client: &TcpStream, status: u16) -> std::io::Result<()> {
    let code = match status {
        503 => "SlowDown",
        403 => "AccessDenied",
        _ => "InternalError",
    };
    let body = format!("<Error><Code>{code}</Code><Message>broken by the test</Message></Error>");
    write!(
        client,
        "HTTP/1.1 {status} Broken\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// The head of a request or of an answer.
struct Head {
    first: String,
    fields: Vec<(String, String)>,
}

impl Head {
    /// Reads one; `None` at the end of the connection.
    fn read(reader: &mut impl BufRead) -> std::io::Result<Option<Self>> {
        let mut head = Self {
            first: String::new(),
            fields: Vec::new(),
        };
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end();
            if line.is_empty() {
                return Ok(Some(head));
            }
            if head.first.is_empty() {
                line.clone_into(&mut head.first);
            } else if let Some((name, value)) = line.split_once(':') {
                head.fields
                    .push((name.to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{}\r\n", self.first);
        for (name, value) in &self.fields {
            for part in [name, ": ", value, "\r\n"] {
                text.push_str(part);
            }
        }
        text + "\r\n"
    }

    /// The method, a blank and the path.
    fn line(&self) -> String {
        let words: Vec<_> = self.first.split(' ').take(2).collect();
        words.join(" ")
    }

    fn status(&self) -> u16 {
        let word = self.first.split(' ').nth(1);
        word.and_then(|word| word.parse().ok()).unwrap_or(0)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: &str) {
        self.fields.retain(|(key, _)| key != name);
        self.fields.push((name.to_owned(), value.to_owned()));
    }

    fn length(&self) -> u64 {
        self.get("content-length")
            .and_then(|value| value.parse().ok())
            .unwrap_or(0)
    }

    /// Takes the conditions out, and signs what is left where they were signed.
    fn without_conditions(&mut self) {
        let is_condition = |name: &str| name == "if-match" || name == "if-none-match";
        if !self.fields.iter().any(|(name, _)| is_condition(name)) {
            return;
        }
        self.fields.retain(|(name, _)| !is_condition(name));
        let Some(names) = self
            .get("authorization")
            .and_then(|text| text.split("SignedHeaders=").nth(1))
            .and_then(|rest| rest.split(',').next())
            .map(str::to_owned)
        else {
            return;
        };
        let headers: Vec<_> = names
            .split(';')
            .filter(|name| !is_condition(name))
            .filter_map(|name| Some((name.to_owned(), self.get(name)?.to_owned())))
            .collect();
        let mut words = self.first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default().to_owned();
        let (path, query) = target.split_once('?').unwrap_or((target.as_str(), ""));
        let signature = sigv4::authorization(
            &sigv4::Request {
                method: &method,
                path,
                query,
                headers: &headers,
                payload: self.get("x-amz-content-sha256").unwrap_or_default(),
                date: self.get("x-amz-date").unwrap_or_default(),
            },
            &ObjectStore::keys(),
        );
        self.set("authorization", &signature);
    }
}

/// A wire to some server, which can be cut and can stand still.
#[derive(Clone, Debug)]
pub struct Wire {
    address: SocketAddr,
    state: Arc<(Mutex<WireState>, Condvar)>,
}

#[derive(Debug, Default)]
struct WireState {
    /// Nothing goes through, and new connections end at once.
    cut: bool,
    /// Bytes wait.
    still: bool,
    open: Vec<TcpStream>,
}

impl Wire {
    /// Starts a wire to `upstream` (`127.0.0.1:PORT`).
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let wire = Self {
            address: listener.local_addr().expect("a listener has an address"),
            state: Arc::default(),
        };
        let (accepting, upstream) = (wire.clone(), upstream.to_owned());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.lock().cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&upstream) else {
                    continue;
                };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) else {
                        continue;
                    };
                    let wire = accepting.clone();
                    thread::spawn(move || wire.carry(&from, &to));
                }
                accepting.lock().open.extend([client, server]);
            }
        });
        wire
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Ends all connections and refuses new ones.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.cut = true;
        for stream in state.open.drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// Lets nothing through; connections stay open.
    pub fn stand_still(&self) {
        self.lock().still = true;
    }

    /// Lets everything through again.
    pub fn mend(&self) {
        let mut state = self.lock();
        (state.cut, state.still) = (false, false);
        self.state.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, WireState> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            let still = self.state.1.wait_while(self.lock(), |state| state.still);
            drop(still);
            if to.write_all(buffer.get(..got).unwrap_or_default()).is_err() {
                break;
            }
        }
        drop(from.shutdown(Shutdown::Both));
        drop(to.shutdown(Shutdown::Both));
    }
}
