//! Deleting: tags, manifests, blobs, repositories and uploads; what was deleted must be gone at once.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Kind, MANIFEST, REPOSITORIES, Worker, content, refused};
use crate::soak::model::{Manifest, Repository};

impl Worker {
    /// Deletes a tag, or a manifest with its tags.
    pub(super) fn delete(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn replace(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn give_up(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(super) fn delete_blob(&mut self) -> anyhow::Result<()> {
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
    pub(super) fn delete_repository(&mut self) -> anyhow::Result<()> {
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

    /// Deletes every tag.
    pub(in crate::soak) fn delete_all(&mut self) -> anyhow::Result<()> {
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
}
