//! A host and a registry made of memory, for tests of the runner and the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use oci::evidence::RawEvidence;
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest};

use crate::engine::{
    Action, Applied, BoxFuture, Change, Deployment, Engine, EngineError, EngineInfo, Plan, Sample,
    SampleState, ServiceSample,
};
use crate::release::{EngineKind, FetchedRelease, ReleaseConfig, Variable};
use crate::runner::clock::Clock;
use crate::runner::source::{Events, Source, SourceError, Sources, StreamError};
use crate::target::{Health, Rollback, Target};

/// Everything that a test sets and looks at.
#[derive(Default)]
pub(crate) struct World {
    /// What the tag points to.
    pub(crate) channel: Option<Digest>,
    pub(crate) releases: BTreeMap<String, ReleaseConfig>,
    pub(crate) signed: BTreeSet<String>,
    pub(crate) registry_down: bool,
    /// It takes requests and never answers.
    pub(crate) registry_silent: bool,
    /// `head`, `fetch`, `evidence`, `extract`, `plan`, `pull`, `apply`, `observe`, in the order of their calls.
    pub(crate) calls: Vec<&'static str>,
    /// What runs.
    pub(crate) running: Option<Digest>,
    /// An apply was cut off in the middle.
    pub(crate) half_applied: bool,
    pub(crate) unhealthy: BTreeSet<String>,
    /// Healthy, but another container at every look.
    pub(crate) crash_looping: BTreeSet<String>,
    pub(crate) engine_down: bool,
    pub(crate) plan_error: Option<EngineError>,
    pub(crate) extract_error: Option<String>,
    /// The call that never comes back, counted from 1: there the process dies.
    pub(crate) crash_at: Option<usize>,
    looks: u64,
    /// What the engine was last told to keep.
    pub(crate) kept: Vec<Digest>,
}

/// A handle on the world; the source, the engine, and the clock.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    world: Arc<Mutex<World>>,
    crashed: Arc<tokio::sync::Notify>,
    events:
        Arc<Mutex<Option<tokio::sync::mpsc::UnboundedReceiver<client::longshore::StreamEvent>>>>,
}

impl Fake {
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// A release of `shop`, known to the registry, signed.
    pub(crate) fn release(&self, version: &str) -> Digest {
        let digest = Digest::sha256(version.as_bytes());
        let config = ReleaseConfig {
            schema_version: 1,
            name: "shop".to_owned(),
            version: Some(version.to_owned()),
            engine: EngineKind::Compose,
            entry: vec!["compose.yaml".to_owned()],
            variables: vec![Variable {
                name: "PORT".to_owned(),
                default: Some("80".to_owned()),
                required: false,
            }],
            images: Vec::new(),
        };
        let mut world = self.world();
        world.releases.insert(digest.to_string(), config);
        world.signed.insert(digest.to_string());
        digest
    }

    /// A release that the tag points to from now on.
    pub(crate) fn push(&self, version: &str) -> Digest {
        let digest = self.release(version);
        self.world().channel = Some(digest.clone());
        digest
    }

    /// Opens the next event stream with this sender's other end.
    pub(crate) fn stream(
        &self,
    ) -> tokio::sync::mpsc::UnboundedSender<client::longshore::StreamEvent> {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        *self.events.lock().unwrap() = Some(receiver);
        sender
    }

    pub(crate) fn count(&self, call: &str) -> usize {
        self.world()
            .calls
            .iter()
            .filter(|other| **other == call)
            .count()
    }

    /// Comes back when a crash point was reached.
    pub(crate) async fn crashed(&self) {
        self.crashed.notified().await;
    }

