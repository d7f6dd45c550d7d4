//! Values that get into their object: into its draft if it is new, else into the store.

use std::time::SystemTime;

use super::draft::Key;
use super::node::Node;
use super::slot::Slot;
use super::text::Context;
use super::{Tree, lock, text};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::attribute::{Attributes, Value};
use crate::store::{ObjectId, Patience, TokenName, validate};

/// What is to become of a value.
pub(super) enum Text<'a> {
    /// This is the whole of it.
    Whole(&'a [u8]),
    /// This comes behind what is stored.
    Appended(&'a [u8]),
}

impl Tree {
    /// Makes `text` the value of `node`: in its draft if its object is new, else in the store.
    pub(super) fn commit(
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
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        self.replacing_all(&[node], mtime, patience, edit)
    }

    /// A change that gives some of `nodes`, all in one object, a value, and takes it from others.
    pub(super) fn replacing_all(
        &self,
        nodes: &[&Node],
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
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
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
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
        let serials = match Slot::of(node) {
            Some((token, ObjectId::Token, slot))
                if slot.key.attribute_type == pkcs11::CKA_OS_TOKENSERIAL =>
            {
                self.serials_of_others(token, patience)?
            }
            _ => Vec::new(),
        };
        self.update_store(&key, mtime, patience, &mut |attributes| {
            edit(attributes)?;
            match attributes.bytes(pkcs11::CKA_OS_TOKENSERIAL) {
                Some(serial) if serials.iter().any(|other| other == serial) => {
                    Err(doubled_serial())
                }
                _ => Ok(()),
            }
        })?;
        if *id == ObjectId::Token
            && let Some(build) = lock(&self.drafts).build_mut(token)
        {
            build.own_filled = true;
        }
        Ok(())
    }

    /// The serial numbers of all tokens but this one, as far as they can be read.
    fn serials_of_others(&self, token: &TokenName, patience: Patience) -> Result<Vec<Vec<u8>>> {
        let mut serials = Vec::new();
        for other in self.store.tokens()? {
            if other == *token {
                continue;
            }
            match self.ask(&other, patience, |other| {
                other.object(&ObjectId::Token, patience)
            }) {
                Ok(object) => {
                    let serial = object.attributes.bytes(pkcs11::CKA_OS_TOKENSERIAL);
                    serials.extend(serial.map(<[u8]>::to_vec));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                Err(_) => {}
            }
        }
        Ok(serials)
    }

    /// Changes an object of the store. Where what was unlinked and is held back stands in the way, it goes in the same step: for whoever
    /// unlinked it it is not there.
    fn update_store(
        &self,
        key: &Key,
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        let (token, id) = key;
        let held: Vec<Slot> = lock(&self.drafts)
            .get(key)
            .map(|draft| draft.removed.iter().copied().collect())
            .unwrap_or_default();
        let check = |stored: &Attributes, attributes: &Attributes| match id {
            ObjectId::Token => Ok(()),
            ObjectId::Object(_) => validate::check_finished(Some(stored), attributes),
        };
        let mut is_gone = false;
        let mut edit_visible = |attributes: &mut Attributes| {
            is_gone = false;
            let stored = attributes.clone();
            let outcome = edit(attributes).and_then(|()| check(&stored, attributes));
            match outcome {
                Err(error)
                    if !held.is_empty()
                        && matches!(error.kind(), ErrorKind::Exists | ErrorKind::Invalid) => {}
                outcome => return outcome,
            }
            *attributes = stored.clone();
            for slot in &held {
                slot.remove(attributes);
            }
            is_gone = true;
            edit(attributes)?;
            check(&stored, attributes)
        };
        self.ask(token, patience, |token| {
            token.update(id, &mut edit_visible, mtime, patience)
        })?;
        if let Some(draft) = lock(&self.drafts).get_mut(key) {
            draft.given = mtime;
            if is_gone {
                draft.removed.retain(|slot| !held.contains(slot));
            }
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
            if error.kind() == ErrorKind::WouldBlock {
                return error;
            }
            // Which attribute, and in which file of the store.
            let error = match error.path() {
                Some(_) => Error::new(error.kind(), error.to_string()),
                None => error,
            };
            let error = error.at(self.path_of(node));
            self.diagnostics.error(&error);
            error
        })
    }
}

/// SoftHSM's `SlotManager::insertToken` asserts that serial numbers differ, and ends the program otherwise.
fn doubled_serial() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "another token in this store has this serial number, and every program that uses SoftHSM would abort at its start; a copy of a \
         token belongs into another store, or needs a serial number of its own",
    )
}
