//! What a name in an archive may be, and which names were seen.

use std::collections::HashMap;

use super::TarError;
use crate::digest::shorten;

/// Checks a name and gives it in its one form: relative, `/` between components, no `.`, no `..`,
/// no `/` at its end. `None` is the root of the tree (`.`, `./`).
pub(super) fn normal(name: &[u8], limit: usize) -> Result<Option<String>, TarError> {
    let refuse = |reason| TarError::Name {
        name: shorten(&String::from_utf8_lossy(name)),
        reason,
    };
    if name.is_empty() {
        return Err(refuse("it is empty"));
    }
    if name.len() > limit {
        return Err(TarError::Limit {
            what: "bytes in a name",
            limit: limit as u64,
        });
    }
    let text = std::str::from_utf8(name).map_err(|_| refuse("it is not UTF-8"))?;
    if text.chars().any(char::is_control) {
        return Err(refuse("it holds control characters"));
    }
    if text.starts_with('/') {
        return Err(refuse("it is absolute"));
    }
    let text = text.strip_suffix('/').unwrap_or(text);
    if text == "." {
        return Ok(None);
    }
    let text = text.strip_prefix("./").unwrap_or(text);
    for component in text.split('/') {
        match component {
            "" => return Err(refuse("it has an empty component")),
            "." => return Err(refuse("it has a `.` component")),
            ".." => return Err(refuse("it leaves the tree")),
            long if long.len() > MAX_COMPONENT => {
                return Err(refuse("a component is longer than 255 bytes"));
            }
            _ => {}
        }
    }
    Ok(Some(text.to_owned()))
}

/// Checks the target of a symbolic link that lies in `directory` (its parent's depth in components):
/// `..` may stand only in front and not leave the tree.
///
/// That is enough for all links together: no entry lies below a link, so the leading `..` climb real
/// directories; the names after them go down only, each perhaps through a link for which the same
/// holds.
pub(super) fn symlink_reason(target: &[u8], depth: usize, limit: usize) -> Option<&'static str> {
    if target.is_empty() || target.len() > limit {
        return Some("its target is empty or too long");
    }
    let Ok(text) = std::str::from_utf8(target) else {
        return Some("its target is not UTF-8");
    };
    if text.chars().any(char::is_control) {
        return Some("its target holds control characters");
    }
    if text.starts_with('/') {
        return Some("its target is absolute");
    }
    let mut climbed = 0;
    let mut descended = false;
    for component in text.split('/') {
        match component {
            "" | "." => {}
            ".." if descended => return Some("its target has `..` after a name"),
            ".." => climbed += 1,
            _ => descended = true,
        }
    }
    (climbed > depth).then_some("its target leaves the tree")
}

/// What a name was seen as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Directory,
    File,
    Link,
}

/// The names of one archive. Each is one thing, and only directories have names below them.
#[derive(Default)]
pub(super) struct Names {
    seen: HashMap<String, Seen>,
    bytes: usize,
}

impl Names {
    pub(super) fn get(&self, name: &str) -> Option<Seen> {
        self.seen.get(name).copied()
    }

    /// Takes in a name with the directories above it.
    pub(super) fn insert(&mut self, name: &str, kind: Seen) -> Result<(), TarError> {
        let duplicate = |name: &str, reason| TarError::Duplicate {
            name: shorten(name),
            reason,
        };
        // From the longest: a directory that is known has all above it known too.
        let above = name.rmatch_indices('/').map(|(end, _)| &name[..end]);
        for directory in above {
            match self.get(directory) {
                Some(Seen::Directory) => break,
                Some(Seen::File) => return Err(duplicate(directory, "as a file and a directory")),
                Some(Seen::Link) => return Err(duplicate(directory, "as a link and a directory")),
                None => self.remember(directory, Seen::Directory)?,
            }
        }
        match (self.get(name), kind) {
            (None, _) => self.remember(name, kind),
            (Some(Seen::Directory), Seen::Directory) => Ok(()),
            (Some(before), now) if before == now => Err(duplicate(name, "with two contents")),
            (Some(_), _) => Err(duplicate(name, "as two different kinds")),
        }
    }

    fn remember(&mut self, name: &str, kind: Seen) -> Result<(), TarError> {
        self.bytes += name.len() + OVERHEAD;
        if self.bytes > MAX_NAMES {
            return Err(TarError::Limit {
                what: "bytes of names",
                limit: MAX_NAMES as u64,
            });
        }
        self.seen.insert(name.to_owned(), kind);
        Ok(())
    }
}

/// The longest file name that Linux file systems take.
const MAX_COMPONENT: usize = 255;
/// What all names of one archive may take in memory. Implied directories count: a deep name names
/// many.
const MAX_NAMES: usize = 64 << 20;
const OVERHEAD: usize = 64;
