//! The rolling upgrade: the program before the newest schema goes on on the schema after it.
//!
//! The previous program is built from the commit before the newest file of `schema/` was added, in a work tree of its own.
//! It makes data, the new program migrates it, **the previous program serves and writes on the new schema**, and the new
//! one takes over again. After each change of programs everything that was ever pushed is read back.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use e2e::cluster::{Cluster, Storage};
use e2e::server::Options as ServerOptions;
use e2e::{Scratch, Server, digest, http, image, objects};
use serde_json::json;

use crate::shell;

/// What the proof runs on.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The previous program, instead of building it.
    #[arg(long, value_name = "PROGRAM")]
    previous: Option<PathBuf>,
    /// The commit of the previous program, instead of the one before the newest schema.
    #[arg(long, value_name = "COMMIT", conflicts_with = "previous")]
    commit: Option<String>,
    /// The new program, instead of building it.
    #[arg(long, value_name = "PROGRAM")]
    program: Option<PathBuf>,
}

/// Runs the proof on every run mode that the previous program has.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let previous = match &options.previous {
        Some(program) => std::path::absolute(program)?,
        None => build_previous(options.commit.as_deref())?,
    };
    let new = match &options.program {
        Some(program) => std::path::absolute(program)?,
        None => shell::build(false, &[])?,
    };
    println!("embedded:");
    rolling(&previous, &new, None)?;
    if !knows_clusters(&previous)? {
        println!("cluster: not run, the previous program has no cluster mode");
        return Ok(true);
    }
    println!("cluster:");
    let cluster = Cluster::start(objects::Kind::Minio);
    rolling(&previous, &new, Some(&cluster.storage()))?;
    Ok(true)
}

/// Builds the program of the commit before the newest schema; where it is.
fn build_previous(commit: Option<&str>) -> anyhow::Result<PathBuf> {
    let commit = if let Some(commit) = commit {
        commit.to_owned()
    } else {
        let added = git(&[
            "log",
            "--diff-filter=A",
            "--format=%H",
            "-1",
            "--",
            "crates/store/src/sql/schema/sqlite",
        ])?;
        ensure!(
            !added.is_empty(),
            "no commit added a schema: is the history whole?"
        );
        format!("{added}^")
    };
    let commit = git(&["rev-parse", "--verify", &format!("{commit}^{{commit}}")])?;
    let short = commit.get(..12).unwrap_or(&commit);
    println!("the previous program is that of {short}");
    let place = shell::target().join("upgrade");
    let program = place.join(format!("longshore-{short}"));
    // A commit never changes, so neither does its program.
    if program.is_file() {
        return Ok(program);
    }
    std::fs::create_dir_all(&place)?;
    let tree = place.join(short);
    // What a run that was broken off left behind.
    drop(std::fs::remove_dir_all(&tree));
    shell::succeed(
        shell::command("git")
            .args(["worktree", "add", "--force", "--detach"])
            .arg(&tree)
            .arg(&commit),
    )?;
    let built = shell::build_elsewhere(&tree, &program);
    let removed = shell::succeed(
        shell::command("git")
            .args(["worktree", "remove", "--force"])
            .arg(&tree),
    );
    built.and(removed)?;
    Ok(program)
}

fn git(words: &[&str]) -> anyhow::Result<String> {
    Ok(shell::read(shell::command("git").args(words))?
        .trim()
        .to_owned())
}

/// Whether a program takes a connection string, by what it says to one that is none.
fn knows_clusters(program: &Path) -> anyhow::Result<bool> {
    let output = shell::command(program)
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env(
            "LONGSHORE_STORAGE__DATABASE",
            "postgres://user@host:none/database",
        )
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(
        !output.status.success(),
        "a wrong connection string was not refused"
    );
    Ok(!String::from_utf8_lossy(&output.stderr).contains("unknown field"))
}

/// What was pushed and must be readable from then on.
#[derive(Default)]
struct Kept {
    /// Repository, tag or digest, exact bytes.
    manifests: Vec<(String, String, Vec<u8>)>,
    blobs: Vec<(String, String)>,
    subject: Option<(String, String, usize)>,
}

