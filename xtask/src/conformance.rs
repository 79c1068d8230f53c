//! `cargo xtask conformance PROGRAM`: the official conformance program against the built server.
//!
//! Its exit status hides skipped checks, and a parent shows the best of its children; so the leaves
//! of its own results are counted, and a skip is as bad as a failure.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::mode::{Mode, Store, World};
use crate::shell;

/// How the program runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The conformance program, built from the distribution specification's `conformance` directory.
    #[arg(value_name = "PROGRAM")]
    conformance: PathBuf,
    /// The run mode.
    #[arg(long, value_enum, default_value_t = Mode::Embedded)]
    mode: Mode,
    /// How many replicas in cluster mode.
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// Which S3 store is under a cluster.
    #[arg(long, value_enum, default_value_t = Store::Minio)]
    store: Store,
    /// Build the server with optimisation.
    #[arg(long)]
    release: bool,
    /// Test this server instead of building it.
    #[arg(long = "program", value_name = "SERVER")]
    program: Option<PathBuf>,
}

/// How many checks must pass at least: what the program of June 2026 counts with everything on.
const LEAST: u64 = 1032;

/// Runs it; `false` unless everything passed and nothing was skipped.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let program = std::path::absolute(&options.conformance)?;
    if !program.is_file() {
        bail!(
            "`{}` is not a program: build it from `conformance/` of a copy of the distribution specification, with `go build -o conformance .`",
            program.display()
        );
    }
    let built = shell::program(options.program.as_deref(), options.release, &[])?;
    let world = World::start(&built, options.mode, options.store)?;
    let site = world.site()?;
    // The program speaks to one of them; the others are there, as they are for every client of a cluster.
    let settings = site
        .options()
        .config("version: 1\nstorage:\n  allow_sparse: true\n");
    let servers = site.servers(&settings, options.replicas)?;
    let server = servers.first().context("a server was started")?;
    let results = tempfile::tempdir()?;
    println!("running {} against {}", program.display(), server.url());
    let status = Command::new(&program)
        .current_dir(results.path())
        .env("OCI_REGISTRY", server.host())
        .env("OCI_TLS", "disabled")
        .env("OCI_REPO1", "conformance/repo1")
        .env("OCI_REPO2", "conformance/repo2")
        .env("OCI_VERSION", "dev")
        .env("OCI_DATA_SPARSE", "true")
        .env("OCI_API_BLOBS_MOUNT_ANONYMOUS", "true")
        .env("OCI_RESULTS_DIR", results.path())
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let text = std::fs::read_to_string(results.path().join("junit.xml"))
        .context("the conformance program left no junit.xml")?;
    // A state that the program checks is one leaf with several checks; the program counts checks.
    let leaves = leaves(&text);
    for (name, outcome) in leaves.iter().filter(|(_, outcome)| *outcome != "passed") {
        println!("{outcome}: {name}");
    }
    let (total, counted_failed, counted_skipped) = totals(&text);
    let of = |word: &str| {
        leaves
            .iter()
            .filter(|(_, outcome)| *outcome == word)
            .count() as u64
    };
    let (failed, skipped) = (
        counted_failed.max(of("failed")),
        counted_skipped.max(of("skipped")),
    );
    let passed = total.saturating_sub(counted_failed + counted_skipped);
    println!(
        "{passed} passed, {failed} failed, {skipped} skipped ({} leaves; the program ended with {status})",
        leaves.len()
    );
    if failed + skipped > 0 {
        let kept = shell::target().join("conformance");
        std::fs::create_dir_all(&kept)?;
        for name in ["junit.xml", "results.yaml", "report.html"] {
            // Not every version writes each.
            drop(std::fs::copy(results.path().join(name), kept.join(name)));
        }
        std::fs::write(kept.join("server.log"), server.logged())?;
        println!("its results are in {}", kept.display());
    }
    if passed < LEAST {
        println!(
            "expected at least {LEAST} to pass: is this the program of the specification's main branch?"
        );
    }
    Ok(failed + skipped == 0 && passed >= LEAST && status.success())
}

/// All checks, failed ones and skipped ones, as the head of a JUnit file counts them.
fn totals(junit: &str) -> (u64, u64, u64) {
    let head = junit
        .split("<testsuite ")
        .nth(1)
        .and_then(|rest| rest.split('>').next())
        .unwrap_or("");
    let of = |name: &str| -> u64 {
        let value = head
            .split(&format!("{name}=\""))
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    (
        of("tests"),
        of("failures") + of("errors"),
        of("skipped") + of("disabled"),
    )
}

/// The test cases of a JUnit file with their outcomes.
fn leaves(junit: &str) -> Vec<(String, &'static str)> {
    let mut leaves = Vec::new();
    for part in junit.split("<testcase").skip(1) {
        let head = part.split('>').next().unwrap_or("");
        let name = head
            .split(" name=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .unwrap_or("?");
        let body = if head.ends_with('/') {
            ""
        } else {
            part.split("</testcase>").next().unwrap_or("")
        };
        let outcome = if body.contains("<failure") || body.contains("<error") {
            "failed"
        } else if body.contains("<skipped") {
            "skipped"
        } else {
            "passed"
        };
        leaves.push((name.to_owned(), outcome));
    }
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_told_apart() {
        let text = "<testsuites tests=\"4\"><testsuite name=\"s\"><testcase name=\"a\" classname=\"x\"/>\
                    <testcase classname=\"x\" name=\"b\"><failure message=\"m\">t</failure></testcase>\
                    <testcase name=\"c\"><skipped/></testcase><testcase name=\"d\"><system-out>failure</system-out></testcase></testsuite>";
        let got = leaves(text);
        let want = [
            ("a", "passed"),
            ("b", "failed"),
            ("c", "skipped"),
            ("d", "passed"),
        ];
        let head = "<testsuites tests=\"9\"><testsuite name=\"s\" tests=\"9\" failures=\"1\" errors=\"2\" skipped=\"3\">";
        assert_eq!(totals(head), (9, 3, 3));
        assert_eq!(got, want.map(|(name, outcome)| (name.to_owned(), outcome)));
    }
}
