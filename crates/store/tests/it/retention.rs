//! Retention, on every engine: plans, removals through the one door, and undoing them.

use std::sync::Arc;
use std::time::Duration;

use oci::{Digest, Glob, RepositoryName};
use store::{
    Error, EventKind, Expected, ExpectedPins, Keep, Options, Pin, Policy, PutManifest, Retention,
    Store, Verdict,
};

use crate::engine::{
    Engine, actor, by_tag, content, described, image, name, push_blob, push_image, put, put_of,
    tag, write_of,
};

/// The policies that these tests go by.
pub(crate) fn options() -> Options {
    let globs =
        |texts: &[&str]| -> Vec<Glob> { texts.iter().map(|text| text.parse().unwrap()).collect() };
    Options {
        retention: Arc::new(Retention {
            policies: vec![
                Policy {
                    repositories: globs(&["keep/all"]),
                    keep: Vec::new(),
                    untagged: None,
                },
                Policy {
                    repositories: globs(&["keep/**"]),
                    keep: vec![
                        Keep {
                            tags: globs(&["release-*"]),
                            ..Keep::default()
                        },
                        Keep {
                            newest: Some(2),
                            ..Keep::default()
                        },
                        Keep {
                            newest_pulled: Some(1),
                            ..Keep::default()
                        },
                        Keep {
                            signed: true,
                            ..Keep::default()
                        },
                    ],
                    untagged: Some(Duration::from_hours(7 * 24)),
                },
            ],
            interval: Duration::from_hours(24),
            window: None,
        }),
        ..Options::default()
    }
}

