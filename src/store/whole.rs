//! A small file that is whole from the moment in which it has a name.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::error::{Error, Result};

/// Makes the file `name`, which is its maker's alone before `prepare` has given it all that it is to have; nothing if there is something of that name. It gets its
/// name last where the file system can do that (`O_TMPFILE`, `open(2)`): then nobody has it open before, and a crash leaves none that lacks anything.
///
/// # Errors
/// What making it and `prepare` fail with, and then there is none.
pub(super) fn make(
    directory: impl AsFd,
    name: &Path,
    prepare: impl Fn(&File) -> Result<()>,
) -> Result<Option<File>> {
    let directory = directory.as_fd();
    let private = Mode::from_bits_truncate(0o600);
    let unnamed = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    if let Ok(fd) = openat(directory, ".", unnamed, private) {
        let file = File::from(fd);
        prepare(&file)?;
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(
            AT_FDCWD,
            own.as_str(),
            directory,
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        ) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::EEXIST) => return Ok(None),
            Err(_) => {}
        }
    }
    let named =
        OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = match openat(directory, name, named, private) {
        Ok(fd) => File::from(fd),
        Err(Errno::EEXIST) => return Ok(None),
        Err(errno) => return Err(Error::system("make a file", errno)),
    };
    if let Err(error) = prepare(&file) {
        let _ = unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
        return Err(error);
    }
    Ok(Some(file))
}
