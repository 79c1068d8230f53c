//! The directory that becomes a release: what is in it, sorted bytewise, and what is left out.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Finding, ReleaseError, Severity, finding};

/// What a release directory holds, by relative path with `/` between components.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    pub(super) entries: BTreeMap<String, Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File { size: u64, executable: bool },
}

impl Tree {
    /// Walks a directory. What cannot be part of a release is left out and is a finding.
    pub(super) fn walk(root: &Path, findings: &mut Vec<Finding>) -> Result<Self, ReleaseError> {
        let mut tree = Self {
            root: root.to_owned(),
            entries: BTreeMap::new(),
        };
        let ignore = Ignore::read(root)?;
        let mut total = 0_u64;
        let mut open = vec![String::new()];
        while let Some(directory) = open.pop() {
            let path = root.join(&directory);
            for entry in fs::read_dir(&path).map_err(io("read", &path))? {
                let entry = entry.map_err(io("read", &path))?;
                let raw = entry.file_name();
                let mut refuse = |name: &str, message: &str, hint: &str| {
                    findings.push(finding(Severity::Error, name, 0, message, hint));
                };
                let Some(name) = raw
                    .to_str()
                    .filter(|name| !name.chars().any(char::is_control))
                else {
                    let shown = raw.to_string_lossy();
                    let shown: String = shown.chars().filter(|c| !c.is_control()).collect();
                    refuse(
                        &join(&directory, &shown),
                        "the name is not UTF-8 or holds control characters",
                        "rename it, or list it in `.longshoreignore`",
                    );
                    continue;
                };
                let name = join(&directory, name);
                let path = root.join(&name);
                let metadata = fs::symlink_metadata(&path).map_err(io("read", &path))?;
                let kind = metadata.file_type();
                if ignore.matches(&name, kind.is_dir()) {
                    continue;
                }
                if name.len() > MAX_NAME {
                    refuse(
                        &name,
                        "the name is longer than 1024 bytes",
                        "shorten it, or list it in `.longshoreignore`",
                    );
                } else if kind.is_symlink() {
                    refuse(
                        &name,
                        "it is a symbolic link",
                        "put the file itself there: a release holds files, so that it means the same everywhere",
                    );
                } else if kind.is_dir() {
                    if metadata.mode() & 0o005 != 0o005 {
                        refuse(
                            &name,
                            "others may not read this directory, but in a release everyone may",
                            "`chmod o+rx` it, or list it in `.longshoreignore`",
                        );
                    }
                    tree.entries.insert(name.clone(), Kind::Directory);
                    open.push(name);
                } else if kind.is_file() {
                    if metadata.mode() & 0o004 == 0 {
                        refuse(
                            &name,
                            "others may not read this file, but in a release everyone may",
                            "`chmod o+r` it if it is no secret; a secret is given by the target",
                        );
                    }
                    total = total.saturating_add(metadata.len());
                    if metadata.len() > MAX_FILE {
                        refuse(
                            &name,
                            "it is larger than 1 GiB",
                            "put large data into an image or a volume",
                        );
                    }
                    let kind = Kind::File {
                        size: metadata.len(),
                        executable: metadata.mode() & 0o100 != 0,
                    };
                    tree.entries.insert(name, kind);
                } else {
                    refuse(
                        &name,
                        "it is neither a file nor a directory",
                        "remove it, or list it in `.longshoreignore`",
                    );
                }
                if tree.entries.len() > MAX_ENTRIES || total > MAX_TOTAL {
                    findings.push(finding(
                        Severity::Error,
                        ".",
                        0,
                        "the directory holds more than 100 000 entries or 2 GiB",
                        "list what is not needed in `.longshoreignore`",
                    ));
                    return Ok(tree);
                }
            }
        }
        Ok(tree)
    }

    pub(super) fn is_file(&self, name: &str) -> bool {
        matches!(self.entries.get(name), Some(Kind::File { .. }))
    }

    /// Whether there is a file or directory of this name; the empty name is the root.
    pub(super) fn has(&self, name: &str) -> bool {
        name.is_empty() || self.entries.contains_key(name)
    }

    /// Opens a file of the tree; never through a link that replaced it meanwhile.
    pub(super) fn open(&self, name: &str) -> Result<fs::File, ReleaseError> {
        let path = self.root.join(name);
        fs::OpenOptions::new()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)
            .map_err(io("open", &path))
    }

    /// A file's first `limit` bytes.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, ReleaseError> {
        let mut content = Vec::new();
        self.open(name)?
            .take(limit)
            .read_to_end(&mut content)
            .map_err(io("read", &self.root.join(name)))?;
        Ok(content)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Maps an I/O error to this room's.
pub(super) fn io(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> ReleaseError {
    let path = path.to_owned();
    move |source| ReleaseError::Io {
        operation,
        path,
        source,
    }
}

/// Joins two relative paths; an empty one is the root.
pub(super) fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() {
        name.to_owned()
    } else {
        format!("{directory}/{name}")
    }
}

/// The directory that a relative path lies in; empty for the root.
pub(super) fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// Resolves `path` in `base`. `None` when it leaves the tree.
pub(super) fn normal(base: &str, path: &str) -> Option<String> {
    if path.starts_with('/') {
        return None;
    }
    let mut components: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop()?;
            }
            name => components.push(name),
        }
    }
    Some(components.join("/"))
}