    async fn called(&self, call: &'static str) {
        let crash = {
            let mut world = self.world();
            world.calls.push(call);
            world.crash_at == Some(world.calls.len())
        };
        if crash {
            self.crashed.notify_one();
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
    }
}

pub(crate) fn target() -> Target {
    Target {
        name: "shop".to_owned(),
        reference: "registry.example:5000/shop/release:production"
            .parse()
            .unwrap(),
        release: "shop".to_owned(),
        engine: EngineKind::Compose,
        project: "shop".to_owned(),
        variables: BTreeMap::new(),
        profiles: Vec::new(),
        trust: Some(trust::Policy {
            name: "shop".to_owned(),
            keys: Vec::new(),
            threshold: 1,
        }),
        health: Health {
            stability: Duration::from_secs(10),
            timeout: Duration::from_mins(1),
            interval: Duration::from_secs(1),
            http: Vec::new(),
            command: Vec::new(),
        },
        rollback: Rollback::Auto,
        adopt: false,
        files: None,
    }
}

impl Clock for Fake {
    fn now(&self) -> jiff::Timestamp {
        "2026-11-21T05:00:00Z".parse().unwrap()
    }

    fn random(&self) -> u64 {
        100
    }
}

impl Sources for Fake {
    fn source(&self, _config: &client::Config) -> Result<Arc<dyn Source>, String> {
        Ok(Arc::new(self.clone()))
    }

    fn events<'a>(
        &'a self,
        _config: &'a client::Config,
        _host: &'a str,
        _after: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Box<dyn Events>, StreamError>> {
        Box::pin(async move {
            match self.events.lock().unwrap().take() {
                Some(receiver) => Ok(Box::new(FakeEvents(receiver)) as Box<dyn Events>),
                None => Err(StreamError::Unsupported),
            }
        })
    }
}

struct FakeEvents(tokio::sync::mpsc::UnboundedReceiver<client::longshore::StreamEvent>);

impl Events for FakeEvents {
    fn next(
        &mut self,
    ) -> BoxFuture<'_, Result<Option<client::longshore::StreamEvent>, StreamError>> {
        Box::pin(async { Ok(self.0.recv().await) })
    }
}

impl Source for Fake {
    fn head<'a>(
        &'a self,
        _target: &'a Target,
        reference: &'a TagOrDigest,
    ) -> BoxFuture<'a, Result<Digest, SourceError>> {
        Box::pin(async move {
            self.called("head").await;
            if self.world().registry_silent {
                std::future::pending::<()>().await;
            }
            let world = self.world();
            if world.registry_down {
                return Err(SourceError::Unavailable(
                    "cannot reach the registry".to_owned(),
                ));
            }
            match reference {
                TagOrDigest::Digest(digest) => Ok(digest.clone()),
                TagOrDigest::Tag(_) => world
                    .channel
                    .clone()
                    .ok_or(SourceError::Unavailable("no such tag".to_owned())),
            }
        })
    }

    fn fetch<'a>(
        &'a self,
        _target: &'a Target,
        digest: &'a Digest,
        staging: &'a Path,
    ) -> BoxFuture<'a, Result<FetchedRelease, SourceError>> {
        Box::pin(async move {
            self.called("fetch").await;
            let world = self.world();
            if world.registry_down {
                return Err(SourceError::Unavailable(
                    "cannot reach the registry".to_owned(),
                ));
            }
            let config = world.releases.get(&digest.to_string()).cloned();
            let config = config.ok_or(SourceError::Unavailable("no such release".to_owned()))?;
            let layer = staging.join("layer");
            std::fs::write(&layer, config.version.as_deref().unwrap_or_default()).unwrap();
            Ok(FetchedRelease {
                descriptor: Descriptor::new(
                    "application/vnd.oci.image.manifest.v1+json",
                    digest.clone(),
                    1,
                ),
                config,
                format: "longshore".to_owned(),
                layers: vec![(Descriptor::of("tar", b"layer"), layer)],
            })
        })
    }

    fn extract<'a>(
        &'a self,
        release: &'a FetchedRelease,
        directory: &'a Path,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            self.called("extract").await;
            if let Some(error) = self.world().extract_error.clone() {
                return Err(SourceError::Unavailable(error));
            }
            std::fs::create_dir(directory).unwrap();
            std::fs::copy(&release.layers[0].1, directory.join("version")).unwrap();
            Ok(())
        })
    }

    fn evidence<'a>(
        &'a self,
        _target: &'a Target,
        _digest: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<RawEvidence>, SourceError>> {
        Box::pin(async move {
            self.called("evidence").await;
            if self.world().registry_down {
                return Err(SourceError::Unavailable(
                    "cannot reach the registry".to_owned(),
                ));
            }
            Ok(Vec::new())
        })
    }

    fn verify(
        &self,
        digest: &Digest,
        _evidence: &[RawEvidence],
        policy: &trust::Policy,
    ) -> trust::Verdict {
        let signed = self.world().signed.contains(&digest.to_string());
        trust::Verdict {
            digest: digest.clone(),
            policy: policy.name.clone(),
            outcome: if signed {
                trust::Outcome::Verified
            } else {
                trust::Outcome::NoEvidence
            },
            message: if signed {
                "signed"
            } else {
                "no signature was found"
            }
            .to_owned(),
            accepted: Vec::new(),
            rejected: Vec::new(),
        }
    }
}

