//! The tokendir: which of its directories are tokens, and of which backend.
//!
//! A directory is a token if it holds `token.object` or `sqlite3.db`; all else in the tokendir is none of ours.
//! Symbolic links are not followed, as SoftHSM does not follow them. One that we cannot look into is a token
//! nobody can read through us: it is listed, and fails with [`ErrorKind::PermissionDenied`].

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, stat};
use nix::sys::statvfs::{Statvfs, fstatvfs};

use super::attribute::Attributes;
use super::db::DbToken;
use super::file::{FileToken, TOKEN_OBJECT};
use super::metadata::{is_directory, is_file};
use super::{
    Access, Backend, Metadata, MetadataChange, NewObject, Object, ObjectId, ObjectName, Options,
    Patience, Target, Token, TokenName,
};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};

/// The file of a token of the `db` backend.
pub(crate) const DATABASE: &str = "sqlite3.db";

/// An object store: SoftHSM's `directories.tokendir`.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    directory: OwnedFd,
    options: Options,
    diagnostics: Arc<Diagnostics>,
    known: Mutex<HashMap<TokenName, Known>>,
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
            directory,
            options,
            diagnostics,
            known: Mutex::default(),
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

    /// The tokendir, open.
    pub(crate) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Of the tokendir.
    ///
    /// # Errors
    /// What `fstat` fails with.
    pub fn metadata(&self) -> Result<Metadata> {
        match fstat(&self.directory) {
            Ok(stat) => Ok(Metadata::of_open(&self.directory, &stat)),
            Err(errno) => Err(Error::system("stat", errno).at(&self.path)),
        }
    }

    /// Of the file system that the store is on.
    ///
    /// # Errors
    /// What `fstatvfs` fails with.
    pub fn statvfs(&self) -> Result<Statvfs> {
        fstatvfs(&self.directory).map_err(|errno| Error::system("statvfs", errno).at(&self.path))
    }

    /// The names of the tokens, in ascending order.
    ///
    /// # Errors
    /// What reading the directory fails with; [`ErrorKind::Damaged`] if another directory has its name now.
    pub fn tokens(&self) -> Result<Vec<TokenName>> {
        self.check_in_place()?;
        let failed = |errno| Error::system("read the directory", errno).at(&self.path);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory =
            Dir::openat(&self.directory, ".", flags, Mode::empty()).map_err(failed)?;
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
        names.sort_unstable();
        // What is gone is not kept open.
        self.known()
            .retain(|name, _| names.binary_search(name).is_ok());
        Ok(names)
    }

    /// That the tokendir's path still leads to the directory that was opened.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it does not.
    pub fn check_in_place(&self) -> Result<()> {
        match (fstat(&self.directory), stat(&self.path)) {
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
            Ok(Arc::new(Closed {
                name: name.clone(),
                backend: self.options.backend,
                metadata: Metadata::of_path(&path, &stat),
                path,
            }))
        };
        let token: Arc<dyn Token> = match backend {
            Some(Backend::File) => {
                let tokendir = self.directory.as_fd();
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
        _directory: Access,
        _files: Access,
    ) -> Result<Arc<dyn Token>> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(self.path.join(name.as_os_str())))
    }

    /// Whether a token is one that [`Store::create_token`] began and that is not published yet.
    #[must_use]
    pub fn is_building(&self, _name: &TokenName) -> bool {
        false
    }

    /// Makes a token that was begun one that SoftHSM sees: everything in it is synced, and its `token.object` or `sqlite3.db`
    /// gets its name last. Whoever holds the token has to ask for it anew.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not being built; what syncing and renaming fail with, and then it is still being
    /// built.
    pub fn publish_token(&self, name: &TokenName, _patience: Patience) -> Result<()> {
        Err(Error::not_found("not being built").at(self.path.join(name.as_os_str())))
    }

    /// Removes a token without objects, whether it is being built or not. It is no token any more with the first step, which
    /// cannot be seen half done; a crash after that is finished by the next writer.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`] if there is an object or a file that is none of SoftHSM's in it; [`ErrorKind::NotFound`];
    /// [`ErrorKind::Busy`]; what removing fails with.
    pub fn remove_token(&self, name: &TokenName, _patience: Patience) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(self.path.join(name.as_os_str())))
    }

    /// Changes mode, owner or times of the tokendir.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::NotPermitted`] and what else changing fails with.
    pub fn set_metadata(&self, _change: &MetadataChange) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    /// Waits until the tokens that were made and removed before are so after a power failure too.
    ///
    /// # Errors
    /// What `fsync` fails with.
    pub fn sync(&self) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    /// Puts right what a crash left behind ([`super::leftover`]), in every token; does nothing in a store that is read only.
    /// What is still in use by another process is left alone. Says what it did in the diagnostics.
    pub fn recover(&self) {}

    /// Whether a directory is a token, and of which backend; no backend if we may not look into it.
    fn probe(&self, name: &TokenName) -> Result<(FileStat, Option<Backend>)> {
        let failed = |errno| Error::system("stat", errno).at(self.path.join(name.as_os_str()));
        let stat = fstatat(
            &self.directory,
            name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| {
            if errno == Errno::ENOENT {
                self.known().remove(name);
            }
            failed(errno)
        })?;
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
            match fstatat(&self.directory, &file, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(marker) if is_file(&marker) => return Ok((stat, Some(backend))),
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(Errno::EACCES) => return Ok((stat, None)),
                Err(errno) => return Err(failed(errno)),
            }
        }
        self.known().remove(name);
        Err(no_token())
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

/// A directory that we may not look into.
#[derive(Debug)]
struct Closed {
    name: TokenName,
    backend: Backend,
    path: PathBuf,
    metadata: Metadata,
}

impl Closed {
    fn refuse<T>(&self) -> Result<T> {
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "tokenfs may not look into this directory",
        )
        .at(&self.path))
    }
}

impl Token for Closed {
    fn name(&self) -> &TokenName {
        &self.name
    }

    fn backend(&self) -> Backend {
        self.backend
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(self.metadata)
    }

    fn list(&self, _patience: Patience) -> Result<Arc<[ObjectName]>> {
        self.refuse()
    }

    fn object_metadata(&self, _id: &ObjectId, _patience: Patience) -> Result<Metadata> {
        self.refuse()
    }

    fn object(&self, _id: &ObjectId, _patience: Patience) -> Result<Arc<Object>> {
        self.refuse()
    }

    fn update(
        &self,
        _id: &ObjectId,
        _edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        _mtime: Option<SystemTime>,
        _patience: Patience,
    ) -> Result<()> {
        self.refuse()
    }

    fn create(&self, _name: &ObjectName, _new: &NewObject, _patience: Patience) -> Result<()> {
        self.refuse()
    }

    fn remove(&self, _name: &ObjectName, _patience: Patience) -> Result<()> {
        self.refuse()
    }

    fn set_metadata(
        &self,
        _target: &Target,
        _change: &MetadataChange,
        _patience: Patience,
    ) -> Result<()> {
        self.refuse()
    }

    fn sync(&self, _patience: Patience) -> Result<()> {
        self.refuse()
    }
}
