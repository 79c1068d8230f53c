use std::collections::HashMap;
use std::sync::Mutex;

use super::super::fixture::{Archive, layer};
use super::super::{ImagePin, Variable};
use super::*;

/// A registry that holds what it was given.
#[derive(Default)]
struct Registry {
    manifests: HashMap<Digest, (String, Vec<u8>)>,
    blobs: HashMap<Digest, Vec<u8>>,
    downloads: Mutex<Vec<Digest>>,
}

impl Source for Registry {
    fn manifest<'a>(
        &'a self,
        digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Option<(Descriptor, Bytes)>, client::Error>> {
        Box::pin(async move {
            Ok(self.manifests.get(digest).map(|(media_type, body)| {
                (
                    Descriptor::of(media_type, body),
                    Bytes::copy_from_slice(body),
                )
            }))
        })
    }

    fn blob<'a>(
        &'a self,
        descriptor: &'a Descriptor,
    ) -> BoxFuture<'a, Result<Bytes, client::Error>> {
        Box::pin(async move {
            self.blobs
                .get(&descriptor.digest)
                .map(|blob| Bytes::copy_from_slice(blob))
                .ok_or_else(|| client::Error::NotFound(descriptor.digest.to_string()))
        })
    }

    fn blob_to_file<'a>(
        &'a self,
        descriptor: &'a Descriptor,
        path: &'a Path,
    ) -> BoxFuture<'a, Result<(), client::Error>> {
        Box::pin(async move {
            self.downloads
                .lock()
                .unwrap()
                .push(descriptor.digest.clone());
            std::fs::write(path, self.blob(descriptor).await?).unwrap();
            Ok(())
        })
    }
}

impl Registry {
    fn push(
        &mut self,
        artifact_type: Option<&str>,
        config: (&str, &[u8]),
        layers: Vec<(Descriptor, Vec<u8>)>,
    ) -> Descriptor {
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            artifact_type: artifact_type.map(str::to_owned),
            config: Some(Descriptor::of(config.0, config.1)),
            layers: Some(
                layers
                    .iter()
                    .map(|(descriptor, _)| descriptor.clone())
                    .collect(),
            ),
            ..Manifest::default()
        };
        self.blobs
            .insert(Digest::sha256(config.1), config.1.to_vec());
        for (descriptor, content) in layers {
            self.blobs.insert(descriptor.digest, content);
        }
        self.put(media_type::OCI_MANIFEST, manifest.to_bytes())
    }

    fn index(&mut self, artifact_type: Option<&str>, manifests: Vec<Descriptor>) -> Descriptor {
        let index = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_INDEX.to_owned(),
            artifact_type: artifact_type.map(str::to_owned),
            manifests: Some(manifests),
            ..Manifest::default()
        };
        self.put(media_type::OCI_INDEX, index.to_bytes())
    }

    fn put(&mut self, media_type: &str, body: Vec<u8>) -> Descriptor {
        let descriptor = Descriptor::of(media_type, &body);
        self.manifests
            .insert(descriptor.digest.clone(), (media_type.to_owned(), body));
        descriptor
    }

    async fn fetch(
        &self,
        descriptor: &Descriptor,
        expected: Option<&str>,
    ) -> Result<FetchedRelease, ReleaseError> {
        let staging = tempfile::tempdir().unwrap();
        fetch(self, &descriptor.digest, staging.path(), expected).await
    }

    /// Fetches files that came as one layer of an image without types.
    async fn tar(archive: Archive, expected: Option<&str>) -> Result<FetchedRelease, ReleaseError> {
        let mut registry = Self::default();
        let image = registry.push(
            None,
            (media_type::OCI_CONFIG, b"{}"),
            vec![layer(media_type::OCI_LAYER_GZIP, &[], archive.gzip())],
        );
        registry.fetch(&image, expected).await
    }
}

