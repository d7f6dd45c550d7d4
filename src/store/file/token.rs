//! A token of the `file` backend.
//!
//! Keeps every object that was asked for, and serves it for as long as its file's [`Stamp`] is what it was. The lock around
//! the cache is never held over a system call.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::born::Ours;
use super::departed::Departures;
use super::generation::Told;
use super::names::Names;
use super::noticed::{Changes, name_of};
use super::read::{Reading, Version, read_file};
use super::{OBJECT_SUFFIX, TOKEN_OBJECT, encode, encoded_length};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::layout::LayoutFile;
use crate::store::metadata::{Metadata, Stamp, is_file};
use crate::store::{
    Backend, Hold, MetadataChange, NewObject, Object, ObjectId, ObjectName, Options, Patience,
    Target, Token, TokenName,
};

/// The longest file, in bytes, that is read and decoded while everybody else waits.
pub(super) const QUICK: i64 = 512 * 1024;

/// A token directory with a `token.object` in it, or one that is going to be one.
#[derive(Debug)]
pub struct FileToken {
    pub(super) name: TokenName,
    pub(super) path: PathBuf,
    directory: OwnedFd,
    pub(super) options: Options,
    pub(super) diagnostics: Arc<Diagnostics>,
    cache: Mutex<HashMap<ObjectId, Cached>>,
    /// Whether it is no token yet.
    pub(super) building: AtomicBool,
    /// The files that were made here, which are not SoftHSM's newborn objects.
    pub(super) born: Ours,
    changes: Mutex<Changes>,
    departures: Mutex<Departures>,
    pub(super) told: Told,
    /// What was written and not synced.
    pending: Mutex<BTreeSet<OsString>>,
    /// Held while that is synced.
    pub(super) syncing: Mutex<()>,
    /// Held from a look at the time of the directory until it is set back, and while it is set.
    pub(super) directory_time: Mutex<()>,
}

