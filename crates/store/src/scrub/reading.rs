//! One reading: the bytes, in pieces and at a rate, against the digest.
//!
//! Damage and a failure that may pass are kept apart here: only what another reading would say again is damage.

use std::time::Duration;

use bytes::Bytes;
use oci::{Digest, Hasher};
use tokio::time::Instant;

use crate::blocking::blocking;
use crate::error::Error;
use crate::model::{Blob, BlobContent};

/// What a reading says.
pub(crate) enum Verdict {
    Sound,
    /// What is wrong.
    Damaged(String),
    /// There is no object: how that is known.
    Missing(String),
    /// It could not be read; that says nothing of what is stored.
    Unknown(Error),
}

impl Verdict {
    /// Tells damage from a failure that may pass.
    pub(crate) fn of_failure(error: Error) -> Self {
        match &error {
            Error::Damaged { problem, .. } if error.is_missing() => Self::Missing(problem.clone()),
            Error::Damaged { problem, .. } => Self::Damaged(problem.clone()),
            Error::Io { path, .. } if error.is_missing() => {
                Self::Missing(format!("`{}` is missing", path.display()))
            }
            _ => Self::Unknown(error),
        }
    }
}

/// Reads an open blob to its end and compares its digest. `pause` is awaited with the bytes of each piece.
pub(crate) async fn hash<F: Future<Output = ()>>(
    blob: &Blob,
    digest: &Digest,
    mut pause: impl FnMut(u64) -> F,
) -> Verdict {
    let mut hasher = Hasher::new(digest.algorithm());
    if let BlobContent::Inline(bytes) = &blob.content {
        pause(bytes.len() as u64).await;
        return judge(
            digest,
            &Digest::of(digest.algorithm(), bytes),
            bytes.len() as u64,
            blob.size,
        );
    }
    if let BlobContent::Remote(remote) = &blob.content {
        let mut stream = match remote.stream(0..blob.size).await {
            Ok(stream) => stream,
            Err(error) => return Verdict::of_failure(error),
        };
        let mut at = 0;
        loop {
            match stream.next().await {
                Ok(Some(piece)) => {
                    pause(piece.len() as u64).await;
                    at += piece.len() as u64;
                    hasher = match add(hasher, piece).await {
                        Ok(hasher) => hasher,
                        Err(error) => return Verdict::Unknown(error),
                    };
                }
                Ok(None) => return judge(digest, &hasher.finish(), at, blob.size),
                Err(error) => return Verdict::of_failure(error),
            }
        }
    }
    let mut at = 0;
    while at < blob.size {
        let end = (at + PIECE).min(blob.size);
        let piece = match blob.read(at..end).await {
            Ok(piece) => piece,
            Err(error) => return Verdict::of_failure(error),
        };
        pause(piece.len() as u64).await;
        let length = piece.len() as u64;
        hasher = match add(hasher, piece).await {
            Ok(hasher) => hasher,
            Err(error) => return Verdict::Unknown(error),
        };
        at += length;
        if length == 0 {
            break;
        }
    }
    judge(digest, &hasher.finish(), at, blob.size)
}

/// Hashes a piece, away from the threads that serve requests.
async fn add(mut hasher: Hasher, piece: Bytes) -> Result<Hasher, Error> {
    blocking(move || {
        hasher.update(&piece);
        Ok(hasher)
    })
    .await
}

fn judge(digest: &Digest, actual: &Digest, length: u64, size: u64) -> Verdict {
    if length != size {
        Verdict::Damaged(format!("it has {length} bytes, not {size}"))
    } else if actual == digest {
        Verdict::Sound
    } else {
        Verdict::Damaged(format!("it has digest `{actual}`"))
    }
}

/// Keeps reading at a rate. What was not used is not saved up.
pub(super) struct Pace {
    rate: u64,
    next: Instant,
}

impl Pace {
    pub(super) fn new(rate: u64) -> Self {
        Self {
            rate,
            next: Instant::now(),
        }
    }

    /// Waits as long as these bytes take at the rate.
    pub(super) fn take(&mut self, bytes: u64) -> impl Future<Output = ()> + Send + use<> {
        let took = if self.rate == u64::MAX {
            Duration::ZERO
        } else {
            // Invariant: both are far below 2^52, and the rate is not 0.
            Duration::from_secs_f64(bytes as f64 / self.rate as f64)
        };
        self.next = self.next.max(Instant::now()) + took;
        let until = self.next;
        async move {
            if !took.is_zero() {
                tokio::time::sleep_until(until).await;
            }
        }
    }
}

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(1000);
        let begun = pace.next;
        for _ in 0..10 {
            drop(pace.take(500));
        }
        assert!(pace.next >= begun + Duration::from_secs(5));
        assert!(pace.next < begun + Duration::from_secs(6));
        let now = Instant::now();
        pace.next = now.checked_sub(Duration::from_secs(100)).unwrap_or(now);
        drop(pace.take(1000));
        assert!(pace.next >= now + Duration::from_secs(1));
    }

    #[tokio::test]
    async fn verdicts() {
        let digest = Digest::sha256(b"right");
        let blob = |bytes: &'static [u8], size| Blob {
            size,
            content: BlobContent::Inline(bytes.into()),
        };
        let free = |_| std::future::ready(());
        assert!(matches!(
            hash(&blob(b"right", 5), &digest, free).await,
            Verdict::Sound
        ));
        assert!(matches!(
            hash(&blob(b"wrong", 5), &digest, free).await,
            Verdict::Damaged(_)
        ));
        assert!(matches!(
            hash(&blob(b"right", 6), &digest, free).await,
            Verdict::Damaged(_)
        ));
        assert!(matches!(
            Verdict::of_failure(Error::Database("not now".to_owned())),
            Verdict::Unknown(_)
        ));
        assert!(matches!(
            Verdict::of_failure(Error::Io {
                operation: "open",
                path: "x".into(),
                source: std::io::ErrorKind::NotFound.into(),
            }),
            Verdict::Missing(_)
        ));
    }
}
