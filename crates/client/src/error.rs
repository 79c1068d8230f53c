//! Why a call failed.

use oci::Digest;

/// Why a call failed. `Display` is its own level; the chain is in `source()`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The content is not what its digest says.
    #[error(
        "`{what}` has digest `{actual}`, not `{expected}`: it was tampered with or damaged on its way"
    )]
    DigestMismatch {
        /// What was fetched.
        what: String,
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: String,
    },
    /// The content is longer or shorter than its descriptor says.
    #[error(
        "`{what}` has {actual} bytes, not {expected}: it was tampered with or damaged on its way"
    )]
    SizeMismatch {
        /// What was fetched or is to be sent.
        what: String,
        /// What the descriptor says, in bytes.
        expected: u64,
        /// What is there, in bytes; for content that is too long, as far as it was read.
        actual: u64,
    },
    /// 404.
    #[error("`{0}` was not found")]
    NotFound(String),
    /// 401 or 403.
    #[error("`{host}` refused access to `{what}`: {message}")]
    Unauthorized {
        /// Host.
        host: String,
        /// Repository or API.
        what: String,
        /// What the server said.
        message: String,
    },
    /// Any other answer.
    #[error("`{host}` answered {status} to {operation}: {message}")]
    Status {
        /// Host.
        host: String,
        /// What was tried.
        operation: String,
        /// HTTP status.
        status: u16,
        /// The OCI error code, when there was one.
        code: String,
        /// The message.
        message: String,
    },
    /// No answer.
    #[error("cannot reach `{host}`")]
    Unreachable {
        /// Host.
        host: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A local file or directory could not be read or written.
    #[error("cannot use `{path}`")]
    File {
        /// Which one.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The server lacks this API.
    #[error("`{0}` does not offer this API")]
    Unsupported(String),
    /// Other, with a message that says what to do.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Tells whether trying again later may help: no connection, 408, 429, 5xx. A certificate that
    /// is not trusted does not mend itself and is not transient.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { source, .. } => !is_certificate(source.as_ref()),
            Self::Status { status, .. } => is_transient_status(*status),
            _ => false,
        }
    }

    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { path, source }
    }

    pub(crate) fn unreachable(
        host: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Unreachable {
            host: host.to_owned(),
            source: source.into(),
        }
    }
}

/// Tells whether an answer with this status may be another one a little later. A full disk (507) does
/// not empty itself: whoever pushes is told at once.
pub(crate) fn is_transient_status(status: u16) -> bool {
    matches!(status, 408 | 429) || (status >= 500 && !matches!(status, 501 | 505 | 507))
}

/// Tells whether TLS itself failed, as opposed to the connection beneath it.
fn is_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if matches!(
            error.downcast_ref::<rustls::Error>(),
            Some(rustls::Error::InvalidCertificate(_))
        ) {
            return true;
        }
        // An `io::Error` hides what it wraps behind `get_ref`, not `source`.
        next = match error.downcast_ref::<std::io::Error>() {
            Some(io) => io
                .get_ref()
                .map(|inner| inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    false
}

/// Makes foreign text fit for a message: one line, no control characters, bounded.
pub(crate) fn printable(text: &str) -> String {
    const LIMIT: usize = 500;
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LIMIT)
        .collect();
    if text.chars().nth(LIMIT).is_some() {
        line.push('…');
    }
    line.trim().trim_end_matches('.').to_owned()
}
