//! The cost of the collector: no statement that runs per candidate walks a table.

use crate::sql::{MIGRATIONS, Statement, registry};

/// Statements that an operator's question and the statistics run, not the collector; and one over an index that holds
/// only what failed.
const MAY_WALK: [&str; 6] = [
    "store::blob::TOTALS",
    "store::collect::queue::FAILED",
    "store::collect::queue::LENGTHS",
    "store::collect::outbox::COUNT",
    "store::collect::outbox::WAITING",
    "store::tag::COUNT",
];

#[test]
fn no_statement_of_the_collector_walks_a_table() {
    let database = rusqlite::Connection::open_in_memory().unwrap();
    for step in MIGRATIONS {
        database.execute_batch(step.sqlite).unwrap();
    }
    let rooms = [
        "store::blob::",
        "store::collect::",
        "store::lease::",
        "store::manifest::",
        "store::pin::",
        "store::referrer::",
        "store::repository::",
        "store::tag::",
    ];
    let mut walks = Vec::new();
    for statement in registry() {
        let looked_at = rooms.iter().any(|room| statement.name.starts_with(room));
        if !looked_at || MAY_WALK.contains(&statement.name) {
            continue;
        }
        for line in plan(&database, statement) {
            // What stands in a WITH or a sub-query of a bounded number of rows is walked on purpose.
            let table = line
                .strip_prefix("SCAN ")
                .map(|rest| rest.split(' ').next().unwrap_or_default().to_owned());
            let walks_rows = table.is_some_and(|table| !["due", "d", "CONSTANT"].contains(&&*table))
                // An index that holds the order is walked only as far as the LIMIT.
                && !statement.sqlite().contains("LIMIT");
            if walks_rows || line.contains("AUTOMATIC") {
                walks.push(format!("{}: {line}", statement.name));
            }
        }
    }
    assert!(walks.is_empty(), "{walks:#?}");
}

#[test]
fn edges_are_filled_by_the_index_of_those_that_are_not() {
    let database = rusqlite::Connection::open_in_memory().unwrap();
    for step in MIGRATIONS {
        database.execute_batch(step.sqlite).unwrap();
    }
    for (name, index) in [
        ("store::manifest::FILL_BLOB", "manifest_blob_unfilled"),
        ("store::manifest::FILL_CHILD", "manifest_child_unfilled"),
    ] {
        let statement = registry().find(|statement| statement.name == name).unwrap();
        let plan = plan(&database, statement).join("\n");
        assert!(plan.contains(index), "{name}: {plan}");
    }
}

fn plan(database: &rusqlite::Connection, statement: &Statement) -> Vec<String> {
    let text = format!("EXPLAIN QUERY PLAN {}", statement.sqlite());
    let mut prepared = database.prepare(&text).unwrap();
    let values = vec![rusqlite::types::Null; prepared.parameter_count()];
    let rows = prepared
        .query_map(rusqlite::params_from_iter(values), |row| row.get(3))
        .unwrap();
    rows.map(Result::unwrap).collect()
}
