//! Namespaces and repositories: rows that names are looked up in.

use oci::RepositoryName;

use crate::error::Error;
use crate::sql::{Db, Row, Tx, statements};

statements! {
    FIND = "SELECT id, namespace_id FROM repository WHERE name = $1";
    FIND_NAMESPACE = "SELECT id FROM namespace WHERE name = $1";
    ADD_NAMESPACE = "INSERT INTO namespace (id, name, created_at) VALUES ($1, $2, $3) ON CONFLICT (name) DO NOTHING";
    ADD = "INSERT INTO repository (id, namespace_id, name, created_at) VALUES ($1, $2, $3, $4) \
           ON CONFLICT (name) DO NOTHING";
    LIST = "SELECT r.name FROM repository r WHERE r.name > $1 AND ( \
                EXISTS (SELECT 1 FROM manifest m WHERE m.repository_id = r.id) \
                OR EXISTS (SELECT 1 FROM repository_blob b WHERE b.repository_id = r.id)) \
            ORDER BY r.name LIMIT $2";
    HAS_CONTENT = "SELECT r.id FROM repository r WHERE r.name = $1 AND ( \
                EXISTS (SELECT 1 FROM manifest m WHERE m.repository_id = r.id) \
                OR EXISTS (SELECT 1 FROM repository_blob b WHERE b.repository_id = r.id))";
    COUNT = "SELECT COUNT(*) FROM repository";
}

/// The row ids of a repository and of its namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) repository: i64,
    pub(crate) namespace: i64,
}

/// Finds a repository inside a transaction.
pub(crate) async fn find(tx: &mut Tx, name: &RepositoryName) -> Result<Option<Place>, Error> {
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

/// Finds a repository or makes it with its namespace, the first path component.
pub(crate) async fn ensure(tx: &mut Tx, name: &RepositoryName) -> Result<Place, Error> {
    if let Some(place) = find(tx, name).await? {
        return Ok(place);
    }
    let (now, id, namespace_id) = (tx.now(), tx.id(), tx.id());
    tx.execute(
        &ADD_NAMESPACE,
        &[namespace_id.into(), name.namespace().into(), now.into()],
    )
    .await?;
    let namespace = tx
        .query_opt(&FIND_NAMESPACE, &[name.namespace().into()])
        .await?
        .ok_or_else(|| Error::Database("a namespace vanished".to_owned()))?
        .i64(0)?;
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
    find(tx, name)
        .await?
        .ok_or_else(|| Error::Database("a repository vanished".to_owned()))
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

pub(crate) async fn count(db: &Db) -> Result<u64, Error> {
    crate::store::single(&db.scan(&COUNT, Vec::new()).await?)
}

fn place(row: &Row) -> Result<Place, Error> {
    Ok(Place {
        repository: row.i64(0)?,
        namespace: row.i64(1)?,
    })
}
