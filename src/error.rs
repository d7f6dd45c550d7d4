//! The one error type of the crate, and the one table that turns it into an errno.
//!
//! Every layer below the command line fails with [`Error`]: a kind, a sentence, and where it is known the
//! path of the backing file and the byte offset in it. The sentence never contains the value of an
//! attribute, since it ends up in logs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller has to tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// There is no such token, object, attribute or file.
    NotFound,
    /// What an inode stood for is gone. The kernel takes that for a reason to look its name up anew, and tells the program what comes
    /// of that (`ESTALE`).
    Stale,
    /// A directory was needed.
    NotADirectory,
    /// A file was needed.
    IsADirectory,
    /// The operating system does not let us at the backing file.
    PermissionDenied,
    /// The operation is for the owner, or for root (`EPERM`).
    NotPermitted,
    /// The mount, or the file system below it, takes no writes.
    ReadOnly,
    /// There is something of that name already.
    Exists,
    /// A directory that is to go, or to be replaced, has something in it.
    NotEmpty,
    /// What is to be renamed would have to be copied.
    CrossDevice,
    /// A value is larger than any that is stored.
    TooLarge,
    /// What is stored is not what the format allows.
    Damaged,
    /// A lock stayed taken, or a writer unfinished, for as long as we were prepared to wait.
    Busy,
    /// It cannot be answered without waiting, and the caller did not want to wait ([`crate::store::Patience::Now`]).
    /// Shown to a user only where so many wait already that nobody else may.
    WouldBlock,
    /// The request makes no sense: a name or a value that cannot be.
    Invalid,
    /// A name is longer than a directory entry can be.
    NameTooLong,
    /// The file system below is full.
    NoSpace,
    /// The operation does not exist here.
    Unsupported,
    /// Any other failure of a system call, with its errno.
    System(i32),
}

impl ErrorKind {
    /// The errno that a program gets to see. This is the only place where one is chosen.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Stale => libc::ESTALE,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::PermissionDenied => libc::EACCES,
            Self::NotPermitted => libc::EPERM,
            Self::Exists => libc::EEXIST,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::CrossDevice => libc::EXDEV,
            Self::TooLarge => libc::EFBIG,
            Self::ReadOnly => libc::EROFS,
            // What a local file system says of a block that it cannot make sense of.
            Self::Damaged => libc::EIO,
            // Not EAGAIN, which programs take for "call again at once".
            // Who would have to wait is told so only where too many wait already.
            Self::Busy | Self::WouldBlock => libc::EBUSY,
            Self::Invalid => libc::EINVAL,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::NoSpace => libc::ENOSPC,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::System(errno) => errno,
        }
    }

    /// The kind of a failed system call.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOENT => Self::NotFound,
            libc::ESTALE => Self::Stale,
            libc::ENOTDIR => Self::NotADirectory,
            libc::EISDIR => Self::IsADirectory,
            libc::EACCES => Self::PermissionDenied,
            libc::EPERM => Self::NotPermitted,
            libc::EEXIST => Self::Exists,
            libc::ENOTEMPTY => Self::NotEmpty,
            libc::EXDEV => Self::CrossDevice,
            libc::EFBIG => Self::TooLarge,
            libc::EROFS => Self::ReadOnly,
            libc::EBUSY => Self::Busy,
            libc::EINVAL => Self::Invalid,
            libc::ENAMETOOLONG => Self::NameTooLong,
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::EOPNOTSUPP => Self::Unsupported,
            other => Self::System(other),
        }
    }
}

/// A failure: its kind, a sentence, and where it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    path: Option<PathBuf>,
    offset: Option<u64>,
    detail: String,
    advice: Option<String>,
}

impl Error {
    /// A failure of `kind`; `detail` is a sentence without a full stop that holds no value of an attribute.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            path: None,
            offset: None,
            detail: detail.into(),
            advice: None,
        }
    }

    /// Something stored that the format does not allow.
    pub fn damaged(detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, detail)
    }

    /// There is no such thing.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, detail)
    }

    /// A system call failed with `errno` while doing `what` ("open", "lock", …).
    pub fn system(what: &str, errno: nix::errno::Errno) -> Self {
        Self::new(
            ErrorKind::from_errno(errno as i32),
            format!("{what}: {}", errno.desc()),
        )
    }

    /// An input or output error while doing `what`.
    pub fn io(what: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::system(what, nix::errno::Errno::from_raw(errno)),
            None => Self::new(ErrorKind::System(libc::EIO), format!("{what}: {error}")),
        }
    }

    /// The same failure, with the path of the backing file, unless one is known already.
    #[must_use]
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        if self.path.is_none() {
            self.path = Some(path.as_ref().to_path_buf());
        }
        self
    }

    /// The same failure in the words of who sees `path`: what is known of the backing file becomes part of the sentence.
    #[must_use]
    pub fn of(self, path: &Path) -> Self {
        match self.path {
            Some(_) => Self::new(self.kind, self.to_string()).at(path),
            None => self.at(path),
        }
    }

    /// The same failure, with the offset in the backing file at which it was met, in bytes.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The same failure, with what the user can do about it: a sentence without a full stop.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The sentence alone, without path and offset.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The backing file, where one is known.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The offset in the backing file, in bytes, where one is known.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// The errno that a program gets to see.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.kind.errno()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            // Debug formatting would quote; a path with a newline in it must still stay on its line.
            write!(f, "{}: ", path.display().to_string().escape_debug())?;
        }
        f.write_str(&self.detail)?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_errno() {
        let table = [
            (ErrorKind::NotFound, libc::ENOENT),
            (ErrorKind::Stale, libc::ESTALE),
            (ErrorKind::NotADirectory, libc::ENOTDIR),
            (ErrorKind::IsADirectory, libc::EISDIR),
            (ErrorKind::PermissionDenied, libc::EACCES),
            (ErrorKind::NotPermitted, libc::EPERM),
            (ErrorKind::ReadOnly, libc::EROFS),
            (ErrorKind::Exists, libc::EEXIST),
            (ErrorKind::NotEmpty, libc::ENOTEMPTY),
            (ErrorKind::CrossDevice, libc::EXDEV),
            (ErrorKind::TooLarge, libc::EFBIG),
            (ErrorKind::Damaged, libc::EIO),
            (ErrorKind::Busy, libc::EBUSY),
            (ErrorKind::WouldBlock, libc::EBUSY),
            (ErrorKind::Invalid, libc::EINVAL),
            (ErrorKind::NameTooLong, libc::ENAMETOOLONG),
            (ErrorKind::NoSpace, libc::ENOSPC),
            (ErrorKind::Unsupported, libc::EOPNOTSUPP),
            (ErrorKind::System(libc::EMFILE), libc::EMFILE),
        ];
        for (kind, errno) in table {
            assert_eq!(kind.errno(), errno, "{kind:?}");
            if !matches!(kind, ErrorKind::Damaged | ErrorKind::WouldBlock) {
                assert_eq!(ErrorKind::from_errno(errno), kind);
            }
        }
    }

    #[test]
    fn a_message_names_the_file_and_the_byte_on_one_line() {
        let error = Error::damaged("the value ends too soon")
            .at("/store/a\nb.object")
            .at_offset(17);
        let said = "/store/a\\nb.object: the value ends too soon at byte 17";
        assert_eq!(error.to_string(), said);
        let advised = error.advise("take another one");
        assert_eq!(advised.to_string(), format!("{said}; take another one"));
    }
}
