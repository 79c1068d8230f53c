//! The tables of a store, in an order in which rows can be inserted, and how each is carried.
//!
//! Columns come from the schema of both sides at the time of the transfer; only what cannot be read from there stands
//! here: the order, the key that pages follow, and the few tables that are not carried as they are. A test compares
//! this list with the schema of both engines.

use std::sync::Arc;

use serde_json::json;

use super::Report;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::sql::{Body, Db, Row, Statement, Tx, Value, WriteKind};

/// A table, and how it is carried.
pub(crate) struct Table {
    pub(crate) name: &'static str,
    /// The primary key, which pages follow.
    pub(crate) key: &'static [&'static str],
    pub(crate) carry: Carry,
    /// Rows of a page.
    page: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carry {
    /// Row for row.
    Whole,
    /// By the objects' pass.
    Blobs,
    /// The facts of a place stay there.
    Meta,
    /// Without the uploads.
    Queue,
    /// Numbered where the destination wants numbers at once.
    Events,
    /// Only where the objects stay.
    WithObjects,
    /// Not at all.
    Left,
}

const fn whole(name: &'static str, key: &'static [&'static str]) -> Table {
    table(name, key, Carry::Whole, 500)
}

const fn table(
    name: &'static str,
    key: &'static [&'static str],
    carry: Carry,
    page: usize,
) -> Table {
    Table {
        name,
        key,
        carry,
        page,
    }
}

/// Every table; what a row points to stands before it.
pub(crate) const TABLES: &[Table] = &[
    table("meta", &["key"], Carry::Meta, 500),
    whole("counter", &["name"]),
    whole("token_key", &["id"]),
    whole("namespace", &["id"]),
    whole("repository", &["id"]),
    table("blob", &["id"], Carry::Blobs, 128),
    whole("repository_blob", &["repository_id", "blob_id"]),
    // A manifest may have some MiB.
    table("manifest", &["id"], Carry::Whole, 16),
    whole("damaged_manifest", &["manifest_id"]),
    whole("manifest_blob", &["manifest_id", "digest"]),
    whole("manifest_child", &["manifest_id", "digest"]),
    whole("referrer", &["repository_id", "subject", "digest"]),
    whole("tag", &["repository_id", "name"]),
    whole("tag_event", &["repository_id", "name", "generation"]),
    table("upload", &["id"], Carry::Left, 1),
    table(
        "collection_queue",
        &["kind", "repository_id", "target_id"],
        Carry::Queue,
        500,
    ),
    table("deletion", &["storage_key"], Carry::WithObjects, 500),
    table("event", &["number"], Carry::Events, 500),
    whole("usage_delta", &["id"]),
    whole("usage_total", &["namespace_id"]),
    whole("audit", &["id"]),
    whole("chain", &["name"]),
    whole("pin_holder", &["holder"]),
    whole("pin", &["holder", "repository_id", "digest"]),
    table("attempt", &["id"], Carry::Whole, 100),
    whole("repository_total", &["repository_id"]),
    whole("pull", &["repository_id", "digest", "principal", "hour"]),
    whole("retention_run", &["id"]),
    whole("retention_decision", &["run_id", "repository", "tag"]),
    // What became of the last commits of sessions that are gone.
    table("commit_mark", &["session"], Carry::Left, 1),
];

/// What says where a store is and how it stands, and is not carried.
pub(crate) const OF_THE_PLACE: [&str; 7] = [
    "schema",
    "schema_expanded",
    "mode",
    crate::identity::KEY,
    JOURNAL,
    LEAVING,
    MOVED,
];
/// The row of `meta` that a destination has while it is being filled.
pub(crate) const JOURNAL: &str = "migration";
/// What that row says while [`crate::reindex()`] fills it.
pub(crate) const REINDEX: &str = "reindex";
/// The row of `meta` that a PostgreSQL source has while it is being carried away.
pub(crate) const LEAVING: &str = "leaving";
/// The row of `meta` that a source has after it was carried away.
pub(crate) const MOVED: &str = "moved";

