//! How much may be taken by what is not in the store yet: of memory by scratch, new objects and what is open for writing, and of the
//! store's file system by what is going to be written there.
//!
//! Whoever may write into a mount could have the server take any amount of memory otherwise, a file of 64 MiB at a time. And whoever
//! copies a new object into a full store would not hear of it, since that is written when its files are closed already.

use std::collections::HashSet;
use std::sync::Arc;

use super::drafts::{Room, no_room};
use super::node::Node;
use super::{Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Backend, Patience, TokenName, file};

/// How many bytes all of it may have together.
const MOST_BYTES: u64 = 256 * 1024 * 1024;

/// How many files without a value and new objects there may be, however small. (`scratch` has its own limit.)
const MOST_ENTRIES: usize = 100_000;

/// What a database takes beside the objects that are written into it, in bytes: its journal, and pages that are not full.
const DATABASE: u64 = 64 * 1024;

/// What an object takes in a directory, and a little more, in files: its own, its lock file, the journal, and the token's generation.
const FILES: u64 = 4;

/// With less than this free beside a value, in bytes, it is worth a look how large its object is.
const NEARLY_FULL: u64 = 16 * 1024 * 1024;

/// What is known of how much there is.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// There is no more than this, in bytes.
    at_most: u64,
    /// There are no more files without a value and new objects than this.
    entries: usize,
}

impl Tree {
    /// That so many more bytes may be held. Nothing that is held is locked by whoever asks.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] beyond the limit.
    pub(super) fn check_memory(&self, more: u64) -> Result<()> {
        let outcome = self.take_memory(more);
        if outcome.is_err() && self.drop_lost_scratch() {
            return self.take_memory(more);
        }
        outcome
    }

    /// Takes away the scratch in the directories of objects and tokens that somebody else has removed: nobody can name it any more. Whether there was any.
    pub(super) fn drop_lost_scratch(&self) -> bool {
        let directories: HashSet<Node> = lock(&self.scratch).outside().cloned().collect();
        let mut was_any = false;
        for directory in directories {
            // Otherwise it is being renamed, or used.
            if let Ok(_shut) = self.shut(self.spot_of(&directory), Patience::Now)
                && self.is_lost(&directory)
            {
                lock(&self.scratch).clear(&directory);
                was_any = true;
            }
        }
        was_any
    }

    /// Whether somebody else has removed a directory.
    fn is_lost(&self, directory: &Node) -> bool {
        match (directory.object(), directory.token()) {
            (Some((token, id)), _) => {
                let is_new = lock(&self.drafts).is_new(&(token.clone(), id.clone()));
                let found = self.stored(token, id, Patience::Now);
                !is_new && found.is_err_and(|error| error.kind() == ErrorKind::NotFound)
            }
            (None, Some(token)) => self.is_gone(token),
            _ => false,
        }
    }

    /// If there are too many scratch files, perhaps there are some that nobody can name.
    pub(super) fn make_room_for_scratch(&self) {
        let is_full = lock(&self.scratch).is_full();
        if is_full {
            self.drop_lost_scratch();
        }
    }

    fn take_memory(&self, more: u64) -> Result<()> {
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

    /// That one more file without a value, or new object, may be held.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] beyond the limit.
    pub(super) fn check_entries(&self) -> Result<()> {
        let mut budget = lock(&self.budget);
        if budget.entries >= MOST_ENTRIES {
            budget.entries = lock(&self.drafts).entries();
        }
        if budget.entries >= MOST_ENTRIES {
            let detail =
                "there are too many new objects and files without a value; write or remove some";
            return Err(Error::new(ErrorKind::NoSpace, detail));
        }
        budget.entries += 1;
        Ok(())
    }

    /// The room that the store has for new objects of a token. What is pending is written later, when nobody may be listening; so whoever
    /// closes a file of it is told as far as that can be known.
    ///
    /// # Errors
    /// What `statvfs` fails with.
    pub(super) fn room(&self, token: &TokenName) -> Result<Room> {
        let stat = self.store.statvfs()?;
        let block = stat.fragment_size().max(1);
        let blocks = match self.settings.uid {
            0 if stat.blocks_free().saturating_mul(block) > 4 * NEARLY_FULL => stat.blocks_free(),
            0 => stat.blocks_free().saturating_sub(self.store.kept_back()),
            _ => stat.blocks_available(),
        };
        // A file system that does not say how large it is has no blocks, and one that does not count files none of them.
        let is_known = stat.blocks() > 0;
        let is_out_of_files = stat.files() > 0 && stat.files_free() < FILES;
        let free = if is_out_of_files {
            0
        } else {
            blocks.saturating_mul(block)
        };
        let apart = match self.token(token)?.backend() {
            Backend::File => 0,
            Backend::Db => DATABASE,
        };
        Ok(Room {
            free: is_known.then(|| free.saturating_sub(apart)),
            block,
        })
    }

    /// That the store has room for an object in which `node` has `length` bytes. To change an object file is to write all of it again. What is
    /// found here is said by `write`, and so to those who do not look at what `close` says.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]; what `statvfs` fails with.
    pub(super) fn check_disk(&self, node: &Node, length: u64) -> Result<()> {
        let Some((token, id)) = node.object() else {
            return Ok(());
        };
        let room = self.room(token)?;
        let Some(free) = room
            .free
            .filter(|free| *free < length.saturating_add(NEARLY_FULL))
        else {
            return Ok(());
        };
        // What it has besides, as far as that can be told at once.
        let besides = match self.token(token)?.backend() {
            Backend::File => self
                .object(token, id, Patience::Now)
                .map_or(0, |object| file::encoded_length(&object.attributes)),
            Backend::Db => 0,
        };
        if length.saturating_add(besides).saturating_add(room.block) > free {
            return Err(no_room());
        }
        Ok(())
    }

    fn held(&self) -> u64 {
        let mut files = lock(&self.scratch).contents();
        files.extend(lock(&self.handles).contents());
        files.extend(lock(&self.drafts).contents());
        // What is open is what is in scratch, if it is scratch.
        let mut counted = HashSet::new();
        files.retain(|file| counted.insert(Arc::as_ptr(file)));
        let files: u64 = files.iter().map(|file| lock(file).size()).sum();
        files.saturating_add(lock(&self.drafts).size())
    }
}
