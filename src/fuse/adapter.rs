//! One translation per request of the kernel, and nothing else: what a request means is the tree's business.
//!
//! Requests are answered in the thread that reads them, which is the fastest there is for one client, as long as that takes no
//! waiting. One that would have to wait (a lock, an unfinished writer, a long scan) is answered by a thread of its own, so
//! that it holds up nobody else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;
use crate::tree::{self, Entry, FileKind, HandleId, Listed, Tree};

/// The most requests that wait at a time. More than one reader of the same object is rare, and a waiting thread costs little.
const MOST_WAITING: usize = 256;

/// A number of an inode that was never used before has this generation: ours are not used again for something else.
const GENERATION: Generation = Generation(0);

/// The size that directories and files are read in best.
const BLOCK_SIZE: u32 = 4096;

/// The tree, as the kernel asks for it.
#[derive(Clone, Debug)]
pub struct Adapter {
    tree: Arc<Tree>,
    waiting: Arc<AtomicUsize>,
}

impl Adapter {
    /// Serves `tree`.
    #[must_use]
    pub fn new(tree: Arc<Tree>) -> Self {
        Self {
            tree,
            waiting: Arc::default(),
        }
    }

    /// Answers with what `ask` says: at once, or from another thread if it has to wait.
    fn answer<T, R>(
        &self,
        reply: R,
        ask: impl Fn(&Tree, Patience) -> Result<T> + Send + 'static,
        done: impl FnOnce(&Tree, R, Result<T>) + Send + 'static,
    ) where
        R: Send + 'static,
    {
        let at_once = ask(&self.tree, Patience::Now);
        match &at_once {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return done(&self.tree, reply, at_once),
        }
        self.wait(reply, move |tree, reply, patience| {
            let answer = ask(tree, patience);
            done(tree, reply, answer);
        });
    }

    /// Has a thread of its own answer.
    fn wait<R: Send + 'static>(
        &self,
        reply: R,
        answer: impl FnOnce(&Tree, R, Patience) + Send + 'static,
    ) {
        let tree = Arc::clone(&self.tree);
        let Some(slot) = Slot::take(&self.waiting) else {
            // No patience left: it is refused, or answered after all if what it waited for has come.
            tree.diagnostics()
                .warning("too many requests are waiting for locks already");
            return answer(&tree, reply, Patience::Until(Instant::now()));
        };
        let limit = tree.store().options().lock_wait;
        // If no thread is to be had the reply is dropped with the closure, which answers EIO.
        let started = thread::Builder::new()
            .name("tokenfs-wait".to_owned())
            .spawn(move || {
                let _slot = slot;
                answer(&tree, reply, Patience::at_most(limit));
            });
        if let Err(error) = started {
            let error = Error::io("start a thread for a request that has to wait", &error);
            self.tree.diagnostics().error(&error);
        }
    }
}

