//! Content digests ([image-spec § Digests](https://github.com/opencontainers/image-spec/blob/main/descriptor.md#digests)).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::digest::common::hazmat::SerializableState;
use sha2::{Digest as _, Sha256, Sha512};

/// A digest whose algorithm is registered and whose hash has the right length and alphabet.
///
/// It prints and serialises as `algorithm:hex`. Two digests are equal only when algorithm and hash
/// are; a `sha256` and a `sha512` digest of the same bytes are different values.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

impl Digest {
    /// Builds a digest from the raw hash. `None` when the length does not fit the algorithm.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Option<Self> {
        (bytes.len() == algorithm.size()).then(|| Self {
            algorithm,
            bytes: bytes.to_vec(),
        })
    }

    /// Computes the digest of `content`.
    pub fn of(algorithm: Algorithm, content: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(content);
        hasher.finish()
    }

    /// Computes the `sha256` digest of `content`.
    pub fn sha256(content: &[u8]) -> Self {
        Self::of(Algorithm::Sha256, content)
    }

    /// The hash function.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The raw hash: 32 bytes for `sha256`, 64 for `sha512`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The hash in lower-case hexadecimal, without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(&self.bytes)
    }

    /// The first twelve hexadecimal characters, for people to read.
    pub fn short(&self) -> String {
        self.hex().chars().take(12).collect()
    }

    /// Tells whether `content` has this digest.
    pub fn matches(&self, content: &[u8]) -> bool {
        Self::of(self.algorithm, content) == *self
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (algorithm, encoded) = text
            .split_once(':')
            .ok_or_else(|| DigestError::Malformed(shorten(text)))?;
        let algorithm: Algorithm = algorithm.parse()?;
        let lower = encoded
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if encoded.len() != algorithm.size() * 2 || !lower {
            return Err(DigestError::Malformed(shorten(text)));
        }
        let bytes = hex::decode(encoded).map_err(|_| DigestError::Malformed(shorten(text)))?;
        Ok(Self { algorithm, bytes })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A registered digest algorithm that this program computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// `sha256`, which every implementation must support.
    Sha256,
    /// `sha512`.
    Sha512,
}

impl Algorithm {
    /// The length of the raw hash in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The name as it stands before the colon of a digest.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl FromStr for Algorithm {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "sha256" => Ok(Self::Sha256),
            "sha512" => Ok(Self::Sha512),
            other => Err(DigestError::Unsupported(shorten(other))),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A running hash whose state can be stored and continued elsewhere.
#[derive(Clone)]
pub enum Hasher {
    /// A running SHA-256.
    Sha256(Box<Sha256>),
    /// A running SHA-512.
    Sha512(Box<Sha512>),
}

impl Hasher {
    /// Starts an empty hash.
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Box::default()),
            Algorithm::Sha512 => Self::Sha512(Box::default()),
        }
    }

    /// Continues a hash from the bytes that [`Hasher::state`] gave.
    ///
    /// # Errors
    /// [`DigestError::State`] when the bytes are not such a state.
    pub fn resume(algorithm: Algorithm, state: &[u8]) -> Result<Self, DigestError> {
        fn load<T: SerializableState>(state: &[u8]) -> Result<Box<T>, DigestError> {
            let state = state.try_into().map_err(|_| DigestError::State)?;
            T::deserialize(state)
                .map(Box::new)
                .map_err(|_| DigestError::State)
        }
        match algorithm {
            Algorithm::Sha256 => load(state).map(Self::Sha256),
            Algorithm::Sha512 => load(state).map(Self::Sha512),
        }
    }

    /// The running state, to be stored with an upload. Its form is that of the hash library and
    /// carries the version of the upload state, not one of its own.
    pub fn state(&self) -> Vec<u8> {
        match self {
            Self::Sha256(hash) => hash.serialize().to_vec(),
            Self::Sha512(hash) => hash.serialize().to_vec(),
        }
    }

    /// The algorithm of this hash.
    pub fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Takes in more content.
    pub fn update(&mut self, content: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(content),
            Self::Sha512(hash) => hash.update(content),
        }
    }

    /// Ends the hash.
    pub fn finish(self) -> Digest {
        match self {
            Self::Sha256(hash) => Digest {
                algorithm: Algorithm::Sha256,
                bytes: hash.finalize().to_vec(),
            },
            Self::Sha512(hash) => Digest {
                algorithm: Algorithm::Sha512,
                bytes: hash.finalize().to_vec(),
            },
        }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hasher").field(&self.algorithm()).finish()
    }
}

/// Why a digest, an algorithm or a stored hash state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// Not `algorithm:hex` with the right length in lower case.
    #[error("`{0}` is not a digest, expected `sha256:` and 64 lower-case hexadecimal characters")]
    Malformed(String),
    /// A stored hash state that this version cannot continue.
    #[error("the stored hash state cannot be continued")]
    State,
    /// An algorithm other than `sha256` and `sha512`.
    #[error("digest algorithm `{0}` is not supported, use `sha256` or `sha512`")]
    Unsupported(String),
}

/// Cuts foreign text so that an error message stays short.
pub(crate) fn shorten(text: &str) -> String {
    const LIMIT: usize = 160;
    if text.chars().count() <= LIMIT {
        text.to_owned()
    } else {
        let mut cut: String = text.chars().take(LIMIT).collect();
        cut.push('…');
        cut
    }
}

#[cfg(test)]
mod tests;
