//! Facts about the store itself: the epoch of its events and the keys that sign tokens.

use std::time::Duration;

use crate::clock::random_name;
use crate::error::Error;
use crate::model::TokenKey;
use crate::sql::{Body, Db, Tx, WriteKind, statements};

statements! {
    GET = "SELECT value FROM meta WHERE key = $1";
    PUT = "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING";
    PING = "SELECT value FROM meta WHERE key = 'schema'";
    KEYS = "SELECT id, secret FROM token_key ORDER BY created_at DESC, id";
    ADD_KEY = "INSERT INTO token_key (id, secret, created_at) VALUES ($1, $2, $3)";
    FORGET_MARKS = "DELETE FROM commit_mark WHERE at < $1";
    LOCK = "SELECT value FROM meta WHERE key = 'epoch' {for update}";
}

/// The epoch, made when the store is new. A database that takes no writes has one already.
pub(crate) async fn epoch(db: &Db) -> Result<String, Error> {
    if let Some(epoch) = find_epoch(db).await? {
        return Ok(epoch);
    }
    db.write(Epoch {
        fresh: random_name()?,
    })
    .await
}

/// The epoch as it stands in the database.
pub(crate) async fn find_epoch(db: &Db) -> Result<Option<String>, Error> {
    let rows = db.read(&GET, &["epoch".into()]).await?;
    rows.first().map(|row| row.text(0)).transpose()
}

struct Epoch {
    fresh: String,
}

impl Body for Epoch {
    type Output = String;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<String, Error> {
        tx.execute(&PUT, &["epoch".into(), (&self.fresh).into()])
            .await?;
        tx.query_opt(&GET, &["epoch".into()])
            .await?
            .ok_or_else(|| Error::Database("the epoch is missing".to_owned()))?
            .text(0)
    }
}

pub(crate) async fn ping(db: &Db) -> Result<(), Error> {
    db.read(&PING, &[]).await.map(drop)
}

/// Forgets the commit marks of sessions that ended long ago.
pub(crate) struct ForgetMarks;

impl Body for ForgetMarks {
    type Output = ();

    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let before = tx.now().minus(MARKS_KEPT);
        tx.execute(&FORGET_MARKS, &[before.into()]).await.map(drop)
    }
}

/// The signing keys, the newest first; one is made when there is none.
pub(crate) async fn token_keys(db: &Db) -> Result<Vec<TokenKey>, Error> {
    let keys = read_keys(db.read(&KEYS, &[]).await?)?;
    if !keys.is_empty() {
        return Ok(keys);
    }
    let mut secret = vec![0; 32];
    getrandom::fill(&mut secret)
        .map_err(|error| Error::Database(format!("no randomness: {error}")))?;
    let mut id = random_name()?;
    id.truncate(16);
    db.write(MakeKey(TokenKey { id, secret })).await
}

struct MakeKey(TokenKey);

impl Body for MakeKey {
    type Output = Vec<TokenKey>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Vec<TokenKey>, Error> {
        // The lock makes replicas that start together agree on one key.
        tx.query(&LOCK, &[]).await?;
        let keys = read_keys(tx.query(&KEYS, &[]).await?)?;
        if !keys.is_empty() {
            return Ok(keys);
        }
        let now = tx.now();
        tx.execute(
            &ADD_KEY,
            &[
                (&self.0.id).into(),
                self.0.secret.clone().into(),
                now.into(),
            ],
        )
        .await?;
        Ok(vec![self.0.clone()])
    }
}

fn read_keys(rows: Vec<crate::sql::Row>) -> Result<Vec<TokenKey>, Error> {
    rows.iter()
        .map(|row| {
            Ok(TokenKey {
                id: row.text(0)?,
                secret: row.bytes(1)?,
            })
        })
        .collect()
}

/// A lost session is asked about within minutes, and one that lives longer makes its mark again.
const MARKS_KEPT: Duration = Duration::from_hours(24);
