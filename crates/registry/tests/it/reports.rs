//! Pins, attempts, quotas, the storage report and what `/metrics` says of them, over HTTP.

use oci::Digest;
use oci::record::Chain;
use registry::{Access, Settings};
use serde_json::{Value, json};
use store::{Options, ReportLimits};

use crate::harness::{Registry, Reply, basic, image};

async fn send(registry: &Registry, user: &str, line: &str, body: &Value) -> Reply {
    let authorization = basic(user);
    registry
        .call(
            line,
            &[("Authorization", &authorization)],
            body.to_string().as_bytes(),
        )
        .await
}

async fn read(registry: &Registry, user: &str, path: &str) -> Value {
    let authorization = basic(user);
    let headers = [("Authorization", authorization.as_str())];
    registry
        .call(&format!("GET {path}"), &headers, b"")
        .await
        .expect(200)
        .json()
}

#[tokio::test]
async fn a_pinned_manifest_cannot_be_deleted_until_its_holder_lets_go() {
    let registry = Registry::users(|_| {}).await;
    let root = basic("root");
    let root = [("Authorization", root.as_str())];
    let digest = registry.image_as("shop/web", "v1", "x", &root).await;
    let secret = registry.image_as("secret/web", "v1", "y", &root).await;
    let absent = Digest::sha256(b"absent").to_string();
    let pins = json!({ "pins": [
        { "repository": "shop/web", "digest": digest, "reason": "runs" },
        { "repository": "shop/web", "digest": absent },
        { "repository": "secret/web", "digest": secret },
    ] });
    // `bob` may only pull, and no more than that is needed; what he may not read is not there for him.
    let reply = send(&registry, "bob", "PUT /api/v1/pins/bob/web", &pins)
        .await
        .expect(201);
    assert_eq!(
        reply.json(),
        json!({
            "holder": "bob/web",
            "held": [{ "repository": "shop/web", "digest": digest }],
            "missing": [
                { "repository": "secret/web", "digest": secret },
                { "repository": "shop/web", "digest": absent },
            ],
            "expired": [],
        })
    );
    let version = reply.header("etag").to_owned();
    let again = send(&registry, "bob", "PUT /api/v1/pins/bob/web", &pins).await;
    assert_eq!(again.expect(200).header("etag"), version);

    let path = format!("/v2/shop/web/manifests/{digest}");
    let refused = registry
        .call(&format!("DELETE {path}"), &root, b"")
        .await
        .refused(409, "DENIED");
    assert!(refused.text().contains("`bob/web`") || refused.text().contains("bob/web"));
    registry
        .call("DELETE /v2/shop/web/manifests/v1", &root, b"")
        .await
        .expect(202);
    registry
        .call(&format!("GET {path}"), &root, b"")
        .await
        .expect(200);

    let of = format!("/api/v1/pins?repository=shop/web&digest={digest}");
    let of = read(&registry, "alice", &of).await;
    assert_eq!(of["items"][0]["holder"], "bob/web");
    assert_eq!(of["items"][0]["createdBy"], "user:bob");
    let set = read(&registry, "bob", "/api/v1/pins/bob/web").await;
    assert_eq!(set["pins"].as_array().unwrap().len(), 1);
    assert_eq!(set["pins"][0]["reason"], "runs");

    // Compare and set.
    let bob = basic("bob");
    let with = |name: &'static str, value: &str| {
        vec![
            ("Authorization".to_owned(), bob.clone()),
            (name.to_owned(), value.to_owned()),
        ]
    };
    for (name, value, status) in [
        ("If-None-Match", "*", 412),
        ("If-Match", "\"1\"", 412),
        ("If-Match", version.as_str(), 200),
        ("If-Match", "*", 200),
        ("If-None-Match", version.as_str(), 400),
    ] {
        let headers = with(name, value);
        let headers: Vec<_> = headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        let reply = registry
            .call(
                "PUT /api/v1/pins/bob/web",
                &headers,
                pins.to_string().as_bytes(),
            )
            .await
            .expect(status);
        if status == 412 {
            assert_eq!(reply.header("etag"), version);
        }
    }

    // An operator may take another one's pins away, and then the manifest.
    send(
        &registry,
        "root",
        "DELETE /api/v1/pins/bob/web",
        &Value::Null,
    )
    .await
    .expect(204);
    send(
        &registry,
        "root",
        "DELETE /api/v1/pins/bob/web",
        &Value::Null,
    )
    .await
    .refused(404, "HOLDER_UNKNOWN");
    registry
        .call(&format!("DELETE {path}"), &root, b"")
        .await
        .expect(202);
}

