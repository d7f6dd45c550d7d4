//! Modes, owners, times and lengths that are set.

use std::time::SystemTime;

use super::draft::Key;
use super::handle::HandleId;
use super::node::{Ino, Node};
use super::slot::Slot;
use super::{Entry, FileKind, Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Kind;
use crate::store::{Backend, MetadataChange, ObjectId, Patience, Target, Time, TokenName};

/// What is to be set; the rest stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Length in bytes.
    pub size: Option<u64>,
    /// Mode, owner and times.
    pub metadata: MetadataChange,
    /// The process that sets it, 0 if it is not known.
    pub pid: u32,
    /// The user who sets it, if that is to be looked at again: the kernel goes by the owner that it remembers.
    pub uid: Option<u32>,
}

impl Tree {
    /// Sets attributes of a file or a directory; those of `handle` if it is open.
    ///
    /// # Errors
    /// [`ErrorKind::NotPermitted`] if tokenfs itself may not; [`ErrorKind::ReadOnly`]; [`ErrorKind::Invalid`] if a file that is cut
    /// has no value then; what the store fails with.
    pub fn set_attributes(
        &self,
        ino: Ino,
        handle: Option<HandleId>,
        change: &SetAttributes,
        patience: Patience,
    ) -> Result<Entry> {
        if self.is_orphan(ino) {
            return self.set_orphan(ino, handle, change, patience);
        }
        let outcome = self.wherever(ino, patience, |node| {
            if change.metadata.mtime.is_some() {
                self.wait_until_all_closed(node, patience)?;
            }
            self.in_place(ino, patience, |node| {
                self.check_still_theirs(ino, node, change, patience)?;
                self.set(node, handle, change, patience)
            })
        });
        let outcome = match (outcome, handle) {
            // It is open and unlinked: nobody will ever see what was set.
            (Err(error), Some(_)) if error.kind() == ErrorKind::NotFound => Ok(()),
            // (Only the size is set with a descriptor.)
            (Err(error), None)
                if error.kind() == ErrorKind::NotFound
                    && change.size.is_none()
                    && self.has_open(ino, change.pid) =>
            {
                Ok(())
            }
            (outcome, _) => outcome,
        };
        let node = self.node(ino)?;
        self.noted_write(&node, outcome)?;
        self.note_dropped(&node, change.metadata.mode);
        match handle {
            Some(handle) => self.open_attributes(ino, handle, patience),
            None => self.attributes_for(ino, change.pid, patience),
        }
    }

    /// That who may set mode and owner was decided by the owner that it has now, as in [`Tree::check_told`]. Root may in any case.
    fn check_still_theirs(
        &self,
        ino: Ino,
        node: &Node,
        change: &SetAttributes,
        patience: Patience,
    ) -> Result<()> {
        let metadata = &change.metadata;
        let is_owners = metadata.mode.is_some() || metadata.uid.is_some() || metadata.gid.is_some();
        if !is_owners || change.uid.is_none_or(|uid| uid == 0) {
            return Ok(());
        }
        let told = lock(&self.inodes).get(ino).and_then(|inode| inode.told);
        let Some(told) = told else {
            return Ok(());
        };
        match self.describe(node, patience) {
            Ok((now, _)) if now.uid != told.uid => {
                let detail = "it has another owner than a moment ago";
                Err(Error::new(ErrorKind::Stale, detail))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error),
            // What else is wrong is found out by what is done.
            _ => Ok(()),
        }
    }

    /// Of a file that has lost its name only the size counts: nobody will ever see the rest. (The kernel does not say through which descriptor
    /// `fchmod` and `futimens` ask.) Who cuts it by a name (`truncate`) found it by that just before it was another one's, or by
    /// `/proc/self/fd`: then it is cut for those who are writing it.
    fn set_orphan(
        &self,
        ino: Ino,
        handle: Option<HandleId>,
        change: &SetAttributes,
        patience: Patience,
    ) -> Result<Entry> {
        if let Some(size) = change.size {
            match handle {
                Some(handle) => self.resize_open(handle, size, patience)?,
                None => self.resize_all(ino, size, patience)?,
            }
        }
        self.attributes_for(ino, change.pid, patience)
    }

