//! Reading one `.object` file beside its writers.
//!
//! Lock order: `.lock`, then `.object`, both shared, as a SoftHSM transaction takes them (exclusively). SoftHSM's own readers
//! take the second alone; the first keeps us clear of 2.6.1, which unlocks `.object` before its buffer has
//! reached the file, but holds `.lock` until it has.
//!
//! Where 2.6.1 holds no `.lock` (`token.object` on every login, an object while it is being made), a reader with all locks
//! can still meet a file that is empty or half written. What is written last is written by one `write` of less than a
//! page, all before it in multiples of 4096: so a file that is empty, does not parse or ends at such a multiple is let go
//! and read again, until it has stayed as it is for [`SETTLED`].

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::decode::{Decoded, decode};
use crate::error::{Error, ErrorKind, Result};
use crate::store::metadata::{Metadata, Stamp, is_file};
use crate::store::{Patience, lock};

/// How long a file that looks unfinished has to stay as it is to be taken for what it looks like.
pub const SETTLED: Duration = Duration::from_secs(1);

/// The largest file that is read. The largest objects that SoftHSM makes are data objects of its callers; this is far
/// beyond, and keeps a sparse file from taking all memory.
pub const LARGEST: u64 = 256 * 1024 * 1024;

/// The buffer of a C library's stream, after which it writes.
const STREAM_BUFFER: usize = 4096;

/// A file as it was found, parsed or not.
#[derive(Debug)]
pub struct Version {
    /// Identity and times while the locks were held.
    pub stamp: Stamp,
    /// Of the file.
    pub metadata: Metadata,
    /// What is in it.
    pub content: Result<Decoded>,
}

/// A file that was read and is still locked.
#[derive(Debug)]
pub struct Reading {
    /// What was found.
    pub version: Version,
    /// The file's content.
    pub bytes: Vec<u8>,
    /// What `fstat` said of the file.
    pub(super) stat: FileStat,
    /// The file, with its lock.
    pub(super) file: File,
    /// Its lock file, with its lock; only held, never used.
    pub(super) transaction: Option<File>,
    /// Whether it may be in the middle of a write.
    looks_unfinished: bool,
}

/// Reads the file `object` in the directory `directory` under the locks; `lock` is its lock file, where SoftHSM
/// takes one. `alone` says that nobody else can be writing it, so that it is finished whatever it looks like. It is locked until what
/// is returned is dropped.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no such regular file, [`ErrorKind::PermissionDenied`]; [`ErrorKind::WouldBlock`] or
/// [`ErrorKind::Busy`] if a lock is not to be had or a writer does not finish. That the content is damaged is no
/// error of this function, but of [`Version::content`].
pub fn read_file(
    directory: BorrowedFd<'_>,
    object: &Path,
    lock: Option<&Path>,
    alone: bool,
    patience: Patience,
) -> Result<Reading> {
    settled(alone, patience, || {
        attempt(directory, object, lock, patience)
    })
}

/// Makes attempts until one of them finds a file that is finished, or that has looked unfinished for [`SETTLED`]. Between
/// two of them no lock is held. An attempt that gives nothing is made again at once.
///
/// # Errors
/// What an attempt fails with; [`ErrorKind::WouldBlock`] or [`ErrorKind::Busy`] if a writer does not finish.
pub(super) fn settled(
    alone: bool,
    patience: Patience,
    mut attempt: impl FnMut() -> Result<Option<Reading>>,
) -> Result<Reading> {
    let mut first_seen: Option<(Stamp, Instant)> = None;
    loop {
        let Some(reading) = attempt()? else { continue };
        if alone || !reading.looks_unfinished {
            return Ok(reading);
        }
        let stamp = reading.version.stamp;
        let since = match first_seen {
            Some((seen, since)) if seen == stamp => since,
            _ => Instant::now(),
        };
        first_seen = Some((stamp, since));
        let age = stamp.age().unwrap_or_default().max(since.elapsed());
        if age >= SETTLED {
            return Ok(reading);
        }
        // Lets go of the locks, so that the writer can finish.
        drop(reading);
        patience.wait(
            Duration::from_millis(2),
            "the file looks unfinished and has not been left alone for a second yet",
        )?;
    }
}

