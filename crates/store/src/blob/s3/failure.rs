//! What a failed request to the object store means, and how often it is tried again.
//!
//! The key decision: **404 alone does not say that something is gone.** A balancer without a backend, a wrong bucket and
//! a proxy on its way up answer so too, and who believes them forgets what is there. Only the store's own words, the
//! code `NoSuchKey` or `NoSuchUpload` in its answer, are [`Failure::Missing`]; any other 404 may be answered otherwise
//! later. An answer to HEAD has no room for a code, so what HEAD does not find is asked for with a GET.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use super::WHAT;
use crate::error::Error;

/// Why a request failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// The store says that the object or the multipart upload does not exist: a 404 with the code for it.
    Missing(String),
    /// It will never be answered otherwise (most of 4xx).
    Refused(String),
    /// It may be answered when it is tried again (5xx, 429, a 404 that does not say of what, no answer, an answer
    /// without sense).
    Again(String),
}

impl Failure {
    /// Whether the store gave this error code.
    pub(super) fn code(&self, code: &str) -> bool {
        self.text().contains(&format!("<Code>{code}</Code>"))
    }

    /// Whether it is a 404, whatever that is about.
    pub(super) fn is_404(&self) -> bool {
        status(self.text()) == Some(404)
    }

    /// The same failure of a request that can never tell of one object: what it is about cannot be missing.
    pub(super) fn never_missing(self) -> Self {
        match self {
            Self::Missing(text) => Self::Again(text),
            other => other,
        }
    }

    /// The same failure where it makes no sense to try again.
    pub(super) fn at_last(self) -> Self {
        match self {
            Self::Again(text) => Self::Refused(text),
            other => other,
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Missing(text) | Self::Refused(text) | Self::Again(text) => text,
        }
    }
}

impl fmt::Display for Failure {
    /// The error's code and message where the store gave them, else all of it, cut short.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text();
        let mut codes = super::elements(text, "Code");
        if let Some(code) = codes.next() {
            let message = super::elements(text, "Message").next().unwrap_or_default();
            return write!(f, "{code}: {}", super::unescape(message));
        }
        f.extend_short(text)
    }
}

trait Short {
    fn extend_short(&mut self, text: &str) -> fmt::Result;
}

impl Short for fmt::Formatter<'_> {
    fn extend_short(&mut self, text: &str) -> fmt::Result {
        match text.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(self, "{}…", &text[..end]),
            None => self.write_str(text),
        }
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let more = inner.to_string();
            if !text.contains(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            source = inner.source();
        }
        match error {
            object_store::Error::NotFound { .. }
                if super::elements(&text, "Code").any(|code| MISSING.contains(&code)) =>
            {
                Self::Missing(text)
            }
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. }
                // A clock that is off or a token that just ended gets better by itself.
                if ["RequestTimeTooSkewed", "ExpiredToken"]
                    .iter()
                    .all(|code| !text.contains(code)) =>
            {
                Self::Refused(text)
            }
            // A 404 that comes here is not about the object: whoever gives credentials may answer so, or stand before
            // the store.
            _ => match status(&text) {
                Some(404 | 408 | 425 | 429) | None => Self::Again(text),
                Some(400..=499) => Self::Refused(text),
                Some(_) => Self::Again(text),
            },
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Unavailable {
            what: WHAT,
            problem: failure.to_string(),
        }
    }
}

/// The status in an error of the library, which tells it in words alone.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// Runs one request with a time limit.
pub(super) async fn limited<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, object_store::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(Failure::from),
        Err(_) => Err(Failure::Again(format!(
            "no answer came within {} s",
            limit.as_secs()
        ))),
    }
}

/// Runs a request that may be repeated, a bounded number of times.
pub(super) async fn attempts<T, R>(mut request: impl FnMut() -> R) -> Result<T, Failure>
where
    R: Future<Output = Result<T, Failure>>,
{
    let mut attempt = 0;
    loop {
        match request().await {
            Err(Failure::Again(problem)) if attempt < PAUSES.len() => {
                tracing::debug!(
                    problem,
                    attempt,
                    "a request to the object store is tried again"
                );
                pause(attempt).await;
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// Waits before the next attempt; `false` when there is none.
pub(crate) async fn pause(attempt: usize) -> bool {
    let Some(pause) = PAUSES.get(attempt) else {
        return false;
    };
    let mut random = [0];
    let _ = getrandom::fill(&mut random);
    // Many that failed together must not come back together.
    tokio::time::sleep(*pause + *pause * u32::from(random[0]) / 256).await;
    true
}

const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(800),
    Duration::from_secs(2),
];
const SHOWN: usize = 300;
/// The codes with which a store says that what was asked for does not exist.
const MISSING: [&str; 2] = ["NoSuchKey", "NoSuchUpload"];

#[cfg(test)]
mod tests {
    use super::*;

    fn not_found(body: &str) -> Failure {
        Failure::from(object_store::Error::NotFound {
            path: "o/00/00/x".to_owned(),
            source: format!("Server returned non-2xx status code: 404 Not Found: {body}").into(),
        })
    }

    #[test]
    fn only_the_store_itself_can_say_that_something_is_gone() {
        for code in ["NoSuchKey", "NoSuchUpload"] {
            let said = not_found(&format!("<Error><Code>{code}</Code></Error>"));
            assert!(matches!(said, Failure::Missing(_)), "{said:?}");
            assert!(matches!(said.never_missing(), Failure::Again(_)));
        }
        for body in [
            "",
            "<html><h1>404</h1>NoSuchKey</html>",
            "<Error><Code>NoSuchBucket</Code></Error>",
            "<Error><Code>Broken</Code></Error>",
        ] {
            let said = not_found(body);
            assert!(matches!(said, Failure::Again(_)), "{said:?}");
            assert!(said.is_404());
        }
    }
}
