use super::*;
use crate::release::{EngineKind, ReleaseConfig};

struct Host {
    directory: tempfile::TempDir,
    target: Target,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut target = crate::testing::target();
        target.engine = EngineKind::Files;
        target.files = Some(FilesTarget {
            path: directory.path().join("srv/current"),
            activate: Vec::new(),
            activate_timeout: Duration::from_secs(20),
        });
        Self { directory, target }
    }

    fn link(&self) -> PathBuf {
        self.directory.path().join("srv/current")
    }

    fn release(&self, version: &str, files: &[(&str, &str)]) -> Deployment {
        let digest = Digest::sha256(version.as_bytes());
        let directory = self.directory.path().join("releases").join(digest.hex());
        for (name, content) in files {
            let path = directory.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        Deployment {
            target: self.target.clone(),
            digest,
            config: ReleaseConfig {
                schema_version: 1,
                name: "shop".to_owned(),
                version: Some(version.to_owned()),
                engine: EngineKind::Files,
                entry: Vec::new(),
                variables: Vec::new(),
                images: Vec::new(),
            },
            directory,
            state: self.directory.path().to_owned(),
            data: self.directory.path().join("data"),
            variables: BTreeMap::from([("GREETING".to_owned(), "hello".to_owned())]),
        }
    }
}

fn activate(deployment: &mut Deployment, argv: &[&str]) {
    deployment.target.files.as_mut().unwrap().activate =
        argv.iter().map(|word| (*word).to_owned()).collect();
}

async fn apply(deployment: &Deployment) -> Result<Applied, EngineError> {
    let plan = FilesEngine.plan(deployment).await?;
    FilesEngine.apply(deployment, &plan).await
}

#[tokio::test]
async fn the_link_is_switched_and_the_plan_says_what_changes() {
    let host = Host::new();
    let v1 = host.release(
        "v1",
        &[("index.html", "one"), ("old/a", "a"), ("same", "same")],
    );
    let v2 = host.release(
        "v2",
        &[("index.html", "two"), ("new/b", "b"), ("same", "same")],
    );
    apply(&v1).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(host.link().join("index.html")).unwrap(),
        "one"
    );
    assert_eq!(
        FilesEngine.observe(&v1).await.unwrap().state,
        SampleState::Healthy
    );
    assert!(!FilesEngine.plan(&v1).await.unwrap().has_changes());
    let plan = FilesEngine.plan(&v2).await.unwrap();
    let changes: Vec<_> = plan.changes[1..]
        .iter()
        .map(|change| (change.subject.as_str(), change.action))
        .collect();
    let wanted = [
        ("index.html", Action::Recreate),
        ("new/b", Action::Create),
        ("old/a", Action::Remove),
        ("same", Action::Keep),
    ];
    assert_eq!(changes, wanted);
    assert_eq!(
        std::fs::read_to_string(host.link().join("index.html")).unwrap(),
        "one",
        "a plan changes nothing"
    );
    apply(&v2).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(host.link().join("index.html")).unwrap(),
        "two"
    );
    assert_eq!(
        FilesEngine.observe(&v1).await.unwrap().state,
        SampleState::Failed
    );
    // Back, and nothing of the switch is left behind.
    apply(&v1).await.unwrap();
    assert_eq!(
        std::fs::read_dir(host.link().parent().unwrap())
            .unwrap()
            .count(),
        1
    );
}

#[tokio::test]
async fn what_this_target_did_not_make_is_refused_unless_adopted() {
    let mut host = Host::new();
    std::fs::create_dir_all(host.link().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/somewhere/else", host.link()).unwrap();
    let v1 = host.release("v1", &[("a", "a")]);
    let error = apply(&v1).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Rejected(reason) if reason.contains("`adopt: true`")),
        "{error}"
    );
    assert_eq!(
        std::fs::read_link(host.link()).unwrap(),
        Path::new("/somewhere/else")
    );
    host.target.adopt = true;
    let v1 = host.release("v1", &[("a", "a")]);
    apply(&v1).await.unwrap();
    assert_eq!(std::fs::read_link(host.link()).unwrap(), v1.directory);
    // A directory is never taken over: there may be data in it.
    std::fs::remove_file(host.link()).unwrap();
    std::fs::create_dir(host.link()).unwrap();
    let plan = Plan::default();
    assert!(matches!(
        FilesEngine.apply(&v1, &plan).await,
        Err(EngineError::Rejected(_))
    ));
}

