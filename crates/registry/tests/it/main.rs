//! The wire-level suite: literal bytes on a socket against a real store, one module per noun. It runs on a data
//! directory, and on PostgreSQL and S3 where the environment names them (`place`).

#[cfg(test)]
mod auth;
#[cfg(test)]
mod blob;
#[cfg(test)]
mod catalog;
#[cfg(test)]
mod early;
#[cfg(test)]
mod events;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod manifest;
#[cfg(test)]
mod object_store;
#[cfg(test)]
mod place;
#[cfg(test)]
mod referrer;
#[cfg(test)]
mod reports;
#[cfg(test)]
#[path = "../../../store/tests/it/stand_in.rs"]
#[expect(dead_code, reason = "the store's own tests use all of it")]
mod stand_in;
#[cfg(test)]
mod tag;
#[cfg(test)]
mod tls;
#[cfg(test)]
mod upload;