fn attempt(
    directory: BorrowedFd<'_>,
    object: &Path,
    lock: Option<&Path>,
    patience: Patience,
) -> Result<Option<Reading>> {
    // An object without a lock file, or with one that we may not read, is read all the same: that is what SoftHSM does.
    let transaction = match lock.map(|lock| open_regular(directory, lock, OFlag::O_RDONLY)) {
        Some(Ok(file)) => {
            lock::lock_shared(&file, patience)?;
            Some(file)
        }
        Some(Err(error)) if error.kind() == ErrorKind::System(libc::EMFILE) => return Err(error),
        Some(Err(_)) | None => None,
    };
    let file = open_regular(directory, object, OFlag::O_RDONLY)?;
    lock::lock_shared(&file, patience)?;
    read_locked(directory, object, file, transaction)
}

/// Reads a file that is locked; nothing if between opening and locking its name has come to mean another one.
///
/// # Errors
/// [`ErrorKind::NotFound`] if its name means nothing any more; what reading fails with.
pub(super) fn read_locked(
    directory: BorrowedFd<'_>,
    object: &Path,
    mut file: File,
    transaction: Option<File>,
) -> Result<Option<Reading>> {
    let before = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    if !is_named(directory, object, &before)? {
        return Ok(None);
    }
    let (bytes, content) = match read_all(&mut file, &before) {
        Ok(bytes) => {
            let content = decode(&bytes);
            (bytes, content)
        }
        // One that is too large to be read can be renamed and replaced all the same.
        Err(error) if error.kind() == ErrorKind::Damaged => (Vec::new(), Err(error)),
        Err(error) => return Err(error),
    };
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    let stamp = Stamp::from(&stat);
    let written_meanwhile = stamp != Stamp::from(&before) || bytes.len() as i64 != stat.st_size;
    let looks_unfinished =
        written_meanwhile || content.is_err() || bytes.len().is_multiple_of(STREAM_BUFFER);
    Ok(Some(Reading {
        version: Version {
            stamp,
            metadata: Metadata::of_open(&file, &stat),
            content,
        },
        bytes,
        stat,
        file,
        transaction,
        looks_unfinished,
    }))
}

/// Whether `name` means the file that `stat` is of.
///
/// # Errors
/// [`ErrorKind::NotFound`] if it means nothing.
pub(super) fn is_named(directory: BorrowedFd<'_>, name: &Path, stat: &FileStat) -> Result<bool> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(named) => Ok((named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino)),
        Err(errno) => Err(Error::system("stat", errno)),
    }
}

/// All of a file, which has to be short enough for an object.
///
/// # Errors
/// [`ErrorKind::Damaged`] if it is not; what reading fails with.
pub(super) fn read_all(file: &mut File, stat: &FileStat) -> Result<Vec<u8>> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size > LARGEST {
        return Err(Error::damaged(format!(
            "the file has {size} bytes, more than any object ({LARGEST})"
        )));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(LARGEST)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io("read", &error))?;
    Ok(bytes)
}

/// Opens a regular file. A symbolic link is not followed, and a pipe not waited for: SoftHSM looks at neither.
pub(super) fn open_regular(directory: BorrowedFd<'_>, name: &Path, access: OFlag) -> Result<File> {
    let flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = openat(directory, name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ELOOP => Error::not_found("a symbolic link, which SoftHSM does not follow"),
        // A directory, or a pipe that nobody reads, opened for writing.
        Errno::EISDIR | Errno::ENXIO => Error::not_found("not a regular file"),
        other => Error::system("open", other),
    })?;
    let stat = fstat(&fd).map_err(|errno| Error::system("stat", errno))?;
    if !is_file(&stat) {
        return Err(Error::not_found("not a regular file"));
    }
    Ok(File::from(fd))
}
