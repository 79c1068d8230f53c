use super::*;

#[test]
fn loopback() {
    for host in [
        "localhost",
        "localhost:5000",
        "127.0.0.1:80",
        "127.8.8.8",
        "[::1]:5000",
        "::1",
        "a.localhost:1",
    ] {
        assert!(is_loopback(host), "{host}");
    }
    for host in [
        "example.com",
        "localhost.example.com:5000",
        "10.0.0.1:5000",
        "[::2]:1",
        "128.0.0.1",
        "",
    ] {
        assert!(!is_loopback(host), "{host}");
    }
}

#[test]
fn plain_http_only_where_asked_for() {
    let client = Client::new(Config {
        plain_http: vec!["registry.lan:5000".to_owned()],
        credentials: Arc::new(credentials::Source::Anonymous),
        ..Config::default()
    })
    .unwrap();
    assert_eq!(
        client.base("registry.lan:5000").unwrap().as_str(),
        "http://registry.lan:5000/"
    );
    assert_eq!(
        client.base("registry.lan").unwrap().as_str(),
        "https://registry.lan/"
    );
    assert_eq!(
        client.base("127.0.0.1:5050").unwrap().as_str(),
        "http://127.0.0.1:5050/"
    );
    assert_eq!(
        client.base("docker.io").unwrap().as_str(),
        "https://registry-1.docker.io/"
    );
    let url = |text: &str| Url::parse(text).unwrap();
    let tls = url("https://registry.example.com/");
    assert!(
        client
            .permit("r", &tls, &url("https://blobs.example.com/"))
            .is_ok()
    );
    assert!(
        client
            .permit("r", &tls, &url("http://blobs.example.com/"))
            .is_err()
    );
    assert!(client.permit("r", &tls, &url("http://127.0.0.1/")).is_err());
    assert!(
        client
            .permit("r", &tls, &url("http://registry.lan:5000/"))
            .is_ok()
    );
    assert!(
        client
            .permit("r", &tls, &url("file:///etc/passwd"))
            .is_err()
    );
}

#[test]
fn no_secret_in_debug() {
    let client = Client::new(Config {
        credentials: Arc::new(credentials::Source::Basic {
            host: "h".to_owned(),
            username: "alice".to_owned(),
            password: "hunter2".to_owned(),
        }),
        ..Config::default()
    })
    .unwrap();
    let text = format!("{client:?}");
    assert!(text.contains("alice"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}
