use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// A directory made of `name\ncontent` pairs.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root
}

fn named() -> PackOptions {
    PackOptions {
        name: Some("shop".to_owned()),
        ..PackOptions::default()
    }
}

/// Lints files and compares the findings: `E file:line message`.
#[track_caller]
fn check(files: &[(&str, &str)], expected: &[&str]) -> Analysis {
    let root = directory(files);
    let analysis = analyse(root.path(), &named()).unwrap();
    compare(&analysis.findings, expected);
    analysis
}

#[track_caller]
fn compare(findings: &[Finding], expected: &[&str]) {
    let found: Vec<String> = findings
        .iter()
        .map(|finding| {
            assert!(!finding.hint.is_empty(), "{finding:?} has no hint");
            assert!(!finding.message.ends_with('.') && !finding.hint.ends_with('.'));
            let severity = match finding.severity {
                Severity::Error => 'E',
                Severity::Warning => 'W',
            };
            format!(
                "{severity} {}:{} {}",
                finding.file, finding.line, finding.message
            )
        })
        .collect();
    assert_eq!(found, expected);
}

/// One service with a health check and these lines more.
fn service(lines: &str) -> String {
    let lines = format!("    {}\n", lines.replace('\n', "\n    "));
    format!("services:\n  web:\n    image: nginx:1\n    healthcheck: {{test: [CMD, x]}}\n{lines}")
}

#[track_caller]
fn check_service(lines: &str, more: &[(&str, &str)], expected: &[&str]) -> Analysis {
    let compose = service(lines);
    let mut files = vec![("compose.yaml", compose.as_str())];
    files.extend(more);
    check(&files, expected)
}

#[test]
fn a_good_release_has_no_findings() {
    let analysis = check_service(
        "ports: ['80:80']\nvolumes:\n  - ./conf:/etc/nginx:ro\n  - data:/data\n  - ${LONGSHORE_DATA}/x:/x\n  - /etc/localtime:/etc/localtime:ro",
        &[("conf/nginx.conf", "x")],
        &[],
    );
    assert_eq!(analysis.engine, EngineKind::Compose);
    assert_eq!(analysis.entry, ["compose.yaml"]);
    assert_eq!(analysis.variables, []);
    assert_eq!(analysis.images.len(), 1);
    assert_eq!(analysis.images[0].text, "nginx:1");
    assert_eq!(
        analysis.images[0].reference.to_string(),
        "docker.io/library/nginx:1"
    );
    assert_eq!(analysis.images[0].line, 3);
}

#[test]
fn images() {
    check(
        &[(
            "compose.yaml",
            "services:\n  a:\n    build: .\n    healthcheck: {test: x}\n  b:\n    healthcheck: {test: x}\n  c:\n    image: x:${TAG}\n    healthcheck: {test: x}\n  d:\n    image: Not An Image\n    healthcheck: {test: x}\n  e:\n    image: x:${VERSION:-1.2}\n    healthcheck: {test: x}\n  f:\n    build: .\n    image: y:1\n    healthcheck: {test: x}\n  g:\n    image: z:${Q:?say it}\n    healthcheck: {test: x}\n  h:\n    provider: {type: model}\n    healthcheck: {test: x}\n",
        )],
        &[
            "E compose.yaml:3 `a` has only `build`, so no image can be pinned",
            "E compose.yaml:5 `b` has no image",
            "E compose.yaml:8 the image of `c` stays open: `TAG` has no value",
            "E compose.yaml:11 the image of `d` is no reference: `library/Not An Image` is not a repository name, use lower-case letters, digits and `.`, `_`, `-` between them, components separated by `/`, at most 255 characters",
            "W compose.yaml:14 the image of `e` is fixed to `x:1.2`",
            "E compose.yaml:21 the image of `g` stays open: `Q` has no value",
            "E compose.yaml:23 `h` is run by a provider and cannot be pinned",
        ],
    );
    let sha512 = format!(
        "services:\n  a:\n    image: x@sha512:{}\n    healthcheck: {{test: x}}\n",
        "a".repeat(128)
    );
    check(
        &[("compose.yaml", &sha512)],
        &["E compose.yaml:3 the image of `a` is named by a digest other than sha256"],
    );
    let sha256 = format!(
        "services:\n  a:\n    image: x:1@sha256:{}\n    healthcheck: {{test: x}}\n",
        "a".repeat(64)
    );
    check(&[("compose.yaml", &sha256)], &[]);
}

