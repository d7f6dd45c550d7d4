//! What is in a token's directory, and who is let in.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, fstatat};

use super::finding::{MOVE, RESTORE};
use super::{Category, Finding, Look, Remedy, open_file};
use crate::error::{Error, ErrorKind, Result};
use crate::store::db::DATABASE;
use crate::store::file::{LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_OBJECT};
use crate::store::leftover::{BUILDING, JOURNAL_SUFFIX, NEW_SUFFIX, REMOVING};
use crate::store::metadata::{is_directory, is_file};
use crate::store::{Patience, acl, lock};

/// The token's counter of creations and deletions.
pub(super) const GENERATION: &str = "generation";

/// The bits that a mask is about here. What it takes from the owner lets in nobody.
const OTHERS: u32 = 0o077;

/// As SoftHSM tells files apart: by `lstat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    File,
    Directory,
    Other,
}

/// One name in a directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: OsString,
    pub sort: Sort,
}

impl Entry {
    /// The name without an ending, if it has that and something before it.
    pub fn stem(&self, ending: &str) -> Option<&OsStr> {
        let stem = self.name.as_bytes().strip_suffix(ending.as_bytes())?;
        (!stem.is_empty()).then(|| OsStr::from_bytes(stem))
    }
}

/// A name with an ending.
pub(super) fn with(stem: &OsStr, ending: &str) -> OsString {
    let mut name = stem.to_os_string();
    name.push(ending);
    name
}

/// What is in a directory, by name.
pub(super) fn entries(directory: impl AsFd, path: &Path) -> Result<Vec<Entry>> {
    let failed = |errno| Error::system("read the directory", errno).at(path);
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut listing = Dir::openat(directory.as_fd(), ".", flags, Mode::empty()).map_err(failed)?;
    let mut entries = Vec::new();
    for entry in listing.iter() {
        let entry = entry.map_err(failed)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let sort = match entry.file_type() {
            Some(Type::File) => Sort::File,
            Some(Type::Directory) => Sort::Directory,
            Some(_) => Sort::Other,
            None => match fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) if is_file(&stat) => Sort::File,
                Ok(stat) if is_directory(&stat) => Sort::Directory,
                Ok(_) => Sort::Other,
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(failed(errno)),
            },
        };
        entries.push(Entry {
            name: name.to_os_string(),
            sort,
        });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// What is there called `name` while nobody holds a write lock on the file `guard`; nothing if somebody does, or if it is gone.
