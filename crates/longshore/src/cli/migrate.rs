//! `longshore migrate`: a whole store to another place.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use store::transfer::{self, Report, Settings, Verify};

use super::Global;
use crate::output::{self, Exit, Refused};
use crate::place;

/// Carry a whole store to another place: a data directory to PostgreSQL and an object store, or back.
///
/// Everything is carried: tags with their generations and history, events with their numbers, the audit record with its
/// chain, pins, quotas. Clients of the event stream go on where they stopped. Uploads that are open are not carried.
///
/// First bring the objects with `--ahead` while the server runs, as often as you like. Then stop it and run the same
/// command without `--ahead`. A run that was broken off is simply started again. At the end the new place is compared
/// with the old one, and the old one opens no more. While a blob cannot be read at the old place nothing comes to its end,
/// and the old place stays in use.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Where from: a configuration file, or a data directory.
    #[arg(long, value_name = "FILE|DIR", required_unless_present = "reopen")]
    from: Option<PathBuf>,
    /// Where to: a configuration file, or a data directory. It must be empty, or begun from the same store.
    #[arg(long, value_name = "FILE|DIR", required_unless_present = "reopen")]
    to: Option<PathBuf>,
    /// Bring objects alone; the server may run.
    #[arg(long)]
    ahead: bool,
    /// Count what would be carried, write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Let go what is missing or damaged at the source: it is listed, and damaged at the new place until somebody pushes it
    /// again.
    #[arg(long)]
    accept_damaged: bool,
    /// What is looked at again at the end.
    #[arg(long, value_name = "WHAT", default_value = "size")]
    verify: Look,
    /// How many objects move at one time.
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = super::import::parallel())]
    parallel: u16,
    /// Let a store open again that was carried away, in place of the new one, or that a run which was killed began to
    /// carry away: a configuration file, or a data directory. What was written at the new place is not in it.
    #[arg(long, value_name = "FILE|DIR", conflicts_with_all = ["from", "to", "ahead", "dry_run", "accept_damaged"])]
    reopen: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Look {
    /// The number of rows of each table and the size of every object.
    Size,
    /// Every row, and every byte of every object.
    Full,
}

impl Migrate {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        if let Some(path) = &self.reopen {
            let (location, _) = place::named(path)?;
            let was = transfer::reopen(&location).await?;
            output::line(if was {
                "it opens again; throw the other one away, both go on with the same event numbers"
            } else {
                "it was not carried away"
            });
            return Ok(Exit::OK);
        }
        let (Some(from), Some(to)) = (&self.from, &self.to) else {
            // clap asks for both.
            return Ok(Exit::USAGE);
        };
        let settings = Settings {
            ahead: self.ahead,
            dry_run: self.dry_run,
            accept_damaged: self.accept_damaged,
            verify: match self.verify {
                Look::Size => Verify::Size,
                Look::Full => Verify::Full,
            },
            parallel: usize::from(self.parallel),
        };
        let (source, _) = place::named(from)?;
        let (destination, _) = place::named(to)?;
        let report = match transfer::migrate(&source, &destination, settings).await {
            Ok(report) => report,
            Err(error @ store::Error::InUse(_)) => {
                return Err(Refused::new(Exit::FAILED, error)
                    .hint("stop the server for the last pass, or bring the objects first with `--ahead`")
                    .into());
            }
            Err(error) => return Err(error).context("the store was not carried"),
        };
        self.show(&report, global)
    }

    fn show(&self, report: &Report, global: &Global) -> anyhow::Result<Exit> {
        if global.json {
            output::json(&report.to_json())?;
        } else {
            if !self.ahead {
                let rows: Vec<Vec<String>> = report
                    .rows
                    .iter()
                    .map(|(table, rows)| vec![(*table).to_owned(), rows.to_string()])
                    .collect();
                output::table(&["TABLE", "ROWS"], &rows);
            }
            if report.objects_stay {
                output::line("the objects stay where they are");
            } else if !self.dry_run {
                output::line(format!(
                    "{} objects ({}) brought, {} compared",
                    report.objects_moved,
                    output::bytes(report.bytes_moved),
                    report.objects_verified
                ));
            }
            for damaged in &report.damaged {
                output::line(format!("damaged: {damaged}"));
            }
            for problem in &report.problems {
                output::line(format!("differs: {problem}"));
            }
            if report.finished {
                output::line("done: start the server at the new place; the old one opens no more");
            } else if !report.problems.is_empty() {
                output::line(
                    "not done: the old place stays in use; mend what is listed, then run this again",
                );
            }
        }
        Ok(if report.problems.is_empty() {
            Exit::OK
        } else {
            Exit::REFUSED
        })
    }
}