#[test]
fn an_image_may_come_from_dot_env_and_is_then_closed() {
    let analysis = check(
        &[
            (
                "compose.yaml",
                "services:\n  a:\n    image: x:${TAG}\n    healthcheck: {test: x}\n",
            ),
            (".env", "TAG=2\n"),
        ],
        &["W compose.yaml:3 the image of `a` is fixed to `x:2`"],
    );
    assert_eq!(analysis.images[0].text, "x:2");
    assert_eq!(analysis.variables, []);
}

#[test]
fn includes_are_followed() {
    let analysis = check(
        &[
            (
                "compose.yaml",
                "include:\n  - db/compose.yaml\n  - path: [cache/a.yaml, cache/b.yaml]\n    project_directory: .\nservices:\n  web:\n    image: web:1\n    healthcheck: {test: x}\n",
            ),
            (
                "db/compose.yaml",
                "services:\n  db:\n    image: db:${DB_TAG}\n    healthcheck: {test: x}\n    volumes:\n      - ./init.sql:/init.sql:ro\n      - ./lacks:/x\n",
            ),
            ("db/.env", "DB_TAG=9\n"),
            ("db/init.sql", "x"),
            (
                "cache/a.yaml",
                "services:\n  cache:\n    healthcheck: {test: x}\n    volumes: ['./db/init.sql:/x:ro']\n",
            ),
            ("cache/b.yaml", "services:\n  cache:\n    image: cache:1\n"),
        ],
        &[
            "W db/compose.yaml:3 the image of `db` is fixed to `db:9`",
            "E db/compose.yaml:7 `db` binds `db/lacks`, which the release does not hold",
        ],
    );
    let images: Vec<_> = analysis
        .images
        .iter()
        .map(|image| image.text.as_str())
        .collect();
    assert_eq!(images, ["cache:1", "db:9", "web:1"]);
}

#[test]
fn includes_that_cannot_be_followed() {
    check(
        &[(
            "compose.yaml",
            "include:\n  - oci://example.com/x:1\n  - https://github.com/a/b.git\n  - git@github.com:a/b.git\n  - missing.yaml\n  - ../up.yaml\n  - /etc/abs.yaml\n  - ${OPEN}.yaml\n  - compose.yaml\n",
        )],
        &[
            "E compose.yaml:0 the file includes itself, or too many files are included",
            "E compose.yaml:2 `include` of `oci://example.com/x:1` is remote",
            "E compose.yaml:3 `include` of `https://github.com/a/b.git` is remote",
            "E compose.yaml:4 `include` of `git@github.com:a/b.git` is remote",
            "E compose.yaml:5 `include` names `missing.yaml`, which is not in the release",
            "E compose.yaml:6 `include` names `../up.yaml`, which leaves the release",
            "E compose.yaml:7 `include` names the absolute path `/etc/abs.yaml`",
            "E compose.yaml:8 `include` of `${OPEN}.yaml` stays open: `OPEN` has no value",
        ],
    );
}

