//! The menu for people and CI, `cargo xtask <command>`: everything that is done to this repository
//! other than writing in it.
//!
//! The key decision: the logic is here and not in shell scripts or a CI system's own language, so
//! that a developer's machine and CI do the same. Long proofs (`kill`, `power-cut`, `conformance`) and measurements
//! (`bench`) are programs with a number of rounds, because a timed test is wrong on a slow day.
//!
//! What it does not do: link the product. It builds the program and treats it as users do; the only
//! thing it shares with the end-to-end tests is their harness, [`e2e`].

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a menu for people starts programs, reads the clock and prints; nothing of it is shipped"
)]

mod bench;
mod conformance;
mod deny;
mod engine;
mod kill;
mod load;
mod mode;
mod power_cut;
mod provision;
mod shell;
mod soak;
mod test;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// The menu.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "What can be done to this repository"
)]
struct Menu {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// All tests: those that need Rust alone, and those with real clients and a real engine.
    Test {
        /// Only one of the two parts.
        #[arg(long)]
        only: Option<Part>,
        /// Only tests whose name contains this.
        #[arg(long)]
        filter: Option<String>,
        /// Test this program end to end instead of building it.
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Exactly what CI runs (`.ci/run`).
    Ci,
    /// Brings the real clients into `target/tools` and says what is there.
    Tools,
    /// Checks licences, bans, duplicates and sources of all dependencies against `deny.toml`.
    Deny,
    /// Runs the official conformance program against the built server: 0 failed, 0 skipped.
    Conformance(conformance::Options),
    /// Runs the previous program on the newest schema and back.
    Upgrade(upgrade::Options),
    /// Kills the server at every failpoint and at random, and lets its disk refuse to sync.
    Kill(kill::Options),
    /// Cuts the power of the server's file system (needs root).
    PowerCut(power_cut::Options),
    /// Pushes, mounts, moves, deletes and reads at random while the collector runs with leases of seconds.
    Soak(soak::Options),
    /// Measures the server beside nginx, a sink and other registries, as ratios.
    Bench(bench::Arguments),
}

/// A part of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Needs Rust alone.
    Unit,
    /// Needs real clients, an engine and PostgreSQL.
    E2e,
}

fn main() -> ExitCode {
    let outcome = match Menu::parse().command {
        Command::Test {
            only,
            filter,
            program,
        } => test::run(only, filter.as_deref(), program),
        Command::Ci => shell::run("bash", [".ci/run"]).map(|()| true),
        Command::Tools => provision::tools().map(|tools| {
            tools.print();
            tools.missing.is_empty()
        }),
        Command::Deny => deny::run(),
        Command::Conformance(options) => conformance::run(&options),
        Command::Kill(options) => kill::run(&options),
        Command::Upgrade(options) => upgrade::run(&options),
        Command::PowerCut(options) => power_cut::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Bench(arguments) => bench::run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
