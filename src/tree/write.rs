//! Files that are written: opened, changed, and committed when they are closed or synced.
//!
//! Each descriptor that is open for writing has a copy of the value, so that what is committed is one program's text, whole. The
//! first flush after a write commits; a flush with nothing written commits nothing (a shell's `echo x > f` duplicates its descriptor and
//! closes the first one before it writes); truncation alone is committed with the last close.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::body::{Body, Bytes};
use super::cut::Trace;
use super::draft::Key;
use super::handle::{Handle, HandleId, OpenedFor, State, Writer};
use super::node::{Ino, Node};
use super::opened::are_same;
use super::scratch::{Content, ScratchId};
use super::slot::Slot;
use super::{Tree, lock, view};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;

/// The longest value, in bytes. The largest objects that SoftHSM makes are data objects of a few MiB; one above 256 MiB would not
/// be read again.
pub(super) const LONGEST_VALUE: u64 = 64 * 1024 * 1024;

/// How a file is opened for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenForWriting {
    /// `O_TRUNC`: begin with nothing.
    pub truncate: bool,
    /// `O_APPEND`: every write goes to the end.
    pub append: bool,
    /// `O_RDWR`: it is read, too.
    pub read: bool,
}

/// What came of opening a scratch file.
#[derive(Debug)]
pub(super) enum Scratched {
    Opened(HandleId),
    /// It has been renamed to this attribute, which is to be opened.
    Became(Node),
}

impl Tree {
    /// Opens a file for writing, and perhaps for reading. Nothing reaches the store before [`Tree::flush`].
    ///
    /// # Errors
    /// [`ErrorKind::IsADirectory`]; [`ErrorKind::ReadOnly`] below `.tokenfs` and in a store that is read only;
    /// [`ErrorKind::NotFound`] if it is gone by now, and what the store fails with.
    pub fn open_for_writing(
        &self,
        ino: Ino,
        how: OpenForWriting,
        patience: Patience,
    ) -> Result<HandleId> {
        // Until nobody has it open any more.
        while self.is_orphan(ino) {
            if let Some(reopened) = self.reopen(ino, Some(how))? {
                return Ok(reopened);
            }
        }
        let opened = self.wherever(ino, patience, |node| {
            self.wait_until_closed(node, patience)?;
            self.in_place(ino, patience, |node| {
                let handle = self.open_writer(node, Some(ino), how, patience)?;
                // What is unlinked while it is opened must not come back with what is written into it.
                if self.is_pending(node)
                    && let Err(error) = self.describe(node, patience)
                {
                    self.discard(handle);
                    return Err(error);
                }
                Ok(handle)
            })
        });
        let handle = match opened {
            // An ordinary answer: the kernel looks its name up anew.
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(error),
            opened => self.noted_write(&self.node(ino)?, opened)?,
        };
        // Under which it may be asked about when its name is that of another one.
        lock(&self.handles).opened_by(handle, ino);
        Ok(handle)
    }

    /// Notes which process uses a descriptor. The kernel asks for the attributes of an open file without saying through
    /// which descriptor, and one who has written expects to be told of that.
    pub fn used_by(&self, handle: HandleId, pid: u32) {
        let process = self.processes.of(pid);
        lock(&self.handles).used_by(handle, process);
        if let Ok(writer) = self.writer(handle) {
            writer.user.store(process, Ordering::Relaxed);
        }
    }

    /// The size of a file as the process `pid` sees it which is writing it, through the descriptor that it opened last; and whether anybody is.
    pub(super) fn written_size(&self, node: &Node, pid: u32) -> (bool, Option<u64>) {
        let mut writers = lock(&self.handles).writers();
        writers.retain(|writer| self.committed_as(writer).as_ref() == Some(node));
        let is_open = !writers.is_empty();
        let process = self.processes.of(pid);
        writers.retain(|writer| {
            let state = lock(&writer.state);
            let is_written = state.written || state.resized;
            is_written && are_same(writer.user.load(Ordering::Relaxed), process)
        });
        (is_open, writers.last().map(|writer| writer.size()))
    }

