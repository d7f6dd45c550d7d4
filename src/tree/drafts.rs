//! All that is pending: the drafts of objects, the tokens that are being built, and the times that the directories of tokens are to keep.
//!
//! Knows nothing of the store. Contract: `docs/tree.md`, "Writing".

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::body::Bytes;
use super::draft::{Draft, Key, New, TRY_AGAIN, left_alone};
use super::makers::{Alive, Makers};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::file;
use crate::store::{ObjectId, ObjectName, TokenName};

/// A token that is being built: a directory that was made in the root.
#[derive(Clone, Debug)]
pub(super) struct Build {
    /// Its `token` directory was made.
    pub has_own: bool,
    /// Something was written into that.
    pub own_filled: bool,
    /// The times of that were set when it had something in it.
    pub own_finished: bool,
    /// Its own times were set: it is to be published as soon as all that is in it is finished.
    pub finished: bool,
    /// The times that its directory is to have.
    pub mtime: Option<SystemTime>,
    /// Who makes its directories.
    pub makers: Makers,
    touched: Instant,
    not_before: Option<Instant>,
}

impl Build {
    /// Whether it has what makes it a token.
    pub fn is_token(&self) -> bool {
        self.has_own && self.own_filled
    }

    /// Whether a process that sets times in it says that something is finished. One that comes upon what another one has left there begins
    /// with that.
    pub fn is_finished_by(&mut self, pid: u32) -> bool {
        !self.makers.insert(pid)
    }
}

/// The room that there is for new objects in the file system of the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// In bytes, as far as that is known.
    pub free: Option<u64>,
    /// Of which a block has so many.
    pub block: u64,
}

impl Room {
    /// What an object takes: its blocks, and one for the directories that it is in.
    fn taken_by(&self, attributes: &Attributes) -> u64 {
        if attributes.is_empty() {
            return 0;
        }
        let length = file::encoded_length(attributes);
        length
            .next_multiple_of(self.block)
            .saturating_add(self.block)
    }
}

pub(super) fn no_room() -> Error {
    Error::new(
        ErrorKind::NoSpace,
        "the file system of the store has no room for it",
    )
}

/// All drafts.
#[derive(Debug, Default)]
pub(super) struct Drafts {
    /// The new objects take no more room than this, in bytes.
    taken: u64,
    objects: HashMap<Key, Draft>,
    builds: HashMap<TokenName, Build>,
    /// How many drafts there have been.
    last: u64,
    /// How many commits have begun.
    begun: u64,
    /// How many commits there have been, so that who has looked at an object before one looks again.
    pub commits: u64,
    /// The times that the directories of tokens were given while something was still to be written into them.
    times: HashMap<TokenName, SystemTime>,
    /// When the last new object was made in a token's directory, of which the store's directory knows nothing yet.
    changed: HashMap<TokenName, SystemTime>,
}

impl Drafts {
    pub fn get(&self, key: &Key) -> Option<&Draft> {
        self.objects.get(key)
    }

    pub fn get_mut(&mut self, key: &Key) -> Option<&mut Draft> {
        self.objects.get_mut(key)
    }

    /// Begins a new object.
    pub fn insert_new(&mut self, key: Key, new: New) {
        self.touch(&key);
        self.changed.insert(key.0.clone(), SystemTime::now());
        self.times.remove(&key.0);
        self.last += 1;
        let draft = Draft::new(self.last, Some(new));
        self.objects.insert(key, draft);
    }

    /// The draft of an object, which is in the store if there was none.
    pub fn entry(&mut self, key: &Key) -> &mut Draft {
        let last = &mut self.last;
        self.objects.entry(key.clone()).or_insert_with(|| {
            *last += 1;
            Draft::new(*last, None)
        })
    }

    /// The number of a commit that begins.
    pub fn begin_commit(&mut self) -> u64 {
        self.begun += 1;
        self.begun
    }

    /// Under which key the draft is now that had this number under `key`.
    pub fn find(&self, key: &Key, number: u64) -> Option<Key> {
        if self
            .objects
            .get(key)
            .is_some_and(|draft| draft.number == number)
        {
            return Some(key.clone());
        }
        let mut drafts = self.objects.iter();
        drafts
            .find(|(_, draft)| draft.number == number)
            .map(|(key, _)| key.clone())
    }

    /// Puts a draft under a key.
    pub fn put(&mut self, key: Key, draft: Draft) {
        self.objects.insert(key, draft);
    }

