//! Replicas over one PostgreSQL: they see one another's events in order, and no failure of the database loses what was
//! acknowledged or does something twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use oci::{Descriptor, Digest, RepositoryName};
use rustix::process::Signal;
use store::{Error, Event, Expected, Options, PutManifest, Store, TagWrite};
use tokio::sync::watch;
use tokio_postgres::Client;

use crate::engine::{by_tag, content, image, name, push_blob, put_of, tag, write_of};
use crate::postgres::{Server, connect};

/// Replicas, each with a directory of its own: what they store here is small enough for rows.
struct Replicas {
    stores: Vec<Store>,
    directories: Vec<tempfile::TempDir>,
}

async fn replicas(url: &str, count: usize) -> Replicas {
    more_replicas(url, count, None).await
}

/// The same for a store that has some already.
async fn more_replicas(url: &str, count: usize, of: Option<&Replicas>) -> Replicas {
    let mut replicas = Replicas {
        stores: Vec::new(),
        directories: Vec::new(),
    };
    let of = of.map(|of| of.directories[0].path().join("data"));
    for _ in 0..count {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let first = replicas.directories.first();
        if let Some(first) = of.clone().or(first.map(|first| first.path().join("data"))) {
            same_place(&first, &path);
        }
        let store = Store::open_on_postgres(&path, url, Options::default()).await;
        replicas.stores.push(store.unwrap());
        replicas.directories.push(directory);
    }
    replicas
}

/// Makes a directory for the objects of a replica pass for that of another: one directory for both would be locked.
pub(crate) fn same_place(of: &std::path::Path, directory: &std::path::Path) {
    std::fs::create_dir(directory).unwrap();
    std::fs::copy(of.join("store"), directory.join("store")).unwrap();
}

/// A configuration that every manifest of these tests names.
async fn config(store: &Store) -> Descriptor {
    push_blob(store, &repository(), &content(1, 50)).await
}

fn repository() -> RepositoryName {
    name("team/app")
}

/// A push of a manifest of its own with these tags.
fn push(config: &Descriptor, label: impl ToString, tags: &[&str]) -> PutManifest {
    let mut view = image(config, &[]);
    view.annotations
        .insert("label".to_owned(), label.to_string());
    put_of(&repository(), &view, tags)
}

/// The same, when the tag is in this state.
fn push_when(
    config: &Descriptor,
    label: impl ToString,
    tag: &str,
    expected: Expected,
) -> PutManifest {
    let mut put = push(config, label, &[]);
    put.tags = vec![TagWrite {
        expected,
        ..write_of(tag)
    }];
    put
}

async fn moves(store: &Store, text: &str) -> usize {
    let history = store
        .tag_history(&repository(), &tag(text), None, 100_000)
        .await;
    history.unwrap().len()
}

/// Follows the events as a stream does, up to the number that is told in the end.
async fn follow(store: Store, from: i64, mut last: watch::Receiver<i64>) -> Vec<Event> {
    let mut signal = store.event_signal();
    let mut events: Vec<Event> = Vec::new();
    loop {
        signal.mark_unchanged();
        let position = events.last().map_or(from, |event| event.number);
        if position == *last.borrow_and_update() {
            return events;
        }
        let more = store.events_after(position, 256).await.unwrap();
        if more.is_empty() {
            tokio::select! {
                changed = signal.changed() => changed.unwrap(),
                changed = last.changed() => changed.unwrap(),
            }
        }
        events.extend(more);
    }
}

/// Every event after `from`, read by a replica once all are numbered.
async fn events(store: &Store, from: i64) -> Vec<Event> {
    store.seal().await.unwrap();
    let newest = store.event_bounds().await.unwrap().newest;
    let (_sender, last) = watch::channel(newest);
    follow(store.clone(), from, last).await
}

