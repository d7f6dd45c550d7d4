//! Changing an object: the steps of [`crate::store::Token::update`], in their order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, renameat};
use nix::sys::stat::{FileStat, fstat, fstatat, stat};
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno as Refusal;

use super::attire::{access_of, apply_to_open, copy, set_access, set_mtime, set_times_to_now};
use super::departed::Departed;
use super::encode::encode;
use super::generation::microseconds;
use super::guard::{Temporary, Transaction, exists, stat_regular, sync, unlink_if_there};
use super::names::{Names, too_long};
use super::read::{LARGEST, Reading, is_named, open_regular, read_locked, settled};
use super::rewrite::{self, Recovered};
use super::{CKA_TOKENFS_FILLER, FileToken};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};
use crate::store::crash::point;
use crate::store::tokendir::replaced;
use crate::store::{Access, MetadataChange, ObjectId, Patience, Time, Token, lock, validate};

/// After how long it is looked again whether a file is what has come back.
const MOMENT: Duration = Duration::from_millis(2);

/// How an attempt to put a new version in place ended.
enum Attempt {
    /// It is in place.
    Done,
    /// The name has come to mean another file: nothing was done.
    Replaced,
    /// Another file cannot be what this one is, or cannot take its name: it has to be rewritten in place.
    InPlace,
}

