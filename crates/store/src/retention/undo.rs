//! Putting back what a run removed.

use oci::{Digest, Manifest, RepositoryName, Tag};

use crate::error::Error;
use crate::model::{Actor, Expected, TagWrite};
use crate::sql::{Body, Tx, WriteKind, statements};
use crate::store::Store;
use crate::tag::{self, Change, Target};
use crate::{audit, event, manifest, repository};

statements! {
    REMOVED = "SELECT repository, tag FROM retention_decision \
               WHERE run_id = $1 AND action = 'remove' AND undone_at IS NULL AND (repository, tag) > ($2, $3) \
               ORDER BY repository, tag LIMIT $4";
    TAKE = "SELECT d.digest FROM retention_decision d JOIN retention_run r ON r.id = d.run_id \
            WHERE d.run_id = $1 AND d.repository = $2 AND d.tag = $3 AND d.action = 'remove' \
                AND d.undone_at IS NULL AND r.dry_run = 0";
    UNDONE = "UPDATE retention_decision SET undone_at = $4 WHERE run_id = $1 AND repository = $2 AND tag = $3";
}

/// What became of a tag that was to be put back.
#[derive(Clone, Debug)]
pub struct Undone {
    /// Where.
    pub repository: RepositoryName,
    /// The tag.
    pub tag: Tag,
    /// It points to this again.
    pub restored: Option<Digest>,
    /// Why it does not, when it does not.
    pub problem: Option<String>,
}

impl Store {
    /// Tags that a run removed and that were not put back, after `after`.
    ///
    /// # Errors
    /// [`Error::Database`], [`Error::Stopped`].
    pub async fn retention_removed(
        &self,
        run: i64,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<(RepositoryName, Tag)>, Error> {
        let (repository, tag) = after.unwrap_or_default();
        let values = vec![run.into(), repository.into(), tag.into(), limit.into()];
        self.0
            .db
            .scan(&REMOVED, values)
            .await?
            .iter()
            .map(|row| Ok((row.parse(0)?, row.parse(1)?)))
            .collect()
    }

    /// Puts one tag back that a run removed, when no tag of that name is there and its manifest still is.
    ///
    /// # Errors
    /// As for every call that writes; what speaks against putting it back is in the answer.
    pub async fn undo_retention(
        &self,
        run: i64,
        repository: &RepositoryName,
        tag: &Tag,
        actor: &Actor,
    ) -> Result<Undone, Error> {
        let outcome = self
            .0
            .db
            .write(Undo {
                run,
                repository: repository.clone(),
                tag: tag.clone(),
                actor: actor.clone(),
                lease: self.0.untagged(repository),
            })
            .await;
        let (restored, problem) = match outcome {
            Ok(Ok(digest)) => (Some(digest), None),
            Ok(Err(problem)) => (None, Some(problem)),
            Err(Error::Precondition { actual, .. }) => {
                let now =
                    actual.map_or_else(String::new, |digest| format!(", it points to `{digest}`"));
                (
                    None,
                    Some(format!("there is a tag of this name again{now}")),
                )
            }
            Err(error) => return Err(error),
        };
        Ok(Undone {
            repository: repository.clone(),
            tag: tag.clone(),
            restored,
            problem,
        })
    }
}

struct Undo {
    run: i64,
    repository: RepositoryName,
    tag: Tag,
    actor: Actor,
    lease: std::time::Duration,
}

impl Body for Undo {
    type Output = Result<Digest, String>;
    const KIND: WriteKind = WriteKind::User;

    async fn run(&self, tx: &mut Tx) -> Result<Result<Digest, String>, Error> {
        let key = [
            self.run.into(),
            self.repository.as_str().into(),
            self.tag.as_str().into(),
        ];
        let writes = [TagWrite {
            tag: self.tag.clone(),
            expected: Expected::Absent,
            may_create: true,
            may_overwrite: false,
        }];
        let place = repository::find(tx, &self.repository).await?;
        let taken = match place {
            Some(place) => Some((place, tag::take_all(tx, place.repository, &writes).await?)),
            None => None,
        };
        let Some(row) = tx.query_opt(&TAKE, &key).await? else {
            return Ok(Err(
                "this run did not remove it, or it was put back already".to_owned(),
            ));
        };
        let digest = row.digest(0)?;
        let gone = || format!("its manifest `{digest}` is gone");
        let Some((place, taken)) = taken else {
            return Ok(Err(gone()));
        };
        let Some(id) = manifest::share(tx, place.repository, &digest).await? else {
            return Ok(Err(gone()));
        };
        let body = manifest::body(tx, id).await?;
        let media_type = manifest::media_type(tx, id).await?;
        let Ok(view) = Manifest::parse(&body, &media_type) else {
            return Ok(Err(format!("manifest `{digest}` cannot be read")));
        };
        let change = Change {
            place,
            repository: &self.repository,
            actor: &self.actor,
            lease: self.lease,
        };
        let target = Target {
            manifest: id,
            digest: &digest,
            size: body.len() as u64,
            view: &view,
        };
        let mut events = Vec::new();
        tag::set(tx, &change, &target, taken, &mut events).await?;
        let now = tx.now();
        let [run, repository, tag] = key;
        tx.execute(&UNDONE, &[run, repository, tag, now.into()])
            .await?;
        event::write(tx, &events, &self.actor).await?;
        let name = format!("{}:{}", self.repository, self.tag.as_str());
        audit::allowed(tx, &self.actor, "retention.undo", name).await?;
        Ok(Ok(digest))
    }
}
