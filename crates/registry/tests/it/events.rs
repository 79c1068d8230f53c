use std::time::Duration;

use registry::Access;
use store::Options;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::harness::{Registry, Reply, basic, passwords, read_head, request};
use crate::place::Place;

/// An open event stream.
struct Stream(BufReader<TcpStream>);

#[derive(Debug)]
struct Event {
    kind: String,
    id: String,
    data: serde_json::Value,
}

async fn open(registry: &Registry, query: &str, headers: &[(&str, &str)]) -> Stream {
    let (reply, stream) = ask(registry, query, headers).await;
    let reply = reply.expect(200);
    assert_eq!(reply.header("content-type"), "text/event-stream");
    assert_eq!(reply.header("transfer-encoding"), "chunked");
    stream
}

async fn ask(registry: &Registry, query: &str, headers: &[(&str, &str)]) -> (Reply, Stream) {
    let mut stream = BufReader::new(registry.connect().await);
    stream
        .get_mut()
        .write_all(&request(
            &format!("GET /api/v1/events{query}"),
            headers,
            b"",
        ))
        .await
        .unwrap();
    (read_head(&mut stream).await, Stream(stream))
}

impl Stream {
    /// The next event; `None` at the end. The frames of the chunked coding are lines of their own here,
    /// because every event is sent as one chunk that ends with a blank line.
    async fn next(&mut self) -> Option<Event> {
        let mut fields = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).await.unwrap_or(0) == 0 {
                return None;
            }
            let line = line.trim_end().to_owned();
            match line.split_once(": ") {
                Some((name, value)) => fields.push((name.to_owned(), value.to_owned())),
                None if line == "0" => return None,
                None if line.is_empty() && fields.len() == 3 => break,
                None => {}
            }
        }
        let field = |name: &str| {
            fields
                .iter()
                .find(|(key, _)| key == name)
                .unwrap()
                .1
                .clone()
        };
        Some(Event {
            kind: field("event"),
            id: field("id"),
            data: serde_json::from_str(&field("data")).unwrap(),
        })
    }

    /// The next event that is not a heartbeat.
    async fn change(&mut self) -> Event {
        loop {
            let event = self.next().await.expect("the stream ended");
            if event.kind != "heartbeat" {
                return event;
            }
        }
    }
}

