//! What is removed: files, empty directories, objects and tokens. An object goes by what it is under its locks, and not by what it was when
//! somebody looked.

use std::ffi::OsStr;
use std::time::{Duration, Instant};

use super::draft::{Draft, Key};
use super::drafts::Drafts;
use super::entries::Caller;
use super::node::{Ino, Node};
use super::slot::Slot;
use super::{FileKind, Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::{
    Access, Backend, NewObject, ObjectId, ObjectName, Patience, TokenName, validate,
};

/// What was seen of an object that is to be removed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expected {
    /// It is damaged.
    Damaged,
    /// There is nothing in it, for those who see it through the mount.
    Nothing,
    /// It can be made an object again as it is, by a rename.
    ToComeBack,
}

impl Expected {
    /// There is nothing in it, unless it is damaged.
    pub fn empty(is_damaged: bool) -> Self {
        if is_damaged {
            Self::Damaged
        } else {
            Self::Nothing
        }
    }
}

/// How long a look-up takes at least that has waited.
const WAITED: Duration = Duration::from_millis(50);

/// Somebody is removing an object, or something in it, and may have to wait for that: what he has unlinked before is not put back meanwhile for
/// having been left alone.
pub(super) struct Attending<'a> {
    tree: &'a Tree,
    key: Key,
    /// Since when it has been looked up, if it is only that: who removes an object looks it up first, so that counts if it had to wait.
    looking: Option<Instant>,
    /// Which draft it is, if there is one.
    number: Option<u64>,
}

impl<'a> Attending<'a> {
    /// For as long as `name` is looked up in a directory, if that is an object, or in one, of which something is pending.
    pub fn while_looking(tree: &'a Tree, directory: &Node, name: &OsStr) -> Option<Self> {
        let key = object_called(directory, name)?;
        lock(&tree.drafts).get(&key)?;
        let mut attending = Self::begin(tree, key);
        attending.looking = Some(Instant::now());
        Some(attending)
    }

    fn begin(tree: &'a Tree, key: Key) -> Self {
        let number = lock(&tree.drafts).get_mut(&key).map(|draft| {
            draft.attended += 1;
            draft.number
        });
        Self {
            tree,
            key,
            looking: None,
            number,
        }
    }
}

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        let mut drafts = lock(&self.tree.drafts);
        let mut is_waited_for = false;
        if let Some(number) = self.number
            // Its object may have been renamed meanwhile.
            && let Some(key) = drafts.find(&self.key, number)
            && let Some(draft) = drafts.get_mut(&key)
        {
            draft.attended = draft.attended.saturating_sub(1);
            // That of a new object does not wait for who is at it.
            is_waited_for = draft.new.is_none();
        }
        if self.looking.is_none_or(|since| since.elapsed() > WAITED) {
            drafts.touch(&self.key);
        }
        drop(drafts);
        if is_waited_for {
            self.tree.wake();
        }
    }
}

/// The object that what is called `name` in a directory is, or would be, or that it is in.
pub(super) fn object_called(directory: &Node, name: &OsStr) -> Option<Key> {
    match directory {
        Node::Token(token) => {
            let object = ObjectName::new(name)?;
            Some((token.clone(), ObjectId::Object(object)))
        }
        other => other
            .object()
            .map(|(token, id)| (token.clone(), id.clone())),
    }
}

/// An object that is gone.
#[derive(Debug)]
pub(super) struct Removed {
    /// What it held in the mount.
    pub shown: Attributes,
    /// What the store had, by which it can be made anew.
    pub stored: Option<NewObject>,
}

impl Tree {
    /// Removes a file. An attribute of an object in the store is gone from the mount at once, and from the store when the object
    /// has been left alone for a moment.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::IsADirectory`]; [`ErrorKind::ReadOnly`] below `.tokenfs`.
    pub fn unlink(&self, parent: Ino, name: &OsStr, patience: Patience) -> Result<()> {
        self.in_place(parent, patience, |directory| {
            let key = directory.object();
            let _at_it = key.map(|(token, id)| Attending::begin(self, (token.clone(), id.clone())));
            let outcome = self.unlink_in(directory, name, patience);
            self.noted_entry(directory, name, outcome)
        })
    }

    fn unlink_in(&self, directory: &Node, name: &OsStr, patience: Patience) -> Result<()> {
        self.check_writable(directory)?;
        let Some((node, kind)) = self.existing(directory, name, patience)? else {
            return Err(Error::not_found("no such file or directory"));
        };
        self.check_writable(&node)?;
        if kind == FileKind::Directory {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        }
        if let Node::Scratch(_) = node {
            lock(&self.scratch).remove(directory, name);
        } else {
            self.take_out(&node, patience)?;
            self.cut_off(&node);
        }
        // (The kernel lets nobody make it anew meanwhile.)
        self.orphan(self.open_numbers(&node));
        // It may have been what was open in a new object.
        self.wake_when_left_alone();
        Ok(())
    }

