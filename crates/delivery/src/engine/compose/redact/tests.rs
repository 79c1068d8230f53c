use proptest::prelude::*;

use super::{Redactor, last_lines};

#[test]
fn values_are_replaced_longest_first() {
    let redactor = Redactor::new(["hunter2", "hunter2-and-more"]);
    assert_eq!(
        redactor.redact("x=hunter2-and-more y=hunter2"),
        "x=[redacted] y=[redacted]"
    );
}

#[test]
fn lines_of_a_longer_value_and_quoted_forms_are_replaced() {
    let redactor = Redactor::new(["-----BEGIN KEY-----\nabcdefgh\n", "with\"quote"]);
    assert_eq!(redactor.redact("read abcdefgh"), "read [redacted]");
    assert_eq!(
        redactor.redact(r#"{"a":"with\"quote"}"#),
        r#"{"a":"[redacted]"}"#
    );
}

#[test]
fn what_is_too_short_to_be_secret_stays() {
    assert_eq!(
        Redactor::new(["1", "", "8080", "yes"]).redact("port 8080 is 1 yes"),
        "port 8080 is 1 yes"
    );
}

#[test]
fn the_last_lines_are_bounded() {
    assert_eq!(last_lines("a\nb\n\nc\n", 2, 100), "b\nc");
    assert_eq!(last_lines("aaaa\nbbbb\ncccc", 9, 10), "bbbb\ncccc");
    assert_eq!(
        last_lines("\u{1b}[31mred\u{1b}[0m\r\n", 9, 100),
        "[31mred[0m"
    );
    assert!(last_lines(&"x".repeat(10_000), 9, 100).len() <= 100);
}

proptest! {
    #[test]
    fn a_secret_never_survives(secret in "[A-Za-z!$\\\\\"]{6,20}", before in ".{0,20}", after in ".{0,20}") {
        let redactor = Redactor::new([secret.as_str()]);
        let redacted = redactor.redact(&format!("{before}{secret}{after}"));
        prop_assert!(!redacted.contains(&secret), "{}", redacted);
    }
}
