//! Foreign text that somebody will read on a screen.
//!
//! A terminal takes orders from control characters, and the marks of bidirectional text put words in another order than they
//! are in. Where such text comes in it is refused, and where it goes out to a screen it is escaped: neither relies on the other.

use std::borrow::Cow;

use serde_json::Value;

/// Whether a character does something to a screen other than being shown: control characters, ends of lines and paragraphs,
/// marks of direction.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
        )
}

/// The text with such characters as escapes, such as `\u{1b}`.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escape(text, is_unprintable)
}

/// Whether every text of a document, keys too, can be shown; line feeds and tabs belong to texts of several lines.
pub fn is_printable(value: &Value) -> bool {
    let fits = |text: &str| !text.chars().any(is_unprintable_in_lines);
    match value {
        Value::String(text) => fits(text),
        Value::Array(items) => items.iter().all(is_printable),
        Value::Object(map) => map
            .iter()
            .all(|(key, value)| fits(key) && is_printable(value)),
        _ => true,
    }
}

/// Escapes what [`is_printable`] does not let pass in the values of a document.
pub fn escape_document(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(clean) = escape(text, is_unprintable_in_lines) {
                *text = clean;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(escape_document),
        Value::Object(map) => {
            if map
                .keys()
                .any(|key| key.chars().any(is_unprintable_in_lines))
            {
                *map = std::mem::take(map)
                    .into_iter()
                    .map(|(key, value)| (escape(&key, is_unprintable_in_lines).into_owned(), value))
                    .collect();
            }
            map.values_mut().for_each(escape_document);
        }
        _ => {}
    }
}

fn is_unprintable_in_lines(c: char) -> bool {
    is_unprintable(c) && c != '\n' && c != '\t'
}

fn escape(text: &str, is_bad: fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(is_bad) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_bad(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_moves_a_screen_is_escaped() {
        assert_eq!(escaped("a é 日本 \\"), "a é 日本 \\");
        assert_eq!(
            escaped("\u{1b}[31m\r\n\u{202e}\u{9b}\0"),
            "\\u{1b}[31m\\r\\n\\u{202e}\\u{9b}\\u{0}"
        );
        let mut document = json!({ "a\u{7}": ["two\n\tlines", { "b": "\u{2066}x" }], "n": 1 });
        assert!(!is_printable(&document));
        escape_document(&mut document);
        assert!(is_printable(&document));
        assert_eq!(
            document,
            json!({ "a\\u{7}": ["two\n\tlines", { "b": "\\u{2066}x" }], "n": 1 })
        );
    }
}
