//! Renaming: what becomes what (`publish` does it where scratch comes into it), what the kernel's numbers stand for then, and what cannot be
//! renamed.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;

use super::commit::{always, check_still_empty};
use super::draft::{Key, New};
use super::due::AT_LEAST;
use super::entries::{Caller, exists};
use super::makers::Makers;
use super::name;
use super::node::{Ino, Node};
use super::place::Place;
use super::remove::{Expected, object_called};
use super::settle::Finished;
use super::slot::{Slot, map_key};
use super::still::Spot;
use super::text::Context;
use super::{FileKind, Tree, lock, text, view};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};
use crate::store::{Access, Backend, NewObject, ObjectId, ObjectName, Patience, TokenName};

/// What `renameat2(2)` was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameHow {
    /// `RENAME_NOREPLACE`.
    pub no_replace: bool,
    /// Who asks, where that is known: the kernel has looked at the modes of both directories, which say nothing of who may write into a
    /// database.
    pub by: Option<Caller>,
}

/// One end of a rename.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub directory: &'a Node,
    pub name: &'a OsStr,
}

impl Tree {
    /// Renames what is called `from_name` in `from` to `to_name` in `to`. A scratch file that is renamed to an attribute is
    /// committed; one that is renamed over an attribute replaces its value, in one step.
    ///
    /// # Errors
    /// [`ErrorKind::CrossDevice`] between tokens, between objects, and for tokens: mv(1) copies then; [`ErrorKind::Invalid`] for a name
    /// that was meant as an attribute and is none, and for a text that is no value of it; [`ErrorKind::Exists`],
    /// [`ErrorKind::NotEmpty`], [`ErrorKind::IsADirectory`] and [`ErrorKind::NotADirectory`] as `rename(2)` says; what the store fails
    /// with.
    pub fn rename(
        &self,
        from: (Ino, &OsStr),
        to: (Ino, &OsStr),
        how: RenameHow,
        patience: Patience,
    ) -> Result<()> {
        loop {
            let directories = (self.node(from.0)?, self.node(to.0)?);
            let source = End {
                directory: &directories.0,
                name: from.1,
            };
            let target = End {
                directory: &directories.1,
                name: to.1,
            };
            let spots = self.spots_of_rename(source, target);
            let is_scratch = |spot: &Spot| match spot {
                Spot::Scratch(id) => Some(*id),
                _ => None,
            };
            let files: Vec<_> = spots.iter().filter_map(is_scratch).collect();
            self.wait_until_let_go(&files, patience)?;
            let _shut = self.shut(spots.iter().cloned(), patience)?;
            // Otherwise their object was renamed meanwhile, or more was put into what is renamed.
            let known: HashSet<&Spot> = spots.iter().collect();
            let is_all = |now: Vec<Spot>| now.iter().all(|spot| known.contains(spot));
            if (self.node(from.0)?, self.node(to.0)?) == directories
                && is_all(self.spots_of_rename(source, target))
            {
                let outcome = self.rename_nodes(source, target, to.0, how, patience);
                return self.noted_entry(&directories.1, to.1, outcome);
            }
        }
    }

    /// What nobody may be using while something is renamed: the objects, or scratch directories, that it is in, or that it is or becomes, and of
    /// scratch the files that may become attributes.
    fn spots_of_rename(&self, from: End<'_>, to: End<'_>) -> Vec<Spot> {
        let in_object = |end: &End<'_>| object_called(end.directory, end.name).map(Spot::Object);
        let mut spots: Vec<Spot> = [from, to].iter().filter_map(in_object).collect();
        let directories = [from.directory, to.directory].into_iter();
        spots.extend(directories.filter_map(|directory| match directory {
            Node::Scratch(id) => Some(Spot::Scratch(*id)),
            _ => None,
        }));
        let scratch = lock(&self.scratch);
        if let Some(id) = scratch.find(from.directory, from.name) {
            spots.extend(scratch.below(id).into_iter().map(Spot::Scratch));
        }
        spots
    }

