//! Putting right what a crash left in a token.
//!
//! What has a lock that is free was left by a crash: whoever makes it holds that lock. Nothing here is needed to see a whole
//! object, so what cannot be put right now is left for later.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::FileToken;
use super::attire::access_of;
use super::guard::{Transaction, exists, stat_regular, unlink_if_there};
use super::names::{Names, TOKEN_STEM};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::leftover::{JOURNAL_SUFFIX, NEW_SUFFIX};
use crate::store::{ObjectId, ObjectName, Patience};

impl FileToken {
    /// Puts right what a crash left of writes in this token. What somebody is still using is left alone; whatever fails is said
    /// in the diagnostics.
    pub fn recover(&self) {
        if self.options.read_only || self.is_building() {
            return;
        }
        let stems = match self.leftovers() {
            Ok(stems) => stems,
            Err(error) => return self.diagnostics.error(&error.at(&self.path)),
        };
        for stem in stems {
            let recovered = if stem == TOKEN_STEM {
                self.recover_token()
            } else if let Some(name) = ObjectName::new(&stem) {
                self.recover_object(&ObjectId::Object(name))
            } else {
                Ok(())
            };
            match recovered {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Busy) => {}
                Err(error) => self.diagnostics.error(&error.at(self.path.join(&stem))),
            }
        }
    }

    /// The stems of the files that only a write makes.
    fn leftovers(&self) -> Result<Vec<OsString>> {
        let failed = |errno| Error::system("read the directory", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory =
            Dir::openat(self.directory(), ".", flags, Mode::empty()).map_err(failed)?;
        let mut stems = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            let file = entry.file_name().to_bytes();
            let stem = [NEW_SUFFIX, JOURNAL_SUFFIX]
                .iter()
                .find_map(|suffix| file.strip_suffix(suffix.as_bytes()));
            if let Some(stem) = stem
                && !stem.is_empty()
            {
                stems.push(OsStr::from_bytes(stem).to_os_string());
            }
        }
        stems.sort_unstable();
        stems.dedup();
        Ok(stems)
    }

    fn recover_object(&self, id: &ObjectId) -> Result<()> {
        let names = self.names(id);
        let Some(lock) = names.lock() else {
            return Ok(());
        };
        let directory = self.directory();
        {
            let left = [names.object(), names.next(), names.journal()]
                .into_iter()
                .find_map(|name| stat_regular(directory, name).ok());
            let Some(left) = left else { return Ok(()) };
            let transaction = Transaction::take(directory, lock, access_of(&left), Patience::Now)?;
            self.clear_temporary(&names, Patience::at_most(self.options.lock_wait))?;
            if !exists(directory, names.object()) {
                // It was being made, or removed.
                self.drop_journal(&names)?;
                unlink_if_there(directory, lock)?;
                point("file.recover.unlocked");
                return Ok(());
            }
            drop(transaction);
        }
        self.recover_journal(&names)
    }

    fn recover_token(&self) -> Result<()> {
        let names = self.names(&ObjectId::Token);
        let directory = self.directory();
        if !exists(directory, names.object()) {
            return Ok(());
        }
        if unlink_if_there(directory, names.next())? {
            point("file.recover.token-cleared");
            self.diagnostics.warning(format!(
                "{}: removed what a crash had left while the token was made or removed",
                self.path.join(names.next()).display()
            ));
        }
        self.recover_journal(&names)
    }

    fn recover_journal(&self, names: &Names) -> Result<()> {
        if exists(self.directory(), names.journal()) {
            self.read_for_writing(names, Patience::at_most(self.options.lock_wait))?;
        }
        Ok(())
    }

    fn drop_journal(&self, names: &Names) -> Result<()> {
        if unlink_if_there(self.directory(), names.journal())? {
            point("file.recover.journal-dropped");
            self.diagnostics.warning(format!(
                "{}: removed the journal of an object that is gone",
                self.path.join(names.journal()).display()
            ));
        }
        Ok(())
    }
}

/// Whether a file of this name is one that a token of the `file` backend can have without having any object: SoftHSM's, or what a
/// write leaves when it is cut short.
pub(crate) fn is_known(file: &OsStr) -> bool {
    let name = Path::new(file);
    let bytes = file.as_bytes();
    [super::TOKEN_OBJECT, super::TOKEN_LOCK, super::GENERATION]
        .iter()
        .any(|known| name == Path::new(known))
        || [super::LOCK_SUFFIX, NEW_SUFFIX, JOURNAL_SUFFIX]
            .iter()
            .any(|suffix| bytes.ends_with(suffix.as_bytes()) && bytes.len() > suffix.len())
}
