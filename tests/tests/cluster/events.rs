//! The event stream over replicas: each event at least once, in order, none missing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use e2e::http::Connection;
use e2e::objects::Kind;
use e2e::{Server, digest, image};

use crate::{Site, healthy};

/// How many tag moves there are; the long run is 10000.
const MOVES: &str = "LONGSHORE_E2E_MOVES";

/// How many clients move tags at once, each its own ones.
const MOVERS: usize = 6;

/// What a reader saw: the number, the tag and the digest of each move.
type Seen = Vec<(u64, String, String)>;

/// Moves the tags of one client; what each move was, in order.
fn move_tags(
    servers: &[Server],
    number: usize,
    count: usize,
    manifests: &[String],
) -> Vec<(String, String)> {
    let mut connections: Vec<_> = servers
        .iter()
        .map(|server| Connection::open(server.url()).unwrap())
        .collect();
    (0..count)
        .map(|round| {
            let tag = format!("m{number}-{}", round % 5);
            // Never to where it is, or there would be no move.
            let body = &manifests[(round / 5) % manifests.len()];
            let at = (round + number) % connections.len();
            let answer = connections[at]
                .request(
                    "PUT",
                    &format!("/v2/events/app/manifests/{tag}"),
                    &[("Content-Type", image::MANIFEST)],
                    body.as_bytes(),
                )
                .unwrap();
            assert_eq!(answer.status(), 201, "{}", answer.text());
            (tag, digest(body.as_bytes()))
        })
        .collect()
}

/// Reads the stream from `start` on until the last event, over one replica after another.
fn read(servers: &[Server], reader: usize, start: &str, last: &Mutex<Option<u64>>) -> Seen {
    let mut seen = Seen::new();
    let mut position = start.to_owned();
    let mut turn = reader;
    loop {
        let server = &servers[turn % servers.len()];
        turn += 1;
        let mut connection = Connection::open(server.url()).unwrap();
        connection
            .send_head(
                "GET",
                "/api/v1/events",
                &[("Last-Event-ID", &position)],
                None,
            )
            .unwrap();
        let head = connection.receive_head("GET").unwrap();
        assert_eq!(head.status, 200);
        // Some connections are short, some end in the middle of a burst.
        let mut left = 20 + (turn * 37) % 300;
        let (mut kind, mut id) = (String::new(), String::new());
        while left > 0 {
            // The stream comes in chunks whose sizes stand on lines of their own: what is not a field is skipped.
            let Ok(line) = connection.line() else { break };
            if let Some(text) = line.strip_prefix("event: ") {
                text.clone_into(&mut kind);
            } else if let Some(text) = line.strip_prefix("id: ") {
                text.clone_into(&mut id);
            } else if let Some(text) = line.strip_prefix("data: ") {
                assert_ne!(kind, "reset", "the position {position} was refused");
                let number: u64 = id.rsplit('.').next().unwrap().parse().unwrap();
                id.clone_into(&mut position);
                if kind == "dev.longshore.tag.updated" {
                    let event: serde_json::Value = serde_json::from_str(text).unwrap();
                    let tag = event["subject"]
                        .as_str()
                        .unwrap()
                        .rsplit(':')
                        .next()
                        .unwrap();
                    let to = event["data"]["digest"].as_str().unwrap();
                    seen.push((number, tag.to_owned(), to.to_owned()));
                    left -= 1;
                }
                if *last.lock().unwrap() == Some(number)
                    || last.lock().unwrap().is_some_and(|last| number > last)
                {
                    return seen;
                }
            }
        }
    }
}

