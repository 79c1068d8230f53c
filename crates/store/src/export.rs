//! Exports: what of the database cannot be found again in the objects, written beside them.
//!
//! Manifests, small blobs and tags live in rows. So that a lost database can be made anew ([`mod@crate::reindex`]), a
//! worker writes each change of them to `x/` of the data directory, every minute and in the order of the events. Its
//! cost is that of the changes. A *set* begins with everything that is there and goes on with what changes; when the
//! changes outgrow it, a new set begins and the old one goes. At most one minute is lost, and with it what was never
//! exported: pins, quotas, the audit record, the history of tags, uploads.
//!
//! A part is one file, written whole and durably, with its hash at its end. A part that is damaged or missing loses
//! what it tells, not more. Where several replicas run, one of them writes: the row `export` of table `meta` says which,
//! until when, and up to which event. Names of parts carry a random end, so that a replica that was thought dead
//! overwrites nothing.
//!
//! Where exports are switched off, those that are there are taken away: old ones would bring back tags and content that
//! were deleted since. Replicas that disagree take turns; the last word is that of whoever runs last.

pub(crate) mod record;
pub(crate) mod shelf;

use std::sync::Arc;
use std::time::Duration;

use oci::{RepositoryName, Tag};
use serde::{Deserialize, Serialize};

use crate::clock::random_name;
use crate::error::Error;
use crate::event;
use crate::failpoint::failpoint;
use crate::model::{Event, EventKind};
use crate::sql::{Body, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};
use record::{Part, Record};
use shelf::Name;

statements! {
    STATE = "SELECT value FROM meta WHERE key = 'export'";
    TAKE_STATE = "SELECT value FROM meta WHERE key = 'export' {for update}";
    ADD_STATE = "INSERT INTO meta (key, value) VALUES ('export', '{}') ON CONFLICT (key) DO NOTHING";
    SET_STATE = "UPDATE meta SET value = $1 WHERE key = 'export'";
    BLOBS = "SELECT id, digest, body FROM blob WHERE id > $1 AND body IS NOT NULL AND state = 'ok' \
             ORDER BY id LIMIT 64";
    MANIFESTS = "SELECT m.id, r.name, m.digest, m.media_type, m.body, m.pushed_by, m.created_at FROM manifest m \
                 JOIN repository r ON r.id = m.repository_id WHERE m.id > $1 AND r.deleted_at IS NULL \
                 ORDER BY m.id LIMIT 32";
    TAGS = "SELECT t.repository_id, r.name, t.name AS tag, m.digest, t.generation, t.updated_by, t.updated_at \
            FROM tag t JOIN repository r ON r.id = t.repository_id JOIN manifest m ON m.id = t.manifest_id \
            WHERE (t.repository_id, t.name) > ($1, $2) AND r.deleted_at IS NULL \
            ORDER BY t.repository_id, t.name LIMIT 256";
    MANIFEST = "SELECT m.id, r.name, m.digest, m.media_type, m.body, m.pushed_by, m.created_at FROM repository r \
                JOIN manifest m ON m.repository_id = r.id WHERE r.name = $1 AND m.digest = $2";
    SMALL_BLOBS = "SELECT b.id, b.digest, b.body FROM manifest_blob e JOIN blob b ON b.id = e.blob_id \
                   WHERE e.manifest_id = $1 AND b.body IS NOT NULL AND b.state = 'ok' ORDER BY b.id";
    TAG = "SELECT e.digest, e.generation, e.actor, e.at FROM repository r \
           JOIN tag_event e ON e.repository_id = r.id \
           WHERE r.name = $1 AND e.name = $2 ORDER BY e.generation DESC LIMIT 1";
}

/// How far the exports are, and who writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    holder: String,
    until: i64,
    epoch: String,
    number: i64,
    set: u64,
    part: u64,
    /// Bytes of what the set began with, and of what came after.
    first: u64,
    later: u64,
    /// They are switched off, and nothing of them is left.
    off: bool,
}

