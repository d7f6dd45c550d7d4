//! The tree that a user sees: names, texts, sizes, modes, inodes and `.tokenfs`, over any [`Store`].
//!
//! Knows nothing of FUSE: its operations are the system calls' in plain types, and `docs/tree.md` is their contract. An adapter
//! translates, and sends what [`Tree::stale`] returns to whoever remembers answers.
//!
//! The parts: [`name`] and [`text`] spell attributes, [`mode`] masks, [`label`] spells `by-label`; [`node`] says what an inode
//! stands for, [`inode`] which of them the kernel knows; `view` looks a node up in the store, `layout` one of `.tokenfs/file`;
//! this file has the operations that read, and `stale` what becomes of answers when the store changes.
//!
//! Writing: `write` has the descriptors, `close` what becomes of them, `commit` how a value gets into its object, `follow` what an open file
//! follows; `place`, `entries`, `rename` and `setattr` have what is made, removed, renamed and set; `draft` and `scratch` hold what the store does not
//! have, `settle` writes it, `dates` has the times that attributes have beside the store's, and `building` keeps others off a token at the moment that it is published.
//!
//! Locks: each table (inodes, handles, labels, drafts, dates, scratch, gates, files that are being closed) has one. None is held while the store is asked, and
//! none while another of them is taken. A writer's content, then its state, can be taken inside any of them.

mod budget;
mod building;
mod by_label;
mod close;
mod commit;
mod dates;
mod draft;
mod entries;
mod follow;
mod handle;
pub mod inode;
pub mod label;
mod layout;
pub mod mode;
pub mod name;
pub mod node;
mod place;
mod rename;
mod scratch;
mod setattr;
mod settle;
mod slot;
mod stale;
pub mod text;
mod view;
mod write;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::watch::Coverage;
use crate::store::{Object, ObjectName, Patience, Store, Token, TokenName};

use draft::Drafts;
pub use entries::{Caller, Creation};
pub use handle::HandleId;
use handle::{Handle, Handles};
use inode::InodeTable;
pub use node::Ino;
use node::Node;
pub use rename::RenameHow;
use scratch::Scratch;
pub use scratch::ScratchId;
pub use setattr::SetAttributes;
pub use stale::{Listener, Stale};
use view::{BY_LABEL, LAYOUT, LOG};
pub(crate) use view::{CONTROL, SERVER};
pub use write::OpenForWriting;

/// How a tree is shown.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The bits that no mode has: `objectstore.umask` or'ed with the process umask.
    pub mask: u32,
    /// The owner of the files in `.tokenfs`.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// What `.tokenfs/server` says: who serves the mount. Without it there is no such file.
    pub server: Option<String>,
    /// How long an answer may be remembered where every change is reported.
    pub kept: Duration,
    /// How long elsewhere: what others change shows up this much later at most.
    pub unwatched: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mask: 0o077,
            uid: 0,
            gid: 0,
            server: None,
            // A minute, not for ever: should a change ever go unnoticed, it does not stay so.
            kept: Duration::from_secs(60),
            unwatched: Duration::from_millis(500),
        }
    }
}

/// What a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
}

/// What `stat` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// In bytes: exactly what a read gives.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub atime: SystemTime,
    /// Last modification.
    pub mtime: SystemTime,
    /// Last change of status.
    pub ctime: SystemTime,
}

/// An answer that may be remembered for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What `stat` says.
    pub attributes: Attributes,
    /// For how long.
    pub valid: Duration,
    /// Tells apart what has the same number one after the other.
    pub generation: u64,
}

/// What there is to say of something, before it has been said.
#[derive(Clone, Debug)]
pub struct Look {
    /// The answer.
    pub entry: Entry,
    node: Node,
    seen: Option<Arc<Object>>,
}

/// One name in a directory.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The name.
    pub name: OsString,
    /// What it is.
    pub kind: FileKind,
    /// The number that it has.
    pub ino: Ino,
    node: Node,
}

