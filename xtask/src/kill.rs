//! `cargo xtask kill`: a server dies, at every numbered step and at random moments, or its disk refuses to sync; then
//! every acknowledged write is looked for, and the store is checked.
//!
//! In cluster mode it is one of the replicas that dies, and the others must go on serving.

mod migration;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use e2e::Server;
use e2e::server::Options as ServerOptions;

use crate::load::{Ledger, Load, Random};
use crate::mode::{Mode, Site, Store, World, start};
use crate::{shell, soak};

/// How the program runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The run mode.
    #[arg(long, value_enum, default_value_t = Mode::Embedded)]
    mode: Mode,
    /// How many random kills under mixed load.
    #[arg(long, default_value_t = 20)]
    rounds: u64,
    /// How often each failpoint is passed to the death; 0 leaves them out.
    #[arg(long, default_value_t = 1)]
    passes: u64,
    /// Only failpoints whose name contains this, and no random kills.
    #[arg(long)]
    point: Option<String>,
    /// How many runs with refused syncs, in embedded mode.
    #[arg(long, default_value_t = 10)]
    refused: u64,
    /// How many replicas in cluster mode.
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// Which S3 store is under a cluster.
    #[arg(long, value_enum, default_value_t = Store::Versitygw)]
    store: Store,
    /// Test this program instead of building it; it must be built with `longshore/failpoints`.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Repeats a run.
    #[arg(long)]
    seed: Option<u64>,
}

/// Steps that one mode does not have, because it keeps files or objects in another way.
fn is_elsewhere(point: &str, mode: Mode) -> bool {
    let (files, objects) = (
        [
            "upload.before_spill",
            "upload.after_spill_row",
            "upload.after_create",
            "upload.after_write",
            "upload.before_sync",
            "upload.after_sync",
            "upload.after_entry_sync",
            "commit.before_sync",
            "commit.after_sync",
            "commit.after_entry_sync",
            "migrate.before_copy",
            "migrate.after_copy",
        ],
        [
            "upload.after_name_row",
            "upload.after_create_multipart",
            "upload.after_multipart_row",
            "upload.after_part",
            "upload.after_tail",
            "commit.before_complete",
            "commit.after_complete",
            "outbox.after_abort",
            "seal.before",
            "seal.after_numbers",
            "seal.after_events",
        ],
    );
    match mode {
        Mode::Embedded => objects.contains(&point),
        Mode::Cluster => files.contains(&point),
    }
}

/// Steps of commands, not of a server: the tests of these commands kill there.
fn is_of_a_command(point: &str) -> bool {
    [
        "carry.",
        "import.",
        "export.",
        "transfer.",
        "backup.",
        "restore.",
        "reindex.",
    ]
    .iter()
    .any(|prefix| point.starts_with(prefix))
}

/// What ends a server.
#[derive(Debug)]
enum Death {
    /// It kills itself the n-th time it passes a point.
    Point(String, u64),
    /// We kill it after so many acknowledgements.
    After(u64),
    /// Syncs of each thread fail from the n-th on.
    Refused(u64),
}

impl Death {
    fn label(&self) -> String {
        match self {
            Self::Point(name, count) => format!("{name}:{count}"),
            Self::After(count) => format!("kill -9 after {count} acknowledgements"),
            Self::Refused(count) => format!("EIO from sync {count} of each thread on"),
        }
    }

    /// Whether the step needs leases of seconds to be reached.
    fn collects(&self) -> bool {
        matches!(self, Self::Point(name, _) if name.starts_with("collect.") || name == ABORT)
    }

    /// Whether the step needs blobs that an object store takes in parts.
    fn is_of_parts(&self) -> bool {
        let of_parts = |name: &str| {
            name == ABORT
                || ["multipart", "part", "complete"]
                    .iter()
                    .any(|word| name.contains(word))
        };
        matches!(self, Self::Point(name, _) if of_parts(name))
    }
}

/// The end of a multipart upload that was given up, some time after it was.
const ABORT: &str = "outbox.after_abort";

/// How many lives a store has before a fresh one is taken: a long life makes each check long.
const LIVES: u64 = 20;