impl FileToken {
    /// That something may be written, by a caller that can wait.
    pub(super) fn check_writable(&self, patience: Patience) -> Result<()> {
        if self.options.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the store is mounted read-only",
            ));
        }
        if matches!(patience, Patience::Now) && !self.is_building() {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "a write waits for locks and for the disk",
            ));
        }
        self.check_in_place()
    }

    /// That what has the name of the token's directory is the directory that is written into: with a parent of the tokendir it can be moved without
    /// anybody being told, and SoftHSM would see nothing of what is written. One that is gone says so itself.
    fn check_in_place(&self) -> Result<()> {
        if self.is_building() {
            return Ok(());
        }
        let directory = self.directory();
        let is = |stat: FileStat| (stat.st_dev, stat.st_ino);
        let opened = fstat(directory).map_err(|errno| Error::system("stat", errno))?;
        if opened.st_nlink == 0 || stat(&self.path).map(is) == Ok(is(opened)) {
            return Ok(());
        }
        let tokendir = fstatat(directory, "..", AtFlags::empty());
        let named = self.path.parent().map(stat);
        if named.is_some_and(|named| named.map(is) == tokendir.map(is)) {
            return Err(Error::not_found("another token has its name, or none"));
        }
        Err(replaced().at(&self.path))
    }

    pub(super) fn change(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        let names = self.names(id);
        loop {
            let reading = self.read_for_writing(&names, patience)?;
            let decoded = reading.version.content.clone()?;
            let old = decoded.attributes;
            self.notice(id, decoded.generation, &old);
            let mut new = old.clone();
            edit(&mut new)?;
            if new == old {
                match set_mtime(&reading.file, mtime) {
                    // Who may write a file and does not own it cannot choose its time: it has that of the write.
                    Err(error) if error.kind() == ErrorKind::NotPermitted => {
                        set_times_to_now(&reading.file)?;
                    }
                    set => set?,
                }
                point("file.update.touched");
                self.unsynced(names.object());
                return Ok(());
            }
            check_storable(&new)?;
            validate::check(Some(&old), &new)?;
            let generation = following(decoded.generation);
            let bytes = encode_checked(generation, &new)?;
            // What comes and goes beside the object for a moment is no change of the directory that anybody wants to see: without
            // this a backup of a token with the same objects would find its directory changed.
            let time = self.directory_time();
            let directory = self.metadata().map(|metadata| metadata.mtime);
            if self.put(id, &names, &reading, &bytes, (None, mtime))? {
                if let Ok(mtime) = directory {
                    self.restore_directory_time(mtime);
                }
                drop(time);
                // Before the locks are let go, so that nobody can have written on top of it.
                if !self.is_building() {
                    self.changes().remember(id, generation, &old, &new);
                }
                self.cache().remove(id);
                return Ok(());
            }
        }
    }

    /// The right to set the time of the directory. Nobody waits for a lock of SoftHSM who has it.
    pub(super) fn directory_time(&self) -> MutexGuard<'_, ()> {
        self.directory_time
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the time of the directory's last modification, as far as that is possible: it is not worth failing for.
    fn restore_directory_time(&self, mtime: SystemTime) {
        if self.is_building() {
            return;
        }
        let change = MetadataChange {
            mtime: Some(Time::At(mtime)),
            ..MetadataChange::default()
        };
        if let Err(error) = apply_to_open(self.directory(), &change) {
            log::debug!("{error}");
        }
    }

    /// An object, locked for a transaction and at rest. What a crash left of an earlier write is put right first.
    pub(super) fn read_for_writing(&self, names: &Names, patience: Patience) -> Result<Reading> {
        self.read_known_for_writing(names, None, patience)
    }

    /// The same of an object that may have come back, which SoftHSM is not just making, however young its file is.
    pub(super) fn read_known_for_writing(
        &self,
        names: &Names,
        departed: Option<&Departed>,
        patience: Patience,
    ) -> Result<Reading> {
        loop {
            let building = self.is_building();
            let reading = settled(building, patience, || {
                self.attempt(names, departed, patience)
            })?;
            if building {
                return Ok(reading);
            }
            match rewrite::recover(self.directory(), names, &reading)? {
                Recovered::Nothing => return Ok(reading),
                recovered => self.say_recovered(names, recovered),
            }
        }
    }

    fn attempt(
        &self,
        names: &Names,
        departed: Option<&Departed>,
        patience: Patience,
    ) -> Result<Option<Reading>> {
        let directory = self.directory();
        let transaction = match names.lock() {
            None => None,
            Some(name) => {
                let stat = stat_regular(directory, names.object())?;
                let transaction = Transaction::take(directory, name, access_of(&stat), patience)?;
                if !exists(directory, names.object()) {
                    transaction.give_up(directory, name);
                    return Err(Error::not_found("no such object"));
                }
                self.clear_temporary(names, patience)?;
                Some(transaction.file)
            }
        };
        let file = open_regular(directory, names.object(), OFlag::O_RDWR)?;
        lock::lock_exclusive(&file, patience)?;
        let left = match names.lock() {
            Some(_) if !self.is_building() => self.born.until_grown(&file, transaction.as_ref()),
            _ => None,
        };
        let reading = read_locked(directory, names.object(), file, transaction)?;
        let (Some(left), Some(young)) = (left, &reading) else {
            return Ok(reading);
        };
        let wait = match departed {
            Some(departed) if departed.is_resumed_by(&young.version) => return Ok(reading),
            // It may be seen for that when SoftHSM has written all of it.
            Some(_) => left.min(MOMENT),
            None => left,
        };
        // SoftHSM may be making it, with no other lock than that on the file.
        drop(reading);
        patience.wait(wait, "SoftHSM may still be making this object")?;
        Ok(None)
    }

    /// Puts the next version in place; nothing was done if the name means another file by now. It looks as the file before it, or as
    /// it is given.
    pub(super) fn put(
        &self,
        id: &ObjectId,
        names: &Names,
        reading: &Reading,
        bytes: &[u8],
        (access, mtime): (Option<Access>, Option<SystemTime>),
    ) -> Result<bool> {
        if *id == ObjectId::Token {
            if self.is_building() {
                self.rewrite_unseen(reading, bytes, mtime)?;
                return Ok(true);
            }
        } else {
            if !names.fit() {
                return Err(too_long());
            }
            match self.exchange(names, reading, bytes, (access, mtime))? {
                Attempt::Done => return Ok(true),
                Attempt::Replaced => return Ok(false),
                Attempt::InPlace => {}
            }
        }
        if i64::try_from(reading.bytes.len()) != Ok(reading.stat.st_size) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "too large to be rewritten, and this file system cannot exchange files; remove it first",
            ));
        }
        let unfinished = rewrite::rewrite(self.directory(), names, reading, bytes, mtime)?;
        if let Some(error) = unfinished {
            let error = error.at(self.path.join(names.object()));
            self.diagnostics
                .warning(format!("{error}; it is written all the same"));
        }
        Ok(true)
    }

    fn exchange(
        &self,
        names: &Names,
        reading: &Reading,
        bytes: &[u8],
        (access, mtime): (Option<Access>, Option<SystemTime>),
    ) -> Result<Attempt> {
        let directory = self.directory();
        let mut new = Temporary::new(directory, names.next())?;
        point("file.update.made");
        match access {
            Some(access) => set_access(&new.file, access)?,
            None if copy(&reading.file, &reading.stat, &new.file) => {}
            None => return Ok(Attempt::InPlace),
        }
        point("file.update.dressed");
        new.write(bytes)?;
        point("file.update.written");
        if mtime.is_some() {
            set_mtime(&new.file, mtime)?;
            point("file.update.dated");
        }
        if !self.is_building() {
            sync(&new.file)?;
            point("file.update.synced");
            self.born.remember(&new.file);
        }
        let exchange = || {
            renameat_with(
                directory,
                names.next(),
                directory,
                names.object(),
                RenameFlags::EXCHANGE,
            )
        };
        match exchange() {
            Ok(()) => {}
            // A plain rename would bring back what SoftHSM has destroyed meanwhile.
            Err(Refusal::NOENT) => {
                return Err(Error::not_found("SoftHSM has destroyed it meanwhile"));
            }
            Err(Refusal::INVAL | Refusal::NOSYS | Refusal::OPNOTSUPP) => {
                if access.is_none() {
                    return Ok(Attempt::InPlace);
                }
                // What is damaged need not be kept, and its mode and owner are not those of what takes its place.
                if !is_named(directory, names.object(), &reading.stat)? {
                    return Ok(Attempt::Replaced);
                }
                renameat(directory, names.next(), directory, names.object())
                    .map_err(|errno| Error::system("replace", errno))?;
                new.keep();
                if fstat(&reading.file).is_ok_and(|damaged| damaged.st_nlink == 0) {
                    disown(&reading.file);
                }
                point("file.update.done");
                return Ok(Attempt::Done);
            }
            Err(errno) => {
                let errno = Errno::from_raw(errno.raw_os_error());
                return Err(Error::system("exchange", errno));
            }
        }
        point("file.update.exchanged");
        // What has the temporary name now is the version before, if it is the file that is locked.
        let previous = fstatat(
            directory,
            names.next(),
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        if let Ok(previous) = previous
            && (previous.st_dev, previous.st_ino) != (reading.stat.st_dev, reading.stat.st_ino)
        {
            let back = exchange();
            point("file.update.exchanged-back");
            if let Err(errno) = back {
                // Whatever it is, it is not ours to delete.
                new.keep();
                let errno = Errno::from_raw(errno.raw_os_error());
                return Err(Error::system("exchange", errno));
            }
            return Ok(Attempt::Replaced);
        }
        // A SoftHSM may have it open and wait for its lock, to store what the object lacks (`P11Attribute::init`): it would count on from the number
        // that is in there, to that of the new version, and never read that. If it cannot be written it is as it was; and what has another name, in a
        // backup of hard links, stays what it is.
        if previous.is_ok_and(|previous| previous.st_nlink == 1) {
            disown(&reading.file);
        }
        drop(new);
        point("file.update.done");
        Ok(Attempt::Done)
    }

    /// Removes what a crash left of a write of an object whose `.lock` is held, and tells SoftHSM that an object may have
    /// come or gone with it.
    pub(super) fn clear_temporary(&self, names: &Names, patience: Patience) -> Result<()> {
        if self.is_building() || !names.fit() || !exists(self.directory(), names.next()) {
            return Ok(());
        }
        // First SoftHSM is told: after that nobody could know any more that it has to be.
        self.raise_generation(patience)?;
        if unlink_if_there(self.directory(), names.next())? {
            point("file.recover.cleared");
            self.diagnostics.warning(format!(
                "{}: removed what a crash had left of a write; the object is as it was before that or as it was to become",
                self.path.join(names.next()).display()
            ));
        }
        Ok(())
    }

    pub(super) fn say_recovered(&self, names: &Names, recovered: Recovered) {
        let path = self.path.join(names.journal());
        self.diagnostics.warning(match recovered {
            Recovered::Finished => format!(
                "{}: finished a write that a crash had cut short",
                path.display()
            ),
            _ => format!(
                "{}: removed the journal of a write that a crash had ended before or after the object was written",
                path.display()
            ),
        });
    }

    /// Writes the own object of a token that nobody else sees.
    fn rewrite_unseen(
        &self,
        reading: &Reading,
        bytes: &[u8],
        mtime: Option<SystemTime>,
    ) -> Result<()> {
        reading
            .file
            .write_all_at(bytes, 0)
            .and_then(|()| reading.file.set_len(bytes.len() as u64))
            .map_err(|error| Error::io("write", &error))?;
        point("file.build.token-written");
        if mtime.is_some() {
            set_mtime(&reading.file, mtime)?;
        }
        Ok(())
    }

    /// Remembers that a file was changed and not synced.
    pub(super) fn unsynced(&self, name: &Path) {
        self.pending().insert(name.as_os_str().to_os_string());
    }
}

