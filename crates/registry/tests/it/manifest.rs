use crate::harness::{EMPTY, INDEX, MANIFEST, Registry, image};

fn sha256(content: &str) -> String {
    oci::Digest::sha256(content.as_bytes()).to_string()
}

#[tokio::test]
async fn by_tag_and_by_digest() {
    let registry = Registry::open().await;
    registry.blob("a/b", b"{}").await;
    let body = image("x");
    let digest = sha256(&body);
    for reference in ["v1", digest.as_str()] {
        let reply = registry
            .call(
                &format!("PUT /v2/a/b/manifests/{reference}"),
                &[("Content-Type", MANIFEST)],
                body.as_bytes(),
            )
            .await
            .expect(201);
        assert_eq!(
            reply.header("location"),
            format!("/v2/a/b/manifests/{digest}")
        );
        assert_eq!(reply.header("docker-content-digest"), digest);
        assert_eq!(reply.header("oci-subject"), "");
        // Visible at once, and where `Location` says.
        for path in [
            format!("/v2/a/b/manifests/{reference}"),
            reply.header("location").to_owned(),
        ] {
            let get = registry.get(&path).await.expect(200);
            assert_eq!(get.text(), body);
            for reply in [get, registry.head(&path).await.expect(200)] {
                assert_eq!(reply.header("content-type"), MANIFEST);
                assert_eq!(reply.header("content-length"), body.len().to_string());
                assert_eq!(reply.header("docker-content-digest"), digest);
                assert_eq!(reply.header("etag"), format!("\"{digest}\""));
                let cache = reply.header("cache-control");
                assert_eq!(
                    cache.contains("immutable"),
                    path.contains("sha256:"),
                    "{cache}"
                );
                assert_eq!(cache == "no-cache", !path.contains("sha256:"), "{cache}");
            }
            let line = format!("GET {path}");
            registry
                .call(&line, &[("If-None-Match", &format!("\"{digest}\""))], b"")
                .await
                .expect(304);
        }
    }
}

#[tokio::test]
async fn sha512_manifests() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let body = image("x");
    let digest = oci::Digest::of(oci::Algorithm::Sha512, body.as_bytes());
    let path = format!("/v2/a/manifests/{digest}");
    let line = format!("PUT {path}?tag=five&tag=twelve");
    let reply = registry
        .call(&line, &[("Content-Type", MANIFEST)], body.as_bytes())
        .await
        .expect(201);
    assert_eq!(reply.all("oci-tag"), ["five", "twelve"]);
    assert_eq!(registry.get(&path).await.expect(200).text(), body);
    assert_eq!(
        registry
            .get("/v2/a/manifests/twelve")
            .await
            .header("docker-content-digest"),
        digest.to_string()
    );
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{digest}","size":{}}}]}}"#,
        body.len()
    );
    registry
        .call(
            "PUT /v2/a/manifests/index",
            &[("Content-Type", INDEX)],
            index.as_bytes(),
        )
        .await
        .expect(201);
}

#[tokio::test]
async fn unknown_and_bad_references() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    registry
        .get("/v2/a/manifests/none")
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    registry.head("/v2/a/manifests/none").await.expect(404);
    let digest = sha256("none");
    registry
        .get(&format!("/v2/a/manifests/{digest}"))
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    registry
        .head(&format!("/v2/a/manifests/{digest}"))
        .await
        .expect(404);
    let body = image("x");
    for (reference, code) in [
        ("sha256:baddigeststring", "DIGEST_INVALID"),
        (".tag", "TAG_INVALID"),
        (&"t".repeat(129), "TAG_INVALID"),
        (&digest, "DIGEST_INVALID"),
    ] {
        let line = format!("PUT /v2/a/manifests/{reference}");
        registry
            .call(&line, &[("Content-Type", MANIFEST)], body.as_bytes())
            .await
            .refused(400, code);
    }
    registry
        .get("/v2/a/manifests/sha256:baddigeststring")
        .await
        .refused(400, "DIGEST_INVALID");
    registry
        .get("/v2/A/manifests/x")
        .await
        .refused(400, "NAME_INVALID");
}

