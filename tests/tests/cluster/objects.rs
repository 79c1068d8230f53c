//! Object stores that err, lose answers, are slow, answer wrongly, and ignore conditions. Every wrong answer is made
//! before a real store, so that what it did and what it said can differ.

use std::thread;
use std::time::Duration;

use e2e::cluster::replicas;
use e2e::fault::{Fault, Faults};
use e2e::http::Connection;
use e2e::objects::Kind;
use e2e::wire::{finish, holds, noise, open_upload, patch, wait_for};
use e2e::{Cluster, digest, image};

use crate::{Pushers, Site, healthy, in_trouble, keepsake, verify};

const MIB: usize = 1 << 20;

/// Replicas that reach their objects through a proxy.
fn broken(kind: Kind, count: usize) -> (Site, Faults) {
    let cluster = Cluster::start(kind);
    let faults = Faults::start(&cluster.objects.host());
    let mut storage = cluster.storage();
    storage.endpoint = faults.endpoint();
    (Site::over(cluster, storage, count), faults)
}

#[test]
fn an_object_store_that_errs_now_and_then_is_not_noticed() {
    for kind in Kind::ALL {
        let (mut site, faults) = broken(kind, 1);
        let server = &site.servers[0];
        let mut met = 0;
        for (number, fault) in [
            Fault::Answer(500),
            Fault::Answer(503),
            Fault::Refuse,
            Fault::Lose,
            Fault::CutRequest(10_000),
            Fault::Delay(Duration::from_millis(1500)),
        ]
        .into_iter()
        .enumerate()
        {
            // In one object, and in parts of a multipart upload.
            for (size, length) in [200_000, 12 * MIB].into_iter().enumerate() {
                let bytes = noise((number * 10 + size) as u64 + 400, length);
                faults.next(1, "PUT ", fault.clone());
                let blob = image::push_blob(server.url(), "errs/app", &bytes);
                assert!(faults.met() > met, "{fault:?} met nothing");
                met = faults.met();
                if fault != Fault::CutRequest(10_000) {
                    faults.next(1, "GET ", fault.clone());
                }
                holds(server, "errs/app", &blob);
                met = met.max(faults.met());
                faults.heal();
                holds(server, "errs/app", &blob);
            }
        }
        healthy(&mut site.servers);
    }
}

#[test]
fn an_object_store_that_is_down_is_told_and_nothing_is_lost() {
    for fault in [Fault::Answer(503), Fault::Refuse, Fault::Lose] {
        let (mut site, faults) = broken(Kind::Versitygw, 2);
        let kept = keepsake(&site.servers[0], "down");
        let server = &site.servers[0];
        let whole = noise(51, 14 * MIB);
        let upload = open_upload(server, "down/app");
        assert_eq!(patch(server, &upload, 0, &whole[..6 * MIB]).status(), 202);
        faults.always("", fault.clone());
        // What needs the store is refused, in both ways to push.
        let target = format!("/v2/down/app/blobs/uploads/?digest={}", digest(&whole));
        in_trouble(&server.request("POST", &target, &[], &whole));
        let answer = patch(server, &upload, 6 * MIB, &whole[6 * MIB..]);
        in_trouble(&answer);
        in_trouble(&server.get(&format!("/v2/kept/down/blobs/{}", kept.layers[1])));
        // What does not need it goes on.
        let answer = server.get("/v2/kept/down/manifests/large");
        assert_eq!(answer.status(), 200, "{}", answer.text());
        holds(server, "kept/down", &kept.layers[0]);
        image::push_artifact(
            server.url(),
            "down/app",
            "tiny",
            "application/vnd.example",
            b"tiny",
        );
        faults.heal();
        // Another replica finishes what this one could not.
        let other = &site.servers[1];
        let at = wait_for("the upload after the outage", || {
            let status = other.get(&upload);
            (status.status() == 204)
                .then(|| usize::try_from(e2e::wire::offset_of(&status)).unwrap())
        });
        assert!((6 * MIB..=14 * MIB).contains(&at), "{at}");
        if at < whole.len() {
            wait_for("the claim of the refused chunk", || {
                let answer = patch(other, &upload, at, &whole[at..]);
                assert!([202, 416].contains(&answer.status()), "{}", answer.text());
                (answer.status() == 202).then_some(())
            });
        }
        let done = finish(other, &upload, &digest(&whole), &[]);
        assert_eq!(done.status(), 201, "{fault:?}: {}", done.text());
        for server in &site.servers {
            holds(server, "down/app", &digest(&whole));
            kept.readable(server);
        }
        healthy(&mut site.servers);
    }
}

