//! Writing: one transaction per change, on the token's one connection.
//!
//! A change is worked out and written under `begin immediate`, as SoftHSM's are: from then on nobody else can commit, and what
//! is changed is what is stored. Whoever dies on the way leaves a journal, which the next opener rolls back. A commit is
//! durable when it returns ([`Database::prepare`]), the removal of its journal included.
//!
//! The connection is not held while another process has the lock, so that readers of this process go on. It is held while a
//! commit waits for readers of other processes to finish, which keep nobody from reading but new ones.
//!
//! A commit of our own leaves `data_version` as it is, so that the snapshot is replaced by what has become of it: if nobody
//! else has committed until the new stamp is taken, nothing is scanned. What fails after the commit does not fail the change; it
//! costs a scan.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rusqlite::Connection;

use super::connection::{Database, stat};
use super::failure::{Failure, cannot_write, classify_write};
use super::snapshot::{Change, Snapshot, TOKEN_ROW};
use super::statements::{self, Plan};
use super::uuid::{Derived, derived, is_uuid};
use super::{Cached, DbToken, PAUSES, REOPENINGS, Slot, TAKEN, read, scan, times};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::crash::point;
use crate::store::damaged::{replaced_damaged, undamaged};
use crate::store::{Metadata, NewObject, ObjectId, ObjectName, Patience, Token, validate};

/// Why nothing is written.
pub(super) enum Stop {
    /// It is not to be; the database is as it was.
    Refused(Error),
    /// It could not be.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// What a change is made with, in its transaction.
pub(super) struct Work<'a> {
    token: &'a DbToken,
    pub(super) connection: &'a Connection,
    /// What is stored now.
    pub snapshot: &'a Snapshot,
    derived: &'a mut Derived,
    /// Whether names and times can be remembered.
    has_text: bool,
}

