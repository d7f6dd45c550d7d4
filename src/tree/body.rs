//! What a file holds while it is written.
//!
//! A scratch file is written in place, by whoever has it open. When it becomes an attribute, that gets what the file held when it was closed
//! last: what is in it while somebody writes is a part of what he means to write, and he goes on to write into the attribute.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// What a file holds, whoever has it open.
pub(super) type Bytes = Arc<Mutex<Body>>;

/// What a file holds now, and what it held before somebody began to write into it.
#[derive(Debug, Default)]
pub(super) struct Body {
    now: Vec<u8>,
    /// What it held when it was closed last, if somebody has been writing into it since.
    closed: Option<Vec<u8>>,
    /// It has been closed at least once, or was never open.
    has_been_closed: bool,
    /// How many descriptors it is being written through.
    writing: usize,
}

impl Body {
    /// A file that is complete.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            has_been_closed: true,
            ..Self::open(bytes)
        }
    }

    /// A file that is open since it was made.
    pub fn open(bytes: Vec<u8>) -> Self {
        Self {
            now: bytes,
            ..Self::default()
        }
    }

    /// Somebody is going to write into it, through a descriptor that nothing was written through since it was flushed.
    pub fn begin(&mut self) {
        if self.writing == 0 && self.has_been_closed {
            self.closed = Some(self.now.clone());
        }
        self.writing += 1;
    }

    /// Who was writing into it is done.
    pub fn end(&mut self) {
        self.writing = self.writing.saturating_sub(1);
        self.has_been_closed = true;
        self.settle();
    }

    /// Somebody has closed it who has written nothing.
    pub fn close(&mut self) {
        self.has_been_closed |= self.writing == 0;
    }

    /// It is complete as it is, as far as can be told: who goes on to write into it says so when he is done.
    fn settle(&mut self) {
        self.closed = (self.writing > 0).then(|| self.now.clone());
    }

    /// It holds that from now on, whoever is writing into it.
    pub fn set(&mut self, bytes: Vec<u8>) {
        self.now = bytes;
        self.settle();
    }

    /// It holds that behind what it held, whoever is writing into it.
    pub fn append(&mut self, bytes: &[u8]) {
        self.now.extend_from_slice(bytes);
        self.settle();
    }

    /// It is so long from now on, in bytes, whoever is writing into it.
    pub fn set_len(&mut self, size: usize) {
        self.now.resize(size, 0);
        self.settle();
    }

    /// What it held when it was closed last; what it holds now, if it was not yet.
    pub fn complete(&self) -> &[u8] {
        self.closed.as_ref().unwrap_or(&self.now)
    }

    /// It was never closed yet, and somebody is writing it.
    pub fn is_new(&self) -> bool {
        self.writing > 0 && !self.has_been_closed
    }

    /// How much memory it takes, in bytes.
    pub fn size(&self) -> u64 {
        let closed = self.closed.as_ref().map_or(0, Vec::len);
        (self.now.len() + closed) as u64
    }
}

impl Deref for Body {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.now
    }
}

impl DerefMut for Body {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_is_writing_is_not_complete() {
        let mut body = Body::new(b"one".to_vec());
        body.begin();
        body.clear();
        body.extend_from_slice(b"tw");
        assert_eq!(body.complete(), b"one");
        // Another one, who closes it while the first is at it still.
        body.begin();
        body.extend_from_slice(b"o");
        body.end();
        body.extend_from_slice(b" three");
        assert_eq!(body.complete(), b"two");
        body.end();
        assert_eq!(body.complete(), b"two three");
        assert_eq!(body.size(), 9);
    }

    #[test]
    fn what_was_never_closed_is_as_it_is() {
        let mut body = Body::open(Vec::new());
        body.begin();
        body.extend_from_slice(b"a part");
        assert_eq!(body.complete(), b"a part");
        assert!(body.is_new());
        body.end();
        body.begin();
        body.clear();
        assert_eq!(body.complete(), b"a part");
        assert!(!body.is_new());
    }
}
