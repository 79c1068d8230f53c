//! One structured log line per request, written when its answer has been sent or given up.

use std::net::SocketAddr;
use std::time::Instant;

use http::{Method, StatusCode};

use crate::metrics::Metrics;

/// What is known of a request when its answer begins. Headers and query are left out: they may hold
/// secrets.
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) peer: SocketAddr,
    pub(crate) principal: String,
    pub(crate) user_agent: String,
    pub(crate) route: &'static str,
    pub(crate) status: StatusCode,
    pub(crate) begun: Instant,
    pub(crate) log: bool,
    pub(crate) metrics: Metrics,
}

impl Record {
    /// Writes the line. `left` is what of the body was not sent; HEAD and 304 send none of it.
    pub(crate) fn write(self, sent: u64, left: Option<u64>) {
        self.metrics.sent(sent);
        if !self.log {
            return;
        }
        let whole = left == Some(0) || sent == 0;
        tracing::info!(
            target: "registry::access",
            request = self.id,
            method = self.method.as_str(),
            path = self.path,
            status = self.status.as_u16(),
            bytes = sent,
            whole,
            milliseconds = self.begun.elapsed().as_secs_f64() * 1000.0,
            principal = self.principal,
            peer = %self.peer,
            user_agent = self.user_agent,
            route = self.route,
            "request"
        );
    }
}
