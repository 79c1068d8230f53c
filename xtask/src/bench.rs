//! `cargo xtask bench`: our server beside the limits of the machine and beside other registries.
//!
//! The figures of one run can be compared with each other and with nothing else: machines, disks and
//! neighbours differ, and so does one machine from hour to hour. So in every round every contestant
//! does every task, in an order that changes, and what is shown first is a ratio. The limits are
//! nginx with `sendfile` for what is read, and for what is written a server that receives the same
//! bytes over the same HTTP and only hashes them. Bodies are checked. It is a program, not a test:
//! it has no opinion on what is fast enough.
//!
//! What it does not do: start other registries. They are given with `--peer NAME=URL,PID`, run with open access over
//! plain HTTP, and keep what is pushed to them.

mod collection;
mod content;
mod contestant;
mod growth;
mod load;
mod process;
mod replicas;
mod report;
mod sink;
mod wire;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};

use crate::shell;
use content::{Image, Images, Large, Random, Source};
use contestant::{Contestant, NGINX, OURS, Peer, Role};
use report::{Entry, Report, Sample, Section};

/// What is measured, and how often.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Size of the large blob, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1024 * 1024))]
    size: u64,
    /// How often everyone does everything.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long requests for manifests and pushes of images go on, each time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Only this task; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<Task>,
    /// Another registry that runs: its name, address and process id.
    #[arg(long = "peer", value_name = "NAME=URL,PID", value_parser = Peer::parse)]
    peers: Vec<Peer>,
    /// The program to measure, in place of a release build of this tree.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Where the data directories go, for as long as this runs: a directory on the disk to be measured [default: target/bench].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Numbers of manifests at which starts and collections are measured, rising.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [10_000, 100_000])]
    manifests: Vec<u64>,
    /// Tags in the repository whose pages are asked for, and that is pushed to.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1000..=10_000_000))]
    tags: u64,
    /// Blobs that wait for the collector while pulls are measured beside it.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1000..=10_000_000))]
    garbage: u64,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Be the sink.
    #[arg(long, hide = true, value_name = "FILE")]
    sink: Option<PathBuf>,
}

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Task {
    /// One connection pulls one large blob.
    Pull,
    /// 64 connections ask for a manifest by tag.
    Manifest,
    /// One connection pushes one large blob.
    Push,
    /// One connection pushes images of 20 small layers.
    Images,
    /// Eight connections push images of 20 small layers.
    ImagesParallel,
    /// From the PUT of a manifest to its event.
    Events,
    /// A start, at 10 000 manifests and more.
    Start,
    /// A page out of many tags.
    TagPage,
    /// One push into a repository without tags and into one with many.
    PushAtTags,
    /// Collection, what it costs, and what pulls notice of it.
    Collection,
    /// Three replicas over PostgreSQL and S3 beside one.
    Replicas,
}

/// Pushers at the same time.
const PUSHERS: usize = 8;
/// Moves of a tag in one round.
const MOVES: usize = 100;
const MIB: u64 = 1024 * 1024;

/// Measures and prints; `false` when someone failed a task.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    if let Some(ready) = &arguments.sink {
        return sink::run(ready);
    }
    for (at, peer) in arguments.peers.iter().enumerate() {
        let known = [OURS, NGINX, "sink"].contains(&peer.name())
            || arguments.peers[..at]
                .iter()
                .any(|other| other.name() == peer.name());
        ensure!(!known, "two contestants are called `{}`", peer.name());
    }
    let program = match &arguments.binary {
        Some(path) => std::path::absolute(path)?,
        None => shell::build(true, &[])?,
    };
    let dir = match &arguments.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => shell::target().join("bench"),
    };
    std::fs::create_dir_all(&dir)?;
    let dir = tempfile::Builder::new().prefix("run-").tempdir_in(dir)?;
    let tasks: Vec<_> = Task::value_variants()
        .iter()
        .copied()
        .filter(|task| arguments.only.is_empty() || arguments.only.contains(task))
        .collect();
    let (growing, tasks): (Vec<_>, Vec<_>) = tasks.into_iter().partition(|task| task.grows());
    let mut report = if tasks.is_empty() {
        Report::new(arguments, &program, dir.path())
    } else {
        room(dir.path(), arguments, &tasks)?;
        let mut bench = Bench::prepare(arguments, &tasks, program.clone(), dir.path())?;
        for task in tasks {
            bench.task(task);
        }
        bench.report
    };
    for task in growing {
        let table = growth::run(task, arguments, &program, dir.path());
        report.growth.push(table);
    }
    if arguments.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.table());
    }
    Ok(!report.failed())
}

