//! The values of the OCI specifications: digests, references, descriptors, manifests, a
//! reproducible tar and canonical records.
//!
//! The key decision: **bytes are the truth**. A manifest is kept as the exact bytes that were pushed
//! and read through a *view* ([`manifest::Manifest`]); nothing here serialises a foreign document
//! again, so unknown fields and media types survive and digests never change (`I11`).
//!
//! This crate knows no network, no clock, no file system and no randomness: what it needs comes in
//! as arguments, as `Read`/`Write` or as bytes. Every parser here reads foreign input and therefore
//! returns typed errors, never panics.

pub mod descriptor;
pub mod digest;
pub mod evidence;
pub mod glob;
pub mod manifest;
pub mod media_type;
pub mod record;
pub mod reference;
pub mod tar;
pub mod text;

pub use descriptor::{Descriptor, Platform};
pub use digest::{Algorithm, Digest, Hasher};
pub use glob::Glob;
pub use manifest::Manifest;
pub use reference::{Reference, RepositoryName, Tag};
