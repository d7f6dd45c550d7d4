//! The `db` backend: a token is one SQLite database.
//!
//! Owns one long-lived connection per token, and a snapshot of the whole token: the schema has no index by object, so
//! a scan of everything costs no more than one attribute. A snapshot is taken in one read transaction and served while
//! `sqlite3.db` has the stamp (device, inode, size, mtime, ctime) that it had under the transaction's shared lock. As
//! long as the stamp is so young that a second change could hide in the same tick of the clock, SQLite is asked each time.
//!
//! Assumes that every writer goes through SQLite's locks, that the directory's path has no symbolic link in it, and a
//! 64-bit `CK_ULONG`. Commits of this connection do not change `data_version`: what writes through it replaces the
//! snapshot, or drops it.
//!
//! Lock order: `connection`, then (inside SQLite) the database's file lock, then `cache`, which is held for the copying
//! of a pointer only.
//!
//! - [`decode`], [`encode`]: the blobs. [`uuid`]: the names. [`times`]: times of single objects.
//! - `scan`: SQL to rows. `snapshot`: rows to objects.
//! - `write`: a change in its transaction. `statements`: its SQL. `access`: modes and owners. `build`: new tokens.
//!   `hide`: those that are to go. `hold`: keeping a token as it is.
//! - `connection`, `read`, `failure`, `exclusive`: SQLite's connection, one transaction, its errors, whose turn it is. `recover`:
//!   what a crashed writer left.

mod access;
mod build;
pub(crate) mod check;
mod companions;
mod connection;
pub mod decode;
pub mod encode;
mod exclusive;
mod failure;
mod hide;
mod hold;
mod read;
mod recover;
mod scan;
mod snapshot;
mod statements;
pub mod times;
pub mod uuid;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::stat::{FileStat, SFlag, lstat};

pub(crate) use self::companions::journal_of;
use self::connection::{Database, Stamp, stat};
use self::exclusive::Exclusive;
use self::failure::Failure;
use self::read::{Outcome, Seen, Version};
use self::snapshot::Snapshot;
use self::uuid::Derived;
pub(super) use self::write::uuid_of;
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{AttributeKey, Attributes};
use crate::store::layout::{self, LayoutFile};
use crate::store::validate;
use crate::store::{
    Access, Backend, Hold, Metadata, MetadataChange, NewObject, Object, ObjectId, ObjectName,
    Options, Patience, Target, Token, TokenName,
};

/// The file that makes a directory a `db` token (SoftHSM's `DBToken.cpp`).
pub const DATABASE: &str = "sqlite3.db";

/// A database above this size, in bytes, is not scanned for a caller that does not want to wait: some 200 objects, a few
/// milliseconds.
const QUICK_SCAN: i64 = 512 * 1024;

/// The first and the longest pause between two attempts to get SQLite's lock.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(10));

/// How often a stale connection is replaced at once; after that, only as patience lasts.
const REOPENINGS: u32 = 3;

/// What is being waited for while another thread uses the connection, or another process the database.
const TAKEN: &str = "the database is locked";

/// A token of the `db` backend.
#[derive(Debug)]
pub struct DbToken {
    name: TokenName,
    directory: PathBuf,
    path: PathBuf,
    options: Options,
    diagnostics: Arc<Diagnostics>,
    /// Whether it is being built and has another name than [`DATABASE`] until then.
    built: bool,
    connection: Exclusive<Slot>,
    cache: Mutex<Option<Arc<Cached>>>,
    /// The last version that made sense, whatever has become of it: what is the same in the next one keeps its times.
    last: Mutex<Option<Arc<Snapshot>>>,
    /// How often it is held.
    holding: Arc<AtomicUsize>,
}

/// The connection, if there is one now.
#[derive(Debug, Default)]
struct Slot {
    database: Option<Database>,
    /// How many there have been.
    opened: u64,
    /// The warnings of the last snapshot, which need not be said again.
    warned: Vec<String>,
    /// Which rows derived names are of, as far as anybody has asked.
    derived: Derived,
}

/// What the last look at the database gave, and when that holds.
#[derive(Debug)]
struct Cached {
    stamp: Stamp,
    /// Whether an equal stamp means equal content.
    settled: bool,
    content: Result<(Version, Arc<Snapshot>)>,
}

