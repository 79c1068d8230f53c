//! Crashes and stops: the agent is ended in each state, also while Compose runs, and what runs in the end was observed healthy,
//! never assumed.

use e2e::image::Image;
use serde_json::Value;

use crate::world::{Settings, World, is_rolled_back, service};

/// How the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// SIGKILL, as a crash.
    Kill,
    /// SIGTERM.
    Stop,
}

const STATES: [&str; 9] = [
    "resolved",
    "fetched",
    "verified",
    "admitted",
    "extracted",
    "planned",
    "pulled",
    "applying",
    "observing",
];

#[test]
fn kill_in_each_state_ends_as_the_new_release_observed_good() {
    each_state("killstates", End::Kill);
}

#[test]
fn sigterm_in_each_state_ends_as_the_new_release_observed_good() {
    each_state("termstates", End::Stop);
}

#[test]
fn kill_of_a_failing_release_in_each_state_ends_as_the_old_release_observed_good() {
    failing("killfailing", End::Kill);
}

#[test]
fn sigterm_of_a_failing_release_in_each_state_ends_as_the_old_release_observed_good() {
    failing("termfailing", End::Stop);
}

#[test]
fn kill_while_compose_runs_ends_as_the_new_release_observed_good() {
    while_compose_runs("killcompose", End::Kill);
}

#[test]
fn sigterm_while_compose_runs_ends_as_the_new_release_observed_good() {
    while_compose_runs("termcompose", End::Stop);
}

/// Each state lasts a few times as long as the disk is slow.
fn each_state(name: &str, how: End) {
    let (mut world, mut good) = World::with_version_1(name, Settings::default());
    for state in STATES {
        let mut tries = 0;
        let next = loop {
            world.stop_agent();
            world.start_slow_agent();
            world.wait_good(&good);
            let version = format!("{state}{tries}");
            let image = world.web(&version);
            let next = world.push(&version, &service(&image), &[]);
            caught(&world, &next, |phase| phase["state"] == state);
            world.end(how);
            // A kill leaves the state that was seen, unless this machine was busy elsewhere between the look and the signal. A
            // stop may end the step first.
            if how == End::Stop || world.saved()["phase"]["state"] == state {
                break next;
            }
            tries += 1;
            assert!(tries < 5, "never killed {state}");
            world.start_agent();
            world.wait_good(&next);
            good = next;
        };
        let before = observations(&world, &next);
        let running = world.saved()["running"].clone();
        assert!(
            running["digest"] == good.as_str() || running["standing"] == "unsettled",
            "ended {state}: {running:#}"
        );
        world.start_agent();
        world.wait_good(&next);
        assert!(
            observations(&world, &next) > before,
            "ended {state}, it is good without a look after that"
        );
        assert!(world.answer().starts_with(state));
        good = next;
    }
    assert_eq!(
        world
            .agent()
            .command("history app --json --limit 100")
            .ok()
            .json()[0]["outcome"],
        "good"
    );
}

fn failing(name: &str, how: End) {
    let (mut world, v1) = World::with_version_1(name, Settings::default());
    let moments: [(&str, fn(&Value) -> bool); 4] = [
        ("applying", |phase| phase["state"] == "applying"),
        ("observing", |phase| phase["state"] == "observing"),
        ("going back", |phase| {
            phase["state"] == "rolling-back" && phase["applied"] == false
        }),
        ("back", |phase| {
            phase["state"] == "rolling-back" && phase["applied"] == true
        }),
    ];
    for (index, (what, is_moment)) in moments.into_iter().enumerate() {
        world.stop_agent();
        world.start_slow_agent();
        world.agent().wait("version 1", |status| {
            status["running"]["digest"] == v1.as_str()
                && status["running"]["good"] == true
                && status["settled"] == true
        });
        let image = world.image(&format!("ill{index}"), &Image::shell("exit 3"));
        let bad = world.push(
            &index.to_string(),
            &format!("{}    restart: always\n", service(&image)),
            &[],
        );
        caught(&world, &bad, is_moment);
        world.end(how);
        let before = observations(&world, &v1);
        world.start_agent();
        let status = world.wait_state(&bad, "rolled-back");
        assert!(
            is_rolled_back(&status, &bad, &v1),
            "ended {what}: {status:#}"
        );
        assert!(
            observations(&world, &v1) > before,
            "ended {what}, version 1 is good without a look after that"
        );
        assert_eq!(world.answer(), "1");
    }
}

