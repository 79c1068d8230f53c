//! The agent on a real Docker Engine: what is deployed, what is refused, and what a crash leaves.
//!
//! Every test has a registry, an agent, a Compose project and ports of its own, and waits on what the agent's socket tells.
//! `cargo xtask test --only e2e` runs them with everything they need.

mod compose5;
mod deploy;
mod hosts;
mod kill;
mod proof;
mod world;
