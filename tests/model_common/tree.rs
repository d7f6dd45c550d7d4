//! `Tree` without a mount, asked as the kernel would ask it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::{Error, ErrorKind};
use tokenfs::store::{Backend, MetadataChange, Time};
use tokenfs::tree::node::ROOT;
use tokenfs::tree::{
    Caller, Creation, FileKind, HandleId, Ino, OpenForWriting, RenameHow, SetAttributes, Settings,
    Tree,
};

use super::Answer;
use super::fixture::{Template, patient, store};
use super::ops::{DESCRIPTORS, How};
use super::state::{Stat, World};

struct Open {
    ino: Ino,
    handle: HandleId,
    position: u64,
}

pub struct TreeWorld {
    pub tree: Tree,
    pub tokendir: TempDir,
    backend: Backend,
    open: Vec<Option<Open>>,
}

fn errno<T>(outcome: tokenfs::error::Result<T>) -> Answer<T> {
    outcome.map_err(|error: Error| {
        assert_ne!(error.kind(), ErrorKind::WouldBlock, "{error}");
        error.errno()
    })
}

fn caller() -> Caller {
    Caller {
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        pid: std::process::id(),
    }
}

/// Nobody who lives: what he makes is finished when it is left alone.
fn maker() -> Caller {
    Caller {
        pid: u32::MAX - 1,
        ..caller()
    }
}

impl TreeWorld {
    pub fn new(template: &Template) -> Self {
        let tokendir = template.copy();
        Self {
            tree: Self::mounted(tokendir.path(), template.backend),
            tokendir,
            backend: template.backend,
            open: (0..=DESCRIPTORS).map(|_| None).collect(),
        }
    }

    fn mounted(tokendir: &Path, backend: Backend) -> Tree {
        let log = Arc::new(Diagnostics::new());
        let Caller { uid, gid, .. } = caller();
        let settings = Settings {
            uid,
            gid,
            ..Settings::default()
        };
        let store = store(tokendir, backend, &log);
        store.recover();
        Tree::new(store, settings, log)
    }

    /// How many lines the log has had.
    pub fn logged(&self) -> usize {
        let text = self.tree.diagnostics().render();
        let times = |line: &str| {
            let counted = line.rsplit_once('(')?.1.strip_suffix(" times)")?;
            counted.parse().ok()
        };
        text.lines().map(|line| times(line).unwrap_or(1)).sum()
    }

    fn walk(&self, path: &str) -> Answer<Ino> {
        let mut at = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entry = errno(self.tree.lookup(at, OsStr::new(name), patient()))?;
            at = entry.attributes.ino;
        }
        Ok(at)
    }

    fn kind(&self, ino: Ino) -> Answer<FileKind> {
        Ok(errno(self.tree.attributes(ino, patient()))?.attributes.kind)
    }

    fn directory<'a>(&self, path: &'a str) -> Answer<(Ino, &'a OsStr)> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let ino = self.walk(directory)?;
        if self.kind(ino)? != FileKind::Directory {
            return Err(libc::ENOTDIR);
        }
        Ok((ino, OsStr::new(name)))
    }

    fn at(&self, fd: usize) -> &Open {
        self.open[fd].as_ref().unwrap()
    }

    fn set(&self, ino: Ino, handle: Option<HandleId>, change: SetAttributes) -> Answer {
        errno(self.tree.set_attributes(ino, handle, &change, patient())).map(drop)
    }
}

impl World for TreeWorld {
    fn open(&mut self, fd: usize, path: &str, how: How) -> Answer {
        let (directory, name) = self.directory(path)?;
        let open = OpenForWriting {
            truncate: how.truncate,
            append: how.append,
            ..OpenForWriting::default()
        };
        let (ino, handle) = if how.create {
            let how = Creation {
                mode: 0o666,
                exclusive: how.exclusive,
                open,
            };
            let made = self.tree.create(directory, name, how, caller(), patient());
            let (entry, handle) = errno(made)?;
            (entry.attributes.ino, handle)
        } else {
            let entry = errno(self.tree.lookup(directory, name, patient()))?;
            let ino = entry.attributes.ino;
            let handle = match how.write {
                true => self.tree.open_for_writing(ino, open, patient()),
                false => self.tree.open(ino, patient()),
            };
            (ino, errno(handle)?)
        };
        self.open[fd] = Some(Open {
            ino,
            handle,
            position: 0,
        });
        // The kernel asks for the size next.
        let _ = self.tree.open_attributes(ino, handle, patient());
        Ok(())
    }

    fn write(&mut self, fd: usize, data: &[u8]) -> Answer {
        let position = self.at(fd).position;
        self.write_at(fd, position, data)?;
        self.open[fd].as_mut().unwrap().position += data.len() as u64;
        Ok(())
    }

    fn write_at(&mut self, fd: usize, at: u64, data: &[u8]) -> Answer {
        if data.is_empty() {
            return Ok(());
        }
        errno(self.tree.write(self.at(fd).handle, at, data, patient()))
    }