impl Work<'_> {
    pub(super) fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T, Stop> {
        result.map_err(|error| Stop::Failed(classify_write(&error, &self.token.path)))
    }

    fn run(&self, plan: &Plan, row: i64) -> Result<(), Stop> {
        if self.sql(plan.run(self.connection, row))? {
            return Ok(());
        }
        let detail = format!("a row of object {row} is found by its place and not by its type");
        Err(Failure::damaged(&self.token.path, detail).into())
    }

    fn remember_time(
        &self,
        row: i64,
        modified: SystemTime,
        attributes: &Attributes,
        is_new: bool,
    ) -> Result<Option<SystemTime>, Stop> {
        if !self.has_text {
            return Ok(None);
        }
        let text = times::text(modified, attributes);
        let remember = if is_new {
            statements::remember_first_time
        } else {
            statements::remember_time
        };
        self.sql(remember(self.connection, row, &text))?;
        // As it will be read.
        Ok(times::modified(&text, attributes))
    }

    fn update(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
    ) -> Result<Change, Stop> {
        let object = self.snapshot.object(id)?;
        let row = self.snapshot.row(id)?;
        let mut attributes = object.attributes.clone();
        edit(&mut attributes)?;
        validate::check(Some(&object.attributes), &attributes)?;
        let plan = Plan::new(&object.attributes, &attributes)?;
        self.run(&plan, row)?;
        let modified = mtime.unwrap_or_else(SystemTime::now);
        let modified = self.remember_time(row, modified, &attributes, false)?;
        Ok(Change::Put {
            id: id.clone(),
            row,
            attributes,
            modified,
        })
    }

    fn create(&mut self, name: &ObjectName, text: &str, new: &NewObject) -> Result<Change, Stop> {
        if self.snapshot.row(&ObjectId::Object(name.clone())).is_ok() {
            return Err(already(name).into());
        }
        self.insert(name, text, new)
    }

    fn insert(&mut self, name: &ObjectName, text: &str, new: &NewObject) -> Result<Change, Stop> {
        let plan = Plan::new(&Attributes::new(), &new.attributes)?;
        let highest = self.sql(statements::highest(self.connection))?;
        if highest < TOKEN_ROW {
            // It would become the token.
            let detail = "the table object lacks row 1, which is the token itself";
            return Err(Error::damaged(detail).into());
        }
        let wanted = self
            .derived
            .row(&self.token.name, text, (highest, self.token.built))
            // A SoftHSM that has seen the object which was in a row before takes whatever is there for that, and what it has read of it for its own.
            .filter(|row| self.token.built || *row > highest);
        let (row, is_wanted) = self.sql(statements::new_row(self.connection, wanted))?;
        if self.snapshot.leftovers {
            self.sql(statements::remove_leftovers(self.connection, row))?;
        }
        if !is_wanted {
            if !self.has_text {
                let detail = "the database has no table attribute_text, so that an object cannot have a name of its own";
                return Err(Error::damaged(detail).into());
            }
            self.sql(statements::remember_name(self.connection, row, text))?;
        }
        self.run(&plan, row)?;
        let modified = new.mtime.unwrap_or_else(SystemTime::now);
        let modified = self.remember_time(row, modified, &new.attributes, true)?;
        Ok(Change::Put {
            id: ObjectId::Object(name.clone()),
            row,
            attributes: new.attributes.clone(),
            modified,
        })
    }

    /// `None` if the object has that name.
    fn rename(
        &mut self,
        from: &ObjectName,
        to: &ObjectName,
        text: &str,
    ) -> Result<Option<Change>, Stop> {
        let id = ObjectId::Object(from.clone());
        let row = self.snapshot.row(&id)?;
        if from == to {
            return Ok(None);
        }
        if self.snapshot.row(&ObjectId::Object(to.clone())).is_ok() {
            return Err(already(to).into());
        }
        if !self.has_text {
            let detail = "the database has no table attribute_text, so that an object cannot have a name of its own";
            return Err(Error::damaged(detail).into());
        }
        self.sql(statements::forget_name(self.connection, row))?;
        if derived(&self.token.name, row) != text {
            let highest = self.sql(statements::highest(self.connection))?;
            let of = self
                .derived
                .row(&self.token.name, text, (highest, self.token.built));
            if let Some(of) = of.filter(|of| *of > highest) {
                // The name belongs first to a row that SoftHSM would make one day: that one is never made then.
                self.sql(statements::use_up(self.connection, of))?;
            }
            self.sql(statements::remember_name(self.connection, row, text))?;
        }
        point("db.renamed");
        // The time would be that of this commit if it were not remembered. A damaged object has none of its own.
        let modified = match self.snapshot.object(&id) {
            Ok(object) => {
                self.remember_time(row, object.metadata.mtime, &object.attributes, false)?
            }
            Err(_) => None,
        };
        Ok(Some(Change::Renamed {
            from: from.clone(),
            to: to.clone(),
            modified,
        }))
    }

    fn remove(&self, name: &ObjectName) -> Result<Change, Stop> {
        let row = self.snapshot.row(&ObjectId::Object(name.clone()))?;
        self.sql(statements::remove(self.connection, row))?;
        Ok(Change::Removed(name.clone()))
    }

    /// Also says what was wrong with the object that was there.
    fn replace(
        &mut self,
        name: &ObjectName,
        new: Option<(&str, &NewObject)>,
    ) -> Result<(Change, Error), Stop> {
        let damage = match self.snapshot.object(&ObjectId::Object(name.clone())) {
            Ok(_) => return Err(undamaged().into()),
            Err(error) if error.kind() == ErrorKind::Damaged => error,
            Err(error) => return Err(error.into()),
        };
        let removed = self.remove(name)?;
        let change = match new {
            Some((text, new)) => self.insert(name, text, new)?,
            None => removed,
        };
        Ok((change, damage))
    }
}

/// `begin immediate`, until it is committed; rolled back otherwise.
struct Transaction<'a>(&'a Connection);

impl<'a> Transaction<'a> {
    fn begin(connection: &'a Connection) -> rusqlite::Result<Self> {
        connection.execute_batch("begin immediate")?;
        Ok(Self(connection))
    }

    /// One attempt. If it fails because others are still reading, it can be repeated.
    fn commit(&self) -> rusqlite::Result<()> {
        self.0.execute_batch("commit")
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // What cannot be rolled back now is when the connection is closed, or by the next opener.
        if !self.0.is_autocommit() {
            let _ = self.0.execute_batch("rollback");
        }
    }
}

fn already(name: &ObjectName) -> Error {
    let detail = format!("the token has an object {name} already");
    Error::new(ErrorKind::Exists, detail)
}

/// A name as text, if an object can have it.
///
/// # Errors
/// [`ErrorKind::Invalid`] if it is no UUID.
pub(in crate::store) fn uuid_of(name: &ObjectName) -> Result<&str> {
    let text = name.as_os_str().to_str().filter(|text| is_uuid(text));
    text.ok_or_else(|| {
        let detail = format!(
            "{name} is no UUID, and an object of the db backend is called by one; uuidgen makes them"
        );
        Error::new(ErrorKind::Invalid, detail)
    })
}

