//! What is answered before the store is open, and while its database is away.

use std::net::{Ipv4Addr, SocketAddr};

use registry::{Access, Early, Reason, Settings};
use store::Options;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::harness::{Registry, Reply, read_reply, request};
use crate::place::Place;

async fn call(address: SocketAddr, line: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&request(line, &[], body)).await.unwrap();
    read_reply(&mut BufReader::new(stream), line.starts_with("HEAD")).await
}

#[tokio::test]
async fn health_is_told_while_the_store_is_being_opened() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let settings = Settings {
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
        access: Access::Open,
        ..Settings::default()
    };
    let early = Early::bind(settings).await.unwrap();
    let address = early.local_addresses()[0];
    let reason = Reason::default();
    let store = early
        .answer_while(&reason, async {
            reason.set("the database is not available");
            call(address, "GET /healthz", b"").await.expect(200);
            let ready = call(address, "GET /readyz", b"").await.expect(503);
            assert_eq!(ready.text(), "starting: the database is not available\n");
            let pushed = call(address, "PUT /v2/a/manifests/v1", &[b'x'; 200_000])
                .await
                .refused(503, "UNKNOWN");
            assert_eq!(pushed.header("retry-after"), "5");
            call(address, "HEAD /v2/", b"").await.expect(503);
            place.open(Options::default()).await
        })
        .await;
    let server = early.serve(store).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(server.run(async move {
        let _ = stopped.await;
    }));
    // The same address, and now the whole registry.
    call(address, "GET /readyz", b"").await.expect(200);
    call(address, "GET /v2/", b"").await.expect(200);
    drop(stop);
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn metrics_are_told_without_the_database() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let store = place.open(Options::default()).await;
    let registry = Registry::over(store.clone(), place, dir, Access::Open, |_| {}).await;
    registry.image("shop/web", "v1", "x").await;
    let metrics = registry.get("/metrics").await.expect(200).text();
    assert!(metrics.contains("longshore_store_reachable 1"), "{metrics}");
    store.close().await.unwrap();
    let metrics = registry.get("/metrics").await.expect(200).text();
    for line in [
        "longshore_store_reachable 0",
        "longshore_stored{kind=\"manifests\"} 1",
        "longshore_http_requests_total{method=\"PUT\"",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}
