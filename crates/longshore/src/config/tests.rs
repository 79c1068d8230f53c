use super::*;

fn load(text: &str, environment: &[(&str, &str)]) -> anyhow::Result<Config> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("longshore.yaml");
    std::fs::write(&file, text).unwrap();
    Config::load(
        Some(&file),
        Some(Path::new("/data")),
        &[],
        environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
    )
}

fn refused(text: &str, environment: &[(&str, &str)]) -> (String, Option<String>) {
    let error = load(text, environment).unwrap_err();
    let refused = error.downcast_ref::<Refused>().unwrap();
    assert_eq!(refused.code, Exit::CONFIG);
    (refused.message.clone(), refused.hint.clone())
}

#[test]
fn without_a_file_it_is_open_on_loopback() {
    let config = Config::load(None, Some(Path::new("/data")), &[], []).unwrap();
    assert_eq!(config.listen, vec!["127.0.0.1:5050".parse().unwrap()]);
    assert!(config.htpasswd.is_none() && config.rules.is_empty());
}

#[test]
fn an_unknown_key_names_the_nearest_one() {
    let (message, hint) = refused("version: 1\nserver:\n  lisen: 127.0.0.1:1\n", &[]);
    assert!(message.contains("lisen"), "{message}");
    assert_eq!(hint.as_deref(), Some("did you mean `listen`?"));
    // Also where the parser shows the line with the key.
    let (_, hint) = refused("version: 1\nserver: {lsten: 127.0.0.1:1}\n", &[]);
    assert_eq!(hint.as_deref(), Some("did you mean `listen`?"));
    let (_, hint) = refused("version: 1\nsever: {}\n", &[]);
    assert_eq!(hint.as_deref(), Some("did you mean `server`?"));
    let (_, hint) = refused("version: 1\nauth: {htpaswd: /x}\n", &[]);
    assert_eq!(hint.as_deref(), Some("did you mean `htpasswd`?"));
    let (_, hint) = refused("version: 1", &[("LONGSHORE_SERVER__LISEN", "x")]);
    assert_eq!(hint.as_deref(), Some("did you mean `listen`?"));
}

#[test]
fn a_log_level_that_is_none_is_refused() {
    let (message, _) = refused("version: 1\nlog: {level: 'a=b=c=['}\n", &[]);
    assert!(message.contains("log.level"), "{message}");
    load("version: 1\nlog: {level: 'registry=debug,info'}\n", &[]).unwrap();
}

#[test]
fn the_environment_wins_and_is_checked() {
    let config = load(
        "version: 1\nserver: {listen: 127.0.0.1:1}\n",
        &[
            ("LONGSHORE_SERVER__LISTEN", "127.0.0.1:2"),
            ("LONGSHORE_KEY_PASSWORD", "x"),
        ],
    )
    .unwrap();
    assert_eq!(config.listen, vec!["127.0.0.1:2".parse().unwrap()]);
    let (message, _) = refused("version: 1", &[("LONGSHORE_SERVER__LISEN", "x")]);
    assert!(message.contains("LONGSHORE_SERVER__LISEN"), "{message}");
}

#[test]
fn an_open_address_without_users_is_refused_with_the_line_to_add() {
    let (message, hint) = refused("version: 1\nserver: {listen: '0.0.0.0:5050'}\n", &[]);
    assert!(message.contains("0.0.0.0:5050"), "{message}");
    assert!(hint.unwrap().contains("htpasswd"));
    load(
        "version: 1\nserver: {listen: '0.0.0.0:5050'}\nauth: {htpasswd: /x}\n",
        &[],
    )
    .unwrap();
}

#[test]
fn versions() {
    assert!(refused("server: {}\n", &[]).0.contains("version"));
    assert!(refused("version: 2\n", &[]).0.contains("newer"));
    assert!(!refused("version: 0\n", &[]).0.contains("newer"));
}

#[test]
fn periods_and_sizes() {
    assert_eq!(parse_period("1h30m"), Some(Duration::from_mins(90)));
    assert_eq!(parse_period("250ms"), Some(Duration::from_millis(250)));
    for bad in ["", "5", "h", "5x", "-1s", "99999999999999999999d"] {
        assert_eq!(parse_period(bad), None, "{bad}");
    }
    assert_eq!(parse_size("4MiB"), Some(4 << 20));
    assert_eq!(parse_size("12"), Some(12));
    assert_eq!(parse_size("4 XB"), None);
    assert!(
        refused("version: 1\nstorage: {lease: 1h}\n", &[])
            .0
            .contains("12h")
    );
}

#[test]
fn without_settings_the_store_is_embedded() {
    for text in [
        "version: 1\n",
        "version: 1\nstorage: {database: embedded}\n",
    ] {
        let config = load(text, &[]).unwrap();
        assert_eq!(config.location, Location::embedded("/data"));
    }
}

