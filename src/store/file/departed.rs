//! Objects that lost their name here, and that a SoftHSM brought back.
//!
//! SoftHSM looks for an object before it takes its lock, and its store makes the file where there is none. One that had a change in
//! hand when the object was renamed or removed, and that is only now given the time to write it, makes it anew, with all that it
//! holds, as it does to a SoftHSM in another process that destroys it. That cannot be prevented from outside. Of a renamed object it
//! is put in the place of what has the new name; of a removed one it is said.
//!
//! Others can give a file that name too: who has a backup, or another mount. So it is taken for SoftHSM's only if it is what SoftHSM
//! would make of the version that was there; and a name that is given here is off the list before anybody can see it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};

use super::FileToken;
use super::decode::{Decoded, decode};
use super::guard::exists;
use super::names::Names;
use super::noticed::{Trace, trace};
use super::read::{Version, open_regular, read_all};
use super::token::QUICK;
use crate::error::{ErrorKind, Result};
use crate::store::attribute::AttributeType;
use crate::store::{ObjectId, ObjectName, Patience};

/// How many are remembered.
const OBJECTS: usize = 4096;

/// For how long. Whoever takes longer than this over a change is not noticed.
const KEPT: Duration = Duration::from_secs(60);

/// The generation that SoftHSM gives a file that it makes: the one after that of an empty one.
const ANEW: u64 = 1;

/// How soon SoftHSM makes the file of an object for whose lock it has waited.
pub(super) const AT_ONCE: Duration = Duration::from_millis(10);

/// The least time between two changes of an object by SoftHSM, each of which writes a file anew.
const BETWEEN: Duration = Duration::from_micros(50);

/// How far the times of files are behind the clock.
const TICK: Duration = Duration::from_millis(20);

/// Names that objects had.
#[derive(Debug, Default)]
pub(super) struct Departures {
    known: HashMap<ObjectName, Departed>,
    /// Those whose renames have not returned: whoever waits for one puts nothing there.
    awaited: HashSet<ObjectName>,
}

/// What became of an object.
#[derive(Clone, Debug)]
pub(super) struct Departed {
    at: Instant,
    /// Its last version; nothing if that is not known.
    last: Option<Fingerprint>,
    /// Its new name, and the file that had that then; nothing if it was removed.
    became: Option<(ObjectName, FileStat)>,
    /// Whether the name was there again before anybody can have put a backup there: whoever took it away had not been told that it is
    /// gone, or it had just come back and gone once more.
    is_early: bool,
}

/// What is remembered of a version, by which another is known for one that followed it. No value of a key is in it.
#[derive(Clone, Debug)]
pub(super) struct Fingerprint {
    generation: u64,
    values: BTreeMap<AttributeType, Trace>,
}

impl Fingerprint {
    /// Of a version that is not damaged.
    pub fn of_version(version: &Version) -> Option<Self> {
        version.content.as_ref().ok().and_then(Self::of)
    }

    fn of(decoded: &Decoded) -> Option<Self> {
        let attributes = &decoded.attributes;
        let values = attributes.iter().map(|(key, _)| {
            let attribute_type = key.attribute_type;
            (attribute_type, trace(attributes, attribute_type))
        });
        Some(Self {
            generation: decoded.generation?,
            values: values.collect(),
        })
    }

    /// What is not the same in another version; nothing if something is missing there.
    fn changed(&self, other: &Self) -> Option<usize> {
        let mut changed = 0;
        for (attribute_type, value) in &self.values {
            if other.values.get(attribute_type)? != value {
                changed += 1;
            }
        }
        Some(changed)
    }
}

impl Departed {
    /// Whether a file is what a SoftHSM makes that had a change of the last version in hand: written since, the first generation of a
    /// file, with everything that there was, and most of it as it was. A backup that is put back has other generations or an older
    /// time, and what another mount makes of a copy has no change. Where it can be no backup, SoftHSM can have changed it again
    /// since.
    pub fn is_resumed_by(&self, version: &Version) -> bool {
        let Some((last, new)) = self.last.as_ref().zip(Fingerprint::of_version(version)) else {
            return false;
        };
        // One in the future says nothing.
        let age = SystemTime::now().duration_since(version.metadata.mtime);
        let written_since = age.is_ok_and(|age| age <= self.at.elapsed() + TICK);
        let is_changed = last
            .changed(&new)
            .is_some_and(|changed| (1..=last.values.len() / 2).contains(&changed));
        let latest = if self.is_early {
            ANEW + (self.at.elapsed().as_nanos() / BETWEEN.as_nanos()) as u64
        } else {
            ANEW
        };
        written_since && (ANEW..=latest).contains(&new.generation) && is_changed
    }
}