    /// Takes a value out of its object: held back if the store has it. Returns what the store has of the object at that moment.
    pub(super) fn take_out(&self, node: &Node, patience: Patience) -> Result<Attributes> {
        let Some((token, id, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::Invalid, "not an attribute"));
        };
        let key = (token.clone(), id.clone());
        let then = loop {
            let (commits, was_new) = {
                let drafts = lock(&self.drafts);
                (drafts.commits, drafts.is_new(&key))
            };
            let then = match self.stored(token, id, patience) {
                Ok(object) => object.attributes.clone(),
                // It is new, or gone by now.
                Err(error) if error.kind() == ErrorKind::NotFound => Attributes::new(),
                Err(error) => return Err(error),
            };
            let is_out = self.with_drafts(&key, patience, |drafts| {
                // Otherwise it got into the store, or was given a value, since it was looked at.
                let is_so = drafts.is_new(&key) || !was_new && drafts.commits == commits;
                if is_so {
                    Self::hold(drafts, &key, slot, &then);
                }
                Ok(is_so)
            })?;
            if is_out {
                break then;
            }
        };
        self.wake();
        Ok(then)
    }

    /// Takes a value out of a draft, or holds it back if the store has it, where it was one of those of `then`.
    fn hold(drafts: &mut Drafts, key: &Key, slot: Slot, then: &Attributes) {
        let draft = drafts.entry(key);
        let was_fresh = draft.fresh.remove(&slot).is_some();
        draft.fresh.retain(|held, _| !held.is_in(slot));
        let was_committing = draft.overtake(slot);
        let held = draft.removed.get(&slot).map(|held| slot.get(held));
        let is_held = slot.get(then).is_none() || held == Some(slot.get(then));
        match &mut draft.new {
            Some(new) => {
                slot.remove(&mut new.attributes);
                new.unwritten.remove(&slot);
            }
            // What was unlinked before it was created again is held already, unless SoftHSM has given it a value meanwhile.
            None if was_fresh && !was_committing && is_held => {}
            None => {
                draft.removed.retain(|held, _| !held.is_in(slot));
                draft.removed.insert(slot, then.clone());
                draft.given = None;
            }
        }
        drafts.touch(key);
        drafts.tidy(key);
    }

    /// Removes an empty directory, or a damaged object, whose content nobody can list. An object goes from the store as a whole. `by` is
    /// who asks, as in [`RenameHow`](super::RenameHow).
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`]; [`ErrorKind::NotFound`]; [`ErrorKind::NotADirectory`]; what the store fails with.
    pub fn remove_dir(
        &self,
        parent: Ino,
        name: &OsStr,
        by: Option<Caller>,
        patience: Patience,
    ) -> Result<()> {
        self.in_place(parent, patience, |directory| {
            let key = object_called(directory, name);
            let _at_it = key.map(|key| Attending::begin(self, key));
            let _shut = self.shut_object(directory, name, patience)?;
            let outcome = self.remove_dir_in(directory, name, by, patience);
            self.noted_entry(directory, name, outcome)
        })
    }

    fn remove_dir_in(
        &self,
        directory: &Node,
        name: &OsStr,
        by: Option<Caller>,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(directory)?;
        let Some((node, kind)) = self.existing(directory, name, patience)? else {
            return Err(Error::not_found("no such file or directory"));
        };
        self.check_writable(&node)?;
        if kind != FileKind::Directory {
            return Err(Error::new(ErrorKind::NotADirectory, "not a directory"));
        }
        let is_damaged = self.check_empty(&node, by, patience)?;
        match &node {
            Node::Scratch(_) => lock(&self.scratch).remove(directory, name),
            Node::Attribute(..) => {
                self.take_out(&node, patience)?;
                self.cut_off(&node);
            }
            Node::Object(token, ObjectId::Token) => self.remove_own(token),
            Node::Object(token, ObjectId::Object(object)) => {
                self.remove_object(token, object, Expected::empty(is_damaged), patience)?;
                self.abandon(&(token.clone(), ObjectId::Object(object.clone())));
            }
            Node::Token(token) => {
                self.end_building(token, patience, || self.store.remove_token(token, patience))?;
                lock(&self.drafts).remove_token(token);
                self.abandon_all(token);
                self.warn_of_slots(token, patience);
            }
            _ => return Err(Error::new(ErrorKind::ReadOnly, "cannot be removed")),
        }
        if let Some(ino) = self.known_number(&node) {
            self.bury(ino);
        }
        lock(&self.scratch).clear(&node);
        self.wake();
        Ok(())
    }

    /// A token was removed: says so if SoftHSM cannot live with those that are left.
    fn warn_of_slots(&self, removed: &TokenName, patience: Patience) {
        if let Ok(slots) = self.slots_of_others(removed, patience)
            && let Err(error) = validate::check_slots(&slots)
        {
            self.diagnostics
                .warning(format!("{removed}: it was removed, and {error}"));
        }
    }

    /// That a directory can go, or be replaced: there is nothing in it, or it is a damaged object, which goes as a whole. Says whether
    /// it is that.
    pub(super) fn check_empty(
        &self,
        node: &Node,
        by: Option<Caller>,
        patience: Patience,
    ) -> Result<bool> {
        if self.is_damaged(node, patience)? {
            if let Some(token) = node.token() {
                self.check_may_write(token, by, patience)?;
            }
            return Ok(true);
        }
        if self.children(node, patience)?.is_empty() || self.has_only_defaults(node, patience)? {
            return Ok(false);
        }
        Err(Error::new(
            ErrorKind::NotEmpty,
            "there is something in it still",
        ))
    }

    /// Whether SoftHSM has added something to an object while that was being removed, and nothing else is left.
    fn has_only_defaults(&self, node: &Node, patience: Patience) -> Result<bool> {
        let Node::Object(token, id @ ObjectId::Object(_)) = node else {
            return Ok(false);
        };
        let left = self.object(token, id, patience)?;
        let drafts = lock(&self.drafts);
        let draft = drafts.get(&(token.clone(), id.clone()));
        Ok(draft.is_some_and(|draft| draft.has_only_defaults(&left.attributes)))
    }

    /// Removes an object, whether it is in the store by now or not, if it is what is expected; returns what it held in the mount.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`] if it is something else: somebody has given it a value since it was looked at.
    pub(super) fn remove_object(
        &self,
        token: &TokenName,
        object: &ObjectName,
        expected: Expected,
        patience: Patience,
    ) -> Result<Removed> {
        let key = (token.clone(), ObjectId::Object(object.clone()));
        let check = |draft: Option<&Draft>, attributes: &Attributes| match expected {
            Expected::Nothing
                if !attributes.is_empty()
                    && !draft.is_some_and(|draft| draft.has_only_defaults(attributes)) =>
            {
                Err(Error::new(
                    ErrorKind::NotEmpty,
                    "somebody has put something into it meanwhile",
                ))
            }
            Expected::ToComeBack => self.check_can_come_back((token, object), draft, attributes),
            Expected::Nothing | Expected::Damaged => Ok(()),
        };
        let was_new = self.with_drafts(&key, patience, |drafts| {
            let Some(attributes) = drafts.new_attributes(&key) else {
                return Ok(None);
            };
            if !matches!(expected, Expected::ToComeBack) {
                check(None, &attributes)?;
            }
            drafts.remove(&key);
            drafts.touch(&key);
            Ok(Some(attributes))
        })?;
        if let Some(shown) = was_new {
            return Ok(Removed {
                shown,
                stored: None,
            });
        }
        let metadata = self.object_metadata(token, &key.1, patience)?;
        let mut last = Attributes::new();
        let mut whole = None;
        // Who may rename files in the store can have given the name to another one, which the caller may not take.
        let is_file = self.token(token)?.backend() == Backend::File;
        self.ask(token, patience, |token| match expected {
            Expected::Damaged => token.replace_damaged(object, None, patience),
            Expected::Nothing | Expected::ToComeBack => {
                let mut check = |stored: Result<&Attributes>| {
                    if is_file {
                        let now = token.object_metadata(&key.1, Patience::Now)?;
                        if (now.uid, now.gid, now.mode)
                            != (metadata.uid, metadata.gid, metadata.mode)
                        {
                            let detail = "it has another mode or owner than a moment ago";
                            return Err(Error::new(ErrorKind::Stale, detail));
                        }
                    }
                    last = stored?.clone();
                    whole = Some(last.clone());
                    // What has been done in it since it was looked at counts, too.
                    let now = lock(&self.drafts).get(&key).cloned();
                    for (slot, then) in now.iter().flat_map(|draft| &draft.removed) {
                        slot.remove_unchanged(&mut last, then);
                    }
                    check(now.as_ref(), &last)
                };
                token.remove_if(object, &mut check, patience)
            }
        })?;
        lock(&self.drafts).remove(&key);
        Ok(Removed {
            shown: last,
            stored: whole.map(|attributes| NewObject {
                attributes,
                access: Access {
                    mode: metadata.mode,
                    uid: metadata.uid,
                    gid: metadata.gid,
                },
                mtime: Some(metadata.mtime),
            }),
        })
    }

    /// The directory of a token's own attributes is gone from the mount; from the store only with the token.
    fn remove_own(&self, token: &TokenName) {
        let mut drafts = lock(&self.drafts);
        if let Some(build) = drafts.build_mut(token) {
            build.has_own = false;
            return;
        }
        let key = (token.clone(), ObjectId::Token);
        drafts.entry(&key).gone = true;
        drafts.touch(&key);
    }
}
