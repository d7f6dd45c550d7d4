//! What becomes of an open file that is renamed, unlinked or replaced, and of what was unlinked and is held back when something
//! is written beside it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::SystemTime;

use super::body::Bytes;
use super::draft::Key;
use super::handle::{Handle, HandleId, Place, Writer};
use super::name::{self, Name};
use super::node::{Ino, Node};
use super::publish::{keep_scratch_of, maps_of};
use super::rename::End;
use super::scratch::{Content, Scratch, ScratchId};
use super::slot::{Slot, map_key};
use super::{Tree, lock};
use crate::error::{ErrorKind, Result};
use crate::store::attribute::{AttributeKey, Attributes, Kind};
use crate::store::{Patience, TokenName};

/// A file of a scratch directory that becomes an object, or a map.
#[derive(Debug)]
pub(super) struct Published {
    node: Node,
    /// The attribute that it is to become.
    becomes: Node,
    /// What was complete of it when somebody looked.
    seen: Vec<u8>,
    content: Bytes,
}

impl Tree {
    /// What is open of `node`, and of what is in it, has no name any more: it must not come back when it is closed.
    pub(super) fn cut_off(&self, node: &Node) {
        if let Some((token, id, slot)) = Slot::of(node) {
            self.writers_moved(&(token.clone(), id.clone()), |other| {
                (other == slot || other.is_in(slot)).then_some(Place::Gone)
            });
        }
    }

    /// The object `key`, or something in it, was renamed: `place` says what becomes of those who have a file open that is in the place that it
    /// is asked for.
    pub(super) fn moved(&self, key: &Key, place: impl Fn(Slot) -> Option<Place>) {
        self.writers_moved(key, &place);
        // And of what the kernel knows by the number of the scratch that it was.
        let is_in = |node: &Node| node.object() == Some((&key.0, &key.1));
        let became = lock(&self.scratch).all_that_became(is_in);
        for (id, node) in became {
            if let Some((_, _, slot)) = Slot::of(&node)
                && let Some(Place::Moved(now)) = place(slot)
            {
                lock(&self.scratch).becomes(id, now);
            }
        }
    }

    /// The same of the writers alone: what the kernel knows by the number of scratch stays what it is.
    fn writers_moved(&self, key: &Key, place: impl Fn(Slot) -> Option<Place>) {
        let writers = lock(&self.handles).writers();
        for writer in writers {
            let Some(node) = self.committed_as(&writer) else {
                continue;
            };
            let now = match Slot::of(&node) {
                Some((token, id, slot)) if (token, id) == (&key.0, &key.1) => place(slot),
                _ => None,
            };
            if let Some(now) = now {
                *lock(&writer.place) = now;
            }
        }
    }

    /// A descriptor is closed: what it was opened as, and what that became, is remembered no longer than somebody has it open.
    pub(super) fn forget_became(&self, closed: &Writer) {
        let was = match &*lock(&closed.place) {
            Place::Moved(Node::Scratch(id)) => Some(*id),
            _ => None,
        };
        let opened = match closed.node {
            Node::Scratch(id) => Some(id),
            _ => None,
        };
        for id in was.into_iter().chain(opened) {
            self.forget_if_closed(id);
        }
    }

    /// A scratch file has become something else: that is not remembered if nobody has it open.
    pub(super) fn forget_if_closed(&self, id: ScratchId) {
        // Who is just opening it is among them, or finds that it is gone.
        let handles = lock(&self.handles);
        let writers = handles.writers();
        let goes_by_it = |writer: &Arc<Writer>| {
            writer.node == Node::Scratch(id)
                || *lock(&writer.place) == Place::Moved(Node::Scratch(id))
        };
        let mut scratch = lock(&self.scratch);
        if writers.is_empty() {
            scratch.forget_all();
        } else if !writers.iter().any(goes_by_it) {
            scratch.forget(id);
        }
    }

    /// The numbers by which the kernel knows the file `node` where it is open: its own, or that of the scratch that was renamed to it.
    pub(super) fn open_numbers(&self, node: &Node) -> Vec<Ino> {
        let open = lock(&self.handles).files();
        let stands_for = |ino: &Ino| match self.node(*ino).ok()? {
            Node::Scratch(id) => lock(&self.scratch).became(id).or(Some(Node::Scratch(id))),
            node => Some(node),
        };
        let is_it = |ino: &Ino| stands_for(ino).as_ref() == Some(node);
        open.into_iter().filter(is_it).collect()
    }

    /// Open files have lost their name. What is done to them is not done to what has that name by then.
    pub(super) fn orphan(&self, files: impl IntoIterator<Item = Ino>) {
        let mut inodes = lock(&self.inodes);
        for ino in files {
            inodes.orphan(ino);
        }
    }

