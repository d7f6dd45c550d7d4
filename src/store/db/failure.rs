//! What SQLite's errors mean here.
//!
//! The codes are those of <https://www.sqlite.org/rescode.html>. SQLite's own sentences are not repeated where they quote
//! the database; its name for the code is enough to look it up.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, lstat};
use nix::unistd::{AccessFlags, eaccess};
use rusqlite::ErrorCode;
use rusqlite::ffi;

use super::companions::journal_of;
use crate::error::{Error, ErrorKind};

/// Why a read did not come about.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Failure {
    /// Somebody else has the lock; it is worth trying again.
    Taken,
    /// The file does not hold what it should, and will not until it changes.
    Content(Error),
    /// Anything else; it can be gone without a change of the file.
    Other(Error),
}

impl Failure {
    /// A damage of the content of `path`.
    pub fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        Self::Content(Error::damaged(detail).at(path))
    }
}

/// What an error of SQLite means that happened on the database `path`.
pub(super) fn classify(error: &rusqlite::Error, path: &Path) -> Failure {
    let failure = match error {
        rusqlite::Error::SqliteFailure(failure, _) => failure,
        // A statement that does not fit the schema.
        rusqlite::Error::SqlInputError { error, .. } => error,
        // The other variants are for values that are not of the type that was asked for, and the like.
        _ => return Failure::damaged(path, "the database cannot be read as a token"),
    };
    let extended = failure.extended_code;
    let name = ffi::code_to_str(extended);
    let other = |kind| Failure::Other(Error::new(kind, format!("SQLite: {name}")).at(path));
    match failure.code {
        ErrorCode::DatabaseBusy
        | ErrorCode::DatabaseLocked
        | ErrorCode::FileLockingProtocolFailed => Failure::Taken,
        ErrorCode::NotADatabase => Failure::damaged(path, "this is not an SQLite database"),
        ErrorCode::DatabaseCorrupt => {
            Failure::damaged(path, format!("the database is damaged (SQLite: {name})"))
        }
        // SQLITE_ERROR: what is asked for does not exist; the statements themselves are constant.
        ErrorCode::Unknown if extended & 0xff == ffi::SQLITE_ERROR => Failure::damaged(
            path,
            "the database does not have the tables and columns of a token",
        ),
        ErrorCode::TooBig => Failure::damaged(path, "a value is larger than SQLite allows"),
        ErrorCode::ReadOnly => match extended {
            ffi::SQLITE_READONLY_ROLLBACK
            | ffi::SQLITE_READONLY_RECOVERY
            | ffi::SQLITE_READONLY_CANTINIT => Failure::Other(left_journal(path)),
            _ => other(ErrorKind::ReadOnly),
        },
        ErrorCode::CannotOpen => Failure::Other(cannot_open(extended, path)),
        ErrorCode::PermissionDenied => other(ErrorKind::PermissionDenied),
        ErrorCode::DiskFull => other(ErrorKind::NoSpace),
        ErrorCode::OutOfMemory => other(ErrorKind::System(libc::ENOMEM)),
        ErrorCode::SystemIoFailure if extended == ffi::SQLITE_IOERR_NOMEM => {
            other(ErrorKind::System(libc::ENOMEM))
        }
        _ => other(ErrorKind::System(libc::EIO)),
    }
}

/// What an error of SQLite means that happened while the database `path` was to be written.
pub(super) fn classify_write(error: &rusqlite::Error, path: &Path) -> Failure {
    match error {
        // Of reading, it would be a damage.
        rusqlite::Error::SqliteFailure(failure, _) if failure.code == ErrorCode::TooBig => {
            let detail = "the value is larger than SQLite allows";
            Failure::Other(Error::new(ErrorKind::TooLarge, detail).at(path))
        }
        // It was renamed or deleted since it was opened: what is at the path now is the one to write.
        rusqlite::Error::SqliteFailure(failure, _)
            if failure.extended_code == ffi::SQLITE_READONLY_DBMOVED =>
        {
            Failure::Taken
        }
        // The database, its journal, or the directory that the journal is to be made in.
        rusqlite::Error::SqliteFailure(failure, _)
            if matches!(failure.code, ErrorCode::ReadOnly | ErrorCode::CannotOpen) =>
        {
            let why = cannot_write(path).or_else(|| no_room(path));
            why.map_or_else(|| classify(error, path), Failure::Other)
        }
        rusqlite::Error::SqliteFailure(failure, _)
            if failure.code == ErrorCode::SystemIoFailure =>
        {
            no_room(path).map_or_else(|| classify(error, path), Failure::Other)
        }
        _ => classify(error, path),
    }
}

/// Why the database, or a journal beside it, cannot be written, as far as the operating system says so.
pub(super) fn cannot_write(path: &Path) -> Option<Error> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    for (needed, access) in [
        (path, AccessFlags::W_OK),
        (directory, AccessFlags::W_OK | AccessFlags::X_OK),
    ] {
        if let Err(errno) = eaccess(needed, access) {
            return Some(Error::system("open for writing", errno).at(needed));
        }
    }
    None
}

