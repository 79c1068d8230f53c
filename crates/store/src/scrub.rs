//! The scrub: reads what is stored again and compares it with its digest (`I20`).
//!
//! Every blob is read once per period, the one that was not read for the longest time first, at a set rate. Replicas
//! share the work: a batch is claimed in one transaction, read outside of any (`I9`), and each verdict is a transaction
//! of its own that holds only when the row still names the bytes that were read.
//!
//! A blob is marked `suspect` after two readings that both tell of damage: another digest, another length, no object.
//! Where an object is missing, or is another one in an object store, minutes lie between the two; while several in a row
//! are missing nothing is marked at all ([`doubt`]). An object that cannot be read now (an error of the disk, a store
//! that does not answer, or answers 404 without saying that of the object) gives no verdict. A suspect
//! blob is absent to HEAD, so clients push it again, which heals it; until then it is read again now and then, and what
//! was restored by hand is taken back.

mod doubt;
mod reading;
mod status;

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use oci::Digest;
use serde::{Deserialize, Serialize};

use crate::audit;
use crate::blob::file_system::StorageKey;
use crate::blocking::blocking;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::model::{Actor, Blob, BlobContent};
use crate::sql::{Body, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};

pub(crate) use reading::{Verdict, hash};
pub(crate) use status::Counters;
pub use status::{DamagedManifest, ScrubCounters, ScrubStatus, Suspect};

use doubt::{Doubts, Next};
use reading::Pace;

statements! {
    NEVER = "SELECT id, size FROM blob WHERE checked_at IS NULL \
                 AND (checking_until IS NULL OR checking_until < $1) \
             ORDER BY id LIMIT 64 {skip locked}";
    DUE = "SELECT id, size FROM blob WHERE checked_at < $2 \
               AND (checking_until IS NULL OR checking_until < $1) \
           ORDER BY checked_at, id LIMIT 64 {skip locked}";
    SUSPECT_DUE = "SELECT id, size FROM blob WHERE state = 'suspect' AND checked_at < $2 \
                       AND (checking_until IS NULL OR checking_until < $1) \
                   ORDER BY id LIMIT 16 {skip locked}";
    CLAIM = "UPDATE blob SET checking_until = $2 WHERE id = $1";
    LOOK = "SELECT digest, size, body, storage_key, state FROM blob WHERE id = $1";
    TAKE = "SELECT digest, storage_key, state, body FROM blob WHERE id = $1 {for update}";
    JUDGE = "UPDATE blob SET checked_at = $2, checking_until = NULL, state = $3 WHERE id = $1";
    GET = "SELECT value FROM meta WHERE key = $1";
    PUT = "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    START = "INSERT INTO meta (key, value) VALUES ('scrub.manifests', $1) ON CONFLICT (key) DO NOTHING";
    TAKE_PASS = "SELECT value FROM meta WHERE key = 'scrub.manifests' {for update}";
    MANIFESTS = "SELECT id, size FROM manifest WHERE id > $1 ORDER BY id LIMIT 64";
    MANIFEST = "SELECT m.digest, m.size, m.body, r.name, d.found_at FROM manifest m \
                JOIN repository r ON r.id = m.repository_id \
                LEFT JOIN damaged_manifest d ON d.manifest_id = m.id WHERE m.id = $1";
    DAMAGED = "INSERT INTO damaged_manifest (manifest_id, found_at) \
               SELECT id, $2 FROM manifest WHERE id = $1 ON CONFLICT (manifest_id) DO NOTHING";
    MENDED = "DELETE FROM damaged_manifest WHERE manifest_id = $1";
    LEFT = "SELECT COUNT(*) AS blobs, CAST(COALESCE(SUM(size), 0) AS BIGINT) AS bytes FROM blob \
            WHERE checked_at IS NULL OR checked_at < $1";
    OLDEST = "SELECT checked_at FROM blob WHERE checked_at IS NOT NULL ORDER BY checked_at, id LIMIT 1";
    COUNT_SUSPECT = "SELECT COUNT(*) FROM blob WHERE state = 'suspect'";
    SUSPECTS = "SELECT id, digest, size, checked_at FROM blob WHERE state = 'suspect' ORDER BY id LIMIT 100";
    HELD_BY = "SELECT r.name FROM repository_blob rb JOIN repository r ON r.id = rb.repository_id \
               WHERE rb.blob_id = $1 ORDER BY r.name LIMIT 20";
    NEEDED_BY = "SELECT r.name, m.digest FROM repository_blob rb \
                 JOIN manifest_blob e ON e.repository_id = rb.repository_id AND e.blob_id = rb.blob_id \
                 JOIN manifest m ON m.id = e.manifest_id JOIN repository r ON r.id = m.repository_id \
                 WHERE rb.blob_id = $1 ORDER BY r.name, m.digest LIMIT 20";
    COUNT_DAMAGED = "SELECT COUNT(*) FROM damaged_manifest";
    DAMAGED_LIST = "SELECT r.name, m.digest, d.found_at FROM damaged_manifest d \
                    JOIN manifest m ON m.id = d.manifest_id JOIN repository r ON r.id = m.repository_id \
                    ORDER BY d.manifest_id LIMIT 100";
}

