//! What SQLite finds beside a database and takes for its own.
//!
//! As root it gives each journal, write-ahead log and shared memory that it opens to the owner of the database (`robustFchown` in its `os_unix.c`), whatever is called that. Who may
//! rename files in the directory of a token could so be given any file that he may rename. So what belongs to somebody else has to look like what it is called.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, lstat};
use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, Result};
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

/// That SQLite can be let at the database `path`, which is `database`.
///
/// # Errors
/// [`ErrorKind::NotPermitted`] if there is something beside it that it must not be given.
pub(super) fn check(path: &Path, database: &FileStat) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    for (suffix, beginnings) in BEGINNINGS {
        let beside = with(path, suffix);
        match lstat(&beside) {
            Ok(stat) if stat.st_uid == database.st_uid || is_known(&beside, &stat, beginnings) => {}
            Err(Errno::ENOENT) => {}
            _ => {
                let detail = "it belongs to somebody else than the database, and is nothing of SQLite's, which would give it to the owner of that: move it away";
                return Err(Error::new(ErrorKind::NotPermitted, detail).at(beside));
            }
        }
    }
    Ok(())
}

fn is_known(path: &Path, stat: &FileStat, beginnings: &[&[u8]]) -> bool {
    if !is_file(stat) || stat.st_nlink != 1 {
        return false;
    }
    if stat.st_size == 0 {
        return true;
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    beginnings.iter().any(|beginning| {
        let mut bytes = vec![0; beginning.len()];
        let opened = open(path, flags, Mode::empty()).map(File::from);
        opened.is_ok_and(|file| file.read_exact_at(&mut bytes, 0).is_ok() && bytes == *beginning)
    })
}

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
        let journal = with(&path, "-journal");
        std::fs::write(&path, b"").unwrap();
        let mut database = lstat(&path).unwrap();
        assert!(check(&path, &database).is_ok());
        std::fs::write(&journal, b"\0\0\0\0\0\0\0\x05 an object").unwrap();
        assert!(check(&path, &database).is_ok(), "it is the owner's own");
        database.st_uid += 1;
        if !geteuid().is_root() {
            return;
        }
        let error = check(&path, &database).unwrap_err();
        assert_eq!(
            (error.kind(), error.path()),
            (ErrorKind::NotPermitted, Some(&*journal))
        );
        for beginning in [&b""[..], BEGINNINGS[0].1[0], BEGINNINGS[0].1[1]] {
            std::fs::write(&journal, beginning).unwrap();
            assert!(check(&path, &database).is_ok(), "{beginning:?}");
        }
        std::fs::hard_link(&journal, directory.path().join("other")).unwrap();
        assert!(check(&path, &database).is_err());
    }
}
