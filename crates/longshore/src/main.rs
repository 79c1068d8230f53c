//! The `longshore` program: command line, configuration and wiring; everything else lives in the
//! crates below it.

mod agent;
mod cli;
mod clock;
mod config;
mod demo;
mod demo_service;
mod output;
mod place;
mod serve;
mod up;

use std::process::ExitCode;

use clap::Parser as _;

use crate::output::Exit;

fn main() -> ExitCode {
    let command = match cli::Cli::try_parse() {
        Ok(command) => command,
        Err(error) => {
            // Help and version are no errors; everything else is a usage error (EX_USAGE).
            let code = if error.use_stderr() {
                Exit::USAGE
            } else {
                Exit::OK
            };
            // A closed pipe is no reason to fail.
            let _ = error.print();
            return code.into();
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        // Two at least: one blocked worker must never stop the others.
        .worker_threads(
            std::thread::available_parallelism()
                .map_or(2, usize::from)
                .max(2),
        )
        // Look at the network often, because a body may give away 1 MiB between two looks.
        .event_interval(4)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&anyhow::Error::new(error).context("cannot start the runtime"));
            return Exit::FAILED.into();
        }
    };
    let code = runtime.block_on(async {
        match Box::pin(command.run()).await {
            Ok(code) => code,
            Err(error) => {
                output::error(&error);
                Exit::of(&error)
            }
        }
    });
    // Blocking threads may still read standard input; they must not hold up the end.
    runtime.shutdown_background();
    code.into()
}
