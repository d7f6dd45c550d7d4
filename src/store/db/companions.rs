//! What SQLite finds beside a database and takes for its own.
//!
//! As root it gives each journal, write-ahead log and shared memory that it opens to the owner of the database (`robustFchown` in its `os_unix.c`), whatever is called that. Who may
//! rename files in the directory of a token could so be given any file that he may rename. So what belongs to somebody else has to look like what it is called.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstat, lstat};
use nix::unistd::geteuid;

use super::failure::Failure;
use crate::error::{Error, ErrorKind};
use crate::store::metadata::is_file;

/// How each of them begins (<https://www.sqlite.org/fileformat.html>); a journal that is being written, with zeros. Of shared memory only the owner is looked at: closing it
/// would drop SQLite's locks on it. SoftHSM has neither that nor a log.
const BEGINNINGS: [(&str, &[&[u8]]); 3] = [
    (
        "-journal",
        &[&[0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7], &[0; 8]],
    ),
    (
        "-wal",
        &[&[0x37, 0x7f, 0x06, 0x82], &[0x37, 0x7f, 0x06, 0x83]],
    ),
    ("-shm", &[]),
];

/// The journal that belongs to a database.
pub(crate) fn journal_of(path: &Path) -> PathBuf {
    with(path, BEGINNINGS[0].0)
}

/// How often a journal that begins otherwise is looked at again, and how long after: whoever writes it may be about to sync it, or to delete it.
const AGAIN: usize = 5;
const PAUSE: Duration = Duration::from_millis(1);

/// That SQLite can be let at the database `path`, which is `database`.
///
/// # Errors
/// [`ErrorKind::NotPermitted`] if there is something beside it that it must not be given.
pub(super) fn check(path: &Path, database: &FileStat) -> Result<(), Failure> {
    if !geteuid().is_root() {
        return Ok(());
    }
    for (suffix, beginnings) in BEGINNINGS {
        let beside = with(path, suffix);
        let mut is_well = false;
        for _ in 0..AGAIN {
            is_well = is_none_or_known(&beside, database, beginnings);
            if is_well {
                break;
            }
            thread::sleep(PAUSE);
        }
        if !is_well {
            let detail = "it belongs to somebody else than the database, and is nothing of SQLite's, which would give it to the owner of that: move it away";
            let error = Error::new(ErrorKind::NotPermitted, detail);
            return Err(Failure::Other(error.at(beside)));
        }
    }
    Ok(())
}

fn is_none_or_known(path: &Path, database: &FileStat, beginnings: &[&[u8]]) -> bool {
    match lstat(path) {
        Err(Errno::ENOENT) => return true,
        Ok(stat) if stat.st_uid == database.st_uid => return true,
        Ok(stat) if is_file(&stat) && !beginnings.is_empty() => {}
        _ => return false,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(errno) => return errno == Errno::ENOENT,
    };
    let Ok(stat) = fstat(&file) else {
        return false;
    };
    // Deleted meanwhile, or with another name too.
    match stat.st_nlink {
        0 => return true,
        1 if is_file(&stat) => {}
        _ => return false,
    }
    if stat.st_uid == database.st_uid || stat.st_size == 0 {
        return true;
    }
    let mut bytes = [0; 8];
    let read = file.read_at(&mut bytes, 0).unwrap_or_default();
    beginnings
        .iter()
        .any(|beginning| bytes[..read].starts_with(beginning))
}

/// The file of a database that has its name and `suffix`.
fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_somebody_elses_has_to_look_like_what_it_is_called() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sqlite3.db");
        let journal = journal_of(&path);
        std::fs::write(&path, b"").unwrap();
        let mut database = lstat(&path).unwrap();
        assert!(check(&path, &database).is_ok());
        std::fs::write(&journal, b"\0\0\0\0\0\0\0\x05 an object").unwrap();
        assert!(check(&path, &database).is_ok(), "it is the owner's own");
        database.st_uid += 1;
        if !geteuid().is_root() {
            return;
        }
        match check(&path, &database) {
            Err(Failure::Other(error)) => {
                let wanted = (ErrorKind::NotPermitted, Some(&*journal));
                assert_eq!((error.kind(), error.path()), wanted);
            }
            other => panic!("{other:?}"),
        }
        for beginning in [&b""[..], BEGINNINGS[0].1[0], BEGINNINGS[0].1[1]] {
            std::fs::write(&journal, beginning).unwrap();
            assert!(check(&path, &database).is_ok(), "{beginning:?}");
        }
        std::fs::hard_link(&journal, directory.path().join("other")).unwrap();
        assert!(check(&path, &database).is_err());
    }
}