/// What is left out: version control, editor litter, and what `.longshoreignore` lists in the form
/// of `.gitignore`: one pattern a line, `#` comments, `!` takes back, a `/` at the end means
/// directories only, a `/` elsewhere ties it to the root, `*`, `?`, `[…]` and `**`.
struct Ignore(Vec<Rule>);

struct Rule {
    pattern: Vec<u8>,
    rooted: bool,
    directories: bool,
    negated: bool,
}

impl Ignore {
    fn read(root: &Path) -> Result<Self, ReleaseError> {
        let path = root.join(IGNORE_FILE);
        let own = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() && metadata.len() <= MAX_IGNORE => {
                fs::read_to_string(&path).map_err(io("read", &path))?
            }
            Ok(_) => {
                return Err(ReleaseError::Rejected(format!(
                    "`{IGNORE_FILE}` must be a file of at most {} KiB",
                    MAX_IGNORE >> 10
                )));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(io("read", &path)(error)),
        };
        Ok(Self::parse(&own))
    }

    fn parse(own: &str) -> Self {
        let lines = LITTER.iter().copied().chain(own.lines());
        Self(lines.filter_map(Rule::parse).collect())
    }

    fn matches(&self, name: &str, directory: bool) -> bool {
        self.0
            .iter()
            .rev()
            .find(|rule| rule.matches(name, directory))
            .is_some_and(|rule| !rule.negated)
    }
}

impl Rule {
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end();
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let (negated, line) = match line.strip_prefix('!') {
            Some(line) => (true, line),
            None => (false, line.strip_prefix('\\').unwrap_or(line)),
        };
        let (directories, line) = match line.strip_suffix('/') {
            Some(line) => (true, line),
            None => (false, line),
        };
        let rooted = line.contains('/');
        let line = line.strip_prefix('/').unwrap_or(line);
        (!line.is_empty()).then(|| Self {
            pattern: line.as_bytes().to_vec(),
            rooted,
            directories,
            negated,
        })
    }

    fn matches(&self, name: &str, directory: bool) -> bool {
        if self.directories && !directory {
            return false;
        }
        let name = if self.rooted {
            name
        } else {
            name.rsplit('/').next().unwrap_or(name)
        };
        glob(&self.pattern, name.as_bytes())
    }
}

/// Matches a pattern in time linear in both for one star, and bounded by their product for more:
/// every state is visited once.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    // `reached[j]`: the pattern so far matches the first `j` bytes.
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    let mut at = 0;
    while at < pattern.len() {
        let rest = &pattern[at..];
        let mut next = vec![false; name.len() + 1];
        if rest.starts_with(b"**/") {
            // Nothing, or whole components.
            let mut any = false;
            for j in 0..=name.len() {
                next[j] = reached[j] || (any && j > 0 && name[j - 1] == b'/');
                any |= reached[j];
            }
            at += 3;
        } else if rest.starts_with(b"**") {
            let mut any = false;
            for j in 0..=name.len() {
                any |= reached[j];
                next[j] = any;
            }
            at += 2;
        } else if rest[0] == b'*' {
            let mut any = false;
            for j in 0..=name.len() {
                any = reached[j] || (any && name[j - 1] != b'/');
                next[j] = any;
            }
            at += 1;
        } else {
            let (length, class) = class(rest);
            for j in 0..name.len() {
                let fits = if name[j] == b'/' {
                    rest[0] == b'/'
                } else {
                    class(name[j])
                };
                next[j + 1] = reached[j] && fits;
            }
            at += length;
        }
        reached = next;
    }
    reached[name.len()]
}

/// How long the next element of a pattern is, and what it matches.
fn class(pattern: &[u8]) -> (usize, Box<dyn Fn(u8) -> bool + '_>) {
    match pattern[0] {
        b'?' => (1, Box::new(|_| true)),
        b'\\' if pattern.len() > 1 => (2, Box::new(|byte| byte == pattern[1])),
        b'[' => {
            let negated = pattern
                .get(1)
                .is_some_and(|byte| matches!(byte, b'!' | b'^'));
            let start = 1 + usize::from(negated);
            let Some(length) = pattern
                .iter()
                .skip(start + 1)
                .position(|byte| *byte == b']')
            else {
                return (1, Box::new(|byte| byte == b'['));
            };
            let set = &pattern[start..=start + length];
            let matches = move |byte: u8| {
                let mut found = false;
                let mut at = 0;
                while at < set.len() {
                    if at + 2 < set.len() && set[at + 1] == b'-' {
                        found |= (set[at]..=set[at + 2]).contains(&byte);
                        at += 3;
                    } else {
                        found |= set[at] == byte;
                        at += 1;
                    }
                }
                found != negated
            };
            (start + length + 2, Box::new(matches))
        }
        literal => (1, Box::new(move |byte| byte == literal)),
    }
}

const IGNORE_FILE: &str = ".longshoreignore";
const LITTER: [&str; 19] = [
    IGNORE_FILE,
    ".git",
    ".hg",
    ".svn",
    ".jj",
    ".bzr",
    "_darcs",
    "CVS",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".idea",
    ".vscode",
    "*.sw[a-p]",
    ".*.sw[a-p]",
    "*~",
    "\\#*#",
    ".#*",
    ".nfs*",
];
const MAX_ENTRIES: usize = 100_000;
const MAX_FILE: u64 = 1 << 30;
const MAX_IGNORE: u64 = 256 << 10;
const MAX_NAME: usize = 1024;
const MAX_TOTAL: u64 = 2 << 30;

#[cfg(test)]
mod tests;
