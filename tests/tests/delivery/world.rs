//! A registry, an agent and a project, for one test.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use e2e::image::Image;
use e2e::{Agent, Proxy, Run, Scratch, Server, agent, engine, http, tools};
use serde_json::{Value, json};

/// The password of the tests' signing keys.
const PASSWORD: (&str, &str) = ("LONGSHORE_KEY_PASSWORD", "a password");

/// What differs between tests.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The line of the Compose plugin.
    pub(crate) compose: &'static str,
    /// How long a release must be healthy.
    pub(crate) stability: &'static str,
    /// How long it may take to become so.
    pub(crate) timeout: &'static str,
    /// Whether the agent and the engine go through a proxy.
    pub(crate) proxied: bool,
    /// Lines of the target's configuration besides the usual ones.
    pub(crate) more: String,
    /// Environment variables of the agent.
    pub(crate) env: Vec<(String, String)>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            compose: "2",
            stability: "500ms",
            timeout: "30s",
            proxied: false,
            more: String::new(),
            env: Vec::new(),
        }
    }
}

/// Everything that a test works with.
#[derive(Debug)]
pub(crate) struct World {
    agent: Option<Agent>,
    pub(crate) server: Server,
    proxy: Option<Proxy>,
    pub(crate) scratch: Scratch,
    pub(crate) project: String,
    pub(crate) settings: Settings,
}

