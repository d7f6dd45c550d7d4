//! Rewriting a file in place, under a journal.
//!
//! Needed for `token.object`, which SoftHSM opens before it waits for its lock, so that no other file may take its name; and
//! where a new file could not be what the old one is. A file that is being rewritten is locked exclusively. It never becomes
//! shorter than its old version while it holds some of it: what becomes shorter is filled up first, and cut off then. So
//! a SoftHSM that opens the store after a kill finds the old or the new version, which is one write of less than a page.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use nix::fcntl::OFlag;
use nix::unistd::ftruncate;
use rustix::fs::{FallocateFlags, fallocate, fremovexattr};
use rustix::io::Errno as Refusal;

use super::attire::{narrowed, set_access_if_possible, set_mtime};
use super::encode::encode;
use super::guard::{Temporary, sync, unlink};
use super::journal::{Journal, Verdict};
use super::names::Names;
use super::read::{LARGEST, Reading, open_regular};
use super::{change, decode};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::sync::sync_directory;

/// Replaces the content of a file that is locked exclusively.
///
/// Says what fails when the new version is in place: a journal that is left does no harm, and whoever may write a file and does not own it cannot choose its time.
///
/// # Errors
/// What making the journal and writing fails with; the old version is there again then.
pub(super) fn rewrite(
    directory: BorrowedFd<'_>,
    names: &Names,
    reading: &Reading,
    new: &[u8],
    mtime: Option<SystemTime>,
) -> Result<Option<Error>> {
    let journal = Journal {
        old: reading.bytes.clone(),
        new: new.to_vec(),
    };
    let mut on_disk = Temporary::new(directory, names.journal())?;
    point("file.rewrite.journal-made");
    // Not those that the list of the directory lets in (acl(5), "default").
    let _ = fremovexattr(&on_disk.file, "system.posix_acl_access");
    set_access_if_possible(&on_disk.file, narrowed(&reading.file, &reading.stat));
    on_disk.write(&journal.encode())?;
    point("file.rewrite.journal-written");
    sync(&on_disk.file)?;
    sync_directory(directory)?;
    point("file.rewrite.journalled");
    // From here on the journal stays until the file is whole.
    on_disk.keep();
    if let Err(error) = overwrite(&reading.file, &journal) {
        if restore(&reading.file, &journal).is_ok() {
            let _ = unlink(directory, names.journal());
        }
        return Err(error);
    }
    let dated = match mtime {
        Some(_) => set_mtime(&reading.file, mtime),
        None => Ok(()),
    };
    point("file.rewrite.dated");
    let cleared = unlink(directory, names.journal());
    point("file.rewrite.done");
    Ok(match dated {
        // It has the time of the write.
        Err(error) if error.kind() == ErrorKind::NotPermitted => cleared,
        dated => dated.and(cleared),
    }
    .err())
}

fn overwrite(file: &File, journal: &Journal) -> Result<()> {
    let target = journal.target();
    // Room first, so that a full disk is met before anything is written.
    let length = target.len() as u64;
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, length) {
        Ok(()) | Err(Refusal::OPNOTSUPP | Refusal::NOSYS) => {}
        Err(errno) => {
            let errno = nix::errno::Errno::from_raw(errno.raw_os_error());
            return Err(Error::system("make room", errno));
        }
    }
    point("file.rewrite.room");
    write_at_start(file, &target)?;
    point("file.rewrite.written");
    sync(file)?;
    point("file.rewrite.synced");
    if target.len() != journal.new.len() {
        cut(file, journal.new.len())?;
    }
    Ok(())
}

fn restore(file: &File, journal: &Journal) -> Result<()> {
    write_at_start(file, &journal.old)?;
    cut(file, journal.old.len())
}

fn write_at_start(file: &File, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, 0)
        .map_err(|error| Error::io("write", &error))
}

fn cut(file: &File, length: usize) -> Result<()> {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    ftruncate(file, length).map_err(|errno| Error::system("truncate", errno))?;
    point("file.rewrite.cut");
    sync(file)?;
    point("file.rewrite.cut-synced");
    Ok(())
}

/// What [`recover`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recovered {
    /// There was no journal.
    Nothing,
    /// A journal that was of no use was removed.
    Dropped,
    /// A rewriting that was cut short was finished.
    Finished,
}

/// Puts right what a crash in [`rewrite`] left. `reading` is the file, locked exclusively, as it is when nobody writes it.
///
/// # Errors
/// What reading the journal and writing fails with; nothing is lost then.
pub(super) fn recover(
    directory: BorrowedFd<'_>,
    names: &Names,
    reading: &Reading,
) -> Result<Recovered> {
    if !names.fit() {
        // There cannot be one.
        return Ok(Recovered::Nothing);
    }
    let file = match open_regular(directory, names.journal(), OFlag::O_RDONLY) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Recovered::Nothing),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(2 * LARGEST + 1024)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io("read the journal", &error))?;
    // One that is not whole was not yet when the crash came, so that nothing was written.
    let journal = Journal::decode(&bytes);
    let verdict = journal
        .as_ref()
        .map(|journal| (journal, journal.verdict(&reading.bytes)));
    // What is there may be there in memory only, and the journal is what it would be put right by.
    sync(&reading.file)?;
    let recovered = match verdict {
        None | Some((_, Verdict::Keep)) => Recovered::Dropped,
        Some((journal, Verdict::Cut)) => {
            cut(&reading.file, journal.new.len())?;
            Recovered::Finished
        }
        Some((journal, Verdict::Redo)) => {
            overwrite(&reading.file, journal)?;
            // A SoftHSM may have read a mixture, with the generation of the new version: it has to read again. One write of
            // eight bytes is whole for everybody.
            if let Ok(decoded) = decode(&journal.new) {
                let next = encode(
                    change::following(decoded.generation),
                    &crate::store::attribute::Attributes::new(),
                );
                write_at_start(&reading.file, &next)?;
                point("file.rewrite.raised");
                sync(&reading.file)?;
            }
            Recovered::Finished
        }
    };
    unlink(directory, names.journal())?;
    point("file.rewrite.recovered");
    Ok(recovered)
}
