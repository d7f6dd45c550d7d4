//! The own object of a token that is there under two names: a SoftHSM that had the token open when it was removed writes its copy of `token.object` when it
//! logs in next, into a directory in which there is none any more, or none yet.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::fstat;

use super::TOKEN_OBJECT;
use super::decode::decode;
use super::read::{LARGEST, is_named, open_regular};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11::CKA_OS_TOKENSERIAL;
use crate::store::attribute::Attributes;
use crate::store::sync::sync_directory;
use crate::store::{Patience, lock, validate};

/// How long a file stays as it is that nobody is writing (`docs/store-format.md`, "How tokenfs reads a file").
const AT_REST: Duration = Duration::from_millis(1100);

/// What became of a `token.object` for which there is another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// It is what it should be.
    Whole,
    /// There is no other version that is better, and it is nothing that SoftHSM could use.
    Damaged,
    /// The other version has taken its place.
    Replaced,
}

/// Puts `other` in the place of a `token.object` that is empty, torn, or lacks what a token has to have, if that has all of it.
///
/// # Errors
/// [`ErrorKind::Busy`]; what reading and renaming fail with.
pub(crate) fn mend(directory: BorrowedFd<'_>, other: &Path, patience: Patience) -> Result<Own> {
    let other_is_whole = match open_regular(directory, other, OFlag::O_RDONLY) {
        Ok(file) => content(&file)?.is_some_and(|own| is_whole(&own)),
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let mut before = None;
    loop {
        let present = locked(directory, patience)?;
        let bytes = bytes(&present)?;
        let damaged = match decode(&bytes) {
            Ok(decoded) if !other_is_whole || is_whole(&decoded.attributes) => {
                return Ok(Own::Whole);
            }
            Ok(_) => false,
            Err(_) => true,
        };
        // A SoftHSM writes some of it when it has let go of the lock already.
        if before.as_ref() == Some(&bytes) {
            if damaged && !other_is_whole {
                return Ok(Own::Damaged);
            }
            put(directory, other)?;
            // It has its place, whatever becomes of this.
            if let Err(error) = sync_directory(directory) {
                log::warn!("{error}");
            }
            return Ok(Own::Replaced);
        }
        before = Some(bytes);
        drop(present);
        std::thread::sleep(AT_REST);
    }
}

/// Puts `other`, which is the token that is being made, in the place of a `token.object` that came meanwhile: a copy of the token that was there before, or
/// nothing that could be used.
///
/// # Errors
/// [`ErrorKind::Exists`] if it is another token's; [`ErrorKind::Busy`]; what reading and renaming fail with.
pub(super) fn replace(directory: BorrowedFd<'_>, other: &Path, patience: Patience) -> Result<()> {
    let made = open_regular(directory, other, OFlag::O_RDONLY)?;
    let made = content(&made)?.unwrap_or_default();
    let present = locked(directory, patience)?;
    let serial = |own: &Attributes| own.bytes(CKA_OS_TOKENSERIAL).map(<[u8]>::to_vec);
    if let Some(own) = content(&present)?
        && is_whole(&own)
        && serial(&own) != serial(&made)
    {
        let detail = "somebody else has made another token in its directory meanwhile";
        return Err(Error::new(ErrorKind::Exists, detail));
    }
    put(directory, other)
}

fn locked(directory: BorrowedFd<'_>, patience: Patience) -> Result<File> {
    let name = Path::new(TOKEN_OBJECT);
    loop {
        let file = open_regular(directory, name, OFlag::O_RDWR)?;
        lock::lock_exclusive(&file, patience)?;
        let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
        if is_named(directory, name, &stat)? {
            return Ok(file);
        }
    }
}

fn put(directory: BorrowedFd<'_>, other: &Path) -> Result<()> {
    renameat(directory, other, directory, TOKEN_OBJECT)
        .map_err(|errno| Error::system("rename", errno))
}

/// What a file holds, if it is an object.
fn content(file: &File) -> Result<Option<Attributes>> {
    Ok(decode(&bytes(file)?).ok().map(|decoded| decoded.attributes))
}

fn bytes(file: &File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io("read", &error))?;
    Ok(bytes)
}

fn is_whole(own: &Attributes) -> bool {
    validate::lacking(own).is_none()
}
