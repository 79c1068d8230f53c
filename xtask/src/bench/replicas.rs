//! Three replicas beside one, over the same PostgreSQL and the same object store.
//!
//! Slices go by turns to one replica and to all three, with as many clients. On a machine of few cores the replicas, what
//! they stand on and the clients share the same cores, so three can do no more than one; what can be compared then is the CPU
//! time of one request. So it is done twice: as the machine is, and with each replica held to a part of a core (a control
//! group with a quota), which is as if each had a small machine of its own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use e2e::server::Options;
use e2e::{Postgres, Server};

use super::content::{Images, MANIFEST};
use super::growth::{Growth, Table};
use super::load::{all, expect, push_blob, push_image};
use super::report::median;
use super::wire::{Base, Wire};
use super::{process, say};
use crate::mode::{self, Store};

/// Replicas in the larger case.
const MANY: usize = 3;
/// Clients in either case.
const CLIENTS: usize = 12;
/// The size of the blob that is pulled.
const PULLED: usize = 1 << 20;
/// The part of a core that a replica has where it is held to one, in percent.
const QUOTA: u64 = 10;

/// What is asked for.
#[derive(Clone, Copy)]
enum Request {
    Manifest,
    Blob,
    Push,
}

impl Request {
    const ALL: [Self; 3] = [Self::Manifest, Self::Blob, Self::Push];

    fn name(self, held: bool) -> &'static str {
        match (self, held) {
            (Self::Manifest, false) => "GET manifest",
            (Self::Blob, false) => "GET blob 1 MiB",
            (Self::Push, false) => "push image",
            (Self::Manifest, true) => "GET manifest, held",
            (Self::Blob, true) => "GET blob, held",
            (Self::Push, true) => "push image, held",
        }
    }
}

/// The figures of one kind of request with so many replicas.
#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    work: u64,
    servers: Duration,
    everything: Duration,
}

struct Running {
    servers: Vec<Server>,
    bases: Vec<Base>,
    /// Processes beside the replicas whose CPU time counts.
    beside: Vec<u32>,
    blob: String,
}

