//! Collection: what it costs as live data grow, and what pulls notice of it.
//!
//! The cost is that of the server's process from the start of a collection to its end, nothing else asked meanwhile,
//! with the same garbage at each size of live data; sizes take turns.
//!
//! For pulls, two servers have the same live data: one collects a backlog with the settings that everybody has, the other is
//! told not to collect. Short slices of pulls go to one and to the other by turns, and the one whose turn it is not is stopped
//! (`SIGSTOP`), so that each is alone when it is measured and both see the same machine. A slice counts where the collector got
//! something done in it. Pulls come from clients that ask again at once, which leaves no core idle, and from clients that ask at
//! fixed times and leave most of the machine idle.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use e2e::Server;
use e2e::server::signal;
use rustix::process::Signal;
use serde_json::Value;

use super::content::Random;
use super::contestant::OURS;
use super::growth::{Growth, Table, fill, percentile};
use super::load::{all, expect, push_blob};
use super::report::median;
use super::wire::{Base, Wire};
use super::{process, say};

/// Blobs that one collection takes away where its cost is measured.
const COST_GARBAGE: u64 = 2000;
/// How often each size is measured.
const COST_ROUNDS: usize = 3;
/// The size of garbage: too large for a row, so each is an object.
const GARBAGE_SIZE: usize = 32 * 1024;
/// Pushers of garbage.
const PUSHERS: usize = 16;
/// Connections that pull.
const PULLERS: usize = 8;
/// The size of the blob that is pulled.
const PULLED: usize = 1 << 20;
/// How long pulls go to one server before they go to the other.
const SLICE: Duration = Duration::from_secs(1);
/// The part of it that is not counted, in which a server that was stopped comes back.
const WARM: Duration = Duration::from_millis(200);
/// Pairs of slices of one kind of load.
const PAIRS: usize = 20;
/// The part of the server's capacity that clients with fixed times ask for.
const CALM: f64 = 0.3;
/// How long a collection may take.
const PATIENCE: Duration = Duration::from_mins(10);

const OFF: &str = "version: 1\ngc:\n  enabled: false\n";
/// The settings that everybody has.
const ON: &str = "version: 1\n";

/// What all sizes have been measured for.
#[derive(Default)]
struct Cost {
    cpu: Vec<f64>,
    rate: Vec<f64>,
}

/// Measures both and fills the table.
pub(crate) fn run(growth: &Growth<'_>, table: &mut Table) -> anyhow::Result<()> {
    let sites = fill_sites(growth)?;
    let mut costs: Vec<Cost> = sites.iter().map(|_| Cost::default()).collect();
    let mut order: Vec<usize> = (0..sites.len()).collect();
    let mut random = Random::new()?;
    for round in 0..COST_ROUNDS {
        say(&format!(
            "collection: cost, round {} of {COST_ROUNDS}",
            round + 1
        ));
        random.shuffle(&mut order);
        for &at in &order {
            cost(growth, &sites[at].1, &mut costs[at])?;
        }
    }
    for ((size, live), cost) in sites.iter().zip(&costs) {
        say(&format!("collection: pulls beside it, {size} manifests"));
        let noticed = pulls_beside(growth, live)?;
        let mut figures = vec![
            ("CPU us/blob", median(&cost.cpu)),
            ("blobs/s when idle", median(&cost.rate)),
        ];
        figures.extend(noticed);
        table.row(OURS, *size, &figures);
        // The disk is for the next size.
        std::fs::remove_dir_all(live)?;
    }
    Ok(())
}

/// A data directory for each size.
fn fill_sites(growth: &Growth<'_>) -> anyhow::Result<Vec<(u64, PathBuf)>> {
    let base_dir = growth.dir.join("growing");
    let mut sites = Vec::new();
    let mut there = 0;
    for &size in &growth.arguments.manifests {
        say(&format!("collection: filling up to {size} manifests"));
        let (mut server, base) = growth.server_in(&base_dir, Some(OFF))?;
        fill(&base, there..size)?;
        there = there.max(size);
        push_blob(&mut Wire::open(&base)?, REPOSITORY, &pulled())?;
        server.stop();
        drop(server);
        let live = growth.dir.join(format!("live-{size}"));
        copy(&base_dir, &live)?;
        sites.push((size, live));
    }
    std::fs::remove_dir_all(&base_dir)?;
    Ok(sites)
}

