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
    now: Arc<Vec<u8>>,
    /// What it held when it was closed last, if somebody has been writing into it since.
    closed: Option<Arc<Vec<u8>>>,
    /// It has been closed at least once by somebody who could write it, or was never open.
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
            now: Arc::new(bytes),
            ..Self::default()
        }
    }

    /// Somebody is going to write into it, through a descriptor that nothing was written through since it was flushed.
    pub fn begin(&mut self) {
        if self.writing == 0 && self.has_been_closed {
            self.closed = Some(Arc::clone(&self.now));
        }
        self.writing += 1;
    }

    /// Whether who writes into it, perhaps as one who `begins` to, has all that it holds copied: the copy that was closed stays.
    pub fn is_copied(&self, begins: bool) -> bool {
        let is_kept = begins && self.writing == 0 && self.has_been_closed;
        is_kept || Arc::strong_count(&self.now) > 1
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
        self.closed = (self.writing > 0).then(|| Arc::clone(&self.now));
    }

    /// It holds that from now on, whoever is writing into it.
    pub fn set(&mut self, bytes: Vec<u8>) {
        self.now = Arc::new(bytes);
        self.settle();
    }

    /// It holds that behind what it held, whoever is writing into it.
    pub fn append(&mut self, bytes: &[u8]) {
        self.closed = None;
        Arc::make_mut(&mut self.now).extend_from_slice(bytes);
        self.settle();
    }

    /// It is so long from now on, in bytes, whoever is writing into it.
    pub fn set_len(&mut self, size: usize) {
        self.closed = None;
        self.resize(size);
        self.settle();
    }

    /// Cuts or extends what it holds now to so many bytes, and lets go of the memory that takes no more.
    pub fn resize(&mut self, size: usize) {
        let Some(bytes) = Arc::get_mut(&mut self.now) else {
            let mut bytes = Vec::with_capacity(size);
            bytes.extend(self.now.iter().take(size));
            bytes.resize(size, 0);
            self.now = Arc::new(bytes);
            return;
        };
        let is_cut = size < bytes.len();
        bytes.resize(size, 0);
        if is_cut {
            bytes.shrink_to_fit();
        }
    }

    /// What it held when it was closed last; what it holds now, if it was not yet.
    pub fn complete(&self) -> &[u8] {
        self.closed.as_deref().unwrap_or(&self.now)
    }

    /// It was never closed yet, and somebody is writing it.
    pub fn is_new(&self) -> bool {
        self.writing > 0 && !self.has_been_closed
    }

    /// What it holds now, as it is kept for those who read it.
    pub fn share(&self) -> Arc<Vec<u8>> {
        Arc::clone(&self.now)
    }

    /// How much memory it takes, in bytes.
    pub fn size(&self) -> u64 {
        let closed = self.closed.as_ref();
        let closed = closed.filter(|closed| !Arc::ptr_eq(closed, &self.now));
        (self.now.len() + closed.map_or(0, |closed| closed.len())) as u64
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
        Arc::make_mut(&mut self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_is_writing_is_not_complete() {
        let mut body = Body::new(b"one".to_vec());
        assert!(body.is_copied(true) && !body.is_copied(false));
        body.begin();
        assert_eq!(body.size(), 3);
        body.resize(0);
        body.extend_from_slice(b"tw");
        assert!(!body.is_copied(true));
        assert_eq!((body.complete(), body.size()), (&b"one"[..], 5));
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
        body.resize(0);
        assert_eq!(body.complete(), b"a part");
        assert!(!body.is_new());
    }

    #[test]
    fn what_is_cut_off_takes_no_memory() {
        let mut body = Body::new(vec![0; 1 << 20]);
        body.resize(1);
        assert!(body.now.capacity() < 1 << 10);
    }
}
