//! What SQLite itself finds wrong with a token's database, for `tokenfs check`.

use std::collections::BTreeMap;

use nix::sys::stat::lstat;
use rusqlite::Connection;

use super::connection::{Database, stat};
use super::failure::{Failure, classify, journal_of};
use super::{DbToken, PAUSES, TAKEN};
use crate::error::{ErrorKind, Result};
use crate::store::Patience;

/// The most problems of a database that are told.
const MOST: i64 = 20;

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

impl DbToken {
    /// Has SQLite check the database, and says what the rows as a whole have against them. Writes nothing, whatever the
    /// token's options are.
    ///
    /// # Errors
    /// As [`crate::store::Token::list`], except that a left journal is a [`Problem`].
    pub(crate) fn examine(&self, patience: Patience) -> Result<Vec<Problem>> {
        let (mut pause, longest) = PAUSES;
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
                    return Ok(vec![Problem::HotJournal]);
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
        Ok(problems)
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
            let first = first.map_or_else(String::new, |row| format!(", the first of them row {row}"));
            let rows = if count == 1 { "row" } else { "rows" };
            Problem::Odd(format!(
                "{count} {rows} in {table} belong to no object{first}; SoftHSM never sees them"
            ))
        })
        .collect())
}
