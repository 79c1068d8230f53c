//! What an upload takes its bytes from: a file, by path or open, or a blob of another registry.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::StreamExt as _;
use oci::{Descriptor, Hasher};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::{BlobReader, Repository};
use crate::Error;
use crate::transport::{Source, Stream};

/// A local file of a known length.
#[derive(Debug)]
pub(crate) struct FileContent {
    path: PathBuf,
    size: u64,
}

impl FileContent {
    /// # Errors
    /// When it is not there or has another length.
    pub(crate) async fn new(path: &Path, size: u64) -> Result<Self, Error> {
        let actual = tokio::fs::metadata(path)
            .await
            .map_err(Error::file(path))?
            .len();
        if actual != size {
            return Err(Error::SizeMismatch {
                what: path.display().to_string(),
                expected: size,
                actual,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            size,
        })
    }
}

impl Source for FileContent {
    fn length(&self) -> u64 {
        self.size
    }

    fn open(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move {
            let mut file = tokio::fs::File::open(&self.path).await?;
            file.seek(io::SeekFrom::Start(offset)).await?;
            let stream =
                futures_util::stream::try_unfold((file, length), |(mut file, left)| async move {
                    if left == 0 {
                        return Ok(None);
                    }
                    let step = left.min(READ);
                    let mut buffer =
                        BytesMut::with_capacity(usize::try_from(step).unwrap_or(usize::MAX));
                    if (&mut file).take(step).read_buf(&mut buffer).await? == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                    }
                    let left = left - buffer.len() as u64;
                    Ok(Some((buffer.freeze(), (file, left))))
                });
            Ok(stream.boxed())
        })
    }
}

/// A local file that is open, of a known length.
#[derive(Debug)]
pub(crate) struct OpenContent {
    file: Arc<std::fs::File>,
    size: u64,
}

impl OpenContent {
    /// # Errors
    /// When it has another length.
    pub(crate) fn new(file: std::fs::File, descriptor: &Descriptor) -> Result<Self, Error> {
        let what = descriptor.digest.to_string();
        let actual = file
            .metadata()
            .map_err(Error::file(Path::new(&what)))?
            .len();
        if actual != descriptor.size {
            return Err(Error::SizeMismatch {
                what,
                expected: descriptor.size,
                actual,
            });
        }
        Ok(Self {
            file: Arc::new(file),
            size: actual,
        })
    }
}

impl Source for OpenContent {
    fn length(&self) -> u64 {
        self.size
    }

    fn open(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<Stream>> {
        let state = (Arc::clone(&self.file), offset, length);
        let stream = futures_util::stream::try_unfold(state, |(file, at, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            let step = usize::try_from(left.min(READ)).unwrap_or(usize::MAX);
            let read = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; step];
                let count = file.read_at(&mut buffer, at)?;
                buffer.truncate(count);
                Ok::<_, io::Error>((file, buffer))
            });
            let (file, buffer) = read.await.map_err(io::Error::other)??;
            if buffer.is_empty() {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            let count = buffer.len() as u64;
            Ok(Some((
                Bytes::from(buffer),
                (file, at + count, left - count),
            )))
        });
        Box::pin(async move { Ok(stream.boxed()) })
    }
}

/// A blob of another repository, read as it is sent.
#[derive(Debug)]
pub(crate) struct RemoteContent(Arc<Remote>);

#[derive(Debug)]
struct Remote {
    repository: Repository,
    descriptor: Descriptor,
    /// The open reader with what it gave beyond the last part, between two parts.
    slot: Mutex<Option<(BlobReader, Bytes)>>,
    /// The hash of everything up to a position. A part that is read again is not hashed again.
    hash: Mutex<(Hasher, u64)>,
    /// Why reading failed for good. The connection that sends sees only that its body broke off.
    failure: Mutex<Option<Error>>,
}

impl RemoteContent {
    pub(crate) fn new(repository: Repository, descriptor: Descriptor) -> Self {
        let hasher = Hasher::new(descriptor.digest.algorithm());
        Self(Arc::new(Remote {
            repository,
            descriptor,
            slot: Mutex::new(None),
            hash: Mutex::new((hasher, 0)),
            failure: Mutex::new(None),
        }))
    }
}

impl Source for RemoteContent {
    fn length(&self) -> u64 {
        self.0.descriptor.size
    }

    fn open(&self, offset: u64, length: u64) -> BoxFuture<'_, io::Result<Stream>> {
        let remote = self.0.clone();
        let kept = lock(&remote.slot)
            .take()
            .filter(|(reader, rest)| reader.position() - rest.len() as u64 == offset);
        let (reader, rest) = kept.unwrap_or_else(|| {
            let descriptor = &remote.descriptor;
            let reader = BlobReader::new(
                remote.repository.clone(),
                descriptor.digest.clone(),
                descriptor.size,
                offset,
            );
            (reader, Bytes::new())
        });
        let part = Part {
            remote,
            reader,
            rest,
            position: offset,
            left: length,
        };
        let stream = futures_util::stream::try_unfold(part, Part::next).boxed();
        Box::pin(std::future::ready(Ok(stream)))
    }

    fn verify(&self) -> Result<(), Error> {
        if let Some(failure) = lock(&self.0.failure).take() {
            return Err(failure);
        }
        let hash = lock(&self.0.hash);
        let descriptor = &self.0.descriptor;
        if hash.1 == descriptor.size {
            let actual = hash.0.clone().finish();
            if actual != descriptor.digest {
                return Err(Error::DigestMismatch {
                    what: format!("{}@{}", self.0.repository.name, descriptor.digest),
                    expected: descriptor.digest.clone(),
                    actual: actual.to_string(),
                });
            }
        }
        Ok(())
    }
}

struct Part {
    remote: Arc<Remote>,
    reader: BlobReader,
    rest: Bytes,
    position: u64,
    left: u64,
}

impl Part {
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.left == 0 {
            return Ok(None);
        }
        if self.rest.is_empty() {
            match self.reader.next().await {
                Ok(Some(chunk)) => self.rest = chunk,
                Ok(None) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Err(error) => {
                    let told = io::Error::other(error.to_string());
                    *lock(&self.remote.failure) = Some(error);
                    return Err(told);
                }
            }
        }
        let length =
            usize::try_from(self.left).map_or(self.rest.len(), |left| left.min(self.rest.len()));
        let chunk = self.rest.split_to(length);
        {
            let mut hash = lock(&self.remote.hash);
            let (hasher, hashed) = &mut *hash;
            let end = self.position + chunk.len() as u64;
            if self.position <= *hashed && end > *hashed {
                // The difference is shorter than the chunk.
                let known = usize::try_from(*hashed - self.position).unwrap_or(chunk.len());
                hasher.update(&chunk[known..]);
                *hashed = end;
            }
            self.position = end;
        }
        self.left -= chunk.len() as u64;
        if self.left > 0 {
            return Ok(Some((chunk, self)));
        }
        // The next part goes on with this reader.
        let Self {
            remote,
            reader,
            rest,
            position,
            left,
        } = self;
        let fresh = BlobReader::new(
            remote.repository.clone(),
            remote.descriptor.digest.clone(),
            remote.descriptor.size,
            position,
        );
        *lock(&remote.slot) = Some((reader, rest));
        let ended = Self {
            remote,
            reader: fresh,
            rest: Bytes::new(),
            position,
            left,
        };
        Ok(Some((chunk, ended)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much of a file is read at once, in bytes.
const READ: u64 = 256 * 1024;
