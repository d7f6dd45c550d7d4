//! What SQLite itself finds wrong with a token's database, for `tokenfs check`.

use std::collections::BTreeMap;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, lstat};
use nix::unistd::read;
use rusqlite::Connection;

use super::companions::journal_of;
use super::connection::{Database, stat};
use super::failure::{Failure, classify};
use super::{DbToken, PAUSES, TAKEN};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;
use crate::store::metadata::is_file;

/// The most problems of a database that are told.
const MOST: i64 = 20;

/// The byte that a writer of SQLite's has locked from the beginning of its transaction to the end (`RESERVED_BYTE` in `os.h`).
const RESERVED_BYTE: i64 = 0x4000_0001;

/// One thing that is wrong with a database as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A crashed writer has left a journal that has to be rolled back. Nothing else is known then.
    HotJournal,
    /// Its pages, or the tables and indices in them, do not fit together.
    Damaged(String),
    /// SoftHSM takes it, and would not have written it.
    Odd(String),
}

/// What SQLite has to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Examined {
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Whether a transaction was going on that writes.
    pub in_use: bool,
}

/// What a journal beside the database means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Journal {
    /// There is none, or none that counts.
    None,
    /// Of a transaction that goes on.
    InUse,
    /// Nobody uses it, and it has to be rolled back.
    Left,
}

impl DbToken {
    /// Has SQLite check the database, and says what the rows as a whole have against them. Writes nothing, whatever the
    /// token's options are.
    ///
    /// # Errors
    /// As [`crate::store::Token::list`], except that a left journal is a [`Problem`].
    pub(crate) fn examine(&self, patience: Patience) -> Result<Examined> {
        let (mut pause, longest) = PAUSES;
        let hot = || Examined {
            problems: vec![Problem::HotJournal],
            in_use: false,
        };
        let journal = self.journal(patience)?;
        if journal == Journal::Left {
            return Ok(hot());
        }
        let mut problems = loop {
            match self.examine_once() {
                Ok(problems) => break problems,
                Err(Failure::Taken) => {
                    let waited = patience.wait(pause, TAKEN);
                    waited.map_err(|error| error.at(&self.path))?;
                    pause = (pause * 2).min(longest);
                }
                Err(Failure::Other(error))
                    if error.kind() == ErrorKind::Damaged
                        && lstat(&journal_of(&self.path)).is_ok() =>
                {
                    return Ok(hot());
                }
                Err(Failure::Content(error) | Failure::Other(error)) => return Err(error),
            }
        };
        // The rest needs tables that can be read.
        let intact = problems.is_empty();
        match self.current(patience) {
            Ok(snapshot) => {
                let stray = problems
                    .iter()
                    .any(|problem| matches!(problem, Problem::Odd(_)));
                let warnings = snapshot.warnings.iter();
                problems.extend(
                    warnings
                        // Told with the row already.
                        .filter(|warning| !(stray && warning.contains("belong to no object")))
                        .map(|warning| Problem::Odd(warning.clone())),
                );
            }
            Err(error) if intact || error.kind() != ErrorKind::Damaged => return Err(error),
            Err(_) => {}
        }
        Ok(Examined {
            problems,
            in_use: journal == Journal::InUse,
        })
    }

