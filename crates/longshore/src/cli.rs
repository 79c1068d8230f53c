//! The command line: one file per command below [`Cli`].

pub(crate) mod agent;
mod artifact;
mod backup;
mod completions;
mod explain;
mod export;
mod gc;
mod import;
mod login;
mod migrate;
mod mode;
mod pin;
pub(crate) mod proof;
mod quota;
mod release;
mod retention;
mod scrub;
mod server;
mod storage;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::output::Exit;

/// An OCI artifact registry that delivers.
///
/// One program stores OCI artifacts, proves where they came from, and puts them into production with
/// health checks and automatic rollback.
#[derive(Debug, Parser)]
// The version is told once: `release push --version` is that of the release.
#[command(name = "longshore", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// Runs the command.
    pub(crate) async fn run(self) -> anyhow::Result<Exit> {
        let global = self.global;
        match self.command {
            Command::Agent(command) => command.run(&global).await,
            Command::Audit(command) => command.run(&global).await,
            Command::Backup(command) => command.run(&global).await,
            Command::Completions(command) => Ok(command.run()),
            Command::Copy(command) => command.run(&global).await,
            Command::Demo(command) => crate::demo::run(command, &global).await,
            Command::DemoService(command) => crate::demo_service::run(command).await,
            Command::Explain(command) => command.run(&global).await,
            Command::Export(command) => command.run(&global).await,
            Command::Failpoints => Ok(server::failpoints()),
            Command::Gc(command) => command.run(&global).await,
            Command::Import(command) => command.run(&global).await,
            Command::Inspect(command) => command.run(&global).await,
            Command::Key(command) => command.run(&global),
            Command::Login(command) => command.run(&global).await,
            Command::Logout(command) => command.run(&global),
            Command::Ls(command) => command.run(&global).await,
            Command::Mode(command) => command.run(&global).await,
            Command::Pin(command) => command.run(&global).await,
            Command::Migrate(command) => command.run(&global).await,
            Command::Pull(command) => command.run(&global).await,
            Command::Push(command) => command.run(&global).await,
            Command::Quota(command) => command.run(&global).await,
            Command::Release(command) => command.run(&global).await,
            Command::Reindex(command) => command.run(&global).await,
            Command::Restore(command) => command.run(&global).await,
            Command::Retention(command) => command.run(&global).await,
            Command::Rm(command) => command.run(&global).await,
            Command::Scrub(command) => command.run(&global).await,
            Command::Serve(command) => command.run().await,
            Command::Sign(command) => command.run(&global).await,
            Command::Storage(command) => command.run(&global).await,
            Command::Tag(command) => command.run(&global).await,
            Command::Up(command) => Box::pin(crate::up::run(command)).await,
            Command::Verify(command) => command.run(&global).await,
            Command::VerifyStore(command) => command.run(&global).await,
        }
    }
}

/// Options of every command.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Global {
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress bars and no remarks.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Speak plain HTTP to every registry (loopback needs no flag).
    #[arg(long, global = true)]
    pub(crate) plain_http: bool,
    /// Trust the certificate authorities in this PEM file as well.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca_file: Vec<PathBuf>,
    /// Do not verify TLS certificates. Anyone on the way can then read and change what is sent.
    #[arg(long, global = true)]
    pub(crate) insecure: bool,
}

impl Global {
    /// A client for any registry with these options.
    pub(crate) fn client(&self) -> anyhow::Result<client::Client> {
        self.client_with(client::Config::default())
    }

    /// The same with other settings below.
    pub(crate) fn client_with(&self, mut config: client::Config) -> anyhow::Result<client::Client> {
        config.plain_http_all = self.plain_http;
        config.insecure = self.insecure;
        concat!("longshore/", env!("CARGO_PKG_VERSION")).clone_into(&mut config.user_agent);
        for path in &self.ca_file {
            let pem = std::fs::read(path).map_err(|error| {
                crate::output::Refused::new(
                    Exit::USAGE,
                    format!("cannot read `--ca-file {}`: {error}", path.display()),
                )
            })?;
            config.ca_pem.push(pem);
        }
        Ok(client::Client::new(config)?)
    }

    /// Prints a remark for people, unless they want none.
    pub(crate) fn remark(&self, text: impl std::fmt::Display) {
        if !self.quiet && !self.json {
            crate::output::note(text);
        }
    }
}