    /// The object `key` is gone, or none was there: what is made in its place is another one, which gets nothing of what anybody has open of this
    /// one, nor its scratch, nor the times of its attributes.
    pub(super) fn abandon(&self, key: &Key) {
        self.writers_moved(key, |_| Some(Place::Gone));
        lock(&self.scratch).move_along(key, |_, _| None);
        self.forget_dates(key);
    }

    /// The same of all that is in a token.
    pub(super) fn abandon_all(&self, token: &TokenName) {
        let writers = lock(&self.handles).writers();
        for writer in writers {
            let node = self.committed_as(&writer);
            if node.is_some_and(|node| node.token() == Some(token)) {
                *lock(&writer.place) = Place::Gone;
            }
        }
        lock(&self.scratch).clear_all(|directory| directory.token() == Some(token));
        self.forget_dates_of(token);
    }

    /// The directory with this number is gone, and what is in it.
    pub(super) fn bury(&self, ino: Ino) {
        let open = lock(&self.handles).files();
        let below = lock(&self.inodes).below(ino);
        self.orphan(below.into_iter().filter(|ino| open.contains(ino)));
        lock(&self.inodes).bury(ino);
    }

    /// The object `key`, or what was at `moved` in it, has become the scratch `made`: who has a file of it open goes on to write into that. Whoever
    /// has opened it until now is among them, and who opens it from now on does not find it.
    pub(super) fn follow_into_scratch(&self, key: &Key, moved: Option<Slot>, made: ScratchId) {
        self.moved(key, |slot| {
            if moved.is_some_and(|moved| slot != moved && !slot.is_in(moved)) {
                return None;
            }
            let file = (moved != Some(slot)).then_some(slot.key);
            let map = slot.map.filter(|_| moved.is_none()).map(map_key);
            let mut scratch = lock(&self.scratch);
            let found = map.into_iter().chain(file).try_fold(made, |id, key| {
                let (directory, name) = (Node::Scratch(id), name::file_name(key));
                // It was made after the copy was.
                scratch.find_or_make(&directory, OsStr::new(&*name), key.kind == Kind::Map)
            });
            Some(found.map_or(Place::Gone, |id| Place::Moved(Node::Scratch(id))))
        });
    }

    /// What files there are in the scratch directory `node`, which is to become `target`, an object or a map.
    pub(super) fn files_below(&self, node: &Node, target: &Node) -> Vec<Published> {
        files_of(&lock(&self.scratch), node, target)
    }