#[test]
fn an_object_store_that_restarts_under_load_loses_nothing() {
    let mut site = Site::start(Kind::Minio, 2);
    let kept = keepsake(&site.servers[0], "restart");
    let pushers = Pushers::start(&site.servers, 4);
    for _ in 0..2 {
        pushers.wait_for_more(15);
        let before = pushers.troubles();
        site.cluster.objects.kill();
        pushers.wait_for_trouble_since(before);
        site.cluster.objects.restart();
        pushers.wait_for_more(15);
    }
    site.lost_nothing(pushers, &kept);
}

#[test]
fn wrong_answers_to_reads_are_never_whole() {
    let (mut site, faults) = broken(Kind::Minio, 1);
    let server = &site.servers[0];
    let bytes = noise(61, 3 * MIB);
    let blob = image::push_blob(server.url(), "wrong/app", &bytes);
    let target = format!("/v2/wrong/app/blobs/{blob}");
    for at in [0, 1000, 2_900_000] {
        // The rest is asked for again: nobody notices.
        faults.next(1, "GET ", Fault::Truncate(at));
        holds(server, "wrong/app", &blob);
        faults.heal();
        // It stays short: an error, or an answer that breaks off; or it is whole, piece by piece.
        faults.always("GET ", Fault::Truncate(at));
        let mut connection = Connection::open(server.url()).unwrap();
        match connection.request("GET", &target, &[], &[]) {
            Ok(answer) if answer.status() == 200 => assert_eq!(digest(&answer.body), blob),
            Ok(answer) => in_trouble(&answer),
            Err(_) => {}
        }
        faults.heal();
        holds(server, "wrong/app", &blob);
    }
    for status in [403, 404, 500] {
        faults.always("GET ", Fault::Answer(status));
        let answer = server.get(&target);
        in_trouble(&answer);
        faults.heal();
    }
    // An outage is no damage: it reads as before.
    holds(server, "wrong/app", &blob);
    healthy(&mut site.servers);
}

#[test]
fn a_flipped_bit_on_the_way_to_the_store_is_never_acknowledged() {
    let (mut site, faults) = broken(Kind::Versitygw, 1);
    let server = &site.servers[0];
    for length in [100_000, 12 * MIB] {
        let bytes = noise(71 + length as u64, length);
        faults.always("PUT ", Fault::FlipRequest(length as u64 / 4));
        let target = format!("/v2/flip/app/blobs/uploads/?digest={}", digest(&bytes));
        let answer = server.request("POST", &target, &[], &bytes);
        in_trouble(&answer);
        let blob = format!("/v2/flip/app/blobs/{}", digest(&bytes));
        assert_eq!(server.get(&blob).status(), 404);
        faults.heal();
        let answer = server.request("POST", &target, &[], &bytes);
        assert_eq!(answer.status(), 201, "{}", answer.text());
        holds(server, "flip/app", &digest(&bytes));
    }
    healthy(&mut site.servers);
}