impl Store {
    /// Writes what changed since the last time to the exports, or everything when there are none. Where they are
    /// switched off, takes away what is there.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Full`], [`Error::Database`]; the next time tries again.
    #[doc(hidden)]
    pub async fn export(&self) -> Result<(), Error> {
        run(self.inner()).await
    }
}

/// Exports once a minute until the future is dropped.
pub(crate) async fn work(inner: &Arc<Inner>) {
    if !inner.options.exports {
        tracing::info!(
            "exports are off: tags and manifests of a lost database cannot be found again"
        );
    }
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A failure that lasts is told once.
    let mut told = String::new();
    loop {
        tick.tick().await;
        match run(inner).await {
            Ok(()) => told.clear(),
            Err(Error::Stopped) => return,
            Err(error) => {
                let text = crate::backup::chain(&error);
                if told != text {
                    tracing::warn!(
                        error = text,
                        "the exports could not be written, it is tried again"
                    );
                    told = text;
                }
            }
        }
    }
}

/// One round.
async fn run(inner: &Arc<Inner>) -> Result<(), Error> {
    let db = &inner.db;
    if !changed(inner).await? {
        return Ok(());
    }
    let holder = random_name()?;
    let Some(state) = db.write(Take(holder.clone())).await? else {
        return Ok(());
    };
    if !inner.options.exports {
        return withdraw(inner, holder).await;
    }
    let mut writer = Writer {
        inner,
        state,
        part: Part::default(),
        begun: false,
    };
    let done = writer.run().await;
    if writer.begun {
        // The set is not whole: the next round begins another one.
        writer.state.set = 0;
    }
    // The next round, of whichever replica, need not wait for our time to be over.
    writer.state.until = 0;
    db.write(Set(holder, writer.state)).await?;
    done
}

/// Takes all exports away. The claim of `holder` keeps other replicas from writing meanwhile.
async fn withdraw(inner: &Inner, holder: String) -> Result<(), Error> {
    for name in inner.exports.list().await? {
        inner.exports.remove(&name).await?;
    }
    let state = State {
        holder: holder.clone(),
        off: true,
        ..State::default()
    };
    inner.db.write(Set(holder, state)).await.map(drop)
}

/// Whether there is anything to do; one or two point queries.
async fn changed(inner: &Inner) -> Result<bool, Error> {
    let state = match inner.db.read(&STATE, &[]).await?.first() {
        Some(row) => parse(&row.text(0)?),
        None => return Ok(true),
    };
    if !inner.options.exports {
        return Ok(!state.off && state.until <= inner.clock.now().0);
    }
    let newest = event::bounds(&inner.db).await?.newest;
    let now = inner.clock.now();
    let free = state.until <= now.0;
    Ok(free && (state.epoch != inner.epoch() || state.number != newest || state.set == 0))
}

fn parse(text: &str) -> State {
    // What another version wrote is read as nothing: a new set begins.
    serde_json::from_str(text).unwrap_or_default()
}

/// Becomes the one who writes; `None` while another one is.
struct Take(String);

impl Body for Take {
    type Output = Option<State>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Option<State>, Error> {
        tx.execute(&ADD_STATE, &[]).await?;
        let mut state = match tx.query_opt(&TAKE_STATE, &[]).await? {
            Some(row) => parse(&row.text(0)?),
            None => return Ok(None),
        };
        let now = tx.now();
        if state.until > now.0 {
            return Ok(None);
        }
        state.holder.clone_from(&self.0);
        state.until = now.plus(CLAIM).0;
        set(tx, &state).await?;
        Ok(Some(state))
    }
}

/// Records how far the holder came; `false` when another one took over.
struct Set(String, State);

impl Body for Set {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let Some(row) = tx.query_opt(&TAKE_STATE, &[]).await? else {
            return Ok(false);
        };
        if parse(&row.text(0)?).holder != self.0 {
            return Ok(false);
        }
        let mut state = self.1.clone();
        if state.until != 0 {
            state.until = tx.now().plus(CLAIM).0;
        }
        set(tx, &state).await?;
        Ok(true)
    }
}

