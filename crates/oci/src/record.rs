//! Canonical records and the chain that holds them together: the one form of audit records and
//! attempt ledgers.
//!
//! A record is a JSON object with a version, `{"v":1,…}`, in exactly one byte form: keys in bytewise
//! order of their UTF-8, no blanks, strings with the shortest escapes (only `"`, `\` and control
//! characters), and **integers only**, from -2^63 to 2^64-1. A fraction has no agreed byte form, so
//! it is refused; write milliseconds, or text.
//!
//! Each record is chained: `hash = SHA-256(hash of the record before ‖ bytes)`, the first one after
//! 32 zero bytes. A changed, missing, added or exchanged record breaks every hash after it. What a
//! chain alone cannot show is that its *end* was cut off; for that, [`Chain::head`] is sealed
//! elsewhere and compared.
//!
//! A ledger file holds one record a line. A line is the canonical record with one more key, `hash`,
//! in its place in the order. A line counts when its newline is written; what stands after the last
//! newline is a torn write that was never acknowledged, and is cut off before the next append.

use std::io::{self, BufRead, Read as _};

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

/// The version that records carry in `v`.
pub const VERSION: u64 = 1;

/// The longest line of a ledger in bytes, newline included.
pub const MAX_LINE: usize = 4 << 20;

/// The longest record that a registry takes as a report, in bytes of its canonical form.
pub const MAX_REPORTED: usize = 256 << 10;

/// The canonical bytes of a value.
///
/// # Errors
/// [`RecordError::Number`] for a fraction, [`RecordError::Depth`] beyond 100 levels.
pub fn canonical(value: &Value) -> Result<Vec<u8>, RecordError> {
    let mut bytes = Vec::new();
    write(value, 0, &mut bytes)?;
    Ok(bytes)
}

/// The end of a hash chain. Everything before it is fixed by these 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The hash of the last record; zeros before the first.
    pub previous: [u8; 32],
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes on from a hash in hexadecimal, as [`Chain::head`] gives it.
    ///
    /// # Errors
    /// [`RecordError::Hash`] when it is not 64 hexadecimal characters in lower case.
    pub fn resume(head: &str) -> Result<Self, RecordError> {
        let mut previous = [0; 32];
        hex::decode_to_slice(head, &mut previous).map_err(|_| RecordError::Hash)?;
        let chain = Self { previous };
        if chain.head() == head {
            Ok(chain)
        } else {
            Err(RecordError::Hash)
        }
    }

    /// The hash of the last record in hexadecimal.
    pub fn head(&self) -> String {
        hex::encode(self.previous)
    }

    /// The hash that these bytes have as the next record.
    pub fn hash(&self, bytes: &[u8]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.previous);
        hash.update(bytes);
        hash.finalize().into()
    }

    /// Takes in the next record's bytes and gives its hash.
    pub fn advance(&mut self, bytes: &[u8]) -> [u8; 32] {
        self.previous = self.hash(bytes);
        self.previous
    }

    /// Makes the ledger line of a record, newline included, and takes it in. `v` is added where it
    /// is missing.
    ///
    /// The chain has moved on when this returns. When the line cannot be stored, go on with a copy
    /// from before.
    ///
    /// # Errors
    /// As [`canonical`]; [`RecordError::Form`] when the record is not an object or has a `hash` of
    /// its own, [`RecordError::Version`], [`RecordError::Length`].
    pub fn append(&mut self, record: &Value) -> Result<String, RecordError> {
        let mut record = record.as_object().ok_or(RecordError::Form)?.clone();
        if record.contains_key("hash") {
            return Err(RecordError::Form);
        }
        let version = record.entry("v").or_insert_with(|| VERSION.into());
        check_version(version)?;
        let bytes = canonical(&Value::Object(record.clone()))?;
        let hash = self.hash(&bytes);
        record.insert("hash".to_owned(), hex::encode(hash).into());
        let mut line = canonical(&Value::Object(record))?;
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(RecordError::Length);
        }
        let line = String::from_utf8(line).map_err(|_| RecordError::Form)?;
        self.previous = hash;
        Ok(line)
    }

    /// Checks the next ledger line (with or without its newline), takes it in and gives the record
    /// without its `hash`. The chain does not move when the line is refused.
    ///
    /// # Errors
    /// [`RecordError::Json`], [`RecordError::Form`] when the line is not in canonical form,
    /// [`RecordError::Version`], [`RecordError::Broken`] when the hash is another one.
    pub fn verify_line(&mut self, line: &[u8]) -> Result<Value, RecordError> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let value: Value =
            serde_json::from_slice(line).map_err(|error| RecordError::Json(error.to_string()))?;
        // One byte form: a line that says the same in other bytes was not written by `append`.
        if canonical(&value)? != line {
            return Err(RecordError::Form);
        }
        let Value::Object(mut record) = value else {
            return Err(RecordError::Form);
        };
        let claimed = remove(&mut record, "hash");
        check_version(record.get("v").unwrap_or(&Value::Null))?;
        let record = Value::Object(record);
        let hash = self.hash(&canonical(&record)?);
        if claimed != Some(Value::String(hex::encode(hash))) {
            return Err(RecordError::Broken);
        }
        self.previous = hash;
        Ok(record)
    }
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The chain after the last whole line: append here.
    pub chain: Chain,
    /// Whole lines.
    pub records: u64,
    /// Bytes of whole lines: where a torn line is cut off.
    pub bytes: u64,
    /// Whether there is a torn line behind them.
    pub is_torn: bool,
}

