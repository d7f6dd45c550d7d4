//! The locks of a write, and the file that the next version of an object is written into.

use std::fs::File;
use std::io::Write;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::attire::{create_flags, set_access_if_possible};
use super::read::{is_named, open_regular};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::metadata::is_file;
use crate::store::{Access, Patience, lock, whole};

/// An object's lock file, locked exclusively as in a SoftHSM transaction.
#[derive(Debug)]
pub(super) struct Transaction {
    /// The file, with its lock.
    pub file: File,
    /// Whether there was none before.
    pub made: bool,
}

impl Transaction {
    /// Takes the lock; where there is no lock file, makes one that looks like `access`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] or [`ErrorKind::WouldBlock`] if somebody holds it; what opening and making it fails with.
    pub fn take(
        directory: BorrowedFd<'_>,
        name: &Path,
        access: Access,
        patience: Patience,
    ) -> Result<Self> {
        loop {
            let (file, made) = match open_regular(directory, name, OFlag::O_RDWR) {
                Ok(file) => (file, false),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    match make_lock_file(directory, name, access)? {
                        Some(file) => (file, true),
                        // Made by somebody else meanwhile, unless it is a link or a directory: then opening says so.
                        None => (open_regular(directory, name, OFlag::O_RDWR)?, false),
                    }
                }
                Err(error) => return Err(error),
            };
            lock::lock_exclusive(&file, patience)?;
            let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
            // Whoever deletes an object deletes its lock file, too: a lock on a file without a name keeps nobody out.
            match is_named(directory, name, &stat) {
                Ok(true) => return Ok(Self { file, made }),
                Ok(false) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether it was made for somebody who cannot use it: neither his, nor of the group of the file that it stands beside.
    pub fn is_foreign_to(&self, stat: &FileStat) -> bool {
        let is_foreign = |own: FileStat| own.st_uid != stat.st_uid && own.st_gid != stat.st_gid;
        self.made && fstat(&self.file).is_ok_and(is_foreign)
    }

    /// Takes back what was made for a write that came to nothing.
    pub fn give_up(self, directory: BorrowedFd<'_>, name: &Path) {
        if self.made {
            let _ = unlink(directory, name);
        }
    }
}

/// Makes a file that is called a lock file look like `access`, if it is one: who may rename files in the token's directory can have given the name to anything.
pub(super) fn dress_lock_file(file: &File, access: Access) {
    let is_lock_file = |stat: FileStat| stat.st_size == 0 && stat.st_nlink == 1;
    if fstat(file).is_ok_and(is_lock_file) {
        set_access_if_possible(file, access);
    }
}

/// Makes a lock file that looks like `access`; nothing if there is something of that name.
fn make_lock_file(directory: BorrowedFd<'_>, name: &Path, access: Access) -> Result<Option<File>> {
    let made = whole::make(directory, name, |file| {
        set_access_if_possible(file, access);
        // For the first who sees it, it is locked already, if it has its name last: then nobody else can have it.
        let _ = lock::lock_exclusive(file, Patience::Now);
        Ok(())
    })?;
    if made.is_some() {
        point("file.lock.ready");
    }
    Ok(made)
}

/// A file that goes again unless it is kept.
#[derive(Debug)]
pub(super) struct Temporary<'a> {
    directory: BorrowedFd<'a>,
    name: &'a Path,
    /// The file, open for reading and writing.
    pub file: File,
    kept: bool,
}

impl<'a> Temporary<'a> {
    /// Makes the file `name`, which nobody but its owner can open.
    ///
    /// # Errors
    /// What making it fails with.
    pub fn new(directory: BorrowedFd<'a>, name: &'a Path) -> Result<Self> {
        let fd = openat(
            directory,
            name,
            create_flags(),
            Mode::from_bits_truncate(0o600),
        )
        .map_err(|errno| Error::system("make a new file", errno))?;
        Ok(Self {
            directory,
            name,
            file: File::from(fd),
            kept: false,
        })
    }

    /// Writes all of its content.
    ///
    /// # Errors
    /// What writing fails with.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(|error| Error::io("write", &error))
    }

    /// What has its name now is not this file any more, or is to stay.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = unlink(self.directory, self.name);
        }
    }
}

/// Removes a file.
///
/// # Errors
/// What `unlink` fails with.
pub(super) fn unlink(directory: BorrowedFd<'_>, name: &Path) -> Result<()> {
    unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)
        .map_err(|errno| Error::system("unlink", errno))
}

/// Removes a file if it is there; whether it was.
///
/// # Errors
/// What `unlink` fails with.
pub(super) fn unlink_if_there(directory: BorrowedFd<'_>, name: &Path) -> Result<bool> {
    match unlink(directory, name) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// What `stat` says of a regular file.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none of that name.
pub(super) fn stat_regular(directory: BorrowedFd<'_>, name: &Path) -> Result<FileStat> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) if is_file(&stat) => Ok(stat),
        Ok(_) => Err(Error::not_found("not a regular file")),
        // No object can have a name that leaves no room for the suffix.
        Err(Errno::ENOENT | Errno::ENAMETOOLONG) => {
            Err(Error::not_found("there is no such object"))
        }
        Err(errno) => Err(Error::system("stat", errno)),
    }
}

/// Whether there is anything of that name.
pub(super) fn exists(directory: BorrowedFd<'_>, name: &Path) -> bool {
    !matches!(
        fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW),
        Err(Errno::ENOENT | Errno::ENAMETOOLONG)
    )
}

/// Waits until a file is on disk.
///
/// # Errors
/// What `fsync` fails with.
pub(super) fn sync(file: &File) -> Result<()> {
    file.sync_all().map_err(|error| Error::io("fsync", &error))
}
