//! Schema versions. One DDL file per engine and version; both must give the same columns.
//!
//! Versions expand and contract. A step that only adds can be applied while replicas of the previous program run, so
//! two numbers are kept in `meta`: `schema_expanded` is the newest step that was applied, and `schema` is the contract:
//! the oldest schema that a program must know to work on this database. A program refuses a contract that is newer than
//! itself, and takes an expanded schema as it is.

use std::path::{Path, PathBuf};

use tokio_postgres::Client;

use crate::error::Error;
use crate::failpoint::failpoint;

/// One step of the schema.
pub(crate) struct Migration {
    /// The version that this step leads to.
    pub(crate) version: i64,
    /// The oldest schema whose programs still work after this step: below `version` when it only adds.
    pub(crate) oldest: i64,
    pub(crate) sqlite: &'static str,
    pub(crate) postgres: &'static str,
}

/// All steps in order.
pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        oldest: 1,
        sqlite: include_str!("schema/sqlite/0001.sql"),
        postgres: include_str!("schema/postgres/0001.sql"),
    },
    Migration {
        version: 2,
        oldest: 1,
        sqlite: include_str!("schema/sqlite/0002.sql"),
        postgres: include_str!("schema/postgres/0002.sql"),
    },
];

/// Where a database stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    /// The oldest schema that a program must know.
    contract: i64,
    /// The newest step that was applied.
    expanded: i64,
}

impl Standing {
    const EMPTY: Self = Self {
        contract: 0,
        expanded: 0,
    };

    /// By the two values of `meta`. The first program wrote only one.
    fn of(place: &Path, schema: Option<&str>, expanded: Option<&str>) -> Result<Self, Error> {
        let number = |text: &str| text.parse::<i64>().ok().filter(|number| *number > 0);
        let contract = schema
            .and_then(number)
            .ok_or_else(|| Error::damaged(place, "it has no schema version"))?;
        let expanded = match expanded {
            None => contract,
            Some(text) => number(text)
                .ok_or_else(|| Error::damaged(place, "it has no schema version"))?
                .max(contract),
        };
        Ok(Self { contract, expanded })
    }

    /// The steps to apply and where they lead.
    fn ahead(self, steps: &[Migration]) -> (Vec<&Migration>, Self) {
        let ahead: Vec<_> = steps
            .iter()
            .filter(|step| step.version > self.expanded)
            .collect();
        let after = ahead.iter().fold(self, |standing, step| Self {
            contract: standing.contract.max(step.oldest),
            expanded: step.version,
        });
        (ahead, after)
    }

    fn check(self, place: &Path, steps: &[Migration]) -> Result<(), Error> {
        let known = steps.last().map_or(0, |step| step.version);
        if self.contract > known {
            let parent = place.parent();
            let parent = parent.filter(|parent| !parent.as_os_str().is_empty());
            return Err(Error::Newer {
                dir: parent.unwrap_or(place).to_owned(),
                found: self.contract,
                known,
            });
        }
        Ok(())
    }

    /// Wants it to be what this program knows, for one that only looks.
    fn check_as_it_is(self, place: &Path, steps: &[Migration]) -> Result<(), Error> {
        self.check(place, steps)?;
        if self.ahead(steps).0.is_empty() {
            return Ok(());
        }
        let known = steps.last().map_or(0, |step| step.version);
        Err(Error::unusable(
            place,
            format!(
                "it has schema {}, and this program reads schema {known}: start `longshore serve` of this version on it \
                 once, which brings it up to date, or use the program that wrote it",
                self.expanded
            ),
        ))
    }
}

/// Brings the file to the newest version. An existing file is first copied beside itself.
pub(super) fn migrate_sqlite(
    connection: &mut rusqlite::Connection,
    path: &Path,
    make: bool,
    migrations: &[Migration],
) -> Result<(), Error> {
    let map = super::sqlite::map;
    let found = match standing_of_file(connection, path)? {
        Some(found) => found,
        None if make => Standing::EMPTY,
        None => return Err(without_tables(path)),
    };
    found.check(path, migrations)?;
    let (ahead, after) = found.ahead(migrations);
    if ahead.is_empty() {
        return Ok(());
    }
    if found != Standing::EMPTY {
        failpoint("migrate.before_copy");
        copy(connection, path, after.expanded)?;
        failpoint("migrate.after_copy");
    }
    let tx = connection.transaction().map_err(map)?;
    for step in ahead {
        tx.execute_batch(step.sqlite).map_err(map)?;
        failpoint("migrate.after_step");
    }
    for (key, version) in [
        ("schema", after.contract),
        ("schema_expanded", after.expanded),
    ] {
        tx.execute(
            "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            [key, &version.to_string()],
        )
        .map_err(map)?;
    }
    failpoint("migrate.before_commit");
    tx.commit().map_err(map)?;
    failpoint("migrate.after_commit");
    Ok(())
}

/// Wants a file that is only looked at to have the schema that this program knows.
pub(super) fn check_sqlite(
    connection: &rusqlite::Connection,
    path: &Path,
    migrations: &[Migration],
) -> Result<(), Error> {
    standing_of_file(connection, path)?
        .ok_or_else(|| without_tables(path))?
        .check_as_it_is(path, migrations)
}

