//! One worker of the soak: it pushes, mounts, asks, moves, deletes and reads, and judges each answer.
//!
//! What a worker does next is drawn from its own random numbers, so a run is told again by its seed, as far as servers
//! and threads allow.

mod push;
mod read;
mod remove;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use e2e::digest;
use e2e::http::{Connection, Response};

pub(super) use super::model::Blob;
use super::model::Repository;
use crate::load::Random;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const REPOSITORIES: &str = "/api/v1/repositories/";

/// How many manifests a worker keeps in a repository before it deletes more than it pushes.
const MANY: usize = 5;

/// What all workers share.
pub(super) struct Shared {
    pub(super) urls: Vec<String>,
    /// Layers that everybody pushes.
    pub(super) pool: Vec<(Blob, Vec<u8>)>,
    /// Repositories that everybody pushes into.
    pub(super) repositories: Vec<String>,
    /// Put before the names of repositories that one worker has for itself.
    pub(super) prefix: String,
    pub(super) lease: Duration,
    /// Events still to be done.
    pub(super) left: AtomicU64,
    pub(super) stop: AtomicBool,
}

/// What a worker did and found.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// How often it did what.
    pub(super) events: BTreeMap<&'static str, u64>,
    /// Requests sent.
    pub(super) requests: u64,
    /// Manifests pushed while every promise held, and those that came later than a promise.
    pub(super) judged: u64,
    pub(super) late: u64,
    /// What must not be.
    pub(super) wrong: Vec<Wrong>,
}

/// Something that must not be.
#[derive(Clone, Debug)]
pub(super) struct Wrong {
    pub(super) kind: Kind,
    pub(super) text: String,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A manifest was refused for a blob that was promised.
    Unknown,
    /// Something that was acknowledged is not there or not as it was.
    Lost,
    /// Any other answer that a right request may not get.
    Answer,
}

impl Kind {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Unknown => "MANIFEST_BLOB_UNKNOWN within a lease",
            Self::Lost => "lost or unreadable",
            Self::Answer => "wrong answer",
        }
    }
}

