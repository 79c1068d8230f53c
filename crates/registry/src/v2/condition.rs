//! Preconditions: `If-None-Match` of reads, `If-Match` and `If-None-Match: *` of tag writes
//! ([RFC 9110 § 13](https://www.rfc-editor.org/rfc/rfc9110#section-13)).

use http::header::{HeaderName, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, StatusCode};
use oci::{Digest, RepositoryName, Tag};
use store::Expected;

use crate::error::{Refusal, UNSUPPORTED};

/// Tells whether the client has this content already (304).
pub(crate) fn has(headers: &HeaderMap, digest: &Digest) -> bool {
    let mine = format!("\"{digest}\"");
    entity_tags(headers, &IF_NONE_MATCH).iter().any(|tag| {
        // Comparison is weak here: the bytes of a digest are the same either way.
        tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == mine
    })
}

/// What a tag write asks of the tag's state. `If-Match: *` means that it exists, which the caller
/// turns into what it points to now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A state that the store compares.
    State(Expected),
    /// The tag exists, wherever it points.
    Exists,
}

impl Wanted {
    /// Reads the headers of a write.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, Refusal> {
        let none_match = entity_tags(headers, &IF_NONE_MATCH);
        let matches = entity_tags(headers, &IF_MATCH);
        if !none_match.is_empty() {
            if none_match != ["*"] || !matches.is_empty() {
                return Err(Refusal::bad_request(
                    UNSUPPORTED,
                    "a write takes `If-None-Match: *` or `If-Match: \"<digest>\"`, one of them",
                ));
            }
            return Ok(Self::State(Expected::Absent));
        }
        if !headers.contains_key(IF_MATCH) {
            return Ok(Self::State(Expected::Any));
        }
        if matches == ["*"] {
            return Ok(Self::Exists);
        }
        // A weak or foreign entity tag matches nothing; then no state at all is right.
        let digests = matches
            .iter()
            .filter_map(|tag| tag.strip_prefix('"')?.strip_suffix('"')?.parse().ok())
            .collect();
        Ok(Self::State(Expected::Digest(digests)))
    }

    /// What the store is to compare for this tag.
    pub(crate) async fn expected(
        &self,
        store: &store::Store,
        repository: &RepositoryName,
        tag: &Tag,
    ) -> Result<Expected, Refusal> {
        match self {
            Self::State(expected) => Ok(expected.clone()),
            Self::Exists => match store.tag(repository, tag).await? {
                Some(state) => Ok(Expected::Digest(vec![state.digest])),
                None => Err(Refusal::new(
                    StatusCode::PRECONDITION_FAILED,
                    "PRECONDITION_FAILED",
                    format!("tag `{tag}` does not exist"),
                )),
            },
        }
    }
}

/// All entity tags of a list header.
pub(crate) fn entity_tags(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|tag| tag.trim().to_owned())
        .filter(|tag| !tag.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn reads() {
        let digest = Digest::sha256(b"");
        let text: &'static str = format!("\"x\", W/\"{digest}\"").leak();
        assert!(has(&headers(&[(IF_NONE_MATCH, text)]), &digest));
        assert!(has(&headers(&[(IF_NONE_MATCH, "*")]), &digest));
        assert!(!has(&headers(&[(IF_NONE_MATCH, "\"x\"")]), &digest));
        assert!(!has(&headers(&[]), &digest));
    }

    #[test]
    fn writes() {
        let digest = Digest::sha256(b"");
        let text: &'static str = format!("\"{digest}\"").leak();
        let of = |pairs: &[(HeaderName, &'static str)]| Wanted::of(&headers(pairs));
        assert_eq!(of(&[]).unwrap(), Wanted::State(Expected::Any));
        assert_eq!(
            of(&[(IF_NONE_MATCH, "*")]).unwrap(),
            Wanted::State(Expected::Absent)
        );
        assert_eq!(of(&[(IF_MATCH, "*")]).unwrap(), Wanted::Exists);
        assert_eq!(
            of(&[(IF_MATCH, text)]).unwrap(),
            Wanted::State(Expected::Digest(vec![digest]))
        );
        assert_eq!(
            of(&[(IF_MATCH, "W/\"x\"")]).unwrap(),
            Wanted::State(Expected::Digest(vec![]))
        );
        assert_eq!(
            of(&[(IF_MATCH, "")]).unwrap(),
            Wanted::State(Expected::Digest(vec![]))
        );
        assert!(of(&[(IF_NONE_MATCH, text)]).is_err());
        assert!(of(&[(IF_NONE_MATCH, "*"), (IF_MATCH, "*")]).is_err());
    }
}
