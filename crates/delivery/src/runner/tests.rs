use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::attempt;
use crate::testing::{Fake, target};

struct Started {
    handle: Handle,
    // Kept: the runner looks at it.
    _stream: watch::Sender<bool>,
    runner: Runner,
}

fn open_with(fake: &Fake, state: &Path, target: Target) -> Started {
    let (stream, up) = watch::channel(false);
    let setup = Setup {
        target: Arc::new(target),
        source: Arc::new(fake.clone()),
        engine: Some(Arc::new(fake.clone())),
        poll: Duration::from_mins(1),
        safety_poll: Duration::from_mins(10),
        reporter: reporter::Handle::default(),
    };
    let paths = Paths::new(state, "shop");
    let (runner, handle) = Runner::open(setup, paths, Arc::new(fake.clone()), up).unwrap();
    Started {
        handle,
        _stream: stream,
        runner,
    }
}

/// Runs until the condition holds, then drops the runner wherever it is.
async fn run_until(
    fake: &Fake,
    state: &Path,
    mut condition: impl FnMut(&TargetStatus) -> bool,
) -> TargetStatus {
    let Started {
        mut handle,
        _stream,
        runner,
    } = open_with(fake, state, target());
    let work = runner.run(CancellationToken::new());
    tokio::pin!(work);
    let watching = async {
        loop {
            let status = handle.status.borrow_and_update().clone();
            if condition(&status) {
                return status;
            }
            // What the test waits for may be a call that changes no status.
            let _ = tokio::time::timeout(Duration::from_secs(1), handle.status.changed()).await;
        }
    };
    tokio::select! {
        () = &mut work => unreachable!("nobody stopped it"),
        status = tokio::time::timeout(Duration::from_hours(10), watching) => status.expect("it comes about in time"),
    }
}

fn is(state: &'static str) -> impl Fn(&TargetStatus) -> bool {
    move |status| status.state == state
}

