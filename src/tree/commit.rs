//! Values that get into their object: into its draft if it is new, else into the store.

use std::path::Path;
use std::time::SystemTime;

use nix::sys::statvfs::FsFlags;

use super::cut::Trace;
use super::draft::Key;
use super::drafts::Drafts;
use super::entries::exists;
use super::node::Node;
use super::publish::BRIEF;
use super::scratch::{Content, ScratchId};
use super::slot::Slot;
use super::text::Context;
use super::write::check_length;
use super::{Tree, lock, text};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::attribute::{Attributes, Value};
use crate::store::{ObjectId, Patience, TokenName, validate};

/// A commit that is on its way.
#[derive(Clone, Copy)]
struct Commit<'a> {
    number: u64,
    slots: &'a [Slot],
    /// Whether what it commits still belongs there.
    is_wanted: &'a dyn Fn() -> bool,
}

/// That what is to be replaced is no attribute map that somebody has put something into since it was looked at.
///
/// # Errors
/// [`ErrorKind::NotEmpty`].
pub(super) fn check_still_empty(there: Option<&Value>) -> Result<()> {
    match there {
        Some(Value::Map(present)) if !present.is_empty() => {
            let detail = "there is something in it by now";
            Err(Error::new(ErrorKind::NotEmpty, detail))
        }
        _ => Ok(()),
    }
}

/// What is always wanted.
pub(super) fn always() -> bool {
    true
}