#[test]
fn extends_are_followed() {
    let analysis = check(
        &[
            (
                "compose.yaml",
                "services:\n  web:\n    extends: {file: common/base.yaml, service: base}\n  worker:\n    extends: web\n    image: worker:1\n  lost:\n    extends: {file: common/base.yaml, service: none}\n    image: x:1\n    healthcheck: {test: x}\n  far:\n    extends: {file: 'https://example.com/x.yaml', service: x}\n    image: x:1\n    healthcheck: {test: x}\n  round:\n    extends: round\n    image: x:1\n    healthcheck: {test: x}\n",
            ),
            (
                "common/base.yaml",
                "services:\n  base:\n    extends: root\n    volumes: ['./own:/own:ro', './none:/none:ro']\n  root:\n    image: base:1\n    healthcheck: {test: x}\n",
            ),
            ("common/own", "x"),
        ],
        &[
            "E common/base.yaml:4 `base` binds `common/none`, which the release does not hold",
            "E compose.yaml:8 `extends` names the service `none`, which `common/base.yaml` does not have",
            "E compose.yaml:12 `extends` of `https://example.com/x.yaml` is remote",
            "E compose.yaml:16 `round` extends itself, or too many services are extended",
        ],
    );
    let images: Vec<_> = analysis
        .images
        .iter()
        .map(|image| (image.service.as_str(), image.text.as_str()))
        .collect();
    assert_eq!(
        images,
        [
            ("far", "x:1"),
            ("lost", "x:1"),
            ("round", "x:1"),
            ("web", "base:1"),
            ("worker", "worker:1")
        ]
    );
    assert_eq!(analysis.images[3].file, "common/base.yaml");
    assert_eq!(analysis.images[3].line, 6);
}

#[test]
fn paths_of_files() {
    check(
        &[
            (
                "compose.yaml",
                &(service(
                    "env_file:\n  - a.env\n  - none.env\n  - {path: maybe.env, required: false}\n  - {path: ../x.env, required: false}\n  - ${LONGSHORE_DATA}/own.env\nlabel_file: labels",
                ) + "configs:\n  one: {file: ./conf}\n  two: {file: ./lacks}\n  three: {file: /etc/passwd}\n  four: {file: ~/x}\n  five: {file: '${X}/y'}\n  six: {file: dir}\nsecrets:\n  one: {file: '${LONGSHORE_DATA}/key'}\n  two: {environment: KEY}\n  three: {file: '${LONGSHORE_DATA}/../key'}\n"),
            ),
            ("a.env", "A=1\n"),
            ("conf", "x"),
            ("dir/x", "x"),
        ],
        &[
            "E compose.yaml:7 `env_file` names `none.env`, which is not in the release",
            "E compose.yaml:9 `env_file` names `../x.env`, which leaves the release",
            "E compose.yaml:11 `label_file` names `labels`, which is not in the release",
            "E compose.yaml:14 `config` names `./lacks`, which is not in the release",
            "E compose.yaml:15 `config` names the absolute path `/etc/passwd`",
            "E compose.yaml:16 `config` names `~/x`, which leaves the release",
            "E compose.yaml:17 `config` of `${X}/y` stays open: `X` has no value",
            "E compose.yaml:18 `config` names `dir`, which is a directory",
            "E compose.yaml:22 `secret` names `${LONGSHORE_DATA}/../key`, which leaves the release",
        ],
    );
}

#[test]
fn binds() {
    check_service(
        "volumes:\n  - ./conf:/conf\n  - ./data:/data\n  - ../up:/up:ro\n  - ~/home:/home\n  - /var/run/docker.sock:/var/run/docker.sock:ro\n  - ./${ENV}/x:/x:ro\n  - /only/in/container\n  - {type: bind, source: ./conf, target: /a}\n  - {type: bind, source: ./conf, target: /b, read_only: true}\n  - {type: bind, source: ./lacks, target: /c}\n  - {type: image, source: img, target: /d}\n  - {type: volume, source: named, target: /e}\n  - ${DATA_DIR}/x:/f\n  - .:/all\n  - ./conf/../conf:/g:rw,ro",
        &[("conf", "x")],
        &[
            "W compose.yaml:6 `web` binds `conf` of the release without `:ro`",
            "E compose.yaml:7 `web` binds `data`, which the release does not hold",
            "E compose.yaml:8 `web` binds a path that leaves the release",
            "E compose.yaml:9 `web` binds a path that leaves the release",
            "W compose.yaml:10 `web` gets the engine's socket: it can do anything on the host",
            "W compose.yaml:11 `web` binds a path that depends on `ENV`, it cannot be checked",
            "W compose.yaml:13 `web` binds `conf` of the release without `:ro`",
            "E compose.yaml:15 `web` binds `lacks`, which the release does not hold",
            "E compose.yaml:16 the image volume of `web` cannot be pinned",
            "W compose.yaml:19 `web` binds `.` of the release without `:ro`",
        ],
    );
}

