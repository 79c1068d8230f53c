//! Pins: what a holder says it needs stays (`I19`).
//!
//! A holder, such as an agent, replaces its whole set in one transaction, so a set is never half a set. A pin refers to the
//! row of a manifest and locks it while it is written: neither the collector nor a DELETE can remove that row, and what it
//! names stays through its edges, its referrers through their subject. A digest that is not there is told, and is no error:
//! a holder reports what it runs, whether or not this registry has it.
//!
//! The row of the holder is locked first, so that two replacements at once leave one whole set.

use std::collections::{BTreeMap, BTreeSet};

use oci::{Digest, RepositoryName};

use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, ReportLimits};
use crate::sql::{Body, Row, Tx, WriteKind, statements};
use crate::store::{Inner, Store};
use crate::{audit, lease, manifest, repository};

statements! {
    TAKE_HOLDER = "INSERT INTO pin_holder (holder, version, updated_at, updated_by) VALUES ($1, 0, $2, $3) \
                   ON CONFLICT (holder) DO UPDATE SET holder = excluded.holder RETURNING version";
    FIND_HOLDER = "SELECT version FROM pin_holder WHERE holder = $1 {for update}";
    TOUCH_HOLDER = "UPDATE pin_holder SET version = $2, updated_at = $3, updated_by = $4 WHERE holder = $1";
    CHANGE_HOLDER = "UPDATE pin_holder SET version = $2 WHERE holder = $1";
    REMOVE_HOLDER = "DELETE FROM pin_holder WHERE holder = $1";
    HELD = "SELECT repository_id, digest, reason, expires_at FROM pin WHERE holder = $1 ORDER BY repository_id, digest";
    ADD = "INSERT INTO pin (holder, repository_id, digest, manifest_id, reason, created_at, created_by, expires_at) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
    CHANGE = "UPDATE pin SET reason = $4, expires_at = $5 WHERE holder = $1 AND repository_id = $2 AND digest = $3";
    REMOVE = "DELETE FROM pin WHERE holder = $1 AND repository_id = $2 AND digest = $3";
    KEEPERS = "SELECT holder FROM pin WHERE manifest_id = $1 AND (expires_at IS NULL OR expires_at > $2) \
               ORDER BY holder LIMIT 20";
    REMOVE_OF = "DELETE FROM pin WHERE manifest_id = $1 AND expires_at <= $2";
    EXPIRED = "SELECT holder, repository_id, digest, expires_at FROM pin WHERE expires_at IS NOT NULL AND expires_at <= $1 \
               ORDER BY holder, repository_id, digest LIMIT 100";
    REMOVE_EXPIRED = "DELETE FROM pin WHERE holder = $1 AND repository_id = $2 AND digest = $3 AND expires_at <= $4";
    SET = "SELECT version, updated_at, updated_by FROM pin_holder WHERE holder = $1";
    PINS = "SELECT r.name, p.digest, p.reason, p.created_at, p.created_by, p.expires_at, p.holder FROM pin p \
            JOIN repository r ON r.id = p.repository_id WHERE p.holder = $1 ORDER BY r.name, p.digest";
    PINS_OF = "SELECT r.name, p.digest, p.reason, p.created_at, p.created_by, p.expires_at, p.holder FROM repository r \
               JOIN manifest m ON m.repository_id = r.id JOIN pin p ON p.manifest_id = m.id \
               JOIN pin_holder h ON h.holder = p.holder \
               WHERE r.name = $1 AND m.digest = $2 AND p.holder > $3 ORDER BY p.holder LIMIT $4";
    HOLDERS_OF = "SELECT COUNT(*) FROM pin_holder WHERE holder >= $1 AND holder < $3 AND (holder = $1 OR holder >= $2)";
    PINS_OF_USER = "SELECT COUNT(*) FROM pin WHERE holder >= $1 AND holder < $3 AND (holder = $1 OR holder >= $2)";
    HOLDER = "SELECT h.holder, h.version, h.updated_at, h.updated_by, \
                  (SELECT COUNT(*) FROM pin p WHERE p.holder = h.holder) AS pins \
              FROM pin_holder h WHERE h.holder = $1";
    HOLDERS = "SELECT h.holder, h.version, h.updated_at, h.updated_by, \
                   (SELECT COUNT(*) FROM pin p WHERE p.holder = h.holder) AS pins \
               FROM pin_holder h WHERE h.holder > $1 ORDER BY h.holder LIMIT $2";
}

