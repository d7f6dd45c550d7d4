//! A thread that has written to the store what has been left alone for long enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wait::Waiting;
use crate::error::{Error, Result};
use crate::tree::Tree;

/// When it is looked again whether all that was due is done, if nobody says so before that: no thread may have been to be had for it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How many objects are written at a time, or wait for being. More than a few are rare, and the requests have their own threads.
const MOST: usize = 64;

/// Runs until it is dropped, which waits for what is being written.
#[derive(Debug)]
pub struct Settling {
    tree: Arc<Tree>,
    waiting: Waiting,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread. What is due is done by threads of its own, so that what has to wait for a lock holds up nothing else.
///
/// # Errors
/// If no thread is to be had.
pub fn start(tree: &Arc<Tree>) -> Result<Settling> {
    let stop = Arc::new(AtomicBool::new(false));
    let waiting = Waiting::new(Arc::clone(tree), MOST);
    let (settled, stopped, attended) = (Arc::clone(tree), Arc::clone(&stop), waiting.clone());
    let thread = thread::Builder::new()
        .name("tokenfs-settle".to_owned())
        .spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let (tasks, mut next) = settled.due();
                if !tasks.is_empty() {
                    let again = Instant::now() + LOOK_AGAIN;
                    next = Some(next.map_or(again, |next| next.min(again)));
                }
                for task in tasks {
                    // If there is no thread for it, it is given out again when another one has ended.
                    if !attended.begin(|tree| tree.attend(task)) {
                        log::debug!("no thread for what is due");
                    }
                }
                settled.wait_for_work(next);
            }
        })
        .map_err(|error| Error::io("start the thread that writes what was left alone", &error))?;
    Ok(Settling {
        tree: Arc::clone(tree),
        waiting,
        stop,
        thread: Some(thread),
    })
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.tree.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let lock_wait = self.tree.store().options().lock_wait;
        self.waiting.drain(2 * lock_wait + Duration::from_secs(1));
    }
}