#[test]
fn a_bind_that_the_ignore_file_hides_is_lacking() {
    let analysis = check_service(
        "volumes: ['./conf:/conf:ro']",
        &[("conf", "x"), (".longshoreignore", "conf\n")],
        &["E compose.yaml:5 `web` binds `conf`, which the release does not hold"],
    );
    assert!(analysis.findings[0].hint.contains("named volume"));
    assert!(analysis.findings[0].hint.contains("${LONGSHORE_DATA}"));
}

#[test]
fn privileges() {
    check_service(
        "privileged: true\npid: host\nipc: host\nnetwork_mode: host\nuts: host\nuserns_mode: host\ncgroup: host\nuse_api_socket: true",
        &[],
        &[
            "W compose.yaml:5 `web` is privileged: it can do anything on the host",
            "W compose.yaml:6 `web` shares the host's process namespace",
            "W compose.yaml:7 `web` shares the host's IPC namespace",
            "W compose.yaml:8 `web` shares the host's network namespace",
            "W compose.yaml:9 `web` shares the host's host name namespace",
            "W compose.yaml:10 `web` shares the host's user namespace",
            "W compose.yaml:11 `web` shares the host's cgroup namespace",
            "W compose.yaml:12 `web` gets the engine's socket: it can do anything on the host",
        ],
    );
    check_service("privileged: false\npid: 'service:x'", &[], &[]);
}

#[test]
fn health_checks() {
    check(
        &[(
            "compose.yaml",
            "services:\n  a: {image: 'x:1'}\n  b:\n    image: x:1\n    healthcheck:\n      disable: true\n  c:\n    image: x:1\n    healthcheck: {test: [NONE]}\n  migrate:\n    image: x:1\n  d:\n    image: x:1\n    healthcheck: {test: x}\n    depends_on:\n      migrate: {condition: service_completed_successfully}\n",
        )],
        &[
            "W compose.yaml:2 `a` has no health check here",
            "W compose.yaml:6 the health check of `b` is switched off",
            "W compose.yaml:9 the health check of `c` is switched off",
        ],
    );
}

#[test]
fn credentials_are_found_and_not_repeated() {
    let token = format!("ghp_{}", "a1B2".repeat(9));
    let aws = format!("AKIA{}", "ABCD2345".repeat(2));
    let gitlab = format!("glpat-{}", "x-Y_z".repeat(4));
    let slack = format!("xoxb-{}", "123456789012");
    let files = [
        (
            "key.pem",
            "x\n-----BEGIN EC PRIVATE KEY-----\nabc\n".to_owned(),
        ),
        (
            "cert.pem",
            "-----BEGIN CERTIFICATE-----\nabc\n-----BEGIN PUBLIC KEY-----\n".to_owned(),
        ),
        ("a.conf", format!("one\n\ntoken = {token}\n")),
        ("b.json", format!("{{\"k\": \"{aws}\"}}")),
        ("c", format!("{gitlab}\n{slack}\n")),
        ("d", format!("AGE-SECRET-KEY-1{}\n", "Q".repeat(58))),
        (
            "innocent",
            format!("ghp_short AKIA1 x{aws} glpat-\n{}", "A".repeat(200)),
        ),
    ];
    let files: Vec<_> = files
        .iter()
        .map(|(name, content)| (*name, content.as_str()))
        .collect();
    let analysis = check(
        &files,
        &[
            "E a.conf:3 it holds a GitHub token",
            "E b.json:1 it holds an AWS access key",
            "E c:1 it holds a GitLab token",
            "E c:2 it holds a Slack token",
            "E d:1 it holds an age key",
            "E key.pem:2 it holds a private key",
        ],
    );
    assert!(!format!("{:?}", analysis.findings).contains(&token));
    assert_eq!(analysis.engine, EngineKind::Files);
}

