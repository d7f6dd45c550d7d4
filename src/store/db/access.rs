//! Mode, owner and times of a token's directory and of its database, and syncing the directory.
//!
//! By path and without following a symbolic link, be it the database or its directory: the database is not opened (`connection`). For a link, glibc finds out with a
//! descriptor that is for nothing but its path, whose closing drops no locks.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags, fchmodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};

use super::connection::stat;
use super::{DbToken, TAKEN};
use crate::error::{Error, Result};
use crate::store::sync::sync_directory;
use crate::store::{MetadataChange, Patience, Target, Time, Token};

impl DbToken {
    pub(super) fn change_metadata(
        &self,
        target: &Target,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        match target {
            Target::Directory => {
                // Not while a write is going to set the time back to what it was.
                let held = self.connection.lock(patience, TAKEN);
                let _held = held.map_err(|error| error.at(&self.path))?;
                self.metadata()?;
                let path = &self.directory;
                change_access(AT_FDCWD, path, path, change)?;
                change_times(&self.directory, change)
            }
            Target::Object(id) => {
                // One that is not there has nothing to change.
                self.row(id, patience)?;
                let present = stat(&self.path)?;
                // Who copies object by object says the same once for each file of each of them, and all share one.
                let change = MetadataChange {
                    mode: change
                        .mode
                        .filter(|mode| *mode & 0o7777 != present.st_mode & 0o7777),
                    uid: change.uid.filter(|uid| *uid != present.st_uid),
                    gid: change.gid.filter(|gid| *gid != present.st_gid),
                    ..*change
                };
                let directory = opened(&self.directory, OFlag::O_PATH)?;
                // While it is being built it has another name.
                let name = self.path.file_name().map_or(Path::new(""), Path::new);
                change_access(&directory, name, &self.path, &change)?;
                match change.mtime {
                    Some(Time::Now) => self.write_update(id, &mut |_| Ok(()), None, patience),
                    Some(Time::At(time)) => {
                        self.write_update(id, &mut |_| Ok(()), Some(time), patience)
                    }
                    None => Ok(()),
                }
            }
        }
    }

    /// Sets the time of the directory's last modification, as far as that is possible: it is not worth failing for.
    pub(super) fn restore_directory_time(&self, mtime: SystemTime) {
        let change = MetadataChange {
            mtime: Some(Time::At(mtime)),
            ..MetadataChange::default()
        };
        if let Err(error) = change_times(&self.directory, &change) {
            log::debug!("{error}");
        }
    }

    /// Waits until the names in the directory survive a power failure.
    pub(super) fn sync_directory(&self) -> Result<()> {
        let path = &self.directory;
        sync_directory(opened(path, OFlag::O_RDONLY)?).map_err(|error| error.at(path))
    }
}

/// Of `name` in the directory `at`, which is at `path`. The owner first: changing it can clear bits of the mode.
fn change_access(at: impl AsFd, name: &Path, path: &Path, change: &MetadataChange) -> Result<()> {
    let fail = |what: &'static str| move |errno: Errno| Error::system(what, errno).at(path);
    if change.uid.is_some() || change.gid.is_some() {
        let (uid, gid) = (change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw));
        fchownat(&at, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(fail("chown"))?;
    }
    if let Some(mode) = change.mode {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        fchmodat(&at, name, mode, FchmodatFlags::NoFollowSymlink).map_err(fail("chmod"))?;
    }
    Ok(())
}

fn change_times(path: &Path, change: &MetadataChange) -> Result<()> {
    if change.atime.is_none() && change.mtime.is_none() {
        return Ok(());
    }
    utimensat(
        AT_FDCWD,
        path,
        &spec(change.atime),
        &spec(change.mtime),
        UtimensatFlags::NoFollowSymlink,
    )
    .map_err(|errno| Error::system("utimensat", errno).at(path))
}

fn spec(time: Option<Time>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(Time::Now) => TimeSpec::UTIME_NOW,
        Some(Time::At(time)) => since_epoch(time),
    }
}

fn since_epoch(time: SystemTime) -> TimeSpec {
    let clamp = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => TimeSpec::new(clamp(after.as_secs()), i64::from(after.subsec_nanos())),
        Err(error) => {
            let before = error.duration();
            let seconds = -clamp(before.as_secs());
            match i64::from(before.subsec_nanos()) {
                0 => TimeSpec::new(seconds, 0),
                part => TimeSpec::new(seconds.saturating_sub(1), 1_000_000_000 - part),
            }
        }
    }
}

/// A directory, and not what a link leads to that somebody has put in its place.
fn opened(directory: &Path, access: OFlag) -> Result<OwnedFd> {
    let flags = access | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(directory, flags, Mode::empty())
        .map_err(|errno| Error::system("open", errno).at(directory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_before_the_epoch_are_counted_from_below() {
        let time = UNIX_EPOCH - Duration::new(1, 1);
        assert_eq!(since_epoch(time), TimeSpec::new(-2, 999_999_999));
        assert_eq!(
            since_epoch(UNIX_EPOCH - Duration::from_secs(1)),
            TimeSpec::new(-1, 0)
        );
        assert_eq!(
            since_epoch(UNIX_EPOCH + Duration::new(1, 1)),
            TimeSpec::new(1, 1)
        );
    }
}