/// What a holder wants kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Where the manifest is.
    pub repository: RepositoryName,
    /// The manifest.
    pub digest: Digest,
    /// Why, for people.
    pub reason: String,
    /// When the pin ends by itself.
    pub expires: Option<Timestamp>,
}

/// A pin that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPin {
    /// Who holds it.
    pub holder: String,
    /// What it holds.
    pub pin: Pin,
    /// Since when.
    pub created_at: Timestamp,
    /// Who wrote it first.
    pub created_by: String,
}

/// The set of a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinSet {
    /// Another one after each change, never the same again.
    pub version: i64,
    /// When it changed last by a request.
    pub updated_at: Timestamp,
    /// Who changed it.
    pub updated_by: String,
    /// By repository and digest.
    pub pins: Vec<HeldPin>,
}

/// A holder in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinHolder {
    /// Its name.
    pub holder: String,
    /// As [`PinSet::version`].
    pub version: i64,
    /// As [`PinSet::updated_at`].
    pub updated_at: Timestamp,
    /// As [`PinSet::updated_by`].
    pub updated_by: String,
    /// How many pins it holds.
    pub pins: u64,
}

/// What the set of a holder must be for a replacement to happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExpectedPins {
    /// Anything, also nothing.
    #[default]
    Any,
    /// The holder must have no set.
    Absent,
    /// The holder must have a set.
    Present,
    /// The set must have one of these versions.
    Version(Vec<i64>),
}

impl ExpectedPins {
    /// `version` is 0 where there is no set.
    fn check(&self, holder: &str, version: i64) -> Result<(), Error> {
        let met = match self {
            Self::Any => true,
            Self::Absent => version == 0,
            Self::Present => version != 0,
            Self::Version(versions) => version != 0 && versions.contains(&version),
        };
        if met {
            return Ok(());
        }
        Err(Error::PinsChanged {
            holder: holder.to_owned(),
            version: (version != 0).then_some(version),
        })
    }
}

/// What a replacement did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinOutcome {
    /// The version of the set now.
    pub version: i64,
    /// The holder had no set before.
    pub created: bool,
    /// What is pinned now, by repository and digest.
    pub held: Vec<(RepositoryName, Digest)>,
    /// What is not in this registry and so cannot be pinned.
    pub missing: Vec<(RepositoryName, Digest)>,
    /// Pins that had ended already.
    pub expired: Vec<(RepositoryName, Digest)>,
}

impl Store {
    /// Replaces the whole set of a holder in one transaction. The same set again changes nothing. It goes on in the
    /// read-only mode by command: the collector does too.
    ///
    /// # Errors
    /// [`Error::PinsChanged`] when the set is not the expected one, [`Error::ReportLimit`] when the holder is new or its set
    /// grows beyond what one user may have ([`crate::ReportLimits`]).
    pub async fn set_pins(
        &self,
        holder: &str,
        pins: Vec<Pin>,
        expected: ExpectedPins,
        actor: &Actor,
    ) -> Result<PinOutcome, Error> {
        let inner = &self.0;
        inner
            .db
            .write(Replace {
                holder: holder.to_owned(),
                pins: pins
                    .into_iter()
                    .map(|pin| ((pin.repository.clone(), pin.digest.clone()), pin))
                    .collect(),
                expected,
                actor: actor.clone(),
                lease: inner.options.lease,
                limits: inner.options.reports,
            })
            .await
    }

    /// Removes a holder with its pins; `false` when there was none.
    ///
    /// # Errors
    /// [`Error::PinsChanged`] when the set is not the expected one.
    pub async fn remove_pins(
        &self,
        holder: &str,
        expected: ExpectedPins,
        actor: &Actor,
    ) -> Result<bool, Error> {
        let inner = &self.0;
        inner
            .db
            .write(Remove {
                holder: holder.to_owned(),
                expected,
                actor: actor.clone(),
                lease: inner.options.lease,
            })
            .await
    }

