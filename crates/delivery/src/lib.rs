//! Delivery: releases, targets, and the agent that keeps a target on its release.
//!
//! The key decision: **the state machine is pure and everything it decided is on the disk before it happens**. [`machine`]
//! turns a state and an event into a state and at most one step; [`runner`] writes that state down, carries the step out
//! and comes back with an event. So a process that dies at any point is started again on what it last wrote, and what it
//! was doing is done again or looked at again: nothing is ever assumed to have worked.
//!
//! The walk of a deployment: [`trigger`] (a hint, which names nothing that a target does not) → [`machine`] → fetch and
//! verdict → [`engine`] (plan, pull, apply) → [`observe`] → [`attempt`] (the ledger) → good, or back to the last good release.
//! People look at it and give orders through [`control`], a socket on this machine; the registry is told of it by
//! [`reporter`].
//!
//! What it does not do: it opens no port, it does not undo what a release did to data (volumes, databases), and it does
//! not repair what fails later in a release that was good; it says so, at every look.

pub mod agent;
pub mod attempt;
pub mod control;
pub mod engine;
pub mod machine;
pub mod observe;
pub mod release;
pub mod reporter;
pub mod runner;
pub mod target;
pub mod trigger;

#[cfg(test)]
mod testing;