impl FileToken {
    /// What is remembered of the version in an object's file, whose lock is held; nothing if it is damaged, or so long that whoever
    /// removes it would have to wait.
    pub(super) fn fingerprint(&self, names: &Names) -> Option<Fingerprint> {
        let mut file = open_regular(self.directory(), names.object(), OFlag::O_RDONLY).ok()?;
        let stat = fstat(&file).ok().filter(|stat| stat.st_size <= QUICK)?;
        let bytes = read_all(&mut file, &stat).ok()?;
        Fingerprint::of(&decode(&bytes).ok()?)
    }

    /// Remembers that an object has lost its name, and whether it had come back before that. The lock of that is still held, and has its own name, so that nobody can have made
    /// another one of it.
    pub(super) fn depart(
        &self,
        name: &ObjectName,
        last: Option<Fingerprint>,
        became: Option<(ObjectName, FileStat)>,
        came_back: bool,
    ) {
        if self.is_building() {
            return;
        }
        let known = &mut self.departures().known;
        if known.len() >= OBJECTS {
            known.retain(|_, departed| departed.at.elapsed() < KEPT);
        }
        if known.len() < OBJECTS {
            let at = Instant::now();
            known.insert(
                name.clone(),
                Departed {
                    at,
                    last,
                    became,
                    is_early: came_back,
                },
            );
        }
    }

    /// Since when what has that name, if anything has, may have come back.
    pub(super) fn departed_at(&self, name: &ObjectName) -> Option<Instant> {
        let departures = self.departures();
        departures.known.get(name).map(|departed| departed.at)
    }

    /// A name is about to be given here: what has it from now on has not come back.
    pub(super) fn arrive(&self, name: &ObjectName) -> Option<Departed> {
        self.departures().known.remove(name)
    }

    /// It was not given after all.
    pub(super) fn arrive_not(&self, name: &ObjectName, departed: Option<Departed>) {
        if let Some(departed) = departed {
            let known = &mut self.departures().known;
            known.entry(name.clone()).or_insert(departed);
        }
    }

    /// Whether somebody waits for the end of a rename that takes this name away.
    pub(super) fn set_awaited(&self, name: &ObjectName, is_awaited: bool) {
        let awaited = &mut self.departures().awaited;
        if is_awaited {
            awaited.insert(name.clone());
        } else {
            awaited.remove(name);
        }
    }

    /// See [`crate::store::Token::look_after`].
    pub(super) fn look_after_departed(&self, name: &ObjectName, patience: Patience) -> Result<()> {
        // In this order: what is seen of an object that is made here is seen after its name has come off the list.
        let Some(seen) = self.departures().known.get(name).map(|known| known.at) else {
            return Ok(());
        };
        let names = self.names(&ObjectId::Object(name.clone()));
        if seen.elapsed() > KEPT || !exists(self.directory(), names.object()) {
            return Ok(());
        }
        self.check_writable(patience)?;
        let departed = {
            let mut departures = self.departures();
            // It was there before this, and so before the rename returns.
            let is_awaited = departures.awaited.contains(name);
            match departures.known.get(name) {
                Some(departed) if departed.at == seen => departures.known.remove(name),
                _ => None,
            }
            .map(|departed| Departed {
                is_early: is_awaited || departed.is_early && seen.elapsed() < AT_ONCE,
                ..departed
            })
        };
        let Some(departed) = departed else {
            return Ok(());
        };
        if let Some((to, base)) = &departed.became {
            let target = self.names(&ObjectId::Object(to.clone()));
            if exists(self.directory(), target.object()) {
                self.carry_over_or_say(name, &departed, (to, base), patience);
                return Ok(());
            }
        }
        let done = self.say_back(name, &departed, patience);
        if done.is_err() {
            self.arrive_not(name, Some(departed));
        }
        done
    }

    /// Says that what was removed is there. What becomes of it is for whoever knows where it has come from.
    fn say_back(&self, name: &ObjectName, departed: &Departed, patience: Patience) -> Result<()> {
        let id = ObjectId::Object(name.clone());
        let reading = match self.read(&id, patience) {
            Ok(reading) => reading,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let said = if departed.is_resumed_by(&reading.version) {
            "is back after it was removed, with a change, as a SoftHSM brings it back that was changing it"
        } else {
            "is there again after it was removed, and was not made through this mount"
        };
        let path = self.path_of(&id);
        self.diagnostics.warning(format!(
            "{}: {said}; its directory shows what it has",
            path.display()
        ));
        Ok(())
    }
}
