//! Open files and directories.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::body::{Body, Bytes};
use super::node::Node;
use super::opened::Opened;
use super::{Attributes, Ino, Listed, lock};
use crate::error::{Error, Result};

/// The number of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// What is kept while something is open.
#[derive(Clone, Debug)]
pub(super) enum Handle {
    /// The content of a file as it was when it was opened, and what `stat` said then.
    Content(Arc<Vec<u8>>, Attributes),
    /// A scratch file: it has one content, whoever has it open.
    Shared(Arc<Writer>),
    /// A file that is open for writing: a copy of its own until it is closed or synced.
    Writer(Arc<Writer>),
    /// The entries of a directory as they were when it was opened or read from its beginning, what `stat` said then, and how often something had
    /// been renamed, made or removed before that.
    Listing(Arc<[Listed]>, Attributes, u64),
}

/// A descriptor that a file is being written through.
#[derive(Debug)]
pub(super) struct Writer {
    /// What was opened.
    pub node: Node,
    /// What `stat` said then.
    pub attributes: Attributes,
    /// Every write goes to the end (`O_APPEND`).
    pub append: bool,
    /// It was opened for reading, so that nobody is done writing when it is closed.
    pub is_reader: bool,
    /// It can be read through it.
    pub is_read: bool,
    /// What is in the file as this descriptor sees it.
    pub content: Bytes,
    /// What of that the store has to be told.
    pub state: Mutex<State>,
    /// The process that wrote through it last, or opened it.
    pub user: AtomicU32,
    /// What has become of the file since it was opened.
    pub place: Mutex<Place>,
}

impl Writer {
    /// How long the file is as this descriptor sees it, in bytes.
    pub fn size(&self) -> u64 {
        lock(&self.content).len() as u64
    }

    /// It is going to be changed through this descriptor. What is scratch is so for all who have it open.
    pub fn begin(&self, content: &mut Body, state: &mut State) {
        if matches!(self.node, Node::Scratch(_)) {
            state.begin(content);
        }
    }

    /// How much memory is taken by the copy that a write makes of what it does not change, in bytes.
    pub fn to_copy(&self) -> u64 {
        if !matches!(self.node, Node::Scratch(_)) {
            return 0;
        }
        let content = lock(&self.content);
        let begins = !lock(&self.state).changing;
        if content.is_copied(begins) {
            content.len() as u64
        } else {
            0
        }
    }

    /// Cuts or extends it to so many bytes; returns whether that changes anything.
    pub fn resize(&self, size: usize) -> bool {
        let mut content = lock(&self.content);
        let mut state = lock(&self.state);
        if state.gap.is_some_and(|gap| size as u64 <= gap) {
            // What could not be written is cut off.
            state.gap = None;
            state.refused = false;
            state.error = None;
        } else if content.len() == size {
            return false;
        }
        self.begin(&mut content, &mut state);
        content.resize(size);
        state.resized = true;
        state.appended = None;
        state.version += 1;
        true
    }

    /// There is nothing to commit it to: it is in its file, complete, and counts as committed.
    pub fn complete(&self) {
        let mut content = lock(&self.content);
        let mut state = lock(&self.state);
        state.committed(false);
        if !self.is_reader {
            state.end(&mut content);
        }
    }
}

/// Where the file is that a writer has open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Place {
    /// Where it was when it was opened.
    #[default]
    There,
    /// It, or its object, was renamed.
    Moved(Node),
    /// It was unlinked or replaced: what is written is seen through this descriptor alone, as in any file system.
    Gone,
}

/// What has become of a writer's copy.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// Something was written since the last commit.
    pub written: bool,
    /// It was cut or extended since the last commit, which counts when it is closed for good.
    pub resized: bool,
    /// How much of the end was appended since the last commit, if nothing else was done: then it is appended to what is stored by
    /// that time, so that two who append lose nothing.
    pub appended: Option<usize>,
    /// A write was refused and nothing was written since: there is nothing to commit, not even that the file was emptied for it.
    pub refused: bool,
    /// Where a write failed for lack of room: until that place is written, or cut off, there is no value.
    pub gap: Option<u64>,
    /// Why what was written last was not committed.
    pub error: Option<Error>,
    /// The time that the file was given since the last write.
    pub mtime: Option<SystemTime>,
    /// A thread is committing it.
    pub committing: bool,
    /// What it holds is being changed through this descriptor ([`Body::begin`]).
    pub changing: bool,
    /// It was flushed after it was cut or extended, with nothing written, or what is written comes from a mapping: perhaps it is closed for good by
    /// now, of which one hears later.
    pub flushed: bool,
    /// Counts the writes, so that one that falls into a commit is not taken for committed.
    pub version: u64,
    /// After how many of them what it holds was what is stored, byte for byte, at that time.
    pub stored: u64,
}

