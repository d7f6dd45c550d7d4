//! Tells the kernel what to forget when the store changes.
//!
//! Two threads, neither of which answers requests: a notification can wait for a request that is in flight, and would wait for ever
//! if it were sent from the thread that has to answer it. One turns events into notifications at once. The other does
//! what may take long, which is scanning a database, and repeats those notifications that may have overtaken the answer that they
//! take back.

use std::collections::HashSet;
use std::io::PipeWriter;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier};

use crate::error::{Error, Result};
use crate::store::Patience;
use crate::store::watch::{Change, Watcher};
use crate::tree::{Stale, Tree};

/// How long an answer can be on its way to the kernel after a notification that it ought to have come before.
const REPEAT_AFTER: Duration = Duration::from_millis(50);

/// How soon to look whether somebody who was reading is done.
const HELD_PAUSE: Duration = Duration::from_millis(5);

/// How long a database that is locked is waited for before all of it is taken for changed.
const SCAN_LIMIT: Duration = Duration::from_secs(1);

/// Runs until it is dropped.
#[derive(Debug)]
pub struct Invalidation {
    stop: Option<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Invalidation {
    fn drop(&mut self) {
        // Closing it is the signal.
        self.stop.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Work for the second thread.
enum Later {
    Changes(Vec<Change>),
    Repeat(Instant, Vec<Stale>),
}

/// Starts to watch the store of `tree`, and to send what is stale to `notifier`.
///
/// # Errors
/// If the store cannot be watched. The tree then gives out answers that are soon asked for again, and nothing is lost but
/// speed.
pub fn start(tree: &Arc<Tree>, notifier: Notifier) -> Result<Invalidation> {
    let failed = |error: std::io::Error| Error::io("start to watch the store", &error);
    let mut watcher = Watcher::new(tree.store(), tree.coverage().clone())?;
    let (stopped, stop) = std::io::pipe().map_err(failed)?;
    let (sender, receiver) = channel();
    let mut threads = Vec::new();
    let (second_tree, second_notifier) = (Arc::clone(tree), notifier.clone());
    threads.push(
        thread::Builder::new()
            .name("tokenfs-later".to_owned())
            .spawn(move || later(&second_tree, &second_notifier, &receiver))
            .map_err(failed)?,
    );
    let tree = Arc::clone(tree);
    threads.push(
        thread::Builder::new()
            .name("tokenfs-watch".to_owned())
            .spawn(move || {
                let mut changes = Vec::new();
                loop {
                    match watcher.wait(&stopped, &mut changes) {
                        Ok(true) => dispatch(&tree, &notifier, &sender, &mut changes),
                        Ok(false) => break,
                        Err(error) => {
                            // Nothing is covered any more; what the kernel has was answered while it was.
                            tree.diagnostics().error(&error);
                            send(&tree, &notifier, &[Change::Everything], Patience::Now);
                            break;
                        }
                    }
                }
            })
            .map_err(failed)?,
    );
    Ok(Invalidation {
        stop: Some(stop),
        threads,
    })
}

fn dispatch(tree: &Tree, notifier: &Notifier, sender: &Sender<Later>, changes: &mut Vec<Change>) {
    let (slow, quick): (Vec<Change>, Vec<Change>) = changes
        .drain(..)
        .partition(|change| matches!(change, Change::Database(_)));
    if !quick.is_empty() {
        let repeat = send(tree, notifier, &quick, Patience::Now);
        for repeat in repeat {
            let _ = sender.send(repeat);
        }
    }
    if !slow.is_empty() {
        let _ = sender.send(Later::Changes(slow));
    }
}

fn later(tree: &Tree, notifier: &Notifier, receiver: &Receiver<Later>) {
    let mut repeats: Vec<(Instant, Vec<Stale>)> = Vec::new();
    loop {
        let now = Instant::now();
        let due = repeats.iter().map(|(due, _)| *due).min();
        let next = match due {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => receiver.recv_timeout(due.saturating_duration_since(now)),
        };
        // All that has come meanwhile at once: one commit is several events, and one scan is enough for them.
        let mut changes: HashSet<Change> = HashSet::new();
        match next {
            Ok(first) => {
                for work in std::iter::once(first).chain(receiver.try_iter()) {
                    match work {
                        Later::Changes(more) => changes.extend(more),
                        Later::Repeat(due, stale) => repeats.push((due, stale)),
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if !changes.is_empty() {
            let changes: Vec<Change> = changes.into_iter().collect();
            let repeat = send(tree, notifier, &changes, Patience::at_most(SCAN_LIMIT));
            for later in repeat {
                if let Later::Repeat(due, stale) = later {
                    repeats.push((due, stale));
                }
            }
        }
        let now = Instant::now();
        let (due, not_yet): (Vec<_>, Vec<_>) =
            repeats.into_iter().partition(|(due, _)| *due <= now);
        repeats = not_yet;
        for (_, stale) in due {
            let held = notify(tree, notifier, stale);
            if !held.is_empty() {
                repeats.push((now + HELD_PAUSE, held));
            }
        }
    }
}

/// Sends what is stale after `changes`, and returns what is to be sent later.
fn send(tree: &Tree, notifier: &Notifier, changes: &[Change], patience: Patience) -> Vec<Later> {
    let (stale, repeat) = tree.stale(changes, patience);
    let held = notify(tree, notifier, stale);
    let now = Instant::now();
    [(now + HELD_PAUSE, held), (now + REPEAT_AFTER, repeat)]
        .into_iter()
        .filter(|(_, stale)| !stale.is_empty())
        .map(|(due, stale)| Later::Repeat(due, stale))
        .collect()
}

/// Sends all but the content that somebody is just reading, and returns that.
fn notify(tree: &Tree, notifier: &Notifier, stale: Vec<Stale>) -> Vec<Stale> {
    let mut held = Vec::new();
    for stale in stale {
        // A negative offset drops the attributes alone (fuse_reverse_inval_inode in fs/fuse/inode.c).
        let sent = match &stale {
            Stale::Content(ino) if tree.take_back(*ino) => {
                held.push(stale.clone());
                notifier.inval_inode(INodeNo(*ino), -1, 0)
            }
            Stale::Content(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
            Stale::Attributes(ino) => {
                tree.take_back(*ino);
                notifier.inval_inode(INodeNo(*ino), -1, 0)
            }
            Stale::Entry(parent, name) => notifier.inval_entry(INodeNo(*parent), name),
        };
        if let Err(error) = sent {
            log::debug!("notification: {error}");
        }
    }
    held
}
