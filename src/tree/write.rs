//! Files that are written: opened, changed, and committed when they are closed or synced.
//!
//! Each descriptor that is open for writing has a copy of the value, so that what is committed is one program's text, whole. The
//! first flush after a write commits; a flush with nothing written commits nothing (a shell's `echo x > f` duplicates its descriptor and
//! closes the first one before it writes); that a file was opened with `O_TRUNC` alone is committed with the last close.

use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use super::draft::Bytes;
use super::handle::{Handle, HandleId, State, Writer};
use super::node::{Ino, Node};
use super::scratch::{Content, ScratchId};
use super::slot::Slot;
use super::text::Context;
use super::{Attributes, Tree, lock, text, view};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Kind, Value};
use crate::store::{ObjectId, Patience, validate};

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
}

/// What is to become of a value.
enum Text<'a> {
    /// This is the whole of it.
    Whole(&'a [u8]),
    /// This comes behind what is stored.
    Appended(&'a [u8]),
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
        let node = self.node(ino)?;
        let opened = self.open_writer(&node, how, patience);
        self.noted_write(&node, opened)
    }

    pub(super) fn open_writer(
        &self,
        node: &Node,
        how: OpenForWriting,
        patience: Patience,
    ) -> Result<HandleId> {
        self.check_writable(node)?;
        if let Node::Scratch(id) = node {
            return self.open_scratch(node, *id, how);
        }
        self.wait_until_closed(node, patience)?;
        let (attributes, object) = self.noted(self.describe(node, patience))?;
        if attributes.kind == super::FileKind::Directory {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        }
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
        let resized = how.truncate && attributes.size > 0;
        let content: Bytes = Arc::new(Mutex::new(content));
        Ok(self.insert_writer(node.clone(), attributes, how.append, content, resized))
    }

    /// Keeps a writer, and counts it in its object.
    pub(super) fn insert_writer(
        &self,
        node: Node,
        attributes: Attributes,
        append: bool,
        content: Bytes,
        resized: bool,
    ) -> HandleId {
        self.count_writers(&node, |writers| writers + 1);
        let state = State {
            resized,
            ..State::default()
        };
        let writer = Writer {
            node,
            attributes,
            append,
            content,
            state: Mutex::new(state),
            place: Mutex::default(),
        };
        self.open_handle(Handle::Writer(Arc::new(writer)))
    }

    pub(super) fn count_writers(&self, node: &Node, count: impl Fn(usize) -> usize) {
        if let Some((token, id, _)) = Slot::of(node) {
            let key = (token.clone(), id.clone());
            let mut drafts = lock(&self.drafts);
            if let Some(new) = drafts.get_mut(&key).and_then(|draft| draft.new.as_mut()) {
                new.writers = count(new.writers);
            }
            drafts.touch(&key);
        }
    }

    pub(super) fn open_scratch(
        &self,
        node: &Node,
        id: ScratchId,
        how: OpenForWriting,
    ) -> Result<HandleId> {
        let (bytes, attributes) = {
            let scratch = lock(&self.scratch);
            let entry = scratch.get(id)?;
            match &entry.content {
                Content::File(bytes) => (Arc::clone(bytes), entry.attributes()),
                Content::Directory(_) => {
                    return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
                }
            }
        };
        if how.truncate {
            lock(&bytes).clear();
        }
        Ok(self.open_handle(Handle::Shared(Arc::new(Writer {
            node: node.clone(),
            attributes,
            append: how.append,
            content: bytes,
            state: Mutex::default(),
            place: Mutex::default(),
        }))))
    }

    /// The content of a file that was created and has no value yet.
    pub(super) fn fresh_content(&self, node: &Node) -> Option<Vec<u8>> {
        let (token, id, slot) = Slot::of(node)?;
        let drafts = lock(&self.drafts);
        let bytes = drafts.get(&(token.clone(), id.clone()))?.fresh.get(&slot)?;
        Some(lock(bytes).clone())
    }

    fn writer(&self, handle: HandleId) -> Result<Arc<Writer>> {
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
    /// [`ErrorKind::Invalid`] if the text then ends in a newline and is no value of its kind: the write is undone;
    /// [`ErrorKind::TooLarge`].
    pub fn write(&self, handle: HandleId, offset: u64, data: &[u8]) -> Result<()> {
        let writer = self.writer(handle)?;
        let outcome = self.write_into(&writer, offset, data);
        self.noted_write(&writer.node, outcome)
    }

    fn write_into(&self, writer: &Writer, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let more = data.len() as u64;
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        let node = self.committed_as(writer);
        if is_scratch {
            lock(&self.scratch).check_room(more)?;
        }
        let mut content = lock(&writer.content);
        let start = if writer.append {
            content.len() as u64
        } else {
            offset
        };
        let end = start.saturating_add(more);
        if end > LONGEST_VALUE {
            return Err(too_large());
        }
        let (start, end) = (as_index(start), as_index(end));
        let length = content.len();
        // What is overwritten, in case it has to come back.
        let before = content.get(start..end.min(length)).map(<[u8]>::to_vec);
        if length < end {
            content.resize(end, 0);
        }
        if let Some(place) = content.get_mut(start..end) {
            place.copy_from_slice(data);
        }
        // Programs ignore what close says, so a wrong word is refused here if it can be told already.
        if let Some((_, _, slot)) = node.as_ref().and_then(Slot::of)
            && !is_scratch
            && slot.key.kind != Kind::Bytes
            && content.ends_with(b"\n")
            && let Err(error) = text::parse(slot.key, &content, Context::default())
        {
            if let Some(before) = before
                && let Some(place) = content.get_mut(start..start + before.len())
            {
                place.copy_from_slice(&before);
            }
            content.truncate(length);
            drop(content);
            lock(&writer.state).refused = true;
            return Err(error);
        }
        drop(content);
        let mut state = lock(&writer.state);
        state.refused = false;
        state.appended = if !writer.append || state.resized {
            None
        } else if state.written {
            state.appended.map(|appended| appended + data.len())
        } else {
            Some(data.len())
        };
        state.written = true;
        state.version += 1;
        drop(state);
        self.touch(node.as_ref().unwrap_or(&writer.node));
        Ok(())
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
                if let Ok(entry) = lock(&self.scratch).get_mut(*id) {
                    entry.mtime = SystemTime::now();
                    entry.ctime = entry.mtime;
                    entry.given = None;
                }
            }
            _ => {}
        }
    }

    /// Cuts or extends an open file (`ftruncate`): that is writing, and is committed with the next flush.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`].
    pub(super) fn resize_open(&self, handle: HandleId, size: u64) -> Result<()> {
        self.set_length(handle, size)?;
        lock(&self.writer(handle)?.state).written = true;
        Ok(())
    }

    /// Cuts or extends an open file, to be committed when it is closed for good.
    fn set_length(&self, handle: HandleId, size: u64) -> Result<()> {
        let writer = self.writer(handle)?;
        if size > LONGEST_VALUE {
            return Err(too_large());
        }
        let size = as_index(size);
        if matches!(writer.node, Node::Scratch(_)) {
            // What all scratch files have is counted before this one is locked.
            let present = lock(&writer.content).len();
            lock(&self.scratch).check_room(size.saturating_sub(present) as u64)?;
        }
        let mut content = lock(&writer.content);
        if content.len() == size {
            return Ok(());
        }
        content.resize(size, 0);
        drop(content);
        let mut state = lock(&writer.state);
        state.resized = true;
        state.appended = None;
        state.version += 1;
        drop(state);
        self.touch(&writer.node);
        Ok(())
    }

    /// Makes an open file at least `size` bytes long (`fallocate` of mode 0). What comes before the writing that it is for is not
    /// committed with the next flush, but when the file is closed for good.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`].
    pub fn extend_open(&self, handle: HandleId, size: u64) -> Result<()> {
        let present = lock(&self.writer(handle)?.content).len() as u64;
        if size > present {
            self.set_length(handle, size)?;
        }
        Ok(())
    }

    /// Cuts or extends a file that need not be open (`truncate`): it takes effect at once.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if what is left is no value of its kind; otherwise as [`Tree::flush`].
    pub(super) fn resize(&self, node: &Node, size: u64, patience: Patience) -> Result<()> {
        self.check_writable(node)?;
        if size > LONGEST_VALUE {
            return Err(too_large());
        }
        if let Node::Scratch(id) = node {
            let scratch = lock(&self.scratch);
            return match &scratch.get(*id)?.content {
                Content::File(bytes) => {
                    lock(bytes).resize(as_index(size), 0);
                    Ok(())
                }
                Content::Directory(_) => Err(Error::new(ErrorKind::IsADirectory, "a directory")),
            };
        }
        let (_, object) = self.describe(node, patience)?;
        let content = object
            .map(|object| view::content(node, &object))
            .transpose();
        let mut content = match content {
            Ok(Some(Some(content))) => content,
            Ok(Some(None)) => return Err(Error::new(ErrorKind::IsADirectory, "a directory")),
            _ => self.fresh_content(node).unwrap_or_default(),
        };
        if content.len() as u64 == size {
            return Ok(());
        }
        content.resize(as_index(size), 0);
        self.commit(node, &Text::Whole(&content), None, patience)
    }

    /// A descriptor is closed, perhaps not the last one of its file, or synced: what was written since the last time is
    /// committed.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is no value of its kind: the old value stays; what writing to the store fails with.
    pub fn flush(&self, handle: HandleId, patience: Patience) -> Result<()> {
        let writer = match lock(&self.handles).get(handle) {
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => Arc::clone(writer),
            // There is nothing to say of a file that is read.
            _ => return Ok(()),
        };
        if !lock(&writer.state).written {
            return Ok(());
        }
        self.commit_writer(&writer, patience)
    }

    fn commit_writer(&self, writer: &Writer, patience: Patience) -> Result<()> {
        let node = match self.committed_as(writer) {
            Some(node) => node,
            // A scratch file has its content already, and one that is gone needs none.
            None => {
                *lock(&writer.state) = State::default();
                return Ok(());
            }
        };
        let (content, state) = {
            let content = lock(&writer.content);
            (content.clone(), lock(&writer.state).clone())
        };
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        let text = match state.appended.filter(|_| !is_scratch) {
            // What was scratch has one content, whoever has it open, and was committed with that.
            Some(appended) => {
                let start = content.len().saturating_sub(appended);
                Text::Appended(content.get(start..).unwrap_or_default())
            }
            None => Text::Whole(&content),
        };
        let outcome = self.commit(&node, &text, None, patience);
        if !matches!(&outcome, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            let mut now = lock(&writer.state);
            if now.version == state.version {
                *now = State {
                    version: now.version,
                    refused: outcome.is_err(),
                    ..State::default()
                };
            }
        }
        self.noted_write(&node, outcome)
    }

    /// Closes a file or a directory for good. What was cut or extended and never written is committed now; nobody hears of it if that
    /// fails, but the log.
    pub fn release(&self, handle: HandleId, patience: Patience) -> Result<()> {
        let writer = match lock(&self.handles).get(handle) {
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => Some(Arc::clone(writer)),
            _ => None,
        };
        let Some(writer) = writer else {
            lock(&self.handles).remove(handle);
            return Ok(());
        };
        let outcome = self.commit_at_last(&writer, patience);
        if matches!(&outcome, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            // close(2) has returned by now. Whoever looks next is to see what it did.
            let limit = Instant::now() + 2 * self.store.options().lock_wait;
            lock(&self.closing).insert(writer.node.clone(), limit);
            return outcome;
        }
        lock(&self.closing).remove(&writer.node);
        lock(&self.handles).remove(handle);
        self.uncount(&writer);
        self.wake();
        outcome
    }

    /// Waits until what was done through a descriptor that is closed already is committed.
    pub(super) fn wait_until_closed(&self, node: &Node, patience: Patience) -> Result<()> {
        loop {
            let until = lock(&self.closing).get(node).copied();
            if until.is_none_or(|until| until < Instant::now()) {
                return Ok(());
            }
            patience.wait(super::settle::PAUSE, "the file is being closed")?;
        }
    }

    /// What a descriptor has not committed by the time that it is closed for good.
    fn commit_at_last(&self, writer: &Writer, patience: Patience) -> Result<()> {
        let state = lock(&writer.state).clone();
        let Some(node) = self.committed_as(writer) else {
            return Ok(());
        };
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        if state.refused {
            // Nobody can be told, and nothing was meant to be kept but what was refused.
            // Others who have it open may have more luck.
            let writers = lock(&self.handles).writers();
            let is_last = !writers.iter().any(|other| {
                !std::ptr::eq(&raw const **other, writer)
                    && self.committed_as(other).as_ref() == Some(&node)
            });
            if !is_scratch && is_last {
                self.drop_fresh(&node);
            }
            return Ok(());
        }
        if state.written || state.resized {
            return self.commit_writer(writer, patience);
        }
        // Created and never written, by touch(1) say: an empty value where there is such a thing, else a file without a value, which
        // stays for whoever is going to write it.
        if let Some((_, _, slot)) = Slot::of(&node)
            && !is_scratch
            && self.is_fresh(&node)
            && text::parse(slot.key, &lock(&writer.content), Context::default()).is_ok()
        {
            return self.commit_writer(writer, patience);
        }
        Ok(())
    }

    pub(super) fn drop_fresh(&self, node: &Node) {
        if let Some((token, id, slot)) = Slot::of(node) {
            let key = (token.clone(), id.clone());
            let mut drafts = lock(&self.drafts);
            if let Some(draft) = drafts.get_mut(&key) {
                draft.fresh.remove(&slot);
            }
            drafts.tidy(&key);
        }
    }

    fn is_fresh(&self, node: &Node) -> bool {
        Slot::of(node).is_some_and(|(token, id, slot)| {
            lock(&self.drafts)
                .get(&(token.clone(), id.clone()))
                .is_some_and(|draft| draft.fresh.contains_key(&slot))
        })
    }

    /// Makes `text` the value of `node`: in its draft if its object is new, else in the store.
    fn commit(
        &self,
        node: &Node,
        text: &Text<'_>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        let Some((_, _, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        };
        self.replacing(node, mtime, patience, &mut |attributes| {
            let siblings = slot.siblings(attributes);
            let context = siblings.map(Context::of).unwrap_or_default();
            let value = match text {
                Text::Whole(text) => text::parse(slot.key, text, context)?,
                Text::Appended(text) => {
                    let stored = siblings.and_then(|siblings| siblings.get(slot.key));
                    let mut whole = match stored {
                        Some(stored) => {
                            text::render(slot.key.attribute_type, stored, context)?.into_owned()
                        }
                        None => Vec::new(),
                    };
                    whole.extend_from_slice(text);
                    text::parse(slot.key, &whole, context)?
                }
            };
            slot.set(attributes, value)
        })
    }

    /// Makes a text the value of `node`, at the time `mtime`.
    pub(super) fn commit_text(
        &self,
        node: &Node,
        text: &[u8],
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.commit(node, &Text::Whole(text), mtime, patience)
    }

    /// Makes `value` the value of `node`.
    pub(super) fn commit_value(
        &self,
        node: &Node,
        value: &Value,
        patience: Patience,
    ) -> Result<()> {
        let Some((_, _, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::Invalid, "no attribute"));
        };
        self.replacing(node, None, patience, &mut |attributes| {
            slot.set(attributes, value.clone())
        })
    }

    /// A change that gives `node` a value, whether it was unlinked just now or never had one.
    fn replacing(
        &self,
        node: &Node,
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut crate::store::attribute::Attributes) -> Result<()>,
    ) -> Result<()> {
        self.replacing_all(&[node], mtime, patience, edit)
    }

    /// A change that gives some of `nodes`, all in one object, a value, and takes it from others.
    pub(super) fn replacing_all(
        &self,
        nodes: &[&Node],
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut crate::store::attribute::Attributes) -> Result<()>,
    ) -> Result<()> {
        let Some(first) = nodes.first() else {
            return Ok(());
        };
        // Before the value is there: nobody must take it for the one that was unlinked, and remove it.
        let held: Vec<Slot> = nodes
            .iter()
            .flat_map(|node| self.release_hold(node))
            .collect();
        let outcome = self.change(first, mtime, patience, &mut |attributes| {
            // What the store has there still is not there for whoever unlinked it.
            for slot in &held {
                slot.remove(attributes);
            }
            edit(attributes)
        });
        match &outcome {
            Ok(()) => nodes.iter().for_each(|node| self.settled(node)),
            Err(_) => self.hold_again(first, &held),
        }
        outcome
    }

    /// Gives up that `node`, and what is in it, was unlinked; returns what that was.
    fn release_hold(&self, node: &Node) -> Vec<Slot> {
        let Some((token, id, slot)) = Slot::of(node) else {
            return Vec::new();
        };
        let mut drafts = lock(&self.drafts);
        match drafts.get_mut(&(token.clone(), id.clone())) {
            Some(draft) if !draft.busy => {
                let ours = |held: &Slot| *held == slot || held.is_in(slot);
                let held: Vec<Slot> = draft.removed.iter().copied().filter(ours).collect();
                draft.removed.retain(|held| !ours(held));
                held
            }
            _ => Vec::new(),
        }
    }

    fn hold_again(&self, node: &Node, held: &[Slot]) {
        if let Some((token, id, _)) = Slot::of(node)
            && !held.is_empty()
        {
            let mut drafts = lock(&self.drafts);
            let draft = drafts.entry(&(token.clone(), id.clone()));
            draft.removed.extend(held);
        }
    }

    /// What stands in `node` has a value now.
    fn settled(&self, node: &Node) {
        if let Some((token, id, slot)) = Slot::of(node) {
            let key = (token.clone(), id.clone());
            let mut drafts = lock(&self.drafts);
            if let Some(draft) = drafts.get_mut(&key) {
                draft.fresh.remove(&slot);
            }
            drafts.touch(&key);
            drafts.tidy(&key);
        }
    }

    /// Changes the object that `node` is in: its draft if it is new, else what the store has.
    pub(super) fn change(
        &self,
        node: &Node,
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut crate::store::attribute::Attributes) -> Result<()>,
    ) -> Result<()> {
        let Some((token, id)) = node.object() else {
            return Err(Error::new(ErrorKind::Invalid, "not in an object"));
        };
        let key = (token.clone(), id.clone());
        let in_draft = self.with_drafts(&key, patience, |drafts| {
            let Some(new) = drafts.get_mut(&key).and_then(|draft| draft.new.as_mut()) else {
                return Ok(false);
            };
            let mut attributes = new.attributes.clone();
            edit(&mut attributes)?;
            validate::check(Some(&new.attributes), &attributes)?;
            new.attributes = attributes;
            if mtime.is_some() {
                new.mtime = mtime;
            }
            drafts.touch(&key);
            Ok(true)
        })?;
        if in_draft {
            return Ok(());
        }
        self.update_store(&key, mtime, patience, edit)?;
        if *id == ObjectId::Token
            && let Some(build) = lock(&self.drafts).build_mut(token)
        {
            build.own_filled = true;
        }
        Ok(())
    }

    /// That something can be written at all.
    pub(super) fn check_writable(&self, node: &Node) -> Result<()> {
        let derived = matches!(
            node,
            Node::Control
                | Node::Log
                | Node::ByLabel
                | Node::TokenByLabel(_)
                | Node::ObjectByLabel(..)
        );
        if derived {
            let detail =
                "everything in .tokenfs is made from the store and cannot be changed there";
            return Err(Error::new(ErrorKind::ReadOnly, detail));
        }
        if self.store.options().read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the mount takes no writes (-o ro)",
            ));
        }
        Ok(())
    }

    /// Records why something was not written, with its name.
    pub(super) fn noted_write<T>(&self, node: &Node, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| {
            let error = match error.path() {
                Some(_) => error,
                None => error.at(self.path_of(node)),
            };
            if !matches!(error.kind(), ErrorKind::WouldBlock) {
                self.diagnostics.error(&error);
            }
            error
        })
    }
}

fn as_index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn too_large() -> Error {
    Error::new(
        ErrorKind::TooLarge,
        format!("no value is longer than {LONGEST_VALUE} bytes"),
    )
}
