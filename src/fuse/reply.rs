//! From the tree's plain types to what `fuser` sends.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileType, Generation, INodeNo, ReplyAttr, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyWrite,
};

use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;
use crate::tree::{self, Entry, FileKind, HandleId, Tree};

/// The size that directories and files are read in best.
const BLOCK_SIZE: u32 = 4096;

/// What the kernel is told of something that it came to by an inode that it remembers. If it is gone the name has to be looked up anew,
/// which `ESTALE` makes it do (`retry_estale` in fs/namei.c); the program hears what comes of that. Telling it beforehand, when the entry
/// vanishes, would take the lock of the directory, see [`crate::tree::Stale`].
pub(super) fn by_inode<T>(answer: Result<T>) -> Result<T> {
    answer.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::Stale, error.to_string()),
        _ => error,
    })
}

pub(super) fn empty(_: &Tree, reply: ReplyEmpty, answer: Result<()>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn written(reply: ReplyWrite, length: usize, answer: Result<()>) {
    match answer {
        Ok(()) => reply.written(u32::try_from(length).unwrap_or(u32::MAX)),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn entry(_: &Tree, reply: ReplyEntry, answer: Result<Entry>) {
    match answer {
        Ok(entry) => reply.entry(
            &entry.valid,
            &attributes(&entry.attributes),
            Generation(entry.generation),
        ),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(super) fn attr(_: &Tree, reply: ReplyAttr, answer: Result<Entry>) {
    match answer {
        Ok(entry) => reply.attr(&entry.valid, &attributes(&entry.attributes)),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Fills `reply` with entries from `offset` on. Gives it back if it is empty and the first entry has to be waited for.
///
/// Each entry is counted by the kernel as an answer about its inode, with all that `stat` says: there is no naming one
/// without (`fuser` takes the inode from the attributes).
pub(super) fn fill(
    tree: &Tree,
    mut reply: ReplyDirectoryPlus,
    ino: u64,
    handle: HandleId,
    offset: u64,
    patience: Patience,
) -> Result<(), ReplyDirectoryPlus> {
    let listing = match tree.read_dir(handle) {
        Ok(listing) => listing,
        Err(error) => {
            reply.error(errno(&error));
            return Ok(());
        }
    };
    let mut is_empty = true;
    // The kernel takes no attributes of these two.
    let dots = [(ino, "."), (tree.parent(ino), "..")];
    for (index, (ino, name)) in dots.into_iter().enumerate() {
        let next = index as u64 + 1;
        if next > offset {
            is_empty = false;
            let bare = bare(ino, FileKind::Directory);
            if reply.add(
                INodeNo(ino),
                next,
                name,
                &Duration::ZERO,
                &bare,
                Generation(0),
            ) {
                reply.ok();
                return Ok(());
            }
        }
    }
    let first = usize::try_from(offset.saturating_sub(2)).unwrap_or(usize::MAX);
    for (index, entry) in listing.iter().enumerate().skip(first) {
        let (name, answer) = match tree.look_at(ino, &listing, entry, patience) {
            Ok(found) => found,
            // It has gone since the directory was opened.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            // The next request begins with it.
            Err(_) if !is_empty => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(reply),
            Err(error) => {
                reply.error(errno(&error));
                return Ok(());
            }
        };
        let found = &answer.entry;
        let full = reply.add(
            INodeNo(found.attributes.ino),
            index as u64 + 3,
            &name,
            &found.valid,
            &attributes(&found.attributes),
            Generation(found.generation),
        );
        if full {
            tree.take_back_answer(answer);
            break;
        }
        is_empty = false;
    }
    reply.ok();
    Ok(())
}

/// Answers with the names alone.
pub(super) fn names(
    tree: &Tree,
    mut reply: ReplyDirectory,
    ino: u64,
    handle: HandleId,
    offset: u64,
) {
    let listing = match tree.read_dir(handle) {
        Ok(listing) => listing,
        Err(error) => return reply.error(errno(&error)),
    };
    let dots = [(ino, "."), (tree.parent(ino), "..")];
    let dots = dots.map(|(ino, name)| (ino, FileKind::Directory, OsStr::new(name)));
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    // The offset of an entry is that of the one behind it.
    for (index, (number, kind, name)) in dots.into_iter().enumerate().skip(first) {
        if reply.add(INodeNo(number), index as u64 + 1, file_type(kind), name) {
            return reply.ok();
        }
    }
    for (index, entry) in listing.iter().enumerate().skip(first.saturating_sub(2)) {
        let now = tree.listed_now(ino, &listing, entry);
        if reply.add(
            INodeNo(now.ino),
            index as u64 + 3,
            file_type(now.kind),
            &now.name,
        ) {
            break;
        }
    }
    reply.ok();
}

/// Whoever reads a directory from its beginning reads it as it is by now.
pub(super) fn begin_listing(
    tree: &Tree,
    ino: u64,
    handle: HandleId,
    offset: u64,
    patience: Patience,
) -> Result<(), Error> {
    if offset > 0 {
        return Ok(());
    }
    tree.begin_listing(ino, handle, patience)
}

pub(super) fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

pub(super) fn attributes(from: &tree::Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(from.ino),
        size: from.size,
        blocks: from.size.div_ceil(512),
        atime: from.atime,
        mtime: from.mtime,
        ctime: from.ctime,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(from.kind),
        perm: (from.mode & 0o7777) as u16,
        // A directory that does not count its sub-directories says 1, as btrfs does: find(1) then looks for itself.
        nlink: 1,
        uid: from.uid,
        gid: from.gid,
        rdev: 0,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Link => FileType::Symlink,
    }
}

/// Attributes of which only number and type count.
fn bare(ino: u64, kind: FileKind) -> FileAttr {
    attributes(&tree::Attributes {
        ino,
        kind,
        size: 0,
        mode: 0,
        uid: 0,
        gid: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
    })
}
