use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Container, Health, Planned, Status, plan, sample};
use crate::engine::compose::record::Record;
use crate::engine::compose::rewrite::Wanted;
use crate::engine::compose::rewrite::tests::wanted;
use crate::engine::{Action, SampleState};

fn services(list: &[(&str, &str)]) -> BTreeMap<String, Wanted> {
    list.iter()
        .map(|(name, definition)| ((*name).to_owned(), wanted(definition)))
        .collect()
}

fn container(service: &str, definition: &str) -> Container {
    Container {
        id: format!("{service}-{definition}"),
        name: format!("shop-{service}-1"),
        service: service.to_owned(),
        target: Some("shop".to_owned()),
        definition: Some(definition.to_owned()),
        image: wanted("").image_text(),
        status: Status::Running,
        ..Container::default()
    }
}

fn stranger(service: &str) -> Container {
    Container {
        target: None,
        definition: None,
        ..container(service, "")
    }
}

fn record() -> Record {
    Record::new(b"salt")
}

fn planned(wanted: &BTreeMap<String, Wanted>, containers: &[Container]) -> Planned {
    plan("shop", false, "shop", wanted, containers, &record()).unwrap()
}

fn actions(planned: &Planned) -> Vec<(&str, Action)> {
    planned
        .plan
        .changes
        .iter()
        .map(|change| (change.subject.as_str(), change.action))
        .collect()
}

#[test]
fn each_service_is_judged_by_its_own_definition() {
    let wanted = services(&[("api", "new"), ("db", "same"), ("web", "first")]);
    let result = planned(
        &wanted,
        &[
            container("api", "old"),
            container("db", "same"),
            container("gone", "x"),
        ],
    );
    assert_eq!(
        actions(&result),
        [
            ("api", Action::Recreate),
            ("db", Action::Keep),
            ("gone", Action::Remove),
            ("web", Action::Create)
        ]
    );
    assert!(result.needed && result.plan.has_changes());
    assert_eq!(result.orphans.len(), 1);
}

#[test]
fn an_unchanged_project_needs_nothing() {
    let once = Container {
        status: Status::Exited,
        ..container("migrate", "m")
    };
    let result = planned(
        &services(&[("migrate", "m"), ("web", "w")]),
        &[once, container("web", "w")],
    );
    assert!(!result.needed && !result.plan.has_changes());
}

#[test]
fn reasons_name_and_never_show_values() {
    let mut old = wanted("old");
    old.parts = BTreeMap::from([
        ("environment `A`".to_owned(), "\"hunter2\"".to_owned()),
        ("mount `/f`".to_owned(), "1".to_owned()),
        ("`command`".to_owned(), "1".to_owned()),
    ]);
    let mut record = record();
    record.add(&BTreeMap::from([("web".to_owned(), old)]));
    let mut new = wanted("new");
    new.parts = BTreeMap::from([
        ("environment `B`".to_owned(), "\"s3cret\"".to_owned()),
        ("mount `/f`".to_owned(), "2".to_owned()),
        ("`command`".to_owned(), "1".to_owned()),
    ]);
    let running = Container {
        image: format!("r.example/x@sha256:{}", "b".repeat(64)),
        ..container("web", "old")
    };
    let result = plan(
        "shop",
        false,
        "shop",
        &BTreeMap::from([("web".to_owned(), new)]),
        &[running],
        &record,
    )
    .unwrap();
    assert_eq!(
        result.plan.changes[0].reason,
        "image sha256:bbbbbbbbbbbb → sha256:aaaaaaaaaaaa; environment `A`, `B` changed; mounted content of `/f` changed"
    );
}

#[test]
fn drift_is_a_change() {
    let wanted = services(&[("web", "w")]);
    for (broken, action) in [
        (
            Container {
                status: Status::Exited,
                exit_code: 1,
                ..container("web", "w")
            },
            Action::Create,
        ),
        (
            Container {
                status: Status::Exited,
                always_restarted: true,
                ..container("web", "w")
            },
            Action::Create,
        ),
        (
            Container {
                status: Status::Created,
                ..container("web", "w")
            },
            Action::Create,
        ),
        (
            Container {
                image: "r.example/other".to_owned(),
                ..container("web", "w")
            },
            Action::Recreate,
        ),
    ] {
        assert_eq!(
            actions(&planned(&wanted, std::slice::from_ref(&broken))),
            [("web", action)],
            "{broken:?}"
        );
    }
    let twice = [
        container("web", "w"),
        Container {
            id: "2".to_owned(),
            ..container("web", "w")
        },
    ];
    assert_eq!(
        actions(&planned(&wanted, &twice)),
        [("web", Action::Recreate)]
    );
    let mut two = wanted.clone();
    two.get_mut("web").unwrap().replicas = 2;
    assert_eq!(
        actions(&planned(&two, &twice[..1])),
        [("web", Action::Create)]
    );
    assert_eq!(actions(&planned(&two, &twice)), [("web", Action::Keep)]);
}

