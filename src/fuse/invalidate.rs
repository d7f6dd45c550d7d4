//! Tells the kernel what to forget when the store changes.
//!
//! Two threads, neither of which answers requests: a notification can wait for a request that is in flight, and would wait for ever
//! if it were sent from the thread that has to answer it. One turns events into notifications at once. The other does
//! what may take long, which is to find out by a scan what has changed in a database (until then the first has the kernel ask about its objects
//! anew), and repeats those notifications that may have overtaken the answer that they take back.

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
use crate::tree::{Listener, Stale, Tree};

/// How long an answer can be on its way to the kernel after a notification that it ought to have come before.
const REPEAT_AFTER: Duration = Duration::from_millis(50);

/// How long a request waits at most until the kernel has been told of what it changes besides.
const TOLD: Duration = Duration::from_secs(1);

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
                            // From now on nothing is covered; what the kernel has was answered while it was.
                            drop(watcher);
                            tree.diagnostics().error(&error);
                            let all = [Change::Everything];
                            let repeat = send(&tree, &notifier, &all, Patience::Now);
                            thread::sleep(REPEAT_AFTER);
                            notify(&notifier, &repeat);
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
        if !repeat.is_empty() {
            let _ = sender.send(Later::Repeat(Instant::now() + REPEAT_AFTER, repeat));
        }
    }
    if !slow.is_empty() {
        notify(notifier, &tree.doubtful(&slow));
        let _ = sender.send(Later::Changes(slow));
    }
}

fn later(tree: &Tree, notifier: &Notifier, receiver: &Receiver<Later>) {
    let mut repeats: Vec<(Instant, Vec<Stale>)> = Vec::new();
    // All that has come meanwhile at once: one commit is several events, and one scan is enough for them.
    let mut changes: HashSet<Change> = HashSet::new();
    let mut next_scan = Instant::now();
    loop {
        let due = repeats.iter().map(|(due, _)| *due).min();
        let due = if changes.is_empty() {
            due
        } else {
            Some(due.map_or(next_scan, |due| due.min(next_scan)))
        };
        let next = match due {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => receiver.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
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
        let start = Instant::now();
        if !changes.is_empty() && start >= next_scan {
            let changes: Vec<Change> = changes.drain().collect();
            let repeat = send(tree, notifier, &changes, Patience::at_most(SCAN_LIMIT));
            let end = Instant::now();
            repeats.push((end + REPEAT_AFTER, repeat));
            // Half of the time at most, so that a SoftHSM that commits all the while gets at its database.
            next_scan = end + (end - start);
        }
        let now = Instant::now();
        let (due, not_yet): (Vec<_>, Vec<_>) =
            repeats.into_iter().partition(|(due, _)| *due <= now);
        repeats = not_yet;
        for (_, stale) in due {
            notify(notifier, &stale);
        }
    }
}

/// Has the kernel told of what a request makes stale beside that which it is about, before it is answered: by a thread of its own, so
/// that a notification that waited for that request after all would be waited for no longer than [`TOLD`].
///
/// # Errors
/// If no thread is to be had.
pub fn tell(tree: &Tree, notifier: Notifier) -> Result<()> {
    let (sender, receiver) = channel::<(Vec<Stale>, Sender<()>)>();
    thread::Builder::new()
        .name("tokenfs-tell".to_owned())
        .spawn(move || {
            for (stale, told) in receiver {
                notify(&notifier, &stale);
                let _ = told.send(());
            }
        })
        .map_err(|error| Error::io("start the thread that tells the kernel", &error))?;
    tree.listen(Listener(Box::new(move |stale| {
        let (told, done) = channel();
        if sender.send((stale, told)).is_ok() {
            let _ = done.recv_timeout(TOLD);
        }
    })));
    Ok(())
}

/// Sends what is stale after `changes`, and returns what is to be sent once more.
fn send(tree: &Tree, notifier: &Notifier, changes: &[Change], patience: Patience) -> Vec<Stale> {
    let (stale, repeat) = tree.stale(changes, patience);
    notify(notifier, &stale);
    repeat
}

fn notify(notifier: &Notifier, stale: &[Stale]) {
    for stale in stale {
        // A negative offset drops the attributes alone (fuse_reverse_inval_inode in fs/fuse/inode.c).
        let sent = match stale {
            Stale::Content(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
            Stale::Attributes(ino) => notifier.inval_inode(INodeNo(*ino), -1, 0),
        };
        if let Err(error) = sent {
            log::debug!("notification: {error}");
        }
    }
}
