//! What is asked of a contestant, and how long it took.

use std::net::Shutdown;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::content::{Image, Images, Large, MANIFEST};
use super::wire::{Base, Head, Wire};

/// Where large blobs go.
const LARGE: &str = "bench/large";
/// Where images go.
const IMAGES: &str = "bench/images";
/// Connections that ask for a manifest at the same time.
pub(crate) const CONNECTIONS: usize = 64;

/// Work that was done, and how long it took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// In bytes, requests or images.
    pub(crate) work: u64,
    pub(crate) took: Duration,
}

/// Pulls a blob and drops it unseen.
pub(crate) fn pull(base: &Base, digest: &str, size: u64) -> anyhow::Result<Done> {
    let mut wire = Wire::open(base)?;
    let start = Instant::now();
    ask_blob(&mut wire, LARGE, digest, size)?;
    wire.discard(size)?;
    Ok(Done {
        work: size,
        took: start.elapsed(),
    })
}

/// Pulls a blob and hashes it, outside all measurement.
pub(crate) fn check_blob(base: &Base, digest: &str, size: u64) -> anyhow::Result<()> {
    check_blob_in(base, LARGE, digest, size)
}

fn check_blob_in(base: &Base, repository: &str, digest: &str, size: u64) -> anyhow::Result<()> {
    let mut wire = Wire::open(base)?;
    ask_blob(&mut wire, repository, digest, size)?;
    let mut hash = Sha256::new();
    wire.take(size, |piece| hash.update(piece))?;
    let found = format!("sha256:{}", hex::encode(hash.finalize()));
    ensure!(found == digest, "the body is not the blob: {found}");
    Ok(())
}

fn ask_blob(wire: &mut Wire, repository: &str, digest: &str, size: u64) -> anyhow::Result<()> {
    let target = format!("/v2/{repository}/blobs/{digest}");
    let head = wire.request_head("GET", &target, "Accept: */*\r\n", None);
    wire.send(&head)?;
    let head = wire.head()?;
    expect(&head, 200, "GET of a blob")?;
    ensure!(
        head.length == Some(size),
        "GET of a blob: the length is {:?}, expected {size}",
        head.length
    );
    Ok(())
}

/// Pushes a large blob as Docker does: POST, one PATCH, PUT. It is done when the server says so.
pub(crate) fn push(base: &Base, body: &Large<'_>) -> anyhow::Result<Done> {
    let mut wire = Wire::open(base)?;
    let start = Instant::now();
    let target = begin(&mut wire, LARGE)?;
    let head = wire.request_head("PATCH", &target, OCTETS, Some(body.size()));
    wire.send(&head)?;
    body.send(wire.stream())?;
    let (head, _) = wire.answer("PATCH")?;
    expect(&head, 202, "PATCH")?;
    let target = with_digest(&location(&head)?, &body.digest);
    let (head, _) = wire.call("PUT", &target, OCTETS, b"")?;
    expect(&head, 201, "PUT of a blob")?;
    Ok(Done {
        work: body.size(),
        took: start.elapsed(),
    })
}

/// Makes sure, outside all measurement, that a blob that was pushed is there with its whole size.
pub(crate) fn check_size(base: &Base, body: &Large<'_>) -> anyhow::Result<()> {
    let target = format!("/v2/{LARGE}/blobs/{}", body.digest);
    let (head, _) = Wire::open(base)?.call("HEAD", &target, "", b"")?;
    expect(&head, 200, "HEAD of a blob")?;
    ensure!(
        head.length == Some(body.size()),
        "HEAD of a blob: the length is {:?}",
        head.length
    );
    Ok(())
}

/// Pushes images, new ones each, from `pushers` connections until the time is over.
pub(crate) fn push_images(base: &Base, pushers: usize, time: Duration) -> anyhow::Result<Done> {
    let start = Instant::now();
    let counts = all(pushers, |_| {
        let mut images = Images::new()?;
        let mut wire = Wire::open(base)?;
        let mut count = 0;
        while start.elapsed() < time {
            let image = images.fresh();
            push_image(&mut wire, &image, &tag(&image))?;
            count += 1;
        }
        Ok(count)
    })?;
    Ok(Done {
        work: counts.into_iter().sum(),
        took: start.elapsed(),
    })
}

/// Pushes one image as `tag`: POST and PUT for each blob, one after another, then the manifest.
pub(crate) fn push_image(wire: &mut Wire, image: &Image, tag: &str) -> anyhow::Result<()> {
    for (digest, bytes) in &image.blobs {
        push_known(wire, IMAGES, digest, bytes)?;
    }
    put_manifest(wire, &image.manifest, tag)
}

/// Pushes a small blob with POST and PUT, and gives back its digest.
pub(crate) fn push_blob(wire: &mut Wire, repository: &str, bytes: &[u8]) -> anyhow::Result<String> {
    let digest = e2e::digest(bytes);
    push_known(wire, repository, &digest, bytes)?;
    Ok(digest)
}

