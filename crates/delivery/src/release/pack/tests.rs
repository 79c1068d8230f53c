use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;

use super::*;

/// Answers from a table, and notes what it was asked.
#[derive(Default)]
struct Table {
    images: HashMap<String, Image>,
    asked: Mutex<Vec<String>>,
}

impl ImageResolver for Table {
    fn resolve<'a>(&'a self, reference: &'a Reference) -> BoxFuture<'a, Result<Image, String>> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(reference.to_string());
            self.images
                .get(&reference.to_string())
                .cloned()
                .ok_or_else(|| "it was not found".to_owned())
        })
    }
}

fn table() -> Table {
    let image = |content: &str, platforms: &[&str]| Image {
        digest: Digest::sha256(content.as_bytes()),
        media_type: media_type::OCI_INDEX.to_owned(),
        platforms: platforms
            .iter()
            .map(|name| Platform {
                os: "linux".to_owned(),
                architecture: (*name).to_owned(),
                ..Platform::default()
            })
            .collect(),
    };
    Table {
        images: HashMap::from([
            (
                "docker.io/library/nginx:1".to_owned(),
                image("nginx", &["amd64", "arm64"]),
            ),
            ("example.com/db:2".to_owned(), image("db", &["amd64"])),
        ]),
        asked: Mutex::default(),
    }
}

const COMPOSE: &str = "name: shop\nservices:\n  web:\n    image: nginx:1\n    environment:\n      MODE: ${MODE:-fast}\n    healthcheck: {test: [CMD, 'true']}\n    volumes:\n      - ./web:/web:ro\n  db:\n    image: example.com/db:2\n    healthcheck: {test: [CMD, 'true']}\n  proxy:\n    image: nginx:1\n    healthcheck: {test: [CMD, 'true']}\n";

/// The same tree, written in another order and with other modes where they do not count.
fn tree(reverse: bool, group: u32) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let mut files = vec![
        ("compose.yaml", COMPOSE, 0o644),
        ("web/index.html", "<h1>shop</h1>\n", 0o644),
        (
            "web.txt",
            "sorts between `web` and `web/index.html`\n",
            0o644,
        ),
        ("bin/run", "#!/bin/sh\n", 0o755),
        (".git/HEAD", "ref: refs/heads/main\n", 0o644),
        ("compose.yaml~", "litter", 0o644),
        ("notes.log", "left out", 0o644),
        (".longshoreignore", "*.log\n", 0o644),
    ];
    if reverse {
        files.reverse();
    }
    for (name, content, mode) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode | group)).unwrap();
        for directory in [root.path().join("web"), root.path().join("bin")] {
            if directory.exists() {
                fs::set_permissions(directory, fs::Permissions::from_mode(0o755 | group)).unwrap();
            }
        }
        if reverse {
            let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_modified(old)
                .unwrap();
        }
    }
    root
}

fn options() -> PackOptions {
    PackOptions {
        version: Some("1.4.2".to_owned()),
        ..PackOptions::default()
    }
}

