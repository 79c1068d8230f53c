//! Named points at which a test kills the process.
//!
//! With the feature `failpoints`, `LONGSHORE_FAILPOINT=name` or `name:n` makes the process kill itself
//! (SIGKILL) the n-th time it passes the point. Without the feature a point is nothing at all.

use crate::model::Options;

/// Every point, in the order in which a push passes them.
pub(crate) const NAMES: &[&str] = &[
    "upload.before_row",
    "upload.after_row",
    "upload.before_spill",
    "upload.after_spill_row",
    "upload.after_create",
    "upload.after_write",
    "upload.before_sync",
    "upload.after_sync",
    "upload.after_entry_sync",
    "upload.before_record",
    "upload.in_record",
    "upload.after_record",
    "commit.before_sync",
    "commit.after_sync",
    "commit.after_entry_sync",
    "commit.before_transaction",
    "commit.after_upload_row",
    "commit.after_blob_row",
    "commit.after_lease",
    "commit.after_transaction",
    "manifest.before_transaction",
    "manifest.after_references",
    "manifest.after_row",
    "manifest.after_edges",
    "manifest.after_tags",
    "manifest.after_event",
    "manifest.after_audit",
    "manifest.after_transaction",
    "tag.before_set",
    "tag.after_row",
    "tag.after_history",
    "pin.before_add",
    "pin.before_change",
    "pin.before_remove",
    "pin.after_rows",
    "pin.before_expire",
    "delete.before_rows",
    "delete.after_rows",
    "sql.before_commit",
    "sql.after_commit",
    "collect.before_claim",
    "collect.after_claim",
    "collect.before_lock",
    "collect.after_lock",
    "collect.before_rows",
    "collect.after_rows",
    "collect.after_edges",
    "collect.before_forget",
    "collect.after_transaction",
    "collect.before_hide",
    "collect.after_hide",
    "collect.before_step",
    "collect.after_step",
    "outbox.before_remove",
    "outbox.after_remove",
    "outbox.after_entry_sync",
    "outbox.after_rows",
    "retention.before_remove",
    "retention.after_remove",
    "seal.before",
    "seal.after_numbers",
    "seal.after_events",
    "audit.before_seal",
    "audit.after_seal",
    "import.before_row",
    "import.after_row",
    "import.after_place",
    "import.after_sync",
    "carry.after_journal",
    "carry.after_blob_rows",
    "carry.after_object",
    "carry.after_objects",
    "carry.after_wipe",
    "carry.after_page",
    "carry.after_tables",
    "carry.after_format",
    "carry.after_moved",
    "migrate.before_copy",
    "migrate.after_copy",
    "migrate.after_step",
    "migrate.before_commit",
    "migrate.after_commit",
    "backup.after_object",
    "backup.after_objects",
    "backup.before_copy",
    "backup.after_copy",
    "backup.after_line",
    "backup.before_segment",
    "backup.after_segment",
    "backup.after_fold",
    "backup.after_unline",
    "export.after_part",
    "export.after_set",
    "restore.after_database",
    "restore.after_objects",
    "restore.before_format",
];

/// Points that are passed only where objects are in an object store.
pub(crate) const OBJECT_STORE_NAMES: &[&str] = &[
    "upload.after_name_row",
    "upload.after_create_multipart",
    "upload.after_multipart_row",
    "upload.after_part",
    "upload.after_tail",
    "commit.before_complete",
    "commit.after_complete",
    "outbox.after_abort",
];

/// Points that are passed only where the database is PostgreSQL.
#[cfg(feature = "failpoints")]
pub(crate) const POSTGRES_NAMES: &[&str] = &["carry.after_leaving"];

/// Passes the point of this name.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn failpoint(_name: &str) {}

/// Passes the point of this name.
#[cfg(feature = "failpoints")]
pub(crate) fn failpoint(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static ARMED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    debug_assert!(
        [NAMES, OBJECT_STORE_NAMES, POSTGRES_NAMES]
            .iter()
            .any(|names| names.contains(&name)),
        "`{name}` is not in the list of failpoints"
    );
    let armed = ARMED.get_or_init(|| {
        let text = std::env::var("LONGSHORE_FAILPOINT").ok()?;
        match text.split_once(':') {
            Some((name, count)) => Some((name.to_owned(), count.parse().ok()?)),
            None => Some((text, 1)),
        }
    });
    if let Some((armed, count)) = armed
        && armed == name
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count
    {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Tells whether a test has planted the bug of this name (`LONGSHORE_TEST_BUG=name`), to show that it is found.
#[cfg(feature = "failpoints")]
pub(crate) fn planted(name: &str) -> bool {
    static BUG: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    BUG.get_or_init(|| std::env::var("LONGSHORE_TEST_BUG").ok())
        .as_deref()
        == Some(name)
}

impl Options {
    /// Lays what a test asks for in the environment over these settings: `LONGSHORE_TEST_LEASE=2s` makes leases
    /// shorter than a configuration may, so that a test sees them end, and with them the time that deleted objects wait. Without the feature `failpoints` it does nothing.
    #[doc(hidden)]
    pub fn test_switches(&mut self) {
        #[cfg(feature = "failpoints")]
        if let Ok(text) = std::env::var("LONGSHORE_TEST_LEASE") {
            if let Some(lease) = test_period(&text) {
                self.lease = lease;
                self.gc.beyond_lease = std::time::Duration::ZERO;
                self.gc.read_grace = self.gc.read_grace.min(lease);
                self.gc.keep_deleted = self.gc.keep_deleted.min(lease);
            } else {
                tracing::error!(
                    text,
                    "`LONGSHORE_TEST_LEASE` is no period, write `2s` or `500ms`"
                );
            }
        }
    }
}

#[cfg(feature = "failpoints")]
fn test_period(text: &str) -> Option<std::time::Duration> {
    let (number, millis) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s')?, 1000),
    };
    let number: u64 = number.trim().parse().ok()?;
    Some(std::time::Duration::from_millis(number * millis))
}

/// Tells whether a test runs the process with leases of seconds (`LONGSHORE_TEST_LEASE`).
#[cfg(feature = "failpoints")]
pub(crate) fn short_leases() -> bool {
    static SHORT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *SHORT.get_or_init(|| std::env::var_os("LONGSHORE_TEST_LEASE").is_some())
}
