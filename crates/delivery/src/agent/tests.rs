use std::os::unix::fs::PermissionsExt as _;

use client::longshore::StreamEvent;

use super::*;
use crate::control::{self, Request, Response, TargetStatus};
use crate::testing::{Fake, target};

struct Site {
    directory: tempfile::TempDir,
    fake: Fake,
}

impl Site {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            fake: Fake::default(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    fn config(&self, targets: Vec<Target>) -> AgentConfig {
        let text = "version: 1\n";
        let mut config = AgentConfig::parse(text, "agent.yaml", self.directory.path()).unwrap();
        config.state = self.directory.path().join("agent");
        config.socket = self.socket();
        config.targets = targets;
        config
    }

    fn agent(&self, config: AgentConfig) -> Agent {
        let engines = Engines::new().with(EngineKind::Compose, Arc::new(self.fake.clone()));
        Agent::with(
            config,
            engines,
            Arc::new(self.fake.clone()),
            Arc::new(self.fake.clone()),
        )
    }

    async fn ask(&self, request: Request) -> Response {
        control::call(&self.socket(), &request).await.unwrap()
    }

    async fn wait_for(&self, condition: impl Fn(&[TargetStatus]) -> bool) -> Vec<TargetStatus> {
        // The socket is the first thing that an agent makes, but it is made.
        let mut watch = loop {
            match control::watch(&self.socket(), &Request::Watch { target: None }).await {
                Ok(watch) => break watch,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        loop {
            match watch.next().await.unwrap().unwrap() {
                Response::Status(statuses) if condition(&statuses) => return statuses,
                Response::Status(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn quick() -> Target {
    let mut target = target();
    target.health.stability = Duration::from_millis(20);
    target.health.interval = Duration::from_millis(5);
    target
}

fn is_good(statuses: &[TargetStatus]) -> bool {
    statuses.iter().all(|status| status.state == "good") && !statuses.is_empty()
}

#[tokio::test]
async fn an_agent_deploys_hears_events_and_answers_over_its_socket() {
    let site = Site::new();
    let v1 = site.fake.push("v1");
    let events = site.fake.stream();
    let shutdown = CancellationToken::new();
    let agent = site.agent(site.config(vec![quick()])).run(shutdown.clone());
    let test = async {
        let statuses = site
            .wait_for(|statuses| is_good(statuses) && statuses[0].stream)
            .await;
        assert_eq!(statuses[0].running.as_ref().unwrap().digest, v1);
        let mode = std::fs::metadata(site.socket())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        // An event. (That it alone wakes a target is tested where triggers are.)
        let v2 = site.fake.push("v2");
        let changed = StreamEvent::Changed {
            id: "e.1".to_owned(),
            kind: "dev.longshore.tag.updated".to_owned(),
            repository: "shop/release".parse().unwrap(),
            tag: Some("production".parse().unwrap()),
            digest: v2.clone(),
            subject: None,
        };
        events.send(changed).unwrap();
        site.wait_for(|statuses| is_good(statuses) && statuses[0].digest == Some(v2.clone()))
            .await;

        let target = || "shop".to_owned();
        let Response::History(history) = site
            .ask(Request::History {
                target: target(),
                limit: 5,
            })
            .await
        else {
            panic!()
        };
        let told: Vec<_> = history
            .iter()
            .map(|attempt| (attempt.attempt, attempt.digest.clone()))
            .collect();
        assert_eq!(told, [(2, v2.clone()), (1, v1.clone())]);
        assert_eq!(history[1].trigger, "start");
        let Response::Explain(explanation) = site.ask(Request::Explain { target: target() }).await
        else {
            panic!()
        };
        assert_eq!(explanation.attempt.as_ref().unwrap().digest, v2);
        assert!(explanation.verdict.as_ref().unwrap().is_allowed());
        let steps: Vec<&str> = explanation
            .steps
            .iter()
            .map(|step| step.step.as_str())
            .collect();
        assert_eq!(
            steps,
            [
                "fetch", "verify", "admit", "extract", "plan", "pull", "apply", "observe"
            ]
        );
        assert!(
            explanation.plan.is_some()
                && !explanation.samples.is_empty()
                && explanation.ledger.is_ok()
        );

        let plan = Request::Plan {
            target: target(),
            reference: None,
        };
        let Response::Plan(plan) = site.ask(plan).await else {
            panic!()
        };
        assert!(!plan.plan.has_changes());
        let rollback = Request::Rollback {
            target: target(),
            wait: true,
        };
        let Response::Status(status) = site.ask(rollback).await else {
            panic!()
        };
        assert_eq!(
            (
                status[0].state.as_str(),
                status[0].running.as_ref().unwrap().digest.clone()
            ),
            ("rolled-back", v1.clone())
        );
        let lift = Request::Unquarantine {
            target: target(),
            digest: v2.clone(),
        };
        assert!(matches!(site.ask(lift).await, Response::Status(_)));
        site.wait_for(|statuses| is_good(statuses) && statuses[0].digest == Some(v2.clone()))
            .await;
        let deploy = Request::Deploy {
            target: target(),
            reference: Some(v1.to_string()),
            wait: true,
        };
        let Response::Status(status) = site.ask(deploy).await else {
            panic!()
        };
        assert_eq!(
            (status[0].state.as_str(), site.fake.world().running.clone()),
            ("good", Some(v1.clone()))
        );

        // Refusals say what to do.
        let Response::Error(refusal) = site
            .ask(Request::Explain {
                target: "shpo".to_owned(),
            })
            .await
        else {
            panic!()
        };
        assert!(
            refusal.message.contains("did you mean `shop`?"),
            "{}",
            refusal.message
        );
        let elsewhere = Request::Deploy {
            target: target(),
            reference: Some("registry.example:5000/other/release:production".to_owned()),
            wait: false,
        };
        let Response::Error(refusal) = site.ask(elsewhere).await else {
            panic!()
        };
        assert_eq!(refusal.kind, RefusalKind::Invalid);
        assert!(
            matches!(site.ask(Request::Reload).await, Response::Error(_)),
            "there is no file"
        );
        shutdown.cancel();
    };
    let (outcome, ()) = tokio::join!(agent, test);
    outcome.unwrap();
    assert!(!site.socket().exists());
}

#[tokio::test]
async fn a_changed_file_is_read_again_and_a_wrong_one_is_not() {
    let site = Site::new();
    site.fake.push("v1");
    let file = site.directory.path().join("agent.yaml");
    std::fs::write(&file, "version: 1\ntargets: []\n").unwrap();
    let mut config = site.config(Vec::new());
    config.path = Some(file.clone());
    let shutdown = CancellationToken::new();
    let agent = site.agent(config).run(shutdown.clone());
    let text = "version: 1
targets:
  - name: shop
    reference: registry.example:5000/shop/release:production
    release: shop
    trust: none
    health: {stability: 20ms, timeout: 10s, interval: 50ms}
";
    let test = async {
        site.wait_for(<[TargetStatus]>::is_empty).await;
        std::fs::write(&file, text).unwrap();
        // Seen by itself, without being told.
        site.wait_for(is_good).await;
        std::fs::write(&file, text.replace("trust", "trsut")).unwrap();
        let Response::Error(refusal) = site.ask(Request::Reload).await else {
            panic!()
        };
        assert!(
            refusal
                .message
                .contains("unknown key `trsut`; did you mean `trust`?"),
            "{}",
            refusal.message
        );
        assert!(is_good(&site.wait_for(|_| true).await), "the old one stays");
        std::fs::write(&file, "version: 1\ntargets: []\n").unwrap();
        assert!(matches!(site.ask(Request::Reload).await, Response::Done(_)));
        assert!(site.wait_for(|_| true).await.is_empty());
        assert!(
            site.fake.world().running.is_some(),
            "a target that is taken out goes on running"
        );
        shutdown.cancel();
    };
    let (outcome, ()) = tokio::join!(agent, test);
    outcome.unwrap();
}

#[tokio::test]
async fn two_agents_do_not_share_a_socket_and_a_stale_one_is_replaced() {
    let site = Site::new();
    // Left behind by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(site.socket()).unwrap());
    let shutdown = CancellationToken::new();
    let first = site.agent(site.config(Vec::new())).run(shutdown.clone());
    let test = async {
        site.wait_for(<[TargetStatus]>::is_empty).await;
        let second = site
            .agent(site.config(Vec::new()))
            .run(CancellationToken::new())
            .await;
        assert!(matches!(second, Err(AgentError::InUse(_))));
        shutdown.cancel();
    };
    let (outcome, ()) = tokio::join!(first, test);
    outcome.unwrap();
}
