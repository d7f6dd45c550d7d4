//! Requests that have to wait are answered by threads of their own, so that they hold up nobody else. What is left alone is written by such
//! threads too.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;
use crate::tree::Tree;

/// The most requests that wait at a time. More than one reader of the same object is rare, and a waiting thread costs little.
pub(super) const MOST_REQUESTS: usize = 256;

/// Who answers.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    tree: Arc<Tree>,
    count: Arc<Count>,
    most: usize,
}

#[derive(Debug, Default)]
struct Count {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    less: Condvar,
}

impl Waiting {
    /// With so many threads at most.
    pub fn new(tree: Arc<Tree>, most: usize) -> Self {
        Self {
            tree,
            count: Arc::default(),
            most,
        }
    }

    /// The same for what cannot be refused: there are no more of these than files that are open.
    pub fn unlimited(&self) -> Self {
        Self {
            most: usize::MAX,
            ..self.clone()
        }
    }

    /// Answers with what `ask` says: at once, or from another thread if it has to wait.
    pub fn answer<T, R>(
        &self,
        reply: R,
        ask: impl Fn(&Tree, Patience) -> Result<T> + Send + 'static,
        done: impl FnOnce(&Tree, R, Result<T>) + Send + 'static,
    ) where
        R: Send + 'static,
    {
        let at_once = ask(&self.tree, Patience::Now);
        match &at_once {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            _ => return done(&self.tree, reply, at_once),
        }
        self.wait(reply, move |tree, reply, patience| {
            let answer = ask(tree, patience);
            done(tree, reply, answer);
        });
    }

    /// Has a thread of its own answer.
    pub fn wait<R: Send + 'static>(
        &self,
        reply: R,
        answer: impl FnOnce(&Tree, R, Patience) + Send + 'static,
    ) {
        let tree = Arc::clone(&self.tree);
        let Some(slot) = Slot::take(&self.count, self.most) else {
            // It is refused, or answered after all if what it would have waited for has come.
            tree.diagnostics()
                .warning("too many requests are waiting for locks already");
            return answer(&tree, reply, Patience::Now);
        };
        let limit = tree.store().options().lock_wait;
        // If no thread is to be had the reply is dropped with the closure, which answers EIO.
        let started = thread::Builder::new()
            .name("tokenfs-wait".to_owned())
            .spawn(move || {
                let _slot = slot;
                answer(&tree, reply, Patience::at_most(limit));
            });
        if let Err(error) = started {
            let error = Error::io("start a thread for a request that has to wait", &error);
            self.tree.diagnostics().error(&error);
        }
    }

    /// Has a thread of its own do something, if one is to be had; whether that is so.
    pub fn begin(&self, work: impl FnOnce(&Tree) + Send + 'static) -> bool {
        let Some(slot) = Slot::take(&self.count, self.most) else {
            return false;
        };
        let tree = Arc::clone(&self.tree);
        thread::Builder::new()
            .name("tokenfs-due".to_owned())
            .spawn(move || {
                let _slot = slot;
                work(&tree);
            })
            .is_ok()
    }

    /// Waits until no request is waiting any more, but for `limit` at most: what is being written is written to its end before the
    /// process ends.
    pub fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut guard = self
            .count
            .lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while self.count.waiting.load(Ordering::Acquire) > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.count.less.wait_timeout(guard, left);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// One of the places for requests that wait.
struct Slot(Arc<Count>);

impl Slot {
    fn take(count: &Arc<Count>, most: usize) -> Option<Self> {
        let slot = Self(Arc::clone(count));
        (count.waiting.fetch_add(1, Ordering::AcqRel) < most).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        let _guard = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.less.notify_all();
    }
}
