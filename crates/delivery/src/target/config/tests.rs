use super::*;

fn parse(text: &str) -> Result<AgentConfig, ConfigError> {
    AgentConfig::parse(text, "agent.yaml", Path::new("/etc/longshore"))
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

fn pem(seed: u8) -> String {
    let mut fill = |bytes: &mut [u8]| bytes.fill(seed);
    let key = trust::key::PrivateKey::generate(&mut fill);
    key.public().to_pem()
}

const TARGET: &str = "  - name: shop
    reference: registry.example/shop/release:production
    release: shop
    trust: none
";

#[test]
fn reports_are_made_unless_they_are_not_wanted() {
    let config = parse("version: 1\nregistry: registry.example\n").unwrap();
    assert!(config.report && config.holder.is_none());
    let config = parse("version: 1\nregistry: {report: false, holder: deploy/host1}\n").unwrap();
    assert!(!config.report);
    assert_eq!(config.holder.as_deref(), Some("deploy/host1"));
    for bad in ["", "/a", "a//b", "a/..", &"x".repeat(200)] {
        let text = format!("version: 1\nregistry:\n  holder: '{bad}'\n");
        let error = error(&text);
        assert!(error.starts_with("agent.yaml:3: `holder`"), "{error}");
    }
}

#[test]
fn everything_that_can_be_said_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("alice.pub", &pem(1));
    write("password", "secret\n");
    write(
        "agent.yaml",
        "version: 1
registry:
  host: registry.example:5000
  plain_http: true
  username: agent
  password_file: password
state: state
socket: /run/agent.sock
poll: 30s
targets:
  shop:
    reference: registry.example:5000/shop/release:production
    release: shop
    engine: compose
    project: shop-project
    variables: {DOMAIN: shop.example.com, PORT: \"8080\"}
    profiles: [web]
    trust: {keys: [alice.pub], threshold: 1}
    health: {stability: 5s, timeout: 2m, interval: 500ms, http: [\"http://127.0.0.1:8080/health\"]}
    rollback: never
    adopt: true
  site:
    reference: registry.example:5000/site/release:production
    release: site
    engine: files
    files: {path: /srv/site, activate: [systemctl, reload, nginx], activate_timeout: 30s}
    trust: none
",
    );
    let config = AgentConfig::load(&directory.path().join("agent.yaml")).unwrap();
    assert_eq!(config.state, directory.path().join("state"));
    assert_eq!(config.poll, Duration::from_secs(30));
    assert_eq!(config.registry.as_deref(), Some("registry.example:5000"));
    assert_eq!(config.client.plain_http, ["registry.example:5000"]);
    let client::credentials::Source::Basic {
        host,
        username,
        password,
    } = &*config.client.credentials
    else {
        panic!("{:?}", config.client.credentials);
    };
    assert_eq!(
        (host.as_str(), username.as_str(), password.as_str()),
        ("registry.example:5000", "agent", "secret")
    );
    let [shop, site] = &config.targets[..] else {
        panic!()
    };
    assert_eq!(shop.project, "shop-project");
    assert_eq!(shop.variables["PORT"], "8080");
    assert_eq!(shop.health.interval, Duration::from_millis(500));
    assert_eq!(shop.rollback, Rollback::Never);
    assert!(shop.adopt);
    let policy = shop.trust.as_ref().unwrap();
    assert_eq!(
        (policy.threshold, policy.keys[0].label.as_str()),
        (1, "alice.pub")
    );
    assert_eq!(
        site.files.as_ref().unwrap().activate_timeout,
        Duration::from_secs(30)
    );
    assert!(site.trust.is_none());
}

#[test]
fn a_file_without_targets_and_a_registry_as_a_word_are_enough() {
    assert!(
        parse("version: 1\ntargets: []\n")
            .unwrap()
            .targets
            .is_empty()
    );
    assert!(parse("version: 1\ntargets:\n").unwrap().targets.is_empty());
    let config = parse(&format!(
        "version: 1\nregistry: registry.example\ntargets:\n{TARGET}"
    ))
    .unwrap();
    assert_eq!(config.registry.as_deref(), Some("registry.example"));
    let shop = &config.targets[0];
    assert_eq!(
        (shop.project.as_str(), shop.health.stability, shop.rollback),
        ("shop", Duration::from_secs(10), Rollback::Auto)
    );
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_known_one() {
    assert_eq!(
        error("version: 1\ntarget: []\n"),
        "agent.yaml:2: unknown key `target`; did you mean `targets`?"
    );
    let text = format!("version: 1\ntargets:\n{TARGET}    rolback: never\n");
    assert_eq!(
        error(&text),
        "agent.yaml:7: unknown key `rolback`; did you mean `rollback`?"
    );
    let text = format!("version: 1\ntargets:\n{TARGET}    health: {{stabilty: 3s}}\n");
    assert_eq!(
        error(&text),
        "agent.yaml:7: unknown key `stabilty`; did you mean `stability`?"
    );
    let text = format!("version: 1\nregistry: {{hst: a}}\ntargets:\n{TARGET}");
    assert!(
        error(&text).starts_with("agent.yaml:2: unknown key `hst`"),
        "{}",
        error(&text)
    );
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    let cases = [
        (
            "version: 2\n".to_owned(),
            "agent.yaml:1: version 2 is not known",
        ),
        (
            format!("version: 1\npoll: soon\ntargets:\n{TARGET}"),
            "agent.yaml:2: `soon` is no duration",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}").replace("    trust: none\n", ""),
            "`trust` is missing",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}").replace("trust: none", "trust: {keys: []}"),
            "agent.yaml:6: target `shop`: `trust.keys` is empty",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}")
                .replace("trust: none", "trust: {keys: [gone.pub]}"),
            "cannot read the key",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}").replace("registry.example/shop/release:", ""),
            "agent.yaml:4: target `shop`",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}").replace("name: shop", "name: Shop"),
            "agent.yaml:3: target name `Shop`",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}{TARGET}"),
            "agent.yaml:7: there are two targets `shop`",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}    engine: files\n"),
            "needs `files: {path: …}`",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}    health: {{stability: 2m, timeout: 1m}}\n"),
            "agent.yaml:7: target `shop`: `health.timeout` must be longer",
        ),
        (
            format!("version: 1\ntargets:\n{TARGET}    health: {{http: [\"https://a\"]}}\n"),
            "must begin with `http://`",
        ),
        (
            format!("version: 1\nregistry: {{username: a, password_file: b}}\ntargets:\n{TARGET}"),
            "`username` needs `host`",
        ),
    ];
    for (text, wanted) in cases {
        let error = error(&text);
        assert!(error.contains(wanted), "{error}\nshould say\n{wanted}");
    }
}