fn push_known(wire: &mut Wire, repository: &str, digest: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let target = with_digest(&begin(wire, repository)?, digest);
    let (head, _) = wire.call("PUT", &target, OCTETS, bytes)?;
    expect(&head, 201, "PUT of a blob")
}

fn put_manifest(wire: &mut Wire, manifest: &[u8], tag: &str) -> anyhow::Result<()> {
    let kind = format!("Content-Type: {MANIFEST}\r\n");
    let target = format!("/v2/{IMAGES}/manifests/{tag}");
    let (head, _) = wire.call("PUT", &target, &kind, manifest)?;
    expect(&head, 201, "PUT of a manifest")
}

/// Makes sure, outside all measurement, that an image that was pushed is there.
pub(crate) fn check_image(base: &Base) -> anyhow::Result<()> {
    let image = Images::new()?.fresh();
    let tag = tag(&image);
    let mut wire = Wire::open(base)?;
    push_image(&mut wire, &image, &tag)?;
    let (head, body) = wire.call("GET", &manifest_target(&tag), &accept(), b"")?;
    expect(&head, 200, "GET of a manifest")?;
    ensure!(body == image.manifest, "the manifest came back as another");
    for (digest, bytes) in &image.blobs {
        check_blob_in(base, IMAGES, digest, bytes.len() as u64)?;
    }
    Ok(())
}

/// Asks for a manifest by its tag, again and again, with [`CONNECTIONS`] requests under way at any time.
///
/// Few threads drive the connections in turn: an answer waits in the socket until its turn comes, and the
/// server, not the switching of threads, sets the pace. Every body is compared.
pub(crate) fn manifests(base: &Base, manifest: &[u8], time: Duration) -> anyhow::Result<Done> {
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(4);
    let start = Instant::now();
    let counts = all(threads, |number| {
        let mine = (number..CONNECTIONS).step_by(threads);
        let mut wires = mine
            .map(|_| Wire::open(base))
            .collect::<std::io::Result<Vec<_>>>()?;
        let mut request = Vec::new();
        for wire in &mut wires {
            request = wire.request_head("GET", &manifest_target("latest"), &accept(), None);
            wire.send(&request)?;
        }
        let mut count = 0;
        let mut going = true;
        while going {
            going = start.elapsed() < time;
            for wire in &mut wires {
                let head = wire.head()?;
                expect(&head, 200, "GET of a manifest")?;
                ensure!(
                    head.length == Some(manifest.len() as u64),
                    "the length is {:?}",
                    head.length
                );
                let (mut at, mut same) = (0, true);
                wire.take(manifest.len() as u64, |piece| {
                    same &= manifest[at..at + piece.len()] == *piece;
                    at += piece.len();
                })?;
                ensure!(same, "the manifest came back as another");
                count += 1;
                if going {
                    wire.send(&request)?;
                }
            }
        }
        Ok(count)
    })?;
    Ok(Done {
        work: counts.into_iter().sum(),
        took: start.elapsed(),
    })
}

/// How long it took from the first byte of a manifest's PUT by tag until it was answered, and until the
/// tag's event arrived on a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noticed {
    pub(crate) answered: Duration,
    pub(crate) arrived: Duration,
}

/// Moves a tag `count` times, one after another, and listens to the event stream. The blobs that
/// `manifest` names must be there.
pub(crate) fn events(base: &Base, manifest: &[u8], count: usize) -> anyhow::Result<Vec<Noticed>> {
    let mut listener = Wire::open(base)?;
    let request = listener.request_head(
        "GET",
        "/api/v1/events",
        "Accept: text/event-stream\r\n",
        None,
    );
    listener.send(&request)?;
    let head = listener.head()?;
    expect(&head, 200, "GET of the event stream")?;
    ensure!(head.chunked, "the event stream has a length");
    let connection = listener.stream().try_clone()?;
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || read_events(listener, &sender));
    let noticed = move_tag(base, manifest, count, &receiver);
    // The reader ends with its connection.
    drop(connection.shutdown(Shutdown::Both));
    drop(reader.join());
    noticed
}

fn move_tag(
    base: &Base,
    manifest: &[u8],
    count: usize,
    events: &mpsc::Receiver<(Instant, String)>,
) -> anyhow::Result<Vec<Noticed>> {
    const PATIENCE: Duration = Duration::from_secs(30);
    // The stream says where it begins; what is pushed after that comes on it.
    events
        .recv_timeout(PATIENCE)
        .context("the event stream says nothing")?;
    let mut value: serde_json::Value = serde_json::from_slice(manifest)?;
    let mut wire = Wire::open(base)?;
    let mut salt = [0; 8];
    let mut noticed = Vec::with_capacity(count);
    let mut random = super::content::Random::new()?;
    for _ in 0..count {
        random.fill(&mut salt);
        value["annotations"] = serde_json::json!({ "bench": hex::encode(salt) });
        let bytes = value.to_string().into_bytes();
        let digest = e2e::digest(&bytes);
        let start = Instant::now();
        put_manifest(&mut wire, &bytes, "moving")?;
        let answered = start.elapsed();
        let arrived = loop {
            let (at, line) = events
                .recv_timeout(PATIENCE)
                .context("the event does not come")?;
            if line.contains("tag.updated") && line.contains(&digest) {
                break at.duration_since(start);
            }
        };
        noticed.push(Noticed { answered, arrived });
    }
    Ok(noticed)
}

