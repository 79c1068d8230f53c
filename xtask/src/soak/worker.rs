//! One worker of the soak: it pushes, mounts, asks, moves, deletes and reads, and judges each answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use e2e::digest;
use e2e::http::{Connection, Response};
use serde_json::json;

pub(super) use super::model::Blob;
use super::model::{Manifest, Repository};
use crate::load::{Random, location};

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

    /// Sees to it that a repository has a blob; until when it is promised to have it.
    fn provide(&mut self, repository: &str, blob: &Blob, bytes: &[u8]) -> anyhow::Result<Instant> {
        let lease = self.shared.lease;
        let way = self.random.below(10);
        if way < 6 {
            let asked = Instant::now();
            self.event("HEAD of a blob");
            let target = format!("/v2/{repository}/blobs/{}", blob.digest);
            let answer = self.send("HEAD", &target, &[], &[])?;
            match answer.status() {
                // What was told to be there stays for half a lease at least.
                200 => return Ok(asked + lease / 2),
                404 => {}
                _ => return Err(refused("HEAD of a blob", &answer)),
            }
        }
        let asked = Instant::now();
        let target = format!("/v2/{repository}/blobs/uploads/");
        if way.is_multiple_of(3) {
            let from = self.pick_repository();
            self.event("mount");
            let query = format!("?mount={}&from={from}", blob.digest);
            let answer = self.send("POST", &format!("{target}{query}"), &[], &[])?;
            return match answer.status() {
                201 => Ok(asked + lease),
                202 => {
                    let asked = Instant::now();
                    self.event("upload after a refused mount");
                    self.finish(&location(&answer)?, blob, bytes)?;
                    Ok(asked + lease)
                }
                _ => Err(refused("mount", &answer)),
            };
        }
        if way % 3 == 1 {
            self.event("upload in one request");
            let query = format!("?digest={}", blob.digest);
            let headers = [("Content-Type", "application/octet-stream")];
            let answer = self.send("POST", &format!("{target}{query}"), &headers, bytes)?;
            if answer.status() != 201 {
                return Err(refused("POST of a blob", &answer));
            }
            return Ok(asked + lease);
        }
        self.event("upload in pieces");
        let mut place = self.open(&target)?;
        let cut = bytes.len() / 2;
        place = self.piece(&place, 0, &bytes[..cut])?;
        // The next request may well go to another replica.
        place = self.piece(&place, cut, &bytes[cut..])?;
        let asked = Instant::now();
        self.finish(&place, blob, &[])?;
        Ok(asked + lease)
    }

    fn open(&mut self, target: &str) -> anyhow::Result<String> {
        let answer = self.send("POST", target, &[], &[])?;
        if answer.status() != 202 {
            return Err(refused("POST of an upload", &answer));
        }
        Ok(location(&answer)?)
    }

    fn piece(&mut self, place: &str, at: usize, bytes: &[u8]) -> anyhow::Result<String> {
        let range = format!("{at}-{}", at + bytes.len() - 1);
        let headers = [
            ("Content-Type", "application/octet-stream"),
            ("Content-Range", range.as_str()),
        ];
        let answer = self.send("PATCH", place, &headers, bytes)?;
        if answer.status() != 202 {
            return Err(refused("PATCH", &answer));
        }
        Ok(location(&answer)?)
    }

    fn finish(&mut self, place: &str, blob: &Blob, bytes: &[u8]) -> anyhow::Result<()> {
        let separator = if place.contains('?') { '&' } else { '?' };
        let target = format!("{place}{separator}digest={}", blob.digest);
        let headers = [("Content-Type", "application/octet-stream")];
        let answer = self.send("PUT", &target, &headers, bytes)?;
        if answer.status() != 201 {
            return Err(refused("PUT of a blob", &answer));
        }
        Ok(())
    }

    /// A push as clients make it.
    fn push(&mut self, repository: &str) -> anyhow::Result<()> {
        let mut until = Vec::new();
        let mut blobs = Vec::new();
        for _ in 0..=self.random.below(4) {
            let (blob, bytes) = self.layer();
            if blobs.contains(&blob) {
                continue;
            }
            until.push(self.provide(repository, &blob, &bytes)?);
            blobs.push(blob);
        }
        self.made += 1;
        let config = json!({"worker": self.id, "made": self.made, "seed": self.random.next()});
        let config = config.to_string().into_bytes();
        let blob = Blob {
            digest: digest(&config),
            size: config.len(),
        };
        until.push(self.provide(repository, &blob, &config)?);
        let manifest = image(&blob, &blobs, None);
        let tag = self.new_tag();
        self.judge_push(repository, manifest, Some(&tag), &until)
    }

    /// The same manifest again, after it was deleted or released.
    fn push_again(&mut self, repository: &str) -> anyhow::Result<()> {
        let Some(manifest) = self.known(repository).buried.pop() else {
            return self.push(repository);
        };
        let mut until = Vec::new();
        for blob in &manifest.blobs {
            let bytes = self
                .shared
                .pool
                .iter()
                .find(|(known, _)| known == blob)
                .map(|(_, bytes)| bytes.clone());
            if let Some(bytes) = bytes {
                until.push(self.provide(repository, blob, &bytes)?);
                continue;
            }
            // Its bytes are not kept here: it is there, or this manifest cannot be made again.
            let asked = Instant::now();
            self.event("HEAD of a blob");
            let target = format!("/v2/{repository}/blobs/{}", blob.digest);
            let answer = self.send("HEAD", &target, &[], &[])?;
            match answer.status() {
                200 => until.push(asked + self.shared.lease / 2),
                404 => return Ok(()),
                _ => return Err(refused("HEAD of a blob", &answer)),
            }
        }
        let tag = self.new_tag();
        self.judge_push(repository, manifest, Some(&tag), &until)
    }

    fn index(&mut self, repository: &str) -> anyhow::Result<()> {
        let of_images: Vec<_> = self
            .known(repository)
            .manifests
            .iter()
            .filter(|(_, manifest)| manifest.media_type == MANIFEST)
            .map(|(digest, manifest)| (digest.clone(), manifest.body.len()))
            .take(2)
            .collect();
        if of_images.len() < 2 {
            return self.push(repository);
        }
        self.made += 1;
        let entries: Vec<_> = of_images
            .iter()
            .map(|(digest, size)| json!({"mediaType": MANIFEST, "digest": digest, "size": size}))
            .collect();
        let body = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": entries,
            "annotations": {"worker": self.id.to_string(), "made": self.made.to_string()},
        });
        let manifest = Manifest {
            body: body.to_string(),
            media_type: INDEX,
            blobs: Vec::new(),
            children: of_images.into_iter().map(|(digest, _)| digest).collect(),
            subject: None,
        };
        let tag = self.new_tag();
        self.judge_push(repository, manifest, Some(&tag), &[])
    }

    fn referrer(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        let Some(subject) = self.one_of(known.manifests.keys()) else {
            return self.push(repository);
        };
        let descriptor = known.manifests.get(&subject).map(|manifest| {
            json!({"mediaType": manifest.media_type, "digest": subject, "size": manifest.body.len()})
        });
        let (blob, bytes) = self.layer();
        let until = self.provide(repository, &blob, &bytes)?;
        let config = Blob {
            digest: digest(b"{}"),
            size: 2,
        };
        let until = [until, self.provide(repository, &config, b"{}")?];
        self.made += 1;
        let mut manifest = image(
            &config,
            &[blob],
            descriptor.map(|it| (it, self.id, self.made)),
        );
        manifest.subject = Some(subject);
        self.judge_push(repository, manifest, None, &until)
    }

    /// Pushes a manifest and judges the answer by what was promised.
    fn judge_push(
        &mut self,
        repository: &str,
        manifest: Manifest,
        tag: Option<&str>,
        until: &[Instant],
    ) -> anyhow::Result<()> {
        let wanted = digest(manifest.body.as_bytes());
        let reference = tag.unwrap_or(&wanted);
        let target = format!("/v2/{repository}/manifests/{reference}");
        self.event("PUT of a manifest");
        // Before an answer, which may not come: it may be there from now on.
        self.known(repository)
            .named
            .extend(manifest.children.iter().cloned());
        let headers = [("Content-Type", manifest.media_type)];
        let answer = self.send("PUT", &target, &headers, manifest.body.as_bytes())?;
        let now = Instant::now();
        let in_time = until.iter().all(|until| now < *until);
        if in_time {
            self.report.judged += 1;
        } else {
            self.report.late += 1;
        }
        match answer.status() {
            201 => {
                self.known(repository).pushed(&wanted, manifest, tag);
                Ok(())
            }
            404 if !in_time => Ok(()),
            404 => {
                self.wrong(Kind::Unknown, format!("PUT {target}: {}", answer.text()));
                Ok(())
            }
            _ => Err(refused("PUT of a manifest", &answer)),
        }
    }

    /// Moves a tag to a manifest that is kept.
    fn move_tag(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        let (Some(tag), Some(to)) = (
            self.one_of(known.tags.keys()),
            self.one_of(known.manifests.keys()),
        ) else {
            return self.push(repository);
        };
        let Some(manifest) = known.manifests.get(&to) else {
            return Ok(());
        };
        self.event("move of a tag");
        let target = format!("/v2/{repository}/manifests/{tag}");
        let headers = [("Content-Type", manifest.media_type)];
        let answer = self.send("PUT", &target, &headers, manifest.body.as_bytes())?;
        if answer.status() != 201 {
            // All of it is kept by a tag of ours, so nothing may be missing.
            let kind = if answer.status() == 404 {
                Kind::Unknown
            } else {
                Kind::Answer
            };
            self.wrong(
                kind,
                format!("PUT {target}: {} {}", answer.status(), answer.text()),
            );
            return Ok(());
        }
        let manifest = manifest.clone();
        self.known(repository).pushed(&to, manifest, Some(&tag));
        Ok(())
    }

    /// Gives a manifest that was released a tag again, after asking whether it is still there.
    fn revive(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        let released: Vec<_> = known
            .released
            .iter()
            .filter(|(_, manifest)| manifest.stands_alone())
            .cloned()
            .collect();
        let Some((wanted, manifest)) = self.one_of(released.iter()) else {
            return self.move_tag(repository);
        };
        self.event("HEAD of a manifest");
        let asked = Instant::now();
        let target = format!("/v2/{repository}/manifests/{wanted}");
        let answer = self.send("HEAD", &target, &[("Accept", MANIFEST)], &[])?;
        match answer.status() {
            200 => {
                let tag = self.new_tag();
                let until = asked + self.shared.lease / 2;
                self.judge_push(repository, manifest, Some(&tag), &[until])
            }
            404 => {
                self.known(repository).collected(&wanted);
                Ok(())
            }
            _ => Err(refused("HEAD of a manifest", &answer)),
        }
    }

    /// Deletes a tag, or a manifest with its tags.
    fn delete(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        let Some(tag) = self.one_of(known.tags.keys()) else {
            return self.push(repository);
        };
        if self.random.below(3) > 0 {
            self.event("delete of a tag");
            let target = format!("/v2/{repository}/manifests/{tag}");
            let answer = self.send("DELETE", &target, &[], &[])?;
            if answer.status() != 202 {
                return Err(refused("DELETE of a tag", &answer));
            }
            self.known(repository).untagged(&tag);
            return Ok(());
        }
        let Some(wanted) = known.tags.get(&tag) else {
            return Ok(());
        };
        self.event("delete of a manifest");
        let target = format!("/v2/{repository}/manifests/{wanted}");
        let answer = self.send("DELETE", &target, &[], &[])?;
        match answer.status() {
            202 => {
                self.known(repository).deleted(wanted);
                Ok(())
            }
            // An index names it, maybe one that is released and not collected yet.
            405 | 409 if known.named.contains(wanted) => Ok(()),
            _ => Err(refused("DELETE of a manifest", &answer)),
        }
    }

    /// Puts a successor in the place of an image, as a client does that asks first, finds the layers there, deletes the old
    /// one, and pushes the new one a moment later. Between the two nothing but the promise keeps the layers.
    fn replace(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        let images: Vec<_> = known
            .tags
            .iter()
            .filter(|(_, digest)| {
                let manifest = known.manifests.get(*digest);
                manifest.is_some_and(|it| it.stands_alone() && it.media_type == MANIFEST)
            })
            .collect();
        let Some((tag, old)) = self.one_of(images.iter()) else {
            return self.push(repository);
        };
        let Some(manifest) = known.manifests.get(old) else {
            return Ok(());
        };
        let mut until = Vec::new();
        for blob in &manifest.blobs {
            let asked = Instant::now();
            self.event("HEAD of a blob");
            let target = format!("/v2/{repository}/blobs/{}", blob.digest);
            let answer = self.send("HEAD", &target, &[], &[])?;
            if answer.status() != 200 {
                // A tag of ours keeps it.
                self.wrong(Kind::Lost, format!("HEAD {target}: {}", answer.status()));
                return Ok(());
            }
            until.push(asked + self.shared.lease / 2);
        }
        self.event("delete of a manifest");
        let target = format!("/v2/{repository}/manifests/{old}");
        let answer = self.send("DELETE", &target, &[], &[])?;
        match answer.status() {
            202 => self.known(repository).deleted(old),
            405 | 409 if known.named.contains(old) => {}
            _ => return Err(refused("DELETE of a manifest", &answer)),
        }
        // Time for the collector, if it would take what it must not.
        let most = u64::try_from(self.shared.lease.as_millis() * 2 / 5).unwrap_or(0);
        std::thread::sleep(Duration::from_millis(self.random.below(most)));
        self.made += 1;
        let json: serde_json::Value = serde_json::from_str(&manifest.body)?;
        let mut body = json;
        body["annotations"] = json!({"worker": self.id.to_string(), "made": self.made.to_string()});
        let successor = Manifest {
            body: body.to_string(),
            ..manifest.clone()
        };
        self.judge_push(repository, successor, Some(tag), &until)
    }

    /// An upload that is given up.
    fn give_up(&mut self, repository: &str) -> anyhow::Result<()> {
        self.event("upload given up");
        let place = self.open(&format!("/v2/{repository}/blobs/uploads/"))?;
        let (_, bytes) = self.layer();
        let place = self.piece(&place, 0, &bytes)?;
        let answer = self.send("DELETE", &place, &[], &[])?;
        if answer.status() != 204 {
            return Err(refused("DELETE of an upload", &answer));
        }
        Ok(())
    }

    /// Deletes a blob that nobody names; only in an own repository, because it overrides every promise.
    fn delete_blob(&mut self) -> anyhow::Result<()> {
        let repository = self.own(0);
        let (blob, bytes) = content(&mut self.random, 60);
        self.provide(&repository, &blob, &bytes)?;
        self.event("delete of a blob");
        let target = format!("/v2/{repository}/blobs/{}", blob.digest);
        let answer = self.send("DELETE", &target, &[], &[])?;
        if answer.status() != 202 {
            return Err(refused("DELETE of a blob", &answer));
        }
        let answer = self.send("HEAD", &target, &[], &[])?;
        if answer.status() != 404 {
            return Err(refused("a deleted blob", &answer));
        }
        Ok(())
    }

    /// Deletes an own repository with everything in it.
    fn delete_repository(&mut self) -> anyhow::Result<()> {
        let repository = self.own(1);
        let known = self.known(&repository).clone();
        if !self.deletes_repositories || known.tags.is_empty() {
            return self.push(&repository);
        }
        self.event("delete of a repository");
        let target = format!("{REPOSITORIES}{repository}");
        let answer = self.send("DELETE", &target, &[], &[])?;
        match answer.status() {
            202 | 204 => {}
            404 | 405 => {
                self.deletes_repositories = false;
                return Ok(());
            }
            _ => return Err(refused("DELETE of a repository", &answer)),
        }
        let after = Repository {
            gone: known.tags.keys().cloned().collect(),
            ..Repository::default()
        };
        self.repositories.insert(repository.clone(), after);
        if let Some(tag) = self.one_of(known.tags.keys()) {
            let target = format!("/v2/{repository}/manifests/{tag}");
            let answer = self.send("HEAD", &target, &[("Accept", MANIFEST)], &[])?;
            if answer.status() != 404 {
                return Err(refused("a tag of a deleted repository", &answer));
            }
        }
        Ok(())
    }

    /// Reads a tag, and something of what it stands for.
    fn read(&mut self, repository: &str) -> anyhow::Result<()> {
        let known = self.known(repository).clone();
        if self.random.below(8) == 0 {
            if let Some(tag) = self.one_of(known.gone.iter()) {
                self.event("read of a deleted tag");
                let target = format!("/v2/{repository}/manifests/{tag}");
                let answer = self.send("GET", &target, &[("Accept", MANIFEST)], &[])?;
                if answer.status() != 404 {
                    self.wrong(
                        Kind::Lost,
                        format!("{target} was deleted: {}", answer.status()),
                    );
                }
            }
            return Ok(());
        }
        let (Some(tag), Some(wanted)) = (
            self.one_of(known.tags.keys()),
            self.one_of(known.manifests.keys()),
        ) else {
            return self.push(repository);
        };
        self.event("read");
        if let Some(to) = known.tags.get(&tag) {
            self.read_manifest(repository, &tag, to)?;
        }
        self.read_manifest(repository, &wanted, &wanted)?;
        let Some(manifest) = known.manifests.get(&wanted) else {
            return Ok(());
        };
        if let Some(blob) = self.one_of(manifest.blobs.iter()) {
            self.read_blob(repository, &blob)?;
        }
        if let Some(subject) = &manifest.subject {
            let target = format!("/v2/{repository}/referrers/{subject}");
            let answer = self.send("GET", &target, &[], &[])?;
            if answer.status() != 200 || !answer.text().contains(wanted.as_str()) {
                self.wrong(
                    Kind::Lost,
                    format!(
                        "{target} does not name {wanted}: {} {}",
                        answer.status(),
                        answer.text()
                    ),
                );
            }
        }
        Ok(())
    }

    fn read_manifest(
        &mut self,
        repository: &str,
        reference: &str,
        wanted: &str,
    ) -> anyhow::Result<()> {
        let target = format!("/v2/{repository}/manifests/{reference}");
        let accept = format!("{MANIFEST}, {INDEX}");
        let answer = self.send("GET", &target, &[("Accept", &accept)], &[])?;
        let got = digest(&answer.body);
        if answer.status() != 200 || got != wanted {
            self.wrong(
                Kind::Lost,
                format!(
                    "{target}: wanted {wanted}, got {} {got} {}",
                    answer.status(),
                    short(&answer)
                ),
            );
        }
        Ok(())
    }

    fn read_blob(&mut self, repository: &str, blob: &Blob) -> anyhow::Result<()> {
        let target = format!("/v2/{repository}/blobs/{}", blob.digest);
        let answer = self.send("GET", &target, &[], &[])?;
        if answer.status() != 200 || digest(&answer.body) != blob.digest {
            self.wrong(
                Kind::Lost,
                format!("{target}: {} {}", answer.status(), short(&answer)),
            );
        }
        Ok(())
    }

    /// Reads everything that must be readable, and each tag that must not; how many things it looked for.
    pub(super) fn read_all(&mut self) -> anyhow::Result<u64> {
        let mut looked = 0;
        for (name, known) in self.repositories.clone() {
            for (tag, to) in &known.tags {
                self.read_manifest(&name, tag, to)?;
                looked += 1;
            }
            for wanted in known.manifests.keys() {
                self.read_manifest(&name, wanted, wanted)?;
                looked += 1;
            }
            for blob in known.blobs() {
                self.read_blob(&name, &blob)?;
                looked += 1;
            }
            for tag in &known.gone {
                let target = format!("/v2/{name}/manifests/{tag}");
                let answer = self.send("HEAD", &target, &[("Accept", MANIFEST)], &[])?;
                if answer.status() != 404 {
                    self.wrong(
                        Kind::Lost,
                        format!("{target} was deleted: {}", answer.status()),
                    );
                }
                looked += 1;
            }
        }
        Ok(looked)
    }

    /// Takes in what refers to something that is kept and was released before: a subject that came back keeps what still
    /// refers to it.
    pub(super) fn adopt(&mut self) -> anyhow::Result<()> {
        for name in self.repositories.keys().cloned().collect::<Vec<_>>() {
            let mut open: Vec<String> = self.known(&name).manifests.keys().cloned().collect();
            while let Some(subject) = open.pop() {
                let answer =
                    self.send("GET", &format!("/v2/{name}/referrers/{subject}"), &[], &[])?;
                if answer.status() != 200 {
                    return Err(refused("GET of referrers", &answer));
                }
                for entry in answer.json()["manifests"].as_array().into_iter().flatten() {
                    let found = entry["digest"].as_str().unwrap_or_default().to_owned();
                    if self.known(&name).manifests.contains_key(&found) {
                        continue;
                    }
                    let target = format!("/v2/{name}/manifests/{found}");
                    let answer = self.send("GET", &target, &[("Accept", MANIFEST)], &[])?;
                    if answer.status() != 200 {
                        return Err(refused("GET of a referrer", &answer));
                    }
                    let manifest = parsed(&answer, &subject);
                    self.known(&name).manifests.insert(found.clone(), manifest);
                    open.push(found);
                }
            }
        }
        Ok(())
    }

    /// Deletes every tag.
    pub(super) fn delete_all(&mut self) -> anyhow::Result<()> {
        for (name, known) in self.repositories.clone() {
            for tag in known.tags.keys() {
                let target = format!("/v2/{name}/manifests/{tag}");
                let answer = self.send("DELETE", &target, &[], &[])?;
                if answer.status() != 202 {
                    return Err(refused("DELETE of a tag", &answer));
                }
                self.known(&name).untagged(tag);
            }
        }
        Ok(())
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

/// A referrer as it was read.
fn parsed(answer: &Response, subject: &str) -> Manifest {
    let json = answer.json();
    let mut blobs: Vec<Blob> = Vec::new();
    for descriptor in
        std::iter::once(&json["config"]).chain(json["layers"].as_array().into_iter().flatten())
    {
        let blob = Blob {
            digest: descriptor["digest"].as_str().unwrap_or_default().to_owned(),
            size: usize::try_from(descriptor["size"].as_u64().unwrap_or_default()).unwrap_or(0),
        };
        if !blobs.contains(&blob) {
            blobs.push(blob);
        }
    }
    Manifest {
        body: answer.text(),
        media_type: MANIFEST,
        blobs,
        children: Vec::new(),
        subject: Some(subject.to_owned()),
    }
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

fn image(
    config: &Blob,
    layers: &[Blob],
    subject: Option<(serde_json::Value, u64, u64)>,
) -> Manifest {
    let descriptor = |media_type: &str, blob: &Blob| json!({"mediaType": media_type, "digest": blob.digest, "size": blob.size});
    let layer = |blob: &Blob| descriptor(LAYER, blob);
    let mut body = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, config),
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    });
    if let Some((subject, worker, made)) = subject {
        body["artifactType"] = json!("application/vnd.example.evidence");
        body["subject"] = subject;
        body["annotations"] = json!({"worker": worker.to_string(), "made": made.to_string()});
    }
    let mut blobs = vec![config.clone()];
    blobs.extend(layers.iter().filter(|blob| *blob != config).cloned());
    Manifest {
        body: body.to_string(),
        media_type: MANIFEST,
        blobs,
        children: Vec::new(),
        subject: None,
    }
}
