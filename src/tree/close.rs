//! Descriptors that are closed: what was written through them becomes the value.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::commit::Text;
use super::due::BRIEFLY;
use super::handle::{Handle, HandleId, State, Writer};
use super::node::Node;
use super::opened::are_same;
use super::scratch::ScratchId;
use super::slot::Slot;
use super::still::Still;
use super::text::Context;
use super::{Tree, lock, text};
use crate::error::{ErrorKind, Result};
use crate::store::Patience;

/// How long it can take at most until one hears that a file was closed for good, or something is written into it.
const LET_GO: Duration = Duration::from_millis(50);

/// Which mappings are meant.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Those of the process that asks.
    Own,
    Anybodys,
}

impl Tree {
    /// A descriptor is closed, perhaps not the last one of its file: what was written since the last time is committed.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is no value of its kind: the old value stays; what writing to the store fails with.
    pub fn flush(&self, handle: HandleId, patience: Patience) -> Result<()> {
        self.commit_handle(handle, patience, |state| state.written && !state.refused)?;
        self.commit_pages(handle, Whose::Own, patience)?;
        if let Ok(writer) = self.writer(handle) {
            let mut state = lock(&writer.state);
            state.flushed = state.resized && !state.written && !state.refused;
            // Somebody may have written since.
            state.closed = (!state.written || state.paged).then_some(state.version);
        }
        Ok(())
    }

    /// The mount has ended since nobody uses it any more, and the kernel tells of no more files that are closed for good: what it was about to tell
    /// of is done.
    pub fn release_closed(&self) {
        let mut was_busy = false;
        let open = lock(&self.handles).writer_ids();
        for (handle, writer) in open {
            let is_closed = {
                let state = lock(&writer.state);
                state.closed == Some(state.version) || state.closed.is_some() && state.paged
            };
            if is_closed {
                let node = self.committed_as(&writer);
                let patience = if was_busy {
                    Patience::at_most(BRIEFLY)
                } else {
                    self.patience()
                };
                let released = self.release(handle, patience);
                was_busy = matches!(&released, Err(error) if error.kind() == ErrorKind::Busy);
                let _ = self.noted_write(node.as_ref().unwrap_or(&writer.node), released);
            }
        }
    }

    /// A descriptor is synced: all that was done through it is committed, also that the file was cut or extended, and what could not be committed
    /// before.
    ///
    /// # Errors
    /// As [`Tree::flush`].
    pub(super) fn commit_all(&self, handle: HandleId, patience: Patience) -> Result<()> {
        self.commit_handle(handle, patience, |state| {
            (state.written || state.resized) && !state.refused || state.uncommitted
        })?;
        self.commit_pages(handle, Whose::Anybodys, patience)
    }

    fn commit_handle(
        &self,
        handle: HandleId,
        patience: Patience,
        wanted: impl Fn(&State) -> bool,
    ) -> Result<()> {
        let writer = match lock(&self.handles).get(handle) {
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => Arc::clone(writer),
            // There is nothing to say of a file that is read.
            _ => return Ok(()),
        };
        let has_something = wanted(&lock(&writer.state));
        if has_something {
            // What was closed before comes first: that it was cut would take away what is written now.
            let node = self.committed_as(&writer);
            self.wait_until_closed(node.as_ref().unwrap_or(&writer.node), patience)?;
        }
        self.commit_writer(&writer, patience, wanted)
    }

    /// Who syncs a file that he has changed through a mapping, or closes it, means that, whichever descriptor the kernel has written it back through. Who
    /// closes it may have nothing to do with the mapping of another process, which can be in the middle of it.
    fn commit_pages(&self, handle: HandleId, whose: Whose, patience: Patience) -> Result<()> {
        if !self.paged.load(Ordering::Relaxed) {
            return Ok(());
        }
        let Ok(writer) = self.writer(handle) else {
            return Ok(());
        };
        let Some(node) = self.committed_as(&writer) else {
            return Ok(());
        };
        let user = |writer: &Writer| writer.user.load(Ordering::Relaxed);
        let has_pages = |state: &State| state.paged && state.written && !state.refused;
        let mut others = lock(&self.handles).writers();
        others.retain(|other| {
            let is_meant = whose == Whose::Anybodys || are_same(user(other), user(&writer));
            is_meant && has_pages(&lock(&other.state))
        });
        for other in others {
            if self.committed_as(&other).as_ref() == Some(&node) {
                self.commit_writer(&other, patience, has_pages)?;
            }
        }
        Ok(())
    }

