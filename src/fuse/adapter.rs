//! One translation per request of the kernel, and nothing else: what a request means is the tree's business.
//!
//! Requests are answered in the thread that reads them, which is the fastest there is for one client, as long as that takes no
//! waiting. One that would have to wait (a lock, an unfinished writer, a long scan, a disk that has to be written) is answered by a
//! thread of its own, so that it holds up nobody else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::reply::{self, attributes, begin_listing, by_inode, errno, fill, names};
use super::request::{caller, for_writing, time};
use super::wait::{MOST_REQUESTS, Waiting};
use crate::error::ErrorKind;
use crate::store::{MetadataChange, Patience};
use crate::tree::{Creation, HandleId, RenameHow, SetAttributes, Tree};

/// The tree, as the kernel asks for it.
#[derive(Clone, Debug)]
pub struct Adapter {
    tree: Arc<Tree>,
    waiting: Waiting,
}

impl Adapter {
    /// Serves `tree`.
    #[must_use]
    pub fn new(tree: Arc<Tree>) -> Self {
        Self {
            waiting: Waiting::new(Arc::clone(&tree), MOST_REQUESTS),
            tree,
        }
    }

    /// Waits until no request is being answered any more, but for `limit` at most.
    pub fn drain(&self, limit: Duration) {
        self.waiting.drain(limit);
    }
}