/// The names of all tables of a database.
pub(crate) async fn names(tx: &mut Tx) -> Result<Vec<String>, Error> {
    let text = if tx.is_postgres() {
        "SELECT CAST(table_name AS TEXT) AS name FROM information_schema.tables \
         WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'"
    } else {
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    };
    let statement = Statement::made(text.to_owned());
    let mut names = tx
        .query(statement, &[])
        .await?
        .iter()
        .map(|row| row.text(0))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort();
    Ok(names)
}

/// The columns of a table in bytewise order.
pub(crate) async fn columns(tx: &mut Tx, table: &str) -> Result<Vec<String>, Error> {
    let text = if tx.is_postgres() {
        format!(
            "SELECT CAST(column_name AS TEXT) AS name FROM information_schema.columns \
             WHERE table_schema = current_schema() AND table_name = '{table}'"
        )
    } else {
        format!("SELECT name FROM pragma_table_info('{table}')")
    };
    let statement = Statement::made(text);
    let mut columns = tx
        .query(statement, &[])
        .await?
        .iter()
        .map(|row| row.text(0))
        .collect::<Result<Vec<_>, _>>()?;
    columns.sort();
    Ok(columns)
}

/// Reads a table page by page in the order of its key.
pub(crate) struct Pages {
    first: &'static Statement,
    next: &'static Statement,
    keys: Vec<usize>,
    last: Option<Vec<Value>>,
    page: usize,
    ended: bool,
}

impl Pages {
    pub(crate) fn new(table: &Table, key: &[&str], columns: &[String]) -> Self {
        let (name, list) = (table.name, columns.join(", "));
        let order = key.join(", ");
        let marks: Vec<String> = (1..=key.len()).map(|at| format!("${at}")).collect();
        let page = table.page;
        Self {
            first: Statement::made(format!(
                "SELECT {list} FROM {name} ORDER BY {order} LIMIT {page}"
            )),
            next: Statement::made(format!(
                "SELECT {list} FROM {name} WHERE ({order}) > ({}) ORDER BY {order} LIMIT {page}",
                marks.join(", ")
            )),
            keys: key
                .iter()
                .filter_map(|key| columns.iter().position(|column| column == key))
                .collect(),
            last: None,
            page,
            ended: false,
        }
    }

    /// The next rows; empty at the end.
    pub(crate) async fn next(&mut self, tx: &mut Tx) -> Result<Vec<Row>, Error> {
        if self.ended {
            return Ok(Vec::new());
        }
        let rows = match &self.last {
            None => tx.query(self.first, &[]).await?,
            Some(last) => tx.query(self.next, last).await?,
        };
        self.ended = rows.len() < self.page;
        if let Some(row) = rows.last() {
            let values = row.clone().into_values();
            let last = self
                .keys
                .iter()
                .filter_map(|at| values.get(*at).cloned())
                .collect();
            self.last = Some(last);
        }
        Ok(rows)
    }
}

/// Empties a database that a reindex did not fill to its end. Counters, keys and the audit record were there before.
pub(crate) async fn empty(db: &Db) -> Result<(), Error> {
    for table in TABLES.iter().rev() {
        if !["meta", "counter", "token_key", "chain", "audit"].contains(&table.name) {
            clear(db, table, "").await?;
        }
    }
    Ok(())
}

/// Deletes rows of a table, a page in each transaction: a statement has a limit of time, whatever the size of the table.
async fn clear(db: &Db, table: &Table, condition: &str) -> Result<(), Error> {
    // On PostgreSQL an event may have no number yet.
    let key = match db {
        Db::Postgres(_) if table.carry == Carry::Events => &["ordinal"][..],
        _ => table.key,
    };
    let mut page = ClearPage::new(table.name, key, condition);
    while let Some(last) = db.write(page.clone()).await? {
        page.after = Some(last);
    }
    Ok(())
}

/// Deletes the rows of the next page of keys; tells the last key, or nothing at the end.
#[derive(Clone)]
struct ClearPage {
    first: &'static Statement,
    next: &'static Statement,
    delete_first: &'static Statement,
    delete_next: &'static Statement,
    after: Option<Vec<Value>>,
}

