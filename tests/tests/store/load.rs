//! Many pushers at once.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;

use e2e::http::{Connection, Response};
use e2e::image::{MANIFEST, descriptor};
use e2e::{Server, digest};
use serde_json::json;

use crate::{connect, healthy, noise, server, verify};

const PUSHERS: u64 = 16;
const ROUNDS: u64 = 30;
const REPOSITORIES: [&str; 3] = ["load/a", "load/b", "other/c"];

/// What was acknowledged and not taken back: repository and digest to the bytes.
type Acknowledged = Mutex<BTreeMap<(String, String), Vec<u8>>>;

struct Pusher<'a> {
    connection: Connection,
    number: u64,
    acknowledged: &'a Acknowledged,
}

impl Pusher<'_> {
    fn ask(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.connection
            .request(method, target, headers, body)
            .unwrap_or_else(|error| panic!("{method} {target}: {error}"))
    }

    /// Pushes a blob in one of the ways that there are, and gives back its digest.
    fn blob(&mut self, repository: &str, bytes: &[u8], way: u64) -> String {
        let wanted = digest(bytes);
        let base = format!("/v2/{repository}/blobs");
        if way % 4 == 3
            && self
                .ask("HEAD", &format!("{base}/{wanted}"), &[], &[])
                .status()
                == 200
        {
            return wanted;
        }
        let target = match way % 4 {
            0 => format!("{base}/uploads/?digest={wanted}"),
            1 => format!("{base}/uploads/?mount={wanted}&from={}", REPOSITORIES[0]),
            _ => format!("{base}/uploads/"),
        };
        let body = if way.is_multiple_of(4) { bytes } else { &[] };
        let answer = self.ask("POST", &target, &[], body);
        if answer.status() == 201 {
            return wanted;
        }
        assert_eq!(answer.status(), 202, "{}", answer.text());
        let upload = answer.header("location").unwrap().to_owned();
        let half = bytes.len() / 2;
        let done = if way.is_multiple_of(2) && half > 0 {
            let answer = self.ask("PATCH", &upload, &[], &bytes[..half]);
            assert_eq!(answer.status(), 202, "{}", answer.text());
            self.ask(
                "PUT",
                &format!("{upload}?digest={wanted}"),
                &[],
                &bytes[half..],
            )
        } else {
            self.ask("PUT", &format!("{upload}?digest={wanted}"), &[], bytes)
        };
        assert_eq!(done.status(), 201, "{}", done.text());
        wanted
    }

    fn round(&mut self, round: u64) {
        let turn = self.number * ROUNDS + round;
        let repository = REPOSITORIES[(turn % 3) as usize];
        let mut layers = Vec::new();
        for layer in 0..3 {
            // Eight layers for all, from a few bytes to some hundred KiB, on both sides of the row's limit.
            let shared = (turn * 5 + layer * 3) % 8;
            let bytes = noise(shared + 1, 300 << shared);
            let pushed = self.blob(repository, &bytes, turn + layer);
            layers.push(descriptor("application/octet-stream", &pushed, bytes.len()));
        }
        let config = format!("{{\"turn\":{turn}}}").into_bytes();
        let pushed = self.blob(repository, &config, turn / 2);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.example.config", &pushed, config.len()),
            "layers": layers,
        })
        .to_string()
        .into_bytes();
        let tag = format!("t{}", turn % 5);
        let target = format!("/v2/{repository}/manifests/{tag}");
        let answer = self.ask("PUT", &target, &[("Content-Type", MANIFEST)], &manifest);
        assert_eq!(answer.status(), 201, "{}", answer.text());
        let wanted = digest(&manifest);
        let key = (repository.to_owned(), wanted.clone());
        self.acknowledged
            .lock()
            .unwrap()
            .insert(key.clone(), manifest);
        match turn % 7 {
            1 => {
                let answer = self.ask("DELETE", &target, &[], &[]);
                assert!(matches!(answer.status(), 202 | 404), "{}", answer.text());
            }
            2 => {
                let target = format!("/v2/{repository}/manifests/{wanted}");
                self.acknowledged.lock().unwrap().remove(&key);
                let answer = self.ask("DELETE", &target, &[], &[]);
                assert_eq!(answer.status(), 202, "{}", answer.text());
                // Nobody else names this configuration, so it may go.
                let target = format!("/v2/{repository}/blobs/{pushed}");
                let answer = self.ask("DELETE", &target, &[], &[]);
                assert_eq!(answer.status(), 202, "{}", answer.text());
            }
            3 => {
                let target = format!("/v2/{repository}/blobs/{pushed}");
                let answer = self.ask("DELETE", &target, &[], &[]);
                assert_eq!(answer.status(), 409, "{}", answer.text());
            }
            _ => {}
        }
    }
}

/// Wants every acknowledged manifest and all that it names.
fn check(server: &Server, acknowledged: &BTreeMap<(String, String), Vec<u8>>) {
    let mut connection = connect(server);
    let mut get = |target: &str| connection.request("GET", target, &[], &[]).unwrap();
    for ((repository, wanted), bytes) in acknowledged {
        let answer = get(&format!("/v2/{repository}/manifests/{wanted}"));
        assert_eq!(answer.status(), 200, "{repository}@{wanted}");
        assert_eq!(&answer.body, bytes);
        let view = answer.json();
        let layers = view["layers"].as_array().unwrap();
        for blob in layers.iter().chain([&view["config"]]) {
            let wanted = blob["digest"].as_str().unwrap();
            let answer = get(&format!("/v2/{repository}/blobs/{wanted}"));
            assert_eq!(answer.status(), 200, "{repository}@{wanted}");
            assert_eq!(digest(&answer.body), wanted);
        }
    }
    for repository in REPOSITORIES {
        let list = get(&format!("/v2/{repository}/tags/list")).json();
        for tag in list["tags"].as_array().unwrap() {
            let tag = tag.as_str().unwrap();
            let answer = get(&format!("/v2/{repository}/manifests/{tag}"));
            assert_eq!(answer.status(), 200, "{repository}:{tag}");
            let key = (repository.to_owned(), digest(&answer.body));
            assert!(
                acknowledged.contains_key(&key),
                "{repository}:{tag} is not acknowledged"
            );
        }
    }
}

#[test]
fn sixteen_pushers_of_the_same_layers_lose_nothing() {
    let mut server = server("");
    let acknowledged = Acknowledged::default();
    thread::scope(|scope| {
        for number in 0..PUSHERS {
            let (server, acknowledged) = (&server, &acknowledged);
            scope.spawn(move || {
                let mut pusher = Pusher {
                    connection: connect(server),
                    number,
                    acknowledged,
                };
                for round in 0..ROUNDS {
                    pusher.round(round);
                    if round == ROUNDS / 2 && number == 0 {
                        // Beside the running server and its pushers.
                        verify(server.data());
                    }
                }
            });
        }
    });
    healthy(&mut server);
    let acknowledged = acknowledged.into_inner().unwrap();
    check(&server, &acknowledged);
    server.restart();
    check(&server, &acknowledged);
    server.stop();
    verify(server.data());
}
