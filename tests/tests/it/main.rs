//! The end-to-end suites. `cargo xtask test --only e2e` runs them with everything they need.

mod clients;
mod demo;
mod reports;