#[test]
fn literal_secrets_are_warned_of() {
    check(
        &[
            (
                "compose.yaml",
                &service(
                    "environment:\n  DB_PASSWORD: hunter2\n  API_TOKEN: ${API_TOKEN}\n  PASSWORD_FILE: /run/secrets/x\n  AUTH_SECRET: ''\nenv_file: app.env",
                ),
            ),
            ("app.env", "A=1\nSECRET_KEY=abc\n"),
        ],
        &[
            "W app.env:2 `SECRET_KEY` has a literal value that everyone who can pull the release reads",
            "W compose.yaml:6 `DB_PASSWORD` has a literal value that everyone who can pull the release reads",
        ],
    );
    check_service(
        "environment:\n  - DB_PASSWORD=hunter2\n  - OTHER=x",
        &[],
        &[
            "W compose.yaml:6 `DB_PASSWORD` has a literal value that everyone who can pull the release reads",
        ],
    );
}

#[test]
fn variables_that_stay_open() {
    let analysis = check_service(
        "environment:\n  A: $A\n  B: ${B:-b}\n  C: ${C:?must}\n  D: ${D:+x}\n  E: '${E:-1} ${E:-2}'\n  F: '${F:-1} $F'\n  G: ${G:-${H}}\n  I: $I\n  J: $$J\n  K:\n  L: ${LONGSHORE_DATA} ${COMPOSE_PROJECT_NAME}\ncommand: [\"${B:-b}\"]",
        &[(".env", "I=from env\nUNUSED=1\n")],
        &[],
    );
    let variables: Vec<_> = analysis
        .variables
        .iter()
        .map(|variable| {
            (
                variable.name.as_str(),
                variable.default.as_deref(),
                variable.required,
            )
        })
        .collect();
    assert_eq!(
        variables,
        [
            ("A", None, true),
            ("B", Some("b"), false),
            ("C", None, true),
            ("D", None, false),
            ("E", None, false),
            ("F", None, true),
            ("G", None, false),
            ("H", None, true),
            ("I", Some("from env"), false),
            ("K", None, false),
        ]
    );
}

#[test]
fn texts_that_compose_refuses() {
    check_service(
        "command: echo ${5}",
        &[],
        &["E compose.yaml:5 `${5}` is not a variable, write `$${` for `${` itself"],
    );
    check(
        &[("compose.yaml", "services:\n  web:\n    image: [\n")],
        &[&yaml_error("services:\n  web:\n    image: [\n")],
    );
    check(
        &[(
            "compose.yaml",
            "services:\n  web:\n    image: x:1\n    image: y:1\n    healthcheck: {test: x}\n",
        )],
        &["E compose.yaml:4 it is not YAML that can be read: `image` is there twice"],
    );
    check(
        &[("compose.yaml", "- a\n")],
        &["E compose.yaml:1 it is not a Compose file"],
    );
    check_service(
        "env_file: a.env",
        &[("a.env", "A=1\nB='open\n")],
        &["E a.env:2 the quote of `B` is not closed"],
    );
}

fn yaml_error(text: &str) -> String {
    let error = super::super::yaml::parse(text).unwrap_err();
    format!(
        "E compose.yaml:{} it is not YAML that can be read: {}",
        error.line, error.message
    )
}

