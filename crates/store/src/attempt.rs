//! What agents report of their attempts: the records of their ledgers, kept as they came.
//!
//! A record is known by its hash, which covers all before it, so the same record again changes nothing. The order here is
//! that of the ledger: an agent is told the last record that is known and goes on after it. Where it cannot (its ledger
//! begins anew, or was damaged), what it sends is kept all the same and its link says how it follows: better a ledger with
//! a seam than none.

use std::time::Duration;

use oci::{Digest, RepositoryName};

use crate::clock::Timestamp;
use crate::error::Error;
use crate::pin::user_of;
use crate::sql::{Body, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};

statements! {
    HEAD = "SELECT sequence, hash, reach FROM attempt WHERE holder = $1 AND target = $2 ORDER BY sequence DESC LIMIT 1";
    SEEN = "SELECT sequence FROM attempt WHERE holder = $1 AND target = $2 AND hash = $3";
    ABOUT = "SELECT repository, digest FROM attempt \
             WHERE holder = $1 AND target = $2 AND sequence > $4 AND attempt = $3 AND kind = 'attempt' \
             ORDER BY sequence DESC LIMIT 1";
    ADD = "INSERT INTO attempt (id, holder, target, sequence, hash, link, kind, attempt, repository, digest, outcome, \
               body, reach, received_by, received_at) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)";
    CUT = "DELETE FROM attempt WHERE holder = $1 AND target = $2 AND sequence <= $3";
    CUT_BYTES = "DELETE FROM attempt WHERE holder = $1 AND target = $2 AND sequence < (SELECT o.sequence FROM attempt o \
                     WHERE o.holder = $1 AND o.target = $2 AND o.reach > $3 ORDER BY o.sequence LIMIT 1)";
    USED = "WITH RECURSIVE known (holder, target, before) AS ( \
                SELECT a.holder, a.target, a.reach - octet_length(a.body) FROM attempt a WHERE a.id = ( \
                    SELECT b.id FROM attempt b WHERE b.holder >= $1 AND b.holder < $2 \
                    ORDER BY b.holder, b.target, b.sequence LIMIT 1) \
                UNION ALL \
                SELECT a.holder, a.target, a.reach - octet_length(a.body) FROM known k JOIN attempt a ON a.id = ( \
                    SELECT b.id FROM attempt b WHERE (b.holder, b.target) > (k.holder, k.target) AND b.holder < $2 \
                    ORDER BY b.holder, b.target, b.sequence LIMIT 1)) \
            SELECT COUNT(*), CAST(COALESCE(SUM((SELECT l.reach FROM attempt l \
                WHERE l.holder = k.holder AND l.target = k.target ORDER BY l.sequence DESC LIMIT 1) - k.before), 0) AS BIGINT) \
            FROM known k";
    LIST = "SELECT id, holder, target, sequence, hash, link, repository, body, received_by, received_at FROM attempt \
            WHERE id < $1 AND ($2 = '' OR kind = $2) ORDER BY id DESC LIMIT $3";
    LIST_OF_HOLDER = "SELECT id, holder, target, sequence, hash, link, repository, body, received_by, received_at \
                      FROM attempt WHERE id < $1 AND ($2 = '' OR kind = $2) AND holder = $4 \
                      AND ($5 = '' OR target = $5) ORDER BY id DESC LIMIT $3";
    LIST_OF_DIGEST = "SELECT id, holder, target, sequence, hash, link, repository, body, received_by, received_at \
                      FROM attempt WHERE id < $1 AND ($2 = '' OR kind = $2) AND digest = $4 \
                      AND ($5 = '' OR holder = $5) AND ($6 = '' OR target = $6) ORDER BY id DESC LIMIT $3";
    OLD = "SELECT a.id FROM attempt a WHERE a.received_at < $1 AND a.sequence < (SELECT MAX(l.sequence) FROM attempt l \
               WHERE l.holder = a.holder AND l.target = a.target) LIMIT 500";
    PRUNE = "DELETE FROM attempt WHERE id IN (SELECT a.id FROM attempt a WHERE a.received_at < $1 \
                 AND a.sequence < (SELECT MAX(l.sequence) FROM attempt l \
                     WHERE l.holder = a.holder AND l.target = a.target) LIMIT 500)";
}

