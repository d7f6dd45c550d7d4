//! Mode, owner, extended attributes and times of the files of a store.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, UtimensatFlags, fchmod, fchmodat, fstat, futimens, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat};
use rustix::fs::XattrFlags;
use rustix::io::Errno as Refusal;

use crate::error::{Error, Result};
use crate::store::crash::point;
use crate::store::{Access, MetadataChange, Time, acl};

/// With which a file is made: nobody has it yet, and nobody but its owner may read it before its mode is set.
pub(super) fn create_flags() -> OFlag {
    OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// Mode and owner that `stat` says.
pub(super) fn access_of(stat: &FileStat) -> Access {
    Access {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    }
}

/// The same for another file that has no access control list: nobody may do with that what the list keeps him from.
pub(super) fn narrowed(file: &File, stat: &FileStat) -> Access {
    let list = |buffer: &mut [u8]| rustix::fs::fgetxattr(file, acl::NAME, buffer);
    let access = access_of(stat);
    Access {
        mode: acl::narrow(access.mode, list),
        ..access
    }
}

/// Gives a new file, or a directory, its mode and owner.
///
/// # Errors
/// [`crate::error::ErrorKind::NotPermitted`] if this process may not.
pub(crate) fn set_access(file: impl AsFd, access: Access) -> Result<()> {
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    set_owner(&file, &stat, access.uid, access.gid)?;
    point("file.access.owned");
    fchmod(&file, Mode::from_bits_truncate(access.mode & 0o7777))
        .map_err(|errno| Error::system("chmod", errno))
}

/// The same, as far as this process may: the group, if it may not give files away.
pub(super) fn set_access_if_possible(file: &File, access: Access) {
    if set_access(file, access).is_err()
        && let Ok(stat) = fstat(file)
    {
        let group = set_owner(file, &stat, stat.st_uid, access.gid).is_ok();
        // Nobody may do with it what the file that it stands beside does not let him do.
        let mode = if group {
            access.mode & 0o770
        } else {
            access.mode & 0o700
        };
        let _ = fchmod(file, Mode::from_bits_truncate(mode));
    }
}

fn set_owner(file: impl AsFd, stat: &FileStat, uid: u32, gid: u32) -> Result<()> {
    let uid = (uid != stat.st_uid).then(|| Uid::from_raw(uid));
    let gid = (gid != stat.st_gid).then(|| Gid::from_raw(gid));
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    fchown(file, uid, gid).map_err(|errno| Error::system("chown", errno))
}

/// Makes `new` look like `old`: owner, mode, extended attributes. Whether that was possible.
pub(super) fn copy(old: &File, stat: &FileStat, new: &File) -> bool {
    let copied = || -> Result<()> {
        let fresh = fstat(new).map_err(|errno| Error::system("stat", errno))?;
        set_owner(new, &fresh, stat.st_uid, stat.st_gid)?;
        point("file.copy.owned");
        copy_extended(old, new)?;
        point("file.copy.listed");
        // Last, since a change of the owner takes bits away. With an access control list, the mode that it comes with.
        fchmod(new, Mode::from_bits_truncate(stat.st_mode & 0o7777))
            .map_err(|errno| Error::system("chmod", errno))
    };
    copied().is_ok()
}

fn copy_extended(old: &File, new: &File) -> Result<()> {
    let failed = |errno: Refusal| {
        Error::system("extended attributes", Errno::from_raw(errno.raw_os_error()))
    };
    let wanted = extended(old).map_err(failed)?;
    let present = extended(new).map_err(failed)?;
    for name in &present {
        // What a new file inherits from its directory.
        if !wanted.contains(name) {
            rustix::fs::fremovexattr(new, name.as_slice()).map_err(failed)?;
        }
    }
    for name in &wanted {
        let value =
            grown(|buffer| rustix::fs::fgetxattr(old, name.as_slice(), buffer)).map_err(failed)?;
        if present.contains(name) {
            let inherited = grown(|buffer| rustix::fs::fgetxattr(new, name.as_slice(), buffer))
                .map_err(failed)?;
            if inherited == value {
                continue;
            }
        }
        rustix::fs::fsetxattr(new, name.as_slice(), &value, XattrFlags::empty()).map_err(failed)?;
    }
    Ok(())
}

/// The names of the extended attributes of a file; none where the file system has none.
fn extended(file: &File) -> Result<Vec<Vec<u8>>, Refusal> {
    match grown(|buffer| rustix::fs::flistxattr(file, buffer)) {
        Ok(names) => Ok(names
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect()),
        Err(Refusal::OPNOTSUPP) => Ok(Vec::new()),
        Err(errno) => Err(errno),
    }
}

/// What `ask` puts into a buffer, which is made larger until it fits.
fn grown(mut ask: impl FnMut(&mut [u8]) -> Result<usize, Refusal>) -> Result<Vec<u8>, Refusal> {
    // The kernel gives no more than 64 KiB (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
    let mut buffer = vec![0; 1024];
    loop {
        match ask(&mut buffer) {
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Err(Refusal::RANGE) if buffer.len() < 64 * 1024 => buffer.resize(64 * 1024, 0),
            Err(errno) => return Err(errno),
        }
    }
}

/// Sets the time of last modification of an open file: this one, or now.
///
/// # Errors
/// What `futimens` fails with.
pub(super) fn set_mtime(file: &File, mtime: Option<SystemTime>) -> Result<()> {
    let mtime = mtime.map_or(TimeSpec::UTIME_NOW, timespec);
    futimens(file, &TimeSpec::UTIME_OMIT, &mtime)
        .map_err(|errno| Error::system("set the time", errno))
}

/// Sets both times to now, as who may write a file can who does not own it (`utimensat(2)`).
pub(super) fn set_times_to_now(file: &File) -> Result<()> {
    futimens(file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)
        .map_err(|errno| Error::system("set the time", errno))
}

/// Changes mode, owner and times of the file `name` in `directory`; a symbolic link is not followed.
///
/// # Errors
/// [`crate::error::ErrorKind::NotPermitted`] if this process may not; [`crate::error::ErrorKind::NotFound`].
pub(super) fn apply(directory: BorrowedFd<'_>, name: &Path, change: &MetadataChange) -> Result<()> {
    if change.uid.is_some() || change.gid.is_some() {
        let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
        fchownat(directory, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| Error::system("chown", errno))?;
        point("file.metadata.owned");
    }
    // After the owner, a change of which takes bits away.
    if let Some(mode) = change.mode {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        fchmodat(directory, name, mode, FchmodatFlags::NoFollowSymlink)
            .map_err(|errno| Error::system("chmod", errno))?;
        point("file.metadata.moded");
    }
    if let Some((atime, mtime)) = times(change) {
        utimensat(
            directory,
            name,
            &atime,
            &mtime,
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(|errno| Error::system("set the time", errno))?;
        point("file.metadata.dated");
    }
    Ok(())
}

/// Changes mode, owner and times of an open file or directory.
///
/// # Errors
/// As [`apply`].
pub(crate) fn apply_to_open(file: impl AsFd, change: &MetadataChange) -> Result<()> {
    if change.uid.is_some() || change.gid.is_some() {
        let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
        fchown(&file, uid, gid).map_err(|errno| Error::system("chown", errno))?;
        point("file.metadata.owned");
    }
    if let Some(mode) = change.mode {
        fchmod(&file, Mode::from_bits_truncate(mode & 0o7777))
            .map_err(|errno| Error::system("chmod", errno))?;
        point("file.metadata.moded");
    }
    if let Some((atime, mtime)) = times(change) {
        futimens(&file, &atime, &mtime).map_err(|errno| Error::system("set the time", errno))?;
        point("file.metadata.dated");
    }
    Ok(())
}

/// Last access and last modification, if any of them is to be set.
fn times(change: &MetadataChange) -> Option<(TimeSpec, TimeSpec)> {
    let one = |time: Option<Time>| match time {
        None => TimeSpec::UTIME_OMIT,
        Some(Time::Now) => TimeSpec::UTIME_NOW,
        Some(Time::At(time)) => timespec(time),
    };
    (change.atime.is_some() || change.mtime.is_some())
        .then(|| (one(change.atime), one(change.mtime)))
}

fn timespec(time: SystemTime) -> TimeSpec {
    let seconds = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => TimeSpec::new(seconds(after.as_secs()), i64::from(after.subsec_nanos())),
        Err(error) => {
            let before = error.duration();
            match before.subsec_nanos() {
                0 => TimeSpec::new(-seconds(before.as_secs()), 0),
                nanos => TimeSpec::new(
                    -seconds(before.as_secs()).saturating_add(1),
                    1_000_000_000 - i64::from(nanos),
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_before_the_epoch_have_nanoseconds_that_count_forwards() {
        let half = UNIX_EPOCH - Duration::from_millis(1500);
        assert_eq!(timespec(half), TimeSpec::new(-2, 500_000_000));
        assert_eq!(timespec(UNIX_EPOCH), TimeSpec::new(0, 0));
        let whole = UNIX_EPOCH - Duration::from_secs(3);
        assert_eq!(timespec(whole), TimeSpec::new(-3, 0));
    }
}
