//! From scratch to an attribute or an object, in one step, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::body::Body;
use super::draft::{Draft, Key, is_nothing};
use super::entries::{ScratchFile, hands_on};
use super::name::{self, Name};
use super::node::Node;
use super::rename::{End, other_device};
use super::rights::{closed_to, parts};
use super::scratch::{Content, Scratch, ScratchId};
use super::slot::Slot;
use super::text::{self, Context};
use super::{FileKind, Tree, lock, view};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{AttributeKey, AttributeType, Attributes, Kind, Value};
use crate::store::{
    Access, Backend, NewObject, ObjectId, ObjectName, Patience, TokenName, validate,
};

/// How many bytes are read as values while nobody else is answered.
pub(super) const BRIEF: usize = 512 * 1024;

/// And how many files.
const BRIEF_FILES: usize = 1024;

/// How often a file is committed anew that is written while it is committed.
const ATTEMPTS: usize = 8;

impl Tree {
    /// That no more than a moment is taken by what a scratch directory holds: who must not wait leaves that to who may.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`].
    pub(super) fn check_brief(&self, id: ScratchId, patience: Patience) -> Result<()> {
        if !matches!(patience, Patience::Now) {
            return Ok(());
        }
        let scratch = lock(&self.scratch);
        let files = scratch.below(id);
        let size = |id: &ScratchId| match scratch.get(*id).map(|entry| &entry.content) {
            Ok(Content::File(content)) => lock(content).len(),
            _ => 0,
        };
        if files.len() > BRIEF_FILES || files.iter().map(size).sum::<usize>() > BRIEF {
            let detail = "there is much in it";
            return Err(Error::new(ErrorKind::WouldBlock, detail));
        }
        Ok(())
    }

    /// Makes a scratch directory an attribute map.
    pub(super) fn publish_map(
        &self,
        id: ScratchId,
        target: &Node,
        patience: Patience,
    ) -> Result<()> {
        let token = target.token().ok_or_else(other_device)?;
        let entries = self.parse_directory(token, &Node::Scratch(id), true)?;
        self.commit_map(target, &entries, true, patience)
    }

    /// Makes a scratch file the value of an attribute. It is no scratch from then on: who has it open goes on to write into the attribute.
    pub(super) fn publish_file(
        &self,
        id: ScratchId,
        from: End<'_>,
        target: &Node,
        patience: Patience,
    ) -> Result<()> {
        let mut published: Option<Vec<u8>> = None;
        for attempt in 0.. {
            let (bytes, given) = {
                let mut scratch = lock(&self.scratch);
                let entry = scratch.get(id)?;
                let Content::File(content) = &entry.content else {
                    return Err(other_device());
                };
                let now = (lock(content).complete().to_vec(), entry.given);
                let is_last = attempt == ATTEMPTS;
                if is_last || published.as_ref() == Some(&now.0) {
                    scratch.commit(from.directory, from.name, target);
                    drop(scratch);
                    if is_last {
                        // Somebody writes into it all the while, and into the attribute from now on.
                        let patience = self.to_see_through(Patience::Now);
                        let late = self.commit_text(target, &now.0, now.1, patience);
                        let _ = self.noted_write(target, late);
                    }
                    return Ok(());
                }
                now
            };
            // What has been closed meanwhile is acknowledged, however long the first one has waited.
            let patience = match published {
                None => patience,
                Some(_) => self.to_see_through(Patience::Now),
            };
            let outcome = self.commit_text(target, &bytes, given, patience);
            if published.is_none() {
                outcome?;
                // Whoever has what was there before open does not write over it.
                self.cut_off(target);
            } else if let Err(error) = outcome {
                // Somebody has written into it, and closed it, while it was being committed. If that is no value, or cannot be stored, the first one stays:
                // it has replaced what was there.
                let _ = self.noted_write::<()>(target, Err(error));
            }
            published = Some(bytes);
        }
        Ok(())
    }

