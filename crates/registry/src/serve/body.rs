//! The one body type of every answer, so that a faster path for blobs can be added in one place.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::stream::{BoxStream, Stream};
use http_body::{Body as HttpBody, Frame, SizeHint};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use store::RemoteStream;
use tokio::task::JoinHandle;

use crate::serve::log::Record;

/// The body of an answer.
pub(crate) struct Body {
    inner: Inner,
    sent: u64,
    /// Written to the log when the body is dropped, sent or not.
    record: Option<Record>,
}

enum Inner {
    Bytes(Bytes),
    File(FileBody),
    Remote(RemoteBody),
    Stream(BoxStream<'static, Bytes>),
}

impl Body {
    /// A body without bytes.
    pub(crate) fn empty() -> Self {
        Self::full(Bytes::new())
    }

    /// A body in memory.
    pub(crate) fn full(bytes: impl Into<Bytes>) -> Self {
        Self::of(Inner::Bytes(bytes.into()))
    }

    /// A range of a file. A file that ends before it breaks the connection off, so that a client
    /// never takes a short body for a whole one.
    pub(crate) fn file(file: File, range: Range<u64>) -> Self {
        Self::of(Inner::File(FileBody {
            file: Arc::new(file),
            position: range.start,
            end: range.end,
            since_yield: 0,
            reading: None,
            kept: Vec::with_capacity(KEPT),
        }))
    }

    /// A range of an object of an object store. It ends with all of its bytes or breaks the connection off.
    pub(crate) fn remote(stream: RemoteStream) -> Self {
        Self::of(Inner::Remote(RemoteBody {
            left: stream.remaining(),
            bytes: Box::pin(futures_util::stream::try_unfold(
                stream,
                |mut stream| async move {
                    let bytes = stream.next().await.map_err(io::Error::other)?;
                    Ok(bytes.map(|bytes| (bytes, stream)))
                },
            )),
        }))
    }

    /// A stream without an end of its own.
    pub(crate) fn stream(stream: BoxStream<'static, Bytes>) -> Self {
        Self::of(Inner::Stream(stream))
    }

    /// How many bytes it will send, when that is known.
    pub(crate) fn length(&self) -> Option<u64> {
        match &self.inner {
            Inner::Bytes(bytes) => Some(bytes.len() as u64),
            Inner::File(file) => Some(file.end - file.position),
            Inner::Remote(remote) => Some(remote.left),
            Inner::Stream(_) => None,
        }
    }

    /// The same body, which writes this record when it ends.
    pub(crate) fn recorded(mut self, record: Record) -> Self {
        self.record = Some(record);
        self
    }

