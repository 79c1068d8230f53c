//! Password checks that cost little: verified ones are remembered, failed ones are bounded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use tokio::sync::Semaphore;

use crate::auth::htpasswd::{Hash, Users};
use crate::settings::Limits;

/// How a password check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// The password is right.
    Right,
    /// User or password are wrong. `true` where it was found out just now, not remembered.
    Wrong(bool),
    /// Too many checks wait or failed, try again after this many seconds.
    TooMany(u64),
}

/// Checks passwords of all requests.
pub(crate) struct Logins {
    key: [u8; 32],
    known: Mutex<HashMap<[u8; 32], Known>>,
    failures: Mutex<HashMap<(String, IpAddr), Failures>>,
    permits: Semaphore,
    waiting: AtomicUsize,
    remember: Duration,
    allowed_failures: u32,
}

#[derive(Clone, Copy)]
struct Known {
    right: bool,
    until: Instant,
}

struct Failures {
    since: Instant,
    count: u32,
}

impl Logins {
    pub(crate) fn new(limits: &Limits, key: [u8; 32]) -> Self {
        Self {
            key,
            known: Mutex::default(),
            failures: Mutex::default(),
            permits: Semaphore::new(limits.logins.max(1)),
            waiting: AtomicUsize::new(0),
            remember: limits.login_cache,
            allowed_failures: limits.failed_logins.max(1),
        }
    }

    /// Checks a password. What was found out is remembered under a keyed hash that includes the
    /// stored hash, so a changed password is asked anew at once.
    pub(crate) async fn check(
        &self,
        users: &Users,
        user: &str,
        password: &str,
        address: IpAddr,
    ) -> Login {
        let hash = users.hash(user).cloned();
        let key = self.digest(user, password, hash.as_ref());
        if let Some(right) = self.recall(&key) {
            return if right {
                Login::Right
            } else {
                Login::Wrong(false)
            };
        }
        let who = (user.chars().take(64).collect::<String>(), address);
        if let Some(seconds) = self.refused(&who) {
            return Login::TooMany(seconds);
        }
        // The queue is bounded: a flood of wrong passwords must not pile up work.
        let Some(_place) = Place::take(&self.waiting) else {
            return Login::TooMany(1);
        };
        let Ok(_permit) = self.permits.acquire().await else {
            return Login::TooMany(1);
        };
        let exists = hash.is_some();
        let hash = hash.unwrap_or_else(Hash::nobody);
        let password = password.to_owned();
        let right = tokio::task::spawn_blocking(move || hash.verify(&password))
            .await
            .unwrap_or(false)
            && exists;
        let lasts = if right {
            self.remember
        } else {
            FORGET_WRONG.min(self.remember)
        };
        self.learn(
            key,
            Known {
                right,
                until: Instant::now() + lasts,
            },
        );
        if right {
            Login::Right
        } else {
            self.failed(who);
            Login::Wrong(true)
        }
    }

    fn digest(&self, user: &str, password: &str, hash: Option<&Hash>) -> [u8; 32] {
        // Invariant: HMAC takes keys of every length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else {
            return [0; 32];
        };
        for part in [
            user,
            password,
            &hash.map(Hash::fingerprint).unwrap_or_default(),
        ] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part.as_bytes());
        }
        mac.finalize().into_bytes().into()
    }

    fn recall(&self, key: &[u8; 32]) -> Option<bool> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .get(key)
            .filter(|known| known.until > Instant::now())
            .map(|known| known.right)
    }

    fn learn(&self, key: [u8; 32], value: Known) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            let now = Instant::now();
            known.retain(|_, known| known.until > now && known.right);
            if known.len() >= MAX_KNOWN {
                known.clear();
            }
        }
        known.insert(key, value);
    }

    /// Seconds to wait when this user failed too often from this address.
    fn refused(&self, who: &(String, IpAddr)) -> Option<u64> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = failures.get(who)?;
        let age = failures.since.elapsed();
        (failures.count >= self.allowed_failures && age < WINDOW)
            .then(|| WINDOW.saturating_sub(age).as_secs().max(1))
    }

    fn failed(&self, who: (String, IpAddr)) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= MAX_KNOWN {
            failures.retain(|_, failures| failures.since.elapsed() < WINDOW);
            if failures.len() >= MAX_KNOWN {
                failures.clear();
            }
        }
        let entry = failures.entry(who).or_insert(Failures {
            since: Instant::now(),
            count: 0,
        });
        if entry.since.elapsed() >= WINDOW {
            *entry = Failures {
                since: Instant::now(),
                count: 0,
            };
        }
        entry.count += 1;
    }
}

/// A place in the queue of checks.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(waiting: &'a AtomicUsize) -> Option<Self> {
        let place = Self(waiting);
        (waiting.fetch_add(1, Ordering::AcqRel) < MAX_WAITING).then_some(place)
        // Dropping a refused place takes the count back.
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

const MAX_KNOWN: usize = 10_000;
const MAX_WAITING: usize = 64;
const WINDOW: Duration = Duration::from_mins(1);
const FORGET_WRONG: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    fn users(password: &str) -> Users {
        Users::parse(&format!("alice:{}", bcrypt::hash(password, 4).unwrap())).unwrap()
    }

    #[tokio::test]
    async fn a_changed_password_is_asked_anew() {
        let logins = Logins::new(&Limits::default(), [1; 32]);
        let (old, new) = (users("one"), users("two"));
        assert_eq!(logins.check(&old, "alice", "one", HERE).await, Login::Right);
        assert_eq!(logins.check(&old, "alice", "one", HERE).await, Login::Right);
        assert_eq!(
            logins.check(&new, "alice", "one", HERE).await,
            Login::Wrong(true)
        );
        assert_eq!(logins.check(&new, "alice", "two", HERE).await, Login::Right);
        assert_eq!(
            logins.check(&Users::default(), "alice", "two", HERE).await,
            Login::Wrong(true)
        );
    }

    #[tokio::test]
    async fn failures_are_bounded_by_user_and_address() {
        let limits = Limits {
            failed_logins: 3,
            ..Limits::default()
        };
        let logins = Logins::new(&limits, [1; 32]);
        let users = users("right");
        for n in 0..3 {
            assert_eq!(
                logins.check(&users, "alice", &n.to_string(), HERE).await,
                Login::Wrong(true)
            );
        }
        assert!(matches!(
            logins.check(&users, "alice", "x", HERE).await,
            Login::TooMany(_)
        ));
        // The same wrong password again is answered from memory, without work.
        assert_eq!(
            logins.check(&users, "alice", "1", HERE).await,
            Login::Wrong(false)
        );
        assert_eq!(
            logins.check(&users, "alice", "right", THERE).await,
            Login::Right
        );
        // Once right, it is remembered for every address.
        assert_eq!(
            logins.check(&users, "alice", "right", HERE).await,
            Login::Right
        );
    }

    #[test]
    fn the_queue_is_bounded_and_gives_places_back() {
        let waiting = AtomicUsize::new(0);
        let places: Vec<_> = (0..MAX_WAITING)
            .map(|_| Place::take(&waiting).unwrap())
            .collect();
        assert!(Place::take(&waiting).is_none());
        drop(places);
        assert_eq!(waiting.load(Ordering::Acquire), 0);
    }
}