#[test]
fn a_cluster_needs_no_data_directory() {
    let config = load(
        "version: 1\nstorage:\n  database: postgres://u:secret@db1,db2/longshore?sslmode=verify-full\n  \
         database_connections: 8\n  objects: s3://team-registry/prod/\n  \
         s3: {endpoint: 'https://s3.example.com/', region: eu-1, path_style: true}\n",
        &[],
    )
    .unwrap();
    assert_eq!(
        config.location.objects,
        ObjectLocation::S3(S3Location {
            bucket: "team-registry".to_owned(),
            prefix: "prod".to_owned(),
            endpoint: Some("https://s3.example.com".to_owned()),
            region: Some("eu-1".to_owned()),
            path_style: true,
            credentials: None,
        })
    );
    assert!(matches!(
        config.location.database,
        DatabaseLocation::Postgres(_)
    ));
    assert_eq!(config.store.database_connections, 8);
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn pulls_are_redirected_by_network() {
    let s3 = "version: 1\nstorage:\n  database: postgres://u@h/d\n  objects: s3://team-registry\n";
    assert!(load(s3, &[]).unwrap().redirect.is_none());
    let text = format!(
        "{s3}  redirect: {{networks: [10.0.0.0/8, '2001:db8::/32'], ttl: 2h, except: {{strict_audit: ['secret/**']}}}}\n"
    );
    let config = load(&text, &[]).unwrap();
    let redirect = config.redirect.unwrap();
    assert_eq!(redirect.networks.len(), 2);
    assert_eq!(redirect.ttl, Duration::from_hours(2));
    assert_eq!(redirect.except.len(), 1);
    // A URL that was handed out works to its end.
    assert!(config.store.gc.read_grace >= redirect.ttl);
    for (bad, hint) in [
        (
            format!("{s3}  redirect: {{networks: [10.0.0.1/8]}}\n"),
            "networks",
        ),
        (
            format!("{s3}  redirect: {{networks: ['::/0'], ttl: 5d}}\n"),
            "ttl",
        ),
        (
            format!("{s3}  redirect: {{ttl: 5m}}\n"),
            "names no `networks`",
        ),
        (
            "version: 1\nstorage: {redirect: {networks: [10.0.0.0/8]}}\n".to_owned(),
            "object store",
        ),
    ] {
        let error = format!("{:#}", load(&bad, &[]).unwrap_err());
        assert!(error.contains(hint), "{error}");
    }
}

#[test]
fn the_connection_string_comes_from_a_file_or_the_environment() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("database");
    std::fs::write(&file, "postgres://u:secret@h/d\n").unwrap();
    let expected = DatabaseLocation::Postgres("postgres://u:secret@h/d".to_owned());
    let named = format!(
        "version: 1\nstorage: {{database_file: {}}}\n",
        file.display()
    );
    assert_eq!(load(&named, &[]).unwrap().location.database, expected);
    let variable = [("LONGSHORE_STORAGE__DATABASE", "postgres://u:secret@h/d")];
    let config = load("version: 1\n", &variable).unwrap();
    assert_eq!(config.location.database, expected);
    let (message, _) = refused(&named, &variable);
    assert!(message.contains("exclude"), "{message}");
}

#[test]
fn a_wrong_location_is_refused_without_its_password() {
    for (storage, says) in [
        ("{database: 'mysql://u:secret@h/d'}", "embedded"),
        (
            "{database: 'postgres://u:secret@h/d?sslmode=sure'}",
            "sslmode",
        ),
        ("{database: 'postgres://u:secret@h:port/d'}", "port"),
        ("{database: [secret]}", "string"),
        ("{database_file: /no/such/secret-less/file}", "cannot read"),
        ("{database_connections: 1}", "between"),
        ("{objects: relative/path}", "absolute"),
        ("{objects: 's3://x'}", "bucket"),
        (
            "{objects: 's3://bucket', s3: {endpoint: s3.example.com}}",
            "URL",
        ),
        ("{s3: {region: eu}}", "no bucket"),
    ] {
        let (message, _) = refused(&format!("version: 1\nstorage: {storage}\n"), &[]);
        assert!(message.contains(says), "{storage}: {message}");
        assert!(
            !message.contains("secret@") && !message.contains("[secret]"),
            "{message}"
        );
    }
}

#[test]
fn a_backup_needs_a_place() {
    assert_eq!(load("version: 1\n", &[]).unwrap().backup, None);
    let config = load(
        "version: 1\nbackup: {directory: /b, every: 10s, keep: 30d}\n",
        &[],
    )
    .unwrap();
    let options = config.backup.unwrap();
    assert_eq!(options.directory, Path::new("/b"));
    assert_eq!(options.every, Duration::from_secs(10));
    assert_eq!(options.keep, Duration::from_hours(30 * 24));
    assert!(!options.link);
    for (text, wanted) in [
        ("{every: 10s}", "directory"),
        ("{directory: b}", "absolute"),
        ("{directory: /b, every: 0s}", "backup.every"),
        ("{directory: /b, keep: x}", "backup.keep"),
    ] {
        let (message, _) = refused(&format!("version: 1\nbackup: {text}\n"), &[]);
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn quotas_and_what_is_kept_of_reports() {
    let config = load("version: 1", &[]).unwrap();
    assert!(config.store.exports);
    assert_eq!(config.store.quota, None);
    assert_eq!(config.store.pull_retention, Duration::from_hours(24 * 90));
    let days = Duration::from_hours(24 * 400);
    assert_eq!(config.store.attempt_retention, Some(days));
    let config = load(
        "version: 1\nserver: {metric_repositories: 7}\nstorage: {quota: 2TiB, pull_statistics: off, exports: false}\nattempts: {retention: forever}\n",
        &[],
    )
    .unwrap();
    assert!(!config.store.exports);
    assert_eq!(config.store.quota, Some(2 << 40));
    assert_eq!(config.store.pull_retention, Duration::ZERO);
    assert_eq!(config.store.attempt_retention, None);
    assert_eq!(config.metric_repositories, Some(7));
    let config = load("version: 1", &[("LONGSHORE_ATTEMPTS__RETENTION", "30d")]).unwrap();
    let days = Duration::from_hours(24 * 30);
    assert_eq!(config.store.attempt_retention, Some(days));
    for (text, key) in [
        ("storage: {quota: lots}", "storage.quota"),
        (
            "storage: {pull_statistics: never}",
            "storage.pull_statistics",
        ),
        ("attempts: {retention: never}", "attempts.retention"),
    ] {
        let (message, _) = refused(&format!("version: 1\n{text}\n"), &[]);
        assert!(message.contains(key), "{message}");
    }
}