    fn rename_nodes(
        &self,
        from: End<'_>,
        to: End<'_>,
        to_parent: Ino,
        how: RenameHow,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(from.directory)?;
        self.check_writable(to.directory)?;
        let Some((node, kind)) = self.existing(from.directory, from.name, patience)? else {
            return Err(Error::not_found("no such file or directory"));
        };
        self.check_writable(&node)?;
        let mut replaces_damaged = false;
        let mut orphans = Vec::new();
        if let Some((replaced, replaced_kind)) = self.existing(to.directory, to.name, patience)? {
            if how.no_replace {
                return Err(exists());
            }
            if replaced == node {
                return Ok(());
            }
            match (kind, replaced_kind) {
                (FileKind::Directory, FileKind::Directory) => {
                    replaces_damaged = self.check_empty(&replaced, how.by, patience)?;
                }
                (FileKind::Directory, _) => {
                    return Err(Error::new(ErrorKind::NotADirectory, "a file has that name"));
                }
                (_, FileKind::Directory) => {
                    return Err(Error::new(
                        ErrorKind::IsADirectory,
                        "a directory has that name",
                    ));
                }
                _ => orphans = self.open_numbers(&replaced),
            }
        }
        let ino = self.known_number(&node);
        let place = self.place(to.directory, to.name, kind)?;
        // There is nothing, or nothing that stays: what the kernel knows by that name is something that is gone.
        let target = place.directory().filter(|_| kind == FileKind::Directory);
        if let (Node::Scratch(id), Place::Attribute(_) | Place::Object(..)) = (&node, &place) {
            self.check_may_read(*id, how.by)?;
        }
        let buried = target.as_ref().and_then(|target| self.known_number(target));
        match (&node, place) {
            (Node::Scratch(id), Place::Attribute(target)) => {
                if kind == FileKind::Directory {
                    self.check_brief(*id, patience)?;
                    let files = self.files_below(&node, &target);
                    self.publish_map(*id, &target, patience)?;
                    self.end_scratch((&node, from), &target, &files);
                } else {
                    self.publish_file(*id, from, &target, patience)?;
                }
                self.rebind(ino, &target, to_parent);
                self.forget_if_closed(*id);
            }
            (Node::Scratch(_), Place::Scratch) => {
                lock(&self.scratch).rename((from.directory, from.name), (to.directory, to.name))?;
                self.rebind(ino, &node, to_parent);
            }
            (Node::Scratch(id), Place::Object(token, object)) => {
                self.check_may_write(&token, how.by, patience)?;
                self.check_brief(*id, patience)?;
                let target = Node::Object(token.clone(), ObjectId::Object(object.clone()));
                let files = self.files_below(&node, &target);
                self.publish_object(*id, (&token, &object), replaces_damaged, patience)?;
                self.abandon(&(token.clone(), ObjectId::Object(object.clone())));
                self.end_scratch((&node, from), &target, &files);
                self.rebind(ino, &target, to_parent);
            }
            (Node::Attribute(..) | Node::MapEntry(..), Place::Attribute(target)) => {
                if node.object() != target.object() {
                    return Err(other_device());
                }
                self.move_value(&node, &target, patience)?;
                self.rebind(ino, &target, to_parent);
                self.forget_all_opened(&target);
            }
            (Node::Attribute(..) | Node::MapEntry(..), Place::Scratch) => {
                self.check_may_take(&node, how.by, patience)?;
                let made = self.move_to_scratch((&node, false), to, patience, || {
                    self.take_out(&node, patience).map(Some)
                })?;
                if let Some((token, id, slot)) = Slot::of(&node) {
                    let key = (token.clone(), id.clone());
                    self.follow_into_scratch(&key, Some(slot), made);
                }
                lock(&self.scratch).move_all(&node, &Node::Scratch(made), |_| true);
                self.rebind(ino, &Node::Scratch(made), to_parent);
            }
            (
                Node::Object(token, id @ ObjectId::Object(object)),
                Place::Object(to_token, to_object),
            ) => {
                if *token != to_token {
                    return Err(other_device());
                }
                self.check_may_write(token, how.by, patience)?;
                self.rename_object(token, (object, &to_object), replaces_damaged, patience)?;
                let to_id = ObjectId::Object(to_object.clone());
                self.abandon(&(token.clone(), to_id.clone()));
                self.move_dates(
                    &(token.clone(), id.clone()),
                    &(token.clone(), to_id.clone()),
                );
                self.moved(&(token.clone(), id.clone()), |slot| {
                    let now = slot.node(token, &to_id);
                    Some(super::handle::Place::Moved(now))
                });
                let key = (token.clone(), id.clone());
                let mut scratch = lock(&self.scratch);
                scratch.move_along(&key, |_, map| {
                    Some(match map {
                        Some(map) => Node::Attribute(token.clone(), to_id.clone(), map_key(map)),
                        None => Node::Object(token.clone(), to_id.clone()),
                    })
                });
                drop(scratch);
                let target = Node::Object(to_token, ObjectId::Object(to_object));
                self.rebind(ino, &target, to_parent);
            }
            (Node::Object(token, ObjectId::Object(object)), Place::Scratch) => {
                let is_here = matches!(to.directory, Node::Token(other) if other == token);
                if !is_here {
                    return Err(other_device());
                }
                self.check_may_write(token, how.by, patience)?;
                let is_damaged = self.is_damaged(&node, patience)?;
                let key = (token.clone(), ObjectId::Object(object.clone()));
                // Who may not put it back as it was does not take it away.
                if self.token(token)?.backend() == Backend::File {
                    let metadata = self.object_metadata(token, &key.1, patience)?;
                    self.check_owner(Access {
                        mode: metadata.mode,
                        uid: metadata.uid,
                        gid: metadata.gid,
                    })?;
                }
                self.check_may_take(&node, how.by, patience)?;
                self.check_is_written(&key)?;
                let made = self.move_to_scratch((&node, is_damaged), to, patience, || {
                    let expected = if is_damaged {
                        Expected::Damaged
                    } else {
                        Expected::ToComeBack
                    };
                    self.remove_object(token, object, expected, patience)
                        .map(|removed| Some(removed.shown))
                })?;
                self.follow_into_scratch(&key, None, made);
                self.forget_dates(&key);
                lock(&self.scratch).move_along(&key, |scratch, map| {
                    let Some(map) = map else {
                        return Some(Node::Scratch(made));
                    };
                    let name = name::file_name(map_key(map));
                    let map = scratch.find(&Node::Scratch(made), OsStr::new(&*name))?;
                    Some(Node::Scratch(map))
                });
                self.rebind(ino, &Node::Scratch(made), to_parent);
            }
            // mv(1) copies what has to be copied.
            (Node::Token(_), _) | (_, Place::Token(_)) => return Err(other_device()),
            (_, Place::Own(_)) | (Node::Object(_, ObjectId::Token), _)
                if from.directory == to.directory =>
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "the directory token is part of its token and keeps its name",
                ));
            }
            _ => return Err(other_device()),
        }
        if let Some(ino) = buried {
            self.bury(ino);
        }
        self.orphan(orphans);
        self.wake();
        Ok(())
    }

    /// The number under which the kernel knows `node`.
    pub(super) fn known_number(&self, node: &Node) -> Option<Ino> {
        lock(&self.inodes).find(node)
    }

    /// The kernel goes on to use the numbers that it has: they stand for what was renamed, and what is in it.
    fn rebind(&self, ino: Option<Ino>, target: &Node, parent: Ino) {
        let Some(ino) = ino else {
            return;
        };
        let below = {
            let mut inodes = lock(&self.inodes);
            inodes.rebind(ino, target.clone(), Some(parent));
            // From here on no answer that was found under its old name gets in (`lookup`).
            inodes.below(ino)
        };
        for child in below {
            let (old, directory) = {
                let inodes = lock(&self.inodes);
                let Some(inode) = inodes.get(child) else {
                    continue;
                };
                let directory = inodes.get(inode.parent).map(|parent| parent.node.clone());
                (inode.node.clone(), directory)
            };
            // Scratch stays what it is.
            let Some((_, _, slot)) = Slot::of(&old) else {
                continue;
            };
            // Parents come before their children, and are what they are now by the time that it is their turn. Nothing is asked of the store: it
            // could have no answer just now, and who holds the old number would come to another object.
            let node = match directory {
                Some(Node::Object(token, id)) => Some(Node::Attribute(token, id, slot.key)),
                Some(Node::Attribute(token, id, map)) => {
                    Some(Node::MapEntry(token, id, map.attribute_type, slot.key))
                }
                Some(Node::Scratch(of)) => {
                    let name = name::file_name(slot.key);
                    let found = lock(&self.scratch).find(&Node::Scratch(of), OsStr::new(&*name));
                    found.map(Node::Scratch)
                }
                _ => None,
            };
            if let Some(node) = node {
                lock(&self.inodes).rebind(child, node, None);
            }
        }
    }

    /// What is to be replaced by an object is an empty directory or a damaged object, as `rename` has seen to: one that the store has
    /// because all of it was unlinked just now goes, for good if what is to be there can be put there ([`Tree::give_back`]).
    pub(super) fn make_room(
        &self,
        key: &Key,
        object: &ObjectName,
        is_damaged: bool,
        patience: Patience,
    ) -> Result<Option<NewObject>> {
        let is_new = self.with_drafts(key, patience, |drafts| Ok(drafts.is_new(key)))?;
        if is_new {
            return Ok(None);
        }
        match self.remove_object(&key.0, object, Expected::empty(is_damaged), patience) {
            Ok(removed) => Ok(removed.stored),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What room was made for could not be put there: what was there, and whose attributes were unlinked, is back, as it is after a removal that fails. What
    /// cannot be written at once is pending, and written as soon as it can be.
    pub(super) fn give_back(&self, key: &Key, removed: Option<NewObject>) {
        let Some(removed) = removed else {
            return;
        };
        let new = New {
            attributes: removed.attributes,
            access: removed.access,
            mtime: removed.mtime,
            unwritten: BTreeSet::new(),
            makers: Makers::default(),
        };
        {
            let mut drafts = lock(&self.drafts);
            if drafts.is_new(key) {
                // Somebody has made another one there.
                return;
            }
            drafts.insert_new(key.clone(), new);
        }
        // What it fails with is in the log.
        let written = self.write_draft(key, Finished::Said, Patience::at_most(AT_LEAST));
        if written.is_err_and(|error| error.kind() == ErrorKind::Exists) {
            // Somebody has made another one in the store, or SoftHSM has brought it back.
            let mut drafts = lock(&self.drafts);
            if drafts.is_new(key) {
                drafts.remove(key);
            }
        }
        self.wake();
    }

    /// Gives a value another name in its object.
    fn move_value(&self, from: &Node, to: &Node, patience: Patience) -> Result<()> {
        let (Some((token, id, source)), Some((_, _, target))) = (Slot::of(from), Slot::of(to))
        else {
            return Err(other_device());
        };
        let object = self.object(token, id, patience)?;
        if view::value(from, &object).is_none() {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the file has no value yet, so it cannot be renamed",
            ));
        }
        self.replacing_all(&[from, to], None, &always, patience, &mut |attributes| {
            // The text that it has at this moment, whatever it was when somebody looked last.
            let context = |slot: Slot, attributes: &Attributes| {
                slot.siblings(attributes)
                    .map(Context::of)
                    .unwrap_or_default()
            };
            let before = context(source, attributes);
            let Some(value) = source.remove(attributes) else {
                return Err(Error::not_found("the attribute is gone"));
            };
            let value = if let Value::Map(_) = &*value {
                Value::clone(&value)
            } else {
                let content = text::render(source.key.attribute_type, &value, before)?;
                text::parse(target.key, &content, context(target, attributes))?
            };
            check_still_empty(target.get(attributes))?;
            target.set(attributes, value)
        })?;
        self.cut_off(to);
        self.moved(&(token.clone(), id.clone()), |slot| {
            let now = match slot {
                slot if slot == source => target,
                slot if slot.is_in(source) => Slot {
                    map: Some(target.key.attribute_type),
                    ..slot
                },
                _ => return None,
            };
            Some(super::handle::Place::Moved(now.node(token, id)))
        });
        let mut drafts = lock(&self.drafts);
        if let Some(draft) = drafts.get_mut(&(token.clone(), id.clone())) {
            draft.move_map(source, target);
        }
        drafts.touch(&(token.clone(), id.clone()));
        drop(drafts);
        let mut scratch = lock(&self.scratch);
        scratch.clear(to);
        scratch.move_all(from, to, |_| true);
        Ok(())
    }

    /// Gives an object another name.
    fn rename_object(
        &self,
        token: &TokenName,
        (from, to): (&ObjectName, &ObjectName),
        replaces_damaged: bool,
        patience: Patience,
    ) -> Result<()> {
        let from_key = (token.clone(), ObjectId::Object(from.clone()));
        let to_key = (token.clone(), ObjectId::Object(to.clone()));
        self.token(token)?.check_name(to)?;
        let removed = self.make_room(&to_key, to, replaces_damaged, patience)?;
        let renamed = self.rename_stored(token, (from, &from_key), (to, &to_key), patience);
        if renamed.is_err() {
            self.give_back(&to_key, removed);
        }
        renamed
    }

    /// Gives an object the name of another one that there is not.
    fn rename_stored(
        &self,
        token: &TokenName,
        (from, from_key): (&ObjectName, &Key),
        (to, to_key): (&ObjectName, &Key),
        patience: Patience,
    ) -> Result<()> {
        let was_new = self.with_drafts(from_key, patience, |drafts| {
            if drafts.get(from_key).is_none_or(|draft| draft.new.is_none()) {
                return Ok(false);
            }
            if let Some(draft) = drafts.remove(from_key) {
                drafts.put(to_key.clone(), draft);
            }
            Ok(true)
        })?;
        if was_new {
            return Ok(());
        }
        // Nobody commits into it meanwhile. What was unlinked goes on being held, and files without a value go along.
        self.with_drafts(from_key, patience, |drafts| {
            drafts.entry(from_key).busy = true;
            Ok(())
        })?;
        let outcome = self.ask(token, patience, |token| token.rename(from, to, patience));
        let mut drafts = lock(&self.drafts);
        if let Some(mut draft) = drafts.remove(from_key) {
            draft.busy = false;
            let key = if outcome.is_ok() { to_key } else { from_key };
            drafts.put(key.clone(), draft);
            drafts.tidy(key);
        }
        drop(drafts);
        self.wake();
        outcome
    }
}

pub(super) fn other_device() -> Error {
    Error::new(
        ErrorKind::CrossDevice,
        "this has to be copied, as mv does of itself",
    )
}
