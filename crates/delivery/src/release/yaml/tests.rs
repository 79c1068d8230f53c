use std::fmt::Write as _;

use super::*;

fn one(text: &str) -> Node {
    parse(text).unwrap().remove(0)
}

#[test]
fn lines_are_those_of_the_values() {
    let node = one("a: 1\nb:\n  - x\n  - y\nc: {d: e}\n");
    assert_eq!(node.get("a").unwrap().line, 1);
    assert_eq!(node.get("b").unwrap().items()[1].line, 4);
    assert_eq!(node.get("c").unwrap().get("d").unwrap().line, 5);
    assert_eq!(node.entries()[1].line, 2);
}

#[test]
fn merge_keys_do_not_override() {
    let node = one("x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  a: 3\n");
    let y = node.get("y").unwrap();
    assert_eq!(y.get("a").unwrap().text(), Some("3"));
    assert_eq!(y.get("b").unwrap().text(), Some("2"));
    assert_eq!(y.get("b").unwrap().line, 1);
}

#[test]
fn reset_and_null_are_absent() {
    let node = one("a: !reset null\nb: ~\nc: ''\nd: !reset [x]\n");
    assert!(node.get("a").is_none());
    assert!(node.get("b").is_none());
    assert_eq!(node.get("c").unwrap().text(), Some(""));
    assert!(node.get("d").is_none());
}

#[test]
fn several_documents() {
    assert_eq!(parse("a: 1\n---\nb: 2\n").unwrap().len(), 2);
}

#[test]
fn duplicate_keys_are_named_with_their_line() {
    let error = parse("a: 1\nb: 2\na: 3\n").unwrap_err();
    assert_eq!(
        (error.line, error.message.as_str()),
        (3, "`a` is there twice")
    );
}

#[test]
fn aliases_that_multiply_are_refused() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..20 {
        let previous = level - 1;
        let items = vec![format!("*a{previous}"); 10].join(", ");
        writeln!(text, "a{level}: &a{level} [{items}]").unwrap();
    }
    assert!(parse(&text).unwrap_err().message.contains("values"));
}

#[test]
fn deep_nesting_is_refused() {
    assert!(parse(&"[".repeat(100_000)).is_err());
    let mut text = "a0: &a0 [x]\n".to_owned();
    for level in 1..1000 {
        writeln!(text, "a{level}: &a{level} [*a{}]", level - 1).unwrap();
    }
    assert!(parse(&text).is_err());
}

#[test]
fn a_syntax_error_has_its_line() {
    assert_eq!(parse("a: 1\nb: [\n").unwrap_err().line, 2);
    assert_eq!(parse("a: 1\nb: 2\n c: 3\n").unwrap_err().line, 3);
}

proptest::proptest! {
    #[test]
    fn foreign_text_never_panics(text in "[-a-z:&*<\\[\\]{}!|> \n\"'#~]{0,200}") {
        let _ = parse(&text);
    }
}