#[tokio::test(start_paused = true)]
async fn a_release_becomes_good_and_an_unchanged_digest_downloads_nothing() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    let status = run_until(&fake, state.path(), is("good")).await;
    assert_eq!(status.running.unwrap().version.as_deref(), Some("v1"));
    assert_eq!(status.good, vec![v1.clone()]);
    let history = attempt::history(&Paths::new(state.path(), "shop").ledger(), 10).unwrap();
    assert_eq!(history[0].outcome.as_deref(), Some("good"));
    // Ten more polls, by a new process.
    let written = std::fs::metadata(state.path().join("targets/shop/state.json")).unwrap();
    let before = fake.world().calls.len();
    let heads = fake.count("head");
    run_until(&fake, state.path(), |_| fake.count("head") >= heads + 10).await;
    let calls: BTreeSet<&str> = fake.world().calls[before..].iter().copied().collect();
    assert_eq!(calls, BTreeSet::from(["head", "observe"]));
    let now = std::fs::metadata(state.path().join("targets/shop/state.json")).unwrap();
    assert_eq!(written.modified().unwrap(), now.modified().unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_unhealthy_release_is_rolled_back_with_the_registry_down() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    let v2 = fake.push("v2");
    fake.world().unhealthy.insert(v2.to_string());
    // The registry goes away as soon as the new release runs.
    let status = run_until(&fake, state.path(), |status| {
        if status.state == "observing" {
            fake.world().registry_down = true;
        }
        status.state == "rolled-back"
    })
    .await;
    assert_eq!(fake.world().running, Some(v1.clone()));
    assert_eq!(status.running.unwrap().digest, v1);
    assert_eq!(status.quarantine[0].digest, v2);
    assert!(
        status.quarantine[0].reason.contains("exited with 1"),
        "{:?}",
        status.quarantine
    );
    // It stays so, whatever the polls say.
    fake.world().registry_down = false;
    let heads = fake.count("head");
    let status = run_until(&fake, state.path(), |_| fake.count("head") >= heads + 5).await;
    assert_eq!(
        (status.state.as_str(), fake.world().running.clone()),
        ("rolled-back", Some(v1))
    );
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_never_answers_does_not_stop_the_watch() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    let v2 = fake.push("v2");
    fake.world().crash_looping.insert(v2.to_string());
    let Started {
        mut handle,
        _stream,
        mut runner,
    } = open_with(&fake, state.path(), target());
    // Less than a registry may take to answer, so that it is always time for the next poll.
    runner.setup.poll = Duration::from_secs(1);
    let work = runner.run(CancellationToken::new());
    let watching = async {
        let mut until = async |state: &str| {
            handle
                .status
                .wait_for(|status| status.state == state)
                .await
                .unwrap()
                .clone()
        };
        until("observing").await;
        fake.world().registry_silent = true;
        until("rolled-back").await
    };
    tokio::select! {
        () = work => unreachable!("nobody stopped it"),
        status = tokio::time::timeout(Duration::from_hours(1), watching) => {
            assert_eq!(status.expect("it is judged in time").running.unwrap().digest, v1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_without_a_health_check_is_not_good() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    let v2 = fake.push("v2");
    fake.world().crash_looping.insert(v2.to_string());
    let status = run_until(&fake, state.path(), is("rolled-back")).await;
    assert!(status.reason.unwrap().contains("restarted"));
}

#[tokio::test(start_paused = true)]
async fn unsigned_extracts_nothing_and_a_late_signature_deploys() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    fake.world().signed.clear();
    let status = run_until(&fake, state.path(), is("rejected")).await;
    assert_eq!(status.reason.as_deref(), Some("no signature was found"));
    assert_eq!(fake.count("extract"), 0);
    assert!(
        std::fs::read_dir(state.path().join("targets/shop/releases"))
            .unwrap()
            .next()
            .is_none()
    );
    let ledger = Paths::new(state.path(), "shop").ledger();
    {
        let started = open_with(&fake, state.path(), target());
        let work = started.runner.run(CancellationToken::new());
        tokio::pin!(work);
        let tries = async |more: usize| {
            let looked = fake.count("evidence");
            while fake.count("evidence") < looked + more {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let waiting = async {
            tries(2).await;
            let records = attempt::verify(&ledger).unwrap();
            tries(5).await;
            assert_eq!(
                attempt::verify(&ledger).unwrap(),
                records,
                "a wait fills no disk"
            );
        };
        tokio::select! {
            () = &mut work => unreachable!(),
            () = waiting => {}
        }
        fake.world().signed.insert(v1.to_string());
        started
            .handle
            .mailbox
            .send(Message::Evidence(v1.clone()))
            .await
            .unwrap();
        let mut status = started.handle.status.clone();
        tokio::select! {
            () = &mut work => unreachable!(),
            found = status.wait_for(is("good")) => assert_eq!(found.unwrap().attempt, 1),
        }
    }
    assert_eq!(fake.world().running, Some(v1));
}

#[tokio::test(start_paused = true)]
async fn a_release_of_another_name_is_rejected_and_touches_nothing() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let other = fake.push("v1");
    fake.world()
        .releases
        .get_mut(&other.to_string())
        .unwrap()
        .name = "other".to_owned();
    let status = run_until(&fake, state.path(), is("rejected")).await;
    assert!(
        status
            .reason
            .unwrap()
            .contains("`other`, this target expects `shop`")
    );
    assert_eq!((fake.count("extract"), fake.count("plan")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_missing_variable_is_rejected_by_its_name() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    {
        let mut world = fake.world();
        let release = world.releases.get_mut(&v1.to_string()).unwrap();
        release.variables[0].default = None;
        release.variables[0].required = true;
    }
    let status = run_until(&fake, state.path(), is("rejected")).await;
    assert!(status.reason.unwrap().contains("`PORT`"));
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_waited_for() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    fake.world().extract_error = Some("cannot write: No space left on device".to_owned());
    let status = run_until(&fake, state.path(), is("rejected")).await;
    assert!(status.quarantine.is_empty());
    fake.world().extract_error = None;
    run_until(&fake, state.path(), is("good")).await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_is_away_is_waited_for_and_nothing_is_quarantined() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    fake.world().engine_down = true;
    let status = run_until(&fake, state.path(), |status| {
        status.state == "applying" && status.reason.is_some()
    })
    .await;
    assert_eq!(status.reason.as_deref(), Some("the engine does not answer"));
    let mut returned = false;
    run_until(&fake, state.path(), |status| {
        // It answers again while the agent waits.
        if status.reason.is_some() && !returned {
            returned = true;
            fake.world().engine_down = false;
        }
        status.state == "good"
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_newer_release_ends_the_wait_on_the_one_before() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    let v2 = fake.push("v2");
    fake.world().crash_looping.insert(v2.to_string());
    let started = open_with(&fake, state.path(), target());
    let work = started.runner.run(CancellationToken::new());
    tokio::pin!(work);
    let mut status = started.handle.status.clone();
    tokio::select! {
        () = &mut work => unreachable!(),
        found = status.wait_for(is("observing")) => { found.unwrap(); }
    }
    let v3 = fake.push("v3");
    started
        .handle
        .mailbox
        .send(Message::Hint(Trigger::Event))
        .await
        .unwrap();
    tokio::select! {
        () = &mut work => unreachable!(),
        found = status.wait_for(is("good")) => { found.unwrap(); }
    }
    assert_eq!(fake.world().running, Some(v3));
    assert!(status.borrow().quarantine.is_empty());
    let history = attempt::history(&started.handle.paths.ledger(), 10).unwrap();
    let outcomes: Vec<_> = history
        .iter()
        .map(|attempt| attempt.outcome.as_deref().unwrap())
        .collect();
    assert_eq!(outcomes, ["good", "superseded", "good"]);
}

/// The heart of it: the process dies at each of its calls in turn, and the next one brings about old good or new good.
async fn crash_everywhere(bad: bool) {
    let mut point = 1;
    loop {
        let fake = Fake::default();
        let state = tempfile::tempdir().unwrap();
        let v1 = fake.push("v1");
        run_until(&fake, state.path(), is("good")).await;
        let v2 = fake.push("v2");
        if bad {
            fake.world().unhealthy.insert(v2.to_string());
        }
        {
            let mut world = fake.world();
            world.calls.clear();
            world.crash_at = Some(point);
        }
        let settled = |status: &TargetStatus| {
            status.settled && status.digest == Some(v2.clone()) && status.state != "rejected"
        };
        let crashed = tokio::select! {
            _ = run_until(&fake, state.path(), settled) => false,
            () = fake.crashed() => true,
        };
        {
            let mut world = fake.world();
            world.crash_at = None;
            world.calls.clear();
        }
        let status = run_until(&fake, state.path(), settled).await;
        let world = fake.world();
        assert!(!world.half_applied, "crash point {point}");
        if bad {
            assert_eq!(status.state, "rolled-back", "crash point {point}");
            assert_eq!(world.running, Some(v1.clone()), "crash point {point}");
            assert_eq!(status.quarantine[0].digest, v2);
        } else {
            assert_eq!(status.state, "good", "crash point {point}");
            assert_eq!(world.running, Some(v2.clone()), "crash point {point}");
        }
        drop(world);
        attempt::verify(&Paths::new(state.path(), "shop").ledger()).unwrap();
        if !crashed {
            assert!(point > 10, "the crash points were reached");
            return;
        }
        point += 1;
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_at_any_point_of_a_good_release_ends_good() {
    crash_everywhere(false).await;
}

#[tokio::test(start_paused = true)]
async fn a_crash_at_any_point_of_a_bad_release_ends_rolled_back() {
    crash_everywhere(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_the_runner_and_the_next_one_goes_on() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    let started = open_with(&fake, state.path(), target());
    let shutdown = CancellationToken::new();
    let mut status = started.handle.status.clone();
    let work = started.runner.run(shutdown.clone());
    tokio::pin!(work);
    tokio::select! {
        () = &mut work => unreachable!(),
        found = status.wait_for(is("observing")) => { found.unwrap(); }
    }
    shutdown.cancel();
    work.await;
    let applied = fake.count("apply");
    run_until(&fake, state.path(), is("good")).await;
    assert_eq!(
        fake.count("apply"),
        applied + 1,
        "it is applied again, not assumed"
    );
}

#[tokio::test(start_paused = true)]
async fn what_fails_after_it_was_good_is_reported_and_left() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    fake.world().unhealthy.insert(v1.to_string());
    let applied = fake.count("apply");
    let status = run_until(&fake, state.path(), |status| {
        status
            .health
            .as_ref()
            .is_some_and(|health| health.state == "unhealthy")
    })
    .await;
    assert_eq!(status.state, "good");
    assert!(
        status
            .health
            .unwrap()
            .reason
            .unwrap()
            .contains("exited with 1")
    );
    assert_eq!(fake.count("apply"), applied);
}

#[tokio::test(start_paused = true)]
async fn orders_are_carried_out_or_refused_with_a_reason() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let v1 = fake.push("v1");
    run_until(&fake, state.path(), is("good")).await;
    let v2 = fake.push("v2");
    run_until(&fake, state.path(), |status| {
        status.state == "good" && status.digest == Some(v2.clone())
    })
    .await;
    let started = open_with(&fake, state.path(), target());
    let mailbox = started.handle.mailbox.clone();
    let mut status = started.handle.status.clone();
    let orders = async {
        let (reply, answer) = oneshot::channel();
        mailbox.send(Message::RollBack(reply)).await.unwrap();
        let number = answer.await.unwrap().unwrap();
        status
            .wait_for(|status| status.attempt == number && status.settled)
            .await
            .unwrap();
        assert_eq!(fake.world().running, Some(v1.clone()));
        let (reply, answer) = oneshot::channel();
        mailbox.send(Message::Deploy(None, reply)).await.unwrap();
        let refused = answer.await.unwrap().unwrap_err();
        assert_eq!(refused.kind, RefusalKind::Quarantined);
        assert!(
            refused
                .message
                .contains("longshore agent unquarantine shop")
        );
        let (reply, answer) = oneshot::channel();
        mailbox.send(Message::RollBack(reply)).await.unwrap();
        assert_eq!(
            answer.await.unwrap().unwrap_err().kind,
            RefusalKind::Impossible
        );
        let (reply, answer) = oneshot::channel();
        mailbox
            .send(Message::Unquarantine(v2.clone(), reply))
            .await
            .unwrap();
        answer.await.unwrap().unwrap();
        status
            .wait_for(|status| status.state == "good" && status.digest == Some(v2.clone()))
            .await
            .unwrap();
        let v3 = fake.release("v3");
        let (reply, answer) = oneshot::channel();
        mailbox
            .send(Message::Plan(Some(TagOrDigest::Digest(v3.clone())), reply))
            .await
            .unwrap();
        let report = answer.await.unwrap().unwrap();
        assert_eq!(report.digest, v3);
        assert!(report.plan.has_changes());
        assert_eq!(
            fake.world().running,
            Some(v2.clone()),
            "a plan changes nothing"
        );
    };
    tokio::select! {
        () = started.runner.run(CancellationToken::new()) => unreachable!(),
        () = orders => {}
    }
}

#[tokio::test(start_paused = true)]
async fn three_generations_are_kept_and_older_ones_go() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    for version in ["v1", "v2", "v3", "v4", "v5"] {
        let digest = fake.push(version);
        run_until(&fake, state.path(), |status| {
            status.state == "good" && status.digest == Some(digest.clone())
        })
        .await;
    }
    // The clean-up comes right behind the last transition.
    run_until(&fake, state.path(), |_| fake.world().kept.len() == 3).await;
    let mut kept: Vec<_> = std::fs::read_dir(state.path().join("targets/shop/releases"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    let mut wanted: Vec<_> = ["v3", "v4", "v5"]
        .iter()
        .map(|version| format!("sha256-{}", Digest::sha256(version.as_bytes()).hex()))
        .flat_map(|name| [name.clone(), format!("{name}.json")])
        .collect();
    wanted.sort();
    assert_eq!(kept, wanted);
    assert!(
        std::fs::read_dir(state.path().join("targets/shop/staging"))
            .unwrap()
            .next()
            .is_none()
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_is_done_that_cannot_be_written_down() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    fake.push("v1");
    // The temporary file cannot be made, as on a full disk.
    let obstacle = state.path().join("targets/shop/state.tmp");
    std::fs::create_dir_all(&obstacle).unwrap();
    let heads = fake.count("head");
    let status = run_until(&fake, state.path(), |_| fake.count("head") >= heads + 3).await;
    assert!(status.reason.unwrap().contains("cannot write"));
    assert_eq!(fake.count("fetch"), 0);
    std::fs::remove_dir(&obstacle).unwrap();
    run_until(&fake, state.path(), is("good")).await;
}

#[tokio::test]
async fn one_runner_owns_a_target() {
    let fake = Fake::default();
    let state = tempfile::tempdir().unwrap();
    let _first = open_with(&fake, state.path(), target());
    let (_stream, up) = watch::channel(false);
    let setup = Setup {
        target: Arc::new(target()),
        source: Arc::new(fake.clone()),
        engine: None,
        poll: Duration::from_mins(1),
        safety_poll: Duration::from_mins(1),
        reporter: reporter::Handle::default(),
    };
    let second = Runner::open(setup, Paths::new(state.path(), "shop"), Arc::new(fake), up);
    assert!(matches!(second, Err(RunnerError::Locked(_))));
}

#[test]
fn a_state_of_a_newer_program_is_refused_by_its_version() {
    let state = tempfile::tempdir().unwrap();
    let paths = Paths::new(state.path(), "shop");
    paths.create().unwrap();
    std::fs::write(
        paths.root.join("state.json"),
        br#"{"version":2,"phase":"unheard of"}"#,
    )
    .unwrap();
    let error = paths.load().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("has version 2, this program knows 1"),
        "{error}"
    );
    std::fs::write(paths.root.join("state.json"), b"{").unwrap();
    assert!(matches!(paths.load(), Err(RunnerError::Damaged { .. })));
}

#[test]
fn secrets_are_not_seen() {
    let mut target = target();
    target
        .variables
        .insert("DB_PASSWORD".to_owned(), "hunter22".to_owned());
    target
        .variables
        .insert("PORT".to_owned(), "8080".to_owned());
    let secrets = report::secrets(&target);
    assert_eq!(report::redact("hunter22 at 8080", &secrets), "*** at 8080");
}