fn rolling(previous: &Path, new: &Path, storage: Option<&Storage>) -> anyhow::Result<()> {
    let scratch = Scratch::new();
    let data = scratch.join("data");
    let start = |program: &Path| {
        let mut options = ServerOptions::new(program.to_owned()).data(&data);
        options.storage = storage.cloned();
        options.start().map_err(anyhow::Error::msg)
    };
    let mut kept = Kept::default();

    let mut server = start(previous)?;
    kept.push(server.url(), "old");
    let mut upload = Upload::begin(server.url())?;
    upload.go_on(server.url(), b"begun by the previous program, ")?;
    stop(&mut server)?;
    println!("  the previous program made its data");

    let mut server = start(new)?;
    kept.check(server.url(), "after the migration")?;
    upload.go_on(server.url(), b"gone on with by the new one, ")?;
    kept.push(server.url(), "new");
    stop(&mut server)?;
    println!("  the new program migrated it");

    let mut server =
        start(previous).context("the previous program does not start on the new schema")?;
    kept.check(server.url(), "by the previous program on the new schema")?;
    kept.push(server.url(), "older");
    let gone = image::push_artifact(server.url(), "team/gone", "gone", TYPE, b"gone");
    for reference in ["gone", gone.as_str()] {
        let url = format!("{}/v2/team/gone/manifests/{reference}", server.url());
        let answer = http::request("DELETE", &url, &[], &[]);
        ensure!(
            answer.status() == 202,
            "DELETE of {reference}: {}",
            answer.text()
        );
    }
    kept.blobs
        .push(upload.finish(server.url(), b"ended by the previous")?);
    stop(&mut server)?;
    println!("  the previous program read and wrote on the new schema");

    let mut server = start(new)?;
    kept.check(server.url(), "by the new program in the end")?;
    kept.push(server.url(), "newest");
    kept.check(server.url(), "in the end")?;
    stop(&mut server)?;
    if storage.is_none() {
        for words in [&["verify-store"][..], &["audit", "verify"]] {
            let said = shell::read(shell::command(new).args(words).arg(&data))?;
            println!("  {}: {}", words.join(" "), said.trim());
        }
    }
    println!(
        "  {} manifests and {} blobs are all there",
        kept.manifests.len(),
        kept.blobs.len()
    );
    Ok(())
}

fn stop(server: &mut Server) -> anyhow::Result<()> {
    let status = server.stop();
    ensure!(status.success(), "the server ended with {status}");
    Ok(())
}

