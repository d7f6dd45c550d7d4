//! What changes in a store, as `inotify(7)` tells it.
//!
//! A [`Watcher`] watches the tokendir and every token in it. Its [`Coverage`] says which tokens it watches: only for those
//! may somebody remember things for longer than a moment. A token counts as covered from the time when its watch stands, and
//! [`Change::Token`] is reported right after that, so that what was remembered before is dropped.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::PipeReader;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::statfs::{FsType, fstatfs, statfs};

use super::file::TOKEN_OBJECT;
use super::layout::LayoutFile;
use super::leftover::NEW_SUFFIX;
use super::tokendir::{DATABASE, Store, replaced};
use super::{ObjectId, TokenName};
use crate::error::{Error, ErrorKind, Result};

/// Something in the store is not as it was.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// The tokendir's own times, mode or owner.
    Tokendir,
    /// A token appeared, vanished, or became something else; or it is watched from now on.
    Token(TokenName),
    /// Times, mode or owner of a token's directory, and what is listed in it.
    Directory(TokenName),
    /// One object of a token of the `file` backend: changed, made or destroyed.
    Object(TokenName, ObjectId),
    /// A file of a token of the `file` backend that holds no object: its generation, or a lock file.
    File(TokenName, LayoutFile),
    /// Anything in a token of the `db` backend.
    Database(TokenName),
    /// Anything anywhere: the kernel has dropped events.
    Everything,
}

/// The tokens that are watched.
#[derive(Clone, Debug, Default)]
pub struct Coverage(Arc<RwLock<State>>);

#[derive(Debug, Default)]
struct State {
    /// Whether there is nothing that could change.
    everything: bool,
    root: bool,
    tokens: HashSet<TokenName>,
}

impl Coverage {
    /// That of a store in which nothing changes.
    #[must_use]
    pub fn complete() -> Self {
        let coverage = Self::default();
        coverage.write(|state| state.everything = true);
        coverage
    }

    /// Whether every change of the token is reported.
    #[must_use]
    pub fn has_token(&self, name: &TokenName) -> bool {
        self.read(|state| state.everything || state.root && state.tokens.contains(name))
    }

    /// Whether every change of the tokendir itself is reported.
    #[must_use]
    pub fn has_tokendir(&self) -> bool {
        self.read(|state| state.everything || state.root)
    }

