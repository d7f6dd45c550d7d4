//! Giving an object another name: one `rename(2)`, so that at every moment it is there once.
//!
//! What a crash leaves is the file of `<from>.tokenfs-new`, which is empty and says that SoftHSM has to be told, and lock files without
//! an object. The locks of both names are taken, in the order of the names.

use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::renameat;
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno as Refusal;

use super::FileToken;
use super::attire::access_of;
use super::generation::Generation;
use super::guard::{Temporary, Transaction, exists, stat_regular, unlink_if_there};
use super::make::already;
use super::names::{Names, TOKEN_STEM};
use super::read::{Reading, is_named};
use crate::error::{Error, Result};
use crate::store::crash::point;
use crate::store::{ObjectId, ObjectName, Patience};

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
        let lock_of_target = target.lock().unwrap_or(Path::new(""));
        let take_target =
            || Transaction::take(directory, lock_of_target, access_of(&stat), patience);
        // At rest, and with what a crash left of an earlier write put right: that goes by its name.
        let (reading, transaction) = if from < to {
            let reading = self.read_for_writing(&names, patience)?;
            (reading, take_target()?)
        } else {
            let transaction = take_target()?;
            match self.read_for_writing(&names, patience) {
                Ok(reading) => (reading, transaction),
                Err(error) => {
                    self.leave(&target, transaction);
                    return Err(error);
                }
            }
        };
        if let Err(error) = self.give_name_locked(&names, &target, &reading, patience) {
            self.leave(&target, transaction);
            return Err(error);
        }
        let mut changes = self.changes();
        for id in [from_id, to_id] {
            changes.forget(id);
        }
        drop(changes);
        let mut cache = self.cache();
        for id in [from_id, to_id] {
            cache.remove(id);
        }
        Ok(())
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
    ) -> Result<()> {
        let directory = self.directory();
        let building = self.is_building();
        self.clear_temporary(target, patience)?;
        // Of an object that is gone.
        unlink_if_there(directory, target.journal())?;
        let trace = if building {
            None
        } else {
            // Whatever would keep SoftHSM from being told is met before there is anything to tell.
            Generation::open(directory)?;
            // SoftHSM can have made names that leave no room for it.
            let trace = names.fit().then(|| Temporary::new(directory, names.next()));
            trace.transpose()?
        };
        point("file.rename.marked");
        if !is_named(directory, names.object(), &reading.stat)? {
            return Err(gone());
        }
        rename(self, names, target)?;
        point("file.rename.renamed");
        // A sync that has the old name in mind does not find it.
        if !building {
            self.unsynced(target.object());
        }
        if !building && let Err(error) = self.raise_generation(patience) {
            // SoftHSM believes in the old name.
            let _ = rename(self, target, names);
            return Err(error);
        }
        point("file.rename.told");
        drop(trace);
        point("file.rename.unmarked");
        if let Some(lock) = names.lock()
            && let Err(error) = unlink_if_there(directory, lock)
        {
            // It has its new name all the same; a recovery removes what is left of the old one.
            self.diagnostics.error(&error.at(self.path.join(lock)));
        }
        point("file.rename.done");
        Ok(())
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
    match renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Where the file system cannot look and rename in one step, the lock has to do: whoever makes an object of a given name
        // holds it, and SoftHSM gives its own names nobody has.
        Err(Refusal::INVAL | Refusal::NOSYS | Refusal::OPNOTSUPP) => {
            if exists(directory, to) {
                return Err(already());
            }
            renameat(directory, from, directory, to).map_err(failed)
        }
        Err(errno) => Err(failed(Errno::from_raw(errno.raw_os_error()))),
    }
}

fn gone() -> Error {
    Error::not_found("SoftHSM has destroyed it meanwhile")
}
