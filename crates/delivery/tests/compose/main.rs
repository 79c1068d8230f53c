//! The Compose engine on a real Docker Engine. Run with `--features engine-tests` and `DOCKER_HOST`.

#[cfg(test)]
mod bench;

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::time::Duration;

use delivery::engine::{Action, Engine, EngineError, SampleState};
use delivery::release::Variable;
use oci::Platform;

use crate::bench::{Bench, actions, command, docker};

/// Runs until it is told to end, at once.
const FOREVER: &str = "command: [sleep, '100000'], stop_signal: SIGKILL";

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_release_changes_nothing() {
    let bench = Bench::new("unchanged").await;
    let compose = format!(
        "services:\n  web: {{image: IMAGE1, {FOREVER}, labels: {{mine: x}}}}\n  two: {{image: IMAGE2, {FOREVER}, deploy: {{replicas: 2}}}}\n"
    );
    let first = bench.release(&compose, &[]);
    let (plan, applied) = bench.deploy(&first).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("web", Action::Create), ("two", Action::Create)])
    );
    assert_eq!(applied.notes, Vec::<String>::new());
    let sample = bench.until(&first, SampleState::Healthy).await;
    assert_eq!(bench.inspect("web", "{{.Config.Image}}"), bench.pinned("1"));
    assert_eq!(
        bench.inspect(
            "web",
            "{{index .Config.Labels \"dev.longshore.target\"}} {{index .Config.Labels \"mine\"}}"
        ),
        "test x"
    );
    let ids = bench.ids();
    assert_eq!(ids["two"].len(), 2);

    // The same files under another digest, seen by an agent that was started again.
    let second = bench.release(&compose, &[]);
    let (plan, _) = bench.deploy(&second).await.unwrap();
    assert!(!plan.has_changes(), "{plan:?}");
    assert_eq!(bench.ids(), ids);
    assert_eq!(
        bench.engine.observe(&second).await.unwrap().fingerprint,
        sample.fingerprint
    );

    // What someone stopped or removed is seen and put right.
    docker(&["stop", &ids["web"][0]]);
    docker(&["rm", "-f", &ids["two"][0]]);
    assert_eq!(
        bench.engine.observe(&second).await.unwrap().state,
        SampleState::Failed
    );
    let (plan, _) = bench.deploy(&second).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("web", Action::Create), ("two", Action::Create)])
    );
    let sample_after = bench.until(&second, SampleState::Healthy).await;
    assert_eq!(bench.ids()["web"], ids["web"]);
    assert_ne!(sample_after.fingerprint, sample.fingerprint);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_service_whose_file_changed_is_made_anew() {
    let bench = Bench::new("files").await;
    let compose = format!(
        "services:
  file: {{image: IMAGE1, {FOREVER}, volumes: ['./a/f.txt:/f']}}
  tree: {{image: IMAGE1, {FOREVER}, volumes: ['./tree:/tree']}}
  conf: {{image: IMAGE1, {FOREVER}, configs: [c]}}
  safe: {{image: IMAGE1, {FOREVER}, secrets: [s]}}
  none: {{image: IMAGE1, {FOREVER}}}
configs: {{c: {{file: ./c.txt}}}}
secrets: {{s: {{file: ./s.txt}}}}
"
    );
    let base = [
        ("a/f.txt", "f1"),
        ("tree/x/y", "t1"),
        ("c.txt", "c1"),
        ("s.txt", "secret-one"),
    ];
    let first = bench.release(&compose, &base);
    bench.deploy(&first).await.unwrap();
    bench.until(&first, SampleState::Healthy).await;
    let mut ids = bench.ids();
    assert_eq!(bench.inspect("file", "{{(index .Mounts 0).RW}}"), "false");

    for (index, service) in ["file", "tree", "conf", "safe"].into_iter().enumerate() {
        let mut files = base;
        for (_, text) in &mut files[..=index] {
            *text = "changed";
        }
        let next = bench.release(&compose, &files);
        let (plan, applied) = bench.deploy(&next).await.unwrap();
        let changed: Vec<&str> = plan
            .changes
            .iter()
            .filter(|change| change.action != Action::Keep)
            .map(|change| change.subject.as_str())
            .collect();
        assert_eq!(changed, [service], "{plan:?}");
        assert_eq!(applied.notes, Vec::<String>::new());
        bench.until(&next, SampleState::Healthy).await;
        let now = bench.ids();
        for (name, list) in &now {
            assert_eq!(
                *list != ids[name],
                name == service,
                "{name} when {service} changes"
            );
        }
        ids = now;
    }
    let output = docker(&["exec", &ids["tree"][0], "cat", "/tree/x/y"]);
    assert_eq!(output.stdout, b"changed");
    let output = docker(&["exec", &ids["safe"][0], "cat", "/run/secrets/s"]);
    assert_eq!(output.stdout, b"changed");

    // A kept release keeps its content; once nobody keeps it, it goes.
    let content = first.state.join("engine/content");
    let count = || fs::read_dir(&content).unwrap().count();
    let last = bench.release(
        &compose,
        &[
            ("a/f.txt", "changed"),
            ("tree/x/y", "changed"),
            ("c.txt", "changed"),
            ("s.txt", "changed"),
        ],
    );
    bench.deploy(&last).await.unwrap();
    let all = count();
    bench
        .engine
        .clean(&first.target, &[first.clone(), last.clone()])
        .await
        .unwrap();
    assert_eq!(count(), all);
    bench
        .engine
        .clean(&first.target, std::slice::from_ref(&last))
        .await
        .unwrap();
    assert!(count() < all);
    assert_eq!(
        bench.engine.observe(&last).await.unwrap().state,
        SampleState::Healthy
    );
    assert!(!bench.engine.plan(&last).await.unwrap().has_changes());
}

