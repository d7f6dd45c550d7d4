//! What a signal does to a mount: SIGINT, SIGTERM and SIGHUP unmount it, SIGXFSZ nothing.
//!
//! The signals are blocked in all threads, and one thread waits for them. It does nothing that a signal handler could not
//! do, and so can do everything: unmounting waits for answers that the other threads give.

use std::fmt;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use super::mountinfo::{self, Mount};
use super::unmount::{Unmount, unmount};
use crate::error::{Error, ErrorKind, Result};

/// How far the mount is.
#[derive(Debug)]
enum State {
    /// Not made yet: nothing has to be taken away.
    Starting,
    /// In place.
    Mounted(Mount),
    /// Out of sight, and in use.
    Detached(Mount),
    /// The kernel has been told to end it.
    Aborted,
    /// Gone.
    Ended,
}

/// The thread that waits for signals.
#[derive(Clone, Debug)]
pub struct Signals {
    state: Arc<Mutex<State>>,
    end: Arc<OnceLock<AtLast>>,
}

/// What is to be done before the process ends.
struct AtLast(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for AtLast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AtLast")
    }
}

impl Signals {
    /// Blocks the signals in this thread and in those that it starts from now on, and starts to wait for them. To be
    /// called before any other thread is started.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        // A file that would become longer than the limit is an error of that write (EFBIG, setrlimit(2)), and not the end of the mount.
        let mut blocked = set;
        blocked.add(Signal::SIGXFSZ);
        blocked
            .thread_block()
            .map_err(|errno| Error::system("cannot block signals", errno))?;
        let signals = Self {
            state: Arc::new(Mutex::new(State::Starting)),
            end: Arc::default(),
        };
        let waiting = signals.clone();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                loop {
                    match set.wait() {
                        Ok(signal) => waiting.received(signal),
                        Err(errno) => log::error!("cannot wait for signals: {}", errno.desc()),
                    }
                }
            })
            .map_err(|error| Error::io("cannot start a thread", &error))?;
        Ok(signals)
    }

    /// Has that done before a signal ends the process in the middle of the session, which it does where the kernel cannot be told to end that: in a
    /// container that does not have `/sys/fs/fuse/connections`.
    pub fn before_the_end(&self, end: impl Fn() + Send + Sync + 'static) {
        // Nobody gives two.
        let _ = self.end.set(AtLast(Box::new(end)));
    }

    fn at_last(&self) {
        if let Some(AtLast(end)) = self.end.get() {
            end();
        }
    }

    /// Makes the mount with `make`, during which a signal waits, and takes it away at a signal from then on.
    pub(super) fn mounting<T>(
        &self,
        make: impl FnOnce() -> Result<(T, Mount)>,
    ) -> Result<(T, Mount)> {
        let mut state = self.lock();
        let (made, mount) = make()?;
        *state = State::Mounted(mount.clone());
        Ok((made, mount))
    }

    /// The session has ended. Whether that was for a second signal.
    pub(super) fn ended(&self) -> bool {
        let before = std::mem::replace(&mut *self.lock(), State::Ended);
        matches!(before, State::Aborted)
    }

    fn received(&self, signal: Signal) {
        let mut state = self.lock();
        match &*state {
            State::Starting => {
                eprintln!("tokenfs: stopped by {signal} before the mount was made");
                std::process::exit(1);
            }
            State::Mounted(mount) => {
                let mount = mount.clone();
                if let Some(next) = take_away(mount, signal) {
                    *state = next;
                }
            }
            State::Detached(mount) => {
                log::warn!("{signal} again: ending at once, whoever uses the mount gets errors");
                if !abort(mount) {
                    self.at_last();
                    std::process::exit(1);
                }
                *state = State::Aborted;
            }
            State::Aborted | State::Ended => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unmounts; the state afterwards if it is another one. When the mount is gone the kernel says so to the session.
fn take_away(mount: Mount, signal: Signal) -> Option<State> {
    if !is_there(&mount) {
        log::warn!(
            "{}: {signal}, but the mount is out of sight already, and still in use; a second signal ends at once",
            mount.point.display()
        );
        return Some(State::Detached(mount));
    }
    match unmount(&mount.point, Unmount::IfUnused) {
        Ok(()) => None,
        Err(error) if error.kind() == ErrorKind::Busy => {
            log::warn!(
                "{}: {signal}, but the mount is in use: taking it out of sight, and serving those who use it until they let go; a second signal ends at once",
                mount.point.display()
            );
            match unmount(&mount.point, Unmount::Lazily) {
                Ok(()) => Some(State::Detached(mount)),
                Err(error) => {
                    log::error!("{error}");
                    None
                }
            }
        }
        Err(error) => {
            log::error!("{error}");
            None
        }
    }
}

/// Whether `mount` is still the topmost one at its place.
pub(super) fn is_there(mount: &Mount) -> bool {
    match mountinfo::find(&mount.point) {
        Ok(Some(found)) => found.device == mount.device,
        Ok(None) => false,
        Err(_) => true,
    }
}

/// Tells the kernel to end the connection, if its control file system is mounted.
pub(super) fn abort(mount: &Mount) -> bool {
    // A FUSE mount has no block device, so its major number is 0 and its connection has the minor number for a name.
    let Some(minor) = mount.device.strip_prefix("0:") else {
        return false;
    };
    fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1").is_ok()
}
