//! What `stat` says, and the stamp by which a change of a backing file is noticed.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{FileStat, SFlag};

use super::acl;

/// Two changes that fall into one tick of the file system's clock leave the same times behind. A tick is 10 ms at most on
/// kernels before multigrain timestamps (Linux 6.13), with room for a clock that is stepped a little.
const CLOCK_TICK: Duration = Duration::from_millis(50);

/// The same where times have no fraction of a second.
const COARSE_TICK: Duration = Duration::from_millis(2100);

/// How long a tick of the clock can be from which a file has its time, by the fraction of a second that this has: ext4 with small inodes has whole seconds,
/// and vfat has two.
pub(crate) fn tick(nanoseconds: u32) -> Duration {
    if nanoseconds == 0 {
        COARSE_TICK
    } else {
        CLOCK_TICK
    }
}

/// What `stat` says of a backing file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits, set-id and sticky bits (`07777`), without a mask applied. Where the file has an access control list, no
    /// more than that gives to everybody in it.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub atime: SystemTime,
    /// Last modification.
    pub mtime: SystemTime,
    /// Last change of status.
    pub ctime: SystemTime,
}

impl Metadata {
    /// Whether the same users may do the same.
    #[must_use]
    pub fn same_access(&self, other: &Self) -> bool {
        (self.mode, self.uid, self.gid) == (other.mode, other.uid, other.gid)
    }
}

impl Metadata {
    /// Of an open file or directory.
    pub(crate) fn of_open(file: impl AsFd, stat: &FileStat) -> Self {
        Self::new(stat, |buffer| {
            rustix::fs::fgetxattr(file, acl::NAME, buffer)
        })
    }

    /// Of what `path` names. A symbolic link is not followed, and nothing is opened.
    pub(crate) fn of_path(path: &Path, stat: &FileStat) -> Self {
        Self::new(stat, |buffer| {
            rustix::fs::lgetxattr(path, acl::NAME, buffer)
        })
    }

    fn new(
        stat: &FileStat,
        list: impl FnOnce(&mut [u8]) -> Result<usize, rustix::io::Errno>,
    ) -> Self {
        Self {
            mode: acl::narrow(stat.st_mode & 0o7777, list),
            uid: stat.st_uid,
            gid: stat.st_gid,
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// Mode and owner of something that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits as they are to be, whatever the umask of this process.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A time that is to be set (`utimensat(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// When it is set.
    Now,
    /// This one.
    At(SystemTime),
}

/// What is to be changed; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetadataChange {
    /// Permission bits, set-id and sticky bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last access.
    pub atime: Option<Time>,
    /// Last modification.
    pub mtime: Option<Time>,
}

/// Identity and times of a file's content: as long as they are equal, nobody has changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    mtime: SystemTime,
    ctime: SystemTime,
}

impl From<&FileStat> for Stamp {
    fn from(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

impl Stamp {
    /// Whether both are of the same file, whatever it holds by now.
    #[must_use]
    pub fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether the content may have changed since it was read at `read_at` although the stamp is the same, because
    /// the change that made this stamp is too recent.
    #[must_use]
    pub fn is_racy(&self, read_at: SystemTime) -> bool {
        match read_at.duration_since(self.ctime) {
            Ok(age) => {
                let since = self.ctime.duration_since(UNIX_EPOCH);
                age < tick(since.map_or(0, |since| since.subsec_nanos()))
            }
            // A time in the future says nothing.
            Err(_) => true,
        }
    }

    /// How long ago the file was last changed; `None` if that is in the future.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        SystemTime::now().duration_since(self.ctime).ok()
    }
}

/// Whether `stat` is of a regular file.
pub(crate) fn is_file(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFREG)
}

/// Whether `stat` is of a directory.
pub(crate) fn is_directory(stat: &FileStat) -> bool {
    has_type(stat, SFlag::S_IFDIR)
}

fn has_type(stat: &FileStat, wanted: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == wanted
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|base| base.checked_add(nanoseconds))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_and_absurd_ones_are_no_panic() {
        assert_eq!(
            time(-1, 500_000_000),
            UNIX_EPOCH - Duration::from_millis(500)
        );
        assert_eq!(time(1, 1), UNIX_EPOCH + Duration::new(1, 1));
        let _ = time(i64::MIN, -1);
        let _ = time(i64::MAX, i64::MAX);
    }

    #[test]
    fn a_change_in_the_tick_of_a_read_can_leave_the_same_stamp() {
        let stamp = |nanoseconds| Stamp {
            device: 1,
            inode: 1,
            size: 1,
            mtime: time(1000, nanoseconds),
            ctime: time(1000, nanoseconds),
        };
        let at = |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds);
        assert!(stamp(1).is_racy(at(1_000_049)) && !stamp(1).is_racy(at(1_000_051)));
        // Whole seconds, or two of them.
        assert!(stamp(0).is_racy(at(1_001_900)) && !stamp(0).is_racy(at(1_002_200)));
    }
}
