//! Where the program under test and the real clients are.
//!
//! `cargo xtask test` sets both variables. A tool that is missing is a panic with a hint, never a
//! skipped test.

use std::path::{Path, PathBuf};

/// Names the built program.
pub const PROGRAM: &str = "LONGSHORE_E2E_PROGRAM";

/// Names the program built with test switches, such as leases of seconds.
pub const SWITCHED: &str = "LONGSHORE_E2E_SWITCHED";

/// Names the directory whose `bin` holds the clients under the names that the tests use.
pub const TOOLS: &str = "LONGSHORE_E2E_TOOLS";

/// Names another registry to run the client table against, which proves the table itself.
pub const REFERENCE: &str = "LONGSHORE_E2E_REFERENCE";

/// The program under test.
///
/// # Panics
/// When nobody told where it is.
pub fn program() -> PathBuf {
    let path = std::env::var_os(PROGRAM).unwrap_or_else(|| {
        panic!("{PROGRAM} is not set: run `cargo xtask test --only e2e`, which sets it")
    });
    PathBuf::from(path)
}

/// The program under test with test switches.
///
/// # Panics
/// When nobody told where it is.
pub fn switched() -> PathBuf {
    let path = std::env::var_os(SWITCHED).unwrap_or_else(|| {
        panic!("{SWITCHED} is not set: run `cargo xtask test --only e2e`, which sets it")
    });
    PathBuf::from(path)
}

/// A client, by the name the tests use (`oras`, `cosign2`, …).
///
/// # Panics
/// When it is not there.
pub fn tool(name: &str) -> PathBuf {
    let path = directory().join("bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo xtask test --only e2e`, which brings it",
        path.display()
    );
    path
}

/// A configuration directory for the Docker client that holds the Compose plugin of `line` (`2` or `5`).
///
/// # Panics
/// When it is not there.
pub fn compose(line: &str) -> PathBuf {
    let path = directory().join(format!("compose-{line}"));
    assert!(
        path.join("cli-plugins/docker-compose").exists(),
        "{} is missing: run `cargo xtask test --only e2e`, which brings it",
        path.display()
    );
    path
}

/// The directory of the tools.
///
/// # Panics
/// When nobody told where it is.
pub fn directory() -> PathBuf {
    let path = std::env::var_os(TOOLS).unwrap_or_else(|| {
        panic!("{TOOLS} is not set: run `cargo xtask test --only e2e`, which sets it")
    });
    Path::new(&path).to_owned()
}

/// Another registry to use in place of the program, as `http://HOST:PORT`.
pub fn reference() -> Option<String> {
    std::env::var(REFERENCE).ok().filter(|url| !url.is_empty())
}