pub(crate) async fn what_no_rule_keeps_is_removed_and_can_be_put_back(engine: &Engine) {
    let store = &engine.store;
    let repository = name("keep/app");
    let mut views = Vec::new();
    for (seed, tags) in [
        (2000, &["old", "release-1"][..]),
        (2001, &["pinned"]),
        (2002, &["pulled"]),
        (2003, &["signed"]),
        (2004, &["gone", "again"]),
        (2005, &["new-1"]),
        (2006, &["new-2"]),
    ] {
        views.push(push_image(store, &repository, seed, tags).await);
        store.advance_clock(Duration::from_secs(1));
    }
    let digest = |index: usize| described(&views[index]).digest;
    // Evidence of `signed`, by the tag of older clients.
    let evidence = format!("sha256-{}.sig", digest(3).hex());
    let config = push_blob(store, &repository, &content(2010, 10)).await;
    let signature = image(&config, &[]);
    put(store, &repository, &signature, &[]).await.unwrap();
    store
        .put_manifest(PutManifest {
            tags: vec![write_of(&evidence)],
            ..put_of(&repository, &signature, &[])
        })
        .await
        .unwrap();
    engine
        .change(&format!(
            "INSERT INTO pull (repository_id, digest, principal, hour, pulls) \
             SELECT r.id, {}, 'user:alice', 480000, 3 FROM repository r WHERE r.name = 'keep/app'",
            engine.digest_literal(&digest(2))
        ))
        .await;
    pin(store, "host1", &repository, &digest(1)).await;
    // Of no policy, and of one that keeps everything.
    for other in ["other/app", "keep/all"] {
        push_image(store, &name(other), 2000, &["old", "older"]).await;
    }
    // The evidence is the newest of all and counts for nothing; a moment later nothing "moved during the run".
    store.advance_clock(Duration::from_secs(1));

    // A dry run writes the plan and removes nothing.
    let plan = ended(
        store,
        store.start_retention(true, None, &actor()).await.unwrap(),
    )
    .await;
    assert!(plan.dry_run);
    assert_eq!((plan.kept, plan.removed), (8, 3));
    assert_eq!(store.tags(&repository, None, 100).await.unwrap().len(), 10);
    let decisions = store
        .retention_decisions(plan.id, None, None, 1000)
        .await
        .unwrap();
    let said: Vec<_> = decisions
        .iter()
        .filter(|decision| decision.repository == repository)
        .map(|decision| {
            (
                decision.tag.as_str(),
                decision.keeps,
                decision.reason.as_str(),
            )
        })
        .collect();
    let none = "no rule of policy 2 keeps it";
    assert_eq!(
        said,
        [
            ("again", false, none),
            ("gone", false, none),
            ("new-1", true, "policy 2, rule 2: newest 2"),
            ("new-2", true, "policy 2, rule 2: newest 2"),
            ("old", false, none),
            ("pinned", true, "it is pinned"),
            ("pulled", true, "policy 2, rule 3: newest pulled 1"),
            ("release-1", true, "policy 2, rule 1: tags `release-*`"),
            ("signed", true, "policy 2, rule 4: signed"),
        ]
    );
    let explained = async |text: &str| store.retention_of(&repository, &tag(text)).await.unwrap();
    assert_eq!(
        explained("gone").await,
        Some(Verdict {
            keeps: false,
            reason: none.to_owned()
        })
    );
    assert!(explained("new-2").await.is_some_and(|said| said.keeps));
    assert!(explained("nosuch").await.is_none());

    let before = store.event_bounds().await.unwrap().newest;
    let run = ended(
        store,
        store.start_retention(false, None, &actor()).await.unwrap(),
    )
    .await;
    assert_eq!((run.kept, run.removed), (8, 3));
    for text in ["again", "gone", "old"] {
        assert!(
            store.tag(&repository, &tag(text)).await.unwrap().is_none(),
            "{text}"
        );
        let history = store
            .tag_history(&repository, &tag(text), None, 10)
            .await
            .unwrap();
        assert_eq!(history[0].actor, "system:retention");
        assert!(history[0].digest.is_none());
    }
    assert_eq!(store.tags(&repository, None, 100).await.unwrap().len(), 7);
    store.seal().await.unwrap();
    let events = store.events_after(before, 100).await.unwrap();
    assert_eq!(
        events
            .iter()
            .filter(|event| event.kind == EventKind::TagDeleted)
            .count(),
        3
    );
    // Again: nothing is left to remove.
    let again = ended(
        store,
        store.start_retention(false, None, &actor()).await.unwrap(),
    )
    .await;
    assert_eq!((again.kept, again.removed), (8, 0));

    // Its manifest is kept for the time of the policy: a week and not a day.
    store.advance_clock(Duration::from_hours(6 * 24));
    store.maintain_once().await.unwrap();
    let dry = store
        .undo_retention(plan.id, &repository, &tag("gone"), &actor())
        .await
        .unwrap();
    assert!(
        dry.problem
            .is_some_and(|problem| problem.contains("did not remove it"))
    );
    let removed = store.retention_removed(run.id, None, 2).await.unwrap();
    assert_eq!(removed.len(), 2);
    let rest = store
        .retention_removed(run.id, Some(("keep/app", "gone")), 100)
        .await
        .unwrap();
    assert_eq!(rest, [(repository.clone(), tag("old"))]);
    let undone = store
        .undo_retention(run.id, &repository, &tag("gone"), &actor())
        .await
        .unwrap();
    assert_eq!(undone.restored, Some(digest(4)), "{undone:?}");
    assert!(
        store
            .manifest(&repository, &by_tag("gone"))
            .await
            .unwrap()
            .is_some()
    );
    let twice = store
        .undo_retention(run.id, &repository, &tag("gone"), &actor())
        .await
        .unwrap();
    assert!(
        twice
            .problem
            .is_some_and(|problem| problem.contains("already"))
    );
    // A tag of that name has come again, elsewhere.
    put(store, &repository, &views[6], &["again"])
        .await
        .unwrap();
    let taken = store
        .undo_retention(run.id, &repository, &tag("again"), &actor())
        .await
        .unwrap();
    assert!(
        taken
            .problem
            .is_some_and(|problem| problem.contains("again"))
    );
    assert_eq!(
        store
            .tag(&repository, &tag("again"))
            .await
            .unwrap()
            .unwrap()
            .digest,
        digest(6)
    );
    // A manifest that was deleted cannot come back.
    store
        .delete_tag(&repository, &tag("release-1"), Expected::Any, &actor())
        .await
        .unwrap();
    store
        .delete_manifest(&repository, &digest(0), &actor())
        .await
        .unwrap();
    let lost = store
        .undo_retention(run.id, &repository, &tag("old"), &actor())
        .await
        .unwrap();
    assert!(
        lost.problem
            .is_some_and(|problem| problem.contains("is gone"))
    );
    store
        .remove_pins("host1", ExpectedPins::Any, &actor())
        .await
        .unwrap();
}