/// One record of a ledger, taken apart by whoever checked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptRecord {
    /// The hash of the record before it; zeros before the first.
    pub previous: [u8; 32],
    /// Its own.
    pub hash: [u8; 32],
    /// What it is: `attempt`, `verdict`, `outcome` …
    pub kind: String,
    /// The attempt that it belongs to.
    pub attempt: Option<u64>,
    /// The repository that it is about, where the record says so.
    pub repository: Option<RepositoryName>,
    /// The release that it is about, where the record says so.
    pub digest: Option<Digest>,
    /// How an attempt ended.
    pub outcome: Option<String>,
    /// Its canonical bytes, hash included.
    pub body: String,
}

/// The last record that is known of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedgerHead {
    /// How many records came, from 1.
    pub sequence: u64,
    /// Its hash.
    pub hash: [u8; 32],
}

/// What came of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttemptsOutcome {
    /// Records that were new.
    pub added: u64,
    /// Records that were known.
    pub repeated: u64,
    /// New records that do not follow the last one that was known.
    pub seams: u64,
    /// The last record that is known now.
    pub head: Option<LedgerHead>,
}

/// A record that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptAttempt {
    /// Position for paging.
    pub cursor: i64,
    /// Who reported it.
    pub holder: String,
    /// The target of that agent.
    pub target: String,
    /// Its place among the records of the target, from 1.
    pub sequence: u64,
    /// Its hash.
    pub hash: [u8; 32],
    /// How it follows the one before it here: `start`, `next`, `gap` (records between are not known), `fork` (it follows an
    /// older one).
    pub link: String,
    /// The repository that it is about.
    pub repository: Option<RepositoryName>,
    /// Its canonical bytes, hash included.
    pub body: String,
    /// Who sent it.
    pub received_by: String,
    /// When it came.
    pub received_at: Timestamp,
}

/// Which records are listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptFilter {
    /// Only those of this holder.
    pub holder: Option<String>,
    /// Only those of this target.
    pub target: Option<String>,
    /// Only those about this release.
    pub digest: Option<Digest>,
    /// Only those of this kind.
    pub kind: Option<String>,
}

impl Store {
    /// Keeps records of a holder's ledger, in order, and tells the last one that is known. Without records it only tells.
    ///
    /// They are written a few at a time, so that others write in between; after an error some of them may be kept, and
    /// sending all of them again does no harm.
    ///
    /// # Errors
    /// As for every call that writes; [`Error::ReportLimit`] when it is more than one user may have
    /// ([`crate::ReportLimits`]).
    pub async fn add_attempts(
        &self,
        holder: &str,
        target: &str,
        records: Vec<AttemptRecord>,
        principal: &str,
    ) -> Result<AttemptsOutcome, Error> {
        if records.is_empty() {
            let rows = self
                .0
                .db
                .read(&HEAD, &[holder.into(), target.into()])
                .await?;
            return Ok(AttemptsOutcome {
                added: 0,
                repeated: 0,
                seams: 0,
                head: rows.first().map(head_of).transpose()?,
            });
        }
        self.check_room(holder, target, &records).await?;
        let mut outcome = AttemptsOutcome {
            added: 0,
            repeated: 0,
            seams: 0,
            head: None,
        };
        for records in slices(records) {
            let part = self
                .0
                .db
                .write(Add {
                    holder: holder.to_owned(),
                    target: target.to_owned(),
                    records,
                    principal: principal.to_owned(),
                    most_bytes: self.0.options.reports.target_bytes,
                })
                .await?;
            outcome.added += part.added;
            outcome.repeated += part.repeated;
            outcome.seams += part.seams;
            outcome.head = part.head;
        }
        Ok(outcome)
    }

