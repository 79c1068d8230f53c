//! Hosts that are not as they should be.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use e2e::engine;

use crate::world::{Settings, World, service};

#[test]
fn an_engine_that_does_not_answer_is_waited_for() {
    let mut world = World::new("engine", Settings::default());
    let socket = world.scratch.join("docker.sock");
    world.settings.env.push((
        "DOCKER_HOST".to_owned(),
        format!("unix://{}", socket.display()),
    ));
    let image = world.web("1");
    let v1 = world.push("1", &service(&image), &[]);
    world.start_agent();
    let reason = world.wait_refused(&v1);
    assert!(
        reason.contains("no Docker Engine answers") && reason.contains("DOCKER_HOST"),
        "{reason}"
    );

    // The engine comes up: nobody need do anything else.
    let host =
        std::env::var("DOCKER_HOST").unwrap_or_else(|_| "unix:///var/run/docker.sock".to_owned());
    symlink(host.trim_start_matches("unix://"), &socket).unwrap();
    world.wait_good(&v1);
    assert_eq!(world.answer(), "1");
}

#[test]
fn compose_1_is_refused() {
    let mut world = World::new("compose1", Settings::default());
    let fake = world.scratch.write(
        "fake/docker",
        "#!/bin/sh\necho \"$@\" >> \"$0.calls\"\necho '{\"version\":\"1.29.2\"}'\n",
    );
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
    world.settings.env.push((
        "PATH".to_owned(),
        format!("{}:/usr/bin:/bin", world.scratch.join("fake").display()),
    ));
    let image = world.web("1");
    let v1 = world.push("1", &service(&image), &[]);
    world.start_agent();
    let reason = world.wait_refused(&v1);
    assert!(
        reason.contains("1.29.2") && reason.contains("2.8 or later"),
        "{reason}"
    );
    let calls = std::fs::read_to_string(world.scratch.join("fake/docker.calls")).unwrap();
    assert!(
        calls
            .lines()
            .all(|call| call.starts_with("compose version")),
        "{calls}"
    );
    assert!(world.ids().is_empty());
}

#[test]
fn a_compose_file_that_the_plugin_rejects_leaves_what_runs_alone() {
    let (mut world, v1) = World::with_version_1("rejects", Settings::default());
    let ids = world.ids();
    let image = world.web("2");
    let v2 = world.push(
        "2",
        &format!("{}    ports: [\"not-a-port\"]\n", service(&image)),
        &[],
    );
    let reason = world.wait_refused(&v2);
    assert!(
        reason.contains("Compose does not accept") && reason.contains("not-a-port"),
        "{reason}"
    );
    assert_eq!(world.ids(), ids);
    let status = world.agent().status();
    assert_eq!(status["running"]["digest"], v1.as_str());
    assert_eq!(status["quarantine"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_project_that_someone_else_made_is_left_alone_unless_it_is_adopted() {
    let mut world = World::new("stranger", Settings::default());
    let image = world.web("0");
    let compose = world.scratch.write("by-hand/compose.yaml", service(&image));
    engine::docker("2")
        .args(["compose", "--project-name", &world.project, "--file"])
        .arg(compose)
        .args(["up", "--detach", "--quiet-pull"])
        .ok();
    let ids = world.ids();
    assert_eq!(ids.len(), 1);

    let image = world.web("1");
    let v1 = world.push("1", &service(&image), &[]);
    world.start_agent();
    let reason = world.wait_refused(&v1);
    assert!(
        reason.contains("made by someone else") && reason.contains("adopt: true"),
        "{reason}"
    );
    assert_eq!(world.ids(), ids);

    "    adopt: true\n".clone_into(&mut world.settings.more);
    world.configure();
    world.wait_good(&v1);
    assert_ne!(world.ids(), ids);
    assert_eq!(world.answer(), "1");
}
