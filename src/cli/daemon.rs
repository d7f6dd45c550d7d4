//! The server in the background.
//!
//! There is no fork: the first process starts this program again, with the same arguments and a mark in the environment,
//! waits for a word on a pipe, and ends. The second one has its own session, gives up all descriptors that it was started
//! with, and lets go of stdout and stderr when the tree can be used, so that nobody waits for them to close.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use nix::sys::signal::Signal;
use nix::unistd::{close, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use super::Failure;
use crate::error::{Error, ErrorKind, Result};

/// This program, even if its file has been replaced since.
const OURSELVES: &str = "/proc/self/exe";
/// The mark in the environment.
const STAGE: &str = "_TOKENFS_STAGE";
/// The word on the pipe.
const READY: &[u8] = b"ready\n";

/// Which of its processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The one that the user started.
    First,
    /// The server in the background.
    Daemon,
    /// The one that unmounts when the server is killed ([`super::watch`]).
    Watch,
}

impl Stage {
    /// That of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        match std::env::var_os(STAGE) {
            Some(stage) if stage == "daemon" => Self::Daemon,
            Some(stage) if stage == "watch" => Self::Watch,
            _ => Self::First,
        }
    }

    fn mark(self) -> &'static str {
        match self {
            Self::First => "",
            Self::Daemon => "daemon",
            Self::Watch => "watch",
        }
    }
}

/// This program once more, as `stage`, called `name`.
pub(super) fn ourselves(stage: Stage, name: Option<&OsString>) -> Command {
    let mut command = Command::new(OURSELVES);
    command.env(STAGE, stage.mark());
    if let Some(name) = name {
        command.arg0(name);
    }
    command
}

/// Starts the server, and waits until it is ready or has failed.
///
/// # Errors
/// It failed; it has said why, or did not come to it.
pub fn start(argv: &[OsString]) -> Result<(), Failure> {
    let mut server = ourselves(Stage::Daemon, argv.first())
        .args(argv.iter().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io("cannot start the server", &error))?;
    let mut said = Vec::new();
    if let Some(mut pipe) = server.stdout.take() {
        // Up to its end, which is when the server lets go of stdout: by then it has let go of stderr too.
        pipe.read_to_end(&mut said)
            .map_err(|error| Error::io("cannot hear the server", &error))?;
    }
    if said == READY {
        return Ok(());
    }
    let status = server
        .wait()
        .map_err(|error| Error::io("cannot wait for the server", &error))?;
    Err(why(status))
}

/// What to make of a server that ended before it was ready.
fn why(status: ExitStatus) -> Failure {
    let how = match (status.code(), status.signal()) {
        // It has said why.
        (Some(code @ (1 | 2 | 32)), _) => return Failure::Reported(code as u8),
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    };
    Error::new(
        ErrorKind::System(libc::EIO),
        format!("the server {how} before it was ready, without a word; try it with -f, and RUST_LOG=debug in the environment"),
    )
    .into()
}

/// Makes this process a server: a session of its own, and nobody's descriptors. To be called before anything is opened.
///
/// # Errors
/// The system refuses.
pub fn detach() -> Result<()> {
    close_inherited()?;
    setsid().map_err(|errno| Error::system("setsid", errno))?;
    name_ourselves();
    Ok(())
}

/// Closes all descriptors above stderr, which can only be inherited as long as nothing has been opened.
pub(super) fn close_inherited() -> Result<()> {
    let failed = |error: io::Error| Error::io("cannot list descriptors", &error);
    let mut open: Vec<RawFd> = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        open.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // The one of the listing itself is closed already.
        let _ = close(fd);
    }
    Ok(())
}

/// The kernel calls us "exe" for the path that we were started from; `ps`, `pgrep` and `fuser -v` shall say tokenfs.
pub(super) fn name_ourselves() {
    let _ = std::fs::write("/proc/self/comm", "tokenfs");
}

/// Tells the first process that the tree can be used, and lets go of stdin, stdout and stderr.
///
/// # Errors
/// Nobody listens any more: the first process was interrupted, so that the mount is not wanted.
pub fn ready() -> Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Error::io("open", &error).at("/dev/null"))?;
    let mut stdout = io::stdout();
    stdout
        .write_all(READY)
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::io("interrupted, so not mounted", &error))?;
    let failed = |errno| Error::system("cannot let go of the terminal", errno);
    dup2_stdin(&null).map_err(failed)?;
    dup2_stderr(&null).map_err(failed)?;
    // The last one: the first process waits for it.
    dup2_stdout(&null).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_says_nothing_is_spoken_for() {
        let text = |raw| match why(ExitStatus::from_raw(raw)) {
            Failure::Failed(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(text(libc::SIGKILL).starts_with("the server was killed by SIGKILL before"));
        assert!(text(101 << 8).starts_with("the server ended with exit code 101 before"));
        assert!(text(0).starts_with("the server ended with exit code 0 before"));
        for code in [1, 2, 32] {
            let why = why(ExitStatus::from_raw(i32::from(code) << 8));
            assert!(matches!(why, Failure::Reported(reported) if reported == code));
        }
    }
}