    fn set(
        &self,
        node: &Node,
        handle: Option<HandleId>,
        change: &SetAttributes,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(node)?;
        if let Some(size) = change.size {
            match handle {
                Some(handle) if self.is_open_for_writing(handle) => {
                    self.resize_open(handle, size, patience)?;
                }
                _ => {
                    self.resize(node, size, patience)?;
                    self.forget_opened(node, change.pid);
                }
            }
        }
        let (metadata, pid) = (&change.metadata, change.pid);
        if *metadata == MetadataChange::default() {
            return Ok(());
        }
        match node {
            Node::Scratch(id) => {
                let mut scratch = lock(&self.scratch);
                // If it has been renamed to an attribute meanwhile it is asked for again (`Tree::wherever`).
                let entry = scratch.get_mut(*id)?;
                let most = match entry.kind() {
                    FileKind::Directory => 0o777 | libc::S_ISGID,
                    _ => 0o666,
                };
                if let Some(mode) = metadata.mode {
                    entry.access.mode = mode & most & !self.settings.mask;
                }
                entry.access.uid = metadata.uid.unwrap_or(entry.access.uid);
                entry.access.gid = metadata.gid.unwrap_or(entry.access.gid);
                let now = SystemTime::now();
                if let Some(mtime) = metadata.mtime {
                    entry.mtime = moment(mtime, now);
                    entry.given = Some(entry.mtime);
                }
                if let Some(atime) = metadata.atime {
                    entry.atime = moment(atime, now);
                }
                entry.ctime = now;
                Ok(())
            }
            Node::Root => {
                // It is the tokendir's own, which no mask is about.
                self.store.set_metadata(metadata)
            }
            Node::Token(token) => {
                let change = self.masked(metadata, 0o7777);
                let mtime = change.mtime.map(|mtime| moment(mtime, SystemTime::now()));
                if let Some(mtime) = mtime {
                    // Before it is set: another thread may be writing the last thing that is pending, over the time that is set here.
                    lock(&self.drafts).keep_time(token, mtime);
                }
                let outcome = self.ask(token, patience, |token| {
                    token.set_metadata(&Target::Directory, &change, patience)
                });
                if let Some(given) = mtime {
                    if outcome.is_err() {
                        lock(&self.drafts).forget_time(token, given);
                        return outcome;
                    }
                    self.finish_build(token, mtime, pid, patience)?;
                    self.restore_time(token, patience);
                }
                outcome
            }
            Node::Object(token, id) => {
                let change = self.masked(metadata, 0o666);
                self.set_object(token, id, &change, None, pid, patience)
            }
            Node::Attribute(token, id, _) | Node::MapEntry(token, id, _, _) => {
                let change = self.masked(metadata, 0o666);
                if let Some(mtime) = change.mtime {
                    self.date_writers(node, moment(mtime, SystemTime::now()));
                }
                let slot = Slot::of(node).map(|(_, _, slot)| slot);
                self.set_object(token, id, &change, slot, pid, patience)
            }
            _ => Ok(()),
        }
    }

    fn is_open_for_writing(&self, handle: HandleId) -> bool {
        use super::handle::Handle;
        matches!(
            lock(&self.handles).get(handle),
            Some(Handle::Writer(_) | Handle::Shared(_))
        )
    }

    /// Mode, owner and times of an object's file: those of its draft if it is new. That the times of its directory are set means
    /// that it is finished.
    fn set_object(
        &self,
        token: &TokenName,
        id: &ObjectId,
        change: &MetadataChange,
        slot: Option<Slot>,
        pid: u32,
        patience: Patience,
    ) -> Result<()> {
        let is_directory = slot.is_none();
        let key = (token.clone(), id.clone());
        let mtime = change.mtime.map(|mtime| moment(mtime, SystemTime::now()));
        let is_shared = self.token(token)?.backend() == Backend::Db;
        let uid = self.settings.uid;
        let mut held = None;
        let maker = self.with_drafts(&key, patience, |drafts| {
            drafts.touch(&key);
            let Some(draft) = drafts.get_mut(&key) else {
                return Ok(None);
            };
            let Some(new) = draft.new.as_mut() else {
                // What was unlinked before must not be written while this thread is at it: it would be without the time.
                held = mtime.map(|_| draft.number);
                draft.busy = held.is_some();
                return Ok(None);
            };
            if !is_shared {
                if uid != 0 && change.uid.is_some_and(|wanted| wanted != uid) {
                    return Err(Error::new(
                        ErrorKind::NotPermitted,
                        "only a mount by root can give files away",
                    ));
                }
                new.access.mode = change.mode.unwrap_or(new.access.mode);
                new.access.uid = change.uid.unwrap_or(new.access.uid);
                new.access.gid = change.gid.unwrap_or(new.access.gid);
            }
            Ok(Some(new.makers.contains(pid)))
        })?;
        let Some(is_maker) = maker else {
            let outcome = self.set_stored(&key, slot, change, patience);
            if let Some(number) = held {
                let mut drafts = lock(&self.drafts);
                if let Some(draft) = drafts.get_mut(&key).filter(|draft| draft.number == number) {
                    draft.busy = false;
                    if outcome.is_ok() {
                        draft.given = mtime;
                    }
                }
                drafts.tidy(&key);
                drop(drafts);
                self.wake();
            }
            outcome?;
            if is_directory && change.mtime.is_some() && *id == ObjectId::Token {
                self.finish_own(token, pid, patience)?;
            }
            return Ok(());
        };
        if is_shared && (change.mode.is_some() || change.uid.is_some() || change.gid.is_some()) {
            // All objects of a database have its mode and owner.
            let shared = MetadataChange {
                atime: None,
                mtime: None,
                ..*change
            };
            self.set_and_tell(token, &ObjectId::Token, &shared, patience)?;
        }
        if is_directory && is_maker && change.mtime.is_some() {
            return self.finish_object(&key, mtime, patience);
        }
        let mut drafts = lock(&self.drafts);
        let draft = drafts.get_mut(&key).and_then(|draft| draft.new.as_mut());
        if let Some(new) = draft.filter(|_| change.mtime.is_some()) {
            // A process that comes upon what another one has left there begins now (rsync, run again), and says later when it is finished.
            new.makers.insert(pid);
            if !is_directory || !new.attributes.is_empty() {
                new.mtime = mtime;
            }
        }
        Ok(())
    }

