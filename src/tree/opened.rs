//! What a process has open that is not what there is now.
//!
//! A descriptor goes on to read the version that it was opened with, and programs ask how long that is first (`fstat`): it has to be as long as what
//! they read. The kernel does not say through which descriptor it is asked, nor whether it is asked by name; so who has a file open is told of
//! what he has open, and nobody's answer about the file is remembered until that is closed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::handle::Writer;
use super::node::{Ino, Node};
use super::stale::Stale;
use super::{Attributes, Entry, Tree, lock};

impl Tree {
    /// What is said to the process `pid` of a file that is `entry` now.
    pub(super) fn as_opened(&self, ino: Ino, node: &Node, pid: u32, entry: &mut Entry) {
        if !has_versions(node) {
            return;
        }
        let opened = lock(&self.handles).opened_otherwise(ino, &entry.attributes);
        if opened.is_empty() {
            return;
        }
        entry.valid = Duration::ZERO;
        let is_ours = |(user, _): &&(u32, Attributes)| is_same_process(*user, pid);
        if let Some((_, opened)) = opened.iter().rev().find(is_ours) {
            // Who may open it is decided by what it is now.
            entry.attributes = Attributes {
                size: opened.size,
                atime: opened.atime,
                mtime: opened.mtime,
                ctime: opened.ctime,
                ..entry.attributes
            };
        }
    }

    /// Whether somebody has another version open of a file that is `attributes` now.
    pub(super) fn is_open_otherwise(&self, node: &Node, attributes: &Attributes) -> bool {
        let opened = || lock(&self.handles).opened_otherwise(attributes.ino, attributes);
        has_versions(node) && !opened().is_empty()
    }

    /// A file was opened that is `opened`: what the kernel was told of it before may be another version, whose length is not that of what is read.
    pub(super) fn tell_of_opened(&self, ino: Ino, opened: &Attributes) {
        let told = lock(&self.inodes).get(ino).map(|inode| inode.told_size);
        if told.is_some_and(|told| told != Some(opened.size))
            && let Some(listener) = self.listener.get()
        {
            (listener.0)(vec![Stale::Attributes(ino)]);
        }
    }

    /// A process has written a file: it knows that what it has open of that besides is another version.
    pub(super) fn forget_opened(&self, node: &Node, writer: &Writer) {
        let ino = lock(&self.inodes).number(node);
        let pid = writer.user.load(Ordering::Relaxed);
        lock(&self.handles).forget_reader(ino, |user| is_same_process(user, pid));
    }
}

/// Whether it is a file that others change.
fn has_versions(node: &Node) -> bool {
    matches!(
        node,
        Node::Attribute(..) | Node::MapEntry(..) | Node::FileInLayout(..)
    )
}

/// Whether two threads, of which the kernel tells the number, are of one process (`proc(5)`, "status").
fn is_same_process(one: u32, other: u32) -> bool {
    one == other || process_of(one).is_some_and(|process| Some(process) == process_of(other))
}

fn process_of(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    process?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_of_their_process() {
        let process = std::process::id();
        assert!(is_same_process(process, process));
        assert!(!is_same_process(process, 1));
        let (to, here) = std::sync::mpsc::channel();
        let (end, until) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            to.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = until.recv();
        });
        let number = here.recv().unwrap();
        assert!(is_same_process(u32::try_from(number).unwrap(), process));
        drop(end);
        other.join().unwrap();
    }
}
