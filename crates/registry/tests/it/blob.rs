use crate::harness::Registry;

async fn five_thousand(registry: &Registry) -> (String, Vec<u8>) {
    // Above the size that is kept in a row, so that a file is served; the small cases are below.
    let content: Vec<u8> = (0..50_000u16).flat_map(u16::to_be_bytes).collect();
    let digest = registry.blob("a/b", &content).await;
    (format!("/v2/a/b/blobs/{digest}"), content)
}

#[tokio::test]
async fn missing_is_404_and_a_bad_digest_400() {
    let registry = Registry::open().await;
    let digest = oci::Digest::sha256(b"missing");
    registry
        .get(&format!("/v2/a/blobs/{digest}"))
        .await
        .refused(404, "BLOB_UNKNOWN");
    registry
        .head(&format!("/v2/a/blobs/{digest}"))
        .await
        .expect(404);
    let sha512 = oci::Digest::of(oci::Algorithm::Sha512, b"missing");
    registry
        .get(&format!("/v2/a/blobs/{sha512}"))
        .await
        .refused(404, "BLOB_UNKNOWN");
    for bad in [
        "sha256:abc",
        "sha256:baddigeststring",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "x",
    ] {
        registry
            .get(&format!("/v2/a/blobs/{bad}"))
            .await
            .refused(400, "DIGEST_INVALID");
    }
    registry
        .get("/v2/A/blobs/x")
        .await
        .refused(400, "NAME_INVALID");
}

#[tokio::test]
async fn get_and_head_describe_the_blob() {
    let registry = Registry::open().await;
    let (path, content) = five_thousand(&registry).await;
    for reply in [
        registry.get(&path).await.expect(200),
        registry.head(&path).await.expect(200),
    ] {
        assert_eq!(reply.header("content-length"), content.len().to_string());
        assert_eq!(
            reply.header("docker-content-digest"),
            path.rsplit('/').next().unwrap()
        );
        assert_eq!(reply.header("content-type"), "application/octet-stream");
        assert_eq!(reply.header("accept-ranges"), "bytes");
        assert!(reply.header("cache-control").contains("immutable"));
        assert_eq!(
            reply.header("docker-distribution-api-version"),
            "registry/2.0"
        );
        assert!(!reply.header("x-request-id").is_empty());
    }
    assert_eq!(registry.get(&path).await.body, content);
}

