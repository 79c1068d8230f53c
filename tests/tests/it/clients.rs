//! The table client × operation: real clients with the commands that tutorials print.
//!
//! A test is a cell, named `clients::CLIENT::OPERATION`; `cargo xtask test` prints the table from
//! these names. What follows an underscore tells two tests of one cell apart.

mod cosign;
mod cosign2 {
    super::cosign::cells!("cosign2");
}
mod cosign3 {
    super::cosign::cells!("cosign3");
}
mod crane;
mod docker;
mod helm;
mod longshore;
mod oras;
mod skopeo;

use std::path::PathBuf;

use e2e::image::Image;
use e2e::server::Options;
use e2e::{Run, Scratch, Server, http, tools};

/// The user of a server with passwords.
const USER: &str = "alice";
const PASSWORD: &str = "correct-horse";
/// The same as bcrypt has it, at the least cost.
const HTPASSWD: &str = "alice:$2b$05$abcdefghijklmnopqrstuuZ0Fx87Pb/Aqb0E90lfvCwzXnaFKUHpS\n";

/// A registry, and a home directory that no client of another test sees.
struct Site {
    /// Ours; it lives as long as the site.
    _server: Option<Server>,
    url: String,
    home: Scratch,
}

impl Site {
    /// Everyone may read and write.
    fn open() -> Self {
        let server = tools::reference().is_none().then(Server::start);
        let url = server
            .as_ref()
            .map(|server| server.url().to_owned())
            .or_else(tools::reference)
            .unwrap_or_default();
        Self {
            _server: server,
            url,
            home: Scratch::new(),
        }
    }

    /// Only `alice` may, with her password.
    fn closed() -> Self {
        let home = Scratch::new();
        let users = home.write("htpasswd", HTPASSWD);
        let config = format!("version: 1\nauth:\n  htpasswd: {}\n", users.display());
        let server = Server::with(&Options::new(tools::program()).config(config));
        let url = server.url().to_owned();
        Self {
            _server: Some(server),
            url,
            home,
        }
    }

    /// The registry as it stands in a reference.
    fn host(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// `HOST/rest`.
    fn at(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host())
    }

    /// A name that no other test has used, also on a registry that is shared.
    fn repository(&self, name: &str) -> String {
        let unique = self
            .home
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_lowercase();
        let unique: String = unique.chars().filter(char::is_ascii_alphanumeric).collect();
        format!("{unique}/{name}")
    }

    /// A client whose files are all in this site's home.
    fn run(&self, tool: &str) -> Run {
        let program = if tool == "longshore" {
            tools::program()
        } else {
            tools::tool(tool)
        };
        let home = self.home.path();
        Run::new(program)
            .dir(home)
            .env("HOME", home)
            .env("DOCKER_CONFIG", home.join("docker"))
            .env("XDG_CONFIG_HOME", home.join("config"))
            .env("XDG_CACHE_HOME", home.join("cache"))
            .env("XDG_DATA_HOME", home.join("share"))
            .env("XDG_RUNTIME_DIR", home.join("run"))
            .env("REGISTRY_AUTH_FILE", home.join("auth.json"))
            .env("COSIGN_PASSWORD", PASSWORD)
            .env("LONGSHORE_KEY_PASSWORD", PASSWORD)
    }

    /// Pushes a small image by hand; its digest.
    fn image(&self, repository: &str, tag: &str) -> String {
        Image::shell("echo hello")
            .salt(repository)
            .push(&self.url, repository, tag)
    }

    /// The digest that a reference resolves to; `None` when the registry has it not.
    fn resolve(&self, repository: &str, reference: &str) -> Option<String> {
        let answer = http::request(
            "HEAD",
            &format!("{}/v2/{repository}/manifests/{reference}", self.url),
            &[("Accept", ACCEPT)],
            &[],
        );
        match answer.status() {
            200 => answer.header("docker-content-digest").map(str::to_owned),
            404 => None,
            other => panic!("HEAD of {repository}:{reference} answered {other}"),
        }
    }

    /// The manifest that a reference resolves to.
    fn manifest(&self, repository: &str, reference: &str) -> serde_json::Value {
        let answer = http::request(
            "GET",
            &format!("{}/v2/{repository}/manifests/{reference}", self.url),
            &[("Accept", ACCEPT)],
            &[],
        );
        assert_eq!(
            answer.status(),
            200,
            "{repository}:{reference}: {}",
            answer.text()
        );
        answer.json()
    }

    /// The artifact types attached to a digest, sorted.
    fn attached(&self, repository: &str, digest: &str) -> Vec<String> {
        let answer = http::get(&format!("{}/v2/{repository}/referrers/{digest}", self.url));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let mut types: Vec<String> = answer.json()["manifests"]
            .as_array()
            .expect("an index has manifests")
            .iter()
            .map(|entry| entry["artifactType"].as_str().unwrap_or("").to_owned())
            .collect();
        types.sort();
        types
    }

    /// Makes a pair of keys with cosign; private and public.
    fn keys(&self) -> (PathBuf, PathBuf) {
        self.run("cosign2").args(["generate-key-pair"]).ok();
        (self.home.join("cosign.key"), self.home.join("cosign.pub"))
    }

    /// Makes a pair of keys with our own program; private and public.
    fn own_keys(&self, name: &str) -> (PathBuf, PathBuf) {
        self.run("longshore")
            .args(["key", "generate", "--output", name])
            .ok();
        (
            self.home.join(&format!("{name}.key")),
            self.home.join(&format!("{name}.pub")),
        )
    }
}

const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json";
