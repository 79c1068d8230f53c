//! Values and rows that both engines share.

use oci::{Algorithm, Digest};

use crate::clock::Timestamp;
use crate::error::Error;

/// A parameter or a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    I64(i64),
    Text(String),
    Blob(Vec<u8>),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::I64(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::I64(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::I64(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<Timestamp> for Value {
    fn from(value: Timestamp) -> Self {
        Self::I64(value.0)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<&String> for Value {
    fn from(value: &String) -> Self {
        Self::Text(value.clone())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<&[u8]> for Value {
    fn from(value: &[u8]) -> Self {
        Self::Blob(value.to_vec())
    }
}

impl From<Vec<u8>> for Value {
    fn from(value: Vec<u8>) -> Self {
        Self::Blob(value)
    }
}

impl From<&Digest> for Value {
    fn from(value: &Digest) -> Self {
        Self::Blob(encode_digest(value))
    }
}

impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// A row, owned.
#[derive(Clone, Debug)]
pub(crate) struct Row(pub(super) Vec<Value>);

impl Row {
    /// All columns in order.
    pub(crate) fn into_values(self) -> Vec<Value> {
        self.0
    }

    pub(crate) fn i64(&self, column: usize) -> Result<i64, Error> {
        match self.value(column)? {
            Value::I64(value) => Ok(*value),
            other => Err(unexpected(column, "an integer", other)),
        }
    }

    pub(crate) fn u64(&self, column: usize) -> Result<u64, Error> {
        let value = self.i64(column)?;
        u64::try_from(value)
            .map_err(|_| Error::Database(format!("column {column} is negative: {value}")))
    }

    pub(crate) fn opt_i64(&self, column: usize) -> Result<Option<i64>, Error> {
        self.optional(column, Self::i64)
    }

    pub(crate) fn time(&self, column: usize) -> Result<Timestamp, Error> {
        self.i64(column).map(Timestamp)
    }

    pub(crate) fn text(&self, column: usize) -> Result<String, Error> {
        match self.value(column)? {
            Value::Text(value) => Ok(value.clone()),
            other => Err(unexpected(column, "text", other)),
        }
    }

    pub(crate) fn opt_text(&self, column: usize) -> Result<Option<String>, Error> {
        self.optional(column, Self::text)
    }

    pub(crate) fn bytes(&self, column: usize) -> Result<Vec<u8>, Error> {
        match self.value(column)? {
            Value::Blob(value) => Ok(value.clone()),
            other => Err(unexpected(column, "bytes", other)),
        }
    }

    pub(crate) fn opt_bytes(&self, column: usize) -> Result<Option<Vec<u8>>, Error> {
        self.optional(column, Self::bytes)
    }

    /// Takes the bytes out of a column without copying them.
    pub(crate) fn take_bytes(&mut self, column: usize) -> Result<Vec<u8>, Error> {
        match self.0.get_mut(column) {
            Some(Value::Blob(value)) => Ok(std::mem::take(value)),
            Some(other) => Err(unexpected(column, "bytes", other)),
            None => Err(Error::Database(format!("there is no column {column}"))),
        }
    }

    pub(crate) fn digest(&self, column: usize) -> Result<Digest, Error> {
        match self.value(column)? {
            Value::Blob(value) => decode_digest(value)
                .ok_or_else(|| Error::Database(format!("column {column} holds no digest"))),
            other => Err(unexpected(column, "a digest", other)),
        }
    }

    pub(crate) fn opt_digest(&self, column: usize) -> Result<Option<Digest>, Error> {
        self.optional(column, Self::digest)
    }

    /// A column whose text is a name of the specifications.
    pub(crate) fn parse<T: std::str::FromStr>(&self, column: usize) -> Result<T, Error> {
        let text = self.text(column)?;
        text.parse()
            .map_err(|_| Error::Database(format!("column {column} holds `{text}`")))
    }

    fn value(&self, column: usize) -> Result<&Value, Error> {
        self.0
            .get(column)
            .ok_or_else(|| Error::Database(format!("there is no column {column}")))
    }

    fn optional<T>(
        &self,
        column: usize,
        read: impl FnOnce(&Self, usize) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match self.value(column)? {
            Value::Null => Ok(None),
            _ => read(self, column).map(Some),
        }
    }
}

/// A digest in one column: a byte for the algorithm (1 is sha256, 2 is sha512), then the raw hash.
pub(crate) fn encode_digest(digest: &Digest) -> Vec<u8> {
    let mark = match digest.algorithm() {
        Algorithm::Sha256 => 1,
        Algorithm::Sha512 => 2,
    };
    let mut bytes = Vec::with_capacity(1 + digest.as_bytes().len());
    bytes.push(mark);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

pub(crate) fn decode_digest(bytes: &[u8]) -> Option<Digest> {
    let (mark, hash) = bytes.split_first()?;
    let algorithm = match mark {
        1 => Algorithm::Sha256,
        2 => Algorithm::Sha512,
        _ => return None,
    };
    Digest::from_bytes(algorithm, hash)
}

fn unexpected(column: usize, wanted: &str, found: &Value) -> Error {
    let found = match found {
        Value::Null => "NULL",
        Value::I64(_) => "an integer",
        Value::Text(_) => "text",
        Value::Blob(_) => "bytes",
    };
    Error::Database(format!("column {column} holds {found}, not {wanted}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_digest_survives_its_column(content: Vec<u8>, long: bool) {
            let algorithm = if long { Algorithm::Sha512 } else { Algorithm::Sha256 };
            let digest = Digest::of(algorithm, &content);
            prop_assert_eq!(decode_digest(&encode_digest(&digest)), Some(digest));
        }

        #[test]
        fn foreign_bytes_are_no_digest_or_a_whole_one(bytes: Vec<u8>) {
            if let Some(digest) = decode_digest(&bytes) {
                prop_assert_eq!(encode_digest(&digest), bytes);
            }
        }
    }
}
