//! A client for any OCI registry, not only ours.
//!
//! [`Client`] holds connections, tokens and what was learned of each host; [`Repository`] has one
//! function per API call of the
//! [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md);
//! [`transfer`] moves whole artifacts between registries and OCI layout directories; [`longshore`]
//! reads the event stream of our own registry.
//!
//! The key decision: **bytes are streamed and believed only by their digest**. A blob is never held
//! in memory unless the caller asks for a small one, a download is resumed by `Range` and still
//! hashed over its whole length, and a manifest is the exact bytes that were fetched beside a view
//! of them. Nothing here serialises a foreign manifest again.
//!
//! What a registry may do wrong is expected: connections break, answers are `429` or `500`, a `Range`
//! is out of step, the referrers API is missing, a blob lies behind a redirect to another host, which
//! then never sees the credentials. Each has its own test against a registry that misbehaves.
//!
//! What it does not do: it decides nothing about trust (that is the `trust` crate, over
//! [`Repository::evidence`]), it extracts no archives, and it guesses no registry for a short name.

pub mod credentials;
pub mod layout;
pub mod longshore;
pub mod transfer;

mod error;
mod registry;
mod transport;

pub use error::Error;
pub use http::Method;
pub use registry::{BlobReader, FetchedManifest, MAX_MANIFEST, Repository};
pub use transport::{Client, Config, Retries};
