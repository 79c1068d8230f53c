//! `/api/v1/scrub`: the state of the scrub, and what it found.

use http::Response;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::Call;

/// Answers a request; `words` is what follows `scrub`.
pub(super) async fn serve(_call: &mut Call, _words: &[&str]) -> Result<Response<Body>, Refusal> {
    Err(Refusal::no_such_path())
}
