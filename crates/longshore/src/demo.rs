//! `longshore demo`: the whole chain on real input, each step shown as it happens.
//!
//! Everything is real: the registry and the agent of `longshore up`, pushes and signatures through
//! the client, releases through lint and pack, deployments through the engine. Only the service is
//! small. It speaks to loopback alone.

mod image;

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use delivery::control::{self, Request, Response, TargetStatus};
use delivery::engine::Engine as _;
use delivery::engine::compose::ComposeEngine;
use delivery::release::{self, EngineKind, ImagePin, PackOptions};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Platform, Reference};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use trust::key::PrivateKey;

use crate::cli::{Global, agent as agent_command, proof};
use crate::config::{Log, LogFormat};
use crate::output::{self, Exit};
use crate::up::{Node, Up};
use crate::{clock, demo_service, serve};

/// Show the whole chain on real input.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Leave the data directory and what was deployed, and print where they are.
    #[arg(long)]
    keep: bool,
    /// Use this engine instead of trying which one can be used.
    #[arg(long, value_enum)]
    engine: Option<DemoEngine>,
}

/// The engines of the demonstration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum DemoEngine {
    /// Docker Compose.
    Compose,
    /// Plain files.
    Files,
}

/// Runs the demonstration.
pub(crate) async fn run(command: Demo, global: &Global) -> anyhow::Result<Exit> {
    serve::logging(&Log {
        level: "error".to_owned(),
        format: LogFormat::Text,
    });
    let directory = tempfile::Builder::new()
        .prefix("longshore-demo-")
        .tempdir()
        .context("cannot make a temporary directory")?;
    let mut script = Script::prepare(directory.path(), global, command.engine).await?;
    let outcome = script.run().await;
    if command.keep {
        let kept = directory.keep();
        output::note(format!("kept: {}", kept.display()));
        if script.compose_used() {
            output::note(format!(
                "kept: Compose project `{PROJECT}` on port {}",
                script.port
            ));
        }
        // Its references name the port, so it must come up on the same one.
        output::note(format!(
            "start it again with `longshore up --data {}/data --listen {}`",
            kept.display(),
            script.host
        ));
        script.stop().await?;
    } else {
        let cleaned = script.clean().await;
        script.stop().await?;
        cleaned.context("cleaning up")?;
    }
    outcome?;
    Ok(Exit::OK)
}

/// Everything that the demonstration holds while it runs.
struct Script {
    started: Instant,
    directory: PathBuf,
    global: Global,
    client: client::Client,
    host: String,
    socket: PathBuf,
    port: u16,
    key: PrivateKey,
    engine: Option<ComposeEngine>,
    base: Option<image::Base>,
    wanted: Option<DemoEngine>,
    shutdown: CancellationToken,
    node: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
    service: Option<tokio::task::JoinHandle<()>>,
}

