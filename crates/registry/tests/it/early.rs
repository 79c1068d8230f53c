//! What is answered before the store is open.

use std::net::{Ipv4Addr, SocketAddr};

use registry::{Access, Early, Reason, Settings};
use store::Options;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::harness::{Reply, read_reply, request};
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
            let pushed = call(address, "PUT /v2/a/manifests/v1", &vec![b'x'; 200_000])
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
