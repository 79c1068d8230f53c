//! `longshore backup`, `restore`, `reindex`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use store::Timestamp;

use super::Global;
use crate::config::{Config, default_data};
use crate::output::{self, Exit, Refused};

/// Make one full backup of a data directory, also beside its running server, or look at backups.
///
/// A backup directory holds any number of backups; what they share is there once. A server makes backups by itself, to
/// any minute, with `backup: {directory: DIR}` in its configuration, in a directory of its own. PostgreSQL and S3 are
/// backed up with their own tools.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Backup {
    /// The backup directory.
    #[arg(value_name = "DIR", required = true)]
    directory: Option<PathBuf>,
    /// The data directory [default: /var/lib/longshore as root, else $XDG_DATA_HOME/longshore].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Make hard links of objects, not copies: fast, but no protection against a dying disk.
    #[arg(long)]
    link: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List what can be restored.
    Ls {
        /// The backup directory.
        directory: PathBuf,
    },
    /// Re-hash everything in a backup directory.
    Verify {
        /// The backup directory.
        directory: PathBuf,
    },
}

impl Backup {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        match (self.command, self.directory) {
            (Some(Command::Ls { directory }), _) => list(&directory, global),
            (Some(Command::Verify { directory }), _) => verify(&directory, global).await,
            (None, Some(directory)) => {
                let data = self.data.map_or_else(default_data, Ok)?;
                let made = store::backup(&data, &directory, self.link).await?;
                if global.json {
                    output::json(&json!({
                        "at": time(made.at),
                        "databaseBytes": made.database_bytes,
                        "objects": made.objects,
                        "objectBytes": made.object_bytes,
                    }))?;
                } else {
                    output::line(format!(
                        "backed up to {}: {} objects ({}), database {}",
                        time(made.at),
                        made.objects,
                        output::bytes(made.object_bytes),
                        output::bytes(made.database_bytes)
                    ));
                }
                Ok(Exit::OK)
            }
            (None, None) => Err(Refused::new(Exit::USAGE, "name the backup directory").into()),
        }
    }
}

fn list(directory: &std::path::Path, global: &Global) -> anyhow::Result<Exit> {
    let list = store::list_backups(directory)?;
    if global.json {
        let lines: Vec<_> = list
            .lines
            .iter()
            .map(|line| {
                json!({
                    "from": time(line.from),
                    "to": time(line.to),
                    "points": line.points,
                    "bytes": line.bytes,
                    "objects": line.objects,
                    "objectBytes": line.object_bytes,
                })
            })
            .collect();
        output::json(&json!({
            "lines": lines,
            "databaseBytes": list.database_bytes,
            "problems": list.problems,
        }))?;
    } else {
        let rows: Vec<_> = list
            .lines
            .iter()
            .map(|line| {
                vec![
                    time(line.from),
                    time(line.to),
                    line.points.to_string(),
                    output::bytes(line.bytes),
                    line.objects.to_string(),
                    output::bytes(line.object_bytes),
                ]
            })
            .collect();
        output::table(
            &[
                "FROM",
                "TO",
                "POINTS",
                "DATABASE",
                "OBJECTS AT FROM",
                "BYTES AT FROM",
            ],
            &rows,
        );
        for problem in &list.problems {
            output::line(format!("damaged: {problem}"));
        }
    }
    Ok(clean(&list.problems))
}

async fn verify(directory: &std::path::Path, global: &Global) -> anyhow::Result<Exit> {
    let report = store::verify_backup(directory).await?;
    if global.json {
        output::json(&json!({
            "lines": report.lines,
            "objects": report.objects,
            "bytes": report.bytes,
            "problems": report.problems,
        }))?;
    } else {
        for problem in &report.problems {
            output::line(format!("damaged: {problem}"));
        }
        output::line(format!(
            "{} backups and {} objects ({}) checked, {} problems",
            report.lines,
            report.objects,
            output::bytes(report.bytes),
            report.problems.len()
        ));
    }
    Ok(clean(&report.problems))
}

/// Restore a data directory from a backup, or take over a database that was restored with PostgreSQL's tools.
///
/// A restored store has a new epoch of events, so that agents and other readers of the event stream look at everything
/// again; its open uploads are over; and nothing that is unreferenced is collected before another lease.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The backup directory.
    #[arg(value_name = "DIR", required_unless_present = "adopt", requires = "to")]
    directory: Option<PathBuf>,
    /// The data directory to make; it must be missing or empty.
    #[arg(long, value_name = "DATA", conflicts_with = "adopt")]
    to: Option<PathBuf>,
    /// The moment, such as `2026-01-31T12:34:00Z`; the newest point that is not after it is restored [default: the newest].
    #[arg(long, value_name = "TIME", conflicts_with = "adopt")]
    at: Option<jiff::Timestamp>,
    /// Restore nothing: mark the PostgreSQL database of `--config` as one that was restored. No replica may run.
    #[arg(long)]
    adopt: bool,
    /// The configuration file of the registry, for `--adopt`.
    #[arg(long, short, value_name = "FILE", requires = "adopt")]
    config: Option<PathBuf>,
    /// Adopt although other programs are connected to the database.
    #[arg(long, requires = "adopt")]
    force: bool,
    /// Delete, after a lease, objects that the adopted database does not know: they came after the moment of the restore.
    /// Be sure that no other registry uses the same place.
    #[arg(long, requires = "adopt")]
    discard_unknown: bool,
}

