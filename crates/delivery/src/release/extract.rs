//! Writes verified layers to the disk: all or nothing, beneath one directory descriptor.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci::tar::{Entry, Limits, Sink};
use oci::{Descriptor, tar};
use rustix::fs::{Mode, OFlags, RenameFlags, ResolveFlags};

use super::layers::{Item, Layers, SEPARATOR, tar_error};
use super::tree::io as io_error;
use super::{FetchedRelease, ReleaseError};

/// Extracts. See [`super::extract()`].
pub(super) fn extract(release: &FetchedRelease, directory: &Path) -> Result<(), ReleaseError> {
    extract_with(release, directory, &Limits::default(), &mut |_| Ok(()))
}

/// Is told how many bytes are about to be written, and may say that there is no room.
type Room<'a> = dyn FnMut(u64) -> io::Result<()> + 'a;

fn extract_with(
    release: &FetchedRelease,
    directory: &Path,
    limits: &Limits,
    room: &mut Room<'_>,
) -> Result<(), ReleaseError> {
    // The whole of every layer is checked before the first byte is written.
    let layers = Layers::read(&release.format, &release.layers, limits, &|_| false)?;
    let (Some(parent), Some(name)) = (directory.parent(), directory.file_name()) else {
        return Err(io_error("extract into", directory)(
            io::ErrorKind::InvalidInput.into(),
        ));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(".partial");
    let partial = Partial(parent.join(partial_name));
    // What a crash left behind.
    partial.remove()?;
    fs::create_dir(&partial.0).map_err(io_error("make", &partial.0))?;
    write(&layers, &release.layers, &partial.0, limits, room)?;
    let from = &partial.0;
    match rustix::fs::renameat_with(
        rustix::fs::CWD,
        from,
        rustix::fs::CWD,
        directory,
        RenameFlags::NOREPLACE,
    ) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => {
            if !same(from, directory).map_err(io_error("compare", directory))? {
                return Err(io_error("extract into", directory)(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "it is there with other content; move it away",
                )));
            }
            return partial.remove();
        }
        Err(error) => return Err(io_error("rename to", directory)(error.into())),
    }
    sync(parent)
}

/// The directory under its temporary name; gone when this is dropped, unless it was renamed.
struct Partial(PathBuf);

impl Partial {
    fn remove(&self) -> Result<(), ReleaseError> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &self.0)(error))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, path = %self.0.display(), "a partial release stays until the next try");
        }
    }
}

fn write(
    layers: &Layers,
    blobs: &[(Descriptor, PathBuf)],
    path: &Path,
    limits: &Limits,
    room: &mut Room<'_>,
) -> Result<(), ReleaseError> {
    let root = rustix::fs::open(
        path,
        OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| io_error("open", path)(error.into()))?;
    // Sorted, so a directory comes before what is in it.
    let mut directories = Vec::new();
    for (name, item) in &layers.items {
        if matches!(item, Item::Directory { .. }) {
            make_directory(&root, name).map_err(io_error("make", &path.join(name)))?;
            directories.push(name.as_str());
        }
    }
    for (index, (_, blob)) in blobs.iter().enumerate() {
        let owns = |item: &Item| matches!(item, Item::Entry { layer, .. } if *layer == index);
        if !layers.items.values().any(owns) {
            continue;
        }
        let mut sink = FileSink {
            root: &root,
            items: &layers.items,
            index,
            room,
            failed: None,
        };
        let file = File::open(blob).map_err(io_error("open", blob))?;
        let result = tar::read(file, limits, &mut sink);
        if let Some((name, error)) = sink.failed {
            return Err(io_error("write", &path.join(name))(error));
        }
        result.map_err(|error| tar_error(error, blob))?;
    }
    for (name, item) in &layers.items {
        if let Item::Blobs(parts) = item {
            whole(&root, name, parts, blobs, room).map_err(io_error("write", &path.join(name)))?;
        }
    }
    for name in directories.into_iter().rev() {
        let directory = beneath(
            &root,
            name,
            OFlags::DIRECTORY | OFlags::RDONLY,
            Mode::empty(),
        )
        .map_err(io_error("open", &path.join(name)))?;
        rustix::fs::fsync(directory)
            .map_err(|error| io_error("sync", &path.join(name))(error.into()))?;
    }
    rustix::fs::fchmod(&root, DIRECTORY_MODE)
        .and_then(|()| rustix::fs::fsync(&root))
        .map_err(|error| io_error("sync", path)(error.into()))
}

/// Writes the files of one layer that no later layer replaces.
struct FileSink<'a, 'r> {
    root: &'a OwnedFd,
    items: &'a BTreeMap<String, Item>,
    index: usize,
    room: &'a mut Room<'r>,
    /// What went wrong on the disk, which the reader would report as a fault of the archive.
    failed: Option<(String, io::Error)>,
}