impl ClearPage {
    fn new(name: &str, key: &[&str], condition: &str) -> Self {
        let (key, count) = (key.join(", "), key.len());
        let marks = |from: usize| {
            let marks: Vec<String> = (from..from + count).map(|at| format!("${at}")).collect();
            marks.join(", ")
        };
        let (low, high) = (marks(1), marks(count + 1));
        let page = CLEARED_AT_ONCE;
        Self {
            first: Statement::made(format!(
                "SELECT {key} FROM {name} ORDER BY {key} LIMIT {page}"
            )),
            next: Statement::made(format!(
                "SELECT {key} FROM {name} WHERE ({key}) > ({low}) ORDER BY {key} LIMIT {page}"
            )),
            delete_first: Statement::made(format!(
                "DELETE FROM {name} WHERE ({key}) <= ({low}){condition}"
            )),
            delete_next: Statement::made(format!(
                "DELETE FROM {name} WHERE ({key}) > ({low}) AND ({key}) <= ({high}){condition}"
            )),
            after: None,
        }
    }
}

impl Body for ClearPage {
    type Output = Option<Vec<Value>>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Self::Output, Error> {
        let after = self.after.as_deref().unwrap_or_default();
        let page = match &self.after {
            None => tx.query(self.first, &[]).await?,
            Some(_) => tx.query(self.next, after).await?,
        };
        let whole = page.len() == CLEARED_AT_ONCE;
        let Some(last) = page.into_iter().next_back().map(Row::into_values) else {
            return Ok(None);
        };
        let delete = match &self.after {
            None => self.delete_first,
            Some(_) => self.delete_next,
        };
        tx.execute(delete, &[after, &last].concat()).await?;
        Ok(whole.then_some(last))
    }
}

/// Counts the rows of a table.
pub(crate) async fn count(tx: &mut Tx, table: &str, condition: &str) -> Result<u64, Error> {
    let statement = Statement::made(format!("SELECT COUNT(*) AS rows FROM {table} {condition}"));
    crate::store::single(&tx.query(statement, &[]).await?)
}

/// What carrying the tables needs to know.
pub(crate) struct Carrying<'a> {
    pub(crate) to: &'a Db,
    /// The objects stay where they are.
    pub(crate) objects_stay: bool,
    pub(crate) to_postgres: bool,
}

