//! A token of the `file` backend.
//!
//! Keeps every object that was asked for, and serves it for as long as its file's [`Stamp`] is what it was. The lock around
//! the cache is never held over a system call.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::read::{Version, read_object};
use super::{LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_OBJECT};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::metadata::{Metadata, Stamp, is_file};
use crate::store::{
    Access, Backend, MetadataChange, NewObject, Object, ObjectId, ObjectName, Patience, Target,
    Token, TokenName,
};

/// The longest file, in bytes, that is read and decoded while everybody else waits.
const QUICK: i64 = 512 * 1024;

/// A token directory with a `token.object` in it.
#[derive(Debug)]
pub struct FileToken {
    name: TokenName,
    path: PathBuf,
    directory: OwnedFd,
    diagnostics: Arc<Diagnostics>,
    cache: Mutex<HashMap<ObjectId, Cached>>,
}

#[derive(Clone, Debug)]
struct Cached {
    stamp: Stamp,
    read_at: SystemTime,
    object: Result<Arc<Object>>,
}

impl FileToken {
    /// The token in the directory `name` of `tokendir`, whose path is `path`. A symbolic link is not followed.
    ///
    /// # Errors
    /// What opening the directory fails with.
    pub fn open(
        tokendir: BorrowedFd<'_>,
        name: TokenName,
        path: &Path,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(tokendir, name.as_os_str(), flags, Mode::empty())
            .map_err(|errno| Error::system("open", errno).at(path))?;
        Ok(Self {
            name,
            path: path.to_path_buf(),
            directory,
            diagnostics,
            cache: Mutex::default(),
        })
    }

    /// Begins a token in the empty directory `name` of `tokendir`: its own object, which holds nothing yet, is
    /// `token.tokenfs-new`, with the mode and owner `files`. Nothing is synced.
    ///
    /// # Errors
    /// What making it fails with.
    pub fn build(
        _tokendir: BorrowedFd<'_>,
        _name: TokenName,
        path: &Path,
        _files: Access,
        _diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(path))
    }

    /// Syncs a token that was begun with [`FileToken::build`], and gives its own object its name. This value is of no use
    /// afterwards.
    ///
    /// # Errors
    /// What syncing and renaming fail with.
    pub fn publish(&self) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    fn cache(&self) -> MutexGuard<'_, HashMap<ObjectId, Cached>> {
        // Every change of the map is one call, so a panic elsewhere leaves it whole.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stat(&self, id: &ObjectId) -> Result<FileStat> {
        let file = file_name(id);
        match fstatat(
            &self.directory,
            file.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        ) {
            Ok(stat) if is_file(&stat) => Ok(stat),
            Ok(_) => Err(Error::not_found("not a regular file").at(self.path.join(file))),
            // No object can have a name that leaves no room for the suffix.
            Err(Errno::ENAMETOOLONG) => Err(Error::not_found("no such object").at(&self.path)),
            Err(errno) => Err(Error::system("stat", errno).at(self.path.join(file))),
        }
    }

    fn read(&self, id: &ObjectId, patience: Patience) -> Result<Version> {
        let file = file_name(id);
        let lock = match id {
            // SoftHSM opens `token.lock` and does not lock it.
            ObjectId::Token => None,
            ObjectId::Object(name) => {
                let mut lock = name.as_os_str().to_os_string();
                lock.push(LOCK_SUFFIX);
                Some(lock)
            }
        };
        read_object(
            self.directory.as_fd(),
            Path::new(&file),
            lock.as_deref().map(Path::new),
            patience,
        )
        .map_err(|error| error.at(self.path.join(&file)))
    }

    /// Turns what was read into an object, and says what is odd about it.
    fn settle(&self, id: &ObjectId, version: Version) -> Result<Arc<Object>> {
        let path = || self.path.join(file_name(id));
        match version.content {
            Ok(decoded) => {
                if let Some(offset) = decoded.trailing {
                    self.diagnostics.warning(format!(
                        "{}: bytes that are no attribute follow at byte {offset}; SoftHSM ignores them, \
                         and attributes may have been lost",
                        path().display()
                    ));
                }
                Ok(Arc::new(Object {
                    metadata: version.metadata,
                    generation: decoded.generation,
                    attributes: decoded.attributes,
                }))
            }
            Err(error) => Err(error.at(path())),
        }
    }
}

impl Token for FileToken {
    fn name(&self) -> &TokenName {
        &self.name
    }