/// What is to become of a value.
pub(super) enum Text<'a> {
    /// This is the whole of it.
    Whole(&'a [u8]),
    /// This is the whole of it, unless another value is stored by now than the one that was cut to it.
    Cut(&'a [u8], Trace),
    /// This comes behind what is stored.
    Appended(&'a [u8]),
    /// What is stored, cut or extended to so many bytes; if there is nothing, this, or it is gone.
    Resized(usize, Option<&'a [u8]>),
    /// This, if there is nothing: of a file that was made and never written, which somebody else may have written meanwhile.
    First(&'a [u8]),
}

impl Tree {
    /// Makes `text` the value of `node`: in its draft if its object is new, else in the store. Returns whether the text of that is the `text`, byte for
    /// byte, and not what is written otherwise (`1`, which is `true`) or only a part of it. What is not wanted any more when it is its turn is not done.
    pub(super) fn commit(
        &self,
        node: &Node,
        text: &Text<'_>,
        mtime: Option<SystemTime>,
        is_wanted: &dyn Fn() -> bool,
        patience: Patience,
    ) -> Result<bool> {
        let Some((_, _, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        };
        let length = match text {
            Text::Whole(text) | Text::Cut(text, _) | Text::Appended(text) | Text::First(text) => {
                text.len()
            }
            Text::Resized(size, _) => *size,
        };
        if length > BRIEF && matches!(patience, Patience::Now) {
            let detail = "it takes a moment to read so long a text";
            return Err(Error::new(ErrorKind::WouldBlock, detail));
        }
        let mut is_same = false;
        self.replacing_all(&[node], mtime, is_wanted, patience, &mut |attributes| {
            let siblings = slot.siblings(attributes);
            let context = siblings.map(Context::of).unwrap_or_default();
            let stored = siblings.and_then(|siblings| siblings.get(slot.key));
            is_same = false;
            let value = match text {
                Text::First(_) if stored.is_some() => return Ok(()),
                Text::Cut(_, was) if !was.is_stored(slot, attributes) => return Ok(()),
                Text::Whole(text) | Text::First(text) | Text::Cut(text, _) => {
                    text::parse(slot.key, text, context)?
                }
                Text::Appended(text) => {
                    let mut whole = match stored {
                        Some(stored) => {
                            text::render(slot.key.attribute_type, stored, context)?.into_owned()
                        }
                        None => Vec::new(),
                    };
                    whole.extend_from_slice(text);
                    check_length(whole.len() as u64)?;
                    text::parse(slot.key, &whole, context)?
                }
                Text::Resized(size, fallback) => {
                    let mut whole = match stored {
                        Some(stored) => {
                            text::render(slot.key.attribute_type, stored, context)?.into_owned()
                        }
                        None => fallback
                            .ok_or_else(|| Error::not_found("it was unlinked meanwhile"))?
                            .to_vec(),
                    };
                    whole.resize(*size, 0);
                    text::parse(slot.key, &whole, context)?
                }
            };
            if let Text::Whole(text) | Text::Cut(text, _) = text {
                is_same = **text == *text::render(slot.key.attribute_type, &value, context)?;
            }
            slot.set(attributes, value)
        })?;
        Ok(is_same)
    }

    /// Makes `text` the content of a scratch file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if that is gone by now; [`ErrorKind::NoSpace`] beyond the limit for what is in memory.
    pub(super) fn commit_to_scratch(
        &self,
        id: ScratchId,
        text: &Text<'_>,
        mtime: Option<SystemTime>,
    ) -> Result<()> {
        let more = match text {
            Text::Whole(bytes)
            | Text::Cut(bytes, _)
            | Text::Appended(bytes)
            | Text::First(bytes) => bytes.len(),
            Text::Resized(size, _) => *size,
        };
        self.check_memory(more as u64)?;
        let mut scratch = lock(&self.scratch);
        let entry = scratch.get_mut(id)?;
        let Content::File(content) = &entry.content else {
            return Ok(());
        };
        let mut content = lock(content);
        match text {
            // Somebody has written something else into it since.
            Text::Cut(_, was) if !was.is_text(content.complete()) => return Ok(()),
            Text::Whole(bytes) | Text::Cut(bytes, _) => content.set(bytes.to_vec()),
            Text::First(_) => {}
            Text::Appended(bytes) => content.append(bytes),
            Text::Resized(size, _) => content.set_len(*size),
        }
        drop(content);
        entry.ctime = SystemTime::now();
        entry.mtime = mtime.unwrap_or(entry.ctime);
        entry.given = mtime;
        Ok(())
    }

    /// Makes a text the value of `node`, at the time `mtime`.
    pub(super) fn commit_text(
        &self,
        node: &Node,
        text: &[u8],
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.commit(node, &Text::Whole(text), mtime, &always, patience)?;
        Ok(())
    }

    /// Cuts or extends the text of `node`: what it is at that moment. `fallback` is what it becomes if it has none, where it need not have one.
    pub(super) fn commit_resized(
        &self,
        node: &Node,
        size: u64,
        fallback: Option<&[u8]>,
        patience: Patience,
    ) -> Result<()> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.commit(
            node,
            &Text::Resized(size, fallback),
            None,
            &always,
            patience,
        )?;
        Ok(())
    }

    /// Makes an attribute map of `entries`, which can take the place of an empty one if it `replaces` it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] or [`ErrorKind::NotEmpty`] if there is one by then, which somebody else may have made meanwhile.
    pub(super) fn commit_map(
        &self,
        node: &Node,
        entries: &Attributes,
        replaces: bool,
        patience: Patience,
    ) -> Result<()> {
        let Some((_, _, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::Invalid, "no attribute"));
        };
        self.replacing_all(&[node], None, &always, patience, &mut |attributes| {
            match slot.get(attributes) {
                Some(_) if !replaces => return Err(exists()),
                there => check_still_empty(there)?,
            }
            slot.set(attributes, Value::Map(entries.clone()))
        })
    }

    /// A change that gives some of `nodes`, all in one object, a value, and takes it from others, if that `is_wanted` when it is its turn.
    pub(super) fn replacing_all(
        &self,
        nodes: &[&Node],
        mtime: Option<SystemTime>,
        is_wanted: &dyn Fn() -> bool,
        patience: Patience,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        let Some(first) = nodes.first() else {
            return Ok(());
        };
        let Some((token, id)) = first.object() else {
            return Err(Error::new(ErrorKind::Invalid, "not in an object"));
        };
        let key = (token.clone(), id.clone());
        let slots: Vec<Slot> = nodes
            .iter()
            .filter_map(|node| Slot::of(node).map(|(_, _, slot)| slot))
            .collect();
        // Before the value is there: nobody must take it for the one that was unlinked, and remove it.
        let (number, commit, held) = self.with_drafts(&key, patience, |drafts| {
            let commit = drafts.begin_commit();
            let draft = drafts.entry(&key);
            for slot in &slots {
                draft.committing.entry(*slot).or_default().insert(commit);
                draft.written.insert(*slot);
            }
            let ours = |held: &Slot| slots.iter().any(|slot| held == slot || held.is_in(*slot));
            let held = draft.removed.iter().filter(|(slot, _)| ours(slot));
            let held: Vec<(Slot, Attributes)> =
                held.map(|(slot, then)| (*slot, then.clone())).collect();
            Ok((draft.number, commit, held))
        })?;
        let mut made = None;
        let coming = Commit {
            number: commit,
            slots: &slots,
            is_wanted,
        };
        let outcome = self.change(first, mtime, coming, patience, &mut |attributes| {
            // What the store has there still is not there for whoever unlinked it.
            for (slot, then) in &held {
                slot.remove_unchanged(attributes, then);
            }
            edit(attributes)?;
            made = Some(attributes.clone());
            Ok(())
        });
        let mut drafts = lock(&self.drafts);
        drafts.commits += 1;
        // The object may have another name by now, or there is another one of this name.
        let key = drafts.find(&key, number).unwrap_or(key);
        let draft = drafts.get_mut(&key).filter(|draft| draft.number == number);
        let mut was_overtaken = false;
        if let Some(draft) = draft {
            for slot in slots {
                if draft.end_commit(slot, commit) {
                    was_overtaken = true;
                    // What has come is to go again, if anything has.
                    let mut removed = draft.removed.iter_mut();
                    if outcome.is_ok()
                        && let Some(made) = &made
                        && let Some((_, then)) =
                            removed.find(|(held, _)| **held == slot || slot.is_in(**held))
                    {
                        then.clone_from(made);
                    }
                    continue;
                }
                if outcome.is_ok() && made.is_some() {
                    draft.fresh.remove(&slot);
                    draft
                        .removed
                        .retain(|held, _| *held != slot && !held.is_in(slot));
                }
            }
        }
        if outcome.is_ok() {
            drafts.touch(&key);
        }
        drafts.tidy(&key);
        let can_be_due = outcome.is_err() || was_overtaken || drafts.is_finished(&key.0);
        drop(drafts);
        self.wake_for(can_be_due);
        if outcome.is_ok() {
            // It may have been the last thing that the directory's time was kept for.
            self.restore_time(&key.0, patience);
        }
        outcome
    }

    /// Changes the object that `node` is in: its draft if it is new, else what the store has. What has been unlinked since it was on its way changes
    /// nothing: what came behind that may be there already.
    fn change(
        &self,
        node: &Node,
        mtime: Option<SystemTime>,
        coming: Commit<'_>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        let Some((token, id)) = node.object() else {
            return Err(Error::new(ErrorKind::Invalid, "not in an object"));
        };
        // All of an unlink can have been before it had its number.
        if !(coming.is_wanted)() {
            return Ok(());
        }
        let key = (token.clone(), id.clone());
        let slot = Slot::of(node).map(|(_, _, slot)| slot);
        let room = self.room(token)?;
        let in_draft = self.with_drafts(&key, patience, |drafts| {
            let Some(old) = drafts.new_attributes(&key) else {
                return Ok(false);
            };
            if is_overtaken(drafts, &key, coming) {
                return Ok(true);
            }
            let mut attributes = old.clone();
            edit(&mut attributes)?;
            validate::check(Some(&old), &attributes)?;
            let outcome = drafts.check_disk(&room, &old, &attributes);
            let Some(new) = drafts.get_mut(&key).and_then(|draft| draft.new.as_mut()) else {
                return Ok(false);
            };
            if let Err(error) = outcome {
                new.unwritten.extend(slot);
                return Err(error);
            }
            // Of a rename, both: the one has a value by now, the other one needs none.
            for slot in coming.slots {
                new.unwritten.remove(slot);
            }
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
        // Whichever of them gets another value.
        let is_serial = |slot: &Slot| slot.key.attribute_type == pkcs11::CKA_OS_TOKENSERIAL;
        let taken = if *id == ObjectId::Token && coming.slots.iter().any(is_serial) {
            Some(self.slots_of_others(token, patience)?)
        } else {
            None
        };
        self.begin_dating(&key, mtime, patience)?;
        let mut is_late = false;
        let outcome = self.update_store(&key, mtime, patience, &mut |attributes| {
            is_late = is_overtaken(&lock(&self.drafts), &key, coming) || !(coming.is_wanted)();
            if is_late {
                return Err(Error::not_found("its place was unlinked meanwhile"));
            }
            edit(attributes)?;
            if let Some(taken) = &taken {
                validate::check_slot(attributes, taken)?;
            }
            if *id == ObjectId::Token {
                validate::check_token(attributes)?;
            }
            Ok(())
        });
        if let Err(error) = outcome {
            self.give_up_dating(&key);
            return if is_late { Ok(()) } else { Err(error) };
        }
        self.end_dating(&key, coming.slots, mtime, patience);
        if *id == ObjectId::Token
            && let Some(build) = lock(&self.drafts).build_mut(token)
        {
            build.own_filled = true;
        }
        Ok(())
    }

    /// The slots that SoftHSM gives all tokens but this one, as far as they can be read.
    pub(super) fn slots_of_others(
        &self,
        token: &TokenName,
        patience: Patience,
    ) -> Result<Vec<u64>> {
        self.store.slots_of_others(token, |other| {
            self.ask(other, patience, |other| {
                other.object(&ObjectId::Token, patience)
            })
        })
    }

    /// That something can be written at all.
    pub(super) fn check_writable(&self, node: &Node) -> Result<()> {
        let derived = matches!(
            node,
            Node::Control
                | Node::Log
                | Node::Server
                | Node::ByLabel
                | Node::TokenByLabel(_)
                | Node::ObjectByLabel(..)
                | Node::Layout
                | Node::TokenLayout(_)
                | Node::FileInLayout(..)
        );
        if derived {
            let detail =
                "everything in .tokenfs is made from the store and cannot be changed there";
            return Err(Error::new(ErrorKind::ReadOnly, detail));
        }
        if self.store.options().read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the mount takes no writes (-o ro, or --snapshot)",
            ));
        }
        // Now, and not when the file is closed: programs do not look then.
        if self.store.statvfs()?.flags().contains(FsFlags::ST_RDONLY) {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the file system that the store is on is read-only",
            ));
        }
        Ok(())
    }

    /// Records why something was not written, with its name.
    pub(super) fn noted_write<T>(&self, node: &Node, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| {
            // What is named in the words of the tree is in the log already.
            let is_ordinary = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Stale);
            if is_ordinary || error.path().is_some_and(Path::is_relative) {
                return error;
            }
            let path = self.path_of(node);
            if error.kind() == ErrorKind::NotFound && path.as_os_str().is_empty() {
                // It was scratch, and is not even that any more.
                return error;
            }
            // Which attribute, and in which file of the store.
            let error = error.of(&path);
            self.diagnostics.error(&error);
            error
        })
    }
}

/// Whether the place of a commit was unlinked since it began.
fn is_overtaken(drafts: &Drafts, key: &Key, commit: Commit<'_>) -> bool {
    drafts.get(key).is_some_and(|draft| {
        let mut slots = commit.slots.iter();
        slots.any(|slot| draft.is_overtaken(*slot, commit.number))
    })
}
