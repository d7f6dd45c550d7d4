//! What a process has open that is not what there is now.
//!
//! A descriptor goes on to read the version that it was opened with, and programs ask how long that is first (`fstat`): it has to be as long as what
//! they read. The kernel does not say through which descriptor it is asked, nor whether it is asked by name; so who has a file open is told of
//! what he has open, and nobody's answer about the file is remembered until that is closed.

use std::collections::HashMap;
use std::time::Duration;

use super::node::{Ino, Node};
use super::stale::Stale;
use super::{Attributes, Entry, Tree, lock};

/// A descriptor of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    /// The thread that opened it, or wrote through it last; 0 if that is not known.
    pub user: u32,
    /// How long that is which is read through it, in bytes.
    pub size: u64,
    /// What is read through it is what was opened, or stored through it, and its process has not changed the file since.
    pub is_as_opened: bool,
}

impl Tree {
    /// What is said to the process `pid` of a file that is `entry` now.
    pub(super) fn as_opened(&self, ino: Ino, node: &Node, pid: u32, entry: &mut Entry) {
        if !has_versions(node) {
            return;
        }
        let present = entry.attributes.size;
        let (mut opened, users) = {
            let handles = lock(&self.handles);
            (handles.opened(ino), handles.users(ino))
        };
        if opened.iter().all(|opened| opened.size == present) {
            return;
        }
        entry.valid = Duration::ZERO;
        let mut processes = Processes::default();
        opened.retain(|opened| processes.are_same(opened.user, pid));
        let is_alone = users.iter().all(|(_, user)| processes.are_same(*user, pid));
        // The one that was opened last is what a program asks about that has just opened it. The kernel has one length of the file for all who have it
        // open, and keeps who maps it or copies it within the mount from what is behind that: it is not cut for one of several.
        if let Some(latest) = opened.last()
            && latest.is_as_opened
            && (latest.size > present || is_alone)
        {
            entry.attributes.size = latest.size;
        }
    }

    /// Whether somebody has another version open of a file that is `attributes` now.
    pub(super) fn is_open_otherwise(&self, node: &Node, attributes: &Attributes) -> bool {
        let opened = || lock(&self.handles).opened(attributes.ino);
        let is_other = |opened: &Opened| opened.size != attributes.size;
        has_versions(node) && opened().iter().any(is_other)
    }

    /// A file of `size` bytes was opened: what the kernel was told of it before may be another version, whose length is not that of what is read.
    pub(super) fn tell_of_opened(&self, ino: Ino, size: u64) {
        let is_other = lock(&self.inodes).get_mut(ino).is_some_and(|inode| {
            let told = inode.told_size.replace(size);
            told.is_some_and(|told| told != size)
        });
        if is_other && let Some(listener) = self.listener.get() {
            (listener.0)(vec![Stale::Attributes(ino)]);
        }
    }

    /// Whether the process `pid` has the file `ino` open.
    pub(super) fn has_open(&self, ino: Ino, pid: u32) -> bool {
        let users = lock(&self.handles).users(ino);
        let mut processes = Processes::default();
        let mut is_its = |(_, user): &(_, u32)| processes.are_same(*user, pid);
        users.iter().any(&mut is_its)
    }

    /// What the process `pid` was told of something when it opened that, or, if it `may_be_anybody`, what somebody was.
    pub(super) fn at_open(&self, ino: Ino, pid: u32, may_be_anybody: bool) -> Option<Attributes> {
        let all = lock(&self.handles).all_at_open(ino);
        let mut processes = Processes::default();
        let ours = all
            .iter()
            .rev()
            .find(|(user, _)| *user == pid || processes.are_same(*user, pid));
        let anybody = all.last().filter(|_| may_be_anybody);
        ours.or(anybody).map(|(_, told)| *told)
    }

    /// A file has another name, under which its text may be another one.
    pub(super) fn forget_all_opened(&self, node: &Node) {
        let ino = lock(&self.inodes).number(node);
        let users = lock(&self.handles).users(ino);
        lock(&self.handles).are_outdated(users.into_iter().map(|(handle, _)| handle));
    }

    /// The process `pid` has changed a file: it knows that what it has open of that is another version.
    pub(super) fn forget_opened(&self, node: &Node, pid: u32) {
        let ino = lock(&self.inodes).number(node);
        let users = lock(&self.handles).users(ino);
        let mut processes = Processes::default();
        let ours: Vec<_> = users
            .into_iter()
            .filter(|(_, user)| processes.are_same(*user, pid))
            .map(|(handle, _)| handle)
            .collect();
        lock(&self.handles).are_outdated(ours);
    }
}

/// Whether it is a file that others change.
fn has_versions(node: &Node) -> bool {
    matches!(
        node,
        Node::Attribute(..) | Node::MapEntry(..) | Node::FileInLayout(..)
    )
}

/// The processes of some threads.
#[derive(Debug, Default)]
struct Processes(HashMap<u32, Option<u32>>);

impl Processes {
    /// Whether two threads, of which the kernel tells the number, are of one process (`proc(5)`, "status"). One of another pid namespace is 0, and
    /// may be anybody.
    fn are_same(&mut self, one: u32, other: u32) -> bool {
        if one == 0 || other == 0 {
            return false;
        }
        one == other || {
            let process = self.of(one);
            process.is_some() && process == self.of(other)
        }
    }

    fn of(&mut self, thread: u32) -> Option<u32> {
        let read = || {
            let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
            let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
            process?.trim().parse().ok()
        };
        *self.0.entry(thread).or_insert_with(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_of_their_process() {
        let process = std::process::id();
        let mut processes = Processes::default();
        assert!(processes.are_same(process, process));
        assert!(!processes.are_same(0, 0));
        assert!(!processes.are_same(process, 1));
        let (to, here) = std::sync::mpsc::channel();
        let (end, until) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            to.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = until.recv();
        });
        let number = here.recv().unwrap();
        assert!(processes.are_same(u32::try_from(number).unwrap(), process));
        drop(end);
        other.join().unwrap();
    }
}