/// Every number once and in order, and every tag's moves in the order in which they happened.
fn assert_in_order(events: &[Event], from: i64) {
    let mut pointed: BTreeMap<(String, String), Digest> = BTreeMap::new();
    let mut written: BTreeMap<&str, usize> = BTreeMap::new();
    for (event, number) in events.iter().zip(from + 1..) {
        assert_eq!(event.number, number);
        if let Ok(count) = event.media_type.parse::<usize>() {
            let next = written.entry(&event.actor).or_default();
            assert_eq!(count, *next, "{event:?}");
            *next += 1;
        }
        let Some(tag) = &event.tag else {
            continue;
        };
        let key = (event.repository.to_string(), tag.to_string());
        assert_eq!(pointed.get(&key), event.previous.as_ref(), "{event:?}");
        pointed.insert(key, event.digest.clone());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_every_replica_reach_every_reader_once_and_in_order() {
    const WRITERS: usize = 8;
    const PUTS: usize = 20;
    const BATCH: usize = 60;
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 2).await;
    let [one, two] = &replicas.stores[..] else {
        panic!("two replicas");
    };
    let config = config(one).await;
    let from = events(one, 0).await.len() as i64;
    let (end, last) = watch::channel(-1);
    let readers = [one, two].map(|store| tokio::spawn(follow(store.clone(), from, last.clone())));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = replicas.stores[writer % 2].clone();
            let (config, url) = (config.clone(), url.clone());
            tokio::spawn(async move {
                let client = connect(&url).await;
                for turn in 0..PUTS {
                    // Most of the ten thousand are written as the store writes them, beside it.
                    let first = turn * BATCH;
                    let batch = format!(
                        "INSERT INTO event (kind, repository, digest, media_type, actor, request, at) \
                         SELECT 'manifest.pushed', 'team/other', decode('01' || repeat('00', 32), 'hex'), \
                             n::text, 'writer-{writer}', '', 0 FROM generate_series({first}, {}) n",
                        first + BATCH - 1
                    );
                    client.batch_execute(&batch).await.unwrap();
                    let (own, more) = (format!("a{writer}"), format!("b{writer}"));
                    let put = push(&config, format!("{writer}-{turn}"), &[&own, &more]);
                    store.put_manifest(put).await.unwrap();
                    // And a tag that everybody moves.
                    let put = push(&config, format!("shared-{writer}-{turn}"), &["shared"]);
                    store.put_manifest(put).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    one.seal().await.unwrap();
    let newest = one.event_bounds().await.unwrap().newest;
    end.send_replace(newest);
    for reader in readers {
        let events = reader.await.unwrap();
        assert_eq!(events.len(), WRITERS * PUTS * (BATCH + 3 + 2));
        assert_eq!(events.len() as i64, newest - from);
        assert_in_order(&events, from);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_64_compare_and_set_writes_over_two_replicas_wins() {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 2).await;
    let store = &replicas.stores[0];
    let config = config(store).await;
    let start = push(&config, "start", &["prod"]);
    let expected = Expected::Digest(vec![start.digest.clone()]);
    store.put_manifest(start).await.unwrap();
    let writers: Vec<_> = (0..64)
        .map(|number| {
            let store = replicas.stores[number % 2].clone();
            let race = push_when(&config, number, "prod", expected.clone());
            tokio::spawn(async move { store.put_manifest(race).await })
        })
        .collect();
    let mut won = 0;
    for writer in writers {
        match writer.await.unwrap() {
            Ok(_) => won += 1,
            Err(Error::Precondition { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(won, 1);
}

/// How far the writers are.
#[derive(Default)]
struct Progress {
    moved: AtomicUsize,
    stop: AtomicBool,
}

impl Progress {
    /// Waits until so many more moves were made.
    async fn more(&self, moves: usize) {
        let begun = tokio::time::Instant::now();
        let end = self.moved.load(Ordering::Relaxed) + moves;
        while self.moved.load(Ordering::Relaxed) < end {
            assert!(begun.elapsed() < Duration::from_mins(1), "nobody writes");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Moves a tag of its own from state to state, each time from the state that it knows, until told to stop. A move that
/// was lost or happened twice would be refused as a wrong state.
async fn move_on(
    store: Store,
    own: String,
    config: Descriptor,
    progress: Arc<Progress>,
) -> (usize, usize) {
    let mut expected = Expected::Absent;
    let (mut moved, mut refused) = (0, 0);
    while !progress.stop.load(Ordering::Relaxed) {
        let put = push_when(&config, format!("{own}-{moved}"), &own, expected.clone());
        let next = Expected::Digest(vec![put.digest.clone()]);
        match store.put_manifest(put).await {
            Ok(_) => {
                expected = next;
                moved += 1;
                progress.moved.fetch_add(1, Ordering::Relaxed);
            }
            // Then it must be true that nothing happened.
            Err(Error::Unavailable { problem, .. }) if !problem.contains("whether it stands") => {
                refused += 1;
            }
            Err(other) => panic!("after {moved} moves: {other}"),
        }
    }
    assert_eq!(moves(&store, &own).await, moved, "{own}");
    (moved, refused)
}

/// Runs writers over two replicas while `trouble` goes on; how many moves there were, and how many were refused.
async fn under(trouble: impl AsyncFnOnce(&Progress), replicas: &Replicas) -> (usize, usize) {
    let config = config(&replicas.stores[0]).await;
    let progress = Arc::<Progress>::default();
    let writers: Vec<_> = (0..6)
        .map(|writer| {
            tokio::spawn(move_on(
                replicas.stores[writer % 2].clone(),
                format!("w{writer}"),
                config.clone(),
                Arc::clone(&progress),
            ))
        })
        .collect();
    trouble(&progress).await;
    progress.stop.store(true, Ordering::Relaxed);
    let (mut moved, mut refused) = (0, 0);
    for writer in writers {
        let (more, less) = writer.await.unwrap();
        (moved, refused) = (moved + more, refused + less);
    }
    let one = &replicas.stores[0];
    let events = events(one, 0).await;
    assert_eq!(events.len(), 2 * moved);
    assert_in_order(&events, 0);
    let report = one.verify_open().await.unwrap();
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    (moved, refused)
}

const OTHERS: &str =
    "FROM pg_stat_activity WHERE application_name = 'longshore' AND pid <> pg_backend_pid()";

async fn count(client: &Client, statement: &str) -> i64 {
    client.query_one(statement, &[]).await.unwrap().get(0)
}

/// Waits until a session of the store waits for what `event` names; its process id.
pub(crate) async fn waiting(client: &Client, event: &str) -> i32 {
    let begun = tokio::time::Instant::now();
    loop {
        assert!(
            begun.elapsed() < Duration::from_mins(1),
            "nobody waits for {event}"
        );
        let found = client
            .query_opt(
                &format!("SELECT pid {OTHERS} AND wait_event = $1 LIMIT 1"),
                &[&event],
            )
            .await
            .unwrap();
        if let Some(row) = found {
            return row.get(0);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_ended_lose_nothing_and_repeat_nothing() {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 2).await;
    let admin = connect(&url).await;
    let trouble = async |progress: &Progress| {
        for _ in 0..20 {
            admin
                .batch_execute(&format!("SELECT pg_terminate_backend(pid) {OTHERS}"))
                .await
                .unwrap();
            progress.more(3).await;
        }
    };
    let (_, refused) = under(trouble, &replicas).await;
    assert_eq!(refused, 0, "the server was there all the time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_and_a_crash_of_the_server_lose_nothing() {
    let mut server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 2).await;
    let trouble = async |progress: &Progress| {
        for signal in [Signal::INT, Signal::QUIT, Signal::INT, Signal::QUIT] {
            progress.more(10).await;
            server.stop(signal);
            server.go().await;
        }
        progress.more(10).await;
    };
    under(trouble, &replicas).await;
    server.stop(Signal::INT);
    let away = replicas.stores[0].ping().await;
    assert!(matches!(away, Err(Error::Unavailable { .. })), "{away:?}");
    server.go().await;
    // It comes back by itself.
    while replicas.stores[0].ping().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// COMMIT waits for a standby that does not exist: there a connection can be ended for certain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_was_lost_is_found_out() {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 1).await;
    let store = &replicas.stores[0];
    let config = config(store).await;
    store.seal().await.unwrap();
    let admin = connect(&url).await;
    admin
        .batch_execute("SET synchronous_commit = local")
        .await
        .unwrap();
    let standbys = async |names: &str| {
        admin
            .batch_execute(&format!(
                "ALTER SYSTEM SET synchronous_standby_names = '{names}'"
            ))
            .await
            .unwrap();
        admin
            .batch_execute("SELECT pg_reload_conf()")
            .await
            .unwrap();
    };
    for (end, text) in [
        ("pg_terminate_backend", "ended"),
        // Then the server reports success with a warning that the standby did not confirm it.
        ("pg_cancel_backend", "cancelled"),
    ] {
        standbys("absent").await;
        let put = push_when(&config, text, text, Expected::Absent);
        let writing = tokio::spawn({
            let store = store.clone();
            async move { store.put_manifest(put).await }
        });
        let pid = waiting(&admin, "SyncRep").await;
        admin
            .execute(&format!("SELECT {end}($1)"), &[&pid])
            .await
            .unwrap();
        // Whoever asks for the outcome waits for the standby as well: no answer without it.
        while waiting(&admin, "SyncRep").await == pid {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!writing.is_finished());
        standbys("").await;
        writing.await.unwrap().unwrap();
        assert_eq!(moves(store, text).await, 1);
    }
    // Ended before COMMIT: it runs again, and once.
    let locker = connect(&url).await;
    locker
        .batch_execute("BEGIN; LOCK TABLE audit IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let put = push_when(&config, "early", "early", Expected::Absent);
    let writing = tokio::spawn({
        let store = store.clone();
        async move { store.put_manifest(put).await }
    });
    let pid = waiting(&admin, "relation").await;
    admin
        .execute("SELECT pg_terminate_backend($1)", &[&pid])
        .await
        .unwrap();
    while waiting(&admin, "relation").await == pid {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    locker.batch_execute("COMMIT").await.unwrap();
    writing.await.unwrap().unwrap();
    assert_eq!(moves(store, "early").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_fence_nothing_is_committed() {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 1).await;
    let store = &replicas.stores[0];
    let config = config(store).await;
    store.seal().await.unwrap();
    let admin = connect(&url).await;
    // As after a loss that was asked about while the COMMIT was still under way.
    let fenced = admin
        .execute(
            "UPDATE commit_mark SET last = -1 - last WHERE last > 0",
            &[],
        )
        .await
        .unwrap();
    assert!(fenced > 0);
    let mut refused = 0;
    for number in 0..=fenced {
        let text = format!("t{number}");
        match store.put_manifest(push(&config, number, &[&text])).await {
            Ok(_) => {}
            Err(error) => {
                assert!(matches!(error, Error::Database(_)), "{error}");
                refused += 1;
                let there = store.manifest(&repository(), &by_tag(&text)).await;
                assert!(there.unwrap().is_none());
            }
        }
    }
    assert!(refused > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealer_that_dies_in_the_middle_leaves_no_gap() {
    let server = Server::start().await;
    let url = server.database("longshore").await;
    let replicas = replicas(&url, 2).await;
    let [one, two] = &replicas.stores[..] else {
        panic!("two replicas");
    };
    let config = config(one).await;
    one.seal().await.unwrap();
    let from = one.event_bounds().await.unwrap().newest;
    let (_sender, last) = watch::channel(from + 20);
    let reader = tokio::spawn(follow(two.clone(), from, last));
    let (admin, locker) = (connect(&url).await, connect(&url).await);
    for round in 0..2 {
        // The sealer has found its events and cannot take numbers for them.
        locker
            .batch_execute("BEGIN; UPDATE counter SET value = value WHERE name = 'event'")
            .await
            .unwrap();
        let tags: Vec<_> = (0..9).map(|n| format!("r{round}-{n}")).collect();
        let tags: Vec<_> = tags.iter().map(String::as_str).collect();
        one.put_manifest(push(&config, round, &tags)).await.unwrap();
        let pid = waiting(&admin, "transactionid").await;
        admin
            .execute("SELECT pg_terminate_backend($1)", &[&pid])
            .await
            .unwrap();
        locker.batch_execute("COMMIT").await.unwrap();
    }
    assert_in_order(&reader.await.unwrap(), from);
    assert_eq!(
        count(&admin, "SELECT COUNT(*) FROM event WHERE number IS NULL").await,
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_answers_reads_and_takes_over() {
    let mut primary = Server::start().await;
    primary.database("longshore").await;
    let made = replicas(&primary.url("longshore"), 1).await;
    let config = config(&made.stores[0]).await;
    let first = push(&config, 1, &["v1"]);
    made.stores[0].put_manifest(first).await.unwrap();
    made.stores[0].seal().await.unwrap();
    made.stores[0].clone().close().await.unwrap();
    let standby = primary.standby().await;
    let url = Server::url_of(&[&standby, &primary], "longshore");
    // The first host is the standby: whoever writes goes on to the second.
    let both = more_replicas(&url, 1, Some(&made)).await;
    let store = &both.stores[0];
    let second = push(&config, 2, &["v2"]);
    store.put_manifest(second.clone()).await.unwrap();
    let there = connect(&standby.url("longshore")).await;
    while count(&there, "SELECT COUNT(*) FROM tag").await < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    primary.stop(Signal::QUIT);
    let read = store.manifest(&repository(), &by_tag("v2")).await;
    assert_eq!(read.unwrap().unwrap().digest, second.digest);
    let late = push(&config, 3, &["v3"]);
    let refused = store.put_manifest(late.clone()).await;
    assert!(
        matches!(
            refused,
            Err(Error::ReadOnly { .. } | Error::Unavailable { .. })
        ),
        "{refused:?}"
    );
    // A replica that starts now serves what is there.
    let fresh = more_replicas(&url, 1, Some(&made)).await;
    let read = fresh.stores[0].manifest(&repository(), &by_tag("v1")).await;
    assert!(read.unwrap().is_some());
    store.ping().await.unwrap();

    // A write that waits while the standby is promoted is served.
    let waiting = tokio::spawn({
        let store = fresh.stores[0].clone();
        async move { store.put_manifest(late).await }
    });
    there.execute("SELECT pg_promote()", &[]).await.unwrap();
    waiting.await.unwrap().unwrap();
    assert_eq!(
        store.tags(&repository(), None, 10).await.unwrap(),
        ["v1", "v2", "v3"]
    );
}
