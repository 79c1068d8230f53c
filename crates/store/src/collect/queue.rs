//! The queue of candidates: what may have lost its last reason to stay, and when to look.
//!
//! A candidate is a row (kind, repository, target, due). Whoever takes a reason away puts the target in, in the
//! same transaction. A worker that claims a candidate moves it into the future and raises `attempts`; every enqueue
//! sets `attempts` back to zero, so a worker that lets a candidate go removes only the row that it claimed: an
//! enqueue that came meanwhile survives, also one with the same due time.

use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Body, Db, Row, Tx, Value, WriteKind, statements};

statements! {
    // A claimed row's due time is the claim's end and says nothing of the candidate.
    ENQUEUE = "INSERT INTO collection_queue (kind, repository_id, target_id, due_at, attempts) \
               VALUES ($1, $2, $3, $4, 0) \
               ON CONFLICT (kind, repository_id, target_id) DO UPDATE SET attempts = 0, due_at = \
                   CASE WHEN collection_queue.attempts = 0 AND collection_queue.due_at > excluded.due_at \
                        THEN collection_queue.due_at ELSE excluded.due_at END";
    FORGET = "DELETE FROM collection_queue WHERE kind = $1 AND repository_id = $2 AND target_id = $3";
    CLAIM = "WITH due AS (SELECT kind, repository_id, target_id FROM collection_queue \
                 WHERE kind = $1 AND due_at <= $2 ORDER BY due_at LIMIT $3 {skip locked}) \
             UPDATE collection_queue SET due_at = $4, attempts = attempts + 1 \
             WHERE (kind, repository_id, target_id) IN (SELECT kind, repository_id, target_id FROM due) \
             RETURNING repository_id, target_id, due_at, attempts";
    ANY_DUE = "SELECT due_at FROM collection_queue WHERE kind = $1 AND due_at <= $2 LIMIT 1";
    LET_GO = "DELETE FROM collection_queue WHERE kind = $1 AND repository_id = $2 AND target_id = $3 \
                  AND due_at = $4 AND attempts = $5";
    LATER = "UPDATE collection_queue SET due_at = $6, attempts = 0 WHERE kind = $1 AND repository_id = $2 \
                 AND target_id = $3 AND due_at = $4 AND attempts = $5";
    DUE_AFTER = "SELECT repository_id, target_id, due_at, attempts FROM collection_queue \
                 WHERE kind = $1 AND due_at <= $2 AND (due_at, repository_id, target_id) > ($3, $4, $5) \
                 ORDER BY due_at, repository_id, target_id LIMIT $6";
    DUE_OF = "SELECT due_at, attempts FROM collection_queue WHERE kind = $1 AND repository_id = $2 AND target_id = $3";
    LENGTHS = "SELECT kind, COUNT(*) AS waiting, \
                   CAST(COALESCE(SUM(CASE WHEN due_at <= $1 THEN 1 ELSE 0 END), 0) AS BIGINT) AS due, \
                   MIN(due_at) AS oldest FROM collection_queue GROUP BY kind ORDER BY kind";
    // A gauge must not count a million rows.
    DUE = "SELECT COUNT(*) AS due FROM (SELECT due_at FROM collection_queue WHERE kind = $1 AND due_at <= $2 LIMIT 10000) d";
    OLDEST = "SELECT MIN(due_at) AS oldest FROM collection_queue WHERE kind = $1";
    FAILED = "SELECT kind, COUNT(*) FROM collection_queue WHERE attempts > 1 GROUP BY kind ORDER BY kind";
}

/// What a candidate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A repository that was deleted: its content goes in steps.
    Repository,
    /// A manifest of a repository.
    Manifest,
    /// A repository's hold on a blob.
    RepositoryBlob,
    /// A blob that perhaps no repository holds.
    Blob,
    /// An upload whose time may be over.
    Upload,
}

impl Kind {
    /// All kinds, in the order in which a round looks at them: what one kind leaves, the next one finds.
    pub(crate) const ALL: [Self; 5] = [
        Self::Repository,
        Self::Manifest,
        Self::RepositoryBlob,
        Self::Blob,
        Self::Upload,
    ];