/// Checks a ledger line by line after `chain`, handing each record to `each`.
///
/// # Errors
/// [`LedgerError`] with the number of the first bad line. A torn last line is not an error.
pub fn verify<R: BufRead>(
    mut ledger: R,
    chain: Chain,
    each: &mut dyn FnMut(Value),
) -> Result<Verified, LedgerError> {
    let mut verified = Verified {
        chain,
        records: 0,
        bytes: 0,
        is_torn: false,
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = (&mut ledger)
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut line)
            .map_err(LedgerError::Read)?;
        let number = verified.records + 1;
        let bad = |source| LedgerError::Line { number, source };
        if length > MAX_LINE {
            return Err(bad(RecordError::Length));
        }
        if !line.ends_with(b"\n") {
            verified.is_torn = length > 0;
            return Ok(verified);
        }
        each(verified.chain.verify_line(&line).map_err(bad)?);
        verified.records += 1;
        verified.bytes += length as u64;
    }
}

/// Why a record was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The hash does not follow from the record and the one before it.
    #[error("the record does not continue the chain, it or one before it was changed")]
    Broken,
    /// Nested too deeply.
    #[error("the record is nested more than {MAX_DEPTH} levels deep")]
    Depth,
    /// Not the canonical form of an object.
    #[error("the record is not an object in canonical form")]
    Form,
    /// Not a hash.
    #[error("the chain's head is not 64 lower-case hexadecimal characters")]
    Hash,
    /// Not JSON.
    #[error("the record is not JSON: {0}")]
    Json(String),
    /// Too long for a line.
    #[error("the record is longer than {MAX_LINE} bytes")]
    Length,
    /// A fraction.
    #[error("`{0}` is not an integer, records hold integers only")]
    Number(String),
    /// Another version.
    #[error("the record's version `v` is {0}, this program knows {VERSION}")]
    Version(String),
}

/// Why a ledger was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// A line is bad.
    #[error("line {number} of the ledger is refused")]
    Line {
        /// Its number, from 1.
        number: u64,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// The ledger could not be read.
    #[error("cannot read the ledger")]
    Read(#[source] io::Error),
}

fn check_version(version: &Value) -> Result<(), RecordError> {
    if version.as_u64() == Some(VERSION) {
        Ok(())
    } else {
        let mut shown = version.to_string();
        shown.truncate(shown.floor_char_boundary(40));
        Err(RecordError::Version(shown))
    }
}

/// Removes a key and keeps the order of the others.
fn remove(object: &mut Map<String, Value>, key: &str) -> Option<Value> {
    object.shift_remove(key)
}

fn write(value: &Value, depth: usize, out: &mut Vec<u8>) -> Result<(), RecordError> {
    if depth > MAX_DEPTH {
        return Err(RecordError::Depth);
    }
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            out.extend_from_slice(number.to_string().as_bytes());
        }
        Value::Number(number) => return Err(RecordError::Number(number.to_string())),
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.push(b'[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write(item, depth + 1, out)?;
            }
            out.push(b']');
        }
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
            out.push(b'{');
            for (at, (key, member)) in members.into_iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write_string(key, out);
                out.push(b':');
                write(member, depth + 1, out)?;
            }
            out.push(b'}');
        }
    }
    Ok(())
}

/// The escapes stand here, not in a library, because every hash depends on them (RFC 8785 § 3.2.2.2).
fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in text.bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x09 => out.extend_from_slice(b"\\t"),
            0x0a => out.extend_from_slice(b"\\n"),
            0x0c => out.extend_from_slice(b"\\f"),
            0x0d => out.extend_from_slice(b"\\r"),
            0x00..=0x1f => out.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}

/// Below the depth at which the JSON parser stops, so that what was written can be read.
const MAX_DEPTH: usize = 100;

#[cfg(test)]
mod tests;
