//! Keeping everybody from changing a token ([`crate::store::Token::hold`]).
//!
//! Of each object the lock that its writers take first: `.lock`, or `.object` where there is none. Then `generation`, which a
//! SoftHSM raises when it has made the file of an object, and before it makes the next one; so that from then on each of its threads
//! makes one file at most, and removes one. What has come before is locked then.
//!
//! Lock order: as in SoftHSM and in our own writers. Objects in the order of their names, as a renaming has it; `generation` last.
//! What has come meanwhile is locked out of that order, and so is not waited for long by whoever calls this.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use super::read::open_regular;
use super::{FileToken, GENERATION};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Hold, ObjectId, Patience, Token, lock};

/// How often the directory is listed anew. Where there is no `generation`, nothing keeps a SoftHSM from making objects.
const LISTINGS: usize = 100;

impl FileToken {
    pub(super) fn keep(&self, wait: Duration) -> Result<Hold> {
        let mut held: BTreeMap<ObjectId, File> = BTreeMap::new();
        self.keep_new(&mut held, wait, true)?;
        let generation = self.lock_file(Path::new(GENERATION), wait)?;
        for _ in 0..LISTINGS {
            // Whoever removes an object removes its lock file: a lock on a file without a name keeps nobody out.
            held.retain(|_, file| fstat(&*file).is_ok_and(|stat| stat.st_nlink > 0));
            if !self.keep_new(&mut held, wait, false)? {
                return Ok(Hold(Box::new((held, generation))));
            }
        }
        let detail = "objects come and go";
        Err(Error::new(ErrorKind::Busy, detail).at(&self.path))
    }

    /// Locks what is not held yet, of those that have a lock file if `with_lock_file`; whether there was anything.
    fn keep_new(
        &self,
        held: &mut BTreeMap<ObjectId, File>,
        wait: Duration,
        with_lock_file: bool,
    ) -> Result<bool> {
        let mut any = false;
        let names = self.list(Patience::at_most(wait))?;
        let objects = names.iter().cloned().map(ObjectId::Object);
        for id in objects.chain([ObjectId::Token]) {
            if held.contains_key(&id) {
                continue;
            }
            let names = self.names(&id);
            let object = (!with_lock_file || names.lock().is_none()).then(|| names.object());
            for name in names.lock().into_iter().chain(object) {
                if let Some(file) = self.lock_file(name, wait)? {
                    held.insert(id, file);
                    any = true;
                    break;
                }
            }
        }
        Ok(any)
    }

    /// Locks a file as a reader does; nothing if it is gone, or is not for us to read.
    fn lock_file(&self, name: &Path, wait: Duration) -> Result<Option<File>> {
        let locked = open_regular(self.directory(), name, OFlag::O_RDONLY).and_then(|file| {
            lock::lock_shared(&file, Patience::at_most(wait))?;
            Ok(file)
        });
        match locked {
            Ok(file) => Ok(Some(file)),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::PermissionDenied
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.at(self.path.join(name))),
        }
    }
}
