//! `cargo xtask kill`: the server dies, at every numbered step and at random moments, or its disk
//! refuses to sync; then every acknowledged write is looked for, and the store is checked.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use e2e::Server;
use e2e::server::Options as ServerOptions;

use crate::load::{Load, Random};
use crate::shell;

/// How the program runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many rounds; a round is every failpoint once, as many random kills, and some refused syncs.
    #[arg(long, default_value_t = 1)]
    rounds: u64,
    /// Only failpoints whose name contains this.
    #[arg(long)]
    point: Option<String>,
    /// Repeats a run.
    #[arg(long)]
    seed: Option<u64>,
    /// How many random kills in a round.
    #[arg(long, default_value_t = 20)]
    random: u64,
    /// How many runs with refused syncs in a round.
    #[arg(long, default_value_t = 10)]
    refused: u64,
}

/// What ends a server.
enum Death<'a> {
    /// It kills itself the n-th time it passes a point.
    Point(&'a str, u64),
    /// We kill it after so many acknowledgements.
    After(u64),
    /// Syncs of each thread fail from the n-th on.
    Refused(u64),
}

/// Runs it; `false` when something was lost.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let program = shell::build(false, &["store/failpoints"])?;
    let names = shell::read(shell::command(&program).arg("failpoints"))?;
    let points: Vec<&str> = names
        .lines()
        .filter(|name| {
            options
                .point
                .as_ref()
                .is_none_or(|part| name.contains(part.as_str()))
        })
        .collect();
    if points.is_empty() {
        bail!(
            "`{} failpoints` names none: is it built with them?",
            program.display()
        );
    }
    let strace = shell::find("strace");
    if options.refused > 0 && strace.is_none() {
        bail!(
            "`strace` injects the errors into fsync and is not here: install it, or say `--refused 0`"
        );
    }
    let seed = options.seed.unwrap_or_else(Random::seed);
    println!("seed {seed}, {} failpoints", points.len());
    let mut random = Random(seed);
    let (mut runs, mut bad, mut checked) = (0_u64, 0_u64, 0_usize);
    for round in 0..options.rounds {
        let mut deaths: Vec<Death<'_>> = Vec::new();
        for point in &points {
            // The first time, and later ones in later rounds, when a thread, a batch or a table is another.
            deaths.push(Death::Point(
                point,
                if round == 0 { 1 } else { 1 + random.below(12) },
            ));
            if point.starts_with("sql.") {
                // Each transaction passes these, so the first times are those of the start.
                deaths.extend((0..4).map(|_| Death::Point(point, 3 + random.below(100))));
            }
        }
        if options.point.is_none() {
            deaths.extend((0..options.random).map(|_| Death::After(random.below(400))));
            deaths.extend((0..options.refused).map(|_| Death::Refused(1 + random.below(40))));
        }
        for death in deaths {
            runs += 1;
            let label = match &death {
                Death::Point(name, count) => format!("{name}:{count}"),
                Death::After(count) => format!("kill -9 after {count} acknowledgements"),
                Death::Refused(count) => format!("EIO from sync {count} of each thread on"),
            };
            match once(&program, &death, random.next(), strace.as_deref()) {
                Ok(count) => {
                    checked += count;
                    println!("ok      {label} ({count} looked for)");
                }
                Err(error) => {
                    bad += 1;
                    println!("FAILED  {label}: {error:#}");
                }
            }
        }
    }
    println!(
        "{runs} deaths, {checked} acknowledged or unanswered writes looked for, {bad} with losses"
    );
    Ok(bad == 0)
}

/// One life and death; how many things were looked for afterwards.
fn once(
    program: &Path,
    death: &Death<'_>,
    seed: u64,
    strace: Option<&Path>,
) -> anyhow::Result<usize> {
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("data");
    // Made beforehand, so that the points are passed by pushes and not by the first start.
    let mut first = start(&ServerOptions::new(program.to_owned()).data(&data))?;
    first.stop();
    drop(first);

    let mut options = ServerOptions::new(program.to_owned()).data(&data);
    match death {
        Death::Point(name, count) => {
            options = options.env("LONGSHORE_FAILPOINT", &format!("{name}:{count}"));
        }
        Death::Refused(count) => {
            let strace = strace.context("strace was found")?;
            options.wrapper = [
                &strace.display().to_string(),
                // Detached, so that the process we started is the server itself.
                "-D",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                "trace=fsync,fdatasync",
                "-e",
                &format!("inject=fsync,fdatasync:error=EIO:when={count}+"),
            ]
            .map(str::to_owned)
            .to_vec();
        }
        Death::After(_) => {}
    }
    let mut ledgers = Vec::new();
    match options.start() {
        Ok(mut server) => {
            let load = Load::start(server.url(), "load", 4, seed);
            let begun = Instant::now();
            let limit = match death {
                Death::Point(..) => Duration::from_secs(20),
                Death::After(_) => Duration::from_secs(30),
                // It may go on refusing for ever; that is right.
                Death::Refused(_) => Duration::from_secs(3),
            };
            while server.runs() && begun.elapsed() < limit {
                if matches!(death, Death::After(count) if load.acknowledged() >= *count) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let died = !server.runs();
            server.kill();
            ledgers = load.finish();
            if !died && let Death::Point(name, _) = death {
                bail!("`{name}` was not passed in {} s of load", limit.as_secs());
            }
        }
        // A start that a point or a refused sync ends has acknowledged nothing; what was there stays.
        Err(error)
            if matches!(death, Death::Refused(_)) || error.contains("unix_wait_status(9)") => {}
        Err(error) => bail!("{error}"),
    }
    after(program, &data, &ledgers)
}

/// Checks a data directory after a death: the store as it lies, then each acknowledged write, then the
/// store again. Gives back how many things were looked for.
pub(crate) fn after(
    program: &Path,
    data: &Path,
    ledgers: &[crate::load::Ledger],
) -> anyhow::Result<usize> {
    verify(program, data).context("as the dead server left it")?;
    let mut server = start(&ServerOptions::new(program.to_owned()).data(data))?;
    let mut lost = Vec::new();
    for ledger in ledgers {
        lost.extend(ledger.check(server.url())?);
    }
    let status = server.stop();
    if !status.success() {
        lost.push(format!(
            "the restarted server ended with {status}\n{}",
            server.logged()
        ));
    }
    if !lost.is_empty() {
        let shown: Vec<_> = lost.iter().take(10).map(String::as_str).collect();
        bail!("{} writes lost:\n  {}", lost.len(), shown.join("\n  "));
    }
    verify(program, data).context("after the restart")?;
    Ok(ledgers.iter().map(crate::load::Ledger::len).sum())
}

fn verify(program: &Path, data: &Path) -> anyhow::Result<()> {
    for words in [&["verify-store"][..], &["audit", "verify"]] {
        let output = shell::command(program).args(words).arg(data).output()?;
        if !output.status.success() {
            bail!(
                "`{}` found damage: {}{}",
                words.join(" "),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    Ok(())
}

/// Starts a server, with an error in place of a panic.
pub(crate) fn start(options: &ServerOptions) -> anyhow::Result<Server> {
    options.start().map_err(|error| anyhow::anyhow!(error))
}

/// The program to test, built once.
pub(crate) fn program(release: bool) -> anyhow::Result<PathBuf> {
    shell::build(release, &[])
}
