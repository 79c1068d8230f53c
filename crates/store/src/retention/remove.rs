//! The removal: what a plan says, a few tags in one transaction, each only where it is still as it was judged.

use std::collections::BTreeMap;
use std::time::Duration;

use oci::{RepositoryName, Tag};

use super::{PINNED, STAYED, system};
use crate::error::Error;
use crate::sql::{Body, Tx, WriteKind};
use crate::tag::{self, Change, Judged};
use crate::{audit, event, repository};

/// Removes a few tags of one repository.
pub(super) struct Remove {
    pub(super) run: i64,
    pub(super) repository: RepositoryName,
    pub(super) tags: Vec<Judged>,
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
        let (mut pinned, mut doomed) = (Vec::new(), Vec::new());
        for planned in &self.tags {
            let key = [
                place.repository.into(),
                (&planned.digest).into(),
                now.into(),
            ];
            if tx.query_opt(&PINNED, &key).await?.is_some() {
                pinned.push(planned);
            } else {
                doomed.push(planned);
            }
        }
        let moved = tag::remove_unmoved(tx, &change, &doomed, &mut events).await?;
        let stayed = pinned
            .iter()
            .map(|planned| (*planned, "it was pinned after the plan"));
        let stayed: BTreeMap<&Tag, &str> = stayed
            .chain(
                moved
                    .iter()
                    .map(|planned| (*planned, "it moved after the plan")),
            )
            .map(|(planned, reason)| (&planned.tag, reason))
            .collect();
        for planned in &self.tags {
            if let Some(reason) = stayed.get(&planned.tag) {
                tx.execute(
                    &STAYED,
                    &[
                        self.run.into(),
                        self.repository.as_str().into(),
                        planned.tag.as_str().into(),
                        (*reason).into(),
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