#[test]
fn entry_files_and_engine() {
    let files = [("x.yaml", "services: {}\n"), ("d/y.yaml", "services: {}\n")];
    let root = directory(&files);
    let with = |entry: &[&str], engine| {
        let options = PackOptions {
            entry: entry.iter().map(|name| (*name).to_owned()).collect(),
            engine,
            ..named()
        };
        analyse(root.path(), &options).unwrap()
    };
    let analysis = with(&["./x.yaml", "d/y.yaml"], None);
    assert_eq!(analysis.entry, ["x.yaml", "d/y.yaml"]);
    compare(&analysis.findings, &[]);
    compare(
        &with(&["none.yaml", "d", "../x.yaml"], None).findings,
        &[
            "E ../x.yaml:0 the entry file lies outside the release",
            "E d:0 the entry file is a directory",
            "E none.yaml:0 the entry file is missing",
        ],
    );
    compare(
        &with(&[], Some(EngineKind::Compose)).findings,
        &["E .:0 there is no Compose file"],
    );
    assert_eq!(with(&[], None).engine, EngineKind::Files);
    compare(
        &with(&["x.yaml"], Some(EngineKind::Files)).findings,
        &["E x.yaml:0 the engine `files` has no entry files"],
    );
}

#[test]
fn the_override_file_is_part_of_it_as_for_compose() {
    let analysis = check(
        &[
            (
                "docker-compose.yml",
                "services:\n  web:\n    image: x:1\n    healthcheck: {test: x}\n",
            ),
            (
                "docker-compose.override.yml",
                "services:\n  web:\n    image: x:2\n",
            ),
        ],
        &["W docker-compose.override.yml:0 it is merged into the release, as Compose does"],
    );
    assert_eq!(
        analysis.entry,
        ["docker-compose.yml", "docker-compose.override.yml"]
    );
    assert_eq!(analysis.images[0].text, "x:2");
}

#[test]
fn names() {
    let root = directory(&[("compose.yaml", "name: from-compose\nservices: {}\n")]);
    let of = |name: Option<&str>| {
        let options = PackOptions {
            name: name.map(str::to_owned),
            ..PackOptions::default()
        };
        analyse(root.path(), &options).unwrap()
    };
    assert_eq!(of(None).name, "from-compose");
    assert_eq!(of(Some("given")).name, "given");
    compare(
        &of(Some("Not Good")).findings,
        &["E .:0 `Not Good` is not a release name"],
    );
    let shop = root.path().join("shop-1");
    fs::create_dir(&shop).unwrap();
    fs::write(shop.join("a"), "x").unwrap();
    assert_eq!(
        analyse(&shop, &PackOptions::default()).unwrap().name,
        "shop-1"
    );
}

#[test]
fn links_are_named() {
    let root = directory(&[("compose.yaml", "services: {}\n")]);
    symlink("/etc/passwd", root.path().join("link")).unwrap();
    let analysis = analyse(root.path(), &named()).unwrap();
    compare(&analysis.findings, &["E link:0 it is a symbolic link"]);
}

#[test]
fn merge_keys_and_resets_are_understood() {
    check(
        &[
            (
                "compose.yaml",
                "x-base: &base\n  healthcheck: {test: x}\n  image: base:1\nservices:\n  a:\n    <<: *base\n  b:\n    <<: *base\n    image: b:1\n    volumes: ['./gone:/x']\n  c:\n    image: c:1\n",
            ),
            ("compose.override.yaml", "services:\n  c: !reset null\n"),
        ],
        &[
            "W compose.override.yaml:0 it is merged into the release, as Compose does",
            "E compose.yaml:10 `b` binds `gone`, which the release does not hold",
        ],
    );
}

proptest::proptest! {
    #[test]
    fn foreign_definitions_never_panic(text in "[a-z:${}\\-\\[\\], \n]{0,120}") {
        let root = directory(&[("compose.yaml", &format!("services:\n  web:\n{text}\n"))]);
        analyse(root.path(), &named()).unwrap();
    }
}

#[test]
fn an_empty_directory_is_no_release() {
    check(
        &[],
        &["E .:0 there is nothing to release, the directory has no files"],
    );
}