#[tokio::test]
async fn the_digest_is_golden() {
    let packed = pack(tree(false, 0).path(), &options(), &table())
        .await
        .unwrap();
    let config = String::from_utf8(packed.config_bytes.clone()).unwrap();
    let nginx = Digest::sha256(b"nginx");
    let db = Digest::sha256(b"db");
    let index = media_type::OCI_INDEX;
    let amd64 = r#"{"architecture":"amd64","os":"linux"}"#;
    let arm64 = r#"{"architecture":"arm64","os":"linux"}"#;
    assert_eq!(
        config,
        format!(
            "{{\"schemaVersion\":1,\"name\":\"shop\",\"version\":\"1.4.2\",\"engine\":\"compose\",\"entry\":[\"compose.yaml\"],\
             \"variables\":[{{\"name\":\"MODE\",\"default\":\"fast\",\"required\":false}}],\
             \"images\":[{{\"service\":\"db\",\"reference\":\"example.com/db:2\",\"digest\":\"{db}\",\"mediaType\":\"{index}\",\"platforms\":[{amd64}]}},\
             {{\"service\":\"proxy\",\"reference\":\"nginx:1\",\"digest\":\"{nginx}\",\"mediaType\":\"{index}\",\"platforms\":[{amd64},{arm64}]}},\
             {{\"service\":\"web\",\"reference\":\"nginx:1\",\"digest\":\"{nginx}\",\"mediaType\":\"{index}\",\"platforms\":[{amd64},{arm64}]}}]}}"
        )
    );
    assert_eq!(packed.findings, []);
    // A change of these digests means that every release of everybody gets a new digest.
    assert_eq!(
        (
            packed.files_descriptor.digest.to_string().as_str(),
            packed.descriptor.digest.to_string().as_str()
        ),
        (GOLDEN_FILES, GOLDEN_MANIFEST)
    );
    let manifest = Manifest::parse(&packed.manifest, &packed.descriptor.media_type).unwrap();
    assert_eq!(manifest.artifact_type.as_deref(), Some(media_type::RELEASE));
    assert_eq!(
        manifest.config.unwrap().media_type,
        media_type::RELEASE_CONFIG
    );
    assert_eq!(manifest.layers.unwrap(), [packed.files_descriptor]);
}

const GOLDEN_FILES: &str =
    "sha256:ce8428e3e0da1dde82aefe3cb84d5542031f0ad49deb13f9dc6dc25d1e93bade";
const GOLDEN_MANIFEST: &str =
    "sha256:657e52708f37df6254eff856e24890c84e2aaa892ed0fa095d5eb8b2488ac8d9";

