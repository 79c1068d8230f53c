use super::*;

fn rule(principals: &[&str], repositories: &[&str], tags: &[&str], actions: &[Action]) -> Rule {
    let globs = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Rule {
        principals: principals.iter().map(ToString::to_string).collect(),
        repositories: globs(repositories),
        tags: globs(tags),
        actions: actions.to_vec(),
    }
}

fn user(name: &str) -> Principal {
    Principal::User(name.to_owned())
}

#[test]
fn nothing_is_allowed_by_default() {
    let repository: RepositoryName = "a".parse().unwrap();
    for action in [
        Action::Pull,
        Action::Push,
        Action::TagCreate,
        Action::TagOverwrite,
        Action::Delete,
    ] {
        for principal in [Principal::Anonymous, user("alice")] {
            assert!(!Authorizer::default().allows(&principal, action, &repository, None, None));
        }
    }
}

#[test]
fn rules_are_by_principal_repository_and_tag() {
    use Action::{Delete, Pull, Push, TagCreate, TagOverwrite};
    let rules = Authorizer(vec![
        rule(&["anonymous"], &["public/**"], &[], &[Pull]),
        rule(&["*"], &["shared/*"], &[], &[Pull]),
        rule(&["ci"], &["shop/**"], &[], &[Pull, Push, TagCreate]),
        rule(&["ci"], &["shop/**"], &["dev-*"], &[TagOverwrite, Delete]),
        rule(&["root"], &["**"], &["**"], &[Delete]),
    ]);
    let check = |who: &Principal, action, repository: &str, tag: Option<&str>| {
        let tag: Option<Tag> = tag.map(|t| t.parse().unwrap());
        rules.allows(
            who,
            action,
            &repository.parse().unwrap(),
            tag.as_ref(),
            None,
        )
    };
    let (ci, other, nobody) = (user("ci"), user("other"), Principal::Anonymous);
    assert!(check(&nobody, Pull, "public/x", None));
    assert!(
        check(&other, Pull, "public/x", None),
        "a user may what everybody may"
    );
    assert!(
        !check(&nobody, Pull, "shared/x", None),
        "`*` is for those who logged in"
    );
    assert!(check(&other, Pull, "shared/x", None));
    assert!(!check(&other, Pull, "shared/x/y", None));
    assert!(!check(&other, Pull, "shop/web", None));
    assert!(check(&ci, Push, "shop/web", None));
    assert!(check(&ci, TagCreate, "shop/web", Some("v1")));
    assert!(
        !check(&ci, TagOverwrite, "shop/web", Some("v1")),
        "immutable for ci"
    );
    assert!(check(&ci, TagOverwrite, "shop/web", Some("dev-1")));
    assert!(check(&ci, Delete, "shop/web", Some("dev-1")));
    assert!(!check(&ci, Delete, "shop/web", Some("v1")));
    assert!(
        !check(&ci, Delete, "shop/web", None),
        "by digest every tag would go"
    );
    assert!(check(&user("root"), Delete, "shop/web", None));
}

#[test]
fn evidence_tags_need_push_and_match_no_pattern() {
    let rules = Authorizer(vec![
        rule(&["ci"], &["**"], &[], &[Action::Push]),
        rule(
            &["tagger"],
            &["**"],
            &["**"],
            &[Action::TagCreate, Action::TagOverwrite],
        ),
        rule(&["cleaner"], &["**"], &["sha256-*"], &[Action::Delete]),
    ]);
    let tag: Tag = format!("sha256-{}.sig", "a".repeat(64)).parse().unwrap();
    let allows = |name: &str, action| {
        rules.allows(&user(name), action, &"a".parse().unwrap(), Some(&tag), None)
    };
    assert!(allows("ci", Action::TagCreate) && allows("ci", Action::TagOverwrite));
    assert!(!allows("tagger", Action::TagCreate) && !allows("tagger", Action::TagOverwrite));
    assert!(!allows("cleaner", Action::Delete));
}

#[test]
fn basic_credentials() {
    assert_eq!(basic("YTpi"), Some(("a".to_owned(), "b".to_owned())));
    assert_eq!(
        basic(&STANDARD.encode("a:b:c")),
        Some(("a".to_owned(), "b:c".to_owned()))
    );
    for bad in ["", "!", "YQ==", &STANDARD.encode([0xff, b':'])] {
        assert_eq!(basic(bad), None, "{bad}");
    }
}