#[tokio::test]
async fn what_is_not_a_manifest() {
    let registry = Registry::open().await;
    for (body, kind) in [
        ("", MANIFEST),
        ("{", MANIFEST),
        ("[]", MANIFEST),
        (r#"{"schemaVersion":1}"#, MANIFEST),
        (r#"{"schemaVersion":2}"#, MANIFEST),
        (&image("x"), INDEX),
    ] {
        registry
            .call(
                "PUT /v2/a/manifests/v1",
                &[("Content-Type", kind)],
                body.as_bytes(),
            )
            .await
            .refused(400, "MANIFEST_INVALID");
    }
    registry.get("/v2/a/manifests/v1").await.expect(404);
}

#[tokio::test]
async fn exact_bytes_and_unknown_types_are_kept() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    let odd = format!(
        "{{ \"schemaVersion\": 2,\n \"mediaType\": \"{MANIFEST}\", \"x-unknown\": [1.50, null],\n \"config\": {{\"mediaType\":\"application/x-odd\",\"digest\":\"{EMPTY}\",\"size\":2}}, \"layers\": [{{\"mediaType\":\"text/x-never-seen\",\"digest\":\"{EMPTY}\",\"size\":2,\"data\":\"e30=\"}}] }}\n"
    );
    let schema2 = odd.replace(MANIFEST, docker);
    for (tag, kind, body) in [("odd", MANIFEST, odd), ("docker", docker, schema2)] {
        registry
            .call(
                &format!("PUT /v2/a/manifests/{tag}"),
                &[("Content-Type", kind)],
                body.as_bytes(),
            )
            .await
            .expect(201);
        let reply = registry
            .get(&format!("/v2/a/manifests/{tag}"))
            .await
            .expect(200);
        assert_eq!(reply.text(), body);
        assert_eq!(reply.header("content-type"), kind);
    }
    let list = "application/vnd.docker.distribution.manifest.list.v2+json";
    let child = registry
        .get("/v2/a/manifests/docker")
        .await
        .header("docker-content-digest")
        .to_owned();
    let body = format!(
        r#"{{"schemaVersion":2,"mediaType":"{list}","manifests":[{{"mediaType":"{docker}","digest":"{child}","size":1}}]}}"#
    );
    registry
        .call(
            "PUT /v2/a/manifests/list",
            &[("Content-Type", list)],
            body.as_bytes(),
        )
        .await
        .expect(201);
    assert_eq!(
        registry
            .get("/v2/a/manifests/list")
            .await
            .header("content-type"),
        list
    );
}

#[tokio::test]
async fn missing_references_are_refused_by_name() {
    let registry = Registry::open().await;
    let body = image("x");
    let reply = registry
        .call(
            "PUT /v2/a/manifests/v1",
            &[("Content-Type", MANIFEST)],
            body.as_bytes(),
        )
        .await
        .refused(404, "MANIFEST_BLOB_UNKNOWN");
    assert!(reply.text().contains(EMPTY));
    registry.get("/v2/a/manifests/v1").await.expect(404);
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{}","size":2}}]}}"#,
        sha256("x")
    );
    registry
        .call(
            "PUT /v2/a/manifests/i",
            &[("Content-Type", INDEX)],
            index.as_bytes(),
        )
        .await
        .refused(404, "MANIFEST_BLOB_UNKNOWN");
    let sparse = Registry::sparse().await;
    sparse
        .call(
            "PUT /v2/a/manifests/v1",
            &[("Content-Type", MANIFEST)],
            body.as_bytes(),
        )
        .await
        .expect(201);
    sparse
        .call(
            "PUT /v2/a/manifests/i",
            &[("Content-Type", INDEX)],
            index.as_bytes(),
        )
        .await
        .expect(201);
}

#[tokio::test]
async fn foreign_layers_are_taken_with_a_warning() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let body = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{EMPTY}","size":2}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.nondistributable.v1.tar","digest":"{}","size":9,"urls":["https://example.com/x"]}}]}}"#,
        sha256("elsewhere")
    );
    let reply = registry
        .call(
            "PUT /v2/a/manifests/v1",
            &[("Content-Type", MANIFEST)],
            body.as_bytes(),
        )
        .await
        .expect(201);
    assert!(
        reply.header("warning").starts_with("299 - \""),
        "{:?}",
        reply.headers
    );
    assert!(reply.all("warning").join("").len() <= 4096);
}

