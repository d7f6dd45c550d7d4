//! The floor that `scripts/bench` measures against: what any FUSE file system of this shape costs, whatever it serves.
//!
//! Reads a directory tree into memory and serves it read-only, with everything that spares the kernel a question: long
//! times-to-live, `readdirplus`, listings and pages that are kept over an open, and no flush. It watches nothing, so
//! what changes below the source is never seen.
//!
//! ```text
//! floor SOURCE MOUNTPOINT      in the foreground, until it is unmounted
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyXattr, Request,
};

/// For ever, as far as a benchmark goes.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);

const GENERATION: Generation = Generation(0);

enum Content {
    File(Vec<u8>),
    Directory(Vec<(OsString, usize)>),
}

struct Node {
    attributes: FileAttr,
    content: Content,
}

/// The inode with the number `n` is at `n - 1`, the root thus at 0.
#[derive(Default)]
struct Floor {
    nodes: Vec<Node>,
    names: HashMap<(usize, OsString), usize>,
}

impl Floor {
    /// Takes a file or a directory with all that is in it, and returns its index.
    fn take(&mut self, path: &Path) -> usize {
        let metadata = fs::symlink_metadata(path).expect("stat");
        let index = self.nodes.len();
        self.nodes.push(Node {
            attributes: attributes(index, &metadata),
            content: Content::Directory(Vec::new()),
        });
        if metadata.is_dir() {
            let mut entries: Vec<_> = fs::read_dir(path)
                .expect("list")
                .map(|entry| entry.expect("entry").file_name())
                .collect();
            entries.sort();
            let mut children = Vec::with_capacity(entries.len());
            for name in entries {
                let child = self.take(&path.join(&name));
                self.names.insert((index, name.clone()), child);
                children.push((name, child));
            }
            self.nodes[index].content = Content::Directory(children);
        } else {
            let bytes = fs::read(path).expect("read");
            self.nodes[index].attributes.size = bytes.len() as u64;
            self.nodes[index].content = Content::File(bytes);
        }
        index
    }

    fn node(&self, ino: INodeNo) -> Option<&Node> {
        self.nodes.get(index(ino))
    }

    /// The entries of a directory behind `offset`, each with the offset behind itself.
    fn entries(
        &self,
        ino: INodeNo,
        offset: u64,
    ) -> Option<impl Iterator<Item = (u64, &OsStr, &Node)>> {
        let Content::Directory(children) = &self.node(ino)?.content else {
            return None;
        };
        let children = children
            .iter()
            .map(|(name, child)| (name.as_os_str(), *child));
        // Nobody asks where `..` leads: the kernel knows.
        let dots = [".", ".."].map(|name| (OsStr::new(name), index(ino)));
        let behind = dots.into_iter().chain(children).zip(1..);
        Some(
            behind
                .skip(usize::try_from(offset).unwrap_or(usize::MAX))
                .map(|((name, child), offset)| (offset, name, &self.nodes[child])),
        )
    }
}

fn index(ino: INodeNo) -> usize {
    usize::try_from(ino.0).unwrap_or(0).wrapping_sub(1)
}

fn attributes(index: usize, from: &Metadata) -> FileAttr {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    FileAttr {
        ino: INodeNo(index as u64 + 1),
        size: from.len(),
        blocks: from.len().div_ceil(512),
        atime: time(from.atime()),
        mtime: time(from.mtime()),
        ctime: time(from.ctime()),
        crtime: SystemTime::UNIX_EPOCH,
        kind: if from.is_dir() {
            FileType::Directory
        } else {
            FileType::RegularFile
        },
        perm: (from.mode() & 0o7777) as u16,
        nlink: 1,
        uid: from.uid(),
        gid: from.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Floor {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _ = config
            .add_capabilities(InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_PARALLEL_DIROPS);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.names.get(&(index(parent), name.to_os_string())) {
            Some(child) => reply.entry(&VALID, &self.nodes[*child].attributes, GENERATION),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Some(node) => reply.attr(&VALID, &node.attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let keep = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), keep);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(Node {
            content: Content::File(bytes),
            ..
        }) = self.node(ino)
        else {
            return reply.error(Errno::EISDIR);
        };
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let end = start.saturating_add(size as usize).min(bytes.len());
        reply.data(&bytes[start..end]);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let keep = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
        reply.opened(FileHandle(0), keep);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(mut entries) = self.entries(ino, offset) else {
            return reply.error(Errno::ENOTDIR);
        };
        let _ = entries.any(|(next, name, Node { attributes, .. })| {
            reply.add(attributes.ino, next, attributes.kind, name)
        });
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(mut entries) = self.entries(ino, offset) else {
            return reply.error(Errno::ENOTDIR);
        };
        let _ = entries.any(|(next, name, Node { attributes, .. })| {
            reply.add(attributes.ino, next, name, &VALID, attributes, GENERATION)
        });
        reply.ok();
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: fuser::AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(source), Some(point), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        panic!("usage: floor SOURCE MOUNTPOINT");
    };
    let mut floor = Floor::default();
    floor.take(Path::new(&source));
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::FSName("floor".to_owned()),
        MountOption::DefaultPermissions,
    ];
    let session = fuser::Session::new(floor, Path::new(&point), &config).expect("mount");
    session.run().expect("serve");
}