    /// Commits what a descriptor has that is `wanted`. Of several that close duplicates of one at the same time, one commits, and the
    /// others wait for it.
    fn commit_writer(
        &self,
        writer: &Writer,
        patience: Patience,
        wanted: impl Fn(&State) -> bool,
    ) -> Result<()> {
        loop {
            {
                let mut state = lock(&writer.state);
                if !state.committing {
                    if !wanted(&state) {
                        let refusal = state.refusal();
                        if let Err(error) = &refusal {
                            self.diagnostics.error(error);
                        }
                        return refusal;
                    }
                    state.committing = true;
                    break;
                }
            }
            patience.wait(super::settle::PAUSE, "the file is being written")?;
        }
        let Some((node, still)) = self.where_it_stays(writer, patience) else {
            return Ok(());
        };
        let outcome = self.commit_content(writer, (&node, still), patience);
        lock(&writer.state).committing = false;
        outcome
    }

    /// Commits it to its place, if that could be kept where it is.
    fn commit_content(
        &self,
        writer: &Writer,
        (node, still): (&Node, Result<Option<Still<'_>>>),
        patience: Patience,
    ) -> Result<()> {
        let (content, state) = {
            let content = lock(&writer.content);
            (content.to_vec(), lock(&writer.state).clone())
        };
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        let text = match state.appended.filter(|_| !is_scratch) {
            // What was scratch has one content, whoever has it open, and was committed with that.
            Some(appended) => {
                let start = content.len().saturating_sub(appended);
                Text::Appended(content.get(start..).unwrap_or_default())
            }
            // What was scratch when it was opened is a whole, also when it is tried once more.
            None if state.written || state.resized || is_scratch && state.uncommitted => {
                match state.cut.filter(|_| !is_scratch) {
                    Some(was) => Text::Cut(&content, was),
                    None => Text::Whole(&content),
                }
            }
            None => Text::First(&content),
        };
        let outcome = still.and_then(|_still| match node {
            Node::Scratch(id) => {
                let outcome = self.commit_to_scratch(*id, &text, state.mtime);
                outcome.map(|()| false)
            }
            _ => {
                // It can have lost its name while this has waited.
                let is_wanted = || self.committed_as(writer).as_ref() == Some(node);
                self.commit(node, &text, state.mtime, &is_wanted, patience)
            }
        });
        let outcome = match (node, outcome) {
            // It was removed, and needs none.
            (Node::Scratch(_), Err(error)) if error.kind() == ErrorKind::NotFound => Ok(false),
            (_, outcome) => outcome,
        };
        if !matches!(&outcome, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            let mut now = lock(&writer.state);
            if matches!(outcome, Ok(true)) {
                now.stored = state.version;
            }
            if now.version == state.version {
                now.committed(outcome.is_err());
            } else if let (Ok(_), Some(done), Some(all)) = (&outcome, state.appended, now.appended)
            {
                // What was written meanwhile is appended with the next flush, and nothing twice.
                now.appended = Some(all.saturating_sub(done));
            }
        }
        if let Ok(is_same) = outcome {
            let pid = writer.user.load(Ordering::Relaxed);
            self.forget_opened(node, pid);
            if is_same {
                lock(&self.handles).is_present(writer);
            }
        }
        let outcome = self.noted_write(node, outcome.map(drop));
        if let Err(error) = &outcome
            && error.kind() != ErrorKind::WouldBlock
        {
            // Of several that close duplicates, each one is told: only one of them may be somebody who looks.
            lock(&writer.state).error = Some(error.clone());
        }
        outcome
    }

    /// Where the content of a descriptor belongs, which does not move before what is returned with it is dropped; nothing if it belongs nowhere,
    /// and then it counts as committed.
    fn where_it_stays(
        &self,
        writer: &Writer,
        patience: Patience,
    ) -> Option<(Node, Result<Option<Still<'_>>>)> {
        loop {
            let Some(node) = self.committed_as(writer) else {
                // A scratch file has its content already, and one that is gone needs none.
                writer.complete();
                let is_scratch = self.committed_as(writer).is_none();
                let mut state = lock(&writer.state);
                if is_scratch {
                    // Whoever makes an attribute of it from now on sees that nobody is going to commit it, and does so.
                    state.committing = false;
                    return None;
                }
                // And who has done so just now may have left that to this thread.
                state.written = true;
                continue;
            };
            let still = self.keep_still(&node, patience);
            if still.is_err() || self.committed_as(writer).as_ref() == Some(&node) {
                return Some((node, still));
            }
        }
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
            lock(&self.closing).insert(handle, (writer, limit));
            return outcome;
        }
        lock(&self.closing).remove(&handle);
        lock(&self.handles).remove(handle);
        self.touch_object(
            &self
                .committed_as(&writer)
                .unwrap_or_else(|| writer.node.clone()),
        );
        self.forget_became(&writer);
        self.wake_when_left_alone();
        outcome
    }

