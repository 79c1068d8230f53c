//! The one place of the program that reads the time of day and draws random bytes.

/// The time of day.
pub(crate) fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// The time as RFC 3339 in whole seconds, for documents.
pub(crate) fn now_rfc3339() -> String {
    now()
        .round(jiff::Unit::Second)
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .to_string()
}

/// Fills a buffer with random bytes of the system.
pub(crate) fn random(buffer: &mut [u8]) {
    // Invariant: a Linux system that runs has its random source; without it no key may be made, so
    // ending the program is right.
    getrandom::fill(buffer).expect("the system's random source answers");
}