    /// The set of a holder.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn pins(&self, holder: &str) -> Result<Option<PinSet>, Error> {
        let db = &self.0.db;
        let rows = db.read(&SET, &[holder.into()]).await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let pins = db.scan(&PINS, vec![holder.into()]).await?;
        Ok(Some(PinSet {
            version: row.i64(0)?,
            updated_at: row.time(1)?,
            updated_by: row.text(2)?,
            pins: pins.iter().map(held_pin).collect::<Result<_, _>>()?,
        }))
    }

    /// Who pins a manifest, by holder after `last`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn pins_of(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        last: Option<&str>,
        limit: usize,
    ) -> Result<Vec<HeldPin>, Error> {
        self.0
            .db
            .scan(
                &PINS_OF,
                vec![
                    repository.as_str().into(),
                    digest.into(),
                    last.unwrap_or_default().into(),
                    limit.into(),
                ],
            )
            .await?
            .iter()
            .map(held_pin)
            .collect()
    }

    /// The holder of this name alone, as [`Store::pin_holders`] tells it.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn find_pin_holder(&self, holder: &str) -> Result<Option<PinHolder>, Error> {
        let rows = self.0.db.read(&HOLDER, &[holder.into()]).await?;
        rows.first().map(pin_holder).transpose()
    }

    /// Every holder in bytewise order after `last`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn pin_holders(
        &self,
        last: Option<&str>,
        limit: usize,
    ) -> Result<Vec<PinHolder>, Error> {
        self.0
            .db
            .scan(
                &HOLDERS,
                vec![last.unwrap_or_default().into(), limit.into()],
            )
            .await?
            .iter()
            .map(pin_holder)
            .collect()
    }
}

fn pin_holder(row: &Row) -> Result<PinHolder, Error> {
    Ok(PinHolder {
        holder: row.text(0)?,
        version: row.i64(1)?,
        updated_at: row.time(2)?,
        updated_by: row.text(3)?,
        pins: row.u64(4)?,
    })
}

fn held_pin(row: &Row) -> Result<HeldPin, Error> {
    Ok(HeldPin {
        holder: row.text(6)?,
        pin: Pin {
            repository: row.parse(0)?,
            digest: row.digest(1)?,
            reason: row.text(2)?,
            expires: row.opt_i64(5)?.map(Timestamp),
        },
        created_at: row.time(3)?,
        created_by: row.text(4)?,
    })
}

type Name = (RepositoryName, Digest);

struct Replace {
    holder: String,
    pins: BTreeMap<Name, Pin>,
    expected: ExpectedPins,
    actor: Actor,
    lease: std::time::Duration,
    limits: ReportLimits,
}

/// A pin as its row says.
struct Kept {
    reason: String,
    expires: Option<i64>,
}

impl Body for Replace {
    type Output = PinOutcome;

    const KIND: WriteKind = WriteKind::Protect;

