//! What a request carries, made anew for each try.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::sync::Notify;

/// The content of a request.
#[derive(Clone, Debug, Default)]
pub(crate) enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// Bytes in memory.
    Bytes(Bytes),
    /// A part of something that can be read more than once.
    Part {
        source: Arc<dyn Source>,
        offset: u64,
        length: u64,
    },
}

/// Something whose bytes can be read from any place, as often as needed.
pub(crate) trait Source: fmt::Debug + Send + Sync {
    /// The whole length in bytes.
    fn length(&self) -> u64;
    /// Exactly `length` bytes from `offset`. A stream that cannot give them ends with an error.
    fn open(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<Stream>>;
    /// After everything was sent: what is known to be wrong with it, when this source checks.
    fn verify(&self) -> Result<(), crate::Error> {
        Ok(())
    }
}

pub(crate) type Stream = BoxStream<'static, io::Result<Bytes>>;

impl Body {
    /// Its length in bytes; `None`: no body at all.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::Empty => None,
            Self::Bytes(bytes) => Some(bytes.len() as u64),
            Self::Part { length, .. } => Some(*length),
        }
    }

    /// Opens it for one try. Every byte that leaves is counted on `meter`.
    pub(super) async fn open(&self, meter: &Arc<Meter>) -> io::Result<reqwest::Body> {
        let stream = match self {
            Self::Empty => return Ok(reqwest::Body::from(Bytes::new())),
            Self::Bytes(bytes) => {
                // In slices, so that a slow connection is seen to move.
                let slices: Vec<io::Result<Bytes>> = (0..bytes.len())
                    .step_by(SLICE)
                    .map(|at| Ok(bytes.slice(at..bytes.len().min(at + SLICE))))
                    .collect();
                futures_util::stream::iter(slices).boxed()
            }
            Self::Part {
                source,
                offset,
                length,
            } => source.open(*offset, *length).await?,
        };
        let meter = meter.clone();
        Ok(reqwest::Body::wrap_stream(stream.inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                meter.add(chunk.len() as u64);
            }
        })))
    }
}

/// Counts what was handed to the connection.
#[derive(Debug, Default)]
pub(super) struct Meter {
    sent: AtomicU64,
    moved: Notify,
}

impl Meter {
    fn add(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.moved.notify_one();
    }

    /// How many bytes there were.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until there are more. Cancel safe: a permit is kept.
    pub(super) async fn moved(&self) {
        self.moved.notified().await;
    }
}

const SLICE: usize = 64 * 1024;
