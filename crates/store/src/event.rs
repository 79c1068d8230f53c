//! The outbox of events.
//!
//! Events are written in the transaction of the change they tell of. Their public number comes from a
//! counter row whose lock is held until COMMIT, so numbers become visible in order and without a gap that
//! could still be filled; never from a row id or a sequence. The counter is taken at the end of a
//! transaction, after every other lock.

use std::time::Duration;

use oci::{Digest, RepositoryName, Tag};

use crate::error::Error;
use crate::model::{Actor, Event, EventBounds, EventKind};
use crate::sql::{Body, Db, Tx, WriteKind, statements};

statements! {
    NEXT = "UPDATE counter SET value = value + 1 WHERE name = 'event' RETURNING value";
    ADD = "INSERT INTO event (number, kind, repository, tag, digest, previous, media_type, artifact_type, \
               subject, actor, request, at) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
    AFTER = "SELECT number, kind, repository, tag, digest, previous, media_type, artifact_type, subject, \
                 actor, at \
             FROM event WHERE number > $1 ORDER BY number LIMIT $2";
    BOUNDS = "SELECT p.value AS pruned, n.value AS newest FROM counter p, counter n \
              WHERE p.name = 'event_pruned' AND n.name = 'event'";
    LAST_BEFORE = "SELECT COALESCE(MAX(number), 0) AS number FROM event WHERE at < $1";
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

/// Writes the events of a transaction; the last number, 0 without any.
pub(crate) async fn write(tx: &mut Tx, events: &[NewEvent], actor: &Actor) -> Result<i64, Error> {
    let mut newest = 0;
    for event in events {
        newest = tx
            .query_opt(&NEXT, &[])
            .await?
            .ok_or_else(|| Error::Database("the event counter is missing".to_owned()))?
            .i64(0)?;
        let now = tx.now();
        tx.execute(
            &ADD,
            &[
                newest.into(),
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
        tx.note_event(newest);
    }
    Ok(newest)
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

/// Forgets events that are older than the retention.
pub(crate) struct Prune {
    pub(crate) retention: Duration,
}

impl Body for Prune {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let before = tx.now().minus(self.retention);
        let last = tx
            .query_opt(&LAST_BEFORE, &[before.into()])
            .await?
            .map_or(Ok(0), |row| row.i64(0))?;
        if last > 0 {
            tx.execute(&PRUNE, &[last.into()]).await?;
            tx.execute(&SET_PRUNED, &[last.into()]).await?;
        }
        Ok(())
    }
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
