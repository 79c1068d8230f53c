//! The agent: one task per target, one stream per registry, one socket.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control::server::{self, Directory, Entry};
use crate::control::{Refusal, RefusalKind};
use crate::engine::Engine;
use crate::release::EngineKind;
use crate::reporter::{self, Reporter};
use crate::runner::disk::Paths;
use crate::runner::source::{Source, Sources, chain};
use crate::runner::{Message, Runner, Setup, refusal};
use crate::target::Target;
use crate::trigger::{Follower, Subscriber};

pub use crate::runner::clock::{Clock, SystemClock};
pub use crate::target::config::{AgentConfig, ConfigError};

/// The engines that this agent can use.
#[derive(Clone, Default)]
pub struct Engines {
    by_kind: HashMap<EngineKind, Arc<dyn Engine>>,
}

impl Engines {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the engine for releases of `kind`; a second one replaces the first.
    #[must_use]
    pub fn with(mut self, kind: EngineKind, engine: Arc<dyn Engine>) -> Self {
        self.by_kind.insert(kind, engine);
        self
    }

    /// The engine for releases of `kind`.
    pub fn find(&self, kind: EngineKind) -> Option<Arc<dyn Engine>> {
        self.by_kind.get(&kind).cloned()
    }
}

/// An agent, ready to run.
pub struct Agent {
    config: AgentConfig,
    engines: Engines,
    sources: Arc<dyn Sources>,
    clock: Arc<dyn Clock>,
}

impl Agent {
    /// An agent that asks real registries, by the real clock.
    pub fn new(config: AgentConfig, engines: Engines) -> Self {
        Self::with(
            config,
            engines,
            Arc::new(crate::runner::source::ClientSources),
            Arc::new(SystemClock),
        )
    }

    /// An agent with its sources and its clock passed in.
    pub fn with(
        config: AgentConfig,
        engines: Engines,
        sources: Arc<dyn Sources>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            config,
            engines,
            sources,
            clock,
        }
    }

    /// Runs until `shutdown` is cancelled, then stops every target in a state that it resumes from.
    ///
    /// The socket answers before the first target starts. A configuration that was read from a file is read again when
    /// the file changes; one that is wrong then is reported and the old one stays. `state` and `socket` of a running
    /// agent never change.
    ///
    /// # Errors
    /// When the state directory or the socket cannot be used, or another agent holds them.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        let io = |operation: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| AgentError::Io {
                operation,
                path,
                source,
            }
        };
        let state = self.config.state.clone();
        let socket = self.config.socket.clone();
        std::fs::create_dir_all(&state).map_err(io("create", &state))?;
        let listener = match server::bind(&socket).await {
            Ok(listener) => listener,
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                return Err(AgentError::InUse(socket));
            }
            Err(error) => return Err(io("listen at", &socket)(error)),
        };
        let (reload, mut reloads) = mpsc::channel(1);
        let directory = Directory::new(reload);
        let mut crew = Crew {
            path: self.config.path.clone(),
            state,
            engines: self.engines,
            sources: self.sources,
            clock: self.clock,
            directory: directory.clone(),
            shutdown: shutdown.clone(),
            tasks: TaskTracker::new(),
            targets: BTreeMap::new(),
            streams: BTreeMap::new(),
        };
        crew.tasks
            .spawn(server::serve(listener, directory, shutdown.clone()));
        let outcome = crew.start(&self.config);
        if let Err(error) = outcome {
            shutdown.cancel();
            crew.stop(&socket).await;
            return Err(error);
        }
        let mut seen = stamp(crew.path.as_deref());
        let mut look = tokio::time::interval(LOOK_AT_FILE);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(reply) = reloads.recv() => {
                    seen = stamp(crew.path.as_deref());
                    let _ = reply.send(crew.reload().await);
                }
                _ = look.tick() => {
                    let now = stamp(crew.path.as_deref());
                    // A file that is gone for a moment is being replaced.
                    if now.is_some() && now != seen {
                        seen = now;
                        match crew.reload().await {
                            Ok(message) => tracing::info!("{message}"),
                            Err(refusal) => tracing::error!(reason = refusal.message, "the configuration stays as it was"),
                        }
                    }
                }
            }
        }
        crew.stop(&socket).await;
        Ok(())
    }
}