/// Collects once, with nothing else to do.
fn cost(growth: &Growth<'_>, live: &Path, cost: &mut Cost) -> anyhow::Result<()> {
    make_garbage(growth, live, COST_GARBAGE)?;
    let (mut server, base) = growth.server_in(live, Some(ON))?;
    let (cpu, start) = (process::cpu(server.pid())?, Instant::now());
    // The objects wait in the outbox for a while, so the speed is that of the queue.
    let mut queue_took = None;
    loop {
        let left = Left::ask(&base)?;
        if left.candidates == 0 && queue_took.is_none() {
            queue_took = Some(start.elapsed());
        }
        if left.candidates == 0 && left.objects == 0 {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "the collection does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    let cpu = process::cpu(server.pid())?.saturating_sub(cpu);
    let took = queue_took.unwrap_or_default().as_secs_f64().max(1e-3);
    cost.cpu.push(cpu.as_secs_f64() * 1e6 / COST_GARBAGE as f64);
    cost.rate.push(COST_GARBAGE as f64 / took);
    server.stop();
    Ok(())
}

/// A server in slices.
struct Side {
    server: Server,
    base: Base,
    wires: Vec<Mutex<Wire>>,
}

impl Side {
    fn start(growth: &Growth<'_>, dir: &Path, config: &str) -> anyhow::Result<Self> {
        let (server, base) = growth.server_in(dir, Some(config))?;
        let wires = (0..PULLERS)
            .map(|_| Ok(Mutex::new(Wire::open(&base)?)))
            .collect::<anyhow::Result<_>>()?;
        let side = Self {
            server,
            base,
            wires,
        };
        side.pause();
        Ok(side)
    }

    fn pause(&self) {
        signal(self.server.pid(), Signal::STOP);
    }

    fn go_on(&self) {
        signal(self.server.pid(), Signal::CONT);
    }

    /// One slice; each pull's milliseconds.
    fn slice(&self, request: &str, every: Option<Duration>) -> anyhow::Result<Vec<f64>> {
        let start = Instant::now();
        let times = all(PULLERS, |number| {
            let mut wire = self.wires[number]
                .lock()
                .map_err(|_| anyhow::anyhow!("a load generator panicked"))?;
            let request = wire.request_head("GET", request, "", None);
            let mut times = Vec::new();
            // The first ones begin one after the other.
            let mut due = start
                + every.map_or(Duration::ZERO, |every| {
                    every * u32::try_from(number).unwrap_or(0) / u32::try_from(PULLERS).unwrap_or(1)
                });
            while start.elapsed() < SLICE {
                // From when it was due: one that waits for the one before it has waited.
                let mut begin = Instant::now();
                if let Some(every) = every {
                    std::thread::sleep(due.saturating_duration_since(begin));
                    begin = due;
                    due += every;
                }
                wire.send(&request)?;
                let head = wire.head()?;
                expect(&head, 200, "GET of a blob")?;
                wire.discard(PULLED as u64)?;
                if begin.duration_since(start) >= WARM {
                    times.push(begin.elapsed().as_secs_f64() * 1e3);
                }
            }
            Ok(times)
        })?;
        Ok(times.into_iter().flatten().collect())
    }
}

/// Figures of pulls beside a collection and without.
fn pulls_beside(growth: &Growth<'_>, live: &Path) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let still = growth.dir.join("still");
    copy(live, &still)?;
    make_garbage(growth, live, growth.arguments.garbage)?;
    let collecting = Side::start(growth, live, ON)?;
    let quiet = Side::start(growth, &still, OFF)?;
    let target = format!("/v2/{REPOSITORY}/blobs/{}", e2e::digest(&pulled()));
    for side in [&collecting, &quiet] {
        side.go_on();
        side.slice(&target, None)?;
        side.pause();
    }
    let mut figures = Vec::new();
    let mut every = None;
    for names in [&BUSY, &CALM_NAMES] {
        let load = compare(&collecting, &quiet, &target, every)?;
        let (during, without) = (&load.during, &load.without);
        let values = [
            percentile(without, 99),
            percentile(during, 99),
            percentile(during, 99) / percentile(without, 99).max(1e-9),
            median(&load.pairs),
            percentile(during, 50) / percentile(without, 50).max(1e-9),
            load.done as f64 / load.time.as_secs_f64().max(1e-9),
        ];
        figures.extend(names.iter().copied().zip(values));
        // What the connections can have together, divided among them.
        let wait = percentile(without, 50) / CALM;
        every = Some(Duration::from_secs_f64(wait / 1e3));
    }
    drop(collecting);
    drop(quiet);
    std::fs::remove_dir_all(&still)?;
    Ok(figures)
}

const BUSY: [&str; 6] = [
    "busy: p99 ms without",
    "busy: p99 ms during",
    "busy: p99 during/without",
    "busy: p99 during/without, median of pairs",
    "busy: p50 during/without",
    "busy: steps/s",
];
const CALM_NAMES: [&str; 6] = [
    "calm: p99 ms without",
    "calm: p99 ms during",
    "calm: p99 during/without",
    "calm: p99 during/without, median of pairs",
    "calm: p50 during/without",
    "calm: steps/s",
];

/// Pulls of one kind of load.
#[derive(Default)]
struct Compared {
    during: Vec<f64>,
    without: Vec<f64>,
    /// The ratios of the 99th percentiles of two slices side by side.
    pairs: Vec<f64>,
    /// Steps that the collector made meanwhile, and the time it had for them.
    done: u64,
    time: Duration,
}

fn compare(
    collecting: &Side,
    quiet: &Side,
    target: &str,
    every: Option<Duration>,
) -> anyhow::Result<Compared> {
    let mut load = Compared::default();
    let start = Instant::now();
    while load.pairs.len() < PAIRS {
        ensure!(
            start.elapsed() < PATIENCE,
            "the collector gets nothing done"
        );
        // Who is first changes.
        let quiet_first = load.pairs.len() % 2 == 0;
        let mut without = Vec::new();
        if quiet_first {
            without = one_slice(quiet, target, every)?;
        }
        collecting.go_on();
        let before = Left::ask(&collecting.base)?;
        let begun = Instant::now();
        let during = collecting.slice(target, every)?;
        let took = begun.elapsed();
        let after = Left::ask(&collecting.base)?;
        collecting.pause();
        if !quiet_first {
            without = one_slice(quiet, target, every)?;
        }
        let done = before.steps().saturating_sub(after.steps());
        if after.candidates == 0 && after.due == 0 {
            ensure!(
                load.pairs.len() >= PAIRS / 3 || after.objects > 0,
                "the collector was done after {} of {PAIRS} slices: give more `--garbage`",
                load.pairs.len()
            );
            if after.objects == 0 {
                break;
            }
        }
        if done > 0 {
            load.done += done;
            load.time += took;
            load.pairs
                .push(percentile(&during, 99) / percentile(&without, 99).max(1e-9));
            load.during.extend(during);
            load.without.extend(without);
        }
    }
    Ok(load)
}

fn one_slice(side: &Side, target: &str, every: Option<Duration>) -> anyhow::Result<Vec<f64>> {
    side.go_on();
    // As the other side is asked.
    Left::ask(&side.base)?;
    let times = side.slice(target, every);
    side.pause();
    times
}

/// What waits for the collector.
struct Left {
    /// Candidates that are due.
    candidates: u64,
    /// Objects in the outbox, due or not.
    objects: u64,
    /// Objects that are due.
    due: u64,
}

impl Left {
    fn ask(base: &Base) -> anyhow::Result<Self> {
        let (head, body) = Wire::open(base)?.call("GET", "/api/v1/collection", "", b"")?;
        expect(&head, 200, "GET of the collection's state")?;
        let state: Value = serde_json::from_slice(&body)?;
        let queue = state["queue"].as_array().context("`queue` is missing")?;
        let number = |name: &str| {
            let value = state["outbox"][name].as_u64();
            value.with_context(|| format!("`outbox.{name}` is missing"))
        };
        Ok(Self {
            candidates: queue.iter().filter_map(|kind| kind["due"].as_u64()).sum(),
            objects: number("objects")?,
            due: number("due")?,
        })
    }

    /// Steps that are left: a blob is a candidate and then an object.
    fn steps(&self) -> u64 {
        2 * self.candidates + self.objects
    }
}

/// Starts on a data directory, makes garbage there and ends.
fn make_garbage(growth: &Growth<'_>, dir: &Path, count: u64) -> anyhow::Result<()> {
    let (mut server, base) = growth.server_in(dir, Some(OFF))?;
    garbage(&base, count)?;
    let left = Left::ask(&base)?;
    ensure!(left.candidates >= count, "the garbage does not wait");
    server.stop();
    Ok(())
}

/// Pushes blobs and deletes them again.
fn garbage(base: &Base, count: u64) -> anyhow::Result<()> {
    let next = AtomicU64::new(0);
    all(PUSHERS, |_| {
        let mut random = Random::new()?;
        let mut wire = Wire::open(base)?;
        let mut bytes = vec![0; GARBAGE_SIZE];
        while next.fetch_add(1, Ordering::Relaxed) < count {
            random.fill(&mut bytes);
            let digest = push_blob(&mut wire, "bench/garbage", &bytes)?;
            let target = format!("/v2/bench/garbage/blobs/{digest}");
            let (head, _) = wire.call("DELETE", &target, "", b"")?;
            expect(&head, 202, "DELETE of a blob")?;
        }
        Ok(())
    })?;
    Ok(())
}

fn pulled() -> Vec<u8> {
    vec![7; PULLED]
}

/// Copies a data directory that no server is on.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in
        std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?
    {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            std::fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

const REPOSITORY: &str = "bench/pulled";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_two_steps() {
        let left = |candidates, objects| Left {
            candidates,
            objects,
            due: 0,
        };
        // One candidate becomes an object, and the object goes.
        assert_eq!(left(1, 0).steps() - left(0, 1).steps(), 1);
        assert_eq!(left(0, 1).steps() - left(0, 0).steps(), 1);
    }

    #[test]
    fn copies_have_everything() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(from.path().join("o/ab")).unwrap();
        std::fs::write(from.path().join("o/ab/c"), b"x").unwrap();
        copy(from.path(), &to.path().join("there")).unwrap();
        assert_eq!(std::fs::read(to.path().join("there/o/ab/c")).unwrap(), b"x");
    }
}
