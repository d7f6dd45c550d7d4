//! How much memory may be taken by what is not in the store: scratch, new objects, and what is open for writing.
//!
//! Whoever may write into a mount could have the server take any amount otherwise, a file of 64 MiB at a time.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Tree, lock};
use crate::error::{Error, ErrorKind, Result};

/// How many bytes all of it may have together.
const MOST_BYTES: u64 = 256 * 1024 * 1024;

/// What is known of how much there is.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// There is no more than this.
    at_most: u64,
}

impl Tree {
    /// That so many more bytes may be held. Nothing that is held is locked by whoever asks.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] beyond the limit.
    pub(super) fn check_room(&self, more: u64) -> Result<()> {
        let mut budget = lock(&self.budget);
        let wanted = budget.at_most.saturating_add(more);
        if wanted <= MOST_BYTES {
            budget.at_most = wanted;
            return Ok(());
        }
        // All of it is counted only when that can matter: there may be many, and this is asked for every write.
        budget.at_most = self.held();
        let wanted = budget.at_most.saturating_add(more);
        if wanted > MOST_BYTES {
            let detail = format!(
                "scratch files, new objects and what is open for writing have {} MiB together at most, until they are in the store; close or remove some",
                MOST_BYTES / 1024 / 1024
            );
            return Err(Error::new(ErrorKind::NoSpace, detail));
        }
        budget.at_most = wanted;
        Ok(())
    }

    fn held(&self) -> u64 {
        let mut files = lock(&self.scratch).contents();
        files.extend(lock(&self.handles).contents());
        files.extend(lock(&self.drafts).contents());
        // What is open is what is in scratch, if it is scratch.
        let mut counted = HashSet::new();
        files.retain(|file| counted.insert(Arc::as_ptr(file)));
        let files: u64 = files.iter().map(|file| lock(file).len() as u64).sum();
        files.saturating_add(lock(&self.drafts).size())
    }
}
