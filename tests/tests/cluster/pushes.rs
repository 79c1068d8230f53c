//! Many clients at once over several replicas.

use std::collections::BTreeSet;
use std::thread;

use e2e::objects::Kind;
use e2e::wire::noise;
use e2e::{Server, digest, image};

use crate::{Site, healthy};

/// A manifest over a config that is there, told apart by a number.
fn manifest(config: &str, number: usize) -> String {
    serde_json::json!({
        "schemaVersion": 2,
        "mediaType": image::MANIFEST,
        "config": image::descriptor("application/vnd.example", config, 2),
        "layers": [],
        "annotations": {"number": number.to_string()},
    })
    .to_string()
}

fn put(server: &Server, tag: &str, headers: &[(&str, &str)], body: &str) -> u16 {
    let mut all = vec![("Content-Type", image::MANIFEST)];
    all.extend_from_slice(headers);
    let target = format!("/v2/many/app/manifests/{tag}");
    server
        .request("PUT", &target, &all, body.as_bytes())
        .status()
}

fn tags(server: &Server) -> BTreeSet<String> {
    let answer = server.get("/v2/many/app/tags/list?n=1000");
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["tags"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tag| tag.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn two_replicas_and_a_hundred_pushes_each_of_distinct_tags_to_one_repository_lose_none() {
    let mut site = Site::start(Kind::Versitygw, 2);
    let wanted: BTreeSet<String> = (0..200).map(|number| format!("t{number}")).collect();
    thread::scope(|scope| {
        for (number, tag) in wanted.iter().enumerate() {
            let server = &site.servers[number % 2];
            scope.spawn(move || {
                // Every other layer is an object; and each fourth one is everybody's.
                let length = if number % 2 == 0 { 300 } else { 40_000 };
                let seed = if number % 4 == 0 {
                    1
                } else {
                    number as u64 + 10
                };
                let layer = noise(seed, length);
                image::push_artifact(
                    server.url(),
                    "many/app",
                    tag,
                    "application/vnd.example",
                    &layer,
                );
            });
        }
    });
    for server in &site.servers {
        assert_eq!(tags(server), wanted);
        for tag in &wanted {
            let answer = server.get(&format!("/v2/many/app/manifests/{tag}"));
            assert_eq!(answer.status(), 200, "{tag}");
            let layer = answer.json()["layers"][0]["digest"]
                .as_str()
                .unwrap()
                .to_owned();
            e2e::wire::holds(server, "many/app", &layer);
        }
    }
    healthy(&mut site.servers);
}

#[test]
fn of_sixty_four_conditional_pushes_over_three_replicas_one_wins() {
    let mut site = Site::start(Kind::Minio, 3);
    let config = image::push_blob(site.servers[0].url(), "many/app", b"{}");
    let first = manifest(&config, 1000);
    assert_eq!(put(&site.servers[0], "channel", &[], &first), 201);
    let mut current = digest(first.as_bytes());
    for round in 0..4 {
        // A move from a known state, and the making of a tag that must not be there.
        let quoted = format!("\"{current}\"");
        let fresh = format!("fresh{round}");
        for (tag, condition) in [
            ("channel", ("If-Match", quoted.as_str())),
            (fresh.as_str(), ("If-None-Match", "*")),
        ] {
            let statuses: Vec<(u16, String)> = thread::scope(|scope| {
                let pushing: Vec<_> = (0..64)
                    .map(|number| {
                        let server = &site.servers[number % 3];
                        let body = manifest(&config, round * 100 + number);
                        scope.spawn(move || (put(server, tag, &[condition], &body), body))
                    })
                    .collect();
                pushing
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            let won: Vec<_> = statuses
                .iter()
                .filter(|(status, _)| *status == 201)
                .collect();
            let lost = statuses.iter().filter(|(status, _)| *status == 412).count();
            assert_eq!((won.len(), lost), (1, 63), "{tag}: {statuses:?}");
            let winner = digest(won[0].1.as_bytes());
            for server in &site.servers {
                let answer = server.get(&format!("/v2/many/app/manifests/{tag}"));
                assert_eq!(digest(&answer.body), winner);
            }
            if tag == "channel" {
                current = winner;
            }
        }
    }
    healthy(&mut site.servers);
}

#[test]
fn the_same_blobs_pushed_at_once_through_three_replicas_are_stored_once() {
    for kind in Kind::ALL {
        let mut site = Site::start(kind, 3);
        let layers: Vec<_> = (0..6).map(|seed| noise(seed + 70, 60_000)).collect();
        thread::scope(|scope| {
            for number in 0..24 {
                let (server, layers) = (&site.servers[number % 3], &layers);
                scope.spawn(move || {
                    for at in 0..layers.len() {
                        let layer = &layers[(at + number) % layers.len()];
                        let repository = format!("same/app{}", number % 4);
                        image::push_blob(server.url(), &repository, layer);
                    }
                });
            }
        });
        for (server, number) in site.servers.iter().zip(0..) {
            for layer in &layers {
                e2e::wire::holds(server, &format!("same/app{number}"), &digest(layer));
            }
        }
        // Each blob has the one object that its row names, and what lost the race waits in the outbox.
        let name = site.storage.database.rsplit('/').next().unwrap();
        let rows = |table: &str| -> usize {
            let statement = format!("SELECT COUNT(storage_key) FROM {table}");
            site.cluster.postgres.sql(name, &statement).parse().unwrap()
        };
        assert_eq!(rows("blob"), layers.len());
        e2e::wire::wait_for("what is neither a blob nor in the outbox", || {
            let objects = site.cluster.blobs_of(&site.storage).len();
            (objects == layers.len() + rows("deletion") && rows("upload") == 0).then_some(())
        });
        assert_eq!(
            site.cluster.objects.open_uploads(e2e::cluster::BUCKET),
            [""; 0]
        );
        healthy(&mut site.servers);
    }
}
