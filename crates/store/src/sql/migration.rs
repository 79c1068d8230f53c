//! Schema versions. One DDL file per engine and version; both must give the same columns.

use std::path::{Path, PathBuf};

use rusqlite::OptionalExtension;
use tokio_postgres::Client;

use crate::error::Error;

/// One step of the schema.
pub(crate) struct Migration {
    /// The version that this step leads to.
    pub(crate) version: i64,
    pub(crate) sqlite: &'static str,
    pub(crate) postgres: &'static str,
}

/// All steps in order.
pub(crate) const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        sqlite: include_str!("schema/sqlite/0001.sql"),
        postgres: include_str!("schema/postgres/0001.sql"),
    },
    Migration {
        version: 2,
        sqlite: include_str!("schema/sqlite/0002.sql"),
        postgres: include_str!("schema/postgres/0002.sql"),
    },
];

/// Brings the file to the newest version. An existing file is first copied beside itself.
pub(super) fn migrate_sqlite(
    connection: &mut rusqlite::Connection,
    path: &Path,
    make: bool,
    migrations: &[Migration],
) -> Result<(), Error> {
    let map = super::sqlite::map;
    let known = migrations.last().map_or(0, |step| step.version);
    let present: bool = connection
        .query_row(
            "SELECT COUNT(*) > 0 FROM sqlite_schema WHERE type = 'table' AND name = 'meta'",
            [],
            |row| row.get(0),
        )
        .map_err(map)?;
    let found = if present {
        let text: Option<String> = connection
            .query_row("SELECT value FROM meta WHERE key = 'schema'", [], |row| {
                row.get(0)
            })
            .optional()
            .map_err(map)?;
        parse(path, text.as_deref())?
    } else if make {
        0
    } else {
        return Err(Error::damaged(
            path,
            "it holds no tables, restore the directory from a backup",
        ));
    };
    check_version(path, found, known)?;
    if found == known {
        return Ok(());
    }
    if found > 0 {
        copy(connection, path, known)?;
    }
    let tx = connection.transaction().map_err(map)?;
    for step in migrations.iter().filter(|step| step.version > found) {
        tx.execute_batch(step.sqlite).map_err(map)?;
    }
    tx.execute(
        "INSERT INTO meta (key, value) VALUES ('schema', ?1) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        [known.to_string()],
    )
    .map_err(map)?;
    tx.commit().map_err(map)
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

/// Brings the schema to the newest version under an advisory lock, so that replicas that start together
/// do it once.
pub(super) async fn migrate_postgres(
    client: &Client,
    migrations: &[Migration],
) -> Result<(), Error> {
    let place = Path::new("postgres");
    let known = migrations.last().map_or(0, |step| step.version);
    let run = async {
        client
            .batch_execute("BEGIN; SELECT pg_advisory_xact_lock(5577006791947779410)")
            .await?;
        let present = client
            .query_one(
                "SELECT COUNT(*) FROM information_schema.tables \
                 WHERE table_schema = current_schema() AND table_name = 'meta'",
                &[],
            )
            .await?
            .get::<_, i64>(0)
            > 0;
        let text = if present {
            client
                .query_opt("SELECT value FROM meta WHERE key = 'schema'", &[])
                .await?
                .map(|row| row.get::<_, String>(0))
        } else {
            Some("0".to_owned())
        };
        Ok::<_, tokio_postgres::Error>(text)
    };
    let text = run.await.map_err(|error| super::postgres::map(&error))?;
    let found = parse(place, text.as_deref())?;
    check_version(place, found, known)?;
    let run = async {
        for step in migrations.iter().filter(|step| step.version > found) {
            client.batch_execute(step.postgres).await?;
        }
        client
            .batch_execute(&format!(
                "INSERT INTO meta (key, value) VALUES ('schema', '{known}') \
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value; COMMIT"
            ))
            .await
    };
    run.await.map_err(|error| super::postgres::map(&error))
}

fn parse(path: &Path, text: Option<&str>) -> Result<i64, Error> {
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::damaged(path, "it has no schema version"))
}

fn check_version(path: &Path, found: i64, known: i64) -> Result<(), Error> {
    if found > known {
        return Err(Error::Newer {
            dir: path.parent().unwrap_or(path).to_owned(),
            found,
            known,
        });
    }
    Ok(())
}