impl DbToken {
    /// Whether anything can be written with `patience`, and with how much of it.
    ///
    /// # Errors
    /// Of kind `ReadOnly` or `WouldBlock` if not.
    pub(super) fn may_write(&self, patience: Patience) -> Result<Patience> {
        if self.options.read_only {
            let detail = "the store is mounted read-only";
            return Err(Error::new(ErrorKind::ReadOnly, detail).at(&self.path));
        }
        match patience {
            // Nobody else knows of it.
            Patience::Now if self.built => Ok(Patience::at_most(self.options.lock_wait)),
            Patience::Now => {
                let detail = "writing takes its time";
                Err(Error::new(ErrorKind::WouldBlock, detail).at(&self.path))
            }
            until @ Patience::Until(_) => Ok(until),
        }
    }

    pub(super) fn write_update(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.write(patience, &mut |work| work.update(id, edit, mtime).map(Some))
    }

    pub(super) fn write_new(
        &self,
        name: &ObjectName,
        new: &NewObject,
        patience: Patience,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        let refuse = |error: Error| error.at(&self.path);
        let text = uuid_of(name).map_err(refuse)?;
        validate::check(None, &new.attributes).map_err(refuse)?;
        self.write(patience, &mut |work| work.create(name, text, new).map(Some))
    }

    pub(super) fn write_many(
        &self,
        new: &[(ObjectName, NewObject)],
        made: &mut dyn FnMut() -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        let refuse = |error: Error| error.at(&self.path);
        let mut texts = Vec::with_capacity(new.len());
        let mut names = HashSet::with_capacity(new.len());
        for (name, object) in new {
            texts.push(uuid_of(name).map_err(refuse)?);
            validate::check(None, &object.attributes).map_err(refuse)?;
            if !names.insert(name) {
                return Err(refuse(already(name)));
            }
        }
        self.write(patience, &mut |work| {
            for ((name, object), text) in new.iter().zip(&texts) {
                work.create(name, text, object)?;
                made()?;
            }
            Ok((!new.is_empty()).then_some(Change::Many))
        })
    }

    pub(super) fn write_removal(
        &self,
        name: &ObjectName,
        check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        self.write(patience, &mut |work| {
            let id = ObjectId::Object(name.clone());
            let object = work.snapshot.object(&id);
            check(
                object
                    .as_ref()
                    .map(|object| &object.attributes)
                    .map_err(Clone::clone),
            )?;
            work.remove(name).map(Some)
        })
    }

    pub(super) fn write_replacement(
        &self,
        name: &ObjectName,
        new: Option<&NewObject>,
        patience: Patience,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        let refuse = |error: Error| error.at(&self.path);
        let text = uuid_of(name).map_err(refuse)?;
        if let Some(new) = new {
            validate::check(None, &new.attributes).map_err(refuse)?;
        }
        let mut damage = None;
        self.write(patience, &mut |work| {
            let (change, found) = work.replace(name, new.map(|new| (text, new)))?;
            damage = Some(found);
            Ok(Some(change))
        })?;
        if let Some(damage) = damage {
            let said = replaced_damaged(name, &damage, new);
            self.diagnostics
                .warning(format!("{}: {said}", self.path.display()));
        }
        Ok(())
    }

    pub(super) fn write_name(
        &self,
        from: &ObjectName,
        to: &ObjectName,
        patience: Patience,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        let text = uuid_of(to).map_err(|error| error.at(&self.path))?;
        self.write(patience, &mut |work| work.rename(from, to, text))
    }

