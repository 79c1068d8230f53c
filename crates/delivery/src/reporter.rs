//! Tells the registry what runs here: pins, so that it stays, and the ledger's records, so that it is known.
//!
//! The key decision: **a report is a courtesy and never a condition**. A runner says what it has and what it is about to
//! apply; a task of its own brings that to the registry, at its own pace. Before a release is fetched and before it is
//! applied the runner waits a few seconds for the pins to be there, so that what it names cannot vanish in between; when
//! the registry does not take them, it goes on. Nothing here can fail a deployment.
//!
//! Only a registry of this program is told anything: whether a host is one is asked first, and another one is asked again
//! an hour later. Each target is a holder of its own, `<user>/<host name>/<target>`, and replaces its whole set each time, so
//! what is no longer needed is free. Records go in the order of the ledger, after the last one that the registry knows.

use std::sync::Arc;
use std::time::Duration;

use client::longshore::api::Pin;
use oci::{Digest, Reference, RepositoryName};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::attempt;
use crate::machine::{Phase, State};
use crate::runner::clock::{Clock, jittered};
use crate::runner::disk::{Paths, Shipped};
use crate::target::Target;

pub mod wire;

use wire::{ReportError, Reports};

/// Where a runner says what is to be reported. The default one tells nobody.
#[derive(Clone, Debug, Default)]
pub struct Handle(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    wanted: watch::Sender<Wanted>,
    done: watch::Sender<Done>,
}

/// What a runner wants reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// Rises with each change of `releases`; 0: nothing was said yet.
    version: u64,
    releases: Releases,
    /// How much of the ledger is on the disk for good.
    ledger: u64,
}

/// The releases that a target needs, with why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Releases {
    needed: Vec<(Digest, &'static str)>,
    /// Whether what is being deployed is on this host, so that its images are known.
    extracted: bool,
}

impl Releases {
    /// What runs, what can be gone back to, and what is being deployed.
    pub fn of(state: &State) -> Self {
        let mut needed: Vec<(Digest, &'static str)> = Vec::new();
        let mut add = |digest: &Digest, reason| {
            if !needed.iter().any(|(known, _)| known == digest) {
                needed.push((digest.clone(), reason));
            }
        };
        if let Some(running) = &state.running {
            add(&running.digest, "runs");
        }
        if !state.is_settled()
            && let Some(attempt) = &state.attempt
        {
            add(&attempt.digest, "is being deployed");
        }
        for generation in &state.good {
            add(&generation.digest, "was good, to go back to");
        }
        Self {
            needed,
            extracted: !matches!(
                state.phase,
                Phase::Resolved | Phase::Fetched | Phase::Verified | Phase::Admitted
            ),
        }
    }
}

/// How far the reporting task is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Done {
    /// The version of the releases that are pinned.
    pinned: u64,
    /// The registry takes no reports, or not now: nobody waits for them.
    down: bool,
}

impl Handle {
    /// A handle and the other end of it, for as many reporters after each other as there will be.
    pub fn new() -> Self {
        Self(Some(Arc::new(Shared {
            wanted: watch::channel(Wanted::default()).0,
            // Until somebody reports.
            done: watch::channel(Done {
                pinned: 0,
                down: true,
            })
            .0,
        })))
    }

    /// Says which releases are needed.
    pub fn need(&self, releases: Releases) {
        if let Self(Some(shared)) = self {
            shared.wanted.send_if_modified(|wanted| {
                let changed = wanted.releases != releases || wanted.version == 0;
                if changed {
                    wanted.releases = releases;
                    wanted.version += 1;
                }
                changed
            });
        }
    }

    /// Says how long the ledger is on the disk.
    pub fn wrote(&self, bytes: u64) {
        if let Self(Some(shared)) = self {
            shared.wanted.send_if_modified(|wanted| {
                let changed = wanted.ledger != bytes;
                wanted.ledger = bytes;
                changed
            });
        }
    }

    /// Waits until what is needed is pinned, for a few seconds at most, and not at all while the registry takes no reports.
    pub async fn settle(&self) {
        let Self(Some(shared)) = self else { return };
        let version = shared.wanted.borrow().version;
        let mut done = shared.done.subscribe();
        let settled = done.wait_for(|done| done.down || done.pinned >= version);
        let _ = tokio::time::timeout(PATIENCE, settled).await;
    }
}

/// Reports for one target.
pub struct Reporter {
    /// How registries are told.
    pub reports: Arc<dyn Reports>,
    /// What it is about.
    pub target: Arc<Target>,
    /// The ledger and what is kept of releases.
    pub paths: Paths,
    /// The beginning of the holder's name; `None`: the user's and this host's.
    pub holder: Option<String>,
    /// For jitter.
    pub clock: Arc<dyn Clock>,
    /// What the runner says.
    pub handle: Handle,
}

