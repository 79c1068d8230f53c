//! Audit rows, and the chain that seals them.
//!
//! A row is written in the transaction of what it tells of, without a hash: a push must not wait for the
//! last row of another one. A sealer then takes unsealed rows in batches, gives each the next sequence number
//! and the hash of the previous hash and its own canonical bytes. A changed, missing or exchanged record
//! breaks every hash after it; the head of the chain stands in a row of its own, which shows when the end
//! was cut off.

use serde_json::{Map, Value as Json};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::{Actor, AuditEntry};
use crate::sql::{Body, Db, Lock, Row, Tx, WriteKind, statements};

statements! {
    ADD = "INSERT INTO audit (id, at, principal, action, target, outcome, address, request) \
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
    HEAD = "SELECT sequence, hash FROM chain WHERE name = 'audit'";
    TAKE_HEAD = "SELECT sequence, hash FROM chain WHERE name = 'audit' {for update}";
    UNSEALED = "SELECT id, at, principal, action, target, outcome, address, request FROM audit \
                WHERE sequence IS NULL ORDER BY id LIMIT 500";
    ANY_UNSEALED = "SELECT id FROM audit WHERE sequence IS NULL ORDER BY id LIMIT 1";
    SEAL = "UPDATE audit SET sequence = $2, hash = $3 WHERE id = $1";
    SET_HEAD = "UPDATE chain SET sequence = $1, hash = $2 WHERE name = 'audit'";
    SEALED_AFTER = "SELECT id, at, principal, action, target, outcome, address, request, sequence, hash \
                    FROM audit WHERE sequence > $1 ORDER BY sequence LIMIT 500";
}

/// Writes an audit row of something that was allowed.
pub(crate) async fn allowed(
    tx: &mut Tx,
    actor: &Actor,
    action: &str,
    target: String,
) -> Result<(), Error> {
    add(tx, actor, action, &target, "allowed").await
}

async fn add(
    tx: &mut Tx,
    actor: &Actor,
    action: &str,
    target: &str,
    outcome: &str,
) -> Result<(), Error> {
    let (id, now) = (tx.id(), tx.now());
    tx.execute(
        &ADD,
        &[
            id.into(),
            now.into(),
            (&actor.principal).into(),
            action.into(),
            target.into(),
            outcome.into(),
            (&actor.address).into(),
            (&actor.request).into(),
        ],
    )
    .await
    .map(drop)
}

/// Writes one row in a transaction of its own.
pub(crate) struct Add(pub(crate) AuditEntry);

impl Body for Add {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let Self(entry) = self;
        add(
            tx,
            &entry.actor,
            &entry.action,
            &entry.target,
            &entry.outcome,
        )
        .await
    }
}

/// Seals every row that is committed.
pub(crate) async fn seal(db: &Db) -> Result<(), Error> {
    // A look first: most rounds find nothing, on every replica.
    if !db.scan(&ANY_UNSEALED, Vec::new()).await?.is_empty() {
        while db.write(Seal).await? {}
    }
    Ok(())
}

/// Seals a batch of rows; `true` when there may be more.
struct Seal;

impl Body for Seal {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        // Another replica that is at it takes what is there, and the next round the rest.
        if !tx.try_lock(Lock::Audit).await? {
            return Ok(false);
        }
        let (mut sequence, mut hash) = head(tx, &TAKE_HEAD).await?;
        let rows = tx.query(&UNSEALED, &[]).await?;
        if rows.is_empty() {
            return Ok(false);
        }
        failpoint("audit.before_seal");
        for row in &rows {
            sequence += 1;
            hash = link(&hash, &record(row, sequence)?);
            tx.execute(
                &SEAL,
                &[row.i64(0)?.into(), sequence.into(), hash.to_vec().into()],
            )
            .await?;
        }
        tx.execute(&SET_HEAD, &[sequence.into(), hash.to_vec().into()])
            .await?;
        failpoint("audit.after_seal");
        Ok(rows.len() == BATCH)
    }
}

/// Walks the chain from its first record; how many are sealed, or what is wrong.
pub(crate) async fn verify(tx: &mut Tx) -> Result<Result<u64, String>, Error> {
    let (end, end_hash) = head(tx, &HEAD).await?;
    let (mut sequence, mut hash) = (0, [0; 32]);
    loop {
        let rows = tx.query(&SEALED_AFTER, &[sequence.into()]).await?;
        for row in &rows {
            let next = sequence + 1;
            if row.i64(8)? != next {
                return Ok(Err(format!("record {next} of the audit chain is missing")));
            }
            hash = link(&hash, &record(row, next)?);
            if row.bytes(9)? != hash {
                return Ok(Err(format!(
                    "record {next} of the audit chain was changed after it was sealed"
                )));
            }
            sequence = next;
        }
        if rows.len() < BATCH {
            break;
        }
    }
    if sequence != end || hash != end_hash {
        return Ok(Err(format!(
            "the audit chain ends at record {sequence}, but {end} records were sealed"
        )));
    }
    Ok(Ok(sequence as u64))
}

async fn head(
    tx: &mut Tx,
    statement: &'static crate::sql::Statement,
) -> Result<(i64, [u8; 32]), Error> {
    let row = tx
        .query_opt(statement, &[])
        .await?
        .ok_or_else(|| Error::Database("the audit chain is missing".to_owned()))?;
    let hash = row
        .bytes(1)?
        .try_into()
        .map_err(|_| Error::Database("the audit chain has no hash".to_owned()))?;
    Ok((row.i64(0)?, hash))
}

/// The canonical bytes of a record: keys in bytewise order, no blanks, integers and text only.
fn record(row: &Row, sequence: i64) -> Result<Vec<u8>, Error> {
    let mut map = Map::new();
    map.insert("action".to_owned(), Json::from(row.text(3)?));
    map.insert("address".to_owned(), Json::from(row.text(6)?));
    map.insert("at".to_owned(), Json::from(row.i64(1)?));
    map.insert("outcome".to_owned(), Json::from(row.text(5)?));
    map.insert("principal".to_owned(), Json::from(row.text(2)?));
    map.insert("request".to_owned(), Json::from(row.text(7)?));
    map.insert("sequence".to_owned(), Json::from(sequence));
    map.insert("target".to_owned(), Json::from(row.text(4)?));
    map.insert("v".to_owned(), Json::from(1));
    serde_json::to_vec(&Json::Object(map))
        .map_err(|error| Error::Database(format!("an audit record cannot be written: {error}")))
}

fn link(previous: &[u8; 32], record: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(previous);
    hash.update(record);
    hash.finalize().into()
}

const BATCH: usize = 500;
