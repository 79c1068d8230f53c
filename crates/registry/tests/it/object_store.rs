//! Blobs out of an object store: served from here, or by a redirect; and what its failures look like.

use std::time::Duration;

use registry::{Access, Redirect, Settings};
use store::Options;

use crate::harness::Registry;
use crate::place::Place;
use crate::stand_in::{Fault, Request, StandIn};

const FOR_GOOD: usize = 100;

async fn registry(change: impl FnOnce(&mut Settings)) -> (Registry, StandIn) {
    let (objects, dir) = (StandIn::start().await, tempfile::tempdir().unwrap());
    let place = Place::new(dir.path());
    let store = objects.open(place.database(), Options::default()).await;
    (
        Registry::over(store, place, dir, Access::Open, change).await,
        objects,
    )
}

fn redirecting(networks: &[&str]) -> impl FnOnce(&mut Settings) {
    let networks = networks.iter().map(|text| text.parse().unwrap()).collect();
    move |settings| {
        settings.redirect = Some(Redirect {
            networks,
            ttl: Duration::from_mins(10),
            except: vec!["strict/**".parse().unwrap()],
        });
    }
}

fn content() -> Vec<u8> {
    (0..50_000u16).flat_map(u16::to_be_bytes).collect()
}

#[tokio::test]
async fn blobs_and_ranges_are_served_from_the_object_store() {
    let (registry, _objects) = registry(|_| {}).await;
    let digest = registry.blob("a/b", &content()).await;
    let path = format!("/v2/a/b/blobs/{digest}");
    let whole = registry.get(&path).await.expect(200);
    assert_eq!(whole.body, content());
    assert_eq!(whole.header("content-length"), "100000");
    assert_eq!(whole.header("docker-content-digest"), digest);
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=99999-", 99_999..100_000),
        ("bytes=1000-59999", 1_000..60_000),
    ] {
        let part = registry
            .call(&format!("GET {path}"), &[("Range", range)], b"")
            .await
            .expect(206);
        assert_eq!(part.body, content()[expected], "{range}");
    }
    let head = registry.head(&path).await.expect(200);
    assert_eq!(head.header("content-length"), "100000");
}

#[tokio::test]
async fn a_client_of_a_named_network_is_sent_to_the_object_store() {
    let (registry, objects) = registry(redirecting(&["127.0.0.0/8"])).await;
    let digest = registry.blob("a/b", &content()).await;
    let small = registry.blob("a/b", b"small").await;
    let strict = registry.blob("strict/b", &content()).await;
    let path = format!("/v2/a/b/blobs/{digest}");
    let sent = registry.get(&path).await.expect(307);
    assert_eq!(sent.header("docker-content-digest"), digest);
    assert_eq!(sent.header("cache-control"), "no-store");
    let location = sent.header("location");
    assert!(location.starts_with(&objects.endpoint), "{location}");
    for needed in ["X-Amz-Signature=", "X-Amz-Expires=600"] {
        assert!(location.contains(needed), "{location}");
    }
    // Neither HEAD, nor what is in a row, nor what is excepted, nor what the client has.
    registry.head(&path).await.expect(200);
    let inline = registry.get(&format!("/v2/a/b/blobs/{small}")).await;
    assert_eq!(inline.expect(200).body, b"small");
    let excepted = registry.get(&format!("/v2/strict/b/blobs/{strict}")).await;
    assert_eq!(excepted.expect(200).body, content());
    registry
        .call(
            &format!("GET {path}"),
            &[("If-None-Match", &format!("\"{digest}\""))],
            b"",
        )
        .await
        .expect(304);
    let metrics = registry.get("/metrics").await.expect(200);
    let metrics = String::from_utf8(metrics.body).unwrap();
    for line in [
        "longshore_delegated_pulls_total 1",
        "longshore_delegated_bytes_total 100000",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
}

#[tokio::test]
async fn a_client_of_another_network_is_not() {
    let (registry, _objects) = registry(redirecting(&["10.0.0.0/8", "::/0"])).await;
    let digest = registry.blob("a/b", &content()).await;
    let whole = registry.get(&format!("/v2/a/b/blobs/{digest}")).await;
    assert_eq!(whole.expect(200).body, content());
}

#[tokio::test]
async fn a_failing_object_store_is_503_and_a_cut_body_is_seen() {
    let (registry, objects) = registry(|_| {}).await;
    let digest = registry.blob("a/b", &content()).await;
    let path = format!("/v2/a/b/blobs/{digest}");
    for fault in [Fault::Status(500), Fault::WrongLength] {
        objects.fail(Request::Get, fault, FOR_GOOD);
        let refused = registry.get(&path).await.expect(503);
        assert!(!refused.header("retry-after").is_empty());
        objects.heal();
    }
    // The head of our answer has gone by then: the connection ends before the body does.
    objects.fail(Request::Get, Fault::Short(60_000), 1);
    objects.fail(Request::Get, Fault::Status(500), FOR_GOOD);
    let received = registry.until_the_end(&format!("GET {path}")).await;
    assert!(received.len() < 100_000, "{}", received.len());
    objects.heal();

    objects.fail(Request::Put, Fault::Status(503), FOR_GOOD);
    let refused = registry
        .call(
            &format!(
                "POST /v2/a/b/blobs/uploads/?digest={}",
                oci::Digest::sha256(b"x")
            ),
            &[],
            &vec![7; 100_000],
        )
        .await;
    // A wrong digest is seen before anything is sent.
    refused.refused(400, "DIGEST_INVALID");
    let other = vec![7; 100_000];
    let refused = registry
        .call(
            &format!(
                "POST /v2/a/b/blobs/uploads/?digest={}",
                oci::Digest::sha256(&other)
            ),
            &[],
            &other,
        )
        .await
        .expect(503);
    assert!(!refused.header("retry-after").is_empty());
    objects.heal();
    assert_eq!(
        registry.blob("a/b", &other).await,
        oci::Digest::sha256(&other).to_string()
    );
}