impl State {
    /// Nothing, unless what was written last was refused.
    ///
    /// # Errors
    /// Why it was.
    pub fn refusal(&self) -> Result<()> {
        self.error.clone().map_or(Ok(()), Err)
    }

    /// It is going to be changed.
    pub fn begin(&mut self, content: &mut Body) {
        if !std::mem::replace(&mut self.changing, true) {
            content.begin();
        }
        self.flushed = false;
    }

    /// It is complete as it is.
    pub fn end(&mut self, content: &mut Body) {
        if std::mem::take(&mut self.changing) {
            content.end();
        } else {
            content.close();
        }
        self.flushed = false;
    }

    /// Not all that was to be written could be: what could is a part of it, and no value that anybody meant.
    pub fn failed(&mut self, error: Error, at: u64) {
        *self = Self {
            refused: true,
            gap: Some(self.gap.map_or(at, |gap| gap.min(at))),
            error: Some(error),
            committing: self.committing,
            changing: self.changing,
            version: self.version + 1,
            stored: self.stored,
            ..Self::default()
        };
    }

    /// What there was to commit is committed, or was refused.
    pub fn committed(&mut self, refused: bool) {
        *self = Self {
            refused,
            gap: self.gap,
            error: self.error.take().filter(|_| refused),
            committing: self.committing,
            changing: self.changing,
            version: self.version,
            stored: self.stored,
            ..Self::default()
        };
    }
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    last: u64,
    open: HashMap<HandleId, Handle>,
    /// The process that opened it, or wrote through it last.
    users: HashMap<HandleId, u32>,
    /// The number that it was opened by, where that is not the one that its name has: it was scratch that has been renamed to that.
    numbers: HashMap<HandleId, Ino>,
    /// Of what is read there is another version by now, and who reads it knows: his process has made it, or the file has another name.
    outdated: HashSet<HandleId>,
}

impl Handles {
    pub(super) fn insert(&mut self, handle: Handle) -> HandleId {
        self.last += 1;
        let id = HandleId(self.last);
        self.open.insert(id, handle);
        id
    }

    pub(super) fn replace(&mut self, id: HandleId, handle: Handle) {
        if let Some(open) = self.open.get_mut(&id) {
            *open = handle;
        }
    }

    pub(super) fn get(&self, id: HandleId) -> Option<&Handle> {
        self.open.get(&id)
    }

    /// All that files are written through.
    pub(super) fn writers(&self) -> Vec<Arc<Writer>> {
        let writer = |handle: &Handle| match handle {
            Handle::Writer(writer) | Handle::Shared(writer) => Some(Arc::clone(writer)),
            _ => None,
        };
        self.open.values().filter_map(writer).collect()
    }

    /// What the file `ino` is written through.
    pub(super) fn writers_of(&self, ino: Ino) -> Vec<HandleId> {
        let open = self.open.iter();
        open.filter(|(id, handle)| {
            matches!(handle, Handle::Writer(_) | Handle::Shared(_))
                && self.number(**id, handle) == Some(ino)
        })
        .map(|(id, _)| *id)
        .collect()
    }

    /// What is open for writing.
    pub(super) fn contents(&self) -> Vec<Bytes> {
        let writers = self.writers();
        let content = |writer: &Arc<Writer>| Arc::clone(&writer.content);
        writers.iter().map(content).collect()
    }

    pub(super) fn remove(&mut self, id: HandleId) -> Option<Handle> {
        self.users.remove(&id);
        self.numbers.remove(&id);
        self.outdated.remove(&id);
        self.open.remove(&id)
    }

    /// What is open of the file `ino`, the latest last.
    pub(super) fn opened(&self, ino: Ino) -> Vec<Opened> {
        let mut opened: Vec<(HandleId, Opened)> = Vec::new();
        for (id, handle) in &self.open {
            if self.number(*id, handle) != Some(ino) {
                continue;
            }
            let (size, is_unchanged) = match handle {
                Handle::Content(content, _) => (content.len() as u64, true),
                Handle::Writer(writer) => {
                    let state = lock(&writer.state);
                    let is_unchanged = state.version == state.stored;
                    let is_told = state.written || state.resized;
                    drop(state);
                    if !(is_told || is_unchanged && writer.is_read) {
                        // Nothing is read through it but what it has written itself.
                        continue;
                    }
                    (writer.size(), is_unchanged)
                }
                Handle::Shared(_) | Handle::Listing(..) => continue,
            };
            let user = self.users.get(id).copied().unwrap_or_default();
            let is_as_opened = is_unchanged && !self.outdated.contains(id);
            let found = Opened {
                user,
                size,
                is_as_opened,
            };
            opened.push((*id, found));
        }
        opened.sort_unstable_by_key(|(id, _)| id.0);
        opened.into_iter().map(|(_, opened)| opened).collect()
    }