    /// Opens what [`Tree::in_place`] keeps where it is.
    pub(super) fn open_writer(
        &self,
        node: &Node,
        ino: Option<Ino>,
        how: OpenForWriting,
        patience: Patience,
    ) -> Result<HandleId> {
        self.check_writable(node)?;
        if let Node::Scratch(id) = node {
            return match self.open_scratch(node, *id, Some(how))? {
                Scratched::Opened(handle) => Ok(handle),
                // Which nobody keeps where it is: it is asked for again (`Tree::wherever`).
                Scratched::Became(_) => Err(Error::not_found("it was renamed meanwhile")),
            };
        }
        let (attributes, object) = self.noted(self.describe(node, patience))?;
        if attributes.kind == super::FileKind::Directory {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        }
        if let Some(ino) = ino {
            self.check_told(ino, &attributes)?;
        }
        let resized = how.truncate && attributes.size > 0;
        let was = object.as_ref().filter(|_| resized);
        let was = was.and_then(|object| Trace::of(node, object));
        let content = if how.truncate {
            Vec::new()
        } else {
            match object
                .map(|object| view::content(node, &object))
                .transpose()
            {
                Ok(Some(Some(content))) => content,
                // It has no value yet.
                _ => self.fresh_content(node).unwrap_or_default(),
            }
        };
        self.check_memory(content.len() as u64)?;
        let size = content.len() as u64;
        let content: Bytes = Arc::new(Mutex::new(Body::open(content)));
        let state = State {
            resized,
            cut: was,
            version: u64::from(resized),
            ..State::default()
        };
        let handle = self.insert_writer(node.clone(), attributes, how, content, state);
        if let Some(ino) = ino.filter(|_| how.read && !how.truncate) {
            self.tell_of_opened(ino, size);
        }
        Ok(handle)
    }

    /// Keeps a writer, and counts it in its object.
    pub(super) fn insert_writer(
        &self,
        node: Node,
        attributes: super::Attributes,
        how: OpenForWriting,
        content: Bytes,
        state: State,
    ) -> HandleId {
        self.touch_object(&node);
        let attributes = super::Attributes {
            ino: lock(&self.inodes).number(&node),
            ..attributes
        };
        let writer = Writer {
            node,
            attributes,
            append: AtomicBool::new(how.append),
            opened_for: OpenedFor::writing(how),
            content,
            state: Mutex::new(state),
            place: Mutex::default(),
            user: AtomicU32::new(0),
        };
        self.open_handle(Handle::Writer(Arc::new(writer)))
    }

    /// Somebody opens or closes a file of an object: that is not left alone.
    pub(super) fn touch_object(&self, node: &Node) {
        if let Some(key) = self.object_of(node) {
            lock(&self.drafts).touch(&key);
        }
    }

    /// The object that a file is in, or, of scratch, in whose directory it is.
    fn object_of(&self, node: &Node) -> Option<Key> {
        match node {
            Node::Scratch(id) => lock(&self.scratch).get(*id).ok()?.object.clone(),
            node => node.object().map(|(token, id)| (token.clone(), id.clone())),
        }
    }

    /// The objects in which something is open for writing.
    pub(super) fn open_objects(&self) -> HashSet<Key> {
        let writers = lock(&self.handles).writers();
        let of = |writer: &Arc<Writer>| match (self.committed_as(writer), &writer.node) {
            (Some(node), _) => self.object_of(&node),
            // What is scratch still.
            (None, node @ Node::Scratch(_)) => self.object_of(node),
            // It has been removed or replaced.
            (None, _) => None,
        };
        writers.iter().filter_map(of).collect()
    }

    /// Opens a scratch file for writing, or for reading, if it is one still.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::IsADirectory`].
    pub(super) fn open_scratch(
        &self,
        node: &Node,
        id: ScratchId,
        for_writing: Option<OpenForWriting>,
    ) -> Result<Scratched> {
        let how = for_writing.unwrap_or_default();
        let (bytes, attributes) = {
            let scratch = lock(&self.scratch);
            if let Some(attribute) = scratch.became(id) {
                return Ok(Scratched::Became(attribute));
            }
            let entry = scratch.get(id)?;
            match &entry.content {
                Content::File(bytes) => (Arc::clone(bytes), entry.attributes()),
                Content::Directory(_) => {
                    return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
                }
            }
        };
        let attributes = super::Attributes {
            ino: lock(&self.inodes).number(node),
            ..attributes
        };
        self.touch_object(node);
        let writer = Arc::new(Writer {
            node: node.clone(),
            attributes,
            append: AtomicBool::new(how.append),
            opened_for: for_writing.map_or(OpenedFor::Reading, OpenedFor::writing),
            content: bytes,
            state: Mutex::default(),
            place: Mutex::default(),
            user: AtomicU32::new(0),
        });
        let handle = self.open_handle(Handle::Shared(Arc::clone(&writer)));
        let is_gone = {
            let scratch = lock(&self.scratch);
            scratch.became(id).is_none() && scratch.get(id).is_err()
        };
        if is_gone {
            // With its directory, which has become an object meanwhile: who followed it there knew nothing of this descriptor.
            self.discard(handle);
            return Err(Error::not_found("it is no scratch any more"));
        }
        if how.truncate && writer.resize(0, None) {
            self.touch(node);
        }
        Ok(Scratched::Opened(handle))
    }

