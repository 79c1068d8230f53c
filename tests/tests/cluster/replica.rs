//! A replica stops in the middle of a push; another one goes on.

use e2e::http::Connection;
use e2e::objects::Kind;
use e2e::server::signal;
use e2e::wire::{finish, holds, noise, offset_of, open_upload, patch, range, wait_for};
use e2e::{Server, digest};
use rustix::process::Signal;

use crate::{Site, healthy};

const MIB: usize = 1 << 20;

/// Sends the beginning of a chunk of which the rest comes later, or never.
fn begin(server: &Server, upload: &str, first: usize, whole: &[u8], end: usize) -> Connection {
    let mut connection = Connection::open(server.url()).unwrap();
    let range = range(first, whole.len() - first);
    connection
        .send_head(
            "PATCH",
            upload,
            &[("Content-Range", &range)],
            Some((whole.len() - first) as u64),
        )
        .unwrap();
    connection.send_body(&whole[first..end]).unwrap();
    connection
}

/// Goes on through another replica as clients do: ask, send what is missing, ask again while somebody has it.
fn resume(server: &Server, repository: &str, upload: &str, whole: &[u8], at_least: usize) {
    wait_for("the end of the stopped replica's claim", || {
        let status = server.get(upload);
        assert_eq!(status.status(), 204, "{}", status.text());
        let at = usize::try_from(offset_of(&status)).unwrap();
        assert!((at_least..whole.len()).contains(&at), "{at}");
        let range = range(at, whole.len() - at);
        let answer = Connection::open(server.url()).unwrap().request(
            "PATCH",
            upload,
            &[("Content-Range", &range)],
            &whole[at..],
        );
        match answer {
            Ok(answer) if answer.status() == 202 => Some(()),
            Ok(answer) if answer.status() != 416 => {
                panic!("{} {}", answer.status(), answer.text())
            }
            // Refused before all was sent, which may end the connection.
            _ => {
                std::thread::sleep(std::time::Duration::from_millis(500));
                None
            }
        }
    });
    let wanted = digest(whole);
    let done = finish(server, upload, &wanted, &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    holds(server, repository, &wanted);
}

#[test]
fn an_upload_goes_from_replica_to_replica() {
    for kind in Kind::ALL {
        let mut site = Site::start(kind, 3);
        // Below and above what one part of a multipart upload must have, and what stays in a row.
        for (number, length) in [4_000, 100_000, 9 * MIB, 23 * MIB].into_iter().enumerate() {
            let whole = noise(number as u64 + 300, length);
            let upload = open_upload(&site.servers[0], "roam/app");
            let mut at = 0;
            for (turn, part) in [3, 5, 2, 7, 1].into_iter().enumerate() {
                let end = if turn == 4 {
                    length
                } else {
                    (at + length * part / 18).min(length)
                };
                let server = &site.servers[turn % 3];
                let answer = patch(server, &upload, at, &whole[at..end]);
                assert_eq!(answer.status(), 202, "{}", answer.text());
                at = end;
                let next = &site.servers[(turn + 1) % 3];
                assert_eq!(offset_of(&next.get(&upload)), at as u64);
            }
            let wanted = digest(&whole);
            let done = finish(&site.servers[2], &upload, &wanted, &[]);
            assert_eq!(done.status(), 201, "{}", done.text());
            for server in &site.servers {
                holds(server, "roam/app", &wanted);
            }
        }
        healthy(&mut site.servers);
    }
}

#[test]
fn a_replica_killed_in_the_middle_of_a_chunk_hands_its_upload_on() {
    let mut site = Site::start(Kind::Minio, 2);
    let whole = noise(41, 30 * MIB);
    let upload = open_upload(&site.servers[0], "kill/app");
    assert_eq!(
        patch(&site.servers[0], &upload, 0, &whole[..7 * MIB]).status(),
        202
    );
    let sending = begin(&site.servers[0], &upload, 7 * MIB, &whole, 19 * MIB);
    site.servers[0].kill();
    drop(sending);
    // At once, and once: the other replica waits for the end of the claim itself.
    let other = &site.servers[1];
    let status = other.get(&upload);
    assert_eq!(status.status(), 204, "{}", status.text());
    let at = usize::try_from(offset_of(&status)).unwrap();
    assert!((7 * MIB..19 * MIB).contains(&at), "{at}");
    let answer = patch(other, &upload, at, &whole[at..]);
    assert_eq!(answer.status(), 202, "{}", answer.text());
    let wanted = digest(&whole);
    let done = finish(other, &upload, &wanted, &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    holds(other, "kill/app", &wanted);
    site.servers[0].restart();
    holds(&site.servers[0], "kill/app", &digest(&whole));
    healthy(&mut site.servers);
}

#[test]
fn a_replica_that_stood_still_never_writes_to_an_upload_it_lost() {
    let mut site = Site::start(Kind::Versitygw, 2);
    let whole = noise(42, 30 * MIB);
    // What the one that stands still would write is other than what is meant.
    let mut other = whole.clone();
    other[7 * MIB..].reverse();
    let upload = open_upload(&site.servers[0], "still/app");
    assert_eq!(
        patch(&site.servers[0], &upload, 0, &whole[..7 * MIB]).status(),
        202
    );
    let mut sending = begin(&site.servers[0], &upload, 7 * MIB, &other, 9 * MIB);
    signal(site.servers[0].pid(), Signal::STOP);
    let rest = other[9 * MIB..].to_vec();
    // It waits in the connection, and goes on when the replica does.
    let late = std::thread::spawn(move || {
        let sent = sending.send_body(&rest);
        sent.and_then(|()| sending.receive_head("PATCH"))
            .map(|head| head.status)
    });
    // What the stopped one had recorded of its chunk is true as well: only then the wanted bytes fit.
    let status = site.servers[1].get(&upload);
    let at = usize::try_from(offset_of(&status)).unwrap();
    let mut wanted = whole.clone();
    wanted[7 * MIB..at].copy_from_slice(&other[7 * MIB..at]);
    resume(&site.servers[1], "still/app", &upload, &wanted, 7 * MIB);
    signal(site.servers[0].pid(), Signal::CONT);
    // It is told that it lost, or cut off; never that its bytes were taken.
    if let Ok(status) = late.join().unwrap() {
        assert!(status >= 400, "{status}");
    }
    for server in &site.servers {
        holds(server, "still/app", &digest(&wanted));
    }
    healthy(&mut site.servers);
}