/// What a reporter knows of the registry.
#[derive(Default)]
struct Known {
    holder: Option<String>,
    pins: Option<Vec<Pin>>,
    pinned_at: Option<Instant>,
    shipped: Option<Shipped>,
}

impl Reporter {
    /// Reports until `shutdown` is cancelled. From the call on, before the first poll, runners wait for it.
    pub fn run(self, shutdown: CancellationToken) -> impl Future<Output = ()> + Send {
        let shared = self.handle.0.clone();
        if let Some(shared) = &shared {
            shared.done.send_replace(Done::default());
        }
        async move {
            let Some(shared) = shared else { return };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                () = self.work(&shared) => {}
            }
            // Nobody waits for a reporter that has gone.
            shared.done.send_modify(|done| done.down = true);
        }
    }

    async fn work(&self, shared: &Shared) {
        let mut wanted = shared.wanted.subscribe();
        let mut known = Known::default();
        let mut failures = 0_u32;
        loop {
            let now = wanted.borrow_and_update().clone();
            let outcome = if now.version == 0 {
                // The runner has not begun.
                Ok(())
            } else {
                self.round(&now, &mut known, shared).await
            };
            let name = self.target.name.as_str();
            let host = self.target.reference.host.as_str();
            let pause = match outcome {
                Ok(()) => {
                    if failures > 0 {
                        tracing::info!(
                            target_name = name,
                            host,
                            "the registry takes reports again"
                        );
                    }
                    failures = 0;
                    REFRESH
                }
                Err(ReportError::Unsupported) => {
                    tracing::debug!(target_name = name, host, "the registry takes no reports");
                    known = Known::default();
                    shared.done.send_modify(|done| done.down = true);
                    tokio::time::sleep(jittered(NOT_OURS, &*self.clock)).await;
                    continue;
                }
                Err(ReportError::Failed(reason)) => {
                    if failures == 0 {
                        tracing::warn!(
                            target_name = name,
                            host,
                            reason,
                            "the registry cannot be told what runs here; tried again, deployments go on"
                        );
                    }
                    shared.done.send_modify(|done| done.down = true);
                    let pause = FIRST_PAUSE.saturating_mul(1 << failures.min(10));
                    failures += 1;
                    pause.min(LONGEST_PAUSE)
                }
            };
            let timer = tokio::time::sleep(jittered(pause, &*self.clock));
            tokio::pin!(timer);
            loop {
                tokio::select! {
                    () = &mut timer => break,
                    changed = wanted.changed() => {
                        if changed.is_err() {
                            return;
                        }
                    }
                }
                let pins_changed = wanted.borrow().version != now.version;
                if pins_changed {
                    break;
                }
                if failures == 0 {
                    // Records come in bursts.
                    tokio::time::sleep(BURST).await;
                    break;
                }
            }
        }
    }

    /// Brings everything that is wanted to the registry.
    async fn round(
        &self,
        wanted: &Wanted,
        known: &mut Known,
        shared: &Shared,
    ) -> Result<(), ReportError> {
        let host = self.target.reference.host.as_str();
        let holder = if let Some(holder) = &known.holder {
            holder.clone()
        } else {
            if !self.reports.takes_reports(host).await? {
                return Err(ReportError::Unsupported);
            }
            let holder = self.holder_name(host).await;
            tracing::debug!(host, holder, "the registry takes reports");
            known.holder.insert(holder).clone()
        };
        let pins = self.pins(&wanted.releases);
        let is_fresh = known.pinned_at.is_some_and(|at| at.elapsed() < REFRESH);
        if !is_fresh || known.pins.as_ref() != Some(&pins) {
            let missing = self.reports.set_pins(host, &holder, &pins).await?;
            if missing > 0 && known.pins.as_ref() != Some(&pins) {
                tracing::info!(
                    target_name = self.target.name,
                    host,
                    missing,
                    "some of what this target needs is not in the registry, its files here are kept"
                );
            }
            known.pins = Some(pins);
            known.pinned_at = Some(Instant::now());
        }
        shared.done.send_modify(|done| {
            done.pinned = wanted.version;
            done.down = false;
        });
        self.ship(host, &holder, wanted.ledger, known).await
    }

    /// The manifests that the releases are made of, in the registry that holds the releases.
    fn pins(&self, releases: &Releases) -> Vec<Pin> {
        let reference = &self.target.reference;
        let mut pins: Vec<Pin> = Vec::new();
        let mut add = |repository: &RepositoryName, digest: &Digest, reason: String| {
            let is_known = pins
                .iter()
                .any(|pin| pin.repository == *repository && pin.digest == *digest);
            if !is_known {
                pins.push(Pin {
                    repository: repository.clone(),
                    digest: digest.clone(),
                    reason,
                });
            }
        };
        for (digest, reason) in &releases.needed {
            add(&reference.repository, digest, (*reason).to_owned());
        }
        for (digest, reason) in &releases.needed {
            for image in self
                .paths
                .kept(digest)
                .map(|kept| kept.config.images)
                .into_iter()
                .flatten()
            {
                if let Ok(of) = image.reference.parse::<Reference>()
                    && of.host == reference.host
                {
                    let reason = format!("service {} of what {reason}", image.service);
                    let reason = reason.chars().take(LONGEST_REASON).collect();
                    add(&of.repository, &image.digest, reason);
                }
            }
        }
        pins
    }

    async fn holder_name(&self, host: &str) -> String {
        let name = &self.target.name;
        if let Some(holder) = &self.holder {
            return format!("{holder}/{name}");
        }
        let machine = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .replace('/', "-");
        let machine = if machine.is_empty() {
            "agent".to_owned()
        } else {
            machine
        };
        match self.reports.user(host).await {
            Some(user) if user != machine => format!("{user}/{machine}/{name}"),
            _ => format!("{machine}/{name}"),
        }
    }

    /// Sends the records of the ledger that the registry does not know, up to `length` bytes of it.
    async fn ship(
        &self,
        host: &str,
        holder: &str,
        length: u64,
        known: &mut Known,
    ) -> Result<(), ReportError> {
        let mut at = match known.shipped.take() {
            Some(shipped) if shipped.end <= length => shipped,
            _ => self.begin(host, holder, length).await?,
        };
        while at.end < length {
            let batch = self.read(at.end, length).await?;
            let (Some(last), Some(end)) = (batch.hash, batch.end) else {
                break;
            };
            let previous = batch
                .after
                .as_deref()
                .or((!at.hash.is_empty()).then_some(at.hash.as_str()));
            if !batch.records.is_empty() {
                self.reports
                    .add_attempts(host, holder, &self.target.name, previous, &batch.records)
                    .await?;
            }
            at = Shipped {
                version: Shipped::VERSION,
                host: host.to_owned(),
                holder: holder.to_owned(),
                hash: last,
                begin: batch.begin,
                end,
            };
            // Only saves a search in the ledger at the next start.
            if let Err(error) = self.paths.save_shipped(&at) {
                tracing::debug!(%error, "how far the ledger was sent is not written down");
            }
        }
        known.shipped = Some(at);
        Ok(())
    }

    /// Where to go on: after the last record that the registry knows; where the ledger has it not, after the last one that
    /// was sent; else at its beginning.
    async fn begin(&self, host: &str, holder: &str, length: u64) -> Result<Shipped, ReportError> {
        let known = self
            .reports
            .add_attempts(host, holder, &self.target.name, None, &[])
            .await?;
        let start = Shipped {
            version: Shipped::VERSION,
            host: host.to_owned(),
            holder: holder.to_owned(),
            hash: String::new(),
            begin: 0,
            end: 0,
        };
        let Some(known) = known else {
            return Ok(start);
        };
        let saved = self
            .paths
            .load_shipped()
            .filter(|saved| saved.host == host && saved.holder == holder && saved.end <= length);
        let path = self.paths.ledger();
        let found = tokio::task::spawn_blocking(move || {
            let is_there = |shipped: &Shipped| {
                attempt::hash_at(&path, shipped.begin, shipped.end).as_deref()
                    == Some(shipped.hash.as_str())
            };
            let saved = saved.filter(is_there);
            if let Some(saved) = &saved
                && saved.hash == known
            {
                return Ok(Some(saved.clone()));
            }
            let found = attempt::find(&path, &known, length)?;
            Ok::<_, std::io::Error>(
                match found {
                    Some((begin, end)) => Some(Shipped {
                        hash: known,
                        begin,
                        end,
                        ..start.clone()
                    }),
                    None => saved,
                }
                .or(Some(start)),
            )
        })
        .await
        .map_err(|error| ReportError::Failed(error.to_string()))?
        .map_err(|error| ReportError::Failed(format!("cannot read the ledger: {error}")))?;
        found.ok_or(ReportError::Unsupported)
    }

    async fn read(&self, from: u64, length: u64) -> Result<attempt::Batch, ReportError> {
        let path = self.paths.ledger();
        tokio::task::spawn_blocking(move || attempt::read_batch(&path, from, length))
            .await
            .map_err(|error| ReportError::Failed(error.to_string()))?
            .map_err(|error| ReportError::Failed(format!("cannot read the ledger: {error}")))
    }
}

/// How long a runner waits for its pins.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pins are written again this often: the registry may have been restored from a backup.
const REFRESH: Duration = Duration::from_hours(6);
/// A registry that is not ours may become ours.
const NOT_OURS: Duration = Duration::from_hours(1);
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(10);
const BURST: Duration = Duration::from_millis(500);
const LONGEST_REASON: usize = 200;

#[cfg(test)]
mod tests;