#[tokio::test]
async fn not_modified() {
    let registry = Registry::open().await;
    let (path, _) = five_thousand(&registry).await;
    let tag = registry.head(&path).await.header("etag").to_owned();
    assert!(tag.starts_with("\"sha256:"));
    for method in ["GET", "HEAD"] {
        let line = format!("{method} {path}");
        let reply = registry
            .call(&line, &[("If-None-Match", &tag)], b"")
            .await
            .expect(304);
        assert_eq!(reply.header("etag"), tag);
        registry
            .call(&line, &[("If-None-Match", &format!("\"x\", W/{tag}"))], b"")
            .await
            .expect(304);
        registry
            .call(&line, &[("If-None-Match", "\"other\"")], b"")
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn ranges() {
    let registry = Registry::open().await;
    let (large, content) = five_thousand(&registry).await;
    let small: Vec<u8> = content[..3000].to_vec();
    let digest = registry.blob("a/b", &small).await;
    for (path, content) in [(large, content), (format!("/v2/a/b/blobs/{digest}"), small)] {
        let size = content.len();
        for (range, from, to) in [
            ("bytes=500-1499", 500, 1500),
            ("bytes=500-", 500, size),
            ("bytes=-500", size - 500, size),
            ("bytes=0-0", 0, 1),
            ("bytes=-999999999", 0, size),
        ] {
            let reply = registry
                .call(&format!("GET {path}"), &[("Range", range)], b"")
                .await
                .expect(206);
            assert_eq!(reply.body, &content[from..to], "{range}");
            assert_eq!(
                reply.header("content-range"),
                format!("bytes {from}-{}/{size}", to - 1)
            );
            assert_eq!(reply.header("content-length"), (to - from).to_string());
        }
        let clamped = format!("bytes=2000-{}", size + 5000);
        let reply = registry
            .call(&format!("GET {path}"), &[("Range", &clamped)], b"")
            .await
            .expect(206);
        assert_eq!(reply.body, &content[2000..]);
        for range in [
            "bytes=500-0",
            &format!("bytes={size}-"),
            &format!("bytes={}-{}", size + 1, size + 9),
            "bytes=-0",
        ] {
            let reply = registry
                .call(&format!("GET {path}"), &[("Range", range)], b"")
                .await
                .expect(416);
            assert_eq!(
                reply.header("content-range"),
                format!("bytes */{size}"),
                "{range}"
            );
            assert_eq!(reply.code(), "SIZE_INVALID");
        }
        for range in ["bytes=0-1,5-6", "lines=1-2", "bytes=x-y"] {
            let reply = registry
                .call(&format!("GET {path}"), &[("Range", range)], b"")
                .await
                .expect(200);
            assert_eq!(reply.body, content, "{range}");
        }
        let stale = [("Range", "bytes=0-9"), ("If-Range", "\"other\"")];
        registry
            .call(&format!("GET {path}"), &stale, b"")
            .await
            .expect(200);
    }
}

#[tokio::test]
async fn the_empty_blob_and_the_empty_object() {
    let registry = Registry::open().await;
    for content in [&b""[..], b"{}"] {
        let digest = registry.blob("a", content).await;
        let path = format!("/v2/a/blobs/{digest}");
        assert_eq!(registry.get(&path).await.expect(200).body, content);
        assert_eq!(
            registry
                .head(&path)
                .await
                .expect(200)
                .header("content-length"),
            content.len().to_string()
        );
    }
    let digest = oci::Digest::sha256(b"");
    registry
        .call(
            &format!("GET /v2/a/blobs/{digest}"),
            &[("Range", "bytes=0-")],
            b"",
        )
        .await
        .expect(416);
}

#[tokio::test]
async fn deleting_is_seen_at_once() {
    let registry = Registry::open().await;
    let digest = registry.blob("a", b"content").await;
    let path = format!("/v2/a/blobs/{digest}");
    registry.delete(&path).await.expect(202);
    registry.head(&path).await.expect(404);
    registry.get(&path).await.refused(404, "BLOB_UNKNOWN");
    registry.delete(&path).await.refused(404, "BLOB_UNKNOWN");
    registry.blob("a", b"content").await;
    registry.head(&path).await.expect(200);
    // A blob belongs to its repository.
    registry
        .head(&format!("/v2/b/blobs/{digest}"))
        .await
        .expect(404);
}

#[tokio::test]
async fn a_blob_of_a_manifest_is_not_deleted() {
    let registry = Registry::open().await;
    registry.image("a", "v1", "").await;
    let path = format!("/v2/a/blobs/{}", crate::harness::EMPTY);
    registry.delete(&path).await.refused(409, "DENIED");
    registry.head(&path).await.expect(200);
}

#[tokio::test]
async fn other_methods_are_named() {
    let registry = Registry::open().await;
    let digest = oci::Digest::sha256(b"");
    for (line, allow) in [
        (format!("POST /v2/a/blobs/{digest}"), "GET, HEAD, DELETE"),
        ("GET /v2/a/blobs/uploads/".to_owned(), "POST"),
        (
            "POST /v2/a/manifests/x".to_owned(),
            "GET, HEAD, PUT, DELETE",
        ),
        (
            "POST /v2/a/blobs/uploads/x".to_owned(),
            "GET, HEAD, PATCH, PUT, DELETE",
        ),
        ("PUT /v2/a/tags/list".to_owned(), "GET, HEAD"),
        ("DELETE /v2/".to_owned(), "GET, HEAD"),
    ] {
        let reply = registry
            .call(&line, &[], b"")
            .await
            .refused(405, "UNSUPPORTED");
        assert_eq!(reply.header("allow"), allow, "{line}");
    }
    for path in [
        "/v2/a",
        "/v2/a/b/c",
        "/v3/",
        "/v2/a%2Fb/tags/list",
        "/favicon.ico",
        "/api/v1/x",
    ] {
        registry.get(path).await.refused(404, "UNSUPPORTED");
    }
}