#[test]
fn each_move_is_told_at_least_once_in_order_to_readers_that_reconnect() {
    let moves: usize = std::env::var(MOVES).map_or(1200, |text| text.parse().unwrap());
    let mut site = Site::start(Kind::Versitygw, 3);
    let config = image::push_blob(site.servers[0].url(), "events/app", b"{}");
    let manifests: Vec<_> = (0..3)
        .map(|number| {
            serde_json::json!({
                "schemaVersion": 2,
                "mediaType": image::MANIFEST,
                "config": image::descriptor("application/vnd.example", &config, 2),
                "layers": [],
                "annotations": {"number": number.to_string()},
            })
            .to_string()
        })
        .collect();
    for body in &manifests {
        image::push_manifest(
            site.servers[0].url(),
            "events/app",
            &digest(body.as_bytes()),
            image::MANIFEST,
            body.as_bytes(),
        );
    }
    let start = position(&site.servers[0]);
    let last = Mutex::new(None);
    let done = AtomicBool::new(false);
    let (made, seen) = thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|reader| {
                let (servers, start, last) = (&site.servers, &start, &last);
                scope.spawn(move || read(servers, reader, start, last))
            })
            .collect();
        let movers: Vec<_> = (0..MOVERS)
            .map(|number| {
                let (servers, manifests) = (&site.servers, &manifests);
                scope.spawn(move || move_tags(servers, number, moves / MOVERS, manifests))
            })
            .collect();
        let made: Vec<_> = movers
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        done.store(true, Ordering::Relaxed);
        // One more event after all of them, with whose number every reader ends. It is only known once it is sealed.
        let end = position_after(&site.servers, &manifests[0]);
        *last.lock().unwrap() = Some(end);
        // Readers that are past it wake by one more.
        image::push_manifest(
            site.servers[1].url(),
            "events/app",
            "wake",
            image::MANIFEST,
            manifests[1].as_bytes(),
        );
        let seen: Vec<_> = readers
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        (made, seen)
    });
    for events in &seen {
        let mut numbers: Vec<u64> = Vec::new();
        let mut told: Vec<(String, String)> = Vec::new();
        for (number, tag, to) in events {
            if !tag.starts_with('m') {
                continue;
            }
            // What was told before may be told again after a reconnection, and nothing else may go back.
            if numbers.last().is_none_or(|newest| number > newest) {
                numbers.push(*number);
                told.push((tag.clone(), to.clone()));
            } else {
                assert!(numbers.contains(number), "event {number} came late");
            }
        }
        assert_eq!(told.len(), made.len(), "moves told and made");
        for tag in (0..MOVERS).flat_map(|number| (0..5).map(move |at| format!("m{number}-{at}"))) {
            let of = |all: &[(String, String)]| -> Vec<String> {
                all.iter()
                    .filter(|(name, _)| *name == tag)
                    .map(|(_, to)| to.clone())
                    .collect()
            };
            assert_eq!(of(&told), of(&made), "the moves of {tag}");
        }
    }
    healthy(&mut site.servers);
}

/// Where the stream is now.
fn position(server: &Server) -> String {
    let mut connection = Connection::open(server.url()).unwrap();
    connection
        .send_head("GET", "/api/v1/events", &[], None)
        .unwrap();
    connection.receive_head("GET").unwrap();
    loop {
        let line = connection.line().unwrap();
        if let Some(id) = line.strip_prefix("id: ") {
            return id.to_owned();
        }
    }
}

/// Makes one more tag and waits for its number.
fn position_after(servers: &[Server], body: &str) -> u64 {
    let before = position(&servers[0]);
    image::push_manifest(
        servers[0].url(),
        "events/app",
        "end",
        image::MANIFEST,
        body.as_bytes(),
    );
    let mut connection = Connection::open(servers[0].url()).unwrap();
    connection
        .send_head("GET", "/api/v1/events", &[("Last-Event-ID", &before)], None)
        .unwrap();
    connection.receive_head("GET").unwrap();
    let mut id = String::new();
    loop {
        let line = connection.line().unwrap();
        if let Some(text) = line.strip_prefix("id: ") {
            text.clone_into(&mut id);
        } else if line.starts_with("data: ") && line.contains("events/app:end") {
            return id.rsplit('.').next().unwrap().parse().unwrap();
        }
    }
}