#[tokio::test]
async fn a_link_that_a_crash_left_is_no_obstacle() {
    let host = Host::new();
    let v1 = host.release("v1", &[("a", "a")]);
    std::fs::create_dir_all(host.link().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(
        "/half",
        host.link().with_file_name(".current.shop.longshore"),
    )
    .unwrap();
    apply(&v1).await.unwrap();
    assert_eq!(std::fs::read_link(host.link()).unwrap(), v1.directory);
}

#[tokio::test]
async fn the_activate_command_has_a_clean_environment() {
    let host = Host::new();
    let mut v1 = host.release("v1", &[("activate", "env | sort")]);
    activate(&mut v1, &["/bin/sh", "./activate"]);
    let applied = apply(&v1).await.unwrap();
    let names: Vec<&str> = applied.notes[0]
        .lines()
        .filter_map(|line| line.split_once('=').map(|(name, _)| name))
        .collect();
    let wanted = [
        "GREETING",
        "LONGSHORE_DATA",
        "LONGSHORE_DIGEST",
        "LONGSHORE_DIRECTORY",
        "LONGSHORE_RELEASE",
        "LONGSHORE_TARGET",
        "LONGSHORE_VERSION",
        "PATH",
        "PWD",
    ];
    let names: Vec<&str> = names
        .into_iter()
        .filter(|name| !["OLDPWD", "SHLVL", "_"].contains(name))
        .collect();
    assert_eq!(names, wanted);
}

#[tokio::test]
async fn a_failing_activate_command_counts_like_an_unhealthy_release() {
    let host = Host::new();
    let mut v1 = host.release("v1", &[("a", "a")]);
    activate(&mut v1, &["/bin/sh", "-c", "echo no such site >&2; exit 3"]);
    let error = apply(&v1).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Failed(reason) if reason.contains("exited with 3: no such site")),
        "{error}"
    );
    activate(&mut v1, &["/no/such/program"]);
    assert!(matches!(apply(&v1).await, Err(EngineError::Failed(_))));
}

#[tokio::test]
async fn a_command_that_hangs_is_ended_with_all_it_started() {
    let host = Host::new();
    let mut v1 = host.release("v1", &[("a", "a")]);
    let alive = host.directory.path().join("alive");
    let script = format!(
        "(while :; do :; done) & echo $! > '{}'; wait",
        alive.display()
    );
    activate(&mut v1, &["/bin/sh", "-c", &script]);
    v1.target.files.as_mut().unwrap().activate_timeout = Duration::from_millis(500);
    let error = apply(&v1).await.unwrap_err();
    assert!(error.to_string().contains("took longer"), "{error}");
    let child: i32 = std::fs::read_to_string(alive)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    // The signal was sent; how soon the kernel acts on it is its own affair. A zombie runs nothing.
    let ended = async {
        loop {
            let status = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            let state = status
                .rsplit(')')
                .next()
                .unwrap_or_default()
                .trim()
                .chars()
                .next();
            if matches!(state, None | Some('Z' | 'X')) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), ended)
        .await
        .expect("it is ended");
}

#[tokio::test]
async fn a_health_command_that_fails_is_not_healthy_yet() {
    let host = Host::new();
    let mut v1 = host.release("v1", &[("a", "a")]);
    apply(&v1).await.unwrap();
    v1.target.health.command = vec![
        "/bin/sh".to_owned(),
        "-c".to_owned(),
        "test -e ready".to_owned(),
    ];
    let sample = FilesEngine.observe(&v1).await.unwrap();
    assert_eq!(sample.state, SampleState::Pending);
    assert_eq!(sample.services[1].detail, "exited with 1");
    v1.target.health.command[2] = "test -e a".to_owned();
    assert_eq!(
        FilesEngine.observe(&v1).await.unwrap().state,
        SampleState::Healthy
    );
}
