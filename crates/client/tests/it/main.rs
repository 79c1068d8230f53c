//! The client against a registry that misbehaves on request.

// `cfg(test)` says to the lints that helpers in here are part of tests.
#[cfg(test)]
mod auth;
#[cfg(test)]
mod copying;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod pull;
#[cfg(test)]
mod push;
#[cfg(test)]
mod referrers;
#[cfg(test)]
mod stream;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tls;