/// Everybody who works for an agent.
struct Crew {
    path: Option<PathBuf>,
    state: PathBuf,
    engines: Engines,
    sources: Arc<dyn Sources>,
    clock: Arc<dyn Clock>,
    directory: Directory,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    targets: BTreeMap<String, Member>,
    streams: BTreeMap<String, Stream>,
}

/// One target's runner.
struct Member {
    entry: Entry,
    reporter: reporter::Handle,
    /// Stops the task that brings reports to the registry.
    unreport: CancellationToken,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// One host's stream. Its `up` outlives the task that follows it, because runners look at it.
struct Stream {
    up: watch::Sender<bool>,
    stop: CancellationToken,
}

impl Crew {
    /// The first configuration must be right as a whole.
    fn start(&mut self, config: &AgentConfig) -> Result<(), AgentError> {
        let source = self
            .sources
            .source(&config.client)
            .map_err(AgentError::Config)?;
        for target in &config.targets {
            self.add(config, target, &source)?;
        }
        self.rewire(config);
        Ok(())
    }

    /// Reads the configuration again and brings the crew in line with it.
    async fn reload(&mut self) -> Result<String, Refusal> {
        let Some(path) = self.path.clone() else {
            return Err(refusal(
                RefusalKind::Impossible,
                "this agent's configuration did not come from a file".to_owned(),
            ));
        };
        let invalid = |message: String| refusal(RefusalKind::Invalid, message);
        let config = AgentConfig::load(&path).map_err(|error| invalid(chain(&error)))?;
        let source = self.sources.source(&config.client).map_err(invalid)?;
        let gone: Vec<String> = self
            .targets
            .keys()
            .filter(|name| !config.targets.iter().any(|target| target.name == **name))
            .cloned()
            .collect();
        for name in gone {
            // What it ran goes on running: taking a line out of a file must not stop a service.
            if let Some(member) = self.targets.remove(&name) {
                member.stop.cancel();
                member.unreport.cancel();
                let _ = member.task.await;
                tracing::info!(
                    target_name = name,
                    "no longer looked after; what it ran is left running"
                );
            }
        }
        let mut problems = Vec::new();
        for target in &config.targets {
            if let Some(member) = self.targets.get_mut(&target.name) {
                let target = Arc::new(target.clone());
                member.entry.target = target.clone();
                let reporter = member.reporter.clone();
                let setup = setup(&self.engines, &config, target, &source, reporter);
                let _ = member
                    .entry
                    .handle
                    .mailbox
                    .send(Message::Configure(setup))
                    .await;
            } else if let Err(error) = self.add(&config, target, &source) {
                problems.push(chain(&error));
            }
        }
        self.rewire(&config);
        if problems.is_empty() {
            Ok(format!(
                "`{}` was read again: {} target(s)",
                path.display(),
                self.targets.len()
            ))
        } else {
            Err(refusal(RefusalKind::Unavailable, problems.join("; ")))
        }
    }

    fn add(
        &mut self,
        config: &AgentConfig,
        target: &Target,
        source: &Arc<dyn Source>,
    ) -> Result<(), AgentError> {
        let target = Arc::new(target.clone());
        let paths = Paths::new(&self.state, &target.name);
        let up = self.stream(&target.reference.host).up.subscribe();
        let reporter = reporter::Handle::new();
        let setup = setup(
            &self.engines,
            config,
            target.clone(),
            source,
            reporter.clone(),
        );
        let (runner, handle) =
            Runner::open(setup, paths, self.clock.clone(), up).map_err(|source| {
                AgentError::Target {
                    target: target.name.clone(),
                    source,
                }
            })?;
        let stop = self.shutdown.child_token();
        let task = self.tasks.spawn(runner.run(stop.clone()));
        let name = target.name.clone();
        let entry = Entry { target, handle };
        let member = Member {
            entry,
            reporter,
            unreport: CancellationToken::new(),
            stop,
            task,
        };
        self.targets.insert(name, member);
        Ok(())
    }