#[test]
fn a_store_that_ignores_conditions_serves_as_well_as_any() {
    for kind in Kind::ALL {
        let (mut site, faults) = broken(kind, 2);
        faults.always("", Fault::IgnoreConditions);
        let kept = keepsake(&site.servers[0], "ignore");
        let pushers = Pushers::start(&site.servers, 3);
        let layers: Vec<_> = (0..3).map(|seed| noise(seed + 80, 9 * MIB)).collect();
        thread::scope(|scope| {
            for number in 0..4 {
                let (server, layers) = (&site.servers[number % 2], &layers);
                scope.spawn(move || {
                    for layer in layers {
                        image::push_blob(server.url(), "ignore/app", layer);
                    }
                });
            }
        });
        pushers.wait_for_more(10);
        let pushed = pushers.finish();
        assert_eq!(pushed.refused, [""; 0]);
        pushed.all_there(&site.servers);
        for server in &site.servers {
            for layer in &layers {
                holds(server, "ignore/app", &digest(layer));
            }
            kept.readable(server);
        }
        healthy(&mut site.servers);
    }
}

#[test]
fn a_store_that_never_answers_is_left_and_asked_again() {
    let (mut site, faults) = broken(Kind::Minio, 1);
    let server = &site.servers[0];
    let kept = keepsake(server, "hang");
    let blob = image::push_blob(server.url(), "hang/app", &noise(62, MIB));
    // One request of each that nobody answers costs its time limit and no more.
    let before = faults.met();
    faults.next(1, "GET ", Fault::Hang);
    faults.next(1, "PUT ", Fault::Hang);
    thread::scope(|scope| {
        scope.spawn(|| holds(server, "hang/app", &blob));
        scope.spawn(|| image::push_blob(server.url(), "hang/app", &noise(63, MIB)));
    });
    assert_eq!(faults.met() - before, 2);
    faults.heal();
    // While none is answered, all that needs no object goes on; then so does what waits.
    let before = faults.met();
    faults.always("", Fault::Hang);
    let pushed = noise(64, MIB);
    thread::scope(|scope| {
        scope.spawn(|| holds(server, "hang/app", &blob));
        scope.spawn(|| image::push_blob(server.url(), "hang/app", &pushed));
        faults.wait_met(before);
        faults.wait_met(before + 1);
        let answer = server.get("/v2/kept/hang/manifests/large");
        assert_eq!(answer.status(), 200, "{}", answer.text());
        holds(server, "kept/hang", &kept.layers[0]);
        image::push_artifact(
            server.url(),
            "hang/app",
            "tiny",
            "application/vnd.example",
            b"tiny",
        );
        faults.heal();
    });
    holds(server, "hang/app", &digest(&pushed));
    kept.readable(server);
    healthy(&mut site.servers);
}

