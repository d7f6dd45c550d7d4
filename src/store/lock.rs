//! SoftHSM's locks, taken the way that coexists with them.
//!
//! SoftHSM locks whole files with POSIX `fcntl` locks. These belong to a process and vanish when it closes *any* descriptor
//! of the file, which no program with threads can live with. Open-file-description locks conflict with them in the same
//! way and belong to the open file (`fcntl(2)`, "Open file description locks"), so that is what we take. A lock is held
//! until its file is closed.

use std::fs::File;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::Patience;
use crate::error::{Error, Result};

/// Takes a read lock on all of `file`, which must be open for reading. It is held until `file` is closed.
///
/// # Errors
/// [`crate::error::ErrorKind::WouldBlock`] or [`crate::error::ErrorKind::Busy`] if somebody holds a write lock for
/// longer than `patience` lasts; what `fcntl` fails with.
pub fn lock_shared(file: &File, patience: Patience) -> Result<()> {
    take(file, libc::F_RDLCK, patience)
}

/// Takes a write lock on all of `file`, which must be open for writing. It is held until `file` is closed.
///
/// # Errors
/// [`crate::error::ErrorKind::WouldBlock`] or [`crate::error::ErrorKind::Busy`] if somebody holds any lock for longer than
/// `patience` lasts; what `fcntl` fails with.
pub fn lock_exclusive(file: &File, patience: Patience) -> Result<()> {
    take(file, libc::F_WRLCK, patience)
}

fn take(file: &File, kind: i32, patience: Patience) -> Result<()> {
    // The kernel has no lock call with a deadline, and one that is interrupted by a signal would need a handler: ask again,
    // soon at first (SoftHSM holds a lock for well under a millisecond), then less often.
    let mut pause = Duration::from_micros(500);
    loop {
        match set_lock(file, kind) {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                patience.wait(pause, "another process holds a lock on the file")?;
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::system("lock", errno)),
        }
    }
}

fn set_lock(file: &File, kind: i32) -> nix::Result<()> {
    let whole_file = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Has to be 0 for locks of an open file description.
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file)).map(drop)
}
