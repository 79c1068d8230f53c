use super::super::fixture::{Archive, fetched, layer, listing};
use super::*;

struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("staging")).unwrap();
        fs::create_dir(root.path().join("releases")).unwrap();
        Self { root }
    }

    fn release(&self, format: &str, layers: Vec<Vec<u8>>) -> FetchedRelease {
        let layers = layers
            .into_iter()
            .map(|content| layer("application/vnd.oci.image.layer.v1.tar", &[], content))
            .collect();
        fetched(&self.root.path().join("staging"), format, layers)
    }

    fn releases(&self) -> PathBuf {
        self.root.path().join("releases")
    }

    fn target(&self) -> PathBuf {
        self.releases().join("sha256-abc")
    }

    /// Nothing was written, under no name.
    #[track_caller]
    fn assert_untouched(&self) {
        assert_eq!(listing(&self.releases()), Vec::<String>::new());
    }
}

fn archive() -> Archive {
    Archive::new()
        .directory("./")
        .file("./compose.yaml", "services: {}\n")
        .executable("bin/run", "#!/bin/sh\n")
        .directory("empty/")
        .file("a/deep/er/file", "x")
}

const EXPECTED: [&str; 8] = [
    "a/ 755",
    "a/deep/ 755",
    "a/deep/er/ 755",
    "a/deep/er/file 644 x",
    "bin/ 755",
    "bin/run 755 #!/bin/sh\n",
    "compose.yaml 644 services: {}\n",
    "empty/ 755",
];

#[test]
fn writes_the_tree_with_fixed_modes() {
    for content in [archive().end(), archive().gzip(), archive().zstd()] {
        let place = Place::new();
        let release = place.release("tar", vec![content]);
        extract(&release, &place.target()).unwrap();
        assert_eq!(listing(&place.target()), EXPECTED);
        assert_eq!(fs::metadata(place.target()).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_dir(place.releases()).unwrap().count(), 1);
    }
}

#[test]
fn an_identical_directory_is_fine_and_another_one_is_not_touched() {
    let place = Place::new();
    let release = place.release("longshore", vec![archive().end()]);
    extract(&release, &place.target()).unwrap();
    let before = fs::metadata(place.target()).unwrap().ino();
    extract(&release, &place.target()).unwrap();
    assert_eq!(fs::metadata(place.target()).unwrap().ino(), before);

    fs::write(place.target().join("compose.yaml"), "services: []\n").unwrap();
    let error = extract(&release, &place.target()).unwrap_err();
    assert!(matches!(error, ReleaseError::Io { .. }), "{error:?}");
    assert_eq!(
        fs::read_to_string(place.target().join("compose.yaml")).unwrap(),
        "services: []\n"
    );
    assert_eq!(fs::read_dir(place.releases()).unwrap().count(), 1);
}

