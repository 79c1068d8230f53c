//! What applying would do, and what is seen afterwards: pure functions over the wanted services and the containers that exist.

use std::collections::{BTreeMap, BTreeSet};

use oci::Digest;

use super::record::Record;
use super::rewrite::Wanted;
use crate::engine::{Action, Change, Plan, Sample, SampleState, ServiceSample};

/// A container of the project.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Container {
    /// Its id.
    pub(super) id: String,
    /// Its name without the slash.
    pub(super) name: String,
    /// The service.
    pub(super) service: String,
    /// Made by `docker compose run`: no part of what is deployed.
    pub(super) one_off: bool,
    /// The target whose label it carries.
    pub(super) target: Option<String>,
    /// The definition hash it was made with.
    pub(super) definition: Option<String>,
    /// The image as it was asked for.
    pub(super) image: String,
    /// Its state.
    pub(super) status: Status,
    /// What its health check says.
    pub(super) health: Health,
    /// Exit code, when it ended.
    pub(super) exit_code: i64,
    /// It was killed for memory.
    pub(super) out_of_memory: bool,
    /// The engine's word on why it does not start.
    pub(super) error: String,
    /// The engine starts it again whenever it ends.
    pub(super) always_restarted: bool,
    /// How often the engine did.
    pub(super) restarts: i64,
    /// Since when it runs.
    pub(super) started_at: String,
    /// Paths on the host that it mounts.
    pub(super) mounts: Vec<String>,
}

/// A container's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Status {
    /// Made, never started.
    #[default]
    Created,
    /// Up.
    Running,
    /// Held.
    Paused,
    /// Waiting to be started again.
    Restarting,
    /// Ended.
    Exited,
    /// On its way out.
    Removing,
    /// Could not be removed.
    Dead,
}

/// What a health check says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Health {
    /// There is none.
    #[default]
    None,
    /// Not decided.
    Starting,
    /// Good.
    Healthy,
    /// Bad, for as often as it was told to try.
    Unhealthy,
}

impl Container {
    /// Ended well, and nobody starts it again: a one-shot service that did its work.
    fn finished(&self) -> bool {
        self.status == Status::Exited && self.exit_code == 0 && !self.always_restarted
    }

    /// The name that Compose was about to give a container that replaces another one: it is made as `<12 digits>_<name>` and renamed before it starts.
    /// A kill in between leaves it, and Compose itself stumbles over it for ever.
    pub(super) fn unfinished(&self) -> Option<&str> {
        let (prefix, name) = self.name.split_once('_')?;
        let temporary = prefix.len() == 12 && prefix.bytes().all(|b| b.is_ascii_hexdigit());
        (temporary && self.status == Status::Created && !name.is_empty()).then_some(name)
    }

    fn up(&self) -> bool {
        matches!(self.status, Status::Running | Status::Restarting) || self.finished()
    }

    fn describe(&self) -> String {
        let memory = if self.out_of_memory {
            ", out of memory"
        } else {
            ""
        };
        match self.status {
            Status::Created if self.error.is_empty() => "created, not started".to_owned(),
            Status::Created => format!("cannot start: {}", self.error),
            Status::Running => match self.health {
                Health::None => "running".to_owned(),
                Health::Starting => "running, health check starting".to_owned(),
                Health::Healthy => "running, healthy".to_owned(),
                Health::Unhealthy => "running, unhealthy".to_owned(),
            },
            Status::Paused => "paused".to_owned(),
            Status::Restarting => format!(
                "restarting ({} times), exited with {}{memory}",
                self.restarts, self.exit_code
            ),
            Status::Exited => format!("exited with {}{memory}", self.exit_code),
            Status::Removing => "being removed".to_owned(),
            Status::Dead => "dead".to_owned(),
        }
    }
}

/// A plan with what carrying it out needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Planned {
    /// For people and for the ledger.
    pub(super) plan: Plan,
    /// Containers of ours whose service is gone.
    pub(super) orphans: Vec<Container>,
    /// Containers that someone else put into the project and that are left alone.
    pub(super) strangers: Vec<Container>,
    /// Compose has something to do.
    pub(super) needed: bool,
}

