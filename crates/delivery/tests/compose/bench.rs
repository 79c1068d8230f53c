//! A place to deploy to: a project on the real engine, a registry with images, and release directories.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use delivery::engine::compose::{ComposeEngine, ComposeOptions};
use delivery::engine::{
    Action, Applied, Deployment, Engine, EngineError, Plan, Sample, SampleState,
};
use delivery::release::{EngineKind, ImagePin, ReleaseConfig};
use delivery::target::{Health, Rollback, Target};
use oci::{Digest, Platform, Reference};

/// Everything one test needs; all of it goes when it is dropped.
pub(crate) struct Bench {
    pub(crate) engine: ComposeEngine,
    pub(crate) project: String,
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) adopt: bool,
    pub(crate) dir: tempfile::TempDir,
    host: String,
    registry: Child,
    pins: Vec<(String, Digest)>,
    releases: Cell<u32>,
}

impl Bench {
    /// Starts a registry with the images `app:1` and `app:2`, which hold a shell.
    pub(crate) async fn new(name: &str) -> Self {
        let Ok(docker_host) = std::env::var("DOCKER_HOST") else {
            panic!("these tests need a Docker Engine: set DOCKER_HOST");
        };
        let options = ComposeOptions {
            docker_host: Some(docker_host),
            docker: plugin(),
            apply_timeout: Duration::from_mins(2),
            credentials: Arc::new(|_| None),
        };
        let engine = ComposeEngine::new(options);
        let info = engine
            .check()
            .await
            .expect("these tests need a Docker Engine with Compose");
        assert!(info.description.contains("Compose"), "{}", info.description);

        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let host = format!("127.0.0.1:{port}");
        let registry = start_registry(dir.path(), &host);
        let project = format!("ls-{name}-{}", std::process::id());
        let mut bench = Self {
            engine,
            project,
            variables: BTreeMap::new(),
            adopt: false,
            dir,
            host,
            registry,
            pins: Vec::new(),
            releases: Cell::new(0),
        };
        let rootfs = bench.root_file_system();
        for tag in ["1", "2"] {
            let digest = bench.push(&rootfs, tag);
            bench
                .pins
                .push((format!("{}/app:{tag}", bench.host), digest));
        }
        bench
    }