/// Runs it; `false` when something was lost.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let program = shell::program(options.program.as_deref(), false, &["longshore/failpoints"])?;
    let names = shell::read(shell::command(&program).arg("failpoints"))?;
    let seed = options.seed.unwrap_or_else(Random::seed);
    let mut random = Random(seed);
    let mut points: Vec<&str> = names.lines().collect();
    if points.is_empty() {
        bail!(
            "`{} failpoints` names none: is it built with them?",
            program.display()
        );
    }
    if let Some(part) = &options.point {
        points.retain(|name| name.contains(part.as_str()));
    }
    points.retain(|point| {
        let why = if is_elsewhere(point, options.mode) {
            "this mode has no such step"
        } else if point.starts_with("migrate.") && point.ends_with("_copy") {
            "needs a store of an older version, which the first start of this one is not"
        } else if point.starts_with("retention.") {
            "needs a policy that removes tags, which this load would call a loss"
        } else if point.starts_with("pin.") {
            "needs pins, which this load does not set: killed in the tests of the store"
        } else if is_of_a_command(point) {
            "a step of a command, killed in the tests of it"
        } else {
            return true;
        };
        println!("-       {point}: {why}");
        false
    });
    let (migrations, points): (Vec<&str>, Vec<&str>) = points
        .into_iter()
        .partition(|name| name.starts_with("migrate."));
    println!(
        "seed {seed}, {} failpoints",
        points.len() + migrations.len()
    );
    let strace = shell::find("strace");
    let refused = match options.mode {
        Mode::Embedded if options.point.is_none() => options.refused,
        _ => 0,
    };
    if refused > 0 && strace.is_none() {
        bail!(
            "`strace` injects the errors into fsync and is not here: install it, or say `--refused 0`"
        );
    }
    let world = World::start(&program, options.mode, options.store)?;
    let mut count = Count::default();
    let mut deaths = Vec::new();
    for pass in 0..options.passes {
        for point in &points {
            // The first time, and later ones in later passes, when a thread, a batch or a table is another.
            let time = if pass == 0 { 1 } else { 1 + random.below(12) };
            deaths.push(Death::Point((*point).to_owned(), time));
            if point.starts_with("sql.") {
                // Each transaction passes these, so the first times are those of the start.
                deaths.extend(
                    (0..4).map(|_| Death::Point((*point).to_owned(), 3 + random.below(100))),
                );
            }
        }
    }
    deaths.extend((0..refused).map(|_| Death::Refused(1 + random.below(40))));
    for death in deaths {
        let mut outcome = Ok(0);
        // A load is random, and may not come by a rare step in its time; another one does.
        for _ in 0..LOADS {
            let seed = random.next();
            outcome = once(&world, &death, options.replicas, seed, strace.as_deref());
            match &outcome {
                Err(error) if error.is::<NotPassed>() => {}
                _ => break,
            }
        }
        count.note(&death.label(), outcome);
    }
    if options.passes > 0 {
        for point in migrations {
            count.note(point, migration::once(&world, point, random.next()));
        }
    }
    let rounds = if options.point.is_none() {
        options.rounds
    } else {
        0
    };
    let mut left = rounds;
    while left > 0 {
        let lives = left.min(LIVES);
        left -= lives;
        many(&world, options.replicas, lives, &mut random, &mut count)?;
    }
    println!(
        "{} deaths, {} acknowledged or unanswered writes looked for, {} with losses",
        count.runs, count.checked, count.bad
    );
    Ok(count.bad == 0)
}

/// What came of all deaths.
#[derive(Default)]
struct Count {
    runs: u64,
    checked: u64,
    bad: u64,
}

impl Count {
    fn note(&mut self, label: &str, outcome: anyhow::Result<u64>) {
        self.runs += 1;
        match outcome {
            Ok(count) => {
                self.checked += count;
                println!("ok      {label} ({count} looked for)");
            }
            Err(error) => {
                self.bad += 1;
                println!("FAILED  {label}: {error:#}");
            }
        }
    }
}

/// Clients at work.
enum Work {
    /// Pushes with the leases of production: what was acknowledged stays.
    Pushes(Load),
    /// Everything that clients do, with leases of seconds, while the collector works.
    Mixed(soak::Background),
}