    fn backend(&self) -> Backend {
        Backend::File
    }

    fn metadata(&self) -> Result<Metadata> {
        let stat =
            fstat(&self.directory).map_err(|errno| Error::system("stat", errno).at(&self.path))?;
        if stat.st_nlink == 0 {
            return Err(Error::not_found("the token is gone").at(&self.path));
        }
        Ok(Metadata::of_open(&self.directory, &stat))
    }

    fn list(&self, _patience: Patience) -> Result<Arc<[ObjectName]>> {
        let failed = |what, errno| Error::system(what, errno).at(&self.path);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory = Dir::openat(&self.directory, ".", flags, Mode::empty())
            .map_err(|errno| failed("open", errno))?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(|errno| failed("read the directory", errno))?;
            let file = OsStr::from_bytes(entry.file_name().to_bytes());
            let Some(name) = object_name(file) else {
                continue;
            };
            let regular = match entry.file_type() {
                Some(kind) => kind == Type::File,
                None => match fstatat(&self.directory, file, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(stat) => is_file(&stat),
                    Err(Errno::ENOENT) => false,
                    Err(errno) => return Err(failed("stat", errno)),
                },
            };
            if regular {
                names.push(name);
            }
        }
        names.sort_unstable();
        // What is gone is not kept.
        self.cache().retain(|id, _| match id {
            ObjectId::Token => true,
            ObjectId::Object(name) => names.binary_search(name).is_ok(),
        });
        Ok(names.into())
    }

    fn object_metadata(&self, id: &ObjectId, _patience: Patience) -> Result<Metadata> {
        let path = self.path.join(file_name(id));
        self.stat(id).map(|stat| Metadata::of_path(&path, &stat))
    }

    fn object(&self, id: &ObjectId, patience: Patience) -> Result<Arc<Object>> {
        let stat = match self.stat(id) {
            Ok(stat) => stat,
            Err(error) => {
                if error.kind() == ErrorKind::NotFound {
                    self.cache().remove(id);
                }
                return Err(error);
            }
        };
        let stamp = Stamp::from(&stat);
        let known = self.cache().get(id).cloned();
        if let Some(known) = &known
            && known.stamp == stamp
            && !known.stamp.is_racy(known.read_at)
        {
            return known.object.clone();
        }
        if matches!(patience, Patience::Now) && stat.st_size > QUICK {
            return Err(
                Error::new(ErrorKind::WouldBlock, "a long file has to be read").at(&self.path),
            );
        }
        let read_at = SystemTime::now();
        let version = self.read(id, patience)?;
        let stamp = version.stamp;
        let mut object = self.settle(id, version);
        if let (Ok(new), Some(known)) = (&object, &known)
            && let Ok(old) = &known.object
            && known.stamp == stamp
            && old.attributes == new.attributes
            && old.metadata.same_access(&new.metadata)
        {
            // The same version, read again only to be sure: whoever holds it need not be told.
            object = Ok(Arc::clone(old));
        }
        let cached = Cached {
            stamp,
            read_at,
            object: object.clone(),
        };
        self.cache().insert(id.clone(), cached);
        object
    }

    fn update(
        &self,
        _id: &ObjectId,
        _edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        _mtime: Option<SystemTime>,
        _patience: Patience,
    ) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    fn create(&self, _name: &ObjectName, _new: &NewObject, _patience: Patience) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    fn remove(&self, _name: &ObjectName, _patience: Patience) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    fn set_metadata(
        &self,
        _target: &Target,
        _change: &MetadataChange,
        _patience: Patience,
    ) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }

    fn sync(&self, _patience: Patience) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "not yet").at(&self.path))
    }
}

/// The name of an object's file.
fn file_name(id: &ObjectId) -> OsString {
    match id {
        ObjectId::Token => OsString::from(TOKEN_OBJECT),
        ObjectId::Object(name) => {
            let mut file = name.as_os_str().to_os_string();
            file.push(OBJECT_SUFFIX);
            file
        }
    }
}

/// The name of the object whose file this is, if it is one: SoftHSM's `OSToken::index` takes any name that ends in
/// `.object` and has something before it.
pub(crate) fn object_name(file: &OsStr) -> Option<ObjectName> {
    if file == TOKEN_OBJECT {
        return None;
    }
    let stem = file.as_bytes().strip_suffix(OBJECT_SUFFIX.as_bytes())?;
    ObjectName::new(OsStr::from_bytes(stem))
}
