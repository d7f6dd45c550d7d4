//! `tokenfs umount`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::Failure;
use super::args::UmountArgs;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::server::Server;
use crate::fuse::unmount::{Unmount, find_mount, quoted, unmount};
use crate::tree::{CONTROL, LAYOUT, LOG, TOKEN};

/// How long the server may take to say who it is, which needs no lock and no disk.
const ANSWER: Duration = Duration::from_secs(10);

/// How long the end of the server is waited for. It is busy for `5 × lock_wait` and a second, if one lock stays
/// taken all the while: twice for what somebody still waits for, and once each for what SoftHSM has overwritten, for what was closed last and for
/// what is pending (64 objects at a time). Longer only if the mount is seen
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
            "tokenfs: warning: unmounted, but the server (process {}) has not ended after {} s, and keeps the store in use: perhaps the mount goes on elsewhere, in a container or \
             through a bind mount",
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
        move || {
            let log = refusals(&point);
            let synced = File::open(point).map_or(Ok(()), |root| root.sync_all());
            (synced, log)
        }
    });
    let (synced, before) = loop {
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
        let is_any = name_pending(point, before);
        let detail = if is_any || error.raw_os_error() != Some(libc::EINVAL) {
            "what was written into the mount and is pending cannot be written to the store, so it stays mounted; \
             .tokenfs/log has the reason"
        } else {
            "what was removed in the mount could not be removed from the store, and is back; nothing is pending any more, and \
             \"tokenfs umount\" again takes the mount away; .tokenfs/log has the reason"
        };
        Error::io(detail, &error).at(point)
    })
}

/// Says on standard error what is pending in a mount, each as a path that a shell takes, with the reason that the log has, if it has one; and what
/// else could not be written, which was not in the log `before`. Returns whether anything is pending, as far as can be told.
fn name_pending(point: &Path, before: Vec<String>) -> bool {
    let named = beside({
        let point = point.to_owned();
        move || (pending(&point).unwrap_or_default(), refusals(&point))
    });
    // Who does not answer by now has answered `sync`, and does not keep its refusal from being said.
    let Ok((paths, mut log)) = named.recv_timeout(ANSWER) else {
        return true;
    };
    let is_any = !paths.is_empty();
    for path in paths {
        let name = path.strip_prefix(point).unwrap_or(&path).display();
        let entry = format!("{name}: ");
        let latest = log.iter().rev().find_map(|line| line.strip_prefix(&entry));
        let reason = latest.map_or(String::new(), |reason| format!(": {reason}"));
        eprintln!("tokenfs: {}: pending{reason}", quoted(&path));
        log.retain(|line| !line.starts_with(&entry));
    }
    for line in log.iter().filter(|line| !before.contains(line)) {
        eprintln!("tokenfs: {line}");
    }
    is_any
}

/// The errors that the log of a mount has, oldest first, without their times.
fn refusals(point: &Path) -> Vec<String> {
    let log = fs::read_to_string(point.join(CONTROL).join(LOG)).unwrap_or_default();
    let error = |line: &str| {
        line.split_once(" error: ")
            .map(|(_, error)| error.to_owned())
    };
    log.lines().filter_map(error).collect()
}

/// The tokens and objects that a mount has and the store has not, which is what `.tokenfs/file` shows.
fn pending(point: &Path) -> io::Result<Vec<PathBuf>> {
    let stored = point.join(CONTROL).join(LAYOUT);
    let mut pending = Vec::new();
    // What is in the mount comes first: what is written between the two is in the store, and so no longer pending.
    let (tokens, stored_tokens) = (names(point)?, names(&stored)?);
    for token in tokens.iter().filter(|name| *name != CONTROL) {
        let directory = point.join(token);
        // A directory with nothing in it is nothing.
        let is_empty = |path: &Path| names(path).is_ok_and(|names| names.is_empty());
        if !stored_tokens.contains(token) {
            pending.extend((!is_empty(&directory)).then_some(directory));
            continue;
        }
        // Of one that cannot be read nobody can tell.
        let (Ok(objects), Ok(files)) = (names(&directory), names(&stored.join(token))) else {
            continue;
        };
        for object in objects.iter().filter(|name| *name != TOKEN) {
            let mut file = object.clone();
            file.push(".object");
            let path = directory.join(object);
            // What was removed between the two is in neither.
            if !files.contains(&file) && path.is_dir() && !is_empty(&path) {
                pending.push(path);
            }
        }
    }
    Ok(pending)
}

fn names(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

/// The server of a mount does not answer.
fn silent(point: &Path) -> Error {
    let detail = "its server does not answer: it is stopped, or hangs. It stays mounted; \
                  \"umount -l\" (\"fusermount3 -uz\") takes the mount away all the same, and what is pending in it is lost if the server never goes on";
    Error::new(ErrorKind::Busy, detail).at(point)
}
