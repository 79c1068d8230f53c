//! The HTTP server: distribution API, token service, management API, events, metrics.
//!
//! [`Server::bind`] takes [`Settings`] and an open [`store::Store`] and binds every listener;
//! [`Server::run`] serves until its shutdown future ends and then drains. A request goes one way:
//! the accept loop of `serve` bounds it, `auth` turns its credentials into a principal, the path
//! parser of `v2` (or `api`) names the operation, and a handler asks the one authorizer, calls one
//! function of the store and writes the answer. Every refusal passes the one mapping in `error`.
//!
//! The key decision is an accept loop and a path parser of our own. Repository names contain
//! slashes, so `/v2/<name>/blobs/<digest>` is parsed from the right, purely, and tested with
//! properties; and the loop sets what ready-made ones leave open: a header timeout, a connection
//! limit, a handshake timeout, a stalled-writer timeout and a bounded drain.
//!
//! ```no_run
//! # async fn example(store: store::Store) -> Result<(), Box<dyn std::error::Error>> {
//! let server = registry::Server::bind(registry::Settings::default(), store).await?;
//! server.run(std::future::pending()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! It reads no configuration file (the program does and builds [`Settings`]), keeps no state that
//! another replica would need (`I12`), and writes nothing itself: the store does.

mod api;
mod auth;
mod error;
mod events;
mod metrics;
mod redirect;
mod serve;
mod settings;
mod v2;

pub use error::Error;
pub use oci::glob::{Glob, GlobError};
pub use redirect::{Network, NetworkError, Redirect};
pub use serve::Server;
pub use serve::early::{Early, Reason};
pub use settings::{Access, AccessError, Action, Limits, Rule, Settings, TlsFiles};
