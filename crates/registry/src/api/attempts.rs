//! `/api/v1/attempts`: what agents report of their deployments.

use http::Response;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::Call;

/// Answers a request; `words` is what follows `attempts`.
pub(super) async fn serve(_call: &mut Call, _words: &[&str]) -> Result<Response<Body>, Refusal> {
    Err(Refusal::no_such_path())
}