/// What moved or was pinned between the plan and the removal stays.
pub(crate) async fn what_moved_after_the_plan_stays(engine: &Engine) {
    let store = &engine.store;
    let repository = name("keep/moving");
    let view = push_image(store, &repository, 2200, &["moves", "pinned", "goes"]).await;
    for seed in 2201..2203 {
        store.advance_clock(Duration::from_secs(1));
        push_image(store, &repository, seed, &[&format!("newer-{seed}")]).await;
    }
    let held = push_image(store, &repository, 2203, &[]).await;
    put(store, &repository, &held, &["newer-2203"])
        .await
        .unwrap();
    store.advance_clock(Duration::from_secs(1));
    put(store, &repository, &held, &["newest"]).await.unwrap();
    store.advance_clock(Duration::from_secs(1));
    let only = Some(repository.clone());
    let plan = ended(
        store,
        store.start_retention(true, only, &actor()).await.unwrap(),
    )
    .await;
    assert_eq!(plan.removed, 5);
    put(store, &repository, &held, &["moves"]).await.unwrap();
    let other = push_image(store, &repository, 2204, &[]).await;
    put(store, &repository, &other, &["newer-2201"])
        .await
        .unwrap();
    pin(store, "host2", &repository, &described(&view).digest).await;
    store.remove_planned(plan.id, &repository).await.unwrap();
    assert_eq!(
        store.tags(&repository, None, 100).await.unwrap(),
        [
            "goes",
            "moves",
            "newer-2201",
            "newer-2203",
            "newest",
            "pinned"
        ]
    );
    let stayed = store
        .retention_decisions(plan.id, None, Some(true), 100)
        .await
        .unwrap();
    let reasons: Vec<_> = stayed
        .iter()
        .map(|decision| (decision.tag.as_str(), decision.reason.as_str()))
        .filter(|(_, reason)| reason.contains("after the plan"))
        .collect();
    assert_eq!(
        reasons,
        [
            ("goes", "it was pinned after the plan"),
            ("moves", "it was pinned after the plan"),
            ("newer-2201", "it moved after the plan"),
            ("pinned", "it was pinned after the plan"),
        ]
    );
    store
        .remove_pins("host2", ExpectedPins::Any, &actor())
        .await
        .unwrap();
}

/// Runs come by the clock, one for all replicas, and old ones are forgotten.
pub(crate) async fn runs_come_by_the_clock(store: &Store) {
    assert!(!store.retain_when_due().await.unwrap());
    let next = store.next_retention().await.unwrap().unwrap();
    assert!(!store.retain_when_due().await.unwrap());
    store.advance_clock(Duration::from_hours(25));
    assert!(store.retain_when_due().await.unwrap());
    assert!(!store.retain_when_due().await.unwrap());
    assert!(store.next_retention().await.unwrap().unwrap() > next);
    let runs = store.retention_runs(None, 100).await.unwrap();
    assert_eq!(runs[0].actor, "system:retention");
    assert!(runs[0].finished_at.is_some());
    assert!(
        runs[0]
            .policy
            .contains("2. keep/**: keep (tags `release-*`)")
    );
    // Of older runs what was kept is forgotten, what was removed is not.
    for run in &runs[1..] {
        let kept = store
            .retention_decisions(run.id, None, Some(true), 10)
            .await
            .unwrap();
        assert!(kept.is_empty(), "{kept:?}");
    }
    let oldest = runs.last().unwrap().id;
    store.advance_clock(Duration::from_hours(91 * 24));
    assert!(store.retain_when_due().await.unwrap());
    assert!(store.retention_run(oldest).await.unwrap().is_none());

    // Not while an operator has stopped writes.
    store.set_read_only("backup", &actor()).await.unwrap();
    store.advance_clock(Duration::from_hours(25));
    let refused = store.retain_when_due().await;
    assert!(
        matches!(refused, Err(Error::ReadOnly { .. })),
        "{refused:?}"
    );
    store.set_normal(&actor()).await.unwrap();
    assert!(store.retain_when_due().await.unwrap());
}

/// More tags than a page, in one repository.
pub(crate) async fn many_tags_are_walked_in_pages(store: &Store) {
    let repository = name("keep/many");
    let view = push_image(store, &repository, 2100, &[]).await;
    for hundred in 0..12 {
        let tags: Vec<_> = (0..100)
            .map(|n| format!("t{:04}", hundred * 100 + n))
            .collect();
        let tags: Vec<_> = tags.iter().map(String::as_str).collect();
        put(store, &repository, &view, &tags).await.unwrap();
        store.advance_clock(Duration::from_millis(10));
    }
    put(store, &repository, &view, &["release-x"])
        .await
        .unwrap();
    store.advance_clock(Duration::from_secs(1));
    let only = Some(repository.clone());
    let run = ended(
        store,
        store.start_retention(false, only, &actor()).await.unwrap(),
    )
    .await;
    // The newest two, `release-x` among them.
    assert_eq!((run.kept, run.removed), (2, 1199));
    assert_eq!(
        store.tags(&repository, None, 100).await.unwrap(),
        ["release-x", "t1199"]
    );
    let verdict = store
        .retention_of(&repository, &tag("t1199"))
        .await
        .unwrap();
    assert!(verdict.unwrap().keeps);
}

async fn pin(store: &Store, holder: &str, repository: &RepositoryName, digest: &Digest) {
    let pin = Pin {
        repository: repository.clone(),
        digest: digest.clone(),
        reason: "deployed".to_owned(),
        expires: None,
    };
    store
        .set_pins(holder, vec![pin], ExpectedPins::Any, &actor())
        .await
        .unwrap();
}

pub(crate) async fn ended(store: &Store, run: i64) -> store::RetentionRun {
    loop {
        let found = store.retention_run(run).await.unwrap().unwrap();
        if found.finished_at.is_some() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