impl World {
    /// Starts a registry and makes a key. The agent starts with [`World::start_agent`].
    pub(crate) fn new(name: &str, settings: Settings) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let server = Server::start();
        let world = Self {
            agent: None,
            proxy: settings.proxied.then(|| Proxy::start(server.host())),
            scratch: Scratch::new(),
            project: format!(
                "e2e-{name}-{}-{}",
                std::process::id(),
                COUNT.fetch_add(1, Ordering::Relaxed)
            ),
            settings,
            server,
        };
        world.key("key");
        world
    }

    /// The usual beginning: version 1 is deployed and good.
    pub(crate) fn with_version_1(name: &str, settings: Settings) -> (Self, String) {
        let mut world = Self::new(name, settings);
        let image = world.web("1");
        let v1 = world.push("1", &service(&image), &[]);
        world.start_agent();
        world.wait_good(&v1);
        (world, v1)
    }

    /// Makes a key pair and gives back the private key's path.
    pub(crate) fn key(&self, name: &str) -> PathBuf {
        self.longshore("key generate --output")
            .arg(self.scratch.join(name))
            .ok();
        self.scratch.join(&format!("{name}.key"))
    }

    /// Prepares the program with the key's password at hand.
    pub(crate) fn longshore(&self, words: &str) -> Run {
        Run::new(tools::program())
            .words(words)
            .env(PASSWORD.0, PASSWORD.1)
            .env("DOCKER_CONFIG", tools::compose(self.settings.compose))
    }

    /// The registry as agent and engine see it.
    pub(crate) fn host(&self) -> String {
        self.proxy
            .as_ref()
            .map_or_else(|| self.server.host().to_owned(), Proxy::host)
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("this test has a proxy")
    }

    /// Pushes a service that answers with `text` and is healthy, and gives back its reference.
    pub(crate) fn web(&self, text: &str) -> String {
        self.image(
            &format!("web{text}"),
            &Image::web(text).health("wget -q -O- http://127.0.0.1:8080/"),
        )
    }

    /// Pushes an image and gives back its reference.
    pub(crate) fn image(&self, tag: &str, image: &Image) -> String {
        image
            .clone()
            // No test finds an image that another one left.
            .salt(format!("{} {tag}", self.project))
            .push(self.server.url(), "img", tag);
        format!("{}/img:{tag}", self.host())
    }

    /// Prepares the push of a release of version `version`, as `name`, to `to`.
    pub(crate) fn release(
        &self,
        version: &str,
        name: &str,
        to: &str,
        compose: &str,
        files: &[(&str, &str)],
    ) -> Run {
        let dir = format!("release-{name}-{version}");
        self.scratch.write(&format!("{dir}/compose.yaml"), compose);
        for (file, text) in files {
            self.scratch.write(&format!("{dir}/{file}"), text);
        }
        self.longshore("release push --json --name")
            .args([name, "--version", version])
            .arg(self.scratch.join(&dir))
            .arg(format!("{}/{to}", self.host()))
    }

    /// Pushes and signs a release to where the target looks, and gives back its digest.
    pub(crate) fn push(&self, version: &str, compose: &str, files: &[(&str, &str)]) -> String {
        self.push_to("app:production", version, compose, files)
    }

    /// The same to another place.
    pub(crate) fn push_to(
        &self,
        to: &str,
        version: &str,
        compose: &str,
        files: &[(&str, &str)],
    ) -> String {
        digest_of(
            &self
                .release(version, "app", to, compose, files)
                .arg("--sign")
                .arg(self.scratch.join("key.key")),
        )
    }

    /// Pushes a release without a signature.
    pub(crate) fn push_unsigned(&self, version: &str, compose: &str) -> String {
        digest_of(&self.release(version, "app", "app:production", compose, &[]))
    }

    /// Signs a release that is there.
    pub(crate) fn sign(&self, digest: &str) {
        self.longshore("sign --key")
            .arg(self.scratch.join("key.key"))
            .arg(format!("{}/app@{digest}", self.host()))
            .ok();
    }

    /// A manifest of the release repository, straight from the registry.
    pub(crate) fn manifest(&self, reference: &str) -> http::Response {
        let found = self.server.get(&format!("/v2/app/manifests/{reference}"));
        assert_eq!(found.status(), 200, "{reference}: {}", found.text());
        found
    }

    /// Writes the agent's configuration.
    pub(crate) fn configure(&self) -> agent::Options {
        let socket = self.scratch.join("agent.sock");
        let Settings {
            stability,
            timeout,
            more,
            ..
        } = &self.settings;
        let (host, project) = (self.host(), &self.project);
        let text = format!(
            "version: 1\nregistry: {{host: \"{host}\", anonymous: true}}\nstate: agent\nsocket: {}\npoll: 1s\nsafety_poll: 1s\n\
             targets:\n  - name: app\n    reference: {host}/app:production\n    release: app\n    project: {project}\n    \
             trust: {{keys: [key.pub]}}\n    health: {{stability: {stability}, timeout: {timeout}, interval: 100ms}}\n{more}",
            socket.display()
        );
        agent::Options {
            config: self.scratch.write("agent.yaml", text),
            socket,
            compose: self.settings.compose.to_owned(),
            env: self.settings.env.clone(),
            slow_disk: None,
            log: self.scratch.join("agent.log"),
        }
    }

    /// Starts the agent.
    pub(crate) fn start_agent(&mut self) {
        let options = self.configure();
        self.agent = Some(Agent::start(&options));
    }

    /// Starts the agent so that every state lasts long enough to be seen.
    pub(crate) fn start_slow_agent(&mut self) {
        let mut options = self.configure();
        options.slow_disk = Some(Duration::from_millis(60));
        self.agent = Some(Agent::start(&options));
    }

    pub(crate) fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().expect("the agent was started")
    }

    /// Waits until `digest` runs and is good.
    pub(crate) fn wait_good(&mut self, digest: &str) -> Value {
        self.agent().wait(&format!("good `{digest}`"), |status| {
            is_good(status, digest)
        })
    }

    /// Waits until the newest attempt, about `digest`, is in `state`.
    pub(crate) fn wait_state(&mut self, digest: &str, state: &str) -> Value {
        self.agent().wait(&format!("`{digest}` {state}"), |status| {
            status["digest"] == digest && status["state"] == state
        })
    }

    /// Waits until `digest` was refused, and gives back why.
    pub(crate) fn wait_refused(&mut self, digest: &str) -> String {
        let status = self.wait_state(digest, "rejected");
        status["reason"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits until `bad` was rolled back to `good`.
    pub(crate) fn wait_rolled_back(&mut self, bad: &str, good: &str) -> Value {
        let status = self.wait_state(bad, "rolled-back");
        assert!(is_rolled_back(&status, bad, good), "{status:#}");
        status
    }

    /// The target's directory.
    pub(crate) fn target(&self, path: &str) -> PathBuf {
        self.scratch.join("agent/targets/app").join(path)
    }

    /// Where the files of a release are, or would be.
    pub(crate) fn files(&self, digest: &str) -> PathBuf {
        self.target("releases").join(digest.replace(':', "-"))
    }

    /// Wants that nothing of a release became a file.
    pub(crate) fn wants_nothing_extracted(&self, digest: &str) {
        assert!(!self.files(digest).exists(), "it was extracted");
        let releases = std::fs::read_dir(self.target("releases")).expect("releases are kept");
        for entry in releases.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(
                !name.contains(digest.trim_start_matches("sha256:")),
                "{name}"
            );
        }
    }

    /// The containers of the project: service → id.
    pub(crate) fn ids(&self) -> BTreeMap<String, String> {
        engine::containers(&self.project)
            .iter()
            .map(|container| {
                (
                    container["Config"]["Labels"]["com.docker.compose.service"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned(),
                    container["Id"].as_str().unwrap_or_default().to_owned(),
                )
            })
            .collect()
    }

    /// What a service's container runs in a shell.
    pub(crate) fn exec(&self, service: &str, script: &str) -> String {
        let container = engine::container(&self.project, service);
        engine::docker("2")
            .args(["exec", container["Id"].as_str().unwrap_or_default()])
            .args(["/bin/busybox", "sh", "-c", script])
            .ok()
            .text()
    }

    /// What the `web` service answers.
    pub(crate) fn answer(&self) -> String {
        self.exec("web", "wget -q -O- http://127.0.0.1:8080/")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the registry's log:\n{}", tail(&self.server.logged()));
        }
        // The agent must not bring back what is removed.
        self.agent = None;
        engine::clean(&self.project);
        let prefix = format!("{}/", self.host());
        let images = engine::docker("2")
            .args([
                "image",
                "ls",
                "--digests",
                "--format",
                "{{.Repository}}@{{.Digest}}",
            ])
            .run()
            .text();
        let ours: Vec<_> = images
            .lines()
            .filter(|name| name.starts_with(&prefix))
            .collect();
        if !ours.is_empty() {
            engine::docker("2")
                .args(["image", "rm", "--force"])
                .args(ours)
                .run();
        }
    }
}

