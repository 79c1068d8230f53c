//! `cargo xtask soak`: many clients push, mount, ask, move, delete and read at random while the collector runs with
//! leases of seconds; what was promised and what was acknowledged must hold at every moment, and at the end
//! storage must be as large as what is referenced.
//!
//! A soak that cannot fail proves nothing: with `--plant`, the server leaves out the renewal of leases where an edge is
//! removed, and then this program must find it.

mod model;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use e2e::Server;

use crate::load::Random;
use crate::mode::{Mode, Site, Store, World};
use crate::shell;
use worker::{Kind, Report, Shared, Worker};

/// How the program runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The run mode.
    #[arg(long, value_enum, default_value_t = Mode::Embedded)]
    mode: Mode,
    /// How many events: blobs provided, manifests pushed, tags moved, things deleted and read.
    #[arg(long, default_value_t = 20_000)]
    events: u64,
    /// How many replicas in cluster mode.
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    /// How many clients at once.
    #[arg(long, default_value_t = 24)]
    workers: u64,
    /// The lease in milliseconds, 2000 in embedded mode and 4000 in cluster mode; what a HEAD promises is half of it.
    #[arg(long)]
    lease: Option<u64>,
    /// Which S3 store is under a cluster.
    #[arg(long, value_enum, default_value_t = Store::Versitygw)]
    store: Store,
    /// Test this program instead of building it; it must be built with `longshore/failpoints`.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Repeats what the clients choose.
    #[arg(long)]
    seed: Option<u64>,
    /// Build the server with optimisation.
    #[arg(long)]
    release: bool,
    /// Plant the bug that this program is there to find, and want it found.
    #[arg(long)]
    plant: bool,
}

/// The switches of a build with failpoints: how long a lease is, and the planted bug.
const LEASE: &str = "LONGSHORE_TEST_LEASE";
const BUG: &str = "LONGSHORE_TEST_BUG";

/// What the servers are told besides: what was deleted goes at once, and what refers to nothing goes soon.
const CONFIG: &str =
    "version: 1\nlog: {level: warn}\ngc: {keep_deleted: 1s, orphan_referrers: 1s}\n";

/// Bodies up to this length stay in the row of the blob; the soak pushes none that is near it.
const IN_ROW: usize = 10_000;

/// Runs it; `false` when something was wrong, or when a planted bug was not found.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let program = shell::program(
        options.program.as_deref(),
        options.release,
        &["longshore/failpoints"],
    )?;
    let seed = options.seed.unwrap_or_else(Random::seed);
    println!("seed {seed}");
    let world = World::start(&program, options.mode, options.store)?;
    let site = world.site()?;
    let lease = Duration::from_millis(options.lease.unwrap_or(match options.mode {
        Mode::Embedded => 2000,
        Mode::Cluster => 4000,
    }));
    let mut settings = site
        .options()
        .config(CONFIG)
        .env(LEASE, &format!("{}ms", lease.as_millis()));
    if options.plant {
        settings = settings.env(BUG, "no-renewal");
    }
    let servers = site.servers(&settings, options.replicas)?;
    let urls = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let shared = Arc::new(Shared::new(urls, "", lease, options.events, seed));
    let start = Instant::now();
    let mut workers = work(&shared, options, seed);
    let took = start.elapsed();
    let mut report = merge(&mut workers);
    print(&report, took);
    if options.plant {
        let found = report.wrong.iter().any(|wrong| wrong.kind == Kind::Unknown);
        println!(
            "{}",
            if found {
                "the planted bug was found"
            } else {
                "the planted bug was NOT found: this soak proves nothing"
            }
        );
        return Ok(found);
    }
    if workers.iter().any(|worker| !worker.deletes_repositories) {
        report.fault("this server does not delete repositories");
    }
    if report.judged == 0 {
        report.fault("no manifest was pushed in time to be judged: use longer leases");
    }
    let looked = each(&mut workers, Worker::read_all)?;
    let read = merge(&mut workers);
    println!(
        "{} things looked for at the end",
        looked.iter().sum::<u64>()
    );
    report.wrong.extend(read.wrong);
    each(&mut workers, |worker| worker.adopt().map(|()| 0))?;
    for referenced in [true, false] {
        if !referenced {
            each(&mut workers, |worker| worker.delete_all().map(|()| 0))?;
        }
        let wanted = Size::of(&workers);
        let words = if referenced {
            "with what is referenced"
        } else {
            "with nothing"
        };
        match settle(&world, &site, &wanted, lease) {
            Ok(took) => println!("storage {words}: {wanted} after {} s", took.as_secs()),
            Err(error) => report.fault(&format!("storage {words}: {error:#}")),
        }
    }
    for server in &servers {
        let log = server.logged();
        if log.contains("panicked") {
            report.fault(&format!("a server panicked: {log}"));
        }
    }
    stop(servers, &mut report);
    if let Err(error) = site.verify() {
        report.fault(&format!("{error:#}"));
    }
    let good = report.wrong.is_empty();
    verdict(&report);
    Ok(good)
}

