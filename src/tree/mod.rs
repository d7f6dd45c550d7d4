//! The tree that a user sees: names, texts, sizes, modes, inodes and `.tokenfs`, over any [`Store`].
//!
//! Knows nothing of FUSE: its operations are the system calls' in plain types, and `docs/tree.md` is their contract. An adapter
//! translates, and sends what [`Tree::stale`] returns to whoever remembers answers.
//!
//! The parts: [`name`] and [`text`] spell attributes, [`mode`] masks, [`label`] spells `by-label`; [`node`] says what an inode
//! stands for, [`inode`] which of them the kernel knows; `view` looks a node up in the store, `layout` one of `.tokenfs/file`;
//! `object` has objects as the mount shows them, `read` the operations that read, `listing` directories that are read, `opened` what they say of a file to whoever has an old version of it open, and `stale` what becomes of answers when the store changes.
//!
//! Writing: `write` has the descriptors, `cut` what cuts and extends, `body` what a file holds while it is written, `early` what can be told of a text by then, `close` what becomes of them, `commit` how a value
//! gets into its object, `follow` what an open file follows; `place`, `entries`, `remove`, `rename`, `publish` and `setattr` have what is made, removed, renamed and set, `rights` who may do that where the kernel cannot tell; `draft` (what is pending of one object), `drafts` (all that is), `makers` (by whom) and `scratch` hold what the store does not
//! have, `due` says when it is time to write that, `settle` writes it, `dates` has the times that attributes have beside the store's, and `building` keeps others off a token at the moment that it is published.
//!
//! Locks: each table (inodes, handles, labels, drafts, dates, scratch, spots, files that are being closed) has one. None is held while the store is asked, and
//! none while another of them is taken, but handles inside inodes, and scratch inside both. The store asks in the middle of a change whether that is wanted still, for which drafts and scratch are looked at. A writer's content, then its state, can be taken inside any of them.

mod body;
mod budget;
mod building;
mod by_label;
mod close;
mod commit;
mod cut;
mod dates;
mod draft;
mod drafts;
mod due;
mod early;
mod entries;
mod follow;
mod handle;
pub mod inode;
pub mod label;
mod layout;
mod listing;
mod makers;
pub mod mode;
pub mod name;
pub mod node;
mod object;
mod opened;
mod place;
mod publish;
mod read;
mod remove;
mod rename;
mod rights;
mod scratch;
mod setattr;
mod settle;
mod slot;
mod stale;
mod still;
pub mod text;
mod view;
mod write;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Kind;
use crate::store::watch::Coverage;
use crate::store::{Object, Patience, Store, Token, TokenName};

use drafts::Drafts;
pub use due::Task;
pub use entries::{Caller, Creation};
pub use handle::HandleId;
use handle::{Handle, Handles, Writer};
use inode::InodeTable;
pub use node::Ino;
use node::Node;
use opened::Processes;
pub use rename::RenameHow;
use scratch::Scratch;
pub use scratch::ScratchId;
pub use setattr::SetAttributes;
pub use stale::{Listener, Stale};
use view::BY_LABEL;
pub(crate) use view::{CONTROL, LAYOUT, LOG, SERVER, TOKEN};
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
struct Look {
    /// The answer.
    entry: Entry,
    node: Node,
    seen: Option<Arc<Object>>,
}

