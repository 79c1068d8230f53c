use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use client::{Client, Config, Error, credentials};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest};

use crate::fake::{Answer, Asked, Fake, answer};
use crate::support::{config, quick};

fn with_login(fake: &Fake) -> Client {
    let login = credentials::Source::Basic {
        host: fake.host.clone(),
        username: "alice".to_owned(),
        password: "secret".to_owned(),
    };
    let config = Config {
        credentials: Arc::new(login),
        ..Config::default()
    };
    Client::with_retries(config, quick()).unwrap()
}

const ALICE: &str = "Basic YWxpY2U6c2VjcmV0";

/// A token service for all rights, and what asks for its tokens. A token is the scopes it was given for.
fn tokens(fake: &Fake, generation: Arc<AtomicU32>) {
    let host = fake.host.clone();
    fake.hook(move |asked, _| {
        let generation = generation.load(Ordering::SeqCst);
        if asked.path == "/token" {
            if asked
                .header("authorization")
                .is_some_and(|sent| sent != ALICE)
            {
                return Some(answer(
                    401,
                    &[],
                    r#"{"details":"incorrect username or password"}"#,
                ));
            }
            let scopes: Vec<String> = asked
                .query
                .split('&')
                .filter_map(|pair| pair.strip_prefix("scope="))
                .map(|scope| {
                    scope
                        .replace("%3A", ":")
                        .replace("%2F", "/")
                        .replace("%2C", ",")
                })
                .collect();
            let token = format!("{generation}|{}", scopes.join("|"));
            return Some(answer(
                200,
                &[],
                &format!(r#"{{"access_token":"{token}","expires_in":300}}"#),
            ));
        }
        let name = asked
            .path
            .strip_prefix("/v2/")?
            .split("/blobs/")
            .next()?
            .split("/manifests/")
            .next()?;
        let action = if asked.method == "GET" || asked.method == "HEAD" {
            "pull"
        } else {
            "pull,push"
        };
        let fits = asked.header("authorization").is_some_and(|sent| {
            sent.strip_prefix("Bearer ").is_some_and(|token| {
                token.starts_with(&format!("{generation}|"))
                    && token.split('|').any(|scope| {
                        scope
                            .strip_prefix(&format!("repository:{name}:"))
                            .is_some_and(|have| have == action || have == "pull,push")
                    })
            })
        });
        (!fits).then(|| challenge(&host, &format!("repository:{name}:{action}")))
    });
}

fn challenge(host: &str, scope: &str) -> Answer {
    let header = format!(r#"Bearer realm="http://{host}/token",service="fake",scope="{scope}""#);
    answer(
        401,
        &[("www-authenticate", &header)],
        r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#,
    )
}

#[tokio::test]
async fn tokens_are_asked_for_and_kept() {
    let fake = Fake::start().await;
    fake.blob("a/b", b"x");
    let generation = Arc::new(AtomicU32::new(0));
    tokens(&fake, generation.clone());
    let client = with_login(&fake);
    let repository = client.repository(&fake.host, &"a/b".parse().unwrap());
    let digest = Digest::sha256(b"x");
    for _ in 0..3 {
        assert_eq!(repository.head_blob(&digest).await.unwrap(), Some(1));
    }
    assert_eq!(fake.asked("HEAD", "/blobs/").len(), 4, "one challenge");
    let asked = fake.asked("GET", "/token");
    assert_eq!(asked.len(), 1, "one token for all");
    assert_eq!(asked[0].header("authorization"), Some(ALICE));
    assert_eq!(
        asked[0].query,
        "service=fake&scope=repository%3Aa%2Fb%3Apull&client_id=longshore&account=alice"
    );

    // A push needs more, and what it gets serves a pull too.
    repository
        .put_blob(&Descriptor::of("x/y", b"y"), Bytes::from_static(b"y"))
        .await
        .unwrap();
    assert!(
        fake.asked("GET", "/token")[1]
            .query
            .contains("repository%3Aa%2Fb%3Apull%2Cpush")
    );
    repository.head_blob(&digest).await.unwrap();
    assert_eq!(fake.asked("GET", "/token").len(), 2);

    // All tokens end; the next request gets a new one by itself.
    generation.store(1, Ordering::SeqCst);
    assert_eq!(repository.head_blob(&digest).await.unwrap(), Some(1));
    assert_eq!(fake.asked("GET", "/token").len(), 3);
}

#[tokio::test]
async fn a_mount_asks_for_both_repositories_at_once() {
    let fake = Fake::start().await;
    tokens(&fake, Arc::default());
    let body = oci::Manifest {
        schema_version: 2,
        config: Some(Descriptor::empty()),
        layers: Some(vec![Descriptor::of("x/y", b"layer")]),
        ..oci::Manifest::default()
    }
    .to_bytes();
    let client = with_login(&fake);
    let from = client.repository(&fake.host, &"from".parse().unwrap());
    from.put_blob(&Descriptor::empty(), Bytes::from_static(b"{}"))
        .await
        .unwrap();
    from.put_blob(
        &Descriptor::of("x/y", b"layer"),
        Bytes::from_static(b"layer"),
    )
    .await
    .unwrap();
    from.put_manifest(
        &TagOrDigest::Tag("v1".parse().unwrap()),
        oci::media_type::OCI_MANIFEST,
        body.into(),
    )
    .await
    .unwrap();
    let location = |name: &str| format!("{}/{name}:v1", fake.host).parse().unwrap();
    let options = client::transfer::CopyOptions {
        referrers: false,
        parallel: 1,
    };
    let report = client::transfer::copy(
        &client,
        &location("from"),
        &location("to"),
        options,
        &client::transfer::Silent,
    )
    .await
    .unwrap();
    assert_eq!((report.blobs, report.skipped), (0, 2), "mounted");
    let query = &fake.asked("POST", "/v2/to/")[0].query;
    assert!(query.starts_with("mount="), "{query}");
    let both = fake.asked("GET", "/token").iter().any(|asked| {
        asked.query.contains("repository%3Afrom%3Apull")
            && asked.query.contains("repository%3Ato%3Apull%2Cpush")
    });
    assert!(both);
}

#[tokio::test]
async fn wrong_and_missing_logins_are_told() {
    let fake = Fake::start().await;
    tokens(&fake, Arc::default());
    let config = Config {
        credentials: Arc::new(credentials::Source::Basic {
            host: fake.host.clone(),
            username: "alice".to_owned(),
            password: "wrong".to_owned(),
        }),
        ..Config::default()
    };
    let client = Client::with_retries(config, quick()).unwrap();
    let error = client
        .repository(&fake.host, &"a".parse().unwrap())
        .tags()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert!(
        error.to_string().contains("incorrect username or password"),
        "{error}"
    );
    assert!(!error.is_transient());

    let basic = r#"Basic realm="x""#;
    fake.hook(move |asked, _| {
        (asked.header("authorization") != Some(ALICE))
            .then(|| answer(401, &[("www-authenticate", basic)], ""))
    });
    let error = crate::support::client().ping(&fake.host).await.unwrap_err();
    assert!(error.to_string().contains("log in first"), "{error}");
    with_login(&fake).ping(&fake.host).await.unwrap();

    fake.hook(|_, _| {
        Some(answer(
            403,
            &[],
            r#"{"errors":[{"code":"DENIED","message":"not yours"}]}"#,
        ))
    });
    let error = with_login(&fake).ping(&fake.host).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "`{}` refused access to `the registry`: not yours",
            fake.host
        )
    );
    assert_eq!(
        fake.asked("GET", "/v2/")
            .last()
            .unwrap()
            .header("authorization"),
        None
    );

    // A registry that refuses again and again is not asked for ever.
    let host = fake.host.clone();
    fake.hook(move |asked, _| {
        Some(if asked.path == "/token" {
            answer(200, &[], r#"{"token":"t"}"#)
        } else {
            challenge(&host, "x")
        })
    });
    fake.state().log.clear();
    assert!(matches!(
        with_login(&fake).ping(&fake.host).await,
        Err(Error::Unauthorized { .. })
    ));
    assert_eq!(fake.state().log.len(), 3);
}

#[tokio::test]
async fn another_host_never_sees_the_authorization() {
    let fake = Fake::start().await;
    let store = Fake::start().await;
    let content = crate::support::noise(100_000);
    let digest = store.blob("a", &content);
    let target = format!("http://{}/v2/a/blobs/{digest}?signature=s", store.host);
    let basic = r#"Basic realm="x""#;
    fake.hook(move |asked: &Asked, _| {
        Some(if asked.header("authorization") == Some(ALICE) {
            answer(307, &[("location", &target)], "")
        } else {
            answer(401, &[("www-authenticate", basic)], "")
        })
    });
    let repository = with_login(&fake).repository(&fake.host, &"a".parse().unwrap());
    let content_of = Descriptor::of("x/y", &content);
    assert!(repository.blob(&content_of, 1 << 20).await.unwrap() == content);
    let seen = store.state().log.clone();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].header("authorization"), None);
    assert_eq!(seen[0].query, "signature=s");

    // A store that wants a login of its own gets none, and says so.
    store.hook(move |_, _| Some(answer(401, &[("www-authenticate", basic)], "")));
    assert!(repository.blob(&content_of, 1 << 20).await.is_err());
    assert_eq!(
        store.state().log.last().unwrap().header("authorization"),
        None
    );
}

#[tokio::test]
async fn redirects_end() {
    let fake = Fake::start().await;
    fake.hook(|_, _| Some(answer(307, &[("location", "/v2/again")], "")));
    let client = Client::with_retries(config(), quick()).unwrap();
    let error = client.ping(&fake.host).await.unwrap_err().to_string();
    assert!(error.contains("redirects more than"), "{error}");
}
