use proptest::prelude::*;

use super::*;

fn lookup(name: &str) -> Option<String> {
    match name {
        "SET" => Some("value".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

#[track_caller]
fn check(template: &str, text: &str, missing: &[&str]) {
    let expansion = Template::parse(template).unwrap().expand(&lookup, "");
    assert_eq!(
        (expansion.text.as_str(), &expansion.missing[..]),
        (
            text,
            &missing
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()[..]
        ),
        "{template}"
    );
}

#[test]
fn expands_as_compose_does() {
    check("plain", "plain", &[]);
    check("$SET-x", "value-x", &[]);
    check("${SET}x", "valuex", &[]);
    check("a$UNSET.b", "a.b", &["UNSET"]);
    check("$$SET $${SET}", "$SET ${SET}", &[]);
    check("${UNSET:-d}", "d", &[]);
    check("${EMPTY:-d}", "d", &[]);
    check("${EMPTY-d}", "", &[]);
    check("${UNSET-d}", "d", &[]);
    check("${SET:-d}", "value", &[]);
    check("${SET:+alt}", "alt", &[]);
    check("${EMPTY:+alt}", "", &[]);
    check("${EMPTY+alt}", "alt", &[]);
    check("${UNSET+alt}", "", &[]);
    check("${UNSET:?must be given}", "", &["UNSET"]);
    check("${EMPTY:?must be given}", "", &["EMPTY"]);
    check("${EMPTY?must be given}", "", &[]);
    check("${UNSET:-${SET}}", "value", &[]);
    check("${UNSET:-${OTHER:-deep}}!", "deep!", &[]);
    check("${UNSET:-${OTHER}}", "", &["OTHER"]);
    check("${UNSET:-{\"a\": 1}}", "{\"a\": 1}", &[]);
    check("${UNSET:-a:b-c?d}", "a:b-c?d", &[]);
    check("${UNSET:-$$5}", "$5", &[]);
    check("echo $5 $ $- $.x $é $", "echo $5 $ $- $.x $é $", &[]);
    check("${UNSET:-{{x}}}", "{{x}}", &[]);
    check("ünï${SET}cödé", "ünïvaluecödé", &[]);
}

#[test]
fn refuses_what_is_no_variable() {
    for text in [
        "${}",
        "a ${",
        "${1}",
        "${A",
        "${A!b}",
        "${A:}",
        "${A:=b}",
        "${A b}",
        "x${A:-${B}",
    ] {
        assert!(Template::parse(text).is_err(), "{text}");
    }
    let deep = "${A:-".repeat(1000) + &"}".repeat(1000);
    assert_eq!(Template::parse(&deep), Err(TemplateError::Depth));
}

#[test]
fn names_every_variable() {
    let mut found = Vec::new();
    Template::parse("$A ${B:-b} ${C:-${D}} ${E:?e} ${F:+$G} $$H")
        .unwrap()
        .usages(&mut |name, usage| found.push((name.to_owned(), usage)));
    let expected = [
        ("A", Usage::Required),
        ("B", Usage::Default(Some("b".to_owned()))),
        ("C", Usage::Default(None)),
        ("D", Usage::Required),
        ("E", Usage::Required),
        ("F", Usage::Optional),
        ("G", Usage::Required),
    ];
    assert_eq!(
        found,
        expected.map(|(name, usage)| (name.to_owned(), usage))
    );
}

/// A template and what it means, built together.
fn pieces() -> impl Strategy<Value = Vec<(String, String)>> {
    let text = "[a-z :/{}._-]{0,8}".prop_map(|text| (text.clone(), text));
    let name = prop_oneof![Just("SET"), Just("EMPTY"), Just("UNSET")];
    let variable = (
        name,
        prop_oneof![Just(""), Just("-"), Just(":-"), Just("+"), Just(":+")],
        "[a-z]{0,5}",
    )
        .prop_map(|(name, operator, rest)| {
            let value = lookup(name);
            let filled = value.clone().filter(|value| !value.is_empty());
            let meaning = match operator {
                "-" => value.unwrap_or(rest.clone()),
                ":-" => filled.unwrap_or(rest.clone()),
                "+" => value.map(|_| rest.clone()).unwrap_or_default(),
                ":+" => filled.map(|_| rest.clone()).unwrap_or_default(),
                _ => value.unwrap_or_default(),
            };
            let rest = if operator.is_empty() { "" } else { &rest };
            (format!("${{{name}{operator}{rest}}}"), meaning)
        });
    let dollar = Just(("$$".to_owned(), "$".to_owned()));
    proptest::collection::vec(prop_oneof![text, variable, dollar], 0..8)
}

proptest! {
    #[test]
    fn a_template_means_what_it_was_built_from(pieces in pieces()) {
        let template: String = pieces.iter().map(|(template, _)| template.as_str()).collect();
        let meaning: String = pieces.iter().map(|(_, meaning)| meaning.as_str()).collect();
        let parsed = Template::parse(&template).unwrap();
        prop_assert_eq!(parsed.expand(&lookup, "").text, meaning);
    }

    #[test]
    fn escaped_text_means_itself(text in "\\PC*") {
        let parsed = Template::parse(&text.replace('$', "$$")).unwrap();
        prop_assert!(parsed.is_literal());
        prop_assert_eq!(parsed.expand(&|_| None, "").text, text);
    }

    #[test]
    fn foreign_text_never_panics(text in "[$A{}:?+ü-]{0,40}") {
        if let Ok(template) = Template::parse(&text) {
            template.usages(&mut |_, _| {});
            template.expand(&lookup, "");
        }
    }

    #[test]
    fn a_template_with_all_values_misses_nothing(text in "[$AB{}:+-]{0,40}") {
        if let Ok(template) = Template::parse(&text) {
            let expansion = template.expand(&|_| Some("v".to_owned()), "");
            prop_assert!(expansion.missing.is_empty());
        }
    }
}