    fn read<T>(&self, ask: impl FnOnce(&State) -> T) -> T {
        ask(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Watches a store.
#[derive(Debug)]
pub struct Watcher {
    inotify: Inotify,
    path: PathBuf,
    root: WatchDescriptor,
    tokens: HashMap<WatchDescriptor, TokenName>,
    coverage: Coverage,
}

/// How many times events are read before what they say is told.
const AT_ONCE: usize = 64;

// IN_MODIFY is what the kernel says of a time that is set alone.
const ROOT_MASK: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_ONLYDIR);

// Not IN_CLOSE_WRITE: what matters is each write, and the last one comes before the close.
const TOKEN_MASK: AddWatchFlags = ROOT_MASK.union(AddWatchFlags::IN_DONT_FOLLOW);

/// File systems on which inotify does not tell what other hosts, or what the server, changes (`inotify(7)`, "Limitations").
fn is_remote(kind: FsType) -> bool {
    const REMOTE: [i64; 12] = [
        0x6969,      // NFS
        0xFF53_4D42, // CIFS
        0xFE53_4D42, // SMB2
        0x517B,      // SMB
        0x6573_5546, // FUSE
        0x0102_1997, // 9P
        0x00C3_6400, // CEPH
        0x5346_414F, // AFS
        0x7461_636F, // OCFS2
        0x0116_1970, // GFS2
        0x0BD0_0BD0, // Lustre
        0x786F_4256, // vboxsf
    ];
    REMOTE.contains(&kind.0)
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.coverage.write(|state| *state = State::default());
    }
}

impl Watcher {
    /// Starts to watch `store` and all the directories that it has.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on a file system whose changes inotify does not tell; what inotify fails with, which is
    /// mostly a limit of the system (`fs.inotify.max_user_instances`).
    pub fn new(store: &Store, coverage: Coverage) -> Result<Self> {
        let kind = fstatfs(store.directory()?)
            .map_err(|errno| Error::system("statfs", errno).at(store.path()))?
            .filesystem_type();
        if is_remote(kind) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "inotify does not report what others change on this kind of file system",
            )
            .at(store.path()));
        }
        let failed = |errno| Error::system("inotify", errno).at(store.path());
        let inotify =
            Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(failed)?;
        let root = inotify.add_watch(store.path(), ROOT_MASK).map_err(failed)?;
        coverage.write(|state| state.root = true);
        let mut watcher = Self {
            inotify,
            path: store.path().to_path_buf(),
            root,
            tokens: HashMap::new(),
            coverage,
        };
        watcher.add_all();
        Ok(watcher)
    }

    /// Waits for changes and appends them to `changes`, each once; `false` when the writing end of `stop` has been closed.
    ///
    /// # Errors
    /// What inotify or `poll` fails with. Nothing is covered any more when the watcher is dropped, as it should be then.
    pub fn wait(&mut self, stop: &PipeReader, changes: &mut Vec<Change>) -> Result<bool> {
        let failed = |what, errno, path: &PathBuf| Error::system(what, errno).at(path);
        loop {
            let mut ready = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed("poll", errno, &self.path)),
            }
            if ready[1].any().unwrap_or(false) {
                return Ok(false);
            }
            // Whoever changes files without a pause has the rest told of the next time.
            for _ in 0..AT_ONCE {
                match self.inotify.read_events() {
                    Ok(events) => {
                        for event in events {
                            self.translate(&event, changes)?;
                        }
                    }
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(failed("inotify", errno, &self.path)),
                }
            }
            if !changes.is_empty() {
                let mut seen = HashSet::new();
                changes.retain(|change| seen.insert(change.clone()));
                return Ok(true);
            }
        }
    }

    fn translate(&mut self, event: &InotifyEvent, changes: &mut Vec<Change>) -> Result<()> {
        let mask = event.mask;
        if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            // Directories may have come meanwhile. Adding a watch that stands already changes nothing.
            self.add_all();
            changes.push(Change::Everything);
            return Ok(());
        }
        if event.wd == self.root {
            return self.translate_root(event, changes);
        }
        if mask.contains(AddWatchFlags::IN_IGNORED) {
            // The directory is gone; the root has told of it, or the directory was moved and is told of here.
            if let Some(name) = self.tokens.remove(&event.wd) {
                self.coverage.write(|state| {
                    state.tokens.remove(&name);
                });
                changes.push(Change::Token(name));
            }
            return Ok(());
        }
        let Some(name) = self.tokens.get(&event.wd).cloned() else {
            return Ok(());
        };
        let Some(file) = &event.name else {
            changes.push(Change::Directory(name));
            return Ok(());
        };
        changes.extend(content_change(&name, file));
        let listing = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE;
        if mask.intersects(listing) {
            let marker = file == TOKEN_OBJECT || file == DATABASE;
            changes.push(if marker {
                Change::Token(name)
            } else {
                Change::Directory(name)
            });
        }
        Ok(())
    }

    fn translate_root(&mut self, event: &InotifyEvent, changes: &mut Vec<Change>) -> Result<()> {
        let mask = event.mask;
        if mask.intersects(
            AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_UNMOUNT,
        ) {
            return Err(replaced().at(&self.path));
        }
        if mask.contains(AddWatchFlags::IN_MODIFY) && event.name.is_some() {
            // The time of a token's directory, which the watch of that tells of, or something that is none of SoftHSM's.
            return Ok(());
        }
        changes.push(Change::Tokendir);
        let Some(name) = event.name.as_deref().and_then(TokenName::new) else {
            return Ok(());
        };
        if mask.intersects(AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM) {
            self.forget(&name);
        }
        if mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
            && mask.contains(AddWatchFlags::IN_ISDIR)
        {
            // One that cannot be watched is not covered, and so is not remembered for long: that is no failure.
            let _ = self.add(&name);
        }
        changes.push(Change::Token(name));
        Ok(())
    }

    fn add_all(&mut self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else {
            return;
        };
        for entry in entries.flatten() {
            if let Some(name) = TokenName::new(&entry.file_name()) {
                let _ = self.add(&name);
            }
        }
    }

    fn add(&mut self, name: &TokenName) -> Result<()> {
        let path = self.path.join(name.as_os_str());
        // A token can be a mount of its own.
        if statfs(&path).is_ok_and(|stat| is_remote(stat.filesystem_type())) {
            return Ok(());
        }
        match self.inotify.add_watch(&path, TOKEN_MASK) {
            Ok(descriptor) => {
                self.tokens.insert(descriptor, name.clone());
                self.coverage.write(|state| {
                    state.tokens.insert(name.clone());
                });
                Ok(())
            }
            // Gone again, or not for us to look into.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP) => Ok(()),
            Err(errno) => Err(Error::system("inotify", errno).at(path)),
        }
    }

    fn forget(&mut self, name: &TokenName) {
        self.coverage.write(|state| {
            state.tokens.remove(name);
        });
        let descriptor = self
            .tokens
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(wd, _)| *wd);
        if let Some(descriptor) = descriptor {
            self.tokens.remove(&descriptor);
            // Fails if the directory is gone, which has removed the watch.
            let _ = self.inotify.rm_watch(descriptor);
        }
    }
}

/// What the change of a file in a token's directory means.
fn content_change(token: &TokenName, file: &OsString) -> Option<Change> {
    if let Some(rest) = file.as_bytes().strip_prefix(DATABASE.as_bytes()) {
        // What is said of a token that is being built is hardly remembered. When it is published it gets its name, which is a change of the token.
        let is_building = rest.starts_with(NEW_SUFFIX.as_bytes());
        // With the journal goes the last trace of a transaction: it is committed, or rolled back.
        return (!is_building).then(|| Change::Database(token.clone()));
    }
    Some(match LayoutFile::parse(file)? {
        LayoutFile::Object(id) => Change::Object(token.clone(), id),
        other => Change::File(token.clone(), other),
    })
}
