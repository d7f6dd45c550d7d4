//! What the mount shows of an object and the store does not have yet.
//!
//! Two kinds of it. A directory that was just made is *new*: all of it is here, and goes to the store in one step when it is finished. Of
//! an object that is in the store, what was unlinked is *held* back for a moment, so that a program that unlinks before it
//! writes leaves no mutilated key behind; and a file that was just created has no value yet.
//!
//! Knows nothing of the store. Contract: `docs/tree.md`, "Writing".

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use super::body::Bytes;
use super::makers::{Alive, Makers};
use super::slot::Slot;
use crate::pkcs11;
use crate::store::attribute::{AttributeKey, Attributes, Value};
use crate::store::classes;
use crate::store::{Access, Metadata, Object, ObjectId, TokenName};

/// How long something has to be left alone to be taken for finished.
pub(super) const LEFT_ALONE: Duration = Duration::from_millis(200);

/// How long something has to be left alone while who makes it lives and has not said that it is finished: what copies it can be held up by where it
/// copies it from.
pub(super) const BEING_MADE: Duration = Duration::from_secs(10);

/// How long a new object has to be left alone that has no `CKA_PRIVATE` before the log says so.
const UNDECIDED: Duration = Duration::from_secs(5);

/// How long an object has to be left alone from which its `CKA_CLASS` was unlinked: it is being removed, and a busy machine can take its
/// time over that. An object without a class is nothing that anybody wants to see in between.
const HALF_UNLINKED: Duration = Duration::from_secs(1);

/// How long until what failed is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long a `token` directory stays away that was removed from a token which is still there: its `rm -r` did not finish.
const HALF_REMOVED: Duration = Duration::from_secs(5);

/// Whether there is nothing but directories.
pub(super) fn is_nothing(attributes: &Attributes) -> bool {
    let is_empty = |value: &Value| matches!(value, Value::Map(entries) if entries.is_empty());
    attributes.iter().all(|(_, value)| is_empty(value))
}

/// When what was `touched` last has been left alone for long enough, or is to be looked at again, as it `is_being_made`.
pub(super) fn left_alone(
    touched: Instant,
    now: Instant,
    is_being_made: impl FnOnce() -> bool,
) -> Instant {
    let (due, limit) = (touched + LEFT_ALONE, touched + BEING_MADE);
    if (due..limit).contains(&now) && is_being_made() {
        limit.min(now + LEFT_ALONE)
    } else {
        due
    }
}

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
    /// Who makes it.
    pub makers: Makers,
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

    /// Whether nothing was put into it, but directories.
    pub fn is_nothing(&self) -> bool {
        self.unwritten.is_empty() && is_nothing(&self.attributes)
    }

    /// Whether who makes it can still go on, and it lacks something that SoftHSM's own objects have.
    fn is_being_made(&self, alive: &mut Alive) -> bool {
        !classes::is_complete(&self.attributes) && self.makers.are_at_it(alive)
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
    /// The commits that are on their way to each place, by their numbers. What was unlinked there stays held until the first of them has come,
    /// and is not written.
    pub committing: BTreeMap<Slot, BTreeSet<u64>>,
    /// Those to places that were unlinked meanwhile, by who means what comes, too: that is not done before it has come.
    pub overtaken: BTreeMap<Slot, BTreeSet<u64>>,
    /// The time that the object was given since its content last changed: what was unlinked before that does not change it.
    pub given: Option<SystemTime>,
    /// The directory itself was removed (a token's own: its last step is the token's).
    pub gone: bool,
    /// A thread is writing it to the store.
    pub busy: bool,
    /// So many are removing it, or something in it: what they wait for does not make it left alone.
    pub attended: usize,
    /// When something was done in it last.
    pub touched: Instant,
    not_before: Option<Instant>,
}

impl Draft {
    pub fn new(number: u64, new: Option<New>) -> Self {
        Self {
            number,
            new,
            removed: BTreeMap::new(),
            written: BTreeSet::new(),
            fresh: BTreeMap::new(),
            committing: BTreeMap::new(),
            overtaken: BTreeMap::new(),
            given: None,
            gone: false,
            busy: false,
            attended: 0,
            touched: Instant::now(),
            not_before: None,
        }
    }

