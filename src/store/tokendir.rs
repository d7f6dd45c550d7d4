//! The tokendir: which of its directories are tokens, and of which backend. Making and removing tokens is [`lifecycle`], what
//! a crash leaves of that [`recover`].
//!
//! A directory is a token if it holds `token.object` or `sqlite3.db`; all else in the tokendir is none of ours.
//! Symbolic links are not followed, as SoftHSM does not follow them. One that we cannot look into is a token
//! nobody can read through us: it is listed, and fails with [`ErrorKind::PermissionDenied`].
//!
//! A store can also be a [snapshot](super::snapshot) of one, which has none of this open.

mod lifecycle;
mod mark;
mod recover;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, major, minor, stat};
use nix::sys::statvfs::{Statvfs, fstatvfs};

use super::db::DbToken;
use super::file::{FileToken, TOKEN_OBJECT, apply_to_open};
use super::metadata::{is_directory, is_file};
use super::snapshot::{Remembered, Snapshot};
use super::sync::sync_directory;
use super::validate::slot_id;
use super::watch::Coverage;
use super::{Backend, Metadata, MetadataChange, Object, Options, Token, TokenName};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11::CKA_OS_TOKENSERIAL;
use lifecycle::Building;
pub(crate) use mark::{HIDDEN_DATABASE, HIDDEN_OBJECT, is_staging};

/// The file of a token of the `db` backend.
pub(crate) const DATABASE: &str = "sqlite3.db";

/// An object store: SoftHSM's `directories.tokendir`.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    source: Source,
    options: Options,
    diagnostics: Arc<Diagnostics>,
    known: Mutex<HashMap<TokenName, Known>>,
    /// Tokens that are none yet. Never held over a system call, and not together with `known`.
    building: Mutex<HashMap<TokenName, Building>>,
}

/// Where the answers come from.
#[derive(Debug)]
enum Source {
    /// The tokendir, open.
    Directory(OwnedFd),
    /// Memory.
    Snapshot(Snapshot),
}

/// A token that was opened, and the directory that it was then.
#[derive(Debug)]
struct Known {
    directory: (u64, u64),
    token: Arc<dyn Token>,
}

impl Store {
    /// The store in the directory `tokendir`, which may be given through symbolic links.
    ///
    /// # Errors
    /// If it does not exist, is no directory or cannot be read.
    pub fn open(tokendir: &Path, options: Options, diagnostics: Arc<Diagnostics>) -> Result<Self> {
        let path = tokendir
            .canonicalize()
            .map_err(|error| Error::io("open", &error).at(tokendir))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(&path, flags, Mode::empty())
            .map_err(|errno| Error::system("open", errno).at(&path))?;
        Ok(Self {
            path,
            source: Source::Directory(directory),
            options,
            diagnostics,
            known: Mutex::default(),
            building: Mutex::default(),
        })
    }

    /// The tokendir, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the store is read.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The store as it is at one moment, from memory and read-only, whatever becomes of this one. Nothing of it is open.
    /// [`super::snapshot`] says what the moment is.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a lock stays taken for [`Options::lock_wait`]; whatever else keeps anything from being read that
    /// is not damaged or closed to us: rather no snapshot than one that lacks something.
    pub fn snapshot(&self) -> Result<Self> {
        Ok(Self {
            path: self.path.clone(),
            source: Source::Snapshot(Snapshot::take(self)?),
            options: Options {
                read_only: true,
                ..self.options.clone()
            },
            diagnostics: Arc::clone(&self.diagnostics),
            known: Mutex::default(),
            building: Mutex::default(),
        })
    }

