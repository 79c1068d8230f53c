//! Reading: what was acknowledged must be there, byte for byte, and what was deleted must not.

use e2e::digest;
use e2e::http::Response;

use super::{INDEX, Kind, MANIFEST, Worker, refused, short};
use crate::soak::model::{Blob, Manifest};

impl Worker {
    /// Reads a tag, and something of what it stands for.
    pub(super) fn read(&mut self, repository: &str) -> anyhow::Result<()> {
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
    pub(in crate::soak) fn read_all(&mut self) -> anyhow::Result<u64> {
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
    pub(in crate::soak) fn adopt(&mut self) -> anyhow::Result<()> {
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
