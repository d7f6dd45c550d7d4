//! Which attributes of an object have the time that the object was given.
//!
//! The store has one time for an object, and so for all its attributes. rsync gives a directory its time before it looks at what is in it,
//! and then leaves alone each file that has the right length and the right time: were that the object's for every attribute at once, a value
//! of the same length would never be restored. So an attribute that was there before keeps the time that it had until it is written, or
//! given one itself. This is remembered for as long as nobody else changes the object, and no longer than the mount lives.

use std::collections::HashMap;
use std::sync::MutexGuard;
use std::time::SystemTime;

use super::draft::Key;
use super::node::Node;
use super::slot::Slot;
use super::{Tree, lock};
use crate::error::Result;
use crate::store::{Object, Patience, TokenName};

/// The times of the attributes of one object.
#[derive(Clone, Debug)]
struct Dates {
    /// The object's own, as we left it in the store. With any other one this is history, unless we are changing it.
    stored: SystemTime,
    /// Of the attributes that were not written since, nor given a time.
    before: SystemTime,
    /// Of the others.
    given: HashMap<Slot, SystemTime>,
}

/// Who is at work on an object, and on what is known of its times.
#[derive(Debug, Default)]
struct Work {
    /// Threads that change it: what the store has changes before it is known here.
    changing: usize,
    /// Threads that look at its time in the store.
    looking: usize,
    /// Counts the beginnings and the ends of changes: the time that was read is still its time if there was none meanwhile.
    turn: u64,
}

/// Those of all objects whose attributes have different ones.
#[derive(Debug, Default)]
pub(super) struct AllDates {
    objects: HashMap<Key, Dates>,
    work: HashMap<Key, Work>,
}

impl AllDates {
    fn of(&self, key: &Key, stored: SystemTime) -> Option<&Dates> {
        let is_changing = || self.work.get(key).is_some_and(|work| work.changing > 0);
        let dates = self.objects.get(key)?;
        (dates.stored == stored || is_changing()).then_some(dates)
    }

    fn work(&mut self, key: &Key) -> &mut Work {
        self.work.entry(key.clone()).or_default()
    }

    fn changed(&mut self, key: &Key) {
        let work = self.work(key);
        work.changing = work.changing.saturating_sub(1);
        work.turn += 1;
        self.tidy(key);
    }

    fn tidy(&mut self, key: &Key) {
        let work = self.work.get(key);
        if work.is_some_and(|work| work.changing == 0 && work.looking == 0) {
            self.work.remove(key);
        }
    }
}

impl Tree {
    /// The object is about to be changed, or given a time. If that is `mtime`, its attributes keep theirs. [`Tree::end_dating`] or
    /// [`Tree::give_up_dating`] has to follow, unless this fails.
    ///
    /// # Errors
    /// What the store fails with.
    pub(super) fn begin_dating(
        &self,
        key: &Key,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        let (mut dates, stored) = self.look_at_time(key, mtime.is_some(), patience);
        if let Some(stored) = stored.transpose()?
            && dates.of(key, stored).is_none()
        {
            dates.objects.remove(key);
            if mtime.is_some_and(|mtime| mtime != stored) {
                let new = Dates {
                    stored,
                    before: stored,
                    given: HashMap::new(),
                };
                dates.objects.insert(key.clone(), new);
            }
        }
        let work = dates.work(key);
        work.changing += 1;
        work.turn += 1;
        Ok(())
    }

    /// It has been changed: these attributes have a time of their own now, `mtime` or that of the object.
    pub(super) fn end_dating(
        &self,
        key: &Key,
        slots: &[Slot],
        mtime: Option<SystemTime>,
        patience: Patience,
    ) {
        // Only what is made at once in a token that is being built comes here without any.
        let patience = self.to_see_through(patience);
        let (mut dates, stored) = self.look_at_time(key, false, patience);
        dates.changed(key);
        match stored {
            Some(Ok(stored)) => {
                if let Some(dates) = dates.objects.get_mut(key) {
                    dates.stored = stored;
                    let mtime = mtime.unwrap_or(stored);
                    dates.given.extend(slots.iter().map(|slot| (*slot, mtime)));
                }
            }
            // It cannot be told: what was known is history.
            Some(Err(_)) => {
                dates.objects.remove(key);
            }
            None => {}
        }
    }

    /// It has not been changed after all.
    pub(super) fn give_up_dating(&self, key: &Key) {
        lock(&self.dates).changed(key);
    }

    /// The table, and the time that the store has of an object at a moment when nothing of ours begins or ends there. It is read only if
    /// its attributes have different ones, or it is `wanted` all the same.
    fn look_at_time(
        &self,
        key: &Key,
        wanted: bool,
        patience: Patience,
    ) -> (MutexGuard<'_, AllDates>, Option<Result<SystemTime>>) {
        let mut dates = lock(&self.dates);
        while wanted || dates.objects.contains_key(key) {
            let work = dates.work(key);
            work.looking += 1;
            let turn = work.turn;
            drop(dates);
            let stored = self.stored_time(key, patience);
            dates = lock(&self.dates);
            let work = dates.work(key);
            work.looking -= 1;
            let is_so = work.turn == turn;
            dates.tidy(key);
            if is_so || stored.is_err() {
                return (dates, Some(stored));
            }
        }
        (dates, None)
    }

    fn stored_time(&self, key: &Key, patience: Patience) -> Result<SystemTime> {
        let (token, id) = key;
        let metadata = self.ask(token, patience, |token| token.object_metadata(id, patience))?;
        Ok(metadata.mtime)
    }

    /// The object has one time again.
    pub(super) fn forget_dates(&self, key: &Key) {
        lock(&self.dates).objects.remove(key);
    }

    /// The same of all objects of a token.
    pub(super) fn forget_dates_of(&self, token: &TokenName) {
        lock(&self.dates).objects.retain(|(of, _), _| of != token);
    }

    /// An object has another name.
    pub(super) fn move_dates(&self, from: &Key, to: &Key) {
        let mut dates = lock(&self.dates);
        match dates.objects.remove(from) {
            Some(moved) => dates.objects.insert(to.clone(), moved),
            None => dates.objects.remove(to),
        };
    }

    /// The time of an attribute in a version of its object.
    pub(super) fn date_of(&self, node: &Node, object: &Object) -> SystemTime {
        let stored = object.metadata.mtime;
        let Some((token, id, slot)) = Slot::of(node) else {
            return stored;
        };
        let dates = lock(&self.dates);
        let of_object = dates.of(&(token.clone(), id.clone()), stored);
        of_object.map_or(stored, |dates| {
            dates.given.get(&slot).copied().unwrap_or(dates.before)
        })
    }
}