fn left(look: &Look<'_>, name: &OsStr, guard: &OsStr) -> Result<Option<FileStat>> {
    let guard = match open_file(look, guard) {
        Ok(file) => match lock::lock_shared(&file, Patience::Now) {
            Ok(()) => Some(file),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        },
        // Whoever had it locked would have it there.
        Err(Errno::ENOENT) => None,
        Err(errno) => return Err(Error::system("open", errno)),
    };
    // A write may have ended since the directory was read.
    let stat = fstatat(&look.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
    drop(guard);
    match stat {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(Error::system("stat", errno)),
    }
}

/// The marks of a directory that is going to be a token, or was one. Whether there is one, in use or not.
pub(super) fn marks(look: &mut Look<'_>) -> bool {
    let mut marked = false;
    for (mark, detail) in [
        (
            BUILDING,
            "left by a crash or a failure while this token was being made",
        ),
        (
            REMOVING,
            "left by a crash or a failure while this token was being removed",
        ),
    ] {
        if look.entry(mark).is_none() {
            continue;
        }
        marked = true;
        leftover(look, OsStr::new(mark), OsStr::new(mark), detail);
    }
    marked
}

/// What tokenfs left: `name`, if the lock `guard` is free.
fn leftover(look: &mut Look<'_>, name: &OsStr, guard: &OsStr, detail: &str) {
    let path = look.path.join(name);
    match left(look, name, guard) {
        Ok(Some(stat)) => {
            let finding =
                Finding::new(Category::Leftover, detail).in_state(&(stat.st_dev, stat.st_ino));
            let finding = if look.lacks_its_own() {
                // What is left of it is somebody's keys.
                finding.advising(RESTORE)
            } else {
                finding.mended_by(Remedy::Recover)
            };
            look.report.found(finding, &path);
        }
        // It is being written, or was.
        Ok(None) => {}
        Err(error) => look.report.failed(error, &path),
    }
}

/// The files that do not belong into a token, or that a crash left in it.
pub(super) fn strangers(look: &mut Look<'_>) {
    for entry in look.entries.clone() {
        let name = entry.name.as_os_str();
        let path = look.path.join(name);
        if entry.sort != Sort::File {
            let what = match entry.sort {
                Sort::Directory => "a directory",
                _ => "neither a file nor a directory",
            };
            let object = if entry.stem(OBJECT_SUFFIX).is_some() {
                ", does not take it for an object"
            } else {
                ""
            };
            let detail = format!(
                "this is {what}; SoftHSM ignores it{object}, and cannot delete a token with it inside"
            );
            let finding = Finding::new(Category::Foreign, detail).advising(MOVE);
            look.report.found(finding, &path);
            continue;
        }
        let written = [
            (
                NEW_SUFFIX,
                "left by a crash or a failure while a file was being written, made or removed",
            ),
            (
                JOURNAL_SUFFIX,
                "left by a crash or a failure while a file was being rewritten in place",
            ),
        ];
        let written = written
            .into_iter()
            .find_map(|(ending, detail)| Some((entry.stem(ending)?, detail)));
        if let Some((stem, detail)) = written {
            let guard = if stem == DATABASE {
                OsString::from(BUILDING)
            } else if stem == "token" {
                OsString::from(TOKEN_OBJECT)
            } else {
                with(stem, LOCK_SUFFIX)
            };
            leftover(look, name, &guard, detail);
            continue;
        }
        let is_object = entry.stem(OBJECT_SUFFIX).is_some();
        let bytes = name.as_bytes();
        let ending = OBJECT_SUFFIX.as_bytes();
        let is_lock = || {
            entry.stem(LOCK_SUFFIX).is_some_and(|stem| {
                let object = with(stem, OBJECT_SUFFIX);
                look.entries.iter().any(|entry| entry.name == object)
            })
        };
        if !is_object && bytes.windows(ending.len()).any(|part| part == ending) && !is_lock() {
            let detail =
                "this looks like a copy of an object, or a part of one; SoftHSM ignores it";
            let finding = Finding::new(Category::Foreign, detail).advising(MOVE);
            look.report.found(finding, &path);
        }
    }
}

/// Holds what a token consists of against the mask.
pub(super) fn modes(look: &mut Look<'_>) {
    let mut owners = std::collections::BTreeSet::new();
    for entry in look.entries.clone() {
        let name = entry.name.as_os_str();
        let belongs = name == GENERATION
            || name.as_bytes().starts_with(DATABASE.as_bytes())
            || entry.stem(LOCK_SUFFIX).is_some()
            || entry
                .name
                .as_bytes()
                .windows(7)
                .any(|part| part == b".object")
            || entry.stem(NEW_SUFFIX).is_some()
            || entry.stem(JOURNAL_SUFFIX).is_some();
        if entry.sort != Sort::File || !belongs {
            continue;
        }
        let path = look.path.join(name);
        match fstatat(&look.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                owners.insert((stat.st_uid, stat.st_gid));
                judge_mode(look, &path, &stat);
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => look.report.failed(Error::system("stat", errno), &path),
        }
    }
    if owners.len() > 1 {
        let owners: Vec<String> = owners
            .iter()
            .map(|(uid, gid)| format!("{uid}:{gid}"))
            .collect();
        let sentence = format!("its files belong to different users: {}", owners.join(", "));
        let path = look.path.clone();
        look.report.note(&path, sentence);
    }
}

/// Holds the mode of a file or directory against the mask.
pub(super) fn judge_mode(look: &mut Look<'_>, path: &Path, stat: &FileStat) {
    let mode = stat.st_mode & 0o7777;
    let settings = look.settings;
    let forbidden = mode & settings.mask & OTHERS;
    if forbidden == 0 {
        return;
    }
    // Those bits of the group are then an upper limit for everybody whom the list names (`acl(5)`), so that to take them away
    // is to take them from all of these.
    let by_list = match rustix::fs::lgetxattr(path, acl::NAME, &mut [0u8; 1024][..]) {
        // Or one of more entries than that.
        Ok(1..) | Err(rustix::io::Errno::RANGE) => " (by an access control list)",
        _ => "",
    };
    let detail = format!(
        "its mode is {mode:04o}{by_list}, and the mask {:04o} forbids {forbidden:04o} of that",
        settings.mask
    );
    let finding = Finding::new(Category::Lax, detail)
        .in_state(&(stat.st_dev, stat.st_ino))
        .mended_by(Remedy::TakeBits(forbidden));
    look.report.found(finding, path);
}
