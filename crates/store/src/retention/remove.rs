//! The removal: what a plan says, a few tags in one transaction, each only where it is still as it was judged.

use std::time::Duration;

use oci::{Digest, RepositoryName, Tag};

use super::{PINNED, STAYED, system};
use crate::error::Error;
use crate::sql::{Body, Tx, WriteKind};
use crate::tag::{self, Change};
use crate::{audit, event, repository};

/// A tag as the plan saw it.
pub(super) struct Planned {
    pub(super) tag: Tag,
    pub(super) digest: Digest,
    pub(super) generation: i64,
}

/// Removes a few tags of one repository.
pub(super) struct Remove {
    pub(super) run: i64,
    pub(super) repository: RepositoryName,
    pub(super) tags: Vec<Planned>,
    pub(super) lease: Duration,
}

impl Body for Remove {
    type Output = ();
    const KIND: WriteKind = WriteKind::Delete;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let actor = system();
        let Some(place) = repository::find(tx, &self.repository).await? else {
            return Ok(());
        };
        let change = Change {
            place,
            repository: &self.repository,
            actor: &actor,
            lease: self.lease,
        };
        let now = tx.now();
        let mut events = Vec::new();
        for planned in &self.tags {
            let pinned = tx
                .query_opt(
                    &PINNED,
                    &[
                        place.repository.into(),
                        (&planned.digest).into(),
                        now.into(),
                    ],
                )
                .await?
                .is_some();
            let stays = if pinned {
                Some("it was pinned after the plan")
            } else {
                let removed = tag::remove_unmoved(
                    tx,
                    &change,
                    &planned.tag,
                    planned.generation,
                    &planned.digest,
                    &mut events,
                )
                .await?;
                (!removed).then_some("it moved after the plan")
            };
            if let Some(reason) = stays {
                tx.execute(
                    &STAYED,
                    &[
                        self.run.into(),
                        self.repository.as_str().into(),
                        planned.tag.as_str().into(),
                        reason.into(),
                    ],
                )
                .await?;
            } else {
                let target = format!("{}:{}", self.repository, planned.tag.as_str());
                audit::allowed(tx, &actor, "tag.delete", target).await?;
            }
        }
        event::write(tx, &events, &actor).await.map(drop)
    }
}
