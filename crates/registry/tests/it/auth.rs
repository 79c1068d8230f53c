use std::path::Path;

use registry::{Access, Action, Error, Server, Settings};

use crate::harness::{EMPTY, MANIFEST, Registry, Reply, basic, basic_with, image, passwords, rule};
use crate::place::Place;

async fn token(registry: &Registry, authorization: Option<&str>, query: &str) -> Reply {
    let headers: Vec<_> = authorization
        .map(|value| ("Authorization", value))
        .into_iter()
        .collect();
    registry
        .call(
            &format!("GET /v2/token?service=longshore{query}"),
            &headers,
            b"",
        )
        .await
}

async fn bearer(registry: &Registry, user: &str, scope: &str) -> String {
    let reply = token(registry, Some(&basic(user)), &format!("&scope={scope}"))
        .await
        .expect(200);
    format!("Bearer {}", reply.json()["token"].as_str().unwrap())
}

async fn as_(registry: &Registry, authorization: &str, line: &str, body: &[u8]) -> Reply {
    registry
        .call(
            line,
            &[("Authorization", authorization), ("Content-Type", MANIFEST)],
            body,
        )
        .await
}

async fn filled() -> Registry {
    let registry = Registry::users(|_| {}).await;
    let root = basic("root");
    for name in ["public/x", "secret/y", "shop/web"] {
        registry
            .image_as(name, "v1", "x", &[("Authorization", &root)])
            .await;
    }
    registry
}

#[tokio::test]
async fn the_base_challenges_even_with_anonymous_reading() {
    let registry = filled().await;
    for path in ["/v2/", "/v2"] {
        let reply = registry.get(path).await.refused(401, "UNAUTHORIZED");
        assert_eq!(
            reply.header("www-authenticate"),
            "Bearer realm=\"http://localhost/v2/token\",service=\"longshore\""
        );
    }
    as_(&registry, &basic("bob"), "GET /v2/", b"")
        .await
        .expect(200);
    as_(&registry, &basic_with("bob", "wrong"), "GET /v2/", b"")
        .await
        .refused(401, "UNAUTHORIZED");
    as_(&registry, &basic_with("stranger", "x"), "GET /v2/", b"")
        .await
        .refused(401, "UNAUTHORIZED");
    for broken in [
        "Basic !!!",
        "Basic",
        "Digest x",
        "Bearer x",
        "Bearer a.b.c",
        "nonsense",
    ] {
        as_(&registry, broken, "GET /v2/", b"")
            .await
            .refused(401, "UNAUTHORIZED");
    }
}

#[tokio::test]
async fn without_credentials_every_name_answers_alike() {
    let registry = filled().await;
    for name in ["secret/y", "none/such", "shop/web", "BAD/Name"] {
        for line in [
            format!("GET /v2/{name}/manifests/v1"),
            format!("GET /v2/{name}/tags/list"),
            format!("GET /v2/{name}/referrers/{EMPTY}"),
            format!("GET /v2/{name}/blobs/{EMPTY}"),
            format!("POST /v2/{name}/blobs/uploads/"),
            format!("GET /v2/{name}/blobs/uploads/x"),
            format!("DELETE /v2/{name}/manifests/v1"),
        ] {
            let reply = registry
                .call(&line, &[], b"")
                .await
                .refused(401, "UNAUTHORIZED");
            assert!(
                reply
                    .header("www-authenticate")
                    .starts_with("Bearer realm="),
                "{line}"
            );
        }
    }
    let reply = registry
        .call("POST /v2/shop/web/blobs/uploads/", &[], b"")
        .await;
    assert!(
        reply
            .header("www-authenticate")
            .ends_with(",scope=\"repository:shop/web:pull,push\"")
    );
    // Where everybody may read, everybody reads.
    registry.get("/v2/public/x/manifests/v1").await.expect(200);
    registry.get("/v2/public/x/tags/list").await.expect(200);
    registry
        .call("POST /v2/public/x/blobs/uploads/", &[], b"")
        .await
        .expect(401);
}

