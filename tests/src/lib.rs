//! The harness of the end-to-end tests: the built program as a process, real clients as processes,
//! and a small HTTP/1.1 client for what no client does.
//!
//! The key decision: nothing here links the product. A test sees what a user sees, that is a
//! binary, its exit codes, its sockets and its files; so this crate depends on none of the others,
//! and a refactoring of them can never make these tests agree with a mistake. The one price is a
//! second, tiny, HTTP client ([`http`]), which the programs of `xtask` share as their load
//! generator.
//!
//! The suites are in `tests/it/`. They are run by `cargo xtask test`, which builds the program, brings the
//! clients and an engine, and tells both to the tests through the environment ([`tools`]). Without
//! it they fail and say so; no test passes because something was missing.
//!
//! What it does not do: retry a failed step, or wait for a length of time where an event tells.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "starting the program and its clients, and showing what they said, is this crate's purpose"
)]

pub mod agent;
pub mod cluster;
pub mod command;
pub mod disk;
pub mod engine;
pub mod fault;
pub mod http;
pub mod image;
pub mod objects;
pub mod postgres;
pub mod proxy;
pub mod scratch;
pub mod server;
pub mod sigv4;
pub mod tools;
pub mod wire;

pub use agent::Agent;
pub use cluster::Cluster;
pub use command::Run;
pub use disk::Disk;
pub use objects::ObjectStore;
pub use postgres::Postgres;
pub use proxy::Proxy;
pub use scratch::Scratch;
pub use server::Server;

/// The SHA-256 digest of `bytes` in the form `sha256:<hex>`.
pub fn digest(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}