#[tokio::test]
async fn holders_belong_to_their_users() {
    let registry = Registry::users(|_| {}).await;
    let none = json!({ "pins": [] });
    for holder in ["alice", "alice/web", "bobby", "other/bob", "bo"] {
        let line = format!("PUT /api/v1/pins/{holder}");
        send(&registry, "bob", &line, &none)
            .await
            .refused(403, "DENIED");
    }
    for holder in ["", "a//b", "bob/..", "bob/%00", &"x".repeat(256)] {
        let line = format!("PUT /api/v1/pins/{holder}");
        let status = send(&registry, "bob", &line, &none).await.status;
        assert!(matches!(status, 400 | 404 | 405), "{holder}: {status}");
    }
    registry
        .call("PUT /api/v1/pins/bob", &[], b"{\"pins\":[]}")
        .await
        .refused(401, "UNAUTHORIZED");
    registry
        .get("/api/v1/pins")
        .await
        .refused(401, "UNAUTHORIZED");
    for holder in ["bob", "bob-2", "bob/a", "bob/b", "zoe"] {
        let line = format!("PUT /api/v1/pins/{holder}");
        send(&registry, "root", &line, &none).await.expect(201);
    }
    let names = |page: &Value| -> Vec<String> {
        let items = page["items"].as_array().unwrap().iter();
        items
            .map(|item| item["holder"].as_str().unwrap().to_owned())
            .collect()
    };
    for (user, all) in [
        ("root", vec!["bob", "bob-2", "bob/a", "bob/b", "zoe"]),
        ("bob", vec!["bob", "bob/a", "bob/b"]),
        ("alice", vec![]),
    ] {
        let whole = read(&registry, user, "/api/v1/pins").await;
        assert_eq!(names(&whole), all, "{user}");
        let (mut paged, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = read(&registry, user, &format!("/api/v1/pins?limit=1{cursor}")).await;
            paged.extend(names(&page));
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(paged, all, "{user}");
    }
    let bad = json!({ "pins": [{ "repository": "a", "digest": "sha256:0" }] });
    send(&registry, "bob", "PUT /api/v1/pins/bob", &bad)
        .await
        .refused(400, "DIGEST_INVALID");
    let misspelt = json!({ "pins": [], "expire": 1 });
    send(&registry, "bob", "PUT /api/v1/pins/bob", &misspelt)
        .await
        .refused(400, "UNSUPPORTED");
}

fn ledger() -> Vec<Value> {
    let digest = Digest::sha256(b"release").to_string();
    let mut chain = Chain::new();
    [
        json!({ "kind": "attempt", "attempt": 1, "at": "t", "trigger": "poll", "reference": "r.example:5000/shop/web:production", "digest": digest, "previous": null }),
        json!({ "kind": "verdict", "attempt": 1, "verdict": null }),
        json!({ "kind": "outcome", "attempt": 1, "at": "t", "outcome": "good", "reason": null }),
        json!({ "kind": "note", "at": "t", "text": "é\n\t" }),
    ]
    .iter()
    .map(|record| serde_json::from_str(&chain.append(record).unwrap()).unwrap())
    .collect()
}

#[tokio::test]
async fn attempts_are_kept_as_they_came_and_shown_to_those_who_may() {
    let registry = Registry::users(|_| {}).await;
    let records = ledger();
    let batch = |from: usize, to: usize| {
        let previous = from.checked_sub(1).map(|at| records[at]["hash"].clone());
        json!({ "holder": "bob/host1", "target": "web", "previous": previous, "records": records[from..to] })
    };
    let post = async |batch: &Value| {
        send(&registry, "bob", "POST /api/v1/attempts", batch)
            .await
            .expect(200)
            .json()
    };
    assert_eq!(post(&batch(0, 0)).await["known"], Value::Null);
    let first = post(&batch(0, 2)).await;
    assert_eq!(
        first["known"],
        json!({ "sequence": 2, "hash": records[1]["hash"] })
    );
    let rest = post(&batch(1, 4)).await;
    assert_eq!(
        rest,
        json!({ "added": 2, "repeated": 1, "seams": 0, "known": { "sequence": 4, "hash": records[3]["hash"] } })
    );
    assert_eq!(post(&batch(0, 4)).await["added"], 0);

    let all = read(
        &registry,
        "bob",
        "/api/v1/attempts?holder=bob/host1&target=web",
    )
    .await;
    let kept: Vec<_> = all["items"].as_array().unwrap().iter().collect();
    assert_eq!(kept.len(), 4);
    assert_eq!(kept[0]["record"], records[3]);
    assert_eq!(kept[3]["record"], records[0]);
    assert_eq!(kept[3]["repository"], "shop/web");
    assert_eq!(kept[0]["link"], "next");
    // `alice` may pull the repository: she sees what is about it. A note is about nothing.
    let seen = read(&registry, "alice", "/api/v1/attempts").await;
    assert_eq!(seen["items"].as_array().unwrap().len(), 3);
    let good = read(&registry, "alice", "/api/v1/attempts?kind=outcome").await;
    assert_eq!(good["items"][0]["record"]["outcome"], "good");
    // `robot` may not pull it.
    let none = read(&registry, "robot", "/api/v1/attempts").await;
    assert_eq!(none["items"], json!([]));
    registry
        .get("/api/v1/attempts")
        .await
        .refused(401, "UNAUTHORIZED");
    let page = read(&registry, "root", "/api/v1/attempts?limit=3").await;
    let next = page["next"].as_str().unwrap();
    let page = read(
        &registry,
        "root",
        &format!("/api/v1/attempts?limit=3&cursor={next}"),
    )
    .await;
    assert_eq!(page["items"].as_array().unwrap().len(), 1);
    assert_eq!(page["next"], Value::Null);
    let digest = records[0]["digest"].as_str().unwrap();
    let about = read(
        &registry,
        "root",
        &format!("/api/v1/attempts?digest={digest}"),
    )
    .await;
    assert_eq!(about["items"].as_array().unwrap().len(), 3);

    // What is not a piece of a ledger is refused, by record.
    let mut forged = batch(0, 4);
    forged["records"][2]["outcome"] = json!("broken");
    let refused = send(&registry, "bob", "POST /api/v1/attempts", &forged)
        .await
        .refused(400, "UNSUPPORTED");
    assert!(refused.text().contains("record 2"), "{}", refused.text());
    let mut other = batch(0, 4);
    other["holder"] = json!("alice");
    send(&registry, "bob", "POST /api/v1/attempts", &other)
        .await
        .refused(403, "DENIED");
    // A piece whose beginning is not known is kept with a seam.
    let mut lost = batch(2, 4);
    lost["target"] = json!("db");
    let kept = post(&lost).await;
    assert_eq!((&kept["added"], &kept["seams"]), (&json!(2), &json!(1)));
}

fn ratio(logical: u64, stored: u64) -> f64 {
    (logical as f64 / stored as f64 * 1000.0).round() / 1000.0
}

#[tokio::test]
async fn text_that_cannot_be_kept_or_shown_is_refused() {
    let registry = Registry::users(|_| {}).await;
    let root = basic("root");
    let root = [("Authorization", root.as_str())];
    for path in [
        "pins?cursor=%00",
        "storage/repositories?cursor=%00",
        "storage/repositories?namespace=%00",
        "storage/namespaces?cursor=a%00",
        "attempts?holder=%00",
        "attempts?kind=%00",
        "pins?limit=0",
        "storage/namespaces?limit=0",
        "attempts?limit=0",
    ] {
        let reply = registry
            .call(&format!("GET /api/v1/{path}"), &root, b"")
            .await;
        assert_eq!(reply.status, 400, "{path}: {}", reply.text());
    }
    let digest = registry.image_as("shop/web", "v1", "x", &root).await;
    let record = |record: Value| -> Value {
        serde_json::from_str(&Chain::new().append(&record).unwrap()).unwrap()
    };
    for text in ["a\0b", "\u{1b}[31mred", "\u{202e}", "\u{9b}"] {
        let pins =
            json!({ "pins": [{ "repository": "shop/web", "digest": digest, "reason": text }] });
        send(&registry, "bob", "PUT /api/v1/pins/bob", &pins)
            .await
            .refused(400, "UNSUPPORTED");
        let mode = json!({ "mode": "read-only", "reason": text });
        send(&registry, "root", "PUT /api/v1/mode", &mode)
            .await
            .refused(400, "UNSUPPORTED");
        let batch = json!({ "holder": "bob", "target": "web", "previous": null, "records": [record(json!({ "text": text }))] });
        let refused = send(&registry, "bob", "POST /api/v1/attempts", &batch).await;
        assert_eq!(refused.status, 400, "{}", refused.text());
    }
    let long = json!({ "holder": "bob", "target": "web", "records": [
        record(json!({ "text": "x".repeat(256 << 10) }))
    ] });
    send(&registry, "bob", "POST /api/v1/attempts", &long)
        .await
        .refused(413, "SIZE_INVALID");
    // Who is nobody is told so, whatever it sends.
    registry
        .call("POST /api/v1/attempts", &[], b"{")
        .await
        .refused(401, "UNAUTHORIZED");
}

#[tokio::test]
async fn what_one_user_may_report_has_an_end() {
    let options = Options {
        reports: ReportLimits {
            holders: 1,
            targets: 1,
            ..ReportLimits::default()
        },
        ..Options::default()
    };
    let registry = Registry::with(|_, _| Access::Open, options, |_| {}).await;
    let put = async |holder: &str| {
        registry
            .call(&format!("PUT /api/v1/pins/{holder}"), &[], b"{\"pins\":[]}")
            .await
    };
    put("bob/a").await.expect(201);
    let refused = put("bob/b").await.refused(403, "DENIED");
    assert!(refused.text().contains("1 holders"), "{}", refused.text());
    put("eve/b").await.expect(201);
    let post = async |target: &str| {
        let batch = json!({ "holder": "bob", "target": target, "records": ledger() });
        let body = batch.to_string();
        registry
            .call("POST /api/v1/attempts", &[], body.as_bytes())
            .await
    };
    post("web").await.expect(200);
    post("db").await.refused(403, "DENIED");
    post("web").await.expect(200);
}

#[tokio::test]
async fn a_quota_refuses_early_and_the_report_adds_up() {
    let registry = Registry::users(|settings| settings.metric_repositories = 1).await;
    let root = basic("root");
    let root = [("Authorization", root.as_str())];
    registry.image_as("shop/web", "v1", "x", &root).await;
    registry.image_as("shop/api", "v1", "x", &root).await;
    let size = image("x").len() as u64 + 2;
    let namespace = "/api/v1/storage/namespaces/shop";
    let put = format!("PUT {namespace}");
    // Nobody has asked before.
    registry.store.count_sharing().await.unwrap();
    let set = send(&registry, "root", &put, &json!({ "quota": 2 * size }))
        .await
        .expect(200);
    assert_eq!(
        set.json(),
        json!({
            "name": "shop", "bytes": 2 * size, "objects": 4, "quota": 2 * size, "quotaIsDefault": false,
            // They share the config of two bytes.
            "storedBytes": 2 * size - 2, "exclusiveBytes": 2 * size - 2, "deduplication": ratio(2 * size, 2 * size - 2),
        })
    );
    let refused = registry
        .call("POST /v2/shop/web/blobs/uploads/", &root, b"")
        .await
        .refused(403, "DENIED");
    let text = refused.text();
    assert!(
        text.contains(&format!("is {} bytes", 2 * size)) && text.contains("delete something"),
        "{text}"
    );
    let digest = Digest::sha256(b"more");
    for path in ["shop/web", "shop/new"] {
        let line = format!("POST /v2/{path}/blobs/uploads/?digest={digest}");
        registry
            .call(&line, &root, b"more")
            .await
            .refused(403, "DENIED");
    }
    registry
        .call("GET /v2/shop/web/manifests/v1", &root, b"")
        .await
        .expect(200);
    for (user, body, status) in [
        ("alice", json!({ "quota": 1 }), 403),
        ("root", json!({}), 400),
        ("root", json!({ "quota": -1 }), 400),
        ("root", json!({ "quota": null }), 200),
    ] {
        send(&registry, user, &put, &body).await.expect(status);
    }
    registry
        .call("POST /v2/shop/web/blobs/uploads/", &root, b"")
        .await
        .expect(202);
    send(
        &registry,
        "root",
        "PUT /api/v1/storage/namespaces/Shop",
        &json!({ "quota": 1 }),
    )
    .await
    .refused(400, "NAME_INVALID");

    let storage = read(&registry, "root", "/api/v1/storage").await;
    assert_eq!(storage["logicalBytes"], 2 * size);
    assert_eq!(
        storage["storedBytes"],
        2 * size - 2,
        "the blob is stored once"
    );
    assert!(storage["deduplication"].as_f64().unwrap() > 1.0);
    let namespaces = read(&registry, "root", "/api/v1/storage/namespaces?sort=name").await;
    assert_eq!(namespaces["items"][0]["name"], "shop");
    assert_eq!(namespaces["items"][0]["storedBytes"], 2 * size - 2);
    assert!(namespaces["storedAgeSeconds"].is_u64(), "{namespaces}");
    registry.store.maintain_once().await.unwrap();
    let path = "/api/v1/storage/repositories?namespace=shop";
    let repositories = read(&registry, "root", path).await;
    for item in repositories["items"].as_array().unwrap() {
        assert_eq!(
            (
                &item["bytes"],
                &item["storedBytes"],
                &item["exclusiveBytes"]
            ),
            (&json!(size), &json!(size - 1), &json!(size - 2)),
        );
        assert_eq!(item["deduplication"], ratio(size, size - 1));
    }
    assert_eq!(repositories["items"].as_array().unwrap().len(), 2);
    // That somebody else holds the same content is told to operators alone.
    let seen = read(&registry, "alice", path).await;
    assert!(seen["items"][0]["bytes"].is_u64(), "{seen}");
    assert!(seen["items"][0].get("storedBytes").is_none(), "{seen}");
    send(&registry, "alice", "GET /api/v1/storage", &Value::Null)
        .await
        .refused(403, "DENIED");
    let metrics = registry
        .call("GET /metrics", &root, b"")
        .await
        .expect(200)
        .text();
    assert!(
        metrics.contains(&format!("longshore_logical_bytes {}", 2 * size)),
        "{metrics}"
    );
    let (shop, of_shop) = (2 * size - 2, ratio(2 * size, 2 * size - 2));
    let (one, of_one) = (size - 1, ratio(size, size - 1));
    for line in [
        format!("longshore_namespace_stored_bytes{{namespace=\"shop\"}} {shop}"),
        format!("longshore_namespace_exclusive_bytes{{namespace=\"shop\"}} {shop}"),
        format!("longshore_namespace_deduplication_ratio{{namespace=\"shop\"}} {of_shop}"),
        format!("longshore_repository_stored_bytes{{repository=\"shop/api\"}} {one}"),
        format!(
            "longshore_repository_exclusive_bytes{{repository=\"shop/api\"}} {}",
            size - 2
        ),
        format!("longshore_repository_deduplication_ratio{{repository=\"shop/api\"}} {of_one}"),
    ] {
        assert!(metrics.lines().any(|one| one == line), "{line}\n{metrics}");
    }
    let anonymous = registry.get("/metrics").await.expect(200).text();
    assert!(anonymous.contains("longshore_logical_bytes"));
    assert!(!anonymous.contains("namespace=\"shop\""), "{anonymous}");
}

#[tokio::test]
async fn repositories_are_listed_for_those_who_may_pull_them() {
    let options = Options {
        quota: Some(1 << 20),
        ..Options::default()
    };
    let registry = Registry::with(|_, _| Access::Open, options, |_: &mut Settings| {}).await;
    registry.image("shop/web", "v1", "x").await;
    registry.image("shop/web", "v2", "yy").await;
    registry.image("other", "v1", "x").await;
    // Totals are folded by the store's own work, which nobody does here.
    let folded = registry
        .get("/api/v1/storage/repositories")
        .await
        .expect(200)
        .json();
    assert_eq!(folded["items"], json!([]));
    let namespaces = registry
        .get("/api/v1/storage/namespaces")
        .await
        .expect(200)
        .json();
    let names: Vec<_> = namespaces["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| {
            (
                item["name"].as_str().unwrap(),
                item["quota"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(names, [("other", 1 << 20), ("shop", 1 << 20)]);
    for bad in ["sort=age", "sort=size&cursor=x", "limit=x"] {
        registry
            .get(&format!("/api/v1/storage/repositories?{bad}"))
            .await
            .expect(400);
    }
}

#[tokio::test]
async fn the_document_tells_of_every_path() {
    let registry = Registry::open().await;
    let document = registry
        .get("/api/v1/openapi.json")
        .await
        .expect(200)
        .json();
    for path in [
        "/api/v1/attempts",
        "/api/v1/pins",
        "/api/v1/pins/{holder}",
        "/api/v1/storage",
        "/api/v1/storage/namespaces",
        "/api/v1/storage/namespaces/{name}",
        "/api/v1/storage/repositories",
    ] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
}