    /// Does `act` in a transaction, as often as it takes to get through. If it gives no change, nothing is committed.
    pub(super) fn write(
        &self,
        patience: Patience,
        act: &mut dyn FnMut(&mut Work<'_>) -> Result<Option<Change>, Stop>,
    ) -> Result<()> {
        let patience = self.may_write(patience)?;
        let (mut pause, longest) = PAUSES;
        let mut reopenings = 0;
        loop {
            let held = self.connection.lock(patience, TAKEN);
            let mut slot = held.map_err(|error| error.at(&self.path))?;
            let done = self.attempt(&mut slot, patience, act);
            let unclear = matches!(
                done,
                Err(Stop::Failed(Failure::Content(_) | Failure::Other(_)))
            );
            let idle = |open: &Database| open.connection.is_autocommit();
            if unclear || !slot.database.as_ref().is_none_or(idle) {
                // Closing the connection rolls back what is not. The snapshot is not worth keeping: it may be that only the
                // answer was lost.
                slot.database = None;
                self.forget();
            }
            drop(slot);
            match done {
                Ok(true) => return Ok(()),
                Ok(false) if reopenings < REOPENINGS => reopenings += 1,
                Ok(false) | Err(Stop::Failed(Failure::Taken)) => {
                    let waited = patience.wait(pause, TAKEN);
                    waited.map_err(|error| error.at(&self.path))?;
                    pause = (pause * 2).min(longest);
                }
                Err(
                    Stop::Refused(error)
                    | Stop::Failed(Failure::Content(error) | Failure::Other(error)),
                ) => {
                    return Err(error.at(&self.path));
                }
            }
        }
    }

    /// One attempt. `false` asks for another one, with another connection.
    fn attempt(
        &self,
        slot: &mut Slot,
        patience: Patience,
        act: &mut dyn FnMut(&mut Work<'_>) -> Result<Option<Change>, Stop>,
    ) -> Result<bool, Stop> {
        let before = stat(&self.path).map_err(Failure::Other)?;
        let fresh = self.connect(slot, &before)?;
        let Slot {
            database,
            warned,
            derived,
            ..
        } = slot;
        let Some(open) = database else {
            return Ok(false);
        };
        let fail = |error| Stop::Failed(classify_write(&error, &self.path));
        if open.connection.is_readonly("main").map_err(fail)? {
            // SQLite has opened it for reading, because there was no more to be had then.
            match cannot_write(&self.path) {
                Some(error) => return Err(error.into()),
                None if fresh => {
                    let detail = "SQLite opens the database for reading only";
                    return Err(Error::new(ErrorKind::ReadOnly, detail).into());
                }
                None => {
                    *database = None;
                    return Ok(false);
                }
            }
        }
        open.prepare(self.built).map_err(fail)?;
        let transaction = Transaction::begin(&open.connection).map_err(fail)?;
        point("db.begun");
        let known = self.known();
        let version = known.as_ref().map(|(version, _)| *version);
        let outcome = match read::look(open, &self.path, version, |_| true) {
            // Perhaps only SQLite's cache of pages is wrong.
            Err(Failure::Content(_)) if !fresh => read::Outcome::Stale,
            outcome => outcome?,
        };
        let Some((seen, snapshot)) = self.absorb(outcome, known, warned) else {
            drop(transaction);
            *database = None;
            return Ok(false);
        };
        let mut work = Work {
            token: self,
            connection: &open.connection,
            snapshot: &snapshot,
            derived,
            has_text: scan::has_text(&open.connection).map_err(fail)?,
        };
        // A journal comes and goes with each commit, which is no change of the directory that anybody wants to see: without this a
        // backup of an unchanged token would find its directory changed.
        let directory = self.metadata().map(|metadata| metadata.mtime);
        let Some(change) = act(&mut work)? else {
            return Ok(true);
        };
        point("db.written");
        self.commit(&transaction, patience)?;
        drop(transaction);
        point("db.committed");
        self.sync_committed();
        if let Ok(mtime) = directory {
            self.restore_directory_time(mtime);
        }
        self.replace(open, seen.version, &snapshot, change);
        point("db.replaced");
        Ok(true)
    }

    fn commit(&self, transaction: &Transaction<'_>, patience: Patience) -> Result<(), Stop> {
        let (mut pause, longest) = PAUSES;
        loop {
            match transaction.commit() {
                Ok(()) => return Ok(()),
                Err(error) => match classify_write(&error, &self.path) {
                    // Somebody is still reading; nobody new can begin to. It is written all the same, but for the lock.
                    Failure::Taken if !transaction.0.is_autocommit() => {
                        patience.wait(pause, TAKEN)?;
                        pause = (pause * 2).min(longest).min(Duration::from_millis(5));
                    }
                    failure => return Err(failure.into()),
                },
            }
        }
    }

    /// The journal that is gone stays so after a power failure. What fails here undoes nothing: the change is there, for everybody, and `fsync` says so
    /// that it may not last.
    fn sync_committed(&self) {
        if self.built {
            return;
        }
        if let Err(error) = self.sync_directory() {
            self.diagnostics.error(
                &Error::new(
                    error.kind(),
                    format!(
                        "{}: what was just written is there, and a power failure may undo it",
                        error.detail()
                    ),
                )
                .at(&self.path),
            );
        }
        point("db.synced");
    }

    /// What is known after a commit of our own to what was `snapshot`.
    fn replace(
        &self,
        database: &Database,
        before: read::Version,
        snapshot: &Snapshot,
        change: Change,
    ) {
        let next = match read::after_commit(database, &self.path) {
            Ok(Some(seen)) if seen.version.same_content(&before) => {
                let metadata = Metadata::of_path(&self.path, &seen.stat);
                snapshot.after(change, metadata).map(|next| Cached {
                    stamp: seen.version.stamp,
                    settled: seen.settled,
                    content: Ok((seen.version, Arc::new(next))),
                })
            }
            _ => None,
        };
        match next {
            Some(cached) => self.remember(cached),
            None => self.forget(),
        }
    }
}