impl Carrying<'_> {
    /// Empties every table of the destination but the blobs, which the objects' pass keeps.
    pub(crate) async fn wipe(&self) -> Result<(), Error> {
        for table in TABLES.iter().rev() {
            let condition = match table.carry {
                Carry::Blobs | Carry::Left => continue,
                // What the objects' pass put there is ours.
                Carry::WithObjects if !self.objects_stay => continue,
                Carry::Meta => format!(
                    " AND key NOT IN ({})",
                    OF_THE_PLACE.map(|key| format!("'{key}'")).join(", ")
                ),
                _ => String::new(),
            };
            clear(self.to, table, &condition).await?;
        }
        failpoint("carry.after_wipe");
        Ok(())
    }

    /// Carries every table but the blobs out of the snapshot `from`.
    pub(crate) async fn carry(&self, from: &mut Tx, report: &mut Report) -> Result<(), Error> {
        for table in TABLES {
            if matches!(table.carry, Carry::Blobs | Carry::Left)
                || table.carry == Carry::WithObjects && !self.objects_stay
            {
                continue;
            }
            let rows = self.table(from, table).await?;
            report.rows.insert(table.name, rows);
        }
        if self.objects_stay {
            self.discard_uploads(from).await?;
        }
        if self.to_postgres {
            // Numbers of rows to come go on after those that came.
            let statement = Statement::made(
                "SELECT setval(pg_get_serial_sequence('event', 'ordinal'), \
                     (SELECT COALESCE(MAX(ordinal), 0) + 1 FROM event), false) AS ordinal"
                    .to_owned(),
            );
            self.to.write(Execute(vec![statement])).await?;
        }
        failpoint("carry.after_tables");
        Ok(())
    }

    async fn table(&self, from: &mut Tx, table: &Table) -> Result<u64, Error> {
        let mut columns = columns(from, table.name).await?;
        let ordered = from.is_postgres() && table.carry == Carry::Events;
        let key = if ordered { &["ordinal"][..] } else { table.key };
        let mut pages = Pages::new(table, key, &columns);
        let events = match table.carry {
            Carry::Events => Some(EventColumns::of(&columns, from).await?),
            _ => None,
        };
        // SQLite has no use for the order, and PostgreSQL gives its own where none comes.
        let dropped = events
            .as_ref()
            .filter(|_| !(ordered && self.to_postgres))
            .map(|events| events.ordinal);
        if let Some(at) = dropped {
            columns.remove(at);
        }
        let insert = Insert::new(table, &columns);
        let mut carried = 0;
        let mut next_number = events.as_ref().map_or(0, |events| events.newest);
        loop {
            let rows = pages.next(from).await?;
            if rows.is_empty() {
                break;
            }
            let mut out = Vec::with_capacity(rows.len());
            for row in rows {
                let mut values = row.into_values();
                match table.carry {
                    Carry::Meta if is_of_the_place(&columns, &values) => continue,
                    Carry::Queue if is_upload(&columns, &values) => continue,
                    _ => {}
                }
                if let Some(events) = &events {
                    if values.get(events.number) == Some(&Value::Null) && !self.to_postgres {
                        next_number += 1;
                        values[events.number] = Value::I64(next_number);
                    }
                    if let Some(at) = dropped {
                        values.remove(at);
                    }
                }
                out.push(values);
            }
            carried += out.len() as u64;
            self.to.write(insert.rows(out)).await?;
            failpoint("carry.after_page");
        }
        if let Some(events) = events
            && next_number != events.newest
        {
            self.to.write(SetNewest(next_number)).await?;
        }
        Ok(carried)
    }

    /// The objects of uploads that are not carried go out through the outbox, as those of every upload that ends.
    async fn discard_uploads(&self, from: &mut Tx) -> Result<(), Error> {
        let uploads = Statement::made(
            "SELECT storage_key, tail_key, next_tail_key, multipart, parts FROM upload".to_owned(),
        );
        let mut out = Vec::new();
        for row in from.query(uploads, &[]).await? {
            let multipart = match (row.opt_text(3)?, row.opt_text(4)?) {
                (Some(id), _) => Value::Text(id),
                // Its id may never have been recorded.
                (None, Some(_)) => Value::Text(String::new()),
                (None, None) => Value::Null,
            };
            for (column, multipart) in [(0, multipart), (1, Value::Null), (2, Value::Null)] {
                if let Some(key) = row.opt_text(column)? {
                    out.push((key, multipart));
                }
            }
        }
        for page in out.chunks(DISCARDED_AT_ONCE) {
            self.to.write(Discard(page.to_vec())).await?;
        }
        Ok(())
    }
}