/// How an open file is read and written: never from the kernel's pages, since what is in them is cut to the size that the kernel
/// believes in, and whether that is the size of this version nobody can tell.
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO;

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
            // Without, an open with O_TRUNC comes as a truncation of its own before the open, which would take effect at once.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_os_string();
        self.waiting.answer(
            reply,
            move |tree, patience| tree.lookup(parent.0, &name, patience),
            reply::entry,
        );
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        self.tree.forget(ino.0, count);
    }

    fn getattr(
        &self,
        request: &Request,
        ino: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let pid = request.pid();
        self.waiting.answer(
            reply,
            move |tree, patience| {
                by_inode(match handle {
                    Some(handle) => tree.open_attributes(ino.0, HandleId(handle.0), patience),
                    None => tree.attributes_for(ino.0, pid, patience),
                })
            },
            reply::attr,
        );
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match by_inode(self.tree.read_link(ino.0)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let is_read = flags.acc_mode() == OpenAccMode::O_RDONLY;
        let how = for_writing(flags.0);
        let pid = request.pid();
        self.waiting.answer(
            reply,
            move |tree, patience| {
                by_inode(if is_read && !how.truncate {
                    tree.open(ino.0, patience)
                } else {
                    tree.open_for_writing(ino.0, how, patience)
                })
            },
            move |tree, reply, answer| match answer {
                Ok(handle) => {
                    tree.used_by(handle, pid);
                    // What is only read has nothing to flush.
                    let flags = if is_read {
                        OPENED | FopenFlags::FOPEN_NOFLUSH
                    } else {
                        OPENED
                    };
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
        self.waiting.unlimited().answer(
            reply,
            move |tree, patience| tree.release(HandleId(handle.0), patience),
            reply::empty,
        );
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // What is refused would be committed all the same when it is closed for good.
        self.waiting.unlimited().answer(
            reply,
            move |tree, patience| tree.flush(HandleId(handle.0), patience),
            reply::empty,
        );
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.waiting.answer(
            reply,
            move |tree, patience| tree.sync_file(ino.0, HandleId(handle.0), patience),
            reply::empty,
        );
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let pid = request.pid();
        self.waiting.answer(
            reply,
            move |tree, patience| by_inode(tree.open_dir(ino.0, patience)),
            move |tree, reply, answer| match answer {
                Ok(handle) => {
                    tree.used_by(handle, pid);
                    reply.opened(FileHandle(handle.0), FopenFlags::empty());
                }
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
        reply: ReplyDirectory,
    ) {
        let (ino, handle) = (ino.0, HandleId(handle.0));
        match begin_listing(&self.tree, ino, handle, offset, Patience::Now) {
            Ok(()) => names(&self.tree, reply, ino, handle, offset),
            // Whatever comes of it: there is the listing of before.
            Err(_) => self.waiting.wait(reply, move |tree, reply, patience| {
                let _ = begin_listing(tree, ino, handle, offset, patience);
                names(tree, reply, ino, handle, offset);
            }),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let (ino, handle) = (ino.0, HandleId(handle.0));
        let reply = match begin_listing(&self.tree, ino, handle, offset, Patience::Now) {
            Ok(()) => match fill(&self.tree, reply, ino, handle, offset, Patience::Now) {
                Ok(()) => return,
                Err(reply) => reply,
            },
            Err(_) => reply,
        };
        // The first entry has to be waited for, or all of it.
        self.waiting.wait(reply, move |tree, reply, patience| {
            let _ = begin_listing(tree, ino, handle, offset, patience);
            if let Err(reply) = fill(tree, reply, ino, handle, offset, patience) {
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
        // A directory has nothing to write.
        let _ = self.tree.release(HandleId(handle.0), Patience::Now);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.waiting.answer(
            reply,
            move |tree, patience| tree.sync_dir(ino.0, patience),
            reply::empty,
        );
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

    // There is nothing to control, and programs ask each file whether it is a terminal (isatty(3)).

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
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

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let metadata = MetadataChange {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            atime: atime.map(time),
            mtime: mtime.map(time),
        };
        let pid = request.pid();
        let change = SetAttributes {
            size,
            metadata,
            pid,
            uid: Some(request.uid()),
        };
        let handle = handle.map(|handle| HandleId(handle.0));
        if let Some(handle) = handle {
            self.tree.used_by(handle, request.pid());
        }
        self.waiting.answer(
            reply,
            move |tree, patience| by_inode(tree.set_attributes(ino.0, handle, &change, patience)),
            reply::attr,
        );
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // Only files. A local file system that knows no other sort says this.
        if mode & libc::S_IFMT != libc::S_IFREG && mode & libc::S_IFMT != 0 {
            return reply.error(Errno::EPERM);
        }
        let (name, caller) = (name.to_os_string(), caller(request));
        self.waiting.answer(
            reply,
            move |tree, patience| tree.make_file(parent.0, &name, mode & 0o7777, caller, patience),
            reply::entry,
        );
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (name, caller) = (name.to_os_string(), caller(request));
        self.waiting.answer(
            reply,
            move |tree, patience| tree.make_dir(parent.0, &name, mode & 0o7777, caller, patience),
            reply::entry,
        );
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_os_string();
        self.waiting.answer(
            reply,
            move |tree, patience| tree.unlink(parent.0, &name, patience),
            reply::empty,
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_os_string();
        let by = Some(caller(request));
        self.waiting.answer(
            reply,
            move |tree, patience| tree.remove_dir(parent.0, &name, by, patience),
            reply::empty,
        );
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        // What a file system says that does not know how to exchange.
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let how = RenameHow {
            no_replace: flags.contains(RenameFlags::RENAME_NOREPLACE),
            by: Some(caller(request)),
        };
        let (name, to_name) = (name.to_os_string(), to_name.to_os_string());
        self.waiting.answer(
            reply,
            move |tree, patience| {
                tree.rename((parent.0, &name), (to_parent.0, &to_name), how, patience)
            },
            reply::empty,
        );
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, caller) = (name.to_os_string(), caller(request));
        let pid = request.pid();
        let how = Creation {
            mode: mode & 0o7777,
            exclusive: flags & libc::O_EXCL != 0,
            open: for_writing(flags),
        };
        self.waiting.answer(
            reply,
            move |tree, patience| tree.create(parent.0, &name, how, caller, patience),
            move |tree, reply, answer| match answer {
                Ok((entry, handle)) => {
                    tree.used_by(handle, pid);
                    reply.created(
                        &entry.valid,
                        &attributes(&entry.attributes),
                        Generation(entry.generation),
                        FileHandle(handle.0),
                        OPENED,
                    );
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn write(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let handle = HandleId(handle.0);
        let is_page = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        if !is_page {
            // A page is written by the kernel, whoever has changed it.
            self.tree.used_by(handle, request.pid());
            self.tree.appends(handle, flags.0 & libc::O_APPEND != 0);
        }
        let write = move |tree: &Tree, data: &[u8], patience| {
            if is_page {
                tree.write_page(handle, offset, data, patience)
            } else {
                tree.write(handle, offset, data, patience)
            }
        };
        match write(&self.tree, data, Patience::Now) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // It outlives the request, which is the only one that is copied for that.
                let data = data.to_vec();
                self.waiting.wait(reply, move |tree, reply, patience| {
                    let written = write(tree, &data, patience);
                    reply::written(reply, data.len(), written);
                });
            }
            written => reply::written(reply, data.len(), written),
        }
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let handle = HandleId(handle.0);
        self.tree.used_by(handle, request.pid());
        let end = offset.saturating_add(length);
        match mode {
            0 => self.waiting.answer(
                reply,
                move |tree, patience| tree.extend_open(handle, end, patience),
                reply::empty,
            ),
            // Nothing has to be reserved, since it is all in memory until it is committed.
            libc::FALLOC_FL_KEEP_SIZE => reply.ok(),
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }

    // What there is not in a store: links of both kinds, and extended attributes.

    fn symlink(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _to_parent: INodeNo,
        _to_name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
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
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}