impl Store {
    /// Reads what is stored again, at the set rate, until the future is dropped. It ends by itself only when the store
    /// has stopped.
    pub async fn scrub(&self) {
        let rate = self.0.options.scrub_rate;
        if rate == 0 {
            return std::future::pending().await;
        }
        let mut pace = Pace::new(rate);
        let mut told = String::new();
        loop {
            match self.scrub_round(&mut pace).await {
                Ok(0) => {
                    told.clear();
                    let _ = tokio::time::timeout(IDLE, self.0.scrub.wake.notified()).await;
                }
                Ok(_) => told.clear(),
                Err(Error::Stopped) => return,
                Err(error) => {
                    let text = error.to_string();
                    if told != text {
                        tracing::warn!(%error, "the scrub stands still, it goes on by itself");
                        told = text;
                    }
                    tokio::time::sleep(IDLE).await;
                }
            }
        }
    }

    /// Reads everything that is due, as fast as it goes; how many blobs and manifests were looked at.
    ///
    /// # Errors
    /// As for every call that writes.
    #[doc(hidden)]
    pub async fn scrub_once(&self) -> Result<u64, Error> {
        let mut pace = Pace::new(u64::MAX);
        let mut looked_at = 0;
        loop {
            match self.scrub_round(&mut pace).await? {
                0 => return Ok(looked_at),
                some => looked_at += some,
            }
        }
    }

    /// Makes everything due that was read before now, on every replica.
    ///
    /// # Errors
    /// As for every call that writes.
    pub async fn run_scrub(&self, actor: &Actor) -> Result<(), Error> {
        self.0.db.write(Since(actor.clone())).await?;
        self.0.scrub.wake.notify_one();
        Ok(())
    }

    /// Claims what is due and reads it; how many blobs and manifests were looked at.
    async fn scrub_round(&self, pace: &mut Pace) -> Result<u64, Error> {
        let inner = &self.0;
        let again = self.doubts().due(inner.clock.now());
        let mut looked_at = 0;
        for id in again {
            self.scrub_blob(id, pace).await?;
            looked_at += 1;
            if self.doubts().stands_still() {
                break;
            }
        }
        let due_before = due_before(inner).await?;
        let blobs = inner
            .db
            .write(ClaimBlobs {
                due_before,
                rate: inner.options.scrub_rate,
            })
            .await?;
        for &id in &blobs {
            self.scrub_blob(id, pace).await?;
            looked_at += 1;
            // The claims of the rest run out. The next round reads others: one that is whole ends the standstill.
            if self.doubts().stands_still() {
                break;
            }
        }
        let manifests = inner.db.write(NextManifests { due_before }).await?;
        for &id in &manifests {
            self.scrub_manifest(id, pace).await?;
        }
        if self.doubts().stands_still() {
            return Err(Error::Unavailable {
                what: match inner.objects.files() {
                    Some(_) => "the directory of objects",
                    None => "the object store",
                },
                problem: format!(
                    "{} blobs in a row are missing there, so none of them is marked as damaged; look whether it is the \
                     right place and complete, and run `verify-store`",
                    doubt::SEVERAL
                ),
            });
        }
        Ok(looked_at + manifests.len() as u64)
    }