/// Compares every row of every carried table; what differs is in the report.
pub(crate) async fn compare(
    from: &mut Tx,
    to: &mut Tx,
    whole: bool,
    report: &mut Report,
) -> Result<(), Error> {
    for table in TABLES {
        let condition = match table.carry {
            Carry::Left | Carry::WithObjects => continue,
            Carry::Queue => "WHERE kind <> 'upload'".to_owned(),
            Carry::Meta => format!(
                "WHERE key NOT IN ({})",
                OF_THE_PLACE.map(|key| format!("'{key}'")).join(", ")
            ),
            _ => String::new(),
        };
        let (source, destination) = (
            count(from, table.name, &condition).await?,
            count(to, table.name, &condition).await?,
        );
        report.rows.insert(table.name, destination);
        if source != destination {
            report.problems.push(format!(
                "table `{}` has {source} rows at the source and {destination} at the destination",
                table.name
            ));
            continue;
        }
        if whole && table.carry == Carry::Whole && table.name != "counter" {
            let columns = columns(from, table.name).await?;
            let mut theirs = Pages::new(table, table.key, &columns);
            let mut ours = Pages::new(table, table.key, &columns);
            loop {
                let (a, b) = (theirs.next(from).await?, ours.next(to).await?);
                let equal = a.len() == b.len()
                    && a.iter()
                        .zip(&b)
                        .all(|(a, b)| a.clone().into_values() == b.clone().into_values());
                if !equal {
                    report
                        .problems
                        .push(format!("rows of table `{}` differ", table.name));
                    break;
                }
                if a.is_empty() {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn is_of_the_place(columns: &[String], values: &[Value]) -> bool {
    let key = columns.iter().position(|column| column == "key");
    matches!(key.and_then(|at| values.get(at)),
        Some(Value::Text(key)) if OF_THE_PLACE.contains(&key.as_str()))
}

fn is_upload(columns: &[String], values: &[Value]) -> bool {
    let kind = columns.iter().position(|column| column == "kind");
    kind.and_then(|at| values.get(at)) == Some(&Value::Text("upload".to_owned()))
}

/// Where the columns of events stand that are treated by themselves.
struct EventColumns {
    number: usize,
    ordinal: usize,
    /// The newest number given.
    newest: i64,
}

impl EventColumns {
    async fn of(columns: &[String], from: &mut Tx) -> Result<Self, Error> {
        let at = |name: &str| {
            columns
                .iter()
                .position(|column| column == name)
                .ok_or_else(|| Error::Database(format!("events have no column `{name}`")))
        };
        let newest = Statement::made("SELECT value FROM counter WHERE name = 'event'".to_owned());
        let newest = from
            .query_opt(newest, &[])
            .await?
            .map_or(Ok(0), |row| row.i64(0))?;
        Ok(Self {
            number: at("number")?,
            ordinal: at("ordinal")?,
            newest,
        })
    }
}

/// The statements that insert rows of one table.
#[derive(Clone, Copy)]
pub(crate) struct Insert {
    many: &'static Statement,
    one: &'static Statement,
    at_once: usize,
}

impl Insert {
    pub(crate) fn new(table: &Table, columns: &[String]) -> Self {
        // SQLite binds no more than 32 766 values.
        let at_once = (30_000 / columns.len().max(1)).min(table.page).max(1);
        let text = |rows: usize| {
            let rows: Vec<String> = (0..rows)
                .map(|row| {
                    let marks: Vec<String> = (1..=columns.len())
                        .map(|column| format!("${}", row * columns.len() + column))
                        .collect();
                    format!("({})", marks.join(", "))
                })
                .collect();
            format!(
                "INSERT INTO {} ({}) VALUES {}",
                table.name,
                columns.join(", "),
                rows.join(", ")
            )
        };
        Self {
            many: Statement::made(text(at_once)),
            one: Statement::made(text(1)),
            at_once,
        }
    }

    pub(crate) fn rows(&self, rows: Vec<Vec<Value>>) -> InsertRows {
        InsertRows {
            many: self.many,
            one: self.one,
            at_once: self.at_once,
            rows: Arc::new(rows),
        }
    }
}

pub(crate) struct InsertRows {
    many: &'static Statement,
    one: &'static Statement,
    at_once: usize,
    rows: Arc<Vec<Vec<Value>>>,
}

impl Body for InsertRows {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for chunk in self.rows.chunks(self.at_once) {
            if chunk.len() == self.at_once {
                tx.execute(self.many, &chunk.concat()).await?;
            } else {
                for row in chunk {
                    tx.execute(self.one, row).await?;
                }
            }
        }
        Ok(())
    }
}

struct Execute(Vec<&'static Statement>);

impl Body for Execute {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        for statement in &self.0 {
            // One of them answers with a row.
            tx.query(statement, &[]).await?;
        }
        Ok(())
    }
}

struct SetNewest(i64);

impl Body for SetNewest {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let statement =
            Statement::made("UPDATE counter SET value = $1 WHERE name = 'event'".to_owned());
        tx.execute(statement, &[self.0.into()]).await.map(drop)
    }
}

struct Discard(Vec<(String, Value)>);

impl Body for Discard {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let statement = discard_statement();
        let now: Timestamp = tx.now();
        for (key, multipart) in &self.0 {
            tx.execute(statement, &[key.into(), now.into(), multipart.clone()])
                .await?;
        }
        Ok(())
    }
}

/// Puts an object into the outbox.
pub(crate) fn discard_statement() -> &'static Statement {
    Statement::made(
        "INSERT INTO deletion (storage_key, due_at, attempts, multipart) VALUES ($1, $2, 0, $3) \
             ON CONFLICT (storage_key) DO NOTHING"
            .to_owned(),
    )
}

/// What a destination's journal says: whose content it is being filled with.
pub(crate) fn journal(epoch: &str) -> String {
    json!({"version": 1, "source": epoch}).to_string()
}

/// Rows that one transaction deletes where a table is emptied.
const CLEARED_AT_ONCE: usize = 2000;
/// Objects that one transaction puts into the outbox.
const DISCARDED_AT_ONCE: usize = 500;