#[tokio::test]
async fn without_right_a_repository_does_not_exist() {
    let registry = filled().await;
    let bob = basic("bob");
    for line in [
        "tags/list",
        "manifests/v1",
        &format!("blobs/{EMPTY}"),
        &format!("referrers/{EMPTY}"),
    ] {
        let there = as_(&registry, &bob, &format!("GET /v2/secret/y/{line}"), b"")
            .await
            .refused(404, "NAME_UNKNOWN");
        let none = as_(&registry, &bob, &format!("GET /v2/secret/n/{line}"), b"")
            .await
            .refused(404, "NAME_UNKNOWN");
        assert_eq!(there.text().replace("secret/y", "secret/n"), none.text());
    }
    as_(&registry, &bob, "POST /v2/secret/y/blobs/uploads/", b"")
        .await
        .refused(404, "NAME_UNKNOWN");
    // He knows this one, so he is told.
    as_(&registry, &bob, "POST /v2/shop/web/blobs/uploads/", b"")
        .await
        .refused(403, "DENIED");
    as_(&registry, &bob, "DELETE /v2/shop/web/manifests/v1", b"")
        .await
        .refused(403, "DENIED");
    as_(&registry, &bob, "GET /v2/shop/web/manifests/v1", b"")
        .await
        .expect(200);
}

#[tokio::test]
async fn tags_are_created_and_immutable_by_rule() {
    let registry = filled().await;
    let alice = basic("alice");
    let (one, two) = (image("one"), image("two"));
    let put = async |tag: &str, body: &str| {
        as_(
            &registry,
            &alice,
            &format!("PUT /v2/shop/web/manifests/{tag}"),
            body.as_bytes(),
        )
        .await
    };
    put("v2", &one).await.expect(201);
    put("v2", &one).await.expect(201);
    put("v2", &two).await.refused(403, "DENIED");
    put("dev-1", &one).await.expect(201);
    put("dev-1", &two).await.expect(201);
    as_(&registry, &alice, "DELETE /v2/shop/web/manifests/v2", b"")
        .await
        .refused(403, "DENIED");
    as_(
        &registry,
        &alice,
        "DELETE /v2/shop/web/manifests/dev-1",
        b"",
    )
    .await
    .expect(202);
    let digest = oci::Digest::sha256(one.as_bytes());
    as_(
        &registry,
        &alice,
        &format!("DELETE /v2/shop/web/manifests/{digest}"),
        b"",
    )
    .await
    .refused(403, "DENIED");
    let line = format!(
        "PUT /v2/shop/web/manifests/{}?tag=v3&tag=v2",
        oci::Digest::sha256(two.as_bytes())
    );
    as_(&registry, &alice, &line, two.as_bytes())
        .await
        .refused(403, "DENIED");
    as_(&registry, &alice, "GET /v2/shop/web/manifests/v3", b"")
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    // A pusher without any tag right: content by digest, evidence tags, no others.
    let robot = basic("robot");
    let body = image("robot");
    let digest = oci::Digest::sha256(body.as_bytes());
    as_(
        &registry,
        &robot,
        &format!("PUT /v2/shop/web/manifests/{digest}"),
        body.as_bytes(),
    )
    .await
    .expect(201);
    as_(
        &registry,
        &robot,
        "PUT /v2/shop/web/manifests/v9",
        body.as_bytes(),
    )
    .await
    .refused(403, "DENIED");
    as_(
        &registry,
        &robot,
        &format!("PUT /v2/shop/web/manifests/sha256-{}.sig", digest.hex()),
        body.as_bytes(),
    )
    .await
    .expect(201);
    as_(
        &registry,
        &robot,
        &format!("HEAD /v2/shop/web/blobs/{EMPTY}"),
        b"",
    )
    .await
    .expect(200);
    as_(
        &registry,
        &robot,
        &format!("GET /v2/shop/web/blobs/{EMPTY}"),
        b"",
    )
    .await
    .refused(404, "NAME_UNKNOWN");
}

#[tokio::test]
async fn mounts_only_from_what_the_caller_may_read() {
    let registry = Registry::users(|_| {}).await;
    let (root, alice) = (basic("root"), basic("alice"));
    let hidden = registry
        .blob_as("secret/y", b"hidden", &[("Authorization", &root)])
        .await;
    let shown = registry
        .blob_as("public/x", b"shown", &[("Authorization", &root)])
        .await;
    for (digest, query, status) in [
        (&hidden, "&from=secret/y", 202),
        (&hidden, "", 202),
        (&shown, "&from=public/x", 201),
        (&shown, "", 201),
    ] {
        let line = format!(
            "POST /v2/shop/web{}/blobs/uploads/?mount={digest}{query}",
            query.len()
        );
        as_(&registry, &alice, &line, b"").await.expect(status);
    }
    as_(
        &registry,
        &alice,
        &format!("GET /v2/shop/web0/blobs/{hidden}"),
        b"",
    )
    .await
    .refused(404, "BLOB_UNKNOWN");
}

