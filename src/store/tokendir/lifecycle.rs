//! Making and removing tokens.
//!
//! A directory is a token from the moment that it holds `token.object` or `sqlite3.db`, and until it holds none. Everything
//! before and after that is marked (`leftover`), so that a crash leaves nothing that nobody clears away. It gets its own name when
//! it is marked, and loses it before it is not.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, fstatat, mkdirat};

use super::mark::{
    self, Content, HIDDEN_DATABASE, HIDDEN_OBJECT, clear, in_use, not_empty, open_directory,
    remove_file,
};
use super::{DATABASE, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::db::DbToken;
use crate::store::file::{FileToken, TOKEN_OBJECT, set_access};
use crate::store::leftover::{BUILDING, REMOVING};
use crate::store::metadata::is_file;
use crate::store::rename::rename_to_free;
use crate::store::sync::sync_directory;
use crate::store::{Access, Backend, Patience, Token, TokenName, lock};

/// How often a directory is begun anew that another process has cleared away before it was marked.
const ATTEMPTS: usize = 5;

/// A token that is being built.
#[derive(Clone, Debug)]
pub(super) struct Building {
    kind: Kind,
    /// The mark, locked.
    _mark: Arc<File>,
    /// Held by whoever publishes or removes it.
    ending: Arc<Mutex<()>>,
}

#[derive(Clone, Debug)]
enum Kind {
    File(Arc<FileToken>),
    Db(Arc<DbToken>),
}

impl Building {
    /// The token.
    pub(super) fn token(&self) -> Arc<dyn Token> {
        match &self.kind {
            Kind::File(token) => Arc::clone(token) as Arc<dyn Token>,
            Kind::Db(token) => Arc::clone(token) as Arc<dyn Token>,
        }
    }

    fn publish(&self) -> Result<Option<Error>> {
        match &self.kind {
            Kind::File(token) => token.publish(),
            Kind::Db(token) => token.publish(),
        }
    }
}

impl Store {
    /// Begins a token of the configured backend: the directory `name` is made, and what is written into it can be read through
    /// [`Store::token`] at once, but it is no token for SoftHSM before [`Store::publish_token`], and nothing is synced
    /// before that. `directory` and `files` are the modes and owners of the directory and of what every token has in it.
    ///
    /// What a crash leaves of it is removed by the next writer.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is anything of that name; [`ErrorKind::ReadOnly`]; what making it fails with.
    pub fn create_token(
        &self,
        name: &TokenName,
        directory: Access,
        files: Access,
    ) -> Result<Arc<dyn Token>> {
        self.check_writable()?;
        self.check_in_place()?;
        let path = self.path.join(name.as_os_str());
        let building = self
            .begin_token(name, directory, files)
            .map_err(|error| error.at(&path))?;
        let token = building.token();
        self.known().remove(name);
        self.building().insert(name.clone(), building);
        Ok(token)
    }

    fn begin_token(&self, name: &TokenName, directory: Access, files: Access) -> Result<Building> {
        if self.is_building(name) {
            return Err(exists());
        }
        let tokendir = self.directory()?;
        if self.has(name)? {
            // What a crash left of a token of that name is in nobody's way.
            self.recover_directory(name, false);
            if self.has(name)? {
                return Err(exists());
            }
        }
        let (opened, mark) = self.make_directory(name, directory)?;
        let begun = || -> Result<Kind> {
            let path = self.path.join(name.as_os_str());
            let (options, diagnostics) = (self.options.clone(), Arc::clone(&self.diagnostics));
            Ok(match self.options.backend {
                Backend::File => Kind::File(Arc::new(FileToken::build(
                    tokendir,
                    name.clone(),
                    &path,
                    files,
                    options,
                    diagnostics,
                )?)),
                Backend::Db => Kind::Db(Arc::new(DbToken::build(
                    name.clone(),
                    &path,
                    files,
                    options,
                    diagnostics,
                )?)),
            })
        };
        match begun() {
            Ok(kind) => Ok(Building {
                kind,
                _mark: Arc::new(mark),
                ending: Arc::default(),
            }),
            Err(error) => {
                let _ = clear(tokendir, name, opened.as_fd(), true, || {});
                Err(error)
            }
        }
    }

    /// Makes a directory that is marked, and looks like `access`, from the moment that it has its name.
    fn make_directory(&self, name: &TokenName, access: Access) -> Result<(OwnedFd, File)> {
        let tokendir = self.directory()?;
        let staging = mark::staging(name)?;
        for _ in 0..ATTEMPTS {
            match mkdirat(
                tokendir,
                staging.as_os_str(),
                Mode::from_bits_truncate(0o700),
            ) {
                Ok(()) => {}
                Err(Errno::EEXIST) => {
                    self.recover_directory(&staging, false);
                    if self.has(&staging)? {
                        // Somebody else is making it now.
                        return Err(exists());
                    }
                    continue;
                }
                Err(errno) => return Err(Error::system("make the directory", errno)),
            }
            point("store.create.made");
            match self.mark_directory(name, &staging, access) {
                Ok(Some(made)) => return Ok(made),
                // Taken for what a crash had left, before it was marked.
                Ok(None) => {}
                Err(error) => {
                    self.recover_directory(&staging, false);
                    return Err(error);
                }
            }
        }
        Err(in_use())
    }

    fn mark_directory(
        &self,
        name: &TokenName,
        staging: &TokenName,
        access: Access,
    ) -> Result<Option<(OwnedFd, File)>> {
        let tokendir = self.directory()?;
        let gone = |error: Error| match error.kind() {
            ErrorKind::NotFound => Ok(None),
            _ => Err(error),
        };
        let opened = match open_directory(tokendir, staging) {
            Ok(opened) => opened,
            Err(error) => return gone(error),
        };
        let mark = match mark::make(opened.as_fd(), BUILDING) {
            Ok(Some(mark)) => mark,
            Ok(None) => return Ok(None),
            Err(error) => return gone(error),
        };
        point("store.create.marked");
        set_access(&opened, access)?;
        point("store.create.dressed");
        match mark::rename_directory(tokendir, staging, name) {
            Ok(()) => {}
            Err(error) => return gone(error),
        }
        point("store.create.named");
        Ok(Some((opened, mark)))
    }

    /// Whether there is anything of a name.
    fn has(&self, name: &TokenName) -> Result<bool> {
        match fstatat(
            self.directory()?,
            name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        ) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(Error::system("stat", errno)),
        }
    }

    /// Whether a token is one that [`Store::create_token`] began and that is not published yet.
    #[must_use]
    pub fn is_building(&self, name: &TokenName) -> bool {
        self.building().contains_key(name)
    }

    /// Makes a token that was begun one that SoftHSM sees: everything in it is synced, and its `token.object` or `sqlite3.db`
    /// gets its name last. Whoever holds the token has to ask for it anew.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not being built; [`ErrorKind::WouldBlock`] with [`Patience::Now`]; what syncing and
    /// renaming fail with, and then it is still being built; what syncing the name fails with, and then it is a token all the same, and
    /// not certain to survive a power failure.
    pub fn publish_token(&self, name: &TokenName, patience: Patience) -> Result<()> {
        let path = self.path.join(name.as_os_str());
        let published = self.end(name, patience, |building| {
            self.check_in_place()?;
            // The directory first: a token that survives a power failure has one.
            self.sync()?;
            let unsynced = building.publish()?;
            point("store.publish.published");
            let unmarked = open_directory(self.directory()?, name)
                .and_then(|directory| remove_file(&directory, OsStr::new(BUILDING)));
            if let Err(error) = unmarked {
                // It is a token all the same.
                self.diagnostics.error(&error.at(path.join(BUILDING)));
            }
            point("store.publish.unmarked");
            Ok(unsynced)
        });
        match published.map_err(|error| error.at(&path))? {
            None => Ok(()),
            Some(error) => Err(error.at(&path)),
        }
    }

    /// Does what ends the building of a token, one at a time; afterwards it is not being built any more.
    fn end<T>(
        &self,
        name: &TokenName,
        patience: Patience,
        end: impl FnOnce(&Building) -> Result<T>,
    ) -> Result<T> {
        let not_building = || Error::not_found("not being built");
        let building = self
            .building()
            .get(name)
            .cloned()
            .ok_or_else(not_building)?;
        if matches!(patience, Patience::Now) {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "it has to be waited for the disk",
            ));
        }
        let _alone = building
            .ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Somebody may have ended it while we waited.
        if !self.building().contains_key(name) {
            return Err(not_building());
        }
        let ended = end(&building)?;
        self.building().remove(name);
        self.known().remove(name);
        Ok(ended)
    }

    /// Removes a token that is being built with everything in it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not being built; [`ErrorKind::WouldBlock`] with [`Patience::Now`]; what removing fails
    /// with, and then the next writer removes it.
    pub fn abandon_token(&self, name: &TokenName, patience: Patience) -> Result<()> {
        self.end(name, patience, |_| self.unbuild(name))
            .map_err(|error| error.at(self.path.join(name.as_os_str())))?;
        self.sync_removed();
        Ok(())
    }

    /// A token is gone. That it may be back after a power failure is no reason to believe that it is there: `fsync` says so.
    fn sync_removed(&self) {
        if let Err(error) = self.sync() {
            self.diagnostics.error(&error);
        }
    }

    fn unbuild(&self, name: &TokenName) -> Result<()> {
        let tokendir = self.directory()?;
        let directory = open_directory(tokendir, name)?;
        clear(tokendir, name, directory.as_fd(), true, || {
            point("store.unbuild.unlinked");
        })
    }

    /// Removes a token without objects, whether it is being built or not. It is no token any more with the first step, which
    /// cannot be seen half done; a crash after that is finished by the next writer.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`] if there is an object or a file that is none of SoftHSM's in it; [`ErrorKind::NotFound`];
    /// [`ErrorKind::Busy`]; [`ErrorKind::WouldBlock`] with [`Patience::Now`]; what removing fails with.
    pub fn remove_token(&self, name: &TokenName, patience: Patience) -> Result<()> {
        let path = self.path.join(name.as_os_str());
        self.check_writable()?;
        self.check_in_place()?;
        let removed = if self.is_building(name) {
            self.end(name, patience, |building| {
                if !building.token().list(patience)?.is_empty() {
                    return Err(not_empty());
                }
                self.unbuild(name)
            })
        } else {
            self.remove_published(name, patience)
        };
        removed.map_err(|error| error.at(&path))?;
        self.sync_removed();
        Ok(())
    }

    fn remove_published(&self, name: &TokenName, patience: Patience) -> Result<()> {
        if matches!(patience, Patience::Now) {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "removing a token waits for locks and for the disk",
            ));
        }
        let (_, backend) = self.probe(name)?;
        let backend = backend.ok_or_else(|| {
            Error::new(
                ErrorKind::PermissionDenied,
                "tokenfs may not look into this directory",
            )
        })?;
        let tokendir = self.directory()?;
        let opened = open_directory(tokendir, name)?;
        let directory = opened.as_fd();
        self.check_empty(name, directory, backend, patience)?;
        let mark = match mark::make(directory, REMOVING)? {
            Some(mark) => Some(mark),
            // Left by a crash, or held by somebody who is at it.
            None => mark::find(directory, REMOVING)?,
        };
        let mark = mark.ok_or_else(in_use)?;
        point("store.remove.marked");
        if let Err(error) = self.hide(name, directory, backend, patience) {
            // Its name first: without the mark nothing brings it back. If that fails, the mark stays for the next writer.
            match restore(directory) {
                Ok(true) => point("store.remove.restored"),
                Ok(false) => {}
                Err(failed) => {
                    self.diagnostics
                        .error(&failed.at(self.path.join(name.as_os_str())));
                    return Err(error);
                }
            }
            let _ = remove_file(directory, OsStr::new(REMOVING));
            return Err(error);
        }
        self.known().remove(name);
        let cleared = clear(tokendir, name, directory, false, || {
            point("store.remove.unlinked");
        });
        if let Err(error) = cleared {
            // It may have lost its name already. What cannot be told is for the next mount to find out.
            let is_found = |name: &TokenName| {
                let content = Content::of(directory)?;
                self.has_object(name, directory, &content)
            };
            let (named, found) = match is_found(name) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let staging = mark::staging(name)?;
                    let found = is_found(&staging);
                    (staging, found)
                }
                found => (name.clone(), found),
            };
            if found.unwrap_or(false) {
                // A SoftHSM that has a session made one after the last look.
                if named != *name {
                    mark::rename_directory(tokendir, &named, name)?;
                }
                restore(directory)?;
                remove_file(directory, OsStr::new(REMOVING))?;
                return Err(error);
            }
            // It is none any more. What cannot be cleared away now is a leftover, as after a crash, and no reason to believe that it is there.
            let error = error.at(self.path.join(name.as_os_str()));
            self.diagnostics.warning(format!(
                "{error}: it is left of a token that is gone, and goes with the next mount"
            ));
        }
        drop(mark);
        Ok(())
    }

    /// Whether there is an object in the directory `name` of a token that is being removed: a file, or one in the database that has
    /// lost its name. A database that cannot be read counts as one: it was without objects before, and was read.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody holds the database's lock; [`ErrorKind::NotFound`] if the directory has another name now.
    pub(super) fn has_object(
        &self,
        name: &TokenName,
        directory: BorrowedFd<'_>,
        content: &Content,
    ) -> Result<bool> {
        let has_database = || {
            let stat = fstatat(directory, HIDDEN_DATABASE, AtFlags::AT_SYMLINK_NOFOLLOW);
            stat.is_ok_and(|stat| is_file(&stat))
        };
        if !content.has_object() && !has_database() {
            return Ok(false);
        }
        // Whoever puts it right goes by the name, and SQLite opens by path, which must lead to where we look.
        self.check_in_place()?;
        let named = fstatat(
            self.directory()?,
            name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        match (fstat(directory), named) {
            (Ok(opened), Ok(named))
                if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino) => {}
            _ => return Err(Error::not_found("the directory has another name now")),
        }
        if content.has_object() {
            return Ok(true);
        }
        let path = self.path.join(name.as_os_str());
        let (options, log) = (self.options.clone(), Arc::clone(&self.diagnostics));
        let patience = Patience::at_most(self.options.lock_wait);
        let listed = DbToken::open_hidden(name.clone(), &path, options, log)
            .and_then(|hidden| hidden.list(patience));
        match listed {
            Ok(names) => Ok(!names.is_empty()),
            Err(error) if error.kind() == ErrorKind::Busy => Err(error),
            Err(error) => {
                self.diagnostics.error(&error);
                Ok(true)
            }
        }
    }

    /// That a token has no objects, and nothing that is not SoftHSM's.
    fn check_empty(
        &self,
        name: &TokenName,
        directory: BorrowedFd<'_>,
        backend: Backend,
        patience: Patience,
    ) -> Result<()> {
        if let Some(foreign) = Content::of(directory)?.foreign(backend) {
            return Err(Error::new(
                ErrorKind::NotEmpty,
                format!(
                    "there is \"{}\" in it",
                    foreign.to_string_lossy().escape_debug()
                ),
            ));
        }
        if backend == Backend::Db && !self.token(name)?.list(patience)?.is_empty() {
            return Err(not_empty());
        }
        Ok(())
    }

    /// The step with which it is no token any more. If it fails, the token may have lost its name.
    fn hide(
        &self,
        name: &TokenName,
        directory: BorrowedFd<'_>,
        backend: Backend,
        patience: Patience,
    ) -> Result<()> {
        // The mark has to be there after a power failure when the token is not.
        sync_directory(directory)?;
        let failed = |errno| Error::system("rename", errno);
        // Held until the look below.
        let _own = match backend {
            Backend::File => {
                let flags =
                    OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
                let own = openat(directory, TOKEN_OBJECT, flags, Mode::empty())
                    .map(File::from)
                    .map_err(|errno| Error::system("open", errno))?;
                lock::lock_exclusive(&own, patience)?;
                renameat(directory, TOKEN_OBJECT, directory, HIDDEN_OBJECT).map_err(failed)?;
                Some(own)
            }
            Backend::Db => {
                // SQLite opens by path, which must lead to where we look.
                self.check_in_place()?;
                let path = self.path.join(name.as_os_str());
                let (options, log) = (self.options.clone(), Arc::clone(&self.diagnostics));
                let token = DbToken::open(name.clone(), &path, options, log)?;
                token.hide(patience, &mut || {
                    renameat(directory, DATABASE, directory, HIDDEN_DATABASE).map_err(failed)
                })?;
                None
            }
        };
        point("store.remove.hidden");
        // A SoftHSM that has a session may have made an object meanwhile.
        if self.has_object(name, directory, &Content::of(directory)?)? {
            return Err(not_empty());
        }
        // From here on nothing brings it back.
        sync_directory(directory)
    }
}

/// Makes a directory a token again whose removal was begun, before the mark that says so may go; whether there was anything to be
/// made one of.
///
/// # Errors
/// What renaming and syncing fail with.
pub(super) fn restore(directory: BorrowedFd<'_>) -> Result<bool> {
    for (hidden, name) in [(HIDDEN_OBJECT, TOKEN_OBJECT), (HIDDEN_DATABASE, DATABASE)] {
        match fstatat(directory, hidden, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if is_file(&stat) => {}
            _ => continue,
        }
        let failed = |errno| Error::system("rename", errno);
        let (from, to) = (Path::new(hidden), Path::new(name));
        rename_to_free(directory, from, to).map_err(failed)?;
        sync_directory(directory)?;
        return Ok(true);
    }
    Ok(false)
}

fn exists() -> Error {
    Error::new(ErrorKind::Exists, "there is something of that name")
}
