use proptest::prelude::*;

use super::*;

fn digest(number: u8) -> Digest {
    Digest::sha256(&[number])
}

fn context(config: &str) -> Context<'_> {
    Context {
        rollback: Rollback::Auto,
        config,
        now: "2026-01-01T00:00:00Z",
    }
}

fn resolved(number: u8) -> Event {
    Event::Resolved {
        digest: digest(number),
        trigger: Trigger::Poll,
    }
}

fn deploy(number: u8) -> Event {
    Event::Resolved {
        digest: digest(number),
        trigger: Trigger::Deploy,
    }
}

fn failed(kind: Failure) -> Event {
    Event::Failed {
        kind,
        reason: "because".to_owned(),
    }
}

fn after(state: &State, events: &[Event]) -> State {
    events.iter().fold(state.clone(), |state, event| {
        state.after(event, context("c"))
    })
}

/// Brings a release all the way to where it is applied.
fn applied(state: &State, number: u8) -> State {
    let mut state = state.after(&resolved(number), context("c"));
    while state.phase != Phase::Observing {
        assert!(state.pending().is_some(), "{:?}", state.phase);
        state = state.after(&Event::Done, context("c"));
    }
    state
}

fn good(state: &State, number: u8) -> State {
    let state = applied(state, number).after(&Event::Done, context("c"));
    assert_eq!(state.phase, Phase::Good);
    state
}

#[test]
fn the_way_to_good_passes_every_phase() {
    let mut state = State::default().after(&resolved(1), context("c"));
    let mut names = vec![state.phase.name()];
    while state.pending().is_some() {
        state = state.after(&Event::Done, context("c"));
        names.push(state.phase.name());
    }
    assert_eq!(
        names.join(" "),
        "resolved fetched verified admitted extracted planned pulled applying observing good"
    );
    assert_eq!(state.good[0].digest, digest(1));
}

#[test]
fn an_unchanged_digest_changes_nothing() {
    let state = good(&State::default(), 1);
    assert_eq!(state.after(&resolved(1), context("c")), state);
}

#[test]
fn an_unhealthy_release_is_rolled_back_and_quarantined() {
    let state = applied(&good(&State::default(), 1), 2);
    let state = state.after(&failed(Failure::Unhealthy), context("c"));
    assert!(
        state.is_quarantined(&digest(2)),
        "before anything is undone"
    );
    assert_eq!(state.pending(), Some(Step::Apply(digest(1))));
    let state = after(&state, &[Event::Done, Event::Done]);
    assert_eq!(state.phase.name(), "rolled-back");
    assert_eq!(state.running.as_ref().unwrap().standing, Standing::Good);
    // Every later poll, also one after the tag went away and came back.
    let later = after(&state, &[resolved(2)]);
    assert_eq!(later.phase, state.phase);
    let back = after(&later, &[resolved(1), resolved(2)]);
    assert_eq!(back.phase, Phase::Good);
    assert_eq!(back.pending(), None);
    let lifted = after(&back, &[Event::Unquarantine(digest(2)), resolved(2)]);
    assert_eq!(lifted.phase, Phase::Resolved);
}

#[test]
fn without_a_good_release_a_failure_is_broken_until_something_newer_or_an_order() {
    let state = applied(&State::default(), 1).after(&failed(Failure::Unhealthy), context("c"));
    assert_eq!(state.phase.name(), "broken");
    assert!(!state.is_quarantined(&digest(1)));
    assert_eq!(state.after(&resolved(1), context("c")).phase, state.phase);
    assert_eq!(
        state.after(&resolved(2), context("c")).phase,
        Phase::Resolved
    );
    assert_eq!(state.after(&deploy(1), context("c")).phase, Phase::Resolved);
}

#[test]
fn rollback_never_stops_and_reports() {
    let state = applied(&good(&State::default(), 1), 2);
    let never = Context {
        rollback: Rollback::Never,
        ..context("c")
    };
    let state = state.after(&failed(Failure::Unhealthy), never);
    assert_eq!(state.phase.name(), "broken");
}

#[test]
fn missing_evidence_waits_and_is_never_quarantined() {
    let state = good(&State::default(), 1);
    let state = after(
        &state,
        &[resolved(2), Event::Done, failed(Failure::Evidence)],
    );
    assert_eq!(state.phase.name(), "rejected");
    assert!(state.quarantine.is_empty());
    let again = state.after(&resolved(2), context("c"));
    assert_eq!(again.phase, Phase::Resolved);
    assert_eq!(again.attempt.unwrap().number, 2, "the same attempt goes on");
}