/// Whether there is no room for another file beside the database, or for anything in one: SQLite keeps the errno to itself, and takes a quota
/// (`EDQUOT`), and a file system that has no more files to give, for an error of the disk or of opening.
fn no_room(path: &Path) -> Option<Error> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let is_it = |errno: Errno| {
        let limits = [Errno::ENOSPC, Errno::EDQUOT, Errno::EMFILE, Errno::ENFILE];
        limits.contains(&errno).then_some(errno)
    };
    let said = |errno| Error::system("write beside the database", errno).at(path);
    let flags = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    let probe = match open(directory, flags, Mode::from_bits_truncate(0o600)) {
        Ok(probe) => File::from(probe),
        Err(errno) => return is_it(errno).map(said),
    };
    let written = probe
        .write_all_at(&[0; 4096], 0)
        .and_then(|()| probe.sync_all());
    let errno = Errno::from_raw(written.err()?.raw_os_error()?);
    is_it(errno).map(said)
}

fn left_journal(path: &Path) -> Error {
    Error::damaged(
        "a writer crashed and left a journal beside the database, and rolling it back needs write access: mount the store \
         once where writing is allowed, or let SoftHSM open the token",
    )
    .at(path)
}

/// `SQLITE_CANTOPEN` says neither whether it was the database or its journal, nor why.
fn cannot_open(extended: i32, path: &Path) -> Error {
    if extended == ffi::SQLITE_CANTOPEN_SYMLINK {
        let detail = "there is a symbolic link in the path, and none is followed";
        return Error::damaged(detail).at(path);
    }
    if let Err(errno) = lstat(path) {
        return Error::system("stat", errno).at(path);
    }
    match eaccess(path, AccessFlags::R_OK) {
        Err(errno) => Error::system("open", errno).at(path),
        // The database can be read, so it was the journal that could not be opened for rolling it back.
        Ok(()) if lstat(&journal_of(path)).is_ok() => left_journal(path),
        // Too many open files, for one.
        Ok(()) => Error::new(
            ErrorKind::from_errno(Errno::EIO as i32),
            format!("SQLite: {}", ffi::code_to_str(extended)),
        )
        .at(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(code: i32) -> Failure {
        let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
        classify(&error, Path::new("/nowhere/sqlite3.db"))
    }

    #[test]
    fn some_codes_mean_something_else_when_writing() {
        let classified = |code| {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            classify_write(&error, Path::new("/nowhere/sqlite3.db"))
        };
        let moved = classified(ffi::SQLITE_READONLY_DBMOVED);
        assert_eq!(moved, Failure::Taken);
        for (code, kind) in [
            (ffi::SQLITE_TOOBIG, ErrorKind::TooLarge),
            (ffi::SQLITE_READONLY, ErrorKind::NotFound),
            (ffi::SQLITE_READONLY_DIRECTORY, ErrorKind::NotFound),
            (ffi::SQLITE_CANTOPEN, ErrorKind::NotFound),
            (ffi::SQLITE_FULL, ErrorKind::NoSpace),
            (ffi::SQLITE_IOERR_FSYNC, ErrorKind::System(libc::EIO)),
        ] {
            match classified(code) {
                Failure::Other(error) => assert_eq!(error.kind(), kind, "{code}"),
                other => panic!("{code}: {other:?}"),
            }
        }
    }

    #[test]
    fn each_code_has_its_kind() {
        for code in [
            ffi::SQLITE_BUSY,
            ffi::SQLITE_BUSY_RECOVERY,
            ffi::SQLITE_LOCKED,
            ffi::SQLITE_PROTOCOL,
        ] {
            assert_eq!(classified(code), Failure::Taken);
        }
        for code in [
            ffi::SQLITE_NOTADB,
            ffi::SQLITE_CORRUPT,
            ffi::SQLITE_CORRUPT_VTAB,
            ffi::SQLITE_ERROR,
            ffi::SQLITE_TOOBIG,
        ] {
            match classified(code) {
                Failure::Content(error) => assert_eq!(error.kind(), ErrorKind::Damaged),
                other => panic!("{code}: {other:?}"),
            }
        }
        for (code, kind) in [
            (ffi::SQLITE_READONLY_ROLLBACK, ErrorKind::Damaged),
            (ffi::SQLITE_READONLY_RECOVERY, ErrorKind::Damaged),
            (ffi::SQLITE_READONLY_CANTINIT, ErrorKind::Damaged),
            (ffi::SQLITE_READONLY, ErrorKind::ReadOnly),
            (ffi::SQLITE_CANTOPEN, ErrorKind::NotFound),
            (ffi::SQLITE_CANTOPEN_SYMLINK, ErrorKind::Damaged),
            (ffi::SQLITE_PERM, ErrorKind::PermissionDenied),
            (ffi::SQLITE_FULL, ErrorKind::NoSpace),
            (ffi::SQLITE_NOMEM, ErrorKind::System(libc::ENOMEM)),
            (ffi::SQLITE_IOERR_NOMEM, ErrorKind::System(libc::ENOMEM)),
            (ffi::SQLITE_IOERR_READ, ErrorKind::System(libc::EIO)),
            (ffi::SQLITE_INTERRUPT, ErrorKind::System(libc::EIO)),
        ] {
            match classified(code) {
                Failure::Other(error) => {
                    assert_eq!(error.kind(), kind, "{code}");
                    assert_eq!(error.path(), Some(Path::new("/nowhere/sqlite3.db")));
                }
                other => panic!("{code}: {other:?}"),
            }
        }
    }
}