/// A mounted store.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    settings: Settings,
    diagnostics: Arc<Diagnostics>,
    coverage: Coverage,
    inodes: Mutex<InodeTable>,
    handles: Mutex<Handles>,
    labels: Mutex<by_label::Index>,
    drafts: Mutex<Drafts>,
    dates: Mutex<dates::AllDates>,
    scratch: Mutex<Scratch>,
    budget: Mutex<budget::Budget>,
    gates: Mutex<building::Gates>,
    listener: OnceLock<Listener>,
    /// Objects that SoftHSM has brought back.
    returned: Mutex<Vec<(TokenName, ObjectName)>>,
    /// Files whose last descriptor is closed and whose content is still being committed, and how long that may take.
    closing: Mutex<HashMap<Node, Instant>>,
    /// Whether there may be something to settle, and the signal for it.
    work: (Mutex<bool>, Condvar),
    /// Counts the changes that were reported.
    changes: AtomicU64,
    numbers: AtomicU64,
    mounted_at: SystemTime,
}

impl Tree {
    /// The tree of `store`.
    #[must_use]
    pub fn new(store: Store, settings: Settings, diagnostics: Arc<Diagnostics>) -> Self {
        Self {
            coverage: store.coverage(),
            store,
            settings,
            diagnostics,
            inodes: Mutex::default(),
            handles: Mutex::default(),
            labels: Mutex::default(),
            drafts: Mutex::default(),
            dates: Mutex::default(),
            scratch: Mutex::default(),
            budget: Mutex::default(),
            gates: Mutex::default(),
            listener: OnceLock::new(),
            returned: Mutex::default(),
            closing: Mutex::default(),
            work: (Mutex::default(), Condvar::new()),
            changes: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
            mounted_at: SystemTime::now(),
        }
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What is watched: to be given to the [`crate::store::watch::Watcher`] whose changes go to [`Tree::stale`].
    #[must_use]
    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// The ring behind `.tokenfs/log`.
    #[must_use]
    pub fn diagnostics(&self) -> &Arc<Diagnostics> {
        &self.diagnostics
    }

    /// Looks `name` up in the directory `parent`. The answer counts as one that has to be taken back with
    /// [`Tree::forget`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::NotADirectory`], [`ErrorKind::NameTooLong`], and what the store fails with.
    pub fn lookup(&self, parent: Ino, name: &OsStr, patience: Patience) -> Result<Entry> {
        if name.len() > NAME_MAX {
            return Err(Error::new(ErrorKind::NameTooLong, "the name is too long"));
        }
        let directory = self.node(parent)?;
        let look = self.noted(
            self.child(&directory, name, patience)
                .and_then(|node| self.look(node, patience)),
        )?;
        self.tell(parent, &look);
        Ok(look.entry)
    }

    /// What `stat` says of one entry of a directory that is being listed. It counts as an answer once [`Tree::tell`] is
    /// called with it.
    ///
    /// # Errors
    /// As [`Tree::lookup`]; [`ErrorKind::NotFound`] if it is gone by now.
    pub fn look_at(&self, listed: &Listed, patience: Patience) -> Result<Look> {
        self.noted(self.look(listed.node.clone(), patience))
    }

    /// Counts an answer about something in the directory `parent`: the kernel has been told.
    pub fn tell(&self, parent: Ino, look: &Look) {
        lock(&self.inodes).remember(&look.node, parent, look.seen.clone());
    }

    /// Takes back `count` answers that named `ino`.
    pub fn forget(&self, ino: Ino, count: u64) {
        let forgotten = lock(&self.inodes).forget(ino, count);
        if let Some(Node::Scratch(id)) = forgotten {
            lock(&self.scratch).forget(id);
        }
    }

    /// What `stat` says to the process `pid`: who is writing a file sees the size that it has for them, and who has something open that is
    /// gone by now sees what it was. (The kernel does not say through which descriptor `fstat` asks.)
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn attributes_for(&self, ino: Ino, pid: u32, patience: Patience) -> Result<Entry> {
        let mut entry = match self.attributes(ino, patience) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let unlinked = lock(&self.inodes)
                    .get(ino)
                    .is_some_and(|inode| inode.unlinked);
                let opened = lock(&self.handles).at_open(ino, (!unlinked).then_some(pid));
                let attributes = opened.ok_or(error)?;
                return Ok(Entry {
                    attributes,
                    valid: Duration::ZERO,
                    generation: 0,
                });
            }
            answer => answer?,
        };
        if entry.attributes.kind == FileKind::File {
            let (is_written, size) = self.written_size(&self.node(ino)?, pid);
            if is_written {
                entry.attributes.size = size.unwrap_or(entry.attributes.size);
                entry.valid = Duration::ZERO;
            }
        }
        Ok(entry)
    }

    /// What `stat` says of an open file: its size is that of the copy that is read and written through `handle`, and it says it of
    /// one that is unlinked too.
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn open_attributes(&self, ino: Ino, handle: HandleId, patience: Patience) -> Result<Entry> {
        let (at_open, size) = match lock(&self.handles).get(handle) {
            Some(Handle::Content(content, attributes)) => (*attributes, content.len() as u64),
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => {
                (writer.attributes, lock(&writer.content).len() as u64)
            }
            _ => return self.attributes(ino, patience),
        };
        let mut entry = match self.attributes(ino, patience) {
            Err(error) if error.kind() == ErrorKind::NotFound => Entry {
                attributes: Attributes { ino, ..at_open },
                valid: Duration::ZERO,
                generation: 0,
            },
            answer => answer?,
        };
        if entry.attributes.kind == FileKind::File && entry.attributes.size != size {
            entry.attributes.size = size;
            entry.valid = Duration::ZERO;
        }
        Ok(entry)
    }

    /// What `stat` says.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is gone by now, and what the store fails with.
    pub fn attributes(&self, ino: Ino, patience: Patience) -> Result<Entry> {
        let mut look = self.noted(self.look(self.node(ino)?, patience))?;
        look.entry.attributes.ino = ino;
        let mut inodes = lock(&self.inodes);
        // Under a number that is not its own, which comes of a rename onto it, nobody would find it to say that it has changed.
        if inodes.number(&look.node) != ino {
            look.entry.valid = Duration::ZERO;
        }
        if let Some(inode) = inodes.get_mut(ino) {
            inode.tell(look.seen);
        }
        drop(inodes);
        Ok(look.entry)
    }

    fn look(&self, node: Node, patience: Patience) -> Result<Look> {
        let begun = Instant::now();
        self.wait_until_closed(&node, patience)?;
        let (mut attributes, seen) = self.describe(&node, patience)?;
        let generation = {
            let inodes = lock(&self.inodes);
            attributes.ino = inodes.number(&node);
            inodes.generation(attributes.ino)
        };
        // A change that was reported meanwhile is reported once more a moment later, for answers that are on their way. One that took
        // longer than that, in a thread that had to wait or on a machine that is busy, may be old news that nobody takes back.
        let valid = if begun.elapsed() > LONG_AGO {
            Duration::ZERO
        } else {
            self.validity(&node)
        };
        Ok(Look {
            entry: Entry {
                attributes,
                valid,
                generation,
            },
            node,
            seen,
        })
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is none (`readlink(2)`).
    pub fn read_link(&self, ino: Ino) -> Result<OsString> {
        match self.node(ino)? {
            Node::ObjectByLabel(token, object) => Ok(by_label::target(&token, &object)),
            _ => Err(Error::new(ErrorKind::Invalid, "not a symbolic link")),
        }
    }

    /// Opens a file for reading. What is read from it is the version that it was opened with, to the end.
    ///
    /// # Errors
    /// [`ErrorKind::IsADirectory`]; [`ErrorKind::NotFound`] if it is gone by now, and what the store fails with.
    pub fn open(&self, ino: Ino, patience: Patience) -> Result<HandleId> {
        let node = self.node(ino)?;
        if let Node::Scratch(id) = &node {
            return self.open_scratch(&node, *id, OpenForWriting::default());
        }
        if let Node::FileInLayout(token, file) = &node {
            let opened = self.open_in_layout(ino, token, file, patience);
            return self.noted(opened.map_err(|error| error.of(&self.path_of(&node))));
        }
        self.wait_until_closed(&node, patience)?;
        let (mut attributes, object) = self.noted(self.describe(&node, patience))?;
        attributes.ino = ino;
        if attributes.kind == FileKind::Directory {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        }
        let content = match object {
            None => self.control_file(&node).into_bytes(),
            Some(object) => match self.fresh_content(&node) {
                Some(content) if view::value(&node, &object).is_none() => content,
                _ => self
                    .noted(view::content(&node, &object))?
                    .ok_or_else(|| Error::new(ErrorKind::IsADirectory, "a directory"))?,
            },
        };
        Ok(self.open_handle(Handle::Content(Arc::new(content), attributes)))
    }

    /// Reads at most `size` bytes at `offset`; fewer only at the end.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the handle is not known.
    pub fn read(&self, handle: HandleId, offset: u64, size: u32) -> Result<Vec<u8>> {
        let content = match lock(&self.handles).get(handle) {
            Some(Handle::Content(content, _)) => Arc::clone(content),
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => {
                return Ok(slice(&lock(&writer.content), offset, size));
            }
            _ => return Err(Error::not_found("no such handle")),
        };
        Ok(slice(&content, offset, size))
    }

    /// Opens a directory: its entries as they are now.
    ///
    /// # Errors
    /// [`ErrorKind::NotADirectory`], and what the store fails with.
    pub fn open_dir(&self, ino: Ino, patience: Patience) -> Result<HandleId> {
        let node = self.node(ino)?;
        let (mut attributes, _) = self.noted(self.describe(&node, patience))?;
        attributes.ino = ino;
        let children = self.noted(self.children(&node, patience))?;
        let listing: Vec<Listed> = {
            let inodes = lock(&self.inodes);
            children
                .into_iter()
                .map(|(name, kind, node)| Listed {
                    ino: inodes.number(&node),
                    name,
                    kind,
                    node,
                })
                .collect()
        };
        Ok(self.open_handle(Handle::Listing(listing.into(), attributes)))
    }

    /// The entries of an open directory, without `.` and `..`. They stay as they are while it is open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the handle is not known.
    pub fn read_dir(&self, handle: HandleId) -> Result<Arc<[Listed]>> {
        match lock(&self.handles).get(handle) {
            Some(Handle::Listing(listing, _)) => Ok(Arc::clone(listing)),
            _ => Err(Error::not_found("no such handle")),
        }
    }

    /// The directory that `ino` is in.
    #[must_use]
    pub fn parent(&self, ino: Ino) -> Ino {
        lock(&self.inodes)
            .get(ino)
            .map_or(node::ROOT, |inode| inode.parent)
    }

    fn open_handle(&self, handle: Handle) -> HandleId {
        lock(&self.handles).insert(handle)
    }

    /// A token by its name, unless it is one of a tokendir that is not SoftHSM's any more. Where the tokendir is watched, the watch
    /// ends with that.
    fn token(&self, name: &TokenName) -> Result<Arc<dyn Token>> {
        if !self.coverage.has_tokendir() {
            self.store.check_in_place()?;
        }
        self.store.token(name)
    }

    /// Whether what is said of `node` will change without a change of the store.
    fn is_pending(&self, node: &Node, token: &TokenName) -> bool {
        let drafts = lock(&self.drafts);
        drafts.build(token).is_some()
            || *node == Node::Token(token.clone()) && drafts.changed(token).is_some()
            || node
                .object()
                .is_some_and(|(token, id)| drafts.get(&(token.clone(), id.clone())).is_some())
    }

    /// What `node` is called in the mount, from its root, for messages.
    fn path_of(&self, node: &Node) -> PathBuf {
        let mut path = PathBuf::new();
        match node {
            Node::Root => path.push("/"),
            Node::Control => path.push(CONTROL),
            Node::Log => path.extend([CONTROL, LOG]),
            Node::ByLabel | Node::TokenByLabel(_) | Node::ObjectByLabel(..) => {
                path.extend([CONTROL, BY_LABEL]);
            }
            Node::Layout | Node::TokenLayout(_) | Node::FileInLayout(..) => {
                path.extend([CONTROL, LAYOUT]);
            }
            _ => {}
        }
        if let Some(token) = node.token() {
            path.push(token.as_os_str());
        }
        if let Some((_, id)) = node.object() {
            path.push(match id {
                crate::store::ObjectId::Token => OsStr::new(view::TOKEN),
                crate::store::ObjectId::Object(name) => name.as_os_str(),
            });
        }
        if let Node::FileInLayout(_, file) = node {
            path.push(file.name());
        }
        if let Some((_, _, slot)) = slot::Slot::of(node) {
            if let Some(map) = slot.map {
                path.push(&*name::file_name(slot::map_key(map)));
            }
            path.push(&*name::file_name(slot.key));
        }
        path
    }

    fn node(&self, ino: Ino) -> Result<Node> {
        let inodes = lock(&self.inodes);
        inodes
            .get(ino)
            .map(|inode| inode.node.clone())
            .ok_or_else(unknown_inode)
    }

    /// How long an answer about `node` may be remembered.
    fn validity(&self, node: &Node) -> Duration {
        if let Some(token) = node.token()
            && self.is_pending(node, token)
        {
            return Duration::ZERO;
        }
        let covered = match node {
            Node::Token(token)
            | Node::Object(token, _)
            | Node::Attribute(token, _, _)
            | Node::MapEntry(token, _, _, _)
            | Node::TokenLayout(token)
            | Node::FileInLayout(token, _) => self.coverage.has_token(token),
            Node::Root | Node::Control | Node::Layout => self.coverage.has_tokendir(),
            // Made on the spot from what is remembered anyway.
            Node::Log
            | Node::Server
            | Node::ByLabel
            | Node::TokenByLabel(_)
            | Node::ObjectByLabel(_, _)
            | Node::Scratch(_) => {
                return Duration::ZERO;
            }
        };
        if covered {
            self.settings.kept
        } else {
            self.settings.unwatched
        }
    }

    /// Records a failure that a user will want explained.
    fn noted<T>(&self, outcome: Result<T>) -> Result<T> {
        if let Err(error) = &outcome {
            // What is absent is an ordinary answer, and so is what was asked of the wrong thing, which has no path.
            let ordinary = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::WouldBlock);
            if !ordinary && error.path().is_some() {
                self.diagnostics.error(error);
            }
        }
        outcome
    }

    /// A number that no one else gets.
    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// How many changes have been reported.
    fn change_count(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }
}

/// How long an answer can take to be made, and still be remembered: well below what [`Tree::stale`] says things again after.
const LONG_AGO: Duration = Duration::from_millis(20);

/// The longest name of a directory entry (`limits.h`).
const NAME_MAX: usize = 255;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whatever panicked did not do so between two halves of a change: each change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown_inode() -> Error {
    Error::not_found("no such inode")
}

fn slice(content: &[u8], offset: u64, size: u32) -> Vec<u8> {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(content.len());
    let end = start.saturating_add(size as usize).min(content.len());
    content.get(start..end).unwrap_or_default().to_vec()
}
