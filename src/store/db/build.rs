//! A token that does not exist yet: a database under a name that SoftHSM does not look for.
//!
//! Assumes that nobody else uses the directory. Until it is published nothing is synced and no journal is written; a crash
//! leaves a file that means nothing. `store::leftover` has its name.

use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;
use std::sync::Arc;

use nix::libc;
use rusqlite::Connection;
use rustix::fs::CWD;

use super::connection::{Database, stat};
use super::failure::{Failure, classify_write};
use super::snapshot::TOKEN_ROW;
use super::statements;
use super::uuid::Derived;
use super::{DATABASE, DbToken, Slot, TAKEN};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::leftover::NEW_SUFFIX;
use crate::store::rename::rename_to_free;
use crate::store::{Access, Options, Patience, TokenName};

/// The tables as `DBObject::createTables` of SoftHSM's `DBObject.cpp` makes them, word for word: they are compared as text.
const SCHEMA: [&str; 8] = [
    "create table object (id integer primary key autoincrement)",
    "create table attribute_text (value text,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_integer (value integer,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_binary (value blob,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_array (value blob,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_boolean (value boolean,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_datetime (value datetime,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
    "create table attribute_real (value real,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement)",
];

impl DbToken {
    /// Begins a token in the empty directory `directory`: the database has SoftHSM's schema and the token's own object, which holds
    /// nothing yet, under the name `sqlite3.db.tokenfs-new`, with the mode and owner `files`. Nothing is synced. Here alone
    /// [`Patience::Now`] is enough for writing too.
    ///
    /// # Errors
    /// What making it fails with.
    pub fn build(
        name: TokenName,
        directory: &Path,
        files: Access,
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let path = directory.join(format!("{DATABASE}{NEW_SUFFIX}"));
        if options.read_only {
            let detail = "the store is mounted read-only";
            return Err(Error::new(ErrorKind::ReadOnly, detail).at(directory));
        }
        make_file(&path, files)?;
        point("db.build.made");
        let token = Self {
            built: true,
            ..Self::with(name, directory, path, options, diagnostics)
        };
        token.make_schema().map_err(|failure| match failure {
            Failure::Taken => Error::new(ErrorKind::Busy, TAKEN).at(&token.path),
            Failure::Content(error) | Failure::Other(error) => error.at(&token.path),
        })?;
        point("db.build.schema");
        Ok(token)
    }

    fn make_schema(&self) -> Result<(), Failure> {
        let held = self.connection.lock(Patience::Now, TAKEN);
        let mut slot = held.map_err(Failure::Other)?;
        let before = stat(&self.path).map_err(Failure::Other)?;
        self.connect(&mut slot, &before)?;
        let Slot {
            database: Some(Database { connection, .. }),
            ..
        } = &*slot
        else {
            return Err(Failure::Taken);
        };
        let fail = |error| classify_write(&error, &self.path);
        connection
            .pragma_update(None, "page_size", 4096)
            .map_err(fail)?;
        if let Some(open) = &mut slot.database {
            open.prepare(true).map_err(fail)?;
            let transaction = open.connection.unchecked_transaction().map_err(fail)?;
            for table in SCHEMA {
                transaction.execute_batch(table).map_err(fail)?;
            }
            transaction
                .execute("insert into object (id) values (?)", [TOKEN_ROW])
                .map_err(fail)?;
            transaction.commit().map_err(fail)?;
        }
        Ok(())
    }

    /// Syncs a token that was begun with [`DbToken::build`], and gives its database its name. This value is of no use
    /// afterwards. Says what keeps it from being certain to survive a power failure, if anything does.
    ///
    /// # Errors
    /// What syncing and renaming fail with; [`ErrorKind::Exists`] if there is a `sqlite3.db` meanwhile.
    pub fn publish(&self) -> Result<Option<Error>> {
        let patience = self.may_write(Patience::at_most(self.options.lock_wait))?;
        if !self.built {
            let detail = "only a token that is being built can be published";
            return Err(Error::new(ErrorKind::Invalid, detail).at(&self.path));
        }
        let held = self.connection.lock(patience, TAKEN);
        let mut slot = held.map_err(|error| error.at(&self.path))?;
        if let Some(database) = &slot.database {
            let fail = |error| match classify_write(&error, &self.path) {
                Failure::Taken => Error::new(ErrorKind::Busy, TAKEN).at(&self.path),
                Failure::Content(error) | Failure::Other(error) => error,
            };
            leave_past_rows(&database.connection).map_err(fail)?;
        }
        // From here on nothing has it open, so that it can be opened and closed again.
        if let Some(Database { connection, .. }) = slot.database.take() {
            connection
                .close()
                .map_err(|(_, error)| match classify_write(&error, &self.path) {
                    Failure::Taken => Error::new(ErrorKind::Busy, TAKEN).at(&self.path),
                    Failure::Content(error) | Failure::Other(error) => error,
                })?;
        }
        self.forget();
        point("db.publish.closed");
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.path)
            .and_then(|file| file.sync_all())
            .map_err(|error| Error::io("sync", &error).at(&self.path))?;
        point("db.publish.synced");
        let target = self.directory.join(DATABASE);
        rename_to_free(CWD, &self.path, &target)
            .map_err(|errno| Error::system("rename", errno).at(&target))?;
        point("db.publish.renamed");
        // It is a token, whatever becomes of this.
        let synced = self.sync_directory();
        point("db.publish.done");
        Ok(synced.err())
    }
}

/// Leaves the rows to what was in the token before, if it has objects: it is a copy of another one, in which objects can have been made and destroyed whose backups are still there. SoftHSM's
/// next object must not get the name of one of those.
fn leave_past_rows(connection: &Connection) -> rusqlite::Result<()> {
    let highest = statements::highest(connection)?;
    if highest > TOKEN_ROW {
        statements::use_up(connection, highest.saturating_add(Derived::AHEAD))?;
    }
    Ok(())
}

/// An empty file, which is an empty database. It is nobody else's before it has its owner, and has its mode from then on; SQLite
/// gives a journal the same.
fn make_file(path: &Path, files: Access) -> Result<()> {
    let fail = |what: &'static str| move |error| Error::io(what, &error).at(path);
    let file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(fail("create"))?;
    // Changing to what it is already is not always allowed.
    let made = file.metadata().map_err(fail("stat"))?;
    let (uid, gid) = {
        use std::os::unix::fs::MetadataExt;
        (made.uid(), made.gid())
    };
    if (uid, gid) != (files.uid, files.gid) {
        fchown(&file, Some(files.uid), Some(files.gid)).map_err(fail("chown"))?;
    }
    file.set_permissions(Permissions::from_mode(files.mode & 0o7777))
        .map_err(fail("chmod"))
}