    fn doubts(&self) -> MutexGuard<'_, Doubts> {
        let doubts = &self.0.scrub.doubts;
        doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn scrub_blob(&self, id: i64, pace: &mut Pace) -> Result<(), Error> {
        let inner = &self.0;
        let Some(first) = Subject::look(inner, id).await? else {
            self.doubts().forget(id);
            return Ok(());
        };
        pace.take(OVERHEAD).await;
        let mut verdict = first.read(inner, pace).await;
        let doubtful = match &verdict {
            Verdict::Missing(_) => true,
            Verdict::Damaged(_) => inner.objects.files().is_none(),
            Verdict::Sound | Verdict::Unknown(_) => false,
        };
        if first.suspect {
            // What is marked already is in no doubt.
        } else if let (Verdict::Damaged(problem) | Verdict::Missing(problem), true, Some(key)) =
            (&verdict, doubtful, &first.key)
        {
            let missing = matches!(verdict, Verdict::Missing(_));
            let now = inner.clock.now();
            let next = self.doubts().note(id, Some(key), missing, now);
            match next {
                Next::Judge => {}
                Next::Nothing => return Ok(()),
                Next::Again(at) => {
                    tracing::warn!(digest = %first.digest, problem, "a blob looks damaged, it is read again in minutes");
                    let until = at.plus(CLAIM_LASTS);
                    return inner.db.write(Hold { id, until }).await;
                }
            }
        } else if let Verdict::Damaged(_) | Verdict::Missing(_) = verdict {
            // Once more, from the row on: it may have been healed, or be gone, while it was read.
            match Subject::look(inner, id).await? {
                Some(second) if second.key == first.key => {
                    verdict = second.read(inner, pace).await;
                }
                // A push that healed it has given the claim back.
                _ => return Ok(()),
            }
        }
        let counters = &inner.scrub;
        let damage = match verdict {
            Verdict::Sound => {
                if first.key.is_some() {
                    self.doubts().sound(id);
                }
                None
            }
            Verdict::Damaged(problem) | Verdict::Missing(problem) => Some(problem),
            Verdict::Unknown(error) => {
                // The claim runs out, then it is tried again.
                counters.unreadable.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(digest = %first.digest, %error, "a blob cannot be read now, it is tried again later");
                return match error {
                    Error::Stopped => Err(Error::Stopped),
                    _ => Ok(()),
                };
            }
        };
        counters.blobs.fetch_add(1, Ordering::Relaxed);
        let change = inner
            .db
            .write(Judge {
                id,
                key: first.key.clone(),
                body: first.body.clone(),
                damaged: damage.is_some(),
            })
            .await?;
        match (change, damage) {
            (Change::Suspect, damage) => {
                counters.damaged.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    digest = %first.digest,
                    problem = damage.unwrap_or_default(),
                    "a blob is damaged; pushing it again heals it"
                );
            }
            (Change::Sound, _) => {
                tracing::info!(digest = %first.digest, "a blob that was damaged is whole again");
            }
            (Change::None, _) => {}
        }
        Ok(())
    }

    async fn scrub_manifest(&self, id: i64, pace: &mut Pace) -> Result<(), Error> {
        let inner = &self.0;
        let mut last = None;
        for _ in 0..2 {
            let rows = inner.db.read(&MANIFEST, &[id.into()]).await?;
            let Some(row) = rows.first() else {
                return Ok(());
            };
            let (digest, body) = (row.digest(0)?, row.bytes(2)?);
            pace.take(body.len() as u64).await;
            inner
                .scrub
                .bytes
                .fetch_add(body.len() as u64, Ordering::Relaxed);
            let known = row.opt_i64(4)?.is_some();
            let (length, expected) = (body.len() as u64, digest.clone());
            // Of some MiB, so not on a thread that serves requests.
            let matches = blocking(move || Ok(expected.matches(&body))).await?;
            if length == row.u64(1)? && matches {
                inner.scrub.manifests.fetch_add(1, Ordering::Relaxed);
                if known {
                    inner.db.write(ManifestFound { id, damaged: None }).await?;
                }
                return Ok(());
            }
            if known {
                return Ok(());
            }
            last = Some(format!("{}@{digest}", row.text(3)?));
        }
        let Some(name) = last else {
            return Ok(());
        };
        inner.scrub.damaged.fetch_add(1, Ordering::Relaxed);
        tracing::error!(manifest = %name, "a manifest is damaged in its row; pushing it again heals it");
        inner
            .db
            .write(ManifestFound {
                id,
                damaged: Some(name),
            })
            .await
    }
}

