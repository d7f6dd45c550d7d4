//! Which attributes of an object have the time that the object was given.
//!
//! The store has one time for an object, and so for all its attributes. rsync gives a directory its time before it looks at what is in it,
//! and then leaves alone each file that has the right length and the right time: were that the object's for every attribute at once, a value
//! of the same length would never be restored. So an attribute that was there before keeps the time that it had until it is written, or
//! given one itself. This is remembered for as long as nobody else changes the object, and no longer than the mount lives.

use std::collections::HashMap;
use std::time::SystemTime;

use super::draft::Key;
use super::node::Node;
use super::slot::Slot;
use super::{Tree, lock};
use crate::error::Result;
use crate::store::{Object, Patience};

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

/// Those of all objects whose attributes have different ones.
#[derive(Debug, Default)]
pub(super) struct AllDates {
    objects: HashMap<Key, Dates>,
    /// The objects that are being changed, and by how many threads: what the store has changes before it is known here.
    changing: HashMap<Key, usize>,
}

impl AllDates {
    fn of(&self, key: &Key, stored: SystemTime) -> Option<&Dates> {
        let is_ours = |dates: &&Dates| dates.stored == stored || self.changing.contains_key(key);
        self.objects.get(key).filter(is_ours)
    }

    fn changed(&mut self, key: &Key) {
        if let Some(count) = self.changing.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.changing.remove(key);
            }
        }
    }
}

impl Tree {
    /// The object is about to be changed, or given a time. If that is `mtime`, its attributes keep theirs. [`Tree::end_dating`] has to
    /// follow, unless this fails.
    ///
    /// # Errors
    /// What the store fails with.
    pub(super) fn begin_dating(
        &self,
        key: &Key,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        let is_dated = mtime.is_some() || lock(&self.dates).objects.contains_key(key);
        let stored = match is_dated {
            true => Some(self.stored_time(key, patience)?),
            false => None,
        };
        let mut dates = lock(&self.dates);
        if let Some(stored) = stored
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
        *dates.changing.entry(key.clone()).or_insert(0) += 1;
        Ok(())
    }

    /// It has been changed, or it has not: these attributes have a time of their own now, `mtime` or that of the object.
    pub(super) fn end_dating(
        &self,
        key: &Key,
        slots: &[Slot],
        mtime: Option<SystemTime>,
        patience: Patience,
    ) {
        let is_dated = lock(&self.dates).objects.contains_key(key);
        // Where that cannot be told at once, what is known becomes history.
        let stored = is_dated.then(|| self.stored_time(key, patience));
        let mut all = lock(&self.dates);
        all.changed(key);
        let (Some(dates), Some(Ok(stored))) = (all.objects.get_mut(key), stored) else {
            return;
        };
        dates.stored = stored;
        let mtime = mtime.unwrap_or(stored);
        dates.given.extend(slots.iter().map(|slot| (*slot, mtime)));
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
