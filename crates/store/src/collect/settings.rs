//! Settings of the collector.

use std::time::Duration;

use crate::clock::Timestamp;

/// Settings of the collector.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Collect at all. Uploads end and the outbox is served without it as well.
    pub enabled: bool,
    /// Candidates that this process looks at in a second, at most.
    pub rate: u32,
    /// The time of the day in which candidates are looked at; `None`: always.
    pub window: Option<Window>,
    /// How long a manifest is kept beyond its lease when nothing else keeps it (`gc.untagged` less the lease).
    pub beyond_lease: Duration,
    /// How long a referrer is kept whose subject never came, from its push (7 days).
    pub orphan_referrers: Duration,
    /// How long the object of a collected blob waits, so that reads that have begun come to their end.
    pub read_grace: Duration,
    /// How long the object of a collected blob waits, so that an older copy of the database still finds it.
    pub keep_deleted: Duration,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            rate: 1000,
            window: None,
            beyond_lease: Duration::ZERO,
            orphan_referrers: Duration::from_hours(7 * 24),
            read_grace: Duration::from_secs(10),
            keep_deleted: Duration::ZERO,
        }
    }
}

impl GcOptions {
    /// How long an object waits in the outbox after its blob has gone.
    pub(crate) fn grace(&self) -> Duration {
        self.read_grace.max(self.keep_deleted)
    }

    /// Whether candidates are looked at now.
    pub(crate) fn is_open(&self, now: Timestamp) -> bool {
        self.enabled && self.window.is_none_or(|window| window.contains(now))
    }
}

/// A time of each day, in UTC, that may go over midnight: `22:00-06:00`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Minutes after midnight: the first one in it.
    from: u16,
    /// Minutes after midnight: the first one after it.
    to: u16,
}

impl Window {
    /// Tells whether this moment is in the window.
    pub fn contains(self, at: Timestamp) -> bool {
        let minute = at.0.div_euclid(MINUTE).rem_euclid(DAY_MINUTES);
        let (from, to) = (i64::from(self.from), i64::from(self.to));
        if from < to {
            (from..to).contains(&minute)
        } else {
            minute >= from || minute < to
        }
    }
}

impl std::str::FromStr for Window {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let wrong = || WindowError(text.chars().take(40).collect());
        let minute = |clock: &str| {
            let (hours, minutes) = clock.trim().split_once(':')?;
            let digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            if !digits(hours) || !digits(minutes) {
                return None;
            }
            let (hours, minutes) = (hours.parse::<u16>().ok()?, minutes.parse::<u16>().ok()?);
            (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
        };
        let (from, to) = text.split_once('-').ok_or_else(wrong)?;
        match (minute(from), minute(to)) {
            (Some(from), Some(to)) if from != to => Ok(Self { from, to }),
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:02}:{:02}-{:02}:{:02}",
            self.from / 60,
            self.from % 60,
            self.to / 60,
            self.to % 60
        )
    }
}

/// A text that is no window.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no time of the day, write it as `22:00-06:00` (UTC)")]
pub struct WindowError(String);

const MINUTE: i64 = 60_000_000;
const DAY_MINUTES: i64 = 24 * 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hours: i64, minutes: i64) -> Timestamp {
        // A day in the middle of the year 2026.
        Timestamp((20_600 * DAY_MINUTES + hours * 60 + minutes) * MINUTE)
    }

    #[test]
    fn windows_may_go_over_midnight() {
        let night: Window = "22:00-06:00".parse().unwrap();
        assert_eq!(night.to_string(), "22:00-06:00");
        for (hours, minutes, inside) in [
            (21, 59, false),
            (22, 0, true),
            (23, 59, true),
            (0, 0, true),
            (5, 59, true),
            (6, 0, false),
            (12, 0, false),
        ] {
            assert_eq!(
                night.contains(at(hours, minutes)),
                inside,
                "{hours}:{minutes}"
            );
        }
        let noon: Window = "12:00-12:30".parse().unwrap();
        assert!(noon.contains(at(12, 29)) && !noon.contains(at(12, 30)));
        assert!(!noon.contains(at(11, 59)));
    }

    #[test]
    fn other_texts_are_no_windows() {
        for bad in [
            "",
            "22:00",
            "22-06",
            "24:00-06:00",
            "22:60-06:00",
            "6:00-7:00",
            "06:00-06:00",
            "always",
        ] {
            assert!(bad.parse::<Window>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_collector_that_is_off_has_no_window() {
        let off = GcOptions {
            enabled: false,
            ..GcOptions::default()
        };
        assert!(!off.is_open(at(1, 0)) && GcOptions::default().is_open(at(1, 0)));
    }
}