#[test]
fn two_targets_must_not_share_a_project_or_a_path() {
    let other = TARGET.replace("name: shop", "name: other") + "    project: shop\n";
    let error = error(&format!("version: 1\ntargets:\n{TARGET}{other}"));
    assert!(
        error.contains("targets `shop` and `other` share project `shop`"),
        "{error}"
    );
}

#[test]
fn a_key_counts_once_and_the_threshold_is_in_reach() {
    let indented = |seed| pem(seed).replace('\n', "\n            ");
    let text = |a, b, threshold: usize| {
        format!(
            "version: 1\ntargets:\n{}    trust:\n        threshold: {threshold}\n        keys:\n          - |\n            {}\n          - |\n            {}\n",
            TARGET.replace("    trust: none\n", ""),
            indented(a),
            indented(b)
        )
    };
    assert_eq!(
        parse(&text(1, 2, 2)).unwrap().targets[0]
            .trust
            .as_ref()
            .unwrap()
            .threshold,
        2
    );
    assert!(error(&text(1, 1, 2)).contains("are the same key"));
    assert!(error(&text(1, 2, 3)).contains("must be between 1 and 2"));
}

#[test]
fn the_nearest_word_is_near() {
    assert_eq!(
        nearest("plain-http", &["plain_http", "host"]),
        Some("plain_http")
    );
    assert_eq!(nearest("trsut", &["trust", "targets"]), Some("trust"));
    assert_eq!(nearest("elephant", &["trust", "targets"]), None);
}