#[test]
fn wrong_bytes_from_the_store_are_built_on_by_nobody() {
    let cluster = Cluster::start(Kind::Minio);
    let faults = Faults::start(&cluster.objects.host());
    let mut storage = cluster.storage();
    storage.endpoint = faults.endpoint();
    let mut servers = replicas(&crate::options(&storage), 2);
    let bytes = noise(65, 300_000);
    let blob = image::push_blob(servers[0].url(), "bits/app", &bytes);
    let upload = open_upload(&servers[0], "bits/app");
    let whole = noise(66, 400_000);
    let answer = patch(&servers[0], &upload, 0, &whole[..300_000]);
    assert_eq!(answer.status(), 202, "{}", answer.text());

    faults.always("GET ", Fault::Flip(100_000));
    // What passes through is judged by whoever pulls.
    let path = format!("/v2/bits/app/blobs/{blob}");
    assert_ne!(digest(&servers[0].get(&path).body), blob);
    // A replica that goes on with an upload reads what is there so far, and does not build on it.
    let answer = patch(&servers[1], &upload, 300_000, &whole[300_000..]);
    in_trouble(&answer);
    faults.heal();
    for server in &servers {
        holds(server, "bits/app", &blob);
    }
    let at = wait_for("the upload on another replica", || {
        let status = servers[1].get(&upload);
        (status.status() == 204).then(|| usize::try_from(e2e::wire::offset_of(&status)).unwrap())
    });
    assert_eq!(at, 300_000);
    wait_for("the claim of the refused chunk", || {
        let answer = patch(&servers[1], &upload, at, &whole[at..]);
        assert!([202, 416].contains(&answer.status()), "{}", answer.text());
        (answer.status() == 202).then_some(())
    });
    let done = finish(&servers[1], &upload, &digest(&whole), &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    for server in &servers {
        holds(server, "bits/app", &blob);
        holds(server, "bits/app", &digest(&whole));
    }
    healthy(&mut servers);
}

#[test]
fn an_ok_over_an_error_completes_nothing() {
    for kind in Kind::ALL {
        let (mut site, faults) = broken(kind, 2);
        for (number, done) in [false, true].into_iter().enumerate() {
            let server = &site.servers[number];
            // Once: it is asked again, or looked for, and nobody notices.
            let bytes = noise(90 + number as u64, 12 * MIB);
            let met = faults.met();
            faults.next(1, "?uploadId=", Fault::OkWithError { done });
            let blob = image::push_blob(server.url(), "okay/app", &bytes);
            assert!(faults.met() > met, "no completion was broken");
            holds(server, "okay/app", &blob);
            faults.heal();
            // Always: it is said, nothing is there, and a later push is whole.
            let bytes = noise(95 + number as u64, 12 * MIB);
            let target = format!("/v2/okay/app/blobs/uploads/?digest={}", digest(&bytes));
            let met = faults.met();
            faults.always("?uploadId=", Fault::OkWithError { done });
            let answer = server.request("POST", &target, &[], &bytes);
            let acknowledged = answer.status() == 201;
            if !acknowledged {
                in_trouble(&answer);
            }
            // What the store did may be found by a look at the object, and by nothing else.
            assert!(done || !acknowledged, "{}", answer.text());
            assert!(faults.met() > met, "no completion was broken");
            let blob = format!("/v2/okay/app/blobs/{}", digest(&bytes));
            let wanted = if acknowledged { 200 } else { 404 };
            assert_eq!(server.request("HEAD", &blob, &[], &[]).status(), wanted);
            faults.heal();
            let answer = server.request("POST", &target, &[], &bytes);
            assert_eq!(answer.status(), 201, "{}", answer.text());
            for server in &site.servers {
                holds(server, "okay/app", &digest(&bytes));
            }
        }
        healthy(&mut site.servers);
        verify(&site.storage);
    }
}

#[test]
fn a_wrong_etag_of_a_part_makes_no_wrong_blob() {
    for kind in Kind::ALL {
        let (mut site, faults) = broken(kind, 1);
        let server = &site.servers[0];
        let bytes = noise(101, 14 * MIB);
        let wanted = digest(&bytes);
        let target = format!("/v2/etag/app/blobs/uploads/?digest={wanted}");
        let met = faults.met();
        faults.next(1, "partNumber=", Fault::WrongEtag);
        let answer = server.request("POST", &target, &[], &bytes);
        assert!(faults.met() > met, "no part was broken");
        if answer.status() != 201 {
            // A store that refuses the parts has let the upload go.
            if answer.status() != 404 {
                in_trouble(&answer);
            }
            let blob = format!("/v2/etag/app/blobs/{wanted}");
            assert_eq!(server.get(&blob).status(), 404);
        }
        faults.heal();
        let answer = server.request("POST", &target, &[], &bytes);
        assert_eq!(answer.status(), 201, "{}", answer.text());
        holds(server, "etag/app", &wanted);
        // Of whole objects and of reads nobody asks it.
        faults.always("", Fault::WrongEtag);
        let blob = image::push_blob(server.url(), "etag/app", &noise(102, 300_000));
        holds(server, "etag/app", &blob);
        faults.heal();
        holds(server, "etag/app", &blob);
        healthy(&mut site.servers);
        verify(&site.storage);
    }
}