/// Runs all workers until the events are done.
fn work(shared: &Arc<Shared>, options: &Options, seed: u64) -> Vec<Worker> {
    let threads: Vec<_> = (0..options.workers)
        .map(|id| {
            let mut worker = Worker::new(Arc::clone(shared), id, seed);
            std::thread::spawn(move || {
                worker.run();
                worker
            })
        })
        .collect();
    let begun = Instant::now();
    let mut told = begun;
    while threads.iter().any(|thread| !thread.is_finished()) {
        std::thread::sleep(Duration::from_millis(50));
        if told.elapsed() > Duration::from_mins(1) {
            told = Instant::now();
            let left = shared.left.load(Ordering::Relaxed);
            println!("{} s: {left} events left", begun.elapsed().as_secs());
        }
    }
    threads
        .into_iter()
        .filter_map(|thread| thread.join().ok())
        .collect()
}

/// Lets all workers do something at once.
fn each(
    workers: &mut [Worker],
    task: impl Fn(&mut Worker) -> anyhow::Result<u64> + Sync,
) -> anyhow::Result<Vec<u64>> {
    let task = &task;
    std::thread::scope(|scope| {
        let running: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                scope.spawn(move || {
                    worker.hang_up();
                    task(worker)
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a worker panicked")))
            .collect()
    })
}

/// Layers that everybody pushes: small ones, which stay in rows, and larger ones, which are objects.
fn pool(seed: u64) -> Vec<(worker::Blob, Vec<u8>)> {
    let mut random = Random(seed);
    (0..120)
        .map(|at| {
            let length = if at % 4 == 0 {
                20_000 + random.below(20_000)
            } else {
                50 + random.below(2000)
            };
            worker::content(&mut random, usize::try_from(length).unwrap_or(50))
        })
        .collect()
}

impl Shared {
    fn new(urls: Vec<String>, prefix: &str, lease: Duration, events: u64, seed: u64) -> Self {
        Self {
            urls,
            pool: pool(seed),
            repositories: (0..4).map(|at| format!("{prefix}shared/app{at}")).collect(),
            prefix: prefix.to_owned(),
            lease,
            left: AtomicU64::new(events),
            stop: AtomicBool::new(false),
        }
    }
}

/// The soak's clients as the load of a program that kills servers.
pub(crate) struct Background {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Worker>>,
}

impl Background {
    /// Starts `count` clients; the names of their repositories begin with `prefix`.
    pub(crate) fn start(urls: &[String], prefix: &str, count: u64, seed: u64) -> Self {
        let shared = Shared::new(urls.to_vec(), prefix, SHORT, u64::MAX, seed);
        let shared = Arc::new(shared);
        let threads = (0..count)
            .map(|id| {
                let mut worker = Worker::new(Arc::clone(&shared), id, seed);
                std::thread::spawn(move || {
                    worker.run_among_deaths();
                    worker
                })
            })
            .collect();
        Self { shared, threads }
    }

    /// How many events there were so far.
    pub(crate) fn events(&self) -> u64 {
        u64::MAX - self.shared.left.load(Ordering::Relaxed)
    }

    /// Ends the clients and gives back what they know.
    pub(crate) fn finish(self) -> Known {
        self.shared.stop.store(true, Ordering::Relaxed);
        let workers = self
            .threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect();
        Known(workers)
    }
}

/// What the clients of a [`Background`] know.
pub(crate) struct Known(Vec<Worker>);

impl Known {
    /// Asks these servers for everything: how many things were looked for, and what is wrong.
    pub(crate) fn check(&mut self, urls: &[String]) -> anyhow::Result<(u64, Vec<String>)> {
        let looked = each(&mut self.0, |worker| {
            worker.talk_to(urls);
            worker.read_all()
        })?;
        let report = merge(&mut self.0);
        let wrong = report
            .wrong
            .iter()
            .map(|wrong| format!("{}: {}", wrong.kind.text(), wrong.text))
            .collect();
        Ok((looked.iter().sum(), wrong))
    }
}

/// The lease of servers under a [`Background`], and what tells them.
const SHORT: Duration = Duration::from_secs(3);

/// What makes a server of a build with failpoints have leases of seconds.
pub(crate) fn short_leases() -> (&'static str, String) {
    (LEASE, format!("{}ms", SHORT.as_millis()))
}

fn merge(workers: &mut [Worker]) -> Report {
    let mut all = Report::default();
    for worker in workers {
        let report = std::mem::take(&mut worker.report);
        for (what, count) in report.events {
            *all.events.entry(what).or_default() += count;
        }
        all.requests += report.requests;
        all.judged += report.judged;
        all.late += report.late;
        all.wrong.extend(report.wrong);
    }
    all
}

fn print(report: &Report, took: Duration) {
    let events: u64 = report.events.values().sum();
    println!(
        "{events} events ({} requests) in {:.1} s: {:.0} events/s",
        report.requests,
        took.as_secs_f64(),
        events as f64 / took.as_secs_f64().max(0.001)
    );
    for (what, count) in &report.events {
        println!("  {count:>9} {what}");
    }
    println!(
        "{} manifests pushed within every promise, {} later than one",
        report.judged, report.late
    );
}

fn verdict(report: &Report) {
    let mut counts: BTreeMap<Kind, u64> = BTreeMap::new();
    for wrong in &report.wrong {
        *counts.entry(wrong.kind).or_default() += 1;
        if counts.get(&wrong.kind) <= Some(&5) {
            println!("FAILED  {}: {}", wrong.kind.text(), wrong.text);
        }
    }
    for kind in [Kind::Unknown, Kind::Lost, Kind::Answer] {
        println!("{} {}", counts.get(&kind).unwrap_or(&0), kind.text());
    }
}

impl Report {
    fn fault(&mut self, text: &str) {
        self.wrong.push(worker::Wrong {
            kind: Kind::Answer,
            text: text.to_owned(),
        });
    }
}

/// What is referenced, and what is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Size {
    manifests: u64,
    /// Pairs of a repository and a blob that it holds; unknown in embedded mode.
    held: Option<u64>,
    blobs: u64,
    objects: u64,
    object_bytes: u64,
    /// Uploads and objects that wait to be deleted; unknown in embedded mode.
    waiting: Option<u64>,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} manifests, {} blobs, {} objects of {} bytes",
            self.manifests, self.blobs, self.objects, self.object_bytes
        )?;
        if let (Some(held), Some(waiting)) = (self.held, self.waiting) {
            write!(f, ", {held} held, {waiting} waiting")?;
        }
        Ok(())
    }
}