    fn read(&mut self, fd: usize) -> Answer<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let part = errno(self.tree.read(self.at(fd).handle, all.len() as u64, 13))?;
            if part.is_empty() {
                return Ok(all);
            }
            all.extend(part);
        }
    }

    fn close_duplicate(&mut self, fd: usize) -> Answer {
        errno(self.tree.flush(self.at(fd).handle, patient()))
    }

    fn close(&mut self, fd: usize) -> Answer {
        let outcome = self.close_duplicate(fd);
        let open = self.open[fd].take().unwrap();
        let _ = self.tree.release(open.handle, patient());
        outcome
    }

    fn set_length(&mut self, fd: usize, length: u64) -> Answer {
        let open = self.at(fd);
        let change = SetAttributes {
            size: Some(length),
            ..SetAttributes::default()
        };
        self.set(open.ino, Some(open.handle), change)
    }

    fn sync(&mut self, fd: usize) -> Answer {
        let open = self.at(fd);
        errno(self.tree.sync_file(open.ino, open.handle, patient()))
    }

    fn truncate(&mut self, path: &str, length: u64) -> Answer {
        let ino = self.walk(path)?;
        if self.kind(ino)? == FileKind::Directory {
            return Err(libc::EISDIR);
        }
        let change = SetAttributes {
            size: Some(length),
            ..SetAttributes::default()
        };
        self.set(ino, None, change)
    }

    fn unlink(&mut self, path: &str) -> Answer {
        let (directory, name) = self.directory(path)?;
        errno(self.tree.unlink(directory, name, patient()))
    }

    fn rename(&mut self, from: &str, to: &str) -> Answer {
        let (from, to) = (self.directory(from)?, self.directory(to)?);
        // The kernel looks both up before it asks.
        let _ = self.tree.lookup(from.0, from.1, patient());
        let _ = self.tree.lookup(to.0, to.1, patient());
        errno(self.tree.rename(from, to, RenameHow::default(), patient()))
    }

    fn make_dir(&mut self, path: &str) -> Answer {
        let (directory, name) = self.directory(path)?;
        let made = self
            .tree
            .make_dir(directory, name, 0o777, maker(), patient());
        errno(made).map(drop)
    }

    fn remove_dir(&mut self, path: &str) -> Answer {
        let (directory, name) = self.directory(path)?;
        errno(self.tree.remove_dir(directory, name, None, patient()))
    }

    fn set_mode(&mut self, path: &str, mode: u32) -> Answer {
        let metadata = MetadataChange {
            mode: Some(mode),
            ..MetadataChange::default()
        };
        let change = SetAttributes {
            metadata,
            pid: caller().pid,
            ..SetAttributes::default()
        };
        self.set(self.walk(path)?, None, change)
    }

    fn set_times(&mut self, path: &str, seconds: u64) -> Answer {
        let time = Some(Time::At(UNIX_EPOCH + Duration::from_secs(seconds)));
        let metadata = MetadataChange {
            atime: time,
            mtime: time,
            ..MetadataChange::default()
        };
        let change = SetAttributes {
            metadata,
            pid: maker().pid,
            ..SetAttributes::default()
        };
        self.set(self.walk(path)?, None, change)
    }

    fn sync_dir(&mut self, path: &str) -> Answer {
        let ino = self.walk(path)?;
        if self.kind(ino)? != FileKind::Directory {
            return Err(libc::ENOTDIR);
        }
        errno(self.tree.sync_dir(ino, patient()))
    }

    fn list(&mut self, path: &str) -> Answer<BTreeSet<String>> {
        let directory = self.walk(path)?;
        let handle = errno(self.tree.open_dir(directory, patient()))?;
        let all = errno(self.tree.read_dir(handle))?;
        let names: Vec<String> = all
            .iter()
            .map(|listed| {
                let found = self.tree.look_at(directory, &all, listed, patient());
                let (name, found) = found.unwrap_or_else(|error| panic!("{listed:?}: {error}"));
                assert_eq!(name, listed.name);
                assert_eq!(found.entry.attributes.kind, listed.kind);
                self.tree.take_back_answer(found);
                listed.name.to_str().unwrap().to_owned()
            })
            .collect();
        errno(self.tree.release(handle, patient()))?;
        let set: BTreeSet<String> = names.iter().cloned().collect();
        assert_eq!(set.len(), names.len(), "twice in {path}: {names:?}");
        Ok(set)
    }

    fn stat(&mut self, path: &str) -> Answer<Stat> {
        let ino = self.walk(path)?;
        let attributes = errno(self.tree.attributes(ino, patient()))?.attributes;
        let mtime = attributes.mtime.duration_since(UNIX_EPOCH).unwrap();
        assert!(attributes.mtime <= SystemTime::now() + Duration::from_secs(60));
        Ok(Stat {
            is_directory: attributes.kind == FileKind::Directory,
            size: attributes.size,
            mode: attributes.mode,
            mtime: mtime.as_secs(),
        })
    }

    fn content(&mut self, path: &str) -> Answer<Vec<u8>> {
        let ino = self.walk(path)?;
        let handle = errno(self.tree.open(ino, patient()))?;
        let all = errno(self.tree.read(handle, 0, 100_000))?;
        errno(self.tree.release(handle, patient()))?;
        Ok(all)
    }

    fn leave_alone(&mut self) {
        std::thread::sleep(Duration::from_millis(250));
        while self
            .tree
            .settle()
            .is_some_and(|next| next <= std::time::Instant::now())
        {}
    }

    fn remount(&mut self) {
        self.tree.finish();
        self.tree = Self::mounted(self.tokendir.path(), self.backend);
    }
}
