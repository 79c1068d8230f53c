use proptest::prelude::*;
use serde_json::{Value, json};

use super::{canonical, parse, render};

#[test]
fn dollars_make_the_round_trip() {
    let model = parse(
        br#"{"services":{"a":{"environment":{"A$$B":"x$$y","C":"$$$$"},"command":["$${X}"]}}}"#,
    )
    .unwrap();
    assert_eq!(
        model["services"]["a"]["environment"],
        json!({"A$B": "x$y", "C": "$$"})
    );
    let rendered: Value = serde_json::from_slice(&render(&model)).unwrap();
    assert_eq!(
        rendered["services"]["a"]["environment"],
        json!({"A$B": "x$$y", "C": "$$$$"}),
        "names are not interpolated when read, values are"
    );
    assert_eq!(rendered["services"]["a"]["command"], json!(["$${X}"]));
}

#[test]
fn what_is_no_model_is_refused() {
    for bytes in [&b"[]"[..], b"", b"{", b"\xff", b"null"] {
        assert!(parse(bytes).is_err());
    }
}

#[test]
fn the_hashed_form_ignores_order_and_emptiness_but_no_meaning() {
    assert_eq!(
        canonical(&json!({"b": 1, "a": {"d": null, "c": {}}})),
        canonical(&json!({"a": {}, "b": 1}))
    );
    assert_eq!(canonical(&json!({"command": null, "x": 1})), r#"{"x":1}"#);
    assert_ne!(canonical(&json!({"command": [], "x": 1})), r#"{"x":1}"#);
    assert_ne!(
        canonical(&json!({"networks": {"a": null}})),
        canonical(&json!({"networks": {"b": null}}))
    );
    assert_ne!(
        canonical(&json!({"environment": {"a": null}})),
        canonical(&json!({}))
    );
}

proptest! {
    #[test]
    fn parse_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn values_read_back_the_same(text in "[a$\\\\\"{}]{0,12}") {
        let model = json!({"v": text});
        // Compose halves each pair of dollars when it interpolates a value.
        let read: Value = serde_json::from_slice(&render(&model)).unwrap();
        prop_assert_eq!(read["v"].as_str().unwrap().replace("$$", "$"), text);
    }
}