/// Gives a file that is no version of anything any more a number that none has.
fn disown(file: &File) {
    let _ = file.write_all_at(&microseconds().to_be_bytes(), 0);
}

/// The generation after `generation`: 0 is skipped, and a file without one has 0.
pub(super) fn following(generation: Option<u64>) -> u64 {
    generation.unwrap_or(0).checked_add(1).unwrap_or(1)
}

/// The bytes of an object, if they are not more than are read again.
///
/// # Errors
/// [`ErrorKind::TooLarge`].
pub(super) fn encode_checked(generation: u64, attributes: &Attributes) -> Result<Vec<u8>> {
    let bytes = encode(generation, attributes);
    if bytes.len() as u64 > LARGEST {
        return Err(Error::new(
            ErrorKind::TooLarge,
            format!(
                "the object would have {} bytes, more than any ({LARGEST})",
                bytes.len()
            ),
        ));
    }
    Ok(bytes)
}

/// That the format can hold these attributes.
///
/// # Errors
/// [`ErrorKind::Invalid`].
pub(super) fn check_storable(attributes: &Attributes) -> Result<()> {
    check_types(attributes)?;
    for (key, value) in attributes.iter() {
        if key.attribute_type == CKA_TOKENFS_FILLER {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{CKA_TOKENFS_FILLER:#010x} is what tokenfs fills files up with"),
            ));
        }
        if let Value::Map(entries) = value {
            check_types(entries)?;
            if entries
                .iter()
                .any(|(_, entry)| matches!(entry, Value::Map(_)))
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "SoftHSM stores no attribute map in an attribute map",
                ));
            }
        }
    }
    Ok(())
}

/// That no type is there with two kinds.
fn check_types(attributes: &Attributes) -> Result<()> {
    let mut before = None;
    for (key, _) in attributes.iter() {
        if before == Some(key.attribute_type) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "an object of the file backend cannot have {} with two kinds",
                    super::noticed::name_of(key.attribute_type)
                ),
            ));
        }
        before = Some(key.attribute_type);
    }
    Ok(())
}