impl Size {
    /// Of what the workers know to be referenced.
    fn of(workers: &[Worker]) -> Self {
        let (mut manifests, mut held) = (BTreeSet::new(), BTreeSet::new());
        for worker in workers {
            for (name, known) in &worker.repositories {
                manifests.extend(known.manifests.keys().map(|digest| (name, digest)));
                held.extend(known.blobs().into_iter().map(|blob| (name, blob)));
            }
        }
        let blobs: BTreeSet<_> = held.iter().map(|(_, blob)| blob.clone()).collect();
        let objects: Vec<_> = blobs.iter().filter(|blob| blob.size > IN_ROW).collect();
        Self {
            manifests: manifests.len() as u64,
            held: Some(held.len() as u64),
            blobs: blobs.len() as u64,
            objects: objects.len() as u64,
            object_bytes: objects.iter().map(|blob| blob.size as u64).sum(),
            waiting: Some(0),
        }
    }

    /// Of what is stored.
    fn stored(world: &World, site: &Site) -> anyhow::Result<Self> {
        let objects = world.objects(site)?;
        let mut size = Self {
            manifests: 0,
            held: world.rows(site, "repository_blob"),
            blobs: 0,
            objects: objects.len() as u64,
            object_bytes: objects.iter().map(|(_, size)| size).sum(),
            waiting: None,
        };
        if let Some(manifests) = world.rows(site, "manifest") {
            size.manifests = manifests;
            size.blobs = world.rows(site, "blob").unwrap_or_default();
            size.waiting = Some(
                ["deletion", "upload"]
                    .iter()
                    .filter_map(|table| world.rows(site, table))
                    .sum(),
            );
        } else {
            let report = site.report()?;
            size.manifests = report["manifests"].as_u64().unwrap_or_default();
            size.blobs = report["blobs"].as_u64().unwrap_or_default();
        }
        Ok(size)
    }
}

/// Waits until storage is as large as it must be; how long that took.
fn settle(world: &World, site: &Site, wanted: &Size, lease: Duration) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut least = u64::MAX;
    let mut progress = start;
    loop {
        let mut stored = Size::stored(world, site)?;
        // What this mode cannot count is not judged.
        stored.held = stored.held.or(wanted.held);
        stored.waiting = stored.waiting.or(wanted.waiting);
        if stored == *wanted {
            return Ok(start.elapsed());
        }
        // A long soak leaves much behind: as long as it becomes less, the collector is at work.
        let left = stored.manifests + stored.blobs + stored.objects;
        if left < least {
            (least, progress) = (left, Instant::now());
        }
        if progress.elapsed() > lease * 10 + Duration::from_secs(30) {
            bail!("{wanted} are referenced, {stored} are stored");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn stop(servers: Vec<Server>, report: &mut Report) {
    for mut server in servers {
        if !server.runs() {
            report.fault(&format!("a server ended by itself: {}", server.logged()));
            continue;
        }
        let status = server.stop();
        if !status.success() {
            report.fault(&format!(
                "a server ended with {status}: {}",
                server.logged()
            ));
        }
    }
}
