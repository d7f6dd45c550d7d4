//! The directory of a token as one thing: the marks that say what is becoming of it, what is in it, and how it goes.
//!
//! A mark is locked by whoever made it for as long as it is there (`leftover`). Before it is there, and while it goes, the directory
//! has another name, which says that it is ours ([`staging`]): so no crash leaves one that nobody clears away.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno as Refusal;

use super::DATABASE;
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::{TOKEN_OBJECT, is_known, object_name};
use crate::store::leftover::{BUILDING, NEW_DIRECTORY, REMOVING};
use crate::store::metadata::is_file;
use crate::store::sync::sync_directory;
use crate::store::{Backend, Patience, TokenName, lock};

/// What `token.object` and `sqlite3.db` are called while there is no token.
pub(crate) const HIDDEN_OBJECT: &str = "token.tokenfs-new";
pub(crate) const HIDDEN_DATABASE: &str = "sqlite3.db.tokenfs-new";
const HIDDEN: [&str; 2] = [HIDDEN_OBJECT, HIDDEN_DATABASE];

/// The longest name of a file, in bytes (`NAME_MAX`).
const LONGEST: usize = 255;

/// The name of a token's directory while it has no mark. Of a name that leaves no room for that, the end is missing.
pub(super) fn staging(name: &TokenName) -> Result<TokenName> {
    let mut bytes = NEW_DIRECTORY.as_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.truncate(LONGEST);
    TokenName::new(OsStr::from_bytes(&bytes))
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "no directory can have that name"))
}

/// Of which token a directory is that has such a name, if it says so.
pub(super) fn staged(name: &TokenName) -> Option<TokenName> {
    let of = name.as_bytes().strip_prefix(NEW_DIRECTORY.as_bytes())?;
    TokenName::new(OsStr::from_bytes(of)).filter(|_| name.as_bytes().len() < LONGEST)
}

/// Whether a name is that of a directory without a mark.
pub(crate) fn is_staging(name: &OsStr) -> bool {
    name.as_bytes().starts_with(NEW_DIRECTORY.as_bytes())
}

/// Gives a directory of the tokendir another name, which nothing has. Where the file system cannot look and rename in one step,
/// an empty directory of that name is replaced.
///
/// # Errors
/// [`ErrorKind::Exists`]; what renaming fails with.
pub(super) fn rename_directory(
    tokendir: BorrowedFd<'_>,
    from: &TokenName,
    to: &TokenName,
) -> Result<()> {
    let (from, to) = (Path::new(from.as_os_str()), Path::new(to.as_os_str()));
    match renameat_with(tokendir, from, tokendir, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Refusal::INVAL | Refusal::NOSYS | Refusal::OPNOTSUPP) => {
            match renameat(tokendir, from, tokendir, to) {
                Ok(()) => Ok(()),
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {
                    Err(Error::system("rename", Errno::EEXIST))
                }
                Err(errno) => Err(Error::system("rename", errno)),
            }
        }
        Err(errno) => Err(Error::system(
            "rename",
            Errno::from_raw(errno.raw_os_error()),
        )),
    }
}

/// Opens a directory of the tokendir. A symbolic link is not followed.
///
/// # Errors
/// What opening it fails with.
pub(super) fn open_directory(tokendir: BorrowedFd<'_>, name: &TokenName) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(tokendir, name.as_os_str(), flags, Mode::empty())
        .map_err(|errno| Error::system("open", errno))
}

/// Makes a mark and locks it; nothing if there is one. Whoever gets it before it is locked keeps it.
///
/// # Errors
/// What making it fails with.
pub(super) fn make(directory: BorrowedFd<'_>, mark: &str) -> Result<Option<File>> {
    let flags =
        OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = match openat(directory, mark, flags, Mode::from_bits_truncate(0o600)) {
        Ok(fd) => File::from(fd),
        Err(Errno::EEXIST) => return Ok(None),
        Err(errno) => return Err(Error::system("make a mark", errno)),
    };
    locked(directory, mark, file)
}

/// A mark that is there and that nobody holds, locked.
///
/// # Errors
/// [`ErrorKind::Busy`] if somebody holds it; what opening it fails with.
pub(super) fn find(directory: BorrowedFd<'_>, mark: &str) -> Result<Option<File>> {
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(directory, mark, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(Error::system("open a mark", errno)),
    };
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    if !is_file(&stat) {
        return Err(Error::new(
            ErrorKind::NotEmpty,
            "what has the name of a mark of tokenfs is no file",
        ));
    }
    match locked(directory, mark, file)? {
        Some(file) => Ok(Some(file)),
        None => Err(in_use()),
    }
}

/// Locks a mark; nothing if somebody else has it.
fn locked(directory: BorrowedFd<'_>, mark: &str, file: File) -> Result<Option<File>> {
    match lock::lock_exclusive(&file, Patience::Now) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    }
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    // Whoever had it before may have finished and removed it.
    match fstatat(directory, mark, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(named) if (named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino) => Ok(Some(file)),
        _ => Ok(None),
    }
}

/// What is said where another process is making or removing a token.
pub(super) fn in_use() -> Error {
    Error::new(
        ErrorKind::Busy,
        "another tokenfs is making or removing this token",
    )
}

/// What has the name of a file in a directory, and whether there is a token.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Every name but those of the marks.
    pub names: Vec<OsString>,
}

