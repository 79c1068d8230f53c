use super::*;

fn rule(principals: &[&str], repositories: &[&str], actions: &[Action]) -> Rule {
    Rule {
        principals: principals.iter().map(ToString::to_string).collect(),
        repositories: repositories.iter().map(|g| g.parse().unwrap()).collect(),
        tags: Vec::new(),
        actions: actions.to_vec(),
    }
}

#[test]
fn rules_that_cannot_be_meant_are_refused_by_number() {
    let good = rule(&["alice"], &["**"], &[Action::Push]);
    for (bad, words) in [
        (rule(&[], &["**"], &[Action::Pull]), "`principals` is empty"),
        (
            rule(&["a"], &[], &[Action::Pull]),
            "`repositories` is empty",
        ),
        (rule(&["a"], &["**"], &[]), "`actions` is empty"),
        (
            rule(&["user:a"], &["**"], &[Action::Pull]),
            "not a principal",
        ),
        (
            rule(&["anonymous"], &["**"], &[Action::Pull, Action::Push]),
            "only be given `pull`",
        ),
    ] {
        let error = Access::users(Path::new("x"), vec![good.clone(), bad]).unwrap_err();
        assert!(error.to_string().starts_with("access rule 2: "), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(Access::users(Path::new("x"), vec![good]).is_ok());
}

#[test]
fn a_rule_reads_from_text_and_refuses_unknown_keys() {
    let rule: Rule = serde_json::from_str(
        r#"{"principals":["ci"],"repositories":["shop/**"],"tags":["v*"],"actions":["push","tag-create"]}"#,
    )
    .unwrap();
    assert_eq!(rule.actions, [Action::Push, Action::TagCreate]);
    assert!(
        serde_json::from_str::<Rule>(
            r#"{"principals":[],"repositories":[],"actions":[],"role":1}"#
        )
        .is_err()
    );
    for action in [
        "pull",
        "push",
        "tag-create",
        "tag-overwrite",
        "delete",
        "admin",
    ] {
        let parsed: Action = serde_json::from_str(&format!("\"{action}\"")).unwrap();
        assert_eq!(parsed.name(), action);
    }
}
