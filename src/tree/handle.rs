//! Open files and directories.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::body::{Body, Bytes};
use super::cut::Trace;
use super::node::Node;
use super::opened::Opened;
use super::{Attributes, Ino, Listed, OpenForWriting, lock};
use crate::error::{Error, Result};

/// The number of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

/// What a file was opened for (`open(2)`, "access mode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenedFor {
    /// `O_RDONLY`, of scratch: nobody is done writing when it is closed.
    Reading,
    /// `O_WRONLY`.
    Writing,
    /// `O_RDWR`.
    Both,
}

impl OpenedFor {
    /// What the kernel says of one that is opened for writing.
    pub fn writing(how: OpenForWriting) -> Self {
        if how.read { Self::Both } else { Self::Writing }
    }
}

/// A descriptor that a file is being written through.
#[derive(Debug)]
pub(super) struct Writer {
    /// What was opened.
    pub node: Node,
    /// What `stat` said then.
    pub attributes: Attributes,
    /// Every write goes to the end (`O_APPEND`, which `fcntl(2)` can change).
    pub append: AtomicBool,
    /// What it was opened for.
    pub opened_for: OpenedFor,
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

    /// What is in the file as this descriptor sees it.
    fn share(&self) -> Arc<Vec<u8>> {
        lock(&self.content).share()
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

    /// Cuts or extends it to so many bytes, while its value is `was`; returns whether that changes anything.
    pub fn resize(&self, size: usize, was: Option<Trace>) -> bool {
        let mut content = lock(&self.content);
        let mut state = lock(&self.state);
        // Nothing else was done since it was opened or committed, or failed to be.
        let is_all = state.cut.is_some()
            || !(state.resized || state.written)
                && state.appended.is_none()
                && !state.uncommitted
                && state.gap.is_none();
        if state.gap.is_some_and(|gap| size as u64 <= gap) {
            // What could not be written is cut off.
            state.gap = None;
        } else if content.len() == size && !state.refused {
            return false;
        }
        if state.gap.is_none() {
            // Whatever was refused, this is meant.
            state.refused = false;
            state.uncommitted = false;
            state.error = None;
        }
        self.begin(&mut content, &mut state);
        content.resize(size);
        state.cut = was.filter(|_| is_all);
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
        if self.opened_for != OpenedFor::Reading {
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
    /// That is all that was done, and the value was this then: what is stored by the time that it counts, and is another value, came later.
    pub cut: Option<Trace>,
    /// How much of the end was appended since the last commit, if nothing else was done: then it is appended to what is stored by
    /// that time, so that two who append lose nothing.
    pub appended: Option<usize>,
    /// A write was refused and nothing was written since: there is nothing to commit, not even that the file was emptied for it.
    pub refused: bool,
    /// It could not be committed, and is complete: who syncs it once more means it to be tried again.
    pub uncommitted: bool,
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
    /// After how many writes it was flushed last.
    pub closed: Option<u64>,
    /// Pages of a mapping are among what was written: the kernel writes them through any descriptor by which the file is mapped.
    pub paged: bool,
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

    /// Not all that was to be written could be: what could is a part of it, and no value that anybody meant. It is a part of what is written next.
    pub fn failed(&mut self, error: Error, at: u64) {
        *self = Self {
            refused: true,
            appended: self.appended,
            resized: self.is_to_be_whole(),
            gap: Some(self.gap.map_or(at, |gap| gap.min(at))),
            error: Some(error),
            committing: self.committing,
            changing: self.changing,
            version: self.version + 1,
            stored: self.stored,
            ..Self::default()
        };
    }

    /// Whether nothing was done since it was opened or committed.
    pub fn is_whole(&self) -> bool {
        !(self.written || self.resized || self.refused || self.gap.is_some())
    }

    /// Whether what is committed next has to be all that it holds.
    fn is_to_be_whole(&self) -> bool {
        self.resized || self.written && self.appended.is_none()
    }

    /// What there was to commit is committed, or was refused: then it is committed with what is written next.
    pub fn committed(&mut self, refused: bool) {
        *self = Self {
            refused,
            uncommitted: refused && self.gap.is_none(),
            appended: self.appended.filter(|_| refused),
            cut: self.cut.filter(|_| refused),
            resized: refused && self.is_to_be_whole(),
            gap: self.gap,
            error: self.error.take().filter(|_| refused),
            committing: self.committing,
            changing: self.changing,
            closed: self.closed,
            version: self.version,
            stored: self.stored,
            ..Self::default()
        };
    }
}

/// One descriptor.
#[derive(Debug)]
struct Open {
    handle: Handle,
    /// The process that opened it, or wrote through it last, if that is known.
    user: Option<u32>,
    /// The number that it was opened by; that of its name is another one if it was scratch that has been renamed to that.
    number: Ino,
    /// Of what is read there is another version by now, and who reads it knows: his process has made it, or the file has another name.
    is_outdated: bool,
}

impl Open {
    fn is_file(&self) -> bool {
        !matches!(self.handle, Handle::Listing(..))
    }

    fn writer(&self) -> Option<&Arc<Writer>> {
        match &self.handle {
            Handle::Writer(writer) | Handle::Shared(writer) => Some(writer),
            Handle::Content(..) | Handle::Listing(..) => None,
        }
    }

    /// What it is to who has it open, if he reads something else through it than what there is.
    fn opened(&self) -> Option<Opened> {
        let (size, is_unchanged, is_written) = match &self.handle {
            Handle::Content(content, _) => (content.len() as u64, true, false),
            Handle::Writer(writer) => {
                let state = lock(&writer.state);
                let is_unchanged = state.version == state.stored;
                let is_written = state.written || state.resized;
                drop(state);
                if !(is_written || is_unchanged && writer.opened_for != OpenedFor::Writing) {
                    // Nothing is read through it but what it has written itself.
                    return None;
                }
                (writer.size(), is_unchanged, is_written)
            }
            Handle::Shared(_) | Handle::Listing(..) => return None,
        };
        Some(Opened {
            user: self.user.unwrap_or_default(),
            size,
            is_as_opened: is_unchanged && !self.is_outdated,
            is_written,
        })
    }

    /// What was told of it when it was opened, with the length that it has through this descriptor.
    fn told(&self) -> Attributes {
        let (attributes, size) = match &self.handle {
            Handle::Content(content, attributes) => (attributes, content.len() as u64),
            Handle::Listing(_, attributes, _) => (attributes, attributes.size),
            Handle::Writer(writer) | Handle::Shared(writer) => (&writer.attributes, writer.size()),
        };
        Attributes {
            ino: self.number,
            size,
            ..*attributes
        }
    }
}

/// What somebody sees of a file that is open.
#[derive(Debug)]
pub(super) struct OpenContent {
    pub content: Arc<Vec<u8>>,
    /// What he was told of it when he opened it.
    pub told: Attributes,
    /// Nobody is in the middle of writing it.
    pub is_whole: bool,
}

/// Whether what is seen through a descriptor is a version that somebody meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Whole {
    No,
    Written,
    Read,
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    last: u64,
    open: HashMap<HandleId, Open>,
    /// What is open of each number, the latest last.
    numbers: HashMap<Ino, BTreeSet<HandleId>>,
    /// All that files are written through.
    writers: BTreeMap<HandleId, Arc<Writer>>,
}

impl Handles {
    pub(super) fn insert(&mut self, handle: Handle) -> HandleId {
        self.last += 1;
        let id = HandleId(self.last);
        let number = match &handle {
            Handle::Content(_, attributes) | Handle::Listing(_, attributes, _) => attributes.ino,
            Handle::Writer(writer) | Handle::Shared(writer) => writer.attributes.ino,
        };
        let open = Open {
            handle,
            user: None,
            number,
            is_outdated: false,
        };
        if let Some(writer) = open.writer() {
            self.writers.insert(id, Arc::clone(writer));
        }
        self.numbers.entry(number).or_default().insert(id);
        self.open.insert(id, open);
        id
    }

    /// What an open directory lists is read anew.
    pub(super) fn replace(&mut self, id: HandleId, listing: Handle) {
        if let Some(open) = self.open.get_mut(&id) {
            open.handle = listing;
        }
    }

    pub(super) fn get(&self, id: HandleId) -> Option<&Handle> {
        self.open.get(&id).map(|open| &open.handle)
    }

    /// All that files are written through.
    pub(super) fn writers(&self) -> Vec<Arc<Writer>> {
        self.writers.values().map(Arc::clone).collect()
    }

    /// The same with the descriptors.
    pub(super) fn writer_ids(&self) -> Vec<(HandleId, Arc<Writer>)> {
        let writers = self.writers.iter();
        writers
            .map(|(id, writer)| (*id, Arc::clone(writer)))
            .collect()
    }

    /// What the file `ino` is written through.
    pub(super) fn writers_of(&self, ino: Ino) -> Vec<HandleId> {
        let of = self.of(ino).filter(|(_, open)| open.writer().is_some());
        of.map(|(id, _)| id).collect()
    }

    /// What is open for writing.
    pub(super) fn contents(&self) -> Vec<Bytes> {
        let content = |writer: &Arc<Writer>| Arc::clone(&writer.content);
        self.writers.values().map(content).collect()
    }

    pub(super) fn remove(&mut self, id: HandleId) -> Option<Handle> {
        let open = self.open.remove(&id)?;
        self.writers.remove(&id);
        self.take_number(id, open.number);
        Some(open.handle)
    }

    fn take_number(&mut self, id: HandleId, number: Ino) {
        if let Some(of) = self.numbers.get_mut(&number) {
            of.remove(&id);
            if of.is_empty() {
                self.numbers.remove(&number);
            }
        }
    }

    /// What is open by the number `ino`, the latest last.
    fn of(&self, ino: Ino) -> impl Iterator<Item = (HandleId, &Open)> {
        let ids = self.numbers.get(&ino).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.open.get(id)?)))
    }

    /// What is open of the file `ino`, the latest last.
    pub(super) fn opened(&self, ino: Ino) -> Vec<Opened> {
        self.of(ino).filter_map(|(_, open)| open.opened()).collect()
    }

    /// Who has the file `ino` open.
    pub(super) fn users(&self, ino: Ino) -> Vec<(HandleId, u32)> {
        let files = self.of(ino).filter(|(_, open)| open.is_file());
        files
            .filter_map(|(id, open)| Some((id, open.user?)))
            .collect()
    }

    /// There is another version by now, and who has it open knows.
    pub(super) fn are_outdated(&mut self, handles: impl IntoIterator<Item = HandleId>) {
        for id in handles {
            if let Some(open) = self.open.get_mut(&id) {
                open.is_outdated = true;
            }
        }
    }

    /// What is read through this is the version that there is now.
    pub(super) fn is_present(&mut self, writer: &Writer) {
        let is_it = |other: &Arc<Writer>| std::ptr::eq(&raw const **other, writer);
        let id = self.writers.iter().find(|(_, other)| is_it(other));
        if let Some(open) = id.and_then(|(id, _)| self.open.get_mut(id)) {
            open.is_outdated = false;
        }
    }

    /// What somebody who has the file `ino` open sees of it now: a version that nobody is at first, and of those that of one who reads it.
    pub(super) fn open_content(&self, ino: Ino) -> Option<OpenContent> {
        let judged = |(_, open): (HandleId, &Open)| {
            Some(match &open.handle {
                Handle::Content(content, told) => (Whole::Read, Arc::clone(content), *told),
                // It is written in place, for all who have it open.
                Handle::Shared(writer) => (Whole::Written, writer.share(), writer.attributes),
                Handle::Writer(writer) => {
                    // Both at once: nobody writes in between.
                    let content = lock(&writer.content);
                    let is_whole = lock(&writer.state).is_whole();
                    let whole = if is_whole { Whole::Written } else { Whole::No };
                    (whole, content.share(), writer.attributes)
                }
                Handle::Listing(..) => return None,
            })
        };
        let found = self.of(ino).filter_map(judged);
        let (whole, content, told) = found.max_by_key(|(whole, ..)| *whole)?;
        Some(OpenContent {
            content,
            told: Attributes { ino, ..told },
            is_whole: whole != Whole::No,
        })
    }

    /// How much memory is taken by the versions that are open for reading and have at least so many bytes, in bytes.
    pub(super) fn read_size(&self, least: usize) -> u64 {
        let large = self.open.values().filter_map(|open| match &open.handle {
            Handle::Content(content, _) if content.len() >= least => Some(content),
            _ => None,
        });
        let distinct: HashMap<_, _> = large
            .map(|content| (Arc::as_ptr(content), content.len() as u64))
            .collect();
        distinct.values().sum()
    }

    /// What is read through the descriptor of `ino` that was opened last for that.
    pub(super) fn latest_content(&self, ino: Ino) -> Option<Arc<Vec<u8>>> {
        let content = |(id, open): (HandleId, &Open)| match &open.handle {
            Handle::Content(content, _) => Some((id, Arc::clone(content))),
            _ => None,
        };
        let latest = self.of(ino).filter_map(content).max_by_key(|(id, _)| *id)?;
        Some(latest.1)
    }

    pub(super) fn opened_by(&mut self, id: HandleId, ino: Ino) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        let before = std::mem::replace(&mut open.number, ino);
        self.take_number(id, before);
        self.numbers.entry(ino).or_default().insert(id);
    }

    pub(super) fn used_by(&mut self, id: HandleId, pid: u32) {
        if let Some(open) = self.open.get_mut(&id) {
            open.user = Some(pid);
        }
    }

    /// Whether somebody has the file `ino` open.
    pub(super) fn is_open(&self, ino: Ino) -> bool {
        self.of(ino).any(|(_, open)| open.is_file())
    }

    /// The numbers of the files that are open.
    pub(super) fn files(&self) -> HashSet<Ino> {
        let numbers = self.numbers.keys().copied();
        numbers.filter(|ino| self.is_open(*ino)).collect()
    }

    /// What each who has `ino` open was told of it when it was opened, with the length that it has for him: the latest last.
    pub(super) fn all_at_open(&self, ino: Ino) -> Vec<(u32, Attributes)> {
        let of = self.of(ino);
        of.filter_map(|(_, open)| Some((open.user?, open.told())))
            .collect()
    }
}