/// Compose waits for a dependency to become healthy; meanwhile the agent ends.
fn while_compose_runs(name: &str, how: End) {
    let (mut world, _) = World::with_version_1(name, Settings::default());
    let moments: [(&str, fn(&mut World) -> bool); 3] = [
        ("it was started", |world| compose_runs(world)),
        ("the first container is there", |world| {
            compose_runs(world) && world.ids().contains_key("db")
        }),
        ("it waits for the first container", |world| {
            compose_runs(world)
                && e2e::engine::containers(&world.project)
                    .iter()
                    .any(|container| {
                        container["Config"]["Labels"]["com.docker.compose.service"] == "db"
                            && container["State"]["Health"]["Status"] == "starting"
                            && container["State"]["Running"] == true
                    })
        }),
    ];
    for (index, (what, is_moment)) in moments.into_iter().enumerate() {
        let version = format!("c{index}");
        let web = world.web(&version);
        let db = world.image(
            &format!("db{index}"),
            &Image::shell("sleep 2; echo > /tmp/ready; exec sleep 100000")
                .health("test -e /tmp/ready"),
        );
        let compose = format!(
            "{}    depends_on: {{db: {{condition: service_healthy}}}}\n  db:\n    image: {db}\n",
            service(&web)
        );
        let next = world.push(&version, &compose, &[]);
        world.wait_state(&next, "applying");
        while !is_moment(&mut world) {
            let status = world.agent().status();
            assert_eq!(
                status["state"], "applying",
                "it ended before {what}: {status:#}"
            );
        }
        world.end(how);
        let before = observations(&world, &next);
        world.start_agent();
        world.wait_good(&next);
        assert!(
            observations(&world, &next) > before,
            "good without a look after the end when {what}"
        );
        assert_eq!(world.answer(), version);
        assert_eq!(world.ids().len(), 2);
        let status = world.agent().status();
        assert_eq!(
            status["quarantine"].as_array().map(Vec::len),
            Some(0),
            "{status:#}"
        );
    }
}

/// Waits until the state on the disk, which is what a crash leaves, is as wanted.
fn caught(world: &World, digest: &str, mut wanted: impl FnMut(&Value) -> bool) {
    let start = std::time::Instant::now();
    loop {
        let state = world.saved();
        if state["attempt"]["digest"] == digest && wanted(&state["phase"]) {
            return;
        }
        assert!(
            start.elapsed() < e2e::agent::PATIENCE,
            "never seen; the last state: {state:#}"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// How often a release was found healthy for its whole window, by the ledger.
fn observations(world: &World, digest: &str) -> usize {
    let ledger = std::fs::read_to_string(world.target("attempts.jsonl")).unwrap();
    ledger
        .lines()
        .filter(|line| {
            line.contains(digest)
                && line.contains(r#""step":"observe""#)
                && line.contains(r#""error":null"#)
        })
        .count()
}

/// Whether the agent has a child that brings a project up.
fn compose_runs(world: &mut World) -> bool {
    let agent = world.agent().pid().to_string();
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let read =
            |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        // After the name in brackets: state, then the parent.
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1));
        parent == Some(agent.as_str()) && read("cmdline").contains("\0up\0")
    })
}

impl World {
    fn end(&mut self, how: End) {
        match how {
            End::Kill => self.agent().kill(),
            End::Stop => self.stop_agent(),
        }
    }

    fn stop_agent(&mut self) {
        let status = self.agent().stop();
        assert!(status.success(), "SIGTERM: {status}");
    }

    /// The state on the disk.
    fn saved(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.target("state.json")).unwrap()).unwrap()
    }
}