/// Refuses to fill the disk. Peers on the same disk are counted with us.
fn room(dir: &Path, arguments: &Arguments, tasks: &[Task]) -> anyhow::Result<()> {
    let stat = rustix::fs::statvfs(dir)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let writers = 1 + arguments.peers.len() as u64;
    let mut blobs = 1 + writers;
    if tasks.contains(&Task::Push) {
        blobs += writers * u64::from(arguments.rounds);
    }
    let needed = blobs * arguments.size * MIB + 1024 * MIB;
    ensure!(
        needed <= free,
        "{} has {} MiB free and this takes about {} MiB: give a smaller `--size`, fewer `--rounds`, or another `--dir`",
        dir.display(),
        free / MIB,
        needed / MIB
    );
    Ok(())
}

struct Bench<'a> {
    arguments: &'a Arguments,
    contestants: Vec<Contestant>,
    source: Source,
    /// Digest of the blob that is pulled.
    pulled: String,
    /// The image whose manifest is asked for.
    image: Image,
    random: Random,
    report: Report,
}

impl<'a> Bench<'a> {
    /// Starts everyone and brings what is to be read to where it is read from.
    fn prepare(
        arguments: &'a Arguments,
        tasks: &[Task],
        program: PathBuf,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let wants = |wanted: &[Task]| tasks.iter().any(|task| wanted.contains(task));
        let mut report = Report::new(arguments, &program, dir);
        say("preparing");
        let source = Source::new(arguments.size * MIB)?;
        let blob = source.fresh()?;
        let image = Images::new()?.fresh();

        let mut contestants = vec![Contestant::ours(program, &dir.join("longshore"))?];
        for peer in &arguments.peers {
            contestants.push(Contestant::peer(peer)?);
        }
        let large = wants(&[Task::Pull]).then_some(&blob);
        for contestant in &contestants {
            seed(contestant, &image, large)
                .with_context(|| format!("`{}` cannot be prepared", contestant.name))?;
        }
        if wants(&[Task::Pull, Task::Manifest]) {
            let dir = dir.join("nginx");
            std::fs::create_dir_all(&dir)?;
            match Contestant::files(&dir, large, &image.manifest) {
                Ok(nginx) => contestants.push(nginx),
                Err(error) => report.not_run(NGINX, &error),
            }
        }
        if wants(&[Task::Push, Task::Images, Task::ImagesParallel]) {
            contestants.push(Contestant::sink(dir)?);
        }
        let pulled = blob.digest.clone();
        Ok(Self {
            arguments,
            contestants,
            source,
            pulled,
            image,
            random: Random::new()?,
            report,
        })
    }

    /// Everyone who takes part does a task, round by round.
    fn task(&mut self, task: Task) {
        let mut section = Section::new(task, self.arguments);
        let mut order = Vec::new();
        for (number, contestant) in self.contestants.iter().enumerate() {
            if task.is_for(contestant.role) {
                let mut entry = Entry::new(&contestant.name, task.is_limit(contestant.role));
                if let Err(error) = self.check(task, contestant) {
                    say(&format!("{}: {error:#}", contestant.name));
                    entry.fail(&error);
                } else {
                    order.push((number, section.entries.len()));
                }
                section.entries.push(entry);
            }
        }
        settle();
        for &(number, entry) in &order {
            section.entries[entry].since_start =
                !process::forget_peak(self.contestants[number].pid);
        }
        for round in 0..self.arguments.rounds {
            say(&format!(
                "{}: round {} of {}",
                task.name(),
                round + 1,
                self.arguments.rounds
            ));
            self.random.shuffle(&mut order);
            for &(number, entry) in &order {
                let entry = &mut section.entries[entry];
                if entry.failed() {
                    continue;
                }
                let contestant = &self.contestants[number];
                match self.measure(task, contestant) {
                    Ok(sample) => entry.samples.push(sample),
                    Err(error) => {
                        say(&format!("{}: {error:#}", contestant.name));
                        entry.fail(&error);
                    }
                }
            }
        }
        for &(number, entry) in &order {
            // A contestant that is gone has failed already.
            section.entries[entry].peak = process::peak(self.contestants[number].pid).ok();
        }
        self.report.sections.push(section);
    }