    /// Refuses records beyond what their user may have. It is asked before they are written and not with it: batches that
    /// come at once may together go over by as much as they are.
    async fn check_room(
        &self,
        holder: &str,
        target: &str,
        records: &[AttemptRecord],
    ) -> Result<(), Error> {
        let db = &self.0.db;
        let limits = self.0.options.reports;
        let user = user_of(holder);
        // No name has a control character, so the first range is the user alone.
        let ranges = [
            (user.to_owned(), format!("{user}\u{1}")),
            (format!("{user}/"), format!("{user}0")),
        ];
        let (mut targets, mut bytes) = (0, 0);
        for (from, to) in ranges {
            let rows = db.scan(&USED, vec![from.into(), to.into()]).await?;
            for row in &rows {
                targets += row.u64(0)?;
                bytes += row.u64(1)?;
            }
        }
        let refuse = |what: String, advice| {
            Err(Error::ReportLimit {
                user: user.to_owned(),
                what,
                advice,
            })
        };
        if targets >= limits.targets
            && db
                .read(&HEAD, &[holder.into(), target.into()])
                .await?
                .is_empty()
        {
            return refuse(
                format!("records of {targets} targets"),
                "report as several users, one for each host",
            );
        }
        let more: u64 = records.iter().map(|record| record.body.len() as u64).sum();
        if bytes + more > limits.bytes {
            return refuse(
                format!("{bytes} bytes of records of at most {}", limits.bytes),
                "report as several users, one for each host, or wait until old records go",
            );
        }
        Ok(())
    }

    /// Records before `cursor`, the newest first.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn attempts(
        &self,
        filter: &AttemptFilter,
        cursor: Option<i64>,
        limit: usize,
    ) -> Result<Vec<KeptAttempt>, Error> {
        let text = |part: &Option<String>| part.clone().unwrap_or_default();
        let mut values = vec![
            cursor.unwrap_or(i64::MAX).into(),
            text(&filter.kind).into(),
            limit.into(),
        ];
        let statement = match (&filter.digest, &filter.holder) {
            (Some(digest), _) => {
                values.push(digest.into());
                values.push(text(&filter.holder).into());
                values.push(text(&filter.target).into());
                &LIST_OF_DIGEST
            }
            (None, Some(holder)) => {
                values.push(holder.into());
                values.push(text(&filter.target).into());
                &LIST_OF_HOLDER
            }
            (None, None) => &LIST,
        };
        let rows = self.0.db.scan(statement, values).await?;
        rows.iter().map(kept).collect()
    }
}

fn kept(row: &Row) -> Result<KeptAttempt, Error> {
    Ok(KeptAttempt {
        cursor: row.i64(0)?,
        holder: row.text(1)?,
        target: row.text(2)?,
        sequence: row.u64(3)?,
        hash: hash_of(row, 4)?,
        link: row.text(5)?,
        repository: row.opt_text(6)?.and_then(|name| name.parse().ok()),
        body: row.text(7)?,
        received_by: row.text(8)?,
        received_at: row.time(9)?,
    })
}

fn head_of(row: &Row) -> Result<LedgerHead, Error> {
    Ok(LedgerHead {
        sequence: row.u64(0)?,
        hash: hash_of(row, 1)?,
    })
}

fn hash_of(row: &Row, column: usize) -> Result<[u8; 32], Error> {
    row.bytes(column)?
        .try_into()
        .map_err(|_| Error::Database(format!("column {column} holds no hash")))
}

/// Cuts a batch into pieces that are written one after the other.
fn slices(records: Vec<AttemptRecord>) -> Vec<Vec<AttemptRecord>> {
    let mut slices: Vec<Vec<AttemptRecord>> = Vec::new();
    let mut bytes = 0;
    for record in records {
        bytes += record.body.len();
        match slices.last_mut() {
            Some(slice) if slice.len() < SLICE && bytes <= SLICE_BYTES => slice.push(record),
            _ => {
                bytes = record.body.len();
                slices.push(vec![record]);
            }
        }
    }
    slices
}

struct Add {
    holder: String,
    target: String,
    records: Vec<AttemptRecord>,
    principal: String,
    most_bytes: u64,
}

impl Body for Add {
    type Output = AttemptsOutcome;

