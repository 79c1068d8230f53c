//! A load of pushes that remembers what the server acknowledged, and the check that all of it is there.
//!
//! Each pusher writes into a repository of its own, so that it alone knows what its tags must be. A
//! request whose answer never came may have happened or not; both are right then, and anything
//! else is a loss.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use e2e::digest;
use e2e::http::{Connection, Response};
use serde_json::json;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Random numbers that a seed repeats (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// Bytes that nobody has seen before.
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    /// A seed from the clock, for a run that nobody asked to repeat.
    pub(crate) fn seed() -> u64 {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        u64::from(now.subsec_nanos()) ^ now.as_secs()
    }
}

/// What something must be: the last acknowledged state, and the state that an unanswered request may
/// have brought about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Claim {
    /// `None`: must not be there.
    acknowledged: Option<String>,
    /// The outcome of a request without an answer.
    maybe: Option<Outcome>,
}

/// What a request without an answer may have done.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// It stands for this digest now.
    Is(String),
    /// It is not there any more.
    Gone,
}

/// What one pusher knows.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    repository: String,
    blobs: BTreeMap<String, Claim>,
    manifests: BTreeMap<String, Claim>,
    tags: BTreeMap<String, Claim>,
    /// Answers that a client may not get, such as a 404 for what was acknowledged.
    wrong: Vec<String>,
}

impl Ledger {
    /// How many things must be there or be gone.
    pub(crate) fn len(&self) -> usize {
        self.blobs.len() + self.manifests.len() + self.tags.len()
    }

    /// Asks the server for everything; what is lost or changed.
    pub(crate) fn check(&self, url: &str) -> io::Result<Vec<String>> {
        let mut lost = self.wrong.clone();
        let mut connection = Connection::open(url)?;
        let repository = &self.repository;
        for (kind, all) in [("blobs", &self.blobs), ("manifests", &self.manifests)] {
            for (name, claim) in all {
                let target = format!("/v2/{repository}/{kind}/{name}");
                let answer = connection.request("GET", &target, &[("Accept", MANIFEST)], &[])?;
                let found = match answer.status() {
                    200 => Some(digest(&answer.body)),
                    404 => None,
                    other => Some(format!("an answer {other}: {}", answer.text())),
                };
                lost.extend(claim.judge(&target, found.as_deref()));
            }
        }
        for (tag, claim) in &self.tags {
            let target = format!("/v2/{repository}/manifests/{tag}");
            let answer = connection.request("GET", &target, &[("Accept", MANIFEST)], &[])?;
            let found = match answer.status() {
                200 => Some(digest(&answer.body)),
                404 => None,
                other => Some(format!("an answer {other}: {}", answer.text())),
            };
            lost.extend(claim.judge(&target, found.as_deref()));
        }
        Ok(lost)
    }
}

impl Claim {
    fn judge(&self, target: &str, found: Option<&str>) -> Option<String> {
        let maybe = match &self.maybe {
            Some(Outcome::Is(digest)) => Some(digest.as_str()) == found,
            Some(Outcome::Gone) => found.is_none(),
            None => false,
        };
        if self.acknowledged.as_deref() == found || maybe {
            return None;
        }
        Some(format!(
            "{target}: acknowledged {:?}, unanswered {:?}, found {found:?}",
            self.acknowledged, self.maybe
        ))
    }
}

/// Pushers at work.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    gone: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Ledger>>,
}

impl Load {
    /// Starts `count` pushers; their repositories are `{prefix}/{number}`. Each begins at one of the servers and
    /// goes on at the next when one fails.
    pub(crate) fn start(urls: &[String], prefix: &str, count: u64, seed: u64) -> Self {
        Self::of_size(urls, prefix, count, seed, 20_000)
    }

    /// The same with large blobs: an object store takes them in parts.
    pub(crate) fn start_large(urls: &[String], prefix: &str, count: u64, seed: u64) -> Self {
        Self::of_size(urls, prefix, count, seed, 14 << 20)
    }

    fn of_size(urls: &[String], prefix: &str, count: u64, seed: u64, least: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let gone = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let threads = (0..count)
            .map(|number| {
                let mut pusher = Pusher {
                    urls: urls.to_vec(),
                    at: usize::try_from(number).unwrap_or(0) % urls.len(),
                    connection: None,
                    least,
                    random: Random(seed.wrapping_mul(1009).wrapping_add(number)),
                    ledger: Ledger {
                        repository: format!("{prefix}/{number}"),
                        ..Ledger::default()
                    },
                    counter: Arc::clone(&acknowledged),
                    gone: Arc::clone(&gone),
                    round: 0,
                };
                let stop = Arc::clone(&stop);
                let most = 3 * urls.len();
                std::thread::spawn(move || {
                    let mut misses = 0;
                    while !stop.load(Ordering::Relaxed) && misses < most {
                        if pusher.round().is_ok() {
                            misses = 0;
                        } else {
                            // The server died, or refuses because its disk is gone.
                            pusher.connection = None;
                            pusher.at = (pusher.at + 1) % pusher.urls.len();
                            misses += 1;
                            std::thread::sleep(std::time::Duration::from_millis(10));
                        }
                    }
                    pusher.ledger
                })
            })
            .collect();
        Self {
            stop,
            gone,
            acknowledged,
            threads,
        }
    }

