//! Two writers of one upload, cut connections, kills.

use std::thread;

use e2e::http::Connection;
use e2e::{Server, digest};

use crate::{
    connect, finish, healthy, holds, noise, offset_of, open_upload, patch, range, verify, wait_for,
};

/// How often the race is run; the long run is 1000.
const RACES: &str = "LONGSHORE_E2E_RACES";
const FIRST: usize = 24 * 1024;

/// Sends a chunk in two halves with `between` in the middle, and gives back the status.
fn send(
    connection: &mut Connection,
    upload: &str,
    bytes: &[u8],
    between: impl FnOnce(),
) -> std::io::Result<u16> {
    let range = range(FIRST, bytes.len());
    let half = bytes.len() / 2;
    connection.send_head(
        "PATCH",
        upload,
        &[("Content-Range", &range)],
        Some(bytes.len() as u64),
    )?;
    connection.send_body(&bytes[..half])?;
    between();
    connection.send_body(&bytes[half..])?;
    let head = connection.receive_head("PATCH")?;
    connection.receive_body(&head, |_| {})?;
    Ok(head.status)
}

#[test]
fn of_two_chunks_at_one_offset_one_is_taken() {
    let rounds: u64 = std::env::var(RACES).map_or(100, |text| text.parse().unwrap());
    let mut server = Server::start();
    let (mut slow_won, mut fast_won) = (0, 0);
    for round in 0..rounds {
        let first = noise(round, FIRST);
        // Small and large ones, so that bodies in the row and bodies in an object take part.
        let length = 1024 << (round % 9);
        let chunks = [noise(round * 2 + 7, length), noise(round * 2 + 8, length)];
        let upload = open_upload(&server, "race/one");
        assert_eq!(patch(&server, &upload, 0, &first).status(), 202);

        let mut statuses = [0, 0];
        if round % 3 == 2 {
            // Both at once: nobody orders them.
            thread::scope(|scope| {
                let [a, b] = chunks.each_ref().map(|chunk| {
                    let (upload, mut connection) = (&upload, connect(&server));
                    scope.spawn(move || send(&mut connection, upload, chunk, || {}))
                });
                statuses = [a.join().unwrap().unwrap(), b.join().unwrap().unwrap()];
            });
        } else {
            // The fast one comes and goes while the slow one is in the middle of its body.
            let mut slow = connect(&server);
            let mut fast = 0;
            statuses[0] = send(&mut slow, &upload, &chunks[0], || {
                let mut connection = connect(&server);
                fast = send(&mut connection, &upload, &chunks[1], || {}).unwrap();
            })
            .unwrap();
            statuses[1] = fast;
        }
        let winner = match statuses {
            [202, 416] => 0,
            [416, 202] => 1,
            other => panic!("round {round}: {other:?}\n{}", server.logged()),
        };
        if winner == 0 {
            slow_won += 1;
        } else {
            fast_won += 1;
        }
        let status = server.get(&upload);
        assert_eq!(offset_of(&status), (FIRST + length) as u64, "round {round}");
        let whole = [first.as_slice(), &chunks[winner]].concat();
        let wanted = digest(&whole);
        let done = finish(&server, &upload, &wanted, &[]);
        assert_eq!(done.status(), 201, "round {round}: {}", done.text());
        holds(&server, "race/one", &wanted);
    }
    eprintln!("{rounds} races: the first connection won {slow_won}, the second {fast_won}");
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn a_chunk_that_breaks_off_races_with_its_own_continuation() {
    let mut server = Server::start();
    for round in 0..30u32 {
        let whole = noise(u64::from(round) + 1000, 3 << 20);
        let cut = 2 + (usize::try_from(round).unwrap() * 97_001) % whole.len();
        let upload = open_upload(&server, "race/cut");
        let mut broken = connect(&server);
        let all = range(0, whole.len());
        broken
            .send_head(
                "PATCH",
                &upload,
                &[("Content-Range", &all)],
                Some(whole.len() as u64),
            )
            .unwrap();
        broken.send_body(&whole[..cut]).unwrap();
        drop(broken);
        // A client does what this does: ask, go on there, and ask again when somebody has it still.
        wait_for("the end of the upload", || {
            let at = usize::try_from(offset_of(&server.get(&upload))).unwrap();
            assert!(at <= cut, "{at} of {cut}");
            let answer = patch(&server, &upload, at, &whole[at..]);
            match answer.status() {
                202 => Some(()),
                416 => None,
                other => panic!("{other}: {}", answer.text()),
            }
        });
        let wanted = digest(&whole);
        assert_eq!(finish(&server, &upload, &wanted, &[]).status(), 201);
        holds(&server, "race/cut", &wanted);
    }
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn cancel_and_finish_race_and_one_of_them_happens() {
    let mut server = Server::start();
    for round in 0..60 {
        let bytes = noise(round + 2000, 200_000);
        let wanted = digest(&bytes);
        let upload = open_upload(&server, "race/cancel");
        assert_eq!(patch(&server, &upload, 0, &bytes).status(), 202);
        let (finished, cancelled) = thread::scope(|scope| {
            let finished = scope.spawn(|| finish(&server, &upload, &wanted, &[]).status());
            let cancelled = scope.spawn(|| server.request("DELETE", &upload, &[], &[]).status());
            (finished.join().unwrap(), cancelled.join().unwrap())
        });
        match (finished, cancelled) {
            (201, 404 | 416) => holds(&server, "race/cancel", &wanted),
            (404, 204) => {
                let answer = server.get(&format!("/v2/race/cancel/blobs/{wanted}"));
                assert_eq!(answer.status(), 404);
            }
            // Both were told of each other: nothing happened, and it can be finished.
            (416, 204) => assert_eq!(server.get(&upload).status(), 404),
            other => panic!("round {round}: {other:?}"),
        }
    }
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

const MIB: usize = 1 << 20;

/// Sends the beginning of a chunk of which the rest never comes.
fn begin(server: &Server, upload: &str, first: usize, whole: &[u8], end: usize) -> Connection {
    let mut connection = connect(server);
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

/// Goes on where the status says and wants the whole to be what was meant.
fn resume(server: &Server, upload: &str, whole: &[u8], at_least: usize, at_most: usize) {
    let status = server.get(upload);
    assert_eq!(status.status(), 204, "{}", status.text());
    let at = usize::try_from(offset_of(&status)).unwrap();
    assert!(
        (at_least..=at_most).contains(&at),
        "{at} is not in {at_least}..={at_most}"
    );
    let rest = patch(server, upload, at, &whole[at..]);
    assert_eq!(rest.status(), 202, "{}", rest.text());
    let wanted = digest(whole);
    let done = finish(server, upload, &wanted, &[]);
    assert_eq!(done.status(), 201, "{}", done.text());
    holds(server, "kill/one", &wanted);
}

#[test]
fn a_chunk_cut_at_37_of_100_mib_and_a_kill_go_on_at_a_true_offset() {
    let whole = noise(37, 100 * MIB);
    let mut server = Server::start();

    // Cut first: what came is recorded, and the kill takes nothing of it.
    let upload = open_upload(&server, "kill/one");
    drop(begin(&server, &upload, 0, &whole, 37 * MIB));
    wait_for("the record of what came", || {
        (offset_of(&server.get(&upload)) == 37 * MIB as u64).then_some(())
    });
    server.restart();
    resume(&server, &upload, &whole, 37 * MIB, 37 * MIB);
    verify(server.data());

    // Killed in the middle of the chunk: what was recorded before is true.
    let other = noise(38, 100 * MIB);
    let upload = open_upload(&server, "kill/one");
    assert_eq!(patch(&server, &upload, 0, &other[..10 * MIB]).status(), 202);
    let sending = begin(&server, &upload, 10 * MIB, &other, 37 * MIB);
    server.restart();
    drop(sending);
    resume(&server, &upload, &other, 10 * MIB, 37 * MIB);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}