#[tokio::test]
async fn the_same_input_gives_the_same_digest() {
    let one = pack(tree(false, 0).path(), &options(), &table())
        .await
        .unwrap();
    let other = pack(tree(true, 0o020).path(), &options(), &table())
        .await
        .unwrap();
    assert_eq!(one.manifest, other.manifest);
    let changed = tree(false, 0);
    fs::set_permissions(
        changed.path().join("web.txt"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let changed = pack(changed.path(), &options(), &table()).await.unwrap();
    assert_ne!(one.descriptor.digest, changed.descriptor.digest);
}

#[tokio::test]
async fn the_archive_holds_the_tree_and_nothing_else() {
    struct Names(Vec<String>);
    impl oci::tar::Sink for Names {
        fn entry(&mut self, entry: oci::tar::Entry<'_>) -> std::io::Result<()> {
            let executable = matches!(entry.kind, oci::tar::Kind::File { executable: true });
            self.0.push(format!(
                "{}{}",
                entry.path,
                if executable { " x" } else { "" }
            ));
            Ok(())
        }
    }
    let packed = pack(tree(false, 0).path(), &options(), &table())
        .await
        .unwrap();
    let mut names = Names(Vec::new());
    let file = fs::File::open(packed.files.path()).unwrap();
    oci::tar::read(file, &oci::tar::Limits::default(), &mut names).unwrap();
    assert_eq!(
        names.0,
        [
            "bin",
            "bin/run x",
            "compose.yaml",
            "web",
            "web.txt",
            "web/index.html"
        ]
    );
}

#[tokio::test]
async fn each_reference_is_asked_for_once() {
    let table = table();
    pack(tree(false, 0).path(), &options(), &table)
        .await
        .unwrap();
    let mut asked = table.asked.into_inner().unwrap();
    asked.sort();
    assert_eq!(asked, ["docker.io/library/nginx:1", "example.com/db:2"]);
}

#[tokio::test]
async fn an_image_that_cannot_be_resolved_is_a_finding_with_its_line() {
    let mut table = table();
    table.images.remove("example.com/db:2");
    let error = pack(tree(false, 0).path(), &options(), &table)
        .await
        .unwrap_err();
    let ReleaseError::Lint(findings) = error else {
        panic!("{error:?}");
    };
    assert_eq!(findings.len(), 1);
    assert_eq!(
        (findings[0].file.as_str(), findings[0].line),
        ("compose.yaml", 11)
    );
    assert!(
        findings[0]
            .message
            .contains("`example.com/db:2` of `db` cannot be resolved: it was not found")
    );
}

#[tokio::test]
async fn lint_errors_ask_no_registry() {
    let root = tree(false, 0);
    fs::write(
        root.path().join("compose.yaml"),
        "name: shop\nservices:\n  a:\n    image: nginx:1\n  b:\n    build: .\n",
    )
    .unwrap();
    let table = table();
    let error = pack(root.path(), &options(), &table).await.unwrap_err();
    assert_eq!(error.to_string(), "the release has 1 error(s)");
    assert!(table.asked.into_inner().unwrap().is_empty());
}

#[tokio::test]
async fn annotations_are_the_manifests() {
    let options = PackOptions {
        annotations: BTreeMap::from([(
            "org.opencontainers.image.revision".to_owned(),
            "abc".to_owned(),
        )]),
        ..options()
    };
    let packed = pack(tree(false, 0).path(), &options, &table())
        .await
        .unwrap();
    let manifest = Manifest::parse(&packed.manifest, "").unwrap();
    assert_eq!(manifest.annotations, options.annotations);
}

#[test]
fn platforms_of_images() {
    let digest = Digest::sha256(b"x");
    let child = |platform: &str| {
        format!(
            r#"{{"mediaType":"{}","digest":"{digest}","size":1,"platform":{platform}}}"#,
            media_type::OCI_MANIFEST
        )
    };
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{},{},{}]}}"#,
        media_type::OCI_INDEX,
        child(r#"{"architecture":"arm64","os":"linux","variant":"v8"}"#),
        child(r#"{"architecture":"amd64","os":"linux"}"#),
        child(r#"{"architecture":"unknown","os":"unknown"}"#),
    );
    let (image, config) = read_image(index.as_bytes(), media_type::OCI_INDEX).unwrap();
    assert!(config.is_none());
    assert_eq!(image.digest, Digest::sha256(index.as_bytes()));
    let shown: Vec<_> = image.platforms.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["linux/arm64/v8", "linux/amd64"]);

    for (manifest_type, config_type) in [
        (media_type::OCI_MANIFEST, media_type::OCI_CONFIG),
        (media_type::DOCKER_MANIFEST, DOCKER_CONFIG),
    ] {
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{manifest_type}","config":{{"mediaType":"{config_type}","digest":"{digest}","size":1}},"layers":[]}}"#
        );
        let (image, config) = read_image(manifest.as_bytes(), manifest_type).unwrap();
        assert_eq!(image.media_type, manifest_type);
        assert_eq!(config.unwrap().digest, digest);
    }
    let artifact = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"{}","digest":"{digest}","size":2}},"layers":[]}}"#,
        media_type::OCI_EMPTY
    );
    assert!(read_image(artifact.as_bytes(), media_type::OCI_MANIFEST).is_err());
    assert!(read_image(b"junk", "").is_err());

    let platform =
        platform_of(br#"{"architecture":"arm64","os":"linux","variant":"v8","rootfs":{}}"#)
            .unwrap();
    assert_eq!(platform.to_string(), "linux/arm64/v8");
    assert_eq!(platform_of(b"{}"), None);
}

/// Callers hold these futures across threads; this is checked by compiling it.
#[expect(dead_code, reason = "it only has to compile")]
fn futures_are_send<'a>(
    client: &'a client::Client,
    repository: &'a client::Repository,
    release: &'a PackedRelease,
    digest: &'a Digest,
    reference: &'a Reference,
    path: &'a Path,
) -> Vec<Box<dyn Send + 'a>> {
    static OPTIONS: std::sync::LazyLock<PackOptions> = std::sync::LazyLock::new(options);
    vec![
        Box::new(super::super::fetch(repository, digest, path)),
        Box::new(super::super::fetch_named(repository, digest, path, "shop")),
        Box::new(super::super::pack(path, &OPTIONS, client)),
        Box::new(super::super::push(release, client, reference)),
    ]
}