#[test]
fn a_release_that_stays_wrong_is_not_tried_again_until_the_configuration_changes() {
    let state = after(
        &State::default(),
        &[
            resolved(1),
            Event::Done,
            Event::Done,
            failed(Failure::Rejected),
        ],
    );
    assert_eq!(state.after(&resolved(1), context("c")).phase, state.phase);
    assert_eq!(
        state.after(&resolved(1), context("d")).phase,
        Phase::Resolved
    );
}

#[test]
fn a_newer_release_ends_the_wait() {
    let state = applied(&good(&State::default(), 1), 2).after(&resolved(3), context("c"));
    assert_eq!(state.phase, Phase::Resolved);
    assert_eq!(state.attempt.as_ref().unwrap().digest, digest(3));
    // The newer one is refused: what it pushed aside was never judged, and is taken up again.
    let state = state.after(&failed(Failure::Evidence), context("c"));
    assert_eq!(state.pending(), Some(Step::Apply(digest(2))));
    // The next poll does not push it aside again, news of evidence does.
    assert_eq!(
        state
            .after(&Event::Done, context("c"))
            .after(&resolved(3), context("c"))
            .phase,
        Phase::Observing
    );
    let evidence = Event::Resolved {
        digest: digest(3),
        trigger: Trigger::Evidence,
    };
    assert_eq!(
        state
            .after(&Event::Done, context("c"))
            .after(&evidence, context("c"))
            .phase,
        Phase::Resolved
    );
}

#[test]
fn an_operators_rollback_quarantines_what_it_leaves() {
    let state = good(&good(&State::default(), 1), 2).after(&Event::RollBack, context("c"));
    assert!(state.is_quarantined(&digest(2)));
    let state = after(&state, &[Event::Done, Event::Done]);
    assert_eq!(state.phase.name(), "rolled-back");
    assert_eq!(state.after(&resolved(2), context("c")).phase, state.phase);
}

#[test]
fn what_an_operator_chose_stays_until_the_channel_moves() {
    let state = good(&good(&State::default(), 1), 2);
    let state = after(&state, &[deploy(1), Event::Done]);
    let mut state = state;
    while state.pending().is_some() {
        state = state.after(&Event::Done, context("c"));
    }
    assert_eq!(state.running.as_ref().unwrap().digest, digest(1));
    assert_eq!(state.after(&resolved(2), context("c")).phase, Phase::Good);
    assert_eq!(
        state.after(&resolved(3), context("c")).phase,
        Phase::Resolved
    );
}

#[test]
fn a_crash_is_never_taken_for_success() {
    let base = good(&State::default(), 1);
    let observing = applied(&base, 2).after(&Event::Started, context("c"));
    assert_eq!(observing.pending(), Some(Step::Apply(digest(2))));
    let back = applied(&base, 2).after(&failed(Failure::Unhealthy), context("c"));
    let back = after(&back, &[Event::Done, Event::Started]);
    assert_eq!(back.pending(), Some(Step::Apply(digest(1))));
    let early = after(&base, &[resolved(2), Event::Done, Event::Started]);
    assert_eq!(early.pending(), None, "the reference is asked first");
    assert_eq!(
        early.after(&resolved(2), context("c")).phase,
        Phase::Resolved
    );
}

#[test]
fn an_engine_that_is_away_is_waited_for() {
    let mut state = good(&State::default(), 1).after(&resolved(2), context("c"));
    while !matches!(state.phase, Phase::Applying { .. }) {
        state = state.after(&Event::Done, context("c"));
    }
    let state = state.after(&failed(Failure::Unavailable), context("c"));
    assert_eq!(state.pending(), None);
    assert!(state.quarantine.is_empty());
    assert_eq!(
        state.after(&Event::Retry, context("c")).pending(),
        Some(Step::Apply(digest(2)))
    );
}

#[derive(Clone, Debug)]
struct Move {
    event: Event,
    config: &'static str,
    rollback: Rollback,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let number = 0..4_u8;
    let trigger = prop_oneof![
        Just(Trigger::Poll),
        Just(Trigger::Event),
        Just(Trigger::Evidence),
        Just(Trigger::Deploy),
        Just(Trigger::Configuration)
    ];
    let kind = prop_oneof![
        Just(Failure::Evidence),
        Just(Failure::Unavailable),
        Just(Failure::Rejected),
        Just(Failure::Unhealthy)
    ];
    let event = prop_oneof![
        12 => Just(Event::Done),
        4 => (number.clone(), trigger).prop_map(|(number, trigger)| Event::Resolved { digest: digest(number), trigger }),
        2 => kind.prop_map(failed),
        1 => Just(Event::Started),
        1 => Just(Event::Retry),
        1 => Just(Event::RollBack),
        1 => number.prop_map(|number| Event::Unquarantine(digest(number))),
    ];
    let config = prop_oneof![9 => Just("c"), 1 => Just("d")];
    let rollback = prop_oneof![9 => Just(Rollback::Auto), 1 => Just(Rollback::Never)];
    let one = (event, config, rollback).prop_map(|(event, config, rollback)| Move {
        event,
        config,
        rollback,
    });
    proptest::collection::vec(one, 1..120)
}

