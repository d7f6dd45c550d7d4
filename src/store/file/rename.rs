//! Giving an object another name: one `rename(2)`, so that at every moment it is there once.
//!
//! What a crash leaves is the file of `<from>.tokenfs-new`, which is empty and says that SoftHSM has to be told, and lock files without
//! an object. The locks of both names are taken, in the order of the names.
//!
//! SoftHSM looks for an object before it takes its lock, and its store makes the file where there is none: one that waits for us with
//! a change in hand brings the old name back, with all that the object holds. That is looked for, and put in its place.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};
use rustix::fs::{RenameFlags, renameat_with};

use super::FileToken;
use super::attire::{access_of, copy, narrowed, set_access_if_possible, set_mtime};
use super::change::following;
use super::departed::{AT_ONCE, Departed, Fingerprint};
use super::generation::{Generation, microseconds};
use super::guard::{Temporary, Transaction, exists, stat_regular, sync, unlink_if_there};
use super::make::already;
use super::names::{Names, TOKEN_STEM};
use super::read::{Reading, is_named, open_regular};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::rename::rename_to_free;
use crate::store::{ObjectId, ObjectName, Patience};

/// How often it is looked, for [`AT_ONCE`], whether a SoftHSM has stored an object under its old name.
const PAUSE: Duration = Duration::from_millis(2);

/// For how long at most: one that changes the object without a pause waits for us again while we put in place what it has stored.
const LONGEST: Duration = Duration::from_secs(1);

impl FileToken {
    pub(super) fn give_name(
        &self,
        from: &ObjectName,
        to: &ObjectName,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        if from.as_os_str() == TOKEN_STEM {
            return Err(Error::not_found("no object is called that"));
        }
        let target = Names::of_new(to)?;
        let ids = [from, to].map(|name| ObjectId::Object(name.clone()));
        let [from_id, to_id] = &ids;
        let names = self.names(from_id);
        let directory = self.directory();
        let stat = stat_regular(directory, names.object())?;
        if from == to {
            return Ok(());
        }
        if exists(directory, target.object()) {
            return Err(already());
        }
        let order = (from < to, &stat);
        let (reading, transaction) = self.lock_both(&names, &target, order, None, patience)?;
        if transaction.is_foreign_to(&reading.stat) {
            self.leave(&target, transaction);
            return Err(Error::new(
                ErrorKind::NotPermitted,
                "its lock file would not belong to whoever the object belongs to, and SoftHSM could not change it any more",
            ));
        }
        let departed = self.arrive(to);
        let stat = match self.give_name_locked(&names, &target, &reading, patience) {
            Ok(stat) => stat,
            Err(error) => {
                self.arrive_not(to, departed);
                self.leave(&target, transaction);
                return Err(error);
            }
        };
        let became = Some((to.clone(), stat));
        self.set_awaited(from, true);
        let last = Fingerprint::of_version(&reading.version);
        self.depart(from, last, became, false);
        if let Err(error) = self.drop_lock(&names) {
            // It has its new name all the same; a recovery removes what is left of the old one.
            self.diagnostics.error(&error);
        }
        point("file.rename.done");
        let mut changes = self.changes();
        for id in [from_id, to_id] {
            changes.forget(id);
        }
        drop(changes);
        let mut cache = self.cache();
        for id in [from_id, to_id] {
            cache.remove(id);
        }
        drop(cache);
        // Lets go of the locks, for whoever has waited for them.
        drop((reading, transaction));
        if !self.is_building() {
            self.look_for_returns(from, patience);
        }
        self.set_awaited(from, false);
        Ok(())
    }

    /// Puts what a SoftHSM that has waited for us stores under the old name where it belongs, and what it has waited with for that.
    /// That comes right after it gets the lock. The threads that hear of new files do the same meanwhile.
    fn look_for_returns(&self, from: &ObjectName, patience: Patience) {
        let id = ObjectId::Object(from.clone());
        let names = self.names(&id);
        let end = Instant::now() + LONGEST;
        let mut since = Instant::now();
        while since.elapsed() < AT_ONCE && Instant::now() < end {
            if let Some(departed) = self.departed_at(from) {
                since = since.max(departed);
                if exists(self.directory(), names.object())
                    && let Err(error) = self.look_after_departed(from, patience)
                {
                    self.diagnostics.error(&error.at(self.path_of(&id)));
                    return;
                }
            }
            thread::sleep(PAUSE);
        }
    }

