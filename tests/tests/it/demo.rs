//! `longshore demo`: the whole chain, and nothing left behind.

use std::fs;
use std::path::Path;

use e2e::{Run, Scratch, engine, tools};

/// The demonstration with its temporary files in a directory of ours.
fn demo(temporary: &Path) -> Run {
    Run::new(tools::program())
        .arg("demo")
        .env("TMPDIR", temporary)
        .env("DOCKER_CONFIG", tools::compose("2"))
}

/// Its steps, whatever the engine.
fn told(output: &e2e::command::Output) {
    output
        .says("version 1 is deployed and healthy")
        .says("version 2 is deployed and healthy")
        .says("version 3 never became healthy: rolled back to version 2")
        .says("version 4 is not signed and was refused")
        .says("why does version 2 run?")
        .says("the chain is whole");
}

fn nothing_left_in(directory: &Path) {
    let left: Vec<_> = fs::read_dir(directory)
        .expect("the directory is there")
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn with_an_engine_it_deploys_containers() {
    let scratch = Scratch::new();
    let temporary = scratch.dir("temporary");
    let output = demo(&temporary).ok();
    told(&output);
    assert!(!output.both().contains("cannot be used here"), "{output}");
    let said = output.both();
    let host = said
        .split("registry and agent run at http://")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .expect("it tells where it runs")
        .to_owned();
    nothing_left_in(&temporary);
    let images = engine::docker("2")
        .args(["image", "ls", "--all", "--format", "{{.Repository}}"])
        .ok()
        .text();
    assert!(!images.contains(&host), "images of {host} stay: {images}");
    let containers = engine::docker("2")
        .args(["ps", "--all", "--format", "{{.Image}} {{.Names}}"])
        .ok()
        .text();
    assert!(
        !containers.contains(&host),
        "containers of {host} stay: {containers}"
    );
}

#[test]
fn without_an_engine_it_says_so_and_deploys_files() {
    let scratch = Scratch::new();
    let temporary = scratch.dir("temporary");
    let nowhere = format!("unix://{}/no-engine", scratch.path().display());
    let output = demo(&temporary).env("DOCKER_HOST", nowhere).ok();
    told(&output);
    output.says("using the `files` engine");
    nothing_left_in(&temporary);
}