    /// How many requests were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// The machine is gone from here on: what is answered later never reached a client.
    pub(crate) fn goes(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    /// Ends the pushers and gives back what they know.
    pub(crate) fn finish(self) -> Vec<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect()
    }
}

struct Pusher {
    urls: Vec<String>,
    /// Which of them it talks to.
    at: usize,
    /// The least length of a blob that is pushed in pieces.
    least: usize,
    connection: Option<Connection>,
    random: Random,
    ledger: Ledger,
    counter: Arc<AtomicU64>,
    /// No answer counts any more.
    gone: Arc<AtomicBool>,
    round: u64,
}

impl Pusher {
    /// One push as clients make it: blobs in both ways, a manifest, tags, and now and then a delete.
    fn round(&mut self) -> io::Result<()> {
        self.round += 1;
        let length = 200 + usize::try_from(self.random.below(6000)).unwrap_or(0);
        let small = self.random.bytes(length);
        let small_digest = self.whole(&small)?;
        let length = self.least + usize::try_from(self.random.below(200_000)).unwrap_or(0);
        let large = self.random.bytes(length);
        let large_digest = self.in_pieces(&large)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": small_digest, "size": small.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": large_digest, "size": large.len()}],
        })
        .to_string();
        // A tag that is made once, and one that moves every time.
        let made = format!("v{}", self.round);
        self.tag(&made, &manifest)?;
        self.tag("latest", &manifest)?;
        if self.round.is_multiple_of(2) {
            // The same bytes again, and an upload that is given up: objects that must go by the outbox.
            self.in_pieces(&large)?;
            self.cancelled()?;
        }
        if self.round.is_multiple_of(3) {
            self.remove_tag(&made)?;
        }
        if self.round.is_multiple_of(5) {
            self.remove_manifest(&digest(manifest.as_bytes()))?;
        }
        Ok(())
    }

    fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Response> {
        if self.connection.is_none() {
            self.connection = Some(Connection::open(&self.urls[self.at])?);
        }
        let connection = self
            .connection
            .as_mut()
            .ok_or(io::ErrorKind::NotConnected)?;
        let answer = connection.request(method, target, headers, body)?;
        if self.gone.load(Ordering::SeqCst) {
            return Err(io::Error::other("answered after the machine was gone"));
        }
        if answer.status() < 300 {
            self.counter.fetch_add(1, Ordering::Relaxed);
        }
        Ok(answer)
    }

    /// An answer that is no acknowledgement ends the round. A server in trouble says 5xx; anything
    /// else is wrong, because each request here is a right one.
    fn refused<T>(&mut self, what: &str, answer: &Response) -> io::Result<T> {
        if answer.status() < 500 {
            self.ledger.wrong.push(format!(
                "{what} in {}: answered {} {}",
                self.ledger.repository,
                answer.status(),
                answer.text()
            ));
        }
        Err(io::Error::other(format!("{what}: {}", answer.status())))
    }

    fn whole(&mut self, bytes: &[u8]) -> io::Result<String> {
        let digest = digest(bytes);
        let target = format!(
            "/v2/{}/blobs/uploads/?digest={digest}",
            self.ledger.repository
        );
        let claim = Claim {
            acknowledged: None,
            maybe: Some(Outcome::Is(digest.clone())),
        };
        self.ledger.blobs.insert(digest.clone(), claim);
        let answer = self.send(
            "POST",
            &target,
            &[("Content-Type", "application/octet-stream")],
            bytes,
        )?;
        if answer.status() != 201 {
            return self.refused("POST of a blob", &answer);
        }
        self.has_blob(&digest);
        Ok(digest)
    }

    fn in_pieces(&mut self, bytes: &[u8]) -> io::Result<String> {
        let digest = digest(bytes);
        let opened = self.send(
            "POST",
            &format!("/v2/{}/blobs/uploads/", self.ledger.repository),
            &[],
            &[],
        )?;
        if opened.status() != 202 {
            return self.refused("POST of an upload", &opened);
        }
        let mut location = location(&opened)?;
        let cut = bytes.len() / 3;
        let mut sent = 0;
        for piece in [&bytes[..cut], &bytes[cut..]] {
            let range = format!("{sent}-{}", sent + piece.len() - 1);
            let headers = [
                ("Content-Type", "application/octet-stream"),
                ("Content-Range", range.as_str()),
            ];
            let answer = self.send("PATCH", &location, &headers, piece)?;
            if answer.status() != 202 {
                return self.refused("PATCH", &answer);
            }
            sent += piece.len();
            location = self::location(&answer)?;
        }
        let separator = if location.contains('?') { '&' } else { '?' };
        // When it was pushed before, it stays acknowledged whatever comes of this.
        self.ledger.blobs.entry(digest.clone()).or_default().maybe =
            Some(Outcome::Is(digest.clone()));
        let answer = self.send(
            "PUT",
            &format!("{location}{separator}digest={digest}"),
            &[],
            &[],
        )?;
        if answer.status() != 201 {
            return self.refused("PUT of a blob", &answer);
        }
        self.has_blob(&digest);
        Ok(digest)
    }

    fn cancelled(&mut self) -> io::Result<()> {
        let opened = self.send(
            "POST",
            &format!("/v2/{}/blobs/uploads/", self.ledger.repository),
            &[],
            &[],
        )?;
        if opened.status() != 202 {
            return self.refused("POST of an upload", &opened);
        }
        let bytes = self.random.bytes(self.least + 30_000);
        let headers = [("Content-Type", "application/octet-stream")];
        let answer = self.send("PATCH", &location(&opened)?, &headers, &bytes)?;
        if answer.status() != 202 {
            return self.refused("PATCH", &answer);
        }
        let answer = self.send("DELETE", &location(&answer)?, &[], &[])?;
        if answer.status() != 204 {
            return self.refused("DELETE of an upload", &answer);
        }
        Ok(())
    }

    fn has_blob(&mut self, digest: &str) {
        let claim = Claim {
            acknowledged: Some(digest.to_owned()),
            maybe: None,
        };
        self.ledger.blobs.insert(digest.to_owned(), claim);
    }

    fn tag(&mut self, tag: &str, manifest: &str) -> io::Result<()> {
        let digest = digest(manifest.as_bytes());
        self.ledger.tags.entry(tag.to_owned()).or_default().maybe =
            Some(Outcome::Is(digest.clone()));
        self.ledger
            .manifests
            .entry(digest.clone())
            .or_default()
            .maybe = Some(Outcome::Is(digest.clone()));
        let target = format!("/v2/{}/manifests/{tag}", self.ledger.repository);
        let answer = self.send(
            "PUT",
            &target,
            &[("Content-Type", MANIFEST)],
            manifest.as_bytes(),
        )?;
        if answer.status() != 201 {
            return self.refused("PUT of a manifest", &answer);
        }
        let claim = Claim {
            acknowledged: Some(digest.clone()),
            maybe: None,
        };
        self.ledger.tags.insert(tag.to_owned(), claim.clone());
        self.ledger.manifests.insert(digest, claim);
        Ok(())
    }

    fn remove_tag(&mut self, tag: &str) -> io::Result<()> {
        if let Some(claim) = self.ledger.tags.get_mut(tag) {
            claim.maybe = Some(Outcome::Gone);
        }
        let answer = self.send(
            "DELETE",
            &format!("/v2/{}/manifests/{tag}", self.ledger.repository),
            &[],
            &[],
        )?;
        if answer.status() != 202 {
            return self.refused("DELETE of a tag", &answer);
        }
        self.ledger.tags.insert(tag.to_owned(), Claim::default());
        Ok(())
    }

    /// Takes a manifest away, and with it every tag that points to it.
    fn remove_manifest(&mut self, digest: &str) -> io::Result<()> {
        let pointing: Vec<String> = self
            .ledger
            .tags
            .iter()
            .filter(|(_, claim)| claim.acknowledged.as_deref() == Some(digest))
            .map(|(tag, _)| tag.clone())
            .collect();
        for tag in &pointing {
            if let Some(claim) = self.ledger.tags.get_mut(tag) {
                claim.maybe = Some(Outcome::Gone);
            }
        }
        if let Some(claim) = self.ledger.manifests.get_mut(digest) {
            claim.maybe = Some(Outcome::Gone);
        }
        let answer = self.send(
            "DELETE",
            &format!("/v2/{}/manifests/{digest}", self.ledger.repository),
            &[],
            &[],
        )?;
        if answer.status() != 202 {
            return self.refused("DELETE of a manifest", &answer);
        }
        for tag in pointing {
            self.ledger.tags.insert(tag, Claim::default());
        }
        self.ledger
            .manifests
            .insert(digest.to_owned(), Claim::default());
        Ok(())
    }
}

pub(crate) fn location(answer: &Response) -> io::Result<String> {
    let value = answer
        .header("location")
        .ok_or_else(|| io::Error::other("an upload without a location"))?;
    // Ours are relative; others' name the host.
    let path = value
        .strip_prefix("http://")
        .and_then(|rest| rest.find('/').map(|at| &rest[at..]));
    Ok(path.unwrap_or(value).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_a_loss_and_an_open_question_is_not() {
        let a = Some("a".to_owned());
        let claim = Claim {
            acknowledged: a.clone(),
            maybe: None,
        };
        assert!(claim.judge("t", Some("a")).is_none());
        assert!(claim.judge("t", None).is_some());
        assert!(claim.judge("t", Some("b")).is_some());
        let moving = Claim {
            acknowledged: a.clone(),
            maybe: Some(Outcome::Is("b".to_owned())),
        };
        assert!(moving.judge("t", Some("a")).is_none() && moving.judge("t", Some("b")).is_none());
        assert!(moving.judge("t", None).is_some());
        let going = Claim {
            acknowledged: a,
            maybe: Some(Outcome::Gone),
        };
        assert!(going.judge("t", None).is_none());
        assert!(Claim::default().judge("t", Some("a")).is_some());
    }
}