    /// Makes a scratch directory an object, in one step.
    pub(super) fn publish_object(
        &self,
        id: ScratchId,
        (token, object): (&TokenName, &ObjectName),
        replaces_damaged: bool,
        patience: Patience,
    ) -> Result<()> {
        let node = Node::Scratch(id);
        let attributes = self.parse_directory(token, &node, false)?;
        let is_nothing = is_nothing(&attributes);
        if is_nothing && replaces_damaged {
            return Err(Error::new(
                ErrorKind::Invalid,
                "there is nothing in it, and what it would replace is a damaged object; rmdir removes that",
            ));
        }
        validate::check_finished(None, &attributes)?;
        let (access, mtime) = {
            let scratch = lock(&self.scratch);
            let entry = scratch.get(id)?;
            if entry.was_damaged && attributes.iter().next().is_none() {
                return Err(Error::damaged(
                    "this was a damaged object when it was renamed to scratch, and nothing of it is left; restore it from a backup",
                ));
            }
            let mut access = Access {
                mode: entry.access.mode & 0o666,
                ..entry.access
            };
            for (kind, part) in parts(&scratch, id) {
                access.mode &= !closed_to(access, kind, part);
            }
            (access, entry.given)
        };
        let key = (token.clone(), ObjectId::Object(object.clone()));
        // Before anything makes room for it.
        self.token(token)?.check_name(object)?;
        validate::check(None, &attributes)?;
        if self.token(token)?.backend() == Backend::File {
            self.check_owner(access)?;
        }
        let removed = if replaces_damaged {
            None
        } else {
            self.make_room(&key, object, false, patience)?
        };
        if is_nothing {
            // Nothing was put into it, as into a directory that was just made.
            let begun = self.begin_object(token, object, access, None, patience);
            if begun.is_err() {
                self.give_back(&key, removed);
            } else if let Some(draft) = lock(&self.drafts).get_mut(&key)
                && let Some(new) = draft.new.as_mut()
            {
                new.attributes = attributes;
            }
            return begun;
        }
        let new = NewObject {
            attributes,
            access,
            mtime,
        };
        let made = self.ask(token, patience, |token| {
            if replaces_damaged {
                token.replace_damaged(object, Some(&new), patience)
            } else {
                token.create(object, &new, patience)
            }
        });
        if made.is_err() {
            self.give_back(&key, removed);
        }
        made?;
        // An empty directory that was just made there is replaced.
        lock(&self.drafts).remove(&key);
        Ok(())
    }

    /// The attributes that the files in a scratch directory are.
    fn parse_directory(&self, token: &TokenName, node: &Node, is_map: bool) -> Result<Attributes> {
        let opened = self.token(token)?;
        let mut attributes = Attributes::new();
        let mut values = Vec::new();
        let files = self.scratch_files(node)?;
        // What others depend on comes first: CKA_PARAMETER_SET is spelled by the CKA_KEY_TYPE beside it.
        for with_context in [false, true] {
            for ScratchFile {
                name: file,
                content,
                node: child,
            } in &files
            {
                let key = match name::parse(file.as_bytes()) {
                    Name::Attribute(key) => key,
                    Name::Scratch => continue,
                    Name::Impossible => return Err(name::refusal(file.as_bytes())),
                };
                let depends = key.attribute_type == crate::pkcs11::CKA_PARAMETER_SET;
                if depends != with_context {
                    continue;
                }
                opened.check_key(key, is_map)?;
                let slot = Slot { map: None, key };
                let value = match content {
                    Some(content) if key.kind != Kind::Map => {
                        text::parse(key, content, Context::of(&attributes))?
                    }
                    None if key.kind == Kind::Map && !is_map => {
                        Value::Map(self.parse_directory(token, child, true)?)
                    }
                    _ => {
                        return Err(Error::new(
                            ErrorKind::Invalid,
                            "a file is where a directory belongs, or the other way round",
                        ));
                    }
                };
                if with_context {
                    slot.set(&mut attributes, value)?;
                } else {
                    values.push((key.attribute_type, value));
                }
            }
            if !with_context {
                attributes = one_of_each(std::mem::take(&mut values))?;
            }
        }
        Ok(attributes)
    }