    /// Who has the file `ino` open.
    pub(super) fn users(&self, ino: Ino) -> Vec<(HandleId, u32)> {
        let user = |(id, handle): (&HandleId, &Handle)| {
            let user = self.users.get(id).copied()?;
            (self.number(*id, handle) == Some(ino)).then_some((*id, user))
        };
        self.open.iter().filter_map(user).collect()
    }

    /// There is another version by now, and who has it open knows.
    pub(super) fn are_outdated(&mut self, handles: impl IntoIterator<Item = HandleId>) {
        let open = &self.open;
        let still = handles.into_iter().filter(|id| open.contains_key(id));
        self.outdated.extend(still);
    }

    /// What is read through this is the version that there is now.
    pub(super) fn is_present(&mut self, writer: &Writer) {
        let is_it = |(_, handle): &(&HandleId, &Handle)| matches!(handle, Handle::Writer(other) if std::ptr::eq(&raw const **other, writer));
        if let Some((id, _)) = self.open.iter().find(is_it) {
            self.outdated.remove(id);
        }
    }

    /// What somebody who has the file `ino` open sees of it now, one who reads it first, and what he was told of it.
    pub(super) fn open_content(&self, ino: Ino) -> Option<(Arc<Vec<u8>>, Attributes)> {
        let of_it = |(id, handle): &(&HandleId, &Handle)| self.number(**id, handle) == Some(ino);
        let content = |(_, handle): (&HandleId, &Handle)| match handle {
            Handle::Content(content, opened) => Some((true, Arc::clone(content), *opened)),
            Handle::Writer(writer) | Handle::Shared(writer) => {
                let content = Arc::new(lock(&writer.content).to_vec());
                Some((false, content, writer.attributes))
            }
            Handle::Listing(..) => None,
        };
        let found = self.open.iter().filter(of_it).filter_map(content);
        let (_, content, opened) = found.max_by_key(|(is_reader, ..)| *is_reader)?;
        Some((content, Attributes { ino, ..opened }))
    }

    /// The number of the file that is open.
    fn number(&self, id: HandleId, handle: &Handle) -> Option<Ino> {
        let ino = match handle {
            Handle::Content(_, attributes) => attributes.ino,
            Handle::Writer(writer) | Handle::Shared(writer) => writer.attributes.ino,
            Handle::Listing(..) => return None,
        };
        Some(self.numbers.get(&id).copied().unwrap_or(ino))
    }

    pub(super) fn opened_by(&mut self, id: HandleId, ino: Ino) {
        self.numbers.insert(id, ino);
    }

    pub(super) fn used_by(&mut self, id: HandleId, pid: u32) {
        if self.open.contains_key(&id) {
            self.users.insert(id, pid);
        }
    }

    /// Whether somebody has the file `ino` open.
    pub(super) fn is_open(&self, ino: Ino) -> bool {
        let mut open = self.open.iter();
        open.any(|(id, handle)| self.number(*id, handle) == Some(ino))
    }

    /// The numbers of the files that are open.
    pub(super) fn files(&self) -> HashSet<Ino> {
        let number = |(id, handle): (&HandleId, &Handle)| self.number(*id, handle);
        self.open.iter().filter_map(number).collect()
    }

    /// What each who has `ino` open was told of it when it was opened, with the length that it has for him: the latest last.
    pub(super) fn all_at_open(&self, ino: Ino) -> Vec<(u32, Attributes)> {
        let told = |(id, handle): (&HandleId, &Handle)| {
            let attributes = match handle {
                Handle::Content(content, attributes) => Attributes {
                    size: content.len() as u64,
                    ..*attributes
                },
                Handle::Listing(_, attributes, _) => *attributes,
                Handle::Writer(writer) | Handle::Shared(writer) => Attributes {
                    size: writer.size(),
                    ..writer.attributes
                },
            };
            let number = self.numbers.get(id).unwrap_or(&attributes.ino);
            let user = self.users.get(id).copied()?;
            (*number == ino).then_some((*id, user, Attributes { ino, ..attributes }))
        };
        let mut all: Vec<_> = self.open.iter().filter_map(told).collect();
        all.sort_unstable_by_key(|(id, ..)| id.0);
        all.into_iter()
            .map(|(_, user, told)| (user, told))
            .collect()
    }
}
