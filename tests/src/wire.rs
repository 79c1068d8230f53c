//! The distribution API as the tests speak it: uploads byte by byte, and what an answer must be.

use std::time::{Duration, Instant};

use crate::http::Response;
use crate::{Server, digest};

/// How long an event that must come may take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Wants a refusal: its status, its code, and a message that holds `hint`.
#[track_caller]
pub fn refused(answer: &Response, status: u16, code: &str, hint: &str) {
    let text = answer.text();
    assert_eq!(answer.status(), status, "{text}");
    let error = &answer.json()["errors"][0];
    assert_eq!(error["code"], code, "{text}");
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.contains(hint), "expected `{hint}` in {text}");
}

/// Bytes that are the same for the same seed and compress badly.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
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
pub fn open_upload(server: &Server, repository: &str) -> String {
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
pub fn offset_of(answer: &Response) -> u64 {
    let range = answer.header("range").expect("an upload tells its range");
    let last: u64 = range
        .strip_prefix("0-")
        .and_then(|last| last.parse().ok())
        .unwrap_or_else(|| panic!("`{range}` is not the range of an upload"));
    if last == 0 { 0 } else { last + 1 }
}

/// The `Content-Range` of a chunk.
pub fn range(first: usize, length: usize) -> String {
    format!("{first}-{}", first + length - 1)
}

/// Sends a chunk on a connection of its own.
pub fn patch(server: &Server, upload: &str, first: usize, bytes: &[u8]) -> Response {
    let range = range(first, bytes.len());
    server.request("PATCH", upload, &[("Content-Range", &range)], bytes)
}

/// Ends an upload.
pub fn finish(server: &Server, upload: &str, digest: &str, rest: &[u8]) -> Response {
    server.request("PUT", &format!("{upload}?digest={digest}"), &[], rest)
}

/// Wants a blob to be there with exactly this digest.
#[track_caller]
pub fn holds(server: &Server, repository: &str, wanted: &str) {
    let answer = server.get(&format!("/v2/{repository}/blobs/{wanted}"));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert_eq!(digest(&answer.body), wanted);
}

/// Waits until `ready` gives something.
///
/// # Panics
/// When it does not in a minute and a half.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}
