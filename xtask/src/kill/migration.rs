//! Deaths in the middle of a move from one run mode to the other.

use anyhow::bail;

use crate::mode::World;

/// Kills a migration at a step, starts it again, and looks for everything at the other side.
pub(super) fn once(_world: &World, point: &str, _seed: u64) -> anyhow::Result<u64> {
    bail!("`{point}` is not known here")
}
