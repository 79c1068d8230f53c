//! The limit of a push: a server that receives the same bytes over the same HTTP, hashes them, and
//! keeps nothing.
//!
//! It is this program again in a process of its own, so that its CPU time can be told from the load
//! generator's. One thread per connection, and one upload at a time on it.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use super::wire::Wire;

/// Listens on a free port, writes the URL to a file, and serves until it is killed.
pub(crate) fn run(ready: &Path) -> anyhow::Result<bool> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    // The file appears whole.
    let part = ready.with_extension("part");
    std::fs::write(&part, url)?;
    std::fs::rename(&part, ready).context("cannot write the URL")?;
    serve(&listener);
    Ok(true)
}

fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || drop(connection(stream)));
    }
}

fn connection(stream: TcpStream) -> io::Result<()> {
    let mut wire = Wire::of(stream, "")?;
    let mut hash = Sha256::new();
    while let Some((line, length)) = wire.request()? {
        let mut words = line.split(' ');
        let method = words.next().unwrap_or("");
        let target = words.next().unwrap_or("");
        if method == "POST" {
            hash = Sha256::new();
        }
        wire.take(length, |piece| hash.update(piece))?;
        let answer = match (method, target.split_once("digest=sha256%3A")) {
            ("POST", _) => "202 Accepted\r\nLocation: /upload",
            ("PATCH", _) => "202 Accepted\r\nLocation: /upload?state=1",
            ("PUT", Some((_, expected))) => {
                let found = hex::encode(hash.finalize_reset());
                if found == expected {
                    "201 Created"
                } else {
                    "400 Bad Request"
                }
            }
            ("PUT", None) => {
                hash = Sha256::new();
                "201 Created"
            }
            _ => "404 Not Found",
        };
        wire.send(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    }
    Ok(())
}

/// Serves in this process, for tests; gives back the URL.
#[cfg(test)]
pub(crate) fn start() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(&listener));
    url
}
