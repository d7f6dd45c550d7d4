//! Objects as the mount shows them: what the store has of them, and what it does not have yet.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use super::draft::{Key, New};
use super::node::Node;
use super::slot::Slot;
use super::{Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::{Access, Metadata, Object, ObjectId, ObjectName, Patience, TokenName};

impl Tree {
    /// The objects of a token, those that are not in the store yet included.
    pub(super) fn objects(&self, token: &TokenName, patience: Patience) -> Result<Vec<ObjectName>> {
        // First those that are new: one that gets into the store in between is in both then, and not in neither.
        let new = lock(&self.drafts).new_objects(token);
        let listed = self.ask(token, patience, |token| token.list(patience))?;
        let mut objects = listed.to_vec();
        if !new.is_empty() {
            objects.extend(new);
            objects.sort_unstable();
            objects.dedup();
        }
        Ok(objects)
    }

    /// Whether a token has a directory `token`: not before that was made, and not after it was removed.
    pub(super) fn has_own(&self, token: &TokenName) -> bool {
        let drafts = lock(&self.drafts);
        let gone = drafts
            .get(&(token.clone(), ObjectId::Token))
            .is_some_and(|draft| draft.gone);
        let made = drafts.build(token).is_none_or(|build| build.has_own);
        made && !gone
    }

    /// The present version of an object, with what was written to it in the mount and is not in the store yet.
    pub(super) fn object(
        &self,
        token: &TokenName,
        id: &ObjectId,
        patience: Patience,
    ) -> Result<Arc<Object>> {
        // Not all of it: there can be many files without a value.
        let draft = lock(&self.drafts)
            .get(&(token.clone(), id.clone()))
            .map(|draft| (draft.number, draft.new.clone(), draft.removed.clone()));
        if *id == ObjectId::Token && !self.has_own(token) {
            return Err(Error::not_found("the directory token is gone"));
        }
        let Some((number, new, removed)) = draft else {
            return self.stored(token, id, patience);
        };
        if let Some(new) = &new {
            return Ok(Arc::new(Object {
                metadata: self.new_metadata(token, new, patience)?,
                ..new.object()
            }));
        }
        let stored = self.stored(token, id, patience)?;
        if removed.is_empty() {
            return Ok(stored);
        }
        let mut object = Object::clone(&stored);
        let mut set_anew = Vec::new();
        let mut gone = HashSet::new();
        for (slot, then) in &removed {
            let value = slot.get(&stored.attributes);
            if value != slot.get(then) {
                set_anew.extend(value.map(|_| (*slot, then)));
            } else if slot.map.is_some() {
                slot.remove(&mut object.attributes);
            } else {
                gone.insert(slot.key);
            }
        }
        // All at once: each would move all those behind it.
        if !gone.is_empty() {
            object.attributes.retain(|key| !gone.contains(&key));
        }
        if !set_anew.is_empty() {
            self.keep_what_was_set(&(token.clone(), id.clone()), number, &set_anew);
        }
        Ok(Arc::new(object))
    }

    /// Somebody has given a value to what was unlinked and is held back. What is shown once stays, also if it becomes again what was unlinked.
    fn keep_what_was_set(&self, key: &Key, number: u64, set_anew: &[(Slot, &Attributes)]) {
        let kept = {
            let mut drafts = lock(&self.drafts);
            let draft = drafts.get_mut(key).filter(|draft| draft.number == number);
            let kept = draft.map(|draft| draft.keep(set_anew)).unwrap_or_default();
            drafts.tidy(key);
            kept
        };
        for slot in kept {
            self.say_kept(&slot.node(&key.0, &key.1));
        }
    }

    /// Says that what was unlinked stays.
    pub(super) fn say_kept(&self, node: &Node) {
        self.diagnostics.warning(format!(
            "{}: it was removed here, and somebody else has given it another value before that reached the store: it stays",
            self.path_of(node).display()
        ));
    }

    /// The version of an object that the store has. Of a damaged one, how to get rid of it is said too.
    pub(super) fn stored(
        &self,
        token: &TokenName,
        id: &ObjectId,
        patience: Patience,
    ) -> Result<Arc<Object>> {
        let stored = self.ask(token, patience, |token| token.object(id, patience));
        stored.map_err(|error| {
            let is_one = error.kind() == ErrorKind::Damaged
                && matches!(id, ObjectId::Object(_))
                && !self.store.options().read_only
                // It alone, and not all of its token.
                && self.object_metadata(token, id, patience).is_ok();
            if !is_one {
                return error;
            }
            let path = self.path_of(&Node::Object(token.clone(), id.clone()));
            let path = path.display().to_string();
            error.advise(format!(
                "to remove it, for good: rmdir '{}' in the mount",
                path.escape_debug()
            ))
        })
    }

    /// Whether a directory is that of an object that is there and damaged.
    pub(super) fn is_damaged(&self, node: &Node, patience: Patience) -> Result<bool> {
        let Node::Object(token, id) = node else {
            return Ok(false);
        };
        match self.object(token, id, patience) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == ErrorKind::Damaged => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Of the backing file of an object, or of the one that a new object is going to have.
    pub(super) fn object_metadata(
        &self,
        token: &TokenName,
        id: &ObjectId,
        patience: Patience,
    ) -> Result<Metadata> {
        if *id == ObjectId::Token && !self.has_own(token) {
            return Err(Error::not_found("the directory token is gone"));
        }
        let draft = lock(&self.drafts)
            .get(&(token.clone(), id.clone()))
            .and_then(|draft| draft.new.clone());
        if let Some(new) = draft {
            // Its own time is now for as long as it is pending.
            let now = SystemTime::now();
            return Ok(Metadata {
                mtime: now,
                ..self.new_metadata(token, &new, patience)?
            });
        }
        let metadata = self.ask(token, patience, |token| token.object_metadata(id, patience))?;
        // The same of the token's own as long as nobody has said that it is finished: who has given it its time too early (rsync, before it fills
        // the directory) sees that, and does so again.
        let build = lock(&self.drafts)
            .build(token)
            .map(|build| build.own_finished);
        if *id == ObjectId::Token && build == Some(false) {
            return Ok(Metadata {
                mtime: SystemTime::now(),
                ..metadata
            });
        }
        Ok(metadata)
    }

    fn new_metadata(&self, token: &TokenName, new: &New, patience: Patience) -> Result<Metadata> {
        let own = new.metadata();
        let shared = self.ask(token, patience, |token| token.shared_access())?;
        let Some(Access { mode, uid, gid }) = shared else {
            return Ok(own);
        };
        Ok(Metadata {
            mode,
            uid,
            gid,
            ..own
        })
    }
}
