//! Putting right what a crash left of tokens that were being made or removed, and of writes in them.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use nix::dir::Dir;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::lifecycle::restore;
use super::mark::{self, Content, clear, in_use, not_empty, open_directory, remove_file};
use super::{DATABASE, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::db::DbToken;
use crate::store::file::{FileToken, TOKEN_OBJECT};
use crate::store::leftover::{BUILDING, REMOVING};
use crate::store::sync::sync_directory;
use crate::store::{Patience, TokenName};

impl Store {
    /// Puts right what a crash left behind ([`crate::store::leftover`]), in every token; does nothing in a store that is read only.
    /// What is still in use by another process is left alone. Says what it did in the diagnostics.
    pub fn recover(&self) {
        match self.directories() {
            Ok(names) => {
                for name in names {
                    self.recover_token(&name);
                }
            }
            Err(error) => self.diagnostics.error(&error.at(&self.path)),
        }
    }

    /// The same in one directory.
    pub fn recover_token(&self, name: &TokenName) {
        if !self.options.read_only && !self.is_building(name) {
            self.recover_directory(name, true);
        }
    }

    /// Every name in the tokendir.
    fn directories(&self) -> Result<Vec<TokenName>> {
        let failed = |errno| Error::system("read the directory", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries =
            Dir::openat(self.directory()?, ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            let entry = entry.map_err(failed)?;
            names.extend(TokenName::new(OsStr::from_bytes(
                entry.file_name().to_bytes(),
            )));
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The same in one directory; if it `is_alone`, nobody in this process has opened anything yet.
    pub(super) fn recover_directory(&self, name: &TokenName, is_alone: bool) {
        // What is no directory, or may not be looked into, is none of ours.
        let Ok(tokendir) = self.directory() else {
            return;
        };
        let Ok(directory) = open_directory(tokendir, name) else {
            return;
        };
        let path = self.path.join(name.as_os_str());
        let recovered = if mark::is_staging(name.as_os_str()) {
            self.recover_staging(name, directory.as_fd(), is_alone)
        } else {
            self.recover_marks(name, directory.as_fd())
        };
        match recovered {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) if error.kind() == ErrorKind::Busy => return,
            Err(error) => return self.diagnostics.error(&error.at(path)),
        }
        let Ok(content) = Content::of(directory.as_fd()) else {
            return;
        };
        let has = |wanted: &str| content.names.iter().any(|name| name == wanted);
        if has(DATABASE)
            && let Err(error) = self.roll_back(name, &path, is_alone)
            && error.kind() != ErrorKind::Busy
        {
            self.diagnostics.error(&error);
        }
        if has(TOKEN_OBJECT) {
            let token = FileToken::open(
                tokendir,
                name.clone(),
                &path,
                self.options.clone(),
                Arc::clone(&self.diagnostics),
            );
            if let Ok(token) = token {
                token.recover();
            }
        }
    }

    /// Has SQLite roll back what a crashed writer left.
    fn roll_back(&self, name: &TokenName, path: &Path, is_alone: bool) -> Result<()> {
        // SQLite opens by path, which must lead to where we look.
        self.check_in_place()?;
        let (options, log) = (self.options.clone(), Arc::clone(&self.diagnostics));
        let patience = Patience::at_most(self.options.lock_wait);
        DbToken::open(name.clone(), path, options, log)?.roll_back(is_alone, patience)
    }

    /// Clears away a directory that has not got its name yet, or has lost it; whether there still is one.
    fn recover_staging(
        &self,
        name: &TokenName,
        directory: BorrowedFd<'_>,
        is_alone: bool,
    ) -> Result<bool> {
        let building = mark::find(directory, BUILDING)?;
        let removing = mark::find(directory, REMOVING)?;
        let none = building.is_none() && removing.is_none();
        let content = Content::of(directory)?;
        if content.has_token() || (none && content.has_object()) {
            return Err(Error::new(
                ErrorKind::NotEmpty,
                "this is how tokenfs calls what is no token yet or no longer, and there is one, or an object, in it",
            ));
        }
        if removing.is_some() && self.has_object(name, directory, &content)? {
            // A SoftHSM that had a session made an object before it could see that the token was gone.
            let original = mark::staged(name).ok_or_else(not_empty)?;
            mark::rename_directory(self.directory()?, name, &original)?;
            sync_directory(self.directory()?)?;
            point("store.recover.renamed");
            drop((building, removing));
            self.recover_directory(&original, is_alone);
            return Ok(false);
        }
        // Whoever made the directory a moment ago finds the mark, and begins anew.
        let made = if none {
            Some(mark::make(directory, BUILDING)?.ok_or_else(in_use)?)
        } else {
            None
        };
        let cleared = clear(self.directory()?, name, directory, false, || {
            point("store.recover.unlinked");
        });
        if let Err(error) = cleared {
            if made.is_some() {
                let _ = remove_file(directory, OsStr::new(BUILDING));
            }
            return Err(error);
        }
        drop(made);
        self.diagnostics.warning(format!(
            "{}: removed what a crash had left of a token that was being made or removed",
            self.path.join(name.as_os_str()).display()
        ));
        Ok(false)
    }

    /// What the marks in a directory ask for; whether there still is a directory.
    fn recover_marks(&self, name: &TokenName, directory: BorrowedFd<'_>) -> Result<bool> {
        let tokendir = self.directory()?;
        let said = |what: &str| {
            self.diagnostics.warning(format!(
                "{}: {what}",
                self.path.join(name.as_os_str()).display()
            ));
        };
        // Both are looked at and locked before anything is done: who holds one of them is at work.
        let building = mark::find(directory, BUILDING)?;
        let removing = mark::find(directory, REMOVING)?;
        if building.is_none() && removing.is_none() {
            return Ok(true);
        }
        let mut content = Content::of(directory)?;
        if removing.is_some()
            && !content.has_token()
            && self.has_object(name, directory, &content)?
        {
            // A SoftHSM that had a session made an object before it could see that the token was gone.
            restore(directory)?;
            point("store.recover.restored");
            content = Content::of(directory)?;
        }
        let unmark = || -> Result<()> {
            for mark in [BUILDING, REMOVING] {
                remove_file(directory, OsStr::new(mark))?;
                point("store.recover.unmarked");
            }
            Ok(())
        };
        if content.has_token() {
            unmark()?;
            said("there is a token; removed what a crash had left of making or removing it");
            return Ok(true);
        }
        if content.has_object() && (building.is_none() || content.has_objects_alone()) {
            // Nothing that makes it a token again, or it was one and has lost that since: a person has to look at it.
            return Err(Error::new(
                ErrorKind::NotEmpty,
                "there are objects in it and no token.object, and nothing that says that it was still being made; bring that back from a backup",
            ));
        }
        clear(tokendir, name, directory, building.is_some(), || {
            point("store.recover.unlinked");
        })?;
        said("removed what a crash had left of a token that was being made or removed");
        Ok(false)
    }
}
