//! Objects that SoftHSM is still making.
//!
//! It stores a newborn object some thirty times with the lock of `.object` alone, and opens the file before it waits for the
//! lock. Whoever exchanges the file in between loses one of these. Nothing on disk says that an object is finished, but its
//! file's age does: making one takes some milliseconds. A file that this process made is SoftHSM's newborn at no age.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, StatxFlags, statx};

/// The age from which on an object counts as finished.
pub(super) const GROWN: Duration = Duration::from_millis(500);

/// How many files of our own are remembered. All that matters is which were made less than [`GROWN`] ago.
const CAPACITY: usize = 4096;

/// Which file it is: device, inode, and when it was made, since inode numbers are used again.
type Birth = (u32, u32, u64, i64, u32);

/// The files that this process made.
#[derive(Debug, Default)]
pub(super) struct Ours(Mutex<(HashSet<Birth>, VecDeque<Birth>)>);

impl Ours {
    /// Remembers a file that this process made.
    pub fn remember(&self, file: &File) {
        let Some((birth, _)) = birth(file) else {
            return;
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (set, order) = &mut *known;
        if set.insert(birth) {
            order.push_back(birth);
        }
        if order.len() > CAPACITY
            && let Some(oldest) = order.pop_front()
        {
            set.remove(&oldest);
        }
    }

    /// How long it takes until a file cannot be one that SoftHSM is still making; nothing if it cannot now. Where the file
    /// system does not say when a file was made, there is nothing to wait for. SoftHSM makes an object and its lock file at the same time: one
    /// whose `lock` is older was there before, and somebody else has given it another file.
    pub fn until_grown(&self, file: &File, lock: Option<&File>) -> Option<Duration> {
        let (birth, made) = birth(file)?;
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.0.contains(&birth) {
            return None;
        }
        drop(known);
        let left = until(made)?;
        match lock.and_then(self::birth) {
            Some((_, made)) => until(made).map(|_| left),
            None => Some(left),
        }
    }
}

/// How long it takes until what was made then has grown; nothing if it has. What is made in the future says nothing.
fn until(made: SystemTime) -> Option<Duration> {
    let age = SystemTime::now().duration_since(made).ok()?;
    GROWN.checked_sub(age).filter(|left| !left.is_zero())
}

fn birth(file: &File) -> Option<(Birth, SystemTime)> {
    let wanted = StatxFlags::BTIME | StatxFlags::INO;
    let found = statx(file, "", AtFlags::EMPTY_PATH, wanted).ok()?;
    if found.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return None;
    }
    let (seconds, nanoseconds) = (found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
    let made = UNIX_EPOCH.checked_add(Duration::new(u64::try_from(seconds).ok()?, nanoseconds))?;
    let birth = (
        found.stx_dev_major,
        found.stx_dev_minor,
        found.stx_ino,
        seconds,
        nanoseconds,
    );
    Some((birth, made))
}
