//! Making and removing objects, and changing their modes, owners and times.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::sync::PoisonError;

use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::sys::stat::{FileStat, fstat};
use rustix::fs::{AtFlags as LinkFlags, linkat};
use rustix::io::Errno as Refusal;

use super::FileToken;
use super::attire::{access_of, apply, apply_to_open, set_access, set_mtime};
use super::change::{check_storable, encode_checked, following};
use super::generation::{Generation, Locked, microseconds};
use super::guard::{
    Temporary, Transaction, dress_lock_file, exists, stat_regular, sync, unlink_if_there,
};
use super::names::{Names, too_long};
use super::read::{Reading, is_named, open_regular, read_locked, settled};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::crash::point;
use crate::store::rename::rename_to_free;
use crate::store::sync::sync_directory;
use crate::store::{
    MetadataChange, NewObject, ObjectId, ObjectName, Patience, Target, lock, validate,
};

impl FileToken {
    pub(super) fn make(
        &self,
        name: &ObjectName,
        new: &NewObject,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        let names = Names::of_new(name)?;
        check_storable(&new.attributes)?;
        validate::check(None, &new.attributes)?;
        // A SoftHSM that knows another object by that name, of a moment ago, would take this for it if it had the number of that.
        let generation = following(Some(microseconds()));
        let bytes = encode_checked(generation, &new.attributes)?;
        let directory = self.directory();
        if exists(directory, names.object()) {
            return Err(already());
        }
        let lock_name = names.lock().unwrap_or(Path::new(""));
        let transaction = Transaction::take(directory, lock_name, new.access, patience)?;
        if !transaction.made && !exists(directory, names.object()) {
            // It was left of another one, and the owner of this one could not open it.
            dress_lock_file(&transaction.file, new.access);
        }
        let departed = self.arrive(name);
        match self.make_locked(&names, new, &bytes, patience) {
            Ok(()) => {
                self.changes().forget(&ObjectId::Object(name.clone()));
                Ok(())
            }
            Err(error) => {
                self.arrive_not(name, departed);
                if !exists(directory, names.object()) {
                    transaction.give_up(directory, lock_name);
                }
                Err(error)
            }
        }
    }

    fn make_locked(
        &self,
        names: &Names,
        new: &NewObject,
        bytes: &[u8],
        patience: Patience,
    ) -> Result<()> {
        let directory = self.directory();
        let building = self.is_building();
        self.clear_temporary(names, patience)?;
        // Of an object that is gone.
        unlink_if_there(directory, names.journal())?;
        let mut file = Temporary::new(directory, names.next())?;
        point("file.create.made");
        set_access(&file.file, new.access)?;
        point("file.create.dressed");
        file.write(bytes)?;
        point("file.create.written");
        if new.mtime.is_some() {
            set_mtime(&file.file, new.mtime)?;
            point("file.create.dated");
        }
        if !building {
            sync(&file.file)?;
            point("file.create.synced");
            self.born.remember(&file.file);
        }
        let generation = self.lock_generation(patience)?;
        let linked = linkat(
            directory,
            names.next(),
            directory,
            names.object(),
            LinkFlags::empty(),
        );
        match linked {
            Ok(()) => {}
            Err(Refusal::EXIST) => return Err(already()),
            // A file system without hard links. A crash before the next step leaves no trace there of what SoftHSM was not told.
            Err(Refusal::PERM | Refusal::OPNOTSUPP | Refusal::NOSYS | Refusal::MLINK) => {
                let renamed = rename_to_free(directory, names.next(), names.object());
                renamed.map_err(|errno| match errno {
                    Errno::EEXIST => already(),
                    errno => Error::system("rename", errno),
                })?;
            }
            Err(errno) => {
                let errno = Errno::from_raw(errno.raw_os_error());
                return Err(Error::system("link", errno));
            }
        }
        point("file.create.linked");
        if let Err(error) = self.tell(generation, patience) {
            // An object that SoftHSM is not told of is none.
            match unlink_if_there(directory, names.object()) {
                Ok(_) => return Err(error),
                Err(kept) => self.say_untold(names, &error, &kept),
            }
        }
        point("file.create.told");
        // Takes away the other name.
        drop(file);
        point("file.create.done");
        Ok(())
    }

    pub(super) fn unmake(
        &self,
        name: &ObjectName,
        check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        let id = ObjectId::Object(name.clone());
        let names = self.names(&id);
        let reading = settled(self.is_building(), patience, || {
            self.attempt_to_unmake(&names, patience)
        })?;
        let content = reading.version.content.as_ref();
        check(
            content
                .map(|decoded| &decoded.attributes)
                .map_err(Clone::clone),
        )?;
        self.unmake_locked(&id, &names, patience)
    }

