//! Taking a token away: its database loses its name while nobody can commit, and is looked at once more under the other one.
//!
//! `begin immediate` keeps every other writer out from before the objects are counted until the name is gone. From then on SQLite
//! itself refuses to begin a change of a database that does not have the name any more that it was opened under
//! (`SQLITE_READONLY_DBMOVED`, when the journal is to be made). Who makes no journal on disk is not kept out by that, which is what
//! the second look is for.

use std::path::Path;
use std::sync::Arc;

use super::read::has_log;
use super::{DATABASE, DbToken};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::leftover::NEW_SUFFIX;
use crate::store::{Options, Patience, Token, TokenName};

impl DbToken {
    /// Does `rename`, which takes the database's name away, while nobody can commit; not at all if there is an object. This value is
    /// of no use afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`]; what `rename` fails with; otherwise as [`Token::update`].
    pub(crate) fn hide(
        &self,
        patience: Patience,
        rename: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.write(patience, &mut |work| {
            if !work.snapshot.names.list.is_empty() {
                let detail = "there are objects in this token";
                return Err(Error::new(ErrorKind::NotEmpty, detail).into());
            }
            // Who has a database with a log open goes on to commit into that, under the name that it had.
            if work.sql(has_log(work.connection))? {
                let detail = "the database has a write-ahead log, which SoftHSM never asks for; end all programs that use it, and `pragma journal_mode=delete`";
                return Err(Error::new(ErrorKind::Busy, detail).into());
            }
            rename()?;
            Ok(None)
        })
    }

    /// The token in `directory` whose database was hidden, or is not published yet, for reading. As with [`DbToken::open`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::NotADirectory`] if `directory` is none.
    pub(crate) fn open_hidden(
        name: TokenName,
        directory: &Path,
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let path = directory.join(format!("{DATABASE}{NEW_SUFFIX}"));
        let token = Self::with(name, directory, path, options, diagnostics);
        token.metadata()?;
        Ok(token)
    }
}