    /// Whether there is a journal, and whether that has to be rolled back. SQLite, too, would say so; but as root it gives
    /// each journal that it opens to the owner of the database (`unixOpen` in its `os_unix.c`), and nothing is to be changed here.
    ///
    /// This opens the database beside SQLite, and closing it would drop SQLite's locks in this process. So it is not done while
    /// the token has a connection, and there must be no other one: this is for `tokenfs check`, and for a server before it has opened anything.
    pub(super) fn journal(&self, patience: Patience) -> Result<Journal> {
        let path = journal_of(&self.path);
        let failed = |what, errno| Error::system(what, errno).at(&path);
        let before = match lstat(&path) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(Journal::None),
            Err(errno) => return Err(failed("stat", errno)),
        };
        let slot = self.connection.lock(patience, TAKEN);
        let slot = slot.map_err(|error| error.at(&self.path))?;
        if slot.database.is_some() || !is_file(&before) {
            return Ok(Journal::None);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let journal = match open(&path, flags, Mode::empty()) {
            Ok(journal) => journal,
            // Committed meanwhile.
            Err(Errno::ENOENT) => return Ok(Journal::None),
            Err(errno) => return Err(failed("open", errno)),
        };
        let mut first = [0];
        let length = read(&journal, &mut first).map_err(|errno| failed("read", errno))?;
        // Such a journal is none for SQLite (`hasHotJournal` in its `pager.c`).
        if length == 0 || first == [0] {
            return Ok(Journal::None);
        }
        stat(&self.path)?;
        let database = open(&self.path, flags, Mode::empty())
            .map_err(|errno| Error::system("open", errno).at(&self.path))?;
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: RESERVED_BYTE,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&database, FcntlArg::F_OFD_GETLK(&mut lock))
            .map_err(|errno| Error::system("lock", errno).at(&self.path))?;
        if lock.l_type != libc::F_UNLCK as libc::c_short {
            return Ok(Journal::InUse);
        }
        // A commit deletes the journal first and unlocks then, and the next transaction makes a new one.
        // That can have the same number, and not the same time.
        let identity = |stat: &nix::sys::stat::FileStat| {
            let changed = (stat.st_ctime, stat.st_ctime_nsec);
            (stat.st_dev, stat.st_ino, stat.st_size, changed)
        };
        let is_same = lstat(&path).is_ok_and(|after| identity(&after) == identity(&before));
        Ok(if is_same {
            Journal::Left
        } else {
            Journal::None
        })
    }

    fn examine_once(&self) -> Result<Vec<Problem>, Failure> {
        let before = stat(&self.path).map_err(Failure::Other)?;
        // A connection of its own, since the token's may be one that writes. Closing it drops no lock of the other:
        // SQLite knows of both.
        let database = Database::open(&self.path, &before, true, 0)?;
        let fail = |error| classify(&error, &self.path);
        // Both answers are about one version.
        let transaction = database.connection.unchecked_transaction().map_err(fail)?;
        let mut problems = integrity(&transaction).map_err(fail)?;
        if problems.is_empty() {
            problems = references(&transaction).map_err(fail)?;
        }
        Ok(problems)
    }
}

/// <https://www.sqlite.org/pragma.html#pragma_integrity_check>. Its sentences name pages, tables, indices and rows.
fn integrity(connection: &Connection) -> rusqlite::Result<Vec<Problem>> {
    let mut statement = connection.prepare(&format!("pragma integrity_check({MOST})"))?;
    let mut rows = statement.query([])?;
    let mut problems = Vec::new();
    while let Some(row) = rows.next()? {
        let sentence: String = row.get(0)?;
        if sentence != "ok" {
            let sentence = sentence.trim_start_matches("*** in database main ***\n");
            problems.push(Problem::Damaged(format!("SQLite says: {sentence}")));
        }
    }
    Ok(problems)
}

/// <https://www.sqlite.org/pragma.html#pragma_foreign_key_check>: the rows of attributes that belong to no object, one sentence for
/// each table.
fn references(connection: &Connection) -> rusqlite::Result<Vec<Problem>> {
    let mut statement = connection.prepare("pragma foreign_key_check")?;
    let mut rows = statement.query([])?;
    let mut strays: BTreeMap<String, (u64, Option<i64>)> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let first = row.get(1)?;
        strays.entry(row.get(0)?).or_insert((0, first)).0 += 1;
    }
    Ok(strays
        .into_iter()
        .map(|(table, (count, first))| {
            let first =
                first.map_or_else(String::new, |row| format!(", the first of them row {row}"));
            let (rows, belong) = match count {
                1 => ("row", "belongs"),
                _ => ("rows", "belong"),
            };
            Problem::Odd(format!(
                "{count} {rows} in {table} {belong} to no object{first}; SoftHSM never sees them, and nothing is lost with them"
            ))
        })
        .collect())
}
