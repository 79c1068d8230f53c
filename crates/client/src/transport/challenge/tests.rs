use proptest::prelude::*;

use super::*;

fn choose(headers: &[&str]) -> Option<Challenge> {
    Challenge::choose(headers.iter().copied())
}

#[test]
fn reads_the_docker_hub_form() {
    assert_eq!(
        choose(&[
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
        ]),
        Some(Challenge::Bearer {
            realm: "https://auth.docker.io/token".to_owned(),
            service: Some("registry.docker.io".to_owned()),
            scopes: Scopes::repository("a/b", "pull,push"),
        })
    );
}

#[test]
fn prefers_bearer_in_one_header_or_several() {
    let bearer = Some(Challenge::Bearer {
        realm: "https://t".to_owned(),
        service: None,
        scopes: Scopes::default(),
    });
    assert_eq!(
        choose(&[r#"Basic realm="a, b", bearer Realm = "https://t""#]),
        bearer
    );
    assert_eq!(choose(&["Basic realm=x", "BEARER realm=https://t"]), bearer);
    assert_eq!(
        choose(&["Negotiate YWJj==", "Basic realm=x"]),
        Some(Challenge::Basic)
    );
    assert_eq!(choose(&["Bearer service=x"]), None);
    assert_eq!(choose(&[]), None);
}

#[test]
fn scopes_join_and_cover() {
    let pull = Scopes::repository("host:5000/a", "pull");
    let both = pull.clone().union(&Scopes::parse(
        "repository:host:5000/a:push registry:catalog:*",
    ));
    assert!(both.covers(&pull));
    assert!(!pull.covers(&both));
    assert!(both.covers(&Scopes::default()));
    assert_eq!(
        both.to_string(),
        "registry:catalog:* repository:host:5000/a:pull,push"
    );
}

proptest! {
    #[test]
    fn never_panics(header in ".{0,200}") {
        parse(&header);
    }

    #[test]
    fn reads_back_what_was_quoted(
        scheme in "[A-Za-z]{1,10}",
        values in proptest::collection::btree_map("[a-z]{1,8}", ".{0,30}", 0..5),
    ) {
        let mut header = scheme.clone();
        for (index, (name, value)) in values.iter().enumerate() {
            header.push_str(if index == 0 { " " } else { ", " });
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            header.extend([name, "=\"", &quoted, "\""]);
        }
        let read = parse(&header);
        prop_assert_eq!(read.len(), 1);
        prop_assert_eq!(&read[0].scheme, &scheme.to_ascii_lowercase());
        prop_assert_eq!(&read[0].parameters, &values);
    }
}
