//! The store under attack, through the built program: races, cut connections, kills, failing disks, hostile
//! requests. After each the same three things must hold: what was acknowledged reads back and re-hashes,
//! `verify-store` is clean, and a refusal says what to do.

#[cfg(test)]
mod backup;
#[cfg(test)]
mod collection;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod load;
#[cfg(test)]
mod mode;
#[cfg(test)]
mod race;
#[cfg(test)]
mod read_only_disk;
#[cfg(test)]
mod refusal;

use std::path::Path;

use e2e::cluster::Storage;
use e2e::server::Options;
use e2e::wire::{
    PATIENCE, finish, holds, noise, offset_of, open_upload, patch, range, refused, wait_for,
};
use e2e::{Run, Scratch, Server, http, tools};

/// A server with this configuration after `version: 1`.
fn server(config: &str) -> Server {
    Server::with(&Options::new(tools::program()).config(format!("version: 1\n{config}")))
}

/// Wants `verify-store` and `audit verify` to find nothing.
fn verify(data: &Path) {
    let scratch = Scratch::new();
    let look = |command: &[&str]| {
        let mut run = Run::new(tools::program()).arg("--json");
        for word in command {
            run = run.arg(word);
        }
        run = match Storage::of_this_run(data) {
            None => run.arg(data),
            Some(storage) => {
                let config = format!("version: 1\n{}", storage.config());
                for (key, value) in storage.environment() {
                    run = run.env(key, value);
                }
                run.arg("--config")
                    .arg(scratch.write("verify.yaml", config))
            }
        };
        let report = run.run();
        assert_eq!(report.code, Some(0), "{report}");
        report
    };
    let report = look(&["verify-store"]);
    assert_eq!(report.json()["problems"], serde_json::json!([]), "{report}");
    let report = look(&["audit", "verify"]);
    assert!(report.json()["sealed"].is_u64(), "{report}");
}

/// A field of `/proc/PID/status` in KiB.
fn memory(server: &Server, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.pid()))
        .expect("a running server has a status");
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no `{field}` in {text}"))
}

/// Wants a server that still answers, and that has not panicked.
#[track_caller]
fn healthy(server: &mut Server) {
    assert!(server.runs(), "the server ended\n{}", server.logged());
    assert_eq!(server.get("/readyz").status(), 200);
    let log = server.logged();
    assert!(!log.contains("panicked"), "{log}");
}

/// A connection to a server.
fn connect(server: &Server) -> http::Connection {
    http::Connection::open(server.url()).expect("the server takes connections")
}