/// Compares. `Err` says why the project is not this target's to change.
pub(super) fn plan(
    target: &str,
    adopt: bool,
    project: &str,
    wanted: &BTreeMap<String, Wanted>,
    containers: &[Container],
    record: &Record,
) -> Result<Planned, String> {
    let containers: Vec<&Container> = containers
        .iter()
        .filter(|container| !container.one_off)
        .collect();
    let ours = |container: &Container| container.target.as_deref() == Some(target);
    if !adopt {
        if let Some(other) = containers
            .iter()
            .find_map(|container| container.target.as_deref().filter(|other| *other != target))
        {
            return Err(format!(
                "the Compose project `{project}` belongs to target `{other}`; give this target another `project`, or set `adopt: true`"
            ));
        }
        let foreign = |container: &&&Container| !ours(container);
        let taken = containers
            .iter()
            .find(|container| !ours(container) && wanted.contains_key(&container.service));
        let all =
            !containers.is_empty() && containers.iter().filter(foreign).count() == containers.len();
        if let Some(container) = taken.or_else(|| containers.first().filter(|_| all)) {
            return Err(format!(
                "the Compose project `{project}` was made by someone else (container `{}` of service `{}`); give the target another `project`, or set `adopt: true` to take it over",
                container.name, container.service
            ));
        }
    }

    let mut planned = Planned::default();
    for (name, wanted) in wanted {
        let existing: Vec<&Container> = containers
            .iter()
            .copied()
            .filter(|container| container.service == *name)
            .collect();
        let (action, reason) = service_change(wanted, &existing, record);
        planned.needed |= action != Action::Keep;
        planned.plan.changes.push(Change {
            subject: name.clone(),
            action,
            reason,
        });
    }
    follow_parents(wanted, &mut planned.plan.changes);
    let mut gone: BTreeSet<&str> = BTreeSet::new();
    for container in containers
        .into_iter()
        .filter(|container| !wanted.contains_key(&container.service))
    {
        if ours(container) {
            gone.insert(&container.service);
            planned.orphans.push(container.clone());
        } else {
            planned.plan.notes.push(format!(
                "container `{}` of service `{}` is not this target's and is left alone",
                container.name, container.service
            ));
            planned.strangers.push(container.clone());
        }
    }
    planned.needed |= !gone.is_empty();
    planned
        .plan
        .changes
        .extend(gone.into_iter().map(|service| Change {
            subject: service.to_owned(),
            action: Action::Remove,
            reason: "the release no longer has this service".to_owned(),
        }));
    planned
        .plan
        .changes
        .sort_by(|a, b| a.subject.cmp(&b.subject));
    planned.plan.notes.sort();
    Ok(planned)
}

fn service_change(wanted: &Wanted, existing: &[&Container], record: &Record) -> (Action, String) {
    let there = existing.len() as u64;
    if there == 0 {
        return match wanted.replicas {
            0 => (Action::Keep, "no container wanted".to_owned()),
            1 => (Action::Create, "no container yet".to_owned()),
            more => (Action::Create, format!("{more} containers, none yet")),
        };
    }
    if let Some(old) = existing
        .iter()
        .find(|container| container.definition.as_deref() != Some(wanted.definition.as_str()))
    {
        return (Action::Recreate, difference(wanted, old, record));
    }
    let image = wanted.image_text();
    if let Some(old) = existing
        .iter()
        .find(|container| !wanted.is_image(&container.image))
    {
        return (
            Action::Recreate,
            format!("runs image `{}` instead of `{image}`", old.image),
        );
    }
    if there < wanted.replicas {
        return (
            Action::Create,
            format!("{there} of {} containers", wanted.replicas),
        );
    }
    if there > wanted.replicas {
        return (
            Action::Recreate,
            format!("{there} containers where {} are wanted", wanted.replicas),
        );
    }
    if let Some(down) = existing.iter().find(|container| !container.up()) {
        return (
            Action::Create,
            format!(
                "container `{}` is not up ({}) and is started",
                down.name,
                down.describe()
            ),
        );
    }
    (Action::Keep, "unchanged".to_owned())
}

/// A service that shares namespaces or volumes with a container names it by id, so it goes with it.
fn follow_parents(wanted: &BTreeMap<String, Wanted>, changes: &mut [Change]) {
    loop {
        let anew: BTreeSet<String> = changes
            .iter()
            .filter(|change| change.action == Action::Recreate)
            .map(|change| change.subject.clone())
            .collect();
        let mut moved = false;
        for change in changes
            .iter_mut()
            .filter(|change| change.action == Action::Keep)
        {
            if let Some(parent) = wanted
                .get(&change.subject)
                .and_then(|wanted| wanted.parents.iter().find(|parent| anew.contains(*parent)))
            {
                change.action = Action::Recreate;
                change.reason = format!("shares with service `{parent}`, which is made anew");
                moved = true;
            }
        }
        if !moved {
            return;
        }
    }
}

