//! The objects: each blob's is read and compared, and those that belong to nothing are looked for.
//!
//! Rows and objects are not of one moment, so nothing is said of an object before its row is asked again.

use std::path::Path;
use std::sync::Arc;

use oci::Digest;
use tokio::task::JoinSet;

use super::{BLOB_KEY, BLOBS, COUNT_BLOBS, Check, VerifyProgress};
use crate::blob::StorageKey;
use crate::blob::objects::Objects;
use crate::blocking::blocking;
use crate::error::Error;
use crate::model::Blob;
use crate::scrub::{self, Verdict};
use crate::store::single;

/// What a reading of an object found.
struct Reading {
    blob: i64,
    key: StorageKey,
    digest: Digest,
    size: u64,
    verdict: Verdict,
}

impl Check<'_> {
    /// Reads every blob, several at once.
    pub(super) async fn check_blobs(&mut self) -> Result<(), Error> {
        let total = single(&self.rows.query(&COUNT_BLOBS, Vec::new()).await?)?;
        let mut readings = JoinSet::new();
        let mut last = i64::MIN;
        loop {
            let rows = self.rows.query(&BLOBS, vec![last.into()]).await?;
            if rows.is_empty() {
                break;
            }
            for row in &rows {
                last = row.i64(0)?;
                self.report.blobs += 1;
                let digest = row.digest(1)?;
                let size = row.u64(2)?;
                match (row.opt_bytes(3)?, row.opt_text(4)?) {
                    (Some(body), None) => {
                        self.report.bytes += body.len() as u64;
                        if body.len() as u64 != size || !digest.matches(&body) {
                            self.report.problem(format!(
                                "the bytes in the row of blob `{digest}` are damaged"
                            ));
                        }
                    }
                    (None, Some(key)) => match StorageKey::parse(&key) {
                        Err(error) => self.report.problem(format!("blob `{digest}`: {error}")),
                        Ok(key) => {
                            while readings.len() >= self.options.parallel.max(1) {
                                self.take_reading(&mut readings).await?;
                            }
                            let objects = self.objects.clone();
                            let (blob, hashes) = (last, self.options.hash);
                            readings.spawn(async move {
                                let verdict = examine(&objects, &key, &digest, size, hashes).await;
                                Reading {
                                    blob,
                                    key,
                                    digest,
                                    size,
                                    verdict,
                                }
                            });
                        }
                    },
                    _ => self.report.problem(format!(
                        "blob `{digest}` has its bytes in two places or in none"
                    )),
                }
            }
            (self.progress)(VerifyProgress {
                phase: "blobs",
                done: self.report.blobs,
                total: Some(total),
                bytes: self.report.bytes,
            });
        }
        while !readings.is_empty() {
            self.take_reading(&mut readings).await?;
        }
        Ok(())
    }

    async fn take_reading(&mut self, readings: &mut JoinSet<Reading>) -> Result<(), Error> {
        let Some(reading) = readings.join_next().await else {
            return Ok(());
        };
        let reading = reading.map_err(|_| Error::Stopped)?;
        let problem = match reading.verdict {
            Verdict::Sound => {
                if self.options.hash {
                    self.report.bytes += reading.size;
                }
                return Ok(());
            }
            Verdict::Damaged(problem) | Verdict::Missing(problem) => problem,
            Verdict::Unknown(error) => format!("it cannot be read now: {error}"),
        };
        // It may be gone, or healed, since its row was read.
        let rows = self
            .rows
            .query(&BLOB_KEY, vec![reading.blob.into()])
            .await?;
        let key = match rows.first() {
            Some(row) => row.opt_text(0)?,
            None => None,
        };
        if key.as_deref() == Some(reading.key.as_str()) {
            self.report.problem(format!(
                "object `{}` of blob `{}`: {problem}",
                self.objects.describe(&reading.key).display(),
                reading.digest
            ));
        }
        Ok(())
    }

    /// Looks for objects that no row knows.
    pub(super) async fn check_strays(&mut self) -> Result<(), Error> {
        let parts = match self.objects.files() {
            Some(files) => {
                let files = Arc::clone(files);
                blocking(move || files.parts())
                    .await?
                    .into_iter()
                    .map(Some)
                    .collect()
            }
            None => vec![None],
        };
        let mut seen = 0;
        for part in parts {
            let listed = match (part, self.objects.files()) {
                (Some(part), Some(files)) => {
                    let files = Arc::clone(files);
                    blocking(move || files.list_part(&part)).await?
                }
                _ => self.objects.list().await?,
            };
            for page in listed.chunks(KEYS) {
                let keys: Vec<_> = page.iter().filter_map(|(_, key)| key.clone()).collect();
                let known = self.rows.known(&keys).await?;
                for (path, key) in page {
                    let stray = match key {
                        None => true,
                        Some(key) => {
                            !known.contains(key.as_str()) && self.is_there(path, key).await?
                        }
                    };
                    if stray {
                        self.report
                            .problem(format!("`{}` belongs to nothing", path.display()));
                    }
                }
                seen += page.len() as u64;
                (self.progress)(VerifyProgress {
                    phase: "objects",
                    done: seen,
                    total: None,
                    bytes: self.report.bytes,
                });
            }
        }
        Ok(())
    }

    /// What went since it was listed went with its row.
    async fn is_there(&self, path: &Path, key: &StorageKey) -> Result<bool, Error> {
        match &self.objects {
            Objects::Directory(_) => Ok(path.exists()),
            Objects::S3(s3) => Ok(s3.size(key).await?.is_some()),
        }
    }
}

/// Reads one object, or looks at its length.
async fn examine(
    objects: &Objects,
    key: &StorageKey,
    digest: &Digest,
    size: u64,
    hashes: bool,
) -> Verdict {
    if let (false, Objects::S3(s3)) = (hashes, objects) {
        return match s3.size(key).await {
            Ok(Some(found)) if found == size => Verdict::Sound,
            Ok(Some(found)) => Verdict::Damaged(format!("it has {found} bytes, not {size}")),
            Ok(None) => Verdict::Missing("it is missing".to_owned()),
            Err(error) => Verdict::of_failure(error),
        };
    }
    match objects.read(key, size) {
        Ok(_) if !hashes => Verdict::Sound,
        Ok(content) => {
            let blob = Blob { size, content };
            scrub::hash(&blob, digest, |_| std::future::ready(())).await
        }
        Err(error) => Verdict::of_failure(error),
    }
}

/// Objects whose rows are looked up in one moment.
const KEYS: usize = 1000;
