//! `cargo xtask power-cut`: a real power cut, as far as a file system can tell.
//!
//! A killed process leaves the page cache, so it proves nothing about fsync. Here the server writes to an ext4 of its own
//! in a loop file; in the middle of the load that file system is shut down without flushing its log, so that only what
//! was synced is there when it is mounted again. In cluster mode PostgreSQL is on that file system: the replicas live on,
//! and must go on by themselves when it is back.
//!
//! An answer counts only when it came before the cut, as after a real one there is none. The file system is no help
//! later: a sync that is under way then may return as done though its transaction was given up. (A program of eight
//! threads that append and `fdatasync`, on Linux 6.18: all of 16 121 returns before the request were true, 19 of 47 after
//! it were not.)

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use e2e::Postgres;

use crate::kill::Known;
use crate::load::{Load, Random};
use crate::mode::{Mode, Store, World, cluster};
use crate::{kill, shell};

/// How the program runs.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The run mode.
    #[arg(long, value_enum, default_value_t = Mode::Embedded)]
    mode: Mode,
    /// How many power cuts.
    #[arg(long, default_value_t = 20)]
    rounds: u64,
    /// How many pushers at once.
    #[arg(long, default_value_t = 16)]
    pushers: u64,
    /// How many replicas in cluster mode.
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// Which S3 store is under a cluster.
    #[arg(long, value_enum, default_value_t = Store::Versitygw)]
    store: Store,
    /// Test this program instead of building it.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Repeats a run.
    #[arg(long)]
    seed: Option<u64>,
}

/// `EXT4_IOC_SHUTDOWN`.
const SHUTDOWN: rustix::ioctl::Opcode = 0x8004_587d;
/// Do not flush the log: what was not synced is gone.
const NO_LOG_FLUSH: u32 = 2;

/// Runs it; `false` when something was lost.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    if !shell::is_root() {
        bail!("mounting a file system needs root");
    }
    for program in ["losetup", "mkfs.ext4", "mount", "umount"] {
        shell::find(program)
            .with_context(|| format!("`{program}` is not here: install e2fsprogs and mount"))?;
    }
    let program = shell::program(options.program.as_deref(), false, &[])?;
    let seed = options.seed.unwrap_or_else(Random::seed);
    println!("seed {seed}");
    let mut random = Random(seed);
    let (mut bad, mut checked) = (0_u64, 0_u64);
    for round in 1..=options.rounds {
        let milliseconds = 200 + random.below(2000);
        let outcome = match options.mode {
            Mode::Embedded => embedded(&program, options, milliseconds, random.next()),
            Mode::Cluster => replicated(&program, options, milliseconds, random.next()),
        };
        match outcome {
            Ok(count) => {
                checked += count;
                println!("ok      cut {round} after {milliseconds} ms ({count} looked for)");
            }
            Err(error) => {
                bad += 1;
                println!("FAILED  cut {round} after {milliseconds} ms: {error:#}");
            }
        }
    }
    println!(
        "{} power cuts, {checked} acknowledged or unanswered writes looked for, {bad} with losses",
        options.rounds
    );
    Ok(bad == 0)
}

/// A cut under an embedded server.
fn embedded(
    program: &Path,
    options: &Options,
    milliseconds: u64,
    seed: u64,
) -> anyhow::Result<u64> {
    let disk = Disk::new()?;
    let world = World::start(program, Mode::Embedded, options.store)?;
    let mounted = disk.mount()?;
    let site = world.site_in(&disk.point)?;
    let mut servers = site.servers(&site.options(), 1)?;
    let urls: Vec<_> = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let load = Load::start(&urls, "load", options.pushers, seed);
    let acknowledged = cut(&disk, &load, milliseconds)?;
    servers.iter_mut().for_each(e2e::Server::kill);
    let mut known = Known::Ledgers(load.finish());
    if acknowledged == 0 {
        bail!("nothing was acknowledged before the cut: the round proves nothing");
    }
    drop(mounted);

    let mounted = disk.mount()?;
    site.verify().context("as the cut left it")?;
    let checked = kill::after(&site, &site.options(), Vec::new(), vec![&mut known]);
    drop(mounted);
    checked
}

