//! From `stat` to [`Metadata`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::FileStat;

use super::Metadata;

impl From<&FileStat> for Metadata {
    fn from(stat: &FileStat) -> Self {
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// A `timespec`: the nanoseconds count forward from the second, before 1970 too. What no [`SystemTime`] can hold becomes
/// the epoch.
fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let fraction = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    second
        .and_then(|second| second.checked_add(fraction))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn times_before_1970_count_their_nanoseconds_forward() {
        assert_eq!(time(0, 0), UNIX_EPOCH);
        assert_eq!(
            time(-2, 500_000_000),
            UNIX_EPOCH - Duration::from_millis(1500)
        );
        assert_eq!(time(3, 7), UNIX_EPOCH + Duration::new(3, 7));
        for extreme in [i64::MIN, i64::MAX] {
            // Whatever it becomes, it is no panic.
            let _ = time(extreme, 999_999_999);
        }
    }

    #[test]
    fn the_mode_has_no_file_type() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o2751)).unwrap();
        let stat = nix::sys::stat::lstat(directory.path()).unwrap();
        assert_eq!(Metadata::from(&stat).mode, 0o2751);
    }
}
