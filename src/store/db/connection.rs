//! The connection to a token's `sqlite3.db`, and what `stat` says of that file.
//!
//! Nobody but SQLite opens or closes the database: POSIX locks belong to the process, and closing any descriptor of the
//! file would drop those that SQLite holds (<https://www.sqlite.org/howtocorrupt.html>, section 2.2). Everything else is
//! found out with `lstat`.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{FileStat, SFlag, lstat};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::companions;
use super::failure::{Failure, classify};
use crate::error::{Error, ErrorKind, Result};
use crate::store::metadata::tick;

/// The longest path that SQLite opens a database under: `MAX_PATHNAME` of its `os_unix.c` (512), less what `openDatabase`
/// reserves for the name of the journal.
const LONGEST_PATH: usize = 504;

/// Which file a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

/// What changes when a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub identity: Identity,
    pub size: i64,
    pub mtime: (i64, i64),
    pub ctime: (i64, i64),
}

impl Stamp {
    pub fn of(stat: &FileStat) -> Self {
        Self {
            identity: Identity {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            size: stat.st_size,
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether the content could have been written since `earlier`; a change of mode or owner moves `ctime` alone.
    pub fn written_since(&self, earlier: &Self) -> bool {
        (self.identity, self.size, self.mtime) != (earlier.identity, earlier.size, earlier.mtime)
    }

    /// Whether a later change would be certain to give another stamp: the last one is longer ago than a tick of the clock.
    pub fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.ctime;
        let tick = tick(u32::try_from(nanoseconds).unwrap_or(0));
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i128::try_from(since_epoch.as_nanos()).unwrap_or(i128::MAX);
        let changed = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        // A time in the future is never settled.
        now - changed > i128::try_from(tick.as_nanos()).unwrap_or(i128::MAX)
    }
}

/// What `lstat` says of the database.
///
/// # Errors
/// Of kind `NotFound` or `PermissionDenied`, or `Damaged` if it is no regular file. (Opening a FIFO would block.)
pub(super) fn stat(path: &Path) -> Result<FileStat> {
    let stat = lstat(path).map_err(|errno| Error::system("stat", errno).at(path))?;
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => Ok(stat),
        SFlag::S_IFLNK => {
            Err(Error::damaged("this is a symbolic link, which is not followed").at(path))
        }
        _ => Err(Error::damaged("this is not a regular file").at(path)),
    }
}

/// An open database.
#[derive(Debug)]
pub(super) struct Database {
    pub connection: Connection,
    /// The file that was at the path when it was opened.
    pub identity: Identity,
    /// Different for every connection of a token.
    pub serial: u64,
    /// How much is synced is settled.
    prepared: bool,
}

impl Database {
    /// Opens the database at `path`, which `stat` was just taken of.
    pub fn open(
        path: &Path,
        stat: &FileStat,
        read_only: bool,
        serial: u64,
    ) -> Result<Self, Failure> {
        if path.as_os_str().len() > LONGEST_PATH {
            let detail = format!("SQLite opens no path of more than {LONGEST_PATH} bytes");
            return Err(Failure::Other(
                Error::new(ErrorKind::NameTooLong, detail).at(path),
            ));
        }
        companions::check(path, stat)?;
        // Not CREATE: an empty database must not come into being. With READ_WRITE, SQLite opens read-only by itself
        // where permissions forbid more. NOFOLLOW refuses a symbolic link anywhere in the path.
        let access = if read_only {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        } else {
            OpenFlags::SQLITE_OPEN_READ_WRITE
        };
        let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let fail = |error| classify(&error, path);
        let connection = Connection::open_with_flags(path, flags).map_err(fail)?;
        // rusqlite sets five seconds; here the caller's patience decides.
        connection.busy_timeout(Duration::ZERO).map_err(fail)?;
        // The schema is whatever the file says it is.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)
            .map_err(fail)?;
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)
            .map_err(fail)?;
        // Deleting an object is deleting its row; those of its attributes go with it.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, true)
            .map_err(fail)?;
        // SoftHSM has no triggers, and nothing else than what is asked for may change with a commit.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)
            .map_err(fail)?;
        Ok(Self {
            connection,
            identity: Stamp::of(stat).identity,
            serial,
            prepared: false,
        })
    }

    /// What has to be said before the first write, outside of a transaction.
    ///
    /// With `full`, which is what SQLite does if it is told nothing, a commit is whole after a power failure and can be undone
    /// by it: the directory is not synced after the journal is deleted, and a journal that is back rolls back
    /// (<https://www.sqlite.org/pragma.html#pragma_synchronous>). [`DbToken`](super::DbToken) does that after the commit. `extra` would too, and then say
    /// of a commit that it has failed which nothing undoes any more. A token that is being `built` is synced when it is published.
    pub fn prepare(&mut self, built: bool) -> rusqlite::Result<()> {
        if !self.prepared {
            if built {
                self.connection.pragma_update(None, "synchronous", "off")?;
                // Not stored in the file.
                self.connection
                    .pragma_update_and_check(None, "journal_mode", "memory", |_| Ok(()))?;
            } else {
                self.connection.pragma_update(None, "synchronous", "full")?;
            }
            self.prepared = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_settles_when_the_clock_has_moved_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"").unwrap();
        let mut stamp = Stamp::of(&stat(&path).unwrap());
        stamp.ctime = (1000, 999_000_000);
        let at = |milliseconds| UNIX_EPOCH + Duration::from_millis(milliseconds);
        for (now, settled) in [
            (0, false),
            (1_000_998, false),
            (1_000_999, false),
            (1_001_049, false),
            (1_001_050, true),
            (9_000_000, true),
        ] {
            assert_eq!(stamp.is_settled(at(now)), settled, "{now}");
        }
        // The file system knows whole seconds only, or two of them.
        stamp.ctime = (1000, 0);
        for (now, settled) in [(1_001_500, false), (1_002_100, false), (1_002_101, true)] {
            assert_eq!(stamp.is_settled(at(now)), settled, "{now}");
        }
    }

    #[test]
    fn only_what_a_write_changes_counts_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"").unwrap();
        let old = Stamp::of(&stat(&path).unwrap());
        let mut new = old;
        new.ctime.1 += 1;
        assert!(!new.written_since(&old));
        new.mtime.1 += 1;
        assert!(new.written_since(&old));
        new = old;
        new.size += 1;
        assert!(new.written_since(&old));
        new = old;
        new.identity.inode += 1;
        assert!(new.written_since(&old));
    }
}
