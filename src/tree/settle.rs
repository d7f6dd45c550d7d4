//! How what the mount shows becomes what the store has.
//!
//! A new object is written once, when it is finished: its times are set, it is synced, or it has been left alone. What was unlinked
//! is held for as long. A token that is being built is published when all that is in it is finished. [`super::due`] says when it is time for
//! what nobody has said so of.

use std::time::{Duration, Instant, SystemTime};

use super::draft::{Draft, Key, New};
use super::drafts::{Build, Drafts};
use super::handle::HandleId;
use super::name::file_name;
use super::node::{Ino, Node};
use super::slot::Slot;
use super::{Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::{
    MetadataChange, NewObject, ObjectId, Patience, Target, Time, TokenName, validate,
};

/// How long to wait for another thread that is writing the same object before looking again.
pub(super) const PAUSE: Duration = Duration::from_millis(1);

/// Why a new object is taken for finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finished {
    /// Whoever made it has said so: its times were set, or it was synced.
    Said,
    /// Nobody has, and all that is pending is written.
    Assumed,
    /// Nobody has, and it has been left alone.
    LeftAlone,
    /// The mount ends: what there is of it is written, or lost.
    Ended,
}

impl Tree {
    /// Calls `action` with the drafts while nobody is writing the object `key` to the store.
    pub(super) fn with_drafts<T>(
        &self,
        key: &Key,
        patience: Patience,
        mut action: impl FnMut(&mut Drafts) -> Result<T>,
    ) -> Result<T> {
        loop {
            {
                let mut drafts = lock(&self.drafts);
                if !drafts.get(key).is_some_and(|draft| draft.busy) {
                    return action(&mut drafts);
                }
            }
            patience.wait(PAUSE, "the object is being written")?;
        }
    }

    /// Whether a token that is being built has what makes it one.
    pub(super) fn is_token(&self, token: &TokenName) -> bool {
        lock(&self.drafts).build(token).is_some_and(Build::is_token)
    }

    /// Writes what is new or unlinked of one object to the store.
    pub(super) fn write_draft(
        &self,
        key: &Key,
        finished: Finished,
        patience: Patience,
    ) -> Result<()> {
        let is_open = finished == Finished::LeftAlone && self.open_objects().contains(key);
        let is_overtaking = || {
            let drafts = lock(&self.drafts);
            drafts
                .get(key)
                .is_some_and(|draft| !draft.overtaken.is_empty())
        };
        while finished == Finished::Said && is_overtaking() {
            patience.wait(PAUSE, "what was unlinked is being written")?;
        }
        let draft = self.with_drafts(key, patience, |drafts| {
            let Some(draft) = drafts.get_mut(key) else {
                return Ok(None);
            };
            // It may be another one by now, or somebody may have gone on with it.
            if finished == Finished::LeftAlone && !draft.is_due(Instant::now(), is_open) {
                return Ok(None);
            }
            // That its directory is synced does not make an object of what nothing was put into.
            if matches!(finished, Finished::Said | Finished::Assumed)
                && draft.new.as_ref().is_some_and(New::is_nothing)
            {
                return Ok(None);
            }
            draft.busy = true;
            Ok(Some(draft.clone()))
        })?;
        let Some(draft) = draft else {
            return Ok(());
        };
        let outcome = if self.is_gone(&key.0) {
            // As what is in a directory that somebody else removes. Another token of its name does not get it.
            self.drop_pending(&key.0);
            return Ok(());
        } else if draft.gone {
            self.diagnostics.warning(format!(
                "{}: the directory token was removed and the token was not; it is back",
                key.0
            ));
            Ok(())
        } else if let Some(new) = &draft.new {
            self.write_new(key, new, finished, patience)
        } else {
            self.write_unlinked(key, &draft, patience)
        };
        let mut drafts = lock(&self.drafts);
        // The object may have been removed meanwhile, and another one begun under its name.
        let is_same = |now: &&mut Draft| now.number == draft.number;
        match &outcome {
            Ok(()) => {
                if let Some(written) = drafts.get_mut(key).filter(is_same) {
                    written.busy = false;
                    written.new = None;
                    written.gone = false;
                    for (slot, _) in draft.to_remove() {
                        written.removed.remove(&slot);
                    }
                    if draft.gone {
                        written.removed.clear();
                    }
                }
                drafts.tidy(key);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if let Some(waiting) = drafts.get_mut(key).filter(is_same) {
                    waiting.busy = false;
                }
            }
            Err(error) => {
                // Somebody else's lock will be free one day. Where it cannot be done what was unlinked is back, as it would be where
                // unlinking fails at once.
                if let Some(kept) = drafts.get_mut(key).filter(is_same) {
                    if error.kind() != ErrorKind::Busy {
                        kept.removed.clear();
                    }
                    kept.failed();
                }
                drafts.tidy(key);
            }
        }
        // What is left of it is due in a while, and a token that is being built is with the last of its objects.
        let can_be_due = outcome.is_err() || drafts.is_finished(&key.0);
        drop(drafts);
        if outcome.is_ok() {
            self.restore_time(&key.0, patience);
        }
        self.wake_for(can_be_due);
        let (token, id) = key.clone();
        self.noted_write(&Node::Object(token, id), outcome)
    }