/// What was read before this moment is due.
async fn due_before(inner: &Inner) -> Result<Timestamp, Error> {
    let period = inner.clock.now().minus(inner.options.scrub_period);
    let rows = inner.db.read(&GET, &["scrub.since".into()]).await?;
    let since = match rows.first() {
        Some(row) => row.text(0)?.parse().unwrap_or(i64::MIN),
        None => i64::MIN,
    };
    Ok(period.max(Timestamp(since)))
}

/// A blob as its row tells of it.
struct Subject {
    digest: Digest,
    size: u64,
    body: Option<Vec<u8>>,
    key: Option<String>,
    /// It is marked as damaged.
    suspect: bool,
}

impl Subject {
    async fn look(inner: &Inner, id: i64) -> Result<Option<Self>, Error> {
        let mut rows = inner.db.read(&LOOK, &[id.into()]).await?;
        rows.first_mut()
            .map(|row: &mut Row| {
                Ok(Self {
                    digest: row.digest(0)?,
                    size: row.u64(1)?,
                    body: row.opt_bytes(2)?,
                    key: row.opt_text(3)?,
                    suspect: row.text(4)? != "ok",
                })
            })
            .transpose()
    }

    async fn read(&self, inner: &Arc<Inner>, pace: &mut Pace) -> Verdict {
        let content = match (&self.key, &self.body) {
            (Some(key), _) => match StorageKey::parse(key) {
                Ok(key) => inner.objects.read(&key, self.size),
                Err(error) => Err(error),
            },
            (None, body) => Ok(BlobContent::Inline(body.clone().unwrap_or_default().into())),
        };
        let content = match content {
            Ok(content) => content,
            Err(error) => return Verdict::of_failure(error),
        };
        let blob = Blob {
            size: self.size,
            content,
        };
        let verdict = hash(&blob, &self.digest, |bytes| pace.take(bytes)).await;
        if !matches!(verdict, Verdict::Unknown(_)) {
            inner.scrub.bytes.fetch_add(self.size, Ordering::Relaxed);
        }
        verdict
    }
}

/// Claims blobs that are due: the suspect ones, those that were never read, then those that were not read for the
/// longest time. The claim runs out by itself when the reader dies.
struct ClaimBlobs {
    due_before: Timestamp,
    rate: u64,
}

