//! `longshore serve`, `verify-store`, `audit`, `failpoints`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Global;
use crate::config::Config;
use crate::output::{self, Exit, Refused};

/// Run the registry.
///
/// Without a configuration it listens on 127.0.0.1:5050, and everyone on this machine may read and
/// write.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The configuration file (YAML). Every key can also come from the environment, such as
    /// `LONGSHORE_SERVER__LISTEN`.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data directory [default: /var/lib/longshore as root, else $XDG_DATA_HOME/longshore].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The address to listen on, over the configuration's; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    listen: Vec<SocketAddr>,
    /// Write the URL into this file once requests are served.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

impl Serve {
    pub(crate) async fn run(self) -> anyhow::Result<Exit> {
        let config = Config::load(
            self.config.as_deref(),
            self.data.as_deref(),
            &self.listen,
            std::env::vars(),
        )?;
        crate::serve::logging(&config.log);
        crate::serve::run(config, self.ready_file.as_deref()).await?;
        Ok(Exit::OK)
    }
}

/// The store that is checked.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The data directory.
    #[arg(required_unless_present = "config")]
    directory: Option<PathBuf>,
    /// The configuration of a server: its store is checked, wherever its rows and objects are.
    #[arg(long, short, value_name = "FILE", conflicts_with = "directory")]
    config: Option<PathBuf>,
}

impl Which {
    fn location(&self) -> anyhow::Result<store::Location> {
        Ok(match (&self.directory, &self.config) {
            (_, Some(file)) => {
                Config::load(Some(file.as_path()), None, &[], std::env::vars())?.location
            }
            (Some(directory), None) => store::Location::embedded(directory),
            (None, None) => unreachable!("clap wants one of the two"),
        })
    }
}

/// A directory that is not there is not found; everything else failed.
fn found<T>(checked: Result<T, store::Error>) -> anyhow::Result<T> {
    match checked {
        Err(error @ store::Error::NoDirectory(_)) => {
            Err(Refused::new(Exit::NOT_FOUND, error).into())
        }
        other => Ok(other?),
    }
}

/// Check every row of a store against every object and every digest.
///
/// Changes nothing. Works on a stopped data directory and beside running servers. With a configuration it checks the
/// store that this names, also in PostgreSQL and S3.
#[derive(Debug, Args)]
pub(crate) struct VerifyStore {
    #[command(flatten)]
    which: Which,
    /// Look only whether each object is there and has its length, without reading it.
    #[arg(long)]
    no_hash: bool,
    /// Objects that are read at once [default: the number of processors].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: Option<u16>,
}

impl VerifyStore {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let location = self.which.location()?;
        let mut options = store::VerifyOptions {
            hash: !self.no_hash,
            ..store::VerifyOptions::default()
        };
        if let Some(parallel) = self.parallel {
            options.parallel = usize::from(parallel);
        }
        let meter = output::Meter::new(global.quiet || global.json);
        let report = store::verify_at(&location, options, &|progress| {
            meter.show(progress.phase, progress.done, progress.total);
        })
        .await;
        meter.clear();
        let report = found(report)?;
        let problems = report.problems.len() as u64 + report.more_problems;
        if global.json {
            output::json(&serde_json::json!({
                "blobs": report.blobs,
                "bytes": report.bytes,
                "manifests": report.manifests,
                "problems": report.problems,
                "moreProblems": report.more_problems,
            }))?;
        } else {
            for problem in &report.problems {
                output::line(format!("damaged: {problem}"));
            }
            if report.more_problems > 0 {
                output::line(format!("and {} more problems", report.more_problems));
            }
            output::line(format!(
                "{} blobs ({}) and {} manifests checked, {problems} problems",
                report.blobs,
                output::bytes(report.bytes),
                report.manifests,
            ));
        }
        Ok(if problems == 0 {
            Exit::OK
        } else {
            Exit::REFUSED
        })
    }
}

/// The audit record.
#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Check the hash chain of the audit record.
    ///
    /// Changes nothing. Works on a stopped data directory and beside running servers. With a configuration it checks
    /// the record of the store that this names, also in PostgreSQL.
    Verify(Which),
}

impl Audit {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let Self::Verify(which) = self;
        let sealed = found(store::verify_audit_at(&which.location()?).await)?;
        if global.json {
            output::json(&serde_json::json!({"sealed": sealed}))?;
        } else {
            output::line(format!("{sealed} audit records, the chain is whole"));
        }
        Ok(Exit::OK)
    }
}

/// Prints the failpoints of a test build; nothing in an ordinary one.
pub(crate) fn failpoints() -> Exit {
    for name in store::failpoints() {
        output::line(name);
    }
    Exit::OK
}
