//! Statements: written once, prepared and executed on both engines.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// One SQL text for both engines.
///
/// The fragments in braces (`{for update}`, `{for key share}`, `{skip locked}` …) stand for PostgreSQL's row locks and for nothing on
/// SQLite. A text that begins with `{postgres}` is for PostgreSQL alone.
pub(crate) struct Statement {
    pub(crate) name: &'static str,
    text: &'static str,
    sqlite: OnceLock<String>,
    postgres: OnceLock<String>,
    ran_on_sqlite: AtomicBool,
    ran_on_postgres: AtomicBool,
}

impl Statement {
    pub(crate) const fn new(name: &'static str, text: &'static str) -> Self {
        Self {
            name,
            text,
            sqlite: OnceLock::new(),
            postgres: OnceLock::new(),
            ran_on_sqlite: AtomicBool::new(false),
            ran_on_postgres: AtomicBool::new(false),
        }
    }

    /// A statement whose text is made from the schema, when a store is carried to another place. Each text is made
    /// once and never given back: there are a few for each table.
    pub(crate) fn made(text: String) -> &'static Self {
        static MADE: Mutex<BTreeMap<String, &'static Statement>> = Mutex::new(BTreeMap::new());
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = made.get(&text) {
            return known;
        }
        let leaked: &'static str = Box::leak(text.clone().into_boxed_str());
        let statement: &'static Self = Box::leak(Box::new(Self::new(leaked, leaked)));
        made.insert(text, statement);
        statement
    }

    /// The text for SQLite. `$3` would be bound there by its first appearance, `?3` is bound by number.
    pub(crate) fn sqlite(&self) -> &str {
        self.sqlite.get_or_init(|| {
            let mut text = self.text.replace('$', "?");
            for (fragment, _) in FRAGMENTS {
                text = text.replace(fragment, "");
            }
            text
        })
    }

    /// The text for PostgreSQL.
    pub(super) fn postgres(&self) -> &str {
        self.postgres.get_or_init(|| {
            let mut text = self.text.replace(POSTGRES_ALONE, "");
            for (fragment, lock) in FRAGMENTS {
                text = text.replace(fragment, lock);
            }
            text
        })
    }

    pub(super) fn mark_sqlite(&self) {
        self.ran_on_sqlite.store(true, Ordering::Relaxed);
    }

    pub(super) fn mark_postgres(&self) {
        self.ran_on_postgres.store(true, Ordering::Relaxed);
    }

    /// On which engines this statement has run in this process. One for PostgreSQL alone lacks nothing on SQLite.
    pub(crate) fn ran(&self) -> (bool, bool) {
        (
            self.text.starts_with(POSTGRES_ALONE) || self.ran_on_sqlite.load(Ordering::Relaxed),
            self.ran_on_postgres.load(Ordering::Relaxed),
        )
    }
}

/// Declares the statements of a room and its list `STATEMENTS`, so that none can be forgotten.
macro_rules! statements {
    ($($(#[$meta:meta])* $name:ident = $text:expr;)*) => {
        $(
            $(#[$meta])*
            static $name: $crate::sql::Statement =
                $crate::sql::Statement::new(concat!(module_path!(), "::", stringify!($name)), $text);
        )*
        pub(crate) static STATEMENTS: &[&$crate::sql::Statement] = &[$(&$name),*];
    };
}
pub(crate) use statements;

/// Every statement of every room.
pub(crate) fn registry() -> impl Iterator<Item = &'static Statement> {
    [
        crate::attempt::STATEMENTS,
        crate::adopt::STATEMENTS,
        crate::audit::STATEMENTS,
        crate::blob::STATEMENTS,
        crate::event::STATEMENTS,
        crate::export::STATEMENTS,
        crate::identity::STATEMENTS,
        crate::lease::STATEMENTS,
        crate::manifest::STATEMENTS,
        crate::meta::STATEMENTS,
        crate::mode::STATEMENTS,
        crate::pin::STATEMENTS,
        crate::pull::STATEMENTS,
        crate::referrer::STATEMENTS,
        crate::reindex::STATEMENTS,
        crate::repository::STATEMENTS,
        crate::retention::STATEMENTS,
        crate::retention::undo::STATEMENTS,
        crate::scrub::STATEMENTS,
        super::STATEMENTS,
        crate::tag::STATEMENTS,
        crate::upload::STATEMENTS,
        crate::usage::STATEMENTS,
        crate::usage::SHARING_STATEMENTS,
        crate::verify::STATEMENTS,
    ]
    .into_iter()
    .chain(crate::collect::STATEMENTS)
    .flatten()
    .copied()
}

const POSTGRES_ALONE: &str = "{postgres}";
const FRAGMENTS: [(&str, &str); 7] = [
    ("{for update of rb}", "FOR UPDATE OF rb"),
    ("{for key share of rb}", "FOR KEY SHARE OF rb"),
    ("{for update}", "FOR UPDATE"),
    ("{for key share}", "FOR KEY SHARE"),
    ("{for no key update}", "FOR NO KEY UPDATE"),
    (
        "{for no key update, skip locked}",
        "FOR NO KEY UPDATE SKIP LOCKED",
    ),
    ("{skip locked}", "FOR UPDATE SKIP LOCKED"),
];