impl Body for ClaimBlobs {
    type Output = Vec<i64>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<i64>, Error> {
        let now = tx.now();
        let again = now.minus(SUSPECT_AGAIN);
        let mut rows = tx.query(&SUSPECT_DUE, &[now.into(), again.into()]).await?;
        if rows.is_empty() {
            rows = tx.query(&NEVER, &[now.into()]).await?;
        }
        if rows.is_empty() {
            rows = tx
                .query(&DUE, &[now.into(), self.due_before.into()])
                .await?;
        }
        let (mut ids, mut bytes) = (Vec::new(), 0_u64);
        for row in &rows {
            ids.push(row.i64(0)?);
            bytes = bytes.saturating_add(row.u64(1)?);
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        // Twice the time that two readings take, and some.
        let takes = Duration::from_secs(4 * (bytes / self.rate.max(1)).min(1 << 24));
        let until = now.plus(CLAIM_LASTS + takes);
        for id in &ids {
            tx.execute(&CLAIM, &[(*id).into(), until.into()]).await?;
        }
        Ok(ids)
    }
}

/// Keeps a blob claimed for the one that doubts it.
struct Hold {
    id: i64,
    until: Timestamp,
}

impl Body for Hold {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&CLAIM, &[self.id.into(), self.until.into()])
            .await
            .map(drop)
    }
}

/// The verdict on a blob. It holds only when the row still names what was read.
struct Judge {
    id: i64,
    key: Option<String>,
    /// What was read out of the row: a push that heals it there gives it no other key.
    body: Option<Vec<u8>>,
    damaged: bool,
}

/// What a verdict changed.
#[derive(Clone, Copy)]
enum Change {
    None,
    Suspect,
    Sound,
}

impl Body for Judge {
    type Output = Change;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Change, Error> {
        let Some(row) = tx.query_opt(&TAKE, &[self.id.into()]).await? else {
            return Ok(Change::None);
        };
        if row.opt_text(1)? != self.key || row.opt_bytes(3)? != self.body {
            return Ok(Change::None);
        }
        let was_sound = row.text(2)? == "ok";
        let state = if self.damaged { "suspect" } else { "ok" };
        let now = tx.now();
        tx.execute(&JUDGE, &[self.id.into(), now.into(), state.into()])
            .await?;
        let (change, action) = match (was_sound, self.damaged) {
            (true, true) => (Change::Suspect, "blob.suspect"),
            (false, false) => (Change::Sound, "blob.sound"),
            _ => return Ok(Change::None),
        };
        audit::allowed(tx, &scrubber(), action, row.digest(0)?.to_string()).await?;
        Ok(change)
    }
}

/// Where the walk over the manifests is; one row for all replicas.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Pass {
    after: Option<i64>,
    began: Option<i64>,
    ended: Option<i64>,
}

impl Pass {
    fn parse(text: &str) -> Self {
        // A walk that cannot be read begins anew.
        serde_json::from_str(text).unwrap_or_default()
    }
}

/// Takes the next manifests of the walk. What a replica that dies has taken is read in the next walk.
struct NextManifests {
    due_before: Timestamp,
}

