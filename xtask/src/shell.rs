//! Programs started for the menu, and where things are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// The repository's root: the directory above this crate.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// A program to be run in the repository's root.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` told this process is not meant for the packages that it builds.
    cargo
        .env_remove("CARGO_MANIFEST_DIR")
        .env_remove("CARGO_PKG_NAME");
    cargo
}

/// Runs a program with its output shown, and wants exit code 0.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
) -> anyhow::Result<()> {
    succeed(command(program).args(args))
}

/// Runs a prepared program with its output shown, and wants exit code 0.
pub(crate) fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Runs a prepared program, wants exit code 0, and gives back what it printed.
pub(crate) fn read(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Finds a program on `PATH`, and where administration programs are, which is not on everyone's.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// The program to test: this one, or one that is built now.
pub(crate) fn program(
    given: Option<&Path>,
    release: bool,
    features: &[&str],
) -> anyhow::Result<PathBuf> {
    match given {
        Some(path) => Ok(std::path::absolute(path)?),
        None => build(release, features),
    }
}

/// Builds the program and gives back where it is.
///
/// A build with test switches shares everything with the other one but what the switches change, and is put into
/// a directory of its own, so that nobody ships it by mistake.
pub(crate) fn build(release: bool, features: &[&str]) -> anyhow::Result<PathBuf> {
    let plain = target()
        .join(if release { "release" } else { "debug" })
        .join("longshore");
    if features.is_empty() {
        println!("building the program");
        succeed(&mut build_command(release, features))?;
        return Ok(plain);
    }
    println!("building the program with test switches");
    succeed(&mut build_command(release, features))?;
    let switched = target().join("switched");
    let place = switched.join(if release {
        "longshore-release"
    } else {
        "longshore"
    });
    set_aside(&plain, &place)?;
    // Back to what everybody expects to find there; nothing is compiled again.
    succeed(&mut build_command(release, &[]))?;
    Ok(place)
}

/// Builds the program of another work tree of this repository, and puts it at a place.
///
/// Dependencies that both trees have in the same form are compiled once: the target directory is the same.
pub(crate) fn build_elsewhere(tree: &Path, place: &Path) -> anyhow::Result<()> {
    println!("building the program of {}", tree.display());
    let mut cargo = build_command(false, &[]);
    cargo
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", target())
        .arg("--locked");
    succeed(&mut cargo)?;
    set_aside(&target().join("debug/longshore"), place)
}

/// Moves a program that was built from where the next build puts its own.
fn set_aside(plain: &Path, place: &Path) -> anyhow::Result<()> {
    let dir = place.parent().context("a program is in a directory")?;
    std::fs::create_dir_all(dir)?;
    // One that runs cannot be written over; it can be replaced.
    let new = dir.join(format!("new-{}", std::process::id()));
    std::fs::copy(plain, &new)?;
    std::fs::rename(&new, place)?;
    std::fs::remove_file(plain)?;
    Ok(())
}

fn build_command(release: bool, features: &[&str]) -> Command {
    let mut cargo = cargo();
    // The whole workspace is named, so that dependencies have the features that the tests built them with.
    cargo.args(["build", "--quiet", "--workspace", "--bin", "longshore"]);
    if !features.is_empty() {
        cargo.arg("--features").arg(features.join(","));
    }
    if release {
        cargo.arg("--release");
    }
    cargo
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
