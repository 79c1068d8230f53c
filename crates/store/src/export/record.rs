//! The records of an export, one JSON object a line.

use oci::Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Error;

/// One line of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum Record {
    /// The first line of a part that begins a set.
    Set { version: i64 },
    /// The bytes of a small blob, in hexadecimal.
    Blob { digest: String, body: String },
    Manifest {
        repository: String,
        digest: String,
        media_type: String,
        /// The exact bytes as text, when they are text.
        #[serde(skip_serializing_if = "Option::is_none")]
        body: Option<String>,
        /// Else in hexadecimal.
        #[serde(skip_serializing_if = "Option::is_none")]
        hex: Option<String>,
        by: String,
        at: i64,
    },
    /// Where a tag points; nowhere when it was deleted.
    Tag {
        repository: String,
        tag: String,
        digest: Option<String>,
        generation: i64,
        by: String,
        at: i64,
    },
    /// A manifest was deleted.
    Gone { repository: String, digest: String },
    /// A repository was deleted with all that it held.
    Dropped { repository: String },
    /// Everything that was there when the set began is in the parts up to this one.
    Whole { set: u64 },
    /// The last line of a part: the SHA-256 of the lines before it.
    End { sha256: String },
}

impl Record {
    pub(crate) fn manifest(
        repository: &str,
        digest: &Digest,
        media_type: &str,
        body: Vec<u8>,
        by: &str,
        at: i64,
    ) -> Self {
        let (body, hex) = match String::from_utf8(body) {
            Ok(text) => (Some(text), None),
            Err(error) => (None, Some(hex::encode(error.as_bytes()))),
        };
        Self::Manifest {
            repository: repository.to_owned(),
            digest: digest.to_string(),
            media_type: media_type.to_owned(),
            body,
            hex,
            by: by.to_owned(),
            at,
        }
    }
}

/// A part that is being made.
#[derive(Debug, Default)]
pub(crate) struct Part {
    bytes: Vec<u8>,
}

impl Part {
    /// The first part of a set.
    pub(crate) fn first() -> Self {
        let mut part = Self::default();
        // A constant record can always be written.
        let _ = part.add(&Record::Set { version: VERSION });
        part
    }

    pub(crate) fn add(&mut self, record: &Record) -> Result<(), Error> {
        serde_json::to_writer(&mut self.bytes, record)
            .map_err(|error| Error::Database(format!("an export record: {error}")))?;
        self.bytes.push(b'\n');
        Ok(())
    }

    pub(crate) fn length(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let sha256 = hex::encode(Sha256::digest(&self.bytes));
        let _ = self.add(&Record::End { sha256 });
        self.bytes
    }
}

/// The records of a part, and what is wrong with it.
///
/// Of a part whose end is torn off, the whole lines count: manifests and blobs prove themselves, and a tag that was
/// written was true. A part that has its end and not the hash in it was changed within, so nothing of it counts.
pub(crate) fn salvage(bytes: &[u8]) -> (Vec<Record>, Option<String>) {
    let Err(problem) = end(bytes) else {
        return match read(bytes) {
            Ok(records) => (records, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
    };
    let mut records = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        match serde_json::from_slice(line) {
            Ok(Record::End { .. }) | Err(_) => break,
            Ok(Record::Set { version }) if version > VERSION => {
                return (Vec::new(), Some(too_new(version)));
            }
            Ok(record) => records.push(record),
        }
    }
    let problem = format!("{problem}; its first {} lines are used", records.len());
    (records, Some(problem))
}

/// The lines before the last one, and the hash in it.
fn end(bytes: &[u8]) -> Result<(&[u8], String), String> {
    let body = bytes
        .strip_suffix(b"\n")
        .ok_or("it does not end with a line")?;
    let split = body
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let (lines, end) = body.split_at(split);
    let Ok(Record::End { sha256 }) = serde_json::from_slice(end) else {
        return Err("it does not end with its hash".to_owned());
    };
    Ok((lines, sha256))
}

fn too_new(version: i64) -> String {
    format!("it has version {version}, this program knows up to {VERSION}, use a newer program")
}

/// The records of a part that is whole.
fn read(bytes: &[u8]) -> Result<Vec<Record>, String> {
    let (lines, sha256) = end(bytes)?;
    if hex::encode(Sha256::digest(lines)) != sha256 {
        return Err("its bytes have another hash".to_owned());
    }
    let mut records = Vec::new();
    for line in lines
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let record: Record =
            serde_json::from_slice(line).map_err(|error| format!("a record: {error}"))?;
        if let Record::Set { version } = record
            && version > VERSION
        {
            return Err(too_new(version));
        }
        records.push(record);
    }
    Ok(records)
}

const VERSION: i64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_reads_back_and_damage_is_seen() {
        let mut part = Part::first();
        let body = "{\n  \"schemaVersion\": 2, \"ü\": \"\\u0000\"\r\n}".as_bytes();
        let manifest = Record::manifest("a/b", &Digest::sha256(body), "t", body.to_vec(), "u", 7);
        let odd = Record::manifest(
            "a/b",
            &Digest::sha256(b"\xff"),
            "t",
            b"\xff".to_vec(),
            "u",
            7,
        );
        part.add(&manifest).unwrap();
        part.add(&odd).unwrap();
        let bytes = part.finish();
        let records = read(&bytes).unwrap();
        assert_eq!(records[1..], [manifest.clone(), odd]);
        let Record::Manifest {
            body: Some(text), ..
        } = &records[1]
        else {
            panic!("{records:?}");
        };
        assert_eq!(text.as_bytes(), body);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(read(&damaged).is_err(), "{at}");
            assert!(read(&bytes[..at]).is_err(), "{at}");
            // Torn, the lines that are whole are there.
            let (found, problem) = salvage(&bytes[..at]);
            assert!(problem.is_some(), "{at}");
            assert!(records.starts_with(&found), "{at}");
            let whole = bytes[..at].split(|byte| *byte == b'\n').count() - 1;
            assert!(found.len() >= whole, "{at}");
        }
        assert_eq!(salvage(&bytes), (records.clone(), None));
        let mut changed = bytes.clone();
        changed[40] ^= 1;
        assert_eq!(salvage(&changed).0, []);
    }
}