#[tokio::test]
async fn indexes_nested_and_empty() {
    let registry = Registry::open().await;
    let child = registry.image("a", "child", "c").await;
    let mut inner = child;
    for level in 0..3 {
        let body = format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{inner}","size":2}}],"annotations":{{"level":"{level}"}}}}"#
        );
        registry
            .call(
                &format!("PUT /v2/a/manifests/level{level}"),
                &[("Content-Type", INDEX)],
                body.as_bytes(),
            )
            .await
            .expect(201);
        inner = sha256(&body);
    }
    let empty = format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[]}}"#);
    registry
        .call(
            "PUT /v2/a/manifests/empty",
            &[("Content-Type", INDEX)],
            empty.as_bytes(),
        )
        .await
        .expect(201);
    assert_eq!(
        registry
            .get("/v2/a/manifests/empty")
            .await
            .header("content-type"),
        INDEX
    );
}

#[tokio::test]
async fn tag_parameters() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let body = image("x");
    let digest = sha256(&body);
    let tags: Vec<String> = (0..10).map(|n| format!("v1.{n}")).collect();
    let query = tags
        .iter()
        .map(|tag| format!("tag={tag}"))
        .collect::<Vec<_>>()
        .join("&");
    let put = async |query: &str| {
        registry
            .call(
                &format!("PUT /v2/a/manifests/{digest}?{query}"),
                &[("Content-Type", MANIFEST)],
                body.as_bytes(),
            )
            .await
    };
    let reply = put(&query).await.expect(201);
    assert_eq!(reply.all("oci-tag"), tags);
    for tag in &tags {
        assert_eq!(
            registry
                .head(&format!("/v2/a/manifests/{tag}"))
                .await
                .expect(200)
                .header("docker-content-digest"),
            digest
        );
    }
    let many = (0..33)
        .map(|n| format!("tag=t{n}"))
        .collect::<Vec<_>>()
        .join("&");
    put(&many).await.refused(414, "TAG_INVALID");
    registry.get("/v2/a/manifests/t0").await.expect(404);
    put("tag=ok&tag=.bad").await.refused(400, "TAG_INVALID");
    registry.get("/v2/a/manifests/ok").await.expect(404);
}

#[tokio::test]
async fn preconditions_of_tags() {
    let registry = Registry::open().await;
    let one = registry.image("a", "v1", "one").await;
    let body = image("two");
    let two = sha256(&body);
    let put = async |headers: &[(&str, &str)]| {
        let mut all = vec![("Content-Type", MANIFEST)];
        all.extend_from_slice(headers);
        registry
            .call("PUT /v2/a/manifests/v1", &all, body.as_bytes())
            .await
    };
    let (tag_one, tag_two) = (format!("\"{one}\""), format!("\"{two}\""));
    assert_eq!(
        put(&[("If-None-Match", "*")])
            .await
            .refused(412, "PRECONDITION_FAILED")
            .header("etag"),
        tag_one
    );
    put(&[("If-Match", &tag_two)])
        .await
        .refused(412, "PRECONDITION_FAILED");
    put(&[("If-Match", &format!("W/{tag_one}"))])
        .await
        .refused(412, "PRECONDITION_FAILED");
    put(&[("If-None-Match", &tag_one)])
        .await
        .refused(400, "UNSUPPORTED");
    assert_eq!(
        registry.head("/v2/a/manifests/v1").await.header("etag"),
        tag_one
    );
    put(&[("If-Match", &tag_one)]).await.expect(201);
    assert_eq!(
        registry.head("/v2/a/manifests/v1").await.header("etag"),
        tag_two
    );
    put(&[("If-Match", "*")]).await.expect(201);
    let line = "PUT /v2/a/manifests/new";
    registry
        .call(
            line,
            &[("Content-Type", MANIFEST), ("If-Match", "*")],
            body.as_bytes(),
        )
        .await
        .refused(412, "PRECONDITION_FAILED");
    registry
        .call(
            line,
            &[("Content-Type", MANIFEST), ("If-None-Match", "*")],
            body.as_bytes(),
        )
        .await
        .expect(201);
    let line = "DELETE /v2/a/manifests/new";
    registry
        .call(line, &[("If-Match", &tag_one)], b"")
        .await
        .refused(412, "PRECONDITION_FAILED");
    registry
        .call(line, &[("If-Match", &tag_two)], b"")
        .await
        .expect(202);
}

