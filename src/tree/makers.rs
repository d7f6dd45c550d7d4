//! Who makes a directory.
//!
//! A copy that pauses looks like one that is finished. While who made its directory lives, and has not said that it is finished, it is being made.

use std::collections::{BTreeSet, HashMap};
use std::fs;

/// The processes that have made a directory, or given it a time: one of them says when it is finished.
#[derive(Clone, Debug, Default)]
pub(super) struct Makers {
    all: BTreeSet<u32>,
    /// Who goes on with it: one that comes upon what another one has left there begins by giving it a time.
    last: Option<u32>,
}

impl Makers {
    /// Of what this process makes; of what nobody does.
    pub fn new(maker: Option<u32>) -> Self {
        Self {
            all: maker.into_iter().collect(),
            last: maker,
        }
    }

    /// Adds one. Whether he was not among them.
    pub fn insert(&mut self, pid: u32) -> bool {
        self.last = Some(pid);
        self.all.insert(pid)
    }

    pub fn contains(&self, pid: u32) -> bool {
        self.all.contains(&pid)
    }

    /// They have said that it is finished.
    pub fn are_done(&mut self) {
        self.last = None;
    }

    /// Whether who is at it can still go on.
    pub fn are_at_it(&self, alive: &mut Alive) -> bool {
        self.last.is_some_and(|pid| alive.has(pid))
    }
}

/// Which processes there are, each of which is looked for once.
#[derive(Debug, Default)]
pub(super) struct Alive(HashMap<u32, bool>);

impl Alive {
    fn has(&mut self, pid: u32) -> bool {
        *self.0.entry(pid).or_insert_with(|| is_alive(pid))
    }
}

/// Whether there is this thread, and it is no zombie (`proc(5)`, `/proc/PID/stat`). One that cannot be seen is none.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name of the program comes before it, in parentheses, and can have some in it.
    let behind = stat.rsplit(|byte| *byte == b')').next();
    let mut state = behind.into_iter().flatten().filter(|byte| **byte != b' ');
    !matches!(state.next(), None | Some(b'Z' | b'X' | b'x'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn who_has_ended_is_not_alive_whether_he_was_waited_for_or_not() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let makers = Makers::new(Some(child.id()));
        assert!(makers.are_at_it(&mut Alive::default()));
        // It ends, and is a zombie.
        drop(child.stdin.take());
        while makers.are_at_it(&mut Alive::default()) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!makers.are_at_it(&mut Alive::default()));
        assert!(!Makers::default().are_at_it(&mut Alive::default()));
        assert!(!Makers::new(Some(0)).are_at_it(&mut Alive::default()));
        let mut makers = Makers::new(Some(std::process::id()));
        assert!(makers.are_at_it(&mut Alive::default()));
        makers.are_done();
        assert!(!makers.are_at_it(&mut Alive::default()));
        // Somebody else has taken it on.
        assert!(makers.insert(0));
        assert!(!makers.are_at_it(&mut Alive::default()) && makers.contains(std::process::id()));
    }
}
