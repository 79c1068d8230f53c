//! `/api/v1/pins/{holder}`: what holders keep from deletion.

use http::Response;

use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::Call;

/// Answers a request; `words` is what follows `pins`.
pub(super) async fn serve(_call: &mut Call, _words: &[&str]) -> Result<Response<Body>, Refusal> {
    Err(Refusal::no_such_path())
}
