//! What is deployed, what is left alone, and what is brought back.

use e2e::agent::listening_ports;
use e2e::engine;
use e2e::image::Image;
use serde_json::Value;

use crate::world::{Settings, World, essence, is_rolled_back, service};

/// Every later look says the same: the reference still points to the bad release, and nothing moves.
fn stays_rolled_back(world: &mut World, bad: &str, good: &str) {
    let ids = world.ids();
    let before = world.proxy().seen().len();
    world.proxy().wait("five more polls", |seen| {
        seen[before..]
            .iter()
            .filter(|seen| seen.method == "HEAD")
            .count()
            >= 5
    });
    let status = world.agent().status();
    assert!(is_rolled_back(&status, bad, good), "{status:#}");
    assert_eq!(status["resolved"], bad, "that is what the tag points to");
    assert_eq!(world.ids(), ids, "a quarantined release is not tried again");
    world
        .agent()
        .command("status")
        .ok()
        .says("rolled-back")
        .says(bad);
    world
        .agent()
        .command("deploy app")
        .fails()
        .says("quarantined");
}

fn proxied() -> Settings {
    Settings {
        proxied: true,
        ..Settings::default()
    }
}

#[test]
fn an_unchanged_digest_downloads_and_writes_nothing() {
    let (mut world, v1) = World::with_version_1("unchanged", proxied());
    let modified = |world: &World| {
        ["state.json", "attempts.jsonl", "releases"].map(|name| {
            std::fs::metadata(world.target(name))
                .unwrap()
                .modified()
                .unwrap()
        })
    };
    // The clean-up after the deployment is over at the second poll.
    let polls = |from: usize, count: usize| {
        move |seen: &[e2e::proxy::Seen]| {
            seen[from..]
                .iter()
                .filter(|seen| seen.method == "HEAD")
                .count()
                >= count
        }
    };
    let from = world.proxy().seen().len();
    world.proxy().wait("two polls", polls(from, 2));
    let (ids, before) = (world.ids(), modified(&world));
    let from = world.proxy().seen().len();
    world.proxy().wait("six polls", polls(from, 6));
    let seen = world.proxy().seen().split_off(from);
    for request in &seen {
        assert!(
            request.method == "HEAD"
                && request.path.ends_with("/manifests/production")
                && request.body == 0,
            "an unchanged digest caused {request:?}"
        );
    }
    assert_eq!(modified(&world), before);
    assert_eq!(world.ids(), ids);
    world.wait_good(&v1);
}

#[test]
fn the_agent_listens_on_no_tcp_port() {
    let (mut world, _) = World::with_version_1("noport", Settings::default());
    let status = world
        .agent()
        .wait("a stream", |status| status["stream"] == true);
    assert_eq!(status["state"], "good");
    assert_eq!(listening_ports(world.agent().pid()), [""; 0]);
    assert_ne!(
        listening_ports(world.server.pid()),
        [""; 0],
        "the look itself sees a port where there is one"
    );
}

#[test]
fn a_missing_image_leaves_the_old_containers_untouched() {
    let (mut world, v1) = World::with_version_1("missing", Settings::default());
    let before = world.ids();
    let image = world.web("2");
    let v2 = world.push_to("app:candidate", "2", &service(&image), &[]);
    let found = world.server.get("/v2/img/manifests/web2");
    let image_digest = found.header("docker-content-digest").unwrap().to_owned();
    let gone = world.server.request(
        "DELETE",
        &format!("/v2/img/manifests/{image_digest}"),
        &[],
        &[],
    );
    assert_eq!(gone.status(), 202, "{}", gone.text());
    let release = world.manifest(&v2);
    e2e::image::push_manifest(
        world.server.url(),
        "app",
        "production",
        e2e::image::MANIFEST,
        &release.body,
    );
    let reason = world.wait_refused(&v2);
    assert!(
        reason.contains("registry does not have") && reason.contains("img"),
        "{reason}"
    );
    assert_eq!(world.ids(), before);
    let status = world.agent().status();
    assert_eq!(status["running"]["digest"], v1.as_str());
    assert_eq!(status["running"]["good"], true);

    // It is not the release's fault: when the image is there again, it is deployed without a new push.
    world.web("2");
    world.wait_good(&v2);
    assert_eq!(world.answer(), "2");
}

#[test]
fn a_crash_loop_without_health_check_is_rolled_back() {
    let (mut world, v1) = World::with_version_1("loop", proxied());
    let image = world.image("loop", &Image::shell("echo no database here; exit 3"));
    let v2 = world.push(
        "2",
        &format!("{}    restart: always\n", service(&image)),
        &[],
    );
    let status = world.wait_rolled_back(&v2, &v1);
    let reason = status["reason"].as_str().unwrap();
    assert!(
        reason.contains('3') && reason.contains("no database here"),
        "{reason}"
    );
    assert_eq!(world.answer(), "1");
    stays_rolled_back(&mut world, &v2, &v1);
}

