//! Stands in for the tree until that is there: an empty directory. To be deleted then.

use std::ffi::OsStr;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, INodeNo, ReplyAttr, ReplyDirectory,
    ReplyEntry, Request,
};

#[derive(Debug)]
pub(super) struct Empty {
    mask: u32,
}

impl Empty {
    pub(super) fn new(mask: u32) -> Self {
        Self { mask }
    }
}

impl Filesystem for Empty {
    fn lookup(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::ENOENT);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let attributes = FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: FileType::Directory,
            perm: (0o777 & !self.mask) as u16,
            nlink: 2,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            rdev: 0,
            blksize: 512,
            flags: 0,
        };
        reply.attr(&Duration::ZERO, &attributes);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        for (index, name) in [".", ".."].iter().enumerate().skip(offset as usize) {
            if reply.add(ino, index as u64 + 1, FileType::Directory, name) {
                break;
            }
        }
        reply.ok();
    }
}
