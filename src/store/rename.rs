//! Giving a file a name that nothing has.

use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat};
use nix::sys::stat::fstatat;
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno as Refusal;

/// Renames `from` to `to` in `directory`; both can be paths that begin at the root. Where the file system cannot look and rename in one step, as many
/// that are served by a program cannot (`EINVAL`, rename(2)), one is done after the other: whoever makes a file of a given name here holds
/// the lock of that, and SoftHSM gives its own names nobody has.
///
/// # Errors
/// `EEXIST`, and what `rename(2)` fails with.
pub(super) fn rename_to_free(
    directory: BorrowedFd<'_>,
    from: &Path,
    to: &Path,
) -> Result<(), Errno> {
    match renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Refusal::INVAL | Refusal::NOSYS | Refusal::OPNOTSUPP) => {
            match fstatat(directory, to, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => renameat(directory, from, directory, to),
                Ok(_) => Err(Errno::EEXIST),
                Err(errno) => Err(errno),
            }
        }
        Err(errno) => Err(Errno::from_raw(errno.raw_os_error())),
    }
}