    /// The scratch directory `node` has become `target`, and is no scratch any more: who has a file of it open goes on to write into the attribute
    /// that this is now, and what somebody has written there since the `files` were looked at is written into that, too.
    pub(super) fn end_scratch(
        &self,
        (node, from): (&Node, End<'_>),
        target: &Node,
        files: &[Published],
    ) {
        // Before they go, so that nobody writes into nothing.
        self.follow_published(files);
        let (last, maps) = {
            let mut scratch = lock(&self.scratch);
            let last = files_of(&scratch, node, target);
            let maps = maps_of(&scratch, node);
            keep_scratch_of(&mut scratch, node, target);
            scratch.remove(from.directory, from.name);
            (last, maps)
        };
        // And who has opened one, or made it, meanwhile.
        self.follow_published(&last);
        self.rebind_published(&last, &maps, target);
        let seen: HashMap<&Node, &Published> =
            files.iter().map(|file| (&file.node, file)).collect();
        for file in &last {
            self.commit_late(file, seen.get(&file.node).map(|seen| &*seen.seen));
        }
    }

    /// The kernel goes on to use the numbers that it has of what was in a scratch directory.
    fn rebind_published(
        &self,
        files: &[Published],
        maps: &[(AttributeKey, ScratchId)],
        target: &Node,
    ) {
        let mut inodes = lock(&self.inodes);
        let mut rebind = |was: &Node, is: Node| {
            if let Some(ino) = inodes.find(was) {
                inodes.rebind(ino, is, None);
            }
        };
        if let Node::Object(token, id) = target {
            for (key, map) in maps {
                let is = Node::Attribute(token.clone(), id.clone(), *key);
                rebind(&Node::Scratch(*map), is);
            }
        }
        for file in files {
            rebind(&file.node, file.becomes.clone());
        }
    }

    /// Files of a scratch directory have become attributes: who has one of them open goes on to write into that. Before they go, so that
    /// nobody writes into nothing.
    pub(super) fn follow_published(&self, files: &[Published]) {
        let writers = lock(&self.handles).writers();
        // Most have become attributes, and are not scratch again.
        let is_scratch = |node: &Node| matches!(node, Node::Scratch(_));
        let became = lock(&self.scratch).all_that_became(is_scratch);
        let files: HashMap<&Node, &Node> = files
            .iter()
            .map(|file| (&file.node, &file.becomes))
            .collect();
        for (id, node) in &became {
            if let Some(becomes) = files.get(node) {
                lock(&self.scratch).becomes(*id, Node::clone(becomes));
            }
        }
        for writer in &writers {
            let opened_as = files.get(&writer.node).copied();
            let becomes = opened_as.or_else(|| files.get(&self.committed_as(writer)?).copied());
            if let Some(becomes) = becomes {
                *lock(&writer.place) = Place::Moved(becomes.clone());
            }
        }
    }

    /// What somebody has written into a file, and closed, since it was `seen` is written into its attribute too. What is being written still is
    /// written there by who does so.
    fn commit_late(&self, file: &Published, seen: Option<&[u8]>) {
        let now = {
            let body = lock(&file.content);
            if body.is_new() || seen == Some(body.complete()) {
                return;
            }
            body.complete().to_vec()
        };
        // It is closed already.
        let patience = self.to_see_through(Patience::Now);
        let outcome = self.commit_text(&file.becomes, &now, None, patience);
        let _ = self.noted_write(&file.becomes, outcome);
    }

    /// The attribute that a writer's content is to become, if it is to become one; or the scratch that this has been renamed to.
    pub(super) fn committed_as(&self, writer: &Writer) -> Option<Node> {
        let place = lock(&writer.place).clone();
        match (place, &writer.node) {
            (Place::Gone, _) => None,
            (Place::There, Node::Scratch(id)) => lock(&self.scratch).became(*id),
            (Place::There, node) => Some(node.clone()),
            (Place::Moved(Node::Scratch(id)), _) => {
                let became = lock(&self.scratch).became(id);
                Some(became.unwrap_or(Node::Scratch(id)))
            }
            (Place::Moved(node), _) => Some(node),
        }
    }

    /// Closes a file that nothing was written into.
    pub(super) fn discard(&self, handle: HandleId) {
        let removed = lock(&self.handles).remove(handle);
        if let Some(Handle::Writer(writer) | Handle::Shared(writer)) = removed {
            writer.complete();
            self.forget_became(&writer);
            self.touch_object(&writer.node);
        }
        self.wake_when_left_alone();
    }

    /// Changes an object of the store. Where what was unlinked and is held back stands in the way, it goes in the same step: for whoever
    /// unlinked it it is not there.
    pub(super) fn update_store(
        &self,
        key: &Key,
        mtime: Option<SystemTime>,
        patience: Patience,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
    ) -> Result<()> {
        let (token, id) = key;
        let held = lock(&self.drafts)
            .get(key)
            .map(|draft| draft.removed.clone())
            .unwrap_or_default();
        let check = |stored: &Attributes, attributes: &Attributes| {
            self.check_remaining(key, stored, attributes)
        };
        let mut gone = BTreeMap::new();
        let mut edit_visible = |attributes: &mut Attributes| {
            gone.clear();
            let stored = attributes.clone();
            let outcome = edit(attributes).and_then(|()| check(&stored, attributes));
            match outcome {
                Err(error)
                    if !held.is_empty()
                        && matches!(error.kind(), ErrorKind::Exists | ErrorKind::Invalid) => {}
                outcome => return outcome,
            }
            *attributes = stored.clone();
            // Somebody may have made one of them anew while this has waited.
            let now = lock(&self.drafts)
                .get(key)
                .map(|draft| draft.removed.clone());
            gone = now.unwrap_or_default();
            gone.retain(|slot, then| held.get(slot) == Some(then));
            for (slot, then) in &gone {
                slot.remove_unchanged(attributes, then);
            }
            edit(attributes)?;
            check(&stored, attributes)
        };
        self.ask(token, patience, |token| {
            token.update(id, &mut edit_visible, mtime, patience)
        })?;
        if let Some(draft) = lock(&self.drafts).get_mut(key) {
            draft.given = mtime;
            draft
                .removed
                .retain(|slot, then| gone.get(slot) != Some(then));
        }
        Ok(())
    }
}

/// What files there are in the scratch directory `node`, each with the attribute that it becomes.
fn files_of(scratch: &Scratch, node: &Node, target: &Node) -> Vec<Published> {
    let mut files = Vec::new();
    let mut directories = vec![(node.clone(), target.clone())];
    while let Some((directory, target)) = directories.pop() {
        for (name, id) in scratch.names(&directory).into_iter().flatten() {
            let Name::Attribute(key) = name::parse(name.as_bytes()) else {
                continue;
            };
            let becomes = match &target {
                Node::Object(token, id) => Node::Attribute(token.clone(), id.clone(), key),
                Node::Attribute(token, id, map) => {
                    Node::MapEntry(token.clone(), id.clone(), map.attribute_type, key)
                }
                _ => continue,
            };
            let node = Node::Scratch(*id);
            match scratch.get(*id).map(|entry| &entry.content) {
                Ok(Content::File(content)) => files.push(Published {
                    node,
                    becomes,
                    seen: lock(content).complete().to_vec(),
                    content: Arc::clone(content),
                }),
                Ok(Content::Directory(_)) => directories.push((node, becomes)),
                Err(_) => {}
            }
        }
    }
    files
}