#[tokio::test]
async fn a_mount_with_a_token_asks_for_both_scopes() {
    let registry = Registry::users(|_| {}).await;
    let root = basic("root");
    let digest = registry
        .blob_as("public/x", b"shown", &[("Authorization", &root)])
        .await;
    let narrow = bearer(&registry, "alice", "repository:shop/web:pull,push").await;
    let line = format!("POST /v2/shop/web/blobs/uploads/?mount={digest}&from=public/x");
    let reply = as_(&registry, &narrow, &line, b"")
        .await
        .refused(401, "UNAUTHORIZED");
    let scope = "repository:shop/web:pull,push repository:public/x:pull";
    assert!(
        reply
            .header("www-authenticate")
            .contains(&format!("scope=\"{scope}\""))
    );
    let wide = bearer(&registry, "alice", &scope.replace(' ', "+")).await;
    as_(&registry, &wide, &line, b"").await.expect(201);
    // A token says what it is for: nothing beside it is searched for a blob.
    let line = format!("POST /v2/shop/web2/blobs/uploads/?mount={digest}");
    let other = bearer(&registry, "alice", "repository:shop/web2:pull,push").await;
    as_(&registry, &other, &line, b"").await.expect(202);
    // What the caller may not read at all is not told by a challenge.
    let hidden = registry
        .blob_as("secret/y", b"hidden", &[("Authorization", &root)])
        .await;
    let line = format!("POST /v2/shop/web/blobs/uploads/?mount={hidden}&from=secret/y");
    as_(&registry, &narrow, &line, b"").await.expect(202);
}