#[test]
fn a_project_of_someone_else_is_refused_unless_adopted() {
    let wanted = services(&[("web", "w")]);
    let refused = |containers: &[Container]| {
        plan("shop", false, "shop", &wanted, containers, &record()).unwrap_err()
    };
    assert!(refused(&[stranger("web")]).contains("adopt"));
    assert!(
        refused(&[stranger("other")]).contains("adopt"),
        "even without a common service"
    );
    assert!(refused(&[container("web", "w"), stranger("web")]).contains("adopt"));
    let other = Container {
        target: Some("stage".to_owned()),
        ..container("web", "w")
    };
    assert!(refused(&[other]).contains("target `stage`"));

    let adopted = plan(
        "shop",
        true,
        "shop",
        &wanted,
        &[stranger("web"), stranger("other")],
        &record(),
    )
    .unwrap();
    assert_eq!(actions(&adopted), [("web", Action::Recreate)]);
    assert_eq!((adopted.strangers.len(), adopted.orphans.len()), (1, 0));
}

#[test]
fn strangers_beside_our_containers_are_listed_and_left() {
    let result = planned(
        &services(&[("web", "w")]),
        &[container("web", "w"), stranger("debug")],
    );
    assert_eq!(actions(&result), [("web", Action::Keep)]);
    assert!(result.plan.notes[0].contains("debug"));
    let run = Container {
        one_off: true,
        ..stranger("web")
    };
    assert!(
        planned(&services(&[("web", "w")]), &[container("web", "w"), run])
            .plan
            .notes
            .is_empty(),
        "`docker compose run` is nobody's business"
    );
}

#[test]
fn a_service_goes_with_the_one_whose_namespace_it_shares() {
    let mut wanted = services(&[("app", "new"), ("second", "s"), ("side", "x")]);
    wanted
        .get_mut("side")
        .unwrap()
        .parents
        .insert("app".to_owned());
    wanted
        .get_mut("second")
        .unwrap()
        .parents
        .insert("side".to_owned());
    let result = planned(
        &wanted,
        &[
            container("app", "old"),
            container("second", "s"),
            container("side", "x"),
        ],
    );
    assert!(
        result
            .plan
            .changes
            .iter()
            .all(|change| change.action == Action::Recreate),
        "{:?}",
        result.plan
    );
}

#[test]
fn samples_tell_good_from_bad() {
    use SampleState::{Failed, Healthy, Pending};
    let base = || container("web", "w");
    let cases = [
        (base(), Healthy, "running"),
        (
            Container {
                health: Health::Healthy,
                ..base()
            },
            Healthy,
            "running, healthy",
        ),
        (
            Container {
                health: Health::Starting,
                ..base()
            },
            Pending,
            "starting",
        ),
        (
            Container {
                health: Health::Unhealthy,
                ..base()
            },
            Failed,
            "unhealthy",
        ),
        (
            Container {
                status: Status::Exited,
                ..base()
            },
            Healthy,
            "exited with 0",
        ),
        (
            Container {
                status: Status::Exited,
                exit_code: 137,
                out_of_memory: true,
                ..base()
            },
            Failed,
            "exited with 137, out of memory",
        ),
        (
            Container {
                status: Status::Exited,
                always_restarted: true,
                ..base()
            },
            Failed,
            "exited with 0",
        ),
        (
            Container {
                status: Status::Restarting,
                restarts: 1,
                exit_code: 1,
                ..base()
            },
            Pending,
            "restarting",
        ),
        (
            Container {
                status: Status::Restarting,
                restarts: 3,
                exit_code: 1,
                ..base()
            },
            Failed,
            "restarting (3 times), exited with 1",
        ),
        (
            Container {
                status: Status::Created,
                ..base()
            },
            Pending,
            "not started",
        ),
        (
            Container {
                status: Status::Created,
                error: "port is taken".to_owned(),
                ..base()
            },
            Failed,
            "port is taken",
        ),
        (
            Container {
                status: Status::Paused,
                ..base()
            },
            Pending,
            "paused",
        ),
        (
            Container {
                status: Status::Dead,
                ..base()
            },
            Failed,
            "dead",
        ),
        (
            Container {
                target: None,
                ..base()
            },
            Failed,
            "another definition",
        ),
        (container("web", "old"), Failed, "another definition"),
        (
            Container {
                image: "x".to_owned(),
                ..base()
            },
            Failed,
            "runs image `x`",
        ),
        (container("other", "w"), Failed, "no container"),
    ];
    for (container, state, detail) in cases {
        let sample = sample(
            "shop",
            &services(&[("web", "w")]),
            std::slice::from_ref(&container),
        );
        assert_eq!(sample.state, state, "{container:?}");
        assert!(
            sample.services[0].detail.contains(detail),
            "{} has no {detail}",
            sample.services[0].detail
        );
    }
}