    /// What of the store is reported when it changes, before anybody watches it: of a snapshot, where nothing does, all.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        match &self.source {
            Source::Directory(_) => Coverage::default(),
            Source::Snapshot(_) => Coverage::complete(),
        }
    }

    /// The tokendir, open.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] if this is a snapshot, of which nothing is.
    pub(crate) fn directory(&self) -> Result<BorrowedFd<'_>> {
        match &self.source {
            Source::Directory(directory) => Ok(directory.as_fd()),
            Source::Snapshot(_) => {
                let detail = "a snapshot is in memory, and its tokendir is not open";
                Err(Error::new(ErrorKind::ReadOnly, detail).at(&self.path))
            }
        }
    }

    /// Of the tokendir.
    ///
    /// # Errors
    /// What `fstat` fails with.
    pub fn metadata(&self) -> Result<Metadata> {
        match &self.source {
            Source::Snapshot(snapshot) => Ok(snapshot.metadata),
            Source::Directory(directory) => match fstat(directory) {
                Ok(stat) => Ok(Metadata::of_open(directory, &stat)),
                Err(errno) => Err(Error::system("stat", errno).at(&self.path)),
            },
        }
    }

    /// Of the file system that the store is on.
    ///
    /// # Errors
    /// What `fstatvfs` fails with.
    pub fn statvfs(&self) -> Result<Statvfs> {
        match &self.source {
            Source::Snapshot(snapshot) => Ok(snapshot.statvfs),
            Source::Directory(directory) => {
                fstatvfs(directory).map_err(|errno| Error::system("statvfs", errno).at(&self.path))
            }
        }
    }

    /// How many blocks of what `statvfs` calls free the file system of the store gives to nobody, not even to root: those that ext4 keeps back
    /// (`reserved_clusters` in `Documentation/ABI/testing/sysfs-fs-ext4`).
    #[must_use]
    pub fn kept_back(&self) -> u64 {
        let Source::Directory(directory) = &self.source else {
            return 0;
        };
        let Ok(stat) = fstat(directory) else {
            return 0;
        };
        let (major, minor) = (major(stat.st_dev), minor(stat.st_dev));
        let device = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
        let kept = device.ok().and_then(|device| {
            let name = device.file_name()?;
            let file = Path::new("/sys/fs/ext4")
                .join(name)
                .join("reserved_clusters");
            std::fs::read_to_string(file).ok()?.trim().parse().ok()
        });
        kept.unwrap_or(0)
    }

    /// The names of the tokens, in ascending order.
    ///
    /// # Errors
    /// What reading the directory fails with; [`ErrorKind::Damaged`] if another directory has its name now.
    pub fn tokens(&self) -> Result<Vec<TokenName>> {
        if let Source::Snapshot(snapshot) = &self.source {
            return Ok(snapshot.tokens());
        }
        self.check_in_place()?;
        let failed = |errno| Error::system("read the directory", errno).at(&self.path);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory =
            Dir::openat(self.directory()?, ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(failed)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if let Some(name) = TokenName::new(name)
                && self.probe(&name).is_ok()
            {
                names.push(name);
            }
        }
        names.extend(self.building().keys().cloned());
        names.sort_unstable();
        names.dedup();
        // What is gone is not kept open.
        self.known()
            .retain(|name, _| names.binary_search(name).is_ok());
        Ok(names)
    }

    /// That the tokendir's path still leads to the directory that was opened. A snapshot is where it is.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it does not.
    pub fn check_in_place(&self) -> Result<()> {
        let Source::Directory(directory) = &self.source else {
            return Ok(());
        };
        match (fstat(directory), stat(&self.path)) {
            (Ok(opened), Ok(named))
                if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino) =>
            {
                Ok(())
            }
            _ => Err(replaced().at(&self.path)),
        }
    }

    /// A token by its name. The same `Arc` each time, until the directory is another.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such token.
    pub fn token(&self, name: &TokenName) -> Result<Arc<dyn Token>> {
        if let Source::Snapshot(snapshot) = &self.source {
            let found = snapshot.token(name);
            return found.map_err(|error| error.at(self.path.join(name.as_os_str())));
        }
        if let Some(building) = self.building().get(name) {
            return Ok(building.token());
        }
        let (stat, backend) = self.probe(name)?;
        let directory = (stat.st_dev, stat.st_ino);
        if let Some(known) = self.known().get(name)
            && known.directory == directory
            && Some(known.token.backend()) == backend
        {
            return Ok(Arc::clone(&known.token));
        }
        let path = self.path.join(name.as_os_str());
        let diagnostics = Arc::clone(&self.diagnostics);
        // Not remembered: what keeps us out can end at any time.
        let closed = |path: PathBuf| -> Result<Arc<dyn Token>> {
            let metadata = Metadata::of_path(&path, &stat);
            let backend = self.options.backend;
            Ok(Arc::new(Remembered::closed(
                name.clone(),
                backend,
                metadata,
                &path,
            )))
        };
        let token: Arc<dyn Token> = match backend {
            Some(Backend::File) => {
                let tokendir = self.directory()?;
                let options = self.options.clone();
                match FileToken::open(tokendir, name.clone(), &path, options, diagnostics) {
                    Ok(token) => Arc::new(token),
                    Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                        return closed(path);
                    }
                    Err(error) => return Err(error),
                }
            }
            Some(Backend::Db) => {
                // SQLite opens by path, which must lead to where we look.
                self.check_in_place()?;
                let options = self.options.clone();
                Arc::new(DbToken::open(name.clone(), &path, options, diagnostics)?)
            }
            None => return closed(path),
        };
        let known = Known {
            directory,
            token: Arc::clone(&token),
        };
        self.known().insert(name.clone(), known);
        Ok(token)
    }

    /// The slots that SoftHSM gives all tokens but `name`, as far as `own` can read what each has of its own.
    ///
    /// # Errors
    /// As [`Store::tokens`]; [`ErrorKind::WouldBlock`] if `own` says so.
    pub fn slots_of_others(
        &self,
        name: &TokenName,
        mut own: impl FnMut(&TokenName) -> Result<Arc<Object>>,
    ) -> Result<Vec<u64>> {
        let mut slots = Vec::new();
        for other in self.tokens()? {
            // One that is being built is none yet, and looks itself when it becomes one.
            if other == *name || self.is_building(&other) {
                continue;
            }
            match own(&other) {
                Ok(object) => {
                    let serial = object.attributes.bytes(CKA_OS_TOKENSERIAL);
                    slots.push(slot_id(serial.unwrap_or_default()));
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Busy) => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
        Ok(slots)
    }

    /// Changes mode, owner or times of the tokendir.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::NotPermitted`] and what else changing fails with.
    pub fn set_metadata(&self, change: &MetadataChange) -> Result<()> {
        self.check_writable()?;
        apply_to_open(self.directory()?, change).map_err(|error| error.at(&self.path))
    }

    /// Waits until the tokens that were made and removed before are so after a power failure too.
    ///
    /// # Errors
    /// What `fsync` fails with.
    pub fn sync(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        sync_directory(self.directory()?).map_err(|error| error.at(&self.path))
    }

    fn check_writable(&self) -> Result<()> {
        if self.options.read_only {
            let error = Error::new(ErrorKind::ReadOnly, "the store is mounted read-only");
            return Err(error.at(&self.path));
        }
        Ok(())
    }

    /// Whether there is a directory of that name, a token or none. What cannot be told counts as one.
    #[must_use]
    pub fn has_directory(&self, name: &TokenName) -> bool {
        let Ok(tokendir) = self.directory() else {
            return true;
        };
        let found = fstatat(tokendir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        !matches!(found, Err(Errno::ENOENT))
    }

    /// Whether a directory is a token, and of which backend; no backend if we may not look into it.
    fn probe(&self, name: &TokenName) -> Result<(FileStat, Option<Backend>)> {
        let failed = |errno| Error::system("stat", errno).at(self.path.join(name.as_os_str()));
        let directory = self.directory()?;
        let stat = fstatat(directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(
            |errno| {
                if errno == Errno::ENOENT {
                    self.known().remove(name);
                }
                failed(errno)
            },
        )?;
        let no_token = || Error::not_found("not a token").at(self.path.join(name.as_os_str()));
        if !is_directory(&stat) {
            self.known().remove(name);
            return Err(no_token());
        }
        // The configured backend first: a directory that holds both is read as SoftHSM reads it.
        let order = match self.options.backend {
            Backend::File => [Backend::File, Backend::Db],
            Backend::Db => [Backend::Db, Backend::File],
        };
        for backend in order {
            let file = Path::new(name.as_os_str()).join(match backend {
                Backend::File => TOKEN_OBJECT,
                Backend::Db => DATABASE,
            });
            match fstatat(directory, &file, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(marker) if is_file(&marker) => return Ok((stat, Some(backend))),
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(Errno::EACCES) => return Ok((stat, None)),
                Err(errno) => return Err(failed(errno)),
            }
        }
        self.known().remove(name);
        Err(no_token())
    }

    fn building(&self) -> MutexGuard<'_, HashMap<TokenName, Building>> {
        self.building.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<TokenName, Known>> {
        // Every change of the map is one call, so a panic elsewhere leaves it whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another directory has the tokendir's name now: what we have open is not what SoftHSM sees.
pub(crate) fn replaced() -> Error {
    Error::damaged("the tokendir was moved, removed or replaced; unmount, and mount it again")
}

#[cfg(test)]
mod db_tests;
#[cfg(test)]
mod tests;