#[tokio::test]
async fn concurrent_compare_and_set_has_one_winner() {
    let registry = std::sync::Arc::new(Registry::open().await);
    let first = registry.image("a", "v1", "first").await;
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let (registry, first) = (std::sync::Arc::clone(&registry), first.clone());
            tokio::spawn(async move {
                let body = image(&format!("n{n}"));
                let headers = [
                    ("Content-Type", MANIFEST),
                    ("If-Match", &format!("\"{first}\"")),
                ];
                registry
                    .call("PUT /v2/a/manifests/v1", &headers, body.as_bytes())
                    .await
                    .status
            })
        })
        .collect();
    let mut statuses = Vec::new();
    for task in tasks {
        statuses.push(task.await.unwrap());
    }
    statuses.sort_unstable();
    assert_eq!(statuses[0], 201);
    assert!(
        statuses[1..].iter().all(|status| *status == 412),
        "{statuses:?}"
    );
}

#[tokio::test]
async fn concurrent_pushes_of_distinct_tags_are_all_there() {
    let registry = std::sync::Arc::new(Registry::open().await);
    registry.blob("a", b"{}").await;
    let tasks: Vec<_> = (0..32)
        .map(|n| {
            let registry = std::sync::Arc::clone(&registry);
            tokio::spawn(async move {
                let body = image(&format!("{n}"));
                registry
                    .call(
                        &format!("PUT /v2/a/manifests/t{n:02}"),
                        &[("Content-Type", MANIFEST)],
                        body.as_bytes(),
                    )
                    .await
                    .expect(201);
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let tags = registry.get("/v2/a/tags/list").await.json()["tags"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(tags, 32);
}

#[tokio::test]
async fn deleting() {
    let registry = Registry::open().await;
    let digest = registry.image("a", "v1", "x").await;
    registry.image("a", "v2", "x").await;
    registry.delete("/v2/a/manifests/v1").await.expect(202);
    registry.head("/v2/a/manifests/v1").await.expect(404);
    registry
        .delete("/v2/a/manifests/v1")
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    // Deleting a tag leaves the manifest; deleting the manifest takes its tags.
    registry
        .head(&format!("/v2/a/manifests/{digest}"))
        .await
        .expect(200);
    registry
        .delete(&format!("/v2/a/manifests/{digest}"))
        .await
        .expect(202);
    registry
        .head(&format!("/v2/a/manifests/{digest}"))
        .await
        .expect(404);
    registry.head("/v2/a/manifests/v2").await.expect(404);
    registry
        .delete(&format!("/v2/a/manifests/{digest}"))
        .await
        .refused(404, "MANIFEST_UNKNOWN");
    registry
        .delete(&format!("/v2/a/blobs/{EMPTY}"))
        .await
        .expect(202);
}

#[tokio::test]
async fn a_child_of_an_index_is_not_deleted() {
    let registry = Registry::open().await;
    let child = registry.image("a", "child", "x").await;
    let body = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{child}","size":2}}]}}"#
    );
    registry
        .call(
            "PUT /v2/a/manifests/index",
            &[("Content-Type", INDEX)],
            body.as_bytes(),
        )
        .await
        .expect(201);
    registry
        .delete(&format!("/v2/a/manifests/{child}"))
        .await
        .refused(409, "DENIED");
    registry
        .delete(&format!("/v2/a/manifests/{}", sha256(&body)))
        .await
        .expect(202);
    registry
        .delete(&format!("/v2/a/manifests/{child}"))
        .await
        .expect(202);
}