    /// Whether nothing is said here that the store does not say.
    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty() && !self.is_to_be_written()
    }

    /// Whether there is something that the store is to be told.
    pub fn is_to_be_written(&self) -> bool {
        self.new.is_some()
            || !self.removed.is_empty()
            || !self.committing.is_empty()
            || !self.overtaken.is_empty()
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

    /// The same, as far as nothing is on its way there that is to be removed, too.
    pub fn to_remove(&self) -> impl Iterator<Item = (Slot, &Attributes)> {
        self.unlinked().filter(|(slot, _)| {
            let mut coming = self.overtaken.keys();
            !coming.any(|other| other == slot || other.is_in(*slot))
        })
    }

    /// Somebody else has given these a value since they were unlinked: they are not removed any more. Which of them that is true of still.
    pub fn keep(&mut self, set_anew: &[(Slot, &Attributes)]) -> Vec<Slot> {
        let mut kept = Vec::new();
        for (slot, then) in set_anew {
            let is_ours = |commits: &BTreeMap<Slot, BTreeSet<u64>>| {
                let mut coming = commits.keys();
                coming.any(|other| other == slot || other.is_in(*slot))
            };
            let is_held = self.removed.get(slot) == Some(then);
            if is_held && !is_ours(&self.committing) && !is_ours(&self.overtaken) {
                self.removed.remove(slot);
                self.written.insert(*slot);
                kept.push(*slot);
            }
        }
        kept
    }

    /// What is at `slot` is unlinked: what is on its way there, or into a map there, is to go again when it has come. Whether there is any.
    pub fn overtake(&mut self, slot: Slot) -> bool {
        let is_there = |held: &Slot| *held == slot || held.is_in(slot);
        let slots: Vec<Slot> = self.committing.keys().copied().filter(is_there).collect();
        for slot in &slots {
            let commits = self.committing.remove(slot).unwrap_or_default();
            self.overtaken.entry(*slot).or_default().extend(commits);
        }
        !slots.is_empty()
    }

    /// Whether the place of the commit of this number was unlinked since that began.
    pub fn is_overtaken(&self, slot: Slot, number: u64) -> bool {
        let of_place = self.overtaken.get(&slot);
        of_place.is_some_and(|numbers| numbers.contains(&number))
    }

    /// The commit of this number has ended. Whether its place was unlinked meanwhile.
    pub fn end_commit(&mut self, slot: Slot, number: u64) -> bool {
        let is_of = |commits: &mut BTreeMap<Slot, BTreeSet<u64>>| {
            let Some(numbers) = commits.get_mut(&slot) else {
                return false;
            };
            let was = numbers.remove(&number);
            if numbers.is_empty() {
                commits.remove(&slot);
            }
            was
        };
        !is_of(&mut self.committing) && is_of(&mut self.overtaken)
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
        let due = self.due(now, is_open, &mut Alive::default());
        due.is_some_and(|due| due <= now)
    }

    /// When it is to be written, or to be looked at again, if it is left alone until then. Something in it can be open for writing.
    pub fn due(&self, now: Instant, is_open: bool, alive: &mut Alive) -> Option<Instant> {
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
                let due = if is_undecided {
                    self.touched + UNDECIDED
                } else {
                    left_alone(self.touched, now, || new.is_being_made(alive))
                };
                (has(pkcs11::CKA_CLASS) && !is_open).then_some(due)
            }
            None if self.gone => Some(self.touched + HALF_REMOVED),
            None => {
                let wait = if self.unlinked().any(|(slot, _)| slot.is_class()) {
                    HALF_UNLINKED
                } else {
                    LEFT_ALONE
                };
                self.to_remove().next().map(|_| self.touched + wait)
            }
        }?;
        Some(self.not_before.map_or(due, |limit| limit.max(due)))
    }
}
