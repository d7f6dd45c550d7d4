//! One read transaction: what is known still holds, or everything is read again.
//!
//! `pragma data_version` takes SQLite's shared lock and compares the change counter in the file with the one of the
//! connection's cache of pages (`pager_reset` in SQLite's `pager.c`). `stat` is taken after that, while nobody can write.

use std::path::Path;
use std::time::SystemTime;

use nix::sys::stat::FileStat;
use rusqlite::Connection;

use super::connection::{Database, Stamp, stat};
use super::failure::{Failure, classify};
use super::scan::{self, Rows};

/// What was read before, and with which connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Version {
    /// Of the file, under the shared lock.
    pub stamp: Stamp,
    /// [`Database::serial`].
    pub serial: u64,
    /// Of that connection.
    pub data_version: i64,
}

impl Version {
    /// Whether nobody but the connection itself has committed between the two.
    pub fn same_content(&self, other: &Self) -> bool {
        (self.serial, self.data_version) == (other.serial, other.data_version)
    }
}

/// The file under the shared lock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub stat: FileStat,
    pub version: Version,
    /// Whether the stamp is old enough for an equal one to mean equal content.
    pub settled: bool,
}

/// What a transaction gives.
#[derive(Debug)]
pub(super) enum Outcome {
    /// What was read before is what is there.
    Same(Seen),
    /// This is what is there.
    New(Seen, Rows),
    /// The connection does not show what is at the path: another file has taken its place, or the file was overwritten
    /// without SQLite, which would believe its cache of pages.
    Stale,
}

/// Compares the database with what is `known` of it, and reads it if that has changed and `may_scan` a file of its size.
pub(super) fn read(
    database: &Database,
    path: &Path,
    known: Option<Version>,
    may_scan: impl Fn(&FileStat) -> bool,
) -> Result<Outcome, Failure> {
    let fail = |error| classify(&error, path);
    // Rolled back when it is dropped, which lets go of the shared lock: nothing is written in it.
    let transaction = database.connection.unchecked_transaction().map_err(fail)?;
    let outcome = look(database, path, known, may_scan)?;
    drop(transaction);
    if let Outcome::New(..) = outcome {
        // The pages are of no use any more: the next scan is for a change.
        database.connection.release_memory().map_err(fail)?;
    }
    Ok(outcome)
}

/// The same in a transaction that the caller has begun, and in which nothing is written yet.
pub(super) fn look(
    database: &Database,
    path: &Path,
    known: Option<Version>,
    may_scan: impl Fn(&FileStat) -> bool,
) -> Result<Outcome, Failure> {
    let fail = |error| classify(&error, path);
    let connection = &database.connection;
    let (seen, log) = match under_lock(database, path)? {
        Some(seen) => seen,
        None => return Ok(Outcome::Stale),
    };
    if let Some(known) = known
        && known.same_content(&seen.version)
    {
        if seen.version.stamp.written_since(&known.stamp) && !log {
            return Ok(Outcome::Stale);
        }
        return Ok(Outcome::Same(seen));
    }
    if !may_scan(&seen.stat) {
        return Err(Failure::Taken);
    }
    let missing = scan::missing_tables(connection).map_err(fail)?;
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(Failure::damaged(
            path,
            format!("the database is not that of a token: it lacks the tables {missing}"),
        ));
    }
    let rows = scan::read(connection).map_err(fail)?;
    Ok(Outcome::New(seen, rows))
}

/// The file as it is right after a commit of this connection; `None` if another one is at the path.
pub(super) fn after_commit(database: &Database, path: &Path) -> Result<Option<Seen>, Failure> {
    let begun = database.connection.unchecked_transaction();
    let _transaction = begun.map_err(|error| classify(&error, path))?;
    Ok(under_lock(database, path)?.map(|(seen, _)| seen))
}

/// What the file looks like under the lock that asking for `data_version` takes, and whether it has a write-ahead log; `None` if
/// another file is at the path.
pub(super) fn under_lock(
    database: &Database,
    path: &Path,
) -> Result<Option<(Seen, bool)>, Failure> {
    let fail = |error| classify(&error, path);
    let data_version = data_version(&database.connection).map_err(fail)?;
    let stat = stat(path).map_err(Failure::Other)?;
    let now = SystemTime::now();
    let stamp = Stamp::of(&stat);
    if stamp.identity != database.identity {
        return Ok(None);
    }
    // A write-ahead log takes the commits and leaves the database as it is. SoftHSM never asks for one.
    let log = has_log(&database.connection).map_err(fail)?;
    let seen = Seen {
        stat,
        version: Version {
            stamp,
            serial: database.serial,
            data_version,
        },
        settled: !log && stamp.is_settled(now),
    };
    Ok(Some((seen, log)))
}

/// A number that changes when somebody else has committed; commits of this connection leave it alone
/// (<https://www.sqlite.org/pragma.html#pragma_data_version>).
fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("pragma data_version")?
        .query_row([], |row| row.get(0))
}

/// Whether the database has a write-ahead log.
pub(super) fn has_log(connection: &Connection) -> rusqlite::Result<bool> {
    let mode: String = connection
        .prepare_cached("pragma journal_mode")?
        .query_row([], |row| row.get(0))?;
    Ok(mode.eq_ignore_ascii_case("wal"))
}

/// Whether a failure of the content, met just now in a file of which `stat` was taken before, holds as long as the file
/// stays as it is.
pub(super) fn is_settled(stat: &FileStat) -> bool {
    Stamp::of(stat).is_settled(SystemTime::now())
}