async fn set(tx: &mut Tx, state: &State) -> Result<(), Error> {
    let text = serde_json::to_string(state)
        .map_err(|error| Error::Database(format!("the state of the exports: {error}")))?;
    tx.execute(&SET_STATE, &[text.into()]).await.map(drop)
}

struct Writer<'a> {
    inner: &'a Arc<Inner>,
    state: State,
    part: Part,
    /// The parts that are written now begin a set.
    begun: bool,
}

impl Writer<'_> {
    async fn run(&mut self) -> Result<(), Error> {
        let bounds = event::bounds(&self.inner.db).await?;
        let follows = self.state.set > 0
            && self.state.epoch == self.inner.epoch()
            && (bounds.pruned..=bounds.newest).contains(&self.state.number)
            && self.state.later <= self.state.first.max(MIN_SET)
            && self.state.part < MAX_PARTS;
        if follows {
            self.follow().await
        } else {
            self.begin(bounds.newest).await
        }
    }

    /// Writes what the events since the last time tell of.
    async fn follow(&mut self) -> Result<(), Error> {
        loop {
            let events = event::after(&self.inner.db, self.state.number, EVENTS).await?;
            let Some(last) = events.last() else {
                return Ok(());
            };
            let number = last.number;
            for event in &events {
                self.change(event).await?;
            }
            self.flush().await?;
            self.state.number = number;
            failpoint("export.after_part");
            let kept = Set(self.state.holder.clone(), self.state.clone());
            if !self.inner.db.write(kept).await? {
                return Ok(());
            }
        }
    }

    async fn change(&mut self, event: &Event) -> Result<(), Error> {
        match (event.kind, &event.tag) {
            (EventKind::ManifestPushed, _) => {
                let key = [event.repository.as_str().into(), (&event.digest).into()];
                // When it is gone again, a later event says so.
                if let Some(row) = self.inner.db.read(&MANIFEST, &key).await?.first() {
                    self.manifest(row, true).await?;
                }
                Ok(())
            }
            (EventKind::ManifestDeleted, _) => {
                self.add(&Record::Gone {
                    repository: event.repository.as_str().to_owned(),
                    digest: event.digest.to_string(),
                })
                .await
            }
            (EventKind::TagUpdated | EventKind::TagDeleted, Some(tag)) => {
                self.tag(&event.repository, tag).await
            }
            (EventKind::RepositoryDeleted, _) => {
                self.add(&Record::Dropped {
                    repository: event.repository.as_str().to_owned(),
                })
                .await
            }
            (EventKind::TagUpdated | EventKind::TagDeleted, None) => Ok(()),
        }
    }

    async fn tag(&mut self, repository: &RepositoryName, tag: &Tag) -> Result<(), Error> {
        let key = [repository.as_str().into(), tag.as_str().into()];
        let rows = self.inner.db.read(&TAG, &key).await?;
        let Some(row) = rows.first() else {
            return Ok(());
        };
        self.add(&Record::Tag {
            repository: repository.as_str().to_owned(),
            tag: tag.as_str().to_owned(),
            digest: row.opt_digest(0)?.map(|digest| digest.to_string()),
            generation: row.i64(1)?,
            by: row.text(2)?,
            at: row.i64(3)?,
        })
        .await
    }

    async fn manifest(&mut self, row: &Row, with_blobs: bool) -> Result<(), Error> {
        if with_blobs {
            let blobs = self
                .inner
                .db
                .read(&SMALL_BLOBS, &[row.i64(0)?.into()])
                .await?;
            for blob in &blobs {
                self.blob(blob).await?;
            }
        }
        self.add(&Record::manifest(
            &row.text(1)?,
            &row.digest(2)?,
            &row.text(3)?,
            row.bytes(4)?,
            &row.text(5)?,
            row.i64(6)?,
        ))
        .await
    }

    async fn blob(&mut self, row: &Row) -> Result<(), Error> {
        self.add(&Record::Blob {
            digest: row.digest(1)?.to_string(),
            body: hex::encode(row.bytes(2)?),
        })
        .await
    }

    /// Begins a set with all there is. What changes meanwhile has a later event, and comes after.
    async fn begin(&mut self, newest: i64) -> Result<(), Error> {
        let shelf = self.inner.exports.clone();
        let known = shelf.list().await?;
        let above = known.iter().map(|name| name.set).max().unwrap_or_default();
        self.state = State {
            holder: std::mem::take(&mut self.state.holder),
            until: self.state.until,
            epoch: self.inner.epoch().to_owned(),
            number: newest,
            set: above.max(self.state.set) + 1,
            ..State::default()
        };
        let set = self.state.set;
        self.begun = true;
        self.part = Part::first();
        let mut last = i64::MIN;
        loop {
            let rows = self.inner.db.scan(&BLOBS, vec![last.into()]).await?;
            for row in &rows {
                last = row.i64(0)?;
                self.blob(row).await?;
            }
            if rows.is_empty() {
                break;
            }
        }
        last = i64::MIN;
        loop {
            let rows = self.inner.db.scan(&MANIFESTS, vec![last.into()]).await?;
            for row in &rows {
                last = row.i64(0)?;
                self.manifest(row, false).await?;
            }
            if rows.is_empty() {
                break;
            }
        }
        let (mut repository, mut after) = (i64::MIN, String::new());
        loop {
            let rows = self
                .inner
                .db
                .scan(&TAGS, vec![repository.into(), (&after).into()])
                .await?;
            for row in &rows {
                repository = row.i64(0)?;
                after = row.text(2)?;
                self.add(&Record::Tag {
                    repository: row.text(1)?,
                    tag: after.clone(),
                    digest: Some(row.digest(3)?.to_string()),
                    generation: row.i64(4)?,
                    by: row.text(5)?,
                    at: row.i64(6)?,
                })
                .await?;
            }
            if rows.is_empty() {
                break;
            }
        }
        self.add(&Record::Whole { set }).await?;
        self.flush().await?;
        self.begun = false;
        failpoint("export.after_set");
        let kept = Set(self.state.holder.clone(), self.state.clone());
        if self.inner.db.write(kept).await? {
            for name in known.iter().filter(|name| name.set < set) {
                shelf.remove(name).await?;
            }
        }
        Ok(())
    }

    async fn add(&mut self, record: &Record) -> Result<(), Error> {
        self.part.add(record)?;
        if self.part.length() >= PART_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let part = std::mem::take(&mut self.part);
        if part.is_empty() {
            return Ok(());
        }
        let bytes = part.finish();
        let length = bytes.len() as u64;
        self.state.part += 1;
        let name = Name {
            set: self.state.set,
            part: self.state.part,
            end: random_name()?[..8].to_owned(),
        };
        self.inner.exports.put(&name, bytes).await?;
        if self.begun {
            self.state.first += length;
            // A long set must not be thought dead.
            let kept = Set(
                self.state.holder.clone(),
                State {
                    // Until it is whole, the next round begins again.
                    set: 0,
                    ..self.state.clone()
                },
            );
            if !self.inner.db.write(kept).await? {
                return Err(Error::Database(
                    "another replica writes the exports now".to_owned(),
                ));
            }
        } else {
            self.state.later += length;
        }
        Ok(())
    }
}

/// How often changes are written.
const PERIOD: Duration = Duration::from_mins(1);
/// How long a replica that stopped in the middle keeps the others from writing.
const CLAIM: Duration = Duration::from_mins(5);
/// Events that one part tells of, at most.
const EVENTS: usize = 1000;
/// A part is ended when it is longer than this, in bytes.
const PART_BYTES: usize = 8 << 20;
/// A set is replaced when what came after its beginning is longer than that and this, in bytes.
const MIN_SET: u64 = 64 << 20;
/// Or when it has so many parts.
const MAX_PARTS: u64 = 10_000;