    fn stream(&mut self, host: &str) -> &mut Stream {
        self.streams
            .entry(host.to_owned())
            .or_insert_with(|| Stream {
                up: watch::channel(false).0,
                stop: CancellationToken::new(),
            })
    }

    /// Tells the socket who is here, and starts the streams anew with their listeners.
    fn rewire(&mut self, config: &AgentConfig) {
        self.report(config);
        let entries = self
            .targets
            .iter()
            .map(|(name, member)| (name.clone(), member.entry.clone()))
            .collect();
        self.directory.replace(entries);
        let mut by_host: BTreeMap<String, Vec<Subscriber>> = BTreeMap::new();
        for member in self.targets.values() {
            let reference = member.entry.target.reference.clone();
            let mailbox = member.entry.handle.mailbox.clone();
            by_host
                .entry(reference.host.clone())
                .or_default()
                .push(Subscriber { reference, mailbox });
        }
        for stream in self.streams.values() {
            stream.stop.cancel();
            stream.up.send_replace(false);
        }
        for (host, subscribers) in by_host {
            // Where one registry is named, no other is asked for events.
            if config
                .registry
                .as_ref()
                .is_some_and(|registry| *registry != host)
            {
                continue;
            }
            let stop = self.shutdown.child_token();
            let stream = self.stream(&host);
            stream.stop = stop.clone();
            let up = stream.up.clone();
            let follower = Follower {
                sources: self.sources.clone(),
                config: config.client.clone(),
                host,
                subscribers,
                up,
                clock: self.clock.clone(),
            };
            self.tasks.spawn(follower.run(stop));
        }
    }

    /// Starts the reporters anew, with the settings as they are now.
    fn report(&mut self, config: &AgentConfig) {
        let reports = if config.report {
            self.sources
                .reports(&config.client)
                .unwrap_or_else(|error| {
                    tracing::warn!(error, "no registry is told what runs here");
                    None
                })
        } else {
            None
        };
        for member in self.targets.values_mut() {
            member.unreport.cancel();
            let target = member.entry.target.clone();
            // Where one registry is named, no other is told anything.
            let is_meant = config
                .registry
                .as_ref()
                .is_none_or(|registry| *registry == target.reference.host);
            let Some(reports) = reports.clone().filter(|_| is_meant) else {
                continue;
            };
            member.unreport = self.shutdown.child_token();
            let reporter = Reporter {
                reports,
                target,
                paths: member.entry.handle.paths.clone(),
                holder: config.holder.clone(),
                clock: self.clock.clone(),
                handle: member.reporter.clone(),
            };
            self.tasks.spawn(reporter.run(member.unreport.clone()));
        }
    }

    /// Waits for everybody, then takes the socket away.
    async fn stop(self, socket: &Path) {
        self.tasks.close();
        self.tasks.wait().await;
        let _ = std::fs::remove_file(socket);
    }
}

fn setup(
    engines: &Engines,
    config: &AgentConfig,
    target: Arc<Target>,
    source: &Arc<dyn Source>,
    reporter: reporter::Handle,
) -> Setup {
    Setup {
        engine: engines.find(target.engine),
        target,
        source: source.clone(),
        poll: config.poll,
        safety_poll: config.safety_poll,
        reporter,
    }
}

/// What changes when a file is written or replaced.
fn stamp(path: Option<&Path>) -> Option<(u64, i64, i64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(path?).ok()?;
    Some((
        metadata.ino(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.len(),
    ))
}

const LOOK_AT_FILE: Duration = Duration::from_secs(1);

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The state directory or the socket.
    #[error("cannot {operation} `{path}`", path = .path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another agent uses the same socket or state directory.
    #[error("another agent runs with `{path}`: stop it, or give this one its own `state` and `socket`", path = .0.display())]
    InUse(PathBuf),
    /// A target's state.
    #[error("target `{target}` cannot be run")]
    Target {
        /// The target.
        target: String,
        /// Why.
        #[source]
        source: crate::runner::RunnerError,
    },
    /// The configuration asks for something that this build or host has not.
    #[error("{0}")]
    Config(String),
}

#[cfg(test)]
mod tests;
