//! The path parser of `/v2/`: pure, from the right, because repository names contain slashes.

use std::borrow::Cow;

use oci::digest::DigestError;
use oci::reference::{ReferenceError, TagOrDigest};
use oci::{Digest, RepositoryName};

/// What a path below `/v2` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/v2/` (end-1).
    Base,
    /// `/v2/token`.
    Token,
    /// `/v2/_catalog`.
    Catalog,
    /// `/v2/<name>/tags/list` (end-8).
    Tags(RepositoryName),
    /// `/v2/<name>/manifests/<reference>` (end-3, end-7, end-9).
    Manifest(RepositoryName, TagOrDigest),
    /// `/v2/<name>/blobs/<digest>` (end-2, end-10).
    Blob(RepositoryName, Digest),
    /// `/v2/<name>/blobs/uploads/` (end-4, end-11).
    Uploads(RepositoryName),
    /// `/v2/<name>/blobs/uploads/<id>` (end-5, end-6, end-13, end-14).
    Upload(RepositoryName, String),
    /// `/v2/<name>/referrers/<digest>` (end-12).
    Referrers(RepositoryName, Digest),
}

impl Route {
    /// Parses the path of a request, which begins with `/v2`.
    pub(crate) fn parse(path: &str) -> Result<Self, PathError> {
        let rest = match path.strip_prefix("/v2") {
            Some("") => return Ok(Self::Base),
            Some(rest) => rest.strip_prefix('/').ok_or(PathError::Unknown)?,
            None => return Err(PathError::Unknown),
        };
        let segments: Vec<Cow<'_, str>> = rest
            .split('/')
            .map(|segment| decode(segment).ok_or(PathError::Unknown))
            .collect::<Result<_, _>>()?;
        let words: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
        let name = |parts: &[&str]| -> Result<RepositoryName, PathError> {
            Ok(parts.join("/").parse::<RepositoryName>()?)
        };
        Ok(match words.as_slice() {
            [""] => Self::Base,
            ["token"] => Self::Token,
            ["_catalog"] => Self::Catalog,
            [repository @ .., "tags", "list"] if !repository.is_empty() => {
                Self::Tags(name(repository)?)
            }
            [repository @ .., "manifests", reference] if !repository.is_empty() => {
                Self::Manifest(name(repository)?, reference.parse::<TagOrDigest>()?)
            }
            [repository @ .., "blobs", "uploads"] | [repository @ .., "blobs", "uploads", ""]
                if !repository.is_empty() =>
            {
                Self::Uploads(name(repository)?)
            }
            [repository @ .., "blobs", "uploads", id] if !repository.is_empty() => {
                Self::Upload(name(repository)?, (*id).to_owned())
            }
            [repository @ .., "blobs", digest] if !repository.is_empty() => {
                Self::Blob(name(repository)?, digest.parse::<Digest>()?)
            }
            [repository @ .., "referrers", digest] if !repository.is_empty() => {
                Self::Referrers(name(repository)?, digest.parse::<Digest>()?)
            }
            _ => return Err(PathError::Unknown),
        })
    }

    /// The name of the route in metrics: one of a fixed few.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Token => "token",
            Self::Catalog => "catalog",
            Self::Tags(_) => "tags",
            Self::Manifest(..) => "manifest",
            Self::Blob(..) => "blob",
            Self::Uploads(_) | Self::Upload(..) => "upload",
            Self::Referrers(..) => "referrers",
        }
    }
}

/// Why a path names nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PathError {
    /// Not a path of the specification.
    Unknown,
    /// A bad repository name, tag or digest of a manifest.
    Reference(ReferenceError),
    /// A bad digest.
    Digest(DigestError),
}

impl From<ReferenceError> for PathError {
    fn from(error: ReferenceError) -> Self {
        Self::Reference(error)
    }
}

impl From<DigestError> for PathError {
    fn from(error: DigestError) -> Self {
        Self::Digest(error)
    }
}

/// Decodes percent escapes of one segment. A segment that hides a slash or is not UTF-8 is refused:
/// it would be read as another path by whatever stands in front of us.
pub(crate) fn decode(segment: &str) -> Option<Cow<'_, str>> {
    if !segment.contains('%') {
        return Some(Cow::Borrowed(segment));
    }
    let bytes = percent_decode(segment.as_bytes(), false)?;
    if bytes.contains(&b'/') || bytes.contains(&0) {
        return None;
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

/// Decodes `%xx`, and `+` as a blank in a query. `None`: a broken escape.
pub(crate) fn percent_decode(text: &[u8], plus_is_blank: bool) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(&byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let high = char::from(*bytes.next()?).to_digit(16)?;
                let low = char::from(*bytes.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if plus_is_blank => b' ',
            other => other,
        });
    }
    Some(out)
}

#[cfg(test)]
mod tests;
