//! Open files and directories.

use std::collections::HashMap;
use std::sync::Arc;

use super::Listed;

/// The number of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// What is kept while something is open.
#[derive(Debug)]
pub(super) enum Handle {
    /// The content of a file as it was when it was opened.
    Content(Arc<Vec<u8>>),
    /// The entries of a directory as they were when it was opened.
    Listing(Arc<[Listed]>),
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    last: u64,
    open: HashMap<HandleId, Handle>,
}

impl Handles {
    pub(super) fn insert(&mut self, handle: Handle) -> HandleId {
        self.last += 1;
        let id = HandleId(self.last);
        self.open.insert(id, handle);
        id
    }

    pub(super) fn get(&self, id: HandleId) -> Option<&Handle> {
        self.open.get(&id)
    }

    pub(super) fn remove(&mut self, id: HandleId) {
        self.open.remove(&id);
    }
}
