//! Who serves a mount, as `.tokenfs/server` says, and the end of that process: until then it keeps the store in use.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::tree::{CONTROL, SERVER};

/// In which the numbers of processes are those of this process.
const NAMESPACE: &str = "/proc/self/ns/pid";

/// What the server of a mount says of itself: its number, and the namespace in which that is its number.
#[must_use]
pub fn this_process() -> Option<String> {
    let namespace = fs::read_link(NAMESPACE).ok()?;
    let number = std::process::id();
    Some(format!("{number} {}\n", namespace.display()))
}

/// The server of a mount.
#[derive(Debug)]
pub struct Server {
    /// Its number.
    pub number: i32,
    process: std::os::fd::OwnedFd,
}

impl Server {
    /// The one of the mount at `point`; nothing if it cannot be told: the mount is somebody else's, its server is dead, or is one of
    /// another container.
    #[must_use]
    pub fn of(point: &Path) -> Option<Self> {
        let path = point.join(CONTROL).join(SERVER);
        let said = fs::read_to_string(&path).ok()?;
        let (number, namespace) = said.trim_end().split_once(' ')?;
        if Path::new(namespace) != fs::read_link(NAMESPACE).ok()? {
            return None;
        }
        let number = number.parse().ok()?;
        let process = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
        // It answers still, so that its number cannot have become another process's before that was opened.
        (fs::read_to_string(&path).ok()? == said).then_some(Self { number, process })
    }

    /// Whether the process is stopped, by a signal or a debugger (proc_pid_stat(5)), so that it answers nothing.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.number));
        stat.is_ok_and(|stat| {
            // The name in parentheses can have anything in it.
            let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
            state.is_some_and(|state| state.starts_with(['T', 't']))
        })
    }

    /// Waits for the end of the process, but for `limit` at most; whether it has come.
    #[must_use]
    pub fn has_ended_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            let mut ends = [PollFd::new(&self.process, PollFlags::IN)];
            match poll(&mut ends, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}
