//! `/api/v1/mode`: the read-only mode.

use http::Response;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::Call;

/// Answers a request; `words` is what follows `mode`.
pub(super) async fn serve(_call: &mut Call, _words: &[&str]) -> Result<Response<Body>, Refusal> {
    Err(Refusal::no_such_path())
}