fn check(before: &State, event: &Event, after: &State) {
    let standing = |state: &State| {
        state
            .running
            .as_ref()
            .map(|running| (running.digest.clone(), running.standing))
    };
    let became_good = standing(after).is_some_and(|(_, standing)| standing == Standing::Good)
        && standing(after) != standing(before);
    let watched = matches!(
        before.phase,
        Phase::Observing | Phase::RollingBack { applied: true, .. }
    ) && *event == Event::Done;
    assert!(
        !became_good || watched,
        "good without a healthy window: {before:?} {event:?}"
    );
    if after.phase == Phase::Good {
        let attempt = after.attempt.as_ref().unwrap();
        assert_eq!(
            standing(after),
            Some((attempt.digest.clone(), Standing::Good))
        );
    }
    if let Some(Step::Apply(digest) | Step::Observe(digest)) = after.pending() {
        assert!(
            !after.is_quarantined(&digest),
            "a quarantined digest is applied: {before:?} {event:?}"
        );
        assert_eq!(standing(after), Some((digest, Standing::Unsettled)));
    }
    // Only an operator and a release that was applied put anything into quarantine, and only an operator takes it out.
    if after.quarantine.len() > before.quarantine.len() {
        let unhealthy = matches!(
            event,
            Event::Failed {
                kind: Failure::Unhealthy,
                ..
            }
        ) && matches!(before.phase, Phase::Applying { .. } | Phase::Observing);
        assert!(
            unhealthy || *event == Event::RollBack,
            "{before:?} {event:?}"
        );
    }
    if !matches!(event, Event::Unquarantine(_)) {
        assert!(
            before
                .quarantine
                .iter()
                .all(|entry| after.is_quarantined(&entry.digest))
        );
    }
    assert!(after.good.len() <= GENERATIONS);
    for (index, generation) in after.good.iter().enumerate() {
        assert!(!after.is_quarantined(&generation.digest));
        assert!(
            after.good[index + 1..]
                .iter()
                .all(|other| other.digest != generation.digest)
        );
        assert!(after.kept().contains(&generation.digest.to_string()));
    }
    if let Some(Step::Apply(digest) | Step::Observe(digest)) = after.pending() {
        assert!(after.kept().contains(&digest.to_string()));
    }
    // What was applied is judged before anything settles.
    if after.is_settled() {
        assert!(
            standing(after).is_none_or(|(_, standing)| standing != Standing::Unsettled),
            "{before:?} {event:?} {after:?}"
        );
    }
    // Nothing is applied that was not prepared, unless it was applied before.
    if matches!(after.phase, Phase::Applying { .. })
        && !matches!(before.phase, Phase::Applying { .. } | Phase::Observing)
    {
        let resumed = standing(before).is_some_and(|(_, standing)| standing == Standing::Unsettled);
        assert!(
            before.phase == Phase::Pulled || resumed,
            "{before:?} {event:?}"
        );
    }
    let number = |state: &State| state.attempt.as_ref().map_or(0, |attempt| attempt.number);
    assert!(number(after) == number(before) || number(after) == number(before) + 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_sequence_of_events_keeps_the_invariants(moves in moves()) {
        let mut state = State::default();
        for Move { event, config, rollback } in moves {
            let next = state.after(&event, Context { rollback, config, now: "t" });
            check(&state, &event, &next);
            // What is on the disk says the same.
            let stored: State = serde_json::from_slice(&serde_json::to_vec(&next).unwrap()).unwrap();
            prop_assert_eq!(&stored, &next);
            // A crash at any point loses nothing and concludes nothing.
            let restarted = next.after(&Event::Started, Context { rollback, config, now: "t" });
            check(&next, &Event::Started, &restarted);
            if restarted.phase == Phase::Good {
                prop_assert_eq!(&next.phase, &Phase::Good);
            }
            state = next;
        }
    }
}
