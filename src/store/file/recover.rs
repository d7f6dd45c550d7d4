//! Putting right what a crash left in a token.
//!
//! What has a lock that is free was left by a crash: whoever makes it holds that lock. Nothing here is needed to see a whole
//! object, so what cannot be put right now is left for later.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};

use super::FileToken;
use super::attire::access_of;
use super::guard::{Transaction, exists, stat_regular, unlink_if_there};
use super::names::{Names, TOKEN_STEM};
use super::own::{self, Own};
use super::read::{is_named, open_regular};
use super::{LOCK_SUFFIX, OBJECT_SUFFIX};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::leftover::{JOURNAL_SUFFIX, NEW_SUFFIX};
use crate::store::{ObjectId, ObjectName, Patience, lock};

/// How long a lock file has to be without its object. A SoftHSM that destroys an object deletes `.object` first and `.lock` right
/// after that, and says that it failed if somebody else has.
const LONELY: Duration = Duration::from_millis(20);

/// What is in a token's directory, as far as it can have been left by a crash.
#[derive(Debug, Default)]
struct Leftovers {
    /// The stems of the files that only a write makes.
    written: Vec<OsString>,
    /// The stems of the lock files that have no object.
    lonely: Vec<OsString>,
}

impl FileToken {
    /// Puts right what a crash left of writes in this token. What somebody is still using is left alone; whatever fails is said
    /// in the diagnostics.
    pub fn recover(&self) {
        if self.options.read_only || self.is_building() {
            return;
        }
        let left = match self.leftovers() {
            Ok(left) => left,
            Err(error) => return self.diagnostics.error(&error.at(&self.path)),
        };
        let said = |stem: &OsStr, recovered: Result<()>| match recovered {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Busy) => {}
            Err(error) => self.diagnostics.error(&error.at(self.path.join(stem))),
        };
        for stem in &left.written {
            let recovered = if *stem == TOKEN_STEM {
                self.recover_token()
            } else if let Some(name) = ObjectName::new(stem) {
                self.recover_object(&ObjectId::Object(name))
            } else {
                Ok(())
            };
            said(stem, recovered);
        }
        if !left.lonely.is_empty() {
            std::thread::sleep(LONELY);
        }
        for stem in &left.lonely {
            if let Some(name) = ObjectName::new(stem) {
                said(stem, self.remove_lonely_lock(&ObjectId::Object(name)));
            }
        }
    }

    fn leftovers(&self) -> Result<Leftovers> {
        let failed = |errno| Error::system("read the directory", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory =
            Dir::openat(self.directory(), ".", flags, Mode::empty()).map_err(failed)?;
        let mut written = BTreeSet::new();
        let (mut locks, mut objects) = (BTreeSet::new(), BTreeSet::new());
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            let file = entry.file_name().to_bytes();
            for suffix in [NEW_SUFFIX, JOURNAL_SUFFIX, LOCK_SUFFIX, OBJECT_SUFFIX] {
                if let Some(stem) = file.strip_suffix(suffix.as_bytes())
                    && !stem.is_empty()
                {
                    let stems = match suffix {
                        LOCK_SUFFIX => &mut locks,
                        OBJECT_SUFFIX => &mut objects,
                        _ => &mut written,
                    };
                    stems.insert(OsStr::from_bytes(stem).to_os_string());
                }
            }
        }
        let lonely = locks
            .difference(&objects)
            // That of the token, and those that go with the rest of what a write left.
            .filter(|stem| *stem != TOKEN_STEM && !written.contains(*stem))
            .cloned()
            .collect();
        Ok(Leftovers {
            written: written.into_iter().collect(),
            lonely,
        })
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

    /// Removes a lock file that still has no object, and that nobody uses: the object was being made when a crash came, or removed.
    pub(super) fn remove_lonely_lock(&self, id: &ObjectId) -> Result<()> {
        let names = self.names(id);
        let Some(name) = names.lock() else {
            return Ok(());
        };
        let directory = self.directory();
        let file = match open_regular(directory, name, OFlag::O_RDWR) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        lock::lock_exclusive(&file, Patience::Now)?;
        let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
        let used = [names.object(), names.next(), names.journal()]
            .into_iter()
            .any(|name| exists(directory, name));
        // SoftHSM never writes into one: what is not empty is somebody else's.
        if used || stat.st_size != 0 || !is_named(directory, name, &stat)? {
            return Ok(());
        }
        if unlink_if_there(directory, name)? {
            point("file.recover.lock-removed");
            self.diagnostics.warning(format!(
                "{}: removed the lock file of an object that a crash had left half made or half removed",
                self.path.join(name).display()
            ));
        }
        Ok(())
    }

    fn recover_token(&self) -> Result<()> {
        let names = self.names(&ObjectId::Token);
        let directory = self.directory();
        if !exists(directory, names.object()) {
            return Ok(());
        }
        // Before anybody judges it.
        self.recover_journal(&names)?;
        if !exists(directory, names.next()) {
            return Ok(());
        }
        let patience = Patience::at_most(self.options.lock_wait);
        match own::mend(directory, names.next(), patience)? {
            Own::Whole => {}
            Own::Damaged => {
                return Err(Error::damaged(
                    "it is damaged, and so is what a crash has left of making or removing the token; bring it back from a backup",
                )
                .at(self.path.join(names.object())));
            }
            Own::Replaced => {
                self.diagnostics.warning(format!(
                    "{}: it was empty or damaged; what a crash had left of making or removing the token has taken its place",
                    self.path.join(names.object()).display()
                ));
                return Ok(());
            }
        }
        if unlink_if_there(directory, names.next())? {
            point("file.recover.token-cleared");
            self.diagnostics.warning(format!(
                "{}: removed what a crash had left while the token was made or removed",
                self.path.join(names.next()).display()
            ));
        }
        Ok(())
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