impl Work {
    fn start(mixed: bool, urls: &[String], prefix: &str, seed: u64) -> Self {
        if mixed {
            let prefix = format!("{prefix}-");
            Self::Mixed(soak::Background::start(urls, &prefix, 4, seed))
        } else {
            Self::Pushes(Load::start(urls, prefix, 4, seed))
        }
    }

    fn acknowledged(&self) -> u64 {
        match self {
            Self::Pushes(load) => load.acknowledged(),
            Self::Mixed(background) => background.events(),
        }
    }

    fn finish(self) -> Known {
        match self {
            Self::Pushes(load) => Known::Ledgers(load.finish()),
            Self::Mixed(background) => Known::Soak(background.finish()),
        }
    }
}

/// What the clients know.
pub(crate) enum Known {
    Ledgers(Vec<Ledger>),
    Soak(soak::Known),
}

impl Known {
    /// Asks these servers for everything; how many things were looked for.
    fn check(&mut self, urls: &[String]) -> anyhow::Result<u64> {
        let (count, lost) = match self {
            Self::Ledgers(ledgers) => {
                let (mut count, mut lost) = (0, Vec::new());
                for (ledger, url) in ledgers.iter().zip(urls.iter().cycle()) {
                    lost.extend(ledger.check(url)?);
                    count += ledger.len() as u64;
                }
                (count, lost)
            }
            Self::Soak(known) => known.check(urls)?,
        };
        if !lost.is_empty() {
            let shown: Vec<_> = lost.iter().take(10).map(String::as_str).collect();
            bail!("{} writes lost:\n  {}", lost.len(), shown.join("\n  "));
        }
        Ok(count)
    }
}

/// A point that no load came by.
#[derive(Debug)]
struct NotPassed(String);