impl DbToken {
    /// The token in `directory`, which is a canonical path. Does not open the database yet, so that the process can still
    /// fork.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::NotADirectory`] if `directory` is none.
    pub fn open(
        name: TokenName,
        directory: &Path,
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let path = directory.join(DATABASE);
        let token = Self::with(name, directory, path, options, diagnostics);
        token.metadata()?;
        Ok(token)
    }

    /// The token in `directory` whose database is `path`, of which nothing is known yet.
    fn with(
        name: TokenName,
        directory: &Path,
        path: PathBuf,
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Self {
        Self {
            name,
            directory: directory.to_path_buf(),
            path,
            options,
            diagnostics,
            built: false,
            connection: Exclusive::default(),
            cache: Mutex::default(),
            last: Mutex::default(),
            holding: Arc::default(),
        }
    }

    /// The id of the row in the table `object` that an object is stored under.
    ///
    /// # Errors
    /// As [`Token::object`], except that a damaged object has one.
    pub fn row(&self, id: &ObjectId, patience: Patience) -> Result<i64> {
        self.current(patience)?
            .row(id)
            .map_err(|error| error.at(&self.path))
    }

    /// The present version of the whole token.
    fn current(&self, patience: Patience) -> Result<Arc<Snapshot>> {
        if let Some(content) = self.cached(&stat(&self.path)?) {
            return content;
        }
        let held = self.connection.lock(patience, TAKEN);
        let mut slot = held.map_err(|error| error.at(&self.path))?;
        let (mut pause, longest) = PAUSES;
        let mut reopenings = 0;
        loop {
            // Whoever had the connection before may have read what is wanted here.
            let before = stat(&self.path)?;
            if let Some(content) = self.cached(&before) {
                return content;
            }
            match self.refresh(&mut slot, &before, patience) {
                Ok(Some(snapshot)) => return Ok(snapshot),
                Ok(None) if reopenings < REOPENINGS => reopenings += 1,
                Ok(None) | Err(Failure::Taken) => {
                    let waited = patience.wait(pause, TAKEN);
                    waited.map_err(|error| error.at(&self.path))?;
                    pause = (pause * 2).min(longest);
                }
                Err(Failure::Content(error)) => {
                    slot.database = None;
                    self.remember(Cached {
                        stamp: Stamp::of(&before),
                        settled: read::is_settled(&before),
                        content: Err(error.clone()),
                    });
                    return Err(error);
                }
                Err(Failure::Other(error)) => {
                    slot.database = None;
                    return Err(error);
                }
            }
        }
    }

    /// One attempt to find out that the snapshot still holds, or to make a new one. `None` asks for another attempt, with
    /// another connection.
    fn refresh(
        &self,
        slot: &mut Slot,
        before: &FileStat,
        patience: Patience,
    ) -> Result<Option<Arc<Snapshot>>, Failure> {
        let impatient = matches!(patience, Patience::Now) && !self.built;
        // There may be a journal to roll back, which is much writing.
        if impatient && lstat(&journal_of(&self.path)).is_ok() {
            return Err(Failure::Taken);
        }
        let fresh = self.connect(slot, before)?;
        let Some(database) = &slot.database else {
            return Ok(None);
        };
        let known = self.known();
        let version = known.as_ref().map(|(version, _)| *version);
        let may_scan = |stat: &FileStat| !impatient || stat.st_size <= QUICK_SCAN;
        let outcome = match read::read(database, &self.path, version, may_scan) {
            Ok(outcome) => outcome,
            // Perhaps only SQLite's cache of pages is wrong.
            Err(Failure::Content(_)) if !fresh => Outcome::Stale,
            Err(failure) => return Err(failure),
        };
        let Some((_, snapshot)) = self.absorb(outcome, known, &mut slot.warned) else {
            slot.database = None;
            return Ok(None);
        };
        Ok(Some(snapshot))
    }

    /// Opens the file that `before` was just taken of, if it is not open. Says whether it was not.
    fn connect(&self, slot: &mut Slot, before: &FileStat) -> Result<bool, Failure> {
        // Before SQLite touches the file that it has open: it would take the journal of the one that is now at the path
        // for its own, roll it back and delete it.
        let identity = Stamp::of(before).identity;
        slot.database.take_if(|open| open.identity != identity);
        let fresh = slot.database.is_none();
        if fresh {
            slot.opened += 1;
            let read_only = self.options.read_only;
            slot.database = Some(Database::open(&self.path, before, read_only, slot.opened)?);
        } else {
            // Who opens one looks as well.
            companions::check(&self.path, before)?;
        }
        Ok(fresh)
    }

    /// What a look at the database means, for everybody. `None` if the connection has to go.
    fn absorb(
        &self,
        outcome: Outcome,
        known: Option<(Version, Arc<Snapshot>)>,
        warned: &mut Vec<String>,
    ) -> Option<(Seen, Arc<Snapshot>)> {
        let (seen, snapshot) = match (outcome, known) {
            (Outcome::New(seen, rows), _) => {
                let metadata = Metadata::of_path(&self.path, &seen.stat);
                let last = self.lock_last().clone();
                let snapshot =
                    Snapshot::new(&self.name, &self.path, metadata, rows, last.as_deref());
                self.warn(warned, &snapshot.warnings);
                (seen, Arc::new(snapshot))
            }
            (Outcome::Same(seen), Some((version, snapshot))) => {
                let snapshot = if seen.version.stamp == version.stamp {
                    snapshot
                } else {
                    Arc::new(snapshot.with_metadata(Metadata::of_path(&self.path, &seen.stat)))
                };
                (seen, snapshot)
            }
            (Outcome::Stale | Outcome::Same(_), _) => return None,
        };
        self.remember(Cached {
            stamp: seen.version.stamp,
            settled: seen.settled,
            content: Ok((seen.version, Arc::clone(&snapshot))),
        });
        Some((seen, snapshot))
    }

    fn warn(&self, warned: &mut Vec<String>, warnings: &[String]) {
        for warning in warnings {
            if !warned.contains(warning) {
                let path = self.path.display().to_string();
                let text = format!("{}: {warning}", path.escape_debug());
                self.diagnostics.warning(text);
            }
        }
        *warned = warnings.to_vec();
    }

    /// What is known of the file that `stat` was taken of, if that is certain.
    fn cached(&self, stat: &FileStat) -> Option<Result<Arc<Snapshot>>> {
        let cached = self.lock_cache().clone()?;
        // Nobody else writes what is being built, and what we write is remembered.
        let certain = cached.settled || self.built || self.is_held();
        let holds = certain && cached.stamp == Stamp::of(stat);
        holds.then(|| cached.content.clone().map(|(_, snapshot)| snapshot))
    }

    fn remember(&self, cached: Cached) {
        if let Ok((_, snapshot)) = &cached.content {
            let last = self.lock_last().replace(Arc::clone(snapshot));
            drop(last);
        }
        let previous = self.lock_cache().replace(Arc::new(cached));
        // A large snapshot takes its time to go; not under the lock.
        drop(previous);
    }

    /// What was read last and made sense, whether it still holds or not.
    fn known(&self) -> Option<(Version, Arc<Snapshot>)> {
        self.lock_cache().clone()?.content.clone().ok()
    }

    /// The next look at the database reads all of it.
    fn forget(&self) {
        let previous = self.lock_cache().take();
        drop(previous);
    }

    fn lock_last(&self) -> MutexGuard<'_, Option<Arc<Snapshot>>> {
        // As below.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_cache(&self) -> MutexGuard<'_, Option<Arc<Cached>>> {
        // Nothing that is done under this lock can panic half-way.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Token for DbToken {
    fn name(&self) -> &TokenName {
        &self.name
    }

    fn backend(&self) -> Backend {
        Backend::Db
    }

    fn metadata(&self) -> Result<Metadata> {
        let stat = lstat(&self.directory)
            .map_err(|errno| Error::system("stat", errno).at(&self.directory))?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR {
            let detail = "a token is a directory, and this is none";
            return Err(Error::new(ErrorKind::NotADirectory, detail).at(&self.directory));
        }
        Ok(Metadata::of_path(&self.directory, &stat))
    }

    fn shared_access(&self) -> Result<Option<Access>> {
        let Metadata { mode, uid, gid, .. } = Metadata::of_path(&self.path, &stat(&self.path)?);
        Ok(Some(Access { mode, uid, gid }))
    }

    fn list(&self, patience: Patience) -> Result<Arc<[ObjectName]>> {
        Ok(Arc::clone(&self.current(patience)?.names.list))
    }

    fn object_metadata(&self, id: &ObjectId, patience: Patience) -> Result<Metadata> {
        match (id, self.current(patience)) {
            (_, Ok(snapshot)) => snapshot
                .metadata_of(id)
                .map_err(|error| error.at(&self.path)),
            // The token's own object is there whatever becomes of its content. If that cannot be had, however long one waits, its time
            // is the one that was known last.
            (ObjectId::Token, Err(error)) if error.kind() != ErrorKind::WouldBlock => {
                let stat = stat(&self.path)?;
                let metadata = Metadata::of_path(&self.path, &stat);
                let known = self
                    .known()
                    .filter(|(version, _)| version.stamp == Stamp::of(&stat));
                Ok(known
                    .and_then(|(_, snapshot)| snapshot.metadata_of(id).ok())
                    .unwrap_or(metadata))
            }
            (_, Err(error)) => Err(error),
        }
    }

    fn object(&self, id: &ObjectId, patience: Patience) -> Result<Arc<Object>> {
        let object = self.current(patience)?.object(id);
        object.map_err(|error| error.at(&self.path))
    }

    fn layout_read(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, Vec<u8>)> {
        match file {
            LayoutFile::Generation => {
                let number = self.current(patience)?.names.generation();
                layout::read_generation(self, number, patience)
            }
            other => layout::read(self, other, patience),
        }
    }

    fn update(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()> {
        self.write_update(id, edit, mtime, patience)
    }

    fn check_name(&self, name: &ObjectName) -> Result<()> {
        write::uuid_of(name).map(drop)
    }

    fn create(&self, name: &ObjectName, new: &NewObject, patience: Patience) -> Result<()> {
        self.write_new(name, new, patience)
    }

    /// In one transaction: all of them, or none.
    fn create_all(
        &self,
        new: &[(ObjectName, NewObject)],
        made: &mut dyn FnMut() -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        self.write_many(new, made, patience)
    }

    fn check_key(&self, key: AttributeKey, in_map: bool) -> Result<()> {
        validate::check_key(key)?;
        if in_map {
            return Ok(());
        }
        statements::check_key(key)
    }

    fn remove_if(
        &self,
        name: &ObjectName,
        check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        self.write_removal(name, check, patience)
    }

    fn replace_damaged(
        &self,
        name: &ObjectName,
        new: Option<&NewObject>,
        patience: Patience,
    ) -> Result<()> {
        self.write_replacement(name, new, patience)
    }

    fn rename(&self, from: &ObjectName, to: &ObjectName, patience: Patience) -> Result<()> {
        self.write_name(from, to, patience)
    }

    /// Mode and owner of an object are those of the database, and so of all of them. Its time of last access cannot be set.
    fn set_metadata(
        &self,
        target: &Target,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()> {
        self.change_metadata(target, change, patience)
    }

    /// Every change is durable when it returns, but for modes and owners.
    fn sync(&self, patience: Patience) -> Result<()> {
        self.may_write(patience)?;
        self.sync_directory()
    }

    fn hold(&self, wait: Duration) -> Result<Hold> {
        self.keep(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use std::ffi::OsStr;

    /// Kernels with fine-grained times (Linux 6.13) never give two versions one stamp, so it is forged here.
    #[test]
    fn an_equal_stamp_counts_only_once_it_is_settled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(DATABASE);
        let writer = Connection::open(&path).unwrap();
        writer
            .execute_batch("create table object (id integer primary key autoincrement)")
            .unwrap();
        for table in scan::Table::ALL {
            let name = table.name();
            let columns = "value, type integer, object_id integer, id integer primary key";
            writer
                .execute_batch(&format!("create table {name} ({columns})"))
                .unwrap();
        }
        let name = TokenName::new(OsStr::new("token")).unwrap();
        let log = Arc::default();
        let token = DbToken::open(name, directory.path(), Options::default(), log).unwrap();
        let objects = || token.list(Patience::Now).unwrap().len();
        assert_eq!(objects(), 0);
        let (version, snapshot) = token.lock_cache().clone().unwrap().content.clone().unwrap();

        writer
            .execute_batch("insert into object values (2)")
            .unwrap();
        let forge = |settled| {
            token.remember(Cached {
                stamp: Stamp::of(&stat(&path).unwrap()),
                settled,
                content: Ok((version, Arc::clone(&snapshot))),
            });
        };
        forge(true);
        assert_eq!(objects(), 0, "the forgery is good enough");
        forge(false);
        assert_eq!(objects(), 1);
    }
}
