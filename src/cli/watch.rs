//! `auto_unmount`: a small process that outlives a server that is killed, and unmounts what that leaves behind.
//!
//! Its stdin is a pipe whose other end only the server has, so that it ends when the server does, however that comes about.
//! fusermount3 can do this too, but only for mounts that it has made and only together with `allow_other`.

use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, ExitCode, Stdio};

use nix::sys::signal::SigSet;
use nix::unistd::setsid;

use super::daemon::{Stage, close_inherited, name_ourselves, ourselves};
use crate::error::{Error, Result};
use crate::fuse::mountinfo::{self, Mount};
use crate::fuse::unmount::{Unmount, unmount};

/// The process, from the server's side. It ends when this is dropped.
#[derive(Debug)]
pub struct Watcher(Child);

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Starts to watch over `mount`.
///
/// # Errors
/// The process cannot be started.
pub fn start(mount: &Mount) -> Result<Watcher> {
    let name = OsString::from("tokenfs");
    ourselves(Stage::Watch, Some(&name))
        .arg(&mount.point)
        .arg(&mount.device)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(Watcher)
        .map_err(|error| Error::io("cannot start the process for auto_unmount", &error))
}

/// Waits for the end of the server, and unmounts its mount if it is still there. `argv` is from [`start`].
pub(super) fn run(argv: &[OsString]) -> ExitCode {
    // A signal to the whole group is meant for the server.
    let _ = SigSet::all().thread_block();
    let _ = setsid();
    let _ = close_inherited();
    name_ourselves();
    let [_, point, device] = argv else {
        return ExitCode::FAILURE;
    };
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    let point = PathBuf::from(point);
    match mountinfo::find(&point) {
        Ok(Some(mount)) if device == mount.device.as_str() => {
            match unmount(&point, Unmount::Lazily) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        _ => ExitCode::SUCCESS,
    }
}