    /// What SoftHSM has stored under the old name, put in the place of what has the new one, `base`; or, where that cannot be, a line in
    /// the diagnostics.
    pub(super) fn carry_over_or_say(
        &self,
        from: &ObjectName,
        departed: &Departed,
        (to, base): (&ObjectName, &FileStat),
        patience: Patience,
    ) {
        let [names, target] = [from, to].map(|name| self.names(&ObjectId::Object(name.clone())));
        let order = (from < to, base);
        let locked = self.lock_both(&names, &target, order, Some(departed), patience);
        let carried = locked.and_then(|(reading, transaction)| {
            let stat = match self.carry_over(&names, &target, &reading, (departed, base)) {
                Ok(stat) => stat,
                Err(error) => {
                    self.leave(&target, transaction);
                    return Err(error);
                }
            };
            // It may come once more.
            let became = Some((to.clone(), stat));
            let last = Fingerprint::of_version(&reading.version);
            self.depart(from, last, became, true);
            let told = self.raise_generation(patience);
            self.drop_lock(&names).and(told)
        });
        let Err(error) = carried else {
            return;
        };
        if !exists(self.directory(), names.object()) {
            // Somebody was faster, or there is one and SoftHSM was not told.
            if error.kind() != ErrorKind::NotFound {
                self.diagnostics
                    .error(&error.at(self.path.join(target.object())));
            }
            return;
        }
        let path = self.path.join(names.object());
        self.diagnostics.warning(format!(
            "{}: this object got the name \"{to}\", and now there are both: {error}",
            path.display()
        ));
    }

    /// The object, at rest and with what a crash left of an earlier write put right, since that goes by its name; and the lock of
    /// its other name.
    fn lock_both(
        &self,
        names: &Names,
        target: &Names,
        (in_order, stat): (bool, &FileStat),
        departed: Option<&Departed>,
        patience: Patience,
    ) -> Result<(Reading, Transaction)> {
        let lock = target.lock().unwrap_or(Path::new(""));
        let take = || Transaction::take(self.directory(), lock, access_of(stat), patience);
        if in_order {
            let reading = self.read_known_for_writing(names, departed, patience)?;
            return Ok((reading, take()?));
        }
        let transaction = take()?;
        match self.read_known_for_writing(names, departed, patience) {
            Ok(reading) => Ok((reading, transaction)),
            Err(error) => {
                self.leave(target, transaction);
                Err(error)
            }
        }
    }

    /// Puts what SoftHSM has stored under the old name meanwhile in the place of what has the new one, `base`. A SoftHSM that
    /// looked for the object before it lost its name and then waited for a lock of ours makes the file anew. The locks of both are
    /// held.
    ///
    /// # Errors
    /// If there are two objects now.
    fn carry_over(
        &self,
        names: &Names,
        target: &Names,
        reading: &Reading,
        (departed, base): (&Departed, &FileStat),
    ) -> Result<FileStat> {
        let directory = self.directory();
        reading.version.content.as_ref().map_err(Clone::clone)?;
        if !departed.is_resumed_by(&reading.version) {
            return Err(Error::new(
                ErrorKind::Busy,
                "it cannot be told from another one that was put there: a SoftHSM that has changed it more than once since, or somebody else; compare them, and remove the wrong one",
            ));
        }
        let present = stat_regular(directory, target.object())?;
        let version = |stat: &FileStat| {
            let time = (stat.st_mtime, stat.st_mtime_nsec);
            (stat.st_dev, stat.st_ino, stat.st_size, time)
        };
        if version(&present) != version(base) {
            return Err(Error::new(
                ErrorKind::Busy,
                "somebody has changed the other one since",
            ));
        }
        let other = open_regular(directory, target.object(), OFlag::O_RDONLY)?;
        if !copy(&other, &present, &reading.file) {
            set_access_if_possible(&reading.file, narrowed(&other, &present));
        }
        // As young as it is, SoftHSM is not making it.
        self.born.remember(&reading.file);
        Generation::open(directory)?;
        let stat = renew_generation(reading)?;
        // SoftHSM has not, and what is to be unlinked is on disk.
        sync(&reading.file)?;
        // Not if the other one was destroyed.
        renameat_with(
            directory,
            names.object(),
            directory,
            target.object(),
            RenameFlags::EXCHANGE,
        )
        .map_err(|errno| Error::system("exchange", Errno::from_raw(errno.raw_os_error())))?;
        unlink_if_there(directory, names.object())?;
        self.unsynced(target.object());
        Ok(stat)
    }

