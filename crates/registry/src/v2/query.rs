//! Query parameters, percent-decoded, in order.

use crate::error::Refusal;
use crate::v2::path::percent_decode;

/// The parameters of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a query or a form body. What is broken is refused rather than guessed.
    pub(crate) fn parse(text: &str) -> Result<Self, Refusal> {
        let decode = |part: &str| {
            percent_decode(part.as_bytes(), true).and_then(|bytes| String::from_utf8(bytes).ok())
        };
        text.split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                Some((decode(key)?, decode(value)?))
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| {
                Refusal::bad_request(
                    crate::error::UNSUPPORTED,
                    "the query has a broken `%` escape",
                )
            })
            .and_then(|pairs| {
                // PostgreSQL has no text with it, and no name here has it.
                if pairs.iter().any(|(_, value)| value.contains('\0')) {
                    return Err(Refusal::bad_request(
                        crate::error::UNSUPPORTED,
                        "the query holds a NUL character (`%00`)",
                    ));
                }
                Ok(Self(pairs))
            })
    }

    /// The first value of a parameter.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// All values of a parameter.
    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// A number such as `n`: `None` when absent.
    pub(crate) fn number(&self, key: &str) -> Result<Option<u64>, Refusal> {
        self.get(key)
            .map(|text| {
                let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                digits
                    .then(|| text.parse::<u64>().unwrap_or(u64::MAX))
                    .ok_or_else(|| {
                        Refusal::bad_request(
                            "PAGINATION_NUMBER_INVALID",
                            format!("`{key}` must be a whole number, not negative"),
                        )
                    })
            })
            .transpose()
    }
}

/// Encodes a value for a query.
pub(crate) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_in_order() {
        let query = Query::parse("tag=a&n=10&tag=b%2Bc&x&&last=a+b").unwrap();
        assert_eq!(query.all("tag").collect::<Vec<_>>(), ["a", "b+c"]);
        assert_eq!(query.number("n").unwrap(), Some(10));
        assert_eq!(query.get("x"), Some(""));
        assert_eq!(query.get("last"), Some("a b"));
        assert_eq!(query.get("missing"), None);
        for bad in ["n=-1", "n=", "n=x", "n=+1", "n=1.5"] {
            assert!(Query::parse(bad).unwrap().number("n").is_err(), "{bad}");
        }
        assert_eq!(
            Query::parse("n=99999999999999999999")
                .unwrap()
                .number("n")
                .unwrap(),
            Some(u64::MAX)
        );
        assert!(Query::parse("a=%2").is_err());
        assert!(Query::parse("a=b&cursor=x%00").is_err());
    }

    proptest! {
        #[test]
        fn encoded_values_come_back(value in "\\PC{0,40}") {
            let query = Query::parse(&format!("v={}", encode(&value))).unwrap();
            prop_assert_eq!(query.get("v"), Some(value.as_str()));
        }
    }
}