impl Content {
    /// Of a directory.
    ///
    /// # Errors
    /// What reading it fails with.
    pub fn of(directory: BorrowedFd<'_>) -> Result<Self> {
        let failed = |errno| Error::system("read the directory", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries = Dir::openat(directory, ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            let skipped: [&[u8]; 4] = [b".", b"..", BUILDING.as_bytes(), REMOVING.as_bytes()];
            if !skipped.contains(&name) {
                names.push(OsStr::from_bytes(name).to_os_string());
            }
        }
        names.sort_unstable();
        Ok(Self { names })
    }

    /// Whether SoftHSM sees a token in it.
    pub fn has_token(&self) -> bool {
        self.names
            .iter()
            .any(|name| name == TOKEN_OBJECT || name == DATABASE)
    }

    /// Whether there are objects of the `file` backend in it, and nothing that is going to be the token's own or was that: it is there before
    /// the first object is, and goes after the last one.
    pub fn has_objects_alone(&self) -> bool {
        self.has_object()
            && !HIDDEN
                .iter()
                .any(|hidden| self.names.iter().any(|name| name == hidden))
    }

    /// Whether there is an object of the `file` backend in it.
    pub fn has_object(&self) -> bool {
        self.names.iter().any(|name| object_name(name).is_some())
    }

    /// The first name that a token without objects of that backend does not have.
    pub fn foreign(&self, backend: Backend) -> Option<&OsStr> {
        self.names
            .iter()
            .map(OsString::as_os_str)
            .find(|name| match backend {
                Backend::File => !is_known(name),
                Backend::Db => {
                    let other = *name == TOKEN_OBJECT;
                    other || !(is_known(name) || is_of_database(name))
                }
            })
    }

    /// The first name that nothing that tokenfs or SoftHSM makes of a token has.
    fn unknown(&self) -> Option<&OsStr> {
        self.names
            .iter()
            .map(OsString::as_os_str)
            .find(|name| !(is_known(name) || is_of_database(name) || object_name(name).is_some()))
    }
}

/// The database, and what SQLite has beside it.
fn is_of_database(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    bytes.strip_prefix(DATABASE.as_bytes()).is_some_and(|rest| {
        let rest = rest
            .strip_prefix(crate::store::leftover::NEW_SUFFIX.as_bytes())
            .unwrap_or(rest);
        [&b""[..], b"-journal", b"-wal", b"-shm"].contains(&rest)
    })
}

/// Removes everything in a directory that is no token, and then the directory. What neither SoftHSM nor tokenfs makes stays, and
/// the directory with it; so do objects, unless they go `with_objects`. What a token would be restored from goes last.
///
/// # Errors
/// [`ErrorKind::NotEmpty`] if there is such a thing; what removing fails with.
pub(super) fn clear(
    tokendir: BorrowedFd<'_>,
    name: &TokenName,
    directory: BorrowedFd<'_>,
    with_objects: bool,
    mut step: impl FnMut(),
) -> Result<()> {
    let check = || -> Result<Content> {
        let content = Content::of(directory)?;
        if let Some(foreign) = content.unknown() {
            return Err(Error::new(
                ErrorKind::NotEmpty,
                format!(
                    "there is \"{}\" in it, which is none of SoftHSM's files",
                    foreign.to_string_lossy().escape_debug()
                ),
            ));
        }
        if !with_objects && content.has_object() {
            return Err(not_empty());
        }
        Ok(content)
    };
    let staging = staging(name)?;
    let mut named = name;
    // What came meanwhile has to be found where it was made.
    let named_back = |named: &TokenName, step: &mut dyn FnMut()| -> Result<()> {
        if named != name {
            rename_directory(tokendir, named, name)?;
            sync_directory(tokendir)?;
            step();
        }
        Ok(())
    };
    // A SoftHSM that starts makes a `generation` in every directory of the tokendir.
    for _ in 0..10 {
        let content = match check() {
            Ok(content) => content,
            Err(error) => {
                named_back(named, &mut step)?;
                return Err(error);
            }
        };
        for file in &content.names {
            if !HIDDEN.iter().any(|hidden| file == hidden) {
                remove_file(directory, file)?;
                step();
            }
        }
        if named != &staging && staged(&staging).is_some() {
            match rename_directory(tokendir, name, &staging) {
                Ok(()) => {
                    named = &staging;
                    // After a power failure, too, it has the mark for as long as it has its name.
                    sync_directory(tokendir)?;
                }
                // Another has been left, or is being made: a crash now would leave an empty directory.
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            step();
        }
        if let Err(error) = check() {
            named_back(named, &mut step)?;
            return Err(error);
        }
        // The marks stay until there is nothing left that they speak of.
        for file in HIDDEN.into_iter().chain([BUILDING, REMOVING]) {
            remove_file(directory, OsStr::new(file))?;
            step();
        }
        match unlinkat(tokendir, named.as_os_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
            Err(errno) => return Err(Error::system("remove the directory", errno)),
        }
    }
    Err(Error::new(
        ErrorKind::NotEmpty,
        "somebody goes on making files in it",
    ))
}

/// What is said of a token with objects that is to go.
pub(super) fn not_empty() -> Error {
    Error::new(ErrorKind::NotEmpty, "there are objects in this token")
}

/// Removes a file if it is there.
///
/// # Errors
/// What `unlink` fails with.
pub(super) fn remove_file(directory: impl AsFd, name: &OsStr) -> Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(Error::system("unlink", errno)),
    }
}
