use crate::harness::{Registry, basic};

fn names(reply: &crate::harness::Reply) -> Vec<String> {
    reply.json()["repositories"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn pages_in_order() {
    let registry = Registry::open().await;
    assert!(names(&registry.get("/v2/_catalog").await.expect(200)).is_empty());
    for name in ["b", "a/x", "a", "c/d/e"] {
        registry.image(name, "v1", "x").await;
    }
    assert_eq!(
        names(&registry.get("/v2/_catalog").await),
        ["a", "a/x", "b", "c/d/e"]
    );
    let mut seen = Vec::new();
    let mut next = Some("/v2/_catalog?n=3".to_owned());
    while let Some(path) = next {
        let reply = registry.get(&path).await.expect(200);
        seen.extend(names(&reply));
        next = reply.next();
    }
    assert_eq!(seen, ["a", "a/x", "b", "c/d/e"]);
    let none = registry.get("/v2/_catalog?n=0").await.expect(200);
    assert!(names(&none).is_empty() && none.next().is_none());
    assert_eq!(
        names(&registry.get("/v2/_catalog?last=a0").await),
        ["b", "c/d/e"]
    );
    registry
        .get("/v2/_catalog?n=x")
        .await
        .refused(400, "PAGINATION_NUMBER_INVALID");
}

#[tokio::test]
async fn only_what_the_caller_may_read() {
    let registry = Registry::users(|_| {}).await;
    let root = basic("root");
    for name in ["public/x", "secret/y", "shop/web"] {
        registry
            .image_as(name, "v1", "x", &[("Authorization", &root)])
            .await;
    }
    let list = async |user: &str, query: &str| {
        registry
            .call(
                &format!("GET /v2/_catalog{query}"),
                &[("Authorization", &basic(user))],
                b"",
            )
            .await
            .expect(200)
    };
    assert_eq!(
        names(&list("root", "").await),
        ["public/x", "secret/y", "shop/web"]
    );
    assert_eq!(names(&list("bob", "").await), ["public/x", "shop/web"]);
    let first = list("bob", "?n=1").await;
    assert_eq!(names(&first), ["public/x"]);
    assert!(first.next().is_some());
    let reply = registry
        .get("/v2/_catalog")
        .await
        .refused(401, "UNAUTHORIZED");
    assert!(
        reply
            .header("www-authenticate")
            .contains("scope=\"registry:catalog:*\"")
    );
}