/// A worker with what it knows.
pub(super) struct Worker {
    shared: Arc<Shared>,
    id: u64,
    random: Random,
    urls: Vec<String>,
    connections: Vec<Option<Connection>>,
    generation: u64,
    pub(super) repositories: BTreeMap<String, Repository>,
    pub(super) report: Report,
    made: u64,
    /// The target of the last write of this turn.
    written: Option<String>,
    /// Whether the server deletes repositories.
    pub(super) deletes_repositories: bool,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, id: u64, seed: u64) -> Self {
        let mut repositories: BTreeMap<String, Repository> = shared
            .repositories
            .iter()
            .map(|name| (name.clone(), Repository::default()))
            .collect();
        for own in 0..2 {
            let name = format!("{}own{id}/app{own}", shared.prefix);
            repositories.insert(name, Repository::default());
        }
        Self {
            id,
            urls: shared.urls.clone(),
            generation: 0,
            random: Random(seed.wrapping_mul(7919).wrapping_add(id)),
            connections: shared.urls.iter().map(|_| None).collect(),
            repositories,
            report: Report::default(),
            made: 0,
            written: None,
            deletes_repositories: true,
            shared,
        }
    }

    /// Works until all events are done. Every request must be answered rightly.
    pub(super) fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Relaxed)
            && self.shared.left.load(Ordering::Relaxed) > 0
        {
            let name = self.pick_repository();
            if let Err(error) = self.turn(&name) {
                self.wrong(Kind::Answer, format!("{error:#}"));
                self.hang_up();
            }
            if self.report.wrong.len() > 20 {
                self.shared.stop.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Works until told to stop or until nobody answers any more. Servers may die: of what the last write of a turn that
    /// failed touches, nothing is known from then on.
    pub(super) fn run_among_deaths(&mut self) {
        let mut misses = 0;
        while !self.shared.stop.load(Ordering::Relaxed) && misses < 6 {
            let name = self.pick_repository();
            self.written = None;
            let Err(error) = self.turn(&name) else {
                misses = 0;
                continue;
            };
            misses += 1;
            if error
                .downcast_ref::<Refused>()
                .is_some_and(|refused| refused.status < 500)
            {
                self.wrong(Kind::Answer, format!("{error:#}"));
            }
            self.hang_up();
            self.doubt();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Forgets what the last write of this turn may have changed or not.
    fn doubt(&mut self) {
        let Some(target) = self.written.take() else {
            return;
        };
        if let Some(repository) = target.strip_prefix(REPOSITORIES) {
            *self.known(repository) = Repository::default();
        } else if let Some((repository, reference)) = target
            .strip_prefix("/v2/")
            .and_then(|path| path.split_once("/manifests/"))
        {
            self.known(repository).doubted(reference);
        } else {
            return;
        }
        // Its tags may be there or not; other names are used from now on.
        self.generation += 1;
    }

    /// Closes all connections: what one holds after an error nobody knows, and the server closes idle ones.
    pub(super) fn hang_up(&mut self) {
        self.connections.iter_mut().for_each(|open| *open = None);
    }

    /// Talks to these servers from now on.
    pub(super) fn talk_to(&mut self, urls: &[String]) {
        self.urls = urls.to_vec();
        self.connections = urls.iter().map(|_| None).collect();
    }

    fn own(&self, number: u64) -> String {
        format!("{}own{}/app{number}", self.shared.prefix, self.id)
    }

    fn turn(&mut self, name: &str) -> anyhow::Result<()> {
        let many = self
            .repositories
            .get(name)
            .is_some_and(|known| known.tags.len() > MANY);
        match self.random.below(100) {
            _ if many => self.delete(name),
            0..30 => self.push(name),
            30..36 => self.push_again(name),
            36..41 => self.index(name),
            41..47 => self.referrer(name),
            47..59 => self.move_tag(name),
            59..64 => self.revive(name),
            64..72 => self.delete(name),
            72..78 => self.replace(name),
            78..80 => self.give_up(name),
            80..81 => self.delete_blob(),
            81..82 => self.delete_repository(),
            _ => self.read(name),
        }
    }

    fn pick_repository(&mut self) -> String {
        let at = self.random.below(self.repositories.len() as u64);
        let at = usize::try_from(at).unwrap_or(0);
        self.repositories
            .keys()
            .nth(at)
            .cloned()
            .unwrap_or_default()
    }

    fn known(&mut self, repository: &str) -> &mut Repository {
        self.repositories.entry(repository.to_owned()).or_default()
    }

    fn event(&mut self, what: &'static str) {
        *self.report.events.entry(what).or_default() += 1;
        // It may go below zero by as many as there are workers.
        let left = &self.shared.left;
        let _ = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        });
    }

    fn wrong(&mut self, kind: Kind, text: String) {
        self.report.wrong.push(Wrong { kind, text });
    }

    fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> anyhow::Result<Response> {
        let count = self.connections.len() as u64;
        let at = usize::try_from(self.random.below(count)).unwrap_or(0);
        self.report.requests += 1;
        if matches!(method, "PUT" | "DELETE") {
            self.written = Some(target.to_owned());
        }
        let url = &self.urls[at];
        let slot = &mut self.connections[at];
        let connection = match slot {
            Some(open) => open,
            None => slot.insert(Connection::open(url)?),
        };
        let answer = connection
            .request(method, target, headers, body)
            .with_context(|| format!("{method} {target} at {url}"))?;
        // The server says so before it stops, and after some refusals.
        if answer.header("connection") == Some("close") {
            *slot = None;
        }
        Ok(answer)
    }

    /// A layer: mostly one of everybody's, else one that nobody has seen.
    fn layer(&mut self) -> (Blob, Vec<u8>) {
        if self.random.below(4) > 0 {
            let at = self.random.below(self.shared.pool.len() as u64);
            return self.shared.pool[usize::try_from(at).unwrap_or(0)].clone();
        }
        let length = 40 + usize::try_from(self.random.below(1500)).unwrap_or(0);
        content(&mut self.random, length)
    }

    fn new_tag(&mut self) -> String {
        // Names come again, so that a tag is made where it was deleted.
        format!("w{}-{}-{}", self.id, self.generation, self.random.below(40))
    }

    fn one_of<'a, T: Clone + 'a>(
        &mut self,
        mut all: impl ExactSizeIterator<Item = &'a T>,
    ) -> Option<T> {
        let at = self.random.below(all.len() as u64);
        all.nth(usize::try_from(at).unwrap_or(0)).cloned()
    }
}

/// An answer that a right request may not get.
#[derive(Debug)]
struct Refused {
    what: &'static str,
    status: u16,
    text: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} {}", self.what, self.status, self.text)
    }
}

impl std::error::Error for Refused {}

fn refused(what: &'static str, answer: &Response) -> anyhow::Error {
    let refused = Refused {
        what,
        status: answer.status(),
        text: short(answer),
    };
    refused.into()
}

fn short(answer: &Response) -> String {
    answer.text().chars().take(300).collect()
}

/// A blob of random bytes.
pub(super) fn content(random: &mut Random, length: usize) -> (Blob, Vec<u8>) {
    let bytes = random.bytes(length);
    let blob = Blob {
        digest: digest(&bytes),
        size: bytes.len(),
    };
    (blob, bytes)
}
