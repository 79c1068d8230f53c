//! The clock and the ids that transactions are given, so that their bodies can run again.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Micro-seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// This moment plus a duration.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(micros(duration)))
    }

    /// This moment minus a duration.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(micros(duration)))
    }
}

/// In RFC 3339, such as `2026-01-31T12:34:00.000000Z`.
impl std::fmt::Display for Timestamp {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (days, rest) = (
            self.0.div_euclid(86_400_000_000),
            self.0.rem_euclid(86_400_000_000),
        );
        // The proleptic Gregorian calendar in eras of 400 years that begin in March, so that a leap day is the last.
        let shifted = days + 719_468;
        let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let march = (5 * day + 2) / 153;
        let month = if march < 10 { march + 3 } else { march - 9 };
        let year = year + era * 400 + i64::from(month <= 2);
        let day = day - (153 * march + 2) / 5 + 1;
        let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
        write!(
            formatter,
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{micros:06}Z",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        )
    }
}

/// The one place of this crate that reads the time. Tests move it forward.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    advanced: AtomicI64,
    last_id: AtomicI64,
}

impl Clock {
    pub(crate) fn now(&self) -> Timestamp {
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the clock of the edge; everything else is given the time"
        )]
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp(micros(now)).plus(Duration::from_micros(
            self.advanced.load(Ordering::Relaxed) as u64
        ))
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.advanced.fetch_add(micros(by), Ordering::Relaxed);
    }

    /// A new row id: micro-seconds with eleven more bits, always above the one before. Ids of one
    /// process never repeat; between processes the primary keys refuse a repetition and the
    /// transaction runs again.
    pub(crate) fn id(&self) -> i64 {
        let mut random = [0; 2];
        // Without randomness the ids still rise; only two replicas could then meet.
        let _ = getrandom::fill(&mut random);
        let fresh = (self.now().0 << 11) | i64::from(u16::from_le_bytes(random) & 0x7ff);
        let before = self
            .last_id
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
                Some(fresh.max(last + 1))
            })
            .unwrap_or(fresh);
        fresh.max(before + 1)
    }
}

/// A random name of 32 hexadecimal characters: storage keys, upload ids, epochs.
pub(crate) fn random_name() -> Result<String, crate::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| crate::Error::Database(format!("no randomness: {error}")))?;
    Ok(hex::encode(bytes))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_and_never_repeat() {
        let clock = Clock::default();
        let ids: Vec<_> = (0..10_000).map(|_| clock.id()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn the_clock_moves_forward_by_what_it_is_told() {
        let clock = Clock::default();
        let before = clock.now();
        clock.advance(Duration::from_hours(24));
        assert!(clock.now() >= before.plus(Duration::from_hours(24)));
    }
}