    /// An object, locked to be removed.
    fn attempt_to_unmake(&self, names: &Names, patience: Patience) -> Result<Option<Reading>> {
        let directory = self.directory();
        let lock_name = names.lock().unwrap_or(Path::new(""));
        let stat = stat_regular(directory, names.object())?;
        let transaction = Transaction::take(directory, lock_name, access_of(&stat), patience)?;
        let file = match open_regular(directory, names.object(), OFlag::O_RDONLY) {
            Ok(file) => file,
            Err(error) => {
                if !exists(directory, names.object()) {
                    transaction.give_up(directory, lock_name);
                }
                return Err(error);
            }
        };
        if !self.is_building()
            && let Some(left) = self.born.until_grown(&file, Some(&transaction.file))
        {
            // SoftHSM would go on making it, and it would be there again.
            drop(transaction);
            patience.wait(left, "SoftHSM may still be making this object")?;
            return Ok(None);
        }
        let reading = lock::lock_shared(&file, patience)
            .and_then(|()| read_locked(directory, names.object(), file, None));
        match reading {
            Ok(reading) => Ok(reading.map(|mut reading| {
                reading.transaction = Some(transaction.file);
                reading
            })),
            Err(error) => {
                if !exists(directory, names.object()) {
                    transaction.give_up(directory, lock_name);
                }
                Err(error)
            }
        }
    }

    /// Removes an object whose lock is held.
    pub(super) fn unmake_locked(
        &self,
        id: &ObjectId,
        names: &Names,
        patience: Patience,
    ) -> Result<()> {
        let directory = self.directory();
        let building = self.is_building();
        let lock_name = names.lock().unwrap_or(Path::new(""));
        self.clear_temporary(names, patience)?;
        let gone = |errno| match errno {
            Errno::ENOENT => {
                let _ = unlink_if_there(directory, lock_name);
                Error::not_found("SoftHSM has destroyed it meanwhile")
            }
            errno => Error::system("remove", errno),
        };
        let generation = self.lock_generation(patience)?;
        let last = if building {
            None
        } else {
            self.fingerprint(names)
        };
        if names.fit() {
            // Under another name, so that a crash leaves a trace of what SoftHSM has to be told.
            renameat(directory, names.object(), directory, names.next()).map_err(gone)?;
        } else {
            nix::unistd::unlinkat(
                directory,
                names.object(),
                nix::unistd::UnlinkatFlags::NoRemoveDir,
            )
            .map_err(gone)?;
        }
        point("file.remove.renamed");
        if let Err(error) = self.tell(generation, patience) {
            // An object that SoftHSM believes in is still there, if it can be given its name back.
            let back = if names.fit() {
                rename_to_free(directory, names.next(), names.object())
                    .map_err(|errno| Error::system("rename it back", errno))
            } else {
                Err(too_long())
            };
            match back {
                Ok(()) => return Err(error),
                Err(gone) => self.say_untold(names, &error, &gone),
            }
        }
        point("file.remove.told");
        // It is gone. What cannot be cleared away now is a leftover, as after a crash, and no reason to believe that it is there.
        if names.fit() {
            self.clear_away(names.next());
            point("file.remove.unlinked");
            self.clear_away(names.journal());
            point("file.remove.unjournalled");
        }
        if let ObjectId::Object(name) = id {
            self.depart(name, last, None, false);
        }
        self.clear_away(lock_name);
        point("file.remove.done");
        self.changes().forget(id);
        self.cache().remove(id);
        Ok(())
    }

    /// An object has come, gone, or got this name, SoftHSM could not be told, and it could not be undone: whoever asked for it goes by what there is.
    pub(super) fn say_untold(&self, names: &Names, error: &Error, undone: &Error) {
        self.diagnostics.error(&Error::new(
            error.kind(),
            format!(
                "{}, so that a running SoftHSM does not see what was made, removed or renamed here before it is started anew; and it stays so: {}",
                error.detail(),
                undone.detail()
            ),
        )
        .at(self.path.join(names.object())));
    }

    /// Unlinks what is left of an object that is gone.
    pub(super) fn clear_away(&self, name: &Path) {
        if let Err(error) = unlink_if_there(self.directory(), name) {
            let error = error.at(self.path.join(name));
            self.diagnostics.warning(format!(
                "{error}: it is left of an object that is gone, and goes with the next mount"
            ));
        }
    }

