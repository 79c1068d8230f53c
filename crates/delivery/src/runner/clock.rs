//! Time and chance, passed in.

use std::time::Duration;

use jiff::Timestamp;

/// The wall clock and randomness of the edge. Waiting is tokio's, which tests can pause.
pub trait Clock: Send + Sync {
    /// The time for records that people read.
    fn now(&self) -> Timestamp;
    /// Random bits for jitter; nothing secret rests on them.
    fn random(&self) -> u64;
}

/// `interval`, shortened or lengthened by up to a tenth, so that agents do not ask in step.
pub fn jittered(interval: Duration, clock: &dyn Clock) -> Duration {
    let thousandths = 900 + clock.random() % 201;
    interval.mul_f64(thousandths as f64 / 1000.0)
}

/// The real ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn random(&self) -> u64 {
        // A machine without randomness only loses its jitter.
        getrandom::u64().unwrap_or(0)
    }
}