    /// Its name in the queue, the API and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Repository => "repository",
            Self::Manifest => "manifest",
            Self::RepositoryBlob => "repository_blob",
            Self::Blob => "blob",
            Self::Upload => "upload",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A row of the queue as a worker claimed it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) kind: Kind,
    pub(crate) repository: i64,
    pub(crate) target: i64,
    pub(crate) due: Timestamp,
    pub(crate) attempts: i64,
}

impl Candidate {
    fn read(kind: Kind, row: &Row) -> Result<Self, Error> {
        Ok(Self {
            kind,
            repository: row.i64(0)?,
            target: row.i64(1)?,
            due: row.time(2)?,
            attempts: row.i64(3)?,
        })
    }

    fn key(&self) -> Key {
        (self.kind.name(), self.repository, self.target)
    }
}

/// What a transaction changes in the queue. The rows are the last ones that it locks, in the order of their keys
/// (see [`crate::sql`]), so the changes are collected and made at its end.
#[derive(Debug, Default)]
pub(crate) struct Changes(Vec<(Key, Change)>);

/// Kind, repository and target.
type Key = (&'static str, i64, i64);

#[derive(Debug)]
enum Change {
    Enqueue {
        due: Timestamp,
    },
    Forget,
    LetGo {
        claimed: Timestamp,
        attempts: i64,
    },
    Later {
        claimed: Timestamp,
        attempts: i64,
        due: Timestamp,
    },
}

/// Puts a candidate into the queue, or makes it due later.
pub(crate) fn enqueue(tx: &mut Tx, kind: Kind, repository: i64, target: i64, due: Timestamp) {
    let key = (kind.name(), repository, target);
    tx.queue.0.push((key, Change::Enqueue { due }));
}

/// Takes a candidate out of the queue because its target is gone.
pub(crate) fn forget(tx: &mut Tx, kind: Kind, repository: i64, target: i64) {
    let key = (kind.name(), repository, target);
    tx.queue.0.push((key, Change::Forget));
}

/// Takes a claimed candidate out of the queue, unless somebody put it in again since.
pub(super) fn let_go(tx: &mut Tx, candidate: &Candidate) {
    let change = Change::LetGo {
        claimed: candidate.due,
        attempts: candidate.attempts,
    };
    tx.queue.0.push((candidate.key(), change));
}

/// Gives a claimed candidate another due time, unless somebody put it in again since.
pub(super) fn later(tx: &mut Tx, candidate: &Candidate, due: Timestamp) {
    let change = Change::Later {
        claimed: candidate.due,
        attempts: candidate.attempts,
        due,
    };
    tx.queue.0.push((candidate.key(), change));
}

/// Makes the changes that were collected, those of one candidate in their own order.
pub(crate) async fn change(tx: &mut Tx) -> Result<(), Error> {
    let Changes(mut changes) = std::mem::take(&mut tx.queue);
    changes.sort_by_key(|(key, _)| *key);
    for ((kind, repository, target), change) in changes {
        let key = [kind.into(), repository.into(), target.into()];
        let with = |more: &[Value]| [&key[..], more].concat();
        match change {
            Change::Enqueue { due } => tx.execute(&ENQUEUE, &with(&[due.into()])).await?,
            Change::Forget => tx.execute(&FORGET, &key).await?,
            Change::LetGo { claimed, attempts } => {
                let values = with(&[claimed.into(), attempts.into()]);
                tx.execute(&LET_GO, &values).await?
            }
            Change::Later {
                claimed,
                attempts,
                due,
            } => {
                let values = with(&[claimed.into(), attempts.into(), due.into()]);
                tx.execute(&LATER, &values).await?
            }
        };
    }
    Ok(())
}

/// Claims candidates that are due: for a while no other worker takes them. When this one dies, they are due again
/// at the claim's end.
pub(super) struct Claim {
    pub(super) kind: Kind,
    pub(super) limit: usize,
}

impl Body for Claim {
    type Output = Vec<Candidate>;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<Candidate>, Error> {
        failpoint("collect.before_claim");
        let now = tx.now();
        let until = now.plus(CLAIM_TIME);
        let rows = tx
            .query(
                &CLAIM,
                &[
                    self.kind.name().into(),
                    now.into(),
                    self.limit.into(),
                    until.into(),
                ],
            )
            .await?;
        failpoint("collect.after_claim");
        rows.iter()
            .map(|row| Candidate::read(self.kind, row))
            .collect()
    }
}

/// Tells whether there is something to claim.
pub(super) async fn any_due(db: &Db, kind: Kind, now: Timestamp) -> Result<bool, Error> {
    Ok(!db
        .read(&ANY_DUE, &[kind.name().into(), now.into()])
        .await?
        .is_empty())
}

/// Candidates of a kind that are due, in order, after a position.
pub(super) async fn due_after(
    tx: &mut Tx,
    kind: Kind,
    after: (i64, i64, i64),
    limit: usize,
) -> Result<Vec<Candidate>, Error> {
    let now = tx.now();
    let (due, repository, target) = after;
    tx.query(
        &DUE_AFTER,
        &[
            kind.name().into(),
            now.into(),
            due.into(),
            repository.into(),
            target.into(),
            limit.into(),
        ],
    )
    .await?
    .iter()
    .map(|row| Candidate::read(kind, row))
    .collect()
}

/// When a candidate is looked at next; the claimed ones, at the claim's end.
pub(super) async fn due_of(
    tx: &mut Tx,
    kind: Kind,
    repository: i64,
    target: i64,
) -> Result<Option<Timestamp>, Error> {
    tx.query_opt(
        &DUE_OF,
        &[kind.name().into(), repository.into(), target.into()],
    )
    .await?
    .map(|row| row.time(0))
    .transpose()
}

/// How much of a kind waits.
#[derive(Clone, Copy, Debug)]
pub struct QueueLength {
    /// Of which kind.
    pub kind: Kind,
    /// Candidates in the queue, due or not.
    pub waiting: u64,
    /// Those that are due.
    pub due: u64,
    /// When the one that waits longest is or was due.
    pub oldest: Option<Timestamp>,
    /// Those that were looked at more than once without an end: each failed, or its worker died.
    pub failed: u64,
}

pub(super) async fn lengths(db: &Db, now: Timestamp) -> Result<Vec<QueueLength>, Error> {
    let mut lengths = Kind::ALL.map(|kind| QueueLength {
        kind,
        waiting: 0,
        due: 0,
        oldest: None,
        failed: 0,
    });
    for row in db.scan(&LENGTHS, vec![now.into()]).await? {
        let name = row.text(0)?;
        if let Some(length) = lengths.iter_mut().find(|l| l.kind.name() == name) {
            length.waiting = row.u64(1)?;
            length.due = row.u64(2)?;
            length.oldest = row.opt_i64(3)?.map(Timestamp);
        }
    }
    for row in db.scan(&FAILED, Vec::new()).await? {
        let name = row.text(0)?;
        if let Some(length) = lengths.iter_mut().find(|l| l.kind.name() == name) {
            length.failed = row.u64(1)?;
        }
    }
    Ok(lengths.into())
}

/// How far the collector is behind with a kind, at a cost that does not grow with the queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueLag {
    /// Of which kind.
    pub kind: Kind,
    /// Candidates that are due; 10 000 means that many or more.
    pub due: u64,
    /// When the one that waits longest is or was due.
    pub oldest: Option<Timestamp>,
}

pub(super) async fn lags(db: &Db, now: Timestamp) -> Result<Vec<QueueLag>, Error> {
    let mut lags = Vec::with_capacity(Kind::ALL.len());
    for kind in Kind::ALL {
        let due = db.read(&DUE, &[kind.name().into(), now.into()]).await?;
        let oldest = db.read(&OLDEST, &[kind.name().into()]).await?;
        lags.push(QueueLag {
            kind,
            due: crate::store::single(&due)?,
            oldest: match oldest.first() {
                Some(row) => row.opt_i64(0)?.map(Timestamp),
                None => None,
            },
        });
    }
    Ok(lags)
}

/// How long a claim lasts: longer than any transaction takes.
const CLAIM_TIME: std::time::Duration = std::time::Duration::from_mins(5);