#[test]
fn only_a_replacement_that_never_ran_is_unfinished() {
    let named = |name: &str, status| Container {
        name: name.to_owned(),
        status,
        ..Container::default()
    };
    assert_eq!(
        named("05ec1bb55b72_shop-web-1", Status::Created).unfinished(),
        Some("shop-web-1")
    );
    for (name, status) in [
        ("05ec1bb55b72_shop-web-1", Status::Running),
        ("shop_web_1", Status::Created),
        ("shop-web-1", Status::Created),
        ("05ec1bb55b72_", Status::Created),
    ] {
        assert_eq!(named(name, status).unfinished(), None, "{name}");
    }
}

#[test]
fn a_short_name_is_the_same_image() {
    let mut wanted = services(&[("web", "w")]);
    let digest = "a".repeat(64);
    wanted.get_mut("web").unwrap().image =
        oci::Reference::parse_familiar(&format!("docker.io/library/busybox@sha256:{digest}"))
            .unwrap();
    let running = Container {
        image: format!("busybox@sha256:{digest}"),
        ..container("web", "w")
    };
    assert_eq!(
        actions(&planned(&wanted, &[running])),
        [("web", Action::Keep)]
    );
}

#[test]
fn the_worst_container_decides() {
    let mut wanted = services(&[("web", "w")]);
    wanted.get_mut("web").unwrap().replicas = 2;
    let bad = Container {
        id: "2".to_owned(),
        health: Health::Unhealthy,
        ..container("web", "w")
    };
    let result = sample("shop", &wanted, &[container("web", "w"), bad]);
    assert_eq!(
        result.state,
        SampleState::Failed,
        "a replica may not hide behind another"
    );
    assert_eq!(
        sample("shop", &wanted, &[container("web", "w")]).state,
        SampleState::Failed
    );
}

#[test]
fn the_fingerprint_follows_restarts_and_replacements_not_health() {
    let print =
        |container: Container| sample("shop", &services(&[("web", "w")]), &[container]).fingerprint;
    let base = || Container {
        started_at: "1".to_owned(),
        ..container("web", "w")
    };
    assert_eq!(
        print(base()),
        print(Container {
            health: Health::Healthy,
            ..base()
        })
    );
    assert_ne!(
        print(base()),
        print(Container {
            restarts: 1,
            ..base()
        })
    );
    assert_ne!(
        print(base()),
        print(Container {
            started_at: "2".to_owned(),
            ..base()
        })
    );
    assert_ne!(
        print(base()),
        print(Container {
            id: "x".to_owned(),
            ..base()
        })
    );
}

proptest! {
    /// Whatever state a kill leaves, carrying the plan out leaves nothing to plan.
    #[test]
    fn plans_converge(left in prop::collection::vec((0..3usize, 0..2usize, 0..4usize), 0..6)) {
        let names = ["a", "b", "gone"];
        let statuses = [Status::Running, Status::Created, Status::Exited, Status::Restarting];
        let wanted = services(&[("a", "new"), ("b", "new")]);
        let mut containers: Vec<Container> = left.iter().enumerate().map(|(index, (name, definition, status))| Container {
            id: index.to_string(), status: statuses[*status], exit_code: 1, ..container(names[*name], ["old", "new"][*definition])
        }).collect();
        let first = planned(&wanted, &containers);
        // What Compose does with it.
        for change in &first.plan.changes {
            match change.action {
                Action::Keep => {}
                Action::Remove => containers.retain(|container| container.service != change.subject),
                Action::Create | Action::Recreate => {
                    containers.retain(|container| container.service != change.subject);
                    containers.push(container(&change.subject, "new"));
                }
            }
        }
        let second = planned(&wanted, &containers);
        prop_assert!(!second.plan.has_changes() && !second.needed, "{:?}", second.plan);
        prop_assert_eq!(sample("shop", &wanted, &containers).services.len(), 2);
    }
}