    /// The content of a file that was created and has no value yet.
    pub(super) fn fresh_content(&self, node: &Node) -> Option<Vec<u8>> {
        let (token, id, slot) = Slot::of(node)?;
        let drafts = lock(&self.drafts);
        let bytes = drafts.get(&(token.clone(), id.clone()))?.fresh.get(&slot)?;
        Some(lock(bytes).to_vec())
    }

    /// Through which descriptors `node` is being written, with nothing committed yet of what was written last.
    pub(super) fn written_as(&self, node: &Node) -> Vec<(HandleId, Arc<Writer>)> {
        let mut writers = lock(&self.handles).writer_ids();
        writers.retain(|(_, writer)| {
            lock(&writer.state).written && self.committed_as(writer).as_ref() == Some(node)
        });
        writers
    }

    pub(super) fn is_being_written(&self, node: &Node) -> bool {
        !self.written_as(node).is_empty()
    }

    pub(super) fn writer(&self, handle: HandleId) -> Result<Arc<Writer>> {
        match lock(&self.handles).get(handle) {
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => Ok(Arc::clone(writer)),
            _ => Err(Error::new(
                ErrorKind::System(libc::EBADF),
                "not open for writing",
            )),
        }
    }

    /// Writes `data` at `offset`, or at the end if the file was opened for appending. The store is not told yet.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the text then ends in a newline and is no value of its kind, or turns on `CKA_PRIVATE` where a text is
    /// no ciphertext, or is a serial number that another token has: the write is undone;
    /// [`ErrorKind::WouldBlock`] if the last of these has to be waited for; [`ErrorKind::TooLarge`].
    pub fn write(
        &self,
        handle: HandleId,
        offset: u64,
        data: &[u8],
        patience: Patience,
    ) -> Result<()> {
        let writer = self.writer(handle)?;
        let append = writer.append.load(Ordering::Relaxed);
        let at = (!append).then_some(offset);
        self.write_to(&writer, at, data, patience)
    }

    /// Whether what is written from now on goes to the end: what the descriptor has by now of `O_APPEND`.
    pub fn appends(&self, handle: HandleId, append: bool) {
        if let Ok(writer) = self.writer(handle) {
            writer.append.store(append, Ordering::Relaxed);
        }
    }

    /// Writes back a page of a shared mapping (`mmap(2)`), which knows nothing of appending.
    ///
    /// # Errors
    /// As [`Tree::write`].
    pub fn write_page(
        &self,
        handle: HandleId,
        offset: u64,
        data: &[u8],
        patience: Patience,
    ) -> Result<()> {
        let writer = self.writer(handle)?;
        let outcome = self.write_to(&writer, Some(offset), data, patience);
        let mut state = lock(&writer.state);
        state.flushed = true;
        state.paged = state.written;
        self.paged.store(true, Ordering::Relaxed);
        drop(state);
        outcome
    }