impl Restore {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        if self.adopt {
            return self.adopt(global).await;
        }
        let (Some(directory), Some(to)) = (self.directory, self.to) else {
            return Err(
                Refused::new(Exit::USAGE, "name the backup directory and `--to DATA`").into(),
            );
        };
        let at = self.at.map(|at| Timestamp(at.as_microsecond()));
        let restored = store::restore(&directory, &to, at, &store::Options::default()).await?;
        if global.json {
            output::json(&json!({
                "at": time(restored.at),
                "epoch": restored.epoch,
                "objects": restored.objects,
                "bytes": restored.bytes,
                "problems": restored.problems,
            }))?;
        } else {
            for problem in &restored.problems {
                output::line(format!("damaged: {problem}"));
            }
            output::line(format!(
                "`{}` is as it was at {}: {} objects ({}), event epoch {}",
                to.display(),
                time(restored.at),
                restored.objects,
                output::bytes(restored.bytes),
                restored.epoch
            ));
        }
        Ok(clean(&restored.problems))
    }

    async fn adopt(self, global: &Global) -> anyhow::Result<Exit> {
        let config = Config::load(self.config.as_deref(), None, &[], std::env::vars())?;
        let how = store::AdoptOptions {
            force: self.force,
            discard_unknown: self.discard_unknown,
        };
        let adopted = store::adopt(&config.location, config.store, how).await?;
        if global.json {
            output::json(&json!({
                "epoch": adopted.epoch,
                "uploads": adopted.uploads,
                "leases": adopted.leases,
                "unknownObjects": adopted.unknown,
            }))?;
        } else {
            output::line(format!(
                "the database is adopted: event epoch {}, {} uploads ended, {} leases renewed",
                adopted.epoch, adopted.uploads, adopted.leases
            ));
            if adopted.unknown > 0 {
                output::line(format!(
                    "{} objects came after that moment and are in no row{}",
                    adopted.unknown,
                    if self.discard_unknown {
                        "; they are deleted after a lease"
                    } else {
                        ": `--discard-unknown` deletes them"
                    }
                ));
            }
        }
        Ok(Exit::OK)
    }
}

/// Make a new database from objects and exports, when the old one is lost.
///
/// Each object is read once. Manifests, small blobs and tags come from the exports that a server writes beside the
/// objects every minute. Pins, quotas, the audit record and the history of tags are not in them: restore a backup when
/// there is one. Begins again when it is interrupted.
#[derive(Debug, Args)]
pub(crate) struct Reindex {
    /// The data directory [default: /var/lib/longshore as root, else $XDG_DATA_HOME/longshore].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The configuration file of the registry, when its database is PostgreSQL. The database must be empty.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Take objects over that belong to the lost database, when they lie apart from it. Programs that still have that
    /// database are refused from then on.
    #[arg(long)]
    take_over: bool,
}

impl Reindex {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let config = Config::load(
            self.config.as_deref(),
            self.data.as_deref(),
            &[],
            std::env::vars(),
        )?;
        let told = std::sync::Mutex::new(std::time::Duration::ZERO);
        let begun = std::time::Instant::now();
        let quiet = global.quiet || global.json;
        let progress = move |progress: store::ReindexProgress| {
            let mut told = told
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let now = begun.elapsed();
            if !quiet && now.saturating_sub(*told) >= TELL {
                *told = now;
                output::note(format!(
                    "{}: {} of {}",
                    progress.step, progress.done, progress.of
                ));
            }
        };
        let report =
            store::reindex_at(&config.location, &config.store, self.take_over, progress).await?;
        if global.json {
            output::json(&json!({
                "objects": report.objects,
                "bytes": report.bytes,
                "smallBlobs": report.small_blobs,
                "repositories": report.repositories,
                "manifests": report.manifests,
                "tags": report.tags,
                "newest": report.newest.map(time),
                "problems": report.problems,
            }))?;
        } else {
            for problem in &report.problems {
                output::line(format!("lost: {problem}"));
            }
            output::line(format!(
                "{} repositories, {} manifests, {} tags and {} blobs ({} read) are found again, {} problems",
                report.repositories,
                report.manifests,
                report.tags,
                report.objects + report.small_blobs,
                output::bytes(report.bytes),
                report.problems.len()
            ));
            if let Some(newest) = report.newest {
                output::line(format!(
                    "the newest change that was found is of {}",
                    time(newest)
                ));
            }
        }
        Ok(clean(&report.problems))
    }
}

fn clean(problems: &[String]) -> Exit {
    if problems.is_empty() {
        Exit::OK
    } else {
        Exit::REFUSED
    }
}

fn time(at: Timestamp) -> String {
    jiff::Timestamp::from_microsecond(at.0)
        .unwrap_or_default()
        .to_string()
}

/// How often progress is told.
const TELL: std::time::Duration = std::time::Duration::from_secs(5);
