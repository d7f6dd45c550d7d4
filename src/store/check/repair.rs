//! Mending what can be mended without a guess: lock files, modes, what a crash left. The content of an object is never touched.
//!
//! Each step looks again, under the lock where there is one, since the finding may be of a while ago. Nothing is opened but
//! lock files and `generation`: closing any other file could drop locks that this process holds through SQLite.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, fchmod, fchmodat, fstat, fstatat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat};

use super::place::{GENERATION, with};
use super::{Finding, Remedy, Report};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::db::DbToken;
use crate::store::file::{LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_OBJECT};
use crate::store::leftover::{JOURNAL_SUFFIX, NEW_SUFFIX};
use crate::store::metadata::{Stamp, is_file};
use crate::store::sync::sync_directory;
use crate::store::{Options, Patience, Store, Token, TokenName, lock, whole};

/// What [`repair()`] came to.
#[derive(Clone, Debug, Default)]
pub struct Repaired {
    /// What did not work.
    pub failures: Vec<Error>,
    /// What [`Store::recover`] said.
    pub log: String,
}

/// Mends what `report`, which is from [`super::check`], says can be mended. Afterwards one has to look again.
pub fn repair(store: &Store, report: &Report) -> Repaired {
    let mut repaired = Repaired::default();
    let remedies = |wanted: fn(&Remedy) -> bool| {
        report
            .findings
            .iter()
            .filter(move |finding| finding.remedy.as_ref().is_some_and(wanted))
    };
    // First, since the rest goes by what is there.
    let left = remedies(|remedy| matches!(remedy, Remedy::Recover));
    let tokens: BTreeSet<TokenName> = left.filter_map(|it| token_of(store, &it.path)).collect();
    if !tokens.is_empty()
        && let Err(error) = recover(store, &tokens, &mut repaired)
    {
        repaired.failures.push(error);
    }
    // Then modes, which what is made takes over.
    let modes = remedies(|remedy| matches!(remedy, Remedy::TakeBits(_)));
    let others = remedies(|remedy| !matches!(remedy, Remedy::Recover | Remedy::TakeBits(_)));
    for finding in modes.chain(others) {
        if let Err(error) = mend(store, finding) {
            // What is gone needs no mending.
            if error.kind() != ErrorKind::NotFound {
                repaired.failures.push(error.at(&finding.path));
            }
        }
    }
    repaired
}

fn writing(store: &Store) -> Options {
    Options {
        read_only: false,
        ..store.options().clone()
    }
}

/// The directory of the tokendir that a path is in.
fn token_of(store: &Store, path: &Path) -> Option<TokenName> {
    let relative = path.strip_prefix(store.path()).ok()?;
    TokenName::new(relative.iter().next()?)
}

fn recover(store: &Store, tokens: &BTreeSet<TokenName>, repaired: &mut Repaired) -> Result<()> {
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(store.path(), writing(store), Arc::clone(&log))?;
    for token in tokens {
        store.recover_token(token);
    }
    repaired.log = log.render();
    Ok(())
}

fn mend(store: &Store, finding: &Finding) -> Result<()> {
    let Some(remedy) = finding.remedy else {
        return Ok(());
    };
    if remedy == Remedy::RollBack {
        return roll_back(store, &finding.path);
    }
    let place = Place::of(store, &finding.path)?;
    match remedy {
        Remedy::MakeLock => make_lock(&place),
        Remedy::RemoveLock => remove_lock(&place),
        Remedy::RemoveDirectory => remove_directory(&place),
        Remedy::MakeGeneration => {
            make_generation(&place, Patience::at_most(store.options().lock_wait))
        }
        Remedy::TakeBits(bits) => take_bits(&place, bits),
        Remedy::Recover | Remedy::RollBack => Ok(()),
    }
}

/// A name in a directory that is open, below the tokendir.
struct Place {
    directory: OwnedFd,
    name: PathBuf,
}

impl Place {
    fn of(store: &Store, path: &Path) -> Result<Self> {
        let relative = path
            .strip_prefix(store.path())
            .map_err(|_| Error::not_found("not in this store"))?;
        let parts: Vec<Component<'_>> = relative.components().collect();
        let (within, name) = match parts.as_slice() {
            [Component::Normal(name)] => (OsStr::new("."), *name),
            [Component::Normal(token), Component::Normal(name)] => (*token, *name),
            _ => return Err(Error::not_found("not in this store")),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = openat(store.directory()?, within, flags, Mode::empty())
            .map_err(|errno| Error::system("open the directory", errno))?;
        Ok(Self {
            directory,
            name: name.into(),
        })
    }

    fn open(&self, flags: OFlag, mode: u32) -> Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        openat(&self.directory, &self.name, flags, mode)
            .map(File::from)
            .map_err(|errno| Error::system("open", errno))
    }

    fn stat(&self, name: &OsStr) -> Result<FileStat> {
        fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| Error::system("stat", errno))
    }

    fn has(&self, name: &OsStr) -> Result<bool> {
        match self.stat(name) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn unlink(&self) -> Result<()> {
        unlinkat(&self.directory, &self.name, UnlinkatFlags::NoRemoveDir)
            .map_err(|errno| Error::system("remove", errno))
    }

    fn sync(&self) -> Result<()> {
        sync_directory(&self.directory)
    }

    /// The name without `.lock`.
    fn stem(&self) -> Result<&OsStr> {
        let stem = self.name.as_os_str().as_bytes();
        let stem = stem.strip_suffix(LOCK_SUFFIX.as_bytes());
        stem.map(OsStr::from_bytes)
            .ok_or_else(|| Error::not_found("not a lock file"))
    }

    /// Makes the file with mode and owner of another one, and with this in it, or not at all; whether there was none.
    fn make_like(&self, like: &FileStat, content: &[u8]) -> Result<bool> {
        let failed = |error| Error::io("write", &error);
        let made = whole::make(&self.directory, &self.name, |file| {
            give(file, like)?;
            file.write_all_at(content, 0).map_err(failed)?;
            file.sync_all().map_err(failed)
        })?;
        Ok(made.is_some())
    }
}

