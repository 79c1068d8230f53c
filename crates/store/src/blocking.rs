//! Work that blocks, on a thread for it.

use crate::error::Error;

/// Runs work that blocks where it stops no task.
///
/// # Errors
/// Those of the work; [`Error::Stopped`] when the runtime ends.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Stopped))
}