    fn write_to(
        &self,
        writer: &Writer,
        at: Option<u64>,
        data: &[u8],
        patience: Patience,
    ) -> Result<()> {
        let outcome = self.write_into(writer, at, data, patience);
        let outcome = self.noted_write(&writer.node, outcome);
        if let Err(error) = &outcome
            && error.kind() == ErrorKind::Invalid
        {
            let mut state = lock(&writer.state);
            if state.refused && state.written {
                // What was written before it is no value, either, and whoever wrote that hears of it.
                state.error = Some(error.clone());
            }
        }
        if let Err(error) = &outcome
            && !matches!(
                error.kind(),
                ErrorKind::Invalid | ErrorKind::WouldBlock | ErrorKind::NotFound
            )
            && let Some(node) = self.committed_as(writer)
        {
            let at = at.unwrap_or_else(|| writer.size());
            lock(&writer.state).failed(error.clone(), at);
            if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::TooLarge) {
                self.note_unwritten(&node);
            }
        }
        outcome
    }

    /// What was to be written into a new object has no room: whatever becomes of the rest, it is not what was meant.
    fn note_unwritten(&self, node: &Node) {
        if let Some((token, id, slot)) = Slot::of(node)
            && let Some(draft) = lock(&self.drafts).get_mut(&(token.clone(), id.clone()))
            && let Some(new) = draft.new.as_mut()
        {
            new.unwritten.insert(slot);
        }
    }

    fn write_into(
        &self,
        writer: &Writer,
        at: Option<u64>,
        data: &[u8],
        patience: Patience,
    ) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let more = data.len() as u64;
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        let node = self.committed_as(writer);
        let range = |length: usize| {
            let start = at.unwrap_or(length as u64);
            (start, start.saturating_add(more))
        };
        let length = lock(&writer.content).len();
        let (start, end) = range(length);
        check_length(end)?;
        self.check_memory(end.saturating_sub(length as u64) + writer.to_copy())?;
        if let Some(node) = &node {
            self.check_disk(node, end)?;
        }
        let is_whole = start == 0 && data.len() >= length;
        let early = match &node {
            Some(node) if !is_scratch => self.foresee(node, is_whole, data, patience)?,
            _ => None,
        };
        let mut content = lock(&writer.content);
        // Somebody else may have written meanwhile.
        let (start, end) = range(content.len());
        check_length(end)?;
        let (start, end) = (as_index(start), as_index(end));
        let length = content.len();
        // What is overwritten, in case it has to come back.
        let before = content.get(start..end.min(length)).map(<[u8]>::to_vec);
        writer.begin(&mut content, &mut lock(&writer.state));
        if length < end {
            Vec::resize(&mut content, end, 0);
        }
        if let Some(place) = content.get_mut(start..end) {
            place.copy_from_slice(data);
        }
        // Programs ignore what close says, so what is wrong is refused here if it can be told already.
        let told = early.map_or(Ok(()), |early| early.of(&content, data.len()));
        if let Err(error) = told {
            if let Some(before) = before
                && let Some(place) = content.get_mut(start..start + before.len())
            {
                place.copy_from_slice(&before);
            }
            content.truncate(length);
            drop(content);
            let mut state = lock(&writer.state);
            state.refused = true;
            state.uncommitted = false;
            return Err(error);
        }
        // Both at once: a flush in another thread must not see the one without the other.
        let mut state = lock(&writer.state);
        drop(content);
        if let Some(gap) = state.gap {
            state.version += 1;
            if !(start as u64..end as u64).contains(&gap) {
                return Ok(());
            }
            state.gap = None;
        }
        state.refused = false;
        state.uncommitted = false;
        state.error = None;
        state.appended = match state.appended {
            _ if at.is_some() || state.resized => None,
            Some(appended) => Some(appended + data.len()),
            // What is written otherwise is not stored by appending.
            None if state.written => None,
            None => Some(data.len()),
        };
        state.written = true;
        state.cut = None;
        state.mtime = None;
        state.version += 1;
        drop(state);
        self.touch(node.as_ref().unwrap_or(&writer.node));
        Ok(())
    }

    /// The time that a file was given which is open and not committed yet (`futimens` before `close`, as cp and tar do): it is that
    /// of what is committed.
    pub(super) fn date_writers(&self, node: &Node, mtime: SystemTime) {
        let writers = lock(&self.handles).writers();
        let is_of = |writer: &&Arc<Writer>| match self.committed_as(writer) {
            Some(now) => now == *node,
            None => writer.node == *node,
        };
        for writer in writers.iter().filter(is_of) {
            lock(&writer.state).mtime = Some(mtime);
        }
    }

    /// Something is being done in an object: it is not left alone.
    pub(super) fn touch(&self, node: &Node) {
        match node {
            Node::Attribute(token, id, _)
            | Node::MapEntry(token, id, _, _)
            | Node::Object(token, id) => {
                lock(&self.drafts).touch(&(token.clone(), id.clone()));
            }
            Node::Scratch(id) => {
                let mut object = None;
                if let Ok(entry) = lock(&self.scratch).get_mut(*id) {
                    entry.mtime = SystemTime::now();
                    entry.ctime = entry.mtime;
                    entry.given = None;
                    object.clone_from(&entry.object);
                }
                if let Some(key) = object {
                    lock(&self.drafts).touch(&key);
                }
            }
            _ => {}
        }
    }
}

pub(super) fn as_index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// That a value of so many bytes is not too long.
///
/// # Errors
/// [`ErrorKind::TooLarge`].
pub(super) fn check_length(length: u64) -> Result<()> {
    if length <= LONGEST_VALUE {
        return Ok(());
    }
    let detail = format!("no value is longer than {LONGEST_VALUE} bytes");
    Err(Error::new(ErrorKind::TooLarge, detail))
}
