//! The outbox of events.
//!
//! Events are written in the transaction of the change they tell of. Their public number comes from a
//! counter row whose lock is held until COMMIT, so numbers become visible in order and without a gap that
//! could still be filled; never from a row id or a sequence.
//!
//! SQLite's one writer takes the number at once. On PostgreSQL that row would make every push wait for every other, so
//! events are inserted without a number, as the last thing of their transaction, and a sealer numbers those that are
//! committed in the order of their insertion: what depends on one another held a lock in between, so it is in order.
//! Every replica seals after its own commits, one at a time, and the sealing COMMIT wakes the readers of all.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use oci::{Digest, RepositoryName, Tag};

use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::meta;
use crate::model::{Actor, Event, EventBounds, EventKind};
use crate::sql::{Body, Context, Db, Lock, Row, Tx, Value, WriteKind, statements};

statements! {
    NEXT = "UPDATE counter SET value = value + $1 WHERE name = 'event' RETURNING value";
    ADD = "INSERT INTO event (number, kind, repository, tag, digest, previous, media_type, artifact_type, \
               subject, actor, request, at) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
    AFTER = "SELECT number, kind, repository, tag, digest, previous, media_type, artifact_type, subject, \
                 actor, at \
             FROM event WHERE number > $1 ORDER BY number LIMIT $2";
    BOUNDS = "SELECT p.value AS pruned, n.value AS newest FROM counter p, counter n \
              WHERE p.name = 'event_pruned' AND n.name = 'event'";
    UNSEALED = "{postgres}SELECT ordinal FROM event WHERE number IS NULL ORDER BY ordinal LIMIT 1000";
    SEAL = "{postgres}UPDATE event SET number = CAST($1 AS BIGINT) + n.position \
            FROM unnest(CAST(string_to_array($2, ',') AS BIGINT[])) WITH ORDINALITY AS n (ordinal, position) \
            WHERE event.ordinal = n.ordinal AND event.number IS NULL";
    ANNOUNCE = "{postgres}SELECT CAST(pg_notify($1, $2) AS TEXT) AS done";
    LAST_BEFORE = "SELECT COALESCE(MAX(o.number), 0) AS number \
                   FROM (SELECT number FROM event WHERE at < $1 ORDER BY at LIMIT 10000) o";
    PRUNE = "DELETE FROM event WHERE number <= $1";
    SET_PRUNED = "UPDATE counter SET value = $1 WHERE name = 'event_pruned' AND value < $1";
}

/// An event that a transaction will write before it ends.
pub(crate) struct NewEvent {
    pub(crate) kind: EventKind,
    pub(crate) repository: RepositoryName,
    pub(crate) tag: Option<Tag>,
    pub(crate) digest: Digest,
    pub(crate) previous: Option<Digest>,
    pub(crate) media_type: String,
    pub(crate) artifact_type: Option<String>,
    pub(crate) subject: Option<Digest>,
}

/// Writes the events of a transaction; the last number, 0 without any or where the sealer gives it later.
pub(crate) async fn write(tx: &mut Tx, events: &[NewEvent], actor: &Actor) -> Result<i64, Error> {
    let mut newest = 0;
    for event in events {
        let number = if tx.seals_events() {
            tx.note_unsealed();
            Value::Null
        } else {
            newest = take_numbers(tx, 1).await?;
            tx.note_event(newest);
            newest.into()
        };
        let now = tx.now();
        tx.execute(
            &ADD,
            &[
                number,
                name(event.kind).into(),
                event.repository.as_str().into(),
                event.tag.as_ref().map(Tag::as_str).into(),
                (&event.digest).into(),
                event.previous.as_ref().into(),
                (&event.media_type).into(),
                event.artifact_type.as_ref().into(),
                event.subject.as_ref().into(),
                (&actor.principal).into(),
                (&actor.request).into(),
                now.into(),
            ],
        )
        .await?;
    }
    Ok(newest)
}

/// Takes so many numbers; the last of them. The counter is the last lock of a transaction.
async fn take_numbers(tx: &mut Tx, count: usize) -> Result<i64, Error> {
    tx.query_opt(&NEXT, &[count.into()])
        .await?
        .ok_or_else(|| Error::Database("the event counter is missing".to_owned()))?
        .i64(0)
}

