//! The collector: what nothing keeps any more goes, all the time, without a pause, a mark phase or a list.
//!
//! Every change that takes away a reason to stay puts what may have lost its last one into the queue ([`queue`]) with
//! a due time, in the same transaction. A [`worker`] on each replica claims what is due and looks at one candidate per
//! transaction ([`candidate`]): it locks the candidate's row, looks in a new statement for what keeps it
//! ([`liveness`]), and deletes the row or lets it be. Objects are deleted later, from the [`outbox`] alone (`I5`).
//! The cost is that of what changed.
//!
//! # Why it is safe beside every writer
//!
//! SQLite has one writer, so transactions do not interleave. On PostgreSQL at READ COMMITTED a statement sees what
//! was committed before it began, and a statement that waited for a row lock goes on with the newest version of that
//! row. The argument rests on one pair of rules:
//!
//! - whoever makes an edge to a row holds a lock on that row, at least KEY SHARE, from its look to its commit;
//! - the collector holds FOR UPDATE, which excludes KEY SHARE, from *before* the statements that look for edges.
//!
//! So for each writer and each candidate one of the two is first, and there are two cases to check:
//!
//! | writer | it is first | the collector is first |
//! |---|---|---|
//! | PUT that names a blob or child | the collector waits for its commit, then sees the edge | the look waits, finds no row: `MANIFEST_BLOB_UNKNOWN`, and the lease was over |
//! | PUT of the same manifest again | `ON CONFLICT` holds the row: the collector then reads the new lease | the insert waits, then inserts a new row with all its edges |
//! | tag set to the manifest | as the PUT that it is part of | as the PUT that it is part of |
//! | HEAD that renews (`I7`) | the collector reads the new lease with the lock | the update waits, changes no row: 404 |
//! | HEAD that need not renew | the lease runs on, or an edge is there: its removal renews, at or after this answer | no edge and no lease: it would have renewed |
//! | commit of the same blob | `ON CONFLICT` holds the blob's row: the collector then sees the new hold | the insert waits, then inserts a new row with its own object, under a key of its own |
//! | commit while the hold is collected | the upsert of the pair holds it: the collector reads the new lease | the upsert waits, then inserts a new pair |
//! | mount | KEY SHARE on the source pair: that stays, so the blob stays | the source is gone: 202, the client uploads |
//! | mount while the blob is collected | impossible: a pair is committed and locked | the foreign key of the new pair fails, the mount runs again, finds no source: 202 |
//! | pin | as a tag, through its foreign key | the foreign key fails, the pin is refused |
//! | tag moved away | its lease is renewed and the candidate put in again, in one transaction | the candidate was kept because of the tag; the move puts it in again |
//! | tag moved back | as the PUT that it is part of | the manifest had no tag and no lease at that moment |
//!
//! Two edges hold no lock. A *NULL edge* (a foreign layer, sparse content) names a digest whose row is not there, so
//! there is nothing to lock; the collector looks for edges by digest and finds it all the same, and fills it when it
//! finds the target. Only an edge that is uncommitted while its target is committed and looked at can be missed, and
//! that target is younger than the transaction of the edge: its lease has just begun. A *subject* need not exist
//! either; a referrer that comes while its subject goes waits for a subject that never came.
//!
//! What keeps a candidate may go between the look and the commit, because only its own row is locked. Whoever takes
//! it away puts the candidate in again, which the collector's last statement does not undo: it removes only the row
//! that was claimed.
//!
//! The order of locks is that of [`crate::sql`].

mod candidate;
mod dry_run;
mod explain;
mod liveness;
mod outbox;
mod pace;
mod queue;
mod repository;
mod settings;
mod worker;

pub use dry_run::{DryRun, DryRunItem};
pub use explain::{Kept, Reason};
pub use outbox::OutboxLength;
pub(crate) use outbox::{count as count_deletions, discard, discard_blob, discard_multipart};
pub(crate) use queue::{Changes as QueueChanges, change as change_queue, enqueue, forget};
pub use queue::{Kind, QueueLag, QueueLength};
pub use settings::{GcOptions, Window, WindowError};
pub use worker::{CollectionStatus, CollectionTotals};
pub(crate) use worker::{Collector, drain, work};

/// The statements of all parts.
pub(crate) static STATEMENTS: [&[&crate::sql::Statement]; 6] = [
    queue::STATEMENTS,
    outbox::STATEMENTS,
    liveness::STATEMENTS,
    repository::STATEMENTS,
    worker::STATEMENTS,
    explain::STATEMENTS,
];

#[cfg(test)]
mod tests;