    pub fn remove(&mut self, key: &Key) -> Option<Draft> {
        let removed = self.objects.remove(key);
        self.tidy_changed(&key.0);
        removed
    }

    /// When a directory was last changed that the store says something older of: each `mkdir` changes the time of its directory, and a
    /// program that compares that with the time that it gave the directory has to see it (rsync does, when it has filled one).
    pub fn changed(&self, token: &TokenName) -> Option<SystemTime> {
        self.changed.get(token).copied()
    }

    fn tidy_changed(&mut self, token: &TokenName) {
        if self.changed.contains_key(token)
            && self.of_token(token).all(|(_, draft)| draft.new.is_none())
        {
            self.changed.remove(token);
        }
    }

    /// Forgets the draft of an object if it says nothing any more.
    pub fn tidy(&mut self, key: &Key) {
        if self.objects.get(key).is_some_and(Draft::is_empty) {
            self.objects.remove(key);
        }
        self.tidy_changed(&key.0);
    }

    /// Something was done in an object, and so in its token: both are not left alone.
    pub fn touch(&mut self, key: &Key) {
        let now = Instant::now();
        if let Some(draft) = self.objects.get_mut(key) {
            draft.touched = now;
        }
        if let Some(build) = self.builds.get_mut(&key.0) {
            build.touched = now;
        }
    }

    /// The names of the new objects of a token.
    pub fn new_objects(&self, token: &TokenName) -> Vec<ObjectName> {
        self.of_token(token)
            .filter(|(_, draft)| draft.new.is_some())
            .filter_map(|(id, _)| match id {
                ObjectId::Object(name) => Some(name.clone()),
                ObjectId::Token => None,
            })
            .collect()
    }

    /// What the files hold that have no value yet.
    pub fn contents(&self) -> Vec<Bytes> {
        let fresh = self.objects.values().flat_map(|draft| draft.fresh.values());
        fresh.map(Arc::clone).collect()
    }

    /// What is in a new object.
    pub fn new_attributes(&self, key: &Key) -> Option<Attributes> {
        let new = self.get(key)?.new.as_ref()?;
        Some(new.attributes.clone())
    }

    /// That there is room for all new objects if one of them gets from `old` to `new`: who closes a file hears of it then, and not when the
    /// object is written.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`].
    pub fn check_disk(&mut self, room: &Room, old: &Attributes, new: &Attributes) -> Result<()> {
        let Some(free) = room.free else {
            return Ok(());
        };
        let more = room.taken_by(new).saturating_sub(room.taken_by(old));
        if self.taken.saturating_add(more) > free {
            // All of it is counted only when that can matter.
            let new = self.objects.values().filter_map(|draft| draft.new.as_ref());
            self.taken = new.map(|new| room.taken_by(&new.attributes)).sum();
        }
        let wanted = self.taken.saturating_add(more);
        if more > 0 && wanted > free {
            return Err(no_room());
        }
        self.taken = wanted;
        Ok(())
    }

    /// How many bytes the new objects would have in a file.
    pub fn size(&self) -> u64 {
        let new = self.objects.values().filter_map(|draft| draft.new.as_ref());
        new.map(|new| file::encoded_length(&new.attributes)).sum()
    }

    /// How many new objects and files without a value there are.
    pub fn entries(&self) -> usize {
        let of = |draft: &Draft| usize::from(draft.new.is_some()) + draft.fresh.len();
        self.objects.values().map(of).sum()
    }

    fn of_token(&self, token: &TokenName) -> impl Iterator<Item = (&ObjectId, &Draft)> {
        let token = token.clone();
        self.objects
            .iter()
            .filter(move |((of, _), _)| *of == token)
            .map(|((_, id), draft)| (id, draft))
    }

    /// All keys, of one token or of all.
    pub fn keys(&self, token: Option<&TokenName>) -> Vec<Key> {
        let of = |key: &&Key| token.is_none_or(|token| key.0 == *token);
        self.objects.keys().filter(of).cloned().collect()
    }

    pub fn build(&self, token: &TokenName) -> Option<&Build> {
        self.builds.get(token)
    }

    pub fn build_mut(&mut self, token: &TokenName) -> Option<&mut Build> {
        self.builds.get_mut(token)
    }