impl Engine for Fake {
    fn check(&self) -> BoxFuture<'_, Result<EngineInfo, EngineError>> {
        Box::pin(async {
            Ok(EngineInfo {
                description: "a fake".to_owned(),
            })
        })
    }

    fn plan<'a>(&'a self, deployment: &'a Deployment) -> BoxFuture<'a, Result<Plan, EngineError>> {
        Box::pin(async move {
            self.called("plan").await;
            assert!(
                deployment.directory.join("version").exists(),
                "the files are on the disk"
            );
            let world = self.world();
            if let Some(error) = &world.plan_error {
                return Err(error.clone());
            }
            let action =
                if world.running.as_ref() == Some(&deployment.digest) && !world.half_applied {
                    Action::Keep
                } else {
                    Action::Recreate
                };
            Ok(Plan {
                changes: vec![Change {
                    subject: "web".to_owned(),
                    action,
                    reason: deployment.digest.to_string(),
                }],
                notes: Vec::new(),
            })
        })
    }

    fn pull<'a>(&'a self, _deployment: &'a Deployment) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            self.called("pull").await;
            if self.world().registry_down {
                return Err(EngineError::Unavailable(
                    "cannot reach the registry".to_owned(),
                ));
            }
            Ok(())
        })
    }

    fn apply<'a>(
        &'a self,
        deployment: &'a Deployment,
        _plan: &'a Plan,
    ) -> BoxFuture<'a, Result<Applied, EngineError>> {
        Box::pin(async move {
            {
                let mut world = self.world();
                if world.engine_down {
                    return Err(EngineError::Unavailable(
                        "the engine does not answer".to_owned(),
                    ));
                }
                world.half_applied = true;
            }
            self.called("apply").await;
            {
                let mut world = self.world();
                world.running = Some(deployment.digest.clone());
                world.half_applied = false;
            }
            self.called("applied").await;
            Ok(Applied::default())
        })
    }

    fn observe<'a>(
        &'a self,
        deployment: &'a Deployment,
    ) -> BoxFuture<'a, Result<Sample, EngineError>> {
        Box::pin(async move {
            self.called("observe").await;
            let mut world = self.world();
            world.looks += 1;
            if world.engine_down {
                return Err(EngineError::Unavailable(
                    "the engine does not answer".to_owned(),
                ));
            }
            let name = deployment.digest.to_string();
            let runs = world.running.as_ref() == Some(&deployment.digest) && !world.half_applied;
            let state = if runs && !world.unhealthy.contains(&name) {
                SampleState::Healthy
            } else {
                SampleState::Failed
            };
            let fingerprint = if world.crash_looping.contains(&name) {
                world.looks
            } else {
                0
            };
            Ok(Sample {
                state,
                fingerprint: format!("{name} {fingerprint}"),
                services: vec![ServiceSample {
                    service: "web".to_owned(),
                    state,
                    detail: if state == SampleState::Healthy {
                        "running"
                    } else {
                        "exited with 1"
                    }
                    .to_owned(),
                }],
            })
        })
    }

    fn clean<'a>(
        &'a self,
        _target: &'a Target,
        kept: &'a [Deployment],
    ) -> BoxFuture<'a, Result<(), EngineError>> {
        self.world().kept = kept
            .iter()
            .map(|deployment| deployment.digest.clone())
            .collect();
        Box::pin(async { Ok(()) })
    }
}