    pub(super) fn change_metadata(
        &self,
        target: &Target,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        let directory = self.directory();
        let id = match target {
            Target::Directory => {
                let _time = self.directory_time();
                return apply_to_open(directory, change);
            }
            Target::Object(id) => id,
        };
        let names = self.names(id);
        let stat = stat_regular(directory, names.object())?;
        // Keeps away whoever is about to put another file in its place that looks as this one does now. Where there is no lock
        // file, or none that we may open, the owner may still change what is his.
        let held = match names.lock() {
            None => None,
            Some(name) => match open_regular(directory, name, OFlag::O_RDWR) {
                Ok(file) => {
                    lock::lock_exclusive(&file, patience)?;
                    Some(file)
                }
                Err(_) => match open_regular(directory, name, OFlag::O_RDONLY) {
                    Ok(file) => {
                        lock::lock_shared(&file, patience)?;
                        Some(file)
                    }
                    Err(_) => None,
                },
            },
        };
        // Another object can have got its name while its lock was waited for: who may change that was not asked.
        let now = stat_regular(directory, names.object())?;
        let is_its = match (&held, names.lock()) {
            (Some(lock), Some(name)) => {
                let stat = fstat(lock).map_err(|errno| Error::system("stat", errno))?;
                is_named(directory, name, &stat)?
            }
            _ => true,
        };
        if !is_its || (now.st_uid, now.st_gid) != (stat.st_uid, stat.st_gid) {
            return Err(Error::not_found("another object has its name by now"));
        }
        apply(directory, names.object(), change)?;
        self.unsynced(names.object());
        let access = MetadataChange {
            atime: None,
            mtime: None,
            ..*change
        };
        if *id == ObjectId::Token && access != MetadataChange::default() {
            self.change_those_of_token(&stat, &access)?;
        }
        if let Some(lock) = held.filter(|_| access != MetadataChange::default()) {
            // Who may rename files here can have put somebody else's there.
            let found = fstat(&lock).map_err(|errno| Error::system("stat", errno))?;
            if found.st_uid == stat.st_uid && found.st_size == 0 {
                apply_to_open(&lock, &access)?;
            } else if let Some(name) = names.lock() {
                self.diagnostics.warning(format!(
                    "{}: this lock file has another owner than its object, or something in it, and is left as it is: chown it, or remove it and run tokenfs check --repair",
                    self.path.join(name).display()
                ));
            }
        }
        self.cache().remove(id);
        Ok(())
    }

    /// Gives what belongs to the token as a whole the mode and owner that its own object, which was `before`, has been given: whoever may use that has to
    /// be able to tell others that he has made or removed something.
    fn change_those_of_token(&self, before: &FileStat, access: &MetadataChange) -> Result<()> {
        for name in [super::GENERATION, super::TOKEN_LOCK] {
            let file = match open_regular(self.directory(), Path::new(name), OFlag::O_RDONLY) {
                Ok(file) => file,
                // What we may not open is not ours to give away.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::PermissionDenied
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error.at(self.path.join(name))),
            };
            let found = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
            // Who may rename files here can have put somebody else's there.
            if found.st_uid == before.st_uid {
                apply_to_open(&file, access)?;
            }
        }
        Ok(())
    }

    /// Waits until everything is on disk: the names in the directory, and what was written without waiting.
    pub(super) fn sync_all(&self, patience: Patience) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        self.check_writable(patience)?;
        if self.is_building() {
            // Nothing of it is there before it is published.
            return Ok(());
        }
        // One at a time: who comes second has to wait for what the first one has taken.
        let _alone = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out first, so that a mark that is set from here on stays.
        let pending = std::mem::take(&mut *self.pending());
        let synced = self.sync_names(&pending);
        if synced.is_err() {
            self.pending().extend(pending);
        }
        synced
    }

    fn sync_names(&self, names: &BTreeSet<OsString>) -> Result<()> {
        let directory = self.directory();
        for name in names {
            match open_regular(directory, Path::new(name), OFlag::O_RDONLY) {
                Ok(file) => sync(&file).map_err(|error| error.at(self.path.join(name)))?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // What we may change and not read: the directory's `fsync` has to do.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error.at(self.path.join(name))),
            }
        }
        sync_directory(directory)
    }

    /// Tells SoftHSM that an object has come or gone.
    pub(super) fn raise_generation(&self, patience: Patience) -> Result<()> {
        let locked = Generation::lock(self.directory(), patience)?;
        self.tell(Some(locked), patience)
    }

    /// What has to be held while an object comes or goes, to say so; nothing while nobody else looks at the token. The last lock to be taken.
    ///
    /// # Errors
    /// As [`Generation::lock`]: whatever would keep SoftHSM from being told is met before there is anything to tell.
    pub(super) fn lock_generation(&self, patience: Patience) -> Result<Option<Locked<'_>>> {
        if self.is_building() {
            return Ok(None);
        }
        Generation::lock(self.directory(), patience).map(Some)
    }

    /// Says it.
    ///
    /// # Errors
    /// As [`Locked::raise`].
    pub(super) fn tell(&self, generation: Option<Locked<'_>>, patience: Patience) -> Result<()> {
        let Some(generation) = generation else {
            return Ok(());
        };
        generation.raise(Some(&self.told), patience)?;
        self.unsynced(Path::new(super::GENERATION));
        Ok(())
    }

    /// Tells it once more what has come or gone, if somebody else has raised the number since and may have stepped over that.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] with [`Patience::Now`] if it is to be told; what reading and writing fail with.
    pub(super) fn tell_again(&self, patience: Patience) -> Result<()> {
        if !self.told.is_passed(self.directory())? {
            return Ok(());
        }
        if matches!(patience, Patience::Now) {
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "what was changed is told once more",
            ));
        }
        self.told.tell_again(self.directory(), patience)?;
        self.unsynced(Path::new(super::GENERATION));
        Ok(())
    }
}

pub(super) fn already() -> Error {
    Error::new(ErrorKind::Exists, "there is an object of that name")
}