    /// Whether somebody else has removed a token, with its directory: one that is just being put right has that.
    pub(super) fn is_gone(&self, token: &TokenName) -> bool {
        let gone = |error: &Error| error.kind() == ErrorKind::NotFound;
        self.store.token(token).is_err_and(|error| gone(&error)) && !self.store.has_directory(token)
    }

    /// A token is gone, and with it all that was pending in it.
    pub(super) fn drop_pending(&self, token: &TokenName) {
        let removed = lock(&self.drafts).remove_token(token);
        for (key, draft) in removed {
            if draft.new.is_some() || draft.unlinked().next().is_some() {
                self.diagnostics.warning(format!(
                    "{}: its token was removed, and what was pending of it is gone with that",
                    self.path_of(&Node::Object(key.0.clone(), key.1.clone()))
                        .display()
                ));
            }
        }
        self.abandon_all(token);
    }

    fn write_new(
        &self,
        key: &Key,
        new: &New,
        finished: Finished,
        patience: Patience,
    ) -> Result<()> {
        let (token, ObjectId::Object(name)) = key else {
            return Ok(());
        };
        if let Some(slot) = new.unwritten.first()
            && finished != Finished::Ended
        {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "there was no room for its {}: it stays pending until that is written again, or it is removed; the end of the mount \
                     writes it without",
                    file_name(slot.key)
                ),
            ));
        }
        if matches!(finished, Finished::Assumed | Finished::LeftAlone)
            && let Some(lacks) = new.lacks()
        {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{lacks}: it stays pending until that is written, or it is removed"),
            ));
        }
        validate::check_finished(None, &new.attributes)?;
        let object = NewObject {
            attributes: new.attributes.clone(),
            access: new.access,
            mtime: new.mtime,
        };
        self.ask(token, patience, |token| {
            token.create(name, &object, patience)
        })
    }

    fn write_unlinked(&self, key: &Key, draft: &Draft, patience: Patience) -> Result<()> {
        let unlinked: Vec<(Slot, &Attributes)> = draft.to_remove().collect();
        if unlinked.is_empty() {
            return Ok(());
        }
        let mut kept = Vec::new();
        let mut remove = |attributes: &mut Attributes| {
            let before = attributes.clone();
            // Of what stays somebody may have been shown another value while this has waited.
            let now = lock(&self.drafts)
                .get(key)
                .filter(|now| now.number == draft.number)
                .map(|now| now.removed.clone())
                .unwrap_or_default();
            let held = unlinked
                .iter()
                .filter(|(slot, then)| now.get(slot) == Some(then));
            let changed = held.filter(|(slot, then)| !slot.remove_unchanged(attributes, then));
            kept = changed.map(|(slot, _)| *slot).collect();
            self.check_remaining(key, &before, attributes)
        };
        self.begin_dating(key, None, patience)?;
        let outcome = self.ask(&key.0, patience, |token| {
            // The time that it was given after they were unlinked stays, unless somebody else has changed it meanwhile.
            let given = draft.given.filter(|given| {
                let metadata = token.object_metadata(&key.1, patience);
                metadata.is_ok_and(|metadata| metadata.mtime == *given)
            });
            match token.update(&key.1, &mut remove, given, patience) {
                // The object is gone, and what was to be removed with it.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                outcome => outcome,
            }
        });
        if outcome.is_err() {
            self.give_up_dating(key);
            return outcome;
        }
        self.end_dating(key, &[], None, patience);
        for slot in kept {
            self.say_kept(&slot.node(&key.0, &key.1));
        }
        Ok(())
    }

    /// That SoftHSM can live with what an object of the store is going to be.
    pub(super) fn check_remaining(
        &self,
        (token, id): &Key,
        old: &Attributes,
        new: &Attributes,
    ) -> Result<()> {
        match id {
            ObjectId::Object(_) => validate::check_finished(Some(old), new),
            ObjectId::Token if self.store.is_building(token) => Ok(()),
            ObjectId::Token => validate::check_token_finished(old, new),
        }
    }

    /// Makes a token that is being built one, if it has its own attributes.
    pub(super) fn publish(&self, token: &TokenName, patience: Patience) -> Result<()> {
        // What publishing does to the directory is not what anybody did: without a time that it was given it keeps the one that it has.
        let before = self.ask(token, patience, |token| token.metadata());
        let outcome = self.end_building(token, patience, || {
            // Somebody else may have found it finished at the same time.
            if !self.store.is_building(token) {
                return Ok(());
            }
            let own = self.token(token)?.object(&ObjectId::Token, patience)?;
            if let Some(name) = validate::lacking(&own.attributes) {
                let detail = format!("a token without a {name} is none; it stays pending");
                return Err(Error::new(ErrorKind::Invalid, detail));
            }
            // There may be other tokens by now than when its serial number was written.
            let taken = self.slots_of_others(token, patience)?;
            validate::check_slot(&own.attributes, &taken)?;
            self.store.publish_token(token, patience)
        });
        let is_published = outcome.is_ok() || !self.store.is_building(token);
        match &outcome {
            // Whether its name is on disk or not.
            _ if is_published => {
                let build = lock(&self.drafts).remove_build(token);
                if let Some(build) = build
                    && let Some(mtime) = build.mtime.or(before.ok().map(|before| before.mtime))
                {
                    lock(&self.drafts).keep_time(token, mtime);
                }
                self.restore_time(token, patience);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => lock(&self.drafts).build_failed(token),
        }
        self.noted_write(&Node::Token(token.clone()), outcome)
    }

    /// Gives a token's directory the time again that it was given before the last objects were written into it.
    pub(super) fn restore_time(&self, token: &TokenName, patience: Patience) {
        let Some(mtime) = lock(&self.drafts).time_to_restore(token) else {
            return;
        };
        let change = MetadataChange {
            mtime: Some(Time::At(mtime)),
            ..MetadataChange::default()
        };
        let done = self.ask(token, patience, |token| {
            token.set_metadata(&Target::Directory, &change, patience)
        });
        if matches!(&done, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            return;
        }
        lock(&self.drafts).forget_time(token, mtime);
        if let Err(error) = done {
            self.diagnostics.error(&error);
        }
    }

    /// Syncs an open file: what was written into it, or cut off it, is committed, and what the store has of its object survives a power failure.
    ///
    /// # Errors
    /// As [`Tree::flush`].
    pub fn sync_file(&self, ino: Ino, handle: HandleId, patience: Patience) -> Result<()> {
        self.commit_all(handle, patience)?;
        match self.node(ino) {
            Ok(_) => self.in_place(ino, patience, |node| self.sync_node(node, patience)),
            // It is open and unlinked.
            Err(_) => Ok(()),
        }
    }

    /// Syncs a directory: what is new or was unlinked in it is written, and survives a power failure.
    ///
    /// # Errors
    /// What writing fails with.
    pub fn sync_dir(&self, ino: Ino, patience: Patience) -> Result<()> {
        self.in_place(ino, patience, |node| self.sync_node(node, patience))
    }

    /// A directory is synced, or the file in it: what is new or unlinked there is written, and survives a power failure from
    /// now on.
    ///
    /// # Errors
    /// What writing fails with.
    pub(super) fn sync_node(&self, node: &Node, patience: Patience) -> Result<()> {
        match node {
            Node::Object(token, id) => {
                self.write_draft(&(token.clone(), id.clone()), Finished::Said, patience)?;
                self.sync_token(token, patience)
            }
            Node::Attribute(token, id, _) | Node::MapEntry(token, id, _, _) => {
                let key = (token.clone(), id.clone());
                // One file of an object that is being made does not make it whole: that is for its directory to say.
                if lock(&self.drafts)
                    .get(&key)
                    .is_some_and(|draft| draft.new.is_some())
                {
                    return Ok(());
                }
                // What was unlinked beside it is for the directory to say, too: it may be about to be made again.
                self.sync_token(token, patience)
            }
            Node::Token(token) => self.sync_all(token, Finished::Said, patience),
            Node::Root => {
                if self.store.options().read_only {
                    return Ok(());
                }
                let drafts = lock(&self.drafts);
                let mut tokens = drafts.builds();
                tokens.extend(drafts.keys(None).into_iter().map(|key| key.0));
                drop(drafts);
                tokens.sort_unstable();
                tokens.dedup();
                // Whoever syncs all there is, as `tokenfs umount` does, says nothing of what others are making.
                each(&tokens, |token| {
                    self.sync_all(token, Finished::Assumed, patience)
                })?;
                // The disk knows no patience.
                patience.wait(Duration::ZERO, "a sync waits for the disk")?;
                self.noted(self.store.sync())
            }
            // What was scratch when it was opened.
            Node::Scratch(id) => {
                let became = lock(&self.scratch).became(*id);
                match became {
                    Some(node) => self.sync_node(&node, patience),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// Writes all that is pending in a token, and syncs it.
    fn sync_all(&self, token: &TokenName, finished: Finished, patience: Patience) -> Result<()> {
        let keys = lock(&self.drafts).keys(Some(token));
        each(&keys, |key| self.write_draft(key, finished, patience))?;
        if self.is_token(token) {
            self.publish(token, patience)?;
        } else {
            let refused = self.check_complete(token, patience);
            self.noted_write(&Node::Token(token.clone()), refused)?;
        }
        self.sync_token(token, patience)
    }

    /// That a token which is being built has no objects: without its own attributes it is none, and they go with the mount.
    fn check_complete(&self, token: &TokenName, patience: Patience) -> Result<()> {
        if !self.store.is_building(token) {
            return Ok(());
        }
        let objects = self.ask(token, patience, |token| token.list(patience));
        match objects {
            Ok(objects) if !objects.is_empty() => Err(Error::new(
                ErrorKind::Invalid,
                "it has objects, and no directory \"token\" with an attribute: it is no token for SoftHSM, and stays pending until it has one, or is removed",
            )),
            // Another one has ended it meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            listed => listed.map(drop),
        }
    }

    fn sync_token(&self, token: &TokenName, patience: Patience) -> Result<()> {
        if self.store.options().read_only || self.store.is_building(token) {
            return Ok(());
        }
        match self.ask(token, patience, |token| token.sync(patience)) {
            // It is gone, and nothing of it can be lost any more: as fsync(2) of what is removed and open.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            synced => self.noted(synced),
        }
    }

    /// The times of a new object's directory were set, so it is finished, unless nothing was put into it yet (rsync sets the times of
    /// a directory before it fills it, and once more afterwards).
    pub(super) fn finish_object(
        &self,
        key: &Key,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        let is_filled = self.with_drafts(key, patience, |drafts| {
            let new = drafts.get_mut(key).and_then(|draft| draft.new.as_mut());
            Ok(new.is_some_and(|new| {
                let is_filled = !new.is_nothing();
                if is_filled {
                    new.mtime = mtime.or(new.mtime);
                    new.makers.are_done();
                }
                is_filled
            }))
        })?;
        if is_filled {
            self.write_draft(key, Finished::Said, patience)?;
        }
        Ok(())
    }

    /// The times of the directory `token` of a token that is being built were set.
    pub(super) fn finish_own(&self, token: &TokenName, pid: u32, patience: Patience) -> Result<()> {
        self.finish_token(token, patience, |build| {
            if build.is_finished_by(pid) {
                build.own_finished = build.own_filled;
            }
        })
    }

    /// The times of the directory of a token that is being built were set.
    pub(super) fn finish_build(
        &self,
        token: &TokenName,
        mtime: Option<SystemTime>,
        pid: u32,
        patience: Patience,
    ) -> Result<()> {
        self.finish_token(token, patience, |build| {
            if build.is_finished_by(pid) {
                build.finished = build.has_own;
            }
            build.mtime = mtime.or(build.mtime);
        })?;
        self.wake();
        Ok(())
    }

    fn finish_token(
        &self,
        token: &TokenName,
        patience: Patience,
        note: impl FnOnce(&mut Build),
    ) -> Result<()> {
        let is_finished = {
            let mut drafts = lock(&self.drafts);
            if let Some(build) = drafts.build_mut(token) {
                note(build);
            }
            drafts.is_finished(token)
        };
        if is_finished {
            self.publish(token, patience)?;
        }
        Ok(())
    }
}

/// Does something with all of them, also after it has failed with one, of which the first is told.
fn each<T>(all: &[T], mut act: impl FnMut(&T) -> Result<()>) -> Result<()> {
    let mut outcome = Ok(());
    for one in all {
        match act(one) {
            // To be done again by who can wait.
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
            done => outcome = outcome.and(done),
        }
    }
    outcome
}
