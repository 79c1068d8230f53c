//! Namespaces and repositories: rows that names are looked up in.

use oci::{Digest, RepositoryName};

use crate::audit;
use crate::collect::{self, Kind};
use crate::error::Error;
use crate::event::{self, NewEvent};
use crate::failpoint::failpoint;
use crate::model::{Actor, EventKind};
use crate::sql::{Body, Db, Row, Tx, WriteKind, statements};
use crate::store::Store;

statements! {
    FIND = "SELECT id, namespace_id FROM repository WHERE name = $1";
    HOLD = "SELECT id, namespace_id FROM repository WHERE name = $1 {for key share}";
    FIND_NAMESPACE = "SELECT id FROM namespace WHERE name = $1";
    ADD_NAMESPACE = "INSERT INTO namespace (id, name, created_at) VALUES ($1, $2, $3) ON CONFLICT (name) DO NOTHING";
    ADD = "INSERT INTO repository (id, namespace_id, name, created_at) VALUES ($1, $2, $3, $4) \
           ON CONFLICT (name) DO NOTHING";
    LIST = "SELECT r.name FROM repository r WHERE r.name > $1 AND r.deleted_at IS NULL AND ( \
                EXISTS (SELECT 1 FROM manifest m WHERE m.repository_id = r.id) \
                OR EXISTS (SELECT 1 FROM repository_blob b WHERE b.repository_id = r.id)) \
            ORDER BY r.name LIMIT $2";
    HAS_CONTENT = "SELECT r.id FROM repository r WHERE r.name = $1 AND ( \
                EXISTS (SELECT 1 FROM manifest m WHERE m.repository_id = r.id) \
                OR EXISTS (SELECT 1 FROM repository_blob b WHERE b.repository_id = r.id))";
    TAKE = "SELECT id, namespace_id FROM repository WHERE id = $1 AND name = $2 {for update}";
    PINNED = "SELECT digest, holder FROM pin WHERE repository_id = $1 AND (expires_at IS NULL OR expires_at > $2) \
              ORDER BY digest, holder LIMIT 10";
    HIDE = "UPDATE repository SET name = $2, deleted_name = $3, deleted_at = $4 WHERE id = $1";
    REMOVE = "DELETE FROM repository WHERE id = $1";
    BY_ID = "SELECT id, namespace_id, name, deleted_at, deleted_name FROM repository WHERE id = $1";
}

/// The row ids of a repository and of its namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) repository: i64,
    pub(crate) namespace: i64,
}

/// Finds a repository inside a transaction, which holds it to its end: it is not deleted meanwhile, and one that is
/// being deleted is waited for and not found.
pub(crate) async fn find(tx: &mut Tx, name: &RepositoryName) -> Result<Option<Place>, Error> {
    tx.query_opt(&HOLD, &[name.as_str().into()])
        .await?
        .map(|row| place(&row))
        .transpose()
}

/// As [`find`], for whoever only reads or renews: nothing is held.
pub(crate) async fn look_up(tx: &mut Tx, name: &RepositoryName) -> Result<Option<Place>, Error> {
    tx.query_opt(&FIND, &[name.as_str().into()])
        .await?
        .map(|row| place(&row))
        .transpose()
}

/// The row id of a repository, to look at what it holds.
pub(crate) async fn id(db: &Db, name: &RepositoryName) -> Result<Option<i64>, Error> {
    let rows = db.read(&FIND, &[name.as_str().into()]).await?;
    rows.first().map(|row| row.i64(0)).transpose()
}

/// A repository that is looked up by its row.
pub(crate) struct Known {
    pub(crate) place: Place,
    /// Its name; when it is being deleted, the one that it had.
    pub(crate) name: RepositoryName,
    pub(crate) deleted: bool,
}

pub(crate) async fn by_id(tx: &mut Tx, id: i64) -> Result<Option<Known>, Error> {
    tx.query_opt(&BY_ID, &[id.into()])
        .await?
        .map(|row| {
            let deleted = row.opt_i64(3)?.is_some();
            Ok(Known {
                place: place(&row)?,
                name: row.parse(if deleted { 4 } else { 2 })?,
                deleted,
            })
        })
        .transpose()
}

/// Deletes a repository with all that it holds. This takes its name away, so that nothing of it is found and a
/// repository of the same name can begin; its content goes in the background
/// ([`crate::collect`]).
pub(crate) struct Delete {
    pub(crate) name: RepositoryName,
    pub(crate) actor: Actor,
}

