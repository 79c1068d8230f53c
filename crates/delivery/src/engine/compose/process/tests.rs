use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Output, Plugin, Run, RunError, reserved};

/// Writes a program that stands for the plugin. Another process writes it: a test that forks while this one holds the file open for writing would make it busy.
#[expect(clippy::disallowed_methods, reason = "see above")]
pub(in crate::engine::compose) fn script(directory: &Path, script: &str) -> PathBuf {
    let (source, program) = (directory.join("script"), directory.join("docker-compose"));
    fs::write(&source, format!("#!/bin/sh\n{script}\n")).unwrap();
    let status = std::process::Command::new("install")
        .args(["-m", "755"])
        .args([&source, &program])
        .status()
        .unwrap();
    assert!(status.success());
    program
}

fn plugin(directory: &Path, text: &str) -> Plugin {
    Plugin {
        program: script(directory, text),
        host: "unix:///nowhere".to_owned(),
    }
}

fn run<'a>(directory: &'a Path, variables: &'a BTreeMap<String, String>) -> Run<'a> {
    Run {
        arguments: vec!["one".into()],
        variables,
        directory,
        input: b"in\n".to_vec(),
        output: Output::Capture,
        timeout: Duration::from_mins(1),
    }
}

#[tokio::test]
async fn the_environment_is_clean_and_input_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = plugin(dir.path(), r#"echo "args=$* $(cat)"; env; exit 3"#);
    let variables = BTreeMap::from([("MINE".to_owned(), "va lue$".to_owned())]);
    let finished = plugin.run(run(dir.path(), &variables)).await.unwrap();
    let text = String::from_utf8(finished.stdout).unwrap();
    assert!(text.starts_with("args=one in\n"), "{text}");
    for expected in [
        "MINE=va lue$",
        "DOCKER_HOST=unix:///nowhere",
        "COMPOSE_EXPERIMENTAL_GIT_REMOTE=false",
        "COMPOSE_EXPERIMENTAL_OCI_REMOTE=false",
    ] {
        assert!(
            text.lines().any(|line| line == expected),
            "{expected} is missing in {text}"
        );
    }
    assert!(
        !text.contains("CARGO"),
        "the environment of this test shows: {text}"
    );
    assert!(!finished.success);
    assert!(finished.status.contains('3'));
}

#[tokio::test]
async fn a_run_over_its_time_is_stopped_with_its_children() {
    // The grandchild holds the pipe of standard error open: only killing the whole group ends it.
    const SCRIPT: &str =
        "echo begun >&2; sleep 600 & echo $! > child.new; mv child.new child; wait";
    let mut timeout = Duration::from_millis(500);
    let child = loop {
        let dir = tempfile::tempdir().unwrap();
        let plugin = plugin(dir.path(), SCRIPT);
        let mut run = run(dir.path(), const { &BTreeMap::new() });
        run.timeout = timeout;
        let Err(RunError::TimedOut { stderr, .. }) = plugin.run(run).await else {
            panic!("the run has no end of its own");
        };
        if let Ok(child) = fs::read_to_string(dir.path().join("child")) {
            assert_eq!(stderr, "begun\n");
            break child.trim().parse().unwrap();
        }
        // A busy machine has not come so far; it gets more time.
        timeout *= 2;
        assert!(timeout < Duration::from_mins(2), "the script never begins");
    };
    ended(Pid::from_raw(child).unwrap());
}

/// Waits for the end of a process that is not a child of this one.
fn ended(process: Pid) {
    let Ok(descriptor) = pidfd_open(process, PidfdFlags::empty()) else {
        return;
    };
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit));
    assert_eq!(ready.unwrap(), 1, "{process:?} lives on");
}

#[tokio::test]
async fn output_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let variables = BTreeMap::new();
    let chatty = plugin(
        dir.path(),
        "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo end >&2",
    );
    let finished = chatty.run(run(dir.path(), &variables)).await.unwrap();
    assert!(finished.stderr.len() <= super::STDERR_LIMIT && finished.stderr.ends_with("xend\n"));
    let endless = plugin(dir.path(), "cat /dev/zero");
    assert!(matches!(
        endless.run(run(dir.path(), &variables)).await,
        Err(RunError::TooMuch)
    ));
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let plugin = Plugin {
        program: "/nowhere/docker".into(),
        host: String::new(),
    };
    let error = plugin
        .run(run(Path::new("/"), &BTreeMap::new()))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/nowhere/docker"), "{error}");
}

#[test]
fn names_that_steer_the_plugin_are_reserved() {
    for name in [
        "PATH",
        "HOME",
        "DOCKER_HOST",
        "COMPOSE_FILE",
        "LD_PRELOAD",
        "GODEBUG",
    ] {
        assert!(reserved(name), "{name}");
    }
    for name in ["TAG", "HOMEPAGE", "HTTP_PROXY", "LONGSHORE_DATA"] {
        assert!(!reserved(name), "{name}");
    }
}