/// The registry that a command operates: `host[:port]`, by default that of `LONGSHORE_REGISTRY`, else the one on this
/// machine.
pub(super) fn operated(text: Option<&str>) -> anyhow::Result<String> {
    let named = std::env::var("LONGSHORE_REGISTRY").unwrap_or_default();
    let default = if named.is_empty() {
        "127.0.0.1:5050"
    } else {
        &named
    };
    login::host(text.unwrap_or(default))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the registry.
    Serve(server::Serve),
    /// Run the registry and an agent in one process.
    Up(crate::up::Up),
    /// Show the whole chain on real input: push, sign, deploy, roll back, refuse, explain.
    Demo(crate::demo::Demo),
    /// Keep targets running: the deploying agent and the commands that talk to it.
    #[command(subcommand)]
    Agent(agent::Agent),
    /// Make, check and publish releases.
    #[command(subcommand)]
    Release(release::Release),
    /// Store credentials for a registry.
    Login(login::Login),
    /// Remove credentials for a registry.
    Logout(login::Logout),
    /// Push files, or a layout directory, as one artifact.
    Push(artifact::Push),
    /// Pull an artifact into a directory or a layout.
    Pull(artifact::Pull),
    /// Copy an artifact with everything that is attached to it.
    Copy(artifact::Copy),
    /// List repositories of a registry or tags of a repository.
    Ls(artifact::Ls),
    /// Show a manifest and what is attached to it.
    Inspect(artifact::Inspect),
    /// Give an artifact more tags.
    Tag(artifact::Tag),
    /// Delete a tag, a manifest by digest, or a whole repository.
    Rm(artifact::Rm),
    /// Explain why something is kept, and until when.
    Explain(explain::Explain),
    /// Look at the garbage collector, or have it collect at once.
    Gc(gc::Gc),
    /// Keep manifests from deletion.
    #[command(subcommand)]
    Pin(pin::Pin),
    /// Show what a registry stores, and for whom.
    Storage(storage::Storage),
    /// How much a namespace may store.
    #[command(subcommand)]
    Quota(quota::Quota),
    /// Make signing keys.
    #[command(subcommand)]
    Key(proof::Key),
    /// Sign an artifact in a registry.
    Sign(proof::Sign),
    /// Verify the signatures of an artifact.
    Verify(proof::Verify),
    /// Decide which tags are kept: plan, run, undo.
    #[command(subcommand)]
    Retention(retention::Retention),
    /// Read everything again and compare it with its digest.
    #[command(subcommand)]
    Scrub(scrub::Scrub),
    /// Show or set whether a registry takes writes.
    Mode(mode::Mode),
    /// Bring in what another registry holds: its storage directory, OCI layouts, or over the wire.
    Import(import::Import),
    /// Write repositories into a directory of OCI layouts.
    Export(export::Export),
    /// Carry a whole store to another place: a data directory to PostgreSQL and an object store, or back.
    Migrate(migrate::Migrate),
    /// Check every row of a store, in a data directory or of a configuration, against every object and digest.
    VerifyStore(server::VerifyStore),
    /// Make one full backup of a data directory, also beside its running server, or look at backups.
    Backup(backup::Backup),
    /// Restore a data directory from a backup, or take over a restored PostgreSQL database.
    Restore(backup::Restore),
    /// Make a new database from objects and exports, when the old one is lost.
    Reindex(backup::Reindex),
    /// The audit record.
    #[command(subcommand)]
    Audit(server::Audit),
    /// Print a completion script for a shell.
    Completions(completions::Completions),
    /// Print the names of the points at which a test build can be made to die.
    #[command(hide = true)]
    Failpoints,
    /// The small HTTP service that the demonstration deploys.
    #[command(hide = true)]
    DemoService(crate::demo_service::DemoService),
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 plan has changes, 3 refused (signature, \
lint, damaged store), 4 not found, 5 access refused, 6 unreachable, 64 wrong arguments, 78 wrong \
configuration";

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_and_every_option() {
        fn walk(path: &str, command: &mut clap::Command) {
            // What is wrong only shows when the command is built as it is for a run.
            command.render_long_help();
            if command.is_hide_set() {
                return;
            }
            assert!(command.get_about().is_some(), "`{path}` has no description");
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "`{}` of `{path}` has no description",
                    argument.get_id()
                );
            }
            for below in command.get_subcommands_mut() {
                let path = format!("{path} {}", below.get_name());
                walk(&path, below);
            }
        }
        let mut command = super::Cli::command();
        command.build();
        walk("longshore", &mut command);
    }

    #[test]
    fn a_release_has_a_version_of_its_own() {
        use clap::Parser as _;
        let words = [
            "longshore",
            "release",
            "push",
            "--version",
            "1.4.2",
            "shop",
            "r.example/s:p",
        ];
        assert!(super::Cli::try_parse_from(words).is_ok());
    }
}