    /// Mode, owner and times of an object that the store has. All that shares them shows a new mode or owner from now on, whatever the
    /// kernel remembers.
    fn set_and_tell(
        &self,
        token: &TokenName,
        id: &ObjectId,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        let access = || {
            let found = self.ask(token, patience, |token| token.object_metadata(id, patience));
            found.map(|found| (found.mode, found.uid, found.gid)).ok()
        };
        let wanted = change.mode.is_some() || change.uid.is_some() || change.gid.is_some();
        let before = wanted.then(access);
        let target = Target::Object(id.clone());
        let backend = self.ask(token, patience, |token| {
            token.set_metadata(&target, change, patience)?;
            Ok(token.backend())
        })?;
        // Of what is being built nothing is remembered.
        if !self.store.is_building(token) && before.is_some_and(|before| before != access()) {
            self.tell_of(&match backend {
                Backend::File => Node::Object(token.clone(), id.clone()),
                Backend::Db => Node::Token(token.clone()),
            });
        }
        Ok(())
    }

    /// Mode, owner and times of the file of an object in the store. A time that its directory is given is not yet that of what is in it
    /// (`dates`), unless it is now, as of what was just touched.
    fn set_stored(
        &self,
        key: &Key,
        slot: Option<Slot>,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        let (token, id) = key;
        if change.mtime.is_none() {
            return self.set_and_tell(token, id, change, patience);
        }
        let given = match (slot, change.mtime) {
            (None, Some(Time::At(mtime))) => Some(mtime),
            _ => None,
        };
        self.begin_dating(key, given, patience)?;
        if let Err(error) = self.set_and_tell(token, id, change, patience) {
            self.give_up_dating(key);
            return Err(error);
        }
        self.end_dating(key, slot.as_slice(), None, patience);
        if slot.is_none() && change.mtime == Some(Time::Now) {
            self.forget_dates(key);
        }
        Ok(())
    }

    /// A change without the bits of a mode that cannot be had.
    fn masked(&self, change: &MetadataChange, most: u32) -> MetadataChange {
        MetadataChange {
            mode: change
                .mode
                .map(|mode| mode & most & !(self.settings.mask & 0o777)),
            ..*change
        }
    }

    /// Says which bits of a mode that somebody asked for cannot be had.
    fn note_dropped(&self, node: &Node, wanted: Option<u32>) {
        let Some(wanted) = wanted.filter(|_| *node != Node::Root) else {
            return;
        };
        let mask = self.settings.mask & 0o777;
        // That a directory can be entered follows from that it can be listed.
        let is_file = match node {
            Node::Attribute(_, _, key) => key.kind != Kind::Map,
            Node::MapEntry(..) => true,
            Node::Scratch(id) => lock(&self.scratch)
                .get(*id)
                .is_ok_and(|entry| entry.kind() == FileKind::File),
            _ => false,
        };
        let most = if is_file { !mask & 0o666 } else { !mask };
        let dropped = wanted & 0o777 & !most;
        if dropped != 0 {
            // Once for all files of a directory: there is as much to say of each file of a copy.
            let path = self.path_of(node);
            let directory = path.parent().filter(|_| is_file);
            self.diagnostics.warning(format!(
                "{}: of the mode {wanted:04o}, the bits {dropped:04o} were dropped: the mask is {mask:04o}, and files are never executable",
                directory.unwrap_or(&path).display().to_string().escape_debug()
            ));
        }
    }
}

fn moment(time: Time, now: SystemTime) -> SystemTime {
    match time {
        Time::Now => now,
        Time::At(time) => time,
    }
}