impl std::fmt::Display for NotPassed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` was not passed under {LOADS} loads", self.0)
    }
}

impl std::error::Error for NotPassed {}

/// Loads that are tried for one point.
const LOADS: usize = 3;

/// One life and death on a fresh store; how many things were looked for afterwards.
fn once(
    world: &World,
    death: &Death,
    replicas: usize,
    seed: u64,
    strace: Option<&Path>,
) -> anyhow::Result<u64> {
    let site = world.site()?;
    let mut plain = site.options();
    if death.collects() {
        let (name, value) = soak::short_leases();
        plain = plain.env(name, &value);
    }
    // Made beforehand, so that the points are passed by pushes and not by the first start.
    let mut first = start(&plain)?;
    first.stop();
    drop(first);
    let mut others = site.servers(&plain, replicas)?;
    others.pop();
    let mut known = None;
    match doomed(&plain, death, strace)?.start() {
        Ok(mut victim) => {
            let mut urls = vec![victim.url().to_owned()];
            urls.extend(others.iter().map(|server| server.url().to_owned()));
            let work = match (death.collects(), death.is_of_parts()) {
                (false, true) => Work::Pushes(Load::start_large(&urls, "load", 2, seed)),
                (mixed, _) => Work::start(mixed, &urls, "load", seed),
            };
            // With leases of seconds nobody may expect of a push what it expects.
            let besides = (death.collects() && death.is_of_parts())
                .then(|| Load::start_large(&urls, "large", 2, seed));
            let died = await_death(&mut victim, death, &work);
            if !died && matches!(death, Death::Point(..)) && !others.is_empty() {
                // What works in the background may have been done by the others.
                for server in &mut others {
                    server.stop();
                }
                others.clear();
            }
            let died = died || await_death(&mut victim, death, &work);
            victim.kill();
            let survived = others_serve(&others, &work);
            known = Some(work.finish());
            drop(besides.map(Load::finish));
            if !died && let Death::Point(name, _) = death {
                return Err(NotPassed(name.clone()).into());
            }
            survived?;
        }
        // A start that a point or a refused sync ends has acknowledged nothing; what was there stays.
        Err(error)
            if matches!(death, Death::Refused(_)) || error.contains("unix_wait_status(9)") => {}
        Err(error) => bail!("{error}"),
    }
    if others.is_empty() {
        site.verify().context("as the dead server left it")?;
    }
    let checked = after(&site, &plain, others, known.as_mut().into_iter().collect())?;
    world.forget(site);
    Ok(checked)
}

/// How the server that is to die is started.
fn doomed(
    plain: &ServerOptions,
    death: &Death,
    strace: Option<&Path>,
) -> anyhow::Result<ServerOptions> {
    let mut options = plain.clone();
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
    Ok(options)
}

/// Waits for the moment of death; whether the server died by itself.
fn await_death(victim: &mut Server, death: &Death, work: &Work) -> bool {
    let begun = Instant::now();
    let limit = match death {
        Death::Point(..) => Duration::from_secs(20),
        Death::After(_) => Duration::from_secs(30),
        // It may go on refusing for ever; that is right.
        Death::Refused(_) => Duration::from_secs(3),
    };
    while victim.runs() && begun.elapsed() < limit {
        if matches!(death, Death::After(count) if work.acknowledged() >= *count) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    !victim.runs()
}

/// Wants the other replicas to acknowledge more, without the one that died.
fn others_serve(others: &[Server], work: &Work) -> anyhow::Result<()> {
    if others.is_empty() {
        return Ok(());
    }
    let wanted = work.acknowledged() + 20;
    let begun = Instant::now();
    while work.acknowledged() < wanted {
        if begun.elapsed() > Duration::from_secs(40) {
            let logs: Vec<_> = others.iter().map(Server::logged).collect();
            bail!("the other replicas do not serve:\n{}", logs.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Checks a site after a death: each acknowledged write through a server that is started again and those that
/// lived, then the store. Gives back how many things were looked for.
pub(crate) fn after(
    site: &Site,
    options: &ServerOptions,
    others: Vec<Server>,
    known: Vec<&mut Known>,
) -> anyhow::Result<u64> {
    let mut servers = others;
    servers.push(start(options)?);
    let urls: Vec<_> = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let mut checked = 0;
    for known in known {
        checked += known.check(&urls)?;
    }
    for server in &mut servers {
        let status = server.stop();
        if !status.success() {
            bail!("a server ended with {status}\n{}", server.logged());
        }
    }
    site.verify().context("after the restart")?;
    Ok(checked)
}

/// Many lives of one store, each ended at a random moment. Each life begins with the check of the one before.
fn many(
    world: &World,
    replicas: usize,
    lives: u64,
    random: &mut Random,
    count: &mut Count,
) -> anyhow::Result<()> {
    let site = world.site()?;
    // Half of the stores collect with leases of seconds under everything that clients do.
    let mixed = random.below(2) == 0;
    let mut options = site.options();
    if mixed {
        let (name, value) = soak::short_leases();
        options = options.env(name, &value);
    }
    let mut servers = site.servers(&options, replicas)?;
    let mut lived: Vec<Known> = Vec::new();
    for life in 0..lives {
        let death = Death::After(1 + random.below(400));
        let kind = if mixed {
            "mixed, leases of seconds"
        } else {
            "pushes"
        };
        let label = format!("{} ({kind})", death.label());
        let outcome = one_life(
            &site,
            &options,
            &mut servers,
            mixed,
            life,
            &death,
            random.next(),
        );
        match outcome {
            Ok((known, checked)) => {
                lived.push(known);
                count.note(&label, Ok(checked));
            }
            Err(error) => {
                // What is broken stays broken: the next lives get another store.
                count.note(&label, Err(error));
                return Ok(());
            }
        }
    }
    drop(servers.pop());
    let end = after(&site, &options, servers, lived.iter_mut().collect());
    if let Err(error) = end {
        count.note("all lives at their end", Err(error));
    }
    world.forget(site);
    Ok(())
}

/// One life of a store that has several.
fn one_life(
    site: &Site,
    options: &ServerOptions,
    servers: &mut Vec<Server>,
    mixed: bool,
    life: u64,
    death: &Death,
    seed: u64,
) -> anyhow::Result<(Known, u64)> {
    let urls: Vec<_> = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let work = Work::start(mixed, &urls, &format!("life{life}"), seed);
    let mut victim = servers.remove(0);
    let died = await_death(&mut victim, death, &work);
    victim.kill();
    let survived = others_serve(servers, &work);
    let mut known = work.finish();
    if died {
        bail!("the server ended by itself\n{}", victim.logged());
    }
    survived?;
    // With other replicas at work, too.
    site.verify().context("as the dead server left it")?;
    servers.push(start(options)?);
    let urls: Vec<_> = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let checked = known.check(&urls)?;
    Ok((known, checked))
}