#[tokio::test(flavor = "multi_thread")]
async fn inline_content_and_secrets_from_variables_count_and_arrive() {
    let mut bench = Bench::new("inline").await;
    bench.variables = BTreeMap::from([
        ("WORD".to_owned(), "first-word".to_owned()),
        ("PW".to_owned(), "pa$$w0rd-${X}".to_owned()),
    ]);
    let compose = "services:
  web: {image: IMAGE1, command: [sh, -c, 'cat /c; cat /run/secrets/s; echo \"$$A\"; sleep 100000'], stop_signal: SIGKILL, environment: {A: 'x$$y$$$$z${WORD}'}, configs: [{source: c, target: /c}], secrets: [s]}
configs: {c: {content: \"say $$word ${WORD}\\n\"}}
secrets: {s: {environment: PW}}
";
    // Inline content came with Compose 2.23.1.
    let first = bench.release(compose, &[]);
    bench.deploy(&first).await.unwrap();
    bench.until(&first, SampleState::Healthy).await;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.log("web").lines().count() < 2 {
        assert!(std::time::Instant::now() < deadline, "{}", bench.log("web"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(
        bench.log("web"),
        "say $word first-word\npa$$w0rd-${X}x$y$$zfirst-word\n"
    );
    let ids = bench.ids();
    assert!(
        !bench
            .deploy(&bench.release(compose, &[]))
            .await
            .unwrap()
            .0
            .has_changes()
    );
    assert_eq!(bench.ids(), ids);

    bench
        .variables
        .insert("PW".to_owned(), "other-password".to_owned());
    let (plan, _) = bench.deploy(&bench.release(compose, &[])).await.unwrap();
    assert_eq!(plan.changes[0].action, Action::Recreate);
    assert_eq!(plan.changes[0].reason, "secret `s` changed");
    assert_ne!(bench.ids(), ids);
    let state = command("grep")
        .args(["-rlE", "first-word|w0rd|other-password"])
        .arg(&first.state)
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&state.stdout),
        "",
        "no value is on the disk"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_without_a_health_check_is_a_failure() {
    let mut bench = Bench::new("loop").await;
    bench
        .variables
        .insert("TOKEN".to_owned(), "tok-abcdef".to_owned());
    let release = bench.release("services:\n  web: {image: IMAGE1, command: [sh, -c, 'echo using ${TOKEN}; exit 3'], restart: always}\n", &[]);
    bench.deploy(&release).await.unwrap();
    let sample = bench.until(&release, SampleState::Failed).await;
    assert!(
        sample.services[0].detail.contains("exited with 3")
            && sample.services[0].detail.contains("using [redacted]"),
        "{sample:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_dies_after_4_seconds_is_seen() {
    let bench = Bench::new("dies").await;
    let release = bench.release(
        "services:\n  web: {image: IMAGE1, command: [sh, -c, 'sleep 4; echo no more; exit 7']}\n",
        &[],
    );
    bench.deploy(&release).await.unwrap();
    assert_eq!(
        bench.until(&release, SampleState::Healthy).await.services[0].detail,
        "running"
    );
    let sample = bench.until(&release, SampleState::Failed).await;
    assert!(
        sample.services[0].detail.contains("exited with 7")
            && sample.services[0].detail.contains("no more"),
        "{sample:?}"
    );
    // And every later look and plan says so.
    assert_eq!(
        bench.engine.observe(&release).await.unwrap().state,
        SampleState::Failed
    );
    assert!(bench.engine.plan(&release).await.unwrap().has_changes());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_checks_decide_where_there_are_any() {
    let bench = Bench::new("health").await;
    let check = "interval: 200ms, timeout: 5s, retries: 2";
    let release = bench.release(
        &format!("services:\n  good: {{image: IMAGE1, {FOREVER}, healthcheck: {{test: [CMD, 'true'], {check}}}}}\n  bad: {{image: IMAGE1, {FOREVER}, healthcheck: {{test: [CMD, 'false'], {check}}}}}\n"),
        &[],
    );
    bench.deploy(&release).await.unwrap();
    let sample = bench.until(&release, SampleState::Failed).await;
    assert!(
        sample
            .services
            .iter()
            .any(|service| service.service == "bad" && service.detail.contains("unhealthy")),
        "{sample:?}"
    );
    let release = bench.release(&format!("services:\n  good: {{image: IMAGE1, {FOREVER}, healthcheck: {{test: [CMD, 'true'], {check}}}}}\n"), &[]);
    let (plan, _) = bench.deploy(&release).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("bad", Action::Remove), ("good", Action::Keep)])
    );
    assert_eq!(
        bench.until(&release, SampleState::Healthy).await.services[0].detail,
        "running, healthy"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_service_and_changed_environment_come_back_as_they_were() {
    let bench = Bench::new("back").await;
    let two = bench.release(&format!("services:\n  web: {{image: IMAGE1, {FOREVER}, environment: {{A: one, B: same}}, volumes: ['./f:/f']}}\n  old: {{image: IMAGE1, {FOREVER}}}\n"), &[("f", "2")]);
    bench.deploy(&two).await.unwrap();
    bench.until(&two, SampleState::Healthy).await;

    let three = bench.release("services:\n  web: {image: IMAGE2, command: ['false'], environment: {A: hidden-value, C: new, B: same}, volumes: ['./f:/f']}\n", &[("f", "3")]);
    let (plan, _) = bench.deploy(&three).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("web", Action::Recreate), ("old", Action::Remove)])
    );
    let reason = &plan
        .changes
        .iter()
        .find(|change| change.subject == "web")
        .unwrap()
        .reason;
    assert!(
        reason.starts_with("image sha256:")
            && reason.contains("environment `A`, `C` changed")
            && reason.contains("mounted content of `/f` changed"),
        "{reason}"
    );
    assert!(!reason.contains("hidden-value"));
    bench.until(&three, SampleState::Failed).await;
    assert!(!bench.ids().contains_key("old"));

    bench.deploy(&two).await.unwrap();
    bench.until(&two, SampleState::Healthy).await;
    assert_eq!(bench.inspect("web", "{{.Config.Image}}"), bench.pinned("1"));
    assert!(
        bench.inspect("web", "{{.Config.Env}}").contains("A=one")
            && !bench.inspect("web", "{{.Config.Env}}").contains("C=new")
    );
    let output = docker(&["exec", &bench.ids()["web"][0], "cat", "/f"]);
    assert_eq!(output.stdout, b"2");
    assert_eq!(bench.ids().keys().collect::<Vec<_>>(), ["old", "web"]);
    assert!(!bench.engine.plan(&two).await.unwrap().has_changes());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_leaves_the_old_containers_alone() {
    let bench = Bench::new("refused").await;
    let good = bench.release(
        &format!("services:\n  web: {{image: IMAGE1, {FOREVER}}}\n"),
        &[],
    );
    bench.deploy(&good).await.unwrap();
    let ids = bench.ids();
    let rejected = |result: Result<_, EngineError>, expected: &str| match result {
        Err(EngineError::Rejected(message)) => assert!(message.contains(expected), "{message}"),
        other => panic!("not rejected ({expected}): {other:?}"),
    };

    let missing = bench.release(
        &format!(
            "services:\n  web: {{image: {}, {FOREVER}}}\n",
            bench.image("none")
        ),
        &[],
    );
    // Pushed again, it makes the same release run.
    match bench.deploy(&missing).await {
        Err(EngineError::Unavailable(message)) => {
            assert!(message.contains("the registry does not have"), "{message}");
        }
        other => panic!("a missing image is waited for: {other:?}"),
    }
    let invalid = bench.release("services:\n  web: {image: IMAGE1, comand: [x]}\n", &[]);
    rejected(
        bench.deploy(&invalid).await.map(drop),
        "does not accept the release",
    );
    let broken = bench.release("services:\n  web: {image: IMAGE1, \n", &[]);
    rejected(
        bench.deploy(&broken).await.map(drop),
        "does not accept the release",
    );
    let required = bench.release(
        "services:\n  web: {image: IMAGE1, environment: {A: '${NEEDED:?say what}'}}\n",
        &[],
    );
    rejected(bench.deploy(&required).await.map(drop), "NEEDED");
    let blank = bench.release(
        "services:\n  web: {image: IMAGE1, environment: {A: '${NEEDED}'}}\n",
        &[],
    );
    rejected(bench.deploy(&blank).await.map(drop), "NEEDED");
    let mut open = bench.release(
        "services:\n  web: {image: IMAGE1, environment: {A: '${NEEDED:-}'}}\n",
        &[],
    );
    open.config.variables.push(Variable {
        name: "NEEDED".to_owned(),
        default: None,
        required: true,
    });
    rejected(bench.deploy(&open).await.map(drop), "NEEDED");
    let bind = bench.release(
        "services:\n  web: {image: IMAGE1, volumes: ['./data:/data']}\n",
        &[],
    );
    rejected(bench.deploy(&bind).await.map(drop), "LONGSHORE_DATA");
    let mut foreign = bench.release("services:\n  web: {image: IMAGE1}\n", &[]);
    foreign.config.images.clear();
    rejected(bench.deploy(&foreign).await.map(drop), "not pinned");
    let mut platform = bench.release("services:\n  web: {image: IMAGE1}\n", &[]);
    platform.config.images[0].platforms = vec![Platform {
        architecture: "s390x".to_owned(),
        os: "linux".to_owned(),
        variant: None,
        os_version: None,
    }];
    rejected(bench.deploy(&platform).await.map(drop), "linux/s390x");

    assert_eq!(bench.ids(), ids);
    assert_eq!(
        bench.engine.observe(&good).await.unwrap().state,
        SampleState::Healthy
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_at_the_start_is_told_with_its_reason() {
    let bench = Bench::new("start").await;
    let release = bench.release(
        "services:\n  web: {image: IMAGE1, command: [/no/such/program]}\n",
        &[],
    );
    let error = bench.deploy(&release).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Failed(message) if message.contains("/no/such/program")),
        "{error:?}"
    );
    assert_eq!(
        bench.engine.observe(&release).await.unwrap().state,
        SampleState::Failed
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_of_someone_else_is_refused_unless_adopted() {
    let mut bench = Bench::new("foreign").await;
    let release = bench.release(
        &format!("services:\n  web: {{image: IMAGE1, {FOREVER}}}\n"),
        &[],
    );
    bench.engine.plan(&release).await.unwrap();
    bench.engine.pull(&release).await.unwrap();
    let stranger = |service: &str| {
        let label = |name: &str, value: &str| format!("--label=com.docker.compose.{name}={value}");
        let labels = [
            label("project", &bench.project),
            label("service", service),
            label("oneoff", "False"),
            label("container-number", "1"),
            label("config-hash", "x"),
        ];
        let name = format!("{}-{service}-1", bench.project);
        let mut arguments = vec!["run", "-d", "--stop-signal=SIGKILL", "--name", &name];
        arguments.extend(labels.iter().map(String::as_str));
        let image = bench.pinned("1");
        arguments.extend([image.as_str(), "/bin/sleep", "100000"]);
        let output = docker(&arguments);
        assert!(output.status.success(), "{output:?}");
    };
    stranger("web");
    stranger("debug");
    let ids = bench.ids();
    let error = bench.deploy(&release).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Rejected(message) if message.contains("adopt")),
        "{error:?}"
    );
    assert_eq!(bench.ids(), ids);

    bench.adopt = true;
    let release = bench.release(
        &format!(
            "services:\n  web: {{image: IMAGE1, {FOREVER}}}\n  more: {{image: IMAGE1, {FOREVER}}}\n"
        ),
        &[],
    );
    let (plan, _) = bench.deploy(&release).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("web", Action::Recreate), ("more", Action::Create)])
    );
    assert!(
        plan.notes.iter().any(|note| note.contains("debug")),
        "{plan:?}"
    );
    bench.until(&release, SampleState::Healthy).await;
    // Our own orphan goes, the stranger stays.
    let release = bench.release(
        &format!("services:\n  web: {{image: IMAGE1, {FOREVER}}}\n"),
        &[],
    );
    let (plan, _) = bench.deploy(&release).await.unwrap();
    assert_eq!(
        actions(&plan),
        BTreeMap::from([("web", Action::Keep), ("more", Action::Remove)])
    );
    let now = bench.ids();
    assert_eq!(now.keys().collect::<Vec<_>>(), ["debug", "web"]);
    assert_eq!(now["debug"], ids["debug"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_shot_service_is_good_at_exit_0() {
    let bench = Bench::new("once").await;
    let release = bench.release(
        &format!("services:\n  migrate: {{image: IMAGE1, command: ['true']}}\n  web: {{image: IMAGE1, {FOREVER}, depends_on: {{migrate: {{condition: service_completed_successfully}}}}, volumes: ['${{LONGSHORE_DATA}}/db:/db']}}\n"),
        &[],
    );
    let mut release = release;
    release.variables.insert(
        "LONGSHORE_DATA".to_owned(),
        release.data.display().to_string(),
    );
    bench.deploy(&release).await.unwrap();
    let sample = bench.until(&release, SampleState::Healthy).await;
    assert!(
        sample
            .services
            .iter()
            .any(|service| service.detail == "exited with 0"),
        "{sample:?}"
    );
    assert!(release.data.join("db").is_dir());
    let output = docker(&["exec", &bench.ids()["web"][0], "touch", "/db/x"]);
    assert!(output.status.success() && release.data.join("db/x").exists());
    assert!(
        !bench.engine.plan(&release).await.unwrap().has_changes(),
        "it does not run again"
    );

    let fails = bench.release(
        "services:\n  migrate: {image: IMAGE1, command: [sh, -c, 'exit 9']}\n",
        &[],
    );
    bench.deploy(&fails).await.unwrap();
    bench.until(&fails, SampleState::Failed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_waits_for_ever_is_stopped_and_the_next_one_converges() {
    let mut bench = Bench::new("stuck").await;
    let options = delivery::engine::compose::ComposeOptions {
        docker_host: std::env::var("DOCKER_HOST").ok(),
        docker: std::env::var_os("LONGSHORE_TEST_COMPOSE")
            .map_or_else(|| "docker".into(), Into::into),
        apply_timeout: Duration::from_secs(4),
        ..Default::default()
    };
    bench.engine = delivery::engine::compose::ComposeEngine::new(options);
    let stuck = bench.release(
        &format!(
            "services:\n  db: {{image: IMAGE1, {FOREVER}, healthcheck: {{test: [CMD, 'false'], interval: 1s, retries: 1000}}}}\n  web: {{image: IMAGE1, {FOREVER}, depends_on: {{db: {{condition: service_healthy}}}}}}\n"
        ),
        &[],
    );
    let error = bench.deploy(&stuck).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Failed(message) if message.contains("4 s")),
        "{error:?}"
    );
    let good = bench.release(
        &format!("services:\n  web: {{image: IMAGE1, {FOREVER}}}\n"),
        &[],
    );
    bench.deploy(&good).await.unwrap();
    bench.until(&good, SampleState::Healthy).await;
    assert_eq!(bench.ids().keys().collect::<Vec<_>>(), ["web"]);
}

/// A kill takes the whole agent; dropping the future kills Compose at the same moment, and nothing after it happens.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_up_converges() {
    let bench = Bench::new("kill").await;
    let one = bench.release(&format!("services:\n  a: {{image: IMAGE1, {FOREVER}, volumes: ['./f:/f']}}\n  b: {{image: IMAGE1, {FOREVER}}}\n  c: {{image: IMAGE1, {FOREVER}}}\n"), &[("f", "1")]);
    let two = bench.release(&format!("services:\n  a: {{image: IMAGE2, {FOREVER}, volumes: ['./f:/f']}}\n  b: {{image: IMAGE2, {FOREVER}}}\n  d: {{image: IMAGE1, {FOREVER}}}\n"), &[("f", "2")]);
    bench.deploy(&one).await.unwrap();
    bench.until(&one, SampleState::Healthy).await;
    let mut interrupted = 0;
    for (round, wait) in [0, 100, 200, 300, 450, 600, 800, 1100, 1500, 2000]
        .into_iter()
        .enumerate()
    {
        let (to, back) = if round % 2 == 0 {
            (&two, &one)
        } else {
            (&one, &two)
        };
        let plan = bench.engine.plan(to).await.unwrap();
        bench.engine.pull(to).await.unwrap();
        if within(Duration::from_millis(wait), bench.engine.apply(to, &plan))
            .await
            .is_none()
        {
            interrupted += 1;
        }
        // Half of the time on to the new one, half of the time back to the old one.
        let goal = if round % 4 < 2 { to } else { back };
        bench.deploy(goal).await.unwrap();
        bench.until(goal, SampleState::Healthy).await;
        assert!(
            !bench.engine.plan(goal).await.unwrap().has_changes(),
            "round {round}"
        );
        assert!(
            bench.ids().values().all(|list| list.len() == 1),
            "round {round}: {:?}",
            bench.ids()
        );
        let output = docker(&["exec", &bench.ids()["a"][0], "cat", "/f"]);
        assert_eq!(
            output.stdout,
            if std::ptr::eq(goal, &raw const one) {
                b"1"
            } else {
                b"2"
            }
        );
        // The next round starts from where this one should have ended.
        bench.deploy(to).await.unwrap();
    }
    assert!(
        interrupted >= 3,
        "too few rounds were interrupted to say anything: {interrupted}"
    );
}

/// A killed agent's Compose may live on; the next agent waits for it instead of racing it.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_waits_for_the_compose_of_a_killed_one() {
    let bench = Bench::new("orphan").await;
    let release = bench.release(
        &format!("services:\n  web: {{image: IMAGE1, {FOREVER}}}\n"),
        &[],
    );
    let plan = bench.engine.plan(&release).await.unwrap();
    bench.engine.pull(&release).await.unwrap();
    fs::create_dir_all(release.state.join("engine")).unwrap();
    let lock = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(release.state.join("engine/lock"))
        .unwrap();
    lock.lock().unwrap();
    // Standard output is what a run holds the lock by.
    let mut child = command("sleep").arg("2").stdout(lock).spawn().unwrap();
    bench.engine.apply(&release, &plan).await.unwrap();
    assert!(child.try_wait().unwrap().is_some(), "it did not wait");
    bench.until(&release, SampleState::Healthy).await;
}

async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, future).await.ok()
}