impl Kept {
    /// Pushes images, an index and a referrer; small blobs, large ones, and some that are there already.
    fn push(&mut self, registry: &str, label: &str) {
        for number in 0..3 {
            let repository = format!("team/app{number}");
            let mut layers = Vec::new();
            for (size, owner) in [(100, label), (70_000, label), (20_000, "shared")] {
                let bytes: Vec<u8> = format!("{owner}-{number}-")
                    .bytes()
                    .cycle()
                    .take(size)
                    .collect();
                let blob = image::push_blob(registry, &repository, &bytes);
                layers.push(image::descriptor("application/octet-stream", &blob, size));
                self.blobs.push((repository.clone(), blob));
            }
            let config = image::push_blob(registry, &repository, b"{}");
            let config = image::descriptor("application/vnd.oci.empty.v1+json", &config, 2);
            let plain = json!({"schemaVersion": 2, "mediaType": image::MANIFEST, "artifactType": TYPE,
                "config": config, "layers": layers});
            let (bytes, tag) = (plain.to_string().into_bytes(), format!("{label}-{number}"));
            let pushed = image::push_manifest(registry, &repository, &tag, image::MANIFEST, &bytes);
            image::push_manifest(registry, &repository, "latest", image::MANIFEST, &bytes);
            let subject = image::descriptor(image::MANIFEST, &pushed, bytes.len());
            let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [subject]});
            let index = index.to_string().into_bytes();
            let tag_of_index = format!("{tag}-index");
            image::push_manifest(registry, &repository, &tag_of_index, INDEX, &index);
            self.manifests
                .retain(|(at, known, _)| (at, known.as_str()) != (&repository, "latest"));
            self.manifests
                .push((repository.clone(), "latest".to_owned(), bytes.clone()));
            self.manifests
                .push((repository.clone(), pushed.clone(), bytes.clone()));
            self.manifests
                .push((repository.clone(), tag_of_index, index));
            if number == 0 {
                // All programs sign the same image.
                let (to, at, length) =
                    self.subject
                        .get_or_insert((repository.clone(), pushed, bytes.len()));
                let referrer = json!({"schemaVersion": 2, "mediaType": image::MANIFEST, "artifactType": TYPE,
                    "config": config, "layers": [], "annotations": {"by": label},
                    "subject": image::descriptor(image::MANIFEST, at, *length)});
                let referrer = referrer.to_string().into_bytes();
                let name = digest(&referrer);
                image::push_manifest(registry, to, &name, image::MANIFEST, &referrer);
                self.manifests.push((to.clone(), name, referrer));
            }
        }
    }

    /// Reads everything.
    fn check(&self, registry: &str, when: &str) -> anyhow::Result<()> {
        for (repository, reference, bytes) in &self.manifests {
            let url = format!("{registry}/v2/{repository}/manifests/{reference}");
            let accept = [("Accept", image::MANIFEST), ("Accept", INDEX)];
            let answer = http::request("GET", &url, &accept, &[]);
            if answer.status() != 200 || answer.body != *bytes {
                bail!(
                    "{when}: `{repository}` `{reference}` is not what was pushed: {}",
                    answer.text()
                );
            }
        }
        for (repository, blob) in &self.blobs {
            let answer = http::get(&format!("{registry}/v2/{repository}/blobs/{blob}"));
            if answer.status() != 200 || digest(&answer.body) != *blob {
                bail!("{when}: blob `{blob}` of `{repository}` is not what was pushed");
            }
        }
        if let Some((repository, subject, _)) = &self.subject {
            let answer = http::get(&format!("{registry}/v2/{repository}/referrers/{subject}"));
            let listed = answer.json()["manifests"].as_array().map_or(0, Vec::len);
            let pushed = self
                .manifests
                .iter()
                .filter(|(_, _, bytes)| String::from_utf8_lossy(bytes).contains("\"subject\""))
                .count();
            ensure!(
                listed == pushed,
                "{when}: {listed} referrers of {pushed} are listed"
            );
        }
        Ok(())
    }
}

/// An upload that several programs write.
struct Upload {
    location: String,
    bytes: Vec<u8>,
}

impl Upload {
    fn begin(registry: &str) -> anyhow::Result<Self> {
        let url = format!("{registry}/v2/team/app0/blobs/uploads/");
        let answer = http::request("POST", &url, &[], &[]);
        ensure!(
            answer.status() == 202,
            "POST of an upload: {}",
            answer.text()
        );
        Ok(Self {
            location: path_of(answer.header("location"))?,
            bytes: Vec::new(),
        })
    }

    fn go_on(&mut self, registry: &str, more: &[u8]) -> anyhow::Result<()> {
        let url = format!("{registry}{}", self.location);
        let answer = http::request("PATCH", &url, &[("Content-Type", OCTETS)], more);
        ensure!(
            answer.status() == 202,
            "PATCH of an upload: {}",
            answer.text()
        );
        self.bytes.extend_from_slice(more);
        self.location = path_of(answer.header("location"))?;
        Ok(())
    }

    fn finish(mut self, registry: &str, rest: &[u8]) -> anyhow::Result<(String, String)> {
        self.bytes.extend_from_slice(rest);
        let blob = digest(&self.bytes);
        let separator = if self.location.contains('?') {
            '&'
        } else {
            '?'
        };
        let url = format!("{registry}{}{separator}digest={blob}", self.location);
        let answer = http::request("PUT", &url, &[("Content-Type", OCTETS)], rest);
        ensure!(
            answer.status() == 201,
            "PUT of an upload: {}",
            answer.text()
        );
        Ok(("team/app0".to_owned(), blob))
    }
}

/// The path of a location: the next program has another port.
fn path_of(location: Option<&str>) -> anyhow::Result<String> {
    let location = location.context("an upload has no location")?;
    let start = location
        .split_once("://")
        .and_then(|(_, rest)| rest.find('/').map(|at| location.len() - rest.len() + at))
        .unwrap_or(0);
    Ok(location.get(start..).unwrap_or(location).to_owned())
}

const TYPE: &str = "application/vnd.example.upgrade";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCTETS: &str = "application/octet-stream";