/// Fills `reply` with entries from `offset` on. Gives it back if it is empty and the first entry has to be waited for.
///
/// Each entry is counted by the kernel as an answer about its inode, with all that `stat` says: there is no naming one
/// without (`fuser` takes the inode from the attributes).
fn fill(
    tree: &Tree,
    mut reply: ReplyDirectoryPlus,
    ino: u64,
    listing: &[Listed],
    offset: u64,
    patience: Patience,
) -> Result<(), ReplyDirectoryPlus> {
    let mut is_empty = true;
    // The kernel takes no attributes of these two.
    let dots = [(ino, "."), (tree.parent(ino), "..")];
    for (index, (ino, name)) in dots.into_iter().enumerate() {
        let next = index as u64 + 1;
        if next > offset {
            is_empty = false;
            let bare = bare(ino, FileKind::Directory);
            if reply.add(INodeNo(ino), next, name, &Duration::ZERO, &bare, GENERATION) {
                reply.ok();
                return Ok(());
            }
        }
    }
    let first = usize::try_from(offset.saturating_sub(2)).unwrap_or(usize::MAX);
    for (index, entry) in listing.iter().enumerate().skip(first) {
        let look = match tree.look_at(entry, patience) {
            Ok(look) => look,
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
        let found = &look.entry;
        let full = reply.add(
            INodeNo(found.attributes.ino),
            index as u64 + 3,
            &entry.name,
            &found.valid,
            &attributes(&found.attributes),
            GENERATION,
        );
        if full {
            break;
        }
        is_empty = false;
        tree.tell(ino, &look);
    }
    reply.ok();
    Ok(())
}

/// One of the places for requests that wait.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(waiting: &Arc<AtomicUsize>) -> Option<Self> {
        let slot = Self(Arc::clone(waiting));
        (waiting.fetch_add(1, Ordering::Relaxed) < MOST_WAITING).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

fn attributes(from: &tree::Attributes) -> FileAttr {
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

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Link => FileType::Symlink,
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each is an improvement, and none is needed: a kernel that lacks one goes without.
        for wanted in [
            // Only a mapped file has pages. They are dropped when size or mtime turn out to be others.
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // Files can be mapped all the same.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_os_string();
        self.answer(
            reply,
            move |tree, patience| tree.lookup(parent.0, &name, patience),
            |_, reply, answer| match answer {
                Ok(Entry {
                    attributes: from,
                    valid,
                }) => {
                    reply.entry(&valid, &attributes(&from), GENERATION);
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        self.tree.forget(ino.0, count);
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        self.answer(
            reply,
            move |tree, patience| tree.attributes(ino.0, patience),
            |_, reply, answer| match answer {
                Ok(Entry {
                    attributes: from,
                    valid,
                }) => reply.attr(&valid, &attributes(&from)),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.tree.read_link(ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        self.answer(
            reply,
            move |tree, patience| tree.open(ino.0, patience),
            |_, reply, answer| match answer {
                Ok(handle) => {
                    // Never from the kernel's pages: what is in them is cut to the size that the kernel believes in, and whether
                    // that is the size of this version nobody can tell. There is nothing to flush either.
                    let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
                    reply.opened(FileHandle(handle.0), flags);
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.tree.read(HandleId(handle.0), offset, size) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.release(HandleId(handle.0));
        reply.ok();
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.answer(
            reply,
            move |tree, patience| tree.open_dir(ino.0, patience),
            |_, reply, answer| match answer {
                Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listing = match self.tree.read_dir(HandleId(handle.0)) {
            Ok(listing) => listing,
            Err(error) => return reply.error(errno(&error)),
        };
        let dots = [(ino.0, "."), (self.tree.parent(ino.0), "..")];
        let dots = dots.map(|(ino, name)| (ino, FileKind::Directory, OsStr::new(name)));
        let entries = listing
            .iter()
            .map(|entry| (entry.ino, entry.kind, entry.name.as_os_str()));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (ino, kind, name)) in dots.into_iter().chain(entries).enumerate().skip(skip) {
            // The offset of an entry is that of the one behind it.
            if reply.add(INodeNo(ino), index as u64 + 1, file_type(kind), name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let listing = match self.tree.read_dir(HandleId(handle.0)) {
            Ok(listing) => listing,
            Err(error) => return reply.error(errno(&error)),
        };
        let Err(reply) = fill(&self.tree, reply, ino.0, &listing, offset, Patience::Now) else {
            return;
        };
        // The first entry has to be waited for.
        self.wait(reply, move |tree, reply, patience| {
            if let Err(reply) = fill(tree, reply, ino.0, &listing, offset, patience) {
                reply.error(Errno::EBUSY);
            }
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release(HandleId(handle.0));
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.tree.store().statvfs() {
            Ok(stat) => reply.statfs(
                stat.blocks(),
                stat.blocks_free(),
                stat.blocks_available(),
                stat.files(),
                stat.files_free(),
                stat.block_size() as u32,
                // NAME_MAX
                255,
                stat.fragment_size() as u32,
            ),
            Err(error) => reply.error(errno(&error)),
        }
    }

    // There are no extended attributes. ENOSYS is the answer for good, and saves a question for each file.

    fn getxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions the kernel decides, and does not ask.
        reply.ok();
    }

    // Everything that writes. The kernel refuses most of it before it asks, since the mount is read-only; this is for what
    // reaches us all the same.

    fn setattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _to_parent: INodeNo,
        _to_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _to_parent: INodeNo,
        _to_name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
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
