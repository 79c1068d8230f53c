//! Pushing, and the judgement: a manifest that comes while every promise on its blobs holds must be taken.

use std::time::Instant;

use e2e::digest;
use serde_json::json;

use super::{CONFIG, INDEX, Kind, LAYER, MANIFEST, Worker, refused};
use crate::load::location;
use crate::soak::model::{Blob, Manifest};

impl Worker {
    /// Sees to it that a repository has a blob; until when it is promised to have it.
    pub(super) fn provide(
        &mut self,
        repository: &str,
        blob: &Blob,
        bytes: &[u8],
    ) -> anyhow::Result<Instant> {
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

    pub(super) fn open(&mut self, target: &str) -> anyhow::Result<String> {
        let answer = self.send("POST", target, &[], &[])?;
        if answer.status() != 202 {
            return Err(refused("POST of an upload", &answer));
        }
        Ok(location(&answer)?)
    }

    pub(super) fn piece(&mut self, place: &str, at: usize, bytes: &[u8]) -> anyhow::Result<String> {
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
    pub(super) fn push(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn push_again(&mut self, repository: &str) -> anyhow::Result<()> {
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

    pub(super) fn index(&mut self, repository: &str) -> anyhow::Result<()> {
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

    pub(super) fn referrer(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn judge_push(
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
    pub(super) fn move_tag(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn revive(&mut self, repository: &str) -> anyhow::Result<()> {
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
