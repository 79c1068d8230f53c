//! Byte ranges: `Range` of a download ([RFC 9110 § 14](https://www.rfc-editor.org/rfc/rfc9110#section-14))
//! and `Content-Range` of an uploaded chunk
//! ([distribution-spec § Pushing a blob in chunks](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-a-blob-in-chunks)).

use std::ops::Range;

/// What a `Range` header asks of content of a known length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// All of it: another unit, several ranges or no range at all.
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing that exists: 416.
    Unsatisfiable,
}

/// Reads a `Range` header against content of `size` bytes. Several ranges are answered whole, which
/// the RFC allows. An inverted range is refused, not ignored: the specification's own tests ask for
/// 416.
pub(crate) fn asked(header: &str, size: u64) -> Asked {
    let Some((unit, set)) = header.split_once('=') else {
        return Asked::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") || set.contains(',') {
        return Asked::Whole;
    }
    let Some((first, last)) = set.trim().split_once('-') else {
        return Asked::Whole;
    };
    match (number(first), number(last)) {
        (Some(Some(first)), Some(Some(last))) if last < first => Asked::Unsatisfiable,
        (Some(Some(first)), Some(last)) => {
            if first >= size {
                return Asked::Unsatisfiable;
            }
            let end = last.map_or(size, |last| last.saturating_add(1).min(size));
            Asked::Part(first..end)
        }
        (Some(None), Some(Some(suffix))) => {
            if suffix == 0 || size == 0 {
                return Asked::Unsatisfiable;
            }
            Asked::Part(size.saturating_sub(suffix)..size)
        }
        _ => Asked::Whole,
    }
}

/// A `Content-Range` of a chunk: `<first>-<last>`, both inclusive; also `bytes <first>-<last>/<any>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// Where the chunk begins and how long it is.
    At {
        /// The first byte.
        first: u64,
        /// The length.
        length: u64,
    },
    /// Last before first: 416.
    Inverted,
    /// Not such a header: 400.
    Malformed,
}

/// Reads the `Content-Range` of a chunk.
pub(crate) fn chunk(header: &str) -> Chunk {
    let text = header.trim();
    let text = text.strip_prefix("bytes").map_or(text, str::trim_start);
    let text = text.strip_prefix('=').unwrap_or(text);
    let text = text.split('/').next().unwrap_or(text);
    let Some((first, last)) = text.split_once('-') else {
        return Chunk::Malformed;
    };
    match (number(first), number(last)) {
        (Some(Some(first)), Some(Some(last))) if last < first => Chunk::Inverted,
        (Some(Some(first)), Some(Some(last))) => match (last - first).checked_add(1) {
            Some(length) => Chunk::At { first, length },
            None => Chunk::Malformed,
        },
        _ => Chunk::Malformed,
    }
}

/// `Some(None)`: empty; `None`: not a number. A number beyond 64 bits is as good as the largest.
#[expect(clippy::option_option, reason = "absent and broken are told apart")]
fn number(text: &str) -> Option<Option<u64>> {
    let text = text.trim();
    if text.is_empty() {
        Some(None)
    } else if text.bytes().all(|b| b.is_ascii_digit()) {
        Some(Some(text.parse().unwrap_or(u64::MAX)))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_of_a_download() {
        for (header, size, expected) in [
            ("bytes=500-1499", 5000, Asked::Part(500..1500)),
            ("bytes=500-", 5000, Asked::Part(500..5000)),
            ("bytes=-500", 5000, Asked::Part(4500..5000)),
            ("bytes=-9000", 5000, Asked::Part(0..5000)),
            ("bytes=2000-5000", 3000, Asked::Part(2000..3000)),
            ("BYTES = 0-0", 1, Asked::Part(0..1)),
            ("bytes=500-0", 5000, Asked::Unsatisfiable),
            ("bytes=5000-10000", 5000, Asked::Unsatisfiable),
            ("bytes=5000-", 5000, Asked::Unsatisfiable),
            ("bytes=-0", 5000, Asked::Unsatisfiable),
            ("bytes=0-", 0, Asked::Unsatisfiable),
            ("bytes=-5", 0, Asked::Unsatisfiable),
            ("bytes=0-99999999999999999999999", 10, Asked::Part(0..10)),
            ("bytes=0-1,5-6", 10, Asked::Whole),
            ("lines=0-1", 10, Asked::Whole),
            ("bytes=a-b", 10, Asked::Whole),
            ("bytes=-", 10, Asked::Whole),
            ("bytes", 10, Asked::Whole),
        ] {
            assert_eq!(asked(header, size), expected, "{header} of {size}");
        }
    }

    #[test]
    fn ranges_of_a_chunk() {
        for (header, expected) in [
            (
                "0-99",
                Chunk::At {
                    first: 0,
                    length: 100,
                },
            ),
            (
                "bytes 100-199/*",
                Chunk::At {
                    first: 100,
                    length: 100,
                },
            ),
            (
                "bytes=5-5",
                Chunk::At {
                    first: 5,
                    length: 1,
                },
            ),
            ("9-3", Chunk::Inverted),
            ("", Chunk::Malformed),
            ("0-", Chunk::Malformed),
            ("-5", Chunk::Malformed),
            ("a-b", Chunk::Malformed),
            ("0-18446744073709551615", Chunk::Malformed),
        ] {
            assert_eq!(chunk(header), expected, "{header}");
        }
    }

    proptest! {
        #[test]
        fn a_part_is_never_empty_nor_outside(header in "bytes=[0-9]{0,6}-[0-9]{0,6}", size in 0u64..100_000) {
            if let Asked::Part(range) = asked(&header, size) {
                prop_assert!(range.start < range.end && range.end <= size);
            }
        }

        #[test]
        fn foreign_text_never_panics(header in "\\PC{0,40}", size: u64) {
            let _ = asked(&header, size);
            let _ = chunk(&header);
        }
    }
}
