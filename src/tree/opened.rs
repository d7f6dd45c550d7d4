//! What a process has open that is not what there is now.
//!
//! A descriptor goes on to read the version that it was opened with, and programs ask how long that is first (`fstat`): it has to be as long as what
//! they read. The kernel does not say through which descriptor it is asked, nor whether it is asked by name; so who has a file open is told of
//! what he has open, and nobody's answer about the file is remembered until that is closed.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::node::{Ino, Node};
use super::stale::Stale;
use super::{Attributes, Entry, Tree, lock};

/// A descriptor of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    /// The process that opened it, or wrote through it last; 0 if that is not known.
    pub user: u32,
    /// How long that is which is read through it, in bytes.
    pub size: u64,
    /// What is read through it is what was opened, or stored through it, and its process has not changed the file since.
    pub is_as_opened: bool,
    /// It has been changed through it, and that is not stored yet.
    pub is_written: bool,
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
        let process = self.processes.of(pid);
        opened.retain(|opened| are_same(opened.user, process));
        let is_alone = users.iter().all(|(_, user)| are_same(*user, process));
        // The one that was opened last is what a program asks about that has just opened it. The kernel has one length of the file for all who have it
        // open, and keeps who maps it or copies it within the mount from what is behind that: it is not cut for one of several.
        if let Some(latest) = opened.last()
            && latest.is_as_opened
            && (latest.size > present || is_alone)
        {
            entry.attributes.size = latest.size;
        }
    }

    /// Whether somebody has another version open of a file that is `attributes` now, or is writing one.
    pub(super) fn is_open_otherwise(&self, node: &Node, attributes: &Attributes) -> bool {
        let opened = || lock(&self.handles).opened(attributes.ino);
        let is_other = |opened: &Opened| opened.is_written || opened.size != attributes.size;
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
        let process = self.processes.of(pid);
        let users = lock(&self.handles).users(ino);
        users.iter().any(|(_, user)| are_same(*user, process))
    }

    /// What the process `pid` was told of something when it opened that, or, if it `may_be_anybody`, what somebody was.
    pub(super) fn at_open(&self, ino: Ino, pid: u32, may_be_anybody: bool) -> Option<Attributes> {
        let process = self.processes.of(pid);
        let all = lock(&self.handles).all_at_open(ino);
        // One that is not known is nearer than another one.
        let ours = all.iter().rev().find(|(user, _)| *user == process);
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
        let process = self.processes.of(pid);
        let mut handles = lock(&self.handles);
        let mut ours = handles.users(ino);
        ours.retain(|(_, user)| are_same(*user, process));
        handles.are_outdated(ours.into_iter().map(|(handle, _)| handle));
    }
}

/// Whether it is a file that others change.
fn has_versions(node: &Node) -> bool {
    matches!(
        node,
        Node::Attribute(..) | Node::MapEntry(..) | Node::FileInLayout(..)
    )
}

/// Whether two processes are one. One of another pid namespace is 0, and may be anybody.
pub(super) fn are_same(one: u32, other: u32) -> bool {
    one != 0 && one == other
}

/// How long it is believed which process a thread is of: its number can be that of another one when it has ended.
const REMEMBERED: Duration = Duration::from_secs(1);

/// How many threads are remembered before those are forgotten that have been for long enough.
const MANY: usize = 256;

/// The processes of the threads that have asked for something: the kernel tells the number of the thread, and what one thread of a program opens
/// another one reads, which may have ended by then.
#[derive(Debug, Default)]
pub(super) struct Processes(Mutex<HashMap<u32, (u32, Instant)>>);

impl Processes {
    /// The process that a thread is of (`proc(5)`, "status"); the thread itself, if that cannot be found out, and 0 for 0.
    pub(super) fn of(&self, thread: u32) -> u32 {
        if thread == 0 {
            return 0;
        }
        let now = Instant::now();
        let is_fresh = |since: Instant| now.duration_since(since) < REMEMBERED;
        if let Some((process, since)) = lock(&self.0).get(&thread)
            && is_fresh(*since)
        {
            return *process;
        }
        let read = || {
            let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
            let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
            process?.trim().parse().ok()
        };
        let process = read().unwrap_or(thread);
        let mut known = lock(&self.0);
        if known.len() >= MANY {
            known.retain(|_, (_, since)| is_fresh(*since));
        }
        known.insert(thread, (process, now));
        process
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_of_their_process() {
        let process = std::process::id();
        let processes = Processes::default();
        assert_eq!(processes.of(process), process);
        assert_eq!(processes.of(0), 0);
        assert!(!are_same(0, 0));
        let other = std::thread::spawn(|| nix::unistd::gettid().as_raw());
        let (to, here) = std::sync::mpsc::channel();
        let (end, until) = std::sync::mpsc::channel::<()>();
        let alive = std::thread::spawn(move || {
            to.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = until.recv();
        });
        let number = u32::try_from(here.recv().unwrap()).unwrap();
        assert_eq!(processes.of(number), process);
        drop(end);
        alive.join().unwrap();
        // What has ended is a process of its own.
        let ended = u32::try_from(other.join().unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(processes.of(ended), ended);
    }
}
