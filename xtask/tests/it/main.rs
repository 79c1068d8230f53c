//! Tests of the repository itself: its walls and its tidiness.

#![expect(
    clippy::disallowed_methods,
    reason = "the dependency graph is asked from cargo, which is a process"
)]

mod tidy;
mod walls;

use std::path::Path;

/// The repository's root.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("the crate is in the workspace")
}
