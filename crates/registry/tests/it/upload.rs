use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use crate::harness::{Registry, Reply, read_reply, request};

async fn patch(registry: &Registry, location: &str, range: Option<&str>, body: &[u8]) -> Reply {
    let mut headers = vec![("Content-Type", "application/octet-stream")];
    headers.extend(range.map(|range| ("Content-Range", range)));
    registry
        .call(&format!("PATCH {location}"), &headers, body)
        .await
}

async fn put(registry: &Registry, location: &str, content: &[u8], body: &[u8]) -> Reply {
    let digest = oci::Digest::sha256(content);
    registry
        .call(&format!("PUT {location}?digest={digest}"), &[], body)
        .await
}

async fn stored(registry: &Registry, location: &str, content: &[u8]) {
    assert_eq!(registry.get(location).await.expect(200).body, content);
}

#[tokio::test]
async fn one_post() {
    let registry = Registry::open().await;
    for algorithm in [oci::Algorithm::Sha256, oci::Algorithm::Sha512] {
        for content in [b"hello".to_vec(), vec![7; 100_000]] {
            let digest = oci::Digest::of(algorithm, &content);
            let line = format!("POST /v2/a/blobs/uploads/?digest={digest}");
            let reply = registry.call(&line, &[], &content).await.expect(201);
            assert_eq!(reply.header("location"), format!("/v2/a/blobs/{digest}"));
            assert_eq!(reply.header("docker-content-digest"), digest.to_string());
            stored(&registry, reply.header("location"), &content).await;
        }
    }
    let digest = oci::Digest::sha256(b"other");
    let line = format!("POST /v2/a/blobs/uploads/?digest={digest}");
    registry
        .call(&line, &[], b"hello!")
        .await
        .refused(400, "DIGEST_INVALID");
    registry
        .head(&format!("/v2/a/blobs/{digest}"))
        .await
        .expect(404);
    registry
        .call("POST /v2/a/blobs/uploads/?digest=sha256:1", &[], b"x")
        .await
        .refused(400, "DIGEST_INVALID");
}

#[tokio::test]
async fn post_and_put_for_both_algorithms() {
    let registry = Registry::open().await;
    for algorithm in [oci::Algorithm::Sha256, oci::Algorithm::Sha512] {
        for hint in ["", "?digest-algorithm=sha256", "?digest-algorithm=sha512"] {
            for size in [5, 50_000] {
                let content = vec![9; size];
                // sha512 also at the PUT after a POST that said nothing.
                let digest = oci::Digest::of(algorithm, &content);
                let start = registry
                    .call(&format!("POST /v2/a/blobs/uploads/{hint}"), &[], b"")
                    .await
                    .expect(202);
                assert!(
                    start.header("location").starts_with("/v2/a/blobs/uploads/"),
                    "relative"
                );
                let line = format!("PUT {}?digest={digest}", start.header("location"));
                let reply = registry.call(&line, &[], &content).await.expect(201);
                stored(&registry, reply.header("location"), &content).await;
                let start = registry
                    .call(&format!("POST /v2/a/blobs/uploads/{hint}"), &[], b"")
                    .await
                    .expect(202);
                patch(&registry, start.header("location"), None, &content)
                    .await
                    .expect(202);
                let line = format!("PUT {}?digest={digest}", start.header("location"));
                registry.call(&line, &[], b"").await.expect(201);
                registry.delete(reply.header("location")).await.expect(202);
            }
        }
    }
    for bad in ["md5", "SHA256", "sha384", ""] {
        let line = format!("POST /v2/a/blobs/uploads/?digest-algorithm={bad}");
        registry
            .call(&line, &[], b"")
            .await
            .refused(400, "DIGEST_INVALID");
    }
}

