//! Files that are cut and extended: by their names, which takes effect at once, and through a descriptor, which counts when that is synced or closed for good.
//!
//! One hears that a descriptor is closed for good a moment after `close(2)` has returned. What has been stored meanwhile came after the cut, which so is
//! done to the value alone that was cut ([`Trace`]).

use std::hash::Hasher;

use nix::libc;
use siphasher::sip128::{Hasher128, SipHasher13};

use super::handle::HandleId;
use super::node::{Ino, Node};
use super::scratch::Content;
use super::slot::Slot;
use super::write::{as_index, check_length};
use super::{Tree, lock, view};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::file::digest;
use crate::store::{Object, Patience};

/// By this what a file holds is known again, whatever it is called: hashes of its value, if it has one, and of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trace {
    value: Option<u128>,
    text: u128,
}

impl Trace {
    /// Of what `node` holds in a version of its object, if it is in one.
    pub fn of(node: &Node, object: &Object) -> Option<Self> {
        let (_, _, slot) = Slot::of(node)?;
        let text = view::content(node, object).ok().flatten();
        Some(Self {
            value: slot.get(&object.attributes).map(digest),
            text: hash(&text.unwrap_or_default()),
        })
    }

    /// Whether that value stands there.
    pub fn is_stored(self, slot: Slot, attributes: &Attributes) -> bool {
        self.value == slot.get(attributes).map(digest)
    }

    /// Whether a file that is no attribute holds that.
    pub fn is_text(self, text: &[u8]) -> bool {
        self.text == hash(text)
    }
}

/// Nothing can be done through what has just been closed.
fn closed(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::System(libc::EBADF) => Ok(()),
        outcome => outcome,
    }
}

fn hash(text: &[u8]) -> u128 {
    let mut hasher = SipHasher13::new();
    hasher.write(text);
    hasher.finish128().as_u128()
}

impl Tree {
    /// Cuts or extends an open file (`ftruncate`). If nothing is written into it afterwards, that is committed when it is closed for
    /// good.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`].
    pub(super) fn resize_open(
        &self,
        handle: HandleId,
        size: u64,
        patience: Patience,
    ) -> Result<()> {
        let writer = self.writer(handle)?;
        check_length(size)?;
        let present = writer.size();
        let copied = writer.to_copy().min(size);
        self.check_memory(size.saturating_sub(present) + copied)?;
        let node = self.committed_as(&writer);
        if let Some(node) = node.as_ref().filter(|_| size > present) {
            self.check_disk(node, size)?;
        }
        let was = match node
            .as_ref()
            .map(|node| (node, self.describe(node, patience)))
        {
            Some((_, Err(error))) if error.kind() == ErrorKind::WouldBlock => return Err(error),
            Some((node, Ok((_, Some(object))))) => Trace::of(node, &object),
            // Then what is stored by the time that it is closed was not seen here.
            _ => None,
        };
        if writer.resize(as_index(size), was) {
            self.touch(&writer.node);
        }
        Ok(())
    }

    /// The same of all that the file `ino` is written through.
    pub(super) fn resize_all(&self, ino: Ino, size: u64, patience: Patience) -> Result<()> {
        let writers = lock(&self.handles).writers_of(ino);
        for handle in writers {
            closed(self.resize_open(handle, size, patience))?;
        }
        Ok(())
    }

    /// Makes an open file at least `size` bytes long (`fallocate` of mode 0).
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`]; [`ErrorKind::WouldBlock`] with [`Patience::Now`].
    pub fn extend_open(&self, handle: HandleId, size: u64, patience: Patience) -> Result<()> {
        let present = self.writer(handle)?.size();
        if size > present {
            self.resize_open(handle, size, patience)?;
        }
        Ok(())
    }

    /// Cuts or extends a file that need not be open (`truncate`): it takes effect at once.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if what is left is no value of its kind; otherwise as [`Tree::flush`].
    pub(super) fn resize(&self, node: &Node, size: u64, patience: Patience) -> Result<()> {
        self.check_writable(node)?;
        check_length(size)?;
        if let Node::Scratch(id) = node {
            let scratch = lock(&self.scratch);
            let Content::File(bytes) = scratch.get(*id)?.content.clone() else {
                return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
            };
            drop(scratch);
            let present = lock(&bytes).len() as u64;
            self.check_memory(size.saturating_sub(present))?;
            // If it has been renamed to an attribute meanwhile it is asked for again (`Tree::wherever`), and otherwise whoever does that sees it.
            let scratch = lock(&self.scratch);
            scratch.get(*id)?;
            lock(&bytes).set_len(as_index(size));
            drop(scratch);
            self.touch(node);
            return Ok(());
        }
        let (_, object) = self.describe(node, patience)?;
        let content = object
            .map(|object| view::content(node, &object))
            .transpose();
        let (mut content, is_fresh) = match content {
            Ok(Some(Some(content))) => (content, false),
            Ok(Some(None)) => return Err(Error::new(ErrorKind::IsADirectory, "a directory")),
            _ if self.is_being_written(node) => {
                // It has no value yet, and gets what is left of it from who is writing it.
                for (handle, writer) in self.written_as(node) {
                    if writer.size() != size {
                        closed(self.resize_open(handle, size, patience))?;
                    }
                }
                return Ok(());
            }
            _ => (self.fresh_content(node).unwrap_or_default(), true),
        };
        if content.len() as u64 == size {
            return Ok(());
        }
        self.check_memory(size.saturating_sub(content.len() as u64))?;
        content.resize(as_index(size), 0);
        let fallback = is_fresh.then_some(&*content);
        self.commit_resized(node, size, fallback, patience)
    }
}
