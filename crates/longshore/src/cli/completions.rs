//! `longshore completions`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::output::{self, Exit};

/// Print a completion script, for example `longshore completions bash > /etc/bash_completion.d/longshore`.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self) -> Exit {
        let mut script = Vec::new();
        clap_complete::generate(
            self.shell,
            &mut super::Cli::command(),
            "longshore",
            &mut script,
        );
        output::raw(&script);
        Exit::OK
    }
}