    /// Waits until what was done through a descriptor that is closed already is committed. Nobody does so who keeps the file in its place, or
    /// anybody from it: who closes it may have to wait for them.
    pub(super) fn wait_until_closed(&self, node: &Node, patience: Patience) -> Result<()> {
        self.wait_until_closed_where(
            |closing| closing == node,
            patience,
            "the file is being closed",
        )
    }

    /// The same of all that is in an object: what it does would give the object another time than it is given now.
    pub(super) fn wait_until_all_closed(&self, node: &Node, patience: Patience) -> Result<()> {
        let Some(object) = node.object() else {
            return Ok(());
        };
        self.wait_until_closed_where(
            |closing| closing.object() == Some(object),
            patience,
            "a file in it is being closed",
        )
    }

    /// The same of what is such a file by now.
    fn wait_until_closed_where(
        &self,
        is_such: impl Fn(&Node) -> bool,
        patience: Patience,
        why: &str,
    ) -> Result<()> {
        loop {
            let now = Instant::now();
            let closing: Vec<Arc<Writer>> = {
                let closing = lock(&self.closing);
                let closing = closing.values().filter(|(_, until)| *until >= now);
                closing.map(|(writer, _)| Arc::clone(writer)).collect()
            };
            let is_awaited = |writer: &Arc<Writer>| {
                let node = self.committed_as(writer);
                node.is_some_and(|node| is_such(&node))
            };
            if !closing.iter().any(is_awaited) {
                return Ok(());
            }
            patience.wait(super::settle::PAUSE, why)?;
        }
    }

    /// What a descriptor has not committed by the time that it is closed for good.
    fn commit_at_last(&self, writer: &Writer, patience: Patience) -> Result<()> {
        let state = lock(&writer.state).clone();
        let Some(node) = self.committed_as(writer) else {
            // It may become an attribute at this moment.
            let wanted = |state: &State| state.written || state.resized;
            if !state.refused && wanted(&state) {
                return self.commit_writer(writer, patience, wanted);
            }
            writer.complete();
            return Ok(());
        };
        let is_scratch = matches!(writer.node, Node::Scratch(_));
        if state.refused {
            // Nobody can be told, and nothing was meant to be kept but what was refused.
            // Others who have it open may have more luck.
            if !is_scratch && self.is_last(&node, writer) {
                self.drop_fresh(&node);
            }
            return Ok(());
        }
        if state.written || state.resized {
            return self.commit_writer(writer, patience, |state| state.written || state.resized);
        }
        // Created and never written, by touch(1) say: an empty value where there is such a thing, else a file without a value, which
        // stays for whoever is going to write it.
        if let Some((_, _, slot)) = Slot::of(&node)
            && !is_scratch
            && self.is_fresh(&node)
        {
            if !lock(&writer.content).is_empty() {
                // What had been written by who was at it is nothing that anybody else means.
                if self.is_last(&node, writer) {
                    self.drop_fresh(&node);
                }
            } else if text::parse(slot.key, &[], Context::default()).is_ok() {
                return self.commit_writer(writer, patience, |_| true);
            }
        }
        Ok(())
    }

    /// Whether nobody else has `node` open for writing.
    fn is_last(&self, node: &Node, writer: &Writer) -> bool {
        let writers = lock(&self.handles).writers();
        !writers.iter().any(|other| {
            !std::ptr::eq(&raw const **other, writer)
                && self.committed_as(other).as_ref() == Some(node)
        })
    }

    /// Waits a moment for those who have cut one of these scratch files, and have closed it perhaps: whether they have is heard a little later
    /// than close(2) returns, and until then it is nothing that anybody meant.
    pub(super) fn wait_until_let_go(&self, files: &[ScratchId], patience: Patience) -> Result<()> {
        let limit = Instant::now() + LET_GO;
        let is_one = |node: &Node| matches!(node, Node::Scratch(id) if files.contains(id));
        loop {
            let mut writers = lock(&self.handles).writers();
            writers.retain(|writer| is_one(&writer.node) && lock(&writer.state).flushed);
            if writers.is_empty() {
                return Ok(());
            }
            let waited = patience.wait(super::settle::PAUSE, "the file is being closed");
            match waited {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                Ok(()) if Instant::now() < limit => {}
                // It is open. Nobody waits for that again.
                _ => {
                    for writer in writers {
                        lock(&writer.state).flushed = false;
                    }
                    return Ok(());
                }
            }
        }
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
}
