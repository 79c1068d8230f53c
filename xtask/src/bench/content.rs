//! Bytes to push: random, new each time, and made before the clock starts.
//!
//! A large body is a block of random bytes in memory, repeated, and then 64 bytes that no body before
//! had. So its digest is new, hashing it ahead costs nothing but those 64 bytes, and `sendfile` can
//! send it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

use rustix::fs::MemfdFlags;
use sha2::{Digest as _, Sha256};

/// The random block.
const BLOCK: u64 = 64 * 1024 * 1024;
/// What is new in each body.
const TAIL: u64 = 64;

/// The number of layers of a small image.
pub(crate) const LAYERS: usize = 20;
/// The size of each of them.
pub(crate) const LAYER: usize = 10 * 1024;

/// Makes large bodies of one size.
pub(crate) struct Source {
    block: File,
    size: u64,
    /// The hash up to the tail.
    hashed: Sha256,
}

/// A large body.
pub(crate) struct Large<'a> {
    source: &'a Source,
    tail: Vec<u8>,
    pub(crate) digest: String,
}

impl Source {
    /// Makes the block and hashes it as often as it occurs.
    pub(crate) fn new(size: u64) -> anyhow::Result<Self> {
        anyhow::ensure!(size > TAIL, "a body has more than {TAIL} bytes");
        let bytes = random(usize::try_from(BLOCK.min(size))?)?;
        let mut block = File::from(rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC)?);
        block.write_all(&bytes)?;
        let mut hashed = Sha256::new();
        let mut left = size - TAIL;
        while left > 0 {
            let count = left.min(BLOCK);
            hashed.update(&bytes[..usize::try_from(count)?]);
            left -= count;
        }
        Ok(Self {
            block,
            size,
            hashed,
        })
    }

    /// A body that never was before.
    pub(crate) fn fresh(&self) -> anyhow::Result<Large<'_>> {
        let tail = random(usize::try_from(TAIL)?)?;
        let mut hash = self.hashed.clone();
        hash.update(&tail);
        Ok(Large {
            source: self,
            tail,
            digest: format!("sha256:{}", hex::encode(hash.finalize())),
        })
    }
}

impl Large<'_> {
    /// Its length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.source.size
    }

    /// Sends it.
    pub(crate) fn send(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut left = self.source.size - TAIL;
        while left > 0 {
            let mut offset = 0;
            let end = left.min(BLOCK);
            while offset < end {
                let most = usize::try_from(end - offset).unwrap_or(usize::MAX);
                let block = &self.source.block;
                let sent = rustix::fs::sendfile(&*stream, block, Some(&mut offset), most);
                match sent {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            left -= end;
        }
        stream.write_all(&self.tail)
    }

    /// Writes it to a file.
    pub(crate) fn write(&self, file: &mut File) -> anyhow::Result<()> {
        let mut bytes = vec![0; usize::try_from(BLOCK.min(self.source.size))?];
        std::os::unix::fs::FileExt::read_exact_at(&self.source.block, &mut bytes, 0)?;
        let mut left = self.source.size - TAIL;
        while left > 0 {
            let count = left.min(BLOCK);
            file.write_all(&bytes[..usize::try_from(count)?])?;
            left -= count;
        }
        file.write_all(&self.tail)?;
        Ok(())
    }
}

/// A small image: layers, a configuration and a manifest, all new.
pub(crate) struct Image {
    /// Digest and bytes of each layer, and of the configuration at last.
    pub(crate) blobs: Vec<(String, Vec<u8>)>,
    /// The manifest's bytes.
    pub(crate) manifest: Vec<u8>,
}

/// The media type of its manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Makes images.
pub(crate) struct Images {
    random: Random,
}

impl Images {
    /// Starts at a random place.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            random: Random::new()?,
        })
    }

    /// An image that never was before.
    pub(crate) fn fresh(&mut self) -> Image {
        use serde_json::json;
        let mut blobs: Vec<_> = (0..LAYERS)
            .map(|_| {
                let mut layer = vec![0; LAYER];
                self.random.fill(&mut layer);
                (e2e::digest(&layer), layer)
            })
            .collect();
        let ids: Vec<_> = blobs.iter().map(|(digest, _)| digest.clone()).collect();
        let layers: Vec<_> = ids
            .iter()
            .map(|digest| json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": LAYER }))
            .collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": ids },
        })
        .to_string()
        .into_bytes();
        let digest = e2e::digest(&config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": config.len() },
            "layers": layers,
        });
        blobs.push((digest, config));
        Image {
            blobs,
            manifest: manifest.to_string().into_bytes(),
        }
    }
}

/// Numbers without a pattern, quickly (xorshift64*); not for secrets.
pub(crate) struct Random(u64);

impl Random {
    /// Starts with a seed of the kernel's.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let mut seed = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut seed)?;
        Ok(Self(u64::from_le_bytes(seed) | 1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Fills a buffer.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            piece.copy_from_slice(&self.next().to_le_bytes()[..piece.len()]);
        }
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Puts things into a random order.
    pub(crate) fn shuffle<T>(&mut self, things: &mut [T]) {
        for last in (1..things.len()).rev() {
            let other = usize::try_from(self.below(last as u64 + 1)).unwrap_or(0);
            things.swap(last, other);
        }
    }
}

fn random(length: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    Random::new()?.fill(&mut bytes);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_body_has_its_digest_and_is_new() {
        for size in [TAIL + 1, 100_000, BLOCK + 12_345] {
            let source = Source::new(size).unwrap();
            let (one, two) = (source.fresh().unwrap(), source.fresh().unwrap());
            assert_ne!(one.digest, two.digest);
            let mut file = tempfile::tempfile().unwrap();
            one.write(&mut file).unwrap();
            let mut bytes = vec![0; usize::try_from(size).unwrap() + 1];
            let count = std::os::unix::fs::FileExt::read_at(&file, &mut bytes, 0).unwrap();
            assert_eq!(count as u64, size);
            assert_eq!(e2e::digest(&bytes[..count]), one.digest);
        }
    }

    #[test]
    fn an_image_names_what_it_is_made_of() {
        let mut images = Images::new().unwrap();
        let (one, two) = (images.fresh(), images.fresh());
        assert_eq!(one.blobs.len(), LAYERS + 1);
        assert_ne!(one.blobs[0].0, two.blobs[0].0);
        let manifest: serde_json::Value = serde_json::from_slice(&one.manifest).unwrap();
        assert_eq!(manifest["layers"][3]["digest"], one.blobs[3].0.as_str());
        assert_eq!(manifest["config"]["digest"], one.blobs[LAYERS].0.as_str());
    }

    #[test]
    fn shuffling_loses_nothing() {
        let mut things: Vec<u32> = (0..50).collect();
        Random::new().unwrap().shuffle(&mut things);
        assert_ne!(things, (0..50).collect::<Vec<_>>());
        things.sort_unstable();
        assert_eq!(things, (0..50).collect::<Vec<_>>());
    }
}
