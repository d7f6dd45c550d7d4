//! What the mount shows of an object and the store does not have yet.
//!
//! Two kinds of it. A directory that was just made is *new*: all of it is here, and goes to the store in one step when it is finished. Of
//! an object that is in the store, what was unlinked is *held* back for a moment, so that a program that unlinks before it
//! writes leaves no mutilated key behind; and a file that was just created has no value yet.
//!
//! Knows nothing of the store. Contract: `docs/tree.md`, "Writing".

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::body::Bytes;
use super::slot::Slot;
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::attribute::{AttributeKey, Attributes, Value};
use crate::store::file;
use crate::store::{Access, Metadata, Object, ObjectId, ObjectName, TokenName};

/// How long something has to be left alone to be taken for finished.
pub(super) const LEFT_ALONE: Duration = Duration::from_millis(200);

/// How long a new object has to be left alone that has no `CKA_PRIVATE` before the log says so.
const UNDECIDED: Duration = Duration::from_secs(5);

/// How long an object has to be left alone from which its `CKA_CLASS` was unlinked: it is being removed, and a busy machine can take its
/// time over that. An object without a class is nothing that anybody wants to see in between.
const HALF_UNLINKED: Duration = Duration::from_secs(1);

/// How long until what failed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long a `token` directory stays away that was removed from a token which is still there: its `rm -r` did not finish.
const HALF_REMOVED: Duration = Duration::from_secs(5);

/// Which object.
pub(super) type Key = (TokenName, ObjectId);

/// A directory that was made in the mount and is not in the store.
#[derive(Clone, Debug)]
pub(super) struct New {
    /// What was written into it.
    pub attributes: Attributes,
    /// Mode and owner that its files are to have.
    pub access: Access,
    /// The time that it was given.
    pub mtime: Option<SystemTime>,
    /// What was to be written into it and could not, for lack of space: whoever copies it may not care, and it would be a part of what was
    /// meant.
    pub unwritten: BTreeSet<Slot>,
    /// The processes that have made its directory, or given that a time: one of them says when it is finished.
    pub makers: BTreeSet<u32>,
}

impl New {
    /// As an object that has just been changed.
    pub fn object(&self) -> Object {
        Object {
            metadata: self.metadata(),
            generation: None,
            canonical: false,
            attributes: self.attributes.clone(),
        }
    }

    /// What it lacks to be an object for who has not been told that it is one. Before it says whether it is private nobody can tell what
    /// its texts are: were it written, SoftHSM would take it for private, and the rest of a copy in the clear would be refused.
    pub fn lacks(&self) -> Option<&'static str> {
        if self.attributes.is_empty() {
            Some("nothing was put into this directory")
        } else if self.attributes.of_type(pkcs11::CKA_PRIVATE).is_none() {
            Some("without CKA_PRIVATE this object does not say whether it is private")
        } else {
            None
        }
    }

    /// Of the files that it would have.
    pub fn metadata(&self) -> Metadata {
        let now = SystemTime::now();
        Metadata {
            mode: self.access.mode,
            uid: self.access.uid,
            gid: self.access.gid,
            atime: now,
            mtime: self.mtime.unwrap_or(now),
            ctime: now,
        }
    }
}

/// One object's share of what is not in the store.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// No other one ever has it: an object that is renamed takes its draft along, and one that comes under its name has another.
    pub number: u64,
    /// All of it, if it is new.
    pub new: Option<New>,
    /// What was unlinked and is in the store still; and all that the object held then. What somebody else has changed since is not what was
    /// unlinked.
    pub removed: BTreeMap<Slot, Attributes>,
    /// What was given a value in the mount, or is about to be, since there is something to remember of the object.
    pub written: BTreeSet<Slot>,
    /// Files that were created and have no value yet.
    pub fresh: BTreeMap<Slot, Bytes>,
    /// How many commits are on their way to each place. What was unlinked there stays held until the first of them has come, and is not
    /// written; who unlinks the place meanwhile takes it out of here, and means what comes too.
    pub committing: BTreeMap<Slot, usize>,
    /// The time that the object was given since its content last changed: what was unlinked before that does not change it.
    pub given: Option<SystemTime>,
    /// The directory itself was removed (a token's own: its last step is the token's).
    pub gone: bool,
    /// A thread is writing it to the store.
    pub busy: bool,
    /// So many are removing it, or something in it: what they wait for does not make it left alone.
    pub attended: usize,
    touched: Instant,
    not_before: Option<Instant>,
}

impl Draft {
    fn new(number: u64, new: Option<New>) -> Self {
        Self {
            number,
            new,
            removed: BTreeMap::new(),
            written: BTreeSet::new(),
            fresh: BTreeMap::new(),
            committing: BTreeMap::new(),
            given: None,
            gone: false,
            busy: false,
            attended: 0,
            touched: Instant::now(),
            not_before: None,
        }
    }

