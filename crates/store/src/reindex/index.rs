//! What the exports tell of: one pass over the newest whole set and what came after it.
//!
//! Only names, digests and places are held in memory. The bytes are read again, part by part, when they are put in, so
//! memory grows with the number of manifests and tags and not with their size.

use std::collections::{BTreeMap, HashMap, HashSet};

use oci::{Algorithm, Digest, Manifest, RepositoryName, Tag};

use super::Reindexed;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::export::record::{self, Record};
use crate::export::shelf::{Name, Shelf};

/// Where a record stands in the exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Line {
    pub(super) part: usize,
    pub(super) line: usize,
}

/// A move of a tag.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) digest: Option<Digest>,
    pub(super) generation: i64,
    pub(super) by: String,
    pub(super) at: i64,
}

/// What the exports tell of, without the bytes.
#[derive(Default)]
pub(super) struct Index {
    parts: Vec<Name>,
    pub(super) blobs: HashMap<Digest, Line>,
    pub(super) manifests: BTreeMap<RepositoryName, HashMap<Digest, Line>>,
    pub(super) tags: BTreeMap<RepositoryName, BTreeMap<Tag, Vec<Move>>>,
    /// Blobs that manifests name by another algorithm than the usual one.
    pub(super) other: HashSet<Digest>,
}

impl Index {
    /// Reads the newest whole set, and what came after it.
    pub(super) async fn read(shelf: &Shelf, report: &mut Reindexed) -> Result<Self, Error> {
        let names = shelf.list().await?;
        let mut sets: BTreeMap<u64, Vec<Name>> = BTreeMap::new();
        for name in names {
            sets.entry(name.set).or_default().push(name);
        }
        if sets.is_empty() {
            report.problems.push(
                "there are no exports, so only the bytes of blobs are found again".to_owned(),
            );
            return Ok(Self::default());
        }
        // From the newest set back to one that is whole. What is newer and not whole is later and true as well.
        let mut chosen = Vec::new();
        let mut whole = false;
        for (_, names) in sets.into_iter().rev() {
            whole = holds_whole(shelf, &names).await?;
            chosen.splice(0..0, names);
            if whole {
                break;
            }
        }
        if !whole {
            report.problems.push(
                "no set of exports is whole, so some manifests and tags may be missing".to_owned(),
            );
        }
        let mut index = Self::default();
        let mut before: Option<(u64, u64)> = None;
        for name in chosen {
            if let Some((set, part)) = before
                && set == name.set
                && name.part > part + 1
            {
                report.problems.push(format!(
                    "parts {} to {} of set {set} of the exports are missing",
                    part + 1,
                    name.part - 1
                ));
            }
            before = Some((name.set, name.part));
            let (records, problem) = record::salvage(&shelf.get(&name).await?);
            if let Some(problem) = problem {
                report
                    .problems
                    .push(format!("part `{}` of the exports: {problem}", name.text()));
            }
            let part = index.parts.len();
            for (line, record) in records.into_iter().enumerate() {
                if let Err(error) = index.take(&record, Line { part, line }, report) {
                    report
                        .problems
                        .push(format!("part `{}` of the exports: {error}", name.text()));
                }
            }
            index.parts.push(name);
        }
        Ok(index)
    }

    fn take(&mut self, record: &Record, at: Line, report: &mut Reindexed) -> Result<(), Error> {
        match record {
            Record::Blob { digest, .. } => {
                self.blobs.insert(parse(digest)?, at);
            }
            Record::Manifest {
                repository,
                digest,
                at: time,
                body,
                media_type,
                ..
            } => {
                if let Some(body) = body.as_ref().filter(|body| body.contains("sha512:"))
                    && let Ok(view) = Manifest::parse(body.as_bytes(), media_type)
                {
                    let named = view.blobs().chain(view.children());
                    let digests = named.map(|entry| entry.digest.clone());
                    self.other
                        .extend(digests.filter(|digest| digest.algorithm() != Algorithm::Sha256));
                }
                self.manifests
                    .entry(parse(repository)?)
                    .or_default()
                    .insert(parse(digest)?, at);
                report.newest = report.newest.max(Some(Timestamp(*time)));
            }
            Record::Tag {
                repository,
                tag,
                digest,
                generation,
                by,
                at: time,
            } => {
                let digest = digest.as_deref().map(parse).transpose()?;
                self.tags
                    .entry(parse(repository)?)
                    .or_default()
                    .entry(parse(tag)?)
                    .or_default()
                    .push(Move {
                        digest,
                        generation: *generation,
                        by: by.clone(),
                        at: *time,
                    });
                report.newest = report.newest.max(Some(Timestamp(*time)));
            }
            Record::Gone { repository, digest } => {
                if let Some(held) = self.manifests.get_mut(&parse(repository)?) {
                    held.remove(&parse(digest)?);
                }
            }
            Record::Dropped { repository } => {
                let repository = parse(repository)?;
                self.manifests.remove(&repository);
                self.tags.remove(&repository);
            }
            Record::Set { .. } | Record::Whole { .. } | Record::End { .. } => {}
        }
        Ok(())
    }

    /// What one part holds, read again.
    pub(super) async fn records(&self, shelf: &Shelf, part: usize) -> Result<Vec<Record>, Error> {
        let Some(name) = self.parts.get(part) else {
            return Ok(Vec::new());
        };
        // What is wrong with it was told when it was read first.
        Ok(record::salvage(&shelf.get(name).await?).0)
    }
}

/// Whether these parts hold a whole set, from its beginning to its end.
async fn holds_whole(shelf: &Shelf, names: &[Name]) -> Result<bool, Error> {
    for name in names {
        let (records, _) = record::salvage(&shelf.get(name).await?);
        if records
            .iter()
            .any(|record| matches!(record, Record::Whole { .. }))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) fn parse<T: std::str::FromStr>(text: &str) -> Result<T, Error> {
    text.parse()
        .map_err(|_| Error::Database(format!("`{text}` is no name or digest")))
}
