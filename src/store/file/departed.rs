//! Objects that lost their name here, and that a SoftHSM brought back.
//!
//! SoftHSM looks for an object before it takes its lock, and its store makes the file where there is none. One that had a change in
//! hand when the object was renamed or removed, and that is only now given the time to write it, makes it anew, with all that it
//! holds, as it does to a SoftHSM in another process that destroys it. That cannot be prevented from outside. Of a renamed object it
//! is put in the place of what has the new name; of a removed one it is said.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::sys::stat::FileStat;

use super::FileToken;
use super::guard::{exists, stat_regular};
use crate::error::Result;
use crate::store::{ObjectId, ObjectName, Patience};

/// How many are remembered.
const OBJECTS: usize = 4096;

/// For how long. Whoever takes longer than this over a change is not noticed.
const KEPT: Duration = Duration::from_secs(60);

/// Names that objects had.
pub(super) type Departures = HashMap<ObjectName, Departed>;

/// What became of an object.
#[derive(Clone, Debug)]
pub(super) struct Departed {
    at: Instant,
    /// Its new name, and the file that had that then; nothing if it was removed.
    became: Option<(ObjectName, FileStat)>,
}

impl FileToken {
    /// Remembers that an object has lost its name.
    pub(super) fn depart(&self, name: &ObjectName, became: Option<(ObjectName, FileStat)>) {
        if self.is_building() {
            return;
        }
        let mut departures = self.departures();
        if departures.len() >= OBJECTS {
            departures.retain(|_, departed| departed.at.elapsed() < KEPT);
        }
        if departures.len() < OBJECTS {
            let at = Instant::now();
            departures.insert(name.clone(), Departed { at, became });
        }
    }

    /// See [`crate::store::Token::look_after`].
    pub(super) fn look_after_departed(&self, name: &ObjectName, patience: Patience) -> Result<()> {
        let Some(departed) = self.departures().get(name).cloned() else {
            return Ok(());
        };
        let names = self.names(&ObjectId::Object(name.clone()));
        if departed.at.elapsed() > KEPT || !exists(self.directory(), names.object()) {
            return Ok(());
        }
        self.check_writable(patience)?;
        self.departures().remove(name);
        let path = self.path.join(names.object());
        let Some((to, base)) = departed.became else {
            self.diagnostics.warning(format!(
                "{}: a SoftHSM that was changing this object has made it anew after it was removed; remove it again",
                path.display()
            ));
            return Ok(());
        };
        let target = self.names(&ObjectId::Object(to.clone()));
        if self.carry_over_or_say(name, &to, &base, patience)
            && let Ok(base) = stat_regular(self.directory(), target.object())
        {
            self.depart(name, Some((to, base)));
        }
        Ok(())
    }
}
