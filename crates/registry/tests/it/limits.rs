use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};

use crate::harness::{MANIFEST, Registry, image, read_head, read_reply, request};

#[tokio::test]
async fn a_manifest_of_4_mib_is_taken_and_one_byte_more_is_413() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let empty = image("").len();
    let limit = 4 * 1024 * 1024;
    let fits = image(&"x".repeat(limit - empty));
    assert_eq!(fits.len(), limit);
    registry
        .call(
            "PUT /v2/a/manifests/fits",
            &[("Content-Type", MANIFEST)],
            fits.as_bytes(),
        )
        .await
        .expect(201);
    assert_eq!(registry.get("/v2/a/manifests/fits").await.text(), fits);
    let over = image(&"x".repeat(limit - empty + 1));
    registry
        .call(
            "PUT /v2/a/manifests/over",
            &[("Content-Type", MANIFEST)],
            over.as_bytes(),
        )
        .await
        .refused(413, "SIZE_INVALID");
    // Without an announced length too.
    let mut chunked = request(
        "PUT /v2/a/manifests/over",
        &[("Content-Type", MANIFEST), ("Transfer-Encoding", "chunked")],
        b"",
    );
    chunked.extend_from_slice(format!("{:x}\r\n", over.len()).as_bytes());
    chunked.extend_from_slice(over.as_bytes());
    chunked.extend_from_slice(b"\r\n0\r\n\r\n");
    registry.raw(chunked).await.refused(413, "SIZE_INVALID");
    registry.get("/v2/a/manifests/over").await.expect(404);
}

#[tokio::test]
async fn the_limit_is_a_setting() {
    let registry = Registry::set(|settings| settings.limits.manifest_bytes = 5 * 1024 * 1024).await;
    registry.blob("a", b"{}").await;
    let body = image(&"x".repeat(4 * 1024 * 1024 + 1));
    registry
        .call(
            "PUT /v2/a/manifests/v1",
            &[("Content-Type", MANIFEST)],
            body.as_bytes(),
        )
        .await
        .expect(201);
}

#[tokio::test]
async fn a_truncated_manifest_is_not_stored() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let body = image("x");
    let length = (body.len() + 10).to_string();
    let mut stream = registry.connect().await;
    let bytes = request(
        "PUT /v2/a/manifests/v1",
        &[("Content-Type", MANIFEST), ("Content-Length", &length)],
        body.as_bytes(),
    );
    stream.write_all(&bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    registry.get("/v2/a/manifests/v1").await.expect(404);
}

#[tokio::test]
async fn a_slow_head_is_cut() {
    let registry =
        Registry::set(|settings| settings.limits.header_timeout = Duration::from_millis(50)).await;
    let mut stream = registry.connect().await;
    stream
        .write_all(b"GET /v2/ HTTP/1.1\r\nHost: loc")
        .await
        .unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(
        rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"),
        "{}",
        String::from_utf8_lossy(&rest)
    );
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let registry = Registry::set(|settings| settings.limits.connections = 1).await;
    let mut first = BufReader::new(registry.connect().await);
    first
        .get_mut()
        .write_all(&request("GET /healthz", &[], b""))
        .await
        .unwrap();
    read_reply(&mut first, false).await.expect(200);
    let mut second = BufReader::new(registry.connect().await);
    second
        .get_mut()
        .write_all(&request("GET /healthz", &[], b""))
        .await
        .unwrap();
    // The first is still served on its connection; the second only after it is gone.
    first
        .get_mut()
        .write_all(&request("GET /metrics", &[], b""))
        .await
        .unwrap();
    let metrics = read_reply(&mut first, false).await.expect(200).text();
    assert!(metrics.contains("longshore_connections 1"), "{metrics}");
    drop(first);
    read_reply(&mut second, false).await.expect(200);
}

#[tokio::test]
async fn drain_lets_open_requests_finish() {
    let mut registry = Registry::open().await;
    let location = registry.start("a").await;
    let digest = oci::Digest::sha256(b"0123456789");
    let head = request(
        &format!("PUT {location}?digest={digest}"),
        &[("Content-Length", "10"), ("Expect", "100-continue")],
        b"",
    );
    let mut stream = BufReader::new(registry.connect().await);
    stream.get_mut().write_all(&head).await.unwrap();
    let mut go = [0; 25];
    stream.read_exact(&mut go).await.unwrap();
    registry.stop();
    stream.get_mut().write_all(b"0123456789").await.unwrap();
    let reply = read_reply(&mut stream, false).await.expect(201);
    assert_eq!(reply.header("connection"), "close");
    (&mut registry.task).await.unwrap().unwrap();
    assert!(
        tokio::net::TcpStream::connect(registry.address)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn drain_is_bounded() {
    let mut registry = Registry::set(|settings| settings.drain = Duration::from_millis(50)).await;
    let location = registry.start("a").await;
    let head = request(
        &format!("PATCH {location}"),
        &[("Content-Length", "10"), ("Expect", "100-continue")],
        b"",
    );
    let mut stream = BufReader::new(registry.connect().await);
    stream.get_mut().write_all(&head).await.unwrap();
    let mut go = [0; 25];
    stream.read_exact(&mut go).await.unwrap();
    registry.stop();
    (&mut registry.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn health_metrics_and_ids() {
    let registry = Registry::open().await;
    registry.get("/healthz").await.expect(200);
    registry.get("/readyz").await.expect(200);
    registry.image("shop/web", "v1", "x").await;
    let metrics = registry.get("/metrics").await.expect(200);
    assert!(
        metrics
            .header("content-type")
            .starts_with("application/openmetrics-text")
    );
    for line in [
        "longshore_stored{kind=\"tags\"} 1",
        "route=\"manifest\"",
        "longshore_http_request_duration_seconds_count",
    ] {
        assert!(metrics.text().contains(line), "{line}: {}", metrics.text());
    }
    assert!(!metrics.text().contains("shop/web"));
    registry
        .call("POST /healthz", &[], b"")
        .await
        .refused(405, "UNSUPPORTED");
    let reply = registry
        .call("GET /v2/", &[("X-Request-Id", "abc-12345")], b"")
        .await;
    assert_eq!(reply.header("x-request-id"), "abc-12345");
    let reply = registry
        .call("GET /v2/", &[("X-Request-Id", "no good; id")], b"")
        .await;
    assert_eq!(reply.header("x-request-id").len(), 16);
}

#[tokio::test]
async fn one_connection_serves_many_requests_also_after_a_refusal() {
    let registry = Registry::open().await;
    let mut stream = BufReader::new(registry.connect().await);
    let large = vec![7; 300_000];
    for (line, body, status) in [
        ("GET /v2/", &b""[..], 200),
        ("PUT /v2/a/blobs/uploads/none?digest=sha256:1", &large, 400),
        ("PATCH /v2/a/blobs/uploads/none", &large, 404),
        ("GET /v2/_catalog", b"", 200),
    ] {
        stream
            .get_mut()
            .write_all(&request(line, &[], body))
            .await
            .unwrap();
        let reply = read_reply(&mut stream, false).await;
        assert_eq!(reply.status, status, "{line}");
    }
    stream
        .get_mut()
        .write_all(b"NONSENSE\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(read_head(&mut stream).await.status, 400);
}