    async fn run(&self, tx: &mut Tx) -> Result<PinOutcome, Error> {
        let now = tx.now();
        let holder = self.holder.as_str();
        let principal = self.actor.principal.as_str();
        let version = tx
            .query_opt(&TAKE_HOLDER, &[holder.into(), now.into(), principal.into()])
            .await?
            .ok_or_else(|| Error::Database("a holder of pins vanished".to_owned()))?
            .i64(0)?;
        self.expected.check(holder, version)?;
        if version == 0 {
            self.check_holders(tx).await?;
        }
        let mut old = held(tx, holder).await?;
        let mut outcome = PinOutcome {
            version,
            created: version == 0,
            held: Vec::new(),
            missing: Vec::new(),
            expired: Vec::new(),
        };
        let mut wanted = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (name, pin) in &self.pins {
            if pin.expires.is_some_and(|expires| expires <= now) {
                outcome.expired.push(name.clone());
                continue;
            }
            let place = if let Some(place) = places.get(&name.0) {
                *place
            } else {
                let place = repository::find(tx, &name.0).await?;
                places.insert(name.0.clone(), place);
                place
            };
            match place {
                Some(place) => {
                    wanted.insert((place.repository, name.1.clone()), pin);
                }
                None => outcome.missing.push(name.clone()),
            }
        }
        let mut changed = version == 0;
        let mut added = 0;
        let mut removed = 0;
        // What is added, changed and removed in one order, in which everybody locks manifests.
        let keys: BTreeSet<_> = wanted.keys().chain(old.keys()).cloned().collect();
        for key in keys {
            let kept = old.remove(&key);
            let (repository, digest) = key;
            let Some(pin) = wanted.get(&(repository, digest.clone())) else {
                changed = true;
                removed += 1;
                failpoint("pin.before_remove");
                let ended = kept.and_then(|kept| kept.expires);
                release(tx, (holder, repository, &digest), ended, self.lease).await?;
                continue;
            };
            let expires = pin.expires.map(|expires| expires.0);
            let values = [
                holder.into(),
                repository.into(),
                (&digest).into(),
                (&pin.reason).into(),
                expires.into(),
            ];
            if kept
                .as_ref()
                .is_some_and(|kept| kept.reason == pin.reason && kept.expires == expires)
            {
                outcome.held.push((pin.repository.clone(), digest));
                continue;
            }
            // Held also where a pin only changes: nobody then takes it for one that has ended.
            let Some(manifest) = manifest::share(tx, repository, &digest).await? else {
                outcome.missing.push((pin.repository.clone(), digest));
                continue;
            };
            changed = true;
            if kept.is_some() {
                failpoint("pin.before_change");
                tx.execute(&CHANGE, &values).await?;
            } else {
                added += 1;
                let [holder, repository, digest, reason, expires] = values;
                failpoint("pin.before_add");
                tx.execute(
                    &ADD,
                    &[
                        holder,
                        repository,
                        digest,
                        manifest.into(),
                        reason,
                        now.into(),
                        principal.into(),
                        expires,
                    ],
                )
                .await?;
            }
            outcome.held.push((pin.repository.clone(), digest));
        }
        if added > removed {
            self.check_pins(tx).await?;
        }
        failpoint("pin.after_rows");
        outcome.held.sort_unstable();
        outcome.missing.sort_unstable();
        if changed {
            outcome.version = tx.id();
            tx.execute(
                &TOUCH_HOLDER,
                &[
                    holder.into(),
                    outcome.version.into(),
                    now.into(),
                    principal.into(),
                ],
            )
            .await?;
            let target = format!("{holder} +{added} -{removed}, {} held", outcome.held.len());
            audit::allowed(tx, &self.actor, "pins.set", target).await?;
        }
        Ok(outcome)
    }
}

impl Replace {
    /// Refuses a new holder beyond what its user may have; its row is there already.
    async fn check_holders(&self, tx: &mut Tx) -> Result<(), Error> {
        let user = user_of(&self.holder);
        let count = count_of(tx, &HOLDERS_OF, user).await?;
        if count <= self.limits.holders {
            return Ok(());
        }
        Err(Error::ReportLimit {
            user: user.to_owned(),
            what: format!("{} holders of pins", self.limits.holders),
            advice: "remove those of hosts and targets that are gone with `longshore pin rm`",
        })
    }

    /// Refuses more pins than the user may have; the new ones are there already.
    async fn check_pins(&self, tx: &mut Tx) -> Result<(), Error> {
        let user = user_of(&self.holder);
        let count = count_of(tx, &PINS_OF_USER, user).await?;
        if count <= self.limits.pins {
            return Ok(());
        }
        Err(Error::ReportLimit {
            user: user.to_owned(),
            what: format!("{} pins", self.limits.pins),
            advice: "pin less, or remove holders that are gone with `longshore pin rm`",
        })
    }
}

/// Counts rows of the holders that are a user or below it. Between its name and those others may stand: `a`, `a-b`, `a/b`.
async fn count_of(
    tx: &mut Tx,
    statement: &'static crate::sql::Statement,
    user: &str,
) -> Result<u64, Error> {
    let values = [
        user.into(),
        format!("{user}/").into(),
        format!("{user}0").into(),
    ];
    match tx.query_opt(statement, &values).await? {
        Some(row) => row.u64(0),
        None => Ok(0),
    }
}

/// The user that a holder's name begins with.
pub(crate) fn user_of(holder: &str) -> &str {
    holder.split_once('/').map_or(holder, |(user, _)| user)
}

struct Remove {
    holder: String,
    expected: ExpectedPins,
    actor: Actor,
    lease: std::time::Duration,
}