    /// Whether nothing is said here that the store does not say.
    fn is_empty(&self) -> bool {
        self.fresh.is_empty() && !self.is_to_be_written()
    }

    /// Whether there is something that the store is to be told.
    fn is_to_be_written(&self) -> bool {
        self.new.is_some()
            || !self.removed.is_empty()
            || !self.committing.is_empty()
            || self.gone
            || self.busy
    }

    /// What was unlinked and not created again meanwhile.
    pub fn unlinked(&self) -> impl Iterator<Item = (Slot, &Attributes)> {
        let (fresh, committing) = (&self.fresh, &self.committing);
        self.removed
            .iter()
            .map(|(slot, then)| (*slot, then))
            .filter(move |(slot, _)| !fresh.contains_key(slot) && !committing.contains_key(slot))
    }

    /// Whether an object that is being removed has nothing left but what SoftHSM adds to one that lacks it when somebody looks at it there
    /// (`P11Object::init`), and who removes the object could not list: it was not there when the rest was unlinked, is no value that anybody
    /// gave it, and is none of ours.
    pub fn has_only_defaults(&self, left: &Attributes) -> bool {
        // Whatever somebody is about to give it is theirs.
        let is_alone = self.fresh.is_empty() && self.committing.is_empty();
        let is_removed = self.removed.keys().any(|slot| slot.is_class());
        let is_default = |key: AttributeKey, value: &Value| {
            let is_none = match value {
                Value::Bool(_) => true,
                Value::Bytes(bytes) => bytes.is_empty(),
                _ => false,
            };
            let slot = Slot { map: None, key };
            let is_new = self.removed.values().any(|then| then.get(key).is_none());
            is_none && is_new && !self.written.contains(&slot)
        };
        is_alone && is_removed && left.iter().all(|(key, value)| is_default(key, value))
    }

    /// An attribute map has another name: the files in it that have no value yet go with it.
    pub fn move_map(&mut self, from: Slot, to: Slot) {
        let inside: Vec<Slot> = self.fresh.keys().copied().collect();
        for slot in inside.into_iter().filter(|slot| slot.is_in(from)) {
            if let Some(bytes) = self.fresh.remove(&slot) {
                let map = Some(to.key.attribute_type);
                self.fresh.insert(Slot { map, ..slot }, bytes);
            }
        }
    }

    /// Writing it failed: not again at once.
    pub fn failed(&mut self) {
        self.busy = false;
        self.not_before = Some(Instant::now() + TRY_AGAIN);
    }

    /// Whether it has been left alone for long enough to be written.
    pub fn is_due(&self, now: Instant, is_open: bool) -> bool {
        self.due(is_open).is_some_and(|due| due <= now)
    }

    /// When it is to be written, if it is left alone until then. Something in it can be open for writing.
    fn due(&self, is_open: bool) -> Option<Instant> {
        if self.busy || self.new.is_none() && self.attended > 0 {
            return None;
        }
        let due = match &self.new {
            Some(new) => {
                let has = |attribute_type| new.attributes.of_type(attribute_type).is_some();
                // A copy that pauses there is not finished. That is said once, until somebody does something about it.
                let is_undecided = new.lacks().is_some() || !new.unwritten.is_empty();
                if is_undecided && self.not_before.is_some_and(|failed| failed > self.touched) {
                    return None;
                }
                let wait = if is_undecided { UNDECIDED } else { LEFT_ALONE };
                (has(pkcs11::CKA_CLASS) && !is_open).then_some(self.touched + wait)
            }
            None if self.gone => Some(self.touched + HALF_REMOVED),
            None => {
                let wait = if self.unlinked().any(|(slot, _)| slot.is_class()) {
                    HALF_UNLINKED
                } else {
                    LEFT_ALONE
                };
                self.unlinked().next().map(|_| self.touched + wait)
            }
        }?;
        Some(self.not_before.map_or(due, |limit| limit.max(due)))
    }
}

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
    /// The processes that have made its directories, or given them a time, as in [`New::makers`].
    pub makers: BTreeSet<u32>,
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
            makers: BTreeSet::from([pid]),
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
            if let Some(due) = draft.due(open.contains(key)) {
                sort(due, &mut || keys.push(key.clone()));
            }
        }
        for (token, build) in &self.builds {
            let wait = if self.is_finished(token) {
                Duration::ZERO
            } else {
                LEFT_ALONE
            };
            let due = build.touched + wait;
            let due = build.not_before.map_or(due, |limit| limit.max(due));
            if build.is_token() {
                sort(due, &mut || tokens.push(token.clone()));
            }
        }
        (keys, tokens, next)
    }
}
