//! Keeping everybody from changing a token ([`crate::store::Token::hold`]).
//!
//! A read transaction of a connection of its own: SQLite lets writers prepare a commit beside it, and has them wait with it. Within
//! one process SQLite shares the lock between its connections, so that reading goes on beside a writer who waits. What was read since
//! then need not be asked for again, however young the file's stamp is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::connection::{Database, stat};
use super::failure::{Failure, classify};
use super::{DbToken, PAUSES, TAKEN, read};
use crate::error::Result;
use crate::store::{Hold, Patience};

/// Counts who holds the token.
#[derive(Debug)]
struct Holding(Arc<AtomicUsize>);

impl Drop for Holding {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl DbToken {
    /// Whether nobody can commit, and nobody has since the last look at the database.
    pub(super) fn is_held(&self) -> bool {
        self.holding.load(Ordering::Acquire) > 0
    }

    pub(super) fn keep(&self, wait: Duration) -> Result<Hold> {
        let patience = Patience::Until(Instant::now() + wait);
        let (mut pause, longest) = PAUSES;
        loop {
            match self.begin_reading() {
                Ok(Some(database)) => {
                    // A last look. Where that fails, whoever reads is told why.
                    let holding = self.current(patience).ok().map(|_| self.hold_known());
                    // Dropped in this order: what is known counts no longer than the lock is there.
                    return Ok(Hold(Box::new((holding, database))));
                }
                Ok(None) | Err(Failure::Taken) => {
                    let waited = patience.wait(pause, TAKEN);
                    waited.map_err(|error| error.at(&self.path))?;
                    pause = (pause * 2).min(longest);
                }
                Err(Failure::Content(error) | Failure::Other(error)) => return Err(error),
            }
        }
    }

    fn hold_known(&self) -> Holding {
        self.holding.fetch_add(1, Ordering::Release);
        Holding(Arc::clone(&self.holding))
    }

    /// A connection in a transaction that has its lock; nothing if another file has taken the database's place.
    fn begin_reading(&self) -> Result<Option<Database>, Failure> {
        let fail = |error| classify(&error, &self.path);
        let before = stat(&self.path).map_err(Failure::Other)?;
        let database = Database::open(&self.path, &before, self.options.read_only, 0)?;
        database.connection.execute_batch("begin").map_err(fail)?;
        let Some((_, log)) = read::under_lock(&database, &self.path)? else {
            return Ok(None);
        };
        if log {
            // Beside a write-ahead log a reader keeps nobody from committing. SoftHSM never asks for one.
            let begin = "rollback; begin immediate";
            database.connection.execute_batch(begin).map_err(fail)?;
        }
        Ok(Some(database))
    }
}