fn config() -> ReleaseConfig {
    ReleaseConfig {
        schema_version: 1,
        name: "shop".to_owned(),
        version: Some("1".to_owned()),
        engine: EngineKind::Compose,
        entry: vec!["compose.yaml".to_owned()],
        variables: vec![Variable {
            name: "A".to_owned(),
            default: None,
            required: true,
        }],
        images: vec![ImagePin {
            service: "web".to_owned(),
            reference: "nginx:1".to_owned(),
            digest: Digest::sha256(b"nginx"),
            media_type: media_type::OCI_INDEX.to_owned(),
            platforms: vec![Platform::host()],
        }],
    }
}

fn files() -> (Descriptor, Vec<u8>) {
    layer(
        media_type::RELEASE_FILES,
        &[],
        Archive::new().file("compose.yaml", "services: {}\n").end(),
    )
}

fn ours(registry: &mut Registry, config: &[u8]) -> Descriptor {
    registry.push(
        Some(media_type::RELEASE),
        (media_type::RELEASE_CONFIG, config),
        vec![files()],
    )
}

#[track_caller]
fn rejection<T: std::fmt::Debug>(result: Result<T, ReleaseError>, part: &str) {
    match result {
        Err(ReleaseError::Rejected(message)) => assert!(message.contains(part), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn reads_our_own_format() {
    let mut registry = Registry::default();
    let pushed = ours(&mut registry, &serde_json::to_vec(&config()).unwrap());
    let staging = tempfile::tempdir().unwrap();
    let release = fetch(&registry, &pushed.digest, staging.path(), Some("shop"))
        .await
        .unwrap();
    assert_eq!(release.config, config());
    assert_eq!(release.format, "longshore");
    assert_eq!(release.descriptor.digest, pushed.digest);
    assert_eq!(release.layers.len(), 1);
    assert_eq!(std::fs::read(&release.layers[0].1).unwrap(), files().1);
    // A second try with the same staging moves nothing; a damaged file is fetched again.
    fetch(&registry, &pushed.digest, staging.path(), Some("shop"))
        .await
        .unwrap();
    assert_eq!(registry.downloads.lock().unwrap().len(), 1);
    std::fs::write(&release.layers[0].1, b"half").unwrap();
    fetch(&registry, &pushed.digest, staging.path(), Some("shop"))
        .await
        .unwrap();
    assert_eq!(registry.downloads.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_release_of_another_name_is_rejected_before_its_files_move() {
    let mut registry = Registry::default();
    let pushed = ours(&mut registry, &serde_json::to_vec(&config()).unwrap());
    rejection(
        registry.fetch(&pushed, Some("other")).await,
        "the release is `shop`, this target expects `other`",
    );
    assert!(registry.downloads.lock().unwrap().is_empty());
    registry.fetch(&pushed, None).await.unwrap();
}

#[tokio::test]
async fn configurations_that_are_wrong() {
    let json = serde_json::to_string(&config()).unwrap();
    let cases = [
        (
            json.replace("\"schemaVersion\":1", "\"schemaVersion\":2"),
            "update the agent",
        ),
        (
            "{\"schemaVersion\":9,\"all\":\"new\"}".to_owned(),
            "schema version 9",
        ),
        (json.replace("\"shop\"", "\"Shop/..\""), "name"),
        (
            json.replace("\"compose.yaml\"", "\"../compose.yaml\""),
            "entry file",
        ),
        (json.replace("\"compose.yaml\"", "\"/etc/x\""), "entry file"),
        (json.replace("[\"compose.yaml\"]", "[]"), "no entry file"),
        (
            json.replace(
                &Digest::sha256(b"nginx").to_string(),
                &format!("sha512:{}", "a".repeat(128)),
            ),
            "only sha256",
        ),
        ("not json".to_owned(), "cannot be read"),
        (
            json.replace("\"compose\"", "\"kubernetes\""),
            "cannot be read",
        ),
    ];
    for (content, part) in cases {
        let mut registry = Registry::default();
        let pushed = ours(&mut registry, content.as_bytes());
        rejection(registry.fetch(&pushed, None).await, part);
    }
    let content = serde_json::to_vec(&config()).unwrap();
    let mut registry = Registry::default();
    let two = registry.push(
        Some(media_type::RELEASE),
        (media_type::RELEASE_CONFIG, &content),
        vec![files(), files()],
    );
    rejection(registry.fetch(&two, None).await, "exactly one layer");
    let untyped = registry.push(
        Some(media_type::RELEASE),
        (media_type::OCI_EMPTY, b"{}"),
        vec![files()],
    );
    rejection(registry.fetch(&untyped, None).await, "no configuration");
    let none = registry.push(
        Some(media_type::RELEASE),
        (media_type::RELEASE_CONFIG, &content),
        vec![],
    );
    rejection(registry.fetch(&none, None).await, "no layers");
}

#[tokio::test]
async fn what_is_not_there_may_come_later() {
    let registry = Registry::default();
    let missing = Descriptor::of(media_type::OCI_MANIFEST, b"missing");
    let error = registry.fetch(&missing, None).await.unwrap_err();
    assert!(
        matches!(error, ReleaseError::Client(client::Error::NotFound(_))),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_index_is_followed_to_this_host() {
    let mut registry = Registry::default();
    let platform = |os: &str, architecture: &str| Platform {
        os: os.to_owned(),
        architecture: architecture.to_owned(),
        ..Platform::default()
    };
    let image = |registry: &mut Registry, name: &str, platform: Option<Platform>| {
        let archive = Archive::new().file("compose.yaml", &format!("name: {name}\n"));
        let mut descriptor = registry.push(
            None,
            (media_type::OCI_CONFIG, b"{}"),
            vec![layer(media_type::OCI_LAYER_GZIP, &[], archive.gzip())],
        );
        descriptor.platform = platform;
        descriptor
    };
    let other = image(&mut registry, "other", Some(platform("plan9", "mips")));
    let here = image(&mut registry, "here", Some(Platform::host()));
    let attestation = image(
        &mut registry,
        "attestation",
        Some(platform("unknown", "unknown")),
    );
    let index = registry.index(None, vec![attestation.clone(), other.clone(), here]);
    let release = registry.fetch(&index, None).await.unwrap();
    assert_eq!(release.config.name, "here");
    assert_eq!(
        release.descriptor.digest, index.digest,
        "the identity stays the index's"
    );

    let foreign = registry.index(None, vec![other, attestation]);
    rejection(registry.fetch(&foreign, None).await, "it has `plan9/mips`");
    let any = image(&mut registry, "any", None);
    let any = registry.index(None, vec![any]);
    assert_eq!(registry.fetch(&any, None).await.unwrap().config.name, "any");
    let nested = registry.index(None, vec![any]);
    rejection(registry.fetch(&nested, None).await, "another index");
}

#[tokio::test]
async fn doco_artifacts() {
    let archive = Archive::new()
        .file(".doco-cd.yaml", "name: shop\nversion: doco.v1\nworking_dir: ./deploy\ncompose_files: [compose.yaml, missing.yaml, sub/extra.yml]\nenv_files: [.env, more.env]\nenvironment:\n  B: from environment\n  N: 5\nprofiles: [web, db]\nremove_orphans: false\nunknown_key: ignored\n")
        .file("Dockerfile", "FROM scratch\nCOPY . /\n")
        .file("deploy/compose.yaml", "services: {}\n")
        .file("deploy/sub/extra.yml", "services: {}\n")
        .file("deploy/.env", "A=1\nB=file\n")
        .file("deploy/more.env", "C=\"${A}2\"\n");
    let release = Registry::tar(archive, Some("shop")).await.unwrap();
    assert_eq!(release.format, "doco");
    assert_eq!(release.config.name, "shop");
    assert_eq!(release.config.engine, EngineKind::Compose);
    assert_eq!(
        release.config.entry,
        ["deploy/compose.yaml", "deploy/sub/extra.yml"]
    );
    assert_eq!(release.config.images, []);
    let variables: Vec<_> = release
        .config
        .variables
        .iter()
        .map(|variable| {
            (
                variable.name.as_str(),
                variable.default.as_deref().unwrap(),
                variable.required,
            )
        })
        .collect();
    assert_eq!(
        variables,
        [
            ("A", "1", false),
            ("B", "from environment", false),
            ("C", "12", false),
            ("COMPOSE_PROFILES", "web,db", false),
            ("N", "5", false),
        ]
    );
}

#[tokio::test]
async fn doco_defaults() {
    let archive = Archive::new()
        .file("./.doco-cd.yml", "name: shop\n")
        .file("./docker-compose.yml", "services: {}\n")
        .file("./.env", "A=1\n");
    let release = Registry::tar(archive, None).await.unwrap();
    assert_eq!(release.config.entry, ["docker-compose.yml"]);
    assert_eq!(release.config.variables.len(), 1);
}

#[tokio::test]
async fn doco_with_several_deployments() {
    let archive = || {
        Archive::new()
            .file(
                ".doco-cd.yaml",
                "name: a\ncompose_files: [a.yaml]\n---\nname: b\ncompose_files: [b.yaml]\n",
            )
            .file("a.yaml", "services: {}\n")
            .file("b.yaml", "services: {}\n")
    };
    assert_eq!(
        Registry::tar(archive(), Some("b"))
            .await
            .unwrap()
            .config
            .entry,
        ["b.yaml"]
    );
    assert_eq!(
        Registry::tar(archive(), None).await.unwrap().config.entry,
        ["a.yaml"]
    );
    rejection(Registry::tar(archive(), Some("c")).await, "only `a`, `b`");
}

#[tokio::test]
async fn doco_files_that_are_refused() {
    let cases = [
        ("compose_files: [compose.yaml]\n", "`name` is missing"),
        (
            "name: shop\nversion: doco.v2\n",
            "`doco.v2` is not supported",
        ),
        ("name: Shop X\n", "not a release name"),
        ("name: shop\nworking_dir: ../up\n", "leaves the release"),
        (
            "name: shop\ncompose_files: [/etc/x.yaml]\n",
            "leaves the release",
        ),
        (
            "name: shop\ncompose_files: [none.yaml]\n",
            "none of its `compose_files`",
        ),
        ("name: shop\nenv_files: ['remote:x.env']\n", "not verified"),
        (
            "name: shop\nenv_files: [none.env]\n",
            "`none.env`, which is not in the artifact",
        ),
        (
            "name: shop\nrepository_url: https://example.com/x.git\n",
            "not verified",
        ),
        (
            "name: shop\nexternal_secrets:\n  A: ref\n",
            "external_secrets",
        ),
        ("name: shop\nauto_discovery: true\n", "auto_discovery"),
        ("name: shop\ndestroy: {enabled: true}\n", "destroy"),
        ("name: [\n", "line"),
    ];
    for (content, part) in cases {
        let archive = Archive::new()
            .file(".doco-cd.yaml", content)
            .file("compose.yaml", "services: {}\n");
        rejection(Registry::tar(archive, None).await, part);
    }
    let archive = Archive::new()
        .file(".doco-cd.yaml", "name: shop\n")
        .file("compose.yaml", "x");
    rejection(
        Registry::tar(archive, Some("other")).await,
        "expects `other`",
    );
}

#[tokio::test]
async fn flux_artifacts() {
    let mut registry = Registry::default();
    let archive = Archive::new()
        .file("kustomization.yaml", "x")
        .file("app/deploy.yaml", "x");
    let pushed = registry.push(
        None,
        ("application/vnd.cncf.flux.config.v1+json", b"{}"),
        vec![layer(
            "application/vnd.cncf.flux.content.v1.tar+gzip",
            &[],
            archive.gzip(),
        )],
    );
    let release = registry.fetch(&pushed, Some("cluster")).await.unwrap();
    assert_eq!(
        (release.format.as_str(), release.config.name.as_str()),
        ("flux", "cluster")
    );
    assert_eq!(release.config.engine, EngineKind::Files);
    assert!(release.config.entry.is_empty());
}

#[tokio::test]
async fn compose_artifacts() {
    let mut registry = Registry::default();
    let file = "application/vnd.docker.compose.file+yaml";
    let layers = vec![
        layer(
            file,
            &[("com.docker.compose.file", "compose.yaml")],
            b"name: shop\nservices: {}\n".to_vec(),
        ),
        layer(
            "application/vnd.docker.compose.envfile",
            &[("com.docker.compose.envfile", "x.env")],
            b"A=1\n".to_vec(),
        ),
    ];
    let mut project = registry.push(
        Some("application/vnd.docker.compose.project"),
        ("application/vnd.oci.empty.v1+json", b"{}"),
        layers.clone(),
    );
    let old = registry.push(
        None,
        ("application/vnd.docker.compose.config.empty.v1+json", b"{}"),
        layers,
    );
    project.artifact_type = Some("application/vnd.docker.compose.project".to_owned());
    let image = Descriptor::of(media_type::OCI_MANIFEST, b"an image of it");
    let app = registry.index(
        Some("application/vnd.docker.compose.project"),
        vec![image, project.clone()],
    );
    for pushed in [project, old, app] {
        let release = registry.fetch(&pushed, None).await.unwrap();
        assert_eq!(
            (release.format.as_str(), release.config.name.as_str()),
            ("compose-oci", "shop")
        );
        assert_eq!(release.config.entry, ["compose.yaml"]);
        rejection(
            registry.fetch(&pushed, Some("other")).await,
            "expects `other`",
        );
    }
}

#[tokio::test]
async fn layers_of_oras_and_docker() {
    // `oras push REF ./deploy` packs the directory itself.
    let archive = Archive::new()
        .directory("deploy/")
        .file("deploy/compose.yml", "services: {}\n")
        .file("deploy/x/compose.yaml", "x");
    let release = Registry::tar(archive, Some("shop")).await.unwrap();
    assert_eq!(
        (release.format.as_str(), release.config.name.as_str()),
        ("tar", "shop")
    );
    assert_eq!(release.config.entry, ["deploy/compose.yml"]);

    let mut registry = Registry::default();
    let pushed = registry.push(
        Some("application/vnd.example"),
        (media_type::OCI_EMPTY, b"{}"),
        vec![
            layer(
                "",
                &[("org.opencontainers.image.title", "compose.yaml")],
                b"name: one\n".to_vec(),
            ),
            layer(
                "application/vnd.example.layer",
                &[],
                Archive::new().file("more", "x").zstd(),
            ),
        ],
    );
    let release = registry.fetch(&pushed, None).await.unwrap();
    assert_eq!(release.config.name, "one");
    assert_eq!(release.config.entry, ["compose.yaml"]);

    let none = Registry::tar(
        Archive::new().file("a", "x").file("b/compose.yaml", "x"),
        None,
    )
    .await
    .unwrap();
    assert_eq!(none.config.engine, EngineKind::Files);
    assert_eq!(none.config.name, "");
}

#[tokio::test]
async fn what_is_no_release() {
    let mut registry = Registry::default();
    let junk = registry.push(
        None,
        (media_type::OCI_EMPTY, b"{}"),
        vec![layer("text/plain", &[], b"hello".to_vec())],
    );
    rejection(registry.fetch(&junk, None).await, "the layer is refused");
    let empty = registry.push(
        None,
        (media_type::OCI_CONFIG, b"{}"),
        vec![layer(media_type::OCI_LAYER, &[], Archive::new().end())],
    );
    rejection(registry.fetch(&empty, None).await, "no files");
    let link = Archive::new()
        .file("compose.yaml", "x")
        .special("link", b'2', "/etc");
    rejection(Registry::tar(link, None).await, "link");
    let mut foreign = layer(
        media_type::OCI_LAYER,
        &[],
        Archive::new().file("a", "x").end(),
    );
    foreign.0.urls = vec!["https://example.com/layer".to_owned()];
    let foreign = registry.push(None, (media_type::OCI_CONFIG, b"{}"), vec![foreign]);
    rejection(registry.fetch(&foreign, None).await, "outside the registry");
    let mut large = layer(
        media_type::OCI_LAYER,
        &[],
        Archive::new().file("a", "x").end(),
    );
    large.0.size = 5 << 30;
    let large = registry.push(None, (media_type::OCI_CONFIG, b"{}"), vec![large]);
    rejection(registry.fetch(&large, None).await, "more than the limit");
    assert_eq!(registry.downloads.lock().unwrap().len(), 2);
}
