//! Usage per namespace: append-only deltas with a folded total, so that no push waits for a shared row
//! (`I17`).

use crate::error::Error;
use crate::repository::Place;
use crate::sql::{Body, Db, Tx, WriteKind, statements};

statements! {
    ADD = "INSERT INTO usage_delta (id, namespace_id, bytes, objects, at) VALUES ($1, $2, $3, $4, $5)";
    TAKE = "DELETE FROM usage_delta WHERE id IN (SELECT id FROM usage_delta ORDER BY id LIMIT 1000) \
            RETURNING namespace_id, bytes, objects";
    FOLD = "INSERT INTO usage_total (namespace_id, bytes, objects, folded_at) VALUES ($1, $2, $3, $4) \
            ON CONFLICT (namespace_id) DO UPDATE SET bytes = usage_total.bytes + excluded.bytes, \
                objects = usage_total.objects + excluded.objects, folded_at = excluded.folded_at";
    TOTAL = "SELECT CAST(COALESCE((SELECT t.bytes FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                 + COALESCE((SELECT SUM(d.bytes) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS bytes, \
                 CAST(COALESCE((SELECT t.objects FROM usage_total t WHERE t.namespace_id = n.id), 0) \
                 + COALESCE((SELECT SUM(d.objects) FROM usage_delta d WHERE d.namespace_id = n.id), 0) AS BIGINT) AS objects \
             FROM namespace n WHERE n.name = $1";
}

/// Notes a change of what a repository's namespace uses.
pub(crate) async fn add(tx: &mut Tx, place: Place, bytes: i64, objects: i64) -> Result<(), Error> {
    let (id, now) = (tx.id(), tx.now());
    tx.execute(
        &ADD,
        &[
            id.into(),
            place.namespace.into(),
            bytes.into(),
            objects.into(),
            now.into(),
        ],
    )
    .await
    .map(drop)
}

/// Bytes and objects of a namespace: what was folded and what was not yet.
pub(crate) async fn total(db: &Db, namespace: &str) -> Result<(i64, i64), Error> {
    let rows = db.read(&TOTAL, &[namespace.into()]).await?;
    rows.first()
        .map_or(Ok((0, 0)), |row| Ok((row.i64(0)?, row.i64(1)?)))
}

/// Folds deltas into totals; `true` when there was something to fold.
pub(crate) struct Fold;

impl Body for Fold {
    type Output = bool;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<bool, Error> {
        let mut sums = std::collections::BTreeMap::<i64, (i64, i64)>::new();
        for row in tx.query(&TAKE, &[]).await? {
            let sum = sums.entry(row.i64(0)?).or_default();
            sum.0 += row.i64(1)?;
            sum.1 += row.i64(2)?;
        }
        let now = tx.now();
        for (namespace, (bytes, objects)) in &sums {
            tx.execute(
                &FOLD,
                &[
                    (*namespace).into(),
                    (*bytes).into(),
                    (*objects).into(),
                    now.into(),
                ],
            )
            .await?;
        }
        Ok(!sums.is_empty())
    }
}
