//! Patterns over repository names and tags.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A pattern: `*` stands for any text without `/`, `**` for any text, `?` for one character but `/`.
///
/// `shop/**` matches everything beneath `shop`, not `shop` itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Glob {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Byte(u8),
    One,
    Within,
    Any,
}

impl Glob {
    /// Tells whether the whole of `text` fits the pattern. Takes at most `pattern × text` steps.
    pub fn matches(&self, text: &str) -> bool {
        // The set of pattern positions that are reachable after each byte.
        let mut reached = vec![false; self.parts.len() + 1];
        reached[0] = true;
        self.close(&mut reached);
        for &byte in text.as_bytes() {
            let mut next = vec![false; reached.len()];
            for (index, part) in self.parts.iter().enumerate() {
                if !reached[index] {
                    continue;
                }
                match part {
                    Part::Byte(expected) if *expected == byte => next[index + 1] = true,
                    Part::One if byte != b'/' => next[index + 1] = true,
                    Part::Within if byte != b'/' => next[index] = true,
                    Part::Any => next[index] = true,
                    _ => {}
                }
            }
            self.close(&mut next);
            reached = next;
        }
        reached.last().copied().unwrap_or(false)
    }

    /// Tells whether it stands for every tag, which hold no `/`.
    pub fn is_everything(&self) -> bool {
        matches!(self.parts.as_slice(), [Part::Any | Part::Within])
    }

    /// Tells whether it stands for every repository, whose names hold `/`.
    pub fn is_all_repositories(&self) -> bool {
        matches!(self.parts.as_slice(), [Part::Any])
    }

    /// A star may stand for nothing.
    fn close(&self, reached: &mut [bool]) {
        for (index, part) in self.parts.iter().enumerate() {
            if reached[index] && matches!(part, Part::Within | Part::Any) {
                reached[index + 1] = true;
            }
        }
    }
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.len() > MAX_PATTERN {
            return Err(GlobError(text.chars().take(80).collect()));
        }
        let mut parts = Vec::new();
        let mut bytes = text.bytes().peekable();
        while let Some(byte) = bytes.next() {
            parts.push(match byte {
                b'*' if bytes.next_if_eq(&b'*').is_some() => Part::Any,
                b'*' => Part::Within,
                b'?' => Part::One,
                b if b.is_ascii_alphanumeric() || b"._-/".contains(&b) => Part::Byte(b),
                _ => return Err(GlobError(text.chars().take(80).collect())),
            });
        }
        Ok(Self {
            text: text.to_owned(),
            parts,
        })
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Glob({:?})", self.text)
    }
}

impl<'de> Deserialize<'de> for Glob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_str(&text).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Glob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Text that is not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a pattern, use letters, digits, `.`, `_`, `-`, `/` with `*`, `**` and `?`")]
pub struct GlobError(String);

const MAX_PATTERN: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(pattern: &str, yes: &[&str], no: &[&str]) {
        let glob: Glob = pattern.parse().unwrap();
        for text in yes {
            assert!(glob.matches(text), "{pattern} should match {text}");
        }
        for text in no {
            assert!(!glob.matches(text), "{pattern} should not match {text}");
        }
    }

    #[test]
    fn patterns() {
        check(
            "shop/*",
            &["shop/web", "shop/"],
            &["shop", "shop/web/x", "xshop/web"],
        );
        check(
            "shop/**",
            &["shop/web", "shop/web/x"],
            &["shop", "shops/web"],
        );
        check("**", &["a", "a/b/c", ""], &[]);
        check("v?.*", &["v1.2", "v1."], &["v12", "v/.2"]);
        check("*-prod", &["a-prod", "-prod"], &["a-prod2", "a/b-prod"]);
        check("**/web", &["a/web", "a/b/web"], &["web"]);
        check("latest", &["latest"], &["Latest", "latest2", ""]);
        for bad in ["", "a b", "ä", "[a]", "{a,b}"] {
            assert!(bad.parse::<Glob>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_pattern_without_wildcards_matches_itself_alone(a in "[a-z/._-]{1,20}", b in "[a-z/._-]{1,20}") {
            let glob: Glob = a.parse().unwrap();
            prop_assert!(glob.matches(&a));
            prop_assert_eq!(glob.matches(&b), a == b);
        }

        #[test]
        fn many_stars_end_quickly(n in 1usize..60, text in "[a]{0,200}") {
            let glob: Glob = format!("{}b", "*a".repeat(n)).parse().unwrap();
            prop_assert!(!glob.matches(&text));
        }
    }
}