#[derive(Clone, Debug)]
pub(super) struct Cached {
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
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(tokendir, name.as_os_str(), flags, Mode::empty())
            .map_err(|errno| Error::system("open", errno).at(path))?;
        Ok(Self {
            name,
            path: path.to_path_buf(),
            directory,
            options,
            diagnostics,
            cache: Mutex::default(),
            building: AtomicBool::new(false),
            born: Ours::default(),
            changes: Mutex::default(),
            departures: Mutex::default(),
            told: Told::default(),
            pending: Mutex::default(),
            syncing: Mutex::default(),
            directory_time: Mutex::default(),
        })
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, HashMap<ObjectId, Cached>> {
        // Every change of the map is one call, so a panic elsewhere leaves it whole.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn departures(&self) -> MutexGuard<'_, Departures> {
        self.departures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, BTreeSet<OsString>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether it is no token yet, so that nobody else writes it and nothing of it is synced.
    pub(super) fn is_building(&self) -> bool {
        self.building.load(Ordering::Acquire)
    }

    pub(super) fn names(&self, id: &ObjectId) -> Names {
        Names::of(id, self.is_building())
    }

    /// The path of an object's file.
    pub(super) fn path_of(&self, id: &ObjectId) -> PathBuf {
        self.path.join(self.names(id).object())
    }

    /// How many changes that were made through this value a SoftHSM overwrote with an older copy, as far as that was
    /// noticed. Each of them is a warning in the diagnostics.
    #[must_use]
    pub fn overwritten(&self) -> u64 {
        self.changes().count()
    }

    /// Says so if a version that somebody wrote on top of one of ours lacks a change of ours.
    pub(super) fn notice(&self, id: &ObjectId, generation: Option<u64>, attributes: &Attributes) {
        let lost = self
            .changes()
            .overwritten(id, generation.unwrap_or(0), attributes);
        let said = [
            (
                lost.values,
                "with what looks like its older copy; make it again, unless somebody has set the earlier value on purpose",
            ),
            (
                lost.removals,
                "with what looks like its older copy, or since objects of this class have it: what was removed is back",
            ),
        ];
        for (types, how) in said {
            if types.is_empty() {
                continue;
            }
            let names: Vec<String> = types.into_iter().map(name_of).collect();
            self.diagnostics.warning(format!(
                "{}: SoftHSM overwrote a change of {} made through tokenfs {how}",
                self.path_of(id).display(),
                names.join(", ")
            ));
        }
    }

    /// Says so if a change of ours that is young enough to be remembered is not there any more.
    fn look_for_overwritten(&self, id: &ObjectId, patience: Patience) -> Result<()> {
        if !self.changes().has(id) {
            return Ok(());
        }
        match self.read(id, patience) {
            Ok(reading) => {
                if let Ok(decoded) = &reading.version.content {
                    self.notice(id, decoded.generation, &decoded.attributes);
                }
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn stat(&self, id: &ObjectId) -> Result<FileStat> {
        super::guard::stat_regular(self.directory(), self.names(id).object())
            .map_err(|error| error.at(self.path_of(id)))
    }

    /// What is in an object's file, whether it makes sense or not.
    pub(super) fn read(&self, id: &ObjectId, patience: Patience) -> Result<Reading> {
        let names = self.names(id);
        read_file(
            self.directory(),
            names.object(),
            names.lock(),
            self.is_building(),
            patience,
        )
        .map_err(|error| error.at(self.path_of(id)))
    }

    /// What `wanted` makes of the names of the regular files in the directory.
    pub(super) fn regular_files<T>(&self, wanted: impl Fn(&OsStr) -> Option<T>) -> Result<Vec<T>> {
        let failed = |what, errno| Error::system(what, errno).at(&self.path);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut directory = Dir::openat(&self.directory, ".", flags, Mode::empty())
            .map_err(|errno| failed("open", errno))?;
        let mut names = Vec::new();
        for entry in directory.iter() {
            let entry = entry.map_err(|errno| failed("read the directory", errno))?;
            let file = OsStr::from_bytes(entry.file_name().to_bytes());
            let Some(name) = wanted(file) else {
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
        Ok(names)
    }

    /// Turns what was read into an object, and says what is odd about it.
    fn settle(&self, id: &ObjectId, version: Version, bytes: &[u8]) -> Result<Arc<Object>> {
        let path = || self.path_of(id);
        match version.content {
            Ok(decoded) => {
                self.notice(id, decoded.generation, &decoded.attributes);
                if let Some(offset) = decoded.trailing {
                    self.diagnostics.warning(format!(
                        "{}: bytes that are no attribute follow at byte {offset}; SoftHSM ignores them, \
                         and attributes may have been lost",
                        path().display()
                    ));
                }
                let canonical = decoded.generation.is_some_and(|generation| {
                    encoded_length(&decoded.attributes) == bytes.len() as u64
                        && encode(generation, &decoded.attributes) == bytes
                });
                Ok(Arc::new(Object {
                    metadata: version.metadata,
                    generation: decoded.generation,
                    canonical,
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
        let mut names = self.regular_files(object_name)?;
        names.sort_unstable();
        // What is gone is not kept.
        self.cache().retain(|id, _| match id {
            ObjectId::Token => true,
            ObjectId::Object(name) => names.binary_search(name).is_ok(),
        });
        Ok(names.into())
    }

    fn object_metadata(&self, id: &ObjectId, _patience: Patience) -> Result<Metadata> {
        let path = self.path_of(id);
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
        // The locks are given back.
        let Reading { version, bytes, .. } = self.read(id, patience)?;
        let stamp = version.stamp;
        let mut object = self.settle(id, version, &bytes);
        if let (Ok(new), Some(known)) = (&object, &known)
            && let Ok(old) = &known.object
            && known.stamp == stamp
            && (old.generation, old.canonical) == (new.generation, new.canonical)
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

    fn layout(&self, _patience: Patience) -> Result<Vec<LayoutFile>> {
        self.files()
    }

    fn layout_metadata(&self, file: &LayoutFile, _patience: Patience) -> Result<(Metadata, u64)> {
        self.file_metadata(file)
    }

    fn layout_read(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, Vec<u8>)> {
        self.read_as_it_is(file, patience)
    }

    fn update(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.change(id, edit, mtime, patience)
            .map_err(|error| error.at(self.path_of(id)))
    }

    fn check_name(&self, name: &ObjectName) -> Result<()> {
        Names::of_new(name).map(drop)
    }

    fn create(&self, name: &ObjectName, new: &NewObject, patience: Patience) -> Result<()> {
        self.make(name, new, patience)
            .map_err(|error| error.at(self.path_of(&ObjectId::Object(name.clone()))))
    }

    fn remove_if(
        &self,
        name: &ObjectName,
        check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        self.unmake(name, check, patience)
            .map_err(|error| error.at(self.path_of(&ObjectId::Object(name.clone()))))
    }

    fn replace_damaged(
        &self,
        name: &ObjectName,
        new: Option<&NewObject>,
        patience: Patience,
    ) -> Result<()> {
        self.replace(name, new, patience)
            .map_err(|error| error.at(self.path_of(&ObjectId::Object(name.clone()))))
    }

    fn rename(&self, from: &ObjectName, to: &ObjectName, patience: Patience) -> Result<()> {
        self.give_name(from, to, patience)
            .map_err(|error| error.at(self.path_of(&ObjectId::Object(from.clone()))))
    }

    fn look_after(&self, file: &LayoutFile, patience: Patience) -> Result<()> {
        let id = match file {
            LayoutFile::Object(id) => id,
            LayoutFile::Lock(_) => return Ok(()),
            LayoutFile::Generation => {
                return self
                    .tell_again(patience)
                    .map_err(|error| error.at(self.path.join(super::GENERATION)));
            }
        };
        let seen_to = match id {
            ObjectId::Object(name) => self.look_after_departed(name, patience),
            ObjectId::Token => Ok(()),
        };
        seen_to
            .and_then(|()| self.look_for_overwritten(id, patience))
            .map_err(|error| error.at(self.path_of(id)))
    }

    fn look_after_all(&self, patience: Patience) {
        let changed = self.changes().objects();
        for id in changed {
            if let Err(error) = self.look_for_overwritten(&id, patience) {
                self.diagnostics.error(&error.at(self.path_of(&id)));
            }
        }
    }

    fn set_metadata(
        &self,
        target: &Target,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        self.change_metadata(target, change, patience)
            .map_err(|error| match target {
                Target::Directory => error.at(&self.path),
                Target::Object(id) => error.at(self.path_of(id)),
            })
    }

    fn sync(&self, patience: Patience) -> Result<()> {
        self.sync_all(patience)
            .map_err(|error| error.at(&self.path))
    }

    fn hold(&self, wait: Duration) -> Result<Hold> {
        self.keep(wait)
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