/// Refuses a file whose schema is newer than this program, for one that reads only what every schema has.
pub(crate) fn refuse_newer_sqlite(
    connection: &rusqlite::Connection,
    path: &Path,
) -> Result<(), Error> {
    standing_of_file(connection, path)?
        .ok_or_else(|| without_tables(path))?
        .check(path, MIGRATIONS)
}

/// Where a file stands; `None` when it holds no tables.
fn standing_of_file(
    connection: &rusqlite::Connection,
    path: &Path,
) -> Result<Option<Standing>, Error> {
    let map = super::sqlite::map;
    let present: bool = connection
        .query_row(
            "SELECT COUNT(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = 'meta'",
            [],
            |row| row.get(0),
        )
        .map_err(map)?;
    if !present {
        return Ok(None);
    }
    let (schema, expanded): (Option<String>, Option<String>) = connection
        .query_row(STANDING, [], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(map)?;
    Standing::of(path, schema.as_deref(), expanded.as_deref()).map(Some)
}

fn without_tables(path: &Path) -> Error {
    Error::damaged(
        path,
        "it holds no tables, restore the directory from a backup",
    )
}

/// Copies the database with everything that its log holds to `meta.db.before-<version>`, durably.
fn copy(connection: &rusqlite::Connection, path: &Path, version: i64) -> Result<(), Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".before-{version}"));
    let target = PathBuf::from(name);
    let partial = target.with_extension("partial");
    for stale in [&partial, &target] {
        match std::fs::remove_file(stale) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", stale, error));
            }
            _ => {}
        }
    }
    connection
        .execute("VACUUM INTO ?1", [partial.to_string_lossy()])
        .map_err(super::sqlite::map)?;
    std::fs::File::open(&partial)
        .and_then(|file| file.sync_all())
        .map_err(|error| Error::io("sync", &partial, error))?;
    std::fs::rename(&partial, &target).map_err(|error| Error::io("rename", &partial, error))?;
    if let Some(parent) = target.parent() {
        std::fs::File::open(parent)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| Error::io("sync", parent, error))?;
    }
    tracing::info!(copy = %target.display(), version, "the database was copied before its migration");
    Ok(())
}

/// Wants the schema to be the one that this program knows.
pub(super) async fn check_postgres(client: &Client, migrations: &[Migration]) -> Result<(), Error> {
    let place = Path::new("the PostgreSQL database");
    let found = standing(client, place).await?;
    if found == Standing::EMPTY {
        return Err(Error::unusable(
            place,
            "it holds no store, start `longshore serve` on it first",
        ));
    }
    found.check_as_it_is(place, migrations)
}

/// Brings the schema to the newest version under an advisory lock, so that replicas that start together
/// do it once.
pub(super) async fn migrate_postgres(
    client: &Client,
    migrations: &[Migration],
) -> Result<(), Error> {
    let place = Path::new("the PostgreSQL database");
    let map = super::postgres::map;
    // Most starts find nothing to do, and a server that takes no writes can be looked at.
    let found = standing(client, place).await?;
    found.check(place, migrations)?;
    if found.ahead(migrations).0.is_empty() {
        return Ok(());
    }
    // Changes of tables wait for transactions of running replicas, and everybody else waits for them: not for long.
    client
        .batch_execute(
            "BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; \
             SELECT pg_advisory_xact_lock(5577006791947779410); SET LOCAL lock_timeout = '5s'",
        )
        .await
        .map_err(map)?;
    // Whoever had the lock before may have done it.
    let found = standing(client, place).await?;
    found.check(place, migrations)?;
    let (ahead, after) = found.ahead(migrations);
    for step in ahead {
        client.batch_execute(step.postgres).await.map_err(map)?;
        failpoint("migrate.after_step");
    }
    failpoint("migrate.before_commit");
    client
        .batch_execute(&format!(
            "INSERT INTO meta (key, value) VALUES ('schema', '{}'), ('schema_expanded', '{}') \
             ON CONFLICT (key) DO UPDATE SET value = excluded.value; COMMIT",
            after.contract, after.expanded
        ))
        .await
        .map_err(map)?;
    failpoint("migrate.after_commit");
    Ok(())
}

async fn standing(client: &Client, place: &Path) -> Result<Standing, Error> {
    let map = super::postgres::map;
    let present = client
        .query_one(
            "SELECT COUNT(*) FROM information_schema.tables \
             WHERE table_schema = current_schema() AND table_name = 'meta'",
            &[],
        )
        .await
        .map_err(map)?
        .get::<_, i64>(0)
        > 0;
    if !present {
        return Ok(Standing::EMPTY);
    }
    let row = client.query_one(STANDING, &[]).await.map_err(map)?;
    let (schema, expanded): (Option<String>, Option<String>) = (row.get(0), row.get(1));
    Standing::of(place, schema.as_deref(), expanded.as_deref())
}

const STANDING: &str = "SELECT (SELECT value FROM meta WHERE key = 'schema'), \
    (SELECT value FROM meta WHERE key = 'schema_expanded')";