    /// Looks at every byte once, outside all measurement; what is read is in memory after that.
    fn check(&self, task: Task, contestant: &Contestant) -> anyhow::Result<()> {
        let base = &contestant.base;
        match task {
            Task::Pull => load::check_blob(base, &self.pulled, self.arguments.size * MIB),
            Task::Images | Task::ImagesParallel if contestant.role != Role::Sink => {
                load::check_image(base)
            }
            // Every answer is compared, and a sink judges the digest itself.
            _ => Ok(()),
        }
    }

    fn measure(&self, task: Task, contestant: &Contestant) -> anyhow::Result<Sample> {
        let base = &contestant.base;
        let time = Duration::from_secs(self.arguments.seconds);
        let body = self.source.fresh()?;
        let before = process::cpu(contestant.pid)?;
        let mut sample = Sample::default();
        let done = match task {
            Task::Pull => load::pull(base, &self.pulled, self.arguments.size * MIB)?,
            Task::Manifest => load::manifests(base, &self.image.manifest, time)?,
            Task::Push => load::push(base, &body)?,
            Task::Images => load::push_images(base, 1, time)?,
            Task::ImagesParallel => load::push_images(base, PUSHERS, time)?,
            Task::Start | Task::TagPage | Task::PushAtTags | Task::Collection | Task::Replicas => {
                anyhow::bail!("`{}` is measured by itself", task.name())
            }
            Task::Events => {
                let start = Instant::now();
                sample.noticed = load::events(base, &self.image.manifest, MOVES)?;
                load::Done {
                    work: MOVES as u64,
                    took: start.elapsed(),
                }
            }
        };
        sample.cpu = process::cpu(contestant.pid)?.saturating_sub(before);
        (sample.work, sample.took) = (done.work, done.took);
        if task.writes() {
            // What one leaves to the kernel must not slow the next one down.
            sample.settled = Some(settle());
        }
        if task == Task::Push && contestant.role != Role::Sink {
            // That it was taken is not enough: it must be there.
            load::check_size(base, &body)?;
        }
        Ok(sample)
    }
}

impl Task {
    fn is_for(self, role: Role) -> bool {
        match role {
            Role::Ours => true,
            Role::Peer => self != Self::Events,
            Role::Files => matches!(self, Self::Pull | Self::Manifest),
            Role::Sink => self.writes(),
        }
    }

    /// Whether it is measured at several sizes ([`growth`]).
    fn grows(self) -> bool {
        matches!(
            self,
            Self::Start | Self::TagPage | Self::PushAtTags | Self::Collection | Self::Replicas
        )
    }

    fn is_limit(self, role: Role) -> bool {
        self.is_for(role) && matches!(role, Role::Files | Role::Sink)
    }

    fn writes(self) -> bool {
        matches!(self, Self::Push | Self::Images | Self::ImagesParallel)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Manifest => "manifest",
            Self::Push => "push",
            Self::Images => "images",
            Self::ImagesParallel => "images-parallel",
            Self::Events => "events",
            Self::Start => "start",
            Self::TagPage => "tag-page",
            Self::PushAtTags => "push-at-tags",
            Self::Collection => "collection",
            Self::Replicas => "replicas",
        }
    }
}

/// Gives a registry what will be read from it.
fn seed(contestant: &Contestant, image: &Image, large: Option<&Large<'_>>) -> anyhow::Result<()> {
    let mut wire = wire::Wire::open(&contestant.base)?;
    load::push_image(&mut wire, image, "latest")?;
    if let Some(large) = large {
        load::push(&contestant.base, large)?;
    }
    Ok(())
}

/// Writes out everything that waits in memory for the disk, and tells how long that took.
fn settle() -> Duration {
    let start = Instant::now();
    rustix::fs::sync();
    start.elapsed()
}

fn say(text: &str) {
    eprintln!("bench: {text}");
}