#[test]
fn a_container_that_crashes_after_four_seconds_is_rolled_back_and_every_later_status_says_so() {
    let (mut world, v1) = World::with_version_1(
        "late",
        Settings {
            stability: "6s",
            ..proxied()
        },
    );
    let image = world.image("late", &Image::shell("sleep 4; exit 1"));
    let v2 = world.push("2", &service(&image), &[]);
    world.wait_state(&v2, "observing");
    world.wait_rolled_back(&v2, &v1);
    assert_eq!(world.answer(), "1");
    stays_rolled_back(&mut world, &v2, &v1);

    // Why does version 1 run? Because of its own attempt and signature, and because version 2 failed.
    let explained = world.agent().command("explain app --json").ok().json();
    assert_eq!(explained["attempt"]["digest"], v1.as_str());
    assert_eq!(explained["attempt"]["outcome"], "good");
    assert_eq!(explained["verdict"]["digest"], v1.as_str());
    // Each form of the one signature counts.
    let accepted = explained["verdict"]["accepted"].as_array().unwrap();
    assert!(
        !accepted.is_empty() && accepted.iter().all(|one| one["label"] == "key.pub"),
        "{accepted:#?}"
    );
    assert_eq!(explained["rollback"]["digest"], v2.as_str());
    assert_eq!(explained["rollback"]["outcome"], "rolled-back");
    assert_eq!(explained["plan"]["changes"][0]["action"], "create");
    world
        .agent()
        .command("explain app")
        .ok()
        .says("signer")
        .says(&v2);
}

#[test]
fn only_the_service_whose_file_changed_is_recreated() {
    let mut world = World::new("file", Settings::default());
    file_changes(&mut world);
}

/// Three services, each with a file of its own in another way, and one without any.
pub(crate) fn file_changes(world: &mut World) {
    let image = world.image("idle", &Image::shell("exec sleep 100000"));
    let compose = format!(
        "services:\n  \
           file:\n    image: {image}\n    volumes: [\"./a.txt:/etc/a.txt:ro\"]\n  \
           dir:\n    image: {image}\n    volumes: [\"./d:/etc/d:ro\"]\n  \
           conf:\n    image: {image}\n    configs: [{{source: c, target: /etc/c.txt}}]\n  \
           plain:\n    image: {image}\n\
         configs:\n  c:\n    file: ./c.txt\n"
    );
    let mut files = [("a.txt", "1"), ("d/x/y.txt", "1"), ("c.txt", "1")];
    let v1 = world.push("1", &compose, &files);
    world.start_agent();
    world.wait_good(&v1);
    let shown = [
        ("file", "cat /etc/a.txt"),
        ("dir", "cat /etc/d/x/y.txt"),
        ("conf", "cat /etc/c.txt"),
    ];
    for (index, (changed, command)) in shown.into_iter().enumerate() {
        let before = world.ids();
        assert_eq!(before.len(), 4);
        files[index].1 = "2";
        let version = format!("2.{index}");
        let next = world.push(&version, &compose, &files);
        world.wait_good(&next);
        for (service, id) in world.ids() {
            assert_eq!(
                before[&service] != id,
                service == changed,
                "{changed} changed, look at {service}"
            );
        }
        assert_eq!(world.exec(changed, command), "2");
    }
    // Nothing is left to do, and the exit code says so.
    let plan = world.agent().command("plan app").run();
    assert_eq!(plan.code, Some(0), "{plan}");
}

#[test]
fn going_back_with_the_registry_down_ends_as_exactly_the_release_before() {
    let mut world = World::new("back", Settings::default());
    let (one, two) = (
        world.web("two"),
        world.image("worker", &Image::shell("exec sleep 100000")),
    );
    let compose = |image: &str, mode: &str, worker: bool| {
        let mut text = format!(
            "services:\n  web:\n    image: {image}\n    environment: {{MODE: {mode}}}\n    volumes: [\"./a.txt:/etc/a.txt:ro\"]\n"
        );
        if worker {
            text.push_str("  worker:\n    environment: {KEEP: this}\n    image: ");
            text.push_str(&two);
            text.push('\n');
        }
        text
    };
    let v2 = world.push("2", &compose(&one, "second", true), &[("a.txt", "second")]);
    world.start_agent();
    world.wait_good(&v2);
    let essences = |world: &World| -> Vec<Value> {
        let mut all: Vec<_> = engine::containers(&world.project)
            .iter()
            .map(essence)
            .collect();
        all.sort_by_key(ToString::to_string);
        all
    };
    let before = essences(&world);
    assert_eq!(before.len(), 2);

    let bad = world.image("ill", &Image::web("three").health("test -e /never"));
    let v3 = world.push("3", &compose(&bad, "third", false), &[("a.txt", "third")]);
    world.wait_state(&v3, "observing");
    assert!(
        !world.ids().contains_key("worker"),
        "the service is gone with version 3"
    );
    assert_eq!(
        world.exec("web", "echo $MODE; cat /etc/a.txt"),
        "third\nthird"
    );
    world.server.kill();
    world.wait_rolled_back(&v3, &v2);
    assert_eq!(essences(&world), before);
    assert_eq!(
        world.exec("web", "echo $MODE; cat /etc/a.txt"),
        "second\nsecond"
    );
}

#[test]
fn what_the_target_does_not_name_is_not_deployed() {
    let (mut world, v1) = World::with_version_1("others", proxied());
    let from = world.proxy().seen().len();
    let image = world.web("2");
    for to in ["app:other", "other:production"] {
        let other = world.push_to(to, "2", &service(&image), &[]);
        assert_ne!(other, v1);
    }
    let asked = world.proxy().seen().len();
    world.proxy().wait("three polls", |seen| {
        seen[asked..]
            .iter()
            .filter(|seen| seen.method == "HEAD")
            .count()
            >= 3
    });
    let blobs = world.proxy().seen()[from..]
        .iter()
        // The pushes look at the image themselves.
        .filter(|seen| {
            seen.method == "GET"
                && seen.path.contains("/blobs/")
                && !seen.path.starts_with("/v2/img/")
        })
        .count();
    assert_eq!(blobs, 0);
    let status = world.agent().status();
    assert_eq!(
        (&status["attempt"], &status["state"]),
        (&1.into(), &"good".into())
    );
    assert_eq!(status["resolved"], v1.as_str());
}