impl Script {
    async fn prepare(
        directory: &Path,
        global: &Global,
        wanted: Option<DemoEngine>,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let data = directory.join("data");
        let node = Node::open(&Up {
            data: Some(data),
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            ..Up::default()
        })
        .await?;
        let host = node
            .registry
            .url()
            .split("//")
            .nth(1)
            .unwrap_or_default()
            .to_owned();
        let socket = node.socket.clone();
        let shutdown = CancellationToken::new();
        let node = tokio::spawn(node.run(shutdown.clone()));
        // A port that was free a moment ago; the service says so when somebody took it since.
        let port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
        Ok(Self {
            started,
            directory: directory.to_owned(),
            global: global.clone(),
            client: global.client()?,
            host,
            socket,
            port,
            key: PrivateKey::generate(&mut clock::random),
            engine: None,
            base: None,
            wanted,
            shutdown,
            node: Some(node),
            service: None,
        })
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        self.say(format!("registry and agent run at http://{}", self.host));
        std::fs::write(self.directory.join("demo.pub"), self.key.public().to_pem())
            .context("cannot write the public key")?;
        self.say("made a signing key; the agent will trust it and nothing else");
        self.choose_engine().await?;
        self.configure().await?;

        let first = self.release("1", Health::Good, Signed::Yes).await?;
        let good = |digest: &Digest| {
            let digest = digest.clone();
            move |target: &TargetStatus| {
                target.state == "good"
                    && target
                        .running
                        .as_ref()
                        .is_some_and(|r| r.digest == digest && r.good)
            }
        };
        self.wait("version 1 to become good", good(&first)).await?;
        self.expect_answer("version 1").await?;
        self.say("version 1 is deployed and healthy");

        let second = self.release("2", Health::Good, Signed::Yes).await?;
        self.wait("version 2 to become good", good(&second)).await?;
        self.expect_answer("version 2").await?;
        self.say("version 2 is deployed and healthy; the push itself woke the agent");

        let third = self.release("3", Health::Broken, Signed::Yes).await?;
        let (bad, back) = (third.clone(), second.clone());
        self.wait("version 3 to be rolled back", move |target| {
            target.quarantine.iter().any(|entry| entry.digest == bad)
                && target
                    .running
                    .as_ref()
                    .is_some_and(|r| r.digest == back && r.good)
        })
        .await?;
        self.expect_answer("version 2").await?;
        self.say(
            "version 3 never became healthy: rolled back to version 2, version 3 is quarantined",
        );

        let fourth = self.release("4", Health::Good, Signed::No).await?;
        let unsigned = fourth.clone();
        let status = self
            .wait("version 4 to be refused", move |target| {
                target.resolved.as_ref() == Some(&unsigned)
                    && target.digest.as_ref() == Some(&unsigned)
                    && target.reason.is_some()
            })
            .await?;
        self.expect_answer("version 2").await?;
        anyhow::ensure!(
            status
                .running
                .is_some_and(|running| running.digest == second),
            "version 2 should still run"
        );
        self.say(format!(
            "version 4 is not signed and was refused: {}",
            status.reason.unwrap_or_default()
        ));

        self.say("why does version 2 run?");
        let request = Request::Explain {
            target: TARGET.to_owned(),
        };
        match control::call(&self.socket, &request).await? {
            Response::Explain(explanation) => agent_command::explain(&explanation),
            other => anyhow::bail!("the agent answered {other:?}"),
        }
        self.say("done");
        Ok(())
    }

    /// Takes Compose where an engine answers and can pull from our port, else plain files.
    async fn choose_engine(&mut self) -> anyhow::Result<()> {
        if self.wanted == Some(DemoEngine::Files) {
            return self.use_files("as asked for").await;
        }
        match self.try_compose().await {
            Ok(engine) => {
                self.engine = Some(engine);
                Ok(())
            }
            Err(error) if self.wanted.is_some() => {
                Err(error.context("Docker Compose cannot be used"))
            }
            Err(error) => {
                self.use_files(&format!("Docker Compose cannot be used here: {error:#}"))
                    .await
            }
        }
    }

    async fn try_compose(&mut self) -> anyhow::Result<ComposeEngine> {
        let engine = crate::agent::compose();
        let info = engine.check().await?;
        let base = image::Base::build(&self.directory)?;
        self.say(format!(
            "built an image that holds this executable and {} shared libraries ({})",
            base.libraries(),
            output::bytes(base.size())
        ));
        self.base = Some(base);
        let pin = self.push_image("probe", Health::Good).await?;
        let image: Reference = pin.reference.parse()?;
        engine
            .pull_image(&image.with_digest(pin.digest))
            .await
            .context("the engine cannot pull from our port")?;
        self.say(format!(
            "engine: {}; it can pull from our port",
            info.description
        ));
        Ok(engine)
    }

    async fn use_files(&mut self, why: &str) -> anyhow::Result<()> {
        self.say(format!(
            "{why}; using the `files` engine with the same content"
        ));
        let listener = TcpListener::bind(("127.0.0.1", self.port))
            .await
            .context("cannot listen for the demonstration's service")?;
        let site = self.site();
        self.service = Some(tokio::spawn(demo_service::serve(listener, site)));
        Ok(())
    }

    /// Writes the target into `agent.yaml`; the running agent reads it again.
    async fn configure(&self) -> anyhow::Result<()> {
        let kind = if self.compose_used() {
            EngineKind::Compose
        } else {
            EngineKind::Files
        };
        let path = self.directory.join("data/agent.yaml");
        let temporary = self.directory.join("data/agent.yaml.new");
        std::fs::write(&temporary, self.agent_yaml(kind))
            .and_then(|()| std::fs::rename(&temporary, &path))
            .with_context(|| format!("cannot write `{}`", path.display()))?;
        if let Response::Error(refusal) = self.call(&Request::Reload).await? {
            anyhow::bail!(refusal.message)
        }
        self.say("the agent follows the tag `production` and wants one signature");
        Ok(())
    }

