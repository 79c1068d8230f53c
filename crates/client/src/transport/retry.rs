//! When and how long to wait before a request is made again.

use std::time::Duration;

use http::HeaderMap;
use http::header::{DATE, RETRY_AFTER};

/// How often and how patiently a failed request is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// How many times a request is repeated after the first try.
    pub count: u32,
    /// The longest wait before the first repetition; it doubles each time.
    pub first: Duration,
    /// The longest wait at all. A server that asks for more by `Retry-After` gets no second try
    /// from here: the error goes to the caller, who knows better what to do meanwhile.
    pub longest: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            count: 5,
            first: Duration::from_millis(500),
            longest: Duration::from_mins(1),
        }
    }
}

impl Retries {
    /// The wait before repetition `attempt` (from 0), between half of the exponential step and all of
    /// it, so that many clients do not come back at one time.
    pub(crate) fn backoff(&self, attempt: u32, random: u32) -> Duration {
        let step = self
            .first
            .saturating_mul(1_u32.checked_shl(attempt.min(16)).unwrap_or(u32::MAX))
            .min(self.longest);
        let half = step / 2;
        half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }

    /// The wait before repetition `attempt` after an answer with these headers; `None` when none
    /// should be made.
    pub(crate) fn wait(&self, attempt: u32, headers: Option<&HeaderMap>) -> Option<Duration> {
        if attempt >= self.count {
            return None;
        }
        match headers.and_then(retry_after) {
            Some(asked) if asked > self.longest => None,
            Some(asked) => Some(asked),
            None => Some(self.backoff(attempt, random())),
        }
    }
}

/// What `Retry-After` asks for. A date is measured against the answer's own `Date`, so that no clock
/// of this machine takes part.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(text)?;
    let now = http_date(headers.get(DATE)?.to_str().ok()?.trim())?;
    Some(Duration::from_secs(until.saturating_sub(now)))
}

/// Seconds since 1970 of an HTTP date in its one current form, `Sun, 06 Nov 1994 08:49:37 GMT`
/// ([RFC 9110 § 5.6.7](https://www.rfc-editor.org/rfc/rfc9110#section-5.6.7)).
fn http_date(text: &str) -> Option<u64> {
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(str::parse::<u64>);
    let hour = clock.next()?.ok()?;
    let minute = clock.next()?.ok()?;
    let second = clock.next()?.ok()?;
    let fits = words.next() == Some("GMT")
        && (1970..=9999).contains(&year)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !fits {
        return None;
    }
    // Days since 1970 in the proleptic Gregorian calendar, years counted from March.
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

pub(crate) fn random() -> u32 {
    // Without randomness the wait is merely the same for everyone.
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dates() {
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(
            http_date("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(784_111_777)
        );
        assert_eq!(
            http_date("Thu, 29 Feb 2024 12:00:00 GMT"),
            Some(1_709_208_000)
        );
        assert_eq!(http_date("yesterday"), None);
        assert_eq!(http_date("Sun, 99 Nov 1994 08:49:37 GMT"), None);
    }

    #[test]
    fn retry_after_in_seconds_and_as_a_date() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "7".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(7)));
        headers.insert(
            RETRY_AFTER,
            "Sun, 06 Nov 1994 08:49:47 GMT".parse().unwrap(),
        );
        assert_eq!(retry_after(&headers), None);
        headers.insert(DATE, "Sun, 06 Nov 1994 08:49:37 GMT".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(10)));
    }

    #[test]
    fn a_wait_over_the_longest_is_not_waited() {
        let retries = Retries::default();
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "3600".parse().unwrap());
        assert_eq!(retries.wait(0, Some(&headers)), None);
        assert_eq!(retries.wait(retries.count, None), None);
    }

    proptest! {
        #[test]
        fn backoff_grows_and_stays_bounded(attempt in 0_u32..100, random: u32) {
            let retries = Retries::default();
            let wait = retries.backoff(attempt, random);
            prop_assert!(wait <= retries.longest);
            prop_assert!(wait >= retries.first / 2);
        }

        #[test]
        fn dates_never_panic(text in ".{0,40}") {
            http_date(&text);
        }
    }
}
