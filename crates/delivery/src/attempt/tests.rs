use super::*;

fn attempt(number: u64, digest: &Digest) -> Record {
    Record::Attempt {
        attempt: number,
        at: "2026-01-01T00:00:00Z".to_owned(),
        trigger: "poll".to_owned(),
        reference: "registry.example/shop:production".to_owned(),
        digest: digest.clone(),
        previous: None,
    }
}

fn outcome(number: u64, outcome: &str) -> Record {
    Record::Outcome {
        attempt: number,
        at: "2026-01-01T00:01:00Z".to_owned(),
        outcome: outcome.to_owned(),
        reason: (outcome != "good").then(|| "because".to_owned()),
    }
}

fn step(number: u64, digest: &Digest, name: &str) -> Record {
    Record::Step {
        attempt: number,
        digest: digest.clone(),
        step: StepReport {
            step: name.to_owned(),
            started: "s".to_owned(),
            finished: "f".to_owned(),
            error: None,
            notes: Vec::new(),
        },
    }
}

fn verdict(number: u64, message: &str) -> Record {
    Record::Verdict {
        attempt: number,
        verdict: Some(trust::Verdict {
            digest: Digest::sha256(b"any"),
            policy: "shop".to_owned(),
            outcome: trust::Outcome::Verified,
            message: message.to_owned(),
            accepted: Vec::new(),
            rejected: Vec::new(),
        }),
    }
}

fn plan(number: u64, note: &str) -> Record {
    Record::Plan {
        attempt: number,
        plan: Plan {
            changes: Vec::new(),
            notes: vec![note.to_owned()],
        },
    }
}

fn ledger(records: &[Record]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("attempts.jsonl");
    let mut ledger = Ledger::open(&path, "now").unwrap();
    for record in records {
        ledger.append(record).unwrap();
    }
    (directory, path)
}

#[test]
fn attempts_are_told_newest_first() {
    let (v1, v2) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
    let (_directory, path) = ledger(&[
        attempt(1, &v1),
        outcome(1, "good"),
        attempt(2, &v2),
        outcome(2, "rolled-back"),
        attempt(3, &v1),
    ]);
    let history = history(&path, 2).unwrap();
    assert_eq!(
        history
            .iter()
            .map(|summary| summary.attempt)
            .collect::<Vec<_>>(),
        [3, 2]
    );
    assert_eq!(history[0].outcome, None);
    assert_eq!(history[1].reason.as_deref(), Some("because"));
    assert_eq!(verify(&path).unwrap(), 5);
}

#[test]
fn the_story_is_that_of_the_attempt_that_made_what_runs_good() {
    let (v1, v2) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
    let (_directory, path) = ledger(&[
        attempt(1, &v1),
        verdict(1, "v1 is signed"),
        plan(1, "for v1"),
        step(1, &v1, "apply"),
        step(1, &v1, "observe"),
        outcome(1, "good"),
        attempt(2, &v2),
        verdict(2, "v2 is signed"),
        step(2, &v2, "apply"),
        plan(2, "for v2"),
        step(2, &v1, "apply"),
        step(2, &v1, "observe"),
        outcome(2, "rolled-back"),
    ]);
    let story = story_of(&path, &v1).unwrap().unwrap();
    assert_eq!(story.summary.attempt, 1);
    assert_eq!(story.summary.outcome.as_deref(), Some("good"));
    assert_eq!(story.verdict.unwrap().message, "v1 is signed");
    assert_eq!(story.plan.unwrap().notes, ["for v1"]);
    assert_eq!(story.steps.len(), 4, "how it came, and how it came back");
    let rollback = story.rollback.unwrap();
    assert_eq!((rollback.attempt, rollback.digest), (2, v2.clone()));
    assert_eq!(rollback.outcome.as_deref(), Some("rolled-back"));

    let story = story_of(&path, &v2).unwrap().unwrap();
    assert_eq!((story.summary.attempt, story.rollback), (2, None));
    assert_eq!(story_of(&path, &Digest::sha256(b"3")).unwrap(), None);
}

