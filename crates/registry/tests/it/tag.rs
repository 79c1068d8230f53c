use crate::harness::{MANIFEST, Registry, image};

async fn with_tags(tags: &[&str]) -> Registry {
    let registry = Registry::open().await;
    registry.blob("a/b", b"{}").await;
    let body = image("x");
    for chunk in tags.chunks(20) {
        let query: Vec<String> = chunk.iter().map(|tag| format!("tag={tag}")).collect();
        let digest = oci::Digest::sha256(body.as_bytes());
        let line = format!("PUT /v2/a/b/manifests/{digest}?{}", query.join("&"));
        registry
            .call(&line, &[("Content-Type", MANIFEST)], body.as_bytes())
            .await
            .expect(201);
    }
    registry
}

fn tags(reply: &crate::harness::Reply) -> Vec<String> {
    let json = reply.json();
    assert_eq!(json["name"], "a/b");
    json["tags"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tag| tag.as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn an_unknown_repository() {
    let registry = Registry::open().await;
    registry
        .get("/v2/none/tags/list")
        .await
        .refused(404, "NAME_UNKNOWN");
}

#[tokio::test]
async fn bytewise_order_and_last_that_is_not_there() {
    let registry = with_tags(&["b", "a", "B", "_x", "10", "9", "a.1", "a-1"]).await;
    let all = registry.get("/v2/a/b/tags/list").await.expect(200);
    assert_eq!(tags(&all), ["10", "9", "B", "_x", "a", "a-1", "a.1", "b"]);
    assert_eq!(all.next(), None);
    assert_eq!(all.header("content-type"), "application/json");
    assert_eq!(
        tags(&registry.get("/v2/a/b/tags/list?last=a0").await),
        ["b"]
    );
    assert_eq!(
        tags(&registry.get("/v2/a/b/tags/list?last=a").await),
        ["a-1", "a.1", "b"]
    );
    assert!(tags(&registry.get("/v2/a/b/tags/list?last=zzz").await).is_empty());
}

#[tokio::test]
async fn pages_follow_links() {
    let names: Vec<String> = (0..45).map(|n| format!("t{n:03}")).collect();
    let registry = with_tags(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    for n in [1, 7, 44, 45, 46] {
        let (mut seen, mut pages) = (Vec::new(), 0);
        let mut next = Some(format!("/v2/a/b/tags/list?n={n}"));
        while let Some(path) = next {
            let reply = registry.get(&path).await.expect(200);
            let page = tags(&reply);
            assert!(page.len() <= n && !page.is_empty());
            seen.extend(page);
            pages += 1;
            next = reply.next();
        }
        assert_eq!(seen, names, "n={n}");
        assert_eq!(pages, 45usize.div_ceil(n), "n={n}");
    }
}

#[tokio::test]
async fn numbers() {
    let registry = with_tags(&["a", "b"]).await;
    let none = registry.get("/v2/a/b/tags/list?n=0").await.expect(200);
    assert!(tags(&none).is_empty());
    assert_eq!(none.next(), None);
    assert_eq!(
        tags(
            &registry
                .get("/v2/a/b/tags/list?n=99999999999999999999")
                .await
        )
        .len(),
        2
    );
    for bad in ["-1", "x", "1.5", "", "%zz"] {
        registry
            .get(&format!("/v2/a/b/tags/list?n={bad}"))
            .await
            .expect(400);
    }
    registry
        .get("/v2/none/tags/list?n=0")
        .await
        .refused(404, "NAME_UNKNOWN");
}

#[tokio::test]
async fn a_page_is_bounded_without_a_number() {
    let registry = Registry::set(|settings| {
        settings.limits.page = 2;
        settings.limits.page_max = 3;
    })
    .await;
    for tag in ["a", "b", "c", "d"] {
        registry.image("a/b", tag, "x").await;
    }
    let page = registry.get("/v2/a/b/tags/list").await;
    assert_eq!(tags(&page), ["a", "b"]);
    assert_eq!(tags(&registry.get(&page.next().unwrap()).await), ["c", "d"]);
    assert_eq!(
        tags(&registry.get("/v2/a/b/tags/list?n=100").await),
        ["a", "b", "c"]
    );
}

#[tokio::test]
async fn history() {
    let registry = Registry::open().await;
    let one = registry.image("a/b", "v1", "one").await;
    let two = registry.image("a/b", "v1", "two").await;
    registry.image("a/b", "v1", "two").await;
    registry.delete("/v2/a/b/manifests/v1").await.expect(202);
    let reply = registry
        .get("/api/v1/repositories/a/b/tags/v1/history")
        .await
        .expect(200);
    let digests: Vec<_> = reply.json()["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["digest"].clone())
        .collect();
    assert_eq!(
        digests,
        [
            serde_json::Value::Null,
            two.clone().into(),
            one.clone().into()
        ]
    );
    assert_eq!(reply.json()["items"][0]["actor"], "anonymous");
    let mut path = "/api/v1/repositories/a/b/tags/v1/history?limit=1".to_owned();
    let mut seen = 0;
    loop {
        let page = registry.get(&path).await.expect(200).json();
        seen += page["items"].as_array().unwrap().len();
        match page["next"].as_str() {
            Some(next) => {
                path = format!("/api/v1/repositories/a/b/tags/v1/history?limit=1&cursor={next}");
            }
            None => break,
        }
    }
    assert_eq!(seen, 3);
    registry
        .get("/api/v1/repositories/a/b/tags/none/history")
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    let document = registry
        .get("/api/v1/openapi.json")
        .await
        .expect(200)
        .json();
    assert!(document["paths"]["/api/v1/repositories/{name}/tags/{tag}/history"].is_object());
}