/// A Compose file with one service `web`.
pub(crate) fn service(image: &str) -> String {
    format!("services:\n  web:\n    image: {image}\n")
}

/// Whether `digest` runs and was observed healthy.
pub(crate) fn is_good(status: &Value, digest: &str) -> bool {
    status["state"] == "good"
        && status["running"]["digest"] == digest
        && status["running"]["good"] == true
}

/// Whether `good` runs again because `bad` failed.
pub(crate) fn is_rolled_back(status: &Value, bad: &str, good: &str) -> bool {
    status["state"] == "rolled-back"
        && status["running"]["digest"] == good
        && status["running"]["good"] == true
        && status["quarantine"]
            .as_array()
            .is_some_and(|list| list.iter().any(|entry| entry["digest"] == bad))
}

/// Pushes and gives back the digest.
pub(crate) fn digest_of(run: &Run) -> String {
    run.ok().json()["digest"]
        .as_str()
        .expect("a push tells the digest")
        .to_owned()
}

/// What of a container must be the same after going back: all that the release decides.
pub(crate) fn essence(container: &Value) -> Value {
    let mut environment: Vec<_> = container["Config"]["Env"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    environment.sort_by_key(ToString::to_string);
    let mut mounts: Vec<_> = container["Mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mount| json!([mount["Source"], mount["Destination"], mount["RW"]]))
        .collect();
    mounts.sort_by_key(ToString::to_string);
    json!({
        "service": container["Config"]["Labels"]["com.docker.compose.service"],
        "image": container["Config"]["Image"],
        "command": container["Config"]["Cmd"],
        "environment": environment,
        "mounts": mounts,
        "running": container["State"]["Running"],
        "restart": container["HostConfig"]["RestartPolicy"],
    })
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