    /// That an object can be made one again as it is, by a rename: who takes it away is to be able to put it back.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`].
    pub(super) fn check_can_come_back(
        &self,
        (token, object): (&TokenName, &ObjectName),
        draft: Option<&Draft>,
        attributes: &Attributes,
    ) -> Result<()> {
        let opened = self.token(token)?;
        let can = || {
            opened.check_name(object)?;
            let values = attributes.iter();
            one_of_each(
                values
                    .map(|(key, value)| (key.attribute_type, value.clone()))
                    .collect(),
            )?;
            check_texts(attributes)?;
            validate::check_finished(None, attributes)?;
            validate::check(None, attributes)?;
            let fresh = draft.into_iter().flat_map(|draft| draft.fresh.keys());
            for slot in fresh {
                text::parse(slot.key, &[], Context::default()).map_err(|_| {
                    let name = name::file_name(slot.key);
                    Error::new(ErrorKind::Invalid, format!("{name} has no value yet"))
                })?;
            }
            Ok(())
        };
        can().map_err(|error: Error| {
            let detail =
                format!("it could not be put back as it is ({error}); copy it, and remove it then");
            Error::new(ErrorKind::Invalid, detail)
        })
    }

    /// That there was room for all of an object, if it is new: a part of it is none.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`].
    pub(super) fn check_is_written(&self, key: &Key) -> Result<()> {
        let drafts = lock(&self.drafts);
        let new = drafts.get(key).and_then(|draft| draft.new.as_ref());
        match new.and_then(|new| new.unwritten.first()) {
            Some(slot) => Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "there was no room for its {}; write that again, or remove it",
                    name::file_name(slot.key)
                ),
            )),
            None => Ok(()),
        }
    }

    /// Makes a copy in scratch of what `take_away` removes from its place, which says what an object held when it went: if that is something else by then
    /// the copy is that. What had the name before is there until that is done. Of a damaged object the copy is an empty directory, which
    /// cannot become an object again.
    pub(super) fn move_to_scratch(
        &self,
        (node, is_damaged): (&Node, bool),
        to: End<'_>,
        patience: Patience,
        take_away: impl FnOnce() -> Result<Option<Attributes>>,
    ) -> Result<ScratchId> {
        let seen = match node {
            Node::Object(token, id) if !is_damaged => Some(self.object(token, id, patience)?),
            Node::Attribute(token, id, _) | Node::MapEntry(token, id, _, _) => {
                // One that has no value yet is not in the store.
                self.stored(token, id, patience).ok()
            }
            _ => None,
        };
        // No program makes a name with a newline in it, and no two threads are given the same number.
        let name = format!(".tokenfs\n{}", self.next_number());
        let aside = End {
            directory: to.directory,
            name: OsStr::new(&name),
        };
        let made = if is_damaged {
            let (attributes, _) = self.describe(node, patience)?;
            let mut scratch = lock(&self.scratch);
            let made = scratch.make(aside.directory, aside.name, None, access_of(&attributes))?;
            scratch.get_mut(made)?.was_damaged = true;
            made
        } else {
            self.copy_to_scratch(node, aside, patience)?
        };
        let (fresh, unlinked) = node
            .object()
            .and_then(|(token, id)| {
                let drafts = lock(&self.drafts);
                let draft = drafts.get(&(token.clone(), id.clone()))?;
                let fresh: BTreeSet<Slot> = draft.fresh.keys().copied().collect();
                Some((fresh, draft.removed.clone()))
            })
            .unwrap_or_default();
        let last = match take_away() {
            Ok(last) => last,
            Err(error) => {
                lock(&self.scratch).remove(aside.directory, aside.name);
                return Err(error);
            }
        };
        // Somebody else may have changed it while it was copied.
        if let (Some(mut last), Some(seen)) = (last, seen) {
            let access = access_of(&view::file(&seen.metadata, self.settings.mask));
            match Slot::of(node) {
                Some((_, _, slot)) => {
                    let is_changed = slot.get(&last) != slot.get(&seen.attributes);
                    // What the store has is not what there was, where something is unlinked and held back.
                    for (held, then) in &unlinked {
                        if *held == slot || held.is_in(slot) {
                            held.remove_unchanged(&mut last, then);
                        }
                    }
                    if is_changed {
                        self.refill_slot(made, slot, &last, (access, &fresh))?;
                    }
                }
                None => self.refill(made, (None, &last), (access, &fresh))?,
            }
        }
        lock(&self.scratch).rename((aside.directory, aside.name), (to.directory, to.name))?;
        Ok(made)
    }

    /// Puts what was taken away into the copy of it, where that is something else.
    fn refill_slot(
        &self,
        made: ScratchId,
        slot: Slot,
        last: &Attributes,
        access: (Access, &BTreeSet<Slot>),
    ) -> Result<()> {
        match slot.get(last) {
            Some(Value::Map(entries)) => {
                self.refill(made, (Some(slot.key.attribute_type), entries), access)
            }
            Some(value) => {
                let context = slot.siblings(last).map(Context::of).unwrap_or_default();
                let text = text::render(slot.key.attribute_type, value, context)?;
                let scratch = lock(&self.scratch);
                if let Content::File(bytes) = &scratch.get(made)?.content {
                    let mut bytes = lock(bytes);
                    if **bytes != *text {
                        bytes.set(text.into_owned());
                    }
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Makes a scratch directory one of these attributes, which are those of an object or of one of its maps, and of the files that are `fresh` there.
    fn refill(
        &self,
        directory: ScratchId,
        (map, attributes): (Option<AttributeType>, &Attributes),
        (access, fresh): (Access, &BTreeSet<Slot>),
    ) -> Result<()> {
        let node = Node::Scratch(directory);
        let context = Context::of(attributes);
        let mut scratch = lock(&self.scratch);
        let names = scratch.names(&node).into_iter().flatten();
        let names: Vec<_> = names.map(|(name, id)| (name.clone(), *id)).collect();
        for (name, _) in names {
            let stays = match name::parse(name.as_bytes()) {
                Name::Attribute(key) => {
                    attributes.get(key).is_some() || fresh.contains(&Slot { map, key })
                }
                Name::Scratch | Name::Impossible => false,
            };
            if !stays {
                scratch.remove(&node, &name);
            }
        }
        let in_directory = scratch.get(directory)?.access;
        drop(scratch);
        for (key, value) in attributes.iter() {
            let name = name::file_name(key);
            let name = OsStr::new(&*name);
            let mut scratch = lock(&self.scratch);
            let there = scratch.find(&node, name);
            if let Value::Map(entries) = value {
                let made = match there {
                    Some(there) => there,
                    None => scratch.put(&node, name, None, in_directory)?,
                };
                drop(scratch);
                let map = Some(key.attribute_type);
                self.refill(made, (map, entries), (access, fresh))?;
                continue;
            }
            let content = text::render(key.attribute_type, value, context)?;
            let there = there.and_then(|there| match &scratch.get(there).ok()?.content {
                Content::File(bytes) => Some(Arc::clone(bytes)),
                Content::Directory(_) => None,
            });
            if let Some(bytes) = there {
                let mut bytes = lock(&bytes);
                if **bytes != *content {
                    bytes.set(content.into_owned());
                }
            } else {
                scratch.put(&node, name, Some(Body::new(content.into_owned())), access)?;
            }
        }
        Ok(())
    }

    /// A copy in scratch of an attribute, a map or an object, with the mode and owner that it has.
    fn copy_to_scratch(&self, node: &Node, to: End<'_>, patience: Patience) -> Result<ScratchId> {
        let (attributes, object) = self.describe(node, patience)?;
        let mut access = access_of(&attributes);
        if attributes.kind == FileKind::Directory {
            let (parent, _) = self.describe(to.directory, patience)?;
            access.mode |= hands_on(&parent);
            let children = self.children(node, patience)?;
            let made = {
                let mut scratch = lock(&self.scratch);
                scratch.remove(to.directory, to.name);
                scratch.make(to.directory, to.name, None, access)?
            };
            let directory = Node::Scratch(made);
            for (name, _, child) in children {
                let end = End {
                    directory: &directory,
                    name: &name,
                };
                if let Err(error) = self.copy_to_scratch(&child, end, patience) {
                    lock(&self.scratch).remove(to.directory, to.name);
                    return Err(error);
                }
            }
            self.keep_scratch_time(made, attributes.mtime);
            return Ok(made);
        }
        let content = match object.map(|object| view::content(node, &object)) {
            Some(Ok(Some(content))) => content,
            // Who is in the middle of writing it goes on to write into the copy, all that he has.
            _ if self.is_being_written(node) => Vec::new(),
            _ => self.fresh_content(node).unwrap_or_default(),
        };
        self.check_memory(content.len() as u64)?;
        let mut scratch = lock(&self.scratch);
        scratch.remove(to.directory, to.name);
        let made = scratch.make(to.directory, to.name, Some(Body::new(content)), access)?;
        drop(scratch);
        self.keep_scratch_time(made, attributes.mtime);
        Ok(made)
    }

    fn keep_scratch_time(&self, id: ScratchId, mtime: std::time::SystemTime) {
        if let Ok(entry) = lock(&self.scratch).get_mut(id) {
            entry.mtime = mtime;
            entry.given = Some(mtime);
        }
    }
}

/// Attributes of which none has the type of another one.
///
/// # Errors
/// [`ErrorKind::Exists`]: SoftHSM knows one value of each type.
fn one_of_each(mut values: Vec<(AttributeType, Value)>) -> Result<Attributes> {
    // All at once: each that comes between others would move those behind it.
    values.sort_by_key(|(attribute_type, _)| *attribute_type);
    let twice = values.windows(2).find_map(|pair| match pair {
        [(one, _), (other, value)] if one == other => Some((*one, value.kind())),
        _ => None,
    });
    if let Some((attribute_type, kind)) = twice {
        let key = AttributeKey {
            attribute_type,
            kind,
        };
        return Err(Error::new(
            ErrorKind::Exists,
            format!(
                "an object has one value of each type, and there is another one beside {}",
                name::file_name(key)
            ),
        ));
    }
    Ok(values.into_iter().collect::<BTreeMap<_, _>>().into())
}

/// That all texts of an object can be read again.
///
/// # Errors
/// [`ErrorKind::TooLarge`].
fn check_texts(attributes: &Attributes) -> Result<()> {
    let context = Context::of(attributes);
    for (key, value) in attributes.iter() {
        match value {
            Value::Map(entries) => check_texts(entries)?,
            value => text::check_readable(key, value, context)?,
        }
    }
    Ok(())
}

/// Mode and owner that `stat` says.
pub(super) fn access_of(attributes: &super::Attributes) -> Access {
    Access {
        mode: attributes.mode,
        uid: attributes.uid,
        gid: attributes.gid,
    }
}

/// The directories in the scratch directory `node` that become attribute maps if it becomes an object.
pub(super) fn maps_of(scratch: &Scratch, node: &Node) -> Vec<(AttributeKey, ScratchId)> {
    let names = scratch.names(node).into_iter().flatten();
    let map = |(name, id): (&OsString, &ScratchId)| match name::parse(name.as_bytes()) {
        Name::Attribute(key) if key.kind == Kind::Map => Some((key, *id)),
        _ => None,
    };
    names.filter_map(map).collect()
}

/// What is in the scratch directory `node` and is no attribute stays scratch, in the object or the attribute map that it becomes.
pub(super) fn keep_scratch_of(scratch: &mut Scratch, node: &Node, target: &Node) {
    let is_scratch = |name: &OsStr| matches!(name::parse(name.as_bytes()), Name::Scratch);
    let maps = maps_of(scratch, node);
    // What was out of sight in a directory that it replaces is gone with that.
    scratch.clear(target);
    scratch.move_all(node, target, is_scratch);
    let Node::Object(token, id) = target else {
        return;
    };
    for (map, of) in maps {
        let target = Node::Attribute(token.clone(), id.clone(), map);
        scratch.move_all(&Node::Scratch(of), &target, is_scratch);
    }
}