/// Numbers a batch of events and announces them; `true` when there may be more.
struct Seal {
    channel: String,
}

impl Body for Seal {
    type Output = bool;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        // Whoever waits here sees afterwards what the other one left, so nobody has to come again.
        tx.lock(Lock::Events).await?;
        let rows = tx.query(&UNSEALED, &[]).await?;
        if rows.is_empty() {
            return Ok(false);
        }
        failpoint("seal.before");
        let mut ordinals = String::new();
        for row in &rows {
            let comma = if ordinals.is_empty() { "" } else { "," };
            let _ = write!(ordinals, "{comma}{}", row.i64(0)?);
        }
        let newest = take_numbers(tx, rows.len()).await?;
        failpoint("seal.after_numbers");
        let before = newest - rows.len() as i64;
        let numbered = tx.execute(&SEAL, &[before.into(), ordinals.into()]).await?;
        if numbered != rows.len() as u64 {
            return Err(Error::Database(format!(
                "{numbered} events were numbered where {} were found",
                rows.len()
            )));
        }
        failpoint("seal.after_events");
        tx.query(
            &ANNOUNCE,
            &[(&self.channel).into(), newest.to_string().into()],
        )
        .await?;
        tx.note_event(newest);
        Ok(rows.len() == BATCH)
    }
}

/// Numbers every event that is committed, where that is a work of its own.
pub(crate) async fn seal(db: &Db, epoch: &str) -> Result<(), Error> {
    if !db.seals_events() || db.scan(&UNSEALED, Vec::new()).await?.is_empty() {
        return Ok(());
    }
    seal_all(db, epoch).await
}

async fn seal_all(db: &Db, epoch: &str) -> Result<(), Error> {
    while db
        .write(Seal {
            channel: channel(epoch),
        })
        .await?
    {}
    Ok(())
}

/// Seals after each COMMIT of this process that left something to seal.
pub(crate) async fn keep_sealed(db: Arc<Db>, context: Context, epoch: String) {
    loop {
        context.unsealed.notified().await;
        match seal_all(&db, &epoch).await {
            Ok(()) => {}
            Err(Error::Stopped) => return,
            Err(error) => {
                tracing::debug!(%error, "events could not be numbered, it is tried again");
                tokio::time::sleep(AGAIN).await;
                context.unsealed.notify_one();
            }
        }
    }
}

/// Wakes the readers of this process at what any replica sealed: told by the database, and by a look at it whenever
/// the connection that hears of it is new, silent or lost.
pub(crate) async fn follow(db: Arc<Db>, context: Context, epoch: String) {
    loop {
        match hear(&db, &context, &epoch).await {
            Ok(()) | Err(Error::Stopped) => return,
            Err(error) => tracing::debug!(%error, "nothing is heard of events for now"),
        }
        tokio::time::sleep(AGAIN).await;
        if let Err(Error::Stopped) = catch_up(&db, &context, &epoch).await {
            return;
        }
    }
}

async fn hear(db: &Db, context: &Context, epoch: &str) -> Result<(), Error> {
    let Some(mut listener) = db.listen(&channel(epoch)).await? else {
        return Ok(());
    };
    loop {
        catch_up(db, context, epoch).await?;
        while let Some(payload) = listener.next().await? {
            if let Ok(newest) = payload.parse() {
                context.committed(newest);
            }
        }
    }
}

/// Looks how far the events reach. A store that was restored meanwhile is another one, and one that was carried away is
/// none: this process must begin anew.
async fn catch_up(db: &Db, context: &Context, epoch: &str) -> Result<(), Error> {
    if meta::find_epoch(db).await?.as_deref() != Some(epoch) {
        db.stop("the database was restored or exchanged under the running server");
        return Err(Error::Stopped);
    }
    if crate::transfer::is_moved(db).await? {
        db.stop("the store was carried to another place");
        return Err(Error::Stopped);
    }
    context.committed(bounds(db).await?.newest);
    Ok(())
}

/// The channel of a store's events; others may be in the same database.
fn channel(epoch: &str) -> String {
    format!("longshore_{epoch}")
}

