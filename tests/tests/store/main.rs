//! The store under attack, through the built program: races, cut connections, kills, failing disks, hostile
//! requests. After each the same three things must hold: what was acknowledged reads back and re-hashes,
//! `verify-store` is clean, and a refusal says what to do.

#[cfg(test)]
mod disk;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod load;
#[cfg(test)]
mod mode;
#[cfg(test)]
mod race;
#[cfg(test)]
mod refusal;

use std::path::Path;
use std::time::{Duration, Instant};

use e2e::http::Response;
use e2e::server::Options;
use e2e::{Run, Server, digest, http, tools};

/// How long an event that must come may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// A server with this configuration after `version: 1`.
fn server(config: &str) -> Server {
    Server::with(&Options::new(tools::program()).config(format!("version: 1\n{config}")))
}

/// Wants `verify-store` to find nothing.
fn verify(data: &Path) {
    let report = Run::new(tools::program())
        .args(["--json", "verify-store"])
        .arg(data)
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    assert_eq!(report.json()["problems"], serde_json::json!([]), "{report}");
}

/// Wants a refusal: its status, its code, and a message that holds `hint`.
#[track_caller]
fn refused(answer: &Response, status: u16, code: &str, hint: &str) {
    let text = answer.text();
    assert_eq!(answer.status(), status, "{text}");
    let error = &answer.json()["errors"][0];
    assert_eq!(error["code"], code, "{text}");
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.contains(hint), "expected `{hint}` in {text}");
}

/// Bytes that are the same for the same seed and compress badly.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Starts an upload and gives back its path.
fn open_upload(server: &Server, repository: &str) -> String {
    let answer = server.request(
        "POST",
        &format!("/v2/{repository}/blobs/uploads/"),
        &[],
        &[],
    );
    assert_eq!(answer.status(), 202, "{}", answer.text());
    answer
        .header("location")
        .expect("an upload has a location")
        .to_owned()
}

/// The number of bytes that an upload's `Range` tells. `0-0` is one byte or none, so callers use more.
fn offset_of(answer: &Response) -> u64 {
    let range = answer.header("range").expect("an upload tells its range");
    let last: u64 = range
        .strip_prefix("0-")
        .and_then(|last| last.parse().ok())
        .unwrap_or_else(|| panic!("`{range}` is not the range of an upload"));
    if last == 0 { 0 } else { last + 1 }
}

/// The `Content-Range` of a chunk.
fn range(first: usize, length: usize) -> String {
    format!("{first}-{}", first + length - 1)
}

/// Sends a chunk on a connection of its own.
fn patch(server: &Server, upload: &str, first: usize, bytes: &[u8]) -> Response {
    let range = range(first, bytes.len());
    server.request("PATCH", upload, &[("Content-Range", &range)], bytes)
}

/// Ends an upload.
fn finish(server: &Server, upload: &str, digest: &str, rest: &[u8]) -> Response {
    server.request("PUT", &format!("{upload}?digest={digest}"), &[], rest)
}

/// Wants a blob to be there with exactly this digest.
#[track_caller]
fn holds(server: &Server, repository: &str, wanted: &str) {
    let answer = server.get(&format!("/v2/{repository}/blobs/{wanted}"));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert_eq!(digest(&answer.body), wanted);
}

/// Waits until `ready` gives something.
///
/// # Panics
/// When it does not in a minute.
fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A field of `/proc/PID/status` in KiB.
fn memory(server: &Server, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.pid()))
        .expect("a running server has a status");
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no `{field}` in {text}"))
}

/// Wants a server that still answers, and that has not panicked.
#[track_caller]
fn healthy(server: &mut Server) {
    assert!(server.runs(), "the server ended\n{}", server.logged());
    assert_eq!(server.get("/readyz").status(), 200);
    let log = server.logged();
    assert!(!log.contains("panicked"), "{log}");
}

/// A connection to a server.
fn connect(server: &Server) -> http::Connection {
    http::Connection::open(server.url()).expect("the server takes connections")
}