#[tokio::test]
async fn tokens() {
    let registry = filled().await;
    let reply = token(
        &registry,
        Some(&basic("alice")),
        "&scope=repository:shop/web:pull,push",
    )
    .await
    .expect(200);
    let json = reply.json();
    assert_eq!(json["token"], json["access_token"]);
    assert!(json["expires_in"].as_u64().unwrap() >= 60);
    assert!(json["issued_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(reply.header("cache-control"), "no-store");
    let alice = format!("Bearer {}", json["token"].as_str().unwrap());
    as_(&registry, &alice, "GET /v2/", b"").await.expect(200);
    as_(&registry, &alice, "GET /v2/shop/web/manifests/v1", b"")
        .await
        .expect(200);
    as_(
        &registry,
        &alice,
        "PUT /v2/shop/web/manifests/v7",
        image("x").as_bytes(),
    )
    .await
    .expect(201);
    // It was issued for one repository.
    let reply = as_(&registry, &alice, "GET /v2/shop/other/manifests/v1", b"")
        .await
        .refused(401, "UNAUTHORIZED");
    let challenge = reply.header("www-authenticate");
    assert!(
        challenge.contains("scope=\"repository:shop/other:pull\"")
            && challenge.contains("insufficient_scope"),
        "{challenge}"
    );
    as_(&registry, &alice, "GET /v2/secret/y/manifests/v1", b"")
        .await
        .refused(404, "NAME_UNKNOWN");
    // It cannot be changed, and another key does not sign ours.
    let cut = &alice[..alice.len() - 3];
    as_(&registry, &format!("{cut}AAA"), "GET /v2/", b"")
        .await
        .expect(401);
    as_(
        &registry,
        &bearer(&registry, "alice", "repository:shop/web:pull").await,
        "POST /v2/shop/web/blobs/uploads/",
        b"",
    )
    .await
    .refused(401, "UNAUTHORIZED");
    // Asking for more than the rights gives no more than the rights.
    let bob = bearer(
        &registry,
        "bob",
        "repository:shop/web:pull,push&scope=repository:secret/y:pull",
    )
    .await;
    as_(&registry, &bob, "POST /v2/shop/web/blobs/uploads/", b"")
        .await
        .refused(403, "DENIED");
    as_(&registry, &bob, "GET /v2/secret/y/manifests/v1", b"")
        .await
        .refused(404, "NAME_UNKNOWN");
    token(&registry, Some(&basic_with("bob", "wrong")), "")
        .await
        .refused(401, "UNAUTHORIZED");
    token(&registry, Some(&bob), "")
        .await
        .refused(401, "UNAUTHORIZED");
    // Two scopes in one parameter, as some clients send them.
    let both = bearer(
        &registry,
        "bob",
        "repository:shop/web:pull+repository:public/x:pull",
    )
    .await;
    as_(&registry, &both, "GET /v2/public/x/manifests/v1", b"")
        .await
        .expect(200);
    as_(&registry, &both, "GET /v2/shop/web/manifests/v1", b"")
        .await
        .expect(200);
}

#[tokio::test]
async fn operators_get_tokens_for_what_only_they_may() {
    let registry = filled().await;
    let challenge = registry.call("GET /api/v1/collection", &[], b"").await;
    let challenge = challenge.all("www-authenticate").join(", ");
    assert!(
        challenge.contains("scope=\"registry:admin:*\""),
        "{challenge}"
    );
    let operator = bearer(&registry, "root", "registry:admin:*").await;
    for path in ["collection", "scrub", "mode", "retention/runs", "storage"] {
        as_(&registry, &operator, &format!("GET /api/v1/{path}"), b"")
            .await
            .expect(200);
    }
    for user in ["alice", "bob"] {
        let other = bearer(&registry, user, "registry:admin:*").await;
        let reply = as_(&registry, &other, "GET /api/v1/collection", b"").await;
        assert!(
            [401, 403].contains(&reply.status),
            "{user}: {}",
            reply.status
        );
    }
    // Whole repositories: a token says no more than was asked for, and no more than its user may.
    let delete = "DELETE /api/v1/repositories/shop/web";
    let narrow = bearer(&registry, "root", "repository:shop/web:pull,push").await;
    let reply = as_(&registry, &narrow, delete, b"").await;
    let challenge = reply.refused(401, "UNAUTHORIZED");
    let challenge = challenge.all("www-authenticate").join(", ");
    assert!(challenge.contains("repository:shop/web:"), "{challenge}");
    let alice = bearer(&registry, "alice", "repository:shop/web:*").await;
    let reply = as_(&registry, &alice, delete, b"").await;
    assert!([401, 403].contains(&reply.status), "{}", reply.status);
    let root = bearer(&registry, "root", "repository:shop/web:*").await;
    as_(&registry, &root, delete, b"").await.expect(202);
}

#[tokio::test]
async fn anonymous_tokens_and_the_oauth_form() {
    let registry = filled().await;
    let reply = token(&registry, None, "&scope=repository:public/x:pull,push")
        .await
        .expect(200);
    let anonymous = format!("Bearer {}", reply.json()["token"].as_str().unwrap());
    as_(&registry, &anonymous, "GET /v2/", b"")
        .await
        .expect(200);
    as_(&registry, &anonymous, "GET /v2/public/x/manifests/v1", b"")
        .await
        .expect(200);
    as_(
        &registry,
        &anonymous,
        "POST /v2/public/x/blobs/uploads/",
        b"",
    )
    .await
    .refused(401, "UNAUTHORIZED");
    as_(&registry, &anonymous, "GET /v2/secret/y/manifests/v1", b"")
        .await
        .refused(401, "UNAUTHORIZED");
    let form = |password: &str| {
        format!(
            "grant_type=password&service=longshore&username=bob&password={password}&scope=repository:shop/web:pull"
        )
    };
    let reply = registry
        .call("POST /v2/token", &[], form("bob-secret").as_bytes())
        .await
        .expect(200);
    let bob = format!("Bearer {}", reply.json()["access_token"].as_str().unwrap());
    as_(&registry, &bob, "GET /v2/shop/web/manifests/v1", b"")
        .await
        .expect(200);
    registry
        .call("POST /v2/token", &[], form("wrong").as_bytes())
        .await
        .refused(401, "UNAUTHORIZED");
    registry
        .call("POST /v2/token", &[], b"grant_type=refresh_token")
        .await
        .refused(400, "UNSUPPORTED");
}

#[tokio::test]
async fn the_public_url_sets_the_realm() {
    let registry = Registry::users(|settings| {
        settings.public_url = Some("https://registry.example.com/".to_owned());
    })
    .await;
    let reply = registry
        .call("GET /v2/", &[("Host", "evil\"x")], b"")
        .await
        .expect(401);
    assert!(
        reply
            .header("www-authenticate")
            .starts_with("Bearer realm=\"https://registry.example.com/v2/token\"")
    );
    let other = Registry::users(|_| {}).await;
    let reply = other
        .call("GET /v2/", &[("Host", "r.example.com:5000")], b"")
        .await
        .expect(401);
    assert!(
        reply
            .header("www-authenticate")
            .contains("realm=\"http://r.example.com:5000/v2/token\"")
    );
}

#[tokio::test]
async fn a_changed_password_ends_logins_and_tokens() {
    let registry = filled().await;
    let held = bearer(&registry, "bob", "repository:shop/web:pull").await;
    let (bob, alice) = (basic("bob"), basic("alice"));
    let line = "GET /v2/shop/web/manifests/v1";
    for credential in [&held, &bob, &alice] {
        as_(&registry, credential, line, b"").await.expect(200);
    }
    let path = registry.dir.path().join("htpasswd");
    let text = passwords(&["alice"]) + &format!("bob:{}\n", bcrypt::hash("new-secret", 4).unwrap());
    std::fs::write(&path, text).unwrap();
    for credential in [&held, &bob] {
        as_(&registry, credential, line, b"")
            .await
            .refused(401, "UNAUTHORIZED");
    }
    as_(&registry, &basic_with("bob", "new-secret"), line, b"")
        .await
        .expect(200);
    as_(&registry, &alice, line, b"").await.expect(200);
    std::fs::write(&path, passwords(&["bob"])).unwrap();
    as_(&registry, &alice, line, b"")
        .await
        .refused(401, "UNAUTHORIZED");
}

#[tokio::test]
async fn failed_logins_are_bounded() {
    let registry = Registry::users(|settings| settings.limits.failed_logins = 3).await;
    let mut statuses = Vec::new();
    for n in 0..5 {
        let reply = as_(
            &registry,
            &basic_with("bob", &format!("guess{n}")),
            "GET /v2/",
            b"",
        )
        .await;
        if reply.status == 429 {
            assert!(reply.header("retry-after").parse::<u64>().unwrap() >= 1);
        }
        statuses.push(reply.status);
    }
    assert_eq!(statuses, [401, 401, 401, 429, 429]);
    as_(&registry, &basic("alice"), "GET /v2/", b"")
        .await
        .expect(200);
}

#[tokio::test]
async fn open_mode_serves_this_machine_alone() {
    let registry = Registry::open().await;
    registry.get("/v2/").await.expect(200);
    for host in ["localhost", "127.0.0.1:5050", "[::1]:80"] {
        registry
            .call("GET /v2/", &[("Host", host)], b"")
            .await
            .expect(200);
    }
    for host in ["evil.example.com", "10.0.0.1", "127.0.0.1.nip.io", ""] {
        for path in ["/v2/", "/metrics", "/api/v1/events", "/v2/a/tags/list"] {
            registry
                .call(&format!("GET {path}"), &[("Host", host)], b"")
                .await
                .refused(421, "DENIED");
        }
    }
    registry
        .call("GET http://evil.example.com/v2/", &[], b"")
        .await
        .refused(421, "DENIED");
    let page = [("Origin", "https://evil.example.com")];
    registry
        .call("POST /v2/a/blobs/uploads/", &page, b"")
        .await
        .refused(403, "DENIED");
    registry
        .call("GET /v2/", &[("Origin", "http://localhost:8080")], b"")
        .await
        .expect(200);
    registry.get("/v2/token").await.refused(404, "UNSUPPORTED");
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let store = place.open(store::Options::default()).await;
    let bind = async |settings| Server::bind(settings, store.clone()).await.unwrap_err();
    let base = || Settings {
        listen: vec![([127, 0, 0, 1], 0).into()],
        ..Settings::default()
    };
    let error = bind(Settings {
        listen: vec![([0, 0, 0, 0], 0).into()],
        ..base()
    })
    .await;
    assert!(matches!(error, Error::OpenNotLoopback(_)), "{error}");
    assert!(matches!(
        bind(Settings {
            listen: vec![],
            ..base()
        })
        .await,
        Error::NoAddress
    ));
    for url in [
        "registry.example.com",
        "ftp://x",
        "https://x?y",
        "https://x/\"y",
    ] {
        assert!(
            matches!(
                bind(Settings {
                    public_url: Some(url.to_owned()),
                    ..base()
                })
                .await,
                Error::PublicUrl(_)
            ),
            "{url}"
        );
    }
    let users = |path: &Path| {
        Access::users(path, vec![rule(&["*"], &["**"], &[], &[Action::Pull])]).unwrap()
    };
    let file = dir.path().join("htpasswd");
    assert!(matches!(
        bind(Settings {
            access: users(&file),
            ..base()
        })
        .await,
        Error::Htpasswd { .. }
    ));
    std::fs::write(&file, "alice:plain").unwrap();
    let error = bind(Settings {
        access: users(&file),
        ..base()
    })
    .await;
    assert!(error.to_string().contains("line 1"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let error = bind(Settings {
        listen: vec![taken.local_addr().unwrap()],
        ..base()
    })
    .await;
    assert!(matches!(error, Error::Bind { .. }), "{error}");
}