/// Gives a new file the owner and the mode of another one.
fn give(file: &File, like: &FileStat) -> Result<()> {
    let stat = fstat(file).map_err(|errno| Error::system("stat", errno))?;
    if (stat.st_uid, stat.st_gid) != (like.st_uid, like.st_gid) {
        let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
        fchown(file, Some(uid), Some(gid)).map_err(|errno| Error::system("chown", errno))?;
    }
    let mode = Mode::from_bits_truncate(like.st_mode & 0o666);
    if stat.st_mode & 0o7777 == mode.bits() {
        return Ok(());
    }
    fchmod(file, mode).map_err(|errno| Error::system("chmod", errno))
}

/// Makes the lock file of an object, with its mode and owner.
fn make_lock(place: &Place) -> Result<()> {
    let object = with(place.stem()?, OBJECT_SUFFIX);
    let like = place.stat(&object)?;
    if !is_file(&like) {
        return Err(Error::not_found("not a regular file"));
    }
    if !place.make_like(&like, &[])? {
        return Ok(());
    }
    if !place.has(&object)? {
        // Destroyed at that moment, and SoftHSM did not find a lock file to delete.
        place.unlink()?;
    }
    place.sync()
}

/// Removes a lock file that is nobody's.
fn remove_lock(place: &Place) -> Result<()> {
    let stem = place.stem()?;
    let file = place.open(OFlag::O_RDWR, 0)?;
    if !try_exclusive(&file)? {
        // Somebody makes an object.
        return Ok(());
    }
    for ending in [OBJECT_SUFFIX, NEW_SUFFIX, JOURNAL_SUFFIX] {
        if place.has(&with(stem, ending))? {
            return Ok(());
        }
    }
    let opened = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    let named = place.stat(place.name.as_os_str())?;
    if opened.st_size != 0 || !Stamp::from(&opened).same_file(&Stamp::from(&named)) {
        return Ok(());
    }
    place.unlink()?;
    place.sync()
}

/// Removes a directory if nothing is in it.
fn remove_directory(place: &Place) -> Result<()> {
    match unlinkat(&place.directory, &place.name, UnlinkatFlags::RemoveDir) {
        Ok(()) => place.sync(),
        // Somebody makes a token of it.
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => Ok(()),
        Err(errno) => Err(Error::system("remove the directory", errno)),
    }
}

/// Makes the token's counter, or a new one of one that was cut short. SoftHSM would begin at 1 again, which a session that is open may
/// have seen before, and would then see nothing of what is made and deleted next. The number of microseconds since 1970 is more than any
/// that was ever counted to, and more than the one that an earlier repair has begun with.
fn make_generation(place: &Place, patience: Patience) -> Result<()> {
    if place.name.as_os_str() != GENERATION {
        return Ok(());
    }
    let like = place.stat(OsStr::new(TOKEN_OBJECT))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let count = now.map_or(1, |since| u64::try_from(since.as_micros()).unwrap_or(1));
    let count = count.to_be_bytes();
    if place.make_like(&like, &count)? {
        return place.sync();
    }
    let file = place.open(OFlag::O_RDWR, 0)?;
    lock::lock_exclusive(&file, patience)?;
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    // A SoftHSM may have been faster.
    if !is_file(&stat) || stat.st_size >= 8 {
        return Ok(());
    }
    if stat.st_size == 0 && stat.st_nlink == 1 {
        // Whoever made it may not have come to that, and it may belong to somebody else, who has.
        let _ = give(&file, &like);
    }
    file.write_all_at(&count, 0)
        .and_then(|()| file.sync_all())
        .map_err(|error| Error::io("write", &error))
}

/// Takes bits from a mode, and gives none.
fn take_bits(place: &Place, bits: u32) -> Result<()> {
    // Such a descriptor can be closed without dropping a lock, and belongs to what the name meant, whatever it means by then.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(&place.directory, &place.name, flags, Mode::empty())
        .map_err(|errno| Error::system("open", errno))?;
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    if !is_file(&stat) && !crate::store::metadata::is_directory(&stat) {
        return Ok(());
    }
    let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777 & !bits);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fchmodat(AT_FDCWD, path.as_str(), mode, FchmodatFlags::FollowSymlink)
        .map_err(|errno| Error::system("chmod", errno))
}

/// Opens a database for writing and reads it, for which SQLite rolls a left journal back.
fn roll_back(store: &Store, path: &Path) -> Result<()> {
    let directory = path.parent().ok_or_else(|| Error::not_found("no token"))?;
    let name = directory
        .file_name()
        .and_then(TokenName::new)
        .ok_or_else(|| Error::not_found("no token"))?;
    store.check_in_place()?;
    let log = Arc::new(Diagnostics::new());
    let token = DbToken::open(name, directory, writing(store), log)?;
    token
        .list(Patience::at_most(store.options().lock_wait))
        .map(drop)
}

/// Takes a write lock on all of a file until it is closed, if it is to be had.
fn try_exclusive(file: &File) -> Result<bool> {
    match lock::lock_exclusive(file, Patience::Now) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