    fn of(inner: Inner) -> Self {
        Self {
            inner,
            sent: 0,
            record: None,
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let next = match &mut this.inner {
            Inner::Bytes(bytes) if bytes.is_empty() => None,
            Inner::Bytes(bytes) => Some(Ok(std::mem::take(bytes))),
            Inner::File(file) => ready!(file.poll_next(cx)),
            Inner::Remote(remote) => ready!(remote.poll_next(cx)),
            Inner::Stream(stream) => ready!(Pin::new(stream).poll_next(cx)).map(Ok),
        };
        if let Some(Ok(bytes)) = &next {
            this.sent += bytes.len() as u64;
        }
        Poll::Ready(next.map(|result| result.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.length() == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.length()
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            record.write(self.sent, self.length());
        }
    }
}

/// Reads a file in pieces: what is in the page cache at once on this thread, the rest on a blocking
/// one, so that a worker never waits for the disk.
struct FileBody {
    file: Arc<File>,
    position: u64,
    end: u64,
    since_yield: usize,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    /// Pieces that were given out. One that nobody else has any more is read into again: a new buffer would have
    /// to be cleared first.
    kept: Vec<Bytes>,
}

impl FileBody {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if let Some(reading) = &mut self.reading {
            let result = ready!(Pin::new(reading).poll(cx));
            self.reading = None;
            return Poll::Ready(Some(
                result
                    .map_err(io::Error::other)
                    .and_then(|result| result)
                    .and_then(|bytes| self.took(bytes)),
            ));
        }
        if self.position == self.end {
            return Poll::Ready(None);
        }
        if self.since_yield >= YIELD {
            // A download that never waits would keep the worker from everyone else.
            self.since_yield = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let wanted = usize::try_from(self.end - self.position).map_or(PIECE, |n| n.min(PIECE));
        let mut buffer = self.buffer(wanted);
        match read(
            &self.file,
            self.position,
            &mut buffer,
            ReadWriteFlags::NOWAIT,
        ) {
            Ok(count) => {
                buffer.truncate(count);
                Poll::Ready(Some(self.took(buffer.freeze())))
            }
            Err(error)
                if WOULD_WAIT
                    .iter()
                    .any(|e| error.raw_os_error() == Some(e.raw_os_error())) =>
            {
                let (file, position) = (Arc::clone(&self.file), self.position);
                self.reading = Some(tokio::task::spawn_blocking(move || {
                    let count = read(&file, position, &mut buffer, ReadWriteFlags::empty())?;
                    buffer.truncate(count);
                    Ok(buffer.freeze())
                }));
                self.poll_next(cx)
            }
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    fn took(&mut self, bytes: Bytes) -> io::Result<Bytes> {
        if bytes.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file of a blob is shorter than the blob",
            ));
        }
        self.position += bytes.len() as u64;
        self.since_yield += bytes.len();
        if self.kept.len() < KEPT {
            self.kept.push(bytes.clone());
        }
        Ok(bytes)
    }

    /// A buffer of this length: one that was sent, or a new one.
    fn buffer(&mut self, wanted: usize) -> BytesMut {
        let free = self.kept.iter().position(Bytes::is_unique);
        let reused = free.and_then(|index| self.kept.swap_remove(index).try_into_mut().ok());
        match reused {
            Some(mut buffer) => {
                buffer.resize(wanted, 0);
                buffer
            }
            None => BytesMut::zeroed(wanted),
        }
    }
}

/// The bytes of an object store as they come.
struct RemoteBody {
    bytes: BoxStream<'static, io::Result<Bytes>>,
    left: u64,
}

impl RemoteBody {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let next = ready!(self.bytes.as_mut().poll_next(cx));
        if let Some(Ok(bytes)) = &next {
            self.left = self.left.saturating_sub(bytes.len() as u64);
        }
        if let Some(Err(error)) = &next {
            tracing::warn!(%error, "a blob could not be sent whole");
        }
        Poll::Ready(next)
    }
}

fn read(
    file: &File,
    position: u64,
    buffer: &mut BytesMut,
    flags: ReadWriteFlags,
) -> io::Result<usize> {
    loop {
        match preadv2(file, &mut [io::IoSliceMut::new(buffer)], position, flags) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// One read; it fits the second-level cache.
const PIECE: usize = 256 * 1024;
/// Pieces that may be on their way at once and are used again.
const KEPT: usize = 4;
/// After this many bytes without a wait the task lets others run.
const YIELD: usize = 1024 * 1024;
/// The page is not resident, or the file system does not know `RWF_NOWAIT`.
const WOULD_WAIT: [Errno; 3] = [Errno::AGAIN, Errno::OPNOTSUPP, Errno::INVAL];

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use futures_util::future::poll_fn;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[tokio::test]
    async fn a_file_is_sent_exactly_and_yields_every_mebibyte() {
        let content: Vec<u8> = (0..5_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut body = Body::file(file(&content), 7..4_999_990);
        assert_eq!(body.length(), Some(4_999_983));
        let (mut got, mut run, mut longest, mut waits) = (Vec::new(), 0, 0, 0);
        loop {
            let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx))).await;
            match polled {
                Poll::Pending => {
                    waits += 1;
                    run = 0;
                    tokio::task::yield_now().await;
                }
                Poll::Ready(Some(frame)) => {
                    let data = frame.unwrap().into_data().unwrap();
                    run += data.len();
                    longest = longest.max(run);
                    got.extend_from_slice(&data);
                }
                Poll::Ready(None) => break,
            }
        }
        assert_eq!(got, &content[7..4_999_990]);
        assert!(waits >= 4, "{waits}");
        assert!(longest <= YIELD + PIECE, "{longest}");
    }

    #[tokio::test]
    async fn a_short_file_is_an_error_not_an_end() {
        let mut body = Body::file(file(b"abc"), 0..10);
        let mut results = Vec::new();
        for _ in 0..2 {
            results.push(
                poll_fn(|cx| Pin::new(&mut body).poll_frame(cx))
                    .await
                    .unwrap(),
            );
        }
        assert_eq!(results.remove(0).unwrap().into_data().unwrap(), "abc");
        assert_eq!(
            results.remove(0).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
