use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use oci::Platform;

use super::platform::{parse_platform, platform_refusal, runs_on};
use super::process::Finished;
use super::redact::Redactor;
use super::resolve::{config_error, unset_variables};
use super::rewrite::tests::{deployment, wanted};
use super::state::{Paths, lock_file, sweep};
use super::{ComposeEngine, ComposeOptions, SHORT};
use crate::engine::{Engine, EngineError};
use crate::release::Variable;

/// An engine whose plugin is a script, and whose Docker Engine does not answer.
fn engine(directory: &Path, script: &str) -> ComposeEngine {
    let program = super::process::tests::script(directory, script);
    ComposeEngine::new(ComposeOptions {
        docker_host: Some(format!("unix://{}", directory.join("none.sock").display())),
        docker: program,
        ..ComposeOptions::default()
    })
}

fn platform(text: &str) -> Platform {
    parse_platform(text)
}

#[tokio::test]
async fn an_engine_that_does_not_answer_is_unavailable_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = engine(dir.path(), "exit 1").check().await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Unavailable(message) if message.contains("none.sock") && message.contains("start it")),
        "{error}"
    );
}

#[tokio::test]
async fn plugins_that_are_old_broken_or_missing_are_refused_with_what_to_install() {
    for (script, expected) in [
        (
            r#"[ "$2" = --short ] && echo 1.29.2 || exit 1"#,
            "1.29.2 is too old",
        ),
        (r#"echo '{"version":"2.7.0"}'"#, "2.7.0 is too old"),
        (r#"echo '{"version":"v2.30.0"}'"#, "2.30.1 or later"),
        (
            "echo \"unknown flag: --format\" >&2; exit 125",
            "does not answer",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let deployment = deployment(dir.path());
        let error = engine(dir.path(), script)
            .plan(&deployment)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, EngineError::Unavailable(message) if message.contains(expected) && message.contains("docker-compose-plugin")),
            "{error}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let missing = ComposeEngine::new(ComposeOptions {
        docker: "/nowhere/docker".into(),
        ..ComposeOptions::default()
    });
    let error = missing.plan(&deployment(dir.path())).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Unavailable(message) if message.contains("/nowhere/docker") && message.contains("docker-compose-plugin")),
        "{error}"
    );
}

#[tokio::test]
async fn variables_are_checked_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(dir.path(), "touch ran; exit 1");
    let mut reserved = deployment(dir.path());
    reserved
        .variables
        .insert("DOCKER_HOST".to_owned(), "tcp://elsewhere".to_owned());
    assert!(
        matches!(engine.plan(&reserved).await, Err(EngineError::Rejected(message)) if message.contains("DOCKER_HOST"))
    );
    let mut open = deployment(dir.path());
    open.config.variables.push(Variable {
        name: "TAG".to_owned(),
        default: None,
        required: true,
    });
    assert!(
        matches!(engine.plan(&open).await, Err(EngineError::Rejected(message)) if message.contains("`TAG`"))
    );
}

#[test]
fn errors_of_the_plugin_are_sorted_and_redacted() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    let redactor = Redactor::new(["hunter2"]);
    let judge = |stderr: &str| {
        let finished = Finished {
            success: false,
            status: "exit status: 15".to_owned(),
            stdout: Vec::new(),
            stderr: stderr.to_owned(),
        };
        config_error(&deployment, &redactor, &finished)
    };
    let stderr = format!(
        "parsing {}/compose.yaml: yaml: line 3: found hunter2",
        deployment.directory.display()
    );
    assert_eq!(judge(&stderr), EngineError::Rejected("Docker Compose does not accept the release: parsing compose.yaml: yaml: line 3: found [redacted]".to_owned()));
    assert!(
        judge("required variable TAG is missing a value: set it")
            .to_string()
            .contains("target's `variables`")
    );
    assert!(matches!(
        judge("write /tmp/x: no space left on device"),
        EngineError::Unavailable(_)
    ));
}

#[test]
fn warnings_of_unset_variables_are_read() {
    let stderr = "time=\"2026\" level=warning msg=\"The \\\"TAG\\\" variable is not set. Defaulting to a blank string.\"\nother\nThe \"A\" variable is not set.";
    assert_eq!(unset_variables(stderr), ["A", "TAG"]);
}

#[test]
fn platforms_are_matched_and_a_refusal_lists_what_exists() {
    assert!(runs_on(
        &platform("linux/arm/v6"),
        &platform("linux/arm/v7")
    ));
    assert!(!runs_on(
        &platform("linux/arm/v7"),
        &platform("linux/arm/v6")
    ));
    assert!(runs_on(
        &platform("linux/arm64/v8"),
        &platform("linux/arm64")
    ));
    assert!(!runs_on(&platform("linux/386"), &platform("linux/amd64")));
    assert!(!runs_on(
        &platform("windows/amd64"),
        &platform("linux/amd64")
    ));

    let mut service = wanted("w");
    assert_eq!(
        platform_refusal("web", &service, &platform("linux/amd64")),
        None
    );
    service.platforms = vec![platform("linux/arm64"), platform("linux/arm/v7")];
    let refusal = platform_refusal("web", &service, &platform("linux/amd64")).unwrap();
    assert!(
        refusal.contains("linux/amd64") && refusal.contains("linux/arm64, linux/arm/v7"),
        "{refusal}"
    );
    service.platform = Some("arm64".to_owned());
    assert_eq!(
        platform_refusal("web", &service, &platform("linux/amd64")),
        None,
        "emulation is what the author asked for"
    );
}

#[tokio::test]
async fn a_lock_that_a_run_left_behind_is_respected() {
    let dir = tempfile::tempdir().unwrap();
    let held = lock_file(Paths::below(dir.path()), SHORT).await.unwrap();
    let error = lock_file(Paths::below(dir.path()), Duration::from_millis(1))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::Unavailable(message) if message.contains("still runs")));
    drop(held);
    lock_file(Paths::below(dir.path()), SHORT).await.unwrap();
}

#[test]
fn content_is_swept_unless_a_release_or_a_container_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::below(dir.path());
    paths.make().unwrap();
    let names: Vec<String> = ["a", "b", "c"]
        .iter()
        .map(|digit| digit.repeat(64))
        .collect();
    for name in &names {
        fs::create_dir(paths.content.join(name)).unwrap();
    }
    fs::write(paths.uses.join("kept"), format!("{}\n", names[0])).unwrap();
    fs::write(
        paths.uses.join("dropped"),
        format!("{}\n{}\n", names[1], names[2]),
    )
    .unwrap();
    let mounted = [
        paths
            .content
            .join(&names[1])
            .join("deeper")
            .display()
            .to_string(),
        "/elsewhere".to_owned(),
    ];
    sweep(&paths, &BTreeSet::from(["kept".to_owned()]), &mounted).unwrap();
    assert!(paths.content.join(&names[0]).exists() && paths.content.join(&names[1]).exists());
    assert!(!paths.content.join(&names[2]).exists() && !paths.uses.join("dropped").exists());
    assert!(paths.uses.join("kept").exists());
}
