use proptest::prelude::*;

use super::*;

const DAY: i64 = 86_400_000_000;
const NOW: Timestamp = Timestamp(1000 * DAY);

fn facts(tag: &str, pushed: i64, pulled: Option<i64>) -> Facts {
    Facts {
        tag: tag.parse().unwrap(),
        pushed: Timestamp(pushed * DAY),
        pulled: pulled.map(|day| Timestamp(day * DAY)),
        pinned: false,
        signed: false,
    }
}

fn policy(keep: Vec<Keep>) -> Policy {
    Policy {
        repositories: vec!["**".parse().unwrap()],
        keep,
        untagged: None,
    }
}

/// The tags that stay.
fn kept(policy: &Policy, all: &[Facts]) -> Vec<String> {
    let mut ranking = Ranking::new(policy);
    for facts in all {
        ranking.add(policy, facts, NOW);
    }
    all.iter()
        .filter(|facts| policy.judge(1, &ranking, facts, NOW).keeps)
        .map(|facts| facts.tag.as_str().to_owned())
        .collect()
}

fn days(count: u64) -> Duration {
    Duration::from_hours(24 * count)
}

#[test]
fn each_condition_keeps_what_it_says() {
    let mut all = vec![
        facts("v1.0.0", 100, Some(999)),
        facts("v1.5.0", 200, Some(500)),
        facts("v2.0.0-rc.1", 300, None),
        facts("2.1.0", 400, Some(600)),
        facts("main", 999, None),
        facts("pr-7", 995, None),
    ];
    let check = |all: &[Facts], keep: Keep, expected: &[&str]| {
        assert!(!keep.is_empty());
        let text = keep.to_string();
        assert_eq!(kept(&policy(vec![keep]), all), expected, "{text}");
    };
    let globs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    check(
        &all,
        Keep {
            tags: globs(&["v1.*", "main"]),
            ..Keep::default()
        },
        &["v1.0.0", "v1.5.0", "main"],
    );
    check(
        &all,
        Keep {
            regex: Some(Pattern::new(r"^v?\d+\.").unwrap()),
            ..Keep::default()
        },
        &["v1.0.0", "v1.5.0", "v2.0.0-rc.1", "2.1.0"],
    );
    check(
        &all,
        Keep {
            semver: Some(">=1.2, <3".parse().unwrap()),
            ..Keep::default()
        },
        &["v1.5.0", "2.1.0"],
    );
    check(
        &all,
        Keep {
            newest: Some(2),
            ..Keep::default()
        },
        &["main", "pr-7"],
    );
    check(
        &all,
        Keep {
            newest_pulled: Some(2),
            ..Keep::default()
        },
        &["v1.0.0", "2.1.0"],
    );
    check(
        &all,
        Keep {
            pushed_within: Some(days(3)),
            ..Keep::default()
        },
        &["main"],
    );
    check(
        &all,
        Keep {
            pulled_within: Some(days(450)),
            ..Keep::default()
        },
        &["v1.0.0", "2.1.0"],
    );
    // The newest are counted among those for which the other conditions hold.
    check(
        &all,
        Keep {
            tags: globs(&["v*"]),
            newest: Some(1),
            ..Keep::default()
        },
        &["v2.0.0-rc.1"],
    );
    all[1].signed = true;
    all[3].pinned = true;
    check(
        &all,
        Keep {
            signed: true,
            ..Keep::default()
        },
        &["v1.5.0", "2.1.0"],
    );
}

#[test]
fn without_rules_everything_is_kept_and_reasons_name_the_rule() {
    let all = [facts("a", 1, None), facts("b", 2, None)];
    assert_eq!(kept(&policy(Vec::new()), &all), ["a", "b"]);
    let rules = policy(vec![
        Keep {
            signed: true,
            ..Keep::default()
        },
        Keep {
            newest: Some(1),
            pushed_within: Some(days(5000)),
            ..Keep::default()
        },
    ]);
    let mut ranking = Ranking::new(&rules);
    for facts in &all {
        ranking.add(&rules, facts, NOW);
    }
    let reason = |facts| rules.judge(3, &ranking, facts, NOW).reason;
    assert_eq!(reason(&all[0]), "no rule of policy 3 keeps it");
    assert_eq!(
        reason(&all[1]),
        "policy 3, rule 2: newest 1, pushed within 5000d"
    );
}

#[test]
fn the_first_policy_that_matches_decides() {
    let of = |patterns: &[&str]| Policy {
        repositories: patterns.iter().map(|text| text.parse().unwrap()).collect(),
        ..Policy::default()
    };
    let policies = [of(&["shop/**"]), of(&["shop/web", "other"]), of(&["**"])];
    let first = |name: &str| Policy::first(&policies, &name.parse().unwrap()).unwrap().0;
    assert_eq!(first("shop/web"), 1);
    assert_eq!(first("other"), 2);
    assert_eq!(first("x/y"), 3);
    assert!(Policy::first(&policies[..2], &"x/y".parse().unwrap()).is_none());
}

#[test]
fn patterns_that_cannot_be_meant_are_refused() {
    assert!(Pattern::new("(").is_err());
    assert!(Pattern::new(&"a".repeat(300)).is_err());
}

