//! Names that survive a power failure.

use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::error::{Error, Result};

/// Waits until the names in `directory` survive a power failure. On a file system that knows no such call for directories (vboxsf, AFS), which
/// `fsync(2)` answers with `EINVAL`, there is nothing to be waited for.
///
/// # Errors
/// What `fsync` fails with.
pub(super) fn sync_directory(directory: impl AsFd) -> Result<()> {
    match nix::unistd::fsync(directory) {
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(Error::system("fsync of the directory", errno)),
    }
}