#[tokio::test]
async fn changes_come_as_they_are_committed() {
    let registry = Registry::open().await;
    let mut stream = open(&registry, "", &[]).await;
    let first = stream.next().await.unwrap();
    assert_eq!(first.kind, "heartbeat");
    assert_eq!(first.data["position"], first.id.as_str());
    let one = registry.image("shop/web", "v1", "one").await;
    let pushed = stream.change().await;
    let tagged = stream.change().await;
    let (pushed, tagged) = if pushed.kind.contains("manifest") {
        (pushed, tagged)
    } else {
        (tagged, pushed)
    };
    assert_eq!(pushed.kind, "dev.longshore.manifest.pushed");
    assert_eq!(pushed.data["subject"], format!("shop/web@{one}"));
    assert_eq!(tagged.kind, "dev.longshore.tag.updated");
    assert_eq!(tagged.data["type"], "dev.longshore.tag.updated");
    assert_eq!(tagged.data["specversion"], "1.0");
    assert_eq!(tagged.data["id"], tagged.id.as_str());
    assert_eq!(tagged.data["datacontenttype"], "application/json");
    assert!(tagged.data["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!(tagged.data["data"]["repository"], "shop/web");
    assert_eq!(tagged.data["data"]["tag"], "v1");
    assert_eq!(tagged.data["data"]["digest"], one);
    assert_eq!(tagged.data["data"]["previous"], serde_json::Value::Null);
    assert_eq!(tagged.data["data"]["actor"], "anonymous");
    let two = registry.image("shop/web", "v1", "two").await;
    let moved = loop {
        let event = stream.change().await;
        if event.kind == "dev.longshore.tag.updated" {
            break event;
        }
    };
    assert_eq!(moved.data["data"]["previous"], one);
    assert_eq!(moved.data["data"]["digest"], two);
    registry
        .delete("/v2/shop/web/manifests/v1")
        .await
        .expect(202);
    let deleted = stream.change().await;
    assert_eq!(deleted.kind, "dev.longshore.tag.deleted");
    assert_eq!(deleted.data["data"]["digest"], two);
    registry
        .delete(&format!("/v2/shop/web/manifests/{two}"))
        .await
        .expect(202);
    assert_eq!(stream.change().await.kind, "dev.longshore.manifest.deleted");
    let subject = oci::Digest::sha256(b"subject").to_string();
    registry
        .refer("shop/web", &subject, "application/x-sbom", "x")
        .await;
    let referrer = stream.change().await;
    assert_eq!(referrer.data["data"]["subject"], subject);
    assert_eq!(referrer.data["data"]["artifactType"], "application/x-sbom");
}

#[tokio::test]
async fn resuming_misses_nothing_and_repeats_nothing() {
    let registry = Registry::open().await;
    let start = open(&registry, "", &[]).await.next().await.unwrap().id;
    for n in 0..10 {
        registry.image("a", &format!("t{n}"), &n.to_string()).await;
    }
    let mut all = Vec::new();
    let mut stream = open(&registry, &format!("?after={start}"), &[]).await;
    while all.len() < 20 {
        all.push(stream.change().await.id);
    }
    let numbers: Vec<i64> = all
        .iter()
        .map(|id| id.rsplit('.').next().unwrap().parse().unwrap())
        .collect();
    assert!(
        numbers.windows(2).all(|pair| pair[0] < pair[1]),
        "{numbers:?}"
    );
    // The header wins over the query.
    let mut stream = open(
        &registry,
        &format!("?after={start}"),
        &[("Last-Event-ID", &all[7])],
    )
    .await;
    for id in &all[8..] {
        assert_eq!(&stream.change().await.id, id);
    }
}

#[tokio::test]
async fn unknown_positions_reset() {
    let registry = Registry::open().await;
    // Events have a position when they come, which may be after the push was answered.
    let mut stream = open(&registry, "", &[]).await;
    stream.next().await.unwrap();
    registry.image("a", "v1", "x").await;
    for _ in 0..2 {
        stream.change().await;
    }
    for position in ["other.1", "nonsense", "7", "future"] {
        let now = open(&registry, "", &[]).await.next().await.unwrap().id;
        let future = format!("{}.999999", now.rsplit_once('.').unwrap().0);
        let asked = if position == "future" {
            &future
        } else {
            position
        };
        let mut stream = open(&registry, "", &[("Last-Event-ID", asked)]).await;
        let reset = stream.next().await.unwrap();
        assert_eq!(reset.kind, "reset", "{position}");
        assert_eq!(reset.id, now);
        assert_eq!(reset.data["position"], now);
        // It goes on from there.
        registry.image("a", "v1", position).await;
        for _ in 0..2 {
            assert_ne!(stream.change().await.kind, "reset");
        }
    }
}

/// What a reader has not seen is forgotten while it reads: it is told, and nothing is left out without a word.
#[tokio::test]
async fn a_reader_that_falls_behind_is_told_to_reset() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let store = place.open(Options::default()).await;
    let registry = Registry::over(store.clone(), place, dir, Access::Open, |_| {}).await;
    let mut stream = open(&registry, "", &[]).await;
    stream.next().await.unwrap();
    registry.image("a", "v1", "x").await;
    for _ in 0..2 {
        assert_ne!(stream.change().await.kind, "reset");
    }
    store.forget_events(5).await.unwrap();
    registry.image("a", "v1", "y").await;
    let reset = stream.change().await;
    assert_eq!(reset.kind, "reset");
    assert_eq!(reset.data["position"], reset.id.as_str());
    let newest = store.event_bounds().await.unwrap().newest;
    assert!(reset.id.ends_with(&format!(".{newest}")), "{}", reset.id);
    // It goes on from there.
    registry.image("a", "v1", "z").await;
    for number in 1..=2 {
        let event = stream.change().await;
        assert_ne!(event.kind, "reset");
        assert!(event.id.ends_with(&format!(".{}", newest + number)));
    }
}

#[tokio::test]
async fn heartbeats_carry_the_position() {
    let registry =
        Registry::set(|settings| settings.limits.heartbeat = Duration::from_millis(20)).await;
    let mut stream = open(&registry, "", &[]).await;
    let first = stream.next().await.unwrap();
    let second = stream.next().await.unwrap();
    assert_eq!(
        (first.kind.as_str(), second.kind.as_str()),
        ("heartbeat", "heartbeat")
    );
    assert_eq!(first.id, second.id);
    registry.image("a", "v1", "x").await;
    let last = stream.change().await;
    let last = if last.kind.contains("manifest") {
        stream.change().await
    } else {
        last
    };
    let beat = loop {
        let event = stream.next().await.unwrap();
        if event.kind == "heartbeat" {
            break event;
        }
    };
    assert!(beat.id >= last.id);
}

#[tokio::test]
async fn only_what_the_caller_may_pull() {
    let registry = Registry::users(|_| {}).await;
    let (bob, root) = (basic("bob"), basic("root"));
    let mut stream = open(&registry, "", &[("Authorization", &bob)]).await;
    stream.next().await.unwrap();
    registry
        .image_as("secret/y", "v1", "x", &[("Authorization", &root)])
        .await;
    registry
        .image_as("shop/web", "v1", "x", &[("Authorization", &root)])
        .await;
    for _ in 0..2 {
        let event = stream.change().await;
        assert_eq!(event.data["data"]["repository"], "shop/web");
        assert_eq!(event.data["data"]["actor"], "user:root");
    }
    let reply = registry
        .get("/api/v1/events")
        .await
        .refused(401, "UNAUTHORIZED");
    assert!(
        reply
            .all("www-authenticate")
            .iter()
            .any(|challenge| challenge.contains("scope=\"registry:events:*\""))
    );
    assert!(
        reply
            .all("www-authenticate")
            .iter()
            .any(|challenge| challenge.starts_with("Basic "))
    );
}

#[tokio::test]
async fn a_token_for_events() {
    let registry = Registry::users(|_| {}).await;
    let bob = basic("bob");
    let get = async |scope: &str| {
        let line = format!("GET /v2/token?service=longshore&scope={scope}");
        let reply = registry
            .call(&line, &[("Authorization", &bob)], b"")
            .await
            .expect(200);
        format!("Bearer {}", reply.json()["token"].as_str().unwrap())
    };
    let token = get("registry:events:*").await;
    let mut stream = open(&registry, "", &[("Authorization", &token)]).await;
    stream.next().await.unwrap();
    registry
        .image_as("shop/web", "v1", "x", &[("Authorization", &basic("root"))])
        .await;
    assert_eq!(stream.change().await.data["data"]["repository"], "shop/web");
    let other = get("repository:shop/web:pull").await;
    registry
        .call("GET /api/v1/events", &[("Authorization", &other)], b"")
        .await
        .refused(401, "UNAUTHORIZED");
}

#[tokio::test]
async fn it_ends_with_its_credential() {
    let registry = Registry::users(|_| {}).await;
    let path = registry.dir.path().join("htpasswd");
    let mut bob = open(&registry, "", &[("Authorization", &basic("bob"))]).await;
    let mut alice = open(&registry, "", &[("Authorization", &basic("alice"))]).await;
    bob.next().await.unwrap();
    alice.next().await.unwrap();
    // alice stays; bob is removed. Nothing is pushed meanwhile.
    let file = std::fs::read_to_string(&path).unwrap();
    let kept: Vec<&str> = file
        .lines()
        .filter(|line| !line.starts_with("bob:"))
        .collect();
    std::fs::write(&path, kept.join("\n")).unwrap();
    assert!(bob.next().await.is_none());
    registry
        .image_as("shop/web", "v1", "x", &[("Authorization", &basic("root"))])
        .await;
    assert!(alice.next().await.is_some());
    // A new hash of the same password is a changed password.
    std::fs::write(&path, passwords(&["alice", "root"])).unwrap();
    while alice.next().await.is_some() {}
}

#[tokio::test]
async fn it_ends_with_the_drain() {
    let mut registry = Registry::open().await;
    let mut stream = open(&registry, "", &[]).await;
    stream.next().await.unwrap();
    registry.stop();
    assert!(stream.next().await.is_none());
    (&mut registry.task).await.unwrap().unwrap();
}
