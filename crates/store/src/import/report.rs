//! What an import or export found and did, and whether both sides agree.

use std::collections::BTreeMap;

use oci::{Digest, RepositoryName};
use serde_json::{Value, json};

/// Totals of one side. Blobs and bytes count each digest once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Repositories.
    pub repositories: u64,
    /// Tags.
    pub tags: u64,
    /// Manifests and indexes, once for each repository.
    pub manifests: u64,
    /// Distinct blobs.
    pub blobs: u64,
    /// Pairs of a subject and what refers to it.
    pub referrers: u64,
    /// Bytes of the distinct blobs and of the manifests.
    pub bytes: u64,
}

/// What moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Manifests written.
    pub manifests: u64,
    /// Tags set.
    pub tags: u64,
    /// Blobs whose bytes were written or sent.
    pub copied: u64,
    /// Blobs that share their blocks with the source (a reflink).
    pub reflinked: u64,
    /// Blobs that are the source's own file under a second name (a hard link).
    pub linked: u64,
    /// Blobs that were there, in the repository or beside it.
    pub skipped: u64,
    /// Bytes of the blobs copied, reflinked and linked.
    pub bytes: u64,
}

/// Something that is not as it should be; the rest went on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The repository, when it concerns one.
    pub repository: Option<RepositoryName>,
    /// One sentence.
    pub message: String,
}

/// Something that the two sides do not agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The repository as the source names it.
    pub repository: RepositoryName,
    /// `tag v1`, `manifest sha256:…`, `blob sha256:…`, `referrer sha256:… of sha256:…`.
    pub what: String,
    /// The digest at the source.
    pub source: Option<Digest>,
    /// The digest at the destination.
    pub destination: Option<Digest>,
}

/// The result of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Nothing was written.
    pub dry_run: bool,
    /// What the source holds of what was asked for.
    pub source: Counts,
    /// What of it the destination holds at the end.
    pub destination: Counts,
    /// What this run moved.
    pub moved: Moved,
    /// What could not be read or is wrong at the source.
    pub problems: Vec<Problem>,
    /// What the destination lacks or has otherwise.
    pub differences: Vec<Difference>,
    /// Tags by repository.
    pub tags: BTreeMap<RepositoryName, u64>,
}

impl Report {
    /// Whether everything that was asked for is there.
    pub fn is_complete(&self) -> bool {
        self.problems.is_empty() && self.differences.is_empty()
    }

    /// The report as a document.
    pub fn to_json(&self) -> Value {
        let counts = |counts: &Counts| {
            json!({
                "repositories": counts.repositories,
                "tags": counts.tags,
                "manifests": counts.manifests,
                "blobs": counts.blobs,
                "referrers": counts.referrers,
                "bytes": counts.bytes,
            })
        };
        let problems: Vec<Value> = self
            .problems
            .iter()
            .map(|problem| {
                json!({
                    "repository": problem.repository.as_ref().map(RepositoryName::as_str),
                    "message": problem.message,
                })
            })
            .collect();
        let differences: Vec<Value> = self
            .differences
            .iter()
            .map(|difference| {
                json!({
                    "repository": difference.repository.as_str(),
                    "what": difference.what,
                    "source": difference.source.as_ref().map(ToString::to_string),
                    "destination": difference.destination.as_ref().map(ToString::to_string),
                })
            })
            .collect();
        json!({
            "dryRun": self.dry_run,
            "complete": self.is_complete(),
            "source": counts(&self.source),
            "destination": counts(&self.destination),
            "moved": {
                "manifests": self.moved.manifests,
                "tags": self.moved.tags,
                "copied": self.moved.copied,
                "reflinked": self.moved.reflinked,
                "linked": self.moved.linked,
                "skipped": self.moved.skipped,
                "bytes": self.moved.bytes,
            },
            "problems": problems,
            "differences": differences,
        })
    }
}