impl Sink for FileSink<'_, '_> {
    fn entry(&mut self, entry: Entry<'_>) -> io::Result<()> {
        let executable = match self.items.get(entry.path) {
            Some(Item::Entry { layer, executable }) if *layer == self.index => *executable,
            _ => return Ok(()),
        };
        if !matches!(entry.kind, tar::Kind::File { .. }) {
            return Ok(());
        }
        let mut write = || -> Result<(), Fault> {
            let mut file = File::from(create(self.root, entry.path).map_err(Fault::Disk)?);
            copy(entry.content, &mut file, self.room)?;
            finish(&file, executable).map_err(Fault::Disk)
        };
        match write() {
            Ok(()) => Ok(()),
            Err(Fault::Source(error)) => Err(error),
            Err(Fault::Disk(error)) => {
                let told = io::Error::from(error.kind());
                self.failed = Some((entry.path.to_owned(), error));
                Err(told)
            }
        }
    }
}

enum Fault {
    Source(io::Error),
    Disk(io::Error),
}

fn copy(from: &mut dyn Read, to: &mut File, room: &mut Room<'_>) -> Result<(), Fault> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Source(error)),
        };
        room(count as u64)
            .and_then(|()| to.write_all(&buffer[..count]))
            .map_err(Fault::Disk)?;
    }
}

/// Writes a file that is made of whole layers.
fn whole(
    root: &OwnedFd,
    name: &str,
    parts: &[usize],
    blobs: &[(Descriptor, PathBuf)],
    room: &mut Room<'_>,
) -> io::Result<()> {
    let mut file = File::from(create(root, name)?);
    for (position, part) in parts.iter().enumerate() {
        let Some((_, blob)) = blobs.get(*part) else {
            continue;
        };
        if position > 0 {
            file.write_all(SEPARATOR)?;
        }
        copy(&mut File::open(blob)?, &mut file, room).map_err(|fault| match fault {
            Fault::Source(error) | Fault::Disk(error) => error,
        })?;
    }
    finish(&file, false)
}

fn finish(file: &File, executable: bool) -> io::Result<()> {
    let mode = if executable {
        DIRECTORY_MODE
    } else {
        FILE_MODE
    };
    // Set on the descriptor: the umask has no say.
    rustix::fs::fchmod(file, mode)?;
    file.sync_all()
}

fn create(root: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    beneath(
        root,
        name,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY,
        Mode::from_raw_mode(0o600),
    )
}

fn make_directory(root: &OwnedFd, name: &str) -> io::Result<()> {
    let (above, base) = name.rsplit_once('/').unwrap_or((".", name));
    let above = beneath(
        root,
        above,
        OFlags::DIRECTORY | OFlags::RDONLY,
        Mode::empty(),
    )?;
    rustix::fs::mkdirat(&above, base, Mode::from_raw_mode(0o700))?;
    let made = beneath(
        &above,
        base,
        OFlags::DIRECTORY | OFlags::RDONLY,
        Mode::empty(),
    )?;
    rustix::fs::fchmod(made, DIRECTORY_MODE)?;
    Ok(())
}

/// Opens below `root` and nowhere else, whatever links somebody puts there meanwhile.
fn beneath(root: &impl AsFd, name: &str, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat2(
        root,
        name,
        flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        mode,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )?)
}

fn sync(directory: &Path) -> Result<(), ReleaseError> {
    File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(io_error("sync", directory))
}

/// Whether two directories hold the same names, modes and bytes.
fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let (a, b) = (fs::symlink_metadata(one)?, fs::symlink_metadata(other)?);
    if a.mode() != b.mode() {
        return Ok(false);
    }
    if a.is_file() {
        return Ok(a.len() == b.len() && same_content(File::open(one)?, File::open(other)?)?);
    }
    if !a.is_dir() {
        return Ok(false);
    }
    let names = |path: &Path| -> io::Result<std::collections::BTreeSet<std::ffi::OsString>> {
        fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    };
    let entries = names(one)?;
    if entries != names(other)? {
        return Ok(false);
    }
    for name in entries {
        if !same(&one.join(&name), &other.join(&name))? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn same_content(one: File, other: File) -> io::Result<bool> {
    let mut one = io::BufReader::new(one);
    let mut other = io::BufReader::new(other);
    loop {
        let a = io::BufRead::fill_buf(&mut one)?;
        let b = io::BufRead::fill_buf(&mut other)?;
        let count = a.len().min(b.len());
        if a[..count] != b[..count] {
            return Ok(false);
        }
        if count == 0 {
            return Ok(a.len() == b.len());
        }
        io::BufRead::consume(&mut one, count);
        io::BufRead::consume(&mut other, count);
    }
}

const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

#[cfg(test)]
mod tests;