impl Body for Remove {
    type Output = bool;

    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let holder = self.holder.as_str();
        let version = tx
            .query_opt(&FIND_HOLDER, &[holder.into()])
            .await?
            .map_or(Ok(0), |row| row.i64(0))?;
        self.expected.check(holder, version)?;
        if version == 0 {
            return Ok(false);
        }
        let pins = held(tx, holder).await?;
        let removed = pins.len();
        for ((repository, digest), kept) in pins {
            let pin = (holder, repository, &digest);
            release(tx, pin, kept.expires, self.lease).await?;
        }
        tx.execute(&REMOVE_HOLDER, &[holder.into()]).await?;
        let target = format!("{holder} -{removed}");
        audit::allowed(tx, &self.actor, "pins.delete", target).await?;
        Ok(true)
    }
}

async fn held(tx: &mut Tx, holder: &str) -> Result<BTreeMap<(i64, Digest), Kept>, Error> {
    tx.query(&HELD, &[holder.into()])
        .await?
        .iter()
        .map(|row| {
            let kept = Kept {
                reason: row.text(2)?,
                expires: row.opt_i64(3)?,
            };
            Ok(((row.i64(0)?, row.digest(1)?), kept))
        })
        .collect()
}

/// Removes one pin. It was an edge of the manifest, so what it pointed to is kept for a lease and then looked at (`I7`). One
/// whose time was over held nothing since.
async fn release(
    tx: &mut Tx,
    (holder, repository, digest): (&str, i64, &Digest),
    expires: Option<i64>,
    lease: std::time::Duration,
) -> Result<(), Error> {
    let now = tx.now();
    let ended = expires.map_or(now, |expires| now.min(Timestamp(expires)));
    lease::after_pin(tx, repository, digest, ended, lease).await?;
    tx.execute(&REMOVE, &[holder.into(), repository.into(), digest.into()])
        .await
        .map(drop)
}

/// Refuses the removal of a manifest that somebody pins. The caller holds the manifest's row, so nobody pins it meanwhile;
/// pins that have ended go.
pub(crate) async fn refuse(tx: &mut Tx, manifest: i64, digest: &Digest) -> Result<(), Error> {
    let now = tx.now();
    let rows = tx.query(&KEEPERS, &[manifest.into(), now.into()]).await?;
    if rows.is_empty() {
        return tx
            .execute(&REMOVE_OF, &[manifest.into(), now.into()])
            .await
            .map(drop);
    }
    Err(Error::Pinned {
        digest: digest.clone(),
        holders: rows
            .iter()
            .map(|row| row.text(0))
            .collect::<Result<_, _>>()?,
    })
}

/// Removes pins whose time is over.
pub(crate) async fn expire(inner: &Inner) -> Result<(), Error> {
    loop {
        let now = inner.clock.now();
        if inner.db.read(&EXPIRED, &[now.into()]).await?.is_empty() {
            return Ok(());
        }
        let lease = inner.options.lease;
        inner.db.write(Expire { lease }).await?;
    }
}

struct Expire {
    lease: std::time::Duration,
}

impl Body for Expire {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let now = tx.now();
        let rows = tx.query(&EXPIRED, &[now.into()]).await?;
        let mut holders = BTreeSet::new();
        for row in &rows {
            holders.insert(row.text(0)?);
        }
        // Holders before manifests, as whoever replaces a set does.
        for holder in &holders {
            let version = tx.id();
            tx.execute(&CHANGE_HOLDER, &[holder.into(), version.into()])
                .await?;
        }
        let mut ended = Vec::with_capacity(rows.len());
        for row in &rows {
            ended.push((row.i64(1)?, row.digest(2)?, row.text(0)?, row.time(3)?));
        }
        // In the order in which everybody locks manifests. What was made to last longer since is only leased in vain.
        ended.sort();
        for (repository, digest, holder, at) in &ended {
            lease::after_pin(tx, *repository, digest, *at, self.lease).await?;
            failpoint("pin.before_expire");
            tx.execute(
                &REMOVE_EXPIRED,
                &[
                    holder.into(),
                    (*repository).into(),
                    digest.into(),
                    now.into(),
                ],
            )
            .await?;
        }
        Ok(())
    }
}