#[test]
fn what_a_crash_left_is_cleared() {
    let place = Place::new();
    let partial = place.releases().join(".sha256-abc.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("half"), "x").unwrap();
    extract(
        &place.release("longshore", vec![archive().end()]),
        &place.target(),
    )
    .unwrap();
    assert_eq!(listing(&place.target()), EXPECTED);
    assert!(!partial.exists());
}

#[track_caller]
fn check_refused(what: &str, content: Vec<u8>, message: &str) {
    for format in ["longshore", "tar"] {
        let place = Place::new();
        let release = place.release(format, vec![content.clone()]);
        let error = extract(&release, &place.target()).unwrap_err();
        assert!(
            matches!(error, ReleaseError::Rejected(_)),
            "{what}: {error:?}"
        );
        assert!(error.to_string().contains(message), "{what}: {error}");
        place.assert_untouched();
    }
}

#[test]
fn refuses_before_a_byte_is_written() {
    // The fault comes last, after files that are fine.
    let good = archive;
    let cases = [
        (
            "symbolic link",
            good().special("link", b'2', "compose.yaml"),
            "link",
        ),
        (
            "symbolic link out",
            good().special("link", b'2', "/etc/passwd"),
            "link",
        ),
        (
            "hard link",
            good().special("link", b'1', "compose.yaml"),
            "link",
        ),
        ("character device", good().special("null", b'3', ""), "null"),
        ("block device", good().special("disk", b'4', ""), "disk"),
        ("FIFO", good().special("pipe", b'6', ""), "pipe"),
        ("parent", good().file("../up", "x"), "leaves the tree"),
        (
            "parent inside",
            good().file("a/../../up", "x"),
            "leaves the tree",
        ),
        ("absolute", good().file("/etc/cron.d/x", "x"), "absolute"),
        ("twice", good().file("compose.yaml", "other"), "twice"),
        (
            "file and directory",
            good().file("compose.yaml/x", "x"),
            "compose.yaml",
        ),
    ];
    for (what, archive, message) in cases {
        check_refused(what, archive.clone().end(), message);
        check_refused(what, archive.gzip(), message);
    }
}

#[test]
fn refuses_content_after_the_end_and_before_it() {
    let mut trailing = archive().end();
    trailing.extend([0; 512]);
    trailing.extend(b"smuggled");
    check_refused("trailing", trailing, "after its end");
    let mut cut = archive().end();
    cut.truncate(1100);
    check_refused("cut", cut, "cut off");
    check_refused("no tar", b"hello".to_vec(), "");
    let mut damaged = archive().gzip();
    let last = damaged.len() - 5;
    damaged[last] ^= 1;
    check_refused("gzip checksum", damaged, "damaged");
}

#[test]
fn refuses_bombs() {
    let mut zeros = Archive::new();
    let content = "\0".repeat(1 << 20);
    for index in 0..40 {
        zeros = zeros.file(&format!("zeros-{index}"), &content);
    }
    check_refused("bomb", zeros.zstd(), "times its compressed size");

    let place = Place::new();
    let mut many = Archive::new();
    for index in 0..20 {
        many = many.file(&format!("f{index}"), "");
    }
    let release = place.release("tar", vec![many.end()]);
    let limits = Limits {
        entries: 19,
        ..Limits::default()
    };
    let error = extract_with(&release, &place.target(), &limits, &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("19 entries"), "{error}");
    place.assert_untouched();
}

#[test]
fn the_limits_hold_for_all_layers_together() {
    let place = Place::new();
    let layers = (0..4)
        .map(|index| Archive::new().file(&format!("f{index}"), "x").end())
        .collect();
    let release = place.release("tar", layers);
    let limits = Limits {
        entries: 3,
        ..Limits::default()
    };
    let error = extract_with(&release, &place.target(), &limits, &mut |_| Ok(())).unwrap_err();
    assert!(matches!(error, ReleaseError::Rejected(_)), "{error}");
    place.assert_untouched();
}

#[test]
fn a_blob_that_changed_on_the_disk_is_not_used() {
    let place = Place::new();
    let release = place.release("longshore", vec![archive().end()]);
    // Zeros after the end: the archive is still valid, the blob is not.
    let path = &release.layers[0].1;
    let mut content = fs::read(path).unwrap();
    content.extend([0; 512]);
    fs::write(path, content).unwrap();
    let error = extract(&release, &place.target()).unwrap_err();
    assert!(matches!(error, ReleaseError::Io { .. }), "{error:?}");
    place.assert_untouched();
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    for allowed in [0, 13, 20] {
        let place = Place::new();
        let release = place.release("longshore", vec![archive().end()]);
        let mut left = allowed;
        let error = extract_with(
            &release,
            &place.target(),
            &Limits::default(),
            &mut |bytes| {
                left = match u64::checked_sub(left, bytes) {
                    Some(left) => left,
                    None => return Err(io::ErrorKind::StorageFull.into()),
                };
                Ok(())
            },
        )
        .unwrap_err();
        let ReleaseError::Io { source, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        place.assert_untouched();
    }
}

#[test]
fn layers_lie_over_each_other() {
    let place = Place::new();
    let release = place.release(
        "tar",
        vec![
            Archive::new()
                .file("a", "old")
                .file("d/x", "x")
                .file("d/y", "y")
                .file("gone", "g")
                .file("o/low", "l")
                .file("turns/x", "x")
                .end(),
            Archive::new()
                .file("a", "new")
                .file("d/.wh.x", "")
                .file(".wh.gone", "")
                .file("o/up", "u")
                .file("o/.wh..wh..opq", "")
                .file("turns", "file now")
                .gzip(),
        ],
    );
    extract(&release, &place.target()).unwrap();
    assert_eq!(
        listing(&place.target()),
        [
            "a 644 new",
            "d/ 755",
            "d/y 644 y",
            "o/ 755",
            "o/up 644 u",
            "turns 644 file now"
        ]
    );
}

#[test]
fn whiteouts_mean_nothing_in_our_own_format() {
    let place = Place::new();
    let release = place.release("longshore", vec![Archive::new().file(".wh.a", "x").end()]);
    extract(&release, &place.target()).unwrap();
    assert_eq!(listing(&place.target()), [".wh.a 644 x"]);
}

#[test]
fn compose_artifacts_are_put_together_as_compose_does() {
    let place = Place::new();
    let file = "application/vnd.docker.compose.file+yaml";
    let layers = vec![
        layer(
            file,
            &[("com.docker.compose.file", "compose.yaml")],
            b"name: shop\n".to_vec(),
        ),
        layer(
            file,
            &[
                ("com.docker.compose.file", "base.yaml"),
                ("com.docker.compose.extends", "true"),
            ],
            b"base\n".to_vec(),
        ),
        layer(
            "application/vnd.docker.compose.envfile",
            &[("com.docker.compose.envfile", "app.env")],
            b"A=1\n".to_vec(),
        ),
        layer(
            file,
            &[("com.docker.compose.file", "image-digests.yaml")],
            b"services: {}\n".to_vec(),
        ),
        layer(
            "application/vnd.docker.compose.config.empty.v1+json",
            &[],
            b"{}".to_vec(),
        ),
    ];
    let release = fetched(&place.root.path().join("staging"), "compose-oci", layers);
    extract(&release, &place.target()).unwrap();
    assert_eq!(
        listing(&place.target()),
        [
            "app.env 644 A=1\n",
            "base.yaml 644 base\n",
            "compose.yaml 644 name: shop\n\n---\nservices: {}\n"
        ]
    );
}

#[test]
fn names_in_annotations_stay_in_the_tree() {
    for name in ["../up", "/abs", "", "a//b", "a\nb", "."] {
        for (format, media_type, key) in [
            (
                "compose-oci",
                "application/vnd.docker.compose.envfile",
                "com.docker.compose.envfile",
            ),
            ("tar", "text/plain", "org.opencontainers.image.title"),
        ] {
            let place = Place::new();
            let release = fetched(
                &place.root.path().join("staging"),
                format,
                vec![layer(media_type, &[(key, name)], b"A=1\n".to_vec())],
            );
            let error = extract(&release, &place.target()).unwrap_err();
            assert!(
                matches!(error, ReleaseError::Rejected(_)),
                "{name:?}: {error}"
            );
            place.assert_untouched();
        }
    }
}

#[test]
fn files_that_oras_pushed_singly() {
    let place = Place::new();
    let title = "org.opencontainers.image.title";
    let layers = vec![
        layer(
            "application/vnd.oci.image.layer.v1.tar",
            &[(title, "compose.yaml")],
            b"services: {}\n".to_vec(),
        ),
        layer("text/plain", &[(title, "conf/app.conf")], b"x".to_vec()),
        layer(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            &[(title, "dir"), ("io.deis.oras.content.unpack", "true")],
            Archive::new().file("dir/a", "a").gzip(),
        ),
        layer(
            "application/octet-stream",
            &[(title, "files.tar.gz")],
            Archive::new().file("b", "b").gzip(),
        ),
    ];
    let release = fetched(&place.root.path().join("staging"), "tar", layers);
    extract(&release, &place.target()).unwrap();
    assert_eq!(
        listing(&place.target()),
        [
            "b 644 b",
            "compose.yaml 644 services: {}\n",
            "conf/ 755",
            "conf/app.conf 644 x",
            "dir/ 755",
            "dir/a 644 a"
        ]
    );
}