    fn agent_yaml(&self, kind: EngineKind) -> String {
        let (engine, timeout, rest) = match kind {
            EngineKind::Compose => (
                "compose",
                30,
                format!(
                    "    project: {PROJECT}\n    variables: {{DEMO_PORT: \"{}\"}}\n",
                    self.port
                ),
            ),
            EngineKind::Files => (
                "files",
                5,
                format!("    files: {{path: {}}}\n", self.site().display()),
            ),
        };
        let health = format!(
            "    health: {{stability: 2s, timeout: {timeout}s, interval: 250ms, http: [\"http://127.0.0.1:{}/health\"]}}\n",
            self.port
        );
        format!(
            "version: 1\nregistry: {host}\ntargets:\n  - name: {TARGET}\n    reference: {host}/demo/service:production\n    \
             release: demo\n    engine: {engine}\n{rest}    trust: {{keys: [{key}], threshold: 1}}\n{health}",
            host = self.host,
            key = self.directory.join("demo.pub").display(),
        )
    }

    /// Makes, pushes and (perhaps) signs one version; the tag moves last.
    async fn release(
        &self,
        version: &str,
        health: Health,
        signed: Signed,
    ) -> anyhow::Result<Digest> {
        let directory = self.directory.join(format!("release-{version}"));
        std::fs::create_dir(&directory).context("cannot make a release directory")?;
        let write = |name: &str, text: &str| {
            std::fs::write(directory.join(name), text)
                .with_context(|| format!("cannot write `{name}`"))
        };
        write(
            "greeting.txt",
            &format!("greetings from release {version}\n"),
        )?;
        if self.compose_used() {
            let pin = self.push_image(version, health).await?;
            write(
                "compose.yaml",
                &compose_yaml(&pin.reference, self.base.as_ref()),
            )?;
        } else {
            write("version.txt", version)?;
            write("health.txt", health.text())?;
        }
        let reference: Reference = format!("{}/demo/service:production", self.host).parse()?;
        let options = PackOptions {
            name: Some("demo".to_owned()),
            version: Some(version.to_owned()),
            engine: Some(if self.compose_used() {
                EngineKind::Compose
            } else {
                EngineKind::Files
            }),
            ..PackOptions::default()
        };
        let packed = release::pack(&directory, &options, &self.client).await?;
        release::push(&packed, &self.client, &reference).await?;
        if signed == Signed::Yes {
            proof::sign_artifact(&self.client, &reference, &packed.descriptor, &self.key).await?;
        }
        self.client
            .repository(&reference.host, &reference.repository)
            .put_manifest(
                &TagOrDigest::Tag("production".parse()?),
                &packed.descriptor.media_type,
                packed.manifest.clone().into(),
            )
            .await?;
        self.say(format!(
            "pushed{} release {version}: {}",
            if signed == Signed::Yes {
                " and signed"
            } else {
                ", without a signature,"
            },
            packed.descriptor.digest
        ));
        Ok(packed.descriptor.digest.clone())
    }

    async fn push_image(&self, version: &str, health: Health) -> anyhow::Result<ImagePin> {
        let base = self.base.as_ref().context("the image was not built")?;
        let reference: Reference = format!("{}/demo/image:{version}", self.host).parse()?;
        let descriptor: Descriptor = base
            .push(&self.client, &reference, version, health.text())
            .await
            .context("cannot push the image")?;
        Ok(ImagePin {
            service: "web".to_owned(),
            reference: reference.to_string(),
            digest: descriptor.digest,
            media_type: descriptor.media_type,
            platforms: vec![Platform::host()],
        })
    }