/// Hands on each line of data with the time of its arrival, until the connection or the listener ends.
fn read_events(mut wire: Wire, sender: &mpsc::Sender<(Instant, String)>) -> anyhow::Result<()> {
    let mut text = Vec::new();
    while let Some(length) = wire.chunk()? {
        wire.take(length, |piece| text.extend_from_slice(piece))?;
        let now = Instant::now();
        wire.line()?;
        while let Some(at) = text.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&text[..at]).into_owned();
            text.drain(..=at);
            if line.starts_with("data:") {
                sender.send((now, line))?;
            }
        }
    }
    Ok(())
}

/// Runs `count` threads and gives back what each came to, or the first error.
pub(crate) fn all<T: Send>(
    count: usize,
    work: impl Fn(usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count)
            .map(|number| scope.spawn(move || work(number)))
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a load generator panicked"),
            })
            .collect()
    })
}

/// Opens an upload and gives back where its bytes go.
fn begin(wire: &mut Wire, repository: &str) -> anyhow::Result<String> {
    let (head, _) = wire.call("POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"")?;
    expect(&head, 202, "POST of an upload")?;
    location(&head)
}

/// The path and query of the answer's Location, which may be a whole URL.
fn location(head: &Head) -> anyhow::Result<String> {
    let location = head
        .location
        .as_deref()
        .context("the answer has no Location")?;
    let path = match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map(|at| &rest[at..]),
        None => Some(location),
    };
    path.map(str::to_owned)
        .with_context(|| format!("`{location}` has no path"))
}

fn with_digest(target: &str, digest: &str) -> String {
    let sign = if target.contains('?') { '&' } else { '?' };
    format!("{target}{sign}digest={}", digest.replace(':', "%3A"))
}

pub(crate) fn expect(head: &Head, status: u16, what: &str) -> anyhow::Result<()> {
    ensure!(
        head.status == status,
        "{what}: status {}, expected {status}",
        head.status
    );
    Ok(())
}

fn manifest_target(tag: &str) -> String {
    format!("/v2/{IMAGES}/manifests/{tag}")
}

fn accept() -> String {
    format!("Accept: {MANIFEST}\r\n")
}

/// A tag that no other image has.
fn tag(image: &Image) -> String {
    e2e::digest(&image.manifest)
        .chars()
        .skip("sha256:".len())
        .take(16)
        .collect()
}

const OCTETS: &str = "Content-Type: application/octet-stream\r\n";

#[cfg(test)]
mod tests {
    use super::super::content::Source;
    use super::super::sink;
    use super::*;

    #[test]
    fn the_sink_takes_what_has_its_digest_and_nothing_else() {
        let base = Base::parse(&sink::start()).unwrap();
        let source = Source::new(3_000_000).unwrap();
        let mut body = source.fresh().unwrap();
        assert_eq!(push(&base, &body).unwrap().work, 3_000_000);
        let done = push_images(&base, 3, Duration::ZERO).unwrap();
        assert_eq!(done.work, 0);
        let mut images = Images::new().unwrap();
        let mut wire = Wire::open(&base).unwrap();
        for _ in 0..2 {
            let mut image = images.fresh();
            push_image(&mut wire, &image, "a").unwrap();
            image.blobs[4].1[0] ^= 1;
            let error = push_image(&mut wire, &image, "a").unwrap_err();
            assert!(error.to_string().contains("status 400"), "{error}");
        }
        body.digest = e2e::digest(b"another");
        assert!(push(&base, &body).is_err());
    }

    #[test]
    fn locations_are_paths_or_urls() {
        for (given, path) in [
            ("/v2/a?b=c", Some("/v2/a?b=c")),
            (
                "http://127.0.0.1:1/v2/a?_state=x%3D",
                Some("/v2/a?_state=x%3D"),
            ),
            ("http://127.0.0.1:1", None),
        ] {
            let head = Head {
                location: Some(given.to_owned()),
                ..Head::default()
            };
            assert_eq!(location(&head).ok().as_deref(), path);
        }
        assert_eq!(with_digest("/a", "sha256:x"), "/a?digest=sha256%3Ax");
        assert_eq!(with_digest("/a?b", "sha256:x"), "/a?b&digest=sha256%3Ax");
    }
}