    /// Removes the lock file of a name that no object has any more.
    fn drop_lock(&self, names: &Names) -> Result<()> {
        let Some(lock) = names.lock() else {
            return Ok(());
        };
        unlink_if_there(self.directory(), lock)
            .map(drop)
            .map_err(|error| error.at(self.path.join(lock)))
    }

    /// Takes back the lock file that was made for a name that stays free.
    fn leave(&self, names: &Names, transaction: Transaction) {
        if !exists(self.directory(), names.object())
            && let Some(lock) = names.lock()
        {
            transaction.give_up(self.directory(), lock);
        }
    }

    fn give_name_locked(
        &self,
        names: &Names,
        target: &Names,
        reading: &Reading,
        patience: Patience,
    ) -> Result<FileStat> {
        let directory = self.directory();
        let building = self.is_building();
        self.clear_temporary(target, patience)?;
        // Of an object that is gone.
        unlink_if_there(directory, target.journal())?;
        let trace = if building {
            None
        } else {
            // SoftHSM can have made names that leave no room for it.
            let trace = names.fit().then(|| Temporary::new(directory, names.next()));
            trace.transpose()?
        };
        point("file.rename.marked");
        if !is_named(directory, names.object(), &reading.stat)? {
            return Err(gone());
        }
        let stat = if building {
            reading.stat
        } else {
            renew_generation(reading)?
        };
        let generation = self.lock_generation(patience)?;
        rename(self, names, target)?;
        point("file.rename.renamed");
        // A sync that has the old name in mind does not find it.
        if !building {
            self.unsynced(target.object());
        }
        if let Err(error) = self.tell(generation, patience) {
            // SoftHSM believes in the old name.
            match rename(self, target, names) {
                Ok(()) => return Err(error),
                Err(kept) => self.say_untold(target, &error, &kept),
            }
        }
        point("file.rename.told");
        drop(trace);
        point("file.rename.unmarked");
        Ok(stat)
    }
}

/// Gives an object a generation that none can have had under the name that it is about to get: a SoftHSM that knows another one by that
/// name would take it for this, and write that over it one day. It is locked exclusively; one write of eight bytes is whole for everybody.
/// Says what `stat` does afterwards.
fn renew_generation(reading: &Reading) -> Result<FileStat> {
    let stat = || fstat(&reading.file).map_err(|errno| Error::system("stat", errno));
    let content = reading.version.content.as_ref();
    let Some(present) = content.map_or(None, |decoded| decoded.generation) else {
        return stat();
    };
    let next = following(Some(present.max(microseconds())));
    reading
        .file
        .write_all_at(&next.to_be_bytes(), 0)
        .map_err(|error| Error::io("write", &error))?;
    point("file.rename.renewed");
    // Nobody has changed it.
    match set_mtime(&reading.file, Some(reading.version.metadata.mtime)) {
        // Who may write a file and does not own it cannot choose its time.
        Err(error) if error.kind() != ErrorKind::NotPermitted => Err(error),
        _ => stat(),
    }
}

/// Gives an object the name of another one that does not exist. The locks of both are held.
fn rename(token: &FileToken, from: &Names, to: &Names) -> Result<()> {
    let directory = token.directory();
    let failed = |errno| match errno {
        Errno::EEXIST => already(),
        Errno::ENOENT => gone(),
        errno => Error::system("rename", errno),
    };
    let (from, to) = (from.object(), to.object());
    rename_to_free(directory, from, to).map_err(failed)
}

fn gone() -> Error {
    Error::not_found("SoftHSM has destroyed it meanwhile")
}
