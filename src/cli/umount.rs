//! `tokenfs umount`.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::Failure;
use super::args::UmountArgs;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::server::Server;
use crate::fuse::unmount::{Unmount, find_mount, unmount};

/// How long the server may take to say who it is, which needs no lock and no disk.
const ANSWER: Duration = Duration::from_secs(10);

/// How long the end of the server is waited for. It is busy for `2 × lock_wait` and a second at most, unless the mount is seen
/// elsewhere, in another container, and goes on there.
const LONGEST: Duration = Duration::from_secs(30);

/// Unmounts, if it is a mount of tokenfs and nobody uses it. What is pending is written before, and the server has ended, so that when this
/// returns the store is complete and nobody of ours uses it.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &UmountArgs) -> Result<(), Failure> {
    let point = find_mount(&args.point)?;
    let server = beside({
        let point = point.clone();
        move || Server::of(&point)
    });
    let server = match server.recv_timeout(ANSWER) {
        Ok(server) => server,
        Err(RecvTimeoutError::Timeout) => return Err(silent(&point).into()),
        Err(RecvTimeoutError::Disconnected) => None,
    };
    write_pending(&point, server.as_ref())?;
    unmount(&point, Unmount::IfUnused)?;
    if let Some(server) = server
        && !server.has_ended_within(LONGEST)
    {
        eprintln!(
            "tokenfs: warning: unmounted, but the server (process {}) has not ended after {} s, and keeps the store in use",
            server.number,
            LONGEST.as_secs()
        );
    }
    Ok(())
}

/// Does something that the server of a mount has to answer in a thread of its own: if that is stopped it never comes back.
fn beside<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(ask()));
    receiver
}

/// Syncs the root of a mount, which writes what is pending anywhere in it, for as long as that takes.
fn write_pending(point: &Path, server: Option<&Server>) -> Result<()> {
    // One that cannot be opened has nothing pending that could be written: its server is dead, or the mount is somebody else's.
    let synced = beside({
        let point = point.to_owned();
        move || File::open(point).map_or(Ok(()), |root| root.sync_all())
    });
    let synced = loop {
        match synced.recv_timeout(ANSWER) {
            Ok(synced) => break synced,
            Err(RecvTimeoutError::Timeout) if server.is_some_and(Server::is_stopped) => {
                return Err(silent(point));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    };
    synced.map_err(|error| {
        let detail = "what was written into the mount and is pending cannot be written to the store, so it stays mounted; \
                      .tokenfs/log has the reason";
        Error::io(detail, &error).at(point)
    })
}

/// The server of a mount does not answer.
fn silent(point: &Path) -> Error {
    let detail = "its server does not answer: it is stopped, or hangs. It stays mounted; \
                  \"umount -l\" (\"fusermount3 -uz\") takes the mount away all the same, and what is pending in it is lost if the server never goes on";
    Error::new(ErrorKind::Busy, detail).at(point)
}