/// Measures and fills the table.
pub(crate) fn run(growth: &Growth<'_>, table: &mut Table) -> anyhow::Result<()> {
    let cluster = mode::cluster(Postgres::start, Store::Versitygw)?;
    let storage = cluster.storage();
    say("replicas: starting");
    let servers = (0..MANY)
        .map(|_| mode::start(&Options::new(growth.program.clone()).storage(&storage)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let bases = servers
        .iter()
        .map(|server| Base::parse(server.url()).map_err(anyhow::Error::msg))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut wire = Wire::open(&bases[0])?;
    push_image(&mut wire, &Images::new()?.fresh(), "latest")?;
    let blob = push_blob(&mut wire, BLOBS, &vec![7; PULLED])?;
    let running = Running {
        servers,
        bases,
        beside: vec![cluster.postgres.pid(), cluster.objects.pid()],
        blob,
    };
    measure(growth, &running, false, table)?;
    let held: anyhow::Result<Vec<_>> = running
        .servers
        .iter()
        .map(|server| Held::hold(server.pid()))
        .collect();
    match held {
        Ok(_held) => measure(growth, &running, true, table)?,
        Err(error) => say(&format!(
            "replicas: they cannot be held to a part of a core: {error:#}"
        )),
    }
    Ok(())
}

fn measure(
    growth: &Growth<'_>,
    running: &Running,
    held: bool,
    table: &mut Table,
) -> anyhow::Result<()> {
    let time = Duration::from_secs(growth.arguments.seconds);
    for request in Request::ALL {
        let mut figures = [Figures::default(), Figures::default()];
        for round in 0..growth.arguments.rounds {
            say(&format!(
                "replicas: {}: round {} of {}",
                request.name(held),
                round + 1,
                growth.arguments.rounds
            ));
            // Who is first changes.
            let first = usize::from(round % 2 == 1);
            for at in [first, 1 - first] {
                let count = [1, MANY][at];
                slice(running, request, count, time, &mut figures[at])?;
            }
        }
        for (count, figures) in [1, MANY].into_iter().zip(&figures) {
            let each = |cpu: Duration| cpu.as_secs_f64() * 1e3 / figures.work.max(1) as f64;
            table.row(
                request.name(held),
                count as u64,
                &[
                    ("per s", median(&figures.rate)),
                    ("CPU ms each, replicas", each(figures.servers)),
                    (
                        "CPU ms each, with PostgreSQL and S3",
                        each(figures.everything),
                    ),
                ],
            );
        }
    }
    Ok(())
}

/// One slice over the first `count` replicas.
fn slice(
    running: &Running,
    request: Request,
    count: usize,
    time: Duration,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let cpu = || -> anyhow::Result<(Duration, Duration)> {
        let mut servers = Duration::ZERO;
        for server in &running.servers[..count] {
            servers += process::cpu(server.pid())?;
        }
        let mut beside = Duration::ZERO;
        for pid in &running.beside {
            beside += process::family_cpu(*pid)?;
        }
        Ok((servers, servers + beside))
    };
    let before = cpu()?;
    let start = Instant::now();
    let work: u64 = all(CLIENTS, |number| {
        client(
            &running.bases[number % count],
            request,
            &running.blob,
            start + time,
        )
    })?
    .into_iter()
    .sum();
    let took = start.elapsed().as_secs_f64();
    let after = cpu()?;
    figures.rate.push(work as f64 / took);
    figures.work += work;
    figures.servers += after.0.saturating_sub(before.0);
    figures.everything += after.1.saturating_sub(before.1);
    Ok(())
}

/// One client, until the time is over; how many requests, or images.
fn client(base: &Base, request: Request, blob: &str, end: Instant) -> anyhow::Result<u64> {
    let mut wire = Wire::open(base)?;
    let mut images = Images::new()?;
    let manifest = wire.request_head(
        "GET",
        "/v2/bench/images/manifests/latest",
        &format!("Accept: {MANIFEST}\r\n"),
        None,
    );
    let blob = wire.request_head("GET", &format!("/v2/{BLOBS}/blobs/{blob}"), "", None);
    let mut work = 0;
    while Instant::now() < end {
        match request {
            Request::Push => {
                let image = images.fresh();
                let tag = format!(
                    "t-{}",
                    &e2e::digest(&image.manifest)["sha256:".len()..][..16]
                );
                push_image(&mut wire, &image, &tag)?;
            }
            Request::Manifest | Request::Blob => {
                wire.send(match request {
                    Request::Manifest => &manifest,
                    _ => &blob,
                })?;
                let head = wire.head()?;
                expect(&head, 200, "GET")?;
                wire.discard(head.length.context("the answer has no length")?)?;
            }
        }
        work += 1;
    }
    Ok(work)
}

/// A process that is held to a part of a core by a control group of its own.
struct Held {
    group: PathBuf,
}

impl Held {
    fn hold(pid: u32) -> anyhow::Result<Self> {
        static USED: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "longshore-bench-{}-{}",
            std::process::id(),
            USED.fetch_add(1, Ordering::Relaxed)
        );
        let root = PathBuf::from("/sys/fs/cgroup");
        // In microseconds; short, so that nobody waits for long.
        let (period, quota) = (PERIOD, PERIOD * QUOTA / 100);
        let (group, settings) = if root.join("cgroup.controllers").exists() {
            let limit = format!("{quota} {period}");
            (root.join(name), vec![("cpu.max", limit)])
        } else if root.join("cpu/cpu.cfs_quota_us").exists() {
            let settings = vec![
                ("cpu.cfs_period_us", period.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ];
            (root.join("cpu").join(name), settings)
        } else {
            bail!("there are no control groups for CPU time");
        };
        std::fs::create_dir(&group).with_context(|| format!("cannot make {}", group.display()))?;
        // From here on it is removed in every case.
        let held = Self { group };
        for (file, value) in settings {
            held.write(file, &value)?;
        }
        held.write("cgroup.procs", &pid.to_string())?;
        Ok(held)
    }

    fn write(&self, file: &str, value: &str) -> anyhow::Result<()> {
        let path = self.group.join(file);
        std::fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let parent = self
            .group
            .parent()
            .map(|parent| parent.join("cgroup.procs"));
        let members = std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        for member in members.lines() {
            // One that has ended is no member any more.
            if let Some(parent) = &parent {
                drop(std::fs::write(parent, member));
            }
        }
        drop(std::fs::remove_dir(&self.group));
    }
}

const PERIOD: u64 = 20_000;
const BLOBS: &str = "bench/pulled";
