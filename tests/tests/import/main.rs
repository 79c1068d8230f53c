//! Import, export and migration through the built program: directories that other registries wrote, directories that
//! were broken by hand, registries that run, kills in the middle. After each the digests are those of the source and
//! `verify-store` is clean.

#[cfg(test)]
mod broken;
#[cfg(test)]
mod distribution;
#[cfg(test)]
mod layout;
#[cfg(test)]
mod migrate;
#[cfg(test)]
mod target;
#[cfg(test)]
mod zot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use e2e::image::{self, Image};
use e2e::server::{Options, free_port};
use e2e::{Run, Scratch, Server, digest, http, tools};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_mins(1);
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json";

/// The real distribution registry over a directory.
struct Distribution {
    child: Child,
    url: String,
    directory: PathBuf,
}

impl Distribution {
    fn start(scratch: &Scratch) -> Self {
        let directory = scratch.dir("distribution");
        let port = free_port();
        let config = scratch.write(
            "distribution.yml",
            format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  delete:\n    enabled: true\n  filesystem:\n    \
                 rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
                directory.display()
            ),
        );
        let mut child = Run::new(tools::tool("docker-registry"))
            .arg("serve")
            .arg(config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .spawn(&scratch.join("distribution.log"));
        let start = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = child.try_wait().expect("a child can be waited for");
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "distribution did not start: {}",
                std::fs::read_to_string(scratch.join("distribution.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            directory,
        }
    }

    fn host(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// Ends it and gives back its directory.
    fn stop(mut self) -> PathBuf {
        drop(self.child.kill());
        drop(self.child.wait());
        self.directory.clone()
    }
}

impl Drop for Distribution {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Tags of all repositories with their digests, as a registry serves them.
type Tags = BTreeMap<String, String>;

fn tags_of(url: &str, repositories: &[&str]) -> Tags {
    let mut found = Tags::new();
    for repository in repositories {
        let listed = http::get(&format!("{url}/v2/{repository}/tags/list"));
        assert_eq!(listed.status(), 200, "{repository}: {}", listed.text());
        let listed = listed.json();
        for tag in listed["tags"].as_array().into_iter().flatten() {
            let tag = tag.as_str().unwrap_or_default();
            let head = http::request(
                "HEAD",
                &format!("{url}/v2/{repository}/manifests/{tag}"),
                &[("Accept", ACCEPT)],
                &[],
            );
            assert_eq!(head.status(), 200, "{repository}:{tag}");
            let digest = head.header("docker-content-digest").unwrap_or_default();
            found.insert(format!("{repository}:{tag}"), digest.to_owned());
        }
    }
    found
}

/// Pushes two images and an index over them; the digests of the images and of the index.
fn push_index(url: &str, repository: &str, tag: &str) -> (Vec<String>, String) {
    let images: Vec<String> = ["amd64", "arm64"]
        .iter()
        .map(|architecture| {
            Image::shell("echo hello")
                .architecture(architecture)
                .salt(format!("{repository}{tag}{architecture}"))
                .push(url, repository, &format!("part-{architecture}"))
        })
        .collect();
    let entries: Vec<Value> = images
        .iter()
        .map(|image| {
            let body = http::request(
                "GET",
                &format!("{url}/v2/{repository}/manifests/{image}"),
                &[("Accept", ACCEPT)],
                &[],
            );
            image::descriptor(image::MANIFEST, image, body.body.len())
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).to_string();
    let index = image::push_manifest(url, repository, tag, INDEX, index.as_bytes());
    (images, index)
}

/// A program whose files are all in the scratch directory.
fn run(scratch: &Scratch, tool: &str) -> Run {
    let home = scratch.path();
    let program = if tool == "longshore" {
        tools::program()
    } else {
        tools::tool(tool)
    };
    Run::new(program)
        .dir(home)
        .env("HOME", home)
        .env("DOCKER_CONFIG", home.join("docker"))
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("XDG_CACHE_HOME", home.join("cache"))
        .env("XDG_DATA_HOME", home.join("share"))
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .env("REGISTRY_AUTH_FILE", home.join("auth.json"))
        .env("COSIGN_PASSWORD", "correct-horse")
}

/// `longshore --json import --from FROM --data DATA …`.
fn import(scratch: &Scratch, from: &str, data: &Path, more: &[&str]) -> Run {
    run(scratch, "longshore")
        .args(["--json", "import", "--from", from, "--data"])
        .arg(data)
        .args(more)
}

/// A server on a data directory.
fn serve(data: &Path) -> Server {
    Server::with(&Options::new(tools::program()).data(data))
}

/// Wants `verify-store` to find nothing.
#[track_caller]
fn verify(data: &Path) {
    let report = Run::new(tools::program())
        .args(["--json", "verify-store"])
        .arg(data)
        .run();
    assert_eq!(report.code, Some(0), "{report}");
    assert_eq!(report.json()["problems"], json!([]), "{report}");
}

/// Wants both sides of a report to be equal and nothing to be wrong.
#[track_caller]
fn complete(report: &Value) {
    assert_eq!(report["complete"], true, "{report:#}");
    assert_eq!(report["source"], report["destination"], "{report:#}");
}

/// The digests that a registry lists as referrers, sorted.
fn referrers(url: &str, repository: &str, subject: &str) -> Vec<String> {
    let answer = http::get(&format!("{url}/v2/{repository}/referrers/{subject}"));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let mut found: Vec<String> = answer.json()["manifests"]
        .as_array()
        .expect("an index has manifests")
        .iter()
        .map(|entry| entry["digest"].as_str().unwrap_or_default().to_owned())
        .collect();
    found.sort();
    found
}

/// The messages of a report's problems.
fn problems(report: &Value) -> Vec<String> {
    report["problems"]
        .as_array()
        .expect("a report has problems")
        .iter()
        .map(|problem| problem["message"].as_str().unwrap_or_default().to_owned())
        .collect()
}

/// Every file below a directory with what it holds: to see that a source is left as it was.
fn files(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory can be read") {
            let path = entry.expect("an entry can be read").path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else {
                let content = std::fs::read(&path).expect("a file can be read");
                found.insert(path, digest(&content));
            }
        }
    }
    found
}