#[tokio::test]
async fn chunks() {
    let registry = Registry::open().await;
    let content: Vec<u8> = (0..=255).cycle().take(90_000).collect();
    let location = registry.start("a").await;
    let reply = patch(&registry, &location, Some("0-29999"), &content[..30_000])
        .await
        .expect(202);
    assert_eq!(reply.header("range"), "0-29999");
    let location = reply.header("location").to_owned();
    let reply = patch(
        &registry,
        &location,
        Some("30000-59999"),
        &content[30_000..60_000],
    )
    .await
    .expect(202);
    assert_eq!(reply.header("range"), "0-59999");
    let status = registry.get(&location).await.expect(204);
    assert_eq!(status.header("range"), "0-59999");
    assert_eq!(status.header("location"), location);
    // The last chunk comes with the PUT.
    let digest = oci::Digest::sha256(&content);
    let line = format!("PUT {location}?digest={digest}");
    let reply = registry
        .call(
            &line,
            &[("Content-Range", "60000-89999")],
            &content[60_000..],
        )
        .await
        .expect(201);
    stored(&registry, reply.header("location"), &content).await;
    registry
        .get(&location)
        .await
        .refused(404, "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn chunks_out_of_order_are_416_and_change_nothing() {
    let registry = Registry::open().await;
    let location = registry.start("a").await;
    patch(&registry, &location, Some("5-9"), b"56789")
        .await
        .refused(416, "BLOB_UPLOAD_INVALID");
    patch(&registry, &location, Some("0-4"), b"01234")
        .await
        .expect(202);
    for range in ["0-4", "6-9", "4-8", "9-5", "99999-99999"] {
        let reply = patch(&registry, &location, Some(range), b"56789")
            .await
            .refused(416, "BLOB_UPLOAD_INVALID");
        assert_eq!(reply.header("range"), "0-4");
        assert_eq!(reply.header("location"), location);
        assert_eq!(
            registry.get(&location).await.expect(204).header("range"),
            "0-4"
        );
    }
    let digest = oci::Digest::sha256(b"0123456789");
    let line = format!("PUT {location}?digest={digest}");
    registry
        .call(&line, &[("Content-Range", "6-10")], b"56789")
        .await
        .refused(416, "BLOB_UPLOAD_INVALID");
    registry
        .call(&line, &[("Content-Range", "nonsense")], b"56789")
        .await
        .refused(400, "BLOB_UPLOAD_INVALID");
    registry
        .call(&line, &[("Content-Range", "5-11")], b"56789")
        .await
        .refused(400, "BLOB_UPLOAD_INVALID");
    registry
        .call(&line, &[("Content-Range", "5-9")], b"56789")
        .await
        .expect(201);
}

#[tokio::test]
async fn a_stream_without_ranges() {
    let registry = Registry::open().await;
    let location = registry.start("a").await;
    let chunked = format!(
        "PATCH {location} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    );
    assert_eq!(
        registry.raw(chunked).await.expect(202).header("range"),
        "0-10"
    );
    let reply = put(&registry, &location, b"hello world", b"")
        .await
        .expect(201);
    stored(&registry, reply.header("location"), b"hello world").await;
}

#[tokio::test]
async fn bad_digests() {
    let registry = Registry::open().await;
    for (query, body) in [
        (String::new(), &b"hello"[..]),
        ("?digest=".to_owned(), b"hello"),
        ("?digest=sha256:baddigeststring".to_owned(), b"hello"),
        (
            "?digest=md5:5d41402abc4b2a76b9719d911017c592".to_owned(),
            b"hello",
        ),
        (
            format!("?digest={}", oci::Digest::sha256(b"other")),
            b"hello",
        ),
    ] {
        let location = registry.start("a").await;
        registry
            .call(&format!("PUT {location}{query}"), &[], body)
            .await
            .refused(400, "DIGEST_INVALID");
    }
    registry
        .head(&format!("/v2/a/blobs/{}", oci::Digest::sha256(b"other")))
        .await
        .expect(404);
}

#[tokio::test]
async fn cancelling() {
    let registry = Registry::open().await;
    let location = registry.start("a").await;
    patch(&registry, &location, None, b"hello")
        .await
        .expect(202);
    registry.delete(&location).await.expect(204);
    for reply in [
        registry.get(&location).await,
        registry.delete(&location).await,
        patch(&registry, &location, None, b"x").await,
        put(&registry, &location, b"hello", b"").await,
    ] {
        reply.refused(404, "BLOB_UPLOAD_UNKNOWN");
    }
    let elsewhere = registry.start("b").await.replace("/v2/b/", "/v2/a/");
    registry
        .get(&elsewhere)
        .await
        .refused(404, "BLOB_UPLOAD_UNKNOWN");
    registry
        .get("/v2/a/blobs/uploads/..%2f..")
        .await
        .expect(404);
    registry
        .get("/v2/a/blobs/uploads/nonsense")
        .await
        .refused(404, "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn mounting() {
    let registry = Registry::open().await;
    let digest = registry.blob("a/source", b"mount me").await;
    let reply = registry
        .call(
            &format!("POST /v2/b/blobs/uploads/?mount={digest}&from=a/source"),
            &[],
            b"",
        )
        .await
        .expect(201);
    assert_eq!(reply.header("location"), format!("/v2/b/blobs/{digest}"));
    stored(&registry, reply.header("location"), b"mount me").await;
    let reply = registry
        .call(
            &format!("POST /v2/c/blobs/uploads/?mount={digest}"),
            &[],
            b"",
        )
        .await
        .expect(201);
    stored(&registry, reply.header("location"), b"mount me").await;
    let missing = oci::Digest::sha256(b"nowhere");
    for query in [
        format!("mount={missing}&from=a/source"),
        format!("mount={missing}"),
        format!("mount={digest}&from=not/there"),
    ] {
        let reply = registry
            .call(&format!("POST /v2/d/blobs/uploads/?{query}"), &[], b"")
            .await
            .expect(202);
        put(&registry, reply.header("location"), b"nowhere", b"nowhere")
            .await
            .expect(201);
        registry
            .delete(&format!("/v2/d/blobs/{missing}"))
            .await
            .expect(202);
    }
    registry
        .call("POST /v2/d/blobs/uploads/?mount=sha256:1", &[], b"")
        .await
        .refused(400, "DIGEST_INVALID");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_recorded() {
    let registry = Registry::open().await;
    let location = registry.start("a").await;
    let content: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let mut bytes = request(
        &format!("PATCH {location}"),
        &[("Content-Length", "100000")],
        b"",
    );
    bytes.extend_from_slice(&content[..37_000]);
    let mut stream = registry.connect().await;
    stream.write_all(&bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    // The server closes once it has recorded what came.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    let offset = loop {
        let reply = registry
            .call(
                &format!("PATCH {location}"),
                &[("Content-Range", "99999-99999")],
                b"x",
            )
            .await
            .expect(416);
        // While the broken writer still records, the answer is the same with `Retry-After`.
        if reply.header("retry-after").is_empty() {
            break reply.header("range").to_owned();
        }
    };
    assert_eq!(offset, "0-36999");
    let reply = patch(
        &registry,
        &location,
        Some("37000-99999"),
        &content[37_000..],
    )
    .await
    .expect(202);
    assert_eq!(reply.header("range"), "0-99999");
    let reply = put(&registry, &location, &content, b"").await.expect(201);
    stored(&registry, reply.header("location"), &content).await;
}

#[tokio::test]
async fn a_second_writer_is_refused_with_the_true_offset() {
    let registry = Registry::open().await;
    let location = registry.start("a").await;
    patch(&registry, &location, Some("0-4"), b"01234")
        .await
        .expect(202);
    // The first writer has sent its head and waits for 100: from then on it holds the claim.
    let head = request(
        &format!("PATCH {location}"),
        &[
            ("Content-Range", "5-9"),
            ("Content-Length", "5"),
            ("Expect", "100-continue"),
        ],
        b"",
    );
    let mut first = BufReader::new(registry.connect().await);
    first.get_mut().write_all(&head).await.unwrap();
    let mut go = [0; 25];
    first.read_exact(&mut go).await.unwrap();
    assert_eq!(&go[..], b"HTTP/1.1 100 Continue\r\n\r\n");
    for reply in [
        patch(&registry, &location, Some("5-9"), b"XXXXX").await,
        put(&registry, &location, b"01234", b"").await,
    ] {
        let reply = reply.refused(416, "BLOB_UPLOAD_INVALID");
        assert_eq!(reply.header("range"), "0-4");
        assert_eq!(reply.header("retry-after"), "1");
        assert_eq!(reply.header("location"), location);
    }
    registry.delete(&location).await.expect(416);
    first.get_mut().write_all(b"56789").await.unwrap();
    read_reply(&mut first, false).await.expect(202);
    let reply = put(&registry, &location, b"0123456789", b"")
        .await
        .expect(201);
    stored(&registry, reply.header("location"), b"0123456789").await;
}

#[tokio::test]
async fn a_writer_that_stalls_loses_its_claim() {
    let registry = Registry::set(|settings| {
        settings.limits.body_timeout = std::time::Duration::from_millis(50);
    })
    .await;
    let location = registry.start("a").await;
    let mut bytes = request(
        &format!("PATCH {location}"),
        &[("Content-Length", "10")],
        b"",
    );
    bytes.extend_from_slice(b"01234");
    let reply = registry.raw(bytes).await.refused(408, "UNKNOWN");
    assert_eq!(reply.header("range"), "0-4");
    patch(&registry, &location, Some("5-9"), b"56789")
        .await
        .expect(202);
    put(&registry, &location, b"0123456789", b"")
        .await
        .expect(201);
}

#[tokio::test]
async fn many_writers_at_one_offset_one_wins() {
    let registry = std::sync::Arc::new(Registry::open().await);
    for round in 0..20u8 {
        let location = registry.start("a").await;
        let tasks: Vec<_> = (0..4u8)
            .map(|n| {
                let (registry, location) = (std::sync::Arc::clone(&registry), location.clone());
                tokio::spawn(async move {
                    (
                        n,
                        patch(
                            &registry,
                            &location,
                            Some("0-19999"),
                            &vec![n ^ round; 20_000],
                        )
                        .await,
                    )
                })
            })
            .collect();
        let mut winners = Vec::new();
        for task in tasks {
            let (n, reply) = task.await.unwrap();
            match reply.status {
                202 => winners.push(n),
                416 => {}
                other => panic!("{other}"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        put(&registry, &location, &vec![winners[0] ^ round; 20_000], b"")
            .await
            .expect(201);
    }
}
