//! Changes of ours that SoftHSM overwrote.
//!
//! SoftHSM refreshes its copy of an object, *then* waits for `.lock`, then writes all of its copy. A change of ours that fell in
//! between is gone. That cannot be prevented from outside, but noticed: a later version has what was there before our
//! change. What is remembered of a value is a hash.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::encode::digest;
use crate::store::ObjectId;
use crate::store::attribute::{AttributeType, Attributes};

/// How many objects are remembered.
const OBJECTS: usize = 1024;

/// How many earlier values of an attribute are remembered. A SoftHSM can wait for a lock while it is taken many times.
const EARLIER: usize = 4096;

/// How long. A SoftHSM that waits for a lock for longer than this overwrites unnoticed.
const KEPT: Duration = Duration::from_secs(60);

/// The hash of a value; nothing if the object has none.
pub(super) type Trace = Option<u128>;

/// What this process has changed of late.
#[derive(Debug, Default)]
pub(super) struct Changes {
    objects: HashMap<ObjectId, Change>,
    overwritten: u64,
}

#[derive(Debug)]
struct Change {
    at: Instant,
    generation: u64,
    attributes: BTreeMap<AttributeType, Attribute>,
}

#[derive(Debug)]
struct Attribute {
    ours: Trace,
    earlier: VecDeque<Trace>,
}

/// Changes of ours that are not there any more.
#[derive(Debug, Default)]
pub(super) struct Overwritten {
    /// Attributes that have an earlier value.
    pub values: Vec<AttributeType>,
    /// Those that were removed and are there again. SoftHSM can have added them too: it gives an object that it changes what the class has.
    pub removals: Vec<AttributeType>,
}

impl Changes {
    /// Remembers that a version of `generation` was written: `old` has become `new`. Called while the object is still
    /// locked.
    pub fn remember(&mut self, id: &ObjectId, generation: u64, old: &Attributes, new: &Attributes) {
        if self.objects.len() >= OBJECTS
            && !self.objects.contains_key(id)
            && let Some(oldest) = self
                .objects
                .iter()
                .min_by_key(|(_, change)| change.at)
                .map(|(id, _)| id.clone())
        {
            self.objects.remove(&oldest);
        }
        let change = self.objects.entry(id.clone()).or_insert_with(|| Change {
            at: Instant::now(),
            generation,
            attributes: BTreeMap::new(),
        });
        change.at = Instant::now();
        change.generation = generation;
        let types = old
            .iter()
            .chain(new.iter())
            .map(|(key, _)| key.attribute_type);
        for attribute_type in types {
            let (before, after) = (trace(old, attribute_type), trace(new, attribute_type));
            if before == after {
                continue;
            }
            let attribute = change
                .attributes
                .entry(attribute_type)
                .or_insert_with(|| Attribute {
                    ours: after,
                    earlier: VecDeque::new(),
                });
            attribute.ours = after;
            if !attribute.earlier.contains(&before) {
                if attribute.earlier.len() >= EARLIER {
                    attribute.earlier.pop_front();
                }
                attribute.earlier.push_back(before);
            }
        }
    }

    /// Whether anything is remembered of an object.
    pub fn has(&self, id: &ObjectId) -> bool {
        let change = self.objects.get(id);
        change.is_some_and(|change| change.at.elapsed() <= KEPT)
    }

    /// Of which objects something is remembered.
    pub fn objects(&self) -> Vec<ObjectId> {
        self.objects.keys().cloned().collect()
    }

    /// Forgets an object that is gone.
    pub fn forget(&mut self, id: &ObjectId) {
        self.objects.remove(id);
    }

    /// Which of our changes a version lacks that somebody wrote on top of ours. Each is named once.
    pub fn overwritten(
        &mut self,
        id: &ObjectId,
        generation: u64,
        attributes: &Attributes,
    ) -> Overwritten {
        let mut lost = Overwritten::default();
        let Some(change) = self.objects.get_mut(id) else {
            return lost;
        };
        // A version before ours, or ours: it may have been read by somebody who says so only now.
        let later = generation.wrapping_sub(change.generation);
        if later == 0 || later > u64::MAX / 2 {
            return lost;
        }
        change.attributes.retain(|attribute_type, attribute| {
            let present = trace(attributes, *attribute_type);
            if present == attribute.ours {
                return true;
            }
            if attribute.earlier.contains(&present) {
                match attribute.ours {
                    Some(_) => lost.values.push(*attribute_type),
                    None => lost.removals.push(*attribute_type),
                }
            }
            false
        });
        if change.attributes.is_empty() || change.at.elapsed() > KEPT {
            self.objects.remove(id);
        }
        self.overwritten += (lost.values.len() + lost.removals.len()) as u64;
        lost
    }

    /// How many changes were overwritten.
    pub fn count(&self) -> u64 {
        self.overwritten
    }
}

/// The hash of the value that an object has of a type.
pub(super) fn trace(attributes: &Attributes, attribute_type: AttributeType) -> Trace {
    attributes.of_type(attribute_type).map(digest)
}

/// What an attribute is called in a message.
pub(super) fn name_of(attribute_type: AttributeType) -> String {
    crate::pkcs11::attribute_name(attribute_type)
        .map_or_else(|| format!("{attribute_type:#010x}"), str::to_owned)
}