    async fn run(&self, tx: &mut Tx) -> Result<AttemptsOutcome, Error> {
        let key = [(&self.holder).into(), (&self.target).into()];
        let row = tx.query_opt(&HEAD, &key).await?;
        let mut head = row.as_ref().map(head_of).transpose()?;
        let mut reach = row.map_or(Ok(0), |row| row.u64(2))?;
        let mut outcome = AttemptsOutcome {
            added: 0,
            repeated: 0,
            seams: 0,
            head: None,
        };
        let now = tx.now();
        for record in &self.records {
            if self.seen(tx, &record.hash).await? {
                outcome.repeated += 1;
                continue;
            }
            let link = self.link(tx, head, record).await?;
            outcome.seams += u64::from(matches!(link, "gap" | "fork"));
            let sequence = head.map_or(0, |head| head.sequence) + 1;
            let (repository, digest) = self.about(tx, record, sequence).await?;
            let id = tx.id();
            reach += record.body.len() as u64;
            tx.execute(
                &ADD,
                &[
                    id.into(),
                    (&self.holder).into(),
                    (&self.target).into(),
                    sequence.into(),
                    record.hash.to_vec().into(),
                    link.into(),
                    (&record.kind).into(),
                    record.attempt.into(),
                    repository.into(),
                    digest.as_ref().into(),
                    record.outcome.as_ref().into(),
                    (&record.body).into(),
                    reach.into(),
                    (&self.principal).into(),
                    now.into(),
                ],
            )
            .await?;
            head = Some(LedgerHead {
                sequence,
                hash: record.hash,
            });
            outcome.added += 1;
        }
        if let Some(head) = head
            && outcome.added > 0
        {
            let surplus = head.sequence.saturating_sub(MOST);
            let [holder, target] = key;
            tx.execute(&CUT, &[holder.clone(), target.clone(), surplus.into()])
                .await?;
            if reach > self.most_bytes {
                let surplus = reach - self.most_bytes;
                tx.execute(&CUT_BYTES, &[holder, target, surplus.into()])
                    .await?;
            }
        }
        outcome.head = head;
        Ok(outcome)
    }
}

impl Add {
    async fn seen(&self, tx: &mut Tx, hash: &[u8; 32]) -> Result<bool, Error> {
        let values = [
            (&self.holder).into(),
            (&self.target).into(),
            hash.to_vec().into(),
        ];
        Ok(tx.query_opt(&SEEN, &values).await?.is_some())
    }

    async fn link(
        &self,
        tx: &mut Tx,
        head: Option<LedgerHead>,
        record: &AttemptRecord,
    ) -> Result<&'static str, Error> {
        Ok(match head {
            Some(head) if head.hash == record.previous => "next",
            _ if record.previous == [0; 32] => "start",
            Some(_) if self.seen(tx, &record.previous).await? => "fork",
            _ => "gap",
        })
    }

    /// What a record is about: what it says, else what the beginning of its attempt says.
    async fn about(
        &self,
        tx: &mut Tx,
        record: &AttemptRecord,
        sequence: u64,
    ) -> Result<(Option<String>, Option<Digest>), Error> {
        let mut repository = record.repository.as_ref().map(ToString::to_string);
        let mut digest = record.digest.clone();
        if record.kind != "attempt"
            && let Some(attempt) = record.attempt
        {
            // Its beginning is not far back; where it is nowhere, not the whole ledger is searched for it.
            let from = sequence.saturating_sub(LONGEST_ATTEMPT);
            let values = [
                (&self.holder).into(),
                (&self.target).into(),
                attempt.into(),
                from.into(),
            ];
            if let Some(row) = tx.query_opt(&ABOUT, &values).await? {
                repository = repository.or(row.opt_text(0)?);
                digest = digest.or(row.opt_digest(1)?);
            }
        }
        Ok((repository, digest))
    }
}

/// Removes what was kept for long enough. The last record of each target stays: the agent goes on after it.
pub(crate) async fn prune(inner: &Inner) -> Result<(), Error> {
    let Some(retention) = inner.options.attempt_retention else {
        return Ok(());
    };
    let now = inner.clock.now();
    if !inner.pruning.is_due(now) {
        return Ok(());
    }
    loop {
        let before = now.minus(retention);
        if inner.db.scan(&OLD, vec![before.into()]).await?.is_empty() {
            inner.pruning.done(now, PRUNE_EVERY);
            return Ok(());
        }
        inner.db.write(Prune { before }).await?;
    }
}

struct Prune {
    before: Timestamp,
}

impl Body for Prune {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        tx.execute(&PRUNE, &[self.before.into()]).await.map(drop)
    }
}

/// Records of one target that are kept at most; the oldest go first.
const MOST: u64 = 100_000;
/// Records after its beginning in which an attempt is recognised.
const LONGEST_ATTEMPT: u64 = 2000;
/// Records that are written at once, and their bytes.
const SLICE: usize = 20;
const SLICE_BYTES: usize = 256 << 10;
const PRUNE_EVERY: Duration = Duration::from_mins(10);
