//! Putting right what a crashed writer left beside the database: a journal that SQLite has to roll back.
//!
//! Whether there is one that counts is for SQLite to say, which looks at its locks. What is looked for here is only a journal that
//! can be one.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;

use super::DbToken;
use super::check::Journal;
use super::companions::journal_of;
use crate::error::{Error, Result};
use crate::store::{Patience, Token};

/// What a journal begins with whose header was written (`aJournalMagic` in SQLite's `pager.c`).
const MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];

impl DbToken {
    /// Has SQLite roll back what a crashed writer left, if there is a journal; nothing is opened where there is none. If it `is_alone`, which
    /// is that nobody else in this process has the database open, it is said.
    ///
    /// # Errors
    /// As [`Token::list`].
    pub fn roll_back(&self, is_alone: bool, patience: Patience) -> Result<()> {
        if self.options.read_only || !self.has_journal()? {
            return Ok(());
        }
        // The journal of a SoftHSM that is just committing is none of a crash.
        let was_left = is_alone && self.journal(patience)? == Journal::Left;
        // SQLite rolls back before it reads anything.
        self.list(patience)?;
        if was_left && !self.has_journal()? {
            let journal = journal_of(&self.path).display().to_string();
            self.diagnostics.warning(format!(
                "{}: a crash had left this journal, and SQLite has rolled back the change that was not finished",
                journal.escape_debug()
            ));
        }
        Ok(())
    }

    /// Whether there is a journal with a header. SQLite does not lock journals, so that one can be opened and closed beside it.
    fn has_journal(&self) -> Result<bool> {
        let path = journal_of(&self.path);
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let opened = std::fs::File::options()
            .read(true)
            .custom_flags(flags.bits())
            .open(&path);
        let mut first = [0; MAGIC.len()];
        match opened.and_then(|mut file| file.read_exact(&mut first)) {
            Ok(()) => Ok(first == MAGIC),
            // None, or one whose header was never written.
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(Error::io("open the journal", &error).at(&path)),
        }
    }
}