/// A cut under the PostgreSQL of a cluster.
fn replicated(
    program: &Path,
    options: &Options,
    milliseconds: u64,
    seed: u64,
) -> anyhow::Result<u64> {
    let disk = Disk::new()?;
    let mounted = disk.mount()?;
    let cluster = cluster(|| Postgres::start_in(&disk.point), options.store)?;
    let mut world = World::over(program, cluster);
    let site = world.site()?;
    let servers = site.servers(&site.options(), options.replicas)?;
    let urls: Vec<_> = servers
        .iter()
        .map(|server| server.url().to_owned())
        .collect();
    let load = Load::start(&urls, "load", options.pushers, seed);
    let acknowledged = cut(&disk, &load, milliseconds)?;
    let mut known = Known::Ledgers(load.finish());
    if acknowledged == 0 {
        bail!("nothing was acknowledged before the cut: the round proves nothing");
    }
    if let Some(cluster) = world.cluster() {
        cluster.postgres.kill();
    }
    drop(mounted);

    let mounted = disk.mount()?;
    if let Some(cluster) = world.cluster() {
        cluster.postgres.restart();
    }
    for server in &servers {
        ready(server)?;
    }
    let checked = kill::after(&site, &site.options(), servers, vec![&mut known]);
    // Before its disk goes.
    drop(world);
    drop(mounted);
    checked
}

/// Waits until a replica that lost its database serves again.
fn ready(server: &e2e::Server) -> anyhow::Result<()> {
    let begun = Instant::now();
    while server.get("/readyz").status() != 200 {
        if begun.elapsed() > Duration::from_mins(1) {
            bail!(
                "a replica did not find its database again:\n{}",
                server.logged()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Cuts the power under a load; how much was acknowledged before.
fn cut(disk: &Disk, load: &Load, milliseconds: u64) -> anyhow::Result<u64> {
    // The one thing that is measured in time here is when the power goes.
    std::thread::sleep(Duration::from_millis(milliseconds));
    let acknowledged = load.acknowledged();
    load.goes();
    shut_down(&disk.point)?;
    // The server meets the dead disk before it is killed.
    std::thread::sleep(Duration::from_millis(100));
    Ok(acknowledged)
}

/// A file system in a file.
struct Disk {
    image: PathBuf,
    point: PathBuf,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::Builder::new()
            .prefix("longshore-power-")
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir_in("/var/tmp")?;
        let image = directory.path().join("disk.ext4");
        File::create(&image)?.set_len(2 << 30)?;
        shell::read(shell::command("mkfs.ext4").args(["-q", "-F"]).arg(&image))?;
        let point = directory.path().join("mount");
        std::fs::create_dir(&point)?;
        Ok(Self {
            image,
            point,
            _directory: directory,
        })
    }

    fn mount(&self) -> anyhow::Result<Mounted> {
        Mounted::new(&self.image, &self.point)
    }
}

/// Cuts the power of the file system that holds `point`.
#[expect(
    unsafe_code,
    reason = "no crate has this request, and it is the point of this program"
)]
fn shut_down(point: &Path) -> anyhow::Result<()> {
    let directory = File::open(point)?;
    // SAFETY: the request reads one `u32` through the pointer, which `Setter` passes for its value; it
    // writes nothing.
    unsafe {
        let request = rustix::ioctl::Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH);
        rustix::ioctl::ioctl(&directory, request).context("cannot shut the file system down")
    }
}

/// A mounted file system, unmounted when this value goes.
struct Mounted {
    image: PathBuf,
    point: PathBuf,
}

impl Mounted {
    fn new(image: &Path, point: &Path) -> anyhow::Result<Self> {
        shell::read(
            shell::command("mount")
                .args(["-o", "loop"])
                .arg(image)
                .arg(point),
        )?;
        Ok(Self {
            image: image.to_owned(),
            point: point.to_owned(),
        })
    }

    /// Unmounts, and waits until the device is gone with what it held in memory. (A container that
    /// starts at this moment may hold a copy of the mount for a while, and a mount then would show the
    /// file system that was shut down.)
    fn end(&self) -> anyhow::Result<()> {
        shell::read(shell::command("umount").arg(&self.point))?;
        let start = Instant::now();
        while !shell::read(shell::command("losetup").arg("-j").arg(&self.image))?
            .trim()
            .is_empty()
        {
            if start.elapsed() > Duration::from_mins(1) {
                bail!("something still holds {}", self.image.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{} may stay mounted: {error:#}", self.point.display());
        }
    }
}