    /// `app:TAG` as a Compose file names it.
    pub(crate) fn image(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.host)
    }

    /// What runs when `app:TAG` does.
    pub(crate) fn pinned(&self, tag: &str) -> String {
        let reference = self.image(tag);
        let (_, digest) = self
            .pins
            .iter()
            .find(|(name, _)| *name == reference)
            .unwrap();
        format!("{}/app@{digest}", self.host)
    }

    /// A release with these files. `IMAGE1` and `IMAGE2` stand for the images. Services are pinned by what the Compose file says.
    pub(crate) fn release(&self, compose: &str, files: &[(&str, &str)]) -> Deployment {
        let number = self.releases.get() + 1;
        self.releases.set(number);
        let digest = Digest::sha256(format!("{} {number}", self.project).as_bytes());
        let directory = self.dir.path().join("releases").join(digest.hex());
        fs::create_dir_all(&directory).unwrap();
        let compose = compose
            .replace("IMAGE1", &self.image("1"))
            .replace("IMAGE2", &self.image("2"));
        fs::write(directory.join("compose.yaml"), &compose).unwrap();
        for (path, text) in files {
            let path = directory.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Deployment {
            target: self.target(),
            digest,
            config: ReleaseConfig {
                schema_version: 1,
                name: "test".to_owned(),
                version: None,
                engine: EngineKind::Compose,
                entry: vec!["compose.yaml".to_owned()],
                variables: Vec::new(),
                images: self.pins_of(&compose),
            },
            directory,
            state: self.dir.path().join("targets/test"),
            data: self.dir.path().join("data"),
            variables: self.variables.clone(),
        }
    }

    fn pins_of(&self, compose: &str) -> Vec<ImagePin> {
        let mut service = String::new();
        let mut pins = Vec::new();
        for line in compose.lines() {
            if let Some(name) = line
                .strip_prefix("  ")
                .filter(|rest| !rest.starts_with(' '))
                .and_then(|rest| rest.split_once(':'))
            {
                name.0.clone_into(&mut service);
            }
            let Some((_, rest)) = line.split_once("image: ") else {
                continue;
            };
            let reference = rest.split([',', '}']).next().unwrap().trim().to_owned();
            let known = self
                .pins
                .iter()
                .find(|(name, _)| *name == reference)
                .map(|(_, digest)| digest.clone());
            pins.push(ImagePin {
                service: service.clone(),
                reference,
                // An image that no registry has.
                digest: known.unwrap_or_else(|| Digest::sha256(b"nothing")),
                media_type: "application/vnd.docker.distribution.manifest.v2+json".to_owned(),
                platforms: vec![Platform::host()],
            });
        }
        pins
    }

    fn target(&self) -> Target {
        Target {
            name: "test".to_owned(),
            reference: Reference::parse_familiar(&format!("{}/test:production", self.host))
                .unwrap(),
            release: "test".to_owned(),
            engine: EngineKind::Compose,
            project: self.project.clone(),
            variables: BTreeMap::new(),
            profiles: Vec::new(),
            trust: None,
            health: Health {
                stability: Duration::ZERO,
                timeout: Duration::ZERO,
                interval: Duration::ZERO,
                http: Vec::new(),
                command: Vec::new(),
            },
            rollback: Rollback::Auto,
            adopt: self.adopt,
            files: None,
        }
    }

    /// The way of every deployment: plan, pull, apply.
    pub(crate) async fn deploy(
        &self,
        deployment: &Deployment,
    ) -> Result<(Plan, Applied), EngineError> {
        let plan = self.engine.plan(deployment).await?;
        self.engine.pull(deployment).await?;
        let applied = self.engine.apply(deployment, &plan).await?;
        Ok((plan, applied))
    }

    /// Looks until the state is there.
    pub(crate) async fn until(&self, deployment: &Deployment, state: SampleState) -> Sample {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            let sample = self.engine.observe(deployment).await.unwrap();
            if sample.state == state {
                return sample;
            }
            assert!(
                Instant::now() < deadline,
                "{state:?} does not come: {sample:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ids of the project's containers by service.
    pub(crate) fn ids(&self) -> BTreeMap<String, Vec<String>> {
        let mut ids: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in self.docker_lines(&[
            "ps",
            "-a",
            "--no-trunc",
            "--filter",
            &self.filter(),
            "--format",
            "{{.Label \"com.docker.compose.service\"}} {{.ID}}",
        ]) {
            let (service, id) = line.split_once(' ').unwrap();
            ids.entry(service.to_owned())
                .or_default()
                .push(id.to_owned());
        }
        for list in ids.values_mut() {
            list.sort();
        }
        ids
    }

    /// What a container printed.
    pub(crate) fn log(&self, service: &str) -> String {
        let output = docker(&["logs", &self.ids()[service][0]]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A field of a container.
    pub(crate) fn inspect(&self, service: &str, format: &str) -> String {
        let output = docker(&["inspect", "--format", format, &self.ids()[service][0]]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn filter(&self) -> String {
        format!("label=com.docker.compose.project={}", self.project)
    }

    #[expect(clippy::unused_self, reason = "reads as the bench's own")]
    fn docker_lines(&self, arguments: &[&str]) -> Vec<String> {
        let output = docker(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect()
    }

    fn root_file_system(&self) -> PathBuf {
        let root = self.dir.path().join("rootfs");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir_all(root.join("tmp")).unwrap();
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("these tests need busybox-static");
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
        for name in [
            "sh", "sleep", "cat", "echo", "true", "false", "test", "touch", "rm", "env", "ls",
        ] {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let archive = self.dir.path().join("rootfs.tar");
        let output = command("tar")
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .arg(&archive)
            .arg(".")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        archive
    }

    /// Imports, pushes and forgets an image, so that a deployment has to pull it.
    fn push(&self, archive: &Path, tag: &str) -> Digest {
        let name = self.image(tag);
        let label = format!("LABEL tag={tag} project={}", self.project);
        self.docker_lines(&[
            "import",
            "--change",
            &label,
            archive.to_str().unwrap(),
            &name,
        ]);
        let lines = self.docker_lines(&["push", &name]);
        let digest = lines
            .iter()
            .find_map(|line| Some(line.split_once("digest: ")?.1.split(' ').next()?.to_owned()))
            .unwrap();
        self.docker_lines(&["rmi", &name]);
        digest.parse().unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let text = |output: Output| String::from_utf8_lossy(&output.stdout).into_owned();
        for id in text(docker(&["ps", "-aq", "--filter", &self.filter()])).lines() {
            docker(&["rm", "-f", "-v", id]);
        }
        for id in text(docker(&["network", "ls", "-q", "--filter", &self.filter()])).lines() {
            docker(&["network", "rm", id]);
        }
        for id in text(docker(&["volume", "ls", "-q", "--filter", &self.filter()])).lines() {
            docker(&["volume", "rm", id]);
        }
        for (reference, digest) in &self.pins {
            let repository = reference.rsplit_once(':').unwrap().0;
            docker(&["rmi", "-f", &format!("{repository}@{digest}")]);
        }
        let _ = self.registry.kill();
        let _ = self.registry.wait();
    }
}

/// The actions of a plan by subject.
pub(crate) fn actions(plan: &Plan) -> BTreeMap<&str, Action> {
    plan.changes
        .iter()
        .map(|change| (change.subject.as_str(), change.action))
        .collect()
}

/// The `docker` program, or what `LONGSHORE_TEST_COMPOSE` names.
fn plugin() -> PathBuf {
    std::env::var_os("LONGSHORE_TEST_COMPOSE")
        .map_or_else(|| PathBuf::from("docker"), PathBuf::from)
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests start the programs that they compare with"
)]
pub(crate) fn command(program: &str) -> std::process::Command {
    std::process::Command::new(program)
}

pub(crate) fn docker(arguments: &[&str]) -> Output {
    command("docker").args(arguments).output().unwrap()
}

fn start_registry(directory: &Path, host: &str) -> Child {
    let configuration = directory.join("registry.yml");
    let storage = directory.join("registry");
    fs::write(&configuration, format!("version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n", storage.display())).unwrap();
    let child = command("docker-registry")
        .arg("serve")
        .arg(&configuration)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = child.expect("these tests need Debian's `docker-registry`");
    let deadline = Instant::now() + Duration::from_secs(30);
    while std::net::TcpStream::connect(host).is_err() {
        assert!(
            Instant::now() < deadline,
            "the registry does not listen at {host}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}