    /// Waits for a state of the target, told by the agent at each change.
    async fn wait(
        &self,
        what: &str,
        reached: impl Fn(&TargetStatus) -> bool,
    ) -> anyhow::Result<TargetStatus> {
        let request = Request::Watch {
            target: Some(TARGET.to_owned()),
        };
        let mut last = None;
        let watching = async {
            let mut watch = control::watch(&self.socket, &request).await?;
            while let Some(response) = watch.next().await? {
                match response {
                    Response::Status(targets) => {
                        for target in targets {
                            if reached(&target) {
                                return Ok(target);
                            }
                            last = Some(target);
                        }
                    }
                    Response::Error(refusal) => anyhow::bail!(refusal.message),
                    _ => {}
                }
            }
            anyhow::bail!("the agent ended")
        };
        if let Ok(outcome) = tokio::time::timeout(PATIENCE, watching).await {
            outcome
        } else {
            let state = last.map_or_else(
                || "no state".to_owned(),
                |target| {
                    format!(
                        "state `{}`, {}",
                        target.state,
                        target.reason.unwrap_or_default()
                    )
                },
            );
            anyhow::bail!(
                "waited {}s for {what}; the target is in {state}",
                PATIENCE.as_secs()
            )
        }
    }

    /// Asks the agent, which may need a moment to open its socket.
    async fn call(&self, request: &Request) -> anyhow::Result<Response> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match control::call(&self.socket, request).await {
                Err(control::ControlError::Connect { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Asks the deployed service itself.
    async fn expect_answer(&self, wanted: &str) -> anyhow::Result<()> {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let (status, body) = demo_service::get(address, "/").await?;
        anyhow::ensure!(
            status == 200 && body.contains(wanted),
            "the service answered {status} `{}`, not `{wanted}`",
            body.trim()
        );
        self.say(format!("http://{address}/ answers: {}", body.trim()));
        if let Some(engine) = &self.engine {
            let expected = self.image_digest(wanted).await?;
            let running = engine.running_images(PROJECT).await?;
            anyhow::ensure!(
                running
                    .iter()
                    .any(|(service, image)| service == "web"
                        && image.contains(&expected.to_string())),
                "the container runs {running:?}, not `{expected}`"
            );
            self.say(format!("the container's image is {expected}"));
        }
        Ok(())
    }

    async fn image_digest(&self, wanted: &str) -> anyhow::Result<Digest> {
        let version = wanted.rsplit(' ').next().unwrap_or_default();
        let reference: Reference = format!("{}/demo/image:{version}", self.host).parse()?;
        Ok(proof::resolve(&self.client, &reference)
            .await?
            .descriptor
            .digest)
    }

    async fn clean(&mut self) -> anyhow::Result<()> {
        if let Some(service) = self.service.take() {
            service.abort();
        }
        // The agent must not bring back what is removed.
        self.shutdown.cancel();
        if let Some(engine) = &self.engine {
            engine.remove_project(PROJECT, TARGET, &self.host).await?;
            self.say("removed the containers, the network and the images");
        }
        Ok(())
    }

    async fn stop(&mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        match self.node.take() {
            Some(node) => node.await.context("registry and agent")?,
            None => Ok(()),
        }
    }

    fn compose_used(&self) -> bool {
        self.engine.is_some()
    }

    fn site(&self) -> PathBuf {
        self.directory.join("site")
    }

    fn say(&self, text: impl Display) {
        if !self.global.quiet {
            output::line(format!(
                "[{:6.2}s] {text}",
                self.started.elapsed().as_secs_f64()
            ));
        }
    }
}

/// Whether a version becomes healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Good,
    Broken,
}

impl Health {
    fn text(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Broken => "broken",
        }
    }
}

/// Whether a version is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signed {
    Yes,
    No,
}

fn compose_yaml(image: &str, base: Option<&image::Base>) -> String {
    let check = base
        .map(|base| base.command(&["demo-service", "--check"]))
        .unwrap_or_default();
    let test = std::iter::once("CMD".to_owned())
        .chain(check)
        .collect::<Vec<_>>();
    let test = serde_json::to_string(&test).unwrap_or_default();
    format!(
        "services:\n  web:\n    image: {image}\n    ports: [\"127.0.0.1:${{DEMO_PORT:?set the port}}:8080\"]\n    \
         volumes: [\"./greeting.txt:/srv/greeting.txt:ro\"]\n    stop_grace_period: 3s\n    healthcheck:\n      \
         test: {test}\n      interval: 1s\n      timeout: 3s\n      retries: 3\n"
    )
}

const PATIENCE: Duration = Duration::from_mins(1);
const PROJECT: &str = "longshore-demo";
const TARGET: &str = "demo";