impl Body for NextManifests {
    type Output = Vec<i64>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<i64>, Error> {
        tx.execute(&START, &["{}".into()]).await?;
        let mut pass = match tx.query_opt(&TAKE_PASS, &[]).await? {
            Some(row) => Pass::parse(&row.text(0)?),
            None => Pass::default(),
        };
        let Timestamp(now) = tx.now();
        match (pass.began, pass.ended) {
            (Some(began), Some(_)) if Timestamp(began) >= self.due_before => return Ok(Vec::new()),
            (None, _) | (_, Some(_)) => {
                pass = Pass {
                    after: None,
                    began: Some(now),
                    ended: None,
                };
            }
            // `scrub run` begins a walk that is under way anew.
            (Some(began), None) if Timestamp(began) < self.due_before => {
                pass = Pass {
                    after: None,
                    began: Some(now),
                    ended: None,
                };
            }
            (Some(_), None) => {}
        }
        let (mut ids, mut bytes) = (Vec::new(), 0_u64);
        for row in tx
            .query(&MANIFESTS, &[pass.after.unwrap_or(i64::MIN).into()])
            .await?
        {
            ids.push(row.i64(0)?);
            bytes = bytes.saturating_add(row.u64(1)?);
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        match ids.last() {
            Some(last) => pass.after = Some(*last),
            None => pass.ended = Some(now),
        }
        let text = serde_json::to_string(&pass)
            .map_err(|error| Error::Database(format!("the walk cannot be written: {error}")))?;
        tx.execute(&PUT, &["scrub.manifests".into(), text.into()])
            .await?;
        Ok(ids)
    }
}

/// Notes that a manifest is damaged (its name), or no longer.
struct ManifestFound {
    id: i64,
    damaged: Option<String>,
}

impl Body for ManifestFound {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        match &self.damaged {
            Some(name) => {
                let now = tx.now();
                if tx.execute(&DAMAGED, &[self.id.into(), now.into()]).await? > 0 {
                    audit::allowed(tx, &scrubber(), "manifest.damaged", name.clone()).await?;
                }
                Ok(())
            }
            None => tx.execute(&MENDED, &[self.id.into()]).await.map(drop),
        }
    }
}

/// Makes everything due.
struct Since(Actor);

impl Body for Since {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let Timestamp(now) = tx.now();
        tx.execute(&PUT, &["scrub.since".into(), now.to_string().into()])
            .await?;
        audit::allowed(tx, &self.0, "scrub.run", String::new()).await
    }
}

fn scrubber() -> Actor {
    Actor {
        principal: "system:scrub".to_owned(),
        request: String::new(),
        address: String::new(),
    }
}

/// The time between two looks when nothing was due.
const IDLE: Duration = Duration::from_secs(10);
/// How long a claim lasts beside the time that reading takes.
const CLAIM_LASTS: Duration = Duration::from_mins(10);
/// How long after a reading a damaged blob is read again.
const SUSPECT_AGAIN: Duration = Duration::from_hours(1);
/// Bytes of a batch, about.
const BATCH_BYTES: u64 = 64 << 20;
/// Bytes that a blob counts for beside its own: its two transactions.
const OVERHEAD: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::model::Options;
    use crate::sql::Statement;

    async fn push(store: &Store, bytes: &Bytes) {
        let (repository, digest) = ("a/b".parse().unwrap(), Digest::sha256(bytes));
        let mut writer = store
            .put_blob(&repository, &digest, &scrubber())
            .await
            .unwrap();
        writer.write(bytes.clone()).await.unwrap();
        writer.commit(&digest, &scrubber()).await.unwrap();
    }

    #[tokio::test]
    async fn a_verdict_on_a_row_that_was_healed_meanwhile_does_not_hold() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let store = Store::open(&data, Options::default()).await.unwrap();
        let bytes = Bytes::from_static(b"small enough for its row");
        push(&store, &bytes).await;
        let connection = rusqlite::Connection::open(data.join("meta.db")).unwrap();
        let damage = "UPDATE blob SET body = zeroblob(24), state = 'suspect', checked_at = 1";
        connection.execute_batch(damage).unwrap();
        drop(connection);
        let inner = &store.0;
        let any = Statement::made("SELECT id FROM blob".to_owned());
        let id = inner.db.read(any, &[]).await.unwrap()[0].i64(0).unwrap();
        let seen = Subject::look(inner, id).await.unwrap().unwrap();
        let mut pace = Pace::new(u64::MAX);
        assert!(matches!(
            seen.read(inner, &mut pace).await,
            Verdict::Damaged(_)
        ));
        push(&store, &bytes).await;
        let verdict = Judge {
            id,
            key: seen.key,
            body: seen.body,
            damaged: true,
        };
        let change = inner.db.write(verdict).await.unwrap();
        assert!(matches!(change, Change::None));
        assert_eq!(store.suspect_count().await.unwrap(), 0);
        store.close().await.unwrap();
    }
}
