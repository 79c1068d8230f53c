use client::Error;
use client::longshore::{EventStream, StreamEvent};
use oci::Digest;

use crate::fake::{Fake, answer, cut};

#[tokio::test]
async fn events_are_read_to_the_end() {
    let fake = Fake::start().await;
    let digest = Digest::sha256(b"x");
    let body = format!(
        ": hello\n\nevent: heartbeat\nid: e.1\n\nid: e.2\ndata: {{\"type\":\"dev.longshore.tag.updated\",\ndata: \"data\":{{\"repository\":\"a/b\",\"tag\":\"t\",\"digest\":\"{digest}\"}}}}\n\nevent: reset\nid: f.0\n\n"
    );
    fake.hook(move |_, _| {
        Some(answer(
            200,
            &[("content-type", "text/event-stream; charset=utf-8")],
            &body,
        ))
    });
    let mut stream = EventStream::open(&crate::support::client(), &fake.host, Some("e.0"))
        .await
        .unwrap();
    let asked = fake.asked("GET", "/api/v1/events");
    assert_eq!(asked[0].header("last-event-id"), Some("e.0"));
    assert_eq!(
        stream.next().await.unwrap(),
        Some(StreamEvent::Heartbeat(Some("e.1".to_owned())))
    );
    let Some(StreamEvent::Changed {
        id,
        kind,
        tag,
        digest: moved,
        ..
    }) = stream.next().await.unwrap()
    else {
        panic!("a change");
    };
    assert_eq!(
        (id.as_str(), kind.as_str(), moved),
        ("e.2", "dev.longshore.tag.updated", digest)
    );
    assert_eq!(tag, Some("t".parse().unwrap()));
    assert_eq!(
        stream.next().await.unwrap(),
        Some(StreamEvent::Reset("f.0".to_owned()))
    );
    assert_eq!(stream.next().await.unwrap(), None);
}

#[tokio::test]
async fn a_broken_stream_is_an_error_that_passes() {
    let fake = Fake::start().await;
    fake.hook(|_, _| {
        Some(cut(
            200,
            &[("content-type", "text/event-stream")],
            1000,
            "event: heartbeat\nid: e.1\n\ndata: half".into(),
        ))
    });
    let mut stream = EventStream::open(&crate::support::client(), &fake.host, None)
        .await
        .unwrap();
    assert_eq!(
        stream.next().await.unwrap(),
        Some(StreamEvent::Heartbeat(Some("e.1".to_owned())))
    );
    assert!(stream.next().await.unwrap_err().is_transient());
}

#[tokio::test]
async fn another_registry_is_recognized() {
    let fake = Fake::start().await;
    for (status, kind) in [
        (404, "application/json"),
        (200, "text/html"),
        (405, "text/plain"),
    ] {
        fake.hook(move |_, _| Some(answer(status, &[("content-type", kind)], "<html>")));
        let error = EventStream::open(&crate::support::client(), &fake.host, None)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
    }
    fake.hook(|_, _| Some(answer(403, &[], "")));
    let error = EventStream::open(&crate::support::client(), &fake.host, None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
}
