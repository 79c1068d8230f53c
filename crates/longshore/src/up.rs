//! `longshore up`: registry and agent in one runtime.
//!
//! The agent has no private door: it speaks to the registry through the loopback listener like any
//! other agent, so what works here works on two machines.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use delivery::agent::Agent;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::output::{self, Exit};
use crate::serve::Registry;

/// Run the registry and an agent in one process.
#[derive(Debug, Default, Args)]
pub(crate) struct Up {
    /// The data directory: DIR/registry, DIR/agent and DIR/agent.sock [default: /var/lib/longshore as
    /// root, else $XDG_DATA_HOME/longshore].
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// The registry's configuration (YAML).
    #[arg(long, short, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The agent's configuration (YAML); written without targets when it is missing, read again when
    /// it changes [default: DIR/agent.yaml].
    #[arg(long, value_name = "FILE")]
    pub(crate) agent_config: Option<PathBuf>,
    /// The address to listen on, over the configuration's; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Write the URL into this file once requests are served.
    #[arg(long, value_name = "FILE")]
    pub(crate) ready_file: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(command: Up) -> anyhow::Result<Exit> {
    let ready_file = command.ready_file.clone();
    let node = Node::open(&command).await?;
    let url = node.registry.url();
    output::note(format!("registry  {url}"));
    output::note(format!(
        "agent     {} (socket {})",
        node.agent_config.display(),
        node.socket.display()
    ));
    if node.targets == 0 {
        let host = url.split("//").nth(1).unwrap_or_default();
        output::note(format!(
            "\nwhat to do next:\n  longshore key generate --output shop\n  longshore release push DIRECTORY {host}/shop/web:production --sign shop.key\n  \
             add a target to {} (its comments show how); it is read again when it changes\n  \
             longshore agent status --socket {}",
            node.agent_config.display(),
            node.socket.display()
        ));
    }
    if let Some(path) = ready_file {
        crate::serve::write_ready(&path, &url)?;
    }
    let shutdown = CancellationToken::new();
    let signal = crate::serve::shutdown_signal()?;
    let trigger = shutdown.clone();
    let run = node.run(shutdown);
    tokio::pin!(run);
    tokio::select! {
        outcome = &mut run => outcome?,
        () = signal => {
            trigger.cancel();
            run.await?;
        }
    }
    Ok(Exit::OK)
}

/// A registry and an agent, ready to run together.
pub(crate) struct Node {
    pub(crate) registry: Registry,
    pub(crate) agent_config: PathBuf,
    pub(crate) socket: PathBuf,
    targets: usize,
    agent: Agent,
}

impl Node {
    /// Opens the registry, writes a missing agent configuration, and reads it.
    pub(crate) async fn open(command: &Up) -> anyhow::Result<Self> {
        // The command line wins, as for `serve`; the default is the data directory of both.
        let directory = match &command.data {
            Some(directory) => directory.clone(),
            None => crate::config::default_data()?,
        };
        let directory = std::path::absolute(&directory)
            .with_context(|| format!("cannot find `{}`", directory.display()))?;
        let config = Config::load(
            command.config.as_deref(),
            Some(&directory.join("registry")),
            &command.listen,
            std::env::vars(),
        )?;
        crate::serve::logging(&config.log);
        make_directory(&directory)?;
        let registry = Registry::open(&config).await?;
        let agent_config = command
            .agent_config
            .clone()
            .unwrap_or_else(|| directory.join("agent.yaml"));
        if !agent_config.exists() {
            let host = registry
                .url()
                .split("//")
                .nth(1)
                .unwrap_or_default()
                .to_owned();
            std::fs::write(&agent_config, template(&host))
                .with_context(|| format!("cannot write `{}`", agent_config.display()))?;
        }
        let mut settings = crate::agent::load(&agent_config)?;
        settings.state = directory.join("agent");
        settings.socket = directory.join("agent.sock");
        let socket = settings.socket.clone();
        let targets = settings.targets.len();
        let engines = crate::agent::engines(&settings);
        Ok(Self {
            registry,
            agent_config,
            socket,
            targets,
            agent: Agent::new(settings, engines),
        })
    }

    /// Runs both until `shutdown`; when one ends by itself, so does the other. The agent stops first,
    /// because it asks the registry until then.
    pub(crate) async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let registry_shutdown = CancellationToken::new();
        let registry = {
            let token = registry_shutdown.clone();
            self.registry.run(async move { token.cancelled().await })
        };
        tokio::pin!(registry);
        let agent = self.agent.run(shutdown.clone());
        tokio::pin!(agent);
        tokio::select! {
            outcome = &mut registry => {
                shutdown.cancel();
                agent.await?;
                outcome
            }
            outcome = &mut agent => {
                registry_shutdown.cancel();
                registry.await?;
                Ok(outcome?)
            }
        }
    }
}

fn make_directory(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot make the data directory `{}`", directory.display()))
}

fn template(host: &str) -> String {
    format!(
        "# What this agent keeps running. Read again when it changes.\n\
         version: 1\n\
         targets: []\n\
         # Replace the line above by targets like this one:\n\
         # targets:\n\
         #   - name: shop\n\
         #     reference: {host}/shop/web:production   # the tag to follow\n\
         #     release: shop                           # the release name that is expected there\n\
         #     engine: compose                         # or files\n\
         #     trust:\n\
         #       keys: [shop.pub]                      # who must have signed; relative to this file\n\
         #       threshold: 1\n"
    )
}