pub(crate) async fn bounds(db: &Db) -> Result<EventBounds, Error> {
    let rows = db.read(&BOUNDS, &[]).await?;
    let row = rows
        .first()
        .ok_or_else(|| Error::Database("the event counter is missing".to_owned()))?;
    Ok(EventBounds {
        pruned: row.i64(0)?,
        newest: row.i64(1)?,
    })
}

pub(crate) async fn after(db: &Db, after: i64, limit: usize) -> Result<Vec<Event>, Error> {
    db.scan(&AFTER, vec![after.into(), limit.into()])
        .await?
        .iter()
        .map(|row| {
            Ok(Event {
                number: row.i64(0)?,
                kind: kind(&row.text(1)?)?,
                repository: row.parse(2)?,
                tag: match row.opt_text(3)? {
                    Some(_) => Some(row.parse(3)?),
                    None => None,
                },
                digest: row.digest(4)?,
                previous: row.opt_digest(5)?,
                media_type: row.text(6)?,
                artifact_type: row.opt_text(7)?,
                subject: row.opt_digest(8)?,
                actor: row.text(9)?,
                at: row.time(10)?,
            })
        })
        .collect()
}

/// As [`after`]; `None` when events after this position were forgotten. Numbers have no gaps, so the next one is there or
/// was forgotten. That is looked at after the events were read, because they may be forgotten at any time.
pub(crate) async fn every_after(
    db: &Db,
    position: i64,
    limit: usize,
) -> Result<Option<Vec<Event>>, Error> {
    let events = after(db, position, limit).await?;
    if events
        .first()
        .is_some_and(|first| first.number == position + 1)
    {
        return Ok(Some(events));
    }
    let forgotten = bounds(db).await?.pruned > position;
    Ok((!forgotten).then_some(events))
}

/// Forgets every event, as [`prune`] does after a long time.
pub(crate) struct Forget {
    /// Numbers that nobody saw.
    pub(crate) unseen: usize,
}

impl Body for Forget {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let last = take_numbers(tx, self.unseen).await?;
        tx.execute(&PRUNE, &[last.into()]).await?;
        tx.execute(&SET_PRUNED, &[last.into()]).await.map(drop)
    }
}

/// Forgets events that are older than the retention.
pub(crate) async fn prune(db: &Db, before: Timestamp) -> Result<(), Error> {
    // A look first: most rounds find nothing, on every replica.
    while last_before(&db.scan(&LAST_BEFORE, vec![before.into()]).await?)? > 0 {
        if !db.write(Prune { before }).await? {
            break;
        }
    }
    Ok(())
}

/// Forgets a batch; `false` when another replica is at it.
struct Prune {
    before: Timestamp,
}

impl Body for Prune {
    type Output = bool;

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        if !tx.try_lock(Lock::Upkeep).await? {
            return Ok(false);
        }
        let last = last_before(&tx.query(&LAST_BEFORE, &[self.before.into()]).await?)?;
        tx.execute(&PRUNE, &[last.into()]).await?;
        tx.execute(&SET_PRUNED, &[last.into()]).await?;
        Ok(true)
    }
}

fn last_before(rows: &[Row]) -> Result<i64, Error> {
    rows.first().map_or(Ok(0), |row| row.i64(0))
}

fn name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::ManifestPushed => "manifest.pushed",
        EventKind::ManifestDeleted => "manifest.deleted",
        EventKind::TagUpdated => "tag.updated",
        EventKind::TagDeleted => "tag.deleted",
        EventKind::RepositoryDeleted => "repository.deleted",
    }
}

fn kind(name: &str) -> Result<EventKind, Error> {
    Ok(match name {
        "manifest.pushed" => EventKind::ManifestPushed,
        "manifest.deleted" => EventKind::ManifestDeleted,
        "tag.updated" => EventKind::TagUpdated,
        "tag.deleted" => EventKind::TagDeleted,
        "repository.deleted" => EventKind::RepositoryDeleted,
        other => return Err(Error::Database(format!("unknown event kind `{other}`"))),
    })
}

const BATCH: usize = 1000;
/// How soon something that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);