#[test]
fn a_resumed_attempt_keeps_the_verdict_of_the_one_that_was_cut_off() {
    let (v1, v2) = (Digest::sha256(b"1"), Digest::sha256(b"2"));
    let (_directory, path) = ledger(&[
        attempt(1, &v1),
        verdict(1, "v1 is signed"),
        step(1, &v1, "apply"),
        attempt(2, &v2),
        verdict(2, "v2 is not signed"),
        outcome(2, "rejected"),
        attempt(3, &v1),
        step(3, &v1, "apply"),
        outcome(3, "good"),
        // Asked for once more under another policy, and refused: it runs because of the third attempt.
        attempt(4, &v1),
        verdict(4, "v1 is not signed by two"),
        outcome(4, "rejected"),
    ]);
    let story = story_of(&path, &v1).unwrap().unwrap();
    assert_eq!(story.summary.attempt, 3);
    assert_eq!(story.verdict.unwrap().message, "v1 is signed");
}

#[test]
fn a_torn_last_line_is_cut_off_and_the_chain_goes_on() {
    let v1 = Digest::sha256(b"1");
    let (_directory, path) = ledger(&[attempt(1, &v1)]);
    let whole = std::fs::read(&path).unwrap();
    for cut in 1..whole.len() {
        let torn = [&whole[..], &whole[..cut]].concat();
        // A cut right before the newline is a torn line too.
        std::fs::write(&path, &torn[..torn.len().min(whole.len() * 2 - 1)]).unwrap();
        assert_eq!(verify(&path).unwrap(), 1, "cut at {cut}");
        let mut ledger = Ledger::open(&path, "now").unwrap();
        ledger.append(&outcome(1, "good")).unwrap();
        assert_eq!(verify(&path).unwrap(), 2, "cut at {cut}");
    }
}

#[test]
fn a_changed_record_breaks_the_chain_and_the_ledger_is_moved_aside() {
    let v1 = Digest::sha256(b"1");
    let (directory, path) = ledger(&[attempt(1, &v1), outcome(1, "rejected")]);
    let text = std::fs::read_to_string(&path).unwrap().replacen(
        "\"trigger\":\"poll\"",
        "\"trigger\":\"poly\"",
        1,
    );
    std::fs::write(&path, text).unwrap();
    assert!(matches!(
        verify(&path),
        Err(LedgerError::Line { number: 1, .. })
    ));
    let _new = Ledger::open(&path, "2026-01-01T00:00:00.000Z").unwrap();
    assert_eq!(verify(&path).unwrap(), 1, "it begins by saying so");
    assert!(
        directory
            .path()
            .join("attempts.damaged-2026-01-01T00-00-00-000Z")
            .exists()
    );
}

#[test]
fn what_no_registry_takes_is_left_out_of_batches() {
    let note = |text: &str| Record::Note {
        at: "2026-01-01T00:00:00Z".to_owned(),
        text: text.to_owned(),
    };
    let long = "x".repeat(MAX_REPORTED);
    let (_directory, path) = ledger(&[
        note("\u{1b}[31mred\nline"),
        note(&long),
        note(&long),
        note("after"),
        note(&long),
    ]);
    let length = std::fs::metadata(&path).unwrap().len();
    let first = read_batch(&path, 0, length).unwrap();
    // What a terminal would obey is escaped before it is written.
    assert_eq!(first.records[0]["text"], "\\u{1b}[31mred\nline");
    assert_eq!((first.records.len(), first.after), (1, None));
    let second = read_batch(&path, first.end.unwrap(), length).unwrap();
    assert_eq!(second.records.len(), 1);
    assert_eq!(second.records[0]["text"], "after");
    // It follows what was left out, as its hash says.
    let mut chain = Chain::resume(&second.after.unwrap()).unwrap();
    let line = oci::record::canonical(&second.records[0]).unwrap();
    chain.verify_line(&line).unwrap();
    let last = read_batch(&path, second.end.unwrap(), length).unwrap();
    assert!(last.records.is_empty());
    assert_eq!(last.end, Some(length));
}