prop_compose! {
    fn some_facts()(
        name in "(v?[0-3]\\.[0-3]\\.[0-3]|[a-c]{1,2})",
        pushed in 900_i64..1000,
        pulled in proptest::option::of(900_i64..1000),
        pinned in proptest::bool::weighted(0.1),
        signed in any::<bool>(),
    ) -> Facts {
        Facts { pinned, signed, ..facts(&name, pushed, pulled) }
    }
}

prop_compose! {
    fn some_keep()(
        tags in proptest::collection::vec("(v\\*|\\*|a|[a-c]\\*)", 0..2),
        semver in proptest::option::of("(>=[0-2]|<[1-3]|[0-3]\\.[0-3])"),
        newest in proptest::option::of(1_u32..6),
        newest_pulled in proptest::option::of(1_u32..6),
        pushed in proptest::option::of(1_u64..100),
        pulled in proptest::option::of(1_u64..100),
        signed in any::<bool>(),
    ) -> Keep {
        Keep {
            tags: tags.iter().map(|text| text.parse().unwrap()).collect(),
            regex: None,
            semver: semver.map(|text| text.parse().unwrap()),
            newest,
            newest_pulled,
            pushed_within: pushed.map(days),
            pulled_within: pulled.map(days),
            signed,
        }
    }
}

/// Each name once, as in a repository.
fn repository(mut all: Vec<Facts>) -> Vec<Facts> {
    all.sort_by(|a, b| a.tag.cmp(&b.tag));
    all.dedup_by(|a, b| a.tag == b.tag);
    all
}

proptest! {
    #[test]
    fn one_more_rule_removes_nothing_that_was_kept(
        all in proptest::collection::vec(some_facts(), 0..40),
        keep in proptest::collection::vec(some_keep(), 1..4),
        more in some_keep(),
        at in 0_usize..4,
    ) {
        let all = repository(all);
        let before = kept(&policy(keep.clone()), &all);
        let mut longer = keep;
        longer.insert(at.min(longer.len()), more);
        let after = kept(&policy(longer), &all);
        prop_assert!(before.iter().all(|tag| after.contains(tag)), "{before:?} {after:?}");
    }

    #[test]
    fn judging_what_was_kept_keeps_it(
        all in proptest::collection::vec(some_facts(), 0..40),
        keep in proptest::collection::vec(some_keep(), 1..4),
    ) {
        let all = repository(all);
        let policy = policy(keep);
        let first = kept(&policy, &all);
        let left: Vec<_> = all
            .into_iter()
            .filter(|facts| first.iter().any(|tag| tag == facts.tag.as_str()))
            .collect();
        prop_assert_eq!(kept(&policy, &left), first);
    }

    #[test]
    fn the_order_in_which_tags_are_shown_does_not_matter(
        all in proptest::collection::vec(some_facts(), 0..40),
        keep in proptest::collection::vec(some_keep(), 1..4),
    ) {
        let all = repository(all);
        let policy = policy(keep);
        let mut forwards = kept(&policy, &all);
        let turned: Vec<_> = all.iter().rev().cloned().collect();
        let mut backwards = kept(&policy, &turned);
        forwards.sort();
        backwards.sort();
        prop_assert_eq!(forwards, backwards);
    }

    #[test]
    fn a_ranking_holds_no_more_than_is_asked_for(
        all in proptest::collection::vec(some_facts(), 0..100),
        count in 1_u32..5,
    ) {
        let policy = policy(vec![Keep { newest: Some(count), ..Keep::default() }]);
        let mut ranking = Ranking::new(&policy);
        for facts in &all {
            ranking.add(&policy, facts, NOW);
            prop_assert!(ranking.0[0].pushed.len() <= count as usize);
        }
    }
}

#[test]
fn what_came_after_the_ranking_ranks_with_what_it_is_now() {
    let newest = |newest, newest_pulled| {
        policy(vec![Keep {
            newest,
            newest_pulled,
            ..Keep::default()
        }])
    };
    let all = [
        facts("a", 10, Some(10)),
        facts("b", 20, Some(20)),
        facts("c", 30, Some(30)),
    ];
    for policy in [newest(Some(2), None), newest(None, Some(2))] {
        let mut ranking = Ranking::new(&policy);
        for facts in &all {
            ranking.add(&policy, facts, NOW);
        }
        let keeps = |facts: &Facts| policy.judge(1, &ranking, facts, NOW).keeps;
        assert!(!keeps(&all[0]) && keeps(&all[1]) && keeps(&all[2]));
        // Pushed and pulled between the ranking and the verdict.
        assert!(keeps(&facts("a", 40, Some(40))));
        assert!(keeps(&facts("new", 40, Some(40))));
        assert!(!keeps(&facts("new", 15, Some(15))));
    }
    // As long as fewer than asked for counted, whatever comes is among them.
    let policy = newest(Some(5), None);
    let mut ranking = Ranking::new(&policy);
    ranking.add(&policy, &all[2], NOW);
    assert!(policy.judge(1, &ranking, &all[0], NOW).keeps);
}