impl Body for Delete {
    type Output = ();

    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let unknown = || Error::RepositoryUnknown(self.name.clone());
        let found = tx
            .query_opt(&HAS_CONTENT, &[self.name.as_str().into()])
            .await?
            .ok_or_else(unknown)?;
        let id = found.i64(0)?;
        // The lock excludes whoever begins to put something in, a pin too; what was there before is seen next.
        tx.query_opt(&TAKE, &[id.into(), self.name.as_str().into()])
            .await?
            .ok_or_else(unknown)?;
        let now = tx.now();
        let pins = tx.query(&PINNED, &[id.into(), now.into()]).await?;
        if let Some(first) = pins.first() {
            let digest = first.digest(0)?;
            let mut holders = Vec::new();
            for row in &pins {
                if row.digest(0)? == digest {
                    holders.push(row.text(1)?);
                }
            }
            return Err(Error::Pinned { digest, holders });
        }
        failpoint("collect.before_hide");
        tx.execute(
            &HIDE,
            &[
                id.into(),
                hidden_name(id).into(),
                self.name.as_str().into(),
                now.into(),
            ],
        )
        .await?;
        failpoint("collect.after_hide");
        let event = NewEvent {
            kind: EventKind::RepositoryDeleted,
            repository: self.name.clone(),
            tag: None,
            digest: Digest::sha256(b""),
            previous: None,
            media_type: String::new(),
            artifact_type: None,
            subject: None,
        };
        event::write(tx, &[event], &self.actor).await?;
        let target = self.name.as_str().to_owned();
        audit::allowed(tx, &self.actor, "repository.delete", target).await?;
        collect::enqueue(tx, Kind::Repository, id, id, now);
        Ok(())
    }
}

/// What stands in the place of the name of a deleted repository: no parser takes it for one.
fn hidden_name(id: i64) -> String {
    format!("/deleted/{id}")
}

impl Store {
    /// Deletes a repository with all that it holds. From the answer on nothing of it is found, and a repository of
    /// the same name can begin; the content goes in the background.
    ///
    /// # Errors
    /// [`Error::RepositoryUnknown`] when it holds nothing; [`Error::Pinned`] when a pin is in it.
    pub async fn delete_repository(
        &self,
        name: &RepositoryName,
        actor: &Actor,
    ) -> Result<(), Error> {
        let deletion = Delete {
            name: name.clone(),
            actor: actor.clone(),
        };
        self.0.db.write(deletion).await?;
        self.wake_collector();
        Ok(())
    }
}

/// Deletes the row of a repository of which nothing is left.
pub(crate) async fn remove(tx: &mut Tx, id: i64) -> Result<(), Error> {
    tx.execute(&REMOVE, &[id.into()]).await.map(drop)
}

/// Finds a repository or makes it with its namespace, the first path component.
pub(crate) async fn ensure(tx: &mut Tx, name: &RepositoryName) -> Result<Place, Error> {
    if let Some(place) = find(tx, name).await? {
        return Ok(place);
    }
    let (now, id) = (tx.now(), tx.id());
    let namespace = ensure_namespace(tx, name.namespace()).await?;
    tx.execute(
        &ADD,
        &[
            id.into(),
            namespace.into(),
            name.as_str().into(),
            now.into(),
        ],
    )
    .await?;
    match find(tx, name).await? {
        Some(place) => Ok(place),
        // It was there by then, and was deleted since.
        None => Err(tx.again("the repository")),
    }
}

/// Finds a namespace or makes it.
pub(crate) async fn ensure_namespace(tx: &mut Tx, name: &str) -> Result<i64, Error> {
    let (now, id) = (tx.now(), tx.id());
    tx.execute(&ADD_NAMESPACE, &[id.into(), name.into(), now.into()])
        .await?;
    tx.query_opt(&FIND_NAMESPACE, &[name.into()])
        .await?
        .ok_or_else(|| Error::Database("a namespace vanished".to_owned()))?
        .i64(0)
}

/// Repositories that hold something, in bytewise order.
pub(crate) async fn list(
    db: &Db,
    last: Option<&str>,
    limit: usize,
) -> Result<Vec<RepositoryName>, Error> {
    db.scan(&LIST, vec![last.unwrap_or_default().into(), limit.into()])
        .await?
        .iter()
        .map(|row| row.parse(0))
        .collect()
}

/// Tells whether a repository holds something.
pub(crate) async fn has_content(db: &Db, name: &RepositoryName) -> Result<bool, Error> {
    Ok(!db
        .read(&HAS_CONTENT, &[name.as_str().into()])
        .await?
        .is_empty())
}

fn place(row: &Row) -> Result<Place, Error> {
    Ok(Place {
        repository: row.i64(0)?,
        namespace: row.i64(1)?,
    })
}