    /// Begins a token.
    pub fn insert_build(&mut self, token: TokenName, pid: u32) {
        let build = Build {
            has_own: false,
            own_filled: false,
            own_finished: false,
            finished: false,
            mtime: None,
            makers: Makers::new(Some(pid)),
            touched: Instant::now(),
            not_before: None,
        };
        self.builds.insert(token, build);
    }

    pub fn remove_build(&mut self, token: &TokenName) -> Option<Build> {
        self.builds.remove(token)
    }

    /// Publishing a token failed: not again at once.
    pub fn build_failed(&mut self, token: &TokenName) {
        if let Some(build) = self.builds.get_mut(token) {
            build.not_before = Some(Instant::now() + TRY_AGAIN);
        }
    }

    /// The tokens that are being built.
    pub fn builds(&self) -> Vec<TokenName> {
        self.builds.keys().cloned().collect()
    }

    /// Whether a token that is being built has all that is going to be in it.
    pub fn is_finished(&self, token: &TokenName) -> bool {
        // What is in it and not finished yet keeps it, unless that has been left alone.
        let unfinished = self.of_token(token).any(|(_, draft)| draft.new.is_some());
        self.builds
            .get(token)
            .is_some_and(|build| build.is_token() && build.own_finished && build.finished)
            && !unfinished
    }

    /// Whether an object is not in the store yet.
    pub fn is_new(&self, key: &Key) -> bool {
        self.get(key).is_some_and(|draft| draft.new.is_some())
    }

    /// Whether something of a token is on its way to the store. A file without a value is not.
    fn is_being_written(&self, token: &TokenName) -> bool {
        self.builds.contains_key(token)
            || self
                .of_token(token)
                .any(|(_, draft)| draft.is_to_be_written())
    }

    /// Forgets all that is pending in a token; returns what that was.
    pub fn remove_token(&mut self, token: &TokenName) -> Vec<(Key, Draft)> {
        let keys = self.keys(Some(token)).into_iter();
        let removed = keys.filter_map(|key| Some((key.clone(), self.remove(&key)?)));
        let removed = removed.collect();
        self.builds.remove(token);
        self.times.remove(token);
        removed
    }

    /// The directory of a token was given this time, and is to keep it over what is still to be written into it.
    pub fn keep_time(&mut self, token: &TokenName, mtime: SystemTime) {
        self.times.insert(token.clone(), mtime);
        self.changed.remove(token);
    }

    /// The directory of a token has that time, or was not given it.
    pub fn forget_time(&mut self, token: &TokenName, mtime: SystemTime) {
        if self.times.get(token) == Some(&mtime) {
            self.times.remove(token);
        }
    }

    /// The time that the directory of a token was given, while something is written into it or is to be.
    pub fn kept_time(&self, token: &TokenName) -> Option<SystemTime> {
        let kept = self.times.get(token).copied();
        kept.filter(|_| self.is_being_written(token))
    }

    /// The same, once nothing more is to be written into it.
    pub fn time_to_restore(&self, token: &TokenName) -> Option<SystemTime> {
        let kept = self.times.get(token).copied();
        kept.filter(|_| !self.is_being_written(token))
    }

    /// The tokens whose directory is to be given such a time.
    pub fn times_to_restore(&self) -> Vec<TokenName> {
        let tokens = self.times.keys();
        let tokens = tokens.filter(|token| !self.is_being_written(token));
        tokens.cloned().collect()
    }

    /// What is due by now, if something is `open` for writing in those objects; and when the next thing will be.
    pub fn due(
        &self,
        now: Instant,
        open: &HashSet<Key>,
    ) -> (Vec<Key>, Vec<TokenName>, Option<Instant>) {
        let mut next: Option<Instant> = None;
        let mut alive = Alive::default();
        let mut keys = Vec::new();
        let mut tokens = Vec::new();
        let mut sort = |due: Instant, add: &mut dyn FnMut()| {
            if due <= now {
                add();
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        };
        for (key, draft) in &self.objects {
            if let Some(due) = draft.due(now, open.contains(key), &mut alive) {
                sort(due, &mut || keys.push(key.clone()));
            }
        }
        for (token, build) in &self.builds {
            let due = if self.is_finished(token) {
                build.touched
            } else {
                left_alone(build.touched, now, || build.makers.are_at_it(&mut alive))
            };
            let due = build.not_before.map_or(due, |limit| limit.max(due));
            if build.is_token() {
                sort(due, &mut || tokens.push(token.clone()));
            }
        }
        (keys, tokens, next)
    }
}