/// Why a container must be made anew, by names, never by values.
fn difference(wanted: &Wanted, old: &Container, record: &Record) -> String {
    let mut reasons = Vec::new();
    let image = wanted.image_text();
    if !wanted.is_image(&old.image) {
        let digest = |image: &str| {
            image.rsplit_once('@').map_or_else(
                || image.to_owned(),
                |(_, digest)| digest.chars().take(19).collect(),
            )
        };
        reasons.push(format!("image {} → {}", digest(&old.image), digest(&image)));
    }
    let Some(definition) = old.definition.as_deref() else {
        reasons.push("was made by someone else and is taken over".to_owned());
        return reasons.join("; ");
    };
    if let Some(names) = record.changed_parts(definition, &wanted.parts) {
        // `environment `A`` and `environment `B`` become one phrase.
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in names.iter().filter(|name| *name != "`image`") {
            match name.split_once(' ') {
                Some((kind, item)) => groups
                    .entry(kind.to_owned())
                    .or_default()
                    .push(item.to_owned()),
                None => groups.entry(String::new()).or_default().push(name.clone()),
            }
        }
        for (kind, items) in groups {
            let items = items.join(", ");
            reasons.push(match kind.as_str() {
                "" => format!("{items} changed"),
                "mount" => format!("mounted content of {items} changed"),
                kind => format!("{kind} {items} changed"),
            });
        }
    }
    if reasons.is_empty() {
        reasons.push("its definition changed".to_owned());
    }
    reasons.join("; ")
}

/// Judges what runs. Log lines of failed containers are not here: they cost a request each.
pub(super) fn sample(
    target: &str,
    wanted: &BTreeMap<String, Wanted>,
    containers: &[Container],
) -> Sample {
    let mut services = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for (name, wanted) in wanted {
        let existing: Vec<&Container> = containers
            .iter()
            .filter(|container| !container.one_off && container.service == *name)
            .collect();
        seen.extend(existing.iter().map(|container| {
            format!(
                "{} {} {}",
                container.id, container.started_at, container.restarts
            )
        }));
        let (state, detail) = service_state(target, wanted, &existing);
        services.push(ServiceSample {
            service: name.clone(),
            state,
            detail,
        });
    }
    seen.sort();
    let worst = |state| {
        services
            .iter()
            .any(|service: &ServiceSample| service.state == state)
    };
    let state = if worst(SampleState::Failed) {
        SampleState::Failed
    } else if worst(SampleState::Pending) {
        SampleState::Pending
    } else {
        SampleState::Healthy
    };
    Sample {
        state,
        fingerprint: Digest::sha256(seen.join("\n").as_bytes()).hex(),
        services,
    }
}

fn service_state(target: &str, wanted: &Wanted, existing: &[&Container]) -> (SampleState, String) {
    if let Some(other) = existing.iter().find(|container| {
        container.target.as_deref() != Some(target)
            || container.definition.as_deref() != Some(wanted.definition.as_str())
    }) {
        return (
            SampleState::Failed,
            format!(
                "container `{}` was made from another definition",
                other.name
            ),
        );
    }
    if let Some(other) = existing
        .iter()
        .find(|container| !wanted.is_image(&container.image))
    {
        return (
            SampleState::Failed,
            format!("container `{}` runs image `{}`", other.name, other.image),
        );
    }
    let there = existing.len() as u64;
    if there < wanted.replicas {
        let detail = if there == 0 {
            "no container".to_owned()
        } else {
            format!("{there} of {} containers", wanted.replicas)
        };
        return (SampleState::Failed, detail);
    }
    let mut details = Vec::new();
    let mut state = SampleState::Healthy;
    for container in existing {
        let this = container_state(container);
        state = match (state, this) {
            (SampleState::Failed, _) | (_, SampleState::Failed) => SampleState::Failed,
            (SampleState::Pending, _) | (_, SampleState::Pending) => SampleState::Pending,
            _ => SampleState::Healthy,
        };
        let detail = container.describe();
        if !details.contains(&detail) {
            details.push(detail);
        }
    }
    if details.is_empty() {
        details.push("no container wanted".to_owned());
    }
    (state, details.join("; "))
}

/// Judges one container.
pub(super) fn container_state(container: &Container) -> SampleState {
    match container.status {
        Status::Running => match container.health {
            Health::None | Health::Healthy => SampleState::Healthy,
            Health::Starting => SampleState::Pending,
            Health::Unhealthy => SampleState::Failed,
        },
        // A service may fall once while what it needs comes up. More than that is a crash loop; each restart changes the fingerprint in any case.
        Status::Restarting if container.restarts >= CRASH_LOOP => SampleState::Failed,
        Status::Restarting | Status::Removing | Status::Paused => SampleState::Pending,
        Status::Created if container.error.is_empty() => SampleState::Pending,
        Status::Exited if container.finished() => SampleState::Healthy,
        Status::Created | Status::Exited | Status::Dead => SampleState::Failed,
    }
}

/// So many restarts in a row are no start-up trouble.
const CRASH_LOOP: i64 = 3;

#[cfg(test)]
mod tests;
