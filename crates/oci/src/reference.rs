//! Names of things in a registry: repository names, tags, whole references
//! ([distribution-spec § Pulling manifests](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests)).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError, shorten};

/// A repository name: path components of `[a-z0-9]+` joined by `.`, `_`, `__` or dashes, separated
/// by `/`, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepositoryName(String);

impl RepositoryName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first path component.
    pub fn namespace(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }
}

impl FromStr for RepositoryName {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_NAME || !text.split('/').all(is_path_component) {
            return Err(ReferenceError::Name(shorten(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(String);

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The subject when this tag has the form of evidence that older clients attach by tag: cosign's
    /// `sha256-<hex>.sig`, `.att`, `.sbom`, and the referrers tag schema's `sha256-<hex>`.
    pub fn subject(&self) -> Option<Digest> {
        let (algorithm, rest) = self.0.split_once('-')?;
        let hex = match rest.split_once('.') {
            None => rest,
            Some((hex, "sig" | "att" | "sbom")) => hex,
            Some(_) => return None,
        };
        format!("{algorithm}:{hex}").parse().ok()
    }
}

impl FromStr for Tag {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = text.bytes();
        let first = bytes
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
        let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
        if !first || !rest || text.len() > MAX_TAG {
            return Err(ReferenceError::Tag(shorten(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What stands after a repository name in a manifest request: a tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TagOrDigest {
    /// A digest: the manifest itself.
    Digest(Digest),
    /// A tag: whatever it points to now.
    Tag(Tag),
}

impl FromStr for TagOrDigest {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains(':') {
            Ok(Self::Digest(text.parse()?))
        } else {
            Ok(Self::Tag(text.parse()?))
        }
    }
}

impl fmt::Display for TagOrDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::Tag(tag) => tag.fmt(f),
        }
    }
}

/// A whole reference: `host[:port]/repository[:tag][@digest]`.
///
/// There is no default host and no default tag: `nginx` alone is refused here, because a program
/// that guesses a registry pulls what nobody named. Short names of Compose files are expanded by
/// [`Reference::parse_familiar`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host with optional port, such as `registry.example.com` or `127.0.0.1:5050`.
    pub host: String,
    /// The repository.
    pub repository: RepositoryName,
    /// The tag, when given.
    pub tag: Option<Tag>,
    /// The digest, when given. It wins over the tag.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Parses a name as it stands in a Compose file or a `docker` command: without a host it means
    /// Docker Hub (`docker.io`, `library/` for single names), without tag and digest `latest`.
    ///
    /// # Errors
    /// As [`Reference::from_str`].
    pub fn parse_familiar(text: &str) -> Result<Self, ReferenceError> {
        let first = text.split('/').next().unwrap_or_default();
        let has_host = text.contains('/')
            && (first.contains('.') || first.contains(':') || first == "localhost");
        let full = if has_host {
            text.to_owned()
        } else if text.contains('/') {
            format!("docker.io/{text}")
        } else {
            format!("docker.io/library/{text}")
        };
        let mut reference: Self = full.parse()?;
        if reference.tag.is_none() && reference.digest.is_none() {
            reference.tag = Some(Tag("latest".to_owned()));
        }
        Ok(reference)
    }

    /// The digest, else the tag, else the tag `latest`.
    pub fn tag_or_digest(&self) -> TagOrDigest {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => TagOrDigest::Digest(digest.clone()),
            (None, Some(tag)) => TagOrDigest::Tag(tag.clone()),
            (None, None) => TagOrDigest::Tag(Tag("latest".to_owned())),
        }
    }

    /// The same repository with this digest and without a tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            host: self.host.clone(),
            repository: self.repository.clone(),
            tag: None,
            digest: Some(digest),
        }
    }

    /// The same repository with this tag and without a digest.
    pub fn with_tag(&self, tag: Tag) -> Self {
        Self {
            host: self.host.clone(),
            repository: self.repository.clone(),
            tag: Some(tag),
            digest: None,
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ReferenceError::Reference(shorten(text));
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        let (host, path) = rest.split_once('/').ok_or_else(malformed)?;
        if !is_host(host) {
            return Err(malformed());
        }
        let (name, tag) = match path.rsplit_once(':') {
            Some((name, tag)) => (name, Some(tag.parse()?)),
            None => (path, None),
        };
        Ok(Self {
            host: host.to_owned(),
            repository: name.parse()?,
            tag,
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Gives a checked text type its plain text forms.
macro_rules! text_type {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        text_serde!($name);
    };
}

/// Serialises a type as the text it prints and parses.
macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text_type!(RepositoryName);
text_type!(Tag);
text_serde!(Reference);

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The digest part is wrong.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// Not a repository name.
    #[error(
        "`{0}` is not a repository name, use lower-case letters, digits and `.`, `_`, `-` between \
         them, components separated by `/`, at most 255 characters"
    )]
    Name(String),
    /// Not a reference with a host.
    #[error("`{0}` is not a reference, expected `host[:port]/repository[:tag][@digest]`")]
    Reference(String),
    /// Not a tag.
    #[error(
        "`{0}` is not a tag, use at most 128 letters, digits, `_`, `.` and `-`, not beginning with \
         `.` or `-`"
    )]
    Tag(String),
}

fn is_path_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    // Between alphanumerics stands one `.`, one or two `_`, or any number of `-`.
    let mut separator = String::new();
    for &byte in bytes {
        if alphanumeric(byte) {
            let fits = matches!(separator.as_str(), "" | "." | "_" | "__")
                || separator.bytes().all(|b| b == b'-');
            if !fits {
                return false;
            }
            separator.clear();
        } else if matches!(byte, b'.' | b'_' | b'-') {
            separator.push(char::from(byte));
        } else {
            return false;
        }
    }
    true
}

fn is_host(text: &str) -> bool {
    let (name, port) = if let Some(rest) = text.strip_prefix('[') {
        match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => (
                "v6",
                port.strip_prefix(':').or(port.is_empty().then_some("1")),
            ),
            _ => return false,
        }
    } else {
        match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, Some("1")),
        }
    };
    let name_fits = !name.is_empty()
        && name.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        });
    name_fits && port.is_some_and(|port| port.parse::<u16>().is_ok_and(|p| p > 0))
}

const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

#[cfg(test)]
mod tests;
