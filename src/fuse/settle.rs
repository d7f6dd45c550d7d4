//! A thread that writes to the store what has been left alone for long enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};
use crate::tree::Tree;

/// Runs until it is dropped.
#[derive(Debug)]
pub struct Settling {
    tree: Arc<Tree>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread.
///
/// # Errors
/// If no thread is to be had.
pub fn start(tree: &Arc<Tree>) -> Result<Settling> {
    let stop = Arc::new(AtomicBool::new(false));
    let (settled, stopped) = (Arc::clone(tree), Arc::clone(&stop));
    let thread = thread::Builder::new()
        .name("tokenfs-settle".to_owned())
        .spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let due = settled.settle();
                settled.wait_for_work(due);
            }
        })
        .map_err(|error| Error::io("start the thread that writes what was left alone", &error))?;
    Ok(Settling {
        tree: Arc::clone(tree),
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
    }
}
