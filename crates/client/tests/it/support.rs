//! What the tests share.

use std::sync::Arc;
use std::time::Duration;

use client::{Client, Config, Repository, Retries, credentials};

use crate::fake::Fake;

pub(crate) fn config() -> Config {
    Config {
        credentials: Arc::new(credentials::Source::Anonymous),
        ..Config::default()
    }
}

/// Repeats a few times without waiting long.
pub(crate) fn quick() -> Retries {
    Retries {
        count: 3,
        first: Duration::from_millis(2),
        longest: Duration::from_secs(5),
    }
}

pub(crate) fn client() -> Client {
    Client::with_retries(config(), quick()).unwrap()
}

pub(crate) fn repository(fake: &Fake, name: &str) -> Repository {
    client().repository(&fake.host, &name.parse().unwrap())
}

/// Bytes that no part of repeats, so that a part in the wrong place is found.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ length as u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}