/// What was found of an entry of a directory, and counts as an answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The answer.
    pub entry: Entry,
    before: Option<inode::Told>,
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
    processes: Processes,
    labels: Mutex<by_label::Index>,
    drafts: Mutex<Drafts>,
    dates: Mutex<dates::AllDates>,
    scratch: Mutex<Scratch>,
    budget: Mutex<budget::Budget>,
    spots: Mutex<still::Spots>,
    listener: OnceLock<Listener>,
    /// What is to be looked after, and what somebody is doing of what was due.
    tasks: Arc<Mutex<due::Tasks>>,
    /// Files whose last descriptor is closed and whose content is still being committed, and how long that may take.
    closing: Mutex<HashMap<HandleId, (Arc<Writer>, Instant)>>,
    /// Somebody has written through a mapping.
    paged: AtomicBool,
    /// When there may be something to settle, and the signal that this is sooner than somebody waits.
    work: (Mutex<due::Work>, Condvar),
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
            processes: Processes::default(),
            labels: Mutex::default(),
            drafts: Mutex::default(),
            dates: Mutex::default(),
            scratch: Mutex::default(),
            budget: Mutex::default(),
            spots: Mutex::default(),
            listener: OnceLock::new(),
            tasks: Arc::default(),
            closing: Mutex::default(),
            paged: AtomicBool::new(false),
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
    fn is_pending(&self, node: &Node) -> bool {
        let Some(token) = node.token() else {
            return false;
        };
        let drafts = lock(&self.drafts);
        drafts.build(token).is_some()
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
            Node::Scratch(id) => {
                let found = lock(&self.scratch)
                    .path(*id)
                    .map(|(directory, name)| (directory.clone(), name));
                if let Some((directory, name)) = found {
                    return self.path_of(&directory).join(name);
                }
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

    /// Patience for what has been done already, and cannot be done again by who has more of it.
    fn to_see_through(&self, patience: Patience) -> Patience {
        match patience {
            Patience::Now => Patience::at_most(self.store.options().lock_wait),
            until @ Patience::Until(_) => until,
        }
    }

    fn node(&self, ino: Ino) -> Result<Node> {
        let inodes = lock(&self.inodes);
        let inode = inodes.get(ino).ok_or_else(unknown_inode)?;
        if inode.is_dead() && inodes.number(&inode.node) != ino {
            // Something else has its name, under another number.
            return Err(Error::not_found("this directory is gone"));
        }
        Ok(inode.node.clone())
    }

    /// How long an answer about `node` may be remembered.
    fn validity(&self, node: &Node) -> Duration {
        let longest = match node {
            // It has been renamed to an attribute, which others change.
            Node::Scratch(id) if lock(&self.scratch).became(*id).is_some() => Duration::ZERO,
            Node::Token(_) | Node::Object(..) | Node::TokenLayout(_) | Node::Scratch(_) => BRIEFLY,
            Node::Attribute(_, _, map) if map.kind == Kind::Map => BRIEFLY,
            _ if self.is_pending(node) => Duration::ZERO,
            _ => self.settings.kept,
        };
        let covered = match node {
            Node::Token(token)
            | Node::Object(token, _)
            | Node::Attribute(token, _, _)
            | Node::MapEntry(token, _, _, _)
            | Node::TokenLayout(token)
            | Node::FileInLayout(token, _) => self.coverage.has_token(token),
            Node::Root | Node::Control | Node::Layout => self.coverage.has_tokendir(),
            // It is nowhere else.
            Node::Scratch(_) => true,
            // Made on the spot from what is remembered anyway.
            Node::Log
            | Node::Server
            | Node::ByLabel
            | Node::TokenByLabel(_)
            | Node::ObjectByLabel(_, _) => return Duration::ZERO,
        };
        if covered {
            longest
        } else {
            longest.min(self.settings.unwatched)
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

/// How long an answer may be remembered about a directory that others can remove, or fill, and about scratch. The kernel is told that the
/// attributes of a directory are others, and not that its name is gone, see [`Stale`]: what asks for no attributes (`O_PATH`, `chdir`) comes
/// by the name to what is no more. And of what is pending nobody tells it when that gets into the store. A tool that copies into a
/// directory comes back to it a dozen times for each file, each time within a millisecond.
const BRIEFLY: Duration = Duration::from_millis(50);

/// The longest name of a directory entry (`limits.h`).
const NAME_MAX: usize = 255;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whatever panicked did not do so between two halves of a change: each change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown_inode() -> Error {
    Error::not_found("no such inode")
}
